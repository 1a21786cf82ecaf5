"""Addresses of the project for its page on PyPI: the relative links of the README, and the list of links beside it.

The repository names no address. Who publishes it sets two (docs/releasing.md):

- ``MOMENTKV_SITE``: where the documentation is, as ``https://docs.example.org/``;
- ``MOMENTKV_SOURCE``: where the repository is, as ``https://github.com/example/momentkv``.

Without them the README stays as it is, whose links then lead somewhere only in the repository.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

# Markdown links, and the pictures of an HTML element.
RELATIVE = re.compile(r'(?P<before>\]\(|(?:src|srcset)=")(?!https?:|#)(?P<path>[^)"#\s]+)(?P<anchor>#[\w-]+)?')


def absolute(readme: str, site: str, source: str) -> str:
    """The README with links that work everywhere: pages and pictures lead to the site, the rest to the source."""
    site, source = site.rstrip("/"), source.rstrip("/")

    def address(link: re.Match[str]) -> str:
        path, anchor = link["path"], link["anchor"] or ""
        if path == "CHANGELOG.md":
            return f"{link['before']}{site}/changelog/{anchor}"
        if not path.startswith("docs/"):
            return f"{link['before']}{source}/blob/HEAD/{path}{anchor}"
        page = path.removeprefix("docs/")
        page = re.sub(r"(?<![^/])index\.md$", "", page) if page.endswith("index.md") else re.sub(r"\.md$", "/", page)
        return f"{link['before']}{site}/{page}{anchor}"

    return RELATIVE.sub(address, readme)


class AddressHook(MetadataHookInterface):
    """Called by hatchling for whatever is built or installed."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the README and the list of links."""
        site, source = (os.environ.get(name, "") for name in ("MOMENTKV_SITE", "MOMENTKV_SOURCE"))
        if bool(site) != bool(source):
            raise ValueError("set both MOMENTKV_SITE and MOMENTKV_SOURCE, or neither; see docs/releasing.md")
        readme = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        urls = {"Paper": "https://arxiv.org/abs/2606.01563"}
        if site:
            readme = absolute(readme, site, source)
            urls |= {"Documentation": site, "Source": source, "Changelog": f"{site.rstrip('/')}/changelog/"}
        metadata["readme"] = {"content-type": "text/markdown", "text": readme}
        metadata["urls"] = urls

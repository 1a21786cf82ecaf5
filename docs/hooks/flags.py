"""Keeps command-line options in one piece: browsers break lines after hyphens, which would leave "--" at a line's end.

An mkdocs hook.
"""

from __future__ import annotations

import re
from typing import Any

CODE = re.compile(r"<code[^>]*>.*?</code>", re.DOTALL)
FLAG = re.compile(r"(?<![\w&;-])--[a-z][a-z-]*")


def keep_flags(content: str) -> str:
    """The page with every option in code marked as one piece.

    Examples
    --------
    >>> keep_flags("<code>run --new-tokens 4</code>, a--b")
    '<code>run <span class="flag">--new-tokens</span> 4</code>, a--b'
    """
    return CODE.sub(lambda code: FLAG.sub(lambda flag: f'<span class="flag">{flag[0]}</span>', code[0]), content)


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return keep_flags(content)

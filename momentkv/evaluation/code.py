"""Which code measured: results of one state of the code are not taken for those of another."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

import momentkv

__all__ = ["code_version", "digest_of_source"]


@lru_cache(maxsize=1)
def code_version() -> str:
    """The version, and eight digits of a hash of the package's own source.

    Examples
    --------
    >>> version, _, digest = code_version().partition("+")
    >>> version == momentkv.__version__, len(digest)
    (True, 8)
    """
    return f"{momentkv.__version__}+{digest_of_source(Path(momentkv.__file__).parent)}"


def digest_of_source(folder: Path) -> str:
    """Eight digits of a hash of all Python files of a folder, names included."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        for part in (path.relative_to(folder).as_posix().encode(), path.read_bytes()):
            total.update(len(part).to_bytes(8, "little") + part)
    return total.hexdigest()[:8]

"""Text files, read without anything but Python."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_text"]


def read_text(path: str | Path) -> str:
    """What a file says, or an error that names it."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{str(path)!r} is no text in UTF-8; convert it, or name another file") from None
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be read ({error.strerror}); name another file") from None

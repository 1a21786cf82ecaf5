"""Files that exist as a whole or not at all; their record and tensors are checked to be those that were written."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch

from momentkv.hf.former import CacheFileError

__all__ = ["KEY", "digest", "malformed", "read", "write"]

KEY = "momentkv"


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all.

    A new file has the permissions that any other would have; one that is there keeps its own, and a symbolic link goes
    on pointing where it does.

    Raises
    ------
    OSError
        Of the kind and number that the system gave, about ``path``.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".momentkv-{secrets.token_hex(8)}")
    try:
        mode = mode_of(target)
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise about(path, error) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if mode is not None:
            part.chmod(mode)
        part.replace(target)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise about(path, error) from error
        raise


def mode_of(target: Path) -> int | None:
    """Permissions of a file that is there, or None; raises where it may not be replaced."""
    if not target.exists():
        return None
    mode = target.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("is a folder; give the name of a file")
    if not stat.S_ISREG(mode):
        raise OSError("is no regular file, and would be replaced by one; give another name")
    if not os.access(target, os.W_OK):
        raise PermissionError("is there and may not be written to; make it writable, or give another name")
    return stat.S_IMODE(mode)


def about(path: Path, error: OSError) -> OSError:
    """An error in the words of who asked to write a file."""
    reason = error.strerror or str(error)
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        reason = f"there is no folder {path.parent}; make it first"
    message = f"the cache was not written to {path}: {reason}"
    return type(error)(message) if error.errno is None else OSError(error.errno, message)


def read(path: Path, formats: Sequence[int]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Record and tensors of a file, after a check that they are those that were written."""
    check_readable(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise CacheFileError(f"{path} is a safetensors file, but no cache of momentkv")
            record = json.loads(metadata[KEY])
            version = record.get("format") if isinstance(record, dict) else None
            if version not in formats:
                raise CacheFileError(
                    f"{path} has format {version!r}, this momentkv reads {' and '.join(map(str, formats))}; read the "
                    "text again and save it anew, or use the version that wrote it"
                )
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise CacheFileError(f"{path} is damaged or no cache file: {error}") from error
    if metadata.get("digest") != digest(metadata[KEY], tensors):
        raise CacheFileError(f"{path} has been changed since it was written: its digest does not fit its content")
    return record, tensors


def check_readable(path: Path) -> None:
    """Raise unless a path is a file that can be read."""
    try:
        if stat.S_ISREG(path.stat().st_mode):
            path.open("rb").close()
            return
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"there is no cache file {path}") from error
    except OSError as error:
        reason = f"the cache file {path} cannot be read: {error.strerror}; see to its permissions"
        raise OSError(error.errno, reason) from error
    raise CacheFileError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}, and no cache file")


@contextmanager
def malformed(path: Any) -> Iterator[None]:
    """Whatever a record makes go wrong is an error of its file."""
    try:
        yield
    except CacheFileError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CacheFileError(
            f"{path} has a digest that fits its content, but no momentkv writes such content "
            f"({type(error).__name__}: {error}); read the text again and save it anew"
        ) from error


def digest(record: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the record and of names, types, shapes and elements of all tensors."""
    state = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        x = tensors[name]
        state.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        state.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()

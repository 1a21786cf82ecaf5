"""How a cache's file is written and read: like any other file of the user, and errors name it."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from models import FAMILIES, build, prompt, tiny

from momentkv.hf import CacheFileError, MomentCache
from momentkv.hf.storage import digest


@pytest.fixture(scope="module")
def cache() -> MomentCache:
    cache = MomentCache(tiny("gemma3"), 20, sinks=1, window=8, block=4)
    with torch.no_grad():
        tiny("gemma3")(prompt(2, 60), past_key_values=cache)
    return cache


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: Any) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_a_new_file_has_the_permissions_of_any_other(cache: MomentCache, umask: int, tmp_path: Path):
    (tmp_path / "other").write_bytes(b"")
    cache.save(tmp_path / "cache")
    assert mode(tmp_path / "cache") == mode(tmp_path / "other") == 0o666 & ~umask


def test_a_file_that_is_there_keeps_its_permissions(cache: MomentCache, umask: int, tmp_path: Path):
    path = tmp_path / "cache"
    for before in (0o640, 0o666, 0o600):
        path.write_bytes(b"")
        path.chmod(before)
        cache.save(path)
        assert mode(path) == before
    assert MomentCache.load(path, tiny("gemma3")).get_seq_length() == 60


def test_a_symbolic_link_is_written_through(cache: MomentCache, tmp_path: Path):
    (tmp_path / "far").mkdir()
    link, target = tmp_path / "link", tmp_path / "far" / "cache"
    link.symlink_to(target)
    for _ in range(2):  # first one that leads nowhere
        cache.save(link)
        assert link.is_symlink()
        assert [path.name for path in (tmp_path / "far").iterdir()] == ["cache"]
        assert MomentCache.load(link, tiny("gemma3")).get_seq_length() == 60


def no_folder(path: Path, patch: Any) -> Path:
    return path / "missing" / "cache"


def a_file_for_a_folder(path: Path, patch: Any) -> Path:
    (path / "file").write_bytes(b"")
    return path / "file" / "cache"


def a_folder(path: Path, patch: Any) -> Path:
    (path / "folder").mkdir()
    return path / "folder"


def no_regular_file(path: Path, patch: Any) -> Path:
    os.mkfifo(path / "pipe")
    return path / "pipe"


def read_only(path: Path, patch: Any) -> Path:
    (path / "cache").write_bytes(b"")
    patch.setattr(os, "access", lambda *_: False)  # whoever runs the tests may write to all
    return path / "cache"


def unwritable_folder(path: Path, patch: Any) -> Path:
    def refuse(name: Any, *_: Any) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(name))

    patch.setattr(os, "open", refuse)
    return path / "cache"


def full_disk(path: Path, patch: Any) -> Path:
    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(os, "fsync", refuse)
    return path / "cache"


@pytest.mark.parametrize(
    ("place", "kind", "message"),
    [
        (no_folder, FileNotFoundError, "there is no folder .*missing; make it first"),
        (a_file_for_a_folder, NotADirectoryError, "there is no folder .*file; make it first"),
        (a_folder, IsADirectoryError, "is a folder; give the name of a file"),
        (no_regular_file, OSError, "is no regular file"),
        (read_only, PermissionError, "may not be written to; make it writable"),
        (unwritable_folder, PermissionError, "Permission denied"),
        (full_disk, OSError, "No space left on device"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(
    cache: MomentCache, place: Any, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = place(tmp_path, monkeypatch)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message) as raised:
        cache.save(path)
    assert f"was not written to {path}" in str(raised.value)
    assert ".momentkv-" not in str(raised.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_told_by_its_number(cache: MomentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(OSError, match="No space") as raised:
        cache.save(full_disk(tmp_path, monkeypatch))
    assert raised.value.errno == errno.ENOSPC


def test_a_file_that_may_not_be_read_is_there(cache: MomentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path, *_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", os.fspath(path))

    cache.save(tmp_path / "cache")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(PermissionError, match="cannot be read: Permission denied; see to its permissions"):
        MomentCache.load(tmp_path / "cache", tiny("gemma3"))


def test_what_is_no_file_is_said(tmp_path: Path):
    with pytest.raises(CacheFileError, match="is a folder, and no cache file"):
        MomentCache.load(tmp_path, tiny("gemma3"))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CacheFileError, match="is no regular file"):
        MomentCache.load(tmp_path / "pipe", tiny("gemma3"))


def test_a_file_is_of_one_dtype(tmp_path: Path):
    """Weights in another one differ by rounding, or not at all."""
    MomentCache(tiny("llama"), 64, window=8).save(tmp_path / "cache")
    for dtype in ("bfloat16", "float64"):
        message = f"a cache of this model in float32, but its weights are in {dtype} now; .*dtype=torch.float32"
        with pytest.raises(CacheFileError, match=message):
            MomentCache.load(tmp_path / "cache", tiny("llama", dtype=dtype))
    assert MomentCache.load(tmp_path / "cache", build(FAMILIES["llama"]())).dtype == "float32"
    assert MomentCache.load(tmp_path / "cache", tiny("llama").config).dtype is None


def signed(data: bytes, change: Callable[[Any, Any], None]) -> bytes:
    """A well-formed file with another record or other tensors, and a digest that fits."""
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    record = json.loads(header["momentkv"])
    change(record, tensors)
    header["momentkv"] = json.dumps(record, sort_keys=True)
    header["digest"] = digest(header["momentkv"], tensors)
    return safetensors.torch.save(tensors, header)


def without(*path: Any) -> Callable[[Any, Any], None]:
    def change(record: Any, tensors: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        del record[path[-1]]

    return change


def having(value: Any, *path: Any) -> Callable[[Any, Any], None]:
    def change(record: Any, tensors: Any) -> None:
        for key in path[:-1]:
            record = record[key]
        record[path[-1]] = value

    return change


def tensor(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any, Any], None]:
    def change(record: Any, tensors: Any) -> None:
        tensors[name] = function(tensors[name]).contiguous()

    return change


def missing(name: str) -> Callable[[Any, Any], None]:
    return lambda record, tensors: tensors.pop(name)


MALFORMED = {
    **{f"no {name}": without(name) for name in ("model", "weights", "settings", "layers", "seen")},
    **{f"no {name}": without("settings", name) for name in ("budget", "average", "policy", "correction", "order")},
    **{f"no {name}": without("layers", 1, name) for name in ("budgets", "filled", "widths", "padded", "seen")},
    "settings of another kind": having([1], "settings"),
    "a setting that nobody knows": having(1, "settings", "colour"),
    "a budget below the least": having(2, "settings", "budget"),
    "a window of text": having("wide", "settings", "window"),
    "a policy that nobody knows": having({"name": "luck", "parameters": {}}, "settings", "policy"),
    "a policy of text": having("balanced", "settings", "policy"),
    "parameters that nobody knows": having({"name": "snapkv", "parameters": {"luck": 1}}, "settings", "policy"),
    "a layer too few": without("layers", 3),
    "a layer of text": having("layer", "layers", 1),
    "other lengths": having(61, "seen"),
    "more recent tokens than there are slots": having(14, "layers", 1, "filled"),
    "recent tokens of text": having("many", "layers", 1, "filled"),
    "fewer recent tokens than counts": having(3, "layers", 1, "filled"),
    "other widths": having([3, 3], "layers", 1, "widths"),
    "widths of more heads": having([11, 11, 11], "layers", 1, "widths"),
    "budgets of one head": having([20], "layers", 1, "budgets"),
    "budgets of text": having(["20", "20"], "layers", 1, "budgets"),
    "a count of no layer": having(None, "layers", 0, "cumulative_length"),
    "a layer of another length": having(59, "layers", 0, "cumulative_length"),
    "no recent keys": missing("1.recent_keys"),
    "no counts": missing("1.counts"),
    "keys of other heads": tensor("1.recent_keys", lambda x: x[:, :1]),
    "values of fewer tokens": tensor("1.values", lambda x: x[:, :-1]),
    "positions of another type": tensor("1.positions", lambda x: x.float()),
    "positions that are none yet": tensor("1.recent_positions", lambda x: x + 1000),
    "counts below zero": tensor("1.counts", lambda x: x - 100),
    "no keys of a sliding layer": missing("0.keys"),
    "keys of a sliding layer in one row": tensor("0.keys", lambda x: x[:1]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_content_that_nobody_writes_is_an_error_of_the_file(cache: MomentCache, name: str, tmp_path: Path):
    path = tmp_path / "cache"
    cache.save(path)
    path.write_bytes(signed(path.read_bytes(), MALFORMED[name]))
    with pytest.raises(CacheFileError, match=r"cache has a digest that fits .*no momentkv writes such content"):
        MomentCache.load(path, tiny("gemma3"))


def test_the_same_file_signed_again_is_read(cache: MomentCache, tmp_path: Path):
    path = tmp_path / "cache"
    cache.save(path)
    path.write_bytes(signed(path.read_bytes(), lambda *_: None))
    assert MomentCache.load(path, tiny("gemma3")).get_seq_length() == 60

"""What is kept of compiled kernels on disk: made of what they are made of now, or not at all."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from momentkv.backends import available
from momentkv.backends.numba import compiled, rounded_kernel
from momentkv.backends.numba import decode as launch


def made_of() -> set[Path]:
    return {path for pattern in compiled.MADE_OF for path in compiled.PACKAGE.glob(pattern)}


def test_kernels_are_made_of_nothing_else():
    """All that the kernels' files import of momentkv is in files that the fingerprint is of."""
    seen = set()
    for file in (compiled.PACKAGE / "backends" / "numba").glob("*.py"):
        if not file.name.endswith(("_kernel.py", "llvm.py", "compiled.py")):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("momentkv"):
                spec = importlib.util.find_spec(str(node.module))
                assert spec is not None
                seen.add(Path(str(spec.origin)))
    assert len(seen) >= 6
    assert seen <= made_of()


def test_another_source_is_another_fingerprint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for path in made_of():
        copied = tmp_path / path.relative_to(compiled.PACKAGE)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_bytes(path.read_bytes())
    fingerprint, own = compiled.fingerprint.__wrapped__, compiled.fingerprint()
    monkeypatch.setattr(compiled, "PACKAGE", tmp_path)
    assert fingerprint() == own
    for name in ("codes/packing.py", "codes/records.py", "statistics/clustering.py", "backends/numba/llvm.py"):
        path = tmp_path / name
        source = path.read_text(encoding="utf-8")
        path.write_text(source + "\n# another\n", encoding="utf-8")
        assert fingerprint() != own, name
        path.write_text(source, encoding="utf-8")


def test_the_fingerprint_names_what_is_kept():
    kept = rounded_kernel.kernel(64)
    assert compiled.fingerprint() in kept.py_func.__qualname__
    if kept.stats.cache_path is not None:
        files = [path.name for path in Path(kept.stats.cache_path).glob("rounded_kernel*.nbi")]
        assert any(compiled.fingerprint() in name for name in files)


@pytest.mark.parametrize("error", [OSError("No space left on device"), EOFError("Ran out of input")], ids=repr)
def test_a_folder_that_cannot_be_used_is_named_and_does_without(error: Exception, monkeypatch: pytest.MonkeyPatch):
    real = compiled.njit

    def full(*args: Any, **kwargs: Any) -> Any:
        def decorator(function: Any) -> Any:
            raise error

        return decorator if kwargs.get("cache") else real(*args, **kwargs)

    monkeypatch.setattr(compiled, "njit", full)
    compiled.say_unkept.cache_clear()
    rounded_kernel.kernel.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=f"cannot be kept on disk or read from it .*{error}.*make room, or"):
            kernel = rounded_kernel.kernel(32)
        assert kernel.stats.cache_path is None
        rounded_kernel.kernel(64)  # no second warning, which would be an error here
    finally:
        rounded_kernel.kernel.cache_clear()


def test_numba_that_does_not_load_is_said_once(monkeypatch: pytest.MonkeyPatch):
    class Broken:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "numba":
                raise OSError("Could not find/load shared object file")

    monkeypatch.delitem(sys.modules, "numba")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    available.has_numba.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match="Numba cannot be imported .Could not find.*decodes by plain PyTorch"):
            assert not available.has_numba()
        assert not available.has_numba()
    finally:
        available.has_numba.cache_clear()


def test_numba_that_compiles_nothing_is_said():
    code = """
import warnings, torch
from momentkv import LayerCache
q, k, v = (torch.randn(1, heads, 60, 64) for heads in (4, 2, 2))
cache = LayerCache(budget=30, window=4, policy="streaming", bits=4)
cache.step(*(x[:, :, :59] for x in (q, k, v)))
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    out = cache.step(*(x[:, :, 59:] for x in (q, k, v)))
print(out.shape, [str(x.message) for x in said])
"""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "NUMBA_DISABLE_JIT is set, so that Numba compiles nothing" in done.stdout + done.stderr


def pool_of(error: RuntimeError) -> Any:
    def submit(*_: Any) -> None:
        raise error

    return lambda workers: SimpleNamespace(submit=submit)


def test_work_that_no_pool_takes_is_done_here(monkeypatch: pytest.MonkeyPatch):
    """A thread that still decodes when the main thread has ended."""
    torch.set_num_threads(max(2, threads := torch.get_num_threads()))
    done = np.zeros(7)

    def run(into: Any, first: int, last: int) -> None:
        into[first:last] += 1

    try:
        monkeypatch.setattr(launch, "pool", pool_of(RuntimeError("cannot schedule new futures after shutdown")))
        launch.run_shared(run, (done,), 7, launch.ALONE + 1)
        assert done.tolist() == [1] * 7
        monkeypatch.setattr(launch, "pool", pool_of(RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError, match="can't start"):
            launch.run_shared(run, (done,), 7, launch.ALONE + 1)
    finally:
        torch.set_num_threads(threads)

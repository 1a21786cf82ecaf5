"""`import momentkv` is light: no torch, no transformers, no wait."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from momentkv._moved import MOVED


def fresh(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=True)


def test_importing_momentkv_imports_neither_torch_nor_transformers():
    code = (
        "import sys, momentkv; print([m for m in ('torch', 'transformers', 'matplotlib', 'rich') if m in sys.modules])"
    )
    assert fresh(code).stdout.strip() == "[]"


def test_using_numpy_arrays_does_not_import_torch():
    code = (
        "import sys, numpy as np, momentkv; x = np.ones((1, 1, 9, 4)); "
        "momentkv.LayerCache(4, window=1, block=1).step(x, x, x); print('torch' in sys.modules)"
    )
    assert fresh(code).stdout.strip() == "False"


def test_import_takes_less_than_three_tenths_of_a_second():
    """The least of five runs: noise only ever adds."""

    def seconds() -> float:
        # Lines read "import time: self | cumulative | module", in microseconds.
        lines = fresh("import momentkv", "-X", "importtime").stderr.splitlines()
        (total,) = (line.split("|")[1] for line in lines if line.split("|")[-1].strip() == "momentkv")
        return int(total) / 1e6

    assert min(seconds() for _ in range(5)) < 0.3


def test_every_public_name_is_there():
    import momentkv

    assert sorted(momentkv.__all__) == sorted(set(momentkv.__all__))
    for name in momentkv.__all__:
        assert getattr(momentkv, name) is not None


@pytest.mark.parametrize("former", sorted(MOVED))
def test_modules_are_found_by_their_former_names(former: str):
    with pytest.warns(DeprecationWarning, match=MOVED[former]):
        module = importlib.import_module(former)
    here = importlib.import_module(MOVED[former])
    assert {name: getattr(module, name) for name in here.__all__} == {n: getattr(here, n) for n in here.__all__}

"""`import momentkv` is light: no torch, no transformers, little to wait for."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from momentkv._moved import MOVED


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_importing_momentkv_loads_itself_and_what_tells_array_libraries_apart():
    """No array library is loaded, NumPy neither: what takes time is loaded by who uses it."""
    code = (
        "import sys; before = set(sys.modules); import momentkv; "
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    assert fresh(code).stdout.strip() == "['array_api_compat', 'momentkv']"


def test_using_numpy_arrays_does_not_import_torch():
    code = (
        "import sys, numpy as np, momentkv; x = np.ones((1, 1, 9, 4)); "
        "momentkv.LayerCache(4, window=1, block=1).step(x, x, x); print('torch' in sys.modules)"
    )
    assert fresh(code).stdout.strip() == "False"


def test_commands_import_what_reports_need_when_they_report():
    modules = ("commands", "needles", "trust", "stream", "speed", "split")
    code = f"import sys; from momentkv.evaluation import {', '.join(modules)}; print({{*sys.modules}} & {{*sys.argv}})"
    done = [sys.executable, "-c", code, "pandas", "scipy.stats", "matplotlib", "markdown"]
    assert subprocess.run(done, capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_what_tutorials_import_needs_no_more_than_transformers():
    """They ask for the extra ``hf`` and ``gguf``. transformers may bring rich, as long as its own command line does."""
    code = (
        "import sys; sys.modules |= dict.fromkeys(('rich', 'pandas', 'scipy', 'matplotlib')); "
        "from momentkv.evaluation import fidelity, gap, settings, sources; print('imported')"
    )
    assert fresh(code).stdout.strip() == "imported"


def test_importing_momentkv_costs_less_than_importing_numpy():
    """In seconds of the processor, in one process: a busy or slow machine is so for both. Noise only ever adds."""
    code = """
import sys, time
import array_api_compat.numpy
numpy, before = time.process_time(), set(sys.modules)
import momentkv
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before} - sys.stdlib_module_names))
print((time.process_time() - numpy) / numpy)
"""
    runs = [fresh(code).stdout.splitlines() for _ in range(5)]
    assert {imported for imported, _ in runs} == {"['momentkv']"}
    assert min(float(cost) for _, cost in runs) < 1


def test_every_public_name_is_there():
    import momentkv

    assert sorted(momentkv.__all__) == sorted(set(momentkv.__all__))
    for name in momentkv.__all__:
        assert getattr(momentkv, name) is not None


@pytest.mark.parametrize("former", sorted(MOVED))
def test_modules_are_found_by_their_former_names(former: str):
    with pytest.warns(DeprecationWarning, match=" and ".join(MOVED[former])):
        module = importlib.import_module(former)
    for place in MOVED[former]:
        here = importlib.import_module(place)
        assert {name: getattr(module, name) for name in here.__all__} == {n: getattr(here, n) for n in here.__all__}


def test_names_of_a_module_that_was_parted_are_all_found():
    with pytest.warns(DeprecationWarning, match="momentkv.budgets is now"):
        module = importlib.reload(importlib.import_module("momentkv.budgets"))
    for name in ("budget_grid", "error_curve", "error_curves", "refine", "share_budget"):
        assert callable(getattr(module, name))

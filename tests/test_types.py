"""Names that type checkers know are those that the library knows."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from mypy import api

from momentkv import POLICIES
from momentkv.cache.allocation import Sharing
from momentkv.hf.checks import SHARING
from momentkv.policies import PolicyName
from momentkv.statistics.corrections import CORRECTIONS, CorrectionName


def test_type_checkers_know_every_name():
    assert set(get_args(PolicyName)) == set(POLICIES)
    assert set(get_args(CorrectionName)) == set(CORRECTIONS)
    assert set(get_args(Sharing)) == set(SHARING)


MISTAKES = ('sharing="headz"', 'policy="snap"', 'correction="summary"')


def test_misspelt_names_are_found_by_mypy(tmp_path: Path):
    code = tmp_path / "user.py"
    head = "from typing import Any\n\nfrom momentkv.hf import MomentCache\n\nmodel: Any = None\n"
    right = 'MomentCache(model, 64, sharing="heads", policy="snapkv", correction="none")\n'
    code.write_text(head + right + "".join(f"MomentCache(model, 64, {mistake})\n" for mistake in MISTAKES))
    out, _, status = api.run([str(code), "--cache-dir", ".mypy_cache"])
    assert status == 1
    assert [line.split(":")[1] for line in out.splitlines() if "[arg-type]" in line] == ["7", "8", "9"]
    assert "Found 3 errors" in out


def test_what_is_no_array_is_found_by_mypy_and_arrays_of_libraries_are_taken(tmp_path: Path):
    code = tmp_path / "user.py"
    names = "LayerCache, Moments, attend, correct"
    head = f"import numpy as np\nimport torch\n\nfrom momentkv import {names}\n\ncache = LayerCache(64)\n"
    right = ["x, t = np.zeros((1, 2, 3, 4)), torch.zeros(1, 2, 3, 4)"]
    right += ["attend(x, x, x).out.mean()", "attend(t, t, t, mask=t > 0).out.cpu()", "cache.step(t, t, t).tolist()"]
    right += ["correct(attend(x, x, x), x, Moments.from_tokens(x, x, extent=True), certify=bool(x.any()))"]
    wrong = ["attend(x, x, [1.0])", "cache.step(t, t, None)", 'cache.append(x, "v")']
    code.write_text(head + "\n".join([*right, *wrong]) + "\n")
    out, _, status = api.run([str(code), "--cache-dir", ".mypy_cache"])
    assert status == 1
    assert [line.split(":")[1] for line in out.splitlines() if "[arg-type]" in line] == ["12", "13", "14"]
    assert "Found 3 errors" in out

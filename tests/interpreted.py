"""The Triton kernels, run by Triton's interpreter on the CPU against float64; `test_kernels.py` runs this file.

Not collected by itself: the interpreter is chosen when Triton is imported, for a whole process. It cannot multiply
matrices of bfloat16, so halves are float16 here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from momentkv.backends.triton import decode
from momentkv.backends.triton.decode import decode_triton
from momentkv.backends.triton.tuned import Choice, candidates
from momentkv.testing.decoding import Decode, decode_cases, expected, f64, logits_error, make
from momentkv.testing.gpu import tuning
from momentkv.testing.gpu.kernels import error_of
from momentkv.testing.gpu.tuning import Kind, cases_of, kinds
from momentkv.testing.rounding import assert_within

HALF = torch.float16
CASES = decode_cases(torch.float32, HALF)


@pytest.fixture(autouse=True)
def _poisoned():
    """Whatever is allocated without a value is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    assert torch.empty(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_kernel_agrees_with_the_oracle(case: Decode):
    x = make(case)
    out, lse, logits = decode_triton(
        x.q,
        x.k,
        x.v,
        x.positions,
        x.counts,
        x.starts,
        case.capacity,
        x.recent,
        x.expansion,
        case.scale,
        case.scored,
        case.splits,
        x.coding,
    )
    exact, exact_logits, error = expected(case, x)
    assert out.dtype == case.dtype
    assert_within(f64(out), exact.out, error.out)
    assert_within(f64(lse), exact.lse, error.lse)
    if case.scored:
        assert logits is not None
        assert_within(f64(logits).reshape(exact_logits.shape), exact_logits, logits_error(case, x))


# Of a few kinds of launches, sizes that differ in what an interpreter knows: tokens of a tile, parts of the sequence.
TUNED = [
    (kind, choice._replace(waves=waves))
    for kind in kinds([torch.float32, HALF], [16, 64])[::5]
    for choice, waves in zip(candidates(kind.builtin[1])[:6:2], (3, 2, 1), strict=True)
]


@pytest.mark.parametrize(("kind", "choice"), TUNED, ids=str)
def test_every_choice_of_sizes_agrees_with_the_oracle(kind: Kind, choice: Choice):
    family, _ = kind.builtin
    for case in cases_of(kind):
        found = error_of(case, "cpu", choices={family: choice})
        assert found["right"], (case, found)


def test_what_is_timed_reads_all_copies_with_the_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "TIMED", ((2, 16),))
    for kind in kinds([torch.float32], [16])[2:5]:  # moments; records alone, and beside summaries
        _, builtin = kind.builtin
        asked = []
        launches = decode.decode_launches

        def noted(*arguments: Any, asked: Any = asked, launches: Any = launches) -> Any:
            made = launches(*arguments)
            asked.append(made[-1][0])
            return made

        with monkeypatch.context() as patch:
            patch.setattr(decode, "decode_launches", noted)
            calls = tuning.calls_of(kind, 1, torch.device("cpu"))
            outs = [call(builtin._replace(tokens=16), i)[0] for call in calls for i in range(3)]
        assert [out.shape for out in outs] == [(2, 32, 1, 16)] * 3
        assert all(out.isfinite().all() for out in outs)
        assert {launch.constants["BLOCK_N"] for launch in asked} == {16}
        assert [launch.arguments["capacity"] for launch in asked] == [16] * 3
        # Two copies, one after the other.
        keys = [launch.arguments["K"].data_ptr() for launch in asked]
        assert keys[0] == keys[2] != keys[1]
        assert asked[0].constants["CODED"] == kind.coded


@pytest.mark.parametrize(
    "case", [Decode(d=128, estimate=e, splits=2) for e in ("none", "order 1", "summaries x 12")], ids=str
)
def test_float32_errs_by_less_than_the_target(case: Decode):
    """Relative error 2e-6 against float64, as docs/speed.md promises."""
    x = make(case)
    out, lse, _ = decode_triton(
        x.q, x.k, x.v, None, None, None, case.capacity, None, x.expansion, case.scale, False, case.splits
    )
    exact, _, _ = expected(case, x)
    assert np.linalg.norm(f64(out) - exact.out) <= 2e-6 * np.linalg.norm(exact.out)
    assert np.abs(f64(lse) - exact.lse).max() <= 1e-5

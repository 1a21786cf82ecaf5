"""The Triton kernels, run by Triton's interpreter on the CPU against float64; `test_kernels.py` runs this file.

Not collected by itself: the interpreter is chosen when Triton is imported, for a whole process. It cannot multiply
matrices of bfloat16, so halves are float16 here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from momentkv.backends.triton.decode import decode_triton
from momentkv.testing.decoding import Decode, decode_cases, expected, f64, logits_error, make
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

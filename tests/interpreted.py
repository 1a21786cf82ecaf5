"""The Triton kernels, run by Triton's interpreter on the CPU against float64; `test_kernels.py` runs this file.

Not collected by itself: the interpreter is chosen when Triton is imported, for a whole process. It cannot multiply
matrices of bfloat16, so halves are float16 here.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from expansions import Decode, expected, f64, make

from momentkv.backends.triton.decode import decode_triton
from momentkv.testing.rounding import assert_within

HALF = torch.float16
CASES = [
    *(Decode(d=d, dtype=dtype) for d in (64, 96, 128, 256) for dtype in (torch.float32, HALF)),
    *(
        Decode(d=64, dtype=HALF, estimate=kind, splits=2)
        for kind in ("order 0", "order 1", "order 2", "summaries x 12")
    ),
    *(Decode(d=96, estimate=kind, scored=True) for kind in ("order 1", "order 2", "summaries x 1", "summaries x 20")),
    Decode(d=256, estimate="summaries x 12", group=1, kv_heads=1, splits=3),
    # Other dimensions than the padded ones, for keys and for values.
    Decode(d=40, dv=24, estimate="order 2", group=3, splits=3),
    Decode(d=3, dv=1, estimate="summaries x 2", group=1, batch=1),
    # Groups: odd, more than a tile of queries, several queries a head.
    Decode(group=7, estimate="order 1", kv_heads=1),
    Decode(group=17, q_len=2, kv_heads=1, batch=1, dtype=HALF, estimate="summaries x 3", scored=True),
    Decode(group=35, kv_heads=1, batch=1, dtype=HALF),
    # No token, one token; more splits than tokens, so that some are empty.
    *(Decode(d=16, capacity=n, estimate=kind, splits=2, scored=True) for n in (0, 1) for kind in ("none", "order 1")),
    # Neither tokens nor, in one head, an estimate.
    Decode(d=16, capacity=0, estimate="order 1"),
    # Ragged: counts, padding, packed, all of them.
    Decode(d=16, counted=True, splits=3),
    Decode(d=16, masked=True, estimate="order 0"),
    Decode(d=16, counted=True, masked=True, scored=True, splits=2, estimate="summaries x 2", kv_heads=3),
    Decode(d=16, packed=True, splits=2, estimate="order 1", scored=True, kv_heads=3),
    Decode(d=16, packed=True, masked=True),
    # Logits of many hundreds.
    Decode(d=64, size=30.0, scale=1.0, estimate="order 0", splits=2),
]


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
        x.q, x.k, x.v, x.positions, x.counts, x.starts, case.capacity, x.expansion, case.scale, case.scored, case.splits
    )
    exact, exact_logits, error = expected(case, x)
    assert out.dtype == case.dtype
    assert_within(f64(out), exact.out, error.out)
    assert_within(f64(lse), exact.lse, error.lse)
    if case.scored:
        assert logits is not None
        of_logits = (
            2.0**-24
            * (case.d + 4)
            * case.scale
            * case.d
            * float(x.q.abs().max())
            * np.nanmax(f64(x.k.abs()), initial=0.0)
        )
        assert_within(f64(logits).reshape(exact_logits.shape), exact_logits, of_logits)


@pytest.mark.parametrize(
    "case", [Decode(d=128, estimate=e, splits=2) for e in ("none", "order 1", "summaries x 12")], ids=str
)
def test_float32_errs_by_less_than_the_target(case: Decode):
    """Relative error 2e-6 against float64, as docs/speed.md promises."""
    x = make(case)
    out, lse, _ = decode_triton(
        x.q, x.k, x.v, None, None, None, case.capacity, x.expansion, case.scale, False, case.splits
    )
    exact, _, _ = expected(case, x)
    assert np.linalg.norm(f64(out) - exact.out) <= 2e-6 * np.linalg.norm(exact.out)
    assert np.abs(f64(lse) - exact.lse).max() <= 1e-5

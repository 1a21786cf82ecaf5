"""A query that is no number: its output and its lse are none, and no tokens that it is joined with hide that."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from libraries import LIBRARIES
from test_backends import PAIRS

from momentkv import AttentionState, LayerCache, attend, merge
from momentkv.backends import get_backend
from momentkv.backends.flash import flash
from momentkv.backends.plain import decode_plain, estimate_expansion, join
from momentkv.testing.decoding import Decode, make

RNG = np.random.default_rng(0)
Q, K, V = RNG.standard_normal((1, 4, 3, 8)), RNG.standard_normal((1, 2, 6, 8)), RNG.standard_normal((1, 2, 6, 8))
MASK = np.arange(6) < 5
BAD = Q.copy()
BAD[0, 0, 0, 3] = math.nan
KINDS: dict[str, dict[str, Any]] = {
    "vectors": {},
    "padded": {"masked": True},
    "recent": {"packed": True, "recent": 5},
    "codes": {"packed": True, "bits": (5, 3)},
    "codes and summaries": {"packed": True, "bits": (4, 4), "estimate": "summaries x 3"},
    "moments": {"estimate": "order 2"},
    "an estimate alone": {"capacity": 0, "estimate": "summaries x 3"},
}


def check(found: Any, exact: Any) -> None:
    """The first query's state is none, the others are as they were."""
    for one, other in zip(map(np.asarray, found), map(np.asarray, exact), strict=True):
        assert np.isnan(one[0, 0, 0]).all()
        np.testing.assert_array_equal(one[0, 1:], other[0, 1:])
        assert np.isfinite(one[0, 0, 1:]).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("pair", PAIRS, ids="-on-".join)
def test_every_backend_gives_nan_and_joins_keep_it(pair: tuple[str, str]):
    backend, library = get_backend(pair[0]), LIBRARIES[pair[1]]
    bad, q, k, v = (library.asarray(x) for x in (BAD, Q, K, V))
    mask = library.asarray(np.broadcast_to(MASK, (1, 2, 2, 3, 6)).copy())
    calls = [
        lambda q: backend.attend(q, k, v, scale=0.1)[0],
        lambda q: backend.attend(q, k, v, scale=0.1, mask=mask)[0],
        lambda q: backend.attend_causal(q, k, v, scale=0.1),
    ]
    for call in calls:
        found, exact = call(bad), call(q)
        check(map(library.numpy, found), map(library.numpy, exact))
    nothing = AttentionState(0 * exact.out, exact.lse - math.inf)
    for other in (attend(q, k, v), nothing):
        for one in (merge(found, other), merge(other, found)):
            assert np.isnan(library.numpy(one.lse)[0, 0, 0])
            assert np.isnan(library.numpy(one.out)[0, 0, 0]).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [1, 6, 15, 16, 40])
def test_the_flash_kernel_does_not_hide_nan(n: int, masked: bool):
    """Of fewer tokens than a register has numbers it gave zeros, output and lse."""
    bad, q = (torch.from_numpy(x).float() for x in (BAD, Q))
    k, v = (torch.from_numpy(RNG.standard_normal((1, 2, n, 8))).float() for _ in range(2))
    valid = torch.arange(n).expand(1, 2, n) < max(1, n - 2) if masked else None
    found, exact = (flash(x, k, v, scale=0.1, valid=valid) for x in (bad, q))
    check(found, exact)
    nothing = AttentionState(torch.zeros_like(exact.out), torch.full_like(exact.lse, -math.inf))
    for one in (join(found, exact), join(exact, found), join(found, nothing), join(nothing, found)):
        assert one.lse[0, 0, 0].isnan()
        assert one.out[0, 0, 0].isnan().all()


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_in_plain_torch_gives_nan(kind: str):
    case = Decode(d=16, kv_heads=3, **{"capacity": 9, **KINDS[kind]})
    x = make(case)
    bad = x.q.clone()
    bad[0, 0, 0, 3] = math.nan
    rest = (x.k, x.v, x.positions, x.counts, x.starts, case.capacity, x.recent, x.expansion, case.scale, False)
    states = [(decode_plain(q, *rest, x.coding)[:2]) for q in (bad, x.q)]
    if x.expansion is not None:
        states += [estimate_expansion(q, x.expansion, scale=case.scale) for q in (bad, x.q)]
    for found, exact in zip(states[::2], states[1::2], strict=True):
        for one, other in zip(found, exact, strict=True):
            assert one[0, 0].isnan().all()
            assert torch.equal(one[0, 1:], other[0, 1:])


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("padded", [False, True])
def test_a_step_of_a_cache_keeps_nan(padded: bool, bits: int | None):
    """Of few tokens, and where a row may see none."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 60, 8, generator=generator) for heads in (4, 2, 2))
    cache = LayerCache(10, window=8, block=4, policy="streaming", correction="none", bits=bits)
    cache.step(q, k, v)
    q, k, v = (x[:, :, -1:].clone() for x in (q, k, v))
    q[0, 0, 0, 3] = math.nan
    out = cache.step(q, k, v, valid=torch.tensor([True, not padded])[:, None, None])
    assert out[0, 0].isnan().all()
    assert out[0, 2:].isfinite().all()
    assert out[1].isfinite().all()

"""A static cache: equal to the one that is not, in two graphs, at constant addresses, without waiting for the device."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from matrix import MODES, generate
from models import FAMILIES, build, left_padded, prompt, tiny
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import CompileConfig

from momentkv._hf_static import ring
from momentkv._static import StaticState
from momentkv._static_flush import flush
from momentkv.cache import LayerCache
from momentkv.corrections import AnchoredSummaries
from momentkv.hf import FinishedRows, MomentCache
from momentkv.policies import POLICIES, SnapKV
from momentkv.policies.critical import CriticalKV

SMALL: dict[str, Any] = {"sinks": 1, "window": 6, "block": 4}
PAPER: dict[str, Any] = SMALL | {"policy": "momentkv", "correction": "moments", "sharing": "uniform"}
# Averages over neighbouring positions are equal for neighbours that have no others, up to the order of a sum: which of
# two such tokens goes is then decided by rounding. Without the average, no tie is left.
NO_TIES = {"snapkv": SnapKV(kernel=1), "criticalkv": CriticalKV(kernel=1)}
STEPS = 15  # at least three flushes
# Models of float64 normalise in float32.
TOLERANCE = 1e-6
FULL = [name for name in FAMILIES if name not in ("mistral sliding", "gemma3")]
REFUSED_MODES = ("assisted", "prompt lookup")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {"policy": NO_TIES.get(name, name), "sharing": "uniform"}) for name in sorted(POLICIES)),
    *((f"paper, order {order}", PAPER | {"order": order}) for order in (None, 0, 1)),
    ("heads, moments", {"correction": "moments"}),
    ("heads, plain", {"order": None}),
    ("heads, order 0", {"order": 0}),
    ("heads, observed", {"policy": "h2o"}),
    ("layers", {"sharing": "layers"}),
    ("no rank", {"correction": AnchoredSummaries(rank=0)}),
    ("tokens one by one", {"block": 1}),
    ("share", {"budget": 0.5}),
]


def pair(model: Any, **settings: Any) -> list[MomentCache]:
    """A cache that is not static and one that is."""
    settings = SMALL | {"budget": 14} | settings
    return [MomentCache(model, static=static, **settings) for static in (False, True)]


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows, one of which is shorter than the budget."""
    return left_padded([prompt(1, 40, seed=1), prompt(1, 27, seed=2), prompt(1, 5, seed=3)])


def assert_same(a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], tolerance: float = TOLERANCE):
    assert torch.equal(a[0], b[0])
    assert b[1].isfinite().all()
    assert (a[1] - b[1]).abs().max() <= tolerance * a[1].abs().max()


@pytest.mark.parametrize("name", [name for name, _ in CASES])
def test_static_equals_dynamic(name: str):
    model = tiny("llama", dtype="float64")
    caches = pair(model, **dict(CASES)[name])
    results = [generate(model, cache, *rows(), new=STEPS) for cache in caches]
    assert_same(*results)
    assert caches[1].static is not None
    assert caches[1].static.frozen
    for a, b in zip(*(cache.moment_layers.values() for cache in caches), strict=True):
        assert a.seen == b.seen
        for one, other in zip(a.parts, b.parts, strict=True):
            assert torch.equal(one.moments.weight, other.moments.weight)
            real = [(part.positions >= 0).sum(-1) for part in (one, other)]
            assert torch.equal(*real)
            for row, count in enumerate(real[0].squeeze(-1).tolist() if len(a.parts) > 1 else []):
                assert torch.equal(*(part.positions[row][part.positions[row] >= 0] for part in (one, other)))
                assert count < one.budget + one.block


@pytest.mark.parametrize("family", FULL)
def test_static_equals_dynamic_in_every_family(family: str):
    model = tiny(family, dtype="float64")
    assert_same(*(generate(model, cache, *rows(), new=STEPS) for cache in pair(model)))


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in REFUSED_MODES])
def test_static_equals_dynamic_in_every_mode(mode: str):
    halves = mode in ("bfloat16", "float16")
    model = tiny("llama", dtype="float32" if halves else "float64")
    settings = PAPER if halves else {}
    results = [MODES[mode](model, lambda _, cache=cache: cache) for cache in pair(model, **settings)]
    assert_same(*results, tolerance=2**-5 if halves else TOLERANCE)

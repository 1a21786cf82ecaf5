"""Modes of PyTorch that a caller may be in: what a cache computes and holds does not depend on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from passes import SIZES, passes

from momentkv import LayerCache


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"correction": "summaries"},
        {"bits": 4},
        {"certify": 2},
        {"order": None},
        {"policy": "h2o"},
        {"policy": "tova"},
    ],
    ids=str,
)
@pytest.mark.parametrize("static", [False, True])
def test_steps_do_not_mind_autocast(settings: dict[str, Any], static: bool):
    """A product in bfloat16 would lose half of what a correction gives, and its moments would fit no others."""
    if static and "certify" in settings:
        pytest.skip("certificates decide on the host")
    given, alone = (LayerCache(20, static=static, **SIZES, **settings) for _ in range(2))
    for q, k, v in passes((60, *[1] * 20, 5, *[1] * 8)):
        expected = alone.step(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            out = given.step(q, k, v)
        assert out.dtype == torch.float32
        if q.shape[-2] < 60:  # a prefill is as the caller has it
            assert torch.equal(out, expected)
    for name, x in alone.arrays().items():
        assert torch.equal(given.arrays()[name], x), name


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("filled", [60, 61, 75])
def test_what_inference_mode_made_may_be_used_after_it(static: bool, filled: int):
    steps = passes((50, *[1] * 40))
    mixed, alone = (LayerCache(20, static=static, **SIZES) for _ in range(2))
    for step, (q, k, v) in enumerate(steps):
        expected = alone.step(q, k, v)
        with torch.inference_mode(50 + step < filled):
            out = mixed.step(q, k, v)
        assert torch.equal(out, expected)
    assert not any(x.is_inference() for x in mixed.arrays().values())

"""Every family in every mode: exact while nothing is evicted, bounded and deterministic when something is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from heads import heads_of
from matrix import MODES, PAGE, TITLES, TOLERANCES, page, stock
from models import COMPRESSED, FAMILIES, tiny
from transformers.cache_utils import DynamicSlidingWindowLayer

from momentkv.hf import MomentCache

SMALL: dict[str, Any] = {"sinks": 1, "window": 8, "block": 4, "rollback": 8}
SHARINGS = ("heads", "layers", "uniform")
FLOAT32 = 2e-5  # as in test_hf


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_evicted_equals_sdpa(family: str, mode: str):
    tokens, logits = MODES[mode](tiny(family), lambda model: MomentCache(model, 400, sharing="uniform", **SMALL))
    expected_tokens, expected = MODES[mode](tiny(family, "sdpa"), stock)
    if mode not in TOLERANCES:
        assert torch.equal(tokens, expected_tokens)
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= TOLERANCES.get(mode, FLOAT32) * expected.abs().max()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", COMPRESSED)
def test_bounded_counted_once_and_the_same_again(family: str, mode: str):
    """Each pair with one way of sharing; over the families, all of them in every mode."""
    sharing = SHARINGS[(list(MODES).index(mode) + COMPRESSED.index(family)) % 3]
    runs = []
    for _ in range(2 if family == "llama" else 1):
        made: list[MomentCache] = []

        def make(model: Any, made: list[MomentCache] = made) -> MomentCache:
            made.append(MomentCache(model, 14, sharing=sharing, **SMALL))
            return made[-1]

        tokens, logits = MODES[mode](tiny(family), make)
        assert logits.isfinite().all()
        runs.append([tokens, logits])
        (cache,) = made
        for layer in cache.layers:
            if isinstance(layer, DynamicSlidingWindowLayer):
                assert layer.keys.shape[2] <= layer.sliding_window - 1
        for core in cache.moment_layers.values():
            for part in heads_of(core):
                assert part.stored < part.budget + part.block
                counted = (part.positions >= 0).sum(-1) + part.moments.weight
                assert counted[0].eq(part.seen).all() or mode == "rows moved"
                assert (counted <= part.seen).all()
                assert (part.moments.weight > 0).all()
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[-1], strict=True))


def test_the_page_shows_this_table():
    assert set(TITLES) == set(FAMILIES)
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/matrix.py"

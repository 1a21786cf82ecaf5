"""Models that are compiled whole, with graphs that may break: the cache runs between them as it does uncompiled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from models import FAMILIES, build, prompt, tiny
from transformers import DynamicCache

from momentkv.hf import MomentCache

SMALL: dict[str, Any] = {"budget": 40, "sinks": 1, "window": 6, "block": 4}
PASSES = (60, 1, 5, 1)
TOLERANCE = 2e-5  # of float32


@pytest.fixture(autouse=True)
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_close(a: torch.Tensor, b: torch.Tensor) -> None:
    assert (a - b).abs().max() <= TOLERANCE * a.abs().max()


@pytest.mark.parametrize(
    ("family", "static", "masked"),
    [("llama", False, True), ("llama", True, True), ("gemma3", False, True)],
)
@torch.no_grad()
def test_passes_of_any_lengths_are_the_same_compiled(family: str, static: bool, masked: bool):
    model = build(FAMILIES[family]())
    step = torch.compile(model.forward, backend="eager")
    cache, other = (MomentCache(model, static=static, **SMALL) for _ in range(2))
    mask = torch.ones(2, 0, dtype=torch.long)
    for seed, new in enumerate(PASSES):
        mask = torch.nn.functional.pad(mask, (0, new), value=1)
        mask[1, :9] = 0
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, -new:]
        given = {"attention_mask": mask, "position_ids": places} if masked else {}
        ids = prompt(2, new, seed=seed)
        assert_close(*(run(ids, past_key_values=x, **given).logits for run, x in ((model, other), (step, cache))))
    assert int(cache.get_seq_length()) == sum(PASSES)
    for a, b in zip(*(x.moment_layers.values() for x in (cache, other)), strict=True):
        assert torch.equal(a.positions, b.positions)


@torch.no_grad()
def test_stock_caches_are_compiled_as_ever():
    model, reference = build(FAMILIES["llama"]()), tiny("llama", "sdpa")
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    cache, other = DynamicCache(config=model.config), DynamicCache(config=reference.config)
    for new in (40, 1, 1):
        ids = prompt(1, new)
        assert_close(*(run(ids, past_key_values=x).logits for run, x in ((reference, other), (step, cache))))


@pytest.mark.parametrize("static", [False, True])
def test_a_whole_graph_of_a_prompt_is_refused_and_changes_nothing(static: bool):
    model = build(FAMILIES["llama"]())
    cache, step = MomentCache(model, static=static, **SMALL), torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match=r"MomentCache supports torch\.compile for steps of one token"):
        step(prompt(1, 60), past_key_values=cache)
    assert cache.get_seq_length() == 0

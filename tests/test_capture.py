"""A context that is captured and read again, and trials on it, are what a model does that reads it so."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from models import prompt, save_with_bytes, tiny

from momentkv.evaluation.capture import CaptureCache, capture_again, replay, replay_tried
from momentkv.evaluation.fidelity import measure
from momentkv.evaluation.settings import setting_of
from momentkv.evaluation.sources import load_model
from momentkv.hf import MomentCache, read

CONTEXT = 60


def test_a_model_without_a_compressed_layer_is_refused_before_it_reads():
    with pytest.raises(ValueError, match="all have a sliding window"):
        next(measure(tiny("mistral sliding"), prompt(1, CONTEXT + 9), CONTEXT, [setting_of("default")]))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_replay_after_capturing_again_is_reading_twice(tmp_path: Path, family: str):
    """Bit for bit but for roundings of other parts: the tokens are the same, and so are their scores."""
    folder = save_with_bytes(tmp_path, family)
    model, tokenizer = load_model(folder)
    ids = tokenizer("the quick brown fox jumps over the lazy dog, and so on; " * 3, return_tensors="pt").input_ids
    captured = CaptureCache(model, 256)
    with torch.no_grad():
        model(ids, past_key_values=captured)
        capture_again(model, captured, ids, tokenizer)
        again = captured.read_again[0]
        capture_again(model, captured, ids, tokenizer)
    assert captured.read_again[0] is again  # which took a second reading, and takes no third
    options = {"policy": "twice", "window": 8, "block": 1}
    replayed = replay(captured, MomentCache(model, 40, **options))
    once = read(model, ids, MomentCache(model, 40, **options), tokenizer=tokenizer)
    for mine, core in zip(replayed.moment_layers.values(), once.moment_layers.values(), strict=True):
        assert torch.equal(mine.positions, core.positions)
        assert torch.equal(mine.keys, core.keys)
        torch.testing.assert_close(mine.attention, core.attention, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("policy", "family"), [("balanced", "llama"), ("twice", "llama"), ("twice", "gemma3")])
def test_a_replayed_trial_is_reading_with_one(tmp_path: Path, policy: str, family: str):
    folder = save_with_bytes(tmp_path, family)
    model, tokenizer = load_model(folder)
    ids = tokenizer(" ".join(f"the fox jumps over dog {n}," for n in range(25)), return_tensors="pt").input_ids
    captured = CaptureCache(model, 512)
    with torch.no_grad():
        expected = model(ids, past_key_values=captured).logits[:, -64:]
        if policy == "twice":
            capture_again(model, captured, ids, tokenizer, 64)
    options = {"policy": policy, "window": 8, "block": 1, "bits": "auto"}
    replayed = replay_tried(model, captured, MomentCache(model, 40, **options), ids, expected)
    read_ = MomentCache(model, 40, **options)
    read(model, ids, read_, twice=policy == "twice", tokenizer=tokenizer, trial=64)
    assert len(replayed.tried) > 1
    assert [way[:2] for way in replayed.tried] == [way[:2] for way in read_.tried]
    # Codes that a rounding moves are a step away.
    assert [way.kl for way in replayed.tried] == pytest.approx([way.kl for way in read_.tried], rel=1e-2)
    for mine, core in zip(replayed.moment_layers.values(), read_.moment_layers.values(), strict=True):
        assert torch.equal(mine.positions, core.positions)
        torch.testing.assert_close(mine.keys, core.keys, rtol=1e-4, atol=1e-4)


def test_what_a_method_is_measured_at_does_not_depend_on_those_beside_it(tmp_path: Path):
    """Also not where some of them hold tokens back: a reading without the end has other scores."""
    model, tokenizer = load_model(save_with_bytes(tmp_path))
    text = " ".join(f"the fox jumps over dog {n}," for n in range(25))
    ids, context = tokenizer(text, return_tensors="pt").input_ids, 500
    ways = [dataclasses.replace(setting_of(name), budget=60) for name in ("twice", "twice@auto", "balanced/none")]
    tried = [dataclasses.replace(ways[1], trial=trial) for trial in (64, 32)]

    def kl_of(settings: list) -> list[float]:
        return [found.kl for _, found, _ in measure(model, ids, context, settings, window=8, tokenizer=tokenizer)]

    together = kl_of([*tried, *ways])
    alone = [kl_of([x])[0] for x in (*tried, *ways)]
    # Queries of more tokens are kept, and attention sums in another order.
    assert together == pytest.approx(alone, rel=1e-4)


def test_a_trial_needs_queries_and_a_context_that_is_longer(tmp_path: Path):
    folder = save_with_bytes(tmp_path)
    model, _ = load_model(folder)
    ids = prompt(1, CONTEXT)
    with torch.no_grad():
        captured = CaptureCache(model, 8)
        expected = model(ids, past_key_values=captured).logits[:, -4:]
    with pytest.raises(ValueError, match="8 queries were captured; capture with keep="):
        replay_tried(model, captured, MomentCache(model, 40, bits="auto"), ids, expected)
    grid = [dataclasses.replace(setting_of("default@tried"), budget=40)]
    with pytest.raises(ValueError, match="methods have some that try 256 tokens of a context of 20;"):
        list(measure(model, prompt(1, 30), 20, grid))
    with pytest.raises(ValueError, match="methods have some that are tried, and segment is 100"):
        list(measure(model, prompt(1, 330), 300, grid, segment=100))

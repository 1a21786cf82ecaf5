"""Steps of a static cache beside padding, which need no mask, but then positions."""

from __future__ import annotations

import pytest
import torch
from models import left_padded, prompt, tiny

from momentkv.hf import MomentCache

TOLERANCE = 2e-5  # of float32


@pytest.mark.parametrize("cropped", [3, 5])
@torch.no_grad()
def test_tokens_of_steps_without_a_mask_are_taken_back_and_padding_before_them_is_still_known(cropped: int):
    """As a graph that is replayed reads them; the padding is on the right of the prompt."""
    model, ids = tiny("llama"), prompt(2, 40)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[1, -5:] = 0
    places, real = (mask.cumsum(1) - 1).clamp(min=0), mask.sum(1, keepdim=True)
    tried, other = (MomentCache(model, 400, static=True, window=8) for _ in range(2))
    for cache in (tried, other):
        model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
        for step in range(5 if cache is tried else 5 - cropped):
            model(prompt(2, 1, seed=step), position_ids=real + step, past_key_values=cache)
    tried.crop(-cropped)
    longer = torch.cat([mask, torch.ones(2, 5 - cropped + 3, dtype=torch.long)], 1)
    given = {"attention_mask": longer, "position_ids": (longer.cumsum(1) - 1)[:, -3:]}
    found, expected = (model(prompt(2, 3), past_key_values=cache, **given).logits for cache in (tried, other))
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@torch.no_grad()
def test_a_step_beside_padding_without_mask_and_positions_is_refused_as_it_is_without_static():
    """The model would count the padding of the shorter row."""
    model, (ids, mask) = tiny("llama"), left_padded([prompt(1, 40, seed=1), prompt(1, 27, seed=2)])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    longer = torch.nn.functional.pad(mask, (0, 1), value=1)
    new, outs = prompt(2, 1, seed=3), []
    for static in (False, True):
        cache = MomentCache(model, 30, static=static, window=8)
        model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask"):
            model(new, past_key_values=cache)
        assert cache.get_seq_length() == 40
        outs.append(model(new, attention_mask=longer, position_ids=mask.sum(1, keepdim=True), past_key_values=cache))
    told = MomentCache(model, 30, static=True, window=8)
    model(ids, attention_mask=mask, position_ids=places, past_key_values=told)
    outs.append(model(new, position_ids=mask.sum(1, keepdim=True), past_key_values=told))
    for out in outs[1:]:
        torch.testing.assert_close(out.logits, outs[0].logits, rtol=1e-4, atol=1e-4)

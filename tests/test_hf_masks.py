"""Masks that say something else of tokens than what a cache has read them as."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from models import left_padded, prompt, tiny
from transformers import DynamicCache, StoppingCriteria

from momentkv.hf import FinishedRows, MomentCache

ABOVE = 4096  # a budget above every length here
FLOAT32 = 2e-5  # as in test_hf


class StopRow(StoppingCriteria):
    """Ends the first row at a length, as stop strings do: without an end token."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= 44, False])


def second_turn(model: Any, cache: Any, criteria: Any) -> torch.Tensor:
    """Logits of another turn after one in which a row was stopped, its pads masked."""
    settings = {"max_new_tokens": 20, "do_sample": False, "stopping_criteria": [criteria]}
    ids = model.generate(prompt(2, 40), past_key_values=cache, **settings)
    seen = cache.get_seq_length()
    ids, mask = torch.cat([ids, prompt(2, 6, seed=9)], 1), torch.ones(2, 66, dtype=torch.long)
    mask[0, 44:60] = 0
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids[:, seen:], attention_mask=mask, position_ids=places[:, seen:], past_key_values=cache).logits[
            :, -6:
        ]


def test_rows_stopped_by_a_criterion_are_padding_afterwards():
    model, stock = tiny("llama"), tiny("llama", "sdpa")
    reference = second_turn(stock, DynamicCache(config=stock.config), StopRow())
    cache = MomentCache(model, ABOVE)
    found = second_turn(model, cache, FinishedRows(cache, criteria=[StopRow()]))
    assert (found - reference).abs().max() <= FLOAT32 * reference.abs().max()


def test_a_mask_that_hides_what_was_read_as_tokens_is_refused():
    with pytest.raises(ValueError, match=r"hides token 44 of row 0 \(15 in all\).*FinishedRows"):
        second_turn(tiny("llama"), MomentCache(tiny("llama"), ABOVE), StopRow())


@pytest.mark.parametrize("static", [False, True])
def test_a_mask_has_a_row_for_each_of_the_batch(static: bool):
    model, ids = tiny("llama"), prompt(2, 40)
    cache = MomentCache(model, ABOVE, static=static)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 40\) for a batch of 2"):
            model(ids, attention_mask=torch.ones(1, 40), past_key_values=cache)
        model(ids, attention_mask=torch.ones(2, 40), past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 41\) for a batch of 2"):
            model(ids[:, :1], attention_mask=torch.ones(3, 41), past_key_values=cache)
    assert int(cache.get_seq_length()) == 40


def test_what_ends_a_row_must_be_said():
    with pytest.raises(ValueError, match="eos_token_id is None and criteria is empty"):
        FinishedRows(MomentCache(tiny("llama"), ABOVE))


def read_padded(**settings: Any) -> tuple[Any, MomentCache, torch.Tensor]:
    """A model, a cache that has read two rows, the second with five tokens of padding, and their mask."""
    model = tiny("llama")
    ids, mask = left_padded([prompt(1, 40, seed=1), prompt(1, 35, seed=2)])
    cache = MomentCache(model, 20, sinks=1, window=8, block=4, **settings)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    return model, cache, mask


def longer(mask: torch.Tensor, by: int = 1) -> torch.Tensor:
    return torch.nn.functional.pad(mask, (0, by), value=1)


def hiding(mask: torch.Tensor) -> torch.Tensor:
    mask = mask.clone()
    mask[0, 20] = 0
    return mask


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("new", [1, 3])
def test_masks_that_say_something_else_than_before_are_refused_and_change_nothing(new: int, static: bool):
    (model, cache, mask), (_, other, _) = read_padded(static=static), read_padded(static=static)
    ids = prompt(2, new, seed=3)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"hides token 20 of row 0 \(1 in all\)"):
            model(ids, attention_mask=longer(hiding(mask), new), past_key_values=cache)
        with pytest.raises(ValueError, match=r"shows token 0 of row 1 \(5 in all\).*read as padding"):
            model(ids, attention_mask=torch.ones(2, 40 + new, dtype=torch.long), past_key_values=cache)
        a, b = (model(ids, attention_mask=longer(mask, new), past_key_values=one).logits for one in (cache, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("static", [False, True])
def test_a_mask_of_constant_width_has_room_for_tokens_to_come(static: bool):
    (model, cache, mask), (_, other, _) = read_padded(static=static), read_padded(static=static)
    with torch.no_grad():
        for step in range(6):
            mask, ids = longer(mask), prompt(2, 1, seed=step)
            wide = torch.nn.functional.pad(mask, (0, 64 - mask.shape[1]))
            a, b = (
                model(ids, attention_mask=shown, past_key_values=one).logits
                for shown, one in ((mask, cache), (wide, other))
            )
            assert torch.equal(a, b)
            assert torch.equal(cache.padding.codes, other.padding.codes)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("width", [1, 40])
def test_a_mask_over_fewer_tokens_than_were_seen_is_refused_and_changes_nothing(width: int, static: bool):
    (model, cache, mask), (_, other, _) = read_padded(static=static), read_padded(static=static)
    ids = prompt(2, 1, seed=3)
    with torch.no_grad():
        with pytest.raises(ValueError, match=f"attention_mask has length {width}, but 41 tokens.*pass a mask over all"):
            model(ids, attention_mask=mask[:, -width:], past_key_values=cache)
        a, b = (model(ids, attention_mask=longer(mask), past_key_values=one).logits for one in (cache, other))
    assert torch.equal(a, b)
    assert torch.equal(cache.padding.codes, other.padding.codes)


@pytest.mark.parametrize("shape", [(2, 1, 1, 7), (2, 1, 1, 40), (3, 1, 1, 41)], ids=str)
def test_a_mask_of_one_query_of_another_shape_is_refused_and_changes_nothing(shape: tuple[int, ...]):
    (model, cache, mask), (_, other, _) = read_padded(), read_padded()
    ids = prompt(2, 1, seed=3)
    with torch.no_grad():
        with pytest.raises(ValueError, match=rf"attention_mask has shape {re.escape(str(shape))} for 2 rows of 41"):
            model(ids, attention_mask=torch.ones(shape, dtype=torch.bool), past_key_values=cache)
        a, b = (model(ids, attention_mask=longer(mask), past_key_values=one).logits for one in (cache, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 2])
def test_one_line_of_a_mask_for_several_queries_is_refused_and_changes_nothing(rows: int):
    # As transformers broadcasts it, each query sees the tokens after its own; as padding, it would not.
    ids, shown = prompt(2, 3, seed=3), torch.ones(rows, 1, 1, 43, dtype=torch.bool)
    stock = tiny("llama", "sdpa")
    with torch.no_grad():
        a, b = (
            stock(prompt(2, 43), attention_mask=x).logits for x in (None, torch.ones(2, 1, 1, 43, dtype=torch.bool))
        )
    assert not torch.allclose(a, b)
    (model, cache, mask), (_, other, _) = read_padded(), read_padded()
    with torch.no_grad():
        with pytest.raises(ValueError, match=rf"attention_mask has shape \({rows}, 1, 1, 43\), one line for 3 queries"):
            model(ids, attention_mask=shown, past_key_values=cache)
        a, b = (model(ids, attention_mask=longer(mask, 3), past_key_values=one).logits for one in (cache, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("beyond", [0, 9])
def test_a_mask_of_one_query_may_serve_all_rows_and_have_room_for_tokens_to_come(rows: int, beyond: int):
    model, ids = tiny("llama"), prompt(2, 40)
    cache, other = MomentCache(model, ABOVE), MomentCache(model, ABOVE)
    mask = (torch.arange(41) >= 5).expand(2, 41)
    with torch.no_grad():
        for one in (cache, other):
            model(ids, attention_mask=mask[:, :40].long(), past_key_values=one)
        whole = torch.nn.functional.pad(mask[:rows, None, None], (0, beyond))
        a = model(ids[:, :1], attention_mask=whole, past_key_values=cache).logits
        b = model(ids[:, :1], attention_mask=mask.long(), past_key_values=other).logits
    assert torch.equal(a, b)
    assert torch.equal(cache.padding.codes, other.padding.codes)
    cache.reorder_cache(torch.tensor([1, 0]))


def test_no_mask_after_padding_is_refused():
    model, cache, _ = read_padded()
    with torch.no_grad(), pytest.raises(ValueError, match=r"shows token 0 of row 1 \(5 in all\)"):
        model(prompt(2, 1), past_key_values=cache)


def moved(model: Any, cache: MomentCache, mask: torch.Tensor, path: Path) -> tuple[MomentCache, torch.Tensor]:
    cache.reorder_cache(torch.tensor([1, 0]))
    return cache, mask.flip(0)


def repeated(model: Any, cache: MomentCache, mask: torch.Tensor, path: Path) -> tuple[MomentCache, torch.Tensor]:
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices([0, 3])  # a tensor or a list, as of transformers' caches
    return cache, mask


def cropped(model: Any, cache: MomentCache, mask: torch.Tensor, path: Path) -> tuple[MomentCache, torch.Tensor]:
    with torch.no_grad():
        model(prompt(2, 3), attention_mask=longer(mask, 3), past_key_values=cache)
    cache.crop(-3)
    return cache, mask


def reread(model: Any, cache: MomentCache, mask: torch.Tensor, path: Path) -> tuple[MomentCache, torch.Tensor]:
    cache.save(path / "cache")
    return MomentCache.load(path / "cache", model), mask


def stepped(model: Any, cache: MomentCache, mask: torch.Tensor, path: Path) -> tuple[MomentCache, torch.Tensor]:
    """Two steps in which the second row is fed padding."""
    for _ in range(2):
        mask = longer(mask)
        mask[1, -1] = 0
        with torch.no_grad():
            model(prompt(2, 1), attention_mask=mask, past_key_values=cache)
    return cache, mask


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("change", [moved, repeated, cropped, reread, stepped])
def test_what_was_padding_is_known_after(change: Any, static: bool, tmp_path: Path):
    cache, mask = change(*read_padded(static=static), tmp_path)
    with torch.no_grad():
        for new in (2, 1):
            with pytest.raises(ValueError, match="hides token 20 of row 0"):
                tiny("llama")(prompt(2, new), attention_mask=longer(hiding(mask), new), past_key_values=cache)
            mask = longer(mask, new)
            tiny("llama")(prompt(2, new), attention_mask=mask, past_key_values=cache)

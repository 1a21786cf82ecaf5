"""Tokens taken back: recorded ones leave no trace, others no attention, and evicted ones are refused."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from contents import assert_same, contents
from heads import heads_of
from models import left_padded, prompt, tiny
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

from momentkv.hf import MomentCache, momentkv_attention
from momentkv.policies import H2O

SMALL: dict[str, Any] = {"sinks": 1, "window": 8, "block": 4, "rollback": 16}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "layers": {"sharing": "layers"},
    "uniform": {"sharing": "uniform"},
    "paper": {"sharing": "uniform", "policy": "momentkv", "correction": "moments"},
    "all queries": {"sharing": "uniform", "policy": H2O(observes=None)},
    "no scores": {"policy": "keydiff", "order": None},
    "few bits": {"bits": 4},
}
ASSISTED: dict[str, Any] = {
    "assisted": lambda family: {"assistant_model": tiny(family, "sdpa"), "num_assistant_tokens": 4},
    # A model that guesses wrong.
    "another assistant": lambda family: {"assistant_model": tiny("qwen2", "sdpa"), "num_assistant_tokens": 4},
    "prompt lookup": lambda family: {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1},
}
TOLERANCE = 2e-5  # as in test_hf


def tokens(count: int, seed: int, rows: int = 2) -> list[torch.Tensor]:
    """Queries, keys and values of a tiny model's layer."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, count, 16, generator=generator) for heads in (4, 2, 2)]


def step(cache: MomentCache, count: int, seed: int, keep: int | None = None, padding: slice | None = None) -> None:
    """One pass through all layers of a cache, as a model would do it; ``keep`` reads only its first tokens."""
    module = torch.nn.Module()
    seen = cache.get_seq_length()
    keep = count if keep is None else keep
    mask = None
    if padding:
        mask = torch.ones(2, seen + keep, dtype=torch.bool)
        mask[1, padding] = False
    for index in range(2):
        q, k, v = (x[:, :, :keep] for x in tokens(count, seed + 100 * index))
        keys, values = cache.update(k, v, index)
        momentkv_attention(module, q, keys, values, mask)


def state(cache: MomentCache) -> dict[str, Any]:
    return {f"{index}.{name}": x for index, core in cache.moment_layers.items() for name, x in contents(core).items()}


def recording(kind: str, budget: int = 20) -> tuple[MomentCache, MomentCache]:
    caches = [MomentCache(tiny("llama"), budget, **(SMALL | KINDS[kind])) for _ in range(2)]
    caches[0].activate_past_recording()
    return caches[0], caches[1]


@pytest.mark.parametrize("padding", [None, slice(0, 7), slice(40, 52)], ids=["", "padded", "within"])
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_tokens_that_are_taken_back_leave_no_trace(kind: str, padding: slice | None):
    """To the last bit: scores, query statistics, budgets and moments are those of a cache that never read them."""
    recorded, fresh = recording(kind)
    # (tokens read, tokens that stay): a prefill, candidates of which some, all, none but one and none at all stay.
    for seed, (count, stays) in enumerate([(60, 55), (5, 3), (6, 6), (5, 1), (1, 1), (4, 0), (50, 38), (3, 2)]):
        step(recorded, count, seed, padding=padding)
        recorded.crop(stays - count)
        if stays:
            step(fresh, count, seed, keep=stays, padding=padding)
        assert_same(state(recorded), state(fresh))
        assert recorded.nbytes == fresh.nbytes
    assert all(core.has_evicted for core in fresh.moment_layers.values())


@pytest.mark.parametrize("lengths", [[100], [1] * 100, [60, *[1] * 40], [30, 40, 30]], ids=str)
@pytest.mark.parametrize("records", [False, True])
def test_advice_of_a_crop_that_is_refused_leads_to_one_that_is_not(lengths: list[int], records: bool):
    def read(rollback: int, records: bool) -> MomentCache:
        cache = MomentCache(tiny("llama"), 20, policy="snapkv", **(SMALL | {"rollback": rollback}))
        if records:
            cache.activate_past_recording()
        for seed, count in enumerate(lengths):
            step(cache, count, seed)
        return cache

    with pytest.raises(RuntimeError, match=r"crop\(-90\): .*rollback=(90|180) or more") as refused:
        read(16, records).crop(-90)
    said = re.findall(r"rollback=(\d+) or more", str(refused.value))
    assert "activate_past_recording" in str(refused.value) or records
    cache = read(int(said[0]), True)
    cache.crop(-90)
    assert cache.get_seq_length() == 10


def test_a_recorded_pass_keeps_the_queries_of_rows_that_are_padded_on_the_right():
    """As many queries are kept as a rollback takes, and those of the pass's end may be of padding."""
    recorded, fresh = (MomentCache(tiny("llama"), 20, **(SMALL | {"rollback": 4}), policy="snapkv") for _ in range(2))
    recorded.activate_past_recording()
    for cache in (recorded, fresh):
        step(cache, 80, seed=0, padding=slice(40, 80))
    recorded.crop(0)
    assert_same(state(recorded), state(fresh))


@pytest.mark.parametrize("kind", KINDS)
def test_several_passes_are_taken_back_at_once(kind: str):
    recorded, fresh = recording(kind)
    for count, seed in ((50, 0), (1, 1), (1, 2), (3, 3), (1, 4)):
        step(recorded, count, seed)
    assert all((part.positions >= 0).all() for core in recorded.moment_layers.values() for part in heads_of(core))
    recorded.crop(-3)  # the last one, and two of the three before
    for count, seed, keep in ((50, 0, 50), (1, 1, 1), (1, 2, 1), (3, 3, 1)):
        step(fresh, count, seed, keep=keep)
    assert_same(state(recorded), state(fresh))
    for cache in (recorded, fresh):
        cache.crop(0)
        step(cache, 7, 9)
    recorded.crop(0)
    assert_same(state(recorded), state(fresh))


@pytest.mark.parametrize("kind", ["default", "layers", "paper"])
def test_a_cache_that_records_without_crop_stays_bounded(kind: str):
    """Nobody calls crop once assisted decoding is over; the oldest passes are then settled as if they had been."""
    recorded, fresh = recording(kind)
    step(recorded, 60, 0)
    step(fresh, 60, 0)
    for seed in range(1, 34):
        step(recorded, 1, seed)
        step(fresh, 1, seed)
        for core in recorded.moment_layers.values():
            assert all(part.stored < part.budget + part.block + 16 for part in heads_of(core))
    recorded.crop(0)
    assert_same(state(recorded), state(fresh))
    assert recorded.nbytes == fresh.nbytes


def test_what_is_no_longer_held_is_refused_and_nothing_changes():
    recorded, _ = recording("uniform")
    step(recorded, 500, 0)
    before = state(recorded)
    with pytest.raises(RuntimeError, match=r"crop\(-100\): 100 of the 500 tokens .*rollback=100"):
        recorded.crop(-100)
    assert_same(state(recorded), before)
    recorded.crop(-16)
    assert recorded.get_seq_length() == 484
    before = state(recorded)
    with pytest.raises(RuntimeError, match=r"crop\(-30\): some of these tokens have been evicted, or are padding"):
        recorded.crop(-30)
    assert_same(state(recorded), before)


class Broken(H2O):
    """Fails when asked for the n-th time."""

    left = 0

    def importance(self, tokens: Any) -> Any:
        type(self).left -= 1
        if self.left == 0:
            raise MemoryError("out of memory")
        return super().importance(tokens)


@pytest.mark.parametrize("sharing", ["uniform", "layers"])
def test_a_crop_that_fails_changes_nothing(sharing: str):
    cache = MomentCache(tiny("llama"), 20, policy=Broken(), sharing=sharing, **SMALL)
    cache.activate_past_recording()
    step(cache, 60, 0)
    before = state(cache)
    Broken.left = 2
    with pytest.raises(MemoryError):
        cache.crop(-2)
    assert_same(state(cache), before)
    cache.crop(-2)
    assert cache.get_seq_length() == 58
    assert all(core.has_evicted for core in cache.moment_layers.values())


def proceed(model: Any, cache: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    positions = None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits


@pytest.mark.parametrize("kind", ["default", "uniform"])
@pytest.mark.parametrize("family", ["llama", "gemma3 full"])
def test_crop_without_recording_equals_a_full_cache_while_nothing_is_evicted(family: str, kind: str):
    rows = [prompt(1, 40, seed=1), prompt(1, 33, seed=2)]
    ids, mask = left_padded(rows)
    model, stock = tiny(family), tiny(family, "sdpa")
    cache, full = MomentCache(model, 400, **(SMALL | KINDS[kind])), DynamicCache(config=stock.config)
    for one, holder in ((model, cache), (stock, full)):
        proceed(one, holder, ids, mask)
        holder.crop(-12)
    more = prompt(2, 5, seed=3)
    longer = torch.cat([mask[:, :28], torch.ones(2, 5).long()], 1)
    a, b = proceed(model, cache, more, longer), proceed(stock, full, more, longer)
    assert (a - b).abs().max() <= TOLERANCE * b.abs().max()
    assert cache.get_seq_length() == full.get_seq_length() == 33


@pytest.mark.parametrize("kind", KINDS)
def test_crop_within_the_window_takes_out_the_newest_tokens_alone(kind: str):
    _, cache = recording(kind)
    step(cache, 60, 0, padding=slice(0, 3))
    step(cache, 1, 1, padding=slice(0, 3))
    before = state(cache)
    cache.crop(-5)
    after = state(cache)
    assert cache.get_seq_length() == 56
    for name, x in before.items():
        if name.endswith("positions"):
            stays = [row[(row >= 0) & (row < 56)].tolist() for row in x.flatten(0, 1)]
            assert [row[row >= 0].tolist() for row in after[name].flatten(0, 1)] == stays
        elif ".moments." in name:
            assert torch.equal(after[name], x)
    step(cache, 8, 2, padding=slice(0, 3))
    assert cache.get_seq_length() == 64
    for core in cache.moment_layers.values():
        for part in heads_of(core):
            assert (part.positions < 64).all()
            assert ((part.positions >= 56).sum(-1) == 8).all()
            if part.order is not None:
                real = torch.tensor([[64], [61]])
                assert torch.equal(
                    (part.positions >= 0).sum(-1) + part.moments.weight, real.expand(2, part.keys.shape[1])
                )


def test_crop_of_everything_is_a_reset():
    cache = MomentCache(tiny("gemma3"), 20, **SMALL)
    fresh = MomentCache(tiny("gemma3"), 20, **SMALL)
    proceed(tiny("gemma3"), cache, prompt(1, 50))
    cache.crop(-50)
    assert cache.get_seq_length() == cache.nbytes == 0
    other = prompt(1, 50, seed=1)
    assert torch.equal(proceed(tiny("gemma3"), cache, other), proceed(tiny("gemma3"), fresh, other))


def generate(model: Any, cache: Any, ids: torch.Tensor, new: int, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("mode", ASSISTED)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral sliding"])
def test_assisted_decoding_with_nothing_evicted_equals_greedy_sdpa(family: str, mode: str):
    ids, stock = prompt(1, 40), tiny(family, "sdpa")
    cache = MomentCache(tiny(family), 400, **SMALL, sharing="uniform" if mode == "assisted" else "heads")
    ids = torch.cat([ids, ids], 1)  # something to look up
    out, logits = generate(tiny(family), cache, ids, 10, **ASSISTED[mode](family))
    expected, full = generate(stock, DynamicCache(config=stock.config), ids, 10)
    assert torch.equal(out, expected)
    assert (logits - full).abs().max() <= TOLERANCE * full.abs().max()
    assert cache.get_seq_length() == 89


@pytest.mark.parametrize(
    ("family", "mode", "kind"),
    [
        ("llama", "assisted", "uniform"),
        ("llama", "prompt lookup", "layers"),
        ("llama", "another assistant", "default"),
        ("gemma3", "prompt lookup", "default"),
        ("gemma3", "another assistant", "uniform"),
    ],
)
def test_assisted_decoding_is_bounded_and_counts_each_token_once(
    family: str, mode: str, kind: str, monkeypatch: pytest.MonkeyPatch
):
    model, crops = tiny(family), []
    cache = MomentCache(model, 20, **(SMALL | KINDS[kind]))
    crop = MomentCache.crop

    def watched(self: MomentCache, tokens: int) -> None:
        crop(self, tokens)
        crops.append(tokens)
        for index, layer in enumerate(self.layers):
            if isinstance(layer, DynamicSlidingWindowLayer):
                assert layer.keys.shape[2] <= 15
                continue
            assert not layer.passes
            for part in heads_of(self.moment_layers[index]):
                assert part.stored < part.budget + part.block
                assert ((part.positions >= 0).sum(-1) + part.moments.weight == part.seen).all()

    monkeypatch.setattr(MomentCache, "crop", watched)
    ids = torch.cat([prompt(1, 40), prompt(1, 40)], 1)
    out, logits = generate(model, cache, ids, 12, **ASSISTED[mode](family))
    assert logits.isfinite().all()
    assert cache.get_seq_length() == out.shape[1] - 1
    assert len(crops) > 2
    # And goes on without assistance, still recording, still bounded.
    more = torch.cat([out, prompt(1, 9, seed=1)], 1)
    generate(model, cache, more, 25)
    for index, core in cache.moment_layers.items():
        assert cache.layers[index].record_past
        assert all(part.stored < part.budget + part.block + 16 for part in heads_of(core))
    assert all(x.keys.shape[2] <= 15 + 17 for x in cache.layers if isinstance(x, DynamicSlidingWindowLayer))


def test_assisted_decoding_of_what_the_cache_has_read_is_refused_by_name():
    """transformers then reads the whole conversation once more, with DynamicCache as well."""
    model, cache = tiny("llama"), MomentCache(tiny("llama"), 20, **SMALL)
    out, _ = generate(model, cache, prompt(1, 40), 4)
    more = torch.cat([out, prompt(1, 9, seed=1)], 1)
    with pytest.raises(ValueError, match="tokens"):
        generate(model, cache, more, 8, prompt_lookup_num_tokens=4)


@pytest.mark.parametrize("move", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_moving_rows_settles_recorded_passes(move: str):
    recorded, fresh = recording("default")
    for cache in (recorded, fresh):
        step(cache, 60, 0)
        getattr(cache, move)(2 if move == "batch_repeat_interleave" else torch.tensor([1, 0]))
    assert_same(state(recorded), state(fresh))


def test_recording_turned_off_settles_at_the_next_pass():
    recorded, fresh = recording("default")
    step(recorded, 60, 0)
    for layer in recorded.layers:
        layer.record_past = False  # as transformers does on some devices
    step(fresh, 60, 0)
    for cache in (recorded, fresh):
        step(cache, 1, 1)
    assert_same(state(recorded), state(fresh))


def test_layers_alone_can_be_cropped_unless_they_share():
    def read(cache: MomentCache, sizes: Sequence[int]) -> None:
        for seed, count in enumerate(sizes):
            step(cache, count, seed)

    recorded, _ = recording("uniform")
    read(recorded, [60])
    for layer in recorded.layers:
        layer.crop(-2)
    assert recorded.get_seq_length() == 58
    shared, _ = recording("default")
    read(shared, [60])
    with pytest.raises(RuntimeError, match="shares its budget"):
        shared.layers[0].crop(-2)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_offloaded_layers_come_back(family: str):
    a, b = (MomentCache(tiny(family), 20, **SMALL) for _ in range(2))
    for cache in (a, b):
        proceed(tiny(family), cache, prompt(1, 50))
    a.offload()
    a.prefetch(0)
    more = prompt(1, 3, seed=1)
    assert torch.equal(proceed(tiny(family), a, more), proceed(tiny(family), b, more))
    a.activate_past_recording()
    proceed(tiny(family), a, more)
    layer = next(layer for layer in a.layers if hasattr(layer, "core"))
    layer.to(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="cannot move a cache layer to meta"):
        layer.to(torch.device("meta"))
    a.crop(0)
    layer.to(torch.device("meta"))
    assert {x.device.type for x in layer.core.arrays().values()} == {"meta"}

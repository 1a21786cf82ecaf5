"""Ways to compress tried on a text's own last tokens: what is measured, what is chosen, and what that leaves behind."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import COMPRESSED, left_padded, prompt, tiny
from test_read import REQUEST, contents, interrupted, made, read_tiny

from momentkv.hf import MomentCache
from momentkv.hf.layer import MomentLayer
from momentkv.hf.reading import Reading
from momentkv.hf.stretches import LEAD
from momentkv.hf.trial import SHARES, changes_of, climb
from momentkv.policies import Twice

TEXT, HELD_BACK, BUDGET = 480, 32, 48


def auto(family: str, policy: Any = "twice", budget: Any = BUDGET, **options: Any) -> MomentCache:
    return made(family, budget, policy=policy, bits="auto", **options)


def tried(family: str, cache: MomentCache, rows: int = 1, **options: Any) -> MomentCache:
    """Parts that end where the tokens held back begin, so that sums are of the same numbers without a trial."""
    return read_tiny(family, prompt(rows, TEXT), cache, trial=HELD_BACK, chunk=HELD_BACK, **options)


def set_to(cache: MomentCache, bits: tuple[int, int] | None, share: float | None) -> MomentCache:
    """The cache, whose bits and share are settled."""
    for shared in cache.shared_budgets:
        if share is not None:
            shared.take_share(share)
    for core in cache.moment_layers.values():
        if bits is not None:
            core.code(bits)
    return cache


def assert_same(one: MomentCache, other: MomentCache) -> None:
    for mine, theirs in zip(contents(one), contents(other), strict=True):
        assert len(mine) == len(theirs)
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("family", COMPRESSED)
@pytest.mark.parametrize("policy", ["balanced", "twice"])
def test_the_best_that_was_tried_is_what_the_text_is_compressed_with(family: str, policy: str):
    twice = policy == "twice"
    cache = tried(family, auto(family, policy), twice=twice)
    assert len({way[:2] for way in cache.tried}) == len(cache.tried) >= (4 if twice else 2)
    core = next(iter(cache.moment_layers.values()))
    bits, share = core.config.bits, core.config.policy.share if twice else None
    changes = {way[:2]: way.kl for way in cache.tried}
    # What is usual, or what did better than that.
    usual = ((5, 3), 0.6 if twice else None)
    assert (bits, share) in changes
    assert (bits, share) == usual or changes[bits, share] < changes[usual]
    settled = set_to(auto(family, policy), bits, share)
    assert_same(cache, read_tiny(family, prompt(1, TEXT), settled, twice=twice, chunk=HELD_BACK))


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_what_is_measured_is_the_changes_of_predictions_of_tokens_held_back(family: str):
    """Against caches that read what is before these tokens and nothing else."""
    ids, model = prompt(2, TEXT), tiny(family)
    cache = tried(family, auto(family, "balanced"), rows=2, twice=False)
    with torch.no_grad():
        expected = model(ids).logits[:, -HELD_BACK:]
    assert cache.tried
    for way in cache.tried:
        other = set_to(auto(family, "balanced"), way.bits, way.share)
        read_tiny(family, ids[:, :-HELD_BACK], other, twice=False, chunk=HELD_BACK)
        other.activate_past_recording()
        with torch.no_grad():
            found = model(ids[:, -HELD_BACK:], past_key_values=other).logits
        # A mean of float32 logarithms; predictions of the whole text in one pass are rounded otherwise.
        assert way.kl == pytest.approx(float(changes_of(expected, found).mean()), rel=1e-3, abs=1e-5)


def test_scores_of_tokens_held_back_have_no_say_in_a_trial():
    """A second reading of tokens before them alone gives the same scores to these, but for what it also sees."""
    seen: list[torch.Tensor] = []
    evict = MomentLayer.evict

    def watched(self: MomentLayer) -> None:
        seen.append(self.core.attention.clone())
        evict(self)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(MomentLayer, "evict", watched)
        cache = tried("llama", auto("llama"))
    layers = len(cache.moment_layers)
    trials, last = seen[:-layers], seen[-layers:]
    assert len(trials) == layers * len(cache.tried)
    for scores, final in zip(trials, last * len(cache.tried), strict=True):
        assert scores.shape[-1] == TEXT - HELD_BACK
        # The largest weight over fewer queries; those of the last tokens raise some.
        assert bool((scores <= final[..., : TEXT - HELD_BACK]).all())
    assert any(bool((one < both[..., : TEXT - HELD_BACK]).any()) for one, both in zip(trials, last, strict=False))


def test_tokens_held_back_are_said_again_within_what_a_pass_may_have():
    said = []
    forward = Reading.forward

    def watched(self: Reading, ids: torch.Tensor, mask: Any, **options: Any) -> torch.Tensor:
        if self.readers[0].again:
            said.append(ids.shape[1])
        return forward(self, ids, mask, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Reading, "forward", watched)
        one = read_tiny("llama", prompt(1, TEXT), auto("llama"), trial=64, chunk=32)
    assert max(said) <= len(REQUEST) + LEAD + 32
    assert one.tried


@pytest.mark.parametrize(("budget", "chunk"), [(0.1, 32), ("48KiB", 32), (BUDGET, 2048)])
def test_a_trial_is_of_any_budget(budget: Any, chunk: int):
    cache = read_tiny("llama", prompt(1, TEXT), auto("llama", budget=budget), trial=HELD_BACK, chunk=chunk)
    assert cache.tried
    assert max(core.stored for core in cache.moment_layers.values()) < TEXT
    if isinstance(budget, str):
        assert cache.nbytes <= 48 * 1024


def test_a_trial_is_of_all_rows_padded_ones_too():
    ids, mask = left_padded([prompt(1, 120, 0), prompt(1, TEXT, 1)])
    cache = read_tiny("llama", ids, auto("llama"), attention_mask=mask, trial=HELD_BACK)
    assert cache.tried
    alone = [read_tiny("llama", x, auto("llama"), trial=HELD_BACK) for x in (prompt(1, 120, 0), prompt(1, TEXT, 1))]
    # Budgets are of both rows, so that neither is as alone; but each way has a change between finite numbers.
    assert all(0 <= way.kl < 20 for way in (*cache.tried, *alone[0].tried, *alone[1].tried))


def test_a_static_cache_goes_on_as_one_that_is_not():
    static, plain = (tried("llama", auto("llama", static=on)) for on in (True, False))
    assert [way[:2] for way in static.tried] == [way[:2] for way in plain.tried]
    for token in prompt(1, 20, 1)[0]:
        with torch.no_grad():
            one, other = (tiny("llama")(token[None, None], past_key_values=x).logits for x in (static, plain))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_with_bits_given_only_the_share_is_tried():
    cache = tried("llama", made("llama", BUDGET, policy="twice", bits=4))
    assert {way.bits for way in cache.tried} == {(5, 3)}
    assert {way.share for way in cache.tried} <= set(SHARES)
    assert len(cache.tried) >= 2


def test_without_a_second_reading_only_bits_are_tried():
    cache = tried("llama", auto("llama"), twice=False)
    assert {way.share for way in cache.tried} == {None}
    assert len({way.bits for way in cache.tried}) == len(cache.tried) >= 2
    assert {core.config.policy for core in cache.moment_layers.values()} == {Twice()}


def test_where_nothing_has_to_go_nothing_is_tried():
    assert tried("llama", auto("llama", budget=TEXT + 1)).tried == []


def test_reset_takes_back_what_was_chosen(tmp_path: Path):
    # A share that no trial offers but its own.
    cache = tried("llama", auto("llama", Twice(share=0.55)))
    shares = {way.share for way in cache.tried}
    assert 0.55 in shares
    assert len(shares) > 1
    cache.save(tmp_path / "text.safetensors")
    loaded = MomentCache.load(tmp_path / "text.safetensors", tiny("llama"))
    for mine, theirs, copied in zip(
        *(x.moment_layers.values() for x in (cache, loaded, copy.deepcopy(cache))), strict=True
    ):
        assert mine.config.policy == theirs.config.policy == copied.config.policy
        assert mine.config.bits == theirs.config.bits == copied.config.bits
    fresh = read_tiny("llama", prompt(1, TEXT), auto("llama", Twice(share=0.55)))
    for each in (cache, loaded):
        each.reset()
        assert each.tried == []
        assert {core.config.policy for core in each.moment_layers.values()} == {Twice(share=0.55)}
        assert {core.config.bits for core in each.moment_layers.values()} == {None}
        assert_same(read_tiny("llama", prompt(1, TEXT), each), fresh)


@pytest.mark.parametrize("call", range(13, 40, 5))
def test_ctrl_c_in_a_trial_leaves_the_cache_empty(call: int, monkeypatch: pytest.MonkeyPatch):
    cache = auto("llama")
    with monkeypatch.context() as patched:
        patched.setattr(MomentLayer, "attend", interrupted(call))
        with pytest.raises(KeyboardInterrupt, match="reading was interrupted: the cache is empty"):
            tried("llama", cache)
    assert cache.get_seq_length() == 0
    assert cache.tried == []
    assert_same(tried("llama", cache), tried("llama", auto("llama")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trial": -1}, "trial is -1, of a text of 480 tokens; hold back some of them"),
        ({"trial": 32.5}, "trial is 32.5, of a text of 480 tokens"),
        ({"trial": "some"}, "trial is 'some', of a text of 480 tokens"),
        ({"trial": TEXT}, "trial is 480, of a text of 480 tokens"),
        ({"trial": 32, "segment": 64}, "trial is 32 and segment is 64; try on a text in one piece"),
        ({"trial": 32, "twice": 0.5}, "trial is 32 and twice is 0.5; read all of the text a second time"),
        ({"trial": 32, "attention_mask": torch.ones(1, TEXT).index_fill(1, torch.tensor([470]), 0)}, "pad at the left"),
    ],
)
def test_what_cannot_be_tried_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        read_tiny("llama", prompt(1, TEXT), auto("llama"), **options)


def test_a_trial_needs_something_to_choose_and_an_empty_cache():
    with pytest.raises(ValueError, match="trial is 32, but there is nothing to choose"):
        read_tiny("llama", prompt(1, TEXT), made("llama", bits=4), trial=32)
    with pytest.raises(ValueError, match="trial is 32, but there is nothing to choose"):
        read_tiny("llama", prompt(1, TEXT), made("llama", policy="twice", bits=4), trial=32, twice=False)
    with pytest.raises(ValueError, match="trial is 32, but the cache has read 480 tokens"):
        read_tiny("llama", prompt(1, TEXT), tried("llama", auto("llama")), trial=32)


def test_one_goes_downhill_from_where_one_begins():
    costs = {3: 5.0, 4: 3.0, 5: 4.0, 6: 1.0, 8: 0.0}
    for start, end in ((4, 4), (6, 8), (3, 4), (8, 8)):
        assert climb(list(costs), start, lambda x: torch.tensor([costs[x]] * 3)) == end
    # With one case there is no error of the mean, and equal costs are no fall.
    assert climb([1, 2], 1, lambda x: torch.tensor([-float(x)])) == 2
    assert climb([1, 2], 1, lambda x: torch.tensor([0.0])) == 1
    assert climb([1, 2], 1, lambda x: torch.tensor([math.nan])) == 1


@pytest.mark.parametrize(("fall", "end"), [(0.9, 1), (1.1, 2)])
def test_a_fall_within_its_standard_error_is_none(fall: float, end: int):
    noise = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    costs = {1: torch.zeros(400, dtype=torch.float64), 2: noise - fall / 400**0.5}
    assert climb([1, 2], 1, costs.__getitem__) == end

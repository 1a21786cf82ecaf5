"""Budgets as tokens, shares and bytes; and what a cache says of itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from heads import heads_of
from models import SIZES, VOCABULARY, build, left_padded, prompt, tiny
from transformers import DynamicCache, Gemma4TextConfig

from momentkv.cache.budget_rules import TotalBytes
from momentkv.cache.layer import LayerCache
from momentkv.evaluation.steps import evicted_tokens
from momentkv.hf import CacheSummary, MomentCache
from momentkv.policies import H2O
from momentkv.trust import trust

SMALL: dict[str, Any] = {"sinks": 1, "window": 8, "block": 4}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "layers": {"sharing": "layers", "policy": "tova"},
    "paper": {"sharing": "uniform", "policy": "momentkv", "correction": "moments"},
    "plain": {"sharing": "uniform", "order": None, "policy": H2O()},
    "ada-kv": {"sharing": "ada-kv", "policy": "snapkv"},
    "queries without correction": {"order": None, "policy": "expected-attention"},
    "certified": {"certify": 1},
    "certified, few bits": {"certify": 1, "bits": 16},
}


def parts(cache: MomentCache) -> list[Any]:
    return [part for core in cache.moment_layers.values() for part in heads_of(core)]


def generate(model: Any, cache: MomentCache, ids: torch.Tensor, mask: Any = None, **settings: Any) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": 8, "do_sample": False} | settings
    return model.generate(ids, attention_mask=mask, past_key_values=cache, **settings)


def test_a_model_is_all_that_is_needed():
    cache = MomentCache(tiny("llama"))
    assert [core.budget for core in cache.moment_layers.values()] == [[512, 512]] * 2
    assert generate(tiny("llama"), cache, prompt(1, 20)).shape == (1, 28)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_total_in_bytes_is_never_exceeded_and_well_used(family: str, kind: str, dtype: str):
    model, total = tiny(family, "momentkv", dtype), 160 * 1024
    cache, sizes = MomentCache(model, "160KiB", **({"bits": None} | SMALL | KINDS[kind])), []
    hook = model.register_forward_hook(lambda *_: sizes.append(cache.nbytes))
    ids, mask = left_padded([prompt(1, 400, seed=1), prompt(1, 380, seed=2)])
    try:
        generate(model, cache, ids, mask, max_new_tokens=14)
    finally:
        hook.remove()
    assert len(sizes) == 14
    assert max(sizes) <= total
    assert max(sizes) > 0.7 * total
    assert all(part.has_evicted for part in parts(cache))


@pytest.mark.parametrize("bits", [4, 6, None])
@torch.no_grad()
def test_the_least_total_for_so_many_tokens_is_what_they_take(bits: int | None):
    """To the byte: means, deviations and the order of channels included."""
    model = tiny("llama")
    cache = MomentCache(model, "40KiB", bits=bits, sharing="uniform", **SMALL)
    model(prompt(1, 400), past_key_values=cache)
    core = next(iter(cache.moment_layers.values()))
    k, v, layers = core.state.recent_keys, core.state.recent_values, len(cache.moment_layers)

    def tokens(total: int) -> int:
        return TotalBytes(total, "").tokens(core.config, layers, k, v, 0)

    wanted = tokens(40 * 1024)
    least = next(total for total in range(40 * 1024, 0, -1) if tokens(total - 1) < wanted)
    cache, sizes = MomentCache(model, f"{least}B", bits=bits, sharing="uniform", **SMALL), []
    model(prompt(1, 400), past_key_values=cache)
    for _ in range(2 * SMALL["block"]):
        model(prompt(1, 1), past_key_values=cache)
        sizes.append(cache.nbytes)
    assert least - 8 * layers < max(sizes) <= least


def test_a_total_in_bytes_holds_for_every_turn_and_prefill_in_chunks():
    model = tiny("llama")
    cache = MomentCache(model, "40KiB", **SMALL)
    ids = prompt(1, 200)
    for turn in range(3):
        out = generate(model, cache, ids, prefill_chunk_size=50)
        assert cache.nbytes <= 40 * 1024
        ids = torch.cat([out, prompt(1, 45, seed=turn)], 1)


def test_a_total_that_is_too_small_is_refused_before_anything_changes():
    model = tiny("llama")
    cache = MomentCache(model, "20KiB", **SMALL)
    with pytest.raises(
        ValueError, match=r"budget is '20KiB', too little for 2 rows.* use (\d+)KiB or more, or fewer rows$"
    ) as error:
        generate(model, cache, prompt(2, 50))
    assert cache.get_seq_length() == cache.nbytes == 0
    needed = int(str(error.value).split("use ")[1].split("KiB")[0])
    enough = MomentCache(model, f"{needed}KiB", **SMALL)
    generate(model, enough, prompt(2, 50))
    assert enough.nbytes <= needed * 1024
    with pytest.raises(ValueError, match="too little"):
        generate(model, MomentCache(model, f"{needed - 1}KiB", **SMALL), prompt(2, 50))


def test_a_total_that_is_too_small_says_what_windows_take():
    model = tiny("gemma3")
    cache = MomentCache(model, "20KiB", **SMALL)
    # Two layers, keys and values of a window of 16 less the token at hand, two heads, d = 16, four bytes.
    taken = 2 * 2 * 15 * 2 * 16 * 4
    with pytest.raises(ValueError, match=f"layers with a window of their own take {taken} of them; use"):
        generate(model, cache, prompt(1, 50))


def test_more_rows_do_not_fit_bytes_that_were_divided():
    model = tiny("llama")
    cache = MomentCache(model, "100KiB", **SMALL)
    generate(model, cache, prompt(2, 100))
    with pytest.raises(RuntimeError, match=r"batch_repeat_interleave\(2\): the budget of 100KiB"):
        cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.nbytes <= 50 * 1024


@pytest.mark.parametrize("sharing", ["uniform", "heads"])
def test_a_share_is_of_the_tokens_read_at_each_prefill(sharing: str):
    model = tiny("llama")
    whole, chunks = (MomentCache(model, 0.25, sharing=sharing, **SMALL) for _ in range(2))
    ids = prompt(1, 240)
    with torch.no_grad():
        model(ids, past_key_values=whole)
        for start in range(0, 240, 60):
            model(ids[:, start : start + 60], past_key_values=chunks)
    for cache in (whole, chunks):
        budgets = [part.budget for part in parts(cache)]
        assert sum(budgets) / len(budgets) <= 60
        assert sum(budgets) / len(budgets) > 55
        assert all(part.stored < part.budget + part.block for part in parts(cache))
    with torch.no_grad():
        before = [part.budget for part in parts(whole)]
        model(ids[:, :1], past_key_values=whole)
        assert [part.budget for part in parts(whole)] == before
        model(ids[:, :4], past_key_values=whole)  # too few to share anew: all grow alike
        assert {new - old for new, old in zip([part.budget for part in parts(whole)], before, strict=True)} <= {0, 1}
        model(ids[:, :155], past_key_values=whole)
    assert sum(part.budget for part in parts(whole)) / len(before) == pytest.approx(100, abs=4)
    whole.reset()
    with torch.no_grad():
        model(ids[:, :20], past_key_values=whole)
    assert {part.budget for part in parts(whole)} == {10}  # no less than sinks, window and one


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (1.5, r"budget is 1.5; a share is in \(0, 1\]"),
        (0.0, "budget is 0.0"),
        (-0.5, "budget is -0.5"),
        ("64", r"budget is '64'; bytes are a number and a unit, like '64MiB'"),
        ("64 potatoes", "budget is '64 potatoes'"),
        ("-1MiB", "budget is '-1MiB'"),
        (True, "budget is True"),
        (None, "budget is None"),
        ([0.5, 0.5], r"budget is \[0.5, 0.5\]"),
        (1, "budget is 1, but sinks"),
    ],
)
def test_budgets_that_mean_nothing_are_refused(budget: Any, message: str):
    with pytest.raises(ValueError, match=message):
        MomentCache(tiny("llama"), budget)


def test_a_budget_may_be_of_any_librarys_numbers():
    model = tiny("llama")
    for given in (np.int64(64), np.asarray(64), torch.tensor(64)):
        assert repr(MomentCache(model, given)) == repr(MomentCache(model, 64))
        assert LayerCache(given).budget == 64
    for given in ([np.int64(64), 70], np.asarray([64, 70]), torch.tensor([64, 70])):
        assert repr(MomentCache(model, given)) == repr(MomentCache(model, [64, 70]))
        assert LayerCache(given).budget == [64, 70]
    assert repr(MomentCache(model, np.float32(0.5))) == repr(MomentCache(model, 0.5))
    with pytest.raises(TypeError, match=r"budget is array\(\[\[64, 70\]\]\), a ndarray; use a whole number"):
        LayerCache(np.asarray([[64, 70]]))


def test_pyramids_are_of_tokens():
    with pytest.raises(ValueError, match=r"budget is 0.5, but sharing=.pyramid. needs one in tokens"):
        MomentCache(tiny("llama"), 0.5, sharing="pyramid")


def test_rules_take_no_rollback_below_one():
    with pytest.raises(ValueError, match="rollback is 0"):
        MomentCache(tiny("llama"), 64, rollback=0)


def test_a_summary_says_what_each_layer_holds():
    model = tiny("gemma3")
    cache = MomentCache(model, 20, sharing="uniform", **SMALL)
    assert "0 tokens read" in str(cache.summary())
    generate(model, cache, prompt(2, 60), max_new_tokens=3)
    summary = cache.summary()
    assert isinstance(summary, CacheSummary)
    assert summary.seen == 62
    assert summary.nbytes == cache.nbytes
    assert [layer.kind for layer in summary.layers] == ["sliding", "moment"] * 2
    for layer in summary.layers:
        assert layer.retained + layer.evicted == 62
        assert layer.budget == (20 if layer.kind == "moment" else 0)
        assert layer.trust is None
    # Layers times tokens (a window of 16), rows, heads, keys and values, d, bytes.
    assert summary.full_bytes == (2 * 62 + 2 * 15) * 2 * 2 * 2 * 16 * 4
    stock = DynamicCache(config=model.config)
    generate(model, stock, prompt(2, 60), max_new_tokens=3)
    assert summary.full_bytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in stock.layers)
    assert str(summary).splitlines()[0].split() == ["layer", "kind", "budget", "retained", "evicted", "KiB"]
    certified = MomentCache(tiny("llama"), 24, certify=2, **SMALL)
    with torch.no_grad():
        tiny("llama")(prompt(1, 62), past_key_values=certified)
    estimates = [layer.trust for layer in certified.summary().layers]
    for estimate, core in zip(estimates, certified.moment_layers.values(), strict=True):
        # Scores are scaled queries times keys: the mean query that a cache holds is scaled, the trust's is not.
        mean = core.state.query_mean[:, :, None] * 16**0.5
        assert estimate == pytest.approx(float(trust(core, mean).estimated.mean()), rel=1e-5)
    with pytest.raises(ValueError, match="trust gave 'x' for a layer; it must give a number"):
        cache.summary(trust=lambda _: "x")
    trusted = cache.summary(trust=lambda core: core.seen / 100)
    assert [layer.trust for layer in trusted.layers] == [None, 0.62] * 2
    assert str(trusted).splitlines()[0].endswith("trust")
    plain = MomentCache(tiny("llama"), 20, order=None, **SMALL)
    generate(tiny("llama"), plain, prompt(1, 60), max_new_tokens=2)
    assert all(layer.retained + layer.evicted == 61 for layer in plain.summary().layers)


@pytest.mark.parametrize("settings", [{}, {"order": None}, {"order": None, "static": True}], ids=str)
@torch.no_grad()
def test_tokens_that_went_are_counted_as_the_summary_does(settings: dict, monkeypatch: pytest.MonkeyPatch):
    """After every step that is timed, hence without a look at the tokens that stay; static arrays need one."""
    model = tiny("llama")
    cache = MomentCache(model, 24, **(SMALL | settings))
    assert evicted_tokens(cache) == 0
    counted = []
    for seed, n in enumerate((60, *[1] * 9)):
        model(prompt(2, n, seed=seed), past_key_values=cache)
        shown = sum(layer.evicted for layer in cache.summary().layers)
        with monkeypatch.context() as patch:
            if "static" not in settings:
                patch.setattr(LayerCache, "view", lambda core: pytest.fail("tokens were looked at"))
            counted.append(evicted_tokens(cache))
        assert counted[-1] == pytest.approx(shown)
    assert sum(np.diff(counted) > 0) == 2


def test_repr_is_one_line_that_says_what_it_is():
    cache = MomentCache(tiny("gemma3"), "1MiB", **SMALL)
    assert repr(cache) == (
        "MomentCache(gemma3_text, budget='1MiB', sharing='heads', layers=2 compressed, 2 sliding, seen=0, MiB=0.00)"
    )


def gemma4(kinds: list[str], *, full: int = 64, sliding: int = 32) -> Any:
    """Heads of full attention are as wide as is said, and so are those of layers with a window."""
    sizes = SIZES | {"num_hidden_layers": 4, "head_dim": sliding, "global_head_dim": full, "layer_types": kinds}
    sizes |= {"num_global_key_value_heads": 2, "attention_k_eq_v": False, "sliding_window": 64}
    sizes |= {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
    return build(Gemma4TextConfig(**sizes, enable_moe_block=False))


@pytest.mark.parametrize("bits", ["auto", None, 4])
@torch.no_grad()
def test_bytes_are_those_of_every_layers_own_heads(bits: Any):
    model = gemma4(["sliding_attention", "full_attention"] * 2)
    cache = MomentCache(model, "300KiB", **({} if bits == "auto" else {"bits": bits}))
    model(prompt(1, 800), past_key_values=cache)
    for _ in range(40):
        model(prompt(1, 1), past_key_values=cache)
        assert 0.9 * 300 * 1024 < cache.nbytes <= 300 * 1024


@torch.no_grad()
def test_bytes_are_refused_where_a_later_layer_has_larger_heads():
    model = gemma4(["full_attention", "sliding_attention"] * 2, full=32, sliding=64)
    cache = MomentCache(model, "200KiB")
    with pytest.raises(ValueError, match=r"budget is '200KiB', .* but layer 1 has keys of shape .* give a budget in"):
        model(prompt(1, 100), past_key_values=cache)
    assert int(cache.get_seq_length()) == 0


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_a_total_that_was_too_small_for_many_rows_serves_fewer(family: str):
    """As the error advises: the pass is as if it had not been, and none that was interrupted."""
    model = tiny(family)
    cache = MomentCache(model, "60KiB")
    with pytest.raises(ValueError, match="budget is '60KiB', too little for 8 rows"):
        model(prompt(8, 100), past_key_values=cache)
    assert (int(cache.get_seq_length()), cache.nbytes) == (0, 0)
    model(prompt(1, 30), past_key_values=cache)
    assert int(cache.get_seq_length()) == 30


@pytest.mark.parametrize("sharing", ["heads", "layers", "uniform"])
@pytest.mark.parametrize("chunk", [5, 16, 31, 64])
def test_a_share_is_of_all_that_was_read_however_small_its_chunks(chunk: int, sharing: Any):
    """Chunks below 32 tokens were not counted: half of 600 tokens were 34."""
    cache = MomentCache(tiny("llama"), 0.5, sharing=sharing)
    generate(tiny("llama"), cache, prompt(1, 600), max_new_tokens=2, prefill_chunk_size=chunk)
    budgets = [budget for core in cache.moment_layers.values() for budget in core.budgets or []]
    mean = sum(budgets) / len(budgets)
    assert 290 <= mean <= 300
    assert all(part.stored < part.budget + part.block for part in parts(cache))


def test_a_share_of_one_evicts_nothing_in_chunks_and_guesses_do_not_count():
    model, cache = tiny("llama"), MomentCache(tiny("llama"), 1.0)
    full = DynamicCache(config=model.config)
    ids = prompt(1, 140)
    with torch.no_grad():
        for start, stop in ((0, 34), (34, 39), (39, 69), (69, 70), (70, 140)):
            ours = model(ids[:, start:stop], past_key_values=cache).logits
            exact = tiny("llama", "sdpa")(ids[:, start:stop], past_key_values=full).logits
            torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)
    half = MomentCache(model, 0.5)
    with torch.no_grad():
        model(ids, past_key_values=half)
        before = [core.budgets for core in half.moment_layers.values()]
        half.activate_past_recording()
        model(ids[:, :5], past_key_values=half)
    assert [core.budgets for core in half.moment_layers.values()] == before


@pytest.mark.parametrize("sharing", ["heads", "layers"])
@torch.inference_mode()
def test_a_share_of_less_after_tokens_were_taken_back_leaves_every_head_its_least(sharing: Any):
    model = tiny("llama")
    cache = MomentCache(model, 0.058, sharing=sharing, **SMALL)
    model(prompt(1, 200), past_key_values=cache)
    before = [budget for core in cache.moment_layers.values() for budget in core.budgets or [core.budget]]
    cache.crop(-8)
    model(prompt(1, 2), past_key_values=cache)
    after = [budget for core in cache.moment_layers.values() for budget in core.budgets or [core.budget]]
    assert (sum(before), min(before)) == (12 * len(before), cache.least)
    assert sum(after) <= round(0.058 * 194) * len(after) < sum(before)
    assert min(after) == cache.least


def test_records_that_are_still_to_be_made_anew_are_counted():
    """A byte for each row and head of padded batches in few bits."""
    model = tiny("gemma3 full")
    settings: dict[str, Any] = {"sharing": "uniform", "correction": "moments", "exact_window": 0}
    cache = MomentCache(model, "60KiB", bits=3, sinks=3, window=1, block=4, **settings)
    ids, mask = left_padded([prompt(1, n) for n in (67, 20, 67)])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
    assert any(core.stored_state.early is not None for core in cache.moment_layers.values())
    assert cache.nbytes <= 60 * 1024

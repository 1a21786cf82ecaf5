"""A static cache: equal to the one that is not, in two graphs, at constant addresses, never waiting for the device."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
from matrix import MODES, generate
from models import FAMILIES, build, left_padded, prompt, tiny
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import CompileConfig

from momentkv import LayerCache
from momentkv.backends.recording import record_traced
from momentkv.cache.state import LayerState
from momentkv.hf import DecodeGraphs, FinishedRows, MomentCache, momentkv_mask
from momentkv.hf.attention import NEWEST
from momentkv.hf.clock import Clock, check_step, ring
from momentkv.hf.steps import static_step, step_in_place
from momentkv.policies import POLICIES, SnapKV
from momentkv.policies.critical import CriticalKV
from momentkv.statistics.corrections import AnchoredSummaries, Correction
from momentkv.statistics.moments import Moments

SMALL: dict[str, Any] = {"sinks": 1, "window": 6, "block": 4}
PAPER: dict[str, Any] = SMALL | {"policy": "momentkv", "correction": "moments", "sharing": "uniform"}
CODED: dict[str, Any] = {"bits": 4, "exact_window": 2}
# Averages over neighbouring positions are equal for neighbours that have no others, up to the order of a sum: which of
# two such tokens goes is then decided by rounding. Without the average, no tie is left.
NO_TIES = {"snapkv": SnapKV(kernel=1), "criticalkv": CriticalKV(kernel=1)}


@dataclasses.dataclass(frozen=True)
class Counted:
    """Moments, and a number that momentkv knows nothing of."""

    moments: Moments
    folds: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        return self.moments.weight

    @property
    def nbytes(self) -> int:
        return self.moments.nbytes + self.folds.nbytes

    def arrays(self) -> dict[str, torch.Tensor]:
        return self.moments.arrays() | {"folds": self.folds}

    def map(self, function: Any) -> Counted:
        return Counted(self.moments.map(function), function(self.folds))


class Counting(Correction):
    """Of one's own."""

    name = "counting"

    def empty(self, k: Any, v: Any) -> Counted:
        moments = Moments.empty(k, v, order=1)
        return Counted(moments, torch.zeros_like(moments.weight))

    def fold(self, state: Counted, k: Any, v: Any, *, mask: Any, window: Any) -> Counted:
        return Counted(state.moments.update(k, v, mask=mask), state.folds + mask.any(-1))

    def expansion(self, state: Counted) -> Any:
        return state.moments.expansion()

    def known(self, state: Counted) -> Moments:
        return state.moments


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
    ("a correction of one's own", {"correction": Counting(), "policy": "momentkv"}),
    ("tokens one by one", {"block": 1}),
    ("share", {"budget": 0.5}),
    ("few bits", CODED),
    ("few bits, moments", PAPER | CODED),
    ("few bits, observed", CODED | {"policy": "h2o", "bits": (5, 4)}),
    ("few bits, plain", CODED | {"order": None, "bits": 3, "exact_window": 0}),
    ("few bits, share", CODED | {"budget": 0.5, "bits": 8}),
    ("few bits, as measured", CODED | {"bits": "auto"}),
]


def pair(model: Any, **settings: Any) -> list[MomentCache]:
    """A cache that is not static and one that is."""
    settings = SMALL | {"budget": 14} | settings
    return [MomentCache(model, static=static, **settings) for static in (False, True)]


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Three rows, one of which is shorter than the budget."""
    return left_padded([prompt(1, 40, seed=1), prompt(1, 27, seed=2), prompt(1, 5, seed=3)])


def assert_same(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor], tolerance: float = TOLERANCE
):
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
    assert caches[1].static.runs
    for a, b in zip(*(cache.moment_layers.values() for cache in caches), strict=True):
        assert a.seen == b.seen
        assert a.budgets == b.budgets
        assert torch.equal(a.moments.weight, b.moments.weight)
        for row, (one, other) in enumerate(zip(a.positions.flatten(0, 1), b.positions.flatten(0, 1), strict=True)):
            assert torch.equal(one[one >= 0], other[other >= 0])
            assert (one >= 0).sum() < a.budgets[row % len(a.budgets)] + a.config.block


@pytest.mark.parametrize("length", [3, 5, 9, 13, 14, 17, 18, 60])
def test_tokens_are_coded_when_and_as_they_are_without_static(length: int):
    """Those of prompts that fit, too: when recent slots run full, and anew when a head first evicts."""
    model = tiny("llama", dtype="float64")
    caches = pair(model, **CODED)
    ids = prompt(2, length, seed=length)
    for new in (1, 2, 12):
        results = [generate(model, cache, ids, new=new) for cache in caches]
        assert_same(*results)
        ids = results[0][0]
        for a, b in zip(*(cache.moment_layers.values() for cache in caches), strict=True):
            shown = [zip(core.keys.flatten(0, 1), core.positions.flatten(0, 1), strict=True) for core in (a, b)]
            for (x, of_x), (y, of_y) in zip(*shown, strict=True):
                torch.testing.assert_close(x[of_x >= 0], y[of_y >= 0], rtol=0, atol=1e-12)


def test_where_a_prompt_fits_and_bits_are_to_be_chosen_its_tokens_have_four_at_once():
    """Nothing goes, so nothing can be measured; and arrays that stay cannot wait for tokens that do not fit."""
    model = tiny("llama", dtype="float64")
    caches = [MomentCache(model, static=True, **SMALL, **CODED | {"budget": 14, "bits": bits}) for bits in ("auto", 4)]
    ids = prompt(2, 30)
    generate(model, caches[0], ids[:, :12], new=1)
    core = caches[0].moment_layers[0]
    assert core.config.bits == (5, 3)
    assert core.budget > 14
    for each in caches[1].moment_layers.values():
        each.budget = core.budget
    with torch.no_grad():
        model(ids[:, :12], past_key_values=caches[1])
        for place in range(12, ids.shape[1]):
            a, b = (model(ids[:, place : place + 1], past_key_values=cache).logits for cache in caches)
            assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(*map(tensors, caches), strict=True))


def test_a_first_eviction_while_decoding_codes_tokens_anew():
    """Else they would be coded by what the first few were like."""
    model = tiny("llama")
    cache = pair(model, **CODED)[1]
    early, means = [], []
    with torch.no_grad():
        model(prompt(2, 12), past_key_values=cache)
        for seed in range(STEPS):
            model(prompt(2, 1, seed=seed), past_key_values=cache)
            state = cache.moment_layers[0].stored_state
            early.append(bool(state.early.all()))
            means.append(state.key_mean.clone())
    last = early.index(False)
    assert all(early[:last])
    assert not any(early[last:])
    assert not torch.equal(means[last - 1], means[last])
    assert all(torch.equal(x, means[last]) for x in means[last:])


@pytest.mark.parametrize("family", FULL)
def test_static_equals_dynamic_in_every_family(family: str):
    model = tiny(family, dtype="float64")
    assert_same(*(generate(model, cache, *rows(), new=STEPS) for cache in pair(model)))


def test_a_model_may_make_a_sliding_mask_that_no_layer_takes():
    """Gemma 3 does; by `generate`, which makes masks for the layers that there are, it does not."""
    model = tiny("gemma3 full", dtype="float64")
    dynamic, static = pair(model)
    mask = torch.ones(2, 40, dtype=torch.long)
    with torch.no_grad():
        for cache in (dynamic, static):
            model(prompt(2, 40), past_key_values=cache)
        for seed in range(6):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            given = {"attention_mask": mask} if seed % 2 else {}
            a, b = (
                model(prompt(2, 1, seed=seed), past_key_values=cache, **given).logits for cache in (dynamic, static)
            )
            assert (a - b).abs().max() <= TOLERANCE * a.abs().max()


@pytest.mark.parametrize("how", [{"mask_function": lambda *_: True}, {"local_size": 16}], ids=["overlay", "sliding"])
def test_a_mask_of_its_own_is_refused_where_it_is_made_and_a_sliding_one_where_it_is_used(how: dict[str, Any]):
    with pytest.raises(ValueError, match="got a mask of its own; make the cache with static=False"):
        check_step(torch.zeros(2, 4, 1, 16), momentkv_mask(2, 1, 1, 40, NEWEST, **how))


@pytest.mark.parametrize("coded", [{}, CODED], ids=["vectors", "codes"])
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in REFUSED_MODES])
def test_static_equals_dynamic_in_every_mode(mode: str, coded: dict[str, Any]):
    halves = mode in ("bfloat16", "float16")
    model = tiny("llama", dtype="float32" if halves else "float64")
    settings = PAPER | coded if halves else coded
    results = [MODES[mode](model, lambda _, cache=cache: cache) for cache in pair(model, **settings)]
    assert_same(*results, tolerance=2**-5 if halves else TOLERANCE)


def compiled(cache: MomentCache, model: Any, new: int = STEPS) -> tuple[torch.Tensor, torch.Tensor]:
    """`generate`, which compiles the steps of a static cache by itself on a GPU, told to do so on a CPU."""
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    return generate(model, cache, *rows(), new=new, compile_config=config)


@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("settings", [{}, PAPER, PAPER | {"policy": "h2o"}], ids=["default", "paper", "observed"])
def test_generate_compiles_two_graphs_without_a_break(settings: dict[str, Any], dynamo: Any):
    model = build(FAMILIES["llama"]())
    dynamic, static = pair(model, **settings)
    assert static.is_compileable
    assert not static.is_croppable
    assert dynamic.is_croppable
    assert not dynamic.is_compileable
    expected = generate(model, dynamic, *rows(), new=STEPS)
    assert_same(expected, compiled(static, model), tolerance=2e-5)
    assert dynamo["stats"]["unique_graphs"] == 2
    assert not dynamo["graph_break"]
    # Another cache, and this one once more: the same two graphs. A third would be an error.
    with torch._dynamo.config.patch(error_on_recompile=True):
        static.reset()
        assert_same(expected, compiled(static, model), tolerance=2e-5)
    assert dynamo["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("settings", [{}, PAPER | {"policy": "h2o"}, {"sharing": "layers"}, CODED], ids=str)
def test_prompts_of_all_lengths_and_all_caches_share_two_graphs(settings: dict[str, Any], dynamo: Any):
    """Heads retain other numbers of tokens after each, and every cache has a number of its own."""
    # Digits enough that what a compiler rounds otherwise changes no code of a token.
    model = build(FAMILIES["llama"](), dtype="float64")
    config = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    config._compile_all_devices = True
    widths = set()
    for length in (40, 10, 41, 70, 33):
        ids = prompt(2, length, seed=length)
        dynamic, static = pair(model, **settings)
        expected = generate(model, dynamic, ids, torch.ones_like(ids), new=STEPS)
        with torch._dynamo.config.patch(error_on_recompile=dynamo["stats"]["unique_graphs"] == 2):
            compiled = generate(model, static, ids, torch.ones_like(ids), new=STEPS, compile_config=config)
        assert_same(expected, compiled)
        assert dynamo["stats"]["unique_graphs"] == 2
        assert static.static is not None
        widths |= {core.stored_state.layout.widths for core in static.static.cores}
    assert not dynamo["graph_break"]
    assert len(widths) > 2 or settings.get("sharing") == "uniform"


@pytest.mark.parametrize("length", [40, 10])
def test_a_compiled_forward_is_the_same_without_positions_or_mask_and_so_is_a_pass_after_it(length: int, dynamo: Any):
    model = build(FAMILIES["llama"](), dtype="float64")
    dynamic, static = pair(model)
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        for cache in (dynamic, static):
            model(prompt(2, length), past_key_values=cache)
        for seed in range(STEPS):
            ids = prompt(2, 1, seed=seed)
            expected, logits = model(ids, past_key_values=dynamic).logits, step(ids, past_key_values=static).logits
            assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
        assert dynamo["stats"]["unique_graphs"] == 2
        assert int(static.get_seq_length()) == dynamic.get_seq_length() == length + STEPS
        # Of several tokens, after evictions that the host has not seen.
        a, b = (model(prompt(2, 5), past_key_values=cache).logits for cache in (dynamic, static))
        assert (a - b).abs().max() <= TOLERANCE * a.abs().max()


@pytest.mark.parametrize("wide", [True, False], ids=["constant width", "as wide as the tokens"])
def test_a_compiled_step_finds_its_token_in_masks_of_any_width(wide: bool, dynamo: Any):
    """Of a mask with room for tokens to come, the newest token is not the last, which is zero as padding is."""
    model = build(FAMILIES["llama"](), dtype="float64")
    plain, static = pair(model)[1], pair(model)[1]
    step = torch.compile(model.forward, backend="eager", fullgraph=True)
    mask = torch.ones(2, 40 + STEPS + 9, dtype=torch.long)
    mask[1, :9] = 0
    mask[0, 44] = 0  # a row is fed padding while decoding
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for cache in (plain, static):
            model(prompt(2, 40), attention_mask=mask[:, :40], position_ids=places[:, :40], past_key_values=cache)
        for seen in range(40, 40 + STEPS):
            ids, now = prompt(2, 1, seed=seen), {"position_ids": places[:, seen : seen + 1]}
            shown = mask * (torch.arange(mask.shape[1]) <= seen) if wide else mask[:, : seen + 1]
            expected = model(ids, attention_mask=mask[:, : seen + 1], past_key_values=plain, **now).logits
            logits = step(ids, attention_mask=shown, past_key_values=static, **now).logits
            assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert not dynamo["graph_break"]
    # A width that changes is compiled a second time, with the width as a variable.
    assert dynamo["stats"]["unique_graphs"] == (2 if wide else 3)


def tensors(cache: MomentCache) -> list[torch.Tensor]:
    assert cache.static is not None
    return [x for core in cache.static.cores for x in core.stored_state.arrays().values()]


UNIFORM = {"sharing": "uniform"}


@pytest.mark.parametrize("settings", [UNIFORM, PAPER, UNIFORM | CODED], ids=["summaries", "paper", "codes"])
def test_steps_and_flushes_stay_at_their_addresses(settings: dict[str, Any]):
    model = tiny("llama")
    cache = pair(model, **settings)[1]
    ids, mask = rows()
    generate(model, cache, ids, mask, new=1)
    before = [(x, x.data_ptr(), x.clone()) for x in tensors(cache)]
    generate(model, cache, torch.cat([ids, prompt(3, 5)], 1), torch.nn.functional.pad(mask, (0, 5), value=1), new=STEPS)
    cache.reset()
    generate(model, cache, *rows(), new=STEPS)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    after = tensors(cache)
    assert len(after) == len(before)
    for (x, address, _), y in zip(before, after, strict=True):
        assert x is y
        assert y.data_ptr() == address
    assert sum(not torch.equal(x, old) for x, _, old in before) > len(before) // 2


def faked(x: Any, mode: FakeTensorMode) -> Any:
    return mode.from_tensor(x) if isinstance(x, torch.Tensor) else x


def fake_state(settings: dict[str, Any], mode: FakeTensorMode) -> tuple[LayerCache, LayerState]:
    """A layer of a model, and its state of tensors that have no data: whoever asks for some fails."""
    model = tiny("llama")
    cache = pair(model, **settings)[1]
    generate(model, cache, *rows(), new=3)
    core = cache.moment_layers[0]
    return core, core.stored_state.map(lambda x: faked(x, mode))


@pytest.mark.parametrize("name", ["default", *(name for name, _ in CASES if name != "bytes")])
def test_step_and_flush_never_ask_the_device(name: str):
    # Index arrays of the layout are where they were placed before.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    core, state = fake_state(dict(CASES).get(name, {}), mode)
    q, k = (faked(torch.zeros(3, heads, 1, 16), mode) for heads in (4, 2))
    valid = faked(torch.ones(3, 1, 1, dtype=torch.bool), mode)
    with mode, torch.no_grad():
        assert step_in_place(core, state, q, k, k, valid).shape == (3, 4, 1, 16)
        assert core.flushed(state).shapes() == state.shapes()
        with pytest.raises(DataDependentOutputException):
            bool((state.counts > 0).any())


@pytest.mark.parametrize(
    ("settings", "captured"),
    [
        ({}, False),
        ({}, True),
        (PAPER, True),
        (PAPER | {"policy": "h2o"}, True),
        (PAPER | {"order": None}, True),
        (CODED, True),
    ],
    ids=["default", "default, with its flush", "paper", "observed", "plain", "codes"],
)
def test_recorded_steps_equal_the_model(settings: dict[str, Any], captured: bool):
    model = tiny("llama")
    dynamic, static = pair(model, **settings)
    ids, mask = rows()
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        for cache in (dynamic, static):
            model(ids, attention_mask=mask, position_ids=places, past_key_values=cache)
        before = [x.clone() for x in tensors(static)]
        step = DecodeGraphs(model, static, capture_flush=captured, recorder=record_traced)
        assert all(torch.equal(x, y) for x, y in zip(before, tensors(static), strict=True))
        for seed in range(STEPS):
            ids = prompt(3, 1, seed=seed)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            places = mask.sum(1, keepdim=True) - 1
            expected = model(ids, attention_mask=mask, position_ids=places, past_key_values=dynamic).logits
            assert (step(ids, places) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert int(static.get_seq_length()) == dynamic.get_seq_length()
    for a, b in zip(*(cache.moment_layers.values() for cache in (dynamic, static)), strict=True):
        assert torch.equal((a.positions >= 0).sum(-1), (b.positions >= 0).sum(-1))


@pytest.mark.parametrize("settings", [{}, PAPER, CODED], ids=["default", "paper", "codes"])
def test_steps_recorded_before_anything_was_evicted_are_corrected_after(settings: dict[str, Any]):
    model = tiny("llama")
    dynamic, static = pair(model, **settings)
    with torch.no_grad():
        for cache in (dynamic, static):
            model(prompt(2, 10), past_key_values=cache)
        step = DecodeGraphs(model, static, recorder=record_traced)
        for seed in range(STEPS):
            ids = prompt(2, 1, seed=seed)
            expected = model(ids, past_key_values=dynamic).logits
            assert (step(ids) - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert all(core.has_evicted for core in dynamic.moment_layers.values())


def test_recorded_steps_are_refused_by_name():
    model = tiny("llama")
    dynamic, static = pair(model)
    with pytest.raises(ValueError, match="cache is not static"):
        DecodeGraphs(model, dynamic)
    with pytest.raises(RuntimeError, match="has read nothing"):
        DecodeGraphs(model, static)
    with torch.no_grad():
        model(prompt(2, 40), past_key_values=static)
    with pytest.raises(ValueError, match="on cpu, where there are no CUDA graphs"):
        DecodeGraphs(model, static)
    step = DecodeGraphs(model, static, recorder=record_traced)
    assert int(copy.deepcopy(static).get_seq_length()) == 40
    with pytest.raises(ValueError, match=r"ids has shape \(1, 1\); the graph was recorded for \(2, 1\)"):
        step(prompt(1, 1))
    static.batch_select_indices(torch.tensor([0]))
    with pytest.raises(RuntimeError, match="lies elsewhere"):
        step(prompt(2, 1))


def test_beats_flush_when_the_ring_says():
    beat = ring(4, [1, 3])
    flushes = []
    for _ in range(9):
        beat = beat.next
        flushes.append(beat.flushes)
    assert flushes == [True, False, True, False] * 2 + [True]
    assert copy.deepcopy(beat) is beat


CONSTRUCTIONS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "sliding layers": ("gemma3", {}, ["static=True, but layer 0", "'sliding_attention'", "static=False"]),
    "certificates": ("llama", {"certify": 1}, ["static=True with certify=1", "static=False"]),
    "another backend": ("llama", {"backend": "array-api"}, ["static=True with the backend 'array-api'", "'torch'"]),
    "bytes": ("llama", {"budget": "1MiB"}, ["static=True with a budget of '1MiB'", "in tokens"]),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_what_no_buffer_can_hold_is_refused_by_name(name: str):
    family, settings, parts = CONSTRUCTIONS[name]
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        MomentCache(tiny(family), **({"budget": 64} | settings), static=True)
    assert all(part in str(caught.value) for part in parts)


def with_a_gradient(model: Any, cache: MomentCache) -> None:
    with torch.enable_grad():
        model(prompt(2, 1), past_key_values=cache)


def compile_prefill(model: Any, cache: MomentCache) -> None:
    keys = torch.zeros(2, 2, 5, 16)
    torch.compile(lambda k: cache.update(k, k, 0), backend="eager", fullgraph=True)(keys)


USES: dict[str, tuple[Any, type[Exception], list[str]]] = {
    "a gradient": (with_a_gradient, RuntimeError, ["a gradient is asked for", "no_grad"]),
    "assisted": (
        lambda _, cache: cache.activate_past_recording(),
        RuntimeError,
        ["cannot take tokens", "static=False"],
    ),
    "rows that end": (lambda _, cache: FinishedRows(cache, 1), ValueError, ["FinishedRows", "static=False"]),
    "a mask of its own": (
        lambda model, cache: model(
            prompt(2, 1), attention_mask=torch.ones(2, 1, 1, 41, dtype=torch.bool), past_key_values=cache
        ),
        ValueError,
        ["attention_mask is torch.bool of shape (2, 1, 1, 41)"],
    ),
    "crop of evicted tokens": (lambda _, cache: cache.crop(-20), RuntimeError, ["crop(-20)", "evicted"]),
    "one layer's crop": (
        lambda _, cache: cache.layers[0].crop(-1),
        RuntimeError,
        ["crop of one layer", "of the cache"],
    ),
    "a compiled prefill": (compile_prefill, Exception, ["MomentCache supports torch.compile for steps", "static=True"]),
}


@pytest.mark.parametrize("name", USES)
def test_use_is_refused_by_name_and_the_cache_goes_on(name: str):
    use, error, parts = USES[name]
    model = build(FAMILIES["llama"](), dtype="float64")
    dynamic, static = pair(model)
    with torch.no_grad():
        for cache in (dynamic, static):
            model(prompt(2, 40), past_key_values=cache)
        with pytest.raises(error) as caught:
            use(model, static)
        assert all(part in str(caught.value) for part in parts)
        if name in ("a gradient", "a mask of its own"):  # found in the first layer, after the new token came to it
            static.reset()
            model(prompt(2, 40), past_key_values=static)
        for seed in range(6):
            a, b = (model(prompt(2, 1, seed=seed), past_key_values=cache).logits for cache in (dynamic, static))
            assert (a - b).abs().max() <= TOLERANCE * a.abs().max()


@pytest.mark.parametrize("settings", [{}, PAPER], ids=["default", "paper"])
def test_crop_takes_back_what_is_stored(settings: dict[str, Any]):
    model = tiny("llama", dtype="float64")
    caches = pair(model, **settings)
    with torch.no_grad():
        for cache in caches:
            model(prompt(2, 40), past_key_values=cache)
            for seed in range(6):
                model(prompt(2, 1, seed=seed), past_key_values=cache)
            cache.crop(-3)
            assert int(cache.get_seq_length()) == 43
        a, b = (model(prompt(2, 7, seed=9), past_key_values=cache).logits for cache in caches)
    assert (a - b).abs().max() <= TOLERANCE * a.abs().max()


def test_padding_among_steps_is_no_token():
    """A row that is fed pads, which its mask says: neither stored, nor folded, nor observed."""
    model = tiny("llama", dtype="float64")
    caches = pair(model, **(PAPER | {"policy": "h2o"}))
    mask = torch.ones(2, 40, dtype=torch.long)
    with torch.no_grad():
        for cache in caches:
            model(prompt(2, 40), past_key_values=cache)
        for seed in range(STEPS):
            mask = torch.cat([mask, torch.tensor([[1], [int(seed < 2)]])], 1)
            ids, places = prompt(2, 1, seed=seed), mask.sum(1, keepdim=True) - 1
            a, b = (
                model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits[0]
                for cache in caches
            )
            assert (a - b).abs().max() <= TOLERANCE * a.abs().max()
    for cache in caches:
        for core in cache.moment_layers.values():
            counted = (core.positions >= 0).sum(-1) + core.moments.weight
            assert counted.tolist() == [[40 + STEPS] * 2, [42] * 2]


@pytest.mark.parametrize("settings", [{}, PAPER, PAPER | {"order": None}], ids=["default", "paper", "plain"])
def test_a_row_that_lags_behind_by_padding_never_runs_over(settings: dict[str, Any]):
    """Its block fills later than the clock says; it evicts what there is when the clock says so."""
    model = tiny("llama", dtype="float64")
    caches = pair(model, **settings)
    mask = torch.ones(2, 40, dtype=torch.long)
    with torch.no_grad():
        for cache in caches:
            model(prompt(2, 40), past_key_values=cache)
        for seed in range(2 * STEPS):
            mask = torch.cat([mask, torch.tensor([[1], [int(seed % 3 != 1)]])], 1)
            ids, places = prompt(2, 1, seed=seed), mask.sum(1, keepdim=True) - 1
            a, b = (
                model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits for cache in caches
            )
            assert (a[0] - b[0]).abs().max() <= TOLERANCE * a[0].abs().max()
            assert b.isfinite().all()
    for core in caches[1].moment_layers.values():
        stored, budgets = (core.positions >= 0).sum(-1), torch.tensor(core.budgets)
        assert (stored < budgets + core.config.block).all()
        assert (stored >= budgets).all()
        if core.config.order is not None:
            assert (stored + core.moments.weight).tolist() == [[70] * 2, [60] * 2]


def test_looking_at_a_static_cache_changes_nothing():
    cache = pair(tiny("llama"))[1]
    generate(tiny("llama"), cache, *rows(), new=3)
    before = [(x, x.clone()) for x in tensors(cache)]
    for core in cache.moment_layers.values():
        for x in (core.keys, core.values, core.positions, core.attention):
            assert x is None or x.zero_().eq(0).all()  # what is shown is the caller's
        assert core.stored >= max(core.budgets)
        core.importance()
    print(cache, cache.summary(), cache.layers[0])
    assert all(x is y and torch.equal(x, old) for (x, old), y in zip(before, tensors(cache), strict=True))
    assert cache.nbytes == sum(x.nbytes for x, _ in before)


@pytest.mark.parametrize("budgets", [[12, 12], [12, 15]])
def test_what_padding_held_is_never_read(budgets: list[int]):
    """NaN in slots of padding, which a row shorter than its budget has beside its tokens, is not in what is stored."""
    cores = [LayerCache(budgets, policy="streaming", sinks=1, window=6, block=4, static=x) for x in (False, True)]
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 13, 8, generator=generator) for heads in (4, 2, 2))
    valid = torch.ones(2, 1, 13, dtype=torch.bool)
    valid[0, :, :9] = False
    k[0, :, :9], v[0, :, :9] = torch.nan, torch.nan
    cores[0].step(q, k.nan_to_num(), v.nan_to_num(), valid=valid)
    cores[1].step(q, k, v, valid=valid)
    clock = Clock([cores[1]])
    clock.set()
    for _ in range(STEPS):
        q, k, v = (torch.randn(2, heads, 1, 8, generator=generator) for heads in (4, 2, 2))
        expected = cores[0].step(q, k, v)
        clock.tick()
        out = static_step(cores[1], q, k, v, None, cores[1:] if clock.beat.flushes else ())
        clock.open = False
        assert (out - expected).abs().max() <= 2e-5
    assert all(x.isfinite().all() for x in cores[1].arrays().values())


def test_slots_of_heads_are_packed():
    """Retained keys and values take the budgets' bytes, whatever the largest budget of a head."""
    cache = pair(tiny("llama"), budget=20)[1]
    generate(tiny("llama"), cache, prompt(2, 60), new=2)
    assert cache.static is not None
    for core in cache.moment_layers.values():
        assert len(set(core.budgets)) > 1
        assert core.stored_state.keys.shape == (2, sum(budget - 1 - 6 for budget in core.budgets), 16)
        assert core.stored_state.recent_keys.shape == (2, 2, 1 + 6 + 4, 16)


def test_rows_of_layers_move_one_by_one_as_together():
    model = tiny("llama", dtype="float64")
    caches = pair(model)
    with torch.no_grad():
        for cache in caches:
            model(prompt(2, 40), past_key_values=cache)
            model(prompt(2, 1), past_key_values=cache)
        caches[0].reorder_cache(torch.tensor([1, 0]))
        for layer in caches[1].layers:
            layer.reorder_cache(torch.tensor([1, 0]))
        for seed in range(STEPS):
            a, b = (model(prompt(2, 1, seed=seed), past_key_values=cache).logits for cache in caches)
            assert (a - b).abs().max() <= TOLERANCE * a.abs().max()


def test_an_offloaded_static_cache_goes_on():
    """On a GPU the next step brings it back; here it is there already, and stays in its arrays."""
    model = tiny("llama", dtype="float64")
    dynamic, static = pair(model)
    with torch.no_grad():
        for cache in (dynamic, static):
            model(prompt(2, 40), past_key_values=cache)
        before = tensors(static)
        static.offload()
        for seed in range(STEPS):
            a, b = (model(prompt(2, 1, seed=seed), past_key_values=cache).logits for cache in (dynamic, static))
            assert (a - b).abs().max() <= TOLERANCE * a.abs().max()
    assert all(x is y for x, y in zip(before, tensors(static), strict=True))


def test_a_static_layer_that_is_moved_lets_go_of_its_arrays_and_is_fixed_where_it_comes_to():
    cache = pair(tiny("llama"))[1]
    generate(tiny("llama"), cache, *rows(), new=3)
    layer = cache.layers[0]
    layer.come_to(torch.device("meta"))
    assert layer.core.fixed is layer.core.state
    assert {x.device.type for x in layer.core.arrays().values()} == {"meta"}

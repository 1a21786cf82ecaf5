"""Layers that evict at once are as layers that evict one after the other, for as many calls as one of them takes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from contents import assert_same, contents
from libraries import LIBRARIES, Library
from models import left_padded, prompt, tiny
from test_hf_static import Counting

from momentkv import LayerCache
from momentkv.backends.base import JOINED
from momentkv.cache import joining
from momentkv.cache.config import MODEL_DEFAULTS
from momentkv.cache.joining import evict_together, flush_together, groups
from momentkv.hf import MomentCache
from momentkv.hf.clock import Clock
from momentkv.hf.layer import MomentLayer
from momentkv.hf.steps import step_in_place
from momentkv.policies import POLICIES
from momentkv.policies.base import Policy, Tokens
from momentkv.testing.gpu.operators import Log, storage

SMALL: dict[str, Any] = {"sinks": 1, "window": 6, "block": 4}
DEFAULT = SMALL | MODEL_DEFAULTS
# Budgets of the two heads of three layers.
EQUAL = [[20, 20]] * 3
BY_HEAD = [[12, 25], [31, 9], [20, 20]]
CASES: dict[str, tuple[Sequence[Sequence[int]], dict[str, Any]]] = {
    "default": (EQUAL, DEFAULT),
    "default, by head": (BY_HEAD, DEFAULT),
    "4 bits": (EQUAL, DEFAULT | {"bits": 4}),
    "4 bits, by head": (BY_HEAD, DEFAULT | {"bits": 4}),
    "moments": (BY_HEAD, SMALL | {"correction": "moments", "statistics_bits": 16}),
    "plain": (BY_HEAD, SMALL | {"order": None, "policy": "h2o"}),
    "full precision": (BY_HEAD, DEFAULT | {"statistics_bits": None}),
    "tokens one by one": (BY_HEAD, DEFAULT | {"block": 1}),
    **{name: (EQUAL, SMALL | {"policy": name}) for name in sorted(POLICIES) if not POLICIES[name].couples_heads},
}
# Of numbers in float64, in each of which an error of a few hundred roundings is far below; what 16 bits or few bits
# round differs by a step where it lies between two.
CLOSE, STEP = 1e-9, 1 / 32000


class Layers:
    """Some layers that read the same number of tokens, of their own."""

    def __init__(
        self, budgets: Sequence[Sequence[int]], settings: dict[str, Any], library: Library = LIBRARIES["torch"]
    ) -> None:
        self.caches = [LayerCache(list(each), **settings) for each in budgets]
        self.library, self.rng = library, np.random.default_rng(0)
        self.rows = 2

    def arrays(self, cache: LayerCache, n: int) -> list[Any]:
        heads = len(cache.budgets or [])
        return [self.library.asarray(self.rng.normal(size=(self.rows, h, n, 8))) for h in (2 * heads, heads, heads)]

    def read(self, evict: Callable[[list[LayerCache]], None], n: int, padding: int = 0) -> list[Any]:
        outs = []
        for cache in self.caches:
            q, k, v = self.arrays(cache, n)
            valid = np.ones((self.rows, 1, n), dtype=bool)
            valid[0, :, :padding] = False
            cache.append(k, v)
            outs.append(cache.attend(q, valid=self.library.asarray(valid) if padding else None))
        full = [cache for cache in self.caches if cache.is_full]
        for cache in self.caches:
            if not cache.is_full:
                cache.evict()
        evict(full)
        return outs


def one_by_one(caches: Sequence[LayerCache]) -> None:
    for cache in caches:
        cache.evict()


def assert_close(a: Any, b: Any, tolerance: float) -> None:
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    assert a.shape == b.shape
    assert np.array_equal(np.isfinite(a), np.isfinite(b))
    a, b = np.nan_to_num(a, posinf=0, neginf=0), np.nan_to_num(b, posinf=0, neginf=0)
    assert np.abs(a - b).max(initial=0) <= tolerance * max(1.0, np.abs(a).max(initial=0))


def assert_alike(a: LayerCache, b: LayerCache, numpy: Callable[[Any], np.ndarray]) -> None:
    """The same tokens and host's numbers; statistics to rounding."""
    coarse = STEP if a.config.statistics_bits else CLOSE
    assert a.stored_by_head == b.stored_by_head
    assert (a.stored_state.layout, a.seen, a.budgets) == (b.stored_state.layout, b.seen, b.budgets)
    assert (a.stored_state.filled, a.has_evicted) == (b.stored_state.filled, b.has_evicted)
    assert np.array_equal(numpy(a.positions), numpy(b.positions))
    real = (numpy(a.positions) >= 0)[..., None]
    for x, y in ((a.keys, b.keys), (a.values, b.values)):
        assert_close(real * numpy(x), real * numpy(y), CLOSE)
    for x, y in zip(a.moments.arrays().values(), b.moments.arrays().values(), strict=True):
        assert_close(numpy(x), numpy(y), coarse)
    window = a.query_window
    if window is not None:
        assert_close(numpy(window.mean), numpy(b.query_window.mean), CLOSE)


def assert_lives_alike(
    budgets: Any, settings: dict[str, Any], *, padding: int = 0, library: Library = LIBRARIES["torch"], steps: int = 14
) -> int:
    """Read a prompt and then token by token, evicting at once and one by one; how often layers evicted at once."""
    both, times = [Layers(budgets, settings, library) for _ in range(2)], 0
    for index in range(steps):
        n, hidden = (40, padding) if not index else (1, 0)
        outs = [layers.read(evict, n, hidden) for layers, evict in zip(both, (one_by_one, evict_together), strict=True)]
        for x, y in zip(*outs, strict=True):
            assert_close(library.numpy(x), library.numpy(y), STEP * 10)
        for a, b in zip(*(layers.caches for layers in both), strict=True):
            assert_alike(a, b, library.numpy)
        caches = both[1].caches
        times += len(groups(caches, [cache.stored_state for cache in caches])) == 1
    return times


@pytest.mark.parametrize("name", CASES)
def test_at_once_is_one_by_one(name: str):
    assert assert_lives_alike(*CASES[name]) == 14


@pytest.mark.parametrize("name", ["default", "default, by head", "4 bits", "plain"])
@pytest.mark.parametrize("padding", [5, 30])
def test_at_once_is_one_by_one_with_rows_that_are_padded(name: str, padding: int):
    """Of one row as long as the others' budgets, and of one that is shorter."""
    assert_lives_alike(*CASES[name], padding=padding, steps=30)


@pytest.mark.parametrize("name", ["numpy", "array-api-strict"])
def test_at_once_is_one_by_one_in_every_library(name: str):
    library = LIBRARIES[name]
    with library.scope():
        assert assert_lives_alike(BY_HEAD[:2], DEFAULT, library=library, steps=6) == 6


def test_heads_that_are_short_of_their_budget_wait_with_their_layer():
    """A prompt that fills one layer's heads and not the other's: each layer keeps as many recent tokens as alone."""
    assert_lives_alike([[12, 60], [20, 20], [12, 70]], DEFAULT, steps=40)


def test_layers_may_differ_in_heads():
    assert assert_lives_alike([[12, 25, 31], [20]], DEFAULT) == 14


class Numbered(Policy):
    """Looks from one head to another."""

    couples_heads = True

    def importance(self, tokens: Tokens) -> Any:
        return 1.0 * tokens.positions


def ready(changes: Sequence[dict[str, Any]], budgets: Any = None) -> list[LayerCache]:
    """Layers of these settings that have run full."""
    caches = []
    for index, change in enumerate(changes):
        settings = DEFAULT | change
        tokens, dtype = settings.pop("tokens", 40), settings.pop("dtype", torch.float64)
        cache = LayerCache([20, 20] if budgets is None else budgets[index], **settings)
        generator = torch.Generator().manual_seed(index)
        for n in (tokens, *(1,) * 3):
            cache.step(*(torch.randn(1, h, n, 8, generator=generator).to(dtype) for h in (4, 2, 2)))
        q, k, v = (torch.randn(1, h, 1, 8, generator=generator).to(dtype) for h in (4, 2, 2))
        cache.append(k, v)
        cache.attend(q)
        assert cache.is_full
        caches.append(cache)
    return caches


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({}, 1),
        ({"policy": "tova"}, 3),
        ({"policy": "random"}, 3),
        ({"policy": Numbered()}, 3),
        ({"correction": Counting(), "policy": "momentkv", "statistics_bits": None}, 3),
        ({"certify": 1}, 3),
    ],
    ids=["default", "tova", "random", "own policy", "own correction", "certify"],
)
def test_layers_whose_heads_look_at_each_other_evict_by_themselves(change: dict[str, Any], number: int):
    caches = ready([change] * 3)
    assert len(groups(caches, [cache.stored_state for cache in caches])) == number


@pytest.mark.parametrize(
    "other",
    [
        {"policy": "novelty"},
        {"correction": "moments"},
        {"statistics_bits": None},
        {"bits": 4},
        {"window": 7},
        {"scale": 0.5},
        {"tokens": 41},
        {"dtype": torch.float32},
    ],
    ids=lambda other: next(iter(other)),
)
def test_layers_that_are_not_alike_do_not_evict_at_once(other: dict[str, Any]):
    caches = ready([{}, other, {}])
    assert groups(caches, [cache.stored_state for cache in caches]) == [[0, 2], [1]]


def test_no_more_evict_at_once_than_take_the_bytes_a_backend_joins(monkeypatch: pytest.MonkeyPatch):
    caches = ready([{}] * 4, [[20, 20], [30, 12], [20, 20], [12, 30]])
    states = [cache.stored_state for cache in caches]
    assert [sorted(group) for group in groups(caches, states)] == [[0, 1, 2, 3]]
    monkeypatch.setattr("momentkv.backends.base.AT_ONCE", -(-joining.joined_bytes([states[0], states[2]]) // JOINED))
    # In order of width: what is as wide goes together.
    assert groups(caches, states) == [[0, 2], [1], [3]]
    monkeypatch.setattr("momentkv.backends.base.AT_ONCE", 0)
    assert groups(caches, states) == [[0], [2], [1], [3]]


@pytest.mark.parametrize("bits", [None, 4])
def test_as_many_calls_as_for_one_layer(bits: int | None):
    caches = ready([{"bits": bits}] * 12)
    alone = copy.deepcopy(caches[0])
    with Log() as one:
        alone.evict()
    with Log() as all_of_them:
        evict_together(caches)
    assert sum(all_of_them.launched.values()) < 1.5 * sum(one.launched.values())


def test_no_layer_holds_the_memory_of_another():
    caches = ready([{}] * 3)
    evict_together(caches)
    arrays = [x for cache in caches for x in cache.arrays().values() if x.numel()]
    assert len({storage(x) for x in arrays}) == len(arrays)
    assert all(x.untyped_storage().nbytes() == x.nbytes and x.is_contiguous() for x in arrays)


@dataclasses.dataclass(frozen=True)
class Broken(Policy):
    """Fails at more than so many tokens."""

    name = "broken"
    most: int = 22

    def importance(self, tokens: Tokens) -> Any:
        if tokens.positions.shape[-1] > self.most:
            raise FloatingPointError("too many")
        return 1.0 * tokens.positions


def test_all_evict_or_none():
    # The second layer's window is another, so that it evicts after the others have.
    caches = ready([{"policy": Broken(1000)}, {"policy": Broken(1000), "window": 7}, {"policy": Broken(1000)}])
    before = [contents(cache) for cache in caches]
    config = caches[1].config
    caches[1].config = dataclasses.replace(config, policy=Broken())
    with pytest.raises(FloatingPointError):
        evict_together(caches)
    caches[1].config = config
    for cache, held in zip(caches, before, strict=True):
        assert_same(contents(cache), held)
    evict_together(caches)
    assert [cache.stored for cache in caches] == [20] * 3


def static(policy: Any = "balanced") -> list[LayerCache]:
    """Static layers in which every head has a full block."""
    caches = [LayerCache([20, 14 + 2 * index], static=True, **(DEFAULT | {"policy": policy})) for index in range(3)]
    generator = torch.Generator().manual_seed(0)
    for cache in caches:
        cache.step(*(torch.randn(2, h, 40, 8, generator=generator).double() for h in (4, 2, 2)))
    Clock(caches).set()
    for cache in caches:
        for _ in range(4):
            q, k, v = (torch.randn(2, h, 1, 8, generator=generator).double() for h in (4, 2, 2))
            step_in_place(cache, cache.stored_state, q, k, v, None)
    return caches


def test_static_layers_flush_at_once_as_one_by_one_in_place():
    alone, together = static(), static()
    places = [[x.data_ptr() for x in cache.arrays().values()] for cache in together]
    for cache in alone:
        cache.flush()
    with Log() as log:
        flush_together(together)
    for a, b, own in zip(alone, together, places, strict=True):
        assert b.state is b.fixed
        assert [x.data_ptr() for x in b.arrays().values()] == own
        assert_alike(a, b, LIBRARIES["torch"].numpy)
        assert torch.equal(a.stored_state.ticks, b.stored_state.ticks)
    assert log.launched["_foreach_copy_"] == 1


def test_static_layers_whose_writing_is_interrupted_are_refused(monkeypatch: pytest.MonkeyPatch):
    caches = static()

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("momentkv.backends.torch.TorchBackend.overwrite_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flush_together(caches)
    for cache in caches:
        with pytest.raises(RuntimeError, match="torn"):
            cache.flush()


@pytest.mark.parametrize("tokens", [90, 18], ids=["longer than the budget", "shorter"])
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("gemma3", {}),
        ("llama", {"sharing": "uniform", "bits": 4}),
        ("gemma3", {"budget": "70KiB"}),
        ("llama", {"budget": "40KiB"}),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_model_decodes_as_with_layers_that_evict_by_themselves(family: str, settings: dict[str, Any], tokens: int):
    model = tiny(family, dtype="float64")
    settings = SMALL | {"budget": 20} | settings
    caches = [MomentCache(model, **settings) for _ in range(2)]
    caches[0].passes.evict = MomentLayer.evict
    ids, mask = left_padded([prompt(1, tokens, seed=1), prompt(1, 11, seed=2)])
    for index in range(30):
        outs = [model(ids, attention_mask=mask, past_key_values=cache).logits for cache in caches]
        assert (outs[0] - outs[1]).abs().max() <= 1e-3 * outs[0].abs().max()
        # All have evicted by the time the pass is over.
        assert not any(layer.core.is_full for layer in caches[1].passes.moments)
        assert caches[0].nbytes == caches[1].nbytes
        ids = prompt(2, 1, seed=index)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
    for a, b in zip(*(cache.moment_layers.values() for cache in caches), strict=True):
        assert a.has_evicted
        assert torch.equal(a.positions, b.positions)


@torch.no_grad()
def test_the_layers_of_a_model_evict_at_once(monkeypatch: pytest.MonkeyPatch):
    together: list[int] = []
    evict = joining.evicted_together

    def counted(caches: Sequence[LayerCache], *arguments: Any, **options: Any) -> Any:
        together.append(len(caches))
        return evict(caches, *arguments, **options)

    monkeypatch.setattr(joining, "evicted_together", counted)
    model = tiny("gemma3 full")
    cache = MomentCache(model, 20, **SMALL)
    model(prompt(1, 60), past_key_values=cache)
    for index in range(9):
        model(prompt(1, 1, seed=index), past_key_values=cache)
    assert together == [4, 4]

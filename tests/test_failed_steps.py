"""A step that fails at any point, for any reason, leaves a cache that goes on as if it had not been tried."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
import pytest
from libraries import LIBRARIES, Library

import momentkv
from momentkv import LayerCache, Moments
from momentkv.backends import get_backend
from momentkv.cache.state import HOST
from momentkv.statistics.corrections import AnchoredSummaries
from momentkv.testing.rounding import assert_same

PACKAGE = str(Path(momentkv.__file__).parent)
# Where states are put together.
OWN = tuple(str(Path(PACKAGE, "cache", f"{name}.py")) for name in ("layer", "holdings", "eviction", "step"))


class Stop(BaseException):
    """As Ctrl-C: no `except Exception` sees it."""


# A prefill that evicts, single tokens until a flush and beyond, a chunk, again single tokens.
LENGTHS = (40, *[1] * 5, 6, 1, 1)
SIZES: dict[str, Any] = {"sinks": 1, "window": 4, "block": 3}


class Part(NamedTuple):
    """Arguments of a step."""

    q: Any
    k: Any
    v: Any
    valid: Any

    def step(self, cache: LayerCache) -> Any:
        return cache.step(self.q, self.k, self.v, valid=self.valid)


def steps(library: Library, *, padded: bool) -> list[Part]:
    rng, total = np.random.default_rng(0), sum(LENGTHS)
    q, k, v = (rng.standard_normal((2, heads, total, 4)) for heads in (4, 2, 2))
    valid = np.ones((2, 1, total), dtype=bool)
    valid[1, :, :7] = valid[1, :, 43] = False
    parts, start = [], 0
    for length in LENGTHS:
        part = slice(start, start + length)
        arrays = [library.asarray(x[..., part, :]) for x in (q, k, v)]
        parts.append(Part(*arrays, library.asarray(valid[..., part]) if padded else None))
        start += length
    return parts


def shown(library: Library, cache: LayerCache) -> dict[str, np.ndarray]:
    """All numbers that a cache holds, but those of slots that hold no token."""
    if cache.state is None:
        return {}
    arrays = {name: x for name, x in cache.state.arrays().items() if not name.startswith("recent_") or "count" in name}
    if cache.config.tolerance is not None:
        arrays["recent_queries"] = cache.state.recent_queries
    view = cache.view()._asdict()
    arrays |= {f"view.{name}": x for name, x in view.items()}
    numbers = {name: library.numpy(x).copy() for name, x in arrays.items() if x is not None}
    used = numbers["view.positions"] >= 0
    for name in ("keys", "values", "attention"):
        if f"view.{name}" in numbers:
            x = numbers[f"view.{name}"]
            numbers[f"view.{name}"] = np.where(used if x.ndim == used.ndim else used[..., None], x, 0.0)
    return numbers


def told(cache: LayerCache) -> dict[str, Any]:
    """What else a cache is, but for what it only remembers to be faster."""
    rest = {name: x for name, x in cache.__dict__.items() if name not in ("state", "fixed", "prepared")}
    return rest | {name: getattr(cache.state, name, None) for name in HOST} | {"seen": cache.seen}


def assert_as_before(library: Library, cache: LayerCache, before: tuple[Any, dict[str, Any], dict[str, Any]]) -> None:
    state, numbers, rest = before
    assert cache.state is state
    assert told(cache) == rest
    now = shown(library, cache)
    assert now.keys() == numbers.keys()
    for name, x in numbers.items():
        assert np.array_equal(x, now[name], equal_nan=True), name


def go_on_alike(library: Library, tried: LayerCache, other: LayerCache, act: Callable[[LayerCache], Any]) -> None:
    """To the last bit."""
    outs = [act(cache) for cache in (tried, other)]
    if outs[0] is not None:
        assert_same(*(library.numpy(x) for x in outs))
    one, two = (shown(library, cache) for cache in (tried, other))
    assert one.keys() == two.keys()
    for name, x in one.items():
        assert_same(x, two[name])


def traced(function: Callable[[], Any], at_line: Callable[[str, int], None]) -> None:
    """Call a function, and another one before each line of the package that runs, but those of `LayerCache.step`."""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(PACKAGE) or code.co_name == "step":
            return None
        if event == "line":
            at_line(code.co_filename, frame.f_lineno)
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(previous)


def places_of(function: Callable[[], Any]) -> list[int]:
    """When a call comes to each of its lines for the first time, and for the last."""
    first: dict[tuple[str, int], int] = {}
    last: dict[tuple[str, int], int] = {}
    count = itertools.count()

    def note(file: str, line: int) -> None:
        last[file, line] = next(count)
        first.setdefault((file, line), last[file, line])

    traced(function, note)
    # Of lines that change nothing but what they return, a few; of those that assemble a state, each.
    others = [line for line in first if not line[0].startswith(OWN)]
    chosen = {*(line for line in first if line[0].startswith(OWN)), *others[:: max(len(others) // 20, 1)]}
    return sorted({x[line] for x in (first, last) for line in chosen})


def is_stopped(function: Callable[[], Any], where: int) -> bool:
    """Call a function and stop it there, if it comes so far."""
    count = itertools.count()

    def stop(*line: Any) -> None:
        if next(count) == where:
            raise Stop

    try:
        traced(function, stop)
    except Stop:
        return True
    return False


@dataclasses.dataclass(frozen=True)
class Setting:
    """A cache whose steps are stopped."""

    library: str
    padded: bool
    options: dict[str, Any]
    tried: tuple[int, ...]  # which of its steps: 0 is the prefill, 1 a token, 3 one that fills the block, 6 a chunk

    def cache(self) -> LayerCache:
        return LayerCache(**(SIZES | self.options))


SETTINGS = {
    "one budget": Setting("numpy", False, {"budget": 14, "policy": "momentkv"}, (0, 1, 3, 6)),
    "heads, padded, certified": Setting(
        "numpy", True, {"budget": [9, 14], "policy": "h2o", "correction": AnchoredSummaries(2), "certify": 1}, (0, 3, 6)
    ),
    "refused": Setting("numpy", False, {"budget": [9, 14], "policy": "snapkv", "certify": 2, "tolerance": 1e-3}, (0,)),
    "torch": Setting(
        "torch", True, {"budget": [9, 14], "policy": "balanced", "correction": AnchoredSummaries(2)}, (1, 3)
    ),
    "torch, static": Setting("torch", False, {"budget": 14, "policy": "snapkv", "static": True}, (0, 1, 3)),
}


@pytest.mark.filterwarnings("ignore:an eviction was refused")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_stopped_at_any_line_has_not_been(name: str):
    """In a prefill, a token, one that fills the block, its flush, a chunk; or the cache says that it is torn."""
    setting = SETTINGS[name]
    library, static = LIBRARIES[setting.library], setting.options.get("static", False)
    tried, other, probe = (setting.cache() for _ in range(3))
    torn = 0
    for index, part in enumerate(steps(library, padded=setting.padded)):
        for act in (part.step, LayerCache.flush) if static and index == 3 else (part.step,):
            if index in setting.tried:
                torn += try_everywhere(library, tried, probe, act)
            else:
                act(probe)
            go_on_alike(library, tried, other, act)
    assert (torn > 0) == static


def try_everywhere(library: Library, tried: LayerCache, probe: LayerCache, act: Callable[[LayerCache], Any]) -> int:
    """Stop an act wherever it comes to with another cache, which does it; how often that tore the first."""
    places = places_of(lambda: act(probe))
    before, held, snapshot = (tried.state, shown(library, tried), told(tried)), tried.held(), tried.snapshot()
    stopped = torn = 0
    for where in places:
        if not is_stopped(lambda: act(tried), where):  # what was known from an earlier try took fewer lines
            tried.go_back(held)
            if not tried.is_fixed:
                continue
        else:
            stopped += 1
            if not tried.torn:
                assert_as_before(library, tried, before)
                continue
            torn += 1
            for use in (lambda: act(tried), tried.view):
                with pytest.raises(RuntimeError, match="the cache is torn"):
                    use()
        tried.restore(snapshot)
        before, held = (tried.state, before[1], told(tried)), tried.held()
        assert_as_before(library, tried, before)
    assert stopped > 0.9 * len(places) > 30
    return torn


# What a step calls: of the policy, the correction, the backend and the statistics.
CALLS = (
    *("policy.importance", "policy.observe", "correction.fold", "correction.expansion", "correction.known"),
    *("backend.decode", "backend.attend_stored", "backend.attend_causal", "backend.prefill", "backend.correct"),
    *("backend.write", "backend.write_at", "backend.copy", "moments.update"),
)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("where", CALLS)
def test_a_step_whose_parts_fail_has_not_been(
    backend: Library, where: str, padded: bool, monkeypatch: pytest.MonkeyPatch
):
    """On every library, whether they fail before they have done anything or after."""
    options: dict[str, Any] = {"policy": "h2o", "correction": AnchoredSummaries(2), "certify": 1, **SIZES}
    tried, other = LayerCache([9, 14], **options), LayerCache([9, 14], **options)
    owners: dict[str, type] = {"policy": type(tried.config.policy), "correction": AnchoredSummaries, "moments": Moments}
    owner, _, name = where.partition(".")
    failures = 0
    for part in steps(backend, padded=padded):
        owners["backend"] = type(get_backend(part.k))
        before, held = (tried.state, shown(backend, tried), told(tried)), tried.held()
        for done in (False, True):
            with monkeypatch.context() as patch:
                real = getattr(owners[owner], name)

                def fail(*arguments: Any, real: Any = real, done: bool = done, **named: Any) -> None:
                    if done:
                        real(*arguments, **named)
                    raise MemoryError(where)

                patch.setattr(owners[owner], name, fail)
                try:
                    part.step(tried)
                except MemoryError:
                    failures += 1
                    assert_as_before(backend, tried, before)
                else:  # this step does not come there
                    tried.go_back(held)
        go_on_alike(backend, tried, other, part.step)
    assert failures > 0 or (where == "backend.write" and not padded)  # those are written side by side

"""An eviction that works on a few heads at a time is one that works on all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from libraries import LIBRARIES, Library
from test_joining import CASES, DEFAULT, SMALL, assert_alike, assert_close

from momentkv import LayerCache
from momentkv.backends import base
from momentkv.cache.curves import error_curves
from momentkv.policies.base import Policy, Tokens
from momentkv.statistics.corrections import AnchoredSummaries

ROWS, GROUP, HEADS, DIMENSION = 2, 2, 3, 8
# Bytes that an eviction works on at once: of no head, so that each comes by itself, and of all.
FEW, ALL = 1, 10**12


def life(library: Library, settings: dict[str, Any], bytes_at_once: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A cache that has read a prompt of two rows and some tokens, and all that came out."""
    monkeypatch.setattr(base, "AT_ONCE", bytes_at_once)
    rng, cache, outs = np.random.default_rng(0), LayerCache([12, 25, 31], **settings), []
    for n in (60, *[1] * 9):
        q, k, v = (library.asarray(rng.normal(size=(ROWS, h, n, DIMENSION))) for h in (GROUP * HEADS, HEADS, HEADS))
        valid = np.ones((ROWS, 1, n), dtype=bool)
        valid[0, :, : n // 4] = False
        outs.append(library.numpy(cache.step(q, k, v, valid=library.asarray(valid))))
    return cache, outs


@pytest.mark.parametrize("name", sorted(CASES))
def test_heads_one_by_one_are_all_at_once(name: str, monkeypatch: pytest.MonkeyPatch):
    check_lives(LIBRARIES["torch"], CASES[name][1], monkeypatch)


@pytest.mark.parametrize("library", ["numpy", "array-api-strict"])
def test_heads_one_by_one_in_every_library(library: str, monkeypatch: pytest.MonkeyPatch):
    check_lives(LIBRARIES[library], DEFAULT, monkeypatch)


def check_lives(library: Library, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    (a, first), (b, second) = (life(library, settings, size, monkeypatch) for size in (FEW, ALL))
    assert_alike(a, b, library.numpy)
    for x, y in zip(first, second, strict=True):
        assert_close(x, y, 0.001)


class Seeing(Policy):
    """Notes how many heads it ranks at once."""

    name = "seeing"

    def __init__(self, *, coupled: bool = False) -> None:
        self.seen: list[int] = []
        self.couples_heads = coupled  # type: ignore[misc]

    def importance(self, tokens: Tokens) -> Any:
        self.seen.append(tokens.keys.shape[-3])
        return tokens.positions * 1.0


class Folding(AnchoredSummaries):
    """Notes how many heads it folds and calibrates at once."""

    def __init__(self, *, coupled: bool = False) -> None:
        super().__init__()
        object.__setattr__(self, "seen", [])
        object.__setattr__(self, "couples_heads", coupled)

    def fold(self, state: Any, k: Any, v: Any, *, mask: Any, window: Any) -> Any:
        self.seen.append(k.shape[-3])  # type: ignore[attr-defined]
        return super().fold(state, k, v, mask=mask, window=window)

    def calibrate(self, state: Any, q: Any, k: Any, *, scale: float, mask: Any) -> Any:
        assert q.shape[-3] == GROUP * k.shape[-3]
        self.seen.append(k.shape[-3])  # type: ignore[attr-defined]
        return super().calibrate(state, q, k, scale=scale, mask=mask)


# Of keys and values of 60 tokens in two rows, in float32, whatever their dtype.
OF_A_HEAD = 4 * ROWS * 60 * 2 * DIMENSION


@pytest.mark.parametrize(
    ("size", "seen"),
    [(FEW, [1, 1, 1]), (2 * OF_A_HEAD, [2, 1]), (3 * OF_A_HEAD - 1, [2, 1]), (3 * OF_A_HEAD, [3]), (ALL, [3])],
)
def test_as_many_heads_as_the_bytes_of_a_backend_hold(size: int, seen: list[int], monkeypatch: pytest.MonkeyPatch):
    policy, correction = Seeing(), Folding()
    life(LIBRARIES["torch"], SMALL | {"policy": policy, "correction": correction}, size, monkeypatch)
    assert policy.seen[: len(seen)] == seen
    assert correction.seen[: 2 * len(seen)] == 2 * seen  # type: ignore[attr-defined]


def test_heads_that_depend_on_each_other_stay_together(monkeypatch: pytest.MonkeyPatch):
    policy, correction = Seeing(coupled=True), Folding(coupled=True)
    monkeypatch.setattr(base, "AT_ONCE", FEW)
    cache = LayerCache(20, **SMALL, policy=policy, correction=correction)
    cache.step(*(torch.randn(ROWS, h, 60, DIMENSION) for h in (GROUP * HEADS, HEADS, HEADS)))
    assert {*policy.seen, *correction.seen} == {HEADS}  # type: ignore[attr-defined]


class Wrong(Seeing):
    def importance(self, tokens: Tokens) -> Any:
        return super().importance(tokens)[..., 1:]


def test_a_ranking_of_the_wrong_shape_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(base, "AT_ONCE", FEW)
    cache = LayerCache(20, **SMALL, policy=Wrong())
    with pytest.raises(ValueError, match=r"policy 'seeing' gave an array of shape \(2, 1, 59\).* shape \(2, 1, 60\)"):
        cache.step(*(torch.randn(ROWS, h, 60, DIMENSION) for h in (GROUP * HEADS, HEADS, HEADS)))


@pytest.mark.parametrize("sinks_and_window", [(1, 32), (0, 32), (1, 8)])
@pytest.mark.parametrize("padding", [0, 9])
def test_errors_of_budgets_are_those_of_all_heads_at_once(
    sinks_and_window: tuple[int, int], padding: int, monkeypatch: pytest.MonkeyPatch
):
    (sinks, window), curves = sinks_and_window, []
    rng = np.random.default_rng(0)
    arrays = [torch.from_numpy(rng.normal(size=(ROWS, h, 90, DIMENSION))) for h in (GROUP * HEADS, HEADS, HEADS)]
    valid = torch.ones(ROWS, 1, 90, dtype=torch.bool)
    valid[0, :, :padding] = False
    for size in (FEW, ALL):
        monkeypatch.setattr(base, "AT_ONCE", size)
        cache = LayerCache(50, **DEFAULT | {"sinks": sinks, "window": window, "keep_queries": True})
        cache.append(*arrays[1:])
        cache.attend(arrays[0], valid=valid if padding else None)
        curves.append(error_curves(cache, [40, 60, 80]))
    assert_close(*curves, 1e-9)


@pytest.mark.parametrize("window", [8, 32])
def test_padding_has_no_part_in_errors(window: int):
    rng, curves = np.random.default_rng(0), []
    arrays = [torch.from_numpy(rng.normal(size=(1, h, 90, DIMENSION))) for h in (GROUP * HEADS, HEADS, HEADS)]
    for hidden, first in ((9, 0), (0, 9)):
        q, k, v = (x[..., first:, :] for x in arrays)
        valid = torch.arange(90 - first)[None, None] >= hidden
        cache = LayerCache(50, **DEFAULT | {"window": window, "keep_queries": True})
        cache.append(k, v)
        cache.attend(q, valid=valid if hidden else None)
        curves.append(error_curves(cache, [40, 60, 70]))
    assert_close(*curves, 1e-9)

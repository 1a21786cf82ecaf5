"""From importances to retained tokens, against a selection that sorts each head by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from libraries import Library

from momentkv.policies import Selection, retain
from momentkv.policies.select import kept, ranking
from momentkv.testing import oracle
from momentkv.testing.strategies import shape as fixed


@dataclasses.dataclass(frozen=True)
class Choice:
    """One call of `retain`: two rows of two heads, each with its own empty slots."""

    importance: np.ndarray
    positions: np.ndarray
    budget: int
    sinks: int
    window: int


@st.composite
def choices(draw: st.DrawFn, *, law: st.SearchStrategy[str]) -> Choice:
    n, sinks, window = draw(fixed(st.integers(0, 12), 10)), draw(st.integers(0, 2)), draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape, kind = (2, 2, n), draw(law)
    importance = rng.standard_normal(shape)
    if kind == "ties":
        importance = rng.integers(0, 2, shape).astype(float)
    elif kind == "equal":
        importance = np.zeros(shape)
    elif kind == "infinite":
        importance = rng.choice([-math.inf, 0.0, math.inf], shape)
    seen = n + draw(st.integers(0, 5))
    positions = np.sort(rng.permuted(np.broadcast_to(np.arange(seen), (2, 2, seen)), axis=-1)[..., :n], axis=-1)
    if draw(st.booleans()):
        positions = np.where(rng.random(shape) < 0.4, -1, positions)
    budget = sinks + window + draw(st.integers(1, 8))
    return Choice(importance, positions.astype(np.int32), budget, sinks, window)


def row(importance: list[float], positions: list[int], *, budget: int, window: int) -> Choice:
    """The same few tokens in every row and head."""
    shape = (2, 2, len(positions))
    repeated = (np.broadcast_to(x, shape) for x in (np.array(importance), np.array(positions, dtype=np.int32)))
    return Choice(*repeated, budget, 0, window)


finite = choices(law=st.sampled_from(["gaussian", "ties", "equal"]))


def chosen(backend: Library, choice: Choice, budget: object = None) -> Selection:
    selection = retain(
        backend.asarray(choice.importance),
        backend.asarray(choice.positions),
        budget=choice.budget if budget is None else budget,
        sinks=choice.sinks,
        window=choice.window,
    )
    return Selection(*(backend.numpy(x) for x in selection))


def slots(selection: Selection, head: tuple[int, ...]) -> list[int]:
    return selection.indices[head][selection.filled[head]].tolist()


def assert_chosen_by_hand(choice: Choice, selection: Selection, budget: np.ndarray) -> None:
    for head in np.ndindex(2, 2):
        positions = choice.positions[head]
        expected = oracle.retained_slots(
            choice.importance[head], positions, int(budget[head]), choice.sinks, choice.window
        )
        assert slots(selection, head) == expected
        assert len(expected) == min(budget[head], (positions >= 0).sum())
        gone = [j for j in range(len(positions)) if positions[j] >= 0 and j not in expected]
        assert np.flatnonzero(selection.evicted[head]).tolist() == gone


@given(choice=finite)
def test_selection_equals_sorting_by_hand(backend: Library, choice: Choice):
    """Sinks and window stay, the most important fill the budget, ties keep the earlier, empty slots never stay."""
    assert_chosen_by_hand(choice, chosen(backend, choice), np.full((2, 2), choice.budget))


@given(choice=finite, seed=st.integers(0, 2**32 - 1))
def test_each_head_may_have_its_own_budget(backend: Library, choice: Choice, seed: int):
    budget = choice.sinks + choice.window + np.random.default_rng(seed).integers(0, 6, (2, 2))
    selection = chosen(backend, choice, backend.asarray(budget))
    assert_chosen_by_hand(choice, selection, budget)
    assert selection.indices.shape[-1] == selection.filled.sum(axis=-1).max()


@given(choice=finite)
def test_retained_and_evicted_part_the_valid_slots(backend: Library, choice: Choice):
    selection = chosen(backend, choice)
    for head in np.ndindex(2, 2):
        kept, gone = slots(selection, head), np.flatnonzero(selection.evicted[head]).tolist()
        assert sorted(kept + gone) == np.flatnonzero(choice.positions[head] >= 0).tolist()
        assert kept == sorted(kept)


@given(choice=finite)
def test_sinks_and_window_are_retained_whatever_their_importance(backend: Library, choice: Choice):
    held = choice.positions >= 0
    from_end = np.cumsum(held[..., ::-1], axis=-1)[..., ::-1]
    protected = held & ((np.cumsum(held, axis=-1) <= choice.sinks) | (from_end <= choice.window))
    worthless = dataclasses.replace(choice, importance=np.where(protected, -1e30, choice.importance))
    assert not (chosen(backend, worthless).evicted & protected).any()


@given(choice=choices(law=st.just("infinite")))
@example(choice=row([math.inf, math.inf, 0.0], [0, 1, 2], budget=2, window=1))
@example(choice=row([0.0, -math.inf, -math.inf], [-1, 0, 1], budget=2, window=0))
def test_infinite_importance_obeys_the_same_rules(backend: Library, choice: Choice):
    """The norm of a huge key may overflow: that must neither push out the window nor count an empty slot."""
    assert_chosen_by_hand(choice, chosen(backend, choice), np.full((2, 2), choice.budget))


@pytest.mark.parametrize("window", [0, 1, 2, 3])
def test_window_is_counted_in_the_tokens_of_a_row(backend: Library, window: int):
    """Whatever was evicted between them, and wherever its padding lies."""
    positions = np.array([[[0, 1, -1, 4, 9, -1, -1]]], dtype=np.int32)
    choice = Choice(np.array([[[5.0, 4.0, 9.0, 3.0, 2.0, 9.0, 9.0]]]), positions, window + 1, 0, window)
    expected = [[0], [0, 4], [0, 3, 4], [0, 1, 3, 4]][window]
    assert slots(chosen(backend, choice), (0, 0)) == expected


def test_ties_keep_the_earlier_token(backend: Library):
    choice = Choice(np.zeros((1, 1, 6)), np.arange(6, dtype=np.int32)[None, None], 4, 1, 1)
    assert slots(chosen(backend, choice), (0, 0)) == [0, 1, 2, 5]


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["floats", "ties", "integers", "not finite"]),
    st.integers(0, 14),
)
def test_what_is_kept_are_the_first_of_the_ranking(seed: int, kind: str, budget: int):
    rng = np.random.default_rng(seed)
    sinks, window = 1, 2
    importance = rng.normal(size=(3, 12))
    if kind == "ties":
        importance = np.round(importance)
    elif kind == "integers":
        importance = rng.integers(-3, 3, size=(3, 12))
    elif kind == "not finite":
        importance[rng.random((3, 12)) < 0.4] = -np.inf
        importance[rng.random((3, 12)) < 0.2] = np.inf
    real = rng.random((3, 12)) < 0.8
    positions = np.where(real, np.arange(12), -1)
    order = ranking(importance, positions, sinks=sinks, window=window)
    limits = budget + np.arange(3)
    first = np.zeros((3, 12), dtype=bool)
    for row, limit in enumerate(limits):
        first[row, order[row, : max(limit, sinks + window)]] = True
    found = kept(importance, positions, limits, sinks=sinks, window=window)
    np.testing.assert_array_equal(found, first & real)


def test_a_token_without_a_number_is_kept_first_and_takes_its_place_once():
    importance = np.asarray([0.0, 5.0, np.nan, 3.0, np.nan, 1.0])
    found = kept(importance, np.arange(6), 3, sinks=1, window=0)
    assert found.tolist() == [True, False, True, False, True, False]

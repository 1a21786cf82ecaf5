"""Keys and values that move away from the means and deviations that a head's tokens are coded by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import Library

from momentkv import LayerCache
from momentkv.codes import Standard, coarse, misfit

D, HEADS = 8, 2
SETTINGS: dict[str, Any] = {
    "policy": "streaming",
    "order": None,
    "sinks": 1,
    "window": 4,
    "exact_window": 1,
    "block": 8,
}


def read(cache: LayerCache, k: np.ndarray, v: np.ndarray, chunk: int) -> None:
    """Append and evict, by a policy that looks at no query."""
    for start in range(0, k.shape[-2], chunk):
        cache.append(k[..., start : start + chunk, :], v[..., start : start + chunk, :])
        cache.evict()


def error(x: np.ndarray, standard: Standard, bits: int) -> np.ndarray:
    """Root mean square of what records lose, in deviations of the tokens' own standard."""
    own = Standard.of(x, centred=standard.mean is not None)
    lost = standard.restore(coarse(standard.standardise(x), standard, bits)) - x
    return np.sqrt(np.mean((lost / own.deviation[..., None, :]) ** 2, axis=(-2, -1)))


@given(
    seed=st.integers(0, 10_000),
    away=st.floats(0, 4),
    wider=st.floats(-2, 2),
    uneven=st.floats(0, 1),
    bits=st.sampled_from([6, 8]),
    centred=st.booleans(),
)
def test_misfit_is_the_ratio_of_the_error_to_that_of_a_fresh_encoding(
    seed: int, away: float, wider: float, uneven: float, bits: int, centred: bool
):
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(HEADS, 400, D))
    after = np.exp(wider) * (before * np.exp(uneven * rng.normal(size=D)) + away * rng.normal(size=D) / D**0.5)
    standard = Standard.of(before, centred=centred)
    fresh = Standard.of(after, centred=centred)
    ratio = error(after, standard, bits) / error(after, fresh, bits)
    expected = misfit(after, standard)
    assert (ratio <= 1.3 * expected).all()
    assert (ratio >= expected / 1.3).all()


@pytest.mark.parametrize("away", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_coding_anew_what_was_coded_gives_nothing_back_and_adds_an_error(away: float, seed: int):
    """So that records stay as they are, though means and deviations no longer fit them."""
    rng = np.random.default_rng(seed)
    before = rng.normal(size=(HEADS, 400, D))
    after = before + away * rng.normal(size=D)
    standard, fresh = Standard.of(before), Standard.of(after)

    def lost(x: np.ndarray) -> np.ndarray:
        return np.sqrt(np.mean(((x - after) / fresh.deviation[..., None, :]) ** 2, axis=(-2, -1)))

    def read_back(x: np.ndarray, by: Standard) -> np.ndarray:
        return by.restore(coarse(by.standardise(x), by, 5))

    once = read_back(after, standard)
    left, again, new = lost(once), lost(read_back(once, fresh)), lost(read_back(after, fresh))
    assert (again > left).all()
    assert (again < 1.1 * np.sqrt(left**2 + new**2)).all()
    assert (left > 0.9 * new).all()


def test_what_moves_in_the_same_proportion_in_all_channels_fits_as_before():
    """Each token has its own step."""
    x = np.random.default_rng(0).normal(size=(HEADS, 300, D))
    standard = Standard.of(x, centred=False)
    np.testing.assert_allclose(misfit(1e6 * x, standard), 1, rtol=1e-9)


def test_misfit_looks_at_tokens_alone():
    x = np.random.default_rng(0).normal(size=(HEADS, 300, D))
    standard, mask = Standard.of(x), np.arange(300) < 200
    shown = np.where(mask[:, None], x + 3, np.nan)
    expected = misfit(x[:, :200] + 3, standard)
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(misfit(shown, standard, np.broadcast_to(mask, (HEADS, 300))), expected, rtol=1e-12)
    assert (misfit(x, standard, np.zeros((HEADS, 300), dtype=bool)) == 1).all()
    assert (misfit(0 * x, Standard.of(0 * x, centred=False)) == 1).all()


@pytest.mark.parametrize("budget", [20, (16, 24)], ids=["equal", "ragged"])
def test_a_cache_says_how_well_its_standards_fit(backend: Library, budget: Any):
    rng = np.random.default_rng(1)
    k, v = (rng.normal(size=(1, HEADS, 120, D)) for _ in range(2))
    k[:, 1, 40:] += 12
    cache = LayerCache(budget, bits=8, **SETTINGS | {"window": 2})
    given = [backend.asarray(x) for x in (k, v)]
    cache.append(given[0][..., :30, :], given[1][..., :30, :])
    assert cache.misfit() is None  # nothing is in few bits yet
    cache.evict()
    for start in range(30, 120, 15):
        cache.append(*(x[..., start : start + 15, :] for x in given))
        cache.evict()
    keys, values = (backend.numpy(x)[0] for x in cache.misfit())
    assert keys[0] < 1.3
    assert keys[1] > 1.5
    assert (values < 1.3).all()


def test_after_a_million_tokens_that_drift_no_token_is_clipped_and_the_error_is_as_misfit_says():
    n, chunk = 1_000_000, 50_000
    rng = np.random.default_rng(2)
    k, v = (rng.normal(size=(1, HEADS, n, D)).astype(np.float32) for _ in range(2))
    k[:, 1] += np.linspace(0, 12, n, dtype=np.float32)[:, None] * np.sign(rng.normal(size=D)).astype(np.float32)
    cache = LayerCache(200, bits=(5, 3), **SETTINGS)
    read(cache, k, v, chunk)
    state = cache.state
    assert cache.seen == n
    assert float(state.key_step.max()) < 65504
    shown, given_ = cache.keys, np.take_along_axis(k, cache.positions[..., None], axis=-2)
    off = np.abs(shown - given_)
    widest = state.key_step.astype(float).reshape(1, HEADS, -1).max(-1)[..., None, None]
    assert (off <= widest * state.key_deviation[..., None, :] / 2 * 1.001 + 1e-4).all()
    coded = off.max(-1) > 0
    fits = cache.misfit()[0][0]
    for head in range(HEADS):
        x, lost = given_[0, head][coded[0, head]], off[0, head][coded[0, head]]
        own = Standard.of(x)
        ratio = np.sqrt(np.mean((lost / own.deviation) ** 2)) / error(x, own, 5)
        assert fits[head] / 1.3 <= ratio <= fits[head] * 1.3
    assert fits[0] < 1.2
    assert fits[1] > 2

"""The layer cache against a reference that loops over one row's tokens: same tokens retained, same outputs.

Rows of a batch are padded, and each must do what it does alone.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from libraries import LIBRARIES, Library
from reference_cache import ReferenceRow, Rules

from momentkv import POLICIES, LayerCache, get_policy
from momentkv.policies import H2O, Balanced, CriticalKV, LagKV, MomentKV, Policy, SnapKV
from momentkv.testing.rounding import assert_within, corrected_error, unit

D, DV, KV_HEADS, GROUP = 5, 4, 2, 2
ALL = sorted(set(POLICIES) - {"random"})

SCHEDULES = {
    "prefill then decode": [30, *[1] * 14],
    "decode from the start": [1] * 26,
    "chunks": [9, 7, 1, 1, 8, 1, 1, 1, 5],
    "a block exactly": [11, 1, 1, 1, 1],
}


def observing(name: str) -> Policy:
    """The policy with a window that these short sequences can fill, and more than one round."""
    if name == "momentkv":
        return MomentKV(observes=4, rounds=3)
    if name == "balanced":
        return Balanced(novelty=0.25, kernel=1)
    if name == "lagkv":
        return LagKV(lag=4)
    if name == "snapkv":
        return SnapKV(observes=4, kernel=3)  # neighbours that tie are then two numbers, whose sum has no order
    if name == "criticalkv":
        return CriticalKV(observes=4, kernel=1)  # sums over the same neighbours tie, but for rounding
    return POLICIES[name](observes=4) if name in ("attention", "caote", "h2o") else get_policy(name)


def rules_of(policy: Policy, order: int | None, budget: int = 8) -> Rules:
    return Rules(
        policy.name,
        budget,
        order,
        observes=policy.observes,
        kernel=getattr(policy, "kernel", 5),
        lag=getattr(policy, "lag", 32),
        rounds=policy.rounds,
    )


def cache_of(policy: Policy, rules: Rules) -> LayerCache:
    return LayerCache(
        rules.budget,
        policy=policy,
        order=rules.order,
        sinks=rules.sinks,
        window=rules.window,
        block=rules.block,
        scale=rules.scale,
    )


def left_padded(lengths: list[int], padding: list[int]) -> np.ndarray:
    return np.arange(sum(lengths)) >= np.array(padding)[:, None]


def compare(backend: Library, policy: Policy, order: int | None, lengths: list[int], valid: np.ndarray) -> None:
    """Run a batch of which ``valid`` (row, n) are tokens; after every step compare each row to its reference.

    Numbers are Gaussian and in float64: importances that differ, differ by far more than rounding.
    """
    rows, n = valid.shape
    rng = np.random.default_rng(math.prod(lengths) + n)
    q, k, v = (
        rng.standard_normal((rows, heads, n, size))
        for heads, size in ((KV_HEADS * GROUP, D), (KV_HEADS, D), (KV_HEADS, DV))
    )
    rules = rules_of(policy, order)
    rank = np.cumsum(valid, axis=-1) - 1  # place in the row alone
    cache, references = cache_of(policy, rules), [ReferenceRow(rules, KV_HEADS) for _ in valid]
    error = corrected_error(q, k, v, unit(), rules.scale, merges=len(lengths) * rules.rounds)
    done, evicted = 0, False
    for length in lengths:
        part = slice(done, done + length)
        done += length
        out = backend.numpy(
            cache.step(
                *(backend.asarray(x[:, :, part]) for x in (q, k, v)),
                valid=None if valid.all() else backend.asarray(valid[:, None, part]),
            )
        )
        positions = backend.numpy(cache.positions)
        for row, reference in enumerate(references):
            real = valid[row, part]
            if not real.any():
                continue
            expected = reference.step(*(x[row, :, part][:, real] for x in (q, k, v)))
            assert_within(out[row][:, real], expected, error[row, :, part][:, real])
            for head in range(KV_HEADS):
                held = [int(rank[row, p]) for p in positions[row, head] if p >= 0]
                assert held == reference.retained[head], f"row {row}, head {head}, after {done} tokens"
                evicted = evicted or bool(reference.evicted(head))
    assert evicted


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("order", [1, 0, None])
@pytest.mark.parametrize("name", ALL)
def test_cache_equals_the_reference(name: str, order: int | None, schedule: str):
    compare(
        LIBRARIES["numpy"],
        observing(name),
        order,
        SCHEDULES[schedule],
        left_padded(SCHEDULES[schedule], [0, 0]),
    )


@pytest.mark.parametrize("schedule", ["prefill then decode", pytest.param("chunks", marks=pytest.mark.many_shapes)])
@pytest.mark.parametrize("name", ALL)
def test_cache_equals_the_reference_on_every_backend(backend: Library, name: str, schedule: str):
    compare(backend, observing(name), 1, SCHEDULES[schedule], left_padded(SCHEDULES[schedule], [0, 0]))


@pytest.mark.parametrize(
    "policy",
    [
        H2O(observes=None),
        SnapKV(observes=4),
        SnapKV(observes=6, kernel=3),
        MomentKV(observes=2, rounds=1),
        MomentKV(rounds=2),
    ],
)
def test_cache_equals_the_reference_with_other_settings(policy: Policy):
    compare(
        LIBRARIES["numpy"],
        policy,
        1,
        SCHEDULES["prefill then decode"],
        left_padded(SCHEDULES["prefill then decode"], [0]),
    )


@pytest.mark.parametrize(
    ("lengths", "padding"),
    [
        ([30, *[1] * 14], [0, 4]),  # both rows evict at once
        ([30, *[1] * 14], [0, 24]),  # the short row first fills up while decoding
        ([14, *[1] * 14], [3, 0]),  # a block exactly in one row, more in the other
        ([9, 7, 1, 1, 8, 1, 1, 1, 5], [0, 12]),  # padding longer than the first chunk
        ([12, *[1] * 14], [11, 0, 5]),  # rows evict at different steps
    ],
)
@pytest.mark.parametrize("name", ALL)
def test_a_padded_row_equals_the_row_alone(name: str, lengths: list[int], padding: list[int]):
    compare(LIBRARIES["numpy"], observing(name), 1, lengths, left_padded(lengths, padding))


@pytest.mark.parametrize("name", ALL)
def test_a_padded_row_equals_the_row_alone_on_every_backend(backend: Library, name: str):
    lengths = [30, *[1] * 6]
    compare(backend, observing(name), 1, lengths, left_padded(lengths, [0, 4]))


@pytest.mark.parametrize("name", ALL)
def test_a_row_padded_on_the_right_equals_the_row_alone(name: str):
    """Its window and the queries that are observed are its own last ones, and not those of the padding."""
    valid = np.ones((3, 30), dtype=bool)
    valid[1, 14:] = False
    valid[2, 28:] = False
    compare(LIBRARIES["numpy"], observing(name), 1, [30], valid)


@pytest.mark.parametrize("name", sorted(set(ALL) - {"snapkv"}))
def test_padding_within_a_row_is_neither_seen_nor_observed(backend: Library, name: str):
    """Turns of different lengths. Only averages over neighbouring positions see the gap."""
    policy = H2O(observes=None) if name == "h2o" else observing(name)
    lengths = [9, 6, 1, 1, 7, 1, 1, 1]
    valid = np.ones((2, sum(lengths)), dtype=bool)
    valid[0, [12, 13, 14, 16]] = False
    valid[1, [5, 6, 7, 8, 9, 18, 25]] = False
    compare(backend, policy, 1, lengths, valid)

"""Attention as an algebra: `attend` against the oracle, and the laws of `merge`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library

from momentkv import AttentionState, attend, merge
from momentkv.testing import oracle
from momentkv.testing.rounding import MERGE, assert_same, assert_within, attention_error, merge_error, unit
from momentkv.testing.strategies import MASKS, Case, cases, some_tokens

masked_cases = cases(masks=MASKS)
whole_floats = st.sampled_from(["float64", "float32"])


def attended(backend: Library, case: Case, **kwargs: object) -> AttentionState:
    q, k, v = (backend.asarray(x) for x in case.arrays())
    return attend(q, k, v, **kwargs)


def assert_is(backend: Library, state: AttentionState, exact: oracle.State, error: oracle.State) -> None:
    assert_within(backend.numpy(state.out), exact.out, error.out)
    assert_within(backend.numpy(state.lse), exact.lse, error.lse)


@given(case=masked_cases, own_scale=st.booleans())
def test_attend_equals_the_oracle(backend: Library, case: Case, own_scale: bool):
    q, k, v = case.arrays()
    scale = case.factor() if own_scale else None
    state = attended(backend, case, scale=scale, mask=backend.asarray(case.mask()))
    exact = oracle.attend(q, k, v, scale, case.mask())
    assert_is(backend, state, exact, attention_error(q, k, v, exact.lse, unit(case.dtype), scale))
    assert backend.dtype(state.out) == backend.dtype(state.lse) == case.dtype


@given(case=cases(n=st.just(0), masks=MASKS))
def test_attention_to_nothing_is_the_identity(backend: Library, case: Case):
    state = attended(backend, case, mask=backend.asarray(case.mask()))
    assert (backend.numpy(state.out) == 0).all()
    assert (backend.numpy(state.lse) == -math.inf).all()
    assert state.out.shape == (*case.batch, case.q_heads, case.q_len, case.dv)


@given(case=cases(n=some_tokens, masks=("all", "rows")))
def test_a_query_that_sees_nothing_gets_the_identity(backend: Library, case: Case):
    mask = np.broadcast_to(case.mask(), (*case.lead, case.group, case.q_len, case.n))
    blind = ~mask.any(axis=-1).reshape(*case.batch, case.q_heads, case.q_len)
    state = attended(backend, case, mask=backend.asarray(case.mask()))
    assert (backend.numpy(state.out)[blind] == 0).all()
    assert (backend.numpy(state.lse)[blind] == -math.inf).all()
    assert np.isfinite(backend.numpy(state.lse)[~blind]).all()


@given(case=cases(n=some_tokens, masks=("tokens",)))
def test_masking_tokens_equals_removing_them(backend: Library, case: Case):
    q, k, v = case.arrays()
    keep = case.mask().reshape(-1, case.n)[0]
    masked = attended(backend, case, mask=backend.asarray(keep))
    exact = oracle.attend(q, k[..., keep, :], v[..., keep, :])
    # The bound is that of all tokens: a masked logit is computed, and rounded, before it is hidden.
    assert_is(backend, masked, exact, attention_error(q, k, v, exact.lse, unit(case.dtype)))


@given(case=cases(n=some_tokens))
def test_order_of_tokens_does_not_matter_to_attention(backend: Library, case: Case):
    q, k, v = case.arrays()
    order = case.rng(7).permutation(case.n)
    state = attend(*(backend.asarray(x) for x in (q, k[..., order, :], v[..., order, :])))
    exact = oracle.attend(q, k, v)
    assert_is(backend, state, exact, attention_error(q, k, v, exact.lse, unit(case.dtype)))


@given(case=cases(n=some_tokens))
def test_scale_on_logits_equals_scale_on_queries_or_keys(backend: Library, case: Case):
    q, k, v = case.arrays()
    scale, twice = case.factor(), np.asarray(2, dtype=case.dtype)
    exact = oracle.attend(q, k, v, scale)
    error = attention_error(q, k, v, exact.lse, unit(case.dtype), scale)
    # Powers of two, so that rescaling the inputs rounds nothing.
    for queries, keys, s in ((q * twice, k, scale / 2), (q, k * twice, scale / 2), (q / twice, k * twice, scale)):
        assert_is(backend, attend(*(backend.asarray(x) for x in (queries, keys, v)), scale=s), exact, error)


@given(case=cases(n=some_tokens, masks=MASKS))
def test_attention_is_linear_in_values(backend: Library, case: Case):
    q, k, v = case.arrays()
    mask = backend.asarray(case.mask())
    single, negated = (
        attend(backend.asarray(q), backend.asarray(k), backend.asarray(x), mask=mask) for x in (v, -4 * v)
    )
    # Powers of two again: the same roundings happen in both.
    assert_same(backend.numpy(negated.out), -4 * backend.numpy(single.out))
    assert_same(backend.numpy(negated.lse), backend.numpy(single.lse))


@given(case=cases(), cut=st.integers(0, 12))
def test_merge_of_disjoint_sets_is_attention_to_their_union(backend: Library, case: Case, cut: int):
    """Retained + exact E = full attention, either of them possibly empty."""
    q, k, v = case.arrays()
    cut, u = min(cut, case.n), unit(case.dtype)
    parts = [(k[..., :cut, :], v[..., :cut, :]), (k[..., cut:, :], v[..., cut:, :])]
    states = [attend(*(backend.asarray(x) for x in (q, *part))) for part in parts]
    exact = oracle.attend(q, k, v)
    errors = [attention_error(q, *part, oracle.attend(q, *part).lse, u) for part in parts]
    size = np.linalg.norm(v, axis=-1).max(initial=0.0)
    assert_is(backend, merge(*states), exact, merge_error(*errors, size, exact.lse, u))


def states(case: Case, count: int) -> list[oracle.State]:
    """Free states: lse equal, close or far apart, or -inf; outputs of any law."""
    shape, made = (*case.batch, case.q_heads, case.q_len), []
    for index in range(count):
        rng = case.rng(10 + index)
        out = rng.standard_normal((*shape, case.dv)) * (1e4 if case.law == "huge" else 1.0)
        lse = {"ties": rng.integers(0, 2, shape).astype(float), "huge": 1e4 * rng.standard_normal(shape)}.get(
            case.law, rng.standard_normal(shape)
        )
        empty = rng.random(shape) < 0.3
        out, lse = np.where(empty[..., None], 0.0, out), np.where(empty, -math.inf, lse)
        made.append(oracle.State(case.rounded(out), case.rounded(lse)))
    return made


def converted(backend: Library, made: list[oracle.State]) -> list[AttentionState]:
    return [AttentionState(backend.asarray(state.out), backend.asarray(state.lse)) for state in made]


@given(case=cases())
def test_merge_is_associative(backend: Library, case: Case):
    made = states(case, 3)
    a, b, c = converted(backend, made)
    exact, u = oracle.merge(*made), unit(case.dtype)
    finite = [np.abs(state.lse[np.isfinite(state.lse)]).max(initial=0.0) for state in made]
    size = max(np.linalg.norm(state.out, axis=-1).max(initial=0.0) for state in made)
    # Two merges, each with the largest lse that occurs.
    of_lse = 2 * u * (MERGE + max(finite) + 1)
    error = oracle.State(2 * size * (math.tanh(of_lse) + 2 * u * MERGE), of_lse)
    assert_is(backend, merge(merge(a, b), c), exact, error)
    assert_is(backend, merge(a, merge(b, c)), exact, error)


@given(case=cases())
def test_merge_is_commutative_to_the_last_bit(backend: Library, case: Case):
    a, b = converted(backend, states(case, 2))
    for one, other in zip(merge(a, b), merge(b, a), strict=True):
        assert_same(backend.numpy(one), backend.numpy(other))


@given(case=cases())
def test_empty_state_is_the_identity_of_merge_to_the_last_bit(backend: Library, case: Case):
    (made,) = states(case, 1)
    (state,) = converted(backend, [made])
    empty = oracle.State(np.zeros_like(made.out), np.full_like(made.lse, -math.inf))
    (identity,) = converted(backend, [empty])
    for merged in (merge(state, identity), merge(identity, state)):
        for one, other in zip(merged, state, strict=True):
            assert_same(backend.numpy(one), backend.numpy(other))


@given(case=cases(n=some_tokens, laws=("gaussian",)))
def test_a_far_smaller_state_disappears_without_a_trace(backend: Library, case: Case):
    a, b = converted(backend, [oracle.State(s.out, np.zeros_like(s.lse)) for s in states(case, 2)])
    merged = merge(a, AttentionState(b.out, b.lse - 1000.0))
    assert_same(backend.numpy(merged.out), backend.numpy(a.out))
    assert_same(backend.numpy(merged.lse), backend.numpy(a.lse))


@given(case=cases(dtypes=("float32",)), halves=st.sampled_from(["bfloat16", "float16"]))
def test_half_precision_inputs_are_attended_in_float32(case: Case, halves: str):
    torch = LIBRARIES["torch"]
    q, k, v = (torch.asarray(np.clip(x, -1e3, 1e3), halves) for x in case.arrays())
    state, upcast = attend(q, k, v), attend(q.float(), k.float(), v.float())
    for one, other in zip(state, upcast, strict=True):
        assert torch.dtype(one) == "float32"
        assert_same(torch.numpy(one), torch.numpy(other))


@pytest.mark.parametrize("group", [1, 2, 3])
def test_query_head_h_reads_kv_head_h_over_group(backend: Library, group: int):
    rng = np.random.default_rng(group)
    q, k, v = (rng.standard_normal((heads, 5, 4)) for heads in (2 * group, 2, 2))
    state = attend(*(backend.asarray(x) for x in (q, k, v)))
    for head in range(2 * group):
        kv_head = head // group
        alone = oracle.attend(q[head : head + 1], k[kv_head : kv_head + 1], v[kv_head : kv_head + 1])
        error = attention_error(q, k, v, alone.lse, unit("float64"))
        assert_within(backend.numpy(state.out)[head], alone.out[0], error.out.max())
        assert_within(backend.numpy(state.lse)[head], alone.lse[0], error.lse.max())


def test_mixed_dtypes_are_attended_in_the_wider(backend: Library):
    q, k, v = (np.random.default_rng(0).standard_normal((2, 3, 4)) for _ in range(3))
    for wide in range(3):
        dtypes = ["float64" if index == wide else "float32" for index in range(3)]
        state = attend(*(backend.asarray(x, dtype) for x, dtype in zip((q, k, v), dtypes, strict=True)))
        assert backend.dtype(state.out) == backend.dtype(state.lse) == "float64"

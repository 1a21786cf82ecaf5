"""Tokens in few bits: records stand for themselves, are within half a step, and are attended to as they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import Library

from momentkv import codes as few
from momentkv.attention import attend
from momentkv.codes import attention, records
from momentkv.testing.rounding import FUNCTION, assert_same, assert_within, unit
from momentkv.testing.strategies import Case, cases, some_tokens

bits_of = st.sampled_from(few.BITS)


def standard_of(backend: Library, x: np.ndarray, mask: np.ndarray | None = None) -> few.Standard:
    return few.Standard.of(backend.asarray(x), backend.asarray(mask))


def coded_of(backend: Library, k: np.ndarray, v: np.ndarray, bits: int, centred: bool) -> few.Coded:
    standards = standard_of(backend, k), few.Standard.of(backend.asarray(v), centred=centred)
    (keys, key_step), (values, value_step) = (
        few.encode(backend.asarray(x), standard, bits) for x, standard in zip((k, v), standards, strict=True)
    )
    return few.Coded((bits, bits), keys, values, key_step, value_step, *standards)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_dead_channel_beside_small_ones_has_a_small_deviation(backend: Library, dtype: str, centred: bool):
    """Of half precision the least deviation is no number, and must not be taken for that of nothing."""
    if dtype == "float16" and backend.name == "array-api-strict":
        pytest.skip("the array API has no half precision")
    x = 3e-4 * np.random.default_rng(0).normal(size=(2, 40, 8))
    x[..., 3] = 0.0
    tokens = backend.asarray(x.astype(dtype))
    standard = few.Standard.of(tokens, centred=centred)
    deviation = np.asarray(standard.deviation).astype(float)
    assert (deviation > 0).all()
    assert (deviation[..., 3] <= deviation.min(axis=-1)).all()
    decoded = few.decode(*few.encode(tokens, standard, 8), standard, 8)
    error = np.abs(np.asarray(decoded).astype(float) - np.asarray(tokens).astype(float))
    assert error.max() < 2e-5
    nothing = few.Standard.of(backend.asarray(np.zeros((1, 4, 8), dtype)), centred=centred)
    assert (np.asarray(nothing.deviation) == 1).all()


@given(bits=bits_of, d=st.sampled_from([1, 2, 3, 7, 8, 64, 80, 96, 112, 128]), seed=st.integers(0, 99))
@pytest.mark.many_shapes
def test_codes_are_packed_and_unpacked_without_loss(backend: Library, bits: int, d: int, seed: int):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (2, 3, d)).astype(np.int32)
    packed = few.pack(backend.asarray(codes), bits)
    assert backend.dtype(packed) == "uint8"
    assert tuple(packed.shape) == (2, 3, few.row_bytes(d, bits))
    assert (np.asarray(few.unpack(packed, bits, d)) == codes).all()


@pytest.mark.parametrize("bits", few.BITS)
@pytest.mark.parametrize("d", [64, 80, 96, 112, 128])
def test_no_bit_is_wasted_where_eight_divides_the_dimension(bits: int, d: int):
    assert few.row_bytes(d, bits) * 8 == d * bits


@given(case=cases(n=some_tokens), bits=bits_of)
def test_no_component_is_off_by_more_than_half_a_step(backend: Library, case: Case, bits: int):
    k, _ = case.tokens()
    standard = standard_of(backend, k)
    codes, step = few.encode(backend.asarray(k), standard, bits)
    mean, deviation, step, given = (
        backend.numpy(x) for x in (*standard[:2], step, few.decode(codes, step, standard, bits))
    )
    u = unit(case.dtype)
    size = np.abs(k) + np.abs(mean)[..., None, :]
    # z and its quotient by the step are rounded, and so is what is decoded of them: of the order of the token's size.
    z = np.abs(k - mean[..., None, :]) / deviation[..., None, :]
    rounding = deviation[..., None, :] * 8 * u * (z + step[..., None] * 2.0**bits) + 8 * u * size
    assert_within(given, k.astype(np.float64), deviation[..., None, :] * step[..., None] / 2 + rounding)


@given(case=cases(n=some_tokens), bits=bits_of)
def test_a_record_depends_on_no_other_token(backend: Library, case: Case, bits: int):
    k, _ = case.tokens()
    standard = standard_of(backend, k)
    codes, step = few.encode(backend.asarray(k), standard, bits)
    for token in {0, case.n - 1}:
        one, its = few.encode(backend.asarray(k[..., token : token + 1, :]), standard, bits)
        assert (np.asarray(one) == np.asarray(codes)[..., token : token + 1, :]).all()
        assert_same(backend.numpy(its), backend.numpy(step)[..., token : token + 1])


@given(case=cases(), bits=bits_of, centred=st.booleans())
def test_attention_from_codes_is_that_of_the_decoded_tokens(backend: Library, case: Case, bits: int, centred: bool):
    q, k, v = case.arrays()
    coded = coded_of(backend, k, v, bits, centred)
    mask = case.mask()
    scale = case.d**-0.5
    state, weights = few.attend_codes(backend.asarray(q), coded, scale=scale, mask=backend.asarray(mask))
    plain = [x.map(lambda y: backend.asarray(backend.numpy(y))) for x in (coded.key_standard, coded.value_standard)]
    exact = [
        backend.numpy(few.decode(c, backend.asarray(backend.numpy(s)), standard, bits))
        for c, s, standard in zip((coded.keys, coded.values), (coded.key_step, coded.value_step), plain, strict=True)
    ]
    oracle = attend(q.astype(np.float64), *exact, scale=scale, mask=mask)
    # Codes up to 2^bits are multiplied before the centre is taken off: each product is at most that many steps.
    u, group = unit(case.dtype), case.group
    reach, size = [], []
    for standard, step in ((coded.key_standard, coded.key_step), (coded.value_standard, coded.value_step)):
        deviation, own = backend.numpy(standard.deviation), backend.numpy(step)
        mean = 0 * deviation if standard.mean is None else backend.numpy(standard.mean)
        most = own.max(axis=-1, initial=0.0)[..., None] * deviation * 2.0**bits
        (reach if standard is coded.key_standard else size).append(np.abs(mean) + most)
    reach, size = (np.repeat(x[0], group, axis=-2) for x in (reach, size))
    eta = u * (case.d + 12) * scale * np.einsum("...hid,...hd->...hi", np.abs(q), reach)
    finite = np.where(np.isfinite(oracle.lse), np.abs(oracle.lse), 0.0)
    sums = case.n + 2 * FUNCTION + FUNCTION * np.log(max(case.n, 1))
    assert_within(backend.numpy(state.lse), oracle.lse, eta + u * (sums + finite))
    # Each component: weights move by tanh of what logits do, and the sum itself is rounded.
    moved = 2 * np.tanh(eta)[..., None] + u * (4 * case.n + 4 * FUNCTION + 16)
    assert_within(backend.numpy(state.out), oracle.out, moved * size[..., None, :] * 2)
    assert tuple(weights.shape) == (*case.lead, group, case.q_len, case.n)


@pytest.mark.parametrize("n", [1, 9, 10, 25])
def test_blocks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch, n: int):
    rng = np.random.default_rng(n)
    q, k, v = (rng.normal(size=(2, heads, m, 16)) for heads, m in ((4, 3), (2, n), (2, n)))
    standards = few.Standard.of(k), few.Standard.of(v)
    (keys, key_step), (values, value_step) = (
        few.encode(x, s, b) for x, s, b in zip((k, v), standards, (5, 4), strict=True)
    )
    coded = few.Coded((5, 4), keys, values, key_step, value_step, *standards)
    whole, weights = few.attend_codes(q, coded, scale=0.25)
    monkeypatch.setattr(attention, "BLOCK", 10)
    parts, same = few.attend_codes(q, coded, scale=0.25)
    np.testing.assert_allclose(parts.out, whole.out, rtol=0, atol=1e-13)
    np.testing.assert_allclose(same, weights, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bits", few.BITS)
@pytest.mark.parametrize("tokens", ["one", "equal", "constant channels", "zero"])
def test_what_does_not_vary_is_given_back(bits: int, tokens: str):
    x = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
    if tokens == "one":
        x = x[:, :1]
    if tokens == "equal":
        x[:] = x[:, :1]
    if tokens == "constant channels":
        x[..., ::2] = 300.0
    if tokens == "zero":
        x[:] = 0.0
    standard = few.Standard.of(x)
    assert (standard.deviation > 0).all()
    decoded = few.decode(*few.encode(x, standard, bits), standard, bits)
    varies = np.ptp(x, axis=1, keepdims=True) > 0
    # A constant channel lies at its mean, where the nearest levels are half a step away: of a least deviation.
    step = few.encode(x, standard, bits)[1].astype(np.float64)[..., None] * standard.deviation[:, None]
    assert (np.abs(decoded - x) <= step / 2 + 2.0**-22 * np.abs(x))[~np.broadcast_to(varies, x.shape)].all()
    if tokens != "constant channels":
        np.testing.assert_allclose(decoded, x, rtol=2.0**-22, atol=2.0**-15)


def test_values_near_zero_stay_there_where_the_standard_is_around_it():
    """As those of tokens are that are attended to for want of others."""
    x = 1 + np.random.default_rng(0).normal(size=(100, 8))
    x[7] *= 1e-3
    for centred, least, most in ((True, 1e-2, 1.0), (False, 0.0, 1e-3)):
        standard = few.Standard.of(x, centred=centred)
        off = few.decode(*few.encode(x, standard, 4), standard, 4)[7] - x[7]
        assert least <= np.abs(off).max() <= most


def test_padding_has_no_part_in_the_standard():
    x = np.random.default_rng(0).normal(size=(2, 6, 8))
    mask = np.arange(6) < np.asarray([[3], [0]])
    bad = np.where(mask[..., None], x, np.nan)
    standard, of_three = few.Standard.of(bad, mask), few.Standard.of(x[:1, :3])
    assert_same(standard.mean[0], of_three.mean[0])
    assert_same(standard.deviation[0], of_three.deviation[0])
    assert (standard.mean[1] == 0).all()
    assert (standard.deviation[1] == 1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_does_not_pass_for_one_that_is(bad: float):
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    standard = few.Standard.of(x)
    given = x.copy()
    given[1, 3] = bad
    codes, step = few.encode(given, standard, 4)
    decoded = few.decode(codes, step, standard, 4)
    assert np.isnan(decoded[1]).all()
    assert np.isfinite(decoded[[0, 2, 3]]).all()


def test_tokens_far_from_all_others_are_clipped_and_finite():
    x = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    standard = few.Standard.of(x)
    codes, step = few.encode(1e30 * x, standard, 4)
    assert (step == records.MOST).all()
    assert np.isfinite(few.decode(codes, step, standard, 4)).all()


def test_numbers_near_the_end_of_the_range_are_coded():
    x = np.random.default_rng(0).uniform(-1, 1, size=(9, 8)).astype(np.float32) * 1e38
    standard = few.Standard.of(x)
    assert np.isfinite(standard.deviation).all()
    decoded = few.decode(*few.encode(x, standard, 8), standard, 8)
    np.testing.assert_allclose(decoded, x, rtol=0, atol=2e36)


@pytest.mark.parametrize(
    "bits", [0, 1, 2, 7, 9, 32, 4.0, "four", "4", True, None, (4,), (4, 7), (4, 3, 3), (), [4, "3"]]
)
def test_other_bits_are_refused_by_name(bits: object):
    with pytest.raises(ValueError, match=r"bits is .*; use 3, 4, 5, 6, 8 or 16, two of 2, 3, 4, 5, 6, 8 and 16"):
        few.pair_of_bits(bits)


@pytest.mark.parametrize("bits", few.SPLIT)
def test_bits_of_keys_and_values_are_those_asked_for_on_average(bits: int):
    assert sum(few.pair_of_bits(bits)) == 2 * bits
    assert few.bits_from_text(few.bits_as_text(few.pair_of_bits(bits))) == few.pair_of_bits(bits)


@pytest.mark.parametrize(("bits", "levels"), [(3, 8), (4, 16)])
def test_all_levels_are_used(bits: int, levels: int):
    x = np.linspace(-1, 1, 4096)[:, None].reshape(1, 4096)
    standard = few.Standard(np.zeros(4096), np.ones(4096))
    decoded = few.decode(*few.encode(x, standard, bits), standard, bits)
    assert len(np.unique(decoded)) == levels

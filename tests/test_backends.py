"""One conformance suite: every backend, on every kind of array it takes, against the float64 oracle."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from corrections import correction
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library

from momentkv import Moments, attend
from momentkv.backends import BACKENDS, ArrayBackend, get_backend
from momentkv.testing import oracle
from momentkv.testing.rounding import (
    UNIT_BFLOAT16,
    StateError,
    assert_same,
    assert_within,
    attention_error,
    longest,
    merge_error,
    unit,
)
from momentkv.testing.strategies import MASKS, Case, cases, some_tokens
from momentkv.testing.tiers import lay_out


@dataclasses.dataclass(frozen=True)
class Subject:
    """A backend and the library whose arrays it is given."""

    backend: ArrayBackend
    library: Library

    def arrays(self, *xs: np.ndarray | None) -> list[object]:
        return [self.library.asarray(x) for x in xs]

    def with_blocks_of(self, queries: int) -> ArrayBackend:
        """The same backend, so that a few queries make several blocks."""
        return type("Small", (type(self.backend),), {"query_block": queries})()


PAIRS = [
    ("array-api", "numpy"),
    ("array-api", "array-api-strict"),
    ("array-api", "torch"),
    ("array-api", "jax"),
    ("numpy", "numpy"),
    ("torch", "torch"),
    ("jax", "jax"),
]


@pytest.fixture(scope="module", params=PAIRS, ids="-on-".join)
def subject(request: pytest.FixtureRequest) -> Subject:
    name, library = request.param
    return Subject(get_backend(name), LIBRARIES[library])


def weights_error(q: np.ndarray, k: np.ndarray, u: float, scale: float) -> np.ndarray:
    """A weight is an output whose values are bounded by one."""
    ones = np.ones((*k.shape[:-1], 1))
    return attention_error(q, k, ones, np.zeros(1), u, scale).out


def causal(case: Case, own: int, valid: np.ndarray | None) -> np.ndarray:
    """Mask (..., kv_head, group, own, n) of the last ``own`` queries, True where one may look."""
    mask = np.tril(np.ones((own, case.n), dtype=bool), case.n - own)
    mask = np.broadcast_to(mask, (*case.lead, case.group, own, case.n))
    return mask if valid is None else mask & valid[..., None, None, :]


@given(case=cases(masks=MASKS))
def test_attend_conforms(subject: Subject, case: Case):
    q, k, v = case.arrays()
    scale, u = case.factor(), unit(case.dtype)
    mask = case.mask()
    state, weights = subject.backend.attend(*subject.arrays(q, k, v), scale=scale, mask=subject.library.asarray(mask))
    exact = oracle.attend(q, k, v, scale, mask)
    error = attention_error(q, k, v, exact.lse, u, scale)
    assert_within(subject.library.numpy(state.out), exact.out, error.out)
    assert_within(subject.library.numpy(state.lse), exact.lse, error.lse)
    shape = (*case.lead, case.group, case.q_len, case.n)
    shares = oracle.softmax(oracle.logits(q, k, scale, mask))[0].reshape(shape)
    of_weights = weights_error(q, k, u, scale).reshape(*shape[:-1], 1)
    assert_within(subject.library.numpy(weights), shares, of_weights)
    assert subject.library.dtype(state.out) == subject.library.dtype(state.lse) == case.dtype
    # Inputs stay as they are, in-place arithmetic or not.
    assert_same(q, case.query())


@given(case=cases(n=some_tokens, masks=MASKS), own=st.integers(1, 12), block=st.integers(1, 5))
def test_attend_causal_and_prefill_conform(subject: Subject, case: Case, own: int, block: int):
    """For the queries of the last tokens, all at once and in blocks, with and without padding."""
    own = min(own, case.n)
    case = dataclasses.replace(case, q_len=own)
    q, k, v = case.arrays()
    scale, valid = case.factor(), case.token_mask()
    exact = oracle.attend(q, k, v, scale, causal(case, own, valid))
    error = attention_error(q, k, v, exact.lse, unit(case.dtype), scale)
    arrays = subject.arrays(q, k, v)
    for backend in (subject.backend, subject.with_blocks_of(block)):
        state = backend.attend_causal(*arrays, scale=scale, valid=subject.library.asarray(valid))
        assert_within(subject.library.numpy(state.out), exact.out, error.out)
        assert_within(subject.library.numpy(state.lse), exact.lse, error.lse)
        # The token axis is the last but one also for libraries that want a batch axis.
        if case.batch:
            out = backend.prefill(*arrays, scale=scale, valid=subject.library.asarray(valid))
            assert_within(subject.library.numpy(out), exact.out, error.out)
            assert subject.library.dtype(out) == case.dtype


@given(case=cases(), cut=st.integers(0, 12), order=st.sampled_from([0, 1]))
def test_correct_conforms(subject: Subject, case: Case, cut: int, order: int):
    kept, gone, exact, error = correction(case, cut, order)
    q, scale = subject.library.asarray(case.arrays()[0]), case.factor()
    retained = attend(q, *subject.arrays(*kept), scale=scale)
    moments = Moments.from_tokens(*subject.arrays(*gone))
    out = subject.backend.correct(retained, q, moments.expansion(order=order), scale=scale)
    assert_within(subject.library.numpy(out), exact.out, error.out)
    if case.n <= cut:  # nothing evicted: to the last bit
        assert_same(subject.library.numpy(out), subject.library.numpy(retained.out))


@st.composite
def layouts(draw: st.DrawFn, heads: int, n: int) -> dict[str, object]:
    """How many tokens of each head are retained, and how many slots there are beside: alike in all heads, or not."""
    number, more = st.integers(0, n), st.integers(0, 2)
    if draw(st.booleans()):
        width, spare = draw(number), draw(more)
        return {"widths": [width] * heads, "spare": [spare] * heads, "told": draw(st.booleans())}
    each = st.lists(number, min_size=heads, max_size=heads)
    return {"widths": draw(each), "spare": [draw(more) for _ in range(heads)], "told": draw(st.booleans())}


def stored_error(q: np.ndarray, k: np.ndarray, v: np.ndarray, u: float, scale: float) -> StateError:
    """Of attention to two sets that are merged; the lse of a part is at most the largest logit and log n from zero."""
    keys = oracle.to_query_heads(np.abs(oracle.f64(k)), q.shape[-3], -3)
    products = np.einsum("...hid,...hjd->...hij", np.abs(oracle.f64(q)), keys)
    reach = scale * products.max(axis=-1, initial=0.0) + math.log(max(k.shape[-2], 1))
    part = attention_error(q, k, v, reach, u, scale)
    size = oracle.to_query_heads(longest(v), q.shape[-3], -1)[..., None, None]
    return merge_error(part, part, size, reach, u)


@given(data=st.data(), case=cases(masks=("none", "tokens", "rows", "all")))
def test_attend_stored_conforms(subject: Subject, case: Case, data: st.DataObject):
    """Whatever the tiers, in heads alike or each of its own, with padding and with slots that hold no token."""
    q, k, v = case.arrays()
    scale, u, valid = case.factor(), unit(case.dtype), case.token_mask()
    stored = lay_out(k, v, valid=valid, **data.draw(layouts(case.kv_heads, case.n)))
    mask = None if valid is None else valid[..., None, None, :]
    exact, error = oracle.attend(q, k, v, scale, mask), stored_error(q, k, v, u, scale)
    tiers = stored.arrays(subject.library.asarray)
    for wanted in (False, True):
        state, weights = subject.backend.attend_stored(subject.library.asarray(q), tiers, scale=scale, weights=wanted)
        assert_within(subject.library.numpy(state.out), exact.out, error.out)
        assert_within(subject.library.numpy(state.lse), exact.lse, error.lse)
        assert (weights is not None) == wanted
    shape = (*case.lead, case.group, case.q_len, case.n)
    shares = oracle.softmax(oracle.logits(q, k, scale, mask))[0].reshape(shape)
    # A weight is an output whose values are bounded by one.
    of_weights = stored_error(q, k, np.ones((*k.shape[:-1], 1)), u, scale).out.reshape(*shape[:-1], 1)
    assert_within(subject.library.numpy(weights), stored.spread(shares), of_weights)


@given(
    data=st.data(),
    case=cases(masks=("none",)),
    cut=st.integers(0, 12),
    order=st.sampled_from([0, 1]),
    prepared=st.booleans(),
    weights=st.booleans(),
)
def test_decode_conforms(subject: Subject, case: Case, cut, order, prepared, weights, data: st.DataObject):
    """Of the first tokens, stored in tiers, and the moments of the others."""
    kept, gone, exact, error = correction(case, cut, order)
    q, scale, u = case.arrays()[0], case.factor(), unit(case.dtype)
    stored = lay_out(*kept, **data.draw(layouts(case.kv_heads, kept[0].shape[-2])))
    moments = Moments.from_tokens(*subject.arrays(*gone))
    expansion = moments.expansion(order=order)
    # The retained state is then one of two that are merged first.
    first = stored_error(q, *kept, u, scale)
    size = max(np.linalg.norm(x, axis=-1).max(initial=0.0) for x in (case.tokens()[1], exact.out))
    more = first.out + 2 * size * np.tanh(first.lse)[..., None]
    arguments = subject.library.asarray(q), stored.arrays(subject.library.asarray)
    given_expansion = subject.backend.prepare(expansion) if prepared else expansion
    out, of_stored = subject.backend.decode(*arguments, given_expansion, scale=scale, weights=weights)
    assert_within(subject.library.numpy(out), exact.out, error.out + more)
    plain, alone = subject.backend.decode(*arguments, None, scale=scale, weights=weights)
    retained = oracle.attend(q, *kept, scale)
    assert_within(subject.library.numpy(plain), retained.out, first.out)
    assert (of_stored is not None) == (alone is not None) == weights
    if weights:  # over the stored tokens alone
        assert_same(subject.library.numpy(of_stored), subject.library.numpy(alone))
        assert of_stored.shape == (*case.lead, case.group, case.q_len, stored.places.shape[-1])


SHAPES = st.tuples(st.sampled_from([(), (2,), (2, 3)]), st.integers(1, 9), st.integers(1, 3))


@given(shape=SHAPES, vectors=st.booleans(), seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float32", "int32"]))
def test_slots_in_a_row_are_written(subject: Subject, shape, vectors: bool, seed: int, dtype: str):
    (batch, n, d), rng = shape, np.random.default_rng(seed)
    last, axis = ((d,), -2) if vectors else ((), -1)
    count = int(rng.integers(0, n + 1))
    start = int(rng.integers(0, n - count + 1))
    x, new = (rng.integers(-9, 9, (*batch, m, *last)).astype(dtype) for m in (n, count))
    expected = x.copy()
    expected.reshape(*batch, n, -1)[..., start : start + count, :] = new.reshape(*batch, count, d if vectors else 1)
    given_new = subject.library.asarray(new)
    written = subject.backend.write_at(subject.library.asarray(x), start, given_new, axis=axis)
    assert_same(subject.library.numpy(written), subject.library.numpy(subject.library.asarray(expected)))
    assert_same(subject.library.numpy(given_new), subject.library.numpy(subject.library.asarray(new)))
    assert subject.library.dtype(written) == dtype


@given(shape=SHAPES, vectors=st.booleans(), seed=st.integers(0, 2**32 - 1), one=st.booleans())
def test_slots_of_each_row_are_written_but_negative_ones(subject: Subject, shape, vectors, seed: int, one: bool):
    """Of several; a single slot is always meant."""
    (batch, n, d), rng = shape, np.random.default_rng(seed)
    last, axis = ((d,), -2) if vectors else ((), -1)
    count = 1 if one else int(rng.integers(2, n + 3))
    places = rng.permuted(np.broadcast_to(np.arange(max(n, count)), (*batch, max(n, count))), axis=-1)[..., :count]
    index = np.where((places < n) & ((rng.random(places.shape) < 0.7) | one), places, -1 - places).astype(np.int32)
    x = rng.integers(-9, 9, (*batch, n, *last)).astype("float64")
    new = rng.integers(-9, 9, (*batch, count, *last)).astype("float32")
    expected = x.copy()
    for row in np.ndindex(batch):
        for j, slot in enumerate(index[row]):
            if slot >= 0:
                expected[row][slot] = new[row][j]
    arguments = subject.arrays(x, index, new)
    written = subject.backend.write(*arguments, axis=axis)
    assert_same(subject.library.numpy(written), expected)
    assert subject.library.dtype(written) == "float64"
    assert_same(subject.library.numpy(arguments[1]), index)
    assert_same(subject.library.numpy(arguments[2]), new.astype(np.float64))


def test_copies_share_no_memory_and_overwriting_takes_all(subject: Subject):
    rng = np.random.default_rng(0)
    x, new = (rng.standard_normal((2, 3, 4)) for _ in range(2))
    array = subject.library.asarray(x)
    copies = [subject.backend.copy(array), subject.backend.fixed(array)]
    part = subject.backend.copy(array[:1, :, :2])
    taken = subject.backend.overwrite(array, subject.library.asarray(new))
    assert_same(subject.library.numpy(taken), new)
    for copy in copies:
        assert_same(subject.library.numpy(copy), x)
    assert_same(subject.library.numpy(part), x[:1, :, :2])
    for same in (subject.backend.compact(taken[:, 1:, :]), subject.backend.detach(taken[:, 1:, :])):
        assert_same(subject.library.numpy(same), new[:, 1:])


def test_more_queries_than_a_block(subject: Subject):
    rng = np.random.default_rng(0)
    n = subject.backend.query_block + 3
    q, k, v = (rng.standard_normal((1, heads, n, 2)) for heads in (2, 1, 1))
    mask = np.tril(np.ones((n, n), dtype=bool))
    exact = oracle.attend(q, k, v, 0.5, mask)
    error = attention_error(q, k, v, exact.lse, unit(), 0.5)
    state = subject.backend.attend_causal(*subject.arrays(q, k, v), scale=0.5)
    assert_within(subject.library.numpy(state.out), exact.out, error.out)
    assert_within(subject.library.numpy(state.lse), exact.lse, error.lse)


@pytest.mark.parametrize("wide", [0, 1, 2])
def test_mixed_dtypes_give_the_wider_dtype(subject: Subject, wide: int):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 3, 4)).astype("float64" if i == wide else "float32") for i in range(3)]
    state, _ = subject.backend.attend(*subject.arrays(*arrays), scale=0.5)
    assert subject.library.dtype(state.out) == subject.library.dtype(state.lse) == "float64"
    exact = oracle.attend(*arrays, 0.5)
    error = attention_error(*arrays, exact.lse, unit("float32"), 0.5)
    assert_within(subject.library.numpy(state.out), exact.out, error.out)


@pytest.mark.parametrize("halves", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["array-api", "torch"])
@given(case=cases(masks=MASKS, laws=("gaussian", "ties", "heavy"), dtypes=("float32",)))
def test_half_precision_is_attended_in_float32(name: str, halves: str, case: Case):
    torch, backend = LIBRARIES["torch"], get_backend(name)
    q, k, v = (torch.asarray(np.clip(x, -1e3, 1e3), halves) for x in case.arrays())
    mask = torch.asarray(case.mask())
    low = backend.attend(q, k, v, scale=0.5, mask=mask)
    high = backend.attend(q.float(), k.float(), v.float(), scale=0.5, mask=mask)
    for one, other in zip((*low[0], low[1]), (*high[0], high[1]), strict=True):
        assert torch.dtype(one) == "float32"
        assert_same(torch.numpy(one), torch.numpy(other))


@given(case=cases(n=some_tokens, masks=MASKS, laws=("gaussian", "ties"), dtypes=("float32",)))
def test_bfloat16_prefill_errs_by_bfloat16_rounding(case: Case):
    """A fused kernel may round anything between to the input dtype, but nothing worse."""
    case = dataclasses.replace(case, q_len=case.n, batch=(2,))
    torch, valid = LIBRARIES["torch"], case.token_mask()
    arrays = [torch.asarray(x, "bfloat16") for x in case.arrays()]
    out = get_backend("torch").prefill(*arrays, scale=0.5, valid=torch.asarray(valid))
    q, k, v = (torch.numpy(x) for x in arrays)
    exact = oracle.attend(q, k, v, 0.5, causal(case, case.n, valid))
    assert torch.dtype(out) == "bfloat16"
    assert_within(torch.numpy(out), exact.out, attention_error(q, k, v, exact.lse, UNIT_BFLOAT16, 0.5).out)


def test_backend_is_chosen_by_array_name_or_object():
    chosen = {name: get_backend(library.asarray(np.zeros(1))).name for name, library in LIBRARIES.items()}
    assert chosen == {"numpy": "numpy", "array-api-strict": "array-api", "torch": "torch", "jax": "jax"}
    for name in BACKENDS:
        backend = get_backend(name)
        assert backend.name == name
        assert get_backend(name) is backend
        assert get_backend(backend) is backend

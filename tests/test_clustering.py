"""Parting weighted points into groups, and matrices into few directions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from libraries import Library

from momentkv._array import inverse_factor, leading_by_squaring, orthonormal_by_gram
from momentkv.statistics import clustering
from momentkv.statistics.clustering import SUBSPACE_STEPS, cluster, low_rank
from momentkv.testing.rounding import assert_same, assert_within, unit
from momentkv.testing.strategies import Case, cases, shape, some_tokens

group_numbers = shape(st.integers(1, 5), 3)


def labels(backend: Library, x: np.ndarray, weight: np.ndarray, groups: int) -> np.ndarray:
    """Group of each point; each is in exactly one."""
    member = backend.numpy(cluster(backend.asarray(x), backend.asarray(weight), groups))
    assert member.shape == (*x.shape[:-1], groups)
    assert ((member == 0) | (member == 1)).all()
    assert (member.sum(axis=-1) == 1).all()
    return member.argmax(axis=-1)


def same_group(label: np.ndarray) -> np.ndarray:
    return label[..., :, None] == label[..., None, :]


def squared_distances(x: np.ndarray) -> np.ndarray:
    return ((x[..., :, None, :] - x[..., None, :, :]) ** 2).sum(axis=-1)


def cost(x: np.ndarray, weight: np.ndarray, label: np.ndarray) -> float:
    """Weighted squared distance of the points of one head from the means of their groups."""
    total = 0.0
    for group in set(label.tolist()):
        part, w = x[label == group], weight[label == group]
        if w.sum() > 0:
            total += (w * ((part - w @ part / w.sum()) ** 2).sum(axis=-1)).sum()
    return total


def farthest_first(x: np.ndarray, weight: np.ndarray, groups: int) -> np.ndarray:
    """Groups around the points that are chosen first, without any step of Lloyd's."""
    chosen = [int(np.argmax(weight))]
    for _ in range(1, groups):
        near = squared_distances(x)[:, chosen].min(axis=-1)
        chosen.append(int(np.argmax(weight * near)))
    return squared_distances(x)[:, chosen].argmin(axis=-1)


@given(case=cases(n=some_tokens), extra=shape(st.integers(0, 2), 1))
def test_no_more_points_than_groups_are_all_told_apart(backend: Library, case: Case, extra: int):
    x, weight = case.tokens()[0], case.weights()
    same = same_group(labels(backend, x, weight, case.n + extra))
    # Distances from the mean are squared: they resolve what lies further apart than rounding of the largest one.
    centred = (x - x.mean(axis=-2, keepdims=True)).astype(np.float64)
    farthest = (centred**2).sum(axis=-1).max(axis=-1)[..., None, None]
    rounding = 4 * unit(case.dtype) * np.abs(x.astype(np.float64)).max(axis=(-2, -1))[..., None, None]
    distance = squared_distances(x.astype(np.float64))
    apart = distance > 64 * (case.d + 8) * (unit(case.dtype) * farthest + rounding**2)
    counts = (weight > 0)[..., :, None] & (weight > 0)[..., None, :]
    assert not (same & apart & counts).any()
    assert same[distance == 0].all()


@given(case=cases(n=some_tokens, laws=("gaussian", "huge"), dtypes=("float64",)), groups=group_numbers)
def test_points_of_weight_zero_have_no_say(backend: Library, case: Case, groups: int):
    x, weight = case.tokens()[0], case.weights()
    other = np.where((weight > 0)[..., None], x, 7 * case.rng(9).standard_normal(x.shape))
    for head in np.ndindex(case.lead):
        kept = weight[head] > 0
        if kept.any():
            alone = same_group(labels(backend, x[head][kept], weight[head][kept], groups))
            for points in (x, other):
                among = labels(backend, points[head], weight[head], groups)[kept]
                assert (same_group(among) == alone).all()


@given(case=cases(n=st.integers(6, 12), laws=("gaussian", "huge"), dtypes=("float64",)), groups=group_numbers)
def test_each_head_is_parted_as_if_alone_and_every_time_alike(backend: Library, case: Case, groups: int):
    x, weight = case.tokens()[0], case.weights()
    label = labels(backend, x, weight, groups)
    assert_same(labels(backend, x, weight, groups), label)
    for head in np.ndindex(case.lead):
        assert_same(labels(backend, x[head], weight[head], groups), label[head])


@given(case=cases(n=st.integers(6, 12), laws=("gaussian", "huge"), dtypes=("float64",)), groups=group_numbers)
def test_groups_are_at_least_as_tight_as_those_around_the_first_choice(backend: Library, case: Case, groups: int):
    """No step of Lloyd's raises the cost."""
    x, weight = case.tokens()[0], case.weights()
    label = labels(backend, x, weight, groups)
    for head in np.ndindex(case.lead):
        own, other = (
            cost(x[head], weight[head], y) for y in (label[head], farthest_first(x[head], weight[head], groups))
        )
        assert own <= other * (1 + 64 * case.n * unit()) + 64 * unit() * (weight[head] @ (x[head] ** 2).sum(-1))


def test_steps_of_lloyd_tighten_the_groups(backend: Library):
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((200, 3)), np.exp(rng.standard_normal(200))
    # Optimal one-dimensional parts of a Gaussian gain tens of percent over ones around extreme points.
    assert cost(x, weight, labels(backend, x, weight, 6)) < 0.9 * cost(x, weight, farthest_first(x, weight, 6))


def test_separate_clouds_are_found(backend: Library):
    rng = np.random.default_rng(0)
    cloud = rng.integers(0, 5, 300)
    x = 1e3 + 100 * np.eye(5)[cloud] + rng.standard_normal((300, 5))
    weight = np.exp(rng.standard_normal(300))
    assert (same_group(labels(backend, x, weight, 5)) == same_group(cloud)).all()


def test_points_far_from_zero_are_told_apart_in_float32(backend: Library):
    """Keys have large means; |x|^2 = 1e8 in float32 resolves 6, a distance of 1 is far less."""
    rng = np.random.default_rng(0)
    x = (1e4 + rng.integers(-2, 3, (8, 4))).astype(np.float32)
    assert (same_group(labels(backend, x, np.ones(8, np.float32), 8)) == (squared_distances(x) == 0)).all()


def separated(shape: tuple[int, int], seed: int, ratio: float = 4.0) -> np.ndarray:
    """A matrix whose singular values fall by a ratio."""
    rng = np.random.default_rng(seed)
    size = min(shape)
    u, v = (np.linalg.qr(rng.standard_normal((n, size)))[0] for n in shape)
    return (u * ratio ** -np.arange(size)) @ v.T


def product(backend: Library, matrix: np.ndarray, deviation: np.ndarray, rank: int) -> np.ndarray:
    left, right = low_rank(backend.asarray(matrix), backend.asarray(deviation), rank)
    assert left.shape == (*matrix.shape[:-1], rank)
    assert right.shape == (*matrix.shape[:-2], rank, matrix.shape[-1])
    return backend.numpy(left) @ backend.numpy(right)


def truncated(matrix: np.ndarray, deviation: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation, by a singular value decomposition."""
    u, _, _ = np.linalg.svd(matrix * deviation[..., None, :], full_matrices=False)
    return u[..., :rank] @ (np.swapaxes(u[..., :rank], -1, -2) @ matrix)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (7, 3), (20, 24), (40, 16)])
@given(rank=st.integers(1, 3), seed=st.integers(0, 2**32 - 1))
def test_low_rank_is_the_truncated_decomposition_of_separated_values(
    backend: Library, shape: tuple[int, int], rank: int, seed: int
):
    """Subspace iteration errs by (4^-5)^7 < 1e-21; the squared values of the last step by u kappa^2 = u 16^rank."""
    rank = min(rank, *shape)
    deviation = np.exp(np.random.default_rng(seed).standard_normal(shape[1]))
    matrix = separated(shape, seed) / deviation
    error = 100 * sum(shape) * unit() * 16.0**rank
    actual = product(backend, matrix, deviation, rank) * deviation
    assert_within(actual, truncated(matrix, deviation, rank) * deviation, error)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (24, 30)])
@given(rank=st.integers(1, 4), less=st.integers(0, 3), seed=st.integers(0, 2**32 - 1))
def test_low_rank_is_exact_for_matrices_of_such_a_rank(
    backend: Library, shape: tuple[int, int], rank: int, less: int, seed: int
):
    inner, rng = max(rank - less, 1), np.random.default_rng(seed)
    deviation = rng.uniform(0.5, 2.0, (2, shape[1]))
    matrix = rng.standard_normal((2, shape[0], inner)) @ rng.standard_normal((2, inner, shape[1]))
    values = np.linalg.svd(matrix * deviation[:, None, :], compute_uv=False)
    error = 100 * sum(shape) * unit() * (values[:, :1] / values[:, inner - 1 : inner]) ** 2 * values[:, :1]
    assert_within(product(backend, matrix, deviation, rank), matrix, 2 * error[..., None])


@given(rank=st.integers(1, 4), seed=st.integers(0, 2**32 - 1))
def test_low_rank_is_not_far_from_the_best_where_values_are_not_separated(backend: Library, rank: int, seed: int):
    """Halko et al., corollary 10.10 and section 9.4, for 4 more directions and 3 steps (exponent 1/7)."""
    shape = (32, 40)
    rng = np.random.default_rng(seed)
    matrix, deviation = rng.standard_normal(shape), np.ones(shape[1])
    best = np.linalg.svd(matrix, compute_uv=False)[rank]
    rest = min(shape) - rank
    factor = 1 + np.sqrt(rank / 3) + np.e * np.sqrt(rank + 4) / 4 * np.sqrt(rest)
    error = np.linalg.norm(matrix - product(backend, matrix, deviation, rank), 2)
    assert best * (1 - 1e-12) <= error <= (1 + factor ** (1 / (2 * SUBSPACE_STEPS + 1))) * best


def test_low_rank_spends_its_directions_where_inputs_vary(backend: Library):
    matrix = np.diag([10.0, 1.0, 0.1])
    kept = product(backend, matrix, np.array([0.01, 1.0, 1.0]), 1)
    assert_within(kept, np.diag([0.0, 1.0, 0.0]), 100 * unit() * 10)


def test_low_rank_of_nothing_is_nothing(backend: Library):
    assert (product(backend, np.zeros((2, 5, 4)), np.zeros((2, 4)), 2) == 0).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-15, 1.0, 1e15]))
def test_columns_are_orthonormal_by_their_products_as_by_reflections(dtype: type, seed: int, size: float):
    """What stands in for QR on a GPU, for columns whose lengths and angles span seven orders of magnitude."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 40, 6)) * np.logspace(0, -4, 6) @ (np.eye(6) + rng.standard_normal((6, 6)))
    x = torch.asarray((size * x).astype(dtype))
    x[1] = 0
    x[2, 0, 0] = np.nan
    made = orthonormal_by_gram(x)
    assert made.dtype == x.dtype
    assert (made[1] == 0).all()
    span, exact = made[0].double().numpy(), np.linalg.qr(x[0].double().numpy())[0]
    values = np.linalg.svd(x[0].double().numpy(), compute_uv=False)
    # What is added to the diagonal, and rounding of the products, over the least of the columns' own energy.
    of_least = 100 * 6e-15 * (values[0] / values[-1]) ** 2
    assert_within(span.T @ span, np.eye(6), 100 * float(np.finfo(dtype).eps) + of_least)
    # The leading ones, whose energy counts, to rounding.
    assert_within(np.abs(exact[:, :2].T @ span[:, :2]), np.eye(2), 1e-5)


@given(seed=st.integers(0, 2**32 - 1))
def test_a_few_directions_are_the_same_whichever_way_columns_are_made_orthonormal(seed: int):
    torch = pytest.importorskip("torch")
    matrix = torch.asarray(separated((40, 32), seed), dtype=torch.float32)
    deviation = torch.ones(32)
    left, right = low_rank(matrix, deviation, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clustering, "orthonormal", orthonormal_by_gram)
        patch.setattr(clustering, "leading", leading_by_squaring)
        other_left, other_right = low_rank(matrix, deviation, 2)
    scale = float(matrix.abs().max())
    assert_within((left @ right).numpy(), (other_left @ other_right).numpy(), 1e-3 * scale)


@given(number=st.integers(1, 6), seed=st.integers(0, 2**32 - 1), size=st.sampled_from([1e-30, 1.0, 1e30]))
def test_leading_directions_by_squaring_hold_as_much_as_those_of_a_decomposition(number: int, seed: int, size: float):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    half = rng.standard_normal((3, 6, 6)) * np.logspace(0, -rng.integers(0, 3), 6)
    half[1] = 0
    half[2, :, 1:] = 0
    matrix = half @ np.swapaxes(half, -1, -2)
    made = leading_by_squaring(torch.asarray(size * matrix), number).numpy()
    assert (made[1] == 0).all()
    held = np.trace(np.swapaxes(made, -1, -2) @ matrix @ made, axis1=-2, axis2=-1)
    best = np.sort(np.linalg.eigvalsh(matrix), axis=-1)[:, ::-1][:, :number].sum(axis=-1)
    # Eigenvalues that 2 ** SQUARINGS squarings do not tell apart differ by less than a part in 2 ** SQUARINGS.
    assert (held >= best * (1 - 2.0**-7) - 1e-12).all()
    assert (held <= best * (1 + 1e-9) + 1e-12).all()
    own = np.swapaxes(made[0], -1, -2) @ made[0]
    assert_within(own, np.eye(number), 1e-6)


@pytest.mark.parametrize("library", ["numpy", "torch"])
@given(seed=st.integers(0, 2**32 - 1), d=st.sampled_from([1, 2, 7, 32]))
def test_factors_of_inverses_are_factors_of_inverses(library: str, seed: int, d: int):
    """By the ridge, condition numbers are at most a thousand times the dimension."""
    off = np.random.default_rng(seed).standard_normal((2, 5 * d, d)) * np.logspace(0, -3, d)
    matrix = np.swapaxes(off, -1, -2) @ off
    matrix += 1e-3 * (np.trace(matrix, axis1=-2, axis2=-1) / d)[:, None, None] * np.eye(d)
    given_one = matrix if library == "numpy" else pytest.importorskip("torch").asarray(matrix)
    factor = np.asarray(inverse_factor(given_one))
    np.testing.assert_array_equal(factor, np.tril(factor))
    condition = float(np.linalg.cond(matrix).max())
    made = np.swapaxes(factor, -1, -2) @ factor
    assert_within(made @ matrix, np.broadcast_to(np.eye(d), made.shape), 10 * d * 2.0**-52 * condition)

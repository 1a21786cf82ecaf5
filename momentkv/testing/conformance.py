"""Conformance of a backend, an array library or a policy, by one call each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from momentkv import bounds, correction
from momentkv._numbers import whole_number
from momentkv.attention import AttentionState
from momentkv.backends import ArrayBackend, get_backend
from momentkv.bounds.rounding import attention_error
from momentkv.cache.layer import LayerCache
from momentkv.policies import Policy, Tokens, get_policy
from momentkv.statistics.moments import Moments
from momentkv.testing.adversaries import Batch, draw
from momentkv.testing.tiers import lay_out
from momentkv.testing.truth import LONG, Truth

__all__ = ["check_backend", "check_library", "check_policy"]

Floats = NDArray[Any]
HEADS = 40
FEW_HEADS = 3


def norm(x: Floats) -> Floats:
    """Euclidean length along the last axis."""
    return np.sqrt((x * x).sum(axis=-1))


def check_backend(
    backend: str | ArrayBackend,
    *,
    asarray: Callable[[Floats], Any] = np.asarray,
    asnumpy: Callable[[Any], Floats] = np.asarray,
    dtypes: Sequence[str] = ("float64", "float32"),
    batches: int = 40,
    seed: int = 0,
) -> int:
    """Check a backend's primitives on adversarial cases against attention in extended precision.

    Parameters
    ----------
    backend : str or ArrayBackend
    asarray, asnumpy : callable
        From NumPy to the arrays that the backend takes, and back.
    dtypes : sequence of str
        Of the inputs.
    batches, seed : int
        Batches of 40 cases, at least 1, and the seed that they are drawn by.

    Returns
    -------
    int
        Cases checked.

    Raises
    ------
    AssertionError
        Naming the primitive, the case's seed and by how much it errs beyond rounding.
    ValueError
        If ``batches`` is below 1, with which nothing would be checked.

    Notes
    -----
    Tolerances are those of `momentkv.bounds.rounding`, twice for what fused kernels may add up in another way.

    Examples
    --------
    >>> check_backend("numpy", batches=2)
    80
    """
    subject = get_backend(backend)
    check_batches(batches)
    for index in range(batches):
        rng = np.random.default_rng([seed, index])
        batch = draw(rng, HEADS, dtype=dtypes[index % len(dtypes)])
        _check_attend(subject, batch, asarray, asnumpy, f"batch {index} of seed {seed}")
        _check_correct(subject, batch, rng, asarray, asnumpy, f"batch {index} of seed {seed}")
        if index % 3 == 0:  # of shapes that are hardly ever the same, which some libraries compile anew
            _check_stored(subject, batch, rng, asarray, asnumpy, f"batch {index} of seed {seed}")
        _check_writes(subject, rng, asarray, asnumpy, f"batch {index} of seed {seed}")
    return batches * HEADS


def check_batches(batches: int) -> None:
    """Raise unless there is something to check."""
    if whole_number("batches", batches) < 1:
        raise ValueError(f"batches is {batches}; use at least 1, for fewer check nothing")


def _check_attend(
    backend: ArrayBackend, batch: Batch, asarray: Callable[..., Any], asnumpy: Callable[..., Any], where: str
) -> None:
    unit_batch = Batch(batch.q, batch.k, batch.v, np.ones_like(batch.w), batch.scale, batch.dtype, True)
    truth = Truth.of(unit_batch)
    q, k, v = (asarray(x[None]) for x in (batch.q, batch.k, batch.v))
    n, d = batch.k.shape[-2:]
    u = float(np.finfo(batch.dtype).eps) / 2
    longest_k, longest_v = (norm(x.astype(LONG)).max(axis=-1) for x in (batch.k, batch.v))
    of_out, of_lse = attention_error(norm(truth.query), longest_k, longest_v, truth.lse, n=n, d=d, u=2 * u)
    state, weights = backend.attend(q, k, v, scale=batch.scale)
    causal = backend.attend_causal(q, k, v, scale=batch.scale)
    prefill = backend.prefill(q, k, v, scale=batch.scale)
    for name, out in (("attend", state.out), ("attend_causal", causal.out), ("prefill", prefill)):
        _within(norm(asnumpy(out)[0, :, 0] - truth.value), of_out + truth.value_error, f"{name}: output, {where}")
    for name, lse in (("attend", state.lse), ("attend_causal", causal.lse)):
        _within(np.abs(asnumpy(lse)[0, :, 0] - truth.lse), of_lse + truth.mass_slack(), f"{name}: lse, {where}")
    shares = truth.share * np.exp(truth.x - truth.kappa[:, None])
    off = np.abs(asnumpy(weights)[0, :, 0, 0] - shares).max(axis=-1)
    _within(off, 2 * np.tanh(of_lse) + 2 * u * (2 * n + 20) + truth.mass_slack(), f"attend: weights, {where}")


def _check_correct(
    backend: ArrayBackend,
    batch: Batch,
    rng: np.random.Generator,
    asarray: Callable[..., Any],
    asnumpy: Callable[..., Any],
    where: str,
) -> None:
    """The backend's correction lies within the certificate that exact arithmetic gives it around its own formula."""
    q, k, v = (asarray(x[None]) for x in (batch.q, batch.k, batch.v))
    truth = Truth.of(batch)
    moments = Moments.from_tokens(k, v, weights=asarray(batch.w[None]), extent=True)
    out = (truth.value_mean + rng.standard_normal(truth.value.shape)).astype(batch.dtype)
    lse = (truth.lse + rng.standard_normal(truth.lse.shape)).astype(batch.dtype)
    retained = AttentionState(asarray(out[None, :, None]), asarray(lse[None, :, None]))
    for order in (0, 1):
        got = asnumpy(backend.correct(retained, q, moments.expansion(order=order), scale=batch.scale))[0, :, 0]
        share = 1 / (1 + np.exp(np.clip(lse - truth.base, -1000, 1000)))[:, None]
        exact = out + share * (truth.value_mean + order * truth.slope - out)
        reading = bounds.read(q, moments, scale=batch.scale)
        base, tail, mean = (asnumpy(x)[0, :, 0] for x in (reading.base_error, reading.tail, reading.value_error))
        u = float(np.finfo(batch.dtype).eps) / 2
        size = norm(out) + norm(truth.value_mean) + norm(truth.slope)
        error = 2 * size * np.tanh(base / 2 + u * (32 + np.abs(lse))) + tail + mean + 64 * u * size + truth.value_error
        _within(norm(got - exact), error + truth.tail, f"correct, order {order}, {where}")
    empty = Moments.empty(k, v)
    got = asnumpy(backend.correct(retained, q, empty.expansion(), scale=batch.scale))[0, :, 0]
    if not (got == out).all():
        raise AssertionError(f"correct: changes the retained output where nothing was evicted, {where}")


def _check_stored(
    backend: ArrayBackend,
    batch: Batch,
    rng: np.random.Generator,
    asarray: Callable[..., Any],
    asnumpy: Callable[..., Any],
    where: str,
) -> None:
    """Stored tokens give the same attention and correction in tiers, however they lie there, as in one array."""
    # A few of the heads: backends may take heads of different numbers one by one.
    queries, k, v, w = (x[:FEW_HEADS] for x in (batch.q, batch.k, batch.v, np.ones_like(batch.w)))
    truth = Truth.of(Batch(queries, k, v, w, batch.scale, batch.dtype, True))
    (heads, n, d), u = k.shape, float(np.finfo(batch.dtype).eps)
    draws = 1 if rng.random() < 0.5 else heads  # one for all heads, or one for each
    widths, spare = (rng.integers(0, most, draws).tolist() * (heads // draws) for most in (n + 1, 3))
    stored = lay_out(k[None], v[None], widths, spare=spare, told=bool(rng.random() < 0.5))
    q, tiers = asarray(queries[None]), stored.arrays(asarray)
    longest_k, longest_v = (norm(x.astype(LONG)).max(axis=-1) for x in (k, v))
    # No lse of a part is further from zero than the largest logit and log n.
    reach = norm(truth.query) * longest_k + np.log(n)
    part_out, part_lse = attention_error(norm(truth.query), longest_k, longest_v, reach, n=n, d=d, u=u)
    of_lse = 2 * part_lse + u * (32 + reach) + truth.mass_slack()
    of_out = 2 * part_out + 2 * longest_v * (np.tanh(of_lse) + 32 * u) + truth.value_error
    shares = np.broadcast_to((truth.share * np.exp(truth.x - truth.kappa[:, None]))[:, None, None], (heads, 1, 1, n))
    # By turns, for a library may compile every call anew.
    wanted = bool(rng.random() < 0.5)
    state, weights = backend.attend_stored(q, tiers, scale=batch.scale, weights=wanted)
    out, of_stored = backend.decode(q, tiers, None, scale=batch.scale, weights=wanted)
    for name, got in (("attend_stored", state.out), ("decode", out)):
        _within(norm(asnumpy(got)[0, :, 0] - truth.value), of_out, f"{name}: output, {where}")
    _within(np.abs(asnumpy(state.lse)[0, :, 0] - truth.lse), of_lse, f"attend_stored: lse, {where}")
    for name, got in (("attend_stored", weights), ("decode", of_stored)):
        if (got is not None) != wanted:
            raise AssertionError(f"{name}: weights={wanted}, but it returned {type(got).__name__}, {where}")
        if got is not None:
            off = np.abs(asnumpy(got)[0] - stored.spread(shares)).max(axis=(-3, -2, -1))
            _within(off, 2 * np.tanh(of_lse) + u * (2 * n + 64), f"{name}: weights, {where}")
    expansion = Moments.from_tokens(*(asarray(x[None]) for x in (k, v))).expansion(order=1)
    plain = backend.correct(state, q, expansion, scale=batch.scale)
    size = 2 * longest_v + norm(truth.slope)
    # The same two states merged by another way; each has the error of its own products.
    error = 2 * of_out + 4 * size * np.tanh(of_lse + u * (d + 32) * (1 + reach)) + u * (d + 32) * (1 + reach) * size
    prepared = backend.prepare(expansion)
    for given in (expansion,) if prepared is expansion else (expansion, prepared):
        out, _ = backend.decode(q, tiers, given, scale=batch.scale)
        _within(norm(asnumpy(out) - asnumpy(plain))[0, :, 0], error, f"decode: corrected output, {where}")


def _check_writes(
    backend: ArrayBackend,
    rng: np.random.Generator,
    asarray: Callable[..., Any],
    asnumpy: Callable[..., Any],
    where: str,
) -> None:
    """Slots are written where they are meant, and nowhere else; copies are copies."""
    n, count = 7, int(rng.integers(1, 8))
    start = int(rng.integers(0, n - count + 1))
    index = rng.permuted(np.broadcast_to(np.arange(n, dtype=np.int32), (2, 3, n)), axis=-1)[..., :count]
    if count > 1:
        index = np.where(rng.random(index.shape) < 0.3, np.int32(-1), index)
    for axis, last in ((-1, ()), (-2, (4,))):
        x, new = (rng.standard_normal((2, 3, m, *last)).astype(np.float32) for m in (n, count))
        in_a_row, one_by_one = x.copy(), x.copy()
        in_a_row[:, :, start : start + count] = new
        rows = np.nonzero(index >= 0)
        one_by_one[(*rows[:-1], index[rows])] = new[rows]
        written = (
            ("write_at", backend.write_at(asarray(x.copy()), start, asarray(new), axis=axis), in_a_row),
            ("write", backend.write(asarray(x.copy()), asarray(index), asarray(new), axis=axis), one_by_one),
            ("overwrite", backend.overwrite(asarray(x.copy()), asarray(x + 1)), x + 1),
            ("overwrite_all", backend.overwrite_all([asarray(x.copy())], [asarray(x + 1)])[0], x + 1),
            *(
                ("split", part, y)
                for copy in (False, True)
                for part, y in zip(
                    backend.split(asarray(x), (2, 0, 1), axis=1, copy=copy),
                    (x[:, :2], x[:, 2:2], x[:, 2:]),
                    strict=True,
                )
            ),
        )
        for name, got, expected in written:
            if not (asnumpy(got) == expected).all():
                raise AssertionError(f"{name}: other slots, or other numbers, are written than asked for, {where}")
        first = asarray(x.copy())
        copies = [("copy", backend.copy(first)), ("fixed", backend.fixed(first))]
        copies += [("split", *backend.split(first, [3], axis=1, copy=True))]
        backend.write_at(first, 0, asarray(new), axis=axis)
        for name, got in (*copies, ("compact", backend.compact(asarray(x))), ("detach", backend.detach(asarray(x)))):
            if not (asnumpy(got) == x).all():
                raise AssertionError(f"{name}: it gives other numbers, or is written to with its argument, {where}")


def _within(off: Floats, error: Floats, what: str) -> None:
    if not bool((off <= error).all()):
        worst = int(np.argmax(np.where(off <= error, 0, off / np.maximum(error, 1e-300))))
        raise AssertionError(
            f"{what}: head {worst} errs by {off[worst]:.3g} where rounding explains {error[worst]:.3g}"
        )


def check_library(
    asarray: Callable[[Floats], Any],
    asnumpy: Callable[[Any], Floats],
    *,
    dtypes: Sequence[str] = ("float64", "float32"),
    batches: int = 20,
    seed: int = 0,
) -> int:
    """Check moments, estimates and certificates on the arrays of a library; arguments as in `check_backend`.

    Raises
    ------
    AssertionError
        If a certificate is violated or not finite.
    ValueError
        If ``batches`` is below 1.

    Examples
    --------
    >>> check_library(np.asarray, np.asarray, batches=2)
    80
    """
    check_batches(batches)
    for index in range(batches):
        rng = np.random.default_rng([seed, index])
        batch = draw(rng, HEADS, dtype=dtypes[index % len(dtypes)])
        truth, where = Truth.of(batch), f"batch {index} of seed {seed}"
        q, k, v, w = (asarray(x[None]) for x in (batch.q, batch.k, batch.v, batch.w))
        half = batch.k.shape[-2] // 2
        moments = Moments.from_tokens(
            k[..., :half, :], v[..., :half, :], weights=w[..., :half], order=2, extent=True
        ).update(k[..., half:, :], v[..., half:, :], weights=w[..., half:])
        low, high = (asnumpy(x)[0, :, 0] for x in bounds.lse_interval(q, moments, scale=batch.scale))
        _within(truth.lse, high + truth.mass_slack(), f"lse_interval: upper end, {where}")
        _within(low.astype(LONG), truth.lse + truth.mass_slack(), f"lse_interval: lower end, {where}")
        guess = correction.estimate(q, moments, scale=batch.scale).out
        bound = asnumpy(bounds.value_error(q, moments, guess, scale=batch.scale))[0, :, 0]
        _within(norm(truth.value - asnumpy(guess)[0, :, 0]), bound + truth.value_error, f"value_error, {where}")
        if not np.isfinite(bound).all():
            raise AssertionError(f"value_error: not finite, {where}")
    return batches * HEADS


def check_policy(
    policy: str | Policy,
    *,
    asarray: Callable[[Floats], Any] = np.asarray,
    asnumpy: Callable[[Any], Floats] = np.asarray,
) -> None:
    """Check what every eviction policy must keep to, by running it in a cache.

    The ranking has one finite number a stored token; it is the same when asked twice and changes nothing; what padding
    holds does not matter; the budget holds, sinks and window stay, and no token is lost or counted twice; rows of a
    batch do not feel each other.

    Raises
    ------
    AssertionError
        Naming the law that is broken.

    Examples
    --------
    >>> check_policy("snapkv")
    """
    chosen = get_policy(policy)
    rng = np.random.default_rng(0)
    sizes: dict[str, Any] = {"budget": 24, "sinks": 2, "window": 8, "block": 4}
    q, k, v = (rng.standard_normal((2, heads, 60, 8)) for heads in (4, 2, 2))
    valid = np.ones((2, 1, 60), dtype=bool)
    valid[1, :, :9] = False

    def run(k: Floats, v: Floats, rows: slice, padding: Floats) -> LayerCache:
        cache = LayerCache(policy=chosen, **sizes)
        cache.step(*(asarray(x[rows]) for x in (q, k, v)), valid=asarray(padding[rows]))
        for _ in range(9):
            step = [asarray(x[rows, :, -1:]) for x in (q, k, v)]
            cache.step(*step)
        return cache

    both = slice(0, 2)
    cache = run(k, v, both, valid)
    name = chosen.name or type(chosen).__name__
    before = {key: asnumpy(x).copy() for key, x in cache.arrays().items()}
    one, two = (asnumpy(cache.importance()) for _ in range(2))
    positions = asnumpy(cache.positions)
    held = positions >= 0
    if one.shape != positions.shape or not np.isfinite(one[held]).all():
        raise AssertionError(f"{name}: importance must be one finite number for every stored token")
    if not (one[held] == two[held]).all():
        raise AssertionError(f"{name}: importance differs when asked twice")
    if any((asnumpy(x) != before[key]).any() for key, x in cache.arrays().items()):
        raise AssertionError(f"{name}: importance changes the cache")
    count = asnumpy(cache.moments.weight) + held.sum(axis=-1)
    if not (count == np.asarray([[69.0], [60.0]])).all():
        raise AssertionError(f"{name}: tokens are lost or counted twice: {count.tolist()}")
    if (held.sum(axis=-1) >= sizes["budget"] + sizes["block"]).any():
        raise AssertionError(f"{name}: more than the budget and a block is stored")
    for row, start in enumerate((0, 9)):
        for head in range(2):
            slots = set(positions[row, head].tolist())
            if not {start, start + 1, *range(61, 69)} <= slots:
                raise AssertionError(f"{name}: sinks or window are gone in row {row}, head {head}")
    bad_k, bad_v = (np.where(valid[..., None], x, 1e30) for x in (k, v))
    other = run(bad_k, bad_v, both, valid)
    if (asnumpy(other.positions) != positions).any():
        raise AssertionError(f"{name}: what padding holds changes what is retained")
    # A cache gives padding no slot, but heads of a layer may hold fewer tokens than others: slots without a token.
    places = np.broadcast_to(np.where(valid, np.arange(60), -1), (2, 2, 60))
    shown = np.where(places >= 0, rng.random((2, 2, 60)), 0.0)
    known = cache.config.correction.exact.known(cache.moments)
    mean, variance = (asarray(x) for x in (rng.standard_normal((2, 2, 8)), rng.uniform(0.5, 2.0, (2, 2, 8))))
    rankings = []
    for own_k, own_v in ((k, v), (bad_k, bad_v)):
        keys, values, slots_of, seen = (asarray(x) for x in (own_k, own_v, places, shown))
        tokens = Tokens(keys, values, slots_of, seen, known, 0.35, mean, variance)
        rankings.append(asnumpy(chosen.importance(tokens)))
    clean, dirty = (x[places >= 0] for x in rankings)
    if not np.allclose(clean, dirty, rtol=1e-9, atol=0.0):
        raise AssertionError(f"{name}: what slots without a token hold changes the ranking")
    alone = run(k, v, slice(0, 1), valid)
    mine = asnumpy(alone.positions)[0]
    if [sorted(x[x >= 0].tolist()) for x in mine] != [sorted(x[x >= 0].tolist()) for x in positions[0]]:
        raise AssertionError(f"{name}: a row's selection depends on the other rows of the batch")

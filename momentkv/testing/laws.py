"""Every bound and law as a check of a batch: where it fails, and how tight it is.

Theorems are checked in extended precision, where rounding of the check itself hardly counts; certificates are checked
in float64 and float32 with the rounding that they account for themselves and no tolerance besides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from momentkv import attention, bounds, correction
from momentkv.attention import AttentionState
from momentkv.bounds import functions, rounding
from momentkv.bounds.theorems import Interval
from momentkv.codes import BITS, Standard, encode, less_centre, unpacked
from momentkv.statistics.moments import Moments
from momentkv.testing.adversaries import Batch
from momentkv.testing.truth import LONG, UNIT, Floats, Outcome, Truth, above, norm

__all__ = ["CHECKS", "check"]


def check_b1(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B1."""
    k = batch.k.astype(LONG)
    centre = k[:, 0] + rng.choice([0.0, 1.0]) * rng.standard_normal(k[:, 0].shape)
    radius = norm(k - centre[:, None]).max(axis=-1)
    moved = (t.query * (centre - t.key_mean)).sum(axis=-1)
    low, high = bounds.range_from_anchor(moved, norm(t.query), radius)
    size = t.eta + 64 * UNIT * (norm(t.query) * (radius + norm(centre)))
    both = [above(t.x.max(axis=-1), high, size), above(-t.x.min(axis=-1), -low, size)]
    return Outcome(both[0].violated | both[1].violated, both[0].tightness)


def check_b2(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B2."""
    _, high = bounds.range_from_deviation(t.spread.high, t.weight / batch.w.astype(LONG).min(axis=-1))
    n = t.x.shape[-1]
    return above(np.abs(t.x).max(axis=-1), high, t.eta + UNIT * (n + 32) * high)


def check_b3(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B3."""
    return above(t.kappa, bounds.mass_from_range(t.logits).high, t.mass_slack())


def check_b4_upper(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B4, upper end."""
    return above(t.kappa, bounds.mass_from_variance(t.logits, t.spread).high, t.mass_slack())


def check_b4_lower(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B4, lower end."""
    return above(bounds.mass_from_variance(t.logits, t.spread).low, t.kappa, t.mass_slack())


def mass_of(t: Truth) -> Interval:
    """Interval of the mass as the theorems give it, widened by rounding."""
    low, high = bounds.mass_from_variance(t.logits, t.spread)
    return Interval(np.maximum(low - t.mass_slack(), 0), high + t.mass_slack())


def offsets(t: Truth, rng: np.random.Generator) -> Floats:
    """An estimate of the value, from its mean: order 0, order 1, faded order 1, or anything."""
    kind = rng.integers(4, size=len(t.kappa))[:, None]
    any_vector = t.radius[:, None] * rng.standard_normal(t.slope.shape)
    faded = np.exp(-np.minimum(t.deviation**2 / 2, 50))[:, None] * t.slope
    return np.select([kind == 0, kind == 1, kind == 2], [0 * t.slope, t.slope, faded], any_vector)


def value_slack(t: Truth, offset: Floats) -> Floats:
    """Rounding of the true value, and of its bounds in extended precision."""
    return t.value_error + UNIT * 256 * (t.radius + norm(offset) + norm(t.slope) + norm(t.value_mean)) + t.tail


def check_b5(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B5."""
    u = offsets(t, rng)
    bound = bounds.value_from_representation(t.slope, u, mass_of(t), t.radius, t.tail)
    return above(norm(t.value - t.value_mean - u), bound, value_slack(t, u))


def check_b6(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B6."""
    u = rng.choice([0.0, 1.0]) * offsets(t, rng)
    return above(norm(t.value - t.value_mean - u), bounds.value_from_range(u, t.logits, t.radius), value_slack(t, u))


def check_b7(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B7."""
    u = offsets(t, rng)
    bound = bounds.value_from_residual(t.slope, u, t.logits, mass_of(t), t.spread, t.trace, t.tail)
    error = norm(t.value - t.value_mean - u)
    rest = above(error, bound, value_slack(t, u) + np.sqrt(UNIT * 64 * t.trace) * np.tanh(t.spread.high))
    some = t.logits.high <= functions.LARGE
    return Outcome(rest.violated & some, rest.tightness)


def retained_of(t: Truth, rng: np.random.Generator) -> tuple[Floats, Floats, Floats, Floats]:
    """Retained output and lse beside the evicted set, the exact merged output, and an estimate of it."""
    out = t.value_mean + rng.choice([0.1, 3.0]) * rng.standard_normal(t.value.shape)
    lse = t.lse + 3 * rng.standard_normal(t.lse.shape)
    exact = attention.merge(AttentionState(out, lse), AttentionState(t.value, t.lse)).out
    shift = np.maximum(lse, t.lse)
    share = (np.exp(t.lse - shift) / (np.exp(t.lse - shift) + np.exp(lse - shift)))[:, None]
    exact = out + share * (t.value - out)
    low = (1 / (1 + np.exp(np.clip(lse - t.base, -1000, 1000))))[:, None]
    kind = rng.integers(4, size=len(lse))[:, None]
    paper = out + low * (t.value_mean + t.slope - out)
    guess = np.select(
        [kind == 0, kind == 1, kind == 2], [out, paper, out + low * (t.value_mean - out)], exact + rng.standard_normal()
    )
    return out, lse, exact, guess


def output_slack(t: Truth, out: Floats, guess: Floats) -> Floats:
    """Rounding of the exact merged output and of its bounds in extended precision."""
    size = norm(out) + norm(guess) + norm(t.value_mean) + t.radius + norm(t.slope)
    return t.value_error + t.tail + 256 * UNIT * size + 2 * size * np.tanh(t.eta + 64 * UNIT * (1 + np.abs(t.base)))


def check_b8(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B8."""
    out, lse, exact, guess = retained_of(t, rng)
    bound = bounds.output_from_representation(
        out, lse, t.base, t.value_mean, t.slope, guess, mass_of(t), t.radius, t.tail
    )
    return above(norm(exact - guess), bound, output_slack(t, out, guess))


def check_b8_from_value(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B8'."""
    out, lse, exact, guess = retained_of(t, rng)
    u = offsets(t, rng)
    error = norm(t.value - t.value_mean - u) + t.value_error
    share = [1 / (1 + np.exp(np.clip(lse - t.base - kappa, -1000, 1000))) for kappa in mass_of(t)]
    bound = bounds.output_from_value(out, guess, t.value_mean + u, error, Interval(*share))
    return above(norm(exact - guess), bound, output_slack(t, out, guess) + 256 * UNIT * norm(u))


def check_b9(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B9."""
    x = 4 * rng.standard_normal(len(t.kappa)).astype(LONG)
    y = x + rng.choice([1e-3, 1.0, 10.0]) * rng.standard_normal(len(x))
    y[::2] = -x[::2]
    moved = np.abs(1 / (1 + np.exp(-x)) - 1 / (1 + np.exp(-y)))
    return above(moved, bounds.share_from_mass(x - y), 32 * UNIT)


def check_b11(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B11, through the certificate of a compact slope."""
    state = Moments.from_tokens(batch.k, batch.v, weights=batch.w, order=2, extent=True)
    slope = bounds.compact_slope(state, int(rng.integers(0, min(state.value_mean.shape[-1], batch.k.shape[-1]) + 1)))
    guess = t.value_mean + offsets(t, rng)
    given = guess.astype(batch.dtype)
    bound = bounds.value_error(batch.q, state, given[:, None], scale=batch.scale, slope=slope)[:, 0]
    return above(norm(t.value - given), bound, t.value_error)


def check_b12(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B12, of keys in codes of every number of bits."""
    bits = int(rng.choice(BITS))
    standard = Standard.of(batch.k)
    if rng.integers(2):  # of two widths, where there are
        standard = standard.graded(bits, np.mean(batch.q**2, axis=-2))
    codes, step = encode(batch.k, standard, bits)
    mean, deviation, delta = (np.asarray(x).astype(LONG) for x in (*standard[:2], step))
    level = unpacked(codes, standard, bits).astype(LONG)
    level = standard.disordered(level - less_centre(bits, standard, level))
    off = mean[:, None] + deviation[:, None] * level * delta[..., None] - batch.k
    moved = np.abs((t.query[:, None] * off).sum(axis=-1))
    length = (np.abs(t.query) * deviation).sum(axis=-1)
    # Rounding of z and of its quotient by the step, in the dtype of the keys; and that of this check.
    u = float(np.finfo(batch.dtype).eps) / 2
    size = deviation[:, None] * (delta * 2.0 ** (bits + 1))[..., None] + np.abs(batch.k) + np.abs(mean)[:, None]
    slack = (np.abs(t.query)[:, None] * size).sum(axis=-1) * (4 * u + 64 * UNIT)
    each = above(moved, bounds.logit_from_step(length[:, None], delta), slack)
    return Outcome(np.asarray(each.violated.any(axis=-1)), each.tightness)


def check_b13(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B13: logits and values moved as far as may be, towards one side."""
    v, n = batch.v.astype(LONG), batch.v.shape[-2]
    middle = (v.max(axis=-2) + v.min(axis=-2)) / 2
    off = v - middle[:, None]
    side = np.sign((off * off[:, :1]).sum(axis=-1))
    logit = rng.choice([1e-3, 0.1, 1.0, 5.0], size=len(v)).astype(LONG)
    value = rng.choice([0.0, 0.1], size=len(v)) * t.radius
    moved = logit[:, None] * np.where(rng.random((len(v), 1)) < 0.5, side, rng.choice([-1.0, 1.0], size=(len(v), n)))
    error = rng.standard_normal(v.shape)
    error *= (value / np.maximum(norm(error).max(axis=-1), 1e-30))[:, None, None]

    def output(x: Floats, values: Floats) -> Floats:
        powers = t.share * np.exp(x - x.max(axis=-1, keepdims=True))
        return (powers[..., None] * values).sum(axis=-2) / powers.sum(axis=-1)[:, None]

    changed = norm(output(t.x + moved / 2, v + error) - output(t.x - moved / 2, v))
    slack = UNIT * (16 * n + 128) * (norm(v).max(axis=-1) + value) * (1 + np.abs(t.x).max(axis=-1))
    return above(changed, bounds.output_from_codes(logit, norm(off).max(axis=-1), value), slack)


def state_of(batch: Batch, rng: np.random.Generator, *, anchored: bool = False) -> Moments:
    """Moments of a batch, gathered in one of the ways that must not matter."""
    order, n = int(rng.integers(3)), batch.k.shape[-2]
    cuts = [0, *sorted(rng.integers(0, n + 1, int(rng.integers(0, 4))).tolist()), n]
    pieces = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    k, v, w = batch.k, batch.v, batch.w
    if anchored:
        return Moments.from_tokens(k, v, weights=w, order=order, extent=True, anchor=anchor_of(batch, rng))
    way = rng.integers(4)
    first = pieces[0]
    if way == 3 and n > 1:  # downdate
        half = n // 2 + 1
        twice = Moments.from_tokens(k, v, weights=w, order=order, extent=True)
        twice = twice.update(k[:, :half], v[:, :half], weights=w[:, :half])
        return twice.downdate(k[:, :half], v[:, :half], weights=w[:, :half])
    if way == 2:  # decay by a power of two and back, by weights
        small = Moments.from_tokens(k, v, weights=4 * w, order=order, extent=True)
        return small.decay(0.25)
    state = Moments.from_tokens(k[:, first], v[:, first], weights=w[:, first], order=order, extent=True)
    for piece in pieces[1:]:
        state = state.update(k[:, piece], v[:, piece], weights=w[:, piece])
    return state


def anchor_of(batch: Batch, rng: np.random.Generator) -> Floats:
    """A scaled query near the batch's, whose weights the dtype can hold."""
    anchor = batch.q[:, 0] * batch.scale * rng.uniform(0, 1, (len(batch.q), 1))
    logits = np.einsum("hd,hnd->hn", anchor, batch.k)
    spread = np.ptp(logits, axis=-1)
    limit = 40 / np.maximum(spread, 40)
    return (anchor * limit[:, None]).astype(batch.dtype)


def certificate(anchored: bool, dtype: str, kind: str) -> Callable[[Truth, Batch, np.random.Generator], Outcome]:
    """Check of a certificate of whole states."""

    def run(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
        if batch.dtype != dtype:
            return Outcome(np.zeros(0, bool), np.zeros(0))
        state = state_of(batch, rng, anchored=anchored)
        if kind == "lse":
            low, high = (x[:, 0] for x in bounds.lse_interval(batch.q, state, scale=batch.scale))
            slack = t.mass_slack() + 8 * UNIT * np.abs(t.base)
            failed = above(t.lse, high, slack).violated | above(low.astype(LONG), t.lse, slack).violated
            with np.errstate(invalid="ignore"):
                width = (high - low)[t.kappa > 1e-3] / t.kappa[t.kappa > 1e-3]
            return Outcome(failed, width.astype(np.float64))
        if kind == "value":
            given = (t.value_mean + offsets(t, rng)).astype(dtype)
            bound = bounds.value_error(batch.q, state, given[:, None], scale=batch.scale)[:, 0]
            return above(norm(t.value - given), bound, t.value_error)
        out, lse, exact, guess = retained_of(t, rng)
        out, lse = out.astype(dtype), lse.astype(dtype)
        shift = np.maximum(lse, t.lse)
        share = np.exp(t.lse - shift) / (np.exp(t.lse - shift) + np.exp(lse - shift))
        exact = out + share[:, None] * (t.value - out)
        given = guess.astype(dtype)
        retained = AttentionState(out[:, None], lse[:, None])
        bound = bounds.output_error(retained, batch.q, state, given[:, None], scale=batch.scale)[:, 0]
        return above(norm(exact - given), bound, output_slack(t, out.astype(LONG), given.astype(LONG)))

    return run


def check_b10(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Theorem B10: tokens dealt to three parts, some of which may be empty."""
    out, lse, _, guess = retained_of(t, rng)
    out, lse, guess = (x.astype(batch.dtype) for x in (out, lse, guess))
    member = rng.integers(3, size=batch.w.shape)
    w = np.stack([np.where(member == part, batch.w, 0) for part in range(3)], axis=1).astype(batch.dtype)
    k, v = (np.repeat(x[:, None], 3, axis=1) for x in (batch.k, batch.v))
    parts = Moments.from_tokens(k, v, weights=w, order=int(rng.integers(3)), extent=True)
    retained = AttentionState(out[:, None], lse[:, None])
    bound = bounds.output_error_of_parts(retained, batch.q, parts, guess[:, None], scale=batch.scale)[:, 0]
    shift = np.maximum(lse, t.lse)
    share = np.exp(t.lse - shift) / (np.exp(t.lse - shift) + np.exp(lse - shift))
    exact = out + share[:, None] * (t.value - out)
    return above(norm(exact - guess), bound, output_slack(t, out.astype(LONG), guess.astype(LONG)))


def check_state(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Law M: moments gathered in any way are those of the tokens, within the rounding that the extent counts."""
    state = state_of(batch, rng)
    assert state.extent is not None
    error = rounding.state_error(state.extent)
    outcome = [
        above(np.abs(state.weight - t.weight), error.weight * t.weight, UNIT * 64 * t.weight),
        above(norm(state.key_mean - t.key_mean), error.key_mean, UNIT * 256 * error.key_size),
        above(norm(state.value_mean - t.value_mean), error.value_mean, t.value_error),
    ]
    if state.value_key is not None:
        # The covariance along the query is all that the check knows exactly.
        slope = np.einsum("hvd,hd->hv", state.value_key.astype(LONG), t.query) / state.weight[:, None]
        most = norm(t.query) * (error.value_key + 2 * error.weight * error.key_spread * error.value_spread)
        outcome.append(above(norm(slope - t.slope), most, t.tail))
    violated = np.any([x.violated for x in outcome], axis=0)
    return Outcome(violated, outcome[1].tightness[:0])


def check_merge(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Law A: attention over two parts of a set merges into attention over the set."""
    n, d = batch.k.shape[-2:]
    cut = int(rng.integers(0, n + 1))
    if not batch.unit_weights:
        return Outcome(np.zeros(0, bool), np.zeros(0))
    parts = [attention.attend(batch.q, batch.k[:, s], batch.v[:, s], scale=batch.scale) for s in (
        slice(0, cut), slice(cut, n))]  # fmt: skip
    whole = attention.merge(*parts)
    u = rounding.unit(batch.q)
    longest_k, longest_v = (norm(x.astype(LONG)).max(axis=-1) for x in (batch.k, batch.v))
    of_out, of_lse = rounding.attention_error(norm(t.query), longest_k, longest_v, t.lse, n=n, d=d + 4, u=u)
    steps = 40 * u
    failed = above(np.abs(whole.lse[:, 0] - t.lse), 2 * of_lse + steps * (1 + np.abs(t.lse)), t.mass_slack()).violated
    moved = 2 * longest_v * (np.tanh(2 * of_lse) + steps)
    failed |= above(norm(whole.out[:, 0] - t.value), 2 * of_out + moved, t.value_error).violated
    return Outcome(failed, np.zeros(0))


def check_jensen(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Law J: the estimated lse of order 1 never exceeds the truth."""
    state = Moments.from_tokens(batch.k, batch.v, weights=batch.w, extent=True)
    reading = bounds.read(batch.q, state, scale=batch.scale)
    lse = correction.estimate(batch.q, state, scale=batch.scale).lse[:, 0]
    return Outcome(above(lse.astype(LONG), t.lse, reading.base_error[:, 0]).violated, np.zeros(0))


def check_rotation(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Law R: certificates survive a rotation of keys and query."""
    d = batch.k.shape[-1]
    turn = np.linalg.qr(rng.standard_normal((d, d)))[0].astype(batch.dtype)
    state = Moments.from_tokens(batch.k, batch.v, weights=batch.w, order=2, extent=True).rotate(turn)
    q = (batch.q.astype(LONG) @ turn.T.astype(LONG)).astype(batch.dtype)
    # The rotated query is rounded to the dtype; its logits move by no more than this.
    off = norm(q[:, 0].astype(LONG) @ turn.astype(LONG) - batch.q[:, 0]) * batch.scale
    reach = off * 2 * norm(batch.k.astype(LONG)).max(axis=-1)
    low, high = (x[:, 0] for x in bounds.lse_interval(q, state, scale=batch.scale))
    failed = above(t.lse, high, reach + t.mass_slack()).violated
    return Outcome(failed | above(low.astype(LONG), t.lse, reach + t.mass_slack()).violated, np.zeros(0))


def check_identity(t: Truth, batch: Batch, rng: np.random.Generator) -> Outcome:
    """Law I: where nothing was evicted, correcting changes no bit."""
    retained = attention.attend(batch.q, batch.k, batch.v, scale=batch.scale)
    empty = Moments.empty(batch.k, batch.v)
    out = correction.correct(retained, batch.q, empty, scale=batch.scale).out
    return Outcome((out != retained.out).any(axis=(-1, -2)), np.zeros(0))


CHECKS: dict[str, Callable[[Truth, Batch, np.random.Generator], Outcome]] = {
    "B1 range from a ball": check_b1,
    "B2 range from the deviation": check_b2,
    "B3 mass from the range": check_b3,
    "B4 mass, upper": check_b4_upper,
    "B4 mass, lower": check_b4_lower,
    "B5 value, representation": check_b5,
    "B6 value from the range": check_b6,
    "B7 value from the residual": check_b7,
    "B8 output": check_b8,
    "B8' output from the value": check_b8_from_value,
    "B9 share": check_b9,
    "B10 output of several parts": check_b10,
    "B11 compact slope": check_b11,
    "B12 logit from the step": check_b12,
    "B13 output from codes": check_b13,
    **{
        f"certificate: {kind}, {'anchored, ' * anchored}{dtype}": certificate(anchored, dtype, kind)
        for anchored in (False, True)
        for dtype in ("float64", "float32")
        for kind in ("lse", "value", "output")
    },
    "law M: moments however gathered": check_state,
    "law A: attention of parts merges": check_merge,
    "law J: the estimated lse is low": check_jensen,
    "law R: rotation": check_rotation,
    "law I: empty is the identity": check_identity,
}


def check(batch: Batch, rng: np.random.Generator, names: list[str] | None = None) -> Iterator[tuple[str, Outcome]]:
    """Run checks, all of them by default, on a batch."""
    truth = Truth.of(batch)
    for name in CHECKS if names is None else names:
        yield name, CHECKS[name](truth, batch, rng)

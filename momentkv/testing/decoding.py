"""Cases for the decode operator and what it should compute, in plain float64 NumPy, with its rounding error."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from momentkv.backends.layout import Recent
from momentkv.codes import Coding
from momentkv.codes import decode as decoded
from momentkv.statistics.expansion import Expansion
from momentkv.testing import oracle
from momentkv.testing.coded import magnitudes, records_of
from momentkv.testing.rounding import FUNCTION, StateError, attention_error, merge_error

__all__ = ["Decode", "Inputs", "decode_cases", "evaluate", "expected", "f64", "logits_error", "make"]

UNIT_OF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@dataclasses.dataclass(frozen=True)
class Decode:
    """Shapes and kinds; the numbers follow from a fixed seed."""

    d: int = 64
    dv: int = 0  # 0: as d
    group: int = 2
    q_len: int = 1
    capacity: int = 70
    kv_heads: int = 2
    batch: int = 2
    estimate: str = "none"
    dtype: torch.dtype = torch.float32
    splits: int = 1  # 0: as many as the device wants
    counted: bool = False
    masked: bool = False
    packed: bool = False
    scored: bool = False
    recent: int = 0
    recent_masked: bool = False
    size: float = 1.0
    scale: float = 0.1
    bits: tuple[int, int] | None = None  # records: packed, with slots between heads that hold none if also counted

    def __str__(self) -> str:
        shown = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = (f"{k}={v}" for k, v in shown.items() if v != getattr(Decode, k))
        return ",".join(changed).replace("torch.", "") or "default"


def decode_cases(single: torch.dtype, half: torch.dtype) -> list[Decode]:
    """Head dimensions, estimates and layouts; empty sets, one token, odd groups, logits of many hundreds."""
    return [
        *(Decode(d=d, dtype=dtype) for d in (64, 96, 128, 256) for dtype in dict.fromkeys((single, half))),
        *(
            Decode(d=64, dtype=half, estimate=kind, splits=2)
            for kind in ("order 0", "order 1", "order 2", "summaries x 12")
        ),
        *(
            Decode(d=96, dtype=single, estimate=kind, scored=True)
            for kind in ("order 1", "order 2", "summaries x 1", "summaries x 20")
        ),
        Decode(d=256, dtype=single, estimate="summaries x 12", group=1, kv_heads=1, splits=3),
        # Other dimensions than the padded ones, for keys and for values.
        Decode(d=40, dv=24, dtype=single, estimate="order 2", group=3, splits=3),
        Decode(d=3, dv=1, dtype=single, estimate="summaries x 2", group=1, batch=1),
        # Groups: odd, more than a tile of queries, several queries a head.
        Decode(group=7, dtype=single, estimate="order 1", kv_heads=1),
        Decode(group=17, q_len=2, kv_heads=1, batch=1, dtype=half, estimate="summaries x 3", scored=True),
        Decode(group=35, kv_heads=1, batch=1, dtype=half),
        # No token, one token; more splits than tokens, so that some are empty.
        *(
            Decode(d=16, dtype=single, capacity=n, estimate=kind, splits=2, scored=True)
            for n in (0, 1)
            for kind in ("none", "order 1")
        ),
        # Neither tokens nor, in one head, an estimate.
        Decode(d=16, dtype=single, capacity=0, estimate="order 1"),
        # Ragged: counts, padding, packed, all of them.
        Decode(d=16, dtype=single, counted=True, splits=3),
        Decode(d=16, dtype=single, masked=True, estimate="order 0"),
        Decode(
            d=16, dtype=single, counted=True, masked=True, scored=True, splits=2, estimate="summaries x 2", kv_heads=3
        ),
        Decode(d=16, dtype=single, packed=True, splits=2, estimate="order 1", scored=True, kv_heads=3),
        Decode(d=16, dtype=single, packed=True, masked=True),
        # Recent tokens besides: less than a tile and more, alone, in a split of their own, behind packed ones.
        Decode(d=16, dtype=single, recent=9),
        Decode(d=16, dtype=single, recent=70, recent_masked=True, estimate="order 1", splits=3, scored=True),
        Decode(d=16, dtype=single, recent=5, capacity=0, recent_masked=True, scored=True),
        Decode(d=64, dtype=half, recent=70, packed=True, kv_heads=3, splits=2),
        Decode(d=40, dv=24, dtype=single, recent=20, counted=True, group=3, scored=True, estimate="summaries x 2"),
        *coded_cases(single, half),
        # Logits of many hundreds.
        Decode(d=64, dtype=single, size=30.0, scale=1.0, estimate="order 0", splits=2),
    ]


def coded_cases(single: torch.dtype, half: torch.dtype) -> list[Decode]:
    """Records of all numbers of bits, in words of one, two and four bytes; beside recent tokens and estimates."""
    every = [
        Decode(d=d, dv=dv, dtype=dtype, bits=bits, packed=True, kv_heads=3, splits=splits)
        for (d, dv, bits), dtype, splits in (
            ((64, 64, (4, 4)), half, 2),
            ((128, 128, (8, 8)), half, 1),
            ((128, 64, (5, 3)), half, 3),
            ((256, 256, (4, 8)), half, 2),
            ((96, 64, (6, 2)), half, 1),
            ((64, 128, (3, 6)), half, 2),
            ((32, 80, (2, 5)), half, 1),
            ((8, 112, (4, 3)), half, 1),
            ((80, 112, (3, 2)), single, 1),
            ((96, 80, (6, 5)), single, 2),
            ((16, 8, (2, 6)), single, 2),
            ((8, 16, (3, 4)), single, 1),
        )
    ]
    whole = Decode(d=16, bits=(4, 4), packed=True, dtype=single, kv_heads=3, recent=9)
    cases = [
        *every,
        dataclasses.replace(whole, counted=True, estimate="order 1", scored=True),
        dataclasses.replace(whole, counted=True, bits=(5, 3), estimate="summaries x 12", splits=2, scored=True),
        dataclasses.replace(whole, bits=(8, 3), recent=70, recent_masked=True, estimate="order 1", scored=True),
        dataclasses.replace(whole, bits=(8, 8), estimate="summaries x 2", group=7, dtype=half, d=64, recent=70),
        dataclasses.replace(whole, bits=(3, 3), estimate="order 2", group=17, q_len=2, kv_heads=1, dtype=half, d=64),
        dataclasses.replace(whole, bits=(6, 2), group=12, kv_heads=1, dtype=half, d=64, scored=True),
        dataclasses.replace(whole, capacity=0, scored=True),
        dataclasses.replace(whole, capacity=1, estimate="order 0", splits=2),
        dataclasses.replace(whole, d=64, size=30.0, scale=1.0, bits=(8, 8)),
        # Queries times deviations that float16 cannot hold, and such as it has few digits for.
        dataclasses.replace(whole, d=64, size=200.0, scale=0.2, dtype=half, recent=0),
        dataclasses.replace(whole, d=64, size=0.01, scale=1.0, dtype=half, recent=0),
    ]
    return [case for case in cases if case.dtype != torch.float32 or max(case.d, case.dv) <= 128]


@dataclasses.dataclass
class Inputs:
    """What `momentkv.backends.operators.decode` is given, and which slots hold tokens."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor | None
    counts: torch.Tensor | None
    starts: torch.Tensor | None
    expansion: Expansion | None
    recent: Recent | None
    valid: NDArray[Any]  # (batch, kv_head, capacity + recent): the slots that hold tokens
    coding: Coding | None = None


def make(case: Decode, device: str = "cpu") -> Inputs:
    """The arguments, the same on every device; whatever must not be read is NaN."""
    rng = np.random.default_rng(7)
    d, dv, lead = case.d, case.dv or case.d, (case.batch, case.kv_heads)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(case.size * rng.standard_normal(shape)).to(case.dtype)

    q = normal(case.batch, case.kv_heads * case.group, case.q_len, d)
    k, v = normal(*lead, case.capacity, d), normal(*lead, case.capacity, dv)
    valid = np.ones((*lead, case.capacity), dtype=bool)
    counts = positions = starts = None
    if case.counted or case.packed:
        numbers = rng.integers(0, case.capacity + 1, lead)
        numbers.flat[0], numbers.flat[-1] = case.capacity, 0
        if numbers.size > 2:
            numbers.flat[1] = min(1, case.capacity)
        valid &= np.arange(case.capacity) < numbers[..., None]
        counts = torch.from_numpy(numbers.astype(np.int32))
    if case.masked:
        valid &= rng.random(valid.shape) < 0.5
        positions = torch.from_numpy(np.where(valid, np.arange(case.capacity), -1).astype(np.int32))
    hidden, coding = torch.from_numpy(~valid)[..., None], None
    if case.bits is None:
        k, v = k.masked_fill(hidden, math.nan), v.masked_fill(hidden, math.nan)
    else:
        k, v, coding = records_of(k, v, ~hidden[..., 0], rng, case.bits)
    if case.packed and case.counted:
        assert coding is not None
        starts = torch.arange(valid[..., 0].size).reshape(lead) * case.capacity
        k, v = k.flatten(0, 2), v.flatten(0, 2)
        coding = coding._replace(key_step=coding.key_step.flatten(), value_step=coding.value_step.flatten())
    elif case.packed:
        assert counts is not None
        used = torch.arange(case.capacity) < counts[..., None]
        k, v = k[used], v[used]
        if coding is not None:
            coding = coding._replace(key_step=coding.key_step[used], value_step=coding.value_step[used])
        positions = None if positions is None else positions[used]
        flat = counts.flatten().long()
        starts = (flat.cumsum(0) - flat).reshape(lead)
    recent = None
    if case.recent:
        there = rng.random((*lead, case.recent)) < (0.5 if case.recent_masked else 2.0)
        there[0, 0] &= not case.recent_masked  # a head that has none
        # As a cache has them: the first of more slots.
        hidden = torch.from_numpy(np.pad(~there, [(0, 0), (0, 0), (0, 3)], constant_values=True))[..., None]
        newest = [normal(*lead, case.recent + 3, n).masked_fill(hidden, math.nan)[..., :-3, :] for n in (d, dv)]
        recent = Recent(newest[0], newest[1], torch.from_numpy(there) if case.recent_masked else None)
        valid = np.concatenate([valid, there], axis=-1)
    made = Inputs(q, k, v, positions, counts, starts, expansion_of(case, rng, d, dv), recent, valid, coding)
    return made if device == "cpu" else moved(made, device)


def moved(inputs: Inputs, device: str) -> Inputs:
    """The same on a device."""
    expansion = inputs.expansion
    if expansion is not None:
        expansion = Expansion(*(None if x is None else x.to(device) for x in expansion))
    there: dict[str, Any] = {
        name: None if x is None else x.to(device)
        for name in ("q", "k", "v", "positions", "counts", "starts")
        for x in (getattr(inputs, name),)
    }
    recent = inputs.recent
    if recent is not None:
        recent = Recent(*(None if x is None else x.to(device) for x in recent))
    coding = inputs.coding
    if coding is not None:
        (key_step, value_step), standards = (x.to(device) for x in coding[1:3]), coding[3:]
        coding = Coding(coding.bits, key_step, value_step, *(each.map(lambda x: x.to(device)) for each in standards))
    return dataclasses.replace(inputs, **there, expansion=expansion, recent=recent, coding=coding)


def expansion_of(case: Decode, rng: np.random.Generator, d: int, dv: int) -> Expansion | None:
    """An expansion of each kind; the first head has evicted nothing, and one summary of the others is empty."""
    if case.estimate == "none":
        return None
    lead = (case.batch, case.kv_heads)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal((*lead, *shape))).float()

    kind, _, several = case.estimate.partition(" x ")
    m = int(several or 1)
    log_weight = normal(m) + 3
    log_weight[0, 0] = -math.inf
    if m > 1:
        log_weight[..., -1] = -math.inf
    means = normal(m, d), normal(m, dv)
    matrix = torch.float32 if case.dtype == torch.float32 else case.dtype
    if kind == "order 0":
        return Expansion(log_weight, *means)
    slope = (normal(d, dv) / math.sqrt(d)).to(matrix)
    if kind == "order 1":
        return Expansion(log_weight, *means, slope=slope)
    strength = torch.full(lead, 0.75)
    if kind == "order 2":
        root = normal(d, d) / math.sqrt(d)
        return Expansion(
            log_weight,
            *means,
            slope=slope,
            variance=(root @ root.mT).to(matrix),
            strength=torch.ones(lead),
            cap=torch.full(lead, math.inf),
        )
    assert kind == "summaries"
    cap = torch.full(lead, 2.0)
    cap[-1, -1] = 0.01  # binds
    return Expansion(
        log_weight,
        *means,
        anchor=0.1 * normal(d),
        slope_left=normal(dv, 2),
        slope_right=normal(2, d) / math.sqrt(d),
        variance=normal(d) ** 2,
        strength=strength,
        cap=cap,
    )


def f64(x: torch.Tensor) -> NDArray[Any]:
    """As NumPy's float64."""
    return np.asarray(x.double().cpu())


def dense(case: Decode, inputs: Inputs) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Queries, keys and values with a slot for every token, zero where there is none."""
    k, v = (as_rectangle(case, inputs, x) for x in (inputs.k, inputs.v))
    if inputs.coding is not None:
        steps = (as_rectangle(case, inputs, x) for x in inputs.coding[1:3])
        k, v = (
            decoded(codes.astype(np.uint8), step, standard.map(f64), bits)
            for codes, step, standard, bits in zip((k, v), steps, inputs.coding[3:], inputs.coding.bits, strict=True)
        )
    if inputs.recent is not None:
        k, v = (np.concatenate([x, f64(y)], axis=-2) for x, y in zip((k, v), inputs.recent[:2], strict=True))
    hidden = ~inputs.valid[..., None]
    return f64(inputs.q), np.where(hidden, 0.0, k), np.where(hidden, 0.0, v)


def key_steps(case: Decode, inputs: Inputs) -> NDArray[Any]:
    """Steps of keys, with a slot for every token; zero where there is none, and of recent ones."""
    if inputs.coding is None:
        return np.zeros(1)
    padded = np.pad(as_rectangle(case, inputs, inputs.coding.key_step), [(0, 0), (0, 0), (0, case.recent)])
    return np.where(inputs.valid, padded, 0.0)


def as_rectangle(case: Decode, inputs: Inputs, x: torch.Tensor) -> NDArray[Any]:
    """Packed numbers or vectors with a slot for every token, zero where there is none; others as they are."""
    if not case.packed:
        return f64(x)
    assert inputs.counts is not None
    assert inputs.starts is not None
    places = np.arange(case.capacity)
    whole = np.zeros((*inputs.counts.shape, case.capacity, *x.shape[1:]))
    used = places < inputs.counts.cpu().numpy()[..., None]
    whole[used] = f64(x)[(inputs.starts.cpu().numpy()[..., None] + places)[used]]
    return whole


def expected(case: Decode, inputs: Inputs) -> tuple[oracle.State, NDArray[Any], StateError]:
    """Exact state, exact logits of the retained tokens, and what rounding may change of the state."""
    q, k, v = dense(case, inputs)
    mask = inputs.valid[..., None, None, :]
    logits = oracle.logits(q, k, case.scale, mask)
    state = oracle.attend(q, k, v, case.scale, mask)
    reckoned = magnitudes(q, k, inputs.coding, key_steps(case, inputs), halves=case.dtype != torch.float32)
    error = attention_error(*reckoned, v, state.lse, 2.0**-24, case.scale)
    size = np.linalg.norm(v, axis=-1).max(initial=0.0)
    if inputs.coding is not None:
        nothing = StateError(np.zeros_like(error.out), np.zeros_like(error.lse))
        error = merge_error(error, nothing, size, np.nan_to_num(np.abs(state.lse), posinf=0), 2.0**-24)
    if inputs.expansion is not None:
        evicted, of_evicted, reach = evaluate(q, inputs.expansion, case)
        size = max(size, reach)
        lse = np.maximum(np.nan_to_num(np.abs(state.lse), posinf=0), np.nan_to_num(np.abs(evicted.lse), posinf=0))
        error = merge_error(error, of_evicted, size, lse, 2.0**-24)
        state = oracle.merge(state, evicted)
    if case.dtype != torch.float32:
        # Weights are rounded before they meet values, and the output when it is stored.
        error = error._replace(out=error.out + UNIT_OF[case.dtype] * (2 * size + np.abs(state.out)))
    return state, logits, error


def logits_error(case: Decode, inputs: Inputs) -> float:
    """What rounding may change of a logit."""
    q, k, _ = dense(case, inputs)
    q, k = magnitudes(q, k, inputs.coding, key_steps(case, inputs), halves=case.dtype != torch.float32)
    products = np.einsum("...hid,...hjd->...hij", q, oracle.to_query_heads(k, q.shape[-3], -3))
    return float(2.0**-24 * (case.d + 4) * case.scale * products.max(initial=0.0))


def evaluate(q: NDArray[Any], expansion: Expansion, case: Decode) -> tuple[oracle.State, StateError, float]:
    """The estimate straight from its definition, its error, and the largest norm of what it adds up."""
    parts: dict[str, Any] = {name: None if x is None else f64(x) for name, x in expansion._asdict().items()}
    group, u = case.group, 2.0**-24
    each: dict[str, Any] = {
        name: None if x is None else oracle.to_query_heads(x, q.shape[1], 1) for name, x in parts.items()
    }
    anchor = np.zeros(1) if each["anchor"] is None else each["anchor"][:, :, None, :]
    x = case.scale * q - anchor
    logits = each["log_weight"][:, :, None, :] + np.einsum("bhid,bhmd->bhim", x, each["key_mean"])
    weights, lse = oracle.softmax(logits)
    out = np.einsum("bhim,bhmv->bhiv", weights, each["value_mean"])
    # Rounding: each logit by (d + 4) u of its terms, each output by as much of its own.
    d, m = q.shape[-1], logits.shape[-1]
    size = np.abs(case.scale * q) + np.abs(anchor)
    of_lse = u * (d + 4) * np.einsum("bhid,bhmd->bhim", size, np.abs(each["key_mean"])).max(-1)
    finite = np.where(np.isfinite(each["log_weight"]), each["log_weight"], 0.0)
    of_lse = of_lse + u * (m + 2 * FUNCTION + 4 + FUNCTION * math.log(m) + np.abs(finite).max(-1)[..., None] * 2)
    terms = np.abs(each["value_mean"]).max(-2)[:, :, None, :]
    of_out = 2 * terms * (np.tanh(of_lse)[..., None] + u * (2 * m + 2 * FUNCTION))
    if each["slope"] is not None:
        unit = UNIT_OF[case.dtype] if case.dtype != torch.float32 else u * (d + 6)
        linear = np.einsum("bhid,bhdv->bhiv", size, np.abs(each["slope"]))
        out = out + np.einsum("bhid,bhdv->bhiv", x, each["slope"])
        of_out, terms = of_out + (unit + u * (d + 6)) * linear, terms + linear
    if each["slope_left"] is not None:
        out = out + np.einsum("bhvr,bhrd,bhid->bhiv", each["slope_left"], each["slope_right"], x)
        linear = np.einsum("bhvr,bhrd,bhid->bhiv", *(np.abs(each[f"slope_{side}"]) for side in ("left", "right")), size)
        of_out, terms = of_out + u * (d + 8) * linear, terms + linear
    if each["variance"] is not None:
        full = each["variance"].ndim == 4
        form = "bhid,bhde,bhie->bhi" if full else "bhid,bhd,bhid->bhi"
        gain = 0.5 * each["strength"][..., None] * np.einsum(form, x, each["variance"], x)
        lse = lse + np.minimum(gain, each["cap"][..., None])
        unit = u * (2 * d + 8) + (UNIT_OF[case.dtype] if full and case.dtype != torch.float32 else 0.0)
        of_lse = of_lse + unit * 0.5 * np.einsum(form, size, np.abs(each["variance"]), size)
    empty = np.isneginf(lse)
    out, of_out = np.where(empty[..., None], 0.0, out), np.where(empty[..., None], 0.0, of_out)
    assert group * case.kv_heads == q.shape[1]
    return oracle.State(out, lse), StateError(of_out, of_lse), float(np.linalg.norm(terms, axis=-1).max())

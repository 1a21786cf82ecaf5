"""The fused operator, known to PyTorch by name: ``torch.ops.momentkv.decode``.

On CUDA it is a Triton kernel, on a CPU plain PyTorch; its fake kernel tells `torch.compile` the shapes of results, so
that a compiled or captured step contains it without a break. Nothing in it waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch

from momentkv.backends.layout import Recent
from momentkv.backends.plain import decode_plain
from momentkv.codes import Coding, Standard, row_bytes
from momentkv.statistics.expansion import Expansion

__all__ = ["decode", "decode_operator", "reads_codes"]

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Arguments of the operator that are of the expansion; behind them those of a coding.
EXPANSION = len(Expansion._fields)


def decode_on_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor | None,
    counts: torch.Tensor | None,
    starts: torch.Tensor | None,
    capacity: int,
    recent_keys: torch.Tensor | None,
    recent_values: torch.Tensor | None,
    recent_valid: torch.Tensor | None,
    scale: float,
    scored: bool,
    log_weight: torch.Tensor | None,
    key_mean: torch.Tensor | None,
    value_mean: torch.Tensor | None,
    anchor: torch.Tensor | None,
    slope: torch.Tensor | None,
    slope_left: torch.Tensor | None,
    slope_right: torch.Tensor | None,
    variance: torch.Tensor | None,
    strength: torch.Tensor | None,
    cap: torch.Tensor | None,
    key_step: torch.Tensor | None = None,
    value_step: torch.Tensor | None = None,
    channel_mean: torch.Tensor | None = None,
    channel_deviation: torch.Tensor | None = None,
    value_deviation: torch.Tensor | None = None,
    key_bits: int = 0,
    value_bits: int = 0,
    channel_order: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`decode` with expansion and coding in parts; without logits, an empty tensor in their place."""
    from momentkv.backends.triton.decode import decode_triton

    expansion = assemble(
        log_weight, key_mean, value_mean, anchor, slope, slope_left, slope_right, variance, strength, cap
    )
    coding = coding_of(
        key_step,
        value_step,
        channel_mean,
        channel_deviation,
        value_deviation,
        key_bits,
        value_bits,
        channel_order,
    )
    with torch.cuda.device(q.device):
        recent = together(recent_keys, recent_values, recent_valid)
        out, lse, logits = decode_triton(
            q, k, v, positions, counts, starts, capacity, recent, expansion, scale, scored, coding=coding
        )
    return out, lse, lse.new_empty(0) if logits is None else logits


def decode_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    counts: Tensor | None,
    starts: Tensor | None,
    capacity: int,
    recent_keys: Tensor | None,
    recent_values: Tensor | None,
    recent_valid: Tensor | None,
    scale: float,
    scored: bool,
    *parts: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    recent = together(recent_keys, recent_values, recent_valid)
    out, lse, logits = decode_plain(
        q,
        k,
        v,
        positions,
        counts,
        starts,
        capacity,
        recent,
        assemble(*parts[:EXPANSION]),
        scale,
        scored,
        coding_of(*parts[EXPANSION:]),
    )
    return out, lse, lse.new_empty(0) if logits is None else logits


def decode_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    counts: Tensor | None,
    starts: Tensor | None,
    capacity: int,
    recent_keys: Tensor | None,
    recent_values: Tensor | None,
    recent_valid: Tensor | None,
    scale: float,
    scored: bool,
    *parts: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, q_heads, q_len, _ = q.shape
    kv_heads = k.shape[1] if starts is None else starts.shape[-1]
    lse = q.new_empty((batch, q_heads, q_len), dtype=torch.float32)
    slots = capacity + (0 if recent_keys is None else recent_keys.shape[-2])
    logits = lse.new_empty((batch, kv_heads, q_heads // kv_heads, q_len, slots) if scored else (0,))
    coding = coding_of(*parts[EXPANSION:])
    dv = v.shape[-1] if coding is None else coding.value_standard.deviation.shape[-1]
    return q.new_empty((batch, q_heads, q_len, dv)), lse, logits


# `torch.library.custom_op` would compare the memory of all arguments and results in every call, which took a multiple
# of the launches' own time (H200).
torch.library.define(
    "momentkv::decode",
    torch.library.infer_schema(decode_on_cuda, mutates_args=()),
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.impl("momentkv::decode", "cuda", decode_on_cuda)
torch.library.impl("momentkv::decode", "cpu", decode_on_cpu)
torch.library.register_fake("momentkv::decode", decode_shapes)
decode_operator = torch.ops.momentkv.decode.default


def assemble(*parts: Any) -> Expansion | None:
    """The expansion whose parts an operator was given, or None."""
    return None if parts[0] is None else Expansion(*parts)


def coding_of(
    key_step: Tensor | None = None,
    value_step: Tensor | None = None,
    mean: Tensor | None = None,
    deviation: Tensor | None = None,
    spread: Tensor | None = None,
    key_bits: int = 0,
    value_bits: int = 0,
    order: Tensor | None = None,
) -> Coding | None:
    """The coding that an operator was given in parts, or None; the dispatcher leaves out what is as by default."""
    if key_step is None:
        return None
    return Coding(
        (key_bits, value_bits), key_step, value_step, Standard(mean, deviation, order), Standard(None, spread)
    )


def parts_of(coding: Coding | None) -> tuple[Any, ...]:
    """The inverse of `coding_of`."""
    if coding is None:
        return ()
    of_keys, of_values = coding.key_standard, coding.value_standard
    mean, deviation, order = of_keys
    return (coding.key_step, coding.value_step, mean, deviation, of_values.deviation, *coding.bits, order)


def reads_codes(coding: Coding, dtype: torch.dtype) -> bool:
    """Whether the operator reads such records for queries of a dtype.

    They have at most 8 bits, values around zero, and whole bytes of every plane; in float32 at most 128 channels, for
    more would not fit into registers.
    """
    channels = (coding.key_standard.deviation.shape[-1], coding.value_standard.deviation.shape[-1])
    fitting = max(channels) <= 128 or dtype != torch.float32
    whole = all(n % 8 == 0 for n in channels)
    return max(coding.bits) <= 8 and coding.value_standard.mean is None and whole and fitting


def together(keys: Tensor | None, values: Tensor | None, valid: Tensor | None) -> Recent | None:
    """The recent tokens that an operator was given in parts, or None."""
    return None if keys is None else Recent(keys, values, valid)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    expansion: Expansion | None = None,
    *,
    scale: float,
    positions: Tensor | None = None,
    counts: Tensor | None = None,
    starts: Tensor | None = None,
    capacity: int | None = None,
    recent: Recent | None = None,
    scored: bool = False,
    coding: Coding | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Attention of a few queries over retained tokens and the estimate of the evicted ones, in one operator.

    Parameters
    ----------
    q : tensor, shape (batch, kv_head * group, q_len, d)
        Every query sees every token.
    k, v : tensor, shape (batch, kv_head, capacity, d) and (batch, kv_head, capacity, dv), or (n, d) and (n, dv)
        In the dtype of ``q``. The second form is packed: tokens of all heads one after the other, see ``starts``.
        With a ``coding``, records: uint8 (n, bytes), always packed.
    expansion : Expansion, optional
        Of the evicted tokens (``moments.expansion()``).
    scale : float
        Factor on ``q . k``.
    positions : int32 tensor, shape (batch, kv_head, capacity) or (n,), optional
        Negative for a slot that holds no token.
    counts : int32 tensor, shape (batch, kv_head), optional
        Slots in use of each head; what the others hold is never read.
    starts : int64 tensor, shape (batch, kv_head), optional
        First token of each head where tokens are packed; needs ``counts`` and ``capacity``.
    capacity : int, optional
        Most tokens that a head has; known already unless tokens are packed.
    recent : Recent, optional
        More tokens, keys (batch, kv_head, m, d), values (batch, kv_head, m, dv) and ``valid``, bool (batch, kv_head, m)
        or None for all, in the dtype of ``q``; never packed.
    scored : bool
        Whether to return logits.
    coding : Coding, optional
        How records are read: float16 steps (n,), standards (batch, kv_head, d) and (batch, kv_head, dv), that of values
        around zero; at most 8 bits, and channels in multiples of 8, in float32 at most 128 (`reads_codes`).

    Returns
    -------
    out : tensor, shape (batch, kv_head * group, q_len, dv)
        In the dtype of ``q``.
    lse : float32 tensor, shape (batch, kv_head * group, q_len)
        Natural log, of retained and evicted tokens together.
    logits : float32 tensor, shape (batch, kv_head, group, q_len, capacity + m), or None
        Of the retained tokens and, behind them, the recent ones; ``-inf`` for slots without one.

    Raises
    ------
    ValueError
        If shapes, dtypes or memory layouts do not fit.
    RuntimeError
        If an input requires a gradient.

    Notes
    -----
    Sums are float32; probabilities are rounded to the dtype of ``v`` before they are multiplied by it. No gradient. On
    CUDA it may
    be captured in a graph: its launches depend on shapes alone.
    """
    packed = starts is not None
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (batch, q_head, q_len, d)")
    if k.ndim != (2 if packed else 4) or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}; both must be (batch, kv_head, capacity, ...), or "
            "(n, ...) with starts"
        )
    dv = v.shape[-1] if coding is None else coding.value_standard.deviation.shape[-1]
    if coding is not None:
        check_codes(q, k, v, coding, starts, positions)
    elif not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; they must be of one dtype, float32, bfloat16 or "
            "float16"
        )
    if coding is None and k.shape[-1] != q.shape[-1]:
        raise ValueError(f"q has head dimension {q.shape[-1]} but k has {k.shape[-1]}; they must be equal")
    if starts is not None and (counts is None or capacity is None):
        raise ValueError("starts is given, so that counts and capacity must be, too: tokens are packed")
    if starts is None:
        if capacity not in (None, k.shape[-2]):
            raise ValueError(f"capacity is {capacity}, but k has {k.shape[-2]} slots; leave it out")
        capacity = k.shape[-2]
    lead = tuple(k.shape[:2]) if starts is None else tuple(starts.shape)
    if len(lead) != 2 or lead[0] != q.shape[0] or lead[1] == 0 or q.shape[1] % lead[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads in {q.shape[0]} rows, the cache {lead}; rows must be equal, and query heads a "
            "multiple of KV heads"
        )
    for name, x, shape, dtype in (
        ("positions", positions, tuple(k.shape[:-1]), torch.int32),
        ("counts", counts, lead, torch.int32),
        ("starts", starts, lead, torch.int64),
    ):
        if x is not None and (tuple(x.shape) != shape or x.dtype != dtype):
            raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}; it must be {dtype} of shape {shape}")
    if recent is not None:
        recent = checked_recent(recent, lead, q, dv)
    if expansion is not None:
        check_expansion(expansion, lead, q.shape[-1], dv)
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    positions, counts, starts = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (positions, counts, starts)
    )
    coded = parts_of(coding)
    given = (q, k, v, *(recent or ()), *(expansion or ()), *coded[:5])
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given):
        raise RuntimeError("momentkv::decode has no gradient, but an input requires one; call it under torch.no_grad()")
    parts: tuple[Any, ...] = (None,) * len(Expansion._fields) if expansion is None else tuple(expansion)
    newest = (None, None, None) if recent is None else tuple(recent)
    out, lse, logits = decode_operator(
        q, k, v, positions, counts, starts, capacity, *newest, float(scale), scored, *parts, *coded
    )
    return out, lse, logits if scored else None


def check_codes(
    q: Tensor, k: Tensor, v: Tensor, coding: Coding, starts: Tensor | None, positions: Tensor | None
) -> None:
    """Raise unless these are packed records that a kernel can read."""
    if starts is None or positions is not None:
        raise ValueError(
            "coding is given, so that starts must be, and positions must not: records are packed, and counted"
        )
    if not reads_codes(coding, q.dtype):
        raise ValueError(
            f"coding has {coding.bits} bits; it must have at most 8, values around zero and channels in multiples of "
            "8, in float32 at most 128: use momentkv.codes.attend_codes"
        )
    lead, n, d = tuple(starts.shape), k.shape[0], q.shape[-1]
    dv, (mean, deviation, order) = coding.value_standard.deviation.shape[-1], coding.key_standard
    for name, x, shape, dtypes in (
        ("q", q, tuple(q.shape), DTYPES),
        ("k", k, (n, row_bytes(d, coding.bits[0])), (torch.uint8,)),
        ("v", v, (n, row_bytes(dv, coding.bits[1])), (torch.uint8,)),
        ("key_step", coding.key_step, (n,), (torch.float16,)),
        ("value_step", coding.value_step, (n,), (torch.float16,)),
        ("mean of key_standard", mean, (*lead, d), DTYPES),
        ("deviation of key_standard", deviation, (*lead, d), DTYPES),
        ("order of key_standard", order, (*lead, d), (torch.uint8, torch.int32)),
        ("deviation of value_standard", coding.value_standard.deviation, (*lead, dv), DTYPES),
    ):
        if x is not None and (tuple(x.shape) != shape or x.dtype not in dtypes):
            wanted = " or ".join(map(str, dtypes))
            raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}; it must be {wanted} of shape {shape}")


def checked_recent(recent: Recent, lead: tuple[int, ...], q: Tensor, dv: int) -> Recent:
    """Recent tokens as a kernel reads them."""
    keys, values, valid = recent
    wanted = (*lead, keys.shape[-2] if keys.ndim == 4 else 0)
    for name, x, shape, dtype in (
        ("recent.keys", keys, (*wanted, q.shape[-1]), q.dtype),
        ("recent.values", values, (*wanted, dv), q.dtype),
        ("recent.valid", valid, wanted, torch.bool),
    ):
        if x is not None and (tuple(x.shape) != shape or x.dtype != dtype):
            raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}; it must be {dtype} of shape {shape}")
    keys, values = (x if x.stride(-1) == 1 else x.contiguous() for x in (keys, values))
    return Recent(keys, values, valid)


def check_expansion(expansion: Expansion, lead: tuple[int, ...], d: int, dv: int) -> None:
    """Raise unless every part has the shape that a kernel will read."""
    m = expansion.log_weight.shape[-1]
    r = 0 if expansion.slope_right is None else expansion.slope_right.shape[-2]
    shapes: dict[str, list[tuple[int, ...]]] = {
        "log_weight": [(m,)],
        "key_mean": [(m, d)],
        "value_mean": [(m, dv)],
        "anchor": [(d,)],
        "slope": [(d, dv)],
        "slope_left": [(dv, r)],
        "slope_right": [(r, d)],
        "variance": [(d,), (d, d)],
        "strength": [()],
        "cap": [()],
    }
    for name, x in expansion._asdict().items():
        if x is not None and tuple(x.shape) not in [(*lead, *shape) for shape in shapes[name]]:
            raise ValueError(
                f"{name} of the expansion has shape {tuple(x.shape)}; it must be "
                + " or ".join(str((*lead, *shape)) for shape in shapes[name])
            )
    if (expansion.slope_left is None) != (expansion.slope_right is None):
        raise ValueError("slope_left and slope_right are factors of one matrix; give both or neither")
    if expansion.variance is not None and (expansion.strength is None or expansion.cap is None):
        raise ValueError("variance is given, so that strength and cap must be, too")

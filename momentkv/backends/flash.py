"""PyTorch's flash attention for CPUs: no weights are ever held, and the log-sum-exp comes with the output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from momentkv.attention import AttentionState
from momentkv.backends.layout import Tiers
from momentkv.backends.records import dtype_of, levels_of
from momentkv.backends.strides import side_by_side
from momentkv.codes import Coding

__all__ = [
    "REGISTER",
    "differentiated",
    "flash",
    "flash_causal",
    "flash_codes",
    "flash_fits",
    "flash_fits_codes",
    "flash_retained",
    "with_nan",
]

# Of fewer tokens than a register has numbers, the kernel gives zeros to a query of NaN.
REGISTER = 16
FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)


def flash_fits(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether `flash` may be called: it is a private operator of PyTorch's, for CPU tensors of one floating dtype."""
    return (
        FLASH is not None
        and q.ndim == 4
        and q.device.type == k.device.type == "cpu"
        and q.dtype == k.dtype == v.dtype
        and q.dtype in (torch.float32, torch.float64)  # halves would round the output before it is corrected
        and q.shape[-1] == v.shape[-1]
        and k.shape[-2] > 0
        and min(*q.shape, *k.shape) > 0
        and not differentiated(q, k, v)  # its lse has no gradient, and nothing says so
    )


def differentiated(*tensors: torch.Tensor) -> bool:
    """Whether a gradient is asked for."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float, valid: torch.Tensor | None = None
) -> AttentionState:
    """Attention state of queries that see all tokens.

    The group is folded into the query axis: the kernel then reads keys and values once for all of it. ``valid``, bool
    (batch, kv_head, n), hides slots, which must hold finite numbers all the same: their weight is zero.
    """
    heads = q.shape[:3]
    batch, kv_heads, n, d = k.shape
    folded, k, v = (side_by_side(x) for x in (q.reshape(batch, kv_heads, -1, d), k, v))
    mask = None
    if valid is not None:
        mask = torch.zeros_like(valid, dtype=q.dtype).masked_fill(~valid, -torch.inf)[..., None, :]
        mask = mask.expand(*folded.shape[:3], n)
    out, lse = FLASH(folded, k, v, attn_mask=mask, scale=scale)
    if valid is None and n < REGISTER:
        out, lse = with_nan(folded, out, lse)
    if valid is not None:
        # A query that sees no token: the kernel gives NaN, the empty state is zero.
        none = ~valid.any(-1)[..., None]
        out, lse = out.masked_fill(none[..., None], 0.0), lse.masked_fill(none, -torch.inf)
    return AttentionState(out.reshape(*heads, d), lse.reshape(heads))


def with_nan(q: torch.Tensor, *found: torch.Tensor) -> Iterator[torch.Tensor]:
    """Outputs and log-sum-exps that are NaN where a query is."""
    most = q.amax(-1)
    for x in found:
        # NaN, times zero, is NaN.
        yield torch.add(x, most[..., None] if x.ndim == q.ndim else most, alpha=0)


def flash_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> AttentionState:
    """Attention state of as many queries as tokens, each of which sees the tokens up to its own."""
    group = q.shape[-3] // k.shape[-3]
    q, k, v = (side_by_side(x) for x in (q, *(x.repeat_interleave(group, dim=-3) for x in (k, v))))
    return AttentionState(*with_nan(q, *FLASH(q, k, v, is_causal=True, scale=scale)))


def flash_retained(q: torch.Tensor, tiers: Tiers, *, scale: float) -> AttentionState:
    """Attention state over retained tokens, by one call if heads have equally many, else by one for each head."""
    layout = tiers.layout
    if layout.equal:
        k, v = (layout.rectangle(x, vectors=True) for x in (tiers.keys, tiers.values))
        return flash(q, k, v, scale=scale, valid=tiers.valid)
    group = q.shape[-3] // layout.heads
    states = []
    for head, (start, width) in enumerate(zip(layout.starts, layout.widths, strict=True)):
        k, v = (x[:, None, start : start + width] for x in (tiers.keys, tiers.values))
        own, valid = q[:, head * group : (head + 1) * group], tiers.valid
        if width == 0:
            states.append(nothing(own, v.shape[-1]))
            continue
        seen = None if valid is None else valid[:, head : head + 1, :width]
        states.append(flash(own, k, v, scale=scale, valid=seen))
    return AttentionState(torch.cat([x.out for x in states], dim=1), torch.cat([x.lse for x in states], dim=1))


def nothing(q: torch.Tensor, dv: int) -> AttentionState:
    """Attention state of queries that see no token."""
    return AttentionState(q.new_zeros((*q.shape[:-1], dv)), q.new_full(q.shape[:-1], -torch.inf))


def flash_fits_codes(q: torch.Tensor, coding: Coding) -> bool:
    """Whether `flash_codes` may be called."""
    keys, values = coding.key_standard.deviation, coding.value_standard.deviation
    return (
        FLASH is not None
        and q.ndim == 4
        and q.device.type == keys.device.type == "cpu"
        and keys.shape[-1] == values.shape[-1]
        and not differentiated(q, keys, values)
    )


def flash_codes(q: torch.Tensor, tiers: Tiers, coding: Coding, *, scale: float) -> AttentionState:
    """Attention state over retained tokens in few bits, for many queries: a head at a time is unpacked.

    With few queries it is faster to read codes as they are. Channels stay as they lie in records, without deviations
    and means: those of keys are in the queries, those of values in the output.
    """
    layout, dtype, heads = tiers.layout, dtype_of(q, coding.key_standard), q.shape[:-1]
    mean, deviation = coding.key_standard.mean, coding.key_standard.deviation.to(dtype)
    batch, kv_heads, d = deviation.shape
    folded = q.to(dtype).reshape(batch, kv_heads, -1, d)
    asked = coding.key_standard.ordered(folded * deviation[..., None, :])
    states = []
    for head, (start, width) in enumerate(zip(layout.starts, layout.widths, strict=True)):
        own, slots = asked[:, head : head + 1], slice(start, start + width)
        if width == 0:
            states.append(nothing(own, d))
            continue
        seen = None if tiers.valid is None else tiers.valid[:, head : head + 1, :width]
        k, v = (
            levels_of(codes[:, None, slots], step[:, None, slots], seen, standard, bits, dtype)
            for codes, step, standard, bits in (
                (tiers.keys, coding.key_step, coding.key_standard, coding.bits[0]),
                (tiers.values, coding.value_step, coding.value_standard, coding.bits[1]),
            )
        )
        states.append(flash(own, k, v, scale=scale, valid=seen))
    out, lse = torch.cat([x.out for x in states], dim=1), torch.cat([x.lse for x in states], dim=1)
    if mean is not None:
        lse = lse + scale * torch.matmul(folded, mean.to(dtype)[..., None])[..., 0]
    out = out * coding.value_standard.deviation.to(dtype)[..., None, :]
    return AttentionState(out.reshape(*heads, d), lse.reshape(heads))

"""Decode attention in plain PyTorch: what the fused operator does on a CPU, and what it is measured against."""

from __future__ import annotations

from typing import Any

import torch

from momentkv.attention import AttentionState
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.moments import Moments

__all__ = [
    "decode_counted",
    "decode_plain",
    "estimate_expansion",
    "flash",
    "flash_fits",
    "fold_plain",
    "join",
    "joined_output",
    "unpack",
]

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
    )


def flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float) -> AttentionState:
    """Attention state of queries that see all tokens, by the flash kernel for CPUs: no weights are ever held.

    The group is folded into the query axis: the kernel then reads keys and values once for all of it.
    """
    heads = q.shape[:3]
    batch, kv_heads, _, d = k.shape
    out, lse = FLASH(q.reshape(batch, kv_heads, -1, d), k, v, scale=scale)
    return AttentionState(out.reshape(*heads, d), lse.reshape(heads))


def estimate_expansion(q: torch.Tensor, expansion: Expansion, *, scale: float) -> AttentionState:
    """`momentkv.statistics.expansion.estimate_expansion` in few dispatches."""
    *batch, kv_heads, _, d = expansion.key_mean.shape
    x = q.to(expansion.key_mean.dtype).reshape(*batch, kv_heads, -1, d) * scale
    if expansion.anchor is not None:
        x = x - expansion.anchor[..., None, :]
    logits = torch.matmul(x, expansion.key_mean.mT) + expansion.log_weight[..., None, :]
    if logits.shape[-1] == 1:
        lse, out = logits, expansion.value_mean.expand(*logits.shape[:-1], -1)
    else:
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        out = torch.matmul(torch.exp(logits - lse.nan_to_num(neginf=0.0)), expansion.value_mean)
    if expansion.slope is not None:
        out = out + torch.matmul(x, expansion.slope.to(x.dtype))
    if expansion.slope_left is not None and expansion.slope_right is not None:
        out = out + torch.matmul(torch.matmul(x, expansion.slope_right.mT), expansion.slope_left.mT)
    if expansion.variance is not None and expansion.strength is not None and expansion.cap is not None:
        spread, half = expansion.variance.to(x.dtype), 0.5 * expansion.strength
        if spread.ndim == expansion.log_weight.ndim:
            gain = torch.matmul(x * x, (half[..., None] * spread)[..., None])
        else:
            gain = half[..., None, None] * (torch.matmul(x, spread) * x).sum(-1, keepdim=True)
        lse = lse + torch.minimum(gain, expansion.cap[..., None, None])
    out = out.masked_fill(lse == -torch.inf, 0.0)
    heads = q.shape[:-1]
    return AttentionState(out.reshape(*heads, out.shape[-1]), lse.reshape(heads))


def join(retained: AttentionState, evicted: AttentionState) -> AttentionState:
    """Merge two states of any shapes that agree, in few dispatches and in the dtype of the first."""
    return AttentionState(
        joined_output(retained, evicted), torch.logaddexp(retained.lse, evicted.lse.to(retained.lse.dtype))
    )


def joined_output(retained: AttentionState, evicted: AttentionState) -> torch.Tensor:
    """The output of `join` alone."""
    share = torch.sigmoid(evicted.lse - retained.lse).masked_fill(evicted.lse == -torch.inf, 0.0)
    return torch.lerp(retained.out, evicted.out.to(retained.out.dtype), share[..., None].to(retained.out.dtype))


def unpack(
    k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, capacity: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed tokens (n, d) as (batch, kv_head, capacity, d), and where each is; slots beyond repeat the last."""
    places = starts[..., None] + torch.arange(capacity, device=starts.device)
    places = places.clamp(max=max(k.shape[0] - 1, 0))
    if k.shape[0] == 0:
        shape = (*starts.shape, capacity)
        return k.new_zeros((*shape, k.shape[-1])), v.new_zeros((*shape, v.shape[-1])), places
    return k[places], v[places], places


def decode_plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor | None,
    counts: torch.Tensor | None,
    starts: torch.Tensor | None,
    capacity: int,
    expansion: Expansion | None,
    scale: float,
    scored: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What `momentkv.backends.triton.decode.decode_triton` does, in plain PyTorch."""
    if starts is not None:
        k, v, places = unpack(k, v, starts, capacity)
        if positions is not None:
            positions = positions[places] if positions.shape[0] else places - 1
    valid = None if positions is None else positions >= 0
    if counts is not None:
        used = torch.arange(capacity, device=k.device) < counts[..., None]
        valid = used if valid is None else used & valid
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    logits: Any = None
    if not scored and valid is None and flash_fits(q, k, v):
        state = flash(q, k, v, scale=scale)
    else:
        batch, kv_heads, n, d = k.shape
        k, v = k.to(dtype), v.to(dtype)
        if valid is not None:  # slots that hold no token may hold anything
            k, v = (x.masked_fill(~valid[..., None], 0.0) for x in (k, v))
        logits = torch.matmul(
            q.to(dtype).reshape(batch, kv_heads, q.shape[1] // kv_heads * q.shape[2], d) * scale, k.mT
        )
        if valid is not None:
            logits = logits.masked_fill(~valid[..., None, :], -torch.inf)
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        out = torch.matmul(torch.exp(logits - lse.nan_to_num(neginf=0.0)), v)
        state = AttentionState(out.reshape(*q.shape[:3], v.shape[-1]), lse.reshape(q.shape[:3]))
        logits = logits.reshape(batch, kv_heads, q.shape[1] // kv_heads, q.shape[2], n)
    if expansion is not None:
        state = join(state, estimate_expansion(q, expansion, scale=scale))
    return state.out.to(q.dtype), state.lse.to(torch.float32), logits if scored else None


def decode_counted(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    counts: torch.Tensor,
    expansion: Expansion | None,
    *,
    scale: float,
) -> torch.Tensor:
    """Output of `decode_plain` for heads whose first ``counts`` slots are in use, by one fused call where it fits.

    Unlike there, the other slots must hold finite numbers: they are read, and their weight is zero.
    """
    if not flash_fits(q, k, v):
        return decode_plain(q, k, v, None, counts, None, k.shape[2], expansion, scale, False)[0]
    batch, kv_heads, capacity, d = k.shape
    free = torch.arange(capacity, device=k.device) >= counts[..., None]
    mask = torch.zeros_like(free, dtype=q.dtype).masked_fill(free, -torch.inf)[..., None, :]
    folded = q.reshape(batch, kv_heads, -1, d)
    out, lse = FLASH(folded, k, v, attn_mask=mask.expand(*folded.shape[:3], capacity), scale=scale)
    state = AttentionState(out.reshape(q.shape), lse.reshape(q.shape[:3]))
    return state.out if expansion is None else join(state, estimate_expansion(q, expansion, scale=scale)).out


def fold_plain(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    score: torch.Tensor,
    counts: torch.Tensor,
    evicted: torch.Tensor,
    weight: torch.Tensor,
    log_weight: torch.Tensor,
    key_mean: torch.Tensor,
    value_mean: torch.Tensor,
    key_value: torch.Tensor | None,
    slope: torch.Tensor | None,
) -> None:
    """What the fold kernel of `momentkv.backends.triton` does, in PyTorch; which token fills which gap may differ."""
    capacity = keys.shape[-2]
    slots = evicted.clamp(min=0).long()
    real = evicted >= 0
    some = real.any(-1)
    k, v = (torch.take_along_dim(x, slots[..., None], dim=-2) for x in (keys, values))
    held = Moments(weight, key_mean, value_mean, None if key_value is None else key_value.mT)
    new = held.update(k, v, mask=real)
    weight.copy_(torch.where(some, new.weight, weight))
    log_weight.copy_(torch.where(some, new.weight.log(), log_weight))
    key_mean.copy_(torch.where(some[..., None], new.key_mean, key_mean))
    value_mean.copy_(torch.where(some[..., None], new.value_mean, value_mean))
    if key_value is not None and slope is not None and new.value_key is not None:
        whole = new.value_key.mT
        key_value.copy_(torch.where(some[..., None, None], whole, key_value))
        per_weight = whole / new.weight.masked_fill(new.weight == 0, 1.0)[..., None, None]
        slope.copy_(torch.where(some[..., None, None], per_weight.to(slope.dtype), slope))
    # As in the kernel: the last tokens that stay go to the gaps before them, in order of rank.
    left = counts - real.sum(-1).to(counts.dtype)
    tail = left[..., None] + torch.arange(evicted.shape[-1], device=keys.device)
    stays = (tail < counts[..., None]) & ~(tail[..., :, None] == evicted[..., None, :]).any(-1)
    gap = real & (slots < left[..., None])
    moving = torch.take_along_dim(tail, torch.argsort(stays.logical_not().to(torch.int8), dim=-1, stable=True), dim=-1)
    source = torch.take_along_dim(moving, (gap.cumsum(-1) - 1).clamp(min=0), dim=-1)
    row, head, _ = gap.nonzero(as_tuple=True)
    for x in (keys, values, positions, score):
        x[row, head, slots[gap]] = x[row, head, source[gap].long()]
    free = torch.arange(capacity, device=keys.device) >= left[..., None]
    positions.masked_fill_(free, -1)
    counts.copy_(left)

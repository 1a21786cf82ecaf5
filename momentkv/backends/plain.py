"""Decode attention in plain PyTorch: what the fused operator does on a CPU, and what it is measured against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from momentkv.attention import AttentionState
from momentkv.backends.flash import flash, flash_fits
from momentkv.backends.layout import Recent
from momentkv.backends.records import attend_logits, logits_of
from momentkv.codes import Coded, Coding
from momentkv.statistics.expansion import Expansion

__all__ = [
    "Prepared",
    "decode_plain",
    "estimate_expansion",
    "join",
    "joined_output",
    "prepare",
]


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


class Prepared(NamedTuple):
    """An expansion laid out so that decoding evaluates it in few dispatches.

    Attributes
    ----------
    against : tensor, shape (..., m + r, d)
        Keys of the groups, and below them the right factor of a slope of low rank.
    into : tensor, shape (..., m + r, dv)
        Values of the groups, and below them the left factor.
    log_weight : tensor, shape (..., 1, m)
    less_anchor : tensor, shape (..., 1, d), or None
    slope : tensor, shape (..., d, dv), or None
    half : tensor, shape (..., d, 1) or (..., d, d), or None
        Variance times half the strength.
    cap : tensor, shape (..., 1, 1), or None
    """

    against: torch.Tensor
    into: torch.Tensor
    log_weight: torch.Tensor
    less_anchor: torch.Tensor | None
    slope: torch.Tensor | None
    half: torch.Tensor | None
    cap: torch.Tensor | None

    def join(
        self, q: torch.Tensor, states: Sequence[AttentionState], *, scale: float, empty: bool = False
    ) -> torch.Tensor:
        """Output for queries (batch, kv_head * group, q_len, d) over other sets of tokens and those of the expansion.

        One softmax shares the attention among the groups and the other sets. Give ``empty`` if a query may see no token
        in any of the other sets.
        """
        batch, kv_heads, _, d = self.against.shape
        m, x = self.log_weight.shape[-1], q.reshape(batch, kv_heads, -1, d)
        x = x * scale if self.less_anchor is None else torch.add(self.less_anchor, x, alpha=scale)
        products = torch.matmul(x, self.against.mT)
        logits = products[..., :m] + self.log_weight
        if self.half is not None and self.cap is not None:
            full = self.half.shape[-1] > 1
            gain = (torch.matmul(x, self.half) * x).sum(-1, keepdim=True) if full else torch.matmul(x * x, self.half)
            logits = logits + torch.minimum(gain, self.cap)
        lead = logits.shape[:-1]
        logits = torch.cat([logits, *(state.lse.reshape(*lead, 1) for state in states)], dim=-1)
        shares = torch.softmax(logits, dim=-1)
        if empty:  # NaN stays where a query is none
            shares = shares.masked_fill(logits.amax(-1, keepdim=True) == -torch.inf, 0.0)
        own, *others = torch.split(shares, [m, *(1 for _ in states)], dim=-1)
        if products.shape[-1] > m:
            own = torch.cat([own, products[..., m:] * own.sum(-1, keepdim=True)], dim=-1)
        out = torch.matmul(own, self.into)
        if self.slope is not None:
            out = out + torch.matmul(x, self.slope) * own[..., :m].sum(-1, keepdim=True)
        for state, share in zip(states, others, strict=True):
            out = torch.addcmul(out, state.out.reshape(out.shape), share)
        return out.reshape(*q.shape[:-1], out.shape[-1])


def prepare(expansion: Expansion) -> Prepared:
    """`Prepared` of an expansion of tensors (batch, kv_head, ...) on a CPU."""
    against, into = expansion.key_mean, expansion.value_mean
    if expansion.slope_right is not None and expansion.slope_left is not None:
        against = torch.cat([against, expansion.slope_right], dim=-2)
        into = torch.cat([into, expansion.slope_left.mT], dim=-2)
    half = cap = None
    if expansion.variance is not None and expansion.strength is not None and expansion.cap is not None:
        diagonal = expansion.variance.ndim == expansion.log_weight.ndim
        spread = expansion.variance[..., None] if diagonal else expansion.variance
        half, cap = 0.5 * expansion.strength[..., None, None] * spread, expansion.cap[..., None, None]
    return Prepared(
        against=against,
        into=into,
        log_weight=expansion.log_weight[..., None, :],
        less_anchor=None if expansion.anchor is None else -expansion.anchor[..., None, :],
        slope=expansion.slope,
        half=half,
        cap=cap,
    )


def join(retained: AttentionState, evicted: AttentionState) -> AttentionState:
    """Merge two states of any shapes that agree, in few dispatches and in the dtype of the first."""
    return AttentionState(
        joined_output(retained, evicted), torch.logaddexp(retained.lse, evicted.lse.to(retained.lse.dtype))
    )


def joined_output(retained: AttentionState, evicted: AttentionState) -> torch.Tensor:
    """The output of `join` alone."""
    share = torch.sigmoid(evicted.lse - retained.lse).masked_fill(evicted.lse == -torch.inf, 0.0)
    return torch.lerp(retained.out, evicted.out.to(retained.out.dtype), share.unsqueeze(-1).to(retained.out.dtype))


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
    recent: Recent | None,
    expansion: Expansion | None,
    scale: float,
    scored: bool,
    coding: Coding | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What `momentkv.backends.triton.decode.decode_triton` does, in plain PyTorch."""
    if coding is not None and counts is not None and starts is not None:
        state, logits = attend_coded(q, k, v, coding, counts, starts, capacity, scale=scale, scored=scored)
    else:
        state, logits = attend_slots(q, k, v, positions, counts, starts, capacity, scale=scale, scored=scored)
    if recent is not None:
        places = None if recent.valid is None else recent.valid.to(torch.int32) - 1
        n = recent.keys.shape[-2]
        newest, more = attend_slots(q, *recent[:2], places, None, None, n, scale=scale, scored=scored)
        state = join(state, newest)
        if logits is not None and more is not None:
            logits = torch.cat([logits, more], dim=-1)
    if expansion is not None:
        state = join(state, estimate_expansion(q, expansion, scale=scale))
    return state.out.to(q.dtype), state.lse.to(torch.float32), logits


def attend_slots(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor | None,
    counts: torch.Tensor | None,
    starts: torch.Tensor | None,
    capacity: int,
    *,
    scale: float,
    scored: bool,
) -> tuple[AttentionState, torch.Tensor | None]:
    """Attention state over the slots that hold a token, and logits if asked for."""
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
    return state, logits if scored else None


def attend_coded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    coding: Coding,
    counts: torch.Tensor,
    starts: torch.Tensor,
    capacity: int,
    *,
    scale: float,
    scored: bool,
) -> tuple[AttentionState, torch.Tensor | None]:
    """`attend_slots` of packed records."""
    used = torch.arange(capacity, device=q.device) < counts[..., None]
    keys, values, _ = unpack(k, v, starts, capacity)
    both = unpack(coding.key_step[:, None], coding.value_step[:, None], starts, capacity)[:2]
    # Slots that hold no token may hold anything.
    key_step, value_step = (torch.where(used, step[..., 0], 0.0) for step in both)
    coded = Coded(coding.bits, keys, values, key_step, value_step, coding.key_standard, coding.value_standard)
    logits = logits_of(q, coded, scale=scale, mask=used[..., None, None, :])
    state, weights = attend_logits(logits, q, coded)
    return state, logits.reshape(weights.shape) if scored else None

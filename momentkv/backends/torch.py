"""PyTorch: fused attention for prefill; for decoding one Triton kernel on CUDA, elsewhere few dispatches."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Sequence
from functools import cache
from typing import ClassVar

import torch
from torch.nn.functional import scaled_dot_product_attention

from momentkv._array import Array
from momentkv.attention import AttentionState
from momentkv.backends._expansion import Expansion, expand
from momentkv.backends.base import ArrayBackend, causal_mask
from momentkv.backends.operators import DTYPES, decode
from momentkv.backends.plain import flash, flash_fits
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import Summaries

__all__ = ["TorchBackend"]


class TorchBackend(ArrayBackend):
    """Plain torch operators, and for decoding on CUDA the operator `momentkv.backends.operators.decode`.

    Logits, softmax sums and outputs are float32 (float64 for float64 inputs); outputs of the operator are of the dtype
    of the queries. The operator has no gradient: where one is asked for, plain operators are used.
    """

    name: ClassVar[str] = "torch"

    def attend(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Array | None = None
    ) -> tuple[AttentionState, Array]:
        dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        *batch, kv_heads, n, d = k.shape
        q_heads, q_len = q.shape[-3], q.shape[-2]
        if n == 0:
            return super().attend(q, k, v, scale=scale, mask=mask)
        folded = (q * scale).reshape(*batch, kv_heads, -1, d)
        logits = torch.matmul(folded, k.transpose(-1, -2))
        if mask is not None:
            logits = logits.reshape(*batch, kv_heads, -1, q_len, n).masked_fill(~mask, -torch.inf)
            logits = logits.reshape(*batch, kv_heads, -1, n)
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        # A query that sees nothing has lse = -inf; shifting by 0 instead leaves all its weights at zero.
        weights = torch.exp(logits - lse) if mask is None else torch.exp(logits - lse.nan_to_num(neginf=0.0))
        out = torch.matmul(weights, v).reshape(*batch, q_heads, q_len, -1)
        return (
            AttentionState(out, lse.reshape(*batch, q_heads, q_len)),
            weights.reshape(*batch, kv_heads, -1, q_len, n),
        )

    def decode(
        self,
        q: Array,
        k: Array,
        v: Array,
        moments: Moments | Summaries | None,
        *,
        order: int,
        scale: float,
        valid: Array | None = None,
        weights: bool = False,
    ) -> tuple[Array, Array | None]:
        if fuses(q, k, v):
            expansion = None if moments is None else expand(moments, order=order)
            positions = None if valid is None else valid.expand(k.shape[:-1]).to(torch.int32) - 1
            out, _, logits = decode(q, k, v, expansion, scale=scale, positions=positions, scored=weights)
            # A query that sees nothing has logits of -inf alone; all its weights are zero.
            return out, None if logits is None else torch.softmax(logits, dim=-1).nan_to_num(nan=0.0)
        if not weights and valid is None and flash_fits(q, k, v):
            state = flash(q, k, v, scale=scale)
            return (state.out if moments is None else self.correct(state, q, moments, order=order, scale=scale)), None
        return super().decode(q, k, v, moments, order=order, scale=scale, valid=valid, weights=weights)

    def decode_ragged(
        self,
        q: Array,
        keys: Sequence[Array],
        values: Sequence[Array],
        moments: Moments | Summaries | None,
        *,
        order: int,
        scale: float,
        valid: Sequence[Array | None],
        weights: bool = False,
    ) -> tuple[Array, list[Array] | None]:
        if fuses(q, keys[0], values[0]):
            expansion = None if moments is None else expand(moments, order=order)
            return decode_packed(q, keys, values, expansion, scale=scale, valid=valid, weights=weights)
        return super().decode_ragged(q, keys, values, moments, order=order, scale=scale, valid=valid, weights=weights)

    def correct(
        self, retained: AttentionState, q: Array, moments: Moments | Summaries, *, order: int, scale: float
    ) -> Array:
        if isinstance(moments, Summaries):
            return self.correct_summaries(retained, q, moments, scale=scale)
        *batch, kv_heads, d = moments.key_mean.shape
        folded = q.to(moments.key_mean.dtype).reshape(*batch, kv_heads, -1, d) * scale
        # log 0 = -inf: a head without evicted tokens gets the share 0, whatever its (finite) estimate.
        lse = torch.matmul(folded, moments.key_mean[..., None]) + moments.weight.log()[..., None, None]
        out = moments.value_mean[..., None, :]
        if order == 1 and moments.value_key is not None:
            weight = moments.weight.masked_fill(moments.weight == 0, 1.0)
            out = out + torch.matmul(folded / weight[..., None, None], moments.value_key.mT)
        else:
            out = out.expand(*batch, kv_heads, folded.shape[-2], -1)
        return self.join(retained, lse, out)

    def correct_summaries(self, retained: AttentionState, q: Array, summaries: Summaries, *, scale: float) -> Array:
        *batch, kv_heads, d = summaries.anchor.shape
        off = torch.add(
            -summaries.anchor[..., None, :], q.to(summaries.anchor.dtype).reshape(*batch, kv_heads, -1, d), alpha=scale
        )
        logits = torch.matmul(off, summaries.key_mean.mT) + summaries.log_weight[..., None, :]
        lse = torch.logsumexp(logits, dim=-1, keepdim=True)
        out = torch.matmul(torch.exp(logits - lse.nan_to_num(neginf=0.0)), summaries.value_mean)
        if summaries.rank:
            out = out + torch.matmul(torch.matmul(off, summaries.slope_right.mT), summaries.slope_left.mT)
        gain = torch.matmul(off * off, (0.5 * summaries.strength[..., None] * summaries.key_variance)[..., None])
        lse = lse + torch.minimum(gain, summaries.cap[..., None, None])
        return self.join(retained, lse, out)

    def join(self, retained: AttentionState, lse: Array, out: Array) -> Array:
        """Merge an estimate, grouped by KV head, with the state of the retained tokens."""
        heads = retained.lse.shape
        lse, out = lse.reshape(heads), out.reshape(*heads, -1)
        share = torch.sigmoid(lse - retained.lse).masked_fill(lse == -torch.inf, 0.0)
        return torch.lerp(retained.out, out.to(retained.out.dtype), share[..., None].to(retained.out.dtype))

    def prefill(self, q: Array, k: Array, v: Array, *, scale: float, valid: Array | None = None) -> Array:
        q_len, n = q.shape[-2], k.shape[-2]
        grouped = q.shape[-3] != k.shape[-3]
        if valid is None and q_len == n:
            return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        blocks = []
        for start in range(0, q_len, self.query_block):
            stop = min(start + self.query_block, q_len)
            visible = n - q_len + stop
            mask = causal_mask(k, q_len, start, stop, valid)
            if valid is not None:
                mask = mask.expand(*k.shape[:-2], q.shape[-3] // k.shape[-3], stop - start, visible)
                mask = mask.flatten(-4, -3)
            block = scaled_dot_product_attention(
                q[..., start:stop, :],
                k[..., :visible, :],
                v[..., :visible, :],
                attn_mask=mask,
                scale=scale,
                enable_gqa=grouped,
            )
            # Kernels differ in what a query that sees nothing returns (NaN, zero, the mean value); here it is zero.
            blocks.append(block if valid is None else block.masked_fill(~mask.any(-1, keepdim=True), 0.0))
        return torch.cat(blocks, dim=-2)


def decode_packed(
    q: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    expansion: Expansion | None,
    *,
    scale: float,
    valid: Sequence[torch.Tensor | None],
    weights: bool,
) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
    """`TorchBackend.decode_ragged` by one call of the operator, for which the tokens of all heads are packed."""
    numbers = [k.shape[-2] for k in keys]
    batch, capacity = q.shape[0], max(numbers)
    before = [batch * sum(numbers[:head]) for head in range(len(numbers))]
    starts = [[first + row * n for first, n in zip(before, numbers, strict=True)] for row in range(batch)]
    positions = None
    if any(seen is not None for seen in valid):
        every = (
            torch.ones_like(k[..., 0], dtype=torch.bool) if x is None else x for k, x in zip(keys, valid, strict=True)
        )
        positions = torch.cat([seen.reshape(-1) for seen in every]).to(torch.int32) - 1
    out, _, logits = decode(
        q,
        torch.cat([k.reshape(-1, k.shape[-1]) for k in keys]),
        torch.cat([v.reshape(-1, v.shape[-1]) for v in values]),
        expansion,
        scale=scale,
        positions=positions,
        counts=torch.tensor([numbers] * batch, dtype=torch.int32, device=q.device),
        starts=torch.tensor(starts, dtype=torch.int64, device=q.device),
        capacity=capacity,
        scored=weights,
    )
    if logits is None:
        return out, None
    each = [logits[:, head : head + 1, ..., :n] for head, n in enumerate(numbers)]
    return out, [torch.softmax(x, dim=-1).nan_to_num(nan=0.0) for x in each]


def fuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the Triton kernel takes these tensors: on CUDA, of one of its dtypes, without a gradient."""
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    fitting = q.is_cuda and q.ndim == 4 and q.dtype == k.dtype == v.dtype and q.dtype in DTYPES
    return fitting and not differentiated and has_triton()


@cache
def has_triton() -> bool:
    """Whether Triton is installed; if not, say once what is lost."""
    if importlib.util.find_spec("triton") is not None:
        return True
    warnings.warn(
        "Triton is not installed: momentkv.backends.torch decodes on CUDA by plain PyTorch operators, which is slower "
        "and reads more memory than its fused kernel; run pip install triton",
        RuntimeWarning,
        stacklevel=4,
    )
    return False

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
from momentkv.backends.base import ArrayBackend, causal_mask
from momentkv.backends.operators import DTYPES, decode
from momentkv.backends.plain import estimate_expansion, flash, flash_fits, joined_output
from momentkv.statistics.expansion import Expansion

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
        expansion: Expansion | None,
        *,
        scale: float,
        valid: Array | None = None,
        weights: bool = False,
    ) -> tuple[Array, Array | None]:
        if fuses(q, k, v):
            positions = None if valid is None else valid.expand(k.shape[:-1]).to(torch.int32) - 1
            out, _, logits = decode(q, k, v, expansion, scale=scale, positions=positions, scored=weights)
            # A query that sees nothing has logits of -inf alone; all its weights are zero.
            return out, None if logits is None else torch.softmax(logits, dim=-1).nan_to_num(nan=0.0)
        if not weights and valid is None and flash_fits(q, k, v):
            state = flash(q, k, v, scale=scale)
            return (state.out if expansion is None else self.correct(state, q, expansion, scale=scale)), None
        return super().decode(q, k, v, expansion, scale=scale, valid=valid, weights=weights)

    def decode_ragged(
        self,
        q: Array,
        keys: Sequence[Array],
        values: Sequence[Array],
        expansion: Expansion | None,
        *,
        scale: float,
        valid: Sequence[Array | None],
        weights: bool = False,
    ) -> tuple[Array, list[Array] | None]:
        if fuses(q, keys[0], values[0]):
            return decode_packed(q, keys, values, expansion, scale=scale, valid=valid, weights=weights)
        return super().decode_ragged(q, keys, values, expansion, scale=scale, valid=valid, weights=weights)

    def correct(self, retained: AttentionState, q: Array, expansion: Expansion, *, scale: float) -> Array:
        return joined_output(retained, estimate_expansion(q, expansion, scale=scale))

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

"""PyTorch: fused attention for prefill; for decoding one Triton kernel on CUDA, elsewhere few dispatches."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch
from array_api_compat import is_torch_array
from torch.nn.functional import scaled_dot_product_attention

from momentkv._array import Array
from momentkv.attention import AttentionState
from momentkv.backends.autocast import without_autocast
from momentkv.backends.available import has_triton
from momentkv.backends.base import ArrayBackend, causal_mask
from momentkv.backends.flash import (
    REGISTER,
    differentiated,
    flash,
    flash_causal,
    flash_codes,
    flash_fits,
    flash_fits_codes,
    flash_retained,
    with_nan,
)
from momentkv.backends.layout import Layout, Tiers
from momentkv.backends.numba.clusters import cluster_compiled
from momentkv.backends.numba.decode import attend_compiled, compiles
from momentkv.backends.numba.rounded import compiles_rounded, rounded_compiled
from momentkv.backends.numba.tokens import compiles_tokens, tokens_compiled
from momentkv.backends.operators import DTYPES, decode, reads_codes
from momentkv.backends.placed import kept
from momentkv.backends.plain import Prepared, estimate_expansion, join, joined_output, prepare
from momentkv.backends.records import BLOCK, attend_packed, attend_records
from momentkv.backends.writing import only_written
from momentkv.codes import Coded, Standard
from momentkv.statistics.clustering import FASTER
from momentkv.statistics.expansion import Expansion

__all__ = ["TorchBackend"]

# Bytes that an eviction works on at once where a launch costs more than the work on a layer: enough that a few launches
# serve a model, and so few that copies of them are small beside it.
AT_ONCE_ON_DEVICE = 128 * 2**20
# Queries that attend to codes at once by plain operators, and from how many on these are unpacked.
QUERIES, FEW = 64, 16
FASTER["torch"] = cluster_compiled


class TorchBackend(ArrayBackend):
    """Plain torch operators, and for decoding on CUDA the operator `momentkv.backends.operators.decode`.

    Logits, softmax sums and outputs are float32 (float64 for float64 inputs); outputs of the operator are of the dtype
    of the queries. The operator has no gradient: where one is asked for, plain operators are used.
    """

    name: ClassVar[str] = "torch"

    def reads(self, x: Array) -> bool:
        return bool(is_torch_array(x))

    def as_given(self) -> AbstractContextManager[object]:
        return without_autocast()

    def freezes(self) -> bool:
        return torch.is_inference_mode_enabled()

    def is_frozen(self, x: Array) -> bool:
        return bool(x.is_inference())

    def attend(
        self, q: Array, k: Array, v: Array, *, scale: float, mask: Array | None = None
    ) -> tuple[AttentionState, Array]:
        dtype = wide_dtype(q, k, v)
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
        top = logits.detach().amax(dim=-1, keepdim=True)
        if mask is not None:
            # A query that sees nothing has a top of -inf; shifting by 0 instead leaves all its weights at zero.
            top = top.masked_fill(top == -torch.inf, 0.0)
        weights = logits.sub_(top).exp_()
        total = weights.sum(dim=-1, keepdim=True)
        lse = total.log() + top
        safe = total if mask is None else total.where(total > 0, 1.0)
        # A gradient needs the numerators.
        weights = weights / safe if weights.requires_grad else weights.div_(safe)
        out = torch.matmul(weights, v).reshape(*batch, q_heads, q_len, -1)
        return (
            AttentionState(out, lse.reshape(*batch, q_heads, q_len)),
            weights.reshape(*batch, kv_heads, -1, q_len, n),
        )

    def attend_causal(
        self, q: Array, k: Array, v: Array, *, scale: float, valid: Array | None = None
    ) -> AttentionState:
        before, wide = k.shape[-2] - q.shape[-2], [q, k, v]
        if q.device.type == "cpu":  # of halves the kernel would round the output
            wide = [x.to(wide_dtype(q, k, v)) for x in wide]
        if valid is not None or not flash_fits(*wide):
            return super().attend_causal(q, k, v, scale=scale, valid=valid)
        own = flash_causal(wide[0], *(x[..., before:, :] for x in wide[1:]), scale=scale)
        if before == 0:
            return own
        return join(flash(wide[0], *(x[..., :before, :] for x in wide[1:]), scale=scale), own)

    def attend_retained(
        self, q: Array, tiers: Tiers, *, scale: float, weights: bool
    ) -> tuple[AttentionState | None, Array | None]:
        coding, few = tiers.coding, q.ndim == 4 and tiers.keys.shape[-2] <= BLOCK
        if coding is not None and not weights and tiers.layout.width:
            if compiles(q, tiers):
                return attend_compiled(q, tiers.retained, scale=scale), None
            if q.shape[-2] > FEW and flash_fits_codes(q, coding):
                return flash_codes(q, tiers, coding, scale=scale), None
        if coding is not None and not weights and q.shape[-2] > QUERIES and tiers.layout.width:
            # Attention to codes holds a number for each query and token, so a chunk is read by blocks of queries.
            parts = (self.attend_retained(x, tiers, scale=scale, weights=False)[0] for x in q.split(QUERIES, dim=-2))
            out, lse = zip(*(state for state in parts if state is not None), strict=True)
            return AttentionState(torch.cat(out, dim=-2), torch.cat(lse, dim=-1)), None
        if coding is not None and few and not tiers.layout.equal:
            return attend_packed(q, tiers, coding, scale=scale)
        return super().attend_retained(q, tiers, scale=scale, weights=weights)

    def attend_codes(
        self, q: Array, coded: Coded, *, scale: float, mask: Array | None = None
    ) -> tuple[AttentionState, Array]:
        if coded.keys.shape[-2] == 0:
            return super().attend_codes(q, coded, scale=scale, mask=mask)
        return attend_records(q, coded, scale=scale, mask=mask)

    def attend_stored(
        self, q: Array, tiers: Tiers, *, scale: float, weights: bool = False
    ) -> tuple[AttentionState, Array | None]:
        tiers = with_own_recent(q, tiers)
        if not weights and compiles(q, tiers):
            return attend_compiled(q, tiers, scale=scale), None
        if weights and tiers.layout.equal and tiers.layout.width and tiers.coding is None:
            return attend_both(q, tiers, scale=scale)
        if weights or not flash_fits(q, tiers.recent_keys, tiers.recent_values):
            return super().attend_stored(q, tiers, scale=scale, weights=weights)
        recent = flash(q, tiers.recent_keys, tiers.recent_values, scale=scale, valid=tiers.recent_valid)
        if tiers.layout.width == 0:
            return recent, None
        return join(attend_most(self, q, tiers, scale=scale), recent), None

    def prepare(self, expansion: Expansion) -> Any:
        on_cpu = expansion.key_mean.ndim == 4 and expansion.key_mean.device.type == "cpu"
        return prepare(expansion) if on_cpu else expansion

    def decode(
        self, q: Array, tiers: Tiers, expansion: Any, *, scale: float, weights: bool = False
    ) -> tuple[Array, Array | None]:
        if isinstance(expansion, Prepared):
            if not weights and compiles(q, tiers, expansion):
                return attend_compiled(q, tiers, expansion, scale=scale).out, None
            return decode_prepared(self, q, with_own_recent(q, tiers), expansion, scale=scale, weights=weights)
        readable = tiers.coding is None or reads_codes(tiers.coding, q.dtype)
        if readable and fuses(q, tiers.recent_keys, tiers.recent_values):
            return decode_tiers(q, tiers, expansion, scale=scale, weights=weights)
        return super().decode(q, tiers, expansion, scale=scale, weights=weights)

    def index_of(self, layout: Layout, name: str, x: Array) -> Array:
        where = x.device
        placed: torch.Tensor = kept(layout, (name, where), lambda: torch.as_tensor(getattr(layout, name), device=where))
        return placed

    def numbers(self, layout: Layout, values: tuple[int, ...], like: Array) -> Array:
        where = like.device
        made: torch.Tensor = kept(
            layout, (values, where), lambda: torch.tensor(values, dtype=torch.int32, device=where)
        )
        return made

    def write_at(self, x: Array, start: int, new: Array, *, axis: int) -> Array:
        x.narrow(axis, start, new.shape[axis]).copy_(new)
        return x

    def write(self, x: Array, index: Array, new: Array, *, axis: int) -> Array:
        slots = index.long()
        if 0 in (slots.shape[-1], x.shape[axis]):
            return x
        new = new.to(x.dtype).expand(*slots.shape, *x.shape[x.ndim + axis + 1 :])
        if slots.shape[-1] > 1:
            # Only a CPU knows without waiting how many are written, and then writes those alone.
            if slots.device.type == "cpu" and not torch.compiler.is_compiling():
                rows = (slots >= 0).nonzero(as_tuple=True)
                x[(*rows[:-1], slots[rows])] = new[rows]
                return x
            slots, new = only_written(x, slots, new, axis)
        return x.scatter_(axis, slots[..., None].expand(new.shape) if axis == -2 else slots, new)

    def tokens(self, layout: Layout, codes: Array, step: Array, standard: Standard, bits: int) -> Array:
        if compiles_tokens(codes, step, standard):
            return tokens_compiled(layout, codes, step, standard, bits)
        return super().tokens(layout, codes, step, standard, bits)

    def rounded(self, x: Array, standard: Standard, bits: int, exact: Array) -> Array:
        if compiles_rounded(x, standard):
            return rounded_compiled(x, standard, bits, exact)
        return super().rounded(x, standard, bits, exact)

    def overwrite(self, x: Array, new: Array) -> Array:
        return x.copy_(new)

    def at_once(self, x: Array) -> int:
        return super().at_once(x) if x.device.type == "cpu" else AT_ONCE_ON_DEVICE

    def joined_at_once(self, x: Array) -> int:
        return super().joined_at_once(x) if x.device.type == "cpu" else AT_ONCE_ON_DEVICE

    def overwrite_all(self, xs: Sequence[Array], new: Sequence[Array]) -> list[Array]:
        if xs:
            torch._foreach_copy_(list(xs), list(new))
        return list(xs)

    def split(self, x: Array, sizes: Sequence[int], *, axis: int, copy: bool) -> list[Array]:
        split: Any = torch.split_with_sizes_copy if copy else torch.split_with_sizes
        return list(split(x.detach(), list(sizes), axis))

    def fixed(self, x: Array) -> Array:
        fixed = self.copy(x)
        torch._dynamo.mark_static_address(fixed)
        return fixed

    def copy(self, x: Array) -> Array:
        return x.detach().clone(memory_format=torch.contiguous_format)

    def compact(self, x: Array) -> Array:
        return x if x.untyped_storage().nbytes() == x.nbytes else self.copy(x)

    def detach(self, x: Array) -> Array:
        return x.detach()

    def differentiates(self, x: Array) -> bool:
        return differentiated(x)

    def correct(self, retained: AttentionState, q: Array, expansion: Expansion, *, scale: float) -> Array:
        return joined_output(retained, estimate_expansion(q, expansion, scale=scale))

    def prefill(self, q: Array, k: Array, v: Array, *, scale: float, valid: Array | None = None) -> Array:
        q_len, n = q.shape[-2], k.shape[-2]
        grouped = q.shape[-3] != k.shape[-3]
        if not q.dtype == k.dtype == v.dtype:  # kernels take one
            common = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
            q, k, v = q.to(common), k.to(common), v.to(common)
        if valid is None and q_len == n:
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
            # As in `flash`.
            return next(with_nan(q, out)) if n < REGISTER and q.device.type == "cpu" else out
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


def wide_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What logits, sums and outputs are computed in."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def attend_most(backend: TorchBackend, q: torch.Tensor, tiers: Tiers, *, scale: float) -> AttentionState:
    """Attention state over retained tokens, where there are any and flash reads the recent ones."""
    if tiers.coding is None:
        return flash_retained(q, tiers, scale=scale)
    state: Any = backend.attend_retained(q, tiers, scale=scale, weights=False)[0]
    return state


def decode_prepared(
    backend: TorchBackend, q: torch.Tensor, tiers: Tiers, expansion: Prepared, *, scale: float, weights: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`TorchBackend.decode` on a CPU: retained, recent and evicted tokens joined at once."""
    attention = None
    if weights or not flash_fits(q, tiers.recent_keys, tiers.recent_values):
        state, attention = backend.attend_stored(q, tiers, scale=scale, weights=weights)
        states = [state]
    else:
        states = [flash(q, tiers.recent_keys, tiers.recent_values, scale=scale, valid=tiers.recent_valid)]
        if tiers.layout.width:
            states.insert(0, attend_most(backend, q, tiers, scale=scale))
    dtype = expansion.into.dtype
    if states[0].out.dtype != dtype:
        states = [AttentionState(state.out.to(dtype), state.lse.to(dtype)) for state in states]
    # Where all recent slots hold a token, every query sees one.
    empty = tiers.recent_valid is not None or tiers.recent_keys.shape[-2] == 0
    return expansion.join(q.to(dtype), states, scale=scale, empty=empty), attention


def attend_both(q: torch.Tensor, tiers: Tiers, *, scale: float) -> tuple[AttentionState, torch.Tensor]:
    """Attention state and weights over retained and recent tokens, by one softmax over the logits of both."""
    layout = tiers.layout
    parts = [
        (layout.rectangle(tiers.keys, vectors=True), layout.rectangle(tiers.values, vectors=True), tiers.valid),
        (tiers.recent_keys, tiers.recent_values, tiers.recent_valid),
    ]
    dtype = wide_dtype(q, tiers.keys, tiers.values)
    *batch, kv_heads, _, d = tiers.recent_keys.shape
    folded = (q.to(dtype) * scale).reshape(*batch, kv_heads, -1, d)
    logits = torch.cat([torch.matmul(folded, k.to(dtype).mT) for k, _, _ in parts], dim=-1)
    if tiers.valid is not None or tiers.recent_valid is not None:
        valid = torch.cat([torch.ones_like(k[..., 0], dtype=torch.bool) if x is None else x for k, _, x in parts], -1)
        logits = logits.masked_fill(~valid[..., None, :], -torch.inf)
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    # A query that sees nothing has lse = -inf; shifting by 0 instead leaves all its weights at zero.
    weights = torch.exp(logits - (lse if tiers.valid is None else lse.nan_to_num(neginf=0.0)))
    old, new = weights[..., : layout.width], weights[..., layout.width :]
    out = torch.matmul(old, parts[0][1].to(dtype)) + torch.matmul(new, parts[1][1].to(dtype))
    heads = q.shape[:-1]
    weights = weights.reshape(*batch, kv_heads, -1, q.shape[-2], weights.shape[-1])
    return AttentionState(out.reshape(*heads, out.shape[-1]), lse.reshape(heads)), weights


def decode_tiers(
    q: torch.Tensor, tiers: Tiers, expansion: Expansion | None, *, scale: float, weights: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`TorchBackend.decode` by one call of the fused operator."""
    layout = tiers.layout
    batch, slots = tiers.recent_keys.shape[0], sum(layout.widths)
    if slots == 0:
        positions = None if tiers.recent_valid is None else tiers.recent_valid.to(torch.int32) - 1
        out, _, logits = decode(
            q, tiers.recent_keys, tiers.recent_values, expansion, scale=scale, positions=positions, scored=weights
        )
    else:
        starts, counts = packed_slots(layout, batch, q.device)
        if tiers.valid is not None:
            counts = tiers.valid.sum(-1, dtype=torch.int32)
        coding = tiers.coding
        if coding is not None:
            coding = coding._replace(key_step=coding.key_step.reshape(-1), value_step=coding.value_step.reshape(-1))
        out, _, logits = decode(
            q,
            tiers.keys.reshape(batch * slots, -1),
            tiers.values.reshape(batch * slots, -1),
            expansion,
            scale=scale,
            counts=counts,
            starts=starts,
            capacity=layout.width,
            recent=tiers.recent,
            scored=weights,
            coding=coding,
        )
    # A query that sees nothing has logits of -inf alone; all its weights are zero.
    return out, None if logits is None else torch.softmax(logits, dim=-1).nan_to_num(nan=0.0)


def with_own_recent(q: torch.Tensor, tiers: Tiers) -> Tiers:
    """Tiers whose recent tokens are copies where a graph keeps them: later steps write into the cache's."""
    if not differentiated(q):
        return tiers
    return tiers._replace(recent_keys=tiers.recent_keys.clone(), recent_values=tiers.recent_values.clone())


def packed_slots(layout: Layout, batch: int, where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """First slot and number of slots of each row and head, where rows lie one after the other."""

    def make() -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.arange(batch, device=where)[:, None] * sum(layout.widths)
        starts = rows + torch.tensor(layout.starts, device=where)
        return starts, torch.tensor(layout.widths, dtype=torch.int32, device=where).expand(batch, -1).contiguous()

    slots: tuple[torch.Tensor, torch.Tensor] = kept(layout, ("packed slots", batch, where), make)
    return slots


def fuses(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether the Triton kernel takes these tensors: on CUDA, of one of its dtypes, without a gradient."""
    fitting = q.is_cuda and q.ndim == 4 and q.dtype == k.dtype == v.dtype and q.dtype in DTYPES
    return fitting and not differentiated(q, k, v) and has_triton()

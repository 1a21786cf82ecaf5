"""Attention to records in plain PyTorch: codes are unpacked eight bytes at a time."""

from __future__ import annotations

from functools import lru_cache

import torch

from momentkv.attention import AttentionState
from momentkv.backends.layout import Tiers
from momentkv.codes import GRADES, PLANES, Coded, Coding, Standard, centre, less_centre, row_bytes, unpack

__all__ = ["attend_logits", "attend_packed", "attend_records", "logits_of", "unpack_words"]

# Words of so many bytes, the widest first.
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
# Tokens whose codes are unpacked at once, of all heads of a layer or of one.
BLOCK = 8192


def unpack_words(packed: torch.Tensor, bits: int, d: int) -> torch.Tensor:
    """`momentkv.codes.unpack`: shifts and masks of words, each of which does so to all of its bytes."""
    sizes = [-(-d * width // 8) for width in PLANES[bits]]
    wide = next((wide for wide in WORDS if all(m % wide == 0 for m in sizes)), None)
    exact = all(8 * m == d * width for m, width in zip(sizes, PLANES[bits], strict=True))
    if wide is None or not exact or bits > 8 or not packed.is_contiguous():
        return unpack(packed, bits, d)
    words = packed.view(WORDS[wide])
    codes: torch.Tensor | None = None
    start = 0
    for width, m in zip(PLANES[bits], sizes, strict=True):
        plane = words[..., start : start + m // wide]
        start += m // wide
        if width < 8:
            # The mask removes what a shift brings in from the next byte, or as sign.
            shifts, mask = shifts_of(width, wide, packed.device)
            plane = ((plane[..., None, :] >> shifts) & mask).flatten(-2)
        codes = plane if codes is None else (codes << width) | plane
    whole: torch.Tensor = words if codes is None else codes
    return whole.view(torch.uint8)


@lru_cache(maxsize=64)
def shifts_of(width: int, wide: int, where: torch.device) -> tuple[torch.Tensor, int]:
    """Shifts (count, 1) of a plane, and the bits that are kept of every byte of a word."""
    mask = int.from_bytes(bytes([2**width - 1]) * wide, "little")
    return torch.arange(0, 8, width, dtype=WORDS[wide], device=where)[:, None], mask


def attend_records(
    q: torch.Tensor, coded: Coded, *, scale: float, mask: torch.Tensor | None = None
) -> tuple[AttentionState, torch.Tensor]:
    """`momentkv.codes.attend_codes` in few dispatches."""
    return attend_logits(logits_of(q, coded, scale=scale, mask=mask), q, coded)


def logits_of(q: torch.Tensor, coded: Coded, *, scale: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (..., kv_head, group * q_len, n) of all tokens; ``-inf`` where the mask is False."""
    of_keys, of_key = coded.key_standard, coded.bits[0]
    mean, deviation = of_keys.mean, of_keys.deviation
    dtype = torch.float64 if torch.float64 in (q.dtype, deviation.dtype) else torch.float32
    *batch, kv_heads, n, _ = coded.keys.shape
    q_len, d = q.shape[-2], deviation.shape[-1]
    folded = q.to(dtype).reshape(*batch, kv_heads, -1, d) * scale
    tilted = in_order(folded * deviation.to(dtype)[..., None, :], of_keys)
    zero = (less_centre(of_key, of_keys, tilted) * tilted).sum(-1, keepdim=True)
    products = [torch.matmul(tilted, numbers(coded.keys, block, of_key, of_keys, dtype).mT) for block in blocks_of(n)]
    logits = (products[0] if len(products) == 1 else torch.cat(products, dim=-1)) - zero
    logits = logits * coded.key_step.to(dtype)[..., None, :]
    if mean is not None:
        logits = logits + torch.matmul(folded, mean.to(dtype)[..., None])
    if mask is not None:
        shape = logits.shape
        logits = (
            logits.reshape(*batch, kv_heads, q.shape[-3] // kv_heads, q_len, n)
            .masked_fill(~mask, -torch.inf)
            .reshape(shape)
        )
    return logits


def blocks_of(n: int) -> list[slice]:
    """Tokens whose codes are unpacked at once."""
    return [slice(start, min(start + BLOCK, n)) for start in range(0, max(n, 1), BLOCK)]


def attend_logits(logits: torch.Tensor, q: torch.Tensor, coded: Coded) -> tuple[AttentionState, torch.Tensor]:
    """Attention state and weights of the logits that `logits_of` gave of the same."""
    of_values, of_value, n, dtype = coded.value_standard, coded.bits[1], logits.shape[-1], logits.dtype
    middle, spread, heads = of_values.mean, of_values.deviation, q.shape[:-1]
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    # A query that sees nothing has lse = -inf; shifting by 0 instead leaves all its weights at zero.
    weights = torch.exp(logits - lse.nan_to_num(neginf=0.0))
    part = weights * coded.value_step.to(dtype)[..., None, :]
    out = part.sum(-1, keepdim=True) * -centre(of_value)
    for block in blocks_of(n):
        out = out + torch.matmul(part[..., block], numbers(coded.values, block, of_value, of_values, dtype))
    out = out * spread.to(dtype)[..., None, :]
    if middle is not None:
        out = out + weights.sum(-1, keepdim=True) * middle.to(dtype)[..., None, :]
    state = AttentionState(out.reshape(*heads, spread.shape[-1]), lse.reshape(heads))
    group = q.shape[-3] // logits.shape[-3]
    return state, weights.reshape(*logits.shape[:-2], group, q.shape[-2], n)


def attend_packed(
    q: torch.Tensor, tiers: Tiers, coding: Coding, *, scale: float
) -> tuple[AttentionState, torch.Tensor]:
    """`attend_records` to all retained slots of heads that have different numbers of them.

    Codes of all heads are unpacked at once; logits lie in a rectangle (batch, kv_head, group * q_len, width).
    """
    layout, (of_key, of_value) = tiers.layout, coding.bits
    of_keys, of_values = coding.key_standard, coding.value_standard
    mean, deviation, spread = of_keys.mean, of_keys.deviation, of_values.deviation
    dtype = torch.float64 if torch.float64 in (q.dtype, deviation.dtype) else torch.float32
    batch, d, dv, heads = q.shape[0], deviation.shape[-1], spread.shape[-1], q.shape[:-1]
    folded = q.to(dtype).reshape(batch, layout.heads, -1, d) * scale
    tilted = in_order(folded * deviation.to(dtype)[..., None, :], of_keys)
    everything = slice(0, tiers.keys.shape[-2])
    keys, values = (
        numbers(x, everything, bits, standard, dtype)
        for x, bits, standard in ((tiers.keys, of_key, of_keys), (tiers.values, of_value, of_values))
    )
    logits = tilted.new_zeros((*tilted.shape[:-1], layout.width))
    spans = [(start, start + width, width) for start, width in zip(layout.starts, layout.widths, strict=True)]
    for head, (start, stop, width) in enumerate(spans):
        logits[:, head, :, :width] = torch.matmul(tilted[:, head], keys[:, start:stop].mT)
    key_step, value_step = (
        layout.rectangle(x, vectors=False).to(dtype)[..., None, :] for x in (coding.key_step, coding.value_step)
    )
    logits = (logits - (less_centre(of_key, of_keys, tilted) * tilted).sum(-1, keepdim=True)) * key_step
    if mean is not None:
        logits = logits + torch.matmul(folded, mean.to(dtype)[..., None])
    there = layout.beside(q, "real") if tiers.valid is None else tiers.valid
    logits = logits.masked_fill(~there[..., None, :], -torch.inf)
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    weights = torch.exp(logits - lse.nan_to_num(neginf=0.0))
    part = (weights * value_step).masked_fill(~there[..., None, :], 0.0)
    out = torch.stack(
        [
            torch.matmul(part[:, head, :, :width], values[:, start:stop])
            for head, (start, stop, width) in enumerate(spans)
        ],
        dim=1,
    )
    out = (out - centre(of_value) * part.sum(-1, keepdim=True)) * spread.to(dtype)[..., None, :]
    state = AttentionState(out.reshape(*heads, dv), lse.reshape(heads))
    return state, weights.reshape(batch, layout.heads, -1, heads[-1], layout.width)


def in_order(x: torch.Tensor, standard: Standard) -> torch.Tensor:
    """`momentkv.codes.Standard.ordered`, of queries."""
    if standard.order is None:
        return x
    return x.gather(-1, standard.order.to(torch.int64)[..., None, :].expand_as(x))


def numbers(packed: torch.Tensor, block: slice, bits: int, standard: Standard, dtype: torch.dtype) -> torch.Tensor:
    """Codes of a block of tokens in the dtype that products are taken in, channels as they lie in records."""
    packed, d = packed[..., block, :], standard.deviation.shape[-1]
    if standard.order is None:
        return unpack_words(packed.contiguous(), bits, d).to(dtype)
    half, (fine, rough) = d // 2, GRADES[bits]
    first = row_bytes(half, fine)
    out = packed.new_empty((*packed.shape[:-1], d), dtype=dtype)
    out[..., :half] = unpack_words(packed[..., :first].contiguous(), fine, half)
    out[..., half:] = unpack_words(packed[..., first:].contiguous(), rough, half)
    return out

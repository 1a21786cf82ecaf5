"""Attention to records in plain PyTorch: no code is unpacked, bytes are masked eight at a time."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from momentkv.attention import AttentionState
from momentkv.backends.layout import Tiers
from momentkv.codes import GRADES, PLANES, Coded, Coding, Standard, centre

__all__ = [
    "attend_logits",
    "attend_packed",
    "attend_records",
    "dtype_of",
    "levels_of",
    "logits_of",
]

# Words of so many bytes, the widest first.
WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
# Tokens whose codes are read at once, of all heads of a layer or of one.
BLOCK = 8192


class MaskedBytes(NamedTuple):
    """How the bytes of a record become numbers whose weighted sums are the codes of its channels.

    What lies in the low bits of a byte is had by a mask, without a shift: with a code ``x`` of ``w`` bits at place
    ``p``, the byte masked to its lowest ``w (p + 1)`` bits, less that masked to its lowest ``w p``, is ``x`` times
    ``2 ** (w p)``. The differences are taken of queries and of outputs, which are few.

    Attributes
    ----------
    dtype : torch.dtype
        Of the words that a record is read in.
    words : int tensor, shape (m,)
        Which words of a record are read, some of them several times.
    masks : tensor, shape (m,)
        What each is masked by.
    sums : tensor, shape (columns, d)
        From the bytes of the masked words to the codes; None where they are the same.
    centre : tensor, shape (d,)
        What is subtracted of a code.
    """

    dtype: torch.dtype
    words: torch.Tensor
    masks: torch.Tensor
    sums: torch.Tensor | None
    centre: torch.Tensor


def masked_bytes(bits: int, d: int, graded: bool, dtype: torch.dtype, where: torch.device) -> MaskedBytes:
    """How records of ``d`` codes are read, to compute in ``dtype``."""
    # What is made under a dispatch mode may be a stand-in for a tensor.
    make = made if torch._C._len_torch_dispatch_stack() else remembered
    return make(bits, d, graded, dtype, where)


@lru_cache(maxsize=64)
def remembered(bits: int, d: int, graded: bool, dtype: torch.dtype, where: torch.device) -> MaskedBytes:
    """`masked_bytes`, made once."""
    with torch.inference_mode(False):  # the next to ask may want gradients
        return made(bits, d, graded, dtype, where)


def made(bits: int, d: int, graded: bool, dtype: torch.dtype, where: torch.device) -> MaskedBytes:
    """`masked_bytes`, not remembered."""
    halves = tuple((each, d // 2) for each in GRADES[bits]) if graded else ((bits, d),)
    terms, size, first = list[tuple[int, int, int, float]](), 0, 0  # byte, mask, channel, factor
    middle = list[float]()
    for each, channels in halves:
        below = each
        middle += [centre(each)] * channels
        for width in PLANES[each]:
            below, m = below - width, -(-channels * width // 8)
            for channel in range(channels):
                place, byte = divmod(channel, m)
                factor = 2.0 ** (below - width * place)
                terms.append((size + byte, 2 ** (width * (place + 1)) - 1, first + channel, factor))
                if place:
                    terms.append((size + byte, 2 ** (width * place) - 1, first + channel, -factor))
            size += m
        first += channels
    wide = next(wide for wide in WORDS if size % wide == 0)
    pairs = sorted({(mask, byte // wide) for byte, mask, _, _ in terms})
    column = {pair: wide * place for place, pair in enumerate(pairs)}
    sums = [[0.0] * d for _ in range(wide * len(pairs))]
    for byte, mask, channel, factor in terms:
        sums[column[mask, byte // wide] + byte % wide][channel] += factor
    masks = [int.from_bytes(bytes([mask]) * wide, "little", signed=wide > 1) for mask, _ in pairs]
    return MaskedBytes(
        WORDS[wide],
        torch.tensor([word for _, word in pairs], device=where),
        torch.tensor(masks, dtype=WORDS[wide], device=where),
        None if PLANES[bits] == (8,) else torch.tensor(sums, dtype=dtype, device=where),
        torch.tensor(middle, dtype=dtype, device=where),
    )


def masked_bytes_of(bits: int, standard: Standard, dtype: torch.dtype) -> MaskedBytes:
    """Of the records of a standard."""
    deviation = standard.deviation
    return masked_bytes(bits, deviation.shape[-1], standard.order is not None, dtype, deviation.device)


def attend_records(
    q: torch.Tensor, coded: Coded, *, scale: float, mask: torch.Tensor | None = None
) -> tuple[AttentionState, torch.Tensor]:
    """`momentkv.codes.attend_codes` in few dispatches."""
    return attend_logits(logits_of(q, coded, scale=scale, mask=mask), q, coded)


def logits_of(q: torch.Tensor, coded: Coded, *, scale: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits (..., kv_head, group * q_len, n) of all tokens; ``-inf`` where the mask is False."""
    dtype, n = dtype_of(q, coded.key_standard), coded.keys.shape[-2]
    how = masked_bytes_of(coded.bits[0], coded.key_standard, dtype)
    asked, zero, shift = asked_of(q, coded.key_standard, how, scale)
    products = [torch.matmul(asked, numbers(coded.keys, block, how, dtype).mT) for block in blocks_of(n)]
    logits = (products[0] if len(products) == 1 else torch.cat(products, dim=-1)) + zero
    logits = logits * coded.key_step.to(dtype)[..., None, :]
    if shift is not None:
        logits = logits + shift
    if mask is not None:
        shape = logits.shape
        logits = (
            logits.reshape(*shape[:-2], q.shape[-3] // shape[-3], q.shape[-2], n)
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
    how = masked_bytes_of(of_value, of_values, dtype)
    weights, lse = softmax(logits)
    part = weights * coded.value_step.to(dtype)[..., None, :]
    products = [torch.matmul(part[..., block], numbers(coded.values, block, how, dtype)) for block in blocks_of(n)]
    out = from_numbers(sum(products[1:], products[0]), how) - centre(of_value) * part.sum(-1, keepdim=True)
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

    Bytes of all heads are masked at once; logits lie in a rectangle (batch, kv_head, group * q_len, width).
    """
    layout, of_keys, of_values = tiers.layout, coding.key_standard, coding.value_standard
    dtype, spread, heads = dtype_of(q, of_keys), of_values.deviation, q.shape[:-1]
    everything = slice(0, tiers.keys.shape[-2])
    of_key, of_value = (masked_bytes_of(*each, dtype) for each in zip(coding.bits, (of_keys, of_values), strict=True))
    keys, values = numbers(tiers.keys, everything, of_key, dtype), numbers(tiers.values, everything, of_value, dtype)
    key_step, value_step = (x.to(dtype)[:, None] for x in (coding.key_step, coding.value_step))
    asked, zero, shift = asked_of(q, of_keys, of_key, scale)
    spans = [
        (head, slice(0, width), slice(start, start + width))
        for head, (start, width) in enumerate(zip(layout.starts, layout.widths, strict=True))
    ]
    logits = asked.new_full((*asked.shape[:-1], layout.width), -torch.inf)
    for head, place, slots in spans:
        product = torch.baddbmm(zero[:, head], asked[:, head], keys[:, slots].mT)
        logits[:, head, :, place] = product * key_step[..., slots]
    if tiers.valid is not None:
        logits = logits.masked_fill(~tiers.valid[..., None, :], -torch.inf)
    weights, lse = softmax(logits)
    if shift is not None:
        lse = lse + shift
    parts = [weights[:, head, :, place] * value_step[..., slots] for head, place, slots in spans]
    if tiers.valid is not None:  # what lies in other slots may be anything
        parts = [
            part.masked_fill(~tiers.valid[:, head, None, place], 0.0)
            for part, (head, place, _) in zip(parts, spans, strict=True)
        ]
    out = torch.stack([part @ values[:, slots] for part, (_, _, slots) in zip(parts, spans, strict=True)], dim=1)
    total = torch.stack([part.sum(-1, keepdim=True) for part in parts], dim=1)
    out = (from_numbers(out, of_value) - centre(coding.bits[1]) * total) * spread.to(dtype)[..., None, :]
    state = AttentionState(out.reshape(*heads, spread.shape[-1]), lse.reshape(heads))
    return state, weights.reshape(*weights.shape[:2], -1, heads[-1], layout.width)


def dtype_of(q: torch.Tensor, standard: Standard) -> torch.dtype:
    """What products are taken in."""
    return torch.float64 if torch.float64 in (q.dtype, standard.deviation.dtype) else torch.float32


def asked_of(
    q: torch.Tensor, standard: Standard, how: MaskedBytes, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Queries (..., kv_head, group * q_len, columns) of the `numbers` of keys, and two terms (..., 1) of their logits.

    The first is in steps of a token, the second is not; it is None where it is zero.
    """
    mean, deviation, dtype = standard.mean, standard.deviation, how.centre.dtype
    *batch, kv_heads, d = deviation.shape
    folded = q.to(dtype).reshape(*batch, kv_heads, -1, d) * scale
    tilted = standard.ordered(folded * deviation.to(dtype)[..., None, :])
    shift = None if mean is None else torch.matmul(folded, mean.to(dtype)[..., None])
    asked = tilted if how.sums is None else torch.matmul(tilted, how.sums.mT)
    return asked, -torch.matmul(tilted, how.centre[:, None]), shift


def numbers(packed: torch.Tensor, block: slice, how: MaskedBytes, dtype: torch.dtype) -> torch.Tensor:
    """Of a block of tokens, the numbers (..., n, columns) whose sums are its codes, channels as they lie in records."""
    packed = packed[..., block, :].contiguous()
    if how.sums is None:
        return packed.to(dtype)
    return (packed.view(how.dtype).index_select(-1, how.words) & how.masks).view(torch.uint8).to(dtype)


def levels_of(
    codes: torch.Tensor,
    step: torch.Tensor,
    valid: torch.Tensor | None,
    standard: Standard,
    bits: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Records as tokens (..., n, d), in deviations from the mean, channels as they lie there; zero if not ``valid``."""
    how = masked_bytes_of(bits, standard, dtype)
    levels = from_numbers(numbers(codes, slice(0, codes.shape[-2]), how, dtype), how) - how.centre
    step = step.to(dtype)
    if valid is not None:  # what lies in other slots may be anything
        step = step.masked_fill(~valid, 0.0)
    return levels * step[..., None]


def from_numbers(out: torch.Tensor, how: MaskedBytes) -> torch.Tensor:
    """Sums of `numbers` as sums of codes."""
    return out if how.sums is None else torch.matmul(out, how.sums)


def softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, all zero for a query that sees nothing, and log-sum-exps (..., 1).

    `torch.exp` takes seven times as long where results are subnormal, `torch.softmax` does not.
    """
    if not logits.shape[-1]:
        return logits, logits.new_full((*logits.shape[:-1], 1), -torch.inf)
    top = logits.amax(-1, keepdim=True)
    nothing = top == -torch.inf
    weights = torch.softmax(logits, -1).masked_fill(nothing, 0.0)
    return weights, torch.where(nothing, top, top - weights.amax(-1, keepdim=True).log())

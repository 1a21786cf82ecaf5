"""Triton: queries as whole numbers, whose bytes are columns of a product with codes.

So products are exact, and as wide as float32 has digits. A number is in units of its query's largest component.
"""

from __future__ import annotations

import triton
import triton.language as tl

from momentkv.backends.triton.planes_kernel import copies

__all__ = ["queries_of", "whole", "whole_queries"]


@triton.jit
def pieces(x, PIECES: tl.constexpr):
    """Whole numbers as signed bytes, the last first: each a column beside the others of its own."""
    number = tl.floor(x + 0.5).to(tl.int32)
    last = ((number + 128) & 255) - 128
    number = (number - last) >> 8
    if PIECES == 2:
        return tl.reshape(tl.join(last.to(tl.int8), number.to(tl.int8)), [x.shape[0], x.shape[1] * 2])
    else:
        second = ((number + 128) & 255) - 128
        number = (number - second) >> 8
        third = ((number + 128) & 255) - 128
        number = (number - third) >> 8
        less = tl.join(last.to(tl.int8), second.to(tl.int8))
        more = tl.join(third.to(tl.int8), number.to(tl.int8))
        return tl.reshape(tl.join(less, more), [x.shape[0], x.shape[1] * 4])


@triton.jit
def whole_queries(queries, largest, CENTRE: tl.constexpr, PIECES: tl.constexpr, WARPS: tl.constexpr):
    """The columns of each slot, for every warp; and what they add where codes stand for codes less CENTRE.

    The largest becomes a number each of whose bytes has a sign.
    """
    LARGEST: tl.constexpr = 127.0 * 256.0 ** (PIECES - 1)
    columns = ()
    zero = tl.zeros([largest.shape[0]], tl.float32)
    for slot in tl.static_range(len(queries)):
        x = queries[slot] / largest[None, :] * LARGEST
        zero += tl.sum(tl.floor(x + 0.5), 0) * CENTRE
        x = pieces(x, PIECES)
        columns = columns + (tl.broadcast_to(x[None, :, :], [WARPS, x.shape[0], x.shape[1]]),)
    return columns, zero, largest / LARGEST


@triton.jit
def whole(products, PIECES: tl.constexpr):
    """Products with such columns as products with the whole numbers, in float32."""
    W: tl.constexpr = products.shape[0]
    N: tl.constexpr = products.shape[1]
    G: tl.constexpr = products.shape[2] // PIECES
    if PIECES == 2:
        last, first = tl.split(tl.reshape(products, [W, N, G, 2]))
        return first.to(tl.float32) * 256.0 + last.to(tl.float32)
    else:
        less, more = tl.split(tl.reshape(products, [W, N, G, 2, 2]))
        last, second = tl.split(less)
        third, first = tl.split(more)
        first = first.to(tl.float32) * 256.0 + third.to(tl.float32)
        return (first * 256.0 + second.to(tl.float32)) * 256.0 + last.to(tl.float32)


@triton.jit
def queries_of(
    Q,
    MEAN,
    DEVIATION,
    ORDER,
    head,
    rr,
    rm,
    rows,
    scale,
    D: tl.constexpr,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIGH: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """For each slot of a record's part, scaled queries times deviations of the channels of its columns.

    And the products with means, and the largest of each query, which is a number even where another is none.
    """
    SIZE: tl.constexpr = CHANNELS * HIGH // 8
    COPIES: tl.constexpr = copies(SIZE, HIGH, COLUMNS, 8)
    cc = tl.arange(0, COLUMNS)
    there = cc < COPIES * SIZE
    queries = ()
    shift = tl.zeros([rr.shape[0]], tl.float32)
    largest = tl.zeros([rr.shape[0]], tl.float32)
    for slot in tl.static_range(8 // HIGH // COPIES):
        dd = FIRST + slot * COPIES * SIZE + cc
        if ORDER is not None:
            dd = tl.load(ORDER + head * D + dd, mask=there, other=0).to(tl.int32)
        q = tl.load(Q + (head * rows + rr[None, :]) * D + dd[:, None], mask=rm[None, :] & there[:, None], other=0.0)
        q = q.to(tl.float32) * scale
        # Products are rounded here, with a summand. Of one that is added to another thread's, the compiler would round
        # the other alone, so that threads had different sums.
        part = q * 0.0
        if MEAN is not None:
            mean = tl.load(MEAN + head * D + dd, mask=there, other=0.0).to(tl.float32)
            part = tl.fma(q, tl.broadcast_to(mean[:, None], q.shape), part)
        shift += tl.sum(part, 0)
        q = q * tl.load(DEVIATION + head * D + dd, mask=there, other=0.0).to(tl.float32)[:, None]
        largest = tl.maximum(largest, tl.max(tl.abs(q), 0))
        queries = queries + (q,)
    return queries, shift, largest

"""Triton: attention of a few queries over retained tokens and the estimate of the evicted ones, in one pass.

An estimate is an attention state, and an online softmax starts from an attention state: so the estimate is where one
split of the sequence starts, in place of the empty state. It needs no pass and no merge of its own. Inside, logits and
their sums are to base 2; what leaves a kernel is to base e.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["combine_kernel", "decode_kernel"]


@triton.jit
def initial_state(
    q,
    Q,
    row_mask,
    rr,
    head,
    rows,
    ANCHOR,
    LOG_WEIGHT,
    KEY_MEAN,
    VALUE_MEAN,
    SLOPE,
    LEFT,
    RIGHT,
    VARIANCE,
    STRENGTH,
    CAP,
    scale,
    stride_sd,
    stride_sv,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUMMARIES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RANK: tl.constexpr,
    FULL_SLOPE: tl.constexpr,
    FULL_VARIANCE: tl.constexpr,
    DIAGONAL_VARIANCE: tl.constexpr,
    ANCHORED: tl.constexpr,
):
    """Running maximum (base 2), sum and weighted values of the estimate: (lse, 1, out), or (-inf, 0, 0).

    Products are full float32, for an lse has to be right to the third decimal; d x d matrices in their own dtype.
    """
    dd = tl.arange(0, BLOCK_D)
    vv = tl.arange(0, BLOCK_V)
    dm = dd < D
    vm = vv < DV
    x = q.to(tl.float32) * scale
    if ANCHORED:
        x -= tl.load(ANCHOR + head * D + dd, mask=dm, other=0.0).to(tl.float32)[None, :]
    if SUMMARIES == 1:
        mean = tl.load(KEY_MEAN + head * D + dd, mask=dm, other=0.0).to(tl.float32)
        lse = tl.load(LOG_WEIGHT + head) + tl.sum(x * mean[None, :], 1)
        value = tl.load(VALUE_MEAN + head * DV + vv, mask=vm, other=0.0)
        out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32) + value[None, :]
    else:
        # As many at a time as a tile has, so that registers do not depend on how many there are.
        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for first in tl.range(0, SUMMARIES, BLOCK_S, num_stages=1):
            ss = first + tl.arange(0, BLOCK_S)
            sm = ss < SUMMARIES
            place = head * SUMMARIES + ss
            mean = tl.load(KEY_MEAN + place[:, None] * D + dd[None, :], mask=sm[:, None] & dm[None, :], other=0.0)
            log_weight = tl.load(LOG_WEIGHT + place, mask=sm, other=float("-inf"))
            products = tl.dot(x, tl.trans(mean.to(tl.float32)), input_precision="ieee") + log_weight[None, :]
            new = tl.maximum(top, tl.max(products, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)
            fade = tl.exp(top - shift)
            weights = tl.exp(products - shift[:, None])
            total = total * fade + tl.sum(weights, 1)
            value = tl.load(VALUE_MEAN + place[:, None] * DV + vv[None, :], mask=sm[:, None] & vm[None, :], other=0.0)
            out = tl.dot(weights, value.to(tl.float32), out * fade[:, None], input_precision="ieee")
            top = new
        safe = tl.where(total == 0.0, 1.0, total)
        lse = tl.where(total == 0.0, float("-inf"), tl.log(safe) + top)
        out /= safe[:, None]
    for r in tl.static_range(RANK):
        right = tl.load(RIGHT + (head * RANK + r) * D + dd, mask=dm, other=0.0)
        left = tl.load(LEFT + (head * DV + vv) * RANK + r, mask=vm, other=0.0)
        out += tl.sum(x * right[None, :], 1)[:, None] * left[None, :]
    if DIAGONAL_VARIANCE:
        variance = tl.load(VARIANCE + head * D + dd, mask=dm, other=0.0)
        gain = 0.5 * tl.load(STRENGTH + head) * tl.sum(x * x * variance[None, :], 1)
        lse += tl.minimum(gain, tl.load(CAP + head))
    if FULL_SLOPE or FULL_VARIANCE:
        # d x d matrices, some rows at a time. A tensor in registers cannot be sliced: read these columns of q again.
        square = tl.zeros([BLOCK_M], tl.float32)
        for start in range(0, BLOCK_D, BLOCK_C):
            cc = start + tl.arange(0, BLOCK_C)
            cm = cc < D
            part = tl.load(
                Q + (head * rows + rr[:, None]) * D + cc[None, :], mask=row_mask[:, None] & cm[None, :], other=0.0
            )
            part = part.to(tl.float32) * scale
            if ANCHORED:
                part -= tl.load(ANCHOR + head * D + cc, mask=cm, other=0.0)[None, :]
            if FULL_SLOPE:
                slope = tl.load(
                    SLOPE + head * D * DV + cc[:, None] * stride_sd + vv[None, :] * stride_sv,
                    mask=cm[:, None] & vm[None, :],
                    other=0.0,
                )
                out = tl.dot(part.to(slope.dtype), slope, out, input_precision="ieee")
            if FULL_VARIANCE:
                matrix = tl.load(
                    VARIANCE + (head * D + cc[:, None]) * D + dd[None, :], mask=cm[:, None] & dm[None, :], other=0.0
                )
                square += tl.sum(tl.dot(part.to(matrix.dtype), matrix, input_precision="ieee") * x, 1)
        if FULL_VARIANCE:
            lse += tl.minimum(0.5 * tl.load(STRENGTH + head) * square, tl.load(CAP + head))
    some = lse > float("-inf")
    return (
        tl.where(some, lse * 1.4426950408889634, float("-inf")),
        tl.where(some, 1.0, 0.0),
        tl.where(some[:, None], out, 0.0),
    )


# Numbers that differ from call to call do not choose a specialisation, of which there would be one for each.
@triton.jit(do_not_specialize=["rows", "capacity", "kv_heads", "splits"])
def decode_kernel(
    Q,
    K,
    V,
    POSITIONS,
    COUNTS,
    STARTS,
    ANCHOR,
    LOG_WEIGHT,
    KEY_MEAN,
    VALUE_MEAN,
    SLOPE,
    LEFT,
    RIGHT,
    VARIANCE,
    STRENGTH,
    CAP,
    OUT,
    LSE,
    PART_OUT,
    PART_LSE,
    LOGITS,
    scale,
    rows,
    capacity,
    kv_heads,
    splits,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_pb,
    stride_ph,
    stride_sd,
    stride_sv,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PARTED: tl.constexpr,
    OWN_SPLIT: tl.constexpr,
    SUMMARIES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    RANK: tl.constexpr,
    FULL_SLOPE: tl.constexpr,
    FULL_VARIANCE: tl.constexpr,
    DIAGONAL_VARIANCE: tl.constexpr,
    ANCHORED: tl.constexpr,
    MASKED: tl.constexpr,
    COUNTED: tl.constexpr,
    PACKED: tl.constexpr,
    SCORED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Grid: (batch * kv_head, splits, blocks of rows), where a row is a query of the KV head's group.

    Q is (head, rows, D); OUT, LSE, LOGITS are (head, rows, ...); PART_OUT, PART_LSE are (head, splits, rows, ...), and
    written where the sequence is PARTED, that is, splits > 1.
    K and V have strides, or, PACKED, tokens one after the other, those of a head from STARTS on. Of a head's slots
    (``capacity``), only the first COUNTS are in use, and of these the ones whose position is not negative. The sequence
    is parted in splits - OWN_SPLIT; the estimate starts the last split.
    """
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    rr = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    dd = tl.arange(0, BLOCK_D)
    vv = tl.arange(0, BLOCK_V)
    rm = rr < rows
    dm = dd < D
    vm = vv < DV
    q = tl.load(Q + (head * rows + rr[:, None]) * D + dd[None, :], mask=rm[:, None] & dm[None, :], other=0.0)
    count = capacity
    if COUNTED:
        count = tl.load(COUNTS + head)
    if PACKED:
        first = tl.load(STARTS + head)
        keys = K + first * stride_kn
        values = V + first * stride_vn
        place = first
    else:
        keys = K + (head // kv_heads) * stride_kb + (head % kv_heads) * stride_kh
        values = V + (head // kv_heads) * stride_vb + (head % kv_heads) * stride_vh
        place = (head // kv_heads) * stride_pb + (head % kv_heads) * stride_ph

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if SUMMARIES > 0:  # noqa: SIM102 (decided when compiling, the split when running)
        if split == splits - 1:
            top, total, acc = initial_state(
                q,
                Q,
                rm,
                rr,
                head,
                rows,
                ANCHOR,
                LOG_WEIGHT,
                KEY_MEAN,
                VALUE_MEAN,
                SLOPE,
                LEFT,
                RIGHT,
                VARIANCE,
                STRENGTH,
                CAP,
                scale,
                stride_sd,
                stride_sv,
                D,
                DV,
                BLOCK_M,
                BLOCK_D,
                BLOCK_V,
                BLOCK_C,
                SUMMARIES,
                BLOCK_S,
                RANK,
                FULL_SLOPE,
                FULL_VARIANCE,
                DIAGONAL_VARIANCE,
                ANCHORED,
            )
    # With logits to write, every slot is visited, so that none is left as it was allocated.
    slots = count
    if SCORED:
        slots = capacity
    share = tl.cdiv(tl.cdiv(slots, splits - OWN_SPLIT), BLOCK_N) * BLOCK_N
    begin = tl.minimum(share * split, slots)
    end = tl.minimum(begin + share, slots)
    for start in range(begin, end, BLOCK_N):
        nn = start + tl.arange(0, BLOCK_N)
        valid = nn < tl.minimum(count, end)
        if MASKED:
            valid = valid & (tl.load(POSITIONS + place + nn, mask=valid, other=-1) >= 0)
        # Offsets in 64 bits: a packed cache of many heads has more than 2**31 numbers.
        at = nn.to(tl.int64)
        k = tl.load(keys + at[:, None] * stride_kn + dd[None, :], mask=valid[:, None] & dm[None, :], other=0.0)
        logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        logits = tl.where(valid[None, :], logits, float("-inf"))
        if SCORED:
            tl.store(
                LOGITS + (head * rows + rr[:, None]) * capacity + nn[None, :],
                logits,
                mask=rm[:, None] & (nn < end)[None, :],
            )
        logits *= 1.4426950408889634
        new = tl.maximum(top, tl.max(logits, 1))
        # Where nothing was seen yet, -inf - -inf would be NaN.
        shift = tl.where(new == float("-inf"), 0.0, new)
        fade = tl.exp2(top - shift)
        weights = tl.exp2(logits - shift[:, None])
        total = total * fade + tl.sum(weights, 1)
        v = tl.load(values + at[:, None] * stride_vn + vv[None, :], mask=valid[:, None] & vm[None, :], other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = new
    some = total > 0.0
    safe = tl.where(some, total, 1.0)
    out = acc / safe[:, None]
    lse = tl.where(some, top + tl.log2(safe), float("-inf"))
    if not PARTED:
        tl.store(
            OUT + (head * rows + rr[:, None]) * DV + vv[None, :],
            out.to(OUT.dtype.element_ty),
            mask=rm[:, None] & vm[None, :],
        )
        tl.store(LSE + head * rows + rr, lse * 0.6931471805599453, mask=rm)
    else:
        part = (head * splits + split) * rows + rr
        tl.store(PART_OUT + part[:, None] * DV + vv[None, :], out, mask=rm[:, None] & vm[None, :])
        tl.store(PART_LSE + part, lse, mask=rm)


@triton.jit(do_not_specialize=["rows", "splits"])
def combine_kernel(
    PART_OUT,
    PART_LSE,
    OUT,
    LSE,
    rows,
    splits,
    DV: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Merge the states of all splits. Grid: (batch * kv_head, rows)."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    vv = tl.arange(0, BLOCK_V)
    ss = tl.arange(0, BLOCK_S)
    vm = vv < DV
    sm = ss < splits
    part = (head * splits + ss) * rows + row
    lse = tl.load(PART_LSE + part, mask=sm, other=float("-inf"))
    top = tl.max(lse, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(lse - shift)
    total = tl.sum(weights, 0)
    safe = tl.where(total > 0.0, total, 1.0)
    out = tl.load(PART_OUT + part[:, None] * DV + vv[None, :], mask=sm[:, None] & vm[None, :], other=0.0)
    out = tl.sum(out * weights[:, None], 0) / safe
    tl.store(OUT + (head * rows + row) * DV + vv, out.to(OUT.dtype.element_ty), mask=vm)
    tl.store(
        LSE + head * rows + row, tl.where(total > 0.0, (shift + tl.log2(safe)) * 0.6931471805599453, -float("inf"))
    )

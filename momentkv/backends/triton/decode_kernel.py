"""Triton: attention of a few queries over retained tokens and the estimate of the evicted ones, in one pass.

An estimate is an attention state, and an online softmax starts from an attention state: so the estimate is where one
split of the sequence starts, in place of the empty state. It needs no pass and no merge of its own. Inside, logits and
their sums are to base 2; what leaves a kernel is to base e.
"""

from __future__ import annotations

import triton
import triton.language as tl

from momentkv.backends.triton.codes_kernel import attend_codes
from momentkv.backends.triton.estimate_kernel import initial_state
from momentkv.backends.triton.online_kernel import joined, online

__all__ = ["combine_kernel", "decode_kernel"]


@triton.jit
def attend_tile(
    q,
    keys,
    values,
    nn,
    valid,
    stride_kn,
    stride_vn,
    scale,
    top,
    total,
    acc,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Logits (base e) of the tokens at slots ``nn`` that are valid, and the state (base 2) with them."""
    dd = tl.arange(0, BLOCK_D)
    vv = tl.arange(0, BLOCK_V)
    # Offsets in 64 bits: a packed cache of many heads has more than 2**31 numbers.
    at = nn.to(tl.int64)
    k = tl.load(keys + at[:, None] * stride_kn + dd[None, :], mask=valid[:, None] & (dd < D)[None, :], other=0.0)
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    logits = tl.where(valid[None, :], logits, float("-inf"))
    new, fade, weights, total = online(logits, top, total)
    v = tl.load(values + at[:, None] * stride_vn + vv[None, :], mask=valid[:, None] & (vv < DV)[None, :], other=0.0)
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
    return logits, new, total, acc


# Numbers that differ from call to call do not choose a specialisation, of which there would be one for each.
@triton.jit(
    do_not_specialize=["rows", "capacity", "recent", "kv_heads", "splits", "own_split", "stride_pb", "stride_ph"]
)
def decode_kernel(
    Q,
    K,
    V,
    POSITIONS,
    COUNTS,
    STARTS,
    KEY_STEP,
    VALUE_STEP,
    MEAN,
    DEVIATION,
    ORDER,
    SPREAD,
    RECENT_K,
    RECENT_V,
    RECENT_VALID,
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
    recent,
    kv_heads,
    splits,
    own_split,
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
    stride_rkb,
    stride_rkh,
    stride_rkn,
    stride_rvb,
    stride_rvh,
    stride_rvn,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
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
    MASKED: tl.constexpr,
    COUNTED: tl.constexpr,
    PACKED: tl.constexpr,
    SCORED: tl.constexpr,
    RECENT: tl.constexpr,
    RECENT_MASKED: tl.constexpr,
    RECENT_STAGES: tl.constexpr,
    CODED: tl.constexpr,
    KEY_HIGH: tl.constexpr,
    KEY_LOW: tl.constexpr,
    ROUGH_HIGH: tl.constexpr,
    ROUGH_LOW: tl.constexpr,
    VALUE_HIGH: tl.constexpr,
    VALUE_LOW: tl.constexpr,
    VALUE_W: tl.constexpr,
    WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Grid: (batch * kv_head, splits, blocks of rows), where a row is a query of the KV head's group.

    Q is (head, rows, D); OUT, LSE, LOGITS are (head, rows, ...); PART_OUT, PART_LSE are (head, splits, rows, ...), and
    written in place of OUT and LSE where splits > 1.
    K and V have strides, or, PACKED, tokens one after the other, those of a head from STARTS on. Of a head's slots
    (``capacity``), only the first COUNTS are in use, and of these the ones whose position is not negative. The sequence
    is parted in splits - own_split; the estimate starts the last split, and RECENT tokens, which have strides whatever
    the others have, are its end. LOGITS hold those of the recent tokens behind the others'.
    """
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    rr = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    dd = tl.arange(0, BLOCK_D)
    vv = tl.arange(0, BLOCK_V)
    rm = rr < rows
    dm = dd < D
    vm = vv < DV
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

    # With logits to write, every slot is visited, so that none is left as it was allocated.
    slots = count
    if SCORED:
        slots = capacity
    share = tl.cdiv(tl.cdiv(slots, splits - own_split), BLOCK_N) * BLOCK_N
    begin = tl.minimum(share * split, slots)
    end = tl.minimum(begin + share, slots)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if CODED:
        top, total, acc = attend_codes(
            Q,
            K,
            V,
            KEY_STEP,
            VALUE_STEP,
            MEAN,
            DEVIATION,
            ORDER,
            SPREAD,
            LOGITS,
            head,
            first,
            begin,
            count,
            end,
            rr,
            rm,
            rows,
            capacity + recent,
            scale,
            splits,
            D,
            DV,
            BLOCK_M,
            BLOCK_N,
            BLOCK_V,
            KEY_HIGH,
            KEY_LOW,
            ROUGH_HIGH,
            ROUGH_LOW,
            VALUE_HIGH,
            VALUE_LOW,
            VALUE_W,
            WARPS,
            SCORED,
        )
    q = tl.load(Q + (head * rows + rr[:, None]) * D + dd[None, :], mask=rm[:, None] & dm[None, :], other=0.0)
    if SUMMARIES > 0:  # noqa: SIM102 (decided when compiling, the split when running)
        if split == splits - 1:
            estimate_top, estimate_total, estimate_acc = initial_state(
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
                EXACT,
            )
            if CODED:
                top, total, acc = joined(top, total, acc, estimate_top, estimate_total, estimate_acc)
            else:
                top, total, acc = estimate_top, estimate_total, estimate_acc
    if not CODED:
        for start in range(begin, end, BLOCK_N):
            nn = start + tl.arange(0, BLOCK_N)
            valid = nn < tl.minimum(count, end)
            if MASKED:
                valid = valid & (tl.load(POSITIONS + place + nn, mask=valid, other=-1) >= 0)
            logits, top, total, acc = attend_tile(
                q,
                keys,
                values,
                nn,
                valid,
                stride_kn,
                stride_vn,
                scale,
                top,
                total,
                acc,
                D,
                DV,
                BLOCK_D,
                BLOCK_V,
                PRECISION,
            )
            if SCORED:
                tl.store(
                    LOGITS + (head * rows + rr[:, None]) * (capacity + recent) + nn[None, :],
                    logits,
                    mask=rm[:, None] & (nn < end)[None, :],
                )
    if RECENT:
        row = head // kv_heads
        own = head % kv_heads
        keys = RECENT_K + row * stride_rkb + own * stride_rkh
        values = RECENT_V + row * stride_rvb + own * stride_rvh
        newest = tl.where(split == splits - 1, recent, 0)
        for start in tl.range(0, newest, BLOCK_R, num_stages=RECENT_STAGES):
            nn = start + tl.arange(0, BLOCK_R)
            there = nn < recent
            valid = there
            if RECENT_MASKED:
                valid = there & (tl.load(RECENT_VALID + head * recent + nn, mask=there, other=0) != 0)
            logits, top, total, acc = attend_tile(
                q,
                keys,
                values,
                nn,
                valid,
                stride_rkn,
                stride_rvn,
                scale,
                top,
                total,
                acc,
                D,
                DV,
                BLOCK_D,
                BLOCK_V,
                PRECISION,
            )
            if SCORED:
                tl.store(
                    LOGITS + (head * rows + rr[:, None]) * (capacity + recent) + capacity + nn[None, :],
                    logits,
                    mask=rm[:, None] & there[None, :],
                )
    # Of a query that is no number neither is this: it must not pass for one that sees nothing.
    nothing = total == 0.0
    safe = tl.where(nothing, 1.0, total)
    out = acc / safe[:, None]
    lse = tl.where(nothing, float("-inf"), top + tl.log2(safe))
    # Decided when running: else there would be twice as many specialisations.
    if splits == 1:
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
    safe = tl.where(total == 0.0, 1.0, total)
    out = tl.load(PART_OUT + part[:, None] * DV + vv[None, :], mask=sm[:, None] & vm[None, :], other=0.0)
    out = tl.sum(out * weights[:, None], 0) / safe
    tl.store(OUT + (head * rows + row) * DV + vv, out.to(OUT.dtype.element_ty), mask=vm)
    tl.store(
        LSE + head * rows + row, tl.where(total == 0.0, -float("inf"), (shift + tl.log2(safe)) * 0.6931471805599453)
    )

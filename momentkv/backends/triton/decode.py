"""Launching the fused decode kernel: block sizes, splits, strides."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton

from momentkv.backends.layout import Recent
from momentkv.backends.strides import side_by_side
from momentkv.backends.triton.decode_kernel import combine_kernel, decode_kernel
from momentkv.backends.triton.tuned import Choice, Choices, Family, chosen
from momentkv.codes import GRADES, PLANES, Coding
from momentkv.statistics.expansion import Expansion

__all__ = [
    "DecodeBlocks",
    "Launch",
    "builtin_choice",
    "code_flags",
    "decode_blocks",
    "decode_launches",
    "decode_triton",
    "estimate_flags",
    "family_of",
    "number_of_splits",
]

# Least number of blocks of the sequence for each multiprocessor. Two or three were slower by a tenth at batch 16, and
# hardly faster anywhere (H200, head dimension 128).
WAVES = 1
SPLITS = 64  # at most; the combine kernel holds the outputs of all splits of a query
# The estimate goes through so many summaries at a time, so that registers do not depend on how many there are.
SUMMARIES_AT_ONCE = 16
# Whole numbers of so many bytes.
WORDS = {1: torch.uint8, 2: torch.int16}
# What the kernel calls the parts of an expansion.
POINTERS = {
    "anchor": "ANCHOR",
    "log_weight": "LOG_WEIGHT",
    "key_mean": "KEY_MEAN",
    "value_mean": "VALUE_MEAN",
    "slope": "SLOPE",
    "slope_left": "LEFT",
    "slope_right": "RIGHT",
    "variance": "VARIANCE",
    "strength": "STRENGTH",
    "cap": "CAP",
}


class DecodeBlocks(NamedTuple):
    """Compile-time sizes of `decode_kernel`; all but ``num_warps`` and ``num_stages`` are its arguments.

    Attributes
    ----------
    BLOCK_M, BLOCK_N, BLOCK_R : int
        Queries of a group, retained tokens, and recent ones, in one tile.
    BLOCK_D, BLOCK_V, BLOCK_C : int
        Dimension of keys and of values, padded, and rows of a ``d x d`` matrix at a time.
    num_warps, num_stages : int
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_R: int
    BLOCK_D: int
    BLOCK_V: int
    BLOCK_C: int
    num_warps: int
    num_stages: int


def decode_blocks(rows: int, d: int, dv: int, dtype: torch.dtype, summaries: int, *, bits: int) -> DecodeBlocks:
    """Sizes for that many queries of each KV head; ``bits`` as of a `momentkv.backends.triton.tuned.Family`.

    A tile of `tl.dot` has at least 16 in each direction; of records, each warp has tokens of its own.
    """
    wide = max(16, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(dv))
    largest = max(wide)
    # Full float32 products are not done by tensor cores and hold their factors in registers.
    single = dtype == torch.float32
    tokens = (32 if largest <= 64 else 16) if single else (64 if largest <= 128 else 32)
    # A group of more than 16 queries reads the cache once with a tile of 32, where registers allow: not those of wide
    # heads, which keep the factors of all queries while they go through many summaries. Products with codes have
    # queries for columns, of which eight are enough, or four in two pieces.
    widest = 64 if summaries > SUMMARIES_AT_ONCE else 128
    if bits:
        # As many as registers hold: fewer of float32, of wide heads, and where channels are padded.
        if largest <= 64:
            most = 8 if single else 16
        elif single or largest > 128:
            most = 4
        else:
            most = 16 if wide == (d, dv) else 8
        queries = min(most, 4 if rows <= 4 else 8 if rows <= 8 else 16)
        # Registers, and bytes in flight: at head dimension 128, calls with 128 tokens a tile took 1.4 times as long in
        # 4 bits, and calls with 64 took 1.1 times as long in 8 bits (H200).
        wide_tile = not single and (largest <= 64 or (largest == 128 and bits > 12 and queries < 16))
        # Sizes with which all builds for 8.0, 9.0 and 10.0 fit: they spill nothing in loops and little elsewhere. Many
        # queries, wide heads and float32 leave no registers for many tiles in flight, nor does the whole matrix of
        # moments, which many queries read in smaller pieces. That recent tokens come fewer or more at a time is trial
        # and error: where one register is lacking, the assembler spills with some sizes and not with others.
        whole = summaries == 1 and largest == 128
        few = 2 if whole or (largest <= 64 and (single or queries == 16)) else 3
        if largest > 128 and summaries > 1:
            tokens = 64 if summaries > SUMMARIES_AT_ONCE else 16
        elif single and largest <= 64 and bits <= 8:
            tokens = 64
        return DecodeBlocks(
            BLOCK_M=queries,
            BLOCK_N=128 if wide_tile else 64,
            BLOCK_R=tokens,
            BLOCK_D=wide[0],
            BLOCK_V=wide[1],
            BLOCK_C=16 if single or largest > 128 or (whole and queries == 16) else 32,
            num_warps=4,
            num_stages=2 if largest > (64 if queries == 16 else 128) else 4 if bits > 12 else few,
        )
    queries = 32 if rows > 16 and not single and largest <= widest else 16
    many = queries == 32 or largest > (64 if single else 128)
    return DecodeBlocks(
        BLOCK_M=queries,
        BLOCK_N=tokens,
        BLOCK_R=tokens,
        BLOCK_D=wide[0],
        BLOCK_V=wide[1],
        BLOCK_C=16 if single or largest > 128 else 32,
        num_warps=8 if many else 4,
        # One tile in flight is enough, and faster by a tenth, where blocks read at once. It is not where they evaluate
        # summaries first (H200, head dimension 128).
        num_stages=2 if single or summaries < 2 else 3,
    )


def family_of(blocks: DecodeBlocks, dtype: torch.dtype, summaries: int, *, bits: int) -> Family:
    """Those launches that a device's choice is for."""
    estimate = "none" if summaries == 0 else "moments" if summaries == 1 else "summaries"
    name = str(dtype).removeprefix("torch.")
    return Family(name, blocks.BLOCK_M, blocks.BLOCK_D, blocks.BLOCK_V, estimate, bits)


def builtin_choice(blocks: DecodeBlocks) -> Choice:
    """What is chosen where nothing was measured on the device."""
    return Choice(blocks.BLOCK_N, blocks.num_warps, blocks.num_stages, WAVES)


def number_of_splits(programs: int, capacity: int, block_n: int, processors: int, waves: int = WAVES) -> int:
    """Parts of the sequence: enough to occupy the device, none smaller than a tile.

    Depends on shapes only, never on counts: those are known to the device alone, and a captured graph is fixed.
    """
    wanted = triton.cdiv(waves * processors, max(programs, 1))
    return max(1, min(wanted, triton.cdiv(capacity, block_n), SPLITS))


def estimate_flags(expansion: Expansion | None) -> dict[str, Any]:
    """Compile-time arguments that say what an estimate consists of."""
    if expansion is None:
        return {
            "SUMMARIES": 0,
            "BLOCK_S": SUMMARIES_AT_ONCE,
            "RANK": 0,
            "FULL_SLOPE": False,
            "FULL_VARIANCE": False,
            "DIAGONAL_VARIANCE": False,
            "ANCHORED": False,
        }
    summaries = expansion.log_weight.shape[-1]
    spread = 0 if expansion.variance is None else expansion.variance.ndim - expansion.log_weight.ndim + 1
    return {
        "SUMMARIES": summaries,
        "BLOCK_S": SUMMARIES_AT_ONCE,
        "RANK": 0 if expansion.slope_right is None else expansion.slope_right.shape[-2],
        "FULL_SLOPE": expansion.slope is not None,
        "FULL_VARIANCE": spread == 2,
        "DIAGONAL_VARIANCE": spread == 1,
        "ANCHORED": expansion.anchor is not None,
    }


def code_flags(coding: Coding | None, dv: int) -> dict[str, Any]:
    """Compile-time arguments that say how records are read."""
    of_keys, of_rough, of_values = 0, 0, 0
    if coding is not None:
        of_keys, of_values = coding.bits
        if coding.key_standard.order is not None:
            of_keys, of_rough = GRADES[of_keys]
    flags: dict[str, Any] = {"CODED": coding is not None}
    for part, bits in (("KEY", of_keys), ("ROUGH", of_rough), ("VALUE", of_values)):
        flags[f"{part}_HIGH"], flags[f"{part}_LOW"] = (*PLANES[bits], 0)[:2] if bits else (0, 0)
    return flags | {"VALUE_W": word_bytes(of_values, dv)}


def word_bytes(bits: int, size: int) -> int:
    """Bytes of the words that planes of values are read in: two, or one where a plane has an odd number; or 0."""
    return 2 - size * PLANES[bits][-1] // 8 % 2 if bits else 0


class Launch(NamedTuple):
    """One kernel and all that it is launched with, worked out from shapes and dtypes alone.

    Attributes
    ----------
    kernel : triton.JITFunction
    grid : tuple of int
    arguments : dict
        At run time, by name.
    constants, options : dict
        At compile time: arguments, and ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int]

    def __call__(self) -> None:
        """Run it."""
        self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def decode_triton(
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
    splits: int | None = None,
    coding: Coding | None = None,
    choices: Choices | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Run the kernel; arguments as those of `momentkv.backends.operators.decode`, checked there.

    ``splits`` overrules the number of parts of the sequence, ``choices`` those that were measured on the device.
    """
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    if choices is None:
        choices = chosen(q.device) if q.is_cuda else {}
    given = (q, k, v, positions, counts, starts, capacity, recent, expansion, scale, scored)
    out, lse, logits, launches = decode_launches(*given, processors, splits, coding, choices)
    for launch in launches:
        launch()
    return out, lse, logits


def decode_launches(
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
    processors: int,
    splits: int | None = None,
    coding: Coding | None = None,
    choices: Choices | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, list[Launch]]:
    """What `decode_triton` returns, still empty, and the launches that fill it on a device of so many processors.

    No tensor is read, so that tensors without data tell what a real call would launch. Launches that ``choices`` do not
    name are as built in.
    """
    batch, q_heads, q_len, d = q.shape
    dv = v.shape[-1] if coding is None else coding.value_standard.deviation.shape[-1]
    kv_heads = k.shape[1] if starts is None else starts.shape[-1]
    rows, heads = q_heads // kv_heads * q_len, batch * kv_heads
    newest = 0 if recent is None else recent.keys.shape[-2]
    flags, flags_of_codes = estimate_flags(expansion), code_flags(coding, dv)
    bits = 0 if coding is None else sum(coding.bits)
    blocks = decode_blocks(rows, d, dv, q.dtype, flags["SUMMARIES"], bits=bits)
    choice = builtin_choice(blocks)
    if choices:
        family = family_of(blocks, q.dtype, flags["SUMMARIES"], bits=bits)
        choice = choices.get(family, choice)
    blocks = blocks._replace(BLOCK_N=choice.tokens, num_warps=choice.num_warps, num_stages=choice.num_stages)
    if coding is None:
        blocks = blocks._replace(BLOCK_R=choice.tokens)
    tiles = triton.cdiv(rows, blocks.BLOCK_M)
    q = q.contiguous()
    k, v = (side_by_side(x) if coding is None else x.contiguous() for x in (k, v))
    positions = None if positions is None else side_by_side(positions)
    if recent is not None:
        recent = recent._replace(keys=side_by_side(recent.keys), values=side_by_side(recent.values))
    # With few heads the estimate or recent tokens would make one split the slowest; they get one for themselves.
    apart = expansion is not None or recent is not None
    if splits is None:
        splits = number_of_splits(heads * tiles, capacity, blocks.BLOCK_N, processors, choice.waves)
        splits = min(splits, SPLITS - apart)
    own = apart and splits > 1
    splits += own
    out = q.new_empty((batch, q_heads, q_len, dv))
    lse = torch.empty((batch, q_heads, q_len), dtype=torch.float32, device=q.device)
    logits = None
    if scored:
        logits = torch.empty(
            (batch, kv_heads, q_heads // kv_heads, q_len, capacity + newest), dtype=torch.float32, device=q.device
        )
    part_out = part_lse = lse  # not written
    if splits > 1:
        part_out = torch.empty((heads, splits, rows, dv), dtype=torch.float32, device=q.device)
        part_lse = torch.empty((heads, splits, rows), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse, logits, []
    packed = starts is not None
    names = ("kb", "kh", "kn", "vb", "vh", "vn", "pb", "ph", "sd", "sv", "rkb", "rkh", "rkn", "rvb", "rvh", "rvn")
    strides = [0, 0, k.stride(-2), 0, 0, v.stride(-2)] if packed else [*k.stride()[:3], *v.stride()[:3]]
    strides += [0, 0] if packed or positions is None else list(positions.stride()[:2])
    parts: dict[str, Any] = dict.fromkeys(Expansion._fields)
    if expansion is not None:
        parts = {name: contiguous(name, x) for name, x in expansion._asdict().items()}
    strides += [0, 0] if parts["slope"] is None else list(parts["slope"].stride()[-2:])
    strides += [0] * 6 if recent is None else [*recent.keys.stride()[:3], *recent.values.stride()[:3]]
    sizes = blocks._asdict()
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    arguments = {
        "Q": q,
        "K": k,
        "V": v if coding is None else v.view(WORDS[flags_of_codes["VALUE_W"]]),
        "POSITIONS": positions,
        "COUNTS": counts,
        "STARTS": starts,
        "KEY_STEP": None if coding is None else coding.key_step,
        "VALUE_STEP": None if coding is None else coding.value_step,
        "MEAN": None if coding is None else coding.key_standard.mean,
        "DEVIATION": None if coding is None else coding.key_standard.deviation,
        "ORDER": None if coding is None else coding.key_standard.order,
        "SPREAD": None if coding is None else coding.value_standard.deviation,
        "RECENT_K": None if recent is None else recent.keys,
        "RECENT_V": None if recent is None else recent.values,
        "RECENT_VALID": None if recent is None or recent.valid is None else recent.valid.contiguous().view(torch.uint8),
        **{POINTERS[name]: x for name, x in parts.items()},
        "OUT": out,
        "LSE": lse,
        "PART_OUT": part_out,
        "PART_LSE": part_lse,
        "LOGITS": logits,
        "scale": scale,
        "rows": rows,
        "capacity": capacity,
        "recent": newest,
        "kv_heads": kv_heads,
        "splits": splits,
        "own_split": int(own),
        **{f"stride_{name}": stride for name, stride in zip(names, strides, strict=True)},
    }
    constants = {
        "D": d,
        "DV": dv,
        "MASKED": positions is not None,
        "COUNTED": counts is not None,
        "PACKED": packed,
        "SCORED": scored,
        "RECENT": recent is not None,
        "RECENT_MASKED": recent is not None and recent.valid is not None,
        # Recent tokens are few; waiting for a tile of them costs less than the shared memory of another.
        "RECENT_STAGES": None if coding is None else 1,
        **flags_of_codes,
        "WARPS": blocks.num_warps if coding is not None else 0,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",  # the latter means nothing to halves
        # Of halves, three products of tensor cores for one, where registers allow: full float32 took a fifth of the
        # kernel's time (H200).
        "EXACT": "ieee" if q.dtype == torch.float32 or (max(d, dv) > 128 and coding is None) else "tf32x3",
        **flags,
        **sizes,
    }
    launches = [Launch(decode_kernel, (heads, splits, tiles), arguments, constants, options)]
    if splits > 1:
        arguments = {"PART_OUT": part_out, "PART_LSE": part_lse, "OUT": out, "LSE": lse, "rows": rows, "splits": splits}
        constants = {"DV": dv, "BLOCK_V": blocks.BLOCK_V, "BLOCK_S": max(16, triton.next_power_of_2(splits))}
        launches.append(Launch(combine_kernel, (heads, rows), arguments, constants, {"num_warps": 4, "num_stages": 1}))
    return out, lse, logits, launches


def contiguous(name: str, x: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as the kernel reads it; only the slope may lie the other way round."""
    if x is None or (name == "slope" and x.mT.is_contiguous()):
        return x
    return x.contiguous()

"""How long launches should take on GPUs that are not at hand, from their bytes and how many are in flight.

Bytes are counted from the kernels' own loads and stores. Registers and shared memory, as compiled, say how many blocks
run at once; what they ask for before they wait, and the time until an answer comes, bound the bandwidth (Little's law).
Memory comes in sectors, and those that are touched cross the L2 cache whole. Blocks come in waves, each at the
bandwidth that its number of blocks can draw. Everything else is left out. So a prediction is what a good kernel should
reach, not a measurement.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from momentkv.backends.operators import decode
from momentkv.backends.triton.builds import GPUS, Build, Gpu, Usage, build_of, compile_build, occupancy
from momentkv.backends.triton.decode import Launch
from momentkv.backends.triton.reach import Calls, expansions, launched, spread_out, without_data
from momentkv.backends.triton.traffic import Traffic, counting
from momentkv.evaluation.layer_times import Shape
from momentkv.testing.gpu.few_bits import CODES, records
from momentkv.testing.gpu.layers import SHAPES
from momentkv.testing.gpu.parts import Row

__all__ = ["KINDS", "Prediction", "compiled", "counted", "predictions"]

# Names as in `momentkv.evaluation.layer_times.of_layer`, of corrections as in `reach.expansions`.
KINDS = {"retained only": "none", "moments of order 1": "order-1", "12 summaries": "summaries"}
KINDS |= dict.fromkeys(CODES, "none")
# Assumed, not measured: seconds of a launch, seconds from a request to its answer, share of the bandwidth on paper that
# a copy reaches.
LAUNCH, LATENCY, COPY = 3e-6, 0.8e-6, 0.9
# Instructions of warps that a multiprocessor issues in a cycle.
ISSUED = 4


class Prediction(NamedTuple):
    """Of one operator call on one GPU.

    Attributes
    ----------
    gpu, name : str
    shape : dict
    launches, blocks : int
        Blocks of the first launch that a multiprocessor holds.
    bytes_of_a_token : float
        Of one KV head.
    bytes : int
    seconds : float
        Predicted.
    """

    gpu: str
    name: str
    shape: dict[str, int]
    launches: int
    blocks: int
    bytes_of_a_token: float
    bytes: int
    seconds: float


def calls_of(shape: Shape, kind: str, dtype: torch.dtype, *, heads: int | None = None) -> list[Launch]:
    """What the operator launches for a shape, or for the same with other heads: tensors without data."""
    batch, kv_heads = (shape.batch, shape.kv_heads) if heads is None else (1, heads)
    q = without_data(batch, kv_heads * shape.group, 1, shape.d, dtype=dtype)
    k = v = without_data(batch, kv_heads, shape.budget, shape.d, dtype=dtype)
    how: dict[str, Any] = {}
    if kind in CODES:
        k, v, how = records(shape._replace(batch=batch, kv_heads=kv_heads), CODES[kind], dtype, "meta")
    expansion = spread_out(expansions(shape.d)[KINDS[kind]], batch, kv_heads)
    with Calls() as calls:
        decode(q, k, v, expansion, scale=shape.d**-0.5, **how)
    return launched(calls.arguments[0], GPUS["H100"].processors)


def compiled(rehearse: bool, shapes: int = len(SHAPES)) -> Iterator[Row]:
    """What every launch of so many of the shapes takes of a multiprocessor, for each kind of GPU."""
    done: dict[tuple[Build, int], Usage] = {}
    for shape in SHAPES[:shapes]:
        for kind in KINDS:
            launches = calls_of(shape, kind, torch.bfloat16)
            for place, launch in enumerate(launches):
                build = build_of(launch)
                for target in sorted({gpu.target for gpu in GPUS.values()}):
                    if (build, target) not in done:
                        done[build, target] = compile_build(build, target)
                    usage = done[build, target]
                    warps = dict(build.options)["num_warps"]
                    yield {
                        "shape": shape._asdict(),
                        "name": kind,
                        "launch": place,
                        "kernel": build.name,
                        "target": target,
                        **usage._asdict(),
                        "right": usage.fits(target),
                        "warps": warps,
                        "blocks": occupancy(usage, warps, target),
                        "programs": int(torch.tensor(launch.grid).prod()),
                        "asked": asked(launch),
                        "issued": usage.loop * warps / launch.constants.get("BLOCK_N", math.inf),
                    }


def asked(launch: Launch) -> int:
    """Bytes that a block asks for before it waits: tiles of keys and values of all stages but the one in use."""
    sizes = launch.constants
    if "BLOCK_N" not in sizes:
        return int(4 * sizes["DV"])
    width = 8 * launch.arguments["K"].element_size()
    bits = sizes["D"] * width + sizes["DV"] * width
    if sizes["CODED"]:
        halves = sizes["KEY_HIGH"] + sizes["KEY_LOW"], sizes["ROUGH_HIGH"] + sizes["ROUGH_LOW"]
        bits = sizes["D"] * (sum(halves) / 2 if halves[1] else halves[0])
        bits += sizes["DV"] * (sizes["VALUE_HIGH"] + sizes["VALUE_LOW"])
    return int((launch.options["num_stages"] - 1) * sizes["BLOCK_N"] * bits / 8 / 2)


def counted(rehearse: bool, shapes: int = len(SHAPES)) -> Iterator[Row]:
    """Bytes of a token, and of all else, of one KV head of so many of the shapes; the same for all heads and rows.

    And the bytes of the sectors that loads of a token touch.
    """
    done: dict[tuple[Any, ...], tuple[float, float, float]] = {}
    for shape in SHAPES[:shapes]:
        for kind in KINDS:
            splits = calls_of(shape, kind, torch.float16)[0].arguments["splits"]
            key = (shape.group, shape.d, kind, splits)
            if key not in done:
                few, more = (traffic_of(shape._replace(budget=n), kind, splits) for n in (64, 192))
                a_token = (more.loaded + more.stored - few.loaded - few.stored) / 128
                rest = few.loaded + few.stored - 64 * a_token
                done[key] = a_token, rest, (more.touched - few.touched) / 128
            a_token, rest, touched = done[key]
            yield {"shape": shape._asdict(), "name": kind, "a_token": a_token, "a_head": rest, "touched": touched}


def traffic_of(shape: Shape, kind: str, splits: int) -> Traffic:
    """Of one KV head, by running the kernels on numbers of 16 bits; the interpreter has float16, which are as wide."""
    from momentkv.backends.triton.decode import decode_triton

    q = torch.zeros(1, shape.group, 1, shape.d, dtype=torch.float16)
    k = v = torch.zeros(1, 1, shape.budget, shape.d, dtype=torch.float16)
    counts = starts = coding = None
    if kind in CODES:
        k, v, how = records(shape._replace(batch=1, kv_heads=1), CODES[kind], torch.float16, "cpu")
        counts, starts, coding = how["counts"], how["starts"], how["coding"]
    expansion = expansions(shape.d)[KINDS[kind]]
    if expansion is not None:
        expansion = type(expansion)(*(None if x is None else x[:, :1] for x in expansion))
        splits -= splits > 1  # one more is added for the estimate
    with counting() as traffic:
        decode_triton(q, k, v, None, counts, starts, shape.budget, None, expansion, 1.0, False, splits, coding)
    return traffic


def predictions(parts: list[dict[str, Any]]) -> list[Prediction]:
    """From what a rehearsal compiled and counted; none if it did not."""
    rows = {part["name"]: part["rows"] for part in parts}
    usages, traffic = rows.get("compiled kernels", []), rows.get("bytes of kernels", [])
    made = []
    for gpu, limits in GPUS.items():
        for each in traffic:
            launches = [
                row
                for row in usages
                if row["shape"] == each["shape"] and row["name"] == each["name"] and row["target"] == limits.target
            ]
            if not launches:
                continue
            shape = Shape(**each["shape"])
            total = shape.batch * shape.kv_heads * (each["a_head"] + shape.budget * each["a_token"])
            tokens = shape.batch * shape.kv_heads * shape.budget
            seconds = seconds_of(total, launches[0], limits, tokens, tokens * each["touched"])
            seconds += LAUNCH * len(launches)
            made.append(
                Prediction(
                    gpu,
                    each["name"],
                    each["shape"],
                    len(launches),
                    launches[0]["blocks"],
                    each["a_token"],
                    int(total),
                    seconds,
                )
            )
    return made


def seconds_of(nbytes: float, launch: Row, gpu: Gpu, tokens: int = 0, touched: float = 0.0) -> float:
    """Of so many bytes, tokens, and bytes of sectors touched, read by the blocks of a launch in waves.

    Examples
    --------
    >>> gpu = Gpu(target=90, processors=100, bandwidth=1e12)
    >>> few, many = ({"programs": n, "blocks": 4, "asked": 32768} for n in (10, 4000))
    >>> seconds_of(1e9, few, gpu) > 2 * seconds_of(1e9, many, gpu)
    True
    """
    room = launch["blocks"] * gpu.processors
    waves, rest = divmod(launch["programs"], room)
    a_program = nbytes / launch["programs"]
    seconds = 0.0
    for number, programs in ((waves, room), (1, rest)):
        if programs:
            bandwidth = min(COPY * gpu.bandwidth, programs * launch["asked"] / LATENCY)
            a_processor = -(-programs // gpu.processors) * tokens / launch["programs"]
            issuing = a_processor * launch.get("issued", 0.0) / (ISSUED * gpu.clock)
            crossing = touched * programs / launch["programs"] / gpu.cache
            seconds += number * max(programs * a_program / bandwidth, issuing, crossing)
    return seconds

"""Sizes of the decode kernel measured on the GPU that is at hand: ``python -m momentkv.testing.gpu.tuning``.

For each family of launches a handful of candidates is compiled for the device, held against float64 and timed beside
the built-in sizes. One that has no room in registers or shared memory, or that errs, is left out; the built-in one
stays unless another is faster by a margin, twice. What was chosen goes into a file of the user's cache
(`momentkv.backends.triton.tuned`), which later processes read. Nothing else measures: no decoding step, no test.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import torch
from triton.errors import TritonError

import momentkv
from momentkv.backends.layout import Layout
from momentkv.backends.triton.builds import TARGETS, Build, build_of, compile_build
from momentkv.backends.triton.decode import builtin_choice, decode_blocks, decode_triton, family_of
from momentkv.backends.triton.reach import KV_HEADS, expansions, launches_of, spread_out, tiers_of
from momentkv.backends.triton.tuned import ALLOWED, Choice, Family, about_device, candidates, path_of, read, write
from momentkv.codes import SPLIT
from momentkv.evaluation.layer_times import CUDA, Shape, measure
from momentkv.evaluation.outputs import Output, check_output
from momentkv.testing.decoding import Decode
from momentkv.testing.gpu.few_bits import records
from momentkv.testing.gpu.kernels import error_of
from momentkv.testing.gpu.page import choice_line
from momentkv.testing.gpu.parts import Row

__all__ = ["Kind", "best", "builds_of", "choices_of", "kinds", "main", "times", "tune"]

# Corrections of each kind of estimate, as `reach.expansions` names them, the one that is timed first; and the same as
# `momentkv.testing.decoding` names it.
ESTIMATES = {"none": ("none",), "summaries": ("summaries",), "moments": ("order-1", "order-2")}
CHECKED = {"none": "none", "summaries": "summaries x 12", "moments": "order 1"}
# Batch and retained tokens that are timed, for 8 KV heads with groups of 4.
TIMED = ((64, 512), (64, 2048), (16, 512), (1, 512), (1, 2048))
# Another choice is taken if it takes so much less time in the mean of these, and in none of them so much more.
FASTER, SLOWER = 0.03, 0.02


class Kind(NamedTuple):
    """What stands for a family when it is measured.

    Attributes
    ----------
    dtype : torch.dtype
    d : int
        Head dimension.
    estimate : str
        As of a `momentkv.backends.triton.tuned.Family`.
    bits : int
        Of the mean of a key's and a value's numbers; 0 for vectors.
    """

    dtype: torch.dtype
    d: int
    estimate: str
    bits: int

    @property
    def builtin(self) -> tuple[Family, Choice]:
        """The family of its launches, and what is built in for it."""
        summaries = {"none": 0, "moments": 1, "summaries": 12}[self.estimate]
        bits = sum(SPLIT[self.bits]) if self.bits else 0
        blocks = decode_blocks(4, self.d, self.d, self.dtype, summaries, bits=bits)
        return family_of(blocks, self.dtype, summaries, bits=bits), builtin_choice(blocks)


def kinds(dtypes: Iterable[torch.dtype], dimensions: Iterable[int]) -> list[Kind]:
    """All that are measured, vectors before records; float32 has no records of more than 128 channels."""
    made = itertools.starmap(
        lambda bits, d, dtype, estimate: Kind(dtype, d, estimate, bits),
        itertools.product((0, 4, 8), dimensions, dtypes, ESTIMATES),
    )
    return [kind for kind in made if not (kind.bits and kind.dtype == torch.float32 and kind.d > 128)]


def builds_of(kind: Kind, choice: Choice) -> list[Build]:
    """The specialisations of a kind that hold most: every mask, logits to write; few bits and many."""
    choices = {kind.builtin[0]: choice}
    found: dict[Build, None] = {}
    for name in ESTIMATES[kind.estimate]:
        # Retained tokens beside recent ones, and recent ones alone, which are masked by position.
        for width, bits in ((480, SPLIT[kind.bits]),) if kind.bits else ((480, None), (0, None)):
            tiers = tiers_of(kind.dtype, kind.d, 1, Layout(1, 65, (width,) * KV_HEADS, bits), masked=True)
            launches = launches_of(tiers, expansions(kind.d)[name], 4, scored=True, choices=choices)
            found |= {build_of(launch): None for launch in launches}
    return [build for build in found if "BLOCK_N" in dict(build.constants)]


def fits(kind: Kind, choice: Choice, target: int) -> bool:
    """Whether all these compile for a compute capability with room, and spill nothing in loops."""
    try:
        return all(compile_build(build, target, loops=False).fits(target) for build in builds_of(kind, choice))
    except (RuntimeError, TritonError) as error:
        print(f"{choice} does not compile: {str(error)[-300:]}", file=sys.stderr)
        return False


def cases_of(kind: Kind) -> list[Decode]:
    """What results are checked on: packed, ragged, with recent tokens; and one head, in as many splits as wanted."""
    bits = SPLIT[kind.bits] if kind.bits else None
    few = Decode(kind.d, dtype=kind.dtype, estimate=CHECKED[kind.estimate], bits=bits, packed=True, recent=9, splits=0)
    one = dataclasses.replace(few, kv_heads=1, batch=1, group=4, capacity=150, scored=True)
    return [dataclasses.replace(few, kv_heads=3, recent_masked=True), one]


def examined(task: tuple[Kind, Choice, int | None]) -> Row:
    """Whether a candidate has room, and is right; of a rehearsal, which compiles nothing, the latter."""
    kind, choice, target = task
    torch.use_deterministic_algorithms(True)  # whatever is allocated and not written is NaN
    if target is not None and not fits(kind, choice, target):
        return {"fits": False, "right": None, "error": None}
    device = "cpu" if target is None else "cuda"
    try:
        found = [error_of(case, device, choices={kind.builtin[0]: choice}) for case in cases_of(kind)]
        if target is not None:  # what is timed is compiled here, several at a time, for the process that times
            for call in calls_of(kind, 0, torch.device(device)):
                call(choice, 0)
            torch.cuda.synchronize()
    except (RuntimeError, TritonError) as error:  # of this candidate alone
        return {"fits": True, "right": False, "error": None, "why": str(error)[-500:]}
    right = all(each["right"] for each in found)
    return {"fits": True, "right": right, "error": max(each["share"] for each in found)}


def best(builtin: Choice, tried: Sequence[Choice], seconds: Callable[[Choice], list[float]]) -> tuple[Choice, float]:
    """The fastest, and its time as a share of the built-in choice's; that one unless another is faster, twice.

    Parameters
    ----------
    builtin : Choice
    tried : sequence of Choice
    seconds : callable
        Measures a choice: its times for several shapes.

    Examples
    --------
    >>> builtin = Choice(64, 4, 2, 1)
    >>> times = {builtin: [2.0, 2.0], builtin._replace(num_stages=3): [1.0, 2.0]}
    >>> best(builtin, list(times), times.__getitem__)
    (Choice(tokens=64, num_warps=4, num_stages=3, waves=1), 0.707...)
    """
    base = seconds(builtin)
    others = {choice: compared(seconds(choice), base) for choice in tried if choice != builtin}
    for choice in sorted(others, key=lambda each: others[each]):
        if others[choice] > 1 - FASTER:
            break
        again = compared(seconds(choice), seconds(builtin))
        if again <= 1 - FASTER:
            return choice, max(others[choice], again)
    return builtin, 1.0


def compared(times: list[float], base: list[float]) -> float:
    """Mean time as a share of others; infinite where it is longer by more than what may be noise."""
    ratios = [one / other for one, other in zip(times, base, strict=True)]
    return math.inf if max(ratios) > 1 + SLOWER else geometric_mean(ratios)


def times(rehearse: bool, dtypes: Sequence[str], dimensions: Sequence[int], seconds: float) -> Iterator[Row]:
    """A row for each candidate, and one for what was chosen, of each kind; none is begun after so many seconds.

    A rehearsal measures nothing: it takes larger tiles for faster.
    """
    if rehearse:
        for kind in kinds([torch.float32], [16])[::4]:  # without estimate; summaries beside codes
            yield from of_kind(kind, map(examined, tasks_of(kind, None)), pretended)
        return
    begun, target = time.monotonic(), capability()
    with get_context("spawn").Pool(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        for kind in kinds([getattr(torch, name) for name in dtypes], dimensions):
            if time.monotonic() - begun > seconds:
                break
            yield from of_kind(kind, pool.imap(examined, tasks_of(kind, target)), timer(kind))


def tasks_of(kind: Kind, target: int | None) -> list[tuple[Kind, Choice, int | None]]:
    """Every candidate of a kind, to be examined."""
    return [(kind, choice, target) for choice in candidates(kind.builtin[1], coded=kind.bits > 0)]


def of_kind(kind: Kind, rows: Iterable[Row], seconds: Callable[[Choice], list[float]]) -> Iterator[Row]:
    """The rows of one kind: all candidates as they were examined, then what was chosen of those that may be."""
    family, builtin = kind.builtin
    usable = []
    for choice, row in zip(candidates(builtin, coded=kind.bits > 0), rows, strict=True):
        yield {"family": family._asdict(), "choice": choice._asdict()} | row
        if row["fits"] and row["right"]:
            usable.append(choice)
    if builtin in usable:  # else there is nothing to compare with, as its row says
        first, share = best(builtin, usable, seconds)
        last, further = best(first, [first._replace(waves=n) for n in ALLOWED["waves"]], seconds)
        yield {"family": family._asdict(), "choice": last._asdict(), "chosen": True, "share": share * further}


def pretended(choice: Choice) -> list[float]:
    """A rehearsal's times, which nobody measured."""
    return [64 / choice.tokens] * len(TIMED)


def timer(kind: Kind) -> Callable[[Choice], list[float]]:
    """What measures a choice on the device, over the same tensors for all."""
    device, sizes = torch.device("cuda"), CUDA._replace(seconds=0.1, repeats=20)
    calls: list[Callable[[Choice, int], Any]] = []

    def seconds(choice: Choice) -> list[float]:
        if not calls:  # allocated once candidates were examined
            calls.extend(calls_of(kind, sizes.rotate_bytes, device))
        rows = (measure("decode", "", partial(call, choice), sizes, device) for call in calls)
        return [float(row["seconds"]["median"]) for row in rows]

    return seconds


def calls_of(kind: Kind, rotated: int, device: torch.device) -> list[Callable[[Choice, int], Any]]:
    """Calls of the kernel with a choice, one for each shape that is timed; a number says which copy of tokens is read.

    So many bytes are read before the same ones again. No time depends on what the tensors hold.
    """
    calls: list[Callable[[Choice, int], Any]] = []
    for batch, budget in TIMED:
        shape = Shape(batch, 8, 4, kind.d, budget, 0)
        q = torch.ones(batch, 32, 1, kind.d, dtype=kind.dtype, device=device)
        expansion = spread_out(expansions(kind.d)[ESTIMATES[kind.estimate][0]], batch, 8)
        if expansion is not None:
            expansion = type(expansion)(*(None if x is None else torch.zeros_like(x, device=device) for x in expansion))
        size = 2 * batch * 8 * budget * kind.d * kind.dtype.itemsize
        held = [tokens_of(kind, shape, device) for _ in range(max(2, min(16, -(-rotated // size))))]

        def call(choice: Choice, i: int, q: Any = q, held: Any = held, expansion: Any = expansion) -> Any:
            k, v, counts, starts, capacity, coding = held[i % len(held)]
            given = (q, k, v, None, counts, starts, capacity, None, expansion, kind.d**-0.5, False, None, coding)
            return decode_triton(*given, choices={kind.builtin[0]: choice})

        calls.append(call)
    return calls


def tokens_of(kind: Kind, shape: Shape, device: torch.device) -> tuple[Any, ...]:
    """Keys and values, or records of them; counts, starts, capacity and coding as `decode_triton` takes them."""
    if kind.bits:
        k, v, how = records(shape, SPLIT[kind.bits], kind.dtype, device)
        return k, v, how["counts"], how["starts"], how["capacity"], how["coding"]
    lead = (shape.batch, shape.kv_heads, shape.budget, shape.d)
    k, v = (torch.ones(lead, dtype=kind.dtype, device=device) for _ in range(2))
    return k, v, None, None, shape.budget, None


def capability() -> int:
    """Compute capability of the device.

    Raises
    ------
    RuntimeError
        If there is no GPU, or one whose limits are not known, or Triton runs as an interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is 1, and an interpreter has no speed to measure; unset it")
    if not torch.cuda.is_available():
        raise RuntimeError("PyTorch finds no GPU here, and sizes are measured on one")
    major, minor = torch.cuda.get_device_capability()
    if 10 * major + minor not in TARGETS:
        known = ", ".join(f"{each // 10}.{each % 10}" for each in TARGETS)
        raise RuntimeError(f"the GPU has compute capability {major}.{minor}; limits are known for {known} alone")
    return 10 * major + minor


def choices_of(rows: Iterable[Row]) -> dict[Family, Choice]:
    """What was chosen, of the rows of `times`."""
    return {Family(**row["family"]): Choice(**row["choice"]) for row in rows if row.get("chosen")}


def tune(
    dtypes: Sequence[str] = ("bfloat16",),
    dimensions: Sequence[int] = (128, 64, 256),
    *,
    seconds: float = 540.0,
    path: Path | None = None,
) -> Path:
    """Measure, and write the choices of this device; those of families that were not measured stay.

    Parameters
    ----------
    dtypes : sequence of str
    dimensions : sequence of int
        Of heads.
    seconds : float
        No family is begun after these.
    path : Path, optional
        In place of the file in the user's cache, which later processes read.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    RuntimeError
        If there is no GPU, one whose limits are not known, or no folder for the file.
    ValueError
        If the file cannot be written.
    """
    capability()
    about = about_device(torch.device("cuda"))
    path = path_of(about) if path is None else path
    if path is None:
        raise RuntimeError("MOMENTKV_TUNED is empty, so that no file of choices is read; unset it, or give a path")
    check_output(Output("output", path, Path("tuned.json")))
    rows = []
    for row in times(False, dtypes, dimensions, seconds):
        rows.append(row)
        print(choice_line(row), flush=True)
    known = {}
    if path.exists():
        try:
            known = read(path, about)
        except (OSError, ValueError) as error:
            print(f"{path} is written anew: {error}")
    write(path, about | {"momentkv": momentkv.__version__}, known | choices_of(rows))
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit status 2 if there is no GPU that can be measured."""
    parser = argparse.ArgumentParser(
        prog="python -m momentkv.testing.gpu.tuning", description="Measure on this GPU which sizes its kernels take."
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--dimensions", nargs="+", type=int, default=[128, 64, 256], choices=[64, 128, 256])
    parser.add_argument("--seconds", type=float, default=540.0, help="no family is begun after these")
    parser.add_argument("--output", type=Path, help="in place of the file that is read later")
    options = parser.parse_args(arguments)
    try:
        path = tune(options.dtypes, options.dimensions, seconds=options.seconds, path=options.output)
    except (RuntimeError, ValueError) as error:
        print(error)
        return 2
    print(f"choices: {path}; to have the built-in sizes again, delete it")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What every kernel takes, compiled without a GPU: ``python -m momentkv.backends.triton.report``.

A kernel that compiles for a GPU without spilling registers is not thereby fast, but one that spills is slow; this much
can be checked on any machine. Which specialisations there are is asked of what launches them: see
`momentkv.backends.triton.reach`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import multiprocessing
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import triton

from momentkv.backends.triton.builds import TARGETS, Build, Usage, compile_build, occupancy
from momentkv.backends.triton.reach import reachable

__all__ = ["compiled", "few", "main", "sampled"]


def few(builds: Sequence[Build]) -> list[Build]:
    """Of builds that differ little the one with most to hold: in bfloat16 and float32, of large head dimensions."""
    chosen = []
    for build in builds:
        known, types = dict(build.constants), dict(build.types)
        if "CODED" not in known:
            if known["DV"] == 256 and types["OUT"] == "*bf16":
                chosen.append(build)
            continue
        if types["Q"] == "*fp16" or known["D"] not in (128, 256):
            continue
        if known["FULL_VARIANCE"] or (known["RANK"] and known["SCORED"] and known["MASKED"] | known["PACKED"]):
            chosen.append(build)
    return chosen


def sampled(builds: Sequence[Build], number: int) -> list[Build]:
    """So many of them, drawn at random; a larger number draws the same and more."""
    if number < 1:
        raise ValueError(f"sample is {number}; it must be at least 1")
    drawn = list(builds)
    random.Random(0).shuffle(drawn)
    return drawn[:number]


def compiled(
    builds: Sequence[Build], targets: Sequence[int], *, workers: int = 1
) -> Iterator[tuple[Build, int, Usage]]:
    """Compile all builds for all targets, in their order."""
    tasks = [(build, target) for build in builds for target in targets]
    if workers == 1:
        for build, target in tasks:
            yield build, target, compile_build(build, target)
        return
    # Kernels cannot be sent to a process, their names can. Forked, it might wait for a thread that it has not got.
    sent = [(build.kernel.__module__, build.kernel.__name__, *build[1:], target) for build, target in tasks]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        for (build, target), usage in zip(tasks, pool.map(compile_sent, sent, chunksize=4), strict=True):
            yield build, target, usage


def compile_sent(sent: tuple[Any, ...]) -> Usage:
    """`compile_build` of a build whose kernel is given by module and name, and a target behind it."""
    module, kernel, *rest, target = sent
    return compile_build(Build(getattr(importlib.import_module(module), kernel), *rest), target)


def line(build: Build, target: int, usage: Usage) -> str:
    """One build for one target, on one line."""
    warps = dict(build.options)["num_warps"]
    spilled = f"  {usage.stack} bytes spilled, {usage.looped} accesses in loops" if usage.stack else ""
    return (
        f"sm_{target:<4} registers {usage.registers:3}  shared {usage.shared / 1024:5.1f} KiB  warps {warps}  "
        f"blocks {occupancy(usage, warps, target):2}  {'' if usage.fits(target) else 'FAILS  '}{build.name}{spilled}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile all builds and print what they take; exit status 1 if one spills in a loop or has no room."""
    parser = argparse.ArgumentParser(prog="python -m momentkv.backends.triton.report", description=__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--few", action="store_true", help="leave out what differs little")
    parser.add_argument("--sample", type=int, metavar="N", help="only N, drawn at random, always the same")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    every = list(reachable())
    builds = few(every) if options.few else every
    if options.sample is not None:
        builds = sampled(builds, options.sample)
    failed = 0
    print(
        f"Triton {triton.__version__}, {len(builds)} of {len(every)} specialisations; "
        "blocks: a multiprocessor holds so many at once"
    )
    for build, target, usage in compiled(builds, options.targets, workers=options.workers):
        failed += not usage.fits(target)
        print(line(build, target, usage), flush=True)
    print(f"{failed} of {len(builds) * len(options.targets)} spill in a loop or have no room")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

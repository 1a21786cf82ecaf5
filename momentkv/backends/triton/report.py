"""What every kernel takes, compiled without a GPU: ``python -m momentkv.backends.triton.report``.

A kernel that compiles for a GPU without spilling registers is not thereby fast, but one that spills is slow; this much
can be checked on any machine. Which specialisations there are is asked of what launches them: see
`momentkv.backends.triton.reach`.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import importlib
import json
import multiprocessing
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import triton

from momentkv.backends.triton.builds import TARGETS, Build, Usage, compile_build, occupancy
from momentkv.backends.triton.reach import reachable

__all__ = ["compiled", "digest", "few", "main", "sampled"]


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


def compiled(tasks: Sequence[tuple[Build, int]], *, workers: int = 1) -> Iterator[tuple[Build, int, Usage]]:
    """Compile builds for targets, in their order."""
    if workers == 1:
        for build, target in tasks:
            yield build, target, compile_build(build, target, loops=False)
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
    return compile_build(Build(getattr(importlib.import_module(module), kernel), *rest), target, loops=False)


def digest(build: Build, target: int) -> str:
    """What changes with the build, with the source of its kernel and of all that it calls, with target and Triton."""
    parts = (build.kernel.__module__, build.kernel.__name__, build.kernel.cache_key, *build[1:], target)
    return hashlib.sha256(repr((*parts, triton.__version__)).encode()).hexdigest()[:20]


def kept(path: Path | None) -> dict[str, Usage]:
    """What an earlier run wrote, by `digest`; a last line that was cut off is left out."""
    if path is None or not path.exists():
        return {}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(lines), encoding="utf-8")
    return {key: Usage(*usage) for key, *usage in map(json.loads, lines)}


def added(path: Path | None, build: Build, target: int, usage: Usage) -> None:
    """Append a line to the file."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            print(json.dumps([digest(build, target), *usage]), file=file)


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
    parser.add_argument("--file", type=Path, help="written as it goes; what is in it already is not compiled again")
    options = parser.parse_args(arguments)
    every = list(reachable())
    builds = few(every) if options.few else every
    if options.sample is not None:
        builds = sampled(builds, options.sample)
    tasks = [(build, target) for build in builds for target in options.targets]
    known = kept(options.file)
    keys = {task: digest(*task) for task in tasks}
    done = [(*task, known[keys[task]]) for task in tasks if keys[task] in known]
    rest = [task for task in tasks if keys[task] not in known]
    print(
        f"Triton {triton.__version__}, {len(builds)} of {len(every)} specialisations; "
        "blocks: a multiprocessor holds so many at once"
    )
    if done:
        print(f"{len(done)} of {len(tasks)} are in {options.file}")
    failed = 0
    for build, target, usage in done:
        if not usage.fits(target):
            failed += 1
            print(line(build, target, usage))
    for build, target, usage in compiled(rest, workers=options.workers):
        added(options.file, build, target, usage)
        failed += not usage.fits(target)
        print(line(build, target, usage), flush=True)
    print(f"{failed} of {len(tasks)} spill in a loop or have no room")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""What every kernel takes, compiled without a GPU: ``python -m momentkv.backends.triton.report``.

A kernel that compiles for a GPU without spilling registers is not thereby fast, but one that spills is slow; this much
can be checked on any machine.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from momentkv.backends.triton.decode import decode_blocks
from momentkv.backends.triton.decode_kernel import combine_kernel, decode_kernel

__all__ = ["Build", "Usage", "builds", "compile_build", "main"]

TARGETS = (90, 80)
# Triton's names of what kernels are given.
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHARED_LIMIT = {90: 227 * 1024, 80: 163 * 1024}  # bytes that a block may have: CUDA programming guide, table 21


class Build(NamedTuple):
    """One specialisation of one kernel.

    Attributes
    ----------
    name : str
    kernel : triton.JITFunction
    constants : dict
        Compile-time arguments.
    types : dict
        Types of run-time arguments that are not ``*fp32`` (names in capitals) or ``i32`` (others).
    options : dict
        ``num_warps`` and ``num_stages``.
    """

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, str]
    options: dict[str, int]


class Usage(NamedTuple):
    """What the assembler made of a build; the stack, in bytes a thread, is zero unless registers were spilled."""

    registers: int
    stack: int
    shared: int


ESTIMATES: dict[str, dict[str, Any]] = {
    "none": {},
    "order 0": {"SUMMARIES": 1},
    "order 1": {"SUMMARIES": 1, "FULL_SLOPE": True},
    "order 2": {"SUMMARIES": 1, "FULL_SLOPE": True, "FULL_VARIANCE": True},
    "summaries": {"SUMMARIES": 12, "RANK": 2, "DIAGONAL_VARIANCE": True, "ANCHORED": True},
}


def decode_build(estimate: str, dtype: str, d: int, *, group: int = 4, splits: int = 4, scored: bool = False) -> Build:
    """The decode kernel for one kind of estimate."""
    blocks = decode_blocks(group, d, d, DTYPES[dtype])._asdict()
    options = {name: blocks.pop(name) for name in ("num_warps", "num_stages")}
    constants = {
        "D": d,
        "DV": d,
        "SPLITS": splits,
        "OWN_SPLIT": int(splits > 1 and estimate != "none"),
        "SUMMARIES": 0,
        "BLOCK_S": 16,
        "RANK": 0,
        "FULL_SLOPE": False,
        "FULL_VARIANCE": False,
        "DIAGONAL_VARIANCE": False,
        "ANCHORED": False,
        "MASKED": True,
        "COUNTED": True,
        "PACKED": False,
        "SCORED": scored,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        **ESTIMATES[estimate],
        **blocks,
    }
    types = dict.fromkeys(("Q", "K", "V", "OUT"), f"*{dtype}") | {
        "POSITIONS": "*i32",
        "COUNTS": "*i32",
        "STARTS": "*i64",
        "scale": "fp32",
    }
    if dtype != "fp32":  # the copies of d x d matrices that attention reads are as wide as the cache
        types |= {"SLOPE": f"*{dtype}"}
        if ESTIMATES[estimate].get("FULL_VARIANCE"):
            types |= {"VARIANCE": f"*{dtype}"}
    name = f"decode, {estimate}{', scored' if scored else ''}, {dtype}, d {d}, group {group}, {splits} splits"
    return Build(name, decode_kernel, constants, types, options)


def combine_build(dtype: str, d: int, splits: int) -> Build:
    """The kernel that merges splits."""
    constants = {"DV": d, "BLOCK_V": triton.next_power_of_2(d), "SPLITS": splits}
    constants["BLOCK_S"] = triton.next_power_of_2(splits)
    name = f"combine, {dtype}, d {d}, {splits} splits"
    return Build(name, combine_kernel, constants, {"OUT": f"*{dtype}"}, {"num_warps": 4, "num_stages": 1})


def builds(*, few: bool = False) -> Iterator[Build]:
    """Every kind of estimate at every head dimension and dtype; ``few`` leaves out what differs little."""
    for dtype in DTYPES:
        for d in (64, 96, 128, 256):
            for estimate in ESTIMATES:
                # Left out: what differs little, or takes less.
                if few and (dtype == "fp16" or d not in (128, 256) or estimate not in ("order 2", "summaries")):
                    continue
                yield decode_build(estimate, dtype, d, scored=estimate == "summaries")
    yield decode_build("summaries", "bf16", 128, splits=1)
    yield decode_build("summaries", "bf16", 128, group=24, scored=True)
    yield combine_build("bf16", 256, 65)


def compile_build(build: Build, target: int) -> Usage:
    """Compile for a compute capability (90 is Hopper); no GPU is needed.

    Raises
    ------
    RuntimeError
        If Triton runs as an interpreter, which compiles nothing.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is 1, and an interpreter compiles nothing; unset it")
    arguments = build.kernel.arg_names
    signature = {
        name: "constexpr" if name in build.constants else build.types.get(name, "*fp32" if name.isupper() else "i32")
        for name in arguments
    }
    # Allocations are aligned to 16 bytes, and strides are multiples of d.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(arguments)
        if signature[name].startswith("*") or name.startswith("stride_")
    }
    constants = {(arguments.index(name),): value for name, value in build.constants.items()}
    source = ASTSource(build.kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=build.options)
    registers, stack = resource_usage(compiled.asm["cubin"])
    return Usage(registers, stack, int(compiled.metadata.shared))


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread, as the disassembler that comes with Triton reports them."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        report = subprocess.run(
            [str(tool), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no resource usage: {report!r}")
    return int(found[1]), int(found[2]) + int(found[3])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile all builds and print what they take; exit status 1 if one spills or has no room in shared memory."""
    parser = argparse.ArgumentParser(prog="python -m momentkv.backends.triton.report", description=__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--few", action="store_true", help="leave out what differs little")
    options = parser.parse_args(arguments)
    failed = 0
    print(f"Triton {triton.__version__}")
    for build in builds(few=options.few):
        for target in options.targets:
            usage = compile_build(build, target)
            wrong = usage.stack > 0 or usage.shared > SHARED_LIMIT[target]
            failed += wrong
            print(
                f"sm_{target}  {build.name:<60} {build.options['num_warps']} warps  registers {usage.registers:3}  "
                f"shared {usage.shared / 1024:5.1f} KiB  stack {usage.stack} bytes{'  SPILLS' if wrong else ''}",
                flush=True,
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

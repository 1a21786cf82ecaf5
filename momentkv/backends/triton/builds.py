"""Kernels compiled without a GPU: registers, shared memory, and how many blocks a multiprocessor then holds."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from momentkv.backends.triton.decode import Launch

__all__ = ["GPUS", "TARGETS", "Build", "Gpu", "Usage", "build_of", "compile_build", "occupancy"]


class Target(NamedTuple):
    """Limits of a compute capability: CUDA programming guide, section on compute capabilities.

    Attributes
    ----------
    block_shared, shared : int
        Bytes of shared memory that a block, and a multiprocessor, may have.
    warps, blocks, registers : int
        Of a multiprocessor.
    """

    block_shared: int
    shared: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536


TARGETS = {
    80: Target(163 * 1024, 164 * 1024),
    90: Target(227 * 1024, 228 * 1024),
    100: Target(227 * 1024, 228 * 1024),
}


class Gpu(NamedTuple):
    """What a data sheet says.

    Attributes
    ----------
    target : int
        Compute capability.
    processors : int
        Multiprocessors.
    bandwidth : float
        Bytes a second that its memory gives at most.
    cache : float
        Bytes a second that its L2 cache gives at most, in whole sectors: what counters of an H200 imply, of its chip.
    clock : float
        Cycles a second: 67 TFLOP/s of float32 are two a cycle of 132 times 128 units.
    """

    target: int
    processors: int
    bandwidth: float
    cache: float = 6.0e12
    clock: float = 1.98e9


GPUS = {"H100": Gpu(90, 132, 3.35e12), "H200": Gpu(90, 132, 4.8e12)}

# Triton's names of what kernels are given.
DTYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int16: "i16",
    torch.uint8: "u8",
}
# Registers are handed out to a warp in pieces of so many, and a block takes so many bytes of shared memory besides.
REGISTER_UNIT, RESERVED = 256, 1024
# Bytes of a thread that may be spilled outside of loops.
SPILLED = 32


class Build(NamedTuple):
    """One specialisation of one kernel.

    Attributes
    ----------
    kernel : triton.JITFunction
    constants : tuple of (str, value)
        Compile-time arguments, and run-time ones that are None or 1.
    types : tuple of (str, str)
        Types of the others.
    aligned : tuple of str
        Those that are multiples of 16.
    options : tuple of (str, int)
        ``num_warps`` and ``num_stages``.
    """

    kernel: Any
    constants: tuple[tuple[str, Any], ...]
    types: tuple[tuple[str, str], ...]
    aligned: tuple[str, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """What tells it from others."""
        known, types = dict(self.constants), dict(self.types)
        if "CODED" not in known:
            return f"combine, {types['OUT'][1:]}, d {known['DV']}, up to {known['BLOCK_S']} splits"
        words = ["decode", types["Q"][1:], f"d {known['D']}"]
        if known["D"] != known["DV"]:
            words.append(f"dv {known['DV']}")
        words.append(f"tile {known['BLOCK_M']} x {known['BLOCK_N']}")
        if known["CODED"]:
            keys, rough, values = (known[f"{part}_HIGH"] + known[f"{part}_LOW"] for part in ("KEY", "ROUGH", "VALUE"))
            words.append(f"codes of {keys}{f' and {rough}' if rough else ''}/{values} bits")
        if known["SUMMARIES"]:
            words.append(f"summaries {known['SUMMARIES']}")
        if known["RANK"]:
            words.append(f"rank {known['RANK']}")
        for flag, text in (("FULL_SLOPE", "SLOPE"), ("FULL_VARIANCE", "VARIANCE")):
            if known[flag]:
                across = " across" if flag == "FULL_SLOPE" and known.get("stride_sd") == 1 else ""
                words.append(f"{flag.lower().replace('_', ' ')} {types[text][1:]}{across}")
        shown = ("DIAGONAL_VARIANCE", "ANCHORED", "MASKED", "COUNTED", "PACKED", "SCORED")
        words += [flag.lower().replace("_", " ") for flag in shown if known[flag]]
        return ", ".join(words)


class Usage(NamedTuple):
    """What the assembler made of a build.

    Attributes
    ----------
    registers : int
        Of a thread.
    stack : int
        Bytes a thread; zero unless registers were spilled.
    shared : int
        Bytes a block.
    looped : int
        Instructions in loops that access what was spilled. Outside of loops a few bytes cost nothing that matters: the
        assembler spills them on purpose, to hold one block more.
    loop : int
        Instructions of the longest loop.
    """

    registers: int
    stack: int
    shared: int
    looped: int = 0
    loop: int = 0

    def fits(self, target: int) -> bool:
        """Whether no loop accesses spilled registers, and a block has room."""
        return self.looped == 0 and self.stack <= SPILLED and self.shared <= TARGETS[target].block_shared


def build_of(launch: Launch) -> Build:
    """The specialisation that Triton makes for a launch: by types, by None and 1, by multiples of 16."""
    constants, types, aligned = dict(launch.constants), {}, []
    general = {parameter.name for parameter in launch.kernel.params if parameter.do_not_specialize}
    for name, x in launch.arguments.items():
        if isinstance(x, torch.Tensor):
            types[name] = f"*{DTYPES[x.dtype]}"
            aligned.append(name)  # allocations begin at multiples of 256 bytes, and kernels are given whole ones
        elif x is None or (isinstance(x, int) and x == 1 and name not in general):
            constants[name] = x
        elif isinstance(x, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if -(2**31) <= x < 2**31 else "i64"
            if x % 16 == 0 and name not in general:
                aligned.append(name)
    order = launch.kernel.arg_names
    return Build(
        launch.kernel,
        tuple((name, constants[name]) for name in order if name in constants),
        tuple((name, types[name]) for name in order if name in types),
        tuple(aligned),
        tuple(launch.options.items()),
    )


def compile_build(build: Build, target: int, *, loops: bool = True) -> Usage:
    """Compile for a compute capability (90 is Hopper); no GPU is needed.

    Without ``loops`` the longest loop is not looked for, which takes a fifth of the time where nothing is spilled.

    Raises
    ------
    RuntimeError
        If Triton runs as an interpreter, which compiles nothing.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is 1, and an interpreter compiles nothing; unset it")
    order, types = build.kernel.arg_names, dict(build.types)
    signature = {name: types.get(name, "constexpr") for name in order}
    constants = {(order.index(name),): value for name, value in build.constants}
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in build.aligned}
    source = ASTSource(build.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=dict(build.options))
    return usage_of(compiled.asm["cubin"], int(compiled.metadata.shared), loops=loops)


def usage_of(cubin: bytes, shared: int, *, loops: bool = True) -> Usage:
    """What the disassembler that comes with Triton reports."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        report = disassembled("--dump-resource-usage", path)
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report)
        if found is None:
            raise RuntimeError(f"cuobjdump reported no resource usage: {report!r}")
        stack = int(found[2]) + int(found[3])
        if not (stack or loops):
            return Usage(int(found[1]), stack, shared)
        assembly = disassembled("-sass", path)
        return Usage(int(found[1]), stack, shared, accesses_in_loops(assembly), longest_loop(assembly))


def disassembled(option: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, str(path)], capture_output=True, text=True, check=True).stdout


def accesses_in_loops(assembly: str) -> int:
    """Loads and stores of local memory between a jump backwards and where it leads.

    Examples
    --------
    >>> lines = ["/*0000*/ STL [R1], R2 ;", "/*0010*/ LDL R3, [R1] ;", "/*0020*/ @P0 BRA 0x10 ;"]
    >>> accesses_in_loops(chr(10).join(lines))
    1
    """
    return sum(
        any(first <= at <= last for first, last in loops_of(assembly))
        for at, text in instructions_of(assembly)
        if re.search(r"\b(LDL|STL)\b", text)
    )


def longest_loop(assembly: str) -> int:
    """Instructions of the loop that has most, and none within.

    Examples
    --------
    >>> lines = ["/*0000*/ FADD R1, R2 ;", "/*0010*/ FMUL R3, R1 ;", "/*0020*/ @P0 BRA 0x10 ;"]
    >>> longest_loop(chr(10).join(lines))
    2
    """
    loops = loops_of(assembly)
    inner = [one for one in loops if not any(one != other and one[0] <= other[0] <= one[1] for other in loops)]
    places = [at for at, _ in instructions_of(assembly)]
    return max((sum(first <= at <= last for at in places) for first, last in inner), default=0)


def instructions_of(assembly: str) -> list[tuple[int, str]]:
    """Place and text of each."""
    return [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", assembly)]


def loops_of(assembly: str) -> list[tuple[int, int]]:
    """First and last place of what a jump backwards repeats."""
    jumps = [(at, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for at, text in instructions_of(assembly)]
    return [(int(jump[1], 16), at) for at, jump in jumps if jump and int(jump[1], 16) < at]


def occupancy(usage: Usage, warps: int, target: int) -> int:
    """Blocks of so many warps that a multiprocessor holds at once.

    Examples
    --------
    >>> occupancy(Usage(registers=128, stack=0, shared=40960), warps=4, target=90)
    4
    """
    limits = TARGETS[target]
    a_warp = -(-usage.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        limits.blocks,
        limits.warps // warps,
        limits.registers // a_warp // warps,
        limits.shared // (usage.shared + RESERVED),
    )

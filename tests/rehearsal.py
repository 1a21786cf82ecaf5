"""The command for a GPU, rehearsed, its parts in processes that are forked from this one; `test_gpu.py` runs this file.

Each is a process of its own, as when the command starts it, but what all of them import is imported once, which takes
as long as the parts themselves. The interpreter is chosen when Triton is imported, hence a process for all.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from types import SimpleNamespace
from typing import Any

import momentkv.hf  # noqa: F401  what most of the parts import
from momentkv.testing.gpu import child, run
from momentkv.testing.gpu.parts import PARTS

CHILD = [sys.executable, "-m", "momentkv.testing.gpu.child"]


class Forked:
    """What `run_part` asks of a process that it starts."""

    def __init__(self, command: Sequence[str], *, stdout: Any, stderr: Any, env: dict[str, str], **others: Any) -> None:
        assert list(command[:3]) == CHILD
        assert (stderr, others) == (subprocess.STDOUT, {"start_new_session": True})
        self.process = get_context("fork").Process(target=self.work, args=(command[3:], stdout.fileno(), env))
        self.process.start()
        self.pid = self.process.pid

    def work(self, arguments: Sequence[str], output: int, environment: dict[str, str]) -> None:
        os.setsid()
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ |= environment
        sys.exit(child.main(arguments))

    def wait(self, limit: float | None = None) -> int:
        self.process.join(limit)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("a part", limit or 0.0)
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode


def started(command: Sequence[str], start: Any = subprocess.Popen, **options: Any) -> Any:
    """A part's process; one that does not interpret kernels begins anew."""
    name = "TRITON_INTERPRET"
    return (Forked if options["env"][name] == os.environ[name] else start)(command, **options)


if __name__ == "__main__":
    hour = 3600.0
    for part in PARTS.values():
        importlib.import_module(f"momentkv.testing.gpu.{part.function.partition(':')[0]}")
    # Limits are for a GPU at hand for minutes; here a machine may be slow.
    parts = {name: part._replace(seconds=hour) for name, part in PARTS.items()}
    one_shape = {name: parts[name]._replace(arguments=(1,)) for name in ("compiled kernels", "bytes of kernels")}
    run.PARTS = parts | one_shape
    others = {name: getattr(subprocess, name) for name in ("STDOUT", "TimeoutExpired")}
    run.subprocess = SimpleNamespace(Popen=started, **others)
    sys.exit(run.main(["--rehearse", "--seconds", str(hour), *sys.argv[1:]]))

"""The kernels under compute-sanitizer, where it is installed: no access outside of what was allocated, no race."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator

from momentkv.testing.gpu.parts import Row, Skip

__all__ = ["checked", "complaints"]

TOOLS = ("memcheck", "racecheck")


def complaints(rehearse: bool) -> Iterator[Row]:
    """What each tool says of a few cases."""
    tool = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if rehearse:
        raise Skip("a rehearsal has no GPU to watch")
    if tool is None:
        raise Skip("compute-sanitizer is not installed")
    for name in TOOLS:
        command = [tool, "--tool", name, sys.executable, "-m", "momentkv.testing.gpu.sanitizer"]
        # PyTorch's own allocator hides what lies outside of a tensor.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        found = re.search(r"(ERROR SUMMARY|RACECHECK SUMMARY): (\d+)", run.stdout)
        count = int(found[2]) if found else None
        yield {"tool": name, "found": count, "right": count == 0 and run.returncode == 0, "said": run.stdout[-1000:]}


def checked() -> None:
    """The cases: ragged, masked, packed, parted, in few bits; every kind of estimate."""
    import torch

    from momentkv.testing.decoding import Decode
    from momentkv.testing.gpu.kernels import error_of

    half = torch.float16
    for case in (
        Decode(d=96, dtype=half, estimate="summaries x 12", splits=3, counted=True, scored=True),
        Decode(d=64, dtype=half, estimate="order 1", masked=True, splits=1),
        Decode(d=128, dtype=half, estimate="order 2", packed=True, splits=2),
        Decode(d=64, dtype=half, estimate="summaries x 12", packed=True, counted=True, bits=(5, 3), splits=2),
    ):
        print(case, error_of(case, "cuda"))


if __name__ == "__main__":
    checked()

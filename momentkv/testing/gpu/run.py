"""Run all parts, write what each gave, print the page."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import momentkv
from momentkv.backends.triton.tuned import chosen
from momentkv.evaluation.outputs import Output, check_output
from momentkv.testing.gpu.page import page_of
from momentkv.testing.gpu.parts import PARTS, Part
from momentkv.testing.gpu.predict import predictions

__all__ = ["main", "run_part"]

TOTAL = 540.0  # seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; exit status 1 if a part failed or found an error, 2 if there is no GPU and no rehearsal."""
    parser = argparse.ArgumentParser(
        prog="python -m momentkv.testing.gpu", description="Prove the kernels right on this GPU, and measure them."
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny, in Triton's interpreter: no timing")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="PART")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all parts together")
    parser.add_argument("--output", default="results/gpu.json")
    options = parser.parse_args(arguments)
    path = Path(options.output)
    try:
        check_output(Output("output", path, Path("gpu.json"), holds="parts"))
    except ValueError as error:
        parser.error(str(error))
    if not options.rehearse and not torch.cuda.is_available():
        print("PyTorch finds no GPU here; use --rehearse to run the same on the CPU, tiny, without timing")
        return 2
    content: dict[str, Any] = {"about": about(rehearse=options.rehearse), "parts": []}
    end = time.monotonic() + options.seconds
    for name in options.parts:
        if PARTS[name].rehearsed and not options.rehearse:
            continue
        result = run_part(PARTS[name], seconds=end - time.monotonic(), rehearse=options.rehearse)
        content["parts"].append(result)
        write(path, content)
        why = f": {result['why'].splitlines()[-1]}" if result["why"] else ""
        rows = len(result["rows"])
        print(f"{name:<24} {result['state']:<8} {result['seconds']:6.1f} s  {rows:3} rows{why}", flush=True)
    content["predictions"] = [each._asdict() for each in predictions(content["parts"])]
    write(path, content)
    print(page_of(content))
    print(f"\nresults: {path}")
    bad = [part for part in content["parts"] if part["state"] in ("failed", "late") or wrong(part)]
    return 1 if bad else 0


def wrong(part: dict[str, Any]) -> bool:
    """Whether a check of a part failed."""
    return any(row.get("right") is False for row in part["rows"])


def run_part(part: Part, *, seconds: float, rehearse: bool) -> dict[str, Any]:
    """Run a part in a process of its own for at most so long.

    Returns
    -------
    dict
        ``name``, ``state`` (done, skipped, failed, late, no time), ``why``, ``seconds`` and the ``rows`` so far.
    """
    limit = min(part.seconds, seconds)
    result: dict[str, Any] = {"name": part.name, "state": "no time", "why": "", "seconds": 0.0, "rows": []}
    if limit < 1:
        return result
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, errors = Path(folder) / "rows", Path(folder) / "errors"
        rows.touch()
        command = [sys.executable, "-m", "momentkv.testing.gpu.child"]
        command += [part.function, json.dumps(part.arguments), str(rows)]
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        if rehearse:
            command.append("--rehearse")
            environment["TRITON_INTERPRET"] = str(int(part.interpreted))
        with errors.open("w") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        text = errors.read_text(errors="replace")
        for line in rows.read_text(encoding="utf-8").splitlines(keepends=True):
            if not line.endswith("\n"):  # killed while it wrote
                break
            row = json.loads(line)
            if "skipped" in row:
                result |= {"state": "skipped", "why": row["skipped"]}
            else:
                result["rows"].append(row)
    result["seconds"] = time.monotonic() - begun
    if status is None:
        result |= {"state": "late", "why": f"stopped after {limit:.0f} s"}
    elif status != 0:
        result |= {"state": "failed", "why": text[-4000:].strip() or f"ended with status {status}"}
    elif result["state"] != "skipped":
        result["state"] = "done"
    return result


def about(*, rehearse: bool) -> dict[str, Any]:
    """Device and versions."""
    device: dict[str, Any] = {"name": "CPU, Triton's interpreter: a rehearsal, no timing"}
    tuned = 0
    if not rehearse:
        tuned = len(chosen(torch.device("cuda", 0)))
        found = torch.cuda.get_device_properties(0)
        device = {
            "name": found.name,
            "capability": f"{found.major}.{found.minor}",
            "processors": found.multi_processor_count,
            "memory": found.total_memory,
        }
    return {
        "rehearsal": rehearse,
        "device": device,
        "tuned": tuned,  # kinds of launches whose sizes come from a file
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "momentkv": momentkv.__version__,
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: installed(name) for name in ("torch", "triton", "numpy", "transformers")},
    }


def installed(name: str) -> str | None:
    """Version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)

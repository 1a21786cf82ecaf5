"""The Triton kernels without a GPU: right in Triton's interpreter, and compiled without spilling registers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is there on Linux only")

from momentkv.backends.triton import report as kernels_report
from momentkv.backends.triton.decode import SPLITS, number_of_splits
from momentkv.backends.triton.report import SHARED_LIMIT, TARGETS, Build, Usage, builds, compile_build


def test_kernels_agree_with_the_oracle_in_the_interpreter():
    """In a process of its own: Triton chooses between compiler and interpreter when a kernel is defined."""
    file = Path(__file__).with_name("interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=file.parent.parent)
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


@pytest.mark.parametrize("build", list(builds(few=True)), ids=lambda build: build.name)
def test_kernels_compile_without_spilling_registers(build: Build):
    for target in TARGETS:
        usage = compile_build(build, target)
        assert usage.stack == 0, f"sm_{target}: {usage}"
        assert 0 < usage.registers <= 255
        assert 0 < usage.shared <= SHARED_LIMIT[target]


@pytest.mark.parametrize("usage", [Usage(255, 8, 1024), Usage(64, 0, 2**20)], ids=["spills", "shared memory"])
def test_a_build_that_takes_too_much_fails_the_report(
    usage: Usage, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(kernels_report, "compile_build", lambda build, target: usage)
    assert kernels_report.main(["--targets", "90", "--few"]) == 1
    assert "SPILLS" in capsys.readouterr().out
    monkeypatch.setattr(kernels_report, "compile_build", lambda build, target: Usage(64, 0, 1024))
    assert kernels_report.main(["--targets", "90", "--few"]) == 0


def test_nothing_is_compiled_in_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compile_build(next(builds()), 90)


def test_splits_fill_the_device_and_are_no_smaller_than_a_tile():
    for programs in (1, 7, 8, 512):
        for capacity in (0, 1, 64, 512, 131072):
            splits = number_of_splits(programs, capacity, 64, 132)
            assert 1 <= splits <= min(SPLITS, max(1, -(-capacity // 64)))
            assert splits * programs >= 132 or splits in (-(-capacity // 64), SPLITS, 1)

"""The scripts in examples/ run as they are and show what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout


def test_arrays_shows_that_each_order_lowers_the_error():
    errors = [float(x) for x in re.findall(r"relative error ([\d.]+)", run("arrays.py"))]
    plain, zero, one = errors
    assert one < zero < plain


@pytest.mark.model
def test_generate_stays_within_its_budget():
    out = run("generate.py", "--tokens", "600", "--budget", "128", "--new-tokens", "4")
    seen, used, full = re.search(r"(\d+) tokens seen, cache ([\d.]+) MiB of ([\d.]+) MiB", out).groups()
    assert int(seen) == 603
    # 603 tokens against fewer than 128 + 32, moments and all.
    assert float(used) < float(full) * 220 / 603


@pytest.mark.model
def test_tradeoff_tries_every_correction():
    small = ("--context", "500", "--following", "16", "--texts", "types", "--budget", "64")
    out = run("summaries_tradeoff.py", *small)
    assert all(name in out for name in ("plain eviction", "one, compact", "12, rank 2", "24, rank 4"))

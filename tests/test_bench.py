"""The command `momentkv bench`, with sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from momentkv.cli import main
from momentkv.evaluation import bench
from momentkv.evaluation.bench import CPU, Shape


def test_bench_measures_everything_against_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    small = CPU._replace(
        shapes=[Shape(1, 2, 3, 16, 40, 128)],
        copy_bytes=2**16,
        rotate_bytes=2**14,
        repeats=5,
        seconds=0.01,
        prefill=32,
        block=8,
        model=CPU.model | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 32},
        model_context=128,
        model_budget=40,
    )
    monkeypatch.setattr(bench, "CPU", small)
    assert main(["bench", "--device", "cpu", "--output", str(tmp_path / "bench.json")]) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert (tmp_path / "bench.png").stat().st_size > 0
    assert [row["what"] for row in rows] == ["device"] * 2 + ["decode"] * 6 + ["evict"] * 2 + ["prefill"] + [
        "model"
    ] * 3
    assert [row["name"] for row in rows[-3:]] == ["full cache", "budget 40", "budget 40, static"]
    assert rows[0]["share_of_copy"] == 1.0
    for row in rows:
        times = row["seconds"]
        assert times["repeats"] >= 5
        assert 0 < times["min"] <= times["lower_quartile"] <= times["median"] <= times["upper_quartile"]
    stored = 2 * 2 * 40 * 16 * 4
    assert rows[2]["bytes"] == stored
    assert rows[3]["bytes"] == stored * 128 // 40
    assert rows[5]["bytes"] == stored + 2 * 4 * (1 + 16 + 16 + 16 * 16)  # log-weight, means, slope
    assert "share of its" in capsys.readouterr().out


@pytest.mark.parametrize("device", ["meta", "cud"])
def test_a_device_that_is_not_there_is_refused(device: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "--device", device]) == 1
    assert f"device is '{device}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bench", "--threads", "0"], "threads is 0; use at least 1"),
        (["demo", "--following", "0"], "following is 0; use at least 1"),
        (["demo", "--context", "-3"], "context is -3; use at least 1"),
        (["evaluate", "fidelity", "--budgets", "64", "0"], "budgets has 0; use at least 1"),
        (["evaluate", "needles", "--lengths", "-1"], "lengths has -1; use at least 1"),
        (["evaluate", "suite", "--workers", "0"], "workers is 0; use at least 1"),
    ],
    ids=" ".join,
)
def test_what_is_counted_is_positive(command: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(command) == 1
    assert capsys.readouterr().err == f"momentkv: {message}\n"

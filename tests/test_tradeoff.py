"""Fidelity against needles: what is joined, what stands out, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_evaluation import is_image

from momentkv.cli import main
from momentkv.evaluation.report import write_json
from momentkv.evaluation.tradeoff import join


def fidelity_rows() -> list[dict[str, Any]]:
    """Two texts; of two policies at 64 and 128."""
    return [
        {
            "text": text,
            "policy": policy,
            "correction": "none",
            "bytes_as_tokens": tokens,
            "budget": tokens,
            "nbytes": tokens,
            "kl": base * scale / tokens,
            "top1": 0.5,
            "nll_change": 0.1,
            "head_error": None,
        }
        for text, scale in (("one", 1), ("two", 3))
        for policy, base in (("snapkv", 8), ("novelty", 16))
        for tokens in (64, 128)
    ]


def needle_rows(found: dict[str, int]) -> list[dict[str, Any]]:
    """Four haystacks of two lengths; of each policy so many needles."""
    cells = [("", "full cache", "", None)]
    cells += [(question, policy, "none", 64) for policy in found for question in ("seen", "unseen")]
    names = ("question", "policy", "correction", "bytes_as_tokens")
    return [
        dict(zip(names, cell, strict=True))
        | {"layout": "1 keys, 1 values", "task": "single", "value": "number", "index": 0, "nbytes": 1}
        | {"length": 100 + sample % 2, "depth": 0.5, "haystack": str(sample // 2), "budget": cell[3]}
        | {"values": float(sample < found.get(cell[1], 4)), "generated": None, "nll": 0.5, "tokens": 0.5}
        for sample in range(4)
        for cell in cells
    ]


def test_points_are_what_both_have_over_all_texts_and_lengths():
    points = join(fidelity_rows(), needle_rows({"snapkv": 1, "novelty": 3, "h2o": 4}))
    assert list(points["method"]) == ["snapkv/none", "novelty/none"]
    assert list(points["bytes"]) == [64, 64]
    assert list(points["kl"]) == [pytest.approx(8 * 2 / 64), pytest.approx(16 * 2 / 64)]
    assert list(points["unseen"]) == list(points["seen"]) == list(points["found"]) == [0.25, 0.75]
    assert list(points["n_unseen"]) == [4, 4]
    assert list(points["beaten"]) == [False, False]
    points = join(fidelity_rows(), needle_rows({"snapkv": 3, "novelty": 3}))
    assert list(points["beaten"]) == [False, True]


def test_command_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    files = written(tmp_path, "m", "m", needle_rows({"snapkv": 1, "novelty": 3}))
    plot = tmp_path / "new" / "plane.png"
    assert main(["evaluate", "tradeoff", *files, "--output", str(plot)]) == 0
    out = capsys.readouterr().out
    assert "m: KL over 2 texts of 4096 tokens" in out
    assert "bytes: of so many 16-bit tokens" in out
    assert [line.split() for line in out.splitlines() if "% of 4" in line] == [
        ["64", "snapkv/none", "0.250", *["25%", "of", "4"] * 2],
        ["novelty/none", "0.500", *["75%", "of", "4"] * 2],
    ]
    assert is_image(plot)
    assert main(["evaluate", "tradeoff", *files, "--output", str(plot), "--length", "101"]) == 0
    # Every other haystack has that length: samples 1 and 3 of four.
    assert [line.split()[-3] for line in capsys.readouterr().out.splitlines() if "% of 2" in line] == ["0%", "50%"]


@pytest.mark.parametrize(
    ("models", "found", "message"),
    [(("m", "n"), {"snapkv": 1}, "different models, m and n"), (("m", "m"), {"h2o": 1}, "have no method and budget")],
)
def test_what_cannot_be_joined_is_refused(
    models: tuple[str, str], found: dict[str, int], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["evaluate", "tradeoff", *written(tmp_path, *models, needle_rows(found))]) == 1
    assert message in capsys.readouterr().err


def test_bytes_of_different_tokens_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    files = written(tmp_path, "m", "m", needle_rows({"snapkv": 1}), bits=(16, 32))
    assert main(["evaluate", "tradeoff", *files]) == 1
    assert "count bytes in 16-bit tokens and in 32-bit tokens; measure both" in capsys.readouterr().err


def written(
    folder: Path, first: str, second: str, needles: list[dict[str, Any]], bits: tuple[int, int] = (16, 16)
) -> list[str]:
    """Both results as files."""
    contents = {
        "fidelity.json": {"protocol": {"model": first, "context": 4096, "bytes": bits[0]}, "rows": fidelity_rows()},
        "needles.json": {"protocol": {"model": second, "bytes": bits[1]}, "rows": needles},
    }
    return [str(write_json(folder / name, content)) for name, content in contents.items()]

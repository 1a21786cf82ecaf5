"""Tables on terminals of 60, 80 and 120 columns: nothing is cut, and those of every day fit."""

from __future__ import annotations

import argparse
import dataclasses
import io
import re
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from rich.table import Table
from test_evaluation import rows as fidelity_rows
from test_needles import made_rows as needle_rows

from momentkv import demo
from momentkv.evaluation import speed, stream
from momentkv.evaluation.fidelity import Fidelity
from momentkv.evaluation.lines import fidelity_lines, needle_lines, needles_of
from momentkv.evaluation.report import show
from momentkv.evaluation.steps import Step, Typical, evicted_tokens, typical
from momentkv.evaluation.terminal import fidelity_table, needles_table
from momentkv.evaluation.tradeoff import tradeoff_table

WIDTHS = (60, 80, 120)
NAMES = ["full cache", *(name for name, _, _ in demo.ROWS)]
CELLS = r"(\d+) +([\d.]+) +([\d.]+)% +([\d.]+) +(\d+)% +([\d.]+) +(\d+)? *(yes|no)"


def demo_rows(out: str) -> list[tuple[str, ...]]:
    """Name, kept, MiB, share, KL, top-1, tokens/s, flush (None where there was none) and found, of each cache."""
    return [x.groups() for x in re.finditer(rf"^({'|'.join(NAMES)}) +{CELLS}$", out, re.MULTILINE)]


def rendered(table: Table, width: int) -> str:
    file = io.StringIO()
    show(Console(file=file, width=width), table)
    return file.getvalue()


def cells(table: Table) -> list[str]:
    """Headers and cells."""
    return [str(x) for column in table.columns for x in (column.header, *column.cells)]


def assert_whole(table: Table, width: int) -> None:
    """Every number, sign and unit included, stands somewhere by itself, and so does every word."""
    text = rendered(table, width)
    assert "…" not in text
    words = set(text.split())
    for cell in cells(table):
        for word in cell.split():
            assert word in words, f"{word!r} of {cell!r} is cut at {width} columns:\n{text}"


def readings() -> list[demo.Reading]:
    """Of 32,000 tokens of a large model, on a slow machine."""
    large, speed = Fidelity(1.234, 0.999, -1), Typical(0.0081, 12.345)
    full = demo.Reading(
        "full cache", 32000, 4000 * 2**20, Fidelity(0, 1, 0), Typical(0.0123, None), "a", "b", "4831207"
    )
    others = [demo.Reading(name, 1024, 128 * 2**20, large, speed, "a", "b", "4") for name, _, _ in demo.ROWS]
    return [full, *others, *others]


def speed_rows() -> list[dict[str, Any]]:
    return [
        {
            "cache": kind,
            "tokens_per_second": 104.31,
            "seconds_of_a_flush": None if kind == "full cache" else 0.43,
            "prefill_seconds": 1093.5,
            "cache_bytes": 1355.8 * 2**20,
            "peak_bytes": 16451 * 2**20,
        }
        for kind in speed.KINDS
    ]


def speed_table() -> Table:
    return speed.table_of(speed_rows(), argparse.Namespace(model=None, context=131072, budget=1024, threads=2))


def test_a_peak_of_nothing_has_no_ratio():
    """Where memory is short, what a process holds may not rise above what it held before."""
    rows = [row | {"peak_bytes": 0} for row in speed_rows()]
    options = argparse.Namespace(model=None, context=131072, budget=1024, threads=2)
    assert " 0 " in rendered(speed.table_of(rows, options), 120)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["demo", "speed"])
def test_tables_of_every_day_fit_and_cut_nothing(name: str, width: int):
    table = demo.table_of(readings(), "a model reads") if name == "demo" else speed_table()
    assert_whole(table, width)
    assert max(map(len, rendered(table, width).splitlines())) <= width


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["fidelity", "needles", "tradeoff", "stream"])
def test_no_table_cuts_anything(name: str, width: int):
    long = {"method": "expected-attention/summaries-layer-heads@5/3"}
    if name == "fidelity":
        # Of one name, so that each needs a text of its own.
        measured = [row | long | {"text": f"{at}"} for at, row in enumerate(fidelity_rows())]
        table = fidelity_table(fidelity_lines(measured), title="title", bits=16)
    elif name == "needles":
        asked = [row | (long if row["question"] else {}) | {"generated": 0.5} for row in needle_rows(True)]
        table = needles_table(needle_lines(needles_of(asked)), title="title", bits=16)
    elif name == "tradeoff":
        found = {"seen": 0.123, "unseen": 0.5, "n_seen": 1000, "n_unseen": 1000, "beaten": False}
        points = pd.DataFrame([long | {"bytes": 1024, "kl": 0.123} | found])
        table = tradeoff_table(points, title="title", bits=16)
    else:
        row = {
            "prefill": "chunks of 512",
            "budget": 1024,
            "mean": 0.123,
            "p90": 0.456,
            "stretches": [0.1, 0.2, 0.3, 0.4],
        }
        table = stream.table_of([row | {"correction": "summaries, by layer-heads"}], "title")
    assert_whole(table, width)


@pytest.mark.parametrize("width", WIDTHS)
def test_what_a_model_wrote_is_shown_as_it_is(width: int):
    written = "A [bold] claim, 0123456789, is repeated."
    made = [dataclasses.replace(x, continuation=written, answer=written) for x in readings()]
    text = rendered(demo.texts_of(made, "What [now]?"), width)
    assert "Asked: What [now]?" in text
    assert " ".join(text.split()).count("0123456789,") == 2 * len(made)
    assert text.count("[bold]") == 2 * len(made)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


def test_speed_is_that_of_the_median_step_and_flushes_are_apart():
    steps = [Step(0.1, False)] * 20 + [Step(0.9, False)] * 3 + [Step(0.4, True)]
    assert typical(steps) == (0.1, 0.4)
    assert typical([Step(0.2, True), Step(0.3, True), Step(0.4, True)]) == (0.3, 0.3)
    row = next(x for x in rendered(demo.table_of(readings(), "t"), 80).splitlines() if x.startswith("the default"))
    assert row.split()[-3:] == ["123.5", "12345", "no"]  # 1 / 0.0081 s, and ms
    assert re.search(r"^full cache .* 81\.3 +yes", rendered(demo.table_of(readings(), "t"), 80), re.MULTILINE)
    assert evicted_tokens(object()) == 0

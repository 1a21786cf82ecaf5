"""The house as CONTRIBUTING describes it: one definition of the state, small files, no cases by kind of statistic."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

import momentkv
from momentkv.cache.state import ARRAYS, HOST, STATISTICS, LayerState
from momentkv.statistics.corrections import CORRECTIONS

ROOT = Path(momentkv.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_long(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400


def test_nothing_asks_what_kind_a_statistic_is():
    """Whoever adds a correction adds a file: what differs is a method of the correction or of its state."""
    names = {type(correction).__name__ for correction in CORRECTIONS.values()}
    kinds = names | {"Moments", "Summaries", "NoStatistics"}
    asked = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                named = {getattr(x, "id", getattr(x, "attr", "")) for x in ast.walk(node.args[1])}
                asked += [(path.name, node.lineno, kind) for kind in named & kinds]
    assert not asked


def test_the_state_of_a_layer_is_listed_once():
    """Moving, saving and counting go by the fields themselves."""
    fields = {field.name for field in dataclasses.fields(LayerState)}
    assert fields == {*ARRAYS, *STATISTICS, *HOST}

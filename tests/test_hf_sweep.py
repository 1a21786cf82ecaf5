"""Every causal language model type that the installed transformers knows is equal to itself, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from sweep import EQUAL, KINDS, outcome, read_tables

TABLES = read_tables()
# Of the installed version, if its table is there.
OUTCOMES = TABLES.get(transformers.__version__)


@pytest.mark.filterwarnings("ignore")  # of the models
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_type_equals_its_own_attention_or_is_refused_by_name(kind: str):
    """A prompt, a chunk and a token, with padding and without; a difference or an error of another raises.

    So does a comparison that wrong attention would pass, and a history that is too short and is not refused.
    """
    said = outcome(kind)
    if OUTCOMES is not None:
        assert said == OUTCOMES.get(kind), "run python tests/sweep.py"


def test_the_tables_have_every_type_of_the_oldest_and_the_newest_version():
    if OUTCOMES is not None:
        assert sorted(OUTCOMES) == sorted(KINDS)
    requirement = Path(__file__).parents[1] / "pyproject.toml"
    assert f"transformers>={next(iter(TABLES)).rpartition('.')[0]}," in requirement.read_text(encoding="utf-8")
    assert len(TABLES) > 1
    for outcomes in TABLES.values():
        assert sum(said == EQUAL for said in outcomes.values()) > len(outcomes) / 2

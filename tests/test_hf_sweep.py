"""Every causal language model type that the installed transformers knows is equal to itself, or refused by name."""

from __future__ import annotations

import pytest
import transformers
from sweep import KINDS, outcome, read_table

VERSION, OUTCOMES = read_table()


@pytest.mark.filterwarnings("ignore")  # of the models
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_type_equals_its_own_attention_or_is_refused_by_name(kind: str):
    """A prompt, a chunk and a token, with padding and without; a difference or an error of another raises."""
    said = outcome(kind)
    if transformers.__version__ == VERSION:
        assert said == OUTCOMES.get(kind), "run python tests/sweep.py"


def test_the_table_has_every_type():
    if transformers.__version__ == VERSION:
        assert sorted(OUTCOMES) == sorted(KINDS)
    assert sum(said == "equal" for said in OUTCOMES.values()) > len(OUTCOMES) / 2

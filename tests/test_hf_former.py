"""Cache files that momentkv 0.1.0 wrote: they load, and go on as that version did.

`tests/data` holds three of its files, of the tiny Llama of `tests/models.py`, two with a padded row, and the first
sixteen logits that 0.1.0 gave at every eighth of the forty steps that followed, and at the last.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from models import left_padded, prompt, tiny

from momentkv.hf import MomentCache

DATA = Path(__file__).parent / "data"
# Tokens of each row that a file has read. In "heads", the default settings but for ties that rounding would decide:
# every head retains more tokens than it has dimensions, for fewer are all equally novel, and novelty is no average over
# neighbours (`Balanced(kernel=1)`), for those of one token may be those of the next.
KINDS = {"heads": [160], "paper": [60, 47], "certified": [60, 47]}
STEPS = [0, 8, 16, 24, 32, 39]
# Of the largest logit: roundings of forty steps, through flushes, in float32.
TOLERANCE = 2e-5


def go_on(cache: MomentCache, lengths: list[int]) -> torch.Tensor:
    """Logits of steps after rows of these lengths."""
    _, mask = left_padded([prompt(1, length) for length in lengths])
    more, logits = prompt(len(lengths), 40, seed=5), []
    for step in range(40):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        places = (mask.cumsum(1) - 1)[:, -1:]
        with torch.no_grad():
            out = tiny("llama")(
                more[:, step : step + 1], attention_mask=mask, position_ids=places, past_key_values=cache
            )
        logits.append(out.logits[:, 0, :16])
    return torch.stack([logits[step] for step in STEPS], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_the_first_format_goes_on_as_its_version_did(kind: str, tmp_path: Path):
    expected = safetensors.torch.load_file(DATA / "momentkv-0.1.0-logits.safetensors")[kind]
    cache = MomentCache.load(DATA / f"momentkv-0.1.0-{kind}.safetensors", tiny("llama"))
    lengths = KINDS[kind]
    assert cache.get_seq_length() == lengths[0]
    cache.save(tmp_path / "cache")  # in the format of today
    again = MomentCache.load(tmp_path / "cache", tiny("llama"))
    logits = go_on(cache, lengths)
    assert (logits - expected).abs().max() <= TOLERANCE * expected.abs().max()
    assert torch.equal(go_on(again, lengths), logits)
    for core in cache.moment_layers.values():
        assert core.stored < max(core.budgets) + core.config.block
        counted = (core.positions >= 0).sum(-1) + core.moments.weight
        assert counted.tolist() == [[length + 40] * 2 for length in lengths]
        assert (core.evidence is not None) == (kind == "certified")


def test_files_of_the_first_format_are_small():
    assert all(path.stat().st_size < 60_000 for path in DATA.glob("momentkv-0.1.0-*"))

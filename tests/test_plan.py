"""Planned bytes are the bytes that caches hold; shapes come from names, files and transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from models import FAMILIES, prompt, tiny
from transformers import AutoConfig

import momentkv.hf
from momentkv import LayerCache
from momentkv.cli import CORRECTED, main
from momentkv.plan import KNOWN, Shape, find_shape, plan, shape_from_config, size
from momentkv.statistics.corrections import CORRECTIONS, AnchoredSummaries

SMALL = Shape(layers=1, kv_heads=2, q_heads=4, head_dim=16)


def filled(context: int, **options: object) -> LayerCache:
    """A layer that has read so many tokens, in the step that fills its block: eviction is still to come."""
    rng = np.random.default_rng(0)
    cache = LayerCache(64, **options)
    steps = [context - 31, *[1] * 31] if context >= 96 else [context]
    for count in steps:
        q, k, v = (rng.normal(size=(3, heads, count, 16)).astype(np.float32) for heads in (4, 2, 2))
        cache.append(k, v)
        cache.attend(q)
        if count != 1:
            cache.evict()
    return cache


@pytest.mark.parametrize("context", [20, 64, 80, 95, 300])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("policy", ["momentkv", "knorm", "expected-attention"])
def test_planned_bytes_are_those_of_a_layer_between_steps(context: int, correction: str, policy: str):
    cache = filled(context, policy=policy, correction=correction)
    # Between steps a block of 32 holds at most 31 tokens.
    result = plan(SMALL, context, 64, correction=correction, batch=3, dtype="float32", policy=policy, block=31)
    assert result.total == cache.nbytes
    assert result.retained + result.waiting == cache.keys.shape[-2]
    assert result.retained_bytes + result.waiting_bytes == cache.keys.nbytes + cache.values.nbytes
    anchored = correction == "summaries" or policy == "expected-attention"
    assert result.query_bytes == (cache.query_mean.nbytes + cache.query_square.nbytes if anchored else 0)
    assert result.state_bytes == cache.moments.nbytes
    assert (result.state_bytes == 0) == (correction == "none")


def test_the_plan_is_of_the_fullest_moment():
    cache = filled(300, correction="summaries")
    rng = np.random.default_rng(1)
    q, k, v = (rng.normal(size=(3, heads, 1, 16)).astype(np.float32) for heads in (4, 2, 2))
    cache.append(k, v)
    cache.attend(q)
    assert cache.nbytes == plan(SMALL, 301, 64, batch=3, dtype="float32", policy="momentkv").total
    cache.evict()
    assert cache.nbytes < plan(SMALL, 301, 64, batch=3, dtype="float32", policy="momentkv").total


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    ("dtype", "correction"), [("float32", "summaries"), ("bfloat16", "summaries"), ("bfloat16", "order-1")]
)
@torch.inference_mode()
def test_planned_bytes_are_those_of_a_model(family: str, dtype: str, correction: str, tmp_path: Path):
    model = tiny(family, dtype=dtype)
    model.config.save_pretrained(tmp_path)
    shape = find_shape(str(tmp_path))
    assert shape.layers == model.config.num_hidden_layers
    cache = momentkv.hf.MomentCache(model, 64, correction=correction, sharing="uniform")
    ids = prompt(2, 211)
    model(ids[:, :180], past_key_values=cache)
    for t in range(180, 211):
        model(ids[:, t : t + 1], past_key_values=cache)
    planned = plan(shape, 211, 64, correction=correction, batch=2, dtype=dtype, policy="balanced", block=31)
    assert planned.total == cache.nbytes


def test_known_shapes_give_the_bytes_that_one_computes_by_hand():
    llama = plan(KNOWN["Llama-3.1-8B"], 131072, 1024)
    assert llama.full == 2**34
    assert llama.retained_bytes == 32 * 8 * 1024 * 2 * 128 * 2
    assert llama.waiting_bytes == 32 * 8 * 32 * 2 * 128 * 2
    assert llama.bookkeeping_bytes == 32 * 8 * 1056 * 4  # positions; the default policy keeps no scores
    assert llama.state_bytes == 32 * 8 * 4 * (12 * 257 + 2 * 256 + 2 * 128 + 3)
    assert llama.query_bytes == 32 * 8 * 4 * 2 * 128
    assert llama.share == llama.total / 2**34
    order_1 = plan(KNOWN["Llama-3.1-8B"], 131072, 1024, correction="order-1")
    assert order_1.equivalent_tokens == 1024 + 4 * (1 + 2 * 128 + 128**2) / (2 * 128 * 2)
    assert plan(KNOWN["Qwen3-4B"], 8192, 512, correction="none").equivalent_tokens == 512
    assert plan(KNOWN["SmolLM2-135M"], 8192, 512, batch=4).full == 4 * plan(KNOWN["SmolLM2-135M"], 8192, 512).full
    own = plan(SMALL, 8192, 512, correction=AnchoredSummaries(summaries=1, rank=0))
    assert own.state_bytes == 2 * 4 * (33 + 2 * 16 + 3)


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "META-LLAMA/meta-llama-3.1-8b"])
def test_known_models_are_found_by_name_and_id_in_any_case(name: str):
    assert find_shape(name) == KNOWN["Llama-3.1-8B"]


def test_known_models_need_neither_torch_nor_transformers():
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None); from momentkv.cli import main;"
        "sys.exit(main(['plan', 'Qwen/Qwen3-4B-Instruct-2507', '--context', '32768', '--budget', '512']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "4.50 GiB" in done.stdout


def test_shape_of_a_directory_and_of_its_file_are_one(tmp_path: Path):
    FAMILIES["mistral sliding"]().save_pretrained(tmp_path)
    shape = Shape(layers=2, kv_heads=2, q_heads=4, head_dim=16, full_layers=0, sliding_window=16)
    assert find_shape(str(tmp_path)) == find_shape(str(tmp_path / "config.json")) == shape


@pytest.mark.parametrize(
    ("entries", "full_layers"),
    [
        ({}, 6),
        ({"sliding_window": None}, 6),
        ({"sliding_window": 8}, 0),
        ({"sliding_window": 8, "use_sliding_window": False}, 6),
        ({"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 4}, 4),
        ({"sliding_window": 8, "sliding_window_pattern": 3}, 2),
        ({"sliding_window": 8, "model_type": "gemma3_text"}, 1),
        ({"attention_chunk_size": 8}, 0),
        ({"layer_types": ["full_attention"] * 5 + ["sliding_attention"], "sliding_window": 8}, 5),
    ],
)
def test_full_attention_layers_are_told_from_the_others(entries: dict[str, object], full_layers: int):
    base = {"num_hidden_layers": 6, "num_attention_heads": 4, "hidden_size": 64}
    assert shape_from_config(base | entries).full_layers == full_layers
    assert shape_from_config({"text_config": base | entries}).full_layers == full_layers


def test_other_ids_are_looked_up_by_transformers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name: FAMILIES["gemma3"]())
    assert find_shape("someone/something") == Shape(4, 2, 4, 16, full_layers=2, sliding_window=16)

    def missing(name: str) -> None:
        raise OSError("no network\nand no file")

    monkeypatch.setattr(AutoConfig, "from_pretrained", missing)
    with pytest.raises(ValueError, match=r"model is 'someone/something', and transformers cannot load"):
        find_shape("someone/something")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"someone/something.*path of a config.json, or run pip install"):
        find_shape("someone/something")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, r"context is 0; use at least 1"),
        ({"budget": 33}, r"budget is 33, but sinks .* use budget >= 34"),
        ({"batch": 0}, r"batch is 0; use at least 1"),
        ({"block": 0}, r"block is 0"),
        ({"dtype": "int4"}, r"dtype is 'int4'; use one of bfloat16, float16, float32"),
        ({"correction": "mean"}, r"correction is 'mean'; use one of none, order-0, order-1, summaries"),
    ],
)
def test_bad_arguments_are_named_with_a_remedy(options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        plan(SMALL, **({"context": 100, "budget": 64} | options))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"layers": 0}, "layers is 0"),
        ({"kv_heads": 3}, "q_heads is 4; use a multiple of kv_heads, which is 3"),
        ({"full_layers": 3}, "full_layers is 3; use 0 to 2"),
        ({"full_layers": 1}, "sliding_window is 0, but 1 layers"),
    ],
)
def test_impossible_shapes_are_refused(numbers: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Shape(**({"layers": 2, "kv_heads": 2, "q_heads": 4, "head_dim": 16} | numbers))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"hidden_size": "64"}, "hidden_size is 64"),
        ({"kv_lora_rank": 512}, "kv_lora_rank is 512.*multi-head latent attention is not supported"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries but num_hidden_layers is 2"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types has 'linear_attention'"),
        (
            {
                "layer_types": ["sliding_attention", "chunked_attention"],
                "sliding_window": 8,
                "attention_chunk_size": 16,
            },
            r"windows of \[8, 16\] tokens",
        ),
    ],
)
def test_configurations_that_cannot_be_planned_say_why(entries: dict[str, object], message: str, tmp_path: Path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64} | entries))
    with pytest.raises(ValueError, match=message):
        find_shape(str(path))


def test_files_that_are_no_configuration_say_so(tmp_path: Path):
    with pytest.raises(ValueError, match=r"a directory without config\.json"):
        find_shape(str(tmp_path))
    with pytest.raises(ValueError, match="there is no such file"):
        find_shape(str(tmp_path / "config.json"))
    for text, message in (("{", "is not JSON"), ("[]", "holds no JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_shape(str(tmp_path))


@pytest.mark.parametrize("correction", CORRECTED)
def test_the_command_prints_every_part_and_fits_a_terminal(
    correction: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    options = ["--context", "131072", "--budget", "1024", "--correction", correction]
    assert main(["plan", "meta-llama/Llama-3.1-8B-Instruct", *options]) == 0
    out = capsys.readouterr().out
    assert "…" not in out
    cells = {row[0].strip(): row[1:] for row in (line.split("│")[1:-1] for line in out.splitlines()) if len(row) == 4}
    result = plan(KNOWN["Llama-3.1-8B"], 131072, 1024, correction=correction)
    assert cells["full cache"][1].strip() == "16.00 GiB"
    assert cells["retained keys and values"][1].strip() == "128.00 MiB"
    assert cells["total"][1].strip() == size(result.total)
    assert (f"correction: {correction}" in cells) == (correction != "none")
    assert "query statistics" in cells  # of the default policy, or of summaries
    assert f"{result.total:,} of {result.full:,} bytes" in out


def test_the_command_says_when_nothing_is_evicted_and_fails_in_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "SmolLM2-135M", "--context", "100", "--budget", "512", "--dtype", "float32"]) == 0
    assert "nothing is evicted yet" in capsys.readouterr().out
    assert main(["plan", "SmolLM2-135M", "--context", "100", "--budget", "20"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("momentkv: budget is 20")
    assert err.count("\n") == 1

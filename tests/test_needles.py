"""Needles on tiny models whose tokens are bytes: where they lie, what is scored, and what compression reads."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
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
from momentkv.evaluation import retrieval as module
from momentkv.evaluation.haystack import KEYS, TASKS, Answer, Haystack, Question, make_haystack
from momentkv.evaluation.intervals import bootstrap, wilson
from momentkv.evaluation.lines import needle_lines, needles_of
from momentkv.evaluation.prose import prose
from momentkv.evaluation.report import read_json, save_figure
from momentkv.evaluation.report_plots import plot_found
from momentkv.evaluation.retrieval import Reader, measure_haystack, recall
from momentkv.evaluation.settings import CHOICES, Setting, empty_cache
from momentkv.evaluation.terminal import needles_table
from momentkv.hf import read
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


def whole_answer(question: Question) -> tuple[list[int], str]:
    return question.tokens + question.answers[0].tokens, question.text + question.answers[0].text


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize("depth", [0, 0.1, 0.5, 0.9, 1])
def test_the_needle_is_where_it_was_asked_to_be(depth: float, template: str | None):
    fast = byte_tokenizer(template)
    made = make_haystack(fast, 4000, depth=depth)
    assert 4000 - 150 < len(made.context) <= 4000
    (found,) = re.finditer(r"The secret number of the \w+ is (\d{7})\.", made.text)
    (question,) = made.questions
    assert question.depth == found.start() / len(made.text)
    # The nearest boundary of sentences, of 150 letters at most; the needle and the template take some of the length.
    assert abs(question.depth - depth) < 0.03
    assert fast.decode(made.context) == made.text
    tokens, text = whole_answer(question)
    assert fast.decode(tokens) == text


@pytest.mark.parametrize("template", [None, TEMPLATE], ids=["plain", "chat"])
@pytest.mark.parametrize(
    ("value", "pattern"), [("number", r"\d{7}"), ("uuid", r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")]
)
def test_each_key_is_asked_for_and_its_value_is_the_answer(value: str, pattern: str, template: str | None):
    fast = byte_tokenizer(template)
    made = make_haystack(fast, 2500, ("multi-key",), value=value, keys=4, seed=(3,))
    noun = {"number": "number", "uuid": "code"}[value]
    pairs = {x[1]: x[2] for x in re.finditer(rf"The secret {noun} of the (\w+) is ({pattern})\.", made.text)}
    assert len(pairs) == len(set(pairs.values())) == 4
    asked = set()
    for question in made.questions:
        key = re.search(rf"What is the secret {noun} of the (\w+)\?", question.text)
        assert key is not None
        asked.add(key[1])
        assert question.text.endswith(f"The secret {noun} of the {key[1]} is")
        (answer,) = question.answers
        assert fast.decode(answer.tokens) == f" {pairs[key[1]]}"
        assert set(answer.counted) == {1}
        assert question.values == (pairs[key[1]],)
        assert question.depth == made.text.index(f"The secret {noun} of the {key[1]}") / len(made.text)
        assert ("<assistant>" in question.text) == (template is not None)
    assert asked == pairs.keys()


def test_several_needles_lie_evenly(tokenizer: Any):
    depths = sorted(x.depth for x in make_haystack(tokenizer, 6000, ("multi-key",), keys=5).questions)
    for band, depth in enumerate(depths):
        assert band / 5 - 0.05 < depth < (band + 1) / 5 + 0.05


def test_two_keys_are_asked_for_together(tokenizer: Any):
    made = make_haystack(tokenizer, 3000, ("multi-key", "multi-query"), keys=3)
    values = dict(re.findall(r"The secret number of the (\w+) is (\d{7})\.", made.text))
    both = [x for x in made.questions if x.task == "multi-query"]
    assert [x.task for x in made.questions] == ["multi-key"] * 3 + ["multi-query"] * 3
    for question in both:
        first, second = re.findall(r"of the (\w+)", question.text.partition("?")[0].rpartition("\n")[2])
        assert question.values == (values[first], values[second])
        (answer,) = question.answers
        assert answer.text == f" {values[first]}. The secret number of the {second} is {values[second]}"
        for which in (1, 2):  # the words between are given, not asked for
            counted = [token for token, value in zip(answer.tokens, answer.counted, strict=True) if value == which]
            assert tokenizer.decode(counted) == f" {question.values[which - 1]}"


def test_values_of_one_key_are_right_in_either_order(tokenizer: Any):
    made = make_haystack(tokenizer, 3000, ("multi-value",), keys=2)
    for question in made.questions:
        key = re.search(r"two secret numbers of the (\w+)\?", question.text)
        assert key is not None
        assert sorted(question.values) == sorted(
            re.findall(rf"A secret number of the {key[1]} is (\d{{7}})\.", made.text)
        )
        orders = [tuple(re.findall(r"\d{7}", answer.text)) for answer in question.answers]
        assert orders == [question.values, question.values[::-1]]
        for answer in question.answers:
            assert tokenizer.decode(question.tokens + answer.tokens) == question.text + answer.text


def test_a_token_across_the_question_and_the_answer_is_the_answers():
    class Pairs:
        chat_template = bos_token = None

        def __call__(self, text: str, **_: Any) -> Any:
            return argparse.Namespace(input_ids=re.findall(r"s(?: \d)?|\d\.?|\D", text))

    (question,) = make_haystack(Pairs(), 2500).questions
    answer = question.answers[0]
    assert answer.tokens[0] == f"s {answer.text[1]}"
    assert "".join(question.tokens + answer.tokens) == question.text + answer.text
    assert set(answer.counted) == {1}
    # The last digit is one token with the full stop after it, and still counts.
    question = make_haystack(Pairs(), 2500, ("multi-query",), keys=2).questions[0]
    answer = question.answers[0]
    assert "".join(x for x, which in zip(answer.tokens, answer.counted, strict=True) if which == 1).endswith(".")


def test_seeds_reproduce(tokenizer: Any):
    made = [make_haystack(tokenizer, 1500, seed=seed) for seed in ((0, 1), (0, 1), (0, 2))]
    assert made[0] == made[1]
    assert made[0].text != made[2].text
    assert made[0].questions[0].values != made[2].questions[0].values


def test_tasks_with_other_needles_need_another_haystack(tokenizer: Any):
    with pytest.raises(ValueError, match="tasks are single, multi-key, which need different needles"):
        make_haystack(tokenizer, 1500, ("single", "multi-key"))
    with pytest.raises(ValueError, match="keys is 1, but one question asks for 2; use more keys"):
        make_haystack(tokenizer, 1500, ("multi-query",), keys=1)
    assert TASKS.keys() == {"single", "multi-key", "multi-query", "multi-value"}


def test_prose_varies_and_holds_no_secret():
    source = prose(np.random.default_rng(0))
    made = [next(source) for _ in range(500)]
    assert len(set(made)) == 500
    assert "secret" not in " ".join(made)
    assert not re.search(r"[{}]", " ".join(made))


def test_a_text_is_a_haystack(tokenizer: Any):
    own = " ".join(f"Line {index} is here." for index in range(100))
    made = make_haystack(tokenizer, 900, haystack=own)
    lines = [int(x) for x in re.findall(r"Line (\d+) is here\.", made.text)]
    assert len(lines) > 40
    assert {(b - a) % 100 for a, b in itertools.pairwise(lines)} == {1}  # whole, in order, over the end
    with pytest.raises(ValueError, match=r"haystack has \d+ tokens, but a length of 5000 needs .*longer text"):
        make_haystack(tokenizer, 5000, haystack=own)
    with pytest.raises(ValueError, match=r"length is 60, but the 3 needles and the chat template take 1\d\d tokens"):
        make_haystack(tokenizer, 60, ("multi-key",), keys=3)


@pytest.mark.parametrize(
    "text",
    [
        "A tree grows. " + "def f(x): return [x, x + 1] " * 900,  # code has no sentences
        "A tree grows. " * 20 + "word, " * 2000 + "end. " + "Grass grows. " * 20,
        "\u6811" * 3000,  # nor has every language words between spaces
    ],
    ids=["code", "a list among sentences", "no spaces"],
)
@pytest.mark.parametrize("length", [400, 2000])
def test_a_sentence_that_does_not_fit_is_cut(text: str, length: int, tokenizer: Any):
    """Not the end of the context, which would then be far shorter than what is said to be measured."""
    for seed in range(3):
        made = make_haystack(tokenizer, length, depth=0.5, haystack=text, seed=(seed,))
        assert 0.95 * length <= len(made.context) <= length
        assert abs(made.questions[0].depth - 0.5) < 0.5 * 480 / length  # of the nearest piece of 120 letters
        assert "\ufffd" not in made.text
    # A needle stays between whole sentences where these fill the context.
    assert re.search(r"\. The secret", make_haystack(tokenizer, length, haystack="A tree grows. " * 200).text)


def test_recall_counts_values_and_their_tokens():
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5 + 1e-3]]))
    some, every = (recall(logits, Answer(tokens, [1, 1, 1], "")) for tokens in ([0, 1, 0], [0, 1, 1]))
    assert (some.values, every.values) == (0, 1)
    assert some.tokens == pytest.approx(2 / 3)
    assert every.nll == pytest.approx(-np.log([0.9, 0.8, 0.501 / 1.001]).mean(), rel=1e-4)
    # Two values, and a word between them that is wrong and does not count.
    assert recall(logits, Answer([0, 0, 1], [1, 0, 2], "")) == recall(logits[[0, 2]], Answer([0, 1], [1, 2], ""))
    assert recall(logits, Answer([0, 0, 0], [1, 0, 2], "")).values == 0.5


@pytest.fixture(scope="module")
def haystack(tokenizer: Any) -> Haystack:
    return make_haystack(tokenizer, 400)


@pytest.fixture(scope="module")
def several(tokenizer: Any) -> Haystack:
    return make_haystack(tokenizer, 500, ("multi-value",), keys=2)


@pytest.mark.parametrize("correction", list(CHOICES))
def test_a_budget_beyond_the_context_is_the_full_cache(
    correction: str, model: Any, haystack: Haystack, several: Haystack, tokenizer: Any
):
    # So large that even the last layer of a pyramid keeps all.
    cells = [(question, Setting("snapkv", 12_000, *CHOICES[correction])) for question in ("unseen", "seen")]
    for made in (haystack, several):
        asked = list(measure_haystack(model, made, cells, tokenizer=tokenizer, generate=made is haystack))
        count = len(made.questions)
        assert [x.cell for x in asked] == [None] * count + [cells[0]] * count + [cells[1]] * count
        assert asked[0].nbytes == len(made.context) * 2 * 2 * 2 * 16 * 4
        for x in asked:
            full = asked[x.which]
            assert (x.recall.values, x.recall.tokens) == (full.recall.values, full.recall.tokens)
            assert x.recall.generated == full.recall.generated
            assert x.recall.nll == pytest.approx(full.recall.nll, rel=1e-4)


@pytest.mark.parametrize("policy", ["knorm", "h2o", H2O(observes=None), "balanced"], ids=str)
@pytest.mark.parametrize("correction", ["none", "summaries", "summaries-layers", "summaries-heads"])
def test_measurement_is_a_prefill_and_one_pass_over_what_was_not_compressed(
    correction: str, policy: str | Policy, model: Any, several: Haystack
):
    check_measured(correction, policy, model, several)


def test_measurement_rewinds_sliding_windows(several: Haystack, tokenizer: Any):
    check_measured("summaries-heads", "balanced", build(FAMILIES["gemma3"](vocab_size=len(tokenizer))), several)


def check_measured(correction: str, policy: str | Policy, model: Any, several: Haystack) -> None:
    setting = Setting(policy, 60, *CHOICES[correction])
    cells = [("unseen", setting), ("seen", setting)]
    context = len(several.context)
    found = {}
    for cell, which, result, nbytes in measure_haystack(model, several, cells):
        question = several.questions[which]
        expected = []
        for answer in question.answers:
            ids = torch.tensor([[*several.context, *question.tokens, *answer.tokens]])
            read = context
            if cell is None:
                cache = DynamicCache(config=model.config)
            else:
                cache = empty_cache(model, setting)
                if cell[0] == "seen":
                    read += len(question.tokens) - 1
            with torch.no_grad():
                model(ids[:, :read], past_key_values=cache)
                if cell is not None:
                    assert nbytes == cache.nbytes
                logits = model(ids[:, read:-1], past_key_values=cache).logits[0, -len(answer.tokens) :]
            expected.append(recall(logits, answer))
        best = max(expected, key=lambda x: (x.values, -x.nll))
        assert result.nll == pytest.approx(best.nll, rel=1e-3)
        assert (result.values, result.tokens) == (best.values, best.tokens)
        found[cell and cell[0], which] = result.nll
    assert len({round(x, 4) for x in found.values()}) == 6  # full, unseen and seen differ, and so do questions


def test_needles_are_asked_of_what_was_read_in_segments(model: Any, several: Haystack, tokenizer: Any):
    setting = Setting("twice", 60, 1, "summaries", "heads")
    found = {}
    for segment in (None, 1000, 250):
        asked = measure_haystack(
            model, several, [("unseen", setting), ("seen", setting)], tokenizer=tokenizer, segment=segment
        )
        found[segment] = [x.recall.nll for x in asked]
    # One segment is all of it, to rounding.
    assert found[1000] == pytest.approx(found[None], rel=1e-3)
    full, unseen, seen = (slice(start, start + 2) for start in (0, 2, 4))
    assert found[250][full] == found[None][full]
    for when in (unseen, seen):
        assert found[250][when] != pytest.approx(found[None][when], rel=1e-3)
    ids = torch.tensor([[*several.context, *several.questions[0].tokens[:-1]]])
    cache = read(model, ids, empty_cache(model, setting), tokenizer=tokenizer, segment=250)
    answers = []
    for answer in several.questions[0].answers:
        rest = torch.tensor([[several.questions[0].tokens[-1], *answer.tokens[:-1]]])
        with torch.no_grad():
            logits = model(rest, past_key_values=copy.deepcopy(cache)).logits[0]
        answers.append(recall(logits, answer))
    best = max(answers, key=lambda x: (x.values, -x.nll))
    assert found[250][4] == pytest.approx(best.nll, rel=1e-3)


def test_needles_are_asked_of_what_a_trial_chose(model: Any, several: Haystack, tokenizer: Any):
    setting = Setting("twice", 60, 1, "summaries", "heads", bits="auto", trial=64)
    full, *asked = measure_haystack(model, several, [("unseen", setting)], tokenizer=tokenizer)
    assert full.cell is None
    ids = torch.tensor([several.context])
    cache = read(model, ids, empty_cache(model, setting), tokenizer=tokenizer, trial=64)
    assert cache.tried
    assert {x.nbytes for x in asked if x.cell is not None} == {cache.nbytes}


def test_generation_is_scored_against_the_values(model: Any, haystack: Haystack, tokenizer: Any):
    """A model that is asked for what it would say anyway is right."""
    (question,) = haystack.questions
    ids = torch.tensor([[*haystack.context, *question.tokens]])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    said = out[0, ids.shape[1] :].tolist()
    wrong = [*said[:-1], said[-1] % 50 + 1]
    for tokens, expected in ((said, 1.0), (wrong, 0.0)):
        answer = Answer(tokens, [1] * 5, "")
        asked = haystack._replace(questions=(question._replace(answers=(answer,), values=(tokenizer.decode(tokens),)),))
        cells = [(when, Setting("snapkv", 1000, None)) for when in ("unseen", "seen")]
        results = [x.recall for x in measure_haystack(model, asked, cells, tokenizer=tokenizer, generate=True)]
        assert [x.values for x in results] == [expected] * 3
        assert [x.generated for x in results] == [expected] * 3


def arguments(saved: str, path: Path, *more: str) -> list[str]:
    grid = ["--lengths", "400", "--depths", "0.2", "0.8", "--samples", "1", "--budgets", "80"]
    return ["evaluate", "needles", "--model", saved, *grid, "--output", str(path), *more]


def test_command_writes_rows_and_goes_on_from_them(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "needles.json"
    few = ["--policies", "snapkv", "--corrections", "none"]
    assert main(arguments(saved, path, *few)) == 0
    first = read_json(path)["rows"]
    assert [(row["haystack"], row["question"], row["policy"]) for row in first] == [
        (f"0 at {depth}", question, policy)
        for depth in (0.2, 0.8)
        for question, policy in (("", "full cache"), ("unseen", "snapkv"), ("seen", "snapkv"))
    ]
    assert {row["bytes_as_tokens"] for row in first} == {None, 80}
    assert {row["method"] for row in first} == {"full cache", "snapkv/none"}
    assert read_json(path)["protocol"]["bytes"] == 16
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
        ("unseen", "summaries", 60),
        ("seen", "summaries", 60),
    ] * 2
    assert main(arguments(saved, path, *few, "--fresh")) == 0
    assert read_json(path)["rows"] == first


def test_another_task_of_the_same_haystacks_is_asked_as_well(saved: str, tmp_path: Path):
    """Tasks of several keys share their haystacks, and none takes over what another was answered."""
    path = tmp_path / "needles.json"
    few = ["--policies", "snapkv", "--corrections", "none", "--keys", "2", "--question", "unseen"]
    asked = []
    for tasks in (["multi-key"], ["multi-query"], ["multi-key", "multi-query"]):
        assert main(arguments(saved, path, *few, "--tasks", *tasks)) == 0
        rows = read_json(path)["rows"]
        asked.append([(row["task"], row["index"], row["policy"]) for row in rows])
    policies, indices = ("full cache", "snapkv"), (0, 1)
    assert asked[0] == [("multi-key", index, policy) for policy in policies for index in indices]
    assert asked[1] == asked[0] + [("multi-query", index, policy) for policy in policies for index in indices]
    assert asked[2] == asked[1]  # together they are numbered as alone
    assert len({row["nll"] for row in rows}) == 8


def test_results_in_another_text_of_that_name_are_not_gone_on_with(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Topics of the language reference differ between versions of Python, and files change."""
    path, text = tmp_path / "needles.json", tmp_path / "own.txt"
    own = ["--haystack", str(text), "--policies", "snapkv", "--corrections", "none", "--depths", "0.5"]
    for words, code in (("A tree grows. ", 0), ("A tree fell. ", 1)):
        text.write_text(words * 50)
        assert main(arguments(saved, path, *own)) == code
    assert "holds results of another protocol (text_sha256 is other)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--corrections", "none", "magic"], "corrections has 'magic'; use some of none, "),
        (["--depths", "1.5"], "depths has 1.5; use shares of the context from 0 to 1"),
        (["--keys", "0"], "keys is 0; use 1 to "),
        (["--methods", "snapkv"], "methods has 'snapkv'; use default, twice, "),
        (["--methods", "default", "balanced/summaries-heads"], "which are the same; name it once"),
        (["--methods", "magic/none"], "methods has 'magic/none'; use default, twice, "),
        (["--samples", "0"], "samples is 0; use at least 1"),
        (["--seed", "-1"], "seed is -1; use 0 or"),
        (["--lengths", "20"], "length is 20, but the needle and the chat template take"),
        (["--budgets", "20"], "budget is 20, whose bytes hold 20 tokens beside the statistics, at least 34"),
        (["--haystack", "no such text"], "text is 'no such text'"),
        (["--seed", "1"], "holds results of another protocol (seed is 0 there, 1 now); name"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], message: str, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "needles.json"
    if more[0] == "--seed":
        path.write_text(json.dumps({"protocol": {"seed": 0}, "rows": []}))
    assert main(arguments(saved, path, *more)) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_keys_are_distinct_and_enough():
    assert len(set(KEYS)) == len(KEYS) >= 32
    assert build_parser().parse_args(["evaluate", "needles"]).corrections == ["none", "summaries"]


def made_rows(full: bool) -> list[dict[str, Any]]:
    """Four haystacks, two questions, two budgets; three of four found."""
    names = ("question", "policy", "correction", "budget", "bytes_as_tokens")
    asked = [(question, "snapkv", "none", size, size) for question in ("seen", "unseen") for size in (64, 128)]
    common = {
        "layout": "1 keys, 1 values",
        "task": "single",
        "value": "number",
        "index": 0,
        "length": 100,
        "depth": 0.5,
    }
    common |= {"nbytes": 1, "generated": None, "nll": 0.5, "tokens": 0.75}
    return [
        common
        | {"haystack": str(sample), "values": float(sample < 3 if which[0] else full)}
        | dict(zip(names, which, strict=True))
        for sample in range(4)
        for which in [("", "full cache", "", None, None), *asked]
    ]


def line_of(rows: list[dict[str, Any]], question: str = "seen", size: int = 64) -> dict[str, Any]:
    lines = needle_lines(needles_of(rows))
    (line,) = lines[(lines["question"] == question) & (lines["bytes"] == size)].to_dict("records")
    return line


def test_table_gives_shares_and_says_where_there_is_no_signal(tmp_path: Path):
    x = line_of(made_rows(True))
    assert (x["share"], x["n"], x["haystacks"], x["signal"]) == (0.75, 4, 4, True)
    assert (x["low"], x["high"]) == bootstrap([1, 1, 1, 0])
    for full, expected in ((True, ["100%", *["75%"] * 4]), (False, ["no signal"] * 5)):
        lines = needle_lines(needles_of(made_rows(full)))
        table = needles_table(lines, title="title", bits=32)
        cells = {str(column.header): list(column.cells) for column in table.columns}
        assert cells["found"] == expected
        assert cells["question"] == ["single, 100:", "unseen", "", "seen", ""]
        assert cells["bytes"] == ["", "64", "128", "64", "128"]
        assert cells["method"] == ["full cache", *["snapkv/none"] * 4]
        assert "bytes: of so many 32-bit tokens per KV head" in str(table.caption)
        figure = plot_found(lines, bits=32, title="title")
        assert ("no signal" in figure.axes[0].get_title()) != full
        assert is_image(save_figure(figure, tmp_path / "new" / f"{full}.png"))


def test_intervals_are_over_haystacks():
    rows = made_rows(True)
    full = line_of(rows, "", 0)
    assert (full["low"], full["high"]) == wilson(4, 4)  # all found: a bootstrap would have no width
    # Ten questions about each haystack with the same result say no more than one.
    many = [row | {"index": index} for row in rows for index in range(10)]
    assert line_of(many)["n"] == 40
    for question, size in (("seen", 64), ("", 0)):
        one, ten = line_of(rows, question, size), line_of(many, question, size)
        assert (one["low"], one["high"]) == (ten["low"], ten["high"])


def test_bootstrap_is_the_distribution_of_the_mean():
    low, high = bootstrap(list(np.linspace(0, 1, 101)))
    error = np.linspace(0, 1, 101).std() / 101**0.5
    assert low == pytest.approx(0.5 - 1.96 * error, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * error, abs=0.01)
    assert bootstrap([3], [4]) == (0.75, 0.75)  # of one group there is no interval


def test_wilson_is_the_interval_of_the_score_test():
    for found, of in ((0, 10), (3, 10), (10, 10)):
        for bound in wilson(found, of):
            if 0 < bound < 1:  # where |share - bound| is so many of its standard errors
                assert abs(found / of - bound) == pytest.approx(1.959964 * (bound * (1 - bound) / of) ** 0.5)


def test_intervals_are_those_that_were_published():
    """What momentkv computed itself before SciPy did: the draws of the bootstrap are the same, to rounding.

    Wilson's interval took 1.96 for the quantile of the normal distribution, which moves its fifth digit.
    """
    published = (0.35, 0.65), (0.47960714285714284, 0.92), (0.2, 0.8), (-0.5, 2.0)
    groups = ([1, 0] * 20, None), ([4, 1, 3, 2, 4, 4], [4, 4, 4, 5, 4, 5]), ([0.2, 0.8], None), ([1, 2, -1], [1, 1, 2])
    for (sums, counts), ends in zip(groups, published, strict=True):
        assert bootstrap(sums, counts) == pytest.approx(ends, rel=1e-12)
    for (found, of), ends in (((10, 10), (0.72246, 1)), ((0, 8), (0, 0.32442)), ((3, 40), (0.02584, 0.19865))):
        assert wilson(found, of) == pytest.approx(ends, abs=3e-5)

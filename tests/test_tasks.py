"""Tasks of lm_eval asked of many caches: each context read once, the answers those of a cache of one's own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from models import save_with_bytes
from test_lm_eval import evaluate, offline
from test_tables import WIDTHS, assert_whole

from momentkv.cli import main
from momentkv.evaluation.haystack import prose
from momentkv.evaluation.lm_eval import tasks
from momentkv.evaluation.lm_eval.model import MomentLM
from momentkv.evaluation.lm_eval.shared import SharedLM
from momentkv.evaluation.retrieval import Reader
from momentkv.evaluation.settings import setting_of
from momentkv.evaluation.sources import load_model
from momentkv.evaluation.task_lines import AVERAGE, task_lines
from momentkv.evaluation.terminal import tasks_table

assert offline  # a fixture of every test here, too
pytestmark = pytest.mark.filterwarnings("ignore:::datasets", "ignore:::multiprocess", "ignore:::dill")

PACKED = Path(__file__).parent.parent / "examples" / "question_answering"
DOCUMENTS = 4
ASKED = ["--tasks", "own_rooms", "--context-field", "story", "--budgets", "80", "--methods", "snapkv/none", "default@4"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a tiny model whose tokens are bytes."""
    return save_with_bytes(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A task of four documents, of which two share a context, and one that is answered by likelihood."""
    folder = tmp_path_factory.mktemp("tasks")
    stories = []
    for index in (0, 1, 2):
        source = prose(np.random.default_rng(index))
        stories.append(" ".join(next(source) for _ in range(4)))
    documents = [
        {"story": story, "room": f"room {index}", "number": str(index), "choices": ["1", "2"]}
        for index, story in enumerate([stories[0], stories[1], stories[0], stories[2]])
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    whole = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{story}}\nQuestion: {{room}}?\nAnswer:",
        "doc_to_target": " {{number}}",
        "metric_list": [{"metric": "exact_match"}],
    }
    written = {
        "own_rooms": {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 6, "until": ["\n\n"]}},
        "own_likely": {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}"},
        "own_bleu": {"output_type": "generate_until", "metric_list": [{"metric": "bleu"}]},
        "own_shots": {
            "output_type": "generate_until",
            "generation_kwargs": {"max_gen_toks": 6, "until": ["\n\n"]},
            "num_fewshot": 1,
            "fewshot_split": "test",
        },
    }
    for name, config in written.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **whole, **config}))
    return str(folder)


def measured(saved: str, folder: str, output: Path, *more: str) -> list[dict[str, Any]]:
    """Rows of the command."""
    assert main(
        ["evaluate", "tasks", "--model", saved, "--include-path", folder, *ASKED, "--output", str(output), *more]
    ) in (0, None)
    content = json.loads(output.read_text())
    assert content["complete"]
    return content["rows"]


def answers(rows: list[dict[str, Any]], method: str) -> list[str]:
    return [row["answer"] for row in sorted(rows, key=lambda row: row["document"]) if row["method"] == method]


@pytest.mark.parametrize("seen", [False, True])
def test_answers_are_those_of_a_cache_that_reads_alone(seen: bool, saved: str, folder: str, tmp_path: Path):
    more = ["--question-marker", "Question:"]
    arguments = [x for x in ASKED if x not in ("--context-field", "story")]
    output = tmp_path / "tasks.json"
    command = ["evaluate", "tasks", "--model", saved, "--include-path", folder, *arguments, "--output", str(output)]
    assert main([*command, *([] if seen else more)]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert len(rows) == 3 * DOCUMENTS
    # The full cache is lm_eval's own model.
    found = evaluate("hf", folder, ["own_rooms"], pretrained=saved)["samples"]["own_rooms"]
    assert answers(rows, "full cache") == [sample["resps"][0][0] for sample in found]
    if seen:  # there the first token comes of what was read last, before it is compressed
        return
    # Others are caches that read the same contexts one by one.
    for method, settings in {
        "snapkv/none": {"policy": "snapkv", "correction": "none", "sharing": "uniform"},
        "default@4": {"bits": 4},
    }.items():
        (budget,) = {row["budget"] for row in rows if row["method"] == method}
        lm = MomentLM(saved, budget, query_aware=False, question_marker="Question:", device="cpu", **settings)
        alone = evaluate(lm, folder, ["own_rooms"])["samples"]["own_rooms"]
        assert answers(rows, method) == [sample["resps"][0][0] for sample in alone]
        assert answers(rows, method) != answers(rows, "full cache")


def test_examples_before_a_question_are_those_of_lm_evals_own_command(saved: str, folder: str, tmp_path: Path):
    output = tmp_path / "tasks.json"
    command = ["evaluate", "tasks", "--model", saved, "--include-path", folder, "--tasks", "own_shots"]
    assert main([*command, "--methods", "snapkv/none", "--budgets", "80", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    found = evaluate("hf", folder, ["own_shots"], pretrained=saved)["samples"]["own_shots"]
    prompts = [hashlib.sha256(sample["arguments"][0][0].encode()).hexdigest()[:16] for sample in found]
    assert [row["prompt"] for row in rows if row["method"] == "full cache"] == prompts
    assert answers(rows, "full cache") == [sample["resps"][0][0] for sample in found]


def test_a_question_that_is_seen_is_compressed_but_for_its_last_token(
    saved: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read = []
    before = Reader.__init__

    def kept(self: Reader, model: Any, haystack: Any, keep: int | None) -> None:
        read.append(len(haystack.context))
        before(self, model, haystack, keep)

    monkeypatch.setattr(Reader, "__init__", kept)
    command = ["evaluate", "tasks", "--model", saved, "--include-path", folder, "--tasks", "own_rooms", "--limit", "2"]
    output = tmp_path / "tasks.json"
    assert main([*command, "--methods", "snapkv/none", "--budgets", "80", "--output", str(output)]) == 0
    documents = [json.loads(line) for line in (Path(folder) / "documents.jsonl").read_text().splitlines()[:2]]
    # A token of this model is a byte.
    prompts = [f"{document['story']}\nQuestion: {document['room']}?\nAnswer:" for document in documents]
    assert read == [len(prompt) - 1 for prompt in prompts]


def test_a_context_is_read_once_for_all_caches_and_questions(
    saved: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    read = []
    before = Reader.__init__

    def counted(self: Reader, model: Any, haystack: Any, keep: int | None) -> None:
        read.append(tuple(haystack.context))
        before(self, model, haystack, keep)

    monkeypatch.setattr(Reader, "__init__", counted)
    measured(saved, folder, tmp_path / "tasks.json")
    assert len(read) == len(set(read)) == 3


def test_an_interrupted_run_goes_on_where_it_was(
    saved: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    whole = measured(saved, folder, tmp_path / "whole.json")
    asked, answer = [], SharedLM.answer

    def interrupted(self: SharedLM, request: Any, setting: Any) -> str:
        if len(asked) == 7:
            raise KeyboardInterrupt
        asked.append((request.doc_id, setting))
        return answer(self, request, setting)

    monkeypatch.setattr(SharedLM, "answer", interrupted)
    output = tmp_path / "tasks.json"
    assert (
        main(["evaluate", "tasks", "--model", saved, "--include-path", folder, *ASKED, "--output", str(output)]) == 130
    )
    kept = json.loads(output.read_text())
    assert not kept["complete"]
    # The two documents of the first context, three caches each, and the first cache of the next.
    assert len(kept["rows"]) == 7
    assert all("metrics" in row for row in kept["rows"])
    monkeypatch.setattr(SharedLM, "answer", answer)
    assert measured(saved, folder, output) == whole
    monkeypatch.setattr(SharedLM, "answer", interrupted)  # which would raise
    asked[:] = range(7)
    assert measured(saved, folder, output) == whole


def test_answers_to_other_documents_are_not_gone_on_with(
    saved: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Data of a task that changed, or that it draws, would be scored with answers to what was asked before."""
    output = tmp_path / "tasks.json"
    measured(saved, folder, output, "--limit", "2")
    kept = json.loads(output.read_text())
    kept["rows"][0]["prompt"] = "of another document"
    output.write_text(json.dumps(kept))
    command = ["evaluate", "tasks", "--model", saved, "--include-path", folder, *ASKED, "--output", str(output)]
    assert main([*command, "--limit", "2"]) == 1
    assert "whose answers are to other documents of task 'own_rooms'" in capsys.readouterr().err.replace("\n", " ")
    assert json.loads(output.read_text()) == kept


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--tasks", "own_likely"],
            "tasks has 'own_likely', which is answered by multiple_choice; use momentkv",
        ),
        (["--tasks", "own_bleu"], "tasks has 'own_bleu', none of whose metrics is a number for each document"),
        (["--tasks", "own_romms"], "tasks has 'own_romms', which lm_eval does not know"),
        (["--limit", "0"], "limit is 0; use at least one document"),
        (["--question-marker", "Q"], "question_marker is 'Q' and context_field is 'story'; use one of them"),
        (["--include-path", "nowhere"], "include_path is 'nowhere', which is no folder"),
        (["--metadata", "{file"], "metadata is '{file', which is not JSON"),
        (["--metadata", "[1]"], "metadata is [1]; write a JSON object"),
        (["--context-field", "tale"], "context_field is 'tale', but documents of task 'own_rooms' have no such text"),
        (["--max-length", "40"], "max_length is 40, which leaves 34 tokens for prompts, but one of task 'own_rooms'"),
        (["--methods", "lru/none"], "methods has 'lru/none'"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_read(
    arguments: list[str], message: str, saved: str, folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    monkeypatch.setattr(Reader, "__init__", lambda *_: pytest.fail("a context was read"))
    output = tmp_path / "tasks.json"
    given = ["--model", saved, "--include-path", folder, *ASKED, "--output", str(output), *arguments]
    assert main(["evaluate", "tasks", *given]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not output.exists()


@pytest.mark.parametrize(
    ("names", "own", "looked_through"),
    [
        (["own_rooms"], "folder", [False]),
        (["own_rooms", "gsm8k"], "folder", [False, True]),
        (["own_group"], "folder", [False, True]),  # its tasks may be elsewhere
        (["gsm8k"], None, [True]),
    ],
)
def test_lm_evals_own_tasks_are_read_where_a_name_is_not_of_the_folder(
    names: list[str], own: str | None, looked_through: list[bool], monkeypatch: pytest.MonkeyPatch
):
    made = []

    class Manager:
        all_subtasks = ("own_rooms",)

        def __init__(self, include_path: str | None, metadata: dict[str, Any], include_defaults: bool = True) -> None:
            assert (include_path, metadata) == (own, {"tokenizer": "x"})
            made.append((self, include_defaults))

    monkeypatch.setattr(tasks, "TaskManager", Manager)
    found = tasks.manager_of(names, own, {"tokenizer": "x"})
    assert [defaults for _, defaults in made] == looked_through
    assert found is made[-1][0]


def rows_of(**scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Rows of methods: their scores of the documents of each task; "full" is the full cache."""
    return [
        {"task": task, "document": index, "metrics": {"f1,none": value, "other,none": 9.0}}
        | {"method": "full cache" if method == "full" else method, "bytes_as_tokens": None if method == "full" else 64}
        for method, tasks in scores.items()
        for task, values in tasks.items()
        for index, value in enumerate(values)
    ]


ROWS = rows_of(
    full={"strong_task": [1.0, 1.0], "weak_one": [0.5, 0.0, 0.0], "long_one": [0.6] * 6},
    snapkv={"strong_task": [1.0, 0.0], "weak_one": [1.0, 1.0, 1.0], "long_one": [0.25] * 6},
)


def test_an_average_counts_tasks_with_signal_and_each_of_them_the_same():
    lines = task_lines(ROWS).set_index(["method", "task"])
    assert lines.loc[("snapkv", "strong_task"), "value"] == 0.5
    assert not lines.loc[("snapkv", "weak_one"), "signal"]
    assert lines.loc[("snapkv", AVERAGE), "value"] == pytest.approx((0.5 + 0.25) / 2)
    assert lines.loc[("full cache", AVERAGE), "value"] == pytest.approx(0.8)
    assert lines.loc[("snapkv", AVERAGE), "n"] == 8
    low, high = lines.loc[("snapkv", AVERAGE), ["low", "high"]]
    assert low < 0.375 < high


def test_tasks_are_compared_on_the_documents_that_all_methods_of_a_budget_answered():
    """A run that was interrupted had a mean of the first, easier documents beside one of all."""
    rows = rows_of(full={"one": [1.0] * 4}, snapkv={"one": [1.0, 1.0, 0.0, 0.0]}, h2o={"one": [1.0, 0.5]})
    lines = task_lines(rows).set_index(["method", "task"])
    assert dict(lines["value"][:, "one"]) == {"full cache": 1.0, "snapkv": 1.0, "h2o": 0.75}
    assert dict(lines["n"][:, "one"]) == {"full cache": 4, "snapkv": 2, "h2o": 2}
    caption = str(tasks_table(task_lines(rows), title="a model: tasks", bits=16).caption)
    assert "n: one 2 to 4, average 2 to 4;" in caption
    apart = [x for x in rows if (x["method"], x["document"]) not in (("snapkv", 0), ("snapkv", 1))]
    lines = task_lines(apart).set_index(["method", "task"])
    assert dict(lines["n"][:, "one"]) == {"full cache": 4, "snapkv": 2, "h2o": 2}  # nothing in common


def test_an_interval_has_a_width_where_all_documents_agree():
    lines = task_lines(rows_of(full={"one": [1.0] * 6}, snapkv={"one": [0.0] * 6})).set_index(["method", "task"])
    for task in ("one", AVERAGE):
        low, high = lines.loc[("full cache", task), ["low", "high"]]
        assert 0.5 < low < 0.7
        assert high == 1
        low, high = lines.loc[("snapkv", task), ["low", "high"]]
        assert low == 0
        assert 0.3 < high < 0.5


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_of_tasks_cut_nothing(width: int):
    table = tasks_table(task_lines(ROWS), title="a model: tasks", bits=16)
    assert_whole(table, width)


def test_paragraphs_are_packed_and_scored_as_squad_does(saved: str, tmp_path: Path):
    task = runpy.run_path(str(PACKED / "packed.py"))
    paragraphs = [
        {"context": f"Text {i}. " * 6, "qas": [{"question": f"q{i}{j}", "answers": [{"text": f"a{i}"}]} for j in "ab"]}
        for i in range(5)
    ]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    made = task["dataset"](file=str(tmp_path / "squad.json"), tokenizer=saved, tokens=120, questions=3)["test"]
    # Two paragraphs of 56 bytes fill a context; the fifth does not, and is left out.
    assert [row["question"] for row in made] == ["q0a", "q0b", "q1a", "q2a", "q2b", "q3a"]
    assert made[0]["context"] == made[2]["context"] != made[3]["context"]
    assert max(len(row["context"]) for row in made) <= 120
    document = {"answers": ["the Blue sky", "azure"]}
    assert task["scores"](document, [" A blue sky!"]) == {"f1": 1.0, "exact_match": 1.0}
    assert task["scores"](document, ["blue"]) == {"f1": pytest.approx(2 / 3), "exact_match": 0.0}
    assert task["scores"](document, [""]) == {"f1": 0.0, "exact_match": 0.0}
    # As SQuAD 1.1's own script, which gives no F1 without a common word.
    assert task["scores"]({"answers": ["The"]}, ["a"]) == {"f1": 0.0, "exact_match": 1.0}


def test_tasks_are_asked_of_what_a_trial_chose(saved: str):
    model, tokenizer = load_model(saved)
    tried = dataclasses.replace(setting_of("default@tried"), budget=40, trial=32)
    settings = [tried, dataclasses.replace(tried, trial=0)]
    lm = SharedLM(model, tokenizer, settings, question_marker=None, context_field="story", max_length=None)
    context = tokenizer("A room is behind a room, and another one behind that. " * 5).input_ids
    found = []
    for setting in settings:
        lm.setting = setting
        found.append(lm._cache_after(context))
    assert len(found[0].tried) >= 2
    assert found[1].tried == []
    assert found[0].get_seq_length() == found[1].get_seq_length() == len(context)

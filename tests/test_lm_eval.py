"""Tasks of lm_eval through our cache: what its own model finds when nothing is evicted, and a budget that is kept."""

from __future__ import annotations

import inspect
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from heads import heads_of
from models import save_with_bytes

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of lm_eval's dependencies, as they are imported
    import lm_eval
    from lm_eval.api.registry import get_model
    from lm_eval.tasks import TaskManager

import momentkv.evaluation.lm_eval
from momentkv.cli import main
from momentkv.evaluation.haystack import prose
from momentkv.evaluation.lm_eval.model import MomentLM, check_batch
from momentkv.evaluation.lm_eval.questions import question_start, tokens_from
from momentkv.hf import MomentCache

pytestmark = pytest.mark.filterwarnings("ignore:::datasets", "ignore:::multiprocess", "ignore:::dill")

ROOM = 4096
ALONE: dict[str, Any] = {"sharing": "uniform"}
TASKS = ["own_needles", "own_choices"]
COLORS = ["red", "green", "violet", "grey"]
GENERATED = {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 8, "until": ["\n\n"]}}
YAMLS: dict[str, dict[str, Any]] = {
    "own_needles": {
        **GENERATED,
        "doc_to_text": "Read this.\n{{story}}\nQuestion: what is the number of the {{key}}?\nAnswer:",
        "doc_to_target": " {{number}}",
        "metric_list": [{"metric": "exact_match"}],
    },
    "own_choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{story}}\nQuestion: which color has the {{key}}?\nAnswer:",
        "doc_to_choice": "{{colors}}",
        "doc_to_target": "{{color}}",
        "metric_list": [{"metric": "acc"}],
    },
    "own_texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{story}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "own_endings": {  # no context at all
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{colors}}",
        "doc_to_target": "{{color}}",
        "metric_list": [{"metric": "acc"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of tasks with five documents of different lengths."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = []
    for index, sentences in enumerate([4, 7, 5, 9, 6]):
        rng = np.random.default_rng(index)
        source = prose(rng)
        story = [next(source) for _ in range(sentences)]
        key, number, color = f"house{index}", str(rng.integers(100, 1000)), int(rng.integers(len(COLORS)))
        story.insert(sentences // 2, f"The {COLORS[color]} {key} has the number {number}.")
        # Choices of different lengths, and one more of them in every other document.
        colors = COLORS if index % 2 else COLORS[:3]
        docs.append({"story": " ".join(story), "key": key, "number": number, "colors": colors, "color": min(color, 2)})
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, config in YAMLS.items():
        whole = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            **config,
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
    return str(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a tiny model whose tokens are bytes."""
    return save_with_bytes(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache of data sets in the home of whoever runs the tests, and no list of what is installed each time."""
    import datasets

    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def evaluate(model: Any, tasks: str, names: list[str] = TASKS, **arguments: Any) -> dict[str, Any]:
    """What lm_eval finds, with every response."""
    batch_size = arguments.pop("batch_size", 1)
    return lm_eval.simple_evaluate(
        model,
        arguments or None,
        tasks=names,
        batch_size=batch_size,
        device="cpu" if arguments else None,
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        bootstrap_iters=0,
        verbosity="ERROR",
    )


def answers(found: dict[str, Any]) -> dict[tuple[str, int], Any]:
    """Responses by task and document: a string, or a list with a pair for each continuation."""
    return {
        (name, sample["doc_id"]): [tuple(one) if isinstance(one, list) else one for one in flat(sample["resps"])]
        for name, samples in found["samples"].items()
        for sample in samples
    }


def flat(responses: Any) -> list[Any]:
    """Responses of all requests of a document, one repetition each."""
    return [response for one in responses for response in one]


def assert_same(found: dict[str, Any], expected: dict[str, Any], *, rounding: float = 1e-4) -> None:
    """Metrics and texts are equal, logarithms within rounding."""
    assert found["results"].keys() == expected["results"].keys()
    got, wanted = answers(found), answers(expected)
    assert got.keys() == wanted.keys()
    for place, responses in wanted.items():
        assert len(got[place]) == len(responses)
        for one, other in zip(got[place], responses, strict=True):
            if isinstance(other, str):
                assert one == other, place
            elif isinstance(other, tuple):
                assert one[0] == pytest.approx(other[0], abs=rounding), place
                assert one[1] == other[1]
            else:
                assert one == pytest.approx(other, abs=rounding), place
    for name in expected["results"]:
        for metric in ("exact_match,none", "acc,none"):
            assert found["results"][name].get(metric) == expected["results"][name].get(metric)


@pytest.fixture(scope="module")
def reference(saved: str, tasks: str) -> dict[str, Any]:
    """What lm_eval's own model finds."""
    return evaluate("hf", tasks, pretrained=saved)


class Watched(MomentLM):
    """Keeps the caches that it makes."""

    caches: list[MomentCache]

    def new_cache(self) -> MomentCache:
        cache = super().new_cache()
        if not hasattr(self, "caches"):
            self.caches = []
        self.caches.append(cache)
        return cache


def watched(saved: str, **arguments: Any) -> Watched:
    return Watched(saved, device="cpu", dtype="float32", **arguments)


@pytest.mark.parametrize(
    ("batch_size", "arguments"),
    [
        (1, {}),
        (3, ALONE),
        (1, {"prefill_chunk": 100, "policy": "snapkv", "correction": "order-1"}),
        (1, {"query_aware": False, "question_marker": "Question:"}),
        (3, {"query_aware": False, "context_field": "story", **ALONE}),
        (1, {"query_aware": False, "context_field": "story", "prefill_chunk": 64, "correction": None}),
    ],
    ids=["", "batch", "chunks", "unseen", "unseen batch", "unseen chunks"],
)
def test_with_room_for_everything_results_are_those_of_hf(
    batch_size: int, arguments: dict[str, Any], saved: str, tasks: str, reference: dict[str, Any]
):
    found = evaluate("momentkv", tasks, pretrained=saved, budget=ROOM, batch_size=batch_size, **arguments)
    assert_same(found, reference)


def test_the_full_cache_is_lm_evals_own(saved: str, tasks: str, reference: dict[str, Any]):
    full = evaluate("momentkv", tasks, pretrained=saved, budget="full", query_aware=False, question_marker="Question:")
    assert_same(full, reference, rounding=1e-5)


@pytest.mark.parametrize("query_aware", [True, False])
def test_the_budget_is_kept_and_changes_what_is_found(
    query_aware: bool, saved: str, tasks: str, reference: dict[str, Any]
):
    split = {} if query_aware else {"context_field": "story"}
    lm = watched(saved, budget=60, block=8, query_aware=query_aware, **split)
    found = evaluate(lm, tasks)
    read = [cache for cache in lm.caches if cache.get_seq_length()]
    assert len(read) == 5 + 5  # one a prompt, and one for all continuations of a context
    for cache in read:
        parts = [part for core in cache.moment_layers.values() for part in heads_of(core)]
        assert min(part.seen for part in parts) > 2 * 60
        # Heads share: budgets are 60 on average, and each head keeps to its own.
        assert sum(part.budget for part in parts) <= 60 * len(parts)
        assert all(bool((part.moments.count > 0).all()) for part in parts)
    got, wanted = answers(found), answers(reference)
    assert all(got[place] != wanted[place] for place in wanted)


def by_hand(lm: MomentLM, prompt: str, start: int | None, after: list[int] | None, new: int = 0) -> Any:
    """Logits of tokens after a prompt, or greedy tokens: a cache read by hand, the tokens after it one by one."""
    ids = torch.tensor([lm.tok_encode(prompt)])
    cache = lm.new_cache()
    read = ids.shape[1] if start is None else len(prompt[:start].encode())  # tokens are bytes
    with torch.no_grad():
        logits = lm.model(ids[:, :read], past_key_values=cache).logits[:, -1:]
        if read < ids.shape[1]:
            logits = lm.model(ids[:, read:], past_key_values=cache).logits
        if after is None:
            tokens = [int(logits[0, -1].argmax())]
            while len(tokens) < new:
                out = lm.model(torch.tensor([tokens[-1:]]), past_key_values=cache).logits
                tokens.append(int(out[0, -1].argmax()))
            return tokens
        rows = [logits[0, -1]]
        for token in after[:-1]:
            rows.append(lm.model(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    return torch.stack(rows)


@pytest.mark.parametrize("query_aware", [True, False])
def test_generation_is_what_a_cache_read_by_hand_gives(query_aware: bool, saved: str, tasks: str):
    split = {} if query_aware else {"question_marker": "Question:"}
    lm = watched(saved, budget=60, query_aware=query_aware, **split)
    for sample in evaluate(lm, tasks, ["own_needles"])["samples"]["own_needles"]:
        prompt = sample["arguments"][0][0]
        start = None if query_aware else prompt.rindex("Question:")
        tokens = by_hand(lm, prompt, start, None, new=8)
        text = lm.tok_decode(tokens).split("\n\n")[0]
        assert sample["resps"] == [[text]]


@pytest.mark.parametrize("query_aware", [True, False])
def test_continuations_are_scored_with_the_compressed_context(query_aware: bool, saved: str, tasks: str):
    split = {} if query_aware else {"question_marker": "Question:"}
    lm = watched(saved, budget=60, block=64, query_aware=query_aware, **split)
    for sample in evaluate(lm, tasks, ["own_choices"])["samples"]["own_choices"]:
        for index, ((found, _),) in enumerate(sample["resps"]):
            prompt, continuation = sample["arguments"][index]
            after = lm.tok_encode(continuation)
            start = len(prompt) - 1 if query_aware else prompt.rindex("Question:")
            logits = by_hand(lm, prompt, start, after)
            expected = torch.log_softmax(logits, -1).gather(-1, torch.tensor(after)[:, None]).sum()
            assert found == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("correction", ["order-1", "summaries"])
def test_rows_of_a_batch_are_what_they_are_alone(correction: str, saved: str, tasks: str):
    settings: dict[str, Any] = {"pretrained": saved, "budget": 60, "policy": "h2o", "correction": correction, **ALONE}
    one = evaluate("momentkv", tasks, **settings)
    assert_same(evaluate("momentkv", tasks, batch_size=3, **settings), one)
    split = {"query_aware": False, "question_marker": "Question:"}
    one = evaluate("momentkv", tasks, **settings, **split)
    assert_same(evaluate("momentkv", tasks, batch_size=3, **settings, **split), one)


def test_whole_texts_are_scored_in_chunks(saved: str, tasks: str):
    names = ["own_texts"]
    expected = answers(evaluate("hf", tasks, names, pretrained=saved))
    found = answers(evaluate("momentkv", tasks, names, pretrained=saved, budget=ROOM, prefill_chunk=50))
    for place, (value,) in expected.items():
        assert found[place] == [pytest.approx(value, rel=1e-5)]
    lm = watched(saved, budget=60, prefill_chunk=50)
    compressed = evaluate(lm, tasks, names)
    for place, (value,) in expected.items():
        assert abs(answers(compressed)[place][0] - value) > 1e-4 * abs(value)
    # By hand: each chunk through the cache that those before it left.
    sample = compressed["samples"]["own_texts"][0]
    tokens = [lm.prefix_token_id, *lm.tok_encode(sample["doc"]["story"])]
    cache, total = lm.new_cache(), 0.0
    for at in range(0, len(tokens) - 1, 50):
        chunk, targets = tokens[at : at + 50][: len(tokens) - 1 - at], tokens[at + 1 : at + 51]
        with torch.no_grad():
            logits = lm.model(torch.tensor([chunk]), past_key_values=cache).logits[0]
        total += float(torch.log_softmax(logits, -1).gather(-1, torch.tensor(targets)[:, None]).sum())
    assert sample["resps"][0][0] == pytest.approx(total, rel=1e-5)


def test_whole_texts_without_chunks_are_refused(saved: str, tasks: str):
    with pytest.raises(ValueError, match=r"prefill_chunk is None, but task 'own_texts'"):
        evaluate("momentkv", tasks, ["own_texts"], pretrained=saved, budget=60)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_empty_context_is_scored_as_hf_does(batch_size: int, saved: str, tasks: str):
    expected = evaluate("hf", tasks, ["own_endings"], pretrained=saved)
    split = {"query_aware": False, "question_marker": "Question:"}
    for arguments in ({}, split):
        found = evaluate(
            "momentkv", tasks, ["own_endings"], pretrained=saved, budget=60, batch_size=batch_size, **ALONE, **arguments
        )
        assert_same(found, expected)


def test_contexts_that_are_too_long_lose_their_beginning_as_in_hf(saved: str, tasks: str):
    short = {"pretrained": saved, "max_length": 120}
    expected = evaluate("hf", tasks, **short)
    assert_same(evaluate("momentkv", tasks, budget=ROOM, **short), expected)
    split = {"query_aware": False, "question_marker": "Question:"}
    assert_same(evaluate("momentkv", tasks, budget=ROOM, **short, **split), expected)
    with pytest.raises(ValueError, match="max_length is 40: once prompts are cut"):
        evaluate("momentkv", tasks, ["own_needles"], pretrained=saved, max_length=40, budget=60, **split)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"correction": "mean"}, r"correction is 'mean'; use one of none, order-0, order-1, summaries"),
        ({"policy": "lru"}, "'lru'"),
        ({"sharing": "rows"}, "sharing is 'rows'"),
        ({"budget": "plenty"}, "'plenty'"),
        ({"budget": 8}, "budget is 8"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"prefill_chunk": "all"}, "prefill_chunk is 'all'"),
        ({"query_aware": "no"}, "query_aware is 'no'"),
        ({"query_aware": False}, "query_aware is False, question_marker is None"),
        ({"query_aware": False, "question_marker": "Q", "context_field": "story"}, "exactly one of them"),
        ({"question_marker": "Q"}, "question_marker is 'Q' and context_field is None, but with query_aware=True"),
        ({"attn_implementation": "sdpa"}, "attn_implementation is 'sdpa'"),
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"batch_size": 4}, "batch_size is 4, but sharing is 'heads'"),
        ({"batch_size": 4, "sharing": "uniform", "budget": 0.5}, "batch_size is 4, but budget is 0.5"),
        ({"batch_size": 4, "sharing": "uniform", "prefill_chunk": 64}, "batch_size is 4, but prefill_chunk is 64"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(arguments: dict[str, Any], message: str, saved: str):
    with pytest.raises(ValueError, match=message):
        MomentLM(saved, device="cpu", **arguments)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"question_marker": "Task:"}, "question_marker is 'Task:', which is not in a prompt of task 'own_needles'"),
        ({"question_marker": "Read|"}, "one of whose alternatives is empty"),
        ({"question_marker": "Read this."}, "nothing comes before it"),
        ({"context_field": "context"}, r"context_field is 'context', but documents of task 'own_needles' have no such"),
        ({"context_field": "colors"}, "have no such text"),
    ],
)
def test_a_question_that_is_not_found_names_the_task(split: dict[str, str], message: str, saved: str, tasks: str):
    lm = watched(saved, budget=60, query_aware=False, **split)
    with pytest.raises(ValueError, match=message):
        evaluate(lm, tasks, ["own_needles"])
    assert not any(cache.get_seq_length() for cache in lm.caches)


def test_tokens_that_straddle_the_question_are_read_with_it(saved: str):
    tokenizer = MomentLM(saved, device="cpu").tokenizer
    assert tokens_from(tokenizer, "aé?", 1) == 3  # é is two bytes
    assert tokens_from(tokenizer, "aé?", 2) == 1
    assert question_start("a é b é c", marker="é") == 6
    with pytest.raises(ValueError, match="needs a fast tokenizer"):
        tokens_from(object(), "a", 0)
    check_batch("1", 0.5, None, 7)


def test_the_model_is_registered_under_its_name():
    assert get_model("momentkv") is MomentLM


def results(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, int], Any]]:
    """Metrics and first responses that a run of the command line wrote."""
    (path,) = folder.rglob("results*.json")
    samples = {}
    for one in folder.rglob("samples*.jsonl"):
        for line in one.read_text().splitlines():
            sample = json.loads(line)
            # Ranks with fewer requests repeat one, so that there may be several responses, all alike.
            samples[one.name.split("_2")[0], sample["doc_id"]] = [responses[0] for responses in sample["resps"]]
    return json.loads(path.read_text()), samples


def arguments_of(saved: str, tasks: str, output: Path) -> list[str]:
    model = f"pretrained={saved},budget=64,sharing=uniform,correction=none,query_aware=False,question_marker=Question:"
    run = ["--model", "momentkv", "--model_args", model, "--tasks", ",".join(TASKS), "--device", "cpu"]
    return [*run, "--include_path", tasks, "--log_samples", "--output_path", str(output)]


# lm_eval's own tasks are fourteen thousand files; every process reads them for 10 seconds, and no test here needs them.
OWN_ALONE = """
import runpy
from lm_eval.tasks import TaskManager
TaskManager.__init__.__defaults__ = (None, None, False, None)
runpy.run_module("momentkv.evaluation.lm_eval", run_name="__main__")
"""


def test_it_is_lm_evals_own_tasks_that_are_left_out():
    assert list(inspect.signature(TaskManager).parameters)[2] == "include_defaults"
    assert TaskManager.__init__.__defaults__ == (None, None, True, None)


@pytest.fixture(scope="module")
def by_command(saved: str, tasks: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Exit status and output folder of a run of the command line."""
    output = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOKENIZERS_PARALLELISM", "false")  # lm_eval sets it for good
        patch.setattr(TaskManager.__init__, "__defaults__", (None, None, False, None))
        return main(["lm-eval", *arguments_of(saved, tasks, output)]), output


@pytest.mark.xdist_group("lm-eval's command")
def test_the_command_line_is_lm_evals(by_command: tuple[int, Path]):
    status, output = by_command
    assert status == 0
    assert not any("lm-eval" in argument for argument in sys.argv)
    found, samples = results(output)
    assert found["config"]["model_args"]["budget"] == 64
    assert len(samples) == 10
    assert math.isfinite(found["results"]["own_choices"]["acc,none"])


def test_a_mistake_on_the_command_line_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def refuse(arguments: list[str]) -> int:
        raise ValueError(f"policy is {arguments[-1]!r}")

    monkeypatch.setattr(momentkv.evaluation.lm_eval, "main", refuse)
    assert main(["lm-eval", "run", "--policy", "lru"]) == 1
    assert capsys.readouterr().err == "momentkv: policy is 'lru'\n"


@pytest.mark.xdist_group("lm-eval's command")
def test_two_processes_find_what_one_does(by_command: tuple[int, Path], saved: str, tasks: str, tmp_path: Path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    (tmp_path / "own_alone.py").write_text(OWN_ALONE)
    run = subprocess.run(
        [*launch, str(tmp_path / "own_alone.py"), *arguments_of(saved, tasks, tmp_path / "results")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "on rank 1" in run.stderr + run.stdout
    (one, expected), (two, found) = results(by_command[1]), results(tmp_path / "results")
    assert found == expected
    for name in TASKS:
        metrics = [
            {key: value for key, value in each["results"][name].items() if "stderr" not in key} for each in (one, two)
        ]
        assert metrics[0] == metrics[1]


@pytest.mark.model
def test_a_real_model_answers_from_a_compressed_prompt(tasks: str, builtin: tuple[Any, Any]):
    model, tokenizer = builtin
    found = evaluate(MomentLM(model, tokenizer=tokenizer, budget=64), tasks, ["own_needles"])
    right = [sample["doc"]["number"] in sample["resps"][0][0] for sample in found["samples"]["own_needles"]]
    assert sum(right) >= 4, [sample["resps"] for sample in found["samples"]["own_needles"]]

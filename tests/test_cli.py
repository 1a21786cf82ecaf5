"""The command line on a tiny model saved to disk: results are files, and errors are one line on stderr."""

from __future__ import annotations

import importlib
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import save_with_bytes
from test_evaluation import is_image

import momentkv
from momentkv import demo
from momentkv.cli import build_parser, main
from momentkv.evaluation import commands, speed
from momentkv.evaluation.report import read_json
from momentkv.policies import POLICIES

SOURCE = ["--context", "200", "--following", "16"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of a model whose tokens are bytes."""
    return save_with_bytes(tmp_path_factory.mktemp("tiny"))


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a failed command prints."""
    assert main(arguments) == 1
    err = capsys.readouterr().err
    assert err.startswith("momentkv: ")
    assert err.count("\n") == 1
    return err


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"momentkv {momentkv.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["evaluate"], ["evaluate", "fidelity", "--policies", "lru"]])
def test_incomplete_commands_show_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: momentkv" in capsys.readouterr().err


def test_demo_shows_and_draws_every_cache(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "200")  # no cell is wrapped
    plot = tmp_path / "new" / "demo.png"
    budgets = ["--budgets", "64", "60", "--new-tokens", "3", "--question", "What is it?"]
    assert main(["demo", "--model", saved, *SOURCE, *budgets, "--output", str(plot)]) == 0
    out = capsys.readouterr().out
    assert is_image(plot)
    table = [line.split("│")[1:-1] for line in out.splitlines() if line.count("│") == 9]
    found = [(row[0].strip(), int(row[1])) for row in table]
    # Equal bytes: the paper's moments cost ten tokens of dimension 16, summaries seventeen.
    sizes = [60, 50, 43, 43, 64, 54, 47, 47]
    names = ["plain eviction", "paper's moments", "summaries", "the default"] * 2
    assert found == [("full cache", 200), *zip(names, sizes, strict=True)]
    assert [row[4].strip() == "0" for row in table] == [True, *[False] * 8]
    assert all(float(row[4]) >= 0 and float(row[6]) > 0 for row in table)
    assert "Asked: What is it?" in out


@pytest.mark.parametrize(
    ("text", "before"),
    [
        ("a" * 40 + "\n\n" + "b" * 200, 40),  # the end of the paragraph in which a third of the context lies
        ("a" * 240, 30),  # no paragraphs
        ("a" * 80 + "\n\n" + "b" * 200, 30),  # none that ends within two thirds
    ],
)
def test_what_the_demo_hides_is_read(text: str, before: int):
    class Letters:
        def __call__(self, text: str, **kwargs: object) -> SimpleNamespace:
            return SimpleNamespace(input_ids=list(text))

        def decode(self, ids: list[str]) -> str:
            return "".join(ids)

    hidden = demo.hide(Letters(), text, context=90)
    assert hidden == f"{text[:before]}\n\n{demo.NEEDLE}{text[before:]}"


def test_fidelity_writes_every_setting_and_a_plot(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    own = tmp_path / "own.txt"
    own.write_text("How much is lost? " * 100)
    path = tmp_path / "fidelity.json"
    corrections = ["none", "order-0", "order-1", "summaries"]
    grid = ["--policies", "snapkv", "knorm", "--budgets", "60", "--corrections", *corrections]
    texts = ["--text", str(own), "types", "--skip", "7"]
    assert main(["evaluate", "fidelity", "--model", saved, *SOURCE, *texts, *grid, "--output", str(path)]) == 0
    content = read_json(path)
    assert {(row["text"], row["policy"], row["correction"]) for row in content["rows"]} == {
        (text, policy, correction)
        for text in ("own.txt", "types")
        for policy in ("snapkv", "knorm")
        for correction in ("none", "order 0", "order 1", "summaries")
    }
    for row in content["rows"]:
        assert math.isfinite(row["kl"])
        assert row["kl"] > 0
        assert row["head_error"] > 0
    # Columns of the table are equal bytes: tokens, and what stands for the others.
    assert {row["bytes_as_tokens"] for row in content["rows"]} == {60}
    budgets = {row["correction"]: row["budget"] for row in content["rows"]}
    assert budgets == {"none": 60, "order 0": 58, "order 1": 50, "summaries": 43}
    # Of 2 layers and 2 KV heads, each token of 128 bytes: less than a token a head apart, beside positions and scores.
    for policy, extra in (("snapkv", 8), ("knorm", 4)):
        sizes = [row["nbytes"] / 4 - extra * row["budget"] for row in content["rows"] if row["policy"] == policy]
        assert 60 * 128 - 128 < min(sizes) <= max(sizes) == 60 * 128
    assert content["protocol"] | {"model": saved, "context": 200, "following": 16, "skip": 7} == content["protocol"]
    assert content["protocol"]["texts"] == ["own.txt", "types"]
    assert is_image(path.with_suffix(".png"))
    assert "snapkv" in capsys.readouterr().out


@pytest.mark.parametrize("correction", ["order-0", "summaries"])
def test_gap_writes_means_by_layer_and_head(
    correction: str, saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "gap.json"
    options = ["--budget", "40", "--policy", "h2o", "--correction", correction, "--output", str(path)]
    assert main(["evaluate", "gap", "--model", saved, *SOURCE, *options]) == 0
    content = read_json(path)
    assert (content["policy"], content["budget"]) == ("h2o", 40)
    assert content["correction"] == correction.replace("-", " ")
    assert content["mean"].keys() == content["by_layer_and_head"].keys()
    assert f"{content['mean']['plain']:.3f}" in capsys.readouterr().out
    assert is_image(path.with_suffix(".png"))


@pytest.mark.parametrize("correction", ["none", "order-0", "summaries"])
def test_evaluate_trust_finds_no_error_above_its_certificate(saved: str, tmp_path: Path, correction: str):
    path = tmp_path / "trust.json"
    options = ["--budget", "40", "--correction", correction, "--output", str(path)]
    assert main(["evaluate", "trust", "--model", saved, *SOURCE, *options]) == 0
    content = read_json(path)
    assert content["points"] > 0
    assert content["violations"] == 0
    assert -1 <= content["rank correlation, estimate"] <= 1
    assert is_image(path.with_suffix(".png"))


class Here(ThreadPoolExecutor):
    """In place of fresh processes, each of which would import torch again."""

    def __init__(self, max_workers: int, mp_context: object) -> None:
        super().__init__(max_workers)


def test_speed_measures_every_cache(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(speed, "ProcessPoolExecutor", Here)
    path = tmp_path / "speed.json"
    small = ["--context", "300", "--budget", "64", "--steps", "4"]
    assert main(["evaluate", "speed", "--model", saved, *small, "--output", str(path)]) == 0
    rows = read_json(path)["rows"]
    assert [row["cache"] for row in rows] == list(speed.KINDS)
    head = 2 * 2  # layers and KV heads
    token = 2 * 16 * 4  # keys and values of float32
    assert rows[0]["cache_bytes"] == head * 304 * token
    assert rows[1]["cache_bytes"] == head * 68 * (token + 4 + 4)  # position and score
    assert rows[2]["cache_bytes"] - rows[1]["cache_bytes"] == head * 4 * (1 + 2 * 16 + 16 * 16)
    assert rows[3]["cache_bytes"] == rows[5]["cache_bytes"]  # heads hold their own, nothing twice
    for row in rows:
        assert row["seconds_per_step"]["min"] <= 1 / row["tokens_per_second"] <= row["seconds_per_step"]["max"]


@pytest.mark.parametrize("command", [["demo"], ["evaluate", "gap"], ["evaluate", "fidelity"]])
def test_bad_input_is_one_line_on_stderr(
    command: list[str], saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plot = ["--model", saved, "--output", str(tmp_path / "none.json")]
    assert "text is 'no such text'" in failure(capsys, *command, *plot, "--text", "no such text")
    short = tmp_path / "short.txt"
    short.write_text("Too short")
    err = failure(capsys, *command, *plot, *SOURCE, "--text", str(short))
    assert "short.txt has 9 tokens, but 21" in err
    skip = ["--text", "compound", "--skip", "1000000"]
    assert "compound has 0 tokens" in failure(capsys, *command, *plot, *SOURCE, *skip)
    budget = {"gap": ["--budget", "10"], "fidelity": ["--budgets", "10"], "demo": ["--budgets", "10"]}
    assert "budget is 10" in failure(capsys, *command, *plot, *SOURCE, *budget[command[-1]])
    assert not (tmp_path / "none.json").exists()


def test_too_few_new_tokens_to_time_are_refused(capsys: pytest.CaptureFixture[str]):
    assert "--new-tokens is 1" in failure(capsys, "demo", "--new-tokens", "1")


def test_a_model_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["demo", "--model", str(tmp_path / "nothing")]) == 1
    assert "nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("missing", "extra"), [("torch", "hf"), ("transformers", "hf"), ("rich.console", "demo"), ("matplotlib", "demo")]
)
def test_a_missing_package_names_the_extra_once(
    missing: str, extra: str, saved: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.delitem(sys.modules, "momentkv.demo", raising=False)  # to be imported again
    for name in [missing, *(name for name in sys.modules if name.startswith(f"{missing}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    budgets = ["--budgets", "40", "--new-tokens", "2"]
    err = failure(capsys, "demo", "--model", saved, *SOURCE, *budgets)
    assert err.count("pip install") == 1
    assert f"pip install 'momentkv[{extra}]'" in err
    assert missing.partition(".")[0] in err


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_momentkv_hf_without_its_packages_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "momentkv.hf")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=rf"{missing} is missing; run pip install 'momentkv\[hf\]'"):
        importlib.import_module("momentkv.hf")


def test_a_missing_package_of_nobody_is_not_hidden(monkeypatch: pytest.MonkeyPatch):
    def broken(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'other'", name="other")

    monkeypatch.setattr(commands, "load_model", broken)
    with pytest.raises(ModuleNotFoundError, match="other"):
        main(["evaluate", "gap"])


def test_defaults_are_every_policy_plain_and_corrected():
    options = build_parser().parse_args(["evaluate", "fidelity"])
    assert options.policies == list(POLICIES)
    assert options.corrections == ["none", "order-1", "summaries"]

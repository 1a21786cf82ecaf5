"""The command line on a tiny model saved to disk: results are files, and errors are one line on stderr."""

from __future__ import annotations

import argparse
import importlib
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from models import save_with_bytes
from test_evaluation import is_image
from test_tables import demo_rows

import momentkv
from momentkv import demo
from momentkv.cli import build_parser, main
from momentkv.evaluation import commands, speed
from momentkv.evaluation.options import ONCE
from momentkv.evaluation.report import read_json
from momentkv.evaluation.settings import DEFAULT
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


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "momentkv", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"momentkv {momentkv.__version__}\n"


def test_output_that_was_closed_is_no_error():
    """As of daemons, and with `>&-`: Python then has no standard output, or no standard error."""
    command = f"{sys.executable} -m momentkv plan llama-3.1-8b --context 32000 --budget 512"
    done = subprocess.run(f"{command} >&-", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = subprocess.run(f"{command} --bits nothing 2>&-", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_output_that_nobody_reads_is_no_error():
    """As with `momentkv plan --list | head -1`."""
    command = [sys.executable, "-m", "momentkv", "plan", "--list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait()
    process.stderr.close()


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Every parser by its command."""
    found = {}

    def walk(parser: argparse.ArgumentParser) -> None:
        found[parser.prog] = parser
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, each in action.choices.items():
                    if name != "lm-eval":
                        walk(each)

    walk(build_parser())
    return found


@pytest.mark.parametrize("name", list(parsers()))
def test_help_fits_and_shows_defaults(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = parsers()[name]
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert "None" not in text
    assert not re.search(r"\[['\d]", text)  # no list as Python writes it
    words = " ".join(text.split())
    for action in parser._actions:
        default = action.default
        if not isinstance(action, argparse._SubParsersAction) and action.dest != "help":
            assert action.help, action.dest
        if default in (None, False, argparse.SUPPRESS) or default == ONCE:
            continue
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        assert f"(default: {shown})" in words


@pytest.mark.parametrize("arguments", [[], ["evaluate"], ["evaluate", "fidelity", "--policies", "lru"]])
def test_incomplete_commands_show_the_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: momentkv" in capsys.readouterr().err


def test_demo_shows_and_draws_every_cache(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "80")
    plot = tmp_path / "new" / "demo.png"
    # So many that a block of 32 is evicted while they are generated.
    budgets = ["--budgets", "64", "60", "--new-tokens", "36", "--question", "What is it?"]
    assert main(["demo", "--model", saved, *SOURCE, *budgets, "--output", str(plot)]) == 0
    out = capsys.readouterr().out
    assert is_image(plot)
    names = [name for name, *_ in demo.ROWS]
    found = demo_rows(out)
    assert [x[0] for x in found] == ["full cache", *names * 2]
    # Equal bytes: the paper's moments cost six tokens of dimension 16, summaries ten.
    sizes = ["60", "54", "50", "50", "64", "58", "54", "54"]
    assert [x[1] for x in found if x[0] not in names[4:]] == ["200", *sizes]
    # As many bytes in few bits: more tokens, of the 200 that there are.
    assert all(54 < int(x[1]) <= 200 for x in found if x[0] in names[4:])
    assert [x[4] == "0" for x in found] == [True, *[False] * 12]
    assert all(float(x[6]) > 0 for x in found)
    assert all((x[7] is None) == (x[0] == "full cache") for x in found if x[0] in names[:4])  # ms of a step that evicts
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


# Of dimension 16, the paper's moments cost 652 bytes, its order 0 76, and summaries 1,268; a token has 32 numbers.
@pytest.mark.parametrize(
    ("counted", "size", "budgets"),
    [
        ([], 80, {"none": 80, "order 0": 78, "order 1": 69, "summaries": 60}),
        (["--bytes", "16"], 80, {"none": 80, "order 0": 78, "order 1": 69, "summaries": 60}),
        (["--bytes", "32"], 60, {"none": 60, "order 0": 59, "order 1": 54, "summaries": 50}),
    ],
)
def test_fidelity_writes_every_setting_and_a_plot(
    counted: list[str],
    size: int,
    budgets: dict[str, int],
    saved: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    own = tmp_path / "own.txt"
    own.write_text("How much is lost? " * 100)
    path = tmp_path / "fidelity.json"
    corrections = ["none", "order-0", "order-1", "summaries"]
    grid = ["--policies", "snapkv", "knorm", "--budgets", str(size), "--corrections", *corrections, *counted]
    texts = ["--text", str(own), "types", "--skip", "7"]
    assert main(["evaluate", "fidelity", "--model", saved, *SOURCE, *texts, *grid, "--output", str(path)]) == 0
    content = read_json(path)
    assert {(row["text"], row["method"], row["policy"], row["correction"]) for row in content["rows"]} == {
        (text, f"{policy}/{correction}", policy, correction.replace("-", " "))
        for text in ("own.txt", "types")
        for policy in ("snapkv", "knorm")
        for correction in corrections
    }
    for row in content["rows"]:
        assert math.isfinite(row["kl"])
        assert row["kl"] > 0
        assert row["head_error"] > 0
    # Columns of the table are equal bytes: tokens, and what stands for the others.
    assert {row["bytes_as_tokens"] for row in content["rows"]} == {size}
    assert {row["correction"]: row["budget"] for row in content["rows"]} == budgets
    # Of 2 layers and 2 KV heads, each token of 128 bytes as it is stored, beside positions and scores, with the slot of
    # a block of one and two counts; what is left are
    # statistics, which are less than a token a head short of what their tokens would have been.
    token = 2 * 16 * (4 if "32" in counted else 2)
    for policy, extra in (("snapkv", 8), ("knorm", 4)):
        for row in (row for row in content["rows"] if row["policy"] == policy):
            statistics = row["nbytes"] / 4 - (extra + 128) * (row["budget"] + 1) - 8
            assert size * token - token < row["budget"] * token + statistics <= size * token
    expected = {"model": saved, "bytes": 32 if "32" in counted else 16, "context": 200, "following": 16, "skip": 7}
    assert content["protocol"] | expected == content["protocol"]
    assert content["protocol"]["texts"] == ["own.txt", "types"]
    assert is_image(path.with_suffix(".png"))
    out = " ".join(capsys.readouterr().out.split())
    assert "snapkv" in out
    assert f"of so many {expected['bytes']}-bit tokens" in out
    assert "types chose twelve summaries of rank 2" in out
    assert {text: role["part"] for text, role in content["roles"].items()} == {
        "own.txt": "unnamed",
        "types": "choosing",
    }


def test_a_text_that_says_something_else_now_is_another_measurement(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Topics of the language reference have the same name in every version of Python, and do not say the same."""
    own, path = tmp_path / "own.txt", tmp_path / "fidelity.json"
    command = ["evaluate", "fidelity", "--model", saved, *SOURCE, "--text", str(own), "--budgets", "80"]
    command += ["--methods", "snapkv/none", "--output", str(path)]
    own.write_text("How much is lost? " * 100)
    assert main(command) == 0
    content = read_json(path)
    assert list(content["protocol"]["ids_sha256"]) == ["own.txt"]
    own.write_text("How much is left? " * 100)
    assert "holds results of another protocol" in failure(capsys, *command)
    assert read_json(path) == content


def test_methods_are_measured_as_they_were_named_and_once(
    saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "fidelity.json"
    command = [
        "evaluate",
        "fidelity",
        "--model",
        saved,
        *SOURCE,
        "--text",
        "types",
        "--budgets",
        "80",
        "--output",
        str(path),
    ]
    assert main([*command, "--methods", "default", "snapkv/none-layers"]) == 0
    rows = read_json(path)["rows"]
    assert [(row["method"], row["policy"], row["correction"]) for row in rows] == [
        ("default", DEFAULT.policy_name, DEFAULT.correction),
        ("snapkv/none-layers", "snapkv", "none, by layers"),
    ]
    # The default by its other name is there already.
    assert main([*command, "--methods", "balanced/summaries-heads"]) == 0
    assert read_json(path)["rows"] == rows
    capsys.readouterr()
    err = failure(capsys, *command, "--methods", "default", "balanced/summaries-heads")
    assert "methods has 'default' and 'balanced/summaries-heads', which are the same" in err
    # Bytes of other tokens are another protocol.
    assert "holds results of another protocol" in failure(capsys, *command, "--bytes", "32", "--methods", "default")


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


@pytest.mark.parametrize(
    "method",
    [
        *(["--correction", correction] for correction in ("none", "order-0", "summaries")),
        *(["--method", method] for method in ("default", "default@4", "snapkv/none@3", "default@auto")),
    ],
    ids="-".join,
)
def test_evaluate_trust_finds_no_error_above_its_certificate(saved: str, tmp_path: Path, method: list[str]):
    path = tmp_path / "trust.json"
    options = ["--budget", "40", *method, "--output", str(path)]
    assert main(["evaluate", "trust", "--model", saved, *SOURCE, *options]) == 0
    content = read_json(path)
    assert content["points"] > 0
    assert content["violations"] == 0
    assert -1 <= content["rank correlation, estimate"] <= 1
    assert is_image(path.with_suffix(".png"))


@pytest.mark.parametrize(
    ("method", "what"), [("twice@4", "looks at a second reading"), ("default@tried", "tries bits")]
)
def test_evaluate_trust_refuses_methods_that_read_more_than_once(
    method: str, what: str, saved: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["evaluate", "trust", "--model", saved, *SOURCE, "--method", method]) == 1
    assert f"method is '{method}', which {what}" in capsys.readouterr().err.replace("\n", " ")


def test_methods_that_were_tried_are_measured(saved: str, tmp_path: Path):
    path = tmp_path / "fidelity.json"
    command = ["evaluate", "fidelity", "--model", saved, "--context", "400", "--following", "16", "--text", "typesseq"]
    methods = ["default@auto", "default@tried", "twice@tried"]
    sizes = ["--bytes", "32", "--budgets", "80"]
    assert main([*command, *sizes, "--methods", *methods, "--output", str(path)]) == 0
    rows = read_json(path)["rows"]
    assert [(row["method"], row["correction"].split(", ")[-1]) for row in rows] == [
        ("default@auto", "auto bits"), ("default@tried", "tried bits"), ("twice@tried", "tried bits"),
    ]  # fmt: skip
    assert all(row["nbytes"] > 0 and math.isfinite(row["kl"]) for row in rows)


@pytest.mark.parametrize("option", [("--policy", "snapkv"), ("--correction", "none")], ids=lambda option: option[0])
def test_evaluate_trust_refuses_two_ways_to_say_the_method(
    saved: str, capsys: pytest.CaptureFixture[str], option: tuple[str, str]
):
    assert main(["evaluate", "trust", "--model", saved, *SOURCE, "--method", "default@4", *option]) == 1
    message = capsys.readouterr().err.replace("\n", " ")
    assert "method is 'default@4'" in message
    assert f"leave out {option[0]}" in message


def test_evaluate_trust_certifies_what_codes_lose_where_nothing_is_evicted(saved: str, tmp_path: Path):
    path = tmp_path / "trust.json"
    options = ["--budget", "300", "--method", "snapkv/none@3", "--output", str(path)]
    assert main(["evaluate", "trust", "--model", saved, *SOURCE, *options]) == 0
    content = read_json(path)
    assert content["violations"] == 0
    assert content["median error"] > 1e-3
    assert content["median error"] / 4 < content["median estimated"] < 4 * content["median error"]


def test_speed_measures_every_cache(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    # In place of fresh processes, each of which would import torch again.
    monkeypatch.setattr(speed, "in_a_process", lambda function, *arguments: function(*arguments))
    path = tmp_path / "speed.json"
    small = ["--context", "300", "--budget", "64", "--steps", "36"]
    assert main(["evaluate", "speed", "--model", saved, *small, "--output", str(path)]) == 0
    beforehand = " ".join(capsys.readouterr().out.split()).partition("cache tokens/s")[0]
    assert "7 caches read 300 tokens twice" in beforehand
    assert re.search(r"all others take about \d+ (s|min)", beforehand)
    rows = read_json(path)["rows"]
    assert [row["cache"] for row in rows] == list(speed.KINDS)
    head = 2 * 2  # layers and KV heads
    token = 2 * 16 * 4  # keys and values of float32
    assert rows[0]["cache_bytes"] == head * 337 * token
    # Budget and block, each token with position and score, and the counts of two tiers.
    assert rows[1]["cache_bytes"] == head * ((64 + 32) * (token + 4 + 4) + 8)
    assert rows[2]["cache_bytes"] - rows[1]["cache_bytes"] == head * (
        4 + 18 * (2 * 16 + 4)
    )  # a weight; vectors in 16 bits
    assert rows[3]["cache_bytes"] == rows[4]["cache_bytes"]  # heads hold their own, nothing twice
    for row in rows:
        seconds = row["seconds_per_step"]
        assert seconds["min"] <= 1 / row["tokens_per_second"] <= seconds["max"]
        assert seconds["min"] <= row["seconds_between_flushes"] <= seconds["max"]
    # Nothing leaves the full cache, nor the one in chosen bits, whose bytes hold all tokens.
    assert rows[0]["seconds_of_a_flush"] is rows[6]["seconds_of_a_flush"] is None
    assert all(0 < row["seconds_of_a_flush"] <= row["seconds_per_step"]["max"] for row in rows[1:6])


@pytest.mark.parametrize("option", ["context", "steps", "chunk", "threads"])
def test_speed_refuses_to_read_or_decode_nothing(saved: str, option: str, capsys: pytest.CaptureFixture[str]):
    err = failure(capsys, "evaluate", "speed", "--model", saved, f"--{option}", "0")
    assert f"{option} is 0; use at least 1" in err


def test_methods_in_segments_stand_apart(saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "fidelity.json"
    command = ["evaluate", "fidelity", "--model", saved, *SOURCE, "--text", "types", "--budgets", "80"]
    command += ["--methods", "twice", "snapkv/none", "--output", str(path)]
    assert main([*command, "--segment", "90", "--decode", "8"]) == 0
    content = read_json(path)
    assert [row["method"] for row in content["rows"]] == ["twice, segments of 90", "snapkv/none, segments of 90"]
    said = "after each 90 tokens of the context, and 8 tokens at a time while the following ones are teacher-forced"
    assert content["protocol"]["compressed"] == f"{said} one by one"
    assert main([*command, "--segment", "90", "--fresh"]) == 0
    said = "after each 90 tokens of the context; the following tokens teacher-forced, no further eviction"
    assert read_json(path)["protocol"]["compressed"] == said
    # Not mixed with what was read in one piece.
    assert "another protocol" in failure(capsys, *command)
    for kind in ("fidelity", "needles"):
        assert "segment is 0" in failure(capsys, "evaluate", kind, "--model", saved, "--segment", "0")


@pytest.mark.parametrize("command", [["demo"], ["evaluate", "gap"], ["evaluate", "fidelity"]])
def test_bad_input_is_one_line_on_stderr(
    command: list[str], saved: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    plot = ["--model", saved, "--output", str(tmp_path / "none")]
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
    assert options.policies == ONCE == [name for name in POLICIES if name not in ("second-reading", "twice")]
    assert options.corrections == ["none", "order-1", "summaries"]

"""Files that commands read and write: what is none of theirs is named before a model is loaded, and left as it is."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from models import save_with_bytes
from test_report import fidelity_rows, needle_rows

from momentkv.cli import build_parser, main
from momentkv.evaluation.gather import gather, kind_of_result
from momentkv.evaluation.outputs import check_output, output_of
from momentkv.evaluation.report import save_figure
from momentkv.evaluation.sources import load_model, located

MODULES = ("demo", *(f"evaluation.{x}" for x in ("commands", "needles", "trust", "stream", "sources", "lm_eval.tasks")))
FIDELITY = ["fidelity", "--context", "200", "--following", "40", "--budgets", "64", "--methods", "snapkv/none"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of several kinds, in a folder where no model can be loaded."""
    for name in MODULES:
        module = importlib.import_module(f"momentkv.{name}")
        monkeypatch.setattr(module, "load_model", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes.txt").write_bytes(b"\x89\xb8\xff")
    (tmp_path / "cut.json").write_text('{"protocol": ')
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "plotted.png").mkdir()
    (tmp_path / "folder" / "summary.json").write_text("{}")
    fidelity: Any = {"protocol": {"model": "m"}, "rows": fidelity_rows()}
    (tmp_path / "fidelity.json").write_text(json.dumps(fidelity))
    decoded = [row | {"kl_of_quarters": [0.1] * 4} for row in fidelity_rows()]
    (tmp_path / "decoded.json").write_text(json.dumps(fidelity | {"rows": decoded}))
    (tmp_path / "needles.json").write_text(json.dumps(fidelity | {"rows": needle_rows({"full cache": [1.0]})}))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*FIDELITY, "--output", "x.png"], "output is 'x.png', where the plot would go; name a .json"),
        (["needles", "--output", "x.png"], "output is 'x.png', where the plot would go"),
        (["trust", "--output", "x.png"], "output is 'x.png', where the plot would go"),
        (
            [*FIDELITY, "--output", "folder"],
            "output is 'folder', which is a folder; name a file, 'folder/fidelity.json'",
        ),
        (["tradeoff", "fidelity.json", "fidelity.json", "--output", "folder"], "output is 'folder', which is a folder"),
        (["gap", "--output", "/proc/x.json"], "output is '/proc/x.json', which cannot be written (No such file"),
        (["report", "other.json", "--output", "/proc/a/b"], "output is '/proc/a/b', which cannot be written"),
        (["gap", "--output", "bytes.txt/x.json"], "output is 'bytes.txt/x.json', which cannot be written (Not a dir"),
        (["gap", "--output", "x" * 300], "which cannot be written (File name too long); name another"),
        (["gap", "--output", "x" * 252], "which cannot be written (File name too long); name another"),
        *(
            ([name, "--output", "fidelity.json"], "output is 'fidelity.json', which holds something else than results")
            for name in ("gap", "trust", "stream", "speed")
        ),
        (["gap", "--output", "plotted.json"], "and 'plotted.png', where the plot would go, is a folder; name another"),
        (["report", "fidelity.json", "--output", "/proc"], "output is '/proc', which cannot be written"),
        *(
            (["needles", "--write-haystacks", path], f"write_haystacks is '{path}', which {why}")
            for path, why in (
                ("folder", "is a folder; name a file, 'folder/haystacks.json'"),
                ("/proc/x.json", "cannot be written"),
                ("fidelity.json", "holds something else than results of this command; name another file"),
            )
        ),
        (["gap", "--output", "cut.json"], "'cut.json' is no JSON, or was cut off"),
        (
            ["tradeoff", "fidelity.json", "other.json", "--output", "d.json"],
            "'d.json', which no plot can be written as",
        ),
        (["report", "fidelity.json", "--output", "bytes.txt"], "output is 'bytes.txt', which is a file; name a folder"),
        ([*FIDELITY, "--skip", "-3"], "skip is -3; use 0 or more characters"),
        ([*FIDELITY, "--text", "a/own.txt", "b/own.txt"], "text has 'a/own.txt' and 'b/own.txt', which results call"),
        ([*FIDELITY, "--text", "calls", "calls"], "text has 'calls' and 'calls', which results call the same"),
        (["needles", "--tasks", "multi-key", "multi-key"], "tasks has 'multi-key' and 'multi-key', which results call"),
        (["tasks", "--tasks", "gsm8k", "gsm8k"], "tasks has 'gsm8k' and 'gsm8k', which results call the same"),
        (
            ["stream", "--following", "3"],
            "following is 3, but each quarter of a decode has a number of its own; use at",
        ),
        ([*FIDELITY, "--decode", "1", "--following", "3"], "following is 3, but each quarter of a decode"),
        ([*FIDELITY, "--decode", "0"], "decode is 0; use at least 1"),
        (
            ["speed", "--context", "50", "--budget", "20", "--steps", "60"],
            "context is 50, but 60 steps of a decode read its first tokens once more; use a longer one, or fewer",
        ),
        (["speed", "--context", "7", "--budget", "3", "--steps", "2"], "context is 7, but 8 steps of a decode"),
        (["speed", "--context", "100"], "budget is 512, but the context has 100 tokens"),
        (["trust", "--context", "200", "--budget", "300"], "budget is 300, but the context has 200 tokens"),
        (["gap", "--context", "200", "--budget", "200"], "budget is 200, but the context has 200 tokens"),
        (
            ["tradeoff", "fidelity.json", "other.json"],
            "needles is 'other.json', which momentkv evaluate needles did not",
        ),
        (
            ["tradeoff", "list.json", "fidelity.json"],
            "fidelity is 'list.json', which momentkv evaluate fidelity did not",
        ),
        (["tradeoff", "fidelity.json", "fidelity.json"], "needles is 'fidelity.json', which momentkv evaluate needles"),
        (["tradeoff", "fidelity.json", "none.json"], "'none.json' cannot be read (No such file or directory)"),
        (["tradeoff", "cut.json", "fidelity.json"], "'cut.json' is no JSON, or was cut off"),
        (["tradeoff", "decoded.json", "needles.json"], "fidelity is 'decoded.json', of a decode; name what momentkv"),
        (
            ["tradeoff", "fidelity.json", "needles.json", "--length", "999"],
            "length is 999, but the haystacks have 100 t",
        ),
        (["tasks", "--tasks", "niah_single_1", "--max-length", "0"], "max_length is 0; use at least 1"),
        (["report", "folder/summary.json"], "results is 'folder/summary.json', which is no summary that momentkv"),
        (["report", "cut.json"], "'cut.json' is no JSON, or was cut off"),
        (["report", "bytes.txt"], "'bytes.txt' is no text in UTF-8"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_is_no_file_of_a_command_is_named(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["evaluate", *arguments]) == 1
    assert message in said(capsys)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("list.json", "output is 'list.json', which holds something else than results"),
        ("other.json", "output is 'other.json', which holds something else than results"),
        ("cut.json", "'cut.json' is no JSON, or was cut off"),
    ],
)
@pytest.mark.parametrize(
    "arguments",
    [[*FIDELITY, "--text", "compound"], ["needles"], ["tasks", "--tasks", "niah_single_1"]],
    ids=lambda x: x[0],
)
def test_results_are_not_gone_on_with_from_another_file(
    arguments: list[str], output: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
):
    """The one that is there stays; ``--fresh`` alone would discard it."""
    before = (folder / output).read_bytes()
    assert main(["evaluate", *arguments, "--output", output]) == 1
    assert message in said(capsys)
    assert (folder / output).read_bytes() == before


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--output", "d.json"], "output is 'd.json', which no plot can be written as; use one of "),
        (["bench", "--output", "fidelity.json"], "output is 'fidelity.json', which holds something else"),
    ],
)
def test_output_is_looked_at_before_anything_is_measured(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert main(arguments) == 1
    assert message in said(capsys)


def test_results_of_the_same_command_are_replaced(folder: Path):
    for command, holds in (("gap", "by_layer_and_head"), ("trust", "violations"), ("stream", "block")):
        (folder / "own.json").write_text(json.dumps({holds: 1}))
        check_output(output_of(build_parser().parse_args(["evaluate", command, "--output", "own.json"])))
    check_output(output_of(build_parser().parse_args(["evaluate", "gap", "--output", "new/folder/own.json"])))
    assert not (folder / "new").exists()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("command", ["demo", *(f"evaluate {x}" for x in ("fidelity", "gap", "stream", "trust"))])
def test_a_text_that_is_none_is_named(command: str, capsys: pytest.CaptureFixture[str]):
    assert main([*command.split(), "--text", "bytes.txt"]) == 1
    assert "'bytes.txt' is no text in UTF-8; convert it, or name another file" in said(capsys)


@pytest.mark.parametrize(
    "content",
    [
        {"rows": [1]},
        {"rows": [{"kl": 1}]},
        {"by_layer_and_head": 1},
        {"results": 1, "configs": {}},
        {"rows": needle_rows({"full cache": [1.0]}), "protocol": {}},
        {"rows": fidelity_rows()},
    ],
    ids=["numbers", "few columns", "a gap", "lm_eval", "a protocol without a model", "no protocol"],
)
def test_what_looks_like_results_is_left_out(content: dict[str, Any], folder: Path):
    (folder / "strange.json").write_text(json.dumps(content))
    assert kind_of_result(content) is None
    assert gather([folder / "strange.json", folder / "fidelity.json"])["left_out"] == ["strange.json"]


def test_names_are_written_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    """Whatever stands in brackets is no style: an error of it would come after the measurement."""
    monkeypatch.chdir(tmp_path)
    for name, rows in (("f[/a].json", fidelity_rows()), ("n.json", needle_rows({"full cache": [1], "default": [1]}))):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(json.dumps({"protocol": {"model": "m[/b]", "context": 9, "bytes": 16}, "rows": rows}))
    assert main(["evaluate", "tradeoff", "f[/a].json", "n.json", "--output", "g[/a].png"]) == 0
    out = capsys.readouterr().out
    assert "plot: g[/a].png" in out
    assert "m[/b]: KL over" in out


@pytest.mark.parametrize("name", ["./none", "../none", "a/b/c", "none/"])
def test_a_folder_that_is_not_there_is_no_name_on_the_hub(name: str):
    with pytest.raises(ValueError, match="but there is no such folder; give that of a model, or a Hugging Face id"):
        located(name)
    assert located("Qwen/Qwen2.5-0.5B_x") == ("Qwen/Qwen2.5-0.5B_x", None)
    assert located("gpt2") == ("gpt2", None)


def test_weights_that_were_cut_off_are_named(tmp_path: Path):
    path = Path(save_with_bytes(tmp_path / "tiny"))
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model is '.*tiny', whose weights cannot be read \(.*\); fetch it again"):
        load_model(str(path))


def test_a_plot_is_where_it_is_said_to_be(tmp_path: Path):
    for name in ("plot", "plot.png", "plot.svg"):
        path = save_figure(Figure(), tmp_path / name)
        assert path.suffix in (".png", ".svg")
        assert path.is_file()


def test_results_that_cannot_be_written_say_where(tmp_path: Path):
    report = importlib.import_module("momentkv.evaluation.report")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output is '.*file/x.json', which cannot be written"):
        report.write_json(tmp_path / "file" / "x.json", {})


@pytest.mark.parametrize("terminal", [False, True])
def test_an_error_is_one_line_or_as_wide_as_the_terminal(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert main(["evaluate", "trust", "--context", "200", "--budget", "300"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("momentkv: budget is 300")
    assert (len(lines) > 1) == terminal
    assert not terminal or max(map(len, lines)) <= 60

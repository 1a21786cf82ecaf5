"""The report: what is gathered, what its page says, and that the committed page is the one of the committed results."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from models import FAMILIES, build
from test_needles import byte_tokenizer

from momentkv.cli import build_parser, main
from momentkv.evaluation import suite as module
from momentkv.evaluation.gather import BANDS, DEFAULT_METHOD, gather, results_in
from momentkv.evaluation.needles_report import bootstrap
from momentkv.evaluation.report import read_json, write_json
from momentkv.evaluation.report_page import SPACE, markdown_of, write_report
from momentkv.evaluation.report_plots import plot_depths, plot_found, plot_kl
from momentkv.evaluation.settings import DEFAULT
from momentkv.evaluation.suite import PLAN, complete
from momentkv.hf import MomentCache

ROOT = Path(__file__).parents[1]
OURS, PEER, PLAIN = DEFAULT_METHOD, ("snapkv", "none"), (DEFAULT_METHOD[0], "none, by heads")


def needle_rows(found: dict[tuple[str, str], list[float]], task: str = "single") -> list[dict[str, Any]]:
    """Of each method the values found in each haystack."""
    common = {"layout": "x", "task": task, "value": "number", "index": 0, "length": 100, "tokens": 0.5, "nll": 1.0}
    rows = []
    for (policy, correction), shares in found.items():
        full = policy == "full cache"
        for at, share in enumerate(shares):
            rows.append(
                common
                | {"haystack": str(at), "depth": at / len(shares), "question": "" if full else "unseen"}
                | {"policy": policy, "correction": correction, "budget": None if full else 64, "generated": None}
                | {"bytes_as_tokens": None if full else 64, "nbytes": 1, "values": share}
            )
    return rows


def written(path: Path, rows: list[dict[str, Any]], bits: int | None = 16, **more: Any) -> Path:
    protocol = {"model": "m", "seed": 7, "momentkv": "0", "unseen": "the question afterwards"}
    if bits is not None:  # results of before there was a choice have none
        protocol["bytes"] = bits
    return write_json(path, {"command": "momentkv x", "protocol": protocol, "environment": {}, "rows": rows, **more})


def fidelity_rows() -> list[dict[str, Any]]:
    return [
        {"text": text, "policy": policy, "correction": correction, "budget": 60, "bytes_as_tokens": 64, "nbytes": 1}
        | {"kl": kl * scale, "top1": 0.5, "nll_change": 0.1, "head_error": 0.2}
        for text, scale in (("one", 1), ("two", 3))
        for (policy, correction), kl in ((OURS, 0.1), (PEER, 0.2))
    ]


def gap() -> dict[str, Any]:
    fields = ("evicted_mass", "cosine", "plain", "corrected")
    return {
        "momentkv": "0", "text": "t", "policy": "snapkv", "budget": 64, "correction": "order 1", "layers": [0, 1],
        "mean": dict.fromkeys(fields, 0.25), "by_layer_and_head": {name: [[0.1, 0.3], [0.2, 0.4]] for name in fields},
    }  # fmt: skip


def lm_eval_results() -> dict[str, Any]:
    return {
        "results": {"niah_single_1": {"alias": "niah", "4096,none": 0.75, "4096_stderr,none": "N/A"}},
        "configs": {}, "config": {"model": "momentkv", "model_args": "budget=128"},
        "n-samples": {"niah_single_1": {"effective": 40}},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = {("full cache", ""): [1.0] * 4, OURS: [1, 1, 0, 0], PEER: [0, 0, 0, 1], PLAIN: [1.0, 0, 0, 0]}
    written(tmp_path / "needles.json", needle_rows(found))
    hard = {("full cache", ""): [0.0] * 4, OURS: [0.0] * 4, PEER: [1.0] * 4}
    written(tmp_path / "hard.json", needle_rows(hard, task="multi-key"))
    written(tmp_path / "fidelity.json", fidelity_rows())
    write_json(tmp_path / "gap.json", gap())
    write_json(tmp_path / "lm" / "results_x.json", lm_eval_results())
    write_json(tmp_path / "other.json", {"a": 1})
    return tmp_path


def test_all_kinds_are_gathered_and_others_named(folder: Path):
    summary = gather(results_in([folder]))
    assert summary["left_out"] == ["other.json"]
    assert {x["kind"] for x in summary["sources"]} == {"needles", "fidelity", "gap"}
    ours = next(x for x in summary["needles"] if (x["policy"], x["correction"], x["task"]) == (*OURS, "single"))
    low, high = bootstrap([(1, 1), (1, 1), (0, 1), (0, 1)])
    assert (ours["share"], ours["low"], ours["high"], ours["n"], ours["signal"]) == (0.5, low, high, 4, True)
    bands = {
        x["band"]: x["share"]
        for x in summary["depths"]
        if (x["policy"], x["correction"], x["task"]) == (*PEER, "single")
    }
    assert bands == {int(at / 4 * BANDS): share for at, share in enumerate((0, 0, 0, 1))}
    (kl,) = [x for x in summary["fidelity"] if x["policy"] == PEER[0]]
    assert kl["kl"] == pytest.approx(0.4)
    assert (kl["low"], kl["high"], kl["texts"]) == (pytest.approx(0.2), pytest.approx(0.6), 2)
    assert summary["gap"][0]["by_layer"]["plain"] == [0.2, 0.3]
    assert (
        summary["lm_eval"][0] | {"task": "niah_single_1", "metric": "4096", "value": 0.75, "n": 40}
        == (summary["lm_eval"][0])
    )


@pytest.mark.parametrize(
    ("bits", "said"),
    [
        (16, "of so many 16-bit tokens"),
        (32, "of so many 32-bit tokens"),
        (None, "of so many tokens as the model stores"),
    ],
)
def test_the_page_says_what_bytes_are_of(bits: int | None, said: str, tmp_path: Path):
    written(tmp_path / "fidelity.json", fidelity_rows(), bits)
    text = write_report([tmp_path], tmp_path / "report").with_suffix(".md").read_text()
    assert said in text
    assert ("add `--bytes 32` to the commands" in text) == (bits == 32)  # these do not name it
    written(tmp_path / "fidelity.json", fidelity_rows(), bits, command=f"momentkv x --bytes {bits}")
    assert "add `--bytes" not in write_report([tmp_path], tmp_path / "report").with_suffix(".md").read_text()


@pytest.mark.parametrize("other", [32, None])
def test_bytes_of_different_tokens_are_not_put_together(
    other: int | None, folder: Path, capsys: pytest.CaptureFixture[str]
):
    written(folder / "fidelity.json", fidelity_rows(), other)
    assert main(["evaluate", "report", str(folder), "--output", str(folder / "report")]) == 1
    err = capsys.readouterr().err
    assert "results count bytes in 16-bit tokens (hard.json, needles.json) and in " in err
    assert "(fidelity.json); report them apart" in err


def test_differences_are_paired_by_question(folder: Path):
    pairs = gather(results_in([folder]))["pairs"]
    assert {x["task"] for x in pairs} == {"single"}  # what has no signal is not compared
    (peer,) = [x for x in pairs if (x["policy"], x["correction"]) == PEER]
    assert peer["difference"] == 0.25
    low, high = bootstrap([(1, 1), (1, 1), (0, 1), (-1, 1)])
    assert (peer["low"], peer["high"]) == (low, high)


def test_page_says_where_the_default_loses_and_where_there_is_no_signal(folder: Path):
    page = write_report([folder], folder / "report")
    text = page.with_suffix(".md").read_text()
    assert "Needles: in none of the 1 cells" in text
    assert "KL: no other method that was measured has a smaller one." in text
    assert "No signal: the full cache finds 0 % in 100 tokens (n = 4)." in text.replace(SPACE, " ")
    assert "| single | 100 | unseen | 64 | balanced, none, by heads | 4 | +25 (+0 to +75) |" in text
    assert "`momentkv x`" in text
    written(folder / "needles.json", needle_rows({("full cache", ""): [1] * 4, OURS: [0, 0, 1, 0], PEER: [1, 1, 1, 1]}))
    write_report([folder], folder / "report")
    assert (
        "| single | 100 | unseen | 64 | snapkv, none | 4 | -75 (-100 to -25) |" in page.with_suffix(".md").read_text()
    )


def test_plots_show_what_was_measured(folder: Path):
    summary = gather(results_in([folder]))
    (axis,) = plot_found(summary["needles"]).axes  # the task without signal has no panel
    assert axis.get_title() == "single, 100 tokens,\nunseen, n = 4"
    drawn = {line.get_label(): line[0].get_ydata() for line in axis.containers}
    assert {name: float(y[0]) for name, y in drawn.items()} == {
        "default (balanced, summaries, by heads)": 0.5, "snapkv, none": 0.25, "balanced, none, by heads": 0.25,
    }  # fmt: skip
    assert [float(line.get_ydata()[0]) for line in plot_kl(summary["fidelity"]).axes[0].lines] == [
        pytest.approx(0.2),
        pytest.approx(0.4),
    ]
    panels = plot_depths(summary["depths"]).axes
    assert [text.get_text() for text in panels[0].texts] == ["100", "100", "0", "0"]


def test_html_needs_nothing_else(folder: Path):
    page = write_report([folder], folder / "report").read_text()
    assert page.count("data:image/svg+xml") == 4
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "$" not in page


def test_a_summary_gives_the_same_page(folder: Path):
    first = write_report([folder], folder / "report")
    again = write_report([folder / "report" / "summary.json"], folder / "again")
    for name in ("report.md", "report.html", "report-found.svg"):
        assert (first.parent / name).read_bytes() == (again.parent / name).read_bytes()


@pytest.mark.parametrize("name", ["needles", "fidelity", "gap"])
def test_a_part_alone_is_a_page(folder: Path, name: str):
    text = write_report([folder / f"{name}.json"], folder / "report").with_suffix(".md").read_text()
    headings = {"needles": "## Needles", "fidelity": "## Fidelity", "gap": "## Directional gap"}
    assert [heading for heading in headings.values() if heading in text] == [headings[name]]


def test_nothing_to_report_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "report", str(tmp_path / "missing")]) == 1
    assert "which does not exist; name files or folders" in capsys.readouterr().err
    assert main(["evaluate", "report", str(tmp_path)]) == 1
    assert "which hold no JSON; measure something first" in capsys.readouterr().err


def test_the_default_is_the_default_of_the_cache():
    cache = MomentCache(build(FAMILIES["llama"]()), 64)
    defaults = {name: x.default for name, x in inspect.signature(MomentCache).parameters.items()}
    assert (DEFAULT.policy, DEFAULT.sharing) == (defaults["policy"], cache.sharing)
    assert (DEFAULT.kind, DEFAULT.order) == (defaults["correction"], defaults["order"])


@pytest.mark.parametrize("measurement", PLAN, ids=lambda x: x.name)
def test_every_measurement_is_a_command(measurement: Any):
    parser = build_parser()
    for words in (measurement.arguments, measurement.smoke):
        parser.parse_args(["evaluate", *words.split(), "--output", "x"])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(path)
    build(FAMILIES["llama"](vocab_size=len(tokenizer))).save_pretrained(path)
    return str(path)


def test_the_whole_suite_runs_resumes_and_reports(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    started: list[str] = []
    in_a_process = module.start

    def start(command: list[str], log: Path) -> Any:
        """One measurement starts its process; the others run in this one, which has imported everything already."""
        started.append(log.stem)
        if log.stem in ("gap", *own_process):
            return in_a_process(command, log)
        with (
            log.open("w", encoding="utf-8") as file,
            redirect_stdout(file),
            redirect_stderr(file),
        ):
            code = main(command)
        return SimpleNamespace(poll=lambda: code, returncode=code)

    monkeypatch.setattr(module, "start", start)
    folder, own_process = tmp_path / "suite", []
    command = ["evaluate", "suite", "--smoke", "--model", tiny, "--output", str(folder)]
    assert main(command) == 0, capsys.readouterr().out
    assert sorted(started) == sorted(x.name for x in PLAN)
    assert {path.stem for path in folder.glob("*.json")} == {x.name for x in PLAN}
    assert all(read_json(path)["complete"] for path in folder.glob("*.json"))
    summary = read_json(folder / "report" / "summary.json")
    assert not summary["left_out"]
    assert {x["kind"] for x in summary["sources"]} == {"needles", "fidelity", "gap"}
    # Complete measurements are not run again; one of another version is, and is refused with what to do.
    started.clear()
    assert main(command) == 0
    assert not started
    path = folder / "single-1000.json"
    content = read_json(path)
    write_json(path, content | {"protocol": content["protocol"] | {"momentkv": "other"}})
    capsys.readouterr()
    own_process.append("single-1000")
    assert main(command) == 1
    assert started == own_process
    out = " ".join(capsys.readouterr().out.split())
    assert "single-1000: momentkv evaluate needles" in out
    assert "results of another protocol" in out


def test_a_file_is_complete_for_its_command_alone(tmp_path: Path):
    path = written(tmp_path / "x.json", [], complete=True, command="momentkv a b")
    content = read_json(path)
    assert not complete(path, ["a", "b"])  # another version
    content["protocol"]["momentkv"] = module.__version__
    write_json(path, content)
    assert complete(path, ["a", "b"])
    assert not complete(path, ["a", "c"])
    write_json(path, content | {"complete": False})
    assert not complete(path, ["a", "b"])
    path.write_text(json.dumps(content)[:-5])
    assert not complete(path, ["a", "b"])
    assert not complete(tmp_path / "missing.json", ["a", "b"])


def test_the_suite_says_how_its_measurements_count(tmp_path: Path):
    options = build_parser().parse_args(["evaluate", "suite", "--bytes", "32"])
    for measurement in PLAN:
        words = module.command_of(measurement, tmp_path, options)
        if words[1] in ("needles", "fidelity"):
            assert build_parser().parse_args(words).bytes == 32
        else:
            build_parser().parse_args(words)


def test_suite_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "suite", "--only", "magic", "--output", str(tmp_path)]) == 1
    assert "only has 'magic'; use some of single-4000" in capsys.readouterr().err
    assert main(["evaluate", "suite", "--workers", "0", "--output", str(tmp_path)]) == 1
    assert "workers is 0" in capsys.readouterr().err


def test_the_committed_page_is_that_of_the_committed_results(tmp_path: Path):
    """`docs/results.md` shows what `momentkv evaluate report docs/data/evaluation/summary.json` writes."""
    source = tmp_path / "summary.json"
    shutil.copy(ROOT / "docs" / "data" / "evaluation" / "summary.json", source)
    summary = read_json(source)
    images = {x: f"assets/report-{x}.svg" for x in ("found", "depths", "kl", "gap") if f"report-{x}" in page_text()}
    made = markdown_of(summary, images).partition("\n")[2]
    # The page has each plot twice, for light and for dark.
    dark = re.compile(r"\n!\[.*\]\((.*-dark\.svg)#only-dark\)")
    assert made.strip() in dark.sub("", page_text()).replace("-light.svg#only-light", ".svg")
    assert len(dark.findall(page_text())) == len(images) == 4
    for name in dark.findall(page_text()):
        assert (ROOT / "docs" / name).is_file()
        assert (ROOT / "docs" / name.replace("-dark", "-light")).is_file()


def page_text() -> str:
    return (ROOT / "docs" / "results.md").read_text()

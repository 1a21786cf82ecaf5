"""The report: what is gathered, what its page says, and that the committed page is the one of the committed results."""

from __future__ import annotations

import inspect
import json
import re
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
from models import FAMILIES, build
from test_needles import byte_tokenizer

from momentkv.cli import build_parser, main
from momentkv.evaluation import suite as module
from momentkv.evaluation.gather import gather, records, results_in
from momentkv.evaluation.intervals import bootstrap
from momentkv.evaluation.lines import BANDS
from momentkv.evaluation.report import read_json, write_json
from momentkv.evaluation.report_page import SPACE, markdown_of, number, write_report
from momentkv.evaluation.report_plots import GROUNDS, figures_of, slug
from momentkv.evaluation.settings import DEFAULT
from momentkv.evaluation.split import role_of
from momentkv.evaluation.suite import PLAN, complete
from momentkv.hf import MomentCache

ROOT = Path(__file__).parents[1]
FULL, OURS, PEER, PLAIN = "full cache", "default", "snapkv/none", "balanced/none-heads"


def needle_rows(found: dict[str, list[float]], task: str = "single") -> list[dict[str, Any]]:
    """Of each method the values found in each haystack."""
    common = {"layout": "x", "task": task, "value": "number", "index": 0, "length": 100, "tokens": 0.5, "nll": 1.0}
    rows = []
    for method, shares in found.items():
        size, named = (None, "") if method == FULL else (64, "unseen")
        for at, share in enumerate(shares):
            rows.append(
                common
                | {"haystack": str(at), "depth": at / len(shares), "question": named, "method": method}
                | {"policy": method, "correction": "", "budget": size, "bytes_as_tokens": size}
                | {"generated": None, "nbytes": 1, "values": share}
            )
    return rows


def written(path: Path, rows: list[dict[str, Any]], bits: int | None = 16, **more: Any) -> Path:
    protocol = {"model": "m", "seed": 7, "momentkv": "0", "unseen": "the question afterwards", "haystack": "made up"}
    if bits is not None:  # results of before there was a choice have none
        protocol["bytes"] = bits
    return write_json(path, {"command": "momentkv x", "protocol": protocol, "environment": {}, "rows": rows, **more})


def fidelity_rows(texts: tuple[str, str] = ("news.txt", "xquad.txt")) -> list[dict[str, Any]]:
    return [
        {"text": text, "method": method, "policy": "p", "correction": "c", "budget": 60, "bytes_as_tokens": 64}
        | {"nbytes": 1, "kl": kl * scale, "top1": 0.5, "nll_change": 0.1, "head_error": 0.2}
        for text, scale in zip(texts, (1, 3), strict=True)
        for method, kl in ((OURS, 0.1), (PEER, 0.2))
    ]


def page_of(folder: Path) -> str:
    """Without plots."""
    return markdown_of(gather(results_in([folder])), {})


def gap() -> dict[str, Any]:
    fields = ("evicted_mass", "cosine", "plain", "corrected")
    return {
        "momentkv": "0", "model": "m", "text": "t", "policy": "snapkv", "budget": 64, "correction": "order 1",
        "layers": [0, 1],
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
    found = {FULL: [1.0] * 4, OURS: [1, 1, 0, 0], PEER: [0, 0, 0, 1], PLAIN: [1.0, 0, 0, 0]}
    written(tmp_path / "needles.json", needle_rows(found))
    hard = {FULL: [0.0] * 4, OURS: [0.0] * 4, PEER: [1.0] * 4}
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
    ours = next(x for x in summary["needles"] if (x["method"], x["task"]) == (OURS, "single"))
    low, high = bootstrap([1, 1, 0, 0])
    assert (ours["share"], ours["low"], ours["high"], ours["n"], ours["signal"]) == (0.5, low, high, 4, True)
    bands = {x["band"]: x["share"] for x in summary["depths"] if (x["method"], x["task"]) == (PEER, "single")}
    assert bands == {int(at / 4 * BANDS): share for at, share in enumerate((0, 0, 0, 1))}
    (kl,) = [x for x in summary["fidelity"] if x["method"] == PEER]
    assert kl["kl"] == pytest.approx(0.4)
    assert (kl["low"], kl["high"], kl["texts"]) == (pytest.approx(0.2), pytest.approx(0.6), 2)
    assert summary["gap"][0]["by_layer"]["plain"] == [0.2, 0.3]
    assert (
        summary["lm_eval"][0] | {"task": "niah_single_1", "metric": "4096", "value": 0.75, "n": 40}
        == (summary["lm_eval"][0])
    )


def test_answers_to_tasks_are_on_the_page(tmp_path: Path):
    answers = {FULL: (1.0, 1.0, 0.0), OURS: (1.0, 0.0, 0.0), PEER: (0.0, 0.0, 0.0)}
    rows = [
        {"task": task, "document": at, "method": method, "budget": None, "metrics": {"score,none": value * right}}
        | {"bytes_as_tokens": None if method == FULL else 64}
        for task, right in (("easy", 1), ("hard", 0))
        for method, values in answers.items()
        for at, value in enumerate(values)
    ]
    write_json(
        tmp_path / "tasks.json",
        {"protocol": {"model": "m", "bytes": 16, "momentkv": "0", "question": "unseen: afterwards"}, "rows": rows},
    )
    summary = gather(results_in([tmp_path]))
    (ours,) = [x for x in summary["tasks"] if (x["task"], x["method"]) == ("easy", OURS)]
    assert (ours["value"], ours["n"], ours["signal"], ours["model"]) == (pytest.approx(1 / 3, abs=1e-5), 3, True, "m")
    text = page_of(tmp_path).replace(SPACE, " ")
    assert re.search(r"\| easy \| unseen \| full cache \| 3 \| 0\.67 .*\|\n\|  \|  \| `default` \| 3 \| 0\.33 ", text)
    assert "| hard | unseen | full cache | 3 | no signal (0.00" in text
    del summary["tasks"]
    assert "easy" not in markdown_of(summary, {})


def test_an_average_is_of_the_tasks_of_all_files(tmp_path: Path):
    """That of one file stood among methods of the other; and a method that answered one task had a mean of it."""
    for name, values in {"one": {FULL: 1.0, OURS: 1.0, PEER: 1.0}, "two": {FULL: 1.0, OURS: 0.0}}.items():
        rows = [
            {"task": name, "document": 0, "method": method, "metrics": {"score": value}}
            | {"bytes_as_tokens": None if method == FULL else 64}
            for method, value in values.items()
        ]
        protocol = {"model": "m", "bytes": 16, "momentkv": "0", "question": "unseen: afterwards"}
        write_json(tmp_path / f"{name}.json", {"protocol": protocol, "rows": rows})
    write_json(tmp_path / "again.json", {"protocol": protocol, "rows": rows})
    found = {(x["task"], x["method"]): (x["value"], x["n"]) for x in gather(results_in([tmp_path]))["tasks"]}
    assert found["average", FULL] == (1.0, 2)
    assert found["average", OURS] == (0.5, 2)
    assert found["two", OURS] == (0.0, 1)
    assert ("average", PEER) not in found


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
    assert said in page_of(tmp_path)


@pytest.mark.parametrize("other", [32, None])
def test_bytes_of_different_tokens_are_not_put_together(
    other: int | None, folder: Path, capsys: pytest.CaptureFixture[str]
):
    written(folder / "fidelity.json", fidelity_rows(), other)
    assert main(["evaluate", "report", str(folder), "--output", str(folder / "report")]) == 1
    err = capsys.readouterr().err
    assert "results count bytes in 16-bit tokens (hard.json, needles.json) and in " in err
    assert "(fidelity.json); report them apart" in err


def test_other_tokens_of_one_text_are_not_put_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """As far as files say what they read: those of before do not."""
    said = {"news.txt": {"nll": 1.0, "ids_sha256": "a"}, "xquad.txt": {"nll": 1.0, "ids_sha256": "b"}}
    written(tmp_path / "peers.json", fidelity_rows(), texts=said)
    written(tmp_path / "before.json", fidelity_rows())
    content = read_json(written(tmp_path / "ours.json", fidelity_rows()))
    content["protocol"]["ids_sha256"] = {"news.txt": "a", "xquad.txt": "b"}
    command = ["evaluate", "report", str(tmp_path), "--output", str(tmp_path / "report")]
    for digest, alike in (("b", True), ("c", False)):
        content["protocol"]["ids_sha256"]["xquad.txt"] = digest
        write_json(tmp_path / "ours.json", content)
        assert main(command) == (0 if alike else 1)
        err = capsys.readouterr().err
        assert ("ours.json and peers.json read other tokens of xquad.txt" in err) is not alike


def test_needles_in_other_haystacks_of_one_name_are_not_put_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    content = read_json(written(tmp_path / "first.json", needle_rows({FULL: [1, 1, 1, 1], OURS: [1, 1, 0, 1]})))
    for digest, alike in (("a", True), ("b", False)):
        for name, said in (("first", "a"), ("second", digest)):
            content["protocol"]["text_sha256"] = {"own.txt": said}
            write_json(tmp_path / f"{name}.json", content)
        assert main(["evaluate", "report", str(tmp_path), "--output", str(tmp_path / "report")]) == (not alike)
        err = capsys.readouterr().err
        assert ("first.json and second.json read other tokens of own.txt" in err) is not alike


DECODED = "after one-shot prefill, and {} tokens at a time while the following ones are teacher-forced one by one"


@pytest.mark.parametrize(
    ("kind", "first", "second", "said"),
    [
        ("fidelity", {"context": 4096}, {"context": 1000}, "context is 4096 in one and 1000 in the other"),
        ("fidelity", {"following": 256}, {"following": 64}, "following is 256 in one and 64 in the other"),
        ("fidelity", {}, {"skip": 9}, "skip is 0 in one and 9 in the other"),
        ("fidelity", {"window": 32}, {"window": 8}, "window is 32 in one and 8 in the other"),
        (
            "decoding",
            {"compressed": DECODED.format(32)},
            {"compressed": DECODED.format(8)},
            "decode is 32 in one and 8",
        ),
        ("needles", {}, {"seed": 1}, "seed is 7 in one and 1 in the other"),
        ("needles", {}, {"haystack": "own.txt"}, None),  # of another part, whose tables are others
        ("needles", {"haystack": "my.txt"}, {"haystack": "own.txt"}, "haystack is 'my.txt' in one and 'own.txt' in"),
        ("needles", {}, {"model": "another", "seed": 1}, None),
        ("fidelity", {"context": 4096}, {"model": "another", "context": 1000}, None),
        ("fidelity", {"context": 4096}, {}, None),  # which does not say
    ],
)
def test_what_was_measured_otherwise_is_not_put_together(
    kind: str,
    first: dict[str, Any],
    second: dict[str, Any],
    said: str | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    rows = needle_rows({FULL: [1.0], OURS: [1.0]}) if kind == "needles" else fidelity_rows()
    rows = [row | {"kl_of_quarters": [0.1] * 4} for row in rows] if kind == "decoding" else rows
    for name, more in (("a", first), ("b", second)):
        content = read_json(written(tmp_path / f"{name}.json", rows))
        write_json(tmp_path / f"{name}.json", content | {"protocol": content["protocol"] | more})
    assert main(["evaluate", "report", str(tmp_path), "--output", str(tmp_path / "report")]) == (said is not None)
    err = capsys.readouterr().err
    assert said is None or f"a.json and {tmp_path / 'b.json'} were measured otherwise: {said}" in err


def test_other_numbers_of_keys_and_documents_are_not_put_together(tmp_path: Path):
    rows = needle_rows({FULL: [1.0], OURS: [1.0]}, task="multi-key")
    for keys in (4, 8):
        written(tmp_path / f"{keys}.json", [row | {"layout": f"{keys} keys, 1 values"} for row in rows])
    with pytest.raises(ValueError, match=r"4\.json and .*8\.json .* layout is '4 keys, 1 values' in one and '8 keys"):
        gather(results_in([tmp_path]))
    answer = {"task": "easy", "document": 0, "method": FULL, "bytes_as_tokens": None, "metrics": {"score": 1.0}}
    for limit in (1, 2):
        protocol = {"model": "m", "bytes": 16, "question": "seen", "limit": limit}
        write_json(tmp_path / "tasks" / f"{limit}.json", {"protocol": protocol, "rows": [answer]})
    with pytest.raises(ValueError, match=r"limit is 1 in one and 2 in the other"):
        gather(results_in([tmp_path / "tasks"]))


def test_differences_are_paired_by_question(folder: Path):
    pairs = gather(results_in([folder]))["pairs"]
    assert {x["task"] for x in pairs} == {"single"}  # what has no signal is not compared
    (peer,) = [x for x in pairs if x["other"] == PEER]
    assert (peer["method"], peer["difference"]) == (OURS, 0.25)
    assert (peer["low"], peer["high"]) == bootstrap([1, 1, 0, -1])


def test_page_says_where_ours_lose_and_where_there_is_no_signal(folder: Path):
    text = page_of(folder).replace(SPACE, " ")
    assert "- **m**, KL: in 0 of 1 comparisons of one of ours with another the other has less." in text
    assert "Where another method has less KL" not in text
    assert "in 0 of 2 comparisons of one of ours with another the other finds more, in 0 of them beyond chance" in text
    assert "| 100 |  | full cache | 4 | no signal (0 %) |" in text
    assert "`momentkv x`" in text
    written(folder / "needles.json", needle_rows({FULL: [1] * 8, OURS: [0, 0, 1, 0] * 2, PEER: [1] * 8}))
    rows = fidelity_rows()
    written(folder / "fidelity.json", [row | {"kl": 0.5 if row["method"] == OURS else row["kl"]} for row in rows])
    text = page_of(folder).replace(SPACE, " ")
    assert "- **m**, KL: in 1 of 1 comparisons of one of ours with another the other has less." in text
    assert (
        "| model | ours | other | 64 |\n|---|---|---|---:|\n| m | `default` | `snapkv/none` | 0.500 / 0.400 |" in text
    )
    assert "| m | single | 100 | unseen | 64 | `default` | `snapkv/none` | 8 | -75 (-100 to -50) |" in text
    assert text.index("## What speaks against us") < text.index("## At a glance") < text.index("## m {")


def test_the_first_tables_are_of_texts_that_chose_nothing_alone(folder: Path):
    """A text that chose something is marked, and no number of it stands above the models' own sections."""
    written(folder / "fidelity.json", fidelity_rows(), command="momentkv kept")
    wrong = [row | {"kl": 7.0 + row["kl"]} for row in fidelity_rows(("types", "mine.txt"))]
    written(folder / "wrong.json", wrong)
    chose = {"part": "choosing", "chose": ["the default"]}
    written(folder / "renamed.json", [row | {"text": "xquad.txt"} for row in wrong[:2]], roles={"xquad.txt": chose})
    summary = gather(results_in([folder]))
    assert {(x["part"], x["texts"]) for x in summary["fidelity"]} == {
        ("reporting", 2), ("choosing", 2), ("unnamed", 1),
    }  # fmt: skip
    text = markdown_of(summary, {})
    first, below = text[: text.index("## m {")], text[text.index("## m {") :]
    assert "**m**: KL, less is better\n\n| bytes | 64 |\n|---|---:|\n| best selection | 0.400 |" in first
    assert "| `default` | **0.200** |" in first
    assert "7." not in first.replace("0.7", "")
    assert "KL on texts that chose nothing (2)" in below
    assert "KL **on texts that chose the default or parts of it** (2)" in below
    assert "KL on texts that texts.toml does not name (1)" in below
    chose = "twelve summaries of rank 2; one round of the policy momentkv; how many bits are best"
    assert f"| `types` | choosing | {chose} |" in below
    (folder / "fidelity.json").unlink()
    (folder / "needles.json").unlink()
    (folder / "hard.json").unlink()
    text = page_of(folder)
    assert "**Nothing here is of a text that is kept for reporting**" in text
    assert "At a glance" not in text


def test_two_models_are_one_page_with_a_section_each(folder: Path):
    protocol = {"model": "some/where/other.gguf", "haystack": "made up", "bytes": 16}
    command = "momentkv x --model /some/where/other.gguf --output /some/place"
    content = {"command": command, "protocol": protocol, "environment": {}, "rows": fidelity_rows()}
    write_json(folder / "second" / "fidelity.json", content)
    text = page_of(folder)
    assert "## m { #report-m }" in text
    assert "## other { #report-other }" in text
    assert "**other**: KL, less is better\n\n| bytes | 64 |\n|---|---:|\n| best selection | 0.400 |" in text
    assert "`momentkv x --model other.gguf`" in text  # places say nothing about a result
    assert "/some" not in text + json.dumps(gather(results_in([folder])))


def test_plots_show_what_was_measured(folder: Path):
    drawn = {name: figure for _, name, figure in figures_of(gather(results_in([folder])), 16)}
    (axis,) = drawn["found"].axes  # the task without signal has no panel
    assert axis.get_title() == "single, 100 tokens,\nunseen, n = 4"
    shares = {line.get_label(): float(line[0].get_ydata()[0]) for line in axis.containers}
    assert shares == {OURS: 0.5, PEER: 0.25, PLAIN: 0.25}
    kls = [float(line[0].get_ydata()[0]) for line in drawn["kl"].axes[0].containers]
    assert kls == [pytest.approx(0.2), pytest.approx(0.4)]
    texts = drawn["depths"].axes[0].texts
    assert [text.get_text() for text in texts] == ["100", "100", "0", "0"]
    # Both ends of the colours are dark.
    assert {text.get_color() for text in texts} == {"white"}


def test_html_needs_nothing_else(folder: Path):
    page = write_report([folder], folder / "report").read_text()
    assert page.count("data:image/svg+xml") == 8  # for light and for dark
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "$" not in page.partition("<body>")[2]


def test_a_summary_gives_the_same_page(folder: Path):
    first = write_report([folder], folder / "report")
    again = write_report([folder / "report" / "summary.json"], folder / "again")
    for name in ("report.md", "report.html", "report-found-m-light.svg"):
        assert (first.parent / name).read_bytes() == (again.parent / name).read_bytes()


def test_a_summary_that_does_not_say_what_is_certain_is_refused(folder: Path, tmp_path: Path):
    write_report([folder], tmp_path / "report")
    path = tmp_path / "report" / "summary.json"
    summary = read_json(path)
    for pair in summary["pairs"]:
        del pair["certain"]
    write_json(path, summary | {"momentkv": "0.1.0"})
    with pytest.raises(ValueError, match=r"summary\.json', a summary by momentkv 0\.1\.0, which does not say"):
        write_report([path], tmp_path / "again")


@pytest.mark.parametrize("name", ["needles", "fidelity", "gap"])
def test_a_part_alone_is_a_page(folder: Path, name: str):
    text = page_of(folder / f"{name}.json")
    headings = {"needles": "### Needles", "fidelity": "### KL", "gap": "### Directional gap"}
    assert [heading for heading in headings.values() if heading in text] == [headings[name]]


@pytest.mark.parametrize("place", ["lm", "."], ids=["the same folder", "its parent"])
def test_a_report_may_be_where_its_results_are(place: str, folder: Path):
    for _ in range(2):  # the second finds the files of the first, which are no results
        write_report([folder / "lm"], folder / place)
    summary = read_json(folder / place / "summary.json")
    assert summary["lm_eval"]
    assert not summary["left_out"]


def test_nothing_to_report_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "report", str(tmp_path / "missing")]) == 1
    assert "which does not exist; name files or folders" in capsys.readouterr().err
    assert main(["evaluate", "report", str(tmp_path)]) == 1
    assert "which hold no JSON; measure something first" in capsys.readouterr().err
    write_json(tmp_path / "other.json", {"a": 1})
    assert main(["evaluate", "report", str(tmp_path), "--output", str(tmp_path / "page")]) == 1
    assert "results are other.json, which hold none; name what momentkv evaluate wrote" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()


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
    folder, own_process = tmp_path / "suite" / "smoke" / Path(tiny).name, []
    command = ["evaluate", "suite", "--smoke", "--model", tiny, "--output", str(tmp_path / "suite")]
    assert main(command) == 0, capsys.readouterr().out
    assert sorted(started) == sorted(x.name for x in PLAN)
    assert {path.stem for path in folder.glob("*.json")} == {x.name for x in PLAN}
    assert all(read_json(path)["complete"] for path in folder.glob("*.json"))
    summary = read_json(folder.parent / "report" / "summary.json")
    assert not summary["left_out"]
    assert {x["kind"] for x in summary["sources"]} == {"needles", "fidelity", "decoding", "gap"}
    assert {role["part"] for role in summary["texts"].values()} == {"reporting"}
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
    assert f"{folder.name}/single-1000: momentkv evaluate needles" in out
    assert "results of another protocol" in out


def test_a_file_is_complete_for_its_command_alone(tmp_path: Path):
    path = written(tmp_path / "x.json", [], complete=True, command="momentkv a b")
    content = read_json(path)
    assert not complete(path, ["a", "b"])  # another version
    content["protocol"]["momentkv"] = module.code_version()
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
        words = module.command_of(measurement, tmp_path, "m", options)
        if words[1] in ("needles", "fidelity"):
            assert build_parser().parse_args(words).bytes == 32
        else:
            build_parser().parse_args(words)


def test_suite_refuses_what_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "suite", "--only", "magic", "--output", str(tmp_path)]) == 1
    assert "only has 'magic'; use some of single-2000, several-2000" in capsys.readouterr().err
    assert main(["evaluate", "suite", "--workers", "0", "--output", str(tmp_path)]) == 1
    assert "workers is 0" in capsys.readouterr().err


def test_a_short_run_of_the_suite_leaves_no_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They would be in the place of a whole run's, and rows of both in one report."""

    def measure(commands: dict[str, list[str]], *_: Any) -> dict[str, str]:
        for command in commands.values():
            written(Path(command[-1]), fidelity_rows())
        return {}

    monkeypatch.setattr(module, "run_all", measure)
    suite = ["evaluate", "suite", "--model", "A/x", "--output", str(tmp_path)]
    assert main([*suite, "--smoke", "--only", "fidelity-more"]) == 0
    assert (tmp_path / "smoke" / "report" / "report.html").is_file()
    assert main([*suite, "--only", "fidelity"]) == 0
    assert [x["file"] for x in read_json(tmp_path / "report" / "summary.json")["sources"]] == ["fidelity.json"]
    assert [x.stem for x in results_in([tmp_path / "smoke" / "x"])] == ["fidelity-more"]


@pytest.mark.parametrize(
    ("models", "message"),
    [
        (["A/x", "B/x"], "model has 'A/x' and 'B/x', whose results would be in one folder, 'x'"),
        (["A/x", "B/x.gguf"], "model has 'A/x' and 'B/x.gguf', whose results would be in one folder, 'x'"),
        (["."], "model has '.', which gives its folder of results no name"),
        ([".."], "model has '..', which gives"),
        (["A/report"], "model has 'A/report', which gives"),
    ],
)
def test_the_suite_refuses_models_of_one_name(
    models: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(module, "run_all", lambda *_: pytest.fail("something was measured"))
    assert main(["evaluate", "suite", "--model", *models, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_suite_reads_texts_that_chose_nothing():
    parser = build_parser()
    for measurement in PLAN:
        for words in (measurement.arguments, measurement.smoke):
            options = parser.parse_args(["evaluate", *words.split()])
            named = options.haystack or "made up" if options.run.__name__ == "needles" else None
            texts = [options.text] if isinstance(getattr(options, "text", None), str) else getattr(options, "text", [])
            for text in [*texts, *([] if named is None else [named])]:
                assert role_of(text).part == "reporting", (measurement.name, text)


def test_a_number_is_rounded_once():
    line = json.loads(json.dumps(records(pd.DataFrame({"kl": [0.02449687]}))))[0]
    assert number(line["kl"]) == number(0.02449687) == "0.024"
    assert number(round(line["kl"], 5)) == "0.025"  # what a page showed whose numbers had been rounded before


def test_the_committed_page_is_that_of_the_committed_results():
    """`docs/results.md` shows what `momentkv evaluate report docs/data/evaluation/summary.json` writes."""
    summary = read_json(ROOT / "docs" / "data" / "evaluation" / "summary.json")
    page = (ROOT / "docs" / "results.md").read_text()
    pictures: dict[str, dict[str, str]] = {}
    for model in {x["model"] for x in summary["sources"]}:
        for name in ("kl", "decoding", "found", "depths", "gap"):
            stem = f"report-{name}-{slug(model)}"
            if stem in page:
                pictures.setdefault(model, {})[name] = stem
                assert all((ROOT / "docs" / "assets" / f"{stem}-{ground}.svg").is_file() for ground in GROUNDS)
    assert pictures
    assert markdown_of(summary, pictures, "assets/").partition("\n")[2].strip() in page


def test_the_committed_results_are_of_the_committed_files_and_of_texts_that_chose_nothing():
    data = ROOT / "docs" / "data"
    summary = read_json(data / "evaluation" / "summary.json")
    files = [data / source["file"] for source in summary["sources"]]
    assert json.loads(json.dumps(gather(results_in(files)))) == summary
    roles = [role for file in files for role in read_json(file).get("roles", {}).values()]
    assert len(roles) > 12
    assert all(role["part"] == "reporting" and not role["chose"] for role in roles)

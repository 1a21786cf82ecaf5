"""What a report puts beside each other: the same questions, one code, one model; and what it calls certain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_report import FULL, OURS, PEER, fidelity_rows, needle_rows, page_of, written

from momentkv.evaluation.gather import gather, results_in
from momentkv.evaluation.lines import depth_lines, needle_lines, needles_of
from momentkv.evaluation.report import write_json
from momentkv.evaluation.report_page import SPACE


def test_needles_are_compared_on_the_questions_that_all_methods_of_a_budget_were_asked():
    """The share of a run that was interrupted is of other haystacks."""
    rows = needle_rows({FULL: [1.0] * 4, OURS: [1, 1, 0, 0], PEER: [1, 0]})
    asked = needles_of(rows)
    lines = needle_lines(asked).set_index("method")
    assert dict(lines["share"]) == {FULL: 1, OURS: 1, PEER: 0.5}
    assert dict(lines["n"]) == {FULL: 4, OURS: 2, PEER: 2}
    assert depth_lines(asked[asked["bytes"] > 0])["n"].sum() == 4
    larger = [row | {"bytes_as_tokens": 128} for row in rows if row["method"] == OURS]
    lines = needle_lines(needles_of(rows + larger)).set_index(["method", "bytes"])
    assert lines.loc[(OURS, 128), "n"] == 4  # nothing stands beside it


def test_a_row_says_of_how_many_questions_its_budgets_are(tmp_path: Path):
    rows = needle_rows({FULL: [1.0] * 4, OURS: [1, 1, 0, 0], PEER: [1, 0]})
    more = [row | {"bytes_as_tokens": 128} for row in rows if row["method"] == OURS]
    written(tmp_path / "needles.json", rows + more)
    assert "|  | unseen | `default` | 2\u2060–\u20604 | " in page_of(tmp_path)


def other_numbers(kind: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], str]:
    """Rows, the same measured again with another number, and what is said of it."""
    if kind == "needles":
        rows = needle_rows({FULL: [1.0], OURS: [1.0]})
        return rows, needle_rows({FULL: [1.0], OURS: [0.0]}), "values 1 and 0;"
    if kind == "tasks":
        rows = [
            {"task": "one", "document": 0, "method": method, "metrics": {"score": 1.0}, "bytes_as_tokens": size}
            for method, size in ((FULL, None), (OURS, 64))
        ]
        return rows, [row | {"metrics": {"score": 0.5}} for row in rows], "value 1 and 0.5;"
    rows = fidelity_rows()
    return rows, [row | {"kl": 2 * row["kl"]} for row in rows], "kl 0.1 and 0.2;"


@pytest.mark.parametrize("kind", ["needles", "fidelity", "tasks"])
def test_other_numbers_of_one_cell_are_not_put_together(kind: str, tmp_path: Path):
    """Two versions of the code: the first file's numbers stood, and nothing said so."""
    rows, again, said = other_numbers(kind)
    question = {"protocol": {"model": "m", "bytes": 16, "question": "unseen: x"}} if kind == "tasks" else {}
    for name, some in (("a", rows), ("b", again)):
        written(tmp_path / f"{name}.json", some)
        if question:
            write_json(tmp_path / f"{name}.json", {"rows": some} | question)
    with pytest.raises(ValueError, match=rf"a.json and .*b.json have other numbers of the same .*{said}"):
        gather(results_in([tmp_path]))
    written(tmp_path / "b.json", [row | {"kl": row.get("kl", 0) * (1 + 1e-6)} for row in rows])
    if question:
        write_json(tmp_path / "b.json", {"rows": rows} | question)
    once = gather(results_in([tmp_path]))[kind]  # rounding, or the same rows
    (tmp_path / "b.json").unlink()
    assert gather(results_in([tmp_path]))[kind] == once


def test_the_page_says_which_code_measured_what(tmp_path: Path):
    for name, version, texts in (("old", "0.1.0", ("news.txt", "xquad.txt")), ("new", "0.2.0", ("a", "b"))):
        written(tmp_path / f"{name}.json", fidelity_rows(texts))
        protocol = {"model": "m", "bytes": 16, "momentkv": version}
        write_json(tmp_path / f"{name}.json", {"protocol": protocol, "command": "x", "rows": fidelity_rows(texts)})
    text = page_of(tmp_path)
    assert "Measurements of m, by momentkv 0.1.0, 0.2.0 (" in text
    assert "| old.json, m | `x` | momentkv 0.1.0 |" in text


def test_models_in_different_places_of_one_name_are_not_put_together(tmp_path: Path):
    for name, model in (("a", "mine/tiny"), ("b", "yours/tiny")):
        write_json(tmp_path / f"{name}.json", {"protocol": {"model": model, "bytes": 16}, "rows": fidelity_rows()})
    with pytest.raises(ValueError, match=r"a.json and b.json are of the models 'mine/tiny' and 'yours/tiny'"):
        gather(results_in([tmp_path]))
    write_json(tmp_path / "b.json", {"protocol": {"model": "./mine/tiny/", "bytes": 16}, "rows": fidelity_rows()})
    assert {x["model"] for x in gather(results_in([tmp_path]))["sources"]} == {"tiny"}


@pytest.mark.parametrize(("haystacks", "sure"), [(1, 0), (5, 0), (6, 1)])
def test_few_haystacks_are_not_beyond_chance(haystacks: int, sure: int, tmp_path: Path):
    """All of them may say the same: of five, one time in sixteen without any difference."""
    found = {FULL: [1.0] * haystacks, OURS: [0.0] * haystacks, PEER: [1.0] * haystacks}
    written(tmp_path / "needles.json", needle_rows(found))
    (pair,) = gather(results_in([tmp_path]))["pairs"]
    assert pair["certain"] == -sure
    assert f"in 1 of 1 comparisons of one of ours with another the other finds more, in {sure} of" in page_of(tmp_path)


def test_the_first_table_knows_who_reads_twice_and_who_shares(tmp_path: Path):
    """By the end of a name a second reading was a plain selection, and budgets by heads were nothing."""
    methods = {"snapkv/none-heads": 0.3, "twice/none": 0.2, "second-reading/none": 0.1, "snapkv/summaries": 0.05}
    rows = [row for row in fidelity_rows() if row["method"] == OURS]
    rows += [row | {"method": name, "policy": name, "kl": kl} for row in rows for name, kl in methods.items()]
    written(tmp_path / "fidelity.json", rows)
    text = page_of(tmp_path).replace(SPACE, " ")
    assert "| best selection | 0.300 |" in text
    assert "| best of others that round or read twice | **0.100** |" in text

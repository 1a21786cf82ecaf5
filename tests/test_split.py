"""Texts that chose something and texts kept for reporting: the parts share nothing, whatever a text is called."""

from __future__ import annotations

from pydoc_data.topics import topics

import pytest

from momentkv.evaluation.sources import load_text
from momentkv.evaluation.split import REPORT_HAYSTACK, REPORT_TEXTS, named_texts, role_of, roles_of

CHOOSING, REPORTING = (
    {name for known in named_texts()[part].values() for name in known["names"]} for part in ("choosing", "reporting")
)


def long_lines(name: str) -> list[str]:
    return [line.strip() for line in topics[name].splitlines() if len(line.strip()) > 30]


def test_no_text_is_of_both_parts():
    assert not CHOOSING & REPORTING


@pytest.mark.parametrize("name", sorted(REPORTING & set(topics)))
def test_a_topic_for_reporting_repeats_none_that_chose_something(name: str):
    known = {line for topic in CHOOSING & set(topics) for line in long_lines(topic)}
    lines = long_lines(name)
    assert sum(line in known for line in lines) < 0.03 * len(lines)


@pytest.mark.parametrize("known", named_texts()["choosing"].values(), ids=named_texts()["choosing"])
def test_what_chose_something_says_what(known: dict):
    assert known["title"]
    assert known["chose"]
    for name in known["names"]:
        assert role_of(name) == ("choosing", tuple(known["chose"]))
    if "marks" in known:  # under another name, and under one that is kept for reporting
        for name in ("other.txt", "news.txt"):
            assert role_of(name, " ".join(known["marks"])).part == "choosing"
        assert role_of("news.txt", known["marks"][0]).part == "reporting"


@pytest.mark.parametrize("name", [*REPORT_TEXTS, REPORT_HAYSTACK])
def test_what_the_suite_reads_is_for_reporting_and_long_enough(name: str):
    text = load_text(name)
    assert roles_of({name: text}) == {name: {"part": "reporting", "chose": ()}}
    assert len(text) > 12_000

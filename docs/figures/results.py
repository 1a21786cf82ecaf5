"""The generated part of docs/results.md and its plots, from results or from docs/data/evaluation/summary.json.

Run: python docs/figures/results.py [RESULTS ...]

With files or folders of results, such as results/suite, it gathers them into that summary first.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from momentkv.evaluation.gather import SUMMARY, gather, results_in
from momentkv.evaluation.report import read_json, write_json
from momentkv.evaluation.report_page import bits_in, markdown_of
from momentkv.evaluation.report_plots import draw

DOCS = Path(__file__).parents[1]
BEGIN, END = "<!-- written by docs/figures/results.py -->\n", "<!-- end of what it writes -->\n"


def main() -> None:
    """Write the page between its two marks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="*", type=Path)
    given = parser.parse_args().results
    kept = DOCS / "data" / "evaluation" / SUMMARY
    if given:
        write_json(kept, gather(results_in(given)))
    summary = read_json(kept)
    for old in (DOCS / "assets").glob("report-*.svg"):
        old.unlink()
    made = markdown_of(summary, draw(summary, DOCS / "assets", bits=bits_in(summary)), "assets/")
    page = DOCS / "results.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    # The page has a heading of its own.
    page.write_text(before + BEGIN + made.partition("\n")[2] + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()

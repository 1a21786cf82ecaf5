"""The generated part of docs/results.md and its plots, from docs/data/evaluation/summary.json.

Run: python docs/figures/results.py

After `momentkv evaluate suite`, copy results/suite/report/summary.json there first.
"""

from __future__ import annotations

import re
from pathlib import Path

from momentkv.evaluation.report import read_json
from momentkv.evaluation.report_page import markdown_of
from momentkv.evaluation.report_plots import draw

DOCS = Path(__file__).parents[1]
BEGIN, END = "<!-- written by docs/figures/results.py -->\n", "<!-- end of what it writes -->\n"


def main() -> None:
    """Write the page between its two marks."""
    summary = read_json(DOCS / "data" / "evaluation" / "summary.json")
    for ground in ("light", "dark"):
        plots = draw(summary, DOCS / "assets", ground=ground)
    made = for_both(markdown_of(summary, {name: f"assets/report-{name}.svg" for name in plots}))
    page = DOCS / "results.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    # The page has a heading of its own.
    page.write_text(before + BEGIN + made.partition("\n")[2] + "\n" + END + after, encoding="utf-8")


def for_both(page: str) -> str:
    """The page with each plot twice, for light and for dark."""
    plot = re.compile(r"^(!\[[^\]]*\]\(assets/report-\w+)\.svg\)$", re.MULTILINE)
    return plot.sub(r"\1-light.svg#only-light)\n\1-dark.svg#only-dark)", page)


if __name__ == "__main__":
    main()

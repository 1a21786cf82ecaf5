"""The generated part of docs/results.md and its plots, from docs/data/evaluation/summary.json.

Run: python docs/figures/results.py

After `momentkv evaluate suite`, copy results/suite/report/summary.json there first.
"""

from __future__ import annotations

from pathlib import Path

from momentkv.evaluation.report import read_json
from momentkv.evaluation.report_page import markdown_of
from momentkv.evaluation.report_plots import draw

DOCS = Path(__file__).parents[1]
BEGIN, END = "<!-- written by docs/figures/results.py -->\n", "<!-- end of what it writes -->\n"


def main() -> None:
    """Write the page between its two marks."""
    summary = read_json(DOCS / "data" / "evaluation" / "summary.json")
    plots = draw(summary, DOCS / "assets")
    made = markdown_of(summary, {name: f"assets/{path.name}" for name, path in plots.items()})
    page = DOCS / "results.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    # The page has a heading of its own.
    page.write_text(before + BEGIN + made.partition("\n")[2] + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()

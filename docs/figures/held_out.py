"""The tables of held-out texts in docs/held-out.md and docs/parts.md, from the results in docs/data.

Run: python docs/figures/held_out.py

The files are made by the commands that stand on these pages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

DOCS = Path(__file__).parents[1]
PAGES = (DOCS / "held-out.md", DOCS / "parts.md")
MARK = "<!-- {} by docs/figures/held_out.py: {} -->\n"

FILES = {
    "SmolLM2": ("held-out-smollm2.json", "held-out-kvpress.json"),
    "Qwen": ("held-out-qwen.json", "held-out-kvpress-qwen.json"),
}
TEXTS = {
    "news.txt": "news",
    "xquad.txt": "encyclopedia",
    "string-methods": "string methods",
    "assignment+comparisons+execmodel": "execution model",
}
BUDGETS = {"SmolLM2": (64, 128, 256, 512, 1024), "Qwen": (128, 256, 512)}
COLUMNS = [(model, budget) for model, budgets in BUDGETS.items() for budget in budgets]
# A model that was measured when all was chosen, without kvpress's presses.
LATER = {"Qwen 1.5B": ("held-out-qwen-1.5b.json",)}
LATER_COLUMNS = [("Qwen 1.5B", budget) for budget in (128, 256, 512)]
# Most of its layers have a sliding window; two of the texts.
WINDOWS = "held-out-gemma-3-270m.json"

# Texts that anybody has, looked at once.
PACKAGED = {
    "SmolLM2": ("packaged-smollm2.json",),
    "Qwen": ("packaged-qwen.json",),
    "Qwen 1.5B": ("packaged-qwen-1.5b.json",),
}
PACKAGED_TEXTS = {"argparse.py": "code", "lee_background.cor": "news"}

# One selection, and what stands for what it evicts.
CORRECTIONS = {"SmolLM2": ("summaries-smollm2.json",), "Qwen": ("summaries-qwen.json",)}
CALLED = {
    "none": "plain eviction",
    "order-1": "order 1 (the paper)",
    "summaries": "summaries",
    "summaries-layers": "summaries, by layers",
    "summaries-heads": "summaries, by heads",
}
# Every selection, with the paper's moments and without.
PAPER = {"SmolLM2": ("paper.json",)}
ORDERS = {"none": "none", "order-0": "order 0", "order-1": "order 1"}

SELECTIONS = ("snapkv/none", "expected-attention/none", "momentkv/none")
OURS = ("default", "default@4", "default@auto", "twice@4", "twice@auto")
SHOWN = (
    *SELECTIONS, "momentkv/order-1", "kvzip/none", "kvpress AdaKV(SnapKV)", "kvpress AdaKV(ExpectedAttention)",
    "kvpress ExpectedAttention", "kvpress KVzip", "snapkv/none@4", "expected-attention/none@4", *OURS,
)  # fmt: skip
BOLD = ("default", "default@auto", "twice@auto")

# KL (or another measure) of each text, by model, method and bytes as tokens.
Found = dict[tuple[str, str, int], dict[str, float]]
# Model and bytes as tokens of each.
Columns = Sequence[tuple[str, int]]


def main() -> None:
    """Write the tables between their marks."""
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    for name, table in tables().items():
        begin, end = (MARK.format(what, name) for what in ("written", "end of what is written"))
        (page,) = (page for page, text in texts.items() if begin in text)
        before, _, rest = texts[page].partition(begin)
        _, _, after = rest.partition(end)
        texts[page] = f"{before}{begin}\n{table}\n{end}{after}"
    for page, text in texts.items():
        page.write_text(text, encoding="utf-8")


def tables() -> dict[str, str]:
    """Every table, by name, as Markdown."""
    found = measured()
    by_text = [
        (f"`{method}` | {TEXTS[text]}" if text == next(iter(TEXTS)) else f" | {TEXTS[text]}", method, text)
        for method in OURS
        for text in TEXTS
    ]
    later = measured(LATER)
    of_later = [method for method in SHOWN if any(name == method for _, name, _ in later)]
    return {
        "mean KL": table("bytes, in 16-bit tokens", [(called(method), kl_of(found, method)) for method in SHOWN]),
        "of the best selection": table(
            "mean KL, of the best selection's",
            [(f"`{method}`", parts_of(found, method, list(TEXTS))) for method in OURS],
        ),
        "of the best on each text": table(
            "each text | ", [(name, parts_of(found, method, [text])) for name, method, text in by_text]
        ),
        "on a later model": table(
            "mean KL, and of the best selection's",
            [
                (
                    called(method),
                    kl_of(later, method, LATER_COLUMNS) + parts_of(later, method, list(TEXTS), LATER_COLUMNS),
                )
                for method in of_later
            ],
            LATER_COLUMNS + [("part of the best", budget) for _, budget in LATER_COLUMNS],
        ),
        "on texts of packages": of_packages(),
        "with sliding windows": with_windows(),
        "corrections": of_corrections("kl"),
        "errors of heads": of_corrections("head_error"),
        "the paper's moments": with_moments(),
    }


def of_corrections(measure: str) -> str:
    """What stands for evicted tokens of one selection, by a measure."""
    found = measured(CORRECTIONS, measure)
    first = {"kl": "mean KL", "head_error": "mean relative error of the heads"}[measure]
    return table(first, [(name, kl_of(found, f"momentkv/{short}")) for short, name in CALLED.items()])


def with_moments() -> str:
    """KL of each selection with moments of each order, at the bytes of the same tokens."""
    found = measured(PAPER)
    policies = dict.fromkeys(method.partition("/")[0] for _, method, _ in found)
    sizes = sorted({size for _, _, size in found})
    return table(
        "mean KL",
        [
            (
                f"`{policy}`",
                [
                    cell
                    for order in ORDERS
                    for cell in kl_of(found, f"{policy}/{order}", [("SmolLM2", size) for size in sizes])
                ],
            )
            for policy in policies
        ],
        [(name, size) for name in ORDERS.values() for size in sizes],
    )


def of_packages() -> str:
    """KL on each text that comes with Python or a package, of three models."""
    found = measured(PACKAGED, texts=PACKAGED_TEXTS)
    columns = [(model, budget) for model in PACKAGED for budget in (128, 256, 512)]
    rows = []
    for method in SHOWN:
        for text, name in PACKAGED_TEXTS.items():
            cells = [found.get((*column[:1], method, column[1]), {}).get(text) for column in columns]
            if any(cell is not None for cell in cells):
                first = f"{called(method)} | {name}" if name == "code" else f" | {name}"
                rows.append((first, ["" if x is None else number(x, 3).removeprefix("0") for x in cells]))
    return table("KL | ", rows, columns)


def with_windows() -> str:
    """KL on each text of a model of which most layers have a sliding window."""
    rows = json.loads((DOCS / "data" / WINDOWS).read_text(encoding="utf-8"))["rows"]
    kl = {(row["method"], row["text"], row["bytes_as_tokens"]): row["kl"] for row in rows}
    columns = list(dict.fromkeys((text, budget) for _, text, budget in kl))
    return table(
        "KL",
        [
            (called(method), [number(kl[method, *column], 4).removeprefix("0") for column in columns])
            for method in SHOWN
            if (method, *columns[0]) in kl
        ],
        [(TEXTS[text], budget) for text, budget in columns],
    )


def measured(
    files: Mapping[str, Sequence[str]] = FILES, measure: str = "kl", *, texts: Mapping[str, str] = TEXTS
) -> Found:
    """The results of all files, by a measure, of what was measured on all texts."""
    found: Found = {}
    for model, names in files.items():
        for name in names:
            for row in json.loads((DOCS / "data" / name).read_text(encoding="utf-8"))["rows"]:
                cell = (model, row.get("method") or row["policy"], row["bytes_as_tokens"])
                found.setdefault(cell, {})[row["text"]] = row[measure]
    return {cell: kl for cell, kl in found.items() if kl.keys() == texts.keys()}


def selections(found: Found, model: str, budget: int) -> list[dict[str, float]]:
    """KL of each text of every method that reads once and neither corrects nor rounds."""
    return [
        kl
        for (of, method, size), kl in found.items()
        if (of, size) == (model, budget)
        and (method in SELECTIONS or (method.startswith("kvpress") and "KVzip" not in method))
    ]


def kl_of(found: Found, method: str, columns: Columns = COLUMNS) -> list[str]:
    """Mean KL in each column."""
    cells = [found.get((model, method, budget)) for model, budget in columns]
    return ["" if kl is None else number(mean(kl.values()), 3).removeprefix("0") for kl in cells]


def parts_of(found: Found, method: str, texts: Sequence[str], columns: Columns = COLUMNS) -> list[str]:
    """In each column, the mean KL of some texts, as a part of the least that selections have of it."""

    def of(kl: dict[str, float]) -> float:
        return mean(kl[text] for text in texts)

    cells = []
    for model, budget in columns:
        kl = found.get((model, method, budget))
        least = min(map(of, selections(found, model, budget)))
        cells.append("" if kl is None else number(of(kl) / least, 2))
    return cells


def number(x: float, digits: int) -> str:
    """With so many digits behind the point, or one more where all would be zero."""
    return f"{x:.{digits}f}" if x >= 0.5 * 10**-digits else f"{x:.{digits + 1}f}"


def called(method: str) -> str:
    """A method in the first column."""
    if method.startswith("kvpress"):
        return method
    name = f"`{method}`" + (" (the paper)" if method == "momentkv/order-1" else "")
    return f"**{name}**" if method in BOLD else name


def table(first: str, rows: Sequence[tuple[str, list[str]]], columns: Columns = COLUMNS) -> str:
    """Markdown with a column for each model and budget."""
    heads, before = list[str](), ""
    for model, budget in columns:
        heads.append(f"{budget:,}" if model == before else f"{model}: {budget:,}")
        before = model
    lines = [f"| {first} | {' | '.join(heads)} |", "|---" * (first.count("|") + 1 + len(heads)) + "|"]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

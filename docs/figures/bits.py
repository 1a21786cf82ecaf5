"""The table of docs/what-we-tried.md#auto: how good choices of bits are, from docs/data/bits.json.

Run: python docs/figures/bits.py

The KL of each number of bits is that of the command on that page; the errors are what `momentkv.cache.coded_budget`
compares in the same runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from momentkv.cache.coded_budget import EVICTION_COUNTS, UNFORETOLD, expected_error

DOCS = Path(__file__).parents[1]
PAGE = DOCS / "what-we-tried.md"
MARKS = tuple(f"<!-- {what} by docs/figures/bits.py -->\n" for what in ("written", "end of what is written"))
DATA = json.loads((DOCS / "data" / "bits.json").read_text(encoding="utf-8"))
MODELS = {"SmolLM2-135M-Instruct": "SmolLM2", "Qwen2.5-Coder-0.5B-Instruct": "Qwen"}
READINGS = {"once": UNFORETOLD, "twice": 0.0}
BEFORE = 3.5

# One text, budget and reading, and a choice of bits for it.
Case = dict[str, Any]
Choice = Callable[[Case], int]


def main() -> None:
    """Write the table between its marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n{table()}\n{MARKS[1]}{after}", encoding="utf-8")


def chosen(case: Case, counts: float, unforetold: float) -> int:
    """The number of bits that the rule takes with two constants."""
    costs = [
        expected_error(
            evicted,
            rounded,
            unforetold=unforetold * case["heads"],
            kept=tokens / DATA["context"],
            eviction_counts=counts,
        )
        for evicted, rounded, tokens in zip(case["eviction"], case["rounding"], case["tokens"], strict=True)
    ]
    bits: int = DATA["bits"][costs.index(min(costs))]
    return bits


def by_library(case: Case) -> int:
    """The number of bits that ``bits="auto"`` takes."""
    return chosen(case, EVICTION_COUNTS, READINGS[case["readings"]])


def table() -> str:
    """Times the KL of the best number of bits, geometric mean and largest."""
    choices: dict[str, Choice] = {
        "always 4": lambda case: 4,
        "always 5": lambda case: 5,
        f"$\\kappa = {BEFORE}$, $\\lambda = 0$: the rule before": lambda case: chosen(case, BEFORE, 0),
        f"$\\kappa = {EVICTION_COUNTS:g}$, $\\lambda = 0$: **after a second reading**": (
            lambda case: chosen(case, EVICTION_COUNTS, 0)
        ),
        f"$\\kappa = {EVICTION_COUNTS:g}$, $\\lambda = {UNFORETOLD:g}$: **after one reading**": (
            lambda case: chosen(case, EVICTION_COUNTS, UNFORETOLD)
        ),
    }
    columns = [(model, readings) for model in MODELS for readings in READINGS]
    lines = [
        "| bits | " + " | ".join(f"{MODELS[model]}, {readings}" for model, readings in columns) + " |",
        "|" + "---|" * (len(columns) + 1),
    ]
    for name, choice in choices.items():
        cells = []
        for model, readings in columns:
            times = [times_best(case, choice) for case in cases(model, readings)]
            mean = math.exp(math.fsum(map(math.log, times)) / len(times))
            cells.append(f"{mean:.2f} ({max(times):.1f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def cases(model: str, readings: str) -> list[Case]:
    """What was measured with a model."""
    return [case for case in DATA["rows"] if (case["model"], case["readings"]) == (model, readings)]


def times_best(case: Case, choice: Choice) -> float:
    """The KL of the chosen number of bits, as a multiple of that of the best one."""
    kl = case["kl"]
    return float(kl[str(choice(case))] / min(kl.values()))


if __name__ == "__main__":
    main()

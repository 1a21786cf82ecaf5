"""Needles found, as a terminal table and as a plot."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from momentkv.evaluation.report import tokens_in

__all__ = ["bootstrap", "kind_of", "needles_table", "plot_needles", "spread", "summarize", "wilson"]

Row = dict[str, Any]
# If the full cache fails more often than not, there is nothing that compression could lose.
SIGNAL = 0.5


def wilson(found: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, by default of 95 %.

    Examples
    --------
    >>> [round(x, 2) for x in wilson(10, 10)]
    [0.72, 1.0]
    """
    share = found / of
    centre = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z * (share * (1 - share) / of + (z / (2 * of)) ** 2) ** 0.5 / (1 + z * z / of)
    return max(0.0, centre - half), min(1.0, centre + half)


def summarize(rows: list[Row]) -> dict[tuple[Any, ...], Row]:
    """Over haystacks and depths, for each (task, length, question, bytes, policy, correction).

    A task on which the full cache finds less than half has no signal: nothing could be lost.
    """
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[
            kind_of(row), *(row[x] for x in ("length", "question", "bytes_as_tokens", "policy", "correction"))
        ].append(row)
    full = {key[:2]: mean(row["values"] for row in group) for key, group in groups.items() if key[3] is None}
    summary = {}
    for key, group in groups.items():
        low, high = spread(group)
        generated = [row["generated"] for row in group if row["generated"] is not None]
        summary[key] = {
            "share": mean(row["values"] for row in group),
            "of": len(group),
            "haystacks": len({row["haystack"] for row in group}),
            "interval": (low, high),
            "tokens": mean(row["tokens"] for row in group),
            "nll": mean(row["nll"] for row in group),
            "generated": mean(generated) if generated else None,
            "kept": group[0]["budget"],
            "signal": full[key[:2]] >= SIGNAL,
        }
    return summary


def kind_of(row: Row) -> str:
    """The task, and what its values are if not numbers."""
    return str(row["task"]) if row["value"] == "number" else f"{row['task']}, {row['value']}"


def spread(rows: list[Row]) -> tuple[float, float]:
    """95 % of the share of values found: bootstrap over haystacks, or Wilson's interval where all questions agree.

    Questions about one haystack are not independent, so haystacks are drawn, with all their questions. Where every
    question has the same result the bootstrap has no width and says too much; Wilson's interval then counts haystacks.
    """
    groups: dict[Any, list[float]] = defaultdict(list)
    for row in rows:
        groups[row["length"], row["haystack"]].append(row["values"])
    if len({row["values"] for row in rows}) == 1 and rows[0]["values"] in (0, 1):
        return wilson(len(groups) * int(rows[0]["values"]), len(groups))
    return bootstrap([(sum(values), len(values)) for values in groups.values()])


def bootstrap(groups: list[tuple[float, int]], *, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % of the mean of (sum, count) pairs, drawn with replacement.

    Examples
    --------
    >>> [round(x, 2) for x in bootstrap([(1, 1), (0, 1)] * 20)]
    [0.35, 0.65]
    """
    sums, counts = np.array(groups, dtype=float).T
    drawn = np.random.default_rng(seed).integers(len(groups), size=(draws, len(groups)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def needles_table(rows: list[Row], *, title: str, bits: int | None) -> Table:
    """One line for each task, length, question, budget, policy and correction, after that of the full cache."""
    summary = summarize(rows)
    generated = any(x["generated"] is not None for x in summary.values())
    columns = ["question", "bytes", "policy", "correction", "found", "95 %", "n", "tokens", "NLL"]
    if generated:
        columns.insert(7, "wrote")
    table = Table(title=title, title_style="bold", header_style="bold", box=SIMPLE_HEAD, padding=(0, 0))
    for column in columns:
        left = column in ("question", "policy", "correction")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    shown: tuple[Any, ...] = (None, None, None, None)
    order = {"": 0, "unseen": 1, "seen": 2}
    for key, x in sorted(summary.items(), key=lambda item: (*item[0][:2], order[item[0][2]], item[0][3] or 0)):
        task, length, question, size, policy, correction = key
        if shown[0] is not None and shown[:3] != (task, length, question):
            table.add_section()
        low, high = x["interval"]
        cells = [
            "" if shown[:3] == (task, length, question) else question or f"{task}, {length}:",
            str(size or "") if shown != (task, length, question, size) else "",
            policy,
            correction,
            f"{x['share']:.0%}" if x["signal"] else "no signal",
            f"{100 * low:.0f}-{100 * high:.0f}" if x["signal"] else "",
            str(x["of"]),
            f"{x['tokens']:.0%}",
            f"{x['nll']:.2f}",
        ]
        if generated:
            cells.insert(7, "" if x["generated"] is None else f"{x['generated']:.0%}")
        table.add_row(*cells)
        shown = task, length, question, size
    table.caption = (
        f"on top: task and tokens of context; bytes: of so many {tokens_in(bits)} per KV head, correction included; "
        "found: values of which every token is right; n: questions; "
        + ("wrote: by generation; " if generated else "")
        + "no signal: the full cache finds less than half"
    )
    return table


def plot_needles(rows: list[Row], path: str | Path, *, title: str, bits: int | None) -> Path:
    """Values found against bytes, a panel for each task and length and when the question comes, with intervals."""
    from matplotlib.figure import Figure

    summary = summarize(rows)
    kinds = sorted({key[:2] for key in summary})
    questions = [x for x in ("unseen", "seen") if any(key[2] == x for key in summary)]
    lines = list(dict.fromkeys(key[4:] for key in summary if key[2]))
    policies = list(dict.fromkeys(policy for policy, _ in lines))
    corrections = list(dict.fromkeys(correction for _, correction in lines))
    size = (2.5 + 3.2 * len(questions), 1.2 + 2.6 * len(kinds))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(kinds), len(questions), squeeze=False, sharex=True, sharey=True)
    for kind, row in zip(kinds, panels, strict=True):
        full = summary[*kind, "", None, "full cache", ""]
        for question, axis in zip(questions, row, strict=True):
            axis.axhline(full["share"], color="0.6", linestyle="--", label="full cache")
            for index, line in enumerate(lines):
                points = sorted(
                    (key[3], x) for key, x in summary.items() if key[:3] == (*kind, question) and key[4:] == line
                )
                if not points:
                    continue
                shares = [x["share"] for _, x in points]
                # Lines side by side, so that equal points can be told apart.
                axis.errorbar(
                    [tokens * 1.03 ** (index - len(lines) / 2) for tokens, _ in points],
                    shares,
                    [
                        [max(0.0, share - x["interval"][0]) for share, (_, x) in zip(shares, points, strict=True)],
                        [max(0.0, x["interval"][1] - share) for share, (_, x) in zip(shares, points, strict=True)],
                    ],
                    color=f"C{policies.index(line[0])}",
                    linestyle=(":", "-", "--", "-.")[corrections.index(line[1]) % 4],
                    marker="o",
                    markersize=3,
                    elinewidth=0.7,
                    label=", ".join(line),
                )
            most = max((x["of"] for key, x in summary.items() if key[:3] == (*kind, question)), default=0)
            note = f"n = {most}" if full["signal"] else "no signal: the full cache fails"
            axis.set_title(f"{kind[0]}, {kind[1]} tokens, {question}, {note}", fontsize=8)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_ylim(-0.05, 1.05)
    for axis in panels[-1]:
        axis.set_xlabel(f"bytes, in {tokens_in(bits)} per KV head")
    for row in panels:
        row[0].set_ylabel("values found")
    figure.suptitle(title, fontsize=10)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path

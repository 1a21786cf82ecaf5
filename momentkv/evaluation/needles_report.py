"""Needles found, as a terminal table and as a plot."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

__all__ = ["needles_table", "plot_needles", "summarize", "wilson"]

Row = dict[str, Any]
# A full cache that fails more often than not has nothing that compression could lose.
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
    """Over depths and samples, for each (length, question, bytes, policy, correction); of the full cache by length."""
    groups: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[x] for x in ("length", "question", "bytes_as_tokens", "policy", "correction"))].append(row)
    summary = {}
    for key, group in groups.items():
        full = [row["exact"] for row in rows if row["length"] == key[0] and row["bytes_as_tokens"] is None]
        found, of = sum(row["exact"] for row in group), len(group)
        generated = [row["generated"] for row in group if row["generated"] is not None]
        summary[key] = {
            "found": found,
            "of": of,
            "interval": wilson(found, of),
            "tokens": mean(row["tokens"] for row in group),
            "nll": mean(row["nll"] for row in group),
            "generated": sum(generated) if generated else None,
            "kept": group[0]["budget"],
            "signal": mean(full) >= SIGNAL,
        }
    return summary


def needles_table(rows: list[Row], *, title: str) -> Table:
    """One line a length, question, budget, policy and correction; the full cache heads each length."""
    summary = summarize(rows)
    generated = any(x["generated"] is not None for x in summary.values())
    columns = ["question", "bytes", "policy", "correction", "found", "95 %", "tokens", "NLL"]
    if generated:
        columns.insert(6, "wrote")
    table = Table(title=title, title_style="bold", header_style="bold", box=SIMPLE_HEAD, padding=(0, 0))
    for column in columns:
        left = column in ("question", "policy", "correction")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    shown: tuple[Any, ...] = (None, None, None)
    order = {"": 0, "unseen": 1, "seen": 2}
    for key, x in sorted(summary.items(), key=lambda item: (item[0][0], order[item[0][1]], item[0][2] or 0)):
        length, question, size, policy, correction = key
        if shown[0] is not None and shown[:2] != (length, question):
            table.add_section()
        low, high = x["interval"]
        cells = [
            "" if shown[:2] == (length, question) else question or f"{length}:",
            str(size or "") if shown != (length, question, size) else "",
            policy,
            correction,
            f"{x['found']}/{x['of']}" if x["signal"] else "no signal",
            f"{100 * low:.0f}-{100 * high:.0f}" if x["signal"] else "",
            f"{x['tokens']:.0%}",
            f"{x['nll']:.2f}",
        ]
        if generated:
            cells.insert(6, "" if x["generated"] is None else f"{x['generated']}/{x['of']}")
        table.add_row(*cells)
        shown = length, question, size
    table.caption = (
        "on top: tokens of context; bytes: of so many tokens a KV head, correction included; "
        "found: every token of the answer, over all depths; "
        + ("wrote: by generation; " if generated else "")
        + "no signal: the full cache fails more often than not"
    )
    return table


def plot_needles(rows: list[Row], path: str | Path, *, title: str) -> Path:
    """Needles found against bytes, a panel for each length and question, with Wilson's intervals."""
    from matplotlib.figure import Figure

    summary = summarize(rows)
    lengths = sorted({key[0] for key in summary})
    questions = [x for x in ("unseen", "seen") if any(key[1] == x for key in summary)]
    lines = list(dict.fromkeys(key[3:] for key in summary if key[1]))
    policies = list(dict.fromkeys(policy for policy, _ in lines))
    corrections = list(dict.fromkeys(correction for _, correction in lines))
    size = (2.5 + 3.2 * len(questions), 1.2 + 2.6 * len(lengths))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(lengths), len(questions), squeeze=False, sharex=True, sharey=True)
    for length, row in zip(lengths, panels, strict=True):
        full = summary[length, "", None, "full cache", ""]
        for question, axis in zip(questions, row, strict=True):
            axis.axhline(full["found"] / full["of"], color="0.6", linestyle="--", label="full cache")
            for index, line in enumerate(lines):
                points = sorted(
                    (key[2], x) for key, x in summary.items() if key[:2] == (length, question) and key[3:] == line
                )
                if not points:
                    continue
                shares = [x["found"] / x["of"] for _, x in points]
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
            most = max(x["of"] for key, x in summary.items() if key[:2] == (length, question))
            note = f"n = {most}" if full["signal"] else "no signal: the full cache fails"
            axis.set_title(f"{length} tokens, question {question}, {note}", fontsize=8)
            axis.set_xscale("log", base=2)
            axis.xaxis.set_major_formatter("{x:g}")
            axis.set_ylim(-0.05, 1.05)
    for axis in panels[-1]:
        axis.set_xlabel("bytes, in tokens a KV head")
    for row in panels:
        row[0].set_ylabel("needles found")
    figure.suptitle(title, fontsize=10)
    handles, names = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path

"""Fidelity against retrieval: each way to compress as a point, from the results of two measurements."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from momentkv.evaluation.needles_report import summarize
from momentkv.evaluation.report import average, bits_of, read_json, show, tokens_in

__all__ = ["Point", "join", "plot_tradeoff", "tradeoff"]

Row = dict[str, Any]


class Point(NamedTuple):
    """One way to compress, at one budget.

    Attributes
    ----------
    policy, correction : str
    tokens : int
        Budget: the bytes of this many tokens per KV head, correction included.
    kl : float
        Mean over texts, in nats.
    found : dict
        (share, questions, interval) by when the question came.
    """

    policy: str
    correction: str
    tokens: int
    kl: float
    found: dict[str, tuple[float, int, tuple[float, float]]]


def join(fidelity: list[Row], needles: list[Row]) -> list[Point]:
    """Points that both measurements have; all lengths of haystacks count.

    Raises
    ------
    ValueError
        If they have nothing in common.
    """
    # Tasks and lengths together: one share for each question.
    merged = {"task": "", "value": "number", "length": 0}
    found = summarize([row | merged | {"haystack": (row["layout"], row["length"], row["haystack"])} for row in needles])
    points = []
    for (tokens, policy, correction), x in average(fidelity).items():
        asked = {
            key[2]: (y["share"], y["of"], y["interval"])
            for key, y in found.items()
            if key[3:] == (tokens, policy, correction)
        }
        if asked:
            points.append(Point(policy, correction, tokens, x["kl"], asked))
    if not points:
        raise ValueError(
            "the results have no policy, correction and budget in common; measure both with the same "
            "--policies, --corrections and --budgets"
        )
    return sorted(points, key=lambda point: (point.tokens, point.kl))


def tradeoff(options: argparse.Namespace) -> int:
    """Join the results of ``evaluate fidelity`` and ``evaluate needles``; print a table and draw the plane."""
    console = Console()
    fidelity, needles = read_json(options.fidelity), read_json(options.needles)
    models = {x["protocol"]["model"] for x in (fidelity, needles)}
    if len(models) > 1:
        raise ValueError(f"the results are of different models, {' and '.join(sorted(models))}; measure one")
    counted = {bits_of(x["protocol"]) for x in (fidelity, needles)}
    if len(counted) > 1:
        units = " and in ".join(sorted(map(tokens_in, counted)))
        raise ValueError(f"the results count bytes in {units}; measure both with the same --bytes")
    bits = counted.pop()
    asked = needles["rows"]
    if options.length is not None:
        asked = [row for row in asked if row["length"] == options.length]
    points = join(fidelity["rows"], asked)
    texts = len({row["text"] for row in fidelity["rows"]})
    title = f"{models.pop()}: KL over {texts} texts of {fidelity['protocol']['context']} tokens, needles in prose"
    show(console, tradeoff_table(points, title=title, bits=bits))
    console.print(f"plot: {plot_tradeoff(points, options.output, title=title)}", soft_wrap=True)
    return 0


def tradeoff_table(points: list[Point], *, title: str, bits: int | None) -> Table:
    """One line for each point; those that no other beats on both measures stand out."""
    table = Table(title=title, title_style="bold", header_style="bold", box=SIMPLE_HEAD, padding=(0, 0))
    for column in ("bytes", "policy", "correction", "KL", "unseen", "seen"):
        table.add_column(column, justify="left" if column in ("policy", "correction") else "right", no_wrap=True)
    shown = None
    for point in points:
        if shown not in (None, point.tokens):
            table.add_section()
        cells = ["{:.0%} of {}".format(*point.found[x][:2]) if x in point.found else "" for x in ("unseen", "seen")]
        table.add_row(
            "" if shown == point.tokens else str(point.tokens),
            point.policy,
            point.correction,
            f"{point.kl:.3f}",
            *cells,
            style="" if beaten(point, points) else "bold green",
        )
        shown = point.tokens
    table.caption = (
        f"bytes: of so many {tokens_in(bits)} per KV head, correction included; unseen, seen: needles found by when "
        "the question came;\ngreen: none of the same bytes has less KL and as many needles"
    )
    return table


def share(point: Point) -> float:
    """Needles found, both questions together."""
    return sum(x[0] * x[1] for x in point.found.values()) / sum(x[1] for x in point.found.values())


def beaten(point: Point, points: list[Point]) -> bool:
    """Whether another point of the same bytes is at least as good on both measures, and better on one.

    Examples
    --------
    >>> good, bad = (Point("p", "c", 64, kl, {"seen": (0.9, 10, (0.5, 1.0))}) for kl in (0.1, 0.2))
    >>> beaten(good, [good, bad]), beaten(bad, [good, bad])
    (False, True)
    """
    rivals = (x for x in points if x.tokens == point.tokens)
    return any(
        x.kl <= point.kl and share(x) >= share(point) and (x.kl < point.kl or share(x) > share(point)) for x in rivals
    )


def plot_tradeoff(points: list[Point], path: str | Path, *, title: str) -> Path:
    """Needles found against KL: a panel for each question, a line from budget to budget of each way to compress."""
    from matplotlib.figure import Figure

    questions = [x for x in ("unseen", "seen") if any(x in point.found for point in points)]
    figure = Figure(figsize=(2.5 + 3.6 * len(questions), 4.2), layout="constrained")
    panels = figure.subplots(1, len(questions), squeeze=False, sharex=True, sharey=True)[0]
    ways = list(dict.fromkeys((point.policy, point.correction) for point in points))
    policies = list(dict.fromkeys(policy for policy, _ in ways))
    corrections = list(dict.fromkeys(correction for _, correction in ways))
    sizes = sorted({point.tokens for point in points})
    for question, axis in zip(questions, panels, strict=True):
        for policy, correction in ways:
            line = [x for x in points if (x.policy, x.correction) == (policy, correction) and question in x.found]
            if not line:
                continue
            kls, shares = [x.kl for x in line], [x.found[question][0] for x in line]
            colour = f"C{policies.index(policy) % 10}"
            marker = "osD^vP*X"[corrections.index(correction) % 8]
            axis.plot(kls, shares, "-", color=colour, linewidth=0.7, alpha=0.5)
            axis.scatter(
                kls,
                shares,
                [18 + 22 * sizes.index(x.tokens) for x in line],
                color=colour,
                marker=marker,
                label=f"{policy}, {correction}",
            )
        axis.set_title(f"question {question}", fontsize=9)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("{x:g}")
        axis.tick_params(axis="x", which="both", labelsize=7)
        axis.set_xlabel("KL(full || compressed), nats")
        axis.set_ylim(-0.05, 1.05)
    panels[0].set_ylabel("needles found")
    panels[0].annotate(
        f"larger marks: more bytes ({', '.join(map(str, sizes))})", (0.02, 0.02), xycoords="axes fraction", fontsize=6
    )
    figure.suptitle(title, fontsize=9)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path

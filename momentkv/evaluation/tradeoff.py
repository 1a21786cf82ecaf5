"""Fidelity against retrieval: each way to compress as a point, from the results of two measurements."""

from __future__ import annotations

import argparse
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from momentkv.evaluation.gather import kind_of_result
from momentkv.evaluation.lines import Row, fidelity_lines, needle_lines, needles_of
from momentkv.evaluation.report import bits_of, empty_table, read_json, save_figure, show, tokens_in
from momentkv.evaluation.split import number_of_texts

__all__ = ["join", "tradeoff"]

QUESTIONS = ("unseen", "seen")


def join(fidelity: list[Row], needles: list[Row]) -> pd.DataFrame:
    """A line for each budget and method that both measurements have; of several tasks and lengths all count.

    Returns
    -------
    DataFrame
        With ``bytes``, ``method``, ``kl``, the share of needles found ``unseen`` and ``seen`` (NaN where nothing was
        asked then), ``found`` (of all), ``n_unseen``, ``n_seen``, and whether another of the same bytes has no more KL
        and finds as many (``beaten``).

    Raises
    ------
    ValueError
        If they have nothing in common.
    """
    asked = needle_lines(needles_of(needles).assign(task="", length=0))
    wide = asked[asked["bytes"] > 0].pivot(index=["bytes", "method"], columns="question", values=["share", "n"])
    points = fidelity_lines(fidelity)[["bytes", "method", "kl"]].set_index(["bytes", "method"])
    for when in QUESTIONS:
        known = ("share", when) in wide
        points[when] = wide["share", when].astype(float) if known else float("nan")
        points[f"n_{when}"] = wide["n", when] if known else 0
    points = points.fillna({"n_unseen": 0, "n_seen": 0}).astype({"n_unseen": int, "n_seen": int})
    points["n"] = points["n_unseen"] + points["n_seen"]
    points = points[points["n"] > 0].reset_index()
    if points.empty:
        raise ValueError(
            "the results have no method and budget in common; measure both with the same methods and --budgets"
        )
    points["found"] = sum(points[x].fillna(0) * points[f"n_{x}"] for x in QUESTIONS) / points["n"]
    points["beaten"] = [beaten(x, points[points["bytes"] == x.bytes]) for x in points.itertuples()]
    return points.sort_values(["bytes", "kl"], ignore_index=True)


def beaten(point: Any, rivals: pd.DataFrame) -> bool:
    """Whether one of the same bytes is at least as good on both measures, and better on one."""
    as_good = rivals[(rivals["kl"] <= point.kl) & (rivals["found"] >= point.found)]
    return bool(((as_good["kl"] < point.kl) | (as_good["found"] > point.found)).any())


def results_of(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Results of one kind, named by the option of that name."""
    path = getattr(options, kind)
    content = read_json(path)
    found = kind_of_result(content)
    if found == "decoding":
        raise ValueError(f"{kind} is {path!r}, of a decode; name what momentkv evaluate {kind} wrote without --decode")
    if found != kind:
        raise ValueError(f"{kind} is {path!r}, which momentkv evaluate {kind} did not write; name what it wrote")
    return content


def tradeoff(options: argparse.Namespace) -> int:
    """Join the results of ``evaluate fidelity`` and ``evaluate needles``; print a table and draw the plane."""
    console = Console()
    fidelity, needles = (results_of(options, kind) for kind in ("fidelity", "needles"))
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
        lengths = sorted({row["length"] for row in asked})
        asked = [row for row in asked if row["length"] == options.length]
        if not asked:
            raise ValueError(
                f"length is {options.length}, but the haystacks have {', '.join(map(str, lengths))} tokens; use one of "
                "these"
            )
    points = join(fidelity["rows"], asked)
    texts = number_of_texts(len({row["text"] for row in fidelity["rows"]}))
    title = f"{models.pop()}: KL over {texts} of {fidelity['protocol']['context']} tokens, needles in prose"
    show(console, tradeoff_table(points, title=title, bits=bits))
    console.print(
        f"plot: {save_figure(plot_tradeoff(points, title=title), options.output)}", soft_wrap=True, markup=False
    )
    return 0


def tradeoff_table(points: pd.DataFrame, *, title: str, bits: int | None) -> Table:
    """One line for each point; those that no other beats on both measures stand out."""
    table = empty_table(title, ["bytes", "method", "KL", *QUESTIONS])
    for size, group in points.groupby("bytes"):
        if table.row_count:
            table.add_section()
        for place, x in enumerate(group.to_dict("records")):
            cells = [f"{x[when]:.0%} of {x[f'n_{when}']}" if x[f"n_{when}"] else "" for when in QUESTIONS]
            first = "" if place else str(size)
            table.add_row(first, x["method"], f"{x['kl']:.3f}", *cells, style="" if x["beaten"] else "bold green")
    table.caption = (
        f"bytes: of so many {tokens_in(bits)} per KV head, correction included; unseen, seen: needles found by when "
        "the question came;\ngreen: none of the same bytes has less KL and as many needles"
    )
    return table


def plot_tradeoff(points: pd.DataFrame, *, title: str) -> Any:
    """Needles found against KL: a panel for each question, a line from budget to budget of each method."""
    from matplotlib.figure import Figure

    from momentkv.evaluation.report_plots import legend

    questions = [x for x in QUESTIONS if points[f"n_{x}"].any()]
    figure = Figure(figsize=(2.5 + 3.6 * len(questions), 4.2), layout="constrained")
    panels = figure.subplots(1, len(questions), squeeze=False, sharex=True, sharey=True)[0]
    sizes = sorted(set(points["bytes"]))
    for question, axis in zip(questions, panels, strict=True):
        for index, (method, line) in enumerate(points[points[f"n_{question}"] > 0].groupby("method", sort=False)):
            style = {"color": f"C{index % 10}", "label": method}
            axis.plot(line["kl"], line[question], "-", color=style["color"], linewidth=0.7, alpha=0.5)
            marks = [18 + 22 * sizes.index(x) for x in line["bytes"]]
            axis.scatter(line["kl"], line[question], marks, marker="osD^vP*X"[index % 8], **style)
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
    legend(figure, title)
    return figure

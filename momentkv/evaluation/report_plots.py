"""Plots of what was gathered: KL against bytes, values found against bytes, depth by length, the gap by layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from momentkv.evaluation.lines import BANDS
from momentkv.evaluation.methods import OURS
from momentkv.evaluation.report import titled, tokens_in
from momentkv.evaluation.task_lines import AVERAGE

__all__ = ["GROUNDS", "draw", "methods_of", "plot_depths", "plot_found", "plot_gaps", "plot_kl", "plot_tasks", "slug"]

# For pages that are light or dark: plots have no ground of their own.
GROUNDS = ("light", "dark")


def draw(summary: dict[str, Any], folder: Path, *, bits: int | None) -> dict[str, dict[str, str]]:
    """Write the plots that a summary has data for, each for light and for dark pages; stems of names by model and kind.

    The same summary gives the same files: no dates, and identifiers from a fixed salt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, dict[str, str]] = {}
    for ground in GROUNDS:
        style = mpl.style.library["dark_background"] if ground == "dark" else {}
        with mpl.rc_context({**style, "svg.hashsalt": "momentkv", "font.size": 8}):
            for model, name, figure in figures_of(summary, bits):
                stem = f"report-{name}-{slug(model)}"
                figure.savefig(folder / f"{stem}-{ground}.svg", metadata={"Date": None}, transparent=True)
                drawn.setdefault(model, {})[name] = stem
    return drawn


def figures_of(summary: dict[str, Any], bits: int | None) -> Iterator[tuple[str, str, Figure]]:
    """Each model's figures; of texts that chose something only where there are no others."""
    for model in sorted({x["model"] for kind in ("needles", "fidelity", "decoding", "gap") for x in summary[kind]}):
        for kind, name, plot in (
            ("fidelity", "kl", plot_kl),
            ("decoding", "decoding", plot_kl),
            ("needles", "found", plot_found),
            ("depths", "depths", plot_depths),
        ):
            rows = [x for x in summary[kind] if x["model"] == model]
            rows = [x for x in rows if x["part"] == "reporting"] or rows
            # Without a signal there is nothing to see.
            rows = [x for x in rows if x.get("signal", True)]
            figure = plot(pd.DataFrame(rows), bits=bits) if rows else None
            if figure is not None:
                yield model, name, figure
        if gaps := [x for x in summary["gap"] if x["model"] == model]:
            yield model, "gap", plot_gaps(gaps)


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def methods_of(lines: pd.DataFrame) -> list[str]:
    """All compressed methods; what this library recommends first."""
    found = list(dict.fromkeys(lines["method"][lines["bytes"] > 0]))
    return sorted(found, key=lambda method: OURS.index(method) if method in OURS else len(OURS))


def style_of(method: str, methods: list[str]) -> dict[str, Any]:
    """Colour and width of a method's line."""
    index = methods.index(method)
    return {
        "color": f"C{index % 10}",
        "linestyle": "-" if index < 10 else "--",
        "linewidth": 2 if method in OURS else 1,
        "marker": "o",
        "markersize": 3,
        "elinewidth": 0.7,
        "label": method,
    }


def curve(axis: Axes, points: pd.DataFrame, name: str, methods: list[str]) -> None:
    """A method's points with their intervals, beside those of others so that equal points can be told apart."""
    method = points["method"].iloc[0]
    # However many there are, the points of a budget stay by themselves.
    beside = min(1.02, 1.25 ** (1 / len(methods))) ** (methods.index(method) - len(methods) / 2)
    ends = [np.maximum(0, points[name] - points["low"]), np.maximum(0, points["high"] - points[name])]
    axis.errorbar(points["bytes"] * beside, points[name], ends, **style_of(method, methods))


def bytes_axis(axis: Axes, sizes: pd.Series, bits: int | None) -> None:
    """Budgets as they were asked for, on a logarithmic axis."""
    axis.set_xscale("log", base=2)
    ticks = sorted(set(sizes[sizes > 0]))
    axis.set_xticks(ticks, [str(x) for x in ticks])
    axis.set_xlabel(f"bytes of so many {tokens_in(bits)}")


def plot_kl(lines: pd.DataFrame, *, bits: int | None, title: str | None = None) -> Figure:
    """KL against bytes, with intervals."""
    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axis = figure.subplots()
    methods = methods_of(lines)
    for method in methods:
        curve(axis, lines[lines["method"] == method].sort_values("bytes"), "kl", methods)
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    bytes_axis(axis, lines["bytes"], bits)
    axis.set_ylabel("KL(full || compressed), nats")
    legend(figure, title)
    return figure


def plot_tasks(lines: pd.DataFrame, *, bits: int | None, title: str | None = None) -> Figure:
    """The average of tasks against bytes, with intervals, and that of the full cache; of each task without one."""
    shown = lines[lines["task"] == (AVERAGE if AVERAGE in set(lines["task"]) else lines["task"].iloc[0])]
    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axis = figure.subplots()
    methods = methods_of(shown)
    for method in methods:
        curve(axis, shown[shown["method"] == method].sort_values("bytes"), "value", methods)
    axis.axhline(shown.loc[shown["bytes"] == 0, "value"].iloc[0], color="gray", linestyle=":", label="full cache")
    axis.set_ylim(bottom=0)
    bytes_axis(axis, shown["bytes"], bits)
    axis.set_ylabel(f"score, {shown['task'].iloc[0]}")
    legend(figure, title)
    return figure


def plot_found(lines: pd.DataFrame, *, bits: int | None, title: str | None = None) -> Figure:
    """Values found against bytes: a panel for each task, length and time of the question."""
    asked = lines[lines["question"] != ""]
    kinds = list(asked.groupby(["task", "length", "question"], sort=False))
    columns = min(3, len(kinds))
    rows = -(-len(kinds) // columns)
    methods = methods_of(lines)
    figure = Figure(figsize=(max(5.0, 3.1 * columns), 1.2 + 2.4 * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for axis in panels[len(kinds) :]:
        axis.set_axis_off()
    for axis, ((task, length, question), points) in zip(panels, kinds, strict=False):
        full = lines[(lines["task"] == task) & (lines["length"] == length) & (lines["bytes"] == 0)].iloc[0]
        axis.axhline(full["share"], color="0.5", linestyle="--", linewidth=1, label="full cache")
        for method in (x for x in methods if x in set(points["method"])):
            curve(axis, points[points["method"] == method].sort_values("bytes"), "share", methods)
        note = f"n = {full['n']}" if full["signal"] else "no signal"
        axis.set_title(f"{task}, {length} tokens,\n{question}, {note}")
        axis.set_ylim(-0.05, 1.05)
        bytes_axis(axis, points["bytes"], bits)
    figure.supylabel("values found", fontsize=8)
    legend(figure, title)
    return figure


def plot_depths(lines: pd.DataFrame, *, bits: int | None = None) -> Figure | None:
    """Share found by depth and length, of single needles: a panel for each budget and method, asked afterwards."""
    lines = lines[(lines["task"] == "single") & (lines["question"] == "unseen")]
    if lines.empty:
        return None
    methods, budgets, lengths = methods_of(lines), sorted(set(lines["bytes"])), sorted(set(lines["length"]))
    figure = Figure(figsize=(1.5 + 1.9 * len(budgets), 0.7 + 1.25 * len(methods)), layout="constrained")
    panels = figure.subplots(len(methods), len(budgets), squeeze=False, sharex=True, sharey=True)
    for line, method in zip(panels, methods, strict=True):
        for axis, size in zip(line, budgets, strict=True):
            chosen = lines[(lines["method"] == method) & (lines["bytes"] == size)]
            shares = chosen.pivot(index="length", columns="band", values="share")
            shares = shares.reindex(index=lengths, columns=range(BANDS)).to_numpy(float)
            axis.patch.set(facecolor="0.5", alpha=0.3)
            axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for (row, column), share in np.ndenumerate(shares):
                if not np.isnan(share):
                    text = axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6)
                    text.set_color(ink(mpl.colormaps["RdYlGn"](float(share))))
            axis.set_xticks(range(BANDS), [f"{(band + 0.5) / BANDS:.1f}" for band in range(BANDS)])
            axis.set_yticks(range(len(lengths)), [str(length) for length in lengths])
            if method == methods[0]:
                axis.set_title(f"bytes of {size}")
            if method == methods[-1]:
                axis.set_xlabel("depth")
        line[0].set_ylabel(method.replace("/", "/\n"), fontsize=6)
    figure.suptitle("% of single needles found, by depth and tokens of context; grey: not measured", fontsize=8)
    return figure


def ink(ground: tuple[float, float, float, float]) -> str:
    """Black or white, whichever stands out more from a ground: by its relative luminance, as WCAG defines it."""
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in ground[:3]]
    return "black" if np.dot(linear, (0.2126, 0.7152, 0.0722)) > 0.179 else "white"


def plot_gaps(rows: list[dict[str, Any]], *, title: str | None = None) -> Figure:
    """Evicted mass, direction and error by layer, a colour for each measurement."""
    figure = Figure(figsize=(9, 2.7), layout="constrained")
    axes = figure.subplots(1, 3)
    for index, row in enumerate(rows):
        name = f"{row['policy']}, {row['correction']}, {row['budget']} retained"
        for axis, field in zip(axes, ("evicted_mass", "cosine", "corrected"), strict=True):
            axis.plot(row["layers"], row["by_layer"][field], color=f"C{index}", label=name)
        axes[2].plot(row["layers"], row["by_layer"]["plain"], color=f"C{index}", linestyle=":")
    axes[0].set_title("evicted mass $w_E$")
    axes[1].set_title("direction $\\cos(o_E, o_R)$")
    axes[2].set_title("relative error; dotted: uncorrected")
    axes[1].axhline(0, color="0.6", linewidth=0.8)
    for axis in axes:
        axis.set_xlabel("layer")
    legend(figure, title)
    return figure


def legend(figure: Figure, title: str | None = None) -> None:
    """One legend below all panels, each name once; and a title above them."""
    named = {
        name: handle for axis in figure.axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=7)
    if title is not None:
        titled(figure, title)

"""Plots of a summary: values found against bytes, depth by length, KL against bytes, the gap by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure

from momentkv.evaluation.gather import BANDS, DEFAULT_METHOD
from momentkv.evaluation.needles_report import Row

__all__ = ["draw"]

Method = tuple[str, str]


def draw(summary: dict[str, Any], folder: Path, *, ground: str = "white") -> dict[str, Path]:
    """Write the plots that a summary has data for; paths by name.

    The same summary gives the same files: no dates, and identifiers from a fixed salt. For pages that are light or
    dark, ``ground`` is ``"light"`` or ``"dark"``: the plots then have no ground of their own, and that word in their
    names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, Path] = {}
    style = mpl.style.library["dark_background"] if ground == "dark" else {}
    suffix = "" if ground == "white" else f"-{ground}"
    with mpl.rc_context({**style, "svg.hashsalt": "momentkv", "font.size": 8}):
        for name, figure in (
            ("found", plot_found(summary["needles"])),
            ("depths", plot_depths(summary["depths"])),
            ("kl", plot_kl(summary["fidelity"])),
            ("gap", plot_gaps(summary["gap"])),
        ):
            if figure is not None:
                path = folder / f"report-{name}{suffix}.svg"
                figure.savefig(path, metadata={"Date": None}, transparent=bool(suffix))
                drawn[name] = path
    return drawn


def called(method: Method) -> str:
    """A method in legends."""
    policy, correction = method
    return f"default ({policy}, {correction})" if method == DEFAULT_METHOD else f"{policy}, {correction}"


def methods_of(rows: list[Row]) -> list[Method]:
    """All compressed methods; the default first."""
    found = dict.fromkeys((row["policy"], row["correction"]) for row in rows if row["bytes"] is not None)
    return sorted(found, key=lambda method: method != DEFAULT_METHOD)


def plot_found(rows: list[Row]) -> Figure | None:
    """Values found against bytes: a panel for each task, length and time of the question that has a signal."""
    kinds = list(dict.fromkeys((x["task"], x["length"], x["question"]) for x in rows if x["question"] and x["signal"]))
    if not kinds:
        return None
    methods = methods_of(rows)
    columns = min(3, len(kinds))
    lines = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.1 * columns, 0.6 + 2.5 * lines), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
    for axis in panels[len(kinds) :]:
        axis.set_axis_off()
    for axis, (task, length, question) in zip(panels, kinds, strict=False):
        chosen = [x for x in rows if (x["task"], x["length"]) == (task, length)]
        full = next(x for x in chosen if x["bytes"] is None)
        axis.axhline(full["share"], color="0.5", linestyle="--", linewidth=1, label="full cache")
        for index, method in enumerate(methods):
            points = [x for x in chosen if (x["policy"], x["correction"]) == method and x["question"] == question]
            if not points:
                continue
            shares = np.array([x["share"] for x in points])
            ends = np.array([[x["low"] for x in points], [x["high"] for x in points]])
            axis.errorbar(
                [x["bytes"] * 1.03 ** (index - len(methods) / 2) for x in points],
                shares,
                np.maximum(0, (ends - shares) * [[-1], [1]]),
                color=f"C{index}",
                marker="o",
                markersize=3,
                linewidth=2 if method == DEFAULT_METHOD else 1,
                elinewidth=0.7,
                label=called(method),
            )
        axis.set_title(f"{task}, {length} tokens,\n{question}, n = {full['n']}")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_ylim(-0.05, 1.05)
        axis.set_xlabel("bytes, in tokens for each KV head")
    figure.supylabel("values found", fontsize=8)
    legend(figure)
    return figure


def plot_depths(rows: list[Row]) -> Figure | None:
    """Share found by depth and length, of single needles: a panel for each budget and method, asked afterwards."""
    rows = [x for x in rows if x["task"] == "single" and x["question"] == "unseen"]
    methods = methods_of(rows)
    budgets = sorted({x["bytes"] for x in rows})
    lengths = sorted({x["length"] for x in rows})
    if not rows:
        return None
    figure = Figure(figsize=(1.5 + 1.9 * len(budgets), 0.7 + 1.25 * len(methods)), layout="constrained")
    panels = figure.subplots(len(methods), len(budgets), squeeze=False, sharex=True, sharey=True)
    for line, method in zip(panels, methods, strict=True):
        for axis, size in zip(line, budgets, strict=True):
            shares = np.full((len(lengths), BANDS), np.nan)
            for x in rows:
                if (x["policy"], x["correction"]) == method and x["bytes"] == size:
                    shares[lengths.index(x["length"]), x["band"]] = x["share"]
            axis.patch.set(facecolor="0.5", alpha=0.3)
            axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for (row, column), share in np.ndenumerate(shares):
                if not np.isnan(share):
                    axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6, color="black")
            axis.set_xticks(range(BANDS), [f"{(band + 0.5) / BANDS:.1f}" for band in range(BANDS)])
            axis.set_yticks(range(len(lengths)), [str(length) for length in lengths])
            if method == methods[0]:
                axis.set_title(f"bytes of {size} tokens")
            if method == methods[-1]:
                axis.set_xlabel("depth")
        line[0].set_ylabel(called(method).replace("default (", "default\n(").replace(", ", ",\n"), fontsize=6)
    figure.suptitle("% of single needles found, by depth and tokens of context; grey: not measured", fontsize=8)
    return figure


def plot_kl(rows: list[Row]) -> Figure | None:
    """KL against bytes."""
    if not rows:
        return None
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axis = figure.subplots()
    for index, method in enumerate(methods_of(rows)):
        points = [x for x in rows if (x["policy"], x["correction"]) == method]
        axis.plot(
            [x["bytes"] for x in points],
            [x["kl"] for x in points],
            color=f"C{index % 10}",
            linestyle="-" if index < 10 else "--",
            linewidth=2 if method == DEFAULT_METHOD else 1,
            marker="o",
            markersize=3,
            label=called(method),
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_xlabel("bytes, in tokens for each KV head")
    axis.set_ylabel("KL(full || compressed), nats")
    legend(figure)
    return figure


def plot_gaps(rows: list[Row]) -> Figure | None:
    """Evicted mass, direction and error by layer, a colour for each measurement."""
    if not rows:
        return None
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
    legend(figure)
    return figure


def legend(figure: Figure) -> None:
    """One legend below all panels, each name once."""
    named = {
        name: handle for axis in figure.axes for handle, name in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=2, frameon=False, fontsize=7)

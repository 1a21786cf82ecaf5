"""Draws the pictures of the site from the results in docs/data, and from the memory planner.

Run: python docs/figures/pictures.py [--output docs/assets]

- heads.json is made by docs/figures/heads.py;
- gap.json by momentkv evaluate gap --text compound --budget 128 --policy momentkv --output docs/data/gap.json;
- held-out-smollm2.json and held-out-qwen.json by the commands in docs/held-out.md#held-out;
- summaries-smollm2.json and summaries-qwen.json by those in docs/parts.md#summaries;
- rankings.json by docs/figures/rankings.py;
- bits.json by the command in docs/what-we-tried.md#auto.

Each picture is drawn twice, for light and for dark pages.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.patches
import numpy as np
from bits import DATA, MODELS, READINGS, by_library, cases
from matplotlib.figure import Figure

from momentkv.evaluation.lines import fidelity_lines
from momentkv.plan import KNOWN, plan

DOCS = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Theme:
    """Colours of a picture, the same as those of the figure in docs/explore.md."""

    name: str
    ink: str
    faint: str
    exact: str
    retained: str
    evicted: str
    order_1: str
    summaries: str


THEMES = (
    Theme("light", "#333333", "#bbbbbb", "#1a1a1a", "#c62828", "#1565c0", "#c2410c", "#1b7a34"),
    Theme("dark", "#dddddd", "#666666", "#f5f5f5", "#ff8a80", "#82b1ff", "#ffab70", "#7ee2a0"),
)


def main() -> None:
    """Draw everything."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=DOCS / "assets")
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Theme], Figure]] = {
        "head-directions": draw_heads,
        "directional-gap": draw_gap,
        "mass-direction": draw_mass_direction,
        "kl-bytes": draw_corrections,
        "held-out": draw_held_out,
        "memory": draw_memory,
        "rankings": draw_rankings,
        "bits": draw_bits,
    }
    for name, draw in pictures.items():
        for theme in THEMES:
            style = {
                "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.faint,
                "xtick.color": theme.ink, "ytick.color": theme.ink, "axes.titlesize": 10, "font.size": 9.5,
                "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": name, "legend.frameon": False,
            }  # fmt: skip
            with mpl.rc_context(style):
                draw(theme).savefig(folder / f"{name}-{theme.name}.svg", transparent=True, metadata={"Date": None})


def read(name: str) -> Any:
    """A result in docs/data."""
    return json.loads((DOCS / "data" / name).read_text(encoding="utf-8"))


def draw_heads(theme: Theme) -> Figure:
    """Outputs of two heads for every query, each in its own plane, the exact one at (1, 0)."""
    data = read("heads.json")
    budget = data["budgets"].index(128)
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, head in zip(figure.subplots(1, 2), data["heads"], strict=True):
        points = head["points"][budget]
        corrected = {name: np.asarray(each["out"]) for name, each in points["corrected"].items()}
        for label, xy, colour, marker in (
            ("evicted  $o_E$", np.asarray(points["evicted"]), theme.evicted, "x"),
            ("retained  $o_R$ (plain eviction)", np.asarray(points["retained"]), theme.retained, ">"),
            ("corrected, order 1", corrected["order 1"], theme.order_1, "s"),
            ("corrected, summaries", corrected["summaries"], theme.summaries, "o"),
        ):
            axis.scatter(
                *xy.T, s=22, c=colour, marker=marker, alpha=0.8, linewidths=1 if marker == "x" else 0, label=label
            )
        axis.annotate("", (1, 0), (0, 0), arrowprops={"arrowstyle": "-|>", "color": theme.exact, "lw": 2})
        axis.annotate("exact $o$", (0.5, 0), (0, -14), textcoords="offset points", ha="center", color=theme.exact)
        axis.axhline(0, color=theme.faint, lw=0.6, zorder=0)
        axis.axvline(0, color=theme.faint, lw=0.6, zorder=0)
        axis.set_aspect("equal", adjustable="datalim")
        axis.set_title(f"layer {head['layer']}, head {head['head']}")
        axis.set_xlabel("along the exact output")
    figure.axes[0].set_ylabel("across it, towards $o_R$")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def draw_mass_direction(theme: Theme) -> Figure:
    """Evicted mass against direction, one dot a head, and what both do to the output."""
    heads = {name: np.asarray(x).ravel() for name, x in read("gap.json")["by_layer_and_head"].items()}
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    dots = left.scatter(
        heads["evicted_mass"], heads["cosine"], c=np.log10(heads["plain"]), s=18,
        cmap="viridis_r" if theme.name == "light" else "viridis", linewidths=0,
    )  # fmt: skip
    bar = figure.colorbar(dots, ax=left, ticks=np.log10([0.01, 0.1, 1]))
    bar.ax.set_yticklabels(["1 %", "10 %", "100 %"])
    bar.ax.set_title("error of\nplain eviction", fontsize=8)
    bar.outline.set_visible(False)
    left.axhline(0, color=theme.faint, lw=0.6, zorder=0)
    left.set_xscale("log")
    left.set_xlabel("evicted mass  $w_E$")
    left.set_ylabel(r"$\cos(o_E, o_R)$")
    left.set_title("mass against direction")
    right.scatter(heads["evicted_mass"], heads["plain"], s=18, c=theme.retained, linewidths=0, label="plain eviction")
    right.scatter(heads["evicted_mass"], heads["corrected"], s=12, c=theme.order_1, marker="s", linewidths=0,
                  label="corrected, order 1")  # fmt: skip
    ends = np.asarray([heads["evicted_mass"].min(), 1.0])
    right.plot(ends, np.sqrt(2) * ends, color=theme.ink, lw=0.8, label=r"$\sqrt{2}\, w_E$: orthogonal, equally long")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("evicted mass  $w_E$")
    right.set_ylabel("relative error of the output")
    right.set_title("mass against error")
    right.legend(fontsize=8)
    return figure


def draw_gap(theme: Theme) -> Figure:
    """Evicted mass, direction and error by layer; lines are medians over the heads, bands the middle 80 %."""
    gap = read("gap.json")
    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    axes = [*upper.subplots(1, 2), lower.subplots()]
    panels = (
        ("evicted mass  $w_E$", [("evicted_mass", theme.evicted, "o", "")]),
        (r"direction  $\cos(o_E, o_R)$", [("cosine", theme.evicted, "o", "")]),
        (
            "relative error of the output",
            [("plain", theme.retained, ">", "plain eviction"), ("corrected", theme.order_1, "s", "corrected, order 1")],
        ),
    )
    for axis, (title, curves) in zip(axes, panels, strict=True):
        for name, colour, marker, label in curves:
            low, median, high = np.quantile(gap["by_layer_and_head"][name], [0.1, 0.5, 0.9], axis=-1)
            axis.fill_between(gap["layers"], low, high, color=colour, alpha=0.18, linewidth=0)
            axis.plot(gap["layers"], median, color=colour, marker=marker, ms=3, label=label or None)
        axis.set_title(title)
        axis.set_xlabel("layer")
    axes[0].set_ylim(bottom=0)
    axes[1].axhline(0, color=theme.faint, lw=0.8, zorder=0)
    axes[2].set_ylim(bottom=0)
    axes[2].legend()
    return figure


KL_TICKS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def draw_held_out(theme: Theme) -> Figure:
    """KL against bytes on held-out texts."""
    return draw_kl(
        "held-out",
        (
            ("snapkv/none", "SnapKV", theme.retained, ">-"),
            ("momentkv/order-1", "MomentKV (the paper)", theme.order_1, "s-"),
            ("expected-attention/none@4", "expected attention, 4 bits", theme.retained, "<--"),
            ("default", "momentkv", theme.evicted, "D-"),
            ("default@auto", "momentkv, bits='auto'", theme.summaries, "o-"),
            ("twice@auto", "the same, read twice", theme.summaries, "o:"),
        ),
        (0.0001, 0.6),
    )


def draw_corrections(theme: Theme) -> Figure:
    """KL against bytes of one selection, a line for what stands for evicted tokens."""
    return draw_kl(
        "summaries",
        (
            ("momentkv/order-1", "order 1 (the paper)", theme.order_1, "s-"),
            ("momentkv/none", "plain eviction", theme.retained, ">-"),
            ("momentkv/summaries", "summaries", theme.summaries, "o-"),
            ("momentkv/summaries-heads", "summaries, budgets by heads", theme.evicted, "D--"),
        ),
        (0.05, 0.6),
    )


def draw_kl(kind: str, methods: Sequence[tuple[str, str, str, str]], limits: tuple[float, float]) -> Figure:
    """KL against bytes, a panel for each model, a line for each method, its label, colour and style."""
    # Small, so that its letters are still letters where a phone shrinks it.
    figure = Figure(figsize=(4.6, 3.3), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, name, title in zip(panels, ("smollm2", "qwen"), ("SmolLM2-135M", "Qwen2.5-Coder-0.5B"), strict=True):
        lines = fidelity_lines(read(f"{kind}-{name}.json")["rows"])
        for method, label, colour, style in methods:
            own = lines[lines["method"] == method]
            axis.plot(own["bytes"], own["kl"], style, color=colour, ms=4, label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        measured = sorted(set(lines["bytes"]))
        axis.set_xticks(measured, [f"{size}" for size in measured], fontsize="small")
        axis.set_yticks(KL_TICKS, [f"{tick:g}" for tick in KL_TICKS])
        axis.yaxis.set_minor_formatter("")
        axis.set_title(title)
        axis.set_ylim(*limits)
    panels[0].set_ylabel("KL to the full cache, nats")
    figure.supxlabel("bytes, as 16-bit tokens for each KV head", fontsize="medium")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def draw_bits(theme: Theme) -> Figure:
    """KL against bits at each budget, a line for each text, with what the rule chooses."""
    measured = [
        (model, size) for model in MODELS for size in sorted({case["bytes_as_tokens"] for case in cases(model, "once")})
    ]
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    panels = figure.subplots(len(READINGS), len(measured), sharey=True, sharex=True)
    for row, readings in zip(panels, READINGS, strict=True):
        for axis, (model, size) in zip(row, measured, strict=True):
            for case in cases(model, readings):
                if case["bytes_as_tokens"] == size:
                    kl = {int(bits): x for bits, x in case["kl"].items()}
                    axis.plot(kl.keys(), kl.values(), color=theme.faint, lw=1, zorder=1)
                    axis.plot(by_library(case), kl[by_library(case)], "o", color=theme.summaries, ms=4, alpha=0.8)
            axis.set_yscale("log")
            axis.set_xticks(DATA["bits"])
            if readings == "once":
                axis.set_title(f"{MODELS[model]}, {size}")
        row[0].set_ylabel(f"read {readings}: KL")
    figure.supxlabel("bits", fontsize="medium")
    return figure


def draw_rankings(theme: Theme) -> Figure:
    """The ranking with the least error of every KV head, stronger where the next one is further behind."""
    data = read("rankings.json")
    colours = {
        "expected-attention": (theme.summaries, "expected attention"),
        "snapkv": (theme.evicted, "observed attention (SnapKV)"),
        "novelty": (theme.order_1, "novelty"),
    }
    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    for axis, model in zip(figure.subplots(len(data["models"]), 1), data["models"], strict=True):
        errors = np.asarray([model["errors"][name] for name in colours])
        best, second = np.sort(errors, axis=0)[:2]
        # A tenth ahead is as strong as it gets.
        lead = np.clip((second / best - 1) / 0.1, 0.15, 1)
        winners = np.asarray([mpl.colors.to_rgb(colour) for colour, _ in colours.values()])[errors.argmin(0)]
        axis.imshow(np.concatenate([winners, lead[..., None]], axis=-1).swapaxes(0, 1), aspect="auto")
        counts = np.bincount(errors.argmin(0).ravel(), minlength=len(colours))
        axis.set_title("{}: {}, {} and {} heads".format(model["name"], *counts))
        axis.set_yticks(range(errors.shape[2]))
        axis.set_ylabel("KV head")
        axis.spines[:].set_visible(False)
    axis.set_xlabel("layer")
    figure.legend(
        handles=[mpl.patches.Patch(color=colour, label=label) for colour, label in colours.values()],
        loc="outside upper center",
        ncols=3,
        fontsize="small",
        columnspacing=1,
    )
    return figure


def draw_memory(theme: Theme) -> Figure:
    """What momentkv plan says of Llama-3.1-8B: bytes by context, and what the bytes of a budget are."""
    shape, gib, mib = KNOWN["Llama-3.1-8B"], 2**30, 2**20
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    contexts = 2 ** np.arange(10, 18)
    left.plot(
        contexts, [plan(shape, int(n), int(n)).full / gib for n in contexts], color=theme.retained, label="full cache"
    )
    for budget, style in ((4096, "-"), (1024, "--"), (256, ":")):
        totals = [plan(shape, int(n), budget).total / gib for n in contexts]
        left.plot(contexts, totals, style, color=theme.summaries, label=f"budget {budget:,}")
    left.set_xscale("log", base=2)
    left.set_yscale("log", base=2)
    left.xaxis.set_major_formatter(lambda n, _: f"{n / 1024:.0f}k")
    left.yaxis.set_major_formatter(lambda x, _: f"{x:g} GiB" if x >= 1 else f"{1024 * x:.0f} MiB")
    left.set_xlabel("context, tokens")
    left.set_title("Llama-3.1-8B, bfloat16: bytes of the cache")
    left.legend()
    budgets = (128, 256, 512, 1024)
    plans = [plan(shape, 131072, budget) for budget in budgets]
    parts = {
        "retained tokens": ([x.retained_bytes for x in plans], theme.evicted),
        "block of 32 waiting": ([x.waiting_bytes for x in plans], theme.faint),
        "summaries, query statistics": ([x.state_bytes + x.query_bytes for x in plans], theme.summaries),
        "positions and scores": ([x.bookkeeping_bytes for x in plans], theme.order_1),
    }
    below = np.zeros(len(budgets))
    for name, (sizes, colour) in parts.items():
        height = np.asarray(sizes) / mib
        right.bar([f"{x:,}" for x in budgets], height, bottom=below, color=colour, width=0.6, label=name)
        below += height
    for place, (total, each) in enumerate(zip(below, plans, strict=True)):
        right.annotate(f"{each.share:.2%}", (place, total), (0, 3), textcoords="offset points", ha="center")
    right.set_xlabel("budget, tokens a KV head")
    right.set_ylabel("MiB")
    right.set_title("at 131,072 tokens, and the share of the full cache")
    right.legend(loc="upper left")
    return figure


if __name__ == "__main__":
    main()

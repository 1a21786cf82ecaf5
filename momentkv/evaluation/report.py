"""Results as JSON, as a terminal table and as a plot."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["environment", "fidelity_table", "plot_fidelity", "progress_bar", "read_json", "write_json"]

Row = dict[str, Any]


def progress_bar(console: Console) -> Progress:
    """The progress bar of every command."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def environment() -> dict[str, str]:
    """Versions and the kind of machine that a result was measured with."""
    import torch
    import transformers

    return {
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_json(path: str | Path, content: dict[str, Any]) -> Path:
    """Write a result, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def read_json(path: str | Path) -> dict[str, Any]:
    """Read what `write_json` wrote."""
    content: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return content


def average(rows: list[Row]) -> dict[tuple[int, str, str], Row]:
    """Mean over texts of each (budget in bytes, policy, correction)."""
    groups: dict[tuple[int, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["bytes_as_tokens"], row["policy"], row["correction"]].append(row)
    averaged = {}
    for key, group in groups.items():
        kls = [row["kl"] for row in group]
        averaged[key] = {
            "kl": mean(kls),
            "kl_min": min(kls),
            "kl_max": max(kls),
            "kl_se": stdev(kls) / len(kls) ** 0.5 if len(kls) > 1 else 0.0,
            "head_error": mean(row["head_error"] for row in group),
            "head_error_p90": mean(row["head_error_p90"] for row in group),
            "head_error_p99": mean(row["head_error_p99"] for row in group),
            "top1": mean(row["top1"] for row in group),
            "nll_change": mean(row["nll_change"] for row in group),
            "tokens": group[0]["budget"],
            "nbytes": group[0]["nbytes"],
            "texts": len(group),
        }
    return averaged


def fidelity_table(rows: list[Row], *, title: str) -> Table:
    """One line a policy and correction, one group of columns a budget."""
    averaged = average(rows)
    budgets = sorted({key[0] for key in averaged})
    table = Table(title=title, title_style="bold", header_style="bold")
    table.add_column("policy")
    table.add_column("correction")
    for budget in budgets:
        table.add_column(f"KL @ {budget}", justify="right", no_wrap=True)
        table.add_column("top-1", justify="right", no_wrap=True)
        table.add_column("head error", justify="right", no_wrap=True)
    best = {budget: min(x["kl"] for key, x in averaged.items() if key[0] == budget) for budget in budgets}
    previous = None
    for policy, correction in dict.fromkeys((key[1], key[2]) for key in averaged):
        cells = []
        for budget in budgets:
            x = averaged.get((budget, policy, correction))
            if x is None:
                cells += ["", "", ""]
                continue
            style = "bold green" if x["kl"] == best[budget] else ""
            cells += [f"[{style}]{x['kl']:.3f}[/]" if style else f"{x['kl']:.3f}"]
            cells += [f"{x['top1']:.0%}", f"{x['head_error']:.3f}"]
        if previous not in (None, policy):
            table.add_section()
        table.add_row(policy if policy != previous else "", correction, *cells)
        previous = policy
    return table


def plot_fidelity(rows: list[Row], path: str | Path, *, title: str) -> Path:
    """KL against bytes, one line a policy and correction."""
    from matplotlib.figure import Figure

    averaged = average(rows)
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axis = figure.subplots()
    policies, corrections = (list(dict.fromkeys(key[part] for key in averaged)) for part in (1, 2))
    several = len(policies) > 1
    styles = {"none": ":", "order 0": "-.", "order 1": "--", "summaries": "-"}
    for policy, correction in dict.fromkeys((key[1], key[2]) for key in averaged):
        points = sorted((x["nbytes"], x["kl"]) for key, x in averaged.items() if key[1:] == (policy, correction))
        # Colours tell policies apart, or corrections where there is one policy.
        colour = policies.index(policy) if several else corrections.index(correction)
        axis.plot(
            [nbytes / 2**20 for nbytes, _ in points],
            [kl for _, kl in points],
            styles.get(correction, "-") if several else "-",
            color=f"C{colour}",
            marker="o",
            markersize=3,
            label=f"{policy}, {correction}" if several else correction,
        )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.set_xlabel("cache, MiB (moments counted)")
    axis.set_ylabel("KL(full || compressed), nats")
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside right center", frameon=False, fontsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path

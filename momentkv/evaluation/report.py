"""Results as JSON, as a terminal table and as a plot."""

from __future__ import annotations

import json
import platform
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = [
    "bits_of",
    "environment",
    "fidelity_table",
    "plot_fidelity",
    "progress_bar",
    "read_json",
    "show",
    "tokens_in",
    "write_json",
]

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


def show(console: Console, table: Table) -> None:
    """Print a table that cuts nothing: it may be wider than the terminal."""
    needed = least_width(table)
    wide = console if needed <= console.width else Console(file=console.file, width=needed)
    wide.print(table)


def least_width(table: Table) -> int:
    """Columns that a table without padding needs: whole cells where they may not be wrapped, else whole words."""
    widths = []
    for column in table.columns:
        cells = [str(cell) for cell in (column.header, *column.cells)]
        pieces = cells if column.no_wrap else " ".join(cells).split()
        widths.append(max(map(cell_len, pieces)))
    return sum(widths) + len(widths) - 1 + 2 * table.show_edge


def environment() -> dict[str, str]:
    """Versions, and the kind of machine, with which a result was measured."""
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


def bits_of(protocol: dict[str, Any]) -> int | None:
    """Bits of the keys and values that budgets were counted in; None, as stored, in results older than ``--bytes``."""
    bits: int | None = protocol.get("bytes")
    return bits


def tokens_in(bits: int | None) -> str:
    """How tokens that bytes are counted in are called.

    Examples
    --------
    >>> tokens_in(16), tokens_in(None)
    ('16-bit tokens', 'tokens as the model stores them')
    """
    return "tokens as the model stores them" if bits is None else f"{bits}-bit tokens"


def average(rows: list[Row]) -> dict[tuple[int, str, str], Row]:
    """Mean over texts of each (budget in bytes, policy, correction)."""
    groups: dict[tuple[int, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["bytes_as_tokens"], row["policy"], row["correction"]].append(row)
    averaged = {}
    for key, group in groups.items():
        kls = [row["kl"] for row in group]
        errors = [row["head_error"] for row in group if row.get("head_error") is not None]
        last = [row["kl_of_quarters"][-1] for row in group if row.get("kl_of_quarters")]
        averaged[key] = {
            "kl": mean(kls),
            "kl_last": mean(last) if last else None,
            "kl_min": min(kls),
            "kl_max": max(kls),
            "kl_se": stdev(kls) / len(kls) ** 0.5 if len(kls) > 1 else 0.0,
            "head_error": mean(errors) if errors else None,
            "top1": mean(row["top1"] for row in group),
            "nll_change": mean(row["nll_change"] for row in group),
            "tokens": group[0]["budget"],
            "nbytes": group[0]["nbytes"],
            "texts": len(group),
        }
    return averaged


def fidelity_table(rows: list[Row], *, title: str, bits: int | None) -> Table:
    """One line for each budget, policy and correction; the best of each budget stands out."""
    averaged = average(rows)
    table = Table(title=title, title_style="bold", header_style="bold", box=SIMPLE_HEAD, padding=(0, 0))
    decoded = any(x["kl_last"] is not None for x in averaged.values())
    beside, about = ("last 1/4", "its KL") if decoded else ("error", "of heads")
    for column in ("bytes", "policy", "correction", "kept", "KL", "top-1", "NLL", beside):
        table.add_column(column, justify="left" if column in ("policy", "correction") else "right", no_wrap=True)
    best: dict[int, float] = {}
    for (budget, _, _), x in averaged.items():
        best[budget] = min(best.get(budget, x["kl"]), x["kl"])
    shown: tuple[int, str] | None = None
    for (budget, policy, correction), x in sorted(averaged.items(), key=lambda item: item[0][0]):
        if shown is not None and shown[0] != budget:
            table.add_section()
        table.add_row(
            str(budget) if shown is None or shown[0] != budget else "",
            policy if shown != (budget, policy) else "",
            correction,
            str(x["tokens"]),
            f"{x['kl']:.3f}" + (f" ±{x['kl_se']:.3f}" if x["texts"] > 1 else ""),
            f"{x['top1']:.0%}",
            f"{x['nll_change']:+.3f}",
            "" if (number := x["kl_last" if decoded else "head_error"]) is None else f"{number:.3f}",
            style="bold green" if x["kl"] == best[budget] else "",
        )
        shown = budget, policy
    table.caption = (
        f"bytes: of so many {tokens_in(bits)} per KV head, correction included; ±: standard error over texts; "
        f"{beside}: {about}"
    )
    return table


def plot_fidelity(rows: list[Row], path: str | Path, *, title: str, bits: int | None) -> Path:
    """KL against bytes, one line for each policy and correction."""
    from matplotlib.figure import Figure

    averaged = average(rows)
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axis = figure.subplots()
    policies, corrections = (list(dict.fromkeys(key[part] for key in averaged)) for part in (1, 2))
    several = len(policies) > 1
    styles = {"none": ":", "order 0": "-.", "order 1": "--", "summaries": "-"}
    for policy, correction in dict.fromkeys((key[1], key[2]) for key in averaged):
        points = sorted((key[0], x["kl"]) for key, x in averaged.items() if key[1:] == (policy, correction))
        # Colours tell policies apart, or corrections where there is one policy.
        colour = policies.index(policy) if several else corrections.index(correction)
        axis.plot(
            [tokens for tokens, _ in points],
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
    axis.set_xlabel(f"bytes, in {tokens_in(bits)} per KV head (moments counted)")
    axis.set_ylabel("KL(full || compressed), nats")
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside right center", frameon=False, fontsize=7)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path

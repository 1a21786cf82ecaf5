"""Results as tables on a terminal."""

from __future__ import annotations

import pandas as pd
from rich.table import Table

from momentkv.evaluation.report import empty_table, tokens_in
from momentkv.evaluation.task_lines import AVERAGE

__all__ = ["fidelity_table", "needles_table", "tasks_table"]


def fidelity_table(lines: pd.DataFrame, *, title: str, bits: int | None) -> Table:
    """One line for each budget and method; the best of each budget stands out."""
    decoded = bool(lines["kl_last"].notna().any())
    beside, about, field = ("last 1/4", "its KL", "kl_last") if decoded else ("error", "of heads", "head_error")
    table = empty_table(title, ["bytes", "method", "kept", "KL", "95 %", "top-1", "NLL", beside])
    for size, group in lines.groupby("bytes"):
        if table.row_count:
            table.add_section()
        for place, x in enumerate(group.itertuples()):
            number = getattr(x, field)
            table.add_row(
                "" if place else str(size),
                x.method,
                str(x.kept),
                f"{x.kl:.3f}",
                f"{x.low:.3f}-{x.high:.3f}" if x.texts > 1 else "",
                f"{x.top1:.0%}",
                f"{x.nll_change:+.3f}",
                "" if pd.isna(number) else f"{number:.3f}",
                style="bold green" if x.kl == group["kl"].min() else "",
            )
    table.caption = (
        f"bytes: of so many {tokens_in(bits)} per KV head, correction included; 95 %: of the mean over texts; "
        f"{beside}: {about}"
    )
    return table


def needles_table(lines: pd.DataFrame, *, title: str, bits: int | None) -> Table:
    """One line for each task, length, question, budget and method, after that of the full cache."""
    wrote = bool(lines["generated"].notna().any())
    columns = ["question", "bytes", "method", "found", "95 %", "n", "tokens", *["wrote"] * wrote, "NLL"]
    table = empty_table(title, columns, ("question", "method"))
    for (task, length, question), group in lines.groupby(["task", "length", "question"], sort=False):
        if table.row_count:
            table.add_section()
        shown = None
        for place, x in enumerate(group.itertuples()):
            cells = [
                "" if place else question or f"{task}, {length}:",
                "" if x.bytes in (0, shown) else str(x.bytes),
                x.method,
                f"{x.share:.0%}" if x.signal else "no signal",
                f"{100 * x.low:.0f}-{100 * x.high:.0f}" if x.signal else "",
                str(x.n),
                f"{x.tokens:.0%}",
                *["" if pd.isna(x.generated) else f"{x.generated:.0%}"] * wrote,
                f"{x.nll:.2f}",
            ]
            table.add_row(*cells)
            shown = x.bytes
    table.caption = (
        f"on top: task and tokens of context; bytes: of so many {tokens_in(bits)} per KV head, correction included; "
        "found: values of which every token is right; n: questions; "
        + ("wrote: by generation; " if wrote else "")
        + "no signal: the full cache finds less than half"
    )
    return table


def tasks_table(lines: pd.DataFrame, *, title: str, bits: int | None) -> Table:
    """One line for each budget and method, a column for each task; the best of each budget stands out."""
    names = list(dict.fromkeys(lines["task"]))
    weak = set(lines.loc[~lines["signal"], "task"])
    # A name stands below itself, so that many tasks fit beside each other.
    heads = [(f"({name})" if name in weak else name).replace("_", "\n") for name in names]
    table = empty_table(title, ["bytes", "method", *heads, "95 %"])
    for size, group in lines.groupby("bytes"):
        if table.row_count:
            table.add_section()
        cells = group.pivot(index="method", columns="task", values="value")
        best = cells[AVERAGE].max() if AVERAGE in cells else None
        for place, method in enumerate(dict.fromkeys(group["method"])):
            one = cells.loc[method]
            about = group[(group["method"] == method) & (group["task"] == AVERAGE)]
            ends = "" if about.empty else f"{about['low'].iloc[0]:.2f}-{about['high'].iloc[0]:.2f}"
            table.add_row(
                "" if place or not size else str(size),
                method,
                *(f"{one[name]:.2f}" for name in names),
                ends,
                style="bold green" if best is not None and one.get(AVERAGE) == best and size else "",
            )
    counts = lines.groupby("task", sort=False)["n"].agg(["min", "max"])
    documents = ", ".join(
        f"{name} {most}" if fewest == most else f"{name} {fewest} to {most}"
        for name, fewest, most in counts.itertuples()
    )
    table.caption = (
        f"bytes: of so many {tokens_in(bits)} per KV head, correction included; n: {documents}; 95 %: of the average; "
        "(in brackets): no signal, the full cache has less than half, and not in the average"
    )
    return table

"""What `momentkv plan` prints: plans and known models as tables of plain text."""

from __future__ import annotations

from collections.abc import Mapping

from momentkv.plan.memory import Plan
from momentkv.shapes import KNOWN

__all__ = ["size", "table_of", "table_of_codes", "table_of_known"]

UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"))


def table_of(result: Plan, name: str) -> str:
    """A plan as a table of plain text, at most 60 columns wide."""
    shape = result.shape
    rows: list[list[str]] = [["", "tokens/head", "size", "of full"]]

    def row(label: str, tokens: int | None, number: int) -> None:
        count = "" if tokens is None else f"{tokens:,}"
        rows.append([label, count, size(number), f"{number / result.full:.2%}"])

    row("full cache", result.context, result.full)
    rows.append([])
    if shape.full_layers:
        row("retained keys and values", result.retained, result.retained_bytes)
        row("block before eviction", result.waiting, result.waiting_bytes)
        row("positions and scores", None, result.bookkeeping_bytes)
    if result.state_bytes:
        row(f"correction: {result.correction}", None, result.state_bytes)
    if result.query_bytes:
        row("query statistics", None, result.query_bytes)
    if result.sliding_bytes:
        row("sliding-window layers", min(result.context, shape.sliding_window - 1), result.sliding_bytes)
    rows.append([])
    row("total", result.retained + result.waiting if shape.full_layers else None, result.total)
    return "\n".join([*title_of(result, name), "", aligned(rows), "", *notes_of(result)])


def table_of_codes(plans: Mapping[str, Plan], name: str) -> str:
    """Plans of several numbers of bits, as `momentkv.plan.plan_codes` gives them, as a table of plain text."""
    first = next(iter(plans.values()))
    rows = [
        ["bits", "retained", "size", "of full"],
        ["full cache", f"{first.context:,}", size(first.full), "100.00%"],
        [],
    ]
    for bits, each in plans.items():
        rows.append([bits, f"{each.retained:,}", size(each.total), f"{each.share:.2%}"])
    asked = f"{first.asked:,} tokens at full precision" if isinstance(first.asked, int) else first.asked
    title = [name, f"{first.context:,} tokens of context, budget {asked}"]
    if not first.shape.full_layers:
        notes = ["every layer has a window: the budget changes nothing"]
    elif len({each.budget for each in plans.values()}) == 1:
        notes = ["all tokens fit as they come: no bits are chosen yet"]
    else:
        notes = [
            "which one is chosen by errors measured on what is read",
            "--bits N plans one of them, part by part",
        ]
    return "\n".join([*title, "", aligned(rows), "", shape_of(first), *notes])


def table_of_known() -> str:
    """The known models as a table of plain text."""
    rows = [["model", "layers", "q", "kv", "dim", "full", "window"]]
    for name, x in KNOWN.items():
        numbers = [x.layers, x.q_heads, x.kv_heads, x.head_dim, x.full_layers]
        rows.append([name, *map(str, numbers), f"{x.sliding_window:,}" if x.sliding_window else ""])
    notes = "q, kv: query and KV heads; dim: of a head; full: layers of\nfull attention, the others have that window"
    return f"{aligned(rows)}\n\n{notes}"


def aligned(rows: list[list[str]]) -> str:
    """Rows of cells as lines, the first column to the left and numbers to the right; an empty row is a rule."""
    widths = [max(map(len, column)) for column in zip(*filter(None, rows), strict=True)]
    lines = []
    for row in rows:
        cells = [
            x.rjust(width) if at else x.ljust(width) for at, (x, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip() if row else "-" * (sum(widths) + 2 * len(widths[1:])))
    return "\n".join(lines)


def title_of(result: Plan, name: str) -> list[str]:
    """What is planned."""
    if isinstance(result.asked, int):
        return [name, f"{result.context:,} tokens of context, {result.budget:,} retained"]
    return [
        name,
        f"{result.context:,} tokens of context",
        f"budget {result.asked}: {result.budget:,} retained per KV head",
    ]


def shape_of(result: Plan) -> str:
    """What a plan is of, in one line."""
    shape = result.shape
    of = "" if shape.full_layers == shape.layers else f"{shape.full_layers} of "
    heads = f"{shape.kv_heads} KV heads x {shape.head_dim}"
    return f"{of}{shape.layers} layers x {heads}, {result.dtype}, batch {result.batch}"


def notes_of(result: Plan) -> list[str]:
    """What is said below a plan."""
    shape = result.shape
    lines = [
        shape_of(result),
        f"{result.total:,} of {result.full:,} bytes",
        f"{result.full / result.total:,.1f} times smaller than the full cache"
        if result.total < result.full
        else "no smaller than the full cache",
    ]
    if not shape.full_layers:
        return [*lines, "every layer has a window: the budget changes nothing"]
    extra = result.equivalent_tokens - result.retained
    lines.append(
        f"the correction costs as much as {extra:.1f} more tokens/head" if extra else "plain eviction, no correction"
    )
    if result.retained + result.waiting > result.context:
        lines.append("nothing is evicted yet; room to come is counted")
    return lines


def size(number: int) -> str:
    """Bytes in binary units, two decimals.

    Examples
    --------
    >>> size(3 * 2**29), size(2**20)
    ('1.50 GiB', '1.00 MiB')
    """
    unit, name = next(((unit, name) for unit, name in UNITS if number >= unit), UNITS[-1])
    return f"{number / unit:,.2f} {name}"

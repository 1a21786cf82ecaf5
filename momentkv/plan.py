"""How much memory a cache takes: what `momentkv plan` prints, from a model's shape alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from momentkv._numbers import whole_number
from momentkv.cache.accounting import state_bytes, token_equivalents
from momentkv.cache.budget_rules import POSITION_BYTES, Share, TotalBytes, parse_budget
from momentkv.cache.config import EXACT_WINDOW, exact_tokens
from momentkv.codes import AUTO, order_bytes, pair_of_bits, record_bytes
from momentkv.policies import Policy, check_budget, get_policy
from momentkv.shapes import KNOWN, Shape, find_shape, shape_from_config
from momentkv.statistics.corrections import Correction, get_correction

__all__ = [
    "DTYPES",
    "KNOWN",
    "Plan",
    "Shape",
    "find_shape",
    "plan",
    "shape_from_config",
    "size",
    "table_of",
    "table_of_known",
]

# Bytes of one number of keys and values, by the name of its type.
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
SCORE_BYTES = 4
UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of a cache at its fullest, over all layers and rows, by what they are used for.

    Attributes
    ----------
    shape : Shape
    context, batch : int
    asked : int, float or str
        The budget as it was given.
    budget : int
        The budget in tokens per KV head.
    dtype : str
    correction : str
    retained, waiting : int
        Tokens per KV head: within the budget, and those appended since the last eviction. Their room is always there.
    full : int
        Bytes of a cache that evicts nothing.
    retained_bytes, waiting_bytes : int
        Bytes of keys and values.
    bookkeeping_bytes : int
        Bytes of positions, scores and counts of the stored tokens; with few bits, also of step sizes and deviations.
    state_bytes, query_bytes : int
        Bytes of the correction, and of the statistics of recent queries that the correction or the policy needs.
    sliding_bytes : int
        Bytes of sliding-window layers, which are not compressed.
    equivalent_tokens : float
        Tokens that could be retained instead if there were no correction.
    """

    shape: Shape
    context: int
    asked: int | float | str
    budget: int
    batch: int
    dtype: str
    correction: str
    retained: int
    waiting: int
    full: int
    retained_bytes: int
    waiting_bytes: int
    bookkeeping_bytes: int
    state_bytes: int
    query_bytes: int
    sliding_bytes: int
    equivalent_tokens: float

    @property
    def total(self) -> int:
        """Bytes of everything that the cache holds."""
        return (
            self.retained_bytes
            + self.waiting_bytes
            + self.bookkeeping_bytes
            + self.state_bytes
            + self.query_bytes
            + self.sliding_bytes
        )

    @property
    def share(self) -> float:
        """Total as a share of the full cache."""
        return self.total / self.full


def plan(
    shape: Shape,
    context: int,
    budget: int | float | str,
    *,
    correction: str | Correction = "summaries",
    batch: int = 1,
    dtype: str = "bfloat16",
    policy: str | Policy = "balanced",
    sinks: int = 1,
    window: int = 32,
    block: int = 32,
    bits: int | Sequence[int] | Literal["auto"] | None = None,
    exact_window: int = EXACT_WINDOW,
    statistics_bits: int | None = 16,
) -> Plan:
    """Bytes that a cache holds after so many tokens.

    Parameters
    ----------
    shape : Shape
        See `find_shape`.
    context : int
        Tokens read and generated so far.
    budget : int, float or str
        As `momentkv.hf.MomentCache` takes it: tokens retained per KV head, on top of which the correction comes; a
        share in (0, 1] of the context; or bytes of the whole cache, everything counted, like ``"64MiB"``.
    correction : str or Correction
        A name of `momentkv.statistics.corrections.CORRECTIONS`, or an object.
    batch : int
        Rows, each of ``context`` tokens.
    dtype : str
        Of keys and values: a name of `DTYPES`.
    policy, sinks, window, block, bits, exact_window, statistics_bits
        As in `momentkv.hf.MomentCache`, with its defaults.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If an argument is out of range, or a name is unknown.

    Notes
    -----
    Exact after a prompt and in all later steps. Memory outside the cache is not counted: while a prompt is read in one
    pass, each layer holds all of it until it is cut to the budget.

    Examples
    --------
    >>> small = plan(KNOWN["Llama-3.1-8B"], context=131072, budget=1024)
    >>> small.full / 2**30, f"{small.share:.2%}"
    (16.0, '0.83%')
    >>> plan(KNOWN["Llama-3.1-8B"], context=131072, budget="64MiB").budget
    458
    """
    sizes = (("context", context), ("batch", batch), ("block", block), ("sinks", sinks), ("window", window))
    for name, value in (*sizes, ("exact_window", exact_window)):
        whole_number(name, value)
    if not isinstance(shape, Shape):
        raise TypeError(f"shape is {shape!r}; find_shape finds that of a name or a config")
    if exact_window < 0:
        raise ValueError(f"exact_window is {exact_window}; use 0 or more tokens")
    if context < 1:
        raise ValueError(f"context is {context}; use at least 1 token")
    if batch < 1:
        raise ValueError(f"batch is {batch}; use at least 1 row")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    if block < 1:
        raise ValueError(f"block is {block}; evict at least one token at a time")
    if bits == AUTO:
        raise ValueError(
            f"bits is {bits!r}: bits are then chosen by what is read, and bytes are the budget's; leave bits out"
        )
    kind = get_correction(correction)
    asked = parse_budget(budget)
    if isinstance(asked, list):
        raise ValueError(f"budget is {budget!r}, one for each layer; plan one number, their average")
    d, itemsize = shape.head_dim, DTYPES[dtype]
    record = 2 * d * itemsize if bits is None else record_bytes(d, d, pair_of_bits(bits))
    heads = batch * shape.kv_heads * shape.full_layers
    token = 2 * d * itemsize
    score = SCORE_BYTES if get_policy(policy).observes != 0 else 0
    # Transformers' layers with a window keep one token less: the next one makes it full.
    sliding = batch * shape.kv_heads * (shape.layers - shape.full_layers)
    longest = max(shape.sliding_window - 1, 0)
    anchor = 2 * d * 4 if kind.anchored else 0
    queries = 2 * d * 4 if get_policy(policy).needs_queries else anchor
    state = state_bytes(kind, d=d, statistics_bits=statistics_bits) - anchor
    standards = 0
    if bits is not None:  # mean and deviation of keys, deviation of values
        standards = 3 * token // 2 + (order_bytes(pair_of_bits(bits)[0], d) if queries else 0)
    exact, least = exact_tokens(bits, sinks=sinks, window=window, exact_window=exact_window), sinks + window + 1
    if isinstance(asked, Share):
        tokens = asked.tokens(context, least)
    elif isinstance(asked, int):
        tokens = asked
    elif isinstance(asked, TotalBytes) and heads:
        tokens = asked.retained(
            heads=heads,
            token=record + POSITION_BYTES + score,
            exact=token + POSITION_BYTES + score,
            state=state + queries + 2 * POSITION_BYTES + standards,
            beside=sliding * longest * token,
            block=block,
            recent=exact + block,
            least=least,
            rows=batch,
        )
    else:
        tokens = least  # there is nothing to share the total among
    check_budget(tokens, sinks, window)
    retained = min(context, tokens)
    recent = exact + block  # always there; so few tokens are all in it
    waiting = block if context >= recent else recent - retained
    coded = max(0, retained - exact) if context >= recent else 0
    standards = standards if coded else 0
    bounded = sliding * min(context, longest)
    equivalent = token_equivalents(kind, d=d, itemsize=itemsize, statistics_bits=statistics_bits)
    return Plan(
        shape=shape,
        context=context,
        asked=budget,
        budget=tokens,
        batch=batch,
        dtype=dtype,
        correction=correction if isinstance(correction, str) else repr(correction),
        retained=retained,
        waiting=waiting,
        full=(heads * context + bounded) * token,
        retained_bytes=heads * ((retained - coded) * token + coded * record),
        waiting_bytes=heads * waiting * token,
        bookkeeping_bytes=heads * ((retained + waiting) * (POSITION_BYTES + score) + 2 * POSITION_BYTES + standards),
        state_bytes=heads * state,
        query_bytes=heads * queries,
        sliding_bytes=bounded * token,
        equivalent_tokens=retained + equivalent,
    )


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


def notes_of(result: Plan) -> list[str]:
    """What is said below a plan."""
    shape = result.shape
    of = "" if shape.full_layers == shape.layers else f"{shape.full_layers} of "
    lines = [
        f"{of}{shape.layers} layers x {shape.kv_heads} KV heads x {shape.head_dim}, {result.dtype}, "
        f"batch {result.batch}",
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
        lines.append("nothing is evicted yet at this context")
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

"""How much memory a cache takes, from a model's shape alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from momentkv._numbers import whole_number
from momentkv.cache.accounting import state_bytes, token_equivalents
from momentkv.cache.budget_rules import POSITION_BYTES, Share, TotalBytes, parse_budget, tokens_bought
from momentkv.cache.coded_budget import CODES
from momentkv.cache.config import EXACT_WINDOW, exact_tokens
from momentkv.codes import AUTO, USUAL, bits_as_text, order_bytes, pair_of_bits, record_bytes
from momentkv.policies import Policy, check_budget, get_policy
from momentkv.shapes import Shape
from momentkv.statistics.corrections import Correction, get_correction

__all__ = ["DTYPES", "Plan", "plan", "plan_codes"]

# Bytes of one number of keys and values, by the name of its type.
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
SCORE_BYTES = 4


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
    Exact after a prompt and in all later steps; a bound while fewer tokens have been read than the budget and a block,
    in several passes, and where heads that share a budget leave the rest of a division (a token each at most). Memory
    outside the cache is not counted: while a prompt is read in one pass, each layer holds all of it until it is cut to
    the budget.

    Examples
    --------
    >>> from momentkv.shapes import KNOWN
    >>> small = plan(KNOWN["Llama-3.1-8B"], context=131072, budget=1024)
    >>> small.full / 2**30, f"{small.share:.2%}"
    (16.0, '0.83%')
    >>> plan(KNOWN["Llama-3.1-8B"], context=131072, budget="64MiB").budget
    458
    """
    if isinstance(bits, str) and bits == AUTO:  # an array would compare its elements
        raise ValueError(
            f"bits is {bits!r}: what is read chooses them; `plan_codes` plans each number that it may choose"
        )
    costs = Costs(
        shape, context, budget, correction, batch, dtype, policy, sinks, window, block, exact_window, statistics_bits
    )
    pair = None if bits is None else pair_of_bits(bits)
    return costs.planned(costs.tokens(pair), pair)


def plan_codes(
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
    exact_window: int = EXACT_WINDOW,
    statistics_bits: int | None = 16,
) -> dict[str, Plan]:
    """What a cache holds with ``bits="auto"``: a plan for each number of bits that it may choose by what is read.

    Parameters
    ----------
    shape, context, budget, correction, batch, dtype, policy, sinks, window, block, exact_window, statistics_bits
        As in `plan`. A budget in tokens is of tokens at full precision, whose bytes are then spent on more tokens.

    Returns
    -------
    dict
        From bits as they are written, such as ``"4"`` or ``"4/3"``, to plans. While all tokens fit at full precision
        none is chosen, and all plans are alike.

    Raises
    ------
    ValueError
        If an argument is out of range, or a name is unknown.

    Examples
    --------
    >>> from momentkv.shapes import KNOWN
    >>> plans = plan_codes(KNOWN["Llama-3.1-8B"], context=131072, budget="64MiB")
    >>> {bits: each.budget for bits, each in plans.items()}
    {'3': 2231, '4/3': 1935, '4': 1708, '5/4': 1529, '5': 1385, '6': 1164, '8': 884}
    """
    costs = Costs(
        shape, context, budget, correction, batch, dtype, policy, sinks, window, block, exact_window, statistics_bits
    )
    average = costs.tokens(None, whole=True)
    if context < average + block:
        return {bits_as_text(code): costs.planned(average, None) for code in CODES}
    return {bits_as_text(code): costs.planned(costs.bought(average, code), code) for code in CODES}


class Costs:
    """What the parts of a cache cost, in bytes, from its shape and settings; the arguments are those of `plan`."""

    def __init__(
        self,
        shape: Shape,
        context: int,
        budget: int | float | str,
        correction: str | Correction,
        batch: int,
        dtype: str,
        policy: str | Policy,
        sinks: int,
        window: int,
        block: int,
        exact_window: int,
        statistics_bits: int | None,
    ) -> None:
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
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
        if block < 1:
            raise ValueError(f"block is {block}; evict at least one token at a time")
        kind = get_correction(correction)
        asked = parse_budget(budget)
        if isinstance(asked, list):
            raise ValueError(f"budget is {budget!r}, one for each layer; plan one number, their average")
        self.shape, self.context, self.batch, self.dtype, self.block = shape, context, batch, dtype, block
        self.budget, self.asked, self.sinks, self.window = budget, asked, sinks, window
        self.correction = correction if isinstance(correction, str) else repr(correction)
        d, itemsize = shape.head_dim, DTYPES[dtype]
        self.heads = batch * shape.kv_heads * shape.full_layers
        self.pair = 2 * d * itemsize
        score = SCORE_BYTES if get_policy(policy).observes != 0 else 0
        self.beside = POSITION_BYTES + score
        # Transformers' layers with a window keep one token less: the next one makes it full.
        self.sliding = batch * shape.kv_heads * (shape.layers - shape.full_layers)
        self.longest = max(shape.sliding_window - 1, 0)
        anchor = 2 * d * 4 if kind.anchored else 0
        self.queries = 2 * d * 4 if get_policy(policy).needs_queries else anchor
        self.state = state_bytes(kind, d=d, statistics_bits=statistics_bits) - anchor
        self.equivalent = token_equivalents(kind, d=d, itemsize=itemsize, statistics_bits=statistics_bits)
        self.exact_window = exact_window

    def record(self, bits: tuple[int, int] | None) -> int:
        """Bytes of the key and the value of a retained token."""
        d = self.shape.head_dim
        return self.pair if bits is None else record_bytes(d, d, bits)

    def exact(self, bits: tuple[int, int] | None) -> int:
        """Sinks and newest tokens that are retained as they came."""
        return exact_tokens(bits, sinks=self.sinks, window=self.window, exact_window=self.exact_window)

    def standards(self, bits: tuple[int, int] | None) -> int:
        """Bytes of what the codes of a head are scaled by: mean and deviation of keys, deviation of values."""
        if bits is None:
            return 0
        return 3 * self.pair // 2 + (order_bytes(bits[0], self.shape.head_dim) if self.queries else 0)

    def tokens(self, bits: tuple[int, int] | None, *, whole: bool = False) -> int:
        """Tokens that each KV head retains; ``whole`` as in `TotalBytes.tokens`."""
        least = self.sinks + self.window + 1
        if isinstance(self.asked, Share):
            tokens = self.asked.tokens(self.context, least)
        elif isinstance(self.asked, int):
            tokens = self.asked
        elif isinstance(self.asked, TotalBytes) and self.heads:
            tokens = self.asked.retained(
                heads=self.heads,
                token=self.record(bits) + self.beside,
                exact=self.pair + self.beside,
                state=self.state + self.queries + 2 * POSITION_BYTES + self.standards(USUAL if whole else bits),
                beside=self.sliding * self.longest * self.pair,
                block=self.block,
                recent=self.exact(bits) + self.block,
                least=least,
                rows=self.batch,
            )
        else:
            tokens = least  # there is nothing to share the total among
        check_budget(tokens, self.sinks, self.window)
        return tokens

    def bought(self, average: int, bits: tuple[int, int]) -> int:
        """Tokens of a few bits for the bytes of an average; of a budget in bytes, all bytes of a token count."""
        beside = self.beside if isinstance(self.asked, TotalBytes) else 0
        return tokens_bought(
            average,
            exact=self.exact(USUAL),
            token=self.pair + beside,
            record=self.record(bits) + beside,
            least=self.sinks + self.window + 1,
        )

    def planned(self, tokens: int, bits: tuple[int, int] | None) -> Plan:
        """The plan of a cache that retains so many tokens for each KV head."""
        context, heads = self.context, self.heads
        retained = min(context, tokens)
        exact = self.exact(bits)
        recent = exact + self.block  # always there; so few tokens are all in it
        waiting = self.block if context >= recent else recent - retained
        coded = max(0, retained - exact) if context >= recent else 0
        beside = (retained + waiting) * self.beside + 2 * POSITION_BYTES + (self.standards(bits) if coded else 0)
        bounded = self.sliding * min(context, self.longest)
        return Plan(
            shape=self.shape,
            context=context,
            asked=self.budget,
            budget=tokens,
            batch=self.batch,
            dtype=self.dtype,
            correction=self.correction,
            retained=retained,
            waiting=waiting,
            full=(heads * context + bounded) * self.pair,
            retained_bytes=heads * ((retained - coded) * self.pair + coded * self.record(bits)),
            waiting_bytes=heads * waiting * self.pair,
            bookkeeping_bytes=heads * beside,
            state_bytes=heads * self.state,
            query_bytes=heads * self.queries,
            sliding_bytes=bounded * self.pair,
            equivalent_tokens=retained + self.equivalent,
        )

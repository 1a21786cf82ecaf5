"""Budgets as people state them: tokens, a share of what is read, or bytes of the whole cache."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from momentkv._array import Array
from momentkv._numbers import as_python
from momentkv.cache.config import CacheConfig
from momentkv.codes import USUAL, order_bytes, record_bytes
from momentkv.statistics.moments import Moments

__all__ = ["BudgetRule", "Share", "TotalBytes", "budget_from_text", "bytes_beside", "parse_budget", "tokens_bought"]

POSITION_BYTES = 4

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMG]i?B|B)\s*")


class BudgetRule:
    """A budget that is not known in tokens before something is read."""


@dataclasses.dataclass(frozen=True)
class Share(BudgetRule):
    """A share of the tokens read, counted at every pass of several tokens.

    Parameters
    ----------
    share : float
        In (0, 1].
    """

    share: float

    def tokens(self, seen: int, least: int) -> int:
        """Tokens retained for each KV head once so many have been read; never fewer than the least possible.

        Examples
        --------
        >>> Share(0.25).tokens(1000, 34), Share(0.25).tokens(100, 34)
        (250, 34)
        """
        return max(least, round(self.share * seen))


@dataclasses.dataclass(frozen=True)
class TotalBytes(BudgetRule):
    """Bytes of the whole cache, everything counted.

    Parameters
    ----------
    total : int
    text : str
        As it was given.
    """

    total: int
    text: str

    def tokens(self, config: CacheConfig, layers: int, k: Array, v: Array, windows: int, *, whole: bool = False) -> int:
        """Tokens that each KV head may retain on average, so that the total is not exceeded while decoding either.

        Parameters
        ----------
        config : CacheConfig
            Settings of the layers that share the total.
        layers : int
            Full-attention layers.
        k, v : array, shape (batch, kv_head, n, d) and (batch, kv_head, n, dv)
            Of one full-attention layer; all layers must be alike.
        windows : int
            Bytes that layers with a sliding window store at most.
        whole : bool
            Whether tokens are retained as they come first, and coded when they no longer fit.

        Raises
        ------
        ValueError
            If the total has no room for the least budget.

        Notes
        -----
        A head stores up to ``budget + block`` tokens within a step. Beside keys and values each takes a position and,
        if the policy observes attention, a sum of it.
        """
        batch, kv_heads = k.shape[0], k.shape[1]
        pair = k.shape[-1] * k.dtype.itemsize + v.shape[-1] * v.dtype.itemsize
        beside = bytes_beside(config, k, v)
        record = pair if config.bits is None else record_bytes(k.shape[-1], v.shape[-1], config.bits)
        state = 2 * POSITION_BYTES  # counts of recent and of retained tokens
        if config.corrects:
            state += config.correction.empty(k[:1, :1, :0], v[:1, :1, :0]).nbytes
        if config.certify is not None:
            state += Moments.empty(k[:1, :1, :0], v[:1, :1, :0], order=config.certify, extent=True).nbytes
        if config.remembers_queries:
            state += 2 * k.shape[-1] * sum_bytes(k, v)
        if config.bits is not None or whole:
            # Mean and deviation of keys, deviation of values, and whether records are still to be made anew.
            state += pair + k.shape[-1] * k.dtype.itemsize + 1
            if config.remembers_queries:
                state += order_bytes((config.bits or USUAL)[0], k.shape[-1])
            if config.certify is not None:
                state += 2 * (k.shape[-1] + v.shape[-1]) * sum_bytes(k, v)  # what codes have lost
        return self.retained(
            heads=layers * batch * kv_heads,
            token=record + beside,
            exact=pair + beside,
            state=state,
            beside=windows,
            block=config.block,
            recent=config.recent,
            least=config.protected + 1,
            rows=batch,
        )

    def retained(
        self,
        *,
        heads: int,
        token: int,
        exact: int,
        state: int,
        beside: int,
        block: int,
        recent: int,
        least: int,
        rows: int,
    ) -> int:
        """Tokens that each KV head may retain on average, by what everything costs.

        Parameters
        ----------
        heads : int
            KV heads that share the total, over all layers and rows.
        token, exact, state : int
            Bytes of a retained token, of one of the recent tier, and of all else that a head has.
        beside : int
            Bytes of what has no budget: layers with a window of their own.
        block, recent, least : int
            Tokens that wait for eviction at most, slots of the recent tier, and tokens that must be retained at least.
        rows : int
            For the message.

        Raises
        ------
        ValueError
            If the total has no room for the least budget.

        Examples
        --------
        >>> one = TotalBytes(1000, "1KB")
        >>> one.retained(heads=1, token=10, exact=10, state=100, beside=0, block=20, recent=53, least=34, rows=1)
        70
        >>> one.retained(heads=1, token=5, exact=10, state=100, beside=0, block=20, recent=53, least=34, rows=1)
        107
        """
        always, free = state + exact * recent, recent - block
        budget = (self.total - beside - heads * always) // (heads * token) + free
        if budget < least:
            needed = beside + heads * (always + (least - free) * token)
            windows = f"; layers with a window of their own take {beside} of them" if beside else ""
            raise ValueError(
                f"budget is {self.text!r}, too little for {'one row' if rows == 1 else f'{rows} rows'}: sinks, window, "
                f"a block and what stands for evicted tokens take {needed} bytes{windows}; use "
                f"{-(-needed // 1024)}KiB or more{', or fewer rows' if rows > 1 else ''}"
            )
        return int(budget)


def sum_bytes(k: Array, v: Array) -> int:
    """Bytes of a number that is added up over such keys and values."""
    return max(4, int(k.dtype.itemsize), int(v.dtype.itemsize))


def bytes_beside(config: CacheConfig, k: Array, v: Array) -> int:
    """Bytes that each stored token takes beside its key and value: its position and what a policy observes."""
    return POSITION_BYTES + (sum_bytes(k, v) if config.observes else 0)


def tokens_bought(average: int, *, exact: int, token: int, record: int, least: int) -> int:
    """Tokens of a few bits for the bytes of an average at full precision, exact ones and ``least`` in any case.

    Parameters
    ----------
    average, exact, least : int
        Tokens for each KV head: at full precision, those that stay so, and those that are always retained.
    token, record : int
        Bytes of a token at full precision and in few bits, with all that counts beside.

    Examples
    --------
    >>> tokens_bought(100, exact=10, token=40, record=10, least=34)
    370
    >>> tokens_bought(30, exact=9, token=4, record=6, least=34)
    34
    """
    # Records of very short vectors take more than the vectors; sinks, window and a token are retained all the same.
    return max(least, exact + (average - exact) * token // record)


def parse_budget(budget: object) -> int | list[int] | BudgetRule:
    """Tokens, a list of them (one for each layer), or the rule that will tell.

    Parameters
    ----------
    budget : int, float, str or sequence of int
        Tokens for each KV head, a share in (0, 1] of the tokens read, or bytes of the whole cache, like ``"64MiB"``.

    Raises
    ------
    ValueError
        If it is none of these.

    Examples
    --------
    >>> parse_budget(512), parse_budget(0.25), parse_budget("1.5KiB")
    (512, Share(share=0.25), TotalBytes(total=1536, text='1.5KiB'))
    """
    budget = as_python(budget)
    if isinstance(budget, str):
        found = SIZE.fullmatch(budget)
        if not found:
            raise ValueError(f"budget is {budget!r}; bytes are a number and a unit, like '64MiB' ({', '.join(UNITS)})")
        return TotalBytes(int(float(found[1]) * UNITS[found[2]]), budget)
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise ValueError(f"budget is {budget}; a share is in (0, 1], a number of tokens is an int")
        return Share(budget)
    if isinstance(budget, int) and not isinstance(budget, bool):
        return budget
    if isinstance(budget, Sequence) and all(isinstance(each, int) for each in budget):
        return list(budget)
    raise ValueError(
        f"budget is {budget!r}; use tokens (512), a share of the tokens read (0.25), bytes of the cache ('64MiB'), or "
        "a list of tokens for each layer"
    )


def budget_from_text(text: str) -> int | float | str:
    """A budget as it is written on a command line: digits are tokens, a decimal number is a share, else it is bytes.

    Examples
    --------
    >>> budget_from_text("512"), budget_from_text("0.25"), budget_from_text("64MiB")
    (512, 0.25, '64MiB')
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

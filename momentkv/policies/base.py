"""The contract of an eviction policy: what it is shown, and the importance it gives back."""

from __future__ import annotations

import abc
import dataclasses
from functools import cached_property
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace
from momentkv._rows import real_rows, stacked_rows
from momentkv.statistics.moments import Moments

__all__ = ["Policy", "Tokens"]


@dataclasses.dataclass(frozen=True)
class Tokens:
    """The tokens of one layer that an eviction chooses from, in order of position.

    Attributes
    ----------
    keys : array, shape (..., kv_head, n, d)
    values : array, shape (..., kv_head, n, dv)
    positions : int array, shape (..., kv_head, n)
        Place of each token in the sequence; negative for a slot that holds none (padding).
    attention : array, shape (..., kv_head, n)
        What `Policy.observe` made of the attention that each token received; `score` is its former name.
    moments : Moments
        Of the tokens evicted so far.
    scale : float
        Factor on ``q . k``.
    query_mean, query_variance : array, shape (..., kv_head, d), or None
        Mean, and variance of each coordinate, of the recent queries times ``scale``, over all heads of the group; None
        unless the policy or the correction needs them.
    queries : array, shape (..., kv_head, group, m, d), or None
        Times ``scale``, the queries of the last ``m`` slots, where they are at hand: after a prefill, for a policy that
        `Policy.needs_queries`. Those of padding mean nothing.
    both : array, shape (2, ..., kv_head, n, d), or None
        Keys and values as one array, zero in slots without a token, where they are at hand so.
    """

    keys: Array
    values: Array
    positions: Array
    attention: Array
    moments: Moments
    scale: float
    query_mean: Array | None = None
    query_variance: Array | None = None
    queries: Array | None = None
    both: Array | None = None

    @cached_property
    def vectors(self) -> tuple[Array, Array]:
        """Keys and values in one accumulation dtype; zero in a slot that holds no token, whatever lies there."""
        stacked = self.stacked
        if stacked is not None:
            return stacked[0, ...], stacked[1, ...]
        xp, real = array_namespace(self.keys, self.values), self.positions >= 0
        keys, values = (real_rows(x, real) for x in accumulate(xp, self.keys, self.values))
        return keys, values

    @cached_property
    def stacked(self) -> Array | None:
        """`vectors` as one array, shape (2, ..., kv_head, n, d); None where values have another dimension."""
        xp = array_namespace(self.keys, self.values)
        if self.keys.shape != self.values.shape:
            return None
        if self.both is not None:
            return accumulate(xp, self.both)[0]
        return stacked_rows(accumulate(xp, self.keys, self.values), self.positions >= 0)

    @property
    def score(self) -> Array:
        """The former name of ``attention``."""
        return self.attention


class Policy(abc.ABC):
    """Ranks retained tokens; the lowest are evicted first. Subclass it to write your own.

    Attributes say what a policy needs, so that a cache computes and stores nothing else.

    Attributes
    ----------
    name : str
        Name that chooses it.
    observes : int or None
        How many of the last queries of a forward pass it observes (of a prefill: the observation window). 0 for none,
        None for all, block by block. While decoding, it sees every query.
    accumulates : bool
        Whether the score of a token is kept after an eviction (True), or starts again at zero (False) and covers the
        queries since the last eviction.
    needs_queries : bool
        Whether it needs mean and variance of the recent queries, which are then stored, and after a prefill the newest
        queries themselves.
    couples_heads : bool
        Whether the importance of a token in one KV head depends on the others. Such a policy cannot give each head a
        budget of its own. Any other may be shown the heads of several layers at once, or of many tokens a few heads.
    rereads : bool
        Whether it ranks by the scores of a second reading, which come from outside (`momentkv.hf.read`,
        `momentkv.cache.rereading`).
    rounds : int
        In how many rounds a long eviction is done. Each round sees the moments of the rounds before.
    """

    name: ClassVar[str] = ""
    observes: int | None = 0
    accumulates: ClassVar[bool] = False
    couples_heads: ClassVar[bool] = False
    needs_queries: ClassVar[bool] = False
    rereads: ClassVar[bool] = False
    rounds: int = 1

    def observe(self, received: Array, attention: Array) -> Array:
        """Add newly observed attention to what each token has received.

        Parameters
        ----------
        received : array, shape (..., kv_head, n)
            So far; zero for new tokens.
        attention : array, shape (..., kv_head, group, q_len, n)
            Softmax weights that the queries gave the tokens.

        Returns
        -------
        array, shape (..., kv_head, n)
            By default the sum over queries, averaged over the group.
        """
        xp = array_namespace(received, attention)
        return received + xp.mean(xp.sum(attention, axis=-2), axis=-2)

    @abc.abstractmethod
    def importance(self, tokens: Tokens) -> Array:
        """Rank tokens: shape (..., kv_head, n), the lowest is evicted first. Sinks and window need no care here."""

"""Keep what the text's own words look for when they are read a second time."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, array_namespace
from momentkv.policies.base import Policy, Tokens

__all__ = ["SecondReading"]


@dataclasses.dataclass(frozen=True)
class SecondReading(Policy):
    r"""The largest attention weight that any query of a second reading gave a token.

    $$ a_j = \max_{h,\, i}\; p^{(h)}_{ij} $$

    over query heads $h$ of the group and the queries $i$ of a model that is asked to repeat the text while
    it can see all of it. A token that some sentence needs when it is repeated gets much attention from at least one
    query. In a mean it would disappear among the queries that do not need it.

    Parameters
    ----------
    observes : int
        Queries of a prefill that stand in where there was no second reading.

    Notes
    -----
    The scores come from outside: `momentkv.hf.read` reads a text twice, `momentkv.cache.rereading` scores arrays.
    They stay with the tokens. While decoding, each query that gives a token more attention raises its score, and new
    tokens begin at zero. Weights can be compared between heads and layers, and are by `sharing="kvzip"`.

    Source: KVzip (Kim et al., 2025, arXiv 2505.23416). There the softmax is over the chunk that is being repeated;
    here it is over all that is stored. Derivation: docs/derivations/second-reading.md.
    """

    name: ClassVar[str] = "second-reading"
    accumulates: ClassVar[bool] = True
    rereads: ClassVar[bool] = True
    observes: int | None = 32

    def observe(self, received: Array, attention: Array) -> Array:
        xp = array_namespace(received, attention)
        largest = xp.max(xp.max(attention, axis=-2), axis=-2)
        return xp.maximum(received, xp.astype(largest, received.dtype, copy=False))

    def importance(self, tokens: Tokens) -> Array:
        return tokens.attention

"""Keep the tokens with the most attention so far."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array
from momentkv.policies.base import Policy, Tokens

__all__ = ["H2O"]


@dataclasses.dataclass(frozen=True)
class H2O(Policy):
    """Heavy hitters: attention added up over all queries observed so far.

    ``importance_j = sum over queries i of mean over the group of p_ij``. Needs observed attention, and carries the
    sum of every retained token through evictions.

    Parameters
    ----------
    observes : int or None
        Queries of a prefill that are counted: the last 32 by default, so that a long prefill stays fast. None counts
        all of them as the paper does, at the cost of a second attention pass, done in blocks of queries.

    Notes
    -----
    Source: H2O (arXiv 2306.14048). There half of the budget is the recent window; here the window is the cache's own.
    """

    name: ClassVar[str] = "h2o"
    accumulates: ClassVar[bool] = True
    observes: int | None = 32

    def importance(self, tokens: Tokens) -> Array:
        return tokens.attention

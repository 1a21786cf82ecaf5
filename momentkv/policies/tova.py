"""Keep the tokens that the last query attends to."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, array_namespace
from momentkv.policies.base import Policy, Tokens

__all__ = ["TOVA"]


@dataclasses.dataclass(frozen=True)
class TOVA(Policy):
    """Token omission via attention: the weights of the last query, averaged over all heads of the layer.

    ``importance_j = mean over query heads of p_j(last query)``, so all heads keep the same tokens. Needs the attention
    of one query.

    Source: TOVA (arXiv 2401.06104).
    """

    name: ClassVar[str] = "tova"
    couples_heads: ClassVar[bool] = True
    observes: int | None = 1

    def observe(self, score: Array, attention: Array) -> Array:
        xp = array_namespace(score, attention)
        last = xp.mean(attention[..., -1, :], axis=-2)
        return xp.zeros_like(score) + xp.mean(last, axis=-2, keepdims=True)

    def importance(self, tokens: Tokens) -> Array:
        return tokens.attention

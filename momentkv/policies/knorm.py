"""Keep the keys of small norm."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace
from momentkv.policies.base import Policy, Tokens

__all__ = ["Knorm"]


@dataclasses.dataclass(frozen=True)
class Knorm(Policy):
    """``importance_j = -||k_j||``: keys of small norm tend to receive much attention. Needs keys only.

    Source: *A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression* (arXiv 2406.11430).
    """

    name: ClassVar[str] = "knorm"

    def importance(self, tokens: Tokens) -> Array:
        xp = array_namespace(tokens.keys)
        (keys,) = accumulate(xp, tokens.keys)
        return -xp.linalg.vector_norm(keys, axis=-1)

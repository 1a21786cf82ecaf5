"""Keep the most recent tokens."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, array_namespace
from momentkv.policies.base import Policy, Tokens

__all__ = ["Streaming"]


@dataclasses.dataclass(frozen=True)
class Streaming(Policy):
    """Sinks and the most recent tokens.

    ``importance_j = position_j``. Needs nothing but positions; the sinks are kept by the selection itself.

    Source: StreamingLLM (arXiv 2309.17453), there with 4 sinks and positions counted within the cache; here tokens
    keep the positions they had.
    """

    name: ClassVar[str] = "streaming"

    def importance(self, tokens: Tokens) -> Array:
        xp = array_namespace(tokens.positions)
        return xp.astype(tokens.positions, tokens.moments.weight.dtype)

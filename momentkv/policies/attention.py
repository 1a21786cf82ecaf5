"""Keep what recent queries attend to, where its value stands out."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace
from momentkv.policies.base import Policy, Tokens
from momentkv.policies.novelty import centred
from momentkv.policies.snapkv import check_kernel, pool_neighbours

__all__ = ["Attention"]


@dataclasses.dataclass(frozen=True)
class Attention(Policy):
    r"""Attention times the distance of the value from the mean of all values.

    $$ a_j = p_j\, \lVert v_j - \bar v \rVert $$

    Evicting a token changes the output by its attention times the distance of its value from the estimate for it.

    Parameters
    ----------
    kernel : int
        Odd width of an average of ``a_j`` over neighbouring positions, as in `SnapKV`; 1 for none. A wide one (7 to 13)
        keeps whole passages that a question in the window attends to, but continues the text less well.
    observes : int
        Length of the observation window in queries.

    Notes
    -----
    ``p_j`` is the attention of the observation window, as in `SnapKV`; while decoding, of the queries since the last
    eviction. Derivation: docs/derivations/eviction.md.
    """

    name: ClassVar[str] = "attention"
    observes: int | None = 32
    kernel: int = 1

    def __post_init__(self) -> None:
        check_kernel(self.kernel)

    def importance(self, tokens: Tokens) -> Array:
        xp = array_namespace(tokens.keys, tokens.values)
        (values,) = accumulate(xp, tokens.values)
        attention = tokens.attention * xp.linalg.vector_norm(centred(values, tokens.positions >= 0), axis=-1)
        return pool_neighbours(attention, tokens.positions, self.kernel) if self.kernel > 1 else attention

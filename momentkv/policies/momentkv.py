"""Keep what is attended to and what the moments cannot predict: the paper's score."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace
from momentkv._numbers import whole_number
from momentkv.policies.base import Policy, Tokens
from momentkv.statistics.weights import positive

__all__ = ["MomentKV"]


@dataclasses.dataclass(frozen=True)
class MomentKV(Policy):
    r"""Attention times the value residual against the moments of the evicted tokens.

    $$ \mathrm{importance}_j = \alpha_j \|r_j\|, \qquad
       r_j = v_j - \mu_v - \tfrac{s}{n} S_{vk} k_j \quad (r_j = v_j \text{ while } n = 0) $$

    A token whose value the moments predict costs little to fold in. Needs observed attention, keys, values, moments.

    Parameters
    ----------
    observes : int
        Length of the observation window in queries.
    rounds : int
        Rounds of a long eviction.

    Notes
    -----
    Where the paper is silent we choose: $\alpha_j$ is the attention weight averaged over the query group and
    summed over the queries at hand (the observation window at prefill, those since the last eviction while decoding);
    keys are those that attention uses, after RoPE. The paper's loop "evict the least, fold it in, score again" runs one
    block at a time while decoding. At prefill it runs in ``rounds`` rounds of geometrically falling size: one round
    scores all tokens with $r_j = v_j$, many rounds approach the loop. More rounds did not lower the error
    where we measured it (docs/parts.md#paper). With moments of order 0 the residual is ``v_j - mu_v``.

    Source: MomentKV (arXiv 2606.01563). Derivation: docs/derivations/eviction.md.
    """

    name: ClassVar[str] = "momentkv"
    observes: int | None = 32
    rounds: int = 1

    def __post_init__(self) -> None:
        if whole_number("rounds", self.rounds) < 1:
            raise ValueError(f"rounds is {self.rounds}; use at least 1")

    def importance(self, tokens: Tokens) -> Array:
        xp = array_namespace(tokens.keys, tokens.values)
        moments = tokens.moments
        keys, values = accumulate(xp, tokens.keys, tokens.values)
        # Both terms are zero for the empty set, which leaves r_j = v_j.
        residual = values - moments.value_mean[..., None, :]
        if moments.value_key is not None:
            slope = tokens.scale * moments.value_key / positive(xp, moments.weight)[..., None, None]
            residual = residual - xp.matmul(keys, xp.matrix_transpose(slope))
        return tokens.attention * xp.linalg.vector_norm(residual, axis=-1)

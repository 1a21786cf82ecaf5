"""Keep what queries like the recent ones are expected to attend to."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from momentkv._array import Array, accumulate, array_namespace
from momentkv._numbers import flag
from momentkv._rows import plus_product, row_products
from momentkv.policies.base import Policy, Tokens
from momentkv.statistics.grouping import finite_max
from momentkv.statistics.weights import positive

__all__ = ["ExpectedAttention"]


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(Policy):
    r"""Attention weight, times the norm of the value, in expectation over Gaussian queries.

    $$ \mathrm{importance}_j = \log \frac1G \sum_h
       \frac{e^{\ell_{hj}}}{\sum_i e^{\ell_{hi}}} + \log \lVert v_j \rVert, \qquad
       \ell_{hj} = \mu_h^\top k_j + \tfrac12 k_j^\top \Sigma_h k_j $$

    With $q \sim N(\mu, \Sigma)$, the expectation of $e^{q \cdot k_j}$ is
    $e^{\mu \cdot k_j + k_j^\top \Sigma k_j / 2}$. After a prefill, $\mu_h$ and $\Sigma_h$ are mean
    and covariance of its last 256 queries in query head $h$ of the group. While decoding, what is stored of
    recent queries stands for them: one mean, and one variance of each coordinate, for the whole group; then
    $\mathrm{importance}_j = \ell_j + \log \lVert v_j \rVert$. Logarithms rank alike and do not overflow.

    Parameters
    ----------
    values : bool
        Whether the norm of the value counts.

    Notes
    -----
    Source: Expected Attention (arXiv 2510.00636). There the statistics are of queries before RoPE, and rotations are
    averaged over the 512 positions to come. Here the 256 queries have the rotations of as many positions: that
    averages them as well, and needs to know nothing of positions. Derivation: docs/derivations/eviction.md.
    """

    name: ClassVar[str] = "expected-attention"
    needs_queries: ClassVar[bool] = True
    values: bool = True

    def __post_init__(self) -> None:
        flag("values", self.values)

    def importance(self, tokens: Tokens) -> Array:
        keys, values = tokens.vectors
        xp = array_namespace(keys, values)
        if tokens.queries is not None:
            logit = by_head(xp, tokens.queries, keys, tokens.positions >= 0)
        elif tokens.query_mean is not None and tokens.query_variance is not None:
            mean, variance = accumulate(xp, tokens.query_mean, tokens.query_variance)
            logit = row_products(plus_product(mean[..., None, :], (variance / 2)[..., None, :], keys), keys)
        else:
            raise ValueError(
                "query_mean or query_variance of the tokens is None, and so are its queries, but expected attention is "
                "that of such queries; pass both, as LayerCache does"
            )
        if not self.values:
            return logit
        norm = xp.linalg.vector_norm(values, axis=-1)
        return xp.where(norm > 0, logit + xp.log(positive(xp, norm)), -xp.inf * xp.ones_like(norm))


def by_head(xp: Any, queries: Array, keys: Array, real: Array) -> Array:
    """Log of expected attention, mean over the group, (..., n), to queries (..., group, m, d) of the last slots."""
    queries, keys = accumulate(xp, queries, keys)
    group, m = queries.shape[-3:-1]
    weight = xp.astype(real[..., None, -m:, None], queries.dtype)
    queries = xp.where(weight > 0, queries, xp.zeros_like(queries))
    number = positive(xp, xp.sum(weight, axis=-2))
    mean = xp.sum(queries, axis=-2) / number
    off = weight * (queries - mean[..., None, :])
    covariance = xp.matmul(xp.matrix_transpose(off), off) / number[..., None]
    total = None
    # A head at a time: all at once would hold the keys once for each.
    for head in range(group):
        spread = row_products(xp.matmul(keys, covariance[..., head, :, :]), keys)
        logit = xp.matmul(mean[..., head, None, :], xp.matrix_transpose(keys))[..., 0, :] + spread / 2
        logit = xp.where(real, logit, -xp.inf * xp.ones_like(logit))
        top = finite_max(logit)
        logit = logit - top - xp.log(positive(xp, xp.sum(xp.exp(logit - top), axis=-1, keepdims=True)))
        total = logit if total is None else xp.logaddexp(total, logit)
    return total - xp.log(xp.asarray(float(group), dtype=queries.dtype))

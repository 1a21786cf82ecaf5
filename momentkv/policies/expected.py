"""Keep what queries like the recent ones are expected to attend to."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, accumulate, array_namespace
from momentkv.policies.base import Policy, Tokens
from momentkv.statistics.weights import positive

__all__ = ["ExpectedAttention"]


@dataclasses.dataclass(frozen=True)
class ExpectedAttention(Policy):
    r"""Attention weight, times the norm of the value, in expectation over Gaussian queries.

    .. math:: \mathrm{importance}_j = \mu^\top k_j + \tfrac12 \sum_c \sigma_c^2 k_{jc}^2 + \log \lVert v_j \rVert

    With :math:`q \sim N(\mu, \Sigma)`, the expectation of :math:`e^{q \cdot k_j}` is
    :math:`e^{\mu \cdot k_j + k_j^\top \Sigma k_j / 2}`; this is the logarithm of that times the norm, which ranks alike
    and does not overflow. Needs keys, values, and mean and variance of the recent queries.

    Parameters
    ----------
    values : bool
        Whether the norm of the value counts.

    Notes
    -----
    Source: Expected Attention (arXiv 2510.00636). Three things differ. The paper has the statistics of a prompt's
    queries before RoPE, and averages the rotation over the 512 positions to come; here they are of the last 32 queries
    (while decoding, of an average that fades as fast), at the angles they had. :math:`\Sigma` is the variance of each
    coordinate, where the paper has the whole covariance. And the queries of all heads of a group make one Gaussian,
    where the paper averages the expected weights of each. Derivation: docs/derivations/eviction.md.
    """

    name: ClassVar[str] = "expected-attention"
    needs_queries: ClassVar[bool] = True
    values: bool = True

    def importance(self, tokens: Tokens) -> Array:
        if tokens.query_mean is None or tokens.query_variance is None:
            raise ValueError(
                "query_mean or query_variance of the tokens is None, but expected attention is that of such queries; "
                "pass both, as LayerCache does"
            )
        xp = array_namespace(tokens.keys, tokens.values)
        keys, values, mean, variance = accumulate(
            xp, tokens.keys, tokens.values, tokens.query_mean, tokens.query_variance
        )
        real = tokens.positions >= 0
        keys, values = (xp.where(real[..., None], x, xp.zeros_like(x)) for x in (keys, values))
        logit = xp.sum(keys * (mean[..., None, :] + variance[..., None, :] * keys / 2), axis=-1)
        if not self.values:
            return logit
        norm = xp.linalg.vector_norm(values, axis=-1)
        return xp.where(norm > 0, logit + xp.log(positive(xp, norm)), -xp.inf * xp.ones_like(norm))

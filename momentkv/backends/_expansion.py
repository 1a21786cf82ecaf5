"""What a kernel needs of moments: one form for the estimates of every kind, in arrays that lie as it reads them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import Summaries

__all__ = ["Expansion", "expand"]


class Expansion(NamedTuple):
    r"""An attention state that depends on the query, expanded around an anchor, for every batch row and KV head.

    With :math:`x = s\,q - a`: :math:`\ell_c = \log W_c + x \cdot \mu_c`,
    :math:`\mathrm{lse} = \log \sum_c e^{\ell_c} + \min(\tfrac\alpha2\, x^\top D\, x, \kappa)` and
    :math:`\mathrm{out} = \sum_c \frac{e^{\ell_c}}{\sum e^\ell}\, \nu_c + B\, x`; the empty state where all
    :math:`\log W_c` are ``-inf``.

    Attributes
    ----------
    log_weight : tensor, shape (..., m)
    key_mean, value_mean : tensor, shape (..., m, d) and (..., m, dv)
    anchor : tensor, shape (..., d), or None
        None is the zero query, the paper's.
    slope : tensor, shape (..., d, dv), or None
        :math:`B^\top`. A kernel reads it fastest where it lies as written, the axis of values last.
    slope_left, slope_right : tensor, shape (..., dv, r) and (..., r, d), or None
        :math:`B` of low rank.
    variance : tensor, shape (..., d) or (..., d, d), or None
        :math:`D`, diagonal or full.
    strength, cap : tensor, shape (...), or None
        :math:`\alpha` and :math:`\kappa`; both are given where ``variance`` is.
    """

    log_weight: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    anchor: torch.Tensor | None = None
    slope: torch.Tensor | None = None
    slope_left: torch.Tensor | None = None
    slope_right: torch.Tensor | None = None
    variance: torch.Tensor | None = None
    strength: torch.Tensor | None = None
    cap: torch.Tensor | None = None


def expand(moments: Moments | Summaries, *, order: int) -> Expansion:
    """The expansion that `estimate` of `momentkv.correction`, or `estimate_summaries`, evaluates.

    Parameters
    ----------
    moments : Moments or Summaries
        Of tensors, with leading axes (batch..., kv_head).
    order : {0, 1}
        Of an estimate from `Moments`; `Summaries` have an order of their own.

    Returns
    -------
    Expansion
    """
    if isinstance(moments, Summaries):
        ranked = moments.rank > 0
        return Expansion(
            moments.log_weight,
            moments.key_mean,
            moments.value_mean,
            anchor=moments.anchor,
            slope_left=moments.slope_left if ranked else None,
            slope_right=moments.slope_right if ranked else None,
            variance=moments.key_variance,
            strength=moments.strength,
            cap=moments.cap,
        )
    slope = None
    if order == 1 and moments.value_key is not None:
        weight = moments.weight.masked_fill(moments.weight == 0, 1.0)
        slope = (moments.value_key / weight[..., None, None]).mT
    # log 0 = -inf, the empty state; a mean that decay has left behind is then never looked at.
    return Expansion(
        moments.weight.log()[..., None], moments.key_mean[..., None, :], moments.value_mean[..., None, :], slope=slope
    )

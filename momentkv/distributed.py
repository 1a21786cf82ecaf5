"""A context split over ranks: each holds and summarises its part, and attention is merged with collectives.

The algebra is that of one process: attention states merge (`momentkv.attention.merge`), and so do moments. Each
function is called by every rank of the group with its own part and gives every rank the whole. Nothing here starts
processes or knows of models; `torch.distributed` must be initialised. Cost and traffic: docs/distributed.md.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from momentkv._numbers import check_kind
from momentkv.attention import AttentionState
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import QueryWindow, Summaries

__all__ = ["merge_moments", "merge_states", "merge_summaries"]


def merge_states(state: AttentionState, group: Any = None) -> AttentionState:
    r"""State of the union of all ranks' token sets.

    $$ \mathrm{lse} = m + \log \sum_r e^{\mathrm{lse}_r - m}, \qquad
       \mathrm{out} = \sum_r e^{\mathrm{lse}_r - \mathrm{lse}}\, \mathrm{out}_r, \qquad m = \max_r \mathrm{lse}_r $$

    Parameters
    ----------
    state : AttentionState of tensors
        Of the same queries on every rank, over this rank's tokens. Natural logs.
    group : ProcessGroup, optional
        All ranks by default.

    Returns
    -------
    AttentionState
        The same on every rank. ``out = 0``, ``lse = -inf`` where no rank has a token.

    Raises
    ------
    RuntimeError
        If no process group is initialised.
    TypeError
        If ``state`` is no `AttentionState`, or its arrays are not of PyTorch.
    ValueError
        If a gradient is asked for, which would lack what is of other ranks.

    Notes
    -----
    Two all-reduces: of ``lse`` (maximum), and of ``out`` and weight together. Equal to `momentkv.attention.merge` of
    the ranks' states to rounding; the order of the sum is the backend's.
    """
    check_kind(AttentionState, state=state)
    check_tensors(out=state.out, lse=state.lse)
    check_no_gradient("state", state.out, state.lse)
    check_group()
    out, lse = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in state)
    top = lse.clone()
    dist.all_reduce(top, dist.ReduceOp.MAX, group)
    top = top.masked_fill(top == -torch.inf, 0.0)  # nobody has a token: any finite shift keeps weights at zero
    weight = torch.exp(lse - top)[..., None]
    # A rank without tokens may hold anything in out; times zero would keep its NaN and infinities.
    weighted = torch.where(weight > 0, weight * out, 0.0)
    both = torch.cat([weighted, weight], -1)
    dist.all_reduce(both, dist.ReduceOp.SUM, group)
    total = both[..., -1:]
    return AttentionState(
        both[..., :-1] / total.masked_fill(total == 0, 1.0), (total.log() + top[..., None]).squeeze(-1)
    )


def merge_moments(moments: Moments, group: Any = None) -> Moments:
    r"""Moments of the union of all ranks' token sets.

    $$ W = \sum_r W_r, \quad \mu = \tfrac1W \sum_r W_r\, \mu_r, \quad
       S = \sum_r S_r + W_r\, (\mu_{v,r} - \mu_v)(\mu_{k,r} - \mu_k)^\top $$

    Parameters
    ----------
    moments : Moments of tensors
        Of this rank's tokens; heads and order are the same on every rank.
    group : ProcessGroup, optional

    Returns
    -------
    Moments
        The same on every rank.

    Raises
    ------
    ValueError
        If the moments are of order 2, or have an extent or an anchor, or a gradient is asked for.
    TypeError
        If ``moments`` are no `Moments`, or its arrays are not of PyTorch.

    Notes
    -----
    Two all-reduces, the second one with order 1 only: means first, then deviations from them, so that nothing cancels.
    Equal to `Moments.merge` in any order, to rounding.
    """
    check_kind(Moments, moments=moments)
    check_tensors(**moments.arrays())
    for name in ("key_key", "extent", "anchor"):
        if getattr(moments, name) is not None:
            raise ValueError(
                f"moments have {name}, which no all-reduce merges yet; gather the moments of every rank and use "
                "Moments.merge, or build them without it"
            )
    check_no_gradient("moments", *moments.arrays().values())
    check_group()
    weight = moments.weight[..., None]
    sums = torch.cat([weight, weight * moments.key_mean, weight * moments.value_mean], -1)
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    total, d = sums[..., :1], moments.key_mean.shape[-1]
    safe = total.masked_fill(total == 0, 1.0)
    key_mean, value_mean = sums[..., 1 : 1 + d] / safe, sums[..., 1 + d :] / safe
    value_key = moments.value_key
    if value_key is not None:
        keys, values = weight * (moments.key_mean - key_mean), moments.value_mean - value_mean
        value_key = value_key + values[..., :, None] * keys[..., None, :]
        dist.all_reduce(value_key, dist.ReduceOp.SUM, group)
    return Moments(total[..., 0], key_mean, value_mean, value_key)


def merge_summaries(summaries: Summaries, window: QueryWindow, group: Any = None) -> Summaries:
    """Anchored summaries of the union of all ranks' token sets.

    Parameters
    ----------
    summaries : Summaries of tensors
        Of this rank's tokens, of the same make on every rank.
    window : QueryWindow
        Recent queries, the same on every rank; their mean becomes the anchor of all.
    group : ProcessGroup, optional

    Returns
    -------
    Summaries
        The same on every rank: the ranks' summaries merged in order of rank.

    Raises
    ------
    TypeError
        If ``summaries`` or ``window`` is of another kind, or its arrays are not of PyTorch.
    ValueError
        If a gradient is asked for.

    Notes
    -----
    One all-gather of every array. As an update is, a merge of summaries is an approximation: weights, means and
    variances of all tokens are kept, the grouping is made anew.
    """
    check_kind(Summaries, summaries=summaries)
    check_kind(QueryWindow, window=window)
    check_tensors(**summaries.arrays(), **{"window.mean": window.mean, "window.variance": window.variance})
    check_no_gradient("summaries", *summaries.arrays().values())
    check_no_gradient("window", *window)
    check_group()
    ranks = dist.get_world_size(group)
    fields: dict[str, list[torch.Tensor]] = {}
    for name, x in summaries.arrays().items():
        fields[name] = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(ranks)]
        dist.all_gather(fields[name], x.contiguous(), group)
    parts = [
        dataclasses.replace(summaries, **{name: xs[rank] for name, xs in fields.items()}).reanchor(window.mean)
        for rank in range(ranks)
    ]
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.merge(part, window)
    return whole


def check_tensors(**arrays: Any) -> None:
    """Raise unless all arrays are tensors, which collectives need."""
    for name, x in arrays.items():
        if not isinstance(x, torch.Tensor):
            raise TypeError(
                f"{name} is a {type(x).__name__}; collectives need torch.Tensor: convert the state with map()"
            )


def check_no_gradient(name: str, *arrays: torch.Tensor) -> None:
    """Raise if a gradient is asked for, which would lack what is of other ranks."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in arrays):
        raise ValueError(f"{name} requires a gradient, which merging has none of; detach() it, or use torch.no_grad()")


def check_group() -> None:
    """Raise unless there are ranks to merge with."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised; call torch.distributed.init_process_group(), or run under torchrun"
        )

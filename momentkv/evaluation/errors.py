"""Output error of every head of a compressed cache against the full one."""

from __future__ import annotations

import numpy as np
import torch

from momentkv.diagnostics import EvictionError, eviction_error
from momentkv.evaluation.capture import Attended
from momentkv.hf import MomentCache

__all__ = ["head_errors"]


def head_errors(attended: dict[int, Attended], cache: MomentCache, context: int, *, every: int = 1) -> EvictionError:
    """Eviction error of every layer, query head and (``every``-th) token after the context.

    Parameters
    ----------
    attended : dict
        By layer, of the full cache: the context and the tokens after it, with at least the queries of the latter.
    cache : MomentCache
        The compressed context, as `replay` makes it.
    context, every : int

    Returns
    -------
    EvictionError
        NumPy arrays of shape (layer, q_head, number of queries).
    """
    errors = []
    for index, core in cache.moment_layers.items():
        layer = attended[index]
        length = layer.keys.shape[2]
        tokens = torch.arange(length, device=layer.keys.device)
        queries = tokens[context::every]
        error = eviction_error(
            layer.queries[:, :, -(length - context) :][:, :, ::every],
            layer.keys,
            layer.values,
            retained_mask(core.positions, length, context),
            moments=core.config.correction.exact.expansion(core.moments) or core.moments.expansion(order=0),
            scale=layer.scaling,
            mask=tokens[None, :] <= queries[:, None],
        )
        errors.append([x[0].cpu().numpy() for x in error])
    return EvictionError(*(np.stack(parts) for parts in zip(*errors, strict=True)))


def retained_mask(positions: torch.Tensor, length: int, context: int) -> torch.Tensor:
    """Which of ``length`` tokens are retained: those at the stored positions, and all after the context."""
    # Slots without a token have position -1: they are given a place of their own, which is cut off.
    mask = torch.zeros((*positions.shape[:-1], length + 1), dtype=torch.bool, device=positions.device)
    mask.scatter_(-1, torch.where(positions < 0, length, positions).long(), True)
    mask[..., context:] = True
    return mask[..., :length]

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
        length, parts, first = layer.keys.shape[2], [], 0
        tokens = torch.arange(length, device=layer.keys.device)
        queries = tokens[context::every]
        group = layer.queries.shape[1] // layer.keys.shape[1]
        for part in core.parts:
            heads = slice(first, first + part.keys.shape[1])
            first = heads.stop
            # Retained are the stored positions of each head and every token after the context.
            retained = (tokens >= context).expand(1, part.keys.shape[1], -1).clone()
            retained.scatter_(2, part.positions.long(), True)
            error = eviction_error(
                layer.queries[:, group * heads.start : group * heads.stop, -(length - context) :][:, :, ::every],
                layer.keys[:, heads],
                layer.values[:, heads],
                retained,
                moments=part.moments,
                order=part.order or 0,
                scale=layer.scaling,
                mask=tokens[None, :] <= queries[:, None],
            )
            parts.append([x[0].cpu().numpy() for x in error])
        errors.append([np.concatenate(x) for x in zip(*parts, strict=True)])
    return EvictionError(*(np.stack(parts) for parts in zip(*errors, strict=True)))

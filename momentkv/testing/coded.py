"""Records for cases of the decode operator, and what rounding may do to products with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from momentkv.codes import Coding, Standard, encode

__all__ = ["magnitudes", "records_of"]


def records_of(
    k: torch.Tensor, v: torch.Tensor, valid: torch.Tensor, rng: np.random.Generator, bits: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, Coding]:
    """Records of tokens whose channels differ in mean and deviation, as those of models do; poisoned where hidden."""
    spread = [torch.from_numpy(np.exp(rng.standard_normal(x.shape[-1]))).to(x.dtype) for x in (k, v)]
    k = (k + torch.from_numpy(2 * rng.standard_normal(k.shape[-1])).to(k.dtype)) * spread[0]
    v = v * spread[1]
    standards = Standard.of(k, valid), Standard.of(v, valid, centred=False)
    if rng.integers(2):  # as where a cache remembers its queries
        queries = torch.from_numpy(np.exp(rng.standard_normal(standards[0].deviation.shape)))
        standards = standards[0].graded(bits[0], queries), standards[1]
    (keys, key_step), (values, value_step) = (
        encode(x, standard, each) for x, standard, each in zip((k, v), standards, bits, strict=True)
    )
    keys, values = (x.masked_fill(~valid[..., None], 255) for x in (keys, values))
    key_step, value_step = (x.masked_fill(~valid, math.nan) for x in (key_step, value_step))
    return keys, values, Coding(bits, key_step, value_step, *standards)


# Codes are added up as they are and their centre, half of their number, is taken off the sum: so many times the number
# of codes.
FRONT = 1.5
# Half a unit of the whole numbers that components of a query become where models have 16 bits, relative to the largest.
QUERY = 0.5 / (127 * 256)


def magnitudes(
    q: NDArray[Any], k: NDArray[Any], coding: Coding | None, step: NDArray[Any], *, halves: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What stands for queries and keys where `momentkv.testing.rounding.attention_error` reckons with their products.

    A coded key is the sum of its mean and of codes, which may cancel; ``step`` is zero for keys that are not coded.
    In ``halves``, codes meet a query that was multiplied by deviations and then rounded, by `QUERY` beside the largest
    component: that is another channel. Keys behind the retained ones are taken for coded, too.
    """
    q, k = np.abs(q), np.abs(k) if coding is None else k
    if coding is None:
        return q, k
    mean, deviation = (
        np.zeros(1) if x is None else np.asarray(x.double().cpu())[..., None, :] for x in coding.key_standard[:2]
    )
    finest = coding.bits[0] + (coding.key_standard.order is not None)
    relative = 2.0**-24 * (k.shape[-1] + 4)
    apart = np.abs(k - mean)
    coded = np.abs(mean) + apart * (1.0 + 2.0**-23 / relative) + FRONT * 2.0**finest * step[..., None] * deviation
    if not halves:
        return q, coded
    group = q.shape[-3] // k.shape[-3]
    largest = (q * np.repeat(deviation, group, axis=-3)).max(-1, keepdims=True)
    lost = QUERY / relative * (apart / deviation).sum(-1, keepdims=True)
    return np.concatenate([q, largest], axis=-1), np.concatenate([coded, lost], axis=-1)

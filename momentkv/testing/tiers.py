"""Tokens of heads laid out in tiers, as caches store them, for checks of what reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from momentkv.backends.layout import Layout, Tiers

__all__ = ["LaidOut", "lay_out"]


class LaidOut(NamedTuple):
    """Tokens in tiers, and where each went.

    Attributes
    ----------
    tiers : Tiers
        Of NumPy arrays.
    places : int array, shape (kv_head, width + m)
        The token that each column of attention weights is of; -1 for a slot that holds none.
    """

    tiers: Tiers
    places: NDArray[Any]

    def arrays(self, asarray: Callable[[Any], Any]) -> Tiers:
        """The tiers in arrays of another library."""
        tiers = self.tiers
        given = {name: asarray(x) for name, x in tiers._asdict().items() if x is not None and name != "layout"}
        return tiers._replace(**given)

    def spread(self, of_tokens: NDArray[Any]) -> NDArray[Any]:
        """Numbers (..., kv_head, group, q_len, n) of tokens as those of slots, zero where a slot holds none."""
        index = self.places[:, None, None, :]
        index = np.broadcast_to(index, (*of_tokens.shape[:-1], index.shape[-1]))
        padded = np.concatenate([of_tokens, np.zeros((*of_tokens.shape[:-1], 1))], axis=-1)
        return np.take_along_axis(padded, index, axis=-1)


def lay_out(
    k: NDArray[Any],
    v: NDArray[Any],
    widths: Sequence[int],
    *,
    valid: NDArray[Any] | None = None,
    spare: Sequence[int] | None = None,
    told: bool = True,
) -> LaidOut:
    """Of each KV head the first tokens retained, as many as ``widths`` says, and the others recent.

    Parameters
    ----------
    k, v : array, shape (..., kv_head, n, d) and (..., kv_head, n, dv)
    widths : sequence of int
    valid : bool array, shape (..., kv_head, n), optional
        False for tokens that are padding.
    spare : sequence of int, optional
        Slots that each head has beside those of its retained tokens.
    told : bool
        Whether a mask says of each slot that it holds a token also where all of a tier do.

    Notes
    -----
    Slots without a token hold finite numbers far from those of tokens, so that a result shows whether they were read.
    """
    *lead, heads, n, _ = k.shape
    spare = [0] * heads if spare is None else spare
    slots = [width + more for width, more in zip(widths, spare, strict=True)]
    layout = Layout(0, max(n - min(widths), 0), tuple(slots))
    real = np.ones((*lead, heads, n), dtype=bool) if valid is None else np.broadcast_to(valid, (*lead, heads, n))

    def slot(x: NDArray[Any], head: int, start: int, stop: int, length: int) -> NDArray[Any]:
        """Tokens of a head in ``length`` slots."""
        there = x[..., head, start:stop, :]
        free = np.full((*lead, length - (stop - start), x.shape[-1]), 1e3, dtype=x.dtype)
        return np.concatenate([there, free], axis=-2)

    def mask(head: int, start: int, stop: int, length: int) -> NDArray[Any]:
        free = np.zeros((*lead, length - (stop - start)), dtype=bool)
        return np.concatenate([real[..., head, start:stop], free], axis=-1)

    packed = [
        np.concatenate([slot(x, head, 0, widths[head], slots[head]) for head in range(heads)], axis=-2) for x in (k, v)
    ]
    recent = [np.stack([slot(x, head, widths[head], n, layout.recent) for head in range(heads)], -3) for x in (k, v)]
    of_retained = np.stack([mask(head, 0, widths[head], layout.width) for head in range(heads)], axis=-2)
    of_recent = np.stack([mask(head, widths[head], n, layout.recent) for head in range(heads)], axis=-2)
    # Where heads have different slots, those that a head lacks need no mask.
    whole = bool((of_retained | ~layout.real).all())
    places = np.full((heads, layout.width + layout.recent), -1)
    for head, width in enumerate(widths):
        places[head, :width] = np.arange(width)
        places[head, layout.width : layout.width + n - width] = np.arange(width, n)
    tiers = Tiers(
        recent_keys=recent[0],
        recent_values=recent[1],
        recent_valid=None if of_recent.all() and not told else of_recent,
        keys=packed[0],
        values=packed[1],
        valid=None if whole and not told else of_retained,
        layout=layout,
    )
    return LaidOut(tiers, places)

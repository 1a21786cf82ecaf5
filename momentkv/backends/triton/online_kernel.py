"""Triton: steps of an online softmax, whose running state is a maximum and a sum to base 2, and weighted values."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["joined", "online"]


@triton.jit
def online(logits, top, total):
    """New maximum, what earlier sums fade by, weights of a tile of logits (base e), and the sum with them."""
    powers = logits * 1.4426950408889634
    new = tl.maximum(top, tl.max(powers, 1))
    # Where nothing was seen yet, -inf - -inf would be NaN.
    shift = tl.where(new == float("-inf"), 0.0, new)
    fade = tl.exp2(top - shift)
    weights = tl.exp2(powers - shift[:, None])
    return new, fade, weights, total * fade + tl.sum(weights, 1)


@triton.jit
def joined(top, total, acc, other_top, other_total, other_acc):
    """The state of two disjoint sets of tokens."""
    new = tl.maximum(top, other_top)
    shift = tl.where(new == float("-inf"), 0.0, new)
    fade = tl.exp2(top - shift)
    other = tl.exp2(other_top - shift)
    return new, total * fade + other_total * other, acc * fade[:, None] + other_acc * other[:, None]

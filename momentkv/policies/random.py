"""Keep tokens by lot: the baseline that every policy must beat."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from momentkv._array import Array, array_namespace, device
from momentkv._numbers import whole_number
from momentkv.policies.base import Policy, Tokens

__all__ = ["Random"]


@dataclasses.dataclass(frozen=True)
class Random(Policy):
    """A pseudo-random number for each (seed, KV head, position), the same on every backend and at every eviction.

    Parameters
    ----------
    seed : int
        From 0 to 2**31 - 1.
    """

    name: ClassVar[str] = "random"
    couples_heads: ClassVar[bool] = True  # by their numbers, so that they draw differently
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= whole_number("seed", self.seed) < 2**31:
            raise ValueError(f"seed is {self.seed}; use an integer from 0 to 2**31 - 1")

    def importance(self, tokens: Tokens) -> Array:
        xp = array_namespace(tokens.positions)
        positions = xp.astype(tokens.positions, xp.int32)
        heads = xp.arange(positions.shape[-2], dtype=xp.int32, device=device(positions))[:, None]
        # Two rounds before the seed comes in, so that neither neighbouring heads nor seeds repeat a sequence.
        mixed = hash32(hash32(positions + 1) ^ hash32(heads + 2**20))
        # The seed's 32 bits as those of a signed number, which 2**31 is not.
        mixed = hash32(mixed ^ ((self.seed + 1 + 2**31) % 2**32 - 2**31))
        high, low = (xp.astype(x & 0xFFFF, tokens.moments.weight.dtype) for x in (mixed >> 16, mixed))
        return (high * 2.0**16 + low) / 2.0**32


def hash32(x: Array) -> Array:
    """Mix the 32 bits of int32 numbers (multiply and xor-shift, as in SplitMix), which not every library has 64 of."""
    for _ in range(2):
        x = (x ^ ((x >> 16) & 0xFFFF)) * 0x45D9F3B
    return x ^ ((x >> 16) & 0xFFFF)

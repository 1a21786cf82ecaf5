"""JAX: writing by its own scatter, and statistics and records that pass through ``jit``."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from array_api_compat import is_jax_array

from momentkv._array import Array
from momentkv.backends.base import ArrayBackend
from momentkv.codes import Coded, Coding
from momentkv.statistics.corrections import NoStatistics
from momentkv.statistics.extent import Extent
from momentkv.statistics.moments import Moments
from momentkv.statistics.narrow import NarrowStatistics
from momentkv.statistics.summaries import Summaries

__all__ = ["JaxBackend"]

# All their fields are arrays or None, so `jax.jit` takes them as arguments and gives them back.
for statistic in (Extent, Moments, NoStatistics, Summaries):
    jax.tree_util.register_dataclass(
        statistic, data_fields=[field.name for field in dataclasses.fields(statistic)], meta_fields=[]
    )
jax.tree_util.register_dataclass(
    NarrowStatistics, data_fields=["exact", "codes", "steps"], meta_fields=["kind", "rows"]
)


def coded_tokens(kind: type[Coded | Coding]) -> None:
    """Let JAX take records as arguments, with their bits as what a function is compiled for."""
    jax.tree_util.register_pytree_node(kind, lambda x: (x[1:], x.bits), lambda bits, arrays: kind(bits, *arrays))


for records in (Coded, Coding):
    coded_tokens(records)


class JaxBackend(ArrayBackend):
    """The array-API backend, which XLA fuses under ``jit``, but for `write`.

    Outside ``jit`` each operation is compiled for each shape. Float32 is multiplied in full on a CPU; on accelerators
    JAX rounds it first, unless ``jax_default_matmul_precision`` is ``"highest"``.
    """

    name: ClassVar[str] = "jax"

    def reads(self, x: Array) -> bool:
        return bool(is_jax_array(x))

    def detach(self, x: Array) -> Array:
        return jax.lax.stop_gradient(x)

    def write_at(self, x: Array, start: int, new: Array, *, axis: int) -> Array:
        stop = start + new.shape[axis]
        return x.at[..., start:stop].set(new) if axis == -1 else x.at[..., start:stop, :].set(new)

    def write(self, x: Array, index: Array, new: Array, *, axis: int) -> Array:
        # JAX counts negative indices from the end, and drops those beyond it.
        slots = jnp.where(index >= 0, index.astype(int), x.shape[axis])
        rows = jnp.indices(index.shape, sparse=True)[:-1]
        return x.at[(*rows, slots)].set(new, mode="drop")

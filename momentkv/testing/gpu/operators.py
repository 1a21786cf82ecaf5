"""Operators that a decoding step launches besides its kernel, counted on tensors without data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from momentkv.backends.torch import TorchBackend, decode_tiers
from momentkv.cache.layer import LayerCache
from momentkv.testing.gpu.parts import Row
from momentkv.testing.gpu.steps import KINDS

__all__ = ["Fused", "Log", "counts", "step_without_data"]

# Operators that read or write no element.
FREE = ("detach", "view", "_unsafe_view", "slice", "select", "expand", "unsqueeze", "transpose", "alias")


class Fused(TorchBackend):
    """Decodes by the operator, as on CUDA, wherever tensors are."""

    def decode(self, q: Any, tiers: Any, expansion: Any, *, scale: float, weights: bool = False) -> Any:
        """By `decode_tiers`."""
        return decode_tiers(q, tiers, expansion, scale=scale, weights=weights)

    def prepare(self, expansion: Any) -> Any:
        """As on CUDA: itself."""
        return expansion


class Log(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes operators that launch something, and how large what they make is.

    Attributes
    ----------
    launched : Counter
        Of operators, by name.
    made : list of (int, str)
        Bytes of new memory, and the operator.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launched: Counter[str] = Counter()
        self.made: list[tuple[int, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace != "prim" and name not in FREE:
            self.launched[name] += 1
        given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        self.made += [
            (x.nbytes, name) for x in tree_leaves(out) if isinstance(x, torch.Tensor) and storage(x) not in given
        ]
        return out


def storage(x: torch.Tensor) -> int:
    """What tells the memory of a tensor from that of others."""
    return int(x.untyped_storage()._cdata)


def step_without_data(cache: LayerCache) -> Log:
    """Do one more step of a layer that has read something, on tensors of the same shapes; the cache is then of no use.

    Raises
    ------
    torch._subclasses.fake_tensor.DataDependentOutputException
        If the host asks for a number that only the device knows.
    """
    state = cache.stored_state
    batch, heads, _, d = state.recent_keys.shape
    # Where packed heads lie is known from earlier steps, and not asked again.
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    cache.map(mode.from_tensor)
    if cache.is_fixed:
        cache.fixed = cache.state
    with mode, torch.no_grad():
        q, k, v = (torch.empty(batch, h, 1, d, dtype=state.recent_keys.dtype) for h in (4 * heads, heads, heads))
        with Log() as log:
            cache.append(k, v)
            cache.attend(q)
            cache.fix()
    return log


def counts(rehearse: bool) -> Iterator[Row]:
    """Operators that a step of one layer launches, one row a kind of cache."""
    for kind, settings in KINDS.items():
        for static in (False, True):
            cache = LayerCache(40, window=8, block=4, static=static, backend=Fused(), **settings)
            q, k = torch.randn(1, 8, 90, 64), torch.randn(1, 2, 90, 64)
            cache.step(q, k, k)
            cache.step(q[:, :, :1], k[:, :, :1], k[:, :, :1])
            log = step_without_data(cache)
            total = sum(log.launched.values())
            yield {"kind": kind, "static": static, "operators": total, "of_them_decode": log.launched["decode"]}

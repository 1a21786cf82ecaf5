"""Two rankings in turn: the same on devices that round a division by a number in another way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from momentkv import Moments, Tokens
from momentkv.policies import Balanced, CriticalKV, Twice
from momentkv.policies.turns import in_turn, ranks


class Reciprocals(TorchDispatchMode):
    """Division by a number is a product with its reciprocal, as PyTorch's kernels on CUDA have it."""

    def __init__(self) -> None:
        super().__init__()
        self.divided = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.div.Tensor, torch.ops.aten.div.Scalar):
            by = args[1]
            if not isinstance(by, torch.Tensor) or by.ndim == 0:
                self.divided += 1
                return args[0] * (1 / torch.as_tensor(by, dtype=args[0].dtype))
        return func(*args, **(kwargs or {}))


def test_this_is_another_division():
    with Reciprocals() as mode:
        there = torch.arange(1.0, 200) / 0.7
    assert mode.divided == 1
    assert (there != torch.arange(1.0, 200) / 0.7).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("share", "rest"), [(0.7, 1 - 0.7), (1 - 0.3, 0.3), (0.6, 1 - 0.6), (0.5, 0.5)])
def test_turns_are_the_same_on_every_device(dtype: torch.dtype, share: float, rest: float):
    rng = np.random.default_rng(0)
    first, second = (torch.from_numpy(rng.permutation(400)).to(dtype) for _ in range(2))
    real = torch.ones(400, dtype=torch.bool)
    here = in_turn(first, share, second, rest, real)
    with Reciprocals() as mode:
        assert torch.equal(in_turn(first, share, second, rest, real), here)
    assert mode.divided == 0
    assert torch.equal(here, -torch.minimum(ranks(first, real) / share, ranks(second, real) / rest))


@pytest.mark.parametrize("policy", [Balanced(), CriticalKV(), Twice()], ids=lambda policy: policy.name)
def test_policies_rank_the_same_on_every_device(policy: Any):
    rng = np.random.default_rng(1)
    k, v = (torch.from_numpy(rng.standard_normal((2, 300, 8))) for _ in range(2))
    positions = torch.arange(300, dtype=torch.int32).expand(2, 300).contiguous()
    mean, variance = (torch.from_numpy(rng.random((2, 8))) for _ in range(2))
    attention = torch.from_numpy(rng.random((2, 300)))
    tokens = Tokens(k, v, positions, attention, Moments.empty(k, v), 0.5, mean, variance)
    here = torch.argsort(policy.importance(tokens), stable=True)
    with Reciprocals():
        there = torch.argsort(policy.importance(tokens), stable=True)
    assert torch.equal(here, there)

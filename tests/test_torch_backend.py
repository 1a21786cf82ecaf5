"""Which way the torch backend decodes, and that all ways agree."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from momentkv import Moments, attend, correct
from momentkv.backends import get_backend, plain
from momentkv.backends import torch as torch_backend
from momentkv.backends.base import ArrayBackend
from momentkv.testing import oracle
from momentkv.testing.rounding import assert_within, attention_error, unit

BACKEND = get_backend("torch")


def arrays(n: int = 20, dtype: torch.dtype = torch.float32, d: int = 8) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.standard_normal((2, heads, m, d))).to(dtype) for heads, m in ((6, 1), (2, n), (2, n))]


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [0, 1, 20])
def test_decode_is_attention_corrected(n: int, dtype: torch.dtype, weights: bool):
    """Exact to the rounding of float32, or float64, whichever way is taken."""
    q, k, v = arrays(n, dtype)
    out, attention = BACKEND.decode(q, k, v, None, scale=0.3, weights=weights)
    exact = oracle.attend(*(x.double().numpy() for x in (q, k, v)), 0.3)
    u = unit("float64" if dtype == torch.float64 else "float32")
    error = attention_error(*(x.double().numpy() for x in (q, k, v)), exact.lse, u, 0.3)
    assert_within(out.double().numpy(), exact.out, error.out)
    assert (attention is None) == (not weights)
    moments = Moments.from_tokens(*arrays(7, dtype)[1:])
    corrected, _ = BACKEND.decode(q, k, v, moments.expansion(), scale=0.3, weights=weights)
    reference = correct(attend(q, k, v, scale=0.3), q, moments, scale=0.3).out
    torch.testing.assert_close(corrected, reference, rtol=1e-5, atol=1e-5)


def test_flash_is_used_where_it_may_be_and_only_there(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    flash = plain.flash
    monkeypatch.setattr(torch_backend, "flash", lambda *xs, **options: calls.append(1) or flash(*xs, **options))

    def used(*xs: torch.Tensor, **options: Any) -> bool:
        calls.clear()
        BACKEND.decode(*xs, None, scale=0.3, **options)
        return bool(calls)

    assert used(*arrays())
    assert not used(*arrays(), weights=True)
    assert not used(*arrays(), valid=torch.ones(2, 2, 20, dtype=torch.bool))
    assert not used(*arrays(0))
    assert not used(*arrays(dtype=torch.bfloat16))
    assert not used(*(x[0] for x in arrays()))
    q, k, v = arrays()
    assert not used(q, k, v[..., :3])
    monkeypatch.setattr(plain, "FLASH", None)  # as in a PyTorch that has no such operator
    assert not used(*arrays())


def test_cuda_tensors_go_to_the_operator():
    """With tensors that are on CUDA by name only; the operator tells what it would return."""
    with FakeTensorMode():
        q, k, v = (x.to(torch.bfloat16) for x in (torch.empty(2, 6, 1, 8), *[torch.empty(2, 2, 20, 8)] * 2))
        q, k, v = (torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in (q, k, v))
        assert torch_backend.fuses(q, k, v) == torch_backend.has_triton()
        assert not torch_backend.fuses(q.double(), k.double(), v.double())
        query = torch.empty(q.shape, dtype=q.dtype, device="cuda")
        assert not torch_backend.fuses(q.requires_grad_(), k, v)
        with torch.no_grad():
            out, weights = BACKEND.decode(q, k, v, None, scale=0.3, weights=True)
        assert out.dtype == torch.bfloat16 or not torch_backend.has_triton()
        heads = [torch.empty(2, 1, n, 8, dtype=torch.bfloat16, device="cuda") for n in (20, 5)]
        ragged = BACKEND.decode_ragged(query, heads, heads, None, scale=0.3, valid=[None] * 2)
        assert (ragged[0].device.type, ragged[0].shape, ragged[1]) == ("cuda", (2, 6, 1, 8), None)
        assert weights is not None
        assert weights.shape == (2, 2, 3, 1, 20)
        assert (out.device.type, out.shape) == ("cuda", (2, 6, 1, 8))


def test_without_triton_it_says_so_once_and_decodes_plainly(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    torch_backend.has_triton.cache_clear()
    try:
        with FakeTensorMode():
            q, k, v = (torch.empty(shape, device="cuda") for shape in ((1, 2, 1, 8), (1, 1, 4, 8), (1, 1, 4, 8)))
            with pytest.warns(RuntimeWarning, match="Triton is not installed: momentkv.backends.torch"):
                out, _ = BACKEND.decode(q, k, v, None, scale=0.3)
            assert out.shape == (1, 2, 1, 8)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                BACKEND.decode(q, k, v, None, scale=0.3)
    finally:
        torch_backend.has_triton.cache_clear()


@pytest.mark.parametrize("masked", [False, True])
def test_packed_heads_are_decoded_as_they_are_one_by_one(masked: bool):
    """Heads of 5, 1 and 9 tokens; the operator on packed tokens against plain attention head by head."""
    rng = np.random.default_rng(0)
    q = torch.from_numpy(rng.standard_normal((2, 6, 1, 8))).float()
    keys, values = ([torch.from_numpy(rng.standard_normal((2, 1, n, 8))).float() for n in (5, 1, 9)] for _ in range(2))
    valid = [None, None, torch.from_numpy(rng.random((2, 1, 9)) < 0.5) if masked else None]
    gone = (torch.from_numpy(rng.standard_normal((2, 3, 7, 8))).float() for _ in range(2))
    moments = Moments.from_tokens(*gone)
    each = BACKEND.decode_ragged(q, keys, values, moments.expansion(), scale=0.3, valid=valid, weights=True)
    expansion = moments.expansion()
    packed = torch_backend.decode_packed(q, keys, values, expansion, scale=0.3, valid=valid, weights=True)
    torch.testing.assert_close(packed[0], each[0])
    for one, other in zip(packed[1], each[1], strict=True):
        torch.testing.assert_close(one, other)
    without, none = torch_backend.decode_packed(q, keys, values, expansion, scale=0.3, valid=valid, weights=False)
    torch.testing.assert_close(without, each[0])
    assert none is None


def test_every_backend_decodes_alike():
    q, k, v = arrays(dtype=torch.float64)
    valid = torch.rand(2, 2, 20) < 0.5
    moments = Moments.from_tokens(*arrays(7, torch.float64)[1:])
    one = BACKEND.decode(q, k, v, moments.expansion(), scale=0.3, valid=valid, weights=True)
    other = ArrayBackend().decode(q, k, v, moments.expansion(), scale=0.3, valid=valid, weights=True)
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y)

"""Rows of tokens are read where they lie, whatever the order of heads and tokens in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from momentkv import LayerCache
from momentkv._rows import joined_rows, lies_by_token, take_rows_of, take_rows_of_heads

LEADS = [(3,), (1, 3), (2, 3), (2, 2, 3)]


def laid(x, order):
    """The same tensor (..., head, token, d) with other axes side by side in memory."""
    if order == "by token":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if order == "of a wider projection":
        return torch.cat([x, x], -3).transpose(-3, -2).contiguous().transpose(-3, -2)[..., : x.shape[-3], :, :]
    return x.contiguous()


@pytest.mark.parametrize("order", ["by head", "by token", "of a wider projection"])
@pytest.mark.parametrize("lead", LEADS)
def test_rows_of_each_head(lead, order):
    make = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(*lead, 7, d, generator=make) for d in (4, 5))
    index = torch.randint(0, 7, (*lead, 9), generator=make)
    for got, x in zip(take_rows_of(index, laid(keys, order), values), (keys, values), strict=True):
        assert torch.equal(got, x.gather(-2, index[..., None].expand(*index.shape, x.shape[-1])))


@pytest.mark.parametrize("order", ["by head", "by token", "of a wider projection"])
@pytest.mark.parametrize("lead", LEADS)
def test_rows_of_all_heads(lead, order):
    make = torch.Generator().manual_seed(1)
    keys, values = (torch.randn(*lead, 7, d, generator=make) for d in (4, 5))
    index = torch.randint(0, lead[-1] * 7, (*lead[:-1], 11), generator=make)
    for got, x in zip(take_rows_of_heads(index, laid(keys, order), values), (keys, values), strict=True):
        rows = x.reshape(*lead[:-1], -1, x.shape[-1])
        assert torch.equal(got, rows.gather(-2, index[..., None].expand(*index.shape, x.shape[-1])))


def test_what_a_model_projects_is_not_copied(monkeypatch):
    x = laid(torch.randn(1, 3, 50, 4), "by token")
    assert lies_by_token(x)
    assert not lies_by_token(x.contiguous())
    assert not lies_by_token(np.zeros((1, 3, 50, 4)).swapaxes(-3, -2))
    copied, real = [], torch.Tensor.reshape

    def reshape(self, *shape):
        out = real(self, *shape)
        copied.append(self.numel() > 100 and out.untyped_storage().data_ptr() != self.untyped_storage().data_ptr())
        return out

    monkeypatch.setattr(torch, "reshape", lambda self, shape: reshape(self, shape))
    take_rows_of(torch.zeros(1, 3, 2, dtype=torch.int64), x)
    take_rows_of_heads(torch.zeros(1, 2, dtype=torch.int64), x)
    assert copied
    assert not any(copied)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_joined_rows_hide_whatever_lies_where_nothing_is(lead):
    rng = np.random.default_rng(2)
    first, x, real = rng.normal(size=(*lead, 2, 4)), rng.normal(size=(*lead, 6, 4)), rng.random((*lead, 6)) < 0.6
    hidden = np.where(real[..., None], x, 0.0)
    x[~real] = np.nan
    assert np.array_equal(joined_rows(first, x, real), np.concatenate([first, hidden], axis=-2))
    assert np.array_equal(joined_rows(first, hidden, None), np.concatenate([first, hidden], axis=-2))


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("budget", [40, [30, 40, 60]], ids=["even", "by head"])
def test_a_cache_is_the_same_however_its_tokens_lie(budget, bits):
    make = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, heads, 200, 16, generator=make) for heads in (6, 3, 3))
    views = []
    for order in ("by head", "by token", "of a wider projection"):
        cache = LayerCache(budget, policy="balanced", correction="summaries", bits=bits, window=8, block=8)
        cache.step(q, laid(k, order), laid(v, order))
        views.append((cache.view(), cache.moments))
    for view, moments in views[1:]:
        assert torch.equal(view.positions, views[0][0].positions)
        assert torch.equal(view.keys, views[0][0].keys)
        assert torch.equal(view.values, views[0][0].values)
        assert torch.equal(moments.weight, views[0][1].weight)
        assert torch.allclose(moments.key_mean, views[0][1].key_mean, rtol=1e-5, atol=1e-6)

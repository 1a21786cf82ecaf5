"""Points grouped by the kernel that Numba compiles: as products of matrices group them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from momentkv import LayerCache
from momentkv.backends import torch as torch_backend
from momentkv.backends.numba import decode as launch
from momentkv.backends.numba.clusters import cluster_compiled
from momentkv.statistics import clustering
from momentkv.statistics.clustering import by_products, cluster


def points(*lead, n=200, f=64, centres=6, far=0.0, seed=0):
    """Points around some centres, and weights, a quarter of them zero."""
    make = torch.Generator().manual_seed(seed)
    spread = torch.randn(*lead, centres, f, generator=make) * (1 + torch.rand(f, generator=make))
    index = torch.randint(0, centres, (*lead, n), generator=make)
    x = spread.gather(-2, index[..., None].expand(*lead, n, f)) + 0.5 * torch.randn(*lead, n, f, generator=make) + far
    weight = torch.rand(*lead, n, generator=make)
    weight[..., ::4] = 0
    return x, weight


def exactly(x, weight, groups):
    """The oracle: Gonzalez and Lloyd in float64, a point at a time."""
    x, weight = x.double().numpy(), weight.double().numpy()
    chosen = [int(np.argmax(weight))]
    nearest = np.full(len(x), np.inf)
    while len(chosen) < groups:
        nearest = np.minimum(nearest, weight * ((x - x[chosen[-1]]) ** 2).sum(-1))
        chosen.append(int(np.argmax(nearest)))
    centre = x[chosen].copy()
    for step in range(clustering.LLOYD_STEPS):
        own = ((x[:, None] - centre) ** 2).sum(-1).argmin(-1)
        for g in range(groups):
            if step < clustering.LLOYD_STEPS - 1 and weight[own == g].sum() > 0:
                centre[g] = np.average(x[own == g], axis=0, weights=weight[own == g])
    return np.eye(groups)[own]


@pytest.mark.parametrize("n", [1, 5, 44, 500])
@pytest.mark.parametrize("f", [32, 128, 256])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_is_what_products_of_matrices_group(lead, f, n):
    x, weight = points(*lead, n=n, f=f)
    got = cluster_compiled(x, weight, 6)
    assert got.shape == (*lead, n, 6)
    # Where there are more groups than points, rounding says which of those without weight has one of its own.
    some = weight > 0 if n < 6 else torch.ones_like(weight, dtype=torch.bool)
    assert torch.equal(got[some], by_products(x, weight, 6)[some])
    assert (got.sum(-1) == 1).all()


@pytest.mark.parametrize("groups", [2, 6, 12])
@pytest.mark.parametrize("far", [0.0, 100.0])
def test_is_what_float64_groups(groups, far):
    x, weight = points(n=150, far=far, seed=groups)
    assert np.array_equal(cluster_compiled(x, weight, groups).numpy(), exactly(x, weight, groups))


def test_different_points_are_apart_and_equal_ones_together():
    x, _ = points(n=4, centres=4)
    twice = torch.cat([x, x])
    got = cluster_compiled(twice, torch.ones(8), 12)
    assert torch.equal(got[:4], got[4:])
    assert (got[:4].sum(0) <= 1).all()
    assert torch.equal(got, by_products(twice, torch.ones(8), 12))


def test_points_of_no_weight_and_what_they_hold_change_no_centre():
    x, weight = points(2, n=90)
    other = x.clone()
    other[weight == 0] = torch.tensor([torch.nan, torch.inf, 1e30])[torch.arange(int((weight == 0).sum())) % 3, None]
    some = weight > 0
    assert torch.equal(cluster_compiled(other, weight, 5)[some], cluster_compiled(x, weight, 5)[some])
    empty = cluster_compiled(x, torch.zeros_like(weight), 5)
    assert (empty.sum(-1) == 1).all()


def test_a_point_that_is_no_number_is_alone_in_its_set():
    x, weight = points(3, n=60)
    whole = cluster_compiled(x, weight, 5)
    x[1, 7], weight[1, 7] = torch.nan, torch.nan
    got = cluster_compiled(x, weight, 5)
    assert torch.equal(got[[0, 2]], whole[[0, 2]])
    assert (got.sum(-1) == 1).all()


def test_threads_share_sets_and_change_nothing(monkeypatch):
    x, weight = points(2, 3)
    alone = cluster_compiled(x, weight, 6)
    real, asked_for = launch.pool, []
    monkeypatch.setattr(launch, "pool", lambda workers: asked_for.append(workers) or real(workers))
    monkeypatch.setattr(launch, "ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert torch.equal(cluster_compiled(x, weight, 6), alone)
    assert asked_for == [3] * 3


def test_it_is_asked_for_and_other_points_are_grouped_by_products(monkeypatch):
    x, weight = points()
    assert clustering.FASTER[torch_backend.TorchBackend.name] is cluster_compiled
    asked = []
    monkeypatch.setitem(clustering.FASTER, "torch", lambda *each: asked.append(1) or cluster_compiled(*each))
    assert torch.equal(cluster(x, weight, 6), by_products(x, weight, 6))
    assert asked == [1]
    for other in (x.double(), x[:, :24], x.clone().requires_grad_(), x.to("meta")):
        assert cluster_compiled(other, weight.to(other.device), 6) is None
    assert torch.equal(cluster(x.double(), weight.double(), 6), by_products(x.double(), weight.double(), 6))
    monkeypatch.setattr(launch, "has_numba", lambda: False)
    assert cluster_compiled(x, weight, 6) is None


@pytest.mark.parametrize("budget", [40, [30, 40, 60]], ids=["even", "by head"])
def test_a_cache_is_the_same_without_it(monkeypatch, budget):
    make = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, heads, 240, 32, generator=make) for heads in (6, 3, 3))
    caches = []
    for faster in ({"torch": cluster_compiled}, {}):
        monkeypatch.setattr(clustering, "FASTER", faster)
        cache = LayerCache(budget, policy="balanced", correction="summaries", window=8, block=8)
        out = [cache.step(q[:, :, :200], k[:, :, :200], v[:, :, :200])]
        out += [cache.step(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(200, 240)]
        caches.append((torch.cat(out, -2), cache.view().positions))
    assert torch.equal(caches[0][1], caches[1][1])
    assert torch.allclose(caches[0][0], caches[1][0], rtol=1e-4, atol=1e-5)

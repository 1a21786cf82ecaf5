"""Attention to records by the kernel that Numba compiles: that of the decoded tokens, whatever lies beside them."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from momentkv import LayerCache
from momentkv.backends import available
from momentkv.backends import torch as torch_backend
from momentkv.backends.layout import Layout, Tiers
from momentkv.backends.numba import compiled, decode_kernel
from momentkv.backends.numba import decode as launch
from momentkv.codes import Coding, Standard, decode, encode
from momentkv.statistics.expansion import Expansion

EPS = float(np.finfo(np.float32).eps)
WIDTHS = (40, 0, 17)
GROUP = 2


def stored(bits=(5, 3), d=64, dv=64, batch=2, widths=WIDTHS, graded=True, seed=0):
    """Tiers of records alone, and the tokens that they are read as, in float64, for each row and head."""
    make = torch.Generator().manual_seed(seed)
    heads, n = len(widths), max(widths)
    k = torch.randn(batch, heads, n, d, generator=make) + 1
    v = torch.randn(batch, heads, n, dv, generator=make)
    of_keys, of_values = Standard.of(k), Standard.of(v, centred=False)
    if graded:
        of_keys = of_keys.graded(bits[0], torch.rand(batch, heads, d, generator=make))
        assert of_keys.order is not None
    parts = [encode(x, of, each) for x, of, each in ((k, of_keys, bits[0]), (v, of_values, bits[1]))]
    packed = [
        torch.cat([x[:, head, :width] for head, width in enumerate(widths)], dim=1) for part in parts for x in part
    ]
    keys, key_step, values, value_step = packed
    nothing = torch.empty(batch, heads, 0, d), torch.empty(batch, heads, 0, dv)
    layout = Layout(0, 0, tuple(widths), bits)
    tiers = Tiers(*nothing, None, keys, values, None, layout, Coding(bits, key_step, value_step, of_keys, of_values))
    wide = (of.map(lambda x: x.double() if x.is_floating_point() else x) for of in (of_keys, of_values))
    read = [decode(codes, step, of, each).double() for (codes, step), of, each in zip(parts, wide, bits, strict=True)]
    return tiers, *read


def asked(tiers, q_len=1, seed=1):
    batch, heads, d = tiers.coding.key_standard.deviation.shape
    return torch.randn(batch, heads * GROUP, q_len, d, generator=torch.Generator().manual_seed(seed))


def exact(q, k, v, widths, scale, valid=None):
    """Output, log-sum-exp, the sum of the weighted absolute values, and the largest sum of a logit's absolute terms."""
    rows = []
    for head, width in enumerate(widths):
        own = q[:, head * GROUP : (head + 1) * GROUP].double()
        logits = scale * own @ k[:, head, None, :width].mT
        most = (scale * own.abs() @ k[:, head, None, :width].abs().mT).amax() if width else torch.tensor(0.0)
        if valid is not None:
            logits = logits.masked_fill(~valid[:, head, None, None, :width], -torch.inf)
        lse = torch.logsumexp(logits, -1)
        weights = torch.softmax(logits, -1).nan_to_num(0.0)
        values = v[:, head, None, :width]
        rows.append((weights @ values, lse, weights @ values.abs(), most.expand(lse.shape)))
    return [torch.cat(parts, dim=1) for parts in zip(*rows, strict=True)]


def agree(state, truth, d):
    """To rounding: sums of ``d`` terms, whose errors the exponential multiplies weights by."""
    out, lse, size, most = truth
    slack = (2 * d * most + 64) * EPS
    assert ((state.lse - lse).abs()[lse > -torch.inf] <= slack[lse > -torch.inf]).all()
    assert (state.lse[lse == -torch.inf] == -torch.inf).all()
    assert ((state.out - out).abs() <= 2 * slack[..., None] * size + 1e-30).all()


CODES = [
    ((5, 3), 64, 64, True),
    ((4, 2), 32, 32, True),
    ((3, 4), 96, 48, True),
    ((6, 6), 80, 64, False),
    ((8, 8), 128, 32, False),
    ((16, 5), 32, 112, False),
]


@pytest.mark.parametrize(("bits", "d", "dv", "graded"), CODES)
def test_is_attention_to_the_decoded_tokens(bits, d, dv, graded):
    tiers, k, v = stored(bits, d, dv, graded=graded)
    q = asked(tiers, q_len=3)
    assert launch.compiles(q, tiers)
    state = launch.attend_compiled(q, tiers, scale=0.3)
    assert state.out.dtype == state.lse.dtype == torch.float32
    agree(state, exact(q, k, v, WIDTHS, 0.3), d)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_queries_and_standards_of_16_bits(dtype):
    tiers, *_ = stored()
    coding = tiers.coding
    narrow = coding._replace(
        key_standard=coding.key_standard.map(lambda x: x.to(dtype) if x.is_floating_point() else x),
        value_standard=coding.value_standard.map(lambda x: x.to(dtype)),
    )
    q = asked(tiers).to(dtype)
    got = launch.attend_compiled(q, tiers._replace(coding=narrow), scale=0.3)
    wide = narrow._replace(
        key_standard=narrow.key_standard.map(lambda x: x.float() if x.is_floating_point() else x),
        value_standard=narrow.value_standard.map(lambda x: x.float()),
    )
    want = launch.attend_compiled(q.float(), tiers._replace(coding=wide), scale=0.3)
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_recent_tokens_of_16_bits_are_read_exactly(dtype):
    tiers, *_ = stored()
    keys, values, there = recent(64, 64)
    narrow = tiers._replace(recent_keys=keys.to(dtype), recent_values=values.to(dtype), recent_valid=there)
    wide = narrow._replace(recent_keys=narrow.recent_keys.float(), recent_values=narrow.recent_values.float())
    q = asked(tiers).to(dtype)
    assert launch.compiles(q, narrow)
    got, want = (launch.attend_compiled(each, x, scale=0.3) for each, x in ((q, narrow), (q.float(), wide)))
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)


@pytest.mark.parametrize("dv", [64, 48])
def test_retained_vectors_of_bfloat16_are_read_exactly(dv):
    tiers, k, v = stored(dv=dv)
    keys, values = (torch.cat([x[:, i, :width] for i, width in enumerate(WIDTHS)], 1).bfloat16() for x in (k, v))
    narrow = tiers._replace(keys=keys, values=values, layout=Layout(0, 0, WIDTHS), coding=None)
    wide = narrow._replace(keys=keys.float(), values=values.float())
    q = asked(tiers)
    assert launch.compiles(q, narrow)
    got, want = (launch.attend_compiled(q, x, scale=0.3) for x in (narrow, wide))
    assert torch.equal(got.out, want.out)
    assert torch.equal(got.lse, want.lse)
    assert not launch.compiles(q, narrow._replace(keys=keys.half(), values=values.half()))


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.uint8])
def test_before_an_eviction_nothing_is_retained_whatever_it_would_be_stored_as(of):
    tiers, *_ = stored()
    keys, values, _ = recent(64, 64)
    none = {"keys": tiers.keys[:, :0].to(of), "values": tiers.values[:, :0].to(of), "layout": Layout(0, 0, (0, 0, 0))}
    tiers = tiers._replace(recent_keys=keys, recent_values=values, **none)
    if of != torch.uint8:
        tiers = tiers._replace(coding=None)
    q = asked(stored()[0])
    assert launch.compiles(q, tiers)
    got = torch_backend.TorchBackend().attend_stored(q, tiers, scale=0.3)[0]
    want = torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=0.3, enable_gqa=True)
    assert torch.allclose(got.out, want, atol=1e-5)


def test_slots_without_a_token_may_hold_anything():
    tiers, k, v = stored()
    valid = torch.rand(2, 3, max(WIDTHS), generator=torch.Generator().manual_seed(2)) < 0.6
    valid[1, 2] = False  # of that head, this row has none
    packed = torch.cat([valid[:, head, :width] for head, width in enumerate(WIDTHS)], dim=1)
    coding = tiers.coding._replace(
        key_step=tiers.coding.key_step.masked_fill(~packed, torch.nan),
        value_step=tiers.coding.value_step.masked_fill(~packed, torch.inf),
    )
    q, hidden = asked(tiers), tiers._replace(valid=valid, coding=coding)
    state = launch.attend_compiled(q, hidden, scale=0.3)
    agree(state, exact(q, k, v, WIDTHS, 0.3, valid), 64)
    assert (state.out[1, 2 * GROUP :] == 0).all()
    keys, values, there = recent(64, 64)
    want = launch.attend_compiled(
        q, hidden._replace(recent_keys=keys, recent_values=values, recent_valid=there), scale=0.3
    )
    common = there[:, :1]  # the same for all heads, said once
    got, said = (
        launch.attend_compiled(q, tiers._replace(recent_keys=keys, recent_values=values, recent_valid=x), scale=0.3)
        for x in (common, common.repeat(1, 3, 1))
    )
    assert torch.equal(got.out, said.out)
    keys, values = (x.masked_fill(~there[..., None], torch.nan) for x in (keys, values))
    got = launch.attend_compiled(
        q, hidden._replace(recent_keys=keys, recent_values=values, recent_valid=there), scale=0.3
    )
    assert torch.equal(got.out, want.out)


@pytest.mark.parametrize("broken", ["key", "value", "query", "infinite query"])
def test_what_is_not_finite_stays_in_its_own_head(broken):
    tiers, *_ = stored()
    coding, q = tiers.coding, asked(tiers)
    before = launch.attend_compiled(q, tiers, scale=0.3)
    own = torch.zeros(2, 3 * GROUP, 1, dtype=torch.bool)
    if broken in ("key", "value"):
        step = getattr(coding, f"{broken}_step").clone()
        step[1, WIDTHS[0] + 3] = torch.nan  # a token of the last head
        coding = coding._replace(**{f"{broken}_step": step})
        own[1, 2 * GROUP :] = True
    else:
        q[0, 1, 0, 5] = torch.nan if broken == "query" else torch.inf
        own[0, 1] = True
    after = launch.attend_compiled(q, tiers._replace(coding=coding), scale=0.3)
    assert after.out[own].isnan().all()
    assert torch.equal(after.out[~own], before.out[~own])
    assert torch.equal(after.lse[~own], before.lse[~own])


def test_records_that_are_part_of_larger_ones():
    tiers, *_ = stored()
    q = asked(tiers)
    apart = [torch.cat([x, torch.full_like(x, 255)], dim=-1)[..., : x.shape[-1]] for x in (tiers.keys, tiers.values)]
    assert not apart[0].is_contiguous()
    want = launch.attend_compiled(q, tiers, scale=0.3)
    across = [x.mT.contiguous().mT for x in (tiers.keys, tiers.values)]
    for keys, values in (apart, across):
        got = launch.attend_compiled(q, tiers._replace(keys=keys, values=values), scale=0.3)
        assert torch.equal(got.out, want.out)


def test_far_logits_neither_overflow_nor_lose_the_nearest():
    tiers, k, v = stored()
    q = 30 * asked(tiers)
    state = launch.attend_compiled(q, tiers, scale=5.0)
    agree(state, exact(q, k, v, WIDTHS, 5.0), 64)


def test_the_exponential_is_right_to_rounding():
    x = np.concatenate([np.linspace(-87, 0, 20001), -np.logspace(-8, 0, 1001)]).astype(np.float32)
    got = np.asarray([decode_kernel.exponential(each) for each in x], dtype=np.float64)
    assert (np.abs(got / np.exp(x.astype(np.float64)) - 1) <= 2 * EPS).all()
    assert decode_kernel.exponential(np.float32(0)) == 1
    assert np.isnan(decode_kernel.exponential(np.float32(np.nan)))


def test_steps_of_16_bits_are_read_exactly():
    every = np.arange(2**16, dtype=np.uint16)
    steps = every.view(np.float16)
    used = every[(steps >= 2.0**-14) | np.isnan(steps) & (every < 2**15)]
    got = np.asarray([decode_kernel.step_of(each) for each in used], dtype=np.float32)
    want = used.view(np.float16).astype(np.float32)
    assert np.array_equal(got, np.where(np.isinf(want), np.nan, want), equal_nan=True)


def groups(batch=2, d=64, dv=64, number=12, rank=2, anchored=True, spread=True, seed=3):
    """An expansion in float64; of the last head of the last row, nothing has been evicted."""
    make, heads = torch.Generator().manual_seed(seed), len(WIDTHS)

    def some(*shape):
        return torch.randn(batch, heads, *shape, generator=make, dtype=torch.float64)

    log_weight = some(number) + 2
    log_weight[-1, -1] = -torch.inf
    return Expansion(
        log_weight=log_weight,
        key_mean=0.3 * some(number, d),
        value_mean=some(number, dv),
        anchor=0.2 * some(d) if anchored else None,
        slope_left=0.2 * some(dv, rank) if rank else None,
        slope_right=0.2 * some(rank, d) if rank else None,
        variance=0.1 * some(d).abs() if spread else None,
        strength=torch.full((batch, heads), 0.75, dtype=torch.float64) if spread else None,
        cap=torch.full((batch, heads), 0.5, dtype=torch.float64) if spread else None,
    )


def recent(d, dv, batch=2, n=21, seed=4):
    """Keys and values in the first slots of larger buffers, and which of them there are."""
    make, heads = torch.Generator().manual_seed(seed), len(WIDTHS)
    keys, values = (torch.randn(batch, heads, n + 9, each, generator=make)[:, :, :n] for each in (d, dv))
    return keys, values, torch.rand(batch, heads, n, generator=make) < 0.7


KINDS = [
    {},
    {"rank": 0},
    {"spread": False},
    {"anchored": False},
    {"number": 1, "rank": 0, "spread": False, "anchored": False},
    None,
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("retained", ["records", "vectors", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_decodes_as_plain_operators_do_in_twice_the_precision(kind, retained, masked):
    backend, (d, dv) = torch_backend.TorchBackend(), (64, 64)
    tiers, k, v = stored(d=d, dv=dv)
    keys, values, there = recent(d, dv)
    tiers = tiers._replace(recent_keys=keys, recent_values=values, recent_valid=there if masked else None)
    q, widths = 3 * asked(tiers, q_len=2), (0, 0, 0) if retained == "none" else WIDTHS
    packed = [torch.cat([x[:, head, :width] for head, width in enumerate(widths)], dim=1) for x in (k, v)]
    vectors = tiers._replace(keys=packed[0], values=packed[1], layout=Layout(0, 0, widths), coding=None)
    if retained != "records":
        tiers = vectors._replace(keys=packed[0].float(), values=packed[1].float())
    wide = vectors._replace(
        **{name: x.double() for name, x in vectors._asdict().items() if torch.is_tensor(x) and x.is_floating_point()}
    )
    expansion = None if kind is None else groups(**kind)
    narrow = expansion and backend.prepare(Expansion(*map(single, expansion)))
    assert launch.compiles(q, tiers, narrow)
    if expansion is None:
        got, truth = (backend.attend_stored(*each, scale=0.2)[0] for each in ((q, tiers), (q.double(), wide)))
        assert torch.allclose(got.lse.double(), truth.lse, rtol=0, atol=1e-4)
        got, truth = got.out, truth.out
    else:
        got = backend.decode(q, tiers, narrow, scale=0.2)[0]
        truth = backend.decode(q.double(), wide, expansion, scale=0.2)[0]
    most = 0.2 * d * float(q.abs().max() * max(x.abs().max() for x in (k, keys)))
    largest = max(float(x.abs().max()) for x in (v, values, truth, *(() if expansion is None else expansion[2:3])))
    assert got.dtype == torch.float32
    assert float((got - truth).abs().max()) <= 2 * (2 * d * most + 64) * EPS * largest


def single(x):
    return None if x is None else x.float()


def test_threads_share_heads_and_change_nothing(monkeypatch):
    tiers, *_ = stored()
    keys, values, there = recent(64, 64)
    tiers = tiers._replace(recent_keys=keys, recent_values=values, recent_valid=there)
    q, expansion = asked(tiers), torch_backend.TorchBackend().prepare(Expansion(*map(single, groups())))
    alone = launch.attend_compiled(q, tiers, expansion, scale=0.3)
    real, asked_for = launch.pool, []
    monkeypatch.setattr(launch, "pool", lambda workers: asked_for.append(workers) or real(workers))
    monkeypatch.setattr(launch, "ALONE", 0)
    for threads, others in ((1, []), (2, [1]), (4, [3] * 3), (64, [5] * 5)):  # there are six pairs of row and head
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        asked_for.clear()
        shared = launch.attend_compiled(q, tiers, expansion, scale=0.3)
        assert asked_for == others
        assert torch.equal(shared.out, alone.out)
        assert torch.equal(shared.lse, alone.lse)


FORKED = """
import os, torch
from momentkv.backends.numba import decode
assert decode.pool(1).submit(int).result() == 0
child = os.fork()
if not child:
    os._exit(decode.pool(1).submit(int).result(timeout=60))
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own():
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=600)


def test_a_cache_decodes_by_it(monkeypatch):
    calls, real = [], launch.attend_compiled
    monkeypatch.setattr(torch_backend, "attend_compiled", lambda *a, **k: calls.append(len(a)) or real(*a, **k))
    make = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, heads, 200, 64, generator=make) for heads in (6, 3, 3))
    for bits in (None, 4):
        cache = LayerCache(40, policy="expected-attention", correction="summaries", bits=bits)
        cache.step(q, k, v)
        calls.clear()
        for t in range(3):
            out = cache.step(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
            assert out.isfinite().all()
        assert calls == [3, 3, 3]  # with an expansion


def test_the_backend_takes_it_where_it_can(monkeypatch):
    tiers, *_ = stored()
    q, calls = asked(tiers), []
    real = launch.attend_compiled
    monkeypatch.setattr(torch_backend, "attend_compiled", lambda *a, **k: calls.append(1) or real(*a, **k))
    backend = torch_backend.TorchBackend()
    compiled, none = backend.attend_retained(q, tiers, scale=0.3, weights=False)
    assert (len(calls), none) == (1, None)
    plain, weights = backend.attend_retained(q, tiers, scale=0.3, weights=True)
    assert (len(calls), weights.shape) == (1, (2, 3, GROUP, 1, max(WIDTHS)))
    assert torch.allclose(plain.out, compiled.out, atol=1e-5)
    out, weights = backend.decode(q, tiers, backend.prepare(Expansion(*map(single, groups()))), scale=0.3, weights=True)
    assert (len(calls), out.shape, weights.shape) == (1, q.shape, (2, 3, GROUP, 1, max(WIDTHS)))
    wide = tiers._replace(coding=tiers.coding._replace(key_standard=tiers.coding.key_standard.map(torch.Tensor.double)))
    q.requires_grad_()
    for other in (q, q.detach().double()):
        assert not launch.compiles(other, tiers)
    assert not launch.compiles(q.detach(), wide)
    many = asked(tiers, q_len=launch.MOST_OF_CODES + 1)
    backend.attend_retained(many, tiers, scale=0.3, weights=False)
    assert len(calls) == 1


def test_without_numba_it_says_so_once_and_reads_plainly(monkeypatch):
    tiers, *_ = stored()
    q, backend = asked(tiers), torch_backend.TorchBackend()
    want = backend.attend_retained(q, tiers, scale=0.3, weights=False)[0]
    monkeypatch.setitem(sys.modules, "numba", None)
    available.has_numba.cache_clear()
    try:
        with pytest.warns(RuntimeWarning, match=r"Numba cannot be imported .*; run pip install numba"):
            got = backend.attend_retained(q, tiers, scale=0.3, weights=False)[0]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            backend.attend_retained(q, tiers, scale=0.3, weights=False)
    finally:
        available.has_numba.cache_clear()
    assert torch.allclose(got.out, want.out, atol=1e-5)


def test_without_a_place_on_disk_it_is_compiled_all_the_same(monkeypatch):
    def nowhere(*args, **kwargs):
        if kwargs.get("cache"):
            raise RuntimeError("cannot cache function 'attend': no locator available")
        return real(*args, **kwargs)

    real = compiled.njit
    monkeypatch.setattr(compiled, "njit", nowhere)
    decode_kernel.kernel.cache_clear()
    tiers, k, v = stored()
    q = asked(tiers)
    try:
        agree(launch.attend_compiled(q, tiers, scale=0.3), exact(q, k, v, WIDTHS, 0.3), 64)
        assert decode_kernel.kernel(5, 3, 64, 64, 1).stats.cache_path is None
    finally:
        decode_kernel.kernel.cache_clear()

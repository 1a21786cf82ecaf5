"""Which way the torch backend decodes, and that all ways agree."""

from __future__ import annotations

import dataclasses
import importlib.util
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from torch._subclasses.fake_tensor import FakeTensorMode

from momentkv import Moments, attend, correct, merge
from momentkv import codes as few
from momentkv.backends import flash, get_backend, records
from momentkv.backends import torch as torch_backend
from momentkv.backends.base import ArrayBackend
from momentkv.backends.layout import Layout, Tiers
from momentkv.statistics.expansion import estimate_expansion
from momentkv.statistics.summaries import QueryWindow, Summaries
from momentkv.testing import oracle
from momentkv.testing.rounding import assert_within, attention_error, merge_error, unit
from momentkv.testing.strategies import Case, cases
from momentkv.testing.tiers import lay_out

BACKEND = get_backend("torch")


def arrays(n: int = 20, dtype: torch.dtype = torch.float32, d: int = 8) -> list[torch.Tensor]:
    rng = np.random.default_rng(0)
    return [torch.from_numpy(rng.standard_normal((2, heads, m, d))).to(dtype) for heads, m in ((6, 1), (2, n), (2, n))]


def laid_out(
    k: torch.Tensor, v: torch.Tensor, widths: list[int], *, told: bool = False, valid: torch.Tensor | None = None
) -> Tiers:
    """The first tokens of each head retained, the others recent."""
    mask = None if valid is None else valid.numpy()
    tiers = lay_out(*(x.double().numpy() for x in (k, v)), widths, told=told, valid=mask).arrays(torch.from_numpy)
    given = {name: getattr(tiers, name).to(k.dtype) for name in ("recent_keys", "recent_values", "keys", "values")}
    return tiers._replace(**given)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("widths", [[0, 0], [1, 1], [12, 12], [20, 20], [3, 12]], ids=str)
def test_decode_is_attention_corrected(widths: list[int], dtype: torch.dtype, prepared: bool, weights: bool):
    """Exact to the rounding of float32, or float64, whichever way is taken."""
    q, k, v = arrays(20, dtype)
    tiers = laid_out(k, v, widths)
    out, attention = BACKEND.decode(q, tiers, None, scale=0.3, weights=weights)
    numbers = [x.double().numpy() for x in (q, k, v)]
    exact, u = oracle.attend(*numbers, 0.3), unit("float64" if dtype == torch.float64 else "float32")
    part = attention_error(*numbers, exact.lse, u, 0.3)
    # Merged from two parts, whose lse are of the size of the largest logit.
    largest = 0.3 * float(q.double().norm(dim=-1).max() * k.double().norm(dim=-1).max()) + 3
    error = merge_error(part, part, float(v.double().norm(dim=-1).max()), np.array(largest), u)
    assert_within(out.double().numpy(), exact.out, error.out)
    assert (attention is None) == (not weights)
    moments = Moments.from_tokens(*arrays(7, dtype)[1:])
    expansion = BACKEND.prepare(moments.expansion()) if prepared else moments.expansion()
    corrected, _ = BACKEND.decode(q, tiers, expansion, scale=0.3, weights=weights)
    reference = correct(attend(q, k, v, scale=0.3), q, moments, scale=0.3).out
    torch.testing.assert_close(corrected, reference, rtol=1e-5, atol=1e-5)


@given(case=cases(laws=("gaussian", "ties"), masks=("none", "rows")))
def test_prepared_expansions_are_evaluated_as_the_core_does(case: Case):
    """Of moments of every order, of summaries and around an anchor, some of no token; to rounding, in float64."""
    case = dataclasses.replace(case, dtype="float64", batch=(2,))
    q, k, v = (torch.from_numpy(np.array(x)) for x in case.arrays())
    mask = case.token_mask()
    mask = torch.ones(k.shape[:-1], dtype=torch.bool) if mask is None else torch.from_numpy(mask)
    window = QueryWindow.from_queries(q, case.kv_heads)
    moments, anchored = (
        Moments.from_tokens(k, v, mask=mask, order=2, anchor=anchor) for anchor in (None, 0.1 * window.mean)
    )
    summaries = [Summaries.empty(k, v, summaries=m, rank=1).update(k, v, window, mask=mask) for m in (1, 3)]
    kinds = [x.expansion() for x in summaries]
    kinds += [x.expansion(order=order) for x in (moments, anchored) for order in (0, 1, 2)]
    for expansion in kinds:
        exact = estimate_expansion(q, expansion, scale=0.3)
        for others in ([attend(q, k, v, scale=0.3)], [attend(q, k, v, scale=0.3, mask=mask[..., None, None, :])]):
            made = BACKEND.prepare(expansion).join(q, others, scale=0.3, empty=True)
            torch.testing.assert_close(made, merge(*others, exact).out, rtol=1e-12, atol=1e-12)


def test_flash_is_used_where_it_may_be_and_only_there(monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []
    kernel = flash.FLASH
    monkeypatch.setattr(flash, "FLASH", lambda *xs, **options: calls.append(1) or kernel(*xs, **options))

    def used(q: torch.Tensor, tiers: Tiers, prepared: bool = True, **options: Any) -> int:
        calls.clear()
        expansion = Moments.from_tokens(tiers.recent_keys, tiers.recent_values).expansion()
        BACKEND.decode(q, tiers, BACKEND.prepare(expansion) if prepared else expansion, scale=0.3, **options)
        return len(calls)

    q, k, v = arrays()
    halves, rows = arrays(dtype=torch.bfloat16), [x[0] for x in arrays()]
    for prepared in (True, False):
        # Once for recent tokens, and once for retained ones, or for each head of its own.
        assert used(q, Tiers.of(k, v), prepared) == 1
        assert used(q, laid_out(k, v, [5, 5]), prepared) == 2
        assert used(q, laid_out(k, v, [5, 6]), prepared) == 3
        assert used(q, laid_out(k, v, [0, 6]), prepared) == 2
        assert used(q, laid_out(k, v, [5, 6], valid=torch.rand(2, 2, 20) < 0.5), prepared) == 3
        assert not used(q, laid_out(k, v, [5, 6]), prepared, weights=True)
        assert not used(halves[0], Tiers.of(*halves[1:]), prepared)
        assert not used(q, Tiers.of(k, v[..., :3]), prepared)
        assert not used(rows[0], Tiers.of(*rows[1:]), prepared)
    monkeypatch.setattr(flash, "FLASH", None)  # as in a PyTorch that has no such operator
    assert not used(q, Tiers.of(k, v))


def on_cuda(k: torch.Tensor, v: torch.Tensor, widths: tuple[int, ...]) -> Tiers:
    """Tiers of no numbers, with ``k`` and ``v`` as recent tokens."""
    packed = (torch.empty(k.shape[0], sum(widths), x.shape[-1], dtype=x.dtype, device="cuda") for x in (k, v))
    return Tiers(k, v, None, *packed, None, Layout(1, k.shape[-2], widths))


def test_cuda_tensors_go_to_the_operator(monkeypatch: pytest.MonkeyPatch):
    """With tensors that are on CUDA by name only; the operator tells what it would return."""

    def packed_slots(layout: Layout, batch: int, where: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        of = (batch, layout.heads)
        return torch.empty(of, dtype=torch.int64, device=where), torch.empty(of, dtype=torch.int32, device=where)

    monkeypatch.setattr(torch_backend, "packed_slots", packed_slots)
    with FakeTensorMode():
        q, k, v = (x.to(torch.bfloat16) for x in (torch.empty(2, 6, 1, 8), *[torch.empty(2, 2, 20, 8)] * 2))
        q, k, v = (torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in (q, k, v))
        assert torch_backend.fuses(q, k, v) == torch_backend.has_triton()
        assert not torch_backend.fuses(q.double(), k.double(), v.double())
        query = torch.empty(q.shape, dtype=q.dtype, device="cuda")
        assert not torch_backend.fuses(q.requires_grad_(), k, v)
        for widths, slots in (((0, 0), 0), ((20, 5), 20)):
            tiers = on_cuda(k, v, widths)
            with torch.no_grad():
                out, weights = BACKEND.decode(q, tiers, None, scale=0.3, weights=True)
            assert weights is not None
            assert weights.shape == (2, 2, 3, 1, slots + 20)
            assert (out.device.type, out.shape) == ("cuda", (2, 6, 1, 8))
            assert out.dtype == torch.bfloat16 or not torch_backend.has_triton()
            without = BACKEND.decode(query, tiers, None, scale=0.3)
            assert (without[0].device.type, without[0].shape, without[1]) == ("cuda", (2, 6, 1, 8), None)


@pytest.mark.parametrize(("bits", "read"), [((4, 4), True), ((5, 3), True), ((16, 16), False)], ids=str)
def test_records_on_cuda_go_to_the_operator_where_it_reads_them(
    bits: tuple[int, int], read: bool, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    layout = Layout(1, 20, (12, 12), bits)
    calls: list[str] = []
    with FakeTensorMode():

        def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda")

        def slots(*_: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return empty(2, 2, dtype=torch.int64), empty(2, 2, dtype=torch.int32)

        monkeypatch.setattr(torch_backend, "packed_slots", slots)
        decode = torch_backend.decode
        monkeypatch.setattr(torch_backend, "decode", lambda *a, **k: calls.append("fused") or decode(*a, **k))
        monkeypatch.setattr(ArrayBackend, "decode", lambda *_, **__: calls.append("plain") or (None, None))
        steps = [empty(2, 24, dtype=torch.float16) for _ in range(2)]
        standards = few.Standard(empty(2, 2, 8), empty(2, 2, 8)), few.Standard(None, empty(2, 2, 8))
        records = [empty(2, 24, few.row_bytes(8, each), dtype=torch.uint8) for each in bits]
        recent = [empty(2, 2, 20, 8) for _ in range(2)]
        tiers = Tiers(*recent, None, *records, None, layout, few.Coding(bits, *steps, *standards))
        with torch.no_grad():
            out, weights = BACKEND.decode(empty(2, 6, 1, 8), tiers, None, scale=0.3, weights=True)
    assert calls == ["fused" if read else "plain"]
    if read:
        assert weights is not None
        assert (out.shape, weights.shape) == ((2, 6, 1, 8), (2, 2, 3, 1, 32))


def test_without_triton_it_says_so_once_and_decodes_plainly(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    torch_backend.has_triton.cache_clear()
    try:
        with FakeTensorMode():
            q, k, v = (torch.empty(shape, device="cuda") for shape in ((1, 2, 1, 8), (1, 1, 4, 8), (1, 1, 4, 8)))
            with pytest.warns(RuntimeWarning, match="Triton is not installed: momentkv.backends.torch"):
                out, _ = BACKEND.decode(q, on_cuda(k, v, (0,)), None, scale=0.3)
            assert out.shape == (1, 2, 1, 8)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                BACKEND.decode(q, on_cuda(k, v, (0,)), None, scale=0.3)
    finally:
        torch_backend.has_triton.cache_clear()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("widths", [[5, 1, 9], [4, 4, 4], [0, 0, 0]], ids=str)
def test_the_operator_decodes_tiers_as_plain_attention_does(widths: list[int], masked: bool):
    """Heads of different numbers, packed, some slots in use: once for each tier, against both in the open."""
    rng = np.random.default_rng(0)
    q, k, v = (
        torch.from_numpy(rng.standard_normal((2, heads, n, 8))).float() for heads, n in ((6, 1), (3, 12), (3, 12))
    )
    tiers = laid_out(k, v, widths)
    if masked:
        # Of each row and head the first slots, as caches use them; one has none at all.
        retained = np.array(widths)[:, None]
        counts, recent = (torch.from_numpy(rng.integers(0, n + 1, (2, 3, 1))) for n in (retained, 12 - retained))
        counts[0, 0], recent[0, 0] = 0, 0
        tiers = tiers._replace(
            valid=torch.arange(tiers.layout.width) < counts, recent_valid=torch.arange(tiers.layout.recent) < recent
        )
    moments = Moments.from_tokens(*(torch.from_numpy(rng.standard_normal((2, 3, 7, 8))).float() for _ in range(2)))
    for expansion in (moments.expansion(), None):
        expected = ArrayBackend().decode(q, tiers, expansion, scale=0.3, weights=True)
        fused = torch_backend.decode_tiers(q, tiers, expansion, scale=0.3, weights=True)
        for one, other in zip(fused, expected, strict=True):
            torch.testing.assert_close(one, other)
        without, none = torch_backend.decode_tiers(q, tiers, expansion, scale=0.3, weights=False)
        torch.testing.assert_close(without, expected[0])
        assert none is None


def test_every_backend_decodes_alike():
    q, k, v = arrays(dtype=torch.float64)
    tiers = laid_out(k, v, [7, 12], valid=torch.rand(2, 2, 20) < 0.5)
    moments = Moments.from_tokens(*arrays(7, torch.float64)[1:])
    one = BACKEND.decode(q, tiers, moments.expansion(), scale=0.3, weights=True)
    other = ArrayBackend().decode(q, tiers, moments.expansion(), scale=0.3, weights=True)
    for x, y in zip(one, other, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("d", "bits", "graded"),
    [
        (d, bits, graded)
        for d in (1, 7, 16, 64, 80, 96, 128)
        for bits in few.BITS
        for graded in ((False, True) if few.can_grade(bits, d) else (False,))
    ],
)
def test_sums_of_masked_bytes_are_codes(d: int, bits: int, graded: bool):
    codes = torch.randint(0, 2**bits, (2, 5, d), dtype=torch.int32, generator=torch.Generator().manual_seed(d))
    if graded:
        most = torch.repeat_interleave(torch.tensor([2**each for each in few.GRADES[bits]]), d // 2)
        codes %= most
    packed = (few.pack_graded if graded else few.pack)(codes, bits)
    how = records.masked_bytes(bits, d, graded, torch.float32, packed.device)
    for x, expected in ((packed, codes), (packed[:, ::2], codes[:, ::2])):
        read = records.from_numbers(records.numbers(x, slice(0, 5), how, torch.float32), how)
        assert torch.equal(read.int(), expected)
    middle = [few.centre(each) for each in (few.GRADES[bits] if graded else (bits, bits))]
    assert how.centre.tolist() == [middle[2 * channel >= d] for channel in range(d)]


def test_a_reading_made_for_stand_ins_serves_these_alone():
    records.remembered.cache_clear()
    with FakeTensorMode():
        fake = records.masked_bytes(4, 48, False, torch.float32, torch.device("cpu"))
    real = records.masked_bytes(4, 48, False, torch.float32, torch.device("cpu"))
    assert type(real.masks) is torch.Tensor
    assert type(fake.masks) is not torch.Tensor


def test_a_reading_made_without_gradients_serves_those_who_want_them():
    records.remembered.cache_clear()
    coded = few.encode(
        torch.randn(1, 2, 9, 16), standard := few.Standard.of(torch.randn(1, 2, 9, 16), centred=False), 3
    )
    records_of_both = few.Coded((3, 3), coded[0], coded[0], coded[1], coded[1], standard, standard)
    with torch.inference_mode():
        records.attend_records(torch.randn(1, 2, 1, 16), records_of_both, scale=1.0)
    q = torch.randn(1, 2, 1, 16, requires_grad=True)
    records.attend_records(q, records_of_both, scale=1.0)[0].out.sum().backward()
    assert q.grad is not None
    assert bool((q.grad != 0).any())


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("bits", [(5, 3), (4, 2), (16, 8)])
def test_records_are_attended_to_as_by_the_reference(
    monkeypatch: pytest.MonkeyPatch, bits: tuple[int, int], masked: bool
):
    monkeypatch.setattr(records, "BLOCK", 16)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, 64, generator=generator, dtype=torch.float64) for h, n in ((4, 3), (2, 40), (2, 40))
    )
    standards = few.Standard.of(k), few.Standard.of(v, centred=False)
    (keys, key_step), (values, value_step) = (
        few.encode(x, standard, each) for x, standard, each in zip((k, v), standards, bits, strict=True)
    )
    coded = few.Coded(bits, keys, values, key_step, value_step, *standards)
    mask = torch.rand(2, 2, 1, 3, 40, generator=generator) < 0.5 if masked else None
    if mask is not None:
        mask[0, 0, 0, 1] = False
    state, weights = records.attend_records(q, coded, scale=0.2, mask=mask)
    exact, shares = few.attend_codes(q, coded, scale=0.2, mask=mask)
    for x, y in ((state.out, exact.out), (state.lse, exact.lse), (weights, shares)):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seen", [1.0, 0.5, 0.0])
def test_attention_has_the_gradient_of_its_formula(seen: float):
    """By finite differences, of outputs and weights; also of a query that sees nothing."""
    q, k, v = (x.requires_grad_() for x in arrays(5, torch.float64, 3))
    mask = None if seen == 1 else torch.rand(2, 2, 1, 1, 5, generator=torch.Generator().manual_seed(0)) < seen

    def attended(*given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, weights = BACKEND.attend(*given, scale=0.5, mask=mask)
        return (state.out, weights, *([state.lse] if seen else []))

    assert torch.autograd.gradcheck(attended, (q, k, v))


def test_summaries_have_the_gradient_of_their_formula():
    """As long as no token changes its group."""
    q, k, v = arrays(20, torch.float64, 4)
    window = QueryWindow.from_queries(q, kv_heads=2)

    def summarised(k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state = Summaries.empty(k, v, summaries=3, rank=1).update(k, v, window)
        return state.key_mean, state.value_mean, state.key_variance, state.log_weight, state.slope

    assert torch.autograd.gradcheck(summarised, (k.requires_grad_(), v.requires_grad_()))

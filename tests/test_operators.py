"""The operator `decode` as PyTorch sees it, and what a backend makes of it; on a CPU it is plain PyTorch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given

from momentkv import Moments
from momentkv.backends import ArrayBackend, plain
from momentkv.backends.layout import Layout, Tiers
from momentkv.backends.operators import decode, decode_operator, parts_of, reads_codes
from momentkv.backends.plain import prepare
from momentkv.backends.torch import TorchBackend, decode_tiers
from momentkv.codes import Coding, Standard, encode
from momentkv.statistics.expansion import estimate_expansion
from momentkv.statistics.summaries import QueryWindow, Summaries
from momentkv.testing import oracle
from momentkv.testing.decoding import Decode, coded_cases, expected, f64, make
from momentkv.testing.rounding import assert_within
from momentkv.testing.strategies import Case, cases

CASES = [
    *(Decode(d=16, estimate=kind) for kind in ("none", "order 0", "order 1", "order 2", "summaries x 12")),
    Decode(d=16, dtype=torch.bfloat16, estimate="order 1", scored=True),
    Decode(d=16, dtype=torch.float16),
    Decode(d=5, dv=3, group=3, q_len=2, scored=True, estimate="summaries x 2"),
    *(Decode(d=16, capacity=n, estimate=kind, scored=True) for n in (0, 1) for kind in ("none", "order 1")),
    Decode(d=16, counted=True, masked=True, estimate="order 2", kv_heads=3, scored=True),
    Decode(d=16, packed=True, masked=True, estimate="order 1", scored=True),
    Decode(d=16, packed=True, kv_heads=3),
    Decode(d=16, recent=9),
    Decode(d=16, dtype=torch.bfloat16, recent=9, packed=True, estimate="order 1"),
    Decode(d=5, dv=3, recent=9, recent_masked=True, counted=True, scored=True, group=3, estimate="summaries x 2"),
    Decode(d=16, recent=9, recent_masked=True, capacity=0, scored=True),
    *coded_cases(torch.float32, torch.bfloat16),
]


def call(case: Decode, **changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x = make(case)
    arguments = {
        "scale": case.scale,
        "positions": x.positions,
        "counts": x.counts,
        "starts": x.starts,
        "capacity": case.capacity,
        "recent": x.recent,
        "scored": case.scored,
        "coding": x.coding,
        **changes,
    }
    return decode(x.q, x.k, x.v, x.expansion, **arguments)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_agrees_with_the_oracle(case: Decode):
    out, lse, logits = call(case)
    exact, exact_logits, error = expected(case, make(case))
    assert (out.dtype, lse.dtype) == (case.dtype, torch.float32)
    assert_within(f64(out), exact.out, error.out)
    assert_within(f64(lse), exact.lse, error.lse)
    assert (logits is not None) == case.scored
    if logits is not None:
        assert (f64(logits).reshape(exact_logits.shape) == -np.inf).tolist() == (exact_logits == -np.inf).tolist()
        np.testing.assert_allclose(f64(logits).reshape(exact_logits.shape), exact_logits, rtol=1e-5, atol=1e-5)


@given(case=cases(laws=("gaussian", "ties")))
def test_torch_estimates_an_expansion_as_the_core_does(case: Case):
    """Of moments of every order, of summaries and of weighted moments around an anchor; to rounding, in float64."""
    case = dataclasses.replace(case, dtype="float64")
    q, k, v = (torch.from_numpy(np.array(x)) for x in case.arrays())
    window = QueryWindow.from_queries(q, case.kv_heads)
    anchored = Moments.from_tokens(k, v, anchor=0.1 * window.mean, order=2)
    moments = Moments.from_tokens(k, v, order=2)
    summaries = Summaries.empty(k, v, summaries=2, rank=1).update(k, v, window)
    kinds = [summaries.expansion(), *(x.expansion(order=order) for x in (moments, anchored) for order in (0, 1, 2))]
    for expansion in kinds:
        exact = estimate_expansion(q, expansion, scale=0.3)
        made = plain.estimate_expansion(q, expansion, scale=0.3)
        torch.testing.assert_close(made.lse, exact.lse, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(made.out, exact.out, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("widths", [(5, 5), (7, 2), (4, 0), (0, 0)], ids=str)
def test_a_decoding_step_joins_both_tiers_and_the_estimate(widths: tuple[int, int], masked: bool):
    """By the operator, as on CUDA, and prepared, as on a CPU; as the array API does, weights as well."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    q, gone = normal(2, 4, 1, 8), (normal(2, 2, 30, 8), normal(2, 2, 30, 8))
    recent, packed = (normal(2, 2, 3, 8), normal(2, 2, 3, 8)), (normal(2, sum(widths), 8), normal(2, sum(widths), 8))
    seen = valid = None
    if masked:
        seen, valid = (
            torch.tensor([True, True, False]).expand(2, 2, 3),
            torch.arange(max(widths)) < torch.tensor([[[min(widths[0], 3)], [widths[1]]], [[widths[0]], [0]]]),
        )
    tiers = Tiers(*recent, seen, *packed, valid, Layout(1, 3, widths))
    expansion = Summaries.empty(*gone).update(*gone, QueryWindow.from_queries(q, 2)).expansion()
    for of, prepared in ((None, None), (expansion, prepare(expansion))):
        exact, weights = ArrayBackend().decode(q, tiers, of, scale=0.3, weights=True)
        for scored in (False, True):
            for out, attention in (
                decode_tiers(q, tiers, of, scale=0.3, weights=scored),
                TorchBackend().decode(q, tiers, prepared, scale=0.3, weights=scored),
            ):
                torch.testing.assert_close(out, exact, rtol=2e-5, atol=2e-6)
                if scored:
                    torch.testing.assert_close(attention, weights, rtol=2e-5, atol=2e-6)
                else:
                    assert attention is None


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("widths", [(5, 5), (7, 2), (4, 0)], ids=str)
@pytest.mark.parametrize("bits", [(4, 4), (5, 3), (8, 8)], ids=str)
def test_a_decoding_step_over_records_does_as_the_array_api_does(
    bits: tuple[int, int], widths: tuple[int, int], masked: bool
):
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape).astype(np.float32))

    layout = Layout(1, 3, widths, bits)
    recent, seen, valid = (normal(2, 2, 3, 8), normal(2, 2, 3, 16)), None, None
    whole = normal(2, 2, max(widths), 8) + 3, normal(2, 2, max(widths), 16)
    standards = Standard.of(whole[0]), Standard.of(whole[1], centred=False)
    records = [encode(x, standard, each) for x, standard, each in zip(whole, standards, bits, strict=True)]
    there = torch.arange(max(widths)) < torch.tensor(widths)[:, None]
    (keys, key_step), (values, value_step) = ((x[:, there], step[:, there]) for x, step in records)
    if masked:
        seen = torch.tensor([True, True, False]).expand(2, 2, 3)
        valid = torch.arange(max(widths)) < torch.tensor([[[min(widths[0], 3)], [widths[1]]], [[widths[0]], [0]]])
    coding = Coding(bits, key_step, value_step, *standards)
    tiers = Tiers(*recent, seen, keys, values, valid, layout, coding)
    q, gone = normal(2, 4, 1, 8), (normal(2, 2, 30, 8), normal(2, 2, 30, 16))
    expansion = Summaries.empty(*gone).update(*gone, QueryWindow.from_queries(q, 2)).expansion()
    for of in (None, expansion):
        exact, weights = ArrayBackend().decode(q, tiers, of, scale=0.3, weights=True)
        out, none = decode_tiers(q, tiers, of, scale=0.3, weights=False)
        scored, attention = decode_tiers(q, tiers, of, scale=0.3, weights=True)
        assert none is None
        torch.testing.assert_close(out, exact, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(scored, exact, rtol=2e-5, atol=2e-6)
        torch.testing.assert_close(attention, weights, rtol=2e-5, atol=2e-6)


def test_a_gradient_that_there_is_not_is_refused():
    x = make(Decode(d=8, capacity=5))
    with pytest.raises(RuntimeError, match="no gradient"):
        decode(x.q.requires_grad_(), x.k, x.v, scale=0.1)
    with torch.no_grad():
        decode(x.q, x.k, x.v, scale=0.1)
    x = make(Decode(d=8, capacity=5, estimate="order 0"))
    assert x.expansion is not None
    x.expansion.key_mean.requires_grad_()
    with pytest.raises(RuntimeError, match="no gradient"):
        decode(x.q, x.k, x.v, x.expansion, scale=0.1)


def test_the_operator_tells_pytorch_the_truth():
    """Schema, mutated arguments, fake kernels: PyTorch's own check."""
    for case in (
        Decode(d=8, capacity=5, estimate="summaries x 2", scored=True),
        Decode(d=8, capacity=5, packed=True, recent=3, recent_masked=True),
        Decode(d=8, dv=16, capacity=5, packed=True, recent=3, bits=(4, 3), estimate="order 0", scored=True),
    ):
        x = make(case)
        parts = (None,) * 10 if x.expansion is None else x.expansion
        where, recent = (x.positions, x.counts, x.starts), (None,) * 3 if x.recent is None else x.recent
        torch.library.opcheck(
            decode_operator, (x.q, x.k, x.v, *where, 5, *recent, case.scale, case.scored, *parts, *parts_of(x.coding))
        )


def test_compiled_code_contains_it_without_a_break():
    x = make(Decode(d=8, capacity=5, estimate="order 1", scored=True, masked=True))

    def step(q: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, lse, logits = decode(q, x.k, x.v, x.expansion, scale=0.1, positions=x.positions, scored=True)
        return out + 1, lse, logits

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, other in zip(step(x.q), compiled(x.q), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_arguments_that_do_not_fit_are_refused():
    case = Decode(d=8, capacity=5, estimate="summaries x 2", counted=True)
    x = make(case)
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("one dtype", (x.q.double(), x.k, x.v), {}),
        ("one dtype", (x.q.double(), x.k.double(), x.v.double()), {}),
        ("head dimension 4", (x.q[..., :4], x.k, x.v), {}),
        ("it must be \\(batch, q_head", (x.q[0], x.k, x.v), {}),
        ("both must be", (x.q, x.k[0], x.v[0]), {}),
        ("multiple", (x.q[:, :3], x.k, x.v), {}),
        ("capacity is 4", (x.q, x.k, x.v), {"capacity": 4}),
        ("counts is torch.int64", (x.q, x.k, x.v), {"counts": torch.zeros(2, 2, dtype=torch.int64)}),
        ("positions is", (x.q, x.k, x.v), {"positions": torch.zeros(2, 2, dtype=torch.int32)}),
        ("starts is given", (x.q, x.k[0, 0], x.v[0, 0]), {"starts": torch.zeros(2, 2, dtype=torch.int64)}),
    ]
    for message, arguments, keywords in wrong:
        with pytest.raises(ValueError, match=message):
            decode(*arguments, scale=0.1, **keywords)
    assert x.expansion is not None
    for message, change in (
        ("anchor of the expansion", {"anchor": torch.zeros(2, 2, 3)}),
        ("give both or neither", {"slope_left": None}),
        ("strength and cap", {"cap": None}),
    ):
        with pytest.raises(ValueError, match=message):
            decode(x.q, x.k, x.v, x.expansion._replace(**change), scale=0.1)


def test_records_that_the_operator_does_not_read_are_refused():
    case = Decode(d=16, dv=8, capacity=5, packed=True, bits=(4, 3))
    x = make(case)
    assert x.coding is not None
    assert reads_codes(x.coding, torch.float32)
    wide = x.coding._replace(key_standard=x.coding.key_standard.map(lambda y: y.new_ones(2, 2, 136)))
    assert [reads_codes(wide, dtype) for dtype in (torch.float32, torch.float16)] == [False, True]
    keys, values = x.coding.key_standard, x.coding.value_standard
    none: dict[str, Any] = {}
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any], dict[str, Any]]] = [
        ("at most 8", (x.q, x.k, x.v), {"bits": (16, 4)}, none),
        ("around zero", (x.q, x.k, x.v), {"value_standard": values._replace(mean=values.deviation)}, none),
        ("multiples of 8", (x.q, x.k, x.v), {"value_standard": values.map(lambda y: y[..., :4])}, none),
        ("k is torch.uint8 of shape", (x.q, x.k[:, 1:], x.v), {}, none),
        ("v is torch.float32", (x.q, x.k, x.v.float()), {}, none),
        ("q is torch.float64", (x.q.double(), x.k, x.v), {}, none),
        ("key_step is torch.float32", (x.q, x.k, x.v), {"key_step": x.coding.key_step.float()}, none),
        ("mean of key_standard", (x.q, x.k, x.v), {"key_standard": keys._replace(mean=keys.deviation[0])}, none),
        ("positions must not", (x.q, x.k, x.v), {}, {"positions": torch.zeros(len(x.k), dtype=torch.int32)}),
        ("starts must be", (x.q, x.k[None, None], x.v[None, None]), {}, {"starts": None, "capacity": None}),
    ]
    for message, arguments, change, keywords in wrong:
        settings: dict[str, Any] = {"counts": x.counts, "starts": x.starts, "capacity": 5} | keywords
        with pytest.raises(ValueError, match=message):
            decode(*arguments, scale=0.1, coding=x.coding._replace(**change), **settings)


def test_the_oracle_of_expansions_is_that_of_moments():
    """Of order 1 around the zero query, the expansion's oracle gives the paper's formula."""
    from momentkv.testing.decoding import evaluate

    rng = np.random.default_rng(0)
    k, v, q = (rng.standard_normal((1, 2, n, 4)) for n in (6, 6, 1))
    sums = oracle.moments(k, v)
    moments = Moments.from_tokens(torch.from_numpy(k), torch.from_numpy(v))
    case = Decode(d=4, group=1, kv_heads=2, batch=1, scale=0.5)
    state, _, _ = evaluate(q, moments.expansion(), case)
    exact = oracle.estimate(q, sums, 1, 0.5)
    np.testing.assert_allclose(state.out, exact.out, rtol=1e-12)
    np.testing.assert_allclose(state.lse, exact.lse, rtol=1e-12)

"""The Triton kernels, run by Triton's interpreter on the CPU against float64; `test_kernels.py` runs this file.

Not collected by itself: the interpreter is chosen when Triton is imported, for a whole process. It cannot multiply
matrices of bfloat16, so halves are float16 here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from momentkv import LayerCache
from momentkv.backends.operators import EXPANSION, assemble, coding_of, together
from momentkv.backends.operators import decode as decode_operator
from momentkv.backends.plain import decode_plain
from momentkv.backends.triton import decode
from momentkv.backends.triton.codes_kernel import in_word, kept, levels_of
from momentkv.backends.triton.decode import WORDS, code_flags, decode_triton
from momentkv.backends.triton.reach import Calls
from momentkv.backends.triton.tuned import Choice, candidates
from momentkv.cache.config import MODEL_DEFAULTS
from momentkv.codes import BITS, Coding, Standard, centre, encode, pack
from momentkv.testing.coded import FRONT
from momentkv.testing.decoding import Decode, decode_cases, expected, f64, logits_error, make
from momentkv.testing.gpu import tuning
from momentkv.testing.gpu.kernels import error_of
from momentkv.testing.gpu.operators import Fused
from momentkv.testing.gpu.tuning import Kind, cases_of, kinds
from momentkv.testing.rounding import assert_within

HALF = torch.float16
CASES = decode_cases(torch.float32, HALF)


@pytest.fixture(autouse=True)
def _poisoned():
    """Whatever is allocated without a value is NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    assert torch.empty(3).new_empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_kernel_agrees_with_the_oracle(case: Decode):
    x = make(case)
    out, lse, logits = decode_triton(
        x.q,
        x.k,
        x.v,
        x.positions,
        x.counts,
        x.starts,
        case.capacity,
        x.recent,
        x.expansion,
        case.scale,
        case.scored,
        case.splits,
        x.coding,
    )
    exact, exact_logits, error = expected(case, x)
    assert out.dtype == case.dtype
    assert_within(f64(out), exact.out, error.out)
    assert_within(f64(lse), exact.lse, error.lse)
    if case.scored:
        assert logits is not None
        assert_within(f64(logits).reshape(exact_logits.shape), exact_logits, logits_error(case, x))


@triton.jit
def unpacking_kernel(
    records,
    out,
    tokens,
    one,
    dtype: tl.constexpr,
    d: tl.constexpr,
    high: tl.constexpr,
    low: tl.constexpr,
    width: tl.constexpr,
    block: tl.constexpr,
):
    """Levels of tokens, in float32, each where the kernel of codes takes its channel to be."""
    least: tl.constexpr = low if low > 0 else high
    word: tl.constexpr = 8 // least * width
    nn, xx = tl.arange(0, 16), tl.arange(0, block)
    levels = levels_of(records, nn, nn < tokens, one, dtype, d, high, low, width, d * (high + low) // 8 // width, block)
    channel = xx % word // width * (d * least // 8) + xx // word * width + in_word(xx % width, width)
    there = (nn < tokens)[:, None] & (xx // word * width < d * least // 8)[None, :]
    tl.store(out + nn[:, None] * d + channel[None, :], levels.to(tl.float32), mask=there)


@pytest.mark.parametrize("d", [8, 16, 64, 80, 96, 112, 128])
@pytest.mark.parametrize("bits", [bits for bits in BITS if bits <= 8])
@pytest.mark.parametrize("dtype", [tl.float16, tl.bfloat16, tl.float32], ids=str)
def test_levels_are_codes_less_their_centre_and_what_is_kept(d: int, bits: int, dtype: tl.dtype):
    """To the last bit, also in bfloat16, of which nothing else can be run here; of any one number where it is 1."""
    codes = np.random.default_rng(bits).integers(0, 2**bits, (13, d))
    codes[0], codes[1] = 0, 2**bits - 1
    nothing = Standard(None, torch.ones(d))
    flags = code_flags(Coding((bits, bits), *(torch.ones(13),) * 2, nothing, nothing), d, d)
    high, low, width = (flags[f"KEY_{name}"] for name in ("HIGH", "LOW", "W"))
    records = pack(torch.from_numpy(codes), bits).view(WORDS[width])
    levels = torch.full((13, d), torch.nan)
    unpacking_kernel[(1,)](records, levels, 13, 1, dtype, d, high, low, width, triton.next_power_of_2(d))
    left = kept(high, low, width, dtype)
    assert levels.tolist() == (codes - centre(bits) + left).tolist()
    assert 2 * left <= FRONT * 2**bits
    assert (left > 0) == (width == 4 and dtype != tl.float32 and (bits, dtype) != (8, tl.bfloat16))


@pytest.mark.parametrize(("d", "lopsided"), [(64, True), (272, False)])
@pytest.mark.parametrize("bits", [(3, 4), (5, 3)], ids=str)
def test_graded_keys_of_lopsided_queries_and_of_many_channels_are_read(d: int, lopsided: bool, bits: tuple[int, int]):
    """Queries that meet the coarser half alone fit into halves, too; more channels than a byte counts have an order."""
    rng = np.random.default_rng(0)
    k, v = (torch.from_numpy(rng.standard_normal((1, 2, 9, d))) for _ in range(2))
    of_keys = Standard.of(k * 1000).graded(bits[0], torch.from_numpy(np.exp(rng.standard_normal((1, 2, d)))))
    of_values = Standard.of(v, centred=False)
    assert of_keys.order.dtype == (torch.uint8 if d <= 256 else torch.int32)
    (keys, key_step), (values, value_step) = (
        encode(x, standard, each) for x, standard, each in zip((k * 1000, v), (of_keys, of_values), bits, strict=True)
    )
    q = torch.from_numpy(rng.standard_normal((1, 2, 1, d)))
    if lopsided:
        coarser = of_keys.order[..., d // 2 :].to(torch.int64)
        q = torch.zeros_like(q).scatter(-1, coarser[..., None, :], 1e4 * q)
    standards = (each.map(lambda x: x.half() if x.is_floating_point() else x) for each in (of_keys, of_values))
    flat = [x.flatten(0, 2) for x in (keys, values, key_step, value_step)]
    coding = Coding(bits, flat[2], flat[3], *standards)
    given = (q.half(), flat[0], flat[1], None, torch.full((1, 2), 9, dtype=torch.int32), torch.tensor([[0, 9]]), 9)
    scale = 1.0 if lopsided else 1e-3
    found = decode_triton(*given, None, None, scale, False, coding=coding)
    exact = decode_plain(*given, None, None, scale, False, coding)
    for one, other in zip(found[:2], exact[:2], strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=4e-3, atol=4e-3)
    places = {"counts": given[4], "starts": given[5], "capacity": 9}
    asked = decode_operator(q.half(), *flat[:2], scale=scale, coding=coding, **places)  # which checks what it is given
    torch.testing.assert_close(asked[0], exact[0], rtol=0, atol=0, equal_nan=False)


# Of a few kinds of launches, sizes that differ in what an interpreter knows: tokens of a tile, parts of the sequence.
TUNED = [
    (kind, choice._replace(waves=waves))
    for kind in kinds([torch.float32, HALF], [16, 64])[::5]
    for choice, waves in zip(candidates(kind.builtin[1])[:6:2], (3, 2, 1), strict=True)
]


@pytest.mark.parametrize(("kind", "choice"), TUNED, ids=str)
def test_every_choice_of_sizes_agrees_with_the_oracle(kind: Kind, choice: Choice):
    family, _ = kind.builtin
    for case in cases_of(kind):
        found = error_of(case, "cpu", choices={family: choice})
        assert found["right"], (case, found)


def test_what_is_timed_reads_all_copies_with_the_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "TIMED", ((2, 16),))
    for kind in kinds([torch.float32], [16])[2:5]:  # moments; records alone, and beside summaries
        _, builtin = kind.builtin
        asked = []
        launches = decode.decode_launches

        def noted(*arguments: Any, asked: Any = asked, launches: Any = launches) -> Any:
            made = launches(*arguments)
            asked.append(made[-1][0])
            return made

        with monkeypatch.context() as patch:
            patch.setattr(decode, "decode_launches", noted)
            calls = tuning.calls_of(kind, 1, torch.device("cpu"))
            outs = [call(builtin._replace(tokens=16), i)[0] for call in calls for i in range(3)]
        assert [out.shape for out in outs] == [(2, 32, 1, 16)] * 3
        assert all(out.isfinite().all() for out in outs)
        assert {launch.constants["BLOCK_N"] for launch in asked} == {16}
        assert [launch.arguments["capacity"] for launch in asked] == [16] * 3
        # Two copies, one after the other.
        keys = [launch.arguments["K"].data_ptr() for launch in asked]
        assert keys[0] == keys[2] != keys[1]
        assert asked[0].constants["CODED"] == kind.coded


@pytest.mark.parametrize(
    "case", [Decode(d=128, estimate=e, splits=2) for e in ("none", "order 1", "summaries x 12")], ids=str
)
def test_float32_errs_by_less_than_the_target(case: Decode):
    """Relative error 2e-6 against float64, as docs/speed.md promises."""
    x = make(case)
    out, lse, _ = decode_triton(
        x.q, x.k, x.v, None, None, None, case.capacity, None, x.expansion, case.scale, False, case.splits
    )
    exact, _, _ = expected(case, x)
    assert np.linalg.norm(f64(out) - exact.out) <= 2e-6 * np.linalg.norm(exact.out)
    assert np.abs(f64(lse) - exact.lse).max() <= 1e-5


@pytest.mark.parametrize("budget", [20, [14, 30]], ids=["equal", "ragged"])
def test_the_kernel_reads_the_codes_of_a_static_step(budget: int | list[int]):
    """What a step gives the operator, which is plain PyTorch here, given to the kernel."""
    settings: dict[str, Any] = MODEL_DEFAULTS | {"bits": 4, "window": 8, "block": 4}
    cache = LayerCache(budget, static=True, backend=Fused(), **settings)
    rng = torch.Generator().manual_seed(0)
    for n in (40, *[1] * 6):
        q, k, v = (torch.randn(2, heads, n, 16, generator=rng) for heads in (4, 2, 2))
        with Calls() as calls:
            out = cache.step(q, k, v)
    *given, recent_keys, recent_values, recent_valid, scale, scored = calls.arguments[-1][:12]
    parts = calls.arguments[-1][12:]
    recent, expansion = together(recent_keys, recent_values, recent_valid), assemble(*parts[:EXPANSION])
    coding = coding_of(*parts[EXPANSION:])
    assert coding is not None
    assert expansion is not None
    found, _, _ = decode_triton(*given, recent, expansion, scale, scored, coding=coding)
    torch.testing.assert_close(found, out, rtol=2e-5, atol=2e-5)

"""The Triton kernels, run by Triton's interpreter on the CPU against float64; `test_kernels.py` runs this file.

Not collected by itself: the interpreter is chosen when Triton is imported, for a whole process. It cannot multiply
matrices of bfloat16, so halves are float16 here.
"""

from __future__ import annotations

import dataclasses
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
from momentkv.backends.triton.decode import WORDS, decode_triton, word_bytes
from momentkv.backends.triton.planes_kernel import bytes_of, copies, halves_of, low_bit, size_of, words_of
from momentkv.backends.triton.reach import Calls
from momentkv.backends.triton.tuned import Choice, candidates
from momentkv.backends.triton.whole_kernel import whole, whole_queries
from momentkv.cache.config import MODEL_DEFAULTS
from momentkv.codes import BITS, PLANES, Coding, Standard, centre, encode, pack
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


def channels_first(x: torch.Tensor | None) -> torch.Tensor | None:
    """The same numbers, the last axis farthest apart in memory."""
    return None if x is None else x.movedim(-1, 0).contiguous().movedim(0, -1)


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_decode_kernel_finds_vectors_wherever_they_lie(case: Decode):
    x = make(case)
    recent = x.recent
    if recent is not None:
        recent = recent._replace(keys=channels_first(recent.keys), values=channels_first(recent.values))
    k, v, positions = (channels_first(y) for y in (x.k, x.v, x.positions))
    moved = dataclasses.replace(x, k=k, v=v, positions=positions, recent=recent)
    found, same = (
        decode_triton(
            *(y.q, y.k, y.v, y.positions, y.counts, y.starts, case.capacity, y.recent, y.expansion),
            *(case.scale, case.scored, case.splits, y.coding),
        )
        for y in (moved, x)
    )
    for one, other in zip(found, same, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@triton.jit
def unpacking_kernel(
    records,
    codes,
    levels,
    tokens,
    splits,
    d: tl.constexpr,
    high: tl.constexpr,
    low: tl.constexpr,
    word: tl.constexpr,
    columns: tl.constexpr,
):
    """Codes of tokens as bytes, and as halves less their centre, each where the kernel takes its channel to be."""
    nn, cc = tl.arange(0, 16), tl.arange(0, columns)
    valid = nn < tokens
    if word == 8:
        size: tl.constexpr = d * high // 8
        copied: tl.constexpr = copies(size, high, columns, 8)
        places = records + nn[None, :, None] * (d * (high + low) // 8)
        wider, narrower = words_of(records, places, valid[None, :, None], splits, high, low, size, columns, 8, 2)
        for slot in tl.static_range(8 // high // copied):
            at, less = high * copied * slot, low_bit(copied * slot, high, low)
            found = bytes_of(wider, narrower, high, low, at, less).to(tl.float32)
            channel = (slot * copied + cc // size) * size + cc % size
            there = valid[None, :, None] & (cc < copied * size)[None, None, :]
            tl.store(codes + nn[None, :, None] * d + channel[None, None, :], found, mask=there)
    size: tl.constexpr = d * high // word
    copied: tl.constexpr = copies(size, high, columns, word)
    places = records + nn[None, None, :] * (d * (high + low) // word)
    wider, narrower = words_of(records, places, valid[None, None, :], splits, high, low, size, columns, word, 1)
    for slot in tl.static_range(word // high // copied):
        at, less = high * copied * slot, low_bit(copied * slot, high, low)
        found = halves_of(wider, narrower, high, low, at, less).to(tl.float32) / size_of(at, high, low)
        bit = (slot * copied + cc // size) * high
        channel = bit % 8 // high * (size * word // 8) + cc % size * (word // 8) + bit // 8
        there = valid[None, None, :] & (cc < copied * size)[None, :, None]
        tl.store(levels + nn[None, None, :] * d + channel[None, :, None], found, mask=there)


@pytest.mark.parametrize("d", [8, 16, 64, 80, 96, 112, 128])
@pytest.mark.parametrize("bits", [bits for bits in BITS if bits <= 8])
@pytest.mark.parametrize("word", [8, 16])
def test_codes_are_unpacked_to_the_last_bit(d: int, bits: int, word: int):
    expected = np.random.default_rng(bits).integers(0, 2**bits, (13, d))
    expected[0], expected[1] = 0, 2**bits - 1
    high, low = (*PLANES[bits], 0)[:2]
    if word == 16 and word_bytes(bits, d) == 1:
        pytest.skip("a plane has an odd number of bytes")
    records = pack(torch.from_numpy(expected), bits).view(WORDS[word // 8])
    codes, levels = (torch.full((13, d), torch.nan) for _ in range(2))
    columns = max(32, triton.next_power_of_2(d * high // word))
    unpacking_kernel[(1,)](records, codes, levels, 13, 1, d, high, low, word, columns)
    if word == 8:
        assert codes.tolist() == (expected - (128 if bits == 8 else 0)).tolist()
    assert levels.tolist() == (expected - centre(bits)).tolist()


def test_values_without_a_step_count_all_the_same():
    """As those of tokens whose values are zero: in the lse they are as others, and to the output they add nothing."""
    case = Decode(d=32, kv_heads=3, packed=True, bits=(5, 3), splits=2)
    x = make(case)
    assert x.coding is not None
    given = (x.q, x.k, x.v, x.positions, x.counts, x.starts, case.capacity, x.recent, x.expansion, case.scale, False, 2)
    _, exact, _ = decode_triton(*given, x.coding)
    out, lse, _ = decode_triton(*given, x.coding._replace(value_step=torch.zeros_like(x.coding.value_step)))
    assert (out == 0).all()
    torch.testing.assert_close(lse, exact, rtol=1e-6, atol=1e-5)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of what a device does without a word
@pytest.mark.parametrize(
    ("case", "bad"),
    [
        (Decode(d=32, kv_heads=3, packed=True, bits=(5, 3), splits=2), np.nan),
        (Decode(d=32, kv_heads=3, packed=True, bits=(5, 3), splits=2), np.inf),
        (Decode(d=16, capacity=9, splits=3, estimate="summaries x 3"), np.nan),
        (Decode(d=16, capacity=0, estimate="summaries x 3"), np.nan),
    ],
    ids=str,
)
def test_a_query_that_is_no_number_has_an_output_that_is_none(case: Decode, bad: float):
    """It becomes a whole number, but not unseen, also where keys have no mean; other queries are as they are.

    Nor has it an lse, which would pass for that of no token.
    """
    x, coding = make(case), None
    q = x.q.clone()
    q[0, 0, 0, 3] = bad
    if x.coding is not None:
        coding = x.coding._replace(key_standard=x.coding.key_standard._replace(mean=None))
    rest = (x.k, x.v, x.positions, x.counts, x.starts, case.capacity, x.recent, x.expansion, case.scale, False)
    found, exact = (decode_triton(each, *rest, case.splits, coding)[:2] for each in (q, x.q))
    for one, other in zip(found, exact, strict=True):
        assert one[0, 0].isnan().all()
        assert torch.equal(one[0, 1:], other[0, 1:])
        assert torch.equal(one[1:], other[1:])


@triton.jit
def whole_kernel(x, y, out, size: tl.constexpr, columns: tl.constexpr, pieces: tl.constexpr):
    """Products of whole numbers with bytes."""
    rows, cc, mm = tl.arange(0, 16), tl.arange(0, size), tl.arange(0, columns)
    queries = (tl.load(x + cc[:, None] * columns + mm[None, :]),)
    largest = tl.max(tl.abs(queries[0]), 0)
    made, zero, unit = whole_queries(queries, largest, 0.5, pieces, 1)
    bytes_read = tl.load(y + rows[None, :, None] * size + cc[None, None, :])
    products = whole(tl.dot(bytes_read, made[0], out_dtype=tl.int32), pieces) - zero[None, None, :]
    tl.store(out + rows[None, :, None] * columns + mm[None, None, :], products * unit[None, None, :])


@pytest.mark.parametrize("pieces", [2, 4])
def test_queries_as_whole_numbers_err_by_half_a_unit(pieces: int):
    """Products with bytes less a half, of queries from tiny to huge, against float64."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((32, 4)) * np.array([1e-20, 1.0, 1e20, 1.0])).astype(np.float32)
    x[:, 3] = np.where(np.arange(32) == 5, -1.0, 0.0)
    y = rng.integers(-128, 128, (16, 32)).astype(np.int8)
    out = torch.full((16, 4), torch.nan)
    whole_kernel[(1,)](torch.from_numpy(x), torch.from_numpy(y), out, 32, 4, pieces)
    exact = (y - 0.5) @ x.astype(np.float64)
    # Half a unit of each component; and float32's own rounding of a sum.
    unit = np.abs(x.astype(np.float64)).max(0) / (127 * 256.0 ** (pieces - 1))
    allowed = np.abs(y - 0.5).sum(1)[:, None] * unit / 2 + 4 * 2.0**-24 * (
        np.abs(y - 0.5) @ np.abs(x).astype(np.float64)
    )
    assert_within(out.double().numpy(), exact, allowed)


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
    for kind in kinds([torch.float32, HALF], [16, 64])[::8]
    for choice, waves in zip(candidates(kind.builtin[1])[:6:2], (3, 2, 1), strict=True)
]


@pytest.mark.parametrize(("kind", "choice"), TUNED, ids=str)
def test_every_choice_of_sizes_agrees_with_the_oracle(kind: Kind, choice: Choice):
    family, _ = kind.builtin
    for case in cases_of(kind):
        found = error_of(case, "cpu", choices={family: choice})
        assert found["right"], (case, found)


def test_what_is_timed_reads_all_copies_with_the_choice(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tuning, "TIMED", ((1, 16),))
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
        assert [out.shape for out in outs] == [(1, 32, 1, 16)] * 3
        assert all(out.isfinite().all() for out in outs)
        assert {launch.constants["BLOCK_N"] for launch in asked} == {16}
        assert [launch.arguments["capacity"] for launch in asked] == [16] * 3
        # Two copies, one after the other.
        keys = [launch.arguments["K"].data_ptr() for launch in asked]
        assert keys[0] == keys[2] != keys[1]
        assert asked[0].constants["CODED"] == (kind.bits > 0)


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

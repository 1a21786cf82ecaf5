"""Every specialisation of the kernels that a decoding step can launch, found by asking the code that launches them.

`decode_tiers` is called with tensors that have no data, for every correction, dtype and kind of storage, and each call
of the operator that it makes is taken to `decode_launches`, which is what a GPU would run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from momentkv.backends.layout import Layout, Tiers
from momentkv.backends.operators import DTYPES, EXPANSION, assemble, coding_of, decode, decode_operator, together
from momentkv.backends.torch import decode_tiers
from momentkv.backends.triton.builds import Build, build_of
from momentkv.backends.triton.decode import Launch, decode_launches
from momentkv.backends.triton.tuned import Choices
from momentkv.codes import BITS, SPLIT, Coding, Standard, can_grade, row_bytes
from momentkv.statistics.corrections import CORRECTIONS, AnchoredSummaries
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.moments import Moments
from momentkv.statistics.window import QueryWindow

__all__ = ["DIMENSIONS", "expansions", "launches_of", "reachable"]

DIMENSIONS = (64, 96, 128, 256)
BATCH, KV_HEADS = 1, 2
# Bits of keys and of values: as they are split, and equal ones.
PAIRS = [pair for pair in dict.fromkeys([*SPLIT.values(), *zip(BITS, BITS, strict=True)]) if max(pair) <= 8]
# Query heads of a KV head: those that fit in one tile of 16, and more.
GROUPS = (4, 24)
PROCESSORS = 132


def coded_as(correction: str, *, plain: bool) -> list[tuple[int, int]]:
    """Bits of records to try: all without a correction, the usual ones with the default's, whatever else is asked."""
    if correction == "none":
        return PAIRS if plain else PAIRS[:1]
    if correction == "summaries":
        return [SPLIT[4], SPLIT[8]]
    return [SPLIT[4]] if plain else []


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what the operator is called with."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.arguments: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is decode_operator:
            self.arguments.append(args)
        return func(*args, **(kwargs or {}))


def expansions(d: int) -> dict[str, Expansion | None]:
    """What every correction makes of a few tokens, of one row, as the cache hands it to the operator."""
    rng = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, KV_HEADS, 40, d, generator=rng) for _ in range(2))
    window = QueryWindow.from_queries(torch.randn(1, KV_HEADS, 32, d, generator=rng), KV_HEADS)
    mask = torch.ones(k.shape[:-1], dtype=torch.bool)
    kinds = CORRECTIONS | {
        "summaries, no slope": AnchoredSummaries(rank=0),
        "one summary": AnchoredSummaries(summaries=1),
        "40 summaries": AnchoredSummaries(summaries=40),
    }
    made = {
        name: kind.expansion(kind.fold(kind.empty(k, v), k, v, mask=mask, window=window))
        for name, kind in kinds.items()
    }
    # No cache has it, but whoever calls the operator may.
    return made | {"order-2": Moments.from_tokens(k, v, order=2).expansion(order=2)}


def without_data(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tiers_of(dtype: torch.dtype, d: int, batch: int, layout: Layout, *, masked: bool, graded: bool = True) -> Tiers:
    """Stored tokens, without data; the channels of their keys are graded where they can be."""
    recent, slots = (batch, layout.heads, layout.recent), (batch, sum(layout.widths))
    coding, key, value = None, (d, dtype), (d, dtype)
    if layout.bits is not None:
        key_step, value_step = (without_data(*slots, dtype=torch.float16) for _ in range(2))
        mean, deviation, spread = (without_data(batch, layout.heads, d, dtype=dtype) for _ in range(3))
        order = None
        if graded and can_grade(layout.bits[0], d):
            order = without_data(batch, layout.heads, d, dtype=torch.uint8)
        coding = Coding(layout.bits, key_step, value_step, Standard(mean, deviation, order), Standard(None, spread))
        key, value = ((row_bytes(d, bits), torch.uint8) for bits in layout.bits)
    return Tiers(
        recent_keys=without_data(*recent, d, dtype=dtype),
        recent_values=without_data(*recent, d, dtype=dtype),
        recent_valid=without_data(*recent, dtype=torch.bool) if masked else None,
        keys=without_data(*slots, key[0], dtype=key[1]),
        values=without_data(*slots, value[0], dtype=value[1]),
        valid=without_data(batch, layout.heads, layout.width, dtype=torch.bool) if masked else None,
        layout=layout,
        coding=coding,
    )


def spread_out(expansion: Expansion | None, batch: int, heads: int) -> Expansion | None:
    """The expansion of one row and `KV_HEADS` heads as one of so many, without data, its axes in the same order."""
    if expansion is None:
        return None

    def image(x: torch.Tensor) -> torch.Tensor:
        shape = (batch, heads, *x.shape[2:])
        across = x.ndim == 4 and x.stride(-2) < x.stride(-1)
        if across:
            return without_data(*shape[:-2], shape[-1], shape[-2], dtype=x.dtype).mT
        return without_data(*shape, dtype=x.dtype)

    return Expansion(*(None if x is None else image(x) for x in expansion))


def launches_of(
    tiers: Tiers,
    expansion: Expansion | None,
    group: int,
    *,
    scored: bool,
    processors: int = PROCESSORS,
    choices: Choices | None = None,
) -> Iterator[Launch]:
    """What a decoding step over these tokens launches on a device of so many processors, where so much is chosen."""
    batch, heads, _, d = tiers.recent_keys.shape
    q = without_data(batch, heads * group, 1, d, dtype=tiers.recent_keys.dtype)
    with Calls() as calls:
        decode_tiers(q, tiers, spread_out(expansion, batch, heads), scale=d**-0.5, weights=scored)
    for arguments in calls.arguments:
        yield from launched(arguments, processors, choices)


def launched(arguments: tuple[Any, ...], processors: int, choices: Choices | None = None) -> list[Launch]:
    """The launches of one call of the operator."""
    q, k, v, positions, counts, starts, capacity, *rest = arguments
    recent, (scale, scored, *parts) = together(*rest[:3]), rest[3:]
    expansion, coding = assemble(*parts[:EXPANSION]), coding_of(*parts[EXPANSION:])
    given = (q, k, v, positions, counts, starts, capacity, recent, expansion, scale, scored)
    return decode_launches(*given, processors, None, coding, choices)[-1]


def reachable(dtypes: tuple[torch.dtype, ...] = DTYPES, dimensions: tuple[int, ...] = DIMENSIONS) -> Iterator[Build]:
    """Every specialisation once: corrections, masks, weights, packed or not."""
    seen: set[Build] = set()
    for d in dimensions:
        made = expansions(d)
        for dtype, (name, expansion), group in itertools.product(dtypes, made.items(), GROUPS):
            found: list[Launch] = []
            # None retained, and some.
            for width, masked, scored in itertools.product((0, 480), (False, True), (False, True)):
                tiers = tiers_of(dtype, d, BATCH, Layout(1, 65, (width,) * KV_HEADS), masked=masked)
                if name != "order-2":
                    found += launches_of(tiers, expansion, group, scored=scored)
                    for bits in coded_as(name, plain=not (masked or scored)) if width else ():
                        if dtype == torch.float32 and d > 128:  # read by plain operators
                            continue
                        layout = Layout(1, 65, (width,) * KV_HEADS, bits)
                        # Channels are graded where queries are remembered: by every cache that has summaries.
                        for graded in {can_grade(bits[0], d), name == "summaries" and can_grade(bits[0], d)}:
                            tiers = tiers_of(dtype, d, BATCH, layout, masked=masked, graded=graded)
                            found += launches_of(tiers, expansion, group, scored=scored)
                    continue
                q = without_data(BATCH, KV_HEADS * group, 1, d, dtype=dtype)
                with Calls() as calls:
                    decode(q, tiers.recent_keys, tiers.recent_values, spread_out(expansion, BATCH, KV_HEADS), scale=1.0)
                found += launched(calls.arguments[0], PROCESSORS)
            if name == "none":  # every number of splits that the combining kernel tells apart
                for width in (2**i for i in range(5, 15)):
                    tiers = tiers_of(dtype, d, 1, Layout(1, 65, (width,) * KV_HEADS), masked=False)
                    found += launches_of(tiers, None, group, scored=False)
            for launch in found:
                build = build_of(launch)
                if build not in seen:
                    seen.add(build)
                    yield build

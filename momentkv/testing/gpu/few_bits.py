"""Decoding from tokens in few bits, beside a copy of the same run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from momentkv.backends.operators import decode
from momentkv.codes import SPLIT, Coding, Standard, can_grade, record_bytes, row_bytes
from momentkv.evaluation.layer_times import Shape, measure, of_copy
from momentkv.testing.gpu.layers import sizes_of
from momentkv.testing.gpu.parts import Row

__all__ = ["CODES", "records", "times"]

# Names of rows, and bits of keys and of values.
CODES = {"codes of 4 bits": SPLIT[4], "codes of 8 bits": SPLIT[8]}


def records(
    shape: Shape, bits: tuple[int, int], dtype: torch.dtype, device: str | torch.device
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Packed records of so many tokens of all heads, keys and values, and how `decode` is to read them.

    Their bytes are those of an arithmetic sequence: a kernel takes as long for any.
    """
    lead, d = (shape.batch, shape.kv_heads), shape.d
    heads = lead[0] * lead[1]
    n = heads * shape.budget

    def rows(each: int) -> torch.Tensor:
        return torch.arange(n * row_bytes(d, each), device=device).to(torch.uint8).reshape(n, -1)

    keys, values = rows(bits[0]), rows(bits[1])
    key_step, value_step = (torch.full((n,), 2.0**-each, dtype=torch.float16, device=device) for each in bits)
    mean, deviation, spread = (torch.ones(*lead, d, dtype=dtype, device=device) for _ in range(3))
    order = None  # of channels, as where queries are remembered
    if can_grade(bits[0], d):
        order = torch.arange(d - 1, -1, -1, dtype=torch.uint8, device=device).expand(*lead, d).contiguous()
    return (
        keys,
        values,
        {
            "coding": Coding(bits, key_step, value_step, Standard(mean, deviation, order), Standard(None, spread)),
            "starts": torch.arange(heads, device=device).reshape(lead) * shape.budget,
            "counts": torch.full(lead, shape.budget, dtype=torch.int32, device=device),
            "capacity": shape.budget,
        },
    )


def times(rehearse: bool) -> Iterator[Row]:
    """A copy, and for each shape a call of the operator over records alone; bytes are those of the records."""
    sizes, device = sizes_of(rehearse)
    with torch.inference_mode():
        yield of_copy(sizes, device)
        for shape in sizes.shapes:
            q = torch.ones(shape.batch, shape.kv_heads * shape.group, 1, shape.d, dtype=sizes.dtype, device=device)
            for name, bits in CODES.items():
                stored = shape.batch * shape.kv_heads * shape.budget * record_bytes(shape.d, shape.d, bits)
                number = max(2, min(64, -(-sizes.rotate_bytes // stored)))
                held = [records(shape, bits, sizes.dtype, device) for _ in range(number)]

                def call(i: int, q: Any = q, held: Any = held, scale: float = shape.d**-0.5) -> Any:
                    keys, values, how = held[i % len(held)]
                    return decode(q, keys, values, scale=scale, **how)

                yield measure("decode", name, call, sizes, device, nbytes=stored) | {"shape": shape._asdict()}
                del held

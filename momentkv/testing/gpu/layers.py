"""Times of one layer: decode, flush and prefill, beside SDPA, a copy and the smallest launch of the same run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from momentkv.evaluation.layer_times import CPU, CUDA, Shape, Sizes, of_device, of_layer
from momentkv.testing.gpu.parts import Row

__all__ = ["SHAPES", "TINY", "times"]

TINY = CPU._replace(
    shapes=[Shape(1, 2, 2, 16, 40, 128)],
    copy_bytes=2**16,
    rotate_bytes=2**14,
    repeats=5,
    seconds=0.01,
    prefill=32,
    block=8,
)
# Those that a target names first.
SHAPES = [
    Shape(16, 8, 4, 128, 512, 32768),
    Shape(64, 8, 4, 128, 512, 8192),
    Shape(64, 8, 4, 128, 2048, 8192),
    Shape(1, 8, 4, 128, 512, 131072),
    Shape(64, 8, 4, 128, 1024, 8192),
    Shape(32, 8, 4, 128, 2048, 8192),
    Shape(1, 8, 4, 128, 2048, 32768),
    Shape(16, 3, 3, 64, 512, 32768),
    Shape(16, 4, 2, 256, 512, 32768),
]


def sizes_of(rehearse: bool) -> tuple[Sizes, torch.device]:
    """What is measured, and where."""
    if rehearse:
        return TINY, torch.device("cpu")
    return CUDA._replace(shapes=SHAPES, seconds=0.3), torch.device("cuda")


def times(rehearse: bool) -> Iterator[Row]:
    """The rows of `momentkv bench` for one layer."""
    sizes, device = sizes_of(rehearse)
    torch.manual_seed(0)
    with torch.inference_mode():
        yield from of_device(sizes, device)
        for shape in sizes.shapes:
            yield from of_layer(shape, sizes, device)

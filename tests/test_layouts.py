"""Arrays as einsum, transposes and slices leave them: the same numbers elsewhere in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from momentkv import LayerCache
from momentkv.backends import get_backend
from momentkv.backends.flash import flash, flash_causal

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels before tokens": lambda x: x.mT.contiguous().mT,
    "every second channel": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], dim=-1).flatten(-2)[..., ::2],
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "channels before all": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
}
CLOSE: Any = {"rtol": 1e-5, "atol": 4e-6}

layouts = pytest.mark.parametrize("layout", LAYOUTS)


def vectors(*heads: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, n, 32, generator=generator).to(dtype) for h in heads]


@layouts
@pytest.mark.parametrize("which", range(3))
def test_the_flash_kernel_finds_them(layout: str, which: int):
    given = vectors(4, 2, 2, n=40)
    moved = list(given)
    moved[which] = LAYOUTS[layout](given[which])
    assert torch.equal(moved[which], given[which])
    for states in (
        [flash_causal(*x, scale=0.4) for x in (given, moved)],
        [flash(*x, scale=0.4) for x in (given, moved)],
        [get_backend("torch").attend_causal(x[0][:, :, 30:], *x[1:], scale=0.4) for x in (given, moved)],
    ):
        torch.testing.assert_close(states[1].out, states[0].out, **CLOSE)
        torch.testing.assert_close(states[1].lse, states[0].lse, **CLOSE)


def test_the_flash_kernel_finds_its_mask():
    q, k, v = vectors(4, 2, 2, n=40)
    valid = torch.rand(2, 2, 40, generator=torch.Generator().manual_seed(1)) < 0.6
    expected, found = (flash(q, k, v, scale=0.4, valid=x) for x in (valid, valid.mT.contiguous().mT))
    torch.testing.assert_close(found.out, expected.out, **CLOSE)
    torch.testing.assert_close(found.lse, expected.lse, **CLOSE)


@layouts
@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("padded", [False, True])
def test_a_cache_gives_what_it_gives_of_others(
    layout: str, bits: int | None, kv_heads: int, dtype: torch.dtype, padded: bool
):
    """A prompt, chunks and tokens: heads with queries of their own, and groups."""
    cache, same = (LayerCache(40, window=8, block=8, bits=bits) for _ in range(2))
    for seed, new in enumerate((100, 20, 1, 1, 20, 9)):
        given = vectors(4, kv_heads, kv_heads, n=new, dtype=dtype, seed=seed)
        valid = torch.ones(2, 1, new, dtype=torch.bool)
        valid[0, :, : new // 3] = not padded
        expected = same.step(*given, valid=valid if padded else None)
        found = cache.step(*(LAYOUTS[layout](x) for x in given), valid=valid if padded else None)
        if dtype == torch.bfloat16:
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-7)
        else:
            torch.testing.assert_close(found, expected, **CLOSE)
    assert torch.equal(cache.positions, same.positions)

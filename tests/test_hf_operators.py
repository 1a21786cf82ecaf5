"""The operators of a static step as PyTorch sees them: what they say they change is all that they change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing._internal.optests.generate_tests import OpCheckError

from momentkv import LayerCache
from momentkv.cache.config import MODEL_DEFAULTS
from momentkv.hf.steps import arrays_of, flush_operator, static_step, step_operator

KINDS: dict[str, dict[str, Any]] = {
    "default": MODEL_DEFAULTS,
    "observed": {"policy": "h2o", "correction": "moments"},
    "plain": {"policy": "snapkv", "order": None},
    "codes": MODEL_DEFAULTS | {"bits": 4, "exact_window": 2},
}


def layer(kind: str, dtype: torch.dtype = torch.float32) -> tuple[LayerCache, list[torch.Tensor]]:
    """A static layer that has evicted, and query, key and value of a step; values are longer than keys."""
    rng = torch.Generator().manual_seed(0)
    cache = LayerCache([12, 16], static=True, sinks=1, window=4, block=4, **KINDS[kind])
    tokens = [torch.randn(2, heads, 31, d, generator=rng).to(dtype) for heads, d in ((4, 8), (2, 8), (2, 16))]
    cache.step(*(x[:, :, :30] for x in tokens))
    return cache, [x[:, :, 30:] for x in tokens]


PADDING = torch.tensor([True, False])[:, None, None]
# All of PyTorch's check where it is cheap; the part that compiles for shapes that change, for the default alone.
CHEAP = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize("valid", [None, PADDING], ids=["every row", "a row of padding"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_tells_pytorch_the_truth(kind: str, valid: Any):
    """Schema, mutated arguments, fake kernels: PyTorch's own check."""
    cache, tokens = layer(kind)
    torch.library.opcheck(step_operator, (*tokens, valid, arrays_of(cache), cache.number), test_utils=CHEAP)


@pytest.mark.parametrize("kind", KINDS)
def test_a_flush_of_several_layers_tells_pytorch_the_truth(kind: str):
    caches = [layer(kind)[0] for _ in range(2)]
    arrays = [x for cache in caches for x in arrays_of(cache)]
    torch.library.opcheck(flush_operator, (arrays, [cache.number for cache in caches]), test_utils=CHEAP)


def test_steps_and_flushes_of_halves_are_the_same_where_they_are_compiled_for_shapes_that_change():
    cache, tokens = layer("default", torch.bfloat16)
    torch.library.opcheck(step_operator, (*tokens, PADDING, arrays_of(cache), cache.number))
    torch.library.opcheck(flush_operator, (arrays_of(cache), [cache.number]))


def test_a_step_that_hid_what_it_changes_would_fail_the_check():
    cache, tokens = layer("plain")
    hiding = torch.library.custom_op("momentkv_tests::step", step_operator._init_fn, mutates_args=())
    hiding.register_fake(lambda q, k, v, valid, arrays, number: q.new_empty((*q.shape[:-1], v.shape[-1])))
    with pytest.raises(OpCheckError, match="is not defined as mutable but was mutated"):
        torch.library.opcheck(hiding, (*tokens, None, arrays_of(cache), cache.number), test_utils="test_schema")


@pytest.mark.parametrize("kind", KINDS)
def test_operators_change_the_arrays_they_are_given_and_no_others(kind: str):
    """Not those of the layer whose number they know; and they do to them what a step and a flush do to a layer's."""
    cache, tokens = layer(kind)
    given = [x.clone() for x in arrays_of(cache)]
    before = [x.clone() for x in arrays_of(cache)]
    out = step_operator(*tokens, None, given, cache.number)
    assert all(map(torch.equal, arrays_of(cache), before))
    expected = static_step(cache, *tokens, None, [])
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    assert all(map(torch.equal, given, arrays_of(cache)))
    assert not all(map(torch.equal, given, before))
    before = [x.clone() for x in arrays_of(cache)]
    flush_operator(given, [cache.number])
    assert all(map(torch.equal, arrays_of(cache), before))
    static_step(cache, *tokens, None, [cache])  # a further step, and its flush
    step_operator(*tokens, None, before, cache.number)
    flush_operator(before, [cache.number])
    assert all(map(torch.equal, before, arrays_of(cache)))

"""What `momentkv.hf` refuses: each refusal names what is wrong, and leaves the cache as it was."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from contents import assert_same, contents
from models import FAMILIES, SIZES, build, prompt, tiny
from transformers import (
    AutoConfig,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from momentkv import Tokens
from momentkv.hf import MomentCache, momentkv_attention, momentkv_mask
from momentkv.policies import Streaming

SMALL = {"sinks": 1, "window": 8, "block": 4, "correction": "moments", "sharing": "uniform"}


def config(kind: str, **settings: Any) -> PreTrainedConfig:
    return AutoConfig.for_model(kind, attn_implementation="momentkv", **settings)


def cached(family: str = "llama", **settings: Any) -> MomentCache:
    return MomentCache(tiny(family), 14, **(SMALL | settings))


# What is refused when a cache is made, and parts of the message.
CONSTRUCTIONS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "sdpa": (lambda: MomentCache(tiny("llama", "sdpa"), 64), ["attn_implementation is 'sdpa'", "set_attn_"]),
    "unset": (lambda: MomentCache(LlamaConfig(**SIZES), 64), ["attn_implementation is"]),
    "encoder-decoder": (lambda: MomentCache(config("t5"), 64), ["'t5'", "encoder-decoder", "DynamicCache"]),
    "loops": (lambda: MomentCache(config("llama", n_recurrent_loops=2), 64), ["'llama'", "n_recurrent_loops"]),
    "softcap": (lambda: MomentCache(config("gemma2"), 64), ["'gemma2'", "attn_logit_softcapping"]),
    "latent attention": (lambda: MomentCache(config("deepseek_v3"), 64), ["'deepseek_v3'", "kv_lora_rank"]),
    "sinks as parameters": (lambda: MomentCache(config("gpt_oss"), 64), ["'gpt_oss'", "attention sinks"]),
    "cross-attention": (
        lambda: MomentCache(config("gpt2", add_cross_attention=True), 64),
        ["'gpt2'", "cross-attention"],
    ),
    "cross-attention layers": (lambda: MomentCache(config("mllama_text_model"), 64), ["'mllama", "cross-attention"]),
    "shared caches": (
        lambda: MomentCache(config("gemma3n_text", num_kv_shared_layers=3), 64),
        ["'gemma3n_text'", "num_kv_shared_layers"],
    ),
    "not causal": (lambda: MomentCache(config("llama", is_causal=False), 64), ["'llama'", "is_causal"]),
    "layer type": (
        lambda: MomentCache(
            config("llama", num_hidden_layers=2, layer_types=["full_attention", "linear_attention"]), 64
        ),
        ["layer 1", "'linear_attention'", "full_attention"],
    ),
    "budget": (lambda: MomentCache(tiny("llama"), 33), ["budget is 33", "34"]),
    "budget of a layer": (lambda: MomentCache(tiny("llama"), [64, 10]), ["budget is 10", "34"]),
    "too few budgets": (lambda: MomentCache(tiny("llama"), [64]), ["1 entries", "2 layers"]),
    "too many budgets": (lambda: MomentCache(tiny("llama"), [64] * 3), ["3 entries", "2 layers"]),
    "policy": (lambda: cached(policy="lru"), ["policy is 'lru'", "snapkv"]),
    "order": (lambda: cached(order=2), ["order is 2"]),
    "backend": (lambda: cached(backend="cupy"), ["backend is 'cupy'", "torch"]),
    "backend of other arrays": (lambda: cached(backend="numpy"), ["backend is 'numpy'", "torch tensors"]),
    "block": (lambda: cached(block=0), ["block is 0"]),
}


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_construction_is_refused_by_name(name: str):
    make, parts = CONSTRUCTIONS[name]
    with pytest.raises(ValueError, match=r".") as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def test_softcap_off_is_no_refusal():
    off = Gemma2Config(**(SIZES | {"attn_logit_softcapping": None}), head_dim=16, attn_implementation="momentkv")
    assert len(MomentCache(off, 64).layers) == 2


def snapshot(cache: MomentCache) -> dict[str, Any]:
    held: dict[str, Any] = {"seen": cache.get_seq_length()}
    for index, core in cache.moment_layers.items():
        held |= {f"{index}.waits": cache.layers[index].waits, f"{index}.scale": core.scale}
        arrays = contents(core) | {f"arrays.{name}": x for name, x in core.arrays().items()}
        held |= {f"{index}.{n}": x.clone() if isinstance(x, torch.Tensor) else x for n, x in arrays.items()}
    return held


def assert_unchanged(cache: MomentCache, before: dict[str, Any]) -> None:
    assert_same(snapshot(cache), before)


def started() -> tuple[Any, MomentCache]:
    """A model of its own, and a cache that has evicted."""
    model = build(FAMILIES["llama"]())
    cache = MomentCache(model, 14, **SMALL)
    with torch.no_grad():
        model(prompt(2, 40), past_key_values=cache)
    return model, cache


def training(model: Any, cache: MomentCache) -> None:
    model.config.attention_dropout = 0.1
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    try:
        model(prompt(2, 1), past_key_values=cache)
    finally:
        model.eval()


def switched(model: Any, cache: MomentCache) -> None:
    model.set_attn_implementation("sdpa")
    try:
        model(prompt(2, 1), past_key_values=cache)
    finally:
        model.set_attn_implementation("momentkv")


def compiled(model: Any, cache: MomentCache) -> None:
    keys = torch.zeros(2, 2, 1, 16)
    torch.compile(lambda k: cache.update(k, k, 0), backend="eager", fullgraph=True)(keys)


def read_again(model: Any, cache: MomentCache, padding: int = 0) -> None:
    """Generate from what the cache has read, with nothing new: transformers then reads all of it once more."""
    ids = prompt(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4)


def forward(**settings: Any) -> Callable[[Any, MomentCache], None]:
    return lambda model, cache: model(prompt(2, 1), past_key_values=cache, **settings)


def bare(**settings: Any) -> Callable[[Any, MomentCache], None]:
    """The attention function itself, as an architecture would call it that passes an argument of its own."""

    def run(model: Any, cache: MomentCache) -> None:
        x = torch.zeros(2, 2, 1, 16)
        keys, values = cache.update(x, x, 0)
        momentkv_attention(model.model.layers[0].self_attn, torch.zeros(2, 4, 1, 16), keys, values, None, **settings)

    return run


USES: dict[str, tuple[Callable[[Any, MomentCache], None], type[Exception], list[str]]] = {
    "another implementation later": (switched, ValueError, ["attn_implementation is 'sdpa'"]),
    "crop to a length": (lambda model, cache: cache.crop(2), ValueError, ["crop(2)", "negative"]),
    "crop of evicted tokens": (
        lambda model, cache: cache.crop(-20),
        RuntimeError,
        ["crop(-20)", "evicted", "window (8)"],
    ),
    "crop of too many": (lambda model, cache: cache.crop(-41), ValueError, ["crop(-41)", "40 tokens"]),
    "a layer's crop of evicted tokens": (lambda _, cache: cache.layers[1].crop(-20), RuntimeError, ["crop(-20)"]),
    "weights": (forward(output_attentions=True), ValueError, ["output_attentions=True"]),
    "dropout": (training, ValueError, ["dropout is 0.1", "model.eval()"]),
    "4-D mask": (
        lambda model, cache: model(prompt(2, 3), attention_mask=torch.ones(2, 1, 3, 43).bool(), past_key_values=cache),
        ValueError,
        ["attention_mask has 4 dimensions", "(batch, tokens seen)", "DynamicCache"],
    ),
    "short mask": (
        forward(attention_mask=torch.ones(2, 1, dtype=torch.long)),
        ValueError,
        ["attention_mask has length 1", "41 tokens"],
    ),
    "nothing new": (
        read_again,
        ValueError,
        ["40 tokens and the cache has read 40", "at least one new token", "edited or shortened, a new cache"],
    ),
    "positions of tokens before": (
        lambda model, cache: model(prompt(2, 40), position_ids=torch.arange(40)[None], past_key_values=cache),
        ValueError,
        ["40 tokens arrive", "the 40 tokens", "at least one new token", "edited or shortened, a new cache"],
    ),
    "nothing new, padded": (
        lambda model, cache: read_again(model, cache, padding=3),
        ValueError,
        ["40 tokens and the cache has read 40", "at least one new token"],
    ),
    "nothing new, embedded": (
        lambda model, cache: model.generate(
            inputs_embeds=torch.zeros(2, 30, model.config.hidden_size), past_key_values=cache, max_new_tokens=4
        ),
        ValueError,
        ["30 tokens and the cache has read 40", "at least one new token"],
    ),
    "nothing new, in chunks": (
        lambda model, cache: model.generate(
            prompt(2, 30), past_key_values=cache, max_new_tokens=4, prefill_chunk_size=8
        ),
        ValueError,
        ["30 tokens and the cache has read 40", "at least one new token"],
    ),
    "softcap": (bare(softcap=30.0), ValueError, ["softcap was passed", "Gemma 2"]),
    "sinks": (bare(s_aux=torch.zeros(4)), ValueError, ["s_aux was passed", "gpt-oss"]),
    "position bias": (bare(position_bias=torch.zeros(1, 4, 1, 1)), ValueError, ["position_bias was passed"]),
    "compile": (compiled, Exception, ["MomentCache supports torch.compile for steps of one token with static=True"]),
}


@pytest.mark.parametrize("name", USES)
def test_use_is_refused_by_name_and_the_cache_is_as_before(name: str):
    use, error, parts = USES[name]
    (model, cache), (_, other) = started(), started()
    before = snapshot(cache)
    with pytest.raises(error) as caught:
        use(model, cache)
    for part in parts:
        assert part in str(caught.value)
    assert_unchanged(cache, before)
    # And it goes on as if nothing had happened.
    with torch.no_grad():
        a, b = (model(prompt(2, 6, seed=1), past_key_values=x).logits for x in (cache, other))
    assert torch.equal(a, b)


@pytest.mark.parametrize(("tokens", "message"), [(20, "evicted"), (3, "sliding window of 16 has dropped")])
def test_a_refused_rollback_leaves_sliding_layers_too(tokens: int, message: str):
    cache = cached("gemma3")
    with torch.no_grad():
        tiny("gemma3")(prompt(1, 40), past_key_values=cache)
    before = [layer.keys.clone() for layer in cache.layers]
    with pytest.raises(RuntimeError, match=message):
        cache.crop(-tokens)
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(cache.layers, before, strict=True))
    assert cache.get_seq_length() == 40


def test_crop_by_nothing_does_nothing():
    _, cache = started()
    before = snapshot(cache)
    cache.crop(0)
    cache.layers[0].crop(0)
    assert_unchanged(cache, before)


def test_keys_that_never_reach_momentkv_are_noticed():
    """As in an architecture that expands its keys after the cache has them."""
    cache = cached()
    x = torch.zeros(1, 2, 1, 16)
    cache.update(x, x, 0)
    with pytest.raises(RuntimeError, match="layer 0 stored new tokens but its attention never reached momentkv"):
        cache.update(x, x, 1)
    assert cache.get_seq_length() == cache.nbytes == 0
    cache.update(x, x, 0)
    assert cache.layers[0].get_seq_length() == 1


class Nothing(torch.nn.Module):
    """A layer without attention."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("index", [0, 1, -1])
def test_a_layer_without_attention_that_the_configuration_does_not_tell_of_is_noticed(family: str, index: int):
    """A pass would end before it, and be forgotten as one that failed."""
    model = copy.deepcopy(tiny(family))
    index %= len(model.model.layers)
    model.model.layers[index] = Nothing()
    said = rf"passes end without layer {index}, which has never stored a token.*use a DynamicCache"
    with pytest.raises(RuntimeError, match=said):
        model.generate(prompt(1, 9), past_key_values=MomentCache(model, 14, **SMALL), max_new_tokens=2)
    cache = MomentCache(model, 14, **SMALL)

    @torch.no_grad()
    def read() -> None:
        for _ in range(10):  # as many tokens each time, as a pass has that is tried again
            model(prompt(1, 4), past_key_values=cache)

    with pytest.raises(RuntimeError, match=said):
        read()


@pytest.mark.parametrize("kinds", [["full_attention"], ["sliding_attention", "full_attention"]], ids=len)
def test_keys_of_the_last_layer_that_never_reach_momentkv_are_noticed_at_the_next_pass(kinds: list[str]):
    settings = SIZES | {"num_hidden_layers": len(kinds), "head_dim": 16, "sliding_window": 16, "layer_types": kinds}
    model = build(Gemma3TextConfig(**settings))
    cache = MomentCache(model, 14, **SMALL)
    x = torch.zeros(1, 2, 1, 16)
    for _ in range(2):
        for layer in range(len(kinds)):
            cache.update(x, x, layer)
        assert cache.get_mask_sizes(1, 0)[0] == 1  # as a model asks before its first layer: nothing has been read
        with pytest.raises(RuntimeError, match=f"layer {len(kinds) - 1} stored new tokens but its attention never"):
            cache.update(x, x, 0)
        assert cache.get_seq_length() == 0
    # Once one has reached it, another that does not was a pass that failed.
    with torch.no_grad():
        model(prompt(1, 10), past_key_values=cache)
    for layer in range(len(kinds)):
        cache.update(x, x, layer)
    fresh = MomentCache(model, 14, **SMALL)
    with torch.no_grad():
        model(prompt(1, 10), past_key_values=fresh)
        a, b = (model(prompt(1, 3, seed=1), past_key_values=one).logits for one in (cache, fresh))
    assert torch.equal(a, b)


class Failing(Streaming):
    """Raises when it is asked for the n-th time."""

    name = "failing"

    def __init__(self, asked: int) -> None:
        self.left = asked

    def importance(self, tokens: Tokens) -> Any:
        self.left -= 1
        if self.left == 0:
            raise MemoryError("out of memory")
        return super().importance(tokens)


def test_a_pass_that_fails_in_the_first_layer_leaves_the_cache_as_before():
    model = tiny("llama")
    failing, other = (MomentCache(model, 14, policy=policy, **SMALL) for policy in (Failing(1), Streaming()))
    with torch.no_grad():
        for cache in (failing, other):
            model(prompt(1, 10), past_key_values=cache)
        before = snapshot(failing)
        with pytest.raises(MemoryError):
            model(prompt(1, 30, seed=1), past_key_values=failing)
        assert_unchanged(failing, before)
        a, b = (model(prompt(1, 30, seed=1), past_key_values=cache).logits for cache in (failing, other))
    assert torch.equal(a, b)


def test_a_length_is_a_number_and_tokens_can_be_taken_back_by_a_difference_of_lengths():
    model, cache = tiny("llama"), cached()
    with torch.no_grad():
        model(prompt(2, 41), past_key_values=cache)
    read = cache.get_seq_length()
    assert (read, read + 1, 50 - read, 40 - read, read - 40) == (41, 42, 9, -1, 1)
    assert torch.equal(torch.arange(read), torch.arange(41))
    assert torch.equal(torch.tensor(45) - read, torch.tensor(4))
    cache.crop(39 - cache.get_seq_length())
    assert cache.get_seq_length() == 39


def test_a_mask_with_dimensions_of_its_own_goes_to_sdpa_as_it_is():
    """Beside caches that momentkv does not compress, custom masks work as under SDPA."""
    # No mask function is called for such a mask, so none says that a pass of an earlier test, which ended before its
    # attention, is over: its cache must be gone.
    gc.collect()
    ids = prompt(1, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    mask[..., 2] = False
    mask[..., 2, 2] = True
    a, b = (
        tiny("llama", name)(ids, attention_mask=mask, past_key_values=DynamicCache()).logits
        for name in ("momentkv", "sdpa")
    )
    assert torch.equal(a, b)


def test_causal_masks_are_compact():
    settings = {"batch_size": 2, "q_length": 3, "kv_length": 5, "q_offset": 2}
    for mask in (None, torch.ones(2, 7)):
        whole = momentkv_mask(**settings, attention_mask=mask)
        assert whole.shape == (2, 5)
        assert whole.all()
        assert whole.stride() == (0, 0)  # one True, by which attention knows that there is no padding
    assert momentkv_mask(**settings | {"q_length": 1, "q_offset": 4}) is None
    padded = torch.tensor([[0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    assert momentkv_mask(**settings, attention_mask=padded).tolist() == padded[:, :5].bool().tolist()
    for name, value in {"kv_offset": 1, "local_size": 2, "mask_function": lambda b, h, q, k: k <= q - 1}.items():
        full = momentkv_mask(**settings, attention_mask=padded.bool(), allow_is_causal_skip=False, **{name: value})
        assert full.shape == (2, 1, 3, 5)


@pytest.mark.parametrize(
    ("length", "static"),
    # A static step asks the device for nothing, and so not for the position of a single token.
    [
        (length, static)
        for length in (1, 5, 21, 22, 39, 40, 41)
        for static in (False, True)
        if length != 21 or not static
    ],
)
def test_a_history_no_longer_than_what_was_read_is_refused(length: int, static: bool):
    """Whatever part of it generate() then feeds once more: none, a single token (of 21), some or all."""
    model, cache = tiny("llama"), cached(static=static)
    with torch.no_grad():
        model(prompt(2, 41), past_key_values=cache)
    before = snapshot(cache)
    with pytest.raises(ValueError, match=r"the history was edited or shortened, a new cache"):
        model.generate(prompt(2, length), past_key_values=cache, max_new_tokens=4)
    assert_unchanged(cache, before)
    ids = torch.cat([prompt(2, 41), prompt(2, 1, seed=1)], 1)
    assert model.generate(ids, past_key_values=cache, max_new_tokens=4).shape == (2, 46)

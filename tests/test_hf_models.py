"""What may be given as a model, and passes of one that a cache cannot go on with: refused by name, with a remedy."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import FAMILIES, build, prompt, tiny
from tokenizers import Tokenizer, models
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from momentkv.hf import MomentCache

SMALL: dict[str, Any] = {"budget": 20, "sinks": 1, "window": 8, "block": 4}


def tokenizer() -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: "some/model",
            r"model is 'some/model', a name or path; load it first: .*from_pretrained\('some/model', ",
        ),
        (lambda: None, "model is None; pass the model that generates"),
        (tokenizer, "which tokenizes; pass the model that generates"),
        (lambda: SimpleNamespace(tokenizer=tokenizer()), "model is a SimpleNamespace, which tokenizes"),
        (lambda: LlamaForCausalLM, "model is the class LlamaForCausalLM and not an object of it"),
        (lambda: SimpleNamespace(model=tiny("llama")), "which holds a model; pass that itself, its attribute 'model'"),
        (lambda: torch.nn.DataParallel(tiny("llama")), "a DataParallel, which holds a model; .* attribute 'module'"),
        (lambda: tiny("llama").lm_head, "model is a Linear without a config of transformers, a part of a model"),
        (lambda: tiny("llama").config.to_dict(), "model is a dict; pass the model that generates"),
    ],
)
def test_what_is_no_model_is_refused_by_what_it_is(make: Any, message: str, tmp_path: Any):
    given = make()
    for use in (MomentCache, lambda x: MomentCache.load(tmp_path / "cache", x)):
        with pytest.raises(TypeError, match=message):
            use(given)


def test_a_model_without_numbers_is_refused_when_it_reads():
    with torch.device("meta"):
        model = build(FAMILIES["llama"]())
    cache = MomentCache(model, **SMALL)
    with torch.no_grad(), pytest.raises(ValueError, match=r"on the meta device.*from_pretrained"):
        model(prompt(1, 40).to("meta"), past_key_values=cache)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"num_return_sequences": 3, "do_sample": True}])
@pytest.mark.parametrize("new", [1, 5])
def test_more_rows_than_were_read_are_refused_until_these_are_repeated(settings: Any, new: int, static: bool):
    model, cache = tiny("llama"), MomentCache(tiny("llama"), static=static, **SMALL)
    with torch.no_grad():
        model(prompt(1, 60), past_key_values=cache)
    ids = torch.cat([prompt(1, 60), prompt(1, new, seed=1)], 1)
    with pytest.raises(ValueError, match=r"3 rows arrive at a cache that holds 1; .*batch_repeat_interleave\(3\)"):
        model.generate(ids, past_key_values=cache, max_new_tokens=6, **settings)
    cache.batch_repeat_interleave(3)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=6, **settings)
    assert out.shape[1] == 66 + new


def test_of_a_budget_in_bytes_rows_cannot_be_repeated_and_that_is_the_advice():
    model, cache = tiny("llama"), MomentCache(tiny("llama"), **(SMALL | {"budget": "200KiB"}))
    with torch.no_grad():
        model(prompt(1, 60), past_key_values=cache)
    ids = torch.cat([prompt(1, 60), prompt(1, 1, seed=1)], 1)
    with pytest.raises(ValueError, match=r"2 rows arrive at a cache that holds 1; its budget of 200KiB was divided"):
        model.generate(ids, past_key_values=cache, max_new_tokens=6, num_beams=2)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_fewer_rows_than_were_read_are_refused_whichever_layer_is_first(family: str):
    model, cache = tiny(family), MomentCache(tiny(family), **SMALL)
    with torch.no_grad():
        model(prompt(2, 60), past_key_values=cache)
        for new in (1, 5):
            with pytest.raises(ValueError, match=r"1 rows arrive at a cache that holds 2; .*batch_select_indices"):
                model(prompt(1, new), past_key_values=cache)
        model(prompt(2, 1), past_key_values=cache)
    assert cache.get_seq_length() == 61


@pytest.mark.parametrize("first", ["float32", "bfloat16"])
@pytest.mark.parametrize("static", [False, True])
def test_passes_with_and_without_autocast_do_not_mix(static: bool, first: str):
    """Static buffers would take another dtype without a word."""
    model, cache = tiny("llama"), MomentCache(tiny("llama"), static=static, **SMALL)
    other = MomentCache(tiny("llama"), static=static, **SMALL)

    def read(cache: MomentCache, ids: torch.Tensor, dtype: str) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            logits: torch.Tensor = model(ids, past_key_values=cache).logits
            return logits

    second = {"float32": "bfloat16", "bfloat16": "float32"}[first]
    for one in (cache, other):
        read(one, prompt(1, 60), first)
    with pytest.raises(ValueError, match=f"v is torch.{second}, but the cache holds torch.{first}; .*autocast"):
        read(cache, prompt(1, 1), second)
    for seed in range(8):
        assert torch.equal(*(read(one, prompt(1, 1, seed), first) for one in (cache, other)))

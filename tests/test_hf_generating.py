"""What ``generate`` does with a cache beside forward passes: calls that begin, and guesses that it would read twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from models import GEMMA, HYBRID, SIZES, build, left_padded, prompt, save_with_bytes, tiny
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
    Gemma3Config,
    Gemma3TextConfig,
    SiglipVisionConfig,
)

from momentkv.hf import FinishedRows, MomentCache

ABOVE = 1000  # a budget above every length here
SETTINGS: dict[str, Any] = {"do_sample": False, "pad_token_id": 0}


def stored(cache: MomentCache) -> list[int]:
    """Tokens of each row."""
    return cache.moment_layers[0].positions[:, 0].ge(0).sum(-1).tolist()


@pytest.mark.parametrize("new", [1, 5])
@pytest.mark.parametrize("with_assistant", [False, True])
def test_assistance_with_a_cache_that_has_read_is_refused_at_once(new: int, with_assistant: bool):
    """transformers would read the whole input, and with it once more what the cache has read."""
    model, text = tiny("llama"), prompt(1, 60)
    more = torch.cat([text, prompt(1, 9, seed=1)], 1)
    assistance = {"assistant_model": tiny("llama", "sdpa")} if with_assistant else {"prompt_lookup_num_tokens": 4}
    cache, plain = MomentCache(model, ABOVE), MomentCache(model, ABOVE)
    with torch.no_grad():
        for each in (cache, plain):
            model(text, past_key_values=each)
    with pytest.raises(ValueError, match=r"past_key_values has read 60 tokens.*give it a new cache"):
        model.generate(more, past_key_values=cache, max_new_tokens=new, **SETTINGS, **assistance)
    # Nothing was changed, nor is recorded: what follows without assistance is that of a cache never asked.
    answers = [model.generate(more, past_key_values=each, max_new_tokens=new, **SETTINGS) for each in (cache, plain)]
    assert torch.equal(*answers)
    assert stored(cache) == stored(plain) == [69 + new - 1]
    assert not any(layer.record_past for layer in cache.layers)
    # A new one is helped.
    fresh = model.generate(
        more, past_key_values=MomentCache(model, ABOVE), max_new_tokens=new, **SETTINGS, **assistance
    )
    assert torch.equal(fresh, answers[0])
    # By hand one may record what comes after what was read.
    plain.activate_past_recording()
    assert all(layer.record_past for layer in plain.layers)


class Ended(NamedTuple):
    """A call of generate, in which the second row ended early."""

    model: Any
    cache: MomentCache
    criteria: FinishedRows
    end: int
    prompts: torch.Tensor
    out: torch.Tensor
    mask: torch.Tensor  # of text alone


def ended_early() -> Ended:
    model = tiny("llama")
    ids, mask = left_padded([prompt(1, 20, 1), prompt(1, 12, 2)])
    alone = model.generate(ids, attention_mask=mask, max_new_tokens=12, **SETTINGS)[:, 20:].tolist()
    end = next(token for token in alone[1][2:6] if token not in alone[0])
    cache = MomentCache(model, ABOVE)
    criteria = FinishedRows(cache, end)
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        stopping_criteria=[criteria],
        max_new_tokens=12,
        eos_token_id=end,
        **SETTINGS,
    )
    after = (out[:, 20:] == end).long().cumsum(1)
    real = torch.cat([mask, ((after == 0) | ((after == 1) & (out[:, 20:] == end))).long()], 1)
    assert stored(cache) == (real.sum(1) - torch.tensor([1, 0])).tolist()
    return Ended(model, cache, criteria, end, ids, out, real)


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.17"), reason="generate does not tell that it begins")
@pytest.mark.parametrize("again", [False, True], ids=["another text", "its own output"])
def test_rows_that_ended_in_one_call_of_generate_have_not_in_the_next(again: bool):
    """Of a text as long as what the last call wrote, which looks as if that went on."""
    model, cache, criteria, _, _, out, mask = ended_early()
    if not again:
        cache.reset()
        out, mask = prompt(2, out.shape[1], seed=5), torch.ones_like(mask)
    criteria.ends = torch.tensor([10**6])
    more = {"attention_mask": mask, "max_new_tokens": 4, "eos_token_id": None} | SETTINGS
    found = model.generate(out, past_key_values=cache, stopping_criteria=[criteria], **more)
    assert stored(cache) == (mask.sum(1) + 3).tolist()
    assert torch.equal(found, tiny("llama", "sdpa").generate(out, **more))


def test_taking_tokens_back_forgets_who_had_ended():
    """Also where one goes on by hand: each token is as far as one that was padding for a row."""
    model, cache, _, _, _, _, mask = ended_early()
    cache.crop(-(int(cache.get_seq_length()) - 20))
    mask = mask[:, :20]
    with torch.no_grad():
        for token in prompt(2, 12, seed=8).unbind(1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            model(token[:, None], attention_mask=mask, past_key_values=cache)
    assert stored(cache) == mask.sum(1).tolist()


def test_rows_end_the_same_where_embeddings_are_given():
    model, _, _, end, ids, _, _ = ended_early()
    counts = []
    for given in ({"inputs": ids}, {"inputs_embeds": model.get_input_embeddings()(ids)}):
        mask = left_padded([prompt(1, 20, 1), prompt(1, 12, 2)])[1]
        cache = MomentCache(model, ABOVE)
        model.generate(
            **given,
            attention_mask=mask,
            past_key_values=cache,
            stopping_criteria=[FinishedRows(cache, end)],
            max_new_tokens=12,
            eos_token_id=end,
            **SETTINGS,
        )
        counts.append(stored(cache))
    assert counts[0] == counts[1]
    assert counts[0][1] < 12 + 11  # without the pads after its end


def test_models_may_ask_whether_theirs_is_the_first_pass():
    for family in ("llama", "gemma3"):
        model = tiny(family)
        cache, stock = MomentCache(model, ABOVE), DynamicCache(config=model.config)
        assert (cache.is_initialized, stock.is_initialized) == (False, False)
        with torch.no_grad():
            model(prompt(1, 30), past_key_values=cache)
        assert cache.is_initialized
        cache.reset()
        assert not cache.is_initialized


def test_strings_that_end_a_row_come_with_their_tokenizer(tmp_path: Path):
    """transformers hands the tokenizer on to the model, whose attention it does not change."""
    path = save_with_bytes(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, stock = (
        AutoModelForCausalLM.from_pretrained(path, attn_implementation=name).eval() for name in ("momentkv", "sdpa")
    )
    ids = tokenizer("A text", return_tensors="pt").input_ids
    last = tokenizer.decode(stock.generate(ids, max_new_tokens=4, **SETTINGS)[0, -1:])
    for more in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        settings = {"stop_strings": [last], "tokenizer": tokenizer, "max_new_tokens": 12} | SETTINGS | more
        found = model.generate(ids, past_key_values=MomentCache(model, ABOVE), **settings)
        assert torch.equal(found, stock.generate(ids, **settings))


def test_token_types_of_a_text_without_images_change_nothing():
    text = Gemma3TextConfig(**(SIZES | GEMMA | {"layer_types": HYBRID}))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**sizes, image_size=28, patch_size=14),
        mm_tokens_per_image=4,
        image_token_index=96,
        boi_token_index=95,
        eoi_token_index=94,
    )
    model = build(config, of=AutoModelForImageTextToText)
    ids, mask = left_padded([prompt(1, 40, 1) % 90, prompt(1, 28, 2) % 90])
    for given in ({"inputs": ids[:1]}, {"inputs": ids, "attention_mask": mask}):
        plain = model.generate(**given, past_key_values=MomentCache(model, 40), max_new_tokens=6, **SETTINGS)
        types = {"token_type_ids": torch.zeros_like(given["inputs"])}
        typed = model.generate(**given, **types, past_key_values=MomentCache(model, 40), max_new_tokens=6, **SETTINGS)
        assert torch.equal(typed, plain)
    types = torch.zeros(1, 40, dtype=torch.long)
    types[:, 10:14] = 1
    with torch.no_grad(), pytest.raises(ValueError, match="DynamicCache for images whose tokens see each other"):
        model.model(ids[:1], token_type_ids=types, past_key_values=MomentCache(model, 40))

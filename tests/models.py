"""Tiny models with random weights, one a family, each with the same weights under every attention implementation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

import momentkv.hf
from momentkv.evaluation.sources import load_model

VOCABULARY = 97
# Weights ten times as large as usual: attention that is not close to a mean, logits that are not close to a tie.
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
HYBRID = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
# `query_pre_attn_scalar` is not the head dimension, so that attention has a scale of its own.
GEMMA = {"num_hidden_layers": 4, "head_dim": 16, "query_pre_attn_scalar": 40, "sliding_window": 16}

FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": functools.partial(LlamaConfig, **SIZES),
    "qwen2": functools.partial(Qwen2Config, **SIZES),
    "qwen3": functools.partial(Qwen3Config, **SIZES, head_dim=16),
    "mistral": functools.partial(MistralConfig, **SIZES, sliding_window=None),
    "mistral sliding": functools.partial(MistralConfig, **SIZES, sliding_window=16),
    "gemma3": functools.partial(Gemma3TextConfig, **(SIZES | GEMMA), layer_types=HYBRID),
    "gemma3 full": functools.partial(Gemma3TextConfig, **(SIZES | GEMMA), layer_types=["full_attention"] * 4),
    "phi3": functools.partial(Phi3Config, **SIZES),
}
COMPRESSED = [name for name in FAMILIES if name != "mistral sliding"]


@functools.cache
def tiny(family: str, implementation: str = momentkv.hf.NAME, dtype: str = "float32") -> Any:
    """The model of a family; asked for again, it is the same object."""
    return build(FAMILIES[family](), implementation, dtype)


@functools.cache
def real() -> tuple[Any, Any]:
    """The model of the demo and its tokenizer, loaded once for all tests."""
    return load_model()


def build(
    config: PreTrainedConfig,
    implementation: str = momentkv.hf.NAME,
    dtype: str = "float32",
    of: Any = AutoModelForCausalLM,
) -> Any:
    """A new model with weights that depend on its configuration alone."""
    # A model that is kept may be asked for first within inference mode, and later with gradients.
    with torch.random.fork_rng(), torch.inference_mode(False):
        torch.manual_seed(0)
        make = getattr(of, "from_config", None) or of._from_config
        model = make(config, dtype=torch.float32, attn_implementation=implementation)
    return model.to(getattr(torch, dtype)).eval()


def save_with_bytes(path: str | Path, family: str = "llama") -> str:
    """Save a tiny model whose tokens are bytes, with its tokenizer; returns the path."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(["<end>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(path)
    build(FAMILIES[family](vocab_size=len(vocabulary))).save_pretrained(path)
    return str(path)


def prompt(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens, none of which is padding."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths as a batch, and its attention mask."""
    longest = max(row.shape[1] for row in rows)
    pads = [longest - row.shape[1] for row in rows]
    ids = torch.cat([torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(rows, pads, strict=True)])
    return ids, (torch.arange(longest) >= torch.tensor(pads)[:, None]).long()

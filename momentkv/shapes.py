"""Shapes of models, which decide how large caches are: of known ones, of a ``config.json``, or by transformers."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from momentkv._numbers import whole_number

__all__ = ["KNOWN", "Shape", "find_shape", "shape_from_config"]

SLIDING = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# Entries of a configuration that show that its caches have another shape, or that momentkv cannot correct them.
REFUSED = {
    "kv_lora_rank": "multi-head latent attention",
    "num_kv_shared_layers": "layers that share caches",
    "global_head_dim": "layers of different head dimensions",
    "is_encoder_decoder": "an encoder-decoder",
    "attn_logit_softcapping": "soft-capped logits",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """The part of a model's shape that decides the size of its cache.

    Attributes
    ----------
    layers, kv_heads, q_heads, head_dim : int
    full_layers : int, optional
        Layers of full attention, all by default. Only these get a budget.
    sliding_window : int
        Length of the other layers' windows, 0 where there are none.

    Raises
    ------
    ValueError
        If the numbers do not fit each other.
    TypeError
        If one is no whole number.

    Examples
    --------
    >>> KNOWN["SmolLM2-135M"].full_layers
    30
    """

    layers: int
    kv_heads: int
    q_heads: int
    head_dim: int
    full_layers: int = -1
    sliding_window: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            whole_number(field.name, getattr(self, field.name))
        if self.full_layers == -1:
            object.__setattr__(self, "full_layers", self.layers)
        for name in ("layers", "kv_heads", "q_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads is {self.q_heads}; use a multiple of kv_heads, which is {self.kv_heads}")
        if not 0 <= self.full_layers <= self.layers:
            raise ValueError(f"full_layers is {self.full_layers}; use 0 to {self.layers}, the number of layers")
        if self.full_layers < self.layers and self.sliding_window < 1:
            raise ValueError(
                f"sliding_window is {self.sliding_window}, but {self.layers - self.full_layers} layers are not of full "
                "attention; give the length of their window"
            )


# What the owners of these models published in the config.json of each, at huggingface.co/OWNER/NAME; read in copies of
# those: litgpt's config.py, which links to each, the files of Phi-3 in dotnet/machinelearning, and model cards.
# Name: layers, query heads, KV heads, head dimension and, where layers have a window of their own, the number of those
# of full attention and the window's length. The first Mistral-7B and most of Phi have windows in every layer; those of
# 131,072 and 262,144 tokens are as long as the longest text that these models read, or longer.
SHAPES: dict[str, tuple[int, ...]] = {
    "Llama-3-8B": (32, 32, 8, 128),
    "Llama-3-70B": (80, 64, 8, 128),
    "Llama-3.1-8B": (32, 32, 8, 128),
    "Llama-3.1-70B": (80, 64, 8, 128),
    "Llama-3.1-405B": (126, 128, 8, 128),
    "Llama-3.2-1B": (16, 32, 8, 64),
    "Llama-3.2-3B": (28, 24, 8, 128),
    "Llama-3.3-70B": (80, 64, 8, 128),
    "Qwen2.5-0.5B": (24, 14, 2, 64),
    "Qwen2.5-1.5B": (28, 12, 2, 128),
    "Qwen2.5-3B": (36, 16, 2, 128),
    "Qwen2.5-7B": (28, 28, 4, 128),
    "Qwen2.5-14B": (48, 40, 8, 128),
    "Qwen2.5-32B": (64, 40, 8, 128),
    "Qwen2.5-72B": (80, 64, 8, 128),
    "Qwen3-0.6B": (28, 16, 8, 128),
    "Qwen3-1.7B": (28, 16, 8, 128),
    "Qwen3-4B": (36, 32, 8, 128),
    "Qwen3-8B": (36, 32, 8, 128),
    "Qwen3-14B": (40, 40, 8, 128),
    "Qwen3-32B": (64, 64, 8, 128),
    "Mistral-7B-v0.1": (32, 32, 8, 128, 0, 4096),
    "Mistral-7B-v0.3": (32, 32, 8, 128),
    "Mistral-Nemo": (40, 32, 8, 128),
    "Mistral-Small-22B": (56, 48, 8, 128),
    "Mistral-Small-24B": (40, 32, 8, 128),
    "Gemma-3-270M": (18, 4, 1, 256, 3, 512),
    "Gemma-3-1B": (26, 4, 1, 256, 4, 512),
    "Gemma-3-4B": (34, 8, 4, 256, 5, 1024),
    "Gemma-3-12B": (48, 16, 8, 256, 8, 1024),
    "Gemma-3-27B": (62, 32, 16, 128, 10, 1024),
    "Phi-3-mini-4k": (32, 32, 32, 96, 0, 2047),
    "Phi-3-mini-128k": (32, 32, 32, 96, 0, 262144),
    "Phi-3-medium-4k": (40, 40, 10, 128, 0, 2047),
    "Phi-3-medium-128k": (40, 40, 10, 128, 0, 131072),
    "Phi-3.5-mini": (32, 32, 32, 96, 0, 262144),
    "Phi-4": (40, 40, 10, 128),
    "Phi-4-mini": (32, 24, 8, 128, 0, 262144),
    "SmolLM2-135M": (30, 9, 3, 64),
}
KNOWN = {
    name: Shape(layers, kv_heads, q_heads, head_dim, *windows)
    for name, (layers, q_heads, kv_heads, head_dim, *windows) in SHAPES.items()
}
# How the Hugging Face ids of a family are made of its names: owner, and what may follow.
FAMILIES = {
    "Llama-3": ("meta-llama", ("", "-Instruct")),
    "Qwen2.5": ("Qwen", ("", "-Instruct")),
    "Qwen3": ("Qwen", ("", "-Base")),
    "Mistral": ("mistralai", ("",)),
    "Gemma-3": ("google", ("", "-pt", "-it")),
    "Phi": ("microsoft", ("", "-instruct")),
    "SmolLM2": ("HuggingFaceTB", ("", "-Instruct")),
}
# Other names that the same may follow, and ids that are whole.
ALIASES = {
    **{f"Meta-{name}": name for name in SHAPES if name.startswith(("Llama-3-", "Llama-3.1-"))},
    **{f"Qwen2.5-Coder-{size}": f"Qwen2.5-{size}" for size in ("0.5B", "1.5B", "3B", "7B", "14B", "32B")},
    **{f"Qwen2.5-Math-{size}": f"Qwen2.5-{size}" for size in ("1.5B", "7B", "72B")},
}
WHOLE = {
    "Qwen3-4B-Instruct-2507": "Qwen3-4B",
    "Qwen3-4B-Thinking-2507": "Qwen3-4B",
    "Mistral-7B-Instruct-v0.1": "Mistral-7B-v0.1",
    "Mistral-7B-Instruct-v0.2": "Mistral-7B-v0.3",
    "Mistral-7B-Instruct-v0.3": "Mistral-7B-v0.3",
    "Mistral-Nemo-Base-2407": "Mistral-Nemo",
    "Mistral-Nemo-Instruct-2407": "Mistral-Nemo",
    "Mistral-Small-Instruct-2409": "Mistral-Small-22B",
    "Mistral-Small-24B-Base-2501": "Mistral-Small-24B",
    "Mistral-Small-24B-Instruct-2501": "Mistral-Small-24B",
    "Mistral-Small-3.1-24B-Base-2503": "Mistral-Small-24B",
    "Mistral-Small-3.1-24B-Instruct-2503": "Mistral-Small-24B",
    "Mistral-Small-3.2-24B-Instruct-2506": "Mistral-Small-24B",
    "Phi-4-reasoning": "Phi-4",
    "Phi-4-reasoning-plus": "Phi-4",
    "Phi-4-mini-reasoning": "Phi-4-mini",
}


def known_ids() -> Iterator[tuple[str, str]]:
    """Every name and Hugging Face id of the known models, in small letters, and the name of its shape."""
    named = {name: name for name in SHAPES} | ALIASES
    for name, known in (named | WHOLE).items():
        owner, suffixes = next(x for family, x in FAMILIES.items() if known.startswith(family))
        for suffix in suffixes if name in named else ("",):
            yield f"{name}{suffix}".lower(), known
            yield f"{owner}/{name}{suffix}".lower(), known


IDS = dict(known_ids())


def find_shape(model: str | os.PathLike[str]) -> Shape:
    """Shape of a model: from a file or directory, one of the known models, or by transformers.

    Parameters
    ----------
    model : str or path
        A ``config.json`` or the directory it is in; a name of `KNOWN` or the Hugging Face id of one, in any case; or
        any other Hugging Face id, if transformers is installed.

    Raises
    ------
    ValueError
        If there is no such model, or its cache has another shape than `momentkv.hf.MomentCache` supports.
    TypeError
        If ``model`` is neither a name nor a path.
    ModuleNotFoundError
        If transformers would be needed and is not installed.

    Examples
    --------
    >>> find_shape("qwen/qwen3-4b-instruct-2507") == KNOWN["Qwen3-4B"]
    True
    """
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            f"model is {model!r}, a {type(model).__name__}; use the name of a model or the path of a config.json, or "
            "Shape(...) of its sizes"
        )
    if model == "":  # which would be the directory that this runs in
        raise ValueError("model is '', which names none; use the name of a model or the path of a config.json")
    path, model = Path(model), str(model)
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise ValueError(f"model is {model!r}, a directory without config.json; name one that holds a model")
    if path.suffix == ".gguf":
        raise ValueError(
            f"model is {model!r}, a GGUF file, which plan does not read; give the model's name, or its layers, query "
            "heads, KV heads and head dimension"
        )
    if path.is_file():
        return shape_from_config(read_config(path))
    known = IDS.get(model.lower())
    if known is not None:
        return KNOWN[known]
    if path.suffix == ".json":
        raise ValueError(f"model is {model!r}, but there is no such file; give the path of a config.json")
    bare = [name for name in IDS if "/" not in name]
    near = dict.fromkeys(IDS[name] for name in difflib.get_close_matches(model.rpartition("/")[2].lower(), bare))
    known_ones = f"one of {', '.join(near)}" if near else "one of the known models"
    remedy = f"use {known_ones}, the path of a config.json, or layers, query heads, KV heads and head dimension"
    if near and "/" not in model:  # misspelt: transformers would look for it on the network
        raise ValueError(f"model is {model!r}, which is not known; {remedy}")
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"model is {model!r}, which transformers would look up, and it is missing; {remedy}, "
            "or run pip install 'momentkv[hf]'",
            name=error.name,
        ) from error
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"model is {model!r}, and transformers cannot load its configuration; {remedy}") from error
    return shape_from_config(config.get_text_config(decoder=True).to_dict())


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or nested without end
        raise ValueError(f"{path} is not JSON ({error}); give the config.json of a model") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; give the config.json of a model")
    return config


def shape_from_config(config: Mapping[str, Any]) -> Shape:
    """Shape by the contents of a ``config.json``; of its ``text_config`` where it has one.

    Raises
    ------
    ValueError
        If an entry is missing or no number, or layers are of a kind that `momentkv.hf.MomentCache` does not support.
    TypeError
        If ``config`` is no mapping.

    Examples
    --------
    >>> shape_from_config({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64})
    Shape(layers=2, kv_heads=4, q_heads=4, head_dim=16, full_layers=2, sliding_window=0)
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            f"config is {config!r}, a {type(config).__name__}; use the contents of a config.json as a dict, or give "
            "find_shape its path"
        )
    config = config.get("text_config") or config
    if not isinstance(config, Mapping):
        raise ValueError(f"text_config is {config!r} in the configuration; it must be an object of its own entries")
    for name, what in REFUSED.items():
        if config.get(name):
            raise ValueError(
                f"{name} is {config[name]} in the configuration: {what} is not supported; try another model"
            )
    if config.get("n_recurrent_loops", 1) != 1:
        raise ValueError(
            f"n_recurrent_loops is {config['n_recurrent_loops']!r} in the configuration: layers that run several times "
            "are not supported; try another model"
        )
    layers, q_heads = entry(config, "num_hidden_layers"), entry(config, "num_attention_heads")
    types = layer_types(config, layers)
    for kind in types:
        if kind != "full_attention" and kind not in SLIDING:
            raise ValueError(
                f"layer_types has {kind!r}; use a model of full_attention, {' or '.join(SLIDING)} layers alone"
            )
    windows = {entry(config, SLIDING[kind]) for kind in types if kind in SLIDING}
    if len(windows) > 1:
        raise ValueError(f"the configuration has windows of {sorted(windows)} tokens; use a model with one length")
    return Shape(
        layers=layers,
        kv_heads=entry(config, "num_key_value_heads") if has(config, "num_key_value_heads") else q_heads,
        q_heads=q_heads,
        head_dim=entry(config, "head_dim") if has(config, "head_dim") else entry(config, "hidden_size") // q_heads,
        full_layers=types.count("full_attention"),
        sliding_window=max(windows, default=0),
    )


def entry(config: Mapping[str, Any], name: str) -> int:
    """A number that a configuration must have."""
    value = config.get(name)
    if not is_number(value):
        raise ValueError(
            f"{name} is {value!r} in the configuration; it must be a positive integer. If it is left out as a default, "
            "write it down, or give the model's Hugging Face id with transformers installed"
        )
    return value


def has(config: Mapping[str, Any], name: str) -> bool:
    """Whether a configuration says anything of what it may leave out."""
    return config.get(name) is not None


def is_number(value: Any) -> TypeGuard[int]:
    """Whether an entry is a positive integer; JSON's true is none, though Python's is."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """Type of each layer; where a configuration does not list them, by the rules that transformers goes by."""
    listed = config.get("layer_types")
    if listed is not None:
        if not (isinstance(listed, list | tuple) and all(isinstance(kind, str) for kind in listed)):
            raise ValueError(f"layer_types is {listed!r} in the configuration; it must be a list of names, one a layer")
        if len(listed) != layers:
            raise ValueError(f"layer_types has {len(listed)} entries but num_hidden_layers is {layers}; correct one")
        return list(listed)
    full, sliding, chunked = "full_attention", "sliding_attention", "chunked_attention"
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return [chunked if config.get("attention_chunk_size") else full] * layers
    if config.get("use_sliding_window"):
        first = config.get("max_window_layers", 28)
        if first != 0 and not is_number(first):
            raise ValueError(f"max_window_layers is {first!r} in the configuration; it must be a whole number")
        return [sliding if index >= first else full for index in range(layers)]
    every = config.get("sliding_window_pattern", 6 if str(config.get("model_type")).startswith("gemma3") else None)
    if every is not None and not is_number(every):
        raise ValueError(f"sliding_window_pattern is {every!r} in the configuration; it must be a positive integer")
    return [full if every and (index + 1) % every == 0 else sliding for index in range(layers)]

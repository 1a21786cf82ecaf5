"""How a cache knows a model: by its configuration, its dtype, and a few of its weights."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationMixin, PreTrainedTokenizerBase

from momentkv.hf.checks import NAME

__all__ = ["DIMENSIONS", "agree", "config_of", "dtype_name", "dtype_of", "fingerprint", "model_record", "takes"]

# Entries of a configuration that decide whether a cache fits; one that a model lacks is None.
DIMENSIONS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rope_parameters")
SAMPLED, ELEMENTS = 8, 64
# What is before and within names of parameters where `torch.compile` or peft wraps a model, and a mark of ours for
# those that an adapter adds.
WRAPPERS, BASE, ADAPTER = ("_orig_mod.", "base_model.model."), ".base_layer.", "adapter "


def config_of(model: Any) -> Any:
    """The configuration of a model, or one that was given in its place.

    Raises
    ------
    TypeError
        If what was given is neither, with what to give instead.

    Examples
    --------
    >>> config_of("gpt2")
    Traceback (most recent call last):
        ...
    TypeError: model is 'gpt2', a name or path; load it first: AutoModelForCausalLM.from_pretrained('gpt2', ...
    """
    config = getattr(model, "config", model)
    if hasattr(config, "get_text_config") and not isinstance(model, type):
        return config
    raise TypeError(f"model is {mistaken(model)}")


def takes(model: Any, cache: Any) -> dict[str, Any]:
    """The argument by which a model takes a cache, in a pass and in ``generate``: 5.24 of transformers renamed it.

    A wrapper that hands on whatever it is given is asked by the name that its version of transformers knows.
    """
    names = inspect.signature(getattr(model, "forward", model)).parameters
    return {"cache" if "cache" in names or ("past_key_values" not in names and renamed()) else "past_key_values": cache}


@functools.cache
def renamed() -> bool:
    """Whether this version of transformers has a name of its own for caches."""
    return "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters


def mistaken(model: Any) -> str:
    """The message for what was given in place of a model, with what to give."""
    remedy = f'pass the model that generates, loaded with attn_implementation="{NAME}", or its config'
    if isinstance(model, str | os.PathLike):
        name = os.fspath(model)
        load = f'AutoModelForCausalLM.from_pretrained({name!r}, attn_implementation="{NAME}")'
        return f"{name!r}, a name or path; load it first: {load}"
    if model is None:
        return f"None; {remedy}"
    if isinstance(model, type):
        return f"the class {model.__name__} and not an object of it; {remedy}"
    kind = type(model).__name__
    for name in ("module", "model"):  # of DataParallel, of a pipeline
        if isinstance(getattr(model, name, None), torch.nn.Module):
            return f"a {kind}, which holds a model; pass that itself, its attribute {name!r}"
    if isinstance(model, PreTrainedTokenizerBase) or hasattr(model, "tokenizer"):  # as a processor has
        return f"a {kind}, which tokenizes; {remedy}"
    if isinstance(model, torch.nn.Module):
        return f"a {kind} without a config of transformers, a part of a model; {remedy}"
    return f"a {kind}; {remedy}"


def dtype_of(model: Any) -> str | None:
    """Name of the dtype of a model's weights; None for a configuration, which may name another."""
    dtype = getattr(model, "dtype", None) if isinstance(model, torch.nn.Module) else None
    return None if dtype is None else dtype_name(dtype)


def dtype_name(x: Any) -> str:
    """Name of a dtype, or of that of a tensor."""
    return str(getattr(x, "dtype", x)).removeprefix("torch.")


def model_record(config: Any, windows: list[int]) -> dict[str, Any]:
    """What of a model decides whether a cache is one of its caches, as JSON gives it back.

    ``windows`` are those of its layers, 0 for one that attends to everything.
    """
    record = {"model_type": config.model_type, "layers": windows}
    record |= {name: getattr(config, name, None) for name in DIMENSIONS}
    plain: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return plain


def fingerprint(model: Any) -> dict[str, str]:
    """Digests of a few elements of a few parameters, by name; of those that are plain and at hand.

    Two models of one configuration, say a base and an instruct model, have caches of the same shapes. Names are those
    of the model that adapters and compilers wrap, and of adapters apart.
    """
    parameters = dict(model.named_parameters()) if hasattr(model, "named_parameters") else {}
    adapted = tuple({name.split(BASE)[0] + "." for name in parameters if BASE in name})
    base, added = dict[str, Any](), dict[str, Any]()
    for name, x in parameters.items():
        own = BASE not in name and name.startswith(adapted)
        (added if own else base)[ADAPTER * own + plain_name(name)] = x
    digests = {}
    for name, x in [*sampled(base), *sampled(added)]:
        x = x.data
        if type(x) is torch.Tensor and x.device.type != "meta" and x.is_floating_point():
            sample = x.flatten()[:ELEMENTS].to("cpu", torch.float32)
            digests[name] = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]
    return digests


def sampled(named: dict[str, Any]) -> list[tuple[str, Any]]:
    """A few of the parameters, from the first to the last in order of their names."""
    names = sorted(named)
    chosen = {names[index * (len(names) - 1) // (SAMPLED - 1)] for index in range(SAMPLED)} if names else set()
    return [(name, named[name]) for name in sorted(chosen)]


def plain_name(name: str) -> str:
    """Name of a parameter without what wraps the model or the layer that has it.

    Examples
    --------
    >>> plain_name("base_model.model.lm_head.base_layer.weight"), plain_name("_orig_mod.lm_head.weight")
    ('lm_head.weight', 'lm_head.weight')
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.replace(BASE, ".")


def agree(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    """Whether two fingerprints may be of one model: equal where both have something, with the same adapters."""
    first, second = ({plain_name(name): digest for name, digest in each.items()} for each in (one, other))
    common = first.keys() & second.keys()
    if any(first[name] != second[name] for name in common) or (first and second and not common):
        return False
    # Earlier fingerprints told adapters from what they adapt by nothing but the name of the whole.
    former = any(name.startswith(WRAPPERS[1]) for name in (*one, *other))
    of_adapters = ({name for name in each if name.startswith(ADAPTER)} for each in (first, second))
    return former or next(of_adapters) == next(of_adapters)

"""What `momentkv.hf` refuses: models and arguments that it would otherwise get silently wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from momentkv.cache.budget_rules import TotalBytes
from momentkv.hf.lengths import LONGER

__all__ = [
    "NAME",
    "OWN_MASK",
    "SHARING",
    "SHARING_BY_HEADS",
    "check_implementation",
    "check_new_keys",
    "check_new_tokens",
    "check_pass",
    "check_rows",
    "check_sharing",
    "check_sliding",
    "check_some_tokens",
    "check_static_pass",
    "in_any_layer",
    "is_unpadded",
    "plain_mask",
    "records",
    "refuse_architecture",
    "refuse_arguments",
    "refuse_changed_keys",
    "refuse_layer_type",
    "refuse_second_attention",
    "rows_of",
    "supports_sdpa",
    "takes_whole_masks",
    "unknown_arguments",
    "uses_interface",
]

NAME = "momentkv"
OWN_MASK = "a step of a static cache got a mask of its own; make the cache with static=False for it"
SHARING_BY_HEADS = ("heads", "layer-heads", "ada-kv", "kvzip")
SHARING = ("uniform", "layers", *SHARING_BY_HEADS, "pyramid")

# Arguments that reach attention and do not change it: models pass on what they were called with.
HARMLESS = frozenset(
    {
        "assistant_tokenizer",
        "cache_position",
        "image_sizes",
        "is_causal",  # SDPA honours it, and a MomentCache refuses it by its value
        "labels",
        "logits_to_keep",
        "num_items_in_batch",
        "output_attentions",  # as above
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "sliding_window",  # the mask has it
        "tokenizer",  # of stop_strings
        "use_cache",
    }
)
# Settings of models that compute with their masks, and so take them whole; those of transformers today ask for it.
WHOLE_MASKS = ("index_topk", "keep_window_size")
# What the others mean, of which some architecture passes each.
MEANINGS = {
    "softcap": "soft-capped logits (Gemma 2)",
    "s_aux": "attention sinks as parameters (gpt-oss)",
    "sinks": "attention sinks as parameters",
    "position_bias": "a position bias added to the logits",
    "indices": "attention to chosen tokens only (DeepSeek sparse attention)",
    "block_indices": "attention to chosen blocks only",
}
# Settings of decoders that attend to something else than their own tokens, too.
CROSS = ("cross_attention_layers", "add_cross_attention")


def check_implementation(config: Any) -> None:
    """Raise unless the model computes attention through momentkv."""
    if config._attn_implementation != NAME:
        raise ValueError(
            f"the model's attn_implementation is {config._attn_implementation!r}, which would ignore the moments; "
            f'call model.set_attn_implementation("{NAME}"), or load it with attn_implementation="{NAME}"'
        )


def check_new_tokens(position_ids: Any, new: int, seen: int) -> None:
    """Raise if the tokens of a pass, ``new`` to ``seen``, have positions of tokens before: ``generate`` may do that."""
    if not 0 < new < seen or position_ids is None or position_ids.dim() != 2:
        return
    if new == seen - 1 and position_ids.device.type != "cpu":
        return  # a single token must not wait for the device
    if bool(((position_ids[:, -1] < new) | (position_ids[:, 0] == 0)).any()):
        raise ValueError(
            f"{seen - new} tokens arrive at positions of the {new} tokens that the cache has read: generate() reads "
            "some or all of its input once more when the cache has read as many, and all of it at every step with "
            f"use_cache=False; {LONGER}"
        )


def check_some_tokens(tokens: Any, cache: Any) -> None:
    """Raise if a pass has no tokens, as those of ``generate`` may have where its input is short."""
    if isinstance(tokens, int) and tokens == 0:
        seen = int(cache.get_seq_length())
        raise ValueError(f"no tokens arrive: the input is shorter than the {seen} that the cache has read; {LONGER}")


def records(layer: Any) -> bool:
    """Whether a stock layer with a sliding window keeps what it would drop; before transformers 5.16 none can."""
    return bool(getattr(layer, "record_past", False))


def check_sliding(layers: Any, tokens: int) -> None:
    """Raise unless the last tokens can be taken back from stock sliding-window layers: what they drop is gone."""
    for layer in layers:
        if not tokens or not layer.is_initialized or layer.cumulative_length < layer.sliding_window:
            continue
        stored = layer.keys.shape[2]
        needed = tokens + min(layer.sliding_window - 1, layer.cumulative_length - tokens)
        if not records(layer) or stored < needed:
            raise RuntimeError(
                f"crop(-{tokens}): a layer with a sliding window of {layer.sliding_window} has dropped tokens that it "
                "would need again; call activate_past_recording() before reading tokens that may have to go"
            )


def check_new_keys(cache: Any, keys: torch.Tensor) -> None:
    """Raise where the first layer's keys of a pass cannot go on from those of a cache, or hold no numbers."""
    if keys.is_meta:
        raise ValueError(
            "the model is on the meta device, where tensors have a shape and no numbers; load its weights before it "
            "reads with a MomentCache: from_pretrained does, after to_empty() load_state_dict()"
        )
    check_rows(cache, keys.shape[0])


def check_rows(cache: Any, new: int) -> None:
    """Raise where so many rows are not those that a cache holds."""
    rows = next((rows_of(layer) for layer in cache.layers if layer.is_initialized), None)
    if rows is not None and new != rows:
        whole = new // rows if new % rows == 0 else 0
        if whole and isinstance(cache.rule, TotalBytes):
            remedy = (
                f"its budget of {cache.rule.text} was divided among those; read with all rows at once, or give the "
                "budget in tokens"
            )
        elif whole:
            remedy = (
                f"call cache.batch_repeat_interleave({whole}) first, which repeats every row as beams and "
                f"num_return_sequences={whole} do"
            )
        else:
            remedy = "call cache.batch_select_indices with the rows to keep, or read these with a cache of their own"
        raise ValueError(f"{new} rows arrive at a cache that holds {rows}; {remedy}")


def rows_of(layer: Any) -> int:
    """Rows of a batch that a layer which holds something has, one of momentkv or a stock one."""
    x = layer.core.state.recent_keys if hasattr(layer, "core") else layer.keys
    return int(x.shape[0])


def uses_interface(config: Any) -> bool:
    """Whether attention of a configuration's models goes through transformers' interface, as far as can be told."""
    name = type(config).__module__.replace("configuration_", "modeling_")
    module = sys.modules.get(name)
    if module is None or "modeling_" not in name:
        return True
    tables = any(own.endswith("ATTENTION_CLASSES") for own in vars(module))  # of implementations of its own
    return hasattr(module, "ALL_ATTENTION_FUNCTIONS") and not tables


def in_any_layer(config: Any, name: str) -> Any:
    """A setting's value in the first layer where it has one that is neither zero nor None."""
    # Where layers differ, asking for all of them at once raises.
    layers = getattr(config, "per_layer_config", None) if hasattr(config, "num_hidden_layers") else None
    for layer in layers or [config]:
        if value := getattr(layer, name, None):
            return value
    return None


def takes_whole_masks(config: Any) -> bool:
    """Whether a configuration's models need causal masks of four dimensions."""
    return any(getattr(config, name, None) for name in WHOLE_MASKS)


def supports_sdpa(config: Any) -> bool:
    """Whether a configuration's models may be loaded with SDPA, as far as can be told."""
    module = sys.modules.get(type(config).__module__.replace("configuration_", "modeling_"))
    flags = [getattr(kind, "_supports_sdpa", None) for kind in vars(module or object).values()]
    known = [flag for flag in flags if flag is not None]
    return not known or any(known)


def refuse_architecture(config: Any, whole: Any = None) -> None:
    """Raise for an architecture whose attention momentkv would get wrong; ``config`` is the text's of the ``whole``."""
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    reasons = {
        "it is an encoder-decoder": any(getattr(x, "is_encoder_decoder", False) for x in (config, whole)),
        "its layers are of several models with caches of their own": not hasattr(config, "num_hidden_layers"),
        "it soft-caps its logits (attn_logit_softcapping)": in_any_layer(config, "attn_logit_softcapping"),
        "it uses multi-head latent attention (kv_lora_rank)": in_any_layer(config, "kv_lora_rank"),
        "it has cross-attention layers": any(in_any_layer(config, name) for name in CROSS),
        "it has attention sinks as parameters": config.model_type == "gpt_oss",
        "its layers share caches (num_kv_shared_layers)": getattr(config, "num_kv_shared_layers", None),
        "it runs layers several times (n_recurrent_loops)": getattr(config, "n_recurrent_loops", 1) != 1,
        "it is not causal (is_causal)": not getattr(config, "is_causal", True),
        "it is not causal (use_bidirectional_attention)": bidirectional is True or bidirectional == "all",
        "its attention does not go through transformers' attention interface": not uses_interface(config),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"model type {config.model_type!r} is not supported: {reason}; use a DynamicCache for this model"
            )


def refuse_layer_type(config: Any, index: int, kind: str, supported: Sequence[str]) -> NoReturn:
    """Raise for a layer that needs a cache of another kind."""
    raise ValueError(
        f"layer {index} of this {config.model_type} model is of type {kind!r}; MomentCache supports "
        f"{', '.join(supported)}; use a DynamicCache for this model"
    )


def refuse_changed_keys(module: Any, changed: str) -> NoReturn:
    """Raise because a model attends to something else than its cache layer handed out."""
    raise ValueError(
        f"{type(module).__name__} changes the {changed} between its cache and its attention, where MomentCache attends "
        "to what it stores; use a DynamicCache for this model"
    )


def refuse_second_attention(module: Any) -> NoReturn:
    """Raise because a model attends more than once to what one update returned."""
    raise ValueError(
        f"{type(module).__name__} attends more than once to the keys of one cache update, and MomentCache evicts after "
        "each; use a DynamicCache for this model"
    )


def unknown_arguments(kwargs: dict[str, Any]) -> list[str]:
    """Arguments of attention that may change what it computes, by name."""
    return [name for name, x in kwargs.items() if x is not None and x is not False and name not in HARMLESS]


def check_pass(
    layer: Any, module: Any, attention_mask: torch.Tensor | None, q_len: int, dropout: float, kwargs: dict[str, Any]
) -> torch.Tensor | None:
    """Raise for a pass that a compressed layer would get wrong; returns the mask as (batch, tokens seen), or None.

    Parameters
    ----------
    layer : MomentLayer
        That has the new tokens already. The first of a cache has ``owner``, ``padding`` and ``moved``, which are of all
        of them.
    module : torch.nn.Module
        The model's attention.
    attention_mask, dropout, kwargs
        As they came to attention.
    q_len : int
        New tokens.
    """
    refuse_arguments(module, dropout, kwargs)
    core = layer.core
    mask = plain_mask(attention_mask, core.new.keys.shape[0], core.seen, q_len)
    if layer.owner is not None:
        seen = core.seen - q_len
        layer.owner.check(module, filled=seen > 0)
        layer.moved.check(filled=seen > 0)
        layer.padding.check(mask, seen)
    return mask


def plain_mask(attention_mask: torch.Tensor | None, rows: int, tokens: int, q_len: int) -> torch.Tensor | None:
    """A mask of attention as (batch, tokens seen), or None where nothing is padding; an error for any other mask."""
    mask = None if is_unpadded(attention_mask) else attention_mask
    if mask is not None and mask.dim() != 2:
        if mask.dtype != torch.bool or tuple(mask.shape[1:3]) != (1, 1):
            raise ValueError(
                f"attention_mask has {mask.dim()} dimensions; MomentCache supports causal attention with padding, "
                "given as a mask of shape (batch, tokens seen); use a DynamicCache for images whose tokens see each "
                "other, packed sequences and masks of your own"
            )
        if q_len > 1:
            # As transformers broadcasts it: the first query, too, would see the last token.
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)}, one line for {q_len} queries, each of which would see "
                "tokens after its own; MomentCache supports causal attention with padding: give it as a mask of shape "
                "(batch, tokens seen)"
            )
        if mask.shape[0] not in (1, rows) or mask.shape[3] < tokens:
            raise ValueError(
                f"attention_mask has shape {tuple(mask.shape)} for {rows} rows of {tokens} tokens, the new ones "
                "included; give each row one over all of them, or one row for all"
            )
        mask = mask[:, 0, 0, :tokens].expand(rows, tokens)  # of one query
    return mask


def is_unpadded(mask: torch.Tensor | None) -> bool:
    """Whether a mask is what `momentkv_mask` gives for several queries without padding: one True, expanded."""
    return mask is not None and mask.dim() == 2 and mask.stride() == (0, 0)


def check_static_pass(
    layer: Any, module: Any, attention_mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]
) -> None:
    """`check_pass` for a step of one token in static buffers, whose mask is of that token alone.

    What the rest of the mask says is checked where it is made (`momentkv.hf.momentkv_mask`). A pass that is compiled
    checks what does not depend on numbers.
    """
    refuse_arguments(module, dropout, kwargs)
    if layer.owner is not None and not torch.compiler.is_compiling():
        layer.owner.check(module, filled=True)
        layer.moved.check(filled=True)
        if attention_mask is None:
            layer.padding.check_positions(kwargs.get("position_ids"))


def refuse_arguments(module: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise for arguments of a forward pass that momentkv would have to ignore."""
    for name in unknown_arguments(kwargs):
        meaning = MEANINGS.get(name, "an argument that momentkv does not know")
        raise ValueError(
            f"{name} was passed to attention: {meaning} is not supported by MomentCache; use a DynamicCache for it"
        )
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: the weights of evicted tokens are not known; leave it off")
    causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(
            f"is_causal=False ({type(module).__name__}): MomentCache supports causal attention only, no prefix that "
            "sees itself as a whole; use a DynamicCache for it"
        )
    if dropout:
        raise ValueError(f"dropout is {dropout}: MomentCache is for inference; call model.eval()")


def check_sharing(sharing: str, budget: Any) -> None:
    """Raise unless the way of sharing is known and fits the budget."""
    if sharing not in SHARING:
        raise ValueError(f"sharing is {sharing!r}; use one of {', '.join(map(repr, SHARING))}")
    if sharing != "uniform" and not isinstance(budget, int):
        raise ValueError(
            f"sharing={sharing!r} decides the budget of each layer, but budget lists one for each; pass one number, "
            "their average"
        )

"""What `momentkv.hf` refuses: models and arguments that it would otherwise get silently wrong."""

from __future__ import annotations

from typing import Any

__all__ = [
    "NAME",
    "SHARING",
    "SHARING_BY_HEADS",
    "check_implementation",
    "check_lengths",
    "check_new_tokens",
    "check_sharing",
    "check_sliding",
    "refuse_architecture",
    "refuse_arguments",
]

NAME = "momentkv"
SHARING_BY_HEADS = ("heads", "layer-heads", "ada-kv")
SHARING = ("uniform", "layers", *SHARING_BY_HEADS, "pyramid")

# Arguments that change what attention computes, each of which some architecture passes.
UNSUPPORTED_ARGUMENTS = {
    "softcap": "soft-capped logits (Gemma 2)",
    "s_aux": "attention sinks as parameters (gpt-oss)",
    "position_bias": "a position bias added to the logits",
}


def check_implementation(config: Any) -> None:
    """Raise unless the model computes attention through momentkv."""
    if config._attn_implementation != NAME:
        raise ValueError(
            f"the model's attn_implementation is {config._attn_implementation!r}, which would ignore the moments; "
            f'call model.set_attn_implementation("{NAME}"), or load it with attn_implementation="{NAME}"'
        )


def check_lengths(lengths: list[int]) -> None:
    """Raise unless all layers have seen as many tokens: positions and masks are those of the first for all of them."""
    if len(set(lengths)) > 1:
        raise RuntimeError(
            f"the last forward pass failed half-way: some layers have seen {max(lengths)} tokens, others "
            f"{min(lengths)}; call cache.reset() and read the tokens again"
        )


def check_new_tokens(position_ids: Any, new: int, seen: int) -> None:
    """Raise if the tokens of a pass, ``new`` to ``seen``, have positions of tokens before: ``generate`` may do that."""
    if not 0 < new < seen - 1 or position_ids is None or position_ids.dim() != 2:
        return  # nothing before, or a single token: that must not wait for the device
    if bool((position_ids[:, -1] < new).any()):
        raise ValueError(
            f"{seen - new} tokens arrive at positions of the {new} tokens that the cache has read: generate() reads "
            "its whole input once more when the cache has read all of it; give it at least one new token"
        )


def check_sliding(layers: Any, tokens: int) -> None:
    """Raise unless the last tokens can be taken back from stock sliding-window layers: what they drop is gone."""
    for layer in layers:
        if not tokens or not layer.is_initialized or layer.cumulative_length < layer.sliding_window:
            continue
        stored = layer.keys.shape[2]
        needed = tokens + min(layer.sliding_window - 1, layer.cumulative_length - tokens)
        if not layer.record_past or stored < needed:
            raise RuntimeError(
                f"crop(-{tokens}): a layer with a sliding window of {layer.sliding_window} has dropped tokens that it "
                "would need again; call activate_past_recording() before reading tokens that may have to go"
            )


def refuse_architecture(config: Any) -> None:
    """Raise for an architecture whose attention momentkv would get wrong."""
    reasons = {
        "it is an encoder-decoder": getattr(config, "is_encoder_decoder", False),
        "it soft-caps its logits (attn_logit_softcapping)": getattr(config, "attn_logit_softcapping", None),
        "it uses multi-head latent attention (kv_lora_rank)": getattr(config, "kv_lora_rank", None),
        "it has attention sinks as parameters": config.model_type == "gpt_oss",
        "its layers share caches (num_kv_shared_layers)": getattr(config, "num_kv_shared_layers", None),
        "it is not causal (is_causal)": not getattr(config, "is_causal", True),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"model type {config.model_type!r} is not supported: {reason}; use a DynamicCache for this model"
            )


def refuse_arguments(attention_mask: Any, dropout: float, kwargs: dict[str, Any]) -> None:
    """Raise for arguments of a forward pass that momentkv would have to ignore."""
    for name, meaning in UNSUPPORTED_ARGUMENTS.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"{name} was passed to attention: {meaning} is not supported by MomentCache")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions=True: the weights of evicted tokens are not known; leave it off")
    if dropout:
        raise ValueError(f"dropout is {dropout}: MomentCache is for inference; call model.eval()")
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {attention_mask.dim()} dimensions; MomentCache supports causal attention with "
            "padding, given as a mask of shape (batch, tokens seen)"
        )


def check_sharing(sharing: str, budget: Any) -> None:
    """Raise unless the way of sharing is known and fits the budget."""
    if sharing not in SHARING:
        raise ValueError(f"sharing is {sharing!r}; use one of {', '.join(map(repr, SHARING))}")
    if sharing != "uniform" and not isinstance(budget, int):
        raise ValueError(
            f"sharing={sharing!r} decides the budget of each layer, but budget lists one for each; pass one number, "
            "their average"
        )

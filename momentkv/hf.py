"""Hugging Face transformers: a cache for ``generate``, and the attention and mask functions it works through.

Importing this module registers the attention implementation ``"momentkv"``. Nothing of transformers is patched:

>>> import momentkv.hf                                                               # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="momentkv")  # doctest: +SKIP
>>> cache = momentkv.hf.MomentCache(model, budget=512)                               # doctest: +SKIP
>>> model.generate(**inputs, past_key_values=cache)                                  # doctest: +SKIP

The cache does not reach an attention function, so the keys that `MomentCache.update` returns carry a link to their
layer, and `momentkv_attention` follows it. Keys without the link (another cache, sliding-window layers) go to SDPA.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

try:
    import torch
    from transformers import AttentionInterface, AttentionMaskInterface
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"momentkv.hf needs torch and transformers 5, and {error.name} is missing; run pip install 'momentkv[hf]'",
        name=error.name,
    ) from error
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

from momentkv._hf_attention import LINK, momentkv_attention, momentkv_mask
from momentkv._hf_checks import (
    NAME,
    SHARING_BY_HEADS,
    check_implementation,
    check_lengths,
    check_new_tokens,
    check_sharing,
    refuse_architecture,
    refuse_arguments,
)
from momentkv.backends import ArrayBackend
from momentkv.cache import LayerCache
from momentkv.corrections import Correction
from momentkv.policies import Policy, get_policy
from momentkv.ragged import RaggedCache
from momentkv.sharing import SharedBudget, by_error, by_importance, pyramid_budgets

__all__ = ["LINK", "NAME", "MomentCache", "MomentLayer", "momentkv_attention", "momentkv_mask"]

SLIDING_TYPES = ("sliding_attention", "chunked_attention")


class MomentLayer(CacheLayerMixin):
    """One full-attention layer of a `MomentCache`: a `LayerCache` behind the interface of transformers.

    Parameters
    ----------
    core : LayerCache or RaggedCache
        Its keys and values have shape ``(batch, kv_head, n, d)``; where heads retain different numbers of tokens, it is
        a `RaggedCache`, and they are lists, an entry a head.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, core: LayerCache | RaggedCache) -> None:
        # CacheLayerMixin.__init__ would set `keys` and `values`, which are the core's here.
        self.core = core
        self.sharing: SharedBudget | None = None
        self.before: dict[str, Any] | None = None

    @property
    def keys(self) -> Any:
        """Retained keys, shape (batch, kv_head, n, d), or a list of one such array for each head."""
        return self.core.keys

    @property
    def values(self) -> Any:
        """Retained values, shape (batch, kv_head, n, dv), or a list of one such array for each head."""
        return self.core.values

    @property
    def is_initialized(self) -> bool:
        """Whether any token has arrived."""
        return self.core.seen > 0

    def __repr__(self) -> str:
        return f"MomentLayer(budget={self.core.budget}, stored={self.core.stored}, seen={self.core.seen})"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate: the first `update` does it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens; the returned keys carry the link that `momentkv_attention` follows."""
        if self.before is not None:
            raise RuntimeError(
                "the last forward pass updated this cache layer but its attention never reached momentkv: either the "
                "pass failed (call cache.reset()), or this architecture changes the keys after updating its cache "
                "(multi-head latent attention does) and is not supported; use a DynamicCache for it"
            )
        before = self.core.snapshot()
        self.core.append(key_states, value_states)
        self.before = before
        keys, values = key_states, value_states  # attention takes what it needs from the core, by the link
        if isinstance(self.core, LayerCache):
            keys, values = self.core.keys, self.core.values
        linked = keys.view_as(keys)  # an alias, so that the stored keys hold no link to themselves
        setattr(linked, LINK, self)
        return linked, values

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None,
        dropout: float,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend and evict; called by `momentkv_attention`. On an error the layer is as before `update`."""
        before, self.before = self.before, None
        try:
            refuse_arguments(attention_mask, dropout, kwargs)
            new, seen = self.core.seen - query.shape[2], self.core.seen
            if attention_mask is None:  # padding has positions of its own, and a mask whose length is checked
                check_new_tokens(kwargs.get("position_ids"), new, seen)
                valid = None
            else:
                valid = attention_mask[:, None, new:seen]
            self.core.scale = scaling
            out = self.core.attend(query, valid=valid)
            self.evict()
        except BaseException:
            if before is not None:
                self.core.restore(before)
            raise
        return out.transpose(1, 2).contiguous(), None

    @torch.no_grad()
    def evict(self) -> None:
        """Evict down to the budget, or together with the other layers and heads where the budget is shared."""
        if self.sharing is None:
            self.core.evict()
        else:
            self.sharing.evict(self.core)

    def get_seq_length(self) -> int:
        """Tokens seen, padding and evicted ones included: positions and masks count from here."""
        return self.core.seen

    def get_max_length(self) -> int:
        """No limit (-1): the sequence may grow forever."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Mask sizes as if nothing were evicted, so that one mask serves every layer."""
        return self.core.seen + query_length, 0

    def reset(self) -> None:
        """Forget all tokens and moments."""
        self.core.reset()
        self.before = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows for beam search; moments and scores follow."""
        self.core.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.core.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self.core.map(lambda x: x[indices])

    def activate_past_recording(self) -> None:
        """Refused: assisted decoding rolls tokens back, and evicted tokens cannot come back."""
        raise RuntimeError(
            "MomentCache does not support assisted or prompt-lookup decoding yet: they roll tokens back, and those may "
            "have been folded into moments; generate without assistant_model and prompt_lookup_num_tokens, or use a "
            "DynamicCache"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Refused unless nothing is to be removed."""
        if tokens_to_remove != 0:
            raise RuntimeError(
                f"crop({tokens_to_remove}): MomentCache cannot roll tokens back yet, since they may have been folded "
                "into moments; build a new cache from the tokens that should stay"
            )

    def offload(self) -> None:
        """Refused: layers stay on the device of their model."""
        raise RuntimeError("MomentCache does not offload its layers yet; its size is bounded by the budget instead")

    prefetch = offload


class MomentCache(Cache):
    """KV cache within a budget, with the moments of what was evicted, for ``model.generate(past_key_values=...)``.

    Parameters
    ----------
    model : PreTrainedModel or PretrainedConfig
        A decoder-only model with ``attn_implementation="momentkv"``.
    budget : int or sequence of int
        Tokens retained per KV head, sinks and window included; one number, or one for each layer.
    sharing : {"uniform", "layers", "heads", "layer-heads", "ada-kv", "pyramid"}, optional
        With one number: the same for all, or the average, shared after every prefill by the error that each budget
        would cause (`momentkv.budgets`) among layers, among all heads of all layers, or among the heads of each layer.
        For comparison, ``"ada-kv"`` and ``"pyramid"`` are the rules of those papers (`momentkv.sharing`). By default
        ``"heads"`` (``"layers"`` for a policy that looks across heads, `Policy.couples_heads`), and ``"uniform"`` where
        budget lists one for each layer.
    policy : str or Policy
        Who decides what to evict; see `momentkv.policies.POLICIES`.
    order : {1, 0, None}
        Order of the correction; None for plain eviction without moments.
    correction : str or Correction
        ``"summaries"``, several and anchored at recent queries, or ``"moments"``, the paper's.
    sinks, window, block : int
        First tokens and most recent tokens that are always retained, and tokens evicted at a time while decoding.
    backend : str or ArrayBackend, optional
        ``"torch"`` by default.
    certify, tolerance
        As `LayerCache` takes them: evidence for `momentkv.trust.trust`, and refusal to evict past a certified error.

    Raises
    ------
    ValueError
        If the model uses another attention implementation or is of an unsupported architecture, or a budget is
        smaller than ``sinks + window + 1``.

    Notes
    -----
    The defaults serve fidelity and later questions alike. The paper's method is
    ``policy="momentkv", correction="moments", sharing="uniform"``.

    Full-attention layers are compressed; sliding-window and chunked layers are bounded already and stay exact.
    Greedy and sampled generation, left-padded batches, chunked prefill, decode-time eviction and multi-turn reuse are
    supported. Assisted decoding, ``crop``, offloading, ``torch.compile`` and custom 4-D masks raise.
    """

    def __init__(
        self,
        model: Any,
        budget: int | Sequence[int],
        *,
        policy: str | Policy = "balanced",
        order: int | None = 1,
        correction: str | Correction = "summaries",
        sharing: str | None = None,
        sinks: int = 1,
        window: int = 32,
        block: int = 32,
        backend: str | ArrayBackend | None = None,
        certify: int | None = None,
        tolerance: float | None = None,
    ) -> None:
        config = getattr(model, "config", model).get_text_config(decoder=True)
        check_implementation(config)
        refuse_architecture(config)
        kinds = layer_kinds(config)
        budgets = [budget] * len(kinds) if isinstance(budget, int) else list(budget)
        if len(budgets) != len(kinds):
            raise ValueError(
                f"budget has {len(budgets)} entries but the model has {len(kinds)} layers; give one for each"
            )
        if sharing is None:
            shared = "layers" if get_policy(policy).couples_heads else "heads"
            sharing = shared if isinstance(budget, int) else "uniform"
        check_sharing(sharing, budget)
        if sharing == "pyramid":
            budgets = pyramid_budgets(budgets[0], len(kinds), sinks=sinks, window=window)
        keeps_queries = sharing not in ("uniform", "pyramid")
        layers: list[Any] = []
        for index, (kind, kwargs) in enumerate(kinds):
            if kind in SLIDING_TYPES:
                layers.append(DynamicSlidingWindowLayer(**kwargs))
            elif kind == "full_attention":
                settings: dict[str, Any] = {
                    "policy": policy,
                    "order": order,
                    "correction": correction,
                    "sinks": sinks,
                    "window": window,
                    "block": block,
                    "backend": backend,
                    "keep_queries": keeps_queries,
                    "certify": certify,
                    "tolerance": tolerance,
                }
                core: LayerCache | RaggedCache
                if sharing in SHARING_BY_HEADS:
                    core = RaggedCache([budgets[index]] * kv_heads(config), **settings)
                else:
                    core = LayerCache(budgets[index], **settings)
                layers.append(MomentLayer(core))
            else:
                raise ValueError(
                    f"layer {index} of this {config.model_type} model is of type {kind!r}; MomentCache supports "
                    f"full_attention, {', '.join(SLIDING_TYPES)}"
                )
        super().__init__(layers=layers)
        self.config = config
        self.sharing = sharing
        compressed = [layer for layer in layers if isinstance(layer, MomentLayer)]
        groups = [compressed] if sharing in ("layers", "heads") else [[layer] for layer in compressed]
        self.shared_budgets: list[SharedBudget] = []
        for group in groups if keeps_queries and compressed else []:
            rule = by_importance if sharing == "ada-kv" else by_error
            self.shared_budgets.append(SharedBudget([layer.core for layer in group], rule))
            for layer in group:
                layer.sharing = self.shared_budgets[-1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens of one layer (called by the model)."""
        check_implementation(self.config)
        if torch.compiler.is_compiling():
            raise RuntimeError("MomentCache does not support torch.compile yet; run the model uncompiled")
        if layer_idx == 0:
            check_lengths([layer.get_seq_length() for layer in self.layers])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Refused; see `MomentLayer.activate_past_recording`."""
        MomentLayer.activate_past_recording(self)  # before any sliding layer starts recording

    def crop(self, tokens_to_remove: int) -> None:
        """Refused unless nothing is to be removed; see `MomentLayer.crop`."""
        MomentLayer.crop(self, tokens_to_remove)  # before any sliding layer is cropped

    def reset(self) -> None:
        """Forget all tokens and moments, and what each layer's share of the budget was."""
        super().reset()
        for shared in self.shared_budgets:
            shared.reset()

    @property
    def moment_layers(self) -> dict[int, LayerCache | RaggedCache]:
        """The compressed layers' caches, by layer index."""
        return {index: layer.core for index, layer in enumerate(self.layers) if isinstance(layer, MomentLayer)}

    @property
    def nbytes(self) -> int:
        """Bytes stored now: keys, values, positions, scores and moments of all layers."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, MomentLayer):
                total += layer.core.nbytes
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total


def kv_heads(config: Any) -> int:
    """KV heads of a layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def layer_kinds(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """Type of each layer of a model, and the arguments of its stock cache layer."""
    types, arguments = get_layer_types_and_kwargs(config)
    # Before transformers 5.16, one dict for all layers.
    each = arguments if isinstance(arguments, list) else [arguments] * len(types)
    return list(zip(types, each, strict=True))


AttentionInterface.register(NAME, momentkv_attention)
AttentionMaskInterface.register(NAME, momentkv_mask)

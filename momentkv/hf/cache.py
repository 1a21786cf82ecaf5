"""The cache that ``generate`` takes: a layer of its own for each layer of the model, and what they share."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer, get_layer_types_and_kwargs

from momentkv.backends import ArrayBackend
from momentkv.cache.layer import RECENT_QUERIES, LayerCache
from momentkv.cache.ragged import RaggedCache
from momentkv.cache.sharing import SharedBudget, by_error, by_importance, pyramid_budgets
from momentkv.hf.budget import BudgetRule, Share, TotalBytes, parse_budget
from momentkv.hf.checks import (
    SHARING_BY_HEADS,
    check_implementation,
    check_lengths,
    check_sharing,
    check_sliding,
    refuse_architecture,
)
from momentkv.hf.files import fingerprint, load, save
from momentkv.hf.layer import MomentLayer, tokens_to_take_back
from momentkv.hf.rollback import check_crop, crop, settle
from momentkv.hf.static import StaticLayers
from momentkv.hf.summary import CacheSummary, summarise
from momentkv.policies import Policy, get_policy
from momentkv.statistics.corrections import Correction

__all__ = ["MomentCache", "kv_heads", "layer_kinds"]

SLIDING_TYPES = ("sliding_attention", "chunked_attention")


class MomentCache(Cache):
    """KV cache within a budget, with the moments of what was evicted, for ``model.generate(past_key_values=...)``.

    Parameters
    ----------
    model : PreTrainedModel or PretrainedConfig
        A decoder-only model with ``attn_implementation="momentkv"``.
    budget : int, float, str or sequence of int
        Tokens retained per KV head, sinks and window included: one number, or one for each layer. A float in (0, 1] is
        that share of the tokens read, counted at every prefill (each chunk of one). A string like ``"64MiB"`` is the
        size of the whole cache, everything counted.
    sharing : {"uniform", "layers", "heads", "layer-heads", "ada-kv", "pyramid"}, optional
        With one budget: the same for all, or the average, shared after every prefill by the error that each budget
        would cause among layers, among all heads of all layers, or among the heads of each layer.
        For comparison, ``"ada-kv"`` and ``"pyramid"`` are the rules of those papers. By default
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
    rollback : int
        Tokens that can be taken back while past states are recorded (assisted and prompt-lookup decoding): as many
        are stored beyond ``budget + block`` until `crop` says which stay.
    backend : str or ArrayBackend, optional
        ``"torch"`` by default.
    certify, tolerance
        As `LayerCache` takes them: evidence for `momentkv.trust.trust`, and refusal to evict past a certified error.
    static : bool
        Whether decode steps are done in buffers of constant size and address, in place and without waiting for the
        device: for `torch.compile` (``generate`` does it by itself on a GPU) and CUDA graphs. Equal otherwise.

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
    Supported modes of ``generate``, and what raises: docs/transformers.md.

    A total in bytes holds between passes, up to the rows of the first one; a prefill needs room for what it reads, and
    recorded passes that wait for `crop` come on top.
    """

    def __init__(
        self,
        model: Any,
        budget: int | float | str | Sequence[int] = 512,
        *,
        policy: str | Policy = "balanced",
        order: int | None = 1,
        correction: str | Correction = "summaries",
        sharing: str | None = None,
        sinks: int = 1,
        window: int = 32,
        block: int = 32,
        rollback: int = 64,
        backend: str | ArrayBackend | None = None,
        certify: int | None = None,
        tolerance: float | None = None,
        static: bool = False,
    ) -> None:
        config = getattr(model, "config", model).get_text_config(decoder=True)
        check_implementation(config)
        refuse_architecture(config)
        if rollback < 1:
            raise ValueError(f"rollback is {rollback}; use at least 1 token")
        kinds = layer_kinds(config)
        # Tensor parallelism shards KV heads; each rank's cache holds, and shares budgets among, its own.
        self.ranks = int(getattr(model, "_tp_size", None) or 1)
        self.least = sinks + window + 1
        asked = parse_budget(budget)
        if static and isinstance(asked, TotalBytes):
            raise ValueError(f"static=True with a budget of {budget!r}: buffers are sized in tokens; give it in tokens")
        self.rule = asked if isinstance(asked, BudgetRule) else None
        given = self.least if isinstance(asked, BudgetRule) else asked  # a rule tells when the first tokens arrive
        budgets = [given] * len(kinds) if isinstance(given, int) else given
        if len(budgets) != len(kinds):
            raise ValueError(
                f"budget has {len(budgets)} entries but the model has {len(kinds)} layers; give one for each"
            )
        if sharing is None:
            shared = "layers" if get_policy(policy).couples_heads else "heads"
            sharing = shared if isinstance(given, int) else "uniform"
        check_sharing(sharing, given)
        if sharing == "pyramid":
            if self.rule is not None:
                raise ValueError(f'budget is {budget!r}, but sharing="pyramid" needs one in tokens')
            budgets = pyramid_budgets(budgets[0], len(kinds), sinks=sinks, window=window)
        keeps_queries = sharing not in ("uniform", "pyramid")
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
        layers: list[Any] = []
        for index, (kind, kwargs) in enumerate(kinds):
            if kind in SLIDING_TYPES:
                if static:
                    raise ValueError(
                        f"static=True, but layer {index} of this {config.model_type} model is of type {kind!r}, whose "
                        "stock cache counts on the host; use static=False"
                    )
                layers.append(DynamicSlidingWindowLayer(**kwargs))
            elif kind == "full_attention":
                core: LayerCache | RaggedCache
                if sharing in SHARING_BY_HEADS:
                    core = RaggedCache([budgets[index]] * (kv_heads(config) // self.ranks), **settings)
                else:
                    core = LayerCache(budgets[index], **settings)
                layers.append(MomentLayer(core, rollback))
            else:
                raise ValueError(
                    f"layer {index} of this {config.model_type} model is of type {kind!r}; MomentCache supports "
                    f"full_attention, {', '.join(SLIDING_TYPES)}"
                )
        super().__init__(layers=layers)
        self.config, self.rollback = config, rollback
        self.budget, self.sharing = budget, sharing
        self.fingerprint = fingerprint(model)
        compressed = self._compressed
        groups = [compressed] if sharing in ("layers", "heads") else [[layer] for layer in compressed]
        self.shared_budgets: list[SharedBudget] = []
        for group in groups if keeps_queries and compressed else []:
            rule = by_importance if sharing == "ada-kv" else by_error
            self.shared_budgets.append(SharedBudget([layer.core for layer in group], rule))
            for layer in group:
                layer.sharing = self.shared_budgets[-1]
        self.static = StaticLayers([layer.core for layer in compressed]) if static else None
        for index, layer in enumerate(compressed):
            layer.static, layer.index = self.static, index

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens of one layer (called by the model)."""
        check_implementation(self.config)
        if self.static is not None and self.static.frozen and key_states.shape[2] == 1:
            if layer_idx == 0:
                self.static.beat = self.static.beat.next
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "MomentCache supports torch.compile for steps of one token with static=True, after a pass that was not "
                "compiled: make it with static=True, and read the prompt with the model uncompiled"
            )
        if layer_idx == 0:
            if self.static is not None:
                self.static.thaw()
            check_lengths([layer.get_seq_length() for layer in self.layers])
            self._settle(key_states.shape[2])
            if self.rule is not None:
                self._apply(self.rule, key_states, value_states)
        layer = self.layers[layer_idx]
        if layer.is_initialized and isinstance(layer, DynamicSlidingWindowLayer):
            layer.keys, layer.values = (x.to(key_states.device) for x in (layer.keys, layer.values))
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """From now on tokens can be taken back by `crop`: eviction waits for it (called by assisted decoding).

        Until `crop`, the tokens of recorded passes are stored beside the budget: up to ``rollback`` of them, or those
        of the last pass if they are more. Without `crop` the oldest are settled, so that a cache that goes on without
        assistance stays bounded. Raises a RuntimeError for a static cache.
        """
        if self.static is not None:
            raise RuntimeError(
                "a static cache cannot take tokens of a pass back (assisted and prompt-lookup decoding do); make the "
                "cache with static=False"
            )
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back.

        Parameters
        ----------
        tokens_to_remove : int
            Not positive, as in transformers. 0 settles recorded passes: their tokens stay, and eviction is made up for.

        Raises
        ------
        RuntimeError
            If some of the tokens have been evicted; the cache is then unchanged.

        Notes
        -----
        Tokens of recorded passes (`activate_past_recording`) leave no trace. Others can be taken back while they are
        stored, which the last ``window`` always are: attention is then as if they had not come, but they have had their
        part in scores and query statistics, and so in what later evictions choose.
        """
        tokens = tokens_to_take_back(tokens_to_remove)
        frozen = self.static is not None and self.static.frozen
        if self.static is not None:
            self.static.thaw()
        try:
            self._crop(tokens)
        finally:
            if frozen and self.static is not None and self.get_seq_length():
                self.static.freeze()

    def _crop(self, tokens: int) -> None:
        """`crop` of a number of tokens, of layers that are not in static buffers."""
        check_lengths([layer.get_seq_length() for layer in self.layers])
        if tokens and tokens == self.get_seq_length():
            self.reset()
            return
        check_crop(self._compressed, tokens)
        sliding = [layer for layer in self.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        check_sliding(sliding, tokens)
        before = [copy.copy(shared.__dict__) for shared in self.shared_budgets]
        states = [(layer, layer.passes, layer.base, layer.core.snapshot()) for layer in self._compressed]
        try:
            if self._compressed:
                crop(self._compressed, tokens)
        except BaseException:
            for layer, passes, base, state in states:
                layer.passes, layer.base = passes, base
                layer.core.restore(state)
            for shared, own in zip(self.shared_budgets, before, strict=True):
                shared.__dict__.update(own)
            raise
        for layer in sliding:
            if layer.is_initialized and (tokens or layer.record_past):
                layer.crop(-tokens)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows for beam search; recorded passes are settled first."""
        if self.static is not None and self.static.frozen:
            self.static.select_rows(beam_idx)
            return
        self._before_rows_move()
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; recorded passes are settled first."""
        if isinstance(self.rule, TotalBytes) and repeats > 1:
            raise RuntimeError(
                f"batch_repeat_interleave({repeats}): the budget of {self.rule.text} was divided among the rows that "
                "were read; give it in tokens, or read with all rows at once"
            )
        if self.static is not None and self.static.frozen:
            rows = len(self.static.states[0].buffers["counts"])
            self.static.select_rows(torch.arange(rows).repeat_interleave(repeats))
            return
        self._before_rows_move()
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows; recorded passes are settled first."""
        if self.static is not None and self.static.frozen:
            rows = torch.arange(len(self.static.states[0].buffers["counts"]), device=indices.device)
            self.static.select_rows(rows[indices])
            return
        self._before_rows_move()
        super().batch_select_indices(indices)

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> None:
        """Move one layer, or all, to the CPU; the next forward pass brings each back to the device of its model."""
        if self.static is not None:
            self.static.thaw()
            self.static.release()
        for index in range(len(self.layers)) if layer_idx is None else [layer_idx]:
            if isinstance(self.layers[index], MomentLayer) or not only_non_sliding:
                self.layers[index].offload()

    def prefetch(self, layer_idx: int = 0, only_non_sliding: bool = True) -> None:
        """Nothing to do: each layer comes back with the keys of its next pass."""

    def reset(self) -> None:
        """Forget all tokens and moments, and what each layer's share of the budget was."""
        super().reset()
        for shared in self.shared_budgets:
            shared.reset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a safetensors file that `load` reads, whole or not at all.

        Raises
        ------
        RuntimeError
            If recorded passes wait for `crop`.
        """
        save(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: Any,
        *,
        policy: Policy | None = None,
        correction: Correction | None = None,
    ) -> MomentCache:
        """The cache that `save` wrote; it goes on to the last bit as the saved one does.

        Parameters
        ----------
        path : path
        model : PreTrainedModel or PretrainedConfig
            The model it was made for.
        policy, correction : Policy and Correction, optional
            Objects of your own classes that the cache was made with; those of momentkv are in the file.

        Raises
        ------
        CacheFileError
            If the file is damaged, of another version, or of another model.
        FileNotFoundError
            If there is none.

        Notes
        -----
        Nothing in the file is executed. A digest of everything in it tells accidents and careless edits; it is no
        signature. Tensors are read to the CPU; each layer moves to its model's device with the first pass.
        """
        return load(cls, path, model, policy=policy, correction=correction)

    def summary(self, trust: Callable[[LayerCache | RaggedCache], float] | None = None) -> CacheSummary:
        """Budget, tokens retained and evicted, and bytes of each layer; print it for a table.

        Parameters
        ----------
        trust : callable, optional
            A measure of your own, from a layer's cache to a number; it becomes a column. Without it a cache made with
            ``certify`` shows the *estimated* relative error at the mean of its recent queries (`momentkv.trust`).
        """
        return summarise(self, trust)

    def __repr__(self) -> str:
        kinds = f"{len(self.moment_layers)} compressed"
        if len(self.moment_layers) < len(self.layers):
            kinds += f", {len(self.layers) - len(self.moment_layers)} sliding"
        return (
            f"MomentCache({self.config.model_type}, budget={self.budget!r}, sharing={self.sharing!r}, "
            f"layers={kinds}, seen={int(self.get_seq_length())}, MiB={self.nbytes / 2**20:.2f})"
        )

    @property
    def moment_layers(self) -> dict[int, LayerCache | RaggedCache]:
        """The compressed layers' caches, by layer index; in static buffers, copies of their state now, to look at."""
        return {index: layer.visible for index, layer in enumerate(self.layers) if isinstance(layer, MomentLayer)}

    @property
    def nbytes(self) -> int:
        """Bytes stored now: keys, values, positions, scores and moments of all layers."""
        total = 0
        for layer in self.layers:
            if isinstance(layer, MomentLayer):
                total += layer.nbytes
            elif layer.is_initialized:
                total += layer.keys.nbytes + layer.values.nbytes
        return total

    @property
    def _compressed(self) -> list[MomentLayer]:
        """The compressed layers."""
        return [layer for layer in self.layers if isinstance(layer, MomentLayer)]

    def _settle(self, new: int) -> None:
        """Settle recorded passes so that with ``new`` tokens no more than ``rollback`` wait."""
        layers = self._compressed
        if layers and layers[0].passes:
            recording = layers[0].record_past
            if not recording or layers[0].recorded + new > self.rollback:
                # Down to half, so that this is not done at every token.
                settle(layers, max(0, min(self.rollback // 2, self.rollback - new)) if recording else 0)
        for layer in self.layers:
            # Stock layers that record keep everything until crop, which only assisted decoding calls.
            if isinstance(layer, DynamicSlidingWindowLayer) and layer.record_past and layer.is_initialized:
                kept = layer.sliding_window - 1 + self.rollback
                if layer.keys.shape[2] > kept:
                    layer.keys, layer.values = layer.keys[:, :, -kept:], layer.values[:, :, -kept:]

    def _before_rows_move(self) -> None:
        """Recorded passes are of the rows as they were, and so is who has ended."""
        if self._compressed:
            settle(self._compressed, 0)
        for layer in self._compressed:
            layer.ended = None

    def _apply(self, rule: BudgetRule, k: torch.Tensor, v: torch.Tensor) -> None:
        """Turn a budget that is not in tokens into tokens, now that tokens arrive."""
        layers = self._compressed
        if not layers:
            return
        seen = self.get_seq_length()
        if isinstance(rule, TotalBytes):
            if seen:
                return
            windows = [
                layer.sliding_window - 1 for layer in self.layers if isinstance(layer, DynamicSlidingWindowLayer)
            ]
            tokens = rule.tokens(layers[0].core.parts[0], len(layers), k, v, windows)
        elif isinstance(rule, Share):
            if seen and k.shape[2] < RECENT_QUERIES:
                return  # decoding, or a few guessed tokens
            tokens = rule.tokens(seen + k.shape[2], self.least)
        for shared in self.shared_budgets:
            shared.average = tokens
        if self.shared_budgets and seen:
            return  # each has its share, until the eviction that is to come shares anew
        for part in (part for layer in layers for part in layer.core.parts):
            part.budget = tokens


def kv_heads(config: Any) -> int:
    """KV heads of a layer."""
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)


def layer_kinds(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """Type of each layer of a model, and the arguments of its stock cache layer."""
    types, arguments = get_layer_types_and_kwargs(config)
    # Before transformers 5.16, one dict for all layers.
    each = arguments if isinstance(arguments, list) else [arguments] * len(types)
    return list(zip(types, each, strict=True))

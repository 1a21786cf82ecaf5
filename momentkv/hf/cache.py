"""The cache that ``generate`` takes: a layer of its own for each layer of the model, and what they share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from momentkv._numbers import whole_number
from momentkv.backends import ArrayBackend
from momentkv.cache.allocation import Sharing
from momentkv.cache.budget_rules import TotalBytes
from momentkv.cache.coded_budget import CodedBudget
from momentkv.cache.config import EXACT_WINDOW
from momentkv.cache.layer import LayerCache
from momentkv.hf.attention import SEVERAL
from momentkv.hf.building import Plan, apply_rule, shared_budgets
from momentkv.hf.checks import (
    check_implementation,
    check_new_keys,
    check_sliding,
    check_some_tokens,
    records,
    refuse_architecture,
)
from momentkv.hf.clock import Clock
from momentkv.hf.compiling import apart
from momentkv.hf.dropping import check_limit, has_read
from momentkv.hf.files import load, save
from momentkv.hf.generating import GeneratingCache
from momentkv.hf.layer import MomentLayer
from momentkv.hf.lengths import Read
from momentkv.hf.models import config_of, dtype_of, fingerprint
from momentkv.hf.moved import Moved
from momentkv.hf.owner import Owner, copied
from momentkv.hf.padding import Padding
from momentkv.hf.passes import PassKeeper
from momentkv.hf.rollback import check_crop, crop, settle, waiting_tokens
from momentkv.hf.summary import CacheSummary, summarise
from momentkv.hf.trial import Tried
from momentkv.policies import Policy, PolicyName
from momentkv.statistics.corrections import Correction, CorrectionName

__all__ = ["MomentCache"]


class MomentCache(GeneratingCache):
    """KV cache with a fixed budget that remembers what it evicts, for ``model.generate(past_key_values=...)``.

    Parameters
    ----------
    model : PreTrainedModel or PretrainedConfig
        A decoder-only model with ``attn_implementation="momentkv"``.
    budget : int, float, str or sequence of int
        Tokens retained for each KV head, sinks and window included: one number, or one for each layer. A float in
        (0, 1] is that share of the tokens read, counted at every pass of several tokens. A string like ``"64MiB"``
        is the size of the whole cache, everything counted.
    sharing : {"uniform", "layers", "heads", "layer-heads", "ada-kv", "kvzip", "pyramid"}, optional
        What shares one budget. ``"uniform"``: nothing, every KV head has the same. Otherwise the budget is an average,
        shared after prefills, and while decoding, by the error of each share: ``"layers"`` among layers, ``"heads"``
        among all heads of all layers, ``"layer-heads"`` among those of each layer. ``"ada-kv"``, ``"kvzip"`` and
        ``"pyramid"`` are the rules of those papers. By default ``"heads"``, but ``"layers"`` if
        `Policy.couples_heads`, and ``"uniform"`` if the budget lists one for each layer.
    policy : str or Policy
        What decides which tokens to evict; see `momentkv.policies.POLICIES`.
    order : {1, 0, None}
        Order of the correction; None for plain eviction without moments.
    correction : str or Correction
        ``"summaries"``, several and anchored at recent queries; ``"moments"``, the paper's; or ``"none"``.
    sinks, window, block : int
        First tokens and most recent tokens, always retained; tokens evicted at a time while decoding.
    rollback : int
        Tokens that can be taken back while past states are recorded (assisted and prompt-lookup decoding). Up to that
        many are stored beyond ``budget + block`` until `crop` says which stay.
    backend, certify, tolerance
        As `LayerCache` takes them: evidence for `momentkv.trust.trust`, and refusal to evict past a certified error.
    static : bool
        Whether steps are done in buffers of constant size and address, in place and without waiting for the device: for
        `torch.compile` (``generate`` does it by itself on a GPU) and CUDA graphs. Results are the same.
    bits : int, pair of int, "auto" or None
        Quantization: bits for each number of a retained token, on average (3, 4, 5, 6, 8 or 16), or for those of its
        key and of its value; None for the model's dtype. ``"auto"``: as many, from 3 to 8, as make the measured errors
        least, and as many tokens as take the bytes of the budget. By default ``"auto"`` for a budget in bytes (where
        `sharing` measures errors, without ``certify``), else None.
    exact_window : int
        With ``bits``: how many of the window's newest tokens stay exact, beside sinks and the filling block.
    statistics_bits : {16, None}
        Bits for each number of what stands for evicted tokens, between steps; None for full precision.

    Raises
    ------
    ValueError
        If the model uses another attention implementation or is of an unsupported architecture, or a budget is
        smaller than ``sinks + window + 1``.

    Notes
    -----
    The defaults differ from those of `LayerCache`, which are the paper's method: on a whole model ``policy="momentkv",
    correction="moments", sharing="uniform"``. ``tried`` lists what the last trial of `momentkv.hf.read` tried.

    Full-attention layers are compressed; sliding-window and chunked ones, bounded already, stay exact. Modes, and what
    raises: docs/transformers.md. Ids are not compared: an edited history needs a new cache.
    Between passes a cache keeps to a budget in bytes, for as many rows as at first; within a prefill it takes more.
    """

    def __init__(
        self,
        model: Any,
        budget: int | float | str | Sequence[int] = 512,
        *,
        policy: PolicyName | Policy = "balanced",
        order: int | None = 1,
        correction: CorrectionName | Correction = "summaries",
        sharing: Sharing | None = None,
        sinks: int = 1,
        window: int = 32,
        block: int = 32,
        rollback: int = 64,
        backend: str | ArrayBackend | None = None,
        certify: int | None = None,
        tolerance: float | None = None,
        static: bool = False,
        bits: int | Sequence[int] | Literal["auto", "by budget"] | None = "by budget",
        exact_window: int = EXACT_WINDOW,
        statistics_bits: int | None = 16,
    ) -> None:
        whole = config_of(model)
        config = whole.get_text_config(decoder=True)
        refuse_architecture(config, whole)
        check_implementation(config)
        if whole_number("rollback", rollback) < 1:
            raise ValueError(f"rollback is {rollback}; use at least 1 token")
        # Tensor parallelism shards KV heads; each rank's cache holds, and shares budgets among, its own.
        self.ranks = int(getattr(model, "_tp_size", None) or 1)
        settings: dict[str, Any] = {
            "policy": policy, "order": order, "correction": correction, "sinks": sinks, "window": window,
            "block": block, "backend": backend, "certify": certify, "tolerance": tolerance, "static": static,
            "bits": bits, "exact_window": exact_window, "statistics_bits": statistics_bits,
        }  # fmt: skip
        plan = Plan(config, budget, sharing, self.ranks, settings)
        super().__init__(layers=plan.layers(rollback))
        self.config, self.rollback, self.chooses_bits = config, rollback, plan.chooses_bits
        self.budget, self.sharing, self.rule, self.least = plan.budget, plan.sharing, plan.rule, plan.least
        # What a file says of all caches, those without a compressed layer among them.
        self.protected = {"sinks": sinks, "window": window, "block": block}
        self.tried: list[Tried] = []
        # After so many tokens, a user's turn that `read` began is still open.
        self.turn: int | None = None
        self.fingerprint, self.dtype = fingerprint(model), dtype_of(model)
        compressed = self._compressed
        self.shared_budgets: list[CodedBudget] = shared_budgets(compressed, plan)
        self.static = Clock([layer.core for layer in compressed]) if static else None
        for layer in compressed:
            layer.clock = self.static
        self.padding, self.moved = Padding(), Moved(model)
        if compressed:
            self.owner = Owner(model, self.layers.index(compressed[0]))
            compressed[0].owner, compressed[0].padding, compressed[0].moved = self.owner, self.padding, self.moved
        self.passes = PassKeeper(self.layers, self.shared_budgets, self.static, self.padding, self.moved)

    def __bool__(self) -> bool:
        """Whether it has read any tokens."""
        return has_read(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> MomentCache:
        """A cache of its own, of the same model: its configuration is the model's, and not a copy."""
        return copied(self, memo, self.config)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the new tokens of one layer (called by the model)."""
        check_implementation(self.config)
        if self.static is not None and self.static.runs and key_states.shape[2] == 1:
            if layer_idx == 0:
                self.passes.before_static_step()
                check_new_keys(self, key_states)
                self.static.tick()
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if torch.compiler.is_compiling():
            return apart(self.update, key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == 0:
            self.passes.begin(key_states.shape[2])
            check_new_keys(self, key_states)
            check_limit(self, key_states.shape[2])
            with self.passes.all_or_nothing():
                self.passes.settle(key_states.shape[2], self.rollback)
        self.passes.check_layer(layer_idx)
        with self.passes.or_undone():
            apply_rule(self, layer_idx, key_states, value_states)
        layer = self.layers[layer_idx]
        if not isinstance(layer, DynamicSlidingWindowLayer):
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer.is_initialized:
            layer.keys, layer.values = (x.to(key_states.device) for x in (layer.keys, layer.values))
        attended: tuple[Any, Any] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.passes.slid(layer)
        return attended

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding and evicted ones included; those of a pass that failed are not among them."""
        if self.static is not None and self.static.runs and not self.passes.is_torn:
            return super().get_seq_length(layer_idx)
        if torch.compiler.is_compiling():  # a plain number, as compilers cannot add others to sizes that change
            return int(apart(lambda: self.passes.length))
        return Read(self.passes.length)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Mask sizes as if nothing were evicted, so that one mask serves every layer."""
        sizes: tuple[int, int]
        if not torch.compiler.is_compiling():
            self.passes.announce()
            check_some_tokens(query_length, self)
        elif self.static is None or not self.static.runs or query_length != 1:
            sizes = apart(self.get_mask_sizes, query_length, layer_idx)
            return (sizes[0], SEVERAL) if self.static is not None and self.static.runs else sizes
        sizes = super().get_mask_sizes(query_length, layer_idx)
        return sizes

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
        stored, as the last ``window`` of a row always are, and padding is not. Attention is then as if they had not
        come, but they have had their part in scores and query statistics, and so in what later evictions choose.
        """
        tokens = waiting_tokens(tokens_to_remove)
        self.passes.undo()
        compressed, seen = self._compressed, int(self.get_seq_length())
        if tokens > seen:
            raise ValueError(f"crop(-{tokens}): the cache has read {seen} tokens only; crop at most those")
        if tokens and tokens == seen:
            self.reset()
            return
        check_crop(compressed, tokens)
        sliding = [layer for layer in self.layers if isinstance(layer, DynamicSlidingWindowLayer)]
        check_sliding(sliding, tokens)
        with self.passes.all_or_nothing():
            if compressed:
                crop(compressed, tokens)
            self.padding.keep(seen - tokens)
            if tokens:
                self.forget_ended()
            for layer in sliding:
                if layer.is_initialized and (tokens or records(layer)):
                    layer.crop(-tokens)
            if self.static is not None and self.static.runs:
                self.static.set()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows for beam search; recorded passes are settled first."""
        with self._rows_moving():
            self.padding.map(lambda x: x.index_select(0, beam_idx.to(x.device)))
            super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; recorded passes are settled first."""
        if isinstance(self.rule, TotalBytes) and repeats > 1:
            raise RuntimeError(
                f"batch_repeat_interleave({repeats}): the budget of {self.rule.text} was divided among the rows that "
                "were read; give it in tokens, or read with all rows at once"
            )
        with self._rows_moving():
            self.padding.map(lambda x: x.repeat_interleave(repeats, dim=0))
            super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows; recorded passes are settled first."""
        with self._rows_moving():
            self.padding.map(lambda x: x[torch.as_tensor(indices, device=x.device)])
            super().batch_select_indices(torch.as_tensor(indices))

    def offload(self, layer_idx: int | None = None, only_non_sliding: bool = True) -> None:
        """Move one layer, or all, to the CPU; the next forward pass brings each back to the device of its model."""
        self.passes.undo()
        for index in range(len(self.layers)) if layer_idx is None else [layer_idx]:
            if isinstance(self.layers[index], MomentLayer) or not only_non_sliding:
                self.layers[index].offload()

    def prefetch(self, layer_idx: int = 0, only_non_sliding: bool = True) -> None:
        """Nothing to do: each layer comes back with the keys of its next pass."""

    def reset(self) -> None:
        """Forget all tokens and moments, and what each layer's share of the budget was."""
        with self.passes.all_or_nothing():
            super().reset()
            self.padding.reset()
            for shared in self.shared_budgets:
                shared.reset()
        self.passes.reset()
        self.tried, self.turn = [], None

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
        Nothing in the file is executed. A digest of everything in it detects accidents and careless edits; it is not a
        signature. Tensors are read to the CPU; each layer moves to its model's device with the first pass.
        """
        return load(cls, path, model, policy=policy, correction=correction)

    def summary(self, trust: Callable[[LayerCache], float] | None = None) -> CacheSummary:
        """Budget, tokens retained and evicted, and bytes of each layer; print it for a table.

        Parameters
        ----------
        trust : callable, optional
            A measure of your own, from a layer's cache to a number; it becomes a column. Without it a cache made with
            ``certify`` shows the *estimated* relative error at the mean of its recent queries (`momentkv.trust`).
        """
        return summarise(self, trust)

    def __repr__(self) -> str:
        sliding = len(self.layers) - len(self.moment_layers)
        kinds = f"{len(self.moment_layers)} compressed" + (f", {sliding} sliding" if sliding else "")
        return (
            f"MomentCache({self.config.model_type}, budget={self.budget!r}, sharing={self.sharing!r}, "
            f"layers={kinds}, seen={int(self.get_seq_length())}, MiB={self.nbytes / 2**20:.2f})"
        )

    @property
    def moment_layers(self) -> dict[int, LayerCache]:
        """The compressed layers' caches, by layer index."""
        return {index: layer.core for index, layer in enumerate(self.layers) if isinstance(layer, MomentLayer)}

    @property
    def nbytes(self) -> int:
        """Bytes stored now: keys, values, positions, scores and moments of all layers."""
        return sum(
            layer.nbytes if isinstance(layer, MomentLayer) else layer.keys.nbytes + layer.values.nbytes
            for layer in self.layers
            if isinstance(layer, MomentLayer) or layer.is_initialized
        )

    @property
    def _compressed(self) -> list[MomentLayer]:
        """The compressed layers."""
        return [layer for layer in self.layers if isinstance(layer, MomentLayer)]

    @contextmanager
    def _rows_moving(self) -> Iterator[None]:
        """Recorded passes are of the rows as they were, and so is who has ended; all layers' rows move, or none."""
        self.passes.undo()
        with self.passes.all_or_nothing():
            if self._compressed:
                settle(self._compressed, 0)
            self.forget_ended()
            yield
            if self.static is not None and self.static.runs:
                self.static.set()

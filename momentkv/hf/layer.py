"""One full-attention layer of a cache of transformers: a `LayerCache` behind the interface that models know."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from momentkv.cache.layer import LayerCache
from momentkv.cache.ragged import RaggedCache
from momentkv.cache.sharing import SharedBudget
from momentkv.hf.attention import LINK, NEWEST
from momentkv.hf.checks import check_new_tokens, refuse_arguments
from momentkv.hf.rollback import Pass, base_of, check_crop, crop, queries_to_keep
from momentkv.hf.static import StaticLayers, check_step

__all__ = ["MomentLayer"]


class MomentLayer(CacheLayerMixin):
    """One full-attention layer of a `MomentCache`: a `LayerCache` behind the interface of transformers.

    Parameters
    ----------
    core : LayerCache or RaggedCache
        Its keys and values have shape ``(batch, kv_head, n, d)``; where heads retain different numbers of tokens, it is
        a `RaggedCache`, and they are lists, an entry a head.
    rollback : int
        Tokens that can be taken back while past states are recorded.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, core: LayerCache | RaggedCache, rollback: int = 64) -> None:
        # CacheLayerMixin.__init__ would set `keys` and `values`, which are the core's here.
        self.core, self.rollback = core, rollback
        self.sharing: SharedBudget | None = None
        # The parts' states while a pass is between `update` and `attend`.
        self.before: list[dict[str, Any]] | None = None
        self.record_past = False
        self.passes: list[Pass] = []
        self.base: list[dict[str, Any]] | None = None
        # Rows that have ended, for the pass that brings the length to this number; see `FinishedRows`.
        self.ended: tuple[int, torch.Tensor] | None = None
        # Buffers of a cache with static=True, and this layer's place among them.
        self.static: StaticLayers | None = None
        self.index = 0

    @property
    def is_compileable(self) -> bool:
        """Whether steps are done in static buffers."""
        return self.static is not None

    @property
    def is_croppable(self) -> bool:
        """Whether recorded passes can be taken back without a trace."""
        return self.static is None

    @property
    def is_frozen(self) -> bool:
        """Whether the state is in static buffers now."""
        return self.static is not None and self.static.frozen

    @property
    def keys(self) -> Any:
        """Retained keys, shape (batch, kv_head, n, d), or a list of one such array for each head."""
        return self.visible.keys

    @property
    def values(self) -> Any:
        """Retained values, shape (batch, kv_head, n, dv), or a list of one such array for each head."""
        return self.visible.values

    @property
    def visible(self) -> LayerCache | RaggedCache:
        """The layer's cache, to look at."""
        return self.core if self.static is None else self.static.core(self.index)

    @property
    def is_initialized(self) -> bool:
        """Whether any token has arrived."""
        return self.is_frozen or self.core.seen > 0

    @property
    def recorded(self) -> int:
        """Tokens of passes whose eviction is put off."""
        return sum(one.tokens for one in self.passes)

    @property
    def nbytes(self) -> int:
        """Bytes stored now, queries of recorded passes and static buffers included."""
        if self.static is not None:
            return self.core.nbytes + self.static.states[self.index].nbytes
        return self.core.nbytes + sum(one.queries.nbytes for one in self.passes)

    def __repr__(self) -> str:
        core = self.visible
        return f"MomentLayer(budget={core.budget}, stored={core.stored}, seen={core.seen})"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate: the first `update` does it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new tokens; the returned keys carry the link that `momentkv_attention` follows."""
        if self.static is not None and self.static.frozen:
            self.static.states[self.index].append(key_states.detach(), value_states.detach())
            linked = key_states.view_as(key_states)
            setattr(linked, LINK, self)
            return linked, value_states
        if self.before is not None:
            raise RuntimeError(
                "the last forward pass updated this cache layer but its attention never reached momentkv: either the "
                "pass failed (call cache.reset()), or this architecture changes the keys after updating its cache "
                "(multi-head latent attention does) and is not supported; use a DynamicCache for it"
            )
        self.to(key_states.device)
        before = [part.snapshot() for part in self.core.parts]
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
        if self.static is not None and self.static.frozen:
            return self.step(query, attention_mask, dropout, kwargs), None
        before, self.before = self.before, None
        try:
            refuse_arguments(attention_mask, dropout, kwargs)
            q_len, seen = query.shape[2], self.core.seen
            valid = None
            if attention_mask is None:  # padding has positions of its own, and a mask whose length is checked
                check_new_tokens(kwargs.get("position_ids"), seen - q_len, seen)
            else:
                valid = attention_mask[:, None, seen - q_len : seen]
            valid = self.without_ended_rows(valid, q_len)
            self.core.scale = scaling
            out = self.core.attend(query, valid=valid)
            if self.record_past and before is not None:
                self.base = self.base or base_of(before)
                kept = queries_to_keep(self.core, q_len, self.rollback)
                self.passes.append(Pass(q_len, query[:, :, q_len - kept :].detach().clone(), valid))
            else:
                self.evict()
        except BaseException:
            if before is not None:
                for part, state in zip(self.core.parts, before, strict=True):
                    part.restore(state)
            raise
        if self.static is not None and self.core is self.static.cores[-1]:
            self.static.freeze()
        return out.transpose(1, 2).contiguous(), None

    def step(
        self, query: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float, kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """`attend` for one token, in static buffers."""
        refuse_arguments(None, dropout, kwargs)
        valid = check_step(query, attention_mask)
        static: Any = self.static
        state = static.states[self.index]
        with torch.no_grad():
            out = state.attend(query, valid)
            if static.beat.flushes:
                state.flush()
        return out.transpose(1, 2).contiguous()

    def without_ended_rows(self, valid: torch.Tensor | None, q_len: int) -> torch.Tensor | None:
        """Padding of a pass, with the pads that ``generate`` feeds to rows that have ended."""
        if self.ended is None or q_len != 1 or self.core.seen != self.ended[0]:
            return valid
        goes_on = ~self.ended[1][:, None, None].to(self.device)
        return goes_on if valid is None else valid & goes_on

    @torch.no_grad()
    def evict(self) -> None:
        """Evict down to the budget, or together with the other layers and heads where the budget is shared."""
        if self.sharing is None:
            self.core.evict()
        else:
            self.sharing.evict(self.core)

    def get_seq_length(self) -> int:
        """Tokens seen, padding and evicted ones included: positions and masks count from here.

        In static buffers a tensor, as for caches of transformers that can be compiled: reading it as a number waits.
        """
        if self.static is not None and self.static.frozen:
            seen: Any = self.static.states[self.index].buffers["seen"]
            return seen + 0  # what the caller holds must not count on
        return self.core.seen

    def get_max_length(self) -> int:
        """No limit (-1): the sequence may grow forever."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Mask sizes as if nothing were evicted, so that one mask serves every layer; of a static step, `NEWEST`."""
        if self.static is not None and self.static.frozen:
            if query_length == 1:
                return 1, NEWEST
            return int(self.get_seq_length()) + query_length, 0
        return self.core.seen + query_length, 0

    def reset(self) -> None:
        """Forget all tokens and moments."""
        self.core.reset()
        if self.static is not None:
            self.static.frozen = False
        self.before, self.ended = None, None
        self.passes, self.base = [], None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows for beam search; moments and scores follow."""
        self._check_thawed("reorder_cache")
        self.core.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._check_thawed("batch_repeat_interleave")
        self.core.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._check_thawed("batch_select_indices")
        self.core.map(lambda x: x[indices.to(x.device)])

    def activate_past_recording(self) -> None:
        """From now on put every pass's eviction off until `crop`, so that its tokens can be taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back; see `MomentCache.crop`."""
        self._check_thawed("crop")
        if self.sharing is not None:
            raise RuntimeError(
                f"crop({tokens_to_remove}) of one layer: it shares its budget with others; call crop of the cache"
            )
        tokens = tokens_to_take_back(tokens_to_remove)
        check_crop([self], tokens)
        crop([self], tokens)

    def _check_thawed(self, method: str) -> None:
        """Raise where this layer's state is in buffers, which it shares a clock for with all others."""
        if self.is_frozen:
            raise RuntimeError(f"{method} of one layer of a static cache; call {method} of the cache")

    @property
    def device(self) -> torch.device:
        """Where the layer's arrays are."""
        device: torch.device = next(iter(self.core.arrays().values())).device
        return device

    def to(self, device: torch.device) -> None:
        """Move the whole state to a device."""
        self._check_thawed("offload")
        if not self.is_initialized or self.device == device:
            return
        if self.passes:
            raise RuntimeError(
                f"cannot move a cache layer to {device}: recorded passes wait for crop; call cache.crop(0) first"
            )
        self.core.map(lambda x: x.to(device))

    def offload(self) -> None:
        """Move the whole state to the CPU; the next `update` brings it back to the device of its model."""
        self.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Nothing to do: `update` moves the state to the device of the keys that arrive."""


def tokens_to_take_back(tokens_to_remove: int) -> int:
    """Number of tokens that ``crop`` of transformers asks to remove."""
    if tokens_to_remove > 0:
        raise ValueError(
            f"crop({tokens_to_remove}): give the number of tokens to remove as a negative number, as transformers does"
        )
    return -tokens_to_remove

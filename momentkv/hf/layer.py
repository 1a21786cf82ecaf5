"""One full-attention layer of a cache of transformers: a `LayerCache` behind the interface that models know."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from momentkv.backends.autocast import without_autocast
from momentkv.cache.layer import LayerCache
from momentkv.cache.shared_budget import SharedBudget
from momentkv.cache.step import check_like_stored
from momentkv.hf.attention import NEWEST, link, linked
from momentkv.hf.checks import check_new_tokens, check_pass, check_static_pass, plain_mask, refuse_arguments
from momentkv.hf.clock import Clock, check_step
from momentkv.hf.gradients import say_what_gradients_lack
from momentkv.hf.layer_reader import LayerReader
from momentkv.hf.moved import Moved
from momentkv.hf.owner import Owner
from momentkv.hf.padding import Padding
from momentkv.hf.rollback import Pass, check_crop, crop, queries_to_keep, waiting_tokens
from momentkv.hf.steps import static_step

__all__ = ["MomentLayer"]


def nobody() -> None:
    """In place of the keeper of passes of a layer that is in no cache."""


class MomentLayer(CacheLayerMixin):
    """One full-attention layer of a `MomentCache`: a `LayerCache` behind the interface of transformers.

    Parameters
    ----------
    core : LayerCache
    rollback : int
        Tokens that can be taken back while past states are recorded.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, core: LayerCache, rollback: int = 64) -> None:
        # CacheLayerMixin.__init__ would set `keys` and `values`, which are the core's here.
        self.core, self.rollback = core, rollback
        self.sharing: SharedBudget | None = None
        # New tokens that wait for their queries, and the layer's state before them.
        self.waits = 0
        self.before: dict[str, Any] = {}
        # Finds the `PassKeeper` of its cache, weakly: in a circle, a cache that is dropped would stay in memory.
        self.keeper: Callable[[], Any] = nobody
        self.record_past = False
        self.passes: list[Pass] = []
        # While `momentkv.hf.read` reads a text: what keeps its queries and, of a second reading, the scores.
        self.reader: LayerReader | None = None
        # Rows that have ended, for the pass that brings the length to this number; see `FinishedRows`.
        self.ended: tuple[int, torch.Tensor] | None = None
        # For the whole cache, in its first compressed layer: which model's keys it holds, and what masks said about its
        # tokens.
        self.owner: Owner | None = None
        self.padding: Padding | None = None
        self.moved: Moved | None = None
        # Of a cache with static=True.
        self.clock: Clock | None = None
        self.arrived: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def is_compileable(self) -> bool:
        """Whether steps are done in arrays that stay where they are."""
        return self.core.config.static

    @property
    def is_croppable(self) -> bool:
        """Whether recorded passes can be taken back without a trace."""
        return not self.core.config.static

    @property
    def keys(self) -> Any:
        """Stored keys in order of position, shape (batch, kv_head, n, d); None before the first token."""
        return self.core.keys

    @property
    def values(self) -> Any:
        """Stored values in order of position, shape (batch, kv_head, n, dv); None before the first token."""
        return self.core.values

    @property
    def is_initialized(self) -> bool:
        """Whether any token has arrived."""
        return self.core.state is not None

    @property
    def recorded(self) -> int:
        """Tokens of passes whose eviction is put off."""
        return sum(one.tokens for one in self.passes)

    @property
    def nbytes(self) -> int:
        """Bytes held now, queries of recorded passes included."""
        return self.core.nbytes + sum(one.queries.nbytes for one in self.passes)

    def __getstate__(self) -> dict[str, Any]:
        # A copy has a keeper of its own, which finds its layers.
        return self.__dict__ | {"keeper": nobody}

    def __repr__(self) -> str:
        core = self.core
        return f"MomentLayer(budget={core.budget}, stored={core.stored}, seen={core.seen})"

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to allocate: the first `update` does it."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new tokens; the returned keys are theirs, with the link that `momentkv_attention` follows."""
        self.come_to(key_states.device)
        if not torch.compiler.is_compiling():
            self.core.thaw()
        if self.rereads:
            self.arrived, self.waits = (key_states.detach(), value_states.detach()), key_states.shape[2]
            return link(self, key_states, value_states)
        if self.steps_statically(key_states.shape[2]):
            self.check_like_buffers(key_states, value_states)
            self.arrived = key_states.detach(), value_states.detach()
            return link(self, key_states, value_states)
        before = self.held()
        self.core.append(key_states, value_states)
        self.before, self.waits = before, key_states.shape[2]
        return link(self, key_states, value_states)

    def check_like_buffers(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Raise unless new tokens can be written beside those of static buffers, which would round them."""
        clock: Any = self.clock
        state = self.core.stored_state
        try:
            check_like_stored("k", keys, state.recent_keys)
            check_like_stored("v", values, state.recent_values)
        except ValueError:
            if self.core is clock.cores[0]:  # nothing has been changed
                clock.undo()
            raise

    @property
    def rereads(self) -> bool:
        """Whether passes are those of a second reading, which stores nothing."""
        return self.reader is not None and self.reader.again

    def steps_statically(self, tokens: int) -> bool:
        """Whether a pass of so many tokens is a step in arrays that stay where they are."""
        return tokens == 1 and self.clock is not None and self.clock.runs

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
        if self.rereads:
            return self.reread(module, query, attention_mask, dropout, kwargs), None
        if self.steps_statically(query.shape[2]):
            return self.step(module, query, attention_mask, dropout, kwargs), None
        keeper = self.keeper()
        # Meanwhile no other thread may begin a pass.
        with contextlib.nullcontext() if keeper is None else keeper.attending():
            result = self.attend_and_evict(module, query, attention_mask, scaling, dropout, kwargs)
            self.before = {}
            # Still within attention: another thread must not undo what is whole.
            if keeper is not None:
                keeper.attended()
        say_what_gradients_lack(result, key, value)
        return result, None

    def attend_and_evict(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None,
        dropout: float,
        kwargs: dict[str, Any],
    ) -> torch.Tensor:
        """`attend` for a pass whose tokens `update` has stored."""
        core = self.core
        try:
            core.scale, q_len = scaling, query.shape[2]
            attention_mask = check_pass(self, module, attention_mask, q_len, dropout, kwargs)
            valid = self.real_tokens(q_len, attention_mask, kwargs)
            core.recording = (self.record_past and not core.config.static) or self.reader is not None
            out = core.attend(query, valid=valid)
            self.waits = 0
            if self.reader is not None:
                self.reader.read(query, valid)
                core.release_projections()
            elif core.recording:
                # Of padded rows, the newest tokens may lie anywhere.
                kept = q_len if valid is not None else queries_to_keep(core, q_len, self.rollback)
                self.passes.append(Pass(q_len, query[:, :, q_len - kept :].detach().clone(), valid))
                core.release_projections()
            elif (keeper := self.keeper()) is None:
                self.evict()
            else:
                keeper.evict(self)
            result = out.transpose(1, 2).contiguous()
            if self.padding is not None:
                self.padding.read(attention_mask, valid, core.seen - q_len, q_len)
            if self.moved is not None:
                self.moved.read()
            if self.clock is not None and core is self.clock.cores[-1] and self.reader is None:
                self.clock.set()
        except BaseException:
            self.go_back(self.before)
            raise
        return result

    def step(
        self, module: Any, query: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float, kwargs: Any
    ) -> torch.Tensor:
        """`attend` for one token, in arrays that stay where they are."""
        clock: Any = self.clock
        core, first = self.core, self.core is clock.cores[0]
        try:
            check_static_pass(self, module, attention_mask, dropout, kwargs)
            valid = check_step(query, attention_mask)
        except (ValueError, RuntimeError):
            if first:  # nothing has been changed
                clock.undo()
            raise
        keys, values = self.arrived or (None, None)
        with torch.no_grad():
            last = core is clock.cores[-1]
            out = static_step(core, query, keys, values, valid, clock.cores if last and clock.beat.flushes else ())
        if last:
            clock.open = False
        return out.transpose(1, 2).contiguous()

    @torch.no_grad()
    def reread(
        self, module: Any, query: torch.Tensor, attention_mask: torch.Tensor | None, dropout: float, kwargs: Any
    ) -> torch.Tensor:
        """`attend` for tokens of a second reading: they see what is stored and each other, and are forgotten."""
        reader: Any = self.reader
        refuse_arguments(module, dropout, kwargs)
        mask = plain_mask(attention_mask, query.shape[0], self.core.seen + query.shape[2], query.shape[2])
        valid = None if mask is None else mask[:, None, -query.shape[2] :]
        keys, values = self.arrived or (None, None)
        self.arrived, self.waits = None, 0
        out = reader.reread(query, keys, values, valid)
        if (keeper := self.keeper()) is not None:
            keeper.attended()
        return out.transpose(1, 2).contiguous()

    def real_tokens(
        self, q_len: int, attention_mask: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> torch.Tensor | None:
        """Which of the new tokens are no padding, bool (batch, 1, q_len), or None for all."""
        seen = self.core.seen
        valid = None
        if attention_mask is None:  # padding has positions of its own, and a mask whose length is checked
            check_new_tokens(kwargs.get("position_ids"), seen - q_len, seen)
        else:
            valid = attention_mask[:, None, seen - q_len : seen]
        return self.without_ended_rows(valid, q_len)

    def held(self) -> dict[str, Any]:
        """All that a pass changes, by reference; see `LayerCache.held`."""
        return {"core": self.core.held(), "passes": list(self.passes), "ended": self.ended}

    def go_back(self, held: dict[str, Any]) -> None:
        """Undo all since `held`."""
        self.core.go_back(held["core"])
        self.passes, self.ended = list(held["passes"]), held["ended"]
        self.waits, self.before = 0, {}

    def without_ended_rows(self, valid: torch.Tensor | None, q_len: int) -> torch.Tensor | None:
        """Padding of a pass, with the pads that ``generate`` feeds to rows that have ended."""
        if self.ended is None or q_len != 1 or self.core.seen != self.ended[0]:
            return valid
        goes_on = ~self.ended[1][:, None, None].to(self.device)
        return goes_on if valid is None else valid & goes_on

    @torch.no_grad()
    def evict(self) -> None:
        """Evict down to the budget, or together with the other layers and heads where the budget is shared."""
        if self.core.newest_queries is not None:
            self.core.release_projections()
        with without_autocast():
            if self.sharing is None:
                self.core.evict()
            else:
                self.sharing.evict(self.core)

    def get_seq_length(self) -> int:
        """Tokens seen, padding and evicted ones included: positions and masks count from here.

        Where steps are static a tensor, as for caches of transformers that can be compiled: reading it as a number
        waits for the device.
        """
        clock: Any = self.core.clock
        if clock is not None:
            now: Any = linked(clock.reshape(-1)[0] + 0, self)  # what the caller holds must not count on
            return now
        return self.core.seen

    def get_max_length(self) -> int:
        """No limit (-1): the sequence may grow forever."""
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Mask sizes as if nothing were evicted, so that one mask serves every layer; of a static step, `NEWEST`."""
        if self.steps_statically(query_length):
            return 1, NEWEST
        return self.core.seen + query_length, 0

    def reset(self) -> None:
        """Forget all tokens and moments."""
        self.core.reset()
        self.waits, self.before, self.ended = 0, {}, None
        self.passes = []

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Select rows for beam search; moments and scores follow."""
        self.core.map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.core.map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self.core.map(lambda x: x[indices.to(x.device)])

    def activate_past_recording(self) -> None:
        """From now on put every pass's eviction off until `crop`, so that its tokens can be taken back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last ``-tokens_to_remove`` tokens back; see `MomentCache.crop`."""
        if self.core.config.static:
            raise RuntimeError("crop of one layer of a static cache, which share a clock; call crop of the cache")
        if self.sharing is not None:
            raise RuntimeError(
                f"crop({tokens_to_remove}) of one layer: it shares its budget with others; call crop of the cache"
            )
        tokens = waiting_tokens(tokens_to_remove)
        check_crop([self], tokens)
        crop([self], tokens)

    @property
    def device(self) -> torch.device:
        """Where the layer's arrays are."""
        device: torch.device = self.core.stored_state.keys.device
        return device

    def to(self, device: torch.device) -> None:
        """Move the whole state to a device."""
        if self.core.state is None or self.device == device:
            return
        if self.passes:
            raise RuntimeError(
                f"cannot move a cache layer to {device}: recorded passes wait for crop; call cache.crop(0) first"
            )
        self.replace(lambda x: x.to(device))

    def replace(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Put other arrays of the same shapes in place of all; where steps are static, the old ones are let go of."""
        self.core.map(function)
        if self.core.fixed is not None:
            self.core.fixed = None
            with torch.inference_mode(False):
                self.core.fix()

    def come_to(self, device: torch.device) -> None:
        """Move the state to where new tokens are."""
        if self.core.state is None or self.device == device:
            return
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"the cache is on {self.device}, its model's layer on {device}: it was offloaded since the last pass; "
                "read one token with the model uncompiled, which moves it back"
            )
        self.to(device)

    def offload(self) -> None:
        """Move the whole state to the CPU; the next `update` brings it back to the device of its model."""
        self.to(torch.device("cpu"))

    def prefetch(self) -> None:
        """Nothing to do: `update` moves the state to the device of the keys that arrive."""

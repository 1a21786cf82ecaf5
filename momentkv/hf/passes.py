"""Forward passes as a whole: one that failed half-way leaves no trace."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from momentkv.backends.autocast import without_autocast
from momentkv.cache.joining import evict_together
from momentkv.cache.shared_budget import SharedBudget
from momentkv.hf.checks import NAME, records
from momentkv.hf.clock import Clock
from momentkv.hf.layer import MomentLayer
from momentkv.hf.moved import Moved
from momentkv.hf.padding import Padding
from momentkv.hf.rollback import settle

__all__ = ["PassKeeper"]

ALONE = (
    "one thread at a time may use a cache. Give each a cache of its own, a copy.deepcopy say, or hold a lock around "
    "its passes"
)
AGAIN = "call reset() on this one, and read its tokens again"
# Held while a thread takes a cache, or ends a layer of its pass.
TURN = threading.Lock()
# Threads that are within the attention of a compressed layer, by the keeper of its passes; copies have none.
INSIDE: dict[int, int] = {}
# How often a first pass may be repeated that ends before some layer.
RETRIES = 8


def own(x: torch.Tensor) -> torch.Tensor:
    """A tensor that holds no graph, and no storage that is much larger than itself."""
    x = x.detach()
    return x if x.untyped_storage().nbytes() <= 1.125 * x.nbytes else x.clone()


class PassKeeper:
    """Knows the state of every layer before the pass that is under way.

    A pass goes through the layers in order. If it fails in the middle (an error in the model, no memory, an interrupt),
    some layers have read its tokens and others have not. The next pass then starts from the state that all layers had
    before it.

    Parameters
    ----------
    layers : sequence
        Of a cache, stock ones included.
    shared : sequence of SharedBudget
    clock : Clock or None
        Of static layers: what a step of one token changed in place cannot be taken back.
    padding : Padding
    moved : Moved
    """

    def __init__(
        self,
        layers: Sequence[Any],
        shared: Sequence[SharedBudget],
        clock: Clock | None,
        padding: Padding,
        moved: Moved,
    ) -> None:
        self.layers, self.shared, self.clock, self.padding, self.moved = layers, shared, clock, padding, moved
        self.moments = [layer for layer in layers if isinstance(layer, MomentLayer)]
        self.stock = [layer for layer in layers if not isinstance(layer, MomentLayer)]
        self.find_layers()
        # Of a pass that is under way: how many compressed layers have not attended, what all were before it, and how
        # many tokens they had seen.
        self.left = self.start = 0
        self.before: list[Any] = []
        # Layers that have run full in it, and evict when all have attended.
        self.due: list[MomentLayer] = []
        # Whose pass it is, and how many tokens each thread's next one was told of, where masks were made for it.
        self.thread: int | None = None
        self.told: dict[int, int] = {}
        # The layer whose new tokens the last pass left without attention, if no layer has ever attended.
        self.unreached: int | None = None
        self.reached = False
        # Layers that have come in any pass; tokens of the last one, and of those that ended before a layer that never
        # came.
        self.known: set[int] = set()
        self.new = 0
        self.ended_early: list[int] = []

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.find_layers()

    def find_layers(self) -> None:
        """Let the compressed layers know who keeps their passes."""
        for layer in self.moments:
            layer.keeper = weakref.ref(self)

    def begin(self, new: int) -> None:
        """Start a pass of ``new`` tokens, from what was before the last one if that failed."""
        self.undo()
        unreached, self.unreached = self.unreached, None
        if unreached is not None:
            raise RuntimeError(self.never_reached(unreached))
        # A pass that failed may be repeated. A model without attention in a layer goes on with other tokens.
        early = self.ended_early
        if len(self.known) < len(self.layers):
            self.known.update(index for index, length in enumerate(self.lengths) if length)
        if len(self.known) < len(self.layers) and (len(early) > RETRIES or {*early} - {new}):
            self.ended_early = []
            raise RuntimeError(self.never_came(len(self.known)))
        self.take()
        length, told = self.length, self.told.pop(threading.get_ident(), None)
        if told not in (None, length):
            raise RuntimeError(
                f"{told} tokens had been read when masks were made for this pass, and now {length}: {ALONE}; repeat "
                "this pass, which has not changed the cache"
            )
        self.new = new
        self.before, self.start, self.left, self.due = self.held(), length, len(self.moments), []

    def announce(self) -> None:
        """Undo a pass that failed, as masks are to be made for the next one of this thread."""
        self.undo()
        if self.clock is None or not self.clock.runs:  # else the device would be asked
            self.told[threading.get_ident()] = self.length

    def take(self) -> int | None:
        """Make what follows this thread's, if no other one is within attention; whose it was."""
        me = threading.get_ident()
        with TURN:
            other = INSIDE.get(id(self), me)
            if other != me:
                raise RuntimeError(f"a pass of this cache is under way in thread {other}, and goes on: {ALONE}")
            before, self.thread = self.thread, me
        return before

    def check_thread(self, what: str) -> None:
        """Raise if another thread has taken the cache since this pass began."""
        if self.thread != threading.get_ident():
            raise RuntimeError(f"{what}, in thread {self.thread}: {ALONE}; {AGAIN}")

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Attention of a compressed layer, in which no other thread may take the cache."""
        me = threading.get_ident()
        try:
            with TURN:
                self.check_thread("a pass began while this one was under way")
                INSIDE[id(self)] = me
            yield
        finally:
            with TURN:
                if INSIDE.get(id(self)) == me:
                    del INSIDE[id(self)]

    def check_layer(self, layer_idx: int) -> None:
        """Raise if a layer is not in the state that it has between two passes."""
        if layer_idx and layer_idx - 1 not in self.known:
            self.undo()
            self.ended_early = []
            raise RuntimeError(self.never_came(layer_idx - 1))
        self.check_thread("a pass began while this one was under way")
        self.check_attended(layer_idx)
        self.known.add(layer_idx)
        held = int(self.layers[layer_idx].get_seq_length())
        if held != self.start:
            raise RuntimeError(
                f"layer {layer_idx} holds {held} tokens where this pass began with {self.start}: {ALONE}; {AGAIN}"
            )

    @torch.no_grad()
    def evict(self, layer: MomentLayer) -> None:
        """Evict a layer that has attended; if its block has run full, with the others, once the last has attended.

        All layers run full at the same step, and evicting them at once costs few more calls than one of them.
        """
        if layer.core.is_full:
            self.due.append(layer)
        else:
            layer.evict()
        if self.left > 1:
            return
        due, self.due = self.due, []
        sharings = dict.fromkeys(each.sharing for each in due if each.sharing is not None)
        again = [sharing for sharing in sharings if sharing.is_ready]
        due = [each for each in due if each.sharing not in again]
        for each in due:
            if each.sharing is not None:
                each.sharing.prepare(each.core)
        with without_autocast():
            for sharing in again:
                sharing.share_again()
            evict_together([each.core for each in due])

    def attended(self) -> None:
        """One more layer is through."""
        with TURN:
            self.check_thread("a pass began before this one had ended")
            self.left -= 1
        self.reached = True
        self.forget()

    def slid(self, layer: DynamicSlidingWindowLayer) -> None:
        """One more layer with a window holds the pass's tokens."""
        # A graph that is kept would keep those of all passes before; a view, all tokens of this one.
        layer.keys, layer.values = own(layer.keys), own(layer.values)
        self.forget()

    def forget(self) -> None:
        """Let go of what was before the pass, once every layer holds its tokens: nothing is left to fail."""
        if not self.left and not self.is_torn:
            self.before = []

    def held(self) -> list[Any]:
        """All that a pass changes, by reference; tensors of stock layers are never changed in place."""
        return [
            *([layer.held() for layer in self.moments], [dict(layer.__dict__) for layer in self.stock]),
            ([shared.average for shared in self.shared], self.padding.codes, self.moved.deltas),
            None if self.clock is None else self.clock.held(),
        ]

    def go_back(self, held: list[Any]) -> None:
        """Make everything what it was."""
        moments, stock, (averages, self.padding.codes, self.moved.deltas), clock = held
        for layer, before in zip(self.moments, moments, strict=True):
            layer.go_back(before)
        for layer, before in zip(self.stock, stock, strict=True):
            layer.__dict__.update(before)
        for shared, average in zip(self.shared, averages, strict=True):
            shared.average, shared.waiting = average, []
        if self.clock is not None:
            self.clock.go_back(clock)
        self.left = 0

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Undo what is done within if it fails."""
        held = self.held()
        try:
            yield
        except BaseException:
            self.go_back(held)
            raise

    @contextmanager
    def or_undone(self) -> Iterator[None]:
        """Undo the whole pass at once if what is done within fails: it was refused, and not interrupted."""
        try:
            yield
        except BaseException:
            self.go_back(self.before)
            raise

    def settle(self, new: int, rollback: int) -> None:
        """Settle recorded passes so that with ``new`` tokens no more than ``rollback`` wait."""
        if self.moments and self.moments[0].passes:
            recording = self.moments[0].record_past
            if not recording or self.moments[0].recorded + new > rollback:
                # Down to half, so that this is not done at every token.
                settle(self.moments, max(0, min(rollback // 2, rollback - new)) if recording else 0)
        for layer in self.stock:
            # Stock layers that record keep everything until crop, which only assisted decoding calls.
            if isinstance(layer, DynamicSlidingWindowLayer) and records(layer) and layer.is_initialized:
                kept = layer.sliding_window - 1 + rollback
                if layer.keys.shape[2] > kept:
                    layer.keys, layer.values = (own(x[:, :, -kept:]) for x in (layer.keys, layer.values))

    @property
    def lengths(self) -> list[int]:
        """Tokens that each layer has seen."""
        return [int(layer.get_seq_length()) for layer in self.layers]

    @property
    def length(self) -> int:
        """Tokens of all passes that went through all layers."""
        return self.start if self.left else min(self.lengths, default=0)

    @property
    def is_torn(self) -> bool:
        """Whether the last pass reached some layers and not others; the device is not asked."""
        return self.left > 0 or (bool(self.stock) and len(set(self.lengths)) > 1)

    def undo(self) -> None:
        """Take every layer back to where it was before the last pass, if that did not reach all of them."""
        if self.clock is not None:
            self.clock.check()
        if not self.is_torn:
            return
        before = self.take()
        if not self.is_torn:  # another thread has ended its pass meanwhile
            return
        same = before == threading.get_ident()  # else another thread may be in it yet
        if same and not self.reached:
            waiting = (index for index, layer in enumerate(self.layers) if getattr(layer, "waits", 0))
            self.unreached = next(waiting, None)
        early = same and len(self.known) < len(self.layers)
        self.ended_early = [*self.ended_early, self.new] if early else []
        self.go_back(self.before)

    def before_static_step(self) -> None:
        """Undo a pass of several tokens that failed half-way."""
        if not torch.compiler.is_compiling():
            self.undo()
        elif self.is_torn:
            raise RuntimeError(
                "the last forward pass failed half-way; call cache.crop(0), which undoes it, before a compiled step"
            )

    def check_attended(self, layer_idx: int) -> None:
        """Raise if the layer before took new tokens whose attention never came."""
        if layer_idx and getattr(self.layers[layer_idx - 1], "waits", 0):
            self.undo()
            self.unreached = None
            raise RuntimeError(self.never_reached(layer_idx - 1))

    def never_came(self, index: int) -> str:
        """Message for a layer that no pass has brought any tokens."""
        return (
            f"passes end without layer {index}, which has never stored a token: either they failed there, for want of "
            "memory or interrupted, and then read any tokens now, as the cache is what it was before them and this is "
            "said once; or this model has a layer without attention there, and its config.layer_types does not say so; "
            "then use a DynamicCache for this model"
        )

    def never_reached(self, index: int) -> str:
        """Message for a layer whose attention did not come."""
        return (
            f"layer {index} stored new tokens but its attention never reached momentkv: the model computes attention "
            f'in another way than attn_implementation="{NAME}"; call model.set_attn_implementation("{NAME}"), or use a '
            "DynamicCache if this architecture has attention of its own. If the pass was interrupted there, read its "
            "tokens again: the cache is as before it"
        )

    def reset(self) -> None:
        """Forget what was before."""
        self.before, self.left, self.unreached, self.ended_early, self.told = [], 0, None, [], {}
        self.moved.deltas = None
        if self.clock is not None:
            self.clock.reset()

"""What a layer's cache holds: to read it, to go back to it, and to keep it at fixed addresses."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable
from typing import Any

from momentkv._array import Array, array_namespace, nbytes, trace_now
from momentkv._numbers import whole_number
from momentkv.attention import check_keys
from momentkv.backends import get_backend
from momentkv.cache.config import RECENT_QUERIES, CacheConfig, checked_budget
from momentkv.cache.losses import losses_of
from momentkv.cache.packing import View, view_of
from momentkv.cache.queries import query_window
from momentkv.cache.state import LayerState, NewTokens
from momentkv.cache.step import due_heads
from momentkv.codes import misfit
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import QueryWindow
from momentkv.trust import Losses

__all__ = ["NUMBERED", "Holdings"]

# Arrays that steps write into.
RECENT = ("recent_keys", "recent_values", "recent_positions", "recent_attention")


# What operators know a cache by; see `momentkv.hf.steps`.
NUMBERS = itertools.count()
NUMBERED: weakref.WeakValueDictionary[int, Holdings] = weakref.WeakValueDictionary()


class Holdings:
    """The state of a layer and the tokens that wait to become a part of it.

    Attributes
    ----------
    config : CacheConfig
    state : LayerState or None
        None before the first token.
    new : NewTokens or None
        Tokens that were appended and are in no tier yet.
    recording : bool
        Whether tokens may be taken back: nothing is observed or evicted.
    newest_queries : array, shape (batch..., q_head, m, d), or None
        Of a prefill, until the eviction that follows.
    budgets : list of int, or None
        Of each KV head, once their number is known.
    shares_from : int or None
        From what length on the next eviction shares budgets anew, while decoding too; None where none does.
    fixed : LayerState or None
        Where steps are static, the state in the arrays that later ones are written into.
    torn : bool
        Whether writing into them was interrupted: `check_whole`.
    number : int
        Of this cache alone.
    trace : object or None
        What JAX traced when the cache was made: `momentkv.cache.traces`.
    handle : array or None
        The number as operators in a compiled graph are told it, where steps are static; see `momentkv.hf.clock`.
    """

    config: CacheConfig
    state: LayerState | None = None
    new: NewTokens | None = None
    recording: bool = False
    newest_queries: Array = None
    budgets: list[int] | None = None
    shares_from: int | None = None
    fixed: LayerState | None = None
    torn: bool = False
    handle: Array = None
    trace: Any = None

    def release_queries(self) -> None:
        """Let go of the queries of a prefill that ranked its tokens; those that errors are measured with stay."""
        if self.newest_queries is not None and self.newest_queries.shape[-2] > RECENT_QUERIES:
            copy = get_backend(self.newest_queries).copy
            self.newest_queries = copy(self.newest_queries[..., -RECENT_QUERIES:, :])

    def code(self, bits: tuple[int, int]) -> None:
        """Keep retained tokens in records of so many bits from the next eviction on; there must be no others yet."""
        held = None if self.state is None else self.state.layout.bits
        if held not in (None, bits):
            raise ValueError(f"bits is {bits}, but tokens are retained in {held} already; call reset() first")
        self.config = dataclasses.replace(self.config, bits=bits)

    def take_number(self) -> None:
        """Become known to operators, and belong to what JAX traces now."""
        self.number, self.handle, self.trace = next(NUMBERS), None, trace_now()
        NUMBERED[self.number] = self

    def __setstate__(self, held: dict[str, Any]) -> None:
        self.__dict__.update(held)
        self.take_number()  # a copy is another cache

    def view(self) -> View:
        """All tokens at hand, those that were appended last included, in order of position."""
        state = self.stored_state
        return view_of(None if state.is_empty else state, self.new)

    @property
    def stored_state(self) -> LayerState:
        """The state, or an error that says that there is none, or none that is whole."""
        self.check_whole()
        if self.state is None:
            raise ValueError("the cache is empty; append some tokens first")
        return self.state

    @property
    def seen(self) -> int:
        """Length of the sequence so far, padding and evicted tokens included."""
        state = self.state
        before = 0 if state is None else state.seen if state.clock is None else first_number(state.clock)
        return before + (0 if self.new is None else self.new.length)

    @property
    def is_empty(self) -> bool:
        """Whether no token is at hand: of those that were read none is stored, or all were padding."""
        return self.new is None and (self.state is None or self.state.is_empty)

    @property
    def keys(self) -> Array:
        """Stored keys in order of position, shape (batch..., kv_head, n, d); None of an empty cache."""
        return None if self.is_empty else self.view().keys

    @property
    def values(self) -> Array:
        """Stored values in order of position, shape (batch..., kv_head, n, dv); None of an empty cache."""
        return None if self.is_empty else self.view().values

    @property
    def positions(self) -> Array:
        """Place in the sequence of each, int32 (batch..., kv_head, n); -1 for a slot that holds no token."""
        return None if self.is_empty else self.view().positions

    @property
    def attention(self) -> Array:
        """What the policy made of the attention each received, shape (batch..., kv_head, n), or None."""
        return None if self.is_empty else self.view().attention

    @property
    def moments(self) -> Any:
        """What stands for the tokens evicted so far, in full precision; None of an empty cache."""
        return None if self.state is None else self.config.correction.statistics(self.state.evicted)

    @property
    def evidence(self) -> Moments | None:
        """Exact moments of all evicted tokens, where the cache was made with ``certify``."""
        return None if self.state is None else self.state.evidence

    def losses(self, positions: Array) -> Losses | None:
        """What codes may have lost of the tokens of `view`, for `momentkv.trust`; None where there never were any."""
        return losses_of(self.stored_state, positions)

    def misfit(self) -> tuple[Array, Array] | None:
        """How well means and deviations still fit the retained tokens' keys, and values: `momentkv.codes.misfit`.

        Shape (batch..., kv_head) each, 1 for as well as new ones would; None where no token is in few bits.
        """
        state = self.stored_state
        coding, layout = state.coding(), state.layout
        if coding is None or layout.width == 0:
            return None
        real = layout.rectangle(state.positions, vectors=False, fill=-1) >= 0
        keys, values = state.retained()
        return misfit(keys, coding.key_standard, real), misfit(values, coding.value_standard, real)

    @property
    def query_window(self) -> QueryWindow | None:
        """Mean and variance of the recent queries, where they are remembered."""
        return query_window(self.state)

    @property
    def has_evicted(self) -> bool:
        """Whether any token of any row has been evicted."""
        return self.state is not None and self.state.has_evicted

    def checked_budgets(self, budget: Any) -> tuple[int | tuple[int, ...], list[int] | None]:
        """A budget that fits settings and heads, and that of each head where these are known."""
        checked = checked_budget(self.config, budget)
        heads = None if self.state is None else self.state.layout.heads
        if heads is not None and not isinstance(checked, int) and len(checked) != heads:
            raise ValueError(
                f"budget is {list(checked)}, for {len(checked)} KV heads, but the cache holds {heads}; give one number "
                "for all, or one for each"
            )
        return checked, list(checked) if not isinstance(checked, int) else None if heads is None else [checked] * heads

    def awaiting(self, q: Array) -> tuple[LayerState, NewTokens]:
        """The state and the tokens that wait for these queries, or an error that says why they are none of theirs."""
        state, new = self.state, self.new
        if state is None or new is None:
            raise ValueError("attend was called on an empty cache; append the keys and values of its queries first")
        check_keys(q, new.keys)
        k = new.keys
        if q.shape[-2] > new.length or q.shape[:-3] != k.shape[:-3] or q.shape[-3] % k.shape[-3]:
            raise ValueError(
                f"q has shape {tuple(q.shape)}, but the keys that wait have {tuple(k.shape)}; give at most one query a "
                "token, the same batch axes, and a multiple of the KV heads"
            )
        return state, new

    def has_to_move(self, budgets: list[int]) -> bool:
        """Whether stored tokens go, or static steps need other room, as soon as these are the budgets."""
        if self.is_empty or self.budgets is None or budgets == self.budgets:
            return False
        if self.new is not None:
            if self.is_fixed:  # the flush that follows has room for a block, and none for what the budget gives up
                raise ValueError(
                    f"budget was set to {budgets} between append and evict of static steps, while tokens wait; call "
                    "evict first"
                )
            return False
        return self.is_fixed or any(new < old for new, old in zip(budgets, self.budgets, strict=True))

    def holds_newest(self, tokens: int, *, before: int = 0) -> bool:
        """Whether every head stores each of the newest tokens, but for the last ``before``, which are left out."""
        if not self.has_evicted:
            return True
        xp, positions, end = array_namespace(self.positions), self.positions, self.seen - before
        newest = (positions >= end - tokens) & (positions < end)
        return bool(xp.all(xp.sum(xp.astype(newest, xp.int32), axis=-1) == tokens))

    def checked_newest(self, tokens: Any) -> int:
        """A number of newest tokens that can be taken out, or an error that says why it cannot."""
        tokens = whole_number("tokens", tokens)
        if self.new is not None:
            raise ValueError("drop was called between append and evict, while tokens wait; call evict first")
        if not 0 <= tokens <= self.seen:
            raise ValueError(f"tokens is {tokens}, of {self.seen} that were read; drop at most those")
        if not self.holds_newest(tokens):
            raise ValueError(
                f"tokens is {tokens}, but some of the newest {tokens} are padding or have been evicted, and cannot be "
                f"taken out; the last {self.config.window} of a row never are (window)"
            )
        return tokens

    def map(self, function: Callable[[Array], Array]) -> None:
        """Apply a function to every array: to select, repeat or reorder rows, or to move devices."""
        if self.state is None:
            return
        state, new, newest = self.state.map(function), self.new, self.newest_queries
        if all(x is y for x, y in zip(state.arrays().values(), self.state.arrays().values(), strict=True)):
            state = self.state
        if new is not None:
            images: dict[str, Any] = {
                n: function(x) for n, x in new._asdict().items() if x is not None and n != "padded"
            }
            new = new._replace(**images)
        self.state, self.new = state, new
        self.newest_queries = None if newest is None else function(newest)

    def thaw(self) -> None:
        """Make arrays anew that were made in a mode of the library which has ended, `torch.inference_mode` say.

        Nothing may be written into them otherwise, and no gradient come through.
        """
        if self.state is None:
            return
        backend, first = self.config.backend_of(self.state.recent_keys), self.state.recent_keys
        if backend.freezes():
            self.frozen = True
        elif self.frozen or backend.is_frozen(first):
            self.frozen = False
            if any(map(backend.is_frozen, self.arrays().values())):
                self.map(lambda x: backend.copy(x) if backend.is_frozen(x) else x)
                if self.fixed is not None:
                    self.fixed = None
                    self.fix()

    def release_projections(self) -> None:
        """Let go of larger arrays that waiting tokens are views of, as values are of a fused projection."""
        if self.new is not None:
            compact = get_backend(self.new.keys).compact
            self.new = self.new._replace(keys=compact(self.new.keys), values=compact(self.new.values))

    @property
    def clock(self) -> Array | None:
        """The sequence's length by the device's count, shape (batch...), where steps are static now."""
        return None if self.state is None else self.state.clock

    @property
    def stored_by_head(self) -> list[int]:
        """Slots that each KV head stores tokens in now."""
        if self.state is None:
            return [0] * (0 if self.budgets is None else len(self.budgets))
        waiting = 0 if self.new is None else self.new.length
        return [width + self.state.filled + waiting for width in self.state.layout.widths]

    @property
    def stored(self) -> int:
        """Slots in use by the KV head that stores most."""
        return max(self.stored_by_head, default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held now."""
        waiting = [] if self.new is None else [x for x in self.new[:-1] if x is not None]
        if self.newest_queries is not None:
            waiting.append(self.newest_queries)
        return (0 if self.state is None else self.state.nbytes) + sum(nbytes(x) for x in waiting)

    def arrays(self) -> dict[str, Array]:
        """Every array of the state, by name (those of the statistics as ``evicted.weight`` and so on)."""
        return {} if self.state is None else self.state.arrays()

    @property
    def is_ticked(self) -> bool:
        """Whether steps are static and a row or head has filled its block or its recent tier; asks the device."""
        state = self.state
        if state is None or state.ticks is None or not self.is_fixed:
            return False
        return bool(array_namespace(state.ticks).any(due_heads(self.config, self.budgets or [], state)))

    @property
    def is_full(self) -> bool:
        """Whether the recent tier is full, so that `evict` looks for heads to evict from, and nothing else waits."""
        state = self.state
        waits = self.new is not None or self.newest_queries is not None or self.recording or self.config.static
        return not waits and state is not None and state.filled == state.layout.recent

    @property
    def is_fixed(self) -> bool:
        """Whether steps of one token are static now: after a first pass of a cache made so."""
        return self.state is not None and self.state.clock is not None

    def fix(self) -> None:
        """Write the state into the arrays that keep their size and place, where steps are static; else do nothing.

        Every part of a step makes a state in arrays of its own, so that it can be undone. Whoever wants static steps at
        constant addresses calls this when they are through; `step` does. A cache whose writing was interrupted is
        refused until `reset` or `restore`.
        """
        if self.state is None or not self.is_fixed:
            return
        backend = get_backend(self.state.keys)
        if self.fixed is None or self.fixed.shapes() != self.state.shapes():
            self.state = self.fixed = self.state.map(backend.fixed)
        else:
            self.torn = True
            self.state = self.fixed = self.fixed.overwritten(self.state, backend.overwrite)
            self.torn = False

    def check_whole(self) -> None:
        """Raise if arrays that keep their place hold a state and half of the next one."""
        if self.torn:
            raise RuntimeError(
                "the cache is torn: writing a step into the arrays of its static state was interrupted; call reset() "
                "and read the tokens again, or restore() a snapshot"
            )

    def held(self) -> dict[str, Any]:
        """All that a step changes, by reference: nothing is copied, and nothing that it refers to is changed.

        Use it with `go_back` before anything else is read. To keep a state for longer, use `snapshot`.
        """
        return dict(self.__dict__)

    def go_back(self, held: dict[str, Any]) -> None:
        """Undo all since `held`, but an interrupted writing into the arrays that were the state's then."""
        in_place = held["fixed"] is not None and held["state"] is held["fixed"]
        self.__dict__.update(held | {"torn": self.torn and in_place})

    def snapshot(self) -> dict[str, Any]:
        """The whole state, to go back to with `restore` as often as one likes."""
        held = self.held()
        if self.state is not None:
            copy, state = get_backend(self.state.recent_keys).copy, self.state
            recent = {name: copy(getattr(state, name)) for name in RECENT if getattr(state, name) is not None}
            # Static steps write into every array.
            held["state"] = state.changed(**recent) if state.clock is None else state.map(copy)
        return held

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go back to a state that `snapshot` gave, of this cache or another."""
        if not isinstance(snapshot, dict) or not self.__dict__.keys() <= snapshot.keys():
            raise TypeError(f"snapshot is a {type(snapshot).__name__} of something else; use what snapshot() returned")
        self.torn = False
        # The arrays of static steps, and what operators know a cache by, are its own.
        own = () if snapshot["number"] == self.number else ("fixed", "number", "handle", "trace")
        self.go_back(snapshot | {name: getattr(self, name) for name in own})
        self.go_back(self.snapshot())  # what is written from now on is not the snapshot's


def first_number(x: Array) -> int:
    """The first element of an array, all of which are equal."""
    xp = array_namespace(x)
    return int(xp.reshape(x, (-1,))[0])

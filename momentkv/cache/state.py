"""The state of a layer's cache: recent tokens as they came, retained tokens, and what stands for evicted ones.

A token moves one way through it:

    recent  ->  retained  ->  evicted

*Recent* tokens (sinks, the window, and the block that is filling) are written in place, as many in every head.
*Retained* tokens lie packed, head after head, for heads may retain different numbers; this tier changes only when a
block is full. *Evicted* tokens are statistics. Every array has the leading axes of the batch first, so that rows are
selected, moved and saved by one function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from momentkv._array import Array, accumulation_dtype, array_namespace, check_mask, device, nbytes
from momentkv.backends import get_backend
from momentkv.backends.layout import Layout, Tiers
from momentkv.cache.traces import hides_nothing
from momentkv.codes import Coding, Standard, row_bytes, step_dtype
from momentkv.statistics.moments import Moments

__all__ = ["LayerState", "NewTokens", "empty_state", "hidden", "joined", "overwritten", "place", "told"]


@dataclasses.dataclass(frozen=True)
class LayerState:
    """All that a layer's cache holds between steps; replaced as a whole, so that a step that fails changes nothing.

    Attributes
    ----------
    recent_keys, recent_values : array, shape (..., kv_head, recent, d) and (..., kv_head, recent, dv)
        Written in place, beyond ``recent_count`` alone.
    recent_positions : int32 array, shape (..., kv_head, recent)
    recent_attention : array, shape (..., kv_head, recent), or None
        What a policy that observes attention made of it.
    recent_count : int32 array, shape (..., kv_head)
        Slots in use, the first ones.
    keys, values : array, shape (..., slots, d) and (..., slots, dv)
        Retained tokens, packed: see `Layout`. Of each head in order of position, the first ``counts`` of its slots.
        Codes, uint8 (..., slots, bytes), where tokens are kept in few bits.
    key_step, value_step : array, shape (..., slots), or None
        Of these codes.
    key_mean, key_deviation, value_deviation : array, shape (..., kv_head, d) or (..., kv_head, dv), or None
        What tokens are coded by, once there are any: see `momentkv.codes`.
    key_order : int array, shape (..., kv_head, d), or None
        Channels of keys as they lie in records, where they are graded: see `momentkv.codes.Standard`.
    early : bool array, shape (..., kv_head), or None
        Where rows may differ in when they evict, or steps are static: heads that have evicted nothing since their
        tokens were first coded, and code them anew when they do. None where that is as ``has_evicted`` says.
    key_loss, value_loss : array, shape (..., kv_head, 2, d) or (..., kv_head, 2, dv), or None
        Beside evidence and codes: the most that a channel of any evicted token has lost, and of any stored one before
        it was coded as it is now; see `momentkv.cache.losses`.
    positions : int32 array, shape (..., slots)
        -1 for a slot that holds no token.
    attention : array, shape (..., slots), or None
    counts : int32 array, shape (..., kv_head)
    evicted : statistics
        Of a `momentkv.statistics.corrections.Correction`, with leading axes (..., kv_head).
    evidence : Moments or None
        Exact moments of all evicted tokens, for `momentkv.trust`.
    query_mean, query_square : array, shape (..., kv_head, d), or None
        First and second moment of the scaled recent queries.
    recent_queries : array, shape (..., q_head, m, d), or None
        What an eviction is judged by where there is a tolerance.
    judges : array, shape (..., kv_head, m, d), or None
        Of each of the newest tokens the query of one head of the group, of the next head in turn: what budgets are
        shared by while decoding. NaN for padding.
    clock : int32 array, shape (...), or None
        ``seen``, on the device: where steps are static, the host does not count.
    ticks : int32 array, shape (..., kv_head), or None
        Where steps are static: tokens stored, with each step since the last flush counted as one, padding or not. It
        says when a head evicts, so that all heads do in time.
    layout : Layout
    seen : int
        Length of the sequence so far, padding and evicted tokens included.
    filled : int
        Most recent slots in use in any row and head.
    padded : bool
        Whether counts may differ from row to row: slots are then told by ``counts``, not by the host's numbers.
    has_evicted : bool
    """

    recent_keys: Array
    recent_values: Array
    recent_positions: Array
    recent_count: Array
    keys: Array
    values: Array
    positions: Array
    counts: Array
    evicted: Any
    layout: Layout
    key_step: Any = None
    value_step: Any = None
    key_mean: Any = None
    key_deviation: Any = None
    key_order: Any = None
    value_deviation: Any = None
    early: Any = None
    key_loss: Any = None
    value_loss: Any = None
    recent_attention: Any = None
    attention: Any = None
    evidence: Moments | None = None
    query_mean: Array | None = None
    query_square: Array | None = None
    recent_queries: Array | None = None
    judges: Array | None = None
    clock: Any = None
    ticks: Any = None
    seen: int = 0
    filled: int = 0
    padded: bool = False
    has_evicted: bool = False

    def changed(self, **fields: Any) -> LayerState:
        """The state with other fields: `dataclasses.replace` without a look at all of them in each step."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, **fields)
        return new

    def own(self) -> dict[str, Array]:
        """The arrays of the state itself, by field name."""
        return {name: x for name in ARRAYS if (x := getattr(self, name)) is not None}

    def arrays(self) -> dict[str, Array]:
        """Every array, by name; those of statistics as ``evicted.weight`` and so on."""
        held = self.own()
        for name in STATISTICS:
            kept = getattr(self, name)
            held |= {} if kept is None else {f"{name}.{own}": x for own, x in kept.arrays().items()}
        return held

    def map(self, function: Callable[[Array], Array]) -> LayerState:
        """A state of every array's image: to select, repeat or reorder rows, or to move to a device."""
        changed: dict[str, Any] = {name: function(x) for name, x in self.own().items()}
        for name in STATISTICS:
            kept = getattr(self, name)
            changed[name] = None if kept is None else kept.map(function)
        return self.changed(**changed)

    def shapes(self) -> dict[str, Any]:
        """What arrays must have in common for one state to be written into another's."""
        return {name: (tuple(x.shape), x.dtype, device(x)) for name, x in self.arrays().items()}

    def overwritten(self, other: LayerState, write: Callable[[Array, Array], Array]) -> LayerState:
        """The other state, its arrays written into those of this one, which has the same shapes."""
        (written,) = overwritten([self], [other], lambda old, new: list(map(write, old, new)))
        return written

    def with_arrays(self, arrays: Sequence[Array]) -> LayerState:
        """The state with other arrays of the same shapes, in the order of `arrays`."""
        given = iter(arrays)
        changed: dict[str, Any] = {name: next(given) for name in self.own()}
        for name in ("evicted", "evidence"):
            statistics = getattr(self, name)
            if statistics is not None and statistics.arrays():
                changed[name] = statistics.map(lambda _: next(given))
        return self.changed(**changed)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(nbytes(x) for x in self.arrays().values())

    @property
    def is_empty(self) -> bool:
        """Whether no token is stored."""
        return self.filled == 0 and self.layout.width == 0

    def tiers(self) -> Tiers:
        """Recent and retained tokens as a backend attends to them; nothing is copied."""
        return Tiers(
            self.recent_keys[..., : self.filled, :],
            self.recent_values[..., : self.filled, :],
            self.recent_valid(),
            self.keys,
            self.values,
            self.retained_valid(),
            self.layout,
            self.coding(),
        )

    def coding(self) -> Coding | None:
        """How retained tokens are read, where they are records; None where they are vectors, or there are none."""
        if self.layout.bits is None or self.key_mean is None:
            return None
        standards = Standard(self.key_mean, self.key_deviation, self.key_order), Standard(None, self.value_deviation)
        return Coding(self.layout.bits, self.key_step, self.value_step, *standards)

    def retained(self) -> tuple[Array, Array]:
        """Retained tokens, decoded, as a rectangle: `Layout.rectangle`, for records `ArrayBackend.tokens`."""
        if self.layout.width == 0:
            return self.recent_keys[..., :0, :], self.recent_values[..., :0, :]
        coding = self.coding()
        if coding is None:
            keys, values = (self.layout.rectangle(x, vectors=True) for x in (self.keys, self.values))
            return keys, values
        xp, layout, backend = array_namespace(self.keys), self.layout, get_backend(self.keys)
        parts = (
            (self.keys, coding.key_step, coding.key_standard, coding.bits[0], self.recent_keys),
            (self.values, coding.value_step, coding.value_standard, coding.bits[1], self.recent_values),
        )
        keys, values = (
            xp.astype(backend.tokens(layout, codes, step, standard, bits), like.dtype, copy=False)
            for codes, step, standard, bits, like in parts
        )
        return keys, values

    def recent_valid(self) -> Array | None:
        """Which of the first ``filled`` recent slots hold a token, or None for all."""
        return below(self.recent_count, self.filled) if self.padded else None

    def retained_valid(self) -> Array | None:
        """Which retained slots, as a rectangle (..., kv_head, width), hold a token, or None for all that there are."""
        return below(self.counts, self.layout.width) if self.padded else None


# Array fields, in the order of the class: what is saved, moved and counted.
ARRAYS = (
    "recent_keys", "recent_values", "recent_positions", "recent_count", "keys", "values", "positions", "counts",
    "key_step", "value_step", "key_mean", "key_deviation", "key_order", "value_deviation", "early", "key_loss",
    "value_loss", "recent_attention", "attention", "query_mean", "query_square", "recent_queries", "judges", "clock",
    "ticks",
)  # fmt: skip

# Those that have an axis of packed slots, of all heads, where others have one of heads: behind that of rows.
PACKED = ("keys", "values", "positions", "attention", "key_step", "value_step")

# Fields that hold arrays of their own.
STATISTICS = ("evicted", "evidence")

# What of a state the host knows.
HOST = ("layout", "seen", "filled", "padded", "has_evicted")


class NewTokens(NamedTuple):
    """Tokens that have been read and are in neither tier yet: of a prefill, a chunk, or passes that may be undone.

    Attributes
    ----------
    keys, values : array, shape (..., kv_head, m, d) and (..., kv_head, m, dv)
    positions : int32 array, shape (..., kv_head, m)
        -1 for padding.
    attention : array, shape (..., kv_head, m), or None
    padded : bool
        Whether any is padding.
    """

    keys: Array
    values: Array
    positions: Array
    attention: Any
    padded: bool

    @property
    def length(self) -> int:
        """Tokens, padding included."""
        return int(self.keys.shape[-2])


def below(counts: Array, width: int) -> Array:
    """Bool (..., width): the first ``counts`` of each row."""
    xp = array_namespace(counts)
    return xp.arange(width, dtype=counts.dtype, device=device(counts)) < counts[..., None]


def empty_state(k: Array, v: Array, *, evicted: Any, layout: Layout, observes: bool, evidence: Moments | None) -> Any:
    """A state without tokens, for keys and values shaped and typed like ``k`` and ``v`` (none are read)."""
    xp = array_namespace(k, v)
    lead, where = k.shape[:-3], device(k)
    slots, shape = sum(layout.widths), (*k.shape[:-2], layout.recent)

    def zeros(*shape: int, dtype: Any) -> Array:
        return xp.zeros(shape, dtype=dtype, device=where)

    wide, bits = accumulation_dtype(xp, k.dtype, v.dtype), layout.bits

    def packed(x: Array, place: int) -> Array:
        size, dtype = (x.shape[-1], x.dtype) if bits is None else (row_bytes(x.shape[-1], bits[place]), xp.uint8)
        return zeros(*lead, slots, size, dtype=dtype)

    steps = {}
    if bits is not None:
        steps = {name: zeros(*lead, slots, dtype=step_dtype(xp)) for name in ("key_step", "value_step")}
    return LayerState(
        recent_keys=zeros(*shape, k.shape[-1], dtype=k.dtype),
        recent_values=zeros(*shape, v.shape[-1], dtype=v.dtype),
        recent_positions=zeros(*shape, dtype=xp.int32) - 1,
        recent_count=zeros(*shape[:-1], dtype=xp.int32),
        keys=packed(k, 0),
        values=packed(v, 1),
        positions=zeros(*lead, slots, dtype=xp.int32) - 1,
        counts=zeros(*shape[:-1], dtype=xp.int32),
        recent_attention=zeros(*shape, dtype=wide) if observes else None,
        attention=zeros(*lead, slots, dtype=wide) if observes else None,
        evicted=evicted,
        evidence=evidence,
        layout=layout,
        **steps,
    )


def place(backend: Any, state: LayerState, new: NewTokens) -> LayerState:
    """Write new tokens after the recent ones, in place; they must fit. Padding takes no slot."""
    xp = array_namespace(new.keys)
    count, arrays = new.length, {}
    names = ["keys", "values", "positions", *([] if state.recent_attention is None else ["attention"])]
    if not (state.padded or new.padded):
        for name in names:
            x, axis = getattr(state, f"recent_{name}"), -2 if name in ("keys", "values") else -1
            arrays[f"recent_{name}"] = backend.write_at(x, state.filled, getattr(new, name), axis=axis)
        return state.changed(**arrays, recent_count=state.recent_count + count, filled=state.filled + count)
    real = xp.astype(new.positions >= 0, xp.int32)
    if count == 1:
        # A slot that padding is written to is the next token's.
        added, index = real[..., 0], state.recent_count[..., None]
    else:
        step = xp.cumulative_sum(real, axis=-1)
        added, index = step[..., -1], xp.where(real > 0, state.recent_count[..., None] + step - 1, -1 - 0 * step)
    for name in names:
        x, y = getattr(state, f"recent_{name}"), getattr(new, name)
        vectors = name in ("keys", "values")
        arrays[f"recent_{name}"] = backend.write(x, index, y, axis=-2 if vectors else -1)
    counts = state.recent_count + xp.astype(added, state.recent_count.dtype, copy=False)
    filled = min(state.filled + count, state.layout.recent)
    return state.changed(**arrays, recent_count=counts, filled=filled, padded=True)


def overwritten(
    states: Sequence[LayerState],
    others: Sequence[LayerState],
    write: Callable[[Sequence[Array], Sequence[Array]], Sequence[Array]],
) -> list[LayerState]:
    """`LayerState.overwritten` of several states at once, by a function that is given all arrays that change."""
    pairs = []
    for state, other in zip(states, others, strict=True):
        arrays = other.arrays()
        pairs.append([(x, arrays[name]) for name, x in state.arrays().items()])
    changed = [(x, y) for own in pairs for x, y in own if x is not y]
    images = iter(write([x for x, _ in changed], [y for _, y in changed]))
    results = []
    for state, other, own in zip(states, others, pairs, strict=True):
        held = [x if x is y else next(images) for x, y in own]
        host = {name: getattr(other, name) for name in HOST}
        in_place = all(x is image for (x, _), image in zip(own, held, strict=True))
        if in_place and all(getattr(state, name) == value for name, value in host.items()):
            results.append(state)
        else:
            results.append(state.with_arrays(held).changed(**host))
    return results


def joined(old: NewTokens, new: NewTokens) -> NewTokens:
    """New tokens behind others that wait."""
    xp = array_namespace(new.keys)
    attention = None
    if old.attention is not None and new.attention is not None:
        attention = xp.concat([old.attention, new.attention], axis=-1)
    return NewTokens(
        xp.concat([old.keys, new.keys], axis=-2),
        xp.concat([old.values, new.values], axis=-2),
        xp.concat([old.positions, new.positions], axis=-1),
        attention,
        old.padded or new.padded,
    )


def told(state: LayerState, corrects: bool) -> LayerState:
    """A state that knows whether it has evicted: the host does not see what compiled or captured steps evict.

    ``corrects`` says whether anything stands for evicted tokens; otherwise nothing depends on it.
    """
    if state.clock is None or not corrects:
        return state
    return state.changed(has_evicted=bool(array_namespace(state.counts).any(state.evicted.weight > 0)))


def hidden(new: NewTokens, valid: Array, count: int, *, ask: bool = True) -> NewTokens:
    """The new tokens, with the padding among the last ``count`` of them marked, and nothing of it left.

    Without asking the device whether there is any if ``ask`` is False.
    """
    xp = array_namespace(new.positions)
    newest = new.positions[..., -count:]
    check_mask("valid", valid, newest.shape, newest)
    if ask and hides_nothing(valid):
        return new
    newest = xp.where(valid, newest, xp.full_like(newest, -1))
    positions = xp.concat([new.positions[..., :-count], newest], axis=-1) if count < new.length else newest
    real = (positions >= 0)[..., None]
    # Padding may hold anything; a weight of zero times NaN is NaN.
    keys, values = (xp.where(real, x, xp.zeros_like(x)) for x in (new.keys, new.values))
    return new._replace(keys=keys, values=values, positions=positions, padded=True)

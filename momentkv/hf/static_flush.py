"""Eviction in place: choose a block of tokens, fold them, close the gaps, without ever asking the device.

What `LayerCache.evict` does for arrays that shrink, done for buffers whose size and address stay: a row evicts when its
count says that its block is full, and everything that depends on counts is decided on the device. As an operator
(``torch.ops.momentkv.flush``) it is one node of a compiled graph, whatever policy and correction do inside.
"""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from momentkv.backends.operators import DTYPES, fold
from momentkv.policies import Policy, Tokens
from momentkv.policies.select import ranking
from momentkv.statistics.corrections import Correction
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import QueryWindow, Summaries

__all__ = ["Rules", "close_gaps", "flush", "flush_operator", "observe_operator", "revive"]

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Rules:
    """How a cache evicts: what of its settings is not a tensor. Operators know it by its number.

    Attributes
    ----------
    policy : Policy
    correction : Correction
    order : {1, 0, None}
    sinks, window, block : int
        As `LayerCache` takes them.
    number : int
    """

    policy: Policy
    correction: Correction
    order: int | None
    sinks: int
    window: int
    block: int
    number: int = dataclasses.field(default_factory=itertools.count().__next__, init=False)

    def __post_init__(self) -> None:
        RULES[self.number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Rules:
        return self  # immutable, and known by number


RULES: weakref.WeakValueDictionary[int, Rules] = weakref.WeakValueDictionary()


def revive(parts: Sequence[Tensor], rules: Rules) -> Moments | Summaries:
    """Moments of the tensors that stand for them, in the order of their fields; a co-moment lies keys first."""
    if rules.correction.anchored:
        return Summaries(*parts)
    weight, key_mean, value_mean, *rest = parts
    return Moments(weight, key_mean, value_mean, rest[0].mT if rest else None)


# Decompositions of matrices wait for the device, which a CUDA graph cannot hold: the compiler leaves this operator out
# of its graphs where PyTorch has a tag for it.
TAGS: dict[str, Any] = {}
if hasattr(torch.Tag, "cudagraph_unsafe") and "tags" in inspect.signature(torch.library.custom_op).parameters:
    TAGS["tags"] = (torch.Tag.cudagraph_unsafe,)


@torch.library.custom_op(
    "momentkv::flush",
    mutates_args=("keys", "values", "positions", "score", "counts", "ticks", "parts", "derived"),
    **TAGS,
)
def flush_operator(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    score: torch.Tensor,
    counts: torch.Tensor,
    ticks: torch.Tensor,
    parts: Sequence[torch.Tensor],
    derived: Sequence[torch.Tensor],
    starts: torch.Tensor | None,
    budgets: torch.Tensor,
    seen: torch.Tensor,
    query_mean: torch.Tensor | None,
    query_square: torch.Tensor | None,
    scale: float,
    rules: int,
) -> None:
    """`flush`, with its rules by number."""
    flush(
        keys, values, positions, score, counts, ticks, parts, derived, starts, budgets, seen, query_mean, query_square,
        scale, RULES[rules],
    )  # fmt: skip


@flush_operator.register_fake
def flush_shapes(*arguments: Any) -> None:
    return None


@torch.library.custom_op("momentkv::observe", mutates_args=("score",))
def observe_operator(score: torch.Tensor, logits: torch.Tensor, valid: torch.Tensor | None, rules: int) -> None:
    """Show the policy one query's attention: logits (batch, kv_head, group, 1, capacity), ``valid`` (batch, 1, 1)."""
    weights = torch.softmax(logits.to(score.dtype), dim=-1).nan_to_num(nan=0.0)
    if valid is not None:
        weights = weights * valid[..., None, None]
    score.copy_(RULES[rules].policy.observe(score, weights))


@observe_operator.register_fake
def observe_shapes(*arguments: Any) -> None:
    return None


def flush(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    score: Tensor,
    counts: Tensor,
    ticks: Tensor,
    parts: Sequence[Tensor],
    derived: Sequence[Tensor],
    starts: Tensor | None,
    budgets: Tensor,
    seen: Tensor,
    query_mean: Tensor | None,
    query_square: Tensor | None,
    scale: float,
    rules: Rules,
) -> None:
    """Evict a block of tokens from every row and head that has filled its own, all in place.

    Parameters
    ----------
    keys, values : tensor, shape (batch, kv_head, capacity, d) and (batch, kv_head, capacity, dv), or (n, d) and (n, dv)
        The second form is packed: slots of all heads one after the other, see ``starts``.
    positions : int32 tensor, shape (batch, kv_head, capacity)
        -1 for a free slot.
    score : tensor, shape (batch, kv_head, capacity)
    counts : int32 tensor, shape (batch, kv_head)
        Slots in use, the first of each head.
    ticks : int32 tensor, shape (batch, kv_head)
        What counts would be if no step's token had been padding; a head evicts when this is ``budget + block``.
    parts : sequence of tensor
        Of the moments, see `revive`; none for plain eviction.
    derived : sequence of tensor
        For moments: natural log of the weight and, of order 1, co-moment over weight.
    starts : int64 tensor, shape (batch, kv_head), or None
        First slot of each head where keys and values are packed.
    budgets : int32 tensor, shape (kv_head,)
    seen : int64 tensor, shape ()
    query_mean, query_square : tensor, shape (batch, kv_head, d), or None
    scale : float
    rules : Rules

    Notes
    -----
    Slots are not kept in order of position, so that no more tokens move than were evicted; policies are shown them in
    order. The fold is the operator `momentkv.backends.operators.fold` where moments and dtypes are its own.
    """
    block, capacity = rules.block, positions.shape[-1]
    due = ticks >= budgets + block
    # Free slots last. Positions are int32, so that this is beyond any.
    order = torch.argsort(positions.masked_fill(positions < 0, torch.iinfo(positions.dtype).max), dim=-1, stable=True)
    ordered_keys, ordered_values = (read(x, order, starts) for x in (keys, values))
    ordered_positions, ordered_score = (torch.take_along_dim(x, order, dim=-1) for x in (positions, score))
    window = None
    if query_mean is not None and query_square is not None:
        window = QueryWindow(query_mean, (query_square - query_mean * query_mean).clamp(min=0.0))
    moments = revive(parts, rules) if parts else None
    importance = rules.policy.importance(
        Tokens(
            ordered_keys,
            ordered_values,
            ordered_positions,
            ordered_score,
            known(moments, ordered_keys, ordered_values, rules),
            scale,
            *(window or (None, None)),
        )
    )
    by_rank = ranking(importance, ordered_positions, sinks=rules.sinks, window=rules.window, seen=seen)  # type: ignore[arg-type]
    places = budgets.long()[:, None] + torch.arange(block, device=keys.device)
    places = places.expand(*counts.shape, block)
    # A row whose steps were padding in part has less to evict; free slots, last in rank, fill its block up.
    real = due[..., None] & (places < counts[..., None])
    places = places.clamp(max=capacity - 1)
    victims, sort = torch.take_along_dim(by_rank, places, dim=-1).sort(dim=-1)
    real = torch.take_along_dim(real, sort, dim=-1)
    slots = torch.take_along_dim(order, victims, dim=-1)
    fused = moments is not None and not rules.correction.anchored and keys.dtype in DTYPES and starts is None
    if fused:
        weight, key_mean, value_mean, *rest = parts
        evicted = slots.masked_fill(~real, -1).to(torch.int32)
        matrices = [rest[0], derived[1]] if rest else []
        fold(
            keys, values, positions, score, counts, evicted, weight, derived[0], key_mean, value_mean, *matrices
        )  # fmt: skip
    else:
        if moments is not None:
            k, v = (read(x, slots, starts) for x in (keys, values))
            new = rules.correction.fold(moments, k, v, mask=real, window=window)
            for old, x in zip(parts, laid_out(new, rules), strict=True):
                old.copy_(x)
            for old, x in zip(derived, derive(new, rules), strict=True):
                old.copy_(x)
        close_gaps([keys, values, positions, score], slots, real, counts, due, starts)
    ticks.sub_(due.to(ticks.dtype) * block)
    if not rules.policy.accumulates:
        score.masked_fill_(due[..., None], 0.0)


def read(x: Tensor, slots: Tensor, starts: Tensor | None) -> Tensor:
    """Rows of keys or values by slot, shape (batch, kv_head, m, d), packed or not."""
    if starts is None:
        return torch.take_along_dim(x, slots[..., None], dim=-2)
    # Heads differ in capacity: what lies beyond a head's own is another's, and no token of this one.
    return x[(starts[..., None] + slots).clamp(max=x.shape[0] - 1)]


def known(moments: Any, keys: Tensor, values: Tensor, rules: Rules) -> Moments:
    """What policies know of the tokens evicted so far."""
    return Moments.empty(keys, values, order=0) if moments is None else rules.correction.known(moments)


def laid_out(moments: Any, rules: Rules) -> list[Tensor]:
    """The tensors of moments as `revive` takes them."""
    if rules.correction.anchored:
        return list(moments.arrays().values())
    parts = [moments.weight, moments.key_mean, moments.value_mean]
    return parts if moments.value_key is None else [*parts, moments.value_key.mT]


def derive(moments: Any, rules: Rules) -> list[Tensor]:
    """What decoding reads and can be computed from moments once, at a flush, for all steps that follow."""
    if rules.correction.anchored:
        return []
    log_weight = moments.weight.log()
    if moments.value_key is None:
        return [log_weight]
    return [log_weight, moments.value_key.mT / moments.weight.masked_fill(moments.weight == 0, 1.0)[..., None, None]]


def close_gaps(
    arrays: Sequence[Tensor],
    slots: Tensor,
    real: Tensor,
    counts: Tensor,
    due: Tensor,
    starts: Tensor | None = None,
) -> None:
    """Move the last tokens of each head that is due into the slots that become free; ``arrays[2]`` are positions.

    Parameters
    ----------
    arrays : sequence of tensor, shape (batch, kv_head, capacity, ...), or (n, ...) where packed
    slots : int64 tensor, shape (batch, kv_head, block)
        Distinct slots of each head that is due; those of others mean nothing.
    real : bool tensor, shape (batch, kv_head, block)
        Which of them hold a token that goes.
    counts : int32 tensor, shape (batch, kv_head)
    due : bool tensor, shape (batch, kv_head)
    starts : int64 tensor, shape (batch, kv_head), or None
        Where packed.
    """
    block, capacity = slots.shape[-1], arrays[2].shape[2]
    left = counts.long() - real.sum(-1)
    # The last slots in use, as many as go; the tokens there that stay move to the gaps before them, in order.
    tail = left[..., None] + torch.arange(block, device=slots.device)
    stays = (tail < counts[..., None]) & ~(tail[..., :, None] == slots[..., None, :]).any(-1)
    moving = torch.take_along_dim(tail, torch.argsort((~stays).to(torch.int8), dim=-1, stable=True), dim=-1)
    gap = real & (slots < left[..., None])
    source = torch.take_along_dim(moving, (gap.long().cumsum(-1) - 1).clamp(min=0), dim=-1)
    # Where nothing moves, a slot is written with what it holds: all targets differ.
    idle = torch.arange(block, device=slots.device)
    target = torch.where(due[..., None], slots, idle)
    source = torch.where(gap, source, target)
    for x in arrays:
        if x.ndim == 2:
            first = starts[..., None] if starts is not None else 0
            x.index_copy_(0, (first + target).flatten(), x[(first + source).flatten()])
            continue
        index, origin = (i if x.ndim == 3 else i[..., None].expand(*i.shape, x.shape[-1]) for i in (target, source))
        x.scatter_(2, index, torch.gather(x, 2, origin))
    counts.copy_(left)
    free = torch.arange(capacity, device=slots.device) >= counts[..., None]
    arrays[2].masked_fill_(free, -1)

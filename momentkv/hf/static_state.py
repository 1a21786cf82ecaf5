"""One layer's cache in buffers of constant size and address: decode steps that a graph can hold.

A prefill of any length, and everything else that is rare, is done by `LayerCache` and `RaggedCache`. Between passes
their state is moved here (`StaticState.freeze`): keys and values in buffers of ``budget + block`` slots a head, counts
and positions on the device. A step writes one token at its count, attends and, if the host's clock says so, flushes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from momentkv.backends.operators import DTYPES, decode
from momentkv.backends.plain import decode_counted, decode_plain, unpack
from momentkv.cache.layer import RECENT_QUERIES, LayerCache
from momentkv.cache.ragged import RaggedCache
from momentkv.hf.static_flush import Rules, derive, flush_operator, laid_out, observe_operator, read, revive
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import Summaries

__all__ = ["StaticState", "check_static"]


def check_static(core: LayerCache | RaggedCache) -> None:
    """Raise unless a cache's steps can be done in place."""
    one = core.parts[0]
    if one.certify is not None:
        raise ValueError(
            f"static=True with certify={one.certify}: certificates decide on the host; use static=False for them"
        )
    if one.correction.name not in ("moments", "summaries", "none"):
        raise ValueError(
            f"static=True with the correction {one.correction!r}, whose state has no fixed buffers; use 'moments', "
            "'summaries', 'none', or static=False"
        )
    if one.backend is not None and one.backend.name != "torch":
        raise ValueError(f"static=True with the backend {one.backend.name!r}; use 'torch', or static=False")


class StaticState:
    """Buffers of one layer, and a decode step on them. Everything is changed in place.

    Parameters
    ----------
    core : LayerCache or RaggedCache
        Whose settings it has, and whose state it takes over.

    Attributes
    ----------
    keys, values : tensor, shape (batch, kv_head, capacity, d) and (batch, kv_head, capacity, dv), or (n, d) and (n, dv)
        Finite in free slots, too. The second form is for heads of different budgets, whose slots are packed one head
        after the other, row by row.
    positions : int32 tensor, shape (batch, kv_head, capacity)
        -1 for a free slot.
    score : tensor, shape (batch, kv_head, capacity)
    counts : int32 tensor, shape (batch, kv_head)
        Slots in use, the first of each head, in any order of position.
    ticks : int32 tensor, shape (batch, kv_head)
        What counts would be if no step's token had been padding: it says when a head evicts, so that all do in time.
    starts : int64 tensor, shape (batch, kv_head), or None
        First slot of each head where slots are packed.
    budgets : int32 tensor, shape (kv_head,)
    seen : int64 tensor, shape ()
    query_mean, query_square : tensor, shape (batch, kv_head, d), or None
    parts, derived : list of tensor
        Of the moments; see `momentkv.hf.static_flush`.
    """

    def __init__(self, core: LayerCache | RaggedCache) -> None:
        one = core.parts[0]
        self.rules = Rules(one.policy, one.correction, one.order, one.sinks, one.window, one.block)
        self.observes = one.policy.observes != 0
        self.remembers = one.remembers_queries
        self.scale = 0.0
        self.buffers: dict[str, torch.Tensor] = {}

    def freeze(self, core: LayerCache | RaggedCache) -> list[int]:
        """Take over the state of a cache, whose arrays are let go; into the buffers there are if they fit.

        Returns
        -------
        list of int
            Steps after which a row or head has filled its block, each from 1 to ``block``.
        """
        heads = core.parts
        one = heads[0]
        capacity = max(part.budget for part in heads) + one.block
        packed = min(part.budget for part in heads) + one.block < capacity
        batch = one.keys.shape[0]
        kv_heads = sum(part.keys.shape[1] for part in heads)
        wide = one.moments.weight.dtype
        total = sum(part.budget + one.block for part in heads)
        lead = (batch, total) if packed else (batch, kv_heads, capacity)
        new: dict[str, torch.Tensor] = {
            "keys": one.keys.new_zeros((*lead, one.keys.shape[-1])),
            "values": one.values.new_zeros((*lead, one.values.shape[-1])),
            "positions": one.positions.new_full((batch, kv_heads, capacity), -1),
            "score": one.keys.new_zeros((batch, kv_heads, capacity), dtype=wide),
            "seen": torch.tensor(core.seen, device=one.keys.device),
        }
        counts, budgets = [], []
        start = first = 0
        firsts = []
        for part in heads:
            real = part.positions >= 0
            order = torch.argsort((~real).to(torch.int8), dim=-1, stable=True)
            stop, n = start + part.keys.shape[1], min(order.shape[-1], capacity)
            order = order[..., :n]
            counts.append(real.sum(-1).to(torch.int32))
            budgets += [part.budget] * (stop - start)
            for name in ("keys", "values", "positions", "score"):
                x = getattr(part, name)
                if x is not None:
                    some = torch.take_along_dim(real, order, dim=2)
                    chosen = torch.take_along_dim(x, order if x.ndim == 3 else order[..., None], dim=2)
                    # Padding may hold anything, NaN included.
                    chosen = chosen.masked_fill(
                        ~(some if x.ndim == 3 else some[..., None]), -1 if name == "positions" else 0
                    )
                    if packed and x.ndim == 4:
                        new[name][:, first : first + n] = chosen[:, 0]
                    else:
                        new[name][:, start:stop, :n] = chosen
            firsts.append(first)
            start, first = stop, first + part.budget + one.block
        if packed:
            new |= {name: new[name].flatten(0, 1) for name in ("keys", "values")}
            rows = torch.arange(batch, device=one.keys.device)[:, None] * total
            new["starts"] = rows + torch.tensor(firsts, device=one.keys.device)
        new["counts"] = torch.cat(counts, dim=1)
        new["ticks"] = new["counts"].clone()
        new["budgets"] = torch.tensor(budgets, dtype=torch.int32, device=one.keys.device)
        if self.remembers:
            for name in ("query_mean", "query_square"):
                new[name] = torch.cat([getattr(part, name) for part in heads], dim=1)
        if self.rules.order is not None:
            moments = joined([part.moments for part in heads])
            new |= {f"part{n}": x for n, x in enumerate(laid_out(moments, self.rules))}
            derived = derive(moments, self.rules)
            if len(derived) > 1:  # read at every step: in the dtype that attention reads
                derived[1] = derived[1].to(one.keys.dtype)
            new |= {f"derived{n}": x for n, x in enumerate(derived)}
        waits = (new["budgets"] + one.block - new["counts"]).flatten().tolist()
        if min(waits) < 1:
            raise RuntimeError(f"a cache of budget {core.budget} holds {core.stored} tokens, and should have evicted")
        self.scale = one.attention_scale
        self._take(new)
        core.reset()
        return sorted({(wait - 1) % one.block + 1 for wait in waits})

    def thaw(self, core: LayerCache | RaggedCache) -> None:
        """Give the state back to a cache: what it would hold if it had made the steps itself."""
        buffers = self.buffers
        positions = buffers["positions"]
        last = torch.iinfo(positions.dtype).max
        order = torch.argsort(positions.masked_fill(positions < 0, last), dim=-1, stable=True)
        moments = revive(self.parts, self.rules) if self.parts else None
        start = 0
        for part in core.parts:
            stop = start + (1 if len(core.parts) > 1 else positions.shape[1])
            own = slice(start, stop)
            n = max(int(buffers["counts"][:, own].max()), 1)
            index = order[:, own, :n]
            for name in ("positions", "score"):
                setattr(part, name, torch.take_along_dim(buffers[name][:, own], index, dim=2))
            starts = buffers["starts"][:, own] if "starts" in buffers else None
            for name in ("keys", "values"):
                x = buffers[name] if starts is not None else buffers[name][:, own]
                setattr(part, name, read(x, index, starts))
            if not self.observes:
                part.score = None
            for name in ("query_mean", "query_square"):
                setattr(part, name, buffers[name][:, own].clone() if name in buffers else None)
            part.seen = int(buffers["seen"])
            part.padded = bool((part.positions < 0).any())
            part.moments = part.correction.empty(part.keys, part.values)
            if moments is not None:
                part.moments = moments.map(functools.partial(of_heads, own))
            weight = part.moments.weight
            if moments is None:
                part.has_evicted = bool((part.positions >= 0).sum(-1).max() < part.seen)
            else:
                part.has_evicted = bool((weight > 0).any())
            start = stop

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Write one token into every head's next slot; `attend` says whether it counts."""
        buffers = self.buffers
        place = buffers["counts"].long()[..., None]
        if "starts" in buffers:
            slots = (buffers["starts"][..., None] + place).flatten()
            buffers["keys"].index_copy_(0, slots, k.reshape(-1, k.shape[-1]))
            buffers["values"].index_copy_(0, slots, v.reshape(-1, v.shape[-1]))
            return
        buffers["keys"].scatter_(2, place[..., None].expand(k.shape), k)
        buffers["values"].scatter_(2, place[..., None].expand(v.shape), v)

    def attend(self, q: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
        """Attend from one query a head; ``valid``, bool (batch, 1, 1), is False where its token is padding."""
        buffers = self.buffers
        counts, positions, seen = buffers["counts"], buffers["positions"], buffers["seen"]
        place = counts.long()[..., None]
        newest = seen.to(positions.dtype).expand(place.shape)
        if valid is not None:
            newest = torch.where(valid, newest, -1)
        positions.scatter_(2, place, newest)
        # A slot that padding was written to is the next token's.
        counts.add_(1 if valid is None else valid[..., 0].to(counts.dtype))
        buffers["ticks"].add_(1)
        seen.add_(1)
        k, v, starts = buffers["keys"], buffers["values"], buffers.get("starts")
        expansion, capacity = self.expansion, positions.shape[-1]
        logits = None
        if q.dtype not in DTYPES:
            out, _, logits = decode_plain(q, k, v, None, counts, starts, capacity, expansion, self.scale, self.observes)
        elif q.is_cuda or self.observes:
            out, _, logits = decode(
                q,
                k,
                v,
                expansion,
                scale=self.scale,
                counts=counts,
                starts=starts,
                capacity=capacity,
                scored=self.observes,
            )
        else:
            if starts is not None:
                k, v, _ = unpack(k, v, starts, capacity)
            out = decode_counted(q, k, v, counts, expansion, scale=self.scale)
        if logits is not None:
            score = buffers["score"]
            score.scatter_(2, place, torch.zeros_like(score[..., :1]))
            observe_operator(score, logits, valid, self.rules.number)
        if self.remembers:
            remember_one(q, valid, self.scale, buffers["query_mean"], buffers["query_square"])
        return out

    def flush(self) -> None:
        """Evict a block from every row and head that has filled its own."""
        buffers = self.buffers
        flush_operator(
            buffers["keys"],
            buffers["values"],
            buffers["positions"],
            buffers["score"],
            buffers["counts"],
            buffers["ticks"],
            self.parts,
            self.derived,
            buffers.get("starts"),
            buffers["budgets"],
            buffers["seen"],
            buffers.get("query_mean"),
            buffers.get("query_square"),
            self.scale,
            self.rules.number,
        )

    @property
    def parts(self) -> list[torch.Tensor]:
        """Tensors of the moments."""
        return [x for name, x in self.buffers.items() if name.startswith("part")]

    @property
    def derived(self) -> list[torch.Tensor]:
        """Tensors computed from the moments at each flush."""
        return [x for name, x in self.buffers.items() if name.startswith("derived")]

    @property
    def expansion(self) -> Expansion | None:
        """The estimate of the evicted tokens, as decoding reads it."""
        parts, derived = self.parts, self.derived
        if not parts:
            return None
        if self.rules.correction.anchored:
            _, anchor, log_weight, key_mean, value_mean, variance, left, right, strength, cap = parts
            ranked = right.shape[-2] > 0
            return Expansion(
                log_weight,
                key_mean,
                value_mean,
                anchor=anchor,
                slope_left=left if ranked else None,
                slope_right=right if ranked else None,
                variance=variance,
                strength=strength,
                cap=cap,
            )
        return Expansion(
            derived[0][..., None],
            parts[1][..., None, :],
            parts[2][..., None, :],
            slope=derived[1] if len(derived) > 1 else None,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.nbytes for x in self.buffers.values())

    def select_rows(self, index: torch.Tensor) -> None:
        """Rows by index, in place where their number stays."""
        buffers = self.buffers
        index = index.to(buffers["counts"].device)
        batch = buffers["counts"].shape[0]
        new = {n: x if n in ("budgets", "seen") else x.index_select(0, index) for n, x in buffers.items()
               if n not in ("keys", "values", "starts")}  # fmt: skip
        for name in ("keys", "values"):
            x = buffers[name]
            if "starts" in buffers:
                new[name] = x.reshape(batch, -1, x.shape[-1]).index_select(0, index).flatten(0, 1)
            else:
                new[name] = x.index_select(0, index)
        if "starts" in buffers:
            rows = torch.arange(len(index), device=index.device)[:, None] * (buffers["keys"].shape[0] // batch)
            new["starts"] = rows + buffers["starts"][:1]
        self._take({name: new[name] for name in buffers})

    def _take(self, new: dict[str, torch.Tensor]) -> None:
        """Write into the buffers there are, so that addresses stay; others if shapes, dtypes or devices differ."""
        kinds = {name: (x.shape, x.dtype, x.device) for name, x in new.items()}
        if kinds == {name: (x.shape, x.dtype, x.device) for name, x in self.buffers.items()}:
            for name, x in new.items():
                self.buffers[name].copy_(x)
            return
        self.buffers = {name: x.detach().clone(memory_format=torch.contiguous_format) for name, x in new.items()}
        for x in self.buffers.values():
            torch._dynamo.mark_static_address(x)


def of_heads(own: slice, x: torch.Tensor) -> torch.Tensor:
    """A copy of what some heads hold."""
    return x[:, own].clone()


def joined(each: list[Any]) -> Moments | Summaries:
    """Moments of several heads in one."""
    if len(each) == 1:
        one: Moments | Summaries = each[0]
        return one
    arrays = [moments.arrays() for moments in each]
    whole: Moments | Summaries = type(each[0])(**{n: torch.cat([x[n] for x in arrays], dim=1) for n in arrays[0]})
    return whole


def remember_one(
    q: torch.Tensor, valid: torch.Tensor | None, scale: float, mean: torch.Tensor, square: torch.Tensor
) -> None:
    """`momentkv.cache.layer.remember` for one query a head, in place and in plain operators."""
    batch, kv_heads, d = mean.shape
    grouped = q.to(mean.dtype).reshape(batch, kv_heads, -1, d) * scale
    new_mean, new_square = grouped.mean(dim=2), (grouped * grouped).mean(dim=2)
    # Where all before was padding there is nothing to fade.
    share = torch.where(square.sum(-1, keepdim=True) > 0, 2.0 / RECENT_QUERIES, 1.0).to(mean.dtype)
    if valid is not None:
        share = share * valid
    mean.lerp_(new_mean, share)
    square.lerp_(new_square, share)

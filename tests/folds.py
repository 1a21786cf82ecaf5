"""Cases for the fold operator, and the check of what it did."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from expansions import UNIT_OF, f64

from momentkv.testing import oracle
from momentkv.testing.rounding import assert_same, assert_within, moments_error


@dataclasses.dataclass(frozen=True)
class Fold:
    """Shapes; the numbers follow from a fixed seed. Heads hold and evict different numbers of tokens."""

    d: int = 24
    dv: int = 20
    capacity: int = 50
    block: int = 7
    order: int = 1
    dtype: torch.dtype = torch.float32
    first: bool = False  # nothing was folded before

    def __str__(self) -> str:
        shown = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return (
            ",".join(f"{k}={v}" for k, v in shown.items() if v != getattr(Fold, k)).replace("torch.", "") or "default"
        )


@dataclasses.dataclass
class State:
    """Arguments of the operator, and the tokens that were folded before."""

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor
    score: torch.Tensor
    counts: torch.Tensor
    evicted: torch.Tensor
    weight: torch.Tensor
    log_weight: torch.Tensor
    key_mean: torch.Tensor
    value_mean: torch.Tensor
    key_value: torch.Tensor | None
    slope: torch.Tensor | None
    earlier: tuple[np.ndarray, np.ndarray]

    def arguments(self) -> tuple[torch.Tensor | None, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))[:-1]


def make_fold(case: Fold) -> State:
    """The arguments; slots that are not in use are NaN."""
    rng = np.random.default_rng(3)
    lead = (2, 3)
    counts = rng.integers(0, case.capacity + 1, lead)
    counts.flat[0], counts.flat[1], counts.flat[-1] = case.capacity, 1, 0
    free = torch.from_numpy(np.arange(case.capacity) >= counts[..., None])
    keys = torch.from_numpy(2 + rng.standard_normal((*lead, case.capacity, case.d))).to(case.dtype)
    values = torch.from_numpy(rng.standard_normal((*lead, case.capacity, case.dv))).to(case.dtype)
    positions = torch.arange(case.capacity, dtype=torch.int32).repeat(*lead, 1).masked_fill(free, -1)
    evicted = np.full((*lead, case.block), -1)
    for head in np.ndindex(lead):
        number = min(case.block - (sum(head) % 2), counts[head])
        evicted[head][rng.permutation(case.block)[:number]] = rng.permutation(counts[head])[:number]
    evicted[0, 1] = -1  # has tokens, evicts none
    earlier = (
        rng.standard_normal((*lead, 0 if case.first else 30, case.d)),
        rng.standard_normal((*lead, 0 if case.first else 30, case.dv)),
    )
    sums = oracle.moments(*earlier)
    single = [torch.from_numpy(np.array(x)).float() for x in sums]
    weight, key_mean, value_mean, value_key = single
    key_value = value_key.mT.contiguous() if case.order else None
    return State(
        keys.masked_fill(free[..., None], torch.nan),
        values.masked_fill(free[..., None], torch.nan),
        positions,
        torch.from_numpy(rng.random((*lead, case.capacity))).float(),
        torch.from_numpy(counts.astype(np.int32)),
        torch.from_numpy(evicted.astype(np.int32)),
        weight,
        weight.log(),
        key_mean,
        value_mean,
        key_value,
        None if key_value is None else (key_value / weight.clamp(min=1)[..., None, None]).to(case.dtype),
        earlier,
    )


def check_folded(case: Fold, before: State, after: State) -> None:
    """Moments are those of all tokens that ever left; the others are all there, each with what is its own."""
    for head in np.ndindex(2, 3):
        gone = [slot for slot in before.evicted[head].tolist() if slot >= 0]
        tokens = [np.concatenate([x[head], f64(y[head])[gone]]) for x, y in zip(
            before.earlier, (before.keys, before.values), strict=True
        )]  # fmt: skip
        exact = oracle.moments(*tokens)
        error = moments_error(*tokens, 2.0**-24, merges=2)
        assert float(after.weight[head]) == exact.weight
        if exact.weight:
            assert_within(f64(after.log_weight[head]), np.log(exact.weight), 8 * 2.0**-24 * np.log(exact.weight + 1))
        assert_within(f64(after.key_mean[head]), exact.key_mean, error.key_mean)
        assert_within(f64(after.value_mean[head]), exact.value_mean, error.value_mean)
        if case.order:
            assert after.key_value is not None
            assert after.slope is not None
            co_moment, of_co_moment = exact.value_key.T, error.value_key
            assert_within(f64(after.key_value[head]), co_moment, of_co_moment)
            per_weight = co_moment / max(exact.weight, 1)
            unit = UNIT_OF[case.dtype] + 2.0**-23
            assert_within(
                f64(after.slope[head]), per_weight, of_co_moment / max(exact.weight, 1) + unit * np.abs(per_weight)
            )
        left = int(before.counts[head]) - len(gone)
        assert int(after.counts[head]) == left
        kept = [slot for slot in range(int(before.counts[head])) if slot not in gone]
        moved = after.positions[head][:left].tolist()
        assert sorted(moved) == kept  # a token's position is the slot that it came from
        assert (after.positions[head][left:] == -1).all()
        for slot, origin in enumerate(moved):
            for now, then in zip(
                (after.keys, after.values, after.score), (before.keys, before.values, before.score), strict=True
            ):
                assert_same(now[head][slot].numpy(), then[head][origin].numpy())
        # What stays in its place is not moved.
        assert all(origin == slot or origin >= left for slot, origin in enumerate(moved))

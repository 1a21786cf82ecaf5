"""One row of a cache as its documentation describes it: loops over heads and queries, every token kept on the side.

Moments are never updated but taken afresh from all evicted tokens, so nothing of the library's algebra is used.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import peer_formulas

from momentkv.testing import oracle

# Policies that look at the largest weight, of the group and of all queries.
LARGEST = ("second-reading", "twice")
# Those whose evidence survives an eviction.
KEEPING = ("h2o", *LARGEST)


@dataclasses.dataclass
class Rules:
    """What a policy does, by name; the library's own defaults are passed in by the test."""

    policy: str
    budget: int
    order: int | None = 1
    sinks: int = 1
    window: int = 2
    block: int = 3
    scale: float = 0.5
    observes: int | None = 0
    kernel: int = 5
    lag: int = 32
    rounds: int = 1


class ReferenceRow:
    """`step` takes ``q`` (q_head, m, d), ``k`` (kv_head, m, d), ``v`` and returns (q_head, m, dv)."""

    def __init__(self, rules: Rules, kv_heads: int) -> None:
        self.rules, self.kv_heads = rules, kv_heads
        self.keys: list[np.ndarray] = []  # of every token ever seen, (kv_head, d) each
        self.values: list[np.ndarray] = []
        self.retained: list[list[int]] = [[] for _ in range(kv_heads)]
        self.score: list[dict[int, float]] = [{} for _ in range(kv_heads)]
        self.mean: np.ndarray | None = None  # of recent queries, (kv_head, d)
        self.square: np.ndarray | None = None

    def tokens(self, head: int, positions: list[int]) -> tuple[np.ndarray, np.ndarray]:
        k, v = np.stack(self.keys), np.stack(self.values)
        return k[positions, head], v[positions, head]

    def evicted(self, head: int) -> list[int]:
        return [p for p in range(len(self.keys)) if p not in self.retained[head]]

    def moments(self, head: int) -> oracle.Sums:
        return oracle.moments(*self.tokens(head, self.evicted(head)))

    def step(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        rules, m = self.rules, k.shape[1]
        gone = [self.moments(head) if self.keys and self.evicted(head) else None for head in range(self.kv_heads)]
        first = len(self.keys)
        for i in range(m):
            self.keys.append(k[:, i])
            self.values.append(v[:, i])
            for head in range(self.kv_heads):
                self.retained[head].append(first + i)
                self.score[head][first + i] = 0.0
        group = q.shape[0] // self.kv_heads
        out = np.zeros((*q.shape[:2], v.shape[-1]))
        # By query, by KV head: position -> weight, mean or largest of the group.
        attention: list[list[dict[int, float]]] = []
        for i in range(m):
            attention.append([])
            for head in range(self.kv_heads):
                seen = [p for p in self.retained[head] if p <= first + i]
                keys, values = self.tokens(head, seen)
                queries = q[head * group : (head + 1) * group, i : i + 1]
                state = oracle.attend(queries, keys[None], values[None], rules.scale)
                weights = oracle.softmax(oracle.logits(queries, keys[None], rules.scale))[0][:, 0]
                weights = weights.max(axis=0) if rules.policy in LARGEST else weights.mean(axis=0)
                attention[i].append(dict(zip(seen, weights, strict=True)))
                if rules.order is not None and gone[head] is not None:
                    sums = oracle.Sums(*(x[None] for x in gone[head]))
                    state = oracle.merge(state, oracle.estimate(queries, sums, rules.order, rules.scale))
                out[head * group : (head + 1) * group, i] = state.out[:, 0]
        self.remember(rules.scale * q[:, -32:])
        self.observe(attention)
        self.evict()
        return out

    def remember(self, queries: np.ndarray) -> None:
        """Mean and variance of the last 32 queries of a step; what a shorter one finds fades, a sixteenth a query."""
        share = min(queries.shape[1] / 16, 1.0) if self.mean is not None else 1.0
        grouped = queries.reshape(self.kv_heads, -1, queries.shape[-1])
        mean, square = grouped.mean(axis=1), (grouped**2).mean(axis=1)
        self.mean = mean if share == 1 else (1 - share) * self.mean + share * mean
        self.square = square if share == 1 else (1 - share) * self.square + share * square
        self.queries = list(zip(self.mean, self.square - self.mean**2, strict=True))

    def observe(self, attention: list[list[dict[int, float]]]) -> None:
        """A prefill shows its last queries, a decode step its one; a whole window of them replaces what came before."""
        rules, m = self.rules, len(attention)
        if rules.observes == 0:
            return
        if rules.policy == "tova":
            for head in range(self.kv_heads):
                for p in self.retained[head]:
                    self.score[head][p] = np.mean([attention[-1][other].get(p, 0.0) for other in range(self.kv_heads)])
            return
        last = attention if rules.observes is None else attention[-rules.observes :]
        for head in range(self.kv_heads):
            if m > 1 and rules.observes is not None and m >= rules.observes and rules.policy not in KEEPING:
                self.score[head] = dict.fromkeys(self.score[head], 0.0)
            for query in last:
                for p, weight in query[head].items():
                    before = self.score[head][p]
                    self.score[head][p] = max(before, weight) if rules.policy in LARGEST else before + weight

    def importance(self, head: int) -> np.ndarray:
        rules, held = self.rules, self.retained[head]
        k, v = self.tokens(head, held)
        score = np.array([self.score[head][p] for p in held])
        positions = np.array(held)
        match rules.policy:
            case "streaming":
                return positions.astype(float)
            case "knorm":
                return oracle.knorm(k)
            case "keydiff":
                return oracle.keydiff(k, np.ones(len(held), dtype=bool))
            case "snapkv":
                return oracle.snapkv(score, positions, rules.kernel)
            case "momentkv":
                sums = self.moments(head)
                if rules.order is None:
                    sums = oracle.Sums(*(0 * x for x in sums))
                elif rules.order == 0:
                    sums = sums._replace(value_key=0 * sums.value_key)
                return oracle.momentkv(score, k, v, sums, rules.scale)
            case "attention":
                return oracle.value_aware(score, v)
            case "novelty":
                return oracle.novelty(k, v)
            case "balanced":
                expected = peer_formulas.expected_attention(k, v, *self.queries[head])
                return oracle.balanced(expected, oracle.novelty(k, v), 0.25)
            case "caote":
                return peer_formulas.caote(score, v)
            case "criticalkv":
                return peer_formulas.criticalkv(score, positions, v, kernel=rules.kernel)
            case "lagkv":
                return peer_formulas.lagkv(k, v, rules.lag)
            case "leverage":
                return peer_formulas.leverage(k, v)
            case "expected-attention":
                return peer_formulas.expected_attention(k, v, *self.queries[head])
            case "twice":
                expected = peer_formulas.expected_attention(k, v, *self.queries[head])
                return oracle.balanced(expected, oracle.value_aware(score, v), 0.6)
            case "h2o" | "tova" | "second-reading":
                return score
        raise AssertionError(rules.policy)

    def evict(self) -> None:
        rules, count = self.rules, len(self.retained[0])
        if count < rules.budget + rules.block:
            return
        long = rules.order is not None and count - rules.budget > rules.block
        rounds = rules.rounds if long else 1
        for done in range(1, rounds + 1):
            # Geometric from count to budget.
            target = math.floor(count * (rules.budget / count) ** (done / rounds) + 1e-9)
            target = min(count, max(target, rules.budget))
            kept = []
            for head in range(self.kv_heads):
                held = self.retained[head]
                slots = oracle.retained_slots(self.importance(head), np.array(held), target, rules.sinks, rules.window)
                kept.append([held[j] for j in slots])
            self.retained = kept
        for head in range(self.kv_heads):
            self.score[head] = {p: self.score[head][p] if rules.policy in KEEPING else 0.0 for p in self.retained[head]}

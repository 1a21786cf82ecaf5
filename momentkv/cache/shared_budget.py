"""One total that several layers or KV heads share: who waits for whom, and when it is shared anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from momentkv._array import Array, array_namespace
from momentkv.cache.allocation import budget_grid, least_errors, minimise_error
from momentkv.cache.config import RECENT_QUERIES
from momentkv.cache.curves import measured_errors
from momentkv.cache.joining import evict_together, groups, joined_cache
from momentkv.cache.layer import LayerCache
from momentkv.cache.queries import judges_of
from momentkv.cache.state import LayerState

__all__ = ["AGAIN", "LONGER", "Rule", "SharedBudget"]

# Tokens decoded, or read a few at a time, after which budgets that were shared while decoding are shared anew; and how
# many times as long as it was then a text must be after a prefill, by whose many queries they were shared better.
AGAIN = 64
LONGER = 2

Rule = Callable[[Sequence[LayerCache], Sequence[Array], int, bool], list[int]]


class SharedBudget:
    """Evicts caches together after a prefill, each layer or each KV head to its share of one total.

    Parameters
    ----------
    caches : sequence of LayerCache
        Made with ``keep_queries=True`` and one budget, the average.
    rule : callable
        A function such as `minimise_error` or `by_importance`. Its arguments are the caches that are full, the
        importances of their tokens, the average, and whether heads have shares. It returns a budget for each share.
    by_head : bool
        Whether every KV head has a share of its own, or all heads of a layer one.
    while_decoding : bool
        Whether there is room for the queries that budgets are shared by while decoding.

    Attributes
    ----------
    shares_while_decoding : bool
        Whether budgets are shared while decoding: where errors are measured as well, steps are not static and no
        eviction may be refused.

    Notes
    -----
    Until the last of the caches has attended, each holds all its tokens and the importance of each. So when the layers
    of a model share, a prefill in one piece needs as much memory as the full cache while it lasts. A prefill in chunks
    needs as much as the budget and one chunk. The total is shared again after each chunk. While decoding, or where few
    tokens are read at a time, it is shared first when the budget is full, or the text twice as long as after the last
    prefill that was shared, and then after every 64 tokens: by the newest 32, one query of each KV head for each.
    """

    def __init__(self, caches: Sequence[LayerCache], rule: Rule, *, by_head: bool, while_decoding: bool = True) -> None:
        self.caches = list(caches)
        self.rule, self.by_head = rule, by_head
        budget = self.caches[0].budget
        self.average = budget if isinstance(budget, int) else budget[0]
        self.waiting: list[tuple[LayerCache, Array]] = []  # and importances, of those of which something is to go
        config = self.caches[0].config
        measured = rule is minimise_error and not config.static and config.tolerance is None
        self.shares_while_decoding = while_decoding and measured
        self.share_from(self.average + RECENT_QUERIES)

    def evict(self, cache: LayerCache) -> None:
        """Evict one cache, or, after a prefill, wait for the others and then evict them all, or none."""
        # After a single token, what is due evicts when all have attended: `share_again`.
        again = cache.newest_queries is None and cache.new is not None and judges_of(cache) is not None
        if cache.newest_queries is None and not again:
            self.prepare(cache)
            cache.evict()
            return
        if any(cache is other for other, _ in self.waiting):
            self.waiting = []  # left by a pass that failed
        self.waiting.append((cache, None if again else self.ranked(cache)))
        if len(self.waiting) < len(self.caches):
            return
        waiting, self.waiting = self.waiting, []
        if again:
            self.share_again()
            return
        with self.all_or_nothing():
            self._evict([each for each, _ in waiting], [importance for _, importance in waiting])

    def share_again(self) -> None:
        """Share anew by the queries gathered since the last eviction, and evict every cache down to its budget."""
        with self.all_or_nothing():
            if self.is_ready:
                self.judge([judges_of(each) for each in self.caches])
                return
            for each in self.caches:
                self.prepare(each)
                each.evict()

    def judge(self, judges: Sequence[Array]) -> None:
        """Share by these queries of each cache, and evict; caches that are alike are measured and evicted together."""
        states = [each.stored_state for each in self.caches]
        least, average = self.caches[0].config.protected + 1, self.tokens(self.caches, ())
        grid = budget_grid(average, least, max(each.stored for each in self.caches))
        curves: list[list[list[float]]] = [[] for _ in self.caches]
        waits = any(each.new is not None for each in self.caches)  # several tokens, in no tier yet
        for group in [[i] for i in range(len(states))] if waits else groups_of_layers(self.caches, states):
            whole = joined_cache([self.caches[index] for index in group])
            ranking = whole.importance()  # as at other evictions while decoding: by what is remembered of queries
            queries = [judges[index] for index in group]
            whole.newest_queries = array_namespace(*queries).concat(queries, axis=-3)
            heads = iter(measured_errors(whole, grid, ranking, layers=len(group))[0])
            for index in group:
                curves[index] = [next(heads) for _ in range(states[index].layout.heads)]
        shares = iter(least_errors(self.caches, grid, curves, average, self.by_head))
        for each, state in zip(self.caches, states, strict=True):
            each.budgets = self.budgets_of(state.layout.heads, shares)
        if waits:
            for each in self.caches:
                each.evict(block=1)
        else:
            evict_together(self.caches, block=1)
        self.share_from(self.caches[0].seen + AGAIN)

    @property
    def is_ready(self) -> bool:
        """Whether it is time to share anew, by queries that were gathered, and some cache has to evict."""
        judged = self.can_share and all(judges_of(each) is not None for each in self.caches)
        return judged and any(each.is_due for each in self.caches)

    @property
    def can_share(self) -> bool:
        """Whether what tokens cost is known, so that budgets can be shared while decoding."""
        return True

    @contextmanager
    def all_or_nothing(self) -> Iterator[None]:
        """Take all caches back to what they are now if what is done within fails."""
        before = [each.held() for each in self.caches]
        try:
            yield
        except BaseException:
            for each, held in zip(self.caches, before, strict=True):
                each.go_back(held)
            raise

    def share_from(self, tokens: int) -> None:
        """Let the first eviction be shared that comes after so many tokens, also while decoding."""
        for each in self.caches:
            each.shares_from = tokens if self.shares_while_decoding else None
            if each.state is not None and each.state.judges is not None:
                each.state = each.state.changed(judges=None)

    def prepare(self, cache: LayerCache) -> None:
        """Make ready a cache that evicts by itself, while decoding; nothing to do here."""

    def ranked(self, cache: LayerCache) -> Array:
        """Importances of a cache that waits, or None if nothing of it is to go; what ranked its tokens is let go."""
        if not cache.is_due:
            return None
        importance = self.importance(cache)
        cache.release_queries()
        return importance

    def importance(self, cache: LayerCache) -> Array:
        """What the tokens of a cache are ranked by before anything is shared."""
        return cache.importance()

    def _evict(self, waiting: list[LayerCache], ranked: list[Array]) -> None:
        if not any(each.is_due for each in waiting):
            for each in waiting:
                each.evict()  # nothing goes yet, but the queries are let go
            return
        importances = [self.importance(each) if x is None else x for each, x in zip(waiting, ranked, strict=True)]
        shares = iter(self.rule(waiting, importances, self.tokens(waiting, importances), self.by_head))
        for each, importance in zip(waiting, importances, strict=True):
            each.budgets = self.budgets_of(importance.shape[-2], shares)
            each.evict(importance)
        self.share_from(LONGER * waiting[0].seen)

    def budgets_of(self, heads: int, shares: Iterator[int]) -> list[int]:
        """Those of the next cache, which has so many heads."""
        return [next(shares) for _ in range(heads)] if self.by_head else [next(shares)] * heads

    def tokens(self, waiting: Sequence[LayerCache], importances: Sequence[Array]) -> int:
        """Tokens that each KV head may retain on average."""
        return self.average

    def reset(self) -> None:
        """Back to the average for all."""
        self.waiting = []
        for cache in self.caches:
            cache.budget = self.average
        self.share_from(self.average + RECENT_QUERIES)


def groups_of_layers(caches: Sequence[LayerCache], states: Sequence[LayerState]) -> list[list[int]]:
    """Numbers of caches that are alike, in the number of heads too: errors are parts of what a layer puts out."""
    parts: dict[tuple[int, int], list[int]] = {}
    for number, group in enumerate(groups(caches, states, block=1)):
        for index in group:
            parts.setdefault((number, states[index].layout.heads), []).append(index)
    return list(parts.values())

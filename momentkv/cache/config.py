"""Settings of a layer's cache, checked once and never changed."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Iterable, Sequence
from typing import Any

from momentkv._array import Array
from momentkv._numbers import as_python, flag, is_one_of, whole_number
from momentkv.attention import check_scale
from momentkv.backends import ArrayBackend, get_backend
from momentkv.codes import pair_of_bits
from momentkv.policies import Policy, check_budget, get_policy
from momentkv.statistics.corrections import Correction, get_correction

__all__ = [
    "EXACT_WINDOW",
    "MODEL_DEFAULTS",
    "NO_GRADIENT",
    "RECENT_QUERIES",
    "CacheConfig",
    "exact_tokens",
    "wanted_queries",
]

# What `momentkv.hf.MomentCache` asks of each layer by default, where that is not the default of `LayerCache`.
MODEL_DEFAULTS: dict[str, Any] = {"policy": "balanced", "correction": "summaries", "statistics_bits": 16}

# Queries that the correction is anchored at: the last of a prefill, and while decoding an average that fades at this
# rate. RoPE turns queries, so that an average over many positions says little about the next ones.
RECENT_QUERIES = 32
# What a step says whose arrays would be needed again, and are written over by then.
NO_GRADIENT = (
    "a gradient is asked for, but a static cache changes its buffers in place; run it under torch.no_grad(), or make "
    "the cache with static=False"
)
# Newest tokens of the window that stay exact where retained ones have few bits: an exact one costs as much as four.
EXACT_WINDOW = 8
# Queries of a prefill that expected attention is that of: over so many positions RoPE has turned what turns fast.
NEWEST_QUERIES = 256


@dataclasses.dataclass(frozen=True)
class CacheConfig:
    """What a `momentkv.LayerCache` does, without what it holds; arguments as there, already checked.

    Attributes
    ----------
    policy : Policy
    correction : Correction
    sinks, window, block, exact_window : int
    scale : float or None
    backend : ArrayBackend or None
    keep_queries : bool
    certify : int or None
    tolerance : float or None
    static : bool
    bits : tuple of int, or None
        Of keys and of values.
    statistics_bits : int or None
        16 where the correction rounds its state.
    """

    policy: Policy
    correction: Correction
    sinks: int
    window: int
    block: int
    scale: float | None
    backend: ArrayBackend | None
    keep_queries: bool
    certify: int | None
    tolerance: float | None
    static: bool
    bits: tuple[int, int] | None = None
    statistics_bits: int | None = None
    exact_window: int = EXACT_WINDOW

    def backend_of(self, x: Array) -> ArrayBackend:
        """The backend that was given, or that of the array; an error if the one given is for other arrays."""
        backend = self.backend or get_backend(x)
        if not backend.reads(x):
            raise TypeError(
                f"backend is {backend.name!r}, which does not compute with {type(x).__module__} arrays; leave backend "
                "out, and the arrays choose it"
            )
        return backend

    @property
    def recent(self) -> int:
        """Slots of the recent tier: exact tokens, and the block that is filling."""
        return self.exact + self.block

    @property
    def protected(self) -> int:
        """Tokens of each row that are always retained: sinks and window."""
        return self.sinks + self.window

    @property
    def exact(self) -> int:
        """Those of them that stay as they came, see `exact_tokens`."""
        return self.exact_with(self.bits)

    def exact_with(self, bits: Any) -> int:
        """The same where retained tokens have so many bits; None for those that they come with."""
        return exact_tokens(bits, sinks=self.sinks, window=self.window, exact_window=self.exact_window)

    @property
    def observes(self) -> bool:
        """Whether the policy looks at attention."""
        return self.policy.observes != 0

    @property
    def remembers_queries(self) -> bool:
        """Whether mean and variance of recent queries are kept: for the correction, the policy or both."""
        return self.policy.needs_queries or self.correction.anchored

    @property
    def newest(self) -> int:
        """Queries of a prefill that are kept until its eviction, as far as there are so many."""
        return kept_queries(self.policy)

    @property
    def order(self) -> int | None:
        """Order of the correction; None for plain eviction."""
        return self.correction.order

    @property
    def corrects(self) -> bool:
        """Whether anything stands for evicted tokens."""
        return self.correction.order is not None


def exact_tokens(bits: Any, *, sinks: int, window: int, exact_window: int) -> int:
    """Sinks and newest tokens that stay as they came: the whole window, unless retained tokens have few ``bits``.

    Examples
    --------
    >>> exact_tokens(None, sinks=1, window=32, exact_window=8), exact_tokens(4, sinks=1, window=32, exact_window=8)
    (33, 9)
    """
    return sinks + (window if bits is None else min(window, exact_window))


def kept_queries(policy: Policy) -> int:
    """Queries of a prefill that its eviction takes under a policy, beside those that the policy observes."""
    return NEWEST_QUERIES if policy.needs_queries else RECENT_QUERIES


def wanted_queries(policies: Iterable[str | Policy]) -> int | None:
    """Newest queries of a prefill that all that these policies do takes; None for all of them.

    Examples
    --------
    >>> wanted_queries(["knorm"]), wanted_queries(["snapkv", "balanced"])
    (32, 256)
    """
    found = [get_policy(policy) for policy in policies]
    observed = [policy.observes for policy in found if policy.observes is not None]
    return None if len(observed) < len(found) else max([*observed, *map(kept_queries, found)])


def make_config(
    *,
    policy: str | Policy,
    correction: str | Correction,
    order: int | None,
    sinks: int,
    window: int,
    block: int,
    scale: float | None,
    backend: str | ArrayBackend | None,
    keep_queries: bool,
    certify: int | None,
    tolerance: float | None,
    static: bool,
    bits: int | Sequence[int] | None,
    statistics_bits: int | None,
    exact_window: int,
) -> CacheConfig:
    """Settings of a cache, or an error that names the one that is out of range."""
    counts = {"sinks": sinks, "window": window, "block": block, "exact_window": exact_window}
    sinks, window, block, exact_window = (whole_number(name, value) for name, value in counts.items())
    check_budget(sinks + window + 1, sinks, window)
    if block < 1:
        raise ValueError(f"block is {block}; evict at least one token at a time")
    if exact_window < 0:
        raise ValueError(f"exact_window is {exact_window}; it cannot be negative")
    if certify is not None and not is_one_of((0, 1, 2), certify):
        raise ValueError(f"certify is {certify!r}; use None (no evidence), or its order, 0, 1 or 2")
    if tolerance is not None and (certify is None or not isinstance(tolerance, numbers.Real) or not tolerance >= 0):
        raise ValueError(
            f"tolerance is {tolerance!r} with certify={certify}; it must be at least 0 and needs certify=0, 1 or 2"
        )
    static, keep_queries = flag("static", static), flag("keep_queries", keep_queries)
    if tolerance is not None and static:
        raise ValueError(
            f"tolerance is {tolerance} with static=True; a refused eviction needs room that static steps do not have: "
            "leave one of them out"
        )
    check_scale(scale)
    if backend is not None and not isinstance(backend, (str, ArrayBackend)):
        raise TypeError(
            f"backend is {backend!r}; use the name of one, an ArrayBackend object, or None: the arrays then choose it"
        )
    coded = None if bits is None else pair_of_bits(bits)
    return CacheConfig(
        policy=get_policy(policy),
        correction=get_correction(correction, order=order, bits=statistics_bits),
        sinks=sinks,
        window=window,
        block=block,
        scale=None if scale is None else 1.0 * scale,
        backend=None if backend is None else get_backend(backend),
        keep_queries=keep_queries,
        certify=certify,
        tolerance=tolerance,
        static=static,
        bits=coded,
        statistics_bits=statistics_bits,
        exact_window=exact_window,
    )


def checked_budget(config: CacheConfig, budget: Any) -> int | tuple[int, ...]:
    """A budget for all heads, or one for each, as ints; an error names what is none or does not fit the settings."""
    listed = as_python(budget)
    # What an array holds besides is refused as it was given.
    if not isinstance(budget, Sequence) and isinstance(listed, list) and all(type(each) is int for each in listed):
        budget = listed
    if not isinstance(budget, Sequence) or isinstance(budget, str):
        one = whole_number("budget", budget)
        check_budget(one, config.sinks, config.window)
        return one
    if not budget:
        raise ValueError("budget is empty; give one number, or one for each KV head")
    budgets = tuple(whole_number("budget", each) for each in budget)
    for each in budgets:
        check_budget(each, config.sinks, config.window)
    if config.policy.couples_heads and len(set(budgets)) > 1:
        raise ValueError(
            f"policy is {config.policy.name!r}, which looks across the KV heads of a layer, so that none can have a "
            "budget of its own; give one budget for all heads"
        )
    return budgets

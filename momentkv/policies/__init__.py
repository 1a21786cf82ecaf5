"""Eviction policies: importance of each retained token, and the choice of what to retain."""

from __future__ import annotations

import numbers
from typing import Literal

from momentkv.policies.attention import Attention
from momentkv.policies.balanced import Balanced
from momentkv.policies.base import Policy, Tokens
from momentkv.policies.caote import CAOTE
from momentkv.policies.critical import CriticalKV
from momentkv.policies.expected import ExpectedAttention
from momentkv.policies.h2o import H2O
from momentkv.policies.keydiff import KeyDiff
from momentkv.policies.knorm import Knorm
from momentkv.policies.lagkv import LagKV
from momentkv.policies.leverage import Leverage
from momentkv.policies.momentkv import MomentKV
from momentkv.policies.novelty import Novelty
from momentkv.policies.random import Random
from momentkv.policies.second_reading import SecondReading
from momentkv.policies.select import Selection, check_budget, retain
from momentkv.policies.snapkv import SnapKV
from momentkv.policies.streaming import Streaming
from momentkv.policies.tova import TOVA
from momentkv.policies.twice import Twice

__all__ = [
    "CAOTE",
    "H2O",
    "POLICIES",
    "TOVA",
    "Attention",
    "Balanced",
    "CriticalKV",
    "ExpectedAttention",
    "KeyDiff",
    "Knorm",
    "LagKV",
    "Leverage",
    "MomentKV",
    "Novelty",
    "Policy",
    "PolicyName",
    "Random",
    "SecondReading",
    "Selection",
    "SnapKV",
    "Streaming",
    "Tokens",
    "Twice",
    "check_budget",
    "get_policy",
    "retain",
]

# What type checkers know `POLICIES` by; a test compares the two.
PolicyName = Literal[
    "attention",
    "balanced",
    "caote",
    "criticalkv",
    "expected-attention",
    "h2o",
    "keydiff",
    "knorm",
    "lagkv",
    "leverage",
    "momentkv",
    "novelty",
    "random",
    "second-reading",
    "snapkv",
    "streaming",
    "tova",
    "twice",
]

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        Streaming,
        H2O,
        TOVA,
        SnapKV,
        KeyDiff,
        Knorm,
        Random,
        MomentKV,
        Attention,
        Novelty,
        Balanced,
        CAOTE,
        CriticalKV,
        LagKV,
        Leverage,
        ExpectedAttention,
        SecondReading,
        Twice,
    )
}


def get_policy(policy: str | Policy) -> Policy:
    """A policy by its name, or the given one.

    Raises
    ------
    ValueError
        If no policy has that name, or it observes no number of queries.

    Examples
    --------
    >>> get_policy("snapkv")
    SnapKV(observes=32, kernel=5)
    """
    if isinstance(policy, Policy):
        observes = policy.observes
        if observes is not None and (not isinstance(observes, numbers.Integral) or observes < 0):
            raise ValueError(f"policy is {policy}, whose observes is {observes!r}; use a whole number, or None for all")
        return policy
    if not isinstance(policy, str) or policy not in POLICIES:
        raise ValueError(f"policy is {policy!r}; use one of {', '.join(sorted(POLICIES))}, or a Policy object")
    return POLICIES[policy]()

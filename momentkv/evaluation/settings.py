"""Ways to compress: what the names of a command mean, and how many tokens each way retains at equal bytes."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction
from typing import Any, Literal

from momentkv.cache.accounting import token_equivalents
from momentkv.cache.config import EXACT_WINDOW, RECENT_QUERIES, exact_tokens
from momentkv.codes import AUTO, USUAL, bits_as_text, bits_from_text, order_bytes, record_bytes
from momentkv.hf import MomentCache
from momentkv.hf.building import MEASURED
from momentkv.hf.checks import SHARING, SHARING_BY_HEADS
from momentkv.policies import POLICIES, Policy, get_policy
from momentkv.statistics.corrections import CORRECTIONS, Correction, get_correction

__all__ = [
    "CHOICES",
    "DEFAULT",
    "NAMED",
    "QUARTERS",
    "TRIAL",
    "Setting",
    "bytes_as_tokens",
    "check_evicts",
    "check_quarters",
    "check_unrepeated",
    "empty_cache",
    "moment_tokens",
    "setting_of",
    "settings_grid",
]

# Parts of a decode.
QUARTERS = 4
# What stands behind a method whose retained tokens are as the model stores them, and behind one that tries bits, and
# the share of a second reading, on the last tokens of what it compresses; and how many these are.
FULL, TRIED, TRIAL = "full", "tried", 256
# Query statistics are float32 whatever the cache stores.
STATISTIC_BYTES = 4
# Corrections by the names that the command line has for them: (order, kind, sharing of the budget). What "moments" is
# called here is "order-1".
CHOICES: dict[str, tuple[Any, ...]] = {
    name: (correction.order, name) for name, correction in CORRECTIONS.items() if name != "moments"
} | {
    f"{name}-{sharing}": (CORRECTIONS[name].order, name, sharing)
    for sharing in SHARING
    for name in ("none", "summaries")
    if sharing != "uniform"
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to compress.

    Attributes
    ----------
    policy : str or Policy
    budget : int
        Tokens retained per KV head.
    order, kind : int or None, and str or Correction
        Of the correction; order None for none.
    sharing : str
        Of the budget.
    bits : tuple of int, "auto", or None
        Of keys and values of retained tokens, see `momentkv.codes`.
    method : str
        How a command named it. The name does not make settings different.
    size : int or None
        The budget that was asked for, as the bytes of that many tokens, if it was.
    trial : int
        Tokens at the end of a context that ways to compress are tried on, see `momentkv.hf.trial`.
    """

    policy: str | Policy
    budget: int
    order: int | None
    kind: str | Correction = "moments"
    sharing: str = "uniform"
    bits: tuple[int, int] | Literal["auto"] | None = None
    method: str = dataclasses.field(default="", compare=False)
    size: int | None = dataclasses.field(default=None, compare=False)
    trial: int = 0

    @property
    def policy_name(self) -> str:
        """Name of the policy, with its parameters where they are not the default ones."""
        policy = get_policy(self.policy)
        return policy.name if policy == get_policy(policy.name) else repr(policy)

    @property
    def correction(self) -> str:
        """How the correction is called in tables."""
        used = get_correction(self.kind, order=self.order)
        name = next((name.replace("-", " ") for name, one in CORRECTIONS.items() if one == used), repr(used))
        name = name if self.sharing == "uniform" else f"{name}, by {self.sharing}"
        if self.bits is None:
            return name
        if self.trial:
            return f"{name}, {TRIED} bits"
        return f"{name}, {self.bits if isinstance(self.bits, str) else bits_as_text(self.bits)} bits"


# `MomentCache(model)`, but for its budget.
DEFAULT = Setting("balanced", 0, 1, "summaries", "heads", method="default")
# After a second reading: what momentkv does, the same without a correction, and KVzip.
NAMED = {
    setting.method: setting
    for setting in (
        DEFAULT,
        Setting("twice", 0, 1, "summaries", "heads", method="twice"),
        Setting("twice", 0, None, "none", "heads", method="twice/none"),
        Setting("second-reading", 0, None, "none", "kvzip", method="kvzip/none"),
    )
}


def setting_of(method: str) -> Setting:
    """The setting that a method names, without a budget yet.

    Parameters
    ----------
    method : str
        ``"default"``, what `MomentCache` does by default; ``"twice"`` and ``"twice/none"``, after a second reading with
        the default correction and with none; ``"kvzip/none"``; or a policy and a correction as in ``"snapkv/none"``;
        behind it the bits of retained tokens, as in ``"default@4"`` or, of keys and values, ``"default@4/3"``, or
        ``"default@auto"``, by measured error, or ``"default@tried"``, by a trial on the last tokens of a context, or
        ``"default@full"``, as the model stores them.

    Raises
    ------
    ValueError
        If it names neither.

    Examples
    --------
    >>> setting_of("snapkv/order-1").correction, setting_of("default") == DEFAULT
    ('order 1', True)
    >>> setting_of("default@4").correction
    'summaries, by heads, 4 bits'
    >>> setting_of("default@full") == setting_of("default")
    True
    """
    name, _, coded = method.partition("@")
    if coded:
        if coded == TRIED:
            return dataclasses.replace(setting_of(f"{name}@{AUTO}"), trial=TRIAL, method=method)
        try:
            bits = None if coded == FULL else bits_from_text(coded)
        except ValueError as error:
            raise ValueError(f"methods has {method!r}, whose {error}, {TRIED} or {FULL}") from None
        return dataclasses.replace(setting_of(name), bits=bits, method=method)
    if method in NAMED:
        return NAMED[method]
    policy, _, correction = method.partition("/")
    if policy not in POLICIES or correction not in CHOICES:
        raise ValueError(
            f"methods has {method!r}; use {', '.join(NAMED)}, or POLICY/CORRECTION, a policy of {', '.join(POLICIES)} "
            f"and a correction of {', '.join(CHOICES)}; either with @ and the bits of retained tokens behind it"
        )
    return dataclasses.replace(Setting(policy, 0, *CHOICES[correction]), method=method)


def moment_tokens(model: Any, setting: Setting, *, itemsize: int | None = None, decodes: bool = False) -> int:
    """Retained tokens per KV head that a setting's correction and query statistics cost, rounded up.

    Parameters
    ----------
    model : PreTrainedModel
    setting : Setting
    itemsize : int, optional
        Bytes of one number of the keys and values that tokens are counted in; by default what the model stores.
        Statistics are counted as they are stored.
    decodes : bool
        Whether tokens are decoded, so that the queries count which budgets are then shared by: half a token each, for
        they have the numbers of keys.
    """
    itemsize = itemsize or model.dtype.itemsize
    cost = token_equivalents(
        setting.kind, order=setting.order, d=head_dim(model), itemsize=itemsize, statistics_bits=16
    )
    counted, needed = (
        get_correction(setting.kind, order=setting.order).anchored,
        get_policy(setting.policy).needs_queries,
    )
    if needed and not counted:
        cost += STATISTIC_BYTES / itemsize  # mean and variance are as many numbers as a token has
    if setting.bits is not None:
        cost += 1.5  # mean and deviation of every channel of keys, deviation of every one of values
        if counted or needed:
            d, bits = head_dim(model), USUAL if isinstance(setting.bits, str) else setting.bits
            cost += order_bytes(bits[0], d) / (2 * d * itemsize)
    if decodes and setting.sharing in MEASURED:
        cost += RECENT_QUERIES / 2
    return math.ceil(cost)


def bytes_as_tokens(
    model: Any,
    setting: Setting,
    *,
    itemsize: int | None = None,
    sinks: int = 1,
    window: int = 32,
    exact_window: int = EXACT_WINDOW,
) -> int:
    """Tokens per KV head whose bytes a setting's cache takes, rounded up; see `moment_tokens`."""
    if setting.size is not None:
        return setting.size
    exact = exact_tokens(setting.bits, sinks=sinks, window=window, exact_window=exact_window)
    exact = min(setting.budget, exact)
    share = record_share(model, setting, itemsize=itemsize)
    tokens = exact + math.ceil((setting.budget - exact) * share)
    return tokens + moment_tokens(model, setting, itemsize=itemsize)


def record_share(model: Any, setting: Setting, *, itemsize: int | None = None) -> Fraction:
    """Bytes of a retained token's record as a share of those of its keys and values.

    If bits are chosen by measured error, a cache's budget is in tokens of the model's own dtype.
    """
    if setting.bits is None:
        return Fraction(1)
    if isinstance(setting.bits, str):
        return Fraction(model.dtype.itemsize, itemsize or model.dtype.itemsize)
    d = head_dim(model)
    return Fraction(record_bytes(d, d, setting.bits), 2 * d * (itemsize or model.dtype.itemsize))


def head_dim(model: Any) -> int:
    """Dimension of a head."""
    config = model.config.get_text_config(decoder=True)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def settings_grid(
    model: Any,
    policies: Iterable[str | Policy],
    budgets: Iterable[int],
    corrections: Iterable[tuple[Any, ...]],
    *,
    itemsize: int | None = None,
    sinks: int = 1,
    window: int = 32,
    exact_window: int = EXACT_WINDOW,
    decodes: bool = False,
) -> list[Setting]:
    """All combinations, at equal bytes.

    A correction is what `Setting` takes after the budget: order, kind and, optionally, sharing and bits. A budget
    ``B`` means the bytes of ``B`` tokens per KV head (on average, where it is shared), whose numbers have ``itemsize``
    bytes, by default as the model stores them; what a correction costs is taken from the tokens that it retains. With
    few bits, that many bytes hold more tokens, except for sinks and the newest tokens, which are exact. Combinations
    that would retain fewer
    than sinks, window and one are left out, and so are budgets by heads for policies that look across heads. With
    ``decodes``, what decoding adds is counted as well: see `moment_tokens`.

    Raises
    ------
    ValueError
        If that leaves none.
    """
    grid, budgets, coupled, least = list[Setting](), list(budgets), "", sinks + window + 1
    most = 0
    for budget in budgets:
        for policy in policies:
            for correction in corrections:
                setting = Setting(policy, budget, *correction)
                exact = exact_tokens(setting.bits, sinks=sinks, window=window, exact_window=exact_window)
                beside = budget - moment_tokens(model, setting, itemsize=itemsize, decodes=decodes) - exact
                tokens = exact + math.floor(beside / record_share(model, setting, itemsize=itemsize))
                most = max(most, tokens)
                if tokens >= least and setting.sharing in SHARING_BY_HEADS and get_policy(policy).couples_heads:
                    coupled = get_policy(policy).name
                elif tokens >= least:
                    grid.append(dataclasses.replace(setting, budget=tokens, size=budget))
    if not grid and coupled:
        raise ValueError(
            f"policy is {coupled!r}, which looks across heads, so that they cannot have budgets of their own; share "
            "the budget among layers, or not at all"
        )
    if not grid:
        raise ValueError(
            f"budget is {max(budgets)}, whose bytes hold {max(0, most)} tokens beside the statistics, at least {least} "
            "must be retained (sinks, window and one); use a larger budget"
        )
    return grid


def empty_cache(
    model: Any,
    setting: Setting,
    *,
    sinks: int = 1,
    window: int = 32,
    exact_window: int = EXACT_WINDOW,
    block: int = 1,
    rollback: int = 64,
) -> MomentCache:
    """A cache of a setting that has read nothing.

    After `activate_past_recording` up to ``rollback`` tokens can be read before anything more is evicted.
    """
    sharing: Any = setting.sharing  # checked there
    return MomentCache(
        model,
        setting.budget,
        policy=get_policy(setting.policy),
        correction=get_correction(setting.kind, order=setting.order),
        sharing=sharing,
        sinks=sinks,
        window=window,
        exact_window=exact_window,
        block=block,
        rollback=rollback,
        bits=setting.bits,
    )


def check_evicts(options: argparse.Namespace) -> None:
    """Raise if a budget has room for the whole context, so that there is nothing to measure."""
    if options.budget >= options.context:
        raise ValueError(
            f"budget is {options.budget}, but the context has {options.context} tokens, none of which would be "
            "evicted; use a smaller one"
        )


def check_unrepeated(options: argparse.Namespace) -> None:
    """Raise if an option that takes several values has one of them twice."""
    for option in ("budgets", "policies", "corrections", "lengths", "depths", "question"):
        values = getattr(options, option, None) or ()
        for at, value in enumerate(values):
            if value in values[:at]:
                raise ValueError(f"{option} has {value} twice; name it once")


def check_quarters(options: argparse.Namespace) -> None:
    """Raise if there are fewer following tokens than parts of a decode, each of which has a number of its own."""
    if options.following < QUARTERS:
        raise ValueError(
            f"following is {options.following}, but each quarter of a decode has a number of its own; use at least "
            f"{QUARTERS}"
        )

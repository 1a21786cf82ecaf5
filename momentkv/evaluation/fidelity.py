"""Fidelity: how far a compressed cache moves the next-token distributions of a real text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch

from momentkv.cache.accounting import token_equivalents
from momentkv.cache.config import wanted_queries
from momentkv.codes import bits_as_text, bits_from_text, record_bytes
from momentkv.evaluation.capture import CaptureCache, capture_again, replay
from momentkv.evaluation.errors import head_errors
from momentkv.hf import MomentCache
from momentkv.hf.checks import SHARING, SHARING_BY_HEADS
from momentkv.policies import POLICIES, Policy, get_policy
from momentkv.statistics.corrections import CORRECTIONS, Correction, get_correction

__all__ = [
    "CHOICES",
    "DEFAULT",
    "NAMED",
    "Fidelity",
    "Setting",
    "bytes_as_tokens",
    "compare",
    "empty_cache",
    "measure",
    "moment_tokens",
    "setting_of",
    "settings_grid",
]

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
        How a command named it; settings are the same whatever they were called.
    size : int or None
        Tokens in whose bytes the budget was asked for, where it was.
    """

    policy: str | Policy
    budget: int
    order: int | None
    kind: str | Correction = "moments"
    sharing: str = "uniform"
    bits: tuple[int, int] | Literal["auto"] | None = None
    method: str = dataclasses.field(default="", compare=False)
    size: int | None = dataclasses.field(default=None, compare=False)

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
        ``"default@auto"``, by measured error.

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
    """
    name, _, coded = method.partition("@")
    if coded:
        return dataclasses.replace(setting_of(name), bits=bits_from_text(coded), method=method)
    if method in NAMED:
        return NAMED[method]
    policy, _, correction = method.partition("/")
    if policy not in POLICIES or correction not in CHOICES:
        raise ValueError(
            f"methods has {method!r}; use {', '.join(NAMED)}, or POLICY/CORRECTION, a policy of {', '.join(POLICIES)} "
            f"and a correction of {', '.join(CHOICES)}; either with @ and the bits of retained tokens behind it"
        )
    return dataclasses.replace(Setting(policy, 0, *CHOICES[correction]), method=method)


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Comparison of two sets of next-token distributions, averaged over positions.

    Attributes
    ----------
    kl : float
        KL(full || compressed) in nats.
    top1 : float
        Share of positions with the same most likely token.
    nll_change : float
        Change of the negative log-likelihood of the text's own next token, in nats.
    head_error, head_error_p90, head_error_p99 : float or None
        Mean and percentiles, over layers, heads and queries, of the relative error of attention's output, each head
        fed from the full cache; None where it was not measured.
    """

    kl: float
    top1: float
    nll_change: float
    head_error: float | None = None
    head_error_p90: float | None = None
    head_error_p99: float | None = None


def compare(full: torch.Tensor, compressed: torch.Tensor, targets: torch.Tensor) -> Fidelity:
    """Compare logits, both (positions, vocabulary), given the true next tokens (positions,).

    Examples
    --------
    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> compare(logits, logits, torch.tensor([1])).kl
    0.0
    """
    log_p, log_q = (torch.log_softmax(x.double(), dim=-1) for x in (full, compressed))
    chosen = targets[:, None]
    return Fidelity(
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        top1=float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()),
        nll_change=float((log_p.gather(-1, chosen) - log_q.gather(-1, chosen)).mean()),
    )


def moment_tokens(model: Any, setting: Setting, *, itemsize: int | None = None) -> int:
    """Retained tokens per KV head that a setting's correction and query statistics cost, rounded up.

    Parameters
    ----------
    model : PreTrainedModel
    setting : Setting
    itemsize : int, optional
        Bytes of one number of the keys and values that tokens are counted in; by default what the model stores.
        Statistics are counted as they are stored.
    """
    itemsize = itemsize or model.dtype.itemsize
    cost = token_equivalents(
        setting.kind, order=setting.order, d=head_dim(model), itemsize=itemsize, statistics_bits=16
    )
    counted = get_correction(setting.kind, order=setting.order).anchored
    if get_policy(setting.policy).needs_queries and not counted:
        cost += STATISTIC_BYTES / itemsize  # mean and variance are as many numbers as a token has
    if setting.bits is not None:
        cost += 1.5  # mean and deviation of every channel of keys, deviation of every one of values
    return math.ceil(cost)


def bytes_as_tokens(
    model: Any, setting: Setting, *, itemsize: int | None = None, sinks: int = 1, window: int = 32
) -> int:
    """Tokens per KV head whose bytes a setting's cache takes, rounded up; see `moment_tokens`."""
    if setting.size is not None:
        return setting.size
    exact = min(setting.budget, sinks + window)
    share = record_share(model, setting, itemsize=itemsize)
    tokens = exact + math.ceil((setting.budget - exact) * share)
    return tokens + moment_tokens(model, setting, itemsize=itemsize)


def record_share(model: Any, setting: Setting, *, itemsize: int | None = None) -> Fraction:
    """Bytes of a retained token's record as a share of those of its keys and values.

    Where bits are chosen by measured error, a cache's budget is in tokens of the model's own dtype.
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
    least: int = 34,
    itemsize: int | None = None,
) -> list[Setting]:
    """All combinations, at equal bytes.

    A correction is what `Setting` takes after the budget: order, kind and, optionally, sharing and bits. A budget
    ``B`` means the bytes of ``B`` tokens per KV head (on average, where it is shared), whose numbers have ``itemsize``
    bytes, by default as the model stores them; what a correction costs is taken from the tokens that it retains. Tokens
    of few bits are as many more, but for sinks and window, which are exact. Combinations that would retain fewer than
    ``least`` tokens, which is sinks, window and one, are left out, and so are budgets by heads for policies that look
    across heads.

    Raises
    ------
    ValueError
        If that leaves none.
    """
    grid, budgets, coupled, exact = [], list(budgets), "", least - 1
    for budget in budgets:
        for policy in policies:
            for correction in corrections:
                setting = Setting(policy, budget, *correction)
                beside = budget - moment_tokens(model, setting, itemsize=itemsize) - exact
                tokens = exact + math.floor(beside / record_share(model, setting, itemsize=itemsize))
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
            f"budget is {max(budgets)}, but at least {least} tokens must be retained beside what a correction costs; "
            "use a larger one"
        )
    return grid


def empty_cache(
    model: Any, setting: Setting, *, sinks: int = 1, window: int = 32, block: int = 1, rollback: int = 64
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
        block=block,
        rollback=rollback,
        bits=setting.bits,
    )


@torch.inference_mode()
def measure(
    model: Any,
    ids: torch.Tensor,
    context: int,
    settings: Iterable[Setting],
    *,
    sinks: int = 1,
    window: int = 32,
    errors_every: int = 0,
    tokenizer: Any = None,
) -> Iterator[tuple[Setting, Fidelity, int]]:
    """Compress a context in many ways and compare the next-token distributions over the tokens that follow.

    Protocol: the context is prefilled in one pass and cut to the budget; the following tokens are teacher-forced in
    one pass (each sees the retained tokens, the moments and the following tokens before it; nothing more is evicted).

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="momentkv"`` and full attention in every layer.
    ids : int tensor, shape (1, context + T + 1)
    context : int
        Tokens to compress; ``T`` predictions are compared.
    settings : iterable of Setting
    sinks, window : int
    errors_every : int
        Measure the error of every head at one in so many following tokens; 0 for not at all.
    tokenizer : PreTrainedTokenizer, optional
        For policies that look at a second reading: it reads what the model is asked.

    Yields
    ------
    setting : Setting
    fidelity : Fidelity
    nbytes : int
        Bytes of the compressed cache after the context.
    """
    settings = list(settings)
    ids = ids.to(model.device)
    captured = CaptureCache(model, wanted_queries(setting.policy for setting in settings))
    model(ids[:, :context], past_key_values=captured, logits_to_keep=1)
    if errors_every:
        for layer in captured.capture_layers.values():
            layer.keep = None  # of the following tokens
    queries = {index: layer.queries for index, layer in captured.capture_layers.items()}
    following, targets = ids[:, context:-1], ids[0, context + 1 :]
    full = model(following, past_key_values=captured).logits[0]
    attended = captured.attended()
    # The reference pass has appended its own tokens and queries; take both back.
    for index, layer in captured.capture_layers.items():
        layer.keys, layer.values = layer.keys[:, :, :context], layer.values[:, :, :context]
        layer.queries = queries[index]
    if any(get_policy(setting.policy).rereads for setting in settings):
        capture_again(model, captured, ids[:, :context], tokenizer)
    for setting in settings:
        cache = replay(captured, empty_cache(model, setting, sinks=sinks, window=window, rollback=following.shape[1]))
        nbytes = cache.nbytes
        percentiles = {}
        if errors_every:
            error = head_errors(attended, cache, context, every=errors_every).corrected
            p90, p99 = np.quantile(error, [0.9, 0.99])
            percentiles = {
                "head_error": float(error.mean()),
                "head_error_p90": float(p90),
                "head_error_p99": float(p99),
            }
        # No later token would see what is evicted after these, so that need not be worked out.
        cache.activate_past_recording()
        logits = model(following, past_key_values=cache).logits[0]
        yield setting, dataclasses.replace(compare(full, logits, targets), **percentiles), nbytes

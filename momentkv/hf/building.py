"""From a model's configuration and a budget to the layers of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer, get_layer_types_and_kwargs

from momentkv._numbers import as_python
from momentkv.backends import get_backend
from momentkv.cache.allocation import minimise_error, pyramid_budgets
from momentkv.cache.budget_rules import BudgetRule, Share, TotalBytes, bytes_beside, parse_budget
from momentkv.cache.coded_budget import CodedBudget
from momentkv.cache.competition import by_importance
from momentkv.cache.config import RECENT_QUERIES
from momentkv.cache.layer import LayerCache
from momentkv.cache.second_reading import RereadBudget, by_threshold
from momentkv.codes import AUTO
from momentkv.hf.checks import SHARING_BY_HEADS, check_sharing, refuse_layer_type
from momentkv.hf.layer import MomentLayer
from momentkv.policies import Twice, get_policy

__all__ = ["Plan", "apply_rule", "kv_heads", "layer_kinds", "layer_windows", "shared_budgets"]

# The default for a budget in bytes; for one in tokens there is none.
BY_BUDGET = "by budget"
# Rules that measure errors.
MEASURED = ("layers", "heads", "layer-heads")
SLIDING_TYPES = ("sliding_attention", "chunked_attention")


class Plan:
    """What the layers of a cache are to be.

    Parameters
    ----------
    config : PretrainedConfig
        Of the text decoder.
    budget, sharing
        As `momentkv.hf.MomentCache` takes them.
    ranks : int
        Of a tensor-parallel model.
    settings : dict
        What `LayerCache` takes beside its budget.

    Attributes
    ----------
    sharing : str
    rule : BudgetRule or None
        What turns the budget into tokens, when the first tokens arrive.
    least : int
        The smallest budget.
    budget : int, float, str or list of int
        As it was given.
    """

    def __init__(self, config: Any, budget: Any, sharing: str | None, ranks: int, settings: dict[str, Any]) -> None:
        self.config, self.ranks, self.kinds = config, ranks, layer_kinds(config)
        backend = settings["backend"]
        if backend is not None and not get_backend(backend).reads(torch.empty(0)):
            raise ValueError(
                f"backend is {backend!r}, which does not compute with torch tensors; leave it out, or use 'torch'"
            )
        sinks, window, static = settings["sinks"], settings["window"], settings["static"]
        self.least = sinks + window + 1
        # As it is written into files.
        budget = self.budget = as_python(budget)
        asked = parse_budget(budget)
        if static and isinstance(asked, TotalBytes):
            raise ValueError(
                f"static=True with a budget of {budget!r}: buffers are sized in tokens; give it in tokens (with "
                f"bits={AUTO!r}, the bytes of so many are spent on more tokens of fewer bits)"
            )
        self.rule = asked if isinstance(asked, BudgetRule) else None
        given = self.least if isinstance(asked, BudgetRule) else asked
        budgets = [given] * len(self.kinds) if isinstance(given, int) else given
        if len(budgets) != len(self.kinds):
            raise ValueError(
                f"budget has {len(budgets)} entries but the model has {len(self.kinds)} layers; give one for each"
            )
        if sharing is None:
            shared = "layers" if get_policy(settings["policy"]).couples_heads else "heads"
            sharing = shared if isinstance(given, int) else "uniform"
        check_sharing(sharing, given)
        if sharing == "pyramid":
            if self.rule is not None:
                raise ValueError(f'budget is {budget!r}, but sharing="pyramid" needs one in tokens')
            budgets = pyramid_budgets(budgets[0], len(self.kinds), sinks=sinks, window=window)
        self.sharing, self.budgets = sharing, budgets
        self.settings = settings | {"keep_queries": is_shared(sharing)}
        bits = settings["bits"]
        if isinstance(bits, str) and bits == BY_BUDGET:
            free = sharing in MEASURED and settings["certify"] is None
            bits = AUTO if isinstance(asked, TotalBytes) and free else None
        self.settings["bits"], self.chooses_bits = bits, isinstance(bits, str)
        if self.chooses_bits:
            if bits != AUTO:
                raise ValueError(f"bits is {bits!r}; use a number, two of them, {AUTO!r} or None")
            if sharing not in MEASURED:
                raise ValueError(
                    f"bits is {AUTO!r} with sharing={sharing!r}, which does not measure errors; use sharing of "
                    f"{', '.join(MEASURED)}, or give a number of bits"
                )
            self.settings["bits"] = None  # until tokens no longer fit as they come

    def layers(self, rollback: int) -> list[Any]:
        """A layer of the cache for each of the model."""
        return [self.layer(index, rollback) for index in range(len(self.kinds))]

    def layer(self, index: int, rollback: int) -> Any:
        """A `MomentLayer` where the model attends to everything, a stock layer where it has a window."""
        kind, kwargs = self.kinds[index]
        if kind in SLIDING_TYPES:
            if self.settings["static"]:
                raise ValueError(
                    f"static=True, but layer {index} of this {self.config.model_type} model is of type {kind!r}, whose "
                    "stock cache counts on the host; use static=False"
                )
            return DynamicSlidingWindowLayer(**kwargs)
        if kind != "full_attention":
            refuse_layer_type(self.config, index, kind, ("full_attention", *SLIDING_TYPES))
        budget: Any = self.budgets[index]
        if self.sharing in SHARING_BY_HEADS:
            budget = [budget] * (kv_heads(self.config, index) // self.ranks)
            policy = get_policy(self.settings["policy"])
            if policy.couples_heads:
                raise ValueError(
                    f"policy is {policy.name!r}, which looks across the KV heads of a layer, so that none can have a "
                    'budget of its own; use sharing="layers" or "uniform"'
                )
        return MomentLayer(LayerCache(budget, **self.settings), rollback)


def is_shared(sharing: str) -> bool:
    """Whether budgets are shared anew after every prefill."""
    return sharing not in ("uniform", "pyramid")


def shared_budgets(layers: Sequence[MomentLayer], plan: Plan) -> list[CodedBudget]:
    """The totals that layers share, each known to its layers."""
    sharing = plan.sharing
    if not is_shared(sharing) or not layers:
        return []
    groups = [list(layers)] if sharing in ("layers", "heads", "kvzip") else [[layer] for layer in layers]
    rule = {"ada-kv": by_importance, "kvzip": by_threshold}.get(sharing, minimise_error)
    rereads = isinstance(layers[0].core.config.policy, Twice) and sharing in ("heads", "layer-heads")
    totals: list[CodedBudget] = []
    # A budget in bytes has no room for more queries.
    options = {"chooses_bits": plan.chooses_bits, "while_decoding": not isinstance(plan.rule, TotalBytes)}
    for group in groups:
        cores = [layer.core for layer in group]
        by_head = sharing in SHARING_BY_HEADS
        if rereads:
            totals.append(RereadBudget(cores, **options))
        else:
            totals.append(CodedBudget(cores, rule, by_head=by_head, **options))
        for layer in group:
            layer.sharing = totals[-1]
    return totals


def apply_rule(cache: Any, index: int, k: Any, v: Any) -> None:
    """Turn a budget that is not in tokens into tokens, as keys and values arrive at the first layer that has one.

    Raises
    ------
    ValueError
        If a budget is in bytes and has no room for the least one, or layers have not the heads that it was divided by.
    """
    rule, layers = cache.rule, cache.passes.moments
    if rule is None or not layers:
        return
    seen, new, tokens = int(cache.passes.length), k.shape[2], 0
    if cache.layers[index] is not layers[0]:
        if isinstance(rule, TotalBytes) and not seen:
            check_alike(cache, rule, index, k, v)
        return
    if isinstance(rule, TotalBytes):
        if seen:
            return
        config = layers[0].core.config
        coded = [shared for shared in cache.shared_budgets if shared.chooses_bits]
        tokens = rule.tokens(config, len(layers), k, v, bytes_of_windows(cache, k, v), whole=bool(coded))
        for shared in coded:
            shared.beside = bytes_beside(config, k, v)
    elif isinstance(rule, Share):
        if seen and (new == 1 or (layers[0].record_past and new < RECENT_QUERIES)):
            return  # decoding, or a few guessed tokens
        tokens = rule.tokens(seen + new, cache.least)
    before = tokens
    for shared in cache.shared_budgets:
        before, shared.average = shared.average, tokens
    if cache.shared_budgets and seen and new >= RECENT_QUERIES:
        return  # each has its share, until the eviction that is to come shares anew
    for layer in layers:
        budget = layer.core.budget
        if cache.shared_budgets and seen:  # too few queries to share anew: shares grow alike
            alike = partial(of_another_average, before=before, now=tokens, least=cache.least)
            budget = alike(budget) if isinstance(budget, int) else [alike(x) for x in budget]
        else:
            budget = tokens if isinstance(budget, int) else [tokens] * len(budget)
        layer.core.budget = budget


def of_another_average(budget: int, *, before: int, now: int, least: int) -> int:
    """A head's share when the average is another: as much more, or so much less that no head falls below the least.

    It is less where tokens were taken back, and fewer are read in their place.

    Examples
    --------
    >>> [of_another_average(budget, before=40, now=60, least=34) for budget in (34, 40, 46)]
    [51, 60, 69]
    >>> [of_another_average(budget, before=40, now=37, least=34) for budget in (34, 40, 46)]
    [34, 37, 40]
    """
    if now >= before:
        return budget * now // before
    return least + (budget - least) * (now - least) // (before - least)


def bytes_of_windows(cache: Any, k: Any, v: Any) -> int:
    """Bytes that layers with sliding windows store at most; those that have not come yet are like the last, or this."""
    total, token = 0, slot_bytes(k, v)
    for layer in cache.layers:
        if isinstance(layer, DynamicSlidingWindowLayer):
            token = slot_bytes(layer.keys, layer.values) if layer.is_initialized else token
            total += (layer.sliding_window - 1) * token
    return total


def slot_bytes(k: Any, v: Any) -> int:
    """Bytes of a token's keys and values, all rows and heads."""
    return sum(x.shape[0] * x.shape[1] * x.shape[3] * x.element_size() for x in (k, v))


def check_alike(cache: Any, rule: TotalBytes, index: int, k: Any, v: Any) -> None:
    """Raise if a layer has larger keys or values than those of its kind by which a budget in bytes was divided."""
    first = next(each for each in cache.layers if isinstance(each, MomentLayer))
    if index < cache.layers.index(first):
        return  # nothing has been divided yet
    sliding = isinstance(cache.layers[index], DynamicSlidingWindowLayer)
    alike = [each for each in cache.layers[:index] if sliding and isinstance(each, DynamicSlidingWindowLayer)]
    state = first.core.stored_state
    stored = (alike[-1].keys, alike[-1].values) if alike else (state.recent_keys, state.recent_values)
    if slot_bytes(k, v) > slot_bytes(*stored):
        raise ValueError(
            f"budget is {rule.text!r}, which was divided among layers alike, but layer {index} has keys of shape "
            f"{tuple(k.shape)}, larger than those before; give a budget in tokens"
        )


def kv_heads(config: Any, index: int = 0) -> int:
    """KV heads of a layer."""
    layers = getattr(config, "per_layer_config", None)  # which may differ, and asking all of them at once then raises
    config = layers[index] if layers else config
    # Of the decoder where there is an encoder, and of layers with full attention where they differ.
    names = ["decoder_attention_heads", "num_key_value_heads", "num_attention_heads"]
    if getattr(config, "attention_k_eq_v", False):
        names.insert(0, "num_global_key_value_heads")
    return next(int(heads) for name in names if (heads := getattr(config, name, None)))


def layer_kinds(config: Any) -> list[tuple[str, dict[str, Any]]]:
    """Type of each layer of a model, and the arguments of its stock cache layer."""
    types, arguments = get_layer_types_and_kwargs(config)
    # Before transformers 5.16, one dict for all layers.
    each = arguments if isinstance(arguments, list) else [arguments] * len(types)
    return list(zip(types, each, strict=True))


def layer_windows(config: Any) -> list[int]:
    """Window of each layer, 0 for one that attends to everything."""
    return [int(kwargs["sliding_window"]) if kind in SLIDING_TYPES else 0 for kind, kwargs in layer_kinds(config)]

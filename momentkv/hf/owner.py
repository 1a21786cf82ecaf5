"""Which model's keys a cache holds, known by some of the model's weights, and by the adapters that are active."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from momentkv.hf.models import agree, dtype_name, fingerprint

__all__ = ["Owner", "copied", "same"]

# Attention modules, by type and fingerprint.
Weights = Sequence[tuple[str, Mapping[str, str]]]


class Owner:
    """The model that fills a cache, known by a few of its weights and by its active adapters.

    Parameters
    ----------
    model : PreTrainedModel or PretrainedConfig
        What the cache is made for.
    index : int
        The layer, of the model's, whose attention is looked at.

    Notes
    -----
    A model of the same shape would go on from keys that mean nothing to it. The attention module is compared by
    identity; only where another one comes, a few of its weights are read. Adapters of peft are switched in all layers
    alike, and one of these is asked at every pass. What an adapter's weights are is not: one that is trained between
    passes, or given for some rows alone (``adapter_names``), goes unnoticed.
    """

    def __init__(self, model: Any, index: int) -> None:
        self.module: weakref.ref[Any] | None = None
        modules = list(model.modules()) if hasattr(model, "modules") else []
        self.adapted = adapted_of(modules)
        # Of what was read; None where nothing is known.
        self.adapters: tuple[str, ...] | None = None
        own = [x for x in modules if getattr(x, "layer_idx", None) == index]
        self.weights = [(type(one).__name__, fingerprint(one)) for one in own]
        self.made_for = self.weights
        self.dtype: str | None = None  # of what was read

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        copied = object.__new__(Owner)
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"module": None, "adapted": None}

    def check(self, module: Any, filled: bool) -> None:
        """Raise if a cache that is filled is used by an attention module of other weights, or with other adapters."""
        self.check_weights(module, filled)
        one = self.adapted() if self.adapted is not None else None
        if one is None:  # none was there when the cache was made
            self.adapted = adapted_of(module.modules())
            one = self.adapted() if self.adapted is not None else None
        now = () if one is None else active(one)
        if not filled:
            self.adapters = now
        elif self.adapters is not None and now != self.adapters:
            raise ValueError(
                f"the cache holds keys of {said(self.adapters)}, and the model has {said(now)} now, to which they "
                "mean something else; activate what was active when the text was read, or make a cache for each adapter"
            )

    def is_as_made(self) -> bool:
        """Whether the text was read, if any was, by the model that the cache was made for, with the weights of then."""
        return self.weights is self.made_for or same(self.weights, self.made_for)

    def check_weights(self, module: Any, filled: bool) -> None:
        """Raise if a cache that is filled is used by an attention module of other weights."""
        if filled and self.module is not None and self.module() is module:
            return
        kind, weights = type(module).__name__, fingerprint(module)
        known = any(name == kind for name, _ in self.weights)
        if filled and known and not same([(kind, weights)], self.weights):
            raise ValueError(
                f"the cache holds keys of a model with other weights than this {type(module).__name__}; make a "
                "MomentCache for each model, or call cache.reset() to use it with another one"
            )
        self.weights = [(kind, weights)]
        self.dtype = next((dtype_name(x) for x in module.parameters() if x.is_floating_point()), None)
        self.module = weakref.ref(module)


def same(some: Weights, others: Weights) -> bool:
    """Whether one of some modules may be one of others: of the same type, with weights that agree."""
    return any(kind == name and agree(weights, own) for kind, weights in some for name, own in others)


def adapted_of(modules: Iterable[Any]) -> weakref.ref[Any] | None:
    """The first module that peft has adapted, if there is one."""
    # Whole models have methods of these names.
    layers = (x for x in modules if isinstance(getattr(x, "disable_adapters", None), bool))
    one = next((x for x in layers if hasattr(x, "active_adapters")), None)
    return None if one is None else weakref.ref(one)


def active(adapted: Any) -> tuple[str, ...]:
    """Names of the adapters that an adapted module uses."""
    return () if adapted.disable_adapters else tuple(adapted.active_adapters)


def said(adapters: tuple[str, ...]) -> str:
    """Adapters as a message names them.

    Examples
    --------
    >>> said(()), said(("a", "b"))
    ('no active adapter', "the active adapters 'a', 'b'")
    """
    if not adapters:
        return "no active adapter"
    return f"the active adapter{'s' * (len(adapters) > 1)} {', '.join(map(repr, adapters))}"


def copied(x: Any, memo: dict[int, Any], shared: Any) -> Any:
    """What `copy.deepcopy` makes of an object, with one of the objects that it refers to shared and not copied."""
    new = object.__new__(type(x))
    memo |= {id(x): new, id(shared): shared}
    new.__dict__.update(copy.deepcopy(x.__dict__, memo))
    return new

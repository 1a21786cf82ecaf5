"""Which model's keys a cache holds, known by some of the model's weights."""

from __future__ import annotations

import copy
import weakref
from typing import Any

from momentkv.hf.models import agree, fingerprint

__all__ = ["Owner", "copied"]


class Owner:
    """The model that fills a cache, known by a few of its weights.

    Parameters
    ----------
    model : PreTrainedModel or PretrainedConfig
        What the cache is made for.
    index : int
        The layer, of the model's, whose attention is looked at.

    Notes
    -----
    A model of the same shape would go on from keys that mean nothing to it. The attention module is compared by
    identity; only where another one comes, a few of its weights are read. Copies of a cache share their owner.
    """

    def __init__(self, model: Any, index: int) -> None:
        self.module: weakref.ref[Any] | None = None
        modules = model.modules() if hasattr(model, "modules") else ()
        own = [x for x in modules if getattr(x, "layer_idx", None) == index]
        self.weights = [(type(one).__name__, fingerprint(one)) for one in own]

    def __deepcopy__(self, memo: dict[int, Any]) -> Owner:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {"module": None, "weights": self.weights}

    def check(self, module: Any, filled: bool) -> None:
        """Raise if a cache that is filled is used by an attention module of other weights."""
        if self.module is not None and self.module() is module:
            return
        kind, weights = type(module).__name__, fingerprint(module)
        known = [own for name, own in self.weights if name == kind]
        if filled and known and not any(agree(weights, own) for own in known):
            raise ValueError(
                f"the cache holds keys of a model with other weights than this {type(module).__name__}; make a "
                "MomentCache for each model, or call cache.reset() to use it with another one"
            )
        self.weights = [(kind, weights)]
        self.module = weakref.ref(module)


def copied(x: Any, memo: dict[int, Any], shared: Any) -> Any:
    """What `copy.deepcopy` makes of an object, with one of the objects that it refers to shared and not copied."""
    new = object.__new__(type(x))
    memo |= {id(x): new, id(shared): shared}
    new.__dict__.update(copy.deepcopy(x.__dict__, memo))
    return new

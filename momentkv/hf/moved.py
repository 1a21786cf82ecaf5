"""How images moved positions: some models (Qwen2-VL and its kin) keep it of what they read last, in no cache."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch

from momentkv.hf.former import CacheFileError

__all__ = ["Moved"]

KEY = "rope_deltas"
# For each module that keeps it, the cache whose text was read last.
LAST: weakref.WeakKeyDictionary[Any, Moved] = weakref.WeakKeyDictionary()


class Moved:
    """What a model has kept, after the last pass of a cache, of how images moved the positions of its text.

    Parameters
    ----------
    model : PreTrainedModel or PretrainedConfig
        What the cache is made for.

    Attributes
    ----------
    deltas : tensor, shape (batch, 1), or None
        What is added to the places of tokens to come. Never changed in place.
    """

    def __init__(self, model: Any) -> None:
        modules = model.modules() if isinstance(model, torch.nn.Module) else ()
        holder = next((x for x in modules if hasattr(x, KEY)), None)
        self.holder = None if holder is None else weakref.ref(holder)
        self.deltas: torch.Tensor | None = None
        # Of a configuration, one of images and text, nobody can tell what its model keeps.
        text = model if isinstance(model, torch.nn.Module) else model.get_text_config(decoder=True)
        self.hidden = text is not model and "mrope_section" in (getattr(text, "rope_parameters", None) or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Moved:
        copied = object.__new__(Moved)
        copied.__dict__.update(self.__dict__)
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"holder": None}

    @property
    def module(self) -> Any:
        """The module that keeps it, or None."""
        return None if self.holder is None else self.holder()

    def check(self, filled: bool) -> None:
        """Raise if a cache that is filled goes on with positions of another cache's text."""
        module = self.module
        if not filled or (module is None and self.deltas is None):
            return
        if module is None:
            if bool(self.deltas.any()):  # type: ignore[union-attr]
                raise ValueError(
                    "images have moved the positions of what this cache has read, which its model keeps, and a cache "
                    "that was unpickled does not know the model; take it to another process with save and load"
                )
            return
        last, now = LAST.get(module), getattr(module, KEY)
        if last is None or last is self or now is not last.deltas or same(now, self.deltas):
            return
        raise ValueError(
            "the model keeps how images moved positions of the text that it read last (rope_deltas), and that was "
            "another cache's; call cache.moved.put_back() before going on with this one"
        )

    def read(self) -> None:
        """Take over what the model keeps, after a pass."""
        module = self.module
        if module is not None:
            self.deltas = getattr(module, KEY)
            LAST[module] = self

    def put_back(self) -> None:
        """Give the model what it kept after this cache's last pass."""
        module = self.module
        if module is not None:
            setattr(module, KEY, self.deltas)
            LAST[module] = self

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file of the cache holds of it: nothing where no position has moved."""
        if self.hidden:
            raise RuntimeError(
                "save: the cache was made for a configuration, and whether images have moved positions is kept by the "
                "model (rope_deltas); make the cache with the model itself"
            )
        return {} if same(self.deltas, None) else {KEY: self.deltas.cpu().contiguous().clone()}  # type: ignore[union-attr]

    def load(self, tensors: Mapping[str, torch.Tensor], path: Any) -> None:
        """Take over what a file holds, and give it to the model."""
        self.deltas = tensors.get(KEY)
        if self.deltas is not None and self.module is None:
            raise CacheFileError(
                f"{path} holds positions that images have moved, which the model keeps (rope_deltas); give load the "
                "model in place of its configuration"
            )
        self.put_back()


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Whether both move positions alike; None moves none."""
    if one is other:
        return True
    if one is None or other is None:
        known: Any = other if one is None else one
        return not bool(known.any())
    return one.shape == other.shape and torch.equal(one, other.to(one.device))

"""Modules under the names they had in version 0.1: they lead to where the code is now, with a warning."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ["MOVED", "MovedModules"]

# By former name: where the module is now, or all modules that its names are divided among.
MOVED: dict[str, tuple[str, ...]] = {
    f"momentkv.{old}": tuple(f"momentkv.{name}" for name in new)
    for old, new in {
        "accounting": ["cache.accounting"],
        "backends.array_api": ["backends.base"],
        "budgets": ["cache.allocation", "cache.curves"],
        "clustering": ["statistics.clustering"],
        "corrections": ["statistics.corrections"],
        "extent": ["statistics.extent"],
        "moments": ["statistics.moments"],
        "sharing": ["cache.allocation"],
        "summaries": ["statistics.summaries"],
    }.items()
}


class MovedModules(MetaPathFinder, Loader):
    """Finds a module by its former name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of a former name only."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        """Give the module all names of the one, or the ones, that took its place."""
        places = MOVED[module.__name__]
        warnings.warn(
            f"{module.__name__} is now {' and '.join(places)}; import it from there", DeprecationWarning, stacklevel=2
        )
        own = set(vars(module))
        for place in places:
            there = vars(importlib.import_module(place))
            vars(module).update({name: x for name, x in there.items() if name not in own})

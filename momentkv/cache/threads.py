"""One thread at a time: a step of a cache within which another one begins would lose tokens of one of them."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

__all__ = ["alone"]

P = ParamSpec("P")
T = TypeVar("T")


class Step:
    """A step that is under way, as long as its frame has this object."""

    __slots__ = ("__weakref__",)


# By the number of their cache. Nothing has to be taken out: a step that was interrupted anywhere is gone, too.
UNDER_WAY: weakref.WeakValueDictionary[int, Step] = weakref.WeakValueDictionary()
LOOKING = threading.Lock()


def alone(step: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    """A step that is refused while another one of the same cache is under way; nobody waits for it.

    Raises
    ------
    RuntimeError
        In the thread that came second; the step of the first one is not disturbed.
    """

    @functools.wraps(step)
    def guarded(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        own = Step()
        with LOOKING:
            taken = UNDER_WAY.setdefault(self.number, own) is not own
        if taken:
            raise RuntimeError(
                "another step of this cache is under way; one thread at a time may use a cache: give each a cache of "
                "its own, a copy.deepcopy of this one say, or hold a lock around its steps"
            )
        try:
            return step(self, *args, **kwargs)
        except BaseException:
            del own  # whoever keeps the error keeps this frame
            raise

    return guarded

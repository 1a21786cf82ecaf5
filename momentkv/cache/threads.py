"""One thread at a time: a step of a cache within which another one begins would lose tokens of one of them."""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
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


def is_running(step: Step) -> bool:
    """Whether the frame of a step is being run: errors, debuggers and profilers keep frames that have ended."""
    for running in sys._current_frames().values():
        frame: FrameType | None = running
        while frame is not None:
            if frame.f_code.co_name == "guarded" and frame.f_locals.get("own") is step:
                return True
            frame = frame.f_back
    return False


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
            other = UNDER_WAY.setdefault(self.number, own)
            if other is not own and not is_running(other):
                other = UNDER_WAY[self.number] = own
        if other is not own:
            raise RuntimeError(
                "another step of this cache is under way; one thread at a time may use a cache: give each a cache of "
                "its own, a copy.deepcopy of this one say, or hold a lock around its steps"
            )
        return step(self, *args, **kwargs)

    return guarded

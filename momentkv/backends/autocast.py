"""Out of `torch.autocast`: a cache computes in the dtypes that it names, and stores what it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

__all__ = ["without_autocast"]

DEVICES = ("cpu", "cuda")


def without_autocast() -> contextlib.AbstractContextManager[object]:
    """Within it, nothing is cast for the caller who reads under autocast.

    Examples
    --------
    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     with without_autocast():
    ...         torch.is_autocast_enabled("cpu")
    False
    """
    casting = [name for name in DEVICES if torch.is_autocast_enabled(name)]
    return off(casting) if casting else contextlib.nullcontext()


@contextlib.contextmanager
def off(devices: Sequence[str]) -> Iterator[None]:
    """Without autocast on these devices."""
    with contextlib.ExitStack() as stack:
        for name in devices:
            stack.enter_context(torch.autocast(name, enabled=False))
        yield

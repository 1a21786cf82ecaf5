"""What is computed from a layout, once for as long as that lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch

from momentkv.backends.layout import Layout

__all__ = ["kept"]


def kept(layout: Layout, key: Hashable, make: Callable[[], Any]) -> Any:
    """The result of ``make``, made once for a layout: an upload waits for the device, and no CUDA graph can hold one.

    It lives as long as the layout, so that a graph that reads it finds it.
    """
    if key not in layout.placed:
        with torch.inference_mode(False):
            made = make()
        # What is made under a dispatch mode may be a stand-in for a tensor.
        if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
            return made
        layout.placed[key] = made
    return layout.placed[key]

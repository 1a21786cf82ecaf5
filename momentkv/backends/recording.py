"""A function of tensors recorded once, to be done again without its Python: on a GPU, a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["Function", "Recorder", "record_cuda", "record_traced"]

# A recorder runs a function as often as it likes and returns what does the same without running its Python.
Function = Callable[[], Any]
Recorder = Callable[[Function], Function]
WARMUPS = 1


def record_cuda(function: Function) -> Function:
    """Capture a function in a CUDA graph, after a few runs that compile its kernels."""
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()

    def replay() -> Any:
        graph.replay()
        return out

    return replay


def record_traced(function: Function) -> Function:
    """The operators of a function, traced: what a graph would do, on a device that has none."""
    from torch.fx.experimental.proxy_tensor import make_fx

    with torch.no_grad():
        recorded: Any = make_fx(function)()

    def replay() -> Any:
        with torch.no_grad():
            return recorded()

    return replay

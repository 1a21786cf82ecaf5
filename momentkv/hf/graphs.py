"""A decode step as a CUDA graph: the step of all layers in one, and their flush in another."""

from __future__ import annotations

from typing import Any

import torch

from momentkv.backends.recording import Recorder, record_cuda
from momentkv.cache.joining import flush_together
from momentkv.hf.cache import MomentCache
from momentkv.hf.clock import Clock
from momentkv.hf.models import takes

__all__ = ["DecodeGraphs", "record_cuda"]


class DecodeGraphs:
    """Decode steps of a model with a static cache, replayed from CUDA graphs.

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="momentkv"``, all on one device.
    cache : MomentCache
        Made with ``static=True``, and with the prompt read.
    capture_flush : bool
        Whether flushes are a graph, too, which is several times faster. Otherwise Python launches them, once in
        ``block`` steps.
    recorder : callable, optional
        In place of `record_cuda`.

    Raises
    ------
    RuntimeError
        If the cache has read nothing, or its arrays have moved since (another number of rows, another budget).
    ValueError
        If the cache is not static, or the model is not on CUDA.

    Notes
    -----
    Recording runs the step, so that kernels are compiled; afterwards the cache is as before. A graph holds addresses.
    The cache may be reset and may read another prompt of as many rows.

    Examples
    --------
    >>> cache = momentkv.hf.MomentCache(model, budget=512, static=True)                  # doctest: +SKIP
    >>> next_id = model(prompt, past_key_values=cache).logits[:, -1:].argmax(-1)         # doctest: +SKIP
    >>> step = momentkv.hf.DecodeGraphs(model, cache)                                    # doctest: +SKIP
    >>> for _ in range(100):                                                             # doctest: +SKIP
    ...     next_id = step(next_id).argmax(-1)
    """

    def __init__(
        self, model: Any, cache: Any, *, capture_flush: bool = False, recorder: Recorder | None = None
    ) -> None:
        if not isinstance(cache, MomentCache):
            raise TypeError(f"cache is a {type(cache).__name__}; DecodeGraphs steps with a MomentCache")
        if cache.static is None:
            raise ValueError("cache is not static; make it with MomentCache(..., static=True)")
        cache.passes.undo()
        self.cache = cache
        self.static: Clock = cache.static
        if not self.static.runs:
            raise RuntimeError("cache has read nothing yet; read the prompt with the model first")
        states = [core.stored_state for core in self.static.cores]
        counts = states[0].counts
        if recorder is None and not counts.is_cuda:
            raise ValueError(
                f"the cache is on {counts.device}, where there are no CUDA graphs; move the model to a GPU"
            )
        places = {state.counts.device for state in states}
        if len(places) > 1:
            raise ValueError(f"the layers are on {len(places)} devices, and a graph is of one; load the model to one")
        record = recorder or record_cuda
        self.ids = torch.zeros((counts.shape[0], 1), dtype=torch.int64, device=counts.device)
        self.positions = torch.zeros_like(self.ids)
        self.recorded = self._tensors()
        held = [x.clone() for x in self.recorded]
        before = self.static.beat

        def one_step() -> torch.Tensor:
            with torch.no_grad():
                logits: torch.Tensor = model(
                    self.ids, position_ids=self.positions, **takes(model, cache), use_cache=True
                ).logits
            return logits

        def one_flush() -> None:
            flush_together(self.static.cores)

        # A beat that never flushes: the flush is not in the graph of a step.
        self.static.beat = type(before)(flushes=False)
        for state in states:
            state.recent_count.zero_()  # room for the tokens of recorded steps
        try:
            self.step = record(one_step)
            self.flush = record(one_flush) if capture_flush else one_flush
        finally:
            self.static.beat = self.static.before = before
            self.static.open = False
            for x, y in zip(self.recorded, held, strict=True):
                x.copy_(y)

    def __call__(self, ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """Read one token a row.

        Parameters
        ----------
        ids : int64 tensor, shape (batch, 1)
        position_ids : int64 tensor, shape (batch, 1), optional
            As the model takes them, for rows that were padded; by default the number of tokens seen.

        Returns
        -------
        tensor, shape (batch, 1, vocabulary)
            Logits.
        """
        if ids.shape != self.ids.shape:
            raise ValueError(f"ids has shape {tuple(ids.shape)}; the graph was recorded for {tuple(self.ids.shape)}")
        self.cache.passes.undo()
        here = self._tensors() if self.static.runs else []
        if len(here) != len(self.recorded) or any(x is not y for x, y in zip(here, self.recorded, strict=True)):
            raise RuntimeError("the cache lies elsewhere than when its steps were recorded; make new DecodeGraphs")
        self.ids.copy_(ids)
        self.positions.copy_(self.static.cores[0].stored_state.clock[0] if position_ids is None else position_ids)
        self.static.tick()
        logits: torch.Tensor = self.step().clone()
        self.static.open = False
        if self.static.beat.flushes:
            self.flush()
        return logits

    def _tensors(self) -> list[torch.Tensor]:
        """All that a step changes."""
        return [x for core in self.static.cores for x in core.stored_state.arrays().values()]

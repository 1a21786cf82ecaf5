"""Decode speed and peak memory of a budgeted cache against the full one: ``momentkv evaluate speed``."""

from __future__ import annotations

import argparse
import threading
import time
from statistics import mean, median
from typing import Any

import psutil
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers.cache_utils import DynamicCache

from momentkv.evaluation.processes import in_a_process
from momentkv.evaluation.report import environment, progress_bar, show, write_json
from momentkv.evaluation.settings import check_evicts
from momentkv.evaluation.sources import BUILTIN_MODEL, load_model, load_text, tokenize
from momentkv.evaluation.steps import Step, evicted_tokens, typical
from momentkv.hf import MomentCache
from momentkv.hf.models import takes

__all__ = ["speed"]

# What is compared: the full cache, and the arguments of each `MomentCache`.
KINDS: dict[str, dict[str, Any]] = {
    "full cache": {},
    "snapkv": {"policy": "snapkv", "correction": "none", "sharing": "uniform"},
    "the paper's": {"policy": "momentkv", "correction": "moments", "sharing": "uniform"},
    "one budget": {"sharing": "uniform"},
    "default": {},
    "in 4 bits": {"bits": 4},
    "in chosen bits": {"bits": "auto"},
}
TEXT = "specialnames"
# Steps of a decode in which memory is looked at.
MEMORY_STEPS = 8
# Assumed, for the time left alone: tokens that are read in the time in which one is decoded.
DECODED = 10


def speed(options: argparse.Namespace) -> int:
    """Time decoding step by step in turns, measure memory in a process for each cache; print and write the result."""
    for name in ("context", "steps", "chunk", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; use at least 1")
    check_evicts(options)
    least = max(options.steps, MEMORY_STEPS)
    if options.context < least:
        raise ValueError(
            f"context is {options.context}, but {least} steps of a decode read its first tokens once more; use a "
            "longer one, or fewer --steps"
        )
    console = Console()
    torch.set_num_threads(options.threads)
    console.print(
        f"{len(KINDS)} caches read {options.context} tokens twice, first each in a process of its own, and decode "
        f"{options.steps}; after the first reading it is known how long that takes",
        markup=False,
    )
    with progress_bar(console) as progress:
        # In tokens, so that the time left is that of what is left; a decoded token takes that of several.
        total = len(KINDS) * (2 * options.context + DECODED * (MEMORY_STEPS + 1 + options.steps))
        task = progress.add_task("memory", total=total)
        peaks: dict[str, int] = {}
        began = time.perf_counter()
        for kind in KINDS:
            progress.update(task, description=f"peak memory, {kind}")
            # A fresh process each, so that no cache finds memory that another one has left.
            peaks[kind] = in_a_process(peak_memory, kind, options.model, options.context, options.budget, options.chunk)
            done = options.context + DECODED * MEMORY_STEPS
            progress.advance(task, done)
            if len(peaks) == 1:
                seconds = (time.perf_counter() - began) * (total / done - 1)
                console.print(f"the first reading is done; all others take about {lasting(seconds)}", markup=False)
        model, ids = prepare(options.model, options.context)
        caches, prefills = {}, {}
        for kind in KINDS:
            progress.update(task, description=f"prefill, {kind}")
            caches[kind] = build_cache(kind, model, options.budget)
            start = time.perf_counter()
            prefill(model, ids, caches[kind], options.chunk)
            prefills[kind] = time.perf_counter() - start
            progress.advance(task, options.context)
        progress.update(task, description="decoding in turns")
        steps: dict[str, list[Step]] = {kind: [] for kind in KINDS}
        for step in range(1 + options.steps):
            token = ids[:, max(step - 1, 0)][:, None]
            for kind, cache in caches.items():
                before = evicted_tokens(cache)
                took = decode(model, token, cache)
                if step:  # the first one loads or compiles kernels
                    steps[kind].append(Step(took, evicted_tokens(cache) > before))
            progress.advance(task, DECODED * len(KINDS))
    seconds = {kind: [step.seconds for step in each] for kind, each in steps.items()}
    rows = [
        {
            "cache": kind,
            # The mean, for every so many steps one evicts a block.
            "tokens_per_second": 1 / mean(seconds[kind]),
            "seconds_per_step": {
                "mean": mean(seconds[kind]),
                "median": median(seconds[kind]),
                "min": min(seconds[kind]),
                "max": max(seconds[kind]),
            },
            "seconds_between_flushes": typical(steps[kind]).seconds,
            "seconds_of_a_flush": typical(steps[kind]).flush,
            "prefill_seconds": prefills[kind],
            "cache_bytes": cache_bytes(caches[kind]),
            "peak_bytes": peaks[kind],
        }
        for kind in KINDS
    ]
    show(console, table_of(rows, options))
    for name, ratio in ratios(rows).items():
        console.print(f"{ratio:6.2f}  {name}", highlight=False)
    content = {
        "protocol": {
            "model": options.model or BUILTIN_MODEL,
            "text": TEXT,
            "context": options.context,
            "budget": options.budget,
            "steps": options.steps,
            "threads": options.threads,
            "prefill_chunk": options.chunk,
            "timing": "decode steps of the caches in turns, after one that is not counted; mean, and medians of those "
            "that evict and of the others",
            "memory": "peak resident memory above the loaded model, prefill and "
            f"{MEMORY_STEPS} decode steps, a process each",
        },
        "environment": environment(),
        "ratios": ratios(rows),
        "rows": rows,
    }
    console.print(f"results: {write_json(options.output, content)}", soft_wrap=True, markup=False)
    return 0


def lasting(seconds: float) -> str:
    """A time as it is said.

    Examples
    --------
    >>> lasting(42.3), lasting(600)
    ('42 s', '10 min')
    """
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the storage of a layer is judged by."""
    full, snapkv, _, one, default, bits, chosen = rows
    mean_of, median_of = ({row["cache"]: row["seconds_per_step"][key] for row in rows} for key in ("mean", "median"))
    return {
        "step between flushes: default / one budget": default["seconds_between_flushes"]
        / one["seconds_between_flushes"],
        "step between flushes: in 4 bits / default": bits["seconds_between_flushes"]
        / default["seconds_between_flushes"],
        "default: mean step / median step": mean_of["default"] / median_of["default"],
        "mean step: default / snapkv": mean_of["default"] / mean_of[snapkv["cache"]],
        "mean step: default / full cache": mean_of["default"] / mean_of[full["cache"]],
        "mean step: in chosen bits / full cache": mean_of[chosen["cache"]] / mean_of[full["cache"]],
        "prefill: default / full cache": default["prefill_seconds"] / full["prefill_seconds"],
        "prefill: in chosen bits / full cache": chosen["prefill_seconds"] / full["prefill_seconds"],
    }


def prepare(name: str | None, context: int) -> tuple[Any, torch.Tensor]:
    """The model and the tokens it reads."""
    model, tokenizer = load_model(name)
    return model, tokenize(tokenizer, load_text(TEXT), context, name=TEXT).to(model.device)


def build_cache(kind: str, model: Any, budget: int) -> Any:
    """An empty cache of one of the `KINDS`."""
    if kind == "full cache":
        return DynamicCache(config=model.config)
    return MomentCache(model, budget, **KINDS[kind])


@torch.inference_mode()
def prefill(model: Any, ids: torch.Tensor, cache: Any, chunk: int) -> None:
    """Read the context, so many tokens at once."""
    for piece in torch.split(ids, chunk, dim=1):
        model(piece, **takes(model, cache), logits_to_keep=1)


@torch.inference_mode()
def decode(model: Any, token: torch.Tensor, cache: Any) -> float:
    """One step; seconds it took."""
    start = time.perf_counter()
    model(token, **takes(model, cache)).logits.cpu()
    return time.perf_counter() - start


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds now."""
    if isinstance(cache, MomentCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def peak_memory(kind: str, name: str | None, context: int, budget: int, chunk: int) -> int:
    """Peak resident memory above that of the loaded model, in bytes, sampled every 2 ms (run in a fresh process)."""
    torch.set_num_threads(1)
    model, ids = prepare(name, context)
    decode(model, ids[:, :1], build_cache(kind, model, budget))  # what the first pass allocates once for all
    process, done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    cache = build_cache(kind, model, budget)
    prefill(model, ids, cache, chunk)
    for step in range(MEMORY_STEPS):
        decode(model, ids[:, step : step + 1], cache)
    done.set()
    sampler.join()
    return max(peak, process.memory_info().rss) - before


def table_of(rows: list[dict[str, Any]], options: argparse.Namespace) -> Table:
    """Numbers side by side, with ratios to the full cache."""
    full = rows[0]
    title = (
        f"{options.model or BUILTIN_MODEL}, {options.context} tokens of context, budget {options.budget}, "
        f"{options.threads} thread{'s' if options.threads > 1 else ''}"
    )
    table = Table(
        title=escape(title), title_style="bold", header_style="bold", box=SIMPLE_HEAD, padding=0, show_edge=False
    )
    table.add_column("cache")
    for column in ("tokens/s", "x", "flush", "MiB", "x", "peak", "x", "read"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        flush = row["seconds_of_a_flush"]
        cells = {
            # Where memory is short, what a process holds may not rise above what it held before.
            key: [f"{row[key] / unit:.{digits}f}", f"{row[key] / full[key]:.2f}" if full[key] else ""]
            for key, unit, digits in (("tokens_per_second", 1, 2), ("cache_bytes", 2**20, 1), ("peak_bytes", 2**20, 0))
        }
        table.add_row(
            row["cache"],
            *cells["tokens_per_second"],
            "" if flush is None else f"{1000 * flush:.0f}",
            *cells["cache_bytes"],
            *cells["peak_bytes"],
            f"{row['prefill_seconds']:.1f}",
        )
    table.caption = (
        "tokens/s: of the mean step, evictions included; x: times the full cache's; flush: ms of a step that evicts a "
        "block; MiB: of the cache; peak: MiB above the loaded model; read: s to read the context"
    )
    table.caption_justify = "left"
    return table

"""Decode speed and peak memory of a budgeted cache against the full one: ``momentkv evaluate speed``."""

from __future__ import annotations

import argparse
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import mean, median
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers.cache_utils import DynamicCache

from momentkv.evaluation.report import environment, progress_bar, write_json
from momentkv.evaluation.sources import BUILTIN_MODEL, load_model, load_text, tokenize
from momentkv.hf import MomentCache

__all__ = ["speed"]

# What is compared: the full cache, and the arguments of each `MomentCache`.
KINDS: dict[str, dict[str, Any]] = {
    "full cache": {},
    "plain eviction": {"policy": "momentkv", "order": None, "correction": "moments", "sharing": "uniform"},
    "paper's moments": {"policy": "momentkv", "correction": "moments", "sharing": "uniform"},
    "summaries": {"policy": "momentkv", "correction": "summaries", "sharing": "uniform"},
    "summaries, by layers": {"policy": "momentkv", "correction": "summaries", "sharing": "layers"},
    "summaries, by heads": {"policy": "momentkv", "correction": "summaries", "sharing": "heads"},
}
TEXT = "specialnames"
CHUNK = 512


def speed(options: argparse.Namespace) -> int:
    """Time decoding step by step in turns, measure memory in a process for each cache; print and write the result."""
    console = Console()
    torch.set_num_threads(1)
    with progress_bar(console) as progress:
        task = progress.add_task("memory", total=2 * len(KINDS) + options.steps)
        peaks = {}
        for kind in KINDS:
            progress.update(task, description=f"peak memory, {kind}")
            # A fresh process each, so that no cache finds memory that another one has left.
            with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
                peaks[kind] = pool.submit(peak_memory, kind, options.model, options.context, options.budget).result()
            progress.advance(task)
        model, ids = prepare(options.model, options.context)
        caches, prefills = {}, {}
        for kind in KINDS:
            progress.update(task, description=f"prefill, {kind}")
            caches[kind] = build_cache(kind, model, options.budget)
            start = time.perf_counter()
            prefill(model, ids, caches[kind])
            prefills[kind] = time.perf_counter() - start
            progress.advance(task)
        progress.update(task, description="decoding in turns")
        seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for step in range(options.steps):
            token = ids[:, step : step + 1]
            for kind in KINDS:
                seconds[kind].append(decode(model, token, caches[kind]))
            progress.advance(task)
    rows = [
        {
            "cache": kind,
            # The mean, for every so many steps one evicts a block; the median is a step that does not.
            "tokens_per_second": 1 / mean(seconds[kind]),
            "seconds_per_step": {
                "mean": mean(seconds[kind]),
                "median": median(seconds[kind]),
                "min": min(seconds[kind]),
                "max": max(seconds[kind]),
            },
            "prefill_seconds": prefills[kind],
            "cache_bytes": cache_bytes(caches[kind]),
            "peak_bytes": peaks[kind],
        }
        for kind in KINDS
    ]
    console.print(table_of(rows, options))
    content = {
        "protocol": {
            "model": options.model or BUILTIN_MODEL,
            "text": TEXT,
            "context": options.context,
            "budget": options.budget,
            "steps": options.steps,
            "threads": 1,
            "prefill_chunk": CHUNK,
            "timing": "decode steps of the caches in turns; mean",
            "memory": "peak resident memory above the loaded model, prefill and 8 decode steps, a process each",
        },
        "environment": environment(),
        "rows": rows,
    }
    console.print(f"results: {write_json(options.output, content)}")
    return 0


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
def prefill(model: Any, ids: torch.Tensor, cache: Any) -> None:
    """Read the context in chunks."""
    for chunk in torch.split(ids, CHUNK, dim=1):
        model(chunk, past_key_values=cache, logits_to_keep=1)


@torch.inference_mode()
def decode(model: Any, token: torch.Tensor, cache: Any) -> float:
    """One step; seconds it took."""
    start = time.perf_counter()
    model(token, past_key_values=cache).logits.cpu()
    return time.perf_counter() - start


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds now."""
    if isinstance(cache, MomentCache):
        return cache.nbytes
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def peak_memory(kind: str, name: str | None, context: int, budget: int) -> int:
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
    prefill(model, ids, cache)
    for step in range(8):
        decode(model, ids[:, step : step + 1], cache)
    done.set()
    sampler.join()
    return max(peak, process.memory_info().rss) - before


def table_of(rows: list[dict[str, Any]], options: argparse.Namespace) -> Table:
    """Numbers side by side, with ratios to the full cache."""
    full = rows[0]
    title = (
        f"{options.model or BUILTIN_MODEL}, {options.context} tokens of context, budget {options.budget}, one thread"
    )
    table = Table(title=title, title_style="bold", header_style="bold")
    for column in ("cache", "tokens/s", "of full", "cache MiB", "of full", "peak MiB", "of full", "prefill s"):
        table.add_column(column, justify="left" if column == "cache" else "right")
    for row in rows:
        cells = []
        for key, unit, digits in (("tokens_per_second", 1, 2), ("cache_bytes", 2**20, 1), ("peak_bytes", 2**20, 0)):
            cells += [f"{row[key] / unit:.{digits}f}", f"{row[key] / full[key]:.2f}x"]
        table.add_row(row["cache"], *cells, f"{row['prefill_seconds']:.1f}")
    return table

"""What decoding costs against what its bytes cost: ``momentkv bench``.

Everything is measured in one process, next to the copy bandwidth and the cost of the smallest call of the same device:
a time means little without both. Numbers are random; buffers rotate, so that none is found in a cache of the device.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.cache_utils import DynamicCache

from momentkv.backends import get_backend
from momentkv.backends.layout import Tiers
from momentkv.backends.operators import decode
from momentkv.cache.layer import LayerCache
from momentkv.evaluation.report import environment, progress_bar, write_json
from momentkv.hf import DecodeGraphs, MomentCache
from momentkv.statistics.expansion import Expandable, Expansion
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import QueryWindow, Summaries

__all__ = ["Shape", "bench", "measurements"]

Row = dict[str, Any]
Call = Callable[[int], Any]


class Shape(NamedTuple):
    """One layer: batch, KV heads, group, head dimension, retained tokens, full context."""

    batch: int
    kv_heads: int
    group: int
    d: int
    budget: int
    context: int


class Sizes(NamedTuple):
    """What is measured on a kind of device."""

    shapes: list[Shape]
    copy_bytes: int
    rotate_bytes: int  # at least so much is read before the same bytes are read again
    repeats: int
    seconds: float  # for one measurement, once it has five repeats
    dtype: torch.dtype
    prefill: int
    block: int
    model: dict[str, int]
    model_context: int
    model_budget: int


CPU = Sizes(
    shapes=[Shape(1, 3, 3, 64, 512, 8192), Shape(1, 3, 3, 64, 2048, 8192), Shape(1, 8, 4, 128, 512, 8192)],
    copy_bytes=2**28,
    rotate_bytes=2**27,
    repeats=50,
    seconds=0.5,
    dtype=torch.float32,
    prefill=1024,
    block=32,
    model={
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 1024,
    },
    model_context=2048,
    model_budget=256,
)
# Llama-3.1-8B, SmolLM2-like and Gemma-like heads; contexts of 8k, 32k and 128k where they fit beside their copies.
CUDA = Sizes(
    shapes=[
        *(
            Shape(batch, 8, 4, 128, budget, context)
            for budget in (512, 1024, 2048)
            for batch, context in ((1, 131072), (16, 32768), (64, 8192))
        ),
        Shape(16, 3, 3, 64, 512, 32768),
        Shape(16, 4, 2, 256, 512, 32768),
    ],
    copy_bytes=2**30,
    rotate_bytes=2**28,
    repeats=100,
    seconds=2.0,
    dtype=torch.bfloat16,
    prefill=8192,
    block=32,
    model={
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    model_context=32768,
    model_budget=512,
)


def bench(options: argparse.Namespace) -> int:
    """Measure, print a table, write JSON and a plot."""
    console = Console()
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device is {str(device)!r}; use cpu, or cuda where PyTorch finds a GPU")
    sizes = CUDA if device.type == "cuda" else CPU
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    rows: list[Row] = []
    with progress_bar(console) as progress, torch.inference_mode():
        task = progress.add_task("bench", total=2 + 9 * len(sizes.shapes) + (3 if device.type == "cpu" else 4))
        for row in measurements(sizes, device):
            rows.append(row)
            progress.update(task, advance=1, description=f"{row['what']}, {row['name']}")
    bandwidth = rows[0]["bytes"] / rows[0]["seconds"]["median"]
    for row in rows:
        if row["bytes"]:
            row["share_of_copy"] = row["bytes"] / row["seconds"]["median"] / bandwidth
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    title = f"{name}, {str(sizes.dtype).removeprefix('torch.')}; copy {bandwidth / 1e9:.1f} GB/s"
    console.print(table_of(rows, title))
    content = {
        "protocol": {
            "device": name,
            "dtype": str(sizes.dtype),
            "copy_bytes": sizes.copy_bytes,
            "rotate_bytes": sizes.rotate_bytes,
            "repeats": f"{sizes.repeats}, or as many as fit in {sizes.seconds} s, at least 5",
            "block": sizes.block,
            "model": sizes.model,
        },
        "environment": environment(),
        "copy_bytes_per_second": bandwidth,
        "rows": rows,
    }
    path = write_json(options.output, content)
    plot = plot_of(rows, bandwidth, path.with_suffix(".png"), title=title)
    console.print(f"results: {path}   plot: {plot}")
    return 0


def measurements(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """All rows, one after the other; the first is the copy, the second the smallest call."""
    yield of_copy(sizes, device)
    one = torch.zeros(1, device=device)
    yield measure("device", "smallest call", lambda _: one.add_(1), sizes, device)
    for shape in sizes.shapes:
        yield from of_layer(shape, sizes, device)
    yield from of_model(sizes, device)


def of_copy(sizes: Sizes, device: torch.device) -> Row:
    """Copying a buffer that no cache of the device holds."""
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return measure("device", "copy", lambda _: target.copy_(source), sizes, device, nbytes=2 * sizes.copy_bytes)


def of_layer(shape: Shape, sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """Decode, flush and prefill of one layer."""
    batch, kv_heads, group, d, budget, context = shape
    scale = 1 / math.sqrt(d)

    def normal(*lead: int) -> torch.Tensor:
        return torch.randn(*lead, d, device=device, dtype=torch.float32).to(sizes.dtype)

    def caches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        size = 2 * batch * kv_heads * n * d * sizes.dtype.itemsize
        number = max(2, min(64, -(-sizes.rotate_bytes // size)))
        return [(normal(batch, kv_heads, n), normal(batch, kv_heads, n)) for _ in range(number)]

    def row(what: str, name: str, call: Call, nbytes: int = 0) -> Row:
        return measure(what, name, call, sizes, device, nbytes=nbytes) | {"shape": shape._asdict()}

    q = normal(batch, kv_heads * group, 1)
    backend = get_backend("torch")
    stored = 2 * batch * kv_heads * budget * d * sizes.dtype.itemsize
    held = caches(budget)

    def sdpa(kept: list[tuple[torch.Tensor, torch.Tensor]]) -> Call:
        # The group as queries of one head: SDPA reads the cache once for all of it.
        folded = q.reshape(batch, kv_heads, group, d)
        return lambda i: scaled_dot_product_attention(folded, *kept[i % len(kept)], scale=scale)

    def corrected(expansion: Expansion | None) -> Call:
        if device.type == "cuda":
            return lambda i: decode(q, *held[i % len(held)], expansion, scale=scale)
        return lambda i: backend.decode(q, Tiers.of(*held[i % len(held)]), expansion, scale=scale)

    yield row("decode", "SDPA", sdpa(held), stored)
    full = caches(context)
    yield row("decode", f"SDPA, context {context}", sdpa(full), stored * context // budget)
    del full
    gone = normal(batch, kv_heads, 512).float(), normal(batch, kv_heads, 512).float()
    recent = QueryWindow.from_queries(normal(batch, kv_heads * group, 32), kv_heads, scale=scale)
    moments = Moments.from_tokens(*gone)
    kinds: dict[str, Expandable | None] = {
        "retained only": None,
        "moments of order 1": moments,
        "12 summaries": Summaries.empty(*gone).update(*gone, recent),
    }
    for name, kind in kinds.items():
        expansion = None if kind is None else kind.expansion()
        if expansion is not None and expansion.slope is not None:  # the copy that a cache would keep
            expansion = expansion._replace(slope=expansion.slope.contiguous().to(sizes.dtype))
        read = stored + sum(0 if x is None else x.nbytes for x in expansion or ())
        yield row("decode", name, corrected(expansion), read)
    yield row(
        "decode",
        "order 1, with weights",
        lambda i: backend.decode(q, Tiers.of(*held[i % len(held)]), moments.expansion(), scale=scale, weights=True),
        stored + sum(x.nbytes for x in moments.arrays().values()),
    )
    yield from of_flush(shape, sizes, device, row)
    n = sizes.prefill
    wide, k, v = normal(1, kv_heads * group, n), normal(1, kv_heads, n), normal(1, kv_heads, n)
    yield row("prefill", f"{n} tokens", lambda _: backend.prefill(wide, k, v, scale=scale))


def of_flush(shape: Shape, sizes: Sizes, device: torch.device, row: Callable[..., Row]) -> Iterator[Row]:
    """Eviction of a block from a layer whose block is full: ranking, fold, and moving what stays."""
    batch, kv_heads, group, d, budget, _ = shape
    kinds: dict[str, dict[str, Any]] = {
        "order 1": {"policy": "momentkv", "correction": "moments"},
        "default": {"policy": "balanced", "correction": "summaries"},
    }

    def tokens(count: int) -> list[torch.Tensor]:
        heads = (kv_heads * group, kv_heads, kv_heads)
        return [torch.randn(batch, h, count, d, device=device).to(sizes.dtype) for h in heads]

    for name, settings in kinds.items():
        cache = LayerCache(budget, block=sizes.block, static=True, **settings)
        cache.step(*tokens(budget + 2 * sizes.block))
        for _ in range(sizes.block):
            cache.step(*tokens(1))
        full = cache.stored_state
        read = sum(x.nbytes for x in full.arrays().values())
        yield row("evict", f"flush {sizes.block}, {name}", lambda _, cache=cache, full=full: cache.flushed(full), read)


def of_model(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """A step of a whole model with random weights: the full cache, a budget, the same in place, and as CUDA graphs."""
    config = LlamaConfig(**sizes.model, max_position_embeddings=2 * sizes.model_context)
    config._attn_implementation = "momentkv"
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=sizes.dtype, attn_implementation="momentkv").eval()
    ids = torch.randint(sizes.model["vocab_size"], (1, sizes.model_context), device=device)
    weights = sum(x.nbytes for x in model.parameters())
    budget = f"budget {sizes.model_budget}"
    kept = {
        "full cache": DynamicCache(config=config),
        budget: MomentCache(model, sizes.model_budget),
        f"{budget}, static": MomentCache(model, sizes.model_budget, static=True),
    }
    if device.type == "cuda":
        kept[f"{budget}, CUDA graphs"] = MomentCache(model, sizes.model_budget, static=True)
    for name, cache in kept.items():
        for chunk in torch.split(ids, 512, dim=1):
            model(chunk, past_key_values=cache, logits_to_keep=1)
        one = step(model, ids[:, :1], cache, graphs=name.endswith("graphs"))
        yield measure("model", name, one, sizes, device, nbytes=weights) | {"context": sizes.model_context}


def step(model: Any, token: torch.Tensor, cache: Any, *, graphs: bool) -> Call:
    """One step of decoding, evictions as they fall due."""
    if graphs:
        replayed = DecodeGraphs(model, cache)
        return lambda _: replayed(token)
    return lambda _: model(token, past_key_values=cache)


def measure(what: str, name: str, call: Call, sizes: Sizes, device: torch.device, *, nbytes: int = 0) -> Row:
    """Time a call again and again; the median, and the spread between the quartiles."""
    for i in range(3):
        call(i)
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < sizes.repeats and (len(times) < 5 or time.perf_counter() - begun < sizes.seconds):
        if device.type == "cuda":
            event: Any = torch.cuda.Event
            start, stop = event(enable_timing=True), event(enable_timing=True)
            start.record()
            call(len(times))
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop) / 1e3)
        else:
            before = time.perf_counter()
            call(len(times))
            times.append(time.perf_counter() - before)
    ordered = sorted(times)
    quartiles = ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4]
    seconds = {
        "median": median(times),
        "lower_quartile": quartiles[0],
        "upper_quartile": quartiles[1],
        "min": ordered[0],
        "repeats": len(times),
    }
    return {"what": what, "name": name, "bytes": nbytes, "seconds": seconds}


def table_of(rows: list[Row], title: str) -> Table:
    """A line a measurement."""
    table = Table(title=title, title_style="bold", header_style="bold", box=SIMPLE_HEAD, padding=(0, 0))
    for column in ("", "shape", "of", "us", "least", "spread", "MiB", "copy"):
        table.add_column(
            column, justify="right" if column in ("us", "least", "spread", "MiB", "copy") else "left", no_wrap=True
        )
    shown = None
    for row in rows:
        shape = row.get("shape")
        here = ",".join(str(x) for x in list(shape.values())[:5]) if shape else ""
        if (here, row["what"]) != shown:
            table.add_section()
        times = row["seconds"]
        table.add_row(
            row["what"] if (here, row["what"]) != shown else "",
            here if (here, row["what"]) != shown else "",
            row["name"],
            digits(times["median"]),
            digits(times["min"]),
            f"{(times['upper_quartile'] - times['lower_quartile']) / times['median']:.0%}",
            f"{row['bytes'] / 2**20:.4g}" if row["bytes"] else "",
            f"{row['share_of_copy']:.0%}" if "share_of_copy" in row else "",
        )
        shown = here, row["what"]
    table.caption = "shape: batch, KV heads, group, d, budget; spread: between quartiles; copy: share of its bandwidth"
    return table


def digits(seconds: float) -> str:
    """Microseconds, to no more digits than were measured."""
    return f"{seconds * 1e6:.1f}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def plot_of(rows: list[Row], bandwidth: float, path: Path, *, title: str) -> Path:
    """Time against bytes: the line is what copying as many bytes takes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axis = figure.subplots()
    measured = [row for row in rows if row["bytes"] and row["what"] in ("decode", "evict")]
    for place, name in enumerate(dict.fromkeys(row["name"].partition(",")[0] for row in measured)):
        points = [row for row in measured if row["name"].partition(",")[0] == name]
        axis.plot(
            [row["bytes"] / 2**20 for row in points],
            [row["seconds"]["median"] * 1e6 for row in points],
            "o",
            color=f"C{place}",
            label=name,
        )
    ends = [min(row["bytes"] for row in measured), max(row["bytes"] for row in measured)]
    axis.plot([x / 2**20 for x in ends], [x / bandwidth * 1e6 for x in ends], "k--", linewidth=1, label="copy")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("MiB read and written")
    axis.set_ylabel("us, median")
    figure.suptitle(title, fontsize=10)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    return path

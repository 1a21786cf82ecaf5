"""Times of decoding beside the time that its bytes take to copy: ``momentkv bench``.

Everything is measured in one process, next to the copy bandwidth and the cost of the smallest call of the same device:
a time means little without both. Numbers are random. Buffers rotate, so that no cache of the device holds them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from momentkv.evaluation.layer_times import CPU, CUDA, Row, Shape, Sizes, of_device, of_layer
from momentkv.evaluation.model_times import of_model
from momentkv.evaluation.report import empty_table, environment, progress_bar, write_json

__all__ = ["Shape", "bench", "measurements"]


def bench(options: argparse.Namespace) -> int:
    """Measure, print a table, write JSON and a plot."""
    console = Console()
    asked, there = options.device, torch.cuda.is_available()
    if asked not in (None, "cpu") and not (there and asked.startswith("cuda")):
        raise ValueError(f"device is {asked!r}; use cpu, or cuda where PyTorch finds a GPU")
    device = torch.device(asked or ("cuda" if there else "cpu"))
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
    console.print(f"results: {path}   plot: {plot}", markup=False)
    return 0


def measurements(sizes: Sizes, device: torch.device) -> Iterator[Row]:
    """All rows, one after the other; the first is the copy, the second the smallest call."""
    yield from of_device(sizes, device)
    for shape in sizes.shapes:
        yield from of_layer(shape, sizes, device)
    yield from of_model(sizes, device)


def table_of(rows: list[Row], title: str) -> Table:
    """A line for each measurement."""
    columns = ["", "shape", "of", "us", "least", "spread", "MiB", "copy"]
    table = empty_table(title, columns, ("", "shape", "of"))
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
    """Time against bytes; the line is the time to copy that many bytes."""
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

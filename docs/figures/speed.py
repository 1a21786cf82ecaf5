"""The generated parts of docs/speed.md: targets and times, predicted and measured.

Run: python docs/figures/speed.py FILE.json

with a result of ``python -m momentkv.testing.gpu``: of a rehearsal for predictions, of a GPU for what was measured. The
file's content is kept in docs/data; without a file the page is written from what is there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from momentkv.backends.triton.builds import GPUS
from momentkv.codes import record_bytes
from momentkv.testing.gpu.few_bits import CODES
from momentkv.testing.gpu.predict import COPY, LATENCY, LAUNCH

DOCS = Path(__file__).parents[1]
PREDICTED, MEASURED = "gpu-predicted.json", "gpu-measured.json"
NONE = "not measured"
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Keep the file's content, and write the page from all that is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    options = parser.parse_args(arguments)
    data, page = options.docs / "data", options.docs / "speed.md"
    if options.file is not None:
        keep(read(options.file), data)
    predicted, measured = (read(data / name) if (data / name).exists() else {} for name in (PREDICTED, MEASURED))
    if predicted.get("parts") is None:
        raise SystemExit(f"{data / PREDICTED} is missing; give the result of python -m momentkv.testing.gpu --rehearse")
    text = page.read_text(encoding="utf-8")
    for name, made in (
        ("targets", targets(predicted, measured)),
        ("launches", launches(predicted, measured)),
        ("kernels", kernels(predicted)),
        ("operators", operators(predicted)),
        ("found", found(measured)),
    ):
        text = between(text, name, made)
    page.write_text(text, encoding="utf-8")
    if measured:
        plot(predicted, measured, options.docs / "assets" / "speed.svg")


def read(path: Path) -> dict[str, Any]:
    """A result."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def keep(content: dict[str, Any], data: Path) -> None:
    """Of a rehearsal what was compiled and counted, for it measures nothing; of a GPU all."""
    rehearsal = content["about"]["rehearsal"]
    if rehearsal:
        if not content["predictions"]:
            raise SystemExit("the rehearsal predicts nothing; let it run all its parts")
        kernels = ("compiled kernels", "bytes of kernels", "operators of a step")
        content["parts"] = [part for part in content["parts"] if part["name"] in kernels]
    path = data / (PREDICTED if rehearsal else MEASURED)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def between(text: str, name: str, made: str) -> str:
    """The page with what lies between two marks replaced."""
    begin, end = f"<!-- {name}: written by docs/figures/speed.py -->\n", f"<!-- end of {name} -->\n"
    before, mark, rest = text.partition(begin)
    _, stop, after = rest.partition(end)
    if not mark or not stop:
        raise SystemExit(f"the page has no marks for {name!r}")
    return f"{before}{begin}\n{made}\n{end}{after}"


def rows_of(content: dict[str, Any], part: str) -> list[Row]:
    """Rows of a part; none where it did not run."""
    return next((each["rows"] for each in content.get("parts", []) if each["name"] == part), [])


def calls_of(measured: dict[str, Any]) -> list[Row]:
    """Rows of single calls of the operator, over vectors and over codes."""
    return rows_of(measured, "one layer") + rows_of(measured, "tokens in few bits")


class Times:
    """Seconds of the rows of one layer, by batch, budget and name."""

    def __init__(self, rows: list[Row], seconds: Any) -> None:
        self.rows = [row for row in rows if row.get("shape")]
        self.seconds = seconds

    def of(self, batch: int, budget: int, name: str, kv_heads: int = 8) -> float | None:
        """Seconds, or None."""
        for row in self.rows:
            here = row["shape"]
            if (here["batch"], here["budget"], here["kv_heads"]) == (batch, budget, kv_heads) and row["name"] == name:
                return float(self.seconds(row))
        return None


def stored(batch: int, tokens: int) -> float:
    """Bytes of keys and values of 8 KV heads of dimension 128, in 16 bits."""
    return 2 * batch * 8 * tokens * 128 * 2


def ratio(times: Times, batch: int, budget: int, name: str, other: str) -> float | None:
    """One time over another."""
    a, b = times.of(batch, budget, name), times.of(batch, budget, other)
    return None if a is None or b is None else a / b


def answers(times: Times, copy: float | None, *, predicted: bool) -> dict[str, list[float | None]]:
    """The figures that targets are about; None for what is not known."""
    plain, order, several = "retained only", "moments of order 1", "12 summaries"
    here = times.of(32, 2048, plain)
    full = stored(16, 32768) / copy + LAUNCH if predicted and copy else times.of(16, 512, "SDPA, context 32768")
    small = times.of(16, 512, several)
    flush, step = times.of(16, 512, "flush 32, default"), times.of(16, 512, several)
    relative = ratio(times, 64, 512, plain, "SDPA")
    return {
        "copy": [None if here is None or copy is None else stored(32, 2048) / here / copy],
        "order 1": [ratio(times, 64, budget, order, plain) for budget in (512, 1024, 2048)],
        "summaries": [ratio(times, 64, 512, several, plain)],
        "full": [None if full is None or small is None else full / small],
        "flush": [None if flush is None or step is None else flush / (32 * step)],
        "sdpa": [relative],
        "codes": [share_of_codes(times, name, copy) for name in CODES],
    }


def share_of_codes(times: Times, name: str, copy: float | None) -> float | None:
    """Bandwidth over the bytes of records, of that of a copy."""
    here, bits = times.of(64, 2048, name), CODES[name]
    return None if here is None or copy is None else 64 * 8 * 2048 * record_bytes(128, 128, bits) / here / copy


TARGETS = [
    ("copy", "share of the copy bandwidth at 256 MiB a launch (B = 2048, batch 32)", "at least {:.0%}", [0.85], "93 %"),
    (
        "order 1",
        "order 1 over no moments, B = 512, 1024, 2048, batch 64",
        "at most {:.2f}",
        [1.17, 1.10, 1.07],
        "1.13, 1.06, 1.03",
    ),
    ("summaries", "summaries over no moments, B = 512, batch 64", "at most {:.3f}", [1.05], "1.02"),
    ("full", "SDPA over all of 32k over summaries at B = 512, batch 16", "at least {:.0f}", [35], "57 by bytes"),
    ("flush", "a flush of 32 over 32 decode steps, B = 512, batch 16", "at most {:.0%}", [0.05], "2.3 %"),
    (
        "codes",
        "codes of 4 and of 8 bits: share of the copy bandwidth over their bytes, B = 2048, batch 64",
        "at least {:.0%}",
        [0.8, 0.8],
        "91 %, 95 %",
    ),
    ("sdpa", "no moments over SDPA at the same B = 512, batch 64", "at most {:.2f}", [1.0], "1.0"),
]


def targets(predicted: dict[str, Any], measured: dict[str, Any]) -> str:
    """Target, limit, predictions and what was measured."""
    columns = []
    for name, gpu in GPUS.items():
        times = Times([row for row in predicted["predictions"] if row["gpu"] == name], lambda row: row["seconds"])
        columns.append(answers(times, COPY * gpu.bandwidth, predicted=True))
    layer = calls_of(measured)
    copies = [row["bytes"] / row["seconds"]["median"] for row in layer if row["name"] == "copy"]
    times = Times(layer, lambda row: row["seconds"]["median"])
    columns.append(answers(times, copies[0] if copies else None, predicted=False))
    lines = [
        f"| target | | physical limit | {' | '.join(f'predicted, {name}' for name in GPUS)} | measured |",
        "|---|---|---|--:|--:|--:|",
    ]
    for key, what, form, goals, limit in TARGETS:
        number = form.partition("{")[2].join(("{", ""))
        cells = [form.partition("{")[0] + figures(number, list(goals)), limit]
        for place, column in enumerate(columns):
            missing = NONE if place == len(GPUS) else "not predicted"
            cells.append(figures(number, column[key], missing) + verdict(key, column[key], goals))
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    errors = {
        name: max((row["relative"] for row in rows_of(measured, f"kernels, {name}")), default=None)
        for name in ("float32", "bfloat16")
    }
    for name, goal in (("float32", "2e-6"), ("bfloat16", "8e-3")):
        here = NONE if errors[name] is None else f"{errors[name]:.1e}"
        lines.append(f"| relative error against float64, {name} | at most {goal} | | | | {here} |")
    return "\n".join(lines) + "\n"


def figures(form: str, values: list[float | None], missing: str = NONE) -> str:
    """Several numbers, or that there are none."""
    shown = [None if x is None else form.format(x).replace("%", " %") for x in values]
    return missing if None in shown else ", ".join(str(x) for x in shown)


def verdict(key: str, values: list[float | None], goals: list[float]) -> str:
    """What to say of figures that miss their target."""
    least = key in ("copy", "full", "codes")
    missed = any(x is not None and (x < goal if least else x > goal) for x, goal in zip(values, goals, strict=True))
    return " (missed)" if missed else ""


def launches(predicted: dict[str, Any], measured: dict[str, Any]) -> str:
    """A line for each shape and kind."""
    times = Times(calls_of(measured), lambda row: row["seconds"]["median"])
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in predicted["predictions"]:
        groups.setdefault((*row["shape"].values(), row["name"]), []).append(row)
    device = f", {measured['about']['device']['name']}" if measured else ""
    lines = [
        "| batch, KV heads, group, d, B | | launches | blocks | bytes a token | MiB | "
        + " | ".join(f"predicted, {name}, us" for name in GPUS)
        + f" | measured{device}, us |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for rows in groups.values():
        first = rows[0]
        shape = first["shape"]
        here = times.of(shape["batch"], shape["budget"], first["name"], shape["kv_heads"])
        cells = [
            ", ".join(str(x) for x in list(shape.values())[:5]),
            first["name"],
            str(first["launches"]),
            str(first["blocks"]),
            f"{first['bytes_of_a_token']:.0f}",
            f"{first['bytes'] / 2**20:.1f}",
            *(f"{row['seconds'] * 1e6:.0f}" for row in rows),
            NONE if here is None else f"{here * 1e6:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    assumed = (
        f"Assumed, not measured: {LAUNCH * 1e6:.0f} us a launch, {LATENCY * 1e6:.1f} us from a request to its "
        f"answer, and {COPY:.0%} of the bandwidth on paper ("
        + ", ".join(f"{name} {gpu.bandwidth / 1e12:.2f} TB/s" for name, gpu in GPUS.items())
        + ") for a copy; 4 instructions a cycle of 1.98 GHz; 6.0 TB/s of whole sectors from the L2 cache."
    )
    return "\n".join(lines) + "\n\n" + assumed.replace("%", " %") + "\n"


def kernels(predicted: dict[str, Any]) -> str:
    """What each kernel takes."""
    lines = ["| kernel | warps | registers | shared memory, KiB | blocks |", "|---|--:|--:|--:|--:|"]
    builds = {row["kernel"]: row for row in rows_of(predicted, "compiled kernels")}
    for row in (builds[name] for name in sorted(builds)):
        shared = f"{row['shared'] / 1024:.1f}"
        lines.append(f"| {row['kernel']} | {row['warps']} | {row['registers']} | {shared} | {row['blocks']} |")
    return f"Triton {predicted['about']['triton']}, sm_90:\n\n" + "\n".join(lines) + "\n"


def operators(predicted: dict[str, Any]) -> str:
    """How many a step launches."""
    lines = [
        "| operators that a step of one layer launches | as they come | in place (`static`) |",
        "|---|--:|--:|",
    ]
    rows = rows_of(predicted, "operators of a step")
    for kind in dict.fromkeys(row["kind"] for row in rows):
        both = {row["static"]: str(row["operators"]) for row in rows if row["kind"] == kind}
        lines.append(f"| {kind} | {both[False]} | {both[True]} |")
    return "\n".join(lines) + "\n"


def found(measured: dict[str, Any]) -> str:
    """What else a GPU was asked."""
    lines = ["| on a GPU | |", "|---|---|"]
    for name in ("bfloat16", "float16", "float32"):
        rows = rows_of(measured, f"kernels, {name}")
        right = sum(bool(row["right"]) for row in rows)
        lines.append(f"| kernels in {name}, cases that are right | {f'{right} of {len(rows)}' if rows else NONE} |")
    steps = rows_of(measured, "steps as graphs")
    for kind in ("default", "the paper's"):
        times = [f"{row['name']} {in_us(row)}" for row in steps if row["kind"] == kind and "seconds" in row]
        lines.append(f"| a step in place of one layer, batch 2, {kind} | {', '.join(times) or NONE} |")
    held = rows_of(measured, "flushes as graphs")
    for batch, layers in ((1, 1), (16, 1), (1, 32)):
        own = [row for row in held if (row["batch"], row["layers"]) == (batch, layers)]
        times = [f"{row['name']} {in_us(row)}" for row in own]
        lines.append(f"| a flush of the default, batch {batch}, layers {layers} | {', '.join(times) or NONE} |")
    stack = rows_of(measured, "a model of 8B")
    for name in ("budget 512", "budget 2048", "full cache of 8192", "full cache of 32768", "full cache of 131072"):
        times = [in_us(row) for row in stack if row["name"] == name]
        lines.append(f"| a step of a model of 8B, one CUDA graph, {name} | {', '.join(times) or NONE} |")
    whole = rows_of(measured, "a model of transformers")
    for name in ("full cache", "budget 512", "budget 512, static", "budget 512, CUDA graphs"):
        times = [in_us(row) for row in whole if row["name"] == name]
        lines.append(
            f"| a step of a model of transformers, 8B wide, {name}, context 32768 | {', '.join(times) or NONE} |"
        )
    modes = rows_of(measured, "modes of a cache")
    right = sum(bool(row["right"]) for row in modes)
    lines.append(f"| modes of a cache equal to the CPU's | {f'{right} of {len(modes)}' if modes else NONE} |")
    for context in (8192, 32768, 131072):
        sizes = [row["peak"] for row in rows_of(measured, "memory of a prefill") if row["context"] == context]
        shown = f"{sizes[0] / 2**20:.0f} MiB" if sizes else NONE
        lines.append(f"| peak memory of a layer's prefill of {context} tokens, beyond its inputs | {shown} |")
    taken = [row for row in rows_of(measured, "tuning") if row.get("chosen")]
    faster = [row["share"] for row in taken if row["share"] < 1]
    shown = f"{len(faster)} of {len(taken)}" + (f"; least time, of the built-in's: {min(faster):.0%}" if faster else "")
    shown = shown.replace("%", " %") if taken else NONE
    lines.append(f"| kinds of launches for which tuning found better sizes than the built-in ones | {shown} |")
    told = rows_of(measured, "operators PyTorch checks")
    right = sum(bool(row["right"]) for row in told)
    lines.append(f"| operators that pass PyTorch's check, calls | {f'{right} of {len(told)}' if told else NONE} |")
    complaints = rows_of(measured, "compute-sanitizer")
    said = ", ".join(f"{row['tool']}: {row['found']}" for row in complaints)
    lines.append(f"| what compute-sanitizer found | {said or NONE} |")
    return "\n".join(lines) + "\n"


def in_us(row: Row) -> str:
    """Median of a row."""
    return f"{row['seconds']['median'] * 1e6:.1f} us"


def plot(predicted: dict[str, Any], measured: dict[str, Any], path: Path) -> None:
    """Measured against predicted, of the GPU whose data sheet fits best by name."""
    from matplotlib.figure import Figure

    device = measured["about"]["device"]["name"]
    gpu = next((name for name in GPUS if name in device), next(iter(GPUS)))
    times = Times(calls_of(measured), lambda row: row["seconds"]["median"])
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axis = figure.subplots()
    ends: list[float] = []
    for name in dict.fromkeys(row["name"] for row in predicted["predictions"]):
        points = []
        for row in predicted["predictions"]:
            shape = row["shape"]
            here = times.of(shape["batch"], shape["budget"], row["name"], shape["kv_heads"])
            if (row["gpu"], row["name"]) == (gpu, name) and here is not None:
                points.append((row["seconds"] * 1e6, here * 1e6))
        if points:
            axis.plot(*zip(*points, strict=True), "o", label=name)
            ends += [x for point in points for x in point]
    if ends:
        axis.plot([min(ends), max(ends)], [min(ends), max(ends)], "k--", linewidth=1, label="as predicted")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel(f"predicted for {gpu}, us")
    axis.set_ylabel("measured, us")
    axis.set_title(device, fontsize=10)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()

"""The offline evaluation as one command: a list of measurements, each resumed where it was interrupted."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from momentkv.evaluation.code import code_version
from momentkv.evaluation.gather import COUNTED, SMOKE, SUMMARY, called
from momentkv.evaluation.processes import interrupts_later
from momentkv.evaluation.report import read_json
from momentkv.evaluation.report_page import write_report
from momentkv.evaluation.sources import BUILTIN_MODEL
from momentkv.evaluation.split import REPORT_HAYSTACK, REPORT_TEXTS

__all__ = ["PLAN", "Measurement", "suite"]

WAITS, RUNS = "waits", "running"
# The folder of the page of all results.
REPORT = "report"
# What is recommended, and the best of other kinds.
METHODS = "default default@auto twice@auto snapkv/none snapkv/none@4 kvzip/none"
TRIED = "default@tried twice@tried"
SELECTIONS, PAPER = "expected-attention/none momentkv/none", "momentkv/order-1"


class Measurement(NamedTuple):
    """One command of ``momentkv evaluate``.

    Attributes
    ----------
    name : str
        Of its results file.
    arguments, smoke : str
        Its arguments, and those of a short run that shows that it works.
    """

    name: str
    arguments: str
    smoke: str


def needles(name: str, arguments: str, smoke: str) -> Measurement:
    """A measurement of needles."""
    few = "--samples 1 --budgets 64 --methods default snapkv/none"
    return Measurement(name, f"needles {arguments} --methods {METHODS}", f"needles {smoke} {few}")


# The longest first, so that workers end at about the same time. Texts and haystacks are of the reporting part of
# texts.toml: nothing was ever chosen with them.
PLAN = (
    needles(
        "single-2000",
        f"--haystack {REPORT_HAYSTACK} --lengths 2000 --samples 4 --budgets 128 256 512 --question unseen",
        f"--haystack {REPORT_HAYSTACK} --lengths 700 --depths 0.5 --question unseen",
    ),
    needles(
        "several-2000",
        "--tasks multi-key multi-query --lengths 2000 --samples 10 --budgets 128 256 512 --question unseen",
        "--tasks multi-key multi-query --keys 2 --lengths 700 --question unseen",
    ),
    needles(
        "single-1000",
        f"--haystack {REPORT_HAYSTACK} --lengths 1000 --samples 4 --budgets 128 256 512",
        f"--haystack {REPORT_HAYSTACK} --lengths 600 --depths 0.5",
    ),
    needles(
        "single-4000",
        f"--haystack {REPORT_HAYSTACK} --lengths 4000 --samples 2 --budgets 256 512 --question unseen",
        f"--haystack {REPORT_HAYSTACK} --lengths 800 --depths 0.5 --question unseen",
    ),
    *(
        Measurement(
            name,
            f"fidelity --text {' '.join(texts)} --budgets 128 256 512 --methods {METHODS} {TRIED} {SELECTIONS} {PAPER}",
            "fidelity --text typesmapping --context 100 --following 8 --budgets 80 --methods default snapkv/none",
        )
        for name, texts in (("fidelity", REPORT_TEXTS[::2]), ("fidelity-more", REPORT_TEXTS[1::2]))
    ),
    needles(
        "codes-1000",
        "--tasks multi-key --value uuid --keys 2 --lengths 1000 --samples 10 --budgets 128 256 512 --question unseen",
        "--tasks multi-key --value uuid --keys 2 --lengths 700 --question unseen",
    ),
    Measurement(
        "decoding",
        f"fidelity --decode 32 --text {' '.join(REPORT_TEXTS[::2])} --context 2048 --following 512 --budgets 256 "
        "--methods default default@auto h2o/none tova/none snapkv/none streaming/none",
        "fidelity --decode 4 --text typesmapping --context 100 --following 8 --budgets 80 --methods snapkv/none",
    ),
    *(
        Measurement(
            name,
            f"gap --text string-methods --policy {policy} --budget {budget} --correction {correction}",
            f"gap --text typesmapping --context 99 --following 8 --policy snapkv --budget 40 --correction {correction}",
        )
        for name, policy, budget, correction in (
            ("gap", "momentkv", 128, "order-1"),
            ("gap-default", "balanced", 110, "summaries"),
        )
    ),
)


def suite(options: argparse.Namespace) -> int:
    """Run all measurements that are not complete, several at a time, and write the report of all results."""
    names = [measurement.name for measurement in PLAN]
    for name in options.only or ():
        if name not in names:
            raise ValueError(f"only has {name!r}; use some of {', '.join(names)}")
    labels = labels_of(options.model)
    # Results of a short run are none, and a later run would find some in the place of its own.
    folder = Path(options.output) / SMOKE if options.smoke else Path(options.output)
    console = Console()
    chosen = [x for x in PLAN if options.only is None or x.name in options.only]
    commands: dict[str, list[str]] = {}
    for label, model in labels.items():
        (folder / label).mkdir(parents=True, exist_ok=True)
        commands |= {f"{label}/{x.name}": command_of(x, folder / label, model, options) for x in chosen}
    with Live(console=console, refresh_per_second=1) as live:
        state = run_all(commands, folder, options.workers, lambda state: live.update(progress_of(state, folder)))
    failed = [name for name, what in state.items() if what == failure(name)]
    for name in failed:
        console.print(Text(name, "bold red") + Text(f": momentkv {shlex.join(commands[name])}"))
        console.print(Text("\n".join((folder / f"{name}.log").read_text(encoding="utf-8").splitlines()[-5:])))
    if any(path.name != SUMMARY for path in folder.glob("*/*.json")):
        page = write_report([folder], folder / REPORT)
        console.print(f"report: {page}", soft_wrap=True, markup=False)
    return 1 if failed else 0


def labels_of(models: Sequence[str]) -> dict[str, str]:
    """Models by the name that their folder of results has.

    Raises
    ------
    ValueError
        If two have the same, or one has none or that of another folder.

    Examples
    --------
    >>> labels_of(["Qwen/Qwen2.5-0.5B", "some/where/tiny-q4.gguf"])
    {'Qwen2.5-0.5B': 'Qwen/Qwen2.5-0.5B', 'tiny-q4': 'some/where/tiny-q4.gguf'}
    """
    labels: dict[str, str] = {}
    for model in models:
        label = called(model)
        if label in labels:
            raise ValueError(
                f"model has {labels[label]!r} and {model!r}, whose results would be in one folder, {label!r}; give "
                "each an --output of its own"
            )
        if label in ("", "..", REPORT, SMOKE):
            raise ValueError(
                f"model has {model!r}, which gives its folder of results no name of its own; rename it, or name it by "
                "another path"
            )
        labels[label] = model
    return labels


def run_all(
    commands: dict[str, list[str]], folder: Path, workers: int, show: Callable[[dict[str, str]], None]
) -> dict[str, str]:
    """Run commands, several at a time, each in a process that ends with this one; returns the outcome of each."""
    state = dict.fromkeys(commands, WAITS)
    started: dict[str, float] = {}
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while running or WAITS in state.values():
            for name in [name for name, what in state.items() if what == WAITS][: workers - len(running)]:
                if complete(folder / f"{name}.json", commands[name]):
                    state[name] = "complete"
                    continue
                state[name], started[name] = RUNS, time.monotonic()
                with interrupts_later():
                    running[name] = start(commands[name], folder / f"{name}.log")
            for name, process in list(running.items()):
                if process.poll() is not None:
                    took = time.monotonic() - started[name]
                    state[name] = f"done in {took:.0f} s" if running.pop(name).returncode == 0 else failure(name)
            show(state)
            if running:
                time.sleep(0.2)
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()
    return state


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a command that writes to its log."""
    with log.open("w", encoding="utf-8") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "momentkv", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "150"},
        )


def failure(name: str) -> str:
    """The message for a measurement that failed."""
    return f"failed, see {name}.log"


def command_of(measurement: Measurement, folder: Path, model: str, options: argparse.Namespace) -> list[str]:
    """Arguments of the command that measures it."""
    words = shlex.split(measurement.smoke if options.smoke else measurement.arguments)
    named = [] if model == BUILTIN_MODEL else ["--model", model]
    counted = ["--bytes", str(options.bytes)] if words[0] in COUNTED else []
    return ["evaluate", *words, *counted, *named, "--output", str(folder / f"{measurement.name}.json")]


def complete(path: Path, command: list[str]) -> bool:
    """Whether a file has all results of a command, of this code."""
    if not path.exists():
        return False
    try:
        content: dict[str, Any] = read_json(path)
    except ValueError:
        return False
    version = content.get("protocol", content).get("momentkv")
    same = content.get("command") == shlex.join(["momentkv", *command])
    return bool(content.get("complete")) and same and version == code_version()


def progress_of(state: dict[str, str], folder: Path) -> Group:
    """What is done, what runs, and how many results each has."""
    table = Table(box=None, padding=(0, 2), show_header=False)
    for name, what in state.items():
        path = folder / f"{name}.json"
        count = ""
        if what == RUNS and path.exists():
            rows = read_json(path).get("rows", ())
            count = f"{len(rows)} results"
        style = {RUNS: "bold", WAITS: "dim"}.get(what, "red" if what == failure(name) else "green")
        table.add_row(Text(name, style=style), Text(what, style=style), count)
    ended = sum(what not in (RUNS, WAITS) for what in state.values())
    return Group(table, Text(f"{ended} of {len(state)} measurements", style="bold"))

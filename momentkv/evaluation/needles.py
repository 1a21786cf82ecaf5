"""The command ``momentkv evaluate needles``: whether a compressed cache still gives back what one sentence said."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from momentkv.cache.config import EXACT_WINDOW
from momentkv.evaluation.code import code_version
from momentkv.evaluation.commands import called, check_methods, earlier_results, finished, grid_of, in_segments, save
from momentkv.evaluation.haystack import KEYS, TASKS, Haystack, make_haystack
from momentkv.evaluation.report import progress_bar, save_figure, show, write_json
from momentkv.evaluation.retrieval import Cell, measure_haystack
from momentkv.evaluation.settings import bytes_as_tokens
from momentkv.evaluation.sources import BUILTIN_MODEL, load_model, load_text
from momentkv.evaluation.split import roles_of, said_of

__all__ = ["needles"]

# What tells a row from all others of its file.
KEY = ("layout", "length", "haystack", "task", "index", "question", "policy", "correction", "bytes_as_tokens")


class Planned(NamedTuple):
    """A haystack to ask questions about, and the columns that identify it."""

    columns: dict[str, Any]
    haystack: Haystack


def needles(options: argparse.Namespace) -> int:
    """Hide needles in haystacks and ask for them; write JSON, a plot and a table."""
    from momentkv.evaluation.lines import needle_lines, needles_of
    from momentkv.evaluation.report_plots import plot_found
    from momentkv.evaluation.terminal import needles_table

    check(options)
    console = Console()
    text = None if options.haystack is None else load_text(options.haystack)
    earlier = None if options.write_haystacks is not None else earlier_results(options)
    with console.status("loading the model"):
        model, tokenizer = load_model(options.model)
    cells = [(question, setting) for question in options.question for setting in grid_of(model, options)]
    name = options.model or BUILTIN_MODEL
    prose = "made up" if text is None else Path(options.haystack).name
    roles = roles_of({prose: text or ""})
    protocol = {
        "model": name,
        "bytes": options.bytes,
        "value": options.value,
        "keys": options.keys,
        "haystack": prose,
        **({} if text is None else {"text_sha256": {prose: hashlib.sha256(text.encode()).hexdigest()}}),
        "seed": options.seed,
        "generate": options.generate,
        "unseen": in_segments(
            "the context is compressed once, after one-shot prefill; question and answer in one pass after it", options
        ),
        "seen": "the question is compressed, too; the answer in one pass after it",
        "sinks": 1,
        "window": 32,
        "exact_window": EXACT_WINDOW,
        "momentkv": code_version(),
    }
    # Made before any is measured, so that one that does not fit is refused at once.
    with console.status("making haystacks"):
        planned = list(plan(options, tokenizer, text))
    if options.write_haystacks is not None:
        content = {"protocol": protocol, "haystacks": [exported(x) for x in planned]}
        path = write_json(options.write_haystacks, content, name="write_haystacks")
        console.print(f"{len(planned)} haystacks: {path}", soft_wrap=True, markup=False)
        return 0
    rows = finished(earlier, protocol, options.output)
    if rows:
        console.print(f"{len(rows)} results found in {options.output}; --fresh discards them", markup=False)
    path = Path(options.output)
    done = {key_of(row) for row in rows}
    with progress_bar(console) as progress:
        task = progress.add_task("needles", total=len(planned) * len(cells))
        for columns, haystack in planned:
            asked_for = list(numbered(haystack))
            left = [
                cell
                for cell in cells
                if not all(key_of(columns | which | labels(model, cell, options)) in done for which in asked_for)
            ]
            progress.advance(task, len(cells) - len(left))
            if not left:
                continue
            last = len(asked_for) - 1
            measured = measure_haystack(
                model, haystack, left, tokenizer=tokenizer, generate=options.generate, segment=options.segment
            )
            for asked in measured:
                depth = round(haystack.questions[asked.which].depth, 4)
                row = columns | asked_for[asked.which] | {"depth": depth} | labels(model, asked.cell, options)
                if key_of(row) not in done:
                    done.add(key_of(row))
                    rows.append(row | {"nbytes": asked.nbytes} | dataclasses.asdict(asked.recall))
                if asked.cell is not None and asked.which == last:
                    progress.advance(task)
            # After every haystack, so that an interruption loses no more than one.
            save(path, options, protocol, rows, roles)
    save(path, options, protocol, rows, roles, complete=True)
    title = f"{name}: needles in {'made-up prose' if text is None else Path(options.haystack).name}"
    lines = needle_lines(needles_of(rows))
    show(console, needles_table(lines, title=title, bits=options.bytes))
    for line in said_of(roles):
        console.print(line, markup=False)
    figure = plot_found(lines, bits=options.bytes, title=title)
    console.print(
        f"results: {path}   plot: {save_figure(figure, path.with_suffix('.png'))}", soft_wrap=True, markup=False
    )
    return 0


def plan(options: argparse.Namespace, tokenizer: Any, text: str | None) -> Iterator[Planned]:
    """All haystacks, in rounds over lengths and depths: an interrupted run has then seen each about equally often."""
    layouts: dict[tuple[bool, int], list[str]] = {}
    for name in options.tasks:
        layouts.setdefault(TASKS[name][:2], []).append(name)
    for sample in range(options.samples):
        for length in options.lengths:
            for (several, each), tasks in layouts.items():
                for depth in [None] if several else options.depths:
                    # Haystacks of a kind and depth are the same whatever else is measured beside them.
                    seed = (options.seed, length, each, 0 if depth is None else 1 + round(1000 * depth), sample)
                    haystack = make_haystack(
                        tokenizer,
                        length,
                        tasks,
                        depth=depth,
                        value=options.value,
                        keys=options.keys,
                        haystack=text,
                        seed=seed,
                    )
                    label = f"{sample}" if depth is None else f"{sample} at {depth:g}"
                    layout = f"{options.keys if several else 1} keys, {each} values"
                    columns = {"layout": layout, "value": options.value, "length": length, "haystack": label}
                    yield Planned(columns, haystack)


def exported(planned: Planned) -> dict[str, Any]:
    """A haystack for other programs: token ids, and which of an answer's tokens are values."""
    return planned.columns | {
        "context": planned.haystack.context,
        "questions": [
            {
                **which,
                "depth": round(question.depth, 4),
                "question": question.tokens,
                "answers": [{"tokens": x.tokens, "counted": x.counted} for x in question.answers],
            }
            for which, question in zip(numbered(planned.haystack), planned.haystack.questions, strict=True)
        ],
    }


def numbered(haystack: Haystack) -> Iterator[dict[str, Any]]:
    """Task and number of each question: within its task, so that it is the same whatever else is asked beside it."""
    numbers: defaultdict[str, Iterator[int]] = defaultdict(count)
    for question in haystack.questions:
        yield {"task": question.task, "index": next(numbers[question.task])}


def labels(model: Any, cell: Cell | None, options: argparse.Namespace) -> dict[str, Any]:
    """What a row says of the cache that was asked."""
    if cell is None:
        full = "full cache"
        return {
            "question": "",
            "method": full,
            "policy": full,
            "correction": "",
            "budget": None,
            "bytes_as_tokens": None,
        }
    question, setting = cell
    return {
        "question": question,
        "method": called(setting.method, options.segment),
        "policy": setting.policy_name,
        "correction": setting.correction,
        "budget": setting.budget,
        "bytes_as_tokens": bytes_as_tokens(model, setting, itemsize=options.bytes // 8),
    }


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row from all others."""
    return tuple(row[name] for name in KEY)


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before the model is loaded."""
    check_methods(options)
    for depth in options.depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths has {depth:g}; use shares of the context from 0 to 1")
    if not 1 <= options.keys <= len(KEYS):
        raise ValueError(f"keys is {options.keys}; use 1 to {len(KEYS)} for the tasks that have several")
    if options.samples < 1:
        raise ValueError(f"samples is {options.samples}; use at least 1 for each depth")
    if options.seed < 0:
        raise ValueError(f"seed is {options.seed}; use 0 or a positive number")

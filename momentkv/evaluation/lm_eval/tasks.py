"""The command ``momentkv evaluate tasks``: tasks of lm_eval, each prompt read once for all caches, at equal bytes."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import numbers
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.tasks import TaskManager
from rich.console import Console

from momentkv.evaluation.code import code_version
from momentkv.evaluation.commands import check_methods, earlier_results, finished, grid_of, save
from momentkv.evaluation.lm_eval.shared import SharedLM
from momentkv.evaluation.report import progress_bar, save_figure, show
from momentkv.evaluation.report_plots import plot_tasks
from momentkv.evaluation.settings import Setting
from momentkv.evaluation.sources import BUILTIN_MODEL, load_model
from momentkv.evaluation.task_lines import task_lines
from momentkv.evaluation.terminal import tasks_table

__all__ = ["tasks"]

FULL = "full cache"
UNSEEN = "what comes before the question is compressed once, and the question read afterwards"
SEEN = "the whole prompt but its last token is compressed once"
# As lm_eval's own command has them, so that documents and examples that tasks draw are those that it draws.
SEED, OTHER_SEED = 0, 1234


def tasks(options: argparse.Namespace) -> int:
    """Let a model answer tasks of lm_eval with every cache; write JSON, a plot and a table."""
    check(options)
    console = Console()
    earlier = earlier_results(options)
    with console.status("loading the model"):
        model, tokenizer = load_model(options.model)
    settings = grid_of(model, options)
    # It warns of a model that is loaded already, and of every metric of which a task says little.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = SharedLM(
        model,
        tokenizer,
        settings,
        question_marker=options.question_marker,
        context_field=options.context_field,
        max_length=options.max_length,
    )
    name = options.model or BUILTIN_MODEL
    protocol = {
        "model": name,
        "bytes": options.bytes,
        "tasks": list(options.tasks),
        "metadata": options.metadata,
        "limit": options.limit,
        "chat": options.chat,
        "question": ("seen: " + SEEN) if lm.query_aware else ("unseen: " + UNSEEN),
        "question_marker": options.question_marker,
        "context_field": options.context_field,
        "generated": "as the tasks ask; eviction goes on, 32 tokens at a time",
        "sinks": 1,
        "window": options.window,
        "exact_window": options.exact_window,
        "momentkv": code_version(),
    }
    path = Path(options.output)
    rows = finished(earlier, protocol, path)
    if rows:
        console.print(f"{len(rows)} answers found in {path}; --fresh discards them", markup=False)
    with console.status("making the documents of the tasks"):
        made = made_tasks(options, tokenizer, lm)
        # Every prompt is looked at before the first is read.
        requests = [(lm.context_of(request), request) for task in made.values() for request in task.instances]
    check_same(rows, made, path)
    done = {(row["task"], row["document"], row["method"], row["bytes_as_tokens"]): row for row in rows}
    caches: list[Setting | None] = [None, *settings]
    with progress_bar(console) as progress:
        bar = progress.add_task("tasks", total=len(requests) * len(caches))
        for group in by_context(requests):
            progress.update(bar, description=f"tasks, {group[0].task_name}")
            for setting in caches:
                of = labels(setting)
                for request in group:
                    row = {"task": request.task_name, "document": request.doc_id, **of}
                    key = (row["task"], row["document"], row["method"], row["bytes_as_tokens"])
                    if key not in done:
                        done[key] = row | {"prompt": digest(request), "answer": lm.answer(request, setting)}
                        rows.append(done[key])
                    progress.advance(bar)
                # After every cache, so that an interruption loses no more than one of its questions about a context.
                score(made, [row for row in rows if of.items() <= row.items()])
                save(path, options, protocol, rows, {})
    save(path, options, protocol, rows, {}, complete=True)
    lines = task_lines(rows)
    title = f"{name}: tasks of lm_eval, question {'seen' if lm.query_aware else 'unseen'}"
    show(console, tasks_table(lines, title=title, bits=options.bytes))
    figure = plot_tasks(lines, bits=options.bytes, title=title)
    console.print(
        f"results: {path}   plot: {save_figure(figure, path.with_suffix('.png'))}", soft_wrap=True, markup=False
    )
    return 0


def made_tasks(options: argparse.Namespace, tokenizer: Any, lm: SharedLM) -> dict[str, Any]:
    """The tasks by their names, with the requests that they make of the model.

    Raises
    ------
    ValueError
        If a task is not known, is not answered by generation, or has no metric that is a number for each document.
    """
    random.seed(SEED)
    np.random.seed(OTHER_SEED)  # noqa: NPY002, which is what tasks draw from
    torch.manual_seed(OTHER_SEED)
    with tempfile.TemporaryDirectory() as folder:
        # Tasks that make their own data count its tokens, with a tokenizer that they load from a folder.
        tokenizer.save_pretrained(folder)
        manager = manager_of(options.tasks, options.include_path, {"tokenizer": folder, **(options.metadata or {})})
        for name in options.tasks:
            if name not in manager.all_tasks:
                raise ValueError(f"tasks has {name!r}, which lm_eval does not know; see lm-eval ls tasks")
        made: dict[str, Any] = manager.load(list(options.tasks))["tasks"]
    for name, task in made.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise ValueError(
                f"tasks has {name!r}, which is answered by {task.OUTPUT_TYPE}; use momentkv lm-eval for it, or tasks "
                "that are answered by generation"
            )
        task.set_fewshot_seed(OTHER_SEED)
        task.build_all_requests(
            limit=options.limit,
            apply_chat_template=options.chat,
            chat_template=lm.apply_chat_template if options.chat else None,
            tokenizer_name=lm.tokenizer_name if options.chat else "",
        )
        nothing = {"task": name, "document": task.instances[0].doc_id, "answer": ""} | labels(None)
        score(made, [nothing])
        if not nothing["metrics"]:
            raise ValueError(
                f"tasks has {name!r}, none of whose metrics is a number for each document; use momentkv lm-eval for it"
            )
    return made


def manager_of(names: Sequence[str], own: str | None, metadata: dict[str, Any]) -> TaskManager:
    """What knows these tasks: those of a folder of one's own, and lm_eval's too unless all are found there.

    lm_eval's are thousands of files, and reading them takes longer than many a task.
    """
    if own is not None:
        manager = TaskManager(include_path=own, include_defaults=False, metadata=metadata)
        # Groups and tags may name tasks that are elsewhere.
        if set(names) <= set(manager.all_subtasks):
            return manager
    return TaskManager(include_path=own, metadata=metadata)


def digest(request: Any) -> str:
    """What tells a prompt from others."""
    return hashlib.sha256(request.args[0].encode()).hexdigest()[:16]


def check_same(rows: list[dict[str, Any]], made: Mapping[str, Any], path: Path) -> None:
    """Raise unless answers that were found are to the prompts that would be given now."""
    prompts = {(request.task_name, request.doc_id): digest(request) for x in made.values() for request in x.instances}
    for row in rows:
        if prompts.get((row["task"], row["document"])) != row["prompt"]:
            raise ValueError(
                f"output is {str(path)!r}, whose answers are to other documents of task {row['task']!r}: its data have "
                "changed, or were drawn otherwise; name another file, or discard them with --fresh"
            )


def by_context(requests: list[tuple[tuple[int, ...], Any]]) -> list[list[Any]]:
    """Requests that share a context, together; in the order in which their contexts first come."""
    groups: dict[tuple[int, ...], list[Any]] = {}
    for context, request in requests:
        groups.setdefault(context, []).append(request)
    return list(groups.values())


def labels(setting: Setting | None) -> dict[str, Any]:
    """What a row says of the cache that answered."""
    if setting is None:
        return {"method": FULL, "budget": None, "bytes_as_tokens": None}
    return {"method": setting.method, "budget": setting.budget, "bytes_as_tokens": setting.size}


def score(made: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """Add to every row what the filters and metrics of its task say of its answer; lm_eval's own, unchanged."""
    answers: dict[tuple[str, str, Any], dict[int, dict[str, Any]]] = {}
    for row in rows:
        answers.setdefault((row["task"], row["method"], row["bytes_as_tokens"]), {})[row["document"]] = row
    for (name, _, _), found in answers.items():
        task = made[name]
        for request in task.instances:
            request.resps = [found.get(request.doc_id, {"answer": ""})["answer"]]
            request.filtered_resps = {}
        task.apply_filters()
        for request in task.instances:
            if request.doc_id in found:
                found[request.doc_id]["metrics"] = {
                    f"{metric},{kind}": float(value)
                    for kind, filtered in request.filtered_resps.items()
                    for metric, value in task.process_results(request.doc, [filtered]).items()
                    # RULER says so of lengths that a document does not have.
                    if isinstance(value, numbers.Real) and value != -1
                }


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before the model is loaded."""
    check_methods(options)
    if options.limit is not None and options.limit < 1:
        raise ValueError(f"limit is {options.limit}; use at least one document of each task, or leave it out")
    if options.question_marker is not None and options.context_field is not None:
        raise ValueError(
            f"question_marker is {options.question_marker!r} and context_field is {options.context_field!r}; use one "
            "of them, or neither where the question is to be seen"
        )
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise ValueError(f"include_path is {options.include_path!r}, which is no folder; name one that holds tasks")
    if isinstance(options.metadata, str):
        try:
            options.metadata = json.loads(options.metadata)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"metadata is {options.metadata!r}, which is not JSON ({error}); write an object"
            ) from error
    if options.metadata is not None and not isinstance(options.metadata, dict):
        raise ValueError(f"metadata is {options.metadata!r}; write a JSON object")

"""Brings the results of many measurements together: one summary, small enough to be kept beside the text about it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from momentkv import __version__
from momentkv.evaluation.alike import check_measured_alike, check_read_alike, counted_in
from momentkv.evaluation.lines import Row, depth_lines, fidelity_lines, needle_lines, needles_of, pair_lines
from momentkv.evaluation.report import read_json
from momentkv.evaluation.split import role_of
from momentkv.evaluation.task_lines import task_lines

__all__ = ["COUNTED", "SMOKE", "SUMMARY", "called", "gather", "results_in", "summary_in"]

# The file that `momentkv evaluate report` writes, and reads again.
SUMMARY = "summary.json"
# The folder of what `momentkv evaluate suite --smoke` writes, which counts only where it is named itself.
SMOKE = "smoke"
# Kinds of results that are of texts, and all whose budgets are bytes; commands have the same names.
OF_TEXTS = ("needles", "fidelity", "decoding")
COUNTED = (*OF_TEXTS, "tasks")
# What a summary has, that of an earlier version as well.
IN_A_SUMMARY = {
    *("momentkv", "needles", "depths", "pairs", "fidelity", "decoding", "gap", "lm_eval", "texts", "sources"),
    "left_out",
}
# What every row of a kind says, and what results of a gap do: a file without is something else.
OF_A_CACHE = {"policy", "correction", "budget", "bytes_as_tokens"}
COLUMNS = {
    "needles": OF_A_CACHE
    | {"layout", "value", "length", "haystack", "task", "index", "depth", "question"}
    | {"values", "tokens", "nll", "generated"},
    "tasks": {"task", "document", "method", "bytes_as_tokens", "metrics"},
    "fidelity": OF_A_CACHE | {"text", "nbytes", "kl", "top1", "nll_change"},
}
OF_A_GAP = {"model", "text", "policy", "budget", "correction", "layers", "mean", "by_layer_and_head"}


def results_in(places: Iterable[str | Path]) -> list[Path]:
    """JSON files named, or in the folders named, in the order of their names; none of a short run within them.

    Raises
    ------
    ValueError
        If there are none, or a place does not exist.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"results is {str(place)!r}, which does not exist; name files or folders of results")
        within = sorted(place.rglob("*.json")) if place.is_dir() else [place]
        found += [path for path in within if SMOKE not in path.relative_to(place).parts[:-1]]
    found = [path for path in found if path.name != SUMMARY]
    if not found:
        raise ValueError(f"results are {', '.join(map(str, places))}, which hold no JSON; measure something first")
    return found


def summary_in(path: Path) -> dict[str, Any]:
    """What `gather` found, as a report wrote it before."""
    summary: Any = read_json(path)
    if not (isinstance(summary, dict) and summary.keys() >= IN_A_SUMMARY):
        raise ValueError(
            f"results is {str(path)!r}, which is no summary that momentkv evaluate report wrote; name files or folders "
            "of results"
        )
    if not all("certain" in pair for pair in summary["pairs"]):
        raise ValueError(
            f"results is {str(path)!r}, a summary by momentkv {summary['momentkv']}, which does not say what is beyond "
            "chance; name the files or folders of results that it is of"
        )
    return summary


def kind_of_result(content: Any) -> str | None:
    """What a file holds: needles, fidelity, decoding, tasks, gap, lm_eval; None for anything else."""
    if not isinstance(content, dict):
        return None
    rows, protocol = content.get("rows"), content.get("protocol")
    if isinstance(rows, list) and rows and isinstance(protocol, dict) and isinstance(protocol.get("model"), str):
        for kind, columns in COLUMNS.items():
            if all(isinstance(row, dict) and columns <= row.keys() for row in rows):
                return "decoding" if kind == "fidelity" and rows[0].get("kl_of_quarters") else kind
    if content.keys() >= OF_A_GAP and isinstance(content["by_layer_and_head"], dict):
        return "gap"
    results = content.get("results")
    of_tasks = isinstance(results, dict) and all(isinstance(metrics, dict) for metrics in results.values())
    return "lm_eval" if of_tasks and "configs" in content else None


def called(model: str) -> str:
    """A model without the place it was read from.

    Examples
    --------
    >>> called("some/where/tiny-q4.gguf"), called("Qwen/Qwen2.5-0.5B")
    ('tiny-q4', 'Qwen2.5-0.5B')
    """
    return Path(model).name.removesuffix(".gguf")


def gather(paths: Iterable[Path]) -> dict[str, Any]:
    """Summary of results files. Other files there are named and left out.

    Returns
    -------
    dict
        ``needles``, ``depths``, ``pairs``, ``fidelity``, ``decoding``, ``gap``, ``tasks``, ``lm_eval`` (lists of rows,
        each with its model and, but for the last two, with the part of the split that its texts belong to), ``texts``
        (the role of each), ``sources`` (file, kind, protocol, environment, command), ``left_out``. What was not
        measured is empty.

    Raises
    ------
    ValueError
        If no file holds results. If they count bytes in different tokens: their budgets cannot be compared. If files
        say the same of a text, but read other tokens of it, or measured otherwise what would stand in one cell of a
        table, or have other numbers for it. If models in different places have one name.
    """
    found: dict[str, list[tuple[Path, dict[str, Any]]]] = defaultdict(list)
    left_out = []
    for path in paths:
        content = read_json(path)
        kind = kind_of_result(content)
        if kind is None:
            left_out.append(path.name)
        else:
            found[kind].append((path, content))
    if not found:
        raise ValueError(f"results are {', '.join(left_out)}, which hold none; name what momentkv evaluate wrote")
    counted_in([(path.name, content["protocol"]) for kind in COUNTED for path, content in found[kind]])
    check_read_alike(
        (path.name, called(content["protocol"]["model"]), content) for kind in OF_TEXTS for path, content in found[kind]
    )
    check_one_model(
        (path.name, content.get("protocol", content)["model"])
        for kind, files in found.items()
        for path, content in files
        if kind != "lm_eval"
    )
    texts: dict[str, Any] = {}
    measured = {
        kind: [(str(path), content["protocol"], rows_of(content, texts)) for path, content in found[kind]]
        for kind in OF_TEXTS
    }
    measured["tasks"] = [(str(path), content["protocol"], answers_of(content)) for path, content in found["tasks"]]
    for kind, files in measured.items():
        check_measured_alike(kind, files)
        for file, _, some in files:
            for row in some:
                row["file"] = file
    rows = {kind: [row for *_, some in files for row in some] for kind, files in measured.items()}
    asked = needles_of(rows["needles"]) if rows["needles"] else None
    frames = {
        "needles": None if asked is None else needle_lines(asked),
        "depths": None if asked is None else depth_lines(asked[asked["bytes"] > 0]),
        "pairs": None if asked is None else pair_lines(asked),
        **{kind: fidelity_lines(rows[kind]) if rows[kind] else None for kind in ("fidelity", "decoding")},
    }
    return {
        "momentkv": __version__,
        **{name: records(frame) for name, frame in frames.items()},
        "gap": [gap_line(content, texts) for _, content in found["gap"]],
        "tasks": answer_lines(rows["tasks"]),
        "lm_eval": [line for _, content in found["lm_eval"] for line in lm_eval_lines(content)],
        "texts": texts,
        "sources": [
            {
                "file": path.name,
                "kind": kind,
                "model": called(content.get("protocol", content)["model"]),
                "momentkv": content.get("protocol", content).get("momentkv"),
                "command": without_places(content.get("command")),
                "protocol": {**content["protocol"], "model": called(content["protocol"]["model"])}
                if "protocol" in content
                else None,
                "environment": content.get("environment"),
            }
            for kind, files in found.items()
            for path, content in files
            if kind != "lm_eval"
        ],
        "left_out": left_out,
    }


def check_one_model(models: Iterable[tuple[str, str]]) -> None:
    """Raise if two models would be called the same.

    Parameters
    ----------
    models : iterable of (str, str)
        Name of each file, and its model with the place that it was read from.
    """
    seen: dict[str, tuple[str, str]] = {}
    for file, model in models:
        before, other = seen.setdefault(called(model), (file, model))
        if Path(other) != Path(model):  # "./m/" is "m"
            raise ValueError(
                f"{before} and {file} are of the models {other!r} and {model!r}, which a report would call the same; "
                "report them apart, or, if they are one, measure both by one path"
            )


def rows_of(content: dict[str, Any], texts: dict[str, Any]) -> list[Row]:
    """Rows of a file with their model and the part of the split they are of; the roles of their texts are noted."""
    protocol = content["protocol"]
    model, haystack = called(protocol["model"]), protocol.get("haystack")
    return [
        row | {"model": model, "part": part_of(row.get("text", haystack), content, texts)} for row in content["rows"]
    ]


def part_of(text: str, content: dict[str, Any], texts: dict[str, Any]) -> str:
    """The part that a text belongs to; what a measurement found in it, under whatever name, or is known by now."""
    role = role_of(text)._asdict()
    if role["part"] != "choosing":
        role = content.get("roles", {}).get(text, role)
    texts[text] = role
    return str(role["part"])


def records(frame: pd.DataFrame | None) -> list[Row]:
    """Lines as JSON has them: numbers of eight digits, and null where there is none.

    Pages show four at most, and are rounded once only so.
    """
    return [] if frame is None else json.loads(frame.to_json(orient="records", double_precision=8))


def without_places(command: str | None) -> str | None:
    """A command without the places of its results and its model, which say nothing about them."""
    if command is None:
        return None
    command = re.sub(r" --output \S+", "", command)
    return re.sub(
        r"(?<= --model )\S+", lambda found: Path(found[0]).name if found[0][0] in "./~" else found[0], command
    )


def gap_line(content: dict[str, Any], texts: dict[str, Any]) -> Row:
    """Means over heads and queries, by layer."""
    part = part_of(content["text"], content, texts)
    layers = {name: pd.DataFrame(x).mean(axis=1).round(4).tolist() for name, x in content["by_layer_and_head"].items()}
    named = {name: content[name] for name in ("text", "policy", "budget", "correction", "layers", "mean")}
    return {"model": called(content["model"]), "part": part, **named, "by_layer": layers}


def answers_of(content: dict[str, Any]) -> list[Row]:
    """Answers of a file of `momentkv evaluate tasks`, with their model and the time of the question."""
    protocol = content["protocol"]
    question, _, _ = protocol["question"].partition(":")
    return [row | {"model": called(protocol["model"]), "question": question} for row in content["rows"]]


def answer_lines(answers: list[Row]) -> list[Row]:
    """A line for each task, budget and method: of all files together, whose averages are of all tasks."""
    asked: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in answers:
        asked[row["model"], row["question"]].append(row)
    return [
        line
        for (model, question), rows in asked.items()
        for line in records(task_lines(rows).assign(model=model, question=question))
    ]


def lm_eval_lines(content: dict[str, Any]) -> list[Row]:
    """A line for each task and metric of a results file of lm_eval."""
    config = content.get("config", {})
    lines = []
    for task, metrics in content["results"].items():
        count = content.get("n-samples", {}).get(task, {}).get("effective")
        for name, value in metrics.items():
            metric, _, rule = name.partition(",")
            if not rule or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{metric}_stderr,{rule}")
            lines.append(
                {"task": task, "metric": metric, "filter": rule, "value": round(float(value), 4), "n": count}
                | {"stderr": round(float(error), 4) if isinstance(error, int | float) else None}
                | {"model": config.get("model"), "model_args": config.get("model_args")}
            )
    return lines

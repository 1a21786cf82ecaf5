"""Brings the results of many measurements together: one summary, small enough to be kept beside the text about it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from momentkv import __version__
from momentkv.evaluation.needles_report import Row, bootstrap, kind_of, summarize
from momentkv.evaluation.report import bits_of, read_json, tokens_in
from momentkv.evaluation.settings import DEFAULT

__all__ = ["BANDS", "DEFAULT_METHOD", "SUMMARY", "counted_in", "gather", "results_in"]

# Policy and correction of `MomentCache(model, budget)`, as tables call them.
DEFAULT_METHOD = (DEFAULT.policy_name, DEFAULT.correction)
# The file that `momentkv evaluate report` writes, and reads again.
SUMMARY = "summary.json"
# Kinds of results whose budgets are bytes.
COUNTED = ("needles", "fidelity")
# Bands of depth that heat maps have.
BANDS = 5


def results_in(places: Iterable[str | Path]) -> list[Path]:
    """JSON files named, or in the folders named, in the order of their names.

    Raises
    ------
    ValueError
        If there are none, or a place does not exist.
    """
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"results is {str(place)!r}, which does not exist; name files or folders of results")
        found += sorted(place.rglob("*.json")) if place.is_dir() else [place]
    found = [path for path in found if path.name != SUMMARY]
    if not found:
        raise ValueError(f"results are {', '.join(map(str, places))}, which hold no JSON; measure something first")
    return found


def kind_of_result(content: Any) -> str | None:
    """What a file holds: needles, fidelity, gap, lm_eval; None for anything else."""
    if not isinstance(content, dict):
        return None
    rows = content.get("rows")
    if isinstance(rows, list) and rows:
        return "needles" if "values" in rows[0] else "fidelity" if "kl" in rows[0] else None
    if "by_layer_and_head" in content:
        return "gap"
    return "lm_eval" if "results" in content and "configs" in content else None


def gather(paths: Iterable[Path]) -> dict[str, Any]:
    """Summary of results files. Other files there are named and left out.

    Returns
    -------
    dict
        ``needles``, ``depths``, ``pairs``, ``fidelity``, ``gap``, ``lm_eval`` (lists of rows), ``sources`` (file, kind,
        protocol, environment, command) and ``left_out``. A part that nothing measured is empty.

    Raises
    ------
    ValueError
        If results count bytes in different tokens: their budgets cannot be compared.
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
    counted_in([(path.name, content["protocol"]) for kind in COUNTED for path, content in found[kind]])
    needles = distinct([row for _, content in found["needles"] for row in content["rows"]])
    return {
        "momentkv": __version__,
        "needles": needle_lines(needles),
        "depths": depth_lines(needles),
        "pairs": pair_lines(needles),
        "fidelity": fidelity_lines([row for _, content in found["fidelity"] for row in content["rows"]]),
        "gap": [gap_line(content) for _, content in found["gap"]],
        "lm_eval": [line for _, content in found["lm_eval"] for line in lm_eval_lines(content)],
        "sources": [
            {
                "file": path.name,
                "kind": kind,
                "command": without_output(content.get("command")),
                "protocol": content.get("protocol"),
                "environment": content.get("environment"),
            }
            for kind, files in found.items()
            for path, content in files
            if kind != "lm_eval"
        ],
        "left_out": left_out,
    }


def counted_in(protocols: Iterable[tuple[str, dict[str, Any]]]) -> int | None:
    """Bits of the tokens that results count bytes in.

    Parameters
    ----------
    protocols : iterable of (str, dict)
        Name of each file, and its protocol.
    """
    files: dict[int | None, list[str]] = defaultdict(list)
    for name, protocol in protocols:
        files[bits_of(protocol)].append(name)
    if len(files) > 1:
        groups = (f"{tokens_in(bits)} ({', '.join(names)})" for bits, names in files.items())
        raise ValueError(f"results count bytes in {' and in '.join(groups)}; report them apart")
    return next(iter(files), None)


def without_output(command: str | None) -> str | None:
    """A command without the path of its results, which says nothing about them."""
    return None if command is None else re.sub(r" --output \S+", "", command)


def distinct(rows: list[Row]) -> list[Row]:
    """Each question of each cache once, because files may share the full cache's rows."""
    names = ("layout", "value", "length", "haystack", "task", "index", "question", "policy", "correction")
    seen: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        seen.setdefault((*(row[name] for name in names), row["bytes_as_tokens"]), row)
    return list(seen.values())


def needle_lines(rows: list[Row]) -> list[Row]:
    """A line for each task, length, question, budget, policy and correction."""
    names = ("task", "length", "question", "bytes", "policy", "correction")
    lines = []
    for key, x in summarize(rows).items():
        low, high = x["interval"]
        lines.append(
            dict(zip(names, key, strict=True))
            | {"share": round(x["share"], 4), "low": round(low, 4), "high": round(high, 4)}
            | {"n": x["of"], "haystacks": x["haystacks"], "tokens": round(x["tokens"], 4), "nll": round(x["nll"], 4)}
            | {"signal": x["signal"]}
        )
    return sorted(lines, key=lambda x: (x["task"], x["length"], x["question"], x["bytes"] or 0))


def depth_lines(rows: list[Row]) -> list[Row]:
    """Share found in each band of depth."""
    groups: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row in rows:
        band = min(BANDS - 1, int(row["depth"] * BANDS))
        key = (kind_of(row), row["length"], row["question"], row["bytes_as_tokens"], row["policy"], row["correction"])
        groups[(*key, band)].append(row["values"])
    names = ("task", "length", "question", "bytes", "policy", "correction", "band")
    return [
        dict(zip(names, key, strict=True)) | {"share": round(mean(group), 4), "n": len(group)}
        for key, group in sorted(groups.items(), key=lambda item: tuple(map(str, item[0])))
    ]


def pair_lines(rows: list[Row]) -> list[Row]:
    """The default against each other method at the same bytes, question by question.

    The difference of shares, with a bootstrap over haystacks; the same haystacks were asked of both, so what they
    share cancels. Tasks without signal are left out.
    """
    signal = {key[:2] for key, x in summarize(rows).items() if x["signal"]}
    asked: dict[tuple[Any, ...], dict[tuple[str, str], dict[tuple[Any, ...], float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for row in rows:
        if row["bytes_as_tokens"] is not None and (kind_of(row), row["length"]) in signal:
            cell = (kind_of(row), row["length"], row["question"], row["bytes_as_tokens"])
            asked[cell][row["policy"], row["correction"]][row["haystack"], row["index"]] = row["values"]
    lines = []
    for (task, length, question, size), methods in asked.items():
        ours = methods.get(DEFAULT_METHOD)
        for (policy, correction), theirs in methods.items():
            if ours is None or (policy, correction) == DEFAULT_METHOD:
                continue
            differences: dict[Any, list[float]] = defaultdict(list)
            for which in ours.keys() & theirs.keys():
                differences[which[0]].append(ours[which] - theirs[which])
            if not differences:
                continue
            low, high = bootstrap([(sum(group), len(group)) for _, group in sorted(differences.items())])
            count = sum(map(len, differences.values()))
            lines.append(
                {"task": task, "length": length, "question": question, "bytes": size}
                | {"policy": policy, "correction": correction, "n": count}
                | {"difference": round(sum(map(sum, differences.values())) / count, 4)}
                | {"low": round(low, 4), "high": round(high, 4)}
            )
    return sorted(lines, key=lambda x: (x["task"], x["length"], x["question"], x["bytes"], x["policy"]))


def fidelity_lines(rows: list[Row]) -> list[Row]:
    """Means over texts, with a bootstrap over them; a text weighs the same whatever its length."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        groups[row["bytes_as_tokens"], row["policy"], row["correction"]].setdefault(row["text"], row)
    lines = []
    for (size, policy, correction), texts in groups.items():
        low, high = bootstrap([(row["kl"], 1) for _, row in sorted(texts.items())])
        errors = [row["head_error"] for row in texts.values() if row.get("head_error") is not None]
        lines.append(
            {"bytes": size, "policy": policy, "correction": correction, "texts": len(texts)}
            | {"kl": round(mean(row["kl"] for row in texts.values()), 5), "low": round(low, 5), "high": round(high, 5)}
            | {name: round(mean(row[name] for row in texts.values()), 4) for name in ("top1", "nll_change")}
            | {"head_error": round(mean(errors), 5) if errors else None}
        )
    return sorted(lines, key=lambda x: (x["bytes"], x["policy"], x["correction"]))


def gap_line(content: dict[str, Any]) -> Row:
    """Means over heads and queries, by layer."""
    return {
        **{name: content[name] for name in ("text", "policy", "budget", "correction", "layers", "mean")},
        "by_layer": {
            name: [round(mean(heads), 4) for heads in layers] for name, layers in content["by_layer_and_head"].items()
        },
    }


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

"""Answers to tasks brought together with pandas: one line for each task, budget and method."""

from __future__ import annotations

from typing import Any

import pandas as pd

from momentkv.evaluation.intervals import bootstrap, spread, wilson
from momentkv.evaluation.lines import SIGNAL, common, once

__all__ = ["AVERAGE", "task_lines"]

# What the mean over tasks is called among them.
AVERAGE = "average"


def task_lines(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Means over documents, with a bootstrap over them; of every metric of a task the first counts.

    Where all documents have 0, or all have 1, a bootstrap has no width, and Wilson's interval is used.

    Tasks that the full cache does badly at (a mean below half) have no signal: nothing could be lost. The line
    ``average`` is the mean over the tasks with signal, each with the same weight, of methods that have answered all.
    Methods of one budget are compared on the documents that all of them answered, where there are any.

    Parameters
    ----------
    rows : list of dict
        With ``task``, ``document``, ``method``, ``bytes_as_tokens`` (None: the full cache) and ``metrics``; where
        several files were read, with the ``file``.

    Returns
    -------
    DataFrame
        Columns ``task``, ``method``, ``bytes`` (0: the full cache), ``value``, ``low``, ``high``, ``n``, ``signal``.
    """
    frame = pd.DataFrame(
        {
            "task": row["task"],
            "document": row["document"],
            "method": row["method"],
            "bytes": row["bytes_as_tokens"] or 0,
            "value": float(next(iter(row["metrics"].values()))),
            **({"file": row["file"]} if "file" in row else {}),
        }
        for row in rows
    )
    frame = once(frame, ["task", "document", "method", "bytes"], "value")
    frame = common(frame, ["bytes", "task"], ["document"])
    keys = ["bytes", "method", "task"]
    lines = []
    for key, group in frame.groupby(keys, sort=False):
        low, high = spread(list(group["value"]), [1.0] * len(group))
        lines.append(
            dict(zip(keys, key, strict=True))
            | {"value": group["value"].mean(), "low": low, "high": high, "n": len(group)}
        )
    found = pd.DataFrame(lines)
    full = found[found["bytes"] == 0].set_index("task")["value"]
    found["signal"] = found["task"].map(full) >= SIGNAL
    counted = frame[frame["task"].map(full) >= SIGNAL]
    averages = []
    for key, group in counted.groupby(["bytes", "method"], sort=False):
        if group["task"].nunique() < counted["task"].nunique():
            continue  # a mean of other tasks than those of the others
        # Each task weighs the same, whatever its number of documents.
        share = 1 / (group.groupby("task")["value"].transform("size") * group["task"].nunique())
        same = group["value"].sum() in (0, len(group))
        low, high = (
            wilson(int(group["value"].sum()), len(group))
            if same
            else bootstrap(list(group["value"] * share), list(share))
        )
        averages.append(
            {"bytes": key[0], "method": key[1], "task": AVERAGE, "value": (group["value"] * share).sum()}
            | {"low": low, "high": high, "n": len(group), "signal": True}
        )
    places = {method: place for place, method in enumerate(dict.fromkeys(frame["method"]))}
    whole = pd.concat([found, pd.DataFrame(averages)], ignore_index=True) if averages else found
    order = whole["method"].map(places)
    whole = whole.assign(place=order).sort_values(["bytes", "place"], kind="stable").drop(columns="place")
    return whole.astype({"signal": bool})

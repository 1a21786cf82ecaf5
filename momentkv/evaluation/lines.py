"""Rows of results brought together with pandas: one line for each model, part of the texts, budget and method."""

from __future__ import annotations

from typing import Any

import pandas as pd

from momentkv.evaluation.intervals import bootstrap, spread
from momentkv.evaluation.methods import OURS, is_rival
from momentkv.evaluation.settings import DEFAULT

__all__ = [
    "BANDS",
    "common",
    "depth_lines",
    "fidelity_lines",
    "needle_lines",
    "needles_of",
    "once",
    "pair_lines",
    "rivals",
]

Row = dict[str, Any]
# If the full cache fails more often than not, there is nothing that compression could lose.
SIGNAL = 0.5
# Bands of depth that heat maps have.
BANDS = 5
# Fewest haystacks that a difference can be beyond chance of: as many that all say the same are a sign test's 95 %.
CERTAIN = 6
# Numbers of one measurement that differ by more, relative to the larger, are not of one rounding.
ROUNDING = 1e-3
# Where results come from; the rows of one command do not say it.
ORIGIN = ["model", "part"]
CELL = ["task", "length", "question", "bytes", "method"]
# Needles that methods are compared on: what stands in one group, and what tells its questions apart.
BESIDE, ASKED = [*ORIGIN, "task", "length", "question", "bytes"], ["haystack", "index"]


def rivals(lines: pd.DataFrame, on: list[str]) -> pd.DataFrame:
    """Lines of what this library recommends beside those of each of their rivals, whose columns end in ``_other``."""
    both = lines[lines["method"].isin(OURS)].merge(lines, on=on, suffixes=("", "_other"))
    return both.loc[[is_rival(*pair) for pair in zip(both["method"], both["method_other"], strict=True)]]


def frame_of(rows: list[Row]) -> pd.DataFrame:
    """Rows with where they come from, bytes (0: the full cache) and one name for a method."""
    frame = pd.DataFrame(rows).rename(columns={"bytes_as_tokens": "bytes"})
    frame["bytes"] = frame["bytes"].fillna(0).astype(int)
    made = frame["policy"] + "/" + frame["correction"].str.replace(", by ", "-").str.replace(" ", "-")
    # Results of other programs have no correction, and need none in their name.
    other = frame["policy"].str.contains(" ")
    named = frame["method"] if "method" in frame else pd.Series(pd.NA, frame.index, dtype="object")
    named = named.fillna(made.where(~other, frame["policy"]))
    default = f"{DEFAULT.policy}/{DEFAULT.kind}-{DEFAULT.sharing}"
    frame["method"] = named.str.replace(default, "default", regex=False)
    return frame.assign(**{name: "" for name in ORIGIN if name not in frame})


def once(frame: pd.DataFrame, keys: list[str], number: str) -> pd.DataFrame:
    """Rows, the first of each cell, because files may share some.

    Raises
    ------
    ValueError
        If another row of a cell has another number.
    """
    shared = frame[frame.duplicated(keys, keep=False)]
    for cell, group in shared.groupby(keys, sort=False):
        numbers, files = group[number].astype(float), list(group.get("file", ()))
        at = int((numbers - numbers.iloc[0]).abs().argmax())
        first, other = numbers.iloc[0], numbers.iloc[at]
        if abs(other - first) > ROUNDING * max(abs(first), abs(other)):
            named = ", ".join(f"{name} {value}" for name, value in zip(keys, cell, strict=True) if value != "")
            where = f"{files[0]} and {files[at]} have" if files else "results have"
            raise ValueError(
                f"{where} other numbers of the same ({named}): {number} {first:.4g} and {other:.4g}; they were "
                "measured by other code or elsewhere: measure one again, or name one alone"
            )
    return frame.drop_duplicates(keys)


def common(frame: pd.DataFrame, group: list[str], of: list[str]) -> pd.DataFrame:
    """Rows of what all methods of a group were asked; all rows of a group whose methods have nothing in common.

    Parameters
    ----------
    frame : DataFrame
        A row for each method and ``of``.
    group, of : list of str
        Columns of what is compared, and of what it was asked about.
    """
    methods = frame.groupby(group)["method"].transform("nunique")
    every = frame.groupby([*group, *of])["method"].transform("nunique") == methods
    return frame[every | ~every.groupby([frame[x] for x in group]).transform("any")]


def fidelity_lines(rows: list[Row]) -> pd.DataFrame:
    """Means over texts, with a bootstrap over them; a text weighs the same whatever its length.

    Methods of one budget are compared on the same texts: those of all of them, where there are any.
    """
    keys = [*ORIGIN, "bytes", "method"]
    frame = once(frame_of(rows), [*keys, "text"], "kl").sort_values("text", kind="stable")
    frame = common(frame, [*ORIGIN, "bytes"], ["text"])
    for name in ("head_error", "kl_of_quarters", "kept"):
        if name not in frame:
            frame[name] = None
    frame["kl_last"] = frame["kl_of_quarters"].map(lambda x: x[-1], na_action="ignore")
    # Rows of before do not say what heads hold; the budget is as much where tokens have all their bits.
    frame["kept"] = frame["kept"].astype(float).fillna(frame["budget"])
    frame = frame.astype({"head_error": float, "kl_last": float})
    groups = frame.groupby(keys, sort=False)
    lines = groups.agg(
        **{name: (name, "mean") for name in ("kl", "kl_last", "top1", "nll_change", "head_error")},
        kept=("kept", "mean"), nbytes=("nbytes", "first"), texts=("text", "nunique"),
    )  # fmt: skip
    lines["kept"] = lines["kept"].round().astype(int)
    lines[["low", "high"]] = [bootstrap(list(group)) for _, group in groups["kl"]]
    order = dict.fromkeys(frame_of(rows)["method"])
    places = {method: place for place, method in enumerate(order)}
    lines = lines.reset_index()
    return lines.sort_values([*ORIGIN, "bytes", "method"], key=lambda x: x.map(places) if x.name == "method" else x)


def needles_of(rows: list[Row]) -> pd.DataFrame:
    """Rows of needles, each question of each cache once, because files may share the full cache's rows.

    A task says what its values are if not numbers.
    """
    frame = frame_of(rows)
    frame["task"] = frame["task"].where(frame["value"] == "number", frame["task"] + ", " + frame["value"])
    frame["haystack"] = frame["layout"] + "/" + frame["length"].astype(str) + "/" + frame["haystack"]
    return once(frame, [*BESIDE, "method", *ASKED], "values")


def needle_lines(frame: pd.DataFrame) -> pd.DataFrame:
    """Shares of values found, over haystacks and depths, with intervals over haystacks.

    Methods of one budget are compared on the same questions: those that all of them were asked, where there are any. A
    task on which the full cache finds less than half has no signal: nothing could be lost.
    """
    keys = [*ORIGIN, *CELL]
    frame = common(frame, BESIDE, ASKED)
    groups = frame.astype({"generated": float}).groupby(keys, sort=False)
    lines = groups.agg(
        share=("values", "mean"), n=("values", "size"), haystacks=("haystack", "nunique"), kept=("budget", "first"),
        **{name: (name, "mean") for name in ("tokens", "nll", "generated")},
    )  # fmt: skip
    each = frame.groupby([*keys, "haystack"], sort=False)["values"].agg(["sum", "count"])
    ends = {key: spread(list(x["sum"]), list(x["count"])) for key, x in each.groupby(keys, sort=False)}
    lines[["low", "high"]] = [ends[key] for key in lines.index]
    lines = lines.reset_index()
    full = lines[lines["bytes"] == 0].groupby([*ORIGIN, "task", "length"])["share"].first()
    lines["signal"] = [full[key] >= SIGNAL for key in lines[[*ORIGIN, "task", "length"]].itertuples(index=False)]
    order = {"": 0, "unseen": 1, "seen": 2}
    return lines.sort_values(
        [*ORIGIN, "task", "length", "question", "bytes"], kind="stable",
        key=lambda x: x.map(order) if x.name == "question" else x,
    )  # fmt: skip


def depth_lines(frame: pd.DataFrame) -> pd.DataFrame:
    """Share found in each band of depth, of the same questions as `needle_lines`."""
    frame = common(frame, BESIDE, ASKED)
    bands = frame.assign(band=(frame["depth"] * BANDS).astype(int).clip(upper=BANDS - 1))
    groups = bands.groupby([*ORIGIN, *CELL, "band"])["values"]
    return groups.agg(share="mean", n="size").reset_index()


def pair_lines(frame: pd.DataFrame) -> pd.DataFrame:
    """What this library recommends against each other method at the same bytes, question by question.

    The difference of shares, with a bootstrap over haystacks; the same haystacks were asked of both, so what they
    share cancels. Tasks without signal are left out. ``certain`` is the sign of a difference beyond chance, or 0: its
    interval has one sign, and the haystacks are at least as many as can say so.
    """
    lines = needle_lines(frame)
    signal = lines[lines["signal"]].groupby([*ORIGIN, "task", "length"]).size().index
    asked = frame[frame["bytes"] > 0].set_index([*ORIGIN, "task", "length"])
    asked = asked[asked.index.isin(signal)].reset_index()
    asked = asked[[*BESIDE, "method", *ASKED, "values"]]
    both = rivals(asked, [*BESIDE, *ASKED])
    both["difference"] = both["values"] - both["values_other"]
    pairs = []
    for key, group in both.groupby([*BESIDE, "method", "method_other"]):
        each = group.groupby("haystack")["difference"].agg(["sum", "count"])
        low, high = bootstrap(list(each["sum"]), list(each["count"]))
        sign = (low > 0) - (high < 0) if len(each) >= CERTAIN else 0
        values = {"n": len(group), "difference": group["difference"].mean(), "low": low, "high": high, "certain": sign}
        pairs.append(dict(zip([*BESIDE, "method", "other"], key, strict=True)) | values)
    return pd.DataFrame(pairs)

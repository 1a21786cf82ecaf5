"""The command ``momentkv evaluate report``: all results as one page, in Markdown and as one HTML file."""

from __future__ import annotations

import argparse
import base64
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from rich.console import Console

from momentkv.evaluation.alike import counted_in
from momentkv.evaluation.gather import COUNTED, SUMMARY, gather, results_in, summary_in
from momentkv.evaluation.lines import Row, rivals
from momentkv.evaluation.methods import OURS, is_selection, rounds_or_rereads
from momentkv.evaluation.report import tokens_in, write_json
from momentkv.evaluation.report_plots import draw, methods_of, slug

__all__ = ["markdown_of", "report", "write_report"]

# Where a number must not be broken between lines.
SPACE, DASH = "\u00a0", "\u2060–\u2060"
# What the method of the paper is called.
PAPER = "momentkv/order-1"
PARTS = {
    "reporting": "on texts that chose nothing",
    "choosing": "**on texts that chose the default or parts of it**",
    "unnamed": "on texts that texts.toml does not name",
}


def report(options: argparse.Namespace) -> int:
    """Bring results together; write the page, its plots and the summary."""
    console = Console()
    with console.status("bringing results together, and drawing plots"):
        page = write_report(options.results, Path(options.output))
    made = f"{page}   {page.with_suffix('.md')}   {page.with_name(SUMMARY)}"
    console.print(f"report: {made}", soft_wrap=True, markup=False)
    return 0


def write_report(results: Iterable[str | Path], folder: Path) -> Path:
    """Write ``report.html``, ``report.md``, its plots and ``summary.json`` into a folder; returns the first.

    Parameters
    ----------
    results : iterable of path
        Results files, folders of them, or one ``summary.json`` that was written before.

    Raises
    ------
    ValueError
        If there are no results.
    """
    import markdown

    places = list(map(Path, results))
    if len(places) == 1 and places[0].name == SUMMARY:
        summary = summary_in(places[0])
    else:
        summary = gather(results_in(places))
        write_json(folder / SUMMARY, summary)
    text = markdown_of(summary, draw(summary, folder, bits=bits_in(summary)))
    (folder / "report.md").write_text(text, encoding="utf-8")

    def embedded(found: re.Match[str]) -> str:
        data = base64.b64encode((folder / found[1]).read_bytes()).decode()
        return f'src="data:image/svg+xml;base64,{data}#{found[2]}"'

    body = markdown.markdown(text, extensions=["tables", "attr_list"])
    body = re.sub(r'src="([\w-]+\.svg)#([\w-]+)"', embedded, body)
    page = folder / "report.html"
    page.write_text(templates().get_template("report.html").render(body=body), encoding="utf-8")
    return page


@cache
def templates() -> jinja2.Environment:
    """The templates of the page; Markdown is not escaped."""
    loader = jinja2.PackageLoader("momentkv.evaluation")
    made = jinja2.Environment(
        loader=loader,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    made.filters["code"] = code
    return made


def markdown_of(summary: dict[str, Any], pictures: dict[str, dict[str, str]], folder: str = "") -> str:
    """The page as Markdown; a part that was not measured is left out.

    Parameters
    ----------
    summary : dict
        What `gather` returns.
    pictures : dict
        What `draw` returns.
    folder : str
        Where the pictures are, with its slash.
    """
    frames = {name: pd.DataFrame(summary[name]) for name in ("needles", "pairs", "fidelity", "decoding")}
    kept = {name: x[x["part"] == "reporting"] if len(x) else x for name, x in frames.items()}
    frames["tasks"] = pd.DataFrame(summary.get("tasks", []))  # which earlier summaries lack
    models = sorted({x["model"] for x in summary["sources"]})
    text = templates().get_template("report.md").render(
        folder=folder,
        momentkv=summary["momentkv"],
        measured_by=sorted({x["momentkv"] for x in summary["sources"] if x.get("momentkv")}),
        models=models,
        unit=tokens_in(bits_in(summary)),
        counted=any(map(len, frames.values())),
        reported=any(map(len, kept.values())),
        ours=[method for method in OURS if any(method in set(x["method"]) for x in kept.values() if len(x))],
        against=[x for model in models for x in against(model, kept)],
        larger=larger(kept["fidelity"]),
        worse=worse(kept["pairs"]),
        glance=glance(models, kept),
        sections=[section(model, frames, summary["gap"], pictures.get(model, {})) for model in models],
        lm_eval=list(map(lm_eval_cells, summary["lm_eval"])),
        texts=[[code(name), x["part"], "; ".join(x["chose"])] for name, x in sorted(summary["texts"].items())],
        sources=list(map(source_cells, summary["sources"])),
        protocol=protocol_of(summary["sources"]),
        left_out=summary["left_out"],
    )  # fmt: skip
    return re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n"


def bits_in(summary: dict[str, Any]) -> int | None:
    """Bits of the tokens that bytes are counted in."""
    return counted_in((x["file"], x["protocol"]) for x in summary["sources"] if x["kind"] in COUNTED)


def of_model(lines: pd.DataFrame, model: str) -> pd.DataFrame:
    """Lines of a model; there may be none at all, and so no columns."""
    return lines[lines["model"] == model] if len(lines) else lines


def against(model: str, kept: dict[str, pd.DataFrame]) -> list[str]:
    """How often another method has less KL than what is recommended, and how often one finds more needles."""
    lines, pairs = of_model(kept["fidelity"], model), of_model(kept["pairs"], model)
    found = []
    if len(lines):
        both = rivals(lines, ["bytes"])
        lost = int((both["kl_other"] < both["kl"]).sum())
        found.append(
            f"**{model}**, KL: in {lost} of {len(both)} comparisons of one of ours with another the other has less."
        )
    if len(pairs):
        lost, sure = int((pairs["difference"] < 0).sum()), int((pairs["certain"] < 0).sum())
        found.append(
            f"**{model}**, needles: in {lost} of {len(pairs)} comparisons of one of ours with another the other finds "
            f"more, in {sure} of them beyond chance."
        )
    return found


def larger(lines: pd.DataFrame) -> dict[str, Any]:
    """Where another method has less KL than what is recommended: a line for a pair, a column for its bytes."""
    if not len(lines):
        return {"sizes": [], "lines": []}
    both = rivals(lines, ["model", "bytes"])
    both = both[both["kl_other"] < both["kl"]]
    sizes = sorted(set(both["bytes"]))
    table = []
    for (model, ours, other), group in both.groupby(["model", "method", "method_other"]):
        at = {x.bytes: f"{number(x.kl)}{SPACE}/{SPACE}{number(x.kl_other)}" for x in group.itertuples()}
        table.append([model, code(ours), code(other), *(at.get(size, "") for size in sizes)])
    return {"sizes": [str(size) for size in sizes], "lines": table}


def worse(pairs: pd.DataFrame) -> list[list[str]]:
    """Comparisons that are lost, and whose intervals say so."""
    return [
        [
            *(x.model, x.task, f"{x.length}", x.question, f"{x.bytes}", code(x.method), code(x.other), f"{x.n}"),
            f"{100 * x.difference:+.0f} ({100 * x.low:+.0f} to {100 * x.high:+.0f})",
        ]
        for x in (pairs[pairs["certain"] < 0].itertuples() if len(pairs) else ())
    ]


def glance(models: list[str], kept: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """The tables that are understood in ten seconds: what is recommended, the best of others, and the paper's."""
    tables = []
    for model in models:
        kl, found = of_model(kept["fidelity"], model), of_model(kept["needles"], model)
        if len(kl):
            wide = kl.pivot(index="method", columns="bytes", values="kl")
            tables.append({"model": model, "measure": "KL, less is better", **measure_table(wide, "min", number)})
        asked = found[(found["question"] == "unseen") & found["signal"]] if len(found) else found
        if len(asked):
            shares = asked.pivot(index=["task", "length"], columns=["method", "bytes"], values="share")
            wide = shares.dropna(axis="columns").mean().unstack()  # of what was asked about every task and length
            tables.append({"model": model, "measure": "needles, more is better", **measure_table(wide, "max", percent)})
    return tables


def measure_table(wide: pd.DataFrame, best: str, shown: Callable[[float], str]) -> dict[str, Any]:
    """A row for each method, a column for each budget, the best of which stands out."""
    plain = wide[[is_selection(x) for x in wide.index]]
    rows = {"best selection": getattr(plain, best)()} if len(plain) else {}
    # Nor would it be fair to leave out who rounds or reads twice, as ours do.
    others = wide[[rounds_or_rereads(x) for x in wide.index]]
    rows |= {"best of others that round or read twice": getattr(others, best)()} if len(others) else {}
    rows |= {
        "the paper's" if method == PAPER else code(method): wide.loc[method]
        for method in (PAPER, *OURS)
        if method in wide.index
    }
    top = getattr(pd.DataFrame(rows).T, best)()
    cells = {
        name: ["" if pd.isna(x) else bold(shown(x), x == top[size]) for size, x in row.items()]
        for name, row in rows.items()
    }
    return {"sizes": list(wide.columns), "lines": [[name, *x] for name, x in cells.items()]}


def percent(x: float) -> str:
    """A share, on one line."""
    return f"{100 * x:.0f}{SPACE}%"


def section(model: str, frames: dict[str, pd.DataFrame], gaps: list[Row], pictures: dict[str, str]) -> dict[str, Any]:
    """All of a model, part by part: what chose something stands apart."""
    own = {name: of_model(lines, model) for name, lines in frames.items()}
    apart = {
        name: [(said, lines[lines["part"] == part]) for part, said in PARTS.items() if (lines["part"] == part).any()]
        for name, lines in own.items()
        if len(lines) and name != "tasks"
    }
    return {
        "name": model,
        "slug": slug(model),
        "pictures": {name: pictures.get(name) for name in ("kl", "decoding", "found", "depths", "gap")},
        "fidelity": [fidelity_cells(lines, said) for said, lines in apart.get("fidelity", ())],
        "decoding": [fidelity_cells(lines, said) for said, lines in apart.get("decoding", ())],
        "needles": [
            task_cells(str(task), group, said)
            for said, lines in apart.get("needles", ())
            for task, group in lines.groupby("task", sort=False)
        ],
        "tasks": answer_cells(own["tasks"]),
        "gap": [
            [f"{x['policy']}, {x['correction']}", x["text"], f"{x['budget']}"]
            + [f"{x['mean'][name]:.3f}" for name in ("evicted_mass", "cosine", "plain", "corrected")]
            for x in gaps
            if x["model"] == model
        ],
    }


def fidelity_cells(lines: pd.DataFrame, said: str) -> dict[str, Any]:
    """A row for each method, a column for each budget."""
    sizes, methods = sorted(set(lines["bytes"])), methods_of(lines)
    best, most = lines.groupby("bytes")["kl"].min(), lines["texts"].max()

    def rows(cell: Any) -> list[list[str]]:
        cells = {(x.method, x.bytes): cell(x) for x in lines.itertuples()}
        return [[code(method), *(cells.get((method, size), "") for size in sizes)] for method in methods]

    return {
        "of": f"{said} ({most})",
        "sizes": sizes,
        "kl": rows(lambda x: bold(number(x.kl), x.kl == best[x.bytes]) + interval(x, number) + of_fewer(x.texts, most)),
        "top1": rows(lambda x: percent(x.top1)),
    }


def task_cells(task: str, lines: pd.DataFrame, said: str) -> dict[str, Any]:
    """A row for each length, time of the question and method, a column for each budget."""
    sizes = sorted({x for x in lines["bytes"] if x})
    rows = []

    def share(x: Any) -> str:
        return percent(x.share) + interval(x, lambda end: f"{100 * end:.0f}")

    for length, group in lines.groupby("length"):
        full = next(group[group["bytes"] == 0].itertuples())
        note = share(full) if full.signal else f"no{SPACE}signal{SPACE}({percent(full.share)})"
        rows.append([f"{length}", "", "full cache", f"{full.n}", note, *[""] * (len(sizes) - 1)])
        asked = group[(group["bytes"] > 0) & full.signal]
        for question, some in asked.groupby("question", sort=False):
            for method in methods_of(some):
                cells = {x.bytes: x for x in some[some["method"] == method].itertuples()}
                found = [share(cells[size]) if size in cells else "" for size in sizes]
                rows.append(["", question, code(method), numbers_of(cells.values()), *found])
    return {
        "name": f"{task[0].upper()}{task[1:]}",
        "of": said.replace("texts", "haystacks"),
        "sizes": sizes,
        "lines": rows,
    }


def answer_cells(lines: pd.DataFrame) -> dict[str, Any] | None:
    """Answers to tasks: a row for each task, time of the question and method, a column for each budget."""
    if not len(lines):
        return None
    sizes, rows = sorted({x for x in lines["bytes"] if x}), []
    for (task, question), group in lines.groupby(["task", "question"], sort=False):
        full = next(group[group["bytes"] == 0].itertuples())
        note = score(full) if full.signal else f"no{SPACE}signal{SPACE}({score(full)})"
        rows.append([task, question, "full cache", f"{full.n}", note, *[""] * (len(sizes) - 1)])
        for method in methods_of(group[group["bytes"] > 0]):
            cells = {x.bytes: x for x in group[group["method"] == method].itertuples()}
            found = [score(cells[size]) if size in cells else "" for size in sizes]
            rows.append(["", "", code(method), numbers_of(cells.values()), *found])
    return {"sizes": sizes, "lines": rows}


def numbers_of(cells: Iterable[Any]) -> str:
    """How many answers the cells of a row are of: one number, or the ends where budgets had fewer."""
    counts = sorted({x.n for x in cells})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]}{DASH}{counts[-1]}"


def score(x: Any) -> str:
    """A metric with its interval."""
    return f"{x.value:.2f}" + interval(x, lambda end: f"{end:.2f}")


def number(x: float) -> str:
    """A KL; small ones with another digit."""
    return f"{x:.3f}" if x >= 0.0095 else f"{x:.4f}"


def interval(x: Any, end: Any) -> str:
    """An interval behind its number, itself never broken; nothing where there is none."""
    # Five budgets are wider than a page unless an interval may stand below its number.
    return f" ({end(x.low)}{DASH}{end(x.high)})" if x.low < x.high else ""


def of_fewer(texts: int, most: int) -> str:
    """How many texts a cell is of, where others are of more."""
    return "" if texts == most else f"{SPACE}of{SPACE}{texts}"


def bold(text: str, stands_out: bool) -> str:
    """What stands out."""
    return f"**{text}**" if stands_out else text


def code(text: str) -> str:
    """What is typed."""
    return f"`{text}`"


def lm_eval_cells(x: Row) -> list[str]:
    """A task of lm-evaluation-harness."""
    error = "" if x["stderr"] is None else f" ± {x['stderr']:.3f}"
    count, model = "" if x["n"] is None else str(x["n"]), f"`{x['model']}` `{x['model_args']}`"
    return [x["task"], f"{x['metric']} ({x['filter']})", f"{x['value']:.3f}{error}", count, model]


def source_cells(x: Row) -> list[str]:
    """A results file: what it was measured with."""
    versions = {"momentkv": x.get("momentkv")} | (x["environment"] or {})
    version = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    return [f"{x['file']}, {x['model']}", code(x["command"] or "not recorded"), version]


def protocol_of(sources: list[Row]) -> list[str]:
    """What the protocols say in words."""
    return sorted(
        {
            f"*{name}*: {x['protocol'][name]}."
            for x in sources
            for name in ("unseen", "seen", "compressed")
            if name in (x["protocol"] or {})
        }
    )

"""The command ``momentkv evaluate report``: all results as one page, in Markdown and as one HTML file."""

from __future__ import annotations

import argparse
import base64
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console

from momentkv.evaluation.gather import COUNTED, DEFAULT_METHOD, SUMMARY, counted_in, gather, results_in
from momentkv.evaluation.needles_report import Row
from momentkv.evaluation.report import read_json, tokens_in, write_json
from momentkv.evaluation.report_plots import called, draw, methods_of

__all__ = ["markdown_of", "report", "write_report"]

TEXT_COLUMNS = (
    *("context", "question", "policy, correction", "task", "text", "metric", "model", "results", "command"),
    "measured with",
)
# Where a number must not be broken between lines.
SPACE, DASH = "\u00a0", "\u2060–\u2060"
STYLE = """
body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 15px/1.5 system-ui, sans-serif; color: #222; }
table { border-collapse: collapse; display: block; overflow-x: auto; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; background: #fff; }
code { font-size: 13px; overflow-wrap: anywhere; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1f; color: #ddd; } th, td { border-color: #444; } a { color: #8ab4f8; }
}
"""


def report(options: argparse.Namespace) -> int:
    """Bring results together; write the page, its plots and the summary."""
    page = write_report(options.results, Path(options.output))
    made = f"{page}   {page.with_suffix('.md')}   {page.with_name(SUMMARY)}"
    Console().print(f"report: {made}", soft_wrap=True)
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
        summary = read_json(places[0])
    else:
        summary = gather(path for path in results_in(places) if folder not in path.parents)
        write_json(folder / SUMMARY, summary)
    plots = draw(summary, folder)
    text = markdown_of(summary, {name: path.name for name, path in plots.items()})
    (folder / "report.md").write_text(text, encoding="utf-8")
    body = markdown.markdown(text, extensions=["tables", "attr_list"])
    for path in plots.values():
        data = base64.b64encode(path.read_bytes()).decode()
        body = body.replace(f'src="{path.name}"', f'src="data:image/svg+xml;base64,{data}"')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
    page = folder / "report.html"
    head += "<title>momentkv: results</title>"
    whole = f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'
    page.write_text(whole, encoding="utf-8")
    return page


def markdown_of(summary: dict[str, Any], plots: dict[str, str]) -> str:
    """The page as Markdown; a part that was not measured is left out."""
    sections = [
        "# Results",
        opening(summary),
        needles_section(summary, plots),
        losses_section(summary["pairs"], summary["fidelity"]),
        correction_section(summary["pairs"]),
        fidelity_section(summary["fidelity"], plots),
        gap_section(summary["gap"], plots),
        lm_eval_section(summary["lm_eval"]),
        sources_section(summary),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def opening(summary: dict[str, Any]) -> str:
    """What the page is."""
    models = sorted({x["protocol"]["model"] for x in summary["sources"] if x["protocol"]})
    measured = f" of {', '.join(models)}" if models else ""
    return (
        f"Measurements{measured}, momentkv {summary['momentkv']}, written by `momentkv evaluate report` from the "
        "results of the commands [below](#commands).\n\n"
        f"*bytes*: a budget stands for the bytes of so many {tokens_in(bits_in(summary))} for each KV head, correction "
        "included. *Intervals*, in parentheses, are of 95 %: a bootstrap (2,000 draws, seed 0) over haystacks or "
        "texts; where all or none of the questions of a cell succeed, Wilson's interval over haystacks. The "
        f"**default** is {DEFAULT_METHOD[0]} with {DEFAULT_METHOD[1]}."
    )


def bits_in(summary: dict[str, Any]) -> int | None:
    """Bits of the tokens that bytes are counted in."""
    return counted_in((x["file"], x["protocol"]) for x in summary["sources"] if x["kind"] in COUNTED)


def table(header: list[str], lines: list[list[str]]) -> str:
    """A Markdown table; columns of text to the left, of numbers to the right."""
    rule = "|" + "".join("---|" if name in TEXT_COLUMNS else "---:|" for name in header)
    return "\n".join(["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(x) + " |" for x in lines)])


def percent(x: Row) -> str:
    """A share with its interval, on one line."""
    return f"{100 * x['share']:.0f}{SPACE}%{SPACE}({100 * x['low']:.0f}{DASH}{100 * x['high']:.0f})"


def bold(text: str, method: tuple[str, str]) -> str:
    """The default stands out."""
    return f"**{text}**" if method == DEFAULT_METHOD else text


def needles_section(summary: dict[str, Any], plots: dict[str, str]) -> str:
    """A table for each task: a line for each length, time of the question and method, a column for each budget."""
    rows = summary["needles"]
    if not rows:
        return ""
    parts = [
        "## Needles { #report-needles }",
        "Fraction of hidden values whose every token is the top-1 prediction. *unseen*: the question is read after "
        "compression (query-agnostic). *seen*: the question is the end of what is compressed (query-aware). *n*: "
        "questions. *no signal*: the full cache finds less than half of the values, so compression cannot be judged.",
    ]
    if "found" in plots:
        parts.append(f"![Values found against bytes, by task and length]({plots['found']})")
    for task in dict.fromkeys(x["task"] for x in rows):
        chosen = [x for x in rows if x["task"] == task]
        heading = f"### {task[0].upper()}{task[1:]}"
        uncompressed = [x for x in chosen if x["bytes"] is None]
        if not any(x["signal"] for x in uncompressed):
            said = ", ".join(f"{100 * x['share']:.0f}{SPACE}% in {x['length']} tokens" for x in uncompressed)
            parts += [heading, f"No signal: the full cache finds {said} (n = {uncompressed[0]['n']})."]
            continue
        budgets = sorted({x["bytes"] for x in chosen if x["bytes"]})
        lines = []
        for length in sorted({x["length"] for x in chosen}):
            full = next(x for x in chosen if x["length"] == length and x["bytes"] is None)
            note = percent(full) if full["signal"] else f"no{SPACE}signal{SPACE}({100 * full['share']:.0f}{SPACE}%)"
            lines.append([f"{length}", "", "full cache", str(full["n"]), note, *[""] * (len(budgets) - 1)])
            if not full["signal"]:
                continue
            for question in ("unseen", "seen"):
                asked = [x for x in chosen if (x["length"], x["question"]) == (length, question)]
                for method in methods_of(asked):
                    cells = {x["bytes"]: x for x in asked if (x["policy"], x["correction"]) == method}
                    count = str(max(x["n"] for x in cells.values()))
                    found = [bold(percent(cells[size]), method) if size in cells else "" for size in budgets]
                    name = "**default**" if method == DEFAULT_METHOD else called(method)
                    lines.append(["", question, name, count, *found])
        parts += [
            heading,
            table(["context", "question", "policy, correction", "n", *(f"{size}" for size in budgets)], lines),
        ]
    if "depths" in plots:
        parts.append(f"![Single needles found by depth and length]({plots['depths']})")
    return "\n\n".join(parts)


def losses_section(pairs: list[Row], fidelity: list[Row]) -> str:
    """Where another method finds more values than the default, or has a smaller KL."""
    parts = []
    if pairs:
        worse = [x for x in pairs if x["difference"] < 0]
        cells = {(x["task"], x["length"], x["question"], x["bytes"]) for x in pairs}
        counted = f"{len(cells)} cells of task, length, question and budget"
        if worse:
            parts.append(
                f"Needles: in {len(worse)} of {len(pairs)} comparisons in {counted} another method finds more. "
                "Difference of shares, the default less the other, over the same questions; an interval that holds 0 "
                "may be chance."
            )
            parts.append(differences(worse))
        else:
            parts.append(f"Needles: in none of the {counted} does another method find more.")
    ours = {x["bytes"]: x["kl"] for x in fidelity if (x["policy"], x["correction"]) == DEFAULT_METHOD}
    if ours:
        better = [x for x in fidelity if x["kl"] < ours.get(x["bytes"], 0)]
        listed = "; ".join(
            f"{x['policy']}, {x['correction']} at {x['bytes']} ({x['kl']:.3f} against {ours[x['bytes']]:.3f})"
            for x in better
        )
        parts.append(f"KL: {listed or 'no other method that was measured has a smaller one'}.")
    return "\n\n".join(["## Where the default loses { #report-losses }", *parts]) if parts else ""


def differences(pairs: list[Row]) -> str:
    """A table of differences in percentage points."""
    return table(
        ["task", "context", "question", "bytes", "policy, correction", "n", "difference, points"],
        [
            [
                x["task"],
                str(x["length"]),
                x["question"],
                str(x["bytes"]),
                called((x["policy"], x["correction"])),
                str(x["n"]),
                f"{100 * x['difference']:+.0f} ({100 * x['low']:+.0f} to {100 * x['high']:+.0f})",
            ]
            for x in pairs
        ],
    )


def correction_section(pairs: list[Row]) -> str:
    """The default against the same selection without a correction."""
    plain = [x for x in pairs if x["policy"] == DEFAULT_METHOD[0] and x["correction"].startswith("none")]
    if not plain:
        return ""
    text = (
        "## Does the correction cost retrieval? { #report-correction }\n\n"
        "The default against its own selection without the correction, at the same bytes (which then retains more "
        "tokens), over the same questions.\n\n"
    )
    return text + differences(plain)


def fidelity_section(rows: list[Row], plots: dict[str, str]) -> str:
    """KL, top-1, NLL and error of the heads."""
    if not rows:
        return ""
    lines = []
    for x in rows:
        method = (x["policy"], x["correction"])
        error = "" if x["head_error"] is None else f"{x['head_error']:.3f}"
        kl = bold(f"{x['kl']:.3f}{SPACE}({x['low']:.3f}{DASH}{x['high']:.3f})", method)
        numbers = [f"{100 * x['top1']:.0f} %", f"{x['nll_change']:+.3f}", error, str(x["texts"])]
        lines.append([str(x["bytes"]), bold(called(method), method), kl, *numbers])
    image = f"![KL against bytes]({plots['kl']})\n\n" if "kl" in plots else ""
    return (
        "## Fidelity { #report-fidelity }\n\n"
        "KL(full || compressed) of the next-token distributions in nats, agreement of the most likely token, change of "
        "the text's negative log-likelihood, and mean relative error of the heads' outputs; means over texts.\n\n"
        + image
        + table(["bytes", "policy, correction", "KL", "top-1", "NLL", "head error", "texts"], lines)
    )


def gap_section(rows: list[Row], plots: dict[str, str]) -> str:
    """Evicted mass, direction and error."""
    if not rows:
        return ""
    lines = [
        [
            f"{x['policy']}, {x['correction']}",
            x["text"],
            str(x["budget"]),
            *(f"{x['mean'][name]:.3f}" for name in ("evicted_mass", "cosine", "plain", "corrected")),
        ]
        for x in rows
    ]
    image = f"\n\n![Evicted mass, direction and error by layer]({plots['gap']})" if "gap" in plots else ""
    header = [
        "policy, correction",
        "text",
        "retained",
        "evicted mass",
        "cos(o_E, o_R)",
        "plain error",
        "corrected error",
    ]
    return (
        "## Directional gap { #report-gap }\n\n"
        "Means over layers, heads and following tokens; each head is fed from the full cache.\n\n"
        + table(header, lines)
        + image
    )


def lm_eval_section(rows: list[Row]) -> str:
    """Tasks of lm-evaluation-harness."""
    if not rows:
        return ""
    lines = [
        [
            x["task"],
            f"{x['metric']} ({x['filter']})",
            f"{x['value']:.3f}" + ("" if x["stderr"] is None else f" ± {x['stderr']:.3f}"),
            "" if x["n"] is None else str(x["n"]),
            f"`{x['model']}` `{x['model_args']}`",
        ]
        for x in rows
    ]
    return "## lm-evaluation-harness { #report-lm-eval }\n\n± is its standard error.\n\n" + table(
        ["task", "metric", "value", "n", "model"], lines
    )


def sources_section(summary: dict[str, Any]) -> str:
    """Commands, protocol and environment of each file."""
    lines = []
    for x in summary["sources"]:
        command = x["command"] or "not recorded"
        protocol = x["protocol"] or {}
        seed = protocol.get("seed", "")
        version = ", ".join(f"{name} {value}" for name, value in (x["environment"] or {}).items())
        lines.append([x["file"], f"`{command}`", str(seed), version])
    text = "## Commands { #commands }\n\n" + table(["results", "command", "seed", "measured with"], lines)
    bits = bits_in(summary)
    if bits == 32 and not any("--bytes" in (x["command"] or "") for x in summary["sources"]):
        text += (
            "\n\nThese were run when bytes were always counted beside 32-bit keys and values: to measure the same, add "
            "`--bytes 32` to the commands of needles and fidelity."
        )
    said = {
        f"*{name}*: {x['protocol'][name]}."
        for x in summary["sources"]
        if x["protocol"]
        for name in ("unseen", "seen", "compressed")
        if name in x["protocol"]
    }
    if said:
        text += "\n\nProtocol. " + " ".join(sorted(said))
    if summary["left_out"]:
        text += f"\n\nLeft out, since they are no results: {', '.join(summary['left_out'])}."
    return text

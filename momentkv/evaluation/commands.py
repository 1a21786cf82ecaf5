"""The commands ``momentkv evaluate fidelity`` and ``momentkv evaluate gap``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from momentkv.cache.config import RECENT_QUERIES
from momentkv.cache.shared_budget import LONGER
from momentkv.evaluation.code import code_version
from momentkv.evaluation.fidelity import measure
from momentkv.evaluation.gap import measure_gap
from momentkv.evaluation.report import environment, progress_bar, read_json, save_figure, show, write_json
from momentkv.evaluation.settings import (
    CHOICES,
    Setting,
    bytes_as_tokens,
    check_evicts,
    check_quarters,
    check_unrepeated,
    setting_of,
    settings_grid,
)
from momentkv.evaluation.sources import BUILTIN_MODEL, digest_of, load_model, load_text, tokenize
from momentkv.evaluation.split import REPORT_TEXTS, number_of_texts, roles_of, said_of

__all__ = ["check_methods", "fidelity", "finished", "gap", "grid_of", "save"]

ERRORS_EVERY = 8
# How a context is compressed.
ONCE = "once, after one-shot prefill; the following tokens teacher-forced, no further eviction"
AS_DECODED = "after one-shot prefill, and {} tokens at a time while the following ones are teacher-forced one by one"
ONE_SHOT, IN_SEGMENTS = "after one-shot prefill", "after each {} tokens of the context"


def fidelity(options: argparse.Namespace) -> int:
    """Measure fidelity over texts, budgets, policies and corrections; write JSON, a plot and a table."""
    from momentkv.evaluation.lines import fidelity_lines
    from momentkv.evaluation.report_plots import plot_kl
    from momentkv.evaluation.terminal import fidelity_table

    console = Console()
    check_methods(options)
    if options.decode is not None:
        check_quarters(options)
    texts = options.text or list(REPORT_TEXTS)
    said = {text: load_text(text) for text in texts}
    earlier = earlier_results(options)
    with console.status("loading the model"):
        model, tokenizer = load_model(options.model)
    count = options.context + options.following + 1
    ids = {text: tokenize(tokenizer, said[text][options.skip :], count, name=text) for text in texts}
    roles = roles_of({Path(text).name: said[text] for text in texts})
    grid = grid_of(model, options)
    name = options.model or BUILTIN_MODEL
    protocol = {
        "model": name,
        "bytes": options.bytes,
        "context": options.context,
        "following": options.following,
        "skip": options.skip,
        "texts": [Path(text).name for text in texts],
        "ids_sha256": {Path(text).name: digest_of(ids[text]) for text in texts},
        "compressed": in_segments(ONCE if options.decode is None else AS_DECODED.format(options.decode), options),
        "sinks": 1,
        **always_of(options),
        "head_error": f"at every {ERRORS_EVERY}-th following token",
        "momentkv": code_version(),
    }
    rows = finished(earlier, protocol, options.output)
    done = {(row["text"], row["policy"], row["correction"], row["bytes_as_tokens"]) for row in rows}

    def size(setting: Setting) -> int:
        return bytes_as_tokens(model, setting, itemsize=options.bytes // 8, **always_of(options))

    if done:
        console.print(f"{len(done)} results found in {options.output}; --fresh discards them", markup=False)
    path = Path(options.output)
    with progress_bar(console) as progress:
        task = progress.add_task("fidelity", total=len(texts) * len(grid))
        for text in texts:
            short = Path(text).name
            left = [x for x in grid if (short, x.policy_name, x.correction, size(x)) not in done]
            progress.update(task, description=escape(f"fidelity, {short}"), advance=len(grid) - len(left))
            if not left:
                continue
            compressed = measure(
                model,
                ids[text],
                options.context,
                left,
                **always_of(options),
                errors_every=ERRORS_EVERY,
                block=options.decode,
                segment=options.segment,
                tokenizer=tokenizer,
            )
            for setting, result, nbytes in compressed:
                rows.append(
                    {
                        "text": short,
                        "method": called(setting.method, options.segment),
                        "policy": setting.policy_name,
                        "correction": setting.correction,
                        "budget": setting.budget,
                        "bytes_as_tokens": size(setting),
                        "nbytes": nbytes,
                        **dataclasses.asdict(result),
                    }
                )
                # After every result, so that an interruption loses none.
                save(path, options, protocol, rows, roles)
                progress.advance(task)
    save(path, options, protocol, rows, roles, complete=True)
    title = (
        f"{name}: {options.context} tokens of context, next {options.following}, mean of {number_of_texts(len(texts))}"
    )
    lines = fidelity_lines(rows)
    show(console, fidelity_table(lines, title=title, bits=options.bytes))
    for line in said_of(roles):
        console.print(line, markup=False)
    plot = save_figure(plot_kl(lines, bits=options.bytes, title=title), path.with_suffix(".png"))
    console.print(f"results: {path}   plot: {plot}", soft_wrap=True, markup=False)
    return 0


def called(method: str, segment: int | None) -> str:
    """What results call a method, so that those in segments of a text stand apart from those in one piece."""
    return method if segment is None else f"{method}, segments of {segment}"


def in_segments(said: str, options: argparse.Namespace) -> str:
    """What a protocol says of when the context is compressed, where that happens as it is read."""
    if options.segment is None:
        return said
    return said.replace("once, ", "").replace(ONE_SHOT, IN_SEGMENTS.format(options.segment))


def always_of(options: argparse.Namespace) -> dict[str, int]:
    """Recent tokens that a command always retains, and those of them that stay exact where others have few bits."""
    return {"window": options.window, "exact_window": options.exact_window}


def grid_of(model: Any, options: argparse.Namespace) -> list[Setting]:
    """Settings of a command, at equal bytes: its methods, or all its policies with all its corrections."""
    counted, always = options.bytes // 8, always_of(options)
    # By fewer than a window of queries at a time budgets are shared as while decoding.
    few = (getattr(options, "segment", None) or RECENT_QUERIES) < RECENT_QUERIES
    longer = getattr(options, "decode", None) is not None and options.following >= (LONGER - 1) * options.context
    decodes = few or longer
    if options.methods:
        grid: list[Setting] = []
        for x in map(setting_of, options.methods):
            ways = [(x.order, x.kind, x.sharing, x.bits)]
            try:
                own = settings_grid(
                    model, [x.policy], options.budgets, ways, itemsize=counted, decodes=decodes, **always
                )
            except ValueError as error:
                raise ValueError(f"{error}, or leave {x.method!r} out of methods") from None
            grid += [dataclasses.replace(setting, method=x.method, trial=x.trial) for setting in own]
        return grid
    corrections = [CHOICES[name] for name in options.corrections]
    called = {Setting("", 0, *correction): name for name, correction in CHOICES.items()}
    return [
        dataclasses.replace(x, method=f"{x.policy}/{called[dataclasses.replace(x, policy='', budget=0)]}")
        for x in settings_grid(
            model, options.policies, options.budgets, corrections, itemsize=counted, decodes=decodes, **always
        )
    ]


def check_methods(options: argparse.Namespace) -> None:
    """Refuse unknown names, what is named twice or called the same in results, and segments of no token.

    Needs no model.

    Raises
    ------
    ValueError
    """
    if options.segment is not None and options.segment < 1:
        raise ValueError(f"segment is {options.segment}; read at least one token at a time")
    for name in options.corrections:
        if name not in CHOICES:
            raise ValueError(f"corrections has {name!r}; use some of {', '.join(CHOICES)}")
    check_unrepeated(options)
    for option in ("text", "tasks"):
        seen: dict[str, str] = {}
        for given in getattr(options, option, None) or ():
            short = Path(given).name
            if short in seen:
                raise ValueError(
                    f"{option} has {seen[short]!r} and {given!r}, which results call the same; name each once, and "
                    "files of one name differently"
                )
            seen[short] = given
    named: dict[Setting, str] = {}
    for method in options.methods or ():
        setting = setting_of(method)
        if setting in named:
            raise ValueError(f"methods has {named[setting]!r} and {method!r}, which are the same; name it once")
        named[setting] = method


def save(
    path: Path,
    options: argparse.Namespace,
    protocol: dict[str, Any],
    rows: list[dict[str, Any]],
    roles: dict[str, Any],
    *,
    complete: bool = False,
) -> None:
    """Write what was measured so far, with the command that measures it and the roles of its texts."""
    content = {"command": options.command, "complete": complete, "protocol": protocol, "environment": environment()}
    write_json(path, content | {"roles": roles, "rows": rows})


def earlier_results(options: argparse.Namespace) -> dict[str, Any] | None:
    """What an earlier run left in the file that a command writes, read before a model is loaded.

    Raises
    ------
    ValueError
        If the file holds something else.
    """
    path = Path(options.output)
    if options.fresh or not path.exists():
        return None
    try:
        content: Any = read_json(path)
    except ValueError as error:
        raise ValueError(f"output {error}") from None
    if not (isinstance(content, dict) and "protocol" in content and "rows" in content):
        raise ValueError(
            f"output is {str(path)!r}, which holds something else than results; name another file, or discard what it "
            "holds with --fresh"
        )
    return content


def finished(content: dict[str, Any] | None, protocol: dict[str, Any], path: str | Path) -> list[dict[str, Any]]:
    """Rows of an earlier run of the same protocol; none where nothing was left.

    Raises
    ------
    ValueError
        If they are of another protocol.
    """
    if content is None:
        return []
    if content["protocol"] != protocol:
        raise ValueError(
            f"output {str(path)!r} holds results of another protocol ({differing(content['protocol'], protocol)}); "
            "name another file, or discard them with --fresh"
        )
    return list(content["rows"])


def differing(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """The first thing that two protocols say differently.

    Examples
    --------
    >>> differing({"model": "m", "seed": 0}, {"model": "m", "seed": 1})
    'seed is 0 there, 1 now'
    >>> differing({}, {"ids_sha256": {"news.txt": "a"}})
    'ids_sha256 is other'
    """
    name = next(x for x in theirs | ours if theirs.get(x) != ours.get(x))
    values = (theirs.get(name), ours.get(name))
    if any(isinstance(x, dict | list) for x in values):
        return f"{name} is other"
    return f"{name} is {values[0]!r} there, {values[1]!r} now"


def gap(options: argparse.Namespace) -> int:
    """Measure the directional gap; write data and a plot, print the means."""
    from momentkv.evaluation.gather import gap_line
    from momentkv.evaluation.report_plots import plot_gaps

    console = Console()
    check_evicts(options)
    said = load_text(options.text)
    with console.status("loading the model"):
        model, tokenizer = load_model(options.model)
    ids = tokenize(tokenizer, said[options.skip :], options.context + options.following, name=options.text)
    setting = Setting(options.policy, options.budget, *CHOICES[options.correction])
    with console.status("measuring attention of every layer and head"):
        measured = measure_gap(model, ids, options.context, setting)
    name = options.model or BUILTIN_MODEL
    short = Path(options.text).name
    title = f"{name}, {short}: {options.context} tokens, {setting.policy_name} keeps {setting.budget}"
    content = {
        "command": options.command,
        "complete": True,
        "momentkv": code_version(),
        "model": name,
        "text": short,
        "roles": roles_of({short: said}),
        "environment": environment(),
        **measured.summary(),
    }
    path = write_json(options.output, content)
    plot = save_figure(plot_gaps([gap_line(content, {})], title=title), path.with_suffix(".png"))
    means = content["mean"]
    console.print(title, style="bold", markup=False)
    for line in said_of(content["roles"]):
        console.print(line, markup=False)
    console.print(f"evicted mass w_E               mean {means['evicted_mass']:.3f}")
    console.print(f"cos(o_E, o_R)                  mean {means['cosine']:+.3f}")
    console.print(f"relative error, plain          mean {means['plain']:.3f}")
    console.print(f"relative error, corrected      mean {means['corrected']:.3f}")
    console.print(f"data: {path}   plot: {plot}", soft_wrap=True, markup=False)
    return 0

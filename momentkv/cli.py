"""The command ``momentkv``."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from momentkv import __version__
from momentkv.evaluation.options import (
    CORRECTIONS,
    Parser,
    add_budgets,
    add_measurements,
    add_output,
    add_source,
    command,
)
from momentkv.evaluation.outputs import check_output, output_of

__all__ = ["main"]

# Which extra brings a package that a command imports.
EXTRAS = {
    "torch": "hf",
    "transformers": "hf",
    "rich": "demo",
    "matplotlib": "demo",
    "gguf": "demo",
    "psutil": "demo",
    "jinja2": "evaluate",
    "markdown": "evaluate",
    "pandas": "evaluate",
    "scipy": "evaluate",
}
# Options of the commands that count something.
COUNTS = (
    *("context", "following", "decode", "budget", "budgets", "new_tokens"),
    *("chunk", "steps", "threads", "workers", "lengths", "max_length"),
)
# As shells report a process that Ctrl-C ended: 128 and the number of SIGINT.
INTERRUPTED = 130


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
    before = None
    try:
        check_counts(options)
        output = output_of(options)
        if output is not None:
            check_output(output)
        before = written(options)
        status = int(options.run(options))
        if sys.stdout is not None:  # as where it was closed before Python began
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        tell(f"interrupted; {kept(options, before)}")
        return INTERRUPTED
    except ModuleNotFoundError as error:
        message = str(error)
        if "pip install" not in message:
            extra = EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            message += f"; run pip install 'momentkv[{extra}]'"
        tell(message)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does; nothing more can be written to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        tell(str(error))
    return 1


def tell(message: str) -> None:
    """Say what went wrong on stderr: words are not cut where a terminal ends; elsewhere it is one line."""
    if sys.stderr is None:  # closed before Python began; print would take stdout in its place
        return
    message = f"momentkv: {message}"
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        message = textwrap.fill(message, width, break_long_words=False, break_on_hyphens=False)
    print(message, file=sys.stderr)


def check_counts(options: argparse.Namespace) -> None:
    """Raise if an option that counts something is not positive; commands check what else they need."""
    for name in COUNTS:
        value = getattr(options, name, None)
        verb, values = ("has", value) if isinstance(value, list) else ("is", [value])
        for each in values:
            if isinstance(each, int) and each < 1:
                raise ValueError(f"{name} {verb} {each}; use at least 1")
    if getattr(options, "skip", 0) < 0:
        raise ValueError(f"skip is {options.skip}; use 0 or more characters")


def written(options: argparse.Namespace) -> int | None:
    """When the output of a command was last written; None where there is none yet."""
    output = output_of(options)
    return output.path.stat().st_mtime_ns if output is not None and output.path.exists() else None


def kept(options: argparse.Namespace, before: int | None) -> str:
    """What is left of an interrupted command, and how to go on."""
    if options.run is run_lm_eval:
        if "--use_cache" in options.arguments:
            return "lm_eval goes on from its cache when the same command is run again"
        return "nothing was written; with --use_cache FILE lm_eval goes on where it was"
    now, fresh, output = written(options), getattr(options, "fresh", False), output_of(options)
    resumes = output is not None and output.resumes
    if output is None or now is None or (now == before and (fresh or not resumes)):
        return "nothing was written; run it again"
    if resumes:
        same = "the same command without --fresh" if fresh else "the same command"
        return f"what was measured is in {output.path}, and {same} goes on from there"
    return f"{output.path} was written; run it again for the rest"


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(prog="momentkv", description="A KV cache with a fixed budget that remembers what it evicts.")
    parser.add_argument("--version", action="version", version=f"momentkv {__version__}")
    parser.set_defaults(resumes=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="a real model reads a real text with the full and with small caches")
    add_source(demo, context=4000, following=128)
    add_budgets(demo, [128, 512])
    demo.add_argument("--question", default='What is the "with" statement used for?', help="asked after the text")
    demo.add_argument("--new-tokens", type=int, default=32, help="tokens to generate a continuation and an answer")
    add_output(demo, "results/demo.png", "the plot")
    demo.set_defaults(run=command("momentkv.demo", "demo"))

    add_plan(commands.add_parser("plan", help="the memory that a cache takes, from a model's shape alone"))

    bench = commands.add_parser("bench", help="time of decoding and eviction against the copy bandwidth of the device")
    bench.add_argument("--device", help="cpu or cuda (default: cuda where there is a GPU)")
    bench.add_argument("--threads", type=int, default=1, help="of a CPU")
    add_output(bench, "results/bench.json", "results; the plot goes beside it", holds="copy_bytes_per_second")
    bench.set_defaults(run=command("momentkv.evaluation.bench", "bench"))

    commands.add_parser("lm-eval", help="the command line of lm_eval, with the model momentkv", add_help=False)

    evaluate = commands.add_parser("evaluate", help="measure fidelity, needles and the directional gap")
    add_measurements(evaluate.add_subparsers(required=True, metavar="KIND"))
    return parser


def add_plan(plan: argparse.ArgumentParser) -> None:
    """Options of ``momentkv plan``."""
    plan.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="name or Hugging Face id of a known model (--list), the path of a config.json or of its folder, or any "
        "other id, which transformers looks up",
    )
    plan.add_argument("--list", action="store_true", help="list the known models, and plan nothing")
    for name, what in (
        ("layers", "layers, all of full attention"),
        ("q-heads", "query heads"),
        ("kv-heads", "KV heads"),
    ):
        plan.add_argument(f"--{name}", type=int, metavar="N", help=f"{what}, instead of MODEL")
    plan.add_argument("--head-dim", type=int, metavar="N", help="dimension of a head, instead of MODEL")
    plan.add_argument("--context", type=int, metavar="N", help="tokens read and generated")
    plan.add_argument(
        "--budget",
        metavar="B",
        help="tokens retained per KV head (512), a share of the context (0.25), or bytes of the whole cache (64MiB)",
    )
    plan.add_argument("--correction", default="summaries", choices=CORRECTIONS, help="what stands for evicted tokens")
    plan.add_argument("--batch", type=int, default=1, help="rows, each of N tokens")
    plan.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="of keys and values"
    )
    plan.add_argument(
        "--bits",
        metavar="N",
        help="of retained tokens (3, 4, 5, 6, 8, 16), of keys and values (4/3), auto, or none, which is as they come "
        "(default: auto where the budget is in bytes, else none)",
    )
    plan.set_defaults(run=run_plan)


def run_plan(options: argparse.Namespace) -> int:
    """Run ``momentkv plan``, which needs neither torch nor transformers for what it knows."""
    from momentkv.cache.budget_rules import budget_from_text
    from momentkv.codes import AUTO, bits_from_text
    from momentkv.plan import Shape, find_shape, plan, plan_codes, table_of, table_of_codes, table_of_known

    if options.list:
        print(table_of_known())
        return 0
    for name in ("context", "budget"):
        if getattr(options, name) is None:
            raise ValueError(f"{name} is missing; give --{name}")
    numbers = {name: getattr(options, name) for name in ("layers", "q_heads", "kv_heads", "head_dim")}
    missing = [f"--{name.replace('_', '-')}" for name, number in numbers.items() if number is None]
    if options.model is not None:
        if len(missing) < len(numbers):
            raise ValueError(f"MODEL is {options.model!r}, and there are numbers beside it; give one or the other")
        name, shape = options.model, find_shape(options.model)
    elif missing:
        raise ValueError(f"there is no MODEL, and {', '.join(missing)} are missing; give them all, or a model")
    else:
        name, shape = "a model of these numbers", Shape(**numbers)
    budget = budget_from_text(options.budget)
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("correction", "batch", "dtype")}
    bits = None if options.bits in (None, "none") else bits_from_text(options.bits)
    if bits == AUTO or (options.bits is None and isinstance(budget, str)):  # as `momentkv.hf.MomentCache` has it
        print(table_of_codes(plan_codes(shape, options.context, budget, **settings), name))
    else:
        print(table_of(plan(shape, options.context, budget, bits=bits, **settings), name))
    return 0


def run_lm_eval(options: argparse.Namespace) -> int:
    """Run ``momentkv lm-eval``."""
    from momentkv.evaluation.lm_eval import main as lm_eval

    return lm_eval(options.arguments)


if __name__ == "__main__":
    sys.exit(main())

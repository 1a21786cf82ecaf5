"""What the bytes of a correction are best spent on: summaries against rank, at the same retained tokens.

Prints KL and head error of several corrections, with what each costs in tokens per KV head.
About ten minutes on one core.

Run: python examples/summaries_tradeoff.py [--budget 128] [--texts compound types] [--context 4096]
"""

import argparse
from statistics import mean

from rich.console import Console
from rich.table import Table

from momentkv.evaluation.fidelity import measure
from momentkv.evaluation.report import progress_bar
from momentkv.evaluation.settings import Setting, moment_tokens
from momentkv.evaluation.sources import load_model, load_text, tokenize
from momentkv.statistics.corrections import AnchoredSummaries, Correction

# What the default was chosen with.
TEXTS = ("compound", "formatstrings", "specialnames", "types")
TRIED: dict[str, tuple[int | None, str | Correction]] = {
    "plain eviction": (None, "moments"),
    "the paper's, order 1": (1, "moments"),
    "one anchored, order 1": (1, AnchoredSummaries(1, 64, strength=0.0, calibrated=False)),
    "one anchored, order 2": (1, AnchoredSummaries(1, 64)),
    "one, compact": (1, AnchoredSummaries(1, 8)),
    "15, no slope": (1, AnchoredSummaries(15, 0)),
    "12, rank 2": (1, AnchoredSummaries(12, 2)),
    "12, rank 2, uncalibrated": (1, AnchoredSummaries(12, 2, calibrated=False)),
    "8, rank 4": (1, AnchoredSummaries(8, 4)),
    "4, rank 2": (1, AnchoredSummaries(4, 2)),
    "24, rank 4": (1, AnchoredSummaries(24, 4)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=128, help="tokens retained per KV head by all alike")
    parser.add_argument("--texts", nargs="+", default=list(TEXTS))
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--following", type=int, default=256)
    options = parser.parse_args()

    model, tokenizer = load_model()
    settings = {name: Setting("momentkv", options.budget, *correction) for name, correction in TRIED.items()}
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in TRIED}
    count = options.context + options.following + 1
    console = Console()
    with progress_bar(console) as progress:
        task = progress.add_task("trying", total=len(options.texts) * len(settings))
        for text in options.texts:
            ids = tokenize(tokenizer, load_text(text), count, name=text)
            measured = measure(model, ids, options.context, settings.values(), errors_every=8)
            for name, (_, fidelity, _) in zip(settings, measured, strict=True):
                errors = (fidelity.head_error or 0.0, fidelity.head_error_p99 or 0.0)  # None without errors_every
                results[name].append((fidelity.kl, *errors))
                progress.advance(task)
    table = Table(title=f"{options.budget} of {options.context} tokens retained, mean of {len(options.texts)} texts")
    for column in ("correction", "costs, tokens/head", "KL", "head error", "99th percentile"):
        table.add_column(column, justify="left" if column == "correction" else "right")
    for name, rows in results.items():
        cost = moment_tokens(model, settings[name])
        table.add_row(name, str(cost), *(f"{mean(column):.3f}" for column in zip(*rows, strict=True)))
    console.print(table)


if __name__ == "__main__":
    main()

"""Run every check on many adversarial cases: ``python -m momentkv.testing.verify``.

A case is one head: a set of tokens, a query, and a retained set beside them. The same seed gives the same cases.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from momentkv.evaluation.outputs import Output, check_output
from momentkv.testing.adversaries import draw
from momentkv.testing.laws import check

__all__ = ["Row", "main", "verify"]

HEADS = 400
QUANTILES = (0.1, 0.5, 0.9)


@dataclasses.dataclass
class Row:
    """Result of one check over all cases.

    Attributes
    ----------
    name : str
    cases, violations : int
    tightness : list of float or None
        Quantiles 0.1, 0.5, 0.9 of bound over actual; None for laws, which bound nothing.
    """

    name: str
    cases: int = 0
    violations: int = 0
    tightness: list[float] | None = None


def run_batch(seed: int, index: int, names: list[str] | None) -> dict[str, tuple[int, int, Any]]:
    """Cases, violations and a sample of tightness of every check on one batch."""
    rng = np.random.default_rng([seed, index])
    batch = draw(rng, HEADS, dtype=("float64", "float32")[index % 2])
    return {
        name: (outcome.violated.size, int(outcome.violated.sum()), outcome.tightness[:100])
        for name, outcome in check(batch, rng, names)
    }


def verify(
    cases: int,
    *,
    seed: int = 0,
    workers: int = 1,
    names: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Row]:
    """Run checks, all of them by default, on at least so many cases.

    Parameters
    ----------
    cases, seed : int
    workers : int
        Processes.
    names : sequence of str, optional
        Of `momentkv.testing.laws.CHECKS`.
    progress : callable, optional
        Called with the batches done and their number.

    Returns
    -------
    list of Row

    Examples
    --------
    >>> [row] = verify(400, names=["B9 share"])
    >>> row.cases, row.violations
    (400, 0)
    """
    batches = -(-cases // HEADS)
    chosen = None if names is None else list(names)
    rows: dict[str, Row] = {}
    samples: dict[str, list[Any]] = {}

    def take(done: int, results: dict[str, tuple[int, int, Any]]) -> None:
        for name, (count, violations, tightness) in results.items():
            row = rows.setdefault(name, Row(name))
            row.cases += count
            row.violations += violations
            samples.setdefault(name, []).append(tightness)
        if progress is not None:
            progress(done, batches)

    if workers == 1:
        for index in range(batches):
            take(index + 1, run_batch(seed, index, chosen))
    else:
        with concurrent.futures.ProcessPoolExecutor(workers) as pool:
            futures = [pool.submit(run_batch, seed, index, chosen) for index in range(batches)]
            for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
                take(done, future.result())
    for name, row in rows.items():
        ratios = np.concatenate(samples[name])
        if ratios.size:
            row.tightness = [float(x) for x in np.quantile(ratios, QUANTILES)]
    return list(rows.values())


def table(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    lines = ["| check | cases | violations | bound / actual: 10 % | median | 90 % |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        ratios = ["", "", ""] if row.tightness is None else [f"{x:.3g}" for x in row.tightness]
        lines.append(f"| {row.name} | {row.cases:,} | {row.violations} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def bar(done: int, total: int) -> None:
    """A progress bar on stderr."""
    width = 40 * done // total
    end = "\n" if done == total else ""
    print(f"\r[{'#' * width}{'.' * (40 - width)}] {done}/{total} batches", end=end, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; the exit status says whether anything was violated."""
    parser = argparse.ArgumentParser(prog="python -m momentkv.testing.verify", description=__doc__)
    parser.add_argument("--cases", type=int, default=1_000_000, help="heads, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--output", default="results/verify.json", help="results; the table goes beside it as .md")
    options = parser.parse_args(arguments)
    path = Path(options.output)
    try:
        check_output(Output("output", path, Path("verify.json"), holds="cases", beside=".md"))
    except ValueError as error:
        parser.error(str(error))
    start = time.perf_counter()
    rows = verify(options.cases, seed=options.seed, workers=options.workers, progress=bar)
    seconds = time.perf_counter() - start
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"cases": options.cases, "seed": options.seed, "rows": [dataclasses.asdict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(rows) + "\n")
    print(table(rows))
    checks, violations = sum(row.cases for row in rows), sum(row.violations for row in rows)
    print(f"\n{checks:,} checks in {seconds:.0f} s, {violations} violations")
    return int(violations > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Error of every head over a long decode with eviction, after one-shot and after chunked prefill."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from momentkv.backends import get_backend
from momentkv.cache.layer import LayerCache
from momentkv.evaluation.capture import Attended, CaptureCache
from momentkv.evaluation.report import empty_table, environment, progress_bar, show, tokens_in, write_json
from momentkv.evaluation.settings import (
    CHOICES,
    QUARTERS,
    Setting,
    check_quarters,
    check_unrepeated,
    settings_grid,
)
from momentkv.evaluation.sources import BUILTIN_MODEL, load_model, load_text, tokenize
from momentkv.hf.models import takes
from momentkv.policies import get_policy
from momentkv.statistics.corrections import get_correction

__all__ = ["measure_stream", "stream"]


@torch.inference_mode()
def capture(model: Any, ids: torch.Tensor) -> dict[int, Attended]:
    """Queries, keys and values of every layer over the whole text, by the full cache."""
    captured = CaptureCache(model, None)
    model(ids.to(model.device), **takes(model, captured), logits_to_keep=1)
    return captured.attended()


@torch.inference_mode()
def measure_stream(
    attended: dict[int, Attended], context: int, setting: Setting, *, chunk: int | None = None
) -> Iterator[torch.Tensor]:
    """Relative output error of every head of one layer after another, while decoding the tokens after the context.

    Parameters
    ----------
    attended : dict
        What `capture` returns, of ``context + T`` tokens.
    context : int
    setting : Setting
    chunk : int, optional
        Tokens of a prefill chunk; by default the context is prefilled at once.

    Yields
    ------
    tensor, shape (q_head, T)
        Each head is fed the exact queries, keys and values, so that its error is its own.
    """
    for layer in attended.values():
        q, k, v = layer.queries, layer.keys, layer.values
        core = LayerCache(
            setting.budget,
            policy=get_policy(setting.policy),
            correction=get_correction(setting.kind, order=setting.order, bits=16),
            scale=layer.scaling,
        )
        scale = q.shape[-1] ** -0.5 if layer.scaling is None else layer.scaling
        exact = get_backend(q).attend_causal(q[..., context:, :], k, v, scale=scale).out
        for start in range(0, context, chunk or context):
            part = slice(start, min(start + (chunk or context), context))
            core.step(q[..., part, :], k[..., part, :], v[..., part, :])
        outs = [
            core.step(q[..., t : t + 1, :], k[..., t : t + 1, :], v[..., t : t + 1, :])
            for t in range(context, q.shape[-2])
        ]
        error = torch.linalg.vector_norm(torch.cat(outs, dim=-2) - exact, dim=-1)
        yield (error / torch.linalg.vector_norm(exact, dim=-1))[0].cpu()


def stream(options: argparse.Namespace) -> int:
    """Run ``momentkv evaluate stream``."""
    console = Console()
    check_quarters(options)
    check_unrepeated(options)
    whole = options.context + options.following
    if options.budget >= whole:
        raise ValueError(
            f"budget is {options.budget}, but context and following tokens are {whole}, none of which would be "
            "evicted; use a smaller one"
        )
    text = load_text(options.text)[options.skip :]
    with console.status("loading the model"):
        model, tokenizer = load_model(options.model)
    ids = tokenize(tokenizer, text, options.context + options.following, name=options.text)
    with console.status(f"reading {ids.shape[1]} tokens"):
        attended = capture(model, ids)
    corrections = [CHOICES[name] for name in options.corrections]
    grid = settings_grid(model, [options.policy], [options.budget], corrections, itemsize=options.bytes // 8)
    modes = {"one-shot": None, f"chunks of {options.chunk}": options.chunk}
    rows = []
    with progress_bar(console) as progress:
        task = progress.add_task("stream", total=len(modes) * len(grid) * len(attended))
        for mode, chunk in modes.items():
            for setting in grid:
                progress.update(task, description=f"{mode}, {setting.correction}")
                errors = []
                for error in measure_stream(attended, options.context, setting, chunk=chunk):
                    errors.append(error)
                    progress.advance(task)
                both = torch.stack(errors)
                rows.append(
                    {
                        "prefill": mode,
                        "correction": setting.correction,
                        "budget": setting.budget,
                        "mean": float(both.mean()),
                        "p90": float(both.flatten()[:: max(1, both.numel() // 10**6)].quantile(0.9)),
                        "stretches": [float(x.mean()) for x in both.tensor_split(QUARTERS, dim=-1)],
                    }
                )
    name = options.model or BUILTIN_MODEL
    title = (
        f"{name}, {Path(options.text).name}: {options.context} tokens, then {options.following} decoded; "
        f"{options.policy}, bytes of {options.budget} {tokens_in(options.bytes)}"
    )
    show(console, table_of(rows, title))
    path = write_json(
        options.output,
        {"title": title, "block": 32, "bytes": options.bytes, "environment": environment(), "rows": rows},
    )
    console.print(f"results: {path}", soft_wrap=True, markup=False)
    return 0


def table_of(rows: list[dict[str, Any]], title: str) -> Table:
    """Mean relative error of the heads, by stretch of the decode, and against plain eviction."""
    stretches = [f"{index + 1}/{QUARTERS}" for index in range(QUARTERS)]
    columns = ["prefill", "correction", "kept", *stretches, "mean", "p90", "of plain"]
    table = empty_table(title, columns, ("prefill", "correction"))
    table.caption = f"1/{QUARTERS} and so on: mean relative error of the heads in that part of the decode"
    plain = {row["prefill"]: row["mean"] for row in rows if row["correction"] == "none"}
    previous = None
    for row in rows:
        if previous not in (None, row["prefill"]):
            table.add_section()
        of_plain = f"{row['mean'] / plain[row['prefill']]:.2f}x" if row["prefill"] in plain else ""
        table.add_row(
            row["prefill"] if row["prefill"] != previous else "",
            row["correction"],
            str(row["budget"]),
            *(f"{x:.3f}" for x in row["stretches"]),
            f"{row['mean']:.3f}",
            f"{row['p90']:.3f}",
            of_plain,
        )
        previous = row["prefill"]
    return table

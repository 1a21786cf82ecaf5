"""Needles: whether what one sentence of a long context says can still be read from a compressed cache."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from momentkv import __version__
from momentkv.cache import RECENT_QUERIES
from momentkv.evaluation.capture import CaptureCache, replay
from momentkv.evaluation.commands import finished
from momentkv.evaluation.fidelity import CHOICES, Setting, empty_cache, moment_tokens, settings_grid
from momentkv.evaluation.haystack import KEYS, Sample, make_sample
from momentkv.evaluation.needles_report import needles_table, plot_needles
from momentkv.evaluation.report import environment, progress_bar, write_json
from momentkv.evaluation.sources import BUILTIN_MODEL, load_model, load_text
from momentkv.policies import get_policy

__all__ = ["Recall", "measure_sample", "needles"]

Cell = tuple[str, Setting]


@dataclasses.dataclass(frozen=True)
class Recall:
    """How much of the answer a cache gives back.

    Attributes
    ----------
    exact : bool
        Whether every token of the answer, given those before it, is the most likely one.
    tokens : float
        Share of the answer's tokens that are.
    nll : float
        Negative log-likelihood of the answer, mean over its tokens, in nats.
    generated : bool or None
        Whether greedy generation gives the answer; None where it was not asked to.
    """

    exact: bool
    tokens: float
    nll: float
    generated: bool | None = None


def recall(logits: torch.Tensor, answer: torch.Tensor) -> Recall:
    """Compare logits (tokens, vocabulary) with the answer (tokens,)."""
    right = logits.argmax(-1) == answer
    nll = torch.nn.functional.cross_entropy(logits.float(), answer)
    return Recall(bool(right.all()), float(right.double().mean()), float(nll))


class Reader:
    """A sample read once by the full cache, and its answer asked of any cache.

    Parameters
    ----------
    model : PreTrainedModel
    sample : Sample
    keep : int or None
        Queries that policies observe; None for all.
    """

    def __init__(self, model: Any, sample: Sample, keep: int | None) -> None:
        self.model, self.keep = model, keep
        self.ids = torch.tensor([[*sample.context, *sample.question, *sample.answer]], device=model.device)
        self.context = len(sample.context)
        self.end = self.context + len(sample.question)
        self.captured = CaptureCache(model, keep)
        model(self.ids[:, : self.context], past_key_values=self.captured, logits_to_keep=1)
        self.nbytes = self.captured.nbytes
        self.layers = list(self.captured.capture_layers.values())
        before = [layer.queries for layer in self.captured.attended().values()]
        for layer in self.layers:
            layer.keep = None  # of the question
        self.full = self.score(self.context, self.captured)
        # One pass serves both kinds of question, for the shorter context is the beginning of the longer one.
        self.whole = [
            (layer.keys, layer.values, torch.cat([queries, layer.queries], dim=2))
            for layer, queries in zip(self.captured.attended().values(), before, strict=True)
        ]

    def score(self, read: int, cache: Any) -> Recall:
        """Feed what a cache has not read and the answer, in one pass."""
        answer = self.ids[0, self.end :]
        logits = self.model(self.ids[:, read:-1], past_key_values=cache, logits_to_keep=len(answer)).logits
        return recall(logits[0], answer)

    def rewind(self, read: int) -> CaptureCache:
        """The full cache as it was after the first ``read`` tokens."""
        for layer, (keys, values, queries) in zip(self.layers, self.whole, strict=True):
            layer.keys, layer.values = keys[:, :, :read], values[:, :, :read]
            stop = queries.shape[2] - (self.ids.shape[1] - 1 - read)
            layer.queries = queries[:, :, 0 if self.keep is None else max(0, stop - self.keep) : stop]
        return self.captured

    def generates(self, cache: Any) -> bool:
        """Whether greedy generation gives the answer."""
        prompt, answer = self.ids[:, : self.end], self.ids[0, self.end :]
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=len(answer),
            do_sample=False,
        )
        return torch.equal(out[0, self.end :], answer)


@torch.inference_mode()
def measure_sample(
    model: Any,
    sample: Sample,
    cells: Iterable[Cell],
    *,
    sinks: int = 1,
    window: int = 32,
    generate: bool = False,
) -> Iterator[tuple[Cell | None, Recall, int]]:
    """Ask the full cache, and each compressed one.

    Protocol: ``"unseen"`` compresses the context and reads the question afterwards; ``"seen"`` compresses context and
    question, all but the last token before the answer. What was not compressed and the answer are fed in one pass
    (nothing more is evicted). Generation evicts as it goes.

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="momentkv"`` and full attention in every layer.
    sample : Sample
    cells : iterable of (str, Setting)
        When the question comes, and how to compress.
    sinks, window : int
    generate : bool
        Let the model generate, too.

    Yields
    ------
    cell : (str, Setting) or None
        None for the full cache, which comes first.
    recall : Recall
    nbytes : int
        Bytes of the cache after what was compressed; of the full one, after the context.
    """
    cells = list(cells)
    observed = [get_policy(setting.policy).observes for _, setting in cells]
    reader = Reader(model, sample, None if None in observed else max([RECENT_QUERIES, *filter(None, observed)]))
    result = reader.full
    if generate:
        result = dataclasses.replace(result, generated=reader.generates(reader.rewind(reader.context)))
    yield None, result, reader.nbytes
    for question, setting in cells:
        read = reader.context if question == "unseen" else reader.end - 1

        def compressed(setting: Setting = setting, read: int = read) -> Any:
            return replay(reader.rewind(read), empty_cache(model, setting, sinks=sinks, window=window))

        cache = compressed()
        nbytes = cache.nbytes
        result = reader.score(read, cache)
        if generate:
            result = dataclasses.replace(result, generated=reader.generates(compressed()))
        yield (question, setting), result, nbytes


def needles(options: argparse.Namespace) -> int:
    """Hide needles in haystacks and ask for them; write JSON, a plot and a table."""
    check(options)
    console = Console()
    haystack = None if options.haystack is None else load_text(options.haystack)
    with console.status("loading the model"):
        model, tokenizer = load_model(options.model)
    grid = settings_grid(model, options.policies, options.budgets, [CHOICES[name] for name in options.corrections])
    cells = [(question, setting) for question in options.question for setting in grid]
    name = options.model or BUILTIN_MODEL
    protocol = {
        "model": name,
        "value": options.value,
        "keys": options.keys,
        "haystack": "made up" if haystack is None else Path(options.haystack).name,
        "seed": options.seed,
        "generate": options.generate,
        "unseen": "the context is compressed once, after one-shot prefill; question and answer in one pass after it",
        "seen": "the question is compressed, too; the answer in one pass after it",
        "sinks": 1,
        "window": 32,
        "momentkv": __version__,
    }
    rows = [] if options.fresh else finished(options.output, protocol)
    if rows:
        console.print(f"{len(rows)} results found in {options.output}; --fresh discards them")
    path = Path(options.output)
    done = {key_of(row) for row in rows}
    # All lengths and depths once, then again: an interrupted run has seen each about equally often.
    asked = [
        {"length": length, "depth": depth, "sample": sample}
        for sample in range(options.samples)
        for length in options.lengths
        for depth in options.depths
    ]
    samples = {}
    for which in asked:  # before any is measured, so that what does not fit is refused at once
        seed = (options.seed, which["length"], round(1000 * which["depth"]), which["sample"])
        samples[tuple(which.values())] = make_sample(
            tokenizer,
            which["length"],
            which["depth"],
            value=options.value,
            keys=options.keys,
            haystack=haystack,
            seed=seed,
        )
    with progress_bar(console) as progress:
        task = progress.add_task("needles", total=len(asked) * len(cells))
        for which in asked:
            found = {cell: which | labels(model, cell) for cell in (None, *cells)}
            left = [cell for cell in cells if key_of(found[cell]) not in done]
            progress.advance(task, len(cells) - len(left))
            if not left:
                continue
            for cell, result, nbytes in measure_sample(
                model, samples[tuple(which.values())], left, generate=options.generate
            ):
                if key_of(found[cell]) not in done:
                    done.add(key_of(found[cell]))
                    rows.append(found[cell] | {"nbytes": nbytes} | dataclasses.asdict(result))
                if cell is not None:
                    progress.advance(task)
            # After every sample, so that an interruption loses no more than one.
            write_json(path, {"protocol": protocol, "environment": environment(), "rows": rows})
    hidden = f"one {options.value}" if options.keys == 1 else f"one of {options.keys} {options.value}s"
    title = f"{name}: {hidden} asked for in prose"
    console.print(needles_table(rows, title=title))
    plot = plot_needles(rows, path.with_suffix(".png"), title=title)
    console.print(f"results: {path}   plot: {plot}")
    return 0


def labels(model: Any, cell: Cell | None) -> dict[str, Any]:
    """What a row says of the cache that was asked."""
    if cell is None:
        return {"question": "", "policy": "full cache", "correction": "", "budget": None, "bytes_as_tokens": None}
    question, setting = cell
    return {
        "question": question,
        "policy": setting.policy_name,
        "correction": setting.correction,
        "budget": setting.budget,
        "bytes_as_tokens": setting.budget + moment_tokens(model, setting),
    }


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    """What tells a row from all others."""
    names = ("length", "depth", "sample", "question", "policy", "correction", "bytes_as_tokens")
    return tuple(row[name] for name in names)


def check(options: argparse.Namespace) -> None:
    """Refuse what cannot be measured, before the model is loaded."""
    for name in options.corrections:
        if name not in CHOICES:
            raise ValueError(f"corrections has {name!r}; use some of {', '.join(CHOICES)}")
    for depth in options.depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depths has {depth:g}; use shares of the context from 0 to 1")
    if not 1 <= options.keys <= len(KEYS):
        raise ValueError(f"keys is {options.keys}; use 1 for a single needle, or up to {len(KEYS)}")
    if options.samples < 1:
        raise ValueError(f"samples is {options.samples}; use at least 1 for each depth")
    if options.seed < 0:
        raise ValueError(f"seed is {options.seed}; use 0 or a positive number")

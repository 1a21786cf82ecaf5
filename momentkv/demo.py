"""``momentkv demo``: a real model reads a real text, and continues and answers from the full and from small caches."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers.cache_utils import DynamicCache

from momentkv.cache.config import wanted_queries
from momentkv.evaluation.capture import CaptureCache, capture_again, replay
from momentkv.evaluation.fidelity import Fidelity, compare
from momentkv.evaluation.report import progress_bar, save_figure, show, titled
from momentkv.evaluation.settings import Setting, empty_cache, setting_of, settings_grid
from momentkv.evaluation.sources import BUILTIN_MODEL, load_model, load_text, tokenize
from momentkv.evaluation.steps import Step, Typical, evicted_tokens, held_tokens, typical
from momentkv.hf import MomentCache
from momentkv.hf.models import takes

__all__ = ["demo"]

# What is shown at equal bytes: name, method as `momentkv.evaluation.settings.setting_of` takes it, colour.
ROWS = (
    ("plain eviction", "momentkv/none", "C3"),
    ("paper's moments", "momentkv/order-1", "C0"),
    ("summaries", "momentkv/summaries", "C2"),
    ("the default", "default", "C1"),
    ("in few bits", "default@auto", "C4"),
    ("read twice", "twice@auto", "C5"),
)
# The one that is recommended.
BEST = "in few bits"
# A fact that the text does not ask for, hidden a third of the way in.
SECRET = "4831207"
NEEDLE = f"The secret number of the lighthouse is {SECRET}."
NEEDLE_PRIME = "The secret number of the lighthouse is"
NEEDLE_DEPTH = 1 / 3


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one cache made of the text."""

    name: str
    tokens: int
    nbytes: int
    fidelity: Fidelity
    speed: Typical
    continuation: str
    answer: str
    secret: str


def demo(options: argparse.Namespace) -> int:
    """Run the demo; print the table, write the plot."""
    console = Console()
    if options.new_tokens < 2:
        raise ValueError(f"--new-tokens is {options.new_tokens}; use at least 2, the first of which is not timed")
    text = load_text(options.text)[options.skip :]
    with console.status("loading the model"):
        model, tokenizer = load_model(options.model)
    count = options.context + options.following + 1
    tokenize(tokenizer, text, count, name=options.text)  # long enough without what is hidden in it
    text = hide(tokenizer, text, options.context)
    ids = tokenize(tokenizer, text, count, name=options.text).to(model.device)
    question = question_ids(tokenizer, options.question).to(model.device)
    settings = [
        (name, setting)
        for budget in sorted(options.budgets)
        for name, method, _ in ROWS
        for setting in fitting(model, method, budget)
    ]
    if not settings:
        grid_of(model, ROWS[0][1], options.budgets)  # says what is too small
    with progress_bar(console) as progress:
        task = progress.add_task(f"reading {options.context} tokens", total=len(settings) + 3)
        captured, full_logits = read(model, ids, options.context)
        progress.advance(task)
        progress.update(task, description="reading it again")
        capture_again(model, captured, ids[:, : options.context], tokenizer)
        progress.advance(task)
        progress.update(task, description="full cache")
        readings = [
            judge(model, tokenizer, full_cache(model, captured), "full cache", ids, question, full_logits, options)
        ]
        progress.advance(task)
        for name, setting in settings:
            progress.update(task, description=f"{name}, budget {setting.budget}")
            cache = replay(captured, empty_cache(model, setting, block=32))
            readings.append(judge(model, tokenizer, cache, name, ids, question, full_logits, options))
            progress.advance(task)
    title = f"{options.model or BUILTIN_MODEL} reads {options.context} tokens of {Path(options.text).name!r}"
    show(console, table_of(readings, title))
    console.print()
    console.print(texts_of(readings, options.question))
    console.print(f"plot: {plot(readings, options.output, title)}", soft_wrap=True, markup=False)
    return 0


def grid_of(model: Any, method: str, budgets: Sequence[int]) -> list[Setting]:
    """The settings of a method at budgets in bytes."""
    setting = setting_of(method)
    return settings_grid(
        model, [setting.policy], budgets, [(setting.order, setting.kind, setting.sharing, setting.bits)]
    )


def fitting(model: Any, method: str, budget: int) -> list[Setting]:
    """The setting of a budget in bytes, or none if the correction leaves too few tokens."""
    try:
        return grid_of(model, method, [budget])
    except ValueError:
        return []


def hide(tokenizer: Any, text: str, context: int) -> str:
    """The text with the needle as a paragraph of its own, a third of the context in or at the next paragraph's end."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    start, latest = (len(tokenizer.decode(ids[: int(depth * context)])) for depth in (NEEDLE_DEPTH, 2 * NEEDLE_DEPTH))
    at = text.find("\n\n", start, latest)
    if at < 0:  # a text without paragraphs
        at = start
    return f"{text[:at]}\n\n{NEEDLE}{text[at:]}"


@torch.inference_mode()
def read(model: Any, ids: torch.Tensor, context: int) -> tuple[CaptureCache, torch.Tensor]:
    """Prefill once and predict the following tokens; every cache below starts from this one exact prefill."""
    captured = CaptureCache(model, wanted_queries(setting_of(method).policy for _, method, _ in ROWS))
    model(ids[:, :context], **takes(model, captured), logits_to_keep=1)
    full = full_cache(model, captured)
    logits: torch.Tensor = model(ids[:, context:-1], **takes(model, full)).logits[0]
    return captured, logits


def full_cache(model: Any, captured: CaptureCache) -> DynamicCache:
    """The full cache of the captured context."""
    cache = DynamicCache(config=model.config)
    for index, layer in captured.capture_layers.items():
        cache.update(layer.keys, layer.values, index)
    captured.store_windows(cache)
    return cache


def judge(
    model: Any,
    tokenizer: Any,
    cache: Any,
    name: str,
    ids: torch.Tensor,
    question: torch.Tensor,
    full_logits: torch.Tensor,
    options: argparse.Namespace,
) -> Reading:
    """Compare with the full cache, continue the text, and answer the question, each from a copy of the cache."""
    context = options.context
    if isinstance(cache, MomentCache):
        nbytes = cache.nbytes
    else:
        nbytes = sum(x.keys.nbytes + x.values.nbytes for x in cache.layers)
    with torch.inference_mode():
        logits = model(ids[:, context:-1], **takes(model, copy.deepcopy(cache))).logits[0]
    # One token more than the cache has read: generate() would read its whole input again if there were nothing new.
    continued, steps = generate(model, tokenizer, copy.deepcopy(cache), ids[:, : context + 1], options.new_tokens)
    asked = torch.cat([ids[:, :context], question], dim=1)
    answered, _ = generate(model, tokenizer, copy.deepcopy(cache), asked, options.new_tokens)
    # Asked as a sentence of the text itself: a small model that has read raw text does not take it for an order.
    needle = tokenizer(f"\n\n{NEEDLE_PRIME}", return_tensors="pt", add_special_tokens=False).input_ids.to(ids.device)
    asked = torch.cat([ids[:, :context], needle], dim=1)
    secret, _ = generate(model, tokenizer, copy.deepcopy(cache), asked, len(SECRET) + 2)
    return Reading(
        name=name,
        tokens=held_tokens(cache),
        nbytes=nbytes,
        fidelity=compare(full_logits, logits, ids[0, context + 1 :]),
        speed=typical(steps),
        continuation=continued,
        answer=answered,
        secret=secret,
    )


class Clock:
    """Stopping criterion that never stops, and notes how long each step took and whether it evicted a block."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.steps: list[Step] = []
        self.evicted = 0.0
        self.started: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        now = time.perf_counter()
        evicted = evicted_tokens(self.cache)
        if self.started is not None:  # the first token is that of the pass over what is new
            self.steps.append(Step(now - self.started, evicted > self.evicted))
        self.evicted = evicted
        self.started = time.perf_counter()  # what is looked up here is no part of a step
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate(model: Any, tokenizer: Any, cache: Any, ids: torch.Tensor, count: int) -> tuple[str, list[Step]]:
    """Greedy text after ``ids``, most of which the cache has read, and the steps from the first to the last token."""
    clock = Clock(cache)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **takes(model, cache),
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
        stopping_criteria=[clock],
        pad_token_id=tokenizer.eos_token_id,
    )
    text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return " ".join(text.split()), clock.steps


def question_ids(tokenizer: Any, question: str) -> torch.Tensor:
    """The question as a turn of the model's chat template, or plainly where it has none."""
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
    else:
        text = f"\n\nQuestion: {question}\nAnswer:"
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return ids


def table_of(readings: list[Reading], title: str) -> Table:
    """Numbers side by side."""
    table = Table(
        title=escape(title), title_style="bold", header_style="bold", box=SIMPLE_HEAD, padding=0, show_edge=False
    )
    table.add_column("cache")
    for column in ("kept", "MiB", "share", "KL", "top-1", "tokens/s", "flush", "found"):
        table.add_column(column, justify="right", no_wrap=True)
    full = readings[0]
    order = [name for name, _, _ in ROWS]
    for index, x in enumerate(readings):
        # A new section for the full cache's end and for each budget, some of whose corrections may not have fitted.
        if index and (index == 1 or order.index(x.name) <= order.index(readings[index - 1].name)):
            table.add_section()
        exact = x is full
        table.add_row(
            x.name,
            str(x.tokens),
            f"{x.nbytes / 2**20:.{1 if x.nbytes < 1000 * 2**20 else 0}f}",
            "100%" if exact else f"{x.nbytes / full.nbytes:.1%}",
            "0" if exact else f"{x.fidelity.kl:.3f}",
            "100%" if exact else f"{x.fidelity.top1:.0%}",
            f"{1 / x.speed.seconds:.1f}",
            "" if x.speed.flush is None else f"{1000 * x.speed.flush:.0f}",
            "yes" if found(x.secret) else "no",
            style="bold green" if x.name == BEST else "",
        )
    table.caption = (
        "kept: tokens per KV head; MiB: moments counted; share: of the full cache's; KL: in nats, and top-1: the same "
        "most likely token, over the text's own next tokens; tokens/s: of the median step; flush: ms of a step that "
        f"evicts a block; found: {NEEDLE!r} is hidden in the text, and asked for after compression"
    )
    table.caption_justify = "left"
    return table


def found(secret: str) -> bool:
    """Whether the number is in what was written."""
    return SECRET in "".join(secret.split())


def texts_of(readings: list[Reading], question: str) -> Table:
    """What each cache wrote."""
    table = Table(
        title=Text(f"Asked: {question}"), title_style="bold", show_header=False, box=SIMPLE_HEAD, padding=(0, 1)
    )
    table.add_column("what", no_wrap=True, style="bold")
    table.add_column("text", ratio=1, overflow="fold")
    for x in readings:
        table.add_row(x.name, f"{x.tokens} tokens kept per KV head", style="bold")
        for what, text in (("continues", x.continuation), ("answers", x.answer), ("number", x.secret)):
            table.add_row(what, Text(text))
        table.add_section()
    return table


def plot(readings: list[Reading], path: str | Path, title: str) -> Path:
    """KL and speed against bytes."""
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    full = readings[0]
    for name, _, colour in ROWS:
        chosen = [x for x in readings if x.name == name]
        sizes = [x.nbytes / 2**20 for x in chosen]
        left.plot(sizes, [x.fidelity.kl for x in chosen], "o-", color=colour, label=name)
        right.plot(sizes, [1 / x.speed.seconds for x in chosen], "o-", color=colour, label=name)
    right.plot(full.nbytes / 2**20, 1 / full.speed.seconds, "s", color="0.3", label="full cache")
    left.set_ylabel("KL to the full cache, nats")
    left.set_ylim(bottom=0)
    right.set_ylabel("tokens/s of the median step")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xlabel("cache, MiB (moments counted)")
        axis.legend(frameon=False)
    titled(figure, title, size=10)
    return save_figure(figure, path)

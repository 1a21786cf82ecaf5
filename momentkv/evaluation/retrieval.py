"""Asking a compressed cache for the needles of a haystack."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from momentkv.cache.config import wanted_queries
from momentkv.evaluation.capture import CaptureCache, SecondReading, capture_again, read_anew, replay
from momentkv.evaluation.haystack import Answer, Haystack, Question
from momentkv.evaluation.settings import Setting, empty_cache
from momentkv.hf import MomentCache
from momentkv.hf.models import takes
from momentkv.policies import get_policy

__all__ = ["Asked", "Recall", "measure_haystack", "recall"]

# When the question comes, and how the context is compressed.
Cell = tuple[str, Setting]
# Tokens that a generated answer may take beyond the right one.
SLACK = 8


@dataclasses.dataclass(frozen=True)
class Recall:
    """How much of the answer a cache gives back.

    Attributes
    ----------
    values : float
        Fraction of the values whose every token is the top-1 prediction, given the tokens before it.
    tokens : float
        Fraction of the values' tokens that are the top-1 prediction.
    nll : float
        Negative log-likelihood of the values, mean over their tokens, in nats.
    generated : float or None
        Share of the values in what the model writes greedily; None where it was not asked to.
    """

    values: float
    tokens: float
    nll: float
    generated: float | None = None


class Asked(NamedTuple):
    """A question asked of a cache.

    Attributes
    ----------
    cell : (str, Setting) or None
        None for the full cache.
    which : int
        Index of the question in its haystack.
    recall : Recall
    nbytes : int
        Bytes of the cache after what was compressed; of the full one, after the context.
    """

    cell: Cell | None
    which: int
    recall: Recall
    nbytes: int


def recall(logits: torch.Tensor, answer: Answer) -> Recall:
    """Compare logits (tokens, vocabulary) with an answer.

    Examples
    --------
    >>> recall(torch.eye(2), Answer([0, 0], [1, 2], "")).values
    0.5
    """
    tokens = torch.tensor(answer.tokens, device=logits.device)
    counted = torch.tensor(answer.counted, device=logits.device)
    right = logits.argmax(-1) == tokens
    values = [bool(right[counted == which].all()) for which in range(1, max(answer.counted) + 1)]
    nll = torch.nn.functional.cross_entropy(logits[counted > 0].float(), tokens[counted > 0])
    return Recall(sum(values) / len(values), float(right[counted > 0].double().mean()), float(nll))


class Reader:
    """A haystack read once by the full cache, and its questions asked of any cache.

    Parameters
    ----------
    model : PreTrainedModel
    haystack : Haystack
    keep : int or None
        Queries that policies observe; None for all.
    """

    def __init__(self, model: Any, haystack: Haystack, keep: int | None) -> None:
        self.model, self.haystack, self.keep = model, haystack, keep
        self.captured = CaptureCache(model, keep)
        self.context = len(haystack.context)
        model(self.ids(haystack.context), **takes(self.model, self.captured), logits_to_keep=1)
        self.nbytes = self.captured.nbytes
        self.second: dict[Any, dict[int, SecondReading]] = {}
        self.layers = list(self.captured.capture_layers.values())
        self.read = self.captured.held()
        self.queries = [layer.queries for layer in self.layers]

    def ids(self, tokens: list[int]) -> torch.Tensor:
        """Shape (1, tokens)."""
        return torch.tensor([tokens], device=self.model.device)

    def compressed(self, after: Question | None) -> torch.Tensor:
        """Ids of what is compressed: the context, and a question that was seen, all but its last token."""
        return self.ids(self.haystack.context if after is None else [*self.haystack.context, *after.tokens[:-1]])

    def rewind(self) -> CaptureCache:
        """The full cache as it was after the context."""
        self.captured.go_back(self.read)
        return self.captured

    def rewind_to(self, question: Question) -> CaptureCache:
        """The full cache after the context and a question, all but its last token."""
        captured = self.rewind()
        for layer in self.layers:
            layer.keep = None
        self.model(self.ids(question.tokens[:-1]), **takes(self.model, captured), logits_to_keep=1)
        for layer, queries in zip(self.layers, self.queries, strict=True):
            both = torch.cat([x for x in (queries, layer.queries) if x is not None], dim=2)
            layer.queries = both if self.keep is None else both[:, :, -self.keep :]
        return captured

    def read_again(self, tokenizer: Any, after: Question | None = None) -> None:
        """Give the tokens that `rewind` or `rewind_to` brought back the scores of a second reading, once for each."""
        which = None if after is None else tuple(after.tokens)
        self.captured.read_again = self.second.setdefault(which, {})
        capture_again(self.model, self.captured, self.compressed(after), tokenizer)

    def ask(self, fresh: Callable[[], Any], question: Question, fed: list[int]) -> Recall:
        """Feed the rest of a question and each of its answers, in one pass on a fresh cache; the best answer counts."""
        results = []
        for answer in question.answers:
            ids = self.ids([*fed, *answer.tokens])
            logits = self.model(ids[:, :-1], **takes(self.model, fresh()), logits_to_keep=len(answer.tokens)).logits
            results.append(recall(logits[0], answer))
        return max(results, key=lambda result: (result.values, -result.nll))

    def generated(self, cache: Any, question: Question, tokenizer: Any) -> float:
        """Share of the values in what the model writes after the question; the cache is used up."""
        prompt = self.ids([*self.haystack.context, *question.tokens])
        out = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            **takes(self.model, cache),
            max_new_tokens=max(len(answer.tokens) for answer in question.answers) + SLACK,
            do_sample=False,
        )
        written = tokenizer.decode(out[0, prompt.shape[1] :])
        return sum(value in written for value in question.values) / len(question.values)


def evicting_no_more(cache: MomentCache) -> MomentCache:
    """A copy that stores what it reads, up to its rollback, beside the budget."""
    probed = copy.deepcopy(cache)
    probed.activate_past_recording()
    return probed


@torch.inference_mode()
def measure_haystack(
    model: Any,
    haystack: Haystack,
    cells: Iterable[Cell],
    *,
    sinks: int = 1,
    window: int = 32,
    tokenizer: Any = None,
    generate: bool = False,
    segment: int | None = None,
) -> Iterator[Asked]:
    """Ask the full cache and each compressed cache all questions about a haystack.

    Protocol: ``"unseen"`` compresses the context and reads the questions afterwards, each on a copy of the compressed
    cache; ``"seen"`` compresses context and question, all but the last token before the answer. What was not compressed
    and the answer are fed in one pass (nothing more is evicted). Generation evicts as it goes.

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="momentkv"`` and full attention in every layer.
    haystack : Haystack
    cells : iterable of (str, Setting)
        When the question comes, and how to compress.
    sinks, window : int
    tokenizer : PreTrainedTokenizer, optional
        For generated answers, and for policies that look at a second reading: it reads what the model is asked.
    generate : bool
        Whether the model generates the answers, too.
    segment : int, optional
        Read what is compressed so many tokens at a time, each compressed before the next; by default in one piece.

    Yields
    ------
    Asked
        The full cache comes first.
    """
    cells = list(cells)
    reader = Reader(model, haystack, wanted_queries(setting.policy for _, setting in cells))

    def add_generated(result: Recall, cache: Any, question: Question) -> Recall:
        if not generate:
            return result
        return dataclasses.replace(result, generated=reader.generated(cache, question, tokenizer))

    for index, question in enumerate(haystack.questions):
        result = add_generated(reader.ask(reader.rewind, question, question.tokens), reader.rewind(), question)
        yield Asked(None, index, result, reader.nbytes)
    longest = max(len(x.tokens) + len(answer.tokens) for x in haystack.questions for answer in x.answers)
    for cell in cells:
        when, setting = cell
        once = None
        for index, question in enumerate(haystack.questions):
            if when == "seen" or once is None:
                after = None if when == "unseen" else question
                empty = empty_cache(model, setting, sinks=sinks, window=window, rollback=longest)
                if segment is None and not setting.trial:
                    captured = reader.rewind() if after is None else reader.rewind_to(after)
                    if get_policy(setting.policy).rereads:
                        reader.read_again(tokenizer, after)
                    once = replay(captured, empty)
                else:
                    ids = reader.compressed(after)
                    once = read_anew(model, ids, empty, tokenizer, segment=segment, trial=setting.trial)
                nbytes = once.nbytes
            fed = question.tokens if when == "unseen" else question.tokens[-1:]
            result = reader.ask(partial(evicting_no_more, once), question, fed)
            result = add_generated(result, copy.deepcopy(once), question)
            yield Asked(cell, index, result, nbytes)
    reader.rewind()

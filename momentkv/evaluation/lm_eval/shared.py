"""A model of lm_eval that reads a prompt once and answers it with many caches."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch

from momentkv.cache.config import wanted_queries
from momentkv.evaluation.capture import read_anew, replay
from momentkv.evaluation.haystack import Haystack
from momentkv.evaluation.lm_eval.model import MomentLM
from momentkv.evaluation.retrieval import Reader
from momentkv.evaluation.settings import Setting, empty_cache
from momentkv.hf.models import takes
from momentkv.policies import get_policy

__all__ = ["SharedLM"]


class SharedLM(MomentLM):
    """`MomentLM`, one prompt at a time, whose context is read once for all caches and questions that follow.

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="momentkv"`` and full attention in every layer.
    tokenizer : PreTrainedTokenizerFast
    settings : iterable of Setting
        Those that will be asked: their policies say which queries are kept.
    question_marker, context_field : str, optional
        Where the question begins, as for `MomentLM`. With neither the question is seen: all but the prompt's last token
        is compressed.
    max_length : int, optional
        As for ``hf``.

    Attributes
    ----------
    setting : Setting or None
        What answers next; None is the full cache.

    Notes
    -----
    Prefill attends exactly whatever the policy, so one pass over the context serves every cache, see
    `momentkv.evaluation.capture`. Answers are generated, and eviction goes on, 32 tokens at a time.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        settings: Iterable[Setting],
        *,
        question_marker: str | None = None,
        context_field: str | None = None,
        max_length: int | None = None,
    ) -> None:
        seen = question_marker is None and context_field is None
        self.setting: Setting | None = None
        self.keep = wanted_queries(setting.policy for setting in settings)
        self.reader: Reader | None = None
        self.compressed: tuple[Reader, Setting, Any] | None = None
        super().__init__(
            model,
            "full",
            query_aware=seen,
            question_marker=question_marker,
            context_field=context_field,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=1,
        )
        self.full = False  # each of its caches is made from what was read

    def context_of(self, request: Any) -> tuple[int, ...]:
        """Tokens of a request that are compressed; those that share them are best asked one after the other.

        Raises
        ------
        ValueError
            If the question is not found, or the prompt is longer than the model reads.
        """
        self._find_questions([request])
        prompt, generation = request.args
        ids, _ = self.tok_batch_encode([prompt])
        room = self.max_length - int(generation.get("max_gen_toks", self.max_gen_toks))
        if ids.shape[1] > room:
            raise ValueError(
                f"max_length is {self.max_length}, which leaves {room} tokens for prompts, but one of task "
                f"{request.task_name!r} has {ids.shape[1]}; use a larger --max-length, or shorter prompts"
            )
        return tuple(ids[0, : ids.shape[1] - self.questions[0]].tolist())

    def answer(self, request: Any, setting: Setting | None) -> str:
        """What the model writes for a request of lm_eval with a cache."""
        self.setting = setting
        (text,) = self.generate_until([request], disable_tqdm=True)
        return text

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode a prompt, and note how many of its tokens are read after compression."""
        encoded = super().tok_batch_encode(strings, *args, **kwargs)
        if self.query_aware:
            self.questions = [1] * len(strings)
        return encoded

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """Generate with a copy of what the setting left of the context."""
        with torch.no_grad():
            cache = self._cache_after(context[0, : context.shape[1] - self.questions[0]].tolist())
        return super(MomentLM, self)._model_generate(
            context, max_length=max_length, stop=stop, **takes(self.model, cache), **kwargs
        )

    def _cache_after(self, context: list[int]) -> Any:
        if self.reader is None or self.reader.haystack.context != context:
            self.reader = self.compressed = None  # before the next one is read, so that one is held at a time
            self.reader = Reader(self.model, Haystack(context, "", ()), self.keep)
        captured = self.reader.rewind()
        if self.setting is None:
            return captured
        if self.compressed is None or self.compressed[:2] != (self.reader, self.setting):
            cache = empty_cache(self.model, self.setting, block=32)
            if self.setting.trial:
                read_anew(self.model, self.reader.ids(context), cache, self.tokenizer, trial=self.setting.trial)
            else:
                if get_policy(self.setting.policy).rereads:
                    self.reader.read_again(self.tokenizer)
                replay(captured, cache)
            self.compressed = self.reader, self.setting, cache
        return copy.deepcopy(self.compressed[2])

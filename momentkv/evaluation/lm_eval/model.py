"""lm_eval's model ``hf`` with a cache within a budget, and its command line with that model."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"momentkv.evaluation.lm_eval needs lm_eval, and {error.name} is missing; run pip install 'momentkv[lm-eval]'",
        name=error.name,
    ) from error
from tqdm import tqdm

from momentkv.cache.budget_rules import parse_budget
from momentkv.cache.config import EXACT_WINDOW
from momentkv.codes import bits_from_text
from momentkv.evaluation.lm_eval.batches import check_batch
from momentkv.evaluation.lm_eval.questions import question_start, tokens_from
from momentkv.hf import MomentCache
from momentkv.hf.checks import NAME, SHARING
from momentkv.hf.models import takes
from momentkv.policies import get_policy
from momentkv.statistics.corrections import get_correction

__all__ = ["MomentLM", "main"]

Request = tuple[Any, list[int], list[int]]
Answer = tuple[float, bool]


@register_model(NAME)
class MomentLM(HFLM):
    """lm_eval's model ``hf`` with a cache within a budget.

    Parameters
    ----------
    pretrained : str or PreTrainedModel
        As for ``hf``; a model that is loaded already must have ``attn_implementation="momentkv"``.
    budget : int, float, str or "full"
        As `MomentCache` takes it. ``"full"`` is lm_eval's own code with the stock cache, for comparison.
    policy : str
        See `momentkv.policies.POLICIES`.
    correction : {"summaries", "order-1", "order-0", "none"}
        The anchored summaries, the paper's moments, their order 0, or plain eviction.
    sharing : str, optional
    sinks, window, block, bits, exact_window
        As `MomentCache` takes them.
    prefill_chunk : int, optional
        Tokens read at a time; by default all at once.
    query_aware : bool
        Whether the question is compressed with its context.
    question_marker, context_field : str, optional
        With ``query_aware=False``, where the question begins:
        `momentkv.evaluation.lm_eval.questions.question_start`.
    **kwargs
        Everything else that ``hf`` takes.

    Raises
    ------
    ValueError
        If an argument is not one of these, or rows of a batch would not be what they are alone.

    Notes
    -----
    Every prompt gets an empty cache.

    *Generation.* The prompt is read and compressed, then ``generate`` goes on as lm_eval asks. The first new token is
    predicted by the pass that read the prompt's end, before its eviction. With ``query_aware=False`` only what comes
    before the question is compressed; the question is read through the compressed cache, in one pass.

    *Loglikelihood.* The context is read and compressed, all but its last token, or all before its question. The rest of
    it and the continuation are then read in one pass, and nothing is evicted before the end of that pass. Continuations
    of
    one context share its cache. An empty context is lm_eval's prefix token, and nothing is compressed.

    *Rolling loglikelihood.* Each of lm_eval's windows is read ``prefill_chunk`` tokens at a time, each chunk scored
    with the cache that the chunks before it left. Without ``prefill_chunk`` nothing would be evicted, so it is refused.

    See docs/lm-eval.md for commands.
    """

    def __init__(
        self,
        pretrained: Any,
        budget: int | float | str = 512,
        policy: str = "balanced",
        correction: str | None = "summaries",
        sharing: str | None = None,
        sinks: int = 1,
        window: int = 32,
        block: int = 32,
        prefill_chunk: int | None = None,
        query_aware: bool = True,
        question_marker: str | None = None,
        context_field: str | None = None,
        bits: int | str | None = None,
        exact_window: int = EXACT_WINDOW,
        **kwargs: Any,
    ) -> None:
        correction = correction or "none"  # lm_eval reads "none" as None
        get_correction(correction)
        get_policy(policy)
        if sharing is not None and sharing not in SHARING:
            raise ValueError(f"sharing is {sharing!r}; use one of {', '.join(map(repr, SHARING))}")
        self.full = budget == "full"
        if not self.full:
            parse_budget(budget)
        if prefill_chunk is not None and (not isinstance(prefill_chunk, int) or prefill_chunk < 1):
            raise ValueError(f"prefill_chunk is {prefill_chunk!r}; use at least 1 token, or leave it out")
        if not isinstance(query_aware, bool):
            raise ValueError(f"query_aware is {query_aware!r}; use True or False")
        if query_aware and (question_marker is not None or context_field is not None):
            raise ValueError(
                f"question_marker is {question_marker!r} and context_field is {context_field!r}, but with "
                "query_aware=True the whole prompt is compressed; add query_aware=False, or leave them out"
            )
        if not query_aware and (question_marker is None) == (context_field is None):
            raise ValueError(
                f"query_aware is False, question_marker is {question_marker!r} and context_field is "
                f"{context_field!r}; exactly one of them must say where the question begins"
            )
        implementation = kwargs.setdefault("attn_implementation", NAME)
        if implementation != NAME:
            raise ValueError(f"attn_implementation is {implementation!r}, which would ignore the moments; leave it out")
        if not self.full:
            check_batch(kwargs.get("batch_size", 1), budget, sharing, prefill_chunk)
        self.budget, self.prefill_chunk, self.query_aware = budget, prefill_chunk, query_aware
        self.question_marker, self.context_field = question_marker, context_field
        self.settings: dict[str, Any] = {
            "policy": policy,
            "correction": correction,
            "sharing": sharing,
            "sinks": sinks,
            "window": window,
            "block": block,
            "bits": None if bits is None else bits_from_text(str(bits)),
            "exact_window": exact_window,
        }
        # Where the question of a prompt begins, and how many tokens the questions of the present batch have.
        self.starts: dict[str, int] = {}
        self.questions: list[int] = []
        super().__init__(pretrained, **kwargs)
        # lm_eval divides requests among processes that have a GPU each; on CPUs they would all do everything.
        if self.world_size == 1 and hasattr(self, "accelerator") and self.device.type == "cpu":
            self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if not self.full:
            self.new_cache()  # an unsupported model or budget is refused before anything is read

    def new_cache(self) -> MomentCache:
        """An empty cache, as every prompt gets one."""
        return MomentCache(self.model, self.budget, **self.settings)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generate for each request of lm_eval."""
        self._find_questions(requests)
        return list(super().generate_until(requests, disable_tqdm=disable_tqdm))

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Answer]:
        """Score the continuation of each request of lm_eval."""
        self._find_questions(requests)
        return list(super().loglikelihood(requests, disable_tqdm=disable_tqdm))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Score whole texts, in chunks of ``prefill_chunk`` tokens."""
        if not self.full and self.prefill_chunk is None:
            raise ValueError(
                f"prefill_chunk is None, but task {task_of(requests)!r} scores whole texts "
                "(loglikelihood_rolling): nothing would be evicted before the end; set prefill_chunk"
            )
        return list(super().loglikelihood_rolling(requests, disable_tqdm=disable_tqdm))

    def tok_batch_encode(self, strings: list[str], *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the prompts of a batch, and note how many tokens their questions have."""
        starts = [self.starts.get(string) for string in strings]
        self.questions = [
            0 if start is None else tokens_from(self.tokenizer, string, start)
            for string, start in zip(strings, starts, strict=True)
        ]
        ids, mask = super().tok_batch_encode(strings, *args, **kwargs)
        return ids, mask

    def _find_questions(self, requests: list[Any]) -> None:
        """Where the question of each prompt begins; every prompt is looked at before the first is read."""
        self.starts = {}
        if self.query_aware or self.full:
            return
        for request in requests:
            prompt = request.args[0]
            if prompt:
                self.starts[prompt] = question_start(
                    prompt,
                    marker=self.question_marker,
                    field=self.context_field,
                    doc=request.doc,
                    task=str(request.task_name),
                )

    def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **kwargs: Any) -> torch.Tensor:
        """Generate through a new cache; called by ``generate_until`` with a left-padded batch."""
        if self.full:
            return super()._model_generate(context, max_length=max_length, stop=stop, **kwargs)
        mask = kwargs.pop("attention_mask")
        cache = self.new_cache()
        if self.query_aware:
            chunk = {} if self.prefill_chunk is None else {"prefill_chunk_size": self.prefill_chunk}
            return super()._model_generate(
                context,
                max_length=max_length,
                stop=stop,
                attention_mask=mask,
                **takes(self.model, cache),
                **chunk,
                **kwargs,
            )
        rows = [row[row_mask.bool()].tolist() for row, row_mask in zip(context, mask, strict=True)]
        if any(len(row) <= question for row, question in zip(rows, self.questions, strict=True)):
            raise ValueError(
                f"max_length is {self.max_length}: once prompts are cut to it, the question is all that is left of "
                "one; use a larger one"
            )
        before = self._pad([row[:-count] for row, count in zip(rows, self.questions, strict=True)], left=True)
        after = self._pad([row[-count:] for row, count in zip(rows, self.questions, strict=True)], left=True)
        self._read(cache, *before)
        ids, mask = (torch.cat(parts, dim=1) for parts in zip(before, after, strict=True))
        longer = ids.shape[1] - context.shape[1]
        out = super()._model_generate(
            ids, max_length=max_length + longer, stop=stop, attention_mask=mask, **takes(self.model, cache), **kwargs
        )
        return torch.cat([context, out[:, ids.shape[1] :]], dim=1)  # lm_eval cuts off as many tokens as it gave

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[Answer]:
        """Log-likelihood of continuations, and whether each is what greedy decoding gives.

        Requests are a key, the tokens of the context and those of the continuation; without a key they are windows of
        a rolling loglikelihood.
        """
        if self.full:
            return list(super()._loglikelihood_tokens(requests, disable_tqdm=disable_tqdm, override_bs=override_bs))
        answers: list[Answer | None] = [None] * len(requests)
        groups: dict[tuple[int, ...], list[int]] = {}
        rests = []
        for index, request in enumerate(requests):
            prefix, rest = self._split(request)
            groups.setdefault(tuple(prefix), []).append(index)
            rests.append(rest)
        # Rows of the batches: a prefix, and the requests that share it. What has none shares nothing.
        alone: list[tuple[list[int], list[int]]] = [([], [index]) for index in groups.pop((), [])]
        # Longest first, so that what does not fit into memory fails at once.
        rows = [(list(prefix), groups[prefix]) for prefix in sorted(groups, key=len, reverse=True)]
        size = override_bs or int(self.batch_size)
        bar = tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests")
        for kind in (rows, alone):
            for at in range(0, len(kind), size):
                for chosen, scored in self._score_batch(kind[at : at + size], rests, requests):
                    for index, answer in zip(chosen, scored, strict=True):
                        answers[index] = answer
                        if requests[index][0] is not None:
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                        bar.update(1)
        bar.close()
        return [answer for answer in answers if answer is not None]

    def _split(self, request: Request) -> tuple[list[int], list[int]]:
        """Tokens of a request that are compressed first, and those that are read in the pass that scores it."""
        key, context, continuation = request
        if not context or not 0 < len(continuation) <= self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens after {len(context)} cannot be scored with "
                f"max_length={self.max_length}; both need a token, and the continuation must fit"
            )
        kept = context[max(0, len(context) + len(continuation) - self.max_length - 1) :]
        inputs = (kept + continuation)[:-1]
        if key is None:
            return [], inputs
        # At least one token of the context is read again with the continuation: it predicts the first of it.
        held = 1
        start = self.starts.get(key[0])
        if start is not None:
            held = tokens_from(self.tokenizer, key[0].rstrip(), start)  # trailing spaces are in the continuation
        read = max(0, len(kept) - max(1, held))
        return inputs[:read], inputs[read:]

    def _score_batch(
        self, rows: list[tuple[list[int], list[int]]], rests: list[list[int]], requests: Sequence[Request]
    ) -> Iterator[tuple[list[int], list[Answer]]]:
        """Read the prefixes of rows once, then score their requests, one of every row at a time."""
        cache = self.new_cache()
        ids, mask = self._pad([prefix for prefix, _ in rows], left=True)
        if ids.shape[1]:
            self._read(cache, ids, mask)
        turns = max(len(members) for _, members in rows)
        for turn in range(turns):
            here = [row for row, (_, members) in enumerate(rows) if turn < len(members)]
            own = cache if turn == turns - 1 else copy.deepcopy(cache)
            if len(here) < len(rows):
                own.batch_select_indices(torch.tensor(here, device=self.device))
            chosen = [rows[row][1][turn] for row in here]
            yield chosen, self._score(own, mask[here], chosen, rests, requests)

    def _score(
        self,
        cache: MomentCache,
        mask: torch.Tensor,
        chosen: list[int],
        rests: list[list[int]],
        requests: Sequence[Request],
    ) -> list[Answer]:
        """Read what is left of each request, and score its continuation."""
        ids, rest_mask = self._pad([rests[index] for index in chosen], left=False)
        whole = torch.cat([mask, rest_mask], dim=1)
        rolling = requests[chosen[0]][0] is None
        logits = self._read(cache, ids, whole, chunk=self.prefill_chunk if rolling else None, all_logits=True)
        answers = []
        for row, index in enumerate(chosen):
            continuation = torch.tensor(requests[index][2], device=logits.device)
            end = len(rests[index])
            own = torch.log_softmax(logits[row, end - len(continuation) : end], dim=-1, dtype=self.softmax_dtype)
            likely = own.gather(-1, continuation[:, None])
            answers.append((float(likely.sum()), bool((own.argmax(-1) == continuation).all())))
        return answers

    def _read(
        self,
        cache: MomentCache,
        ids: torch.Tensor,
        mask: torch.Tensor,
        *,
        chunk: int | None = None,
        all_logits: bool = False,
    ) -> torch.Tensor:
        """Read the last tokens of a batch into a cache; the mask covers what it has read before, too."""
        size = chunk if all_logits else self.prefill_chunk
        before, new = mask.shape[1] - ids.shape[1], ids.shape[1]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, before:]
        logits = []
        for at in range(0, new, size or new):
            end = min(at + (size or new), new)
            with (
                torch.no_grad(),
                torch.autocast(
                    device_type=self.device.type,
                    dtype=self.mixed_precision_dtype,
                    enabled=self.mixed_precision_dtype is not None,
                ),
            ):
                out = self.model(
                    ids[:, at:end],
                    attention_mask=mask[:, : before + end],
                    position_ids=positions[:, at:end],
                    **takes(self.model, cache),
                    use_cache=True,
                    logits_to_keep=0 if all_logits else 1,  # 0 keeps all
                )
            logits.append(out.logits)
        return torch.cat(logits, dim=1)

    def _pad(self, rows: list[list[int]], *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows as a batch, and its attention mask."""
        longest = max(map(len, rows))
        ids, mask = [], []
        for row in rows:
            pads, ones = [0] * (longest - len(row)), [1] * len(row)
            ids.append(pads + row if left else row + pads)
            mask.append(pads + ones if left else ones + pads)
        shape = (len(rows), longest)
        return (
            torch.tensor(ids, dtype=torch.long, device=self.device).reshape(shape),
            torch.tensor(mask, dtype=torch.long, device=self.device).reshape(shape),
        )


def task_of(requests: list[Any]) -> str:
    """Name of the task that requests are of."""
    return str(requests[0].task_name) if requests else "?"


def main(arguments: Sequence[str] | None = None) -> int:
    """lm_eval's own command line, with the model ``momentkv`` registered; its errors are lm_eval's."""
    saved = sys.argv
    # lm_eval reads sys.argv and inserts the command that is left out there.
    sys.argv = ["lm-eval", *(sys.argv[1:] if arguments is None else arguments)]
    try:
        cli_evaluate()
    finally:
        sys.argv = saved
    return 0

"""Fidelity: how far a compressed cache moves the next-token distributions of a real text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from momentkv.cache.config import EXACT_WINDOW, wanted_queries
from momentkv.evaluation.capture import CaptureCache, capture_again, read_anew, replay, replay_tried
from momentkv.evaluation.errors import head_errors
from momentkv.evaluation.settings import QUARTERS, Setting, empty_cache
from momentkv.evaluation.steps import held_tokens
from momentkv.hf.models import takes
from momentkv.hf.trial import Tried
from momentkv.policies import get_policy

__all__ = ["Fidelity", "compare", "measure"]


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Comparison of two sets of next-token distributions, averaged over positions.

    Attributes
    ----------
    kl : float
        KL(full || compressed) in nats.
    top1 : float
        Share of positions with the same most likely token.
    nll_change : float
        Change of the negative log-likelihood of the text's own next token, in nats.
    head_error, head_error_p90, head_error_p99 : float or None
        Mean and percentiles, over layers, heads and queries, of the relative error of attention's output, each head
        fed from the full cache; None where it was not measured.
    kl_of_quarters : list of float, or None
        KL of each quarter of the positions, where tokens were decoded one by one.
    tried : list of Tried, or None
        What a trial tried.
    kept : int or None
        Tokens of the context that a head holds on average, which in few bits are more than a budget says.
    """

    kl: float
    top1: float
    nll_change: float
    head_error: float | None = None
    head_error_p90: float | None = None
    head_error_p99: float | None = None
    kl_of_quarters: list[float] | None = None
    tried: list[Tried] | None = None
    kept: int | None = None


def compare(full: torch.Tensor, compressed: torch.Tensor, targets: torch.Tensor) -> Fidelity:
    """Compare logits, both (positions, vocabulary), given the true next tokens (positions,).

    Examples
    --------
    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> compare(logits, logits, torch.tensor([1])).kl
    0.0
    """
    log_p, log_q = (torch.log_softmax(x.double(), dim=-1) for x in (full, compressed))
    chosen = targets[:, None]
    return Fidelity(
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        top1=float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()),
        nll_change=float((log_p.gather(-1, chosen) - log_q.gather(-1, chosen)).mean()),
    )


@torch.inference_mode()
def measure(
    model: Any,
    ids: torch.Tensor,
    context: int,
    settings: Iterable[Setting],
    *,
    sinks: int = 1,
    window: int = 32,
    exact_window: int = EXACT_WINDOW,
    errors_every: int = 0,
    block: int | None = None,
    segment: int | None = None,
    tokenizer: Any = None,
) -> Iterator[tuple[Setting, Fidelity, int]]:
    """Compress a context in many ways and compare the next-token distributions over the tokens that follow.

    Protocol: the context is prefilled in one pass and cut to the budget; the following tokens are teacher-forced in
    one pass (each sees the retained tokens, the moments and the following tokens before it; nothing more is evicted).
    With ``block`` they are teacher-forced one by one instead, and after every ``block`` tokens as many are evicted.

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="momentkv"``.
    ids : int tensor, shape (1, context + T + 1)
    context : int
        Tokens to compress; ``T`` predictions are compared.
    settings : iterable of Setting
    sinks, window, exact_window : int
    errors_every : int
        Measure the error of every head at each ``errors_every``-th following token; 0 for none.
    block : int, optional
        Decode, and evict so many tokens at a time.
    segment : int, optional
        Read the context so many tokens at a time, each compressed before the next; by default in one piece. Every
        setting then has a reading of its own.
    tokenizer : PreTrainedTokenizer, optional
        For policies that look at a second reading: it reads what the model is asked.

    Yields
    ------
    setting : Setting
    fidelity : Fidelity
    nbytes : int
        Bytes of the compressed cache after the context.
    """
    if block is not None and block < 1:
        raise ValueError(f"block is {block}; evict at least one token at a time, or leave it out to evict none")
    settings = list(settings)
    ids = ids.to(model.device)
    trial = max((setting.trial for setting in settings), default=0)
    if trial >= context:
        raise ValueError(f"methods have some that try {trial} tokens of a context of {context}; give more context")
    if trial and segment is not None:
        raise ValueError(
            f"methods have some that are tried, and segment is {segment}; read in one piece, or name others"
        )
    wanted = wanted_queries(setting.policy for setting in settings)
    captured = CaptureCache(model, None if wanted is None else wanted + trial)
    expected = model(ids[:, :context], **takes(model, captured), logits_to_keep=max(1, trial)).logits
    held = captured.held()
    if errors_every:
        for layer in captured.capture_layers.values():
            layer.keep = None  # of the following tokens
    following, targets = ids[:, context:-1], ids[0, context + 1 :]
    full = model(following, **takes(model, captured)).logits[0]
    attended = captured.attended()
    captured.go_back(held)  # the reference pass has added its own tokens and queries
    for setting in settings:
        empty = empty_cache(
            model,
            setting,
            sinks=sinks,
            window=window,
            exact_window=exact_window,
            block=block or 1,
            rollback=following.shape[1],
        )
        if segment is None and get_policy(setting.policy).rereads:
            capture_again(model, captured, ids[:, :context], tokenizer, setting.trial)
        if setting.trial:
            cache = replay_tried(model, captured, empty, ids[:, :context], expected[:, -setting.trial :])
        elif segment is None:
            cache = replay(captured, empty)
        else:
            cache = read_anew(model, ids[:, :context], empty, tokenizer, segment=segment)
        nbytes, kept = cache.nbytes, held_tokens(cache)
        percentiles = {}
        if errors_every:
            error = head_errors(attended, cache, context, every=errors_every).corrected
            p90, p99 = np.quantile(error, [0.9, 0.99])
            percentiles = {
                "head_error": float(error.mean()),
                "head_error_p90": float(p90),
                "head_error_p99": float(p99),
            }
        quarters = None
        if block is None:
            # No later token would see what is evicted after these, so that need not be worked out.
            cache.activate_past_recording()
            logits = model(following, **takes(model, cache)).logits[0]
        else:
            steps = [model(following[:, [t]], **takes(model, cache)).logits[0] for t in range(following.shape[1])]
            logits = torch.cat(steps)
            parts = zip(*(x.tensor_split(QUARTERS) for x in (full, logits, targets)), strict=True)
            quarters = [compare(*part).kl for part in parts]
        tried = cache.tried if setting.trial else None
        result = compare(full, logits, targets)
        result = dataclasses.replace(result, kl_of_quarters=quarters, tried=tried, kept=kept, **percentiles)
        yield setting, result, nbytes

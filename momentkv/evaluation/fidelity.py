"""Fidelity: how far a compressed cache moves the next-token distributions of a real text."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from momentkv.evaluation.capture import CaptureCache, replay
from momentkv.hf import MomentCache
from momentkv.policies import Policy, get_policy

__all__ = ["Fidelity", "Setting", "compare", "measure", "settings_grid"]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to compress: policy, tokens retained per KV head, order of the correction (None: plain eviction)."""

    policy: str | Policy
    budget: int
    order: int | None

    @property
    def policy_name(self) -> str:
        """Name of the policy, with its parameters where they are not the default ones."""
        policy = get_policy(self.policy)
        return policy.name if policy == get_policy(policy.name) else repr(policy)

    @property
    def correction(self) -> str:
        """How the correction is called in tables."""
        return "none" if self.order is None else f"order {self.order}"


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
    """

    kl: float
    top1: float
    nll_change: float


def compare(full: torch.Tensor, compressed: torch.Tensor, targets: torch.Tensor) -> Fidelity:
    """Compare logits, both (positions, vocabulary), given the true next tokens (positions,).

    Examples
    --------
    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> compare(logits, logits, torch.tensor([1]))
    Fidelity(kl=0.0, top1=1.0, nll_change=0.0)
    """
    log_p, log_q = (torch.log_softmax(x.double(), dim=-1) for x in (full, compressed))
    chosen = targets[:, None]
    return Fidelity(
        kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        top1=float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()),
        nll_change=float((log_p.gather(-1, chosen) - log_q.gather(-1, chosen)).mean()),
    )


def moment_tokens(model: Any, order: int | None) -> int:
    """Extra tokens per KV head that plain eviction gets for the bytes of the moments, rounded up.

    A token is ``d + dv`` numbers of the cache's dtype; moments are float32: weight, means and, at order 1, ``d * dv``.
    """
    if order is None:
        return 0
    config = model.config.get_text_config(decoder=True)
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 1 + 2 * d + (d * d if order == 1 else 0)
    return math.ceil(4 * numbers / (2 * d * model.dtype.itemsize))


def settings_grid(
    model: Any, policies: Iterable[str | Policy], budgets: Iterable[int], orders: Iterable[int | None]
) -> list[Setting]:
    """All combinations, at equal bytes.

    A budget ``B`` means the bytes of ``B`` tokens per KV head and the moments of order 1; what a correction does not
    use of the moments' bytes is given to it in tokens, so plain eviction gets the most.
    """
    grid = []
    most = moment_tokens(model, 1)
    for budget in budgets:
        for policy in policies:
            grid += [Setting(policy, budget + most - moment_tokens(model, order), order) for order in orders]
    return grid


@torch.inference_mode()
def measure(
    model: Any,
    ids: torch.Tensor,
    context: int,
    settings: Iterable[Setting],
    *,
    sinks: int = 1,
    window: int = 32,
) -> Iterator[tuple[Setting, Fidelity, int]]:
    """Compress a context in many ways and compare the next-token distributions over the tokens that follow.

    Protocol: the context is prefilled in one pass and cut to the budget; the following tokens are teacher-forced in
    one pass (each sees the retained tokens, the moments and the following tokens before it; nothing more is evicted).

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="momentkv"`` and full attention in every layer.
    ids : int tensor, shape (1, context + T + 1)
    context : int
        Tokens to compress; ``T`` predictions are compared.
    settings : iterable of Setting
    sinks, window : int

    Yields
    ------
    setting : Setting
    fidelity : Fidelity
    nbytes : int
        Bytes of the compressed cache after the context.
    """
    settings = list(settings)
    observed = [get_policy(setting.policy).observes for setting in settings]
    keep = None if None in observed else max((count for count in observed if count is not None), default=1)
    ids = ids.to(model.device)
    captured = CaptureCache(model, keep)
    model(ids[:, :context], past_key_values=captured, logits_to_keep=1)
    queries = {index: layer.queries for index, layer in captured.capture_layers.items()}
    following, targets = ids[:, context:-1], ids[0, context + 1 :]
    full = model(following, past_key_values=captured).logits[0]
    # The reference pass has appended its own tokens and queries; take both back.
    for index, layer in captured.capture_layers.items():
        layer.keys, layer.values = layer.keys[:, :, :context], layer.values[:, :, :context]
        layer.queries = queries[index]
    for setting in settings:
        empty = MomentCache(
            model, setting.budget, policy=setting.policy, order=setting.order, sinks=sinks, window=window, block=1
        )
        cache = replay(captured, empty)
        nbytes = cache.nbytes
        logits = model(following, past_key_values=cache).logits[0]
        yield setting, compare(full, logits, targets), nbytes

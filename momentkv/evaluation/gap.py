"""The directional gap of a real model on a real text: eviction error by layer and head, as data and as a plot."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from momentkv.cache.config import wanted_queries
from momentkv.diagnostics import EvictionError
from momentkv.evaluation.capture import CaptureCache, replay
from momentkv.evaluation.errors import head_errors
from momentkv.evaluation.settings import Setting, empty_cache
from momentkv.hf.models import takes
from momentkv.policies import get_policy

__all__ = ["Gap", "measure_gap"]


@dataclasses.dataclass(frozen=True)
class Gap:
    """Eviction error of every layer, query head and following token.

    Attributes
    ----------
    setting : Setting
    layers : list of int
        Indices of the compressed layers.
    errors : EvictionError
        NumPy arrays of shape (layer, q_head, T).
    """

    setting: Setting
    layers: list[int]
    errors: EvictionError

    def summary(self) -> dict[str, Any]:
        """Means over everything, and the mean over queries of each layer and head."""
        return {
            "policy": self.setting.policy_name,
            "budget": self.setting.budget,
            "correction": self.setting.correction,
            "layers": self.layers,
            "mean": {name: float(x.mean()) for name, x in self.errors._asdict().items()},
            "by_layer_and_head": {
                name: np.round(x.mean(axis=-1), 6).tolist() for name, x in self.errors._asdict().items()
            },
        }


@torch.inference_mode()
def measure_gap(
    model: Any, ids: torch.Tensor, context: int, setting: Setting, *, sinks: int = 1, window: int = 32
) -> Gap:
    """Evict after a context and compare attention of the following tokens with exact attention.

    The following tokens come from the full cache, so that each head's error is its own, not that of the layers below.

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="momentkv"``.
    ids : int tensor, shape (1, context + T)
    context : int
    setting : Setting
        Without a correction the paper's moments are measured, since ``plain`` is reported anyway.
    sinks, window : int

    Returns
    -------
    Gap
    """
    ids = ids.to(model.device)
    used = dataclasses.replace(setting, order=1, kind="moments") if setting.order is None else setting
    policy = get_policy(setting.policy)
    captured = CaptureCache(model, wanted_queries([policy]))
    model(ids[:, :context], **takes(model, captured), logits_to_keep=1)
    cache = replay(captured, empty_cache(model, used, sinks=sinks, window=window))
    for layer in captured.capture_layers.values():
        layer.keep = None
    model(ids[:, context:], **takes(model, captured), logits_to_keep=1)
    return Gap(setting, list(cache.moment_layers), head_errors(captured.attended(), cache, context))

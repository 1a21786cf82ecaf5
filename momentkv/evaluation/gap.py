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
from momentkv.policies import get_policy

__all__ = ["Gap", "measure_gap", "plot_gap"]


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
        With ``attn_implementation="momentkv"`` and full attention in every layer.
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
    model(ids[:, :context], past_key_values=captured, logits_to_keep=1)
    cache = replay(captured, empty_cache(model, used, sinks=sinks, window=window))
    for layer in captured.capture_layers.values():
        layer.keep = None
    model(ids[:, context:], past_key_values=captured, logits_to_keep=1)
    return Gap(setting, list(cache.moment_layers), head_errors(captured.attended(), cache, context))


def plot_gap(gap: Gap, *, title: str) -> Any:
    """Draw evicted mass, direction and error against the layer; lines are medians, bands the middle 80 %."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3)
    panels = (
        ("evicted mass  $w_E$", [("evicted_mass", "C0", "")]),
        ("direction  $\\cos(o_E, o_R)$", [("cosine", "C0", "")]),
        ("relative error of the output", [("plain", "C3", "plain eviction"), ("corrected", "C2", "corrected")]),
    )
    for axis, (name, curves) in zip(axes, panels, strict=True):
        for field, colour, label in curves:
            values = getattr(gap.errors, field).reshape(len(gap.layers), -1)
            low, median, high = np.quantile(values, [0.1, 0.5, 0.9], axis=-1)
            axis.fill_between(gap.layers, low, high, color=colour, alpha=0.18, linewidth=0)
            axis.plot(gap.layers, median, color=colour, label=label or None)
        axis.set_title(name)
        axis.set_xlabel("layer")
        axis.margins(x=0)
        if len(curves) > 1:
            axis.legend(frameon=False)
    axes[0].set_ylim(bottom=0)
    axes[1].axhline(0, color="0.6", linewidth=0.8, zorder=0)
    axes[2].set_ylim(bottom=0)
    figure.suptitle(title, fontsize=10)
    return figure

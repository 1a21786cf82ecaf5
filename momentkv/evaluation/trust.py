"""Certified and estimated error against the true one on a real model: ``momentkv evaluate trust``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from momentkv.attention import logits, merge, softmax_state
from momentkv.bounds import output_error, read
from momentkv.cache.config import wanted_queries
from momentkv.correction import correct
from momentkv.evaluation.capture import CaptureCache, replay
from momentkv.evaluation.errors import retained_mask
from momentkv.evaluation.report import environment, save_figure, write_json
from momentkv.evaluation.settings import CHOICES, Setting, empty_cache
from momentkv.evaluation.sources import BUILTIN_MODEL, load_model, load_text, tokenize
from momentkv.policies import get_policy
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.moments import Moments
from momentkv.trust import estimated_error

__all__ = ["TrustPoints", "measure_trust", "plot_trust", "trust"]


@dataclasses.dataclass(frozen=True)
class TrustPoints:
    """Errors relative to the norm of the exact output, arrays of shape (layer, q_head, query).

    Attributes
    ----------
    error, certified, estimated : array
        The true error, the certificate and the estimate.
    deviation : array
        Standard deviation of the logits of the evicted tokens, at most.
    """

    error: np.ndarray[Any, Any]
    certified: np.ndarray[Any, Any]
    estimated: np.ndarray[Any, Any]
    deviation: np.ndarray[Any, Any]

    def summary(self) -> dict[str, Any]:
        """Medians, how often the certificate says anything, violations and rank correlations with the true error."""
        heads = [x.mean(axis=-1).ravel() for x in (self.error, self.certified, self.estimated)]
        return {
            "points": int(self.error.size),
            "violations": int((self.error > self.certified).sum()),
            "median error": float(np.median(self.error)),
            "median certified": float(np.median(self.certified)),
            "median estimated": float(np.median(self.estimated)),
            "median deviation": float(np.median(self.deviation)),
            "share certified below 1": float((self.certified < 1).mean()),
            "rank correlation, estimate": rank_correlation(self.error, self.estimated),
            "rank correlation, certificate": rank_correlation(self.error, self.certified),
            "rank correlation of heads, estimate": rank_correlation(heads[0], heads[2]),
            "rank correlation of heads, certificate": rank_correlation(heads[0], heads[1]),
        }


def rank_correlation(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Spearman's, of all entries; equal ones have the mean of their ranks.

    Examples
    --------
    >>> round(rank_correlation(np.asarray([1.0, 2.0, 3.0]), np.asarray([1.0, 10.0, 5.0])), 6)
    0.5
    """
    from scipy.stats import spearmanr

    return float(spearmanr(a.ravel(), b.ravel()).statistic)


@torch.inference_mode()
def measure_trust(model: Any, ids: torch.Tensor, context: int, setting: Setting, *, every: int = 4) -> TrustPoints:
    """Evict after a context; on the following tokens compare true errors with their certificates and estimates.

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="momentkv"`` and full attention in every layer.
    ids : int tensor, shape (1, context + T)
    context : int
    setting : Setting
    every : int
        Every how many following tokens a query is taken.

    Notes
    -----
    In float64, from keys, values and queries of the full cache, so that the error is the method's alone.
    """
    ids = ids.to(model.device)
    policy = get_policy(setting.policy)
    captured = CaptureCache(model, wanted_queries([policy]))
    model(ids[:, :context], past_key_values=captured, logits_to_keep=1)
    cache = replay(captured, empty_cache(model, setting, sinks=1, window=32))
    for each in captured.capture_layers.values():
        each.keep = None
    model(ids[:, context:], past_key_values=captured, logits_to_keep=1)
    attended, columns = captured.attended(), []
    for index, core in cache.moment_layers.items():
        layer = attended[index]
        length = layer.keys.shape[2]
        tokens = torch.arange(length)
        kept = retained_mask(core.positions, length, context)
        q = layer.queries[:, :, -(length - context) :: every].double()
        expansion, factor = None, 1.0
        if core.config.corrects:
            expansion = core.config.correction.exact.expansion(core.moments.map(torch.Tensor.double))
            factor = core.config.correction.calibration
        columns.append(
            compare(
                q, layer.keys.double(), layer.values.double(), kept, tokens[context::every], tokens, expansion, factor,
                layer.scaling,
            )
        )  # fmt: skip
    return TrustPoints(*(np.stack(x) for x in zip(*columns, strict=True)))


def compare(
    q: Any,
    k: Any,
    v: Any,
    kept: Any,
    queries: Any,
    tokens: Any,
    expansion: Expansion | None,
    factor: float,
    scale: float | None,
) -> list[np.ndarray[Any, Any]]:
    """The four columns of `TrustPoints` for some heads of a layer."""
    products = logits(q, k, scale=scale, mask=tokens[None, :] <= queries[:, None])
    hidden = torch.full_like(products, -torch.inf)
    seen = kept[..., None, None, :]
    retained, _ = softmax_state(torch.where(seen, products, hidden), v)
    evicted, _ = softmax_state(torch.where(seen, hidden, products), v)
    exact = merge(retained, evicted).out
    out = retained.out if expansion is None else correct(retained, q, expansion, scale=scale).out
    evidence = Moments.from_tokens(k, v, mask=~kept, order=2, extent=True)
    certified = output_error(retained, q, evidence, out, scale=scale)
    estimated = estimated_error(retained, q, evidence, scale=scale, calibration=factor)
    deviation = read(q, evidence, scale=scale).deviation.high.reshape(certified.shape)
    size = exact.norm(dim=-1)
    error = (out - exact).norm(dim=-1)
    return [x[0].numpy() for x in (error / size, certified / size, estimated / size, deviation)]


def plot_trust(points: TrustPoints, *, title: str) -> Any:
    """Draw certificate and estimate against the true error, one dot for each query."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    error = points.error.ravel()
    chosen = np.random.default_rng(0).permutation(error.size)[:6000]
    ends = [float(x) for x in np.quantile(error, [0.0005, 0.9995])]
    for axis, (name, values, colour) in zip(
        axes, [("certified (a bound)", points.certified, "C0"), ("estimated (no bound)", points.estimated, "C2")],
        strict=True,
    ):  # fmt: skip
        axis.loglog(error[chosen], values.ravel()[chosen], ".", color=colour, markersize=2, alpha=0.25)
        axis.loglog(ends, ends, color="black", linewidth=0.8)
        axis.set_xlabel("true relative error")
        axis.set_title(name)
    axes[0].set_ylabel("certified or estimated")
    figure.suptitle(title, fontsize=9)
    return figure


def trust(options: argparse.Namespace) -> int:
    """Measure certificates and estimates; write data and a plot, print a summary."""
    console = Console()
    with console.status("loading the model"):
        model, tokenizer = load_model(options.model)
    text = load_text(options.text)[options.skip :]
    ids = tokenize(tokenizer, text, options.context + options.following, name=options.text)
    setting = Setting(options.policy, options.budget, *CHOICES[options.correction])
    with console.status("measuring errors of every layer and head"):
        points = measure_trust(model, ids, options.context, setting)
    name = options.model or BUILTIN_MODEL
    title = (
        f"{name}, {Path(options.text).name}: {options.context} tokens, {setting.policy_name} keeps {setting.budget}, "
        f"{options.correction}"
    )
    summary = points.summary()
    path = write_json(options.output, {"model": name, "title": title, "environment": environment(), **summary})
    plot = save_figure(plot_trust(points, title=title), path.with_suffix(".png"), dpi=110)
    console.print(f"[bold]{title}[/]")
    for key, value in summary.items():
        console.print(f"{key:<42}{value:.4g}" if isinstance(value, float) else f"{key:<42}{value}")
    console.print(f"data: {path}   plot: {plot}", soft_wrap=True)
    return 0

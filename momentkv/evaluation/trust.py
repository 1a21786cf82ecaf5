"""Certified and estimated error against the true one on a real model: ``momentkv evaluate trust``."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from momentkv.attention import group_queries, logits, scale_of, softmax_state
from momentkv.bounds import output_error, read
from momentkv.bounds.rounding import state_error, unit
from momentkv.cache.config import wanted_queries
from momentkv.cache.layer import LayerCache
from momentkv.correction import correct
from momentkv.evaluation.capture import CaptureCache, replay
from momentkv.evaluation.errors import retained_mask
from momentkv.evaluation.report import environment, save_figure, titled, write_json
from momentkv.evaluation.settings import CHOICES, DEFAULT, Setting, check_evicts, empty_cache, setting_of
from momentkv.evaluation.sources import BUILTIN_MODEL, load_model, load_text, tokenize
from momentkv.hf.models import takes
from momentkv.policies import get_policy
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.moments import Moments
from momentkv.trust import Losses, estimated_error, estimated_loss, lost_by_codes

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
    model(ids[:, :context], **takes(model, captured), logits_to_keep=1)
    cache = replay(captured, empty_cache(model, setting, sinks=1, window=32))
    for each in captured.capture_layers.values():
        each.keep = None
    model(ids[:, context:], **takes(model, captured), logits_to_keep=1)
    attended, columns = captured.attended(), []
    for index, core in cache.moment_layers.items():
        layer = attended[index]
        length = layer.keys.shape[2]
        tokens = torch.arange(length)
        kept = retained_mask(core.positions, length, context)
        exact = layer.keys.double(), layer.values.double()
        q = layer.queries[:, :, -(length - context) :: every].double()
        expansion, factor = None, 1.0
        if core.config.corrects:
            expansion = core.config.correction.exact.expansion(core.moments.map(torch.Tensor.double))
            factor = core.config.correction.calibration
        columns.append(
            compare(
                q, *exact, kept, tokens[context::every], tokens, expansion, factor, layer.scaling,
                as_stored(core, *exact),
            )
        )  # fmt: skip
    return TrustPoints(*(np.stack(x) for x in zip(*columns, strict=True)))


def as_stored(core: LayerCache, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Losses] | None:
    """Keys and values with those that a cache keeps in few bits as it reads them, and what these may have lost.

    None where all tokens are as they came.
    """
    positions: Any = core.positions
    losses = core.losses(positions)
    if losses is None:
        return None
    # Slots without a token write behind the last one, which is cut off.
    places = torch.where(positions < 0, k.shape[2], positions).long()

    def placed(x: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        index = places if x.ndim == 3 else places[..., None].expand(own.shape)
        longer = torch.cat([x, x[:, :, :1]], dim=2).scatter(2, index, own.to(x.dtype))
        return longer[:, :, : x.shape[2]]

    none = torch.zeros_like(k[..., 0])
    steps = [placed(none, step) for step in (losses.key_step, losses.value_step)]
    wide = [x.double() for x in losses]
    losses = Losses(*wide[:2], *steps, *wide[4:])
    return placed(k, core.keys), placed(v, core.values), losses


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
    stored: tuple[Any, Any, Losses] | None = None,
) -> list[np.ndarray[Any, Any]]:
    """The four columns of `TrustPoints` for some heads of a layer; ``stored`` is what `as_stored` gives."""
    visible = tokens[None, :] <= queries[:, None]
    products = logits(q, k, scale=scale, mask=visible)
    exact = softmax_state(products, v)[0].out
    read_k, read_v = (k, v) if stored is None else stored[:2]
    retained, weights = softmax_state(logits(q, read_k, scale=scale, mask=visible & kept[..., None, None, :]), read_v)
    out = retained.out if expansion is None else correct(retained, q, expansion, scale=scale).out
    evidence = Moments.from_tokens(k, v, mask=~kept, order=2, extent=True)
    certified = output_error(retained, q, evidence, out, scale=scale)
    estimated = estimated_error(retained, q, evidence, scale=scale, calibration=factor)
    if stored is not None:
        size = torch.where(kept, read_v.norm(dim=-1), 0.0).amax(-1, keepdim=True)
        extent: Any = evidence.extent
        radius = torch.maximum(size, state_error(extent).value_size[..., None])
        queries = scale_of(scale, q.shape[-1]) * group_queries(q, k.shape[1])
        lost = lost_by_codes(stored[2], queries.abs(), radius, unit(k))
        guess = estimated_loss(stored[2], weights, queries, read_v, retained.out)
        certified = certified + lost.reshape(certified.shape)
        estimated = torch.hypot(estimated, guess.reshape(estimated.shape))
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
    titled(figure, title)
    return figure


def setting_asked(options: argparse.Namespace) -> Setting:
    """The method, or else policy and correction, by default those of the library."""
    if options.method is None:
        return Setting(options.policy or DEFAULT.policy, options.budget, *CHOICES[options.correction or "summaries"])
    for name in ("policy", "correction"):
        if getattr(options, name) is not None:
            raise ValueError(
                f"method is {options.method!r}, which says what the {name} is; leave out --{name}, or --method"
            )
    setting = dataclasses.replace(setting_of(options.method), budget=options.budget)
    if get_policy(setting.policy).rereads or setting.trial:
        what = "tries bits" if setting.trial else "looks at a second reading"
        raise ValueError(
            f"method is {options.method!r}, which {what}, but texts are read once here, and compressed once; use "
            "another, default@4 say"
        )
    return setting


def trust(options: argparse.Namespace) -> int:
    """Measure certificates and estimates; write data and a plot, print a summary."""
    setting = setting_asked(options)
    if setting.bits is None:  # else tokens are rounded, whether any goes or not
        check_evicts(options)
    console = Console()
    text = load_text(options.text)[options.skip :]
    with console.status("loading the model"):
        model, tokenizer = load_model(options.model)
    ids = tokenize(tokenizer, text, options.context + options.following, name=options.text)
    with console.status("measuring errors of every layer and head"):
        points = measure_trust(model, ids, options.context, setting)
    name = options.model or BUILTIN_MODEL
    title = (
        f"{name}, {Path(options.text).name}: {options.context} tokens, {setting.policy_name} keeps {setting.budget}, "
        f"{setting.correction}"
    )
    summary = points.summary()
    path = write_json(options.output, {"model": name, "title": title, "environment": environment(), **summary})
    plot = save_figure(plot_trust(points, title=title), path.with_suffix(".png"), dpi=110)
    console.print(title, style="bold", markup=False)
    for key, value in summary.items():
        console.print(f"{key:<42}{value:.4g}" if isinstance(value, float) else f"{key:<42}{value}")
    console.print(f"data: {path}   plot: {plot}", soft_wrap=True, markup=False)
    return 0

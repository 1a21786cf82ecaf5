"""Two heads of a real model, attended exactly and within budgets: the data of docs/explore.md and of a picture.

A context is read with the full cache. For every budget a head's layer is cut by the default policy, and the queries of
the tokens that follow attend to all tokens, to the retained ones alone, and with each correction, in float64.

Run: python docs/figures/heads.py      writes docs/data/heads.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from momentkv import LayerCache, estimate, merge
from momentkv.attention import logits, softmax_state
from momentkv.evaluation.capture import CaptureCache
from momentkv.evaluation.report import environment
from momentkv.evaluation.sources import BUILTIN_MODEL, load_model, load_text, tokenize
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import estimate_summaries

DATA = Path(__file__).parents[1] / "data"
TEXT, CONTEXT, FOLLOWING, WINDOW = "compound", 2048, 32, 32
# Of the heads with at least a tenth of their attention on evicted tokens, those whose evicted output points furthest
# from the retained one (docs/data/gap.json; tests/test_figures.py checks that).
HEADS = ((15, 6), (18, 7))
BUDGETS = (48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
CORRECTIONS = ("order 0", "order 1", "summaries")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=DATA / "heads.json")
    options = parser.parse_args()
    model, tokenizer = load_model()
    ids = tokenize(tokenizer, load_text(TEXT), CONTEXT + FOLLOWING)
    heads = []
    for layer, head in HEADS:
        read = capture(model, ids, layer)
        heads.append({"layer": layer, "head": head, "points": [measure(*read, head, budget) for budget in BUDGETS]})
        show(heads[-1])
    content = {
        "model": BUILTIN_MODEL,
        "text": TEXT,
        "context": CONTEXT,
        "environment": environment(),
        "before": tokenizer.decode(ids[0, CONTEXT - 12 : CONTEXT]),
        "words": [tokenizer.decode(token) for token in ids[0, CONTEXT:]],
        "budgets": list(BUDGETS),
        "corrections": list(CORRECTIONS),
        "heads": heads,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(content, separators=(",", ":"), ensure_ascii=False) + "\n", encoding="utf-8")


def show(head: dict[str, Any]) -> None:
    """Print means over queries."""
    print(f"layer {head['layer']}, head {head['head']}")
    for budget, points in zip(BUDGETS, head["points"], strict=True):
        means = {name: float(np.mean(points["corrected"][name]["error"])) for name in CORRECTIONS}
        shown = "  ".join(f"{name} {error:.3f}" for name, error in means.items())
        print(f"{budget:5d}  mass {np.mean(points['mass']):.3f}  plain {np.mean(points['plain']):.3f}  {shown}")


@torch.inference_mode()
def capture(model: Any, ids: torch.Tensor, layer: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Keys and values of all tokens, and the queries of the context's last tokens and of those that follow."""
    cache = CaptureCache(model, WINDOW)
    model(ids[:, :CONTEXT], past_key_values=cache, logits_to_keep=1)
    observed = cache.attended()[layer].queries
    for each in cache.capture_layers.values():
        each.keep = None
    model(ids[:, CONTEXT:], past_key_values=cache, logits_to_keep=1)
    attended = cache.attended()[layer]
    parts = (attended.keys, attended.values, observed, attended.queries)
    return tuple(x.double().numpy() for x in parts)


def measure(
    k: np.ndarray[Any, Any],
    v: np.ndarray[Any, Any],
    observed: np.ndarray[Any, Any],
    q: np.ndarray[Any, Any],
    head: int,
    budget: int,
) -> dict[str, Any]:
    """Outputs of one head for every following query, as points of the plane that the true ones span."""
    cache = LayerCache(budget, policy="balanced", correction="summaries", block=1)
    cache.append(k[:, :, :CONTEXT], v[:, :, :CONTEXT])
    cache.observe(observed)
    cache.evict()
    tokens = np.arange(k.shape[2])
    kept = np.broadcast_to(tokens >= CONTEXT, k.shape[:3]).copy()
    np.put_along_axis(kept, cache.positions, True, axis=2)
    products = logits(q, k, mask=tokens[None, :] <= tokens[CONTEXT:, None])
    seen = kept[:, :, None, None, :]
    retained, _ = softmax_state(np.where(seen, products, -np.inf), v)
    evicted, _ = softmax_state(np.where(seen, -np.inf, products), v)
    moments = Moments.from_tokens(k, v, mask=~kept)
    estimates = [estimate(q, moments, order=0), estimate(q, moments, order=1), estimate_summaries(q, cache.moments)]
    true = merge(retained, evicted)
    exact, plain, rest = (x.out[0, head] for x in (true, retained, evicted))
    planes = [Plane(*x) for x in zip(exact, plain, strict=True)]
    mass = np.exp(evicted.lse - true.lse)[0, head]
    points: dict[str, Any] = {
        "mass": rounded(mass),
        "plain": [plane.error(x) for plane, x in zip(planes, plain, strict=True)],
        "retained": [plane.project(x) for plane, x in zip(planes, plain, strict=True)],
        "evicted": [plane.project(x) for plane, x in zip(planes, rest, strict=True)],
        "corrected": {},
    }
    for name, guess in zip(CORRECTIONS, estimates, strict=True):
        whole = merge(retained, guess)
        share = np.exp(guess.lse - whole.lse)[0, head]
        points["corrected"][name] = {
            "out": [plane.project(x) for plane, x in zip(planes, whole.out[0, head], strict=True)],
            "mass": rounded(share),
            "error": [plane.error(x) for plane, x in zip(planes, whole.out[0, head], strict=True)],
        }
    return points


class Plane:
    """The plane of the exact and the retained output, in which the evicted one lies, too; the exact one is (1, 0)."""

    def __init__(self, exact: np.ndarray[Any, Any], plain: np.ndarray[Any, Any]) -> None:
        self.exact, self.length = exact, float(np.linalg.norm(exact))
        self.across = exact / self.length
        rest = plain - (plain @ self.across) * self.across
        self.up = rest / np.linalg.norm(rest)

    def project(self, x: np.ndarray[Any, Any]) -> list[float]:
        """Coordinates of the foot of the perpendicular, in units of the exact output's length."""
        return rounded(np.stack([x @ self.across, x @ self.up]) / self.length)

    def error(self, x: np.ndarray[Any, Any]) -> float:
        """Relative error, in all dimensions."""
        return round(float(np.linalg.norm(x - self.exact)) / self.length, 4)


def rounded(x: np.ndarray[Any, Any]) -> list[float]:
    """As a list with four decimals."""
    return [round(float(y), 4) for y in x]


if __name__ == "__main__":
    main()

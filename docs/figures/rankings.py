"""Which ranking serves each KV head best, on two models: the data of a picture in docs/policies.md.

A context is read with the full cache. Each ranking retains as many tokens of every KV head, with summaries of the rest,
and the queries of the tokens that follow attend within that. A head's error is the mean relative error of its outputs.

Run: python docs/figures/rankings.py [--model MODEL [MODEL ...]]      writes docs/data/rankings.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from momentkv.evaluation.capture import CaptureCache, replay, wanted_queries
from momentkv.evaluation.errors import head_errors
from momentkv.evaluation.report import environment
from momentkv.evaluation.settings import empty_cache, setting_of, settings_grid
from momentkv.evaluation.sources import BUILTIN_MODEL, load_model, load_text, tokenize
from momentkv.policies import get_policy

DATA = Path(__file__).parents[1] / "data"
TEXT, CONTEXT, FOLLOWING, EVERY, BUDGET = "typesseq", 2048, 128, 4, 256
RANKINGS = ("expected-attention", "snapkv", "novelty", "balanced")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=[None], help="models of transformers (default: the built-in one)")
    parser.add_argument("--name", nargs="+", help="what a picture calls the models (default: the same)")
    parser.add_argument("--output", type=Path, default=DATA / "rankings.json")
    options = parser.parse_args()
    names = options.name or [name or BUILTIN_MODEL for name in options.model]
    models = [measured(model, name) for model, name in zip(options.model, names, strict=True)]
    content = {
        "text": TEXT, "context": CONTEXT, "following": FOLLOWING, "budget": BUDGET, "rankings": list(RANKINGS),
        "environment": environment(), "models": models,
    }  # fmt: skip
    options.output.write_text(json.dumps(content, separators=(",", ":")) + "\n", encoding="utf-8")


@torch.inference_mode()
def measured(name: str | None, called: str) -> dict[str, Any]:
    """Errors (ranking, layer, KV head) of one model."""
    model, tokenizer = load_model(name)
    ids = tokenize(tokenizer, load_text(TEXT), CONTEXT + FOLLOWING, name=TEXT)
    captured = CaptureCache(model, wanted_queries(get_policy(ranking) for ranking in RANKINGS))
    model(ids[:, :CONTEXT], past_key_values=captured, logits_to_keep=1)
    read = {index: layer.queries for index, layer in captured.capture_layers.items()}
    for layer in captured.capture_layers.values():
        layer.keep = None
    model(ids[:, CONTEXT:], past_key_values=captured, logits_to_keep=1)
    attended = captured.attended()
    for index, layer in captured.capture_layers.items():
        layer.keys, layer.values = layer.keys[:, :, :CONTEXT], layer.values[:, :, :CONTEXT]
        layer.queries = read[index]
    errors = {}
    for ranking in RANKINGS:
        named = setting_of(f"{ranking}/summaries")
        correction = [(named.order, named.kind, named.sharing, None)]
        (setting,) = settings_grid(model, [named.policy], [BUDGET], correction, itemsize=2)
        cache = replay(captured, empty_cache(model, setting))
        error = head_errors(attended, cache, CONTEXT, every=EVERY).corrected.mean(-1)
        heads = model.config.num_key_value_heads
        by_head = error.astype(np.float64).reshape(len(error), heads, -1).mean(-1)
        errors[ranking] = by_head.round(4).tolist()
        print(f"{called}: {ranking:20} mean relative error {by_head.mean():.4f}", flush=True)
    return {"name": called, "errors": errors}


if __name__ == "__main__":
    main()

"""Every mode of `momentkv.hf.MomentCache` on the device, compared with the same on the CPU."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from momentkv.testing.gpu.parts import Row, modules_needed

__all__ = ["MODES", "compared"]

BUDGET, PROMPT, STEPS, ROWS = 96, 300, 72, 2
REHEARSED = 18  # steps of a rehearsal, which compares a model with itself: some evict
# Texts to try: rounding may tip a ranking or a code that is close to a tie, but hardly in each; a fault shows in all.
# Of 4 bits and rows that are padded, it tips some code in two texts of three (weights changed by 1e-7, on a CPU).
TRIES = 8

# Settings of a cache, and how the model is called.
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "padded": {"padded": True},
    "in chunks": {"chunk": 90},
    "static": {"static": True},
    "static, padded": {"static": True, "padded": True},
    "CUDA graphs": {"static": True, "graphs": "steps"},
    "CUDA graphs, of flushes too": {"static": True, "graphs": "steps and flushes"},
    "static, 4 bits": {"static": True, "bits": 4},
    "CUDA graphs, of flushes too, 4 bits": {"static": True, "graphs": "steps and flushes", "bits": 4},
    "the paper's": {"policy": "momentkv", "correction": "moments"},
    "order 0": {"policy": "snapkv", "correction": "moments", "order": 0},
    "plain": {"policy": "snapkv", "order": None},
    "observed": {"policy": "h2o", "correction": "moments"},
    "sharing by layers": {"sharing": "layers"},
    "one budget": {"sharing": "uniform"},
    "statistics in float32": {"statistics_bits": None},
    "4 bits": {"bits": 4},
    "4 bits, padded": {"bits": 4, "padded": True},
    "keys in 4 bits, values in 3": {"bits": (4, 3)},
    "bytes": {"budget": "200 KB"},
    "certified": {"policy": "momentkv", "correction": "moments", "certify": 1},
    "saved": {"through": "files"},
    "moved back and forth": {"through": "devices"},
}


def compared(rehearse: bool) -> Iterator[Row]:
    """For each mode, how far logits of a small model with random weights lie from those of the CPU.

    In float32, in which only rankings close to a tie may differ. A mode that raises does not stop the others.
    """
    modules_needed("transformers", "accelerate")
    from transformers import AutoModelForCausalLM, LlamaConfig

    import momentkv.hf

    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "initializer_range": 0.1}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, **heads, pad_token_id=0)
    on_cpu = AutoModelForCausalLM.from_config(config, attn_implementation=momentkv.hf.NAME).eval()
    there = on_cpu if rehearse else copy.deepcopy(on_cpu).to("cuda")
    fewer = {"steps": REHEARSED} if rehearse else {}
    for name, mode in MODES.items():
        if rehearse and "graphs" in mode:
            continue
        try:
            yield {"mode": name} | nearest(on_cpu, there, mode | fewer)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            yield {"mode": name, "right": False, "why": f"{type(error).__name__}: {error}"[:500]}


def nearest(on_cpu: Any, there: Any, mode: dict[str, Any]) -> Row:
    """The difference on the first text on which it is no more than rounding, else on the last."""
    row: Row = {}
    for seed in range(TRIES):
        exact = logits_of(on_cpu, seed=seed, **{name: x for name, x in mode.items() if name != "graphs"})
        off = float((logits_of(there, seed=seed, **mode) - exact).abs().max())
        largest = float(exact.abs().max())
        row = {"difference": off, "largest": largest, "texts": seed + 1, "right": off <= 1e-3 * largest}
        if row["right"]:
            break
    return row


def logits_of(
    model: Any,
    *,
    seed: int,
    padded: bool = False,
    chunk: int = PROMPT,
    steps: int = STEPS,
    graphs: str = "",
    through: str = "",
    budget: int | str = BUDGET,
    **settings: Any,
) -> torch.Tensor:
    """Logits (rows, steps, vocabulary) of steps whose tokens are given, on the CPU."""
    from momentkv.hf import DecodeGraphs, MomentCache
    from momentkv.hf.models import takes

    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size, (ROWS, PROMPT + steps), generator=rng).to(model.device)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :40] = 0
    cache = MomentCache(model, budget, window=16, block=16, **settings)
    found = []
    with torch.no_grad():
        for start in range(0, PROMPT, chunk):
            stop = min(start + chunk, PROMPT)
            model(ids[:, start:stop], attention_mask=mask[:, :stop], **takes(model, cache))
        cache = passed_through(cache, model, through)
        step: Callable[[torch.Tensor, int], torch.Tensor]
        if graphs:
            replayed = DecodeGraphs(model, cache, capture_flush="flushes" in graphs)

            def step(token: torch.Tensor, stop: int) -> torch.Tensor:
                return replayed(token)
        else:

            def step(token: torch.Tensor, stop: int) -> torch.Tensor:
                logits: torch.Tensor = model(token, attention_mask=mask[:, :stop], **takes(model, cache)).logits
                return logits

        for at in range(PROMPT, PROMPT + steps):
            found.append(step(ids[:, at : at + 1], at + 1).float().cpu().clone())
    return torch.cat(found, dim=1)


def passed_through(cache: Any, model: Any, through: str) -> Any:
    """The cache after it was saved and read, or was on another device."""
    from momentkv.hf import MomentCache

    if through == "files":
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            cache.save(path)
            return MomentCache.load(path, model)
    if through == "devices":
        where = model.device
        for layer in cache.layers:
            layer.to(torch.device("cpu"))
            layer.to(where)
    return cache

"""Families and modes: what is tested with what, as the page docs/support.md shows it.

Write the page: python tests/matrix.py
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from models import FAMILIES, left_padded, prompt, tiny
from sweep import EQUAL, SLIDING, TOLD, read_tables
from transformers import DynamicCache

from momentkv.hf import MomentCache

PAGE = Path(__file__).parents[1] / "docs" / "support.md"
# Caches by name of the model's attention: (model, settings) to a cache.
Make = Callable[[Any], Any]
Result = tuple[torch.Tensor, torch.Tensor]


def generate(model: Any, cache: Any, ids: torch.Tensor, mask: Any = None, new: int = 5, **settings: Any) -> Result:
    """Token ids, and logits of the new ones, shape (row, new token, vocabulary)."""
    torch.manual_seed(0)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **settings},
    )
    return out.sequences, torch.stack(out.logits, dim=1)


def simple(**settings: Any) -> Callable[[Any, Make], Result]:
    return lambda model, make: generate(model, make(model), prompt(2, 40), **settings)


def padded(**settings: Any) -> Callable[[Any, Make], Result]:
    ids, mask = left_padded([prompt(1, 40, seed=1), prompt(1, 27, seed=2)])
    return lambda model, make: generate(model, make(model), ids, mask, **settings)


def guessed(**settings: Any) -> Callable[[Any, Make], Result]:
    ids = torch.cat([prompt(1, 20), prompt(1, 20)], 1)  # something to look up
    return lambda model, make: generate(model, make(model), ids, new=8, **settings)


def assisted(model: Any, make: Make) -> Result:
    return guessed(assistant_model=tiny("qwen2", "sdpa"), num_assistant_tokens=3)(model, make)


def turns(model: Any, make: Make, between: Callable[[Any, Any], Any] = lambda model, cache: cache) -> Result:
    """Two turns with one cache, and what happens to it between them."""
    ids, mask = left_padded([prompt(1, 40, seed=1), prompt(1, 27, seed=2)])
    cache = make(model)
    ids, first = generate(model, cache, ids, mask)
    ids = torch.cat([ids, prompt(2, 9, seed=3)], 1)
    mask = torch.nn.functional.pad(mask, (0, ids.shape[1] - mask.shape[1]), value=1)
    ids, second = generate(model, between(model, cache), ids, mask)
    return ids, torch.cat([first, second], 1)


def reread(model: Any, cache: Any) -> Any:
    """Through a file, where the cache has one."""
    if not isinstance(cache, MomentCache):
        return copy.deepcopy(cache)
    with tempfile.TemporaryDirectory() as folder:
        cache.save(Path(folder) / "cache")
        return MomentCache.load(Path(folder) / "cache", model)


def moved(model: Any, make: Make) -> Result:
    """Rows reordered, repeated and selected."""
    ids, mask = left_padded([prompt(1, 40, seed=1), prompt(1, 27, seed=2)])
    cache = make(model)
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        first = model(ids, attention_mask=mask, position_ids=places, past_key_values=cache).logits[:, -1:]
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    ids, mask = (
        torch.cat([ids, prompt(2, 5, seed=3)], 1),
        torch.nn.functional.pad(mask.flip(0)[[1, 0]], (0, 5), value=1),
    )
    ids, logits = generate(model, cache, ids, mask)
    return ids, torch.cat([first, logits], 1)


def in_dtype(dtype: str) -> Callable[[Any, Make], Result]:
    def run(model: Any, make: Make) -> Result:
        model = copy.deepcopy(model).to(getattr(torch, dtype))
        ids, logits = simple()(model, make)
        # Half-precision roundings decide near ties: only what the same tokens led to is compared.
        return ids[:, :41], logits[:, :1].float()

    return run


MODES: dict[str, Callable[[Any, Make], Result]] = {
    "greedy": simple(),
    "sampled": simple(do_sample=True, temperature=1.5),
    "prefill in chunks": simple(prefill_chunk_size=7),
    "padded batch": padded(),
    "beams": simple(num_beams=3),
    "padded beams": padded(num_beams=2),
    "assisted": assisted,
    "prompt lookup": guessed(prompt_lookup_num_tokens=3, max_matching_ngram_size=1),
    "several turns": turns,
    "copied between turns": lambda model, make: turns(model, make, lambda _, cache: copy.deepcopy(cache)),
    "saved between turns": lambda model, make: turns(model, make, reread),
    "rows moved": moved,
    "bfloat16": in_dtype("bfloat16"),
    "float16": in_dtype("float16"),
}
# Roundings that are not float32's, as shares of the largest logit.
TOLERANCES = {"bfloat16": 2**-5, "float16": 2**-8}
TITLES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "mistral sliding": "Mistral, sliding window",
    "gemma3": "Gemma 3, hybrid",
    "gemma3 full": "Gemma 3, full attention only",
    "phi3": "Phi-3",
}


def stock(model: Any) -> DynamicCache:
    """The cache that nothing is evicted from."""
    return DynamicCache(config=model.config)


def types() -> list[str]:
    """The part of the page about every model type, from the tables that the sweep wrote."""
    version, outcomes = list(read_tables().items())[-1]
    by_outcome: dict[str, list[str]] = {}
    for kind, said in outcomes.items():
        by_outcome.setdefault(said, []).append(f"`{kind}`")
    equal = by_outcome.pop(EQUAL)
    groups = sorted(by_outcome.items(), key=lambda group: (group[0].startswith("not tried"), -len(group[1]), group[0]))
    return [
        "## Every model type { #types }",
        "",
        f"transformers {version} knows {len(outcomes)} causal and image-text model types. Each was tried as a tiny",
        "model with random weights (`tests/test_hf_sweep.py`; image-text models with text alone). For these",
        f"{len(equal)}, the logits of a prompt, a chunk and a token, with padding and without, equal those of the",
        "model's own attention with its own cache, to rounding:",
        "",
        ", ".join(equal) + ".",
        "",
        "Each comparison tells right attention from wrong. Weights that are equal for all tokens, a mask that hides",
        f"nothing, and another first token change the logits by more than {100 * TOLD:.1f} % of the largest, 50 times",
        "what rounding is granted. With each of these types, `generate` refuses a history that is no longer than",
        "what the cache has read.",
        "",
        "The others are in the table below, with the reason. Unless it says something else, a cache for such a model",
        "raises an error that names the reason, when the cache is made or in the first pass. If transformers can use",
        'the model under `attn_implementation="momentkv"` with a `DynamicCache`, results equal those of its own',
        "attention.",
        "",
        "| what it is | model types |",
        "|---|---|",
        *(f"| {said} | {', '.join(kinds)} |" for said, kinds in groups),
        "",
        *versions(),
    ]


def versions() -> list[str]:
    """The part of the page about the oldest and the newest transformers."""
    tables = read_tables()
    *_, old, new = tables.values()
    rows = []
    for version, outcomes in tables.items():
        said = list(outcomes.values())
        counts = [said.count(EQUAL), said.count(SLIDING), sum(one.startswith("not tried") for one in said)]
        rows.append(
            f"| {version} | {len(said)} | {counts[0]} | {len(said) - sum(counts)} | {counts[1]} | {counts[2]} |"
        )
    changed = [
        f"| `{kind}` | {old[kind]} | {new[kind]} |" for kind in sorted(old) if new.get(kind, old[kind]) != old[kind]
    ]
    return [
        "### The oldest and the newest transformers { #versions }",
        "",
        "| transformers | types | equal | refused by name | not compressed | not tried |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        "Written by `python tests/sweep.py` under each version, in one process of less than 2 GiB. The types that",
        "both know did the same under both, except:",
        "",
        "| type | " + " | ".join(tables) + " |",
        "|---|---|---|",
        *changed,
        "",
    ]


def page() -> str:
    """docs/support.md."""
    head = "| | " + " | ".join(TITLES[family] for family in FAMILIES) + " |"
    rows = [f"| {mode} |" + " ✓ |" * len(FAMILIES) for mode in MODES]
    return "\n".join(
        [
            "# Supported models { #page-support }",
            "",
            "<!-- Written by tests/matrix.py. -->",
            "",
            "Llama, Qwen, Mistral, Gemma 3, Phi-3 and others work: [all model types](#types) that transformers knows",
            "are listed below. Unsupported models raise an error that says what to do.",
            "",
            "## Families and modes { #modes }",
            "",
            "Each ✓ is tested with a tiny model of random weights, in `tests/test_hf_matrix.py`. With nothing evicted,",
            "tokens and logits equal those of the stock cache under SDPA, to rounding (in half precision, the first",
            "logits). With a small budget, every layer stays within budget and block, and every token is stored or",
            "folded once. Two runs are equal to the last bit (tested with Llama).",
            "",
            head,
            "|---|" + "---|" * len(FAMILIES),
            *rows,
            "",
            "With `static=True` ([static buffers](transformers.md#static)) every mode but assisted decoding and prompt",
            "lookup equals the cache that is not static (`tests/test_hf_static.py`, Llama; greedy, families with full",
            "attention only). Weights of 8 and 4 bits: `tests/test_hf_modes.py`, for each of torchao, quanto and",
            "bitsandbytes that is installed.",
            "",
            *types(),
            "What else raises: [In transformers](transformers.md#raises).",
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

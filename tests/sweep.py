"""Every causal language model that the installed transformers knows, tiny: equal to its own attention, or refused.

Write the table of the installed version: python tests/sweep.py
"""

from __future__ import annotations

import itertools
import json
import re
import resource
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from sweep_sizes import ENCODER, EXTRA, LEFT, SIZES, TEXTS, UNTRIED, VOCABULARY
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from wrong_attention import WRONG

from momentkv.hf import MomentCache

TEXT = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
IMAGE = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(TEXT))
KINDS = TEXT + IMAGE
# What each type did, by version of transformers.
TABLE = Path(__file__).with_suffix(".json")

ROWS, CUTS, PADS = 2, (0, 24, 31, 32), 5
BUDGET = 256  # more than is read
# Of the largest logit; rounding of two layers in float32, as in test_hf.
FLOAT32 = 2e-5
# What wrong attention changes at least, as a share of the largest logit.
TOLD = 50 * FLOAT32
EQUAL, SLIDING = "equal", "not refused: all its layers have sliding windows, and nothing is compressed"
ALONE = "not tried: it has no configuration by itself"
# The error of a type that transformers cannot make, or that reads no text alone.
UNMADE = (ImportError, AttributeError, TypeError, ValueError, IndexError, KeyError, StrictDataclassError)
UNREAD = (*UNMADE, RuntimeError, AssertionError)


def named(known: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """Those of the settings that a configuration has, with one number for each."""
    fields = type(known).__dataclass_fields__
    own = {name: size for name, size in sizes.items() if name in fields or name in known.attribute_map}
    if not vars(known).get("sliding_window"):
        own.pop("sliding_window", None)
    return {name: size for name, size in own.items() if not isinstance(vars(known).get(name), list | tuple)}


def settings(known: Any) -> dict[str, Any]:
    """What makes a model of a configuration tiny."""
    given = named(known, SIZES)
    for name in known.sub_configs:
        part = getattr(known, name, None)
        if not hasattr(type(part), "__dataclass_fields__"):
            continue
        is_text = any(word in name for word in TEXTS)
        own = settings(part) if is_text else named(part, ENCODER) | EXTRA.get(part.model_type, {})
        given[name] = {"model_type": part.model_type, **own}
    given |= EXTRA.get(known.model_type, {})
    return {name: value for name, value in given.items() if value is not LEFT}


def config(kind: str, implementation: Any = None) -> Any:
    """The configuration of a tiny model."""
    made = CONFIG_MAPPING[kind]
    return made(**settings(made()), attn_implementation=implementation)


def build(kind: str, implementation: Any = None) -> Any:
    """A tiny model; its weights do not depend on the implementation of attention."""
    auto = AutoModelForCausalLM if kind in TEXT else AutoModelForImageTextToText
    made = config(kind)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = auto.from_config(made, dtype=torch.float32, attn_implementation=implementation)
    return model.eval()


def build_with(kind: str, name: str) -> Any:
    """A tiny model with attention of that name, if only in its text, or with its own if that cannot be."""
    choices = [name] if kind in TEXT else [name, {"text_config": name}]
    for implementation in choices:
        try:
            return build(kind, implementation)
        except KeyError:  # the type, or its encoder, has a table of implementations of its own
            continue
    return build(kind)


def tokens() -> torch.Tensor:
    """What all models read."""
    return torch.randint(2, VOCABULARY, (ROWS, CUTS[-1]), generator=torch.Generator().manual_seed(0))


def logits(model: Any, cache: Any, *, padded: bool = False, first: int | None = None) -> torch.Tensor:
    """Of a prompt, a chunk and a token: all that are of tokens, (n, vocabulary).

    With ``padded`` the first row is shorter; ``first`` stands in place of the first token.
    """
    ids = tokens()
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :PADS] = 0
    if first is not None:
        ids[:, 0] = first
    out = []
    with torch.no_grad():
        for start, stop in itertools.pairwise(CUTS):
            masked = {"attention_mask": mask[:, :stop]} if padded else {}
            result = model(ids[:, start:stop], past_key_values=cache, use_cache=True, **masked)
            out.append(result.logits[:, start - stop :])
    return torch.cat(out, 1)[mask.bool()]


def refusal(error: Exception) -> str:
    """What an error of momentkv says that names the remedy; any other error is raised again."""
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    if "momentkv/hf/" not in where or "DynamicCache" not in str(error):
        raise error
    return shortened(str(error))


def shortened(message: str) -> str:
    """The feature that a refusal names, without the model's own names."""
    for pattern, text in {
        r"; use a DynamicCache.*": "",
        r"model type '[^']*' is not supported: ": "",
        r"layer \d+ of this \w+ model is of type ('\w+').*": r"it has layers of type \1",
        r"^\w+ changes the": "it changes the",
        r"passes end without layer \d+.*": "it has layers that store no tokens, and its configuration does not say so",
        r", where MomentCache attends.*": "",
        r"(\w+) was passed to attention: (.*) is not supported by MomentCache": r"it passes \1 to attention: \2",
        r"is_causal=False.*": "it is not causal (is_causal)",
        r"attention_mask has 4 dimensions;.*": "its masks are not causal with padding alone",
    }.items():
        message = re.sub(pattern, text, message)
    return message


def tried(model: Any) -> tuple[str, list[torch.Tensor]]:
    """What a model does with a `MomentCache`: why it is refused, or its logits without and with padding."""
    try:
        cache = MomentCache(model, BUDGET)
        found = [logits(model, cache), logits(model, MomentCache(model, BUDGET), padded=True)]
    except (ValueError, RuntimeError) as error:
        return refusal(error), []
    return EQUAL if cache.moment_layers else SLIDING, found


def refuses_short_histories(model: Any) -> bool:
    """Whether ``generate`` refuses what is no longer than what a cache has read; the model may not be used afterwards.

    It keeps what it knows of images in some types.
    """
    cache = MomentCache(model, BUDGET)
    logits(model, cache)
    refused = 0
    for length in (1, CUTS[-1] // 2 + 1, CUTS[-1]):
        try:
            model.generate(tokens()[:, :length], past_key_values=cache, max_new_tokens=1)
        except ValueError as error:
            refused += "at least one new token" in str(error) and cache.get_seq_length() == CUTS[-1]
    return refused == 3


def outcome(kind: str) -> str:
    """Equal, why it is refused, or why it is not tried; a difference raises.

    Under ``attn_implementation="momentkv"`` logits with a `DynamicCache` must equal the model's own too: that is what
    refusals lead to.
    """
    if kind in UNTRIED:
        return refused_by_configuration(kind) or f"not tried: {UNTRIED[kind]}"
    try:
        own = build(kind)
    except (
        UNMADE
    ):  # transformers cannot make this model of its configuration, which `MomentCache` may know all the same
        said = refused_by_configuration(kind)
        if said is None:
            raise
        return said
    ours = build_with(kind, "momentkv")
    weights = ours.state_dict()
    for name, x in own.state_dict().items():
        assert torch.equal(x, weights[name]), name
    said, found = tried(ours)
    try:
        expected = both(own)
    except UNREAD as error:
        if found or "allocate memory" in str(error):
            raise
        return said  # the type cannot be used with that cache, either
    results = [found, both(ours)] if found else [both(ours)]
    if not all(agree(result, expected) for result in results):
        # SDPA ignores what some models pass to it, and eager attention is what they mean.
        expected = both(build(kind, "eager"))
    if not all(agree(result, expected) for result in results):
        # Models that go through their layers many times add up what a processor rounds: in float64 nothing is left.
        ours = build_with(kind, "momentkv").double()
        results, expected = [tried(ours)[1], both(ours)] if found else [both(ours)], both(build(kind).double())
        for result in results:
            assert agree(result, expected), (
                f"{kind}: logits differ by {difference(result, expected):.1e} of the largest"
            )
    if said == EQUAL:
        check_told(kind, own, expected)
        assert refuses_short_histories(ours), kind
    return said


def check_told(kind: str, own: Any, expected: list[torch.Tensor]) -> None:
    """Raise unless what was compared tells right attention from wrong."""
    largest = expected[0].abs().max()
    # The last logits know of the first token.
    other = logits(own, DynamicCache(config=own.config), first=7)
    assert (other[-1] - expected[0][-1]).abs().max() > TOLD * largest, kind
    # Where attention looks, and what it must not see, matters.
    for name in WRONG:
        model = build_with(kind, name)
        assert difference([logits(model, DynamicCache(config=model.config))], expected[:1]) > TOLD, (kind, name)
    # And so does padding.
    shown, hidden = expected[0][PADS : CUTS[-1]], expected[1][: CUTS[-1] - PADS]
    assert (shown - hidden).abs().max() > TOLD * largest, kind


def refused_by_configuration(kind: str) -> str | None:
    """Why a type is refused by its default configuration alone."""
    try:
        made = CONFIG_MAPPING[kind](attn_implementation="momentkv")
    except UNMADE:
        return None if kind in UNTRIED else ALONE
    try:
        MomentCache(made, BUDGET)
    except ValueError as error:
        return refusal(error)
    return None


def both(model: Any) -> list[torch.Tensor]:
    """Logits with a stock cache, without and with padding."""
    return [logits(model, DynamicCache(config=model.config), padded=padded) for padded in (False, True)]


def difference(found: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest, as a share of the largest logit."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def agree(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    """Whether logits are equal to rounding."""
    return difference(found, expected) <= FLOAT32


def read_tables() -> dict[str, dict[str, str]]:
    """The outcome of each type, by version of transformers, the oldest first."""
    tables: dict[str, dict[str, str]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return dict(sorted(tables.items(), key=lambda table: [int(part) for part in table[0].split(".")]))


if __name__ == "__main__":
    outcomes = {}
    for kind in KINDS:
        print(kind, flush=True)
        outcomes[kind] = outcome(kind)
    tables = read_tables() | {transformers.__version__: outcomes}
    TABLE.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{len(outcomes)} types with transformers {transformers.__version__}, {peak:.1f} GiB at most")

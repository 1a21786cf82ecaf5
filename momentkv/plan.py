"""How much memory a cache takes: what `momentkv plan` prints, from a model's shape alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from momentkv.cache.accounting import state_bytes, token_equivalents
from momentkv.policies import Policy, check_budget, get_policy
from momentkv.statistics.corrections import Correction, get_correction

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "DTYPES",
    "KNOWN",
    "Plan",
    "Shape",
    "find_shape",
    "plan",
    "shape_from_config",
    "table_of",
]

# Bytes of one number of keys and values, by the name of its type.
DTYPES = {"bfloat16": 2, "float16": 2, "float32": 4}
POSITION_BYTES = SCORE_BYTES = 4
SLIDING = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
# What tells of models whose caches have another shape, or that momentkv cannot correct.
REFUSED = {
    "kv_lora_rank": "multi-head latent attention",
    "num_kv_shared_layers": "layers that share caches",
    "global_head_dim": "layers of different head dimensions",
    "is_encoder_decoder": "an encoder-decoder",
    "attn_logit_softcapping": "soft-capped logits",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """What of a model's shape decides the size of its cache.

    Attributes
    ----------
    layers, kv_heads, q_heads, head_dim : int
    full_layers : int, optional
        Layers of full attention, all by default. Only these get a budget.
    sliding_window : int
        Length of the other layers' windows, 0 where there are none.

    Raises
    ------
    ValueError
        If the numbers do not fit each other.

    Examples
    --------
    >>> KNOWN["SmolLM2-135M"].full_layers
    30
    """

    layers: int
    kv_heads: int
    q_heads: int
    head_dim: int
    full_layers: int = -1
    sliding_window: int = 0

    def __post_init__(self) -> None:
        if self.full_layers == -1:
            object.__setattr__(self, "full_layers", self.layers)
        for name in ("layers", "kv_heads", "q_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; use at least 1")
        if self.q_heads % self.kv_heads:
            raise ValueError(f"q_heads is {self.q_heads}; use a multiple of kv_heads, which is {self.kv_heads}")
        if not 0 <= self.full_layers <= self.layers:
            raise ValueError(f"full_layers is {self.full_layers}; use 0 to {self.layers}, the number of layers")
        if self.full_layers < self.layers and self.sliding_window < 1:
            raise ValueError(
                f"sliding_window is {self.sliding_window}, but {self.layers - self.full_layers} layers are not of full "
                "attention; give the length of their window"
            )


KNOWN = {
    "Llama-3.1-8B": Shape(layers=32, kv_heads=8, q_heads=32, head_dim=128),
    "Qwen3-4B": Shape(layers=36, kv_heads=8, q_heads=32, head_dim=128),
    "SmolLM2-135M": Shape(layers=30, kv_heads=3, q_heads=9, head_dim=64),
}
# Hugging Face ids of each: owner, other names of the same, and what may follow the name.
IDS = {
    "Llama-3.1-8B": ("meta-llama", ("Meta-Llama-3.1-8B",), ("", "-Instruct")),
    "Qwen3-4B": ("Qwen", (), ("", "-Base", "-Instruct-2507", "-Thinking-2507")),
    "SmolLM2-135M": ("HuggingFaceTB", (), ("", "-Instruct")),
}
NAMES = {
    f"{prefix}{name}{suffix}".lower(): known
    for known, (owner, others, suffixes) in IDS.items()
    for prefix in ("", f"{owner}/")
    for name in (known, *others)
    for suffix in suffixes
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes of a cache at its fullest, over all layers and rows, by what they hold.

    Attributes
    ----------
    shape : Shape
    context, budget, batch : int
    dtype : str
    correction : str
    retained, waiting : int
        Tokens a KV head: within the budget, and appended since the last eviction.
    full : int
        Of the cache that evicts nothing.
    retained_bytes, waiting_bytes : int
        Of keys and values.
    bookkeeping_bytes : int
        Of the stored tokens' positions and scores.
    state_bytes, query_bytes : int
        Of what stands for evicted tokens, and of the statistics of recent queries that it, or the policy, needs.
    sliding_bytes : int
        Of layers with a window of their own, which are left as they are.
    equivalent_tokens : float
        Tokens that could be retained instead if there were no correction.
    """

    shape: Shape
    context: int
    budget: int
    batch: int
    dtype: str
    correction: str
    retained: int
    waiting: int
    full: int
    retained_bytes: int
    waiting_bytes: int
    bookkeeping_bytes: int
    state_bytes: int
    query_bytes: int
    sliding_bytes: int
    equivalent_tokens: float

    @property
    def total(self) -> int:
        """Bytes of everything that the cache holds."""
        return (
            self.retained_bytes
            + self.waiting_bytes
            + self.bookkeeping_bytes
            + self.state_bytes
            + self.query_bytes
            + self.sliding_bytes
        )

    @property
    def share(self) -> float:
        """Total as a share of the full cache."""
        return self.total / self.full


def plan(
    shape: Shape,
    context: int,
    budget: int,
    *,
    correction: str | Correction = "summaries",
    batch: int = 1,
    dtype: str = "bfloat16",
    policy: str | Policy = "balanced",
    sinks: int = 1,
    window: int = 32,
    block: int = 32,
) -> Plan:
    """Bytes that a cache holds after so many tokens.

    Parameters
    ----------
    shape : Shape
        See `find_shape`.
    context : int
        Tokens read and generated so far.
    budget : int
        Tokens retained per KV head, as `momentkv.cache.layer.LayerCache` takes it: the correction comes on top.
    correction : str or Correction
        As in `momentkv.cache.layer.LayerCache`.
    batch : int
        Rows, each of ``context`` tokens.
    dtype : str
        Of keys and values: a name of `DTYPES`.
    policy, sinks, window, block
        As in `momentkv.cache.layer.LayerCache`; by default the policy of `momentkv.hf.MomentCache`.

    Returns
    -------
    Plan

    Raises
    ------
    ValueError
        If an argument is out of range or names nothing.

    Notes
    -----
    Exact, at the fullest: in the step that fills a block, before it is evicted. Not counted is what is not part of the
    cache: while a prompt is read in one pass, each layer in turn holds all of it until it is cut to the budget.

    Examples
    --------
    >>> small = plan(KNOWN["Llama-3.1-8B"], context=131072, budget=1024)
    >>> small.full / 2**30, f"{small.share:.2%}"
    (16.0, '0.84%')
    """
    if context < 1:
        raise ValueError(f"context is {context}; use at least 1 token")
    if batch < 1:
        raise ValueError(f"batch is {batch}; use at least 1 row")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    if block < 1:
        raise ValueError(f"block is {block}; evict at least one token at a time")
    check_budget(budget, sinks, window)
    kind = get_correction(correction)
    d, itemsize = shape.head_dim, DTYPES[dtype]
    heads = batch * shape.kv_heads * shape.full_layers
    token = 2 * d * itemsize
    retained = min(context, budget)
    waiting = min(context - retained, block)
    score = SCORE_BYTES if get_policy(policy).observes != 0 else 0
    # Transformers' layers with a window keep one token less: the next one makes it full.
    bounded = (
        batch * shape.kv_heads * (shape.layers - shape.full_layers) * min(context, max(shape.sliding_window - 1, 0))
    )
    anchor = 2 * d * 4 if kind.anchored else 0
    queries = 2 * d * 4 if get_policy(policy).needs_queries else anchor
    equivalent = token_equivalents(kind, d=d, itemsize=itemsize)
    return Plan(
        shape=shape,
        context=context,
        budget=budget,
        batch=batch,
        dtype=dtype,
        correction=correction if isinstance(correction, str) else repr(correction),
        retained=retained,
        waiting=waiting,
        full=(heads * context + bounded) * token,
        retained_bytes=heads * retained * token,
        waiting_bytes=heads * waiting * token,
        bookkeeping_bytes=heads * (retained + waiting) * (POSITION_BYTES + score),
        state_bytes=heads * (state_bytes(kind, d=d) - anchor),
        query_bytes=heads * queries,
        sliding_bytes=bounded * token,
        equivalent_tokens=retained + equivalent,
    )


def find_shape(model: str) -> Shape:
    """Shape of a model: from a file or directory, one of the known models, or by transformers.

    Parameters
    ----------
    model : str
        A ``config.json`` or the directory it is in; a name of `KNOWN` or the Hugging Face id of one, in any case; or
        any other Hugging Face id, if transformers is installed.

    Raises
    ------
    ValueError
        If there is no such model, or its cache has another shape than `momentkv.hf.MomentCache` supports.
    ModuleNotFoundError
        If transformers would be needed and is not installed.

    Examples
    --------
    >>> find_shape("qwen/qwen3-4b-instruct-2507") == KNOWN["Qwen3-4B"]
    True
    """
    path = Path(model)
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise ValueError(f"model is {model!r}, a directory without config.json; name one that holds a model")
    if path.is_file():
        return shape_from_config(read_config(path))
    known = NAMES.get(model.lower())
    if known is not None:
        return KNOWN[known]
    if path.suffix == ".json":
        raise ValueError(f"model is {model!r}, but there is no such file; give the path of a config.json")
    remedy = f"use one of {', '.join(KNOWN)}, or the path of a config.json"
    try:
        from transformers import AutoConfig
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"model is {model!r}, which transformers would look up, and it is missing; {remedy}, "
            "or run pip install 'momentkv[hf]'",
            name=error.name,
        ) from error
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"model is {model!r}, and transformers cannot load its configuration; {remedy}") from error
    return shape_from_config(config.get_text_config(decoder=True).to_dict())


def read_config(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}); give the config.json of a model") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; give the config.json of a model")
    return config


def shape_from_config(config: Mapping[str, Any]) -> Shape:
    """Shape by the contents of a ``config.json``; of its ``text_config`` where it has one.

    Raises
    ------
    ValueError
        If an entry is missing, or layers are of a kind that `momentkv.hf.MomentCache` does not support.

    Examples
    --------
    >>> shape_from_config({"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64})
    Shape(layers=2, kv_heads=4, q_heads=4, head_dim=16, full_layers=2, sliding_window=0)
    """
    config = config.get("text_config") or config
    for name, what in REFUSED.items():
        if config.get(name):
            raise ValueError(
                f"{name} is {config[name]} in the configuration: {what} is not supported; try another model"
            )
    layers, q_heads = entry(config, "num_hidden_layers"), entry(config, "num_attention_heads")
    types = layer_types(config, layers)
    for kind in types:
        if kind != "full_attention" and kind not in SLIDING:
            raise ValueError(
                f"layer_types has {kind!r}; use a model of full_attention, {' or '.join(SLIDING)} layers alone"
            )
    windows = {entry(config, SLIDING[kind]) for kind in types if kind in SLIDING}
    if len(windows) > 1:
        raise ValueError(f"the configuration has windows of {sorted(windows)} tokens; use a model with one length")
    return Shape(
        layers=layers,
        kv_heads=config.get("num_key_value_heads") or q_heads,
        q_heads=q_heads,
        head_dim=config.get("head_dim") or entry(config, "hidden_size") // q_heads,
        full_layers=types.count("full_attention"),
        sliding_window=max(windows, default=0),
    )


def entry(config: Mapping[str, Any], name: str) -> int:
    """A number that a configuration must have."""
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(
            f"{name} is {value} in the configuration; it must be a positive integer. If it is left out as a default, "
            "write it down, or give the model's Hugging Face id with transformers installed"
        )
    return value


def layer_types(config: Mapping[str, Any], layers: int) -> list[str]:
    """Type of each layer; where a configuration does not list them, by the rules that transformers goes by."""
    listed = config.get("layer_types")
    if listed is not None:
        if len(listed) != layers:
            raise ValueError(f"layer_types has {len(listed)} entries but num_hidden_layers is {layers}; correct one")
        return list(listed)
    full, sliding, chunked = "full_attention", "sliding_attention", "chunked_attention"
    if config.get("sliding_window") is None or config.get("use_sliding_window") is False:
        return [chunked if config.get("attention_chunk_size") else full] * layers
    if config.get("use_sliding_window"):
        first = config.get("max_window_layers", 28)
        return [sliding if index >= first else full for index in range(layers)]
    every = config.get("sliding_window_pattern", 6 if str(config.get("model_type")).startswith("gemma3") else None)
    return [full if every and (index + 1) % every == 0 else sliding for index in range(layers)]


def table_of(result: Plan, name: str) -> Table:
    """A plan as a table for the terminal (needs rich)."""
    from rich.table import Table

    shape = result.shape
    table = Table(
        title=f"{name}\n{result.context:,} tokens of context, {result.budget:,} retained",
        title_style="bold",
        header_style="bold",
    )
    for column in ("", "tokens/head", "size", "of full"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)

    def row(label: str, tokens: str, number: int, style: str = "") -> None:
        table.add_row(label, tokens, size(number), f"{number / result.full:.2%}", style=style)

    row("full cache", f"{result.context:,}", result.full)
    table.add_section()
    row("retained keys and values", f"{result.retained:,}", result.retained_bytes)
    row("block waiting for eviction", f"{result.waiting:,}", result.waiting_bytes)
    row("positions and scores", "", result.bookkeeping_bytes)
    if result.state_bytes:
        row(f"correction: {result.correction}", "", result.state_bytes)
    if result.query_bytes:
        row("query statistics", "", result.query_bytes)
    if result.sliding_bytes:
        row("sliding-window layers", f"{min(result.context, shape.sliding_window - 1):,}", result.sliding_bytes)
    table.add_section()
    row("total", f"{result.retained + result.waiting:,}", result.total, "bold green")
    of = "" if shape.full_layers == shape.layers else f"{shape.full_layers} of "
    extra = result.equivalent_tokens - result.retained
    lines = [
        f"{of}{shape.layers} layers x {shape.kv_heads} KV heads x {shape.head_dim}, {result.dtype}, "
        f"batch {result.batch}",
        f"{result.total:,} of {result.full:,} bytes: 1 in {result.full / result.total:,.1f}",
        f"the correction costs as much as {extra:.1f} more tokens/head" if extra else "plain eviction, no correction",
    ]
    if result.retained + result.waiting == result.context:
        lines.append("nothing is evicted yet at this context")
    table.caption = "\n".join(lines)
    return table


def size(number: int) -> str:
    """Bytes in binary units, two decimals.

    Examples
    --------
    >>> size(3 * 2**29), size(2**20)
    ('1.50 GiB', '1.00 MiB')
    """
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.2f} MiB"

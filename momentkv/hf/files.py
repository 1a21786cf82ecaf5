"""Caches in files: safetensors with all that is needed to go on, checked before anything is made of it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from momentkv.backends import BACKENDS, get_backend
from momentkv.backends.layout import Layout
from momentkv.cache.layer import LayerCache
from momentkv.cache.second_reading import RereadBudget
from momentkv.cache.shared_budget import LONGER
from momentkv.cache.state import LayerState, below, empty_state
from momentkv.codes import AUTO, pair_of_bits
from momentkv.hf import former
from momentkv.hf.building import layer_windows
from momentkv.hf.checks import check_implementation, records, refuse_architecture, rows_of
from momentkv.hf.former import CacheFileError, statistics
from momentkv.hf.layer import MomentLayer
from momentkv.hf.models import DIMENSIONS, agree, config_of, dtype_of, fingerprint, model_record
from momentkv.hf.owner import Weights, same
from momentkv.hf.storage import KEY, digest, malformed, read, write
from momentkv.policies import POLICIES, Policy
from momentkv.statistics.corrections import CORRECTIONS, Correction, get_correction

__all__ = ["FORMAT", "CacheFileError", "load", "save"]

# Raised by one whenever a file of the version before could no longer be read rightly.
FORMAT = 2
OTHER_WEIGHTS = "{} is a cache of a model with other weights or adapters; load it with the model that read the text"
KINDS = {correction.name: type(correction) for correction in CORRECTIONS.values()}
# What of a layer's state is a number of the host's.
NUMBERS = ("seen", "filled", "padded", "has_evicted")
# Arrays that a state of the same settings may have or not, and their axes.
OPTIONAL = {"clock": 1, "ticks": 2, "early": 2, "query_mean": 3, "query_square": 3, "recent_queries": 4}
OPTIONAL |= dict.fromkeys(("key_mean", "key_deviation", "key_order", "value_deviation"), 3)
OPTIONAL |= dict.fromkeys(("key_loss", "value_loss", "judges"), 4)


def save(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write a `MomentCache`; see `MomentCache.save`."""
    check_settled(cache)
    tensors: dict[str, torch.Tensor] = {}
    layers: list[dict[str, Any]] = []
    cores = cache.moment_layers
    for index, layer in enumerate(cache.layers):
        if index in cores:
            core = cores[index]
            # Layout in memory is part of the state: products over differently laid out arrays may round differently.
            core.map(torch.Tensor.contiguous)
            arrays, held = core.arrays(), {"budgets": core.budgets, "scale": core.scale, "refused": core.refused}
            held["shares_from"] = core.shares_from
            if core.state is not None:
                held |= {name: getattr(core.state, name) for name in NUMBERS}
                held["widths"] = list(core.state.layout.widths)
            if cache.chooses_bits:
                held["bits"] = core.config.bits
            layers.append(held)
        else:
            arrays, seen = {}, 0
            if layer.is_initialized:
                kept = layer.sliding_window - 1  # one that records may hold more
                arrays = {name: getattr(layer, name)[:, :, -kept:] for name in ("keys", "values")}
                seen = layer.cumulative_length
            layers.append({"cumulative_length": seen})
        tensors |= {f"{index}.{name}": x.detach().cpu().contiguous().clone() for name, x in arrays.items()}
    tensors |= cache.padding.tensors() | cache.moved.tensors()
    one = next(iter(cores.values())).config if cores else None
    # The policy as it was given: a trial may have taken another share than it has.
    reread = next((shared for shared in cache.shared_budgets if isinstance(shared, RereadBudget)), None)
    record = {
        "format": FORMAT,
        "model": model_record(cache.config, layer_windows(cache.config)),
        "dtype": cache.dtype,
        "weights": cache.fingerprint,
        "settings": {
            "budget": cache.budget,
            "sharing": cache.sharing,
            "rollback": cache.rollback,
            **cache.protected,
            "average": cache.shared_budgets[0].average if cache.shared_budgets else None,
        },
        "seen": int(cache.get_seq_length()),
        "padding": cache.padding.codes is not None,
        "layers": layers,
    }
    if cores:
        # Of the model that has read the text, which may be another than the cache was made for.
        record["attention"] = cache.owner.weights
        if not cache.owner.is_as_made():
            record |= {"dtype": cache.owner.dtype, "weights": {}}
    adapters = cache.owner.adapters if cores else None
    if adapters:  # of few models; a version without it reads the others
        record["adapters"] = list(adapters)
    if cache.turn is not None:
        record["turn"] = cache.turn
    if one is not None:
        record["settings"] |= {
            "order": one.order,
            "backend": backend_name(one.backend),
            "policy": described(one.policy if reread is None else reread.policy, POLICIES),
            "correction": described(one.correction.exact, KINDS),
        }
        # What few caches have is written for those alone, so that a version without it reads the others.
        bits = AUTO if cache.chooses_bits else one.bits
        exact = None if bits is None else one.exact_window
        beside = next((shared.beside for shared in cache.shared_budgets if shared.beside), None)
        share = None if reread is None or reread.share == reread.policy.share else reread.share
        rare = (
            ("certify", one.certify),
            ("tolerance", one.tolerance),
            ("static", cache.static),
            ("beside", beside),
            ("share", share),
        )
        few = (("bits", bits), ("exact_window", exact), ("statistics_bits", one.statistics_bits))
        for name, value in (*rare, *few):
            if value is not None:
                record["settings"][name] = True if name == "static" else value
    metadata = {KEY: json.dumps(record, sort_keys=True)}
    metadata["digest"] = digest(metadata[KEY], tensors)
    write(Path(path), safetensors.torch.save(tensors, metadata))


def check_settled(cache: Any) -> None:
    """Raise where something waits for another call; a pass that failed half-way leaves no trace in the file."""
    cache.passes.undo()
    check_alike(cache.layers, int(cache.get_seq_length()))
    if any(waits(layer) for layer in cache.layers):
        raise RuntimeError("save: recorded passes wait for crop; call cache.crop(0) first, so that their tokens stay")
    if getattr(cache, "ranks", 1) > 1:
        raise RuntimeError(
            "save: this cache holds one rank's heads of a tensor-parallel model, and files of parts are not supported; "
            "read the text with the model on one device to save it"
        )


def waits(layer: Any) -> bool:
    """Whether a layer keeps recorded tokens that `crop` may take back."""
    if isinstance(layer, MomentLayer):
        return bool(layer.passes)
    return records(layer) and layer.is_initialized and layer.keys.shape[2] >= layer.sliding_window


def load(
    make: Any, path: str | os.PathLike[str], model: Any, *, policy: Policy | None, correction: Correction | None
) -> Any:
    """Read what `save` wrote; see `MomentCache.load`. ``make`` is the class to make."""
    whole = config_of(model)
    config = whole.get_text_config(decoder=True)
    refuse_architecture(config, whole)
    check_implementation(config)
    own = model_record(config, layer_windows(config))
    record, tensors = read(Path(path), (former.FORMAT, FORMAT))
    with malformed(path):
        check_model(record, own, fingerprint(model), dtype_of(model), path)
        # What a file does not say is at full precision.
        settings: dict[str, Any] = {"bits": None, "statistics_bits": None} | dict(record["settings"])
        # Before it was a setting, all of the window was exact.
        settings.setdefault("exact_window", settings.get("window", 0))
        average, beside = settings.pop("average"), whole_number(settings.pop("beside", 0))
        share = settings.pop("share", None)
        made_with = {name: settings[name] for name in ("policy", "correction", "order") if "policy" in settings}
    if made_with:
        order = made_with["order"]
        settings["policy"] = revived(made_with["policy"], POLICIES, policy, "policy", path)
        settings["correction"] = revived(
            made_with["correction"], KINDS, correction, "correction", path, lambda x: get_correction(x, order=order)
        )
    with malformed(path):
        cache = make(model, settings.pop("budget"), **settings)
        for shared in cache.shared_budgets:
            shared.average, shared.beside = average, beside
            if share is not None:
                shared.take_share(share)
        cache.padding.load(tensors, record)
        cache.turn = None if record.get("turn") is None else whole_number(record["turn"])
        if cache.moment_layers and "attention" in record:
            check_attention(record["attention"], cache.owner.weights, path)
            cache.owner.weights = record["attention"]  # all that is known, where it is loaded for a configuration
        if cache.moment_layers and "adapters" in record:
            cache.owner.adapters = tuple(map(str, record["adapters"]))
        for index, (layer, stored) in enumerate(zip(cache.layers, record["layers"], strict=True)):
            arrays = {name.split(".", 1)[1]: x for name, x in tensors.items() if name.split(".", 1)[0] == str(index)}
            if "parts" in stored:
                former.restore(layer.core, stored["parts"], arrays, path)
            elif "budgets" in stored:
                restore(layer.core, stored, arrays, path)
            elif arrays:
                layer.lazy_initialization(arrays["keys"], arrays["values"])
                layer.keys, layer.values = arrays["keys"], arrays["values"]
                layer.cumulative_length = whole_number(stored["cumulative_length"])
        check_alike(cache.layers, record["seen"])
        if not any("shares_from" in stored for stored in record["layers"]):
            for shared in cache.shared_budgets:  # as after a prefill; such files are of before decoding shared
                shared.share_from(LONGER * record["seen"])
    # Last, as it changes the model.
    cache.moved.load(tensors, path)
    if cache.static is not None and all(core.state is not None for core in cache.static.cores):
        cache.static.set()
    return cache


def check_alike(layers: Any, seen: Any) -> None:
    """Raise unless all layers hold the same rows of the same length."""
    lengths, rows = [int(layer.get_seq_length()) for layer in layers], {rows_of(x) for x in layers if x.is_initialized}
    if lengths != [whole_number(seen)] * len(layers) or len(rows) > 1:
        raise ValueError(f"layers have seen {lengths} tokens of {sorted(rows)} rows, the cache {seen}")


def restore(core: LayerCache, held: Mapping[str, Any], arrays: Mapping[str, torch.Tensor], path: Any) -> None:
    """Give a layer's cache the state that a file holds."""
    if held["budgets"] is not None:  # else they are what the cache is made with
        core.budgets = held["budgets"]
    core.scale, core.refused = held["scale"], held["refused"]
    if held.get("shares_from") is not None and core.shares_from is not None:
        core.shares_from = whole_number(held["shares_from"])
    if held.get("bits") is not None:
        core.code(pair_of_bits(held["bits"]))
    if not arrays:
        return
    config = core.config
    evicted, evidence = statistics(config, arrays["recent_keys"], arrays["recent_values"], arrays, "evicted.", path)
    own: dict[str, Any] = {name: x for name, x in arrays.items() if "." not in name}
    layout = Layout(config.sinks, config.recent, tuple(held["widths"]), config.bits)
    numbers = {name: held[name] for name in NUMBERS}
    state = LayerState(**own, **numbers, evicted=evicted, evidence=evidence, layout=layout)
    check_state(core, state)
    # Slots behind the last token may hold one of a step that failed.
    used = below(state.recent_count, layout.recent)
    state = state.changed(recent_positions=torch.where(used, state.recent_positions, -1))
    core.take(state)
    for name, positions in (("positions", state.positions), ("recent_positions", state.recent_positions)):
        if bool(((positions < -1) | (positions >= core.seen)).any()):
            raise ValueError(f"{name} are not all among the {core.seen} of the sequence")


def check_state(core: LayerCache, state: LayerState) -> None:
    """Raise unless arrays and numbers of a state are those of one that a cache of these settings can have."""
    layout, config = state.layout, core.config
    k, v = (x.to("meta") for x in (state.recent_keys, state.recent_values))
    like = empty_state(k, v, evicted=None, layout=layout, observes=config.observes, evidence=None)
    shapes = {name: (tuple(x.shape), x.dtype) for name, x in state.own().items() if name not in OPTIONAL}
    expected = {name: (tuple(x.shape), x.dtype) for name, x in like.own().items()}
    if shapes != expected or k.shape[-3:-1] != (layout.heads, layout.recent):
        raise ValueError(f"arrays are {shapes}, where {expected} would be right")
    for name, axes in OPTIONAL.items():
        x = getattr(state, name)
        if x is not None and (x.ndim != axes or x.shape[0] != k.shape[0]):
            raise ValueError(f"{name} has shape {tuple(x.shape)}")
    order = state.key_order
    if order is not None:
        channels = torch.arange(order.shape[-1], dtype=torch.int64)
        if order.shape[-1] != k.shape[-1] or bool((order.to(torch.int64).sort(-1).values != channels).any()):
            raise ValueError("key_order is no order of the channels of a key")
    if config.certify is not None and state.key_mean is not None and None in (state.key_loss, state.value_loss):
        raise ValueError("what codes have lost is missing, without which nothing is certified")
    if len([whole_number(x) for x in core.budgets or []]) != layout.heads:
        raise ValueError(f"budgets are {core.budgets} of {layout.heads} KV heads")
    if not 0 <= whole_number(state.filled) <= layout.recent:
        raise ValueError(f"filled is {state.filled} of {layout.recent}")
    widths = torch.tensor(layout.widths, dtype=torch.int32)
    for name, counts, most in (("counts", state.counts, widths), ("recent_count", state.recent_count, state.filled)):
        if bool(((counts < 0) | (counts > most)).any()):
            raise ValueError(f"{name} are {counts.tolist()}, more than there are slots")


def whole_number(x: Any) -> int:
    """A number of a record that must be an int."""
    if not isinstance(x, int) or isinstance(x, bool):
        raise TypeError(f"{x!r} is no whole number")
    return x


def described(choice: Any, known: Mapping[str, type[Any]]) -> dict[str, Any]:
    """A policy or correction as JSON: name and parameters, or the name of one that is not momentkv's."""
    if known.get(choice.name) is not type(choice):
        return {"name": choice.name or type(choice).__name__, "own": True}
    return {"name": choice.name, "parameters": dataclasses.asdict(choice)}


def revived(
    record: Mapping[str, Any],
    known: Mapping[str, type[Any]],
    given: Any,
    what: str,
    path: Any,
    used: Callable[[Any], Any] = lambda choice: choice,
) -> Any:
    """The policy or correction that was described; ``used`` makes of a choice what a cache makes of it."""
    with malformed(path):
        name, own = record["name"], record.get("own")
        made = None if own else known[name](**record["parameters"])
    if own:
        if given is None or name not in (given.name, type(given).__name__):
            raise ValueError(
                f"the cache was made with a {what} of your own, {name!r}, which no file can hold; "
                f"pass {what}=, an object like the one it had"
            )
        return given
    if given is not None and used(given) != used(made):
        raise ValueError(f"{what} is {given!r}, but the cache was made with {name!r}; leave {what} out")
    return made


def backend_name(backend: Any) -> str | None:
    """Name of a backend; one that is not momentkv's has no name that could be found again."""
    if backend is None:
        return None
    if backend.name in BACKENDS and type(get_backend(backend.name)) is type(backend):
        name: str = backend.name
        return name
    raise ValueError(f"save: backend {backend!r} is not one of {', '.join(BACKENDS)}; use a cache with one of them")


def check_model(
    record: Mapping[str, Any], own: Mapping[str, Any], weights: Mapping[str, str], dtype: str | None, path: Any
) -> None:
    """Raise unless a file's cache is of this model."""
    for name in ("model_type", "layers", *DIMENSIONS):
        if own[name] != record["model"].get(name):
            raise CacheFileError(
                f"{path} is a cache of another model: its {name} is {record['model'].get(name)!r}, that of this model "
                f"{own[name]!r}"
            )
    former_dtype = record.get("dtype")
    if None not in (dtype, former_dtype) and dtype != former_dtype:
        raise CacheFileError(
            f"{path} is a cache of this model in {former_dtype}, but its weights are in {dtype} now; load the model "
            f"with dtype=torch.{former_dtype}, or read the text again"
        )
    if not agree(record["weights"], weights):
        raise CacheFileError(OTHER_WEIGHTS.format(path))


def check_attention(read: Weights, own: Weights, path: Any) -> None:
    """Raise if attention of other weights than the model's has read a file's text; nothing may be known of either."""
    known = {kind for kind, _ in own}
    if any(kind in known for kind, _ in read) and not same(read, own):
        raise CacheFileError(OTHER_WEIGHTS.format(path))

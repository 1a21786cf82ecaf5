"""Caches in files: safetensors with all that is needed to go on, checked before anything is made of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from momentkv.backends import BACKENDS, get_backend
from momentkv.backends.layout import Layout
from momentkv.cache.layer import LayerCache
from momentkv.cache.state import LayerState
from momentkv.hf import former
from momentkv.hf.former import CacheFileError, statistics
from momentkv.policies import POLICIES, Policy
from momentkv.statistics.corrections import CORRECTIONS, Correction, get_correction

__all__ = ["FORMAT", "CacheFileError", "fingerprint", "load", "save"]

# Raised by one whenever a file of the version before could no longer be read rightly.
FORMAT = 2
KEY = "momentkv"
KINDS = {correction.name: type(correction) for correction in CORRECTIONS.values()}
# What of a layer's state is a number of the host's.
NUMBERS = ("seen", "filled", "padded", "has_evicted")
# What of a configuration decides whether a cache fits; a value that a model lacks is None.
DIMENSIONS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rope_parameters")
SAMPLED, ELEMENTS = 8, 64


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
            if core.state is not None:
                held |= {name: getattr(core.state, name) for name in NUMBERS}
                held["widths"] = list(core.state.layout.widths)
            layers.append(held)
        else:
            arrays, seen = {}, 0
            if layer.is_initialized:
                kept = layer.sliding_window - 1  # one that records may hold more
                arrays = {name: getattr(layer, name)[:, :, -kept:] for name in ("keys", "values")}
                seen = layer.cumulative_length
            layers.append({"cumulative_length": seen})
        tensors |= {f"{index}.{name}": x.detach().cpu().contiguous().clone() for name, x in arrays.items()}
    tensors |= cache.padding.tensors()
    one = next(iter(cores.values())).config if cores else None
    record = {
        "format": FORMAT,
        "model": model_record(cache.config, cache.layers),
        "weights": cache.fingerprint,
        "settings": {
            "budget": cache.budget,
            "sharing": cache.sharing,
            "rollback": cache.rollback,
            "average": cache.shared_budgets[0].average if cache.shared_budgets else None,
        },
        "seen": int(cache.get_seq_length()),
        "padding": cache.padding.codes is not None,
        "layers": layers,
    }
    if one is not None:
        record["settings"] |= {
            "order": one.order,
            "sinks": one.sinks,
            "window": one.window,
            "block": one.block,
            "backend": backend_name(one.backend),
            "policy": described(one.policy, POLICIES),
            "correction": described(one.correction, KINDS),
        }
        # What few caches have is written for those alone, so that a version without it reads the others.
        for name, value in (("certify", one.certify), ("tolerance", one.tolerance), ("static", cache.static)):
            if value is not None:
                record["settings"][name] = True if name == "static" else value
    metadata = {KEY: json.dumps(record, sort_keys=True)}
    metadata["digest"] = digest(metadata[KEY], tensors)
    write(Path(path), safetensors.torch.save(tensors, metadata))


def check_settled(cache: Any) -> None:
    """Raise where something waits for another call; a pass that failed half-way leaves no trace in the file."""
    cache.passes.undo()
    if any(layer.passes for layer in cache.layers if hasattr(layer, "passes")):
        raise RuntimeError("save: recorded passes wait for crop; call cache.crop(0) first, so that their tokens stay")
    if getattr(cache, "ranks", 1) > 1:
        raise RuntimeError(
            "save: this cache holds one rank's heads of a tensor-parallel model, and files of parts are not supported; "
            "read the text with the model on one device to save it"
        )


def write(path: Path, data: bytes) -> None:
    """Write a file so that it is there as a whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(
    make: Any, path: str | os.PathLike[str], model: Any, *, policy: Policy | None, correction: Correction | None
) -> Any:
    """Read what `save` wrote; see `MomentCache.load`. ``make`` is the class to make."""
    record, tensors = read(Path(path))
    config = getattr(model, "config", model).get_text_config(decoder=True)
    settings = dict(record["settings"])
    average = settings.pop("average")
    if "policy" in settings:
        settings["policy"] = revived(settings["policy"], POLICIES, policy, "policy")
        order = settings["order"]
        settings["correction"] = revived(
            settings["correction"], KINDS, correction, "correction", lambda x: get_correction(x, order=order)
        )
    cache = make(model, settings.pop("budget"), **settings)
    check_model(record, model_record(config, cache.layers), fingerprint(model), path)
    for shared in cache.shared_budgets:
        shared.average = average
    cache.padding.load(tensors, record)
    for index, (layer, stored) in enumerate(zip(cache.layers, record["layers"], strict=True)):
        own = {name.split(".", 1)[1]: x for name, x in tensors.items() if name.split(".", 1)[0] == str(index)}
        if "parts" in stored:
            former.restore(layer.core, stored["parts"], own, path)
        elif "budgets" in stored:
            restore(layer.core, stored, own, path)
        elif own:
            layer.lazy_initialization(own["keys"], own["values"])
            layer.keys, layer.values = own["keys"], own["values"]
            layer.cumulative_length = stored["cumulative_length"]
    if cache.static is not None and all(core.state is not None for core in cache.static.cores):
        cache.static.set()
    return cache


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Record and tensors of a file, once it is certain that they are what was written."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no cache file {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if KEY not in metadata:
                raise CacheFileError(f"{path} is a safetensors file, but no cache of momentkv")
            record = json.loads(metadata[KEY])
            version = record.get("format") if isinstance(record, dict) else None
            if version not in (former.FORMAT, FORMAT):
                raise CacheFileError(
                    f"{path} has format {version!r}, this momentkv reads {former.FORMAT} and {FORMAT}; read the text "
                    "again and save it anew, or use the version that wrote it"
                )
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise CacheFileError(f"{path} is damaged or no cache file: {error}") from error
    if metadata.get("digest") != digest(metadata[KEY], tensors):
        raise CacheFileError(f"{path} has been changed since it was written: its digest does not fit its content")
    return record, tensors


def digest(record: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the record and of names, types, shapes and elements of all tensors."""
    state = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        x = tensors[name]
        state.update(f"\n{name} {x.dtype} {tuple(x.shape)}\n".encode())
        state.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def restore(core: LayerCache, held: Mapping[str, Any], arrays: Mapping[str, torch.Tensor], path: Any) -> None:
    """Give a layer's cache the state that a file holds."""
    core.budgets, core.scale, core.refused = held["budgets"], held["scale"], held["refused"]
    if not arrays:
        return
    config = core.config
    evicted, evidence = statistics(config, arrays["recent_keys"], arrays["recent_values"], arrays, "evicted.", path)
    own: dict[str, Any] = {name: x for name, x in arrays.items() if "." not in name}
    layout = Layout(config.sinks, config.recent, tuple(held["widths"]))
    numbers = {name: held[name] for name in NUMBERS}
    core.take(LayerState(**own, **numbers, evicted=evicted, evidence=evidence, layout=layout))


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
    used: Callable[[Any], Any] = lambda choice: choice,
) -> Any:
    """The policy or correction that was described; ``used`` makes of a choice what a cache makes of it."""
    if record.get("own"):
        if given is None or record["name"] not in (given.name, type(given).__name__):
            raise ValueError(
                f"the cache was made with a {what} of your own, {record['name']!r}, which no file can hold; "
                f"pass {what}=, an object like the one it had"
            )
        return given
    made = known[record["name"]](**record["parameters"])
    if given is not None and used(given) != used(made):
        raise ValueError(f"{what} is {given!r}, but the cache was made with {record['name']!r}; leave {what} out")
    return made


def backend_name(backend: Any) -> str | None:
    """Name of a backend; one that is not momentkv's has no name that could be found again."""
    if backend is None:
        return None
    if backend.name in BACKENDS and type(get_backend(backend.name)) is type(backend):
        name: str = backend.name
        return name
    raise ValueError(f"save: backend {backend!r} is not one of {', '.join(BACKENDS)}; use a cache with one of them")


def model_record(config: Any, layers: Any) -> dict[str, Any]:
    """What of a model decides whether a cache is one of its caches, as JSON gives it back."""
    record = {"model_type": config.model_type, "layers": [int(getattr(x, "sliding_window", 0) or 0) for x in layers]}
    record |= {name: getattr(config, name, None) for name in DIMENSIONS}
    plain: dict[str, Any] = json.loads(json.dumps(record, default=str))
    return plain


def check_model(record: Mapping[str, Any], own: Mapping[str, Any], weights: Mapping[str, str], path: Any) -> None:
    """Raise unless a file's cache is of this model."""
    for name in ("model_type", "layers", *DIMENSIONS):
        if own[name] != record["model"].get(name):
            raise CacheFileError(
                f"{path} is a cache of another model: its {name} is {record['model'].get(name)!r}, that of this model "
                f"{own[name]!r}"
            )
    for name, value in record["weights"].items():
        if weights.get(name, value) != value:
            raise CacheFileError(
                f"{path} is a cache of a model with other weights: {name} differs; load it with the model that read "
                "the text"
            )


def fingerprint(model: Any) -> dict[str, str]:
    """Digests of a few elements of a few parameters, by name; of those that are plain and at hand.

    Two models of one configuration, say a base and an instruct model, have caches of the same shapes.
    """
    named = dict(model.named_parameters()) if hasattr(model, "named_parameters") else {}
    names = sorted(named)
    chosen = {names[index * (len(names) - 1) // (SAMPLED - 1)] for index in range(SAMPLED)} if names else set()
    digests = {}
    for name in sorted(chosen):
        x = named[name].data
        if type(x) is torch.Tensor and x.device.type != "meta" and x.is_floating_point():
            sample = x.flatten()[:ELEMENTS].to("cpu", torch.float32)
            digests[name] = hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]
    return digests

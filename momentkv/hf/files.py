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
from momentkv.policies import POLICIES, Policy
from momentkv.statistics.corrections import CORRECTIONS, Correction, get_correction
from momentkv.statistics.moments import Moments

__all__ = ["FORMAT", "CacheFileError", "fingerprint", "load", "save"]

# Raised by one whenever a file of the version before could no longer be read rightly.
FORMAT = 1
KEY = "momentkv"
SCALARS = ("budget", "scale", "seen", "padded", "has_evicted", "refused")
# What of a configuration decides whether a cache fits; a value that a model lacks is None.
DIMENSIONS = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rope_parameters")
SAMPLED, ELEMENTS = 8, 64
KINDS = {correction.name: type(correction) for correction in CORRECTIONS.values()}


class CacheFileError(ValueError):
    """A cache file that is damaged, of another version, or of another model."""


def save(cache: Any, path: str | os.PathLike[str]) -> None:
    """Write a `MomentCache`; see `MomentCache.save`."""
    check_settled(cache)
    tensors: dict[str, torch.Tensor] = {}
    layers: list[dict[str, Any]] = []
    cores = cache.moment_layers
    for index, layer in enumerate(cache.layers):
        if index in cores:
            core = cores[index]
            # Layout is part of the state: products over differently laid out arrays may round differently.
            core.map(lambda x: x.contiguous())
            arrays = {f"{n}.{name}": x for n, part in enumerate(core.parts) for name, x in part.arrays().items()}
            layers.append({"parts": [{name: getattr(part, name) for name in SCALARS} for part in core.parts]})
        else:
            arrays, seen = {}, 0
            if layer.is_initialized:
                kept = layer.sliding_window - 1  # one that records may hold more
                arrays = {name: getattr(layer, name)[:, :, -kept:] for name in ("keys", "values")}
                seen = layer.cumulative_length
            layers.append({"cumulative_length": seen})
        tensors |= {f"{index}.{name}": x.detach().cpu().contiguous().clone() for name, x in arrays.items()}
    one = next(iter(cores.values())).parts[0] if cores else None
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
    """Raise where something waits for another call."""
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
        made = revived(
            settings["correction"], KINDS, correction, "correction", lambda x: get_correction(x, order=order)
        )
        settings["correction"] = made
    cache = make(model, settings.pop("budget"), **settings)
    check_model(record, model_record(config, cache.layers), fingerprint(model), path)
    for shared in cache.shared_budgets:
        shared.average = average
    for index, (layer, stored) in enumerate(zip(cache.layers, record["layers"], strict=True)):
        own = {name.split(".", 1)[1]: x for name, x in tensors.items() if name.split(".", 1)[0] == str(index)}
        if "parts" in stored:
            for n, (part, scalars) in enumerate(zip(layer.core.parts, stored["parts"], strict=True)):
                arrays = {name.split(".", 1)[1]: x for name, x in own.items() if name.split(".", 1)[0] == str(n)}
                restore(part, scalars, arrays, path)
        elif own:
            layer.lazy_initialization(own["keys"], own["values"])
            layer.keys, layer.values = own["keys"], own["values"]
            layer.cumulative_length = stored["cumulative_length"]
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
            if version != FORMAT:
                raise CacheFileError(
                    f"{path} has format {version!r}, this momentkv reads {FORMAT}; read the text again and save it "
                    "anew, or use the version that wrote it"
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


def restore(part: Any, scalars: Mapping[str, Any], arrays: Mapping[str, torch.Tensor], path: Any) -> None:
    """Give one `LayerCache` the state of another."""
    for name in SCALARS:
        setattr(part, name, scalars.get(name, getattr(part, name)))
    if not arrays:
        return
    part.keys, part.values = arrays["keys"], arrays["values"]
    for name in ("positions", "score", "query_mean", "query_square", "recent_queries"):
        setattr(part, name, arrays.get(name))
    part.moments = part.correction.empty(part.keys, part.values)
    if part.order is not None:  # version 0.1 wrote moments that nothing was ever added to
        part.moments = filled(part.moments, "moments.", arrays)
    if part.moments is None:
        raise CacheFileError(
            f"{path} holds moments of another make than its correction, {part.correction!r}; pass the correction it had"
        )
    if part.certify is not None:
        part.evidence = filled(
            Moments.empty(part.keys, part.values, order=part.certify, extent=True), "evidence.", arrays
        )
        if part.evidence is None:
            raise CacheFileError(f"{path} holds no evidence of order {part.certify}, which its cache was made to keep")


def filled(empty: Any, prefix: str, arrays: Mapping[str, torch.Tensor]) -> Any:
    """A state with the arrays of that prefix in place of its own, or None if they are not alike."""
    state = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    fits = {name: (x.shape, x.dtype) for name, x in empty.arrays().items()}
    if fits != {name: (x.shape, x.dtype) for name, x in state.items()}:
        return None
    extent = {name.removeprefix("extent."): x for name, x in state.items() if name.startswith("extent.")}
    own = {name: x for name, x in state.items() if not name.startswith("extent.")}
    if extent:
        own["extent"] = dataclasses.replace(empty.extent, **extent)
    return dataclasses.replace(empty, **own)


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

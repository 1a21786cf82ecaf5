"""Others that quantize: KIVI's layout, and the quantized cache of transformers, at equal bytes.

KIVI (arXiv 2402.02750) codes keys per channel, over groups of 32 tokens, and values per token, over groups of 32
channels; each group has a scale and an offset of 16 bits, and the newest 128 tokens stay exact. It keeps all tokens.
Beside it, the same layout for the tokens that an eviction retains. `QuantizedCache` needs a package of its own:
pip install optimum-quanto (or hqq), and is left out without `--backends`. What is stored is counted, every number that
is no code as 16 bits. Minutes for each text on one core.

Run: python examples/quantized_peers.py [--texts FILE ...] [--budgets 128 256 512] [--backends quanto hqq] [--output X]
"""

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import DynamicCache, QuantizedCache

from momentkv.cache.config import wanted_queries
from momentkv.codes import Standard, encode
from momentkv.evaluation.capture import CaptureCache, replay
from momentkv.evaluation.fidelity import compare
from momentkv.evaluation.outputs import Output, check_output
from momentkv.evaluation.settings import (
    bytes_as_tokens,
    empty_cache,
    head_dim,
    moment_tokens,
    setting_of,
    settings_grid,
)
from momentkv.evaluation.sources import load_model, load_text, tokenize
from momentkv.policies import get_policy

GROUP, RESIDUAL = 32, 128
SINKS, WINDOW, EXACT = 1, 32, 8
# What is measured in KIVI's layout, too.
EVICTED, BITS = ("default", "snapkv/none"), (2, 4)
# Tokens in records of 16 bits, which lose next to nothing: what another layout gives back is held in them.
FINE = (16, 16)


def grouped(x: torch.Tensor, bits: int, axis: int) -> torch.Tensor:
    """What KIVI's layout gives back of ``x``, shape (..., n, d), with groups along an axis; the last may be shorter."""
    parts = []
    for part in torch.split(x, GROUP, axis):
        offset = part.amin(axis, keepdim=True).half().float()
        scale = ((part.amax(axis, keepdim=True) - offset) / (2**bits - 1)).half().float().clamp_min(2.0**-24)
        parts.append(offset + scale * ((part - offset) / scale).round().clamp(0, 2**bits - 1))
    return torch.cat(parts, axis)


def kivi_bytes(n: int, d: int, bits: int) -> float:
    """Bytes of ``n`` tokens of one head."""
    return 2 * n * d * bits / 8 + 4 * d * math.ceil(n / GROUP) + 4 * n * math.ceil(d / GROUP)


def kivi(captured: CaptureCache, model: Any, bits: int) -> tuple[DynamicCache, float]:
    """All tokens of a context, the newest exact, and the 16-bit tokens of each head that they cost."""
    cache, d = DynamicCache(), head_dim(model)
    for index, layer in captured.capture_layers.items():
        n = (layer.keys.shape[2] - RESIDUAL) // GROUP * GROUP
        keys, values = (
            torch.cat([grouped(x[:, :, :n], bits, axis), x[:, :, n:]], 2)
            for x, axis in ((layer.keys, 2), (layer.values, 3))
        )
        cache.update(keys, values, index)
        exact = layer.keys.shape[2] - n
    return cache, kivi_bytes(n, d, bits) / (4 * d) + exact


def in_layout(model: Any, method: str, bits: int) -> tuple[float, int]:
    """Of a method with KIVI's layout, in tokens of 16 bits: what a retained one costs, and all that is beside."""
    d = head_dim(model)
    beside = moment_tokens(model, setting_of(method), itemsize=2) + SINKS + EXACT
    return kivi_bytes(GROUP, d, bits) / GROUP / (4 * d), beside


def check_budgets(model: Any, options: argparse.Namespace) -> None:
    """Raise if a budget does not hold what every method retains, beside its statistics."""
    least, size = SINKS + WINDOW + 1, min(options.budgets)
    needed = {}
    for method in options.methods:
        setting = dataclasses.replace(setting_of(method), budget=least)
        needed[method] = bytes_as_tokens(model, setting, itemsize=2)
    for method in EVICTED:
        for bits in BITS:
            share, beside = in_layout(model, method, bits)
            tokens = least - SINKS - EXACT
            needed[f"{method} in KIVI's layout, {bits} bits"] = math.ceil(beside + tokens * share)
    method = max(needed, key=lambda x: needed[x])
    if size < needed[method]:
        raise ValueError(
            f"budgets has {size}, but {least} tokens of {method} (sinks, window and one) and the statistics beside "
            f"them take the bytes of {needed[method]}; use at least {needed[method]}"
        )


def evicted_kivi(captured: CaptureCache, model: Any, method: str, size: int, bits: int) -> Any:
    """The cache of a method in the bytes of ``size`` tokens of 16 bits, its retained tokens in KIVI's layout."""
    setting = setting_of(method)
    share, beside = in_layout(model, method, bits)
    tokens = SINKS + EXACT + math.floor((size - beside) / share)
    cache = replay(captured, empty_cache(model, dataclasses.replace(setting, budget=tokens, bits=FINE), rollback=512))
    for core in cache.moment_layers.values():
        state = core.stored_state
        layout, coding = state.layout, state.coding()
        if coding is None:
            continue  # nothing is retained beside exact tokens
        changed: dict[str, Any] = {}
        standards: tuple[Standard, Standard] = (coding.key_standard, coding.value_standard)
        for name, x, axis, standard in zip(("key", "value"), state.retained(), (1, 2), standards, strict=True):
            rows, steps = [], []
            for head, width in enumerate(layout.widths):
                own = grouped(x[:, head, :width], bits, axis)
                of_head = Standard(*(None if y is None else y[:, head] for y in standard))
                codes, step = encode(own, of_head, FINE[0])
                rows.append(codes)
                steps.append(step)
            changed |= {f"{name}s": torch.cat(rows, 1), f"{name}_step": torch.cat(steps, 1)}
        core.state = state.changed(**changed)
    return cache


def stored_bytes(x: Any) -> float:
    """Bytes of a quantized tensor of optimum-quanto, or of codes and meta data of hqq."""
    if isinstance(x, tuple):
        return x[0].nbytes + 2 * sum(x[1][name].numel() for name in ("scale", "zero"))
    return x.numel() * x.qtype.bits / 8 + 2 * (x._scale.numel() + x._shift.numel())


def quantized(model: Any, captured: CaptureCache, backend: str, bits: int, per_channel: bool) -> tuple[Any, float]:
    """Transformers' cache of a context, and the 16-bit tokens of each head that it costs."""
    lowest, other = (0, -1) if backend == "quanto" else (1, 0)  # as transformers' guide has them
    cache = QuantizedCache(
        backend, model.config, nbits=bits, axis_key=other if per_channel else lowest, axis_value=lowest
    )
    total = heads = 0.0
    for index, layer in captured.capture_layers.items():
        cache.update(layer.keys, layer.values, index)
        total += sum(stored_bytes(getattr(cache.layers[index], f"_quantized_{name}")) for name in ("keys", "values"))
        heads += layer.keys.shape[1]
    return cache, total / heads / (4 * head_dim(model))


@torch.inference_mode()
def measured(model: Any, ids: torch.Tensor, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """KL of every way to compress the context, with the 16-bit tokens that it costs."""
    context = options.context
    methods = [setting_of(method) for method in options.methods]
    for one in methods:
        if one.trial or get_policy(one.policy).rereads:
            raise ValueError(f"methods has {one.method!r}; here texts are read once, and compressed once")
    captured = CaptureCache(model, wanted_queries([x.policy for x in methods]))
    model(ids[:, :context], past_key_values=captured, logits_to_keep=1)
    queries = {index: layer.queries for index, layer in captured.capture_layers.items()}
    following, targets = ids[:, context:-1], ids[0, context + 1 :]
    full = model(following, past_key_values=captured).logits[0]
    for index, layer in captured.capture_layers.items():
        layer.keys, layer.values = layer.keys[:, :, :context], layer.values[:, :, :context]
        layer.queries = queries[index]
    found: dict[str, dict[str, float]] = {}

    def add(name: str, size: float, cache: Any) -> None:
        if hasattr(cache, "activate_past_recording"):
            cache.activate_past_recording()
        logits = model(following, past_key_values=cache).logits[0]
        found[f"{name}, {size:.0f}"] = {"tokens": size, "kl": compare(full, logits, targets).kl}
        print(f"{name}, {size:.0f}: {found[f'{name}, {size:.0f}']['kl']:.4f}", flush=True)

    sizes = set(options.budgets)
    for bits in BITS:
        cache, size = kivi(captured, model, bits)
        add(f"KIVI, {bits} bits, all tokens", size, cache)
        sizes.add(round(size))
        for backend in options.backends:
            for per_channel in (False, True):
                cache, size = quantized(model, captured, backend, bits, per_channel)
                kind = "keys per channel" if per_channel else "keys per token"
                add(f"QuantizedCache ({backend}), {bits} bits, {kind}", size, cache)
                sizes.add(round(size))
        for size in options.budgets:
            for method in EVICTED:
                add(f"{method} in KIVI's layout, {bits} bits", size, evicted_kivi(captured, model, method, size, bits))
    for size in sorted(sizes):
        for one in methods:
            combination = (one.order, one.kind, one.sharing, one.bits)
            for setting in settings_grid(model, [one.policy], [size], [combination], itemsize=2):
                add(one.method, size, replay(captured, empty_cache(model, setting, rollback=512)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--texts", nargs="+", default=["calls", "import"])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--following", type=int, default=256)
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512])
    methods = ["default@3", "default@4", "default@5", "default@6", "snapkv/none@4"]
    parser.add_argument("--methods", nargs="+", default=methods)
    parser.add_argument("--backends", nargs="*", default=[], choices=["quanto", "hqq"])
    parser.add_argument("--output", default="results/quantized_peers.json")
    options = parser.parse_args()

    if options.context < GROUP + RESIDUAL:
        raise ValueError(
            f"context is {options.context}, but KIVI's layout begins with {GROUP} tokens before {RESIDUAL} exact ones; "
            f"use at least {GROUP + RESIDUAL}"
        )
    check_output(Output("output", Path(options.output), Path("quantized_peers.json")))
    said = {text: load_text(text) for text in options.texts}
    model, tokenizer = load_model(options.model)
    check_budgets(model, options)
    results = {}
    for text in options.texts:
        ids = tokenize(tokenizer, said[text], options.context + options.following + 1, name=text)
        results[text] = measured(model, ids, options)
        path = Path(options.output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1))
    print(f"\nKL, mean of {len(results)} texts")
    for name in next(iter(results.values())):
        print(f"{mean(x[name]['kl'] for x in results.values() if name in x):.4f}  {name}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"quantized_peers.py: {error}")

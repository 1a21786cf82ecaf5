"""Needles asked of kvpress's presses: the same haystacks as `momentkv evaluate needles`, token for token.

Run: momentkv evaluate needles --lengths 1000 --samples 8 --question unseen --write-haystacks results/haystacks.json
     python examples/kvpress_needles.py results/haystacks.json [--budgets 128 256] [--presses SnapKV KeyDiff]

It runs in the environment of `kvpress_peers.py`, which says how presses are called and how tokens after the context see
what they leave. The protocol is that of the question "unseen": the context is compressed once, then each question and
its answer are fed in one pass. Rows have the columns of `momentkv evaluate needles`, so that
`momentkv evaluate report` shows them side by side; the full cache is asked, too, and must find what it finds there.
A run that is interrupted goes on from what it has written.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

from kvpress_peers import Compressed, load, make_press, prefill, run_inside, teacher_force, versions

PRESSES = ("SnapKV", "ExpectedAttention", "KeyDiff", "AdaKV(SnapKV)", "KVzip")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("haystacks", type=Path, help="what --write-haystacks wrote")
    parser.add_argument("--budgets", type=int, nargs="+", default=[64, 128, 256, 512], help="tokens per KV head")
    parser.add_argument("--presses", nargs="+", default=list(PRESSES), metavar="PRESS")
    parser.add_argument("--output", type=Path, default=Path("results/kvpress-needles.json"))
    parser.add_argument("--environment", type=Path, default=Path(".venv-kvpress"), help="made if missing")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    return evaluate(options) if options.inside else run_inside(options.environment, __file__)


def recall(logits: Any, answer: dict[str, Any]) -> dict[str, float]:
    """As `momentkv.evaluation.retrieval.recall`."""
    import torch

    tokens, counted = torch.tensor(answer["tokens"]), torch.tensor(answer["counted"])
    right = logits.argmax(-1) == tokens
    values = [bool(right[counted == which].all()) for which in range(1, int(counted.max()) + 1)]
    nll = torch.nn.functional.cross_entropy(logits[counted > 0].float(), tokens[counted > 0])
    return {"values": mean(values), "tokens": float(right[counted > 0].double().mean()), "nll": float(nll)}


def ask(model: Any, state: Compressed | None, cache: Any, question: dict[str, Any], context: int) -> dict[str, float]:
    """The best answer to a question, from a compressed cache, or from the full one where there is none."""
    import torch

    results = []
    for answer in question["answers"]:
        ids = torch.tensor([[*question["question"], *answer["tokens"]]])[:, :-1]
        if state is None:
            logits = model(ids, past_key_values=copy.deepcopy(cache)).logits[0]
        else:
            logits = teacher_force(model, state, ids, context)
        results.append(recall(logits[-len(answer["tokens"]) :], answer))
    return max(results, key=lambda result: (result["values"], -result["nll"]))


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def evaluate(options: argparse.Namespace) -> int:
    """Ask every press at every budget about every haystack; write JSON after each haystack."""
    import torch

    torch.set_grad_enabled(False)
    content = json.loads(options.haystacks.read_text())
    protocol = content["protocol"] | {"kvpress": versions()["kvpress"], "presses": options.presses}
    protocol["budgets"] = options.budgets
    command = shlex.join(["python", "examples/kvpress_needles.py", *(x for x in sys.argv[1:] if x != "--inside")])
    rows: list[dict[str, Any]] = []
    if options.output.exists():
        found = json.loads(options.output.read_text())
        if found["protocol"] != protocol:
            raise SystemExit(f"{options.output} holds results of another protocol; name another file")
        rows = found["rows"]
    done = {(row["layout"], row["value"], row["length"], row["haystack"]) for row in rows}
    model, _ = load(None)
    start = time.monotonic()
    for number, haystack in enumerate(content["haystacks"], start=1):
        columns = {name: haystack[name] for name in ("layout", "value", "length", "haystack")}
        if tuple(columns.values()) in done:
            continue
        context = len(haystack["context"])
        settings = [(name, budget) for name in options.presses for budget in options.budgets]
        # A little more than the budget, so that rounding down does not lose a token.
        presses = [make_press(name, 1 - (budget + 1e-3) / context) for name, budget in settings]
        torch.manual_seed(0)
        cache, states = prefill(model, torch.tensor([haystack["context"]]), presses)
        for (name, budget), state in [(("full cache", None), None), *zip(settings, states, strict=True)]:
            if state is not None and mean(state.retained()) > budget + 0.5:
                raise RuntimeError(f"{name} retains {mean(state.retained()):.1f} tokens per KV head of {budget}")
            for question in haystack["questions"]:
                rows.append(
                    columns
                    | {name: question[name] for name in ("task", "index", "depth")}
                    | {
                        "question": "unseen" if state else "",
                        "policy": f"kvpress {name}" if state else name,
                        "correction": "none" if state else "",
                        "budget": budget,
                        "bytes_as_tokens": budget,
                        "nbytes": state.nbytes()[0] if state else None,
                        "cpu_seconds": state.cpu_seconds if state else None,
                    }
                    | ask(model, state, cache, question, context)
                    | {"generated": None}
                )
        write(options.output, {"command": command, "protocol": protocol, "environment": versions(), "rows": rows})
        print(f"{number}/{len(content['haystacks'])} haystacks, {time.monotonic() - start:.0f} s", flush=True)
    for policy, budget in dict.fromkeys((row["policy"], row["budget"]) for row in rows):
        chosen = [row for row in rows if (row["policy"], row["budget"]) == (policy, budget)]
        share = mean(row["values"] for row in chosen)
        print(f"{policy:<26} {budget or '':>4}  found {share:4.0%} of {len(chosen)}")
    print(f"results: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

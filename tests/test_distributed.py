"""More than one process: a context split over ranks, and heads split over ranks, against one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, build, prompt

from momentkv.attention import attend
from momentkv.distributed import merge_moments, merge_states, merge_summaries
from momentkv.hf import MomentCache
from momentkv.statistics.moments import Moments
from momentkv.statistics.summaries import QueryWindow, Summaries

HERE = Path(__file__).parent


pytestmark = pytest.mark.xdist_group("ranks")  # what the forked ranks find is found once


def first_rank_of(*command: str) -> dict[str, Any]:
    """What rank 0 printed."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{HERE.parent}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


@pytest.fixture(scope="module")
def model() -> Any:
    return build(FAMILIES["llama"](num_key_value_heads=4))


@pytest.fixture(scope="module")
def forked(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What groups of ranks found that were forked from one process."""
    folder = tmp_path_factory.mktemp("ranks")
    model.save_pretrained(folder)
    return first_rank_of(str(HERE / "ranks.py"), str(folder))


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_context_split_over_ranks_equals_one_process(ranks: int, request: pytest.FixtureRequest):
    if ranks == 2:
        torchrun = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}")
        found = first_rank_of(*torchrun, str(HERE / "ranks.py"), "context")
    else:
        found = request.getfixturevalue("forked")[f"context {ranks}"]
    assert len(found) == 19
    for name, difference in found.items():
        assert difference <= 1e-12, name  # a few hundred roundings of float64


@pytest.mark.parametrize("ranks", [2, 4])
def test_heads_split_over_ranks_equal_one_process(ranks: int, model: Any, forked: dict[str, Any]):
    found = forked[f"heads {ranks}"]
    ids = prompt(2, 60)
    # A policy whose ranking has no near ties that the sums of sharded layers could tip over.
    for name, settings in {
        "moments": {"sharing": "uniform", "policy": "momentkv", "correction": "moments"},
        "summaries": {"sharing": "uniform", "policy": "momentkv"},
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
        logits = torch.stack(out.logits)
        assert found[name]["tokens"] == out.sequences.tolist()
        # As in test_hf_summaries: sums in another order, two layers, float32.
        assert (torch.tensor(found[name]["logits"]) - logits).abs().max() <= 1e-4 * logits.abs().max()
    for name, one in found.items():
        assert one["heads"] == 2 * 4 // ranks, name
        assert one["bounded"], name
        assert one["counted"], name
        assert one["budget"] <= 20
        assert "one rank's heads" in one["save"]


def test_without_a_process_group_the_error_says_so():
    x = torch.zeros(1, 3, 4)
    summaries = Summaries.empty(x, x, summaries=2)
    for merge in (
        lambda: merge_states(attend(x, x, x)),
        lambda: merge_moments(Moments.empty(x, x)),
        lambda: merge_summaries(summaries, QueryWindow.from_queries(x, 1)),
    ):
        with pytest.raises(RuntimeError, match=r"not initialised.*torchrun"):
            merge()


def test_a_gradient_which_would_lack_what_is_of_other_ranks_is_refused():
    k, v = torch.randn(1, 2, 5, 4, requires_grad=True), torch.randn(1, 2, 5, 4)
    moments, window = Moments.from_tokens(k, v), QueryWindow(torch.randn(1, 2, 4), torch.rand(1, 2, 4))
    summaries = Summaries.empty(k.detach(), v, summaries=2).update(k, v, window)
    with pytest.raises(ValueError, match="moments requires a gradient, which merging has none of"):
        merge_moments(moments)
    with pytest.raises(ValueError, match="summaries requires a gradient"):
        merge_summaries(summaries, window)
    with pytest.raises(ValueError, match="window requires a gradient"):
        merge_summaries(summaries.map(torch.Tensor.detach), window._replace(mean=window.mean.requires_grad_()))


@pytest.mark.parametrize(
    ("name", "options"),
    [("key_key", {"order": 2}), ("extent", {"extent": True}), ("anchor", {"anchor": torch.ones(4)})],
)
def test_moments_that_no_reduction_merges_are_refused_by_name(name: str, options: dict[str, Any]):
    k = v = torch.ones(2, 3, 4)
    with pytest.raises(ValueError, match=f"moments have {name}"):
        merge_moments(Moments.from_tokens(k, v, **options))

"""By which name a model takes a cache: ``past_key_values``, or ``cache`` from 5.24 of transformers on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import FAMILIES, prompt, tiny
from transformers import LlamaForCausalLM

from momentkv.hf import MomentCache, models, read
from momentkv.hf.models import takes


class Before:
    def forward(self, ids: Any, past_key_values: Any = None) -> None: ...


class After:
    def forward(self, ids: Any, cache: Any = None) -> None: ...


class Wrapper:
    def forward(self, *args: Any, **kwargs: Any) -> None: ...


@pytest.mark.parametrize("renamed", [False, True])
def test_a_model_is_given_a_cache_by_its_own_name_and_a_wrapper_by_the_versions(
    renamed: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(models, "renamed", lambda: renamed)
    assert takes(Before(), 5) == {"past_key_values": 5}
    assert takes(After(), 5) == {"cache": 5}
    assert takes(Wrapper(), 5) == {"cache" if renamed else "past_key_values": 5}
    assert takes(After().forward, 5) == {"cache": 5}


def test_a_text_is_read_twice_by_a_model_that_takes_a_cache_by_its_new_name():
    class Renamed(LlamaForCausalLM):
        def forward(self, input_ids: Any, cache: Any = None, **others: Any) -> Any:
            return super().forward(input_ids, **takes(tiny("llama"), cache), **others)

    plain = tiny("llama")
    model = Renamed._from_config(FAMILIES["llama"](), attn_implementation="momentkv").eval()
    model.load_state_dict(plain.state_dict())
    caches = [MomentCache(x, 40, policy="twice", window=8, sinks=1) for x in (plain, model)]
    for x, cache in zip((plain, model), caches, strict=True):
        read(x, prompt(1, 120), cache, request=[5, 6], progress=False)
    first, second = (cache.moment_layers.values() for cache in caches)
    assert caches[1].get_seq_length() == 120
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.positions, b.positions)

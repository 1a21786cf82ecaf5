"""Models that are wrapped, adapted or offloaded, and what else is not what it seems: named, or as the plain model."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import FAMILIES, build, prompt, tiny
from transformers import DynamicCache

from momentkv.hf import CacheFileError, DecodeGraphs, FinishedRows, MomentCache, read
from momentkv.hf.models import agree, fingerprint
from momentkv.hf.repeating import around, request_of

SMALL: dict[str, Any] = {"sinks": 1, "window": 8, "block": 4}


class Adapted(torch.nn.Module):
    """A linear layer with an adapter of low rank, named as peft names it."""

    def __init__(self, base_layer: torch.nn.Linear, size: float) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = torch.nn.Linear(base_layer.in_features, 2, bias=False)
        self.lora_B = torch.nn.Linear(2, base_layer.out_features, bias=False)
        torch.nn.init.constant_(self.lora_B.weight, size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Whole(torch.nn.Module):
    """A model as peft and `torch.compile` hold it."""

    def __init__(self, model: torch.nn.Module, name: str) -> None:
        super().__init__()
        parent: torch.nn.Module = self
        *path, last = name.split(".")
        for each in path:
            parent.add_module(each, torch.nn.Module())
            parent = getattr(parent, each)
        parent.add_module(last, model)
        self.config = model.config
        self.dtype = model.dtype


def adapted(model: Any, size: float = 0.1) -> Any:
    model = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.self_attn.q_proj = Adapted(layer.self_attn.q_proj, size)
    return model.eval()


@pytest.mark.parametrize("name", ["base_model.model", "_orig_mod", "base_model.model._orig_mod"])
def test_a_model_is_known_in_its_wrapper_and_another_is_not(name: str, tmp_path: Path):
    """Names of parameters had the wrapper's in front, so that nothing was compared."""
    model, other = tiny("llama"), copy.deepcopy(tiny("llama"))
    with torch.no_grad():
        for x in other.parameters():
            x *= 1.1
    assert fingerprint(Whole(model, name)) == fingerprint(model)
    cache = MomentCache(model, 30, **SMALL)
    with torch.no_grad():
        model(prompt(1, 60), past_key_values=cache)
    cache.save(tmp_path / "x.safetensors")
    assert MomentCache.load(tmp_path / "x.safetensors", Whole(model, name)).get_seq_length() == 60
    with pytest.raises(CacheFileError, match="of a model with other weights or adapters"):
        MomentCache.load(tmp_path / "x.safetensors", Whole(other, name))


def test_a_cache_is_of_its_adapter(tmp_path: Path):
    """A file, or a cache in memory, of the base model was taken by the adapted one: logits were off by 0.8."""
    base = tiny("llama")
    models = {"base": base, "adapted": adapted(base), "adapted otherwise": adapted(base, 0.2)}
    for name, model in models.items():
        cache = MomentCache(model, 30, **SMALL)
        with torch.no_grad():
            model(prompt(1, 60), past_key_values=cache)
        cache.save(tmp_path / name)
        for other, another in models.items():
            if other == name:
                assert MomentCache.load(tmp_path / name, another).get_seq_length() == 60
                continue
            with pytest.raises(CacheFileError, match="other weights or adapters"):
                MomentCache.load(tmp_path / name, another)
            with pytest.raises(ValueError, match="keys of a model with other weights"), torch.no_grad():
                another(prompt(1, 1), past_key_values=copy.deepcopy(cache))
        with torch.no_grad():
            model(prompt(1, 1), past_key_values=cache)


class Switched(Adapted):
    """The same, of several adapters: what of peft's layers says which are active."""

    disable_adapters = False
    active_adapters: tuple[str, ...] | list[str] = ("first",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) if self.disable_adapters else super().forward(x)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("place", ["self_attn.k_proj", "mlp.up_proj"])
def test_adapters_that_are_switched_after_a_text_was_read_are_noticed(place: str, static: bool, tmp_path: Path):
    model = copy.deepcopy(tiny("llama"))
    parent, _, name = place.partition(".")
    switched = Switched(getattr(getattr(model.model.layers[0], parent), name), 0.1)
    setattr(getattr(model.model.layers[0], parent), name, switched)
    cache, ids = MomentCache(model, 30, static=static, **SMALL), prompt(1, 1)
    with torch.no_grad():
        model(prompt(1, 60), past_key_values=cache)
        cache.save(tmp_path / "x")
        others = {"cache": cache, "file": MomentCache.load(tmp_path / "x", model), "copy": copy.deepcopy(cache)}
        twin = copy.deepcopy(cache)
        switched.active_adapters = ["second"]
        for one in others.values():
            with pytest.raises(ValueError, match=r"adapter 'first', and the model has the active adapter 'second'"):
                model(ids, past_key_values=one)
        switched.disable_adapters = True
        with pytest.raises(ValueError, match=r"of the active adapter 'first', and the model has no active adapter now"):
            model(ids, past_key_values=cache)
        base = MomentCache(model, 30, **SMALL)
        model(prompt(1, 60), past_key_values=base)
        switched.disable_adapters, switched.active_adapters = False, ["first"]
        with pytest.raises(ValueError, match=r"of no active adapter, and the model has the active adapter 'f"):
            model(ids, past_key_values=base)
        expected = model(ids, past_key_values=twin).logits
        for one in others.values():
            assert torch.equal(model(ids, past_key_values=one).logits, expected)


def test_files_of_before_are_compared_by_what_they_have():
    former = {"base_model.model.model.norm.weight": "1", "base_model.model.lm_head.base_layer.weight": "2"}
    assert agree(former, {"model.norm.weight": "1", "adapter lm_head.lora_A.weight": "3"})
    assert not agree(former, {"lm_head.weight": "3"})
    assert agree({}, former)
    assert not agree({"a": "1"}, {"b": "1"})


def test_read_takes_models_whose_weights_are_fetched_when_they_are_needed():
    """Their device is the meta device, where ids would lose their numbers."""
    accelerate = pytest.importorskip("accelerate")
    model, ids = copy.deepcopy(build(FAMILIES["llama"]())), prompt(1, 100)
    expected = read(model, ids, MomentCache(model, 24, **SMALL), twice=False)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.device.type == "meta"
    cache = read(model, ids, MomentCache(model, 24, **SMALL), twice=False)
    for ours, theirs in zip(cache.moment_layers.values(), expected.moment_layers.values(), strict=True):
        assert torch.equal(ours.keys, theirs.keys)


def test_asking_a_cache_whether_it_has_read_refuses_no_other_pass():
    """Phi-3's generate asks so, too; but so may anybody, in any thread."""
    model = tiny("phi3")
    limit = model.config.original_max_position_embeddings
    cache = MomentCache(model, 40)
    with torch.no_grad():
        assert not cache
        model(prompt(1, limit + 20))
        model(prompt(1, 30), past_key_values=cache)
        assert cache
        model(prompt(1, limit + 20))
    failed: list[BaseException] = []

    def beside() -> None:
        try:
            for _ in range(20):
                with torch.no_grad():
                    model(prompt(1, limit + 20))
        except BaseException as error:  # of a thread nothing else is seen
            failed.append(error)

    thread = threading.Thread(target=beside)
    thread.start()
    for _ in range(4):
        model.generate(prompt(1, 20), past_key_values=MomentCache(model, 40), max_new_tokens=5, do_sample=False)
    thread.join()
    assert not failed


def test_padding_behind_images_that_moved_positions_is_refused():
    """Positions counted by a mask would be those of before the images."""
    model = copy.deepcopy(tiny("llama"))
    cache = MomentCache(model, 200)
    read(model, prompt(2, 40), cache, twice=False)
    model.model.rope_deltas = torch.tensor([[-2], [-2]])
    mask = torch.ones(2, 60, dtype=torch.long)
    read(model, prompt(2, 10), cache, twice=False, attention_mask=mask[:, :50])
    mask[0, 50:53] = 0
    with pytest.raises(ValueError, match="images have moved the positions of this model"):
        read(model, prompt(2, 10), cache, twice=False, attention_mask=mask)
    assert cache.get_seq_length() == 50


@pytest.mark.parametrize("static", [False, True])
def test_a_summary_is_plain_and_holds_no_cache(static: bool):
    model = tiny("llama")
    cache = MomentCache(model, 30, static=static, **SMALL)
    with torch.no_grad():
        model(prompt(1, 60), past_key_values=cache)
    summary = cache.summary()
    assert json.loads(json.dumps(dataclasses.asdict(summary)))["seen"] == 60
    assert type(summary.seen) is int
    layer = weakref.ref(next(iter(cache.moment_layers.values())))
    del cache
    gc.collect()
    assert layer() is None


def test_what_is_no_cache_or_model_is_named():
    model = tiny("llama")
    with pytest.raises(TypeError, match="cache is a DynamicCache; FinishedRows is for a MomentCache"):
        FinishedRows(DynamicCache(config=model.config), 5)
    with pytest.raises(TypeError, match="cache is a DynamicCache; DecodeGraphs steps with a MomentCache"):
        DecodeGraphs(model, DynamicCache(config=model.config))
    with pytest.raises(TypeError, match="model is a LlamaConfig; give the model that reads"):
        read(model.config, prompt(1, 40), MomentCache(model, 30, **SMALL), twice=False)
    with pytest.raises(ValueError, match=r"eos_token_id is \[\] and criteria is empty"):
        FinishedRows(MomentCache(model, 30, **SMALL), [])
    with pytest.raises(ValueError, match="trial is True, of a text of 100 tokens"):
        read(model, prompt(1, 100), MomentCache(model, 30, bits="auto", **SMALL), twice=False, trial=True)


def test_a_request_may_be_a_row_of_ids_and_nothing_else():
    assert request_of(None, torch.tensor([[5, 6]]), False) == request_of(None, [5, 6], False) == [5, 6]
    with pytest.raises(ValueError, match=r"request is of shape \(2, 2\); give one row of token ids"):
        request_of(None, torch.ones(2, 2, dtype=torch.long), False)
    with pytest.raises(TypeError, match=r"request is \[\[5, 6\]\]"):
        request_of(None, [[5, 6]], False)


def test_a_chat_template_that_wants_more_is_named():
    from jinja2.exceptions import TemplateError

    def refuse(*_: Any, **__: Any) -> str:
        raise TemplateError("need system")

    with pytest.raises(ValueError, match=r"takes no single turn of a user \(need system\); give text and request as"):
        around(SimpleNamespace(chat_template="x", apply_chat_template=refuse))

"""Cache files: what is loaded goes on to the last bit, and what is not exactly that is refused by name."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from contents import assert_same, contents
from models import FAMILIES, SIZES, build, left_padded, prompt, tiny
from transformers import LlamaConfig

from momentkv import Tokens
from momentkv.codes import Standard
from momentkv.hf import CacheFileError, MomentCache, files
from momentkv.policies import H2O, POLICIES, Policy
from momentkv.statistics.corrections import AnchoredSummaries, PaperMoments
from momentkv.trust import trust

SMALL: dict[str, Any] = {"sinks": 1, "window": 8, "block": 4}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "layers": {"sharing": "layers", "policy": "tova"},
    "paper": {"sharing": "uniform", "policy": "momentkv", "correction": "moments"},
    "plain": {"sharing": "uniform", "order": None, "policy": H2O(observes=16)},
    "order 0": {"order": 0, "correction": AnchoredSummaries(summaries=3, rank=1, strength=0.5)},
    "share": {"budget": 0.4},
    "ada-kv": {"sharing": "ada-kv", "policy": "snapkv"},
    "pyramid": {"sharing": "pyramid"},
    "bytes": {"budget": "66KiB", "bits": None},
    "few bits": {"bits": 4},
    "few bits, bytes": {"bits": 3, "budget": "30KiB"},
    "chosen bits": {"bits": "auto", "budget": "36KiB"},
    "certified": {"certify": 2},
    "certified, few bits": {"certify": 2, "bits": 4},
    "certified, order 0": {"certify": 0, "sharing": "uniform", "correction": "moments"},
}


def conversation() -> tuple[torch.Tensor, torch.Tensor]:
    return left_padded([prompt(1, 60, seed=1), prompt(1, 47, seed=2)])


def read(model: Any, budget: Any = 16, **settings: Any) -> MomentCache:
    """A cache that has evicted, with a padded row and a few tokens since."""
    cache = MomentCache(model, budget, **(SMALL | settings))
    ids, mask = conversation()
    with torch.no_grad():
        for start, stop in ((0, 58), (58, 59), (59, 60)):
            positions = (mask[:, :stop].cumsum(1) - 1).clamp(min=0)[:, start:stop]
            model(ids[:, start:stop], attention_mask=mask[:, :stop], position_ids=positions, past_key_values=cache)
    return cache


def go_on(model: Any, cache: MomentCache, new: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = conversation()
    ids, mask = (torch.cat([x, y], 1) for x, y in ((ids, prompt(2, 40, seed=5)), (mask, torch.ones(2, 40).long())))
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return out.sequences, torch.stack(out.logits)


def state(cache: MomentCache) -> dict[str, Any]:
    held: dict[str, Any] = {}
    for index, layer in enumerate(cache.layers):
        core = cache.moment_layers.get(index)
        if core is None:
            held |= {f"{index}.{name}": getattr(layer, name) for name in ("keys", "values", "cumulative_length")}
        else:
            held |= {f"{index}.{name}": x for name, x in (contents(core) | {"scale": core.scale}).items()}
            # In slots that hold no token too: products over them round as they did.
            held |= {f"{index}.arrays.{name}": x for name, x in core.arrays().items()}
    return held


@pytest.mark.parametrize(
    ("family", "kind"), [*(("llama", kind) for kind in KINDS), ("gemma3", "default"), ("gemma3", "paper")]
)
def test_a_loaded_cache_goes_on_to_the_last_bit_as_the_saved_one(family: str, kind: str, tmp_path: Path):
    model = tiny(family)
    cache = read(model, **KINDS[kind])
    cache.save(tmp_path / "cache")
    loaded = MomentCache.load(tmp_path / "cache", model)
    assert repr(loaded) == repr(cache)
    assert_same(state(loaded), state(cache))
    for a, b in zip(go_on(model, loaded), go_on(model, cache), strict=True):
        assert torch.equal(a, b)
    assert_same(state(loaded), state(cache))
    assert all((core.moments.weight > 0).all() or core.config.order is None for core in cache.moment_layers.values())


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_every_policy_comes_back_with_its_parameters(policy: str, tmp_path: Path):
    model = tiny("llama")
    kind = POLICIES[policy]
    changed = kind(**{field.name: 7 for field in dataclasses.fields(kind) if field.name in ("observes", "seed")})
    cache = MomentCache(model, 16, policy=changed, **SMALL)
    cache.save(tmp_path / "cache")
    loaded = MomentCache.load(tmp_path / "cache", model)
    assert next(iter(loaded.moment_layers.values())).config.policy == changed


def test_caches_that_have_read_nothing_or_evicted_nothing_come_back(tmp_path: Path):
    model = tiny("gemma3")
    for cache in (MomentCache(model, 64, window=8), read(model, 400)):
        cache.save(tmp_path / "cache")
        loaded = MomentCache.load(tmp_path / "cache", model)
        assert_same(state(loaded), state(cache))
        assert torch.equal(go_on(model, loaded)[1], go_on(model, cache)[1])


def test_half_precision_comes_back(tmp_path: Path):
    model = tiny("qwen3", "momentkv", "bfloat16")
    cache = read(model)
    cache.save(tmp_path / "cache")
    assert_same(state(MomentCache.load(tmp_path / "cache", model)), state(cache))


def test_saving_changes_nothing(tmp_path: Path):
    a, b = (read(tiny("llama")) for _ in range(2))
    a.save(tmp_path / "cache")
    assert_same(state(a), state(b))
    assert torch.equal(go_on(tiny("llama"), a)[1], go_on(tiny("llama"), b)[1])


class Own(Policy):
    """Not one of momentkv's."""

    name = "own"

    def importance(self, tokens: Tokens) -> Any:
        return tokens.positions


def test_a_policy_of_ones_own_is_asked_for(tmp_path: Path):
    model = tiny("llama")
    cache = read(model, policy=Own())
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"policy of your own, 'own'.*policy="):
        MomentCache.load(tmp_path / "cache", model)
    loaded = MomentCache.load(tmp_path / "cache", model, policy=Own())
    assert torch.equal(go_on(model, loaded)[1], go_on(model, cache)[1])
    read(model).save(tmp_path / "cache")
    with pytest.raises(ValueError, match=r"policy is .*Own.* 'balanced'; leave policy out"):
        MomentCache.load(tmp_path / "cache", model, policy=Own())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "cache"
    read(tiny("llama")).save(path)
    return path.read_bytes()


def rewritten(data: bytes, change: Any, sign: bool = False) -> bytes:
    """A well-formed file with another record; signed, its digest fits."""
    tensors = safetensors.torch.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    record = json.loads(header["momentkv"])
    change(record, tensors)
    header["momentkv"] = json.dumps(record, sort_keys=True)
    if sign:
        header["digest"] = files.digest(header["momentkv"], tensors)
    return safetensors.torch.save(tensors, header)


def longer(record: Any, tensors: Any) -> None:
    record["seen"] += 1


def nudged(record: Any, tensors: Any) -> None:
    tensors["0.recent_keys"].view(-1)[0] += 1


def fewer(record: Any, tensors: Any) -> None:
    del tensors["1.evicted.codes.16"]


def newer(record: Any, tensors: Any) -> None:
    record["format"] = 99


def other_moments(record: Any, tensors: Any) -> None:
    record["settings"]["correction"]["parameters"]["summaries"] = 5


DAMAGES: dict[str, tuple[Any, str]] = {
    "empty": (lambda data: b"", "damaged or no cache file"),
    "text": (lambda data: b"a text" * 100, "damaged or no cache file"),
    "cut short": (lambda data: data[:-1], "damaged or no cache file"),
    "cut in the header": (lambda data: data[:50], "damaged or no cache file"),
    "a bit flipped in the tensors": (lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "has been changed"),
    "another safetensors file": (lambda data: safetensors.torch.save({"x": torch.zeros(2)}), "no cache of momentkv"),
    "record edited": (lambda data: rewritten(data, longer), "has been changed"),
    "tensor edited": (lambda data: rewritten(data, nudged), "has been changed"),
    "tensor missing": (lambda data: rewritten(data, fewer), "has been changed"),
    "another version": (lambda data: rewritten(data, newer), r"format 99, this momentkv reads 1 and 2"),
    "another version, signed": (lambda data: rewritten(data, newer, sign=True), r"format 99"),
    "other moments": (lambda data: rewritten(data, other_moments, sign=True), "statistics of another make"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_what_was_written_is_refused_by_name(damage: str, saved: bytes, tmp_path: Path):
    change, message = DAMAGES[damage]
    (tmp_path / "cache").write_bytes(change(saved))
    with pytest.raises(CacheFileError, match=message):
        MomentCache.load(tmp_path / "cache", tiny("llama"))


def test_the_undamaged_file_is_read(saved: bytes, tmp_path: Path):
    (tmp_path / "cache").write_bytes(saved)
    assert MomentCache.load(tmp_path / "cache", tiny("llama")).get_seq_length() == 60
    (tmp_path / "cache").write_bytes(rewritten(saved, lambda *_: None, sign=True))
    assert MomentCache.load(tmp_path / "cache", tiny("llama")).get_seq_length() == 60


def test_files_of_version_0_1_still_load(tmp_path: Path):
    """Which named no correction "none" and no order in one, and wrote empty moments beside plain eviction."""
    model = tiny("llama")
    for order in (None, 0, 1):
        cache = read(model, sharing="uniform", policy="knorm", correction="moments", order=order)
        cache.save(tmp_path / "cache")

        def former(record: Any, tensors: Any, order: int | None = order) -> None:
            assert record["settings"]["order"] == order
            record["settings"]["correction"] = {"name": "moments", "parameters": {}}
            for n in range(len(record["layers"])) if order is None else ():
                tensors[f"{n}.0.moments.weight"] = torch.zeros(2, 2)
                for name in ("key_mean", "value_mean"):
                    tensors[f"{n}.0.moments.{name}"] = torch.zeros(2, 2, 16)

        (tmp_path / "cache").write_bytes(rewritten((tmp_path / "cache").read_bytes(), former, sign=True))
        for correction in (None, PaperMoments(), PaperMoments(order=order or 0)):
            loaded = MomentCache.load(tmp_path / "cache", model, correction=correction)
            assert_same(state(loaded), state(cache))
            assert loaded.nbytes == cache.nbytes
        if order is not None:  # otherwise all corrections are none
            with pytest.raises(ValueError, match="leave correction out"):
                MomentCache.load(tmp_path / "cache", model, correction=AnchoredSummaries())


@torch.inference_mode()
def test_files_of_before_part_of_the_window_was_rounded_go_on_with_all_of_it_exact(tmp_path: Path):
    model, ids = tiny("llama"), prompt(2, 60)
    cache = MomentCache(model, 20, bits=4, window=8, exact_window=8, block=4)
    model(ids, past_key_values=cache)
    cache.save(tmp_path / "cache")
    (tmp_path / "cache").write_bytes(
        rewritten(
            (tmp_path / "cache").read_bytes(), lambda record, _: record["settings"].pop("exact_window"), sign=True
        )
    )
    loaded = MomentCache.load(tmp_path / "cache", model)
    assert_same(state(loaded), state(cache))
    for t in range(10):
        one, other = (model(ids[:, t : t + 1], past_key_values=each).logits for each in (cache, loaded))
        assert torch.equal(one, other)


def test_a_missing_file_is_missing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no cache file"):
        MomentCache.load(tmp_path / "cache", tiny("llama"))


def test_a_cache_of_another_model_is_refused_by_what_differs(saved: bytes, tmp_path: Path):
    (tmp_path / "cache").write_bytes(saved)
    with pytest.raises(CacheFileError, match=r"another model: its model_type is 'llama', that of this model 'qwen2'"):
        MomentCache.load(tmp_path / "cache", tiny("qwen2"))
    for change, name in (
        ({"num_hidden_layers": 3}, "layers"),
        ({"hidden_size": 128}, "hidden_size"),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters"),
    ):
        with pytest.raises(CacheFileError, match=f"another model: its {name} is"):
            MomentCache.load(tmp_path / "cache", build(LlamaConfig(**(SIZES | change))))


def test_a_cache_of_other_weights_is_refused(saved: bytes, tmp_path: Path):
    (tmp_path / "cache").write_bytes(saved)
    model = build(FAMILIES["llama"]())
    assert MomentCache.load(tmp_path / "cache", model).get_seq_length() == 60
    with torch.no_grad():
        model.lm_head.weight += 0.01
    with pytest.raises(CacheFileError, match="other weights or adapters"):
        MomentCache.load(tmp_path / "cache", model)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny("llama")
    cache = read(model)
    cache.save(tmp_path / "cache")
    before = (tmp_path / "cache").read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        read(model, 20).save(tmp_path / "cache")
    assert (tmp_path / "cache").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_recorded_passes_are_not_saved(tmp_path: Path):
    model = tiny("llama")
    cache = MomentCache(model, 16, **SMALL)
    cache.activate_past_recording()
    with torch.no_grad():
        model(prompt(1, 40), past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"recorded passes wait.*crop\(0\)"):
        cache.save(tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    cache.crop(0)
    cache.save(tmp_path / "cache")
    assert MomentCache.load(tmp_path / "cache", model).get_seq_length() == 40


@pytest.mark.parametrize(("sharing", "bits"), [("heads", None), ("uniform", None), ("heads", 8)])
def test_certified_caches_keep_evidence_bounds_and_what_they_refused(tmp_path: Path, sharing: str, bits: int | None):
    """Bounds of the loaded cache are those of the saved one, bit for bit, and so is what it goes on to refuse."""
    model, path = tiny("llama"), tmp_path / "cache"
    with pytest.warns(UserWarning, match="an eviction was refused"):
        cache = read(model, certify=1, tolerance=1e-6, sharing=sharing, bits=bits)
    cache.save(path)
    loaded = MomentCache.load(path, model)
    q = torch.randn((2, 4, 3, 16), generator=torch.Generator().manual_seed(0))
    for a, b in zip(cache.moment_layers.values(), loaded.moment_layers.values(), strict=True):
        for x, y in zip(trust(a, q), trust(b, q), strict=True):
            assert torch.equal(x, y)
        assert b.evidence is not None
        assert (b.config.certify, b.config.tolerance, b.refused, b.budget) == (1, 1e-6, a.refused, a.budget)
        assert a.arrays().keys() == b.arrays().keys()
        assert all(torch.equal(x, b.arrays()[name]) for name, x in a.arrays().items())
    assert any(core.refused for core in loaded.moment_layers.values())


def test_codes_whose_losses_are_missing_are_refused_where_they_must_be_certified(tmp_path: Path):
    path = tmp_path / "cache"
    read(tiny("llama"), certify=1, bits=4).save(path)

    def forget(record: Any, tensors: Any) -> None:
        for name in [name for name in tensors if name.endswith("key_loss")]:
            del tensors[name]

    path.write_bytes(rewritten(path.read_bytes(), forget, sign=True))
    with pytest.raises(CacheFileError, match="what codes have lost is missing"):
        MomentCache.load(path, tiny("llama"))


@pytest.mark.parametrize("order", [lambda x: x.clamp(max=3), lambda x: x[..., :8]], ids=["twice", "short"])
def test_an_order_of_channels_that_is_none_is_refused(order: Any, tmp_path: Path):
    path = tmp_path / "cache"
    read(tiny("llama"), bits=4).save(path)

    def change(record: Any, tensors: Any) -> None:
        tensors["0.key_order"] = order(tensors["0.key_order"]).contiguous()

    path.write_bytes(rewritten(path.read_bytes(), change, sign=True))
    with pytest.raises(CacheFileError, match="key_order is no order of the channels of a key"):
        MomentCache.load(path, tiny("llama"))


# In the second one of the rows has not evicted yet; when it does, its tokens are coded anew beside the other's.
@pytest.mark.parametrize("budget", [16, 50, "30KiB"])
def test_files_of_before_channels_were_graded_go_on_with_as_many_bits_for_all(
    budget: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, path = tiny("llama"), tmp_path / "cache"
    with monkeypatch.context() as before:
        before.setattr(Standard, "graded", lambda self, bits, queries: self)
        cache = read(model, budget, bits=4)
        cache.save(path)
    assert "0.key_order" not in safetensors.torch.load_file(path)
    loaded = MomentCache.load(path, model)
    assert_same(state(loaded), state(cache))
    assert torch.equal(go_on(model, loaded, 30)[1], go_on(model, cache, 30)[1])


def test_evidence_of_another_order_is_refused(tmp_path: Path):
    path = tmp_path / "cache"
    read(tiny("llama"), certify=1).save(path)

    def ask_for_more(record: Any, tensors: Any) -> None:
        record["settings"]["certify"] = 2

    path.write_bytes(rewritten(path.read_bytes(), ask_for_more, sign=True))
    with pytest.raises(CacheFileError, match="holds no evidence of order 2"):
        MomentCache.load(path, tiny("llama"))

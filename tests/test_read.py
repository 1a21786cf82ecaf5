"""Reading a text into a cache once and twice: what is stored, what scores are, and what is left when it fails."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import COMPRESSED, FAMILIES, SIZES, build, left_padded, prompt, tiny
from transformers import DynamicCache, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from momentkv.hf import MomentCache, read
from momentkv.hf.layer import MomentLayer
from momentkv.hf.stretches import begins_of, most_novel

REQUEST = [5, 7, 11]


def made(family: str, budget: Any = 60, **options: Any) -> MomentCache:
    return MomentCache(tiny(family), budget, **({"policy": "second-reading", "block": 8} | options))


def read_tiny(family: str, ids: torch.Tensor, cache: MomentCache, **options: Any) -> MomentCache:
    return read(tiny(family), ids, cache, **({"request": REQUEST, "progress": False} | options))


def interrupted(call: int) -> Callable[..., Any]:
    """`MomentLayer.attend` with Ctrl-C at one of its calls."""
    calls, attend = itertools.count(1), MomentLayer.attend

    def attending(self: MomentLayer, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return attend(self, *args, **kwargs)

    return attending


def contents(cache: MomentCache) -> list[list[torch.Tensor]]:
    """All arrays of a cache, stock layers included."""
    return [
        list(layer.core.arrays().values()) if isinstance(layer, MomentLayer) else [layer.keys, layer.values]
        for layer in cache.layers
    ]


@pytest.mark.parametrize("family", COMPRESSED)
def test_what_stays_is_bit_for_bit_the_first_reading(family: str):
    ids = prompt(2, 150)
    once = read_tiny(family, ids, made(family, 400), twice=False, chunk=64)
    # Hybrid models have layers with a window, which a second reading must leave as the first one did.
    twice = read_tiny(family, ids, made(family, 400), chunk=64)
    small = read_tiny(family, ids, made(family, 60), chunk=64)
    assert once.get_seq_length() == twice.get_seq_length() == small.get_seq_length() == ids.shape[1]
    for mine, other, few in zip(twice.layers, once.layers, small.layers, strict=True):
        assert torch.equal(mine.keys, other.keys)
        assert torch.equal(mine.values, other.values)
        if not isinstance(mine, MomentLayer):
            assert torch.equal(few.keys, other.keys)
            continue
        assert torch.equal(mine.core.positions, other.core.positions)
        places = few.core.positions.long()
        assert (places >= 0).sum() < (other.core.positions >= 0).sum()
        index = places.clamp(min=0)[..., None]
        for kept, whole in ((few.keys, other.keys), (few.values, other.values)):
            expected = whole.gather(2, index.expand(-1, -1, -1, whole.shape[-1]))
            assert torch.equal(kept[places >= 0], expected[places >= 0])


@pytest.mark.parametrize("family", COMPRESSED)
def test_scores_are_the_largest_attention_weights_of_the_text_said_again(family: str):
    """Against the weights of eager attention over text, request and text as one sequence."""
    ids = prompt(1, 40)
    cache = read_tiny(family, ids, made(family, 400))
    whole = torch.cat([ids, torch.tensor([REQUEST]), ids], dim=1)
    eager = tiny(family, "eager")
    with torch.no_grad():
        attentions = eager(whole, output_attentions=True).attentions
    for index, core in cache.moment_layers.items():
        weights = attentions[index][0, :, ids.shape[1] :, : ids.shape[1]]
        expected = weights.amax(1).unflatten(0, (core.keys.shape[1], -1)).amax(1)
        # Layers before it have added up some roundings, in weights that large logits make sensitive.
        torch.testing.assert_close(core.attention[0], expected, rtol=0, atol=2e-4)


def test_parts_are_said_again_from_the_whole_text():
    """Each part with the tokens before it, so that it is clear where it begins; a token's score is the best of all."""
    ids = prompt(1, 60)
    cache = read_tiny("llama", ids, made("llama", 400), chunk=30)
    eager = tiny("llama", "eager")
    passes = [torch.cat([ids, torch.tensor([REQUEST]), part], 1) for part in (ids[:, :30], ids[:, 22:])]
    with torch.no_grad():
        attentions = [eager(one, output_attentions=True).attentions for one in passes]
    for index, core in cache.moment_layers.items():
        weights = torch.cat([one[index][0, :, 60:, :60] for one in attentions], dim=1)
        expected = weights.amax(1).unflatten(0, (core.keys.shape[1], -1)).amax(1)
        torch.testing.assert_close(core.attention[0], expected, rtol=0, atol=2e-4)


def test_of_a_share_only_the_most_novel_stretches_are_said_again():
    """Against eager attention over text, request and those stretches, each with the tokens before it."""
    ids = prompt(1, 300)
    cache = read_tiny("llama", ids, made("llama", 400), twice=0.4)
    # Five stretches, of which two are said; novelty by its own formula, in double precision.
    places = torch.zeros(300, dtype=torch.float64)
    for core in cache.moment_layers.values():
        both = torch.ones(())
        for x in (core.keys[0].double(), core.values[0].double()):
            off = x - x.mean(1, keepdim=True)
            covariance = off.mT @ off / 300
            ridge = 1e-3 * covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(x.shape[-1])
            both = both * (off * torch.linalg.solve(covariance + ridge, off.mT).mT).sum(-1)
        places += both.argsort(1).argsort(1).double().mean(0)
    begins = [0, 56, 120, 184, 228]
    best = sorted(sorted(begins, key=lambda begin: -float(places[begin : begin + 72].mean()))[:2])
    said = torch.cat([torch.tensor([REQUEST]), *(ids[:, begin : begin + 72] for begin in best)], 1)
    with torch.no_grad():
        attentions = tiny("llama", "eager")(torch.cat([ids, said], 1), output_attentions=True).attentions
    for index, core in cache.moment_layers.items():
        weights = attentions[index][0, :, 300:, :300]
        expected = weights.amax(1).unflatten(0, (core.keys.shape[1], -1)).amax(1)
        torch.testing.assert_close(core.attention[0], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_share_of_one_is_all_and_of_zero_none(family: str):
    ids = prompt(1, 200)
    for share, flag in ((1.0, True), (0.0, False)):
        one, other = (contents(read_tiny(family, ids, made(family), twice=x, chunk=80)) for x in (share, flag))
        for mine, own in zip(one, other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(mine, own, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("chunk", [40, 150, 500])
def test_each_row_has_a_share_of_its_own_said_again(family: str, chunk: int):
    rows = [prompt(1, 300, seed) for seed in (0, 1)]
    batch = read_tiny(family, torch.cat(rows), made(family, 400), twice=0.4, chunk=chunk)
    for row, ids in enumerate(rows):
        alone = read_tiny(family, ids, made(family, 400), twice=0.4, chunk=chunk)
        for mine, core in zip(batch.moment_layers.values(), alone.moment_layers.values(), strict=True):
            torch.testing.assert_close(mine.attention[row], core.attention[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_padding_is_not_said_again(family: str):
    """A row that fits in one stretch is said whole, whatever lies beside it."""
    rows = [prompt(1, 60, 0), prompt(1, 300, 1)]
    ids, mask = left_padded(rows)
    batch = read_tiny(family, ids, made(family, 400), attention_mask=mask, twice=0.3)
    alone = read_tiny(family, rows[0], made(family, 400), twice=0.3)
    for mine, core in zip(batch.moment_layers.values(), alone.moment_layers.values(), strict=True):
        real = mine.positions[0, 0] >= 0
        assert int(real.sum()) == 60
        torch.testing.assert_close(mine.attention[0][:, real], core.attention[0], rtol=0, atol=2e-4)


def test_stretches_cover_a_text_and_as_many_as_a_share_are_chosen():
    for n, stretch in itertools.product((1, 40, 64, 71, 72, 73, 200, 1000), (1, 10, 64)):
        begins, size = begins_of(n, stretch)
        covered = {place for begin in begins for place in range(begin, begin + size)}
        assert covered == set(range(n))
        chosen = most_novel(torch.rand(3, n), 0.5, stretch)
        assert chosen.shape == (3, max(1, round(0.5 * len(begins))), size)
        assert (chosen[:, 1:, 0] > chosen[:, :-1, 0]).all()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_rows_of_a_padded_batch_are_read_as_alone(family: str):
    rows = [prompt(1, 50, 0), prompt(1, 80, 1)]
    ids, mask = left_padded(rows)
    batch = read_tiny(family, ids, made(family, 400), attention_mask=mask, chunk=45)
    for row, own in enumerate(rows):
        # Parts of the batch are parts of its columns; of a row that is all pad in the first, that is the whole row.
        alone = read_tiny(family, own, made(family, 400), chunk=100)
        for mine, core in zip(batch.moment_layers.values(), alone.moment_layers.values(), strict=True):
            real = mine.positions[row, 0] >= 0
            assert int(real.sum()) == own.shape[1]
            torch.testing.assert_close(mine.keys[row][:, real], core.keys[0], rtol=0, atol=2e-5)
    # Padding at the right is no different.
    flipped = read_tiny(
        family,
        torch.stack([x.roll(int(m.sum())) for x, m in zip(ids, mask, strict=True)]),
        made(family, 400),
        attention_mask=mask.flip(1),
    )
    for mine, core in zip(flipped.moment_layers.values(), batch.moment_layers.values(), strict=True):
        torch.testing.assert_close(mine.keys, core.keys, rtol=0, atol=2e-5)
    # In one part, scores are those of the row alone, too.
    batch = read_tiny(family, ids, made(family, 400), attention_mask=mask)
    for row, own in enumerate(rows):
        alone = read_tiny(family, own, made(family, 400))
        for mine, core in zip(batch.moment_layers.values(), alone.moment_layers.values(), strict=True):
            real = mine.positions[row, 0] >= 0
            torch.testing.assert_close(mine.attention[row][:, real], core.attention[0], rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_cache_that_has_read_generates_copies_and_is_saved(family: str, tmp_path: Path):
    ids, question = prompt(1, 120), prompt(1, 5, 1)
    cache = read_tiny(family, ids, made(family, policy="twice"))
    cache.save(tmp_path / "text.safetensors")
    both = torch.cat([ids, question], 1)

    def answer(held: MomentCache) -> torch.Tensor:
        options = {"attention_mask": torch.ones_like(both), "max_new_tokens": 12, "do_sample": False}
        return tiny(family).generate(both, past_key_values=held, **options)

    loaded = MomentCache.load(tmp_path / "text.safetensors", tiny(family))
    first = answer(copy.deepcopy(cache))
    assert torch.equal(first, answer(copy.deepcopy(cache)))
    assert torch.equal(first, answer(loaded))
    assert max(core.stored for core in loaded.moment_layers.values()) < both.shape[1]


@pytest.mark.parametrize("budget", [60, 0.4, "40KiB"])
def test_a_budget_is_that_of_the_text_and_not_of_its_second_reading(budget: Any):
    cache = read_tiny("llama", prompt(1, 200), made("llama", budget, sharing="uniform"), chunk=50)
    if budget == "40KiB":
        once = read_tiny("llama", prompt(1, 200), made("llama", budget, sharing="uniform"), twice=False)
        assert cache.nbytes <= 40 * 1024
        assert [core.budget for core in cache.moment_layers.values()] == [x.budget for x in once.moment_layers.values()]
    else:
        assert {core.stored for core in cache.moment_layers.values()} == {60 if budget == 60 else 80}


def test_a_text_in_segments_is_never_stored_as_a_whole(monkeypatch: pytest.MonkeyPatch):
    ids, peak = prompt(1, 400), 0
    attend = MomentLayer.attend

    def watched(self: MomentLayer, *args: Any, **kwargs: Any) -> Any:
        nonlocal peak
        result = attend(self, *args, **kwargs)
        peak = max(peak, self.core.stored)
        return result

    monkeypatch.setattr(MomentLayer, "attend", watched)
    cache = read_tiny("llama", ids, made("llama", 60, sharing="uniform"), segment=50, chunk=50)
    assert cache.get_seq_length() == 400
    assert peak == 60 + 50
    for core in cache.moment_layers.values():
        assert core.stored == 60
    # What was chosen comes from all segments, with scores of its own.
    assert len({int(p) // 50 for core in cache.moment_layers.values() for p in core.positions.flatten()}) > 4


def test_segments_go_on_where_an_earlier_reading_ended():
    ids = prompt(1, 200)
    whole = read_tiny("gemma3", ids, made("gemma3", 60), segment=100)
    parts = read_tiny("gemma3", ids[:, :100], made("gemma3", 60))
    parts = read_tiny("gemma3", ids[:, 100:], parts)
    for one, other in zip(contents(whole), contents(parts), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_a_static_cache_goes_on_in_place():
    ids = prompt(1, 120)
    static, plain = (read_tiny("llama", ids, made("llama", static=on), chunk=50) for on in (True, False))
    for token in prompt(1, 20, 1)[0]:
        with torch.no_grad():
            one, other = (tiny("llama")(token[None, None], past_key_values=x).logits for x in (static, plain))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="a static cache reads a text when it is empty"):
        read_tiny("llama", ids, static)
    with pytest.raises(ValueError, match="segment is 60, but a static cache reads in one piece"):
        read_tiny("llama", ids, made("llama", static=True), segment=60)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("call", [1, 5, 9])
@pytest.mark.parametrize("held", [0, 90])
def test_ctrl_c_leaves_model_and_cache_as_they_were(family: str, call: int, held: int, monkeypatch: pytest.MonkeyPatch):
    model, cache, ids = tiny(family), made(family), prompt(1, 100)
    if held:
        read_tiny(family, prompt(1, held, 1), cache)
    before = contents(cache) if held else None
    with monkeypatch.context() as patched:
        patched.setattr(MomentLayer, "attend", interrupted(call))
        state = f"the cache holds the {held} tokens" if held else "the cache is empty"
        with pytest.raises(KeyboardInterrupt, match=f"reading was interrupted: {state}"):
            read_tiny(family, ids, cache, chunk=40)
    assert not model.training
    assert cache.get_seq_length() == held
    assert all(layer.reader is None for layer in cache.layers if isinstance(layer, MomentLayer))
    if before is not None:
        for one, other in zip(before, contents(cache), strict=True):
            assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))
    # And it can be read again, as if nothing had been.
    fresh = made(family)
    if held:
        read_tiny(family, prompt(1, held, 1), fresh)
    for one, other in zip(*(contents(read_tiny(family, ids, x)) for x in (cache, fresh)), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


def test_what_cannot_be_read_is_refused_by_name():
    ids, model = prompt(1, 50), tiny("llama")
    for inputs, options, message in (
        (ids, {"request": "Say it again."}, "only a tokenizer can read; pass tokenizer="),
        ("a text", {}, "inputs is text, which only a tokenizer can read"),
        (ids[0], {}, r"inputs is \(50,\); give text, or token ids"),
        (ids[:, :0], {}, "inputs has no tokens"),
        (ids, {"chunk": 0}, "chunk is 0"),
        (ids, {"twice": 1.5}, "twice is 1.5; use True, False, or a share of the text from 0 to 1"),
        (ids, {"twice": -0.1}, "twice is -0.1"),
        (ids, {"twice": float("nan")}, "twice is nan"),
        (ids, {"twice": "half"}, "twice is 'half'"),
        (ids, {"segment": 0}, "segment is 0"),
        (ids, {"attention_mask": torch.ones(1, 49)}, r"attention_mask has shape \(1, 49\)"),
    ):
        with pytest.raises(ValueError, match=message):
            read(model, inputs, made("llama"), **({"request": REQUEST} | options))
    with pytest.raises(ValueError, match="policy is 'balanced', which does not look at a second reading"):
        read(model, ids, MomentCache(model), request=REQUEST)
    recording = made("llama")
    recording.activate_past_recording()
    with torch.no_grad():
        model(ids, past_key_values=recording)
    with pytest.raises(RuntimeError, match="recorded passes wait for crop"):
        read(model, ids, recording, request=REQUEST)
    sliding = tiny("mistral sliding")
    with pytest.raises(ValueError, match="no layer of this model is compressed"):
        read(sliding, ids, MomentCache(sliding, policy="twice"), request=REQUEST)
    short = build(FAMILIES["llama"](max_position_embeddings=100))
    with pytest.raises(ValueError, match="ends at token 50 of the 100"):
        read(short, ids, MomentCache(short, policy="twice"), request=REQUEST)
    assert read(short, ids, MomentCache(short), twice=False).get_seq_length() == 50


@pytest.mark.parametrize("twice", [False, True])
def test_a_text_does_not_stand_where_images_of_another_moved_it(twice: bool, monkeypatch: pytest.MonkeyPatch):
    """Models of images keep how far positions were moved by those that they saw last."""
    sections = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    config = Qwen2VLConfig(text_config=SIZES | {"rope_parameters": sections}, vision_config=vision)
    model = build(config, of=Qwen2VLForConditionalGeneration)
    ids, keys = prompt(1, 100), []
    for deltas in (None, torch.tensor([[-12]]), torch.tensor([[0], [0]])):
        model.model.rope_deltas = deltas
        cache = MomentCache(model, 60, policy="second-reading" if twice else "balanced", block=8)
        read(model, ids, cache, twice=twice, chunk=30, request=REQUEST, progress=False)
        keys.append([core.keys for core in cache.moment_layers.values()])
    for other in keys[1:]:
        torch.testing.assert_close(other, keys[0], rtol=0, atol=0)
    kept = model.model.rope_deltas = torch.tensor([[-12]])
    monkeypatch.setattr(MomentLayer, "attend", interrupted(3))
    with pytest.raises(KeyboardInterrupt):
        read(model, ids, MomentCache(model, 60), twice=False, chunk=30, progress=False)
    assert model.model.rope_deltas is kept


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"chunk": None}, TypeError, "chunk is None"),
        ({"chunk": 1.5}, TypeError, "chunk is 1.5"),
        ({"segment": "a"}, TypeError, "segment is 'a'"),
        ({"segment": 2.5}, TypeError, "segment is 2.5"),
        ({"request": None}, TypeError, "request is None; give it as text"),
        ({"request": 5}, TypeError, "request is 5; give it as text"),
    ],
)
def test_what_is_no_number_and_no_request_is_named(options: dict[str, Any], error: type[Exception], message: str):
    cache = made("llama")
    with pytest.raises(error, match=message):
        read_tiny("llama", prompt(1, 90), cache, **options)
    assert not cache


def test_one_reads_into_a_cache_of_momentkv():
    stock = DynamicCache(config=tiny("llama").config)
    with pytest.raises(TypeError, match="cache is a DynamicCache; read into a MomentCache"):
        read(tiny("llama"), prompt(1, 90), stock, twice=False)
    with pytest.raises(TypeError, match=r"rollback is 1.5, a float"):
        made("llama", rollback=1.5)


class Wrapped(torch.nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": Wrapped(tiny("llama"))}, TypeError, r"model is .*Wrapped, which holds a model; pass that itself"),
        ({"tokenizer": "gpt2"}, TypeError, r"tokenizer is 'gpt2'; load it first: AutoTokenizer.from_pretrained"),
        ({"tokenizer": 7}, TypeError, "tokenizer is a int; give the model's tokenizer, or token ids"),
        ({"inputs": {"ids": prompt(1, 60)}}, ValueError, r"inputs has \['ids'\], and no input_ids"),
        (
            {"inputs": {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}},
            ValueError,
            r"inputs is list; .*: tokenizers return such with return_tensors=\"pt\"",
        ),
    ],
)
def test_who_reads_and_what_is_read_are_named(change: dict[str, Any], error: type[Exception], message: str):
    given = {"model": tiny("llama"), "inputs": prompt(1, 60), "tokenizer": None} | change
    with pytest.raises(error, match=message):
        read(given["model"], given["inputs"], made("llama", 40), tokenizer=given["tokenizer"], request=REQUEST)


def test_a_model_without_a_head_reads_too():
    one, other = (made("llama", 40) for _ in range(2))
    model = tiny("llama")
    for reads, cache in ((model, one), (model.model, other)):
        read(reads, prompt(1, 60), cache, request=REQUEST, progress=False)
    for mine, theirs in zip(contents(one), contents(other), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))
    with pytest.raises(ValueError, match="trial is 8, and the model is a LlamaModel, which predicts nothing"):
        read(model.model, prompt(1, 60), made("llama", 40, bits="auto"), request=REQUEST, trial=8, progress=False)

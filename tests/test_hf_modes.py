"""What people use around generate(): pipelines, chat, streams, quantised and offloaded weights, rows that end."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from heads import heads_of
from models import FAMILIES, SIZES, VOCABULARY, build, left_padded, prompt, tiny
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    StoppingCriteriaList,
    TextStreamer,
    pipeline,
)

from momentkv.hf import FinishedRows, MomentCache

SMALL: dict[str, Any] = {"sinks": 1, "window": 8, "block": 4}
# Every head alike, and nothing that roundings of a padded batch could tip over.
PAPER = SMALL | {"sharing": "uniform", "policy": "momentkv", "correction": "moments"}


def generate(
    model: Any, cache: Any, ids: torch.Tensor, mask: Any = None, new: int = 6, **settings: Any
) -> torch.Tensor:
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        past_key_values=cache,
        max_new_tokens=new,
        **{"do_sample": False, **settings},
    )


def state(cache: MomentCache, row: int) -> list[torch.Tensor]:
    """What of a row's state says what was folded and what is stored, padding left out."""
    held = []
    for core in cache.moment_layers.values():
        for part in heads_of(core):
            held.append(part.moments.weight[row])
            for head in range(part.keys.shape[1]):
                held.append(part.keys[row, head][part.positions[row, head] >= 0])
    return held


def test_rows_that_have_ended_are_not_polluted():
    """Each row holds what it would hold alone, up to its end token and no pad after it."""
    model = tiny("llama")
    ids = prompt(2, 50)
    alone = [generate(model, MomentCache(model, 20, **PAPER), ids[row : row + 1], new=24) for row in range(2)]
    # A token that the first row reaches early and the second does not.
    answer = [x[0, 50:].tolist() for x in alone]
    end = next(token for token in answer[0][2:8] if token not in answer[1])
    place = answer[0].index(end)
    settings = {"eos_token_id": end, "pad_token_id": 0, "new": 24}
    caches = [MomentCache(model, 20, **PAPER) for _ in range(2)]
    watched = StoppingCriteriaList([FinishedRows(caches[0], end)])
    out = generate(model, caches[0], ids, stopping_criteria=watched, **settings)
    generate(model, caches[1], ids, **settings)
    single = MomentCache(model, 20, **PAPER)
    with torch.no_grad():  # the row alone, which also reads its end token
        model(ids[:1], past_key_values=single)
        for index in range(50, 50 + place + 1):
            model(out[:1, index : index + 1], past_key_values=single)
    # The other row does not feel it.
    for index, reference in ((0, single), (1, caches[1])):
        for a, b in zip(state(caches[0], index), state(reference, index), strict=True):
            assert a.shape == b.shape
            assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=1)
    counted = [float(state(cache, 0)[0].sum()) for cache in caches]
    assert counted[0] < counted[1]  # without it, pads have been folded


def test_after_an_ended_row_the_next_turn_goes_on():
    model = tiny("llama")
    ids = prompt(2, 50)
    cache = MomentCache(model, 400, **SMALL)
    first = generate(model, cache, ids, new=10)
    end = int(first[0, 52])
    cache.reset()
    criteria = FinishedRows(cache, [end, 10**6])
    out = generate(model, cache, ids, new=10, eos_token_id=end, pad_token_id=0, stopping_criteria=[criteria])
    ends = [(row[50:] == end).nonzero().flatten().tolist() for row in out]
    mask = torch.ones_like(out)
    for row, places in enumerate(ends):
        if places:
            mask[row, 50 + places[0] + 1 :] = 0
    assert (mask == 0).any()
    more = prompt(2, 5, seed=4)
    both, longer = torch.cat([out, more], 1), torch.nn.functional.pad(mask, (0, 5), value=1)
    after = generate(model, cache, both, longer, new=4)
    for row in range(2):
        kept = both[row][longer[row].bool()][None]
        expected = generate(tiny("llama", "sdpa"), None, kept, new=4)
        assert torch.equal(after[row, -4:], expected[0, -4:])


def words() -> PreTrainedTokenizerFast:
    """A tokenizer for the tiny models, with a chat template."""
    vocabulary = {"<pad>": 0, "<unk>": 1} | {f"w{index}": index for index in range(2, VOCABULARY)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for message in messages %}w2 {{ message['role'] == 'user' and 'w3' or 'w4' }} {{ message['content'] }} w5 "
        "{% endfor %}{% if add_generation_prompt %}w2 w4 {% endif %}"
    )
    return tokenizer


@pytest.mark.parametrize("budget", [20, 400])
def test_a_chat_with_its_template_streams_what_it_generates(budget: int, capsys: pytest.CaptureFixture[str]):
    model, tokenizer = tiny("llama"), words()
    cache = MomentCache(model, budget, **SMALL)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    chat = [{"role": "user", "content": " ".join(f"w{index}" for index in range(10, 60))}]
    for turn in range(3):
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        out = generate(model, cache, ids, mask, streamer=streamer)
        answer = tokenizer.decode(out[0, ids.shape[1] :])
        assert capsys.readouterr().out.split() == answer.split()
        assert cache.get_seq_length() == out.shape[1] - 1
        if budget == 400:
            assert torch.equal(out, generate(tiny("llama", "sdpa"), None, ids, mask))
        chat += [{"role": "assistant", "content": answer}, {"role": "user", "content": f"w{20 + turn} w7 w8"}]


def test_a_text_generation_pipeline_takes_the_cache():
    model, tokenizer = tiny("llama"), words()
    text = " ".join(f"w{index}" for index in range(10, 60))
    cache = MomentCache(model, 400, **SMALL)
    settings = {"max_new_tokens": 6, "do_sample": False}
    out = pipeline("text-generation", model=model, tokenizer=tokenizer)(text, past_key_values=cache, **settings)
    expected = pipeline("text-generation", model=tiny("llama", "sdpa"), tokenizer=tokenizer)(text, **settings)
    assert out == expected
    assert cache.get_seq_length() == 55


def saved_model(folder: Path) -> Path:
    build(FAMILIES["llama"]()).save_pretrained(folder)
    return folder


def load(path: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, attn_implementation="momentkv", dtype=torch.float32, **settings)


@pytest.mark.parametrize("where", ["device_map", "disk"])
def test_mapped_and_offloaded_weights_are_the_same_model(where: str, tmp_path: Path):
    path = saved_model(tmp_path / "model")
    settings: dict[str, Any] = {"device_map": "cpu"}
    if where == "disk":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
        places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
        settings = {"device_map": places, "offload_folder": str(tmp_path / "offload")}
    model, plain = load(path, **settings), load(path)
    caches = [MomentCache(x, 20, **SMALL) for x in (model, plain)]
    assert torch.equal(*(generate(x, cache, prompt(2, 60)) for x, cache in zip((model, plain), caches, strict=True)))
    caches[0].save(tmp_path / "cache")
    again = MomentCache.load(tmp_path / "cache", plain)
    assert again.get_seq_length() == caches[0].get_seq_length()


def quantisation(package: str, bits: int) -> Any:
    import transformers

    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
        from torchao.quantization.granularity import PerGroup

        return transformers.TorchAoConfig(
            Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(torch.int4, PerGroup(32))
        )
    if package == "optimum.quanto":
        return transformers.QuantoConfig(weights=f"int{bits}")
    return transformers.BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("package", ["torchao", "optimum.quanto", "bitsandbytes"])
def test_quantised_weights_are_nothing_to_the_cache(package: str, bits: int, tmp_path: Path):
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{package} is not installed")
    model = load(saved_model(tmp_path / "model"), quantization_config=quantisation(package, bits))
    wide, small = MomentCache(model, 400, **SMALL), MomentCache(model, 20, **SMALL)
    out = generate(model, wide, prompt(2, 60))
    model.set_attn_implementation("sdpa")
    assert torch.equal(out, generate(model, None, prompt(2, 60)))
    model.set_attn_implementation("momentkv")
    generate(model, small, prompt(2, 60))
    assert all((core.moments.weight > 0).all() for core in small.moment_layers.values())


def test_half_precision_keeps_sums_in_float32():
    for dtype in ("bfloat16", "float16"):
        model = tiny("phi3", "momentkv", dtype)
        cache = MomentCache(model, 20, **SMALL)
        generate(model, cache, prompt(2, 60))
        for core in cache.moment_layers.values():
            for part in heads_of(core):
                assert part.keys.dtype == getattr(torch, dtype)
                assert {x.dtype for x in part.moments.arrays().values()} == {torch.float32}
                assert all(x.isfinite().all() or name == "log_weight" for name, x in part.moments.arrays().items())


def test_left_padded_beams_equal_the_row_alone_after_eviction():
    model = tiny("llama")
    rows = [prompt(1, 60, seed=1), prompt(1, 44, seed=2)]
    ids, mask = left_padded(rows)
    out = generate(model, MomentCache(model, 20, **PAPER), ids, mask, new=10, num_beams=3)
    for index, row in enumerate(rows):
        own = generate(model, MomentCache(model, 20, **PAPER), row, new=10, num_beams=3)
        assert torch.equal(out[index, 60:], own[0, row.shape[1] :])


# As their config.json has them; two layers and a small vocabulary of random weights at full width.
LARGE = {
    "Llama-3.1-8B-Instruct": lambda: LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        num_hidden_layers=1,
        vocab_size=SIZES["vocab_size"],
        bos_token_id=None,
        eos_token_id=None,
    ),
    "Qwen3-4B-Instruct-2507": lambda: Qwen3Config(
        hidden_size=2560,
        intermediate_size=9728,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=262144,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 5000000.0},
        tie_word_embeddings=True,
        num_hidden_layers=1,
        vocab_size=SIZES["vocab_size"],
        bos_token_id=None,
        eos_token_id=None,
    ),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_models_at_full_width_take_the_same_path(name: str):
    config = LARGE[name]()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="momentkv")
    model = model.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                block = torch.randn(1 << 16, generator=generator) * 0.02  # repeated: only its spread matters
                repeats = -(-parameter.numel() // block.numel())
                parameter.copy_(block.repeat(repeats)[: parameter.numel()].reshape(parameter.shape))
            else:
                parameter.fill_(1)
        # Buffers that to_empty left unset: the frequencies of RoPE.
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    ids = prompt(1, 64)
    wide, small = MomentCache(model, 200), MomentCache(model, 40, window=16, block=8)
    logits = []
    with torch.no_grad():
        for cache in (wide, small):
            model(ids, past_key_values=cache)
            logits.append(model(ids[:, :1], past_key_values=cache).logits)
        model.set_attn_implementation("sdpa")
        full = model(torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
    # Float32, sums of up to 14336 products in another order.
    assert (logits[0] - full).abs().max() <= 1e-4 * full.abs().max()
    assert logits[1].isfinite().all()
    for core in small.moment_layers.values():
        assert sum(core.budget) <= 8 * 40
        assert (core.moments.weight > 0).all()
        assert core.keys.shape[-1] == 128


def test_two_copies_of_one_document_answer_alike():
    model = tiny("qwen3")
    cache = MomentCache(model, 20, **SMALL)
    with torch.no_grad():
        model(prompt(1, 80), past_key_values=cache)
    question = torch.cat([prompt(1, 80), prompt(1, 6, seed=2)], 1)
    a, b = (generate(model, copy.deepcopy(cache), question) for _ in range(2))
    assert torch.equal(a, b)
    assert cache.get_seq_length() == 80


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 4},
        {"bits": "auto"},
        {"budget": "28KiB"},
        {},
        {"certify": 2},
        {"correction": "moments"},
        {"static": True, "bits": 4},
        {"static": True, "correction": "moments"},
    ],
    ids=str,
)
def test_evictions_do_not_mind_autocast(options: dict[str, Any]):
    """Steps of codes and statistics have dtypes of their own, which a caller's autocast does not know."""
    model = tiny("llama")
    cache = MomentCache(model, **({"budget": 40} | SMALL | options))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        # By hand: generate would compile the steps of a static cache.
        model(prompt(1, 170), past_key_values=cache)
        for token in prompt(1, 30, seed=1).unbind(1):
            model(token[:, None], past_key_values=cache)
    assert cache.get_seq_length() == 200
    assert all(core.has_evicted for core in cache.moment_layers.values())
    assert {core.moments.key_mean.dtype for core in cache.moment_layers.values()} == {torch.float32}

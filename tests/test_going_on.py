"""Reading more after a text: its turn, its padding, its positions, and what is kept meanwhile."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from models import SIZES, build, left_padded, prompt, save_with_bytes, tiny
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, RobertaConfig

from momentkv.hf import MomentCache, read, reading
from momentkv.hf.layer_reader import LayerReader
from momentkv.hf.repeating import around, between, read_text

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FIRST, SECOND = "The harbour was built long ago. ", "The harbour is deep, they say. "


@pytest.fixture
def reader(tmp_path: Path) -> argparse.Namespace:
    """A model whose tokens are bytes, its tokenizer with a chat template, and how a text is read with both."""
    path = save_with_bytes(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="momentkv")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE

    def read_more(inputs: Any, cache: MomentCache | None = None, **options: Any) -> MomentCache:
        cache = MomentCache(model, 40, policy="twice", block=8, sharing="uniform") if cache is None else cache
        return read(model, inputs, cache, tokenizer=tokenizer, progress=False, **options)

    return argparse.Namespace(model=model, tokenizer=tokenizer, read=read_more)


def assert_alike(one: MomentCache, other: MomentCache) -> None:
    assert one.get_seq_length() == other.get_seq_length()
    for x, y in zip(one.layers, other.layers, strict=True):
        assert torch.equal(x.keys, y.keys)
        assert torch.equal(x.values, y.values)


def test_a_text_goes_on_with_the_one_before(reader: argparse.Namespace, tmp_path: Path):
    one = reader.read(SECOND, reader.read(FIRST))
    ids, _ = read_text(reader.tokenizer, FIRST + SECOND)
    first = read_text(reader.tokenizer, FIRST)[0].shape[1]
    assert one.get_seq_length() == one.turn == ids.shape[1]
    # Ids, the same in a file between, and segments say the same request.
    assert_alike(reader.read(ids[:, first:], reader.read(ids[:, :first])), one)
    cache = reader.read(FIRST)
    cache.save(tmp_path / "cache.safetensors")
    assert_alike(reader.read(SECOND, MomentCache.load(tmp_path / "cache.safetensors", reader.model)), one)
    size = ids.shape[1] // 2
    even = ids[:, : 2 * size]
    assert_alike(reader.read(even[:, size:], reader.read(even[:, :size])), reader.read(even, segment=size))


def test_after_anything_else_a_text_begins_a_turn(reader: argparse.Namespace):
    cache = reader.read(FIRST)
    with torch.no_grad():
        reader.model(torch.tensor([[5]]), past_key_values=cache)
    before = cache.get_seq_length()
    reader.read(SECOND, cache)
    assert cache.get_seq_length() - before == read_text(reader.tokenizer, SECOND, after=True)[0].shape[1]
    assert cache.turn == cache.get_seq_length()
    plain = reader.read(torch.tensor([reader.tokenizer(FIRST).input_ids]))
    assert plain.turn is None
    cache.reset()
    assert cache.turn is None


BEGINS = "{% if loop.first %}<begins>{% endif %}"
SYSTEM = "{% if loop.first %}<system>Be kind.<end>{% endif %}"


@pytest.mark.parametrize(("first", "asked"), [("", "<end><user>"), (BEGINS, "<end><user>"), (SYSTEM, "<end><user>")])
def test_a_text_after_an_answer_is_the_next_turn(reader: argparse.Namespace, first: str, asked: str):
    """As the template writes it, which ends the answer: no second beginning, nor words of the system."""
    tokenizer, fed = reader.tokenizer, list[list[int]]()
    tokenizer.chat_template = TEMPLATE.replace("{{ '<'", first + "{{ '<'", 1)
    cache = reader.read(FIRST)
    with torch.no_grad():
        reader.model(tokenizer("A port.", return_tensors="pt").input_ids, past_key_values=cache)
    embedding = reader.model.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, args: fed.append(args[0][0].tolist()))
    reader.read(SECOND, cache, twice=False)
    hook.remove()
    assert tokenizer.decode(fed[0]) == asked + SECOND
    chat = [(FIRST, "user"), ("A port.", "assistant"), (SECOND, "user")]
    whole = tokenizer.apply_chat_template([{"role": role, "content": said} for said, role in chat], tokenize=False)
    assert whole.endswith("A port." + asked + SECOND + "<end>")
    # A question ends this turn, as it does the first.
    assert cache.turn == cache.get_seq_length()


def test_of_a_template_without_answers_a_later_turn_begins_as_the_first(reader: argparse.Namespace):
    one = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    reader.tokenizer.chat_template = "<end>" + one + "<user>{{ messages[0].content }}"
    assert between(reader.tokenizer) == around(reader.tokenizer)[0] == "<end><user>"
    reader.tokenizer.bos_token = "<end>"
    assert between(reader.tokenizer) == "<user>"
    assert around(reader.tokenizer)[0] == "<end><user>"


def test_no_sequence_begins_within_another():
    def tokenizer(text: str, *, add_special_tokens: bool, **_: Any) -> Any:
        return argparse.Namespace(input_ids=[0] * add_special_tokens + list(text.encode()))

    tokenizer.pad_token_id = 1
    assert read_text(tokenizer, "a")[0].tolist() == [[0, 97]]
    assert read_text(tokenizer, "a", after=True)[0].tolist() == [[97]]


def test_a_text_after_another_begins_no_sequence(reader: argparse.Namespace):
    reader.tokenizer.chat_template = None
    reader.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 0)]
    )
    cache = reader.read(SECOND, reader.read(FIRST))
    assert cache.get_seq_length() == 1 + len(FIRST) + len(SECOND)


def test_a_reading_that_fails_does_not_open_a_turn(reader: argparse.Namespace, monkeypatch: pytest.MonkeyPatch):
    cache = reader.read(FIRST)
    turn = cache.turn

    def failing(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(reading.Reading, "evict", failing)
    with pytest.raises(RuntimeError, match="no"):
        reader.read(SECOND, cache)
    assert cache.turn == cache.get_seq_length() == turn


def test_texts_go_on_after_padded_ones(reader: argparse.Namespace):
    texts, more = [FIRST, "Short. "], ["And old. ", "And older. "]
    cache = reader.read(more, reader.read(texts))
    both = [read_text(reader.tokenizer, texts), read_text(reader.tokenizer, more, goes_on=True)]
    ids, masks = zip(*both, strict=True)
    expected = reader.read(ids[0], attention_mask=masks[0])
    assert_alike(reader.read(ids[1], expected, attention_mask=torch.cat(masks, dim=1)), cache)
    same = reader.read(["And. ", "And. "], reader.read([FIRST, "Short. "]))
    assert same.get_seq_length() == masks[0].shape[1] + 5
    last, mask = read_text(reader.tokenizer, ["a", "bc"], goes_on=True)
    whole = reader.read([FIRST, FIRST])
    seen = torch.ones(2, whole.get_seq_length(), dtype=torch.long)
    expected = reader.read(last, reader.read([FIRST, FIRST]), attention_mask=torch.cat([seen, mask], dim=1))
    assert_alike(reader.read(["a", "bc"], whole), expected)


def test_masks_that_do_not_belong_to_what_is_read_are_refused(reader: argparse.Namespace):
    with pytest.raises(ValueError, match="attention_mask is given beside texts"):
        reader.read(FIRST, attention_mask=torch.ones(1, 3))
    with pytest.raises(TypeError, match="attention_mask is a list"):
        reader.read(prompt(1, 9), attention_mask=[[1] * 9])
    for texts in (["Short. ", FIRST], [FIRST, FIRST]):
        with pytest.raises(ValueError, match="3 rows arrive at a cache that holds 2"):
            reader.read(["a", "bc", "d"], reader.read(texts))


def test_of_a_padded_batch_no_more_queries_are_kept_than_are_needed(monkeypatch: pytest.MonkeyPatch):
    kept, original = [0], LayerReader.read

    def watched(self: LayerReader, *args: Any) -> None:
        original(self, *args)
        assert self.queries is not None
        assert self.real is None or self.real.shape[1] == self.queries.shape[2]
        kept.append(self.queries.shape[2])

    monkeypatch.setattr(LayerReader, "read", watched)
    ids, mask = left_padded([prompt(1, 700), prompt(1, 40, 1), prompt(1, 650, 2)])
    cache = MomentCache(tiny("llama"), 60, policy="twice", block=8)
    read(tiny("llama"), ids, cache, attention_mask=mask, request=[5], progress=False, chunk=100)
    assert max(kept) == LayerReader(cache.passes.moments[0].core).keep < 400
    # Padding within: the last 300 of a row, whose queries are further back.
    middle = torch.ones(2, 700, dtype=torch.long)
    middle[1, 350:650] = 0
    kept.clear()
    cache = MomentCache(tiny("llama"), 60, policy="twice", block=8)
    read(tiny("llama"), prompt(2, 700), cache, attention_mask=middle, request=[5], progress=False, chunk=100)
    assert max(kept) == LayerReader(cache.passes.moments[0].core).keep + 300


@pytest.mark.parametrize("options", [{}, {"twice": 0.3}, {"segment": 70}, {"segment": 7, "twice": 0.1}, {"chunk": 30}])
def test_a_bar_ends_where_reading_does(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    bars = []

    class Bar:
        def __init__(self, *, total: int, disable: bool, **_: Any) -> None:
            self.total, self.count, self.disable = total, 0, disable
            bars.append(self)

        def update(self, number: int) -> None:
            self.count += number

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(reading, "tqdm", Bar)
    cache = MomentCache(tiny("llama"), 60, policy="twice", block=8)
    read(tiny("llama"), prompt(1, 300), cache, request=[5], **options)
    (bar,) = bars
    assert bar.count == bar.total
    assert not bar.disable


def test_positions_are_those_of_generate():
    own = {"max_position_embeddings": 512, "type_vocab_size": 1, "pad_token_id": 1}
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"} | own
    model = build(RobertaConfig(**sizes, is_decoder=True))
    ids = prompt(1, 60).clamp(min=2)
    alone = MomentCache(model, 400, policy="twice", block=8)
    model.generate(ids, past_key_values=alone, max_new_tokens=1, do_sample=False)
    for mask in (None, torch.ones_like(ids)):
        cache = MomentCache(model, 400, policy="twice", block=8)
        read(model, ids, cache, attention_mask=mask, request=[5], progress=False)
        for mine, other in zip(cache.layers, alone.layers, strict=True):
            torch.testing.assert_close(mine.keys, other.keys)


def test_positions_lie_one_behind_the_other():
    """Some models give them another shape (Kosmos-2.5)."""
    given = []
    model = tiny("llama")
    handle = model.register_forward_pre_hook(lambda *x: given.append(x[2].get("position_ids")), with_kwargs=True)
    ids, mask = left_padded([prompt(1, 90), prompt(1, 70, 1)])
    try:
        cache = MomentCache(model, 60, policy="twice", block=8)
        read(model, ids, cache, attention_mask=mask, request=[5], progress=False, chunk=40)
    finally:
        handle.remove()
    assert len(given) > 4
    assert all(positions.is_contiguous() for positions in given)

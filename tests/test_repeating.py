"""What a model is asked to repeat, by tokenizers whose templates and tokens are of several kinds."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from models import save_with_bytes
from transformers import AutoTokenizer

from momentkv.hf.repeating import around, opens_turn, read_text, request_of


def test_templates_that_expect_parts_are_asked_with_parts(tmp_path: Path):
    """As those of models that see images: of a plain text they write nothing."""
    tokenizer = AutoTokenizer.from_pretrained(save_with_bytes(tmp_path))
    assert around(tokenizer) == ("", "\n")
    body = "{{ '<' + m.role + '>' }}WORDS<end>"
    loop = "{% for m in messages %}" + body + "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    for content in ("{{ m.content }}", "{% for part in m.content if part.type == 'text' %}{{ part.text }}{% endfor %}"):
        tokenizer.chat_template = loop.replace("WORDS", content)
        assert around(tokenizer) == ("<user>", "<end><assistant>")
        ids = read_text(tokenizer, "TEXT")[0][0].tolist()
        assert tokenizer.decode(ids) == "<user>TEXT"
        assert (
            tokenizer.decode(request_of(tokenizer, "Repeat.", opens_turn(tokenizer, ids)))
            == "\n\nRepeat.<end><assistant>"
        )
    tokenizer.chat_template = loop.replace("WORDS", "")
    with pytest.raises(ValueError, match=r"chat_template that writes '<user><end><assistant>'.*as token ids"):
        around(tokenizer)


class Merging:
    """A tokenizer of few tokens, one of which is a new line of the template with one of the text."""

    chat_template = "<user>\\n{{ messages[0].content }}<end>"
    tokens = ("<user>\n", "<user>\n\n", "text", "\n\nRepeat<end>", "\n\nRepeat\n\n")

    def __call__(self, text: str, **_: Any) -> Any:
        return argparse.Namespace(input_ids=[self.tokens.index(text)])

    def apply_chat_template(self, turn: Any, **_: Any) -> str:
        return f"<user>\n{turn[0]['content']}<end>"

    def decode(self, ids: list[int]) -> str:
        return "".join(self.tokens[index] for index in ids)


def test_a_turn_is_open_where_its_beginning_is_one_token_with_the_text():
    for first, opens in (([0, 2], True), ([1, 2], True), ([2, 0], False)):
        assert opens_turn(Merging(), first) is opens
        assert request_of(Merging(), "Repeat", opens) == ([3] if opens else [4])

"""Haystacks with needles: prose of any length in which a few sentences hold what a question asks for."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

__all__ = ["VALUES", "Sample", "make_sample", "prose", "sentences"]


def listed(words: str) -> list[str]:
    """Phrases between commas."""
    return words.split(", ")


WORDS: dict[str, list[str]] = {
    "who": listed(
        "the baker, my neighbour, an old sailor, the schoolteacher, her younger brother, the clockmaker, a visiting "
        "doctor, the gardener, our guide, the librarian, a tired postman, the mayor, his aunt, the carpenter, a "
        "travelling musician, the ferryman, the innkeeper, a young painter, the shepherd, the widow next door"
    ),
    "did": listed(
        "repaired, painted, carried away, remembered, sold, described, borrowed, measured, forgot, washed, drew, "
        "found again, gave back, looked after, examined, hid, praised, weighed, wrapped, wrote about"
    ),
    "thing": listed(
        "wooden chair, copper kettle, map of the coast, torn umbrella, basket of pears, silver spoon, letter from "
        "abroad, pair of boots, broken violin, jar of honey, wool blanket, painted door, rusty bicycle, small "
        "telescope, book of songs, heavy suitcase, loaf of bread, brass lantern, straw hat, box of nails"
    ),
    "where": listed(
        "near the harbour, behind the church, at the end of the lane, on the second floor, beside the canal, in the "
        "kitchen, across the square, outside the station, under the chestnut trees, on the way to the hills, by the "
        "old wall, in a narrow street, at the market, below the castle, next to the mill, in the north of the "
        "county"
    ),
    "when": listed(
        "early in the morning, after supper, before the rain began, on the last day of spring, every other "
        "Thursday, during the long winter, when the bells had stopped, towards evening, a week later, in the first "
        "days of autumn, once the guests had left, just after sunrise, that same night, while the kettle boiled"
    ),
    "weather": listed(
        "a soft rain fell, the wind turned to the east, fog lay over the fields, the sun came out at last, the snow "
        "had begun to melt, clouds gathered slowly, the air smelled of smoke, the river ran high, a warm night "
        "followed, thunder rolled far away"
    ),
    "thought": listed(
        "nothing would change, the price was far too high, the road could be trusted, it was better to wait, "
        "somebody had been there before, the summer would be dry, the story was only half true, they would meet "
        "again, the work was nearly finished, a good meal was worth the walk, silence was the best answer, the roof "
        "would hold"
    ),
    "quality": listed(
        "quiet, crowded, bright, damp, friendly, half empty, strange, cold, cheerful, older than it looked, full of "
        "voices, dusty"
    ),
    "place": listed(
        "The village, The workshop, The hall, The little theatre, The bridge, The cellar, The courtyard, The "
        "reading room, The upper meadow, The waiting room, The stable, The attic"
    ),
}

TEMPLATES = [
    "{who} {did} the {thing} {where}.",
    "{when}, {who} {did} a {thing}, and {weather}.",
    "{weather}, so {who} stayed {where} and {did} the {thing}.",
    "{place} was {quality} {when}, and {weather}.",
    "{who} was sure that {thought}, but {who} did not agree.",
    "Nobody asked why {who} {did} the {thing} {when}.",
    "{place} seemed {quality} and {quality}, as {who} said {when}.",
    "{who} told {who} that {thought}.",
    "There was a {thing} {where}, and {who} {did} it {when}.",
    "If {thought}, {who} would have left the {thing} {where}.",
    "{when} {weather}; {who} thought that {thought}.",
    "It was {quality} {where}, and for a while {who} talked of the {thing}.",
    "Of all the things {where}, {who} liked the {thing} best.",
    '"I believe that {thought}," said {who}, who {did} the {thing} {when}.',
]

KEYS = listed(
    "orchard, lighthouse, museum, garden, castle, harbor, forest, library, island, temple, factory, bakery, tower, "
    "valley, hotel, theater, airport, monastery, vineyard, aquarium, fortress, laboratory, stadium, cathedral, "
    "desert, glacier, market, palace, railway, school, village, volcano, warehouse, windmill, zoo, canyon, embassy, "
    "farm, hospital, observatory"
)

# What a value is called, and how it is drawn.
VALUES: dict[str, tuple[str, Callable[[np.random.Generator], str]]] = {
    "number": ("number", lambda rng: str(rng.integers(10**6, 10**7))),
    "uuid": ("code", lambda rng: str(uuid.UUID(bytes=rng.bytes(16), version=4))),
}


class Sample(NamedTuple):
    """One question about one haystack, as tokens and as the texts that they encode.

    Attributes
    ----------
    context, question, answer : list of int
        The haystack with its needles; the question and all that comes before the answer; the value asked for.
    texts : tuple of str
        The same as text.
    depth : float
        Where the needle begins: the share of the context's tokens before it.
    """

    context: list[int]
    question: list[int]
    answer: list[int]
    texts: tuple[str, str, str]
    depth: float


def prose(rng: np.random.Generator) -> Iterator[str]:
    """Sentences without end; many of them, none of which holds a secret.

    Examples
    --------
    >>> sentence = next(prose(np.random.default_rng(0)))
    >>> sentence[0].isupper() or sentence[0] == '"', sentence.endswith((".", '"'))
    (True, True)
    """
    while True:
        template = TEMPLATES[rng.integers(len(TEMPLATES))]
        sentence = re.sub(r"\{(\w+)\}", lambda found: pick(rng, WORDS[found[1]]), template)
        yield sentence[0].upper() + sentence[1:]


def pick(rng: np.random.Generator, words: list[str]) -> str:
    """One of the words."""
    return words[rng.integers(len(words))]


def sentences(text: str, rng: np.random.Generator) -> Iterator[str]:
    """Sentences of a text, each once, from a random one on and over its end."""
    found = [" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+", text) if part.strip()]
    start = int(rng.integers(len(found))) if found else 0
    yield from found[start:] + found[:start]


def make_sample(
    tokenizer: Any,
    length: int,
    depth: float,
    *,
    value: str = "number",
    keys: int = 1,
    haystack: str | None = None,
    seed: tuple[int, ...] = (0,),
) -> Sample:
    """A haystack of at most ``length`` tokens with the needle at a depth, and the question about it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        Its chat template is used if it has one.
    length : int
        Tokens of the context, the chat template's and the needles' included; whole sentences fill it.
    depth : float
        From 0 (the needle comes first) to 1 (last).
    value : {"number", "uuid"}
    keys : int
        Needles of the same kind; the question asks for one, the others lie at random depths.
    haystack : str, optional
        A text to take sentences of; by default they are made up.
    seed : tuple of int

    Raises
    ------
    ValueError
        If a text is too short, or a length too small for the needles.
    """
    rng = np.random.default_rng(seed)
    noun, draw = VALUES[value]
    names = [KEYS[index] for index in rng.permutation(len(KEYS))[:keys]]
    values = [draw(rng) for _ in names]
    needles = [f"The secret {noun} of the {name} is {x}." for name, x in zip(names, values, strict=True)]
    question = f"What is the secret {noun} of the {names[0]}? Answer with the {noun} only."
    prime = f"The secret {noun} of the {names[0]} is"

    def render(parts: list[str]) -> tuple[str, str]:
        return chat(tokenizer, " ".join(parts), question)

    room = length - len(encode(tokenizer, render(needles)[0]))
    if room < 0:
        raise ValueError(
            f"length is {length}, but the {'needle' if keys == 1 else f'{keys} needles'} and the chat template take "
            f"{length - room} tokens; use a longer one"
        )
    parts, sizes = [], []
    source = prose(rng) if haystack is None else sentences(haystack, rng)
    for sentence in source:
        size = len(encode(tokenizer, " " + sentence))
        if size > room:
            break
        room -= size
        parts.append(sentence)
        sizes.append(size)
    else:
        raise ValueError(
            f"haystack has {sum(sizes)} tokens, but a length of {length} needs {sum(sizes) + room} beside the needle; "
            "use a longer text or a shorter length"
        )
    # The sentence boundary that is nearest to each depth.
    ends = np.concatenate([[0], np.cumsum(sizes)])
    depths = [depth, *rng.random(keys - 1)]
    places = [int(np.abs(ends - at * ends[-1]).argmin()) for at in depths]
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0], reverse=True):
        parts.insert(place, needle)
    before, after = render(parts)
    after += prime
    context = encode(tokenizer, before)
    asked, both = encode(tokenizer, after), encode(tokenizer, f"{after} {values[0]}")
    # A tokenizer may join the end of one text and the beginning of the next; what both encodings share is the question.
    shared = next((i for i, (a, b) in enumerate(zip(asked, both, strict=False)) if a != b), len(asked))
    at = len(encode(tokenizer, before[: before.index(needles[0])])) / len(context)
    return Sample(context, both[:shared], both[shared:], (before, after, f" {values[0]}"), at)


def chat(tokenizer: Any, text: str, question: str) -> tuple[str, str]:
    """A prompt up to the question, and from the question to where the answer begins."""
    if not getattr(tokenizer, "chat_template", None):
        return (tokenizer.bos_token or "") + text, f"\n\n{question}\n"
    turn = [{"role": "user", "content": f"{text}\n\n{question}"}]
    rendered = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, _, after = rendered.rpartition(f"\n\n{question}")
    return before, f"\n\n{question}{after}"


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, special tokens only where the text has them."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return list(ids)

"""Prose of any length: made up from a seed, or the sentences of a text."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

__all__ = ["prose", "sentences"]


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

"""Haystacks with needles: prose of any length, in which a few sentences hold the answers to the questions."""

from __future__ import annotations

import textwrap
import uuid
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import permutations, takewhile
from typing import Any, NamedTuple

import numpy as np

from momentkv.evaluation.prose import listed, prose, sentences

__all__ = ["TASKS", "VALUES", "Answer", "Haystack", "Question", "Task", "make_haystack"]

KEYS = listed(
    "orchard, lighthouse, museum, garden, castle, harbor, forest, library, island, temple, factory, bakery, tower, "
    "valley, hotel, theater, airport, monastery, vineyard, aquarium, fortress, laboratory, stadium, cathedral, "
    "desert, glacier, market, palace, railway, school, village, volcano, warehouse, windmill, zoo, canyon, embassy, "
    "farm, hospital, observatory"
)

# Name of each kind of value, and how it is drawn.
VALUES: dict[str, tuple[str, Callable[[np.random.Generator], str]]] = {
    "number": ("number", lambda rng: str(rng.integers(10**6, 10**7))),
    "uuid": ("code", lambda rng: str(uuid.UUID(bytes=rng.bytes(16), version=4))),
}


# What a context may lack of its length, as a share or in tokens; letters of the pieces that a sentence is cut into.
SPARE, FEW, PIECE = 0.05, 4, 120


class Task(NamedTuple):
    """A kind of question.

    Attributes
    ----------
    several : bool
        Whether the haystack has needles of several keys.
    each : int
        Needles, and so values, of each key.
    asked : int
        Keys that one question asks for.
    """

    several: bool
    each: int
    asked: int


TASKS = {
    "single": Task(False, 1, 1),
    "multi-key": Task(True, 1, 1),
    "multi-query": Task(True, 1, 2),
    "multi-value": Task(True, 2, 1),
}


class Needle(NamedTuple):
    """A sentence that gives the value of a key, as two parts: the beginning, which its answer shares, and the value."""

    beginning: str
    value: str

    @property
    def sentence(self) -> str:
        """What is hidden."""
        return f"{self.beginning} {self.value}."


class Answer(NamedTuple):
    """One way to give an answer: the values of one key may come in any order.

    Attributes
    ----------
    tokens : list of int
    counted : list of int
        Which value a token belongs to, from 1; 0 for the words between two values, which are given, not asked for.
    text : str
    """

    tokens: list[int]
    counted: list[int]
    text: str


class Question(NamedTuple):
    """One question about a haystack, as tokens and as the texts that they encode.

    Attributes
    ----------
    task : str
    tokens : list of int
        All that comes after the haystack and before the answer.
    text : str
        Of the question, with the beginning of the answer.
    answers : tuple of Answer
        Each of them is right.
    values : tuple of str
        What is asked for.
    depth : float
        Where the needle begins: the share of the context's tokens before it; of several needles, the mean.
    """

    task: str
    tokens: list[int]
    text: str
    answers: tuple[Answer, ...]
    values: tuple[str, ...]
    depth: float


class Haystack(NamedTuple):
    """A context with needles and the questions about it.

    Attributes
    ----------
    context : list of int
    text : str
        What the context encodes.
    questions : tuple of Question
    """

    context: list[int]
    text: str
    questions: tuple[Question, ...]


def make_haystack(
    tokenizer: Any,
    length: int,
    tasks: Sequence[str] = ("single",),
    *,
    depth: float | None = None,
    value: str = "number",
    keys: int = 4,
    haystack: str | None = None,
    seed: tuple[int, ...] = (0,),
) -> Haystack:
    """A haystack of at most ``length`` tokens with needles in it, and the questions of some tasks about it.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
        Its chat template is used if it has one.
    length : int
        Tokens of the context, the chat template's and the needles' included. Whole sentences fill it; one that does
        not fit is cut where more than a twentieth would stay empty.
    tasks : sequence of str
        Names in `TASKS` that one haystack can serve: ``("single",)``, ``("multi-value",)``, or ``"multi-key"`` and
        ``"multi-query"`` together. A single needle has one question. Of several keys each is asked for on its own, or
        each together with the next.
    depth : float, optional
        Where a single needle lies, from 0 (first) to 1 (last). Several lie evenly over the context, in random order.
    value : {"number", "uuid"}
    keys : int
        Keys of the tasks that have several.
    haystack : str, optional
        A text to take sentences from; by default they are made up.
    seed : tuple of int

    Raises
    ------
    ValueError
        If tasks need different needles, a text is too short, or a length too small for the needles.

    Examples
    --------
    A tokenizer whose tokens are letters:

    >>> from types import SimpleNamespace
    >>> class Letters:
    ...     bos_token = None
    ...     def __call__(self, text, **options):
    ...         return SimpleNamespace(input_ids=[ord(letter) for letter in text])
    >>> made = make_haystack(Letters(), 500, depth=0.5)
    >>> asked = made.questions[0]
    >>> "".join(map(chr, asked.answers[0].tokens)) == " " + asked.values[0], asked.values[0] in made.text
    (True, True)
    """
    layouts = {TASKS[task][:2] for task in tasks}
    if len(layouts) != 1:
        raise ValueError(f"tasks are {', '.join(tasks)}, which need different needles; make a haystack for each")
    several, each = layouts.pop()
    rng = np.random.default_rng(seed)
    noun, draw = VALUES[value]
    names = [KEYS[index] for index in rng.permutation(len(KEYS))[: keys if several else 1]]
    hidden = {
        name: [Needle(f"{'The' if each == 1 else 'A'} secret {noun} of the {name} is", draw(rng)) for _ in range(each)]
        for name in names
    }
    needles = [needle for group in hidden.values() for needle in group]
    questions = [
        (task, chosen, ask(noun, chosen, each)) for task in tasks for chosen in asked_together(names, TASKS[task].asked)
    ]

    def context_of(parts: list[str]) -> str:
        return chat(tokenizer, " ".join(parts), questions[0][2])[0]

    room = length - len(encode(tokenizer, context_of([needle.sentence for needle in needles])))
    if room < 0:
        raise ValueError(
            f"length is {length}, but the {'needle' if len(needles) == 1 else f'{len(needles)} needles'} and the chat "
            f"template take {length - room} tokens; use a longer one"
        )
    source = prose(rng) if haystack is None else sentences(haystack, rng)
    parts, sizes = fill(tokenizer, source, room, length)
    # The sentence boundary that is nearest to each depth.
    ends = np.concatenate([[0], np.cumsum(sizes)])
    if several:
        depths = rng.permutation((np.arange(len(needles)) + rng.random(len(needles))) / len(needles)).tolist()
    else:
        depths = [0.5 if depth is None else depth]
    places = [int(np.abs(ends - at * ends[-1]).argmin()) for at in depths]
    # From the end, and among needles of one place from the last, so that their order stays.
    for place, at in sorted(((place, at) for at, place in enumerate(places)), reverse=True):
        parts.insert(place, needles[at].sentence)
    text = context_of(parts)
    context = encode(tokenizer, text)
    begins = {needle: len(encode(tokenizer, text[: text.index(needle.sentence)])) / len(context) for needle in needles}
    made = []
    for task, chosen, question in questions:
        wanted = [needle for name in chosen for needle in hidden[name]]
        orders = list(permutations(wanted)) if each > 1 else [tuple(wanted)]
        after = chat(tokenizer, " ".join(parts), question)[1] + wanted[0].beginning
        tokens, answers = encode_answers(tokenizer, after, orders)
        begin = float(np.mean([begins[needle] for needle in wanted]))
        made.append(Question(task, tokens, after, answers, tuple(needle.value for needle in wanted), begin))
    return Haystack(context, text, tuple(made))


def asked_together(names: list[str], count: int) -> list[list[str]]:
    """Each key with those after it, around the end; one question each."""
    if count > len(names):
        raise ValueError(f"keys is {len(names)}, but one question asks for {count}; use more keys")
    return [[names[(start + more) % len(names)] for more in range(count)] for start in range(len(names))]


def ask(noun: str, names: list[str], each: int) -> str:
    """The question."""
    of = " and of ".join(f"the {name}" for name in names)
    if len(names) == each == 1:
        return f"What is the secret {noun} of {of}? Answer with the {noun} only."
    both = "two " if each > 1 else ""
    return f"What are the {both}secret {noun}s of {of}? Answer with the {noun}s only."


def fill(tokenizer: Any, source: Any, room: int, length: int) -> tuple[list[str], list[int]]:
    """Sentences that fill so many tokens, and the tokens of each; one that is too long is cut."""
    parts: list[str] = []
    sizes: list[int] = []
    whole, spare = room, max(int(SPARE * length), FEW)
    for sentence in source:
        size = size_of(tokenizer, sentence)
        if size > room:
            # Sentences may take fewer tokens together than alone.
            room = whole - size_of(tokenizer, " ".join(parts))
            if room <= spare:
                return parts, sizes
        # What is cut stays in pieces, so that a needle can lie between them.
        for piece in [sentence] if size <= room else textwrap.wrap(sentence, PIECE, break_on_hyphens=False):
            size = size_of(tokenizer, piece)
            fits = piece if size <= room else beginning(tokenizer, piece, room)
            if fits:
                parts.append(fits)
                sizes.append(size_of(tokenizer, fits))
                room -= sizes[-1]
            if fits != piece:
                break
    if room <= spare:
        return parts, sizes
    raise ValueError(
        f"haystack has {sum(sizes)} tokens, but a length of {length} needs {sum(sizes) + room} beside the needles; "
        "use a longer text or a shorter length"
    )


def beginning(tokenizer: Any, text: str, room: int) -> str:
    """As much of a text as so many tokens hold, up to the end of a word if one ends there."""
    letters = bisect_right(range(len(text) + 1), room, key=lambda stop: size_of(tokenizer, text[:stop])) - 1
    fits = text[: max(letters, 0)]
    return fits.rpartition(" ")[0] or fits


def size_of(tokenizer: Any, text: str) -> int:
    """Tokens of a text that follows another."""
    return len(encode(tokenizer, " " + text))


def encode_answers(
    tokenizer: Any, after: str, orders: Sequence[Sequence[Needle]]
) -> tuple[list[int], tuple[Answer, ...]]:
    """Tokens of the question, and its answers: the first value, and a sentence for each that follows."""
    texts = []
    for wanted in orders:
        links = ["", *(f". {needle.beginning}" for needle in wanted[1:])]
        texts.append([(link, f" {needle.value}") for link, needle in zip(links, wanted, strict=True)])
    wholes = [encode(tokenizer, after + "".join(link + value for link, value in pairs)) for pairs in texts]
    # A tokenizer may join the end of one text and the beginning of the next. The question is what all encodings share.
    alone = encode(tokenizer, after)
    shared = min(common(alone, whole) for whole in wholes)
    answers = []
    for pairs, whole in zip(texts, wholes, strict=True):
        counted, said = [0] * len(whole), after
        answer = "".join(link + value for link, value in pairs)
        for which, (link, value) in enumerate(pairs, start=1):
            said += link
            start = common(encode(tokenizer, said), whole)
            said += value
            rest = encode(tokenizer, (after + answer)[len(said) :])
            stop = len(whole) - common(rest[::-1], whole[::-1])
            counted[start:stop] = [which] * (stop - start)
        answers.append(Answer(whole[shared:], counted[shared:], answer))
    return wholes[0][:shared], tuple(answers)


def common(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


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

"""Paragraphs of a SQuAD file packed into long contexts, with the questions about them; SQuAD's own two metrics.

momentkv evaluate tasks --tasks question_answering --include-path examples/question_answering --context-field context
    --metadata '{"file": "xquad.en.json", "tokens": 4000, "questions": 20}' --limit 40 --chat

``file``: JSON in the form of SQuAD 1.1, such as XQuAD's (https://github.com/google-deepmind/xquad). ``tokens``: at most
so many of a context. ``questions``: about each context, evenly spread over its paragraphs.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer


def dataset(*, file: str, tokenizer: str, tokens: int = 4000, questions: int = 20, **_: Any) -> dict[str, Any]:
    """Documents of the task: those about one context stand together."""
    articles = json.loads(Path(file).read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    documents = []
    for group in packed(paragraphs, AutoTokenizer.from_pretrained(tokenizer), tokens):
        context = "\n\n".join(paragraph["context"] for paragraph in group)
        asked = [question for paragraph in group for question in paragraph["qas"]]
        step = max(1, len(asked) / questions)
        for index in range(min(questions, len(asked))):
            one = asked[int(index * step)]
            answers = [answer["text"] for answer in one["answers"]]
            documents.append({"context": context, "question": one["question"], "answers": answers})
    return {"test": datasets.Dataset.from_list(documents)}


def packed(paragraphs: list[dict[str, Any]], tokenizer: Any, tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Paragraphs in their order, as many as a context has room for; the last context is left out unless it is full."""
    group: list[dict[str, Any]] = []
    room = tokens
    for paragraph in paragraphs:
        count = len(tokenizer("\n\n" + paragraph["context"]).input_ids)
        if group and count > room:
            yield group
            group, room = [], tokens
        group.append(paragraph)
        room -= count


def scores(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """F1 of words and exact match, the best over the reference answers, as SQuAD 1.1 defines them."""
    found = words(results[0])
    references = [words(answer) for answer in document["answers"]]
    return {
        "f1": max(f1(found, reference) for reference in references),
        "exact_match": float(any(found == reference for reference in references)),
    }


def words(answer: str) -> list[str]:
    """Words in lower case, without punctuation and articles."""
    kept = "".join(x for x in answer.lower() if x not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def f1(found: list[str], reference: list[str]) -> float:
    """Harmonic mean of precision and recall of words; 0 where they share none, also where both have none.

    Examples
    --------
    >>> round(f1(["blue", "sky"], ["blue"]), 3)
    0.667
    """
    common = sum((Counter(found) & Counter(reference)).values())
    return 2 * common / (len(found) + len(reference)) if common else 0.0

"""Where the question of a prompt begins: what comes before it is compressed, the rest is read afterwards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["question_start", "tokens_from"]


def question_start(
    prompt: str,
    *,
    marker: str | None = None,
    field: str | None = None,
    doc: Mapping[str, Any] | None = None,
    task: str = "?",
) -> int:
    """Index of the first character that is read after compression.

    Parameters
    ----------
    prompt : str
    marker : str, optional
        What a question begins with; several, separated by ``|``. The last one in the prompt counts.
    field : str, optional
        The field of ``doc`` that holds the context, word for word as it is in the prompt; all that follows it is the
        question. Of ``marker`` and ``field``, exactly one.
    doc : mapping, optional
        The document that the prompt was made of.
    task : str
        For messages.

    Raises
    ------
    ValueError
        If the marker or the context is not in the prompt, or nothing comes before or after it.

    Examples
    --------
    >>> prompt = "Question: 1 + 1? Answer: 2. Question: 2 + 2?"
    >>> prompt[question_start(prompt, marker="Problem:|Question:"):]
    'Question: 2 + 2?'
    >>> prompt = "Read: a tale. Who told it?"
    >>> prompt[question_start(prompt, field="story", doc={"story": "a tale."}):]
    ' Who told it?'
    """
    if (marker is None) == (field is None):
        raise ValueError(
            f"question_marker is {marker!r} and context_field is {field!r}; exactly one says where the question begins"
        )
    if marker is not None:
        named, found = f"question_marker is {marker!r}", -1
        if not all(marker.split("|")):
            raise ValueError(f"{named}, one of whose alternatives is empty; write text on both sides of each |")
        found = max(prompt.rfind(one) for one in marker.split("|"))
        remedy = f"name what its questions begin with; a prompt ends with {prompt[-80:]!r}"
    else:
        named = f"context_field is {field!r}"
        fields = doc or {}
        context = fields.get(str(field))
        if not isinstance(context, str) or not context:
            texts = [name for name, value in fields.items() if isinstance(value, str) and value]
            raise ValueError(f"{named}, but documents of task {task!r} have no such text; texts are {texts}")
        found = prompt.rfind(context)
        found = found + len(context) if found >= 0 else -1
        remedy = "the prompt must hold that text word for word; use question_marker instead"
    if found < 0:
        raise ValueError(f"{named}, which is not in a prompt of task {task!r}; {remedy}")
    if not prompt[:found].strip() or not prompt[found:].strip():
        side = "before" if not prompt[:found].strip() else "after"
        raise ValueError(f"{named}, but nothing comes {side} it in a prompt of task {task!r}; {remedy}")
    return found


def tokens_from(tokenizer: Any, text: str, start: int) -> int:
    """How many of a text's last tokens hold what begins at a character, a token that straddles it included.

    Counted from the end, so that neither what a tokenizer puts first nor a truncation of the beginning matters.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerFast
    text : str
    start : int

    Raises
    ------
    ValueError
        If the tokenizer does not tell which characters its tokens hold.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}, which does not tell which characters a token holds; "
            "query_aware=False needs a fast tokenizer"
        )
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    first = next((index for index, (_, end) in enumerate(offsets) if end > start), len(offsets))
    return len(offsets) - first

"""What a model is asked to repeat: the tokens of a text, and of the request before each part of it."""

from __future__ import annotations

import contextlib
import numbers
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["REQUEST", "around", "between", "encode", "opens_turn", "read_text", "request_of"]

# The wording of KVzip (arXiv 2505.23416).
REQUEST = "Repeat the previous context exactly."
# Stands for what a user says, where a chat template is taken apart.
MARK = "\N{WHITE STAR}here\N{WHITE STAR}"


def around(tokenizer: Any) -> tuple[str, str]:
    """What a tokenizer's chat template writes before and after a user's words; without one, nothing and a new line.

    Raises
    ------
    ValueError
        If the template does not write what a user says, given as a text or as a list of parts.
    """
    if not getattr(tokenizer, "chat_template", None):
        return "", "\n"
    from jinja2.exceptions import TemplateError

    try:
        before, *after = written_around(tokenizer, ["user"], add_generation_prompt=True)
    except TemplateError as error:
        raise ValueError(
            f"tokenizer has a chat_template that takes no single turn of a user ({error}); give text and request "
            "as token ids, with the template around them"
        ) from None
    if after:
        return before, MARK.join(after)
    raise ValueError(
        f"tokenizer has a chat_template that writes {before!r} for what a user says, without the words; give text "
        "and request as token ids, with the template around them"
    )


def between(tokenizer: Any) -> str:
    """What a tokenizer's chat template writes between an answer and the next words of a user.

    Of a template that takes no answer: what is before a user's first words, without the token that begins a sequence.
    """
    if not getattr(tokenizer, "chat_template", None):
        return ""
    from jinja2.exceptions import TemplateError

    with contextlib.suppress(TemplateError):
        parts = written_around(tokenizer, ["user", "assistant", "user"])
        if len(parts) == 4:
            return parts[2]
    return around(tokenizer)[0].removeprefix(getattr(tokenizer, "bos_token", None) or "")


def written_around(tokenizer: Any, roles: Sequence[str], **options: Any) -> list[str]:
    """What a chat template writes before, between and after the words of turns, or all, where they are not in it."""
    # Templates of models that see images expect parts, and write nothing of a plain text.
    for content in (MARK, [{"type": "text", "text": MARK}]):
        turns = [{"role": role, "content": content} for role in roles]
        parts: list[str] = tokenizer.apply_chat_template(turns, tokenize=False, **options).split(MARK)
        if len(parts) > 1:
            break
    return parts


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, special tokens only where the text has them."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def read_text(
    tokenizer: Any, texts: str | Sequence[str], *, after: bool = False, goes_on: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Ids of a text, or of several as a batch padded at the left, and its attention mask.

    With a chat template, a text is the beginning of what a user says, and the turn stays open: a question follows.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizer
    texts : str or sequence of str
    after : bool
        Other tokens are before it: no special token stands for the beginning of a sequence, and what a chat template
        writes ends the answer before it.
    goes_on : bool
        The text goes on with what a user says: nothing of the template is before it.

    Returns
    -------
    ids : int tensor, shape (batch, n)
    mask : int tensor, shape (batch, n), or None
        Zero for padding; None where there is none.
    """
    before = "" if goes_on else between(tokenizer) if after else around(tokenizer)[0]
    rows = [texts] if isinstance(texts, str) else list(texts)
    special = not (after or goes_on or getattr(tokenizer, "chat_template", None))
    encoded = [list(tokenizer(before + row, add_special_tokens=special, verbose=False).input_ids) for row in rows]
    longest = max(map(len, encoded), default=0)
    pad = tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in encoded])
    if len(set(map(len, encoded))) == 1:
        return ids, None
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in encoded])


def opens_turn(tokenizer: Any, first: Sequence[int]) -> bool:
    """Whether a text, whose first ids are given, begins as what a user says does in the chat template."""
    for before in (around(tokenizer)[0], between(tokenizer)):
        opening = encode(tokenizer, before)
        begins = list(first[: len(opening)])
        # The last of them may be one with the text, as two new lines are.
        if opening and (begins == opening or tokenizer.decode(begins).startswith(before)):
            return True
    return False


def request_of(tokenizer: Any, request: str | Sequence[int], opens: bool) -> list[int]:
    """Ids of a request after a text.

    Where the text ``opens`` a turn of the user, the request ends it, and the answer, which is the repeated text,
    begins.

    Raises
    ------
    ValueError
        If the request is a text and there is no tokenizer.
    """
    if not isinstance(request, str):
        if not isinstance(request, Sequence | torch.Tensor):
            raise TypeError(f"request is {request!r}; give it as text, or as token ids ([] for none)")
        if isinstance(request, torch.Tensor) and (
            request.dim() > 2 or request.is_floating_point() or (request.dim() == 2 and len(request) != 1)
        ):
            raise ValueError(f"request is of shape {tuple(request.shape)}; give one row of token ids")
        row = request.reshape(-1).tolist() if isinstance(request, torch.Tensor) else request
        if not all(isinstance(token, numbers.Integral) for token in row):
            raise TypeError(f"request is {request!r}; give it as text, or as token ids ([] for none)")
        return [int(token) for token in row]
    if tokenizer is None:
        raise ValueError(
            f"request is {request!r}, which only a tokenizer can read; pass tokenizer=, the request as token ids "
            "([] for none), or twice=False"
        )
    after = around(tokenizer)[1] if opens else "\n\n"
    return encode(tokenizer, f"\n\n{request}{after}")

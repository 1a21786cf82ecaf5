"""Which texts chose something, and which are kept for reporting: what ``texts.toml`` says, looked up."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from typing import Any, Literal, NamedTuple

__all__ = ["REPORT_HAYSTACK", "REPORT_TEXTS", "Role", "number_of_texts", "role_of", "roles_of", "said_of"]

Part = Literal["choosing", "reporting", "unnamed"]
# What the suite reads: topics and a module that come with every Python, each of four thousand words or more.
REPORT_TEXTS = (
    "string-methods",
    "typesseq",
    "assignment+comparisons+execmodel",
    "strings+import+calls+operator-summary",
    "argparse.py",
)
REPORT_HAYSTACK = "assignment+comparisons+execmodel+strings+import+calls"


class Role(NamedTuple):
    """What a text may be used for.

    Attributes
    ----------
    part : {"choosing", "reporting", "unnamed"}
        A text that ``texts.toml`` does not name is neither: what it chose is not known.
    chose : tuple of str
    """

    part: Part
    chose: tuple[str, ...] = ()


@cache
def named_texts() -> dict[str, dict[str, Any]]:
    """Both parts of ``texts.toml``."""
    return tomllib.loads((files("momentkv.evaluation") / "texts.toml").read_text(encoding="utf-8"))


def role_of(name: str, text: str = "") -> Role:
    """The role of a text by its name, or by what it says.

    Parameters
    ----------
    name : str
        A topic, several joined by ``+``, or the name of a file. One of several that chose something is enough.
    text : str
        What it says, where it is at hand: a text that chose something is found under any name.

    Examples
    --------
    >>> role_of("types").part, role_of("typesseq+calls").part, role_of("calls+types").part, role_of("mine.txt").part
    ('choosing', 'reporting', 'choosing', 'unnamed')
    >>> role_of("mine.txt", "Bennet ... Darcy ... Longbourn").chose[-1]
    'the share of the second reading'
    """
    parts = named_texts()
    given = set(name.split("+"))
    chose = [
        choice
        for known in parts["choosing"].values()
        if given & {*known["names"]} or ("marks" in known and all(mark in text for mark in known["marks"]))
        for choice in known["chose"]
    ]
    if chose:
        return Role("choosing", tuple(dict.fromkeys(chose)))
    reporting = {name for known in parts["reporting"].values() for name in known["names"]}
    return Role("reporting" if given <= reporting else "unnamed")


def roles_of(texts: dict[str, str]) -> dict[str, Any]:
    """Roles of texts by their names, as results have them."""
    return {name: role_of(name, text)._asdict() for name, text in texts.items()}


def number_of_texts(count: int) -> str:
    """How many texts something is of, in words.

    Examples
    --------
    >>> number_of_texts(1), number_of_texts(4)
    ('1 text', '4 texts')
    """
    return f"{count} text{'s' if count != 1 else ''}"


def said_of(roles: dict[str, Any]) -> list[str]:
    """A line for each text that chose something, to be shown beside its results.

    Examples
    --------
    >>> said_of({"mine.txt": {"chose": ("a factor", "a share")}, "yours.txt": {"chose": ()}})
    ['mine.txt chose a factor; a share: its results do not show how good that is']
    """
    return [
        f"{name} chose {'; '.join(role['chose'])}: its results do not show how good that is"
        for name, role in roles.items()
        if role["chose"]
    ]

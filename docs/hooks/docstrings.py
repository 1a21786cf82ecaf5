"""Prepares docstrings for the reference pages: names of pages and theorems become links, numpydoc what griffe reads.

A griffe extension. Docstrings are numpydoc, which `help()` and editors show well, with formulas in Markdown's dollars.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError

PAGE = re.compile(r"docs/([a-z/-]+)\.md(?:#([a-z-]+))?")
THEOREM = re.compile(r"Theorem (B\d+)('?)")
# Types that griffe would read, and print, as Python expressions: "array, shape (n, d)" and "{0, 1}".
SHAPE = re.compile(r"(?<= : )((?:\w+ )*)(array|tensor), shape \(", re.MULTILINE)
CHOICE = re.compile(r"(?<= : )\{([^}]*)\}")
RETURNED = re.compile(r"^( *)(array|tensor), shape \(", re.MULTILINE)
DOCTEST = re.compile(r"(?<=\n\n)(?:>>> .*\n(?:.+\n)*)+")
FLAG = re.compile(r" *# doctest: .*$", re.MULTILINE)
# Parameters that share a description.
NAMES = re.compile(r"^(\w+(?:, \w+)+)( : .*)?\n((?: +\S.*\n?)*)", re.MULTILINE)
SECTION = re.compile(r"^(\w[\w ]*)\n-{3,}$", re.M)
# The first line of a page that docstrings name.
TITLE = re.compile(r"# (.*?) \{ #([\w-]+) \}$", re.MULTILINE)
DOCS = Path(__file__).parents[1]


def to_markdown(docstring: str) -> str:
    """The docstring with pages and theorems as links, and types that griffe does not take for expressions."""
    docstring = PAGE.sub(link, docstring)
    docstring = THEOREM.sub(lambda found: f"[{found[0]}][{found[1].lower()}{found[2] and '-prime'}]", docstring)
    docstring = SHAPE.sub(r"\1\2 of shape (", docstring)
    docstring = RETURNED.sub(r"\1\2 of shape (", docstring)
    docstring = CHOICE.sub(r"one of \1", docstring)
    return separate_source(fence_doctests(one_by_one(docstring))).rstrip("\n")


def link(page: re.Match[str]) -> str:
    """A link to the page, or to the heading that is named, by the page's title."""
    title = TITLE.match((DOCS / f"{page[1]}.md").read_text(encoding="utf-8"))
    if title is None:
        raise PluginError(f"docstrings name docs/{page[1]}.md, so its first line needs an id, # Title {{ #id }}")
    return f"[{title[1]}][{page[2] or title[2]}]"


def one_by_one(docstring: str) -> str:
    """Give each of the parameters that share an entry one of its own; griffe would give all the first one's default."""
    sections = [*SECTION.finditer(docstring), None]
    for section, after in itertools.pairwise(sections):
        if section and section[1] == "Parameters":
            start, end = section.end(), after.start() if after else len(docstring)
            return docstring[:start] + NAMES.sub(entries, docstring[start:end]) + docstring[end:]
    return docstring


def entries(shared: re.Match[str]) -> str:
    """An entry for each name of a shared one."""
    return "".join(f"{name}{shared[2] or ''}\n{shared[3].rstrip()}\n" for name in shared[1].split(", "))


def fence_doctests(docstring: str) -> str:
    """Make doctests that stand before all sections code blocks; those under Examples are so anyway."""
    section = SECTION.search(docstring)
    end = section.start() if section else len(docstring)
    fenced = DOCTEST.sub(
        lambda found: f"```pycon\n{FLAG.sub('', found[0])}```\n", docstring[:end] + "\n" * (not section)
    )
    return fenced + docstring[end:]


def separate_source(docstring: str) -> str:
    """Put a closing ``Source:`` paragraph, which belongs to no section, under Notes."""
    start = docstring.find("\nSource:")
    sections = [section[1] for section in SECTION.finditer(docstring[:start])] if start >= 0 else []
    if not sections or sections[-1] == "Notes":
        return docstring
    return f"{docstring[:start]}\nNotes\n-----\n{docstring[start + 1 :]}"


class Docstrings(griffe.Extension):
    """Rewrites each docstring once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            obj.docstring.value = to_markdown(obj.docstring.value)

"""Prepares docstrings for the reference pages: their reStructuredText mathematics and links become Markdown.

A griffe extension. Docstrings stay numpydoc, which `help()` and editors show well; the site is Markdown.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import griffe

BLOCK = re.compile(r"^( *)\.\. math::(.*)$")
ROLE = re.compile(r":math:`([^`]+)`")
CODE = re.compile(r"``([^`]+)``")
PAGE = re.compile(r"docs/([a-z/-]+)\.md")
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
# Title of each page that docstrings name, and the id of its heading.
PAGES = {
    "speed": ("Speed", "page-speed"),
    "derivations/attention-algebra": ("Attention as an algebra", "derivation-attention-algebra"),
    "derivations/gap": ("The directional gap", "derivation-gap"),
    "derivations/moments": ("Moments", "derivation-moments"),
    "derivations/correction": ("The correction", "derivation-correction"),
    "derivations/mass": ("Why the estimated mass is too small", "derivation-mass"),
    "derivations/summaries": ("Anchored summaries", "derivation-summaries"),
    "derivations/bounds": ("Error bounds", "derivation-bounds"),
    "derivations/codes": ("Tokens in few bits", "derivation-codes"),
    "derivations/eviction": ("Which token to evict", "derivation-eviction"),
    "derivations/second-reading": ("The second reading", "derivation-second-reading"),
    "derivations/cost": ("Cost", "derivation-cost"),
    "certificates": ("Certificates", "page-certificates"),
    "evaluation": ("Evaluation", "page-evaluation"),
    "lm-eval": ("lm-evaluation-harness", "page-lm-eval"),
    "distributed": ("More than one device", "page-distributed"),
    "transformers": ("In transformers", "page-transformers"),
}


def to_markdown(docstring: str) -> str:
    """The docstring with formulas as ``$``, code as single backticks, pages and theorems as links."""
    docstring = "\n".join(math_blocks(docstring.splitlines()))
    docstring = ROLE.sub(lambda found: f"${found[1]}$", docstring)
    docstring = CODE.sub(lambda found: f"`{found[1]}`", docstring)
    docstring = PAGE.sub(lambda found: "[{}][{}]".format(*PAGES[found[1]]), docstring)
    docstring = THEOREM.sub(lambda found: f"[{found[0]}][{found[1].lower()}{found[2] and '-prime'}]", docstring)
    docstring = SHAPE.sub(r"\1\2 of shape (", docstring)
    docstring = RETURNED.sub(r"\1\2 of shape (", docstring)
    docstring = CHOICE.sub(r"one of \1", docstring)
    return separate_source(fence_doctests(one_by_one(docstring))).rstrip("\n")


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


def math_blocks(lines: list[str]) -> Iterator[str]:
    """The lines with every ``.. math::`` directive as a ``$$`` block."""
    while lines:
        line, *lines = lines
        found = BLOCK.match(line)
        if found is None:
            yield line
            continue
        indent, first = found.groups()
        tex = [first]
        while lines and (not lines[0].strip() or lines[0].startswith(indent + " ")):
            tex.append(lines.pop(0))
        yield from ("", f"{indent}$$", indent + " ".join(" ".join(tex).split()), f"{indent}$$", "")


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

"""Turns every formula of the rendered pages into MathML, so that readers need no script and no network.

An mkdocs hook. `pymdownx.arithmatex` marks formulas, on pages and in docstrings alike; this replaces each by the
MathML of `latex2mathml`, and stops the build at one that cannot be converted. Punctuation after a formula in a
sentence is drawn to it, for it shall not begin a line.
"""

from __future__ import annotations

import html
import re
from typing import Any
from xml.etree import ElementTree

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]\s*</(?P=tag)>'
    r"(?P<after>(?:(?<=</span>)[.,;:)]+)?)",
    re.DOTALL,
)
# latex2mathml passes what it does not know through as an identifier: a command, or the & of a foreign environment.
UNCONVERTED = re.compile(r">\s*(\\[A-Za-z]+\*?|&amp;|&|\\)\s*<")
UPRIGHT = re.compile(r'(?:<mi mathvariant="normal">[A-Za-z]</mi>){2,}')
# What latex2mathml leaves to be desired, as (pattern, replacement) in this order.
REPAIRS = [
    # bars, slashes and names of operators: neither stretched nor far from their neighbours
    (r"<mo[^>]*>(&#x02016;|&#x0007C;|\|)</mo>", r'<mo stretchy="false" lspace="0" rspace="0">\1</mo>'),
    (r"<mo>&#x0002F;</mo>", '<mo lspace="0" rspace="0">&#x0002F;</mo>'),
    (r"<mo>max</mo>", '<mo lspace="0.167em" rspace="0.167em">max</mo>'),
    # infinity is a number, perpendicular a relation
    (r"<mo>&#x0221E;</mo>", "<mi>&#x0221E;</mi>"),
    (r"<mi>&#x022A5;</mi>", "<mo>&#x022A5;</mo>"),
    # a minus after an operator or an opening bracket is a sign
    (
        r"(<mo[^>]*>(?:&#x0003D;|&#x02264;|&#x02265;|&#x000B7;|&#x00028;|&#x0005B;|&#x0002C;|,|\()</mo>)<mo>&#x02212;</mo>",
        r'\1<mo form="prefix" lspace="0" rspace="0">&#x02212;</mo>',
    ),
    # a hat is as wide as what it covers
    (r"<mo( stretchy=\"\w+\")?>&#x0005E;</mo>", '<mo stretchy="true">&#x00302;</mo>'),
    # a function stands apart from an argument without brackets
    (r"(<mi>(?:log|exp|cos|tanh)</mi>)(?!<mo|<mrow><mo|</)", r'\1<mspace width="0.167em" />'),
]

# A prime has its height by itself; as a superscript it would be too small to see.
PRIMES = {"\N{PRIME}", "\N{DOUBLE PRIME}", "\N{TRIPLE PRIME}"}
# Bars and carons are as large over a letter as hats are, which latex2mathml marks as accents.
ACCENTS = {"\N{MACRON}", "\N{CARON}"}
NAMESPACE = "http://www.w3.org/1998/Math/MathML"

# What opens a part of a formula, and what closes it.
OPENED = {"{": 1, "}": -1, r"\left": 1, r"\right": -1}
BRACKET = re.compile(r"\\(?:left|right)(?![a-z])|(?<!\\)[{}]")
SYMBOL = re.compile(r"<m[ino][ >]")
# Inline formulas of more symbols have a line of their own on a narrow screen.
WIDE = 24


def to_mathml(tex: str, display: str) -> str:
    """MathML of one formula; ValueError where it cannot be converted."""
    mathml = convert(tex, display=display)
    unconverted = UNCONVERTED.search(mathml)
    if unconverted:
        raise ValueError(f"latex2mathml does not know {unconverted[1]}")
    # An upright word is one identifier.
    mathml = UPRIGHT.sub(lambda word: f"<mi>{re.sub('<[^>]*>', '', word[0])}</mi>", mathml)
    for pattern, replacement in REPAIRS:
        mathml = re.sub(pattern, replacement, mathml)
    root = ElementTree.fromstring(mathml)
    return with_primes_and_accents(root) if any(x.text in PRIMES | ACCENTS for x in root.iter()) else mathml


def parts(tex: str) -> list[str]:
    r"""Formulas that stand beside each other, parted by ``\qquad``; where there is no room they stand below each other.

    Examples
    --------
    >>> parts(r"a = b, \qquad \frac{c \qquad d}{2}")
    ['a = b, ', ' \\frac{c \\qquad d}{2}']
    """
    whole = [""]
    for part in re.split(r"(\\qquad)", tex):
        if part != r"\qquad" or r"\begin" in tex or sum(OPENED[x] for x in BRACKET.findall(whole[-1])):
            whole[-1] += part
        else:
            whole.append("")
    return whole


def with_primes_and_accents(root: ElementTree.Element) -> str:
    """The formula with each prime beside what it marks, before a subscript, and each accent marked as one."""
    for script in list(root.iter()):
        kind = script.tag.rpartition("}")[2]
        if kind == "mover" and script[-1].text in ACCENTS:
            script.set("accent", "true")
        if kind not in ("msup", "msubsup") or script[-1].text not in PRIMES:
            continue
        base, *sub, prime = script
        prime.tag, prime.attrib = f"{{{NAMESPACE}}}mo", {"form": "postfix", "lspace": "0", "rspace": "0"}
        marked = ElementTree.Element(f"{{{NAMESPACE}}}mrow")
        marked.extend([base, prime])
        script.tag = f"{{{NAMESPACE}}}{'msub' if sub else 'mrow'}"
        script[:] = [marked, *sub]
    ElementTree.register_namespace("", NAMESPACE)
    return ElementTree.tostring(root, encoding="unicode")


def convert_page(content: str, where: str) -> str:
    """Replace all marked formulas of a page; PluginError where one cannot be converted or is left over."""

    def replace(formula: re.Match[str]) -> str:
        tex = html.unescape(formula["tex"]).strip()
        try:
            if formula["open"] == "(":
                mathml = to_mathml(tex, "inline")
            else:
                mathml = "".join(to_mathml(part, "block") for part in parts(tex))
        except Exception as error:
            raise PluginError(f"{where}: cannot convert the formula {tex!r} to MathML: {error}") from error
        kind = "math wide" if formula["open"] == "(" and len(SYMBOL.findall(mathml)) > WIDE else "math"
        return f'<{formula["tag"]} class="{kind}">{mathml}{formula["after"]}</{formula["tag"]}>'

    content = FORMULA.sub(replace, content)
    for leftover in ('class="arithmatex"', ":math:`", ".. math::"):
        if leftover in content:
            raise PluginError(f"{where}: {leftover} is left on the page, so a formula was not recognised")
    return content


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return convert_page(content, page.file.src_uri)

"""Turns every formula of the rendered pages into MathML, so that readers need no script and no network.

An mkdocs hook. `pymdownx.arithmatex` marks formulas, on pages and in docstrings alike; this replaces each by the
MathML of `math_core`, and stops the build at one that cannot be converted. Punctuation after a formula in a sentence
stays on the formula's line.
"""

from __future__ import annotations

import html
import re
from typing import Any

from math_core import LatexError, LatexToMathML
from mkdocs.exceptions import PluginError

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\s*\\(?P<open>[(\[])(?P<tex>.*?)\\[)\]]\s*</(?P=tag)>'
    r"(?P<after>(?:(?<=</span>)[.,;:)]+)?)",
    re.DOTALL,
)
# Between formulas that stand below each other where there is no room beside, and not within braces. What is wrongly
# parted lacks a bracket, which stops the build.
BESIDE = re.compile(r"\\qquad(?![^{]*\})")
SYMBOL = re.compile(r"<m[ino][ >]")
# Inline formulas of more symbols have a line of their own on a narrow screen.
WIDE = 24
CONVERTER = LatexToMathML(fancy_error=False)


def convert_page(content: str, where: str) -> str:
    """Replace all marked formulas of a page; PluginError where one cannot be converted or is left over."""

    def replace(formula: re.Match[str]) -> str:
        tex, inline = html.unescape(formula["tex"]).strip(), formula["open"] == "("
        parts = [tex] if inline else BESIDE.split(tex)
        try:
            mathml = "".join(CONVERTER.convert_with_local_state(part, displaystyle=not inline) for part in parts)
        except LatexError as error:
            raise PluginError(f"{where}: cannot convert the formula {tex!r} to MathML: {error}") from error
        kind = "math wide" if inline and len(SYMBOL.findall(mathml)) > WIDE else "math"
        return f'<{formula["tag"]} class="{kind}">{mathml}{formula["after"]}</{formula["tag"]}>'

    content = FORMULA.sub(replace, content)
    for leftover in ('class="arithmatex"', ":math:`", ".. math::"):
        if leftover in content:
            raise PluginError(f"{where}: {leftover} is left on the page; write formulas as $W$ or $$ W $$")
    return content


def on_page_content(content: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return convert_page(content, page.file.src_uri)

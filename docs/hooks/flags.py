"""Keeps together what no line may part: an option, which browsers break after "--", and a number with its percent sign.

An mkdocs hook.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

CODE = re.compile(r"<code[^>]*>.*?</code>", re.DOTALL)
PERCENT = re.compile(r"(?<=\d) (?=%)")
FLAG = re.compile(r"(?<![\w&;-])--?[a-z][a-z-]*")


def keep_flags(content: str) -> str:
    """The page with every option in code marked as one piece, and every percentage outside of code joined.

    Examples
    --------
    >>> keep_flags("<code>run --new-tokens 4</code>, a--b")
    '<code>run <span class="flag">--new-tokens</span> 4</code>, a--b'
    >>> keep_flags("<code>4 % 3</code> of 14 %") == "<code>4 % 3</code> of 14\N{NO-BREAK SPACE}%"
    True
    """
    parts, codes = CODE.split(content), CODE.findall(content)
    kept = [PERCENT.sub("\N{NO-BREAK SPACE}", part) for part in parts]
    marked = [FLAG.sub(lambda flag: f'<span class="flag">{flag[0]}</span>', code) for code in codes]
    return "".join(itertools.chain.from_iterable(itertools.zip_longest(kept, marked, fillvalue="")))


def on_page_content(content: str, **_: Any) -> str:
    """Called by mkdocs with the HTML of each page."""
    return keep_flags(content)

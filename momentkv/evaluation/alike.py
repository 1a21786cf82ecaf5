"""Whether results can stand in one table: what they count bytes in, what they read, and how they were measured."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from momentkv.evaluation.lines import Row
from momentkv.evaluation.report import bits_of, tokens_in

__all__ = ["check_measured_alike", "check_read_alike", "counted_in"]

# What rows are told apart by, and what of their protocol changes their numbers, of each kind of results.
ALWAYS = ("sinks", "window", "exact_window")
OF_A_TEXT = (("model", "part"), ("context", "following", "skip", "decode", *ALWAYS))
KINDS = {
    "needles": (("model", "part", "task", "value", "length"), ("haystack", "seed", "layout", *ALWAYS)),
    "fidelity": OF_A_TEXT,
    "decoding": OF_A_TEXT,
    "tasks": (
        ("model", "task", "question"),
        ("metadata", "limit", "chat", "question_marker", "context_field", "max_length", *ALWAYS),
    ),
}


def counted_in(protocols: Iterable[tuple[str, dict[str, Any]]]) -> int | None:
    """Bits of the tokens that results count bytes in.

    Parameters
    ----------
    protocols : iterable of (str, dict)
        Name of each file, and its protocol.
    """
    files: dict[int | None, list[str]] = defaultdict(list)
    for name, protocol in protocols:
        files[bits_of(protocol)].append(name)
    if len(files) > 1:
        groups = (f"{tokens_in(bits)} ({', '.join(names)})" for bits, names in files.items())
        raise ValueError(f"results count bytes in {' and in '.join(groups)}; report them apart")
    return next(iter(files), None)


def check_read_alike(results: Iterable[tuple[str, str, dict[str, Any]]]) -> None:
    """Raise if two files read other tokens of the same stretch of a text, or other haystacks of one name.

    As far as they say what they read.

    Parameters
    ----------
    results : iterable of (str, str, dict)
        Name of each file, its model, and what it holds.
    """
    seen: dict[Any, tuple[str, str]] = {}
    for name, model, content in results:
        protocol = content["protocol"]
        of_peers = {text: said["ids_sha256"] for text, said in content.get("texts", {}).items()}
        stretch = [protocol.get(x, 0) for x in ("skip", "context", "following")]
        digests = protocol.get("ids_sha256", of_peers) | protocol.get("text_sha256", {})
        for text, digest in digests.items():
            other, before = seen.setdefault((model, text, *stretch), (name, digest))
            if digest != before:
                raise ValueError(
                    f"{other} and {name} read other tokens of {text}: topics of the language reference differ between "
                    "versions of Python; measure one again, or report them apart"
                )


def check_measured_alike(kind: str, results: Iterable[tuple[str, dict[str, Any], list[Row]]]) -> None:
    """Raise if rows that would stand in one cell of a table were measured otherwise.

    As far as they say how.

    Parameters
    ----------
    kind : str
    results : iterable of (str, dict, list of dict)
        Name of each file, its protocol, and its rows with their model and part.
    """
    columns, names = KINDS[kind]
    seen: dict[Any, tuple[str, Any]] = {}
    for file, protocol, rows in results:
        fixed = {name: value for name, value in settings_of(protocol) if name in names}
        layouts = {(tuple(row.get(x) for x in columns), row.get("layout")) for row in rows}
        for cell, layout in sorted(layouts, key=str):
            for name, value in (fixed | ({"layout": layout} if "layout" in names else {})).items():
                other, before = seen.setdefault((cell, name), (file, value))
                if value != before:
                    raise ValueError(
                        f"{other} and {file} were measured otherwise: {name} is {before!r} in one and {value!r} in the "
                        "other; report them apart"
                    )


def settings_of(protocol: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What a protocol says; what is not there was not skipped, and how often a decode evicts stands in a sentence."""
    yield from ({"skip": 0} | protocol).items()
    found = re.search(r"and (\d+) tokens at a time", protocol.get("compressed", ""))
    yield "decode", None if found is None else int(found[1])

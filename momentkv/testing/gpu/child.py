"""The process that runs one part: ``python -m momentkv.testing.gpu.child``."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from momentkv.testing.gpu.parts import Row, Skip

__all__ = ["main"]


def rows_of(function: str, arguments: Sequence[Any], *, rehearse: bool) -> Iterator[Row]:
    """What a part yields; see `momentkv.testing.gpu.parts.Part`."""
    module, _, name = function.partition(":")
    yield from getattr(importlib.import_module(f"momentkv.testing.gpu.{module}"), name)(rehearse, *arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one part; each row is a line of a file as soon as it is there, and so is the reason why there are none."""
    parser = argparse.ArgumentParser(prog="python -m momentkv.testing.gpu.child", description=__doc__)
    parser.add_argument("function", help="module:name")
    parser.add_argument("arguments", type=json.loads, help="a list, as JSON")
    parser.add_argument("rows", help="file to write")
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args(arguments)
    with open(options.rows, "w", encoding="utf-8") as file:  # noqa: PTH123
        try:
            for row in rows_of(options.function, options.arguments, rehearse=options.rehearse):
                print(json.dumps(row), file=file, flush=True)
        except Skip as reason:
            print(json.dumps({"skipped": str(reason)}), file=file, flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

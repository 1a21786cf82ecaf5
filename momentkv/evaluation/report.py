"""What every command does with its results: progress, tables, JSON, plots."""

from __future__ import annotations

import json
import platform
import textwrap
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from momentkv.evaluation.files import read_text

__all__ = [
    "bits_of",
    "empty_table",
    "environment",
    "progress_bar",
    "read_json",
    "save_figure",
    "show",
    "titled",
    "tokens_in",
    "write_json",
]


def progress_bar(console: Console) -> Progress:
    """The progress bar of every command."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def empty_table(title: str, columns: list[str], left: tuple[str, ...] = ("method",)) -> Table:
    """A table without lines; numbers to the right, words to the left."""
    table = Table(title=escape(title), title_style="bold", header_style="bold", box=SIMPLE_HEAD, padding=(0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right", no_wrap=True)
    return table


def show(console: Console, table: Table) -> None:
    """Print a table that cuts nothing: it may be wider than the terminal."""
    needed = least_width(table)
    wide = console if needed <= console.width else Console(file=console.file, width=needed)
    wide.print(table)


def least_width(table: Table) -> int:
    """Columns that a table without padding needs: whole cells where they may not be wrapped, else whole words."""
    widths = []
    for column in table.columns:
        cells = [str(cell) for cell in (column.header, *column.cells)]
        pieces = cells if column.no_wrap else " ".join(cells).split()
        widths.append(max(map(cell_len, pieces)))
    return sum(widths) + len(widths) - 1 + 2 * table.show_edge


def environment() -> dict[str, str]:
    """Versions, and the kind of machine, with which a result was measured."""
    import torch
    import transformers

    return {
        "machine": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_json(path: str | Path, content: dict[str, Any], *, name: str = "output") -> Path:
    """Write a result, whole or not at all; ``name`` is the option that says where."""
    path = Path(path)
    part = path.with_suffix(path.suffix + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ValueError(f"{name} is {str(path)!r}, which cannot be written ({error.strerror}); name another") from None
    return path


def read_json(path: str | Path) -> dict[str, Any]:
    """Read what `write_json` wrote."""
    said = read_text(path)
    try:
        content: dict[str, Any] = json.loads(said)
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON, or was cut off ({error}); delete it, or name another") from None
    return content


def bits_of(protocol: dict[str, Any]) -> int | None:
    """Bits of the keys and values that budgets were counted in; None, as stored, in results older than ``--bytes``."""
    bits: int | None = protocol.get("bytes")
    return bits


def tokens_in(bits: int | None) -> str:
    """How tokens that bytes are counted in are called.

    Examples
    --------
    >>> tokens_in(16), tokens_in(None)
    ('16-bit tokens', 'tokens as the model stores them')
    """
    return "tokens as the model stores them" if bits is None else f"{bits}-bit tokens"


def titled(figure: Any, title: str, *, size: int = 9) -> None:
    """Give a figure of matplotlib a title above all panels, in as many lines as its width needs."""
    # Letters are mostly less than seven tenths as wide as their size, of which an inch has 72 points.
    figure.suptitle(textwrap.fill(title, int(72 * figure.get_figwidth() / (0.7 * size))), fontsize=size)


def save_figure(figure: Any, path: str | Path, *, dpi: int = 150) -> Path:
    """Write a figure of matplotlib, into a folder that is made where it is missing."""
    path = Path(path)
    if not path.suffix:
        path = path.with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path

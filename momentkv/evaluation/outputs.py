"""Where commands write: looked at before they measure, so that no result is lost for want of a place."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["Output", "check_output", "output_of"]

# What stands beside results, by suffix.
WHAT = {".png": "plot", ".md": "table"}


class Output(NamedTuple):
    """What a command writes.

    Attributes
    ----------
    name : str
        The option that says where.
    path, default : Path
        Where, and where without that option: a folder if it has no suffix.
    holds : str or None
        What no other JSON holds, where the file is written anew each time.
    resumes : bool
        Whether the command goes on from what it finds there.
    beside : str
        Suffix of what is written beside results, where something is.
    """

    name: str
    path: Path
    default: Path
    holds: str | None = None
    resumes: bool = False
    beside: str = ""


def output_of(options: argparse.Namespace) -> Output | None:
    """What a command of these options writes; None for one that writes nothing."""
    instead = getattr(options, "write_haystacks", None)
    if instead is not None:
        return Output("write_haystacks", Path(instead), Path("haystacks.json"), "haystacks")
    if getattr(options, "output", None) is None:
        return None
    path, default = Path(options.output), Path(options.default_output)
    return Output("output", path, default, options.holds, options.resumes, beside=".png")


def check_output(output: Output) -> None:
    """Raise if results cannot be written, or would go where something else is, or where their plot goes."""
    name, path, default = output.name, output.path, output.default
    said = f"{name} is {str(path)!r}"
    try:
        if not default.suffix:
            if path.is_file():
                raise ValueError(f"{said}, which is a file; name a folder")
        elif path.is_dir():
            raise ValueError(f"{said}, which is a folder; name a file, {str(path / default.name)!r} say")
        # What is written first has a longer name.
        path.with_suffix(path.suffix + ".part").exists()
        # A folder that exists says nothing: root may write where a file system takes nothing.
        places = path.absolute().parents if default.suffix else [path.absolute(), *path.absolute().parents]
        Path(tempfile.mkdtemp(dir=next(x for x in places if x.exists()))).rmdir()
    except OSError as error:
        raise ValueError(f"{said}, which cannot be written ({error.strerror}); name another") from None
    if default.suffix == ".json":
        if output.beside:
            check_beside(output)
        if output.holds is not None and path.exists():
            check_replaced(output)
    elif default.suffix:
        check_plot(path)
        if path.exists() and not os.access(path, os.W_OK):  # plots are written in place
            raise ValueError(f"{said}, which cannot be written (Permission denied); name another")


def check_beside(output: Output) -> None:
    """Raise if the plot or table of results has no place beside them."""
    what, said = WHAT[output.beside], f"{output.name} is {str(output.path)!r}"
    beside = output.path.with_suffix(output.beside)
    if output.path == beside:
        raise ValueError(f"{said}, where the {what} would go; name a .json for the results")
    if beside.is_dir() or (beside.exists() and not os.access(beside, os.W_OK)):
        why = "is a folder" if beside.is_dir() else "cannot be written"
        raise ValueError(f"{said}, and {str(beside)!r}, where the {what} would go, {why}; name another")


def check_replaced(output: Output) -> None:
    """Raise if a file to be written anew holds something else than what the same command wrote."""
    from momentkv.evaluation.report import read_json

    content: Any = read_json(output.path)
    if not (isinstance(content, dict) and output.holds in content):
        raise ValueError(
            f"{output.name} is {str(output.path)!r}, which holds something else than results of this command; name "
            "another file, or delete it"
        )


def check_plot(path: Path) -> None:
    """Raise if the name of a plot is not one that matplotlib can write."""
    from matplotlib.backend_bases import FigureCanvasBase

    known = sorted(f".{name}" for name in FigureCanvasBase.get_supported_filetypes())
    if path.suffix and path.suffix.lower() not in known:
        raise ValueError(f"output is {str(path)!r}, which no plot can be written as; use one of {', '.join(known)}")

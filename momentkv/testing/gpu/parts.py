"""The parts of the command, most valuable first."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

__all__ = ["PARTS", "Part", "Row", "Skip", "modules_needed"]

Row = dict[str, Any]


class Skip(Exception):  # noqa: N818 (nothing is wrong)
    """Why a part does not run here."""


class Part(NamedTuple):
    """One part.

    Attributes
    ----------
    name : str
    seconds : float
        Limit.
    function : str
        ``module:name`` within this package, a generator of rows; called with whether it is a rehearsal, and then
        ``arguments``.
    arguments : tuple
        Numbers, names and sequences of these.
    rehearsed : bool
        Whether it is done in a rehearsal alone.
    interpreted : bool
        Whether a rehearsal runs it with kernels in Triton's interpreter, which compiles nothing.
    """

    name: str
    seconds: float
    function: str
    arguments: tuple[Any, ...] = ()
    rehearsed: bool = False
    interpreted: bool = True


PARTS = {
    part.name: part
    for part in (
        Part("kernels, bfloat16", 100, "kernels:errors", ("bfloat16",)),
        Part("steps as graphs", 60, "steps:graphs"),
        Part("flushes as graphs", 30, "steps:flushes"),
        Part("one layer", 90, "layers:times"),
        Part("tokens in few bits", 40, "few_bits:times"),
        Part("a model of 8B", 90, "stack:times"),
        Part("kernels, float32", 80, "kernels:errors", ("float32",)),
        Part("kernels, float16", 80, "kernels:errors", ("float16",)),
        Part("memory of a prefill", 30, "memory:peaks"),
        Part("compute-sanitizer", 60, "sanitizer:complaints"),
        Part("a model of transformers", 90, "whole:times"),
        Part("modes of a cache", 90, "modes:compared"),
        Part("operators PyTorch checks", 40, "checks:checked"),
        Part("tuning", 90, "tuning:times", (("bfloat16",), (128,), 30.0)),
        Part("compiled kernels", 300, "predict:compiled", rehearsed=True, interpreted=False),
        Part("bytes of kernels", 240, "predict:counted", rehearsed=True),
        Part("operators of a step", 60, "operators:counts", rehearsed=True),
    )
}


def modules_needed(*names: str) -> None:
    """Raise `Skip` unless these modules can be imported."""
    for name in names:
        if find_spec(name) is None:
            raise Skip(f"{name} is not installed")

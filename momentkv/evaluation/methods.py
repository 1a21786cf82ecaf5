"""What methods are to each other: ours, their rivals, and plain selections."""

from __future__ import annotations

from momentkv.evaluation.settings import setting_of
from momentkv.policies import get_policy

__all__ = ["OURS", "is_ours", "is_rival", "is_selection", "rounds_or_rereads"]

# What stands against all others: the default, with bits chosen by errors or by a trial too, and what is read twice.
OURS = ("default", "default@auto", "default@tried", "twice@auto", "twice@tried")


def is_ours(method: str) -> bool:
    """Whether a method is the default in some bits, read once or twice, in one piece or in segments.

    Examples
    --------
    >>> [is_ours(x) for x in ("default", "twice@4", "default, segments of 512", "twice/none", "snapkv/none")]
    [True, True, True, False, False]
    """
    return in_one_piece(method).partition("@")[0] in ("default", "twice")


def in_one_piece(method: str) -> str:
    """A method without the segments that it was read in."""
    return method.partition(", segments of ")[0]


def is_rival(ours: str, other: str) -> bool:
    """Whether a method could be used instead of one of ours: all others, and of chosen bits the same chosen for less.

    Examples
    --------
    >>> [is_rival("default@auto", x) for x in ("snapkv/none@4", "default@4", "default", "twice@4", "twice@auto")]
    [True, True, False, False, False]
    >>> is_rival("default@tried", "default@auto"), is_rival("default@auto", "default@tried")
    (True, False)
    """
    stem, _, bits = ours.partition("@")
    cheaper = other not in OURS or (bits == "tried" and other == f"{stem}@auto")
    return not is_ours(other) or (bool(bits) and cheaper and other.startswith(f"{stem}@"))


def rounds_or_rereads(method: str) -> bool:
    """Whether a method corrects nothing, but rounds or reads twice.

    Examples
    --------
    >>> [rounds_or_rereads(x) for x in ("snapkv/none@4", "snapkv/none-heads@4", "twice/none", "kvpress KVzip")]
    [True, True, True, True]
    >>> [rounds_or_rereads(x) for x in ("snapkv/none", "snapkv/none-heads", "default@4", "kvpress TOVA")]
    [False, False, False, False]
    """
    return takes_more(method) is True


def is_selection(method: str) -> bool:
    """Whether a method reads once, and neither corrects nor rounds: plain eviction, kvpress's presses among it.

    Examples
    --------
    >>> [is_selection(x) for x in ("snapkv/none", "snapkv/none-heads", "snapkv/none, segments of 512", "kvpress TOVA")]
    [True, True, True, True]
    >>> [is_selection(x) for x in ("snapkv/none@4", "kvzip/none", "second-reading/none", "kvpress KVzip", "default")]
    [False, False, False, False, False]
    """
    return takes_more(method) is False


def takes_more(method: str) -> bool | None:
    """Whether a method without a correction rounds or reads twice; None for what corrects, or is not known here."""
    if method.startswith("kvpress "):
        return "kvzip" in method.lower()
    try:
        setting = setting_of(in_one_piece(method))
    except ValueError:
        return None
    if setting.order is not None:
        return None
    return setting.bits is not None or get_policy(setting.policy).rereads

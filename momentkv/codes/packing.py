"""Whole numbers of a few bits, packed into bytes and back.

A code of 3, 5, 6 or 16 bits is split into *planes* of 1, 2, 4 or 8 bits, for these divide a byte. A plane of ``w`` bits
takes ``ceil(w d / 8)`` bytes a row: with ``m`` of them, byte ``j`` holds the channels ``j, m + j, 2 m + j, ...``, so
that unpacking shifts whole blocks of bytes and nothing is moved within one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Literal

from momentkv._array import Array, array_namespace, concrete, device

__all__ = [
    "AUTO",
    "BITS",
    "GRADES",
    "PLANES",
    "SPLIT",
    "USUAL",
    "bits_as_text",
    "bits_from_text",
    "can_grade",
    "order_bytes",
    "pack",
    "pack_graded",
    "pair_of_bits",
    "row_bytes",
    "unpack",
    "unpack_graded",
]

# Bits chosen by measured error; see `momentkv.cache.coded_budget`.
AUTO: Literal["auto"] = "auto"
# Bits of the planes of a code, the most significant first.
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,), 16: (8, 8)}
BITS = tuple(PLANES)
# Bits of the finer and of the coarser half of a key's channels where they are graded, by their average. No code has 7.
GRADES = {3: (4, 2), 4: (5, 3), 5: (6, 4)}
# Bits of keys and of values, by their average. An error in a key moves the weights of all tokens. An error in a value
# is averaged with others. So up to 5, keys get bits from values.
SPLIT = {3: (4, 2), 4: (5, 3), 5: (6, 4), 6: (6, 6), 8: (8, 8), 16: (16, 16)}
# Where nothing is said or measured.
USUAL = SPLIT[4]


def pair_of_bits(bits: object) -> tuple[int, int]:
    """Bits of keys and of values, given as two numbers or as their average.

    Raises
    ------
    ValueError
        If there is no code of that many bits.

    Examples
    --------
    >>> pair_of_bits(4), pair_of_bits([4, 4])
    ((5, 3), (4, 4))
    >>> pair_of_bits(7)
    Traceback (most recent call last):
    ValueError: bits is 7; use 3, 4, 5, 6, 8 or 16, two of 2, 3, 4, 5, 6, 8 and 16 (of keys and of values), or None
    """
    pair = None
    if isinstance(bits, (tuple, list)):
        if len(bits) == 2 and all(whole(each) in PLANES for each in bits):
            pair = operator.index(bits[0]), operator.index(bits[1])
    else:
        pair = SPLIT.get(whole(bits))
    if pair is None:
        raise ValueError(
            f"bits is {bits!r}; use {listed(SPLIT, 'or')}, two of {listed(PLANES, 'and')} (of keys and of values), or "
            "None"
        )
    return pair


def whole(bits: object) -> int:
    """An integer as an int; 0 for anything else."""
    try:
        return 0 if isinstance(bits, bool) else operator.index(bits)  # type: ignore[arg-type]
    except TypeError:
        return 0


def listed(numbers: Iterable[int], last: str) -> str:
    """Numbers as a phrase."""
    *most, end = map(str, numbers)
    return f"{', '.join(most)} {last} {end}"


def bits_from_text(text: str) -> tuple[int, int] | Literal["auto"]:
    """Bits as they are written on a command line; ``"auto"`` stays itself.

    Raises
    ------
    ValueError
        If there is no code of that many bits.

    Examples
    --------
    >>> bits_from_text("4"), bits_from_text("5/4")
    ((5, 3), (5, 4))
    """
    if text == AUTO:
        return AUTO
    parts = [int(part) if part.isdecimal() else part for part in text.split("/")]
    try:
        return pair_of_bits(parts[0] if len(parts) == 1 else parts)
    except ValueError:
        raise ValueError(
            f"bits is {text!r}; use {listed(SPLIT, 'or')}, two of {listed(PLANES, 'and')} with / between them (of keys "
            f"and of values), or {AUTO}"
        ) from None


def bits_as_text(bits: tuple[int, int]) -> str:
    """The inverse of `bits_from_text`.

    Examples
    --------
    >>> bits_as_text((5, 3)), bits_as_text((5, 4))
    ('4', '5/4')
    """
    average = sum(bits) // 2
    return str(average) if SPLIT.get(average) == bits else f"{bits[0]}/{bits[1]}"


def row_bytes(d: int, bits: int) -> int:
    """Bytes of ``d`` codes: ``d bits / 8``, each plane rounded up to whole bytes.

    Examples
    --------
    >>> [row_bytes(64, bits) for bits in BITS], row_bytes(1, 5)
    ([16, 24, 32, 40, 48, 64, 128], 2)
    """
    return sum(-(-d * width // 8) for width in planes_of(bits))


def planes_of(bits: int) -> tuple[int, ...]:
    """Bits of the planes of a code, or an error that says which codes there are."""
    if whole(bits) not in PLANES:
        raise ValueError(f"bits is {bits!r}; use {listed(PLANES, 'or')}")
    return PLANES[bits]


def grades_of(bits: int) -> tuple[int, int]:
    """Bits of the finer and of the coarser channels, or an error that says which averages are graded."""
    if whole(bits) not in GRADES:
        raise ValueError(
            f"bits is {bits!r}, and the standard's channels are graded; use {listed(GRADES, 'or')}, or standard.even()"
        )
    return GRADES[bits]


def can_grade(bits: int, d: int) -> bool:
    """Whether channels may have graded codes of so many bits on average: in as many bytes as even ones.

    Examples
    --------
    >>> can_grade(5, 64), can_grade(5, 8), can_grade(8, 64)
    (True, False, False)
    """
    return bits in GRADES and d % 16 == 0


def order_bytes(bits: int, d: int) -> int:
    """Bytes that say which channels have more bits, of a KV head; 0 where they cannot be graded.

    Examples
    --------
    >>> order_bytes(5, 64), order_bytes(8, 64)
    (64, 0)
    """
    return d * (1 if d <= 256 else 4) if can_grade(bits, d) else 0


def pack_graded(codes: Array, bits: int) -> Array:
    """Codes of ``bits`` bits on average, more in the first half of the channels and fewer in the second, as bytes.

    As `pack` packs each half, one behind the other.
    """
    return halves(pack, codes, bits)


def halves(packing: Callable[[Array, int], Array], codes: Array, bits: int) -> Array:
    """`pack_graded` by a function that packs codes of so many bits."""
    xp, half, (fine, rough) = array_namespace(codes), codes.shape[-1] // 2, grades_of(bits)
    return xp.concat([packing(codes[..., :half], fine), packing(codes[..., half:], rough)], axis=-1)


def unpack_graded(packed: Array, bits: int, d: int) -> Array:
    """The inverse of `pack_graded`."""
    xp, half, (fine, rough) = array_namespace(packed), d // 2, grades_of(bits)
    first = row_bytes(half, fine)
    return xp.concat([unpack(packed[..., :first], fine, half), unpack(packed[..., first:], rough, half)], axis=-1)


def pack(codes: Array, bits: int) -> Array:
    """Codes of ``bits`` bits, whole numbers from 0 on, as bytes.

    Parameters
    ----------
    codes : int array, shape (..., d)
    bits : int
        One of `BITS`.

    Returns
    -------
    uint8 array, shape (..., row_bytes(d, bits))

    Raises
    ------
    ValueError
        If there is no code of that many bits, or a code is no whole number that fits them.

    Examples
    --------
    >>> import numpy as np
    >>> pack(np.asarray([1, 2, 3, 15]), 4).tolist()
    [49, 242]
    """
    planes_of(bits)
    xp = array_namespace(codes)
    if not codes.ndim or not xp.isdtype(codes.dtype, "integral"):
        raise ValueError(f"codes is {codes.dtype} of shape {tuple(codes.shape)}; use whole numbers (..., d)")
    if concrete(codes) and 0 not in codes.shape:
        for code in (int(xp.min(codes)), int(xp.max(codes))):
            if not 0 <= code < 2**bits:
                raise ValueError(f"codes has an entry {code}; with bits={bits} every code is from 0 to {2**bits - 1}")
    return as_planes(codes, bits)


def as_planes(codes: Array, bits: int) -> Array:
    """`pack` of codes that are known to fit: those of `encode` do, and to look at them would ask the device."""
    xp = array_namespace(codes)
    *lead, d = codes.shape
    parts, below = [], bits
    for width in planes_of(bits):
        below -= width
        plane = xp.astype((codes >> below) & (2**width - 1), xp.uint8)
        count, m = 8 // width, -(-d * width // 8)
        if count * m > d:
            empty = xp.zeros((*lead, count * m - d), dtype=xp.uint8, device=device(codes))
            plane = xp.concat([plane, empty], axis=-1)
        packed = plane[..., :m]
        for place in range(1, count):
            packed = packed | (plane[..., place * m : (place + 1) * m] << (width * place))
        parts.append(packed)
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=-1)


def unpack(packed: Array, bits: int, d: int) -> Array:
    """The inverse of `pack`.

    Parameters
    ----------
    packed : uint8 array, shape (..., row_bytes(d, bits))
    bits, d : int

    Returns
    -------
    uint8 array, shape (..., d)
        int32 where a code has more than 8 bits.

    Raises
    ------
    ValueError
        If there is no code of that many bits, or as many bytes hold another number of codes.

    Examples
    --------
    >>> import numpy as np
    >>> unpack(np.asarray([49, 242], dtype=np.uint8), 4, 4).tolist()
    [1, 2, 3, 15]
    """
    xp, size = array_namespace(packed), row_bytes(d, bits)
    if not packed.ndim or packed.shape[-1] != size or packed.dtype != xp.uint8:
        raise ValueError(
            f"codes is {packed.dtype} of shape {tuple(packed.shape)}; {d} codes of bits={bits} are uint8 (..., {size})"
        )
    codes, start = None, 0
    for width in planes_of(bits):
        count, m = 8 // width, -(-d * width // 8)
        block = packed[..., start : start + m]
        start += m
        plane = block
        if count > 1:
            mask = 2**width - 1
            parts = [block & mask, *((block >> (width * place)) & mask for place in range(1, count))]
            plane = xp.concat(parts, axis=-1)[..., :d]
        if bits > 8:
            plane = xp.astype(plane, xp.int32)
        codes = plane if codes is None else (codes << width) | plane
    return codes

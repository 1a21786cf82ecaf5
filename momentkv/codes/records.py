r"""Records: a token as whole numbers and one step, which say nothing of any other token.

$$ z = (x - m) / \sigma, \qquad z \approx \delta\,(c - 2^{b-1} + 1/2), \qquad c \in \{0, \dots, 2^b - 1\} $$

with mean $m$ (of keys; zero for values) and deviation $\sigma$ of each channel (`Standard`), and of each
token the step $\delta = 2^{1-b} \max_c |z_c|$, rounded up to 16 bits. Where channels are graded, half of them have
$b + 1$ bits and a quarter of their deviation for $\sigma$, the others $b - 1$; the step is the least that reaches all.
No component is off by more than half a step.
Derivation: docs/derivations/codes.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from momentkv._array import Array, accumulation_dtype, array_namespace, check_arrays, device, library, mixed
from momentkv._numbers import check_kind
from momentkv.codes.packing import as_planes, grades_of, halves, row_bytes, unpack, unpack_graded
from momentkv.codes.standard import Standard

__all__ = [
    "MOST",
    "Coded",
    "Coding",
    "centre",
    "coarse",
    "decode",
    "encode",
    "less_centre",
    "record_bytes",
    "step_dtype",
    "unpacked",
]

# Steps of 16 bits: the smallest that has full precision, and the largest.
LEAST, MOST = 2.0**-14, 65504.0
# Rounding to 16 bits loses at most half of this share.
UP = 1 + 2.0**-10


def step_dtype(xp: Any) -> Any:
    """Of steps: 16 bits, where the library has them."""
    return getattr(xp, "float16", xp.float32)


def centre(bits: int) -> float:
    """What is subtracted of a code: levels lie around zero, and none is zero."""
    return 2.0 ** (bits - 1) - 0.5


def less_centre(bits: int, standard: Standard, like: Array) -> Any:
    """`centre`, or where channels are graded an array (d,) of it, in the order and dtype of the levels ``like``."""
    if standard.order is None:
        return centre(bits)
    xp, half = array_namespace(like), standard.order.shape[-1] // 2
    parts = (xp.full((half,), centre(each), dtype=like.dtype, device=device(like)) for each in grades_of(bits))
    return xp.concat(list(parts))


def unpacked(codes: Array, standard: Standard, bits: int) -> Array:
    """Codes (..., d) of records (..., bytes), channels as they lie there."""
    d = standard.deviation.shape[-1]
    return unpack(codes, bits, d) if standard.order is None else unpack_graded(codes, bits, d)


def encode(x: Array, standard: Standard, bits: int) -> tuple[Array, Array]:
    """Records of tokens.

    Parameters
    ----------
    x : array, shape (..., n, d)
    standard : Standard
        Of shape (..., d).
    bits : int
        One of `momentkv.codes.BITS`.

    Returns
    -------
    codes : uint8 array, shape (..., n, row_bytes(d, bits))
    step : float16 array, shape (..., n)
        NaN for a token that is not finite; float32 in a library without float16.

    Raises
    ------
    ValueError
        If there is no code of that many bits, also where the standard grades channels; or shapes do not fit.
    TypeError
        If ``standard`` is no `Standard`, or the arrays are of several libraries.

    Notes
    -----
    A token whose largest component is above ``65504 * 2**(bits - 1)`` deviations is clipped there.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(100, 8))
    >>> standard = Standard.of(x)
    >>> codes, step = encode(x, standard, 8)
    >>> bool((abs(decode(codes, step, standard, 8) - x) <= step[:, None] * standard.deviation / 2).all())
    True
    """
    check_kind(Standard, standard=standard)
    xp, d = check_arrays(x=x, standard=standard.deviation), standard.deviation.shape[-1]
    # One channel would broadcast to all.
    if x.ndim < 2 or x.shape[-1] != d or d == 0:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and the standard {d} channels; tokens are (..., n, d) with the standard's "
            "d, at least 1: make it of such tokens, Standard.of(x)"
        )
    z = standard.ordered(standard.standardise(x))
    middle = less_centre(bits, standard, z)
    codes, step = levels(z, middle)
    codes = xp.astype(codes + middle, xp.int32)
    return as_planes(codes, bits) if standard.order is None else halves(as_planes, codes, bits), step


def levels(z: Array, middle: Any) -> tuple[Array, Array]:
    """Codes of standardised tokens, less their centre ``middle``, in the tokens' own dtype; and steps."""
    xp = array_namespace(z)
    top = xp.max(xp.abs(z) / (middle + 0.5), axis=-1)
    finite = xp.isfinite(top)
    step = xp.clip(xp.where(finite, top, xp.ones_like(top)) * UP, LEAST, MOST)
    step = xp.astype(step, step_dtype(xp))
    z = xp.where(finite[..., None], z, xp.zeros_like(z))
    codes = xp.floor(z / xp.astype(step, z.dtype)[..., None]) + 0.5
    middle = xp.zeros_like(codes) + middle
    return xp.maximum(xp.minimum(codes, middle), -middle), xp.where(finite, step, xp.full_like(step, float("nan")))


def coarse(z: Array, standard: Standard, bits: int) -> Array:
    """Standardised tokens as they would be read from records of that many bits; no record is made.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.random.default_rng(0).normal(size=(100, 8))
    >>> standard = Standard.of(x)
    >>> read = standard.restore(coarse(standard.standardise(x), standard, 4))
    >>> bool((read == decode(*encode(x, standard, 4), standard, 4)).all())
    True
    """
    xp = array_namespace(z)
    codes, step = levels(standard.ordered(z), less_centre(bits, standard, z))
    return standard.disordered(codes * xp.astype(step, z.dtype)[..., None])


def decode(codes: Array, step: Array, standard: Standard, bits: int) -> Array:
    """Tokens (..., n, d) of records, in the accumulation dtype of the standard.

    Raises
    ------
    ValueError
        If there is no code of that many bits, the bytes are not those of the standard's channels, or there is not one
        step for each token.
    TypeError
        If ``standard`` is no `Standard`, or the arrays are of several libraries.
    """
    check_kind(Standard, standard=standard)
    check_arrays(step=step, standard=standard.deviation)
    if library(codes) != library(step):
        raise TypeError(mixed({"codes": codes, "step": step}))
    xp = array_namespace(codes, step)
    if tuple(step.shape) != tuple(codes.shape[:-1]):
        raise ValueError(
            f"step has shape {tuple(step.shape)}, codes {tuple(codes.shape)}; give one step for each token, as encode "
            "returns them"
        )
    dtype = accumulation_dtype(xp, standard.deviation.dtype)
    levels = xp.astype(unpacked(codes, standard, bits), dtype)
    levels = (levels - less_centre(bits, standard, levels)) * xp.astype(step, dtype)[..., None]
    return standard.restore(standard.disordered(levels))


class Coded(NamedTuple):
    """Keys and values of the tokens of some KV heads, in records.

    Attributes
    ----------
    bits : tuple of int
        Of keys and of values.
    keys, values : uint8 array, shape (..., kv_head, n, bytes)
    key_step, value_step : array, shape (..., kv_head, n)
    key_standard, value_standard : Standard
        Of shape (..., kv_head, d) and (..., kv_head, dv), that of values around zero.
    """

    bits: tuple[int, int]
    keys: Array
    values: Array
    key_step: Array
    value_step: Array
    key_standard: Standard
    value_standard: Standard


class Coding(NamedTuple):
    """What the records of packed slots need to be read; see `momentkv.backends.layout.Layout`.

    Attributes
    ----------
    bits : tuple of int
        Of keys and of values.
    key_step, value_step : array, shape (..., slots)
    key_standard, value_standard : Standard
        Of shape (..., kv_head, d) and (..., kv_head, dv), that of values around zero.
    """

    bits: tuple[int, int]
    key_step: Array
    value_step: Array
    key_standard: Standard
    value_standard: Standard


def record_bytes(d: int, dv: int, bits: tuple[int, int]) -> int:
    """Bytes of one token's key and value, with a step of two bytes each.

    Examples
    --------
    >>> [record_bytes(64, 64, bits) for bits in ((3, 3), (4, 3), (4, 4))]
    [52, 60, 68]
    """
    return row_bytes(d, bits[0]) + row_bytes(dv, bits[1]) + 4

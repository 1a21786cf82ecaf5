"""What every module asks of an array library: its namespace, and the dtype to add things up in.

Shapes used everywhere (``...`` are any leading axes, usually the batch):

========  =========================================  ==============================
name      shape                                      meaning
========  =========================================  ==============================
``q``     ``(..., q_head, q_len, d)``                queries, post-RoPE, unscaled
``k``     ``(..., kv_head, n, d)``                   keys, post-RoPE
``v``     ``(..., kv_head, n, dv)``                  values
``lse``   ``(..., q_head, q_len)``                   natural log of a softmax sum
========  =========================================  ==============================

With grouped queries ``q_head = kv_head * group``, and query head ``h`` reads KV head ``h // group``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from array_api_compat import array_namespace, device, is_jax_array, is_torch_array, size

__all__ = [
    "AT_FIRST",
    "Array",
    "accumulate",
    "accumulate_as",
    "accumulation_dtype",
    "array_namespace",
    "check_arrays",
    "check_broadcast",
    "check_computed",
    "check_mask",
    "concrete",
    "device",
    "index_dtype",
    "inverse_factor",
    "is_jax_array",
    "is_torch_array",
    "nbytes",
    "trace_now",
]

# Arrays of any library: the array API has no common base class to name here.
Array = Any

# Bytes of the widest number that anything is computed in.
WIDEST = 8

# What is to be done when the first array of a library comes, by the name of its namespace: backends say it.
AT_FIRST: dict[str, Callable[[], object]] = {}


def index_dtype(xp: Any) -> Any:
    """The dtype that a library takes indices in."""
    return xp.__array_namespace_info__().default_dtypes()["indexing"]


def accumulation_dtype(xp: Any, *dtypes: Any) -> Any:
    """Dtype for sums over tokens: float64 if any input is float64, otherwise float32.

    A running mean in bfloat16 or float16 stagnates after a few hundred tokens, so nothing is added up in them.
    """
    return xp.float64 if any(dtype == xp.float64 for dtype in dtypes) else xp.float32


def accumulate(xp: Any, *arrays: Array) -> tuple[Array, ...]:
    """Cast all arrays to their common accumulation dtype (no copy where they have it)."""
    dtype = accumulation_dtype(xp, *(x.dtype for x in arrays))
    return tuple(xp.astype(x, dtype, copy=False) for x in arrays)


def accumulate_as(state: Array, name: str, **arrays: Array) -> tuple[Array, ...]:
    """Cast tokens to the dtype of the state that they are to be added to; `name` is that of the state.

    Raises
    ------
    ValueError
        If that would lose digits which the tokens' own accumulation dtype has.
    """
    xp = check_arrays(**{name: state}, **arrays)
    for own, x in arrays.items():
        if accumulation_dtype(xp, x.dtype) == xp.float64 != state.dtype:
            raise ValueError(
                f"{own} is {x.dtype}, but the {name} it is added to are {state.dtype}; cast one of them: "
                f"{own}, or the {name} with map()"
            )
    return tuple(xp.astype(x, state.dtype, copy=False) for x in arrays.values())


def concrete(*arrays: Array) -> bool:
    """Whether the values of arrays can be read: not while JAX traces a function (``jit``, ``vmap``, ``grad``).

    Where they cannot, checks of values are left out.

    Examples
    --------
    >>> import numpy as np
    >>> concrete(np.zeros(3))
    True
    """
    # Where an array is one of JAX, JAX is imported; nothing here imports it.
    return not any(is_jax_array(x) and isinstance(x, sys.modules["jax"].core.Tracer) for x in arrays)


def trace_now() -> Any:
    """What JAX traces now, to compare with what it traced another time; None where it traces nothing.

    Examples
    --------
    >>> trace_now() is None
    True
    """
    jax = sys.modules.get("jax")
    if jax is None:
        return None
    innermost = importlib.import_module("jax.extend.core").get_opaque_trace_state
    now = innermost()
    with jax.core.eval_context():
        return None if now == innermost() else now


def inverse_factor(matrix: Array) -> Array:
    r"""Lower triangular $W$ with $W^\top W = M^{-1}$ for symmetric positive definite $M$ (..., d, d).

    $\lVert W x \rVert^2 = x^\top M^{-1} x$, which rounding cannot make negative; it loses half of the digits to the
    condition of $M$ that a product with the inverse loses. Of other matrices nothing is promised, not even an error.

    $$ \begin{pmatrix} A & 0 \\ B & C \end{pmatrix}^{-1} =
       \begin{pmatrix} A^{-1} & 0 \\ -C^{-1} B A^{-1} & C^{-1} \end{pmatrix} $$

    A library solves for the identity column by column; with two factors of half the size, more of it is products.

    Examples
    --------
    >>> import numpy as np
    >>> inverse_factor(np.asarray([[4.0, 2.0], [2.0, 2.0]])).tolist()
    [[0.5, 0.0], [-0.5, 1.0]]
    """
    xp, half = array_namespace(matrix), matrix.shape[-1] // 2
    if is_torch_array(matrix):
        # Then PyTorch is imported; nothing here imports it. Its `cholesky` asks the device whether it succeeded: the
        # host would wait, and no CUDA graph could hold it.
        factor = sys.modules["torch"].linalg.cholesky_ex(matrix, check_errors=False).L
    else:
        factor = xp.linalg.cholesky(matrix)
    if half == 0:
        return 1 / factor
    first, last = (inverse_triangle(x) for x in (factor[..., :half, :half], factor[..., half:, half:]))
    across = -((last @ factor[..., half:, :half]) @ first)
    top = xp.concat([first, xp.zeros_like(across.mT)], axis=-1)
    return xp.concat([top, xp.concat([across, last], axis=-1)], axis=-2)


def inverse_triangle(factor: Array) -> Array:
    """Inverse of lower triangular matrices (..., d, d) with a positive diagonal."""
    xp = array_namespace(factor)
    if not is_torch_array(factor):
        return xp.linalg.inv(factor)
    one = xp.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return sys.modules["torch"].linalg.solve_triangular(factor, xp.broadcast_to(one, factor.shape), upper=False)


def orthonormal(x: Array) -> Array:
    """Orthonormal columns (..., n, w) with the span of those of ``x``; any orthonormal ones where those are dependent.

    Examples
    --------
    >>> import numpy as np
    >>> abs(orthonormal(np.asarray([[3.0], [4.0]]))).round(6).tolist()
    [[0.6], [0.8]]
    """
    if is_torch_array(x) and x.device.type == "cuda":
        # There PyTorch factorises one matrix after the other: two thirds of the time of a flush (H200).
        return orthonormal_by_gram(x)
    return array_namespace(x).linalg.qr(x)[0]


def leading(matrix: Array, number: int) -> Array:
    """Columns (..., w, number) that span the eigenvectors of the largest eigenvalues of small matrices (..., w, w).

    Symmetric ones without negative eigenvalues.

    Examples
    --------
    >>> import numpy as np
    >>> abs(leading(np.diag([1.0, 3.0, 2.0]), 2)).round(6).max(axis=-1).tolist()
    [0.0, 1.0, 1.0]
    """
    if is_torch_array(matrix) and matrix.device.type == "cuda":
        # PyTorch's decomposition asks the device whether it converged: the host waits, and no CUDA graph can hold it.
        return leading_by_squaring(matrix, number)
    return array_namespace(matrix).linalg.eigh(matrix)[1][..., -number:]


# How often a matrix is squared. Its eigenvalues are then raised to the power 2 ** this, and only the largest counts.
SQUARINGS = 8


def leading_by_squaring(matrix: Array, number: int) -> Array:
    """`leading` of PyTorch's tensors without waiting, one direction at a time; zero columns where there are no more.

    Of two nearly equal eigenvalues any mixture of their eigenvectors may come first; the span is that of both.
    """
    torch = sys.modules["torch"]
    rest, found = matrix.to(torch.float64), []
    tiny = torch.finfo(torch.float64).smallest_normal

    def trace(x: Array) -> Array:
        return x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=tiny)

    # What is left when all directions are found is rounding, and not at right angles to them.
    nothing = 1e-12 * trace(rest)
    for _ in range(number):
        rest = torch.where(trace(rest) > nothing, rest, 0.0)
        power = rest / trace(rest)
        for _ in range(SQUARINGS):
            power = power @ power
            power = power / trace(power)
        # The columns of what is left are multiples of one; take that with the largest entry on the diagonal.
        most = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[..., None, None].expand(*power.shape[:-1], 1)
        column = power.gather(-1, most)
        column = column / column.square().sum(-2, keepdim=True).sqrt().clamp(min=tiny)
        found.append(column)
        image = rest @ column
        both = column @ image.mT
        rest = rest - both - both.mT + (column.mT @ image) * (column @ column.mT)
    return torch.cat(found, dim=-1).to(matrix.dtype)


def orthonormal_by_gram(x: Array) -> Array:
    """`orthonormal` of PyTorch's tensors in few calls, none of which waits; zero columns where all are zero.

    By the Cholesky factor of the columns' products, which squares the condition number: so in float64, and with so
    little added to its diagonal as rounding may take away.
    """
    torch = sys.modules["torch"]
    wide = x.to(torch.float64)
    gram = wide.mT @ wide
    size = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    added = 1e-15 * size + torch.finfo(torch.float64).smallest_normal
    identity = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device)
    factor = torch.linalg.cholesky_ex(gram + added * identity, check_errors=False).L
    return torch.linalg.solve_triangular(factor, wide.mT, upper=False).mT.to(x.dtype)


def nbytes(x: Array) -> int:
    """Bytes that the elements of an array occupy.

    Examples
    --------
    >>> import numpy as np
    >>> nbytes(np.zeros((2, 3), dtype=np.float32))
    24
    """
    xp = array_namespace(x)
    if xp.isdtype(x.dtype, "bool"):
        bits = 8
    elif xp.isdtype(x.dtype, "integral"):
        bits = xp.iinfo(x.dtype).bits
    else:
        bits = xp.finfo(x.dtype).bits
    return (size(x) or 0) * bits // 8


def check_arrays(**arrays: Array) -> Any:
    """Raise unless all arguments are floating-point arrays of one library, whose namespace is returned.

    Looks at types alone, never at numbers: those may be on a device, or not be there yet.

    Examples
    --------
    >>> import numpy as np
    >>> check_arrays(q=np.zeros(3), k=np.zeros(3, dtype=int))
    Traceback (most recent call last):
    ValueError: k is int64 of shape (3,); it must be of floating point: convert it, to float32 say
    """
    try:
        xp = array_namespace(*arrays.values())
        floats = [floating(xp, x.dtype) for x in arrays.values()]
    except (TypeError, AttributeError):
        raise TypeError(mixed(arrays)) from None
    if not all(floats):
        name, x = next(item for item, right in zip(arrays.items(), floats, strict=True) if not right)
        raise ValueError(
            f"{name} is {x.dtype} of shape {tuple(x.shape)}; it must be of floating point: convert it, to float32 say"
        )
    for name, x in arrays.items():
        if not getattr(x.dtype, "isnative", True):
            raise ValueError(f"{name} is {x.dtype}, of the other byte order; convert it, to float64 say")
    return xp


def check_computed(**arrays: Array) -> Any:
    """`check_arrays` of what is computed in 32 or 64 bits: raise where that would drop digits without a word."""
    xp = check_arrays(**arrays)
    for name, x in arrays.items():
        if getattr(x.dtype, "itemsize", 0) > WIDEST:
            raise ValueError(f"{name} is {x.dtype}, wider than anything is computed in; convert it to float64")
    return xp


@cache
def floating(xp: Any, dtype: Any) -> bool:
    """Whether a dtype is one of real floating-point numbers; of a library's first one, `AT_FIRST` is done."""
    if xp.__name__ in AT_FIRST:
        AT_FIRST.pop(xp.__name__)()
    return bool(xp.isdtype(dtype, "real floating"))


def library(x: Any) -> str | None:
    """Name of the library of an array; None for anything else."""
    try:
        name: str = array_namespace(x).__name__
    except TypeError:
        return None
    return name.removeprefix("array_api_compat.").partition(".")[0]


def mixed(arrays: dict[str, Any]) -> str:
    """The message for arguments that are not arrays of one library."""
    for name, x in arrays.items():
        if library(x) is None or not hasattr(x, "dtype"):
            return f"{name} is a {type(x).__name__}; pass an array of NumPy, PyTorch, JAX or another array-API library"
    (first, one), *others = arrays.items()
    name, other = next((name, x) for name, x in others if library(x) != library(one))
    return (
        f"{first} is an array of {library(one)}, {name} one of {library(other)}; convert one of them: all arrays of a "
        "call must be of one library"
    )


def check_mask(name: str, mask: Array, shape: tuple[int, ...], like: Array) -> None:
    """Raise unless a mask is a bool array of the library of ``like`` that broadcasts to ``shape``."""
    # Of one library, as mostly; JAX has arrays of several types.
    if type(mask) is not type(like) and library(mask) != library(like):
        raise TypeError(mixed({name: mask, "tokens": like}))
    if mask.dtype != array_namespace(like).bool:
        raise ValueError(
            f"{name} is {mask.dtype} of shape {tuple(mask.shape)}; it must be bool, True for what counts: {name} != 0 "
            f"makes it of ones and zeros, {name} == 0 of zeros and -inf"
        )
    check_broadcast(name, mask, shape)


def check_broadcast(name: str, x: Array, shape: tuple[int, ...]) -> None:
    """Raise unless ``x`` broadcasts to ``shape``."""
    trailing = shape[len(shape) - x.ndim :] if x.ndim <= len(shape) else None
    if trailing is None or any(mine not in (1, whole) for mine, whole in zip(x.shape, trailing, strict=True)):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, which does not broadcast to {tuple(shape)}")

"""Tokens as rows of a matrix: taken, hidden, multiplied, put in order, with as little new memory as may be."""

from __future__ import annotations

import math
from collections.abc import Sequence

from momentkv._array import Array, array_namespace, device, index_dtype, is_torch_array

__all__ = [
    "chosen_first",
    "column_products",
    "inverse_permutation",
    "joined_rows",
    "less_product",
    "plus_product",
    "real_rows",
    "row_products",
    "scaled",
    "stacked_rows",
    "take_columns",
    "take_rows",
    "take_rows_of",
    "take_rows_of_heads",
]


def take_rows(x: Array, index: Array) -> Array:
    """Rows of the last but one axis, by an index for each of the leading axes: (..., n, d) by (..., m) is (..., m, d).

    As ``take_along_axis`` of a broadcast index, without an index for every number.

    Examples
    --------
    >>> import numpy as np
    >>> take_rows(np.asarray([[[1.0], [2.0]], [[3.0], [4.0]]]), np.asarray([[1], [0]])).tolist()
    [[[2.0]], [[3.0]]]
    """
    return take_rows_of(index, x)[0]


def take_rows_of(index: Array, *arrays: Array) -> tuple[Array, ...]:
    """`take_rows` of several arrays (..., n, d) by one index; the last axes may differ.

    Examples
    --------
    >>> import numpy as np
    >>> keys, values = np.asarray([[[1.0], [2.0]]]), np.asarray([[[3.0, 4.0], [5.0, 6.0]]])
    >>> [x.tolist() for x in take_rows_of(np.asarray([[1]]), keys, values)]
    [[[[2.0]]], [[[5.0, 6.0]]]]
    """
    xp = array_namespace(index, *arrays)
    *lead, n, _ = arrays[0].shape
    count, numbers = math.prod(lead), dict[bool, Array]()
    taken = []
    for x in arrays:
        by_token = lies_by_token(x)
        if by_token not in numbers:
            numbers[by_token] = xp.reshape(numbers_of_rows(index, lead, n, by_token=by_token), (-1,))
        rows = xp.reshape(xp.permute_dims(x, swapped(x.ndim)) if by_token else x, (count * n, x.shape[-1]))
        taken.append(xp.reshape(xp.take(rows, numbers[by_token], axis=0), (*index.shape, x.shape[-1])))
    return tuple(taken)


def take_rows_of_heads(index: Array, *arrays: Array) -> tuple[Array, ...]:
    """Rows of arrays (..., heads, n, d) by numbers (..., m) that count on from head to head: (..., m, d).

    Examples
    --------
    >>> import numpy as np
    >>> keys = np.asarray([[[1.0], [2.0]], [[3.0], [4.0]]])
    >>> [x.tolist() for x in take_rows_of_heads(np.asarray([3, 0]), keys)]
    [[[4.0], [1.0]]]
    """
    *lead, heads, n, _ = arrays[0].shape
    taken, turned = [], None
    for x in arrays:
        own, by_token = index, lies_by_token(x)
        if by_token:
            turned = index % n * heads + index // n if turned is None else turned
            own, x = turned, array_namespace(x).permute_dims(x, swapped(x.ndim))
        taken.append(take_rows(array_namespace(x).reshape(x, (*lead, heads * n, x.shape[-1])), own))
    return tuple(taken)


def lies_by_token(x: Array) -> bool:
    """Whether an array (..., head, n, d) has the heads of a token side by side, as projections of a model have them.

    Rows of such an array are read where they are; to put them in the order of its axes would copy all of it.
    """
    if not is_torch_array(x) or x.ndim < 3 or x.is_contiguous():
        return False
    return bool(x.transpose(-3, -2).is_contiguous())


def swapped(axes: int) -> tuple[int, ...]:
    """So many axes, with the last but two and the last but one in each other's place."""
    return (*range(axes - 3), axes - 2, axes - 3, axes - 1)


def numbers_of_rows(index: Array, lead: Sequence[int], n: int, *, by_token: bool) -> Array:
    """Which rows of the matrix of all rows, as they lie, an index (*lead, m) for each of the leading axes means."""
    xp, count = array_namespace(index), math.prod(lead)
    if count <= 1:
        return index
    if not by_token:
        first = xp.arange(0, count * n, n or 1, dtype=index.dtype, device=device(index))
        return index + xp.reshape(first, (*lead, 1))
    heads = lead[-1]
    first = xp.arange(0, count * n, heads * n or 1, dtype=index.dtype, device=device(index))[:, None]
    first = first + xp.arange(heads, dtype=index.dtype, device=device(index))
    return index * heads + xp.reshape(first, (*lead, 1))


def take_columns(x: Array, index: Array) -> Array:
    """Columns, by an index for each of the leading axes: (..., n, d) by (..., m) is (..., n, m); see `take_rows`.

    Examples
    --------
    >>> import numpy as np
    >>> take_columns(np.asarray([[[1.0, 2.0], [3.0, 4.0]]]), np.asarray([[1, 0]])).tolist()
    [[[2.0, 1.0], [4.0, 3.0]]]
    """
    if is_torch_array(x):
        return x.gather(-1, index[..., None, :].expand(*x.shape[:-1], index.shape[-1]))
    return take_rows(x.mT, index).mT


def real_rows(x: Array, real: Array) -> Array:
    """Rows (..., n, d) where ``real``, broadcastable to (..., n), is true; zero elsewhere, whatever lies there.

    The same as ``where`` with a mask for every number, in a fraction of the time, because whole rows are moved.

    Examples
    --------
    >>> import numpy as np
    >>> real_rows(np.asarray([[1.0, 2.0], [np.nan, 3.0]]), np.asarray([True, False])).tolist()
    [[1.0, 2.0], [0.0, 0.0]]
    """
    return stacked_rows((x,), real)[0, ...]


def stacked_rows(arrays: Sequence[Array], real: Array) -> Array:
    """`real_rows` of arrays of one shape and dtype, side by side: (number, ..., n, d).

    Examples
    --------
    >>> import numpy as np
    >>> x = np.asarray([[1.0], [np.nan]])
    >>> stacked_rows((x, 2 * x), np.asarray([True, False])).tolist()
    [[[1.0], [0.0]], [[2.0], [0.0]]]
    """
    xp = array_namespace(real, *arrays)
    *lead, n, d = arrays[0].shape
    count = math.prod(lead) * n
    zero = xp.zeros((1, d), dtype=arrays[0].dtype, device=device(real))
    rows = xp.concat([*(xp.reshape(x, (count, d)) for x in arrays), zero])
    index = xp.reshape(xp.arange(len(arrays) * count, device=device(real)), (len(arrays), *lead, n))
    index = xp.reshape(xp.where(real, index, xp.full_like(index, len(arrays) * count)), (-1,))
    return xp.reshape(xp.take(rows, index, axis=0), (len(arrays), *lead, n, d))


def joined_rows(first: Array, x: Array, real: Array | None) -> Array:
    """Rows (..., m, d) and then those of ``x`` (..., n, d), zero where ``real``, if given, is not true, as `real_rows`.

    Examples
    --------
    >>> import numpy as np
    >>> joined_rows(np.asarray([[1.0]]), np.asarray([[2.0], [np.nan]]), np.asarray([True, False])).tolist()
    [[1.0], [2.0], [0.0]]
    """
    xp, where = array_namespace(first, x), device(x)
    if real is None:
        return xp.concat([first, x], axis=-2)
    *lead, n, d = x.shape
    count, m = math.prod(lead), first.shape[-2]
    zero = xp.zeros((1, d), dtype=x.dtype, device=where)
    rows = xp.concat([xp.reshape(first, (count * m, d)), xp.reshape(x, (count * n, d)), zero])
    mine = xp.reshape(xp.arange(count * m, device=where), (*lead, m))
    index = xp.reshape(xp.arange(count * m, count * (m + n), device=where), (*lead, n))
    index = xp.concat([mine, xp.where(real, index, xp.full_like(index, count * (m + n)))], axis=-1)
    return xp.reshape(xp.take(rows, xp.reshape(index, (-1,)), axis=0), (*lead, m + n, d))


def row_products(own: Array, x: Array) -> Array:
    """Inner products of rows, ``sum(own * x, axis=-1)``; ``own`` is the caller's alone and may be overwritten.

    Examples
    --------
    >>> import numpy as np
    >>> row_products(np.asarray([[1.0, 2.0]]), np.asarray([[3.0, 4.0]])).tolist()
    [11.0]
    """
    return array_namespace(own, x).sum(scaled(own, x), axis=-1)


def column_products(own: Array, x: Array) -> Array:
    """Inner products of columns, ``sum(own * x, axis=-2)``; ``own`` as in `row_products`.

    Examples
    --------
    >>> import numpy as np
    >>> column_products(np.asarray([[1.0, 2.0]]), np.asarray([[3.0, 4.0]])).tolist()
    [3.0, 8.0]
    """
    return array_namespace(own, x).sum(scaled(own, x), axis=-2)


def scaled(own: Array, x: Array) -> Array:
    """``own * x``; ``own`` as in `row_products`.

    Examples
    --------
    >>> import numpy as np
    >>> scaled(np.asarray([1.0, 2.0]), np.asarray([3.0, 4.0])).tolist()
    [3.0, 8.0]
    """
    # New memory of this size costs a CPU more than the product: the system hands it out page by page.
    in_place = is_torch_array(own) and not (own.requires_grad or x.requires_grad)
    return own.mul_(x) if in_place else own * x


def plus_product(x: Array, factor: Array, y: Array) -> Array:
    """``x + factor * y``, by PyTorch without memory for the product.

    Examples
    --------
    >>> import numpy as np
    >>> plus_product(np.asarray([3.0, 4.0]), np.asarray([1.0, 0.0]), np.asarray([1.0])).tolist()
    [4.0, 4.0]
    """
    return x.addcmul(factor, y) if is_torch_array(x) else x + factor * y


def less_product(x: Array, a: Array, b: Array) -> Array:
    """``x - a @ b`` of matrices (..., n, m) and (..., m, d), by PyTorch without memory for the product.

    Examples
    --------
    >>> import numpy as np
    >>> less_product(np.asarray([[3.0, 4.0]]), np.asarray([[2.0]]), np.asarray([[1.0, 1.0]])).tolist()
    [[1.0, 2.0]]
    """
    if not is_torch_array(x):
        return x - a @ b
    flat, a, b = (y.reshape(-1, *y.shape[-2:]) for y in (x, a, b))
    return flat.baddbmm(a, b, alpha=-1).reshape(x.shape)


def chosen_first(chosen: Array) -> Array:
    """Numbers of the slots (..., n) by order: those that are chosen, then the others, each in turn.

    As a stable sort of the mask gives them, by counting.

    Examples
    --------
    >>> import numpy as np
    >>> chosen_first(np.asarray([False, True, False, True])).tolist()
    [1, 3, 0, 2]
    """
    xp = array_namespace(chosen)
    number = xp.astype(chosen, index_dtype(xp))
    before = xp.cumulative_sum(number, axis=-1)
    slots = xp.arange(chosen.shape[-1], dtype=before.dtype, device=device(chosen))
    return inverse_permutation(xp.where(chosen, before - 1, before[..., -1:] + slots - before))


def inverse_permutation(order: Array) -> Array:
    """The place of each number in ``order`` (..., n), whose rows are permutations of 0 ... n - 1.

    Examples
    --------
    >>> import numpy as np
    >>> inverse_permutation(np.asarray([2, 0, 1])).tolist()
    [1, 2, 0]
    """
    xp = array_namespace(order)
    if is_torch_array(order):
        places = xp.broadcast_to(xp.arange(order.shape[-1], device=order.device), order.shape)
        return xp.empty_like(order).scatter_(-1, order, places)
    return xp.argsort(order, axis=-1, stable=True)

"""The fused operators, known to PyTorch by name: ``torch.ops.momentkv.decode`` and ``torch.ops.momentkv.fold``.

On CUDA they are Triton kernels, on a CPU plain PyTorch; their fake kernels tell `torch.compile` the shapes of results,
so that a compiled or captured step contains them without a break. Nothing in them waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch

from momentkv.backends.plain import decode_plain, fold_plain
from momentkv.statistics.expansion import Expansion

__all__ = ["decode", "decode_operator", "fold", "fold_operator"]

Tensor = torch.Tensor
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.library.custom_op("momentkv::decode", mutates_args=(), device_types="cuda")
def decode_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor | None,
    counts: torch.Tensor | None,
    starts: torch.Tensor | None,
    capacity: int,
    scale: float,
    scored: bool,
    log_weight: torch.Tensor | None,
    key_mean: torch.Tensor | None,
    value_mean: torch.Tensor | None,
    anchor: torch.Tensor | None,
    slope: torch.Tensor | None,
    slope_left: torch.Tensor | None,
    slope_right: torch.Tensor | None,
    variance: torch.Tensor | None,
    strength: torch.Tensor | None,
    cap: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`decode` with the expansion in parts; without logits, an empty tensor in their place."""
    from momentkv.backends.triton.decode import decode_triton

    expansion = assemble(
        log_weight, key_mean, value_mean, anchor, slope, slope_left, slope_right, variance, strength, cap
    )
    with torch.cuda.device(q.device):
        out, lse, logits = decode_triton(q, k, v, positions, counts, starts, capacity, expansion, scale, scored)
    return out, lse, lse.new_empty(0) if logits is None else logits


@decode_operator.register_kernel("cpu")
def decode_on_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    counts: Tensor | None,
    starts: Tensor | None,
    capacity: int,
    scale: float,
    scored: bool,
    *parts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    out, lse, logits = decode_plain(q, k, v, positions, counts, starts, capacity, assemble(*parts), scale, scored)
    return out, lse, lse.new_empty(0) if logits is None else logits


@decode_operator.register_fake
def decode_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    counts: Tensor | None,
    starts: Tensor | None,
    capacity: int,
    scale: float,
    scored: bool,
    *parts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, q_heads, q_len, _ = q.shape
    kv_heads = k.shape[1] if starts is None else starts.shape[-1]
    lse = q.new_empty((batch, q_heads, q_len), dtype=torch.float32)
    logits = lse.new_empty((batch, kv_heads, q_heads // kv_heads, q_len, capacity) if scored else (0,))
    return q.new_empty((batch, q_heads, q_len, v.shape[-1])), lse, logits


@torch.library.custom_op(
    "momentkv::fold",
    mutates_args=(
        *("keys", "values", "positions", "score", "counts"),
        *("weight", "log_weight", "key_mean", "value_mean", "key_value", "slope"),
    ),
    device_types="cuda",
)
def fold_operator(
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    score: torch.Tensor,
    counts: torch.Tensor,
    evicted: torch.Tensor,
    weight: torch.Tensor,
    log_weight: torch.Tensor,
    key_mean: torch.Tensor,
    value_mean: torch.Tensor,
    key_value: torch.Tensor | None,
    slope: torch.Tensor | None,
) -> None:
    """`fold` without its checks."""
    from momentkv.backends.triton.fold import fold_triton

    with torch.cuda.device(keys.device):
        fold_triton(
            keys, values, positions, score, counts, evicted,
            weight, log_weight, key_mean, value_mean, key_value, slope,
        )  # fmt: skip


fold_operator.register_kernel("cpu")(fold_plain)


@fold_operator.register_fake
def fold_shapes(*arguments: Tensor | None) -> None:
    return None


def assemble(*parts: Any) -> Expansion | None:
    """The expansion whose parts an operator was given, or None."""
    return None if parts[0] is None else Expansion(*parts)


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    expansion: Expansion | None = None,
    *,
    scale: float,
    positions: Tensor | None = None,
    counts: Tensor | None = None,
    starts: Tensor | None = None,
    capacity: int | None = None,
    scored: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    r"""Attention of a few queries over retained tokens and the estimate of the evicted ones, in one operator.

    Parameters
    ----------
    q : tensor, shape (batch, kv_head * group, q_len, d)
        Every query sees every token.
    k, v : tensor, shape (batch, kv_head, capacity, d) and (batch, kv_head, capacity, dv), or (n, d) and (n, dv)
        In the dtype of ``q``. The second form is packed: tokens of all heads one after the other, see ``starts``.
    expansion : Expansion, optional
        Of the evicted tokens (``moments.expansion()``).
    scale : float
        Factor on ``q . k``.
    positions : int32 tensor, shape (batch, kv_head, capacity) or (n,), optional
        Negative for a slot that holds no token.
    counts : int32 tensor, shape (batch, kv_head), optional
        Slots in use of each head; what the others hold is never read.
    starts : int64 tensor, shape (batch, kv_head), optional
        First token of each head where tokens are packed; needs ``counts`` and ``capacity``.
    capacity : int, optional
        Most tokens that a head has; known already unless tokens are packed.
    scored : bool
        Whether to return logits.

    Returns
    -------
    out : tensor, shape (batch, kv_head * group, q_len, dv)
        In the dtype of ``q``.
    lse : float32 tensor, shape (batch, kv_head * group, q_len)
        Natural log, of retained and evicted tokens together.
    logits : float32 tensor, shape (batch, kv_head, group, q_len, capacity), or None
        Of the retained tokens; ``-inf`` for slots without one.

    Raises
    ------
    ValueError
        If shapes, dtypes or memory layouts do not fit.

    Notes
    -----
    Sums are float32; probabilities are rounded to the dtype of ``v`` before they meet it. No gradient. On CUDA it may
    be captured in a graph: its launches depend on shapes alone.
    """
    packed = starts is not None
    if q.ndim != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (batch, q_head, q_len, d)")
    if k.ndim != (2 if packed else 4) or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"k has shape {tuple(k.shape)}, v {tuple(v.shape)}; both must be (batch, kv_head, capacity, ...), or "
            "(n, ...) with starts"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}; they must be of one dtype, float32, bfloat16 or "
            "float16"
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"q has head dimension {q.shape[-1]} but k has {k.shape[-1]}; they must be equal")
    if starts is not None and (counts is None or capacity is None):
        raise ValueError("starts is given, so that counts and capacity must be, too: tokens are packed")
    if starts is None:
        if capacity not in (None, k.shape[-2]):
            raise ValueError(f"capacity is {capacity}, but k has {k.shape[-2]} slots; leave it out")
        capacity = k.shape[-2]
    lead = tuple(k.shape[:2]) if starts is None else tuple(starts.shape)
    if len(lead) != 2 or lead[0] != q.shape[0] or lead[1] == 0 or q.shape[1] % lead[1]:
        raise ValueError(
            f"q has {q.shape[1]} heads in {q.shape[0]} rows, the cache {lead}; rows must be equal, and query heads a "
            "multiple of KV heads"
        )
    for name, x, shape, dtype in (
        ("positions", positions, tuple(k.shape[:-1]), torch.int32),
        ("counts", counts, lead, torch.int32),
        ("starts", starts, lead, torch.int64),
    ):
        if x is not None and (tuple(x.shape) != shape or x.dtype != dtype):
            raise ValueError(f"{name} is {x.dtype} of shape {tuple(x.shape)}; it must be {dtype} of shape {shape}")
    if expansion is not None:
        check_expansion(expansion, lead, q.shape[-1], v.shape[-1])
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    positions, counts, starts = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (positions, counts, starts)
    )
    parts: tuple[Any, ...] = (None,) * len(Expansion._fields) if expansion is None else tuple(expansion)
    out, lse, logits = decode_operator(q, k, v, positions, counts, starts, capacity, float(scale), scored, *parts)
    return out, lse, logits if scored else None


def check_expansion(expansion: Expansion, lead: tuple[int, ...], d: int, dv: int) -> None:
    """Raise unless every part has the shape that a kernel will read."""
    m = expansion.log_weight.shape[-1]
    r = 0 if expansion.slope_right is None else expansion.slope_right.shape[-2]
    shapes: dict[str, list[tuple[int, ...]]] = {
        "log_weight": [(m,)],
        "key_mean": [(m, d)],
        "value_mean": [(m, dv)],
        "anchor": [(d,)],
        "slope": [(d, dv)],
        "slope_left": [(dv, r)],
        "slope_right": [(r, d)],
        "variance": [(d,), (d, d)],
        "strength": [()],
        "cap": [()],
    }
    for name, x in expansion._asdict().items():
        if x is not None and tuple(x.shape) not in [(*lead, *shape) for shape in shapes[name]]:
            raise ValueError(
                f"{name} of the expansion has shape {tuple(x.shape)}; it must be "
                + " or ".join(str((*lead, *shape)) for shape in shapes[name])
            )
    if (expansion.slope_left is None) != (expansion.slope_right is None):
        raise ValueError("slope_left and slope_right are factors of one matrix; give both or neither")
    if expansion.variance is not None and (expansion.strength is None or expansion.cap is None):
        raise ValueError("variance is given, so that strength and cap must be, too")


def fold(
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    score: Tensor,
    counts: Tensor,
    evicted: Tensor,
    weight: Tensor,
    log_weight: Tensor,
    key_mean: Tensor,
    value_mean: Tensor,
    key_value: Tensor | None = None,
    slope: Tensor | None = None,
) -> None:
    r"""Fold tokens into the paper's moments and close the gaps they leave with the last tokens, all in place.

    With the evicted block :math:`B` of each head (`momentkv.statistics.moments.Moments.merge`):
    :math:`S \leftarrow S + S_B + \tfrac{W W_B}{W + W_B}\, \delta_k \delta_v^\top`.

    Parameters
    ----------
    keys, values : tensor, shape (batch, kv_head, capacity, d) and (batch, kv_head, capacity, dv)
    positions : int32 tensor, shape (batch, kv_head, capacity)
        -1 afterwards for the slots that have become free.
    score : float32 tensor, shape (batch, kv_head, capacity)
        Moves with the tokens.
    counts : int32 tensor, shape (batch, kv_head)
        Slots in use, the first of each head.
    evicted : int32 tensor, shape (batch, kv_head, block)
        Distinct slots in use, in any order; negative entries stand for none.
    weight, log_weight : float32 tensor, shape (batch, kv_head)
        Of the moments, and its natural log.
    key_mean, value_mean : float32 tensor, shape (batch, kv_head, d) and (batch, kv_head, dv)
    key_value : float32 tensor, shape (batch, kv_head, d, dv), optional
        Centred co-moment, keys first; None for moments of order 0.
    slope : tensor, shape (batch, kv_head, d, dv), optional
        ``key_value / weight`` in the dtype that attention reads; goes with ``key_value``.

    Raises
    ------
    ValueError
        If shapes, dtypes or memory layouts do not fit.

    Notes
    -----
    Cost: the evicted tokens, as many that move, and the moments, whatever the capacity.
    Slots are not kept in order of position; attention does not depend on it.
    """
    lead, capacity = tuple(keys.shape[:2]), keys.shape[2]
    d, dv = keys.shape[-1], values.shape[-1]
    single, whole = torch.float32, torch.int32
    for name, x, shape, dtype in (
        ("keys", keys, (*lead, capacity, d), keys.dtype),
        ("values", values, (*lead, capacity, dv), keys.dtype),
        ("positions", positions, (*lead, capacity), whole),
        ("score", score, (*lead, capacity), single),
        ("counts", counts, lead, whole),
        ("evicted", evicted, (*lead, evicted.shape[-1]), whole),
        ("weight", weight, lead, single),
        ("log_weight", log_weight, lead, single),
        ("key_mean", key_mean, (*lead, d), single),
        ("value_mean", value_mean, (*lead, dv), single),
        ("key_value", key_value, (*lead, d, dv), single),
        ("slope", slope, (*lead, d, dv), None),
    ):
        if x is None:
            continue
        if tuple(x.shape) != shape or (dtype is not None and x.dtype != dtype) or not x.is_contiguous():
            raise ValueError(
                f"{name} is {x.dtype} of shape {tuple(x.shape)}{'' if x.is_contiguous() else ', not contiguous'}; it "
                f"must be {'' if dtype is None else f'{dtype}, '}contiguous and of shape {shape}"
            )
    if (key_value is None) != (slope is None):
        raise ValueError("key_value and slope are two forms of one matrix; give both or neither")
    fold_operator(
        keys, values, positions, score, counts, evicted, weight, log_weight, key_mean, value_mean, key_value, slope
    )

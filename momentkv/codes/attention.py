r"""Attention over tokens that are never decoded: the affine map moves into the query, and out of the output.

$$ s\, q \cdot k_t = s\, q \cdot m_k + \delta_t \sum_c (s\, q_c\, \sigma_c)(c_{tc} - h), \qquad
   \sum_t p_t v_t = m_v + \sigma_v \sum_t p_t\, \delta'_t\,(c'_t - h), \qquad h = 2^{b-1} - 1/2 $$
"""

from __future__ import annotations

from momentkv._array import Array, accumulate, array_namespace, device
from momentkv.attention import AttentionState, group_queries, masked, softmax_weights, ungroup_queries
from momentkv.codes.packing import unpack
from momentkv.codes.records import Coded, centre, less_centre, unpacked

__all__ = ["BLOCK", "attend_codes"]

# Tokens whose codes are unpacked at once.
BLOCK = 4096


def attend_codes(q: Array, coded: Coded, *, scale: float, mask: Array | None = None) -> tuple[AttentionState, Array]:
    """Attention state and weights of a few queries over all tokens of some KV heads.

    Parameters
    ----------
    q : array, shape (..., kv_head * group, q_len, d)
    coded : Coded
    scale : float
        Factor on ``q . k``.
    mask : bool array, optional
        Broadcastable to ``(..., kv_head, group, q_len, n)``.

    Returns
    -------
    state : AttentionState
    weights : array, shape (..., kv_head, group, q_len, n)

    Notes
    -----
    That of the decoded tokens, to rounding. Codes are unpacked by blocks of tokens, twice in all.
    """
    xp = array_namespace(q)
    (of_key, of_value), n, q_heads, q_len = coded.bits, coded.keys.shape[-2], q.shape[-3], q.shape[-2]
    kv_heads, of_keys, of_values = coded.keys.shape[-3], coded.key_standard, coded.value_standard
    mean, dv = of_keys.mean, of_values.deviation.shape[-1]
    q, deviation = accumulate(xp, q, of_keys.deviation)
    dtype = q.dtype
    folded = group_queries(q, kv_heads) * scale
    shift = 0.0 if mean is None else xp.matmul(folded, xp.astype(mean, dtype)[..., None])
    folded = of_keys.ordered(folded * deviation[..., None, :])
    zero = xp.sum(less_centre(of_key, of_keys, folded) * folded, axis=-1, keepdims=True)
    logits, blocks = [], [slice(start, min(start + BLOCK, n)) for start in range(0, n, BLOCK)]
    for block in blocks:
        codes = xp.astype(unpacked(coded.keys[..., block, :], of_keys, of_key), dtype)
        step = xp.astype(coded.key_step[..., block], dtype)[..., None, :]
        logits.append((xp.matmul(folded, xp.matrix_transpose(codes)) - zero) * step + shift)
    lead = (*folded.shape[:-2], q_heads // kv_heads, q_len, n)
    products = (
        xp.reshape(logits[0] if len(logits) == 1 else xp.concat(logits, axis=-1), lead)
        if n
        else xp.zeros(lead, dtype=dtype)
    )
    weights, lse = softmax_weights(masked(products, mask))
    flat = xp.reshape(weights, (*folded.shape[:-1], n))
    out = xp.zeros((*folded.shape[:-1], dv), dtype=dtype, device=device(q))
    for block in blocks:
        part = flat[..., block] * xp.astype(coded.value_step[..., block], dtype)[..., None, :]
        codes = xp.astype(unpack(coded.values[..., block, :], of_value, dv), dtype)
        out = out + (xp.matmul(part, codes) - centre(of_value) * xp.sum(part, axis=-1, keepdims=True))
    out = out * xp.astype(of_values.deviation, dtype)[..., None, :]
    if of_values.mean is not None:  # weights add up to one, or to zero where no token is seen
        out = out + xp.sum(flat, axis=-1, keepdims=True) * xp.astype(of_values.mean, dtype)[..., None, :]
    return AttentionState(ungroup_queries(out, q_heads, q_len), xp.reshape(lse, (*lead[:-4], q_heads, q_len))), weights

"""A stream of tokens through one layer's cache, on NumPy arrays: plain eviction against the corrected one.

Run: python examples/arrays.py
"""

import numpy as np

from momentkv import LayerCache, attend

QUERY_HEADS, KV_HEADS, D, TOKENS, BUDGET = 4, 2, 32, 2000, 128


def main() -> None:
    rng = np.random.default_rng(0)
    # Keys with a common offset and values that depend on them, as trained heads have.
    directions = rng.normal(size=(KV_HEADS, D, D)) / np.sqrt(D)
    keys = 0.6 * rng.normal(size=(KV_HEADS, TOKENS, D)) + rng.normal(size=(KV_HEADS, 1, D))
    values = keys @ directions + 0.3 * rng.normal(size=keys.shape)
    queries = rng.normal(size=(QUERY_HEADS, TOKENS, D))

    exact = attend(queries[:, -1:], keys, values).out
    full_bytes = keys.nbytes + values.nbytes
    print(f"full cache: {full_bytes / 1024:7.1f} KiB")
    for order, name in ((None, "plain eviction"), (0, "order 0"), (1, "order 1")):
        cache = LayerCache(BUDGET, policy="momentkv", order=order)
        cache.step(queries[:, :1000], keys[:, :1000], values[:, :1000])  # prefill
        for t in range(1000, TOKENS):  # decode
            out = cache.step(queries[:, t : t + 1], keys[:, t : t + 1], values[:, t : t + 1])
        error = np.linalg.norm(out - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
        print(f"{name:>14}: {cache.nbytes / 1024:7.1f} KiB, relative error {error.mean():.3f}")


if __name__ == "__main__":
    main()

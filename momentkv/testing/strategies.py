"""Cases that every law has to survive: shapes, kinds of numbers and masks, drawn by hypothesis."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

LAWS = ("gaussian", "ties", "huge", "huge keys", "offset", "heavy")
MASKS = ("none", "random", "tokens", "rows", "all")

_few = contextvars.ContextVar("few", default=False)


@contextlib.contextmanager
def few_shapes() -> Iterator[None]:
    """Draw cases of few shapes within: for libraries that compile every operation for every shape, such as JAX."""
    token = _few.set(True)
    try:
        yield
    finally:
        _few.reset(token)


@st.composite
def shape(draw: st.DrawFn, strategy: st.SearchStrategy[Any], few: Any) -> Any:
    """A draw of what a shape depends on; within `few_shapes` always ``few``."""
    return few if _few.get() else draw(strategy)


@dataclasses.dataclass(frozen=True)
class Case:
    """Shapes and a seed; the numbers follow. They are float64, but each is a number of ``dtype``."""

    batch: tuple[int, ...]
    kv_heads: int
    group: int
    q_len: int
    n: int
    d: int
    dv: int
    law: str
    masked: str
    dtype: str
    seed: int

    @property
    def q_heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def lead(self) -> tuple[int, ...]:
        return (*self.batch, self.kv_heads)

    def rng(self, purpose: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.seed, purpose])

    def rounded(self, x: NDArray[Any]) -> NDArray[Any]:
        return x.astype(self.dtype)

    def query(self) -> NDArray[Any]:
        x = numbers(self.rng(1), (*self.batch, self.q_heads, self.q_len, self.d), self.law)
        # Far-off queries beside far-off keys would make every set of weights one-hot.
        return self.rounded(x - 1000.0 if self.law == "offset" else x / 1e4 if self.law == "huge keys" else x)

    def tokens(self) -> tuple[NDArray[Any], NDArray[Any]]:
        rng = self.rng(2)
        k, v = (numbers(rng, (*self.lead, self.n, size), self.law) for size in (self.d, self.dv))
        if self.law == "ties" and self.n > 1:
            k[..., -1, :], v[..., -1, :] = k[..., 0, :], v[..., 0, :]
        return self.rounded(k), self.rounded(v)

    def arrays(self) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        return (self.query(), *self.tokens())

    def mask(self) -> NDArray[Any] | None:
        """For attention: broadcastable to (..., kv_head, group, q_len, n)."""
        rng = self.rng(3)
        full = (*self.lead, self.group, self.q_len, self.n)
        if self.masked == "none":
            return None
        if self.masked == "all":
            return np.zeros(full, dtype=bool)
        if self.masked == "tokens":
            return rng.random((*self.lead, 1, 1, self.n)) < 0.5
        mask = rng.random(full) < 0.5
        return mask & (rng.random((self.q_len, 1)) < 0.5) if self.masked == "rows" else mask

    def token_mask(self) -> NDArray[Any] | None:
        """For moments: broadcastable to (..., n); other tokens in each head."""
        if self.masked == "none":
            return None
        share = {"all": 0.0, "rows": 0.1}.get(self.masked, 0.5)
        return self.rng(4).random((*self.lead, self.n)) < share

    def weights(self) -> NDArray[Any]:
        """Not negative, some zero, of very different sizes."""
        rng = self.rng(5)
        w = np.exp(3 * rng.standard_normal((*self.lead, self.n)))
        return self.rounded(np.where(rng.random(w.shape) < 0.2, 0.0, w))

    def factor(self) -> float:
        return float(self.rng(6).uniform(0.05, 2.0))


def numbers(rng: np.random.Generator, shape: tuple[int, ...], law: str) -> NDArray[Any]:
    if law == "ties":
        return rng.integers(-1, 2, shape).astype(float)
    if law == "heavy":
        return rng.standard_t(1.5, shape)
    return rng.standard_normal(shape) * (1e4 if law.startswith("huge") else 1.0) + (1e3 if law == "offset" else 0.0)


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    n: st.SearchStrategy[int] | None = None,
    laws: tuple[str, ...] = LAWS,
    masks: tuple[str, ...] = ("none",),
    dtypes: tuple[str, ...] = ("float64", "float32"),
) -> Case:
    tokens = draw(st.one_of(st.sampled_from([0, 1]), st.integers(2, 12)) if n is None else n)
    few = tokens if tokens < 2 else 6 if tokens <= 12 else 20
    return Case(
        batch=draw(shape(st.sampled_from([(), (1,), (2,), (2, 1)]), (2,))),
        kv_heads=draw(shape(st.integers(1, 3), 2)),
        group=draw(shape(st.integers(1, 3), 2)),
        q_len=draw(shape(st.integers(1, 4), 3)),
        n=few if _few.get() else tokens,
        d=draw(shape(st.integers(1, 6), 4)),
        dv=draw(shape(st.integers(1, 5), 3)),
        law=draw(st.sampled_from(laws)),
        masked=draw(st.sampled_from(masks)),
        dtype=draw(shape(st.sampled_from(dtypes), dtypes[0])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


some_tokens = st.one_of(st.just(1), st.integers(2, 12))

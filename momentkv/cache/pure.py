"""A layer's step and flush as functions without effect: a state goes in and the next one comes out, for `jax.jit`."""

from __future__ import annotations

import dataclasses
import functools
import importlib

from momentkv._array import Array, array_namespace, is_jax_array
from momentkv.cache.config import CacheConfig
from momentkv.cache.eviction import evicted_state
from momentkv.cache.layer import LayerCache
from momentkv.cache.state import ARRAYS, HOST, STATISTICS, LayerState
from momentkv.cache.step import arrived, check_like_stored, check_step, decoded, due_heads

__all__ = ["PureLayer"]


@dataclasses.dataclass(frozen=True)
class PureLayer:
    """What a static `LayerCache` does for a token, in arrays of one shape, with nothing asked of the device.

    Attributes
    ----------
    config : CacheConfig
    budgets : tuple of int
        Of each KV head.
    scale : float
        Factor on ``q . k``.

    Notes
    -----
    `LayerState` is an argument and a result of JAX's transformations once one was taken of a cache of JAX's arrays.
    Functions are compiled once for all tokens, and for all prompts after which heads retain as many tokens. No row has
    padding after the prompt.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> tokens = [[rng.normal(size=(1, heads, n, 8)) for heads in (4, 2, 2)] for n in (100, 1, 1, 1, 1)]
    >>> known, cache = (LayerCache(40, block=4, window=8, static=static) for static in (False, True))
    >>> _ = known.step(*tokens[0]), cache.step(*tokens[0])
    >>> layer, state = PureLayer.of(cache)
    >>> for q, k, v in tokens[1:]:
    ...     out, state = layer.step(state, q, k, v)
    ...     if layer.is_due(state):
    ...         state = layer.flush(state)
    >>> for token in tokens[1:]:
    ...     expected = known.step(*token)
    >>> bool(np.allclose(out, expected))
    True
    >>> cache.take(state)
    >>> cache.seen
    104
    """

    config: CacheConfig
    budgets: tuple[int, ...]
    scale: float

    @classmethod
    def of(cls, cache: LayerCache) -> tuple[PureLayer, LayerState]:
        """The functions of a cache, and the state to begin with; `LayerCache.take` gives it a state back.

        The state is a copy. So ``jax.jit(layer.step, donate_argnums=0)`` may write over it.

        Parameters
        ----------
        cache : LayerCache
            With ``static=True``, that has read a prompt and evicted from it.

        Raises
        ------
        ValueError
            If its steps are not static, or tokens wait.
        """
        state = cache.stored_state
        if not cache.is_fixed or cache.new is not None:
            why = "has tokens that wait for step()" if cache.is_fixed else "makes a state of another shape with a step"
            raise ValueError(f"the cache {why}; make it with static=True, and read a prompt with step() first")
        if is_jax_array(state.keys):
            known_to_jax()
        # The cache writes its next steps over these arrays, and a compiled function may be given them for its own.
        state = state.map(cache.config.backend_of(state.keys).copy)
        # What the host counts is not looked at, and would be another for every prompt.
        state = state.changed(filled=cache.config.recent, padded=True, seen=0)
        return cls(cache.config, tuple(cache.budgets or ()), cache.attention_scale), state

    def step(self, state: LayerState, q: Array, k: Array, v: Array) -> tuple[Array, LayerState]:
        """Output of one token's query, which sees all that is stored and its own key, and the state with the token.

        Parameters
        ----------
        state : LayerState
            In which no head is due: see `is_due`.
        q : array, shape (batch..., kv_head * group, 1, d)
        k, v : array, shape (batch..., kv_head, 1, d) and (batch..., kv_head, 1, dv)

        Returns
        -------
        out : array, shape (batch..., kv_head * group, 1, dv)
        state : LayerState

        Raises
        ------
        ValueError
            If shapes or dtypes do not fit the state, or there are several tokens.
        RuntimeError
            If PyTorch is asked for a gradient with respect to ``q``; keys and values are stored without.
        """
        check_step(q, k, v, None)
        check_like_stored("k", k, state.recent_keys)
        check_like_stored("v", v, state.recent_values)
        if k.shape[-2] != 1:
            raise ValueError(f"k has shape {tuple(k.shape)}; a step without effect takes one token a head")
        backend = self.config.backend_of(k)
        if backend.differentiates(q):
            raise RuntimeError(
                "a gradient is asked for with respect to q, but a step of PureLayer has none; run it under "
                "torch.no_grad(), give it q.detach(), or step a LayerCache made with static=False"
            )
        k, v = backend.detach(k), backend.detach(v)
        if not is_jax_array(k):
            # Slots that are not in use are written in place.
            recent = {name: x for name, x in state.own().items() if name.startswith("recent_")}
            state = state.changed(**{name: backend.copy(x) for name, x in recent.items()})
        expansion = self.config.correction.expansion(state.evicted) if self.config.corrects else None
        out, state = decoded(
            self.config, state, arrived(self.config, state, k, v), q, scale=self.scale, expansion=expansion
        )
        return array_namespace(q).astype(out, q.dtype, copy=False), state

    def is_due(self, state: LayerState) -> Array:
        """Whether a head has filled its block, bool of no dimension: what `jax.lax.cond` flushes by.

        Heads whose budgets are equal are due every ``block`` steps, all in the same one.
        """
        return array_namespace(state.ticks).any(due_heads(self.config, self.budgets, state))

    def flush(self, state: LayerState) -> LayerState:
        """The state after eviction from the heads that are due; others keep their tokens, retained ones in few bits."""
        return evicted_state(self.config, state, None, list(self.budgets), scale=self.scale)[0]


@functools.cache
def known_to_jax() -> None:
    """Tell JAX which fields of a state are arrays; a function is compiled for what the others are."""
    register = importlib.import_module("jax").tree_util.register_dataclass
    register(LayerState, data_fields=[*ARRAYS, *STATISTICS], meta_fields=list(HOST))

"""What a cache asks of a correction."""

from __future__ import annotations

import abc
from typing import Any, ClassVar

from momentkv._array import Array
from momentkv.statistics.expansion import Expansion
from momentkv.statistics.moments import Moments
from momentkv.statistics.window import QueryWindow

__all__ = ["Correction"]


class Correction(abc.ABC):
    """How a cache folds evicted tokens, and what it estimates from the state that this makes.

    A state is immutable and has ``weight``, the tokens folded, shape (..., kv_head); ``nbytes``; ``arrays()``, all that
    it holds by name; ``map(function)``, the state with every array replaced; and ``expansion()``.

    Attributes
    ----------
    name : str
        The name it is chosen by.
    anchored : bool
        Whether it needs to know recent queries.
    calibration : float
        Median true error over median uncalibrated estimate (`momentkv.trust.estimated_error`), 1 where nobody measured
        it; those here are of SmolLM2-135M on the text "compound" (2,048 tokens, budget 256), see docs/certificates.md.
    vectors : tuple of str
        Names of arrays of vectors in its state that may be stored in 16 bits. If there are any, the state can be made
        from its `arrays` alone.
    couples_heads : bool
        False if nothing done to one KV head depends on others, and every array that a state maps has axes (...,
        kv_head) first. Layers that evict at one step are then folded together, and many tokens a few heads at a time.
    """

    name: ClassVar[str] = ""
    anchored: ClassVar[bool] = False
    calibration: ClassVar[float] = 1.0
    vectors: ClassVar[tuple[str, ...]] = ()
    couples_heads: ClassVar[bool] = True

    @property
    def order(self) -> int | None:
        """1 if the estimated output changes with the query beyond its groups' shares, else 0; None for no estimate."""
        return 1

    def of_order(self, order: int) -> Correction:
        """The same correction, of at most this order.

        Raises
        ------
        ValueError
            If the correction has no such order.
        """
        if self.order is None or order >= self.order:
            return self
        raise ValueError(f"order is {order}, but correction {self.name!r} has order {self.order} only; leave order out")

    @property
    def exact(self) -> Correction:
        """The correction without rounding of its state: itself, but for `NarrowCorrection`."""
        return self

    @abc.abstractmethod
    def empty(self, k: Array, v: Array) -> Any:
        """State of the empty set, for tokens shaped and typed like ``k`` and ``v`` (none are read)."""

    @abc.abstractmethod
    def fold(self, state: Any, k: Array, v: Array, *, mask: Array, window: QueryWindow | None) -> Any:
        """State with the masked tokens added."""

    def calibrate(self, state: Any, q: Array, k: Array, *, scale: float, mask: Array) -> Any:
        """State fitted to queries while the tokens that it stands for are still at hand; unchanged by default."""
        return state

    def expansion(self, state: Any) -> Expansion | None:
        """The estimate that attention is corrected by; None if it never is."""
        expansion: Expansion = state.expansion()
        return expansion

    def statistics(self, state: Any) -> Any:
        """The state in full precision: itself, but for `NarrowCorrection`."""
        return state

    def known(self, state: Any) -> Moments:
        """What policies are shown of the state: weight and means of all tokens, by default itself."""
        known: Moments = state
        return known

    def stand_in(self) -> Correction:
        """A cheap correction that ranks budgets as this one does, to measure errors with before the first eviction."""
        return self

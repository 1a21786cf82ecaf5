"""What ``generate`` does with a cache beside forward passes: it begins, and asks for passes that can be taken back."""

from __future__ import annotations

import sys
from typing import Any

from transformers.cache_utils import Cache

__all__ = ["GeneratingCache"]

# The method of transformers that reads guesses, of an assistant or of prompt lookup.
ASSISTED = "_assisted_decoding"


class GeneratingCache(Cache):
    """A cache that knows when a call of ``generate`` begins.

    Attributes
    ----------
    calls : int
        Of ``generate``, that this cache was passed to. Before transformers 5.17, which tells the cache, it stays 0.
    """

    calls = 0

    @property
    def _is_user_defined(self) -> bool:
        """Whether ``generate`` was given this cache; it says so, by setting it, as it begins."""
        return self.calls > 0

    @_is_user_defined.setter
    def _is_user_defined(self, value: bool) -> None:
        self.calls += 1
        self.forget_ended()

    @property
    def is_initialized(self) -> bool:
        """Whether it has read any tokens: models ask whether theirs is the first pass."""
        # Stock layers that were reset are initialized yet in older versions, and hold zeros.
        return any(layer.is_initialized and getattr(layer, "cumulative_length", 1) for layer in self.layers)

    def forget_ended(self) -> None:
        """Forget which rows have ended: those of another call of ``generate`` have not."""
        for layer in self.layers:
            if hasattr(layer, "ended"):
                layer.ended = None

    def activate_past_recording(self) -> None:
        """From now on tokens can be taken back by `crop`: eviction waits for it (called by assisted decoding).

        Until `crop`, the tokens of recorded passes are stored beside the budget: up to ``rollback`` of them, or those
        of the last pass if they are more. Without `crop` the oldest are settled, so that a cache that goes on without
        assistance stays bounded.

        Raises
        ------
        RuntimeError
            If the cache is static.
        ValueError
            If assisted decoding begins with a cache that has read.
        """
        static: Any = getattr(self, "static", None)
        if static is not None:
            raise RuntimeError(
                "a static cache cannot take tokens of a pass back (assisted and prompt-lookup decoding do); make the "
                "cache with static=False"
            )
        # Its first pass is of all tokens, with no sign of which the cache has read: nothing but the caller tells.
        if self.is_initialized and sys._getframe(1).f_code.co_name == ASSISTED:
            raise ValueError(
                f"past_key_values has read {int(self.get_seq_length())} tokens, and assisted or prompt-lookup decoding "
                "of transformers reads all of its input once more; give it a new cache and the whole text, or call "
                "generate without an assistant or prompt_lookup_num_tokens"
            )
        super().activate_past_recording()

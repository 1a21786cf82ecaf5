"""momentkv: a KV cache within a budget that remembers what it evicts as moments.

The core works on arrays of any library that follows the array API. For transformers models import
`momentkv.hf`, which needs torch.
"""

from __future__ import annotations

from momentkv.attention import AttentionState, attend, merge
from momentkv.cache import LayerCache
from momentkv.correction import correct, estimate
from momentkv.diagnostics import EvictionError, eviction_error
from momentkv.moments import Moments
from momentkv.policies import POLICIES, Policy, Tokens, get_policy

__version__ = "0.1.0"

__all__ = [
    "POLICIES",
    "AttentionState",
    "EvictionError",
    "LayerCache",
    "Moments",
    "Policy",
    "Tokens",
    "__version__",
    "attend",
    "correct",
    "estimate",
    "eviction_error",
    "get_policy",
    "merge",
]

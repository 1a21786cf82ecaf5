"""momentkv: a KV cache within a budget that remembers what it evicts as moments.

The core works on arrays of any library that follows the array API. For transformers models import
`momentkv.hf`, which needs torch.
"""

from __future__ import annotations

import sys

from momentkv._moved import MovedModules
from momentkv.attention import AttentionState, attend, merge
from momentkv.cache.layer import LayerCache
from momentkv.correction import correct, estimate
from momentkv.diagnostics import EvictionError, eviction_error
from momentkv.policies import POLICIES, Policy, Tokens, get_policy
from momentkv.statistics.moments import Moments

__version__ = "0.2.0.dev0"

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

sys.meta_path.append(MovedModules())

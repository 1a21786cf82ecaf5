"""Verification as a product: adversarial cases, exact oracles, and every bound and law as a check.

Whoever writes a backend calls `check_backend`, for arrays of another library `check_library`, for a policy
`check_policy`. ``python -m momentkv.testing.verify`` runs every bound and law on a million cases. Strategies for
hypothesis are in `momentkv.testing.strategies`, which alone imports it; `import momentkv` imports none of this.
"""

from __future__ import annotations

from momentkv.testing.conformance import check_backend, check_library, check_policy
from momentkv.testing.laws import CHECKS, check
from momentkv.testing.truth import Outcome, Truth

__all__ = ["CHECKS", "Outcome", "Truth", "check", "check_backend", "check_library", "check_policy"]

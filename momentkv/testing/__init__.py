"""Verification as a product: adversarial cases, exact oracles, and every bound and law as a check.

``python -m momentkv.testing.verify`` runs all of them on a million cases; `verify` is the same from Python.
`import momentkv` does not import this package.
"""

from __future__ import annotations

from momentkv.testing.laws import CHECKS, Outcome, Truth, check

__all__ = ["CHECKS", "Outcome", "Truth", "check"]

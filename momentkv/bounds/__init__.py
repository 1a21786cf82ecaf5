"""Rigorous bounds on the error of estimates from moments: a function for each theorem, and bounds on whole states.

A bound is proved on the page docs/derivations/bounds.md, and its rounding is derived there; an estimate is never called
one. Theorems work on arrays of one number a query; `lse_interval`, `value_error` and `output_error` work on states.
"""

from __future__ import annotations

from momentkv.bounds.certificate import lse_interval, output_error, output_error_of_parts, value_error
from momentkv.bounds.reading import CompactSlope, Reading, compact_slope, read
from momentkv.bounds.theorems import (
    Interval,
    logit_from_step,
    mass_from_range,
    mass_from_variance,
    output_from_codes,
    output_from_representation,
    output_from_value,
    range_from_anchor,
    range_from_deviation,
    share_from_mass,
    slope_from_tail,
    value_from_range,
    value_from_representation,
    value_from_residual,
)

__all__ = [
    "CompactSlope",
    "Interval",
    "Reading",
    "compact_slope",
    "logit_from_step",
    "lse_interval",
    "mass_from_range",
    "mass_from_variance",
    "output_error",
    "output_error_of_parts",
    "output_from_codes",
    "output_from_representation",
    "output_from_value",
    "range_from_anchor",
    "range_from_deviation",
    "read",
    "share_from_mass",
    "slope_from_tail",
    "value_error",
    "value_from_range",
    "value_from_representation",
    "value_from_residual",
]

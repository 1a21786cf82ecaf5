"""Every bound and law holds on adversarial cases, and every check catches a deliberately broken variant."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from momentkv import attention, bounds, correction
from momentkv.bounds import certificate, functions, reading, rounding, theorems
from momentkv.bounds.theorems import Interval
from momentkv.statistics.extent import Extent
from momentkv.statistics.moments import Moments
from momentkv.testing.laws import CHECKS
from momentkv.testing.verify import main, verify


def test_no_bound_and_no_law_is_violated():
    rows = verify(12_000, seed=1)
    assert [row.name for row in rows] == list(CHECKS)
    for row in rows:
        assert row.violations == 0, row
        assert row.cases >= 1_000, row


@pytest.mark.parametrize("name", [name for name in CHECKS if name.startswith("B")])
def test_bounds_are_attained_by_some_case(name):
    """A bound with a wasteful constant would pass every test but this one."""
    if "several" in name or "compact" in name:
        pytest.skip("B10 and B11 bound the parts one by one and are not attained in general")
    (row,) = verify(4_000, names=[name])
    assert row.tightness[0] < 1.3


def scaled(function, factor):
    """The function with every array of its result scaled."""

    def broken(*args, **kwargs):
        result = function(*args, **kwargs)
        if isinstance(result, Interval):
            return Interval(*(factor * x for x in result))
        return factor * result

    return broken


def shrunk_radius(method):
    def broken(*args, **kwargs):
        extent = method(*args, **kwargs)
        return dataclasses.replace(extent, key_radius=0.9 * extent.key_radius, value_radius=0.9 * extent.value_radius)

    return broken


def no_error(extent):
    error = exact_error(extent)
    return rounding.StateError(*(0 * x for x in error))


exact_error = rounding.state_error


def forgets_linear_term(slope, offset, mass, radius, tail):
    """The paper's eq. 29/30: what is beyond the first order is taken as (sigma^2 / 2) R, without the rest."""
    return theorems.norm(slope - offset) + mass.high * radius / 2


def swapped_ends(logits, deviation):
    low, high = original_mass(logits, deviation)
    return Interval(high, low)


original_mass = theorems.mass_from_variance


def constant_share(difference):
    return np.abs(difference) / 5


def merge_without_shift(a, b):
    return attention.AttentionState((a.out + b.out) / 2, np.logaddexp(a.lse, b.lse))


def merge_losing_between(self, other):
    merged = original_merge(self, other)
    return dataclasses.replace(merged, key_mean=(self.key_mean + other.key_mean) / 2)


original_merge = Moments.merge


def estimate_with_gain(*args, **kwargs):
    state = original_estimate(*args, **kwargs)
    return state._replace(lse=state.lse + 1e-3)


original_estimate = correction.estimate


def rotate_without_anchor(self, transposed):
    return dataclasses.replace(self, terms=self.terms + 1)


def correct_always(retained, q, moments, *, order=1, scale=None):
    return retained._replace(out=retained.out * (1 + 1e-15))


def residual_without_spread(slope, offset, logits, mass, deviation, trace, tail):
    return theorems.norm(slope - offset) + 0 * trace


def without_tail(length, tail):
    return 0 * length


def least(bound):
    def broken(*args):
        return 0.9 * bound(*args)

    return broken


# Check, where the broken thing goes, its name there, and the broken thing.
MUTANTS = [
    ("B1 range from a ball", bounds, "range_from_anchor", scaled(theorems.range_from_anchor, 0.95)),
    ("B2 range from the deviation", bounds, "range_from_deviation", scaled(theorems.range_from_deviation, 0.95)),
    ("B3 mass from the range", bounds, "mass_from_range", scaled(theorems.mass_from_range, 0.98)),
    ("B4 mass, upper", bounds, "mass_from_variance", scaled(theorems.mass_from_variance, 0.99)),
    ("B4 mass, upper", bounds, "mass_from_variance", swapped_ends),
    ("B4 mass, lower", bounds, "mass_from_variance", scaled(theorems.mass_from_variance, 1.01)),
    ("B5 value, representation", bounds, "value_from_representation", scaled(theorems.value_from_representation, 0.99)),
    ("B5 value, representation", bounds, "value_from_representation", forgets_linear_term),
    ("B6 value from the range", bounds, "value_from_range", scaled(theorems.value_from_range, 0.99)),
    ("B7 value from the residual", bounds, "value_from_residual", scaled(theorems.value_from_residual, 0.99)),
    ("B7 value from the residual", bounds, "value_from_residual", residual_without_spread),
    ("B8 output", bounds, "output_from_representation", scaled(theorems.output_from_representation, 0.99)),
    ("B8' output from the value", bounds, "output_from_value", scaled(theorems.output_from_value, 0.99)),
    ("B9 share", bounds, "share_from_mass", constant_share),
    ("B10 output of several parts", certificate, "parts_bound", least(certificate.parts_bound)),
    ("B11 compact slope", reading, "slope_from_tail", without_tail),
    ("B12 logit from the step", bounds, "logit_from_step", scaled(theorems.logit_from_step, 0.95)),
    ("B13 output from codes", bounds, "output_from_codes", scaled(theorems.output_from_codes, 0.98)),
    ("certificate: lse, float64", reading, "state_error", no_error),
    ("certificate: lse, float32", functions, "LARGE", 1e9),
    *(
        (f"certificate: {kind}, {prefix}{dtype}", Extent, "of_tokens", shrunk_radius(Extent.of_tokens))
        for kind in ("lse", "value", "output")
        for prefix in ("", "anchored, ")
        for dtype in ("float64", "float32")
    ),
    ("law M: moments however gathered", Moments, "merge", merge_losing_between),
    ("law A: attention of parts merges", attention, "merge", merge_without_shift),
    ("law J: the estimated lse is low", correction, "estimate", estimate_with_gain),
    ("law R: rotation", Extent, "rotate", rotate_without_anchor),
    ("law I: empty is the identity", correction, "correct", correct_always),
]


def test_every_check_has_a_mutant():
    assert {name for name, *_ in MUTANTS} == set(CHECKS)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("name", "place", "attribute", "broken"), MUTANTS, ids=[f"{x[0]} - {x[2]}" for x in MUTANTS])
def test_mutants_are_caught(monkeypatch, name, place, attribute, broken):
    monkeypatch.setattr(place, attribute, broken)
    (row,) = verify(6_000, names=[name])
    assert row.violations > 0


def test_the_command_writes_results_and_a_table(tmp_path, capsys):
    output = tmp_path / "verify.json"
    assert main(["--cases", "400", "--workers", "1", "--output", str(output)]) == 0
    content = json.loads(output.read_text())
    assert len(content["rows"]) == len(CHECKS)
    assert "0 violations" in capsys.readouterr().out
    assert output.with_suffix(".md").read_text().count("\n") == len(CHECKS) + 2
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path)])
    assert "which is a folder; name a file" in capsys.readouterr().err

"""One call verifies a backend, a library or a policy; and catches those that are broken."""

from __future__ import annotations

import dataclasses
import importlib.util
import subprocess
import sys

import numpy as np
import pytest
from libraries import LIBRARIES

from momentkv import POLICIES, Policy, get_policy
from momentkv.attention import AttentionState
from momentkv.backends import get_backend
from momentkv.backends.base import ArrayBackend
from momentkv.backends.layout import Layout
from momentkv.backends.numpy import NumpyBackend
from momentkv.testing import check_backend, check_library, check_policy

PAIRS = [
    ("numpy", "numpy"),
    ("array-api", "array-api-strict"),
    ("array-api", "torch"),
    ("torch", "torch"),
    ("jax", "jax"),
]


@pytest.mark.parametrize(("name", "library"), PAIRS, ids=lambda x: x)
def test_backends_conform(name: str, library: str):
    arrays = LIBRARIES[library]
    batches = 1 if arrays.compiles else 10
    with arrays.scope():
        assert check_backend(name, asarray=arrays.asarray, asnumpy=arrays.numpy, batches=batches) == 40 * batches


@pytest.mark.parametrize("library", LIBRARIES)
def test_libraries_conform(library: str):
    arrays = LIBRARIES[library]
    batches = 1 if arrays.compiles else 10
    with arrays.scope():
        assert check_library(arrays.asarray, arrays.numpy, batches=batches) == 40 * batches


def test_cupy_conforms_where_it_is_installed():
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("cupy is not installed")
    xp = importlib.import_module("cupy")
    for check in (check_library, lambda *a, **k: check_backend("array-api", asarray=a[0], asnumpy=a[1], **k)):
        assert check(xp.asarray, xp.asnumpy, dtypes=("float32",), batches=10) == 400


@pytest.mark.parametrize("name", POLICIES)
def test_policies_conform(name: str):
    check_policy(name)


class Leaky(ArrayBackend):
    """Counts one token too many."""

    def attend(self, q, k, v, *, scale, mask=None):
        state, weights = super().attend(q, k, v, scale=scale, mask=mask)
        return AttentionState(state.out, state.lse + 1e-6), weights


class Blurred(ArrayBackend):
    def correct(self, retained, q, expansion, *, scale):
        return super().correct(retained, q, expansion._replace(slope=None), scale=scale)


class Rounding(ArrayBackend):
    def prefill(self, q, k, v, *, scale, valid=None):
        return super().prefill(q, k, v, scale=scale, valid=valid).astype("float16").astype(v.dtype)


class Unmasked(ArrayBackend):
    """Reads slots that hold no token."""

    def attend_stored(self, q, tiers, *, scale, weights=False):
        return super().attend_stored(q, tiers._replace(valid=None), scale=scale, weights=weights)


class Square(ArrayBackend):
    """Takes packed heads for heads of as many slots."""

    def attend_retained(self, q, tiers, *, scale, weights):
        layout = tiers.layout
        each = sum(layout.widths) // layout.heads
        if layout.equal or each == 0:
            return super().attend_retained(q, tiers, scale=scale, weights=weights)
        short = Layout(layout.sinks, layout.recent, (each,) * layout.heads)
        k, v = (x[..., : sum(short.widths), :] for x in (tiers.keys, tiers.values))
        state, got = super().attend_retained(
            q, tiers._replace(keys=k, values=v, valid=None, layout=short), scale=scale, weights=weights
        )
        if got is None:
            return state, None
        rest = np.zeros((*got.shape[:-1], layout.width - each))
        return state, np.concatenate([got, rest], axis=-1)


class Apart(ArrayBackend):
    """Weights of recent tokens first, then those of retained ones."""

    def attend_stored(self, q, tiers, *, scale, weights=False):
        state, got = super().attend_stored(q, tiers, scale=scale, weights=weights)
        return state, None if got is None else np.roll(got, -tiers.layout.width, axis=-1)


class Raw(ArrayBackend):
    """Prepares expansions without their slope."""

    def prepare(self, expansion):
        return expansion._replace(slope=None)


class Wrapping(ArrayBackend):
    """Takes negative slots as NumPy does, from behind."""

    def write(self, x, index, new, *, axis):
        return super().write(x, np.where(index < 0, index + x.shape[axis], index), new, axis=axis)


class Late(ArrayBackend):
    def write_at(self, x, start, new, *, axis):
        return super().write_at(x, start + (start + new.shape[axis] < x.shape[axis]), new, axis=axis)


class Shared(NumpyBackend):
    """Copies nothing."""

    def copy(self, x):
        return x


@pytest.mark.parametrize(
    ("broken", "where"),
    [
        (Leaky, "lse"),
        (Blurred, "correct"),
        (Rounding, "prefill"),
        (Unmasked, "attend_stored: output"),
        (Square, "attend_stored: output"),
        (Apart, "attend_stored: weights"),
        (Raw, "decode: corrected"),
        (Wrapping, "write: "),
        (Late, "write_at: "),
        (Shared, "copy: "),
    ],
)
def test_broken_backends_are_caught(broken, where: str):
    with pytest.raises(AssertionError, match=where):
        check_backend(broken(), batches=10)


@dataclasses.dataclass(frozen=True)
class Fickle(Policy):
    name = "fickle"
    calls = [0]  # noqa: RUF012

    def importance(self, tokens):
        self.calls[0] += 1
        return tokens.score + self.calls[0]


@dataclasses.dataclass(frozen=True)
class Undefined(Policy):
    name = "undefined"

    def importance(self, tokens):
        return tokens.score + np.nan


@dataclasses.dataclass(frozen=True)
class Contagious(Policy):
    """Ranks by how a token compares with the same slot of the other rows."""

    name = "contagious"

    def importance(self, tokens):
        keys = tokens.keys[..., 0]
        return np.where(tokens.positions >= 0, -np.abs(keys - keys.mean(axis=0)), 0.0)


@pytest.mark.parametrize(
    ("broken", "law"),
    [(Fickle, "differs when asked"), (Undefined, "finite"), (Contagious, "other rows|without a token")],
)
def test_broken_policies_are_caught(broken, law: str):
    with pytest.raises((AssertionError, ValueError), match=law):
        check_policy(broken())


def test_the_core_imports_no_tests_and_the_checks_no_hypothesis():
    code = (
        "import sys, momentkv; assert 'momentkv.testing' not in sys.modules; import momentkv.testing; "
        "print([m for m in ('hypothesis', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_and_objects_are_both_taken():
    check_policy(get_policy("knorm"))
    assert check_backend(get_backend("numpy"), batches=1) == 40

"""Writing to some slots of an array: every backend against a loop, and in place where arrays allow it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from libraries import LIBRARIES, Library
from test_backends import PAIRS

from momentkv.backends import ArrayBackend, get_backend
from momentkv.testing.rounding import assert_same
from momentkv.testing.strategies import shape


@dataclasses.dataclass(frozen=True)
class Subject:
    """A backend and the library whose arrays it is given; ``compiled`` if it writes as torch.compile traces it."""

    backend: ArrayBackend
    library: Library
    compiled: bool

    def write(self, x: np.ndarray, index: np.ndarray, new: np.ndarray, axis: int) -> np.ndarray:
        with pytest.MonkeyPatch.context() as patch:
            if self.compiled:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
            return self.library.numpy(self.backend.write(*map(self.library.asarray, (x, index, new)), axis=axis))


SUBJECTS = [(*pair, False) for pair in PAIRS] + [("torch", "torch", True)]


@pytest.fixture(scope="module", params=SUBJECTS, ids=lambda x: "-on-".join(x[:2]) + "-compiled" * x[2])
def subject(request: pytest.FixtureRequest) -> Subject:
    name, library, compiled = request.param
    return Subject(get_backend(name), LIBRARIES[library], compiled)


@dataclasses.dataclass(frozen=True)
class Writing:
    """Shapes and a seed: rows of ``n`` slots, each of ``d`` numbers (None: is a number), of which ``m`` are written."""

    lead: tuple[int, ...]
    n: int
    m: int
    d: int | None
    negative: float
    dtype: str
    seed: int

    @property
    def axis(self) -> int:
        return -1 if self.d is None else -2

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        inner = () if self.d is None else (self.d,)
        x, new = (rng.integers(-9, 9, (*self.lead, size, *inner)).astype(self.dtype) for size in (self.n, self.m))
        index = np.argsort(rng.random((*self.lead, self.n)), axis=-1)[..., : self.m].astype("int32")
        return x, np.where(rng.random(index.shape) < self.negative, -rng.integers(1, 9, index.shape), index), new

    def by_hand(self) -> np.ndarray:
        x, index, new = self.arrays()
        for row in np.ndindex(self.lead):
            for place, slot in enumerate(index[row]):
                if slot >= 0:
                    x[row][slot] = new[row][place]
        return x


@st.composite
def writings(draw: st.DrawFn) -> Writing:
    n = draw(shape(st.integers(0, 7), 5))
    m = draw(shape(st.integers(0, n), 3))
    return Writing(
        lead=draw(shape(st.sampled_from([(), (3,), (1, 2), (2, 3)]), (2, 3))),
        n=n,
        m=m,
        d=draw(shape(st.sampled_from([None, 0, 1, 4]), 4)),
        negative=draw(st.sampled_from([0.0, 0.5, 1.0])) if m > 1 else 0.0,  # of several, a negative one writes nothing
        dtype=draw(st.sampled_from(["float64", "float32", "int32", "bool"])),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@given(writing=writings())
def test_write_equals_a_loop(subject: Subject, writing: Writing):
    assert_same(subject.write(*writing.arrays(), axis=writing.axis).astype(writing.dtype), writing.by_hand())


@pytest.mark.parametrize("lead", [(), (2,), (2, 3)])
@pytest.mark.parametrize("m", [0, 2])
@pytest.mark.parametrize("axis", [-2, -1])
def test_write_of_any_number_of_axes(subject: Subject, lead: tuple[int, ...], m: int, axis: int):
    writing = Writing(lead, 4, m, None if axis == -1 else 3, 0.4, "float64", m)
    assert_same(subject.write(*writing.arrays(), axis=axis), writing.by_hand())


def test_a_small_index_type_reaches_every_slot(subject: Subject):
    """Slots beyond the largest number that the type of the index holds do not become others."""
    x, index = np.zeros(300), np.array([127, -1, 3], dtype="int8")
    expected = np.zeros(300)
    expected[[127, 3]] = [1, 3]
    assert_same(subject.write(x, index, np.array([1.0, 2.0, 3.0]), axis=-1), expected)


@pytest.mark.parametrize(("name", "library"), [("numpy", "numpy"), ("torch", "torch")])
@pytest.mark.parametrize("axis", [-2, -1])
def test_numpy_and_torch_write_in_place(name: str, library: str, axis: int):
    writing = Writing((2, 3), 5, 3, 4 if axis == -2 else None, 0.5, "float32", 1)
    x, index, new = map(LIBRARIES[library].asarray, writing.arrays())
    part = x[:, 1:]
    assert get_backend(name).write(part, index[:, 1:], new[:, 1:], axis=axis) is part
    # Through the view, its base has changed, and the rows beside it have not.
    assert_same(LIBRARIES[library].numpy(x)[:, 1:], writing.by_hand()[:, 1:].astype("float64"))
    assert_same(LIBRARIES[library].numpy(x)[:, :1], writing.arrays()[0][:, :1].astype("float64"))


@pytest.mark.parametrize(("name", "library"), [pair for pair in PAIRS if pair[0] in ("array-api", "jax")])
def test_other_backends_leave_their_arguments_as_they_are(name: str, library: str):
    arrays = Writing((2,), 5, 3, 4, 0.2, "float32", 1).arrays()
    given = [LIBRARIES[library].asarray(x) for x in arrays]
    written = get_backend(name).write(*given, axis=-2)
    assert not (LIBRARIES[library].numpy(written) == arrays[0]).all()
    for x, before in zip(given, arrays, strict=True):
        assert (LIBRARIES[library].numpy(x) == before).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "library"), [("torch", "torch"), ("jax", "jax"), ("array-api", "jax")])
def test_half_precision_is_written_as_it_is(name: str, library: str, dtype: str):
    writing, xp = Writing((2,), 5, 3, 4, 0.3, "float32", 2), LIBRARIES[library]
    x, index, new = writing.arrays()
    written = get_backend(name).write(xp.asarray(x, dtype), xp.asarray(index), xp.asarray(new, dtype), axis=-2)
    assert xp.dtype(written) == dtype
    assert (np.asarray(xp.numpy(written), dtype="float64") == writing.by_hand()).all()


def test_torch_never_waits_for_a_device():
    """Tensors without data: whatever looked at a number would fail."""
    x, index, new = (torch.zeros(size, device="meta") for size in ((2, 8, 4), (2, 3), (2, 3, 4)))
    assert get_backend("torch").write(x, index.to(torch.int32), new, axis=-2) is x

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Generator, Iterator
from typing import Any

import jax
import pytest
from hypothesis import settings
from libraries import LIBRARIES, Library

from momentkv.testing.strategies import few_shapes

# "ci" draws the same examples in every run; "deep" looks for new ones: MOMENTKV_HYPOTHESIS=deep pytest.
settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None)
settings.register_profile("deep", max_examples=1000, deadline=None, print_blob=True)
PROFILE = os.environ.get("MOMENTKV_HYPOTHESIS", "ci")
settings.load_profile(PROFILE)

# Sizes of kernels that were measured on this machine's GPU are its user's, not the tests'.
os.environ["MOMENTKV_TUNED"] = ""


def pytest_configure(config: pytest.Config) -> None:
    # Workers side by side (pytest -n 2) share the cores; each of them and whatever it starts computes on one.
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    # What is imported by now stays. Collections, which some tests ask for often, need not go through it.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left = [], []
    for item in items:
        # The real model takes longer to load than most tests take: one worker loads it, and runs all that need it.
        if item.get_closest_marker("model"):
            item.add_marker(pytest.mark.xdist_group("model"))
        library = LIBRARIES.get(str(item.callspec.params.get("backend"))) if hasattr(item, "callspec") else None
        if library is not None and library.compiles:
            # What one law has compiled serves those beside it; those of many shapes are left to the profile deep.
            item.add_marker(pytest.mark.xdist_group(f"{item.path.stem}-{library.name}"))
            if item.get_closest_marker("many_shapes") and PROFILE != "deep":
                left.append(item)
                continue
        kept.append(item)
    if left:
        config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture
def builtin(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The real model and its tokenizer, loaded once for all tests; whatever asks for the built-in model gets them too.

    Tests that change the model put it back.
    """
    from models import real  # imports transformers, which most tests do not need

    model, tokenizer = real()

    def again(name: str | None = None) -> tuple[Any, Any]:
        assert name is None
        return model, tokenizer

    for place in ("demo", "evaluation.commands", "evaluation.sources"):
        monkeypatch.setattr(f"momentkv.{place}.load_model", again)
    yield model, tokenizer
    assert model.config._attn_implementation == "momentkv"
    assert not model.training


# Of a library that compiles every operation for every shape, the laws of whole caches take longest: deep runs all.
@pytest.fixture(
    scope="session", params=[name for name, library in LIBRARIES.items() if PROFILE == "deep" or not library.compiles]
)
def backend(request: pytest.FixtureRequest) -> Library:
    """The array library a law is checked on."""
    return LIBRARIES[request.param]


@pytest.fixture(scope="module", autouse=True)
def compiled() -> Iterator[None]:
    """What JAX compiled for a module is let go after it: the executables of thousands of operations fill memory."""
    yield
    jax.clear_caches()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Give the library that a test is about its dtypes and, if it compiles for every shape, few cases of few shapes."""
    given = [getattr(x, "library", x) for x in getattr(item, "funcargs", {}).values()]
    with contextlib.ExitStack() as scopes:
        for library in given:
            if isinstance(library, Library):
                scopes.enter_context(library.scope())
                if library.compiles:
                    scopes.enter_context(few_shapes())
                    scopes.enter_context(few_examples(item))
        return (yield)


@contextlib.contextmanager
def few_examples(item: pytest.Item) -> Iterator[None]:
    """A sixth of the examples of a test by hypothesis, whose settings belong to the test and not to its parameters."""
    test, name = getattr(item, "obj", None), "_hypothesis_internal_use_settings"
    before = getattr(test, name, None)
    if before is None:
        yield
        return
    setattr(test, name, settings(before, max_examples=-(-before.max_examples // 6)))
    try:
        yield
    finally:
        setattr(test, name, before)

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings
from libraries import LIBRARIES, Library

# "ci" draws the same examples in every run; "deep" looks for new ones: MOMENTKV_HYPOTHESIS=deep pytest.
settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None)
settings.register_profile("deep", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("MOMENTKV_HYPOTHESIS", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    # Workers side by side (pytest -n 2) share the cores; each of them and whatever it starts computes on one.
    if getattr(config.option, "numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The real model takes longer to load than most tests take: one worker loads it, and runs all that need it.
    for item in items:
        if item.get_closest_marker("model"):
            item.add_marker(pytest.mark.xdist_group("model"))


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


@pytest.fixture(scope="session", params=list(LIBRARIES))
def backend(request: pytest.FixtureRequest) -> Library:
    """The array library a law is checked on."""
    return LIBRARIES[request.param]

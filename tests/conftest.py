from __future__ import annotations

import os

import pytest
from hypothesis import settings
from libraries import LIBRARIES, Library

# "ci" draws the same examples in every run; "deep" looks for new ones: MOMENTKV_HYPOTHESIS=deep pytest.
settings.register_profile("ci", derandomize=True, max_examples=25, deadline=None)
settings.register_profile("deep", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("MOMENTKV_HYPOTHESIS", "ci"))


@pytest.fixture(scope="session", params=list(LIBRARIES))
def backend(request: pytest.FixtureRequest) -> Library:
    """The array library a law is checked on."""
    return LIBRARIES[request.param]

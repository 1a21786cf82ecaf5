"""Whose text a file of a cache holds: the model that read it says so, whatever the cache was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from models import FAMILIES, build, prompt

from momentkv.hf import CacheFileError, MomentCache


def read_and_saved(model: Any, cache: MomentCache, path: Path) -> Path:
    with torch.no_grad():
        model(prompt(1, 100), past_key_values=cache)
    cache.save(path)
    return path


def test_a_file_is_of_the_model_that_read_the_text_whatever_its_cache_was_made_for(tmp_path: Path):
    """Another model after a reset, a configuration, other weights in the same model, and another dtype."""
    first, second, changed, cast = (build(FAMILIES["llama"]()) for _ in range(4))
    for x in (*second.parameters(), *changed.parameters()):
        x.data *= 0.9
    reset, given = MomentCache(first, 64), MomentCache(first.config, 64)
    loaded, halved = MomentCache(changed, 64), MomentCache(cast, 64)
    with torch.no_grad():
        first(prompt(1, 60), past_key_values=reset)
        changed(prompt(1, 60), past_key_values=loaded)
    reset.reset()
    loaded.reset()
    changed.load_state_dict(first.state_dict())
    cast.bfloat16()
    files = [
        (read_and_saved(second, reset, tmp_path / "reset"), second, first),
        (read_and_saved(first, given, tmp_path / "given"), first, second),
        (read_and_saved(changed, loaded, tmp_path / "changed"), first, second),
        (read_and_saved(cast, halved, tmp_path / "cast"), cast, first),
    ]
    for path, reader, other in files:
        again = MomentCache.load(path, reader)
        with torch.no_grad():
            assert reader(prompt(1, 1), past_key_values=again).logits.isfinite().all()
        with pytest.raises(CacheFileError, match=r"other weights|in bfloat16, but its weights are in float32"):
            MomentCache.load(path, other)
        unknown = MomentCache.load(path, reader.config)
        with torch.no_grad():
            if other.dtype == reader.dtype:
                with pytest.raises(ValueError, match="other weights"):
                    other(prompt(1, 1), past_key_values=unknown)
            assert reader(prompt(1, 1), past_key_values=unknown).logits.isfinite().all()
        MomentCache.load(path, reader).save(tmp_path / "once more")
        MomentCache.load(tmp_path / "once more", reader)

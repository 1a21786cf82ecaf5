"""Hugging Face transformers: a cache for ``generate``, and the attention and mask functions it works through.

Importing this module registers the attention implementation ``"momentkv"``. Nothing of transformers is patched:

>>> import momentkv.hf                                                               # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="momentkv")  # doctest: +SKIP
>>> cache = momentkv.hf.MomentCache(model, budget=512)                               # doctest: +SKIP
>>> model.generate(**inputs, past_key_values=cache)                                  # doctest: +SKIP

The cache does not reach an attention function, so the keys that `MomentCache.update` returns carry a link to their
layer, and `momentkv_attention` follows it. Keys without the link (another cache, sliding-window layers) go to SDPA.
"""

from __future__ import annotations

try:
    import torch  # noqa: F401
    from transformers import AttentionInterface, AttentionMaskInterface
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"momentkv.hf needs torch and transformers 5, and {error.name} is missing; run pip install 'momentkv[hf]'",
        name=error.name,
    ) from error

from momentkv.hf.attention import LINK, momentkv_attention, momentkv_mask
from momentkv.hf.cache import MomentCache
from momentkv.hf.checks import NAME
from momentkv.hf.files import CacheFileError
from momentkv.hf.finished import FinishedRows
from momentkv.hf.graphs import DecodeGraphs
from momentkv.hf.layer import MomentLayer
from momentkv.hf.reading import read
from momentkv.hf.summary import CacheSummary, LayerSummary

__all__ = [
    "LINK",
    "NAME",
    "CacheFileError",
    "CacheSummary",
    "DecodeGraphs",
    "FinishedRows",
    "LayerSummary",
    "MomentCache",
    "MomentLayer",
    "momentkv_attention",
    "momentkv_mask",
    "read",
]

AttentionInterface.register(NAME, momentkv_attention)
AttentionMaskInterface.register(NAME, momentkv_mask)

"""A layer's cache: what it stores, a step of it, who gets how many tokens, and what it costs."""

from momentkv.cache.layer import LayerCache

__all__ = ["LayerCache"]

"""Two threads on one cache: the second is refused, and nothing is lost without a word."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import FAMILIES, build, prompt

from momentkv import LayerCache, Policy, Tokens
from momentkv.hf import MomentCache


def in_a_thread(function: Callable[[], Any]) -> BaseException | None:
    """What a function raises in a thread of its own."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except (RuntimeError, ValueError) as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return raised[0] if raised else None


class Meanwhile(Policy):
    """In the middle of an eviction, something else happens."""

    name = "meanwhile"
    does: Callable[[], None] | None = None

    def importance(self, tokens: Tokens) -> Any:
        self.do()
        return tokens.positions.astype(tokens.keys.dtype)

    def do(self) -> None:
        """What is to happen, once."""
        does, self.does = self.does, None
        if does is not None:
            does()


class MeanwhileInTorch(Meanwhile):
    """The same for tensors."""

    def importance(self, tokens: Tokens) -> Any:
        self.do()
        return tokens.positions.to(tokens.keys.dtype)


def tokens(n: int, seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((1, heads, n, 8)) for heads in (4, 2, 2)]


def test_a_step_within_another_one_is_refused_and_disturbs_nothing():
    policy = Meanwhile()
    cache, alone = (LayerCache(20, policy=one, window=8, block=4) for one in (policy, Meanwhile()))
    errors: list[BaseException | None] = []

    def from_elsewhere() -> None:
        errors.append(in_a_thread(lambda: cache.step(*tokens(1, seed=5))))
        errors.append(in_a_thread(lambda: copy.deepcopy(cache).step(*tokens(1, seed=5))))

    policy.does = from_elsewhere
    for one in (cache, alone):
        one.step(*tokens(60))
    assert "another step of this cache is under way" in str(errors[0])
    assert errors[1] is None  # a copy is another cache
    assert in_a_thread(lambda: cache.step(*tokens(1, seed=1))) is None  # one after the other
    alone.step(*tokens(1, seed=1))
    assert all(np.array_equal(x, alone.arrays()[name]) for name, x in cache.arrays().items())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_step_that_fails_leaves_the_cache_to_others(error: type[BaseException]):
    policy = Meanwhile()
    cache = LayerCache(20, policy=policy, window=8, block=4)

    def fail() -> None:
        raise error

    policy.does = fail
    with pytest.raises(error):
        cache.step(*tokens(60))
    assert in_a_thread(lambda: cache.step(*tokens(60))) is None
    assert cache.seen == 60


@pytest.mark.parametrize("raised", [None, KeyboardInterrupt])
def test_who_keeps_the_frame_of_a_step_does_not_keep_the_cache(raised: type[BaseException] | None):
    """As debuggers do, and profilers that look at a process from a thread of their own."""
    policy = Meanwhile()
    cache, alone = (LayerCache(20, policy=one, window=8, block=4) for one in (policy, Meanwhile()))
    kept: list[Any] = []

    def look() -> None:
        frame = sys._getframe()
        while frame is not None:
            kept.append((frame, dict(frame.f_locals)))
            frame = frame.f_back
        if raised is not None:
            raise raised

    policy.does = look
    with contextlib.nullcontext() if raised is None else pytest.raises(raised):
        cache.step(*tokens(60))
    assert any("own" in names for _, names in kept)
    for one in (cache, alone):
        if one.seen == 0:
            one.step(*tokens(60))
        one.step(*tokens(1, seed=1))
    assert all(np.array_equal(x, alone.arrays()[name]) for name, x in cache.arrays().items())


@pytest.mark.parametrize(("family", "layer"), [("llama", 0), ("gemma3", 0), ("gemma3", 1), ("gemma3", 2)])
def test_a_pass_within_another_one_is_told(family: str, layer: int):
    """The one that began first finds that its layers are another's, and says so."""
    model = build(FAMILIES[family]())
    cache = MomentCache(model, 20, sinks=1, window=8, block=4)
    inner: list[BaseException | None] = []

    def another(*_: Any) -> None:
        handle.remove()
        with torch.no_grad():
            model(prompt(1, 30, seed=1), past_key_values=cache)

    handle = model.model.layers[layer].register_forward_hook(lambda *_: inner.append(in_a_thread(another)))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"one thread at a time may use a cache.*reset\(\)"):
        model(prompt(1, 40), past_key_values=cache)
    assert inner == [None]
    cache.reset()
    with torch.no_grad():
        found = model(prompt(1, 40), past_key_values=cache).logits
        expected = model(prompt(1, 40), past_key_values=MomentCache(model, 20, sinks=1, window=8, block=4)).logits
    assert torch.equal(found, expected)


def test_a_pass_within_the_attention_of_another_one_is_refused_and_disturbs_nothing():
    model, policy = build(FAMILIES["llama"]()), MeanwhileInTorch()
    cache, alone = (
        MomentCache(model, 20, sharing="uniform", policy=one, sinks=1, window=8, block=4)
        for one in (policy, MeanwhileInTorch())
    )
    inner: list[BaseException | None] = []

    @torch.no_grad()
    def another(cache: MomentCache) -> None:
        model(prompt(1, 30, seed=1), past_key_values=cache)

    def from_elsewhere() -> None:
        inner.append(in_a_thread(lambda: another(cache)))
        inner.append(in_a_thread(lambda: another(copy.deepcopy(cache))))

    policy.does = from_elsewhere
    with torch.no_grad():
        for count in (40, 5):
            found, expected = (model(prompt(1, count), past_key_values=one).logits for one in (cache, alone))
            assert torch.equal(found, expected)
    assert "a pass of this cache is under way" in str(inner[0])
    assert inner[1] is None  # a copy is another cache
    assert cache.get_seq_length() == 45


def test_a_pass_whose_masks_were_made_before_another_one_had_ended_is_refused():
    model = build(FAMILIES["llama"]())
    cache = MomentCache(model, 20, sinks=1, window=8, block=4)

    @torch.no_grad()
    def another(*_: Any) -> None:
        handle.remove()
        assert in_a_thread(read) is None

    @torch.no_grad()
    def read() -> None:
        model(prompt(1, 30), past_key_values=cache)

    handle = model.model.layers[0].register_forward_pre_hook(another)
    with pytest.raises(RuntimeError, match=r"0 tokens had been read when masks were made for this pass, and now 30"):
        read()
    assert cache.get_seq_length() == 30
    read()
    assert cache.get_seq_length() == 60


@pytest.mark.parametrize("layer", [0, -1])
def test_a_pass_between_the_keys_of_another_one_and_its_attention_is_told(layer: int):
    model = build(FAMILIES["llama"]())
    cache = MomentCache(model, 20, sinks=1, window=8, block=4)
    stored = cache.layers[layer]
    update = stored.update
    inner: list[BaseException | None] = []

    @torch.no_grad()
    def another() -> None:
        model(prompt(1, 30, seed=1), past_key_values=cache)

    def then_another(*args: Any, **kwargs: Any) -> Any:
        out = update(*args, **kwargs)
        stored.update = update
        inner.append(in_a_thread(another))
        return out

    stored.update = then_another
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"one thread at a time may use a cache.*reset\(\)"):
        model(prompt(1, 40), past_key_values=cache)
    assert inner == [None]


def test_of_two_threads_every_pass_is_counted_or_an_error_is_raised():
    """However they cross."""
    model = build(FAMILIES["llama"]())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(40):
            cache = MomentCache(model, 20, sinks=1, window=8, block=4)
            errors = both_read(model, cache)
            if not any(errors):
                assert cache.get_seq_length() == 8
    finally:
        sys.setswitchinterval(interval)


def both_read(model: Any, cache: MomentCache) -> list[BaseException | None]:
    """What is raised in two threads that read into one cache at the same time, five and three tokens."""
    start = threading.Barrier(2)
    errors: list[BaseException | None] = [None, None]

    @torch.no_grad()
    def read(count: int) -> None:
        start.wait()
        model(prompt(1, count), past_key_values=cache)

    def run(index: int, count: int) -> None:
        errors[index] = in_a_thread(lambda: read(count))

    threads = [threading.Thread(target=run, args=(index, count)) for index, count in enumerate((5, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_passes_one_after_the_other_may_be_in_any_thread():
    """A pass that failed in one is read again in another."""
    model = build(FAMILIES["llama"]())
    cache, other = (MomentCache(model, 20, sinks=1, window=8, block=4) for _ in range(2))

    def fail(*_: Any) -> None:
        handle.remove()
        raise RuntimeError("no memory")

    @torch.no_grad()
    def read(cache: MomentCache, count: int) -> None:
        model(prompt(1, count), past_key_values=cache)

    assert in_a_thread(lambda: read(cache, 40)) is None
    handle = model.model.layers[0].register_forward_hook(fail)
    assert "no memory" in str(in_a_thread(lambda: read(cache, 5)))
    assert in_a_thread(lambda: read(cache, 5)) is None
    read(cache, 1)
    for count in (40, 5, 1):
        read(other, count)
    with torch.no_grad():
        a, b = (model(prompt(1, 1), past_key_values=one).logits for one in (cache, other))
    assert torch.equal(a, b)

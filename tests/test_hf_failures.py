"""Passes that fail: after an error at any operation, the same pass again gives what it would have given, bit for bit.

Errors come from PyTorch's dispatcher, after one operation or another: in any layer, before its attention, in it, in an
eviction or in the MLP behind it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contents import assert_same, contents
from models import prompt, tiny
from torch.utils._python_dispatch import TorchDispatchMode

from momentkv import LayerCache
from momentkv.hf import MomentCache, read
from momentkv.hf.clock import Clock

SMALL: dict[str, Any] = {"budget": 14, "sinks": 1, "window": 8, "block": 4, "rollback": 16}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("llama", {"sharing": "uniform"}),
    "ragged": ("llama", {}),
    "padded": ("llama", {}),
    "layers": ("qwen3", {"sharing": "layers", "policy": "tova"}),
    "plain": ("llama", {"policy": "h2o", "correction": "none"}),
    "share": ("llama", {"budget": 0.4}),
    "bytes": ("llama", {"budget": "60KiB"}),
    "hybrid": ("gemma3", {}),
    "recording": ("llama", {}),
    "hybrid, recording": ("gemma3", {"sharing": "uniform"}),
}
# The tokens of a pass, and of the passes before it.
PASSES: dict[str, tuple[list[int], int]] = {
    "prefill": ([], 60),
    "chunk": ([50], 40),
    "step": ([60, 1], 1),
    "flush": ([60, 1, 1, 1], 1),
}
PLACES = 4
ERRORS = (torch.OutOfMemoryError("no memory is left"), KeyboardInterrupt())


class Fuse(TorchDispatchMode):
    """Counts operations, and raises after the n-th, if any is given."""

    def __init__(self, burns: int = -1, error: BaseException | None = None) -> None:
        super().__init__()
        self.done, self.burns, self.error = 0, burns, error
        self.watch: Callable[[], Any] = lambda: None
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.arange.start_step:  # which PyTorch tries again when it fails
            return out
        self.done += 1
        self.seen.append(self.watch())
        if self.done == self.burns and self.error is not None:
            raise self.error
        return out


class Conversation:
    """A model, a cache and the tokens it has read, one pass after the other."""

    def __init__(self, kind: str, **settings: Any) -> None:
        family, own = KINDS[kind]
        self.model = tiny(family)
        self.cache = MomentCache(self.model, **(SMALL | own | settings))
        self.rows = 2 if kind == "padded" else 1
        self.mask = torch.ones(self.rows, 0, dtype=torch.long)
        self.padding = 7 if kind == "padded" else 0
        if "recording" in kind:
            self.cache.activate_past_recording()

    def read(self, count: int) -> torch.Tensor:
        """Logits of the next tokens, of which a first row is padded on the left."""
        seen = self.mask.shape[1]
        rows = [prompt(1, count, seed=100 * row + seen) for row in range(self.rows)]
        mask = torch.ones(self.rows, seen + count, dtype=torch.long)
        mask[0, : self.padding] = 0
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, seen:]
        logits: torch.Tensor = self.model(
            torch.cat(rows), attention_mask=mask, position_ids=places, past_key_values=self.cache
        ).logits
        self.mask = mask
        return logits

    def copy(self) -> Conversation:
        twin = copy.copy(self)
        twin.cache = copy.deepcopy(self.cache)
        return twin

    def go_on(self) -> list[torch.Tensor]:
        """Logits of a few passes more, through flushes, a chunk and, where passes are recorded, tokens taken back."""
        outs = []
        for count in (1, 1, 3, 1, 1):
            outs.append(self.read(count))
            if self.cache.layers[0].record_past:
                self.cache.crop(-(count // 2))
                self.mask = self.mask[:, : self.cache.get_seq_length()]
        return outs


def places(fuse: Fuse, offset: int) -> Iterator[tuple[int, BaseException]]:
    """Some of the operations that were counted, the last included, with an error each."""
    stride = max(1, fuse.done // PLACES)
    for index, place in enumerate(range(1 + offset % stride, fuse.done + 1, stride)):
        yield place, ERRORS[index % 2]
    yield fuse.done, ERRORS[0]


def started(kind: str, name: str, **settings: Any) -> tuple[Conversation, int]:
    before, count = PASSES[name]
    conversation = Conversation(kind, **settings)
    for tokens in before:
        conversation.read(tokens)
    return conversation, count


def assert_equal(a: MomentCache, b: MomentCache) -> None:
    for index, layer in enumerate(a.layers):
        if index in a.moment_layers:
            assert_same(contents(a.moment_layers[index]), contents(b.moment_layers[index]))
        else:
            assert torch.equal(layer.keys, b.layers[index].keys)
            assert torch.equal(layer.values, b.layers[index].values)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_same_pass_after_one_that_failed_gives_what_it_would_have_given(kind: str, name: str):
    """After the attention of the last layer the pass has been read: the cache says so by its length, and goes on."""
    base, count = started(kind, name)
    base.copy().read(count)  # what is made once and kept is made
    whole, fuse = base.copy(), Fuse()
    length = base.cache.get_seq_length()
    with fuse:
        fuse.watch = whole.cache.get_seq_length
        expected = whole.read(count)
    read = [seen > length for seen in fuse.seen]
    assert read == sorted(read)
    assert read[-1]
    after = whole.go_on()
    for place, error in places(fuse, offset=len(kind) + len(name)):
        failing = base.copy()
        with pytest.raises(type(error)), Fuse(place, error):
            failing.read(count)
        assert failing.cache.get_seq_length() == length + count * read[place - 1]
        if read[place - 1]:
            failing.mask = whole.mask[:, : length + count]
        else:
            assert torch.equal(failing.read(count), expected), place
        for a, b in zip(failing.go_on(), after, strict=True):
            assert torch.equal(a, b), place
        assert_equal(failing.cache, whole.cache)


@pytest.mark.parametrize("name", [name for name in PASSES if name != "prefill"])
@pytest.mark.parametrize("kind", ["ragged", "hybrid", "padded"])
@torch.no_grad()
def test_what_is_saved_after_a_failed_pass_is_the_state_before_it(kind: str, name: str, tmp_path: Path):
    base, count = started(kind, name)
    base.copy().read(count)  # the first makes what others find again
    whole, fuse = base.copy(), Fuse()
    with fuse:
        whole.read(count)
    for place, error in list(places(fuse, offset=len(kind)))[:PLACES]:
        failing = base.copy()
        with pytest.raises(type(error)), Fuse(place, error):
            failing.read(count)
        if failing.cache.get_seq_length() > sum(PASSES[name][0]):
            continue  # all layers were through
        failing.cache.save(tmp_path / "cache")
        loaded = MomentCache.load(tmp_path / "cache", base.model)
        assert loaded.get_seq_length() == base.cache.get_seq_length() == sum(PASSES[name][0])
        assert_equal(loaded, base.cache)
        failing.cache = loaded
        assert torch.equal(failing.read(count), base.copy().read(count))


def take_back(cache: MomentCache) -> None:
    cache.crop(-3)


def move_rows(cache: MomentCache) -> None:
    cache.reorder_cache(torch.tensor([0, 0]))


def repeat_rows(cache: MomentCache) -> None:
    cache.batch_repeat_interleave(2)


@pytest.mark.parametrize("change", [take_back, move_rows, repeat_rows], ids=lambda x: x.__name__)
@pytest.mark.parametrize(("kind", "static"), [("padded", False), ("padded", True), ("hybrid, recording", False)])
@torch.no_grad()
def test_rows_move_and_tokens_go_in_all_layers_or_in_none(
    kind: str, change: Callable[[MomentCache], None], static: bool
):
    base, _ = started(kind, "step", static=static)
    base.read(5)
    whole, fuse = base.copy(), Fuse()
    change(base.copy().cache)
    with fuse:
        change(whole.cache)
    for place, error in places(fuse, offset=len(change.__name__)):
        failing = base.copy()
        with pytest.raises(type(error)), Fuse(place, error):
            change(failing.cache)
        if static and failing.cache.static is not None and failing.cache.static.open:  # the last thing that is done
            with pytest.raises(RuntimeError, match="failed half-way"):
                change(failing.cache)
            continue
        change(failing.cache)
        assert failing.cache.get_seq_length() == whole.cache.get_seq_length()
        assert_equal(failing.cache, whole.cache)


@pytest.mark.parametrize("name", PASSES)
@torch.no_grad()
def test_a_static_cache_goes_on_or_is_refused_until_it_is_reset(name: str, tmp_path: Path):
    """A step of one token changes layers in place; all other passes are undone as in a cache that is not static."""
    base, count = started("padded", name, static=True)
    base.copy().read(count)
    whole, fuse = base.copy(), Fuse()
    with fuse:
        expected = whole.read(count)
    after, refused, length = whole.go_on(), 0, int(base.cache.get_seq_length())
    fresh = Conversation("padded", static=True)
    first = fresh.read(60)
    for place, error in places(fuse, offset=len(name)):
        failing = base.copy()
        with pytest.raises(type(error)), Fuse(place, error):
            failing.read(count)
        static = failing.cache.static
        assert static is not None
        if static.open:
            refused += 1
            for use in (
                lambda failing=failing: failing.read(count),
                lambda failing=failing: failing.cache.save(tmp_path / "cache"),
                lambda failing=failing: failing.cache.crop(-1),
                lambda failing=failing: failing.cache.reorder_cache(torch.tensor([1, 0])),
            ):
                with pytest.raises(RuntimeError, match=r"failed half-way.*reset"):
                    use()
            assert not list(tmp_path.iterdir())
            failing.cache.reset()
            failing.mask = failing.mask[:, :0]
            assert torch.equal(failing.read(60), first)
        else:
            if int(failing.cache.get_seq_length()) == length:
                assert torch.equal(failing.read(count), expected)
            failing.mask = whole.mask[:, : length + count]
            for a, b in zip(failing.go_on(), after, strict=True):
                assert torch.equal(a, b)
    assert (refused > 0) == (count == 1)


def repeat(cache: MomentCache) -> None:
    cache.batch_repeat_interleave(2)


def prefill(cache: MomentCache) -> None:
    tiny("llama")(prompt(1, 60), past_key_values=cache)


def read_text(cache: MomentCache) -> None:
    read(tiny("llama"), prompt(1, 60), cache, request=[1, 2])


@pytest.mark.parametrize("use", [repeat, prefill, read_text], ids=lambda x: x.__name__)
@pytest.mark.parametrize("arrays", [1, 2])
@torch.no_grad()
def test_a_static_cache_without_room_for_its_arrays_is_as_before(
    use: Callable[[MomentCache], None], arrays: int, monkeypatch: pytest.MonkeyPatch
):
    """They are made at the end of a pass, all at once, when the layers have read its tokens."""
    model = tiny("llama")
    whole, failing = (MomentCache(model, **SMALL, static=True, policy="twice") for _ in range(2))
    if use is repeat:
        for cache in (whole, failing):
            prefill(cache)
    before, fix, calls = int(failing.get_seq_length()), LayerCache.fix, []

    def without_room(core: LayerCache) -> None:
        calls.append(core)
        if len(calls) == arrays:
            raise torch.OutOfMemoryError("no memory is left")
        fix(core)

    with monkeypatch.context() as patch:
        patch.setattr(LayerCache, "fix", without_room)
        with pytest.raises(torch.OutOfMemoryError):
            use(failing)
    assert len(calls) == arrays
    assert int(failing.get_seq_length()) == before
    assert failing.static is not None
    assert failing.static.runs == (use is repeat)
    for cache in (whole, failing):
        use(cache)
    for seed in range(6):
        ids = prompt(2 if use is repeat else 1, 1, seed=seed)
        a, b = (model(ids, past_key_values=cache).logits for cache in (whole, failing))
        assert torch.equal(a, b)


@torch.no_grad()
def test_reading_that_is_interrupted_after_its_last_step_leaves_a_static_cache_empty(monkeypatch: pytest.MonkeyPatch):
    cache, done = MomentCache(tiny("llama"), **SMALL, static=True, policy="twice"), Clock.set

    def interrupted(clock: Clock) -> None:
        done(clock)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Clock, "set", interrupted)
        with pytest.raises(KeyboardInterrupt, match="the cache is empty"):
            read_text(cache)
    assert cache.static is not None
    assert not cache.static.runs
    assert cache.get_seq_length() == 0
    read_text(cache)
    assert int(cache.get_seq_length()) == 60


@torch.no_grad()
def test_rows_that_were_written_over_cannot_go_back(monkeypatch: pytest.MonkeyPatch):
    """Of as many rows, static arrays are kept, and hold half of the new state: the cache says so."""
    cache, fix = MomentCache(tiny("llama"), **SMALL, static=True), LayerCache.fix
    prefill(cache)

    def interrupted(core: LayerCache) -> None:
        fix(core)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LayerCache, "fix", interrupted)
        with pytest.raises(KeyboardInterrupt):
            move_rows_of_one(cache)
    with pytest.raises(RuntimeError, match=r"failed half-way.*reset"):
        move_rows_of_one(cache)
    cache.reset()
    prefill(cache)
    move_rows_of_one(cache)


def move_rows_of_one(cache: MomentCache) -> None:
    cache.reorder_cache(torch.tensor([0]))

"""Reading a text into a cache, once or twice, before anything of it is evicted."""

from __future__ import annotations

import contextlib
import inspect
import math
import numbers
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from momentkv._numbers import whole_number
from momentkv.cache.second_reading import RereadBudget
from momentkv.hf.cache import MomentCache
from momentkv.hf.inputs import check_positions, check_reader, first_ids, ids_of, placed
from momentkv.hf.layer_reader import LayerReader
from momentkv.hf.models import takes
from momentkv.hf.repeating import REQUEST, opens_turn, request_of
from momentkv.hf.stretches import LEAD, parts, passes_of
from momentkv.hf.trial import Trial

__all__ = ["Piece", "Reading", "read"]

# Seconds before a progress bar shows.
PATIENCE = 2.0
# Most tokens of one pass.
CHUNK = 2048
# Positions that a text must leave free for its parts to be repeated, unless the parts are shorter.
ROOM = 64


class Piece(NamedTuple):
    """Tokens that are read together, and the mask over them and all before them.

    Attributes
    ----------
    ids : int tensor, shape (batch, n)
    mask : int tensor, shape (batch, seen + n), or None
    seen : int
        Tokens of the cache before them.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None
    seen: int


def read(
    model: Any,
    inputs: Any,
    cache: MomentCache,
    *,
    twice: bool | float = True,
    tokenizer: Any = None,
    attention_mask: torch.Tensor | None = None,
    request: str | Sequence[int] = REQUEST,
    chunk: int = CHUNK,
    segment: int | None = None,
    trial: int = 0,
    progress: bool = True,
) -> MomentCache:
    """Read a text into a cache, let the model repeat it to see which tokens that needs, and then evict.

    The first reading stores all tokens. For the second, the model is asked to repeat the text, part by part. The score
    of a token is the largest attention that any query of the second reading gives it. Nothing else of the second
    reading is stored: keys, values and positions are those of the first.

    Parameters
    ----------
    model : PreTrainedModel
        With ``attn_implementation="momentkv"``, that the cache was made for.
    inputs : str, sequence of str, int tensor (batch, n), or what a tokenizer returns
        A text is the beginning of a user's turn if the tokenizer has a chat template; a question may follow. Several
        are padded at the left. After tokens that the cache has read, these are the new ones: a text directly after
        another goes on with it, in the same turn; one after anything else ends the answer there, as the template
        does, and begins the next turn.
    cache : MomentCache
        To read twice, its policy must be ``"twice"`` or ``"second-reading"``.
    twice : bool or float
        The share of the text that is read a second time, from 0 to 1: its most novel stretches. True, or 1, reads all
        of it a second time, at the most cost; False, or 0, reads once: the same as a prefill in one pass, but in parts
        of bounded size.
    tokenizer : PreTrainedTokenizer, optional
        Reads texts, and the request.
    attention_mask : int tensor, shape (batch, seen + n), optional
        Zero for padding. Texts bring their own.
    request : str or sequence of int
        What the model is told before each part of the text. Ids need no tokenizer, and ``[]`` says nothing.
    chunk : int
        Most tokens of the text in one pass. Passes of the second reading also have the request and a few tokens before
        a part.
    segment : int, optional
        Read, repeat and evict that many tokens at a time, so that at most the budget, one segment and its blocks are
        stored. None for the whole text in one piece.
    trial : int
        Hold that many tokens at the end of the text back, compress what is before them in several ways, and take the
        way that changes the model's predictions of them least, see `momentkv.hf.trial`. 0 tries nothing.
    progress : bool
        Show a bar where it takes more than two seconds.

    Returns
    -------
    MomentCache
        ``cache``, ready for ``generate``, ``copy.deepcopy`` and ``save``.

    Raises
    ------
    ValueError
        If there is nothing to read, no tokenizer for a text or a mask beside it, a policy that does not look at a
        second reading, or a trial of nothing.
    RuntimeError
        If recorded passes wait for `MomentCache.crop`.
    KeyboardInterrupt
        On Ctrl-C. As on any error, the cache is then as it was before, and so is the model.

    Notes
    -----
    The second reading of a whole text costs as much as reading a second half of a text of twice the length, and that of
    a share as much less. Stretches of 64 tokens are chosen by how far their keys and values lie from the others'
    (`momentkv.policies.Novelty`), for each row of a batch and each segment by itself. Without ``segment`` the whole
    text is stored until the second reading ends.

    Source: KVzip (arXiv 2505.23416). Derivation: docs/derivations/second-reading.md.
    """
    if not isinstance(cache, MomentCache):
        raise TypeError(f"cache is a {type(cache).__name__}; read into a MomentCache")
    check_reader(model, tokenizer)
    seen = int(cache.get_seq_length())
    goes_on = 0 < seen == cache.turn
    ids, mask = ids_of(inputs, tokenizer, attention_mask, cache, goes_on=goes_on)
    n = ids.shape[1]
    check(cache, ids, mask, twice=twice, chunk=chunk, segment=segment)
    if trial:
        check_trial(cache, ids, mask, twice=twice, segment=segment, trial=trial)
    share = float(twice)
    whole = None if mask is None or bool(mask.all()) else placed(mask, model)
    check_positions(model, seen, whole)
    opens = goes_on or (tokenizer is not None and opens_turn(tokenizer, first_ids(ids, whole)))
    asked = request_of(tokenizer, request, opens) if share else []
    if share:
        chunk = chunk_within(model, seen + n, len(asked) + LEAD, chunk)
    ids = placed(ids, model)
    pieces = []
    for start, stop in parts(n, segment or n):
        pieces.append(Piece(ids[:, start:stop], None if whole is None else whole[:, : seen + stop], seen + start))
    total = n + sum(round(share * piece.ids.shape[1]) for piece in pieces)
    before, tried = cache.passes.held(), cache.tried
    try:
        with (
            torch.no_grad(),
            own_positions(model, seen),
            tqdm(total=total, unit="token", delay=PATIENCE, leave=False, disable=not progress) as bar,
        ):
            for piece in pieces:
                with Reading(model, cache, piece, chunk, trial) as reading:
                    reading.read(bar.update)
                    if share:
                        reading.read_again(asked, share, bar.update)
                    if reading.trial is not None:
                        reading.trial.choose(bar)
                reading.evict()
            if cache.static is not None:
                cache.static.set()
    except BaseException as error:
        cache.passes.go_back(before)
        cache.tried = tried
        if isinstance(error, KeyboardInterrupt):
            state = f"holds the {seen} tokens that it held" if seen else "is empty"
            raise KeyboardInterrupt(f"reading was interrupted: the cache {state}, and the model is unchanged") from None
        raise
    cache.turn = seen + n if opens else None
    return cache


@contextlib.contextmanager
def own_positions(model: Any, seen: int) -> Iterator[None]:
    """Let a text start at its own positions: some models keep, from what they read last, how images moved them."""
    modules = [] if seen else [x for x in model.modules() if getattr(x, "rope_deltas", None) is not None]
    before = [module.rope_deltas for module in modules]
    for module in modules:
        module.rope_deltas = None
    try:
        yield
    except BaseException:
        for module, deltas in zip(modules, before, strict=True):
            module.rope_deltas = deltas
        raise


class Reading:
    """A piece of a text on its way into a cache: its first reading, a second one, and the eviction after both.

    Parameters
    ----------
    model : PreTrainedModel
    cache : MomentCache
    piece : Piece
    chunk : int
        Most tokens of one pass.
    trial : int
        Tokens at the end of the piece that settings are tried on.
    """

    def __init__(self, model: Any, cache: MomentCache, piece: Piece, chunk: int, trial: int = 0) -> None:
        self.model, self.cache, self.piece, self.chunk = model, cache, piece, chunk
        self.layers = cache.passes.moments
        self.readers = [LayerReader(layer.core) for layer in self.layers]
        self.takes_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        # Some count positions behind that of padding unless they are told them, as `generate` does, from 0.
        self.tells_positions = any(hasattr(x, "create_position_ids_from_input_ids") for x in model.modules())
        self.trial = Trial(self, trial) if trial else None

    def __enter__(self) -> Reading:
        for layer, reader in zip(self.layers, self.readers, strict=True):
            layer.reader = reader
        return self

    def __exit__(self, *_: Any) -> None:
        for layer in self.layers:
            layer.reader = None

    def read(self, done: Any = None) -> None:
        """Read the piece; all of it is stored. ``done`` is called with the tokens of each pass."""
        n = self.piece.ids.shape[1]
        held_back = 0 if self.trial is None else self.trial.tokens
        for start, stop in parts(n - held_back, self.chunk):
            self.pass_over(start, stop)
            if done is not None:
                done(stop - start)
        if self.trial is not None:
            self.trial.begin(lambda: self.pass_over(n - held_back, n, logits=True))
            if done is not None:
                done(held_back)
        for reader in self.readers:
            reader.end_first()

    def pass_over(self, start: int, stop: int, *, logits: bool = False) -> Any:
        """One pass over tokens of the piece; predictions of the last one, or with ``logits`` of all."""
        mask = None if self.piece.mask is None else self.piece.mask[:, : self.piece.seen + stop]
        return self.forward(self.piece.ids[:, start:stop], mask, logits=logits)

    def read_again(self, request: Sequence[int], share: float = 1.0, done: Any = None) -> None:
        """Let the model repeat a share of the piece, part by part, from what is stored; only scores are kept."""
        ids, mask, seen = self.piece
        rows, n = ids.shape
        asked = torch.tensor([list(request)] * rows, dtype=ids.dtype, device=ids.device).reshape(rows, -1)
        for reader in self.readers:
            reader.again = True
        held = self.cache.passes.held()
        cores = [reader.core for reader in self.readers]
        apart = 0 if self.trial is None else self.trial.tokens
        passes = list(passes_of(cores, rows, n, share, self.chunk, apart))
        early = len(passes) - math.ceil(apart / self.chunk)
        for number, index in enumerate(passes):
            if self.trial is not None and number == early:
                self.trial.note_scores()
            index = index.to(ids.device)
            part, again = ids.gather(1, index), None
            if mask is not None:
                real = mask[:, seen:].gather(1, index)
                # Padding comes last, where it parts no tokens that a sliding window should hold together.
                order = real.ne(0).long().argsort(dim=1, descending=True, stable=True)
                part, real = part.gather(1, order), real.gather(1, order)
                again = torch.cat([mask, torch.ones_like(asked), real], dim=1)
            self.forward(torch.cat([asked, part], dim=1), again)
            # Layers with a sliding window have stored the pass, and budgets that are shares of the text have grown.
            self.cache.passes.go_back(held)
            if done is not None:
                before, after = (round(share * n * count / len(passes)) for count in (number, number + 1))
                done(after - before)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None, *, logits: bool = False) -> Any:
        """One pass of the model; logits of its last token, or of all, (batch, n, vocabulary), if it predicts any."""
        options: dict[str, Any] = takes(self.model, self.cache) | {"use_cache": True}
        if self.takes_logits:
            options["logits_to_keep"] = ids.shape[1] if logits else 1
        if mask is not None:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :].contiguous()
            options |= {"attention_mask": mask, "position_ids": positions}
        elif self.tells_positions:
            start, new = int(self.cache.get_seq_length()), ids.shape[1]
            options["position_ids"] = torch.arange(start, start + new, device=ids.device).expand(len(ids), -1)
        found = self.model(ids, **options)
        if not hasattr(found, "logits"):
            if logits:
                raise ValueError(
                    f"trial is {len(ids[0])}, and the model is a {type(self.model).__name__}, which predicts nothing; "
                    "give the model with its head, or trial=0"
                )
            return None
        return found.logits

    @property
    def scores(self) -> dict[int, torch.Tensor]:
        """Of the second reading, by layer of the model."""
        read = zip(self.cache.moment_layers, self.readers, strict=True)
        return {index: reader.scores for index, reader in read if reader.scores is not None}

    @torch.no_grad()
    def evict(self) -> None:
        """Evict in all layers; the cache then goes on as after any prefill."""
        for layer, reader in zip(self.layers, self.readers, strict=True):
            reader.end_second()
            layer.evict()


def check(
    cache: MomentCache,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    twice: bool | float,
    chunk: int,
    segment: int | None,
) -> None:
    """Raise unless a text can be read so."""
    if not cache.passes.moments:
        raise ValueError("no layer of this model is compressed (all have a sliding window): there is nothing to evict")
    seen = int(cache.get_seq_length())
    if not (isinstance(twice, numbers.Real) and 0 <= twice <= 1):
        raise ValueError(f"twice is {twice!r}; use True, False, or a share of the text from 0 to 1")
    for name, size in (("chunk", chunk), ("segment", segment)):
        if (name, size) != ("segment", None) and whole_number(name, size) < 1:
            raise ValueError(f"{name} is {size}; read at least one token at a time")
    if ids.shape[1] == 0:
        raise ValueError("inputs has no tokens; there is nothing to read")
    if mask is not None and tuple(mask.shape) != (ids.shape[0], seen + ids.shape[1]):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; it must cover all tokens seen with this cache and those "
            f"to be read, {(ids.shape[0], seen + ids.shape[1])}"
        )
    first = cache.passes.moments[0]
    if cache.static is not None and seen:
        raise RuntimeError(
            f"a static cache reads a text when it is empty, and this one has read {seen} tokens; call cache.reset(), "
            "or make it with static=False"
        )
    if cache.static is not None and segment is not None:
        raise ValueError(f"segment is {segment}, but a static cache reads in one piece; make it with static=False")
    if first.passes:
        raise RuntimeError("recorded passes wait for crop; call cache.crop(0) before reading more")
    policy = first.core.config.policy
    if twice and not policy.rereads:
        raise ValueError(
            f'policy is {policy.name!r}, which does not look at a second reading; make the cache with policy="twice", '
            "or read with twice=False"
        )


def check_trial(
    cache: MomentCache,
    ids: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    twice: bool | float,
    segment: int | None,
    trial: int,
) -> None:
    """Raise unless ways to compress can be tried on a text."""
    seen, n = int(cache.get_seq_length()), ids.shape[1]
    if isinstance(trial, bool) or not (isinstance(trial, numbers.Integral) and 0 < trial < n):
        raise ValueError(f"trial is {trial!r}, of a text of {n} tokens; hold back some of them, 256 say, or 0")
    if seen:
        raise ValueError(f"trial is {trial}, but the cache has read {seen} tokens: how it compresses is settled; use 0")
    if segment is not None:
        raise ValueError(f"trial is {trial} and segment is {segment}; try on a text in one piece")
    if twice not in (0, 1):
        raise ValueError(f"trial is {trial} and twice is {twice}; read all of the text a second time, or none of it")
    if mask is not None and not bool(mask[:, -trial:].all()):
        raise ValueError(f"trial is {trial}, but some of the last {trial} tokens are padding; pad at the left")
    rereads = bool(twice) and any(isinstance(each, RereadBudget) for each in cache.shared_budgets)
    if not (rereads or cache.chooses_bits):
        raise ValueError(
            f'trial is {trial}, but there is nothing to choose; make the cache with bits="auto", or with '
            'policy="twice" and budgets by heads'
        )


def chunk_within(model: Any, length: int, beside: int, chunk: int) -> int:
    """Most tokens of a part that the model has positions for, behind a text and what comes before the part."""
    config = model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is None:
        return chunk
    room: int = min(chunk, limit - length - beside)
    if room < min(chunk, ROOM):
        raise ValueError(
            f"the text ends at token {length} of the {limit} that the model has positions for: there is no room to "
            "repeat it; read a shorter text, or with twice=False"
        )
    return room

"""What attention masks have said about the tokens that a cache has read: a later mask must not hide one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["Padding", "check_mask_of_stored"]

# Codes of a token: padding; the pad of a row that had ended, which the mask called a token; not known; a token.
PAD, ENDED, UNKNOWN, TOKEN = 0, 1, 2, 3
KEY = "padding"


class Padding:
    """Which tokens of each row a cache has read as padding.

    Attributes
    ----------
    codes : uint8 tensor, shape (batch, n), or None
        Of the first ``n`` tokens; later ones are real. None as long as all are real. So it takes a byte for each token
        and row, in batches with padding alone.
    """

    def __init__(self) -> None:
        self.codes: torch.Tensor | None = None

    def check(self, mask: torch.Tensor | None, seen: int) -> None:
        """Raise if a mask says something else of the first ``seen`` tokens; see `check_mask_of_stored`."""
        check_mask_of_stored(mask, seen, self._codes_of(seen))

    def check_positions(self, positions: Any) -> None:
        """Raise if a step without a mask has one position for all rows, some of which were padded."""
        if self.codes is None or len(self.codes) == 1 or getattr(positions, "ndim", None) != 2 or len(positions) > 1:
            return
        rows = self.codes.eq(PAD).any(1)
        if bool(rows.any()):
            raise ValueError(
                f"attention_mask and position_ids are missing, and the cache has read row {int(rows.nonzero()[0, 0])} "
                "with padding, which the model does not know: all rows would have one position; pass the mask over all "
                "tokens seen and the new one, or the position of each row"
            )

    def read(self, mask: torch.Tensor | None, valid: torch.Tensor | None, seen: int, new: int) -> None:
        """Record a pass of ``new`` tokens after ``seen``, whose mask has been checked.

        Parameters
        ----------
        mask : bool tensor, shape (batch, seen + new), (batch, new) or None
        valid : bool tensor, shape (batch, 1, new), or None
            Which of the new tokens the cache has read as tokens: those of the mask without rows that have ended.
        """
        if mask is None and valid is None and self.codes is None:
            return
        codes = self._codes_of(seen)
        one: Any = next(x for x in (mask, valid, codes) if x is not None)
        rows, device = one.shape[0], one.device
        fresh = torch.full((rows, new), TOKEN, dtype=torch.uint8, device=device)
        if valid is not None:
            fresh = torch.where(valid[:, 0], fresh, ENDED)
        if mask is not None:
            fresh = torch.where(mask[:, -new:].bool(), fresh, PAD)
        if codes is None:
            codes = torch.full((rows, seen), TOKEN, dtype=torch.uint8, device=device)
        elif mask is not None and mask.shape[1] > new:
            # From now on the mask knows of rows that had ended.
            ended = (codes == ENDED) & ~mask[:, :seen].bool()
            codes = torch.where(ended, PAD, codes)
        self.codes = torch.cat([codes.to(device), fresh], dim=1)

    def before(self, ids: torch.Tensor, mask: torch.Tensor | None, seen: int) -> torch.Tensor | None:
        """The mask (batch, seen + n) of the first tokens and new ones ``ids`` (batch, n), of which ``mask`` is known.

        None where no token is padding.
        """
        codes = self._codes_of(seen)
        if not seen or (mask is None and codes is None):
            return mask
        new = torch.ones_like(ids) if mask is None else mask
        old = new.new_ones(ids.shape[0], seen) if codes is None else codes.ne(PAD).to(new)
        return torch.cat([old, new], dim=1)

    def keep(self, tokens: int) -> None:
        """Forget all but the first tokens; the last ones may never have been recorded, see `_codes_of`."""
        if self.codes is not None:
            self.codes = self.codes[:, :tokens]

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Select, repeat or reorder rows."""
        if self.codes is not None:
            self.codes = function(self.codes)

    def reset(self) -> None:
        """Forget all."""
        self.codes = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file of the cache holds of it."""
        return {} if self.codes is None else {KEY: self.codes.cpu().contiguous().clone()}

    def load(self, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any]) -> None:
        """Take over what a file holds; one of a version that did not say so may have had padding."""
        self.codes = tensors.get(KEY)
        rows = next((x.shape[0] for name, x in tensors.items() if name != KEY), 0)
        if "padding" not in record and rows:
            self.codes = torch.full((rows, record["seen"]), UNKNOWN, dtype=torch.uint8)

    def _codes_of(self, seen: int) -> torch.Tensor | None:
        """Codes of the first tokens; those of steps that were compiled or replayed are not known to be padding."""
        if self.codes is None or self.codes.shape[1] >= seen:
            return None if self.codes is None else self.codes[:, :seen]  # more, if the last step failed
        return torch.nn.functional.pad(self.codes, (0, seen - self.codes.shape[1]), value=TOKEN)


def check_mask_of_stored(mask: torch.Tensor | None, seen: int, codes: torch.Tensor | None) -> None:
    """Raise if an attention mask hides tokens that a cache has stored, or shows what it has read as padding.

    Parameters
    ----------
    mask : tensor, shape (batch, seen or more), or None
        Nonzero for a token; None for tokens alone.
    seen : int
        Tokens that the cache has read.
    codes : uint8 tensor, shape (batch, seen), or None
        What it has read; see `Padding`.

    Raises
    ------
    ValueError
        With the first row and token. What has been folded into a correction cannot be taken out again, and padding has
        not been stored.

    Examples
    --------
    >>> check_mask_of_stored(torch.tensor([[1, 1, 0, 1, 1]]), 4, None)
    Traceback (most recent call last):
        ...
    ValueError: attention_mask hides token 2 of row 0 (1 in all), which the cache has read as a token; ...
    """
    if not seen:
        return
    if mask is not None:
        shown = mask[:, :seen].bool()
        codes = torch.full_like(shown, TOKEN, dtype=torch.uint8) if codes is None else codes.to(shown.device)
        wrong = (~shown & codes.eq(TOKEN)) | (shown & codes.eq(PAD))
    elif codes is not None:
        wrong = codes.eq(PAD)
    else:
        return
    if not bool(wrong.any()):
        return
    row, token = wrong.nonzero()[0].tolist()
    if mask is not None and not bool(mask[row, token]):
        raise ValueError(
            f"attention_mask hides token {token} of row {row} ({int(wrong.sum())} in all), which the cache has read as "
            "a token; say which rows had ended when they were read (momentkv.hf.FinishedRows, for end tokens and "
            "stopping criteria), or read the rows again with a new cache"
        )
    raise ValueError(
        f"attention_mask shows token {token} of row {row} ({int(wrong.sum())} in all), which the cache has read as "
        "padding; pass the mask over all tokens seen, with zeros at the padding"
    )

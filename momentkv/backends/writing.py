"""Where rows of an array are written to, when some go nowhere and nobody may wait for the device to say which."""

from __future__ import annotations

import torch

__all__ = ["only_written"]


def only_written(
    x: torch.Tensor, slots: torch.Tensor, new: torch.Tensor, axis: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots none of which is negative, and what goes there; does not wait for the device.

    A negative one becomes another of its row, with the same content; in a row of none but such, slot 0 as it is.
    """
    valid = slots >= 0
    own = torch.arange(slots.shape[-1], device=slots.device)
    source = torch.where(valid, own, valid.to(torch.uint8).argmax(-1, keepdim=True))
    slots = slots.gather(-1, source).clamp(min=0)
    some = valid.any(-1, keepdim=True).expand(slots.shape)
    if axis == -1:
        return slots, torch.where(some, new.gather(-1, source), x.gather(-1, slots))
    source, wide = (index[..., None].expand(new.shape) for index in (source, slots))
    return slots, torch.where(some[..., None], new.gather(-2, source), x.gather(-2, wide))

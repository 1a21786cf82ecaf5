"""What operators tell PyTorch about themselves, held against what they do on the device: `torch.library.opcheck`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch

from momentkv.backends.operators import decode_operator, parts_of
from momentkv.testing.decoding import Decode, make
from momentkv.testing.gpu.parts import Row
from momentkv.testing.gpu.steps import KINDS, static_layer

__all__ = ["checked"]

# That which compiles for shapes that change takes most of the time, and depends on the device least.
UTILITIES = ("test_schema", "test_autograd_registration", "test_faketensor")
CASES = (
    Decode(d=16, capacity=5, estimate="summaries x 2", scored=True),
    Decode(d=16, capacity=5, packed=True, recent=3, recent_masked=True),
    Decode(d=16, capacity=5, packed=True, recent=3, bits=(4, 3), estimate="order 0", scored=True),
)


def checked(rehearse: bool) -> Iterator[Row]:
    """Of each operator and case what the check found; the operators of static steps where transformers is installed."""
    device = "cpu" if rehearse else "cuda"
    for case in CASES:
        yield outcome("decode", str(case), decode_operator, decode_arguments(case, device))
    if find_spec("transformers") is None:
        return
    from momentkv.hf.steps import arrays_of, flush_operator, step_operator

    for kind, settings in KINDS.items():
        small = settings | {"window": 8, "block": 4}
        cache, tokens = static_layer((2, 2, 2, 16), torch.float32, device, 24, small, context=72)
        valid = torch.tensor([True, False], device=device)[:, None, None]
        yield outcome("step", kind, step_operator, (*tokens, valid, arrays_of(cache), cache.number))
        yield outcome("flush", kind, flush_operator, (arrays_of(cache), [cache.number]))


def decode_arguments(case: Decode, device: str) -> tuple[Any, ...]:
    """Of ``torch.ops.momentkv.decode``."""
    x = make(case, device)
    parts = (None,) * 10 if x.expansion is None else x.expansion
    recent = (None,) * 3 if x.recent is None else x.recent
    where = (x.positions, x.counts, x.starts, case.capacity)
    return (x.q, x.k, x.v, *where, *recent, case.scale, case.scored, *parts, *parts_of(x.coding))


def outcome(name: str, case: str, operator: Any, arguments: tuple[Any, ...]) -> Row:
    """Whether PyTorch's check finds the operator to do what it says, and if not, why."""
    found = torch.library.opcheck(operator, arguments, test_utils=UTILITIES, raise_exception=False)
    wrong = [f"{utility}: {said}" for utility, said in found.items() if said != "SUCCESS"]
    return {"operator": name, "case": case, "right": not wrong, "why": "; ".join(wrong)[-500:]}

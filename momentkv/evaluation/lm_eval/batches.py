"""Batches of lm_eval in which every row is read as it would be alone."""

from __future__ import annotations

from typing import Any

__all__ = ["check_batch"]

# What is the same for a row whatever rows are beside it.
ROWS_ALONE = ("uniform", "pyramid")


def check_batch(batch_size: Any, budget: Any, sharing: str | None, prefill_chunk: int | None) -> None:
    """Raise unless each row of a batch is read as it would be alone."""
    if str(batch_size) == "1":
        return
    if not str(batch_size).isdigit():
        raise ValueError(
            f"batch_size is {batch_size!r}, but lm_eval would measure what fits with the full cache; give a number"
        )
    reasons = {
        f"sharing is {sharing or 'heads'!r}, which measures errors over all rows of a batch": sharing not in ROWS_ALONE,
        f"budget is {budget!r}, which counts all rows of a batch or their padding": not isinstance(budget, int),
        f"prefill_chunk is {prefill_chunk}, and padding moves where chunks end": prefill_chunk is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(
                f"batch_size is {batch_size}, but {reason}: results would depend on who is beside whom; use "
                "batch_size 1, or sharing=uniform, a budget in tokens and no prefill_chunk"
            )

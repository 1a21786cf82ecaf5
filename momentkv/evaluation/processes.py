"""Work in separate processes, which end with the command that started them. Only that command answers Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["in_a_process", "interrupts_later"]

# Seconds in which a process that has answered may end by itself.
PATIENCE = 10.0


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Delays Ctrl-C until the end of the block; processes that are started inside never receive it.

    A terminal sends SIGINT to all processes, and each would print a traceback. So the signal is blocked, which child
    processes inherit. Here it is recorded, since it may reach another thread, and raised at the end. So no signal is
    lost, and none arrives between the start of a process and the record of it.
    """
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)
    if came:
        signal.raise_signal(signal.SIGINT)


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a fresh process.

    Raises
    ------
    ChildProcessError
        If the process ended without an answer, as when there is no memory left.
    Exception
        What the function raised.
    """
    context = get_context("spawn")
    resource_tracker.ensure_running()  # which would let SIGINT through again when it starts
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, function, arguments), daemon=True)
    with interrupts_later():
        process.start()
    theirs.close()
    try:
        raised, result = ours.recv()
        process.join(PATIENCE)  # it gives back what the system would miss
    except EOFError as error:
        process.join()
        raise ChildProcessError(
            f"the process that ran {function.__name__} ended with status {process.exitcode} and no answer; if there is "
            "too little memory, use a shorter context"
        ) from error
    finally:
        process.terminate()
        process.join()
    if raised:
        raise result
    return result


def answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Run a function and send what it returned or raised."""
    try:
        pipe.send((False, function(*arguments)))
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        pipe.send((True, error))

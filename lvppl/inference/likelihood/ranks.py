"""Rows shared out over the processes of a ``torch.distributed`` group, and results put together.

Started by ``torchrun``, every process has the same data and programs, on a device of its own, and
calls the same function. The random numbers of a datum do not depend on who draws them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import distributed

from lvppl.errors import ProgramError

__all__ = ["agreed", "num_processes", "share", "together"]

T = TypeVar("T")


def num_processes() -> int:
    """Of the group; 1 where there is none."""
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if ready else 1


def agreed(value: T) -> T:
    """The value of the first process, for all."""
    if num_processes() == 1:
        return value
    held: list[Any] = [value]
    distributed.broadcast_object_list(held)
    found: T = held[0]
    return found


def share(rows: int, whole: bool) -> tuple[int, int]:
    """The rows of this process, of about equal number; all of them the first's where they are not
    to be cut."""
    size = num_processes()
    if size == 1:
        return 0, rows
    rank = distributed.get_rank()
    if whole:
        return (0, rows) if rank == 0 else (rows, rows)
    return rows * rank // size, rows * (rank + 1) // size


def together(find: Callable[[], Sequence[T]]) -> list[T]:
    """What every process finds, in the order of the processes; on the processor.

    Raises:
        ProgramError: another process failed (which, and with what). One that failed itself raises
            its own error, and none is left waiting.
    """
    if num_processes() == 1:
        return list(find())
    found: Sequence[T] = ()
    failure: Exception | None = None
    try:
        found = find()
    except Exception as error:
        failure = error
    every: list[Any] = [None] * num_processes()
    distributed.all_gather_object(every, (list(found), None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(every):
        if text is not None:
            raise ProgramError(f"Process {rank} of the group failed: {text}")
    return [part for parts, _ in every for part in parts]

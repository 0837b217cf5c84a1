"""What to do when memory runs out: notice it, let go of what is held, try with less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from lvppl.errors import ProgramError

__all__ = ["PassSize", "attempt", "names_memory", "ran_out", "too_small"]

T = TypeVar("T")

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "outofmemory")


def names_memory(text: str) -> bool:
    """Whether a message is about memory that could not be had."""
    return any(word in text.lower() for word in _WORDS)


def ran_out(error: BaseException) -> bool:
    """Whether an error, or what caused it, is a lack of memory of the host or of a device.

    torch raises ``OutOfMemoryError`` for CUDA, and a bare ``RuntimeError`` of its CPU allocator;
    the latter is known by its words alone.
    """
    return any(
        isinstance(cause, MemoryError | torch.cuda.OutOfMemoryError)
        or (isinstance(cause, RuntimeError) and names_memory(str(cause)))
        for cause in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def attempt(call: Callable[..., T], *args: Any, **kwargs: Any) -> T | None:
    """``call(*args, **kwargs)``; ``None`` where memory ran out, with nothing of the call held.

    The error goes before this returns: its traceback would hold the tensors of every frame.
    """
    try:
        return call(*args, **kwargs)
    except Exception as error:
        if not ran_out(error):
            raise
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return None


@dataclass
class PassSize:
    """How much goes through the programs at once; less, each time that memory runs out.

    Attributes:
        rows: most rows of the data.
        draws: most draws of each.
        whole: why the rows cannot be cut; empty if they can.
        halvings: how often memory ran out.
    """

    rows: int
    draws: int
    whole: str = ""
    halvings: int = 0

    def halve(self) -> None:
        """Half the draws, or half the rows where there is one draw.

        Raises:
            ProgramError: one draw of one datum does not fit.
        """
        if self.draws > 1:
            self.draws //= 2
        elif self.rows > 1 and not self.whole:
            self.rows = (self.rows + 1) // 2
        else:
            raise too_small(self.rows, self.whole)
        self.halvings += 1

    @property
    def note(self) -> str:
        rows = f"{self.rows} {'row' if self.rows == 1 else 'rows'}"
        draws = f"{self.draws} {'draw' if self.draws == 1 else 'draws'}"
        return f"memory ran out: passes were cut to {rows} and {draws} of each"


def too_small(rows: int, whole: str) -> ProgramError:
    """The refusal where nothing is left to cut."""
    if whole:
        return ProgramError(
            f"Memory is too small for one draw of latents for these {rows} rows, and they cannot "
            f"be cut: {whole} Free memory, or shrink the program."
        )
    return ProgramError(
        "Memory is too small for one datum with one draw of its latents. Free memory, shrink the "
        "program, or move it to a device with more."
    )

"""Rows of the data, part by part: halved where memory runs out, kept where that is wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from lvppl.inference.likelihood.checkpoint import Checkpoint
from lvppl.inference.likelihood.memory import PassSize, attempt
from lvppl.inference.likelihood.ranks import num_processes, share, together
from lvppl.inference.likelihood.weights import Finished

__all__ = ["in_parts"]


def in_parts(
    rows: int,
    size: PassSize,
    work: Callable[[int, int], Finished],
    at: Callable[[int], object],
    keep: Checkpoint | None = None,
    shared: bool = True,
) -> list[Finished]:
    """What ``work(start, stop)`` finds of all rows, ``size.rows`` at most at once.

    The processes of a ``torch.distributed`` group share the rows, and each gets all results.

    Args:
        rows: how many there are.
        size: of a pass; halved each time that memory runs out.
        work: runs the passes of some rows.
        at: is told the row at which work begins, or begins again.
        keep: parts that are finished already, and where to keep more.
        shared: over the processes of a group.
    """
    if not shared or num_processes() == 1:
        return _in_parts((0, rows), size, work, at, keep)
    own = share(rows, bool(size.whole))
    return together(lambda: [part.to("cpu") for part in _in_parts(own, size, work, at, keep)])


def _in_parts(
    rows: tuple[int, int],
    size: PassSize,
    work: Callable[[int, int], Finished],
    at: Callable[[int], object],
    keep: Checkpoint | None,
) -> list[Finished]:
    results = list(keep.parts) if keep is not None else []
    start, end = results[-1].stop if results else rows[0], rows[1]
    with keep.kept() if keep is not None else nullcontext():
        while start < end:
            at(start)
            stop = min(start + size.rows, end)
            found = attempt(work, start, stop)
            if found is None:
                size.halve()  # and these rows again, from their first draw
                continue
            results.append(found)
            if keep is not None:
                keep.add(found)
            start = stop
    at(end)
    return results

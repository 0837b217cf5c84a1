"""The compiled E-steps, where they were built and suit the processor; else torch does the work.

The library is plain C without Python's interface, called through ctypes, which lets other threads
run meanwhile. Rows are cut into blocks that depend on their number alone, and their sums are added
in order, so that results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
from torch import Tensor

from lvppl.errors import ProgramError

__all__ = ["kmeans_sums", "mixture_totals", "takes"]

_BLOCK = 2**14  # rows of a block: enough to forget what starting one costs
_MOST_BLOCKS = 64  # and so many at most, since each has sums of its own
_LARGEST_SUMS = 2**16  # numbers, a vector for each: beyond, caches miss and products are as fast

_size, _address, _flag = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
_SIGNATURES = {
    "lvppl_mixture": [
        _address,
        _flag,
        *[_size] * 3,
        *[_address] * 4,
        *[_flag] * 2,
        *[_address] * 2,
    ],
    "lvppl_kmeans_float": [_address, *[_size] * 3, *[_address] * 5],
    "lvppl_kmeans_double": [_address, *[_size] * 3, *[_address] * 5],
}


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    """What was built, if this processor can run it faster than a BLAS; ``LVPPL_NATIVE=0``: none."""
    found = importlib.util.find_spec("lvppl.mixtures._native")
    if os.environ.get("LVPPL_NATIVE") == "0" or found is None or found.origin is None:
        return None
    try:
        library = ctypes.CDLL(found.origin)
        if library.lvppl_vector_bytes() == 0:
            return None
        for name, types in _SIGNATURES.items():
            getattr(library, name).argtypes = types
    except (OSError, AttributeError):  # built for another machine, or by another version
        return None
    return library


def takes(y: Tensor, numbers: int) -> bool:
    """Whether data of this kind, with so many numbers in their sums, are for the compiled loops."""
    return (
        y.device.type == "cpu"
        and y.dtype in (torch.float32, torch.float64)
        and y.is_contiguous()
        and numbers <= _LARGEST_SUMS
        and _library() is not None
    )


def mixture_totals(
    y: Tensor,
    shift: Tensor,
    factor: Tensor,
    offset: Tensor,
    constant: Tensor,
    *,
    hard: bool,
) -> tuple[Tensor, Tensor]:
    """Sums of r_nk (second order, y, 1) with y less the shift, (K, F), and of the log-evidence.

    Args:
        y: data, (N, D).
        shift: (D,), float64, as all that follow.
        factor: inverse Cholesky factors A_k, (K, D, D), or their diagonals, (K, D).
        offset: A_k (mu_k - shift), (K, D).
        constant: scores at y = mu_k, (K,).
        hard: whether r_nk is 1 for the largest score; the log-evidence is then that score.
    """
    library, (count, dim) = _library(), offset.shape
    assert library is not None
    diagonal = factor.dim() == 2
    second = dim if diagonal else dim * (dim + 1) // 2
    arguments = [part.contiguous() for part in (shift, factor, offset, constant)]
    blocks = _blocks(len(y))
    totals = shift.new_empty(len(blocks), count, second + dim + 1)
    evidence = shift.new_empty(len(blocks))

    def sweep(i: int) -> int:
        rows = y[blocks[i]]
        return library.lvppl_mixture(
            rows.data_ptr(), y.dtype == torch.float64, len(rows), dim, count,
            *[part.data_ptr() for part in arguments], diagonal, hard,
            totals[i].data_ptr(), evidence[i].data_ptr(),
        )  # fmt: skip

    _in_parallel(sweep, len(blocks))
    return totals.sum(0), evidence.sum()


def kmeans_sums(y: Tensor, shift: Tensor, slope: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of y less the shift of the data nearest to each centre, (K, D), and their counts, (K,).

    Args:
        y: data, (N, D).
        shift: (D,), in the dtype of the data, as all that follow.
        slope: centres less the shift, (K, D).
        bias: minus half their squared norms, plus what the weights give, (K,).
    """
    library, (count, dim) = _library(), slope.shape
    assert library is not None
    float32 = y.dtype == torch.float32
    step = library.lvppl_kmeans_float if float32 else library.lvppl_kmeans_double
    arguments = [part.contiguous() for part in (shift, slope, bias)]
    blocks = _blocks(len(y))
    sums = torch.empty(len(blocks), count, dim, dtype=torch.float64)
    counts = torch.empty(len(blocks), count, dtype=torch.float64)

    def sweep(i: int) -> int:
        rows, given = y[blocks[i]], [part.data_ptr() for part in arguments]
        written = sums[i].data_ptr(), counts[i].data_ptr()
        return step(rows.data_ptr(), len(rows), dim, count, *given, *written)

    _in_parallel(sweep, len(blocks))
    return sums.sum(0), counts.sum(0)


def _blocks(rows: int) -> list[slice]:
    size = max(_BLOCK, -(-rows // _MOST_BLOCKS))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _in_parallel(sweep: Callable[[int], int], blocks: int) -> None:
    """One call a block on as many threads as torch would use; a pool of its own survives forks."""
    threads = min(torch.get_num_threads(), blocks)
    if threads == 1:
        failed = sum(sweep(i) for i in range(blocks))
    else:
        with ThreadPoolExecutor(threads) as pool:
            failed = sum(pool.map(sweep, range(blocks)))
    if failed:
        raise ProgramError("there is no memory left for an E-step: fit with a batch_size")

"""How many rows of data are worked on at once."""

from __future__ import annotations

from torch import Tensor

__all__ = ["LARGEST_CHUNK", "rows_at_once"]

_CHUNK_BYTES = 2**23  # held at once on a processor, whose caches hold about as much
_DEVICE_BYTES = 2**28  # on accelerators, where launches cost more than misses
LARGEST_CHUNK = 2**14


def rows_at_once(y: Tensor, bytes_each: int, chunk: int | None = None) -> int:
    """Rows of y in a chunk, when each takes so many bytes; ``chunk`` where it is given."""
    if chunk is not None:
        return min(chunk, len(y))
    if y.device.type == "cpu":
        return min(max(_CHUNK_BYTES // bytes_each, 64), LARGEST_CHUNK, len(y))
    return min(max(_DEVICE_BYTES // bytes_each, 64), len(y))

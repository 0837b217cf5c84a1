"""From integer grey levels to intensities, or to pixels binarized once and for all."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lvppl.data.records import Binarize, Images, require_binarize
from lvppl.errors import ProgramError

__all__ = ["float_dtype", "images_from_levels", "static_binarized"]

_CHUNK = 1_000_000  # pixels drawn at a time, so that the draw needs little memory


def float_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The floating dtype that is asked for; torch's default for ``None``."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ProgramError(f"dtype must be a floating torch dtype, but is {dtype!r}.")
    return dtype


def static_binarized(levels: np.ndarray, num_levels: int, seed: int) -> np.ndarray:
    """One draw of y ~ Bernoulli(level / (num_levels - 1)), the same on every machine, for ever.

    The draw is this library's own, from NumPy's legacy Mersenne Twister stream, which is frozen
    across NumPy's versions; the order is that of the flattened array. It is not the file of
    Larochelle and Murray (2011): results on one are not results on the other.

    :param numpy.ndarray levels: integers 0 .. num_levels - 1, of any shape.
    :returns: zeros and ones, uint8, of the same shape.
    """
    flat = np.ascontiguousarray(levels).reshape(-1)
    drawn = np.empty(flat.shape, dtype=np.uint8)
    stream = np.random.RandomState(seed)
    for start in range(0, flat.size, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, flat.size))
        uniform = stream.random_sample(chunk.stop - chunk.start)
        drawn[chunk] = uniform * (num_levels - 1) < flat[chunk]
    return drawn.reshape(levels.shape)


def images_from_levels(
    levels: np.ndarray,
    labels: np.ndarray | None,
    *,
    num_levels: int,
    binarize: Binarize,
    seed: int,
    dtype: torch.dtype | None,
    source: str,
) -> Images:
    """The record of integer images (data, height, width), binarized as asked."""
    require_binarize(binarize)
    if binarize == "static":
        levels, num_levels = static_binarized(levels, num_levels, seed), 2
    images: Tensor = torch.tensor(levels, dtype=float_dtype(dtype))
    return Images(
        images=images.div_(num_levels - 1),
        labels=None if labels is None else torch.tensor(labels, dtype=torch.int64),
        levels=num_levels,
        binarize=binarize,
        source=source,
    )

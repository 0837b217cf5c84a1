"""MNIST: 70,000 handwritten digits of 28 x 28 pixels."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from lvppl.data.pixels import images_from_levels
from lvppl.data.records import Binarize, Images, require_binarize
from lvppl.data.verified import VerifiedFile
from lvppl.errors import ProgramError

__all__ = ["mnist"]

_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_DIGESTS = {  # sha256 of the decompressed bytes
    "train-images-idx3": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
_STEMS = {"train": "train", "test": "t10k"}
_SEEDS = {"train": 0, "test": 1}  # of the static draw


def mnist(
    *,
    binarize: Binarize = "dynamic",
    split: Literal["train", "test"] = "train",
    dtype: torch.dtype | None = None,
) -> Images:
    """MNIST (LeCun, Cortes and Burges 1998), in the original order.

    The files are looked for in ``$LVPPL_DATA/mnist``, then in the user's cache folder, and are
    downloaded to the cache otherwise; their decompressed content is verified each time.

    Dynamic and static binarization are different data sets, about 2 nats apart: never compare
    numbers across them.

    :param binarize: ``"dynamic"``: :attr:`~lvppl.data.Images.images` are the intensities, and each
        call of :meth:`~lvppl.data.Images.epoch` draws Bernoulli(intensity) pixels afresh, as Burda,
        Grosse and Salakhutdinov (2016); ``"static"``: drawn once, with a fixed seed, the same
        everywhere. The static draw is this library's own, not the file of Larochelle and Murray
        (2011). ``None``: intensities.
    :param str split: ``"train"`` (60,000) or ``"test"`` (10,000).
    :param torch.dtype dtype: of the images; torch's default for ``None``.
    :returns: :class:`~lvppl.data.Images` of shape (data, 28, 28), 256 levels, labels 0 .. 9.
    :raises ProgramError: if a file has the wrong digest, or is not there and cannot be downloaded.
    """
    require_binarize(binarize)
    if split not in _STEMS:
        raise ProgramError(f"split must be 'train' or 'test', but is {split!r}.")
    stem = _STEMS[split]
    return images_from_levels(
        parse_idx(_file(f"{stem}-images-idx3").read()),
        parse_idx(_file(f"{stem}-labels-idx1").read()),
        num_levels=256,
        binarize=binarize,
        seed=_SEEDS[split],
        dtype=dtype,
        source=f"MNIST {split}",
    )


def _file(name: str) -> VerifiedFile:
    return VerifiedFile("mnist", f"{name}-ubyte.gz", _DIGESTS[name], _MIRRORS)


def parse_idx(content: bytes) -> np.ndarray:
    """The uint8 array of an IDX file: magic number, sizes (big-endian uint32), then the bytes.

    :raises ProgramError: if the content is something else, or is cut short.
    """
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":  # 8: unsigned bytes
        raise ProgramError("Not an IDX file of unsigned bytes: it must begin with 00 00 08.")
    num_dims = content[3]
    start = 4 + 4 * num_dims
    if len(content) < start:
        raise ProgramError(
            f"The IDX file is cut short: {len(content)} bytes hold not even its sizes."
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", num_dims, offset=4))
    values = np.frombuffer(content, np.uint8, offset=start)
    if values.size != int(np.prod(shape)):
        raise ProgramError(f"The IDX file says shape {shape}, but holds {values.size} values.")
    return values.reshape(shape).copy()  # the bytes themselves are read-only

"""Binarized digits of 28×28: MNIST where it is or can be had, else the embedded digits."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

import lvppl
from lvppl.data import Images, Split

__all__ = ["binarized_digits"]


def binarized_digits(*, embedded: bool = False) -> Split:
    """Zeros and ones, drawn once: MNIST, or the embedded 8×8 digits enlarged to its size.

    Args:
        embedded: take these without looking for MNIST.
    """
    if not embedded:
        try:
            train, test = (lvppl.data.mnist(binarize="static", split=s) for s in ("train", "test"))
            return Split(train, test)
        except lvppl.ProgramError as error:
            print(f"the embedded digits, enlarged, in place of MNIST: {error}\n")
    digits = lvppl.data.digits()
    return Split(_enlarged(digits.train, seed=0), _enlarged(digits.test, seed=1))


def _enlarged(part: Images, seed: int) -> Images:
    """Intensities between the pixels, then one draw of each."""
    large = interpolate(part.images[:, None], size=(28, 28), mode="bilinear")[:, 0].clamp(0, 1)
    grey = Images(large, part.labels, source=part.source)
    pixels = grey.binarized(torch.Generator().manual_seed(seed))
    return Images(pixels, part.labels, 2, "static", f"{part.source}, enlarged")

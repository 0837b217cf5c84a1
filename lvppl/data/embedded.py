"""Data sets that need neither a file nor the network."""

from __future__ import annotations

import importlib.resources

import numpy as np
import torch
from sklearn import datasets

from lvppl.data.csv_file import parse_csv
from lvppl.data.pixels import float_dtype, images_from_levels
from lvppl.data.records import Binarize, Images, Split, Table, require_binarize
from lvppl.errors import ProgramError

__all__ = ["digits", "geyser", "photographs"]


def digits(
    *,
    binarize: Binarize = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> Split:
    """Handwritten digits: 1,797 images of 8 x 8 with 17 grey levels, split at random in two.

    The test set of Alpaydin and Kaynak's "Optical Recognition of Handwritten Digits" (UCI, 1998),
    as embedded in scikit-learn. The split and the static draw depend on ``seed`` alone, and are the
    same on every machine.

    :param binarize: ``"dynamic"``, ``"static"`` or ``None``; see :class:`~lvppl.data.Images`.
    :param float test_fraction: the part that is held out, strictly between 0 and 1.
    :param int seed: of the split, and of the static draw.
    :param torch.dtype dtype: of the images; torch's default for ``None``.
    :returns: ``.train`` and ``.test``, each :class:`~lvppl.data.Images` of shape (data, 8, 8) with
        labels 0 .. 9.
    :raises ProgramError: on a fraction that leaves one side empty, or another ``binarize``.
    """
    require_binarize(binarize)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise ProgramError(f"seed must be a whole number from 0 to 2**31 - 1, but is {seed!r}.")
    embedded = datasets.load_digits()
    levels, labels = embedded.images.astype(np.uint8), embedded.target
    num_test = round(test_fraction * len(levels)) if 0 < test_fraction < 1 else 0
    if not 0 < num_test < len(levels):
        raise ProgramError(
            f"test_fraction must leave data on both sides, but is {test_fraction!r}: choose it "
            "strictly between 0 and 1."
        )
    order = np.random.RandomState(seed).permutation(len(levels))

    def part(index: np.ndarray, which: int) -> Images:
        return images_from_levels(
            levels[index],
            labels[index],
            num_levels=17,
            binarize=binarize,
            seed=2 * seed + which,  # the two sides are drawn from streams of their own
            dtype=dtype,
            source="scikit-learn load_digits",
        )

    return Split(train=part(order[num_test:], 0), test=part(order[:num_test], 1))


def geyser(*, dtype: torch.dtype | None = None) -> Table:
    """Old Faithful: 272 eruptions, their duration and the waiting time to the next, in minutes.

    The classic mixture of two components. Azzalini and Bowman, "A look at some data on the Old
    Faithful geyser" (1990), in the version of R; the labels are those of seaborn's copy, which
    calls an eruption short where the waiting time is at most 67 minutes.

    :param torch.dtype dtype: of the values; torch's default for ``None``.
    :returns: :class:`~lvppl.data.Table` with values (272, 2), columns ``duration`` and ``waiting``,
        and labels with names ``short`` and ``long``.
    """
    text = importlib.resources.files("lvppl.data").joinpath("geyser.csv").read_text("utf-8")
    columns = ("duration", "waiting")
    values, _ = parse_csv(text, "geyser.csv", columns=columns)
    names = ("short", "long")
    kinds = [line.rsplit(",", 1)[1].strip() for line in text.splitlines()[1:]]
    return Table(
        values=torch.as_tensor(values, dtype=float_dtype(dtype)),
        columns=columns,
        labels=torch.tensor([names.index(kind) for kind in kinds]),
        label_names=names,
        source="Old Faithful (Azzalini and Bowman 1990)",
    )


def photographs(*, dtype: torch.dtype | None = None) -> Images:
    """Two colour photographs of 427 x 640 with 256 levels a channel: a temple and a flower.

    As embedded in scikit-learn (``load_sample_images``; both CC BY).

    :param torch.dtype dtype: of the images; torch's default for ``None``.
    :returns: :class:`~lvppl.data.Images` of shape (2, 3, 427, 640): channels first, red green blue.
    """
    levels = np.stack(datasets.load_sample_images().images).transpose(0, 3, 1, 2)
    return images_from_levels(
        levels,
        None,
        num_levels=256,
        binarize=None,
        seed=0,
        dtype=dtype,
        source="scikit-learn load_sample_images",
    )

"""Bach's chorales as piano rolls."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.data.pixels import float_dtype
from lvppl.data.verified import VerifiedFile

__all__ = ["Chorales", "Sequences", "chorales"]

LOWEST, NUM_KEYS = 21, 88  # MIDI notes of a piano: A0 … C8

_FILE = VerifiedFile(
    "",
    "jsb-chorales-quarter.json",
    "2db9329f1881a1d3f49703ec556bf1d6f84b4f6c1d702c156536e93cf31e1c91",
    ("https://raw.githubusercontent.com/czhuang/JSB-Chorales-dataset/master/",),
)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of unequal lengths, padded with zeros at their end.

    :ivar Tensor values: (sequences, steps, …).
    :ivar Tensor lengths: int64 (sequences,).
    :ivar str source: where they come from.
    """

    values: Tensor
    lengths: Tensor
    source: str = ""

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.values)

    @property
    def num_steps(self) -> int:
        """Steps of all sequences together, without the padding."""
        return int(self.lengths.sum())

    @property
    def exists(self) -> Tensor:
        """Which steps there are, bool (sequences, steps): ``values[exists]`` is all of them."""
        steps = torch.arange(self.values.shape[1], device=self.lengths.device)
        return steps < self.lengths[:, None]


@dataclass(frozen=True)
class Chorales:
    """Sequences to fit, to choose by, and to measure on."""

    train: Sequences
    valid: Sequences
    test: Sequences


def chorales(*, dtype: torch.dtype | None = None) -> Chorales:
    """J. S. Bach's chorales, 88 keys by quarter notes: 229 to fit, 76 to choose by, 77 to measure.

    The split and the time grid are those of Boulanger-Lewandowski, Bengio and Vincent (2012), whose
    log-likelihoods are in nats per time step. The file is looked for in ``$LVPPL_DATA``, then in
    the user's cache folder, and is downloaded to the cache otherwise; it is verified each time.

    :param torch.dtype dtype: of the values; torch's default for ``None``.
    :returns: :class:`Chorales` with parts ``train``, ``valid``, ``test``: :class:`Sequences` of
        zeros and ones (chorales, steps, 88). Key j is MIDI note 21 + j; no key at all is a rest.
    :raises ProgramError: if the file has the wrong digest, or cannot be downloaded.
    """
    dtype = float_dtype(dtype)
    parts = json.loads(_FILE.read())
    return Chorales(
        **{part: _piano_rolls(parts[part], dtype) for part in ("train", "valid", "test")}
    )


def _piano_rolls(pieces: list[list[list[int]]], dtype: torch.dtype) -> Sequences:
    """Lists of the MIDI notes that sound at each step, as zeros and ones."""
    lengths = torch.tensor([len(steps) for steps in pieces])
    values = torch.zeros(len(pieces), int(lengths.max()), NUM_KEYS, dtype=dtype)
    for roll, steps in zip(values, pieces, strict=True):
        for keys, notes in zip(roll, steps, strict=False):
            keys[[note - LOWEST for note in notes]] = 1
    return Sequences(values, lengths, "JSB chorales (Boulanger-Lewandowski et al. 2012)")

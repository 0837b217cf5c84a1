"""Random numbers of chains, addressed by what they are for, by datum and by chain."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.inference.addressed import _mix_int, _Noise

__all__ = ["Noise"]


@dataclass(frozen=True)
class Noise:
    """Random numbers that do not depend on how data and chains are cut into chunks.

    Attributes:
        seed: of all chains.
        first_chain, first_datum: numbers of the first chain and the first datum of this chunk.
        device: of the numbers.
    """

    seed: int
    first_chain: int
    first_datum: int
    device: torch.device

    def normal(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal (chains, data, ...), float64."""
        return self._stream(purpose, shape).normal(shape, self.device)

    def uniform(self, purpose: str, shape: tuple[int, ...]) -> Tensor:
        """Uniform on (0, 1), (chains, data, ...), float64."""
        return self._stream(purpose, shape).uniform(shape, self.device)

    def _stream(self, purpose: str, shape: tuple[int, ...]) -> _Noise:
        key = _mix_int(_mix_int(self.seed) ^ zlib.crc32(purpose.encode()))
        return _Noise(key, torch.Size(shape[:2]), (-2, self.first_chain), (-1, self.first_datum))

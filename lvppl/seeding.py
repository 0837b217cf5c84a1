"""Randomness that belongs to one computation and leaves the global generators as they were.

Pyro programs draw from the global generators of torch, numpy and ``random``. A
:class:`RandomStream` owns a state for each of them, puts it in place while it is entered, and puts
the caller's state back when it is left.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from lvppl.errors import ProgramError

__all__ = ["Generators", "RandomStream", "derived_seed", "fresh_seed", "seeded"]

RandomState = dict[str, Any]
"""States of the generators ``torch``, ``cuda``, ``numpy``, ``python``: tensors and numbers."""

_MASK = (1 << 64) - 1


def fresh_seed() -> int:
    """A seed in [0, 2^31) from the operating system, leaving every generator untouched."""
    return secrets.randbelow(2**31)


def derived_seed(seed: int, purpose: str) -> int:
    """A seed for one ``purpose`` of the computation seeded by ``seed``; stable across versions.

    One hash (64-bit FNV-1a, then the finaliser of splitmix64) of the seed and the purpose.
    """
    value = 0xCBF29CE484222325
    for byte in f"{purpose}:{seed}".encode():
        value = ((value ^ byte) * 0x100000001B3) & _MASK
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ (value >> shift)) * factor) & _MASK
    return (value ^ (value >> 31)) & 0x7FFFFFFF


def _cuda_generator(device: torch.device | None) -> torch.Generator | None:
    """The default generator of the CUDA device in use; None where CUDA has not been used."""
    if device is not None and device.type != "cuda":
        return None
    if device is None and not torch.cuda.is_initialized():
        return None
    torch.cuda.init()
    index = device.index if device is not None else None
    return torch.cuda.default_generators[torch.cuda.current_device() if index is None else index]


class Generators(NamedTuple):
    """States of the global generators, as their libraries give them: cheap to take every step."""

    cpu: Tensor
    numpy: Any
    python: Any
    cuda: Tensor | None

    @classmethod
    def read(cls, device: torch.device | None = None) -> Generators:
        """The present states."""
        cuda = _cuda_generator(device)
        return cls(
            torch.default_generator.get_state(),
            np.random.get_state(legacy=True),
            random.getstate(),
            None if cuda is None else cuda.get_state(),
        )

    def write(self, device: torch.device | None = None) -> None:
        """Put the global generators into these states."""
        torch.default_generator.set_state(self.cpu)
        np.random.set_state(self.numpy)
        random.setstate(self.python)
        cuda = _cuda_generator(device)
        if cuda is not None and self.cuda is not None:
            cuda.set_state(self.cuda)

    def plain(self) -> RandomState:
        """The same as tensors and numbers, which a checkpoint can hold."""
        name, keys, position, has_gauss, cached = self.numpy
        version, words, gauss = self.python
        state: RandomState = {
            "torch": self.cpu.clone(),
            "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
            "python": (version, torch.tensor(words, dtype=torch.int64, device="cpu"), gauss),
        }
        return state if self.cuda is None else {**state, "cuda": self.cuda.clone()}

    @classmethod
    def from_plain(cls, state: Mapping[str, Any]) -> Generators:
        """The inverse of :meth:`plain`."""
        name, keys, position, has_gauss, cached = state["numpy"]
        version, words, gauss = state["python"]
        cuda = state.get("cuda")
        return cls(
            state["torch"].cpu(),
            (name, keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached),
            (version, tuple(words.tolist()), gauss),
            None if cuda is None else cuda.cpu(),
        )


def _seed_globals(seed: int, device: torch.device | None) -> None:
    # Not torch.manual_seed: on a machine where CUDA sleeps, it would queue a seed for later.
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    generator = _cuda_generator(device)
    if generator is not None:
        generator.manual_seed(seed)


class RandomStream:
    """The random state of one computation, swapped in while entered.

    ::

        stream = RandomStream(seed=0)
        with stream:
            a = torch.randn(3)
        with stream:                # goes on where it stopped
            b = torch.randn(3)

    The numbers are those that follow ``pyro.set_rng_seed(seed)``. Streams may be nested; one
    stream may not be entered twice at once.

    :param seed: an integer in [0, 2^63); None draws a fresh one, to be read from ``stream.seed``.
    :param device: the device whose CUDA generator belongs to the stream; None means the current
        CUDA device if CUDA is in use.
    """

    def __init__(self, seed: int | None = None, device: torch.device | None = None) -> None:
        self.seed = checked_seed(seed)
        self.device = device
        self._outside: Generators | None = None
        outside = Generators.read(device)
        _seed_globals(self.seed, device)
        self._state = Generators.read(device)
        outside.write(device)

    def __enter__(self) -> Self:
        if self._outside is not None:
            raise RuntimeError("this RandomStream is already entered")
        self._outside = Generators.read(self.device)
        self._state.write(self.device)
        return self

    def __exit__(self, *error: object) -> None:
        assert self._outside is not None
        self._state = Generators.read(self.device)
        self._outside.write(self.device)
        self._outside = None

    def state_dict(self) -> RandomState:
        """The state as plain tensors and numbers, whether the stream is entered or not."""
        inside = self._outside is not None
        return (Generators.read(self.device) if inside else self._state).plain()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that :meth:`state_dict` returned."""
        self._state = Generators.from_plain(state)
        if self._outside is not None:
            self._state.write(self.device)


def checked_seed(seed: int | None) -> int:
    """``seed`` itself, or a fresh one for None."""
    if seed is None:
        return fresh_seed()
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise ProgramError(f"seed must be None or an integer in [0, 2^63), but is {seed!r}")
    return int(seed)


@contextmanager
def seeded(seed: int | None = None, device: torch.device | None = None) -> Iterator[int]:
    """Run a block at ``seed`` and restore the global generators afterwards; yields the seed.

    :param seed: as in :class:`RandomStream`; None draws a fresh seed.
    """
    seed = checked_seed(seed)
    outside = Generators.read(device)  # read once and written once: passes of a few ms do this
    try:
        _seed_globals(seed, device)
        yield seed
    finally:
        outside.write(device)

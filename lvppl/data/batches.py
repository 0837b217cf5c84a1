"""Random minibatches of indices, drawn on the device that holds the data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lvppl.errors import ProgramError

__all__ = ["Minibatches"]


class Minibatches:
    """Index tensors that visit every datum once an epoch, in an order drawn afresh for each epoch.

    ``for index in minibatches`` runs through one epoch; iterating again draws the next
    permutation. The last batch holds what is left over, ``num_data mod batch_size`` data, and is
    never dropped. Every datum is equally likely to be in any one batch, so with the plate scale
    ``num_data / len(index)`` the ELBO of a batch is an unbiased estimate of the full one.

    Nothing is read back to the host: the permutation is drawn on ``device`` and split into views,
    whose sizes are known without looking.

    :param int num_data: number of data, at least 1.
    :param int batch_size: data in a batch; ``None``, or more than ``num_data``, for one full batch.
    :param torch.Generator generator: source of the permutations; ``None`` for torch's own. Saving
        and restoring its state between epochs continues the sequence of permutations exactly.
    :param device: where the indices are; the generator's device, or else torch's default.
    :param bool shuffle: ``False`` keeps the data's order, for evaluation.
    :raises ProgramError: on sizes below 1, or a generator that is on another device.
    """

    def __init__(
        self,
        num_data: int,
        batch_size: int | None = None,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        shuffle: bool = True,
    ) -> None:
        self.num_data = _at_least_one("num_data", num_data)
        size = num_data if batch_size is None else _at_least_one("batch_size", batch_size)
        self.batch_size = min(size, num_data)
        self.generator = generator
        self.device = _resolve_device(device, generator)
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Number of batches in an epoch, the partial one included."""
        return -(-self.num_data // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """The batches of one epoch: int64 tensors of shape (batch,)."""
        if self.shuffle:
            order = torch.randperm(self.num_data, generator=self.generator, device=self.device)
        else:
            order = torch.arange(self.num_data, device=self.device)
        return iter(order.split(self.batch_size))

    def __repr__(self) -> str:
        return (
            f"Minibatches(num_data={self.num_data}, batch_size={self.batch_size}, "
            f"device={str(self.device)!r}, shuffle={self.shuffle})"
        )


def _at_least_one(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ProgramError(f"{name} must be a whole number of at least 1, but is {value!r}.")
    return value


def _resolve_device(
    device: torch.device | str | None, generator: torch.Generator | None
) -> torch.device:
    if device is None:
        return generator.device if generator is not None else torch.empty(0).device
    device = torch.device(device)
    if generator is not None and generator.device.type != device.type:
        raise ProgramError(
            f"The generator is on {generator.device}, but the indices are wanted on {device}: "
            f"create it with torch.Generator(device={str(device)!r})."
        )
    return device

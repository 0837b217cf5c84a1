"""The records that data sets come in: images, tables, and a split in two."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lvppl.errors import ProgramError

__all__ = ["Binarize", "Images", "Split", "Table"]

Binarize = Literal["dynamic", "static"] | None


@dataclass(frozen=True, eq=False)
class Images:
    """Images with intensities in [0, 1], and what is known of them.

    Dynamic binarization draws the pixels of an image afresh each time the image is visited, so once
    an epoch, on the device. A fit does so through :attr:`transform`, and your own loop through
    :meth:`epoch`; both leave every other data set as it is::

        data = lvppl.data.mnist(binarize="dynamic")
        lvppl.SVI(model, guide).fit(data.images, transform=data.transform, batch_size=128, ...)

        for _ in range(num_epochs):
            y = data.epoch(generator)  # (data, height, width), zeros and ones

    :ivar Tensor images: floating, (data, height, width), or (data, 3, height, width) in colour.
    :ivar Tensor labels: int64 (data,), or ``None``.
    :ivar int levels: number of grey levels of the originals, ``images = level / (levels - 1)``; or
        ``None`` where there is no grid. What a discretised likelihood needs.
    :ivar binarize: ``"dynamic"``: Bernoulli pixels drawn afresh in each epoch; ``"static"``:
        :attr:`images` are 0/1 already, drawn once; ``None``: intensities are the data.
    :ivar str source: where they come from.
    """

    images: Tensor
    labels: Tensor | None = None
    levels: int | None = None
    binarize: Binarize = None
    source: str = ""

    def __post_init__(self) -> None:
        require_binarize(self.binarize)
        if not self.images.is_floating_point() or self.images.dim() not in (3, 4):
            raise ProgramError(
                "Images must be floating, (data, height, width) or (data, 3, height, width), but "
                f"are {self.images.dtype} of shape {tuple(self.images.shape)}."
            )
        inside = (self.images >= 0) & (self.images <= 1)  # NaN is outside as well
        if not bool(inside.all()):
            first = tuple(torch.nonzero(~inside)[0].tolist())
            raise ProgramError(
                f"Image intensities must lie in [0, 1], but image {first[0]} has "
                f"{float(self.images[first])} at {first[1:]}: divide by the largest level."
            )
        if self.labels is not None and self.labels.shape != self.images.shape[:1]:
            raise ProgramError(
                f"There are {len(self)} images, but labels of shape {tuple(self.labels.shape)}."
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def transform(self) -> Callable[[tuple[Any, ...]], tuple[Any, ...]] | None:
        """What a fit applies to each minibatch of :attr:`images`; ``None`` where nothing is drawn.

        It draws from torch's own generator, which a fit seeds, on the device of the batch.
        """
        return binarize_batch if self.binarize == "dynamic" else None

    def epoch(self, generator: torch.Generator | None = None) -> Tensor:
        """The data of one epoch, like :attr:`images`.

        With ``binarize="dynamic"`` a fresh :meth:`binarized` draw; otherwise :attr:`images`.

        :param torch.Generator generator: on the images' device; ``None`` for torch's own.
        """
        return self.binarized(generator) if self.binarize == "dynamic" else self.images

    def binarized(self, generator: torch.Generator | None = None) -> Tensor:
        """A draw y ~ Bernoulli(intensity), independent for every pixel, on the images' device.

        :returns: zeros and ones, of the shape and dtype of :attr:`images`.
        :raises ProgramError: if the generator is on another device.
        """
        if generator is not None and generator.device.type != self.images.device.type:
            raise ProgramError(
                f"The images are on {self.images.device}, the generator is on {generator.device}: "
                f"create it with torch.Generator(device={str(self.images.device)!r})."
            )
        return torch.bernoulli(self.images, generator=generator)

    def grey(self) -> Tensor:
        """The levels 0 .. levels - 1 of every pixel, int64, of the shape of :attr:`images`.

        :raises ProgramError: if the images have no grid of levels.
        """
        if self.levels is None:
            raise ProgramError("These images have no grid of levels: pass levels= to Images(...).")
        return (self.images * (self.levels - 1)).round().long()

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Images:
        """The same on another device, or of another floating dtype."""
        labels = None if self.labels is None else self.labels.to(device)
        return dataclasses.replace(self, images=self.images.to(device, dtype), labels=labels)

    def __getitem__(self, index: slice | Tensor) -> Images:
        """Some of the images: a slice, or a tensor of indices."""
        if not isinstance(index, slice | Tensor):
            raise ProgramError(f"Images take a slice or a tensor of indices, not {index!r}.")
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, images=self.images[index], labels=labels)


@dataclass(frozen=True)
class Split:
    """Data to fit, and data that were held out of every choice."""

    train: Images
    test: Images


@dataclass(frozen=True, eq=False)
class Table:
    """Named columns of numbers.

    :ivar Tensor values: floating, (data, columns).
    :ivar tuple columns: their names, in order.
    :ivar Tensor labels: int64 (data,), index into :attr:`label_names`; or ``None``.
    :ivar tuple label_names: names of the classes.
    :ivar str source: where it comes from.
    """

    values: Tensor
    columns: tuple[str, ...]
    labels: Tensor | None = None
    label_names: tuple[str, ...] = ()
    source: str = ""

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.values)

    def column(self, name: str) -> Tensor:
        """One column, (data,).

        :raises ProgramError: if there is none of that name.
        """
        if name not in self.columns:
            raise ProgramError(f"No column {name!r}: there are {', '.join(self.columns)}.")
        return self.values[:, self.columns.index(name)]


def binarize_batch(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same arguments, with y ~ Bernoulli(intensity) for the first of them, intensities."""
    intensities, *others = batch
    return (torch.bernoulli(intensities), *others)


def require_binarize(binarize: object) -> None:
    """Refuse anything but ``"dynamic"``, ``"static"`` and ``None``."""
    if binarize not in ("dynamic", "static", None):
        raise ProgramError(
            f"binarize must be 'dynamic' (fresh Bernoulli pixels in each epoch), 'static' (drawn "
            f"once) or None (intensities), but is {binarize!r}."
        )

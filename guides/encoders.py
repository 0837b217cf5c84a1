"""Encoder networks: from a datum to the parameters of q(z | x).

An encoder is made by ``encoder(x_shape, output_dim)`` and maps (…, *x_shape) to (…, output_dim).
Data of any dtype (8-bit levels, say) are converted to that of the network's parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

__all__ = ["ConvEncoder", "DenseEncoder"]


class DenseEncoder(nn.Module):
    """A multilayer perceptron on the flattened datum.

    :param x_shape: shape of one datum. :param output_dim: dimension of the output.
    :param hidden_dims: widths of the hidden layers.
    :param input_scale: x is divided by it on entry; choose the order of magnitude of the data
        (16 for the levels 0 … 16 of the digits).
    :param activation: called without arguments; returns what follows a hidden layer.
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        output_dim: int,
        *,
        hidden_dims: Sequence[int] = (200, 200),
        input_scale: float = 1.0,
        activation: Callable[[], nn.Module] = nn.SiLU,
    ) -> None:
        super().__init__()
        self.event_dim, self.input_scale = len(x_shape), input_scale
        widths = [math.prod(x_shape), *hidden_dims]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [nn.Linear(width_in, width_out), activation()]
        self.output = nn.Linear(widths[-1], output_dim)
        self.network = nn.Sequential(*layers, self.output)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.output.weight.dtype) / self.input_scale
        return self.network(x.flatten(-self.event_dim))


class ConvEncoder(nn.Module):
    """Two strided convolutions, each halving the grid, and a dense layer.

    :param x_shape: (height, width) or (colours, height, width), divisible by four.
    :param output_dim: dimension of the output.
    :param channels: of the half and the quarter-size grid.
    :param input_scale: x is divided by it on entry.
    :raises ValueError: for another shape.
    """

    def __init__(
        self,
        x_shape: Sequence[int],
        output_dim: int,
        *,
        channels: tuple[int, int] = (32, 64),
        input_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if len(x_shape) not in (2, 3) or x_shape[-2] % 4 or x_shape[-1] % 4:
            raise ValueError(
                "ConvEncoder reads images, (height, width) or (colours, height, width), with "
                f"height and width divisible by four, but x_shape is {tuple(x_shape)}."
            )
        *planes, height, width = x_shape
        self.event_dim, self.input_scale = len(x_shape), input_scale
        self.image_shape = (math.prod(planes), height, width)
        half, quarter = channels
        self.output = nn.Linear(quarter * (height // 4) * (width // 4), output_dim)
        self.network = nn.Sequential(
            nn.Conv2d(self.image_shape[0], half, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(half, quarter, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            self.output,
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.output.weight.dtype) / self.input_scale
        # convolutions take one leading dimension: flatten any others, and restore them
        output = self.network(x.reshape(-1, *self.image_shape))
        return output.reshape(*x.shape[: x.dim() - self.event_dim], -1)

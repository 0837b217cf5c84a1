r"""Autoregressive networks: p(y) without latents, as a product of conditionals.

.. math:: p(y | x) = \prod_{i=1}^D p(y_{o(i)} | y_{o(1)}, …, y_{o(i-1)}, x)

One pass through a network whose weights are masked gives all D conditionals, so that ln p(y) is
exact and cheap; a draw takes D passes. With ``num_inputs`` the programs are p(y | x), called as
``model(y, x)``.

>>> binary = MADE(y_shape=(784,), hidden_dims=(500, 500))
>>> digits = MADE(y_shape=(8, 8), likelihood=BetaBinomialLikelihood, input_scale=16)
>>> images = PixelCNN(y_shape=(28, 28), num_inputs=10)  # given a class, one-hot
>>> images.distribution(x).sample()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from lvppl.distributions.autoregressive import Autoregressive

from .vae import BernoulliLikelihood

__all__ = ["MADE", "PixelCNN"]


class _Program(PyroModule):
    """The program of a network (y, x) → (…, num_parameters, \\*y_shape)."""

    def __init__(
        self,
        name: str,
        y_shape: Sequence[int],
        likelihood: Callable[..., nn.Module] | None,
        num_inputs: int,
    ) -> None:
        super().__init__(name)
        self.num_inputs, self.order = num_inputs, tuple(range(math.prod(y_shape)))
        self.likelihood = (likelihood or BernoulliLikelihood)(y_shape)
        self.register_buffer("blank", torch.zeros(tuple(y_shape)))

    def distribution(self, x: Tensor | None = None) -> Autoregressive:
        """p(y), or p(y | x) for x (…, num_inputs), batch shape (…).

        :raises ValueError: for x of another size, or none where one is needed.
        """
        self._check(x)
        leading = () if x is None else x.shape[:-1]
        blank = self.blank.expand(*leading, *self.blank.shape)
        # named here, while the program runs, so that Pyro sees their parameters
        network, likelihood = self.network, self.likelihood

        def conditionals(y: Tensor) -> dist.TorchDistribution:
            return likelihood(network(y, x))

        return Autoregressive(conditionals, blank, self.blank.dim(), order=self.order)

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        with pyro.plate("data", len(y)):
            return pyro.sample("y", self.distribution(x), obs=y)

    def log_evidence(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        """ln p(y_n), or ln p(y_n | x_n), shape (data,), in nats."""
        return self.distribution(x).log_prob(y)

    def _check(self, x: Tensor | None) -> None:
        came = 0 if x is None else x.shape[-1]
        if came != self.num_inputs:
            wanted = f"x of shape (data, {self.num_inputs})" if self.num_inputs else "no x"
            got = "none came" if x is None else f"x of shape {tuple(x.shape)} came"
            raise ValueError(
                f"This model, with num_inputs={self.num_inputs}, takes {wanted}: {got}."
            )


class MADE(_Program):
    r"""A masked dense network: an autoencoder whose i-th output sees the inputs before it alone.

    Every unit has a degree m: an input its place in the order, 1 … D; a hidden unit a number from 1
    to D − 1, how many of the first inputs it may see. A weight is kept where

    .. math::

        m(\text{hidden}) \ge m(\text{unit below}), \qquad m(\text{output}) > m(\text{unit below})

    so that no path leads from an input to an output at its place or before. Degrees are spread
    evenly over each hidden layer, where the paper draws them at random. Inputs x have degree 0:
    everything sees them.

    :param y_shape: shape of one datum, D elements.
    :param hidden_dims: widths of the hidden layers, of rectified linear units.
    :param order: o, a permutation of 0 … D − 1, by default 0, 1, …, row by row.
    :param num_inputs: dimension of x; 0 for p(y).
    :param direct: connect inputs and outputs directly as well.
    :param likelihood: called as ``likelihood(y_shape)``: one of those of :class:`VAE`; its
        parameters, which may be several for each element, are what the network computes.
    :param input_scale: y is divided by it on entry.
    :raises ValueError: for an order that is no permutation, or x that does not fit.

    Source: Germain, Gregor, Murray, Larochelle (2015), "MADE: masked autoencoder for distribution
    estimation", sections 3 and 4.
    """

    def __init__(
        self,
        *,
        y_shape: Sequence[int] = (64,),
        hidden_dims: Sequence[int] = (500,),
        order: Sequence[int] | None = None,
        num_inputs: int = 0,
        direct: bool = False,
        likelihood: Callable[..., nn.Module] | None = None,
        input_scale: float = 1.0,
    ) -> None:
        super().__init__("made", y_shape, likelihood, num_inputs)
        if order is not None:
            if sorted(int(i) for i in order) != list(self.order):
                raise ValueError(f"order must hold each of 0 ... {len(self.order) - 1} once.")
            self.order = tuple(int(i) for i in order)
        self.network = MaskedDense(
            self.order,
            (self.likelihood.num_parameters, *y_shape),
            hidden_dims=hidden_dims,
            num_inputs=num_inputs,
            direct=direct,
            input_scale=input_scale,
        )


class PixelCNN(_Program):
    r"""A gated PixelCNN: masked convolutions, pixels in the order of reading.

    Each layer has two stacks. At pixel (r, c) the vertical one sees the rows above r, the
    horizontal one these and, in row r, what lies left of c; together there is no blind spot. Both
    are gated, conditioned on x, and the horizontal one is residual:

    .. math::

        v' &= g(W_v * v + V_v x), \qquad g(a, b) = \tanh(a) ⊙ σ(b) \\
        h' &= h + U g(W_h * h + U_v (W_v * v) + V_h x)

    where the kernel W_v reaches up to the row itself, W_h up to the pixel itself; in the first
    layer, which reads y, both end before it, and nothing is added to h.

    :param y_shape: (height, width), or (1, height, width).
    :param channels: of each stack. :param num_layers: how many, the first included.
    :param kernel_size: an odd number of pixels, height and width of the whole kernel.
    :param num_inputs: dimension of x, which is the same at every pixel; 0 for p(y).
    :param likelihood: called as ``likelihood(y_shape)``: one of those of :class:`VAE`.
    :param input_scale: y is divided by it on entry.
    :raises ValueError: for another y_shape, an even kernel, or x that does not fit.

    Source: van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu (2016), "Conditional
    image generation with PixelCNN decoders", sections 2.1 to 2.3 and figure 2.
    """

    def __init__(
        self,
        *,
        y_shape: Sequence[int] = (8, 8),
        channels: int = 32,
        num_layers: int = 6,
        kernel_size: int = 5,
        num_inputs: int = 0,
        likelihood: Callable[..., nn.Module] | None = None,
        input_scale: float = 1.0,
    ) -> None:
        super().__init__("pixel_cnn", y_shape, likelihood, num_inputs)
        self.network = GatedConvolutions(
            (self.likelihood.num_parameters, *y_shape),
            channels=channels,
            num_layers=num_layers,
            kernel_size=kernel_size,
            num_inputs=num_inputs,
            input_scale=input_scale,
        )


# Networks: y (…, *y_shape) and x (…, num_inputs) or None -> (…, num_parameters, *y_shape).


class MaskedLinear(nn.Linear):
    """A linear map that is kept where ``mask`` (outputs, inputs) is true."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape[1], mask.shape[0])
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


class MaskedDense(nn.Module):
    """The network of :class:`MADE`; ``output_shape`` is (num_parameters, \\*y_shape)."""

    def __init__(
        self,
        order: Sequence[int],
        output_shape: Sequence[int],
        *,
        hidden_dims: Sequence[int] = (500,),
        num_inputs: int = 0,
        direct: bool = False,
        input_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.output_shape, self.event_dim = tuple(output_shape), len(output_shape) - 1
        self.input_scale = input_scale
        D = len(order)
        place = torch.empty(D)
        place[list(order)] = torch.arange(1.0, D + 1)
        lowest = 0 if num_inputs or D == 1 else 1
        inputs = torch.cat([torch.zeros(num_inputs), place])
        outputs = place.repeat(self.output_shape[0])
        hidden = [torch.linspace(lowest, D - 1, width).round() for width in hidden_dims]
        layers: list[nn.Module] = []
        for below, above in pairwise([inputs, *hidden]):
            layers += [MaskedLinear(above[:, None] >= below), nn.ReLU()]
        self.hidden = nn.Sequential(*layers)
        below = hidden[-1] if hidden else inputs
        self.output = MaskedLinear(outputs[:, None] > below)
        self.direct = MaskedLinear(outputs[:, None] > inputs) if direct else None

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        units = y.flatten(-self.event_dim).to(self.output.weight.dtype) / self.input_scale
        if x is not None:
            leading = torch.broadcast_shapes(x.shape[:-1], units.shape[:-1])
            units = torch.cat([x.expand(*leading, -1), units.expand(*leading, -1)], -1)
        parameters = self.output(self.hidden(units))
        if self.direct is not None:
            parameters = parameters + self.direct(units)
        return parameters.unflatten(-1, self.output_shape)


class MaskedConv2d(nn.Conv2d):
    """A convolution onto the same grid whose kernel is kept where ``mask`` (rows, columns) is 1."""

    def __init__(self, channels_in: int, channels_out: int, mask: Tensor) -> None:
        rows, columns = mask.shape
        padding = (rows // 2, columns // 2)
        super().__init__(channels_in, channels_out, (rows, columns), padding=padding)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight * self.mask, self.bias)


class GatedLayer(nn.Module):
    """One layer of both stacks: v sees the rows above, h these and what lies to the left."""

    def __init__(
        self, channels_in: int, channels: int, kernel_size: int, num_inputs: int, *, first: bool
    ) -> None:
        super().__init__()
        self.first = first
        seen = (torch.arange(kernel_size) < kernel_size // 2 + (0 if first else 1)).float()
        rows_above, columns_left = seen[:, None].repeat(1, kernel_size), seen[None]
        self.vertical = MaskedConv2d(channels_in, 2 * channels, rows_above)
        self.horizontal = MaskedConv2d(channels_in, 2 * channels, columns_left)
        self.across = nn.Conv2d(2 * channels, 2 * channels, 1)
        self.output = nn.Conv2d(channels, channels, 1)
        self.inputs = nn.Linear(num_inputs, 4 * channels, bias=False) if num_inputs else None

    def forward(self, v: Tensor, h: Tensor, x: Tensor | None) -> tuple[Tensor, Tensor]:
        above = self.vertical(v)
        left = self.horizontal(h) + self.across(above)
        if self.inputs is not None:
            to_v, to_h = self.inputs(x)[..., None, None].chunk(2, 1)
            above, left = above + to_v, left + to_h
        new = self.output(_gate(left))
        return _gate(above), new if self.first else h + new


def _gate(features: Tensor) -> Tensor:
    a, b = features.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


class GatedConvolutions(nn.Module):
    """The network of :class:`PixelCNN`; ``output_shape`` is (num_parameters, \\*y_shape)."""

    def __init__(
        self,
        output_shape: Sequence[int],
        *,
        channels: int = 32,
        num_layers: int = 6,
        kernel_size: int = 5,
        num_inputs: int = 0,
        input_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if tuple(output_shape[1:-2]) not in ((), (1,)) or len(output_shape) < 3:
            raise ValueError(
                "PixelCNN takes images of one plane, (height, width) or (1, height, width), but "
                f"y_shape is {tuple(output_shape[1:])}."
            )
        if kernel_size % 2 == 0 or kernel_size < 3 or num_layers < 1:
            raise ValueError(
                "PixelCNN needs an odd kernel_size of at least 3 and at least one layer, but has "
                f"kernel_size={kernel_size}, num_layers={num_layers}."
            )
        self.output_shape, self.input_scale = tuple(output_shape), input_scale
        self.grid = (1, *output_shape[-2:])
        self.layers = nn.ModuleList(
            GatedLayer(channels if i else 1, channels, kernel_size, num_inputs, first=i == 0)
            for i in range(num_layers)
        )
        self.output = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(),
            nn.Conv2d(channels, output_shape[0], 1),
        )

    def forward(self, y: Tensor, x: Tensor | None = None) -> Tensor:
        leading = y.shape[: y.dim() - len(self.output_shape) + 1]
        y = y.to(self.output[1].weight.dtype) / self.input_scale
        if x is not None:
            leading = torch.broadcast_shapes(leading, x.shape[:-1])
            y = y.expand(*leading, *self.output_shape[1:])
            x = x.expand(*leading, -1).reshape(-1, x.shape[-1])
        # convolutions take one leading dimension: flatten any others, and restore them
        v = h = y.reshape(-1, *self.grid)
        for layer in self.layers:
            v, h = layer(v, h, x)
        return self.output(h).reshape(*leading, *self.output_shape)

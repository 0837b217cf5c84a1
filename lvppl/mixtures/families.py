"""Sufficient statistics of Gaussian families: the rows of Phi, and the way back to moments."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

__all__ = ["FAMILIES", "Family"]


class Family(ABC):
    """One family's sufficient statistics: rows of second order, then y, then 1."""

    def __init__(self, dim: int) -> None:
        self.dim = dim

    @property
    @abstractmethod
    def order_two(self) -> int:
        """How many rows of second order there are."""

    @abstractmethod
    def square(self, y: Tensor, rows: Tensor) -> None:
        """Write the rows of second order of y (D, n)."""

    @abstractmethod
    def natural(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Coefficients (K, F) of ln N in these rows."""

    @abstractmethod
    def central(self, raw: Tensor, first: Tensor, counts: Tensor, loc: Tensor) -> Tensor:
        """Second moments about loc, from those about the origin and the first moments about loc."""

    def fill(self, y: Tensor, rows: Tensor) -> None:
        """Write the rows of y (D, n), all but the last, which is always one."""
        self.square(y, rows[: self.order_two])
        rows[self.order_two : -1] = y

    def coefficients(self, square: Tensor, linear: Tensor, loc: Tensor, log_det: Tensor) -> Tensor:
        """Rows of Q: at y = mu, ln N is -D/2 ln 2 pi - ln det L."""
        constant = -0.5 * (linear * loc).sum(-1) - log_det - 0.5 * self.dim * math.log(2 * math.pi)
        return torch.cat([square, linear, constant[:, None]], -1)


class Products(Family):
    """y_i y_j for i <= j: full covariances."""

    @property
    def order_two(self) -> int:
        return self.dim * (self.dim + 1) // 2

    def square(self, y: Tensor, rows: Tensor) -> None:
        start = 0
        for i in range(self.dim):
            torch.mul(y[i], y[i:], out=rows[start : start + self.dim - i])
            start += self.dim - i

    def natural(self, loc: Tensor, scale: Tensor) -> Tensor:
        precision = torch.cholesky_inverse(scale)
        i, j = self._pairs(loc.device)
        square = -precision[:, i, j] * torch.where(i == j, 0.5, 1.0)
        linear = (precision @ loc[..., None])[..., 0]
        log_det = scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return self.coefficients(square, linear, loc, log_det)

    def central(self, raw: Tensor, first: Tensor, counts: Tensor, loc: Tensor) -> Tensor:
        i, j = self._pairs(loc.device)
        moments = raw.new_empty(*loc.shape, self.dim)
        moments[:, i, j] = moments[:, j, i] = raw
        cross = first[:, :, None] * loc[:, None, :]
        return (
            moments - cross - cross.mT - counts[:, None, None] * loc[:, :, None] * loc[:, None, :]
        )

    def _pairs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        i, j = torch.triu_indices(self.dim, self.dim, device=device)
        return i, j


class Squares(Family):
    """y_i^2: diagonal covariances."""

    @property
    def order_two(self) -> int:
        return self.dim

    def square(self, y: Tensor, rows: Tensor) -> None:
        torch.mul(y, y, out=rows)

    def natural(self, loc: Tensor, scale: Tensor) -> Tensor:
        precision = scale**-2
        return self.coefficients(-0.5 * precision, precision * loc, loc, scale.log().sum(-1))

    def central(self, raw: Tensor, first: Tensor, counts: Tensor, loc: Tensor) -> Tensor:
        return raw - 2 * first * loc - counts[:, None] * loc**2


class Norm(Family):
    """|y|^2: spherical covariances."""

    @property
    def order_two(self) -> int:
        return 1

    def square(self, y: Tensor, rows: Tensor) -> None:
        torch.sum(y * y, 0, keepdim=True, out=rows)

    def natural(self, loc: Tensor, scale: Tensor) -> Tensor:
        precision = (scale**-2).expand(len(loc))[:, None]
        log_det = self.dim * scale.log().expand(len(loc))
        return self.coefficients(-0.5 * precision, precision * loc, loc, log_det)

    def central(self, raw: Tensor, first: Tensor, counts: Tensor, loc: Tensor) -> Tensor:
        return raw[:, 0] - 2 * (first * loc).sum(-1) - counts * loc.square().sum(-1)


FAMILIES: dict[str, type[Family]] = {
    "full": Products,
    "tied": Norm,  # of the whitened data
    "diag": Squares,
    "spherical": Norm,
    "unit": Norm,
}

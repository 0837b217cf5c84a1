"""A program run with its Gaussian latents at given values, and what its Normal sites are there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as td

from lvppl.conjugate import centre_and_spread
from lvppl.observed_part import GaussianPart

__all__ = ["Frame", "Law", "Placed", "gaussian_law"]


class Frame(NamedTuple):
    """u = centre + unit · x, element by element: x is of order one under the prior."""

    centre: Tensor
    """(*batch, *event) of the latent, enumerated dimensions left out."""
    unit: Tensor


class Placed(Messenger):
    """Gives every latent whose prior is Normal a value: the centre of its frame, then any other.

    The first run makes the frames: the mean and the spread of each prior, given the centres of the
    latents before it.

    Args:
        nesting: batch dimensions of plates; enumerated ones lie to their left.
    """

    def __init__(self, nesting: int) -> None:
        super().__init__()
        self.nesting = nesting
        self.frames: dict[str, Frame] = {}
        self.values: dict[str, Tensor] = {}
        self.subsamples: dict[str, Tensor] = {}
        """Indices of subsampled plates, which all runs share."""

    def at(self, values: Mapping[str, Tensor]) -> Placed:
        """The same with other values."""
        other = Placed(self.nesting)
        other.frames, other.values = self.frames, dict(values)
        other.subsamples = self.subsamples
        return other

    def _pyro_post_sample(self, msg: Any) -> None:
        if type(msg["fn"]).__name__ == "_Subsample":
            self.subsamples.setdefault(msg["name"], msg["value"])

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.subsamples:
            msg["value"] = self.subsamples[msg["name"]]
            return
        if msg["is_observed"] or msg["value"] is not None or gaussian_law(msg["fn"]) is None:
            return
        name = msg["name"]
        if name not in self.frames:
            self.frames[name] = self._frame(msg["fn"])
        if name not in self.values:
            self.values[name] = self.frames[name].centre.clone().requires_grad_()
        msg["value"] = self.values[name]

    def _frame(self, fn: Any) -> Frame:
        with torch.no_grad():
            law = gaussian_law(fn)
            assert law is not None
            shape = fn.batch_shape[-self.nesting :] if self.nesting else ()
            mean, variance = (
                v.detach()
                .expand(fn.batch_shape + fn.event_shape)
                .reshape(-1, *shape, *fn.event_shape)
                for v in (law.normal.mean, law.normal.variance)
            )
            return Frame(*centre_and_spread(mean, variance))


# ------------------------------------------------------------------------------- the law of a site


class Law(NamedTuple):
    """A Normal or MultivariateNormal inside a distribution, and what hides elements of it."""

    normal: Any
    depth: int
    """Batch dimensions of ``normal`` that ``.to_event`` declared an event."""
    mask: Tensor | None
    """Over the batch of ``normal``."""
    absent: Tensor | None = None
    """Missing elements of its events, (*batch, *event): independent of the others, and 0."""

    @property
    def location(self) -> Tensor:
        """(*batch, *event) of ``normal``."""
        loc: Tensor = self.normal.loc
        return loc.expand(self.normal.batch_shape + self.normal.event_shape)

    @property
    def rows(self) -> int:
        """Dimensions of a residual that are not batch dimensions of the site."""
        return self.depth + len(self.normal.event_shape)

    @property
    def spread(self) -> Tensor:
        """What whitens residuals: scale, or the Cholesky factor of the covariance."""
        if isinstance(self.normal, td.Normal):
            scale: Tensor = self.normal.scale
            return scale
        if isinstance(self.normal, td.MultivariateNormal):
            return self.normal.scale_tril
        return torch.linalg.cholesky(self.normal.covariance_matrix)

    def whitened(self, residual: Tensor, spread: Tensor) -> Tensor:
        """Of unit variance, and zero where masked or absent; (*batch, *event) of ``normal``."""
        if self.absent is not None:
            residual = torch.where(self.absent, torch.zeros_like(residual), residual)
        if isinstance(self.normal, td.Normal):
            white = residual / spread
        else:
            batch = torch.broadcast_shapes(residual.shape[:-1], spread.shape[:-2])
            columns = residual.expand(*batch, residual.shape[-1])[..., None]
            whole = spread.expand(*batch, *spread.shape[-2:])
            white = torch.linalg.solve_triangular(whole, columns, upper=False)[..., 0]
        if self.mask is None:
            return white
        mask = self.mask[..., None] if self.normal.event_shape else self.mask
        return torch.where(mask, white, torch.zeros_like(white))

    def log_normaliser(self, spread: Tensor) -> Tensor:
        """ln of the density at a residual of zero, masked, batch of the site."""
        if isinstance(self.normal, td.Normal):
            size, logs = 1, spread.log()
        else:
            size, logs = spread.shape[-1], spread.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = (-0.5 * size * math.log(2 * math.pi) - logs).expand(self.normal.batch_shape)
        if self.mask is not None:
            value = torch.where(self.mask, value, torch.zeros_like(value))
        return value.sum(tuple(range(-self.depth, 0))) if self.depth else value


def gaussian_law(fn: Any) -> Law | None:
    """What is Gaussian about a distribution; ``None`` where it is none."""
    total, inside = 0, fn
    while isinstance(inside, td.Independent | MaskedDistribution):
        total += inside.reinterpreted_batch_ndims if isinstance(inside, td.Independent) else 0
        inside = inside.base_dist
    part = inside if isinstance(inside, GaussianPart) else None
    found = inside if part is None else part.part
    kinds = td.Normal | td.MultivariateNormal | td.LowRankMultivariateNormal
    if not isinstance(found, kinds):
        return None
    passed, mask = 0, None
    while fn is not inside:
        if isinstance(fn, td.Independent):
            passed += fn.reinterpreted_batch_ndims
        else:
            own = torch.as_tensor(fn._mask, device=found.loc.device)
            own = own.reshape(own.shape + (1,) * (total - passed)) if own.dim() else own
            mask = own if mask is None else mask & own
        fn = fn.base_dist
    return Law(found, total, mask, None if part is None else part.missing)

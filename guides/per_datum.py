"""Free variational parameters for every datum: search instead of an encoder."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

__all__ = ["PerDatumNormal"]


class PerDatumNormal(PyroModule):
    r"""A diagonal Normal with its own location and scale for each datum of a given batch.

    .. math:: q(z_n) = N(z_n; m_n, \operatorname{diag}(s_n²)), \qquad n = 1 … N

    It is what an encoder amortizes: optimised to the end, its ELBO is at least that of any
    diagonal encoder on these data, and the difference is the amortization gap. It knows nothing
    of any other datum, and must be called with its own batch in order, never with a minibatch.

    :param num_data: N. :param latent_dim: dimension of z. :param init_scale: initial s.
    :param site: name of the latent. :param plate: name of the data plate.

    Source: Cremer, Li, Duvenaud (2018), "Inference suboptimality in variational autoencoders".
    """

    def __init__(
        self,
        num_data: int,
        latent_dim: int,
        *,
        init_scale: float = 1.0,
        site: str = "z",
        plate: str = "data",
    ) -> None:
        super().__init__("per_datum_normal")
        self.site, self.plate = site, plate
        self.loc = PyroParam(torch.zeros(num_data, latent_dim))
        self.scale = PyroParam(torch.full((num_data, latent_dim), init_scale), constraints.positive)

    @classmethod
    def from_encoder(cls, guide: Any, x: Tensor) -> PerDatumNormal:
        """Start from the means and standard deviations that an amortized guide gives to ``x``."""
        with torch.no_grad():
            q = guide.posterior(x)
            per_datum = cls(*q.mean.shape, site=guide.site, plate=guide.plate).to(q.mean)
            per_datum.loc, per_datum.scale = q.mean.clone(), q.stddev.clone()
        return per_datum

    def posterior(self, x: Tensor) -> dist.TorchDistribution:
        """q(z), batch shape (data,).

        :raises ValueError: if ``x`` has not the number of data that this guide was made for.
        """
        loc = self.loc
        if len(x) != len(loc):
            raise ValueError(
                f"This guide holds parameters for {len(loc)} data and was called with {len(x)}: "
                "call it with the batch it was made for, or make one for this batch."
            )
        return dist.Normal(loc, self.scale).to_event(1)

    def forward(self, x: Tensor) -> Tensor:
        with pyro.plate(self.plate, len(x)):
            return pyro.sample(self.site, self.posterior(x))

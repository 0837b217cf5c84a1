"""A mean-field Gaussian guide of global latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

__all__ = ["MeanField"]


class MeanField(PyroModule):
    r"""Independent Normals, one for each element of each global latent.

    .. math:: q(z) = \prod_i N(z_i; m_i, s_i²)

    For real latents outside every plate, of the given shapes. (Local latents: ``PerDatumNormal``
    or an amortized guide. Constrained or plated ones: ``pyro.infer.autoguide.AutoNormal``.)

    :param sites: name of each latent and its event shape: ``{"mean": (), "weight": (3, 2)}``.
    :param init_scale: initial s.

    Source: Bishop (2006), "Pattern Recognition and Machine Learning", section 10.1.
    """

    def __init__(self, sites: Mapping[str, Sequence[int]], *, init_scale: float = 0.1) -> None:
        super().__init__("mean_field")
        self.sites = {name: tuple(shape) for name, shape in sites.items()}
        for name, shape in self.sites.items():
            scale = torch.full(shape, init_scale)
            setattr(self, f"{name}_loc", PyroParam(torch.zeros(shape)))
            setattr(self, f"{name}_scale", PyroParam(scale, constraints.positive))

    def posterior(self, name: str) -> dist.TorchDistribution:
        """q of one latent."""
        loc, scale = getattr(self, f"{name}_loc"), getattr(self, f"{name}_scale")
        return dist.Normal(loc, scale).to_event(loc.dim())

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return {name: pyro.sample(name, self.posterior(name)) for name in self.sites}

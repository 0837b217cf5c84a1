"""Guides q(z | x) as ordinary Pyro programs, one family a file, to be read and copied.

Each is called with the arguments of its model, ``guide(x)``, and samples the latent ``"z"``, a
vector, inside the plate ``"data"`` (both names are options). :class:`MeanField` is for global
latents. For a guide derived from any model, Pyro has ``pyro.infer.autoguide``.
"""

from .amortized import AmortizedNormal
from .bernoulli_layers import AmortizedBernoulliLayers
from .encoders import ConvEncoder, DenseEncoder
from .flow import AmortizedFlow
from .full_covariance import AmortizedMultivariateNormal
from .gaussian_layers import AmortizedGaussianLayers
from .mean_field import MeanField
from .per_datum import PerDatumNormal
from .point import AmortizedPoint, AmortizedUniformNoise

__all__ = [
    "AmortizedBernoulliLayers",
    "AmortizedFlow",
    "AmortizedGaussianLayers",
    "AmortizedMultivariateNormal",
    "AmortizedNormal",
    "AmortizedPoint",
    "AmortizedUniformNoise",
    "ConvEncoder",
    "DenseEncoder",
    "MeanField",
    "PerDatumNormal",
]

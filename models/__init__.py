"""Latent variable models as ordinary Pyro programs, one family a file, to be read and copied.

A program is called as ``model(x)``. It samples its local latents inside the plate ``"data"``, sized
from the data, and observes the data there, so it runs unchanged on a minibatch, under an outer
plate of particles, in float32 and float64 and on any device (``model.double()``,
``model.to("cuda")``).
``pyro.poutine.uncondition(model)`` samples the data as well.
"""

from .gaussian import FactorAnalysis, HierarchicalNormal, NormalNormal, ProbabilisticPCA
from .mixture import BernoulliMixture, GaussianMixture
from .vae import (
    VAE,
    BernoulliLikelihood,
    BetaBinomialLikelihood,
    ConvDecoder,
    DenseDecoder,
    DiscretizedLogisticLikelihood,
    GaussianLikelihood,
    shallow_gaussian,
)

__all__ = [
    "VAE",
    "BernoulliLikelihood",
    "BernoulliMixture",
    "BetaBinomialLikelihood",
    "ConvDecoder",
    "DenseDecoder",
    "DiscretizedLogisticLikelihood",
    "FactorAnalysis",
    "GaussianLikelihood",
    "GaussianMixture",
    "HierarchicalNormal",
    "NormalNormal",
    "ProbabilisticPCA",
    "shallow_gaussian",
]

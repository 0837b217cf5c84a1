"""Latent variable models as ordinary Pyro programs, one family a file, to be read and copied.

A program is called as ``model(x)``. It samples its local latents inside the plate ``"data"``, sized
from the data, and observes the data there, so it runs unchanged on a minibatch, under an outer
plate of particles, in float32 and float64 and on any device (``model.double()``,
``model.to("cuda")``).
``pyro.poutine.uncondition(model)`` samples the data as well.
"""

from .autoregressive import MADE, PixelCNN
from .components import (
    BernoulliComponents,
    CategoricalComponents,
    GaussianComponents,
    GaussianMixtureComponents,
    PoissonComponents,
)
from .gaussian import FactorAnalysis, HierarchicalNormal, NormalNormal, ProbabilisticPCA
from .hmm import HiddenMarkovLoop, HiddenMarkovModel, InputHiddenMarkovModel
from .iwae import GaussianLayers
from .mixture import (
    BernoulliMixture,
    GaussianMixture,
    MixtureOfExperts,
    PoissonMixture,
    StudentTMixture,
)
from .naive_bayes import NaiveBayes
from .sigmoid_belief import SigmoidBeliefNet
from .topic import LatentDirichletAllocation, ProbabilisticLSA, words_from_counts
from .vae import (
    VAE,
    BernoulliLikelihood,
    BetaBinomialLikelihood,
    ConvDecoder,
    DenseDecoder,
    DiscretizedLogisticLikelihood,
    GaussianLikelihood,
    StudentTLikelihood,
    shallow_gaussian,
)

__all__ = [
    "MADE",
    "VAE",
    "BernoulliComponents",
    "BernoulliLikelihood",
    "BernoulliMixture",
    "BetaBinomialLikelihood",
    "CategoricalComponents",
    "ConvDecoder",
    "DenseDecoder",
    "DiscretizedLogisticLikelihood",
    "FactorAnalysis",
    "GaussianComponents",
    "GaussianLayers",
    "GaussianLikelihood",
    "GaussianMixture",
    "GaussianMixtureComponents",
    "HiddenMarkovLoop",
    "HiddenMarkovModel",
    "HierarchicalNormal",
    "InputHiddenMarkovModel",
    "LatentDirichletAllocation",
    "MixtureOfExperts",
    "NaiveBayes",
    "NormalNormal",
    "PixelCNN",
    "PoissonComponents",
    "PoissonMixture",
    "ProbabilisticLSA",
    "ProbabilisticPCA",
    "SigmoidBeliefNet",
    "StudentTLikelihood",
    "StudentTMixture",
    "shallow_gaussian",
    "words_from_counts",
]

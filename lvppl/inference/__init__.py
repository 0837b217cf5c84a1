"""Algorithms: stochastic variational fits, posterior draws, estimates of ln p(y)."""

from lvppl.inference.fit import Fit, History
from lvppl.inference.likelihood import LikelihoodEstimate, log_likelihood
from lvppl.inference.minibatch import data_plates_of, scaled_minibatch
from lvppl.inference.posterior import (
    Posterior,
    Prior,
    reconstruct,
    sample_posterior,
    sample_prior,
)
from lvppl.inference.psis import psis
from lvppl.inference.svi import SVI

__all__ = [
    "SVI",
    "Fit",
    "History",
    "LikelihoodEstimate",
    "Posterior",
    "Prior",
    "data_plates_of",
    "log_likelihood",
    "psis",
    "reconstruct",
    "sample_posterior",
    "sample_prior",
    "scaled_minibatch",
]

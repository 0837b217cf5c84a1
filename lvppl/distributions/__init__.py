"""Pyro distributions that latent variable models need and Pyro lacks.

:class:`Autoregressive`
    a product of conditionals in any order, by one network: ``log_prob`` in one pass.
:class:`AutoregressivePart`
    some of its elements, given what comes before each: images with missing pixels.
:class:`DiscretizedLogistic`
    a likelihood for ordinal data on a finite grid of levels, such as the grey levels of a pixel.
:class:`Quantized`
    the discrete distribution of a continuous one rounded to a grid: ``-log P`` is a code length.
:class:`Dithered`, :class:`UniformNoise`
    its relaxation: a continuous variable with additive uniform noise, and the guide that adds it.
:class:`HiddenMarkov`
    whole sequences of a hidden Markov model, its states summed out exactly.
:func:`straight_through_round`
    rounding to the grid, with the gradient of the identity.
:class:`InverseWishart`
    the conjugate prior of a covariance matrix.

Pyro itself has the beta-binomial (:class:`pyro.distributions.BetaBinomial`).
"""

from lvppl.distributions.autoregressive import Autoregressive
from lvppl.distributions.autoregressive_part import AutoregressivePart
from lvppl.distributions.bin_mass import log_bin_mass
from lvppl.distributions.discretized_logistic import DiscretizedLogistic
from lvppl.distributions.dithered import Dithered
from lvppl.distributions.grid import FiniteGrid, Lattice
from lvppl.distributions.hidden_markov import HiddenMarkov
from lvppl.distributions.inverse_wishart import InverseWishart
from lvppl.distributions.quantized import Quantized
from lvppl.distributions.rounding import straight_through_round
from lvppl.distributions.uniform_noise import UniformNoise

__all__ = [
    "Autoregressive",
    "AutoregressivePart",
    "DiscretizedLogistic",
    "Dithered",
    "FiniteGrid",
    "HiddenMarkov",
    "InverseWishart",
    "Lattice",
    "Quantized",
    "UniformNoise",
    "log_bin_mass",
    "straight_through_round",
]

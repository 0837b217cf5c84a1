"""Gaussian latents with Normal sites affine in them, integrated out exactly.

Probabilistic PCA, factor analysers, Kalman smoothing, hierarchical and crossed effects, each alone
or conditional on discrete latents that are summed out (mixtures of factor analysers, switching
states of short sequences).
"""

from lvppl.linear_gaussian.elimination import Group, groups_of
from lvppl.linear_gaussian.placing import Placed, gaussian_law
from lvppl.linear_gaussian.recognition import recognised
from lvppl.linear_gaussian.variables import Variable

__all__ = ["Group", "Placed", "Variable", "gaussian_law", "groups_of", "recognised"]

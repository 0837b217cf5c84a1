"""ln p(y) by Monte Carlo and by exact sums, per datum, with honest error bars."""

from lvppl.inference.likelihood.comparison import LikelihoodComparison
from lvppl.inference.likelihood.estimate import LikelihoodEstimate
from lvppl.inference.likelihood.estimator import log_likelihood

__all__ = ["LikelihoodComparison", "LikelihoodEstimate", "log_likelihood"]

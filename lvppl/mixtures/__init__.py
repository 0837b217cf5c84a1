"""E-steps of Gaussian mixtures over fixed data: sums over many rows, as fast as the machine allows.

Nothing here knows programs or parameters. ``native/`` is C for the processors that most people
have, built on installation where there is a compiler; all of it has a twin in torch.
"""

from lvppl.mixtures.kernel import MixtureKernel, MixtureStatistics

__all__ = ["MixtureKernel", "MixtureStatistics"]

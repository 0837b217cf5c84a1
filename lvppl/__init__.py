"""lvppl: latent variable models in Pyro, as losses and inference routines over one identity."""

from lvppl.checks import check
from lvppl.errors import ProgramError
from lvppl.objectives import ELBO, IWAE, HardELBO, RateDistortion

__all__ = ["ELBO", "IWAE", "HardELBO", "ProgramError", "RateDistortion", "check"]

"""Looking at a fit: ArviZ exports and pictures."""

from lvppl.inspection.arviz import to_arviz
from lvppl.inspection.plots import (
    image_grid,
    latent_plane,
    likelihood_comparison,
    reconstructions,
    training_curve,
)

__all__ = [
    "image_grid",
    "latent_plane",
    "likelihood_comparison",
    "reconstructions",
    "to_arviz",
    "training_curve",
]

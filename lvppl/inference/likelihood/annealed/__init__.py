"""ln p(y) by annealed importance sampling, and bounds from both sides on simulated data.

``options.py`` how chains anneal · ``coordinates.py`` latents as unconstrained vectors and digits ·
``path.py`` the distributions between start and posterior · ``moves.py`` HMC and Gibbs ·
``pilot.py`` step sizes · ``chain.py`` forward and reverse chains · ``estimate.py`` the estimator ·
``bidirectional.py`` simulation, and the two bounds.
"""

from lvppl.inference.likelihood.annealed.bidirectional import Bidirectional, bidirectional
from lvppl.inference.likelihood.annealed.options import Annealing

__all__ = ["Annealing", "Bidirectional", "bidirectional"]

"""Sums over all joint states of a program's finite latents, where no structure makes them short.

A table of 2^30 numbers is never held: states are swept in blocks under a running log-sum-exp. Two
forms of ln p(z, y) are recognised by its values at few states and swept as matrix products:
quadratics in bits (linear-Gaussian observations), and quadratics less softplus functions (sigmoid
belief nets).
"""

from lvppl.sweep.evidence import Swept, swept_evidence
from lvppl.sweep.states import StateSpace

__all__ = ["StateSpace", "Swept", "swept_evidence"]

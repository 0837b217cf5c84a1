r"""Exact sums over chains of discrete states: forward-backward, Viterbi, sampling.

.. math::

    Z = \sum_{z_1 … z_T} π(z_1) \prod_{t=1}^{T-1} A_t(z_t, z_{t+1}) \prod_{t=1}^T b_t(z_t)

for log-factors ln π, ln A, ln b that need not be normalised; −inf forbids a state or a transition.
Every function takes

``log_initial``
    (K,) or (\*batch, K).
``log_transition``
    (K, K), rows are the previous state: the same at every step. Or (T−1, K, K) or
    (\*batch, T−1, K, K): step by step. Or (\*batch, 1, K, K): the same at every step, each sequence
    with its own.
``log_emission``
    (\*batch, T, K); the batch shapes of all broadcast.
``lengths``
    integers, (\*batch,): steps t ≥ length do not exist. Whatever is stored there plays no part, not
    even a NaN, and its marginals are zero. A sequence without any step has ln Z = 0.

How: in scaled space, the recursions of both directions are one small matrix product and one
elementwise product a step, in place, with states before sequences in memory. A long chain is cut
into blocks that run side by side from guessed boundary messages; the guess is checked against what
the neighbouring block ends with, and is refined until they agree to rounding. Scaled numbers can
underflow: they are used only where it is proven that what underflows does not matter, or that
nothing did (:mod:`lvppl.chains.safety`); everything else is done in log space.

``sums.py``        the public sums: evidence, marginals, gradient
``paths.py``       the public paths: the most probable one, and samples
``arguments.py``   what they take, checked and in one shape
``methods.py``     which algorithm
``posterior.py``   what every algorithm's outcome can be asked for
``layout.py``      scaled space: blocks of steps as columns in memory
``steps.py``       one step of both directions
``sweep.py``       all steps of all blocks
``boundaries.py``  what blocks start from
``scaled.py``      the posterior of a finished sweep
``safety.py``      whether underflow can have mattered
``log_space.py``, ``log_arithmetic.py``    log space, step by step or by a scan
``gradient.py``    ln Z as a node of autograd

Source: Rabiner (1989), "A tutorial on hidden Markov models and selected applications in speech
recognition", section III; Särkkä, García-Fernández (2021), "Temporal parallelization of Bayesian
smoothers", for the associative scan.
"""

from lvppl.chains.layout import ChainWorkspace
from lvppl.chains.paths import sample_chain, viterbi
from lvppl.chains.sums import ChainPosterior, chain_log_sum, forward_backward

__all__ = [
    "ChainPosterior",
    "ChainWorkspace",
    "chain_log_sum",
    "forward_backward",
    "sample_chain",
    "viterbi",
]

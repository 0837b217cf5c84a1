"""Sums over all paths: the evidence, its gradient and the posterior marginals."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lvppl.chains.arguments import checked_chain
from lvppl.chains.gradient import differentiable_log_sum
from lvppl.chains.layout import ChainWorkspace
from lvppl.chains.methods import find_posterior, require_method


class ChainPosterior(NamedTuple):
    """What :func:`forward_backward` returns; with K states and T steps.

    ``log_evidence``: ln Z, (\\*batch,), in nats. ``marginals``: p(z_t = k | y), (\\*batch, T, K).
    ``transitions``: expected numbers of transitions i → j. Where log_transition is the same at
    every step, summed over steps (and over the batch, where that shares it): (K, K) or
    (\\*batch, 1, K, K). Otherwise, or with ``pairwise=True``, p(z_t = i, z_{t+1} = j | y) for each
    t: (\\*batch, T−1, K, K).
    """

    log_evidence: Tensor
    marginals: Tensor
    transitions: Tensor


def forward_backward(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
    method: str = "auto",
    pairwise: bool = False,
    workspace: ChainWorkspace | None = None,
) -> ChainPosterior:
    """ln Z and the posterior marginals of states and transitions; without gradients.

    A sequence that is impossible has ln Z = −inf and marginals of zero.

    :param log_initial: ln π, see :mod:`lvppl.chains` for this and the shapes of all factors.
    :param log_transition: ln A.
    :param log_emission: ln b.
    :param lengths: numbers of steps that exist, (\\*batch,); ``None``: all.
    :param method: ``"sequential"``: step by step. ``"blocked"``: blocks of steps side by side.
        ``"associative"``: a scan of logarithmic depth in log space, which never waits for the
        device. ``"auto"``: the last on an accelerator, on a CPU one of the others by size.
    :param pairwise: ask for ``transitions`` step by step.
    :param workspace: buffers to use again; see :class:`ChainWorkspace`.
    :raises ProgramError: for shapes, dtypes, lengths or a method that do not fit.
    """
    with torch.no_grad():
        chain = checked_chain(log_initial, log_transition, log_emission, lengths)
        require_method(method)
        posterior = find_posterior(chain, method, workspace)
        shape, K = chain.batch_shape, chain.K
        if pairwise or log_transition.dim() == 3 or not chain.homogeneous:
            transitions = posterior.pairwise().reshape(*shape, chain.T - 1, K, K)
        else:
            own = log_transition.dim() > 3
            transitions = posterior.counts().reshape((*shape, 1, K, K) if own else (K, K))
        return ChainPosterior(
            posterior.log_evidence.reshape(shape),
            posterior.marginals.reshape(*shape, chain.T, K),
            transitions,
        )


def chain_log_sum(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    r"""ln Z, (\*batch,), in nats; differentiable any number of times in the three log-factors.

    .. math:: ∂ \ln Z / ∂ \ln A_t(i, j) = p(z_t = i, z_{t+1} = j | y)

    and so on: the gradient is what :func:`forward_backward` finds, at its speed, and zero where a
    sequence is impossible. Second derivatives go through a slower sum in log space; so does a call
    that is being traced into a graph. Arguments and errors are those of :func:`forward_backward`.
    """
    chain = checked_chain(log_initial, log_transition, log_emission, lengths)
    require_method(method)
    return differentiable_log_sum(chain, method).reshape(chain.batch_shape)

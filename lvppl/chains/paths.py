"""Single paths: the most probable one, and random ones from the posterior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvppl.chains.arguments import Chain, checked_chain
from lvppl.chains.log_space import first_message, log_steps
from lvppl.chains.methods import find_posterior
from lvppl.errors import ProgramError


def viterbi(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The most probable path of each sequence.

    :returns: its states, (\*batch, T), int64, and the sum of its log-factors, (\*batch,), in nats.
        Of several best predecessors the one of lowest index is taken, and so is the last state.
        Steps beyond the length, and an impossible sequence (−inf), have state 0.
    :raises ProgramError: as :func:`forward_backward`.

    Source: Viterbi (1967), "Error bounds for convolutional codes and an asymptotically optimum
    decoding algorithm".
    """
    with torch.no_grad():
        chain = checked_chain(log_initial, log_transition, log_emission, lengths)
        score, origins = first_message(chain), []
        for step in log_steps(chain):
            score, origin = (score[:, :, None] + step).max(1)
            origins.append(origin)
        log_joint, state = score.max(-1)
        states = state.new_zeros(chain.B, chain.T)
        states[:, -1] = state
        for t in range(chain.T - 2, -1, -1):
            state = origins[t].gather(-1, state[:, None]).squeeze(-1)
            states[:, t] = state
        states.masked_fill_((log_joint == -math.inf)[:, None], 0)
        if chain.lengths is not None:
            states.masked_fill_(~chain.exists(), 0)
            log_joint = log_joint.masked_fill(chain.lengths == 0, 0.0)
        return states.reshape(*chain.batch_shape, chain.T), log_joint.reshape(chain.batch_shape)


def sample_chain(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Paths from p(z | y), by forward filtering and backward sampling.

    :param num_samples: S, independent paths of each sequence.
    :param generator: of the random numbers; ``None``: torch's global one.
    :returns: (S, \*batch, T), int64; steps beyond the length have state 0.
    :raises ProgramError: as :func:`forward_backward`, and where a sequence has no possible path.

    Source: Scott (2002), "Bayesian methods for hidden Markov models", section 2.2.
    """
    with torch.no_grad():
        chain = checked_chain(log_initial, log_transition, log_emission, lengths)
        posterior = find_posterior(chain, "auto")
        if bool((posterior.log_evidence == -math.inf).any()):
            raise ProgramError(
                "sample_chain expected sequences with a possible path, but the evidence of at "
                "least one is zero: allow more states or transitions, or leave it out."
            )
        log_filtered = posterior.log_filtered()
        noise = log_filtered.new_empty(num_samples, chain.B, chain.K)
        states = noise.new_zeros(num_samples, chain.B, chain.T, dtype=torch.int64)
        state = None
        for t in range(chain.T - 1, -1, -1):
            logits = log_filtered[:, t].expand_as(noise)
            if state is not None:
                logits = logits + _log_arrival(chain, t, state)
            # argmax of p / E for exponential E: a state of probability zero is never drawn
            noise.exponential_(generator=generator).clamp_(min=torch.finfo(noise.dtype).tiny)
            state = (logits - noise.log()).argmax(-1)
            states[:, :, t] = state
        if chain.lengths is not None:
            states.masked_fill_(~chain.exists(), 0)
        return states.reshape(num_samples, *chain.batch_shape, chain.T)


def _log_arrival(chain: Chain, t: int, state: Tensor) -> Tensor:
    """ln A_t(k, state) for every k, (S, B, K); zero where step t + 1 does not exist."""
    sequences = torch.arange(chain.B, device=state.device)
    arrival = chain.transition_at(t).expand(chain.B, -1, -1)[sequences, :, state]
    if chain.lengths is None:
        return arrival
    return torch.where((chain.lengths > t + 1)[:, None], arrival, 0.0)

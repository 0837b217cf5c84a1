"""Sites whose distribution sums latents out by itself, opened up for the M-step.

A :class:`~lvppl.distributions.HiddenMarkov` holds a path of states, a ``MixtureSameFamily`` a
component. In Q each is replaced by what it is made of, weighted by the posterior of the latents
inside: for y of a hidden Markov model

=================  ============================================  =====================
``y.initial``      ln π(z_1)                                     p(z_1 | y)
``y.transition``   ln A(z_t, z_{t+1})                            p(z_t, z_{t+1} | y)
``y.emission``     ln p(y_t | z_t)                               p(z_t | y)
=================  ============================================  =====================

and for a mixture ``y.mixture`` and ``y.component``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch import distributions as td

from lvppl.chains import forward_backward, viterbi
from lvppl.distributions import HiddenMarkov
from lvppl.inference.m_step.weighted import Weighted, peel, unexpanded
from lvppl.marginalised import has_inner_latents, mixture_terms, tracked

__all__ = [
    "assigned",
    "has_inner_latents",
    "opened",
    "structure",
    "tracked",
    "vectors_inside",
]


def structure(term: Weighted) -> list[Weighted]:
    """What a site is made of, without its posterior: all weights are one."""
    if not has_inner_latents(term.fn):
        return [term]
    peeled, one = peel(term), torch.ones(())
    if isinstance(peeled.base, HiddenMarkov):
        parts = _chain_parts(term.name, peeled.base, peeled.value)
    else:
        parts = _mixture_parts(term.name, peeled.base, peeled.value)
    inner = [Weighted(name, fn, value, one) for name, fn, value in parts]
    return [leaf for part in inner for leaf in structure(part)]


def opened(term: Weighted, *, hard: bool, temperature: float) -> list[Weighted]:
    """A site as what it is made of, weighted by the posterior of the latents inside.

    Components of a mixture inside a chain are summed softly, whatever the path of the chain.
    """
    if not has_inner_latents(term.fn):
        return [term]
    peeled = peel(term)
    if isinstance(peeled.base, HiddenMarkov):
        return _open_chain(term.name, peeled.base, peeled.value, peeled.weight, hard, temperature)
    return _open_mixture(term.name, peeled.base, peeled.value, peeled.weight, hard, temperature)


def vectors_inside(term: Weighted) -> Tensor | None:
    """The observed vectors that the states of a chain explain, (..., T, features)."""
    peeled = peel(term)
    if not isinstance(peeled.base, HiddenMarkov):
        return None
    base = peeled.base.observation_dist
    value, observed = peeled.base.observations(peeled.value)
    vectors = value.double().reshape(*value.shape[: value.dim() - len(base.event_shape)], -1)
    if observed is None:
        return vectors
    return torch.where(observed[..., None], vectors, torch.nan)


def assigned(term: Weighted, q: Tensor) -> list[Weighted]:
    """A chain as what it is made of, its states independent with probabilities q (..., T, K)."""
    peeled = peel(term)
    fn = peeled.base
    assert isinstance(fn, HiddenMarkov)
    T = q.shape[-2]
    exists = q.new_ones(q.shape[:-1], dtype=torch.bool)
    if fn.lengths is not None:
        exists = torch.arange(T, device=q.device) < fn.lengths.to(q.device)[..., None]
    q = q * exists[..., None] * peeled.weight[..., None, None]
    pairs = q[..., :-1, :, None] * (q[..., 1:, None, :] * exists[..., 1:, None, None])
    if fn.transition_logits.dim() == 2:
        pairs = pairs.reshape(-1, *pairs.shape[-2:]).sum(0)
    elif fn.transition_logits.shape[-3] == 1:
        pairs = pairs.sum(-3, keepdim=True)
    _, observed = fn.observations(peeled.value)
    seen = q if observed is None else q * observed[..., None]
    weights = [
        q[..., 0, :].movedim(-1, 0),
        pairs.movedim(-1, 0),
        seen if fn.differs_by_step else seen.movedim(-2, 0),
    ]
    return [
        leaf
        for (part, base, at), w in zip(
            _chain_parts(term.name, fn, peeled.value), weights, strict=True
        )
        for leaf in opened(Weighted(part, base, at, w), hard=False, temperature=1.0)
    ]


Part = tuple[str, Any, Tensor]


def _states(count: int, fn: Any, device: torch.device) -> Tensor:
    """Every state, to the left of the batch of ``fn``."""
    return torch.arange(count, device=device).reshape((count,) + (1,) * len(fn.batch_shape))


# -------------------------------------------------------------------------------------- the chain


def _chain_parts(name: str, fn: HiddenMarkov, value: Tensor) -> list[Part]:
    initial = dist.Categorical(logits=unexpanded(fn.initial_logits, 1), validate_args=False)
    transition = dist.Categorical(logits=unexpanded(fn.transition_logits, 2), validate_args=False)
    K = fn.initial_logits.shape[-1]
    clean, _ = fn.observations(value)
    emission = clean.unsqueeze(-1 - len(fn.observation_dist.event_shape))
    if not fn.differs_by_step:  # time to the left, so that (..., K) meets (..., K)
        emission = emission.movedim(-2 - len(fn.observation_dist.event_shape), 0)
    return [
        (f"{name}.initial", initial, _states(K, initial, value.device)),
        (f"{name}.transition", transition, _states(K, transition, value.device)),
        (f"{name}.emission", fn.observation_dist, emission),
    ]


def _open_chain(
    name: str, fn: HiddenMarkov, value: Tensor, weight: Tensor, hard: bool, temperature: float
) -> list[Weighted]:
    with torch.no_grad():
        uniform = all(s == 0 or n == 1 for s, n in zip(weight.stride(), weight.shape, strict=True))
        shared = fn.transition_logits.dim() == 2
        if not hard and temperature == 1.0 and (uniform or not shared):
            _, marginals, pairs = fn.posterior(value)
        else:
            factors = [factor / temperature for factor in fn.log_factors(value)]
            if not uniform and shared:  # counts of each sequence, to be weighted
                factors[1], shared = factors[1].expand(*factors[2].shape[:-2], 1, -1, -1), False
            if hard:
                marginals, pairs = _best_path(factors, fn.lengths)
            else:
                _, marginals, pairs = forward_backward(*factors, lengths=fn.lengths)
        _, observed = fn.observations(value)
        marginals = marginals * weight[..., None, None]
        scale = weight.flatten()[0] if shared and weight.numel() else weight[..., None, None, None]
        pairs = pairs * scale
        if fn.transition_logits.dim() == 2 and pairs.dim() > 2:  # one matrix for all sequences
            pairs = pairs.reshape(-1, *pairs.shape[-2:]).sum(0)
        seen = marginals if observed is None else marginals * observed[..., None]
        weights = [
            marginals[..., 0, :].movedim(-1, 0),
            pairs.movedim(-1, 0),
            seen if fn.differs_by_step else seen.movedim(-2, 0),
        ]
    terms: list[Weighted] = []
    for (part, base, at), w in zip(_chain_parts(name, fn, value), weights, strict=True):
        terms += opened(Weighted(part, base, at, w), hard=False, temperature=1.0)
    return terms


def _best_path(factors: Sequence[Tensor], lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """The hard posterior: the states and the transitions of the best path, as indicators."""
    states, _ = viterbi(*factors, lengths=lengths)
    K, T = factors[2].shape[-1], states.shape[-1]
    at = torch.nn.functional.one_hot(states, K).to(factors[2])
    if lengths is not None:
        exists = torch.arange(T, device=states.device) < lengths.to(states.device)[..., None]
        at = at * exists[..., None]
    transition = factors[1]
    if transition.dim() == 2 or transition.shape[-3] == 1 != T - 1:
        pairs = at[..., :-1, :].mT @ at[..., 1:, :]
        if transition.dim() == 2:
            return at, pairs.reshape(-1, K, K).sum(0)
        return at, pairs.unsqueeze(-3)
    return at, at[..., :-1, :, None] * at[..., 1:, None, :]


# ------------------------------------------------------------------------------------ the mixture


def _mixture_parts(name: str, fn: td.MixtureSameFamily, value: Tensor) -> list[Part]:
    mixing, component = fn.mixture_distribution, fn.component_distribution
    J = mixing.probs.shape[-1]
    mixing = dist.Categorical(probs=unexpanded(mixing.probs, 1), validate_args=False)
    return [
        (f"{name}.mixture", mixing, _states(J, mixing, value.device)),
        (f"{name}.component", component, value.unsqueeze(-1 - len(fn.event_shape))),
    ]


def _open_mixture(
    name: str,
    fn: td.MixtureSameFamily,
    value: Tensor,
    weight: Tensor,
    hard: bool,
    temperature: float,
) -> list[Weighted]:
    with torch.no_grad():
        logs = mixture_terms(fn, value)
        if hard:
            r = torch.nn.functional.one_hot(logs.argmax(-1), logs.shape[-1]).to(logs)
        else:
            r = (logs / temperature).softmax(-1)
        w = weight[..., None] * r
    terms: list[Weighted] = []
    for (part, base, at), share in zip(
        _mixture_parts(name, fn, value), [w.movedim(-1, 0), w], strict=True
    ):
        terms += opened(Weighted(part, base, at, share), hard=False, temperature=1.0)
    return terms

"""ln Z as one node of autograd: its gradient is the posterior that was found with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lvppl.chains.arguments import Chain
from lvppl.chains.log_space import log_marginals, log_messages, log_pairwise
from lvppl.chains.methods import find_posterior, must_scan
from lvppl.chains.posterior import sum_pairs


def differentiable_log_sum(chain: Chain, method: str) -> Tensor:
    """ln Z, (B,), differentiable in the chain's three factors."""
    if _is_traced():
        return log_messages(chain, True)[-1]
    return _LogSum.apply(chain.initial, chain.transition, chain.emission, chain, method)


def _is_traced() -> bool:
    """Whether operations are being recorded: then no Python branch may look at a value."""
    depth = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    return torch.compiler.is_compiling() or depth() > 0


class _LogSum(torch.autograd.Function):
    """ln Z of a chain with one batch dimension, (B,)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, initial: Tensor, transition: Tensor, emission: Tensor, chain: Chain, method: str
    ) -> Tensor:
        posterior = find_posterior(
            replace(chain, initial=initial, transition=transition, emission=emission), method
        )
        ctx.save_for_backward(initial, transition, emission)
        ctx.lengths, ctx.batch_shape, ctx.method = chain.lengths, chain.batch_shape, method
        ctx.posterior = posterior if any(ctx.needs_input_grad) else None
        return posterior.log_evidence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = grads
        if torch.is_grad_enabled():
            initial, transition, emission = ctx.saved_tensors
            chain = Chain(initial, transition, emission, ctx.lengths, ctx.batch_shape)
            found = _differentiable_gradient(chain, weight, must_scan(chain, ctx.method))
            return (*found, None, None)
        posterior, wanted = ctx.posterior, ctx.needs_input_grad
        weighted = posterior.marginals * weight[:, None, None]
        return (
            weighted[:, 0] if wanted[0] else None,
            posterior.counts(weight) if wanted[1] else None,
            weighted if wanted[2] else None,
            None,
            None,
        )


def _differentiable_gradient(
    chain: Chain, weight: Tensor, scan: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradient as a differentiable function of the factors and of ``weight``."""
    alpha, beta, _ = log_messages(chain, scan)
    marginals = log_marginals(alpha, beta, chain) * weight[:, None, None]
    pairs = log_pairwise(alpha, beta, chain) * weight[:, None, None, None]
    return marginals[:, 0], sum_pairs(pairs, chain), marginals

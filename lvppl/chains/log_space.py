"""Sums in log space, right whatever the factors are: step by step, or by a scan."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lvppl.chains.arguments import Chain
from lvppl.chains.log_arithmetic import log_matmul, log_sum_exp, peaked, probabilities
from lvppl.chains.posterior import Posterior


class LogPosterior(Posterior):
    """Every sum a log-sum-exp: slower, and right whatever the factors are."""

    def __init__(self, chain: Chain, *, scan: bool) -> None:
        self.chain = chain
        self._alpha, self._beta, self.log_evidence = log_messages(chain, scan)
        self.marginals = log_marginals(self._alpha, self._beta, chain)

    def pairwise(self) -> Tensor:
        return log_pairwise(self._alpha, self._beta, self.chain)

    def log_filtered(self) -> Tensor:
        return self._alpha


def log_marginals(alpha: Tensor, beta: Tensor, chain: Chain) -> Tensor:
    """p(z_t | y), (B, T, K), from the messages; differentiable, as what follows."""
    marginals = probabilities(alpha + beta)
    if chain.lengths is None:
        return marginals
    return torch.where(chain.exists()[..., None], marginals, 0.0)


def log_pairwise(alpha: Tensor, beta: Tensor, chain: Chain) -> Tensor:
    """p(z_t = i, z_{t+1} = j | y), (B, T−1, K, K)."""
    logs = alpha[:, :-1, :, None] + chain.transition + (chain.emission + beta)[:, 1:, None, :]
    if chain.lengths is not None:
        logs = torch.where(chain.exists()[:, 1:, None, None], logs, -math.inf)
    return probabilities(logs.flatten(-2)).unflatten(-1, (chain.K, chain.K))


def log_messages(chain: Chain, scan: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ln α_t and ln β_t, each (B, T, K) and up to a constant, and ln Z (B,); differentiable.

    Beyond a sequence's end they stay put. The largest of every message is subtracted, so that the
    digits of long chains do not go into the constant.
    """
    alpha, beta, last, peaks = _log_scan(chain) if scan else _log_recursion(chain)
    log_evidence = (log_sum_exp(last, -1).double() + peaks).to(alpha.dtype)
    if chain.lengths is not None:
        log_evidence = torch.where(chain.lengths == 0, 0.0, log_evidence)
    return alpha, beta, log_evidence


def _log_recursion(chain: Chain) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step by step: messages, the last α, and the sum of what was subtracted from α, (B,)."""
    message, peak = peaked(first_message(chain))
    alpha, peaks = [message], peak.double()
    for step in log_steps(chain):
        message, peak = peaked(log_sum_exp(message[:, :, None] + step, 1))
        alpha.append(message)
        peaks = peaks + peak.double()
    beta = [torch.zeros_like(message)]
    for step in log_steps(chain, backward=True):
        beta.append(peaked(log_sum_exp(step + beta[-1][:, None, :], 2))[0])
    return torch.stack(alpha, 1), torch.stack(beta[::-1], 1), message, peaks[:, 0]


def _log_scan(chain: Chain) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A tree of products of neighbouring steps upwards; vectors downwards. Returns the same.

    A node's ln α comes in from its left and its ln β from its right; the left child's β is the
    right child's product times the node's, and so on.
    """
    first, peaks = peaked(first_message(chain))
    alpha, peaks = first[:, None], peaks[:, 0].double()
    beta = torch.zeros_like(alpha)
    if chain.T == 1:
        return alpha, beta, first, peaks
    levels, peak = _log_tree(_all_log_steps(chain))
    last = log_sum_exp(first[:, :, None] + levels[-1][:, 0], 1)
    for level in levels[-2::-1]:
        n = level.shape[1]
        left, right = level[:, 0 : n - 1 : 2], level[:, 1::2]
        a, b = alpha[:, : n // 2], beta[:, : n // 2]
        inner_alpha = peaked(log_sum_exp(a[..., :, None] + left, -2))[0]
        inner_beta = peaked(log_sum_exp(right + b[..., None, :], -1))[0]
        alpha = torch.cat([torch.stack([a, inner_alpha], 2).flatten(1, 2), alpha[:, n // 2 :]], 1)
        beta = torch.cat([torch.stack([inner_beta, b], 2).flatten(1, 2), beta[:, n // 2 :]], 1)
    final = peaked(log_sum_exp(alpha[:, -1, :, None] + levels[0][:, -1], -2))[0]
    initial = peaked(log_sum_exp(levels[0][:, 0] + beta[:, 0, None, :], -1))[0]
    alpha, beta = torch.cat([alpha, final[:, None]], 1), torch.cat([initial[:, None], beta], 1)
    return alpha, beta, last, peaks + peak


def _log_tree(steps: Tensor) -> tuple[list[Tensor], Tensor]:
    """Products of 1, 2, 4 … neighbours, (B, n, K, K) each, and what was subtracted, (B,)."""
    levels, peaks = [steps], torch.zeros((), dtype=torch.float64, device=steps.device)
    while (n := levels[-1].shape[1]) > 1:
        left, right = levels[-1][:, 0 : n - 1 : 2], levels[-1][:, 1::2]
        pairs, peak = peaked(log_matmul(left, right), (-2, -1))
        peaks = peaks + peak.double().sum((-3, -2, -1))
        levels.append(torch.cat([pairs, levels[-1][:, n - 1 :]], 1) if n % 2 else pairs)
    return levels, peaks


def first_message(chain: Chain) -> Tensor:
    """ln π + ln b of the first step, (B, K)."""
    first = chain.initial + chain.emission[:, 0]
    if chain.lengths is None:
        return first
    return torch.where((chain.lengths > 0)[:, None], first, 0.0)


def log_steps(chain: Chain, *, backward: bool = False) -> Iterator[Tensor]:
    """ln A_t + ln b_{t+1} for each t, (B or 1, K, K); beyond a sequence's end the identity."""
    stay = _log_identity(chain)
    for t in reversed(range(chain.T - 1)) if backward else range(chain.T - 1):
        step = chain.transition_at(t) + chain.emission[:, t + 1, None, :]
        if chain.lengths is not None:
            step = torch.where((chain.lengths > t + 1)[:, None, None], step, stay)
        yield step


def _all_log_steps(chain: Chain) -> Tensor:
    """The same at once, (B, T−1, K, K)."""
    steps = chain.transition + chain.emission[:, 1:, None, :]
    if chain.lengths is None:
        return steps
    return torch.where(chain.exists()[:, 1:, None, None], steps, _log_identity(chain))


def _log_identity(chain: Chain) -> Tensor:
    return torch.eye(chain.K, dtype=chain.emission.dtype, device=chain.emission.device).log()

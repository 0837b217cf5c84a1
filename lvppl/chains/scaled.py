"""The posterior in scaled space, of a finished sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from lvppl.chains.posterior import Posterior
from lvppl.chains.steps import OwnSteps
from lvppl.chains.sweep import Sweep


class ScaledPosterior(Posterior):
    """Of a finished sweep; with N blocks, as in :class:`Layout`."""

    def __init__(self, sweep: Sweep) -> None:
        self.chain, self.layout = sweep.chain, sweep.layout
        buffers, L = sweep.buffers, sweep.layout.L
        self.steps = sweep.steps
        self.log_evidence = _scaled_evidence(sweep)
        self.alpha, self.b_beta = buffers.messages[:L], buffers.messages[L:]
        # b is no longer needed: its memory takes what comes now
        beta = buffers.arrivals[:, 1].flip(0)
        joint = torch.mul(self.alpha, beta, out=buffers.factors[L:])
        self.total = joint.sum(1, keepdim=True)
        weight = torch.where(self.total == 0, 0.0, 1 / self.total)
        if sweep.exists is not None:
            weight.masked_fill_(~sweep.exists, 0.0)
        by_block = self.layout.by_sequence
        torch.mul(by_block(joint), by_block(weight), out=buffers.marginals)
        self.marginals = buffers.marginals.flatten(1, 2)[:, : self.chain.T]
        self.weighted = torch.mul(self.alpha, weight, out=buffers.factors[:L])
        if sweep.ended is not None:
            self.weighted.masked_fill_(sweep.ended, 0.0)

    def pairwise(self) -> Tensor:
        return self.steps.pairwise(self.weighted, self.b_beta)

    def counts(self, weight: Tensor | None = None) -> Tensor:
        if isinstance(self.steps, OwnSteps):
            return super().counts(weight)
        before = self.weighted
        if weight is not None:
            before = before * weight.repeat(self.layout.N)
        return self.steps.counts(before, self.b_beta)

    def log_filtered(self) -> Tensor:
        return self.by_sequence(self.alpha).log()

    def by_sequence(self, columns: Tensor) -> Tensor:
        """(L, K, R) as (B, T, K)."""
        return self.layout.by_sequence(columns).flatten(1, 2)[:, : self.chain.T]


def _scaled_evidence(sweep: Sweep) -> Tensor:
    """ln Z (B,) from what was divided out up to each sequence's end, summed in float64."""
    layout, buffers, lengths, chain = sweep.layout, sweep.buffers, sweep.lengths, sweep.chain
    B, N, L, T = layout.B, layout.N, layout.L, layout.T
    alpha, scales = buffers.messages[:L], buffers.scales[:, 0].reshape(-1, N, B).log().double()
    shifts = sweep.steps.log_scale.double()
    if lengths is None:
        final = alpha[-1, :, -B:]
        shift = (T - 1) * shifts[:, 0] if chain.homogeneous else shifts.sum(-1)
    else:
        last = (lengths - 1).clamp(min=0)
        columns = torch.arange(B, device=alpha.device) + B * (last // L)
        final = alpha[last % L, :, columns].T
        scales = torch.where(layout.times(alpha.device)[buffers.events] <= last, scales, 0.0)
        steps = torch.arange(T - 1, device=alpha.device) < last[:, None]
        shift = last * shifts[:, 0] if chain.homogeneous else (steps * shifts).sum(-1)
    peaks = buffers.peaks.double().sum(0).reshape(N, B).sum(0)
    result = scales.sum((0, 1)) + final.sum(0).log().double() + peaks + shift
    if lengths is not None:
        result = torch.where(lengths == 0, 0.0, result)
    return result.to(alpha.dtype)

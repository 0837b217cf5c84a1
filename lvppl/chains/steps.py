"""One step of both directions, for transitions that columns share or have of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from lvppl.chains.arguments import Chain
from lvppl.chains.layout import Buffers, Layout
from lvppl.chains.log_arithmetic import finite


def columns_share(chain: Chain, layout: Layout) -> bool:
    """Whether one transition at a time is that of all columns, which is faster."""
    return chain.transition.shape[0] == 1 and (layout.N == 1 or chain.homogeneous)


class SharedSteps:
    """Transitions that all columns share: a step is a matrix product."""

    def __init__(self, chain: Chain, layout: Layout) -> None:
        self._layout, self._homogeneous = layout, chain.homogeneous
        logs = chain.transition[0]
        peak = finite(logs.amax((-2, -1), keepdim=True))
        self.log_scale = peak.reshape(1, -1)  # (1, S)
        self.A = (logs - peak).exp()  # (S, K, K)
        if chain.homogeneous:
            self._matrices = [torch.stack([self.A[0].T, self.A[0]])] * layout.L
        else:
            # step s arrives at time s in the first direction, leaves time T − 1 − s in the second
            both = torch.stack([self.A.transpose(-2, -1), self.A.flip(0)], 1)
            self._matrices = [both[:0], *both.unbind()]

    def step(self, s: int, messages: Tensor, out: Tensor) -> None:
        torch.bmm(self._matrices[s], messages, out=out)

    def depart(self, ends: Tensor) -> Tensor:
        """What the blocks' last messages arrive as in their neighbours; both directions."""
        return torch.bmm(self._matrices[-1], ends)

    def pairwise(self, before: Tensor, after: Tensor) -> Tensor:
        """Products α_t A_t (b β)_{t+1} of all columns, (B, T − 1, K, K)."""
        layout = self._layout
        before = layout.by_sequence(before).flatten(1, 2)[:, : layout.T - 1]
        after = layout.by_sequence(after).flatten(1, 2)[:, 1 : layout.T]
        products = before[..., None] * after[..., None, :]
        return products.mul_(self.A)

    def counts(self, before: Tensor, after: Tensor) -> Tensor:
        """The same summed over sequences, and over steps that share A, (1, S, K, K)."""
        within = torch.bmm(before[:-1], after[1:].transpose(1, 2))
        if not self._homogeneous:
            return (within * self.A)[None]
        B = self._layout.B
        across = before[-1, :, :-B] @ after[0, :, B:].T
        return ((within.sum(0) + across) * self.A[0])[None, None]


class OwnSteps:
    """Transitions of each column's own: a step is an elementwise product and a sum over states."""

    def __init__(self, chain: Chain, layout: Layout, buffers: Buffers) -> None:
        self._layout, like = layout, chain.emission
        self._products = like.new_empty(layout.K, layout.K, layout.R)
        # slot l of block n arrives at time n L + l; slot 0 of the first block is never used
        if chain.homogeneous:
            A = chain.transition[:, 0].permute(1, 2, 0).repeat(1, 1, layout.N)[None]
        else:
            A = self._by_column(chain, buffers.transitions())
        peak = finite(A.amax((1, 2), keepdim=True))
        self._A = A.sub_(peak).exp_()  # (L or 1, K, K, R)
        self._matrices = self._A.unbind() * (layout.L if chain.homogeneous else 1)
        peaks = peak.reshape(-1, layout.N, layout.B).permute(2, 1, 0).flatten(1)
        self.log_scale = peaks[:, :1] if chain.homogeneous else peaks[:, 1 : layout.T]  # (B, S)

    def _by_column(self, chain: Chain, A: Tensor) -> Tensor:
        """ln A_t in (L, K, K, R); zero where there is none."""
        layout, T, L = self._layout, self._layout.T, self._layout.L
        logs = chain.transition.permute(1, 2, 3, 0)  # (T − 1, K, K, B or 1)
        for n, block in enumerate(A.unflatten(-1, (layout.N, layout.B)).unbind(-2)):
            first, end = max(n * L, 1), min((n + 1) * L, T)
            block[: first - n * L], block[end - n * L :] = 0.0, 0.0
            block[first - n * L : end - n * L] = logs[first - 1 : end - 1]
        if chain.lengths is not None:
            beyond = layout.times(A.device) >= chain.lengths
            A.masked_fill_(beyond.reshape(L, 1, 1, layout.R), 0.0)
        return A

    def step(self, s: int, messages: Tensor, out: Tensor) -> None:
        products = self._products
        torch.mul(self._matrices[s], messages[0, :, None], out=products)
        torch.sum(products, 0, out=out[0])
        torch.mul(self._matrices[self._layout.L - s], messages[1], out=products)
        torch.sum(products, 1, out=out[1])

    def depart(self, ends: Tensor) -> Tensor:
        A, B = self._A[0], self._layout.B
        # of the columns that depart forward, each meets the matrix of the block after it
        ahead = torch.cat([A[..., B:], A[..., :B]], -1)
        return torch.stack([(ahead * ends[0, :, None]).sum(0), (A * ends[1]).sum(1)])

    def pairwise(self, before: Tensor, after: Tensor) -> Tensor:
        layout, B = self._layout, self._layout.B
        arriving = torch.cat([before[-1:], before[:-1]])
        arriving[0] = before[-1].roll(B, -1)
        products = self._A * arriving[:, :, None]
        products *= after[:, None]
        by_sequence = products.unflatten(-1, (layout.N, B)).permute(4, 3, 0, 1, 2)
        return by_sequence.flatten(1, 2)[:, 1 : layout.T]

"""How a chain lies in memory in scaled space: blocks of steps as columns, and their buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lvppl.chains.arguments import Chain


@dataclass(frozen=True)
class Layout:
    """T steps in N blocks of L steps; all blocks of all sequences are R = N B columns.

    Step t is step t mod L of block t // L. Columns are (block, sequence), and arrays (L, K, R): a
    step's numbers lie together, and one product works on long rows.
    """

    B: int
    T: int
    K: int
    N: int
    L: int

    @classmethod
    def of(cls, chain: Chain, num_blocks: int) -> Layout:
        L = -(-chain.T // num_blocks)
        return cls(chain.B, chain.T, chain.K, -(-chain.T // L), L)

    @property
    def R(self) -> int:
        return self.N * self.B

    @property
    def padded(self) -> bool:
        return self.N * self.L > self.T

    def times(self, device: torch.device) -> Tensor:
        """The time of each step of each block, (L, N, 1)."""
        steps = torch.arange(self.L, device=device)
        return (steps[:, None] + self.L * torch.arange(self.N, device=device))[:, :, None]

    def by_sequence(self, columns: Tensor) -> Tensor:
        """(L, K, R) as a (B, N, L, K) view."""
        return columns.unflatten(-1, (self.N, self.B)).permute(3, 2, 0, 1)

    def fill(self, columns: Tensor, sequences: Tensor) -> None:
        """Copy (B, T, K) into (L, K, R), and zeros where there is no step."""
        view = self.by_sequence(columns)
        whole = self.T // self.L
        view[:, :whole].copy_(sequences[:, : whole * self.L].unflatten(1, (whole, self.L)))
        if self.padded:
            rest = self.T - whole * self.L
            view[:, whole, :rest].copy_(sequences[:, whole * self.L :])
            view[:, whole, rest:] = 0.0


class Buffers:
    """Memory for one layout, and the views that the steps of a sweep work on.

    A sweep goes forward and backward at once: its s-th step handles slot s of the first direction
    and slot L − 1 − s of the second, so that each view is a pair of slots, (2, K, R).
    """

    def __init__(self, layout: Layout, like: Tensor) -> None:
        L, K, R = layout.L, layout.K, layout.R
        self.factors = like.new_empty(2 * L, K, R)  # b, twice: a pair's stride must be positive
        self.messages = like.new_empty(2 * L, K, R)  # α; then b β
        # before b comes in, by step of the sweep: a product into anything but contiguous memory is
        # three times slower
        self.arrivals = like.new_empty(L, 2, K, R)
        self.marginals = like.new_empty(layout.B, layout.N, L, K)
        self.starts = like.new_empty(2, K, R)
        self.scale = like.new_empty(2, 1, R)
        self.peaks = like.new_empty(L, 1, R)
        self._transitions: Tensor | None = None
        pairs = [(s, 2 * L - 1 - s) for s in range(L)]
        self._factor_pairs = [_pair(self.factors, *slots) for slots in pairs]
        self._message_pairs = [_pair(self.messages, *slots) for slots in pairs]
        self.ends = self._message_pairs[-1]  # the last messages of each block
        self._period = 0

    def rescale_every(self, period: int) -> None:
        """Let messages be rescaled at every ``period``-th step of a sweep, and at the last one."""
        if period == self._period:
            return
        L, R = self.arrivals.shape[0], self.arrivals.shape[-1]
        self._period = period
        self.events = [s for s in range(L) if s % period == period - 1 or s == L - 1]
        self.scales = self.arrivals.new_ones(len(self.events), 2, 1, R)
        scales: list[Tensor | None] = [None] * L
        for s, event in zip(self.events, self.scales.unbind(), strict=True):
            scales[s] = event
        self.steps = list(
            zip(
                self.arrivals.unbind(),
                self._factor_pairs,
                self._message_pairs,
                scales,
                strict=True,
            )
        )

    def transitions(self) -> Tensor:
        """(L, K, K, R), where each column has its own."""
        if self._transitions is None:
            L, _, K, R = self.arrivals.shape
            self._transitions = self.arrivals.new_empty(L, K, K, R)
        return self._transitions


def _pair(buffer: Tensor, first: int, second: int) -> Tensor:
    """Two slots of a (slots, K, R) buffer, the first before the second, as one (2, K, R) view."""
    _, K, R = buffer.shape
    return buffer.as_strided((2, K, R), ((second - first) * K * R, R, 1), first * K * R)


_CALLS_UNTIL_TRIED_AGAIN = 16
"""An attempt in vain costs two sweeps of blocks. Chains seldom begin to forget where they did not:
transitions that are learned become more certain."""


class ChainWorkspace:
    """Buffers that :func:`forward_backward` uses again: of the last shapes it was called with.

    Saves allocating memory and views at each iteration of EM, a tenth to a quarter of the time, and
    remembers for some calls which chains do not forget their past within a block. What a call
    returned is overwritten by the next one with the same workspace.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._buffers: Buffers | None = None
        self._unforgetting: dict[Kind, int] = {}

    def buffers(self, layout: Layout, period: int, like: Tensor) -> Buffers:
        """Those of the last call, where they fit; new ones otherwise."""
        key = (layout, like.dtype, like.device)
        if self._buffers is None or self._key != key:
            self._key, self._buffers = key, Buffers(layout, like)
        self._buffers.rescale_every(period)
        return self._buffers

    def expects_to_forget(self, kind: Kind) -> bool:
        """Whether blocks of this kind are worth a guess of what they start from."""
        calls = self._unforgetting.get(kind, 0)
        self._unforgetting[kind] = max(calls - 1, 0)
        return calls == 0

    def found_unforgetting(self, kind: Kind) -> None:
        """Blocks of this kind were too short to forget their guess."""
        self._unforgetting[kind] = _CALLS_UNTIL_TRIED_AGAIN


Kind = tuple[bool, Layout]
"""Whether columns share their transitions, and how a chain lies in memory."""

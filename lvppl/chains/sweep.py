"""One pass of both directions through all blocks, side by side."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvppl.chains.arguments import Chain
from lvppl.chains.layout import Buffers, Layout
from lvppl.chains.steps import OwnSteps, SharedSteps


class Sweep:
    """The messages of both directions; each block starts from ``buffers.starts``."""

    def __init__(
        self, chain: Chain, layout: Layout, buffers: Buffers, steps: SharedSteps | OwnSteps
    ) -> None:
        self.chain, self.layout, self.buffers, self.steps = chain, layout, buffers, steps
        L, B = layout.L, layout.B
        lengths, device = chain.lengths, chain.emission.device
        if lengths is None and layout.padded:
            lengths = torch.full((B,), layout.T, device=device)
        self.lengths = lengths
        self.exists: Tensor | None = None
        self.ended: Tensor | None = None
        self.has_run = False
        self._resets: list[Tensor | None] = [None] * L
        if lengths is not None:
            times = layout.times(device)
            self.exists = (times < lengths).reshape(L, 1, layout.R)
            # β = 1 at the last step; beyond it, anything that is finite will do
            self.ended = (times >= lengths - 1).reshape(L, 1, layout.R)
            some = self.ended.any(-1).any(-1).tolist()
            self._resets = [self.ended[i] if some[i] else None for i in reversed(range(L))]
        self._fill()

    def _fill(self) -> None:
        """b, with the largest of a step one, and ln π in that of the first step."""
        layout, buffers = self.layout, self.buffers
        b = buffers.factors[: layout.L]
        layout.fill(b, self.chain.emission)
        b[0, :, : layout.B] += self.chain.initial.T
        if self.exists is not None:
            b.masked_fill_(~self.exists, 0.0)
        torch.amax(b, 1, keepdim=True, out=buffers.peaks)
        buffers.peaks.masked_fill_(buffers.peaks == -math.inf, 0.0)
        b.sub_(buffers.peaks).exp_()
        buffers.factors[layout.L :].copy_(b)

    def run(self) -> None:
        """One sweep from ``buffers.starts``."""
        buffers, step, B = self.buffers, self.steps.step, self.layout.B
        tiny, scale = torch.finfo(buffers.factors.dtype).tiny, buffers.scale
        messages, self.has_run = buffers.starts, True
        for s, (arrive, factor, out, event) in enumerate(buffers.steps):
            if s:
                step(s, messages, arrive)
            else:
                arrive.copy_(messages)
                arrive[0, :, :B] = 1.0
                arrive[1, :, -B:] = 1.0
            if (ended := self._resets[s]) is not None:
                arrive[1].masked_fill_(ended, 1.0)
            messages = torch.mul(arrive, factor, out=out)
            if event is not None:
                torch.sum(messages, 1, keepdim=True, out=event)
                messages.div_(torch.clamp_min(event, tiny, out=scale))

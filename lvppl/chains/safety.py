"""What is proven of scaled numbers: where underflow is harmless, and where there was none."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.chains.arguments import Chain
from lvppl.chains.scaled import ScaledPosterior
from lvppl.chains.sweep import Sweep


@dataclass(frozen=True)
class Limits:
    """How far scaled numbers may go, in nats; and what two messages may differ by."""

    spread: float  # of the logs of the transitions, for which underflow is proven harmless
    shrink: float  # what messages may lose between two rescalings
    finite_spread: float  # of the transitions that are not zero, where zeros are looked for instead
    smallest: float  # message that has certainly not lost digits to underflow
    smallest_scale: float  # of one step, likewise
    tolerance: float  # relative, of a boundary message


# The smallest normal numbers are e^-708 and e^-87. With messages above e^-shrink, Σ α β is above
# e^(-2 shrink - spread) / K, and what is lost by underflow is below e^(-708 + shrink + spread) of
# the whole: e^-358, e^-42.
LIMITS = {
    torch.float64: Limits(200.0, 150.0, 100.0, 1e-200, 1e-60, 1e-12),
    torch.float32: Limits(25.0, 20.0, 15.0, 1e-25, 1e-8, 2e-5),
}


def transition_spread(chain: Chain) -> float:
    r"""The largest ln max A_t − ln min A_t; what lies beyond a sequence's end counts too.

    Where it is at most :attr:`Limits.spread`, underflow is harmless. β_t(i) is between min A and
    max A times Σ_j (b β)_{t+1}(j), so that two β of one step differ by that ratio at most: a state
    whose α underflows has a posterior probability of no more than the lost part times the ratio,
    which is nothing. The same holds with the directions swapped. A step's messages shrink by no
    more than the ratio either, as the largest b of a step is one.
    """
    logs = chain.transition
    if chain.T == 1 or logs.numel() == 0:
        return 0.0
    spread = float((logs.amax((-2, -1)) - logs.amin((-2, -1))).max())
    return math.inf if math.isnan(spread) else spread


def support_is_intact(sweep: Sweep, posterior: ScaledPosterior, limits: Limits) -> bool:
    """Whether no message that should be positive underflowed, or nearly so.

    For transitions that are zero in places, and so make no bound on what an underflow may cost:
    think of two states that never meet, one of them ahead at the start and the other in the end.
    The states that can be reached at each step follow from the zeros; all their messages must be
    there.
    """
    chain, buffers = sweep.chain, sweep.buffers
    logs = chain.transition[0, 0]
    possible = logs > -math.inf
    finite = logs[possible]
    if (
        not bool(possible.any(-1).all())
        or float(finite.max() - finite.min()) > limits.finite_spread
    ):
        return False
    reached = _reachable(chain.initial > -math.inf, possible, chain.T)
    if reached is None or bool((buffers.scales < limits.smallest_scale).any()):
        return False
    exists, settled = chain.exists()[..., None], reached.shape[1]
    alive = posterior.by_sequence(posterior.alpha) >= limits.smallest
    alive &= posterior.by_sequence(posterior.total) >= limits.smallest
    alive |= ~exists
    backward = (posterior.by_sequence(posterior.b_beta) >= limits.smallest) | ~exists
    intact = (
        (alive[:, :settled] | ~reached).all()
        & (alive[:, settled:] | ~reached[:, -1:]).all()
        & backward[:, 1:].all()  # that of the first step holds ln π too, and is not used
    )
    return bool(intact)


def _reachable(initial: Tensor, possible: Tensor, T: int) -> Tensor | None:
    """The states that can be reached at the first steps, (B, steps, K), until they stay the same.

    ``None`` where they have not after many steps, as in a chain of period two.
    """
    reached, edges = [initial], possible.float()
    for _ in range(4 * len(possible) + 8):
        reached.append(reached[-1].float() @ edges > 0)
        if len(reached) >= T or bool((reached[-1] == reached[-2]).all()):
            return torch.stack(reached[:T], 1)
    return None

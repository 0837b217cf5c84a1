"""Which algorithm: scaled space where it is proven right, and as fast as the sizes allow."""

from __future__ import annotations

import math

from lvppl.chains.arguments import Chain
from lvppl.chains.boundaries import run_from_guess, run_from_products
from lvppl.chains.layout import ChainWorkspace, Layout
from lvppl.chains.log_space import LogPosterior
from lvppl.chains.posterior import Posterior
from lvppl.chains.safety import LIMITS, Limits, support_is_intact, transition_spread
from lvppl.chains.scaled import ScaledPosterior
from lvppl.chains.steps import OwnSteps, SharedSteps, columns_share
from lvppl.chains.sweep import Sweep
from lvppl.errors import ProgramError

METHODS = ("auto", "sequential", "blocked", "associative")


def require_method(method: str) -> None:
    if method not in METHODS:
        raise ProgramError(f"method must be one of {', '.join(METHODS)}, but is {method!r}.")


def find_posterior(chain: Chain, method: str, workspace: ChainWorkspace | None = None) -> Posterior:
    """The scaled posterior where it is proven right, and that in log space where it is not."""
    if chain.B > 0 and not _asks_for_scan(chain, method):
        for num_blocks in _block_counts(chain, method):
            found = _scaled_posterior(chain, num_blocks, workspace or ChainWorkspace())
            if found is not None:
                return found
    return LogPosterior(chain, scan=must_scan(chain, method))


def _asks_for_scan(chain: Chain, method: str) -> bool:
    return method == "associative" or (method == "auto" and chain.emission.device.type != "cpu")


def _block_counts(chain: Chain, method: str) -> list[int]:
    """How many blocks to try, one count after the other."""
    # A step of both directions costs about 4 µs however few its columns are, and then for 8, 16 and
    # 64 states 8, 20 and 600 ns a column (two cores, float64): about 60,000 / K² columns cost as
    # much as their overhead. Blocks below 64 steps would seldom forget their guess.
    columns = min(1024, 60_000 // chain.K**2)
    num_blocks = min(columns // chain.B, chain.T // 64)
    if method == "blocked":
        num_blocks = max(num_blocks, min(4, chain.T))
    if method == "sequential" or num_blocks < 4:
        return [1]
    return [num_blocks] if chain.shared else [num_blocks, 1]


def must_scan(chain: Chain, method: str) -> bool:
    """Whether the scan is to be preferred to single steps in log space."""
    if chain.B == 0 or _asks_for_scan(chain, method):
        return True
    if chain.emission.device.type != "cpu":
        return False
    # measured: a step of both directions 60 µs and 6 ns a product, against 3.5 ns each for the scan
    products = chain.B * chain.K**2
    return 3.5e-9 * products * chain.K < 60e-6 + 6e-9 * products


def _scaled_posterior(
    chain: Chain, num_blocks: int, workspace: ChainWorkspace
) -> ScaledPosterior | None:
    """In scaled space, or ``None`` where this could not be shown to be right."""
    limits, layout = LIMITS[chain.emission.dtype], Layout.of(chain, num_blocks)
    spread, shared = transition_spread(chain), columns_share(chain, layout)
    safe = spread <= limits.spread
    if not safe and not chain.shared:
        return None
    guess = layout.N == 1 or workspace.expects_to_forget((shared, layout))
    if not guess and not shared:  # nothing else gives the starts of its blocks
        return None
    buffers = workspace.buffers(layout, _rescaling_period(chain, spread, limits), chain.emission)
    steps: SharedSteps | OwnSteps = (
        SharedSteps(chain, layout) if shared else OwnSteps(chain, layout, buffers)
    )
    sweep = Sweep(chain, layout, buffers, steps)
    if not (guess and run_from_guess(sweep, limits.tolerance)):
        if guess:
            workspace.found_unforgetting((shared, layout))
        if isinstance(steps, OwnSteps):
            return None
        if not run_from_products(sweep, steps.A[0], limits.tolerance):
            return None
    posterior = ScaledPosterior(sweep)
    if not safe and not support_is_intact(sweep, posterior, limits):
        return None
    return posterior


def _rescaling_period(chain: Chain, spread: float, limits: Limits) -> int:
    """After how many steps messages are rescaled: before they have shrunk by more than allowed."""
    if spread > limits.spread:
        return 1
    loss = max(spread, math.log(chain.K), 1.0)
    return min(32, max(1, int(limits.shrink / loss)))

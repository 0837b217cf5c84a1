"""ln p(y) of each datum by a sweep over all states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import Bernoulli, Independent
from pyro.distributions.torch_distribution import ExpandedDistribution
from torch import Tensor
from tqdm.auto import tqdm

from lvppl.errors import ProgramError
from lvppl.sweep.bernoulli import BernoulliSum, softplus
from lvppl.sweep.joint import Joint
from lvppl.sweep.quadratic import Quadratic, probes, quadratic_of
from lvppl.terms import Terms

__all__ = ["Swept", "swept_evidence"]

_FEW_STATES = 2**12  # that are run as they are
_MOST_STATES = {"quadratic": 2**40, "bernoulli": 2**32, "program": 2**26}
_BLOCK = {"cpu": 2**21}  # numbers that a program makes at once, from its sites
_BLOCK_ACCELERATOR = 2**27


@dataclass(frozen=True)
class Swept:
    """ln p(y) and how it was summed.

    Attributes:
        log_prob: (data,), nats, float64.
        num_states: terms of each datum's sum.
        form: ``"quadratic"``, ``"bernoulli"`` or ``"program"``: what was swept.
    """

    log_prob: Tensor
    num_states: int
    form: str


@torch.no_grad()
def swept_evidence(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    data_plate: Any = None,
    progress: bool = False,
) -> Swept:
    r"""ln Σ_z p(z, y) over all joint states z of the latents, by datum.

    Sites that are marked for enumeration are summed out within each term.

    Args:
        model, args, kwargs: a Pyro program whose other latents have finite supports.
        data_plate: as in :func:`lvppl.log_likelihood`.
        progress: show a bar.

    Raises:
        ProgramError: a latent is continuous or without finite support; there are too many states.
    """
    joint = Joint(model, args, kwargs, data_plate=data_plate)
    size, known = joint.space.size, None
    if joint.space.is_binary and size > _FEW_STATES:
        known = _recognised(joint)
    if known is None:
        _require_affordable(size, "program")
        return Swept(_sweep(joint, progress), size, "program")
    form = "quadratic" if isinstance(known, Quadratic) else "bernoulli"
    _require_affordable(size, form)
    return Swept(known.log_sum_exp(), size, form)


def _require_affordable(size: int, form: str) -> None:
    if size > _MOST_STATES[form]:
        raise ProgramError(
            f"Each datum has {size:.4g} joint states, and a sweep over more than "
            f"{_MOST_STATES[form]:.4g} of this kind would take hours. Give the latents a guide and "
            "use estimator='importance', or let the program show structure (pyro.markov, plates). "
            "Quadratic and Bernoulli forms are recognised in float64 alone."
        )


def _sweep(joint: Joint, progress: bool) -> Tensor:
    """Blocks of states, as many as fit, under a running log-sum-exp."""
    size, block = joint.space.size, _states_at_once(joint)
    total: Tensor | None = None
    with tqdm(total=size, disable=not progress, unit="state") as bar:
        for start in range(0, size, block):
            count = min(block, size - start)
            values = joint.log_prob(joint.space.digits(start, count)).double().logsumexp(0)
            total = values if total is None else torch.logaddexp(total, values)
            bar.update(count)
    assert total is not None
    return total


def _states_at_once(joint: Joint) -> int:
    if joint.layout.loop_reason:
        return 1
    terms = joint.terms(joint.space.digits(0, 1))
    sites = [*terms.observed.values(), *terms.latents.values()]
    each = max(1, sum(site.value.numel() for site in sites))
    budget = _BLOCK.get(terms.log_weight.device.type, _BLOCK_ACCELERATOR)
    return max(1, budget // each)


def _recognised(joint: Joint) -> Quadratic | BernoulliSum | None:
    """A form that agrees with the program at its probes and at random states."""
    n = joint.space.num_elements
    if joint.dtype != torch.float64:
        return None  # coefficients are differences of sums, which single precision does not hold
    at, values, logits = probes(n), [], []
    for digits in at.split(_states_at_once(joint)):
        terms = joint.terms(digits)
        values.append(joint.of(terms))
        logits.append(_logits(terms))
    known = torch.cat(values)
    epsilon, known = torch.finfo(known.dtype).eps, known.double()
    found = quadratic_of(known, n, 16 * epsilon * (1 + known.abs().amax(0)))
    if found is not None or any(one is None for one in logits):
        return found
    return _bernoulli(known, torch.cat([x for x in logits if x is not None]), n, epsilon)


def _bernoulli(known: Tensor, logits: Tensor, n: int, epsilon: float) -> BernoulliSum | None:
    """Values and logits (S, V), both at ``probes(n)``."""
    base, slope = logits[0], logits[1 : n + 1] - logits[0]
    bits = probes(n).to(logits)
    slack = 16 * epsilon * n * (1 + logits.abs().amax())
    if bool(((base + bits @ slope - logits).abs() > slack).any()):
        return None
    sums = softplus(logits).sum(-1, keepdim=True)
    error = 16 * epsilon * (1 + known.abs() + sums).amax(0)
    rest = quadratic_of(known + sums, n, error)
    return None if rest is None else BernoulliSum(rest, base, slope)


def _logits(terms: Terms) -> Tensor | None:
    """Logits (S, V), float64, of the one observed Bernoulli site; the same for every datum."""
    if len(terms._runs) != 1 or len(terms._runs[0].observed_sites) != 1:
        return None
    (site,) = terms._runs[0].observed_sites
    fn, run = site["fn"], terms._runs[0]
    while isinstance(fn, (Independent, ExpandedDistribution)):
        fn = fn.base_dist
    plain = site["scale"] == 1.0 and site["mask"] is None
    if not (isinstance(fn, Bernoulli) and plain):
        return None
    logits = run.by_plates(fn.logits, site, site["fn"].event_dim)  # (S, *plates, *event)
    logits = logits.reshape(len(logits), terms.num_data, -1).double()
    apart = (logits - logits[:, :1]).abs().amax()  # products round differently by row
    same = bool(apart <= 64 * torch.finfo(fn.logits.dtype).eps * (1 + logits.abs().amax()))
    return logits[:, 0] if same else None

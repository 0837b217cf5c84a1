"""Global continuous latents as parameters: their prior then turns maximum likelihood into MAP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from lvppl.conjugate import Nodes, conjugate_kind
from lvppl.errors import ProgramError
from lvppl.factor_graph import FactorGraph
from lvppl.inference.m_step.weighted import Weighted
from lvppl.tracing import (
    is_discrete,
    is_enumerated,
    kind_of,
    plates_of,
    sample_sites,
    support_of,
    traced,
    undisturbed,
)

__all__ = ["ContinuousLatents", "MapLatents", "continuous_latents", "require_conjugate"]

Program = Callable[..., Any]


class MapLatents(Messenger):
    """Takes latents out of a program's sight and puts parameters of the same names in their place.

    A parameter starts at a draw from the prior, and lives on the prior's support. What the prior
    says of the present value is kept in ``priors`` after each run.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = frozenset(names)
        self.priors: dict[str, Weighted] = {}

    def __call__(self, program: Program) -> Program:
        return program if not self.names else super().__call__(program)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.names:
            return
        fn = msg["fn"]
        value = pyro.param(
            msg["name"], lambda: fn.sample().detach(), constraint=fn.support, event_dim=fn.event_dim
        )
        msg["value"], msg["is_observed"], msg["done"], msg["stop"] = value, True, True, True
        weight = torch.as_tensor(msg["scale"], dtype=value.dtype, device=value.device)
        weight = weight.expand(fn.batch_shape)
        if msg["mask"] is not None:
            weight = weight * msg["mask"]
        self.priors[msg["name"]] = Weighted(msg["name"], fn, value, weight, is_prior=True)

    def log_prob(self) -> Tensor | float:
        """ln p of all of them at their present values, 0-dim."""
        return sum((p.weight * p.fn.log_prob(p.value)).sum() for p in self.priors.values())


@dataclass(frozen=True)
class ContinuousLatents:
    """The continuous latents of a program: shared by data, or one for each datum."""

    shared: tuple[str, ...]
    local: tuple[str, ...]


def continuous_latents(model: Program, args: Any, kwargs: Mapping[str, Any]) -> ContinuousLatents:
    """Which continuous latents are maximised over, and which are integrated.

    Raises:
        ProgramError: one that belongs to each datum has no conjugate prior, one that is shared no
            support.
    """
    with undisturbed(), poutine.block():
        sites = sample_sites(traced("model", model, args, kwargs))
    observed = [s for s in sites if s["is_observed"] and len(torch.as_tensor(s["value"]).flatten())]
    if not any(s["is_observed"] for s in sites):
        raise ProgramError(
            "The model observes nothing, so that there is nothing to fit. Give the data to the "
            "sites that they are of: pyro.sample(name, distribution, obs=y)."
        )
    shared, local = [], []
    for site in sites:
        if site["is_observed"] or is_enumerated(site) or is_discrete(site):
            continue
        plates = {plate.name for plate in plates_of(site)}
        own = [s for s in observed if {plate.name for plate in plates_of(s)} <= plates]
        if own and plates:
            if conjugate_kind(site["fn"]) is None:
                raise ProgramError(not_conjugate(site, own[0]["name"]))
            local.append(site["name"])
        elif support_of(site["fn"]) is None:
            raise ProgramError(
                f"Latent '{site['name']}' ({kind_of(site['fn'])}) declares no support, so that it "
                "cannot be a parameter. Use a distribution with a support."
            )
        else:
            shared.append(site["name"])
    return ContinuousLatents(tuple(shared), tuple(local))


def not_conjugate(site: Any, datum: str) -> str:
    return (
        f"Latent '{site['name']}' ({kind_of(site['fn'])}) is continuous and belongs to each datum "
        f"of '{datum}': EM has to integrate it, and its terms of ln p are neither those "
        "of a Gamma nor of a Gaussian. Give it a guide: lvppl.EM(model, guide), or lvppl.SVI."
    )


def require_conjugate(graph: FactorGraph) -> None:
    """Raise where an integrated latent does not have the density that its integral is taken of.

    Raises:
        ProgramError: the log-density at some nodes is not what that at the others predicts.
    """
    for name, site in graph.latents.items():
        if not isinstance(site["fn"], Nodes):
            continue
        assert graph.enumerated is not None
        defect = graph.enumerated.defect(name)
        if not defect < site["fn"].tolerance:
            others = [n for n, s in graph.sites.items() if s["is_observed"]]
            raise ProgramError(not_conjugate({**site, "fn": site["fn"].base_dist}, others[0]))
        if not site["fn"].is_double:
            raise ProgramError(
                f"Latent '{name}' is integrated out of each datum, which needs float64, but its "
                "prior is float32. Begin with torch.set_default_dtype(torch.float64), or write "
                "its arguments in float64."
            )

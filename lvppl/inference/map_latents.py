"""Global continuous latents as parameters: their prior then turns maximum likelihood into MAP."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.m_step.weighted import Weighted
from lvppl.tracing import (
    is_discrete,
    is_enumerated,
    kind_of,
    plates_of,
    sample_sites,
    support_of,
    undisturbed,
)

__all__ = ["MapLatents", "global_latents"]

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


def global_latents(model: Program, args: Any, kwargs: Mapping[str, Any]) -> list[str]:
    """Continuous latents that are shared by data.

    Raises:
        ProgramError: a continuous latent belongs to each datum: it is to be integrated, not
            maximised.
    """
    with undisturbed(), poutine.block():
        sites = sample_sites(poutine.trace(model).get_trace(*args, **kwargs))
    observed = [s for s in sites if s["is_observed"] and s["value"].numel() > 0]
    found = []
    for site in sites:
        continuous = not site["is_observed"] and not is_enumerated(site) and not is_discrete(site)
        if not continuous:
            continue
        plates = {plate.name for plate in plates_of(site)}
        local = [s for s in observed if {plate.name for plate in plates_of(s)} <= plates]
        if local and plates:
            raise ProgramError(
                f"Latent '{site['name']}' ({kind_of(site['fn'])}) is continuous and belongs to "
                f"each datum of '{local[0]['name']}' (plate '{sorted(plates)[0]}'): EM would have "
                "to integrate it, and no closed form is known here. Give it a guide: "
                "lvppl.EM(model, guide), or lvppl.SVI."
            )
        if support_of(site["fn"]) is None:
            raise ProgramError(
                f"Latent '{site['name']}' ({kind_of(site['fn'])}) declares no support, so that it "
                "cannot be a parameter. Use a distribution with a support."
            )
        found.append(site["name"])
    return found

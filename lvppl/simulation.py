"""Data drawn from a model itself, with the latents that made them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.missing import MISSING
from lvppl.tracing import sample_sites, traced

__all__ = ["HeldValues", "Simulated", "simulated"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class Simulated:
    """One joint draw z, y ~ p(z, y).

    Attributes:
        observed: values of the sites that the model observes, by name, (*plates, *event).
        latents: values of the others.
        args: the arguments of the call, those that a site observes as they are replaced by what was
            drawn.
        apart: observed sites whose data are no argument as it is.
        subsamples: indices of subsampled plates, by name.
    """

    observed: dict[str, Tensor]
    latents: dict[str, Tensor]
    args: tuple[Any, ...]
    apart: tuple[str, ...]
    subsamples: dict[str, Tensor]

    def require_replaced(self, remedy: str) -> None:
        """Refuse a guide that would read data that were not simulated.

        Raises:
            ProgramError: a site observes no argument as it is.
        """
        if self.apart:
            raise ProgramError(
                f"Site '{self.apart[0]}' observes no argument as it is, so that a guide would read "
                f"data that were not simulated. {remedy}"
            )


def simulated(
    model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], remedy: str
) -> Simulated:
    """Run the model without its observations.

    Args:
        model: a Pyro program.
        args, kwargs: its arguments, which say how many data to draw and of which shapes.
        remedy: what to do where the model cannot be simulated.

    Raises:
        ProgramError: the model has a ``pyro.factor``, observes nothing, or takes NaN as missing.
    """
    trace = traced("model", poutine.uncondition(model), args, kwargs)
    sites = sample_sites(trace)
    factors = [site["name"] for site in sites if isinstance(site["fn"], Unit)]
    if factors:
        raise ProgramError(
            f"Site '{factors[0]}' is a pyro.factor: it says how probable y is, not how to draw it, "
            f"so that the model cannot be simulated. {remedy}"
        )
    seen = {s["name"]: s for s in sites if s["infer"].get("was_observed")}
    if not seen:
        raise ProgramError("The model observes nothing: there are no data to simulate.")
    incomplete = [name for name, site in seen.items() if MISSING in site["infer"]]
    if incomplete:
        raise ProgramError(
            f"missing=\"nan\" and simulated data do not go together: site '{incomplete[0]}' would "
            f"be simulated complete, unlike the data. {remedy}"
        )
    new, apart = list(args), []
    for name, site in seen.items():
        data = site["infer"]["obs"]
        places = [i for i, argument in enumerate(args) if argument is data]
        for i in places:
            new[i] = site["value"].reshape(data.shape).to(data.dtype)
        apart += [] if places else [name]
    nodes: dict[str, Any] = dict(trace.nodes)
    return Simulated(
        observed={name: site["value"] for name, site in seen.items()},
        latents={site["name"]: site["value"] for site in sites if site["name"] not in seen},
        args=tuple(new),
        apart=tuple(apart),
        subsamples={
            name: site["value"]
            for name, site in nodes.items()
            if type(site.get("fn")).__name__ == "_Subsample"
        },
    )


class HeldValues(Messenger):
    """Gives the latent sites of a program these values, and leaves all else of them as it is."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not msg["done"] and msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True

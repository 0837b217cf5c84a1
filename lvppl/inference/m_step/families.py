"""The distributions whose expected log-likelihood has a known maximum, and their arguments.

An argument has a *role*, which says what form ln p takes in it (see ``forms.py``):

============  ============================================================================
simplex       Categorical, OneHotCategorical, Multinomial; row of Dirichlet
probability   Bernoulli, Binomial, Geometric; value of Beta
rate          Poisson, Exponential, Gamma (rate); value of Gamma
concentration Gamma (concentration)
location      Normal, LogNormal, MultivariateNormal
scale         Normal, LogNormal
cholesky      MultivariateNormal, as the factor of its covariance
============  ============================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch import distributions as td

__all__ = ["FAMILIES", "Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """A kind of distribution.

    Attributes:
        name: of the distribution.
        roles: by the name of an argument.
        read: the arguments of a distribution, by name.
        event_dims: by argument, the number of dimensions on the right that belong to one event.
    """

    name: str
    roles: dict[str, str]
    read: Callable[[Any], dict[str, Tensor]]
    event_dims: dict[str, int]


def _family(cls: type, roles: dict[str, str], **event_dims: int) -> tuple[type, Family]:
    def read(fn: Any) -> dict[str, Tensor]:
        return {name: getattr(fn, name) for name in roles}

    dims = {name: event_dims.get(name, 0) for name in roles}
    return cls, Family(cls.__name__, roles, read, dims)


def _log_normal(fn: Any) -> dict[str, Tensor]:
    return {"loc": fn.base_dist.loc, "scale": fn.base_dist.scale}


def _mvn(fn: Any) -> dict[str, Tensor]:
    return {"loc": fn.loc, "scale_tril": fn._unbroadcasted_scale_tril}


_NORMAL = {"loc": "location", "scale": "scale"}

FAMILIES: dict[type, Family] = dict(
    [
        _family(td.Categorical, {"probs": "simplex"}, probs=1),
        _family(td.OneHotCategorical, {"probs": "simplex"}, probs=1),
        _family(td.Multinomial, {"probs": "simplex"}, probs=1),
        _family(td.Bernoulli, {"probs": "probability"}),
        _family(td.Binomial, {"probs": "probability"}),
        _family(td.Geometric, {"probs": "probability"}),
        _family(td.Poisson, {"rate": "rate"}),
        _family(td.Exponential, {"rate": "rate"}),
        _family(td.Gamma, {"concentration": "concentration", "rate": "rate"}),
        _family(td.Normal, _NORMAL),
        (td.LogNormal, Family("LogNormal", _NORMAL, _log_normal, {"loc": 0, "scale": 0})),
        (
            td.MultivariateNormal,
            Family(
                "MultivariateNormal",
                {"loc": "location", "scale_tril": "cholesky"},
                _mvn,
                {"loc": 1, "scale_tril": 2},
            ),
        ),
    ]
)


def family_of(fn: Any) -> Family | None:
    """The family of a peeled distribution, ``None`` where its maximum is not known here."""
    for cls in type(fn).__mro__:
        if cls in FAMILIES:
            return FAMILIES[cls]
    return None

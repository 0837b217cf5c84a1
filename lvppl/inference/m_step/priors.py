"""Priors of latents that are treated as parameters, as statistics: pseudo-counts and the like.

A conjugate prior has the form of Q itself, so that it adds to the statistics and the maximum is
that of the posterior density (MAP). Densities are with respect to the latent as the program
samples it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.m_step.arguments import Binding, Bound, Key
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.entries import Image, Parameter
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.m_step.weighted import Weighted, peel

__all__ = ["add_prior", "add_regression_prior", "is_conjugate", "refuse_learned_concentration"]


def is_conjugate(term: Weighted, role: str, image: Image, bindings: Mapping[Key, Binding]) -> bool:
    """Whether the prior has the form of Q in this role, under this image."""
    kind = type(peel(term).base).__name__
    if (kind, role, image.name) not in _ADD:
        return False
    arguments = [b for (site, _), b in bindings.items() if site == term.name]
    if role == "location":
        scale = bindings.get((term.name, "scale"), bindings.get((term.name, "scale_tril")))
        loc = bindings.get((term.name, "loc"))
        return isinstance(loc, Bound) and loc.is_constant and isinstance(scale, Bound)
    return all(isinstance(b, Bound) and b.is_constant for b in arguments)


def refuse_learned_concentration(term: Weighted, hyperparameters: Collection[str]) -> None:
    """Raise where a latent of bounded support and its concentration would be maximised together.

    The density of Dirichlet(s m) at θ = m grows like s^((K − 1) / 2) for ever, whatever the data
    say of θ: no maximum is near.

    Args:
        hyperparameters: the parameters, themselves without a prior, that the prior depends on.
    """
    kind = type(peel(term).base).__name__
    if kind in ("Dirichlet", "Beta") and hyperparameters:
        names = ", ".join(map(repr, sorted(hyperparameters)))
        raise ProgramError(
            f"The {kind} prior of '{term.name}' has a concentration that depends on {names}. EM "
            f"maximises over '{term.name}' too, and their joint density has no maximum: it grows "
            "without bound as the concentration does. Use a number for the concentration, give "
            f"{names} a prior (pyro.sample), or integrate '{term.name}' under a guide (lvppl.SVI)."
        )


def add_prior(
    term: Weighted,
    role: str,
    image: Image,
    parameter: Parameter,
    bindings: Mapping[Key, Binding],
    into: Statistics,
) -> None:
    """Add ln p(θ) to the statistics."""
    peeled = peel(term)
    index = torch.arange(parameter.size, device=into.device) + parameter.offset
    index = index.reshape(parameter.value.shape)
    weight = peeled.weight.double()
    _ADD[type(peeled.base).__name__, role, image.name](
        peeled.base, weight, index, bindings, into, term
    )


def add_regression_prior(
    term: Weighted,
    group: int,
    entries: Tensor,
    parameter: Parameter,
    bindings: Mapping[Key, Binding],
    into: Statistics,
) -> None:
    """A Normal prior of regression coefficients: the datum m, seen once through the identity."""
    peeled = peel(term)
    scale = _scale(bindings, term, "scale")
    shape, device = term.value.shape, into.device
    count, P = term.value.numel(), len(entries)

    def flat(value: Tensor) -> Tensor:
        return value.detach().to(device, torch.float64).expand(shape).reshape(count)

    residual, weight = flat(peeled.base.loc - term.value), flat(peeled.weight)
    column = torch.searchsorted(
        entries.to(device), torch.arange(count, device=device) + parameter.offset
    )
    gradient = torch.zeros((count, P), dtype=torch.float64, device=device)
    gradient[torch.arange(count, device=device), column] = weight * residual
    gram = torch.zeros((count, P, P), dtype=torch.float64, device=device)
    gram[torch.arange(count, device=device), column, column] = weight
    into.add_cells(
        f"regression {group}",
        Cells(
            scale.index.to(device).expand(shape).reshape(count, 1),
            {"scale": flat(peeled.base.scale), "scale_coefficient": flat(scale.coefficient)},
            {
                "n": weight,
                "second": weight * residual**2,
                "gradient": gradient,
                "gram": gram,
            },
        ),
    )


Add = Callable[[Any, Tensor, Tensor, Mapping[Key, Binding], Statistics, Weighted], None]


def _scale(bindings: Mapping[Key, Binding], term: Weighted, argument: str) -> Bound:
    """What the scale of a prior is bound to; one that climbs by gradient is a constant here."""
    binding = bindings[term.name, argument]
    if isinstance(binding, Bound):
        return binding
    base = peel(term).base
    value = base.scale if argument == "scale" else base._unbroadcasted_scale_tril
    one = torch.ones(value.shape, dtype=torch.float64, device=value.device)
    return Bound(torch.full(value.shape, -1, device=value.device), one, None)


def _full(value: Tensor, index: Tensor) -> Tensor:
    return value.double().expand(index.shape)


def _dirichlet(
    base: Any, w: Tensor, index: Tensor, _b: Any, into: Statistics, term: Weighted
) -> None:
    concentration = base.concentration.double()
    if bool((concentration < 1).any()):
        raise ProgramError(
            f"The prior of '{term.name}' is a Dirichlet with a concentration of "
            f"{float(concentration.min()):.3g}: below 1 its density has no maximum inside the "
            "simplex, so that there is no MAP estimate. Use concentrations of at least 1, or a "
            "guide (lvppl.SVI)."
        )
    into.add("count", index, _full(w.unsqueeze(-1) * (concentration - 1), index))


def _beta(base: Any, w: Tensor, index: Tensor, _b: Any, into: Statistics, term: Weighted) -> None:
    a, b = base.concentration1.double(), base.concentration0.double()
    if bool((a < 1).any()) or bool((b < 1).any()):
        raise ProgramError(
            f"The prior of '{term.name}' is a Beta with a concentration below 1: it has no maximum "
            "inside (0, 1), so that there is no MAP estimate. Use concentrations of at least 1."
        )
    into.add("success", index, _full(w * (a - 1), index))
    into.add("failure", index, _full(w * (b - 1), index))


def _gamma_on_rate(
    base: Any, w: Tensor, index: Tensor, _b: Any, into: Statistics, term: Weighted
) -> None:
    into.add("power", index, _full(w * (base.concentration.double() - 1), index))
    into.add("slope", index, _full(w * base.rate.double(), index))


def _inverse_gamma_on_rate(
    base: Any, w: Tensor, index: Tensor, _b: Any, into: Statistics, term: Weighted
) -> None:
    into.add("power", index, _full(w * (base.concentration.double() + 1), index))
    into.add("slope", index, _full(w * _inverse_gamma_scale(base), index))


def _inverse_gamma_scale(base: Any) -> Tensor:
    rate = base.rate if hasattr(base, "rate") else base.base_dist.rate
    return torch.as_tensor(rate).double()


def _gamma_on_scale(
    base: Any, w: Tensor, index: Tensor, _b: Any, into: Statistics, term: Weighted
) -> None:
    into.add("scale n", index, _full(2 * w * (base.concentration.double() - 1), index))
    into.add("scale second", index, _full(2 * w * base.rate.double(), index))


def _inverse_gamma_on_scale(
    base: Any, w: Tensor, index: Tensor, _b: Any, into: Statistics, term: Weighted
) -> None:
    into.add("scale n", index, _full(2 * w * (base.concentration.double() + 1), index))
    into.add("scale second", index, _full(2 * w * _inverse_gamma_scale(base), index))


def _normal(
    base: Any, w: Tensor, index: Tensor, b: Mapping[Key, Binding], into: Statistics, term: Weighted
) -> None:
    """N(θ | m, s): the datum m, seen once under the scale s, which may be a parameter too."""
    device, shape = index.device, index.shape
    residual = (base.loc.double() - term.value.detach().double()).expand(shape).flatten()
    weight = w.expand(shape).flatten()
    scale = _scale(b, term, "scale")
    ones = torch.ones(index.numel(), dtype=torch.float64, device=device)
    into.add_cells(
        "normal",
        Cells(
            torch.stack([index.flatten(), scale.index.to(device).expand(shape).flatten()], 1),
            {
                "loc": term.value.detach().double().expand(shape).flatten(),
                "loc_coefficient": ones,
                "scale": base.scale.double().expand(shape).flatten(),
                "scale_coefficient": scale.coefficient.to(device).expand(shape).flatten(),
            },
            {"n": weight, "first": weight * residual, "second": weight * residual**2},
        ),
    )


def _mvn(
    base: Any, w: Tensor, index: Tensor, b: Mapping[Key, Binding], into: Statistics, term: Weighted
) -> None:
    """N(θ | m, S): the datum m, seen once under S, which may be a multiple of a parameter."""
    device, D = index.device, index.shape[-1]
    batch = index.shape[:-1]
    tril = _scale(b, term, "scale_tril")
    residual = (base.loc - term.value.detach()).double().expand(index.shape).reshape(-1, D)
    weight = w.expand(batch).flatten()
    matrix = base._unbroadcasted_scale_tril.double()
    pattern = tril.index.to(device).expand((*batch, D, D)).reshape(-1, D * D)
    coefficient = tril.coefficient[..., 0, 0].to(device).expand(batch).flatten()
    first = weight[:, None] * residual
    into.add_cells(
        f"mvn {D}",
        Cells(
            torch.cat([index.reshape(-1, D), pattern], 1),
            {
                "loc": term.value.detach().double().expand(index.shape).reshape(-1, D),
                "loc_coefficient": torch.ones_like(residual),
                "tril": matrix.expand((*batch, D, D)).reshape(-1, D, D),
                "tril_coefficient": coefficient,
            },
            {
                "n": weight,
                "first": first,
                "second": first.unsqueeze(-1) * residual.unsqueeze(-2),
            },
        ),
    )


def _matrix_cells(index: Tensor, n: Tensor, second: Tensor, into: Statistics) -> None:
    D = index.shape[-1]
    pattern = torch.where(
        torch.ones(D, D, dtype=torch.bool, device=index.device).tril(), index, -1
    ).reshape(-1, D * D)
    count = len(pattern)
    nowhere = torch.full((count, D), -1, device=index.device)
    zeros = torch.zeros((count, D), dtype=torch.float64, device=index.device)
    eye = torch.eye(D, dtype=torch.float64, device=index.device)
    into.add_cells(
        f"mvn {D}",
        Cells(
            torch.cat([nowhere, pattern], 1),
            {
                "loc": zeros,
                "loc_coefficient": torch.ones_like(zeros),
                "tril": eye.expand(count, D, D),
                "tril_coefficient": zeros.new_ones(count),
            },
            {
                "n": n.double().expand(index.shape[:-2]).reshape(count),
                "first": zeros,
                "second": second.double().expand(index.shape).reshape(count, D, D),
            },
        ),
    )


def _inverse_wishart(
    base: Any, w: Tensor, index: Tensor, _b: Any, into: Statistics, term: Weighted
) -> None:
    D = index.shape[-1]
    psi = base.scale_matrix.double()
    _matrix_cells(index, w * (base.df.double() + D + 1), w[..., None, None] * psi, into)


def _wishart(
    base: Any, w: Tensor, index: Tensor, _b: Any, into: Statistics, term: Weighted
) -> None:
    D = index.shape[-1]
    inverse = torch.linalg.inv(base.covariance_matrix.double())
    _matrix_cells(index, w * (base.df.double() - D - 1), w[..., None, None] * inverse, into)


_ADD: dict[tuple[str, str, str], Add] = {
    ("Dirichlet", "simplex", "θ"): _dirichlet,
    ("Beta", "probability", "θ"): _beta,
    ("Gamma", "rate", "θ"): _gamma_on_rate,
    ("Exponential", "rate", "θ"): lambda base, w, i, b, into, t: into.add(
        "slope", i, _full(w * base.rate.double(), i)
    ),
    ("InverseGamma", "rate", "1/θ"): _inverse_gamma_on_rate,
    ("Gamma", "scale", "1/√θ"): _gamma_on_scale,
    ("InverseGamma", "scale", "√θ"): _inverse_gamma_on_scale,
    ("Normal", "location", "θ"): _normal,
    ("MultivariateNormal", "location", "θ"): _mvn,
    ("InverseWishart", "cholesky", "chol θ"): _inverse_wishart,
    ("Wishart", "cholesky", "chol θ⁻¹"): _wishart,
}

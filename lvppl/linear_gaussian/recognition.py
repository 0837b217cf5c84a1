r"""Which latents of a program are linear-Gaussian, and what each of its sites says of them.

Every Normal site has a residual, value less location. The program is run at the centre of the
latents, once for each direction of a latent that no other direction shares a site with, and at two
random points. The first runs give w_0 and the columns of J,

.. math:: w(x) = L^{-1} (v(x) - loc(x)) = w_0 + J x ,

the last whether that is so: a location that is not affine, a scale that moves, a site of another
family that depends on a latent, elements of a plate that depend on each other are all refused by
name. Values are differentiable in the parameters of the program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lvppl.enumerated import is_one, require_no_sequential_subsample, user_scale
from lvppl.errors import ProgramError
from lvppl.layout import Layout
from lvppl.linear_gaussian.affine import AffineSite, Discrete, law_of, move_of
from lvppl.linear_gaussian.factors import Residual, in_one_dtype
from lvppl.linear_gaussian.placing import Placed, gaussian_law
from lvppl.linear_gaussian.variables import Variable, variables_of
from lvppl.packing import Packing
from lvppl.replay import Replay
from lvppl.tracing import kind_of, plates_of

__all__ = ["recognised"]

MOST_DIRECTIONS = 2**12
"""Runs of the program."""

_PROBES = (1.7, -1.7, 1e3, -1e3)
"""How far out, in deviations of the prior: what is bent may be straight nearby, or on one side."""

Run = Callable[[Mapping[str, Tensor]], dict[str, Any]]
"""Values of latents to the sites of a run."""


def recognised(
    base: Replay,
    placed: Placed,
    program: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    packing: Packing,
    around: Discrete,
    temperature: float,
) -> tuple[dict[str, Variable], list[Residual]]:
    """The Gaussian latents of a program, and the residuals of the sites that depend on them.

    Args:
        base: a run under ``placed``.
        program: as it ran there, without ``placed``.
        packing: what dimensions are called.
        around: of every discrete latent.
        temperature: residuals are those of the density to the power 1 / temperature.

    Raises:
        ProgramError: by latent and site, where they are not linear-Gaussian.
    """
    sites = base.model_sites
    for site in sites.values():
        _require_no_nan(site)
    with torch.enable_grad():
        scopes = _scopes(base, placed)
    variables = variables_of(sites, scopes, placed.frames)
    for name, scope in scopes.items():
        _require_whole(sites[name], [variables[v] for v in scope], base.layout)

    def run(values: Mapping[str, Tensor]) -> dict[str, Any]:
        there = placed.at(values)(program)
        return Replay(there, None, args, kwargs, base.layout, None, False, False).model_sites

    affine = _affine_sites(run, sites, scopes, variables)
    for number in range(len(_PROBES)):
        _require_as_read(run, base, affine, variables, number)
    residuals = [s.residual(base, packing, around, temperature) for s in affine.values()]
    return variables, in_one_dtype(residuals)


def _affine_sites(
    run: Run,
    sites: Mapping[str, Any],
    scopes: Mapping[str, Sequence[str]],
    variables: Mapping[str, Variable],
) -> dict[str, AffineSite]:
    """The columns of J of every site, from one run for each direction."""
    starts, count = _directions(variables, scopes)
    centre = {name: sites[name]["value"].detach() for name in variables}
    laws = {name: law_of(sites[name]) for name in scopes}
    columns: dict[str, dict[str, list[Tensor]]] = {
        name: {v: [] for v in scope} for name, scope in scopes.items()
    }
    for direction in range(count):
        moving = {
            name: direction - starts[name]
            for name, variable in variables.items()
            if 0 <= direction - starts[name] < variable.size
        }
        at = {name: variables[name].value(_along(variables[name], i)) for name, i in moving.items()}
        found = run({**centre, **at})
        for name, scope in scopes.items():
            for moved in moving.keys() & set(scope):  # one at most: those that meet do not share
                columns[name][moved].append(move_of(sites[name], laws[name], found[name]))
    return {
        name: AffineSite(
            sites[name],
            laws[name],
            [variables[v] for v in scope],
            laws[name].spread,
            {v: torch.stack(columns[name][v], -1) for v in scope},
        )
        for name, scope in scopes.items()
    }


def _require_as_read(
    run: Run,
    base: Replay,
    affine: Mapping[str, AffineSite],
    variables: Mapping[str, Variable],
    number: int,
) -> None:
    """Refuse a program that is not, at a random point, what was read off it.

    Raises:
        ProgramError: by site and latent.
    """
    points = {name: _random(v, number, place) for place, (name, v) in enumerate(variables.items())}
    found = run({name: variables[name].value(x) for name, x in points.items()})
    for name, site in base.model_sites.items():
        if name in affine:
            affine[name].require(found[name], points)
        else:
            _require_same(base, site, found[name], variables)


# ------------------------------------------------------------------------------ what meets what


def _scopes(base: Replay, placed: Placed) -> dict[str, tuple[str, ...]]:
    """The sites that depend on Gaussian latents, and on which, by a derivative at the centre."""
    sites = base.model_sites
    names = [name for name in placed.values if name in sites]
    leaves = [placed.values[name] for name in names]
    generator = torch.Generator().manual_seed(3)
    found = {}
    for name, site in sites.items():
        law = gaussian_law(site["fn"])
        outputs = [base.log_prob(site)] if law is None else [law.location, law.spread]
        weighed = torch.stack([_weighed(output, generator) for output in outputs]).sum()
        scope = [name] if name in names else []
        if weighed.requires_grad:
            grads = torch.autograd.grad(weighed, leaves, allow_unused=True, retain_graph=True)
            slopes = zip(names, grads, strict=True)
            scope += [n for n, g in slopes if g is not None and bool((g != 0).any())]
        if scope and law is None:
            raise ProgramError(
                f"Latent '{scope[0]}' is Gaussian, but '{name}' ({kind_of(site['fn'])}) depends on "
                "it: its integral has no closed form. Give it a guide (lvppl.SVI, "
                "lvppl.log_likelihood with estimator='importance'), make it a parameter "
                "(pyro.param), or replace it by a finite grid of values."
            )
        if scope:
            found[name] = tuple(dict.fromkeys(scope))
    return found


def _weighed(output: Tensor, generator: torch.Generator) -> Tensor:
    """A sum in which no two derivatives cancel."""
    weight = torch.rand(output.shape, generator=generator, dtype=torch.float64) + 0.5
    return (output * weight.to(output)).sum()


def _require_no_nan(site: Any) -> None:
    value = site["value"]
    if site["is_observed"] and isinstance(value, Tensor) and bool(value.isnan().any()):
        raise ProgramError(
            f"Site '{site['name']}' observes nan: a missing value has no density. "
            'missing="nan" takes it for one; otherwise fill it and mask it.'
        )


def _require_whole(site: Any, scope: Sequence[Variable], layout: Layout) -> None:
    """A poutine.scale or a subsample would make another power of the density."""
    name = site["name"]
    if not is_one(user_scale(site)):
        raise ProgramError(
            f"Site '{name}' has a poutine.scale and depends on the Gaussian latent "
            f"'{scope[0].name}', which is integrated: the scale would stand inside the integral. "
            "Leave the scale out."
        )
    require_no_sequential_subsample(site)
    for plate in plates_of(site):
        if plate.name in layout.subsampled_inside and plate.size < plate.full_size:
            for variable in scope:
                if plate.name not in {p.name for p in variable.kept}:
                    raise ProgramError(
                        f"Plate '{plate.name}' is subsampled, and the Gaussian latent "
                        f"'{variable.name}' outside it is integrated: the scale of the subsample "
                        "would stand inside the integral. Use the full data, or draw the latent in "
                        "a guide."
                    )


# ------------------------------------------------------------------------------------ directions


def _directions(
    variables: Mapping[str, Variable], scopes: Mapping[str, Sequence[str]]
) -> tuple[dict[str, int], int]:
    """Where the directions of each latent begin, and how many there are.

    Latents that meet in no site share directions: their columns of J are in different rows.
    """
    neighbours: dict[str, set[str]] = {name: set() for name in variables}
    for scope in scopes.values():
        for name in scope:
            neighbours[name] |= set(scope) - {name}
    starts: dict[str, int] = {}
    for name in sorted(variables, key=lambda n: -len(neighbours[n])):
        taken = sorted(
            (starts[n], starts[n] + variables[n].size) for n in neighbours[name] if n in starts
        )
        start = 0
        for first, last in taken:
            if start + variables[name].size <= first:
                break
            start = max(start, last)
        starts[name] = start
    count = max(starts[n] + v.size for n, v in variables.items())
    if count > MOST_DIRECTIONS:
        largest = max(variables.values(), key=lambda v: v.size)
        raise ProgramError(
            f"The Gaussian latents that meet in one site have {count:,} dimensions together "
            f"('{largest.name}' alone {largest.size:,}); at most {MOST_DIRECTIONS:,} are "
            "integrated exactly. Put independent elements into a pyro.plate that the sites which "
            "depend on them share, or give the latents a guide."
        )
    return starts, count


def _along(variable: Variable, direction: int) -> Tensor:
    like = variable.frame.centre
    x = torch.zeros(variable.size, dtype=like.dtype, device=like.device)
    x[direction] = 1.0
    return x.expand(*variable.kept_shape, -1)


def _random(variable: Variable, number: int, place: int) -> Tensor:
    """In general position: what is not affine may be so along axes, or for equal elements."""
    like = variable.frame.centre
    generator = torch.Generator().manual_seed(1000 * place + number // 2)
    x = torch.randn(*variable.kept_shape, variable.size, generator=generator, dtype=torch.float64)
    return (_PROBES[number] * x).to(like)


def _require_same(base: Replay, site: Any, found: Any, variables: Mapping[str, Variable]) -> None:
    """A site on which no derivative was found must not move either."""
    with torch.no_grad():
        here, there = base.log_prob(site), base.log_prob(found)
        same = torch.isclose(here, there, rtol=1e-6, atol=1e-6, equal_nan=True)
    if not bool(same.all()):
        names = ", ".join(f"'{name}'" for name in variables)
        raise ProgramError(
            f"Site '{site['name']}' ({kind_of(site['fn'])}) changes with the Gaussian latents of "
            f"the program ({names}), but not as an affine function or not with a derivative: their "
            "integral has no closed form. Give them a guide (lvppl.SVI, lvppl.log_likelihood with "
            "estimator='importance')."
        )

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

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from lvppl.enumerated import is_one, user_scale
from lvppl.errors import ProgramError
from lvppl.layout import Layout
from lvppl.linear_gaussian.factors import Residual, aligned, common_shape
from lvppl.linear_gaussian.placing import Frame, Law, Placed, gaussian_law
from lvppl.packing import Packing
from lvppl.replay import Replay
from lvppl.tracing import Plate, kind_of, plates_of, unmasked

__all__ = ["Variable", "recognised"]

MOST_DIRECTIONS = 2**12
"""Runs of the program."""


Discrete = Mapping[str, tuple[str, frozenset[str]]]


@dataclass(frozen=True)
class Variable:
    """A Gaussian latent: for each element of the plates that it keeps a vector x."""

    site: Any
    kept: tuple[Plate, ...]
    """Plates along which elements are independent given everything that any of them meets."""
    frame: Frame

    @property
    def name(self) -> str:
        name: str = self.site["name"]
        return name

    @cached_property
    def _order(self) -> tuple[list[int], list[int]]:
        """Dimensions of the value: those of kept plates, then all others."""
        dims = self.frame.centre.dim()
        events = self.site["fn"].event_dim
        kept = [dims - events + plate.dim for plate in self.kept]
        return kept, [i for i in range(dims) if i not in kept]

    @property
    def kept_shape(self) -> tuple[int, ...]:
        return tuple(self.frame.centre.shape[i] for i in self._order[0])

    @property
    def size(self) -> int:
        return math.prod(self.frame.centre.shape[i] for i in self._order[1])

    def value(self, x: Tensor) -> Tensor:
        """The value of the site at x, (*kept, size)."""
        return self.frame.centre + self.frame.unit * self.unpacked(x)

    def unpacked(self, x: Tensor) -> Tensor:
        """(..., *kept, size) as (..., *batch, *event) of the site."""
        kept, others = self._order
        shape, before = self.frame.centre.shape, x.dim() - len(kept) - 1
        x = x.reshape(x.shape[:before] + tuple(shape[i] for i in [*kept, *others]))
        where = {dim: before + position for position, dim in enumerate([*kept, *others])}
        return x.permute([*range(before), *(where[i] for i in range(len(shape)))])

    def covariance(self, C: Tensor) -> Tensor:
        """Of the value within an event, (*batch, d, d), from that of x, (*kept, size, size)."""
        kept, others = self._order
        centre, events = self.frame.centre, self.site["fn"].event_dim
        batch = centre.dim() - events
        apart = [i for i in others if i < batch]
        sizes = [centre.shape[i] for i in apart]
        count, d = math.prod(sizes), centre.shape[batch:].numel()
        blocks = C.reshape(*self.kept_shape, count, d, count, d).diagonal(dim1=-4, dim2=-2)
        blocks = blocks.movedim(-1, -3).reshape(*self.kept_shape, *sizes, d, d)
        where = [[*kept, *apart].index(i) for i in range(batch)]
        unit = self.frame.unit.reshape(*centre.shape[:batch], d)
        return blocks.permute(*where, batch, batch + 1) * unit[..., :, None] * unit[..., None, :]


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
        around: by symbol of a discrete latent, its name and the symbols of its plates.
        temperature: residuals are those of the density to the power 1 / temperature.

    Raises:
        ProgramError: by latent and site, where they are not linear-Gaussian.
    """
    sites = base.model_sites
    with torch.enable_grad():
        scopes = _scopes(base, placed)
    variables = _variables(sites, scopes, placed)
    for name, scope in scopes.items():
        _require_whole(sites[name], [variables[v] for v in scope], base.layout)

    def run(values: Mapping[str, Tensor]) -> dict[str, Any]:
        at = placed.at(values)
        return Replay(at(program), None, args, kwargs, base.layout, None, False, False).model_sites

    starts, count = _directions(variables, scopes)
    centre = {name: sites[name]["value"].detach() for name in variables}
    laws = {name: _law(sites[name]) for name in scopes}
    moves: dict[str, list[Tensor]] = {name: [] for name in scopes}
    for direction in range(count):
        values = dict(centre)
        for name, variable in variables.items():
            if 0 <= direction - starts[name] < variable.size:
                x = _along(variable, direction - starts[name])
                values[name] = variable.value(x)
        found = run(values)
        for name, scope in scopes.items():
            if any(0 <= direction - starts[v] < variables[v].size for v in scope):
                moves[name].append(_move(sites[name], laws[name], found[name]))
            else:
                moves[name].append(torch.zeros(()))
    models = {
        name: _Affine.of(
            sites[name], laws[name], [variables[v] for v in scope], starts, moves[name]
        )
        for name, scope in scopes.items()
    }
    for number in range(2):
        points = {
            name: _random(v, number, place) for place, (name, v) in enumerate(variables.items())
        }
        found = run({name: variables[name].value(x) for name, x in points.items()})
        for name, site in sites.items():
            if name in models:
                models[name].require(found[name], points)
            else:
                _require_same(base, site, found[name], variables)
    return variables, [m.residual(base, packing, around, temperature) for m in models.values()]


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
        output = base.log_prob(site) if law is None else law.location
        scope = [name] if name in names else []
        if output.requires_grad and output.numel():
            weight = torch.rand(output.shape, generator=generator, dtype=torch.float64) + 0.5
            grads = torch.autograd.grad(
                (output * weight.to(output)).sum(), leaves, allow_unused=True, retain_graph=True
            )
            scope += [
                n
                for n, g in zip(names, grads, strict=True)
                if g is not None and bool((g != 0).any())
            ]
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


def _variables(
    sites: Mapping[str, Any], scopes: Mapping[str, Sequence[str]], placed: Placed
) -> dict[str, Variable]:
    """The latents with the plates that they keep.

    A plate is kept if every site that a latent meets lies inside it. Where the plates of two
    latents that meet do not nest (rows and columns of a table), one of them gives up its own.
    """
    kept: dict[str, dict[str, Plate]] = {}
    for name in placed.frames:
        plates = {plate.name: plate for plate in plates_of(sites[name])}
        for site, scope in scopes.items():
            if name in scope:
                around = {plate.name for plate in plates_of(sites[site])}
                plates = {n: plate for n, plate in plates.items() if n in around}
        kept[name] = plates
    changed = True
    while changed:
        changed = False
        for scope in scopes.values():
            for a, b in itertools.combinations(scope, 2):
                if not (kept[a].keys() <= kept[b].keys() or kept[b].keys() <= kept[a].keys()):
                    loser = min((a, b), key=lambda n: math.prod(p.size for p in kept[n].values()))
                    other = kept[b if loser == a else a]
                    kept[loser] = {n: p for n, p in kept[loser].items() if n in other}
                    changed = True
    return {
        name: Variable(
            sites[name], tuple(sorted(plates.values(), key=lambda p: p.dim)), placed.frames[name]
        )
        for name, plates in kept.items()
    }


def _require_whole(site: Any, scope: Sequence[Variable], layout: Layout) -> None:
    """A poutine.scale or a subsample would make another power of the density."""
    name = site["name"]
    if not is_one(user_scale(site)):
        raise ProgramError(
            f"Site '{name}' has a poutine.scale and depends on the Gaussian latent "
            f"'{scope[0].name}', which is integrated: the scale would stand inside the integral. "
            "Leave the scale out."
        )
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
    generator = torch.Generator().manual_seed(1000 * place + number)
    x = torch.randn(*variable.kept_shape, variable.size, generator=generator, dtype=torch.float64)
    return (1.7 * x).to(like)


# ------------------------------------------------------------------------------------- one site


def _law(site: Any) -> Law:
    """Masks take elements of the data out, and leave latents their prior."""
    law = gaussian_law(site["fn"] if site["is_observed"] else unmasked(site["fn"]))
    assert law is not None
    return law


def _move(site: Any, law: Law, moved: Any) -> Tensor:
    """By how much the residual of a site has changed; no difference of large values is taken."""
    other = _law(moved).location - law.location
    if site["is_observed"]:
        return -other
    return (moved["value"] - site["value"]) - other


@dataclass(frozen=True)
class _Affine:
    """The residual of a site as an affine function of the latents of its scope."""

    site: Any
    law: Law
    scope: Sequence[Variable]
    spread: Tensor
    columns: dict[str, Tensor]
    """By latent, before whitening: (*batch of the Normal, *event, size)."""

    @staticmethod
    def of(
        site: Any,
        law: Law,
        scope: Sequence[Variable],
        starts: Mapping[str, int],
        moves: Sequence[Tensor],
    ) -> _Affine:
        columns = {
            v.name: torch.stack(list(moves[starts[v.name] : starts[v.name] + v.size]), -1)
            for v in scope
        }
        return _Affine(site, law, scope, law.spread, columns)

    def require(self, found: Any, points: Mapping[str, Tensor]) -> None:
        """Refuse a site whose residual at a random point is another than J says.

        Raises:
            ProgramError: by site and latent.
        """
        law = _law(found)
        with torch.no_grad():
            actual = _move(self.site, self.law, found)
            predicted, size = torch.zeros_like(actual), actual.abs() + self.law.location.abs()
            for v in self.scope:
                x = self._spread_out(v, points[v.name])
                predicted = predicted + (self.columns[v.name] * x).sum(-1)
                size = size + (self.columns[v.name] * x).abs().sum(-1)
            tolerance = 1e-10 if actual.dtype == torch.float64 else 1e-3
            affine = bool(((actual - predicted).abs() <= tolerance * size).all())
            fixed = torch.allclose(law.spread, self.spread, rtol=tolerance, atol=0.0)
        if affine and fixed:
            return
        names = " and ".join(f"'{v.name}'" for v in self.scope)
        what = "location is not an affine function" if not affine else "scale is a function"
        raise ProgramError(
            f"Site '{self.site['name']}' ({kind_of(self.site['fn'])}) depends on the Gaussian "
            f"latent {names}, but its {what} of it, element by element of its plates: the integral "
            "has no closed form. Give the latent a guide (lvppl.SVI, lvppl.log_likelihood with "
            "estimator='importance'), or make it a parameter (pyro.param)."
        )

    def _spread_out(self, variable: Variable, x: Tensor) -> Tensor:
        """x, (*kept, size), beside the rows of this site: its plates, then ones."""
        rows, width = self.law.rows, -min((p.dim for p in variable.kept), default=0)
        shape = [1] * width
        for plate, size in zip(variable.kept, variable.kept_shape, strict=True):
            shape[plate.dim] = size
        return x.reshape(*shape, *([1] * rows), variable.size)

    def residual(
        self, base: Replay, packing: Packing, around: Discrete, temperature: float
    ) -> Residual:
        """Whitened and packed; plates along which nothing that is integrated or summed varies are
        joined to the rows."""
        law, rows, power = self.law, self.law.rows, temperature**-0.5
        start = self.site["value"] - law.location
        spread, joined = self.spread, self._joined(packing, around)
        mask = self.site["mask"] if self.site["is_observed"] else None
        offset = power * law.whitened(start, spread)
        blocks = [
            power * law.whitened(column, spread)
            for v in self.scope
            for column in self.columns[v.name].unbind(-1)
        ]
        constant = law.log_normaliser(spread) / temperature
        for v in self.scope:
            if v.name == self.site["name"]:  # du = unit dx
                events = tuple(range(-v.site["fn"].event_dim, 0))
                logs = v.frame.unit.log()
                constant = constant + (logs.sum(events) if events else logs)
        tensors = [offset, *blocks]
        if mask is not None:
            inside = torch.as_tensor(mask)
            over = inside.reshape(inside.shape + (1,) * rows)
            tensors = [torch.where(over, t, torch.zeros_like(t)) for t in tensors]
            constant = scale_and_mask(constant, 1.0, mask)
        offset, *blocks = (_rows(base, self.site, t, rows, joined) for t in tensors)
        constant = _rows(base, self.site, constant, 0, joined).sum(-1)
        jacobian = torch.stack(torch.broadcast_tensors(*blocks), -1)
        w, dims = packing.pack(self.site, offset, 1)
        J, own = packing.pack(self.site, jacobian, 2)
        c, last = packing.pack(self.site, constant, 0)
        whole = "".join(dict.fromkeys(dims + own + last))
        parts = [
            aligned(tensor, names, whole, events)
            for tensor, names, events in ((w, dims, 1), (J, own, 2), (c, last, 0))
        ]
        batch = common_shape([t.shape[: len(whole)] for t in parts])
        parts = [t.expand((*batch, *t.shape[len(whole) :])) for t in parts]
        w, J, c = parts
        names, sizes = (v.name for v in self.scope), (v.size for v in self.scope)
        return Residual(self.site["name"], tuple(names), tuple(sizes), w, J, c, whole)

    def _joined(self, packing: Packing, around: Discrete) -> list[int]:
        """Dimensions of plates that hold no latent which the site depends on."""
        kept = {plate.name for v in self.scope for plate in v.kept}
        for symbol in packing.symbols_of(self.site):
            if symbol in around:
                kept |= {packing.plates[s].name for s in around[symbol][1]}
        return [plate.dim for plate in plates_of(self.site) if plate.name not in kept]


def _rows(base: Replay, site: Any, tensor: Tensor, rows: int, joined: Sequence[int]) -> Tensor:
    """(*batch, rows): over the site's plates in full, the joined ones of size one."""
    tensor = base.full(tensor, site, rows)
    batch = tensor.dim() - rows
    moved = [batch + dim for dim in joined]
    shape = [1 if i in moved else n for i, n in enumerate(tensor.shape[:batch])]
    order = [i for i in range(batch) if i not in moved] + moved + [*range(batch, tensor.dim())]
    return tensor.permute(order).reshape(*shape, -1)


def _require_same(base: Replay, site: Any, found: Any, variables: Mapping[str, Variable]) -> None:
    """A site on which no derivative was found must not move either."""
    with torch.no_grad():
        here, there = base.log_prob(site), base.log_prob(found)
        same = torch.isclose(here, there, rtol=1e-6, atol=1e-6, equal_nan=True)
    if not bool(same.all()):
        names = ", ".join(f"'{name}'" for name in variables)
        raise ProgramError(
            f"Site '{site['name']}' ({kind_of(site['fn'])}) changes with the Gaussian latents of "
            f"the program ({names}) in a way that has no derivative: their integral has no closed "
            "form. Give them a guide (lvppl.SVI, lvppl.log_likelihood with "
            "estimator='importance')."
        )

"""A Normal site as an affine function of the latents that it depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.linear_gaussian.factors import Residual, aligned, common_shape
from lvppl.linear_gaussian.placing import Law, gaussian_law
from lvppl.linear_gaussian.variables import Variable
from lvppl.packing import Packing
from lvppl.replay import Replay
from lvppl.tracing import is_masked, kind_of, plates_of, unmasked

__all__ = ["AffineSite", "Discrete", "law_of", "move_of"]

Discrete = Mapping[str, tuple[str, frozenset[str]]]
"""By symbol of a discrete latent, its name and the symbols of its plates."""


@dataclass(frozen=True)
class AffineSite:
    """The residual of a site as an affine function of the latents of its scope."""

    site: Any
    law: Law
    scope: Sequence[Variable]
    spread: Tensor
    columns: dict[str, Tensor]
    """By latent, before whitening: (*batch of the Normal, *event, size)."""

    def require(self, found: Any, points: Mapping[str, Tensor]) -> None:
        """Refuse a site whose residual at a random point is another than J says.

        Raises:
            ProgramError: by site and latent.
        """
        law = law_of(found)
        if self.site["is_observed"] and not torch.equal(self.site["value"], found["value"]):
            raise ProgramError(
                f"Site '{self.site['name']}' observes a value that depends on the Gaussian latent "
                f"'{self.scope[0].name}', which is to be integrated. Observe data, and move what "
                "depends on the latent into the distribution."
            )
        with torch.no_grad():
            actual = move_of(self.site, self.law, found)
            predicted, size = torch.zeros_like(actual), actual.abs() + self.law.location.abs()
            for v in self.scope:
                x = self._spread_out(v, points[v.name])
                predicted = predicted + (self.columns[v.name] * x).sum(-1)
                size = size + (self.columns[v.name] * x).abs().sum(-1)
            tolerance = 1e-10 if self._is_double else 1e-3
            affine = bool(((actual - predicted).abs() <= tolerance * size).all())
            fixed = torch.allclose(law.spread, self.spread, rtol=tolerance, atol=0.0)
        if affine and fixed:
            self._require_normal(found, law)
            return
        names = " and ".join(f"'{v.name}'" for v in self.scope)
        what = "location is not an affine function" if not affine else "scale is a function"
        raise ProgramError(
            f"Site '{self.site['name']}' ({kind_of(self.site['fn'])}) depends on the Gaussian "
            f"latent {names}, but its {what} of it, element by element of its plates: the integral "
            "has no closed form. Give the latent a guide (lvppl.SVI, lvppl.log_likelihood with "
            "estimator='importance'), or make it a parameter (pyro.param)."
        )

    @property
    def _is_double(self) -> bool:
        """Whether nothing of the site was computed in single precision."""
        tensors = [self.law.location, self.spread, *(v.frame.centre for v in self.scope)]
        return all(t.dtype == torch.float64 for t in tensors)

    def _require_normal(self, found: Any, law: Law) -> None:
        """Refuse a mask that moves, and a subclass of Normal that has another density."""
        masks = [(law.mask, self.law.mask), (found["mask"], self.site["mask"])]
        same = not self.site["is_observed"] or all(_equal(*pair) for pair in masks)
        with torch.no_grad():
            fn = found["fn"] if found["is_observed"] else unmasked(found["fn"])
            squares = law.whitened(found["value"] - law.location, law.spread).square()
            squares = squares.sum(tuple(range(-law.rows, 0))) if law.rows else squares
            expected, actual = (
                law.log_normaliser(law.spread) - 0.5 * squares,
                fn.log_prob(found["value"]),
            )
            tolerance = 1e-8 if self._is_double else 1e-3
            normal = (actual - expected).abs() <= tolerance * (1 + expected.abs() + squares)
        if same and bool(normal.all()):
            return
        what = "another density than a Normal has" if same else "a mask that depends on it"
        raise ProgramError(
            f"Site '{self.site['name']}' ({kind_of(self.site['fn'])}) depends on the Gaussian "
            f"latent '{self.scope[0].name}' and has {what}: the integral has no closed form. Give "
            "the latent a guide (lvppl.SVI, lvppl.log_likelihood with estimator='importance')."
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
        if temperature != 1.0 and not self.site["is_observed"] and is_masked(self.site):
            raise ProgramError(
                f"The Gaussian latent '{self.site['name']}' is masked, which has no meaning at a "
                "temperature other than 1. Leave the mask out."
            )
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


def _equal(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(*torch.broadcast_tensors(torch.as_tensor(one), torch.as_tensor(other)))


def law_of(site: Any) -> Law:
    """Masks take elements of the data out, and leave latents their prior."""
    law = gaussian_law(site["fn"] if site["is_observed"] else unmasked(site["fn"]))
    assert law is not None
    return law


def move_of(site: Any, law: Law, moved: Any) -> Tensor:
    """By how much the residual of a site has changed; no difference of large values is taken."""
    other = law_of(moved).location - law.location
    if site["is_observed"]:
        return -other
    return (moved["value"] - site["value"]) - other

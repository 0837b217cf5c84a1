"""K Gaussians over one matrix of data: what a program says of them, and their statistics as cells.

The kernel (:mod:`~lvppl.mixtures`) knows neither programs nor parameters; this is
what stands between, for mixtures and for hidden Markov models alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from lvppl.inference.m_step.bindings import Binding, Bound, Key
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.statistics import Statistics
from lvppl.inference.m_step.weighted import unexpanded
from lvppl.mixtures import MixtureStatistics

__all__ = ["Gaussians", "add_gaussians", "gaussians_of", "scale_is_free"]


@dataclass(frozen=True)
class Gaussians:
    """K Gaussians in D dimensions, as the kernel takes them.

    Attributes:
        covariance: one of the kernel's names.
        loc: (K, D).
        scale: as the kernel says for this covariance.
        scalar: the program's values are numbers, not vectors of length one.
        plate: its arguments have a dimension of size 1 for the data, right of the components.
    """

    covariance: str
    loc: Tensor
    scale: Tensor
    scalar: bool
    plate: bool

    def by_component(self, value: Tensor, *event: int) -> Tensor:
        """An argument's tensor, whatever of it is shared, as (K, *event)."""
        value = _wide(value.unsqueeze(-1) if self.scalar else value, len(event), self.plate)
        return value.squeeze(1).expand(len(self.loc), *event)


def _wide(value: Tensor, event_dims: int, plate: bool) -> Tensor:
    """An argument with exactly one dimension for components, one for data, and its event."""
    wanted = event_dims + 1 + plate
    value = value.reshape((1,) * (wanted - value.dim()) + value.shape)
    return value if plate else value.unsqueeze(1)


def gaussians_of(base: Any, count: int, event_dim: int, *, plate: bool = True) -> Gaussians | None:
    """A peeled distribution as K Gaussians; ``None`` where it is none.

    Args:
        base: Normal or MultivariateNormal, its components on the left.
        count: K.
        event_dim: of the site: 0 for numbers, 1 for vectors.
        plate: whether the data's plate comes next; it must not change the arguments.
    """
    if isinstance(base, td.MultivariateNormal):
        return _full(base, count, plate)
    return _diag(base, count, event_dim, plate) if isinstance(base, td.Normal) else None


def _full(base: Any, K: int, plate: bool) -> Gaussians | None:
    loc, tril = unexpanded(base.loc, 1), unexpanded(base._unbroadcasted_scale_tril, 2)
    D = loc.shape[-1]
    if loc.dim() > 2 + plate or tril.dim() > 3 + plate:
        return None
    loc, tril = _wide(loc, 1, plate), _wide(tril, 2, plate)
    if loc.shape != (K, 1, D):
        return None
    if tril.shape == (K, 1, D, D):
        return Gaussians("full", loc[:, 0], tril[:, 0], False, plate)
    if tril.shape[:-2].numel() == 1:
        return Gaussians("tied", loc[:, 0], tril.reshape(D, D), False, plate)
    return None


def _diag(base: Any, K: int, event_dim: int, plate: bool) -> Gaussians | None:
    loc, scale = unexpanded(base.loc), unexpanded(base.scale)
    if event_dim == 0:
        loc, scale = loc.unsqueeze(-1), scale.unsqueeze(-1)
    D = loc.shape[-1]
    if event_dim > 1 or max(loc.dim(), scale.dim()) > 2 + plate:
        return None
    loc, scale = _wide(loc, 1, plate), _wide(scale, 1, plate)
    if loc.shape != (K, 1, D) or scale.shape[1] != 1:
        return None
    loc, scale, scalar = loc[:, 0], scale[:, 0], event_dim == 0
    if scale.numel() == 1:
        return Gaussians("unit", loc, scale.reshape(()), scalar, plate)
    if scale.shape == (K, 1) and D > 1:
        return Gaussians("spherical", loc, scale[:, 0], scalar, plate)
    return Gaussians("diag", loc, scale.expand(K, D), scalar, plate)


def scale_is_free(bindings: Mapping[Key, Binding], site: str, covariance: str) -> bool:
    """Whether second moments are wanted."""
    name = "scale_tril" if covariance in ("full", "tied") else "scale"
    binding = bindings.get((site, name))
    return not (isinstance(binding, Bound) and binding.is_constant)


def add_gaussians(
    bindings: Mapping[Key, Binding],
    site: str,
    gaussians: Gaussians,
    found: MixtureStatistics,
    into: Statistics,
) -> None:
    """The kernel's statistics as cells of the entries that the site's arguments are bound to."""
    device, (K, D) = found.first.device, found.first.shape
    loc = bindings[site, "loc"]
    assert isinstance(loc, Bound)
    loc_index = gaussians.by_component(loc.index, D).to(device)
    loc_coefficient = gaussians.by_component(loc.coefficient, D).to(device)
    if gaussians.covariance in ("full", "tied"):
        tril = bindings[site, "scale_tril"]
        assert isinstance(tril, Bound)
        index = gaussians.by_component(tril.index, D, D).to(device).reshape(K, D * D)
        coefficient = gaussians.by_component(tril.coefficient, D, D).to(device)[:, 0, 0]
        # tied: the kernel sums over k; all cells share the matrix, so any split will do
        second = found.second if gaussians.covariance == "full" else found.second / K
        into.add_cells(
            f"mvn {D}",
            Cells(
                torch.cat([loc_index, index], 1),
                {
                    "loc": gaussians.loc.double(),
                    "loc_coefficient": loc_coefficient,
                    "tril": gaussians.scale.double().expand(K, D, D),
                    "tril_coefficient": coefficient,
                },
                {"n": found.counts, "first": found.first, "second": second.expand(K, D, D)},
            ),
        )
        return
    scale = bindings[site, "scale"]
    assert isinstance(scale, Bound)
    second = found.second
    if second.dim() == 1:  # summed over features, which share the scale: any split will do
        second = (second / D).unsqueeze(-1)
    widths = gaussians.scale.double()
    widths = widths.unsqueeze(-1) if widths.dim() == 1 else widths

    def flat(value: Tensor) -> Tensor:
        return value.to(device).expand(K, D).reshape(-1)

    into.add_cells(
        "normal",
        Cells(
            torch.stack([flat(loc_index), flat(gaussians.by_component(scale.index, D))], 1),
            {
                "loc": flat(gaussians.loc.double()),
                "loc_coefficient": flat(loc_coefficient),
                "scale": flat(widths),
                "scale_coefficient": flat(gaussians.by_component(scale.coefficient, D)),
            },
            {
                "n": flat(found.counts.unsqueeze(-1)),
                "first": flat(found.first),
                "second": flat(second.nan_to_num(0.0)),
            },
        ),
    )

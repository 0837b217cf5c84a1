r"""Latents as coordinates: unconstrained vectors, and digits that number finite values.

A continuous site z with support S is written z = b(u), b the bijection from real vectors to S, so
that the density of u is

.. math:: \ln \tilde p(u) = \ln p(b(u)) + \ln |\det b'(u)|.

Bijections are taken at the site as it runs: a support may depend on what was drawn before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to

from lvppl.errors import ProgramError
from lvppl.layout import Layout
from lvppl.sweep.states import FiniteLatent, state_space
from lvppl.tracing import is_discrete, is_enumerated, kind_of, plates_of, support_of, unmasked

__all__ = ["Coordinates", "Place", "PlaceValues", "Unmask"]

_REMEDY = (
    "Annealing moves continuous latents by their gradient and finite ones by Gibbs steps. Mark the "
    "site for enumeration where it can be summed, truncate it to a finite support, or give it a "
    "guide and use estimator='importance'."
)


@dataclass(frozen=True)
class _Block:
    """The coordinates of one site: shapes without the chains' dimension."""

    name: str
    batch: tuple[int, ...]
    """Batch dimensions from the particle plate rightwards, as many as plates nest."""
    event: tuple[int, ...]
    """Event shape of the coordinates."""
    data_dims: tuple[int, ...]
    """Which of ``batch`` are data plates."""
    dtype: torch.dtype
    finite: FiniteLatent | None
    """The values that digits number; ``None`` for a continuous site."""

    @property
    def size(self) -> int:
        """Coordinates of one datum."""
        return math.prod(s for i, s in enumerate(self.batch) if i not in self.data_dims) * (
            math.prod(self.event)
        )

    @property
    def _order(self) -> list[int]:
        """Dimensions of a site's tensor, the chains' first, then the data's."""
        data = [1 + i for i in self.data_dims]
        return [0, *data, *(i for i in range(1, 1 + len(self.shape)) if i not in data)]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch + self.event

    def flat(self, tensor: Tensor) -> Tensor:
        """(chains, *batch, *event) to (chains, data, size)."""
        data = math.prod(self.batch[i] for i in self.data_dims)
        return tensor.permute(self._order).reshape(len(tensor), data, self.size)

    def shaped(self, flat: Tensor) -> Tensor:
        """The inverse of :meth:`flat`."""
        order = self._order
        sizes = (len(flat), *self.shape)
        inverse = [order.index(i) for i in range(len(order))]
        return flat.reshape([sizes[i] for i in order]).permute(inverse)


class Coordinates:
    """The coordinates of every drawn site: vectors (chains, data, n), digits (chains, data, E).

    Args:
        sites: messages of the sites that a run with a particle plate drew.
        layout: of the program.

    Raises:
        ProgramError: a site is neither finite nor the image of a real vector; its ln p is scaled; a
            guide enumerates it.
    """

    def __init__(self, sites: Sequence[Any], layout: Layout, data_scale: float) -> None:
        blocks = [_block(site, layout, data_scale) for site in sites]
        self.vectors = {b.name: b for b in blocks if b.finite is None}
        self.digits = {b.name: b for b in blocks if b.finite is not None}
        self.radices = [
            len(b.finite.support) for b in self.digits.values() if b.finite for _ in range(b.size)
        ]

    @property
    def num_continuous(self) -> int:
        """n, of one datum."""
        return sum(block.size for block in self.vectors.values())

    def read(self, sites: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Vectors and digits of the values that sites have."""
        vectors = [
            block.flat(_vector(unmasked(sites[name]["fn"]), sites[name]["value"]))
            for name, block in self.vectors.items()
        ]
        digits = [
            block.flat(_number(sites[name]["value"], block.finite))
            for name, block in self.digits.items()
            if block.finite is not None
        ]
        return _joined(vectors, digits, torch.get_default_dtype()), _joined(
            digits, vectors, torch.int64
        )


def _joined(parts: list[Tensor], others: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Along the last dimension; of length zero, like the others, where there are none."""
    if parts:
        return torch.cat(parts, -1)
    if not others:
        return torch.zeros(1, 1, 0, dtype=dtype)
    return others[0].new_zeros((*others[0].shape[:2], 0), dtype=dtype)


# --------------------------------------------------------------------------- from sites to blocks


def _block(site: Any, layout: Layout, data_scale: float) -> _Block:
    name, fn, width = site["name"], unmasked(site["fn"]), layout.nesting + 1
    _refuse(site, data_scale)
    batch = tuple(fn.batch_shape)[-layout.nesting :] if layout.nesting else ()
    finite, event = None, tuple(fn.event_shape)
    if is_discrete(site):
        finite = _finite(site, layout)
        event = event[: finite.event_dims]
    else:
        _check_bijection(site)
        event = tuple(_vector(fn, site["value"]).shape[width:])
    data_dims = tuple(layout.nesting + plate.dim for plate in layout.data_plates)
    return _Block(name, batch, event, data_dims, site["value"].dtype, finite)


def _refuse(site: Any, data_scale: float) -> None:
    name = site["name"]
    if is_enumerated(site):
        raise ProgramError(
            f"Site '{name}' is enumerated in the guide. Annealed chains hold one value of each "
            "site of the guide: leave the mark out there, or leave the site to the model, which "
            "sums it."
        )
    scale = site["scale"] / data_scale
    if isinstance(scale, Tensor) or not math.isclose(scale, 1.0, rel_tol=1e-9):
        raise ProgramError(
            f"The log-probability of latent '{name}' is scaled (poutine.scale), so that it is no "
            "density that chains could start from. Leave the scale out."
        )


def _finite(site: Any, layout: Layout) -> FiniteLatent:
    try:
        return state_space([site], layout).latents[0]
    except ProgramError as error:
        raise ProgramError(
            f"Latent '{site['name']}' ({kind_of(site['fn'])}) is discrete without a finite "
            f"support. {_REMEDY}"
        ) from error


def _bijection(fn: Any) -> Any:
    """From real vectors to the support of a distribution; ``None`` for angles, which wrap."""
    return None if kind_of(fn) == "VonMises" else biject_to(fn.support)


def _vector(fn: Any, value: Tensor) -> Tensor:
    """The unconstrained coordinates of a value."""
    bijection = _bijection(fn)
    return value if bijection is None else bijection.inv(value)


def _check_bijection(site: Any) -> None:
    try:
        assert support_of(site["fn"]) is not None
        _bijection(unmasked(site["fn"]))
    except (AssertionError, NotImplementedError) as error:
        raise ProgramError(
            f"Latent '{site['name']}' ({kind_of(site['fn'])}) has a support for which torch "
            f"knows no map from real vectors (biject_to). {_REMEDY}"
        ) from error


def _number(value: Tensor, latent: FiniteLatent) -> Tensor:
    """Which value of its support each element has, int64."""
    support = latent.support
    event = support.dim() - 1
    lead = value.shape[: value.dim() - event]
    same = value.reshape(*lead, 1, *support.shape[1:]) == support
    return same.reshape(*lead, len(support), -1).all(-1).long().argmax(-1)


# ----------------------------------------------------------------------------------------- in runs


class Unmask(Messenger):
    """Takes masks off latents: they keep the probabilities that their draws have.

    A masked element of a latent is drawn all the same. Without its probability the chains would
    move it on an infinite line.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not is_enumerated(msg):
            msg["mask"] = None
            msg["fn"] = unmasked(msg["fn"])


class Place(Unmask):
    """Gives drawn sites the values that coordinates stand for; gradients flow to the vectors.

    Attributes:
        log_det: ln |det dz/du| by site, batch-shaped, as the program has run.

    Args:
        coordinates: of the program.
        vectors: (chains, data, n).
        digits: (chains, data, E), int64.
    """

    def __init__(self, coordinates: Coordinates, vectors: Tensor, digits: Tensor) -> None:
        super().__init__()
        self.log_det: dict[str, Tensor] = {}
        self.values: dict[str, Callable[[Any], Tensor]] = {}
        for blocks, state, value in (
            (coordinates.vectors, vectors, self._continuous),
            (coordinates.digits, digits, self._finite),
        ):
            sizes = [block.size for block in blocks.values()]
            for block, own in zip(blocks.values(), state.split(sizes, -1), strict=True):
                self.values[block.name] = _later(value, block, own)

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["done"] or msg["is_observed"] or msg["name"] not in self.values:
            return
        msg["value"] = self.values[msg["name"]](msg["fn"])
        msg["done"] = True

    def _continuous(self, block: _Block, own: Tensor, fn: Any) -> Tensor:
        u = block.shaped(own.to(block.dtype))
        bijection = _bijection(fn)
        if bijection is None:
            return (u + math.pi).remainder(2 * math.pi) - math.pi
        value: Tensor = bijection(u)
        log_det = bijection.log_abs_det_jacobian(u, value)
        batch = 1 + len(block.batch)
        if value.dim() != batch + fn.event_dim:
            raise ProgramError(
                f"The support of latent '{block.name}' depends on a site that is marked for "
                "enumeration, so that no coordinates serve all its values. Leave the mark out: "
                "Gibbs steps move finite latents."
            )
        self.log_det[block.name] = (
            log_det.flatten(batch).sum(-1) if log_det.dim() > batch else (log_det)
        )
        return value

    def _finite(self, block: _Block, own: Tensor, fn: Any) -> Tensor:
        assert block.finite is not None
        return block.finite.support[block.shaped(own)]


class PlaceValues(Unmask):
    """Gives latents values of their own support.

    Args:
        values: by site, (*plates, *event), the same for all chains, or (chains, *plates, *event).
        nesting: batch dimensions that plates occupy, the particle plate left out.
    """

    def __init__(self, values: Mapping[str, Tensor], nesting: int) -> None:
        super().__init__()
        self.values = values
        self.nesting = nesting

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["done"] or msg["is_observed"] or msg["name"] not in self.values:
            return
        value, fn = self.values[msg["name"]], msg["fn"]
        alone = max((-plate.dim for plate in plates_of(msg)), default=0) + fn.event_dim
        if value.dim() == alone + 1:
            pad = (1,) * (self.nesting + fn.event_dim - alone)
            value = value.reshape(value.shape[:1] + pad + value.shape[1:])
        try:
            msg["value"] = value.expand(fn.shape())
        except RuntimeError as error:
            raise ProgramError(
                f"The draw of '{msg['name']}' has shape {tuple(self.values[msg['name']].shape)}; "
                f"expected {tuple(fn.shape())[self.nesting + 1 - alone + fn.event_dim :]}, or that "
                f"behind a dimension of {fn.shape()[0]} chains."
            ) from error
        msg["done"] = True


def _later(value: Callable[..., Tensor], block: _Block, own: Tensor) -> Callable[[Any], Tensor]:
    return lambda fn: value(block, own, fn)

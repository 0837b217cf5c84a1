"""Which maxima move with other parameters, so that an M-step finds each only given the others.

A parameter is *separated* where the value that an M-step sets it to is that of the joint maximum of
Q over all parameters. A location is, where the scale it stands under cancels; a scale is, where the
locations that its deviations are from are. Anything else that has a formula is maximised
conditionally: Q does not fall, and is stationary in it only once the others stand still.

Source: Meng and Rubin 1993, "Maximum likelihood estimation via the ECM algorithm: a general
framework".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvppl.inference.m_step.arguments import Affine, Binding, Bound, Key, Unbound, Use
from lvppl.inference.m_step.entries import Parameters
from lvppl.inference.m_step.regressions import Group
from lvppl.inference.m_step.weighted import sum_to

__all__ = ["Separation"]

_NOTHING = torch.tensor(-1)
"""The index of what is not an entry."""


@dataclass(frozen=True)
class Separation:
    """What of a program says which parameters meet in it.

    Attributes:
        parameters: of the program.
        batches: the bindings of each batch where they depend on the data, else one.
        roles: of arguments.
        uses: by parameter.
        groups: the parameters of each regression.
        latents: those of the parameters that have a prior.
    """

    parameters: Parameters
    batches: Sequence[Mapping[Key, Binding]]
    roles: Mapping[Key, str]
    uses: Mapping[str, Sequence[Use]]
    groups: Sequence[Group]
    latents: frozenset[str]

    def conditional(self, by_formula: set[str]) -> set[str]:
        """Of parameters that have a formula, those that are maximised given other parameters."""
        met = {name for name in by_formula if self._moves(name)}
        return met | {name for name in by_formula if self._follows(name, by_formula - met)}

    def _moves(self, name: str) -> bool:
        """Whether the maximum itself is a function of scales, rates and the like."""
        if any(isinstance(b, Unbound) for b in self._arguments(name, "value")):
            return True  # data that a parameter moves
        for group in self.groups:
            if name in group.names:
                return not self._is_group_under_one_scale(group)
        role = self.uses[name][0].role if self.uses[name] else ""
        if role == "location":
            return not self._is_under_one_scale(name)
        other = {"rate": "concentration", "concentration": "rate"}.get(role, "")
        return any(not _is_constant(b) for b in self._arguments(name, other))

    def _follows(self, name: str, separated: set[str]) -> bool:
        """Whether it is a scale about locations, or of a latent, not at the joint maximum."""
        return any(
            (use.role in ("scale", "cholesky") and not self._locations_of(use.site) <= separated)
            or (use.site in self.latents - separated)
            for use in self.uses[name]
        )

    def with_own_rate(self, by_formula: set[str]) -> Tensor:
        """Concentrations that meet one rate which meets nothing else, and these rates, (entries,).

        Such a pair of a Gamma is maximised jointly; any other concentration is, at present rates.
        """
        count = self.parameters.num_entries
        rates = torch.zeros(count, dtype=torch.bool)
        for name in by_formula - self.latents:
            uses = self.uses[name]
            alone = all((use.site, "concentration") in self.roles for use in uses)
            is_rate = bool(uses) and uses[0].role == "rate"
            self.parameters[name].part_of(rates).fill_(is_rate and alone)
        pairs = [torch.zeros(0, 2, dtype=torch.long)]
        for bindings in self.batches:
            for site in (site for site, argument in bindings if argument == "concentration"):
                both = (bindings.get((site, n)) for n in ("concentration", "rate"))
                index = (b.index if isinstance(b, Bound) else _NOTHING for b in both)
                pairs.append(_met_anywhere(*index))
        together = torch.cat(pairs).unique(dim=0)
        partners, others = (
            torch.bincount(column[column >= 0], minlength=count) for column in together.unbind(1)
        )
        concentration, rate = together[(together >= 0).all(1)].unbind(1)
        own = rates[rate] & (partners[concentration] == 1) & (others[rate] == 1)
        found = torch.zeros(count, dtype=torch.bool)
        found[concentration[own]] = True
        found[rate[own]] = True
        return found

    def _locations_of(self, site: str) -> set[str]:
        """The parameters that a site's location, or its value, is made of."""
        names = list(self.parameters)
        owners = self.parameters.owners()
        found = {site} & self.latents
        for bindings in self.batches:
            binding = bindings.get((site, "loc"))
            if isinstance(binding, Affine):
                found |= set(self.groups[binding.group].names)
            elif isinstance(binding, Unbound):
                found |= binding.parameters
            elif isinstance(binding, Bound):
                entries = binding.index[binding.index >= 0]
                found |= {names[owner] for owner in owners[entries].unique().tolist()}
        return found

    def _arguments(self, name: str, argument: str) -> Iterator[Binding]:
        """An argument of the sites that a parameter stands in."""
        for site in {use.site for use in self.uses[name]}:
            for bindings in self.batches:
                if (site, argument) in bindings:
                    yield bindings[site, argument]

    # ------------------------------------------------------------------------------------- scales

    def _is_under_one_scale(self, name: str) -> bool:
        """Whether each entry of a location meets one scale, times constants: it then cancels."""
        pairs: list[Tensor | None] = []
        for bindings in self.batches:
            for use in self.uses[name]:
                loc = bindings.get((use.site, use.argument))
                if use.site in self.latents or not isinstance(loc, Bound):
                    return False  # the mean of a latent that moves too
                pairs.append(self._met(bindings, use.site, loc.index))
            if name in self.latents:
                pairs.append(self._met(bindings, name, self._entries(name)))
        return _are_one_each(pairs)

    def _is_group_under_one_scale(self, group: Group) -> bool:
        """The same of the coefficients of a regression, and of their priors."""
        pairs: list[Tensor | None] = []
        for bindings in self.batches:
            for (site, _), binding in bindings.items():
                if isinstance(binding, Affine) and self.groups[binding.group] is group:
                    pairs.append(self._met_by_columns(bindings, site, binding))
            for name in self.latents & set(group.names):
                pairs.append(self._met(bindings, name, self._entries(name)))
        return _are_one_each(pairs)

    def _entries(self, name: str) -> Tensor:
        parameter = self.parameters[name]
        return torch.arange(parameter.size).reshape(parameter.shape) + parameter.offset

    def _met(self, bindings: Mapping[Key, Binding], site: str, entries: Tensor) -> Tensor | None:
        """Pairs of the entries of a location and of its scale, (pairs, 2); -1 for constants.

        ``None`` where the scale is not known.
        """
        index = self._scale_entries(bindings, site)
        return None if index is None else _pairs(entries, index)

    def _met_by_columns(
        self, bindings: Mapping[Key, Binding], site: str, location: Affine
    ) -> Tensor | None:
        """The same for a location of which each element has several entries."""
        index = self._scale_entries(bindings, site)
        if index is None:
            return None
        if bool((index == index.flatten()[0]).all()):
            index = index.flatten()[0]
        used = (location.jacobian != 0).cpu()
        used = used.reshape((1,) * (index.dim() + 1 - used.dim()) + used.shape)
        # along dimensions in which the scale stays the same, an entry counts once
        used = sum_to(used.long(), (*index.shape, used.shape[-1])) > 0
        return _pairs(torch.where(used, location.entries, -1), index.unsqueeze(-1))

    def _scale_entries(self, bindings: Mapping[Key, Binding], site: str) -> Tensor | None:
        matrix = (site, "scale_tril") in self.roles
        scale = bindings.get((site, "scale_tril" if matrix else "scale"))
        if not isinstance(scale, Bound):
            return None
        return scale.index[..., 0, 0].unsqueeze(-1) if matrix else scale.index


def _pairs(entries: Tensor, scales: Tensor) -> Tensor:
    """The pairs of an entry and a scale that occur where two tensors of indices meet."""
    pairs = _met_anywhere(entries, scales)
    return pairs[pairs[:, 0] >= 0]


def _met_anywhere(first: Tensor, second: Tensor) -> Tensor:
    """The pairs that occur where two tensors of indices meet, (pairs, 2); -1 is one of them."""
    shape = torch.broadcast_shapes(first.shape, second.shape)
    one, other = (x.expand(shape).flatten() + 1 for x in (first, second))
    base = int(other.max()) + 1 if len(other) else 1
    codes = torch.unique(one * base + other)
    return torch.stack([codes // base, codes % base], 1) - 1


def _are_one_each(pairs: Sequence[Tensor | None]) -> bool:
    """Whether all pairs are known, and each of the first has one partner."""
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs):
        return False
    together = torch.unique(torch.cat(known), dim=0) if known else torch.zeros(0, 2)
    return len(together) == len(together[:, 0].unique())


def _is_constant(binding: Binding) -> bool:
    return isinstance(binding, Bound) and binding.is_constant

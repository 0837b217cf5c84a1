"""What the dimensions of a run are called: one symbol for each plate and enumerated variable."""

from __future__ import annotations

from typing import Any

import opt_einsum
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.tracing import Plate, plates_of

__all__ = ["Packing", "own_symbol"]


class Packing:
    """Turns log-probabilities of sites into packed tensors (:mod:`lvppl.packed`).

    Plates get even symbols, in the order in which they are met, and enumerated variables odd ones,
    by their number in the run.
    """

    def __init__(self) -> None:
        self.names: dict[str, str] = {}
        """The symbol of each plate."""
        self.plates: dict[str, Plate] = {}
        """The plate of each symbol, the plate of particles left out."""

    def pack(self, site: Any, tensor: Tensor, event_dim: int = 0) -> tuple[Tensor, str]:
        """A tensor of a site without its batch dimensions of size one, and what the others are.

        Args:
            event_dim: dimensions on the right that are no batch dimensions; they stay.

        Raises:
            ProgramError: a dimension belongs to no plate and to no enumerated site.
        """
        symbols = _enumerated_symbols(site)
        for frame in site["cond_indep_stack"]:
            if frame.dim is not None:
                even = opt_einsum.get_symbol(2 * len(self.names))
                symbols[frame.dim] = self.names.setdefault(frame.name, even)
        self.plates.update((self.names[plate.name], plate) for plate in plates_of(site))
        split = tensor.dim() - event_dim
        batch, event = tensor.shape[:split], tensor.shape[split:]
        dims = [i for i in range(-len(batch), 0) if batch[i] > 1]
        unknown = [i for i in dims if i not in symbols]
        if unknown:
            raise ProgramError(
                f"Site '{site['name']}' has log-probabilities of shape {tuple(batch)} under "
                f"enumeration, whose dimension {unknown[0]} belongs to no plate and to no "
                "enumerated site in scope. Index with pyro.ops.indexing.Vindex, keep leading "
                "dimensions, and wrap chains in pyro.markov."
            )
        packed = tensor.reshape([*(batch[i] for i in dims), *event])
        return packed, "".join(symbols[i] for i in dims)

    @staticmethod
    def symbols_of(site: Any) -> set[str]:
        """Of the enumerated variables in scope of a site."""
        return set(_enumerated_symbols(site).values())

    def symbol(self, plate: Plate) -> str:
        return self.names[plate.name]


def _enumerated_symbols(site: Any) -> dict[int, str]:
    numbers = site["infer"].get("_dim_to_id", {})
    return {dim: opt_einsum.get_symbol(1 + 2 * number) for dim, number in numbers.items()}


def own_symbol(site: Any) -> str:
    """The symbol of the dimension that a site's values are enumerated along."""
    infer = site["infer"]
    return opt_einsum.get_symbol(1 + 2 * infer["_dim_to_id"][infer["_enumerate_dim"]])

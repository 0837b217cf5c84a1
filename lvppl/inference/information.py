"""How many real numbers a parameter stands for: what information criteria charge for."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributions import constraints

__all__ = ["num_free"]

_VECTORS = ("_Simplex", "_Sphere")  # one number follows from the others
_WITH_DIAGONAL = (
    "_LowerCholesky", "_SoftplusLowerCholesky", "_LowerTriangular",
    "_PositiveDefinite", "_PositiveSemidefinite", "_Symmetric",
)  # fmt: skip
_BELOW_DIAGONAL = ("_CorrCholesky", "_CorrMatrix", "_UnitLowerCholesky")


def num_free(value: Tensor, constraint: Any) -> int:
    """Independent numbers of a parameter: K - 1 of a simplex, D (D + 1) / 2 of a covariance.

    Args:
        value: the parameter, as the program sees it.
        constraint: of ``pyro.param`` or ``PyroParam``.
    """
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    kind, size = type(constraint).__name__, value.shape[-1] if value.dim() else 1
    if kind in _VECTORS:
        return value.numel() // size * (size - 1)
    if kind in _WITH_DIAGONAL:
        return value.numel() // size * (size + 1) // 2
    if kind in _BELOW_DIAGONAL:
        return value.numel() // size * (size - 1) // 2
    return value.numel()

"""The one error that lvppl raises for a program, data or an option that it cannot use."""

from __future__ import annotations

__all__ = ["ProgramError"]


class ProgramError(ValueError):
    """What was expected, what came, and what to do about it.

    Raised before a wrong number can be computed: lvppl refuses rather than warns.
    """

"""The one error that lvppl raises for a program, data or an option that it cannot use."""

from __future__ import annotations

__all__ = ["ProgramError", "ProgramFailure"]


class ProgramError(ValueError):
    """What was expected, what came, and what to do about it.

    Raised before a wrong number can be computed: lvppl refuses rather than warns.
    """


class ProgramFailure(ProgramError):
    """A model or guide raised while it ran; ``__cause__`` is what it raised."""

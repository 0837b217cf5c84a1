"""How every example ends: its known answers, and whether each was reached."""

from __future__ import annotations

__all__ = ["verdict"]


def verdict(answers: list[tuple[str, bool]]) -> int:
    """Print each answer as reached or missed; the exit status is 1 if one was missed."""
    print()
    for what, holds in answers:
        print(f"{'reached' if holds else 'MISSED':<8} {what}")
    return 0 if all(holds for _, holds in answers) else 1

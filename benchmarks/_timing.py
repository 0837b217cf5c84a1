"""Timing side by side: every contestant in one run, rounds interleaved, medians."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import pyro
import torch

import lvppl


def medians(
    contestants: Mapping[str, Callable[[], object]], *, rounds: int = 7, seconds: float = 0.5
) -> dict[str, float]:
    """Median seconds of a call over rounds; each round runs every contestant in turn.

    Args:
        contestants: name -> a call. Each is warmed up first.
        rounds: measurements of each.
        seconds: how long one measurement lasts, about.
    """
    repeats = {}
    for name, call in contestants.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(seconds / max(time.perf_counter() - start, 1e-6)))
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            taken[name].append((time.perf_counter() - start) / repeats[name])
    return {name: statistics.median(times) for name, times in taken.items()}


def machine() -> str:
    """One line: what the numbers were measured on."""
    return (
        f"{platform.machine()}, {torch.get_num_threads()} threads, Python "
        f"{platform.python_version()}, torch {torch.__version__}, Pyro {pyro.__version__}, lvppl "
        f"{lvppl.inference.fit.versions()['lvppl']}"
    )


def table(title: str, times: Mapping[str, float], *, against: str, unit: str = "ms") -> str:
    """A Markdown table of times and of ratios to one contestant."""
    factor = {"ms": 1e3, "s": 1.0}[unit]
    rows = [f"| {title} | {unit} | ratio |", "|---|---|---|"]
    rows += [
        f"| {name} | {factor * seconds:.3g} | {seconds / times[against]:.2f} |"
        for name, seconds in times.items()
    ]
    return "\n".join(rows)

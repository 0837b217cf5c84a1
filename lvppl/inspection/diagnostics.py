"""Pictures of how a pair of programs learns: signal in its gradients, gaps of its guide.

As in :mod:`lvppl.inspection.plots`, every function draws into ``ax``, or into a new figure that
pyplot does not know of, and returns the axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lvppl.inspection.plots import (
    BLUE,
    COLOURS,
    SMALL,
    TEXT,
    VERMILION,
    _array,
    _axes,
    _label,
    _legend,
)

__all__ = ["gap_stack", "gradient_snr"]

_PROGRAMS = {"model": (BLUE, "o"), "guide": (VERMILION, "s"), "both": (COLOURS[2], "D")}


def gradient_snr(audit: Any, ax: Axes | None = None) -> Axes:
    """Draw the signal-to-noise ratio of each objective's gradients, a line for each objective.

    The ratio is the root mean square over elements of |E g| / sd(g), of the model's parameters, of
    the guide's, and of those that they share. A hollow mark is a gradient that is biased to its own
    target; a ratio that is zero within the noise, or infinite, stands at the edge, which says so.

    Args:
        audit: a ``GradientAudit``.
        ax: axes to draw in.
    """
    names = list(audit.means)
    ax = _axes(ax, (6.4, 0.42 * len(names) + 1.3))
    finite = [row.snr for row in audit.totals if 0 < row.snr < math.inf]
    low, high = (min(finite) / 2, max(finite) * 2) if finite else (0.1, 10.0)
    programs = list(dict.fromkeys(row.program for row in audit.totals))
    for place, program in enumerate(programs):  # one below the other, so that none hides another
        rows = [row for row in audit.totals if row.program == program]
        heights = {
            name: i + 0.26 * (place - (len(programs) - 1) / 2) for i, name in enumerate(names)
        }
        _draw_program(ax, rows, heights, program, (low, high))
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    _label(ax, "signal-to-noise ratio |E g| / sd(g) of one evaluation", None)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0, labelsize=TEXT)
    _legend(ax, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2)
    return ax


def _draw_program(
    ax: Axes,
    rows: Sequence[Any],
    heights: Mapping[str, float],
    program: str,
    span: tuple[float, float],
) -> None:
    colour, marker = _PROGRAMS[program]
    label = "parameters of both" if program == "both" else f"the {program}'s parameters"
    for row in rows:
        if math.isnan(row.snr):
            continue
        height = heights[row.objective]
        at = min(max(row.snr, span[0]), span[1])
        biased = row.bias is not None and row.bias.significant
        ax.plot(
            at,
            height,
            marker,
            color=colour,
            markersize=7,
            markerfacecolor="white" if biased else colour,
            markeredgewidth=1.6,
            clip_on=False,
            zorder=3,
            label=label,
        )
        label = "_nolegend_"
        words = ["noise alone" if row.snr == 0 else "no noise"] if at != row.snr else []
        words += ["biased"] if biased else []
        if words:
            left = at > math.sqrt(span[0] * span[1])
            _beside(ax, ", ".join(words), at, height, colour, left=left)


def _beside(ax: Axes, text: str, x: float, y: float, colour: str, *, left: bool) -> None:
    ax.annotate(
        text,
        xy=(x, y),
        xytext=(-9 if left else 9, 0),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize=SMALL,
        color=colour,
    )


def gap_stack(gaps: Any, ax: Axes | None = None) -> Axes:
    """Draw the amortisation gap and on top of it the approximation gap, a bar for each datum.

    Data stand from the largest sum to the smallest. The bars reach up to ln p(y) − ELBO, or to its
    lower bound; the faint part above reaches up to the upper bound, where there is one. A gap that
    is negative, within its error, is drawn as zero.

    Args:
        gaps: a ``Gaps``.
        ax: axes to draw in.
    """
    ax = _axes(ax, (6.4, 3.6))
    amortization = np.maximum(_array(gaps.amortization), 0.0)
    approximation = np.maximum(_array(gaps.approximation), 0.0)
    order = np.argsort(-(amortization + approximation), kind="stable")
    x, width = np.arange(1, len(order) + 1), 0.8 if len(order) <= 60 else 1.0
    layers = [
        ("amortisation: best of the family − encoder", amortization, BLUE, 1.0),
        ("approximation: ln p(y) − best of the family", approximation, VERMILION, 1.0),
    ]
    upper = _array(gaps.approximation_upper)
    if not gaps.is_exact and np.isfinite(upper).all():
        label = "approximation, up to the upper bound on ln p(y)"
        layers.append((label, np.maximum(upper - approximation, 0.0), VERMILION, 0.3))
    floor = np.zeros(len(order))
    for label, height, colour, alpha in layers:
        ax.bar(
            x,
            height[order],
            width,
            bottom=floor,
            color=colour,
            alpha=alpha,
            label=label,
            linewidth=0,
        )
        floor = floor + height[order]
    ax.set_xlim(0.5, len(order) + 0.5)
    ax.set_ylim(0.0, 1.05 * max(float(floor.max()), 1e-9))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(ax, "datum, by the size of its gap", "nats")
    ax.grid(axis="x", visible=False)
    _legend(ax, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=1, borderaxespad=0.2)
    return ax

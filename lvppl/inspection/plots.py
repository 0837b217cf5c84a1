"""Pictures of a fit: its training curve, reconstructions, samples, latent plane and likelihoods.

Every function takes ``ax`` (a new figure is made when it is None), draws into it, leaves pyplot's
global state alone, and returns the axes; ``ax.figure.savefig(...)`` writes the picture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import EllipseCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from lvppl.errors import ProgramError

__all__ = [
    "image_grid",
    "latent_plane",
    "likelihood_comparison",
    "likelihood_convergence",
    "reconstructions",
    "training_curve",
]

Array = NDArray[Any]

# Okabe & Ito (2008), "Color Universal Design": told apart under every common colour blindness.
# Black leads no series, and two more shades make ten for the digits; yellow is left out because
# it vanishes on white paper.
COLOURS = (
    "#0072B2",  # blue
    "#D55E00",  # vermilion
    "#009E73",  # bluish green
    "#CC79A7",  # reddish purple
    "#E69F00",  # orange
    "#56B4E9",  # sky blue
    "#000000",  # black
    "#8C8C8C",  # grey
    "#882255",  # wine   (Tol's muted palette)
    "#6B8E23",  # olive
)
BLUE, VERMILION = COLOURS[:2]
INK, FAINT = "#333333", "#DDDDDD"
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "*")
TEXT, SMALL = 10.0, 9.0  # font sizes, points


def training_curve(fit: Any, ax: Axes | None = None) -> Axes:
    """Draw the negative ELBO with its two parts, rate and distortion, against the epoch.

        -ELBO = rate + distortion        (nats per datum)

    A fit by EM shows what it raises, such as ln p(y), before each iteration and after the last. A
    history without an ELBO (a foreign loss) shows its loss at each step.

    Args:
        fit: a fit, or its ``history``: a mapping with ``elbo``, and ``rate``, ``distortion``,
            ``epoch``, ``validation_elbo`` where there are any. Arrays of shape (epochs,). Of EM,
            ``objective``, (iterations + 1,).
        ax: axes to draw in.

    Raises:
        ProgramError: when the history holds neither an ELBO nor a loss.
    """
    history = fit if isinstance(fit, Mapping) else fit.history
    ax = _axes(ax, (6.0, 3.8))
    if "objective" in history:
        return _objective_curve(history, getattr(fit, "tracked", "objective"), ax)
    if "elbo" not in history:
        return _loss_curve(history, ax)
    elbo = _array(history["elbo"])
    epoch = _array(history["epoch"]) if "epoch" in history else np.arange(1, len(elbo) + 1)
    parted = "rate" in history and "distortion" in history
    curves = [("−ELBO" + (" = rate + distortion" if parted else ""), -elbo, INK, "-")]
    if "validation_elbo" in history:
        curves.append(("−ELBO, held out", -_array(history["validation_elbo"]), INK, ":"))
    if "distortion" in history:
        distortion = _array(history["distortion"])
        curves.append(("distortion, −E ln p(y | z)", distortion, VERMILION, "--"))
    if "rate" in history:
        curves.append(("rate, KL(q(z | y), p(z))", _array(history["rate"]), BLUE, "-."))
    marker = "o" if len(epoch) < 3 else None
    for label, values, colour, style in curves:
        if len(values) == len(epoch):
            ax.plot(epoch, values, style, color=colour, label=label, linewidth=1.8, marker=marker)
    # The first epochs of a network are often many times the rest and would flatten everything.
    settled = -elbo[len(elbo) // 20 :]
    finite = settled[np.isfinite(settled)]
    if len(elbo) >= 20 and len(finite):
        lowest = min(np.nanmin(values) for _, values, _, _ in curves)
        spread = max(float(finite.max()) - lowest, 1e-9)
        ax.set_ylim(lowest - 0.05 * spread, float(finite.max()) + 0.1 * spread)
    ax.set_xlim(left=float(epoch[0]), right=float(epoch[-1]) if len(epoch) > 1 else None)
    _label(ax, "epoch", "nats per datum")
    # Above the axes, where no curve can run into it.
    _legend(ax, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.2)
    return ax


def _objective_curve(history: Mapping[str, Any], tracked: str, ax: Axes) -> Axes:
    objective = _array(history["objective"])
    marker = "o" if len(objective) < 12 else None
    ax.plot(np.arange(len(objective)), objective, color=INK, linewidth=1.8, marker=marker)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(ax, "iteration", f"{tracked}, nats")
    return ax


def _loss_curve(history: Mapping[str, Any], ax: Axes) -> Axes:
    if "loss" not in history or len(_array(history["loss"])) == 0:
        raise ProgramError(
            "a training curve needs a history with at least one value of 'elbo' or 'loss'; "
            f"this one holds {sorted(history)}. Fit for one epoch or more."
        )
    loss = _array(history["loss"])
    ax.plot(np.arange(1, len(loss) + 1), loss, color=INK, linewidth=1.2)
    _label(ax, "step", "loss, nats")
    return ax


def image_grid(
    images: Any,
    ax: Axes | None = None,
    *,
    num_columns: int | None = None,
    image_shape: tuple[int, ...] | None = None,
    value_range: tuple[float, float] | None = None,
    title: str | None = None,
) -> Axes:
    """Tile images into one picture.

    Args:
        images: (n, height, width), (n, height, width, 3), (n, 1 or 3, height, width), or flat
            rows (n, pixels) of square images.
        ax: axes to draw in.
        num_columns: images in a row; by default a grid that is about square.
        image_shape: (height, width) or (height, width, 3) of flat rows that are not square.
        value_range: values drawn black and white; by default the smallest and the largest.
        title: written above.

    Raises:
        ProgramError: when the shape is none of these.
    """
    tiles = _images(images, image_shape)
    columns = num_columns or math.ceil(math.sqrt(len(tiles)))
    rows = math.ceil(len(tiles) / columns)
    ax = _axes(ax, (0.55 * columns + 0.2, 0.55 * rows + (0.5 if title else 0.2)))
    low, high = value_range or (float(np.nanmin(tiles)), float(np.nanmax(tiles)))
    _show_tiles(ax, _rescaled(tiles, low, high), rows, columns)
    if title:
        ax.set_title(title, fontsize=TEXT, color=INK)
    return ax


def reconstructions(
    images: Any,
    reconstructed: Any,
    ax: Axes | None = None,
    *,
    num_images: int = 12,
    image_shape: tuple[int, ...] | None = None,
    value_range: tuple[float, float] | None = None,
) -> Axes:
    """Draw a row of images with their reconstructions E[y | z ~ q] underneath.

    Args:
        images, reconstructed: the same number of images, in any shape of ``image_grid``.
        ax: axes to draw in.
        num_images: how many pairs are drawn, from the first.
        image_shape, value_range: as in ``image_grid``; the range is that of ``images``.

    Raises:
        ProgramError: when the two do not match.
    """
    top, bottom = _images(images, image_shape), _images(reconstructed, image_shape)
    if top.shape != bottom.shape:
        raise ProgramError(
            f"images {top.shape} and reconstructions {bottom.shape} do not match: "
            "pass the reconstructions of these very images, in their order"
        )
    columns = min(num_images, len(top))
    low, high = value_range or (float(np.nanmin(top)), float(np.nanmax(top)))
    tiles = np.concatenate([top[:columns], bottom[:columns]])
    ax = _axes(ax, (0.55 * columns + 1.4, 1.35))
    _show_tiles(ax, _rescaled(tiles, low, high), 2, columns)
    for row, name in ((0.75, "data"), (0.25, "reconstruction")):
        ax.annotate(
            name,
            xy=(0.0, row),
            xycoords="axes fraction",
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=TEXT,
            color=INK,
        )
    return ax


def latent_plane(
    means: Any,
    ax: Axes | None = None,
    *,
    labels: Any = None,
    stds: Any = None,
    num_ellipses: int = 40,
    project: str = "auto",
) -> Axes:
    """Scatter the posterior means in two dimensions, with one-standard-deviation ellipses.

    With two latent dimensions these are the axes; with more, the two principal axes of the means
    (an orthogonal projection, so that the posterior covariance diag(stds²) is projected exactly).
    One-character labels are drawn as themselves; others get a marker and a legend.

    Args:
        means: (data, latent dimensions), latent dimensions at least 2.
        ax: axes to draw in.
        labels: (data,) classes; each has its own colour and glyph, so that colour is never alone.
        stds: (data, latent dimensions) posterior standard deviations.
        num_ellipses: ellipses drawn, evenly spaced through the data.
        project: "pca", "first" (the first two dimensions) or "auto" (pca above two dimensions).

    Raises:
        ProgramError: when shapes do not fit.
    """
    points = _array(means).astype(float)
    if points.ndim != 2 or points.shape[1] < 2:
        raise ProgramError(f"means must be (data, at least 2 dimensions), not {points.shape}")
    if project not in ("auto", "pca", "first"):
        raise ProgramError(f"project must be 'auto', 'pca' or 'first', not {project!r}")
    pca = project == "pca" or (project == "auto" and points.shape[1] > 2)
    axes, names = _plane(points, pca)
    plane = (points - points.mean(0)) @ axes if pca else points @ axes
    classes = None if labels is None else _array(labels).ravel()
    if classes is not None and len(classes) != len(points):
        raise ProgramError(f"{len(classes)} labels for {len(points)} means")
    ax = _axes(ax, (5.4, 5.0))
    if stds is not None:
        _ellipses(ax, plane, _array(stds).astype(float), axes, classes, num_ellipses)
    _scatter(ax, plane, classes)
    ax.set_aspect("equal")
    ax.margins(0.04)
    _label(ax, *names)
    return ax


def likelihood_comparison(
    estimates: Mapping[str, Any],
    ax: Axes | None = None,
    *,
    elbo: Any = None,
    exact: Any = None,
) -> Axes:
    """Draw the ELBO and estimates of ln p(y) under each other, in nats per datum.

    A dot is the mean over the data; its bar is two Monte Carlo standard errors either side,
    2 sqrt(sum of squared standard errors) / data (no bar where it is smaller than the dot).

    Args:
        estimates: name -> record with ``log_prob`` (data,) and, where known, ``std_error`` (data,).
        ax: axes to draw in.
        elbo: the ELBO per datum, a number or (data,).
        exact: the exact ln p(y) per datum, a number or (data,); drawn as a line.
    """
    rows: list[tuple[str, float, float, str, str]] = []
    if elbo is not None:
        rows.append(("ELBO", float(_array(elbo).mean()), 0.0, INK, "D"))
    for i, (name, estimate) in enumerate(estimates.items()):
        error = getattr(estimate, "std_error", None)
        mean = _array(estimate.log_prob)
        half = 0.0 if error is None else 2 * float(np.sqrt((_array(error) ** 2).sum())) / mean.size
        rows.append((name, float(mean.mean()), half, COLOURS[i % 6], MARKERS[i % len(MARKERS)]))
    if not rows:
        raise ProgramError("nothing to compare: pass at least one estimate, or elbo=")
    ax = _axes(ax, (6.0, 0.55 * len(rows) + 1.0))
    for height, (_, value, half, colour, marker) in enumerate(rows):
        ax.errorbar(
            value, height, xerr=half or None, fmt=marker, color=colour, capsize=4, markersize=7
        )
        # Numbers stand in a column of their own, where no mark can run into them.
        text = f"{value:,.2f}" + (f" ± {half:,.2f}" if half else "")
        _at_the_right(ax, height, text, INK, gap=10)
    if exact is not None:
        level = float(_array(exact).mean())
        ax.axvline(level, color=INK, linewidth=1.2, linestyle="--", zorder=0)
        ax.annotate(
            f"exact {level:,.2f}".replace("-", "−"),
            xy=(level, 1.0),
            xycoords=ax.get_xaxis_transform(),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=SMALL,
            color=INK,
        )
    ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.margins(x=0.08)
    _label(ax, "nats per datum (± two Monte Carlo standard errors)", None)
    ax.grid(axis="y", visible=False)
    ax.tick_params(axis="y", length=0, labelsize=TEXT)
    return ax


def likelihood_convergence(
    estimates: Mapping[str, Any],
    ax: Axes | None = None,
    *,
    exact: Any = None,
    datum: int | None = None,
    evaluations: Mapping[str, float] | None = None,
    difference: bool = False,
    note: bool = True,
) -> Axes:
    """Draw estimates of ln p(y) against the number of draws, in nats per datum.

    A line is the mean over the data after 2, 4, 8 ... draws; its band is two Monte Carlo standard
    errors either side, 2 sqrt(sum of squared standard errors) / data. ln of an unbiased estimate
    is biased low, so that lines rise to ln p(y).

    Where k-hat flags one of the data, or the draws are too few for a k-hat, neither the value nor
    its error is to be relied on: markers are hollow there, and the band is hatched.

    Args:
        estimates: name -> record with ``trajectory`` (``num_samples`` (prefixes,), ``log_prob``,
            ``std_error`` and ``flagged`` (prefixes, data)), as
            ``log_likelihood(..., trajectory=True)`` gives.
        ax: axes to draw in.
        exact: the exact ln p(y) per datum, a number or (data,); drawn as a line.
        datum: index of the one datum to draw; by default the mean over all.
        evaluations: name -> evaluations of p(z, y) that one draw takes, such as a chain of
            annealing takes many; the axis then counts them. A name that is left out takes one.
        difference: draw estimate − exact, on an axis that is linear within one nat of zero and
            logarithmic beyond: what is nats away is seen beside what is hundredths away.
        note: say above the axes what hollow markers mean, where there are any.

    Raises:
        ProgramError: nothing to draw, an estimate without a trajectory, a datum that is not there,
            evaluations of an estimate that is not there, a difference without ``exact``.
    """
    if not estimates:
        raise ProgramError("nothing to draw: pass at least one estimate")
    costs = dict(evaluations or {})
    if costs.keys() - estimates.keys():
        raise ProgramError(
            f"evaluations= names {sorted(costs.keys() - estimates.keys())}, but the estimates are "
            f"{list(estimates)}"
        )
    if difference and exact is None:
        raise ProgramError("difference=True draws estimates less the exact value: pass exact=")
    level = None if exact is None else _level(exact, datum)
    zero = level if difference and level is not None else 0.0
    ax = _axes(ax, (6.4, 3.8))
    ends, unsure = [], False
    for i, (name, estimate) in enumerate(estimates.items()):
        path = _trajectory(name, estimate, datum)
        path = path._replace(number=path.number * costs.get(name, 1), mean=path.mean - zero)
        unsure = unsure or bool(path.flagged.any())
        _draw_path(ax, path, COLOURS[i % 6], MARKERS[i % len(MARKERS)])
        end = float(path.mean[-1])
        ends.append((f"{name}  {end:{'+' if difference else ''},.2f}", end, COLOURS[i % 6]))
    _log_counts(ax)
    if difference:
        ax.set_yscale("symlog", linthresh=1.0, linscale=0.6)
        ax.yaxis.set_major_formatter(
            FuncFormatter(lambda y, _: f"{y:+,.0f}".replace("-", "−") if y else "0")
        )
    if level is not None:
        ax.axhline(level - zero, color=INK, linewidth=1.2, linestyle="--", zorder=1)
        ends.insert(0, (f"exact  {level:,.2f}", level - zero, INK))
    _name_ends(ax, ends)
    if note and unsure:
        words = "hollow, hatched: flagged by k-hat, neither value nor error can be relied on"
        ax.set_title(words, fontsize=SMALL, color=INK, loc="left")
    counted = "draws" if evaluations is None else "evaluations of p(z, y)"
    what = "estimate − exact" if difference else "ln p(y)"
    per = f"{what}, nats per datum" if datum is None else f"{what}, nats"
    _label(ax, f"{counted} per datum", f"{per}\n(± two standard errors)")
    return ax


# --------------------------------------------------------------------------------------------------


class _Path(NamedTuple):
    """Numbers of draws; ln p(y) there, two standard errors of it, and whether it is flagged."""

    number: Array
    mean: Array
    half: Array
    flagged: Array


def _draw_path(ax: Axes, path: _Path, colour: str, marker: str) -> None:
    """A line with its band; hollow and hatched where flagged."""
    number, mean, half, flagged = path
    known, band = np.isfinite(mean) & np.isfinite(half), (mean - half, mean + half)
    whole = known & ~flagged
    ax.fill_between(number, *band, where=whole, color=colour, alpha=0.22, linewidth=0)
    ax.plot(number, mean, color=colour, linewidth=1.6)
    ax.plot(number[~flagged], mean[~flagged], marker, color=colour, markersize=4.5)
    if not flagged.any():
        return
    # a piece of the band that begins or ends at a flagged point belongs to it
    beside = flagged | np.append(flagged[1:], False) | np.insert(flagged[:-1], 0, False)
    edge = to_rgba(colour, 0.45)
    ax.fill_between(
        number,
        *band,
        where=known & beside,
        facecolor="none",
        edgecolor=edge,
        hatch="////",
        linewidth=0,
    )
    ax.plot(
        number[flagged],
        mean[flagged],
        marker,
        color=colour,
        markerfacecolor="white",
        markersize=4.5,
    )


def _trajectory(name: str, estimate: Any, datum: int | None) -> _Path:
    """Of the mean over the data, or of one."""
    path = getattr(estimate, "trajectory", None)
    if path is None:
        raise ProgramError(
            f"'{name}' holds the estimate from all its draws only: use "
            "log_likelihood(..., trajectory=True) to keep it from 2, 4, 8 ... draws as well"
        )
    log_prob, error, flagged = (_array(x) for x in (path.log_prob, path.std_error, path.flagged))
    if datum is not None:
        if not 0 <= datum < log_prob.shape[-1]:
            raise ProgramError(
                f"datum must be an index from 0 to {log_prob.shape[-1] - 1}, but is {datum!r}"
            )
        log_prob, error, flagged = (x[:, datum : datum + 1] for x in (log_prob, error, flagged))
    half = 2 * np.sqrt((error**2).sum(-1)) / log_prob.shape[-1]
    return _Path(_array(path.num_samples), log_prob.mean(-1), half, np.asarray(flagged.any(-1)))


def _log_counts(ax: Axes) -> None:
    """A logarithmic axis of whole numbers, written out."""
    ax.set_xscale("log")
    ax.margins(x=0.02)
    first, last = ax.get_xlim()
    subdivisions = (1.0,) if last > 200 * first else (1.0, 2.0, 5.0)
    ax.xaxis.set_major_locator(LogLocator(subs=subdivisions))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    ax.xaxis.set_minor_locator(NullLocator())


def _level(exact: Any, datum: int | None) -> float:
    """The exact value of the mean over data, or of one."""
    levels = _array(exact)
    return float(levels.mean() if datum is None or levels.ndim == 0 else levels[datum])


def _name_ends(ax: Axes, ends: Sequence[tuple[str, float, str]]) -> None:
    """Names at the right of the axes, at the height where each line ends, none on another."""
    left = ax.get_xlim()[0]
    to_axes = ax.transData + ax.transAxes.inverted()
    heights = [
        float(np.clip(to_axes.transform((left, value))[1], 0.0, 1.0)) for _, value, _ in ends
    ]
    for _ in range(200):  # neighbours push each other apart
        order = np.argsort(heights, kind="stable")
        moved = False
        for below, above in itertools.pairwise(order):
            overlap = 0.065 - (heights[above] - heights[below])
            if overlap > 1e-9:
                heights[below] -= overlap / 2
                heights[above] += overlap / 2
                moved = True
        if not moved:
            break
    for (name, _, colour), height in zip(ends, heights, strict=True):
        _at_the_right(ax, height, name, colour, gap=8, of_axes=True)


def _at_the_right(
    ax: Axes, height: float, text: str, colour: str, *, gap: float, of_axes: bool = False
) -> None:
    """Text beside the axes, ``gap`` points from them, at a height of the data or of the axes."""
    ax.annotate(
        text.replace("-", "−"),
        xy=(1.0, height),
        xycoords="axes fraction" if of_axes else ax.get_yaxis_transform(),
        xytext=(gap, 0),
        textcoords="offset points",
        ha="left",
        va="center",
        fontsize=SMALL,
        color=colour,
        annotation_clip=False,
    )


def _array(values: Any) -> Array:
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().numpy()
    return np.asarray(values)


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """``ax``, or the axes of a new figure that pyplot does not know of (so nothing leaks)."""
    if ax is not None:
        return ax
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure.add_subplot()


def _label(ax: Axes, x: str | None, y: str | None) -> None:
    """Axis names in one size, two spines, a faint grid behind the marks."""
    if x is not None:
        ax.set_xlabel(x, fontsize=TEXT, color=INK)
    if y is not None:
        ax.set_ylabel(y, fontsize=TEXT, color=INK)
    ax.tick_params(labelsize=SMALL, colors=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#888888")
    ax.grid(color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)


def _legend(ax: Axes, **options: Any) -> None:
    ax.legend(frameon=False, fontsize=SMALL, labelcolor=INK, **options)


def _images(images: Any, image_shape: tuple[int, ...] | None) -> Array:
    """Images as (n, height, width) or (n, height, width, 3)."""
    tiles = _array(images).astype(float)
    if image_shape is not None:
        tiles = tiles.reshape(len(tiles), *image_shape)
    elif tiles.ndim == 2:
        side = math.isqrt(tiles.shape[1])
        if side * side != tiles.shape[1]:
            raise ProgramError(
                f"{tiles.shape[1]} pixels are no square image: pass image_shape=(height, width)"
            )
        tiles = tiles.reshape(len(tiles), side, side)
    if tiles.ndim == 4 and tiles.shape[1] in (1, 3) and tiles.shape[3] not in (1, 3):
        tiles = np.moveaxis(tiles, 1, 3)
    if tiles.ndim == 4 and tiles.shape[3] == 1:
        tiles = tiles[..., 0]
    if len(tiles) == 0 or tiles.ndim not in (3, 4) or (tiles.ndim == 4 and tiles.shape[3] != 3):
        raise ProgramError(
            f"images of shape {_array(images).shape} are not (n, height, width), "
            "(n, height, width, 3), (n, 1 or 3, height, width) or (n, pixels)"
        )
    return tiles


def _rescaled(tiles: Array, low: float, high: float) -> Array:
    return np.clip((tiles - low) / (high - low if high > low else 1.0), 0.0, 1.0)


def _show_tiles(ax: Axes, tiles: Array, rows: int, columns: int) -> None:
    """Draw tiles in [0, 1] with light gutters, as one image: one resampling, one set of axes."""
    height, width = tiles.shape[1:3]
    gap = max(1, round(0.06 * max(height, width)))
    # Pixels are enlarged before the gutters are laid, so that small images keep thin gutters.
    enlarge = max(1, 64 // max(height, width))
    gap = gap if enlarge == 1 else 4
    height, width = height * enlarge, width * enlarge
    sheet = np.ones((rows * (height + gap) - gap, columns * (width + gap) - gap, *tiles.shape[3:]))
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        y, x = row * (height + gap), column * (width + gap)
        sheet[y : y + height, x : x + width] = tile.repeat(enlarge, 0).repeat(enlarge, 1)
    ax.imshow(sheet, cmap="gray", vmin=0.0, vmax=1.0, interpolation="antialiased")
    ax.set_axis_off()


def _plane(points: Array, pca: bool) -> tuple[Array, tuple[str, str]]:
    """An orthonormal (dimensions, 2) basis of the plane and the names of its axes."""
    if not pca:
        return np.eye(points.shape[1])[:, :2], ("$z_1$", "$z_2$")
    centred = points - points.mean(0)
    _, scale, basis = np.linalg.svd(centred, full_matrices=False)
    # A singular vector's sign is arbitrary; fix it, so that the same fit gives the same picture.
    basis = basis[:2] * np.sign(basis[np.arange(2), np.abs(basis[:2]).argmax(1)])[:, None]
    share = scale[:2] ** 2 / max(float((scale**2).sum()), 1e-300)
    first, second = (
        f"{name} principal axis of the posterior means ({part:.0%})"
        for name, part in zip(("first", "second"), share, strict=True)
    )
    return basis.T, (first, second)


def _scatter(ax: Axes, plane: Array, classes: Array | None) -> None:
    size = float(np.clip(24000 / len(plane), 10, 40))
    if classes is None:
        ax.scatter(plane[:, 0], plane[:, 1], s=size, color=BLUE, alpha=0.8, linewidths=0)
        return
    names = np.unique(classes)
    short = all(len(str(name)) == 1 for name in names)
    for i, name in enumerate(names):
        marker = f"${name}$" if short else MARKERS[i % len(MARKERS)]
        members = plane[classes == name]
        ax.scatter(
            members[:, 0],
            members[:, 1],
            s=size * (1.8 if short else 1.0),
            color=COLOURS[i % len(COLOURS)],
            marker=cast(Any, marker),
            alpha=0.9,
            linewidths=0.2 if short else 0,
            label=str(name),
        )
    if not short:
        _legend(ax, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _ellipses(
    ax: Axes, plane: Array, stds: Array, axes: Array, classes: Array | None, count: int
) -> None:
    """One-standard-deviation ellipses of N(mean, diag(stds²)) seen in the plane."""
    if stds.shape != (len(plane), len(axes)):
        raise ProgramError(f"stds must be {(len(plane), len(axes))} like means, not {stds.shape}")
    chosen = np.unique(np.linspace(0, len(plane) - 1, min(count, len(plane))).astype(int))
    covariance = np.einsum("da,nd,db->nab", axes, stds[chosen] ** 2, axes)
    variances, vectors = np.linalg.eigh(covariance)
    angles = np.degrees(np.arctan2(vectors[:, 1, 1], vectors[:, 0, 1]))
    widths = 2 * np.sqrt(np.maximum(variances, 0.0))
    colours: Sequence[str] = [BLUE] * len(chosen)
    if classes is not None:
        index = np.searchsorted(np.unique(classes), classes[chosen])
        colours = [COLOURS[i % len(COLOURS)] for i in index]
    reach = np.sqrt(covariance[:, [0, 1], [0, 1]])  # half the ellipses' bounding boxes
    ax.update_datalim(np.concatenate([plane[chosen] - reach, plane[chosen] + reach]))
    ax.add_collection(
        EllipseCollection(
            widths[:, 1],
            widths[:, 0],
            angles,
            units="xy",
            offsets=plane[chosen],
            offset_transform=ax.transData,
            facecolors=[to_rgba(colour, 0.06) for colour in colours],
            edgecolors=[to_rgba(colour, 0.5) for colour in colours],
            linewidths=0.7,
            zorder=1,
        ),
        autolim=False,
    )

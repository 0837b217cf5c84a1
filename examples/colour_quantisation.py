"""A photograph in 16 colours: k-means as hard EM on a program.

    python examples/colour_quantisation.py [--out runs/colours] [--quick] [--seed 0]

K-means is maximum likelihood in a mixture of unit Gaussians with equal weights, with each pixel
assigned to one component: lvppl.EM(hard=True) on that program, and nothing written for k-means.
Writes a picture, and exits with 1 unless the inertia is that of scikit-learn's KMeans from the
same start.
"""

from __future__ import annotations

import math
import sys
import time

import numpy as np
import torch
from _answers import verdict
from _options import command_line
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from torch import Tensor

import lvppl
from lvppl.inspection.plots import INK
from lvppl.models import GaussianMixture

FEW, MANY = 4, 16


def main() -> int:
    options = command_line(__doc__, out="runs/colours", quick="fewer pixels")
    step = 6 if options.quick else 1
    image = lvppl.data.photographs(dtype=torch.float64).images[1]  # (3, height, width)
    image = 255 * image[:, ::step, ::step]  # levels, so that distances are in units of one level
    pixels = image.flatten(1).T.contiguous()
    print(f"{len(pixels):,} pixels; inertia is the sum of squared distances, in levels²\n")
    print(f"{'colours':>8}{'':>14}{'iterations':>12}{'seconds':>9}{'inertia':>18}{'rms error':>11}")

    answers, pictures = [], []
    for num_colours in (FEW, MANY):
        palette, nearest, inertia, peer = quantise(pixels, num_colours, options.seed)
        gap = abs(inertia / peer - 1)
        answers.append((f"{num_colours} colours: inertia as KMeans within 1e-6", gap < 1e-6))
        pictures.append((palette, nearest))
    error = math.sqrt(inertia / pixels.numel())
    answers.append((f"{MANY} colours are within 10 levels of the photograph (rms)", error < 10))

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "colours.png"
    picture(image, pictures).savefig(path, dpi=160, bbox_inches="tight")
    print(f"\nwritten to {path}")
    return verdict(answers)


def quantise(pixels: Tensor, num_colours: int, seed: int) -> tuple[Tensor, Tensor, float, float]:
    """Palette (K, 3), index of each pixel's colour, its inertia, and that of scikit-learn."""
    model = GaussianMixture.from_data(
        pixels, num_colours, covariance="unit", equal_weights=True, seed=seed
    )
    torch.manual_seed(seed)  # off the grid of levels, where no pixel is equally near to two
    model.loc = model.loc.detach() + 0.5 * torch.rand_like(model.loc)
    start = model.loc.detach().numpy().copy()

    began = time.perf_counter()
    fit = lvppl.EM(model, hard=True).fit(pixels, max_iter=1000, tol=1e-9, seed=seed, progress=False)
    seconds = time.perf_counter() - began
    (palette,) = (value for name, value in fit.params.items() if name.endswith("loc"))
    nearest = fit.posterior(pixels).map().values["z"]
    # max_z ln p(z, y) = −inertia / 2 − N (D/2 ln 2π + ln K)
    constant = len(pixels) * (1.5 * math.log(2 * math.pi) + math.log(num_colours))
    inertia = -2 * (float(fit.history["objective"][-1]) + constant)

    peer = KMeans(num_colours, init=start, n_init=1, max_iter=1000, tol=0.0, algorithm="lloyd")
    began = time.perf_counter()
    peer.fit(pixels.numpy())
    its_seconds = time.perf_counter() - began
    for name, iterations, took, value in (
        ("hard EM", len(fit.history["objective"]) - 1, seconds, inertia),
        ("scikit-learn", peer.n_iter_, its_seconds, peer.inertia_),
    ):
        rms = math.sqrt(value / pixels.numel())
        print(f"{num_colours:8}{name:>14}{iterations:12}{took:9.1f}{value:18,.0f}{rms:11.2f}")
    return palette, nearest, inertia, float(peer.inertia_)


# ------------------------------------------------------------------------------------- the picture


def picture(image: Tensor, quantised: list[tuple[Tensor, Tensor]]) -> Figure:
    """The photograph and its quantisations, each with its palette: widths are shares of pixels."""
    height, width = image.shape[1:]
    figure = Figure(figsize=(12.0, 3.3))
    grid = figure.add_gridspec(
        2, 3, height_ratios=[14, 1], left=0, right=1, bottom=0, top=0.92, wspace=0.02, hspace=0.04
    )
    count = len(image.flatten(1).unique(dim=1).T)
    show(figure.add_subplot(grid[0, 0]), image.permute(1, 2, 0), f"photograph: {count:,} colours")
    for column, (palette, nearest) in enumerate(quantised, start=1):
        colours = palette[nearest].reshape(height, width, 3)
        show(figure.add_subplot(grid[0, column]), colours, f"{len(palette)} colours")
        swatches(figure.add_subplot(grid[1, column]), palette, nearest)
    return figure


def show(ax: Axes, colours: Tensor, title: str) -> None:
    ax.imshow(colours.round().clamp(0, 255).to(torch.uint8).numpy())
    ax.set_title(title, fontsize=11, color=INK)
    ax.set_axis_off()


def swatches(ax: Axes, palette: Tensor, nearest: Tensor) -> None:
    """The colours from dark to light, as wide as their shares."""
    shares = nearest.bincount(minlength=len(palette)).double() / len(nearest)
    order = (palette @ torch.tensor([0.299, 0.587, 0.114], dtype=palette.dtype)).argsort()
    left = np.concatenate([[0.0], shares[order].cumsum(0).numpy()])[:-1]
    ax.barh(0, shares[order].numpy(), left=left, color=palette[order].numpy() / 255, height=1.0)
    ax.set_xlim(0, 1)
    ax.set_axis_off()


if __name__ == "__main__":
    sys.exit(main())

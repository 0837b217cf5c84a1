"""Old Faithful: the classic mixture of two Gaussians, by EM from several starts.

    python examples/old_faithful.py [--out runs/old_faithful] [--quick] [--seed 0]

272 eruptions of a geyser: how long each lasted, and how long the next one was waited for. Short
ones are followed by short waits. Writes a picture, and exits with 1 unless the global maximum of
the likelihood is reached, as scikit-learn finds it from many starts of its own.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from _answers import verdict
from _options import command_line
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from sklearn.mixture import GaussianMixture as SklearnMixture
from torch import Tensor

import lvppl
from lvppl.inspection.plots import COLOURS, FAINT, INK
from lvppl.models import GaussianMixture

# What is known: mean ln p(y) in nats, and the two locations, at the global maximum.
MAXIMUM = -4.155382
LOCATIONS = np.array([[2.036388, 54.478517], [4.289662, 79.968115]])


def main() -> int:
    options = command_line(
        __doc__, out="runs/old_faithful", quick="fewer starts", seed="of the starts"
    )
    table = lvppl.data.geyser(dtype=torch.float64)
    y = table.values

    # Pyro's program of a mixture; the start is that of scikit-learn: unequal locations, wide.
    model = GaussianMixture.from_data(y, 2, covariance="full", seed=options.seed)
    em = lvppl.EM(model, init="kmeans++", restarts=3 if options.quick else 10)
    fit = em.fit(y, max_iter=500, tol=1e-10, seed=options.seed, progress=False)
    print(f"{fit!r}\n")

    params = {name.split(".")[-1]: value.numpy() for name, value in fit.params.items()}
    order = params["loc"][:, 0].argsort()  # the short ones first
    weights, loc, tril = (params[name][order] for name in ("weights", "loc", "scale_tril"))
    covariance = tril @ tril.transpose(0, 2, 1)
    responsibilities = fit.posterior(y).marginals("z")[:, order]
    report(weights, loc, covariance)

    mean = float(fit.log_evidence(y).per_datum.mean())
    peer = scikit_learn(y.numpy(), num_starts=3 if options.quick else 50)
    print(f"\nmean ln p(y): {mean:.6f} nats; scikit-learn, best of many starts: {peer:.6f}")
    agree = (responsibilities.argmax(-1) == table.labels).double().mean()
    print(f"{100 * agree:.1f} % of the eruptions are in the class that they are labelled with")

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "old_faithful.png"
    picture(y, responsibilities, weights, loc, covariance).savefig(
        path, dpi=160, bbox_inches="tight"
    )
    print(f"written to {path}")
    return verdict(
        [
            ("EM converged", fit.status == "converged"),
            ("the known maximum, within 1e-5 nats", abs(mean - MAXIMUM) < 1e-5),
            ("scikit-learn's maximum, within 1e-5 nats", abs(mean - peer) < 1e-5),
            ("the known locations, within 1e-3 minutes", np.abs(loc - LOCATIONS).max() < 1e-3),
        ]
    )


def report(weights: np.ndarray, loc: np.ndarray, covariance: np.ndarray) -> None:
    print(f"{'':<8}{'weight':>8}{'lasts':>16}{'then a wait of':>20}{'correlation':>14}")
    print(f"{'':<8}{'':>8}{'minutes':>16}{'minutes':>20}")
    for name, w, μ, Σ in zip(("short", "long"), weights, loc, covariance, strict=True):
        σ = np.sqrt(np.diag(Σ))
        lasts, wait = f"{μ[0]:.2f} ± {σ[0]:.2f}", f"{μ[1]:.1f} ± {σ[1]:.1f}"
        print(f"{name:<8}{w:8.3f}{lasts:>16}{wait:>20}{Σ[0, 1] / σ.prod():14.2f}")


def scikit_learn(y: np.ndarray, *, num_starts: int) -> float:
    """Mean ln p(y) at the best of its starts, run to the end and without its regularisation."""
    peer = SklearnMixture(
        2, n_init=num_starts, tol=1e-12, max_iter=2000, reg_covar=0.0, random_state=0
    )
    return float(peer.fit(y).score(y))


# ------------------------------------------------------------------------------------- the picture


def picture(
    y: Tensor,
    responsibilities: Tensor,
    weights: np.ndarray,
    loc: np.ndarray,
    covariance: np.ndarray,
) -> Figure:
    """The eruptions coloured by their responsibilities, with ellipses of 1 and 2 sigma."""
    figure = Figure(figsize=(6.6, 5.2), layout="constrained")
    ax = figure.add_subplot()
    ends = np.array([to_rgb(COLOURS[1]), to_rgb(COLOURS[0])])
    mixed = responsibilities.numpy() @ ends  # a colour between the two where it is uncertain
    for k, name in enumerate(("short", "long")):
        for sigmas, alpha in ((2, 0.08), (1, 0.14)):
            ellipse(ax, loc[k], covariance[k], sigmas, ends[k], alpha)
        ax.plot(*loc[k], marker="+", color=INK, markersize=11, markeredgewidth=1.8, zorder=4)
        note = f"{name}: {100 * weights[k]:.0f} %"
        below = loc[k][1] - 2 * covariance[k][1, 1] ** 0.5
        ax.annotate(
            note,
            (loc[k][0], below),
            xytext=(0, -6),
            textcoords="offset points",
            ha="center",
            va="top",
            color=ends[k] * 0.8,
            fontsize=11,
        )
    ax.scatter(*y.T.numpy(), c=mixed, s=26, edgecolors="white", linewidths=0.5, zorder=3)
    ax.set_xlabel("duration of the eruption, minutes", color=INK)
    ax.set_ylabel("waiting time to the next one, minutes", color=INK)
    ax.set_title(
        "Old Faithful: a mixture of two Gaussians by EM (1σ and 2σ)", fontsize=11, color=INK
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=INK)
    ax.grid(color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_xlim(1.3, 5.3)
    ax.set_ylim(38, 99)
    return figure


def ellipse(
    ax: Axes,
    loc: np.ndarray,
    covariance: np.ndarray,
    sigmas: float,
    colour: np.ndarray,
    alpha: float,
) -> None:
    """The points at Mahalanobis distance ``sigmas`` from ``loc``."""
    variances, axes = np.linalg.eigh(covariance)
    width, height = 2 * sigmas * np.sqrt(variances)
    angle = np.degrees(np.arctan2(axes[1, 0], axes[0, 0]))
    for fill, options in (
        (True, {"facecolor": (*colour, alpha), "edgecolor": "none", "zorder": 1}),
        (False, {"edgecolor": colour, "linewidth": 1.4, "zorder": 2}),
    ):
        ax.add_patch(Ellipse(loc, width, height, angle=angle, fill=fill, **options))


if __name__ == "__main__":
    sys.exit(main())

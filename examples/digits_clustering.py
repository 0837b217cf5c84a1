"""Handwritten digits, sorted without labels: two mixtures by EM, beside k-means.

    python examples/digits_clustering.py [--out runs/digits_clustering] [--quick] [--seed 0]

1,797 images of 8×8. A mixture of Bernoulli vectors sees which pixels are dark; a mixture of
Gaussians with full covariances sees the first 15 principal components. Labels are used only to say
how well components and digits agree, by purity and by normalised mutual information (NMI). Writes
a picture, and exits with 1 unless each mixture beats scikit-learn's k-means on the same numbers.
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch
from _answers import verdict
from _options import command_line
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

import lvppl
from lvppl.inspection.plots import COLOURS, INK
from lvppl.models import BernoulliMixture, GaussianMixture

NUM_PRINCIPAL = 15
NUM_MEMBERS = 16  # digits shown of each component


def main() -> int:
    options = command_line(
        __doc__, out="runs/digits_clustering", quick="fewer starts", seed="of the starts"
    )
    digits = lvppl.data.digits(dtype=torch.float64)
    images = torch.cat([digits.train.images, digits.test.images]).flatten(1)
    labels = torch.cat([digits.train.labels, digits.test.labels])
    bits = (images >= 0.5).double()
    centre, axes = principal_axes(images)
    principal = (images - centre) @ axes
    print(f"{len(images):,} digits; no fit has seen a label\n")
    print(f"{'':<44}{'K':>4}{'seconds':>9}{'ln p(y)':>10}{'purity':>9}{'NMI':>7}")

    num_starts, seed = (12, options.seed) if options.quick else (30, options.seed)
    model = BernoulliMixture.from_data(bits, 20, seed=seed)
    began = time.perf_counter()
    em = lvppl.EM(model, init="kmeans++", restarts=2 if options.quick else 5)
    dark = em.fit(bits, max_iter=300, tol=1e-4, seed=seed, progress=False)
    dark_scores = row("Bernoulli mixture, dark pixels", began, dark, bits, labels)
    dark_peer = k_means("k-means, dark pixels", bits, 20, labels)

    began = time.perf_counter()
    gaussian = gaussian_mixture(principal, 10, num_starts, seed)
    name = f"Gaussian mixture, {NUM_PRINCIPAL} principal components"
    scores = row(name, began, gaussian, principal, labels)
    peer = k_means(f"k-means, {NUM_PRINCIPAL} principal components", principal, 10, labels)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "digits_clustering.png"
    params = {name.split(".")[-1]: value for name, value in gaussian.params.items()}
    means = (centre + params["loc"] @ axes.T).reshape(-1, 8, 8)
    posterior = gaussian.posterior(principal).marginals("z")
    picture(means, posterior, images.reshape(-1, 8, 8), labels).savefig(
        path, dpi=160, bbox_inches="tight"
    )
    print(f"\nwritten to {path}")
    return verdict(
        [
            ("Gaussian mixture: purity above 0.82", scores[0] > 0.82),
            ("Gaussian mixture: NMI 0.05 above k-means on the same", scores[1] > peer[1] + 0.05),
            ("Bernoulli mixture: purity above 0.8", dark_scores[0] > 0.8),
            ("Bernoulli mixture: NMI above k-means on the same", dark_scores[1] > dark_peer[1]),
        ]
    )


def principal_axes(y: Tensor) -> tuple[Tensor, Tensor]:
    """The mean, (D,), and the first principal axes as columns."""
    centre = y.mean(0)
    return centre, torch.linalg.svd(y - centre, full_matrices=False).Vh[:NUM_PRINCIPAL].T


def gaussian_mixture(y: Tensor, num_components: int, num_starts: int, seed: int) -> lvppl.EMFit:
    """The best of several ascents, by ln p(y); each begins where k-means ends."""
    fits = []
    for number in range(num_starts):
        balls = GaussianMixture.from_data(
            y, num_components, covariance="unit", equal_weights=True, seed=1000 * seed + number
        )
        hard = lvppl.EM(balls, hard=True).fit(y, max_iter=300, seed=seed, progress=False)
        model = with_moments(y, hard.posterior(y).map().values["z"], num_components)
        fits.append(lvppl.EM(model).fit(y, max_iter=300, tol=1e-4, seed=seed, progress=False))
    return max(fits, key=lambda fit: fit.history["objective"][-1])


def with_moments(y: Tensor, assigned: Tensor, num_components: int) -> GaussianMixture:
    """A mixture with the share, the mean and the covariance of each cluster."""
    model = GaussianMixture(num_components, y.shape[1], covariance="full").to(y)
    member = torch.nn.functional.one_hot(assigned, num_components).to(y)
    count = member.sum(0)
    model.weights, model.loc = count / len(y), member.T @ y / count[:, None]
    residual = y[:, None] - model.loc.detach()
    spread = torch.einsum("nk,nki,nkj->kij", member, residual, residual) / count[:, None, None]
    ridge = 1e-3 * y.var() * torch.eye(y.shape[1]).to(y)  # for clusters of few digits
    model.scale_tril = torch.linalg.cholesky(spread + ridge)
    return model


def k_means(name: str, y: Tensor, num_clusters: int, labels: Tensor) -> tuple[float, float]:
    began = time.perf_counter()
    peer = KMeans(num_clusters, n_init=10, random_state=0).fit(y.numpy())
    scores = agreement(torch.as_tensor(peer.labels_).long(), labels)
    show(name, num_clusters, time.perf_counter() - began, "", scores)
    return scores


def row(
    name: str, began: float, fit: lvppl.EMFit, y: Tensor, labels: Tensor
) -> tuple[float, float]:
    seconds = time.perf_counter() - began
    scores = agreement(fit.posterior(y).map().values["z"], labels)
    nats = f"{fit.history['objective'][-1] / len(y):.2f}"
    show(name, fit.model.num_components, seconds, nats, scores)
    return scores


def show(name: str, size: int, seconds: float, nats: str, scores: tuple[float, float]) -> None:
    print(f"{name:<44}{size:4}{seconds:9.1f}{nats:>10}{scores[0]:9.3f}{scores[1]:7.3f}", flush=True)


def agreement(assigned: Tensor, labels: Tensor) -> tuple[float, float]:
    """Purity, the share of digits that are the commonest of their component; and NMI."""
    counts = torch.zeros(int(assigned.max()) + 1, 10)
    counts.index_put_((assigned, labels), torch.ones(()), accumulate=True)
    purity = float(counts.amax(-1).sum()) / len(labels)
    return purity, float(normalized_mutual_info_score(labels, assigned))


# ------------------------------------------------------------------------------------- the picture


def picture(means: Tensor, posterior: Tensor, images: Tensor, labels: Tensor) -> Figure:
    """Each component: its mean, the digits it is surest of, and some that it got wrong."""
    assigned = posterior.argmax(-1)
    names = [int(labels[assigned == k].mode().values) for k in range(len(means))]
    figure = Figure(figsize=(9.2, 5.9), layout="constrained")
    ax = figure.add_subplot()
    for row, k in enumerate(np.argsort(names, kind="stable")):
        members = (assigned == k).nonzero().flatten()
        right = labels[members] == names[k]
        spread = torch.linspace(0, int(right.sum()) - 1, NUM_MEMBERS).long()
        tile(ax, 0, row, means[k])
        for column, member in enumerate(members[right][spread]):
            tile(ax, 1.5 + column, row, images[member])
        wrong = members[~right]
        wrong = wrong[torch.linspace(0, len(wrong) - 1, min(4, len(wrong))).long()]
        for column, member in enumerate(wrong):
            tile(ax, NUM_MEMBERS + 2 + column, row, images[member], COLOURS[1])
        share = f"{len(members)}, {100 * float(right.double().mean()):.0f} %"
        ax.text(-0.25, row + 0.46, share, ha="right", va="center", fontsize=9, color=INK)
    for x, name in (
        (-0.25, "digits, purity"),
        (0.46, "mean"),
        (1.5 + NUM_MEMBERS / 2, "members, an even choice"),
        (NUM_MEMBERS + 4, "misfits"),
    ):
        align = "right" if x < 0 else "center"
        ax.text(x, -0.25, name, ha=align, va="bottom", fontsize=9, color=INK)
    ax.set_xlim(-2.6, NUM_MEMBERS + 6.1)
    ax.set_ylim(len(means), -0.6)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return figure


def tile(ax: Axes, x: float, y: float, image: Tensor, frame: str | None = None) -> None:
    ax.imshow(1 - image.clamp(0, 1), cmap="gray", vmin=0, vmax=1, extent=(x, x + 0.92, y + 0.92, y))
    if frame:
        ax.add_patch(Rectangle((x, y), 0.92, 0.92, fill=False, edgecolor=frame, linewidth=1.2))


if __name__ == "__main__":
    sys.exit(main())

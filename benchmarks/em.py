"""One iteration of EM for Gaussian mixtures, and of k-means, beside scikit-learn and pomegranate.

    python benchmarks/em.py

float32 data, one start for all, the same number of iterations. What each arrives at is scored by
one judge, in float64, and shown first. The time of an iteration is the difference between a long
and a short run, so that set-up does not count.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Mapping

import numpy as np
import torch
from _timing import machine, table
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import MultivariateNormal

import lvppl
from lvppl import models

Mixture = tuple[Tensor, Tensor, Tensor]  # weights (K,), locations (K, D), covariances (K, D, D)
Run = Callable[[int], Mixture]


def per_iteration(
    contestants: Mapping[str, Callable[[int], object]], *, short: int, long: int, rounds: int = 5
) -> dict[str, float]:
    """Median seconds of an iteration; each round runs every contestant in turn."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run(short)
            middle = time.perf_counter()
            run(long)
            once = time.perf_counter() - middle - (middle - start)
            taken[name].append(once / (long - short))
    return {name: statistics.median(times) for name, times in taken.items()}


def blobs(n: int, d: int, k: int, *, spread: float) -> Tensor:
    """n draws from k clusters of standard deviation one, their centres ``spread`` wide."""
    torch.manual_seed(0)
    return spread * torch.randn(k, d)[torch.randint(k, (n,))] + torch.randn(n, d)


def judge(y: Tensor, mixture: Mixture) -> float:
    """Mean log-likelihood, nats per datum."""
    weights, loc, covariance = (part.double() for part in mixture)
    normal = MultivariateNormal(loc, covariance)
    total = sum(
        (weights.log() + normal.log_prob(part.double()[:, None])).logsumexp(1).sum()
        for part in y.split(10_000)
    )
    return float(total) / len(y)


def with_lvppl(y: Tensor, loc: Tensor, covariance: str) -> Run:
    count, dim = loc.shape

    def run(iterations: int) -> Mixture:
        model = models.GaussianMixture(count, dim, covariance=covariance)
        model.loc = loc.clone()
        fit = lvppl.EM(model, floor=0.0).fit(
            y, max_iter=iterations, tol=0.0, seed=0, progress=False
        )
        params = {name.split(".")[-1]: value.double() for name, value in fit.params.items()}
        diag = covariance == "diag"
        factor = torch.diag_embed(params["scale"]) if diag else params["scale_tril"]
        return params["weights"], params["loc"], factor @ factor.mT

    return run


def with_scikit_learn(y: Tensor, loc: Tensor, covariance: str) -> Run:
    count, dim = loc.shape
    data, means = y.numpy(), loc.numpy()
    precisions = np.ones((count, dim)) if covariance == "diag" else np.stack([np.eye(dim)] * count)

    def run(iterations: int) -> Mixture:
        model = GaussianMixture(
            count,
            covariance_type=covariance,
            tol=0.0,
            reg_covar=0.0,
            max_iter=iterations,
            weights_init=np.full(count, 1 / count, dtype=data.dtype),
            means_init=means,
            precisions_init=precisions.astype(data.dtype),
        ).fit(data)
        weights, at, spread = map(
            torch.as_tensor, (model.weights_, model.means_, model.covariances_)
        )
        return weights, at, torch.diag_embed(spread) if covariance == "diag" else spread

    return run


def with_pomegranate(y: Tensor, loc: Tensor, covariance: str) -> Run:
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    def run(iterations: int) -> Mixture:
        start = torch.ones(loc.shape[1]) if covariance == "diag" else torch.eye(loc.shape[1])
        normals = [
            Normal(mean.clone(), start.clone(), covariance_type=covariance, check_data=False)
            for mean in loc
        ]
        model = GeneralMixtureModel(normals, check_data=False)
        for _ in range(iterations):
            model.summarize(y)
            model.from_summaries()
        spread = torch.stack([normal.covs.detach() for normal in normals])
        at = torch.stack([normal.means.detach() for normal in normals])
        return (
            model.priors.detach(),
            at,
            torch.diag_embed(spread) if covariance == "diag" else spread,
        )

    return run


def mixture(n: int, d: int, k: int, covariance: str) -> None:
    """EM of a Gaussian mixture: the likelihood that each reaches, then the times."""
    y = blobs(n, d, k, spread=1.0)
    loc = y[:k].clone()
    runs = {"scikit-learn": with_scikit_learn(y, loc, covariance)}
    if importlib.util.find_spec("pomegranate"):
        runs["pomegranate"] = with_pomegranate(y, loc, covariance)
    else:
        print("pomegranate is not installed: left out\n")
    runs["lvppl"] = with_lvppl(y, loc, covariance)
    scores = {name: judge(y, run(10)) for name, run in runs.items()}
    print("nats per datum: " + ", ".join(f"{name} {score:.6f}" for name, score in scores.items()))
    assert max(scores.values()) - min(scores.values()) < 1e-4, scores
    title = f"mixture, {covariance}, {n:,} × {d}, K = {k}, one iteration"
    print(table(title, per_iteration(runs, short=2, long=17), against="scikit-learn"), "\n")


def k_means(n: int, d: int, k: int) -> None:
    """Lloyd's algorithm: the centres and the inertia that each reaches, then the times."""
    y = blobs(n, d, k, spread=2.0)
    loc = y[:k].clone()

    def scikit_learn(iterations: int, y: Tensor = y) -> Tensor:
        start = loc.to(y.dtype).numpy()
        options = {"n_init": 1, "algorithm": "lloyd", "tol": 0.0, "max_iter": iterations}
        return torch.as_tensor(KMeans(k, init=start, **options).fit(y.numpy()).cluster_centers_)

    def hard_em(iterations: int) -> Tensor:
        model = models.GaussianMixture(k, d, covariance="unit", equal_weights=True)
        model.loc = loc.clone()
        fit = lvppl.EM(model, hard=True).fit(
            y, max_iter=iterations, tol=0.0, seed=0, progress=False
        )
        return next(iter(fit.params.values()))

    runs = {"scikit-learn": scikit_learn, "lvppl": hard_em}
    exact = scikit_learn(2, y.double())
    errors = {name: float((run(2).double() - exact).abs().max()) for name, run in runs.items()}
    print(
        "centres after two iterations, largest error against scikit-learn in float64: "
        + ", ".join(f"{name} {error:.0e}" for name, error in errors.items())
    )
    inertia = {name: inertia_of(y, run(10)) for name, run in runs.items()}
    print(
        "inertia per datum after ten: "
        + ", ".join(f"{name} {value:.6f}" for name, value in inertia.items())
    )
    assert abs(inertia["lvppl"] / inertia["scikit-learn"] - 1) < 1e-5, inertia
    title = f"k-means, {n:,} × {d}, K = {k}, one iteration"
    print(table(title, per_iteration(runs, short=2, long=22), against="scikit-learn"), "\n")


def inertia_of(y: Tensor, centres: Tensor) -> float:
    """Mean squared distance to the nearest centre."""
    parts = y.double().split(10_000)
    total = sum(torch.cdist(part, centres.double()).amin(1).square().sum() for part in parts)
    return float(total) / len(y)


def main() -> None:
    warnings.filterwarnings("ignore", message=".*did not converge.*")
    print(machine(), "\n")
    mixture(200_000, 16, 16, "full")
    mixture(100_000, 32, 16, "diag")
    k_means(1_000_000, 16, 64)


if __name__ == "__main__":
    main()

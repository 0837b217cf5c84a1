"""Imputation of the breast cancer data: MIWAE by lvppl beside scikit-learn.

    python benchmarks/missing.py            # five masks; some minutes each
    python benchmarks/missing.py --masks 1

569 data of 30 features, standardised, half of the values removed completely at random, as in the
demonstration of Mattei and Frellsen (2019): 10 latents, tanh networks of two layers of 128 units, a
Student-t decoder, K = 20, L = 10,000 draws for an imputation. Every imputer sees the same masks;
none sees the removed values, which only the error is computed from. The settings are fixed
beforehand: nothing is chosen by that error.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from _timing import machine
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, SimpleImputer
from torch import nn

import lvppl
from lvppl.guides import AmortizedNormal, DenseEncoder
from lvppl.models import VAE, DenseDecoder, StudentTLikelihood

Array = np.ndarray
LATENTS, HIDDEN, PARTICLES, DRAWS = 10, (128, 128), 20, 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--masks", type=int, default=5, help="how many masks, seeds 0, 1, ...")
    parser.add_argument("--first", type=int, default=0, help="seed of the first mask")
    parser.add_argument("--epochs", type=int, default=1000, help="of MIWAE")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of MIWAE")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    warnings.simplefilter("ignore", UserWarning)
    print(machine(), flush=True)
    x = standardised()
    errors: dict[str, list[float]] = {}
    for seed in range(options.first, options.first + options.masks):
        missing = mask(x.shape, seed)
        y = np.where(missing, math.nan, x)
        for name, imputer in imputers(seed, options).items():
            start = time.perf_counter()
            error = float(np.square(imputer(y) - x)[missing].mean())
            errors.setdefault(name, []).append(error)
            seconds = time.perf_counter() - start
            print(f"mask {seed}  {name:<28} {error:.4f}  {seconds:6.0f} s", flush=True)
    print(table(errors))


def standardised() -> Array:
    x = load_breast_cancer().data
    return (x - x.mean(0)) / x.std(0)


def mask(shape: tuple[int, ...], seed: int) -> Array:
    """True at half of all values, chosen without replacement."""
    size = math.prod(shape)
    missing = np.zeros(size, dtype=bool)
    missing[np.random.default_rng(seed).choice(size, size // 2, replace=False)] = True
    return missing.reshape(shape)


def imputers(seed: int, options: argparse.Namespace) -> dict[str, Callable[[Array], Array]]:
    trees = {"n_estimators": 100, "random_state": seed}
    forests = {
        "missForest, extra trees": ExtraTreesRegressor(**trees),
        "missForest, random forest": RandomForestRegressor(**trees),
    }
    return {
        "mean": SimpleImputer().fit_transform,
        "IterativeImputer": IterativeImputer(random_state=seed).fit_transform,
        **{
            name: IterativeImputer(estimator, random_state=seed).fit_transform
            for name, estimator in forests.items()
        },
        "MIWAE, lvppl": partial(
            miwae, seed=seed, epochs=options.epochs, learning_rate=options.learning_rate
        ),
    }


def miwae(y: Array, *, seed: int, epochs: int, learning_rate: float) -> Array:
    torch.manual_seed(seed)
    data, features = torch.tensor(y, dtype=torch.float32), y.shape[1]
    networks = {"hidden_dims": HIDDEN, "activation": nn.Tanh}
    model = VAE(
        latent_dim=LATENTS,
        x_shape=(features,),
        likelihood=StudentTLikelihood,
        decoder=partial(DenseDecoder, **networks),
    )
    guide = AmortizedNormal(
        latent_dim=LATENTS, x_shape=(features,), encoder=partial(DenseEncoder, **networks)
    )
    svi = lvppl.SVI(
        model,
        guide,
        objective=lvppl.IWAE(num_particles=PARTICLES),
        learning_rate=learning_rate,
    )
    fit = svi.fit(
        data,
        missing="nan",
        num_epochs=epochs,
        batch_size=64,
        seed=seed,
        evaluate_every=epochs,
        progress=False,
    )
    found = fit.impute(data, num_samples=DRAWS, seed=seed)
    holes = found.missing["x"]
    print(
        f"        ln p(y observed) {found.estimate.mean:.3f} nats a datum; Monte Carlo error of an "
        f"imputation {float(found.std_error['x'][holes].median()):.3f}, posterior std "
        f"{float(found.std['x'][holes].median()):.3f} in the median; "
        f"{found.estimate.flagged.numel()} data flagged by k-hat",
        flush=True,
    )
    return found.values["x"].double().numpy()


def table(errors: dict[str, list[float]]) -> str:
    """Mean squared errors, and what they are above MIWAE's on the same masks, in Markdown."""
    ours = errors["MIWAE, lvppl"]
    rows = [
        "| imputer | mean squared error | above MIWAE, paired |",
        "|---|---|---|",
    ]
    for name, found in errors.items():
        gaps = [a - b for a, b in zip(found, ours, strict=True)]
        against = "–" if found is ours else mean_and_error(gaps)
        rows.append(f"| {name} | {mean_and_error(found)} | {against} |")
    return "\n".join(rows)


def mean_and_error(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.stdev(values) / len(values) ** 0.5:.4f}"


if __name__ == "__main__":
    main()

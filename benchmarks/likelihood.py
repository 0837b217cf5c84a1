"""Importance estimates of ln p(y): lvppl beside Pyro's vectorized_importance_weights.

    python benchmarks/likelihood.py

A VAE 784-200-200-50 on 100 images, 1,000 draws each. The two use different random numbers; that
they estimate the same number is shown first.
"""

from __future__ import annotations

import math
import warnings
from functools import partial

import pyro
import torch
from _timing import machine, medians, table
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor

import lvppl
from lvppl.guides import AmortizedNormal, DenseEncoder
from lvppl.models import VAE, DenseDecoder

NUM_DATA, NUM_SAMPLES = 100, 1000


def main() -> None:
    pyro.enable_validation(False)
    warnings.simplefilter("ignore", UserWarning)  # k-hat of a short training
    torch.manual_seed(0)
    images = lvppl.data.digits().train.images
    y = torch.nn.functional.interpolate(images[:, None], size=(28, 28)).flatten(1).round()
    model = VAE(
        latent_dim=50, x_shape=(784,), decoder=partial(DenseDecoder, hidden_dims=(200, 200))
    )
    encoder = partial(DenseEncoder, hidden_dims=(200, 200))
    guide = AmortizedNormal(latent_dim=50, x_shape=(784,), encoder=encoder)
    fit = lvppl.SVI(model, guide).fit(y, num_epochs=5, batch_size=100, seed=0, progress=False)
    test = y[:NUM_DATA]

    def one_by_one(size: int) -> Tensor:
        """Pyro's weights are sums over the batch: per-datum values need one datum at a time."""
        with torch.no_grad():
            return torch.stack([weights(datum[None], size) for datum in test])

    def weights(datum: Tensor, size: int) -> Tensor:
        total = datum.new_tensor(-math.inf)
        for _ in range(NUM_SAMPLES // size):
            log_weights, _, _ = vectorized_importance_weights(
                model, guide, datum, num_samples=size, max_plate_nesting=1, normalized=False
            )
            total = torch.logaddexp(total, log_weights.logsumexp(0))
        return total - math.log(NUM_SAMPLES)

    with fit.active():
        pyro_mean = float(one_by_one(1000).mean())
        estimate = lvppl.log_likelihood(model, test, guide=guide, num_samples=NUM_SAMPLES, seed=1)
        print(machine(), "\n")
        print(f"nats per datum: Pyro {pyro_mean:.2f}, lvppl {estimate.mean:.2f}")
        contestants = {
            f"Pyro, {size} draws a chunk": partial(one_by_one, size) for size in (200, 500, 1000)
        }
        contestants["lvppl"] = partial(
            lvppl.log_likelihood, model, test, guide=guide, num_samples=NUM_SAMPLES, seed=1
        )
        times = medians(contestants, rounds=5, seconds=1.0)
    best = min((name for name in times if name != "lvppl"), key=times.__getitem__)
    title = f"{NUM_DATA} data × {NUM_SAMPLES:,} draws"
    print(table(title, times, against=best, unit="s"))


if __name__ == "__main__":
    main()

"""One eager SVI step: loss and gradients by lvppl's objectives beside Pyro's own.

    python benchmarks/svi_step.py

Both run the same program; that they compute the same number is shown first (same seed).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from _timing import machine, medians, table
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch.distributions import constraints

import lvppl
from lvppl.guides import AmortizedNormal, DenseEncoder
from lvppl.models import VAE, DenseDecoder


def normal_normal() -> tuple[Any, Any, tuple[Any, ...]]:
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(y):
        slope = pyro.param("slope", torch.tensor(0.5))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y, scale))

    return model, guide, (torch.randn(100),)


def vae() -> tuple[Any, Any, tuple[Any, ...]]:
    def one_layer(cls):
        return lambda first, second: cls(first, second, hidden_dims=(400,))

    model = VAE(latent_dim=20, x_shape=(784,), decoder=one_layer(DenseDecoder))
    guide = AmortizedNormal(latent_dim=20, x_shape=(784,), encoder=one_layer(DenseEncoder))
    return model, guide, (torch.rand(128, 784).round(),)


def mixture() -> tuple[Any, Any, tuple[Any, ...]]:
    def model(y):
        weights = pyro.param("weights", torch.ones(5) / 5, constraint=constraints.simplex)
        means = pyro.param("means", torch.arange(5.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(means[k], 1.0), obs=y)

    return model, lambda y: None, (torch.randn(1000),)


def step(loss: Any, model: Any, guide: Any, args: tuple[Any, ...]) -> Callable[[], float]:
    def call() -> float:
        value: float = loss.loss_and_grads(model, guide, *args)
        for leaf in pyro.get_param_store()._params.values():
            leaf.grad = None
        return value

    return call


def compare(title: str, program: Callable[[], Any], theirs: Any, ours: Any) -> None:
    torch.manual_seed(0)
    pyro.clear_param_store()
    model, guide, args = program()
    values = []
    for loss in (theirs, ours):
        pyro.set_rng_seed(0)
        values.append(step(loss, model, guide, args)())
    difference = abs(values[0] - values[1]) / abs(values[0])
    assert difference < 1e-5, values
    name = f"Pyro {type(theirs).__name__}"
    times = medians(
        {name: step(theirs, model, guide, args), "lvppl": step(ours, model, guide, args)}
    )
    print(table(f"{title} (same loss to {difference:.0e})", times, against=name), "\n")


def main() -> None:
    pyro.enable_validation(False)
    print(machine(), "\n")
    compare(
        "Normal–Normal, 100 data, drawn", normal_normal, Trace_ELBO(), lvppl.IWAE(num_particles=1)
    )
    compare("Normal–Normal, closed KL", normal_normal, TraceMeanField_ELBO(), lvppl.ELBO())
    compare("VAE 784-400-20, batch 128", vae, TraceMeanField_ELBO(), lvppl.ELBO())
    compare(
        "mixture, N = 1,000, K = 5, enumerated",
        mixture,
        TraceEnum_ELBO(max_plate_nesting=1),
        lvppl.ELBO(),
    )


if __name__ == "__main__":
    main()

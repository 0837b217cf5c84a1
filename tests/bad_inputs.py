"""Every bad input that was tried through the public interface, and what its error must say.

``python -m tests.bad_inputs`` writes ``docs/errors.md`` from this registry.
"""

from __future__ import annotations

import gzip
import inspect
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

import lvppl
from lvppl.distributions import (
    Autoregressive,
    AutoregressivePart,
    DiscretizedLogistic,
    HiddenMarkov,
    Quantized,
)
from lvppl.guides import AmortizedFlow, ConvEncoder, PerDatumNormal
from lvppl.models import (
    VAE,
    ConvDecoder,
    GaussianComponents,
    GaussianLikelihood,
    GaussianMixture,
    HiddenMarkovModel,
    ProbabilisticPCA,
)

__all__ = ["PAGE", "TOPICS", "BadInput", "error_of", "page"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"

Program = Callable[..., Any]
Attempt = Callable[[Path], Any]
"""Does the wrong thing; the path is an empty folder of its own."""


@dataclass(frozen=True)
class BadInput:
    """One thing that a user may get wrong.

    Attributes:
        title: what was tried, in Markdown.
        attempts: the calls that must refuse it, by their names.
        says: fragments that the message must hold, with " … " between them: what is at fault, what
            came, and the remedy.
        error: what is raised.
    """

    title: str
    attempts: Mapping[str, Attempt]
    says: str
    error: type[Exception] = lvppl.ProgramError

    def unsaid(self, error: Exception) -> list[str]:
        """The fragments that the message of ``error`` lacks, whatever their case."""
        message = str(error).casefold()
        return [part for part in self.says.split(" … ") if part.casefold() not in message]

    def is_met_by(self, error: Exception | None) -> bool:
        return isinstance(error, self.error) and not self.unsaid(error)


def call(title: str, attempt: Attempt, says: str) -> BadInput:
    """A bad input to one call."""
    return BadInput(title, {"": attempt}, says)


def part(title: str, attempt: Attempt, says: str) -> BadInput:
    """A bad argument of a model or a guide, which know nothing of lvppl's errors."""
    return BadInput(title, {"": attempt}, says, ValueError)


def _fit(model: Program, guide: Program, *data: Any, **options: Any) -> lvppl.Fit:
    options = {"num_steps": 1, "seed": 0, "progress": False} | options
    return lvppl.SVI(model, guide).fit(*data, **options)


def _likelihood(model: Program, guide: Program, *data: Any) -> Any:
    return lvppl.log_likelihood(model, *data, guide=guide, num_samples=2, seed=0)


def _loss(objective: Any, model: Program, guide: Program, *data: Any) -> Tensor:
    return objective.differentiable_loss(model, guide, *data)


def _wake(model: Program, guide: Program, **options: Any) -> Tensor:
    objective = lvppl.ReweightedWakeSleep(**{"num_particles": 2} | options)
    return objective.differentiable_loss(model, guide, Y)


def _pyro_step(model: Program, guide: Program, *data: Any) -> Any:
    optimizer = pyro.optim.Adam({"lr": 0.01})
    return pyro.infer.SVI(model, guide, optimizer, loss=lvppl.ELBO()).step(*data)


CALLS: dict[str, Program] = {
    "check": lvppl.check,
    "ELBO": lambda *pair: _loss(lvppl.ELBO(), *pair),
    "IWAE": lambda *pair: _loss(lvppl.IWAE(num_particles=2), *pair),
    "pyro.infer.SVI": _pyro_step,
    "SVI.fit": _fit,
    "log_likelihood": _likelihood,
}
"""The ways in for a model, a guide and data."""


def program(
    title: str,
    pair: tuple[Program, Program],
    says: str,
    data: tuple[Any, ...] | None = None,
    by: tuple[str, ...] = tuple(CALLS),
) -> BadInput:
    """A model and a guide, or data for them, that every call named in ``by`` must refuse."""
    data = (Y,) if data is None else data
    attempts = {name: partial(_attempt, CALLS[name], *pair, *data) for name in by}
    return BadInput(title, attempts, says)


def _attempt(way_in: Program, model: Program, guide: Program, *rest: Any) -> Any:
    *data, _folder = rest
    return way_in(model, guide, *data)


CHECKED = ("check", "SVI.fit")
CHECKED_DATA = ("check", "SVI.fit", "log_likelihood")
LOSSES = ("check", "ELBO", "IWAE", "pyro.infer.SVI", "SVI.fit")

# ------------------------------------------------------------------------------- tiny programs

Y = torch.tensor([0.5, 1.0, 2.0, 0.25])
ENCODER = nn.Linear(4, 1)
FLOW = transforms.Planar(3)


def normal(y: Tensor) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(len(y)), 1.0)


def model_of(
    prior: Program = normal, likelihood: Program = lambda z: dist.Normal(z, 1.0), name: str = "z"
) -> Program:
    """z_n ~ prior, y_n | z_n ~ likelihood, in one data plate."""

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample(name, prior(y))
            pyro.sample("y", likelihood(z), obs=y)

    return model


def guide_of(posterior: Program | None = None, name: str = "z") -> Program:
    """q(z_n | y_n), in the data plate, of a learned location unless given."""

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.tensor(0.1))
        with pyro.plate("data", len(y)):
            pyro.sample(name, posterior(y) if posterior else dist.Normal(loc + 0.5 * y, 0.7))

    return guide


def global_model(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def global_guide(y: Tensor) -> None:
    pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.0)), 1.0))


def subsampled_model(y: Tensor) -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def subsampled_local_model(y: Tensor) -> None:
    with pyro.plate("data", len(y), subsample_size=2) as index:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])


def other_minibatch_guide(y: Tensor) -> None:
    with pyro.plate("rows", 2):
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.zeros(2)), 1.0))


def unplated_latent(y: Tensor) -> None:
    pyro.sample("z", dist.Normal(0.5 * y + pyro.param("loc", lambda: torch.tensor(0.0)), 0.7))


def other_plate_guide(y: Tensor) -> None:
    with pyro.plate("rows", len(y)):
        pyro.sample("z", dist.Normal(0.5 * y + pyro.param("loc", lambda: torch.tensor(0.0)), 0.7))


def shifted_guide(shift: float) -> Program:
    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.tensor(shift))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y + loc, 0.1))

    return guide


def half_guide(y: Tensor) -> None:
    scale = pyro.param("scale", lambda: torch.tensor(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.HalfNormal(scale))


def counting_guide(y: Tensor) -> None:
    rate = pyro.param("rate", lambda: torch.tensor(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Poisson(rate))


def observing_guide(y: Tensor) -> None:
    guide_of()(y)
    with pyro.plate("data_of_guide", len(y)):
        pyro.sample("y", dist.Normal(y, 1.0))


def twice(y: Tensor) -> None:
    model_of()(y)
    with pyro.plate("data_again", len(y)):
        pyro.sample("z", dist.Normal(y, 1.0))


def extra_site_guide(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(loc, 0.7))
        pyro.sample("u", dist.Normal(loc, 0.7))


def conditioned_guide(y: Tensor) -> None:
    """A guide that observes the data itself: its density then counts ln q(y) as well."""
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(loc, 0.7))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def blind_guide(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(loc, 0.7))


def nan_guide(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(torch.where(y == 2, math.nan, loc), 0.7))


def small_plate_guide(y: Tensor) -> None:
    with pyro.plate("data", 1):
        pyro.sample("z", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.1)), 0.7))


def no_guide(*data: Any) -> None:
    """A guide without sites."""


def coin(y: Tensor) -> dist.TorchDistribution:
    return dist.Bernoulli(torch.tensor(0.5))


def enumerated(mark: str, prior: Program = coin) -> Program:
    """Two components for each datum, marked for enumeration."""

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", prior(y), infer={"enumerate": mark})
            pyro.sample("y", dist.Normal(k, 1.0), obs=y)

    return model


def unplated_model(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.zeros(()))
    pyro.sample("y", dist.Normal(loc, 1.0).expand([len(y)]).to_event(1), obs=y)


def parameterless_guide(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(y, 1.0))


def two_enumerated(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        j = pyro.sample("j", coin(y), infer={"enumerate": "parallel"})
        k = pyro.sample("k", coin(y), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(j + k, 1.0), obs=y)


def enumerating_guide(y: Tensor) -> None:
    logits = pyro.param("logits", lambda: torch.tensor(0.0))
    with pyro.plate("data", len(y)):
        pyro.sample("k", dist.Bernoulli(logits=logits), infer={"enumerate": "parallel"})


def coin_and_count(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", coin(y))
        c = pyro.sample("c", dist.Poisson(1.0 + k))
        pyro.sample("y", dist.Normal(c, 1.0), obs=y)


def coin_then_count_guide(y: Tensor) -> None:
    rate = pyro.param("rate", lambda: torch.tensor(1.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", coin(y), infer={"enumerate": "parallel"})
        pyro.sample("c", dist.Poisson(rate + k))


def global_coin(y: Tensor) -> None:
    k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(k + pyro.param("m", torch.tensor(0.0)), 1.0), obs=y[index])


def drawn_coin(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        k = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)


def coin_guide(y: Tensor) -> None:
    logits = pyro.param("logits", lambda: torch.tensor(0.0))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Bernoulli(logits=logits))


def generator(y: Tensor) -> None:
    """A GAN's: y is a function of z."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", normal(y))
        pyro.sample("y", dist.Delta(z.exp()), obs=y)


def loopy(y: Tensor) -> None:
    """An Ising pair beside each datum."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", normal(y))
        pyro.factor("coupling", -(z**2))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def fifty_bits(y: Tensor) -> None:
    """No form is known of the observation, so that every state would have to be run."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((50,), 0.5)).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1).tanh(), 1.0), obs=y)


def without_end(y: Tensor) -> None:
    """Asks for petabytes."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", normal(y))
        torch.empty(2**50)
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


class Draws(dist.TorchDistribution):
    """A distribution that can be sampled, and has no density."""

    arg_constraints: ClassVar = {}
    support = torch.distributions.constraints.real

    def __init__(self, z: Tensor) -> None:
        self.z = z
        super().__init__(z.shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Draws:
        return Draws(self.z.expand(batch_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.z.detach().expand(self._extended_shape(sample_shape))


def grid(num_columns: int) -> tuple[Program, Program]:
    """Two data plates."""

    def model(y: Tensor) -> None:
        with pyro.plate("rows", len(y), dim=-2), pyro.plate("columns", num_columns):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y), num_columns), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.tensor(0.1))
        with pyro.plate("rows", len(y), dim=-2), pyro.plate("columns", num_columns):
            pyro.sample("z", dist.Normal(loc, 0.7))

    return model, guide


def elsewhere(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(len(y), device="meta"), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def image_model(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pixels = dist.Normal(z[..., None], 1.0).expand([*z.shape, y.shape[-1]])
        pyro.sample("y", pixels.to_event(1), obs=y)


def image_guide(y: Tensor) -> None:
    encoder = pyro.module("encoder", ENCODER)
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(encoder(y).squeeze(-1), 1.0))


def fixed_size_model(y: Tensor) -> None:
    with pyro.plate("data", 4):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def per_row_guide(y: Tensor) -> None:
    loc = pyro.param("loc", torch.zeros(4))
    with pyro.plate("data", 4):
        pyro.sample("z", dist.Normal(loc, 1.0))


def regression(x: Tensor, y: Tensor) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def slope_guide(x: Tensor, y: Tensor) -> None:
    pyro.sample("slope", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.0)), 1.0))


def vector_model(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(len(y), 3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


def flow_guide(y: Tensor) -> None:
    """A planar flow, which has no inverse."""
    flow = pyro.module("flow", FLOW)
    with pyro.plate("data", len(y)):
        base = dist.Normal(y.new_zeros(len(y), 3), 1.0).to_event(1)
        pyro.sample("z", dist.TransformedDistribution(base, [flow]))


def learned_model(y: Tensor) -> None:
    loc = pyro.param("m", lambda: torch.tensor(0.1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(loc, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def nonlinear_model(y: Tensor) -> None:
    """Three latents a datum: too many for quadrature."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z.sin().sum(-1), 1.0), obs=y)


def nonlinear_guide(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(loc.expand(len(y), 3), 0.7).to_event(1))


def two_coins(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", coin(y))
        pyro.sample("y", dist.Normal(k, 1.0), obs=y)


def half_scaled(y: Tensor) -> None:
    with pyro.plate("data", len(y)), pyro.poutine.scale(scale=0.5):
        loc = pyro.param("loc", lambda: torch.tensor(0.1))
        pyro.sample("z", dist.Normal(loc + 0.5 * y, 0.7))


def chained_guide(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(loc + y, 0.7))
        pyro.sample("w", dist.Normal(z, 0.7))


def chained_model(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", normal(y))
        w = pyro.sample("w", dist.Normal(z, 1.0))
        pyro.sample("y", dist.Normal(w, 1.0), obs=y)


# ------------------------------------------------------------------- programs with missing values


def observing(fn: Program) -> Program:
    """A model without latents."""

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", fn(y), obs=y)

    return model


def chain_of_pairs(y: Tensor) -> Any:
    """A hidden Markov model of pairs, with an emission of its own for every sequence."""
    emission = dist.Normal(torch.zeros(len(y), 2, 2), 1.0).to_event(1)
    return HiddenMarkov(torch.zeros(len(y), 2), torch.zeros(2, 2), emission)


def bits_in_order(y: Tensor) -> Any:
    """Each bit given those before it."""

    def conditionals(y: Tensor) -> Any:
        before = torch.cat([torch.zeros_like(y[..., :1]), y[..., :-1]], -1).cumsum(-1)
        return dist.Bernoulli(logits=before).to_event(1)

    return Autoregressive(conditionals, torch.zeros(2))


def steps_in_time(y: Tensor) -> None:
    """A model that reads what it observes: each step is about the one before."""
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        before = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], -1)
        pyro.sample("y", dist.Normal(z[..., None] + before, 1.0).to_event(1), obs=y)


def first_column_guide(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.1))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(loc + y[:, 0], 1.0))


def hurdle(y: Tensor) -> None:
    """Whether a value is positive, and its size if so."""
    some = y > 0
    with pyro.plate("data", len(y)):
        pyro.sample("some", dist.Bernoulli(torch.tensor(0.9)), obs=some.float())
        with pyro.poutine.mask(mask=some):
            pyro.sample("y", dist.LogNormal(0.0, 1.0), obs=torch.where(some, y, 1.0))


def by_the_last(y: Tensor) -> None:
    """Each step depends on whether the one before was 1."""
    last = torch.zeros(len(y))
    with pyro.plate("data", len(y)):
        for t in range(y.shape[1]):
            fn = dist.Bernoulli(torch.where(last == 1, 0.9, 0.1))
            pyro.sample(f"y_{t}", fn, obs=y[:, t])
            last = y[:, t]


COUPLED = observing(lambda y: dist.Dirichlet(torch.ones(2)))
SHARES = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.125, math.nan]])


# ------------------------------------------------------------------- programs with discrete latents

MISSING = torch.tensor([0.5, math.nan, 1.0, 2.0])
INFINITE = torch.tensor([0.5, math.inf, 1.0, 2.0])
LOCS = torch.tensor([-1.0, 1.0])
GAP_FIRST = torch.tensor([[0.5, 1.0], [0.2, 0.1], [math.nan, 1.0]])
STEPS_OF_PAIRS = torch.tensor([[[0.5, 1.0], [math.nan, 0.2]], [[0.1, 0.1], [0.3, 0.2]]])
PAIRS = torch.tensor([[0.5, 1.0], [2.0, 0.25], [1.0, math.nan], [-1.0, 0.0]])


def mixture_of(
    likelihood: Program | None = None,
    weights: Program = lambda: torch.full((2,), 0.5),
    num_states: int = 2,
) -> Program:
    """A mixture with a location for each state, or with another likelihood."""

    def model(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.arange(float(num_states)))
        probs = weights() if num_states == 2 else torch.ones(num_states)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(probs))
            density = dist.Normal(loc[z], 1.0) if likelihood is None else likelihood(z, loc)
            pyro.sample("y", density, obs=y)

    return model


def columns_of(num_columns: int, *, joint: bool = False) -> Program:
    """A mixture of vectors: independent elements, or one MultivariateNormal."""

    def likelihood(z: Tensor, loc: Tensor) -> Any:
        mean = loc[z].unsqueeze(-1).expand(*z.shape, num_columns)
        if joint:
            return dist.MultivariateNormal(mean, torch.eye(num_columns))
        return dist.Normal(mean, 1.0).to_event(1)

    return mixture_of(likelihood)


MIXTURE = mixture_of()


def learned_widths(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.randn(2, y.shape[1]))
    scale = pyro.param("scale", lambda: torch.ones(2, y.shape[1]), constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(loc[z], scale[z]).to_event(1), obs=y)


def unplated_mixture(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.arange(float(len(y))))
    z = pyro.sample("z", dist.Categorical(torch.ones(len(y))))
    pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def batched_latent(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.arange(2.0))
    z = pyro.sample("z", dist.Categorical(torch.ones(len(y), 2)))
    pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def whole_vector_mixture(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.arange(2.0))
    z = pyro.sample("z", dist.Categorical(torch.ones(2)))
    pyro.sample("y", dist.Normal(loc[z].unsqueeze(-1), 1.0).expand([len(y)]).to_event(1), obs=y)


def bent_factor(y: Tensor) -> None:
    """y is not linear in its latent: the integral is no Gaussian's."""
    slope = pyro.param("slope", lambda: torch.tensor(1.0))
    with pyro.plate("data", len(y)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(slope * u.tanh(), 1.0), obs=y)


def heavy_latent(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        u = pyro.sample("u", dist.Laplace(0.0, 1.0))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y)


def shared_mean_of_components(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("y", dist.Normal(mean * torch.tensor([1.0, -1.0])[k], 1.0), obs=y)


def bits_in_one_event(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((8,), 0.5)).to_event(1))
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)


def walk_of_one_sequence(y: Tensor) -> None:
    drift = pyro.param("drift", lambda: torch.tensor(0.1))
    x = torch.tensor(0.0)
    for t, value in enumerate(y):
        x = pyro.sample(f"x_{t}", dist.Normal(x + drift, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(x, 1.0), obs=value)


def without_latent(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(pyro.param("loc", lambda: torch.tensor(0.0)), 1.0), obs=y)


def without_parameter(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(1.0 * z, 1.0), obs=y)


def counted_latent(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Poisson(2.0))
        pyro.sample("y", dist.Normal(pyro.param("slope", torch.tensor(1.0)) * z, 1.0), obs=y)


def wide_latent(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Binomial(10**9, torch.tensor(0.5)))
        pyro.sample("y", dist.Normal(pyro.param("slope", torch.tensor(1.0)) * z, 1.0), obs=y)


def thirty_coins(y: Tensor) -> None:
    total = pyro.param("loc", torch.tensor(0.0))
    for i in range(30):
        total = total + pyro.sample(f"z_{i}", dist.Bernoulli(torch.tensor(0.5)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(total, 1.0), obs=y)


def unwrapped_chain(y: Tensor) -> None:
    """A chain without pyro.markov."""
    loc = pyro.param("loc", lambda: torch.arange(2.0))
    z = torch.tensor(0)
    for t in range(len(y)):
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


def crossed_plates(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.0))
    rows = pyro.plate("rows", y.shape[0], dim=-2)
    columns = pyro.plate("columns", y.shape[1], dim=-1)
    with rows:
        a = pyro.sample("a", dist.Bernoulli(torch.tensor(0.5)))
    with columns:
        b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.5)))
    with rows, columns:
        pyro.sample("y", dist.Normal(loc + a + b, 1.0), obs=y)


def two_scales(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        with pyro.poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(loc + z, 1.0), obs=y)


def scaled_by_datum(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.tensor(0.0))
    with pyro.plate("data", len(y)), pyro.poutine.scale(scale=torch.arange(1.0, 5.0)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("y", dist.Normal(loc + z, 1.0), obs=y)


def with_prior(prior: Program, likelihood: Program) -> Program:
    """A mixture of which one parameter has a prior."""

    def model(y: Tensor) -> None:
        weight = pyro.sample("weight", prior())
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
            pyro.sample("y", likelihood(weight, z), obs=y)

    return model


def sparse_weights(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(torch.tensor([0.5, 0.5])))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(1.0 * z, 1.0), obs=y)


def labels_mixture(y: Tensor) -> None:
    probs = pyro.param(
        "probs", torch.tensor([[0.2, 0.8], [0.6, 0.4]]), constraint=constraints.simplex
    )
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Categorical(probs[z]), obs=y)


def subsampled_mixture(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.arange(2.0))
    with pyro.plate("data", len(y), subsample_size=2) as index:
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y[index])


def float_index(y: Tensor) -> None:
    """Draws of Bernoulli are floats."""
    loc = pyro.param("loc", lambda: torch.arange(2.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def undeclared_features(y: Tensor) -> None:
    """Locations with features, in a Normal without an event."""
    loc = pyro.param("loc", lambda: torch.zeros(2, 3))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def discrete_chain(y: Tensor) -> None:
    """Pyro's own distribution over sequences."""
    loc = pyro.param("loc", lambda: torch.arange(2.0))
    with pyro.plate("data", len(y)):
        chain = dist.DiscreteHMM(torch.zeros(2), torch.zeros(1, 2, 2), dist.Normal(loc, 1.0))
        pyro.sample("y", chain, obs=y)


def _em(model: Program, *data: Any, options: Mapping[str, Any] | None = None, **given: Any) -> Any:
    given = {"max_iter": 3, "seed": 0, "progress": False} | given
    return lvppl.EM(model, **(options or {})).fit(*data, **given)


EXACT: dict[str, Program] = {
    "log_evidence": lvppl.log_evidence,
    "posterior": lvppl.posterior,
    "EM.fit": _em,
}
"""The ways in for a model whose latents are summed exactly, and data."""
EVIDENCE, POSTERIOR = ("log_evidence", "posterior"), ("posterior",)


def exact(
    title: str, model: Any, says: str, *data: Any, by: tuple[str, ...] = tuple(EXACT)
) -> BadInput:
    """A model, or data for it, that every call named in ``by`` must refuse."""
    data = data or (Y,)
    return BadInput(title, {name: partial(_attempt_exact, name, model, *data) for name in by}, says)


def _attempt_exact(name: str, model: Any, *rest: Any) -> Any:
    *data, _folder = rest
    return EXACT[name](model, *data)


def em(title: str, says: str, *data: Any, model: Program = MIXTURE, **options: Any) -> BadInput:
    """An option of EM, or of its fit, that must be refused."""
    own = {name: options.pop(name) for name in EM_OPTIONS if name in options}
    return call(title, lambda _: _em(model, *(data or (Y,)), options=own, **options), says)


EM_OPTIONS = frozenset(inspect.signature(lvppl.EM).parameters) - {"model", "unknown"}


MODEL, GUIDE = model_of(), guide_of()
POSITIVE = model_of(lambda y: dist.Gamma(torch.ones(len(y)), 1.0))
COUNTS = model_of(likelihood=lambda z: dist.Poisson(z.exp()))
BITS = model_of(likelihood=lambda z: dist.Bernoulli(logits=z))
CLASSES = model_of(likelihood=lambda z: dist.Categorical(logits=torch.stack([z, -z, 0 * z], -1)))


def spoilt(value: float) -> tuple[Tensor]:
    return (torch.where(Y == 2, value, Y),)


def _chain_of_two(num_features: int = 2) -> HiddenMarkovModel:
    return HiddenMarkovModel(GaussianComponents(2, num_features, covariance="diag"))


def off() -> Any:
    """Without Pyro's validation, as in fast code."""
    return pyro.validation_enabled(False)


def unvalidated(way_in: Program, *pair: Any) -> Any:
    with off():
        return way_in(*pair)


# ------------------------------------------------------------------------------ the registry

TOPICS: dict[str, list[BadInput]] = {}

TOPICS["Model and guide"] = [
    program(
        "a latent of the model that the guide lacks",
        (MODEL, no_guide),
        "no site for the model's latent 'z' … Add pyro.sample('z', ...) … strict=False",
    ),
    program(
        "a site of the guide that the model lacks",
        (MODEL, extra_site_guide),
        "The guide samples 'u', which the model does not have … Rename it … is_auxiliary",
    ),
    program(
        "a guide that samples what the model observes",
        (MODEL, observing_guide),
        "The guide samples 'y', which the model observes … Take the site out",
    ),
    program(
        "a guide that observes the data itself",
        (MODEL, conditioned_guide),
        "'y' … observed in the guide … Take the site out",
    ),
    program("model and guide in each other's place", (GUIDE, MODEL), "'y' … observed in the guide"),
    program(
        "another event shape in the guide",
        (vector_model, guide_of(lambda y: dist.Normal(y.new_zeros(len(y), 2), 1.0).to_event(1))),
        "Site 'z' … event shape (3,) in the model and (2,) in the guide … .to_event(n)",
    ),
    program(
        "a guide's latent outside the model's plate",
        (MODEL, unplated_latent),
        "Site 'z' … guide … plate",
    ),
    program(
        "a guide's latent in a plate of another name",
        (MODEL, other_plate_guide),
        "Site 'z' lies in plates ['data'] in the model and in ['rows'] in the guide … "
        "plates of the same names",
    ),
    program(
        "a distribution of another size than its plate",
        (MODEL, guide_of(lambda y: dist.Normal(torch.zeros(3), 1.0))),
        "The guide fails … plate('data') at site z … 4 vs 3",
    ),
    program(
        "a plate of another size in the guide",
        (MODEL, small_plate_guide),
        "model, replayed against the guide, fails … plate('data') at site z … 1 vs 4",
    ),
    program(
        "a batch dimension that no plate declares",
        (
            model_of(lambda y: dist.Normal(y.new_zeros(3, len(y)), 1.0)),
            guide_of(lambda y: dist.Normal(y.new_zeros(3, len(y)), 1.0)),
        ),
        "Site 'z' … batch shape (3, 4) … belongs to no plate … .to_event(",
    ),
    program(
        "a Normal guide of a Gamma latent, drawing below zero",
        (POSITIVE, shifted_guide(-9.0)),
        "Site 'z' is drawn by the guide from Normal … is not that of the model's "
        "Gamma … Use a guide distribution of the same support",
    ),
    program(
        "a Normal guide of a Gamma latent, whose draws happen to be positive",
        (POSITIVE, shifted_guide(9.0)),
        "'z' … Normal … support … Gamma … Use a guide distribution of the same support",
    ),
    program(
        "a guide that cannot reach all of the latent's support",
        (MODEL, half_guide),
        "'z' … HalfNormal … support … Use a guide distribution of the same support",
        by=("check", "SVI.fit", "log_likelihood"),
    ),
    program(
        "a discrete guide of a continuous latent",
        (MODEL, counting_guide),
        "'z' … Poisson … Normal … support",
    ),
    program(
        "a continuous guide of a discrete latent",
        (drawn_coin, guide_of(lambda y: dist.Normal(y, 1.0))),
        "Site 'z' is drawn by the guide from Normal … is not that of the model's "
        "Bernoulli … Use a guide distribution of the same support",
    ),
    program(
        "the same site twice", (twice, GUIDE), "The model … fails … Multiple sample sites named 'z'"
    ),
    program(
        "a guide that takes other arguments than the model",
        (MODEL, lambda y, x: None),
        "The guide fails before its first site … missing 1 required positional argument: 'x'",
    ),
    program("a model without sample sites", (lambda y: None, no_guide), "model … no sample site"),
    program(
        "`AutoNormal` of a discrete latent that is not marked for enumeration",
        (drawn_coin, AutoNormal(drawn_coin)),
        "The guide fails before its first site … discrete sample site 'z' … Consider enumerating",
    ),
]

TOPICS["Data"] = [
    program(
        "NaN in the data",
        (MODEL, GUIDE),
        "argument 0 … NaN … 2 … mask",
        data=spoilt(math.nan),
        by=CHECKED_DATA,
    ),
    program(
        "infinity in the data",
        (MODEL, GUIDE),
        "argument 0 … inf … 2 … mask",
        data=spoilt(math.inf),
        by=CHECKED_DATA,
    ),
    program(
        "NaN in the data of a plain Pyro loss",
        (MODEL, blind_guide),
        "Site 'y' … lvppl.check",
        data=spoilt(math.nan),
        by=("ELBO", "IWAE", "pyro.infer.SVI"),
    ),
    program(
        "a negative count for a Poisson likelihood",
        (COUNTS, GUIDE),
        "Observed site 'y' … outside the support of its Poisson … index (2,) … Correct the data",
        data=(torch.tensor([1.0, 0.0, -3.0, 2.0]),),
        by=CHECKED,
    ),
    program(
        "grey levels for a Bernoulli likelihood",
        (BITS, GUIDE),
        "Observed site 'y' … outside the support of its Bernoulli … index (0,) … choose a "
        "likelihood with that support",
        by=CHECKED,
    ),
    program(
        "a label that is no class",
        (CLASSES, GUIDE),
        "Observed site 'y' … outside the support of its Categorical … index (3,) … "
        "Correct the data",
        data=(torch.tensor([0, 1, 2, 3]),),
        by=CHECKED,
    ),
    program(
        "data outside the support, in a plain Pyro loss",
        (BITS, GUIDE),
        "Site 'y' … within the support … lvppl.check",
        by=("ELBO", "IWAE", "pyro.infer.SVI", "log_likelihood"),
    ),
    program(
        "integer data for a Bernoulli likelihood",
        (BITS, GUIDE),
        "'y' … int64 … .float()",
        data=(torch.tensor([0, 1, 1, 0]),),
    ),
    program("no data", (MODEL, GUIDE), "argument 0 … (0,)", data=(Y[:0],), by=CHECKED_DATA),
    program(
        "arguments on different devices",
        (regression, slope_guide),
        "different devices … cpu … meta … one",
        data=(Y, Y.to("meta")),
        by=("check",),
    ),
    BadInput(
        "a parameter on another device than the data",
        {
            name: partial(_attempt, partial(unvalidated, CALLS[name]), elsewhere, GUIDE, Y)
            for name in CHECKED
        },
        "Site 'z' lies on meta, the data on cpu … Create its parameters on the data's device",
    ),
    program(
        "float64 data for float32 modules",
        (image_model, image_guide),
        "share one dtype: data.float(), or modules.double()",
        data=(torch.ones(3, 4).double(),),
    ),
    program(
        "data of another size than the network's",
        (image_model, image_guide),
        "The guide fails … 3x5",
        data=(torch.ones(3, 5),),
    ),
    program(
        "arguments of different lengths",
        (regression, slope_guide),
        "Site 'y' … torch.Size([3]) vs torch.Size([4])",
        data=(Y, Y[:3]),
    ),
    program(
        "a column (4, 1) for data of shape (4,)",
        (regression, slope_guide),
        "Site 'y' observes values of shape (4, 1) … y.squeeze(-1) for numbers",
        data=(Y, Y[:, None]),
    ),
    program(
        "one row for a plate of four",
        (regression, slope_guide),
        "'y' … (1,) … 'data' … 4",
        data=(Y, Y[:1]),
        by=CHECKED,
    ),
    program(
        "one column for a grid of three",
        grid(3),
        "'y' … (4, 1) … 'columns' … 3",
        data=(torch.zeros(4, 1),),
        by=CHECKED,
    ),
    program(
        "an array instead of a tensor",
        (regression, slope_guide),
        "Site 'y' … torch.as_tensor",
        data=(Y, Y.numpy()),
    ),
]

TOPICS["Log-terms"] = [
    program(
        "a likelihood of scale zero",
        (model_of(likelihood=lambda z: dist.Normal(z, z * 0)), GUIDE),
        "The model … fails after site 'z' … Expected parameter scale",
    ),
    BadInput(
        "a scale of zero for one datum, without Pyro's validation",
        {
            name: partial(
                _attempt,
                partial(unvalidated, CALLS[name]),
                model_of(likelihood=lambda z: dist.Normal(z, (Y != 2) * 1.0)),
                GUIDE,
                Y,
            )
            for name in CHECKED_DATA
        },
        "2 … scale",
    ),
    BadInput(
        "a parameter that is NaN for one datum, without Pyro's validation",
        {
            name: partial(_attempt, partial(unvalidated, CALLS[name]), MODEL, nan_guide, Y)
            for name in CHECKED
        },
        "'z' … nan … (2,)",
    ),
    program(
        "a parameter that is NaN",
        (MODEL, nan_guide),
        "The guide fails after site 'data' … Expected parameter loc",
    ),
    program(
        "an observation of probability zero",
        (
            model_of(
                likelihood=lambda z: dist.Categorical(logits=torch.tensor([0.0, 0.0, -math.inf]))
            ),
            blind_guide,
        ),
        "'y' … inf … (2,) … strict=False",
        data=(torch.tensor([0, 1, 2, 1]),),
        by=CHECKED,
    ),
    call(
        "importance weights that are NaN",
        lambda _: _likelihood(
            MODEL, guide_of(lambda y: dist.Normal(torch.where(y == 2, math.inf, y), 1.0)), Y
        ),
        "Site 'z' of the guide draws inf at index (2,) … parameters",
    ),
]

TOPICS["Plates, subsampling and enumeration"] = [
    program(
        "model and guide that draw different minibatches",
        (subsampled_local_model, other_minibatch_guide),
        "'z' … 'data' … guide … plate",
    ),
    call(
        "different minibatches, with `strict=False`",
        lambda _: lvppl.check(subsampled_local_model, other_minibatch_guide, Y, strict=False),
        "The model subsamples plate 'data' around the latent 'z' … different minibatches "
        "… Put the guide's site in pyro.plate('data', ...)",
    ),
    call(
        "`batch_size` for `log_likelihood` of a global latent",
        lambda _: lvppl.log_likelihood(
            global_model, Y, guide=global_guide, batch_size=2, num_samples=2, seed=0
        ),
        "cannot be cut into 2 rows … no plate is common to every sample site … Leave "
        "batch_size out",
    ),
    call(
        "`data_plate` of a global latent",
        lambda _: _loss(lvppl.ELBO(data_plate="data"), global_model, global_guide, Y),
        "data_plate 'data' … outside it: 'z' … Plates common to every site: none",
    ),
    call(
        "a `data_plate` that does not exist",
        lambda _: _loss(lvppl.ELBO(data_plate="rows"), MODEL, GUIDE, Y),
        "'rows' … Plates common to every site: ['data']",
    ),
    call(
        "`IWAE` with a subsampled plate beside a global latent",
        lambda _: _loss(lvppl.IWAE(num_particles=2), subsampled_model, global_guide, Y),
        "IWAE … plate 'data' is subsampled … outside it: 'z' … Use ELBO, or the full data",
    ),
    program(
        "`log_likelihood` of a program that subsamples",
        (subsampled_model, global_guide),
        "Plate 'data' is subsampled … leave subsample and subsample_size out",
        by=("log_likelihood",),
    ),
    program(
        "sequential enumeration",
        (enumerated("sequential"), no_guide),
        'Site \'k\' of the model … sequential enumeration … infer={"enumerate": "parallel"}',
    ),
    program(
        "enumeration in model and guide both",
        (two_enumerated, enumerating_guide),
        "['k'] are enumerated in the guide and ['j'] in the model … Enumerate them in one place",
        by=("ELBO", "pyro.infer.SVI", "SVI.fit"),  # a single importance weight sums both exactly
    ),
    call(
        "a Poisson draw after a site that the guide enumerates",
        lambda _: _loss(lvppl.ELBO(), coin_and_count, coin_then_count_guide, Y),
        "'c' is drawn without a reparameterisation and depends on an enumerated site … "
        "mark it for enumeration too, or reparameterise it",
    ),
    program(
        "a subsampled plate inside an enumerated global latent",
        (global_coin, no_guide),
        "Plate 'data' is subsampled … would stand inside … the full data",
        by=LOSSES,
    ),
    program(
        "a continuous latent marked for enumeration",
        (enumerated("parallel", lambda y: dist.Normal(0.0, 1.0)), no_guide),
        "'k' … Normal … enumerat",
    ),
    program(
        "a Poisson latent marked for enumeration",
        (enumerated("parallel", lambda y: dist.Poisson(1.0)), no_guide),
        "'k' … Poisson … enumerat",
    ),
    call(
        "`posterior` in batches of two data plates",
        lambda _: _fit(*grid(3), torch.zeros(4, 3)).posterior(torch.zeros(4, 3), batch_size=2),
        "batch_size needs one data plate … rows, columns",
    ),
]

TOPICS["Assumptions"] = [
    call(
        "the density of a GAN's generator",
        lambda _: lvppl.check(generator, GUIDE, Y).require(computable=True),
        "needs the densities … 'y' is a deterministic observation on a continuous space … "
        "Add observation noise",
    ),
    program(
        "a likelihood-based loss of a GAN's generator",
        (generator, GUIDE),
        "'y' is a deterministic observation on a continuous space … Add observation noise",
        by=("ELBO", "IWAE", "pyro.infer.SVI", "SVI.fit", "log_likelihood"),
    ),
    program(
        "a likelihood that can be sampled but has no density",
        (model_of(likelihood=Draws), GUIDE),
        "'y' … Draws … no density",
        by=("ELBO", "IWAE", "pyro.infer.SVI", "SVI.fit", "log_likelihood"),
    ),
    call(
        "samples of a loopy model, written with `pyro.factor`",
        lambda _: lvppl.check(loopy, GUIDE, Y).require(samplable=True),
        "needs samples … 'coupling' is a pyro.factor … Markov chain",
    ),
    call(
        "the naive estimate of a model with a `pyro.factor`",
        lambda _: lvppl.log_likelihood(loopy, Y, estimator="naive", num_samples=2, seed=0),
        "'coupling' … pyro.factor … importance",
    ),
    call(
        "new data from a model with a `pyro.factor`",
        lambda _: _fit(loopy, GUIDE, Y).sample(),
        "the prior cannot be sampled … 'coupling' … pyro.sample",
    ),
    call(
        "the reconstruction by a likelihood without a mean",
        lambda _: _fit(model_of(likelihood=lambda z: dist.Cauchy(z, 1.0)), GUIDE, Y).reconstruct(Y),
        "'y' … no mean … predictive",
    ),
    call(
        "bits per dimension of continuous data without a bin width",
        lambda _: _likelihood(MODEL, GUIDE, Y).bits_per_dim,
        "bits_per_dim needs probabilities … bin_width= … model y as discrete",
    ),
]

TOPICS["Objectives"] = [
    call(
        "`ELBO(num_particles=0)`",
        lambda _: lvppl.ELBO(num_particles=0),
        "num_particles must be at least 1 … got 0",
    ),
    call(
        "`IWAE(num_particles=2.5)`",
        lambda _: lvppl.IWAE(num_particles=2.5),
        "num_particles must be a positive integer … got 2.5",
    ),
    call(
        '`ELBO(form="free energy")`',
        lambda _: lvppl.ELBO(form="free energy"),
        "form must be 'kl' or 'entropy' … 'free energy'",
    ),
    call(
        '`ELBO(gradient="dreg")`',
        lambda _: lvppl.ELBO(gradient="dreg"),
        "gradient must be 'standard' or 'stl' … 'dreg'",
    ),
    call(
        '`IWAE(gradient="stl")`',
        lambda _: lvppl.IWAE(num_particles=2, gradient="stl"),
        "gradient must be 'standard' or 'dreg' … 'stl'",
    ),
    call(
        '`gradient="stl"` with a discrete guide',
        lambda _: _loss(lvppl.ELBO(gradient="stl"), drawn_coin, coin_guide, Y),
        "gradient='stl' needs every guide site to be a reparameterised draw … 'z' is not "
        "… Use gradient='standard'",
    ),
    call(
        '`gradient="dreg"` with a discrete guide',
        lambda _: _loss(lvppl.IWAE(num_particles=2, gradient="dreg"), drawn_coin, coin_guide, Y),
        "gradient='dreg' needs every guide site to be a reparameterised draw … 'z' is not "
        "… Use gradient='standard'",
    ),
    call(
        '`gradient="dreg"` with a guide under `poutine.scale`',
        lambda _: _loss(lvppl.IWAE(num_particles=2, gradient="dreg"), MODEL, half_scaled, Y),
        "'z' … poutine.scale … Use gradient='standard'",
    ),
    call(
        '`ReweightedWakeSleep(phase="dream")`',
        lambda _: lvppl.ReweightedWakeSleep(num_particles=2, phase="dream"),
        "phase must be 'wake', 'sleep' or 'both' … 'dream'",
    ),
    call(
        "`ReweightedWakeSleep` where model and guide share a parameter",
        lambda _: _wake(
            learned_model,
            guide_of(lambda y: dist.Normal(pyro.param("m", torch.tensor(0.1)) * y, 1.0)),
        ),
        "share parameter 'm' … Give each its own … or use IWAE",
    ),
    call(
        "`ReweightedWakeSleep` with a point guide",
        lambda _: _wake(MODEL, guide_of(lambda y: dist.Delta(y * pyro.param("loc")))),
        "'z' is a point … Use HardELBO",
    ),
    call(
        "`ReweightedWakeSleep` with a site enumerated in the guide",
        lambda _: _wake(two_coins, enumerating_guide),
        "'k' is enumerated … Take the mark for enumeration off",
    ),
    call(
        "`ReweightedWakeSleep` with a guide under `poutine.scale`",
        lambda _: _wake(MODEL, half_scaled),
        "'z' … poutine.scale … use IWAE",
    ),
    call(
        "`ReweightedWakeSleep` of a latent without a guide",
        lambda _: _wake(MODEL, no_guide, strict=False),
        "'z' is drawn from its prior … Add it to the guide",
    ),
    call(
        "dreams of a model with a `pyro.factor`",
        lambda _: _wake(loopy, GUIDE, phase="sleep"),
        "'coupling' is a pyro.factor … cannot be simulated … phase='wake'",
    ),
    call(
        "dreams of data that are no argument as they are",
        lambda _: _wake(lambda y: MODEL(y + 0.0), GUIDE, phase="sleep"),
        "'y' observes no argument as it is … Write obs=y … phase='wake'",
    ),
    call(
        '`gradient="stl"` with a flow that has no inverse',
        lambda _: _loss(lvppl.ELBO(gradient="stl"), vector_model, flow_guide, Y),
        "Site 'z' … has no inverse … Use gradient='standard'",
    ),
    call(
        "`RateDistortion` with a point guide of a continuous latent",
        lambda _: _loss(
            lvppl.RateDistortion(weight=2.0), MODEL, guide_of(lambda y: dist.Delta(y)), Y
        ),
        "Guide site 'z' is a point on a continuous space … no code length … Quantise the latent",
    ),
    call(
        "`RateDistortion(weight=-1.0)`",
        lambda _: lvppl.RateDistortion(weight=-1.0),
        "weight must be a finite number ≥ 0 … got -1.0 … Schedule",
    ),
    call(
        "`RateDistortion(rate_weight=float('nan'))`",
        lambda _: lvppl.RateDistortion(rate_weight=math.nan),
        "rate_weight must be a finite number ≥ 0 … got nan",
    ),
    call(
        "`RateDistortion(weight=torch.tensor(-1.0))`",
        lambda _: lvppl.RateDistortion(weight=torch.tensor(-1.0)),
        "weight must be a finite number ≥ 0 … tensor(-1.)",
    ),
    call(
        '`distortion="bits"` with `unit="nats"`',
        lambda _: lvppl.RateDistortion(distortion="bits", unit="nats"),
        "distortion='bits' … unit='nats' … Leave unit out",
    ),
    call(
        '`distortion="euclidean"`',
        lambda _: lvppl.RateDistortion(distortion="euclidean"),
        "distortion must be one of … 'squared' … or a callable … 'euclidean'",
    ),
    call(
        '`unit="bytes"`',
        lambda _: lvppl.RateDistortion(unit="bytes"),
        "unit must be 'nats' or 'bits' … 'bytes'",
    ),
    call(
        "`free_nats=-0.5`",
        lambda _: lvppl.RateDistortion(free_nats=-0.5),
        "free_nats must be a finite number ≥ 0 … -0.5",
    ),
    call(
        '`target={"rate": -1.0}`',
        lambda _: lvppl.RateDistortion(target={"rate": -1.0}),
        "target rate must be a positive number … -1.0",
    ),
    call(
        "a target of two quantities",
        lambda _: lvppl.RateDistortion(target={"rate": 1.0, "distortion": 1.0}),
        "target must be {'rate': r} or {'distortion': d} … 'distortion': 1.0}",
    ),
    call(
        "a target that is a number",
        lambda _: lvppl.RateDistortion(target=3.0),
        "target must be {'rate': r} or {'distortion': d} … 3.0",
    ),
    call(
        "a target with a schedule of the weight",
        lambda _: lvppl.RateDistortion(
            target={"rate": 1.0}, weight=lvppl.LinearSchedule(0, 1, num_steps=10)
        ),
        "A target drives the weight … give weight as a positive number",
    ),
    call(
        "a distortion of another shape than the data",
        lambda _: _loss(
            lvppl.RateDistortion(distortion=lambda y, mean: torch.ones(2)), MODEL, GUIDE, Y
        ),
        "distortion of site 'y' has shape (2,) … expected (4,)",
    ),
    call(
        "a squared error of a likelihood without a mean",
        lambda _: _loss(
            lvppl.RateDistortion(distortion="squared"),
            model_of(likelihood=lambda z: dist.Categorical(logits=torch.stack([z, -z], -1))),
            GUIDE,
            torch.tensor([0, 1, 1, 0]),
        ),
        "'y' … no mean … distortion=None",
    ),
    call(
        "`LinearSchedule(0, 1, num_steps=0)`",
        lambda _: lvppl.LinearSchedule(0, 1, num_steps=0),
        "at least one step … got 0",
    ),
    call(
        "`LinearSchedule(-1, 1, num_steps=10)`",
        lambda _: lvppl.LinearSchedule(-1, 1, num_steps=10),
        "must not be negative … got -1",
    ),
    call(
        "a schedule to NaN",
        lambda _: lvppl.LinearSchedule(0, math.nan, num_steps=10),
        "finite … nan",
    ),
    call(
        "`CyclicSchedule(0, 1, period=10, ramp=1.5)`",
        lambda _: lvppl.CyclicSchedule(0, 1, period=10, ramp=1.5),
        "ramp must be a fraction of the cycle in (0, 1] … got 1.5",
    ),
]

TOPICS["Fits"] = [
    call(
        "neither `num_epochs` nor `num_steps`",
        lambda _: lvppl.SVI(MODEL, GUIDE).fit(Y, progress=False),
        "how long to train … num_epochs= … num_steps=",
    ),
    call(
        "`num_epochs=-1`",
        lambda _: _fit(MODEL, GUIDE, Y, num_epochs=-1),
        "num_epochs must be at least 1 … -1",
    ),
    call(
        "`num_steps=2.5`",
        lambda _: _fit(MODEL, GUIDE, Y, num_steps=2.5),
        "num_steps must be an integer … 2.5",
    ),
    call(
        "`batch_size=0`",
        lambda _: _fit(MODEL, GUIDE, Y, batch_size=0),
        "batch_size must be at least 1 … 0",
    ),
    call(
        "minibatches of a program without a plate over the rows",
        lambda _: _fit(unplated_model, no_guide, Y, batch_size=2),
        "batch_size=2 needs a plate over the rows … pyro.plate … leave batch_size out",
    ),
    call(
        "minibatches with a parameter for every row",
        lambda _: _fit(MODEL, per_row_guide, Y, batch_size=2),
        "guide … cannot be trained on minibatches … leave batch_size out",
    ),
    call(
        "minibatches with an autoguide of local latents",
        lambda _: _fit(MODEL, AutoNormal(MODEL), Y, batch_size=2),
        "AutoNormal keeps parameters for every row of plate 'data' … Leave batch_size out",
    ),
    call(
        "minibatches of a program that subsamples by itself",
        lambda _: _fit(subsampled_model, global_guide, Y, batch_size=3),
        "'data' … batch_size=3 … Use one of the two",
    ),
    call(
        "minibatches of an array",
        lambda _: _fit(MODEL, GUIDE, Y.numpy(), batch_size=2),
        "ndarray … torch.as_tensor",
    ),
    call(
        "a model that is a class",
        lambda _: lvppl.SVI(VAE, GUIDE),
        "model must be a Pyro program … VAE",
    ),
    call(
        "an objective that is a class",
        lambda _: lvppl.SVI(MODEL, GUIDE, objective=lvppl.ELBO),
        "objective must be … lvppl.ELBO()",
    ),
    call(
        "an objective that returns one loss a datum",
        lambda _: lvppl.SVI(
            MODEL,
            GUIDE,
            objective=lambda model, guide, y: lvppl.trace_terms(model, guide, (y,)).log_weight[0],
        ).fit(Y, num_steps=1, progress=False),
        "0-dim tensor … shape (4,) … Sum over the data",
    ),
    call(
        "a program without parameters",
        lambda _: _fit(MODEL, parameterless_guide, Y),
        "does not depend on any parameter … pyro.param",
    ),
    call(
        "an optimiser already built",
        lambda _: lvppl.SVI(
            MODEL, GUIDE, optimizer=torch.optim.Adam([torch.zeros(1, requires_grad=True)])
        ),
        "already built … give the class",
    ),
    call(
        "`optimizer=torch.optim.LBFGS`",
        lambda _: lvppl.SVI(MODEL, GUIDE, optimizer=torch.optim.LBFGS),
        "LBFGS … torch.optim.Adam",
    ),
    call(
        '`optimizer="adam"`',
        lambda _: lvppl.SVI(MODEL, GUIDE, optimizer="adam"),
        "optimizer must be a torch.optim class … 'adam'",
    ),
    call(
        "`learning_rate=-0.1`",
        lambda _: lvppl.SVI(MODEL, GUIDE, learning_rate=-0.1),
        "learning_rate must be positive … -0.1",
    ),
    call(
        "`learning_rate` beside a Pyro optimizer",
        lambda _: lvppl.SVI(
            MODEL, GUIDE, optimizer=pyro.optim.Adam({"lr": 0.1}), learning_rate=0.1
        ),
        "carries its own learning rate … pyro.optim.Adam",
    ),
    call(
        "`clip_norm=0`",
        lambda _: lvppl.SVI(MODEL, GUIDE, clip_norm=0),
        "clip_norm must be positive … 0",
    ),
    call(
        '`scheduler_interval="day"`',
        lambda _: lvppl.SVI(MODEL, GUIDE, scheduler_interval="day"),
        "scheduler_interval must be 'epoch' or 'step' … 'day'",
    ),
    call(
        '`device="abacus"`',
        lambda _: _fit(MODEL, GUIDE, Y, device="abacus"),
        'device \'abacus\' cannot be used here … use "auto" or "cpu"',
    ),
    call(
        "`seed=-1`",
        lambda _: _fit(MODEL, GUIDE, Y, seed=-1),
        "seed must be None or an integer … -1",
    ),
    call("`tolerance=-1.0`", lambda _: _fit(MODEL, GUIDE, Y, tolerance=-1.0), "tolerance … -1.0"),
    call(
        "`SVI(lr=0.1)`",
        lambda _: lvppl.SVI(MODEL, GUIDE, lr=0.1),
        "SVI(lr=...) is not an option of SVI … Here it is learning_rate=.",
    ),
    call(
        "a misspelt option",
        lambda _: _fit(MODEL, GUIDE, Y, num_epoch=3),
        "fit(num_epoch=...) is not an option … unexpected keyword argument 'num_epoch' … "
        "Did you mean num_epochs=?",
    ),
    call(
        "`callbacks=print`", lambda _: _fit(MODEL, GUIDE, Y, callbacks=print), "callbacks … [print]"
    ),
    call(
        "validation data of another shape",
        lambda _: _fit(image_model, image_guide, torch.ones(3, 4), validation=torch.ones(3, 5)),
        "validation … (3, 5) … (3, 4)",
    ),
    call(
        "validation data of more arguments",
        lambda _: _fit(MODEL, GUIDE, Y, validation=(Y, Y)),
        "validation has 2 arguments … training data have 1 … tuple of as many",
    ),
    call(
        "NaN in the validation data",
        lambda _: _fit(MODEL, GUIDE, Y, validation=spoilt(math.nan)[0]),
        "validation argument 0 … nan at index [2] … mask",
    ),
    call(
        "resuming with another seed",
        lambda _: _fit(MODEL, GUIDE, Y, resume=_fit(MODEL, GUIDE, Y), num_steps=2, seed=1),
        "has seed 0, not 1 … leave seed out",
    ),
    call(
        "resuming with another batch size",
        lambda _: _fit(
            MODEL, GUIDE, Y, resume=_fit(MODEL, GUIDE, Y, batch_size=2), num_steps=2, batch_size=3
        ),
        "batch_size=2, not 3 … leave it out",
    ),
    call(
        "resuming with another optimiser",
        lambda _: lvppl.SVI(MODEL, GUIDE, optimizer=torch.optim.SGD, learning_rate=0.1).fit(
            Y, resume=_fit(MODEL, GUIDE, Y), num_steps=2, progress=False
        ),
        "another optimiser",
    ),
    call(
        "resuming the fit of another program",
        lambda _: _fit(
            enumerated("parallel"), enumerating_guide, Y, resume=_fit(MODEL, GUIDE, Y), num_steps=2
        ),
        "parameter 'loc' that this program does not make … Use the model and the guide of the fit",
    ),
    call(
        "resuming a folder instead of a fit",
        lambda folder: _fit(MODEL, GUIDE, Y, resume=folder, num_steps=2),
        "resume … lvppl.load",
    ),
]


class _Infinite(lvppl.ELBO):
    """A loss that has overflowed."""

    def per_datum(self, terms: lvppl.Terms) -> Tensor:
        return math.inf * super().per_datum(terms)


TOPICS["Estimates, draws and exports"] = [
    call(
        '`estimator="bridge"`',
        lambda _: lvppl.log_likelihood(MODEL, Y, guide=GUIDE, estimator="bridge"),
        "estimator must be one of ('ais', 'exact', 'importance', … 'bridge'",
    ),
    call(
        "importance sampling without a guide",
        lambda _: lvppl.log_likelihood(MODEL, Y),
        'none was given … pass guide= … estimator="prior"',
    ),
    call(
        "`log_likelihood(num_samples=0)`",
        lambda _: lvppl.log_likelihood(MODEL, Y, guide=GUIDE, num_samples=0),
        "num_samples must be a whole number of at least 1 … got 0",
    ),
    call(
        "`log_likelihood(batch_size=0)`",
        lambda _: lvppl.log_likelihood(MODEL, Y, guide=GUIDE, batch_size=0),
        "batch_size must be a whole number of at least 1 … got 0",
    ),
    call(
        "`log_likelihood(bin_width=-1.0)`",
        lambda _: lvppl.log_likelihood(MODEL, Y, guide=GUIDE, bin_width=-1.0),
        "bin_width must be a positive number … got -1.0",
    ),
    call(
        "`bin_width` of discrete data",
        lambda _: lvppl.log_likelihood(
            BITS, (Y > 0.5).float(), estimator="naive", num_samples=2, seed=0, bin_width=0.1
        ),
        "every observed site is discrete … Leave bin_width out",
    ),
    call(
        "chunks of rows of a program with a fixed plate",
        lambda _: lvppl.log_likelihood(
            fixed_size_model, Y, guide=per_row_guide, num_samples=2, seed=0, batch_size=2
        ),
        "rows 0 to 1 of 4 … batch_size=4",
    ),
    call(
        "`log_likelihood` of no data",
        lambda _: _likelihood(MODEL, GUIDE, torch.zeros(0)),
        "The data are empty … argument 0 has shape (0,) … at least one row",
    ),
    call(
        "weights that are infinite for one datum",
        lambda _: _likelihood(
            model_of(likelihood=lambda z: dist.Beta(0.5 + 0 * z, 1.0)),
            GUIDE,
            torch.tensor([0.5, 0.0, 0.25]),
        ),
        "Importance weights are infinite for 1 data (1) … cover the support of the prior",
    ),
    call(
        "an exact sum over 2^50 states without structure",
        lambda _: lvppl.log_likelihood(fifty_bits, Y, estimator="exact"),
        "1.126e+15 joint states … guide … importance",
    ),
    call(
        "a datum that memory is too small for",
        lambda _: _likelihood(without_end, GUIDE, Y),
        "Memory is too small for one datum with one draw … shrink the program",
    ),
    call(
        "`log_likelihood(checkpoint=)` of another seed",
        lambda folder: [
            lvppl.log_likelihood(
                MODEL, Y, guide=GUIDE, num_samples=2, seed=seed, checkpoint=folder / "parts.pt"
            )
            for seed in (0, 1)
        ],
        "parts.pt is of another estimate: seed = 0, not 1 … another path, or delete the file",
    ),
    call(
        "a folder as a checkpoint",
        lambda folder: lvppl.log_likelihood(MODEL, Y, guide=GUIDE, checkpoint=folder),
        "checkpoint must be the path of a file … is a folder",
    ),
    call(
        "a checkpoint of an exact sum",
        lambda folder: lvppl.log_likelihood(
            drawn_coin, Y, estimator="exact", checkpoint=folder / "parts.pt"
        ),
        'estimator="exact" does not have. Leave it out',
    ),
    call(
        "`amortization_gap(num_steps=0)`",
        lambda _: lvppl.amortization_gap(MODEL, GUIDE, Y, num_steps=0),
        "at least one step … num_steps=0",
    ),
    call(
        "`amortization_gap` of a global latent",
        lambda _: lvppl.amortization_gap(global_model, global_guide, Y),
        "amortization_gap needs per-datum terms … 'z' in no plate … pyro.plate",
    ),
    call(
        "`amortization_gap` of a guide that is not Normal",
        lambda _: lvppl.amortization_gap(POSITIVE, guide_of(lambda y: dist.Gamma(y + 1.0, 1.0)), Y),
        "'z' is Gamma … SVI",
    ),
    call(
        "`amortization_gap` of a latent that depends on another",
        lambda _: lvppl.amortization_gap(chained_model, chained_guide, Y),
        "latent 'w' … depend on another latent … .eval()",
    ),
    call(
        "`gaps` of a guide that cannot be searched",
        lambda _: lvppl.gaps(POSITIVE, guide_of(lambda y: dist.Gamma(y + 1.0, 1.0)), Y),
        "gaps searches … 'z' is Gamma … SVI",
    ),
    call(
        "`gaps` without a guide",
        lambda _: lvppl.gaps(MODEL, None, Y),  # type: ignore[arg-type]
        "guide is None … Give a guide",
    ),
    call(
        "`gaps` of a global latent",
        lambda _: lvppl.gaps(global_model, global_guide, Y),
        "gaps needs per-datum terms … 'z' in no plate … pyro.plate",
    ),
    call(
        '`gaps(evidence="guess")`',
        lambda _: lvppl.gaps(MODEL, GUIDE, Y, evidence="guess"),
        "evidence must be one of … 'importance' … got 'guess'",
    ),
    call(
        "`gaps(num_steps=2)`",
        lambda _: lvppl.gaps(MODEL, GUIDE, Y, num_steps=2),
        "num_steps must be a whole number of at least 3 … got 2",
    ),
    call(
        "`gaps(num_repetitions=1)`",
        lambda _: lvppl.gaps(MODEL, GUIDE, Y, num_repetitions=1),
        "num_repetitions must be a whole number of at least 2 … got 1",
    ),
    call(
        "`gaps` with ln p(y) of other data",
        lambda _: lvppl.gaps(
            MODEL, GUIDE, Y, log_prob=torch.zeros(3), num_steps=3, num_repetitions=2
        ),
        "log_prob must hold ln p(y) of each of 4 data … (3,)",
    ),
    call(
        "`gaps` with ln p(y) of data that are then simulated",
        lambda _: lvppl.gaps(MODEL, GUIDE, Y, log_prob=torch.zeros(4), simulate=True),
        "simulate=True replaces them … Leave one out",
    ),
    call(
        "`gaps(simulate=True)` of a model with a `pyro.factor`",
        lambda _: lvppl.gaps(loopy, GUIDE, Y, simulate=True),
        "'coupling' is a pyro.factor … cannot be simulated … data that you have",
    ),
    call(
        "the exact gaps of a continuous latent",
        lambda _: lvppl.gaps(
            nonlinear_model, nonlinear_guide, Y, evidence="exact", num_steps=3, num_repetitions=2
        ),
        "the Gaussian latent 'z', but its location is not an affine",
    ),
    call(
        "`audit_gradients` of no objective",
        lambda _: lvppl.audit_gradients(MODEL, GUIDE, [], Y),
        "at least one objective … lvppl.ELBO",
    ),
    call(
        "`audit_gradients(num_repetitions=1)`",
        lambda _: lvppl.audit_gradients(MODEL, GUIDE, [lvppl.ELBO()], Y, num_repetitions=1),
        "num_repetitions must be a whole number of at least 2 … got 1",
    ),
    call(
        "`audit_gradients` of the name of an objective",
        lambda _: lvppl.audit_gradients(MODEL, GUIDE, {"mine": "ELBO"}, Y),
        "'mine' is 'ELBO' … no differentiable_loss … lvppl.IWAE(",
    ),
    call(
        "`audit_gradients` of programs without parameters",
        lambda _: lvppl.audit_gradients(MODEL, parameterless_guide, [lvppl.ELBO()], Y),
        "Neither model nor guide has a parameter … pyro.param",
    ),
    call(
        "`audit_gradients` where gradients are not finite",
        lambda _: lvppl.audit_gradients(
            MODEL, guide_of(), {"infinite": _Infinite()}, Y, num_repetitions=2
        ),
        "Under infinite the gradient of parameter 'loc' is not finite … lvppl.check",
    ),
    call(
        "`posterior(num_samples=0)`",
        lambda _: _fit(MODEL, GUIDE, Y).posterior(Y, num_samples=0),
        "num_samples must be a whole number of at least 1 … 0",
    ),
    call(
        "the posterior mean of a site that does not exist",
        lambda _: _fit(MODEL, GUIDE, Y).posterior(Y, num_samples=2).mean("w"),
        "no latent site 'w' … ['z']",
    ),
    call(
        "the report of a fit by a plain callable",
        lambda _: (
            lvppl.SVI(MODEL, GUIDE, objective=pyro.infer.Trace_ELBO().differentiable_loss)
            .fit(Y, num_steps=1, progress=False)
            .report(Y)
        ),
        "makes no report … lvppl.ELBO()",
    ),
    call(
        "`to_arviz(num_samples=0)`",
        lambda _: lvppl.to_arviz(_fit(MODEL, GUIDE, Y), Y, num_samples=0),
        "num_samples must be a whole number of at least 1 … 0",
    ),
    call(
        "`to_arviz(num_inner=1)`",
        lambda _: lvppl.to_arviz(_fit(MODEL, GUIDE, Y), Y, num_inner=1),
        "num_inner must be at least 2 … 1",
    ),
    call(
        "`to_arviz` with three labels for four data",
        lambda _: lvppl.to_arviz(
            _fit(MODEL, GUIDE, Y), Y, num_samples=2, coords={"data": ["a", "b", "c"]}
        ),
        "coords['data'] has 3 labels for 4",
    ),
    call(
        "`to_arviz` without the data",
        lambda _: lvppl.to_arviz(_fit(MODEL, GUIDE, Y), num_samples=2),
        "The guide fails before its first site … missing 1 required positional argument: 'y'",
    ),
]


def _saved(folder: Path, *, model: Program = MODEL, guide: Program = GUIDE) -> Path:
    _fit(model, guide, Y).save(folder)
    return folder


def _load_truncated(folder: Path) -> lvppl.Fit:
    file = _saved(folder) / "fit.pt"
    file.write_bytes(file.read_bytes()[:-100])
    return lvppl.load(folder, MODEL, GUIDE)


def _load_foreign(folder: Path) -> lvppl.Fit:
    torch.save({"weights": torch.zeros(2)}, folder / "fit.pt")
    return lvppl.load(folder, MODEL, GUIDE)


def _two_locations(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.zeros(2))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(loc.sum() + 0.5 * y, 0.7))


def _written(text: str, name: str = "table.csv", **options: Any) -> Attempt:
    def attempt(folder: Path) -> Any:
        (folder / name).write_text(text)
        return lvppl.data.load(folder / name, **options)

    return attempt


def _arrays(folder: Path, arrays: Mapping[str, Any], **options: Any) -> Any:
    np.savez(folder / "arrays.npz", **arrays)
    return lvppl.data.load(folder / "arrays.npz", **options)


def _mnist(content: bytes) -> Attempt:
    def attempt(folder: Path) -> Any:
        (folder / "mnist").mkdir()
        (folder / "mnist" / "train-images-idx3-ubyte.gz").write_bytes(content)
        with mock.patch.dict(os.environ, {"LVPPL_DATA": str(folder)}):
            return lvppl.data.mnist()

    return attempt


def missing(title: str, says: str, **attempts: Any) -> BadInput:
    """What ``missing="nan"``, or an imputation, must refuse."""
    return BadInput(title, {name.replace("__", "."): a for name, a in attempts.items()}, says)


def _by_all(
    title: str, says: str, model: Program, guide: Program, y: Tensor, word: str
) -> BadInput:
    """By every call that takes ``missing=``."""
    options: dict[str, Any] = {"guide": guide, "num_samples": 2, "seed": 0}
    return missing(
        title,
        says,
        check=lambda _: lvppl.check(model, guide, y, missing=word),
        SVI__fit=lambda _: _fit(model, guide, y, missing=word),
        log_likelihood=lambda _: lvppl.log_likelihood(model, y, missing=word, **options),
    )


TOPICS["Missing values"] = [
    _by_all(
        '`missing="zero"`',
        "missing must be None or \"nan\" … 'zero'",
        MODEL,
        GUIDE,
        MISSING,
        "zero",
    ),
    missing(
        "NaN without `missing=`",
        'NaN or infinite values in 1 rows (1) … missing="nan"',
        log_likelihood=lambda _: _likelihood(MODEL, GUIDE, MISSING),
    ),
    missing(
        "NaN without `missing=`, in a fit",
        'data argument 0 has nan at index [1] … missing="nan"',
        SVI__fit=lambda _: _fit(MODEL, GUIDE, MISSING),
    ),
    missing(
        "an infinite value as a missing one, in a fit by SVI",
        "data argument 0 has inf at index [1] … a missing value is NaN",
        SVI__fit=lambda _: _fit(MODEL, GUIDE, INFINITE, missing="nan"),
    ),
    missing(
        "an infinite value as a missing one, in an estimate",
        "infinite values in 1 rows (1) … a missing value is NaN",
        log_likelihood=lambda _: lvppl.log_likelihood(
            MODEL, INFINITE, guide=GUIDE, missing="nan", num_samples=2
        ),
        impute=lambda _: lvppl.impute(MODEL, INFINITE, guide=GUIDE, num_samples=2),
    ),
    _by_all(
        "a part of an event whose elements depend on each other",
        "some values of site 'y' miss a part of an event of Dirichlet … independent elements … "
        "let the whole event be NaN",
        COUPLED,
        lambda y: None,
        SHARES,
        "nan",
    ),
    missing(
        "the same in an exact sum",
        "some values of site 'y' miss a part of an event of Dirichlet",
        log_evidence=lambda _: lvppl.log_evidence(COUPLED, SHARES, missing="nan"),
        impute=lambda _: lvppl.impute(COUPLED, SHARES, num_samples=2),
    ),
    missing(
        "a model that reads a missing value as an input",
        "parameter that is nan … reads one elsewhere … Make it a latent",
        check=lambda _: lvppl.check(steps_in_time, first_column_guide, GAP_FIRST, missing="nan"),
        log_likelihood=lambda _: lvppl.log_likelihood(
            steps_in_time, GAP_FIRST, guide=first_column_guide, missing="nan", num_samples=2
        ),
        SVI__fit=lambda _: _fit(steps_in_time, first_column_guide, GAP_FIRST, missing="nan"),
    ),
    missing(
        "a model that asks whether a missing value is positive",
        "takes a missing value for a number: 'gt' … as if it had been observed … Make it a latent",
        check=lambda _: lvppl.check(hurdle, no_guide, MISSING, missing="nan"),
        log_likelihood=lambda _: lvppl.log_likelihood(
            hurdle, MISSING, missing="nan", estimator="exact"
        ),
        SVI__fit=lambda _: _fit(hurdle, no_guide, MISSING, missing="nan"),
        impute=lambda _: lvppl.impute(hurdle, MISSING, num_samples=2),
    ),
    missing(
        "a model that asks whether a missing step was 1",
        "takes a missing value for a number: '__eq__' … as if it had been observed",
        log_likelihood=lambda _: lvppl.log_likelihood(
            by_the_last, torch.tensor([[math.nan, 1.0]]), missing="nan", estimator="exact"
        ),
        EM__fit=lambda _: lvppl.EM(by_the_last).fit(
            torch.tensor([[math.nan, 1.0], [0.0, 1.0]]),
            missing="nan",
            max_iter=1,
            progress=False,
        ),
    ),
    missing(
        "dreams of data with missing values",
        "missing=\"nan\" and simulated data do not go together: site 'y' … phase='wake'",
        SVI__fit=lambda _: lvppl.SVI(
            MODEL, GUIDE, objective=lvppl.ReweightedWakeSleep(num_particles=2, phase="sleep")
        ).fit(MISSING, missing="nan", num_steps=1, progress=False),
    ),
    missing(
        "the mean of a missing level of an OrderedLogistic",
        "levels of 'y' are missing, and those of its OrderedLogistic have no mean",
        impute=lambda _: lvppl.impute(
            observing(lambda y: dist.OrderedLogistic(torch.tensor(0.2), LOCS)),
            torch.tensor([1.0, math.nan]),
            num_samples=2,
        ),
    ),
    missing(
        "a part of a step of a chain whose sequences have emissions of their own",
        "miss a part of their observation … an observation_dist of its own … batch shape (K,)",
        log_evidence=lambda _: lvppl.log_evidence(
            observing(chain_of_pairs), STEPS_OF_PAIRS, missing="nan"
        ),
    ),
    missing(
        "an exact sum over what an autoregression misses before an observed element",
        "site 'y' is Autoregressive … before observed ones … lvppl.log_likelihood",
        log_evidence=lambda _: lvppl.log_evidence(
            observing(bits_in_order), torch.tensor([[math.nan, 1.0]]), missing="nan"
        ),
    ),
    missing(
        "imputing the steps of a HiddenMarkov",
        "missing steps of site 'y' depend on its states … lvppl.posterior … 'y_states'",
        impute=lambda _: lvppl.impute(
            observing(
                lambda y: HiddenMarkov(torch.zeros(2), torch.zeros(2, 2), dist.Normal(LOCS, 1.0))
            ),
            PAIRS,
            num_samples=2,
        ),
    ),
    missing(
        "more imputations than draws",
        "num_imputations=5 draws cannot come from num_samples=2",
        impute=lambda _: lvppl.impute(
            MODEL, MISSING, guide=GUIDE, num_samples=2, num_imputations=5
        ),
    ),
    missing(
        "`num_imputations=-1`",
        "num_imputations must be a whole number from 0 on, got -1",
        impute=lambda _: lvppl.impute(MODEL, MISSING, guide=GUIDE, num_imputations=-1),
    ),
    missing(
        "imputing whole numbers, which cannot be NaN",
        "nothing to impute … y.float()",
        impute=lambda _: lvppl.impute(
            observing(lambda y: dist.Poisson(2.0)), torch.tensor([1, 2]), num_samples=2
        ),
    ),
    missing(
        "the mean of a missing level",
        "levels of 'y' are missing … no mean … num_imputations",
        impute=lambda _: lvppl.impute(
            observing(lambda y: dist.Categorical(torch.ones(3))),
            torch.tensor([1.0, math.nan]),
            num_samples=2,
        ),
    ),
]

TOPICS["Exact evidence and posteriors"] = [
    exact("a model that is a class, to be summed", nn.Linear, "model must be a Pyro program"),
    exact("no rows, to be summed", MIXTURE, "data argument 0 has no rows … (0,)", torch.zeros(0)),
    exact(
        "NaN in observed values, to be summed",
        MIXTURE,
        "Site 'y' observes nan at index [1] … mask … missing=\"nan\"",
        MISSING,
        by=EVIDENCE,
    ),
    exact(
        "an infinite value, which has probability zero",
        MIXTURE,
        "datum 1 has ln p(y) = -inf … no value of its latents explains it … outside the support",
        INFINITE,
        by=POSTERIOR,
    ),
    exact(
        "data outside the support of every component",
        mixture_of(lambda z, loc: dist.Uniform(loc[z], loc[z] + 1, validate_args=False)),
        "datum 1 has ln p(y) = -inf … no value of its latents explains it … outside the support",
        torch.tensor([0.5, 9.0]),
        by=("posterior", "EM.fit"),
    ),
    exact(
        "a negative count",
        mixture_of(lambda z, loc: dist.Poisson(loc[z].exp())),
        "Site 'y' observes -1.0 at index [2], which is outside the support of its Poisson",
        torch.tensor([0.0, 3.0, -1.0]),
    ),
    exact(
        "an array where a mixture observes",
        MIXTURE,
        "'y' observes a numpy.ndarray of shape (4,), not a tensor: write torch.as_tensor(y, dtype=",
        Y.numpy(),
    ),
    exact(
        "a column of numbers where a mixture observes",
        MIXTURE,
        "Site 'y' observes values of shape (4, 1) … y.squeeze(-1) … dist.Normal(...).to_event(1)",
        Y[:, None],
    ),
    exact(
        "features that no event declares",
        undeclared_features,
        "site y dim -1, 4 vs 3 … one event: dist.Normal(...).to_event(1)",
        torch.zeros(4, 3),
    ),
    exact(
        "a draw of Bernoulli as an index",
        float_index,
        "tensors used as indices … are floats … loc[z.long()]",
    ),
    exact(
        "data of another number of columns",
        columns_of(3),
        "Site 'y' observes values of shape (4, 2), but its Normal is of shape (4, 3) … columns",
        torch.zeros(4, 2),
    ),
    exact(
        "columns that no event declares",
        MIXTURE,
        "observes values of shape (4, 2) … belongs to no plate … .to_event(",
        torch.zeros(4, 2),
    ),
    exact(
        "data without a plate, as many as states",
        unplated_mixture,
        "Site 'y' of the model observes values of shape (4,) … size 4 at batch dimension -1 "
        "belongs to no plate … pyro.plate(..., 4, dim=-1)",
    ),
    exact(
        "a latent with a batch dimension without a plate",
        batched_latent,
        "Site 'z' … batch shape (4,) … belongs to no plate … pyro.plate(..., 4, dim=-1)",
    ),
    exact(
        "a continuous latent, to be summed",
        heavy_latent,
        "Latent 'u' (Laplace) is continuous … Give it a guide … or replace it by a finite grid",
        by=EVIDENCE,
    ),
    exact(
        "a Gaussian latent that a location is not linear in",
        bent_factor,
        "Site 'y' (Normal) depends on the Gaussian latent 'u', but its location is not an affine "
        "function … Give the latent a guide",
        by=EVIDENCE,
    ),
    exact(
        "a Gaussian latent of binary data",
        BITS,
        "Latent 'z' is Gaussian, but 'y' (Bernoulli) depends on it … Give it a guide",
        Y.gt(0.5).float(),
        by=EVIDENCE,
    ),
    exact(
        "a vector of bits in one event, to be summed",
        bits_in_one_event,
        "Latent 'z' (Bernoulli) is a vector of 8 discrete elements in one event … "
        "estimator='exact' … pyro.plate",
        by=EVIDENCE,
    ),
    em(
        "EM of a walk that is one sequence",
        "Latent 'x_0' is continuous and belongs to the whole data set … put these into a plate … "
        "y[None] … lvppl.log_evidence",
        model=walk_of_one_sequence,
    ),
    call(
        "`annealing` that is a number",
        lambda _: lvppl.log_likelihood(MODEL, Y, estimator="ais", annealing=100),
        "annealing must be lvppl.Annealing(...) … got 100",
    ),
    exact(
        "a Gaussian latent that couples the states of all data",
        shared_mean_of_components,
        "'mean' and the discrete latent 'k' depend on each other … all their states together … "
        "Give one of them a guide",
        by=EVIDENCE,
    ),
    exact(
        "a count as a latent",
        counted_latent,
        "Latent 'z' (Poisson) has no finite support … Truncate it … or give it a guide",
    ),
    exact(
        "a support too large",
        wide_latent,
        "1 latent sites ('z') … a support is too large … cut a large support",
    ),
    exact(
        "thirty latents that meet in one site",
        thirty_coins,
        "30 latent sites … more than 268,435,456 elements … depend on each other at once … "
        "pyro.markov … pyro.plate … guide",
    ),
    exact(
        "a long chain without `pyro.markov`",
        unwrapped_chain,
        "each of the 100 latent sites … dimension of its own … pyro.markov(range(T))",
        torch.zeros(100),
    ),
    exact(
        "plates that overlap around latents that meet",
        crossed_plates,
        "among the plates 'rows', 'columns' two overlap … Nest the plates",
        torch.zeros(3, 4),
    ),
    exact(
        "two scales in one sum",
        two_scales,
        "Site 'y' has another poutine.scale … one scale around the whole",
    ),
    exact(
        "a scale for each datum around a latent",
        scaled_by_datum,
        "poutine.scale … one number … Move per-datum weights",
    ),
    exact(
        "negative probabilities",
        mixture_of(weights=lambda: torch.tensor([-0.5, 0.8])),
        "The model fails after site 'data' … Categorical … Simplex()",
    ),
    exact(
        "the posterior of a model without a latent",
        without_latent,
        "no latent … no posterior … lvppl.log_evidence",
        by=POSTERIOR,
    ),
    exact(
        "the posterior of the states inside Pyro's `DiscreteHMM`",
        discrete_chain,
        "Pyro's DiscreteHMM … lvppl.distributions.HiddenMarkov, whose first state emits",
        torch.zeros(3, 5),
        by=POSTERIOR,
    ),
    call(
        "the moments of a discrete latent",
        lambda _: lvppl.posterior(MIXTURE, Y).moments("z"),
        "latent 'z' is discrete … integrated … marginals('z')",
    ),
    call(
        "`log_evidence(..., temperature=0.0)`",
        lambda _: lvppl.log_evidence(MIXTURE, Y, temperature=0.0),
        "temperature must be a number above 0 … 0.0 … posterior(...).map()",
    ),
    call(
        "the marginals of an unknown site",
        lambda _: lvppl.posterior(MIXTURE, Y).marginals("k"),
        "latent 'k' … there are ['z']",
    ),
    call(
        "the joint of one site",
        lambda _: lvppl.posterior(MIXTURE, Y).joint("z"),
        "joint needs two or more different sites … ('z',)",
    ),
    call(
        "no draws from a posterior",
        lambda _: lvppl.posterior(MIXTURE, Y).sample(0),
        "num_samples must be a whole number of at least 1 … 0",
    ),
]

TOPICS["Expectation maximisation"] = [
    em(
        "a vector where EM of one column wants `(N, 1)`",
        "has batch shape () … would be counted 4 times … y[:, None]",
        Y,
        model=GaussianMixture(2, 1, covariance="diag"),
    ),
    em(
        "a model that observes nothing",
        "observes nothing … obs=y",
        Y,
        model=lambda y: pyro.sample("z", dist.Categorical(torch.ones(2) / 2)) and None,
    ),
    em(
        "a column of nothing but missing values",
        "has no value at all in column 1 … Leave the column out",
        torch.tensor([[1.0, math.nan], [2.0, math.nan], [0.5, math.nan]]),
        model=GaussianMixture(2, 2, covariance="diag"),
        missing="nan",
    ),
    em(
        "NaN in the data of EM",
        'data argument 0 has nan at index [1] … missing="nan" … or fill it',
        MISSING,
    ),
    em(
        "an infinite value in the data of EM",
        "data argument 0 has inf at index [1] … Correct the data",
        INFINITE,
    ),
    em(
        "an infinite value as a missing one",
        "data argument 0 has inf at index [1] … a missing value is NaN",
        INFINITE,
        missing="nan",
    ),
    em(
        "a part of a MultivariateNormal event that is missing",
        "some values of site 'y' miss a part of an event of MultivariateNormal … "
        "dist.Normal(...).to_event(1)",
        PAIRS,
        model=columns_of(2, joint=True),
        missing="nan",
    ),
    em('`missing="drop"`', "missing must be None or \"nan\" … 'drop'", missing="drop"),
    em(
        "one datum for two components",
        "as many data as states: 1 data came, for 2 states … init='model'",
        torch.zeros(1),
        init="kmeans++",
    ),
    em(
        "more components than data",
        "as many data as states: 4 data came, for 6 states … Use fewer states",
        model=mixture_of(num_states=6),
        init="kmeans++",
    ),
    em(
        "more components than different data",
        "needs 3 different data, but only 2 of the 4 rows differ … Use fewer states",
        torch.tensor([1.0, 1.0, 2.0, 2.0]),
        model=mixture_of(num_states=3),
        init="kmeans++",
    ),
    em(
        "k-means++ of class labels",
        "no observed numeric site depends on one … names of classes … init='model'",
        torch.tensor([0, 1, 1, 0]),
        model=labels_mixture,
        init="kmeans++",
    ),
    em(
        "a local latent that has no exact integral",
        "Latent 'u' (Normal) is continuous and belongs to each datum of 'y' … "
        "lvppl.EM(model, guide)",
        model=bent_factor,
    ),
    em(
        "EM without a latent",
        "no discrete latent … pyro.sample('z', dist.Categorical(weights)) … lvppl.SVI",
        model=without_latent,
    ),
    em(
        "EM without a parameter",
        "no parameter to maximise … pyro.param … lvppl.posterior",
        model=without_parameter,
    ),
    em(
        "a simplex that starts outside",
        "Parameter 'w' starts outside its constraint (Simplex) … initial value inside",
        model=mixture_of(
            weights=lambda: pyro.param(
                "w", torch.tensor([1.5, -0.5]), constraint=constraints.simplex
            )
        ),
    ),
    em(
        "probabilities as a parameter without a constraint",
        "runs at the first values of its parameters, but not where EM moves them … Simplex() … "
        "Without a constraint are 'loc', 'w' … constraint=constraints.simplex",
        model=mixture_of(weights=lambda: pyro.param("w", torch.tensor([0.5, 0.5]))),
    ),
    em(
        "a Dirichlet prior that is infinite at the edges",
        "The prior of 'weights' is a Dirichlet with a concentration of 0.5 … no MAP estimate … "
        "at least 1",
        model=sparse_weights,
    ),
    em(
        "a Beta prior that is infinite at the edges",
        "The prior of 'weight' is a Beta with a concentration below 1 … at least 1",
        torch.tensor([0.0, 1.0, 1.0]),
        model=with_prior(lambda: dist.Beta(0.5, 0.5), lambda p, z: dist.Bernoulli(p + 0 * z)),
    ),
    em(
        "a Gamma prior that is infinite at 0, and no count",
        "The Gamma prior of 'weight' has a concentration below 1 … too few data … at least 1",
        torch.zeros(4),
        model=with_prior(lambda: dist.Gamma(0.5, 0.5), lambda rate, z: dist.Poisson(rate + 0 * z)),
    ),
    em(
        "a plate that draws its rows anew",
        "Plate 'data' draws 2 of its 4 rows anew … batch_size … online=True",
        model=subsampled_mixture,
    ),
    em(
        "restarts from the same start",
        "restarts=3 from init='model' would be the same start 3 times … init='kmeans++'",
        restarts=3,
    ),
    em("`restarts=0`", "restarts must be at least 1 … 0", restarts=0),
    call(
        "`EM(hrad=True)`",
        lambda _: lvppl.EM(MIXTURE, hrad=True),
        "EM(hrad=...) is not an option of EM … Did you mean hard=?",
    ),
    call(
        "`EM(n_init=10)`, as scikit-learn calls it",
        lambda _: lvppl.EM(MIXTURE, n_init=10),
        "EM(n_init=...) is not an option of EM … Here it is restarts=.",
    ),
    call(
        "`EM(random_state=0)`, as scikit-learn calls it",
        lambda _: lvppl.EM(MIXTURE, random_state=0),
        "Here it is seed=, an option of EM(...).fit(...)",
    ),
    call(
        "`EM(n_components=2)`, as scikit-learn calls it",
        lambda _: lvppl.EM(MIXTURE, n_components=2),
        "is said by the program … GaussianMixture(num_components, num_features)",
    ),
    call(
        '`EM(covariance_type="diag")`, as scikit-learn calls it',
        lambda _: lvppl.EM(MIXTURE, covariance_type="diag"),
        'is said by the program … covariance="diag"',
    ),
    call(
        "an option of `fit` given to `EM`",
        lambda _: lvppl.EM(MIXTURE, max_iter=5),
        "EM(max_iter=...) is not an option of EM … It is an option of EM(...).fit(...)",
    ),
    call(
        "an option of `EM` given to `fit`",
        lambda _: lvppl.EM(MIXTURE).fit(Y, restarts=5, progress=False),
        "fit(restarts=...) is not an option of fit … It is an option of EM(...)",
    ),
    call(
        "`EM(GaussianMixture)`, the class",
        lambda _: lvppl.EM(GaussianMixture),
        "must be a Pyro program (a callable) … make one of the class, as in GaussianMixture(...)",
    ),
    em(
        '`EM(init="k-means++")`',
        "init must be one of … not 'k-means++' … Did you mean 'kmeans++'?",
        init="k-means++",
    ),
    em(
        '`EM(init="best")`',
        "init must be one of 'model', 'kmeans++', 'random', not 'best'",
        init="best",
    ),
    em(
        "hard EM at a temperature",
        "hard=True is the limit of temperature 0 … temperature=lambda i:",
        hard=True,
        temperature=0.5,
    ),
    em('`EM(hard="yes")`', "hard must be True or False … 'yes'", hard="yes"),
    em(
        "`EM(temperature=0.0)`", "temperature must be a number above 0 … hard=True", temperature=0.0
    ),
    em(
        "a schedule that reaches 0",
        "temperature must be a number above 0 … 0.0 … hard=True",
        temperature=lambda iteration: 1.0 - iteration,
    ),
    em("online EM without minibatches", "online=True needs … none was given", online=True),
    em(
        "online EM of one batch",
        "online=True needs … fewer than the data have; 4 came for 4 rows … Leave online out",
        online=True,
        batch_size=4,
    ),
    em("`fit(tol=-1.0)`", "tol must be a number of at least 0 … -1.0", tol=-1.0),
    em("`EM(floor=-1.0)`", "floor must be a number of at least 0 … -1.0", floor=-1.0),
    em("`fit(max_iter=0)`", "max_iter must be at least 1 … 0", max_iter=0),
    em(
        "`fit(maxiter=3)`", "fit(maxiter=...) is not an option … Did you mean max_iter=?", maxiter=3
    ),
    em("`fit(n_iter=3)`, as hmmlearn calls it", "fit(n_iter=...) … Here it is max_iter=", n_iter=3),
    em(
        "`fit(sample_weight=...)`, as scikit-learn calls it",
        "fit(sample_weight=...) … Data have no weights … y.repeat_interleave(counts, 0)",
        sample_weight=None,
    ),
    em(
        "EM of data in half precision",
        "Site 'y' observes torch.float16 … EM needs float32 or float64 … y.float()",
        Y.half(),
    ),
    em(
        "EM of data whose squares overflow",
        "observes values up to 2e+20, whose squared distances torch.float32 does not hold … "
        "(y - y.mean(0)) / y.std(0) … y.double()",
        1e20 * Y,
    ),
    em(
        "EM of data whose squares are zero",
        "observes values up to 2e-25, whose squared distances torch.float32 does not hold … "
        "(y - y.mean(0)) / y.std(0) … y.double()",
        1e-25 * Y,
    ),
    em(
        "a start without a floor, on a constant feature",
        "a start has a component whose variance is zero … EM(floor=1e-6)",
        torch.tensor([[0.5, 1.0], [2.0, 1.0], [-1.0, 1.0], [-2.0, 1.0]]),
        model=learned_widths,
        init="kmeans++",
        floor=0.0,
    ),
    em(
        "batches of a program without a plate over the rows",
        "batch_size=2 needs a plate over the rows … pyro.plate … leave batch_size out",
        model=whole_vector_mixture,
        batch_size=2,
    ),
    em(
        "a callback that is not in a list",
        "callbacks must be a list of callables … callbacks=[print]",
        callbacks=print,
    ),
    em(
        "options of the exact E-step with a guide",
        "hard, temperature, online, restarts and init belong to EM with an exact E-step",
        guide=no_guide,
        temperature=0.5,
    ),
    em(
        "an objective without a guide",
        "objective is the bound of a fit with a guide",
        objective=lvppl.ELBO(),
    ),
    call(
        "the posterior of an unknown site of a fit",
        lambda _: _em(MIXTURE, Y).posterior(Y).marginals("cluster"),
        "latent 'cluster' … there are ['z']",
    ),
    call(
        "a fit's posterior of data with other columns",
        lambda _: _em(columns_of(2), torch.randn(6, 2)).posterior(torch.zeros(3, 5)),
        "Site 'y' observes values of shape (3, 5), but its Normal is of shape (3, 2)",
    ),
    call(
        "`SVI` going on from a fit by EM",
        lambda _: _fit(MODEL, GUIDE, Y, resume=_em(MIXTURE, Y)),
        "resume must be a fit by lvppl.SVI, but this one is by lvppl.EM … fit.params[name]",
    ),
    call(
        "`amortization_gap` without a guide",
        lambda _: lvppl.amortization_gap(MIXTURE, None, Y),
        "guide is None … Give a guide … lvppl.posterior",
    ),
]

TOPICS["Fits on disk"] = [
    call(
        "a folder that is not there",
        lambda folder: lvppl.load(folder / "no_such_run", MODEL, GUIDE),
        "no fit in … no_such_run … fit.pt is missing",
    ),
    call("a truncated checkpoint", _load_truncated, "fit.pt is truncated … Save the fit again"),
    call("another program's checkpoint", _load_foreign, "was not written by lvppl.save"),
    call(
        "a checkpoint of another model",
        lambda folder: lvppl.load(_saved(folder), enumerated("parallel"), enumerating_guide),
        "parameter 'loc' that this program does not make … it makes ['logits'] … Use the "
        "model and the guide of the fit",
    ),
    call(
        "a checkpoint whose parameter has another shape",
        lambda folder: lvppl.load(_saved(folder), MODEL, _two_locations),
        "parameter 'loc' has shape () in the fit but (2,) in this program … Use the model "
        "and the guide of the fit",
    ),
    call(
        "saving a fit whose argument is an object",
        lambda folder: _fit(
            lambda y, how: MODEL(y), lambda y, how: GUIDE(y), Y, Fraction(1, 2)
        ).save(folder),
        "argument 1 is a Fraction … functools.partial",
    ),
]

TOPICS["Data sets and files"] = [
    call(
        "a file that is not there",
        lambda folder: lvppl.data.load(folder / "table.csv"),
        "table.csv is not there … expected a file, or a folder of images",
    ),
    call(
        "a file of another kind",
        _written("one, two", name="notes.txt"),
        "notes.txt is of kind .txt … expected .npy, .npz, .csv",
    ),
    call(
        "a cell that is no number",
        _written("height,weight\n1.5,60\n1.7,heavy\n"),
        "table.csv, column 'weight', row 2 (line 3) … 'heavy' is not a number … columns=[...]",
    ),
    call(
        "a row that is too short",
        _written("a,b\n1,2\n3\n"),
        "row 2 (line 3) has 1 cells … 2 columns … separator",
    ),
    call(
        "a missing value",
        _written("a,b\n1,2\n3,NA\n"),
        "NaN (missing) at row 2, column 'b' … allow_missing=True",
    ),
    call(
        "a column that does not exist",
        _written("a,b\n1,2\n", columns=["c"]),
        "no column named 'c' … it has a, b",
    ),
    call("an empty table", _written(""), "table.csv is empty … expected rows of numbers"),
    call(
        "two arrays, and no word which",
        lambda folder: _arrays(folder, {"x": np.zeros(2), "y": np.zeros(2)}),
        "arrays.npz holds x, y … array=",
    ),
    call(
        "an array of Python objects",
        lambda folder: _arrays(folder, {"x": np.array([None, "a"], dtype=object)}),
        "cannot be read as an array of numbers … numpy.savez",
    ),
    call(
        "an option of another kind of file",
        lambda folder: _arrays(folder, {"x": np.zeros(2)}, columns=["a"]),
        "columns= is for .csv files … leave it out",
    ),
    call(
        "a damaged download",
        _mnist(b"<html>not found</html>"),
        "train-images-idx3-ubyte.gz is not a whole gzip file … delete it",
    ),
    call(
        "a data set with the wrong digest",
        _mnist(gzip.compress(b"other images", mtime=0)),
        "train-images-idx3-ubyte.gz has the wrong digest … delete it",
    ),
    call(
        '`mnist(binarize="threshold")`',
        lambda _: lvppl.data.mnist(binarize="threshold"),
        "binarize must be 'dynamic' … 'static' … 'threshold'",
    ),
    call(
        '`mnist(split="validation")`',
        lambda _: lvppl.data.mnist(split="validation"),
        "split must be 'train' or 'test' … 'validation'",
    ),
    call(
        "`digits(test_fraction=1.0)`",
        lambda _: lvppl.data.digits(test_fraction=1.0),
        "test_fraction … 1.0 … strictly between 0 and 1",
    ),
    call(
        "intensities up to 255",
        lambda _: lvppl.data.Images(torch.full((2, 3, 3), 255.0)),
        "Image intensities must lie in [0, 1] … 255.0 … divide by the largest level",
    ),
    call(
        "`Minibatches(10, 0)`",
        lambda _: lvppl.data.Minibatches(10, 0),
        "batch_size must be a whole number of at least 1 … 0",
    ),
]

PIXELS = Autoregressive(lambda y: dist.Bernoulli(logits=0 * y).to_event(1), torch.zeros(4))
"""An autoregressive distribution over four pixels."""

TOPICS["Distributions"] = [
    call(
        "a value off the grid of `Quantized`",
        lambda _: Quantized(dist.Normal(0.0, 1.0)).log_prob(torch.tensor([1.0, 0.3])),
        "Quantized gives probability to the lattice of multiples of 1 only … index (1,) "
        "is 0.3 … round the values",
    ),
    call(
        "`Quantized(..., step=0)`",
        lambda _: Quantized(dist.Normal(0.0, 1.0), step=0),
        "step must be a positive finite number … 0",
    ),
    call(
        "`Quantized` of a vector distribution",
        lambda _: Quantized(dist.Normal(torch.zeros(2), 1.0).to_event(1)),
        "Quantized needs a univariate base … (2,) … .to_event(",
    ),
    call(
        "`Quantized` of a discrete distribution",
        lambda _: Quantized(dist.Poisson(1.0)),
        "Quantized needs a continuous base … Poisson is discrete",
    ),
    call(
        "`Quantized` of a distribution without a cdf",
        lambda _: Quantized(dist.StudentT(3.0)).log_prob(torch.tensor(1.0)),
        "cdf … StudentT … such as Normal",
    ),
    call(
        "`DiscretizedLogistic` of one level",
        lambda _: DiscretizedLogistic(torch.tensor(0.5), torch.tensor(0.1), num_levels=1),
        "at least two levels … num_levels=1",
    ),
    call(
        "grey levels off the grid of `DiscretizedLogistic`",
        lambda _: DiscretizedLogistic(torch.tensor(0.5), torch.tensor(0.1)).log_prob(
            torch.tensor([0.5])
        ),
        "the grid of 256 levels from 0 to 1 … index (0,) is 0.5 … round the values",
    ),
    call(
        "missing pixels as a mask of zeros and ones",
        lambda _: AutoregressivePart(PIXELS, torch.zeros(5, 4), torch.ones(4)),
        "chosen must be boolean of the event's shape, (4,) … torch.float32",
    ),
    call(
        "missing pixels that differ from image to image, in one part",
        lambda _: AutoregressivePart(PIXELS, torch.zeros(5, 4), torch.ones(5, 4).bool()),
        "shape (5, 4) … one mask serves all data … by themselves",
    ),
    call(
        "an image of which nothing is missing, as a latent part",
        lambda _: AutoregressivePart(PIXELS, torch.zeros(5, 4), torch.zeros(4).bool()),
        "chosen is false everywhere … leave the site out",
    ),
    call(
        "whole images where the missing pixels alone are a value",
        lambda _: AutoregressivePart(
            PIXELS, torch.zeros(5, 4), torch.tensor([True, True, False, False])
        ).log_prob(torch.zeros(5, 4)),
        "a vector of 2 … shape (5, 4) … y[..., chosen]",
    ),
    call(
        "single pixels of conditionals that are one joint distribution",
        lambda _: Autoregressive(
            lambda y: dist.MultivariateNormal(y, torch.eye(4)), torch.zeros(4)
        ).element_log_prob(torch.zeros(4)),
        "single elements are needed … event shape (4,) … .to_event(1)",
    ),
]

TOPICS["Models and guides of the library"] = [
    part(
        "as many factors as features",
        lambda _: ProbabilisticPCA.from_data(torch.randn(9, 3), 3),
        "latent_dim must be between 1 and 2 … is 3",
    ),
    part(
        "data that lie in a plane",
        lambda _: ProbabilisticPCA.from_data(torch.arange(9.0)[:, None].expand(9, 3), 1),
        "likelihood is unbounded … lower latent_dim or add data",
    ),
    part(
        '`GaussianMixture(covariance="round")`',
        lambda _: GaussianMixture(2, 2, covariance="round"),
        'covariance must be "full", "tied", "diag", "spherical" … \'round\'',
    ),
    part(
        "`GaussianLikelihood(floor=1.0)`",
        lambda _: GaussianLikelihood((4,), floor=1.0),
        "0 < floor < init … floor=1.0",
    ),
    part(
        "one sequence for `HiddenMarkovModel`",
        lambda _: _chain_of_two()(torch.zeros(7, 2)),
        "shape (sequences, steps, 2) … (7, 2) … One sequence is y[None].",
    ),
    part(
        "one sequence of numbers for `HiddenMarkovModel`",
        lambda _: _chain_of_two(num_features=1)(torch.zeros(7)),
        "shape (sequences, steps, 1) … (7,) … y[None, :, None]",
    ),
    part(
        "`ConvDecoder` of 9 × 9 images",
        lambda _: VAE(x_shape=(9, 9), decoder=ConvDecoder),
        "divisible by four … (9, 9)",
    ),
    part(
        "`ConvEncoder` of 9 × 9 images",
        lambda _: ConvEncoder((9, 9), 4),
        "divisible by four … (9, 9)",
    ),
    part(
        "`AmortizedFlow(latent_dim=1)`",
        lambda _: AmortizedFlow(latent_dim=1),
        "latent_dim >= 2 … 1",
    ),
    part(
        "`PerDatumNormal` of another number of data",
        lambda _: PerDatumNormal(4, 2)(torch.zeros(3, 5)),
        "parameters for 4 data … called with 3 … make one for this batch",
    ),
]


# -------------------------------------------------------------------------------------- the page

_INTRODUCTION = """\
# Bad inputs, and the error each gets

lvppl refuses what cannot give a right number, in a sentence that says what was expected, what came,
and what to do. The error is `lvppl.ProgramError`, a `ValueError`; the models and guides of the
library, which are plain Pyro programs, raise `ValueError` itself.

This page is made by `python -m tests.bad_inputs` from the registry in that file, whose every case
is a test. A message is shown up to its first line break. Where several calls refuse an input they
are named, and the message is that of the first; *every call* is `check`, the losses `ELBO` and
`IWAE`, a loss in `pyro.infer.SVI`, `SVI.fit` and `log_likelihood`. In the programs `z` is latent,
`y` is observed, and the plate of the data is `data`.
"""


def error_of(attempt: Attempt) -> Exception | None:
    """What the attempt raises, from a clean slate."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    folder = tempfile.TemporaryDirectory(prefix="bad_inputs_")
    with folder as path, pyro.validation_enabled(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attempt(Path(path))
        except Exception as error:
            return error
    return None


def page() -> str:
    """``docs/errors.md``. What is not refused as it should be fails its test, and has no row."""
    return "\n".join([_INTRODUCTION, *(_section(*item) for item in TOPICS.items())])


def _section(topic: str, cases: list[BadInput]) -> str:
    rows = []
    for case in cases:
        errors = [error_of(attempt) for attempt in case.attempts.values()]
        if all(case.is_met_by(error) for error in errors):
            names = [f"`{name}`" for name in case.attempts if name]
            calls = "every call" if len(names) == len(CALLS) else ", ".join(names)
            rows.append(f"| {case.title}{calls and f' ({calls})'} | {_shown(errors[0])} |")
    return "\n".join([f"## {topic}", "", "| tried | error |", "|---|---|", *rows, ""])


def _shown(error: Exception | None) -> str:
    """The first line, without what differs from run to run, escaped for a Markdown table."""
    text = str(error).partition("\n")[0].strip()
    text = re.sub(r"\S*bad_inputs_[^\s/]+", "folder", text)
    text = re.sub(r"0x[0-9a-f]+", "0x…", text)
    return re.sub(r"([\\|<*$`]|(?<!\w)_|_(?!\w))", r"\\\1", text)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

"""Tiny programs whose every quantity is known exactly, independently of `lvppl`.

An expectation under the guide is a weighted sum over *nodes*: the states of a discrete latent,
the Gauss-Hermite nodes of a Gaussian one, a trapezoid grid otherwise. `Oracle` holds the weights
and the three log-terms at the nodes, as differentiable functions of the parameters, so that the
ELBO, the rate, the distortion, the K-particle bound and all their gradients follow from one
table. The evidence and the posterior come separately, from linear-Gaussian algebra or from a sum
over states.

Nodes of a reparameterised latent move with the parameters under constant weights; states of a
discrete one stay and their weights q(z) move. Either way autograd through the table is the exact
gradient.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, init_to_value
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

PARALLEL = {"enumerate": "parallel"}


class Gaussian(NamedTuple):
    """Mean (data, d) and covariance (data, d, d)."""

    mean: Tensor
    cov: Tensor


@dataclasses.dataclass(frozen=True)
class Oracle:
    """Log-terms at the nodes, each (data, nodes), and exact answers, each (data,)."""

    weights: Tensor
    log_likelihood: Tensor
    log_prior: Tensor
    log_guide: Tensor
    log_evidence: Tensor | None = None
    posterior: Gaussian | Tensor | None = None
    guide: Gaussian | Tensor | None = None
    # ln p(z, c, y) averaged over p(c | z, y), where sites c are summed out of the model
    hard_log_joint: Tensor | None = None
    # weights and ln w of one particle, where it is not one node: sites enumerated in the guide are
    # summed inside the weight, w = sum over c of p(y, c, z_c) / q(z_c | c)
    importance: tuple[Tensor, Tensor] | None = None
    scale: float = 1.0

    def mean(self, values: Tensor) -> Tensor:
        return (self.weights * values).sum(-1)

    @property
    def log_weight(self) -> Tensor:
        return self.log_likelihood + self.log_prior - self.log_guide

    @property
    def elbo(self) -> Tensor:
        return self.mean(self.log_weight)

    @property
    def rate(self) -> Tensor:
        return self.mean(self.log_guide - self.log_prior)

    @property
    def distortion(self) -> Tensor:
        return -self.mean(self.log_likelihood)

    @property
    def hard_elbo(self) -> Tensor:
        if self.hard_log_joint is not None:
            return self.mean(self.hard_log_joint)
        return self.mean(self.log_likelihood + self.log_prior)

    @property
    def entropy(self) -> Tensor:
        return self.elbo - self.hard_elbo

    def iwae(self, num_particles: int) -> Tensor:
        """E ln (1/K) sum_k w_k over K independent nodes, by the product rule."""
        weights, log_weight = self.importance or (self.weights, self.log_weight)
        weights = weights.expand_as(log_weight)
        product, total = weights, log_weight
        for _ in range(num_particles - 1):
            product = (product.unsqueeze(-1) * weights.unsqueeze(-2)).flatten(-2)
            total = torch.logaddexp(total.unsqueeze(-1), log_weight.unsqueeze(-2)).flatten(-2)
        return (product * (total - math.log(num_particles))).sum(-1)


@dataclasses.dataclass(frozen=True)
class Built:
    """A program ready to run: `model(*args)`, `guide(*args)`, `oracle(constrained parameters)`."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Tensor, ...]
    oracle: Callable[[Mapping[str, Tensor]], Oracle]


@dataclasses.dataclass(frozen=True)
class Program:
    """A named program and what is true of it.

    `build(dtype, repeats)` repeats the data, so that one call averages over many draws.
    """

    name: str
    build: Callable[[torch.dtype, int], Built]
    data_plates: tuple[str, ...] = ("data",)
    reparameterised: bool = True  # every sampled guide site has a pathwise gradient
    enumerated_in_guide: bool = False
    enumerated_in_model: bool = False
    sampled: bool = True  # False: nothing is drawn, so every answer is exact
    vectorises: bool = True  # False: cannot bear a particle plate
    tileable: bool = True  # data can be repeated
    subsampled: bool = False
    point_guide: bool = False
    reweighted_latent: bool = False  # a scale or mask on ln q: the weights are no density ratio
    iwae_particles: int = 2  # for which the product rule is affordable; 0: no importance weights

    def start(self, dtype: torch.dtype = torch.float64, repeats: int = 1) -> Started:
        """Clear the store, create every parameter, and move each off its symmetric start."""
        pyro.clear_param_store()
        built = self.build(dtype, repeats)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            built.guide(*built.args)
            built.model(*built.args)
            for _, value in sorted(pyro.get_param_store().named_parameters()):
                step = torch.arange(1, value.numel() + 1, dtype=value.dtype).reshape(value.shape)
                value.add_(0.1 * torch.sin(2.0 * step))
        return Started(self, built)


@dataclasses.dataclass(frozen=True)
class Started:
    """A program whose parameters live in the current parameter store."""

    program: Program
    built: Built

    @property
    def call(self) -> tuple[Any, ...]:
        """(model, guide, *args), as every objective takes them."""
        return (self.built.model, self.built.guide, *self.built.args)

    def parameters(self) -> dict[str, Tensor]:
        """The unconstrained parameters by name, in a fixed order."""
        return dict(sorted(pyro.get_param_store().named_parameters()))

    def oracle(self) -> Oracle:
        return self.built.oracle(dict(pyro.get_param_store().items()))

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Gradient of a loss for every unconstrained parameter; zero where it depends on none."""
        named = self.parameters()
        grads: list[Tensor | None] = [None] * len(named)
        if loss.requires_grad:
            grads = list(torch.autograd.grad(loss, list(named.values()), allow_unused=True))
        return {
            name: torch.zeros_like(value) if grad is None else grad
            for (name, value), grad in zip(named.items(), grads, strict=True)
        }


PROGRAMS: dict[str, Program] = {}


def register(**facts: Any) -> Callable[[Callable[..., Built]], Callable[..., Built]]:
    def decorate(build: Callable[..., Built]) -> Callable[..., Built]:
        PROGRAMS[build.__name__] = Program(name=build.__name__, build=build, **facts)
        return build

    return decorate


# ------------------------------------------------------------------ mathematics used by the oracles


def log_normal(x: Tensor, loc: Tensor | float, scale: Tensor | float) -> Tensor:
    scale = torch.as_tensor(scale, dtype=x.dtype)
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


def log_bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return x * logits - torch.nn.functional.softplus(logits)


def hermite(order: int, dims: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Nodes (nodes, dims), weights (nodes,) of E f(eps), eps ~ N(0, I): to degree 2 order - 1."""
    x, w = np.polynomial.hermite_e.hermegauss(order)
    w = w / w.sum()
    nodes = torch.tensor(list(itertools.product(x, repeat=dims)), dtype=dtype)
    weights = torch.tensor([math.prod(c) for c in itertools.product(w, repeat=dims)], dtype=dtype)
    return nodes, weights


def linear_gaussian(
    prior: Gaussian, a: Tensor, noise_cov: Tensor, y: Tensor
) -> tuple[Tensor, Gaussian]:
    """ln p(y), (data,), and the posterior for z ~ N(m, S), y | z ~ N(A z, R), y (data, n)."""
    residual = y - (a @ prior.mean.unsqueeze(-1)).squeeze(-1)
    cov = a @ prior.cov @ a.mT + noise_cov
    gain = torch.linalg.solve(cov, a @ prior.cov).mT
    log_evidence = torch.distributions.MultivariateNormal(residual * 0.0, cov).log_prob(residual)
    mean = prior.mean + (gain @ residual.unsqueeze(-1)).squeeze(-1)
    posterior_cov = (prior.cov - gain @ a @ prior.cov).expand(*mean.shape, mean.shape[-1])
    return log_evidence, Gaussian(mean, posterior_cov)


def gaussian_kl(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q, p) of Gaussians, (data,), by the closed form."""
    precision = torch.linalg.inv(p.cov)
    shift = (p.mean - q.mean).unsqueeze(-1)
    trace = (precision @ q.cov).diagonal(dim1=-2, dim2=-1).sum(-1)
    distance = (shift.mT @ precision @ shift).squeeze(-1).squeeze(-1)
    return 0.5 * (trace + distance - q.mean.shape[-1] + torch.logdet(p.cov) - torch.logdet(q.cov))


def sum_out(log_prior: Tensor, log_likelihood: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum states (last dim) out of the model under their exact posterior p(c | z, y).

    Returns the averages of ln p(y|c), of ln p(c) - ln p(c|y) (the two sum to ln p(y)), and of
    ln p(c, y).
    """
    joint = log_prior + log_likelihood
    log_posterior = joint - joint.logsumexp(-1, keepdim=True)
    posterior = log_posterior.exp()
    return (
        (posterior * log_likelihood).sum(-1),
        (posterior * (log_prior - log_posterior)).sum(-1),
        (posterior * joint).sum(-1),
    )


def real(name: str, value: Tensor) -> Tensor:
    return pyro.param(name, value)


def positive(name: str, value: Tensor) -> Tensor:
    return pyro.param(name, value, constraint=constraints.positive)


def maker(dtype: torch.dtype) -> Callable[[Any], Tensor]:
    return lambda value: torch.tensor(value, dtype=dtype)


def scalar_gaussian(mean: Tensor, scale: Tensor, like: Tensor) -> Gaussian:
    """A one-dimensional Gaussian for every datum in `like` (data,)."""
    zero = torch.zeros_like(like)
    return Gaussian((zero + mean).unsqueeze(-1), (zero + scale**2)[:, None, None])


# ------------------------------------------------------------------------- continuous local latents


def normal_model(t: Callable[[Any], Tensor]) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        loc, scale = real("prior_loc", t(0.5)), positive("prior_scale", t(1.2))
        noise = positive("noise", t(0.7))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("y", dist.Normal(z, noise), obs=y)

    return model


def normal_guide(t: Callable[[Any], Tensor]) -> Callable[[Tensor], None]:
    def guide(y: Tensor) -> None:
        slope, shift = real("slope", t(0.6)), real("shift", t(0.1))
        width = positive("width", t(0.8))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y + shift, width))

    return guide


def normal_oracle(
    p: Mapping[str, Tensor],
    y: Tensor,
    loc: Tensor,
    width: Tensor,
    *,
    present: Tensor | float = 1.0,
    power: float = 1.0,
    latent_power: Tensor | float = 1.0,
    scale: float = 1.0,
) -> Oracle:
    """z ~ N(prior_loc, prior_scale), y ~ N(z, noise)^(power * present), q = N(loc, width).

    `y` and `loc` are (data,). `latent_power`, (data, 1) or a number, multiplies ln p(z) and
    ln q(z); with another number than 1 there is no evidence.
    """
    eps, w = hermite(24, 1, y.dtype)
    z = loc.unsqueeze(-1) + width.unsqueeze(-1) * eps.squeeze(-1)
    # the likelihood term raised to a power c: a Gaussian of variance noise^2 / c, times a constant
    exponent = power * torch.as_tensor(present, dtype=y.dtype) * torch.ones_like(y)
    observed = exponent > 0
    c = torch.where(observed, exponent, torch.ones_like(exponent))
    variance = p["noise"] ** 2 / c
    excess = log_normal(y, y, p["noise"]) * c - log_normal(y, y, variance.sqrt())
    prior = scalar_gaussian(p["prior_loc"], p["prior_scale"], y)
    evidence, posterior = linear_gaussian(
        prior, torch.ones_like(y)[:, None, None], variance[:, None, None], y.unsqueeze(-1)
    )
    normalised = isinstance(latent_power, float) and latent_power == 1.0
    posterior = Gaussian(
        torch.where(observed[:, None], posterior.mean, prior.mean),
        torch.where(observed[:, None, None], posterior.cov, prior.cov),
    )
    return Oracle(
        weights=w,
        log_likelihood=exponent.unsqueeze(-1) * log_normal(y.unsqueeze(-1), z, p["noise"]),
        log_prior=latent_power * log_normal(z, p["prior_loc"], p["prior_scale"]),
        log_guide=latent_power * log_normal(z, loc.unsqueeze(-1), width.unsqueeze(-1)),
        log_evidence=torch.where(observed, evidence + excess, 0.0) if normalised else None,
        posterior=posterior if normalised else None,
        guide=scalar_gaussian(loc, width, y),
        scale=scale,
    )


NORMAL_DATA = [0.3, -1.2, 2.0]


@register(iwae_particles=3)
def normal_normal(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A Gaussian latent for every datum, reparameterised, analytic KL."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        return normal_oracle(p, y, p["slope"] * y + p["shift"], p["width"].expand_as(y))

    return Built(normal_model(t), normal_guide(t), (y,), oracle)


@register(iwae_particles=3)
def masked_observations(dtype: torch.dtype, repeats: int = 1) -> Built:
    """One observation is missing: its evidence is 1 and its distortion 0, whatever the filler."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)
    seen = torch.tensor([True, False, True]).repeat(repeats)

    def model(y: Tensor) -> None:
        loc, scale = real("prior_loc", t(0.5)), positive("prior_scale", t(1.2))
        noise = positive("noise", t(0.7))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            with poutine.mask(mask=seen):
                pyro.sample("y", dist.Normal(z, noise), obs=y)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        loc, width = p["slope"] * y + p["shift"], p["width"].expand_as(y)
        return normal_oracle(p, y, loc, width, present=seen.to(dtype))

    return Built(model, normal_guide(t), (y,), oracle)


@register(reweighted_latent=True, iwae_particles=3)
def masked_data(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A padded datum: latent and observation are both masked out, in model and guide."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)
    seen = torch.tensor([True, True, False]).repeat(repeats)
    model, guide = normal_model(t), normal_guide(t)

    def masked_model(y: Tensor) -> None:
        with poutine.mask(mask=seen):
            model(y)

    def masked_guide(y: Tensor) -> None:
        with poutine.mask(mask=seen):
            guide(y)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        full = normal_oracle(p, y, p["slope"] * y + p["shift"], p["width"].expand_as(y))
        m = seen.to(dtype)
        terms = ("log_likelihood", "log_prior", "log_guide")
        kept = {name: getattr(full, name) * m.unsqueeze(-1) for name in terms}
        return dataclasses.replace(
            full, **kept, log_evidence=full.log_evidence * m, posterior=None, guide=None
        )

    return Built(masked_model, masked_guide, (y,), oracle)


@register(iwae_particles=3)
def scaled_likelihood(dtype: torch.dtype, repeats: int = 1) -> Built:
    """The user counts every observation twice: ln p(y) = ln of the integral of p(z) p(y|z)^2."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)

    def model(y: Tensor) -> None:
        loc, scale = real("prior_loc", t(0.5)), positive("prior_scale", t(1.2))
        noise = positive("noise", t(0.7))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(loc, scale))
            with poutine.scale(scale=2.0):
                pyro.sample("y", dist.Normal(z, noise), obs=y)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        return normal_oracle(p, y, p["slope"] * y + p["shift"], p["width"].expand_as(y), power=2.0)

    return Built(model, normal_guide(t), (y,), oracle)


@register(reweighted_latent=True, iwae_particles=3)
def scaled_latent(dtype: torch.dtype, repeats: int = 1) -> Built:
    """The user's own KL weight 0.3, as Pyro users write it: a scale on z in model and guide."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)

    def model(y: Tensor) -> None:
        loc, scale = real("prior_loc", t(0.5)), positive("prior_scale", t(1.2))
        noise = positive("noise", t(0.7))
        with pyro.plate("data", len(y)):
            with poutine.scale(scale=0.3):
                z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("y", dist.Normal(z, noise), obs=y)

    def guide(y: Tensor) -> None:
        with poutine.scale(scale=0.3):
            normal_guide(t)(y)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        loc, width = p["slope"] * y + p["shift"], p["width"].expand_as(y)
        return normal_oracle(p, y, loc, width, latent_power=0.3)

    return Built(model, guide, (y,), oracle)


@register(reweighted_latent=True, iwae_particles=3)
def masked_latent(dtype: torch.dtype, repeats: int = 1) -> Built:
    """The latent of one datum is masked out, yet its draw feeds the observation: no rate there."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)
    seen = torch.tensor([True, False, True]).repeat(repeats)

    def model(y: Tensor) -> None:
        loc, scale = real("prior_loc", t(0.5)), positive("prior_scale", t(1.2))
        noise = positive("noise", t(0.7))
        with pyro.plate("data", len(y)):
            with poutine.mask(mask=seen):
                z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("y", dist.Normal(z, noise), obs=y)

    def guide(y: Tensor) -> None:
        with poutine.mask(mask=seen):
            normal_guide(t)(y)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        loc, width = p["slope"] * y + p["shift"], p["width"].expand_as(y)
        return normal_oracle(p, y, loc, width, latent_power=seen.to(dtype).unsqueeze(-1))

    return Built(model, guide, (y,), oracle)


def subsample_of(size: int, repeats: int, index: list[int]) -> Tensor:
    return torch.cat([torch.tensor(index) + size * copy for copy in range(repeats)])


@register(subsampled=True, iwae_particles=3)
def subsampled(dtype: torch.dtype, repeats: int = 1) -> Built:
    """Three of six data in a fixed minibatch; a plate scale of 2, outside every log-sum-exp."""
    t = maker(dtype)
    full = t([0.3, -1.2, 2.0, 0.8, -0.4, 1.1]).repeat(repeats)
    index = subsample_of(6, repeats, [1, 3, 4])

    def model(y: Tensor) -> None:
        loc, scale = real("prior_loc", t(0.5)), positive("prior_scale", t(1.2))
        noise = positive("noise", t(0.7))
        with pyro.plate("data", len(y), subsample=index) as batch:
            z = pyro.sample("z", dist.Normal(loc, scale))
            pyro.sample("y", dist.Normal(z, noise), obs=y[batch])

    def guide(y: Tensor) -> None:
        slope, shift = real("slope", t(0.6)), real("shift", t(0.1))
        width = positive("width", t(0.8))
        with pyro.plate("data", len(y), subsample=index) as batch:
            pyro.sample("z", dist.Normal(slope * y[batch] + shift, width))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        y = full[index]
        return normal_oracle(p, y, p["slope"] * y + p["shift"], p["width"].expand_as(y), scale=2.0)

    return Built(model, guide, (full,), oracle)


@register(iwae_particles=3)
def pyro_module_guide(dtype: torch.dtype, repeats: int = 1) -> Built:
    """The guide is a `PyroModule` that holds its own parameters."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)

    class Guide(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.slope = PyroParam(t(0.6))
            self.width = PyroParam(t(0.8), constraint=constraints.positive)

        def forward(self, y: Tensor) -> None:
            with pyro.plate("data", len(y)):
                pyro.sample("z", dist.Normal(self.slope * y, self.width))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        return normal_oracle(p, y, p["slope"] * y, p["width"].expand_as(y))

    return Built(normal_model(t), Guide(), (y,), oracle)


@register(tileable=False, iwae_particles=3)
def auto_normal_local(dtype: torch.dtype, repeats: int = 1) -> Built:
    """`AutoNormal` over a local latent: a location and a width for every datum."""
    t = maker(dtype)
    y = t(NORMAL_DATA)
    model = normal_model(t)
    start = init_to_value(values={"z": t([0.4, -0.5, 1.0])})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.6)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        return normal_oracle(p, y, p["AutoNormal.locs.z"], p["AutoNormal.scales.z"])

    return Built(model, guide, (y,), oracle)


@register(point_guide=True, sampled=False, iwae_particles=0)
def delta_guide(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A point guide on a continuous latent: the hard ELBO is ln p(z*, y)."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)

    def guide(y: Tensor) -> None:
        slope = real("slope", t(0.6))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Delta(slope * y))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        z = (p["slope"] * y).unsqueeze(-1)
        return Oracle(
            weights=torch.ones_like(z),
            log_likelihood=log_normal(y.unsqueeze(-1), z, p["noise"]),
            log_prior=log_normal(z, p["prior_loc"], p["prior_scale"]),
            log_guide=torch.zeros_like(z),
        )

    return Built(normal_model(t), guide, (y,), oracle)


@register(iwae_particles=3)
def deterministic_and_factor(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A deterministic site, which has no term, and a factor, which counts with the observations."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)

    def model(y: Tensor) -> None:
        loc, noise = real("prior_loc", t(0.5)), positive("noise", t(0.7))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(loc, t(1.0)))
            doubled = pyro.deterministic("doubled", 2.0 * z)
            pyro.factor("tilt", -0.5 * 0.4 * z**2)
            pyro.sample("y", dist.Normal(0.5 * doubled, noise), obs=y)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        base = normal_oracle(
            {**p, "prior_scale": t(1.0)}, y, p["slope"] * y + p["shift"], p["width"].expand_as(y)
        )
        eps, _ = hermite(24, 1, dtype)
        z = (p["slope"] * y + p["shift"]).unsqueeze(-1) + p["width"] * eps.squeeze(-1)
        # the tilt is sqrt(2 pi / 0.4) N(0; z, 1 / 0.4): one more Gaussian observation, of 0
        prior = scalar_gaussian(p["prior_loc"], t(1.0), y)
        a = torch.ones(2, 1, dtype=dtype)
        noise = torch.diag(torch.stack([p["noise"] ** 2, t(1 / 0.4)]))
        evidence, posterior = linear_gaussian(prior, a, noise, torch.stack([y, 0.0 * y], -1))
        return dataclasses.replace(
            base,
            log_likelihood=base.log_likelihood - 0.2 * z**2,
            log_evidence=evidence + 0.5 * math.log(2 * math.pi / 0.4),
            posterior=posterior,
        )

    return Built(model, normal_guide(t), (y,), oracle)


@register(iwae_particles=3)
def two_observed_sites(dtype: torch.dtype, repeats: int = 1) -> Built:
    """P(y, u | x): one latent, a scalar and a vector observation, and a covariate."""
    t = maker(dtype)
    x, y = t([1.0, -0.5, 0.2]).repeat(repeats), t(NORMAL_DATA).repeat(repeats)
    u = t([[0.1, 0.5], [-0.3, 0.2], [1.0, 0.4]]).repeat(repeats, 1)

    def model(x: Tensor, y: Tensor, u: Tensor) -> None:
        effect, weights = real("effect", t(0.7)), real("weights", t([0.5, -0.8]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(effect * x, t(1.0)))
            pyro.sample("y", dist.Normal(z, t(0.6)), obs=y)
            pyro.sample("u", dist.Normal(z.unsqueeze(-1) * weights, t(0.9)).to_event(1), obs=u)

    def guide(x: Tensor, y: Tensor, u: Tensor) -> None:
        slope, width = real("slope", t(0.5)), positive("width", t(0.7))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * (x + y), width))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(24, 1, dtype)
        loc = (p["slope"] * (x + y)).unsqueeze(-1)
        z = loc + p["width"] * eps.squeeze(-1)
        ll = log_normal(y.unsqueeze(-1), z, 0.6)
        ll = ll + log_normal(u.unsqueeze(1), z.unsqueeze(-1) * p["weights"], 0.9).sum(-1)
        a = torch.cat([t([1.0]), p["weights"]]).unsqueeze(-1)
        noise = torch.diag(t([0.36, 0.81, 0.81]))
        prior = scalar_gaussian(p["effect"] * x, t(1.0), x)
        evidence, posterior = linear_gaussian(prior, a, noise, torch.cat([y[:, None], u], -1))
        return Oracle(
            w, ll, log_normal(z, (p["effect"] * x)[:, None], 1.0), log_normal(z, loc, p["width"]),
            evidence, posterior, scalar_gaussian(loc.squeeze(-1), p["width"], x),
        )  # fmt: skip

    return Built(model, guide, (x, y, u), oracle)


# --------------------------------------------------------------------------------------- two layers


def two_layer_model(t: Callable[[Any], Tensor]) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        loc, weight = real("top_loc", t(0.4)), real("weight", t(0.8))
        inner, noise = positive("inner", t(0.9)), positive("noise", t(0.7))
        with pyro.plate("data", len(y)):
            z2 = pyro.sample("z2", dist.Normal(loc, t(1.0)))
            z1 = pyro.sample("z1", dist.Normal(weight * z2, inner))
            pyro.sample("y", dist.Normal(z1, noise), obs=y)

    return model


def two_layer_oracle(p: Mapping[str, Tensor], y: Tensor, z1: Tensor, z2: Tensor, log_guide: Tensor,
                     guide: Gaussian, w: Tensor) -> Oracle:  # fmt: skip
    """The two-layer model at nodes z1, z2 (data, nodes); its latents in the order (z2, z1)."""
    loc, weight, inner, noise = p["top_loc"], p["weight"], p["inner"], p["noise"]
    one = torch.ones_like(loc)
    mean = torch.stack([loc, weight * loc]).expand(len(y), 2)
    cov = torch.stack(
        [torch.stack([one, weight]), torch.stack([weight, weight**2 + inner**2])]
    ).expand(len(y), 2, 2)
    a = torch.stack([0.0 * one, one]).unsqueeze(0)
    prior = Gaussian(mean, cov)
    evidence, posterior = linear_gaussian(prior, a, (noise**2)[None, None], y.unsqueeze(-1))
    return Oracle(
        weights=w,
        log_likelihood=log_normal(y.unsqueeze(-1), z1, noise),
        log_prior=log_normal(z2, loc, one) + log_normal(z1, weight * z2, inner),
        log_guide=log_guide,
        log_evidence=evidence,
        posterior=posterior,
        guide=guide,
    )


def chain_gaussian(
    first_mean: Tensor, first_sd: Tensor, slope: Tensor, shift: Tensor, sd: Tensor
) -> Gaussian:
    """(first, second) with first ~ N(m, s), second | first ~ N(slope first + shift, sd)."""
    v = (first_sd**2).expand_as(first_mean)
    mean = torch.stack([first_mean, slope * first_mean + shift], -1)
    cov = torch.stack([v, slope * v, slope * v, slope**2 * v + sd**2], -1).reshape(-1, 2, 2)
    return Gaussian(mean, cov)


@register()
def two_layer_top_down(dtype: torch.dtype, repeats: int = 1) -> Built:
    """q(z2 | y) q(z1 | z2, y): every KL may be analytic."""
    t = maker(dtype)
    y = t(NORMAL_DATA[:2]).repeat(repeats)

    def guide(y: Tensor) -> None:
        a, b, c = real("a", t(0.3)), real("b", t(0.4)), real("c", t(0.5))
        s2, s1 = positive("s2", t(0.8)), positive("s1", t(0.6))
        with pyro.plate("data", len(y)):
            z2 = pyro.sample("z2", dist.Normal(a * y, s2))
            pyro.sample("z1", dist.Normal(b * z2 + c * y, s1))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(8, 2, dtype)
        column = y.unsqueeze(-1)
        z2 = p["a"] * column + p["s2"] * eps[:, 0]
        centre = p["b"] * z2 + p["c"] * column
        z1 = centre + p["s1"] * eps[:, 1]
        log_guide = log_normal(z2, p["a"] * column, p["s2"]) + log_normal(z1, centre, p["s1"])
        q = chain_gaussian(p["a"] * y, p["s2"], p["b"], p["c"] * y, p["s1"])
        return two_layer_oracle(p, y, z1, z2, log_guide, q, w)

    return Built(two_layer_model(t), guide, (y,), oracle)


@register()
def two_layer_bottom_up(dtype: torch.dtype, repeats: int = 1) -> Built:
    """q(z1 | y) q(z2 | z1): z1's model parent descends from it; an analytic KL would be wrong."""
    t = maker(dtype)
    y = t(NORMAL_DATA[:2]).repeat(repeats)

    def guide(y: Tensor) -> None:
        a, b = real("a", t(0.6)), real("b", t(0.9))
        s1, s2 = positive("s1", t(0.6)), positive("s2", t(0.8))
        with pyro.plate("data", len(y)):
            z1 = pyro.sample("z1", dist.Normal(a * y, s1))
            pyro.sample("z2", dist.Normal(b * z1, s2))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(8, 2, dtype)
        column = y.unsqueeze(-1)
        z1 = p["a"] * column + p["s1"] * eps[:, 0]
        z2 = p["b"] * z1 + p["s2"] * eps[:, 1]
        log_guide = log_normal(z1, p["a"] * column, p["s1"]) + log_normal(z2, p["b"] * z1, p["s2"])
        q = chain_gaussian(p["a"] * y, p["s1"], p["b"], 0.0 * y, p["s2"])
        q = Gaussian(q.mean.flip(-1), q.cov.flip(-1, -2))
        return two_layer_oracle(p, y, z1, z2, log_guide, q, w)

    return Built(two_layer_model(t), guide, (y,), oracle)


@register()
def nested_plates(dtype: torch.dtype, repeats: int = 1) -> Built:
    """Data x two replicates, with a latent at both levels: replicates sum into their datum."""
    t = maker(dtype)
    y = t([[0.3, 0.7], [-1.2, -0.2]]).repeat(repeats, 1)

    def model(y: Tensor) -> None:
        loc, inner, noise = (
            real("loc", t(0.2)),
            positive("inner", t(0.8)),
            positive("noise", t(0.5)),
        )
        with pyro.plate("data", len(y), dim=-2):
            z = pyro.sample("z", dist.Normal(loc, t(1.0)))
            with pyro.plate("replicates", 2, dim=-1):
                u = pyro.sample("u", dist.Normal(z, inner))
                pyro.sample("y", dist.Normal(u, noise), obs=y)

    def guide(y: Tensor) -> None:
        a, b, c = real("a", t(0.5)), real("b", t(0.3)), real("c", t(0.4))
        sz, su = positive("sz", t(0.7)), positive("su", t(0.6))
        with pyro.plate("data", len(y), dim=-2):
            z = pyro.sample("z", dist.Normal(a * y.mean(-1, keepdim=True), sz))
            with pyro.plate("replicates", 2, dim=-1):
                pyro.sample("u", dist.Normal(b * y + c * z, su))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(6, 3, dtype)
        centre = p["a"] * y.mean(-1, keepdim=True)
        z = centre + p["sz"] * eps[:, 0]
        inner_centre = p["b"] * y.unsqueeze(1) + p["c"] * z.unsqueeze(-1)
        u = inner_centre + p["su"] * eps[:, 1:]
        # y | loc: two observations with a shared and an own part
        one = torch.ones(2, 2, dtype=dtype)
        cov = one + torch.eye(2, dtype=dtype) * (p["inner"] ** 2 + p["noise"] ** 2)
        evidence = torch.distributions.MultivariateNormal(p["loc"].expand(2), cov).log_prob(y)
        return Oracle(
            weights=w,
            log_likelihood=log_normal(y.unsqueeze(1), u, p["noise"]).sum(-1),
            log_prior=log_normal(z, p["loc"], 1.0)
            + log_normal(u, z.unsqueeze(-1), p["inner"]).sum(-1),
            log_guide=log_normal(z, centre, p["sz"]) + log_normal(u, inner_centre, p["su"]).sum(-1),
            log_evidence=evidence,
        )

    return Built(model, guide, (y,), oracle)


# ------------------------------------------------------------------------------ vectors and modules


@register()
def probabilistic_pca(dtype: torch.dtype, repeats: int = 1) -> Built:
    """y = W z + noise in three dimensions, a full-covariance Gaussian guide over two."""
    t = maker(dtype)
    y = t([[0.5, -1.0, 0.3], [1.5, 0.2, -0.7]]).repeat(repeats, 1)

    def model(y: Tensor) -> None:
        loadings = real("loadings", t([[1.0, 0.2], [-0.5, 0.8], [0.3, 0.4]]))
        noise = positive("noise", t(0.6))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(t([0.0, 0.0]), t(1.0)).to_event(1))
            pyro.sample("y", dist.Normal(z @ loadings.mT, noise).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        encoder = real("encoder", t([[0.4, -0.2, 0.1], [0.1, 0.5, 0.2]]))
        tril = pyro.param(
            "tril", t([[0.7, 0.0], [0.2, 0.6]]), constraint=constraints.lower_cholesky
        )
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.MultivariateNormal(y @ encoder.mT, scale_tril=tril))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(8, 2, dtype)
        mean, tril, loadings = y @ p["encoder"].mT, p["tril"], p["loadings"]
        z = mean.unsqueeze(1) + eps @ tril.mT
        log_det = tril.diagonal().log().sum()
        log_guide = (-0.5 * eps**2 - 0.5 * math.log(2 * math.pi)).sum(-1) - log_det
        eye = torch.eye(2, dtype=dtype)
        prior = Gaussian(torch.zeros(len(y), 2, dtype=dtype), eye.expand(len(y), 2, 2))
        noise = p["noise"] ** 2 * torch.eye(3, dtype=dtype)
        evidence, posterior = linear_gaussian(prior, loadings, noise, y)
        return Oracle(
            weights=w,
            log_likelihood=log_normal(y.unsqueeze(1), z @ loadings.mT, p["noise"]).sum(-1),
            log_prior=log_normal(z, 0.0, 1.0).sum(-1),
            log_guide=log_guide.expand(z.shape[:-1]),
            log_evidence=evidence,
            posterior=posterior,
            guide=Gaussian(mean, (tril @ tril.mT).expand(len(y), 2, 2)),
        )

    return Built(model, guide, (y,), oracle)


def linear(weight: Tensor, bias: Tensor) -> torch.nn.Linear:
    module = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    with torch.no_grad():
        module.weight.copy_(weight)
        module.bias.copy_(bias)
    return module


@register(iwae_particles=3)
def module_decoder(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A linear decoder and encoder, registered by `pyro.module`."""
    t = maker(dtype)
    y = t([[0.3, -0.6], [-1.2, 0.4]]).repeat(repeats, 1)
    decoder = linear(t([[0.9], [-0.4]]), t([0.1, 0.2]))
    encoder = linear(t([[0.5, -0.3]]), t([0.1]))

    def model(y: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(t([0.0]), t(1.0)).to_event(1))
            pyro.sample("y", dist.Normal(decoder(z), t(0.8)).to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        pyro.module("encoder", encoder)
        width = positive("width", t(0.7))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(encoder(y), width).to_event(1))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(24, 1, dtype)
        weight, bias = p["decoder$$$weight"], p["decoder$$$bias"]
        loc = y @ p["encoder$$$weight"].mT + p["encoder$$$bias"]
        z = loc + p["width"] * eps.squeeze(-1)
        mean = z.unsqueeze(-1) * weight.squeeze(-1) + bias
        prior = scalar_gaussian(t(0.0), t(1.0), y[:, 0])
        noise = 0.64 * torch.eye(2, dtype=dtype)
        evidence, posterior = linear_gaussian(prior, weight, noise, y - bias)
        return Oracle(
            weights=w,
            log_likelihood=log_normal(y.unsqueeze(1), mean, 0.8).sum(-1),
            log_prior=log_normal(z, 0.0, 1.0),
            log_guide=log_normal(z, loc, p["width"]),
            log_evidence=evidence,
            posterior=posterior,
            guide=scalar_gaussian(loc.squeeze(-1), p["width"], y[:, 0]),
        )

    return Built(model, guide, (y,), oracle)


@register(vectorises=False, iwae_particles=3)
def concatenating(dtype: torch.dtype, repeats: int = 1) -> Built:
    """`torch.cat([z, x])` without expanding x raises under a particle plate: particles loop."""
    t = maker(dtype)
    x = t([[1.0, 0.5], [-0.3, 0.8]]).repeat(repeats, 1)
    y = t([0.3, -1.2]).repeat(repeats)

    def model(x: Tensor, y: Tensor) -> None:
        weights, noise = real("weights", t([0.9, 0.4, -0.5])), positive("noise", t(0.7))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(t([0.0]), t(1.0)).to_event(1))
            pyro.sample("y", dist.Normal(torch.cat([z, x], -1) @ weights, noise), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        slope, width = real("slope", t(0.6)), positive("width", t(0.7))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y.unsqueeze(-1), width).to_event(1))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        shifted = y - x @ p["weights"][1:]
        eps, w = hermite(24, 1, dtype)
        loc = (p["slope"] * y).unsqueeze(-1)
        z = loc + p["width"] * eps.squeeze(-1)
        prior = scalar_gaussian(t(0.0), t(1.0), y)
        evidence, posterior = linear_gaussian(
            prior,
            p["weights"][:1].unsqueeze(-1),
            (p["noise"] ** 2)[None, None],
            shifted.unsqueeze(-1),
        )
        return Oracle(
            weights=w,
            log_likelihood=log_normal(shifted.unsqueeze(-1), p["weights"][0] * z, p["noise"]),
            log_prior=log_normal(z, 0.0, 1.0),
            log_guide=log_normal(z, loc, p["width"]),
            log_evidence=evidence,
            posterior=posterior,
            guide=scalar_gaussian(p["slope"] * y, p["width"], y),
        )

    return Built(model, guide, (x, y), oracle)


# ------------------------------------------------------------------------ other continuous families


@register()
def gamma_exponential(dtype: torch.dtype, repeats: int = 1) -> Built:
    """Gamma latent, exponential data, LogNormal guide: no analytic KL; p(y) is a Lomax density."""
    t = maker(dtype)
    y = t([0.4, 1.7]).repeat(repeats)

    def model(y: Tensor) -> None:
        shape, rate = positive("shape", t(2.0)), positive("rate", t(1.5))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Gamma(shape, rate))
            pyro.sample("y", dist.Exponential(z), obs=y)

    def guide(y: Tensor) -> None:
        a, b, width = real("a", t(0.3)), real("b", t(-0.2)), positive("width", t(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.LogNormal(a + b * y, width))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        return gamma_exponential_oracle(p, y.unsqueeze(-1), p["a"] + p["b"] * y, p["width"])

    return Built(model, guide, (y,), oracle)


def gamma_exponential_oracle(
    p: Mapping[str, Tensor], y: Tensor, loc: Tensor, width: Tensor
) -> Oracle:
    """z ~ Gamma(shape, rate), each of y (data, n) ~ Exponential(z), q = LogNormal(loc, width)."""
    eps, w = hermite(40, 1, y.dtype)
    log_z = loc.unsqueeze(-1) + width * eps.squeeze(-1)
    shape, rate, n, total = p["shape"], p["rate"], y.shape[-1], y.sum(-1)
    log_evidence = (
        torch.lgamma(shape + n) - torch.lgamma(shape) + shape * rate.log()
        - (shape + n) * (rate + total).log()
    )  # fmt: skip
    z = log_z.exp()
    return Oracle(
        weights=w,
        log_likelihood=n * log_z - z * total.unsqueeze(-1),
        log_prior=shape * rate.log() - torch.lgamma(shape) + (shape - 1) * log_z - rate * z,
        log_guide=log_normal(log_z, loc.unsqueeze(-1), width) - log_z,
        log_evidence=log_evidence,
    )


@register()
def gamma_poisson(dtype: torch.dtype, repeats: int = 1) -> Built:
    """Gamma latent and guide (implicit reparameterisation, analytic KL), Poisson counts."""
    t = maker(dtype)
    y = t([1.0, 4.0]).repeat(repeats)

    def model(y: Tensor) -> None:
        shape, rate = positive("shape", t(2.0)), positive("rate", t(1.1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Gamma(shape, rate))
            pyro.sample("y", dist.Poisson(z), obs=y)

    def guide(y: Tensor) -> None:
        shift, rate = positive("guide_shape", t(2.5)), positive("guide_rate", t(2.2))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Gamma(shift + y, rate))

    def log_gamma(log_z: Tensor, shape: Tensor, rate: Tensor) -> Tensor:
        return shape * rate.log() - torch.lgamma(shape) + (shape - 1) * log_z - rate * log_z.exp()

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        log_z = torch.arange(-9.0, 4.0, 0.08, dtype=dtype)  # trapezoid rule in ln z
        column = y.unsqueeze(-1)
        log_guide = log_gamma(log_z, p["guide_shape"] + column, p["guide_rate"])
        shape, rate = p["shape"], p["rate"]
        log_evidence = (
            torch.lgamma(shape + y) - torch.lgamma(shape) - torch.lgamma(y + 1)
            + shape * rate.log() - (shape + y) * (rate + 1).log()
        )  # fmt: skip
        return Oracle(
            weights=(log_guide + log_z).exp() * 0.08,
            log_likelihood=column * log_z - log_z.exp() - torch.lgamma(column + 1),
            log_prior=log_gamma(log_z, shape, rate).expand_as(log_guide),
            log_guide=log_guide,
            log_evidence=log_evidence,
        )

    return Built(model, guide, (y,), oracle)


# ------------------------------------------------------------------------ global latents: one datum


@register(data_plates=(), tileable=False, iwae_particles=3)
def global_normal(dtype: torch.dtype, repeats: int = 1) -> Built:
    """One mean shared by all data: the data set is one datum."""
    t = maker(dtype)
    y = t(NORMAL_DATA)

    def model(y: Tensor) -> None:
        loc, scale = real("prior_loc", t(0.5)), positive("prior_scale", t(1.2))
        noise = positive("noise", t(0.7))
        z = pyro.sample("z", dist.Normal(loc, scale))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, noise), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("z", dist.Normal(real("loc", t(0.2)), positive("width", t(0.5))))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(24, 1, dtype)
        z = p["loc"] + p["width"] * eps.T
        prior = scalar_gaussian(p["prior_loc"], p["prior_scale"], y[:1])
        evidence, posterior = linear_gaussian(
            prior,
            torch.ones(3, 1, dtype=dtype),
            p["noise"] ** 2 * torch.eye(3, dtype=dtype),
            y[None],
        )
        return Oracle(
            weights=w,
            log_likelihood=log_normal(y[:, None], z, p["noise"]).sum(0, keepdim=True),
            log_prior=log_normal(z, p["prior_loc"], p["prior_scale"]),
            log_guide=log_normal(z, p["loc"], p["width"]),
            log_evidence=evidence,
            posterior=posterior,
            guide=scalar_gaussian(p["loc"], p["width"], y[:1]),
        )

    return Built(model, guide, (y,), oracle)


def regression_oracle(
    p: Mapping[str, Tensor], x: Tensor, y: Tensor, mean: Tensor, tril: Tensor
) -> Oracle:
    """y ~ N(x w, noise), w ~ N(0, I), q(w) = N(mean, tril tril'); x (n, d); one datum."""
    d, dtype = x.shape[1], x.dtype
    eps, w = hermite(10, d, dtype)
    weights = mean + eps @ tril.mT
    log_guide = (-0.5 * eps**2 - 0.5 * math.log(2 * math.pi)).sum(-1) - tril.diagonal().log().sum()
    prior = Gaussian(torch.zeros(1, d, dtype=dtype), torch.eye(d, dtype=dtype)[None])
    noise = p["noise"] ** 2 * torch.eye(len(y), dtype=dtype)
    evidence, posterior = linear_gaussian(prior, x, noise, y[None])
    return Oracle(
        weights=w,
        log_likelihood=log_normal(y, weights @ x.mT, p["noise"]).sum(-1)[None],
        log_prior=log_normal(weights, 0.0, 1.0).sum(-1)[None],
        log_guide=log_guide[None],
        log_evidence=evidence,
        posterior=posterior,
        guide=Gaussian(mean[None], (tril @ tril.mT)[None]),
    )


REGRESSION_DATA = ([[1.0, 0.5], [1.0, -0.7], [1.0, 1.4]], [0.4, -0.9, 1.3])


@register(data_plates=(), tileable=False)
def linear_regression(dtype: torch.dtype, repeats: int = 1) -> Built:
    """P(y | x) with global weights and a full-covariance Gaussian guide."""
    t = maker(dtype)
    x, y = (t(values) for values in REGRESSION_DATA)

    def model(x: Tensor, y: Tensor) -> None:
        noise = positive("noise", t(0.8))
        weights = pyro.sample("weights", dist.Normal(t([0.0, 0.0]), t(1.0)).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal((x * weights).sum(-1), noise), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        loc = real("loc", t([0.1, 0.3]))
        tril = pyro.param(
            "tril", t([[0.5, 0.0], [0.1, 0.4]]), constraint=constraints.lower_cholesky
        )
        pyro.sample("weights", dist.MultivariateNormal(loc, scale_tril=tril))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        return regression_oracle(p, x, y, p["loc"], p["tril"])

    return Built(model, guide, (x, y), oracle)


def two_weights_model(t: Callable[[Any], Tensor]) -> Callable[[Tensor, Tensor], None]:
    def model(x: Tensor, y: Tensor) -> None:
        noise = positive("noise", t(0.8))
        bias = pyro.sample("bias", dist.Normal(t(0.0), t(1.0)))
        slope = pyro.sample("slope", dist.Normal(t(0.0), t(1.0)))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(bias + slope * x[:, 1], noise), obs=y)

    return model


@register(data_plates=(), tileable=False)
def auto_normal(dtype: torch.dtype, repeats: int = 1) -> Built:
    """`AutoNormal` over two global sites."""
    t = maker(dtype)
    x, y = (t(values) for values in REGRESSION_DATA)
    model = two_weights_model(t)
    start = init_to_value(values={"bias": t(0.1), "slope": t(0.4)})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.5)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        names = ("bias", "slope")
        loc = torch.stack([p[f"AutoNormal.locs.{n}"] for n in names])
        scale = torch.stack([p[f"AutoNormal.scales.{n}"] for n in names])
        return regression_oracle(p, x, y, loc, torch.diag(scale))

    return Built(model, guide, (x, y), oracle)


@register(data_plates=(), tileable=False)
def auto_multivariate_normal(dtype: torch.dtype, repeats: int = 1) -> Built:
    """`AutoMultivariateNormal`: ln q sits in one auxiliary site."""
    t = maker(dtype)
    x, y = (t(values) for values in REGRESSION_DATA)
    model = two_weights_model(t)
    start = init_to_value(values={"bias": t(0.1), "slope": t(0.4)})
    guide = AutoMultivariateNormal(model, init_loc_fn=start, init_scale=0.5)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        scale, unit = p["AutoMultivariateNormal.scale"], p["AutoMultivariateNormal.scale_tril"]
        return regression_oracle(p, x, y, p["AutoMultivariateNormal.loc"], scale[:, None] * unit)

    return Built(model, guide, (x, y), oracle)


@register(data_plates=(), tileable=False)
def auto_normal_positive(dtype: torch.dtype, repeats: int = 1) -> Built:
    """`AutoNormal` on a positive latent: ln q needs the Jacobian of exp."""
    t = maker(dtype)
    y = t([0.4, 1.7])

    def model(y: Tensor) -> None:
        shape, rate = positive("shape", t(2.0)), positive("rate", t(1.5))
        z = pyro.sample("z", dist.Gamma(shape, rate))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Exponential(z), obs=y)

    start = init_to_value(values={"z": t(0.8)})
    guide = AutoNormal(model, init_loc_fn=start, init_scale=0.5)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        loc, scale = p["AutoNormal.locs.z"], p["AutoNormal.scales.z"]
        return gamma_exponential_oracle(p, y[None], loc[None], scale)

    return Built(model, guide, (y,), oracle)


@register(data_plates=(), tileable=False)
def global_and_local(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A global mean and a latent for every datum: no plate is common, the data set is one datum."""
    t = maker(dtype)
    y = t([0.3, -1.2])

    def model(y: Tensor) -> None:
        inner, noise = positive("inner", t(0.8)), positive("noise", t(0.6))
        mean = pyro.sample("mean", dist.Normal(t(0.0), t(1.0)))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mean, inner))
            pyro.sample("y", dist.Normal(z, noise), obs=y)

    def guide(y: Tensor) -> None:
        loc, width = real("loc", t(0.2)), positive("width", t(0.5))
        slope, spread = real("slope", t(0.5)), positive("spread", t(0.6))
        pyro.sample("mean", dist.Normal(loc, width))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y, spread))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(6, 3, dtype)
        mean = p["loc"] + p["width"] * eps[:, 0]
        z = p["slope"] * y + p["spread"] * eps[:, 1:]
        one, eye = torch.ones(2, 2, dtype=dtype), torch.eye(2, dtype=dtype)
        cov = one + eye * (p["inner"] ** 2 + p["noise"] ** 2)
        marginal = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=dtype), cov)
        log_prior = log_normal(mean, 0.0, 1.0) + log_normal(z, mean[:, None], p["inner"]).sum(-1)
        log_guide = log_normal(mean, p["loc"], p["width"])
        log_guide = log_guide + log_normal(z, p["slope"] * y, p["spread"]).sum(-1)
        return Oracle(
            weights=w,
            log_likelihood=log_normal(y, z, p["noise"]).sum(-1)[None],
            log_prior=log_prior[None],
            log_guide=log_guide[None],
            log_evidence=marginal.log_prob(y)[None],
        )

    return Built(model, guide, (y,), oracle)


@register(data_plates=(), tileable=False, vectorises=False)
def reduces_over_particles(dtype: torch.dtype, repeats: int = 1) -> Built:
    """`weights.sum()` runs under a particle plate, but adds the particles up: they must loop."""
    t = maker(dtype)
    y = t([0.4, -0.9])

    def model(y: Tensor) -> None:
        noise = positive("noise", t(0.8))
        weights = pyro.sample("weights", dist.Normal(t([0.0, 0.0]), t(1.0)).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(weights.sum(), noise), obs=y)

    def guide(y: Tensor) -> None:
        loc, width = real("loc", t([0.1, 0.3])), positive("width", t([0.5, 0.6]))
        pyro.sample("weights", dist.Normal(loc, width).to_event(1))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        x = torch.ones(2, 2, dtype=dtype)
        return regression_oracle(p, x, y, p["loc"], torch.diag(p["width"]))

    return Built(model, guide, (y,), oracle)


# ------------------------------------------------------------ discrete latents sampled by the guide


def switch_model(t: Callable[[Any], Tensor]) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        logit, locs = real("prior_logit", t(-0.3)), real("locs", t([-1.0, 1.2]))
        noise = positive("noise", t(0.8))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(logits=logit))
            pyro.sample("y", dist.Normal(locs[z.long()], noise), obs=y)

    return model


def switch_guide(t: Callable[[Any], Tensor]) -> Callable[[Tensor], None]:
    def guide(y: Tensor) -> None:
        slope, shift = real("slope", t(0.9)), real("shift", t(-0.2))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(logits=slope * y + shift))

    return guide


def switch_oracle(
    p: Mapping[str, Tensor], y: Tensor, *, power: float = 1.0, latent_power: Tensor | float = 1.0,
    scale: float = 1.0,
) -> Oracle:  # fmt: skip
    z = torch.tensor([0.0, 1.0], dtype=y.dtype)
    log_guide = log_bernoulli(z, (p["slope"] * y + p["shift"]).unsqueeze(-1))
    log_prior = log_bernoulli(z, p["prior_logit"]).expand_as(log_guide)
    log_likelihood = power * log_normal(y.unsqueeze(-1), p["locs"], p["noise"])
    joint = log_prior + log_likelihood
    normalised = isinstance(latent_power, float) and latent_power == 1.0
    return Oracle(
        weights=log_guide.exp(),
        log_likelihood=log_likelihood,
        log_prior=latent_power * log_prior,
        log_guide=latent_power * log_guide,
        log_evidence=joint.logsumexp(-1) if normalised else None,
        posterior=joint.softmax(-1) if normalised else None,
        guide=log_guide.exp(),
        scale=scale,
    )


@register(reparameterised=False, iwae_particles=3)
def bernoulli_score(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A sampled Bernoulli latent: score-function gradient."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)
    return Built(switch_model(t), switch_guide(t), (y,), lambda p: switch_oracle(p, y))


@register(reparameterised=False, iwae_particles=3)
def bernoulli_score_scaled(dtype: torch.dtype, repeats: int = 1) -> Built:
    """User scales on latent and likelihood weigh the costs, never the score ln q itself."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)

    def model(y: Tensor) -> None:
        logit, locs = real("prior_logit", t(-0.3)), real("locs", t([-1.0, 1.2]))
        noise = positive("noise", t(0.8))
        with pyro.plate("data", len(y)):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Bernoulli(logits=logit))
            with poutine.scale(scale=2.0):
                pyro.sample("y", dist.Normal(locs[z.long()], noise), obs=y)

    def guide(y: Tensor) -> None:
        with poutine.scale(scale=0.5):
            switch_guide(t)(y)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        return switch_oracle(p, y, power=2.0, latent_power=0.5)

    return Built(model, guide, (y,), oracle)


@register(reparameterised=False, iwae_particles=3)
def bernoulli_score_masked(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A latent under `poutine.mask` whose draw feeds the observation: no rate, but a score."""
    return masked_switch(dtype, repeats, by_handler=True)


@register(reparameterised=False, iwae_particles=3)
def bernoulli_score_masked_distribution(dtype: torch.dtype, repeats: int = 1) -> Built:
    """The same by `Distribution.mask`, which hides the score inside the distribution."""
    return masked_switch(dtype, repeats, by_handler=False)


def masked_switch(dtype: torch.dtype, repeats: int, *, by_handler: bool) -> Built:
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)
    seen = torch.tensor([True, False, True]).repeat(repeats)

    def masked(logits: Tensor) -> Tensor:
        if by_handler:
            with poutine.mask(mask=seen):
                return pyro.sample("z", dist.Bernoulli(logits=logits))
        return pyro.sample("z", dist.Bernoulli(logits=logits).mask(seen))

    def model(y: Tensor) -> None:
        logit, locs = real("prior_logit", t(-0.3)), real("locs", t([-1.0, 1.2]))
        noise = positive("noise", t(0.8))
        with pyro.plate("data", len(y)):
            z = masked(logit)
            pyro.sample("y", dist.Normal(locs[z.long()], noise), obs=y)

    def guide(y: Tensor) -> None:
        slope, shift = real("slope", t(0.9)), real("shift", t(-0.2))
        with pyro.plate("data", len(y)):
            masked(slope * y + shift)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        return switch_oracle(p, y, latent_power=seen.to(dtype).unsqueeze(-1))

    return Built(model, guide, (y,), oracle)


@register(reparameterised=False, subsampled=True, iwae_particles=3)
def bernoulli_score_subsampled(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A sampled Bernoulli latent in a minibatch: the plate scale multiplies its signal once."""
    t = maker(dtype)
    full = t([0.3, -1.2, 2.0, 0.8, -0.4, 1.1]).repeat(repeats)
    index = subsample_of(6, repeats, [0, 5])

    def model(y: Tensor) -> None:
        logit, locs = real("prior_logit", t(-0.3)), real("locs", t([-1.0, 1.2]))
        noise = positive("noise", t(0.8))
        with pyro.plate("data", len(y), subsample=index) as batch:
            z = pyro.sample("z", dist.Bernoulli(logits=logit))
            pyro.sample("y", dist.Normal(locs[z.long()], noise), obs=y[batch])

    def guide(y: Tensor) -> None:
        slope, shift = real("slope", t(0.9)), real("shift", t(-0.2))
        with pyro.plate("data", len(y), subsample=index) as batch:
            pyro.sample("z", dist.Bernoulli(logits=slope * y[batch] + shift))

    return Built(model, guide, (full,), lambda p: switch_oracle(p, full[index], scale=3.0))


@register(reparameterised=False)
def poisson_score(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A Poisson latent and guide, not reparameterised; sums stop where both masses are < 1e-30."""
    t = maker(dtype)
    y = t([0.8, 2.6]).repeat(repeats)

    def model(y: Tensor) -> None:
        rate, noise = positive("rate", t(1.5)), positive("noise", t(0.9))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Poisson(rate))
            pyro.sample("y", dist.Normal(z, noise), obs=y)

    def guide(y: Tensor) -> None:
        a, b = real("a", t(-0.1)), real("b", t(0.4))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Poisson((a + b * y).exp()))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        z = torch.arange(0.0, 50.0, dtype=dtype)
        log_rate = (p["a"] + p["b"] * y).unsqueeze(-1)
        log_guide = z * log_rate - log_rate.exp() - torch.lgamma(z + 1)
        log_prior = z * p["rate"].log() - p["rate"] - torch.lgamma(z + 1)
        log_likelihood = log_normal(y.unsqueeze(-1), z, p["noise"])
        joint = log_prior + log_likelihood
        return Oracle(
            weights=log_guide.exp(),
            log_likelihood=log_likelihood,
            log_prior=log_prior.expand_as(joint),
            log_guide=log_guide,
            log_evidence=joint.logsumexp(-1),
            posterior=joint.softmax(-1),
            guide=log_guide.exp(),
        )

    return Built(model, guide, (y,), oracle)


@register(reparameterised=False)
def score_then_pathwise(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A sampled switch c, then a Gaussian z | c: z's analytic KL is part of c's learning signal."""
    return switch_then_gaussian(dtype, repeats, enumerated=False)


@register(enumerated_in_guide=True)
def enumerated_then_pathwise(dtype: torch.dtype, repeats: int = 1) -> Built:
    """The same with c enumerated in the guide: one Gaussian draw for each of its states."""
    return switch_then_gaussian(dtype, repeats, enumerated=True)


def switch_then_gaussian(dtype: torch.dtype, repeats: int, *, enumerated: bool) -> Built:
    t = maker(dtype)
    y = t(NORMAL_DATA[:2]).repeat(repeats)
    infer = PARALLEL if enumerated else {}

    def model(y: Tensor) -> None:
        logit, locs = real("prior_logit", t(-0.3)), real("locs", t([-1.0, 1.2]))
        noise = positive("noise", t(0.8))
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Bernoulli(logits=logit))
            z = pyro.sample("z", dist.Normal(locs[c.long()], t(0.9)))
            pyro.sample("y", dist.Normal(z, noise), obs=y)

    def guide(y: Tensor) -> None:
        slope, shift = real("slope", t(0.9)), real("shift", t(-0.2))
        offsets, width = real("offsets", t([-0.5, 0.6])), positive("width", t(0.7))
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Bernoulli(logits=slope * y + shift), infer=infer)
            pyro.sample("z", dist.Normal(0.5 * y + offsets[c.long()], width))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(16, 1, dtype)
        states = torch.tensor([0.0, 1.0], dtype=dtype)
        log_c = log_bernoulli(states, (p["slope"] * y + p["shift"]).unsqueeze(-1))  # (data, 2)
        centre = 0.5 * y[:, None] + p["offsets"]
        z = centre.unsqueeze(-1) + p["width"] * eps.squeeze(-1)  # (data, 2, nodes)
        log_guide = log_c.unsqueeze(-1) + log_normal(z, centre.unsqueeze(-1), p["width"])
        log_prior = log_bernoulli(states, p["prior_logit"])[:, None]
        log_prior = log_prior + log_normal(z, p["locs"][:, None], 0.9)
        sd = (0.81 + p["noise"] ** 2).sqrt()
        # one particle of the enumerated guide: an own draw of z for each state of c
        eps2, w2 = hermite(12, 2, dtype)
        z2 = centre.unsqueeze(1) + p["width"] * eps2  # (data, nodes, 2)
        log_w2 = log_bernoulli(states, p["prior_logit"]) + log_normal(z2, p["locs"], 0.9)
        log_w2 = log_w2 + log_normal(y[:, None, None], z2, p["noise"])
        log_w2 = log_w2 - log_normal(z2, centre.unsqueeze(1), p["width"])
        by_state = log_bernoulli(states, p["prior_logit"]) + log_normal(y[:, None], p["locs"], sd)
        return Oracle(
            weights=(log_c.exp().unsqueeze(-1) * w).flatten(1),
            log_likelihood=log_normal(y[:, None, None], z, p["noise"]).flatten(1),
            log_prior=log_prior.flatten(1),
            log_guide=log_guide.flatten(1),
            log_evidence=by_state.logsumexp(-1),
            importance=(w2, log_w2.logsumexp(-1)) if enumerated else None,
        )

    return Built(model, guide, (y,), oracle)


@register(reparameterised=False)
def score_in_replicates(dtype: torch.dtype, repeats: int = 1) -> Built:
    """Two sampled switches for every datum, in an inner plate, that share a Gaussian latent."""
    t = maker(dtype)
    y = t([[0.3, 0.7], [-1.2, -0.2]]).repeat(repeats, 1)

    def model(y: Tensor) -> None:
        logit, gap, noise = real("logit", t(0.2)), real("gap", t(1.1)), positive("noise", t(0.8))
        with pyro.plate("data", len(y), dim=-2):
            z = pyro.sample("z", dist.Normal(t(0.0), t(1.0)))
            with pyro.plate("replicates", 2, dim=-1):
                c = pyro.sample("c", dist.Bernoulli(logits=logit))
                pyro.sample("y", dist.Normal(z + gap * c, noise), obs=y)

    def guide(y: Tensor) -> None:
        a, width = real("a", t(0.5)), positive("width", t(0.7))
        b, d = real("b", t(0.8)), real("d", t(-0.5))
        with pyro.plate("data", len(y), dim=-2):
            z = pyro.sample("z", dist.Normal(a * y.mean(-1, keepdim=True), width))
            with pyro.plate("replicates", 2, dim=-1):
                pyro.sample("c", dist.Bernoulli(logits=b * y + d * z))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(24, 1, dtype)
        c = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)), dtype=dtype)  # (4, 2)
        centre = p["a"] * y.mean(-1, keepdim=True)
        z = centre + p["width"] * eps.squeeze(-1)  # (data, nodes)
        logits = p["b"] * y.unsqueeze(1) + p["d"] * z.unsqueeze(-1)  # (data, nodes, 2)
        log_c = log_bernoulli(c, logits.unsqueeze(2)).sum(-1)  # (data, nodes, 4)
        mean = z[..., None, None] + p["gap"] * c
        log_likelihood = log_normal(y[:, None, None], mean, p["noise"]).sum(-1)
        log_prior_c = log_bernoulli(c, p["logit"]).sum(-1)
        one, eye = torch.ones(2, 2, dtype=dtype), torch.eye(2, dtype=dtype)
        marginal = torch.distributions.MultivariateNormal(p["gap"] * c, one + p["noise"] ** 2 * eye)
        evidence = (log_prior_c + marginal.log_prob(y.unsqueeze(1))).logsumexp(-1)
        return Oracle(
            weights=(log_c.exp() * w[:, None]).flatten(1),
            log_likelihood=log_likelihood.flatten(1),
            log_prior=(log_prior_c + log_normal(z, 0.0, 1.0).unsqueeze(-1)).flatten(1),
            log_guide=(log_c + log_normal(z, centre, p["width"]).unsqueeze(-1)).flatten(1),
            log_evidence=evidence,
        )

    return Built(model, guide, (y,), oracle)


@register(reparameterised=False, point_guide=True, sampled=False, iwae_particles=0)
def discrete_point_guide(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A point guide on a discrete latent: ELBO = ln p(z*, y), rate = the code length -ln p(z*)."""
    t = maker(dtype)
    y = t(NORMAL_DATA).repeat(repeats)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Delta((y > 0.0).to(dtype)))

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        z = (y > 0.0).to(dtype).unsqueeze(-1)
        states = torch.tensor([0.0, 1.0], dtype=dtype)
        joint = log_bernoulli(states, p["prior_logit"])
        joint = joint + log_normal(y.unsqueeze(-1), p["locs"], p["noise"])
        return Oracle(
            weights=torch.ones_like(z),
            log_likelihood=log_normal(y.unsqueeze(-1), p["locs"][z.long()], p["noise"]),
            log_prior=log_bernoulli(z, p["prior_logit"]),
            log_guide=torch.zeros_like(z),
            log_evidence=joint.logsumexp(-1),
        )

    return Built(switch_model(t), guide, (y,), oracle)


# ---------------------------------------------------------------------- discrete latents summed out


MIXTURE_DATA = [0.3, -1.5, 2.0]


def summed_in_guide(log_guide: Tensor, log_prior: Tensor, log_likelihood: Tensor) -> Oracle:
    """Everything is averaged over the guide's states, each (data, states)."""
    joint = log_prior + log_likelihood
    evidence = joint.logsumexp(-1)
    return Oracle(
        weights=log_guide.exp(),
        log_likelihood=log_likelihood,
        log_prior=log_prior,
        log_guide=log_guide,
        log_evidence=evidence,
        posterior=joint.softmax(-1),
        guide=log_guide.exp(),
        importance=(torch.ones_like(evidence[:, None]), evidence[:, None]),
    )


@register(enumerated_in_guide=True, sampled=False)
def categorical_in_guide(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A mixture whose guide is enumerated: the ELBO is an exact sum."""
    t = maker(dtype)
    y = t(MIXTURE_DATA).repeat(repeats)

    def model(y: Tensor) -> None:
        logits, locs = real("logits", t([0.2, -0.3, 0.1])), real("locs", t([-1.0, 0.5, 2.0]))
        noise = positive("noise", t(0.8))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            pyro.sample("y", dist.Normal(locs[z], noise), obs=y)

    def guide(y: Tensor) -> None:
        slopes, shifts = real("slopes", t([-0.6, 0.1, 0.7])), real("shifts", t([0.0, 0.3, -0.2]))
        with pyro.plate("data", len(y)):
            logits = slopes * y.unsqueeze(-1) + shifts
            pyro.sample("z", dist.Categorical(logits=logits), infer=PARALLEL)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        log_guide = (p["slopes"] * y.unsqueeze(-1) + p["shifts"]).log_softmax(-1)
        log_prior = p["logits"].log_softmax(-1).expand_as(log_guide)
        log_likelihood = log_normal(y.unsqueeze(-1), p["locs"], p["noise"])
        return summed_in_guide(log_guide, log_prior, log_likelihood)

    return Built(model, guide, (y,), oracle)


@register(enumerated_in_guide=True, sampled=False)
def chained_in_guide(dtype: torch.dtype, repeats: int = 1) -> Built:
    """Two categorical sites, the second given the first, both enumerated in the guide."""
    t = maker(dtype)
    y = t(MIXTURE_DATA).repeat(repeats)

    def model(y: Tensor) -> None:
        first = real("first", t([0.2, -0.3]))
        second = real("second", t([[0.5, -0.2, 0.1], [-0.4, 0.3, 0.6]]))
        locs, noise = real("locs", t([-1.0, 0.5, 2.0])), positive("noise", t(0.8))
        with pyro.plate("data", len(y)):
            c1 = pyro.sample("c1", dist.Categorical(logits=first))
            c2 = pyro.sample("c2", dist.Categorical(logits=second[c1]))
            pyro.sample("y", dist.Normal(locs[c2] + t(0.3) * c1, noise), obs=y)

    def guide(y: Tensor) -> None:
        slope1, slope2 = real("slope1", t([-0.4, 0.4])), real("slope2", t([-0.6, 0.1, 0.7]))
        jump = real("jump", t([[0.2, 0.0, -0.3], [0.1, 0.4, 0.0]]))
        with pyro.plate("data", len(y)):
            c1 = pyro.sample("c1", dist.Categorical(logits=slope1 * y[:, None]), infer=PARALLEL)
            logits = slope2 * y.unsqueeze(-1) + jump[c1]
            pyro.sample("c2", dist.Categorical(logits=logits), infer=PARALLEL)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        column = y[:, None]
        q1 = (p["slope1"] * column).log_softmax(-1)
        q2 = ((p["slope2"] * column)[:, None] + p["jump"]).log_softmax(-1)  # (data, 2, 3)
        log_guide = (q1.unsqueeze(-1) + q2).flatten(1)
        log_prior = p["first"].log_softmax(-1)[:, None] + p["second"].log_softmax(-1)
        mean = p["locs"] + 0.3 * torch.arange(2, dtype=dtype)[:, None]
        log_likelihood = log_normal(y[:, None], mean.flatten(), p["noise"])
        return summed_in_guide(log_guide, log_prior.flatten().expand_as(log_guide), log_likelihood)

    return Built(model, guide, (y,), oracle)


def no_latents(*args: Tensor) -> None:
    """The guide of a model whose latents are all summed out."""


def summed_out(log_prior: Tensor, log_likelihood: Tensor) -> Oracle:
    """Everything is summed out of the model: one node, and the posterior is the guide."""
    expected, prior, hard = sum_out(log_prior, log_likelihood)
    joint = log_prior + log_likelihood
    return Oracle(
        weights=torch.ones_like(expected).unsqueeze(-1),
        log_likelihood=expected.unsqueeze(-1),
        log_prior=prior.unsqueeze(-1),
        log_guide=torch.zeros_like(expected).unsqueeze(-1),
        log_evidence=joint.logsumexp(-1),
        posterior=joint.softmax(-1),
        guide=joint.softmax(-1),
        hard_log_joint=hard.unsqueeze(-1),
    )


@register(enumerated_in_model=True, sampled=False, iwae_particles=2)
def mixture_in_model(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A Gaussian mixture summed out of the model, nothing in the guide: the ELBO is ln p(y)."""
    t = maker(dtype)
    y = t(MIXTURE_DATA).repeat(repeats)

    def model(y: Tensor) -> None:
        logits, locs = real("logits", t([0.2, -0.3, 0.1])), real("locs", t([-1.0, 0.5, 2.0]))
        noise = positive("noise", t(0.8))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=logits), infer=PARALLEL)
            pyro.sample("y", dist.Normal(locs[z], noise), obs=y)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        log_likelihood = log_normal(y.unsqueeze(-1), p["locs"], p["noise"])
        return summed_out(p["logits"].log_softmax(-1).expand_as(log_likelihood), log_likelihood)

    return Built(model, no_latents, (y,), oracle)


@register(enumerated_in_model=True, sampled=False, iwae_particles=2)
def markov_in_model(dtype: torch.dtype, repeats: int = 1) -> Built:
    """A hidden Markov chain of length 3 written with `pyro.markov`, summed over its 8 paths."""
    t = maker(dtype)
    y = t([[0.3, -0.8, 1.1], [-1.0, -0.2, 0.4]]).repeat(repeats, 1)

    def model(y: Tensor) -> None:
        start, transition = (
            real("start", t([0.3, -0.1])),
            real("jump", t([[0.8, 0.0], [-0.2, 0.5]])),
        )
        locs, noise = real("locs", t([-0.7, 0.9])), positive("noise", t(0.8))
        with pyro.plate("data", len(y), dim=-1):
            state = None
            for step in pyro.markov(range(3)):
                logits = start if state is None else transition[state]
                state = pyro.sample(
                    f"state_{step}", dist.Categorical(logits=logits), infer=PARALLEL
                )
                pyro.sample(f"y_{step}", dist.Normal(locs[state], noise), obs=y[:, step])

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        paths = torch.tensor(list(itertools.product([0, 1], repeat=3)))
        jump = p["jump"].log_softmax(-1)
        log_prior = p["start"].log_softmax(-1)[paths[:, 0]]
        log_prior = log_prior + jump[paths[:, 0], paths[:, 1]] + jump[paths[:, 1], paths[:, 2]]
        log_likelihood = log_normal(y.unsqueeze(1), p["locs"][paths], p["noise"]).sum(-1)
        return summed_out(log_prior.expand_as(log_likelihood), log_likelihood)

    return Built(model, no_latents, (y,), oracle)


@register(enumerated_in_model=True)
def discrete_and_continuous(dtype: torch.dtype, repeats: int = 1) -> Built:
    """The guide draws a Gaussian latent; a categorical one is summed out of the model."""
    t = maker(dtype)
    y = t(MIXTURE_DATA[:2]).repeat(repeats)

    def model(y: Tensor) -> None:
        logits, locs = real("logits", t([0.2, -0.3])), real("locs", t([-1.0, 1.2]))
        noise = positive("noise", t(0.6))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(t(0.2), t(0.8)))
            c = pyro.sample("c", dist.Categorical(logits=logits), infer=PARALLEL)
            pyro.sample("y", dist.Normal(z + locs[c], noise), obs=y)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(40, 1, dtype)
        loc = (p["slope"] * y + p["shift"]).unsqueeze(-1)
        z = loc + p["width"] * eps.squeeze(-1)
        log_c = p["logits"].log_softmax(-1)
        by_state = log_normal(y[:, None, None], z.unsqueeze(-1) + p["locs"], p["noise"])
        expected, prior_c, hard_c = sum_out(log_c.expand_as(by_state), by_state)
        log_z = log_normal(z, 0.2, 0.8)
        sd = (0.64 + p["noise"] ** 2).sqrt()
        evidence = (log_c + log_normal(y[:, None], 0.2 + p["locs"], sd)).logsumexp(-1)
        return Oracle(
            weights=w,
            log_likelihood=expected,
            log_prior=prior_c + log_z,
            log_guide=log_normal(z, loc, p["width"]),
            log_evidence=evidence,
            hard_log_joint=hard_c + log_z,
        )

    return Built(model, normal_guide(t), (y,), oracle)


@register(enumerated_in_model=True)
def mixture_prior(dtype: torch.dtype, repeats: int = 1) -> Built:
    """c is summed out and z | c Gaussian: p(c | z, y) depends on z, so z has no analytic KL."""
    t = maker(dtype)
    y = t(MIXTURE_DATA[:2]).repeat(repeats)

    def model(y: Tensor) -> None:
        logits, locs = real("logits", t([0.2, -0.3])), real("locs", t([-1.0, 1.2]))
        noise = positive("noise", t(0.6))
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(logits=logits), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(locs[c], t(0.8)))
            pyro.sample("y", dist.Normal(z, noise), obs=y)

    def oracle(p: Mapping[str, Tensor]) -> Oracle:
        eps, w = hermite(40, 1, dtype)
        loc = (p["slope"] * y + p["shift"]).unsqueeze(-1)
        z = loc + p["width"] * eps.squeeze(-1)
        log_likelihood = log_normal(y.unsqueeze(-1), z, p["noise"])
        log_c = p["logits"].log_softmax(-1)
        by_state = log_c + log_normal(z.unsqueeze(-1), p["locs"], 0.8)
        log_z, log_c_given = by_state.logsumexp(-1), by_state.log_softmax(-1)
        sd = (0.64 + p["noise"] ** 2).sqrt()
        return Oracle(
            weights=w,
            log_likelihood=log_likelihood,
            log_prior=log_z,
            log_guide=log_normal(z, loc, p["width"]),
            log_evidence=(log_c + log_normal(y[:, None], p["locs"], sd)).logsumexp(-1),
            hard_log_joint=log_likelihood + (log_c_given.exp() * by_state).sum(-1),
        )

    return Built(model, normal_guide(t), (y,), oracle)

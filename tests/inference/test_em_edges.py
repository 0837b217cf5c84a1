"""EM at its edges: priors, families, missing values, floors, dead components, and how runs end."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.messenger import Messenger
from sklearn.decomposition import FactorAnalysis
from torch import Tensor
from torch.distributions import constraints, transform_to

import lvppl
from lvppl.distributions import HiddenMarkov, InverseWishart
from tests.enumerable import positive, real, simplex, t, unit

Model = Callable[..., None]
SLACK = 1e-9


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def labels(count: int, states: int = 2) -> Tensor:
    return torch.randint(states, (count,), generator=generator(1))


N = 60
Z = labels(N)
X = normal(N, seed=3)
TWO = normal(N, seed=2) + t([-2.0, 3.0])[Z]
COUNTS = torch.poisson(t([2.0, 9.0])[Z], generator=generator(4))
WAITS = (torch.rand(N, generator=generator(5), dtype=torch.float64)).neg().log1p().neg()
WAITS = WAITS * t([1.0, 8.0])[Z] + 0.01
PLANE = normal(N, 2, seed=6) @ t([[1.0, 0.5], [0.0, 0.7]]) + t([[-2.0, 0.0], [2.0, 1.0]])[Z]
BITS = (torch.rand(N, 5, generator=generator(7)) < torch.tensor([0.2, 0.7])[Z][:, None]).double()
LINES = torch.where(Z > 0, 2 * X, 1 - X) + 0.3 * normal(N, seed=8)


def run(model: Model, *data: Any, options: Mapping[str, Any] | None = None, **given: Any) -> Any:
    given = {"seed": 0, "progress": False} | given
    return lvppl.EM(model, **(options or {})).fit(*data, **given)


def history(fit: Any) -> Tensor:
    return torch.as_tensor(np.asarray(fit.history["objective"]), dtype=torch.float64)


def close(actual: Any, expected: Any, atol: float) -> None:
    actual, expected = (
        torch.as_tensor(v.detach() if isinstance(v, Tensor) else v, dtype=torch.float64)
        for v in (actual, expected)
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


class Given(Messenger):
    """Parameters that are these tensors, whatever the store has."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_param(self, msg: Any) -> None:
        if msg["name"] in self.values:
            msg["value"], msg["done"], msg["stop"] = self.values[msg["name"]], True, True


def penalised(model: Model, data: tuple[Any, ...], fit: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """ln p(y, θ) at a fit's parameters, and its gradients in unconstrained coordinates.

    Latents that were maximised are conditioned upon, so that their priors are factors like others.
    """
    pyro.clear_param_store()
    trace = poutine.trace(model).get_trace(*data)
    known = pyro.get_param_store().get_state()["constraints"]
    leaves, values = {}, {}
    for name, value in fit.params.items():
        constraint = known[name] if name in known else trace.nodes[name]["fn"].support
        free = transform_to(constraint).inv(value)
        leaves[name] = free.detach().requires_grad_()
        values[name] = transform_to(constraint)(leaves[name])
    latents = set(values) - set(known)
    fixed = poutine.condition(model, data={name: values[name] for name in latents})
    with Given({name: value for name, value in values.items() if name not in latents}):
        total = lvppl.log_evidence(fixed, *data).total
    slopes = torch.autograd.grad(total, list(leaves.values()))
    return total.detach(), dict(zip(leaves, slopes, strict=True))


def assert_maximum(model: Model, *data: Any, atol: float = 5e-5, **how: str) -> Any:
    """EM climbs at each iteration, and ends where the gradient of its objective is zero."""
    fit = run(model, *data, max_iter=2000, tol=1e-14)
    climbed = history(fit)
    assert fit.status == "converged", fit.reason
    assert (climbed.diff() >= -SLACK).all()
    total, slopes = penalised(model, data, fit)
    close(climbed[-1], total, 1e-8)
    for name, slope in slopes.items():
        assert float(slope.abs().max()) < atol, (name, slope)
    found = {name: fit.m_step[name].how for name in how}
    assert found == how
    return fit


CLOSED, CONDITIONAL, GRADIENT = "closed form", "conditional", "gradient"

# ------------------------------------------------------------------------------------- families


def mixture(likelihood: Callable[..., Any], **start: tuple[Callable[..., Tensor], Any]) -> Model:
    """A mixture of two components: each argument is (kind of parameter, first value)."""

    def model(y: Tensor) -> None:
        weights = simplex("weights", [0.4, 0.6])
        params = [make(name, value) for name, (make, value) in start.items()]
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", likelihood(z, *params), obs=y)

    return model


TRIALS = dist.Multinomial(8, t([[0.1, 0.2, 0.7], [0.7, 0.2, 0.1]])[Z])
ONE_HOT = torch.eye(3, dtype=torch.float64)[labels(N * 4, 3).reshape(N, 4)]
FAMILIES: dict[str, tuple[Model, Callable[[], Tensor], dict[str, str]]] = {
    "Poisson": (
        mixture(lambda z, rate: dist.Poisson(rate[z]), rate=(positive, [1.0, 5.0])),
        lambda: COUNTS,
        {"rate": CLOSED},
    ),
    "Exponential": (
        mixture(lambda z, rate: dist.Exponential(rate[z]), rate=(positive, [1.0, 0.2])),
        lambda: WAITS,
        {"rate": CLOSED},
    ),
    "Exponential by its scale": (
        mixture(lambda z, mean: dist.Exponential(1 / mean[z]), mean=(positive, [1.0, 5.0])),
        lambda: WAITS,
        {"mean": CLOSED},
    ),
    "Gamma": (
        mixture(
            lambda z, shape, rate: dist.Gamma(shape[z], rate[z]),
            shape=(positive, [1.0, 3.0]),
            rate=(positive, [1.0, 0.5]),
        ),
        lambda: WAITS,
        {"shape": CLOSED, "rate": CLOSED},
    ),
    "Gamma of one shape": (
        mixture(
            lambda z, shape, rate: dist.Gamma(shape, rate[z]),
            shape=(positive, 2.0),
            rate=(positive, [1.0, 0.3]),
        ),
        lambda: WAITS,
        {"shape": CONDITIONAL, "rate": CONDITIONAL},
    ),
    "Gamma of one rate": (
        mixture(
            lambda z, shape, rate: dist.Gamma(shape[z], rate),
            shape=(positive, [1.0, 3.0]),
            rate=(positive, 0.3),
        ),
        lambda: WAITS,
        {"shape": CONDITIONAL, "rate": CONDITIONAL},
    ),
    "Geometric": (
        mixture(lambda z, probs: dist.Geometric(probs[z]), probs=(unit, [0.2, 0.6])),
        lambda: COUNTS,
        {"probs": CLOSED},
    ),
    "Binomial": (
        mixture(lambda z, probs: dist.Binomial(30, probs[z]), probs=(unit, [0.1, 0.4])),
        lambda: COUNTS,
        {"probs": CLOSED},
    ),
    "Multinomial": (
        mixture(
            lambda z, probs: dist.Multinomial(8, probs[z]),
            probs=(simplex, [[0.2, 0.3, 0.5], [0.5, 0.3, 0.2]]),
        ),
        TRIALS.sample,
        {"probs": CLOSED},
    ),
    "LogNormal": (
        mixture(
            lambda z, loc, scale: dist.LogNormal(loc[z], scale[z]),
            loc=(real, [-0.5, 1.5]),
            scale=(positive, [1.0, 0.8]),
        ),
        lambda: WAITS,
        {"loc": CLOSED, "scale": CLOSED},
    ),
    "OneHotCategorical": (
        mixture(
            lambda z, probs: dist.OneHotCategorical(probs[z]).to_event(1),
            probs=(simplex, [[[0.2, 0.3, 0.5]] * 4, [[0.5, 0.3, 0.2]] * 4]),
        ),
        lambda: ONE_HOT,
        {"probs": CLOSED},
    ),
    "Poisson of a log-rate": (
        mixture(lambda z, rate: dist.Poisson(rate[z].exp()), rate=(real, [0.5, 1.5])),
        lambda: COUNTS,
        {"rate": CLOSED},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_reaches_a_maximum_by_its_formula(name: str):
    model, data, how = FAMILIES[name]
    assert_maximum(model, data(), weights=CLOSED, **how)


def test_a_rate_that_two_families_share():
    """Gamma and Poisson sites of one rate: the rate is no longer the Gamma's alone to choose."""

    def model(y: Tensor) -> None:
        shape, rate = positive("shape", [1.0, 3.0]), positive("rate", [1.0, 0.3])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("wait", dist.Gamma(shape[z], rate[z]), obs=y)
            pyro.sample("count", dist.Poisson(rate[z]), obs=y.round())

    assert_maximum(model, WAITS, shape=CONDITIONAL, rate=CONDITIONAL, atol=5e-4)


def test_a_location_under_two_known_covariances():
    """Sites weigh by their precisions, also where these are constants."""

    def model(y: Tensor) -> None:
        loc = real("loc", [[-1.0, 0.0], [1.0, 0.0]])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            for i, spread in enumerate((1.0, 4.0)):
                covariance = t([[spread, 0.3], [0.3, 0.5]])
                pyro.sample(f"y_{i}", dist.MultivariateNormal(loc[z], covariance), obs=y + i)

    assert_maximum(model, PLANE, loc=CLOSED)


def test_a_gate_by_gradient_and_its_experts_in_closed_form():
    """A mixture of experts: two lines, chosen by a logistic gate."""

    def model(x: Tensor, y: Tensor) -> None:
        gate, bias = real("gate", [1.0, -1.0]), real("bias", [0.0, 0.1])
        slope, start = real("slope", [1.0, -1.0]), real("start", [0.0, 0.5])
        scale = positive("scale", [1.0, 1.0])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=gate * x.unsqueeze(-1) + bias))
            pyro.sample("y", dist.Normal(slope[z] * x + start[z], scale[z]), obs=y)

    y = torch.where(X > 0, 2 * X, 1 - X) + 0.3 * normal(N, seed=8)
    how = {"gate": GRADIENT, "bias": GRADIENT, "slope": CLOSED, "start": CLOSED, "scale": CLOSED}
    assert_maximum(model, X, y, **how)


# --------------------------------------------------------------------------------------- priors


def two_states(y: Tensor, likelihood: Callable[[Tensor], Any], weights: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", likelihood(z), obs=y)


def even() -> Tensor:
    return torch.full((2,), 0.5, dtype=torch.float64)


def normal_gamma(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(t([2.0, 3.0])))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(t([-1.0, 1.0]), t(2.0)))
        precision = pyro.sample("precision", dist.Gamma(t(2.0), t(1.0)))
    two_states(y, lambda z: dist.Normal(loc[z], precision[z].rsqrt()), weights)


def beta_bits(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(t([2.0, 3.0])))
    with pyro.plate("components", 2):
        probs = pyro.sample("probs", dist.Beta(t(2.0), t(3.0)).expand([5]).to_event(1))
    two_states(y, lambda z: dist.Bernoulli(probs[z]).to_event(1), weights)


def gamma_rate(y: Tensor) -> None:
    with pyro.plate("components", 2):
        rate = pyro.sample("rate", dist.Gamma(t(2.0), t(0.5)))
    two_states(y, lambda z: dist.Poisson(rate[z]), simplex("weights", [0.4, 0.6]))


def exponential_rate(y: Tensor) -> None:
    with pyro.plate("components", 2):
        rate = pyro.sample("rate", dist.Exponential(t([0.5, 0.1])))
    two_states(y, lambda z: dist.Poisson(rate[z]), even())


def inverse_gamma_mean(y: Tensor) -> None:
    with pyro.plate("components", 2):
        mean = pyro.sample("mean", dist.InverseGamma(t(2.0), t([3.0, 9.0])))
    two_states(y, lambda z: dist.Exponential(1 / mean[z]), even())


def inverse_gamma_variance(y: Tensor) -> None:
    loc = real("loc", [-1.0, 1.0])
    with pyro.plate("components", 2):
        variance = pyro.sample("variance", dist.InverseGamma(t(2.0), t(1.5)))
    two_states(y, lambda z: dist.Normal(loc[z], variance[z].sqrt()), simplex("weights", [0.4, 0.6]))


def normal_inverse_gamma(y: Tensor) -> None:
    with pyro.plate("components", 2):
        variance = pyro.sample("variance", dist.InverseGamma(t(2.0), t(1.5)))
        loc = pyro.sample("loc", dist.Normal(t([-1.0, 1.0]), (variance / 0.3).sqrt()))
    two_states(y, lambda z: dist.Normal(loc[z], variance[z].sqrt()), even())


def normal_inverse_wishart(y: Tensor) -> None:
    weights = pyro.sample("weights", dist.Dirichlet(t([2.0, 2.0])))
    with pyro.plate("components", 2):
        covariance = pyro.sample(
            "covariance", InverseWishart(t(5.0), torch.eye(2, dtype=torch.float64))
        )
        zero = torch.zeros(2, dtype=torch.float64)
        loc = pyro.sample("loc", dist.MultivariateNormal(zero, covariance / 0.3))
    two_states(y, lambda z: dist.MultivariateNormal(loc[z], covariance[z]), weights)


def wishart(y: Tensor) -> None:
    loc = real("loc", [[-1.0, 0.0], [1.0, 0.0]])
    with pyro.plate("components", 2):
        precision = pyro.sample("precision", dist.Wishart(t(5.0), torch.eye(2).double()))
    two_states(y, lambda z: dist.MultivariateNormal(loc[z], precision_matrix=precision[z]), even())


def known_covariance(y: Tensor) -> None:
    with pyro.plate("components", 2):
        wide = 3 * torch.eye(2, dtype=torch.float64)
        loc = pyro.sample("loc", dist.MultivariateNormal(t([0.0, 0.5]), wide))
    covariance = t([[1.0, 0.3], [0.3, 0.5]])
    two_states(y, lambda z: dist.MultivariateNormal(loc[z], covariance), even())


def vector_prior_of_elements(y: Tensor) -> None:
    scale = positive("scale", [[1.0, 1.0], [1.0, 1.0]])
    with pyro.plate("components", 2):
        covariance = t([[0.5, 0.3], [0.3, 0.5]])
        loc = pyro.sample("loc", dist.MultivariateNormal(t([-1.0, 1.0]), covariance))
    two_states(y, lambda z: dist.Normal(loc[z], scale[z]).to_event(1), even())


def element_priors_of_a_vector(y: Tensor) -> None:
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(t([-1.0, 1.0]), t(0.3)).to_event(1))
    eye = torch.eye(2, dtype=torch.float64)
    two_states(y, lambda z: dist.MultivariateNormal(loc[z], eye), even())


def lines_with_priors(x: Tensor, y: Tensor) -> None:
    weights = simplex("weights", [0.5, 0.5])
    with pyro.plate("components", 2):
        slope = pyro.sample("slope", dist.Normal(t([1.0, -1.0]), t(1.0)))
        start = pyro.sample("start", dist.Normal(t(0.0), t(2.0)))
    scale = positive("scale", [1.0, 1.0])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(slope[z] * x + start[z], scale[z]), obs=y)


def learned_prior_mean(y: Tensor) -> None:
    centre = real("centre", 0.3)
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(centre, t(2.0)))
    two_states(y, lambda z: dist.Normal(loc[z], t(1.0)), even())


def learned_prior_scale(y: Tensor) -> None:
    width = positive("width", 2.0)
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(t(0.0), width))
    two_states(y, lambda z: dist.Normal(loc[z], t(1.0)), even())


def hierarchical_scale(y: Tensor) -> None:
    # decays at 0 faster than Normal(0, width) grows there: the joint density has a maximum
    width = pyro.sample("width", dist.InverseGamma(t(2.0), t(1.0)))
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(t(0.0), width))
    two_states(y, lambda z: dist.Normal(loc[z], t(1.0)), even())


def gamma_with_a_prior_rate(y: Tensor) -> None:
    shape = positive("shape", [1.0, 3.0])
    with pyro.plate("components", 2):
        rate = pyro.sample("rate", dist.Gamma(t(20.0), t(10.0)))
    two_states(y, lambda z: dist.Gamma(shape[z], rate[z]), even())


def priors_without_formula(y: Tensor) -> None:
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Cauchy(t([-1.0, 1.0]), t(1.0)))
        scale = pyro.sample("scale", dist.LogNormal(t(0.0), t(0.5)))
    two_states(y, lambda z: dist.Normal(loc[z], scale[z]), even())


PRIORS: dict[str, tuple[Model, tuple[Tensor, ...], dict[str, str]]] = {
    "Normal and Gamma": (
        normal_gamma,
        (TWO,),
        {"weights": CLOSED, "loc": CONDITIONAL, "precision": CONDITIONAL},
    ),
    "Beta": (beta_bits, (BITS,), {"weights": CLOSED, "probs": CLOSED}),
    "Gamma of a rate": (gamma_rate, (COUNTS,), {"rate": CLOSED}),
    "Exponential of a rate": (exponential_rate, (COUNTS,), {"rate": CLOSED}),
    "InverseGamma of a mean": (inverse_gamma_mean, (WAITS,), {"mean": CLOSED}),
    "InverseGamma of a variance": (inverse_gamma_variance, (TWO,), {"variance": CLOSED}),
    "Normal-inverse-Gamma": (
        normal_inverse_gamma,
        (TWO,),
        {"variance": CLOSED, "loc": CLOSED},
    ),
    "Normal-inverse-Wishart": (
        normal_inverse_wishart,
        (PLANE,),
        {"weights": CLOSED, "covariance": CLOSED, "loc": CLOSED},
    ),
    "Wishart": (wishart, (PLANE,), {"precision": CLOSED, "loc": CLOSED}),
    "MultivariateNormal, known covariance": (known_covariance, (PLANE,), {"loc": CLOSED}),
    "MultivariateNormal of elements": (
        vector_prior_of_elements,
        (PLANE,),
        {"loc": GRADIENT, "scale": CONDITIONAL},
    ),
    "Normals of a vector": (element_priors_of_a_vector, (PLANE,), {"loc": GRADIENT}),
    "Normals of a regression": (
        lines_with_priors,
        (X, LINES),
        {"slope": CONDITIONAL, "start": CONDITIONAL, "scale": CONDITIONAL},
    ),
    "a prior whose mean is learned": (
        learned_prior_mean,
        (TWO,),
        {"centre": CONDITIONAL, "loc": GRADIENT},
    ),
    "a prior whose scale is learned": (
        learned_prior_scale,
        (TWO,),
        {"width": CONDITIONAL, "loc": CONDITIONAL},
    ),
    "a prior whose scale has a prior": (
        hierarchical_scale,
        (TWO,),
        {"width": GRADIENT, "loc": CONDITIONAL},
    ),
    "Gamma of a Gamma's rate": (
        gamma_with_a_prior_rate,
        (WAITS,),
        {"shape": CONDITIONAL, "rate": CONDITIONAL},
    ),
    "Cauchy": (priors_without_formula, (TWO,), {"loc": GRADIENT, "scale": GRADIENT}),
}


@pytest.mark.filterwarnings("ignore:Singular sample detected")
@pytest.mark.parametrize("name", PRIORS)
def test_each_prior_reaches_a_maximum_of_the_posterior_density(name: str):
    model, data, how = PRIORS[name]
    pyro.set_rng_seed(0)
    fit = assert_maximum(model, *data, **how)
    assert fit.tracked == "ln p(y) + ln p(θ)"


# --------------------------------------------------------------------- latents that are integrated


def test_student_t_by_its_scale_mixture():
    """A Normal whose precision is Gamma: ln p(y) is that of Student-t densities, exactly."""
    nu = 4.0

    def model(y: Tensor) -> None:
        weights, loc = simplex("weights", [0.4, 0.6]), real("loc", [-1.0, 2.0])
        scale = positive("scale", [1.0, 1.0])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            precision = pyro.sample("precision", dist.Gamma(t(nu / 2), t(nu / 2)))
            pyro.sample("y", dist.Normal(loc[z], scale[z] / precision.sqrt()), obs=y)

    seen: list[Mapping[str, Tensor]] = []
    fit = run(model, TWO, max_iter=15, tol=0.0, callbacks=[lambda f: seen.append(f.params)])
    start = {"weights": t([0.4, 0.6]), "loc": t([-1.0, 2.0]), "scale": t([1.0, 1.0])}
    expected = []
    for params in [start, *seen]:
        density = dist.StudentT(nu, params["loc"], params["scale"]).log_prob(TWO[:, None])
        expected.append((density + params["weights"].log()).logsumexp(-1).sum())
    close(history(fit), torch.stack(expected), 1e-9)
    assert (history(fit).diff() >= -SLACK).all()
    assert {step.how for step in fit.m_step.values()} == {CLOSED}


def factors(loadings: Tensor) -> Model:
    def model(y: Tensor) -> None:
        W = pyro.param("W", lambda: loadings.clone())
        mean = pyro.param("mean", lambda: y.mean(0))
        scale = positive("scale", [1.0] * y.shape[1])
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(y.new_zeros(len(W)), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(u @ W + mean, scale).to_event(1), obs=y)

    return model


def test_factor_analysis_reaches_the_likelihood_of_scikit_learn():
    """Two factors of six features: to 1e-4 nats a datum in 1,000 iterations."""
    y = normal(150, 2, seed=1) @ normal(2, 6, seed=2) + 0.6 * normal(150, 6, seed=3)
    peer = FactorAnalysis(2, tol=1e-12, max_iter=20_000, svd_method="lapack").fit(y.numpy())
    fit = run(factors(normal(2, 6, seed=4)), y, max_iter=1000, tol=1e-10)
    assert (history(fit).diff() >= -1e-8).all()
    assert {step.how for step in fit.m_step.values()} == {CLOSED}
    close(history(fit)[-1] / len(y), peer.score(y.numpy()), 1e-4)
    W, scale = fit.params["W"], fit.params["scale"]
    close(W.mT @ W + torch.diag(scale**2), peer.get_covariance(), 0.02)


def test_a_mixture_of_factor_analysers_has_the_evidence_of_its_gaussians():
    """ln p(y) = ln Σ_k π_k N(y | μ_k, W_kᵀ W_k + Ψ) at each iteration."""

    def model(y: Tensor) -> None:
        W = pyro.param("W", lambda: normal(2, 2, 4, seed=5))
        mean = real("mean", [[-1.0] * 4, [1.0] * 4])
        scale, weights = positive("scale", [1.0] * 4), simplex("weights", [0.4, 0.6])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            u = pyro.sample("u", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
            loc = (u.unsqueeze(-2) @ W[z]).squeeze(-2) + mean[z]
            pyro.sample("y", dist.Normal(loc, scale).to_event(1), obs=y)

    y = normal(80, 2, seed=1) @ normal(2, 4, seed=2) + 0.4 * normal(80, 4, seed=3)
    y = y + 2.0 * (labels(80)[:, None] * 2 - 1)
    seen: list[Any] = []
    fit = run(model, y, max_iter=10, tol=0.0, callbacks=[lambda f: seen.append(f.params)])
    expected = []
    for params in seen:
        covariance = params["W"].mT @ params["W"] + torch.diag(params["scale"] ** 2)
        density = dist.MultivariateNormal(params["mean"], covariance).log_prob(y[:, None])
        expected.append((density + params["weights"].log()).logsumexp(-1).sum())
    close(history(fit)[1:], torch.stack(expected), 1e-7)
    assert (history(fit).diff() >= -1e-8).all()
    assert float(history(fit)[-1] - history(fit)[0]) > 10


# ------------------------------------------------------------------------------- missing values


def diagonal(y: Tensor) -> None:
    weights, scale = simplex("weights", [0.4, 0.6]), positive("scale", [[1.0, 2.0], [1.5, 1.0]])
    loc = real("loc", [[-1.0, 0.0], [1.0, 0.5]])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], scale[z]).to_event(1), obs=y)


def bits(y: Tensor) -> None:
    weights = simplex("weights", [0.4, 0.6])
    probs = unit("probs", [[0.3] * 5, [0.6] * 5])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Bernoulli(probs[z]).to_event(1), obs=y)


def with_holes(y: Tensor) -> Tensor:
    """A fifth of the values are missing, and all of row 3."""
    holes = torch.rand(y.shape, generator=generator(9)) < 0.2
    holes[3] = True
    return torch.where(holes, math.nan, y)


def by_hand(params: Mapping[str, Tensor], y: Tensor) -> Tensor:
    """ln p of what was observed, by datum: the factors of what was not are left out."""
    seen, filled = ~y.isnan(), y.nan_to_num(0.0)
    if "probs" in params:
        each = dist.Bernoulli(params["probs"]).log_prob(filled[:, None])
    else:
        each = dist.Normal(params["loc"], params["scale"]).log_prob(filled[:, None])
    joint = torch.where(seen[:, None], each, 0.0).sum(-1) + params["weights"].log()
    return joint.logsumexp(-1)


HOLES = {"Gaussian": (diagonal, with_holes(PLANE)), "Bernoulli": (bits, with_holes(BITS))}


@pytest.mark.parametrize("name", HOLES)
def test_missing_values_leave_the_likelihood(name: str):
    model, y = HOLES[name]
    seen: list[Any] = []
    fit = run(
        model, y, missing="nan", max_iter=8, tol=0.0, callbacks=[lambda f: seen.append(f.params)]
    )
    expected = torch.stack([by_hand(params, y).sum() for params in seen])
    close(history(fit)[1:], expected, 1e-9)
    assert (history(fit).diff() >= -SLACK).all()
    close(fit.log_evidence(y).per_datum, by_hand(fit.params, y), 1e-10)
    # a datum of which nothing is known is as the prior has it, and adds nothing
    close(fit.log_evidence(y).per_datum[3], 0.0, 1e-12)
    close(fit.posterior(y).marginals("z")[3], fit.params["weights"], 1e-12)


@pytest.mark.parametrize("name", HOLES)
def test_maxima_with_missing_values_are_those_of_the_observed(name: str):
    """The gradient of what is left of ln p(y) is zero: a filler's pull would show here."""
    model, y = HOLES[name]
    fit = run(model, y, missing="nan", max_iter=3000, tol=1e-12)
    assert fit.status == "converged", fit.reason
    kinds = {
        "weights": constraints.simplex,
        "loc": constraints.real,
        "scale": constraints.positive,
        "probs": constraints.unit_interval,
    }
    free = {n: transform_to(kinds[n]).inv(v).requires_grad_() for n, v in fit.params.items()}
    total = by_hand({n: transform_to(kinds[n])(v) for n, v in free.items()}, y).sum()
    for slope in torch.autograd.grad(total, list(free.values())):
        assert float(slope.abs().max()) < 5e-5


def test_batches_with_missing_values_change_nothing():
    model, y = HOLES["Gaussian"]
    whole = run(model, y, missing="nan", max_iter=5, tol=0.0)
    parts = run(model, y, missing="nan", max_iter=5, tol=0.0, batch_size=7)
    close(history(parts), history(whole), 1e-9)


def test_a_vector_can_be_missing_as_a_whole_only():
    def model(y: Tensor) -> None:
        loc = real("loc", [[-1.0, 0.0], [1.0, 0.0]])
        two_states(y, lambda z: dist.MultivariateNormal(loc[z], torch.eye(2).double()), even())

    rows = PLANE.clone()
    rows[4] = math.nan
    fit = run(model, rows, missing="nan", max_iter=20)
    kept = run(model, PLANE[torch.arange(N) != 4], max_iter=20)
    close(fit.params["loc"], kept.params["loc"], 1e-4)
    rows[5, 0] = math.nan
    with pytest.raises(lvppl.ProgramError, match="miss a part of an event of MultivariateNormal"):
        run(model, rows, missing="nan")


# ----------------------------------------------------------------- floors, and dead components


def gaussian(kind: str, loc: Any, scale: Any = 1.0) -> Model:
    """A mixture over vectors with full or diagonal covariances."""
    start = t(loc)
    K, D = start.shape

    def model(y: Tensor) -> None:
        weights = simplex("weights", [1 / K] * K)
        loc = pyro.param("loc", lambda: start.clone())
        if kind == "full":
            first = scale * torch.eye(D, dtype=torch.float64).expand(K, D, D)
            tril = pyro.param("tril", first.clone(), constraint=constraints.lower_cholesky)
        else:
            each = pyro.param(
                "scale", scale * torch.ones_like(start), constraint=constraints.positive
            )
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            if kind == "full":
                pyro.sample("y", dist.MultivariateNormal(loc[z], scale_tril=tril[z]), obs=y)
            else:
                pyro.sample("y", dist.Normal(loc[z], each[z]).to_event(1), obs=y)

    return model


def covariances(fit: Any) -> Tensor:
    if "tril" in fit.params:
        return fit.params["tril"] @ fit.params["tril"].mT
    return torch.diag_embed(fit.params["scale"] ** 2)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
@pytest.mark.parametrize("batch_size", [None, 7])
def test_a_constant_feature_rests_on_the_floor(kind: str, batch_size: int | None):
    """Its variance is the floor times the mean variance of the other features."""
    y = torch.cat([PLANE, torch.full((N, 1), 5.0, dtype=torch.float64)], 1)
    model = gaussian(kind, [[-2.0, 0.0, 5.0], [2.0, 1.0, 5.0]])
    fit = run(model, y, options={"floor": 1e-4}, max_iter=30, tol=0.0, batch_size=batch_size)
    assert (history(fit).diff() >= -SLACK).all()
    expected = 1e-4 * float(PLANE.var(0, correction=0).mean())
    close(covariances(fit)[:, 2, 2], [expected, expected], 1e-9)
    # the others are those of a fit without it
    alone = run(gaussian(kind, [[-2.0, 0.0], [2.0, 1.0]]), PLANE, max_iter=30, tol=0.0)
    close(covariances(fit)[:, :2, :2], covariances(alone), 1e-6)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_the_floor_follows_the_units_of_each_feature(kind: str):
    """A feature in other units, or far from the others, has the same floor in its own units."""
    units, offset = t([1.0, 1e-4]), t([0.0, 1e3])
    start = t([[-2.0, 0.0], [2.0, 1.0]])
    options = {"floor": 0.05}
    plain = run(gaussian(kind, start.tolist()), PLANE, options=options, max_iter=25, tol=0.0)
    moved = (start * units + offset).tolist()
    other = gaussian(kind, moved, units if kind == "diagonal" else torch.diag(units))
    fit = run(other, PLANE * units + offset, options=options, max_iter=25, tol=0.0)
    close(covariances(fit) / (units[:, None] * units), covariances(plain), 1e-5)
    close(history(fit) + N * float(units.log().sum()), history(plain), 1e-5)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_components_on_duplicates_rest_on_the_floor(kind: str):
    y = t([[0.0, 0.0]] * 5 + [[3.0, 1.0]] * 7)
    fit = run(gaussian(kind, [[0.0, 0.0], [3.0, 1.0]]), y, options={"floor": 1e-3}, max_iter=30)
    floor = 1e-3 * y.var(0, correction=0)
    assert (history(fit).diff() >= -SLACK).all()
    close(covariances(fit).diagonal(dim1=-2, dim2=-1), floor.expand(2, 2), 1e-10)
    close(fit.params["weights"], [5 / 12, 7 / 12], 1e-9)


def test_one_datum_and_more_components_than_data_have_a_floor():
    for y in (t([[2.0, -1.0]]), t([[0.0, 0.0], [3.0, 1.0]])):
        start = [[0.0, 0.0], [1.0, 1.0], [3.0, 1.0]]
        fit = run(gaussian("diagonal", start), y, max_iter=20)
        assert history(fit).isfinite().all()
        assert all(value.isfinite().all() for value in fit.params.values())


def test_without_a_floor_a_component_shrinks_onto_its_datum():
    """The likelihood has no bound: the fit must not call that a maximum."""
    y = torch.cat([TWO, t([40.0])]).unsqueeze(-1)
    start = [[0.0], [40.0]]
    floored = run(gaussian("diagonal", start), y, options={"floor": 1e-4}, max_iter=50)
    variance = float(y.var(correction=0))
    close(covariances(floored)[1, 0, 0], 1e-4 * variance, 1e-12)
    free = run(gaussian("diagonal", start), y, options={"floor": 0.0}, max_iter=50)
    assert free.status == "diverged" and "floor" in free.reason, free.reason
    assert all(value.isfinite().all() for value in free.params.values())
    close(float(free.log_evidence(y)), history(free)[-1], 1e-9)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_a_dead_component_starts_again_where_it_is_needed(kind: str):
    """Started a thousand away from all data it comes back, to the likelihood of a good start."""
    good = run(gaussian(kind, [[-2.0, 0.0], [2.0, 1.0]]), PLANE, max_iter=500, tol=1e-12)
    dead = run(gaussian(kind, [[0.0, 0.0], [1e3, 1e3]]), PLANE, max_iter=500, tol=1e-12)
    close(history(dead)[-1], history(good)[-1], 1e-6)
    assert "component 1 of 'loc'" in dead.reason
    assert "component" not in good.reason


def test_a_component_that_loses_all_data_keeps_its_rate():
    """A family without a place to start again at: no NaN, and the others are undisturbed."""
    y = COUNTS + 50
    model = mixture(lambda z, rate: dist.Poisson(rate[z]), rate=(positive, [50.0, 1e-3]))
    fit = run(model, y, max_iter=30)
    assert all(value.isfinite().all() for value in fit.params.values())
    close(fit.params["rate"][0], y.mean(), 1e-9)
    close(fit.params["weights"], [1.0, 0.0], 1e-9)


def test_a_rate_of_zero_is_a_maximum():
    y = torch.cat([torch.zeros(30), torch.full((30,), 9.0)]).double()
    model = mixture(lambda z, rate: dist.Poisson(rate[z]), rate=(positive, [0.1, 5.0]))
    fit = run(model, y, max_iter=200, tol=1e-12)
    assert (history(fit).diff() >= -SLACK).all()
    assert float(fit.params["rate"][0]) < 1e-2
    close(fit.params["rate"][1], 9.0, 1e-2)


# ------------------------------------------------------------------- online, batches, precision


def separated(count: int) -> Tensor:
    z = torch.randint(3, (count,), generator=generator(11))
    return normal(count, 2, seed=12) + t([[-6.0, 0.0], [0.0, 6.0], [6.0, 0.0]])[z]


def test_online_em_ends_near_batch_em():
    """600 data, three clusters six deviations apart, ten passes: parameters to 0.05 deviations,
    evidence to 0.01 nats a datum."""
    y = separated(600)
    model = gaussian("diagonal", [[-4.0, 1.0], [1.0, 4.0], [4.0, 1.0]])
    batch = run(model, y, max_iter=100, tol=1e-10)
    online = run(model, y, options={"online": True}, max_iter=10, batch_size=50)
    close(online.params["loc"], batch.params["loc"], 0.05)
    close(online.params["scale"], batch.params["scale"], 0.05)
    close(online.params["weights"], batch.params["weights"], 0.02)
    evidence = float(online.log_evidence(y))
    close(evidence / len(y), history(batch)[-1] / len(y), 0.01)


def test_online_em_of_bits_ends_near_batch_em():
    """Statistics by entry rather than by moments: probabilities to 0.03, 0.01 nats a datum."""
    z = torch.randint(2, (600,), generator=generator(13))
    chance = torch.rand(600, 12, generator=generator(14), dtype=torch.float64)
    y = (chance < t([0.15, 0.8])[z][:, None]).double()

    def model(y: Tensor) -> None:
        weights, probs = simplex("weights", [0.5, 0.5]), unit("probs", [[0.4] * 12, [0.6] * 12])
        two_states(y, lambda z: dist.Bernoulli(probs[z]).to_event(1), weights)

    batch = run(model, y, max_iter=100, tol=1e-10)
    online = run(model, y, options={"online": True}, max_iter=10, batch_size=50)
    close(online.params["probs"], batch.params["probs"], 0.03)
    close(float(online.log_evidence(y)) / 600, history(batch)[-1] / 600, 0.01)


def test_online_em_repeats_with_its_seed():
    y, model = separated(120), gaussian("diagonal", [[-4.0, 1.0], [1.0, 4.0], [4.0, 1.0]])

    def once(seed: int) -> Tensor:
        options = {"online": True}
        return run(model, y, options=options, max_iter=2, batch_size=30, seed=seed).params["loc"]

    assert torch.equal(once(1), once(1))
    assert not torch.equal(once(1), once(2))


@pytest.mark.parametrize("batch_size", [1, 7, 59, 60])
def test_batches_give_the_answer_of_all_rows(batch_size: int):
    """Sorted rows: a batch is unlike the whole, and the floor must not be a batch's own."""
    y = t(sorted(TWO.tolist())).unsqueeze(-1)
    model = gaussian("diagonal", [[-1.0], [1.0]])
    options = {"floor": 0.1}  # above the variance of either cluster: it acts
    whole = run(model, y, options=options, max_iter=6, tol=0.0)
    parts = run(model, y, options=options, max_iter=6, tol=0.0, batch_size=batch_size)
    close(history(parts), history(whole), 1e-8)
    for name, value in whole.params.items():
        close(parts.params[name], value, 1e-8)


def test_float32_keeps_its_precision_and_finds_the_same_maximum():
    def model(y: Tensor) -> None:
        like = {"dtype": y.dtype}
        weights = pyro.param("weights", torch.tensor([0.4, 0.6], **like), constraints.simplex)
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0], **like))
        scale = pyro.param("scale", torch.ones(2, **like), constraint=constraints.positive)
        two_states(y, lambda z: dist.Normal(loc[z], scale[z]), weights)

    single = run(model, TWO.float(), max_iter=100)
    pyro.clear_param_store()
    double = run(model, TWO, max_iter=100)
    assert single.status == "converged", single.reason
    for name, value in single.params.items():
        assert value.dtype == torch.float32
        close(value, double.params[name], 1e-2)
    close(history(single)[-1], history(double)[-1], 1e-2)


@pytest.mark.parametrize("chain", [False, True])
def test_columns_may_share_one_location(chain: bool):
    """A location that is expanded over columns is one parameter: all of them count."""
    y = separated(60).reshape(5, 12, 2) if chain else separated(60)

    def model(y: Tensor) -> None:
        loc, scale = real("loc", [-3.0, 3.0]), positive("scale", [2.0, 2.0])
        with pyro.plate("data", len(y)):
            if chain:
                each = dist.Normal(loc.unsqueeze(-1), scale.unsqueeze(-1)).expand([2, 2])
                flat = torch.zeros(2, 2, dtype=torch.float64)
                pyro.sample("y", HiddenMarkov(flat[0], flat, each.to_event(1)), obs=y)
            else:
                z = pyro.sample("z", dist.Categorical(even()))
                each = dist.Normal(loc[z].unsqueeze(-1), scale[z].unsqueeze(-1))
                pyro.sample("y", each.expand([*z.shape, 2]).to_event(1), obs=y)

    fit = run(model, y, max_iter=1, tol=0.0)
    # with even transitions both are the same mixture
    each = dist.Normal(t([-3.0, 3.0]), t(2.0)).log_prob(y.reshape(-1, 2, 1)).sum(1)
    r = each.softmax(-1)
    expected = (r * y.reshape(-1, 2).mean(1, keepdim=True)).sum(0) / r.sum(0)
    close(fit.params["loc"], expected, 1e-10)
    close(history(fit)[0], (each - math.log(2)).logsumexp(-1).sum(), 1e-9)


def test_whole_numbers_are_data_of_a_gaussian_too():
    model = mixture(
        lambda z, loc: dist.Normal(loc[z], t(1.0)),
        loc=(real, [0.0, 5.0]),
    )
    y = TWO.round()
    whole, real_numbers = run(model, y.long(), max_iter=5), run(model, y, max_iter=5)
    close(whole.params["loc"], real_numbers.params["loc"], 1e-12)


def test_probabilities_that_do_not_sum_to_one_are_normalised_as_in_pyro():
    """dist.Categorical divides by the sum, and so does a simplex parameter."""

    def model(total: float) -> Model:
        def program(y: Tensor) -> None:
            weights = simplex("weights", [0.4 * total, 0.6 * total])
            loc = real("loc", [-1.0, 1.0])
            with pyro.plate("data", len(y)):
                z = pyro.sample("z", dist.Categorical(weights))
                x = pyro.sample("x", dist.Categorical(t([0.3 * total, 0.7 * total])))
                pyro.sample("y", dist.Normal(loc[z] + x, t(1.0)), obs=y)

        return program

    fits = [run(model(total), TWO, max_iter=4, tol=0.0) for total in (1.0, 1.7)]
    close(history(fits[1]), history(fits[0]), 1e-10)


def test_annealing_ends_near_the_hard_solution():
    """From a temperature of 2 down to 0.02: centres to 1e-3 of those of hard EM from there."""
    y = separated(90)
    model = gaussian("diagonal", [[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    schedule = lambda iteration: max(0.02, 2.0 * 0.8**iteration)  # noqa: E731
    fit = run(model, y, options={"temperature": schedule}, max_iter=60, tol=0.0)
    assert fit.settings["temperature"] == 0.02
    found = fit.params["loc"]
    hard = run(gaussian("diagonal", found.tolist()), y, options={"hard": True}, max_iter=60)
    close(found, hard.params["loc"], 1e-3)
    close(history(fit)[-1], history(hard)[-1], 0.5)
    assert "H(q)" in fit.tracked


# ------------------------------------------------------------------------------ how a run goes


def overlapping(y: Tensor) -> None:
    weights, loc = simplex("weights", [0.4, 0.6]), real("loc", [-1.0, 1.0])
    scale = positive("scale", [1.0, 1.0])
    two_states(y, lambda z: dist.Normal(loc[z], scale[z]), weights)


def test_callbacks_see_each_iteration():
    seen: list[tuple[int, str, float]] = []

    def watch(fit: Any) -> None:
        seen.append((fit.num_steps, fit.status, fit.objective_value))
        # a fit in progress answers as a finished one does
        close(float(fit.log_evidence(TWO)), now(fit), 1e-9)

    def now(fit: Any) -> Tensor:
        density = dist.Normal(fit.params["loc"], fit.params["scale"]).log_prob(TWO[:, None])
        return (density + fit.params["weights"].log()).logsumexp(-1).sum()

    fit = run(overlapping, TWO, max_iter=4, tol=0.0, callbacks=[watch])
    assert [entry[:2] for entry in seen] == [(i, "running") for i in range(1, 5)]
    close([entry[2] for entry in seen], history(fit)[1:5], 1e-9)
    assert fit.status == "max_steps"


def test_a_callback_ends_a_fit_by_stop_iteration():
    def enough(fit: Any) -> None:
        if fit.num_steps == 3:
            raise StopIteration("far enough")

    fit = run(overlapping, TWO, max_iter=50, tol=0.0, callbacks=[enough])
    assert (fit.status, fit.num_steps) == ("interrupted", 3)
    assert "enough" in fit.reason and "far enough" in fit.reason
    three = run(overlapping, TWO, max_iter=3, tol=0.0)
    close(history(fit), history(three), 0)
    for name, value in three.params.items():
        close(fit.params[name], value, 0)


def test_an_interrupt_keeps_what_was_reached():
    def interrupt(fit: Any) -> None:
        if fit.num_steps == 2:
            raise KeyboardInterrupt

    options = {"init": "kmeans++", "restarts": 3}
    fit = run(overlapping, TWO, options=options, max_iter=50, tol=0.0, callbacks=[interrupt])
    assert fit.status == "interrupted" and "2 iterations" in fit.reason
    assert len(fit.restarts) == 1  # the other starts are not made
    whole = run(overlapping, TWO, options={"init": "kmeans++"}, max_iter=2, tol=0.0)
    for name, value in whole.params.items():
        close(fit.params[name], value, 0)


def test_fits_inside_each_other_do_not_meet():
    """A fit run in the callback of another, of the same parameter names."""
    alone = run(overlapping, TWO, max_iter=4, tol=0.0)
    other_alone = run(overlapping, TWO + 1, max_iter=2, tol=0.0)
    inner: list[Any] = []

    def meanwhile(fit: Any) -> None:
        inner.append(run(overlapping, TWO + 1, max_iter=2, tol=0.0))

    outer = run(overlapping, TWO, max_iter=4, tol=0.0, callbacks=[meanwhile])
    close(history(outer), history(alone), 0)
    for fit in inner:
        close(history(fit), history(other_alone), 0)
        for name, value in other_alone.params.items():
            close(fit.params[name], value, 0)


class Mixture(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.weights = PyroParam(t([0.4, 0.6]), constraint=constraints.simplex)
        self.loc = PyroParam(t([-1.0, 1.0]))
        self.scale = PyroParam(t([1.0, 1.0]), constraint=constraints.positive)

    def forward(self, y: Tensor) -> None:
        weights, loc, scale = self.weights, self.loc, self.scale
        two_states(y, lambda z: dist.Normal(loc[z], scale[z]), weights)


def test_a_module_and_a_function_have_the_same_fit():
    module = Mixture()
    fit = run(module, TWO, max_iter=7, tol=0.0)
    plain = run(overlapping, TWO, max_iter=7, tol=0.0)
    close(history(fit), history(plain), 1e-10)
    for name, value in plain.params.items():
        close(fit.params[name], value, 1e-10)
        close(getattr(module, name), value, 1e-10)  # the fit leaves its values in the module


@pytest.mark.parametrize("options", [{}, {"init": "kmeans++", "restarts": 2}, {"init": "random"}])
def test_the_same_seed_is_the_same_fit(options: dict[str, Any]):
    first, second = (run(overlapping, TWO, options=options, max_iter=5, seed=4) for _ in range(2))
    assert torch.equal(history(first), history(second))


def live_bytes() -> int:
    """Of all tensors that are referred to now."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_memory_stays_flat_where_batches_stream():
    """Ten times the rows at one batch size: what is alive beside the data does not grow tenfold."""
    model = gaussian("diagonal", [[-4.0, 1.0], [1.0, 4.0], [4.0, 1.0]])

    def beside(count: int) -> int:
        y = separated(count)
        before, most = live_bytes(), 0

        def look(fit: Any) -> None:
            nonlocal most
            most = max(most, live_bytes() - before)

        run(model, y, max_iter=2, tol=0.0, batch_size=500, callbacks=[look])
        return most - y.nbytes  # the batches are a copy of the rows

    small, large = beside(1_000), beside(10_000)
    assert large < small + 200_000

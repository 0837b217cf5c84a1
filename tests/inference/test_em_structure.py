"""EM of programs whose structure is out of the ordinary ends where the gradient of ln p is zero."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

import lvppl
from lvppl.distributions import HiddenMarkov
from lvppl.models import GaussianMixture

t = torch.tensor


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.set_default_dtype(torch.float64)


def simplex(name: str, value: Any) -> Tensor:
    return pyro.param(name, lambda: t(value), constraint=constraints.simplex)


def positive(name: str, value: Any) -> Tensor:
    return pyro.param(name, lambda: t(value), constraint=constraints.positive)


def real(name: str, value: Any) -> Tensor:
    return pyro.param(name, lambda: t(value))


def fitted(model: Callable[..., Any], *data: Any, iterations: int = 300, **options: Any) -> Any:
    batch_size = options.pop("batch_size", None)
    fit = lvppl.EM(model, **options).fit(
        *data, max_iter=iterations, tol=0.0, seed=0, batch_size=batch_size, progress=False
    )
    history = fit.history["objective"]
    assert fit.status == "max_steps", fit.reason
    assert (history[1:] - history[:-1] >= -1e-9).all()
    return fit


def slopes(fit: Any, model: Callable[..., Any], *data: Any) -> dict[str, float]:
    """Largest derivative of ln p(y) in each unconstrained parameter."""
    with fit.active(), torch.enable_grad():
        total = lvppl.log_evidence(model, *data).total
        named = dict(pyro.get_param_store().named_parameters())
        grads = torch.autograd.grad(total, list(named.values()))
    return {name: float(g.abs().max()) for name, g in zip(named, grads, strict=True)}


# EM and the L-BFGS steps inside it converge linearly: a slope in nats per unit of an unconstrained
# parameter below these tolerances is a distance to the maximum of about tolerance / number of data.
def assert_stationary(fit: Any, model: Callable[..., Any], *data: Any, atol: float = 1e-4) -> None:
    found = slopes(fit, model, *data)
    assert max(found.values()) < atol, (found, fit.m_step)


def series(sequences: int = 5, steps: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    levels = t([-1.0, 1.5])[(torch.rand(sequences, steps, generator=generator) < 0.4).long()]
    return levels + 0.5 * torch.randn(sequences, steps, generator=generator)


# ------------------------------------------------------------------------------ chains in programs


def chain(A: Tensor, loc: Tensor) -> HiddenMarkov:
    return HiddenMarkov(t([0.5, 0.5]).log(), A.log(), dist.Normal(loc, 0.5), num_steps=20)


@pytest.mark.parametrize("around", ["nothing", "scale", "mask"])
def test_a_shared_transition_under_weights_of_each_sequence(around: str) -> None:
    y = series()
    handlers = {
        "nothing": poutine.scale(scale=1.0),
        "scale": poutine.scale(scale=torch.ones(5)),
        "mask": poutine.mask(mask=torch.ones(5, dtype=torch.bool)),
    }

    def model(y: Tensor) -> None:
        A = simplex("A", [[0.7, 0.3], [0.2, 0.8]])
        loc = real("loc", [-0.5, 1.0])
        with pyro.plate("data", len(y)), handlers[around]:
            pyro.sample("y", chain(A, loc), obs=y)

    fit = fitted(model, y, iterations=60)
    assert fit.m_step["A"].how == "closed form"
    with fit.active(), torch.enable_grad():
        A, loc = (pyro.get_param_store()[name] for name in ("A", "loc"))
        total = chain(A, loc).log_prob(y).sum()
        leaves = dict(pyro.get_param_store().named_parameters())
        for slope in torch.autograd.grad(total, list(leaves.values())):
            assert float(slope.abs().max()) < 1e-3
    assert float(fit.history["objective"][-1]) == pytest.approx(float(total.detach()), abs=1e-9)


def test_a_mixture_of_chains() -> None:
    y = torch.cat([series(), series().flip(1) + 0.3])

    def model(y: Tensor) -> None:
        weights, A = simplex("weights", [0.4, 0.6]), simplex("A", [[0.7, 0.3], [0.2, 0.8]])
        loc = real("loc", [[-0.5, 1.0], [-0.2, 1.6]])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            initial = t([0.5, 0.5]).log().expand(*z.shape, 2)
            emission = dist.Normal(loc[z], 0.5)
            pyro.sample("y", HiddenMarkov(initial, A.log(), emission, num_steps=20), obs=y)

    fit = fitted(model, y, iterations=400)
    assert fit.m_step["A"].how == "closed form"
    assert_stationary(fit, model, y, atol=1e-2)


def test_hard_assignments_inside_and_outside_are_one_maximum() -> None:
    y = t([-1.2, 0.1, 0.8, 2.5, 3.1])
    weights, inner = t([0.4, 0.6]), t([[0.3, 0.7], [0.9, 0.1]])
    loc, scale = t([[-1.0, 0.5], [1.0, 3.0]]), t([[0.3, 1.0], [0.5, 0.4]])

    def model(y: Tensor) -> None:
        shift = real("shift", 0.0)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            mixture = dist.MixtureSameFamily(
                dist.Categorical(inner[z]), dist.Normal(loc[z] + shift, scale[z])
            )
            pyro.sample("y", mixture, obs=y)

    terms = torch.stack(
        [
            weights[i].log() + inner[i, j].log() + dist.Normal(loc[i, j], scale[i, j]).log_prob(y)
            for i, j in itertools.product(range(2), repeat=2)
        ]
    )
    hard = lvppl.EM(model, hard=True).fit(y, max_iter=1, tol=0.0, progress=False)
    assert hard.history["objective"][0] == pytest.approx(float(terms.amax(0).sum()), abs=1e-10)
    for T in (0.5, 3.0):
        fit = lvppl.EM(model, temperature=T).fit(y, max_iter=5, tol=0.0, progress=False)
        expected = float((T * (terms / T).logsumexp(0)).sum())
        assert fit.history["objective"][0] == pytest.approx(expected, abs=1e-10)
        assert (fit.history["objective"][1:] >= fit.history["objective"][:-1] - 1e-9).all()


# ----------------------------------------------------------------------- vectors and their factors


def repeated(mu: Tensor) -> Tensor:
    return mu.unsqueeze(-1) * torch.ones(2)


def scaled(mu: Tensor) -> Tensor:
    return torch.stack([mu, mu + 1], -1) * t([1.0, 2.0])


def partly_constant(mu: Tensor) -> Tensor:
    return torch.stack([mu, torch.zeros_like(mu)], -1)


@pytest.mark.parametrize("vector", [repeated, scaled, partly_constant])
def test_locations_that_no_formula_fits_climb(vector: Callable[[Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(60, 2, generator=generator) @ t([[1.0, 0.4], [0.0, 0.6]])
    y = y + vector(t([-2.0, 2.0]))[(torch.rand(60, generator=generator) < 0.5).long()]

    def model(y: Tensor) -> None:
        mu, weights = real("mu", [-1.0, 1.3]), simplex("weights", [0.5, 0.5])
        tril = pyro.param("tril", torch.eye(2), constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.MultivariateNormal(vector(mu[z]), scale_tril=tril), obs=y)

    fit = fitted(model, y)
    assert fit.m_step["mu"].how == "gradient"
    assert fit.m_step["tril"].how == "conditional"
    assert_stationary(fit, model, y, atol=1e-2)


def test_data_that_a_parameter_moves() -> None:
    y = torch.cat([series().flatten(), 2 + series().flatten()])

    def model(y: Tensor) -> None:
        scale, shift = positive("scale", [0.5, 2.0]), real("shift", 0.3)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("y", dist.Normal(0.0, scale[z]), obs=y - shift)

    fit = fitted(model, y, iterations=200)
    assert fit.m_step["shift"].how == "gradient"
    assert_stationary(fit, model, y, atol=2e-2)


def test_a_copied_model_has_the_same_formulas() -> None:
    y = torch.randn(50, 2)
    model = GaussianMixture.from_data(y, 2).double()
    for program in (model, copy.deepcopy(model)):
        fit = lvppl.EM(program).fit(y, max_iter=2, tol=0.0, progress=False)
        assert {step.how for step in fit.m_step.values()} == {"closed form"}


# -------------------------------------------------------------------------- batches, masks, priors


def test_parameters_of_later_batches_are_found() -> None:
    x = torch.linspace(-1, 1, 80)
    y = torch.where(x > 0, 2.0, -1.0) + 0.3 * torch.randn(80)

    def model(x: Tensor, y: Tensor) -> None:
        a, b = real("a", [0.5, 1.0]), real("b", [-0.5, 0.2])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            mean = torch.where(x > 0, a[z], b[z])
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    whole, batches = (
        fitted(model, x, y, iterations=30),
        fitted(model, x, y, iterations=30, batch_size=20),
    )
    for name in ("a", "b"):
        assert batches.m_step[name].how == "closed form"
        torch.testing.assert_close(batches.params[name], whole.params[name], rtol=0, atol=1e-9)


def test_the_tracked_value_has_the_prior_at_the_present_parameters() -> None:
    x = torch.stack([torch.ones(60), torch.linspace(-1, 1, 60)], -1)
    y = x @ t([1.0, 2.0]) + 0.3 * torch.randn(60)
    prior = dist.Dirichlet(t([2.0, 3.0]))

    def model(x: Tensor, y: Tensor) -> None:
        weights = pyro.sample("weights", prior)
        slopes = real("slopes", [[0.5, 1.0], [1.5, -1.0]])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal((x * slopes[z]).sum(-1), 0.5), obs=y)

    fit = fitted(model, x, y, iterations=5, batch_size=15)
    expected = float(fit.log_evidence(x, y)) + float(prior.log_prob(fit.params["weights"]))
    assert fit.history["objective"][-1] == pytest.approx(expected, abs=1e-9)


def test_priors_of_many_rows() -> None:
    y = torch.cat([torch.randn(2500) - 2, torch.randn(2500) + 2])

    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.5, 0.5])))
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    fit = fitted(model, y, iterations=40)
    loc = fit.params["loc"].requires_grad_()
    given = poutine.condition(model, {"loc": loc})
    total = lvppl.log_evidence(given, y).total
    (slope,) = torch.autograd.grad(total, loc)  # the conditioned program has ln p(loc) in it
    assert float(slope.abs().max()) < 1e-3


def test_a_parameter_of_each_row_cannot_be_shared_by_batches() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("groups", len(y), dim=-2):
            level = pyro.sample("level", dist.Normal(0.0, 10.0))
            with pyro.plate("items", y.shape[1], dim=-1):
                z = pyro.sample("z", dist.Categorical(t([0.5, 0.5])))
                pyro.sample("y", dist.Normal(level + t([-1.0, 1.0])[z], 1.0), obs=y)

    y = torch.randn(4, 6)
    lvppl.EM(model).fit(y, max_iter=1, progress=False)
    with pytest.raises(lvppl.ProgramError, match=r"level.*each row.*batch_size"):
        lvppl.EM(model).fit(y, max_iter=1, batch_size=2, progress=False)


@pytest.mark.parametrize("kind", ["gamma", "log-normal"])
def test_padding_outside_the_support_has_no_say(kind: str) -> None:
    generator = torch.Generator().manual_seed(3)
    seen = torch.rand(40, 3, generator=generator) < 0.7
    values = torch.rand(40, 3, generator=generator) * 3 + 0.1
    results = []
    for filler in (0.0, 1.7):
        y = torch.where(seen, values, torch.tensor(filler))

        def model(y: Tensor) -> None:
            a, b = positive("a", [1.0, 2.0]), positive("b", [1.0, 0.5])
            with pyro.plate("data", len(y), dim=-2):
                z = pyro.sample("z", dist.Categorical(t([0.5, 0.5])))
                with pyro.plate("features", 3, dim=-1), poutine.mask(mask=seen):
                    fn = (
                        dist.Gamma(a[z], b[z])
                        if kind == "gamma"
                        else dist.LogNormal(a[z].log(), b[z])
                    )
                    pyro.sample("y", fn, obs=y)

        with pyro.validation_enabled(False):
            fit = lvppl.EM(model).fit(y, max_iter=20, tol=0.0, progress=False)
        results.append(fit.params)
    for name in ("a", "b"):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-9, atol=0)
        start = t([1.0, 2.0]) if name == "a" else t([1.0, 0.5])
        assert not torch.allclose(results[0][name], start)


def test_online_regression_settles() -> None:
    x = torch.linspace(-1, 1, 200)
    y = 3.0 * x + 1.0 + 0.1 * torch.randn(200)

    def model(x: Tensor, y: Tensor) -> None:
        slope, shift = real("slope", 0.0), real("shift", 0.0)
        scale = positive("scale", 1.0)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.999, 0.001])))
            pyro.sample("y", dist.Normal(slope * x + shift + 100.0 * z, scale), obs=y)

    batch = lvppl.EM(model).fit(x, y, max_iter=20, tol=0.0, progress=False)
    online = lvppl.EM(model, online=True).fit(
        x, y, max_iter=20, tol=0.0, batch_size=20, seed=0, progress=False
    )
    for name in ("slope", "shift"):
        torch.testing.assert_close(online.params[name], batch.params[name], rtol=0, atol=0.03)


def test_online_needs_formulas() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        gate = real("gate", [0.1, -0.2])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(logits=gate[0] + gate[1] * x))
            pyro.sample("y", dist.Normal(2 * z, 1.0), obs=y)

    with pytest.raises(lvppl.ProgramError, match=r"online=True.*'gate'"):
        lvppl.EM(model, online=True).fit(
            torch.randn(20), torch.randn(20), batch_size=5, progress=False
        )


def test_sites_that_depend_on_parameters_are_refused() -> None:
    def model(y: Tensor) -> None:
        loc = real("loc", [0.1, 0.4])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.5, 0.5])))
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)
            if loc[0] > 0:
                pyro.sample("more", dist.Normal(loc[z], 1.0), obs=y)

    with pytest.raises(lvppl.ProgramError, match=r"'more' is there at some values"):
        lvppl.EM(model).fit(torch.randn(10), progress=False)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_both_engines_give_the_same_numbers(monkeypatch, covariance):
    """By kernels, and by the program's own log-probabilities; the eager one calls no kernel."""
    from lvppl.inference.fast_mixture import FastMixture

    calls = []
    kernel = FastMixture.__call__
    monkeypatch.setattr(
        FastMixture, "__call__", lambda self, *args: calls.append(1) or kernel(self, *args)
    )
    y = torch.cat([torch.randn(40, 2), torch.randn(40, 2) + 3]).double()
    found = {}
    for engine in ("auto", "eager"):
        calls.clear()
        model = lvppl.models.GaussianMixture(2, 2, covariance=covariance).double()
        model.loc = torch.tensor([[0.0, 0.5], [2.0, 2.5]], dtype=torch.float64)
        fit = lvppl.EM(model, engine=engine).fit(y, max_iter=5, tol=0.0, seed=0, progress=False)
        found[engine] = fit.history["objective"]
        assert bool(calls) == (engine == "auto") and fit.settings["engine"] == engine
    np.testing.assert_allclose(found["auto"], found["eager"], rtol=1e-12)


def test_an_unknown_engine_is_refused():
    with pytest.raises(lvppl.ProgramError, match="'auto' or 'eager', not 'fast'"):
        lvppl.EM(lvppl.models.GaussianMixture(2, 2), engine="fast")

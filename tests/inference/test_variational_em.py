"""EM with a guide is alternating maximisation of the ELBO."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import lvppl

Y = torch.tensor([-1.3, 0.4, 2.1, -0.2, -2.0, 1.1, -0.6, 2.9], dtype=torch.float64)


def model(y: Tensor) -> None:
    weights = pyro.param(
        "weights", lambda: y.new_tensor([0.6, 0.4]), constraint=constraints.simplex
    )
    loc = pyro.param("loc", lambda: y.new_tensor([-0.5, 0.8]))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def guide(y: Tensor) -> None:
    """One distribution a datum: it can be the exact posterior."""
    logits = pyro.param("logits", lambda: y.new_zeros(len(y), 2))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})


def amortised(y: Tensor) -> None:
    """A logistic function of y: the exact posterior of two equal widths, too."""
    slope, shift = pyro.param("slope", y.new_zeros(())), pyro.param("shift", y.new_zeros(()))
    with pyro.plate("data", len(y)):
        logits = torch.stack([torch.zeros_like(y), slope * y + shift], -1)
        pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})


@pytest.mark.parametrize("q", [guide, amortised])
def test_each_half_step_does_its_part(q) -> None:
    fit = lvppl.EM(model, q, num_gradient_steps=50).fit(Y, max_iter=15, tol=0.0, progress=False)
    elbo, kl, evidence = (fit.history[name] for name in ("elbo", "kl", "log_evidence"))
    np.testing.assert_allclose(elbo + kl, evidence, rtol=0, atol=1e-9)
    assert (np.diff(elbo) >= -1e-9).all()
    assert (kl >= -1e-9).all()
    e_steps, m_steps = slice(1, None, 2), slice(2, None, 2)
    # an E-step leaves ln p(y) alone and finds the posterior; an M-step does not lower ln p(y)
    np.testing.assert_allclose(evidence[e_steps], evidence[:-1:2], rtol=0, atol=1e-12)
    assert kl[e_steps].max() < 1e-6
    assert (evidence[m_steps] - evidence[e_steps] >= -1e-9).all()


def test_it_ends_where_em_ends() -> None:
    exact = lvppl.EM(model).fit(Y, max_iter=500, tol=1e-12, progress=False)
    fit = lvppl.EM(model, guide, num_gradient_steps=50).fit(
        Y, max_iter=500, tol=1e-12, progress=False
    )
    assert fit.history["elbo"][-1] == pytest.approx(exact.history["objective"][-1], abs=1e-6)
    torch.testing.assert_close(fit.params["loc"], exact.params["loc"], rtol=0, atol=1e-3)


def test_a_continuous_guide_climbs_one_sample_average() -> None:
    """Normal-Normal with unknown noise: the guide is the posterior, and the bound near ln p(y)."""

    def gaussian(y: Tensor) -> None:
        loc = pyro.param("prior_loc", lambda: y.new_tensor(0.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def q(y: Tensor) -> None:
        slope, shift = pyro.param("slope", y.new_zeros(())), pyro.param("shift", y.new_zeros(()))
        width = pyro.param("width", y.new_ones(()), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y + shift, width))

    fit = lvppl.EM(gaussian, q, objective=lvppl.ELBO(num_particles=200)).fit(
        Y, max_iter=60, tol=1e-9, seed=0, progress=False
    )
    assert (np.diff(fit.history["elbo"]) >= -1e-9).all()
    # ln p(y) is exact: the latent is Gaussian. Draws are finite: the bound may be a little above
    assert abs(float(fit.history["kl"][-1])) < 0.05 * len(Y)
    # posterior precision 1 + 4, mean (m + 4 y) / 5; the best m is the mean of y
    assert float(fit.params["slope"]) == pytest.approx(0.8, abs=0.02)
    assert float(fit.params["width"]) == pytest.approx(5**-0.5, abs=0.02)
    assert float(fit.params["prior_loc"]) == pytest.approx(float(Y.mean()), abs=0.1)


def test_options_of_the_exact_e_step_are_refused() -> None:
    with pytest.raises(lvppl.ProgramError, match="exact E-step"):
        lvppl.EM(model, guide, hard=True)
    with pytest.raises(lvppl.ProgramError, match="guide has no parameter"):
        lvppl.EM(model, lambda y: None).fit(Y, progress=False)
    with pytest.raises(lvppl.ProgramError, match="give a guide too"):
        lvppl.EM(model, objective=lvppl.ELBO())


def test_a_guide_that_fits_its_draws_is_not_believed() -> None:
    """The ELBO that is reported is a lower bound; that of the fitted draws is above ln p(y)."""

    def normal(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def per_datum(y: Tensor) -> None:
        mean = pyro.param("mean", torch.zeros(len(y)))
        width = pyro.param("width", torch.ones(len(y)), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(mean, width))

    y = 1.2 * torch.randn(200)
    fit = lvppl.EM(normal, per_datum).fit(y, max_iter=30, seed=0, progress=False)
    best = dist.Normal(y.mean(), 1.25**0.5).log_prob(y).sum()  # no other loc has a larger ln p(y)
    assert fit.history["elbo"][-1] < float(best)
    assert "nats per datum higher than over others" in fit.reason


def test_discrete_sites_of_a_guide_are_enumerated() -> None:
    """Without a mark too: then the ELBO is exact, and at the end ln p(y)."""

    def mixture(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(loc[z.long()], 1.0), obs=y)

    def own(y: Tensor) -> None:
        p = pyro.param("p", torch.full((len(y),), 0.5), constraint=constraints.unit_interval)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(p))

    y = torch.cat([torch.randn(30) - 2, torch.randn(30) + 2])
    fit = lvppl.EM(mixture, own).fit(y, max_iter=50, seed=0, progress=False)
    kl = fit.history["kl"]
    assert (kl > -1e-4).all() and kl[-2] < 1e-2


def test_draws_without_a_derivative_are_refused() -> None:
    """Counts that jump with φ: the mean over fixed draws is no function to climb."""

    def counts(y: Tensor) -> None:
        rate = pyro.param("rate", torch.tensor(2.0), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Poisson(rate))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def own(y: Tensor) -> None:
        rates = pyro.param("rates", torch.ones(len(y)), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Poisson(rates))

    with pytest.raises(lvppl.ProgramError, match="'z' in a way that has no derivative"):
        lvppl.EM(counts, own).fit(torch.ones(5), seed=0, progress=False)

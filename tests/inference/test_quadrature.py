"""ln p(y) by quadrature, against closed forms."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import lvppl


def t(*values):
    return torch.tensor(*values, dtype=torch.float64)


def exactly(program, y: Tensor) -> Tensor:
    estimate = lvppl.log_likelihood(program, y, estimator="exact")
    assert "by quadrature" in estimate.notes[0]
    return estimate.log_prob


def one_each(prior, law):
    """A program with one latent, or one vector of latents, for each datum."""

    def program(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", prior)
            pyro.sample("y", law(z), obs=y)

    return program


def laplace_and_normal(y: Tensor, s: float) -> Tensor:
    """A Laplace(0, 1) with Normal(0, s) noise: the integral on each side of zero is a Normal's."""
    cdf = torch.special.log_ndtr
    left, right = y + cdf(-y / s - s), cdf(y / s - s) - y
    return 0.5 * s**2 + torch.logaddexp(left, right) - math.log(2)


COUNTS = t([0.0, 3.0, 200.0])
REALS = t([0.3, -1.2, 5.0, 40.0])
CASES = {
    "gamma-poisson": (
        one_each(dist.Gamma(t(0.7), t(0.2)), dist.Poisson),
        COUNTS,
        dist.GammaPoisson(t(0.7), t(0.2)).log_prob(COUNTS),
        1e-10,
    ),
    "beta-binomial": (
        one_each(dist.Beta(t(0.5), t(2.0)), lambda z: dist.Binomial(200, z)),
        COUNTS,
        dist.BetaBinomial(t(0.5), t(2.0), 200).log_prob(COUNTS),
        1e-7,
    ),
    "tails like a power": (
        one_each(dist.Cauchy(t(0.0), t(1.0)), lambda z: dist.Cauchy(z, 1.0)),
        REALS,
        dist.Cauchy(t(0.0), t(2.0)).log_prob(REALS),
        1e-10,
    ),
    "a kink": (
        one_each(dist.Laplace(t(0.0), t(1.0)), lambda z: dist.Normal(z, 0.3)),
        REALS,
        laplace_and_normal(REALS, 0.3),
        1e-7,
    ),
    "a precision": (
        one_each(dist.Gamma(t(2.5), t(1.3)), lambda z: dist.Normal(1.0, z.rsqrt())),
        REALS,
        dist.StudentT(t(5.0), t(1.0), t(1.3 / 2.5).sqrt()).log_prob(REALS),
        1e-10,
    ),
    "far from zero, far narrower than the prior": (
        one_each(dist.LogNormal(t(3.0), t(2.0)), lambda z: dist.LogNormal(z.log(), 1e-4)),
        t([20.0, 1e4]),
        dist.LogNormal(t(3.0), t(4.0 + 1e-8).sqrt()).log_prob(t([20.0, 1e4])),
        1e-9,
    ),
    "two latents": (
        one_each(
            dist.Gamma(t([0.7, 2.0]), t([0.2, 0.2])).to_event(1), lambda z: dist.Poisson(z.sum(-1))
        ),
        COUNTS,
        dist.GammaPoisson(t(2.7), t(0.2)).log_prob(COUNTS),
        1e-9,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_closed_forms(name):
    program, y, exact, tolerance = CASES[name]
    torch.testing.assert_close(exactly(program, y), exact, rtol=0, atol=tolerance)


def test_global_latents():
    """Mean and precision of a Normal; the whole data set is one datum."""
    y, a, b = t([0.3, 1.9, 1.1, -0.4, 2.2]), 3.0, 2.0

    def program(y):
        precision = pyro.sample("precision", dist.Gamma(t(a), t(b)))
        mean = pyro.sample("mean", dist.Normal(t(0.5), (2 * precision).rsqrt()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=y)

    n, k = len(y), 2.0
    spread = (y - y.mean()).square().sum() + k * n / (k + n) * (y.mean() - 0.5).square()
    an, bn = a + n / 2, b + 0.5 * float(spread)
    exact = math.lgamma(an) - math.lgamma(a) + a * math.log(b) - an * math.log(bn)
    exact += 0.5 * math.log(k / (k + n)) - 0.5 * n * math.log(2 * math.pi)
    assert float(exactly(program, y)) == pytest.approx(exact, abs=1e-9)


def test_discrete_latents_are_summed_at_every_point():
    def program(y):
        with pyro.plate("data", len(y)):
            rate = pyro.sample("rate", dist.Gamma(t(0.7), t(0.2)))
            k = pyro.sample("k", dist.Categorical(t([0.3, 0.7])))
            pyro.sample("y", dist.Poisson(rate * t([1.0, 5.0])[k]), obs=y)

    parts = [dist.GammaPoisson(t(0.7), t(0.2) / scale).log_prob(COUNTS) for scale in (1.0, 5.0)]
    exact = (torch.stack(parts) + t([0.3, 0.7]).log()[:, None]).logsumexp(0)
    torch.testing.assert_close(exactly(program, COUNTS), exact, rtol=0, atol=1e-9)


def test_rows_may_be_cut():
    program, y, exact, _ = CASES["gamma-poisson"]
    cut = lvppl.log_likelihood(program, y, estimator="exact", batch_size=2)
    torch.testing.assert_close(cut.log_prob, exact, rtol=0, atol=1e-10)


def test_single_precision():
    program = one_each(dist.Gamma(0.7, 0.2), dist.Poisson)
    exact = dist.GammaPoisson(0.7, 0.2).log_prob(COUNTS.float())
    torch.testing.assert_close(exactly(program, COUNTS.float()).float(), exact, rtol=0, atol=1e-4)


def test_a_thin_ridge_is_refused_by_datum():
    slopes = t([[3.0, 1.0], [3.0, 1.01]])
    program = one_each(
        dist.Normal(t([0.0, 0.0]), 1.0).to_event(1),
        lambda z: dist.Normal((z @ slopes).tanh() * 2, 1e-3).to_event(1),
    )
    with pytest.raises(lvppl.ProgramError, match=r"of data 0.* does not stand still"):
        lvppl.log_likelihood(program, t([[0.3, 0.32]]), estimator="exact")


def test_three_latents_are_refused_for_their_structure():
    program = one_each(dist.Gamma(t([1.0] * 3), 1.0).to_event(1), lambda z: dist.Poisson(z.sum(-1)))
    with pytest.raises(lvppl.ProgramError, match=r"'z' .* is continuous"):
        lvppl.log_likelihood(program, COUNTS, estimator="exact")

"""Continuous latents that are integrated exactly: ln p(y), moments and draws against algebra."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

import lvppl
from lvppl.errors import ProgramError
from tests.enumerable import t

NU = 4.0
W = t([[0.8, -0.3], [0.2, 0.9], [-0.6, 0.4], [0.5, 0.5]])
MEAN, NOISE = t([0.5, -1.0, 0.0, 2.0]), t([0.5, 0.8, 0.6, 1.1])
K = 5.0
"""Standard errors: a chance of 6e-7 for each of fewer than a hundred numbers."""

Model = Callable[..., None]


def close(found: Tensor, expected: Tensor, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fitted(model: Model, *data: Tensor, **options: Any) -> Any:
    """A fit that leaves its one parameter where it starts, near enough: of one iteration."""
    return lvppl.EM(model, **options).fit(*data, max_iter=1, seed=0, progress=False)


# ----------------------------------------------------------------------------------- the programs


def student_t(y: Tensor) -> None:
    """Vectors of independent elements with one scale: a multivariate Student-t."""
    loc = pyro.param("loc", lambda: MEAN.clone())
    with pyro.plate("data", len(y)):
        u = pyro.sample("u", dist.Gamma(t(NU / 2), t(NU / 2))).unsqueeze(-1)
        pyro.sample("y", dist.Normal(loc, NOISE / u.sqrt()).to_event(1), obs=y)


def student_t_mixture(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: torch.stack([MEAN, -MEAN]))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(t([0.3, 0.7])))
        u = pyro.sample("u", dist.Gamma(t(NU / 2), t(NU / 2))).unsqueeze(-1)
        pyro.sample("y", dist.Normal(loc[z], NOISE / u.sqrt()).to_event(1), obs=y)


def analyser(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: MEAN.clone())
    with pyro.plate("data", len(y)):
        u = pyro.sample("u", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(u @ W.mT + loc, NOISE).to_event(1), obs=y)


def analysers(y: Tensor) -> None:
    """Two factor analysers, with loadings of their own."""
    loc = pyro.param("loc", lambda: torch.stack([MEAN, -MEAN]))
    loadings = torch.stack([W, W.flip(0)])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(t([0.3, 0.7])))
        u = pyro.sample("u", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        mean = (loadings[z] @ u.unsqueeze(-1)).squeeze(-1) + loc[z]
        pyro.sample("y", dist.Normal(mean, NOISE).to_event(1), obs=y)


def rates(y: Tensor) -> None:
    """The rate of a row, of which one count is in the plate of rows and the others in another."""
    shape = pyro.param("shape", lambda: t(2.5), constraint=constraints.positive)
    with pyro.plate("rows", len(y), dim=-2):
        u = pyro.sample("u", dist.Gamma(shape, t(0.5)))
        pyro.sample("first", dist.Poisson(u), obs=y[:, :1])
        with pyro.plate("columns", y.shape[1] - 1, dim=-1):
            pyro.sample("others", dist.Poisson(u), obs=y[:, 1:])


def levels(y: Tensor) -> None:
    """The level of a row, far from zero, in the same arrangement."""
    spread = pyro.param("spread", lambda: t(2.0), constraint=constraints.positive)
    with pyro.plate("rows", len(y), dim=-2):
        u = pyro.sample("u", dist.Normal(t(300.0), spread))
        pyro.sample("first", dist.Normal(u, t(1.5)), obs=y[:, :1])
        with pyro.plate("columns", y.shape[1] - 1, dim=-1):
            pyro.sample("others", dist.Normal(u, t(1.5)), obs=y[:, 1:])


# ------------------------------------------------------------------------------- what they are


def student_t_density(y: Tensor, loc: Tensor) -> Tensor:
    return dist.MultivariateStudentT(t(NU), loc, NOISE.diag()).log_prob(y)


def scale_posterior(y: Tensor, loc: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of Gamma((ν + D)/2, (ν + δ²)/2)."""
    shape = (NU + y.shape[-1]) / 2
    rate = (NU + ((y - loc) / NOISE).square().sum(-1)) / 2
    return shape / rate, shape / rate**2


def factor_posterior(y: Tensor, loc: Tensor, loadings: Tensor) -> tuple[Tensor, Tensor]:
    """Wᵀ (W Wᵀ + Ψ)⁻¹ (y − μ) and I − Wᵀ (W Wᵀ + Ψ)⁻¹ W."""
    gain = loadings.mT @ (loadings @ loadings.mT + torch.diag(NOISE**2)).inverse()
    return (y - loc) @ gain.mT, torch.eye(2, dtype=torch.float64) - gain @ loadings


def mixed(r: Tensor, means: Tensor, covariances: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of a mixture: r (data, K), means (data, K, d), covariances (data, K, d, d)."""
    mean = (r[..., None] * means).sum(1)
    away = means - mean[:, None]
    spread = covariances + away[..., :, None] * away[..., None, :]
    return mean, (r[..., None, None] * spread).sum(1)


Y = 1.5 * normal(7, 4, seed=1) + 1.0


# ----------------------------------------------------------------------------------- far outliers


@pytest.mark.parametrize("exponent", range(9))
def test_the_evidence_of_an_outlier(exponent: int) -> None:
    """ln p(y) of a Student-t to 1e-8, up to 10⁸ standard deviations; alone, and in a mixture."""
    y = MEAN + 10.0**exponent * NOISE * t([[1.0, 0.5, -0.7, 0.2], [0.0, 0.0, 1.0, 0.0]])
    fit = fitted(student_t, Y)
    close(fit.log_evidence(y).per_datum, student_t_density(y, fit.params["loc"]), 1e-8)
    fit = fitted(student_t_mixture, Y)
    each = student_t_density(y[:, None], fit.params["loc"]) + t([0.3, 0.7]).log()
    close(fit.log_evidence(y).per_datum, each.logsumexp(-1), 1e-8)
    close(fit.posterior(y).marginals("z"), each.softmax(-1), 1e-6, 1e-8)


@pytest.mark.parametrize("exponent", range(7))
def test_the_scale_of_an_outlier(exponent: int) -> None:
    y = MEAN + 10.0**exponent * NOISE
    fit = fitted(student_t, Y)
    found = fit.posterior(y[None]).moments("u")
    mean, variance = scale_posterior(y[None], fit.params["loc"])
    close(found.mean, mean, 1e-9, 0.0)
    close(found.variance, variance, 1e-8, 0.0)


@pytest.mark.parametrize("exponent", range(7))
def test_the_evidence_of_an_outlier_of_a_factor_analyser(exponent: int) -> None:
    y = MEAN + 10.0**exponent * t([[1.0, 0.5, -0.7, 0.2], [0.0, 0.0, 1.0, 0.0]])
    fit = fitted(analyser, Y)
    density = dist.MultivariateNormal(fit.params["loc"], W @ W.mT + torch.diag(NOISE**2))
    close(fit.log_evidence(y).per_datum, density.log_prob(y), 1e-8)
    mean, covariance = factor_posterior(y, fit.params["loc"], W)
    found = fit.posterior(y).moments("u")
    close(found.mean, mean, 1e-8)
    close(found.covariance, covariance.expand(2, 2, 2), 1e-6)


@pytest.mark.parametrize("unit", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_units_of_the_latent_do_not_matter(unit: float) -> None:
    """A precision in other units, and a factor in others: the same evidence."""

    def precision(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: t(0.0))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Gamma(t(NU / 2), t(NU / 2 * unit**2)))
            pyro.sample("y", dist.Normal(loc * unit, 1 / u.sqrt()), obs=y)

    def factor(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: t(0.0))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(t(0.0), t(unit)))
            pyro.sample("y", dist.Normal(loc * unit + u, t(unit)), obs=y)

    y = t([0.3, -1.2, 40.0, 0.9]) * unit
    fit = fitted(precision, y)
    expected = dist.StudentT(t(NU), fit.params["loc"] * unit, t(unit)).log_prob(y)
    close(fit.log_evidence(y).per_datum, expected, 1e-9)
    fit = fitted(factor, y)
    expected = dist.Normal(fit.params["loc"] * unit, math.sqrt(2) * unit).log_prob(y)
    close(fit.log_evidence(y).per_datum, expected, 1e-9)


def test_little_noise() -> None:
    """A factor that a datum tells to one part in 10⁴: W Wᵀ is 10⁸ times the noise."""

    def sharp(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: t([0.0, 0.0]))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(t(0.0), t(1.0))).unsqueeze(-1)
            pyro.sample("y", dist.Normal(u * t([1.0, 0.5]) + loc, t(1e-4)).to_event(1), obs=y)

    u = t([[0.5], [-2.0], [3.5]])
    y = u * t([1.0, 0.5]) + 1e-4 * normal(3, 2, seed=4)
    fit = fitted(sharp, y)
    loadings = t([[1.0], [0.5]])
    precision = 1 + (loadings.mT @ loadings).squeeze() / 1e-8
    away = y - fit.params["loc"]
    mean = (away @ loadings).squeeze(-1) / 1e-8 / precision
    found = fit.posterior(y)
    close(found.moments("u").mean, mean, 1e-9)
    close(found.moments("u").covariance, (1 / precision).expand(3), 1e-9)
    # ln p(y) from the residual, in which nothing cancels; the densities at the nodes are of 1e9
    residual = (away - mean[:, None] * loadings.squeeze()).square().sum(-1) / 1e-8
    square = residual + mean**2
    log_det = precision.log() + 2 * math.log(1e-8)
    expected = -0.5 * (square + log_det) - math.log(2 * math.pi)
    close(found.log_evidence.per_datum, expected, 0.0, 1e-6)


def test_beyond_what_rounding_allows_there_is_an_error() -> None:
    fit = fitted(student_t, Y)
    y = torch.stack([MEAN, MEAN + 1e13 * NOISE])
    for ask in (fit.log_evidence, fit.posterior):
        with pytest.raises(lvppl.ProgramError, match=r"datum 1 is so far .* integral over 'u'"):
            ask(y)


def test_a_factor_analyser_has_no_datum_that_is_too_far() -> None:
    fit = fitted(analyser, Y)
    far = torch.stack([MEAN, MEAN + 1e11 * NOISE])
    density = dist.MultivariateNormal(fit.params["loc"], W @ W.mT + torch.diag(NOISE**2))
    close(fit.posterior(far).log_evidence.per_datum, density.log_prob(far), 1e-9)


def test_a_fit_with_an_outlier_is_that_of_the_student_t() -> None:
    """EM with a datum at 10⁵ standard deviations stops where the gradient of ln p(y) is zero."""
    y = torch.cat([Y, Y + 0.3, MEAN[None] + 1e5])
    fit = lvppl.EM(student_t).fit(y, max_iter=500, tol=1e-13, seed=0, progress=False)
    loc = fit.params["loc"].requires_grad_()
    total = student_t_density(y, loc).sum()
    close(t(fit.objective_value), total.detach(), 1e-10)
    (slope,) = torch.autograd.grad(total, loc)
    assert slope.abs().max() < 1e-5


# ---------------------------------------------------------------------------------------- moments


def test_scores_of_a_factor_analyser() -> None:
    fit = fitted(analyser, Y)
    found = fit.posterior(Y).moments("u")
    mean, covariance = factor_posterior(Y, fit.params["loc"], W)
    close(found.mean, mean)
    close(found.covariance, covariance.expand(7, 2, 2))
    close(found.variance, covariance.diagonal().expand(7, 2))
    close(found.std, covariance.diagonal().sqrt().expand(7, 2))
    assert repr(found) == "Moments(mean (7, 2), covariance (7, 2, 2))"


def test_scores_of_a_mixture_of_factor_analysers() -> None:
    fit = fitted(analysers, Y)
    loc, loadings = fit.params["loc"], torch.stack([W, W.flip(0)])
    marginal = loadings @ loadings.mT + torch.diag(NOISE**2)
    r = dist.MultivariateNormal(loc, marginal).log_prob(Y[:, None]) + t([0.3, 0.7]).log()
    parts = [factor_posterior(Y, loc[k], loadings[k]) for k in range(2)]
    means = torch.stack([part[0] for part in parts], 1)
    covariances = torch.stack([part[1] for part in parts]).expand(7, 2, 2, 2)
    mean, covariance = mixed(r.softmax(-1), means, covariances)
    posterior = fit.posterior(Y)
    found = posterior.moments("u")
    close(found.mean, mean)
    close(found.covariance, covariance)
    assert torch.equal(posterior.map().values["z"], r.argmax(-1))
    close(posterior.map().per_datum, r.max(-1).values)


def test_the_scale_of_a_student_t() -> None:
    fit = fitted(student_t, Y)
    mean, variance = scale_posterior(Y, fit.params["loc"])
    found = fit.posterior(Y).moments("u")
    close(found.mean, mean)
    close(found.covariance, variance)
    close(found.variance, variance)


def test_the_scale_of_a_mixture() -> None:
    fit = fitted(student_t_mixture, Y)
    loc = fit.params["loc"]
    r = (student_t_density(Y[:, None], loc) + t([0.3, 0.7]).log()).softmax(-1)
    parts = [scale_posterior(Y, loc[k]) for k in range(2)]
    means, variances = (torch.stack([part[i] for part in parts], 1) for i in (0, 1))
    mean, variance = mixed(r, means[..., None], variances[..., None, None])
    found = fit.posterior(Y).moments("u")
    close(found.mean, mean.squeeze(-1))
    close(found.variance, variance.flatten())


def test_data_in_a_plate_inside_that_of_the_latent() -> None:
    """The products over an inner plate are part of the density, once each."""
    counts = t([[3.0, 5.0, 2.0], [0.0, 1.0, 0.0]])
    fit = fitted(rates, counts)
    posterior = fit.posterior(counts)
    shape, rate = fit.params["shape"] + counts.sum(1), t(0.5) + 3
    close(posterior.moments("u").mean, shape / rate)
    close(posterior.moments("u").variance, shape / rate**2)
    y = 300 + 2 * normal(4, 3, seed=2)
    fit = fitted(levels, y)
    prior = 1 / fit.params["spread"] ** 2
    precision = prior + 3 / 1.5**2
    found = fit.posterior(y).moments("u")
    close(found.mean, (300 * prior + y.sum(1) / 1.5**2) / precision)
    close(found.covariance, (1 / precision).expand(4))


def test_a_temperature_flattens_the_density_too() -> None:
    """∝ p(u, y)^(1/T): T times a Gaussian's variance; Gamma((a - 1) / T + 1, b / T)."""
    fit = fitted(analyser, Y)
    mean, covariance = factor_posterior(Y, fit.params["loc"], W)
    found = fit.posterior(Y, temperature=3.0).moments("u")
    close(found.mean, mean)
    close(found.covariance, 3 * covariance.expand(7, 2, 2))
    fit = fitted(student_t, Y)
    mean, variance = scale_posterior(Y, fit.params["loc"])
    rate, shape = mean / variance / 3, (mean**2 / variance - 1) / 3 + 1
    found = fit.posterior(Y, temperature=3.0).moments("u")
    close(found.mean, shape / rate)
    close(found.variance, shape / rate**2)


# ------------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize("model", [student_t, analyser], ids=["student_t", "analyser"])
def test_draws_have_the_moments(model: Model) -> None:
    fit, count = fitted(model, Y), 20_000
    posterior = fit.posterior(Y)
    drawn = posterior.sample(count, seed=3)
    assert set(drawn) == {"u"} and torch.equal(drawn["u"], posterior.sample(count, seed=3)["u"])
    moments, u = posterior.moments("u"), drawn["u"]
    assert u.shape == (count, *moments.mean.shape)
    error = moments.std / math.sqrt(count)
    assert ((u.mean(0) - moments.mean).abs() < K * error).all()
    centred = (u - moments.mean).reshape(count, 7, -1)
    products = centred[..., :, None] * centred[..., None, :]
    expected = moments.covariance.reshape(products.shape[1:])
    error = products.std(0) / math.sqrt(count)
    assert ((products.mean(0) - expected).abs() < K * error).all()


@pytest.mark.parametrize("model", [student_t_mixture, analysers], ids=["student_t", "analysers"])
def test_draws_are_joint_with_the_states(model: Model) -> None:
    """In the draws of z = k the mean of u is E[u | z = k, y]."""
    fit, count = fitted(model, Y), 20_000
    drawn = fit.posterior(Y).sample(count, seed=4)
    loc, u = fit.params["loc"], drawn["u"].reshape(count, 7, -1)
    for k, loadings in enumerate((W, W.flip(0))):
        if model is analysers:
            mean, covariance = factor_posterior(Y, loc[k], loadings)
            std = covariance.diagonal().sqrt()
        else:
            mean, variance = (m[:, None] for m in scale_posterior(Y, loc[k]))
            std = variance.sqrt()
        chosen = (drawn["z"] == k).double()[..., None]
        number = chosen.sum(0)
        gap = (chosen * u).sum(0) - number * mean
        assert (gap.abs() <= K * std * number.sqrt()).all()
    r = fit.posterior(Y).marginals("z")[:, 1]
    error = (r * (1 - r) / count).sqrt()
    assert ((drawn["z"].double().mean(0) - r).abs() < K * error + 10 / count).all()


def test_draws_of_an_outlier() -> None:
    """A scale of 1e-12 is drawn as such."""
    fit = fitted(student_t, Y)
    y = MEAN[None] + 1e6 * NOISE
    u = fit.posterior(y).sample(5000, seed=0)["u"]
    mean, variance = scale_posterior(y, fit.params["loc"])
    assert ((u.mean(0) - mean).abs() < K * (variance / 5000).sqrt()).all()


# --------------------------------------------------------------------------------------- refusals


def test_questions_of_the_wrong_kind() -> None:
    posterior = fitted(analysers, Y).posterior(Y)
    with pytest.raises(lvppl.ProgramError, match=r"'u' is continuous.*moments\('u'\)"):
        posterior.marginals("u")
    with pytest.raises(lvppl.ProgramError, match=r"'z' is discrete.*marginals\('z'\)"):
        posterior.moments("z")
    with pytest.raises(lvppl.ProgramError, match=r"no latent 'v' .* \['u', 'z'\]"):
        posterior.moments("v")
    with pytest.raises(lvppl.ProgramError, match="no latent 'u' with states"):
        posterior.joint("z", "u")
    assert (posterior.sites, posterior.integrated) == (("z",), ("u",))
    assert posterior.plates("u") == posterior.plates("z") == ("data",)
    alone = fitted(analyser, Y).posterior(Y)
    with pytest.raises(lvppl.ProgramError, match=r"no states to choose.*moments\('u'\).*sample"):
        alone.map()


def two_gaussians(y: Tensor) -> None:
    """A factor in two sites: each Gaussian given the other, and both together."""
    loc = pyro.param("loc", lambda: MEAN.clone())
    with pyro.plate("data", len(y)):
        u = pyro.sample("u", dist.Normal(t(0.0), t(1.0))).unsqueeze(-1)
        v = pyro.sample("v", dist.Normal(t(0.0), t(1.0))).unsqueeze(-1)
        pyro.sample("y", dist.Normal(u * W[:, 0] + v * W[:, 1] + loc, NOISE).to_event(1), obs=y)


def test_two_gaussians_are_integrated_together() -> None:
    fit = fitted(two_gaussians, Y)
    density = dist.MultivariateNormal(fit.params["loc"], W @ W.mT + torch.diag(NOISE**2))
    close(fit.log_evidence(Y).per_datum, density.log_prob(Y), 1e-9)
    precision = torch.eye(2, dtype=Y.dtype) + W.mT @ (W / NOISE[:, None] ** 2)
    covariance = torch.linalg.inv(precision)
    means = ((Y - fit.params["loc"]) / NOISE**2) @ W @ covariance
    found = fit.posterior(Y)
    for i, name in enumerate(("u", "v")):
        close(found.moments(name).mean, means[:, i], 1e-9)
        close(found.moments(name).variance, covariance[i, i].expand(len(Y)), 1e-9)
    drawn = found.sample(20000, seed=0)
    away_u, away_v = (drawn[name] - means[:, i] for i, name in enumerate(("u", "v")))
    products = away_u * away_v
    error = products.std(0) / 20000**0.5
    assert ((products.mean(0) - covariance[0, 1]).abs() < 5 * error).all()


def gamma_and_gaussian(y: Tensor) -> None:
    """A level under Student-t noise: given either latent the other is conjugate; not both."""
    loc = pyro.param("loc", lambda: t(0.3))
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(t(0.0), t(1.0)))
        u = pyro.sample("u", dist.Gamma(t(2.0), t(2.0)))
        pyro.sample("y", dist.Normal(loc + x, 1 / u.sqrt()), obs=y)


def product_of_gaussians(y: Tensor) -> None:
    loc = pyro.param("loc", lambda: t(0.3))
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(t(1.0), t(1.0)))
        u = pyro.sample("u", dist.Normal(t(1.0), t(1.0)))
        pyro.sample("y", dist.Normal(loc + x * u, t(1.0)), obs=y)


@pytest.mark.parametrize("model", [gamma_and_gaussian, product_of_gaussians])
def test_latents_that_are_conjugate_one_by_one_alone_are_refused(model: Model) -> None:
    with pytest.raises(lvppl.ProgramError, match=r"depends on '[ux]' given.*lvppl\.EM\(model"):
        fitted(model, Y[:, 0])


def test_a_scale_of_a_group_of_clustered_data_is_refused() -> None:
    """The cluster of each datum is summed before the scale of its group: a mixture, no Gamma."""

    def model(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: t([-1.0, 1.0]))
        with pyro.plate("groups", len(y), dim=-2):
            u = pyro.sample("u", dist.Gamma(t(2.0), t(2.0)))
            pyro.sample("first", dist.Normal(t(0.0), 1 / u.sqrt()), obs=y[:, :1])
            with pyro.plate("data", y.shape[1], dim=-1):
                z = pyro.sample("z", dist.Categorical(t([0.4, 0.6])))
                pyro.sample("y", dist.Normal(Vindex(loc)[z], 1 / u.sqrt()), obs=y)

    with pytest.raises(lvppl.ProgramError, match=r"'u' .* depends on 'z' given.*lvppl\.EM\(model"):
        fitted(model, Y)


def test_single_precision_is_refused() -> None:
    def single(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.zeros(4))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Gamma(torch.tensor(2.0), torch.tensor(2.0))).unsqueeze(-1)
            pyro.sample("y", dist.Normal(loc, 1 / u.sqrt()).to_event(1), obs=y)

    torch.set_default_dtype(torch.float32)
    for y in (Y.float(), torch.cat([Y, Y[:1] + 1e6]).float()):
        with pytest.raises(lvppl.ProgramError, match="which needs float64"):
            fitted(single, y)


# ------------------------------------------------- what is no Gaussian density, and looks like one


def _no_gaussian(kind: str):
    """Data whose density in z is not Gaussian, hidden along lines, on lattices and by precision."""

    def model(y):
        with pyro.plate("data", len(y)):
            if kind in ("difference", "tanh"):
                z = pyro.sample("z", dist.Normal(t([0.0, 0.0]), 1.0).to_event(1))
                gap = z[..., 0] - z[..., 1]
                if kind == "difference":
                    pyro.sample("y", dist.Bernoulli(logits=2 * gap), obs=y.gt(0).to(y))
                else:
                    pyro.sample("y", dist.Normal(gap.tanh(), 0.3), obs=y)
                return
            z = pyro.sample("z", dist.Normal(t(0.0), 1.0))
            if kind == "period":
                pyro.sample("y", dist.Normal((2 * torch.pi * z).sin(), 0.3), obs=y)
            else:
                pyro.sample("x", dist.Normal(z, 1e-4), obs=y)
                pyro.sample("y", dist.Bernoulli(logits=2 * z + 1), obs=y.gt(0).to(y))

    return model


@pytest.mark.parametrize("kind", ["difference", "tanh", "period", "beside a precise site"])
def test_what_is_not_gaussian_is_refused_wherever_it_hides(kind):
    slope = t(0.7)

    def learned(y):
        pyro.param("unused", slope)
        _no_gaussian(kind)(y)

    y = t([0.9, -0.4, 2.5])
    with pytest.raises(ProgramError, match="'z'"):
        lvppl.EM(learned).fit(y, max_iter=1, seed=0, progress=False)


def test_a_prior_in_single_precision_is_refused():
    def model(y):
        loc = pyro.param("loc", t(0.5))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.tensor(0.0), torch.tensor(1.0)))
            pyro.sample("y", dist.Normal(z + loc, 0.05), obs=y)

    with pytest.raises(ProgramError, match="float64"):
        lvppl.EM(model).fit(t([0.3, -2.0]), max_iter=1, seed=0, progress=False)

"""Linear-Gaussian evidence and posteriors against quadrature, dense algebra and scikit-learn."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from sklearn.decomposition import PCA
from sklearn.decomposition import FactorAnalysis as SklearnFactorAnalysis

from lvppl.models import FactorAnalysis, HierarchicalNormal, NormalNormal, ProbabilisticPCA


@pytest.fixture(autouse=True)
def _clean_slate():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def _log_joint(model, y, **latents):
    """ln p(y, z) from the program itself."""
    trace = poutine.trace(poutine.condition(model, latents)).get_trace(y)
    return trace.log_prob_sum()


def _random_factor_analysis(cls, D, d):
    model = cls(D, d).double()
    model.loc = torch.randn(D).double()
    model.noise_scale = 0.3 + torch.rand(model.noise_scale.shape).double()
    return model


def test_normal_normal_by_quadrature():
    model = NormalNormal(prior_loc=0.5, prior_scale=2.0, noise_scale=0.7).double()
    y = torch.tensor([0.1, 1.2, -0.4, 2.0], dtype=torch.float64)
    grid = torch.linspace(-15, 15, 3001, dtype=torch.float64)
    log_joint = torch.stack([_log_joint(model, y, mean=m) for m in grid])
    step = 0.01
    log_evidence = log_joint.logsumexp(0) + math.log(step)
    assert model.log_evidence(y).item() == pytest.approx(log_evidence.item(), abs=1e-10)
    p = (log_joint - log_evidence).exp() * step
    mean = (p * grid).sum()
    posterior = model.posterior(y)
    torch.testing.assert_close(posterior.mean, mean)
    torch.testing.assert_close(posterior.variance, (p * (grid - mean) ** 2).sum())


def test_hierarchical_normal_by_quadrature():
    model = HierarchicalNormal(loc=0.5, scale=2.0, noise_scale=0.7).double()
    y = torch.tensor([0.1, 1.2, -3.0], dtype=torch.float64)
    grid = torch.linspace(-20, 20, 4001, dtype=torch.float64)
    for n in range(3):
        log_joint = torch.stack([_log_joint(model, y[n : n + 1], z=z[None]) for z in grid])
        log_evidence = log_joint.logsumexp(0) + math.log(0.01)
        assert model.log_evidence(y)[n].item() == pytest.approx(log_evidence.item(), abs=1e-10)
        p = (log_joint - log_evidence).exp() * 0.01
        mean = (p * grid).sum()
        torch.testing.assert_close(model.posterior(y).mean[n], mean)
        torch.testing.assert_close(model.posterior(y).variance[n], (p * (grid - mean) ** 2).sum())


@pytest.mark.parametrize("cls", [FactorAnalysis, ProbabilisticPCA])
@pytest.mark.parametrize("D, d", [(5, 2), (3, 1), (2, 4)])
def test_linear_gaussian_by_conditioning_the_joint_normal(cls, D, d):
    model = _random_factor_analysis(cls, D, d)
    y = torch.randn(6, D).double()
    W, loc, noise = (t.detach() for t in (model.weight, model.loc, model.noise_scale))
    C = W @ W.T + (noise**2).expand(D).diag()
    torch.testing.assert_close(
        model.log_evidence(y).detach(),
        dist.MultivariateNormal(loc, C).log_prob(y),
        rtol=1e-11,
        atol=1e-11,
    )
    gain = torch.linalg.solve(C, W).T
    posterior = model.posterior(y)
    torch.testing.assert_close(posterior.mean.detach(), (y - loc) @ gain.T)
    covariance = torch.eye(d).double() - gain @ W
    torch.testing.assert_close(
        posterior.covariance_matrix.detach(), covariance.expand(6, d, d), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("cls", [FactorAnalysis, ProbabilisticPCA])
def test_the_program_is_the_algebra(cls):
    """Bayes: ln p(y) = ln p(y, z) − ln p(z | y) at any z, and the gradients of both sides."""
    model = _random_factor_analysis(cls, 4, 2)
    y, z = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    evidence = model.log_evidence(y).sum()
    via_bayes = _log_joint(model, y, z=z) - model.posterior(y).log_prob(z).sum()
    torch.testing.assert_close(via_bayes, evidence, rtol=1e-12, atol=1e-12)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(evidence, parameters),
        torch.autograd.grad(via_bayes, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_ppca_closed_form_against_scikit_learn():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 6)) + 0.5 * rng.normal(size=(40, 6)) + 2
    model = ProbabilisticPCA.from_data(torch.tensor(y), 2)
    pca = PCA(2).fit(y)
    W, noise = model.weight.detach(), model.noise_scale.detach()
    covariance = W @ W.T + noise**2 * torch.eye(6).double()
    # scikit-learn divides the sample covariance by N − 1, maximum likelihood by N
    correction = 40 / 39
    np.testing.assert_allclose(correction * covariance.numpy(), pca.get_covariance(), rtol=1e-10)
    model.weight, model.noise_scale = W * correction**0.5, noise * correction**0.5
    scores = model.log_evidence(torch.tensor(y)).detach().numpy()
    np.testing.assert_allclose(scores, pca.score_samples(y), rtol=0, atol=1e-10)


def test_ppca_closed_form_is_a_stationary_maximum():
    y = torch.randn(30, 5).double() @ torch.randn(5, 5).double() + 1
    model = ProbabilisticPCA.from_data(y, 2)
    best = model.log_evidence(y).sum()
    for gradient in torch.autograd.grad(best, list(model.parameters())):
        assert gradient.abs().max() < 1e-9
    # no likelihood is higher at nearby parameters
    for _ in range(20):
        other = ProbabilisticPCA.from_data(y, 2)
        with torch.no_grad():
            for p in other.parameters():
                p += 0.01 * torch.randn_like(p)
        assert other.log_evidence(y).sum() < best


def test_factor_analysis_against_scikit_learn():
    rng = np.random.default_rng(1)
    y = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 5)) + rng.normal(size=(60, 5))
    fa = SklearnFactorAnalysis(2).fit(y)
    model = FactorAnalysis(5, 2).double()
    model.weight = torch.tensor(fa.components_.T.copy())
    model.loc, model.noise_scale = torch.tensor(fa.mean_), torch.tensor(fa.noise_variance_).sqrt()
    scores = model.log_evidence(torch.tensor(y)).detach().numpy()
    np.testing.assert_allclose(scores, fa.score_samples(y), rtol=0, atol=1e-10)
    means = model.posterior(torch.tensor(y)).mean.detach().numpy()
    np.testing.assert_allclose(means, fa.transform(y), rtol=0, atol=1e-10)


def test_ppca_refusals():
    y = torch.randn(10, 3).double()
    with pytest.raises(ValueError, match="between 1 and 2"):
        ProbabilisticPCA.from_data(y, 3)
    flat = torch.randn(10, 1).double() @ torch.randn(1, 3).double()
    with pytest.raises(ValueError, match="lie in a plane of 1"):
        ProbabilisticPCA.from_data(flat, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_model(dtype):
    y = torch.randn(10, 4, dtype=dtype)
    model = ProbabilisticPCA.from_data(y, 2)
    trace = poutine.trace(model).get_trace(y)
    assert trace.nodes["z"]["value"].dtype == dtype
    assert model.log_evidence(y).dtype == dtype
    assert model.posterior(y).mean.dtype == dtype

"""Mixtures: exact evidence and responsibilities against scikit-learn and Pyro's own enumeration."""

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from sklearn.mixture import GaussianMixture as SklearnMixture

from lvppl.models import BernoulliMixture, GaussianMixture

COVARIANCES = ["full", "tied", "diag", "spherical"]


@pytest.fixture(autouse=True)
def _clean_slate():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def _data():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0, 3.0], [4.0, 1.0, 0.0], [-3.0, 2.0, 1.0]])
    noise = rng.normal(size=(90, 3)) @ rng.normal(size=(3, 3))
    return np.repeat(centres, 30, 0) + noise


def _from_scikit_learn(fitted, covariance):
    model = GaussianMixture(3, 3, covariance=covariance).double()
    model.weights, model.loc = torch.tensor(fitted.weights_), torch.tensor(fitted.means_)
    Σ = torch.tensor(fitted.covariances_)
    if covariance in ("full", "tied"):
        model.scale_tril = torch.linalg.cholesky(Σ)
    else:
        model.scale = Σ.sqrt()
    return model


@pytest.mark.parametrize("covariance", COVARIANCES)
def test_against_scikit_learn(covariance):
    y = _data()
    fitted = SklearnMixture(3, covariance_type=covariance, random_state=0).fit(y)
    model = _from_scikit_learn(fitted, covariance)
    with torch.no_grad():
        evidence = model.log_evidence(torch.tensor(y)).numpy()
        responsibilities = model.responsibilities(torch.tensor(y)).numpy()
    np.testing.assert_allclose(evidence, fitted.score_samples(y), rtol=0, atol=1e-10)
    np.testing.assert_allclose(responsibilities, fitted.predict_proba(y), rtol=0, atol=1e-10)


def _models_and_data():
    y = torch.tensor(_data())
    for covariance in COVARIANCES:
        yield GaussianMixture.from_data(y, 4, covariance=covariance), y
    yield BernoulliMixture(4, 3).double(), (y > 0).double()


def test_program_enumerates_to_the_evidence():
    for model, y in _models_and_data():
        pyro.clear_param_store()
        evidence = model.log_evidence(y).sum()
        loss = TraceEnum_ELBO(max_plate_nesting=1).differentiable_loss(model, lambda y: None, y)
        torch.testing.assert_close(-loss, evidence, rtol=1e-12, atol=0)
        parameters = list(model.parameters())
        for a, b in zip(
            torch.autograd.grad(-loss, parameters),
            torch.autograd.grad(evidence, parameters),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_bernoulli_mixture_by_hand():
    model = BernoulliMixture(2, 2).double()
    model.weights = torch.tensor([0.25, 0.75], dtype=torch.float64)
    model.probs = torch.tensor([[0.1, 0.6], [0.5, 0.2]], dtype=torch.float64)
    y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    joint = torch.tensor(
        [
            [0.25 * 0.1 * 0.4, 0.75 * 0.5 * 0.8],
            [0.25 * 0.9 * 0.6, 0.75 * 0.5 * 0.2],
        ],
        dtype=torch.float64,
    )
    exact = {"rtol": 1e-12, "atol": 0}
    torch.testing.assert_close(model.log_evidence(y), joint.sum(-1).log(), **exact)
    want = joint / joint.sum(-1, keepdim=True)
    torch.testing.assert_close(model.responsibilities(y), want, **exact)


def test_runs_under_plain_pyro_svi():
    for model, y in _models_and_data():
        pyro.clear_param_store()
        before = -model.log_evidence(y).sum().item()
        svi = SVI(
            model,
            lambda y: None,
            pyro.optim.Adam({"lr": 0.01}),
            TraceEnum_ELBO(max_plate_nesting=1),
        )
        assert svi.step(y) == pytest.approx(before, rel=1e-12)
        after = -model.log_evidence(y).sum().item()
        assert svi.step(y) == pytest.approx(after, rel=1e-12)
        assert after != before  # the module's own parameters are the ones that are optimised


def test_k_means_plus_plus_start():
    y = torch.tensor(_data())
    start = GaussianMixture.from_data(y, 3, seed=1).loc.detach()
    assert all((row == y).all(-1).any() for row in start)  # locations are data
    assert len(start.unique(dim=0)) == 3
    torch.testing.assert_close(start, GaussianMixture.from_data(y, 3, seed=1).loc.detach())
    with pytest.raises(ValueError, match='"full", "tied", "diag" or "spherical"'):
        GaussianMixture(3, 2, covariance="banded")

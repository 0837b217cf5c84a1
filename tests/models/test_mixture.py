"""Mixtures: exact evidence and responsibilities against scikit-learn and Pyro's own enumeration."""

import numpy as np
import pyro
import pytest
import scipy.integrate
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import SVI, TraceEnum_ELBO
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture as SklearnMixture

from lvppl.models import (
    BernoulliMixture,
    GaussianMixture,
    MixtureOfExperts,
    PoissonMixture,
    StudentTMixture,
)
from tests.pyro_sums import assert_sums_to

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
    yield GaussianMixture.from_data(y, 4, covariance="unit", equal_weights=True), y
    yield BernoulliMixture(4, 3).double(), (y > 0).double()
    yield PoissonMixture(4, 3).double(), y.abs().round()


def test_program_enumerates_to_the_evidence():
    for model, y in _models_and_data():
        pyro.clear_param_store()
        assert_sums_to(model.log_evidence(y), model, y)


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
    with pytest.raises(ValueError, match='"full", "tied", "diag", "spherical" or "unit"'):
        GaussianMixture(3, 2, covariance="banded")


def test_locations_alone_are_learned_by_k_means():
    """One step of hard EM from the start is one step of Lloyd's algorithm."""
    y = torch.tensor(_data())
    model = GaussianMixture.from_data(y, 3, covariance="unit", equal_weights=True)
    assert [name for name, _ in model.named_parameters()] == ["loc_unconstrained"]
    assert {name for name, _ in model.named_buffers()} == {"scale", "weights"}
    assert model.weights.dtype == model.scale.dtype == torch.float64
    start = model.loc.detach().numpy()
    nearest = model.responsibilities(y).argmax(-1).numpy()
    peer = KMeans(3, init=start, n_init=1, max_iter=1).fit(_data())
    distance = ((_data()[:, None] - start) ** 2).sum(-1)
    np.testing.assert_array_equal(nearest, distance.argmin(-1))
    moved = np.stack([_data()[nearest == k].mean(0) for k in range(3)])
    np.testing.assert_allclose(peer.cluster_centers_, moved, rtol=1e-10)


def test_as_many_components_as_different_data():
    y = torch.tensor([[0.0], [1.0], [1.0], [0.0]])
    assert sorted(GaussianMixture.from_data(y, 2).loc.flatten().tolist()) == [0.0, 1.0]
    with pytest.raises(ValueError, match=r"3 components need as many different data.*only 2"):
        GaussianMixture.from_data(y, 3)


@pytest.mark.parametrize("family", [BernoulliMixture, PoissonMixture])
def test_starts_from_counts_are_chosen_data_half_way_to_the_mean(family):
    y = torch.tensor(_data()).abs().round()
    y = y.clamp(max=1) if family is BernoulliMixture else y
    model = family.from_data(y, 3, seed=1)
    start = (model.probs if family is BernoulliMixture else model.rate).detach()
    expected = 0.5 * (y + y.mean(0))
    assert all(((row - expected).abs() < 1e-2 + 1e-9).all(-1).any() for row in start)
    assert len(start.unique(dim=0)) == 3
    assert start.dtype == torch.float64


# ------------------------------------------------------------------------------------ Student-t


def _student():
    y = torch.tensor(_data())
    model = StudentTMixture.from_data(y, 3, df=3.5, learn_df=True)
    model.df = torch.tensor([1.2, 4.0, 30.0]).double()
    model.scale = 0.5 + torch.rand(3, 3).double()
    model.weights = torch.tensor([0.2, 0.3, 0.5]).double()
    return model, y


def _with_precision(model, y, u):
    """ln p(u, y_n), z summed out by Pyro, at one precision u for every datum."""
    conditioned = poutine.condition(model, {"u": y.new_full((len(y),), u)})
    return -TraceEnum_ELBO(max_plate_nesting=1).loss(conditioned, lambda y: None, y)


def test_student_t_density_is_that_of_scipy():
    model, y = _student()
    parts = [
        scipy.stats.multivariate_t.logpdf(y, loc=loc, shape=np.diag(scale**2), df=float(df))
        for loc, scale, df in zip(
            model.loc.detach().numpy(),
            model.scale.detach().numpy(),
            model.df.detach().numpy(),
            strict=True,
        )
    ]
    joint = np.stack(parts, -1) + model.weights.detach().log().numpy()
    want = np.logaddexp.reduce(joint, -1)
    np.testing.assert_allclose(model.log_evidence(y).detach(), want, rtol=1e-11)
    np.testing.assert_allclose(
        model.responsibilities(y).detach(), np.exp(joint - want[:, None]), rtol=0, atol=1e-11
    )


def test_the_scale_mixture_integrates_to_student_t():
    """The program, summed over z by Pyro and integrated over u by quadrature, is the evidence."""
    model, y = _student()
    for datum in y[[0, 40, 80]]:
        row = datum[None]

        def density(t, row=row):  # u = exp(t)
            return np.exp(_with_precision(model, row, np.exp(t)) + t)

        value, _ = scipy.integrate.quad(density, -30, 8, epsabs=0, epsrel=1e-10, limit=200)
        assert np.log(value) == pytest.approx(model.log_evidence(row).item(), abs=1e-8)


def test_the_posterior_of_the_precision_is_bayes_rule():
    """p(u | z, y) p(y | z) = p(u | z) p(y | u, z), at any u, for every component."""
    model, y = _student()
    for u in torch.tensor([0.3, 1.0, 2.7]).double():
        half = model.df / 2
        prior = torch.distributions.Gamma(half, half).log_prob(u)
        given = torch.distributions.Normal(model.loc, model.scale / u**0.5)
        likelihood = given.log_prob(y[:, None]).sum(-1)
        posterior = model.precision_posterior(y).log_prob(u)
        marginal = model.component(...).log_prob(y[:, None])
        torch.testing.assert_close(posterior + marginal, prior + likelihood, rtol=1e-10, atol=1e-10)


def test_degrees_of_freedom_are_fixed_or_learned():
    fixed, learned = StudentTMixture(2, 3), StudentTMixture(2, 3, df=5.0, learn_df=True)
    assert "df" in dict(fixed.named_buffers()) and fixed.df.tolist() == [4.0, 4.0]
    assert "df_unconstrained" in dict(learned.named_parameters())
    torch.testing.assert_close(learned.df, torch.full((2,), 5.0))
    with pytest.raises(ValueError, match=r"df must be positive, but is 0.0"):
        StudentTMixture(2, 3, df=0.0)


# ------------------------------------------------------------------------------------- experts


def _experts():
    y = torch.tensor(_data())
    x, y = y[:, :2], y[:, 1:]
    model = MixtureOfExperts(3, 2, 2).double()
    model.gate_weight, model.gate_bias = torch.randn(2, 3).double(), torch.randn(3).double()
    model.scale = 0.5 + torch.rand(3, 2).double()
    return model, x, y


def test_experts_by_the_formula_expert_by_expert():
    model, x, y = _experts()
    V, c, W, b, σ = (
        getattr(model, name).detach().numpy()
        for name in ("gate_weight", "gate_bias", "weight", "bias", "scale")
    )
    X, Y = x.numpy(), y.numpy()
    gate = np.exp(X @ V + c)
    gate /= gate.sum(-1, keepdims=True)
    joint = np.stack(
        [gate[:, k] * scipy.stats.norm.pdf(Y, X @ W[k] + b[k], σ[k]).prod(-1) for k in range(3)],
        -1,
    )
    np.testing.assert_allclose(model.log_evidence(x, y).detach(), np.log(joint.sum(-1)), atol=1e-10)
    want = joint / joint.sum(-1, keepdims=True)
    np.testing.assert_allclose(model.responsibilities(x, y).detach(), want, atol=1e-10)
    mean = sum(gate[:, [k]] * (X @ W[k] + b[k]) for k in range(3))
    np.testing.assert_allclose(model.mean(x).detach(), mean, atol=1e-10)


def test_experts_enumerate_to_the_evidence_also_under_particles():
    model, x, y = _experts()
    for particles in (None, 3):
        assert_sums_to(model.log_evidence(x, y), model, x, y, particles=particles)


def test_experts_draw_outputs_for_given_inputs():
    """10,000 draws at one input: their mean within 5 standard errors of E[y | x]."""
    model, x, _ = _experts()
    many = x[:1].expand(10_000, 2)
    with torch.no_grad():
        draws = model(many)
        error = draws.std(0) / len(many) ** 0.5
        assert ((draws.mean(0) - model.mean(x[:1])[0]).abs() < 5 * error).all()


def test_experts_start_from_data():
    _, x, y = _experts()
    model = MixtureOfExperts.from_data(x, y, 3)
    assert all((row == y).all(-1).any() for row in model.bias.detach())
    want = GaussianMixture.from_data(y, 3, covariance="diag")  # of no use of the input yet
    torch.testing.assert_close(model.log_evidence(x, y), want.log_evidence(y), rtol=1e-10, atol=0)

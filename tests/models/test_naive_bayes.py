"""Naive Bayes: exact evidence by hand, by Pyro's enumeration, and against scikit-learn's."""

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine
from sklearn.naive_bayes import BernoulliNB, CategoricalNB, GaussianNB

from lvppl.models import (
    BernoulliComponents,
    BernoulliMixture,
    CategoricalComponents,
    GaussianComponents,
    GaussianMixtureComponents,
    NaiveBayes,
    PoissonComponents,
)
from tests.pyro_sums import assert_sums_to


def _model():
    return NaiveBayes(
        BernoulliComponents(3, 2),
        GaussianComponents(3, 2, covariance="diag"),
        CategoricalComponents(3, 4, 1),
        PoissonComponents(3, 1),
    ).double()


def _data(N=7):
    columns = [
        torch.randint(2, (N, 2)),
        torch.randn(N, 2),
        torch.randint(4, (N, 1)),
        torch.randint(5, (N, 1)),
    ]
    y = torch.cat([column.double() for column in columns], -1)
    return y, torch.tensor([0, -1, 2, -1, 1, -1, 0])


def _joint_by_hand(model, y, labels):
    """p(z = k, y, label) as one product over features, column by column."""
    bits, real, symbol, count = model.blocks
    y = y.numpy()
    joint = np.zeros((len(y), 3))
    for n, row in enumerate(y):
        for k in range(3):
            p = float(model.weights[k].detach())
            for j in range(2):
                p *= scipy.stats.bernoulli.pmf(row[j], bits.probs[k, j].item())
                μ, σ = real.loc[k, j].item(), real.scale[k, j].item()
                p *= scipy.stats.norm.pdf(row[2 + j], μ, σ)
            p *= symbol.probs[k, 0, int(row[4])].item()
            p *= scipy.stats.poisson.pmf(row[5], count.rate[k, 0].item())
            joint[n, k] = p if labels is None or labels[n] in (-1, k) else 0.0
    return joint


@pytest.mark.parametrize("labelled", [False, True])
def test_evidence_and_responsibilities_by_hand(labelled):
    model, (y, labels) = _model(), _data()
    labels = labels if labelled else None
    joint = _joint_by_hand(model, y, labels)
    got = model.log_evidence(y, labels).detach()
    np.testing.assert_allclose(got, np.log(joint.sum(-1)), rtol=0, atol=1e-10)
    want = joint / joint.sum(-1, keepdims=True)
    got = model.responsibilities(y, labels).detach()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("particles", [None, 3])
@pytest.mark.parametrize("labelled", [False, True])
def test_program_enumerates_to_the_evidence(labelled, particles):
    model, (y, labels) = _model(), _data()
    labels = labels if labelled else None
    assert_sums_to(model.log_evidence(y, labels), model, y, labels, particles=particles)


def test_one_block_without_labels_is_a_mixture():
    mixture = BernoulliMixture(3, 2).double()
    bits = BernoulliComponents(3, 2).double()
    bits.probs = mixture.probs.detach()
    y = _data()[0][:, :2]
    torch.testing.assert_close(NaiveBayes(bits).log_evidence(y), mixture.log_evidence(y))


@pytest.mark.parametrize("peer", [BernoulliNB(), GaussianNB(), CategoricalNB(min_categories=4)])
def test_classifies_as_scikit_learn(peer):
    """With scikit-learn's parameters, fitted to labels, the posterior of the class is its own."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=60)
    if isinstance(peer, BernoulliNB):
        y = (rng.random((60, 5)) < 0.2 + 0.25 * labels[:, None]).astype(float)
        block = BernoulliComponents(3, 5).double()
        block.probs = torch.tensor(np.exp(peer.fit(y, labels).feature_log_prob_))
    elif isinstance(peer, GaussianNB):
        y = rng.normal(labels[:, None], 1 + 0.5 * labels[:, None], (60, 2))
        block = GaussianComponents(3, 2, covariance="diag").double()
        peer.fit(y, labels)
        block.loc, block.scale = torch.tensor(peer.theta_), torch.tensor(peer.var_).sqrt()
    else:
        y = ((labels[:, None] + rng.integers(2, size=(60, 3))) % 4).astype(float)
        block = CategoricalComponents(3, 4, 3).double()
        log_p = peer.fit(y, labels).feature_log_prob_  # a feature, (class, level)
        block.probs = torch.tensor(np.exp(np.stack(log_p, 1)))
    model = NaiveBayes(block)
    prior = peer.class_prior_ if isinstance(peer, GaussianNB) else np.exp(peer.class_log_prior_)
    model.weights = torch.tensor(prior)
    got = model.responsibilities(torch.tensor(y)).detach()
    np.testing.assert_allclose(got, peer.predict_proba(y), rtol=0, atol=1e-9)


def test_a_label_says_which_class_and_nothing_else():
    """Known labels take the posterior there; the evidence is that of the class and its data."""
    model, (y, labels) = _model(), _data()
    known = labels >= 0
    posterior = model.responsibilities(y, labels).detach()
    assert torch.equal(posterior[known], torch.eye(3).double()[labels[known]])
    unlabelled = model.responsibilities(y)
    torch.testing.assert_close(posterior[~known], unlabelled[~known].detach())
    no_labels = torch.full_like(labels, -1)
    torch.testing.assert_close(model.log_evidence(y, no_labels), model.log_evidence(y))


def test_draws_have_the_data_s_shape_and_supports():
    model, (y, labels) = _model(), _data()
    trace = poutine.trace(poutine.uncondition(model)).get_trace(y, labels)
    trace.compute_log_prob()
    drawn = trace.nodes["_RETURN"]["value"]
    assert drawn.shape == y.shape and drawn.dtype == torch.float64
    assert torch.equal(trace.nodes["label"]["value"], trace.nodes["z"]["value"])


def test_what_does_not_fit_is_refused():
    model, (y, labels) = _model(), _data()
    with pytest.raises(ValueError, match=r"shape \(data, 6\), but has shape \(7, 5\)"):
        model(y[:, :5])
    with pytest.raises(ValueError, match=r"labels must have shape \(7,\).*but has shape \(3,\)"):
        model(y, labels[:3])
    with pytest.raises(ValueError, match=r"same number of components .* \[\(2, \(1,\)\), \(3"):
        NaiveBayes(BernoulliComponents(2, 1), BernoulliComponents(3, 1))
    with pytest.raises(ValueError, match="same number of components"):
        NaiveBayes(CategoricalComponents(2, 4))  # without a dimension of features


def test_blocks_of_mixtures():
    """A block may be anything with components: mixtures of Gaussians, against their formula."""
    block = GaussianMixtureComponents(3, 2, 2).double()
    block.mixing = torch.tensor([[0.3, 0.7], [0.5, 0.5], [0.9, 0.1]]).double()
    block.scale = 0.5 + torch.rand(3, 2, 2).double()
    y = torch.randn(6, 2).double()
    joint = [
        sum(
            block.mixing[k, m].item()
            * scipy.stats.norm.pdf(y, block.loc[k, m].detach(), block.scale[k, m].detach()).prod(-1)
            for m in range(2)
        )
        for k in range(3)
    ]
    got = NaiveBayes(block).log_evidence(y).detach()
    np.testing.assert_allclose(got, np.log(sum(joint) / 3), rtol=0, atol=1e-10)
    start = GaussianMixtureComponents.from_data(y, 2, 2)
    assert len(start.loc.reshape(4, 2).unique(dim=0)) == 4
    assert all((row == y).all(-1).any() for row in start.loc.detach().reshape(4, 2))


def test_parameters_are_in_the_store_by_name():
    model, (y, labels) = _model(), _data()
    with poutine.trace(param_only=True) as trace:
        model(y, labels)
    names = {"weights", "blocks.0.probs", "blocks.1.loc", "blocks.1.scale", "blocks.3.rate"}
    assert {f"naive_bayes.{name}" for name in names} <= set(trace.trace.nodes)
    pyro.clear_param_store()

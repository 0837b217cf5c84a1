"""Questions to an EM fit: answered exactly, or refused with what to ask instead."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import lvppl
from lvppl.distributions import HiddenMarkov
from lvppl.errors import ProgramError
from tests.enumerable import PROGRAMS, latent_sites, set_parameters, simplex, t

Y = t([-2.1, 1.8, -1.7, 2.6, 1.1, -2.4, 2.0, 0.1])


def mixture(y: Tensor) -> None:
    weights = simplex("weights", [0.6, 0.4])
    loc = pyro.param("loc", lambda: t([-1.0, 1.2]))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], 0.8), obs=y)


@pytest.fixture
def fit() -> Any:
    return lvppl.EM(mixture).fit(Y, max_iter=5, progress=False, seed=0)


@pytest.mark.parametrize("name", ["gaussian_mixture", "two_latents", "tree", "gaussian_chain"])
def test_reconstructions_are_exact(name: str) -> None:
    """E[y | z] averaged over every assignment, weighted by its posterior."""
    program = PROGRAMS[name]
    started = program.start()
    fit = lvppl.EM(started.model).fit(*started.args, max_iter=2, seed=0, progress=False)
    found = fit.reconstruct(*started.args)
    started = program.start()
    set_parameters(fit.params)
    exact = started.exact()
    latents = latent_sites(started.model, started.args)
    expected = dict.fromkeys(found, 0.0)
    for i, weight in enumerate(exact.weights().tolist()):
        values = {
            n: latent.support[exact.states[n][i]].reshape(latent.shape)
            for n, latent in latents.items()
        }
        given = pyro.poutine.condition(started.model, data=values)
        nodes = pyro.poutine.trace(given).get_trace(*started.args).nodes
        for site in found:
            expected[site] = expected[site] + weight * nodes[site]["fn"].mean.detach()
    for site, value in found.items():
        torch.testing.assert_close(value, expected[site].reshape(value.shape), atol=1e-9, rtol=0)


def test_new_data_are_of_the_fit(fit: Any) -> None:
    """Moments of 40,000 new data, within 5 standard errors."""
    new = fit.sample(Y, num_samples=5000, seed=1)
    y, z = new.predictive["y"], new.samples["z"]
    weights, loc = fit.params["weights"], fit.params["loc"]
    share = float(weights[1])
    assert abs(float(z.double().mean()) - share) < 5 * (share * (1 - share) / z.numel()) ** 0.5
    gap = y - loc[z]
    assert abs(float(gap.mean())) < 5 * 0.8 / gap.numel() ** 0.5
    assert abs(float(gap.std()) - 0.8) < 5 * 0.8 / (2 * gap.numel()) ** 0.5
    assert fit.sample(seed=1).predictive["y"].shape == (1, 8)  # the training data's shape


def test_clusters_are_the_best_assignment(fit: Any) -> None:
    posterior = fit.posterior(Y[:5])
    assert torch.equal(posterior.map().values["z"], posterior.marginals("z").argmax(-1))


def test_what_has_no_meaning_says_what_has(fit: Any) -> None:
    with pytest.raises(
        ProgramError, match=r"exact: there is nothing to estimate\. Use fit\.log_ev"
    ):
        fit.log_likelihood(Y)
    with pytest.raises(ProgramError, match=r"no guide to report on.*fit\.log_evidence\(y\)"):
        fit.report(Y)
    with pytest.raises(ProgramError, match=r"takes no num_samples or seed\. Draws are fit\.post"):
        fit.posterior(Y, num_samples=3, seed=0)


def test_the_history_and_the_parameters(fit: Any) -> None:
    assert list(fit.history) == ["objective", "loss"]
    assert repr(fit.history) == "History(objective (6,), loss (6,))"
    assert (fit.history["objective"] == -fit.history["loss"]).all()
    assert fit.objective_value == fit.history["objective"][-1]
    assert float(fit.log_evidence(Y)) == pytest.approx(fit.objective_value, abs=1e-10)
    fit.params["loc"].zero_()  # a copy
    with fit.active():
        assert torch.equal(pyro.param("loc").detach(), fit.params["loc"])
    assert fit.params["loc"].abs().min() > 0
    with pytest.raises(KeyError, match="the history has no 'elbo'"):
        fit.history["elbo"]


def test_check_knows_these_programs() -> None:
    report = lvppl.check(mixture, None, Y)
    assert report.evidence.kind == "exact"
    assert report.data_plates == ("data",)
    assert (report["z"].role, report["y"].role) == ("latent", "observed")
    with pytest.raises(ProgramError, match="missing 1 required positional argument: 'y'"):
        lvppl.check(mixture, guide=None)


def test_the_curve_of_a_fit(fit: Any) -> None:
    from lvppl.inspection.plots import training_curve

    ax = training_curve(fit)
    assert ax.lines[0].get_ydata().tolist() == fit.history["objective"].tolist()
    assert ax.get_ylabel() == "ln p(y), nats"


# --------------------------------------------------------------------- other groups, other lengths


def grouped(y: Tensor) -> None:
    """A level of each group, which becomes a parameter."""
    weights = simplex("weights", [0.6, 0.4])
    with pyro.plate("groups", len(y), dim=-2):
        level = pyro.sample("level", dist.Normal(t(0.0), t(2.0)))
        with pyro.plate("data", y.shape[1], dim=-1):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(level + t([-1.0, 1.0])[z], t(0.8)), obs=y)


def test_maximised_latents_belong_to_their_groups() -> None:
    y = Y.reshape(4, 2)
    fit = lvppl.EM(grouped).fit(y, max_iter=5, progress=False, seed=0)
    assert fit.params["level"].shape == (4, 1)
    says = (
        r"'level' was maximised: .* \(4, 1\) .* \(3, 1\) in plate 'groups' \(now 3\)\. .*fit again"
    )
    asked = (fit.posterior, fit.log_evidence, fit.reconstruct, fit.sample, fit.to_arviz)
    for ask in asked:
        with pytest.raises(ProgramError, match=says):
            ask(y[:3])
    # more data of the same groups are no other groups
    more = torch.cat([y, y + 0.1], 1)
    level = fit.params["level"]
    joint = dist.Normal(level[..., None] + t([-1.0, 1.0]), t(0.8)).log_prob(more[..., None])
    joint = joint + fit.params["weights"].log()
    found = fit.posterior(more).marginals("z")
    torch.testing.assert_close(found, joint.softmax(-1), atol=1e-10, rtol=0)


INITIAL, TRANSITION = t([0.6, 0.4]), t([[0.9, 0.1], [0.2, 0.8]])


def chain(y: Tensor) -> None:
    """Nothing says how many steps there are but the data."""
    loc = pyro.param("loc", lambda: t([-1.0, 1.2]))
    with pyro.plate("data", len(y)):
        emission = dist.Normal(loc, t(0.8))
        pyro.sample("y", HiddenMarkov(INITIAL.log(), TRANSITION.log(), emission), obs=y)


def masked_chain(y: Tensor) -> None:
    """The same inside wrappers."""
    loc = pyro.param("loc", lambda: t([-1.0, 1.2]))
    emission = dist.Normal(loc, t(0.8))
    chains = HiddenMarkov(INITIAL.log().expand(len(y), 2), TRANSITION.log(), emission)
    pyro.sample("y", chains.mask(torch.ones(len(y), dtype=torch.bool)).to_event(1), obs=y)


@pytest.mark.parametrize("model", [chain, masked_chain])
def test_new_sequences_are_as_long_as_the_data(model: Any) -> None:
    """The mean of step 4 is p A^3 loc, within 5 standard errors; new data have their own length."""
    y = Y.reshape(2, 4)
    fit = lvppl.EM(model).fit(y, max_iter=3, progress=False, seed=0)
    new = fit.sample(num_samples=3000, seed=1).predictive["y"]
    assert new.shape == (3000, 2, 4)
    mean = float(INITIAL @ torch.linalg.matrix_power(TRANSITION, 3) @ fit.params["loc"])
    last = new[..., 3]
    assert abs(float(last.mean()) - mean) < 5 * float(last.std()) / last.numel() ** 0.5
    assert fit.sample(Y.reshape(1, 8), seed=1).predictive["y"].shape == (1, 1, 8)


def test_a_chain_alone_asks_for_its_length() -> None:
    emission = dist.Normal(t([-1.0, 1.2]), t(0.8))
    chains = HiddenMarkov(INITIAL.log(), TRANSITION.log(), emission)
    with pytest.raises(ProgramError, match=r"num_steps=y\.shape\[1\].*with_steps\(T\)"):
        chains.sample()
    longer = chains.with_steps(5)
    assert longer.sample((3,)).shape == (3, 5) and longer.event_shape == (5,)
    assert chains.event_shape == (1,) and longer.with_steps(5).num_steps == 5
    y = Y[:5]
    assert torch.equal(longer.log_prob(y), chains.log_prob(y))
    with pytest.raises(ProgramError, match=r"has 5 steps by its arguments, not 6"):
        longer.with_steps(6)


# ------------------------------------------------------------------------------------ at a prompt


def test_what_a_prompt_shows(fit: Any) -> None:
    """Short, and no tensor's numbers."""
    posterior, evidence = fit.posterior(Y), fit.log_evidence(Y)
    total = f"{float(evidence):.6g} nats"
    assert repr(evidence) == f"LogEvidence(ln p(y) = {total}; 8 data of plate data)"
    assert repr(posterior) == (
        f"ExactPosterior(ln p(y) = {total}; 8 data of plate data; z (8,) of 2 states)"
    )
    best = posterior.map()
    assert repr(best) == f"Assignment(ln p(z, y) = {float(best.log_joint):.6g} nats; z (8,))"
    assert "1 datum of plate data" in repr(fit.log_evidence(Y[:1]))


def test_a_prompt_shows_the_first_of_many_sites() -> None:
    def long(y: Tensor) -> None:
        z = None
        for step in pyro.markov(range(len(y))):
            p = INITIAL if z is None else TRANSITION[z]
            z = pyro.sample(f"z_{step}", dist.Categorical(p))
            pyro.sample(f"y_{step}", dist.Normal(t([-1.0, 1.2])[z], t(0.8)), obs=y[step])

    posterior = lvppl.posterior(long, Y)
    shown = "; ".join(f"z_{step} () of 2 states" for step in range(5))
    assert repr(posterior) == (
        f"ExactPosterior(ln p(y) = {float(posterior.log_evidence):.6g} nats; the data set is one "
        f"datum; {shown}; ... (8 sites))"
    )
    assert repr(posterior.map()).endswith("z_4 (); ... (8 sites))")


def test_a_prompt_shows_what_is_integrated() -> None:
    def factor(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: t([0.0, 0.0]))
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(y.new_zeros(1), t(1.0)).to_event(1))
            pyro.sample("y", dist.Normal(loc + u, t(0.8)).to_event(1), obs=y)

    posterior = (
        lvppl.EM(factor).fit(Y.reshape(4, 2), max_iter=1, progress=False).posterior(Y.reshape(4, 2))
    )
    assert repr(posterior).endswith("4 data of plate data; u (4, 1) integrated)")


# ------------------------------------------------------------------------- information criteria


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_information_criteria_are_those_of_scikit_learn(covariance):
    """From our parameters, by scikit-learn's own count and formula."""
    from sklearn.mixture import GaussianMixture as Peer

    y = torch.cat([torch.randn(60, 3), torch.randn(40, 3) + 3]).double()
    model = lvppl.models.GaussianMixture.from_data(y, 2, covariance=covariance, seed=0)
    fit = lvppl.EM(model, floor=0.0).fit(y, seed=0, max_iter=20, progress=False)
    peer = Peer(2, covariance_type=covariance, reg_covar=0.0, random_state=0).fit(y.numpy())
    scale = getattr(model, "scale_tril", None)
    inverse = torch.linalg.inv(scale).mT if scale is not None else 1 / model.scale
    peer.weights_, peer.means_ = model.weights.detach().numpy(), model.loc.detach().numpy()
    peer.precisions_cholesky_ = inverse.detach().numpy()
    assert fit.num_free == peer._n_parameters()
    assert fit.bic(y) == pytest.approx(peer.bic(y.numpy()), rel=1e-8)
    assert fit.aic(y) == pytest.approx(peer.aic(y.numpy()), rel=1e-8)


def test_free_numbers_by_constraint():
    import torch.distributions.constraints as torchs
    from pyro.distributions import constraints

    from lvppl.inference.information import num_free

    rows = torch.full((4, 5), 0.2)
    assert num_free(rows, constraints.simplex) == 16
    assert num_free(rows, torchs.independent(torchs.simplex, 1)) == 16
    eye = torch.eye(3).expand(2, 3, 3)
    assert num_free(eye, constraints.positive_definite) == 12
    assert num_free(eye, constraints.softplus_lower_cholesky) == 12
    assert num_free(eye, constraints.corr_cholesky) == 6
    assert num_free(torch.ones(()), constraints.positive) == 1


def test_bic_of_one_datum_is_refused():
    def chain(y):
        weights = pyro.param("w", torch.ones(2) / 2, dist.constraints.simplex)
        z = pyro.sample("z", dist.Categorical(weights))
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        with pyro.plate("steps", len(y)):
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    y = torch.randn(10)
    fit = lvppl.EM(chain).fit(y, seed=0, progress=False)
    with pytest.raises(ProgramError, match="the whole data set is one datum"):
        fit.bic(y)
    assert fit.aic(y) == pytest.approx(2 * fit.num_free - 2 * float(fit.log_evidence(y)))


def test_what_no_data_bear_upon_is_not_counted():
    def model(y):
        logits = pyro.param("logits", torch.zeros(2))
        loc = pyro.param("loc", torch.tensor([-1.0, 1.0]))
        pyro.param("unused", torch.ones(7))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    fit = lvppl.EM(model).fit(torch.randn(20), max_iter=2, seed=0, progress=False)
    assert fit.num_free == 1 + 2

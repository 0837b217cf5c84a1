"""Questions to an EM fit: answered exactly, or refused with what to ask instead."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import lvppl
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

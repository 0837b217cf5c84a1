"""Exports of EM fits against running every assignment.

Frequencies of draws are compared by Bernstein's inequality, at a chance of 2e-8 for each of fewer
than a thousand numbers; means of continuous draws at K = 5 standard errors.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch import Tensor
from torch.distributions import constraints

import lvppl
from lvppl.distributions import HiddenMarkov
from lvppl.errors import ProgramError
from tests.enumerable import (
    PROGRAMS,
    Program,
    latent_sites,
    log_joint,
    set_parameters,
    simplex,
    t,
)

K = 5.0
CHANCE = 2e-8
DRAWS = 300
GROUPS = {
    "posterior",
    "posterior_predictive",
    "prior",
    "prior_predictive",
    "log_evidence",
    "sample_stats",
    "observed_data",
    "responsibilities",
    "parameters",
    "restarts",
}
Y = torch.tensor([-2.1, 1.8, -1.7, 2.6, 1.1, -2.4, 2.0, 0.1], dtype=torch.float64)

every = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)


def groups_of(export: Any) -> set[str]:
    return set(export.children if isinstance(export, xr.DataTree) else export.groups())


def deviation(p: np.ndarray, count: int) -> np.ndarray:
    """How far a frequency is from p in all but a CHANCE of cases (Bernstein)."""
    log = math.log(2 / CHANCE)
    return np.sqrt(2 * p * (1 - p).clip(0) * log / count) + 2 * log / (3 * count)


def mixture(y: Tensor) -> None:
    weights = simplex("weights", [0.6, 0.4])
    loc = pyro.param("loc", lambda: t([-1.0, 1.2]))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], 0.8), obs=y)


def with_prior(y: Tensor) -> None:
    """The locations are latents, and become parameters."""
    weights = simplex("weights", [0.6, 0.4])
    with pyro.plate("components", 2, dim=-2):
        loc = pyro.sample("loc", dist.Normal(t(0.0), 3.0))
    with pyro.plate("data", len(y), dim=-1):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[..., 0][z], 0.8), obs=y)


def fitted(model: Any, *data: Any, **options: Any) -> Any:
    options = {"init": "kmeans++", "restarts": 3, **options}
    return lvppl.EM(model, **options).fit(*data, max_iter=3, seed=0, progress=False)


# ------------------------------------------------------------------- against running everything


@functools.cache
def exported(name: str) -> tuple[Any, Any, Any]:
    """A fit of two iterations, its export, and the program with the fit's parameters."""
    started = PROGRAMS[name].start()
    fit = lvppl.EM(started.model).fit(*started.args, max_iter=2, seed=0, progress=False)
    return fit, fit.to_arviz(*started.args, num_samples=DRAWS, seed=3), started.args


def at(program: Program, params: dict[str, Tensor]) -> Any:
    started = program.start()
    set_parameters(params)
    return started


@every
def test_draws_and_responsibilities_are_of_the_posterior(program: Program) -> None:
    fit, export, _ = exported(program.name)
    started = at(program, fit.params)
    exact = started.exact()
    for site, latent in exact.latents.items():
        marginal = exact.marginals(site).numpy()
        found = export["responsibilities"][f"{site}_responsibilities"]
        np.testing.assert_allclose(found.values, marginal, atol=1e-9)
        drawn = export["posterior"][site]
        assert drawn.dims[:2] == ("chain", "draw") and drawn.shape[:2] == (1, DRAWS)
        assert found.dims == (*drawn.dims[2:], f"{site}_state")
        hot = drawn.values[0][..., None] == latent.support.numpy()
        assert (np.abs(hot.mean(0) - marginal) <= deviation(marginal, DRAWS)).all()


@every
def test_log_p_and_log_q_are_of_the_draws(program: Program) -> None:
    """ln p(y, z) by running the program at each draw, ln q = ln p(y, z) - ln p(y)."""
    fit, export, args = exported(program.name)
    started = at(program, fit.params)
    latents = latent_sites(started.model, args)
    stats = export["sample_stats"]
    for draw in range(5):
        values = {
            name: torch.tensor(export["posterior"][name].values[0, draw]).reshape(latent.shape)
            for name, latent in latents.items()
        }
        options = {"masked_latents": program.masked_latents}
        with torch.no_grad():
            expected, scale = log_joint(started.model, args, values, **options)
        found = float(stats["log_p"].values[0, draw].sum())
        assert found == pytest.approx(scale * float(expected), abs=1e-9)
    total = float(fit.log_evidence(*args))
    axes = tuple(range(2, stats["log_p"].ndim))
    gap = (stats["log_p"] - stats["log_q"]).values.sum(axes)
    np.testing.assert_allclose(gap, np.full((1, DRAWS), total), atol=1e-9)


@every
def test_the_evidence_of_each_datum(program: Program) -> None:
    fit, export, args = exported(program.name)
    (found,) = export["log_evidence"].data_vars.values()
    assert found.dims == program.data_plates
    assert np.array_equal(found.values.flatten(), fit.log_evidence(*args).per_datum.numpy())
    observed = list(export["observed_data"].data_vars)
    assert found.name == (observed[0] if len(observed) == 1 else "all_observed")
    says = export["log_evidence"].attrs["log_evidence"]
    assert ("is one datum" in says) == (not program.data_plates)
    assert "no LOO" in says


@every
def test_every_program_has_a_summary_and_a_file(program: Program, tmp_path: Any) -> None:
    _, export, _ = exported(program.name)
    factors = {"prior", "prior_predictive"} if program.name == "with_factor" else set()
    assert GROUPS - factors <= groups_of(export) <= GROUPS | {"constant_data"}
    assert ("pyro.factor extra" in export.attrs["notes"]) == bool(factors)
    assert len(az.summary(export, kind="stats")) > 0
    export.to_netcdf(str(tmp_path / "fit.nc"))
    again = az.from_netcdf(str(tmp_path / "fit.nc"))
    assert groups_of(again) == groups_of(export)
    for group in groups_of(export):
        for name, value in export[group].data_vars.items():
            xr.testing.assert_equal(again[group][name], value)
        assert again[group].attrs.keys() == export[group].attrs.keys()


# ---------------------------------------------------------------------- predictions


def test_predictions_belong_to_the_draws() -> None:
    """With little noise a predicted y lies at the location of the latent of the same draw."""

    def sharp(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: t([-2.0, 2.0]))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.5, 0.5])))
            pyro.sample("rough", dist.Normal(loc[z], 4.0), obs=y)
            pyro.sample("y", dist.Normal(loc[z], 1e-3).mask(False), obs=y)

    fit = fitted(sharp, Y)
    export = fit.to_arviz(Y, num_samples=600)
    z = export["posterior"]["z"].values
    assert 0 < z.mean() < 1
    gap = export["posterior_predictive"]["y"].values - fit.params["loc"].numpy()[z]
    assert np.abs(gap).max() < 1e-2  # ten of its standard deviations
    rough = export["posterior_predictive"]["rough"].values - fit.params["loc"].numpy()[z]
    assert abs(rough.mean()) < K * 4.0 / math.sqrt(rough.size)
    assert abs(rough.std() - 4.0) < K * 4.0 / math.sqrt(2 * rough.size)


def test_predictions_have_the_mean_of_the_reconstruction() -> None:
    fit = fitted(mixture, Y)
    export = fit.to_arviz(Y, num_samples=2000)
    predicted = export["posterior_predictive"]["y"].values[0]
    error = predicted.std(0) / math.sqrt(2000)
    mean = fit.posterior(Y).marginals("z") @ fit.params["loc"]
    assert (np.abs(predicted.mean(0) - mean.numpy()) < K * error).all()
    new = export["prior_predictive"]["y"].values
    share = float((fit.params["weights"] * fit.params["loc"]).sum())
    assert abs(new.mean() - share) < K * new.std() / math.sqrt(new.size)


def test_a_program_that_bears_no_particles_runs_draw_by_draw() -> None:
    def wary(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: t([-1.0, 1.2]))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.4, 0.6])))
            if z.dim() > 1 and z.shape[-1] > 1:
                raise ValueError("one draw at a time, please")
            pyro.sample("y", dist.Normal(loc[z], 0.8), obs=y)

    def bold(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: t([-1.0, 1.2]))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.4, 0.6])))
            pyro.sample("y", dist.Normal(loc[z], 0.8), obs=y)

    first, second = (fitted(m, Y).to_arviz(Y, num_samples=7, prior=False) for m in (wary, bold))
    assert "one draw at a time, please" in first.attrs["notes"]
    assert second.attrs["notes"] == ""
    for name in ("log_p", "log_q"):
        np.testing.assert_allclose(first["sample_stats"][name], second["sample_stats"][name])
    xr.testing.assert_equal(first["posterior"]["z"], second["posterior"]["z"])
    assert first["posterior_predictive"]["y"].shape == (1, 7, len(Y))


# ---------------------------------------------------------------------- parameters, restarts


def test_parameters_and_restarts_are_no_draws() -> None:
    fit = fitted(mixture, Y)
    export = fit.to_arviz(Y, num_samples=5, coords={"loc_dim_0": ["low", "high"]})
    assert export["parameters"]["loc"].dims == ("loc_dim_0",)
    assert list(export["parameters"]["loc_dim_0"].values) == ["low", "high"]
    np.testing.assert_array_equal(export["parameters"]["loc"].values, fit.params["loc"])
    restarts = export["restarts"]
    assert restarts["loc"].dims == ("restart", "loc_dim_0")
    assert restarts["objective"].dims == ("restart",)
    for number, one in enumerate(fit.restarts):
        assert float(restarts["objective"][number]) == one.objective
        assert str(restarts["status"].values[number]) == one.status
        np.testing.assert_array_equal(restarts["weights"].values[number], one.params["weights"])
    kept = restarts.attrs["kept"]
    assert np.array_equal(restarts["loc"].values[kept], fit.params["loc"])
    assert float(restarts["objective"].max()) == fit.objective_value
    assert "not chains" in restarts.attrs["restarts"]
    assert export["posterior"].sizes["chain"] == 1
    assert "restart" not in export["posterior"].dims


def test_a_parameter_may_be_called_what_a_restart_has() -> None:
    def model(y: Tensor) -> None:
        objective = pyro.param("objective", lambda: t([-1.0, 1.2]))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.4, 0.6])))
            pyro.sample("y", dist.Normal(objective[z], 0.8), obs=y)

    fit = fitted(model, Y)
    restarts = fit.to_arviz(Y, num_samples=2)["restarts"]
    assert restarts["objective"].shape == (3, 2)
    assert list(restarts["restart_objective"].values) == [r.objective for r in fit.restarts]


def test_map_latents_are_points_with_their_plates() -> None:
    fit = fitted(with_prior, Y)
    export = fit.to_arviz(Y, num_samples=400, coords={"components": ["low", "high"]})
    assert set(export["posterior"].data_vars) == {"z"}
    assert export["parameters"]["loc"].dims == ("components",)
    assert export["restarts"]["loc"].dims == ("restart", "components")
    assert list(export["restarts"]["components"].values) == ["low", "high"]
    np.testing.assert_array_equal(export["parameters"]["loc"].values, fit.params["loc"].flatten())
    assert "loc: latents at their maximum a posteriori" in export["parameters"].attrs["parameters"]
    assert "ln p(θ)" in export.attrs["objective"]
    # the prior is the model's own, of the locations too
    assert export["prior"]["loc"].dims == ("chain", "draw", "components")
    loc = export["prior"]["loc"].values
    assert abs(loc.mean()) < K * 3.0 / math.sqrt(loc.size)
    assert abs(loc.std() - 3.0) < K * 3.0 / math.sqrt(2 * loc.size)
    # and a new sample is one at the estimates
    new = fit.sample(Y, num_samples=2000, seed=0)
    assert set(new.samples) == {"z"}
    gap = new.predictive["y"] - fit.params["loc"].flatten()[new.samples["z"]]
    assert abs(float(gap.mean())) < K * 0.8 / math.sqrt(gap.numel())
    assert abs(float(gap.std()) - 0.8) < K * 0.8 / math.sqrt(2 * gap.numel())


def factors(y: Tensor) -> None:
    """A factor u by datum, which is integrated."""
    slope = pyro.param("slope", lambda: t(0.7))
    loc = pyro.param("loc", lambda: t([-1.0, 1.2]))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(t([0.4, 0.6])))
        u = pyro.sample("u", dist.Normal(t(0.0), 1.0))
        pyro.sample("y", dist.Normal(loc[z] + slope * u, 0.8), obs=y)


def test_what_is_integrated_is_drawn_with_the_states() -> None:
    fit = fitted(factors, Y, init="model", restarts=1)
    export = fit.to_arviz(Y, num_samples=DRAWS)
    assert groups_of(export) >= GROUPS and export.attrs["notes"] == ""
    slope, loc = fit.params["slope"], fit.params["loc"]
    scale = (slope**2 + 0.8**2).sqrt()
    log_joint = dist.Normal(loc, scale).log_prob(Y[:, None]) + t([0.4, 0.6]).log()
    found = export["responsibilities"]["z_responsibilities"].values
    np.testing.assert_allclose(found, log_joint.softmax(-1), atol=1e-9)
    evidence = log_joint.logsumexp(-1)
    np.testing.assert_allclose(export["log_evidence"]["y"].values, evidence, atol=1e-9)
    z, u = (torch.tensor(export["posterior"][name].values[0]) for name in ("z", "u"))
    hot = torch.nn.functional.one_hot(z, 2).double().mean(0).numpy()
    assert (np.abs(hot - found) <= deviation(found, DRAWS)).all()
    # u - E[u | z, y] is of N(0, 1 / precision)
    precision = 1 + slope**2 / 0.8**2
    gap = u - slope / 0.8**2 * (Y - loc[z]) / precision
    assert abs(float(gap.mean())) < K / math.sqrt(float(precision) * gap.numel())
    # ln p(y, z, u) of each draw, and its ln p(z, u | y)
    log_p = dist.Normal(loc[z] + slope * u, 0.8).log_prob(Y) + dist.Normal(0.0, 1.0).log_prob(u)
    log_p = log_p + t([0.4, 0.6]).log()[z]
    stats = export["sample_stats"]
    np.testing.assert_allclose(stats["log_p"].values[0], log_p, atol=1e-9)
    np.testing.assert_allclose(stats["log_q"].values[0], log_p - evidence, atol=1e-9)
    new = torch.tensor(export["posterior_predictive"]["y"].values[0]) - loc[z] - slope * u
    assert abs(float(new.mean())) < K * 0.8 / math.sqrt(new.numel())
    assert set(export["prior"].data_vars) == {"z", "u"}


def test_latents_without_a_density_of_their_own_are_not_drawn() -> None:
    def two(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: t(0.4))
        with pyro.plate("data", len(y)):
            u, v = (pyro.sample(name, dist.Normal(t(0.0), 1.0)) for name in "uv")
            pyro.sample("y", dist.Normal(loc + u + v, 0.8), obs=y)

    fit = fitted(two, Y, init="model", restarts=1)
    export = fit.to_arviz(Y, num_samples=3)
    assert "sample_stats: Given the data, the integrated latent 'u'" in export.attrs["notes"]
    assert not groups_of(export) & {"posterior", "posterior_predictive", "sample_stats"}
    expected = dist.Normal(fit.params["loc"], math.sqrt(2 + 0.8**2)).log_prob(Y)
    np.testing.assert_allclose(export["log_evidence"]["y"].values, expected, atol=1e-9)


def test_states_inside_a_distribution_are_drawn() -> None:
    def inside(y: Tensor) -> None:
        weights, loc = simplex("weights", [0.6, 0.4]), pyro.param("loc", lambda: t([-1.0, 1.2]))
        parts = dist.Categorical(weights), dist.Normal(loc, t(0.8))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.MixtureSameFamily(*parts), obs=y)

    fit = fitted(inside, Y, init="model", restarts=1)
    export = fit.to_arviz(Y, num_samples=DRAWS)
    assert "y_component are no sites of the program" in export.attrs["notes"]
    assert not groups_of(export) & {"posterior_predictive", "sample_stats"}
    log_joint = dist.Normal(fit.params["loc"], t(0.8)).log_prob(Y[:, None])
    log_joint = log_joint + fit.params["weights"].log()
    found = export["log_evidence"]["y"]
    np.testing.assert_allclose(found.values, log_joint.logsumexp(-1), atol=1e-9)
    marginal = export["responsibilities"]["y_component_responsibilities"]
    assert marginal.dims == ("data", "y_component_state")
    np.testing.assert_allclose(marginal.values, log_joint.softmax(-1), atol=1e-9)
    hot = export["posterior"]["y_component"].values[0][..., None] == np.arange(2)
    assert (np.abs(hot.mean(0) - marginal.values) <= deviation(marginal.values, DRAWS)).all()
    assert export["prior_predictive"]["y"].shape == (1, DRAWS, len(Y))


def test_a_chain_has_its_length_from_the_data() -> None:
    p, A = t([0.6, 0.4]), t([[0.9, 0.1], [0.2, 0.8]])

    def chain(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: t([-1.0, 1.2]))
        with pyro.plate("sequences", len(y)):
            emission = dist.Normal(loc, t(0.8))
            pyro.sample("y", HiddenMarkov(p.log(), A.log(), emission), obs=y)

    y = Y.reshape(2, 4)
    fit = fitted(chain, y, init="model", restarts=1)
    export = fit.to_arviz(y, num_samples=DRAWS, seed=3)
    drawn, marginal = export["posterior"]["y_states"], export["responsibilities"]
    assert drawn.dims == ("chain", "draw", "sequences", "y_states_dim_0")
    marginal = marginal["y_states_responsibilities"]
    assert marginal.dims == ("sequences", "y_states_dim_0", "y_states_state")
    emission = dist.Normal(fit.params["loc"], t(0.8))
    expected = HiddenMarkov(p.log(), A.log(), emission).posterior(y)
    np.testing.assert_allclose(marginal.values, expected.marginals, atol=1e-9)
    np.testing.assert_allclose(export["log_evidence"]["y"].values, expected.log_evidence)
    hot = drawn.values[0][..., None] == np.arange(2)
    assert (np.abs(hot.mean(0) - marginal.values) <= deviation(marginal.values, DRAWS)).all()
    new = export["prior_predictive"]["y"].values
    assert new.shape == (1, DRAWS, 2, 4)
    # of the last step: p A³ says how often each state is there
    mean = float(p @ torch.linalg.matrix_power(A, 3) @ fit.params["loc"])
    assert abs(new[..., 3].mean() - mean) < K * new[..., 3].std() / math.sqrt(new[..., 3].size)


def test_attributes() -> None:
    fit = fitted(mixture, Y)
    export = lvppl.to_arviz(fit, Y, num_samples=4, seed=9)
    for attrs in (export.attrs, export["posterior"].attrs, export["parameters"].attrs):
        assert attrs["method"] == "expectation maximisation"
        assert attrs["objective"] == "ln p(y)"
        assert attrs["objective_value"] == fit.objective_value
        assert (attrs["status"], attrs["seed"], attrs["draws_seed"]) == (fit.status, 0, 9)
        assert attrs["loo"].startswith("no meaning, and so no group log_likelihood: the param")
        assert "log_evidence on held-out data" in attrs["loo"]
        assert all(type(value) in (int, float, str) for value in attrs.values())
    for criterion in (az.loo, az.waic):  # there is nothing that they could average
        with pytest.raises(TypeError, match="log likelihood not found"):
            criterion(export)


# ---------------------------------------------------------------------- other data, seeds, options


def test_new_data_and_seeds() -> None:
    fit = fitted(mixture, Y)
    before = torch.get_rng_state()
    first, again, other = (fit.to_arviz(Y[:3], num_samples=50, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for group in ("posterior", "posterior_predictive", "prior"):
        xr.testing.assert_identical(_dataset(first, group), _dataset(again, group))
    new = (export["posterior_predictive"]["y"].values for export in (first, other))
    assert not np.array_equal(*new)
    assert first["posterior"]["z"].shape == (1, 50, 3)
    one = fit.to_arviz(Y[:3], num_samples=1, prior=False)
    assert one["posterior_predictive"]["y"].shape == (1, 1, 3)
    assert "prior" not in groups_of(one)


def _dataset(export: Any, group: str) -> Any:
    found = export[group]
    return found.to_dataset() if isinstance(found, xr.DataTree) else found


def test_arguments_are_constant_data() -> None:
    def regression(x: Tensor, y: Tensor) -> None:
        slope = pyro.param("slope", lambda: t([-1.0, 1.2]))
        scale = pyro.param("scale", lambda: t(0.8), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.4, 0.6])))
            pyro.sample("y", dist.Normal(slope[z] * x, scale), obs=y)

    x = torch.linspace(0.5, 2, 8, dtype=torch.float64)
    export = fitted(regression, x, Y, init="model", restarts=1).to_arviz(x, Y, num_samples=2)
    assert list(export["constant_data"].data_vars) == ["x"]
    assert export["constant_data"]["x"].dims == ("data",)


def test_options_that_have_no_use() -> None:
    fit = fitted(mixture, Y)
    with pytest.raises(ProgramError, match="batch_size=4 has no use here"):
        fit.to_arviz(Y, batch_size=4)
    with pytest.raises(ProgramError, match="num_samples must be a whole number"):
        fit.to_arviz(Y, num_samples=0)
    with pytest.raises(ProgramError, match=r"coords\['data'\] has 2 labels for 8"):
        fit.to_arviz(Y, num_samples=2, coords={"data": [1, 2]})


def test_either_version_carries_the_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    fit = fitted(mixture, Y)
    asked: dict[str, Any] = {}

    class InferenceData:
        def __init__(self, attrs: dict[str, Any], **groups: xr.Dataset) -> None:
            asked.update(groups)

    old = types.SimpleNamespace(__version__="0.22.0", InferenceData=InferenceData)
    monkeypatch.setitem(sys.modules, "arviz", old)
    fit.to_arviz(Y, num_samples=5)
    monkeypatch.setitem(sys.modules, "arviz", types.SimpleNamespace(__version__="1.3.0"))
    tree = fit.to_arviz(Y, num_samples=5)
    assert isinstance(tree, xr.DataTree)
    assert set(tree.children) == set(asked) == GROUPS
    tree.to_netcdf(str(tmp_path / "tree.nc"))
    again = xr.open_datatree(str(tmp_path / "tree.nc"))
    for name, dataset in asked.items():
        xr.testing.assert_identical(tree[name].to_dataset(), dataset)
        assert set(again[name].data_vars) == set(dataset.data_vars)

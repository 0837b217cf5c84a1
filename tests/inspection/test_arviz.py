"""Exports against closed forms: leave-one-out densities, reweighted draws, dims, files.

The model of most tests is conjugate: theta ~ N(m, s0²), y_n ~ N(theta, s²). Leaving y_n out, theta
is Normal and the predictive density of y_n is too. With local latents, z_n ~ N(theta, t²) and
y_n ~ N(z_n, r²) with t² + r² = s² has the same answer after the z_n are integrated out.

Statistical assertions allow K = 5 standard errors at a fixed seed, of fewer than 100 numbers.
"""

from __future__ import annotations

import functools
import math
import sys
import types
from collections.abc import Callable
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inspection.arviz import to_arviz
from tests.programs import PROGRAMS

K = 5.0
DOUBLE = torch.float64
MEAN, SCALE, NOISE, SPREAD = 0.5, 2.0, 1.5, 1.0  # m, s0, s, t
REST = math.sqrt(NOISE**2 - SPREAD**2)  # r
Y = torch.tensor([1.8, 0.2, -0.7, 2.5, 1.1, 0.4, 3.0], dtype=DOUBLE)


def record(model: Callable[..., Any], guide: Callable[..., Any] | None, **fields: Any) -> Any:
    """What an export reads of a fit."""
    known = {"params": {}, "status": "converged", "reason": "", "seed": 3, "objective": "ELBO"}
    return types.SimpleNamespace(model=model, guide=guide, **{**known, **fields})


def posterior(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of theta."""
    variance = 1 / (1 / SCALE**2 + len(y) / torch.tensor(NOISE**2, dtype=DOUBLE))
    return variance * (MEAN / SCALE**2 + y.sum() / NOISE**2), variance


def exact_loo(y: Tensor) -> Tensor:
    """ln p(y_n | all others), (data,)."""
    terms = []
    for n in range(len(y)):
        mean, variance = posterior(torch.cat([y[:n], y[n + 1 :]]))
        terms.append(dist.Normal(mean, (variance + NOISE**2).sqrt()).log_prob(y[n]))
    return torch.stack(terms)


def shared(y: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.tensor(MEAN, dtype=DOUBLE), SCALE))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(theta, NOISE), obs=y)


def with_locals(y: Tensor) -> None:
    theta = pyro.sample("theta", dist.Normal(torch.tensor(MEAN, dtype=DOUBLE), SCALE))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(theta, SPREAD))
        pyro.sample("y", dist.Normal(z, REST), obs=y)


def theta_guide(shift: float, stretch: float) -> Callable[[Tensor], None]:
    """The exact posterior of theta, moved and stretched by its own standard deviations."""

    def guide(y: Tensor) -> None:
        mean, variance = posterior(y)
        pyro.sample("theta", dist.Normal(mean + shift * variance.sqrt(), stretch * variance.sqrt()))

    return guide


def local_guide(shift: float, stretch: float) -> Callable[[Tensor], None]:
    def guide(y: Tensor) -> None:
        theta_guide(shift, stretch)(y)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.6 * y, 1.2))

    return guide


def with_factors(y: Tensor) -> None:
    """with_locals, its prior of theta written as a flat-tailed one times a global factor."""
    theta = pyro.sample("theta", dist.Normal(torch.tensor(MEAN, dtype=DOUBLE), 2 * SCALE))
    pyro.factor("sharpened", -1.5 * ((theta - MEAN) / (2 * SCALE)) ** 2)  # to SCALE, up to a factor
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(theta, SPREAD))
        pyro.sample("y", dist.Normal(z, REST), obs=y)


GLOBAL_CASES = {
    "exact": (shared, theta_guide(0.0, 1.0)),
    "wide and moved": (shared, theta_guide(0.3, 1.3)),
    "with locals": (with_locals, local_guide(0.2, 1.2)),
    "with a factor": (with_factors, local_guide(0.2, 1.2)),
}


# ---------------------------------------------------------------------- LOO


@functools.cache
def exported(case: str) -> Any:
    model, guide = GLOBAL_CASES[case]
    draws, inner = (2000, 2) if model is shared else (500, 200)
    fit = record(model, guide)
    return to_arviz(fit, Y, num_samples=draws, num_inner=inner, seed=2, prior=False)


def loo_standard_error(log_likelihood: np.ndarray, ess: float) -> float:
    """Delta-method standard error of the sum over n of ln of 1 / mean(1 / p_n)."""
    inverse = np.exp(-log_likelihood)
    scores = (inverse / inverse.mean(0) - 1).sum(-1)
    return float(scores.std() / math.sqrt(ess))


@pytest.mark.parametrize("case", GLOBAL_CASES)
def test_loo_is_the_leave_one_out_predictive_density(case: str) -> None:
    model, _ = GLOBAL_CASES[case]
    export = exported(case)
    attrs = export["posterior"].attrs
    loo = az.loo(export, pointwise=True)
    elpd = float(getattr(loo, "elpd_loo", getattr(loo, "elpd", None)))
    pointwise = export["log_likelihood"]["y"].values[0]
    error = loo_standard_error(pointwise, attrs["importance_ess"])
    # Each inner estimate of p(y_n | theta) has a relative error of its own, at most this much.
    error += 0.0 if model is shared else len(Y) * 0.6 / math.sqrt(200 * 500)
    assert abs(elpd - float(exact_loo(Y).sum())) < K * error
    assert error < 0.2  # or the test would say nothing
    assert attrs["loo"].startswith("az.loo estimates")
    assert attrs["importance_khat"] < attrs["importance_khat_threshold"]
    assert "data" in attrs["loo"]


@pytest.mark.parametrize("case", GLOBAL_CASES)
def test_reweighted_draws_are_of_the_posterior(case: str) -> None:
    model, _ = GLOBAL_CASES[case]
    export = exported(case)
    theta = export["posterior"]["theta"].values[0]
    ess = export["posterior"].attrs["importance_ess"]
    mean, variance = posterior(Y)
    # Systematic resampling adds less variance than the weights have.
    assert abs(theta.mean() - float(mean)) < K * math.sqrt(float(variance) / ess)
    assert abs(theta.var() - float(variance)) < K * float(variance) * math.sqrt(2 / ess)
    if model is with_locals:
        z = export["posterior"]["z"].values[0]
        gain = SPREAD**2 / NOISE**2
        local_mean = gain * Y + (1 - gain) * mean
        local_variance = gain * REST**2 + (1 - gain) ** 2 * variance
        gap = np.abs(z.mean(0) - local_mean.numpy())
        assert (gap < K * math.sqrt(float(local_variance) / ess)).all()
        gap = np.abs(z.var(0) - float(local_variance))
        assert (gap < K * float(local_variance) * math.sqrt(2 / ess)).all()


def test_exact_guide_keeps_every_draw_once() -> None:
    export = to_arviz(record(shared, theta_guide(0.0, 1.0)), Y, num_samples=300, seed=0)
    theta = export["posterior"]["theta"].values[0]
    assert len(np.unique(theta)) == 300
    assert export["posterior"].attrs["importance_ess"] == pytest.approx(300)
    stats = export["sample_stats"]
    mean, variance = posterior(Y)
    log_q = dist.Normal(mean, variance.sqrt()).log_prob(torch.tensor(theta))
    np.testing.assert_allclose(stats["log_q"].values[0], log_q)
    np.testing.assert_allclose(stats["log_p"] - stats["log_q"], stats["log_weight"])
    covariance = NOISE**2 * torch.eye(7, dtype=DOUBLE) + SCALE**2
    evidence = dist.MultivariateNormal(torch.full((7,), MEAN, dtype=DOUBLE), covariance).log_prob(Y)
    np.testing.assert_allclose(stats["log_weight"].values, float(evidence))
    expected = dist.Normal(torch.tensor(theta)[:, None], NOISE).log_prob(Y)
    np.testing.assert_allclose(export["log_likelihood"]["y"].values[0], expected)


def test_locals_are_integrated_out_of_the_pointwise_likelihood() -> None:
    """With the exact conditional q(z | y, theta) every inner weight is p(y_n | theta)."""

    def exact(y: Tensor) -> None:
        mean, variance = posterior(y)
        theta = pyro.sample("theta", dist.Normal(mean, variance.sqrt()))
        gain = SPREAD**2 / NOISE**2
        with pyro.plate("data", len(y)):
            scale = math.sqrt(gain) * REST
            pyro.sample("z", dist.Normal(gain * y + (1 - gain) * theta, scale))

    export = to_arviz(record(with_locals, exact), Y, num_samples=40, num_inner=2, prior=False)
    theta = torch.tensor(export["posterior"]["theta"].values[0])
    expected = dist.Normal(theta[:, None], NOISE).log_prob(Y)
    np.testing.assert_allclose(export["log_likelihood"]["y"].values[0], expected, atol=1e-12)
    assert "integrated out" in export["log_likelihood"].attrs["log_likelihood"]
    assert export["posterior_predictive"]["y"].shape == (1, 40, 7)


def test_enumerated_locals_are_summed_exactly() -> None:
    weights = torch.tensor([0.3, 0.7], dtype=DOUBLE)

    def mixture(y: Tensor) -> None:
        locs = pyro.sample("locs", dist.Normal(torch.zeros(2, dtype=DOUBLE), 2.0).to_event(1))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
            loc = torch.where(k == 0, locs[..., 0:1], locs[..., 1:2])
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("locs", dist.Normal(torch.tensor([-0.5, 1.5], dtype=DOUBLE), 0.3).to_event(1))

    export = to_arviz(record(mixture, guide), Y, num_samples=30, prior=False)
    locs = torch.tensor(export["posterior"]["locs"].values[0])
    parts = dist.Normal(locs[:, None, :], 1.0).log_prob(Y[:, None]) + weights.log()
    np.testing.assert_allclose(export["log_likelihood"]["y"].values[0], parts.logsumexp(-1))
    assert export["posterior"]["k"].dims == ("chain", "draw", "data")


# ---------------------------------------------------------------------- where LOO fails


def test_point_parameters_have_no_loo() -> None:
    started = PROGRAMS["normal_normal"].start()
    model, guide, *data = started.call
    export = to_arviz(record(model, guide), *data, num_samples=10)
    attrs = export["posterior"].attrs
    assert attrs["loo"].startswith("no meaning: the parameters are point estimates (")
    assert "prior_loc" in attrs["loo"] and "held-out" in attrs["loo"]
    assert "conditional on local latents" in export["log_likelihood"].attrs["log_likelihood"]
    assert "importance_khat" not in attrs
    assert export["log_likelihood"]["y"].dims == ("chain", "draw", "data")


def test_point_guides_over_globals_have_no_loo() -> None:
    guide = AutoDelta(shared)
    guide(Y)
    attrs = to_arviz(record(shared, guide), Y, num_samples=10)["posterior"].attrs
    assert attrs["loo"].startswith("no meaning: the global latents theta are point estimates")


def test_a_joint_guide_over_locals_leaves_the_likelihood_out() -> None:
    guide = AutoMultivariateNormal(with_locals)
    guide(Y)
    export = to_arviz(record(with_locals, guide), Y, num_samples=10)
    groups = export.children if isinstance(export, xr.DataTree) else export.groups()
    assert "log_likelihood" not in groups and "posterior" in groups
    assert "outside its plate" in export["posterior"].attrs["loo"]
    assert set(export["posterior"].data_vars) == {"theta", "z"}


def test_a_mean_field_guide_over_both_is_taken_apart() -> None:
    guide = AutoNormal(with_locals)
    guide(Y)
    export = to_arviz(record(with_locals, guide), Y, num_samples=40, num_inner=20, prior=False)
    assert set(export["posterior"].data_vars) == {"theta", "z"}
    assert export["log_likelihood"]["y"].shape == (1, 40, 7)
    assert "importance_khat" in export["posterior"].attrs


def test_bad_weights_are_named() -> None:
    export = to_arviz(record(shared, theta_guide(4.0, 0.3)), Y, num_samples=400, prior=False)
    attrs = export["posterior"].attrs
    assert attrs["importance_khat"] > attrs["importance_khat_threshold"]
    assert attrs["loo"].startswith("unreliable: ")


# ---------------------------------------------------------------------- every program


def built_record(name: str) -> tuple[Any, tuple[Any, ...]]:
    started = PROGRAMS[name].start()
    model, guide, *data = started.call
    params = {key: value.detach() for key, value in pyro.get_param_store().items()}
    return record(model, guide, params=params), tuple(data)


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_has_a_summary_and_a_file(name: str, tmp_path: Any) -> None:
    fit, data = built_record(name)
    export = to_arviz(fit, *data, num_samples=24, num_inner=4)
    summary = az.summary(export)
    assert len(summary) == sum(v[0, 0].size for v in export["posterior"].data_vars.values())
    export.to_netcdf(str(tmp_path / "posterior.nc"))
    again = az.from_netcdf(str(tmp_path / "posterior.nc"))
    for group in ("posterior", "log_likelihood", "sample_stats", "observed_data"):
        for name, value in export[group].data_vars.items():
            xr.testing.assert_equal(again[group][name], value)
        assert again[group].attrs.keys() == export[group].attrs.keys()
    assert again["posterior"].attrs["loo"] == export["posterior"].attrs["loo"]


# ---------------------------------------------------------------------- dims, coords, groups


def test_dims_follow_plates_and_events() -> None:
    def nested(x: Tensor, *, y: Tensor) -> None:
        with pyro.plate("groups", 2, dim=-2):
            a = pyro.sample("a", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
            with pyro.plate("members", 4, dim=-1):
                loc = torch.stack([a.sum(-1) + x, a.sum(-1) - x], -1)
                pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)

    def guide(x: Tensor, *, y: Tensor) -> None:
        with pyro.plate("groups", 2, dim=-2):
            pyro.sample("a", dist.Normal(x.new_zeros(3), 1.0).to_event(1))

    x, y = torch.arange(4, dtype=DOUBLE), torch.ones(2, 4, 2, dtype=DOUBLE)
    coords = {"groups": ["left", "right"], "y_dim_0": ["up", "down"]}
    export = to_arviz(record(nested, guide), x, y=y, num_samples=5, coords=coords)
    drawn = ("chain", "draw")
    assert export["posterior"]["a"].dims == (*drawn, "groups", "a_dim_0")
    assert export["prior"]["a"].dims == (*drawn, "groups", "a_dim_0")
    for group in ("posterior_predictive", "prior_predictive"):
        assert export[group]["y"].dims == (*drawn, "groups", "members", "y_dim_0")
    assert export["log_likelihood"]["y"].dims == (*drawn, "groups", "members")
    assert export["observed_data"]["y"].dims == ("groups", "members", "y_dim_0")
    assert export["constant_data"]["x"].dims == ("members",)
    assert list(export["constant_data"].data_vars) == ["x"]
    np.testing.assert_array_equal(export["observed_data"]["y"].values, y)
    assert list(export["posterior"]["a"].coords["groups"].values) == ["left", "right"]
    assert list(export["observed_data"]["y"].coords["y_dim_0"].values) == ["up", "down"]
    assert export["posterior"].sizes["chain"] == 1
    with pytest.raises(ProgramError, match="3 labels for 2"):
        to_arviz(record(nested, guide), x, y=y, num_samples=5, coords={"groups": [1, 2, 3]})


def test_names_that_files_cannot_hold(tmp_path: Any) -> None:
    """An argument named like a plate would be taken for its coordinate, a slash for a group."""

    def model(data: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("net/z", dist.Normal(data, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(data: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("net/z", dist.Normal(data, 1.0))

    export = to_arviz(record(model, guide), 0.5 * Y, Y, num_samples=3)
    assert export["posterior"]["net|z"].dims == ("chain", "draw", "data")
    assert export["constant_data"]["data"].dims == ("data_plate",)
    export.to_netcdf(str(tmp_path / "clash.nc"))
    again = az.from_netcdf(str(tmp_path / "clash.nc"))
    np.testing.assert_array_equal(again["constant_data"]["data"].values, 0.5 * Y)


def test_attributes() -> None:
    fit = record(shared, theta_guide(0.0, 1.0), seed=None, status="max_steps", flag=True)
    export = to_arviz(fit, Y, num_samples=20, seed=5)
    for attrs in (export.attrs, export["posterior"].attrs, export["prior"].attrs):
        assert attrs["inference_library"] == "lvppl"
        assert attrs["method"] == "stochastic variational inference"
        assert (attrs["objective"], attrs["status"]) == ("ELBO", "max_steps")
        assert (attrs["seed"], attrs["draws_seed"]) == ("None", 5)
        assert attrs["r_hat"].startswith("no meaning")
        assert all(type(value) in (int, float, str) for value in attrs.values())


def test_draws_are_seeded_and_leave_the_generators_alone() -> None:
    fit = record(shared, theta_guide(0.2, 1.2))
    before = torch.get_rng_state()
    first, again, other = (to_arviz(fit, Y, num_samples=20, seed=s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    xr.testing.assert_equal(first["posterior"]["theta"], again["posterior"]["theta"])
    assert not np.array_equal(first["posterior"]["theta"], other["posterior"]["theta"])


def test_new_data_and_batches() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.5 * y, 0.7))

    whole = to_arviz(record(model, guide), Y, num_samples=6)
    parts = to_arviz(record(model, guide), Y, num_samples=6, batch_size=3)
    xr.testing.assert_allclose(whole["posterior"]["z"], parts["posterior"]["z"])
    xr.testing.assert_allclose(whole["log_likelihood"]["y"], parts["log_likelihood"]["y"])
    one = to_arviz(record(model, guide), Y[:1], num_samples=6)
    assert one["posterior"]["z"].shape == (1, 6, 1)


def test_a_program_without_latents_has_a_point_posterior() -> None:
    def model(y: Tensor) -> None:
        loc = pyro.param("loc", torch.tensor(0.3, dtype=DOUBLE))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    model(Y)
    fit = record(model, lambda y: None, params={"loc": pyro.param("loc")})
    export = to_arviz(fit, Y, num_samples=8)
    assert set(export["posterior"].data_vars) == {"loc"}
    assert "point estimates" in export["posterior"].attrs["posterior"]
    assert float(export["posterior"]["loc"].std()) == 0.0
    assert len(az.summary(export)) == 1


def test_a_global_factor_counts_in_the_weights() -> None:
    """ln p(theta) + the factor is ln N(theta; m, s0²) and a constant, ln 2 less."""
    options: dict[str, Any] = {"num_samples": 3, "num_inner": 50, "seed": 1, "prior": False}
    plain = to_arviz(record(with_locals, local_guide(0.0, 1.0)), Y, **options)
    weighed = to_arviz(record(with_factors, local_guide(0.0, 1.0)), Y, **options)
    np.testing.assert_array_equal(plain.posterior["theta"], weighed.posterior["theta"])
    gain = weighed.sample_stats["log_weight"] - plain.sample_stats["log_weight"]
    np.testing.assert_allclose(gain, -math.log(2), rtol=1e-9)


def test_a_factor_of_local_latents_outside_their_plate_is_not_taken_apart() -> None:
    def coupled(y: Tensor) -> None:
        theta = pyro.sample("theta", dist.Normal(torch.tensor(MEAN, dtype=DOUBLE), SCALE))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(theta, SPREAD))
            pyro.sample("y", dist.Normal(z, REST), obs=y)
        pyro.factor("total", -(z.sum(-1) ** 2))

    fit = record(coupled, local_guide(0.0, 1.0))
    data = to_arviz(fit, Y, num_samples=5, num_inner=4)
    assert "'total' weighs local latents" in data.attrs["loo"]
    assert not hasattr(data, "log_likelihood")


def test_needs_two_inner_draws() -> None:
    with pytest.raises(ProgramError, match="num_inner"):
        to_arviz(record(shared, theta_guide(0.0, 1.0)), Y, num_inner=1)


# ---------------------------------------------------------------------- both versions


def test_either_version_gets_its_own_container(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = record(shared, theta_guide(0.0, 1.0))
    asked = {}

    class InferenceData:
        def __init__(self, attrs: dict[str, Any], **groups: xr.Dataset) -> None:
            asked.update(attrs=attrs, groups=groups)

    old = types.SimpleNamespace(__version__="0.22.0", InferenceData=InferenceData)
    monkeypatch.setitem(sys.modules, "arviz", old)
    assert isinstance(to_arviz(fit, Y, num_samples=5), InferenceData)
    monkeypatch.setitem(sys.modules, "arviz", types.SimpleNamespace(__version__="1.3.0"))
    tree = to_arviz(fit, Y, num_samples=5)
    assert isinstance(tree, xr.DataTree)
    assert set(tree.children) == set(asked["groups"])
    assert tree.attrs == asked["attrs"]
    for name, dataset in asked["groups"].items():
        xr.testing.assert_identical(tree[name].to_dataset(), dataset)

"""What a fit says of its end: the value of its own parameters, and what may surprise about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import lvppl
from lvppl.distributions import HiddenMarkov
from lvppl.inference import em_loop
from lvppl.inference.gradient_step import raise_by_gradient
from lvppl.inference.m_step import MStep
from tests.enumerable import positive, real, simplex, t

Model = Callable[..., None]


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


TWO = torch.cat([drawn(40, seed=1) - 2, drawn(40, seed=2) + 2])


def run(model: Model, *data: Any, options: dict[str, Any] | None = None, **given: Any) -> Any:
    pyro.clear_param_store()
    given = {"seed": 0, "progress": False, "max_iter": 50, "tol": 0.0} | given
    return lvppl.EM(model, **(options or {})).fit(*data, **given)


def gaussians(loc: Any = (-1.0, 1.0), scale: Any = (1.0, 1.0)) -> Model:
    """A mixture of two Normals."""

    def model(y: Tensor) -> None:
        weights, centre = simplex("weights", [0.4, 0.6]), real("loc", loc)
        width = positive("scale", scale)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(centre[z], width[z]), obs=y)

    return model


def value(fit: Any, y: Tensor) -> float:
    """ln p(y) at a fit's parameters, by hand."""
    density = dist.Normal(fit.params["loc"], fit.params["scale"]).log_prob(y[:, None])
    return float((density + fit.params["weights"].log()).logsumexp(-1).sum())


def assert_valued(fit: Any, y: Tensor = TWO) -> None:
    """Its last value is that of its own parameters."""
    assert fit.objective_value == pytest.approx(value(fit, y), abs=1e-9)
    assert fit.restarts[-1].objective == pytest.approx(value(fit, y), abs=1e-9)


# ------------------------------------------------------------------- interrupts, and callbacks


class Interrupted:
    """Raises KeyboardInterrupt from the given calls on, counted from 1."""

    def __init__(self, function: Callable[..., Any], *calls: int) -> None:
        self.function, self.calls, self.count = function, calls, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count in self.calls:
            raise KeyboardInterrupt
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("batch_size", [None, 30])
def test_an_interrupted_e_step_leaves_the_last_valued_parameters(
    monkeypatch: pytest.MonkeyPatch, batch_size: int | None
):
    """E-step 4 is of the parameters after three M-steps: those after two are the last valued."""
    monkeypatch.setattr(em_loop, "expectation", Interrupted(em_loop.expectation, 4))
    fit = run(gaussians(), TWO, batch_size=batch_size)
    assert fit.status == "interrupted" and "2 iterations" in fit.reason
    assert fit.num_steps == 2 and len(fit.history["objective"]) == 3
    assert_valued(fit)
    monkeypatch.undo()
    two = run(gaussians(), TWO, max_iter=2, batch_size=batch_size)
    for name, expected in two.params.items():
        torch.testing.assert_close(fit.params[name], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("call", [4, 5, 6])
def test_an_interrupted_m_step_leaves_no_mixture_of_parameters(
    monkeypatch: pytest.MonkeyPatch, call: int
):
    """Weights that are new beside locations that are old have no place in a history."""
    counted = Interrupted(MStep.set, call)
    monkeypatch.setattr(MStep, "set", lambda step, *args: counted(step, *args))
    fit = run(gaussians(), TWO)
    assert fit.status == "interrupted"
    assert_valued(fit)


def test_an_interrupt_before_any_value_finds_that_of_the_start(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(em_loop, "expectation", Interrupted(em_loop.expectation, 1))
    fit = run(gaussians(), TWO)
    assert (fit.status, fit.num_steps) == ("interrupted", 0)
    assert_valued(fit)
    assert fit.params["loc"].tolist() == [-1.0, 1.0]


def test_a_second_interrupt_does_without_the_value(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(em_loop, "expectation", Interrupted(em_loop.expectation, 1, 2))
    fit = run(gaussians(), TWO)
    assert fit.status == "interrupted" and np.isnan(fit.objective_value)


@pytest.mark.parametrize("step", [2, 5, 7])
def test_an_interrupted_online_fit_is_valued(monkeypatch: pytest.MonkeyPatch, step: int):
    """At the parameters after the last whole step, of four in a pass."""
    monkeypatch.setattr(em_loop, "online_step", Interrupted(em_loop.online_step, step))
    fit = run(gaussians(), TWO, options={"online": True}, batch_size=20)
    assert (fit.status, fit.num_steps) == ("interrupted", (step - 1) // 4)
    assert_valued(fit)


@pytest.mark.parametrize(
    ("options", "given"),
    [({}, {}), ({}, {"batch_size": 30}), ({"online": True}, {"batch_size": 20})],
)
def test_callbacks_see_the_value_of_the_parameters_they_see(
    options: dict[str, Any], given: dict[str, Any]
):
    seen: list[tuple[int, str, float]] = []

    def look(fit: Any) -> None:
        seen.append((fit.num_steps, fit.status, fit.objective_value - value(fit, TWO)))
        if fit.num_steps == 4:
            raise StopIteration

    fit = run(gaussians(), TWO, options=options, callbacks=[look], **given)
    assert [entry[:2] for entry in seen] == [(i, "running") for i in range(1, 5)]
    assert max(abs(gap) for *_, gap in seen) < 1e-9
    assert_valued(fit)


def test_callbacks_cost_no_e_step(monkeypatch: pytest.MonkeyPatch):
    counted = Interrupted(em_loop.expectation)
    monkeypatch.setattr(em_loop, "expectation", counted)
    run(gaussians(), TWO, max_iter=5, callbacks=[lambda fit: fit.objective_value])
    assert counted.count == 6


def test_a_run_that_diverges_is_valued_where_it_is_left():
    """Without a floor the second component shrinks onto its datum."""
    y = torch.cat([TWO, t([40.0])])
    fit = run(gaussians((0.0, 40.0)), y, options={"floor": 0.0})
    assert fit.status == "diverged" and "EM(floor=...)" in fit.reason
    assert_valued(fit, y)


# --------------------------------------------------------------------------------- alike states


def both(y: Tensor, transition: list[list[float]]) -> None:
    A, loc, x = simplex("A", transition), real("loc", [0.0, 0.0]), None
    with pyro.plate("sequences", len(y)):
        for i in pyro.markov(range(y.shape[1])):
            x = pyro.sample(f"x_{i}", dist.Categorical(A[0] if x is None else A[x]))
            pyro.sample(f"y_{i}", dist.Normal(loc[x], 1.0), obs=y[:, i])


def a_chain(y: Tensor) -> None:
    both(y.reshape(-1, 4), [[0.3, 0.7], [0.3, 0.7]])


def a_hidden_markov_model(y: Tensor) -> None:
    rows, loc = simplex("A", [[0.3, 0.7], [0.3, 0.7]]), real("loc", [0.0, 0.0])
    series = y.reshape(-1, 4)
    with pyro.plate("sequences", len(series)):
        chain = HiddenMarkov(rows[0].log(), rows.log(), dist.Normal(loc, 1.0))
        pyro.sample("y", chain, obs=series)


def a_mixture_in_one_distribution(y: Tensor) -> None:
    weights, loc = simplex("weights", [0.3, 0.7]), real("loc", [0.0, 0.0])
    with pyro.plate("data", len(y)):
        mixed = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, 1.0))
        pyro.sample("y", mixed, obs=y)


def three_of_four(y: Tensor) -> None:
    weights, loc = simplex("weights", [0.25] * 4), real("loc", [0.0, 0.0, 2.0, 0.0])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def two_lines(y: Tensor) -> None:
    x = torch.linspace(-1, 1, len(y), dtype=y.dtype)
    slope, start = real("slope", [0.5, 0.5]), real("start", [0.0, 0.0])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(t([0.3, 0.7])))
        pyro.sample("y", dist.Normal(slope[z] * x + start[z], 1.0), obs=y)


def vectors(y: Tensor) -> None:
    loc = real("loc", [[0.0, 1.0], [0.0, 1.0]])
    tril = pyro.param("tril", torch.eye(2).double().repeat(2, 1, 1), constraints.lower_cholesky)
    with pyro.plate("data", len(y) // 2):
        z = pyro.sample("z", dist.Categorical(t([0.3, 0.7])))
        normal = dist.MultivariateNormal(loc[z], scale_tril=tril[z])
        pyro.sample("y", normal, obs=y.reshape(-1, 2))


def rows_of_a_table(y: Tensor) -> None:
    """Nothing that a bears upon is observed: it is its rows of z that are alike."""
    top, below = simplex("top", [0.5, 0.5]), simplex("below", [[0.2, 0.8], [0.2, 0.8]])
    loc = real("loc", [-1.0, 1.0])
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", dist.Categorical(top))
        z = pyro.sample("z", dist.Categorical(below[a]))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


def beside_another_family(y: Tensor) -> None:
    loc = real("loc", [0.5, 0.5])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(t([0.3, 0.7])))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)
        pyro.sample("again", dist.StudentT(4.0, 0.0, 2.0), obs=y)


ALIKE: dict[str, tuple[Model, str]] = {
    "Normals": (gaussians((0.0, 0.0)), "states 0 and 1 of 'z' are alike in 'loc' and 'scale'"),
    "a chain": (a_chain, "states 0 and 1 of 'x_0', 'x_1', 'x_2' and 'x_3' are alike in 'loc'"),
    "a hidden Markov model": (a_hidden_markov_model, "states 0 and 1 of 'y' are alike in 'loc'"),
    "a mixture distribution": (
        a_mixture_in_one_distribution,
        "states 0 and 1 of 'y' are alike in 'loc'",
    ),
    "three of four": (three_of_four, "states 0, 1 and 3 of 'z' are alike in 'loc'"),
    "two lines": (two_lines, "states 0 and 1 of 'z' are alike in 'slope' and 'start'"),
    "vectors": (vectors, "states 0 and 1 of 'z' are alike in 'loc' and 'tril'"),
    "rows of a table": (rows_of_a_table, "states 0 and 1 of 'a' are alike in 'below'"),
    "beside another site": (beside_another_family, "states 0 and 1 of 'z' are alike in 'loc'"),
}


@pytest.mark.parametrize("name", ALIKE)
def test_states_that_ended_alike_are_named(name: str):
    model, says = ALIKE[name]
    fit = run(model, TWO, tol=1e-6)
    assert f"{says}: " in fit.reason and "init='kmeans++'" in fit.reason, fit.reason


def by_design(y: Tensor) -> None:
    """Two states share one location: nothing was started alike."""
    loc = real("loc", [-1.0, 1.0])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.3, 0.3, 0.4])))
        pyro.sample("y", dist.Normal(loc[torch.tensor([0, 0, 1])[z]], 1.0), obs=y)


def told_apart_by_another(y: Tensor) -> None:
    loc, other = real("loc", [0.0, 0.0]), real("other", [-1.0, 1.0])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y.abs())
        pyro.sample("again", dist.Normal(other[z], 1.0), obs=y)


def constant_features(y: Tensor) -> None:
    """Features may be alike, as long as states are not."""
    loc = real("loc", [[-1.0, -1.0], [1.0, 1.0]])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(loc[z], 1.0).to_event(1), obs=torch.stack([y, y], -1))


@pytest.mark.parametrize(
    "model", [gaussians(), by_design, told_apart_by_another, constant_features]
)
def test_states_that_differ_are_not_named(model: Model):
    assert "alike" not in run(model, TWO, max_iter=5).reason


def test_a_start_that_is_not_symmetric_parts_what_was_alike():
    """The remedy works: the saddle is left, and is far below."""
    saddle, maximum = (
        run(gaussians((0.0, 0.0)), TWO, options={"init": init}, max_iter=200, tol=1e-8)
        for init in ("model", "kmeans++")
    )
    assert "alike" in saddle.reason and "alike" not in maximum.reason
    assert maximum.objective_value > saddle.objective_value + 10


# ---------------------------------------------------------------------------------------- floors


def test_a_component_at_its_floor_is_named():
    y = torch.cat([TWO, t([40.0, 40.0])])
    fit = run(gaussians((0.0, 40.0)), y, options={"floor": 1e-4}, tol=1e-8)
    least = 1e-4 * float(y.var(correction=0))
    says = f"floor=0.0001 allows: component 1 of 'scale' (a variance of {least:.2g})"
    assert says in fit.reason, fit.reason
    assert "component 0" not in fit.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_covariance_at_its_floor_is_named(dtype: torch.dtype):
    y = torch.cat([TWO.reshape(-1, 2), t([[9.0, 7.0]] * 3)]).to(dtype)

    def model(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: y.new_tensor([[0.0, 0.0], [9.0, 7.0]]))
        eye = torch.eye(2, dtype=dtype)
        tril = pyro.param("tril", eye.repeat(2, 1, 1), constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=dtype)))
            pyro.sample("y", dist.MultivariateNormal(loc[z], scale_tril=tril[z]), obs=y)

    fit = run(model, y, options={"floor": 1e-3}, tol=1e-8)
    assert "component 1 of 'tril' (a variance of 0.001 of that of the data)" in fit.reason
    assert "component 0" not in fit.reason
    assert "floor" not in run(model, y, options={"floor": 0.0}, max_iter=1).reason


def test_one_scale_for_all_is_named_without_a_component():
    def model(y: Tensor) -> None:
        loc, scale = real("loc", [0.0, 3.0]), positive("scale", 1.0)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.5, 0.5])))
            pyro.sample("y", dist.Normal(loc[z], scale), obs=y)

    fit = run(model, t([0.0] * 5 + [3.0] * 5), options={"floor": 1e-3})
    assert f"allows: 'scale' (a variance of {1e-3 * 1.5**2:.2g})" in fit.reason


# ------------------------------------------------------------------------------------- precision


def single(y: Tensor) -> None:
    weights = pyro.param("weights", y.new_tensor([0.4, 0.6]), constraints.simplex)
    loc, scale = (
        pyro.param("loc", y.new_tensor([-1.0, 1.0])),
        pyro.param("scale", y.new_tensor([1.0, 1.0]), constraint=constraints.positive),
    )
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)


def test_convergence_by_the_rounding_of_float32_is_said():
    """A tolerance that float32 cannot see is not what ended the fit."""
    fit = run(single, TWO.float(), tol=1e-12, max_iter=1000)
    assert fit.status == "converged" and "float32 resolves" in fit.reason, fit.reason
    assert "float64 go further" in fit.reason and "tol=1e-12" in fit.reason
    further = run(single, TWO, tol=1e-12, max_iter=1000)
    assert further.status == "converged" and "float32" not in further.reason
    assert further.num_steps > fit.num_steps


def test_a_tolerance_that_float32_resolves_is_what_ends_the_fit():
    fit = run(single, TWO.float(), tol=1e-3, max_iter=1000)
    assert fit.status == "converged"
    assert "less than tol=0.001" in fit.reason and "float32" not in fit.reason


# ------------------------------------------------------------------------------------- no maximum


def test_the_learned_width_of_a_prior_may_run_off_with_its_latents():
    """Normal(0, s) at 0 grows without bound as s falls, and data near 0 do not mind."""

    def model(y: Tensor) -> None:
        width = positive("width", 1.0)
        with pyro.plate("components", 2):
            loc = pyro.sample("loc", dist.Normal(t(0.0), width))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.5, 0.5])))
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    fit = run(model, 0.3 * drawn(40, seed=5), max_iter=1000)
    assert fit.status == "diverged"
    assert "'width' of a prior may have run off with the latents" in fit.reason
    assert "shrunk onto one datum" not in fit.reason


# ------------------------------------------------------------------------ half-steps with a guide


def guide(y: Tensor) -> None:
    logits = pyro.param("logits", lambda: y.new_zeros(len(y), 2))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})


def explicit(y: Tensor) -> None:
    loc = real("loc", [-0.5, 0.8])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(t([0.4, 0.6])), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)


@pytest.mark.parametrize("call", [1, 60, 150, 210])
def test_an_interrupted_half_step_is_as_if_it_had_not_begun(
    monkeypatch: pytest.MonkeyPatch, call: int
):
    """Wherever in a line search, or in the values after it, the interrupt falls."""
    counted = Interrupted(lvppl.ELBO.differentiable_loss, call)

    def loss(objective: Any, *args: Any, **kwargs: Any) -> Tensor:
        return counted(objective, *args, **kwargs)

    monkeypatch.setattr(lvppl.ELBO, "differentiable_loss", loss)
    if call == 1:
        with pytest.raises(KeyboardInterrupt):  # there is no fit yet
            lvppl.EM(explicit, guide).fit(TWO, max_iter=50, tol=0.0, progress=False)
        return
    fit = lvppl.EM(explicit, guide).fit(TWO, max_iter=50, tol=0.0, seed=0, progress=False)
    assert fit.status == "interrupted"
    elbo, kl, evidence = (fit.history[name] for name in ("elbo", "kl", "log_evidence"))
    assert len(elbo) == len(kl) == len(evidence) == 2 * fit.num_steps + 1
    monkeypatch.undo()
    assert elbo[-1] == pytest.approx(float(fit.report(TWO).elbo.total), abs=1e-9)


def test_a_climb_that_is_interrupted_has_not_moved():
    x = torch.tensor([3.0, -2.0], dtype=torch.float64, requires_grad=True)

    def objective() -> Tensor:
        return -(x.square() * t([1.0, 30.0])).sum() - x.prod().square()

    start = x.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        raise_by_gradient(Interrupted(objective, 6), [x], num_steps=20)
    assert torch.equal(x.detach(), start) and x.grad is None


def test_states_that_emit_alike_and_last_differently_are_no_saddle():
    """Phase-type durations: two states of one symbol, told apart by where they lead."""
    from lvppl.distributions import HiddenMarkov

    torch.manual_seed(0)
    path, state = [], 0
    rows = torch.tensor([[0.6, 0.4, 0.0], [0.0, 0.6, 0.4], [0.5, 0.0, 0.5]], dtype=torch.float64)
    for _ in range(400):
        path.append(state)
        state = int(torch.multinomial(rows[state], 1))
    y = (torch.tensor(path) == 2).double()[None]

    def phases(y):
        initial = rows.new_tensor([0.98, 0.01, 0.01])
        A = pyro.param("A", rows * 0.8 + 0.2 / 3, constraint=constraints.simplex)
        p = pyro.param(
            "p", rows.new_tensor([0.01, 0.01, 0.99]), constraint=constraints.unit_interval
        )
        with pyro.plate("sequences", len(y)):
            emission = dist.Bernoulli(p)
            pyro.sample("y", HiddenMarkov(initial.log(), A.log(), emission), obs=y)

    fit = lvppl.EM(phases).fit(y, max_iter=30, seed=0, progress=False)
    assert "alike" not in fit.reason, fit.reason

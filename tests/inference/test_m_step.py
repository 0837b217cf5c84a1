"""One M-step: it is the maximum where the table says so, and says so where there is none."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

import lvppl
from lvppl.inference import em_steps
from lvppl.inference.e_step import Expectation, Mode, sites_of
from lvppl.inference.em_loop import Loop
from lvppl.inference.em_problem import Problem
from lvppl.inference.m_step import MStep, forms
from lvppl.inference.m_step.averaging import AveragedStatistics
from lvppl.inference.m_step.cells import Cells
from lvppl.inference.m_step.floors import floored, least_eigenvalues
from lvppl.inference.m_step.weighted import Weighted
from tests.enumerable import positive, real, simplex, t

Model = Callable[..., None]
CLOSED, CONDITIONAL, GRADIENT = "closed form", "conditional", "gradient"


def drawn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


N = 60
X, S = drawn(N, seed=3), drawn(N, seed=4).exp()
TWO = torch.cat([drawn(30, seed=1) - 2, drawn(30, seed=2) + 2])
WAITS = torch.cat([drawn(30, seed=1).exp(), 8 * (0.5 * drawn(30, seed=2)).exp()])


def run(model: Model, *data: Any, options: dict[str, Any] | None = None, **given: Any) -> Any:
    pyro.clear_param_store()
    given = {"seed": 0, "progress": False, "max_iter": 50, "tol": 0.0} | given
    return lvppl.EM(model, **(options or {})).fit(*data, **given)


def close(actual: Any, expected: Any, atol: float) -> None:
    actual, expected = (torch.as_tensor(v, dtype=torch.float64) for v in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# -------------------------------------------------------- joint maxima, and maxima given the others


class Repeated:
    """Makes the first M-step of a fit twice, at the same responsibilities, and keeps both ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}
        monkeypatch.setattr(Problem, "fast", lambda *_: None)
        monkeypatch.setattr(Loop, "_maximise", lambda loop, found: self(loop))

    def __call__(self, loop: Loop) -> None:
        problem = loop.problem
        (batch,) = problem.batches
        with loop._inside():
            run = problem.program, batch, problem.kwargs, problem.layout(batch)
            weights = {term.name: term.weight for term in Expectation.of(*run, Mode()).terms}
            for end in (self.first, self.second):
                terms = [Weighted(s.name, s.fn, s.value, weights[s.name]) for s in sites_of(*run)]
                statistics = problem.m_step.statistics(problem.device)
                problem.m_step.maximise(problem.gather(batch, terms, statistics))
                end.update({n: p.value.clone() for n, p in problem.parameters.items()})
        loop.iteration += 1

    def moved(self, name: str) -> float:
        return float((self.second[name] - self.first[name]).abs().max())


def gamma_of_known_shape(y: Tensor) -> None:
    rate, shape = positive("rate", [1.0, 0.3]), t([2.0, 1.5])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Gamma(shape[z], rate[z]), obs=y)


def gamma_of_known_rate(y: Tensor) -> None:
    shape, rate = positive("shape", [1.0, 4.0]), t([1.0, 0.5])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Gamma(shape[z], rate[z]), obs=y)


def gamma_of_one_rate(y: Tensor) -> None:
    shape, rate = positive("shape", [1.0, 4.0]), positive("rate", 0.5)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Gamma(shape[z], rate), obs=y)


def gammas_of_their_own_rates(y: Tensor) -> None:
    shape, rate = positive("shape", [1.0, 4.0]), positive("rate", [0.5, 2.0])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Gamma(shape[z], rate[z]), obs=y)


def one_location_under_two_scales(y: Tensor) -> None:
    loc, scale = real("loc", 0.5), positive("scale", [1.0, 3.0])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(loc, scale[z]), obs=y + 0.2 * y.square())


def locations_with_a_prior(y: Tensor) -> None:
    scale = positive("scale", [1.0, 1.0])
    with pyro.plate("components", 2):
        loc = pyro.sample("loc", dist.Normal(t([-1.0, 1.0]), t(0.5)))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)


def locations_whose_prior_has_their_scale(y: Tensor) -> None:
    with pyro.plate("components", 2):
        variance = pyro.sample("variance", dist.InverseGamma(t(2.0), t(1.5)))
        loc = pyro.sample("loc", dist.Normal(t([-1.0, 1.0]), (variance / 0.3).sqrt()))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(loc[z], variance[z].sqrt()), obs=y)


def lines(y: Tensor) -> None:
    slope, start = real("slope", [1.0, -1.0]), real("start", [0.0, 0.5])
    scale = positive("scale", [1.0, 2.0])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(slope[z] * X + start[z], scale[z]), obs=y)


def lines_of_one_slope(y: Tensor) -> None:
    """The slope stands under both scales, and so with it everything that it is solved with."""
    slope, start = real("slope", 1.0), real("start", [0.0, 0.5])
    scale = positive("scale", [1.0, 2.0])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(slope * X + start[z], scale[z]), obs=y)


def lines_with_priors(y: Tensor) -> None:
    with pyro.plate("components", 2):
        slope = pyro.sample("slope", dist.Normal(t([1.0, -1.0]), t(0.3)))
        start = pyro.sample("start", dist.Normal(t(0.0), t(0.5)))
    scale = positive("scale", [1.0, 1.0])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(slope[z] * X + start[z], scale[z]), obs=y)


def lines_with_priors_and_a_known_scale(y: Tensor) -> None:
    with pyro.plate("components", 2):
        slope = pyro.sample("slope", dist.Normal(t([1.0, -1.0]), t(0.3)))
        start = pyro.sample("start", dist.Normal(t(0.0), t(0.5)))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(slope[z] * X + start[z], S), obs=y)


def multiples_of_known_scales(y: Tensor) -> None:
    """Each datum's scale is a known number times one that is learned."""
    slope, start = real("slope", [1.0, -1.0]), real("start", [0.0, 0.5])
    scale = positive("scale", [1.0, 2.0])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(slope[z] * X + start[z], scale[z] * S), obs=y)


def vectors_of_two_lengths(y: Tensor) -> None:
    """Covariances of different sizes in one program."""
    plane, space = real("plane", [[-1.0, 0.0], [1.0, 0.0]]), real("space", [[0.0] * 3, [1.0] * 3])
    small = pyro.param("small", torch.eye(2).double(), constraint=constraints.lower_cholesky)
    large = pyro.param("large", torch.eye(3).double(), constraint=constraints.lower_cholesky)
    rows = y.reshape(-1, 5)
    with pyro.plate("data", len(rows)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("a", dist.MultivariateNormal(plane[z], scale_tril=small), obs=rows[:, :2])
        pyro.sample("b", dist.MultivariateNormal(space[z], scale_tril=large), obs=rows[:, 2:])


JOINT: dict[str, tuple[Model, Tensor, dict[str, str]]] = {
    "Gamma of known shape": (gamma_of_known_shape, WAITS, {"rate": CLOSED, "weights": CLOSED}),
    "Gamma of known rate": (gamma_of_known_rate, WAITS, {"shape": CLOSED}),
    "Gamma of one rate": (gamma_of_one_rate, WAITS, {"shape": CONDITIONAL, "rate": CONDITIONAL}),
    "Gammas of their own rates": (
        gammas_of_their_own_rates,
        WAITS,
        {"shape": CLOSED, "rate": CLOSED, "weights": CLOSED},
    ),
    "one location under two scales": (
        one_location_under_two_scales,
        TWO,
        {"loc": CONDITIONAL, "scale": CONDITIONAL, "weights": CLOSED},
    ),
    "locations with a prior": (
        locations_with_a_prior,
        TWO,
        {"loc": CONDITIONAL, "scale": CONDITIONAL},
    ),
    "a prior of their own scale": (
        locations_whose_prior_has_their_scale,
        TWO,
        {"loc": CLOSED, "variance": CLOSED},
    ),
    "lines": (lines, TWO, {"slope": CLOSED, "start": CLOSED, "scale": CLOSED}),
    "lines of one slope": (
        lines_of_one_slope,
        TWO,
        {"slope": CONDITIONAL, "start": CONDITIONAL, "scale": CONDITIONAL},
    ),
    "lines with priors": (
        lines_with_priors,
        TWO,
        {"slope": CONDITIONAL, "start": CONDITIONAL, "scale": CONDITIONAL},
    ),
    "lines with priors, known scales": (
        lines_with_priors_and_a_known_scale,
        TWO,
        {"slope": CLOSED, "start": CLOSED},
    ),
    "multiples of known scales": (
        multiples_of_known_scales,
        TWO,
        {"slope": CLOSED, "start": CLOSED, "scale": CLOSED},
    ),
    "vectors of two lengths": (
        vectors_of_two_lengths,
        TWO,
        {"plane": CLOSED, "space": CLOSED, "small": CLOSED, "large": CLOSED},
    ),
}


@pytest.mark.filterwarnings("ignore:Singular sample detected")
@pytest.mark.parametrize("name", JOINT)
def test_a_closed_form_is_a_joint_maximum_and_a_conditional_one_is_not(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    """At the same responsibilities, a second M-step has nothing to do, or something."""
    model, data, how = JOINT[name]
    pyro.set_rng_seed(0)
    repeated = Repeated(monkeypatch)
    fit = run(model, data, max_iter=1)
    assert {parameter: fit.m_step[parameter].how for parameter in how} == how
    for parameter, kind in how.items():
        if kind == CLOSED:
            assert repeated.moved(parameter) < 1e-9, parameter
        else:
            assert repeated.moved(parameter) > 1e-6, parameter


@pytest.mark.filterwarnings("ignore:Singular sample detected")
@pytest.mark.parametrize("name", JOINT)
def test_no_iteration_loses(name: str):
    model, data, _ = JOINT[name]
    pyro.set_rng_seed(0)
    history = run(model, data).history["objective"]
    assert (np.diff(history) >= -1e-9).all() and history[-1] > history[0] + 1e-3


def test_the_table_says_which_equation_a_concentration_solves():
    joint, known, shared = (
        run(model, WAITS, max_iter=1).m_step["shape"].form
        for model in (_gamma_of_both, gamma_of_known_rate, gamma_of_one_rate)
    )
    assert joint.startswith("ln α − ψ(α)")
    assert known == shared == "ψ(α) = ln β + mean of ln y, by Newton"


def _gamma_of_both(y: Tensor) -> None:
    shape, rate = positive("shape", [1.0, 3.0]), positive("rate", [1.0, 0.5])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Gamma(shape[z], rate[z]), obs=y)


# --------------------------------------------------------------- regressions with known scales


def weighted_lines(x: Tensor, y: Tensor, s: Tensor) -> None:
    slope, start = real("slope", [1.0, -1.0]), real("start", [0.0, 0.5])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(t([0.4, 0.6])))
        pyro.sample("y", dist.Normal(slope[z] * x + start[z], s), obs=y)


def test_known_scales_are_weights_of_least_squares():
    fit = run(weighted_lines, X, TWO, S, max_iter=1)
    loc = t([[1.0], [-1.0]]) * X + t([[0.0], [0.5]])
    logs = dist.Normal(loc, S).log_prob(TWO) + t([[0.4], [0.6]]).log()
    for k, r in enumerate(logs.softmax(0)):
        root = (r.sqrt() / S).numpy()
        design = np.stack([X.numpy(), np.ones(N)], 1)
        expected = np.linalg.lstsq(design * root[:, None], TWO.numpy() * root, rcond=None)[0]
        close([fit.params["slope"][k], fit.params["start"][k]], expected, 1e-10)


@pytest.mark.parametrize(("model", "cells"), [(weighted_lines, 1), ("multiples", 2)])
def test_known_scales_of_each_datum_cost_no_statistics(
    monkeypatch: pytest.MonkeyPatch, model: Any, cells: int
):
    """One cell for what is known, and one for each scale that is learned, however many data."""
    sizes = []
    inner = em_steps.maximise

    def look(problem: Any, found: Any, **options: Any) -> None:
        sizes.append(len(found.statistics.cells["regression 0"]))
        inner(problem, found, **options)

    monkeypatch.setattr("lvppl.inference.em_loop.maximise", look)
    data = (TWO,) if model == "multiples" else (X, TWO, S)
    run(multiples_of_known_scales if model == "multiples" else model, *data, max_iter=3)
    assert sizes == [cells] * 3


def test_units_and_masses_do_not_decide_what_is_collinear():
    """Columns in units of 1e9, and a component of mass 1e-12, are solved for all the same."""
    design, y = drawn(40, 3, seed=7), drawn(40, seed=8)
    units = t([1e9, 1.0, 1e-6])
    gram, gradient = (design.mT @ design), design.mT @ y
    step = forms._least_norm(gram * units * units[:, None], gradient * units)
    close(step * units, torch.linalg.lstsq(design, y).solution, 1e-9)
    both = torch.block_diag(gram, 1e-12 * gram)
    close(forms._least_norm(both, torch.cat([gradient, 1e-12 * gradient]))[3:], step * units, 1e-9)


def test_collinear_columns_share_and_columns_of_zeros_stay():
    column = drawn(40, seed=7)
    design, y = torch.stack([column, column, torch.zeros(40)], 1), drawn(40, seed=8)
    step = forms._least_norm(design.mT @ design, design.mT @ y)
    half = float(column @ y / (column @ column) / 2)
    close(step, [half, half, 0.0], 1e-12)


# ----------------------------------------------------------------- entries that nothing weighs on


def normal_cells(n: list[float], first: list[float]) -> Cells:
    ones = torch.ones(len(n), dtype=torch.float64)
    keys = torch.stack([torch.arange(len(n)), torch.full((len(n),), -1)], 1)
    reference = dict.fromkeys(("loc", "loc_coefficient", "scale", "scale_coefficient"), ones)
    return Cells(keys, reference, {"n": t(n), "first": t(first), "second": ones})


def test_entries_without_data_stay_and_nan_goes_through():
    step = forms.locations(normal_cells([2.0, 0.0, 3.0], [4.0, 0.0, math.nan]), 3)
    assert step.tolist()[:2] == [2.0, 0.0] and math.isnan(step[2])
    nothing = torch.zeros(2, dtype=torch.float64)
    for found in (
        forms.simplexes(torch.stack([nothing, t([math.nan, 1.0])])),
        forms.probabilities(t([0.0, math.nan]), nothing),
        forms.rates(t([0.0, 0.0]), t([0.0, math.nan])),
        forms.scales(t([0.0, 1.0]), t([0.0, math.nan]), nothing),
    ):
        assert not found.exists[0].any() and found.exists[1].all()
        assert found.value[1].isnan().any()


def test_a_component_without_data_under_two_covariances_stays():
    """No matrix is inverted for it."""
    rows = drawn(20, 2, seed=5)

    def model(y: Tensor) -> None:
        loc = real("loc", [[0.0, 0.0], [1e3, 1e3]])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.5, 0.5])))
            for i, spread in enumerate((1.0, 4.0)):
                wide = spread * torch.eye(2, dtype=torch.float64)
                pyro.sample(f"y_{i}", dist.MultivariateNormal(loc[z], wide), obs=y)

    fit = run(model, rows, max_iter=1, options={"hard": True})
    close(fit.params["loc"], [rows.mean(0).tolist(), [1e3, 1e3]], 1e-9)


@pytest.mark.parametrize("kind", ["coefficient", "logarithm"])
def test_a_dead_component_starts_again_among_the_data(kind: str):
    """Also where its location is a multiple of the parameter, or that of a logarithm."""

    def model(y: Tensor) -> None:
        scale = positive("scale", [1.0, 1.0])
        loc = real("loc", [0.5, 300.0])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(simplex("weights", [0.5, 0.5])))
            if kind == "coefficient":
                pyro.sample("y", dist.Normal(-5 * loc[z], scale[z]), obs=y)
            else:
                pyro.sample("y", dist.LogNormal(loc[z], scale[z]), obs=y)

    y = 10 * TWO if kind == "coefficient" else TWO.exp()
    fit = run(model, y, max_iter=100)
    assert "component 1 of 'loc' in iteration 1" in fit.reason and "after" not in fit.reason
    centres = (-5 * fit.params["loc"] / 10 if kind == "coefficient" else fit.params["loc"]).sort()
    close(centres.values, [-2.0, 2.0], 0.6)  # 30 data of deviation 1 each: three standard errors


# ------------------------------------------------------------------------------------------ floors


def test_the_floored_covariance_is_the_best_of_those_above_the_floor():
    """Against 3000 matrices above it, near and far."""
    factor, width = drawn(3, 3, seed=1), t([1.0, 10.0, 0.1])
    second = factor @ torch.diag(t([1.0, 1e-3, 1e-6])) @ factor.mT * width * width[:, None]
    best = floored(second, 0.05, width)
    assert float(least_eigenvalues(best, width)) == pytest.approx(0.05)

    def loss(covariance: Tensor) -> Tensor:
        return covariance.logdet() + torch.linalg.solve(covariance, second).diagonal(
            dim1=-2, dim2=-1
        ).sum(-1)

    noise = drawn(3000, 3, 3, seed=2) * 10 ** torch.linspace(-4, 1, 3000).double()[:, None, None]
    unit = width * width[:, None]
    others = floored(best + (noise + noise.mT) * unit, 0.05, width)
    assert (loss(others) >= loss(best) - 1e-9).all()


def test_far_nodes_of_a_latent_do_not_lift_the_floor():
    """A Student-t scale is divided by the roots of nodes that lie far apart: they are no units."""

    def model(y: Tensor) -> None:
        loc, scale = real("loc", [-1.0, 2.0]), positive("scale", [1.0, 1.0])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
            precision = pyro.sample("precision", dist.Gamma(t(2.0), t(2.0)))
            pyro.sample("y", dist.Normal(loc[z], scale[z] / precision.sqrt()), obs=y)

    least = []

    def look(self: MStep, *_: Any) -> None:
        least.append(self.smallest_scale("scale").square())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MStep, "raise_to_floors", look)
        run(model, TWO, max_iter=1, options={"floor": 1e-3})
    assert (least[0] < 1e-2 * TWO.var()).all() and (least[0] > 1e-4 * TWO.var()).all()


def test_a_start_below_the_floor_starts_at_it():
    """Else the first M-step, which ends above it, would lower ln p(y)."""

    def model(y: Tensor) -> None:
        loc, scale = real("loc", [0.0, 3.0]), positive("scale", [1e-8, 1e-8])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(simplex("weights", [0.5, 0.5])))
            pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)

    y = t([0.0] * 5 + [3.0] * 7)
    fit = run(model, y, options={"floor": 1e-4}, tol=1e-9)
    assert fit.status == "converged", fit.reason
    close(fit.params["scale"].square(), [1e-4 * float(y.var(correction=0))] * 2, 1e-12)


def test_a_covariance_below_the_floor_starts_at_it():
    rows = torch.cat([drawn(20, 2, seed=1), t([[9.0, 9.0]] * 5)])

    def model(y: Tensor) -> None:
        loc = real("loc", [[0.0, 0.0], [9.0, 9.0]])
        first = t([[[1.0, 0.0], [0.0, 1.0]], [[1e-7, 0.0], [0.0, 1e-7]]])
        tril = pyro.param("tril", first, constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(simplex("weights", [0.5, 0.5])))
            pyro.sample("y", dist.MultivariateNormal(loc[z], scale_tril=tril[z]), obs=y)

    fit = run(model, rows, options={"floor": 1e-4}, tol=1e-9)
    assert fit.status == "converged", fit.reason
    assert (np.diff(fit.history["objective"]) >= -1e-9).all()


def test_a_gamma_that_shrinks_onto_one_value_rests_on_its_floor():
    """The likelihood has no bound there: α would grow for ever. It stops at mean² / (f var)."""
    y = torch.cat([WAITS[:30], t([50.0, 50.0, 50.0])])

    def model(y: Tensor) -> None:
        shape, rate = positive("shape", [1.0, 30.0]), positive("rate", [1.0, 0.6])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(simplex("weights", [0.9, 0.1])))
            pyro.sample("y", dist.Gamma(shape[z], rate[z]), obs=y)

    fit = run(model, y, options={"floor": 1e-4}, max_iter=500, tol=1e-10)
    assert fit.status == "converged", fit.reason
    assert (np.diff(fit.history["objective"]) >= -1e-9).all()
    most = float(y.mean() ** 2 / y.var(correction=0)) / 1e-4
    close(fit.params["shape"][1] / most, 1.0, 1e-6)
    close(fit.params["shape"][1] / fit.params["rate"][1], 50.0, 1e-3)
    assert f"component 1 of 'shape' (a concentration of {most:.2g})" in fit.reason


def test_a_known_rate_bounds_a_concentration_by_itself():
    """One that is large because the data say so has no floor to rest on."""
    y = 1e6 + 1e3 * drawn(20, seed=3)

    def model(y: Tensor) -> None:
        shape = positive("shape", 1e5)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
            pyro.sample("y", dist.Gamma(shape, 1e3), obs=y)
            pyro.sample("sign", dist.Normal(t([-1.0, 1.0])[z], 1.0), obs=y - 1e6)

    fit = run(model, y, max_iter=1, options={"floor": 0.5})
    psi = math.log(1e3) + float(y.log().mean())
    close(torch.digamma(fit.params["shape"]), psi, 1e-9)
    assert "floor" not in fit.reason


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3, 1e6, 1e12])
def test_concentrations_are_the_root_of_their_equation(size: float):
    """In 40 digits, from spread data to data that are nearly alike."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(40):
        s = float(mpmath.log(size) - mpmath.digamma(size))
        exact = float(mpmath.findroot(lambda a: mpmath.log(a) - mpmath.digamma(a) - s, size))
    found = forms._root(t([s]), t([0.0]), torch.tensor([True]))
    assert float(found) == pytest.approx(exact, rel=1e-8)


# ---------------------------------------------------------------------------------- no maximum


def test_a_dirichlet_whose_concentration_is_learned_is_refused():
    """Its density at its mode grows without bound, while the data hold the weights."""

    def model(y: Tensor) -> None:
        alpha = positive("alpha", 1.5)
        weights = pyro.sample("weights", dist.Dirichlet(alpha * t([1.0, 2.0])))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(real("loc", [-1.0, 1.0])[z], 1.0), obs=y)

    with pytest.raises(lvppl.ProgramError, match=r"Dirichlet prior of 'weights'.*'alpha'.*without"):
        run(model, TWO)
    mean = t([1 / 3, 2 / 3])  # what the message says is so
    logs = [float(dist.Dirichlet(c * mean).log_prob(mean)) for c in (1e1, 1e3, 1e5, 1e7)]
    close(np.diff(logs), [0.5 * math.log(100)] * 3, 0.1)


def test_a_beta_whose_concentrations_are_learned_is_refused():
    def model(y: Tensor) -> None:
        a = positive("a", 2.0)
        with pyro.plate("components", 2):
            probs = pyro.sample("probs", dist.Beta(a, t(2.0)))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([0.5, 0.5])))
            pyro.sample("y", dist.Bernoulli(probs[z]), obs=(y > 0).double())

    with pytest.raises(lvppl.ProgramError, match=r"Beta prior of 'probs'.*depends on 'a'"):
        run(model, TWO)


def test_a_concentration_with_a_prior_of_its_own_has_a_maximum():
    """Gamma(3, 4) falls faster than the Dirichlet's density can grow: the slope ends at zero."""

    def model(y: Tensor) -> None:
        alpha = pyro.sample("alpha", dist.Gamma(t(3.0), t(4.0)))
        weights = pyro.sample("weights", dist.Dirichlet(1 + alpha * t([1.0, 1.0])))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(t([-2.0, 2.0])[z], 1.0), obs=y)

    pyro.set_rng_seed(0)
    fit = run(model, TWO[:40], max_iter=500, tol=1e-12)
    assert fit.m_step["alpha"].how == fit.m_step["weights"].how == GRADIENT
    alpha, weights = (fit.params[n].clone().requires_grad_() for n in ("alpha", "weights"))
    prior = dist.Gamma(t(3.0), t(4.0)).log_prob(alpha)
    total = prior + dist.Dirichlet(1 + alpha * t([1.0, 1.0])).log_prob(weights)
    (slope,) = torch.autograd.grad(total, alpha)
    assert abs(float(slope)) < 1e-4


WEAK = {
    "Wishart": (
        lambda: dist.Wishart(t(2.0), torch.eye(2).double()),
        "Wishart prior of 'precision' has too few degrees of freedom",
    ),
    "Gamma": (
        lambda: dist.Gamma(t(1.0), t(1.0)),
        "Gamma prior of 'precision' has a concentration of 1",
    ),
}


@pytest.mark.filterwarnings("ignore:Singular sample detected")
@pytest.mark.parametrize("name", WEAK)
def test_a_prior_that_is_largest_at_a_precision_of_zero_is_refused(name: str):
    """A component without data would be infinitely wide."""
    prior, says = WEAK[name]

    def model(y: Tensor) -> None:
        with pyro.plate("components", 2):
            precision = pyro.sample("precision", prior())
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(t([1.0, 0.0])))
            if name == "Gamma":
                pyro.sample("y", dist.Normal(t(0.0), precision[z].rsqrt()), obs=y[:, 0])
            else:
                zero = torch.zeros(2, dtype=torch.float64)
                normal = dist.MultivariateNormal(zero, precision_matrix=precision[z])
                pyro.sample("y", normal, obs=y)

    pyro.set_rng_seed(1)
    with pytest.raises(lvppl.ProgramError, match=says):
        run(model, drawn(20, 2, seed=3), options={"hard": True})


# ------------------------------------------------------------------------------------- online EM


def online_sizes(monkeypatch: pytest.MonkeyPatch, model: Model) -> Iterator[Mapping[str, int]]:
    sizes = []
    inner = AveragedStatistics.with_batch

    def look(average: AveragedStatistics, new: Any) -> Any:
        found = inner(average, new)
        sizes.append({form: len(cells) for form, cells in found.cells.items()})
        return found

    monkeypatch.setattr(AveragedStatistics, "with_batch", look)
    run(model, TWO, options={"online": True}, batch_size=6, max_iter=3)
    yield from sizes


def third_of_a_location(y: Tensor) -> None:
    """What the program makes of c · θ is not to the last digit what the statistics make of it."""
    loc, variance = real("loc", [-6.1, 5.3]), positive("variance", [1.0, 1.3])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(loc[z] / 3, variance[z].sqrt()), obs=y)


def third_of_a_vector(y: Tensor) -> None:
    loc = real("loc", [[-6.1, 0.2], [5.3, 0.1]])
    tril = pyro.param("tril", torch.eye(2).double(), constraint=constraints.lower_cholesky)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        normal = dist.MultivariateNormal(loc[z] / 3, scale_tril=tril)
        pyro.sample("y", normal, obs=torch.stack([y, y.square()], -1))


def gamma_of_squares(y: Tensor) -> None:
    shape, rate = positive("shape", [1.0, 3.0]), positive("rate", [1.0, 0.5])
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Gamma(shape[z], rate[z] / 3), obs=y.square())


def line_of_squares(y: Tensor) -> None:
    slope, start, scale = real("slope", 1.0), real("start", [0.0, 0.5]), positive("scale", 1.3)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(simplex("weights", [0.4, 0.6])))
        pyro.sample("y", dist.Normal(slope * y + start[z], scale / 3), obs=y.square())


@pytest.mark.parametrize(
    "model", [third_of_a_location, third_of_a_vector, gamma_of_squares, line_of_squares]
)
def test_averaged_statistics_do_not_grow(monkeypatch: pytest.MonkeyPatch, model: Model):
    """Cells of one combination are one cell, however many batches there were."""
    first, *others = online_sizes(monkeypatch, model)
    assert len(others) == 29 and all(size == first for size in others), others

"""EM against running every assignment, against peers from the same start, and against itself."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import make_spd_matrix
from sklearn.mixture import GaussianMixture
from torch import Tensor
from torch.distributions import constraints

import lvppl
import lvppl.distributions
from tests.enumerable import (
    PROGRAMS,
    Program,
    Started,
    categorical,
    expected_log_joint,
    gradients,
    parameters,
    set_parameters,
    simplex,
    t,
)

every = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
SLACK = 1e-9

# EM with a tolerance of zero runs for as long as it is told to.
EXACTLY = {"tol": 0.0}


def fitted(program: Program, iterations: int, **options: Any) -> tuple[Started, Any]:
    """A program at its start, and a fit of that many iterations from there."""
    started = program.start()
    fit = lvppl.EM(started.model, **options).fit(*started.args, max_iter=iterations, **EXACTLY)
    return started, fit


def objective(fit: Any) -> Tensor:
    return torch.tensor([float(v) for v in fit.history["objective"]], dtype=torch.float64)


def constrained() -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


def at(program: Program, params: dict[str, Tensor]) -> Started:
    """The program, built afresh, at these parameters."""
    started = program.start()
    set_parameters(params)
    return started


def agree(actual: Any, expected: Any, atol: float) -> None:
    """In float64, Python's numbers and NumPy's arrays alike."""
    actual, expected = (torch.as_tensor(np.asarray(value)) for value in (actual, expected))
    assert actual.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


# ------------------------------------------------------------------- against running everything


@every
def test_twenty_iterations_never_decrease_the_evidence(program: Program):
    """history[i] is ln p(y) before M-step i; its ends are those of brute force."""
    _, fit = fitted(program, 20)
    history = objective(fit)
    assert fit.status in {"max_steps", "converged"}, fit.reason
    assert (history.diff() >= -SLACK).all()
    agree(history[0], program.start().exact().total.detach(), 1e-10)
    agree(history[-1], at(program, fit.params).exact().total.detach(), 1e-9)
    if fit.status == "max_steps":
        assert len(history) == 21


@every
def test_one_iteration_gains(program: Program):
    """Nothing here starts at a maximum: a first step that gains nothing does nothing."""
    _, fit = fitted(program, 1)
    history = objective(fit)
    assert len(history) == 2
    assert history[1] - history[0] > 1e-5


def q_function(program: Program, params: dict[str, Tensor], *, literal: bool) -> tuple:
    """Q and its unconstrained gradients at the start and at the new parameters.

    The responsibilities are those of the start. Where latents are masked, their ln p may be left
    out of Q (`literal`, as Pyro's masks do) or kept: both are EM, of fewer or of more latents.
    """
    started = program.start()
    exact = started.exact()
    weights = exact.weights()
    options = {"masked_latents": literal}
    before = expected_log_joint(*_call(started), exact, weights, **options).detach()
    moved = at(program, params)
    after = expected_log_joint(*_call(moved), exact, weights, **options)
    return before, after.detach(), gradients(after)


def _call(started: Started) -> tuple:
    return started.model, started.args


@every
def test_one_m_step_maximises_the_expected_log_joint(program: Program):
    """dQ = 0 for every parameter whose step is a closed form; Q never falls, whatever the step."""
    _, fit = fitted(program, 1)
    stationary = []
    for literal in {False, program.masked_latents}:
        before, after, slopes = q_function(program, fit.params, literal=literal)
        assert after >= before - SLACK or program.masked_latents
        exact = [name for name in fit.params if fit.m_step[name].how == "closed form"]
        stationary.append(max((float(slopes[name].abs().max()) for name in exact), default=0.0))
    assert min(stationary) < 1e-6


@every
def test_closed_forms_are_found(program: Program):
    """What the registry promises: a silent fall to gradients would pass every other test."""
    _, fit = fitted(program, 1)
    assert set(fit.params) == set(constrained())
    for name in program.closed_form:
        assert fit.m_step[name].how == "closed form", f"{name}: {fit.m_step[name].how}"
    for name in fit.params:
        assert name in str(fit.m_step)
        assert fit.m_step[name].how in str(fit.m_step)


@every
def test_parameters_keep_their_constraints(program: Program):
    _, fit = fitted(program, 5)
    known = pyro.get_param_store().get_state()["constraints"]
    program.start()
    for name, value in fit.params.items():
        assert value.dtype == torch.float64 and not value.requires_grad
        assert known[name].check(value).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixture_of_experts", "input_driven_chain", "two_latents"])
def test_what_has_no_closed_form_reaches_a_maximum_too(name: str):
    """A gate, driven transitions, a sum of locations: in the end the gradient of ln p(y) is 0."""
    program = PROGRAMS[name]
    started = program.start()
    fit = lvppl.EM(started.model).fit(*started.args, max_iter=3000, tol=1e-12)
    assert fit.status == "converged", fit.reason
    slopes = gradients(at(program, fit.params).exact().total)
    assert max(float(value.abs().max()) for value in slopes.values()) < 1e-3


BATCHED = [
    name
    for name, program in PROGRAMS.items()
    if len(program.data_plates) == 1 and program.resizable and name != "scaled_data"
]


@pytest.mark.parametrize("name", BATCHED)
@pytest.mark.parametrize("hard", [False, True])
def test_batches_of_data_change_nothing(name: str, hard: bool):
    """Statistics add up over batches, and a last batch that is smaller counts by its size."""
    program = PROGRAMS[name]
    started = program.start()
    fits = [
        lvppl.EM(started.model, hard=hard).fit(
            *started.args, max_iter=4, batch_size=batch_size, **EXACTLY
        )
        for batch_size in (None, 1, 3)
    ]
    for other in fits[1:]:
        agree(objective(other), objective(fits[0]), 1e-7)
        for key, value in fits[0].params.items():
            agree(other.params[key], value, 1e-6)


# ----------------------------------------------------------------------- hard, and at a temperature


@every
def test_hard_em_never_decreases_the_joint(program: Program):
    """Its objective is max_z ln p(z, y), the hard ELBO of the point guide at the best z."""
    _, fit = fitted(program, 8, hard=True)
    history = objective(fit)
    assert fit.status in {"max_steps", "converged", "diverged"}, fit.reason
    if fit.status == "diverged":  # a component with one datum: its density has no bound
        pytest.skip("hard assignments leave a component one datum, whose scale falls to zero")
    assert (history.diff() >= -SLACK).all()
    agree(history[0], program.start().exact().map()[1].detach(), 1e-10)
    agree(history[-1], at(program, fit.params).exact().map()[1].detach(), 1e-9)


@every
@pytest.mark.parametrize("temperature", [0.4, 3.0])
def test_tempered_em_never_decreases_its_objective(program: Program, temperature: float):
    """T ln sum_z p(z, y)^(1/T)."""
    _, fit = fitted(program, 8, temperature=temperature)
    history = objective(fit)
    assert (history.diff() >= -SLACK).all()
    agree(history[0], program.start().exact().tempered(temperature).detach(), 1e-10)
    end = at(program, fit.params).exact()
    agree(history[-1], end.tempered(temperature).detach(), 1e-9)


def test_temperature_one_is_em():
    program = PROGRAMS["gaussian_mixture"]
    _, plain = fitted(program, 10)
    _, tempered = fitted(program, 10, temperature=1.0)
    agree(objective(tempered), objective(plain), 1e-12)
    for name, value in plain.params.items():
        agree(tempered.params[name], value, 1e-12)


def test_a_low_temperature_is_hard_em():
    program = PROGRAMS["tied_scale"]
    _, hard = fitted(program, 5, hard=True)
    _, cold = fitted(program, 5, temperature=1e-4)
    agree(objective(cold), objective(hard), 1e-3)
    for name in ("loc", "scale"):
        agree(cold.params[name], hard.params[name], 1e-6)


def test_hard_em_and_em_differ():
    program = PROGRAMS["tied_scale"]
    _, hard = fitted(program, 5, hard=True)
    _, soft = fitted(program, 5)
    assert float((hard.params["loc"] - soft.params["loc"]).abs().max()) > 0.01
    assert hard.tracked != soft.tracked
    assert soft.tracked == "ln p(y)" and hard.tracked == "hard ELBO"


# -------------------------------------------------------------------------- scikit-learn's mixtures

COMPONENTS, FEATURES = 3, 2


def blobs(count: int = 200) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Overlapping clusters, and one start for all."""
    random = np.random.RandomState(5)
    centres = np.array([[-2.0, 0.5], [0.5, -1.0], [1.5, 2.0]])
    y = centres[random.randint(COMPONENTS, size=count)] + random.randn(count, FEATURES)
    full = np.stack([make_spd_matrix(FEATURES, random_state=i) for i in range(COMPONENTS)])
    start = {
        "weights": np.array([0.5, 0.3, 0.2]),
        "means": centres + 0.6 * random.randn(COMPONENTS, FEATURES),
        "full": full,
        "tied": full[0],
        "diag": np.array([[0.8, 1.2], [0.5, 1.5], [1.1, 0.7]]),
        "spherical": np.array([0.8, 1.2, 0.6]),
    }
    return y, start


def gaussian_program(kind: str, start: dict[str, np.ndarray]) -> Any:
    """The mixture of this kind of covariance as a Pyro program."""
    factor = np.linalg.cholesky(start[kind]) if kind in ("full", "tied") else np.sqrt(start[kind])
    lower = kind in ("full", "tied")
    constraint = constraints.lower_cholesky if lower else constraints.positive

    def model(y: Tensor) -> None:
        weights = simplex("weights", start["weights"])
        loc = pyro.param("loc", lambda: t(start["means"]))
        scale = pyro.param("scale", lambda: t(factor), constraint=constraint)
        with pyro.plate("data", len(y)):
            z = categorical("z", weights)
            if kind == "full":
                density = dist.MultivariateNormal(loc[z], scale_tril=scale[z])
            elif kind == "tied":
                density = dist.MultivariateNormal(loc[z], scale_tril=scale)
            elif kind == "diag":
                density = dist.Normal(loc[z], scale[z]).to_event(1)
            else:
                density = dist.Normal(loc[z], scale[z].unsqueeze(-1)).to_event(1)
            pyro.sample("y", density, obs=y)

    return model


def covariances(kind: str, scale: Tensor) -> Tensor:
    return scale @ scale.mT if kind in ("full", "tied") else scale**2


def precisions(kind: str, start: np.ndarray) -> np.ndarray:
    return np.linalg.inv(start) if kind in ("full", "tied") else 1 / start


@pytest.mark.parametrize("kind", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("iterations", [1, 15])
def test_a_gaussian_mixture_is_that_of_scikit_learn(kind: str, iterations: int):
    y, start = blobs()
    peer = GaussianMixture(
        COMPONENTS,
        covariance_type=kind,
        reg_covar=0,
        tol=0,
        max_iter=iterations,
        weights_init=start["weights"],
        means_init=start["means"],
        precisions_init=precisions(kind, start[kind]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it has not converged
        peer.fit(y)
    fit = lvppl.EM(gaussian_program(kind, start)).fit(t(y), max_iter=iterations, **EXACTLY)
    agree(fit.params["weights"], peer.weights_, 1e-6)
    agree(fit.params["loc"], peer.means_, 1e-6)
    agree(covariances(kind, fit.params["scale"]), peer.covariances_, 1e-6)
    history = objective(fit)
    assert len(history) == iterations + 1
    agree(history[-2] / len(y), peer.lower_bound_, 1e-9)  # before its last M-step
    agree(history[-1], peer.score_samples(y).sum(), 1e-6)
    agree(fit.log_evidence(t(y)).per_datum.detach(), peer.score_samples(y), 1e-6)
    agree(fit.posterior(t(y)).marginals("z").detach(), peer.predict_proba(y), 1e-6)
    assert {fit.m_step[name].how for name in fit.params} == {"closed form"}


def test_hard_em_with_equal_weights_and_unit_covariances_is_kmeans():
    y, start = blobs(300)

    def model(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: t(start["means"]))
        with pyro.plate("data", len(y)):
            z = categorical("z", torch.full((COMPONENTS,), 1 / COMPONENTS, dtype=y.dtype))
            pyro.sample("y", dist.Normal(loc[z], t(1.0)).to_event(1), obs=y)

    peer = KMeans(COMPONENTS, init=start["means"], n_init=1, algorithm="lloyd", tol=0).fit(y)
    fit = lvppl.EM(model, hard=True).fit(t(y), max_iter=100, tol=1e-10)
    assert fit.status == "converged", fit.reason
    agree(fit.params["loc"], peer.cluster_centers_, 1e-5)
    labels = fit.posterior(t(y)).map().values["z"]
    assert np.array_equal(labels.numpy(), peer.labels_)
    constant = len(y) * (math.log(COMPONENTS) + 0.5 * FEATURES * math.log(2 * math.pi))
    agree(-2 * (objective(fit)[-1] + constant), peer.inertia_, 1e-5)


# ----------------------------------------------------------------------------------------- hmmlearn


def chain_start() -> dict[str, np.ndarray]:
    return {
        "initial": np.array([0.5, 0.3, 0.2]),
        "transition": np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]]),
        "means": np.array([[-1.0, 0.2], [0.5, -0.4], [2.0, 1.0]]),
        "variances": np.array([[0.8, 1.1], [0.6, 0.9], [1.2, 0.7]]),
    }


def sequences(count: int = 5, length: int = 12) -> np.ndarray:
    """Draws of a chain near the start, (sequences, steps, features)."""
    random, start = np.random.RandomState(8), chain_start()
    y = np.empty((count, length, 2))
    for row in range(count):
        state = random.choice(3, p=start["initial"])
        for step in range(length):
            y[row, step] = 1.3 * start["means"][state] + random.randn(2)
            state = random.choice(3, p=start["transition"][state])
    return y


def gaussian_hmm(y: np.ndarray, iterations: int) -> Any:
    """hmmlearn without its priors, after as many iterations from the same start."""
    hmm = pytest.importorskip("hmmlearn.hmm")
    start = chain_start()
    peer = hmm.GaussianHMM(
        3,
        covariance_type="diag",
        min_covar=0,
        means_weight=0,
        covars_prior=0,
        covars_weight=0,
        n_iter=iterations,
        tol=0,
        init_params="",
    )
    peer.startprob_, peer.transmat_ = start["initial"], start["transition"]
    peer.means_, peer.covars_ = start["means"], start["variances"]
    return peer.fit(y.reshape(-1, 2), [y.shape[1]] * len(y))


def chain_program(form: str) -> Any:
    """The chain by `pyro.markov`, or as one distribution that sums its states out itself."""
    start = chain_start()

    def model(y: Tensor) -> None:
        initial = simplex("initial", start["initial"])
        transition = simplex("transition", start["transition"])
        loc = pyro.param("loc", lambda: t(start["means"]))
        deviations = np.sqrt(start["variances"])
        scale = pyro.param("scale", lambda: t(deviations), constraint=constraints.positive)
        with pyro.plate("sequences", y.shape[0]):
            if form == "distribution":
                emission = dist.Normal(loc, scale).to_event(1)
                chain = lvppl.distributions.HiddenMarkov(initial.log(), transition.log(), emission)
                pyro.sample("y", chain, obs=y)
                return
            x = None
            for step in pyro.markov(range(y.shape[1])):
                x = categorical(f"x_{step}", initial if x is None else transition[x])
                emission = dist.Normal(loc[x], scale[x]).to_event(1)
                pyro.sample(f"y_{step}", emission, obs=y[:, step])

    return model


@pytest.mark.parametrize("iterations", [1, 10])
@pytest.mark.parametrize("form", ["program", "distribution"])
def test_a_chain_is_that_of_hmmlearn(form: str, iterations: int):
    y = sequences()
    peer = gaussian_hmm(y, iterations)
    fit = lvppl.EM(chain_program(form)).fit(t(y), max_iter=iterations, **EXACTLY)
    agree(fit.params["initial"], peer.startprob_, 1e-6)
    agree(fit.params["transition"], peer.transmat_, 1e-6)
    agree(fit.params["loc"], peer.means_, 1e-6)
    agree(fit.params["scale"] ** 2, np.array([np.diag(c) for c in peer.covars_]), 1e-6)
    history = objective(fit)
    agree(history[:-1], list(peer.monitor_.history)[-iterations:], 1e-6)
    agree(history[-1], peer.score(y.reshape(-1, 2), [y.shape[1]] * len(y)), 1e-6)


# -------------------------------------------------------------------------------- fits and records


def test_a_fit_says_how_it_ended():
    started = PROGRAMS["tied_scale"].start()
    short = lvppl.EM(started.model).fit(*started.args, max_iter=1, **EXACTLY)
    assert short.status == "max_steps" and "1" in short.reason
    program = PROGRAMS["bernoulli_mixture"]
    started = program.start()
    long = lvppl.EM(started.model).fit(*started.args, max_iter=2000, tol=1e-8)
    assert long.status == "converged", long.reason
    assert objective(long).diff()[-1] < 1e-6
    assert len(long.history["objective"]) < 2001


def test_a_maximum_is_a_fixed_point():
    """Fitting again from the end of a converged fit changes nothing."""
    program = PROGRAMS["categorical_chain"]
    started = program.start()
    fit = lvppl.EM(started.model).fit(*started.args, max_iter=5000, tol=1e-13)
    moved = at(program, fit.params)
    slopes = gradients(moved.exact().total)
    assert max(float(value.abs().max()) for value in slopes.values()) < 1e-4


def test_the_posterior_and_evidence_of_a_fit_are_at_its_parameters():
    program = PROGRAMS["nested_plates"]
    started, fit = fitted(program, 3)
    exact = at(program, fit.params).exact()
    program.start()  # whatever the store holds now
    (y,) = started.args
    agree(fit.log_evidence(y).total.detach(), exact.total.detach(), 1e-10)
    for name in exact.latents:
        agree(fit.posterior(y).marginals(name), exact.marginals(name), 1e-10)
    other = y[[1, 0, 1]]
    agree(fit.posterior(other).marginals("group"), exact.marginals("group")[[1, 0, 1]], 1e-10)


def test_two_fits_of_the_same_names_do_not_touch_each_other():
    one, other = PROGRAMS["gaussian_mixture"], PROGRAMS["tied_scale"]
    _, alone = fitted(one, 3)
    first = lvppl.EM(one.build()[0]).fit(*one.build()[1], max_iter=3, **EXACTLY)
    kept = {name: value.clone() for name, value in first.params.items()}
    lvppl.EM(other.build()[0]).fit(*other.build()[1], max_iter=3, **EXACTLY)
    for name, value in first.params.items():
        assert torch.equal(value, kept[name])
        agree(value, alone.params[name], 1e-12)


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_restarts_keep_the_best_and_repeat_with_the_seed(init: str):
    y, start = blobs(120)
    model = gaussian_program("spherical", start)

    def run(seed: int, restarts: int = 4) -> Any:
        em = lvppl.EM(model, restarts=restarts, init=init)
        return em.fit(t(y), max_iter=30, seed=seed)

    state = torch.get_rng_state()
    fit, again = run(3), run(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(fit.restarts) == 4
    for name, value in fit.params.items():
        assert torch.equal(value, again.params[name])
    best = objective(fit)[-1]
    agree(lvppl_evidence(model, fit, y), best, 1e-8)
    singles = [float(objective(run(seed, 1))[-1]) for seed in range(6)]
    assert max(singles) - min(singles) > 1e-9 or abs(float(best) - max(singles)) < 1e-6


def lvppl_evidence(model: Any, fit: Any, y: np.ndarray) -> Tensor:
    """ln p(y) at a fit's parameters, without the fit."""
    pyro.clear_param_store()
    model(t(y))
    set_parameters(dict(fit.params))
    return lvppl.log_evidence(model, t(y)).total.detach()


def test_the_generators_and_the_store_are_left_alone():
    started = PROGRAMS["gaussian_mixture"].start()
    before = {name: value.detach().clone() for name, value in parameters().items()}
    state = torch.get_rng_state()
    lvppl.EM(started.model, init="random", restarts=2).fit(*started.args, max_iter=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in parameters().items())


# ---------------------------------------------------------------------------------------- refusals


def test_a_continuous_latent_is_refused_by_name():
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            depth = pyro.sample("depth", dist.Normal(t(0.0), t(1.0)))
            pyro.sample("y", dist.Normal(depth, pyro.param("scale", t(1.0))), obs=y)

    with pytest.raises(lvppl.ProgramError, match="'depth'"):
        lvppl.EM(model).fit(t([0.3, 1.2]))


def test_a_program_without_parameters_is_refused():
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = categorical("z", t([0.3, 0.7]))
            pyro.sample("y", dist.Normal(t([-1.0, 1.0])[z], t(1.0)), obs=y)

    with pytest.raises(lvppl.ProgramError, match="param"):
        lvppl.EM(model).fit(t([0.3, 1.2]))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"restarts": 0}, "restarts"),
        ({"init": "best"}, "init"),
        ({"temperature": 0.0}, "temperature"),
        ({"hard": True, "temperature": 2.0}, "temperature"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], says: str):
    started = PROGRAMS["gaussian_mixture"].start()
    with pytest.raises(lvppl.ProgramError, match=says):
        lvppl.EM(started.model, **options).fit(*started.args)

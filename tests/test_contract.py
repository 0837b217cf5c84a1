"""One contract for every objective over every program of `tests/programs.py`.

Budget. A statistical assertion compares the mean of REPEATS independent calls, each an average
over many particles and copies of the data, with the exact number. It allows k standard errors, k
the Student quantile at which all comparisons of this file together (fewer than COMPARISONS) fail
falsely with probability below 1e-4. Seeds are fixed besides.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.distributions.testing.fakes import NonreparameterizedNormal
from pyro.infer import SVI
from torch import Tensor

import lvppl
from lvppl.errors import ProgramError
from tests.programs import PROGRAMS, Built, Oracle, Program, Started

REPEATS = 20
COMPARISONS = 10_000
EXACT = 1e-10


def tolerance(standard_error: Tensor, repeats: int = REPEATS) -> Tensor:
    """Allowed distance of a mean of `repeats` independent calls from the truth."""
    k = float(scipy.stats.t.ppf(1.0 - 0.5e-4 / COMPARISONS, repeats - 1))
    return k * standard_error + EXACT


@dataclasses.dataclass(frozen=True)
class Case:
    """An objective, the loss a datum that it must have in expectation, and where it applies."""

    name: str
    make: Callable[[int], lvppl.ELBO]  # of the number of particles
    loss: Callable[[Oracle, Program], Tensor]  # (data,)
    applies: Callable[[Program], bool] = lambda program: True
    averages_particles: bool = True
    model_only: bool = False  # the guide's gradient is that of another loss, tested on its own

    def own(self, started: Started, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """The gradients that must be those of the loss."""
        if not self.model_only:
            return gradients
        names = poutine.trace(started.built.model, param_only=True).get_trace(*started.built.args)
        return {name: gradients[name] for name in gradients if name in names.param_nodes}


def pathwise(program: Program) -> bool:
    """Every guide site is a reparameterised draw."""
    return program.reparameterised and not program.point_guide and not program.enumerated_in_guide


def continuous_point(program: Program) -> bool:
    return program.name == "delta_guide"


def has_plain_weights(program: Program) -> bool:
    """What reweighted wake–sleep asks for."""
    reweighted = program.reweighted_latent or "_scaled" in program.name or "_masked" in program.name
    points = program.point_guide or program.enumerated_in_guide
    return program.iwae_particles > 0 and not points and not reweighted


def has_importance_weights(program: Program) -> bool:
    return program.iwae_particles > 0


CASES = [
    Case("elbo_kl", lambda n: lvppl.ELBO(num_particles=n, form="kl"), lambda o, p: -o.elbo),
    Case(
        "elbo_entropy", lambda n: lvppl.ELBO(num_particles=n, form="entropy"), lambda o, p: -o.elbo
    ),
    Case(
        "elbo_stl",
        lambda n: lvppl.ELBO(num_particles=n, form="entropy", gradient="stl"),
        lambda o, p: -o.elbo,
        pathwise,
    ),
    Case("hard_elbo", lambda n: lvppl.HardELBO(num_particles=n), lambda o, p: -o.hard_elbo),
    Case(
        "rate_distortion_1",
        lambda n: lvppl.RateDistortion(weight=1.0, num_particles=n),
        lambda o, p: o.rate + o.distortion,
        lambda p: not continuous_point(p),
    ),
    Case(
        "rate_distortion_3",
        lambda n: lvppl.RateDistortion(weight=3.0, num_particles=n),
        lambda o, p: o.rate + 3.0 * o.distortion,
        lambda p: not continuous_point(p),
    ),
    Case(
        "iwae",
        lambda n: lvppl.IWAE(num_particles=n),
        lambda o, p: -o.iwae(p.iwae_particles),
        has_importance_weights,
        averages_particles=False,
    ),
    Case(
        "iwae_1",
        lambda n: lvppl.IWAE(num_particles=1),
        lambda o, p: -o.iwae(1),
        has_importance_weights,
        averages_particles=False,
    ),
    Case(
        "iwae_dreg",
        lambda n: lvppl.IWAE(num_particles=n, gradient="dreg"),
        lambda o, p: -o.iwae(p.iwae_particles),
        lambda p: has_importance_weights(p) and pathwise(p) and not p.reweighted_latent,
        averages_particles=False,
    ),
    Case(
        "reweighted_wake_sleep",
        lambda n: lvppl.ReweightedWakeSleep(num_particles=n),
        lambda o, p: -o.iwae(p.iwae_particles),
        has_plain_weights,
        averages_particles=False,
        model_only=True,
    ),
]
BY_NAME = {case.name: case for case in CASES}
PAIRS = [(c, p) for c in CASES for p in PROGRAMS.values() if c.applies(p)]
IDS = [f"{c.name}-{p.name}" for c, p in PAIRS]


@dataclasses.dataclass(frozen=True)
class Sizes:
    particles: int
    copies: int
    repeats: int = REPEATS


def sizes(case: Case, program: Program) -> Sizes:
    """Split the draws of one call between particles and copies of the data."""
    if not program.sampled:
        return Sizes(particles=max(1, program.iwae_particles), copies=1, repeats=1)
    if not case.averages_particles:
        if program.tileable:
            return Sizes(program.iwae_particles, copies=2000)
        return Sizes(program.iwae_particles, copies=1, repeats=100)
    if not program.vectorises:
        return Sizes(3, copies=1000) if program.tileable else Sizes(16, copies=1)
    return Sizes(40, copies=100) if program.tileable else Sizes(4000, copies=1)


def flat(gradients: dict[str, Tensor], copies: int) -> Tensor:
    return torch.cat([g.detach().flatten() for g in gradients.values()]) / copies


def exact_loss(case: Case, started: Started) -> Tensor:
    oracle = started.oracle()
    return oracle.scale * case.loss(oracle, started.program).sum()


def sampled_losses(
    objective: lvppl.ELBO, started: Started, size: Sizes, case: Case | None = None
) -> tuple[Tensor, Tensor]:
    """Losses (repeats,) and gradients (repeats, parameters), for one copy of the data."""
    losses, gradients = [], []
    for seed in range(size.repeats):
        pyro.set_rng_seed(seed)
        loss = objective.differentiable_loss(*started.call)
        assert loss.shape == ()
        losses.append(loss.detach() / size.copies)
        found = started.gradients(loss)
        gradients.append(flat(case.own(started, found) if case else found, size.copies))
    return torch.stack(losses), torch.stack(gradients)


def assert_mean(samples: Tensor, exact: Tensor, what: str) -> None:
    """The mean over dim 0 is exact: within the budget, or to EXACT for a single sample."""
    repeats = len(samples)
    error = samples.std(0, correction=1) / math.sqrt(repeats) if repeats > 1 else 0.0 * samples[0]
    allowed = tolerance(error, max(repeats, 2))
    distance = (samples.mean(0) - exact).abs()
    assert bool((distance <= allowed).all()), (
        f"{what}: got {samples.mean(0).tolist()}, expected {exact.tolist()}, "
        f"standard error {error.tolist()}"
    )


@pytest.mark.parametrize(("case", "program"), PAIRS, ids=IDS)
def test_loss_and_gradients(case: Case, program: Program) -> None:
    """Value and gradient of every parameter, against the oracle and autograd through it."""
    started = program.start()
    truth = exact_loss(case, started)
    truth_gradients = case.own(started, started.gradients(truth))
    size = sizes(case, program)
    tiled = program.start(repeats=size.copies)
    losses, gradients = sampled_losses(case.make(size.particles), tiled, size, case)
    assert_mean(losses, truth.detach(), "loss")
    assert_mean(gradients, flat(truth_gradients, 1), f"gradient {list(truth_gradients)}")


@pytest.mark.parametrize(
    "program",
    [p for p in PROGRAMS.values() if not p.reparameterised and p.sampled],
    ids=lambda p: p.name,
)
def test_one_particle_score_function(program: Program) -> None:
    """With one particle the score-function gradient is unbiased too."""
    started = program.start()
    truth = exact_loss(BY_NAME["elbo_kl"], started)
    truth_gradients = flat(started.gradients(truth), 1)
    size = Sizes(particles=1, copies=4000)
    objective = lvppl.ELBO(num_particles=1)
    losses, gradients = sampled_losses(objective, program.start(repeats=size.copies), size)
    assert_mean(losses, truth.detach(), "loss")
    assert_mean(gradients, truth_gradients, "gradient")


def in_copies(program: Callable[..., object], number: int) -> Callable[..., object]:
    """Independent copies of a program of global latents, by a plate around it."""

    def copied(*args: Tensor) -> None:
        with pyro.plate("copies", number, dim=-2):
            program(*args)

    return copied


@pytest.mark.parametrize("name", ["global_normal", "linear_regression"])
@pytest.mark.parametrize("gradient", ["standard", "dreg"])
def test_iwae_of_global_latents_in_an_outer_plate(name: str, gradient: str) -> None:
    """A plate around everything holds the data, and the plate inside it sums into a datum."""
    program, copies = PROGRAMS[name], 2000
    started = program.start()
    truth = -started.oracle().iwae(program.iwae_particles).sum()
    built = started.built
    outer = dataclasses.replace(
        started,
        built=dataclasses.replace(
            built, model=in_copies(built.model, copies), guide=in_copies(built.guide, copies)
        ),
    )
    objective = lvppl.IWAE(num_particles=program.iwae_particles, gradient=gradient)
    losses, gradients = sampled_losses(objective, outer, Sizes(0, copies))
    assert_mean(losses, truth.detach(), "loss")
    assert_mean(gradients, flat(started.gradients(truth), 1), "gradient")


@pytest.mark.parametrize(
    "name", ["normal_normal", "subsampled", "discrete_and_continuous", "auto_normal"]
)
def test_iwae_of_one_particle_is_the_elbo(name: str) -> None:
    """Same draws, same number: ln w of one particle is the ELBO's term without closed forms."""
    started = PROGRAMS[name].start()
    values = []
    for objective in (lvppl.IWAE(num_particles=1), lvppl.ELBO(gradient="stl")):
        pyro.set_rng_seed(3)
        values.append(objective.loss(*started.call))
    assert values[0] == pytest.approx(values[1], abs=EXACT)


# -------------------------------------------------------------------------------- other distortions


SQUARED = {
    "normal_normal": lambda o, y: (y - o.guide.mean[:, 0]) ** 2 + o.guide.cov[:, 0, 0],
    "bernoulli_score": lambda o, y: (o.guide * (y[:, None] - pyro.param("locs")) ** 2).sum(-1),
    "categorical_in_guide": lambda o, y: (o.guide * (y[:, None] - pyro.param("locs")) ** 2).sum(-1),
    "mixture_in_model": lambda o, y: (o.posterior * (y[:, None] - pyro.param("locs")) ** 2).sum(-1),
    "subsampled": lambda o, y: (y[[1, 3, 4]] - o.guide.mean[:, 0]) ** 2 + o.guide.cov[:, 0, 0],
}


@pytest.mark.parametrize(
    "distortion", ["squared", lambda y, reconstruction: (y - reconstruction) ** 2]
)
@pytest.mark.parametrize("name", list(SQUARED))
def test_squared_distortion(name: str, distortion: str | Callable[..., Tensor]) -> None:
    """rate + 2 E_q (y - E[y | z])^2 and its gradient, where that expectation has a closed form."""
    program = PROGRAMS[name]
    started = program.start()
    oracle, y = started.oracle(), started.built.args[0]
    truth = oracle.scale * (oracle.rate + 2.0 * SQUARED[name](oracle, y)).sum()
    truth_gradients = flat(started.gradients(truth), 1)
    size = Sizes(2, 1000) if program.sampled else Sizes(1, 1, repeats=1)
    objective = lvppl.RateDistortion(weight=2.0, distortion=distortion, num_particles=2)
    losses, gradients = sampled_losses(objective, program.start(repeats=size.copies), size)
    assert_mean(losses, truth.detach(), "loss")
    assert_mean(gradients, truth_gradients, "gradient")


# ---------------------------------------------------------------------------- gradients that vanish


def exact_posterior_guide(dtype: torch.dtype, repeats: int = 1) -> Built:
    """`normal_normal` with its guide at the posterior."""
    built = PROGRAMS["normal_normal"].build(dtype, repeats)
    built.guide(*built.args)
    built.model(*built.args)
    store = pyro.get_param_store()
    prior, noise = store["prior_scale"].detach() ** 2, store["noise"].detach() ** 2
    with torch.no_grad():
        store["slope"] = prior / (prior + noise)
        store["shift"] = noise * store["prior_loc"].detach() / (prior + noise)
        store["width"] = (prior * noise / (prior + noise)).sqrt()
    return built


def at_the_posterior() -> Started:
    pyro.clear_param_store()
    return Started(PROGRAMS["normal_normal"], exact_posterior_guide(torch.float64))


def test_path_gradients_vanish_at_the_posterior() -> None:
    """STL and DReG have zero variance there, draw by draw; the standard gradient does not."""
    started = at_the_posterior()
    guide_parameters = ("slope", "shift", "width")

    def guide_gradient(objective: lvppl.ELBO) -> Tensor:
        pyro.set_rng_seed(0)
        gradients = started.gradients(objective.differentiable_loss(*started.call))
        return torch.stack([gradients[name] for name in guide_parameters])

    assert guide_gradient(lvppl.ELBO(form="entropy", gradient="stl")).abs().max() < 1e-12
    assert guide_gradient(lvppl.IWAE(num_particles=4, gradient="dreg")).abs().max() < 1e-12
    assert guide_gradient(lvppl.ELBO(form="entropy")).abs().max() > 1e-2


def test_every_importance_weight_is_the_evidence_at_the_posterior() -> None:
    started = at_the_posterior()
    evidence = started.oracle().log_evidence.detach()
    for objective in (lvppl.ELBO(gradient="stl"), lvppl.IWAE(num_particles=7)):
        assert objective.loss(*started.call) == pytest.approx(-float(evidence.sum()), abs=EXACT)


# ---------------------------------------------------------------------------------- as Pyro runs it


SAMPLE = ["normal_normal", "subsampled", "bernoulli_score", "mixture_in_model", "auto_normal",
          "module_decoder", "pyro_module_guide", "categorical_in_guide"]  # fmt: skip


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize("case", ["elbo_kl", "hard_elbo", "rate_distortion_3", "iwae"])
def test_plain_pyro_svi_takes_the_gradient_step(case: str, name: str) -> None:
    """`pyro.infer.SVI` with SGD moves every parameter by minus the rate times the gradient."""
    program, objective = PROGRAMS[name], BY_NAME[case].make(3)
    if not BY_NAME[case].applies(program):
        pytest.skip("no importance weights")
    started = program.start()
    model, guide, *args = started.call
    pyro.set_rng_seed(1)
    loss = objective.differentiable_loss(model, guide, *args)
    gradients = started.gradients(loss)
    before = {key: value.detach().clone() for key, value in started.parameters().items()}

    svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), loss=objective)
    pyro.set_rng_seed(1)
    assert float(svi.evaluate_loss(*args)) == pytest.approx(loss.item(), abs=EXACT)
    pyro.set_rng_seed(1)
    assert float(svi.step(*args)) == pytest.approx(loss.item(), abs=EXACT)
    for key, value in started.parameters().items():
        expected = before[key] - 1e-3 * gradients[key]
        torch.testing.assert_close(value.detach(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss_agrees_with_differentiable_loss(case: Case) -> None:
    """`loss` is a float, `loss_and_grads` fills `.grad`; all are the same number."""
    started = PROGRAMS["normal_normal"].start()
    objective = case.make(3)
    pyro.set_rng_seed(5)
    expected = objective.differentiable_loss(*started.call)
    gradients = started.gradients(expected)
    for method in (objective.loss, objective.loss_and_grads):
        pyro.set_rng_seed(5)
        value = method(*started.call)
        assert isinstance(value, float)
        assert value == pytest.approx(expected.item(), abs=EXACT)
    for key, value in started.parameters().items():
        torch.testing.assert_close(value.grad, gradients[key], rtol=0, atol=1e-12)


def state(value: object) -> object:
    """A comparable copy of an object's attributes, tensors as numbers."""
    if isinstance(value, Tensor):
        return value.detach().tolist()
    if isinstance(value, dict):
        return {key: state(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [state(item) for item in value]
    if hasattr(value, "__dict__") and type(value).__module__.startswith("lvppl"):
        return state(vars(value))
    return value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_evaluation_leaves_the_objective_unchanged(case: Case) -> None:
    objective = case.make(2)
    before = copy.deepcopy(state(objective))
    for name in ("normal_normal", "global_normal", "nested_plates"):
        started = PROGRAMS[name].start()
        objective.loss(*started.call)
        objective.loss_and_grads(*started.call)
        objective.report(*started.call)
        assert state(objective) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["normal_normal", "concatenating", "discrete_and_continuous"])
def test_same_seed_same_loss(case: Case, name: str) -> None:
    """Also the first call, in which the structure of the program is found out."""
    started = PROGRAMS[name].start()
    values = []
    for _ in range(3):
        pyro.set_rng_seed(11)
        values.append(case.make(2).loss(*started.call))
    assert values[0] == values[1] == values[2]


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.averages_particles], ids=lambda case: case.name
)
def test_structure_is_not_carried_from_one_guide_to_the_next(case: Case) -> None:
    """One model with guides that come and go, of one signature: each gets its own answer."""
    first = PROGRAMS["two_layer_top_down"].start()
    pyro.set_rng_seed(0)
    case.make(5).loss(*first.call)
    second = PROGRAMS["two_layer_bottom_up"].start(repeats=400)
    shared = dataclasses.replace(
        second, built=dataclasses.replace(second.built, model=first.built.model)
    )
    losses, _ = sampled_losses(case.make(10), shared, Sizes(10, copies=400))
    truth = exact_loss(case, PROGRAMS["two_layer_bottom_up"].start())
    assert_mean(losses, truth.detach(), "loss")


class Switching:
    """One object whose guide changes its order of sampling, or loses its reparameterisation."""

    bottom_up = False
    score = False

    def __init__(self) -> None:
        self.top_down_guide = PROGRAMS["two_layer_top_down"].build(torch.float64, 1).guide
        self.bottom_up_guide = PROGRAMS["two_layer_bottom_up"].build(torch.float64, 1).guide

    def guide(self, y: Tensor) -> None:
        (self.bottom_up_guide if self.bottom_up else self.top_down_guide)(y)

    def normal_guide(self, y: Tensor) -> None:
        normal = NonreparameterizedNormal if self.score else dist.Normal
        with pyro.plate("data", len(y)):
            pyro.sample("z", normal(pyro.param("slope", y.new_tensor(0.6)) * y, 0.8))


def test_a_guide_that_changes_its_order_gets_no_stale_closed_form() -> None:
    """The rate of the bottom-up guide, asked of an object that ran top-down before."""
    program = PROGRAMS["two_layer_bottom_up"]
    truth = program.start().oracle().rate.detach()
    started = program.start()
    switching = Switching()
    model, y = started.built.model, started.built.args[0]
    objective = lvppl.ELBO(form="kl", num_particles=4000)
    objective.report(model, switching.guide, y)
    switching.bottom_up = True
    rates = []
    for seed in range(REPEATS):
        pyro.set_rng_seed(seed)
        report = objective.report(model, switching.guide, y)
        rates.append(report.rate.per_datum)
    assert_mean(torch.stack(rates), truth, "rate")


def test_a_guide_that_loses_its_reparameterisation_gets_its_baseline() -> None:
    """The second particle of the score function is drawn although the first run was pathwise."""
    started = PROGRAMS["normal_normal"].start()
    switching = Switching()
    model, y = started.built.model, started.built.args[0]
    objective = lvppl.ELBO(form="entropy")
    objective.loss_and_grads(model, switching.normal_guide, y)
    switching.score = True
    pyro.set_rng_seed(1)
    assert objective.terms(model, switching.normal_guide, (y,), {}).num_particles == 2
    gradients = []
    for seed in range(REPEATS):  # a fresh switch each time: the first run after it is what counts
        switching.score = False
        objective.report(model, switching.normal_guide, y)
        switching.score = True
        pyro.set_rng_seed(seed)
        loss = objective.differentiable_loss(model, switching.normal_guide, y)
        gradients.append(started.gradients(loss)["slope"])
    pyro.set_rng_seed(0)
    settled = lvppl.ELBO(form="entropy", num_particles=20_000)
    expected = started.gradients(settled.differentiable_loss(model, switching.normal_guide, y))[
        "slope"
    ]
    assert_mean(torch.stack(gradients), expected, "slope")


# ------------------------------------------------------------------------------------------ reports


def numbers(report: object) -> dict[str, object]:
    names = ("elbo", "rate", "distortion", "entropy", "loss")
    return {name: getattr(report, name) for name in names}


@pytest.mark.parametrize(("case", "program"), PAIRS, ids=IDS)
def test_report(case: Case, program: Program) -> None:
    """Identities between its numbers, shapes, scale, and the oracle datum by datum."""
    started = program.start()
    oracle = started.oracle()
    repeats = REPEATS if program.sampled else 1
    particles = 3 if not program.vectorises else (50 if program.sampled else 2)
    if not case.averages_particles:
        particles = max(1, program.iwae_particles)
    elbos, rates, distortions, entropies = [], [], [], []
    for seed in range(repeats):
        pyro.set_rng_seed(seed)
        report = case.make(particles).report(*started.call)
        for name, quantity in numbers(report).items():
            assert not quantity.total.requires_grad and not quantity.per_datum.requires_grad, name
            assert quantity.total.shape == ()
            assert quantity.total.dtype == torch.float64
            assert quantity.per_datum.shape == oracle.elbo.shape, name
            expected = oracle.scale * quantity.per_datum.sum()
            torch.testing.assert_close(quantity.total, expected, rtol=0, atol=EXACT)
        difference = report.elbo.per_datum + report.rate.per_datum + report.distortion.per_datum
        assert difference.abs().max() < EXACT
        if case.name == "rate_distortion_3":
            combined = report.rate.per_datum + 3.0 * report.distortion.per_datum
            torch.testing.assert_close(report.loss.per_datum, combined, rtol=0, atol=EXACT)
        if case.name == "hard_elbo":
            combined = report.hard_elbo.per_datum + report.entropy.per_datum
            torch.testing.assert_close(report.elbo.per_datum, combined, rtol=0, atol=EXACT)
            torch.testing.assert_close(report.loss.total, -report.hard_elbo.total)
        elbos.append(report.elbo.per_datum)
        rates.append(report.rate.per_datum)
        distortions.append(report.distortion.per_datum)
        entropies.append(report.entropy.per_datum)
    assert_mean(torch.stack(elbos), oracle.elbo.detach(), "elbo")
    assert_mean(torch.stack(rates), oracle.rate.detach(), "rate")
    assert_mean(torch.stack(distortions), oracle.distortion.detach(), "distortion")
    assert_mean(torch.stack(entropies), oracle.entropy.detach(), "entropy")


# ---------------------------------------------------------------------------------------- precision


SINGLE = [(c, p) for c, p in PAIRS if not p.sampled or c.name in ("elbo_kl", "iwae")]


@pytest.mark.parametrize(("case", "program"), SINGLE, ids=[f"{c.name}-{p.name}" for c, p in SINGLE])
def test_float32(case: Case, program: Program) -> None:
    """A float32 program gives float32 losses and gradients, the same to its precision."""
    started = program.start()
    truth = exact_loss(case, started)
    gradient_truth = flat(started.gradients(truth), 1)
    size = sizes(case, program)
    single = program.start(torch.float32, size.copies)
    objective = case.make(size.particles)
    loss = objective.differentiable_loss(*single.call)
    assert loss.dtype == torch.float32
    assert all(g.dtype == torch.float32 for g in single.gradients(loss).values())
    if program.sampled:
        losses, gradients = sampled_losses(objective, single, dataclasses.replace(size, repeats=8))
        error = losses.std() / math.sqrt(8)
        allowed = tolerance(error, 8) + 1e-4 * truth.abs()
        assert bool((losses.mean() - truth).abs() <= allowed)
    else:
        losses, gradients = sampled_losses(objective, single, size)
        torch.testing.assert_close(losses[0].double(), truth.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradients[0].double(), gradient_truth, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("name", ["bernoulli_score", "poisson_score", "score_then_pathwise"])
def test_path_gradients_of_score_function_sites_are_refused(name: str) -> None:
    started = PROGRAMS[name].start()
    for objective in (
        lvppl.ELBO(form="entropy", gradient="stl"),
        lvppl.IWAE(num_particles=2, gradient="dreg"),
    ):
        with pytest.raises(ProgramError, match="reparam"):
            objective.differentiable_loss(*started.call)


@pytest.mark.parametrize("name", ["scaled_latent", "masked_latent"])
def test_dreg_under_a_scale_or_mask_is_right_or_refused(name: str) -> None:
    """DReG's squared weights hold only for w = p / q; with q to a power they would be biased."""
    program = PROGRAMS[name]
    started = program.start()
    case = BY_NAME["iwae_dreg"]
    truth = exact_loss(case, started)
    truth_gradients = flat(started.gradients(truth), 1)
    size = sizes(case, program)
    tiled = program.start(repeats=size.copies)
    objective = case.make(size.particles)
    try:
        _, gradients = sampled_losses(objective, tiled, size)
    except ProgramError:
        return
    assert_mean(gradients, truth_gradients, "gradient")


def test_rate_of_a_continuous_point_guide_is_refused() -> None:
    """A density at a point is no code length."""
    started = PROGRAMS["delta_guide"].start()
    with pytest.raises(ProgramError):
        lvppl.RateDistortion(weight=2.0).differentiable_loss(*started.call)

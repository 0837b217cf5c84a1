"""Fits by stochastic variational inference: the answer, the steps, the stops."""

import gc
import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.distributions import constraints
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau

from lvppl.errors import ProgramError
from lvppl.inference import training as training_module
from lvppl.inference.svi import SVI
from lvppl.objectives import ELBO, IWAE

F64 = torch.float64


@pytest.fixture(autouse=True)
def clean():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_num_threads(threads)


def data(rows=20):
    return torch.linspace(-1, 3, rows, dtype=F64).sin() * 2 + 0.5


def model(y):
    """Normal–Normal with a global mean: exact posterior N(Σy / (N + 1/4), 1 / (N + 1/4))."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def guide(y):
    loc = pyro.param("loc", y.new_tensor(0.0))
    scale = pyro.param("scale", y.new_tensor(1.0), constraint=constraints.positive)
    pyro.sample("mean", dist.Normal(loc, scale))


def local_model(y):
    weight = pyro.param("weight", y.new_tensor(0.5))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Normal(weight * z, 0.5), obs=y)


def local_guide(y):
    slope = pyro.param("slope", y.new_tensor(0.1))
    scale = pyro.param("scale", y.new_tensor(1.0), constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(slope * y, scale))


def fit_of(program=model, its_guide=guide, *, options=None, **fit):
    settings = {"learning_rate": 0.05, "objective": Trace_ELBO(), **(options or {})}
    fit = {"seed": 1, "progress": False, **fit}
    y = fit.pop("y", data())
    return SVI(program, its_guide, **settings).fit(y, **fit)


def same_params(first, second):
    first, second = first.params, second.params
    assert first.keys() == second.keys()
    return all(first[name].equal(second[name]) for name in first)


# ------------------------------------------------------------------------------------- the answer


@pytest.mark.parametrize("batch_size", [None, 7])
def test_conjugate_posterior_is_found(batch_size):
    y = data()
    precision = len(y) + 0.25
    cosine = partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=1500, eta_min=1e-5)
    fit = SVI(
        model,
        guide,
        objective=ELBO(gradient="stl", form="entropy", num_particles=4),
        learning_rate=0.05,
        scheduler=cosine,
        scheduler_interval="step",
    ).fit(y, num_steps=1500, batch_size=batch_size, seed=0, progress=False)
    # Sticking the landing has no variance at the exact posterior; minibatches have some left.
    error = 1e-6 if batch_size is None else 0.02
    assert fit.params["loc"].item() == pytest.approx(float(y.sum() / precision), abs=error)
    assert fit.params["scale"].item() == pytest.approx(precision**-0.5, rel=error)
    draws = fit.posterior(y, num_samples=4000, seed=2).samples["mean"]
    standard_error = precision**-0.5 / math.sqrt(4000)
    assert abs(draws.mean() - y.sum() / precision) < 5 * standard_error + error
    assert draws.std().item() == pytest.approx(precision**-0.5, rel=5 / math.sqrt(8000) + error)


def test_full_fit_reports_the_exact_evidence_at_the_optimum():
    y = data()
    fit = fit_of(options={"objective": ELBO(gradient="stl", form="entropy")}, num_steps=1500)
    covariance = torch.eye(len(y), dtype=F64) + 4.0
    exact = dist.MultivariateNormal(torch.zeros(len(y), dtype=F64), covariance).log_prob(y)
    report = fit.report(y, seed=0)
    assert report.elbo.total.item() == pytest.approx(exact.item(), abs=1e-6)
    assert fit.history["elbo"][-1] * len(y) == pytest.approx(exact.item(), abs=1e-6)


# -------------------------------------------------------------------------------------- the steps


class AsOptimizer:
    """A callable from parameters to an optimiser."""

    def __call__(self, params):
        return torch.optim.Adam(params, lr=0.05)


def exponential():
    return pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "gamma": 0.9}
    )


ADAM = {"lr": 0.05}
EQUAL = [
    ({"optimizer": None, "learning_rate": 0.05}, lambda: pyro.optim.Adam(dict(ADAM))),
    ({"optimizer": torch.optim.Adam, "learning_rate": 0.05}, lambda: pyro.optim.Adam(dict(ADAM))),
    ({"optimizer": AsOptimizer(), "learning_rate": None}, lambda: pyro.optim.Adam(dict(ADAM))),
    (
        {"optimizer": partial(torch.optim.SGD, momentum=0.9), "learning_rate": 1e-3},
        lambda: pyro.optim.SGD({"lr": 1e-3, "momentum": 0.9}),
    ),
    ({"optimizer": pyro.optim.Adam(dict(ADAM)), "learning_rate": None}, None),
    (
        {
            "optimizer": pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.97, "clip_norm": 1.0}),
            "learning_rate": None,
        },
        None,
    ),
    ({"optimizer": pyro.optim.AdagradRMSProp({}), "learning_rate": None}, None),
    ({"optimizer": exponential(), "learning_rate": None}, exponential),
    ({"scheduler": partial(ExponentialLR, gamma=0.9)}, exponential),
    (
        {"scheduler": partial(ExponentialLR, gamma=0.9), "scheduler_interval": "step"},
        exponential,
    ),
]


@pytest.mark.parametrize(("options", "plain"), EQUAL)
def test_steps_are_those_of_plain_pyro(options, plain):
    fit = fit_of(local_model, local_guide, options=options, num_steps=20, seed=3)
    pyro.clear_param_store()
    optim = options["optimizer"] if plain is None else plain()
    reference = pyro.infer.SVI(local_model, local_guide, optim, loss=Trace_ELBO())
    pyro.set_rng_seed(3)
    losses = []
    for _ in range(20):
        losses.append(reference.step(data()))
        if isinstance(optim, pyro.optim.PyroLRScheduler):
            optim.step()
    assert fit.history["loss"] == pytest.approx(losses, rel=1e-12)
    for name, value in fit.params.items():
        torch.testing.assert_close(value, pyro.param(name).detach(), rtol=1e-12, atol=1e-12)


def test_a_pyro_optimizer_object_is_not_shared_between_fits():
    optim = pyro.optim.Adam(dict(ADAM))
    options = {"optimizer": optim, "learning_rate": None}
    first = fit_of(options=options, num_steps=5)
    assert optim.optim_objs == {}
    assert same_params(first, fit_of(options=options, num_steps=5))


def test_clip_norm_bounds_the_whole_gradient():
    sgd = {"optimizer": torch.optim.SGD, "learning_rate": 1.0, "clip_norm": 0.01}
    fit = fit_of(local_model, local_guide, options=sgd, num_steps=1)
    start = {"weight": 0.5, "slope": 0.1, "scale": 0.0}  # the scale unconstrained
    values = fit.state.values()[0]
    moves = [values[name].item() - start[name] for name in start]
    assert math.hypot(*moves) == pytest.approx(0.01, rel=1e-9)
    # a norm below the bound is left alone
    free = fit_of(local_model, local_guide, options={**sgd, "clip_norm": 1e9}, num_steps=1)
    plain = fit_of(local_model, local_guide, options={**sgd, "clip_norm": None}, num_steps=1)
    assert same_params(free, plain)


def test_plateau_scheduler_gets_a_number():
    plateau = partial(ReduceLROnPlateau, mode="max", factor=0.1, patience=0)
    fit = fit_of(
        options={"scheduler": plateau, "objective": ELBO()},
        num_steps=4,
        validation=data(),
        evaluate_every=1,
    )
    # the negative validation ELBO falls, so its maximum is the first: three times no better
    assert (np.diff(fit.history["validation_elbo"]) > 0).all()
    assert fit.settings["learning_rate"] == pytest.approx(0.05 * 0.1**3)


def test_parameters_made_late_are_trained_too():
    calls = []

    def late(y):
        calls.append(1)
        shift = pyro.param("shift", y.new_tensor(0.0)) if len(calls) > 30 else 0.0
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z + shift, 0.5), obs=y)

    fit = fit_of(late, local_guide, num_steps=60)
    assert len(calls) > 60
    assert fit.params["shift"].item() != 0.0


def test_every_row_is_visited_once_an_epoch_and_the_last_batch_is_partial():
    seen = []

    def watch(batch):
        seen.append(batch[0].tolist())
        return batch

    y = torch.arange(10, dtype=F64)
    fit_of(local_model, local_guide, y=y, num_epochs=3, batch_size=4, transform=watch)
    # preparation and evaluation see batches as well; the last evaluation comes after the steps
    steps = seen[len(seen) - 10 : -1]
    assert [len(batch) for batch in steps] == [4, 4, 2] * 3
    orders = [[*steps[i], *steps[i + 1], *steps[i + 2]] for i in (0, 3, 6)]
    assert all(sorted(order) == y.tolist() for order in orders)
    assert orders[0] != orders[1] != orders[2]


def test_transform_draws_from_the_fits_stream():
    def binarised(batch):
        return (torch.bernoulli(batch[0]), *batch[1:])

    def bernoulli_model(y):
        logit = pyro.param("logit", torch.zeros(()))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Bernoulli(logits=logit + 0 * z), obs=y)

    def prior_guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))

    y = torch.full((40,), 0.3)
    run = {"y": y, "num_epochs": 150, "batch_size": 10, "transform": binarised, "validation": y}
    first = fit_of(bernoulli_model, prior_guide, **run)
    assert same_params(first, fit_of(bernoulli_model, prior_guide, **run))
    assert first.params["logit"].sigmoid().item() == pytest.approx(0.3, abs=0.1)


def test_schedules_are_advanced_before_each_step():
    class Counting:
        def __init__(self):
            self.steps = []
            self.devices = []

        def to(self, device):
            self.devices.append(device)

        def advance_to(self, step):
            self.steps.append(step)

    class Scheduled(ELBO):
        counter = Counting()

        def schedules(self):
            return (self.counter,)

    objective = Scheduled()
    half = fit_of(options={"objective": objective}, num_steps=4)
    fit_of(options={"objective": objective}, num_steps=7, seed=None, resume=half)
    assert objective.counter.steps == list(range(7))
    assert objective.counter.devices == [torch.device("cpu")] * 2  # once for each fit


def test_plain_callable_objective():
    def loss(model, guide, y):
        return Trace_ELBO().differentiable_loss(model, guide, y)

    assert same_params(fit_of(options={"objective": loss}, num_steps=5), fit_of(num_steps=5))


def test_live_tensors_do_not_grow():
    counts = []

    def count(_):
        looks = len(counts) % 20 == 0
        if looks:
            gc.collect()
        counts.append(sum(type(o) is torch.Tensor for o in gc.get_objects()) if looks else None)

    fit_of(
        local_model,
        local_guide,
        options={"objective": IWAE(num_particles=3)},
        num_epochs=100,
        batch_size=10,
        callbacks=[count],
        evaluate_every=1000,
    )
    assert len(counts) == 100
    assert counts[20] == counts[60] == counts[80] > 0


# ------------------------------------------------------------------------------------- randomness


def test_the_seed_decides_and_the_global_generators_are_restored():
    pyro.set_rng_seed(11)
    expected = torch.rand(2), np.random.rand(2)
    pyro.set_rng_seed(11)
    first = fit_of(num_epochs=5, batch_size=6, seed=4)
    got = torch.rand(2), np.random.rand(2)
    assert got[0].equal(expected[0])
    assert (got[1] == expected[1]).all()
    assert same_params(first, fit_of(num_epochs=5, batch_size=6, seed=4))
    assert not same_params(first, fit_of(num_epochs=5, batch_size=6, seed=5))
    unseeded = fit_of(num_epochs=5, batch_size=6, seed=None)
    assert same_params(unseeded, fit_of(num_epochs=5, batch_size=6, seed=unseeded.seed))


def test_evaluations_and_callbacks_do_not_change_the_run():
    def noisy(_):
        torch.rand(100)
        pyro.set_rng_seed(0)

    plain = fit_of(num_epochs=6, batch_size=6, evaluate_every=100)
    busy = fit_of(num_epochs=6, batch_size=6, evaluate_every=1, callbacks=[noisy])
    assert same_params(plain, busy)
    assert len(busy.history["elbo"]) == 6
    assert len(plain.history["elbo"]) == 1


# ---------------------------------------------------------------------------------------- the end


def test_max_steps():
    fit = fit_of(num_epochs=10, num_steps=7, batch_size=8)
    assert (fit.status, fit.num_steps, fit.num_epochs) == ("max_steps", 7, 2)
    assert fit.reason == "all 7 steps are done"
    fit = fit_of(num_epochs=2, batch_size=8)
    assert (fit.status, fit.num_steps, fit.num_epochs) == ("max_steps", 6, 2)
    assert fit.reason == "all 2 epochs are done"


def test_tolerance_on_the_validation_elbo_stops():
    run = {"num_steps": 5000, "validation": data(11), "evaluate_every": 10, "patience": 5}
    options = {"objective": ELBO(num_particles=8)}
    fit = fit_of(options=options, tolerance=1e-3, **run)
    assert fit.status == "converged"
    assert "nats a row" in fit.reason
    values = fit.history["validation_elbo"]
    assert np.mean(values[-5:]) - np.mean(values[-10:-5]) < 1e-3
    # and not before
    for end in range(10, len(values)):
        assert np.mean(values[end - 5 : end]) - np.mean(values[end - 10 : end - 5]) >= 1e-3


def test_the_best_validation_elbo_is_kept_and_the_last_is_resumed():
    # The path from 0 to the mean of the training data passes the mean of the validation data.
    def point_model(y):
        loc = pyro.param("loc", y.new_tensor(0.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(loc + 0 * z, 1.0), obs=y)

    def prior_guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y.new_zeros(len(y)), 1.0))

    y, held_out = torch.full((10,), 2.0, dtype=F64), torch.full((4,), 0.7, dtype=F64)
    sgd = {"optimizer": torch.optim.SGD, "learning_rate": 1e-3, "objective": ELBO()}
    run = {"options": sgd, "y": y, "validation": held_out, "evaluate_every": 10}
    fit = fit_of(point_model, prior_guide, num_steps=300, **run)
    at = np.arange(10, 301, 10)
    path = 2 * (1 - (1 - 0.01) ** at)  # gradient descent on 10 (loc − 2)² / 2
    best = path[np.argmin(abs(path - 0.7))]
    assert fit.params["loc"].item() == pytest.approx(best, rel=1e-9)
    elbo = -0.5 * (best - 0.7) ** 2 - 0.5 * math.log(2 * math.pi)
    assert fit.history["validation_elbo"].max() == pytest.approx(elbo, rel=1e-9)
    longer = fit_of(point_model, prior_guide, num_steps=400, resume=fit, **{**run, "seed": None})
    assert longer.checkpoint()["params"]["loc"].item() == pytest.approx(
        2 * (1 - 0.99**400), rel=1e-9
    )


def test_stop_iteration_in_a_callback():
    def enough(fit):
        if fit.num_epochs == 3:
            raise StopIteration("good enough")

    fit = fit_of(num_epochs=10, batch_size=5, callbacks=[enough])
    assert (fit.status, fit.num_epochs) == ("interrupted", 3)
    assert fit.reason == "callback enough ended the fit after epoch 3: good enough"
    assert same_params(fit, fit_of(num_epochs=3, batch_size=5))


@pytest.mark.parametrize("where", ["callback", "model", "backward", "evaluation"])
def test_keyboard_interrupt_keeps_what_there_is_and_resumes_exactly(where):
    # Batch normalisation: the interrupted step has already moved its buffers.
    net = nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)).double()
    armed = []

    class Interrupt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            maybe("backward")
            return grad

    def maybe(place):
        if armed and place == where:
            armed[0] -= 1
            if armed[0] == 0:
                armed.clear()
                raise KeyboardInterrupt

    def net_model(y):
        pyro.module("net", net)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            mean = Interrupt.apply(net(z[:, None])[:, 0])
            maybe("model" if torch.is_grad_enabled() else "evaluation")
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    run = {"num_epochs": 6, "evaluate_every": 1}
    whole = fit_of(net_model, local_guide, batch_size=6, **run)

    def arm(fit):
        maybe("callback")
        if fit.num_epochs == 2:
            armed.append({"callback": 2, "model": 3, "backward": 3, "evaluation": 1}[where])

    part = fit_of(net_model, local_guide, batch_size=6, callbacks=[arm], **run)
    assert part.status == "interrupted"
    steps = {"callback": 16, "model": 10, "backward": 10, "evaluation": 12}[where]
    assert part.num_steps == steps
    rest = fit_of(net_model, local_guide, resume=part, seed=None, **run)
    assert same_params(whole, rest)
    for name in ("loss", "elbo", "epoch"):
        assert whole.history[name].tolist() == rest.history[name].tolist()
    buffers = whole.state.values()[1], rest.state.values()[1]
    assert all(buffers[0][name].equal(buffers[1][name]) for name in buffers[0])


# ------------------------------------------------------------------------------------- divergence


def outside_support(y):
    """The datum 3 leaves the support of its site once the width has shrunk below it."""
    width = pyro.param("width", y.new_tensor(3.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        edge = torch.where(y == 2.5, width, 10.0)
        log_prob = torch.log(edge - y) - 5 * width**2
        pyro.sample("y", dist.Delta(y, log_density=log_prob + 0 * z), obs=y)


def prior_guide(y):
    slope = pyro.param("slope", y.new_tensor(0.1))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(slope * y, 1.0))


@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("window", [1, 50])
def test_a_bad_datum_is_named_in_the_users_order(batch_size, window, monkeypatch):
    look_every(window, monkeypatch)
    y = torch.tensor([0.1, 0.2, 0.3, 2.5, 0.4, 0.5, 0.6], dtype=F64)
    run = {"options": {"learning_rate": 0.1}, "y": y, "batch_size": batch_size}
    fit = fit_of(outside_support, prior_guide, num_steps=100, **run)
    assert fit.status == "diverged"
    assert "observed site 'y'" in fit.reason
    assert "at datum 3 (plate 'data')" in fit.reason
    assert f"step {fit.num_steps + 1} " in fit.reason
    # the parameters are those before the step, bit for bit
    before = fit_of(outside_support, prior_guide, num_steps=fit.num_steps, **run)
    assert before.status == "max_steps"
    assert same_params(fit, before)
    assert fit.history["loss"].tolist() == before.history["loss"].tolist()
    assert all(value.isfinite().all() for value in fit.params.values())


def look_every(steps, monkeypatch):
    """Read flags as on a GPU, where a look waits for the device."""
    make = training_module.Training.__post_init__

    def patched(self):
        make(self)
        self.window = steps

    monkeypatch.setattr(training_module.Training, "__post_init__", patched)


@pytest.mark.parametrize("steps", [4, 50])
def test_looking_rarely_changes_nothing(steps, monkeypatch):
    run = {"num_epochs": 5, "batch_size": 3}
    careful = fit_of(local_model, local_guide, **run)
    look_every(steps, monkeypatch)
    assert same_params(careful, fit_of(local_model, local_guide, **run))


@pytest.mark.parametrize("window", [1, 50])
def test_gradients_that_are_not_finite_name_the_site(window, monkeypatch):
    look_every(window, monkeypatch)

    def rooted(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal((z * z).sqrt(), 1.0), obs=y)

    def point(y):
        loc = pyro.param("loc", y.new_tensor([1.0, 1.0, 1.0, 0.0, 1.0]))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Delta(loc * 1))

    y = torch.ones(5, dtype=F64)
    fit = fit_of(rooted, point, y=y, num_steps=10)
    assert fit.status == "diverged"
    assert fit.num_steps == 0
    assert "gradient of the loss with respect to latent site 'z' is nan at datum 3" in fit.reason
    assert fit.params["loc"].tolist() == [1, 1, 1, 0, 1]


def test_nan_data_are_refused_or_named():
    y = data(8)
    y[5] = math.nan
    with pytest.raises(ProgramError, match=r"data argument 0 has nan at index \[5\]"):
        fit_of(y=y, num_steps=3)


def test_a_huge_but_finite_gradient_is_no_divergence():
    def steep(y):
        loc = pyro.param("loc", torch.tensor(0.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(1e-17 * loc + 0 * z, 1e-18), obs=y)

    def standard(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))

    # dL/dloc = 1e-17 · 1e36 · 20 · 0.01, whose square overflows float32
    y = torch.full((20,), 0.01)
    fit = fit_of(steep, standard, y=y, num_steps=2, options={"learning_rate": 1e-3})
    assert fit.status == "max_steps"
    assert fit.params["loc"].item() != 0.0


# -------------------------------------------------------------------------------------- bad input


def f32_net():
    net = nn.Linear(1, 1)

    def net_model(y):
        pyro.module("net", net)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(net(z[:, None])[:, 0], 0.5), obs=y)

    return net_model


GOOD = {"num_steps": 2, "progress": False}
BAD_FITS = [
    ({}, r"say how long to train"),
    ({"num_steps": 0}, r"num_steps must be at least 1, but is 0"),
    ({"num_epochs": 1.5}, r"num_epochs must be an integer, but is 1.5"),
    ({**GOOD, "batch_size": 0}, r"batch_size must be at least 1"),
    ({**GOOD, "seed": -1}, r"seed must be None or an integer"),
    ({**GOOD, "device": "nonsense"}, r"device 'nonsense' cannot be used here"),
    ({**GOOD, "validation": (data(), data())}, r"validation has 2 arguments"),
    ({**GOOD, "validation": data()[:0]}, r"validation argument 0 has no rows"),
    ({**GOOD, "patience": 0}, r"patience must be at least 1"),
    ({**GOOD, "tolerance": -1.0}, r"tolerance must be at least 0 and finite, .* -1.0"),
    ({**GOOD, "tolerance": "small"}, r"tolerance must be at least 0 .* 'small'"),
    ({**GOOD, "callbacks": print}, r"callbacks must be a list .*write callbacks=\[print\]"),
    ({**GOOD, "callbacks": [3]}, r"callbacks must be a list of callables, but is \[3\]"),
    ({**GOOD, "transform": 3}, r"transform must be a callable .* is 3"),
    ({**GOOD, "transform": lambda batch: batch[0]}, r"must return a tuple .* returned a Tensor"),
    ({**GOOD, "resume": "runs/first"}, r"resume must be a fit.*lvppl\.load\(folder, model, guide"),
    (
        {**GOOD, "num_epoch": 3},
        r"The guide fails before .*fit\(num_epoch=...\) is not an option of fit, .*num_epochs=\?",
    ),
]


@pytest.mark.parametrize(("options", "message"), BAD_FITS)
def test_bad_options_of_fit(options, message):
    with pytest.raises(ProgramError, match=message):
        SVI(model, guide).fit(data(), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": torch.optim.Adam([torch.zeros(1)])}, r"give the class"),
        ({"optimizer": torch.optim.LBFGS}, r"LBFGS evaluates the loss many times"),
        ({"optimizer": 3}, r"optimizer must be a torch.optim class"),
        ({"optimizer": pyro.optim.Adam({}), "learning_rate": 0.1}, r"carries its own"),
        ({"learning_rate": -1.0}, r"learning_rate must be positive"),
        ({"learning_rate": "0.1"}, r"learning_rate must be positive .* '0.1'"),
        ({"clip_norm": "1"}, r"clip_norm must be positive .* '1'"),
        ({"scheduler": 0.9}, r"scheduler must be a callable"),
        ({"clip_norm": 0.0}, r"clip_norm must be positive"),
        ({"scheduler_interval": "year"}, r"scheduler_interval must be"),
        ({"objective": ELBO}, r"objective must be an objective such as"),
        ({"objective": 3}, r"objective must be an objective such as"),
    ],
)
def test_bad_options_of_svi(options, message):
    with pytest.raises(ProgramError, match=message):
        SVI(model, guide, **options)


@pytest.mark.parametrize(
    ("program", "args", "options", "message"),
    [
        (model, (data()[:0],), {}, r"data argument 0 has no rows"),
        (model, (data().numpy(),), {"batch_size": 5}, r"batch_size=5 needs a tensor of rows"),
        (lambda: None, (), {"batch_size": 5}, r"but got nothing"),
        (f32_net(), (data(),), {}, r"the data are torch.float64 but the modules .*float32"),
    ],
)
def test_bad_data(program, args, options, message):
    with pytest.raises(ProgramError, match=message):
        SVI(program, local_guide).fit(*args, **options, **GOOD)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_validation_data_that_the_program_does_not_take(batch_size):
    net = nn.Linear(4, 1)

    def wide(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z[..., None].expand(y.shape), 1.0).to_event(1), obs=y)

    def encoder(y):
        pyro.module("net", net)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(net(y)[:, 0], 1.0))

    steps = []
    options = {**GOOD, "batch_size": batch_size, "callbacks": [steps.append]}
    with pytest.raises(ProgramError, match=r"validation data, of shape \(5, 3\); .* \(6, 4\)"):
        SVI(wide, encoder).fit(torch.ones(6, 4), validation=torch.ones(5, 3), **options)
    assert not steps
    SVI(wide, encoder).fit(torch.ones(6, 4), validation=torch.ones(5, 4), **options)


def generator(y):
    scale = pyro.param("scale", y.new_tensor(1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        pyro.sample("y", dist.Delta(scale * z), obs=y)


def test_a_generator_needs_an_objective_without_densities():
    with pytest.raises(ProgramError, match="'y' is a deterministic observation on a continuous"):
        SVI(generator, local_guide).fit(data(), **GOOD)

    def moments(model, guide, y):
        drawn = pyro.poutine.trace(pyro.poutine.uncondition(model)).get_trace(y).nodes["y"]["value"]
        return (drawn.square().mean() - y.square().mean()).square()

    fit = SVI(generator, local_guide, objective=moments).fit(data(), **GOOD)
    assert fit.status == "max_steps" and fit.params["scale"].item() != 1.0


@pytest.mark.parametrize("batch_size", [None, 5])
def test_errors_of_the_programs_say_which_and_where(batch_size):
    def twice(y):
        local_model(y)
        with pyro.plate("again", len(y)):
            pyro.sample("z", dist.Normal(y, 1.0))

    def short(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(y.new_zeros(3), 1.0))

    options = {**GOOD, "batch_size": batch_size}
    with pytest.raises(ProgramError, match=r"The model.* fails after .*named 'z'"):
        SVI(twice, local_guide).fit(data(), **options)
    with pytest.raises(ProgramError, match=r"The guide fails .*site z"):
        SVI(local_model, short).fit(data(), **options)


def test_bad_programs():
    with pytest.raises(ProgramError, match="model must be a Pyro program"):
        SVI(None, guide)
    with pytest.raises(ProgramError, match="guide must be a Pyro program"):
        SVI(model, nn.Linear)

    def fixed(y):
        pyro.sample("mean", dist.Normal(y.new_zeros(()), 1.0))

    with pytest.raises(ProgramError, match="does not depend on any parameter"):
        SVI(model, fixed).fit(data(), **GOOD)

    def not_a_number(model, guide, y):
        return 3.0

    with pytest.raises(ProgramError, match="must return a 0-dim tensor, but returned float"):
        SVI(model, guide, objective=not_a_number).fit(data(), **GOOD)


def test_resume_refuses_another_fit():
    fit = fit_of(num_epochs=2, batch_size=5)
    with pytest.raises(ProgramError, match="has seed 1, not 2"):
        fit_of(num_epochs=3, resume=fit, seed=2)
    with pytest.raises(ProgramError, match="has batch_size=5, not 4"):
        fit_of(num_epochs=3, resume=fit, batch_size=4, seed=None)
    with pytest.raises(ProgramError, match="saved with another optimiser"):
        fit_of(options={"optimizer": torch.optim.SGD}, num_epochs=3, resume=fit, seed=None)
    with pytest.raises(ProgramError, match="'loc' that this program does not make"):
        fit_of(local_model, local_guide, num_epochs=3, resume=fit, seed=None)


# ----------------------------------------------------------------------------------------- the rest


def test_progress_in_a_pipe_says_a_line_now_and_then(monkeypatch, capsys):
    from lvppl.inference import progress

    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    fit_of(num_steps=3, progress=True, options={"objective": ELBO()}, evaluate_every=1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("fit: step 1 of 3, loss ")
    assert lines[2].startswith("fit: step 3 of 3, elbo ")
    assert "rate" in lines[2]
    assert "distortion" in lines[2]
    monkeypatch.setattr(progress, "_LINE_SECONDS", 1e9)
    fit_of(num_steps=3, progress=True)
    assert capsys.readouterr().err == ""


def test_progress_bar_on_a_terminal(monkeypatch, capsys):
    from lvppl.inference import progress

    monkeypatch.setattr(progress, "_shows_a_bar", lambda: True)
    fit_of(num_steps=3, progress=True, options={"objective": ELBO()}, evaluate_every=1)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "elbo" in shown


def test_the_record_reads_well():
    fit = fit_of(options={"objective": ELBO()}, num_epochs=4, batch_size=5)
    text = repr(fit)
    assert text.startswith("Fit: max_steps after 16 steps, 4 epochs, seed 1\n")
    assert "parameters  2 tensors, 2 numbers" in text
    assert "elbo -" in text
    assert set(fit.versions) == {"python", "lvppl", "torch", "pyro-ppl", "numpy"}
    assert sorted(fit.history) == sorted(["loss", "step", "epoch", "elbo", "rate", "distortion"])
    with pytest.raises(KeyError, match="the history has no 'accuracy'"):
        fit.history["accuracy"]


def test_methods_agree_with_the_functions():
    from lvppl.inference.likelihood import log_likelihood

    y = data(6)
    fit = fit_of(local_model, local_guide, y=y, num_steps=200)
    estimate = fit.log_likelihood(y, num_samples=50, seed=3)
    with fit.active():
        expected = log_likelihood(local_model, y, guide=local_guide, num_samples=50, seed=3)
    assert estimate.log_prob.equal(expected.log_prob)
    # E[y | z] = weight · z, and z has mean slope · y
    means = fit.reconstruct(y, num_samples=20000, seed=0)["y"]
    torch.testing.assert_close(
        means, fit.params["weight"] * fit.params["slope"] * y, rtol=0, atol=0.06
    )
    new = fit.sample(y, num_samples=5000, seed=0).predictive["y"]
    assert new.shape == (5000, 6)
    variance = fit.params["weight"] ** 2 + 0.25
    assert new.var().item() == pytest.approx(variance.item(), rel=5 * math.sqrt(2 / 30000))
    assert fit.sample(num_samples=3).predictive["y"].shape == (3, 6)

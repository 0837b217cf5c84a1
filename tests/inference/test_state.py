"""Fits that share names, modules and guides do not touch each other, bit by bit."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from lvppl.errors import ProgramError
from lvppl.inference.state import FitState, modules_of
from lvppl.inference.svi import SVI

Y = torch.linspace(-1, 3, 12, dtype=torch.float64)[:, None]


@pytest.fixture(autouse=True)
def clean():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_num_threads(threads)


def by_param():
    def model(y):
        scale = pyro.param("scale", y.new_tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, scale).to_event(1), obs=y)

    def guide(y):
        slope = pyro.param("slope", y.new_tensor(0.1))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y, 0.5).to_event(1))

    return model, guide


def by_module():
    decoder = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    encoder = nn.Linear(1, 1).double()

    def model(y):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decoder(z), 0.5).to_event(1), obs=y)

    def guide(y):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(encoder(y), 0.5).to_event(1))

    return model, guide


class Encoder(PyroModule):
    def __init__(self):
        super().__init__()
        self.linear = PyroModule[nn.Linear](1, 1).double()
        self.scale = PyroParam(torch.tensor(0.5).double(), constraints.positive)

    def forward(self, y):
        with pyro.plate("data", len(y)):
            return pyro.sample("z", dist.Normal(self.linear(y), self.scale).to_event(1))


def by_pyro_module():
    return by_param()[0], Encoder()


def by_autoguide():
    model, _ = by_param()
    return model, AutoNormal(model)


def by_shared_initial_tensor():
    initial = torch.tensor(0.1).double()
    model, _ = by_param()

    def guide(y):
        slope = pyro.param("slope", initial)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y, 0.5).to_event(1))

    return model, guide


PROGRAMS = [by_param, by_module, by_pyro_module, by_autoguide, by_shared_initial_tensor]
RUN = {"num_steps": 6, "progress": False}


def svi(model, guide, **options):
    options = {"learning_rate": 0.05, "objective": Trace_ELBO(), **options}
    return SVI(model, guide, **options)


def same(first, second):
    params, buffers = first.state.values()
    others, other_buffers = second.state.values()
    assert params.keys() == others.keys()
    assert buffers.keys() == other_buffers.keys()
    return (
        all(torch.equal(params[name], others[name]) for name in params)
        and all(torch.equal(buffers[name], other_buffers[name]) for name in buffers)
        and first.history["loss"].tolist() == second.history["loss"].tolist()
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_same_seed_gives_the_same_run_on_the_same_objects(program):
    model, guide = program()
    first = svi(model, guide).fit(Y, seed=1, **RUN)
    second = svi(model, guide).fit(Y, seed=1, **RUN)
    third = svi(model, guide).fit(Y, seed=2, **RUN)
    assert same(first, second)
    assert not same(first, third)


@pytest.mark.parametrize("program", PROGRAMS)
def test_interleaved_fits_do_not_touch(program):
    model, guide = program()
    alone = {seed: svi(model, guide).fit(Y * seed, seed=seed, **RUN) for seed in (1, 2)}
    inner = []

    def other_fit(_):
        resume = inner[-1] if inner else None
        seed = None if inner else 2
        steps = len(inner) + 1
        fit = svi(model, guide).fit(
            Y * 2, seed=seed, num_steps=steps, resume=resume, progress=False
        )
        inner.append(fit)

    outer = svi(model, guide).fit(Y, seed=1, callbacks=[other_fit], **RUN)
    assert len(inner) == 6
    assert same(outer, alone[1])
    assert same(inner[-1], alone[2])
    assert same(alone[1], svi(model, guide).fit(Y, seed=1, **RUN))  # after everything


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_fit_inside_a_step_of_another_gives_the_tensors_back(program):
    model, guide = program()
    expected = svi(model, guide).fit(Y, seed=1, **RUN)

    inside = []

    def nosy(batch):
        if not inside:
            inside.append(1)
            svi(model, guide).fit(Y * 2, seed=5, num_steps=2, progress=False)
            inside.clear()
        return batch

    got = svi(model, guide).fit(Y, seed=1, transform=nosy, **RUN)
    assert same(got, expected)


def test_results_stay_when_the_module_is_trained_again_or_edited():
    model, guide = by_module()
    decoder = modules_of(model)[0]
    fit = svi(model, guide).fit(Y, seed=1, **RUN)
    z = torch.randn(5, 1, dtype=torch.float64)

    def decoded():
        with fit.active():
            decoder.eval()
            try:
                return decoder(z).detach()
            finally:
                decoder.train()

    before = decoded()
    params = fit.params
    svi(model, guide).fit(Y * 3, seed=4, **RUN)
    assert decoded().equal(before)
    with torch.no_grad():
        decoder[0].weight.fill_(9.0)
    assert decoded().equal(before)
    assert decoder[0].weight.unique().tolist() == [9.0]  # what the user set is still there
    assert all(fit.params[name].equal(value) for name, value in params.items())


def test_modules_hold_the_fit_afterwards_and_callbacks_see_it_grow():
    model, guide = by_module()
    encoder = modules_of(guide)[0]
    seen = []

    def look(fit):
        seen.append(encoder.weight.item())
        assert fit.params["encoder$$$weight"].item() == encoder.weight.item()
        assert fit.status == "running"
        assert fit.num_steps == len(seen)

    fit = svi(model, guide).fit(Y, seed=1, callbacks=[look], **RUN)
    assert len(set(seen)) == 6
    assert encoder.weight.item() == seen[-1] == fit.params["encoder$$$weight"].item()


def test_values_that_the_user_sets_are_the_new_start():
    model, guide = by_module()
    encoder = modules_of(guide)[0]
    svi(model, guide).fit(Y, seed=1, **RUN)
    with torch.no_grad():
        encoder.weight.fill_(7.0)
    seen = []
    step = {"num_steps": 1, "progress": False}
    sgd = {"optimizer": torch.optim.SGD, "learning_rate": 1e-12}
    svi(model, guide, **sgd).fit(
        Y, seed=1, callbacks=[lambda fit: seen.append(encoder.weight.item())], **step
    )
    assert seen[0] == pytest.approx(7.0, abs=1e-8)
    again = svi(model, guide, **sgd).fit(Y, seed=1, **step)
    assert again.params["encoder$$$weight"].item() == pytest.approx(7.0, abs=1e-8)


def test_the_users_store_is_left_alone():
    model, guide = by_param()
    mine = pyro.param("slope", torch.tensor(5.0))
    fit = svi(model, guide).fit(Y, seed=1, **RUN)
    fit.posterior(Y, num_samples=2)
    assert dict(pyro.get_param_store().named_parameters()).keys() == {"slope"}
    assert pyro.param("slope") is mine
    assert mine.item() == 5.0


def test_parameters_made_in_a_block_that_raises_are_kept():
    state = FitState()
    with pytest.raises(KeyError), state.active():
        pyro.param("a", torch.tensor(2.0), constraint=constraints.positive)
        raise KeyError
    assert list(state.tensors()) == ["a"]
    assert len(pyro.get_param_store()) == 0
    with state.active():
        assert pyro.param("a").item() == pytest.approx(2.0)


def test_a_program_error_in_the_middle_leaves_everything_in_order():
    model, guide = by_module()
    calls = []

    def failing(y):
        calls.append(1)
        if len(calls) > 40:
            raise TypeError("user's own mistake")
        model(y)

    pyro.set_rng_seed(3)
    expected = torch.rand(1)
    pyro.set_rng_seed(3)
    with pytest.raises(TypeError, match="user's own mistake"):
        svi(failing, guide).fit(Y, seed=1, num_steps=1000, progress=False)
    assert torch.rand(1).equal(expected)
    assert len(pyro.get_param_store()) == 0
    first = svi(model, guide).fit(Y, seed=1, **RUN)
    fresh = by_module  # another module with other values must differ
    assert not same(first, svi(*fresh()).fit(Y, seed=1, **RUN))
    assert same(first, svi(model, guide).fit(Y, seed=1, **RUN))


def test_evaluating_does_not_move_buffers():
    model, guide = by_module()
    decoder = modules_of(model)[0]
    fit = svi(model, guide).fit(Y, seed=1, **RUN)
    before = [buffer.clone() for buffer in decoder.buffers()]
    fit.posterior(Y, num_samples=2)
    fit.log_likelihood(Y, num_samples=4)
    assert all(a.equal(b) for a, b in zip(before, decoder.buffers(), strict=True))
    # six steps, and nothing of preparation or evaluation
    assert decoder[1].num_batches_tracked.item() == 6


def test_modules_are_found_in_closures_methods_and_partials():
    from functools import partial

    net, other = nn.Linear(1, 1), nn.Linear(1, 2)

    def inner(y):
        return net(y)

    def outer(y):
        return inner(y)

    class Pair(nn.Module):
        def model(self, y):
            return other(y)

    pair = Pair()
    assert modules_of(outer) == [net]
    assert modules_of(pair.model) == [pair, other]
    assert modules_of(partial(inner, y=1), None, net) == [net]


def test_assigning_other_values_names_the_difference():
    state = FitState()
    with state.active():
        pyro.param("a", torch.zeros(2))
    with pytest.raises(ProgramError, match=r"parameter 'b' that this program does not make"):
        state.assign({"b": torch.zeros(2)}, {})
    with pytest.raises(ProgramError, match=r"parameter 'a' that the fit does not have"):
        state.assign({}, {})
    with pytest.raises(ProgramError, match=r"'a' has shape \(3,\) in the fit but \(2,\)"):
        state.assign({"a": torch.zeros(3)}, {})

"""Minibatch scaling: the mean minibatch ELBO is the full ELBO."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch.distributions import constraints

from lvppl.errors import ProgramError
from lvppl.inference.minibatch import data_plates_of, gather, num_rows, scaled_minibatch
from lvppl.objectives import ELBO, IWAE

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def clean():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()


def model(y):
    """Global mean, a group plate that has nothing to do with the rows, and local latents."""
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    with pyro.plate("groups", 4):
        offset = pyro.sample("offset", dist.Normal(y.new_zeros(()), 1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(mean + offset.sum(), 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def point_guide(y):
    """Deterministic, so that the ELBO of a batch is a number."""
    pyro.sample("mean", dist.Delta(y.new_tensor(0.7)))
    with pyro.plate("groups", 4):
        pyro.sample("offset", dist.Delta(y.new_tensor([0.1, -0.2, 0.3, 0.05])))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Delta(0.3 * y + 0.2))


def sequential_model(y):
    mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
    for i in pyro.plate("data", len(y)):
        pyro.sample(f"y_{i}", dist.Normal(mean, 0.5), obs=y[i])


def sequential_guide(y):
    pyro.sample("mean", dist.Delta(y.new_tensor(0.7)))


def data(rows=13):
    return torch.linspace(-1, 2, rows, dtype=torch.float64)


@pytest.mark.parametrize(
    ("program", "guide"), [(model, point_guide), (sequential_model, sequential_guide)]
)
@pytest.mark.parametrize("loss", [Trace_ELBO(), ELBO(form="entropy"), ELBO(form="kl")])
@pytest.mark.parametrize("batch_size", [1, 4, 5, 12])
def test_mean_minibatch_elbo_is_the_full_elbo(program, guide, loss, batch_size):
    # Exactly, by linearity: the mean over the rows' batches, weighed by their sizes, as each row is
    # in a batch of its size with that probability.
    y = data()
    full = loss.differentiable_loss(program, guide, y)
    plates = data_plates_of(program, guide, (y,), {}, batch_size=batch_size)
    assert plates == ("data",)
    mean = 0.0
    for index in torch.randperm(len(y)).split(batch_size):
        with scaled_minibatch(plates, len(y)):
            mean += loss.differentiable_loss(program, guide, y[index]) * len(index) / len(y)
    torch.testing.assert_close(mean, full, rtol=1e-12, atol=0)


def test_stochastic_guide_with_the_same_noise_is_exact_too():
    y, noise = data(), torch.randn(13, dtype=torch.float64)

    def guide(y, e):
        pyro.sample("mean", dist.Delta(y.new_tensor(0.7)))
        with pyro.plate("groups", 4):
            pyro.sample("offset", dist.Delta(y.new_zeros(4)))
        with pyro.plate("data", len(y)):
            value = 0.3 * y + 0.4 * e
            log_q = dist.Normal(0.3 * y, 0.4).log_prob(value)
            pyro.sample("z", dist.Delta(value, log_density=log_q))

    def with_noise(y, e):
        model(y)

    full = Trace_ELBO().differentiable_loss(with_noise, guide, y, noise)
    mean = 0.0
    for index in torch.randperm(13).split(5):
        with scaled_minibatch(["data"], 13):
            loss = Trace_ELBO().differentiable_loss(with_noise, guide, y[index], noise[index])
        mean += loss * len(index) / 13
    torch.testing.assert_close(mean, full, rtol=1e-12, atol=0)


def test_importance_weighted_scale_stays_outside_the_logarithm():
    # With local latents only, the scaled loss is N/|B| times the loss of the batch.
    def local(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.5 * y, 0.6))

    y, loss = data(5), IWAE(num_particles=7)
    pyro.set_rng_seed(1)
    plain = loss.differentiable_loss(local, guide, y)
    pyro.set_rng_seed(1)
    with scaled_minibatch(["data"], 50):
        scaled = loss.differentiable_loss(local, guide, y)
    torch.testing.assert_close(scaled, 10 * plain, rtol=1e-12, atol=0)


def test_frames_and_scales_are_those_of_a_subsample():
    y = data(6)

    def subsampled(y):
        with pyro.plate("data", 24, subsample_size=6):
            pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0).mask(torch.tensor(True)))

    def plain(y):
        with pyro.plate("data", len(y)), poutine.scale(scale=3.0):
            pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))

    expected = poutine.trace(subsampled).get_trace(y).nodes["z"]
    with scaled_minibatch(["data"], 24):
        site = poutine.trace(plain).get_trace(y).nodes["z"]
    assert site["scale"] == 3.0 * expected["scale"] == 12.0
    (mine,), (theirs,) = site["cond_indep_stack"], expected["cond_indep_stack"]
    assert tuple(mine) == tuple(theirs)


def test_a_plate_that_states_the_full_size_scales_itself():
    def stated(y, index):
        with pyro.plate("data", 13, subsample=index):
            pyro.sample("y", dist.Normal(y.new_zeros(()), 1.0), obs=y)

    args = (data(), torch.arange(13))
    assert data_plates_of(stated, None, args, {}, batch_size=4) == ()

    def wrong(y, index):
        with pyro.plate("data", 99, subsample=index):
            pyro.sample("y", dist.Normal(y.new_zeros(()), 1.0), obs=y)

    with pytest.raises(ProgramError, match=r"full size of 99, but the data have 13 rows"):
        data_plates_of(wrong, None, args, {}, batch_size=4)


def test_a_plate_that_happens_to_have_the_size_of_the_batch_is_no_data_plate():
    assert data_plates_of(model, point_guide, (data(),), {}, batch_size=4) == ("data",)


def test_parameters_made_at_the_second_size_are_dropped():
    def lazy(y):
        if len(y) == 3:
            pyro.param("only_for_three_rows", torch.zeros(1))
        model(y)

    data_plates_of(lazy, None, (data(),), {}, batch_size=4)
    assert "only_for_three_rows" not in pyro.get_param_store()


def no_plate(y):
    pyro.sample("y", dist.Normal(y.new_zeros(()), 1.0).expand([len(y)]).to_event(1), obs=y)


def subsamples(y):
    with pyro.plate("data", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(y.new_zeros(()), 1.0), obs=y[index])


def transitions(y):
    with pyro.plate("steps", len(y) - 1):
        pyro.sample("y", dist.Normal(y[:-1], 1.0), obs=y[1:])


def fixed_rows(y):
    loc = pyro.param("loc", lambda: torch.zeros(len(y), dtype=y.dtype))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (no_plate, r"needs a plate over the rows"),
        (subsamples, r"takes a subsample of 2 by itself"),
        (transitions, r"depends on the rows but does not count them"),
        (fixed_rows, r"runs with 4 rows but not with 3"),
    ],
)
def test_refusals(program, message):
    with pytest.raises(ProgramError, match=message):
        data_plates_of(program, None, (data(),), {}, batch_size=4)


def test_guides_with_a_parameter_a_row_are_refused_before_they_are_spoiled():
    guide = AutoNormal(model)
    with pytest.raises(ProgramError, match=r"AutoNormal keeps parameters for every row"):
        data_plates_of(model, guide, (data(),), {}, batch_size=4)
    assert guide.prototype_trace is None

    def fixed(y):
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(torch.zeros(4), scale))

    with pytest.raises(ProgramError, match=r"in the model but not in the guide"):
        data_plates_of(model, fixed, (data(),), {}, batch_size=4)


def test_autoguide_over_globals_is_accepted():
    def only_globals(y):
        mean = pyro.sample("mean", dist.Normal(y.new_zeros(()), 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    guide = AutoNormal(only_globals)
    assert data_plates_of(only_globals, guide, (data(),), {}, batch_size=4) == ("data",)


def test_gather_follows_the_rows_only():
    y = data(6)
    index = torch.tensor([4, 1])
    args = (y, {"x": torch.arange(6), "w": torch.arange(5)}, [y, None], "name", torch.tensor(2.0))
    got = gather(args, index, 6)
    assert got[0].equal(y[index])
    assert got[1]["x"].tolist() == [4, 1]
    assert got[1]["w"].tolist() == list(range(5))
    assert got[2][0].equal(y[index])
    assert got[2][1] is None
    assert got[3:] == args[3:]
    assert num_rows(args) == 6
    assert num_rows(()) is None
    assert num_rows((torch.tensor(1.0),)) is None

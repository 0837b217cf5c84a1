"""What users tried first: Pyro's own mixture tutorial in minibatches, point guides, resuming."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal

import lvppl


def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(2)))
    with pyro.plate("components", 2):
        means = pyro.sample("means", dist.Normal(x.new_zeros(()), 5.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)


def two_groups():
    torch.manual_seed(0)
    return torch.cat([torch.randn(80) - 3, torch.randn(120) + 3])[torch.randperm(200)]


@pytest.mark.parametrize("autoguide", [AutoDelta, AutoNormal])
def test_an_autoguide_of_the_globals_trains_on_minibatches(autoguide):
    """The assignments are summed out: the guide holds nothing for a row."""
    x = two_groups()
    pyro.set_rng_seed(1)
    start = {"means": torch.tensor([-1.0, 1.0]), "weights": torch.tensor([0.5, 0.5])}
    guide = autoguide(
        poutine.block(mixture, hide=["k"]),
        init_loc_fn=pyro.infer.autoguide.init_to_value(values=start),
    )
    svi = lvppl.SVI(mixture, guide, learning_rate=0.02)
    fit = svi.fit(x, num_epochs=80, batch_size=50, seed=0, progress=False)
    with fit.active():
        median = guide.median()
    # the maximum a posteriori (and close to it the posterior's centre) by EM
    means, weight = torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5])
    for _ in range(200):
        r = (weight.log() + dist.Normal(means, 1.0).log_prob(x[:, None])).softmax(-1)
        means = (r * x[:, None]).sum(0) / (r.sum(0) + 1 / 25)
        weight = r.mean(0)
    # a posterior standard deviation is 1 / sqrt(80): half of one
    assert torch.allclose(median["means"], means, atol=0.06)
    assert torch.allclose(median["weights"], weight, atol=0.03)


def test_a_point_guide_gives_no_estimate_of_the_evidence():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    x = two_groups()
    guide = AutoDelta(model)
    guide(x)
    with pytest.raises(lvppl.ProgramError, match=r"holds 'a' at a point.*ln p\(y, z\).*AutoNormal"):
        lvppl.log_likelihood(model, x, guide=guide)


def test_a_resumption_that_asks_for_less_is_refused():
    x = two_groups()
    guide = AutoNormal(poutine.block(mixture, hide=["k"]))
    svi = lvppl.SVI(mixture, guide)
    fit = svi.fit(x, num_epochs=3, seed=0, progress=False)
    with pytest.raises(lvppl.ProgramError, match=r"3 epochs already.*count from its start"):
        svi.fit(x, num_epochs=2, resume=fit, progress=False)


def test_objectives_print_their_options():
    assert repr(lvppl.IWAE(num_particles=5)) == (
        "IWAE(num_particles=5, gradient='standard', strict=True)"
    )

"""Gradient estimators where weights vanish, and where a latent has no guide."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import lvppl
from lvppl.objectives.base import leave_one_out_mean
from lvppl.objectives.iwae import _vimco_signal


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_leaving_one_out():
    values = torch.randn(4, 3)
    values[1, 2] = -math.inf
    means = leave_one_out_mean(values)
    for k in range(4):
        others = [values[j] for j in range(4) if j != k]
        torch.testing.assert_close(means[k], torch.stack(others).mean(0))


@pytest.mark.parametrize("particles", [2, 5])
def test_vimco_is_the_bound_minus_the_bound_without_the_particle(particles):
    log_weight = torch.randn(particles, 3)
    log_weight[0, 1] = -math.inf
    signal = _vimco_signal(log_weight)

    def bound(weights):
        return weights.logsumexp(0) - math.log(particles)

    for k in range(particles):
        replaced = log_weight.clone()
        replaced[k] = torch.stack([log_weight[j] for j in range(particles) if j != k]).mean(0)
        baseline = bound(replaced)
        baseline[baseline == -math.inf] = 0.0  # nothing is left to compare with
        torch.testing.assert_close(signal[k], bound(log_weight) - baseline)


def test_iwae_learns_although_some_weights_are_zero():
    """y = a + b is certain: draws that miss it have weight zero. Exact gradient by enumeration."""

    def model(y):
        a = pyro.sample("a", dist.Bernoulli(0.5))
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Delta((a + b).long()), obs=y)

    def guide(y):
        for name in "ab":
            pyro.sample(name, dist.Bernoulli(logits=pyro.param(f"logit_{name}", torch.tensor(0.3))))

    K = 3
    y = torch.tensor(1)
    logits = torch.tensor([0.3, 0.3], requires_grad=True)
    q = logits.sigmoid()
    pairs = list(itertools.product((0, 1), repeat=2))
    prob = torch.stack([(q[0] if a else 1 - q[0]) * (q[1] if b else 1 - q[1]) for a, b in pairs])
    weight = torch.tensor([0.25 * (a + b == 1) for a, b in pairs]) / prob
    value = torch.zeros(())
    for draws in itertools.product(range(4), repeat=K):
        mean = weight[list(draws)].mean()
        if mean > 0:  # where all miss, the bound is −∞ and has no gradient
            value = value + prob[list(draws)].prod() * mean.log()
    (exact,) = torch.autograd.grad(value, logits)

    objective = lvppl.IWAE(num_particles=K)
    gradients = []
    for seed in range(6000):
        pyro.set_rng_seed(seed)
        loss = objective.differentiable_loss(model, guide, y)
        leaves = [pyro.get_param_store()._params[f"logit_{name}"] for name in "ab"]
        gradients.append(torch.stack(torch.autograd.grad(loss, leaves)))
    found = torch.stack(gradients)
    assert torch.isfinite(found).all()
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) + exact).abs() < 5 * error).all(), (found.mean(0), exact, error)


@pytest.mark.parametrize(
    "objective",
    [
        lvppl.ELBO(gradient="stl", strict=False),
        lvppl.IWAE(num_particles=3, gradient="dreg", strict=False),
    ],
)
def test_gradients_through_draws_alone_need_a_guide_for_every_latent(objective):
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, pyro.param("scale", torch.tensor(1.0))))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(lvppl.ProgramError, match=r"'z' is drawn from its prior.*Add it"):
        objective.differentiable_loss(model, lambda y: None, torch.randn(3))

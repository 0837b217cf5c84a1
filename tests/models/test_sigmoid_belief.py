"""Sigmoid belief nets: p(y) against sums written out, and the guide's ELBO and its gradients."""

import itertools
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from torch.nn.functional import logsigmoid

import lvppl
import lvppl.sweep.evidence
from lvppl.guides import AmortizedBernoulliLayers, DenseEncoder
from lvppl.models import SigmoidBeliefNet
from lvppl.sweep import swept_evidence
from lvppl.sweep.bernoulli import BernoulliSum
from lvppl.sweep.joint import Joint
from tests.models.pairs import (
    fit_moves_every_parameter,
    keeps_dtype_and_device,
    particles_equal_a_loop,
)

LAYERS = [(5,), (3, 2), (2, 3, 2)]


def bits(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n))).double()


def make(latent_dims=(5,), y_shape=(4,), dtype=torch.float64):
    pyro.clear_param_store()
    torch.manual_seed(0)
    model = SigmoidBeliefNet(latent_dims=latent_dims, y_shape=y_shape).to(dtype)
    guide = AmortizedBernoulliLayers(
        latent_dims=latent_dims, y_shape=y_shape, encoder=partial(DenseEncoder, hidden_dims=(6,))
    ).to(dtype)
    for p in [*model.parameters(), *guide.parameters()]:
        p.data += 0.5 * torch.randn_like(p)
    return model, guide


def bernoulli(value, logits):
    """ln p by the two cases, summed over the last dimension."""
    return torch.where(value == 1, logsigmoid(logits), logsigmoid(-logits)).sum(-1)


def table(model, guide, y):
    """ln p(z, y) and ln q(z | y), each (states, data), over all states of every layer."""
    dims = [layer.in_features for layer in model.layers]
    layers = [z[:, None] for z in bits(sum(dims)).split(dims, -1)]  # z_1 first
    flat = y.flatten(1)
    log_p = bernoulli(layers[-1], model.prior_logits) + 0 * flat[:, 0]
    for layer, below, z in zip(model.layers, [flat, *layers], layers, strict=False):
        log_p = log_p + bernoulli(below, z @ layer.weight.T + layer.bias)
    log_q = bernoulli(layers[0], guide.encoder(y))
    for layer, z, above in zip(guide.layers, layers[:-1], layers[1:], strict=True):
        log_q = log_q + bernoulli(above, z @ layer.weight.T + layer.bias)
    return log_p, log_q


@pytest.mark.parametrize("y_shape", [(4,), (2, 2)])
@pytest.mark.parametrize("latent_dims", LAYERS)
def test_exact_likelihood_is_the_sum_over_states(latent_dims, y_shape):
    model, guide = make(latent_dims, y_shape)
    y = bits(4).unflatten(-1, y_shape)
    want = table(model, guide, y)[0].logsumexp(0).detach()
    assert abs(want.logsumexp(0).item()) < 1e-12  # over all data p sums to one
    found = lvppl.log_likelihood(model, y, estimator="exact")
    torch.testing.assert_close(found.log_prob, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("latent_dims", LAYERS)
def test_programs_by_hand(latent_dims):
    """ln p(z, y) and ln q(z | y) at every state, whole batches of states as data."""
    model, guide = make(latent_dims)
    y = bits(4)[[3, 6]]
    log_p, log_q = table(model, guide, y)
    layers = bits(sum(latent_dims)).split(list(latent_dims), -1)
    values = {site: z.repeat_interleave(2, 0) for site, z in zip(model.sites, layers, strict=True)}
    data = y.repeat(len(layers[0]), 1)
    for program, want in ((model, log_p), (guide, log_q)):
        trace = poutine.trace(poutine.condition(program, values)).get_trace(data)
        trace.compute_log_prob()
        sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
        total = sum(site["log_prob"] for site in sites if site["name"] != "data")
        torch.testing.assert_close(total, want.flatten(), rtol=1e-12, atol=1e-12)
    assert torch.allclose(log_q.exp().sum(0), torch.ones(2).double(), rtol=1e-12)


def test_one_layer_is_swept_from_two_tables(monkeypatch):
    """Recognised as a Bernoulli form: at 13 bits, at 12 if few states are not run as they are."""
    for num_bits, few in ((13, 2**12), (12, 2**11)):
        monkeypatch.setattr(lvppl.sweep.evidence, "_FEW_STATES", few)
        model, guide = make((num_bits,), (6,))
        for y in bits(6)[[0, 21, 63], None]:
            found = swept_evidence(model, (y,), {})
            assert found.form == "bernoulli" and found.num_states == 2**num_bits
            want = table(model, guide, y)[0].logsumexp(0).detach()
            torch.testing.assert_close(found.log_prob, want, rtol=1e-12, atol=1e-12)


def test_the_default_of_thirty_bits_is_recognised():
    model = SigmoidBeliefNet().double()
    y = torch.randint(2, (1, 64)).double()
    joint = Joint(model, (y,), {})
    assert joint.space.num_elements == 30
    assert isinstance(lvppl.sweep.evidence._recognised(joint), BernoulliSum)


@pytest.mark.parametrize("latent_dims", LAYERS)
def test_the_elbo_and_its_gradients(latent_dims):
    """Score-function gradients have the mean of the exact ones: 40 batches, within five standard
    errors each (40 to 80 entries and t with 39 degrees of freedom: false alarms below 1e-3, and the
    seed is fixed)."""
    model, guide = make(latent_dims)
    y = bits(4)[[5]]
    parameters = [*model.parameters(), *guide.parameters()]
    log_p, log_q = table(model, guide, y)
    elbo = (log_q.exp() * (log_p - log_q)).sum()
    want = torch.cat([g.flatten() for g in torch.autograd.grad(elbo, parameters)])
    losses, found = [], []
    for seed in range(40):
        pyro.set_rng_seed(seed)
        loss = lvppl.ELBO(num_particles=2).differentiable_loss(model, guide, y.expand(500, -1))
        losses.append(-loss.item() / 500)
        grads = torch.autograd.grad(-loss / 500, parameters)
        found.append(torch.cat([g.flatten() for g in grads]))
    losses, found = torch.tensor(losses), torch.stack(found)
    assert abs(losses.mean() - elbo.item()) < 5 * losses.std() / 40**0.5
    error = found.std(0) / 40**0.5
    assert ((found.mean(0) - want).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("latent_dims", LAYERS)
def test_a_fit_moves_every_parameter(latent_dims):
    fit_moves_every_parameter(*make(latent_dims), bits(4)[:6])


@pytest.mark.parametrize("latent_dims", LAYERS)
def test_particles_equal_a_loop_over_them(latent_dims):
    particles_equal_a_loop(*make(latent_dims, (2, 2)), bits(4)[:6].unflatten(-1, (2, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_device_and_draws(dtype):
    y = bits(4)[:5].unflatten(-1, (2, 2)).to(dtype)
    keeps_dtype_and_device(*make((3, 2), (2, 2), dtype), y)


def test_names_and_refusals():
    assert SigmoidBeliefNet().sites == AmortizedBernoulliLayers().sites == ["z"]
    assert SigmoidBeliefNet(latent_dims=(3, 2)).sites == ["z_1", "z_2"]
    guide = AmortizedBernoulliLayers(latent_dims=(3, 2), site="h", plate="rows")
    assert guide.sites == ["h_1", "h_2"]
    trace = poutine.trace(guide).get_trace(torch.zeros(2, 64))
    assert [frame.name for frame in trace.nodes["h_2"]["cond_indep_stack"]] == ["rows"]
    for program in (SigmoidBeliefNet, AmortizedBernoulliLayers):
        with pytest.raises(ValueError, match=r"at least one layer, but latent_dims is \(\)"):
            program(latent_dims=())

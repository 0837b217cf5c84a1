"""The networks of "Importance weighted autoencoders": their size, start, bounds, all by hand."""

import math
from itertools import pairwise

import pyro
import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid

import lvppl
from lvppl.guides import AmortizedGaussianLayers
from lvppl.models import GaussianLayers
from tests.models.pairs import (
    fit_moves_every_parameter,
    keeps_dtype_and_device,
    particles_equal_a_loop,
)

ONE = {"latent_dims": (50,), "hidden_dims": (200,)}
TWO = {"latent_dims": (100, 50), "hidden_dims": (200, 100)}
SMALL = [
    {"latent_dims": (3,), "hidden_dims": (5,), "y_shape": (4,)},
    {"latent_dims": (4, 2), "hidden_dims": (5, 3), "y_shape": (2, 3)},
    {"latent_dims": (4, 3, 2), "hidden_dims": (5, 4, 3), "y_shape": (6,)},
]


def make(options, dtype=torch.float64):
    pyro.clear_param_store()
    torch.manual_seed(0)
    model, guide = GaussianLayers(**options).to(dtype), AmortizedGaussianLayers(**options).to(dtype)
    for name, p in [*model.named_parameters(), *guide.named_parameters()]:
        if name.endswith("bias"):  # which are zero at first
            p.data += 0.5 * torch.randn_like(p)
    return model, guide, torch.randint(2, (6, *options.get("y_shape", (784,)))).to(dtype)


def dense(*widths):
    """Number of parameters of linear maps from one width to the next."""
    return sum(a * b + b for a, b in pairwise(widths))


def test_one_layer_has_the_sizes_of_the_paper():
    model, guide = GaussianLayers(), AmortizedGaussianLayers()
    count = [sum(p.numel() for p in program.parameters()) for program in (model, guide)]
    assert count == [dense(50, 200, 200, 784), dense(784, 200, 200) + 2 * dense(200, 50)]
    assert count == [207_984, 217_300]


def test_two_layers_have_the_sizes_of_the_paper():
    model, guide = GaussianLayers(**TWO), AmortizedGaussianLayers(**TWO)
    count = [sum(p.numel() for p in program.parameters()) for program in (model, guide)]
    encoder = dense(784, 200, 200) + 2 * dense(200, 100) + dense(100, 100, 100) + 2 * dense(100, 50)
    decoder = dense(50, 100, 100) + 2 * dense(100, 100) + dense(100, 200, 200, 784)
    assert count == [decoder, encoder] and count == [253_384, 267_700]


@pytest.mark.parametrize("program", [GaussianLayers, AmortizedGaussianLayers])
def test_start_of_glorot_and_bengio(program):
    """Uniform within ±√(6 / (in + out)), biases zero: variance 2 / (in + out) within 5 errors."""
    layers = [layer for layer in program(**TWO).modules() if isinstance(layer, nn.Linear)]
    assert len(layers) == 7 if program is GaussianLayers else 8
    for layer in layers:
        bound = math.sqrt(6 / sum(layer.weight.shape))
        assert layer.weight.abs().max() <= bound * (1 + 1e-6) and (layer.bias == 0).all()
        relative = layer.weight.square().mean() / (bound**2 / 3) - 1
        assert abs(relative) < 5 * math.sqrt(0.8 / layer.weight.numel())


def test_the_start_at_the_mean_of_the_data():
    mean = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    model = GaussianLayers(y_shape=(2, 2), mean=mean)
    bias = torch.sigmoid(model.decoder[-1].bias)
    torch.testing.assert_close(bias, torch.tensor([0.001, 0.25, 0.5, 0.999]))


def affine(layer, x):
    return x @ layer.weight.T + layer.bias


def hidden(layers, x):
    return torch.tanh(affine(layers[2], torch.tanh(affine(layers[0], x))))


def gaussian(network, x):
    units = hidden(network.hidden, x)
    return affine(network.loc, units), torch.exp(affine(network.log_scale, units))


def log_normal(z, loc, scale):
    return (-0.5 * ((z - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def log_weights(model, guide, y, z):
    """ln p(y, z) − ln q(z | y), (particles, data), at latents z_1, …, z_L."""
    y = y.flatten(1)
    zero = torch.zeros(1).to(y)
    total = log_normal(z[-1], zero, zero + 1)
    for network, above, below in zip(model.layers, z[1:], z[:-1], strict=True):
        total = total + log_normal(below, *gaussian(network, above))
    logits = affine(model.decoder[4], hidden(model.decoder, z[0]))
    total = total + (y * logsigmoid(logits) + (1 - y) * logsigmoid(-logits)).sum(-1)
    for network, below, above in zip(guide.layers, [y, *z[:-1]], z, strict=True):
        total = total - log_normal(above, *gaussian(network, below))
    return total


def draws(model, guide, y, K, seed):
    """The latents that the guide draws in an outer plate of K particles, as the objective does."""
    pyro.set_rng_seed(seed)
    terms = lvppl.trace_terms(model, guide, (y,), {}, num_particles=K)
    found = {name: site.value for name, site in terms.latents.items()}
    return [found[site].detach().reshape(K, len(y), -1) for site in model.sites]


@pytest.mark.parametrize("options", [*SMALL, ONE, TWO])
def test_bounds_by_hand(options):
    """Both forms of the ELBO and the IWAE bound of one batch, at the very draws of each."""
    K = 5
    model, guide, y = make(options)
    z = draws(model, guide, y, K, seed=1)
    log_w = log_weights(model, guide, y, z)
    # what is known in closed form: the entropy of each layer, and the KL of the top one, whose
    # prior has no parents
    q = [gaussian(net, x) for net, x in zip(guide.layers, [y.flatten(1), *z[:-1]], strict=True)]
    log_q = sum(log_normal(z_i, *q_i) for z_i, q_i in zip(z, q, strict=True))
    entropy = sum((scale.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1) for _, scale in q)
    zero, (loc, scale) = torch.zeros(1).to(y), q[-1]
    drawn = log_normal(z[-1], loc, scale) - log_normal(z[-1], zero, zero + 1)
    kl = (0.5 * (loc**2 + scale**2 - 1) - scale.log()).sum(-1)
    want = {
        lvppl.ELBO(num_particles=K, form="entropy"): (log_w + log_q + entropy).mean(0),
        lvppl.ELBO(num_particles=K, form="kl"): (log_w + drawn - kl).mean(0),
        lvppl.IWAE(num_particles=K): log_w.logsumexp(0) - math.log(K),
    }
    for objective, bound in want.items():
        pyro.set_rng_seed(1)
        loss = objective.differentiable_loss(model, guide, y)
        torch.testing.assert_close(-loss, bound.sum(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", SMALL)
def test_a_fit_moves_every_parameter(options):
    fit_moves_every_parameter(*make(options))


@pytest.mark.parametrize("options", SMALL)
def test_particles_equal_a_loop_over_them(options):
    particles_equal_a_loop(*make(options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", SMALL)
def test_dtype_device_and_draws(options, dtype):
    keeps_dtype_and_device(*make(options, dtype))


def test_names_and_refusals():
    assert GaussianLayers().sites == AmortizedGaussianLayers().sites == ["z"]
    assert GaussianLayers(**TWO).sites == ["z_1", "z_2"]
    assert AmortizedGaussianLayers(**TWO, site="h").sites == ["h_1", "h_2"]
    for program in (GaussianLayers, AmortizedGaussianLayers):
        for options in ({"latent_dims": ()}, {"latent_dims": (3, 2)}, {"hidden_dims": (3, 2)}):
            with pytest.raises(ValueError, match="one width of hidden layers, but there are lat"):
                program(**options)
        with pytest.raises(ValueError, match="one width of hidden layers"):
            program(latent_dims=(), hidden_dims=())

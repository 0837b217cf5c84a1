"""VAE programs: their likelihoods are distributions, their decoders have the stated form."""

import itertools
import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from lvppl.guides import DenseEncoder
from lvppl.models import (
    VAE,
    BernoulliLikelihood,
    BetaBinomialLikelihood,
    ConvDecoder,
    DenseDecoder,
    DiscretizedLogisticLikelihood,
    GaussianLikelihood,
    StudentTLikelihood,
    shallow_gaussian,
)
from lvppl.models.vae import Upsample

DISCRETE = [
    (BernoulliLikelihood, [0.0, 1.0]),
    (BetaBinomialLikelihood, [float(k) for k in range(17)]),
    (partial(BetaBinomialLikelihood, total_count=3), [0.0, 1.0, 2.0, 3.0]),
    (partial(DiscretizedLogisticLikelihood, high=16, num_levels=17), [*map(float, range(17))]),
    (DiscretizedLogisticLikelihood, [k / 255 for k in range(256)]),
]
SMALL = partial(DenseDecoder, hidden_dims=(5,))


@pytest.fixture(autouse=True)
def _clean_slate():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.mark.parametrize("likelihood, levels", DISCRETE)
def test_discrete_likelihoods_sum_to_one(likelihood, levels):
    model = VAE(latent_dim=3, x_shape=(1,), likelihood=likelihood, decoder=SMALL).double()
    z = 10 * torch.randn(4, 3).double()
    x = torch.tensor(levels, dtype=torch.float64)[:, None, None]
    total = model.decode(z).log_prob(x).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(4).double(), rtol=0, atol=1e-12)


def test_student_t_likelihood():
    """A density with finite variance, its parameters as the docstring says; it sums to one."""
    likelihood = StudentTLikelihood((1,), floor=0.05)
    raw = torch.tensor([[[0.7]], [[-1.0]], [[2.0]]]).double().permute(1, 0, 2)  # (1, 3, 1)
    fn = likelihood(raw)
    scale, df = 0.05 + math.log1p(math.exp(-1.0)), 3 + math.log1p(math.exp(2.0))
    x = torch.linspace(-3000, 3000, 600001).double()
    log_p = fn.log_prob(x[:, None, None]).squeeze(-1)
    assert abs(float(torch.trapezoid(log_p.exp(), x)) - 1) < 1e-6
    variance = float(torch.trapezoid(log_p.exp() * (x - 0.7) ** 2, x))
    assert abs(variance - scale**2 * df / (df - 2)) < 1e-3
    torch.testing.assert_close(float(fn.mean), 0.7)
    with pytest.raises(ValueError, match=r"floor must be above 0, but is 0\.0"):
        StudentTLikelihood((1,), floor=0.0)


def test_networks_take_their_activation():
    decoder = DenseDecoder(2, (3,), hidden_dims=(4, 4), activation=torch.nn.Tanh)
    kinds = [type(layer) for layer in decoder.network]
    assert kinds[:4] == [torch.nn.Linear, torch.nn.Tanh] * 2
    encoder = DenseEncoder((3,), 2, hidden_dims=(4,), activation=torch.nn.Tanh)
    assert type(encoder.network[1]) is torch.nn.Tanh


def test_pixels_are_independent():
    model = VAE(latent_dim=2, x_shape=(3,), decoder=SMALL).double()
    z = torch.randn(2).double()
    x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3))).double()
    total = model.decode(z).log_prob(x).logsumexp(0)
    assert abs(total.item()) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("likelihood, levels", DISCRETE)
def test_extreme_parameters_have_gradients(likelihood, levels, dtype):
    module = likelihood((1,))
    grid = torch.tensor([-1e4, -100.0, -10.0, 0.0, 10.0, 100.0, 1e4], dtype=dtype)
    raw = torch.cartesian_prod(*[grid] * module.num_parameters).reshape(
        -1, module.num_parameters, 1
    )
    raw.requires_grad_()
    x = torch.tensor([levels[0], levels[-1], levels[len(levels) // 2]], dtype=dtype)
    log_prob = module(raw).log_prob(x[:, None, None])
    assert (log_prob <= 1e-3).all() and log_prob.isfinite().all()
    assert torch.autograd.grad(log_prob.sum(), raw)[0].isfinite().all()


def test_beta_binomial_float32_agrees_with_float64():
    """The ceiling on the concentrations keeps the log-gamma differences accurate in float32."""
    module = BetaBinomialLikelihood((1,))
    raw = torch.cartesian_prod(*[torch.linspace(-12, 12, 25)] * 2)[:, :, None]
    x = torch.arange(17.0)[:, None, None]
    single = module(raw).log_prob(x)
    double = module(raw.double()).log_prob(x.double())
    assert (single - double).abs().max() < 1e-3


def test_gaussian_likelihood_has_a_floor():
    likelihood = GaussianLikelihood((4,), init=0.5, floor=0.05)
    parameters = torch.randn(2, 1, 4)
    torch.testing.assert_close(likelihood(parameters).base_dist.scale, torch.full((2, 4), 0.5))
    # trained on a constant pixel γ would go to 0, and the density to infinity: here to its floor
    likelihood.log_gamma.data.fill_(-1e6)
    d = likelihood(parameters)
    peak = d.log_prob(parameters[:, 0])
    torch.testing.assert_close(peak, torch.full((2,), 4 * (-math.log(0.05) - 0.9189385)))
    for options in ({"floor": 0.0}, {"floor": 0.5, "init": 0.5}):
        with pytest.raises(ValueError, match="0 < floor < init"):
            GaussianLikelihood((4,), **options)


def test_the_program_by_hand():
    model = VAE(latent_dim=2, x_shape=(3,), likelihood=GaussianLikelihood, decoder=SMALL).double()
    x = torch.randn(5, 3).double()
    z = torch.randn(5, 2).double()
    trace = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x)
    mean = model.decoder(z)[:, 0]
    want = -0.5 * (z.square() + math.log(2 * math.pi)).sum()
    want = want - 0.5 * (((x - mean) / 0.5).square() + math.log(2 * math.pi * 0.25)).sum()
    torch.testing.assert_close(trace.log_prob_sum(), want)


def test_learned_prior_and_its_reparameterisation_have_the_same_elbo():
    """z = m + L ε: the ELBO is invariant, draw by draw, and so is each gradient in the decoder."""
    d = 3
    learned = VAE(latent_dim=d, x_shape=(4,), decoder=SMALL, learned_prior=True).double()
    m, L = torch.randn(d).double(), torch.randn(d, d).double().tril() + 3 * torch.eye(d).double()
    learned.prior_loc, learned.prior_scale_tril = m, L
    standard = VAE(latent_dim=d, x_shape=(4,), decoder=SMALL).double()
    standard.decoder.load_state_dict(learned.decoder.state_dict())
    inner = standard.decoder
    standard.decode = lambda ε: standard.likelihood(inner(m + ε @ L.T))
    x = torch.randint(2, (6, 4)).double()
    a, S = torch.randn(6, d).double(), torch.randn(6, d, d).double().tril() + 2 * torch.eye(d)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(a, scale_tril=S))

    def whitened_guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.linalg.solve(L, (a - m).T).T
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=torch.linalg.solve(L, S)))

    losses = []
    for model, q in ((learned, guide), (standard, whitened_guide)):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        losses.append(Trace_ELBO(num_particles=3).differentiable_loss(model, q, x))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    for p, q in zip(learned.decoder.parameters(), inner.parameters(), strict=True):
        (gradient,) = torch.autograd.grad(losses[0], p, retain_graph=True)
        (other,) = torch.autograd.grad(losses[1], q, retain_graph=True)
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)


def test_learned_prior_is_learned():
    model = VAE(latent_dim=2, x_shape=(3,), decoder=SMALL, learned_prior=True)
    x = torch.zeros(4, 3)
    trace = poutine.trace(model, param_only=True).get_trace(x)
    assert {"vae.prior_loc", "vae.prior_scale_tril"} <= set(trace.nodes)
    d = VAE(latent_dim=2, x_shape=(3,), decoder=SMALL).prior()
    assert isinstance(d.base_dist, dist.Normal) and (d.mean == 0).all() and (d.stddev == 1).all()


def test_upsampling_is_a_convolution_reshaped_onto_the_larger_grid():
    layer = Upsample(3, 5)
    x = torch.randn(2, 3, 4, 6)
    convolved = layer[0](x)
    assert layer[0].stride == (1, 1) and convolved.shape == (2, 20, 4, 6)
    want = torch.empty(2, 5, 8, 12)
    for c, a, b in itertools.product(range(5), range(2), range(2)):
        want[:, c, a::2, b::2] = convolved[:, 4 * c + 2 * a + b]
    torch.testing.assert_close(layer(x), torch.nn.functional.silu(want))


@pytest.mark.parametrize("x_shape", [(8, 8), (1, 28, 28), (3, 8, 4)])
@pytest.mark.parametrize("likelihood", [BernoulliLikelihood, BetaBinomialLikelihood])
def test_conv_decoder_shapes(x_shape, likelihood):
    decoder = partial(ConvDecoder, channels=(4, 3, 2))
    model = VAE(latent_dim=2, x_shape=x_shape, likelihood=likelihood, decoder=decoder)
    for leading in ((), (5,), (3, 5), (2, 1, 5)):
        z = torch.randn(*leading, 2)
        d = model.decode(z)
        assert d.batch_shape == leading and d.event_shape == x_shape
        flat = model.decoder(z.reshape(-1, 2))
        torch.testing.assert_close(
            model.decoder(z), flat.reshape(*leading, likelihood.num_parameters, *x_shape)
        )


def test_conv_decoder_refuses_other_shapes():
    for x_shape in ((64,), (10, 8), (1, 1, 8, 8)):
        with pytest.raises(ValueError, match="divisible by four"):
            VAE(x_shape=x_shape, decoder=ConvDecoder)


def test_off_support_data_is_refused_by_validation():
    model = VAE(latent_dim=2, x_shape=(3,), decoder=SMALL)
    with pytest.raises(ValueError, match="support"):
        poutine.trace(model).get_trace(torch.full((2, 3), 0.5)).compute_log_prob()


def test_shallow_gaussian_by_hand():
    x = torch.randn(5, 4, dtype=torch.float64)
    z = torch.randn(5, 3, dtype=torch.float64)
    program = poutine.condition(partial(shallow_gaussian, latent_dim=3), {"z": z})
    trace = poutine.trace(program).get_trace(x)
    A, B, c, d = (trace.nodes[name]["value"] for name in "ABcd")
    assert A.shape == B.shape == (4, 3) and A.dtype == torch.float64
    pyro.get_param_store()["d"] = d.detach() + torch.arange(4).double()
    pyro.get_param_store()["c"] = c.detach() - torch.arange(4).double()
    trace = poutine.trace(program).get_trace(x)
    want = dist.Normal(0.0, 1.0).log_prob(z).sum()
    for n, j in itertools.product(range(5), range(4)):
        mean = 1 / (1 + torch.exp(-(A[j] @ z[n] - j)))
        variance = torch.exp(1 / (1 + torch.exp(-(B[j] @ z[n] + j))))
        want = want - 0.5 * ((x[n, j] - mean) ** 2 / variance + torch.log(2 * math.pi * variance))
    torch.testing.assert_close(trace.log_prob_sum(), want)

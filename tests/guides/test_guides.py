"""Each guide with a model under plain Pyro SVI: its loss by hand, its particles, its parameters."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule

from lvppl.distributions import Dithered, Quantized, log_bin_mass
from lvppl.guides import (
    AmortizedFlow,
    AmortizedMultivariateNormal,
    AmortizedNormal,
    AmortizedPoint,
    AmortizedUniformNoise,
    ConvEncoder,
    DenseEncoder,
    PerDatumNormal,
)
from lvppl.models import VAE, BetaBinomialLikelihood, DenseDecoder

SMALL = partial(DenseEncoder, hidden_dims=(7,), input_scale=16)
CONV = partial(ConvEncoder, channels=(3, 4), input_scale=16)
GUIDES = {
    "normal": partial(AmortizedNormal, encoder=SMALL),
    "normal_conv": partial(AmortizedNormal, encoder=CONV),
    "full": partial(AmortizedMultivariateNormal, encoder=SMALL),
    "flow": partial(AmortizedFlow, encoder=SMALL, context_dim=4, hidden_dims=(5,)),
    "flow_conv": partial(AmortizedFlow, encoder=CONV, context_dim=4, hidden_dims=(5,)),
    "point": partial(AmortizedPoint, encoder=SMALL),
    "quantized": partial(AmortizedPoint, encoder=SMALL, step=0.5),
    "noise": partial(AmortizedUniformNoise, encoder=SMALL, step=0.5),
}
X_SHAPE = (1, 8, 8)
LATENT_DIM = 3


@pytest.fixture(autouse=True)
def _clean_slate():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def make_guide(name, dtype=torch.float64):
    if name == "per_datum":
        guide = PerDatumNormal(6, LATENT_DIM)
    else:
        guide = GUIDES[name](latent_dim=LATENT_DIM, x_shape=X_SHAPE)
    guide.to(dtype)
    # away from special starting values, such as the identity of a flow
    for p in guide.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return guide


def data(dtype=torch.float64):
    return torch.randint(17, (6, *X_SHAPE)).to(dtype)


class QuantizedVAE(PyroModule):
    """A decoder over a quantised or dithered prior."""

    def __init__(self, prior, step):
        super().__init__("quantized_vae")
        self.vae = VAE(
            latent_dim=LATENT_DIM,
            x_shape=X_SHAPE,
            likelihood=BetaBinomialLikelihood,
            decoder=partial(DenseDecoder, hidden_dims=(7,)),
        )
        self.base_loc, self.prior, self.step = torch.nn.Parameter(torch.zeros(3)), prior, step

    def forward(self, x):
        base = dist.Logistic(self.base_loc, torch.ones_like(self.base_loc))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(base, self.step).to_event(1))
            return pyro.sample("x", self.vae.decode(z), obs=x)


def make_model(name):
    if name == "quantized":
        return QuantizedVAE(Quantized, 0.5).double()
    if name == "noise":
        return QuantizedVAE(Dithered, 0.5).double()
    likelihood, decoder = BetaBinomialLikelihood, partial(DenseDecoder, hidden_dims=(7,))
    return VAE(
        latent_dim=LATENT_DIM, x_shape=X_SHAPE, likelihood=likelihood, decoder=decoder
    ).double()


ALL = [*GUIDES, "per_datum"]


@pytest.mark.parametrize("name", ALL)
def test_pair_runs_under_plain_pyro_svi(name):
    """The loss is −[ln p(x, z) − ln q(z | x)] at the drawn z, and both programs are trained."""
    model, guide, x = make_model(name), make_guide(name), data()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    for step in range(3):
        pyro.set_rng_seed(step)
        with torch.no_grad():
            q = guide.posterior(x)
            z = q.rsample()
            log_joint = poutine.trace(poutine.condition(model, {"z": z})).get_trace(x)
            want = q.log_prob(z).sum() - log_joint.log_prob_sum()
        before = [p.detach().clone() for p in (*model.parameters(), *guide.parameters())]
        pyro.set_rng_seed(step)
        assert svi.step(x) == pytest.approx(want.item(), rel=1e-10)
        after = [*model.parameters(), *guide.parameters()]
        for old, new in zip(before, after, strict=True):
            assert not torch.equal(old, new)


@pytest.mark.parametrize("name", ALL)
def test_particles_equal_a_loop_over_them(name):
    guide, x = make_guide(name), data()
    with pyro.plate("particles", 4, dim=-2):
        trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    z, log_prob = trace.nodes["z"]["value"], trace.nodes["z"]["log_prob"]
    assert z.shape == (4, 6, LATENT_DIM) and log_prob.shape == (4, 6)
    for i in range(4):
        # a copy of the values: nothing may come from a cache of the draws
        want = guide.posterior(x).log_prob(z[i].clone())
        torch.testing.assert_close(log_prob[i], want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GUIDES)
def test_a_minibatch_has_the_posterior_of_its_data(name):
    guide, x = make_guide(name), data()
    rows = torch.tensor([5, 0])
    z = guide.posterior(x[rows]).sample()
    if name in ("point", "quantized"):
        torch.testing.assert_close(z, guide.posterior(x).mean[rows])
        return
    full = torch.zeros(6, LATENT_DIM).double()
    full[rows] = z
    batch = guide.posterior(x[rows]).log_prob(z)
    torch.testing.assert_close(batch, guide.posterior(x).log_prob(full)[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_dtype_follows_the_guide(name, dtype):
    guide, x = make_guide(name, dtype), data(dtype)
    trace = poutine.trace(guide).get_trace(x)
    trace.compute_log_prob()
    assert trace.nodes["z"]["value"].dtype == trace.nodes["z"]["log_prob"].dtype == dtype


@pytest.mark.parametrize("name", ALL)
def test_parameters_go_by_distinct_names(name):
    """Model and guide share the parameter store: no name may be taken twice."""
    model, guide, x = make_model(name), make_guide(name), data()
    poutine.trace(guide).get_trace(x)
    poutine.trace(model).get_trace(x)
    stored = {id(p) for p in pyro.get_param_store()._params.values()}
    assert {id(p) for p in (*model.parameters(), *guide.parameters())} <= stored


@pytest.mark.parametrize("name", GUIDES)
def test_site_and_plate_are_options(name):
    guide = GUIDES[name](latent_dim=2, x_shape=X_SHAPE, site="w", plate="rows").double()
    trace = poutine.trace(guide).get_trace(data())
    assert trace.nodes["w"]["cond_indep_stack"][0].name == "rows"


def test_encoders_take_levels_of_any_dtype():
    levels = torch.randint(17, (6, *X_SHAPE), dtype=torch.uint8)
    for encoder in (SMALL(X_SHAPE, 5).double(), CONV(X_SHAPE, 5, input_scale=16).double()):
        want = encoder(levels.double())
        assert want.shape == (6, 5)
        torch.testing.assert_close(encoder(levels), want)
        torch.testing.assert_close(encoder(levels[0]), want[0])
    for shape in ((64,), (10, 8), (2, 3, 8, 8)):
        with pytest.raises(ValueError, match="divisible by four"):
            ConvEncoder(shape, 5)


def test_full_covariance_is_the_covariance_of_its_draws():
    guide, x = make_guide("full"), data()
    q = guide.posterior(x)
    factor = q.scale_tril
    assert (factor.diagonal(dim1=-2, dim2=-1) > 0).all() and (factor == factor.tril()).all()
    assert (factor[:, [1, 2, 2], [0, 0, 1]] != 0).all()  # correlations are there
    white = torch.linalg.solve_triangular(
        factor, (q.rsample((4000,)) - q.mean).unsqueeze(-1), upper=False
    ).squeeze(-1)
    second = torch.einsum("sni,snj->nij", white, white) / 4000
    # 54 entries, each within 5 standard errors of the identity
    assert (second - torch.eye(3).double()).abs().max() < 5 * (2 / 4000) ** 0.5


def test_point_guide_is_on_its_grid_with_a_straight_gradient():
    guide, model, x = make_guide("quantized"), make_model("quantized"), data()
    z = guide.posterior(x).sample()
    assert torch.equal(z, (z / 0.5).round() * 0.5)
    loss = Trace_ELBO().differentiable_loss(model, guide, x)
    parameters = list(guide.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    # the loss as a function of z, and dz = df straight through
    z.requires_grad_()
    base = dist.Logistic(torch.zeros(3).double(), torch.ones(3).double())
    by_hand = -(log_bin_mass(base, z, 0.5).sum() + model.vae.decode(z).log_prob(x).sum())
    (dz,) = torch.autograd.grad(by_hand, z)
    want = torch.autograd.grad((guide.encoder(x) * dz).sum(), parameters)
    for a, b in zip(gradients, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_noise_guide_measures_code_length():
    guide, model, x = make_guide("noise"), make_model("noise"), data()
    pyro.set_rng_seed(3)
    loss = Trace_ELBO().loss(model, guide, x)
    pyro.set_rng_seed(3)
    z = guide.posterior(x).sample()
    base = dist.Logistic(torch.zeros(3).double(), torch.ones(3).double())
    code_length = -log_bin_mass(base, z, 0.5).sum()
    want = code_length - model.vae.decode(z).log_prob(x).sum()
    assert loss == pytest.approx(want.item(), rel=1e-12)

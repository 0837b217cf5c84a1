"""Outside programs: the structure of Pyro's own examples, unchanged under lvppl's objectives.

At one seed lvppl draws what Pyro draws. So wherever the two estimators are the same formula they
are the same number, loss and every gradient:

- `form="kl"` is `TraceMeanField_ELBO`;
- the one-particle importance bound is `Trace_ELBO`, whatever is enumerated in the model
  `TraceEnum_ELBO`;
- `form="entropy"` is `Trace_ELBO` with -ln q(z) replaced by H(q): the difference is known at each
  seed.

Where nothing but the expectation is shared, the paired difference over REPEATS seeds is zero
within k standard errors, k the Student quantile that fails falsely with probability below 1e-5
over all comparisons of this file (fewer than 2,000).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoNormal, init_to_value
from pyro.optim import Adam, ClippedAdam
from torch import Tensor, nn

import lvppl

REPEATS = 40
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """The programs use the default dtype, as Pyro's examples do."""
    pyro.clear_param_store()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


# ------------------------------------------------------------------------------ examples/vae/vae.py


class Encoder(nn.Module):
    def __init__(self, z_dim: int, hidden_dim: int, pixels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(pixels, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, z_dim)
        self.fc22 = nn.Linear(hidden_dim, z_dim)
        self.softplus = nn.Softplus()
        self.pixels = pixels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.reshape(-1, self.pixels)
        hidden = self.softplus(self.fc1(x))
        return self.fc21(hidden), torch.exp(self.fc22(hidden))


class Decoder(nn.Module):
    def __init__(self, z_dim: int, hidden_dim: int, pixels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(z_dim, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, pixels)
        self.softplus = nn.Softplus()

    def forward(self, z: Tensor) -> Tensor:
        return torch.sigmoid(self.fc21(self.softplus(self.fc1(z))))


class VAE(nn.Module):
    def __init__(self, z_dim: int = 3, hidden_dim: int = 8, pixels: int = 16) -> None:
        super().__init__()
        self.encoder = Encoder(z_dim, hidden_dim, pixels)
        self.decoder = Decoder(z_dim, hidden_dim, pixels)
        self.z_dim, self.pixels = z_dim, pixels

    def model(self, x: Tensor) -> Tensor:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z_scale = torch.ones(x.shape[0], self.z_dim, dtype=x.dtype, device=x.device)
            z = pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))
            loc_img = self.decoder(z)
            pyro.sample(
                "obs",
                dist.Bernoulli(loc_img, validate_args=False).to_event(1),
                obs=x.reshape(-1, self.pixels),
            )
            return loc_img

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


Pair = tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]


def vae() -> Pair:
    pyro.set_rng_seed(0)
    program = VAE()
    images = torch.bernoulli(torch.full((6, 1, 4, 4), 0.4))
    return program.model, program.guide, (images,)


# ----------------------------------------------------------------------------- examples/minipyro.py


def minipyro() -> Pair:
    def model(data: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(data), dim=-1):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=data)

    def guide(data: Tensor) -> None:
        guide_loc = pyro.param("guide_loc", torch.tensor(0.3))
        guide_scale = pyro.param("guide_scale_log", torch.tensor(-0.2)).exp()
        pyro.sample("loc", dist.Normal(guide_loc, guide_scale))

    pyro.set_rng_seed(0)
    return model, guide, (torch.randn(100) + 3.0,)


def minipyro_scale() -> Pair:
    """The same with a latent scale, and LogNormal and Normal guides."""

    def model(data: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(data), dim=-1):
            pyro.sample("obs", dist.Normal(loc, scale), obs=data)

    def guide(data: Tensor) -> None:
        loc = pyro.param("loc_mean", torch.tensor(0.8))
        spread = pyro.param("loc_scale", torch.tensor(0.3), constraint=dist.constraints.positive)
        log_scale = pyro.param("scale_mean", torch.tensor(0.2))
        pyro.sample("loc", dist.Normal(loc, spread))
        pyro.sample("scale", dist.LogNormal(log_scale, 0.25))

    pyro.set_rng_seed(0)
    return model, guide, (torch.randn(20) + 1.0,)


# -------------------------------------------------------------------- examples/eight_schools/svi.py


def eight_schools() -> Pair:
    """Global mean and scale, an effect for every school; TransformedDistribution in the guide."""
    y = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    sigma = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])

    def model(y: Tensor, sigma: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 10.0 * torch.ones(1)).to_event(1))
        tau = pyro.sample("tau", dist.HalfCauchy(scale=25.0 * torch.ones(1)).to_event(1))
        with pyro.plate("data", len(y)):
            eta = pyro.sample("eta", dist.Normal(torch.zeros(len(y)), torch.ones(len(y))))
            pyro.sample("obs", dist.Normal(mu + tau * eta, sigma), obs=y)

    def guide(y: Tensor, sigma: Tensor) -> None:
        m_eta = pyro.param("m_eta", 0.1 * torch.arange(8.0))
        m_mu, m_tau = (
            pyro.param("m_mu", torch.tensor([2.0])),
            pyro.param("m_tau", torch.tensor([0.5])),
        )
        s = pyro.param("s", torch.full((10,), 0.4), constraint=dist.constraints.positive)
        pyro.sample("mu", dist.Normal(m_mu, s[:1]).to_event(1))
        log_normal = dist.TransformedDistribution(
            dist.Normal(m_tau, s[1:2]), transforms=[dist.transforms.ExpTransform()]
        )
        pyro.sample("tau", log_normal.to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("eta", dist.Normal(m_eta, s[2:]))

    return model, guide, (y, sigma)


# ---------------------------------------------------------- the GMM tutorial, examples/ss_vae_M2.py


def gaussian_mixture(auto: type) -> Pair:
    """Assignments are enumerated; an autoguide holds weights, locations and scale."""
    components = 2

    @config_enumerate
    def model(data: Tensor) -> None:
        weights = pyro.sample("weights", dist.Dirichlet(0.5 * torch.ones(components)))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 2.0))
        with pyro.plate("components", components):
            locs = pyro.sample("locs", dist.Normal(0.0, 10.0))
        with pyro.plate("data", len(data)):
            assignment = pyro.sample("assignment", dist.Categorical(weights))
            pyro.sample("obs", dist.Normal(locs[assignment], scale), obs=data)

    start = {
        "weights": torch.tensor([0.4, 0.6]),
        "scale": torch.tensor(1.3),
        "locs": torch.tensor([0.5, 9.0]),
    }
    guide = auto(
        poutine.block(model, expose=["weights", "locs", "scale"]),
        init_loc_fn=init_to_value(values=start),
    )
    return model, guide, (torch.tensor([0.0, 1.0, 10.0, 11.0, 12.0]),)


class SSVAE(nn.Module):
    """Semi-supervised VAE: the class y is enumerated in the guide where it is not observed."""

    def __init__(self, classes: int = 3, z_dim: int = 2, pixels: int = 8) -> None:
        super().__init__()
        self.encoder_y = nn.Linear(pixels, classes)
        self.encoder_z = nn.Linear(pixels + classes, 2 * z_dim)
        self.decoder = nn.Linear(z_dim + classes, pixels)
        self.classes, self.z_dim = classes, z_dim

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(first.shape[:-1], second.shape[:-1])
        return torch.cat([t.expand(*shape, t.shape[-1]) for t in (first, second)], -1)

    def model(self, xs: Tensor, ys: Tensor | None = None) -> None:
        pyro.module("ss_vae", self)
        with pyro.plate("data", len(xs)):
            alpha = xs.new_ones(len(xs), self.classes) / self.classes
            ys = pyro.sample("y", dist.OneHotCategorical(alpha), obs=ys)
            prior = dist.Normal(xs.new_zeros(len(xs), self.z_dim), xs.new_ones(len(xs), self.z_dim))
            zs = pyro.sample("z", prior.to_event(1))
            loc = torch.sigmoid(self.decoder(self.join(zs, ys)))
            pyro.sample("x", dist.Bernoulli(loc, validate_args=False).to_event(1), obs=xs)

    def guide(self, xs: Tensor, ys: Tensor | None = None) -> None:
        with pyro.plate("data", len(xs)):
            if ys is None:
                ys = pyro.sample(
                    "y",
                    dist.OneHotCategorical(logits=self.encoder_y(xs)),
                    infer={"enumerate": "parallel"},
                )
            loc, log_scale = self.encoder_z(self.join(xs, ys)).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def semi_supervised(observed: bool) -> Pair:
    pyro.set_rng_seed(0)
    program = SSVAE()
    xs = torch.bernoulli(torch.full((4, 8), 0.5))
    ys = torch.eye(3)[torch.tensor([0, 2, 1, 1])]
    return program.model, program.guide, (xs, ys) if observed else (xs,)


# ----------------------------------------------------------------------------- comparing two losses


def evaluate(objective: Any, pair: Pair, seed: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and the gradient of every parameter, through the interface that Pyro's SVI uses."""
    model, guide, args = pair
    for parameter in pyro.get_param_store().values():
        parameter.unconstrained().grad = None
    pyro.set_rng_seed(seed)
    loss = objective.loss_and_grads(model, guide, *args)
    named = pyro.get_param_store().named_parameters()
    gradients = {k: v.grad.clone() for k, v in sorted(named) if v.grad is not None}
    return torch.tensor(float(loss)), gradients


def create_parameters(pair: Pair) -> None:
    model, guide, args = pair
    with torch.no_grad():
        guide(*args)
        model(*args)


def assert_same(mine: Any, theirs: Any, pair: Pair, seeds: range = range(3)) -> None:
    create_parameters(pair)
    for seed in seeds:
        loss, gradients = evaluate(mine, pair, seed)
        expected, expected_gradients = evaluate(theirs, pair, seed)
        torch.testing.assert_close(loss, expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert gradients.keys() == expected_gradients.keys()
        for name, value in gradients.items():
            torch.testing.assert_close(
                value, expected_gradients[name], rtol=TOLERANCE, atol=TOLERANCE, msg=name
            )


def assert_same_expectation(mine: Any, theirs: Any, pair: Pair) -> None:
    create_parameters(pair)
    differences = []
    for seed in range(REPEATS):
        loss, gradients = evaluate(mine, pair, seed)
        expected, expected_gradients = evaluate(theirs, pair, seed)
        parts = [(loss - expected).flatten()]
        parts += [(gradients[k] - expected_gradients[k]).flatten() for k in expected_gradients]
        differences.append(torch.cat(parts))
    samples = torch.stack(differences)
    error = samples.std(0) / math.sqrt(REPEATS)
    k = float(scipy.stats.t.ppf(1 - 0.5e-5 / 2000, REPEATS - 1))
    assert bool((samples.mean(0).abs() <= k * error + 1e-9).all())


PROGRAMS: dict[str, Callable[[], Pair]] = {
    "vae": vae,
    "minipyro": minipyro,
    "minipyro_scale": minipyro_scale,
    "eight_schools": eight_schools,
}


@pytest.mark.parametrize("name", ["vae", "minipyro", "minipyro_scale"])
def test_kl_form_is_trace_mean_field_elbo(name: str) -> None:
    assert_same(lvppl.ELBO(form="kl"), TraceMeanField_ELBO(), PROGRAMS[name]())


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_one_weight_is_trace_elbo(name: str) -> None:
    assert_same(lvppl.IWAE(num_particles=1), Trace_ELBO(), PROGRAMS[name]())


@pytest.mark.parametrize("name", ["vae", "minipyro", "minipyro_scale"])
def test_many_particles_are_those_of_pyro(name: str) -> None:
    """One outer plate, as Pyro's vectorised particles: the same draws."""
    peer = TraceMeanField_ELBO(num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    assert_same(lvppl.ELBO(form="kl", num_particles=5), peer, PROGRAMS[name]())


class EntropyForm:
    """`Trace_ELBO` with its -ln q(z) replaced by the closed entropy, from Pyro's own traces."""

    def loss_and_grads(self, model: Any, guide: Any, *args: Any) -> float:
        guide_trace = poutine.trace(guide).get_trace(*args)
        replayed = poutine.replay(model, trace=guide_trace)
        log_joint = poutine.trace(replayed).get_trace(*args).log_prob_sum()
        sites = [s for s in guide_trace.nodes.values() if s["type"] == "sample"]
        latent = [s for s in sites if s["name"] not in ("data",) and not s["is_observed"]]
        entropy = sum(s["fn"].entropy().expand(s["fn"].batch_shape).sum() for s in latent)
        loss = -(log_joint + entropy)
        loss.backward()
        return loss.item()


@pytest.mark.parametrize("name", ["vae", "minipyro", "minipyro_scale"])
def test_entropy_form_is_trace_elbo_with_the_closed_entropy(name: str) -> None:
    assert_same(lvppl.ELBO(form="entropy"), EntropyForm(), PROGRAMS[name]())


@pytest.mark.parametrize("form", ["kl", "entropy"])
@pytest.mark.parametrize("name", list(PROGRAMS))
def test_both_forms_are_trace_elbo_in_expectation(name: str, form: str) -> None:
    peer = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    if name == "eight_schools":
        peer = Trace_ELBO(num_particles=3)  # its mu + tau * eta fails with a particle dimension
        assert_same_expectation(lvppl.ELBO(form=form, num_particles=3), peer, PROGRAMS[name]())
    else:
        assert_same_expectation(lvppl.ELBO(form=form, num_particles=20), peer, PROGRAMS[name]())


@pytest.mark.parametrize("form", ["kl", "entropy"])
def test_point_guide_over_an_enumerated_mixture_is_trace_enum_elbo(form: str) -> None:
    """The GMM tutorial with `AutoDelta`: nothing is drawn."""
    assert_same(
        lvppl.ELBO(form=form), TraceEnum_ELBO(max_plate_nesting=1), gaussian_mixture(AutoDelta)
    )


def test_auto_normal_over_an_enumerated_mixture_is_trace_enum_elbo() -> None:
    pair = gaussian_mixture(AutoNormal)
    assert_same(lvppl.IWAE(num_particles=1), TraceEnum_ELBO(max_plate_nesting=1), pair)


@pytest.mark.parametrize("form", ["kl", "entropy"])
def test_auto_normal_over_an_enumerated_mixture_in_expectation(form: str) -> None:
    """`locs[assignment]` cannot bear a particle plate: particles loop, in Pyro and here."""
    peer = TraceEnum_ELBO(max_plate_nesting=1, num_particles=3)
    pair = gaussian_mixture(AutoNormal)
    assert_same_expectation(lvppl.ELBO(form=form, num_particles=3), peer, pair)


@pytest.mark.parametrize("form", ["kl", "entropy"])
@pytest.mark.parametrize("observed", [True, False])
def test_semi_supervised_vae_is_trace_enum_elbo_in_expectation(form: str, observed: bool) -> None:
    pair = semi_supervised(observed)
    if observed:  # Pyro's own example warns of nothing else: the unused head has no gradient
        peer: Any = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    else:
        peer = TraceEnum_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=1)
    assert_same_expectation(lvppl.ELBO(form=form, num_particles=10), peer, pair)


def test_single_precision_matches_too() -> None:
    """Pyro's examples run in float32."""
    torch.set_default_dtype(torch.float32)
    for name in ("vae", "minipyro"):
        pyro.clear_param_store()
        assert_same(lvppl.ELBO(form="kl"), TraceMeanField_ELBO(), PROGRAMS[name]())


def test_svi_trajectory_is_that_of_pyro() -> None:
    """`pyro.infer.SVI` with Adam, 20 steps: every loss and every final parameter."""
    histories, finals = [], []
    for loss in (lvppl.ELBO(form="kl"), TraceMeanField_ELBO()):
        pyro.clear_param_store()
        model, guide, args = vae()
        svi = SVI(model, guide, Adam({"lr": 1e-2}), loss=loss)
        pyro.set_rng_seed(1)
        histories.append(torch.tensor([svi.step(*args) for _ in range(20)]))
        finals.append({k: v.detach().clone() for k, v in pyro.get_param_store().items()})
    torch.testing.assert_close(histories[0], histories[1], rtol=TOLERANCE, atol=TOLERANCE)
    for key, value in finals[0].items():
        torch.testing.assert_close(value, finals[1][key], rtol=TOLERANCE, atol=TOLERANCE)


def test_minipyro_converges_to_the_exact_posterior() -> None:
    """n observations of unit variance under N(0, 1): posterior N(sum / (n + 1), 1 / (n + 1)).

    Path gradients have no variance at the optimum, so the end is exact, and the loss is -ln p(y).
    """
    model, guide, (data,) = minipyro()
    optimizer = ClippedAdam({"lr": 0.1, "lrd": 0.995})
    svi = SVI(model, guide, optimizer, loss=lvppl.ELBO(gradient="stl"))
    pyro.set_rng_seed(2)
    for _ in range(1000):
        svi.step(data)
    n = len(data)
    assert pyro.param("guide_loc").item() == pytest.approx((data.sum() / (n + 1)).item(), abs=1e-3)
    assert pyro.param("guide_scale_log").item() == pytest.approx(-0.5 * math.log(n + 1), abs=1e-3)
    covariance = torch.eye(n) + torch.ones(n, n)
    evidence = torch.distributions.MultivariateNormal(torch.zeros(n), covariance).log_prob(data)
    assert lvppl.ELBO(gradient="stl").loss(model, guide, data) == pytest.approx(
        -evidence.item(), abs=1e-3
    )

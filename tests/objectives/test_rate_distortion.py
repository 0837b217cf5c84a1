"""Rate–distortion against Shannon's closed forms for a Gaussian source."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import lvppl
from lvppl.distributions import Dithered, Quantized, straight_through_round
from lvppl.objectives import CyclicSchedule, LinearSchedule, squared_error

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


SOURCE = 2.0  # standard deviation of y


def channel_model(y):
    """z ~ N(0, 1), ŷ = a z. The observation noise does not enter a squared distortion."""
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(y)]))
        pyro.sample("y", dist.Normal(a * z, 1.0), obs=y)


def channel_guide(y):
    w = pyro.param("w", torch.tensor(0.3))
    s = pyro.param("s", torch.tensor(0.7), constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(w * y, s))


def source(count=1000):
    torch.manual_seed(0)
    y = torch.randn(count)
    return SOURCE * (y - y.mean()) / y.std(unbiased=False)


def closed_form(y, weight):
    """(rate, distortion) of the channel at its current parameters, in nats."""
    a, w, s = (pyro.param(name).detach() for name in ("a", "w", "s"))
    rate = 0.5 * (s**2 + w**2 * y.square() - 1 - (s**2).log())
    distortion = (y * (1 - a * w)).square() + (a * s) ** 2
    return rate, distortion, rate + weight * distortion


def test_value_and_gradient_are_those_of_the_closed_form():
    y = source(50)
    pyro.clear_param_store()
    objective = lvppl.RateDistortion(weight=1.7, distortion="squared", num_particles=40_000)
    loss = objective.differentiable_loss(channel_model, channel_guide, y)
    loss.backward()
    leaves = pyro.get_param_store()._params
    found = {name: leaf.grad.clone() for name, leaf in leaves.items()}
    a, w = leaves["a"].detach().clone().requires_grad_(), leaves["w"].detach().clone()
    w.requires_grad_()
    log_s = leaves["s"].detach().clone().requires_grad_()
    s = log_s.exp()
    rate = 0.5 * (s**2 + w**2 * y.square() - 1 - 2 * log_s)
    exact = (rate + 1.7 * ((y * (1 - a * w)).square() + (a * s) ** 2)).sum()
    exact.backward()
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    for name, leaf in (("a", a), ("w", w), ("s", log_s)):
        assert found[name].item() == pytest.approx(leaf.grad.item(), rel=2e-2, abs=0.3), name


def fit(objective, y, steps=800, learning_rate=0.05):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    svi = pyro.infer.SVI(
        channel_model,
        channel_guide,
        pyro.optim.ExponentialLR(
            {
                "optimizer": torch.optim.Adam,
                "optim_args": {"lr": learning_rate},
                "gamma": 0.994,
            }
        ),
        loss=objective,
    )
    for _ in range(steps):
        svi.step(y)
        svi.optim.step()


@pytest.mark.parametrize(
    ("target", "goal"),
    [({"distortion": 0.5}, "distortion"), ({"rate": 1.2}, "rate"), ({"rate": 1.5}, "bits")],
)
def test_a_target_is_reached_on_shannons_curve(target, goal):
    """R(D) = ½ ln(σ² / D): the constrained optimum lies on the curve at the target."""
    y = source()
    unit = "bits" if goal == "bits" else "nats"
    objective = lvppl.RateDistortion(distortion="squared", target=target, unit=unit)
    fit(objective, y)
    report = objective.report(channel_model, channel_guide, y)
    rate, distortion, _ = (t.mean().item() for t in closed_form(y, 1.0))
    wanted = next(iter(target.values()))
    if goal == "distortion":
        assert distortion == pytest.approx(wanted, rel=0.02)
    else:
        measured = rate / (math.log(2) if goal == "bits" else 1.0)
        assert measured == pytest.approx(wanted, rel=0.02)
        assert report.unit == unit
    shannon = 0.5 * math.log(SOURCE**2 / distortion)
    assert shannon <= rate + 1e-9  # Shannon's curve is a bound
    assert rate == pytest.approx(shannon, abs=0.01)
    # at the optimum the multiplier is the slope: λ = −dR/dD = 1 / (2 D)
    assert report.weight == pytest.approx(1 / (2 * distortion), rel=0.1)


def test_a_fixed_weight_finds_the_point_of_that_slope():
    """min R + λ D on R(D) = ½ ln(σ²/D) is at D = 1 / (2 λ)."""
    y = source()
    fit(lvppl.RateDistortion(weight=2.0, distortion=squared_error), y)
    rate, distortion, _ = (t.mean().item() for t in closed_form(y, 2.0))
    assert distortion == pytest.approx(0.25, rel=0.03)
    assert rate == pytest.approx(0.5 * math.log(SOURCE**2 / 0.25), abs=0.02)


# ----------------------------------------------------------------------- the hard limit: quantisers


def quantised_model(y, step, prior):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", prior(dist.Normal(y.new_zeros(()), SOURCE), step))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def rounding_guide(y, step, prior):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Delta(straight_through_round(y, step)))


def noise_guide(y, step, prior):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Uniform(y - step / 2, y + step / 2))


def test_a_high_rate_scalar_quantiser_is_a_quarter_bit_above_shannon():
    """½ log2(2πe / 12) = 0.2546 bits above R(D) (Gish and Pierce 1968)."""
    y = source(200_000)
    objective = lvppl.RateDistortion(distortion="squared", unit="bits")
    report = objective.report(quantised_model, rounding_guide, y, 0.1, Quantized)
    distortion = report.measured_distortion.per_datum.mean().item()
    assert distortion == pytest.approx(0.1**2 / 12, rel=0.01)
    rate = report.rate_in_unit.per_datum.mean().item()
    gap = rate - 0.5 * math.log2(SOURCE**2 / distortion)
    # rate and ln D each fluctuate by about 1 / sqrt(200,000): five of these
    assert gap == pytest.approx(0.5 * math.log2(2 * math.pi * math.e / 12), abs=0.01)


def test_uniform_noise_has_the_code_length_as_its_rate():
    y = source(20_000)
    objective = lvppl.RateDistortion(distortion="squared")
    report = objective.report(quantised_model, noise_guide, y, 0.5, Dithered)
    prior = dist.Normal(torch.zeros(()), SOURCE)
    grid = 0.5 * torch.arange(-200, 201)
    mass = prior.cdf(grid + 0.25) - prior.cdf(grid - 0.25)
    entropy = -torch.xlogy(mass, mass).sum().item()
    assert report.rate.per_datum.mean().item() == pytest.approx(entropy, abs=0.03)


def test_a_point_guide_over_a_continuous_latent_is_refused():
    def point_guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Delta(y))

    with pytest.raises(lvppl.ProgramError, match=r"no code length.*Quantise"):
        lvppl.RateDistortion().loss(channel_model, point_guide, source(5))


# --------------------------------------------------------------- weights, units, warm-up, free bits


def test_units_are_never_mixed():
    y = source(20)
    torch.manual_seed(3)
    nats = lvppl.RateDistortion(weight=2.0).report(channel_model, channel_guide, y)
    torch.manual_seed(3)
    bits = lvppl.RateDistortion(weight=2.0, distortion="bits").report(
        channel_model, channel_guide, y
    )
    assert float(bits.loss) == float(nats.loss)  # nats: both terms share one unit
    assert float(bits.rate_in_unit) == pytest.approx(float(nats.rate) / math.log(2))
    assert float(bits.measured_distortion) == pytest.approx(float(nats.distortion) / math.log(2))
    with pytest.raises(lvppl.ProgramError, match="beside a rate in bits"):
        lvppl.RateDistortion(distortion="bits", unit="nats")


def test_the_warm_up_starts_at_no_rate_at_all():
    y = source(20)
    warm_up = LinearSchedule(0.0, 1.0, num_steps=10)
    objective = lvppl.RateDistortion(rate_weight=warm_up)
    assert objective.schedules() == (warm_up,)
    for step, beta in ((0, 0.0), (5, 0.5), (10, 1.0), (99, 1.0)):
        warm_up.advance_to(step)
        report = objective.report(channel_model, channel_guide, y)
        expected = beta * float(report.rate) + float(report.distortion)
        assert float(report.loss) == pytest.approx(expected)
        assert float(report.elbo) == pytest.approx(-float(report.rate) - float(report.distortion))


def test_cycles_ramp_and_hold():
    cycle = CyclicSchedule(0.2, 1.0, period=10, ramp=0.5)
    assert [round(cycle.at(s), 10) for s in (0, 1, 4, 5, 9, 10)] == [0.2, 0.36, 0.84, 1, 1, 0.2]


def test_free_nats_hold_the_rate_of_a_site_from_below():
    y = source(200)
    pyro.clear_param_store()
    report = lvppl.RateDistortion().report(channel_model, channel_guide, y)
    rate = report.rate.per_datum.mean().item()
    for free in (0.5 * rate, 2.0 * rate):
        torch.manual_seed(0)
        objective = lvppl.RateDistortion(free_nats=free)
        report = objective.report(channel_model, channel_guide, y)
        expected = max(free, rate) * len(y) + float(report.distortion)
        assert float(report.loss) == pytest.approx(expected)
    # below its free nats a rate gives no gradient
    objective = lvppl.RateDistortion(free_nats=2.0 * rate, weight=0.0)
    objective.loss_and_grads(channel_model, channel_guide, y)
    assert pyro.get_param_store()._params["s"].grad.abs().item() == 0.0


def test_hamming_is_the_probability_of_a_wrong_symbol():
    y = torch.tensor([0.0, 1.0, 1.0])

    def model(y):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("y", dist.Bernoulli(torch.tensor([0.2, 0.7, 0.9]) + 0 * z), obs=y)

    def guide(y):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))

    report = lvppl.RateDistortion(distortion="hamming").report(model, guide, y)
    assert torch.allclose(report.measured_distortion.per_datum, torch.tensor([0.2, 0.3, 0.1]))


def test_a_distortion_averages_over_enumerated_sites():
    """Under the exact posterior of the assignment, D is its posterior mean."""
    y = torch.tensor([-0.7, 0.4])
    means = torch.tensor([-1.0, 1.0])

    def model(y):
        with pyro.plate("data", 2):
            k = pyro.sample(
                "k", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"}
            )
            pyro.sample("y", dist.Normal(means[k], 1.0), obs=y)

    log_joint = torch.tensor([0.3, 0.7]).log() + dist.Normal(means, 1.0).log_prob(y[:, None])
    responsibilities = log_joint.softmax(-1)
    expected = (responsibilities * (y[:, None] - means).square()).sum(-1)
    report = lvppl.RateDistortion(distortion="squared").report(model, lambda y: None, y)
    assert torch.allclose(report.measured_distortion.per_datum, expected)


def test_free_nats_are_counted_by_latent_not_by_the_sites_of_an_autoguide():
    """AutoNormal splits ln q(z) from ln p(z); the two are one rate."""
    y = torch.randn(50)

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    guide = pyro.infer.autoguide.AutoNormal(model)
    guide(y)
    for free in (0.1, 5.0):
        torch.manual_seed(0)
        report = lvppl.RateDistortion(free_nats=free).report(model, guide, y)
        rate = report.rate.per_datum.mean().item()
        expected = len(y) * max(free, rate) + float(report.distortion)
        assert float(report.loss) == pytest.approx(expected)


def test_several_latents_of_one_auxiliary_draw_are_one_rate():
    y = torch.tensor(0.7)

    def model(y):
        z = pyro.sample("z", dist.LogNormal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z * w, 1.0), obs=y)

    guide = pyro.infer.autoguide.AutoMultivariateNormal(model)
    guide(y)
    terms = lvppl.trace_terms(model, guide, (y,), num_particles=3)
    assert list(terms.kl_by_latent()) == ["z, w"]
    torch.testing.assert_close(terms.kl_by_latent()["z, w"], terms.kl)

"""A quantised variable is its base rounded; a dithered one is its base blurred; and they agree."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from lvppl.distributions import (
    Dithered,
    Quantized,
    UniformNoise,
    log_bin_mass,
    straight_through_round,
)
from lvppl.errors import ProgramError

BASES = [
    dist.Normal(torch.tensor([0.3, -1.7]).double(), torch.tensor([0.4, 3.0]).double()),
    dist.Laplace(torch.tensor([0.3, -1.7]).double(), torch.tensor([0.4, 3.0]).double()),
    dist.Logistic(torch.tensor([0.3, -1.7]).double(), torch.tensor([0.4, 2.0]).double()),
    dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.2, 0.8]).double()),
        dist.Normal(torch.tensor([-3.0, 2.0]).double(), torch.tensor([0.1, 1.0]).double()),
    ),
]
IDS = ["normal", "laplace", "logistic", "mixture"]


@pytest.mark.parametrize("base", BASES, ids=IDS)
@pytest.mark.parametrize("step", [0.1, 1.0, 4.0])
def test_quantized_sums_to_one(base, step):
    count = math.ceil(120 / step)
    z = step * torch.arange(-count, count + 1, dtype=torch.float64)
    z = z.reshape(-1, *(1,) * len(base.batch_shape))
    total = Quantized(base, step).log_prob(z).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("base", BASES, ids=IDS)
def test_quantized_sample_frequencies(base):
    torch.manual_seed(1)
    n, step = 40_000, 0.5
    d = Quantized(base, step)
    draws = d.sample((n,))
    assert d.support.check(draws).all()
    z = step * torch.arange(-20, 21, dtype=torch.float64).reshape(-1, *(1,) * len(d.batch_shape))
    p = d.log_prob(z).exp()
    frequency = torch.stack([(draws == value).double().mean(0) for value in z])
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


@pytest.mark.parametrize("base", BASES, ids=IDS)
@pytest.mark.parametrize("step", [0.1, 1.0, 4.0])
def test_dithered_integrates_to_one_with_its_moments(base, step):
    z = torch.linspace(-120, 120, 120_001, dtype=torch.float64)
    z = z.reshape(-1, *(1,) * len(base.batch_shape))
    d = Dithered(base, step)
    density = d.log_prob(z).exp()
    dz = 240 / 120_000
    # the kinks of a Laplace base leave an error of order dz² in the trapezoidal rule
    for moment, want in (
        (torch.ones_like(z), torch.ones(())),
        (z, d.mean),
        ((z - d.mean).square(), d.variance),
    ):
        got = (moment * density).sum(0) * dz
        torch.testing.assert_close(got, want.double().expand_as(got), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("base", BASES, ids=IDS)
def test_dithered_is_quantized_on_the_grid(base):
    step = 0.5
    z = step * torch.arange(-4, 5, dtype=torch.float64).reshape(-1, *(1,) * len(base.batch_shape))
    torch.testing.assert_close(
        Dithered(base, step).log_prob(z) + math.log(step), Quantized(base, step).log_prob(z)
    )


def test_dithered_draws():
    """The probability integral transform of the draws is uniform (Kolmogorov-Smirnov)."""
    torch.manual_seed(2)
    d = Dithered(dist.Normal(torch.tensor(0.3).double(), 0.2), 1.0)
    n = 20_000
    assert d.has_rsample
    draws = d.rsample((n,)).sort().values
    grid = torch.linspace(-3, 4, 7001, dtype=torch.float64)
    cdf = d.log_prob(grid).exp().cumsum(0) * 1e-3
    index = torch.searchsorted(grid, draws)
    distance = (cdf[index] - torch.arange(1, n + 1) / n).abs().max()
    assert distance < 2.3 / math.sqrt(n)  # exceeded with probability 5e-5


def test_log_prob_is_differentiable_in_the_value():
    z = torch.tensor([0.3, -2.0], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(Quantized(BASES[0], 0.5, validate_args=False).log_prob, z)
    torch.autograd.gradcheck(Dithered(BASES[2], 0.5).log_prob, z)


@pytest.mark.parametrize("family", [Quantized, Dithered])
def test_refusals(family):
    with pytest.raises(ProgramError, match=r"event shape \(3,\).*to_event"):
        family(dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pytest.raises(ProgramError, match="Poisson is discrete"):
        family(dist.Poisson(torch.tensor(1.0)))
    for step in (0, -1.0, math.inf, math.nan, True, torch.tensor(1.0)):
        with pytest.raises(ProgramError, match="positive finite number"):
            family(dist.Normal(0.0, 1.0), step)


def test_off_lattice_value_is_named():
    d = Quantized(dist.Normal(torch.zeros(3), 1.0), 0.1, validate_args=True)
    d.log_prob(torch.tensor([0.1, 0.3, -0.7]))
    with pytest.raises(ProgramError, match=r"multiples of 0.1 only.*index \(1,\) is 0.25"):
        d.log_prob(torch.tensor([0.1, 0.25, -0.7]))


def test_uniform_noise_is_uniform():
    torch.manual_seed(3)
    loc = torch.tensor([-2.0, 0.7], dtype=torch.float64, requires_grad=True)
    d = UniformNoise(loc, 0.5)
    draws = d.rsample((20_000,))
    torch.testing.assert_close(d.log_prob(draws), torch.full_like(draws, math.log(2.0)))
    assert (d.log_prob(loc + 0.26) == -torch.inf).all()
    assert (draws - loc).abs().max() <= 0.25
    se = (0.25 / 12 / 20_000) ** 0.5
    assert ((draws.mean(0) - d.mean).abs() < 5 * se).all()
    assert ((draws.var(0) / d.variance - 1).abs() < 5 * (0.8 / 20_000) ** 0.5).all()
    (gradient,) = torch.autograd.grad(draws.sum(), loc)
    assert (gradient == 20_000).all()


def test_uniform_noise_survives_float32_rounding():
    """The largest float32 uniform variate: Pyro's Uniform often gives that draw density zero."""
    torch.manual_seed(0)
    loc, largest = torch.randn(1000), 1 - 2**-24
    low, high = loc - 0.5, loc + 0.5
    pyro_log_prob = dist.Uniform(low, high, validate_args=False).log_prob(
        low + largest * (high - low)
    )
    assert (pyro_log_prob == -torch.inf).double().mean() > 0.1
    for where in (loc, 1e6 + loc):
        for u in (0.0, largest):
            d = UniformNoise(where, 1.0, validate_args=True)
            assert (d.log_prob(where + (u - 0.5)) == 0).all()


def test_straight_through_round():
    x = torch.tensor([0.24, -0.76, 1e6 + 0.3], requires_grad=True)
    z = straight_through_round(x, 0.1)
    torch.testing.assert_close(z.detach(), (x.detach() / 0.1).round() * 0.1, rtol=0, atol=0)
    (3 * z).sum().backward()
    assert (x.grad == 3).all()
    with pytest.raises(ProgramError, match="positive finite"):
        straight_through_round(x, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expand_and_dtype(dtype):
    base = dist.Normal(torch.zeros(3, dtype=dtype), 1.0)
    for d in (Quantized(base, 0.5), Dithered(base, 0.5), UniformNoise(base.loc, 0.5)):
        wide = d.expand((2, 3)).to_event(1)
        assert type(wide.base_dist) is type(d)
        draw = wide.sample((4,))
        assert draw.shape == (4, 2, 3) and draw.dtype == dtype
        want = d.log_prob(draw).sum(-1)
        torch.testing.assert_close(wide.log_prob(draw), want)
        assert want.dtype == dtype


def test_noise_and_dither_give_the_code_length():
    """ln q − ln p is −ln of the mass of the bin about z, for each draw; under plain Trace_ELBO."""
    loc = torch.tensor([0.2, -1.3], dtype=torch.float64)

    def model():
        with pyro.plate("data", 2):
            return pyro.sample("z", Dithered(dist.Normal(torch.zeros(2).double(), 2.0), 0.5))

    def guide():
        with pyro.plate("data", 2):
            return pyro.sample("z", UniformNoise(loc, 0.5))

    pyro.set_rng_seed(4)
    loss = pyro.infer.Trace_ELBO().loss(model, guide)
    pyro.set_rng_seed(4)
    z = guide()
    base = dist.Normal(torch.zeros(2).double(), 2.0)
    assert loss == pytest.approx(-log_bin_mass(base, z, 0.5).sum().item(), rel=1e-12)


def test_high_rate_quantiser_is_a_quarter_bit_above_the_rate_distortion_function():
    """½ log2(2πe/12) = 0.2546 bits: the loss of uniform scalar quantisation at high rate."""
    step = 0.01
    d = Quantized(dist.Normal(torch.tensor(0.0).double(), 1.0), step)
    z = step * torch.arange(-1000, 1001, dtype=torch.float64)
    log_p = d.log_prob(z)
    rate = -(log_p.exp() * log_p).sum() / math.log(2)
    distortion = step**2 / 12
    assert rate + 0.5 * math.log2(distortion) == pytest.approx(0.2546, abs=1e-4)

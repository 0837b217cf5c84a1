"""The mass of an interval against arbitrary-precision arithmetic, in both tails."""

import math

import mpmath
import pyro.distributions as dist
import pytest
import torch

from lvppl.distributions import log_bin_mass
from lvppl.distributions.bin_mass import log1mexp
from lvppl.errors import ProgramError

mpmath.mp.dps = 60


def _cdf_normal(z):
    return mpmath.erfc(-z / mpmath.sqrt(2)) / 2


def _cdf_laplace(z):
    return mpmath.exp(z) / 2 if z < 0 else 1 - mpmath.exp(-z) / 2


def _cdf_logistic(z):
    return 1 / (1 + mpmath.exp(-z))


FAMILIES = [
    (dist.Normal, _cdf_normal),
    (dist.Laplace, _cdf_laplace),
    (dist.Logistic, _cdf_logistic),
]
# standardised middles and half-widths on both sides of every switch between formulas
MIDDLES = [0.0, 1e-9, 0.3, 0.7, 0.999, 1.1, 2.5, 9.0, 40.0]
HALVES = [1e-9, 1e-4, 0.0115, 0.0117, 0.19, 0.21, 0.5, 0.9, 1.0, 1.5, 6.0, 30.0]


def _exact(cdf, middle, half):
    middle, half = -abs(mpmath.mpf(middle)), mpmath.mpf(half)  # the left tail: nothing cancels
    return float(mpmath.log(cdf(middle + half) - cdf(middle - half)))


@pytest.mark.parametrize("family, cdf", FAMILIES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_against_arbitrary_precision(family, cdf, dtype, tolerance):
    for half in HALVES:
        for sign in (-1, 1):
            middles = torch.tensor([sign * m for m in MIDDLES], dtype=dtype)
            # scale 1 and width 2h are exact in either dtype, up to the rounding of h itself
            width = 2 * float(torch.tensor(half, dtype=dtype))
            got = log_bin_mass(family(torch.zeros((), dtype=dtype), 1.0), middles, width)
            want = torch.tensor(
                [_exact(cdf, float(m), width / 2) for m in middles], dtype=torch.float64
            )
            assert got.dtype == dtype
            error = (got.double() - want).abs() / want.abs().clamp(min=1.0)
            assert error.max() < tolerance, (half, sign, error)


@pytest.mark.parametrize("family", [dist.Normal, dist.Laplace, dist.Logistic])
@pytest.mark.parametrize("half", [1e-3, 0.011, 0.012, 0.4, 1.2, 5.0])
def test_gradients_against_finite_differences(family, half):
    centre = torch.tensor([-30.0, -3.0, -1.0, -0.2, 0.3, 0.9, 2.0, 30.0], dtype=torch.float64)
    loc, scale = torch.full_like(centre, 0.05), torch.full_like(centre, 1.1)
    inputs = [t.clone().requires_grad_() for t in (loc, scale, centre)]
    torch.autograd.gradcheck(
        lambda loc, scale, centre: log_bin_mass(family(loc, scale), centre, 2 * half),
        inputs,
        eps=1e-7,
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("family", [dist.Normal, dist.Laplace, dist.Logistic])
def test_extremes_in_float32(family):
    """Far tails, sharp and flat bases: values are numbers and gradients point to the data."""
    for value in (-1e12, -1e4, -90.0, 0.0, 1e-20, 90.0, 1e4, 1e12):
        for scale in (1e-4, 1.0, 1e4, 1e8):
            loc = torch.tensor(0.0, requires_grad=True)
            log_scale = torch.tensor(scale).log().requires_grad_()
            mass = log_bin_mass(family(loc, log_scale.exp()), torch.tensor(value), 1.0)
            gradients = torch.autograd.grad(mass, [loc, log_scale])
            assert not mass.isnan() and mass <= 0
            assert all(g.isfinite() for g in gradients), (value, scale, gradients)
            # moving towards the value cannot lower its mass (but for rounding)
            assert gradients[0] * math.copysign(1, value) > -1e-6 / scale


@pytest.mark.parametrize("standardised", [-1e3, -1e6, 1e6])
def test_normal_far_tail_in_float32(standardised):
    """Gradients stay right to float32 rounding: the log-density's own, z - half at distance z."""
    loc = torch.tensor(0.0, requires_grad=True)
    mass = log_bin_mass(dist.Normal(loc, 1.0), torch.tensor(standardised), 1.0)
    (gradient,) = torch.autograd.grad(mass, loc)
    edge = abs(standardised) - 0.5
    expected = edge if standardised > 0 else -edge
    assert abs(gradient / expected - 1) < 2e-6


def test_mixture_is_the_sum_of_its_components():
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64)
    loc, scale = torch.tensor([-40.0, 35.0]).double(), torch.tensor([0.5, 2.0]).double()
    mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(loc, scale))
    centre = torch.linspace(-80, 80, 33, dtype=torch.float64)
    want = torch.logsumexp(
        torch.stack(
            [
                w.log() + log_bin_mass(dist.Normal(m, s), centre, 1.0)
                for w, m, s in zip(weights, loc, scale, strict=True)
            ]
        ),
        0,
    )
    torch.testing.assert_close(log_bin_mass(mixture, centre, 1.0), want, rtol=1e-14, atol=0)


def test_generic_base_by_its_cdf():
    base = dist.Gumbel(torch.tensor(0.2, dtype=torch.float64), 1.5)
    centre = torch.tensor([-1.0, 0.0, 4.0], dtype=torch.float64)
    want = (base.cdf(centre + 0.5) - base.cdf(centre - 0.5)).log()
    torch.testing.assert_close(log_bin_mass(base, centre, 1.0), want)


def test_unresolved_generic_mass_is_zero_without_nan_gradient():
    loc = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    mass = log_bin_mass(dist.Cauchy(loc, 1e-30), torch.tensor(1e6, dtype=torch.float64), 1e-9)
    mass.backward()
    assert mass == -torch.inf and loc.grad == 0


def test_base_without_cdf_is_refused():
    with pytest.raises(ProgramError, match=r"StudentT.*cdf"):
        log_bin_mass(dist.StudentT(3.0), torch.tensor(0.0), 1.0)


def test_log1mexp():
    x = [1e-300, 1e-12, 0.3, 0.69, 0.70, 3.0, 40.0, 100.0]
    want = torch.tensor(
        [float(mpmath.log(-mpmath.expm1(-mpmath.mpf(v)))) for v in x], dtype=torch.float64
    )
    got = log1mexp(torch.tensor(x, dtype=torch.float64))
    torch.testing.assert_close(got, want, rtol=1e-14, atol=0)

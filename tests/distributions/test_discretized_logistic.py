"""The discretised logistic is a distribution on its grid, and its moments and draws follow it."""

import pyro
import pyro.distributions as pyro_dist
import pytest
import torch

from lvppl.distributions import DiscretizedLogistic
from lvppl.errors import ProgramError

GRIDS = [(0.0, 1.0, 256), (0.0, 16.0, 17), (-1.0, 1.0, 2)]


def _cases(low, high, dtype=torch.float64):
    width = high - low
    loc = low + width * torch.tensor([-3.0, 0.0, 0.31, 0.5, 1.0, 40.0], dtype=dtype)
    scale = width * torch.tensor([1e-4, 1e-2, 0.2, 5.0], dtype=dtype)
    return loc[:, None], scale


@pytest.mark.parametrize("low, high, num_levels", GRIDS)
def test_sums_to_one(low, high, num_levels):
    d = DiscretizedLogistic(*_cases(low, high), low=low, high=high, num_levels=num_levels)
    levels = d.enumerate_support()
    assert levels.shape == (num_levels, 6, 4)
    total = d.log_prob(levels).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-12)


@pytest.mark.parametrize("low, high, num_levels", GRIDS)
def test_equals_difference_of_sigmoids(low, high, num_levels):
    """The definition, where it does not cancel."""
    loc, scale = torch.tensor(0.4).double() * (high - low) + low, torch.tensor(0.3).double()
    d = DiscretizedLogistic(loc, scale, low=low, high=high, num_levels=num_levels)
    levels = torch.linspace(low, high, num_levels, dtype=torch.float64)
    edges = torch.cat(
        [torch.tensor([-torch.inf]), (levels[1:] + levels[:-1]) / 2, torch.tensor([torch.inf])]
    )
    want = torch.sigmoid((edges - loc) / scale).diff()
    torch.testing.assert_close(d.log_prob(levels).exp(), want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("low, high, num_levels", GRIDS)
def test_moments(low, high, num_levels):
    d = DiscretizedLogistic(*_cases(low, high), low=low, high=high, num_levels=num_levels)
    levels = d.enumerate_support()
    p = d.log_prob(levels).exp()
    mean = (p * levels).sum(0)
    torch.testing.assert_close(d.mean, mean, rtol=1e-11, atol=1e-11)
    variance = (p * (levels - mean).square()).sum(0)
    torch.testing.assert_close(d.variance, variance, rtol=1e-9, atol=1e-9)


def test_sample_frequencies():
    torch.manual_seed(0)
    d = DiscretizedLogistic(
        torch.tensor([-2.0, 5.3, 15.0]).double(),
        torch.tensor([3.0, 1.0, 0.2]).double(),
        low=0,
        high=16,
        num_levels=17,
    )
    n = 40_000
    draws = d.sample((n,))
    p = d.log_prob(d.enumerate_support()).exp()
    frequency = torch.stack([(draws == level).double().mean(0) for level in range(17)])
    # 51 cells at five standard errors (and one count, for cells that expect less than one draw)
    bound = 5 * (p * (1 - p) / n).sqrt() + 1 / n
    assert ((frequency - p).abs() < bound).all()


def test_gradients():
    loc = torch.tensor([0.2, 0.5, 0.9, -1.0, 2.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.3, 0.01, 0.1, 0.05, 0.02], dtype=torch.float64, requires_grad=True)
    value = torch.tensor([0.0, 0.5, 1.0, 0.25, 0.75], dtype=torch.float64)
    torch.autograd.gradcheck(
        lambda m, s: DiscretizedLogistic(m, s, num_levels=5).log_prob(value), (loc, scale)
    )


def test_extremes_in_float32():
    for value in (0.0, 0.5, 1.0):
        for m in (-1e6, -1.0, 0.5, 1.0, 1e6):
            for s in (1e-6, 1e-3, 1.0, 1e6):
                loc = torch.tensor(m, requires_grad=True)
                log_scale = torch.tensor(s).log().requires_grad_()
                d = DiscretizedLogistic(loc, log_scale.exp(), num_levels=5)
                log_prob = d.log_prob(torch.tensor(value))
                gradients = torch.autograd.grad(log_prob, [loc, log_scale])
                assert log_prob.isfinite() and log_prob <= 0
                assert all(g.isfinite() for g in gradients)


def test_edge_levels_take_their_tails():
    """However far beyond the edge the location lies, the edge level has all the mass."""
    for m, edge in ((-1e3, 0.0), (1e3, 1.0)):
        d = DiscretizedLogistic(torch.tensor(m), torch.tensor(0.1))
        assert d.log_prob(torch.tensor(edge)) == 0
        assert d.mean == edge


def test_off_grid_data_is_named():
    d = DiscretizedLogistic(torch.zeros(2, 3), torch.ones(2, 3), validate_args=True)
    x = torch.tensor([[0.0, 1.0, 128 / 255], [0.2, 0.3, 1.0]])
    with pytest.raises(ProgramError, match=r"256 levels from 0 to 1.*index \(1, 1\) is 0.3"):
        d.log_prob(x)
    with pytest.raises(ProgramError, match=r"index \(0, 0\) is 255"):
        d.log_prob(255 * torch.ones(2, 3))
    with pytest.raises(ProgramError, match="nan: fill or mask"):
        d.log_prob(torch.full((2, 3), torch.nan))
    d.log_prob((torch.arange(6).reshape(2, 3) / 255).float())  # float32 levels are on the grid


@pytest.mark.parametrize(
    "options", [{"num_levels": 1}, {"low": 1.0, "high": 1.0}, {"low": 1.0, "high": 0.0}]
)
def test_bad_grid_is_refused(options):
    with pytest.raises(ProgramError, match="at least two levels"):
        DiscretizedLogistic(torch.tensor(0.0), torch.tensor(1.0), **options)


def test_in_a_program():
    """Expanded by plates, masked, and enumerated out as a latent."""

    def model(y):
        with pyro.plate("data", len(y)):
            d = DiscretizedLogistic(torch.tensor(0.5), torch.tensor(0.2), num_levels=3)
            z = pyro.sample("z", d, infer={"enumerate": "parallel"})
            pyro.sample("y", pyro_dist.Normal(z, 1.0), obs=y)

    y = torch.tensor([0.1, 2.0])
    loss = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda y: None, y)
    d = DiscretizedLogistic(torch.tensor(0.5), torch.tensor(0.2), num_levels=3)
    levels = d.enumerate_support()
    joint = d.log_prob(levels) + pyro_dist.Normal(levels, 1.0).log_prob(y[:, None])
    assert loss == pytest.approx(-joint.logsumexp(-1).sum().item(), rel=1e-6)

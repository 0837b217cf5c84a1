"""Bias, bootstrap, trajectories and differences of estimates, against many repetitions."""

import math
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.axes import Axes

from lvppl.errors import ProgramError
from lvppl.inference.likelihood import log_likelihood
from lvppl.inference.likelihood.resampling import (
    Resamples,
    bootstrap_std_error,
    poisson_counts,
)

pytestmark = pytest.mark.filterwarnings("error")

SIGMA = 0.6  # of ln w
CPU = torch.device("cpu")


def lognormal(sigma=SIGMA, level=0.0):
    """ln w = level + sigma z - sigma^2 / 2 with z from the prior: p(y) = exp(level), any moment."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).to(y), 1.0))
            pyro.sample("y", Weighted(sigma * z - sigma**2 / 2 + level), obs=y)

    return model


class Weighted(dist.TorchDistribution):
    """An observation whose log-density is a given tensor."""

    support = torch.distributions.constraints.real
    arg_constraints = {}  # noqa: RUF012

    def __init__(self, log_weight):
        self.log_weight = log_weight
        super().__init__(log_weight.shape)

    def expand(self, shape, _instance=None):
        return Weighted(self.log_weight.expand(shape))

    def sample(self, shape=()):
        return torch.zeros(torch.Size(shape) + self.log_weight.shape).to(self.log_weight)

    def log_prob(self, value):
        return self.log_weight + 0.0 * value


def data(number):
    return torch.zeros(number, dtype=torch.float64)


def prior(program, y, **options):
    return log_likelihood(program, y, estimator="prior", **options)


# -------------------------------------------------------------------------------------------- bias


@pytest.mark.parametrize("number", [8, 16, 32])
def test_the_correction_removes_the_bias_of_first_order(number):
    """What is left is (3/4 c2^2 - 2/3 c3) / S^2 + O(S^-3), c2 and c3 of a log-normal weight."""
    repeats = 40_000
    found = prior(lognormal(), data(repeats), num_samples=number, seed=number)
    growth = math.exp(SIGMA**2)
    second, third = growth - 1, (growth - 1) ** 2 * (growth + 2)
    raw, corrected = found.log_prob, found.bias_corrected
    noise = corrected.std() / math.sqrt(repeats)
    assert raw.mean() == pytest.approx(-second / (2 * number), rel=0.15)
    left = (0.75 * second**2 - third * 2 / 3) / number**2
    assert abs(corrected.mean() - left) < 4.5 * noise + 6 * second**3 / number**3
    assert abs(corrected.mean()) < 0.25 * abs(raw.mean())
    torch.testing.assert_close(corrected, raw - found.bias, rtol=0, atol=0)


def test_the_correction_is_the_jackknife_to_first_order():
    number = 200
    generator = torch.Generator().manual_seed(0)
    w = (SIGMA * torch.randn(number, generator=generator, dtype=torch.float64)).exp()
    leave_one_out = ((w.sum() - w) / (number - 1)).log()
    jackknife = number * w.mean().log() - (number - 1) * leave_one_out.mean()
    error = w.std() / math.sqrt(number) / w.mean()
    assert (w.mean().log() + 0.5 * error**2).item() == pytest.approx(jackknife.item(), abs=1e-5)


def test_one_draw_has_no_correction():
    found = prior(lognormal(), data(2), num_samples=1)
    assert found.bias_corrected.isnan().all()
    assert "corrected" not in found.summary()
    assert "corrected for it" in prior(lognormal(), data(2), num_samples=50).summary()


# --------------------------------------------------------------------------------------- bootstrap


def test_counts_are_poisson_and_addressed():
    counts = poisson_counts(3, 0, 0, 4000, 50, CPU)
    number = counts.numel()
    for k in range(6):
        mass = math.exp(-1) / math.factorial(k)
        share = (counts == k).double().mean().item()
        assert abs(share - mass) < 4.5 * math.sqrt(mass / number)
    assert abs(counts.mean() - 1) < 4.5 / math.sqrt(number)
    pieces = [poisson_counts(3, 0, first, 1000, 50, CPU) for first in range(0, 4000, 1000)]
    assert torch.equal(torch.cat(pieces), counts)
    for other in (poisson_counts(3, 1, 0, 4000, 50, CPU), poisson_counts(4, 0, 0, 4000, 50, CPU)):
        both = torch.stack([counts.flatten(), other.flatten()])
        assert abs(torch.corrcoef(both)[0, 1]) < 4.5 / math.sqrt(number)


def test_running_sums_equal_the_definition():
    generator = torch.Generator().manual_seed(1)
    log_weight = 50 * torch.randn(300, 4, generator=generator, dtype=torch.float64) - 400
    sums = Resamples(30, 5)
    for block in log_weight.split(37):
        sums.add(block)
    counts = poisson_counts(5, 0, 0, 300, 30, CPU)
    terms = counts.log()[:, :, None] + log_weight[:, None]
    expected = terms.logsumexp(0) - counts.sum(0).log()[:, None]
    torch.testing.assert_close(sums.log_prob(), expected, rtol=0, atol=1e-9)


def test_bootstrap_and_delta_errors_agree_with_the_spread_of_repetitions():
    repeats, number = 400, 500
    found = prior(lognormal(), data(repeats), num_samples=number, seed=2, bootstrap=200)
    truth = found.log_prob.std()
    assert truth == pytest.approx(math.sqrt((math.exp(SIGMA**2) - 1) / number), rel=0.15)
    for error in (found.std_error, found.bootstrap_std_error):
        assert error.square().mean().sqrt() == pytest.approx(truth.item(), rel=0.15)
    assert found.replicates.shape == (200, repeats)
    assert "bootstrap of 200" in found.summary()


def test_bootstrap_of_zero_weights():
    replicates = torch.tensor([[0.0, -math.inf, 1.0], [1.0, -math.inf, -math.inf]])
    error = bootstrap_std_error(replicates)
    assert error[0] == pytest.approx(math.sqrt(0.5))
    assert error[1].isnan() and error[2] == math.inf
    assert prior(lognormal(), data(2), num_samples=5).bootstrap_std_error is None


@pytest.mark.parametrize("chunks", [(1, None), (3, 7), (5, 64)])
def test_chunks_change_nothing(chunks):
    options = {"num_samples": 100, "seed": 4, "bootstrap": 20, "trajectory": True}
    first = prior(lognormal(), data(7), **options)
    batch_size, sample_chunk = chunks
    other = prior(lognormal(), data(7), batch_size=batch_size, sample_chunk=sample_chunk, **options)
    torch.testing.assert_close(other.replicates, first.replicates, rtol=1e-10, atol=1e-10)
    for one, two in zip(other.trajectory, first.trajectory, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


# -------------------------------------------------------------------------------------- trajectory


def test_a_prefix_is_the_estimate_from_as_many_draws():
    found = prior(lognormal(), data(6), num_samples=100, seed=3, trajectory=True)
    path = found.trajectory
    assert path.num_samples.tolist() == [2, 4, 8, 16, 32, 64, 100]
    for i, number in enumerate(path.num_samples.tolist()):
        alone = prior(lognormal(), data(6), num_samples=number, seed=3)
        torch.testing.assert_close(path.log_prob[i], alone.log_prob, rtol=0, atol=1e-12)
        torch.testing.assert_close(path.std_error[i], alone.std_error, rtol=0, atol=1e-12)
        torch.testing.assert_close(path.khat[i], alone.khat, rtol=0, atol=1e-10)
    plain = prior(lognormal(), data(6), num_samples=100, seed=3)
    torch.testing.assert_close(plain.log_prob, found.log_prob, rtol=0, atol=1e-12)
    assert plain.trajectory is None


def test_plot():
    found = prior(lognormal(), data(6), num_samples=100, seed=3, trajectory=True)
    ax = found.plot(exact=0.0, other=found)
    assert isinstance(ax, Axes)
    names = [text.get_text().split("  ")[0] for text in ax.texts]
    assert names == ["exact", "prior", "other"]
    with pytest.raises(ProgramError, match="trajectory=True"):
        prior(lognormal(), data(6), num_samples=100).plot()


# --------------------------------------------------------------------------------------- compare


def test_independent_estimates_have_the_error_of_their_repetitions():
    y = data(4000)
    first = prior(lognormal(), y, num_samples=100, seed=1)
    second = prior(lognormal(level=0.3), y, num_samples=50, seed=2)
    found = first.compare(second)
    error = found.std_error.square().mean().sqrt().item()
    assert found.difference.std() == pytest.approx(error, rel=0.1)
    assert found.total == pytest.approx(first.total - second.total)
    assert abs(found.total + 0.3 * 4000 - found.bias.sum()) < 5 * found.total_std_error
    assert found.total_std_error == pytest.approx(error * math.sqrt(4000))
    assert found.data_std_error == pytest.approx(found.difference.std().item() * math.sqrt(4000))
    assert "independent" in found.summary() and "nats" in found.summary()
    back = second.compare(first)
    torch.testing.assert_close(back.difference, -found.difference)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_same_draws_are_paired_where_replicates_are_kept(sign):
    """ln w = sigma z against sign * sigma z: errors that go together, or against each other."""
    y, repeats = data(1000), 1000
    options = {"num_samples": 300, "seed": 7}
    kept = [prior(lognormal(s), y, bootstrap=200, **options) for s in (SIGMA, sign * SIGMA * 0.9)]
    found = kept[0].compare(kept[1])
    spread = found.difference.std().item()
    assert found.std_error.square().mean().sqrt() == pytest.approx(spread, rel=0.15)
    assert "pairs" in found.summary()
    bound = prior(lognormal(SIGMA), y, **options).compare(kept[1])
    assert (bound.std_error.square().mean().sqrt() > 0.97 * spread).item()
    torch.testing.assert_close(bound.std_error, kept[0].std_error + kept[1].std_error)
    assert "upper bound" in bound.summary()
    independent = torch.hypot(kept[0].std_error, kept[1].std_error).square().mean().sqrt()
    assert (spread < 0.3 * independent) if sign > 0 else (spread > 1.2 * independent)
    assert repeats == found.num_data


def test_against_exact_and_against_other_data():
    def coin(y):
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.3).to(y)))
            pyro.sample("y", dist.Normal(c, 1.0), obs=y)

    y = torch.linspace(-1, 1, 5, dtype=torch.float64)
    sampled = prior(coin, y, num_samples=500, seed=0)
    exact = log_likelihood(coin, y, estimator="exact", seed=0)
    found = sampled.compare(exact)
    torch.testing.assert_close(found.std_error, sampled.std_error)
    assert (found.difference / found.std_error).abs().max() < 4.5
    with pytest.raises(ProgramError, match="one has 5 data and the other 4"):
        sampled.compare(prior(coin, y[:4], num_samples=500))
    one = prior(coin, y[:1], num_samples=500, seed=1).compare(
        prior(coin, y[:1], num_samples=500, seed=2)
    )
    assert math.isnan(one.data_std_error) and "choice of the data" not in one.summary()


# ------------------------------------------------------------------------------------------- k-hat


@pytest.mark.skipif(int(arviz.__version__.split(".")[0]) >= 1, reason="has another tail size")
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_khat_is_that_of_arviz_on_the_same_log_weights(sign):
    """ArviZ 0.2x takes log weights, not their negatives: the wrong sign is far off."""
    seen = []

    def spying(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).to(y), 1.0))
            seen.append(sign * z.abs() ** 1.5)
            pyro.sample("y", Weighted(seen[-1]), obs=y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = prior(spying, data(9), num_samples=1500, sample_chunk=1500, seed=0)
    log_weight = seen[-1].numpy()
    right, wrong = (
        torch.as_tensor(np.asarray(arviz.psislw(s * log_weight.T.copy())[1])) for s in (1, -1)
    )
    torch.testing.assert_close(found.khat, right, rtol=0, atol=1e-6)
    assert (found.khat - wrong).abs().min() > 0.1


# ----------------------------------------------------------------------- warnings short of a flag


def test_rough_data_are_those_whose_variance_is_in_doubt():
    """Weights u^-k have the Pareto shape k, and a variance for k < 1/2 alone."""

    def pareto(y):
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Uniform(torch.zeros(()).to(y), 1.0))
            pyro.sample("y", Weighted(-y * u.log()), obs=0 * y)

    y = torch.tensor([0.1, 0.6, 1.5], dtype=torch.float64)
    found = prior(pareto, y, num_samples=20_000, seed=1)
    assert found.rough.tolist() == [1] and found.flagged.tolist() == [2]
    assert "for 1 more: large weights that were not drawn" in found.summary()
    assert prior(pareto, y[:1], num_samples=20_000, seed=1).rough.numel() == 0

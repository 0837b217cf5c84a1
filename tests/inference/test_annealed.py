"""Annealed importance sampling against closed forms, exact sums and quadrature.

Data are repeated, and chains of each repeat are independent, so that a mean over repeats has a
known standard error. A bound of 4.5 of them fails falsely once in 150,000 for one number; there are
about a hundred such numbers here, all seeded.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

import lvppl
from lvppl.errors import ProgramError
from lvppl.inference.likelihood import log_likelihood
from lvppl.inference.likelihood.annealed import Annealing, bidirectional
from lvppl.inference.likelihood.annealed.moves import Steps, gibbs, hmc
from lvppl.inference.likelihood.annealed.noise import Noise
from lvppl.inference.likelihood.annealed.path import Path
from lvppl.inference.likelihood.annealed.pilot import tuned

pytestmark = pytest.mark.filterwarnings("error")

F64 = torch.float64
ONE = torch.ones((), dtype=F64)
W = torch.tensor([[1.0, -0.4], [0.3, 0.8], [-0.6, 0.5]], dtype=F64)
SHORT = Annealing(num_steps=6, num_leapfrog=4, pilot_chains=8)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(torch.float32)


def numbers(*values):
    return torch.tensor(values, dtype=F64)


def ratios(model, y, exact, *, repeats=400, annealing=SHORT, seed=0, **options):
    """p-hat / p of independent repeats of each datum, (repeats, data)."""
    estimate = log_likelihood(
        model,
        y.repeat(repeats, *(1,) * (y.dim() - 1)),
        estimator="ais",
        num_samples=4,
        annealing=annealing,
        seed=seed,
        **options,
    )
    assert estimate.estimator == "ais"
    return (estimate.log_prob.reshape(repeats, len(y)) - exact).exp()


def assert_unbiased(ratio):
    """The mean of p-hat / p is one, within 4.5 standard errors that are small."""
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert (error < 0.1).all()
    assert ((ratio.mean(0) - 1) / error).abs().max() < 4.5


def quadrature(log_joint, low, high, number=20001):
    """ln of the integral of exp(log_joint) by the trapezoidal rule, for each datum."""
    z = torch.linspace(low, high, number)
    values = log_joint(z).logsumexp(-1)
    return values + math.log((high - low) / (number - 1))


# ------------------------------------------------------------------------------------ the programs


def factor_analysis(y, noise=0.7):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ W.T, noise).to_event(1), obs=y)


def exact_factor_analysis(y, noise=0.7):
    cov = W @ W.T + noise**2 * torch.eye(3)
    return dist.MultivariateNormal(torch.zeros(3), cov).log_prob(y)


def off_guide(y, noise=0.7):
    """Away from the posterior and too narrow for importance sampling."""
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(0.3 * y[:, :2] + 0.3, 0.5).to_event(1))


Y = torch.tensor([[0.5, -0.2, 0.1], [2.0, 1.5, -1.0], [-1.0, 0.3, 1.2]], dtype=F64)
MEANS, WEIGHTS = numbers(-2.0, 0.5, 3.0), numbers(0.2, 0.5, 0.3)


def mixture(y):
    with pyro.plate("data", len(y)):
        c = pyro.sample("c", dist.Categorical(WEIGHTS))
        pyro.sample("y", dist.Normal(MEANS[c], 0.8), obs=y)


def mixed(y, mark=None):
    """A mixture with a latent of its own beneath: discrete and continuous moves."""
    with pyro.plate("data", len(y)):
        c = pyro.sample("c", dist.OneHotCategorical(WEIGHTS), infer={"enumerate": mark})
        z = pyro.sample("z", dist.Normal((c * MEANS).sum(-1), 0.6))
        pyro.sample("y", dist.Normal(z, 0.4), obs=y)


def exact_mixture(y, scale):
    parts = dist.Normal(MEANS, scale).log_prob(y[:, None]) + WEIGHTS.log()
    return parts.logsumexp(-1)


BITS = 8
SLOPE = torch.linspace(-2.5, 2.5, BITS * 5, dtype=F64).reshape(BITS, 5).sin() * 2


def sigmoid_belief(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(torch.full((BITS,), 0.4)).to_event(1))
        pyro.sample("y", dist.Bernoulli(logits=z @ SLOPE - 0.5).to_event(1), obs=y)


def gamma_program(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(z.sqrt(), 0.3), obs=y)


def beta_program(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Beta(2.0, 3.0))
        pyro.sample("y", dist.Binomial(20, z), obs=y)


def simplex_program(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Dirichlet(numbers(1.0, 2.0, 3.0)))
        pyro.sample("y", dist.Multinomial(6, z), obs=y)


def dependent_support(y):
    with pyro.plate("data", len(y)):
        top = pyro.sample("top", dist.Gamma(3.0, 1.0))
        z = pyro.sample("z", dist.Uniform(0.0, top))
        pyro.sample("y", dist.Normal(z, 0.3), obs=y)


def angle_program(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.VonMises(3.0, 0.7))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def sequence(y):
    """Continuous latents along an inner plate, binary ones along another: bits by element."""
    with pyro.plate("data", len(y), dim=-2), pyro.plate("inner", 3, dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(z + 2 * b, 0.5), obs=y)


# ----------------------------------------------------------------------------- unbiased estimates


def test_unbiased_for_linear_gaussian_models():
    assert_unbiased(ratios(factor_analysis, Y, exact_factor_analysis(Y)))


def test_unbiased_from_a_guide_that_importance_sampling_would_not_bear():
    exact = exact_factor_analysis(Y)
    assert_unbiased(ratios(factor_analysis, Y, exact, guide=off_guide, repeats=800))


def test_unbiased_for_a_mixture_by_gibbs_steps():
    y = numbers(-2.5, 0.0, 1.8)
    assert_unbiased(ratios(mixture, y, exact_mixture(y, 0.8)))


def test_unbiased_for_a_sigmoid_belief_net():
    y = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=F64)
    exact = log_likelihood(sigmoid_belief, y, estimator="exact").log_prob
    assert_unbiased(ratios(sigmoid_belief, y, exact))


def test_unbiased_for_discrete_and_continuous_latents_together():
    y = numbers(-2.5, 0.0, 1.8)
    assert_unbiased(ratios(mixed, y, exact_mixture(y, math.hypot(0.6, 0.4))))


def test_sites_marked_for_enumeration_are_summed():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 0.6))
            c = pyro.sample("c", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
            pyro.sample("y", dist.Normal(z + MEANS[c], 0.4), obs=y)

    y = numbers(-2.5, 0.0, 1.8)
    assert_unbiased(ratios(model, y, exact_mixture(y, math.hypot(0.6, 0.4))))


def test_a_latent_beneath_a_summed_site():
    y = numbers(-2.5, 0.0, 1.8)
    exact = exact_mixture(y, math.hypot(0.6, 0.4))
    assert_unbiased(ratios(mixed, y, exact, mark="parallel"))


@pytest.mark.parametrize(
    "model, y, exact",
    [
        (
            gamma_program,
            numbers(0.4, 1.5, 2.5),
            lambda y: quadrature(
                lambda z: (
                    dist.Gamma(2.0, 1.0).log_prob(z)
                    + dist.Normal(z.sqrt(), 0.3).log_prob(y[:, None])
                ),
                1e-9,
                40.0,
            ),
        ),
        (
            beta_program,
            numbers(0.0, 7.0, 20.0),
            lambda y: dist.BetaBinomial(2.0, 3.0, 20).log_prob(y),
        ),
        (
            simplex_program,
            torch.tensor([[6.0, 0, 0], [1, 2, 3]]),
            lambda y: dist.DirichletMultinomial(numbers(1.0, 2.0, 3.0), 6).log_prob(y),
        ),
        (
            angle_program,
            numbers(-3.0, 0.5, 2.9),
            lambda y: quadrature(
                lambda z: (
                    dist.VonMises(3.0, 0.7).log_prob(z) + dist.Normal(z, 0.5).log_prob(y[:, None])
                ),
                -math.pi,
                math.pi,
            ),
        ),
    ],
    ids=["gamma", "beta", "simplex", "angle"],
)
def test_unbiased_for_constrained_latents(model, y, exact):
    annealing = Annealing(num_steps=16, num_leapfrog=4, pilot_chains=8)
    assert_unbiased(ratios(model, y, exact(y.double()), annealing=annealing))


def test_unbiased_where_a_support_depends_on_another_latent():
    y = numbers(0.2, 1.5, 4.0)
    # p(z) = E 1[z < top] / top = P(Gamma(2, 1) > z) / 2
    exact = quadrature(
        lambda z: (0.5 * (1 + z) * (-z).exp()).log() + dist.Normal(z, 0.3).log_prob(y[:, None]),
        0.0,
        40.0,
    )
    assert_unbiased(ratios(dependent_support, y, exact))


def test_unbiased_with_inner_plates():
    y = torch.tensor([[0.1, 2.2, -0.5], [1.0, 1.1, 3.0]])
    scale = math.hypot(1.0, 0.5)
    exact = torch.logaddexp(
        dist.Normal(0.0, scale).log_prob(y) + math.log(0.7),
        dist.Normal(2.0, scale).log_prob(y) + math.log(0.3),
    ).sum(-1)
    assert_unbiased(ratios(sequence, y, exact, data_plate="data"))


def test_a_global_latent_makes_the_data_one_datum():
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    y = numbers(1.0, 1.4, 0.6, 0.9)
    cov = 4.0 * torch.ones(4, 4) + 0.25 * torch.eye(4)
    exact = dist.MultivariateNormal(torch.zeros(4), cov).log_prob(y)
    estimate = log_likelihood(model, y, estimator="ais", num_samples=500, annealing=SHORT, seed=4)
    assert abs(float((estimate.log_prob - exact) / estimate.std_error)) < 4.5
    assert float(estimate.std_error) < 0.1


def test_an_autoguide_starts_chains_in_its_own_coordinates():
    y = numbers(0.4, 1.5, 2.5)
    guide = AutoNormal(gamma_program, init_scale=0.5)
    with poutine.block():
        guide(y)
    exact = quadrature(
        lambda z: (
            dist.Gamma(2.0, 1.0).log_prob(z) + dist.Normal(z.sqrt(), 0.3).log_prob(y[:, None])
        ),
        1e-9,
        40.0,
    )
    estimate = log_likelihood(
        gamma_program,
        y,
        guide=guide,
        estimator="ais",
        num_samples=200,
        annealing=Annealing(40),
        seed=0,
    )
    assert ((estimate.log_prob - exact) / estimate.std_error).abs().max() < 4.5
    assert (estimate.std_error < 0.1).all()


def test_masked_latents_keep_their_probabilities():
    """Elements that a mask hides from latent and observed sites alike add nothing to ln p(y)."""
    lengths = torch.tensor([1, 3, 2])

    def model(y):
        with pyro.plate("data", len(y), dim=-2):
            inside = torch.arange(3) < lengths.repeat(len(y) // 3)[:, None]
            with pyro.plate("inner", 3, dim=-1), poutine.mask(mask=inside):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    y = torch.tensor([[0.1, 2.2, -0.5], [1.0, 1.1, 1.0], [0.3, -1.0, 9.0]])
    terms = dist.Normal(0.0, math.hypot(1.0, 0.5)).log_prob(y)
    exact = torch.where(torch.arange(3) < lengths[:, None], terms, 0.0).sum(-1)
    assert_unbiased(ratios(model, y, exact, data_plate="data"))


# ------------------------------------------------------------------------------------------- moves


def path_and_noise(model, *data, seed=3):
    return Path(model, None, data, {}), Noise(seed, 0, 0, torch.device("cpu"))


def test_hmc_leaves_the_posterior_as_it_is():
    """Chains that start from exact draws keep their mean and covariance; fixed, long steps."""
    chains = 4000
    path, noise = path_and_noise(factor_analysis, Y)
    precision = torch.eye(2) + W.T @ W / 0.49
    cov = torch.linalg.inv(precision)
    mean = Y @ W / 0.49 @ cov
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(chains, 3, 2, generator=generator, dtype=F64)
    z = mean + draw @ torch.linalg.cholesky(cov).T
    points = path.at_values({"z": z}, chains)
    steps = Steps(torch.full((3,), 0.7), torch.ones(3, 2), torch.tensor([1, 3, 4]))
    rates = []
    for i in range(10):
        points, accepted = hmc(path, points, ONE, steps, noise, f"{i}")
        rates.append(accepted.mean())
    assert 0.2 < float(torch.stack(rates).mean()) < 0.95  # steps that do refuse
    apart = points.vectors - mean
    assert (apart.mean(0) / (cov.diagonal() / chains).sqrt()).abs().max() < 4.5
    error = (cov.diagonal()[:, None] * cov.diagonal() + cov.square()).sqrt() / math.sqrt(chains)
    found = torch.einsum("cdi,cdj->dij", apart, apart) / chains
    assert ((found - cov) / error).abs().max() < 4.5
    torch.testing.assert_close(path.at(points.vectors, points.digits).log_weight, points.log_weight)


def test_hmc_in_constrained_coordinates_leaves_the_prior_as_it_is():
    chains = 4000
    path, noise = path_and_noise(gamma_program, numbers(1.0, 1.0))
    generator = torch.Generator().manual_seed(1)
    z = -torch.rand(2, chains, 2, generator=generator, dtype=F64).log().sum(0)  # Gamma(2, 1)
    points = path.at_values({"z": z}, chains)
    for i in range(10):
        steps = Steps(torch.full((2,), 0.9), torch.ones(2, 1), torch.tensor([3, 1]))
        points, _ = hmc(path, points, 0 * ONE, steps, noise, f"{i}")
    z = points.vectors.exp()[..., 0]
    assert ((z.mean(0) - 2) / math.sqrt(2 / chains)).abs().max() < 4.5
    assert ((z.square().mean(0) - 6) / math.sqrt(84 / chains)).abs().max() < 4.5


def test_one_gibbs_step_of_one_element_is_an_exact_draw():
    chains, y = 20000, numbers(-2.5, 1.6)
    path, noise = path_and_noise(mixture, y)
    zeros = torch.zeros(chains, 2, 0), torch.zeros(chains, 2, 1, dtype=torch.int64)
    for beta in (0.3 * ONE, ONE):
        drawn = gibbs(path, path.at(*zeros), beta, noise, "test").digits[..., 0]
        log_joint = WEIGHTS.log() + beta * dist.Normal(MEANS, 0.8).log_prob(y[:, None])
        exact = log_joint.softmax(-1)
        found = torch.stack([(drawn == k).double().mean(0) for k in range(3)], -1)
        error = (exact * (1 - exact) / chains).sqrt().clamp(min=1 / chains)
        assert ((found - exact) / error).abs().max() < 4.5


@pytest.mark.parametrize("backwards", [False, True])
def test_scans_leave_the_posterior_of_bits_as_it_is(backwards):
    chains, y = 4000, torch.tensor([[1.0, 0, 1, 1, 0]])
    path, noise = path_and_noise(sigmoid_belief, y)
    digits = torch.arange(2**BITS)[:, None] >> torch.arange(BITS) & 1
    every = path.at(torch.zeros(2**BITS, 1, 0), digits[:, None])
    exact = every.log_prob(ONE)[:, 0].softmax(0)
    torch.testing.assert_close(
        every.log_prob(ONE).logsumexp(0),
        log_likelihood(sigmoid_belief, y, estimator="exact").log_prob,
    )
    generator = torch.Generator().manual_seed(0)
    first = digits[torch.multinomial(exact, chains, True, generator=generator)]
    points = path.at(torch.zeros(chains, 1, 0), first[:, None])
    for i in range(3):
        points = gibbs(path, points, ONE, noise, f"{i}", backwards)
    moments = [
        torch.einsum("s,si,sj->ij", p, bits.double(), bits.double())
        for p, bits in ((torch.full((chains,), 1 / chains), points.digits[:, 0]), (exact, digits))
    ]
    error = (moments[1] * (1 - moments[1]) / chains).sqrt().clamp(min=1 / chains)
    assert ((moments[0] - moments[1]) / error).abs().max() < 4.5  # 36 numbers
    moved = (points.digits[:, 0] != first).double().mean()
    assert moved > 0.05


def test_a_scan_backwards_is_the_reverse_of_a_scan():
    """pi(x) P(x -> x') = pi(x') Q(x' -> x), P a scan and Q one backwards, for all four states."""

    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Bernoulli(0.4))
            b = pyro.sample("b", dist.Bernoulli(0.1 + 0.8 * a))
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    each = 20000
    path, noise = path_and_noise(model, numbers(1.3))
    states = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    first = path.at(torch.zeros(4 * each, 1, 0), states.repeat_interleave(each, 0)[:, None])
    target = first.log_prob(ONE)[::each, 0].softmax(0)
    flows = []
    for backwards in (False, True):
        after = gibbs(path, first, ONE, noise, "test", backwards).digits[:, 0] @ torch.tensor(
            [2, 1]
        )
        share = torch.nn.functional.one_hot(after.reshape(4, each), 4).double().mean(1)
        flows.append((target[:, None] * share, target[:, None].square() * share * (1 - share)))
    error = ((flows[0][1] + flows[1][1].t()) / each).sqrt()
    assert ((flows[0][0] - flows[1][0].t()) / error).abs().max() < 4.5
    assert (flows[0][0] - flows[1][0]).abs().max() > 20 * error.max()  # the order does matter


def test_a_trajectory_that_diverges_is_refused_alone():
    path, noise = path_and_noise(gamma_program, numbers(1.0, 1.0))
    points = path.at_values({"z": torch.ones(50, 2)}, 50)
    steps = Steps(numbers(1e8, 0.1), torch.ones(2, 1), torch.tensor([5, 5]))
    after, accepted = hmc(path, points, ONE, steps, noise, "far")
    assert (accepted[:, 0] == 0).all() and (after.vectors[:, 0] == points.vectors[:, 0]).all()
    assert accepted[:, 1].mean() > 0.9


# -------------------------------------------------------------------------------------- estimates


def test_one_step_is_the_estimate_from_the_prior():
    one = Annealing(num_steps=1)
    options = {"num_samples": 50, "seed": 3}
    annealed = log_likelihood(factor_analysis, Y, estimator="ais", annealing=one, **options)
    plain = log_likelihood(factor_analysis, Y, estimator="prior", **options)
    torch.testing.assert_close(annealed.log_prob, plain.log_prob, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(annealed.std_error, plain.std_error)


def test_far_better_than_the_prior_at_a_peaked_likelihood():
    """250 steps of 16 chains against 100,000 draws: more runs of the program than theirs."""
    y = Y @ W @ torch.linalg.inv(W.T @ W) @ W.T  # where noise so small is likely
    truth = exact_factor_analysis(y, 0.003)
    options = {"seed": 2, "noise": 0.003}
    annealed = log_likelihood(
        factor_analysis, y, estimator="ais", num_samples=16, annealing=Annealing(250), **options
    )
    prior = log_likelihood(factor_analysis, y, estimator="prior", num_samples=100000, **options)
    assert ((annealed.log_prob - truth).abs() < 1.5).all()
    assert (annealed.ess > 2).all() and (prior.ess < 6).all()
    error, naive = ((one.log_prob - truth).square().mean().sqrt() for one in (annealed, prior))
    assert error < 0.5 * naive


def test_more_steps_are_more_exact():
    spread = [
        ratios(
            factor_analysis, Y, exact_factor_analysis(Y), annealing=Annealing(steps), repeats=100
        )
        .log()
        .square()
        .mean()
        for steps in (2, 8, 64)
    ]
    assert spread[0] > 1.5 * spread[1] > 1.5**2 * spread[2]


def test_same_seed_same_numbers_and_other_seed_others():
    options = {"estimator": "ais", "num_samples": 5, "annealing": SHORT}
    one, two, other = (
        log_likelihood(mixed, numbers(0.0, 1.0), seed=seed, **options) for seed in (1, 1, 2)
    )
    assert torch.equal(one.log_prob, two.log_prob)
    assert (one.log_prob != other.log_prob).all()


def test_numbers_do_not_depend_on_chunks():
    y = numbers(-2.5, 0.0, 1.8, 0.7)
    options = {"estimator": "ais", "num_samples": 6, "annealing": SHORT, "seed": 5}
    whole = log_likelihood(mixed, y, **options)
    parts = log_likelihood(mixed, y, batch_size=3, sample_chunk=4, **options)
    torch.testing.assert_close(whole.log_prob, parts.log_prob)
    torch.testing.assert_close(whole.std_error, parts.std_error)


def test_a_prefix_is_the_estimate_from_as_many_chains():
    y, options = numbers(0.3, -1.0), {"estimator": "ais", "annealing": SHORT, "seed": 3}
    for chunk in (None, 5):
        found = log_likelihood(
            mixed, y, num_samples=40, trajectory=True, sample_chunk=chunk, **options
        )
        path = found.trajectory
        assert path.num_samples.tolist() == [2, 4, 8, 16, 32, 40]
        for i, number in enumerate(path.num_samples.tolist()):
            alone = log_likelihood(mixed, y, num_samples=number, **options)
            for name in ("log_prob", "std_error", "khat"):
                torch.testing.assert_close(
                    getattr(path, name)[i], getattr(alone, name), rtol=1e-8, atol=1e-10
                )


def test_generators_and_parameters_stay_as_they_are():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    log_likelihood(mixed, numbers(0.0), estimator="ais", num_samples=2, annealing=SHORT, seed=1)
    bidirectional(mixed, numbers(0.0), num_chains=2, annealing=SHORT, seed=1)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()


def test_the_record_says_how_chains_moved():
    options = {"num_samples": 3, "seed": 1, "annealing": SHORT}
    estimate = lvppl.log_likelihood(factor_analysis, Y, estimator="ais", **options)
    assert "from the prior to the posterior in 6 steps" in estimate.notes[0]
    assert "were accepted on average" in estimate.notes[1]
    assert estimate.num_samples == 3 and estimate.num_continuous == 9
    from_guide = lvppl.log_likelihood(
        factor_analysis, Y, estimator="ais", guide=off_guide, **options
    )
    assert "from the guide" in from_guide.notes[0]


@pytest.mark.parametrize("schedule", ["adaptive", "linear", "sigmoidal"])
def test_schedules_rise_from_zero_to_one(schedule):
    path, noise = path_and_noise(factor_analysis, Y)
    options = Annealing(num_steps=20, num_leapfrog=4, schedule=schedule)
    starts = path.at(torch.randn(16, 3, 2), torch.zeros(16, 3, 0, dtype=torch.int64))
    betas = tuned(path, starts, options, noise).temperatures()
    assert betas.shape == (21, 3) and (betas[0] == 0).all() and (betas[-1] == 1).all()
    assert (betas.diff(dim=0) > 0).all()
    if schedule != "adaptive":
        torch.testing.assert_close(betas, 1 - betas.flip(0))


def test_float32_programs():
    torch.set_default_dtype(torch.float32)
    y = torch.tensor([0.0, 1.8])

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    estimate = log_likelihood(model, y, estimator="ais", num_samples=200, annealing=SHORT, seed=0)
    exact = quadrature(
        lambda z: (
            dist.Gamma(numbers(2.0), 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(y[:, None])
        ),
        1e-9,
        30.0,
    )
    assert estimate.log_prob.dtype == F64
    assert ((estimate.log_prob - exact) / estimate.std_error).abs().max() < 4.5


# ------------------------------------------------------------------------------------ both bounds


@pytest.mark.parametrize(
    "model, template, exact",
    [
        (factor_analysis, torch.zeros(150, 3, dtype=F64), exact_factor_analysis),
        (mixed, torch.zeros(150, dtype=F64), lambda y: exact_mixture(y, math.hypot(0.6, 0.4))),
    ],
)
def test_bounds_bracket_the_truth(model, template, exact):
    annealing = Annealing(num_steps=40, num_leapfrog=4)
    found = bidirectional(model, template, num_chains=4, annealing=annealing, seed=7)
    truth = exact(found.observed["y"])
    for bound, sign in ((found.lower, 1), (found.upper, -1)):
        apart = sign * (truth - bound)
        assert float(apart.mean()) > -4 * float(apart.std()) / math.sqrt(150)
    assert 0 < found.mean_gap[0] < 1
    assert "lower" in found.summary() and "upper" in repr(found.summary())


def test_inverse_weights_are_unbiased_for_one_over_p():
    y, repeats = Y[:1].expand(2000, 3), 2000
    precision = torch.eye(2) + W.T @ W / 0.49
    cov = torch.linalg.inv(precision)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(repeats, 2, generator=generator, dtype=F64)
    draws = {"z": y @ W / 0.49 @ cov + noise @ torch.linalg.cholesky(cov).T}
    found = bidirectional(
        factor_analysis, y, draws=draws, num_chains=1, annealing=Annealing(16), seed=2
    )
    assert_unbiased((exact_factor_analysis(y) - found.upper).exp()[:, None])
    assert found.observed == {}


def test_inverse_weights_are_unbiased_for_bits():
    """Moves back are the reverse of the scans, element by element."""
    y = torch.tensor([[1.0, 0, 1, 1, 0]]).expand(1500, 5)
    path, _ = path_and_noise(sigmoid_belief, y[:1])
    digits = torch.arange(2**BITS)[:, None] >> torch.arange(BITS) & 1
    log_joint = path.at(torch.zeros(2**BITS, 1, 0), digits[:, None]).log_prob(ONE)[:, 0]
    generator = torch.Generator().manual_seed(0)
    z = digits[torch.multinomial(log_joint.softmax(0), 1500, True, generator=generator)].double()
    found = bidirectional(
        sigmoid_belief, y, draws={"z": z}, num_chains=1, annealing=Annealing(6), seed=2
    )
    assert_unbiased((log_joint.logsumexp(0) - found.upper).exp()[:, None])


def test_simulated_data_reach_the_guide():
    found = bidirectional(
        factor_analysis,
        torch.zeros(60, 3, dtype=F64),
        guide=off_guide,
        num_chains=4,
        annealing=Annealing(num_steps=16),
        seed=1,
    )
    apart = exact_factor_analysis(found.observed["y"]) - found.lower
    assert abs(float(apart.mean())) < 0.3


# ------------------------------------------------------------------------------------- refusals


def poisson(y):
    with pyro.plate("data", len(y)):
        n = pyro.sample("n", dist.Poisson(2.0))
        pyro.sample("y", dist.Normal(n, 1.0), obs=y)


def on_a_sphere(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.ProjectedNormal(torch.ones(2)))
        pyro.sample("y", dist.Normal(z[..., 0], 1.0), obs=y)


def scaled(y):
    with pyro.plate("data", len(y)):
        with poutine.scale(scale=0.5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def one_at_a_time(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z.reshape(len(y)), 1.0), obs=y)


def dropping(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        keep = torch.nn.functional.dropout(torch.ones(len(y)), 0.5, training=True)
        pyro.sample("y", dist.Normal(z * keep, 1.0), obs=y)


@pytest.mark.parametrize(
    "model, words",
    [
        (poisson, "'n'.*finite support"),
        (on_a_sphere, "'z'.*biject_to"),
        (scaled, "'z' is scaled"),
        (one_at_a_time, "all chains in one batch"),
    ],
)
def test_programs_that_cannot_be_annealed(model, words):
    with pytest.raises(ProgramError, match=words):
        log_likelihood(
            model, numbers(0.5, 1.0), estimator="ais", num_samples=3, annealing=SHORT, seed=0
        )


def test_randomness_outside_sites_is_refused():
    with pytest.raises(ProgramError, match=r"one batch|another number in each run"):
        log_likelihood(
            dropping, numbers(*range(20)), estimator="ais", num_samples=3, annealing=SHORT, seed=0
        )


def test_a_guide_without_the_latents_is_refused():
    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(ProgramError, match="'z'"):
        log_likelihood(factor_analysis, Y, guide=guide, estimator="ais", annealing=SHORT)


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 0},
        {"num_steps": 2.5},
        {"num_leapfrog": 0},
        {"pilot_chains": 1},
        {"target_acceptance": 1.0},
        {"schedule": "cosine"},
    ],
)
def test_options_out_of_range(options):
    with pytest.raises(ProgramError, match=next(iter(options))):
        Annealing(**options)


def test_annealing_belongs_to_ais():
    with pytest.raises(ProgramError, match="'prior'"):
        log_likelihood(factor_analysis, Y, estimator="prior", annealing=SHORT)
    with pytest.raises(ProgramError, match="bootstrap"):
        log_likelihood(factor_analysis, Y, estimator="ais", bootstrap=20)


def test_bidirectional_refuses_what_it_cannot_simulate():
    def with_factor(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.factor("y", -(z**2))

    def apart(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z @ W.T, 0.7).to_event(1), obs=y + 1)

    with pytest.raises(ProgramError, match=r"pyro\.factor"):
        bidirectional(with_factor, numbers(1.0))
    with pytest.raises(ProgramError, match="observes no argument"):
        bidirectional(apart, Y, guide=off_guide, annealing=SHORT)
    with pytest.raises(ProgramError, match="'z' has no draw"):
        bidirectional(factor_analysis, Y, draws={}, annealing=SHORT)
    with pytest.raises(ProgramError, match="'z' has shape"):
        bidirectional(factor_analysis, Y, draws={"z": torch.zeros(7, 2)}, annealing=SHORT)
    with pytest.raises(ProgramError, match="num_chains"):
        bidirectional(factor_analysis, Y, num_chains=0)


def test_a_weight_that_is_nan_is_named_by_datum():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            loc = torch.where(y > 1, math.nan, z)
            pyro.sample("y", dist.Normal(loc, 1.0, validate_args=False), obs=y)

    with pytest.raises(ProgramError, match=r"NaN for 1 data \(1\)"):
        log_likelihood(model, numbers(0.0, 2.0), estimator="ais", num_samples=2, annealing=SHORT)


def test_a_datum_that_is_impossible_has_probability_zero():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Bernoulli(z * 0.5), obs=y)

    def never(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Uniform(0.0, torch.ones(len(y)), validate_args=False), obs=y)

    some = log_likelihood(
        model, numbers(1.0), estimator="ais", num_samples=4000, annealing=SHORT, seed=0
    )
    assert abs(float(some.log_prob) - math.log(0.25)) < 4.5 * float(some.std_error)
    none = log_likelihood(never, numbers(3.0), estimator="ais", num_samples=3, annealing=SHORT)
    assert float(none.log_prob) == -math.inf


def test_circular_supports_wrap():
    path, _ = path_and_noise(angle_program, numbers(0.0))
    vectors = torch.full((1, 1, 1), 2 * math.pi + 1.0)
    digits = torch.zeros(1, 1, 0, dtype=torch.int64)
    torch.testing.assert_close(
        path.at(vectors, digits).log_weight, path.at(vectors - 2 * math.pi, digits).log_weight
    )

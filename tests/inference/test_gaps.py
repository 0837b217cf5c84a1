"""The gaps of a guide where they are known: linear-Gaussian models, and coins by brute force.

For z ~ N(0, I), y | z ~ N(W z, I) the posterior is N(m, Λ⁻¹). The best diagonal Normal has mean m
and precisions Λ_ii, and loses ½ (Σ ln Λ_ii − ln det Λ). Estimates are compared within five of their
standard errors, and what a search leaves: 0.005 nats.
"""

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure

import lvppl
from lvppl.errors import ProgramError

Y = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-0.7, 0.1]], dtype=torch.float64)
W = torch.tensor([[1.0, 0.9], [0.2, 0.8]], dtype=torch.float64)
PRECISION = torch.eye(2).double() + W.T @ W
APPROXIMATION = 0.5 * float(PRECISION.diagonal().log().sum() - torch.logdet(PRECISION))
LEFT = 5e-3


def model(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ W.T, 1.0).to_event(1), obs=y)


def evidence(y):
    cov = torch.eye(2).double() + W @ W.T
    return dist.MultivariateNormal(torch.zeros(2).double(), cov).log_prob(y)


def posterior(y):
    mean = torch.linalg.solve(PRECISION, (y @ W).T).T
    return dist.MultivariateNormal(mean, precision_matrix=PRECISION)


def perturbed(y):
    """The encoder's diagonal Normal: shifted by a quarter of y, and too wide."""
    return posterior(y).mean + 0.25 * y, 1.6 * PRECISION.diagonal().rsqrt().expand(len(y), 2)


def diagonal(y):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(*perturbed(y)).to_event(1))


def full(y):
    mean, scale = perturbed(y)
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=torch.diag_embed(scale)))


def loss_of_the_encoder(y):
    """KL(q, p(z | y)): all that the perturbed guide loses."""
    mean, scale = perturbed(y)
    q = dist.MultivariateNormal(mean, scale_tril=torch.diag_embed(scale))
    return torch.distributions.kl_divergence(q, posterior(y))


def within(value, error, truth, left=LEFT):
    assert ((value - truth).abs() < 5 * error + left).all(), (value, truth, error)


@pytest.mark.parametrize(("guide", "approximation"), [(diagonal, APPROXIMATION), (full, 0.0)])
def test_known_gaps(guide, approximation):
    found = lvppl.gaps(model, guide, Y, log_prob=evidence(Y), num_particles=16, seed=0)
    assert found.evidence == "given" and torch.equal(found.log_prob, evidence(Y))
    within(found.approximation, found.approximation_std_error, approximation)
    amortization = loss_of_the_encoder(Y) - approximation
    within(found.amortization, found.amortization_std_error, amortization)
    within(found.total, found.total_std_error, loss_of_the_encoder(Y), 0.0)
    torch.testing.assert_close(found.total, found.approximation + found.amortization)
    torch.testing.assert_close(found.amortization, found.elbo_search - found.elbo_encoder)
    assert found.has_ended and "the search has ended" in str(found)
    assert found.history.shape == (600,)
    if guide is diagonal:  # pairs of draws in common: less noise than of two ELBOs apart
        apart = torch.hypot(found.elbo_search_std_error, found.elbo_encoder_std_error)
        assert (found.amortization_std_error < apart).all()
    else:  # every draw of the posterior has the same weight
        assert found.approximation_std_error.max() < 2e-3


def test_a_bound_from_below_by_draws_from_the_best_member():
    found = lvppl.gaps(
        model, diagonal, Y, evidence="importance", num_samples=4000, num_particles=16, seed=1
    )
    within(found.lower, found.lower_std_error, evidence(Y), 0.0)
    assert 0 < found.lower_std_error.max() < 0.05
    within(found.approximation, found.approximation_std_error, APPROXIMATION)
    assert found.upper.isnan().all()
    assert "at least" in str(found) and "at most" not in str(found)
    with pytest.raises(ProgramError, match=r"bounded \(importance\)"):
        _ = found.log_prob


def test_a_bound_from_below_by_annealing():
    annealing = lvppl.Annealing(num_steps=30, num_leapfrog=3)
    found = lvppl.gaps(
        model, diagonal, Y, evidence="ais", annealing=annealing, num_chains=30, seed=1
    )
    assert found.evidence == "ais"
    within(found.lower, found.lower_std_error, evidence(Y), 0.0)


def test_simulated_data_bracket_their_evidence():
    """The bounds on either side of ln p(y) of the data that were simulated, and of the gap."""
    annealing = lvppl.Annealing(num_steps=30, num_leapfrog=3)
    found = lvppl.gaps(
        model, diagonal, torch.zeros(40, 2).double(), simulate=True, evidence="importance",
        annealing=annealing, num_chains=8, num_particles=16, seed=2,
    )  # fmt: skip
    y = found.observed["y"]
    assert y.shape == (40, 2) and found.evidence == "bidirectional"
    spread = (y.T @ y / 40 - torch.eye(2) - W @ W.T).abs()
    assert (spread < 5 * 3 / math.sqrt(40)).all()  # of the model's y, not of zeros
    truth = evidence(y).mean()
    lower, upper = found.mean("lower"), found.mean("upper")
    assert lower[0] < truth + 4 * lower[1] and upper[0] > truth - 4 * upper[1]
    assert abs(upper[0] - lower[0]) < 0.1
    low, high = found.mean("approximation"), found.mean("approximation_upper")
    assert low[0] - 4 * low[1] - LEFT < APPROXIMATION < high[0] + 4 * high[1] + LEFT
    value, error = found.mean("amortization")
    assert abs(value - float(loss_of_the_encoder(y).mean()) + APPROXIMATION) < 5 * error + LEFT
    assert "at most" in str(found)


def test_a_search_that_has_not_ended_says_so():
    far = {"num_steps": 9, "learning_rate": 0.01, "num_particles": 4}
    found = lvppl.gaps(model, diagonal, Y, log_prob=evidence(Y), seed=0, **far)
    assert not found.has_ended
    assert "THE SEARCH HAS NOT ENDED" in str(found) and "num_steps" in str(found)
    value, error = found.mean("remaining")
    assert value > 4 * error > 0
    assert len(found.unsettled) > 0


# ---------------------------------------------------------------------------------- discrete guides

X = torch.tensor([1.9, 0.2, -0.8], dtype=torch.float64)
LOGITS = torch.tensor([0.3, -0.4], dtype=torch.float64)
GAIN = torch.tensor([1.5, 1.2], dtype=torch.float64)


def coins(x):
    """Two coins that explain x together: their posterior is no product."""
    with pyro.plate("data", len(x)):
        a = pyro.sample("a", dist.Bernoulli(logits=LOGITS[0]))
        b = pyro.sample("b", dist.Bernoulli(logits=LOGITS[1]))
        pyro.sample("x", dist.Normal(GAIN[0] * a + GAIN[1] * b, 0.5), obs=x)


def coin_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("a", dist.Bernoulli(logits=0.5 * x))
        pyro.sample("b", dist.Bernoulli(logits=-0.2 * x))


def bits(x):
    """The same model, its coins in one vector."""
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=LOGITS).to_event(1))
        pyro.sample("x", dist.Normal((GAIN * z).sum(-1), 0.5), obs=x)


def bit_guide(x):
    slopes = torch.tensor([0.5, -0.2]).double()
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Bernoulli(logits=slopes * x[:, None]).to_event(1))


def letters(x):
    """The same model, its coins in one Categorical of four states."""
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2))).double()
    prior = dist.Bernoulli(logits=LOGITS).log_prob(states).sum(-1)
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(logits=prior))
        pyro.sample("x", dist.Normal((GAIN * states[k]).sum(-1), 0.5), obs=x)


def letter_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(logits=x[:, None] * torch.arange(4).double() / 3))


def elbo_of(logits):
    """ELBO of a product of coins by the sum over four states; logits (..., data, 2)."""
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2))).double()
    log_q = dist.Bernoulli(logits=logits.unsqueeze(-2)).log_prob(states).sum(-1)
    return (log_q.exp() * (log_joint() - log_q)).sum(-1)


def log_joint():
    states = torch.tensor(list(itertools.product((0.0, 1.0), repeat=2))).double()
    prior = dist.Bernoulli(logits=LOGITS).log_prob(states).sum(-1)
    return prior + dist.Normal((GAIN * states).sum(-1), 0.5).log_prob(X[:, None])


def best_product():
    """The best product of coins by a grid, refined about its best point."""
    centre, width = torch.zeros(3, 2).double(), 12.0
    for _ in range(14):
        steps = torch.linspace(-1, 1, 25).double() * width
        shift = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 1, 2)
        values = elbo_of(centre + shift)
        best = values.argmax(0)
        centre = centre + shift[best, 0]
        width /= 4
    return elbo_of(centre)


@pytest.mark.parametrize(("program", "guide"), [(coins, coin_guide), (bits, bit_guide)])
def test_coins_by_brute_force(program, guide):
    """Summed over in the guide, or by the score function where bits make one vector."""
    found = lvppl.gaps(program, guide, X, num_particles=32, seed=0)
    log_prob = log_joint().logsumexp(-1)
    encoder = elbo_of(torch.stack([0.5 * X, -0.2 * X], -1))
    assert found.evidence == "exact"
    torch.testing.assert_close(found.log_prob, log_prob)
    left = 2e-3 if program is coins else 2e-2  # gradients with noise end near the best
    within(found.approximation, found.approximation_std_error, log_prob - best_product(), left)
    within(found.amortization, found.amortization_std_error, best_product() - encoder, left)
    if program is coins:  # sums, without draws
        assert found.amortization_std_error.max() < 1e-12
        torch.testing.assert_close(found.elbo_encoder, encoder)


def test_a_latent_that_depends_on_a_discrete_one_is_never_searched():
    """Two runs may draw the same value: that the parameters agree there says nothing."""

    def program(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor([0.5])).to_event(1))
            b = pyro.sample("b", dist.Normal(2 * a[..., 0] - 1, 1.0))
            pyro.sample("y", dist.Normal(b, 0.5), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Bernoulli(torch.tensor([0.5])).to_event(1))
            pyro.sample("b", dist.Normal(2 * a[..., 0] - 1, 0.1))

    for seed in range(4):
        with pytest.raises(lvppl.ProgramError, match="'b' differ between two runs"):
            lvppl.gaps(program, guide, torch.tensor([1.0]), num_steps=3, seed=seed)


def test_a_batch_of_multivariate_normals_as_one_event():
    def program(y):
        with pyro.plate("data", len(y)):
            root = torch.eye(2).expand(3, 2, 2)
            law = dist.MultivariateNormal(torch.zeros(3, 2), scale_tril=root)
            z = pyro.sample("z", law.to_event(1))
            pyro.sample("y", dist.Normal(z.sum((-1, -2)), 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            loc = 0.1 * y[:, None, None].expand(len(y), 3, 2)
            root = torch.eye(2).expand(len(y), 3, 2, 2)
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=root).to_event(1))

    found = lvppl.gaps(program, guide, torch.tensor([1.0, -0.5]), num_steps=30, seed=0)
    assert found.evidence == "exact" and (found.amortization > 0).all()


def test_a_categorical_reaches_the_posterior():
    found = lvppl.gaps(letters, letter_guide, X, seed=0)
    q = (X[:, None] * torch.arange(4).double() / 3).log_softmax(-1)
    log_prob = log_joint().logsumexp(-1)
    encoder = (q.exp() * (log_joint() - q)).sum(-1)
    torch.testing.assert_close(found.log_prob, log_prob)
    assert (found.approximation.abs() < 2e-3).all() and (found.approximation > -1e-12).all()
    within(found.amortization, found.amortization_std_error, log_prob - encoder, 2e-3)


def test_amortization_gap_searches_coins_too():
    found = lvppl.amortization_gap(coins, coin_guide, X)
    encoder = elbo_of(torch.stack([0.5 * X, -0.2 * X], -1))
    torch.testing.assert_close(found.elbo_encoder, encoder)
    within(found.gap, found.std_error, best_product() - encoder, 1e-2)


# ----------------------------------------------------------------------------- left alone, refusals


def test_programs_and_generators_are_left_alone_and_the_seed_decides():
    loc = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    options = {"num_steps": 6, "num_repetitions": 3, "evidence": "importance", "num_samples": 50}
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, two, other = (lvppl.gaps(model, guide, Y, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert loc.grad is None and (loc == 0).all()
    assert torch.equal(one.approximation, two.approximation)
    assert torch.equal(one.amortization, two.amortization)
    assert (one.approximation != other.approximation).all()


def test_picture():
    found = lvppl.gaps(
        model, diagonal, torch.zeros(5, 2).double(), simulate=True, num_steps=30, seed=0,
        evidence="ais", num_chains=4, annealing=lvppl.Annealing(num_steps=10, num_leapfrog=2),
    )  # fmt: skip
    axes = found.plot()
    assert isinstance(axes.figure, Figure)
    tops = [patch.get_y() + patch.get_height() for patch in axes.patches]
    both = found.amortization.clamp(min=0) + found.approximation.clamp(min=0)
    torch.testing.assert_close(torch.tensor(tops[5:10]), both.sort(descending=True).values)
    assert len(axes.patches) == 15  # and what the upper bound adds


def test_refusals():
    laplace = dist.Laplace(torch.zeros(3, 2).double(), 1.0).to_event(1)

    def wrong(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", laplace)

    with pytest.raises(ProgramError, match=r"gaps searches.*'z' is Laplace"):
        lvppl.gaps(model, wrong, Y)
    with pytest.raises(ProgramError, match="guide is None"):
        lvppl.gaps(model, None, Y)
    with pytest.raises(ProgramError, match="evidence must be one of"):
        lvppl.gaps(model, diagonal, Y, evidence="guess")
    with pytest.raises(ProgramError, match="each of 3 data"):
        lvppl.gaps(model, diagonal, Y, log_prob=torch.zeros(2), num_steps=3, num_repetitions=2)
    with pytest.raises(ProgramError, match="simulate=True replaces them"):
        lvppl.gaps(model, diagonal, Y, log_prob=torch.zeros(3), simulate=True)
    with pytest.raises(ProgramError, match=r"num_steps must be .* at least 3"):
        lvppl.gaps(model, diagonal, Y, num_steps=1)
    with pytest.raises(ProgramError, match="'y' observes no argument"):
        lvppl.gaps(lambda y: model(y + 0.0), diagonal, Y, simulate=True)

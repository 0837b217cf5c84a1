"""The amortization gap where both ELBOs are known: a linear-Gaussian model, bad encoders."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from lvppl.errors import ProgramError
from lvppl.inference.amortization import amortization_gap

Y = torch.tensor([[0.3, -1.0], [2.0, 0.5], [-0.7, 0.1]], dtype=torch.float64)
W = torch.tensor([[1.0, 0.5], [-0.3, 0.8]], dtype=torch.float64)
PRECISION = torch.eye(2).double() + W.T @ W  # of p(z | y), with unit noise
MEAN = torch.linalg.solve(PRECISION, (Y @ W).T).T


def model(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ W.T, 1.0).to_event(1), obs=y)


def exact_elbo(q):
    """ln p(y) − KL(q, p(z | y))."""
    evidence = dist.MultivariateNormal(
        torch.zeros(2).double(), torch.eye(2).double() + W @ W.T
    ).log_prob(Y)
    full = dist.MultivariateNormal(q.mean, covariance_matrix=covariance(q))
    posterior = dist.MultivariateNormal(MEAN, precision_matrix=PRECISION)
    return evidence - torch.distributions.kl_divergence(full, posterior)


def covariance(q):
    is_full = isinstance(q, torch.distributions.MultivariateNormal)
    return q.covariance_matrix if is_full else torch.diag_embed(q.variance)


def guide_of(q):
    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", q)

    return guide


def poor(family):
    """The same wrong Normal for every datum."""
    loc = torch.tensor([0.5, -0.2], dtype=torch.float64).expand(3, 2)
    scale = torch.tensor([1.5, 0.4], dtype=torch.float64).expand(3, 2)
    if family == "full":
        return dist.MultivariateNormal(loc, scale_tril=torch.diag_embed(scale))
    return dist.Normal(loc, scale).to_event(1)


def best(family):
    """The optimum of the family: the posterior, or the Normal with its mean and precisions."""
    if family == "full":
        return dist.MultivariateNormal(MEAN, precision_matrix=PRECISION)
    return dist.Normal(MEAN, PRECISION.diagonal().rsqrt().expand(3, 2)).to_event(1)


def test_the_seed_decides_the_draws_of_the_evaluation():
    def elbo(seed):
        options = {"num_steps": 1, "num_particles": 2, "num_repetitions": 2, "seed": seed}
        return amortization_gap(model, guide_of(poor("diagonal")), Y, **options).elbo_encoder

    assert torch.equal(elbo(3), elbo(3))
    assert (elbo(3) != elbo(4)).all()
    assert (elbo(None) != elbo(None)).all()


@pytest.mark.parametrize("family", ["diagonal", "full"])
def test_known_gap(family):
    result = amortization_gap(
        model, guide_of(poor(family)), Y, num_steps=300, num_particles=16, num_repetitions=40
    )
    want = exact_elbo(best(family)) - exact_elbo(poor(family))
    # five standard errors, and what the search leaves
    assert ((result.gap - want).abs() < 5 * result.std_error + 5e-3).all()
    assert ((result.elbo_search - exact_elbo(best(family))).abs() < 0.05).all()
    assert result.history.shape == (300,)
    torch.testing.assert_close(result.gap, result.elbo_search - result.elbo_encoder)


def test_no_gap_at_the_optimum():
    """The exact posterior has ELBO = ln p(y) at every draw, and the search has no gradient."""
    result = amortization_gap(
        model, guide_of(best("full")), Y, num_steps=5, num_repetitions=5, learning_rate=1e-6
    )
    torch.testing.assert_close(result.elbo_encoder, exact_elbo(best("full")))
    assert (result.gap.abs() < 1e-9).all()


def test_programs_and_generators_are_left_alone():
    pyro.clear_param_store()
    loc = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    a = amortization_gap(model, guide, Y, num_steps=3, num_repetitions=2, seed=1)
    assert torch.equal(before, torch.random.get_rng_state())
    assert loc.grad is None and (loc == 0).all()
    b = amortization_gap(model, guide, Y, num_steps=3, num_repetitions=2, seed=1)
    assert torch.equal(a.gap, b.gap)
    assert "nats a datum" in str(a)


def test_refusals():
    laplace = dist.Laplace(torch.zeros(3, 2).double(), 1.0).to_event(1)
    with pytest.raises(ProgramError, match="'z' is Laplace"):
        amortization_gap(model, guide_of(laplace), Y)

    def dependent(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Normal(y[:, 0], 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(a[..., None], 1.0).expand([len(y), 2]).to_event(1))

    with pytest.raises(ProgramError, match="depend on another latent"):
        amortization_gap(model, dependent, Y)

    def global_model(y):
        m = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(m, 1.0), obs=y[:, 0])

    def global_guide(y):
        pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))

    with pytest.raises(ProgramError, match="per-datum"):
        amortization_gap(global_model, global_guide, Y)
    with pytest.raises(ProgramError, match="at least one step"):
        amortization_gap(model, guide_of(poor("full")), Y, num_steps=0)

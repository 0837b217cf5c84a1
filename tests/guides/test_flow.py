"""The flow is a density: change of variables, inverse, integral, dependence on the datum."""

from functools import partial

import pyro
import pytest
import torch

from lvppl.guides import AmortizedFlow, AmortizedNormal, DenseEncoder

ENCODER = partial(DenseEncoder, hidden_dims=(6,))


@pytest.fixture(autouse=True)
def _clean_slate():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def make_flow(latent_dim, **options):
    flow = AmortizedFlow(
        latent_dim=latent_dim,
        x_shape=(4,),
        encoder=ENCODER,
        context_dim=3,
        hidden_dims=(8,),
        **options,
    ).double()
    for p in flow.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return flow


@pytest.mark.parametrize("latent_dim", [2, 3, 5])
def test_round_trip(latent_dim):
    """Draws scored as draws and as given points, by the inverse, have the same density."""
    flow, x = make_flow(latent_dim), torch.randn(7, 4).double()
    q = flow.posterior(x)
    z = q.rsample((5,))
    as_drawn = q.log_prob(z)
    as_given = flow.posterior(x).log_prob(z.detach().clone())
    torch.testing.assert_close(as_given, as_drawn, rtol=1e-9, atol=1e-9)
    # and in the opposite order: from points to noise, and back
    points = torch.randn(7, latent_dim).double()
    noise = points
    for transform in reversed(flow.posterior(x).transforms):
        noise = transform.inv(noise)
    back = noise.clone()
    for transform in flow.posterior(x).transforms:
        back = transform(back)
    torch.testing.assert_close(back, points, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("latent_dim", [2, 3])
def test_change_of_variables_by_autograd(latent_dim):
    flow, x = make_flow(latent_dim), torch.randn(1, 4).double()

    def push(noise):
        z = noise[None]
        for transform in flow.posterior(x).transforms:
            z = transform(z)
        return z[0]

    noise = torch.randn(latent_dim).double()
    jacobian = torch.autograd.functional.jacobian(push, noise)
    q = flow.posterior(x)
    want = q.base_dist.log_prob(noise[None]) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(q.log_prob(push(noise)[None]), want, rtol=1e-9, atol=1e-9)


def test_integrates_to_one_and_is_not_normal():
    flow, x = make_flow(2), torch.randn(3, 4).double()
    with torch.no_grad():
        draws = flow.posterior(x).sample((2000,))
        centre, spread = draws.mean(0), draws.std(0)
        axis = torch.linspace(-12, 12, 601, dtype=torch.float64)
        grid = torch.cartesian_prod(axis, axis)[:, None] * spread + centre
        mass = flow.posterior(x).log_prob(grid).exp().sum(0) * (24 / 600) ** 2 * spread.prod(-1)
    torch.testing.assert_close(mass, torch.ones(3).double(), rtol=0, atol=2e-3)


def test_couplings_depend_on_the_datum():
    flow = make_flow(3)
    x = torch.randn(2, 4).double()
    noise = torch.randn(3).double().expand(2, 3)
    z = noise
    for transform in flow.posterior(x).transforms:
        z = transform(z)
    assert (z[0] - z[1]).abs().max() > 1e-3


def test_without_couplings_it_is_the_normal_guide():
    flow = make_flow(3, num_couplings=0)
    normal = AmortizedNormal(latent_dim=3, x_shape=(4,), encoder=ENCODER).double()
    weights = dict(flow.encoder.named_parameters())
    for name, p in normal.encoder.named_parameters():
        p.data = weights[name].data[: len(p)]  # without the outputs that are features
    x, z = torch.randn(5, 4).double(), torch.randn(5, 3).double()
    torch.testing.assert_close(flow.posterior(x).log_prob(z), normal.posterior(x).log_prob(z))


def test_one_dimension_is_refused():
    with pytest.raises(ValueError, match="latent_dim >= 2"):
        AmortizedFlow(latent_dim=1)

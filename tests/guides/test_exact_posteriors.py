"""A guide that is the posterior has ELBO = ln p(y) at every draw: no tolerance but rounding."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from lvppl.guides import AmortizedNormal, DenseEncoder, MeanField, PerDatumNormal
from lvppl.models import NormalNormal, ProbabilisticPCA

Y = torch.tensor([0.1, 1.2, -0.4, 2.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _clean_slate():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def test_mean_field_at_the_posterior_of_a_global_mean():
    model = NormalNormal(prior_loc=0.5, prior_scale=2.0, noise_scale=0.7).double()
    guide = MeanField({"mean": ()}).double()
    posterior = model.posterior(Y)
    guide.mean_loc, guide.mean_scale = posterior.mean, posterior.stddev
    for _ in range(3):
        loss = Trace_ELBO().loss(model, guide, Y)
        assert loss == pytest.approx(-model.log_evidence(Y).item(), rel=1e-12)


def test_per_datum_guide_at_the_posteriors():
    y = torch.randn(9, 4).double() @ torch.randn(4, 4).double()
    model = ProbabilisticPCA.from_data(y, 1)
    guide = PerDatumNormal(9, 1).double()
    posterior = model.posterior(y)
    guide.loc, guide.scale = posterior.mean.detach(), posterior.stddev.detach()
    for _ in range(3):
        loss = Trace_ELBO().loss(model, guide, y)
        assert loss == pytest.approx(-model.log_evidence(y).sum().item(), rel=1e-12)


def test_per_datum_guide_starts_at_an_encoder_and_knows_its_batch():
    y = torch.randn(9, 4).double()
    encoder = AmortizedNormal(
        latent_dim=2, x_shape=(4,), encoder=partial(DenseEncoder, hidden_dims=(5,)), site="w"
    ).double()
    guide = PerDatumNormal.from_encoder(encoder, y)
    z = torch.randn(9, 2).double()
    torch.testing.assert_close(guide.posterior(y).log_prob(z), encoder.posterior(y).log_prob(z))
    assert guide.site == "w"
    guide.loc.sum().backward()  # its parameters are its own
    assert all(p.grad is None for p in encoder.parameters())
    with pytest.raises(ValueError, match="9 data and was called with 4"):
        guide(y[:4])


def test_mean_field_several_sites_by_hand():
    def model():
        a = pyro.sample("a", dist.Normal(torch.zeros(()).double(), 1.0))
        pyro.sample("b", dist.Normal(a * torch.ones(2, 3).double(), 1.0).to_event(2))

    guide = MeanField({"a": (), "b": (2, 3)}, init_scale=0.3).double()
    pyro.set_rng_seed(1)
    draws = guide()
    log_q = dist.Normal(0.0, 0.3).log_prob(draws["a"])
    log_q = log_q + dist.Normal(0.0, 0.3).log_prob(draws["b"]).sum()
    log_p = dist.Normal(0.0, 1.0).log_prob(draws["a"])
    log_p = log_p + dist.Normal(draws["a"], 1.0).log_prob(draws["b"]).sum()
    pyro.set_rng_seed(1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert svi.step() == pytest.approx((log_q - log_p).item(), rel=1e-7)
    with pyro.plate("particles", 5, dim=-1):
        wide = guide()
    assert wide["a"].shape == (5,) and wide["b"].shape == (5, 2, 3)

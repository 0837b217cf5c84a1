"""Every program means the same under a plate of particles, on a minibatch, in either dtype."""

from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO

from lvppl.models import (
    MADE,
    VAE,
    BernoulliMixture,
    BetaBinomialLikelihood,
    ConvDecoder,
    DenseDecoder,
    DiscretizedLogisticLikelihood,
    FactorAnalysis,
    GaussianLayers,
    GaussianLikelihood,
    GaussianMixture,
    HierarchicalNormal,
    NormalNormal,
    PixelCNN,
    PoissonMixture,
    ProbabilisticPCA,
    SigmoidBeliefNet,
    StudentTLikelihood,
    StudentTMixture,
    shallow_gaussian,
)

NUM_PARTICLES = 3
DENSE = partial(DenseDecoder, hidden_dims=(5,))
CONV = partial(ConvDecoder, channels=(4, 3, 2))


def vae(**options):
    return lambda: VAE(latent_dim=2, **options)


PROGRAMS = {
    "normal_normal": (NormalNormal, ()),
    "hierarchical_normal": (HierarchicalNormal, ()),
    "factor_analysis": (lambda: FactorAnalysis(4, 2), (4,)),
    "ppca": (lambda: ProbabilisticPCA(4, 2), (4,)),
    "mixture_full": (lambda: GaussianMixture(3, 4), (4,)),
    "mixture_tied": (lambda: GaussianMixture(3, 4, covariance="tied"), (4,)),
    "mixture_diag": (lambda: GaussianMixture(3, 4, covariance="diag"), (4,)),
    "mixture_spherical": (lambda: GaussianMixture(3, 4, covariance="spherical"), (4,)),
    "mixture_unit": (lambda: GaussianMixture(3, 4, covariance="unit"), (4,)),
    "mixture_bernoulli": (lambda: BernoulliMixture(3, 4), (4,)),
    "mixture_poisson": (lambda: PoissonMixture(3, 4), (4,)),
    "scale_mixture": (lambda: StudentTMixture(3, 4), (4,)),
    "vae_bernoulli": (vae(x_shape=(4,), decoder=DENSE), (4,)),
    "vae_gaussian": (vae(x_shape=(4,), decoder=DENSE, likelihood=GaussianLikelihood), (4,)),
    "vae_student": (vae(x_shape=(4,), decoder=DENSE, likelihood=StudentTLikelihood), (4,)),
    "vae_logistic": (
        vae(x_shape=(2, 2), decoder=DENSE, likelihood=DiscretizedLogisticLikelihood),
        (2, 2),
    ),
    "vae_beta_binomial": (
        vae(x_shape=(4,), decoder=DENSE, likelihood=BetaBinomialLikelihood, learned_prior=True),
        (4,),
    ),
    "vae_conv": (vae(x_shape=(1, 8, 8), decoder=CONV), (1, 8, 8)),
    "gaussian_layers_1": (
        lambda: GaussianLayers(latent_dims=(3,), hidden_dims=(5,), y_shape=(4,)),
        (4,),
    ),
    "gaussian_layers_2": (
        lambda: GaussianLayers(latent_dims=(4, 2), hidden_dims=(5, 3), y_shape=(2, 3)),
        (2, 3),
    ),
    "belief_net_1": (lambda: SigmoidBeliefNet(latent_dims=(3,), y_shape=(4,)), (4,)),
    "belief_net_2": (lambda: SigmoidBeliefNet(latent_dims=(3, 2), y_shape=(2, 3)), (2, 3)),
    "made": (lambda: MADE(y_shape=(2, 3), hidden_dims=(7,)), (2, 3)),
    "pixel_cnn": (lambda: PixelCNN(y_shape=(4, 4), channels=3, num_layers=2), (4, 4)),
    "shallow_gaussian": (lambda: shallow_gaussian, (4,)),
}


def make(name, dtype=torch.float64):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    build, x_shape = PROGRAMS[name]
    model = build()
    if isinstance(model, torch.nn.Module):
        model.to(dtype)
    return model, torch.randint(2, (5, *x_shape)).to(dtype)


def plates(node):
    return [frame.name for frame in node["cond_indep_stack"]]


def latents(trace):
    names = [name for name in trace.stochastic_nodes if name != "data"]  # not the plate itself
    return {name: trace.nodes[name]["value"] for name in names}


@pytest.mark.parametrize("name", PROGRAMS)
def test_particles_equal_a_loop_over_them(name):
    model, x = make(name)
    with pyro.plate("particles", NUM_PARTICLES, dim=-2):
        together = poutine.trace(model).get_trace(x)
    together.compute_log_prob()
    for i in range(NUM_PARTICLES):
        values = {}
        for site, value in latents(together).items():
            values[site] = value[i] if "data" in plates(together.nodes[site]) else value[i, 0]
        alone = poutine.trace(poutine.condition(model, values)).get_trace(x)
        alone.compute_log_prob()
        for site, node in alone.nodes.items():
            if node["type"] != "sample" or site == "data":
                continue
            want = node["log_prob"]
            got = together.nodes[site]["log_prob"][i].reshape(want.shape)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_minibatch_has_the_terms_of_its_data(name):
    model, x = make(name)
    full = poutine.trace(model).get_trace(x)
    full.compute_log_prob()
    rows = torch.tensor([4, 1])
    values = {
        site: value[rows] if "data" in plates(full.nodes[site]) else value
        for site, value in latents(full).items()
    }
    batch = poutine.trace(poutine.condition(model, values)).get_trace(x[rows])
    batch.compute_log_prob()
    observed = "x" if "x" in batch.nodes else "y"
    torch.testing.assert_close(
        batch.nodes[observed]["log_prob"],
        full.nodes[observed]["log_prob"][rows],
        rtol=1e-10,
        atol=0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model_name", PROGRAMS)
def test_every_term_has_the_dtype_of_model_and_data(model_name, dtype):
    model, x = make(model_name, dtype)
    trace = poutine.trace(model).get_trace(x)
    trace.compute_log_prob()
    for node in trace.nodes.values():
        if node["type"] == "sample" and node["name"] != "data":
            assert node["log_prob"].dtype == dtype
    for name, value in latents(trace).items():
        is_assignment = "mixture" in model_name and name == "z"
        assert value.dtype == (torch.long if is_assignment else dtype), name


@pytest.mark.parametrize("name", [name for name in PROGRAMS if name.startswith("mixture")])
def test_enumeration_under_particles(name):
    model, x = make(name)
    elbo = TraceEnum_ELBO(max_plate_nesting=1, num_particles=3, vectorize_particles=True)
    want = -model.log_evidence(x).sum().item()
    assert elbo.loss(model, lambda x: None, x) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("name", PROGRAMS)
def test_data_can_be_drawn(name):
    """Unconditioned, the program samples data of the right shape, within its own support."""
    model, x = make(name)
    drawn = poutine.trace(poutine.uncondition(model)).get_trace(x)
    drawn.compute_log_prob()  # validates the values against their supports
    site = drawn.nodes["x" if "x" in drawn.nodes else "y"]
    assert site["value"].shape == x.shape and not torch.equal(site["value"], x)

"""Structure of the terms: plates, particles, enumeration, subsamples, masks and scales."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import lvppl
from lvppl.terms import trace_terms

CATEGORICAL = {"enumerate": "parallel"}


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def normal_model(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def normal_guide(y):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(0.8 * y, 0.4))


def log_normal(value, loc, scale):
    return -0.5 * ((value - loc) / scale) ** 2 - math.log(scale) - 0.5 * math.log(2 * math.pi)


# --------------------------------------------------------------------------------- plates and data


def test_each_term_is_per_particle_and_per_datum():
    y = torch.randn(5)
    terms = trace_terms(normal_model, normal_guide, (y,), num_particles=7)
    z = terms.latents["z"].value
    assert z.shape == terms.log_weight.shape == (7, 5)
    assert terms.data_plates == ("data",) and terms.num_data == 5 and terms.scale == 1.0
    torch.testing.assert_close(terms.log_likelihood, log_normal(y, z, 0.5))
    torch.testing.assert_close(terms.log_prior, log_normal(z, 0.0, 1.0))
    torch.testing.assert_close(terms.log_guide, log_normal(z, 0.8 * y, 0.4))
    closed = 0.5 * (0.4**2 + (0.8 * y) ** 2 - 1) - math.log(0.4)
    torch.testing.assert_close(terms.kl, closed.expand(7, 5))


def test_nested_plates_are_summed_to_the_data_plate():
    """A plate that is not common to every site is summed inside the datum."""
    y = torch.randn(3, 4)

    def model(y):
        with pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("replicates", 3, dim=-2):
                pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def guide(y):
        with pyro.plate("data", 4, dim=-1):
            pyro.sample("z", dist.Normal(y.mean(0), 0.4))

    terms = trace_terms(model, guide, (y,), num_particles=6)
    z = terms.latents["z"].value
    assert terms.log_likelihood.shape == (6, 4)
    torch.testing.assert_close(terms.log_likelihood, log_normal(y[None], z[:, None, :], 0.5).sum(1))
    assert terms.observed["y"].plates == ("replicates", "data")
    assert terms.observed["y"].log_prob.shape == (6, 3, 4)


def test_several_data_plates_are_flattened_in_order_and_can_be_coarsened():
    y = torch.randn(3, 4)

    def model(y):
        with pyro.plate("columns", 4, dim=-1), pyro.plate("rows", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    terms = trace_terms(model, None, (y,), num_particles=2)
    z = terms.latents["z"].value
    assert terms.data_plates == ("rows", "columns")
    every = log_normal(y, z, 0.5)
    torch.testing.assert_close(terms.log_likelihood, every.reshape(2, 12))
    coarse = trace_terms(model, None, (y,), num_particles=2, data_plate="columns")
    assert coarse.log_likelihood.shape == (2, 4) and coarse.data_plates == ("columns",)
    z = coarse.latents["z"].value
    torch.testing.assert_close(coarse.log_likelihood, log_normal(y, z, 0.5).sum(1))


def test_global_latents_make_the_data_set_one_datum():
    y = torch.randn(5)

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    terms = trace_terms(model, None, (y,), num_particles=3)
    assert terms.data_plates == () and terms.log_weight.shape == (3, 1)
    with pytest.raises(lvppl.ProgramError, match=r"'z' in no plate.*one datum"):
        terms.require_per_datum("A per-datum result")
    with pytest.raises(lvppl.ProgramError, match="outside it: 'z'"):
        trace_terms(model, None, (y,), data_plate="data")


# ----------------------------------------------------------------------------- subsampling, scales


def subsampled(y, size):
    def model():
        with pyro.plate("data", len(y), subsample_size=size) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])

    def guide():
        with pyro.plate("data", len(y), subsample_size=size):
            pyro.sample("z", dist.Normal(0.3, 0.4))

    return model, guide


def test_the_data_plate_scale_is_kept_apart():
    y = torch.randn(10)
    model, guide = subsampled(y, 4)
    terms = trace_terms(model, guide, num_particles=3)
    assert terms.scale == 2.5 and terms.log_weight.shape == (3, 4)
    z = terms.latents["z"].value
    torch.testing.assert_close(terms.log_prior, log_normal(z, 0.0, 1.0))  # no 2.5 inside
    torch.testing.assert_close(terms.total(z[0]), 2.5 * z[0].sum())


def test_the_mean_over_all_subsamples_is_the_full_bound():
    y = torch.randn(6)

    def pair(index):
        def model():
            with pyro.plate("data", 6, subsample=index):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])

        def guide():
            with pyro.plate("data", 6, subsample=index):
                pyro.sample("z", dist.Delta(0.8 * y[index]))

        return model, guide

    full = lvppl.ELBO().loss(*pair(torch.arange(6)))
    subsets = [torch.tensor(s) for s in itertools.combinations(range(6), 2)]
    mean = sum(lvppl.ELBO().loss(*pair(s)) for s in subsets) / len(subsets)
    assert mean == pytest.approx(full, rel=1e-12)


def test_masks_and_user_scales_stay_inside_a_term():
    y, mask = torch.randn(5), torch.tensor([True, False, True, True, False])

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=mask), poutine.scale(scale=3.0):
                pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    terms = trace_terms(model, normal_guide, (y,), num_particles=2)
    z = terms.latents["z"].value
    torch.testing.assert_close(terms.log_likelihood, 3 * log_normal(y, z, 0.5) * mask)


def test_a_scaled_prior_is_not_cancelled_by_an_unscaled_guide():
    y = torch.randn(4)

    def model(y):
        with pyro.plate("data", len(y)):
            with poutine.scale(scale=2.0):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    terms = trace_terms(model, normal_guide, (y,), num_particles=3)
    z = terms.latents["z"].value
    expected = log_normal(z, 0.8 * y, 0.4) - 2 * log_normal(z, 0.0, 1.0)
    torch.testing.assert_close(terms.kl, expected)
    torch.testing.assert_close(terms.elbo("kl"), terms.log_weight)


def test_a_local_subsample_inside_a_datum_scales_its_term():
    """Global latent, subsampled data: every site's own scale is inside; logarithms refuse it."""
    y = torch.randn(10)

    def model(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample=torch.arange(4)) as index:
            pyro.sample("y", dist.Normal(z, 0.5), obs=y[index])

    terms = trace_terms(model, None, (y,), num_particles=2)
    z = terms.latents["z"].value
    torch.testing.assert_close(
        terms.log_likelihood[:, 0], 2.5 * log_normal(y[:4], z[:, None], 0.5).sum(1)
    )
    with pytest.raises(lvppl.ProgramError, match="inside the logarithm"):
        lvppl.IWAE(num_particles=2).loss(model, lambda y: pyro.sample("z", dist.Normal(0, 1.0)), y)


# --------------------------------------------------------------------------------------- particles


def cat_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        h = torch.cat([z[:, None], x[:, None]], 1)  # fails with a particle dimension
        pyro.sample("y", dist.Normal(h.sum(1), 1.0), obs=x)


def silent_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        centred = z - z.mean()  # the mean mixes particles, without an error
        pyro.sample("y", dist.Normal(centred, 1.0), obs=x)


def prior_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))


@pytest.mark.parametrize("model", [cat_model, silent_model])
def test_particles_loop_where_a_batch_would_change_the_numbers(model):
    x = torch.randn(4)
    terms = trace_terms(model, prior_guide, (x,), num_particles=3)
    assert terms.log_weight.shape == (3, 4)
    assert "particles run as a loop" in terms.notes[0]
    z = terms.latents["z"].value
    loc = z + x if model is cat_model else z - z.mean(1, keepdim=True)
    torch.testing.assert_close(terms.log_likelihood, log_normal(x, loc, 1.0))
    report = lvppl.ELBO(num_particles=3).report(model, prior_guide, x)
    assert "particles run as a loop" in report.notes[0]


def test_particles_run_in_one_batch_where_they_can():
    calls = []

    def model(y):
        calls.append(1)
        normal_model(y)

    y = torch.randn(5)
    trace_terms(model, normal_guide, (y,), num_particles=50)
    calls.clear()
    assert trace_terms(model, normal_guide, (y,), num_particles=50).notes == ()
    assert len(calls) == 1


def test_the_probe_leaves_generators_and_running_statistics_alone():
    norm = torch.nn.BatchNorm1d(1, dtype=torch.float64)

    def model(y):
        pyro.module("norm", norm)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(norm(z.reshape(-1, 1)).reshape(z.shape), 1.0), obs=y)

    y = torch.randn(5)
    torch.manual_seed(0)
    pyro_trace = poutine.trace(poutine.replay(model, trace=poutine.trace(prior_guide).get_trace(y)))
    expected = pyro_trace.get_trace(y).nodes["z"]["value"]
    norm.reset_running_stats()
    torch.manual_seed(0)
    terms = trace_terms(model, prior_guide, (y,))
    assert torch.equal(terms.latents["z"].value[0], expected)
    assert norm.num_batches_tracked.item() == 1  # one run of the program, not two


# ------------------------------------------------------------------------------------- enumeration


def test_sites_summed_in_the_model_have_their_exact_posterior_as_guide():
    y = torch.tensor([-1.0, 0.3, 2.0])
    weights, means = torch.tensor([0.3, 0.7]), torch.tensor([-1.0, 1.5])

    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(weights), infer=CATEGORICAL)
            pyro.sample("y", dist.Normal(means[k], 0.8), obs=y)

    log_joint = weights.log() + log_normal(y[:, None], means, 0.8)
    evidence = log_joint.logsumexp(-1)
    posterior = log_joint.softmax(-1)
    terms = trace_terms(model, lambda y: None, (y,))
    torch.testing.assert_close(terms.log_weight[0], evidence)
    log_likelihood = (posterior * log_normal(y[:, None], means, 0.8)).sum(-1)
    torch.testing.assert_close(terms.log_likelihood[0], log_likelihood)
    torch.testing.assert_close(terms.log_prior[0], (posterior * weights.log()).sum(-1))
    torch.testing.assert_close(terms.log_guide[0], (posterior * posterior.log()).sum(-1))
    torch.testing.assert_close(terms.entropy, -terms.log_guide)
    torch.testing.assert_close(terms.observed["y"].mean()[0], (posterior * means).sum(-1))
    torch.testing.assert_close(terms.observed["y"].log_prob[0], evidence)


def test_impossible_states_cost_nothing():
    """ln 0 at states that the posterior excludes gives no NaN, in values or in gradients."""
    y = torch.tensor([0.2, 0.9])
    logits = torch.tensor([0.0, -math.inf], requires_grad=True)

    def model(y):
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(logits=logits), infer=CATEGORICAL)
            pyro.sample("y", dist.Normal(torch.tensor([0.0, 5.0])[k], 1.0), obs=y)

    with pyro.validation_enabled(False):
        terms = trace_terms(model, lambda y: None, (y,))
        torch.testing.assert_close(terms.log_weight[0], log_normal(y, 0.0, 1.0))
        assert torch.isfinite(terms.log_likelihood).all() and torch.isfinite(terms.log_prior).all()


def test_evidence_does_not_underflow_between_peaked_factors():
    """Two factors peaked 2,000 nats apart at different states: the sum stays in log space."""
    first, second = torch.tensor([0.0, -2000.0]), torch.tensor([-2000.0, 0.0])

    def model():
        with pyro.plate("data", 1):
            k = pyro.sample("k", dist.Categorical(torch.ones(2) / 2), infer=CATEGORICAL)
            pyro.factor("first", first[k])
            pyro.factor("second", second[k])

    terms = trace_terms(model, lambda: None)
    assert terms.log_weight.item() == pytest.approx(-2000.0, rel=1e-12)


def test_mixed_enumeration_is_refused():
    def model(y):
        with pyro.plate("data", 2):
            pyro.sample("a", dist.Bernoulli(0.5))
            pyro.sample("b", dist.Bernoulli(0.5), infer=CATEGORICAL)

    def guide(y):
        with pyro.plate("data", 2):
            pyro.sample("a", dist.Bernoulli(0.5), infer=CATEGORICAL)

    with pytest.raises(lvppl.ProgramError, match="Enumerate them in one place"):
        lvppl.ELBO().loss(model, guide, torch.zeros(2))


def test_a_subsample_inside_a_global_sum_is_refused():
    y = torch.randn(10)

    def model(y):
        k = pyro.sample("k", dist.Bernoulli(0.5), infer=CATEGORICAL)
        with pyro.plate("data", 10, subsample=torch.arange(4)) as index:
            pyro.sample("y", dist.Normal(k, 1.0), obs=y[index])

    with pytest.raises(lvppl.ProgramError, match="would be biased"):
        lvppl.ELBO().loss(model, lambda y: None, y)


# ----------------------------------------------------------------------------------------- strict


def test_a_latent_without_a_guide_is_drawn_from_its_prior_when_asked_for():
    y = torch.randn(4)

    def guide(y):
        pass

    with pytest.raises(lvppl.ProgramError, match="no site for the model's latent 'z'"):
        trace_terms(normal_model, guide, (y,))
    terms = trace_terms(normal_model, guide, (y,), num_particles=3, strict=False)
    assert torch.equal(terms.log_guide, terms.log_prior)
    assert torch.equal(terms.kl, torch.zeros(3, 4))
    torch.testing.assert_close(terms.log_weight, terms.log_likelihood)


def test_noise_of_the_guide_adds_no_term_when_allowed():
    y = torch.randn(4)

    def guide(y):
        with pyro.plate("data", len(y)):
            noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(0.8 * y + 0.1 * noise, 0.4))

    with pytest.raises(lvppl.ProgramError, match="samples 'noise'"):
        trace_terms(normal_model, guide, (y,))
    terms = trace_terms(normal_model, guide, (y,), num_particles=2, strict=False)
    z, noise = terms.latents["z"].value, terms.latents["noise"].value
    torch.testing.assert_close(terms.log_guide, log_normal(z, 0.8 * y + 0.1 * noise, 0.4))


def test_model_and_guide_must_draw_the_same_minibatch():
    y = torch.randn(10)

    def model(y):
        with pyro.plate("data", 10, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    def guide(y):
        with pyro.plate("other", 10, subsample_size=4):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(lvppl.ProgramError, match="different minibatches"):
        trace_terms(model, guide, (y,), strict=False)


def test_a_flow_without_an_inverse_keeps_each_draws_own_density():
    """A planar flow knows ln q at its latest draw only; a looped program makes several."""
    y = torch.randn(3)

    def model(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        h = torch.cat([z, y])  # forces a loop
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(h.sum(), 1.0), obs=y)

    flow = dist.transforms.planar(2)
    base = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def guide(y):
        pyro.sample("z", dist.TransformedDistribution(base, flow))

    terms = trace_terms(model, guide, (y,), num_particles=4)
    assert "loop" in terms.notes[0]
    for z, log_guide in zip(terms.latents["z"].value, terms.log_guide[:, 0], strict=True):
        # invert numerically: the flow is x ↦ x + u h(w·x + b), so x solves a scalar equation
        x = z.clone()
        for _ in range(500):
            x = x - 0.5 * (flow(x) - z)
        torch.testing.assert_close(flow(x), z, rtol=0, atol=1e-9)
        jacobian = torch.autograd.functional.jacobian(lambda v: flow(v), x)
        expected = base.log_prob(x) - torch.linalg.slogdet(jacobian).logabsdet
        torch.testing.assert_close(log_guide, expected, rtol=0, atol=1e-8)


# ------------------------------------------------------------------- masks and enumeration together


def test_a_masked_enumerated_site_keeps_its_probabilities():
    """A ragged chain: after its length a sequence adds nothing, and nothing is summed twice."""
    lengths, transition = torch.tensor([4, 2]), torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    means, y = torch.tensor([-1.0, 1.0]), torch.randn(2, 4)

    def chain(y):
        with pyro.plate("sequences", 2):
            z = torch.zeros(2, dtype=torch.long)
            for t in pyro.markov(range(4)):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z{t}", dist.Categorical(transition[z]), infer=CATEGORICAL)
                    pyro.sample(f"y{t}", dist.Normal(means[z], 1.0), obs=y[:, t])

    def brute_force(row, length):
        total = []
        for states in itertools.product(range(2), repeat=length):
            previous, log_joint = 0, torch.zeros(())
            for t, state in enumerate(states):
                log_joint = log_joint + transition[previous, state].log()
                log_joint = log_joint + log_normal(row[t], means[state], 1.0)
                previous = state
            total.append(log_joint)
        return torch.stack(total).logsumexp(0)

    exact = torch.stack([brute_force(y[i], int(lengths[i])) for i in range(2)])
    terms = trace_terms(chain, lambda y: None, (y,), num_particles=2)
    torch.testing.assert_close(terms.log_weight, exact.expand(2, 2))
    torch.testing.assert_close(terms.elbo("kl"), exact.expand(2, 2))
    torch.testing.assert_close(
        terms.log_likelihood + terms.log_prior - terms.log_guide, exact.expand(2, 2)
    )


@pytest.mark.parametrize("handler", [True, False])
def test_a_masked_datum_of_a_mixture_adds_nothing(handler):
    y, seen = torch.tensor([0.3, 9.0]), torch.tensor([True, False])
    weights, means = torch.tensor([0.2, 0.3, 0.5]), torch.arange(3.0)

    def model(y):
        with pyro.plate("data", 2):
            prior = dist.Categorical(weights)
            with poutine.mask(mask=seen if handler else torch.tensor(True)):
                prior = prior if handler else prior.mask(seen)
                k = pyro.sample("k", prior, infer=CATEGORICAL)
                likelihood = dist.Normal(means[k], 1.0)
                pyro.sample("y", likelihood if handler else likelihood.mask(seen), obs=y)

    exact = (weights.log() + log_normal(y[0], means, 1.0)).logsumexp(0)
    terms = trace_terms(model, lambda y: None, (y,))
    expected = torch.stack([exact, torch.zeros(())])
    torch.testing.assert_close(terms.log_weight[0], expected)
    torch.testing.assert_close(terms.elbo("entropy")[0], expected)
    torch.testing.assert_close(terms.observed["y"].log_prob[0], expected)


@pytest.mark.parametrize("masked", ["latent", "both"])
def test_an_enumerated_guide_under_a_mask_averages_over_q(masked):
    """Mask or not, z is drawn from q: the enumerated value is the mean of the drawn one."""
    y, q = torch.tensor([0.3, 1.5]), torch.tensor([[0.2, 0.8], [0.6, 0.4]])
    seen, means = torch.tensor([True, False]), torch.tensor([-1.0, 1.0])

    def model(y):
        with pyro.plate("data", 2):
            with poutine.mask(mask=seen):
                z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            with poutine.mask(mask=seen if masked == "both" else torch.tensor(True)):
                pyro.sample("y", dist.Normal(means[z], 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", 2), poutine.mask(mask=seen):
            pyro.sample("z", dist.Categorical(q), infer=CATEGORICAL)

    log_prior = torch.tensor([0.3, 0.7]).log()
    log_likelihood = log_normal(y[:, None], means, 1.0)
    scored = log_likelihood * (seen[:, None] if masked == "both" else 1)
    log_weights = scored + seen[:, None] * (log_prior - q.log())
    terms = trace_terms(model, guide, (y,))
    torch.testing.assert_close(terms.elbo("kl")[0], (q * log_weights).sum(-1))
    torch.testing.assert_close(terms.log_weight[0], (q.log() + log_weights).logsumexp(-1))


def test_masks_of_distributions_that_differ_are_not_given_a_closed_divergence():
    y = torch.randn(3)
    ours, theirs = torch.tensor([True, False, True]), torch.tensor([True, True, True])

    def model(y):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(ours))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", 3):
            pyro.sample("z", dist.Normal(0.5 * y, 0.7).mask(theirs))

    terms = trace_terms(model, guide, (y,), num_particles=4)
    z = terms.latents["z"].value
    expected = log_normal(z, 0.5 * y, 0.7) - log_normal(z, 0.0, 1.0) * ours
    torch.testing.assert_close(terms.kl, expected)


# ------------------------------------------------------------------------ structure that changes


def test_a_subsampled_loop_runs_with_any_number_of_particles():
    """Sequential plates have other sites in each run: N / n times the sum of a subsample."""
    y = torch.arange(8.0)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", 8, subsample_size=3):
            pyro.sample(f"y{i}", dist.Normal(z, 1.0), obs=y[i])

    def guide():
        pyro.sample("z", dist.Normal(3.0, 0.1))

    for particles in (1, 4):
        terms = trace_terms(model, guide, num_particles=particles)
        assert terms.log_weight.shape == (particles, 1)
        for run, value in zip(terms._runs, terms.log_likelihood[:, 0], strict=True):
            z = run.guide_sites["z"]["value"]
            seen = torch.tensor([float(s["value"]) for s in run.observed_sites])
            torch.testing.assert_close(value, 8 / 3 * log_normal(seen, z, 1.0).sum())


def test_a_module_that_starts_training_is_looked_at_again():
    """In training mode this program mixes its particles; a closure hides the module."""

    class Centre(torch.nn.Module):
        def forward(self, z):
            return z - z.mean() if self.training else z

    centre = Centre().eval()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(centre(z), 1.0), obs=x)

    x = torch.randn(4)
    assert trace_terms(model, prior_guide, (x,), num_particles=2).notes == ()
    centre.train()
    terms = trace_terms(model, prior_guide, (x,), num_particles=2)
    z = terms.latents["z"].value
    torch.testing.assert_close(
        terms.log_likelihood, log_normal(x, z - z.mean(1, keepdim=True), 1.0)
    )


def test_layouts_do_not_pile_up():
    calls = []

    def model(y, weight):
        calls.append(weight)
        with poutine.scale(scale=weight):
            normal_model(y)

    def guide(y, weight):
        normal_guide(y)

    y = torch.randn(3)
    for step in range(20):
        trace_terms(model, guide, (y, 0.1 + step))
    assert len(calls) == 21  # one probe, then one run a step


def test_a_distribution_without_a_declared_support_is_fine():
    class Bare(dist.TorchDistribution):
        arg_constraints = {}  # noqa: RUF012
        has_rsample = True

        def rsample(self, sample_shape=()):
            return torch.randn(torch.Size(sample_shape) + self.batch_shape)

        def log_prob(self, value):
            return log_normal(value, 0.0, 1.0)

        def expand(self, batch_shape, _instance=None):
            return Bare(torch.Size(batch_shape), validate_args=False)

    def model(y):
        with pyro.plate("data", 3):
            z = pyro.sample("z", Bare())
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(3)
    terms = trace_terms(model, normal_guide, (y,))
    torch.testing.assert_close(terms.log_prior, log_normal(terms.latents["z"].value, 0.0, 1.0))
    assert lvppl.check(model, normal_guide, y)["z"].computable


@pytest.mark.parametrize("name", ["haar", "split", "conjugate"])
def test_reparameterised_programs_are_not_taken_for_generators_without_a_density(name):
    from pyro.infer.autoguide import AutoNormal
    from pyro.infer.reparam import ConjugateReparam, HaarReparam, SplitReparam

    def normal(y):
        x = pyro.sample("x", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y)

    def beta(y):
        x = pyro.sample("x", dist.Beta(2.0, 3.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y = torch.randn(3)
    reparam = {
        "haar": HaarReparam(dim=-1),
        "split": SplitReparam([1, 3], dim=-1),
        "conjugate": ConjugateReparam(dist.Beta(1.0, 1.0)),
    }[name]
    model = poutine.reparam(beta if name == "conjugate" else normal, config={"x": reparam})
    guide = AutoNormal(model)
    guide(y)
    torch.manual_seed(0)
    expected = pyro.infer.Trace_ELBO().loss(model, guide, y)
    torch.manual_seed(0)
    assert lvppl.IWAE(num_particles=1).loss(model, guide, y) == pytest.approx(expected)
    assert lvppl.check(model, guide, y).computable


@pytest.mark.parametrize("name", ["AutoNormalMessenger", "AutoHierarchicalNormalMessenger"])
def test_guides_that_run_the_model_may_meet_its_observations(name):
    from pyro.infer import autoguide

    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    y = torch.randn(3)
    guide = getattr(autoguide, name)(model)
    guide(y)
    terms = trace_terms(model, guide, (y,), num_particles=3)
    a = terms.latents["a"].value
    torch.testing.assert_close(terms.log_likelihood[:, 0], log_normal(y, a[:, None], 1.0).sum(1))
    q = dist.Normal(guide.locs.a, guide.scales.a) if hasattr(guide, "locs") else None
    if q is not None and name == "AutoNormalMessenger":
        torch.testing.assert_close(terms.log_guide[:, 0], q.log_prob(a))


def test_supports_are_compared_by_what_they_are():
    def pair(prior, proposal):
        def model():
            pyro.sample("z", prior)

        def guide():
            pyro.sample("z", proposal)

        return model, guide

    stretched = dist.TransformedDistribution(
        dist.Beta(2.0, 2.0), [dist.transforms.AffineTransform(-2.0, 5.0)]
    )
    uniform = dist.Uniform(torch.tensor(-2.0), torch.tensor(3.0))
    assert trace_terms(*pair(uniform, stretched)).log_weight.isfinite().all()
    circle = dist.VonMises(0.0, 1.0)
    assert trace_terms(*pair(circle, dist.VonMises(0.5, 2.0))).log_weight.isfinite().all()
    for prior, proposal in [
        (circle, dist.Normal(0.0, 1.0)),
        (dist.Gamma(2.0, 1.0), dist.Normal(9.0, 0.1)),
        (dist.Normal(0.0, 1.0), dist.Poisson(3.0)),
    ]:
        with pytest.raises(lvppl.ProgramError, match=r"'z'.*Use a guide distribution of the same"):
            trace_terms(*pair(prior, proposal))


def test_a_state_that_an_enumerated_guide_excludes_still_counts_in_the_sum():
    """q cancels out of the sum over all values, also where ln q is −∞."""
    y, means = torch.tensor([0.3, 1.5]), torch.tensor([-1.0, 1.0])

    def model(y):
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            pyro.sample("y", dist.Normal(means[z], 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", 2):
            logits = torch.tensor([0.0, -math.inf])
            pyro.sample("z", dist.Categorical(logits=logits), infer=CATEGORICAL)

    with pyro.validation_enabled(False):
        terms = trace_terms(model, guide, (y,))
        exact = (torch.tensor([0.3, 0.7]).log() + log_normal(y[:, None], means, 1.0)).logsumexp(-1)
        torch.testing.assert_close(terms.log_weight[0], exact)

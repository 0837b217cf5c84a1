"""The identities of latent variable models, held by the objectives.

Exact ones hold to rounding. The statistical ones compare the mean over REPEATS seeds with the
exact number, allowing k standard errors, k the Student quantile at which fewer than 300
comparisons fail falsely with probability below 1e-5 together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from torch import Tensor

import lvppl
from tests.programs import (
    PARALLEL,
    PROGRAMS,
    Gaussian,
    Started,
    gaussian_kl,
    log_normal,
    positive,
    real,
)

REPEATS = 20
EXACT = 1e-10


def assert_mean(samples: Tensor, exact: Tensor) -> None:
    repeats = len(samples)
    k = float(scipy.stats.t.ppf(1.0 - 0.5e-5 / 300, repeats - 1))
    error = samples.std(0) / math.sqrt(repeats)
    assert bool(((samples.mean(0) - exact).abs() <= k * error + EXACT).all()), (
        samples.mean(0).tolist(),
        exact.tolist(),
        error.tolist(),
    )


def gradients_over_seeds(
    objective: lvppl.ELBO, started: Started, scale: float
) -> tuple[Tensor, Tensor]:
    losses, gradients = [], []
    for seed in range(REPEATS):
        pyro.set_rng_seed(seed)
        loss = objective.differentiable_loss(*started.call)
        losses.append(loss.detach() / scale)
        named = started.gradients(loss)
        gradients.append(torch.cat([g.flatten() for g in named.values()]) / scale)
    return torch.stack(losses), torch.stack(gradients)


# ------------------------------------------------------- grad ln p(y) = E_posterior grad ln p(z, y)


def joint_of(
    model: Callable[..., object], args: tuple[Tensor, ...], values: Mapping[str, Tensor]
) -> Tensor:
    """ln p(z, y) of the plain program, its latents held at `values`."""
    return poutine.trace(poutine.condition(model, data=values)).get_trace(*args).log_prob_sum()


def states_of(name: str) -> tuple[list[str], list[tuple[int, ...]]]:
    if name == "markov_in_model":
        return ["state_0", "state_1", "state_2"], list(itertools.product(range(2), repeat=3))
    if name == "chained_in_guide":
        return ["c1", "c2"], list(itertools.product(range(2), range(3)))
    return ["z"], [(k,) for k in range(3)]


@pytest.mark.parametrize(
    "name", ["mixture_in_model", "markov_in_model", "chained_in_guide", "categorical_in_guide"]
)
def test_gradient_of_the_evidence_is_the_posterior_mean_of_the_joint_gradient(name: str) -> None:
    """Fisher's identity.

    The ELBO with every latent summed out has the gradient of ln p(y). The other side runs the plain
    program once for each state of each datum, weighted by the exact posterior.
    """
    started = PROGRAMS[name].start()
    posterior = started.oracle().posterior.detach()
    model, _, *args = started.call
    sites, states = states_of(name)
    marked = poutine.infer_config(
        model, config_fn=lambda site: PARALLEL if site["name"] in sites else {}
    )
    loss = lvppl.ELBO().differentiable_loss(marked, lambda *args: None, *args)
    evidence = started.gradients(-loss)
    assert loss.item() == pytest.approx(
        -float(started.oracle().log_evidence.detach().sum()), abs=EXACT
    )

    expected = {key: torch.zeros_like(value) for key, value in started.parameters().items()}
    for datum, state in itertools.product(range(len(posterior)), states):
        one = tuple(a[datum : datum + 1] for a in args)
        values = {site: torch.tensor([s]) for site, s in zip(sites, state, strict=True)}
        gradient = started.gradients(joint_of(model, one, values))
        for key in expected:
            expected[key] += posterior[datum, states.index(state)] * gradient[key]
    for key, value in expected.items():
        torch.testing.assert_close(evidence[key], value, rtol=0, atol=EXACT, msg=key)


def test_hard_elbo_has_the_gradient_of_the_evidence_at_the_posterior() -> None:
    """With q at the posterior, the model's gradients of hard ELBO, ELBO and ln p(y) agree."""
    started = PROGRAMS["categorical_in_guide"].start()
    model, _, y = started.call
    posterior = started.oracle().posterior.detach()

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Categorical(probs=posterior), infer=PARALLEL)

    exact = started.gradients(started.oracle().log_evidence.sum())
    for objective in (lvppl.HardELBO(), lvppl.ELBO(form="kl"), lvppl.ELBO(form="entropy")):
        found = started.gradients(-objective.differentiable_loss(model, guide, y))
        for key in ("logits", "locs", "noise"):
            torch.testing.assert_close(found[key], exact[key], rtol=0, atol=EXACT)


# ---------------------------------------------------------------------------- the bound and its gap


CONJUGATE = [
    "normal_normal", "masked_observations", "scaled_likelihood", "subsampled", "pyro_module_guide",
    "auto_normal_local", "deterministic_and_factor", "two_observed_sites", "two_layer_top_down",
    "two_layer_bottom_up", "probabilistic_pca", "module_decoder", "global_normal",
    "linear_regression", "auto_normal", "auto_multivariate_normal",
]  # fmt: skip


@pytest.mark.parametrize("name", CONJUGATE)
def test_elbo_plus_kl_is_the_evidence_of_conjugate_models(name: str) -> None:
    """ELBO from the objective, KL(q, posterior) and ln p(y) from linear-Gaussian algebra."""
    program = PROGRAMS[name]
    oracle = program.start().oracle()
    assert isinstance(oracle.posterior, Gaussian)
    gap = oracle.scale * gaussian_kl(oracle.guide, oracle.posterior).sum().detach()
    evidence = oracle.scale * oracle.log_evidence.sum().detach()
    copies = 100 if program.tileable else 1
    started = program.start(repeats=copies)
    particles = 40 if program.tileable else 4000
    for form in ("kl", "entropy"):
        elbos = []
        for seed in range(REPEATS):
            pyro.set_rng_seed(seed)
            elbos.append(
                -lvppl.ELBO(num_particles=particles, form=form).loss(*started.call) / copies
            )
        assert_mean(torch.tensor(elbos, dtype=torch.float64) + gap, evidence)


@pytest.mark.parametrize(
    "name", ["two_layer_bottom_up", "two_layer_top_down", "mixture_prior", "nested_plates"]
)
def test_both_forms_estimate_one_number_and_one_gradient(name: str) -> None:
    """E_q ln p(y|z) - KL = E_q ln p(z, y) + H, also where an analytic KL would be wrong."""
    started = PROGRAMS[name].start(repeats=500)
    kl, entropy = (
        gradients_over_seeds(lvppl.ELBO(num_particles=10, form=form), started, 500.0)
        for form in ("kl", "entropy")
    )
    for first, second in zip(kl, entropy, strict=True):
        assert_mean(first - second, torch.zeros_like(first[0]))


def test_analytic_kl_where_it_is_right() -> None:
    """With one particle too, the rate is the closed form, without noise."""
    started = PROGRAMS["normal_normal"].start()
    report = lvppl.ELBO(form="kl").report(*started.call)
    torch.testing.assert_close(
        report.rate.per_datum, started.oracle().rate.detach(), rtol=0, atol=EXACT
    )


def test_rate_distortion_of_weight_one_is_the_elbo() -> None:
    for name in ("normal_normal", "bernoulli_score", "markov_in_model", "subsampled"):
        started = PROGRAMS[name].start()
        values = []
        for objective in (lvppl.RateDistortion(weight=1.0), lvppl.ELBO(form="kl")):
            pyro.set_rng_seed(2)
            values.append(objective.loss(*started.call))
        assert values[0] == pytest.approx(values[1], abs=EXACT), name


# ------------------------------------------------------------------ more particles, a tighter bound


def test_iwae_is_monotone_in_particles() -> None:
    """L_1 <= L_2 <= L_3 <= ln p(y), each matched to its exact value by enumeration."""
    program = PROGRAMS["bernoulli_score"]
    oracle = program.start().oracle()
    bounds = [oracle.iwae(k).sum().detach() for k in (1, 2, 3)]
    assert bounds[0] < bounds[1] < bounds[2] < oracle.log_evidence.sum()
    started = program.start(repeats=4000)
    for k, bound in zip((1, 2, 3), bounds, strict=True):
        values = []
        for seed in range(REPEATS):
            pyro.set_rng_seed(seed)
            values.append(-lvppl.IWAE(num_particles=k).loss(*started.call) / 4000)
        assert_mean(torch.tensor(values, dtype=torch.float64), bound)


def test_iwae_approaches_the_evidence() -> None:
    """ln p(y) - L_K = Var(w) / (2 K p(y)^2) + O(1/K^2): with 500 particles the bound is tight."""
    started = PROGRAMS["normal_normal"].start(repeats=200)
    evidence = float(started.oracle().log_evidence.detach().sum()) / 200
    pyro.set_rng_seed(0)
    value = -lvppl.IWAE(num_particles=500).loss(*started.call) / 200
    oracle = started.oracle()
    weight = (oracle.log_weight.detach() - oracle.log_evidence.detach().unsqueeze(-1)).exp()
    variance = oracle.mean(weight**2) - 1.0  # (data,)
    bias = float((variance / (2 * 500)).sum()) / 200
    error = math.sqrt(float((variance / 500).sum())) / 200
    assert abs(value + bias - evidence) < 5 * error


# ----------------------------------------------------------------------- reparameterising the prior


def learned_prior(y: Tensor) -> None:
    loc, scale = real("prior_loc", y.new_tensor(0.5)), positive("prior_scale", y.new_tensor(1.2))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(loc, scale))
        pyro.sample("y", dist.Normal(z, 0.7), obs=y)


def learned_prior_guide(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(0.6 * y + 0.1, 0.8))


def standard_prior(y: Tensor) -> None:
    """The same model with z = prior_loc + prior_scale * eps, eps ~ N(0, 1)."""
    loc, scale = real("prior_loc", y.new_tensor(0.5)), positive("prior_scale", y.new_tensor(1.2))
    with pyro.plate("data", len(y)):
        eps = pyro.sample("eps", dist.Normal(torch.zeros_like(loc), 1.0))
        pyro.sample("y", dist.Normal(loc + scale * eps, 0.7), obs=y)


def standard_prior_guide(y: Tensor) -> None:
    """The push-back of N(0.6 y + 0.1, 0.8) through that map."""
    loc, scale = real("prior_loc", y.new_tensor(0.5)), positive("prior_scale", y.new_tensor(1.2))
    with pyro.plate("data", len(y)):
        pyro.sample("eps", dist.Normal((0.6 * y + 0.1 - loc) / scale, 0.8 / scale))


@pytest.mark.parametrize("form", ["kl", "entropy"])
def test_learned_prior_equals_its_reparameterisation(form: str) -> None:
    """N(m, s) learned, or N(0, 1) and a learned affine map: one ELBO, one rate, draw by draw."""
    pyro.clear_param_store()
    y = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)
    pairs = [(learned_prior, learned_prior_guide), (standard_prior, standard_prior_guide)]
    reports = []
    for model, guide in pairs:
        pyro.set_rng_seed(4)
        reports.append(lvppl.ELBO(form=form, num_particles=3).report(model, guide, y))
    for name in ("elbo", "rate", "distortion"):
        first, second = (getattr(report, name).per_datum for report in reports)
        torch.testing.assert_close(first, second, rtol=0, atol=EXACT, msg=name)


# -------------------------------------------------------------------------------------- minibatches


def local_minibatch(index: Tensor) -> tuple[Callable[..., None], Callable[..., None]]:
    def model(y: Tensor) -> None:
        loc = real("prior_loc", y.new_tensor(0.4))
        with pyro.plate("data", len(y), subsample=index) as batch:
            z = pyro.sample("z", dist.Bernoulli(logits=loc), infer=PARALLEL)
            pyro.sample("y", dist.Normal(2.0 * z - 1.0, 0.7), obs=y[batch])

    def guide(y: Tensor) -> None:
        slope = real("slope", y.new_tensor(0.6))
        with pyro.plate("data", len(y), subsample=index) as batch:
            pyro.sample("z", dist.Bernoulli(logits=slope * y[batch]), infer=PARALLEL)

    return model, guide


def test_mean_minibatch_elbo_is_the_full_elbo() -> None:
    """Over all 10 minibatches of 2 from 5 data, exactly: loss, gradient and report."""
    pyro.clear_param_store()
    y = torch.tensor([0.3, -1.2, 2.0, 0.8, -0.4], dtype=torch.float64)
    subsets = [torch.tensor(s) for s in itertools.combinations(range(5), 2)]

    def evaluate(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model, guide = local_minibatch(index)
        loss = lvppl.ELBO().differentiable_loss(model, guide, y)
        names = ("prior_loc", "slope")
        gradient = torch.autograd.grad(loss, [pyro.param(n).unconstrained() for n in names])
        report = lvppl.ELBO().report(model, guide, y)
        return loss.detach(), torch.stack(gradient), report.rate.total

    full = evaluate(torch.arange(5))
    parts = [torch.stack(p).mean(0) for p in zip(*map(evaluate, subsets), strict=True)]
    for part, whole in zip(parts, full, strict=True):
        torch.testing.assert_close(part, whole, rtol=0, atol=EXACT)


def test_mean_minibatch_elbo_with_a_global_latent_is_the_full_elbo() -> None:
    """A global latent counts once, local ones are scaled; one seed gives the global one draw."""
    pyro.clear_param_store()
    y = torch.tensor([0.3, -1.2, 2.0, 0.8], dtype=torch.float64)

    def evaluate(index: Tensor) -> tuple[Tensor, Tensor]:
        def model(y: Tensor) -> None:
            mean = pyro.sample("mean", dist.Normal(y.new_tensor(0.0), 1.0))
            with pyro.plate("data", len(y), subsample=index) as batch:
                c = pyro.sample("c", dist.Bernoulli(y.new_tensor(0.3)), infer=PARALLEL)
                pyro.sample("y", dist.Normal(mean + c, 0.7), obs=y[batch])

        def guide(y: Tensor) -> None:
            loc = real("loc", y.new_tensor(0.2))
            pyro.sample("mean", dist.Normal(loc, 0.5))

        pyro.set_rng_seed(6)
        objective = lvppl.ELBO(form="entropy", num_particles=3)
        loss = objective.differentiable_loss(model, guide, y)
        (gradient,) = torch.autograd.grad(loss, [pyro.param("loc").unconstrained()])
        return loss.detach(), gradient

    full = evaluate(torch.arange(4))
    subsets = [torch.tensor(s) for s in itertools.combinations(range(4), 2)]
    parts = [torch.stack(p).mean(0) for p in zip(*map(evaluate, subsets), strict=True)]
    for part, whole in zip(parts, full, strict=True):
        torch.testing.assert_close(part, whole, rtol=0, atol=EXACT)


def test_subsampling_stays_outside_the_logarithm() -> None:
    """IWAE of a minibatch is the plate scale times the bounds of its data: no weight to a power."""
    started = PROGRAMS["subsampled"].start()
    index = [1, 3, 4]
    y = started.built.args[0]

    def whole(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample(
                "z", dist.Normal(real("prior_loc", None), positive("prior_scale", None))
            )
            pyro.sample("y", dist.Normal(z, positive("noise", None)), obs=y)

    def whole_guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            mean = real("slope", None) * y + real("shift", None)
            pyro.sample("z", dist.Normal(mean, positive("width", None)))

    objective = lvppl.IWAE(num_particles=5)
    pyro.set_rng_seed(7)
    part = objective.loss(*started.call)
    pyro.set_rng_seed(7)
    assert part == pytest.approx(2.0 * objective.loss(whole, whole_guide, y[index]), abs=EXACT)


# -------------------------------------------------------------------------------------- invariances


def test_masked_data_do_not_depend_on_the_filler() -> None:
    """Whatever stands in for a missing value, NaN-free: same loss and same gradients."""
    started = PROGRAMS["masked_data"].start()
    model, guide, y = started.call
    results = []
    for filler in (0.0, 1e3):
        pyro.set_rng_seed(8)
        filled = torch.where(torch.tensor([True, True, False]), y, filler)
        loss = lvppl.ELBO(num_particles=4).differentiable_loss(model, guide, filled)
        results.append((loss.detach(), started.gradients(loss)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=EXACT)
    for key, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][key], rtol=0, atol=EXACT)


def test_per_datum_values_follow_the_order_of_the_data() -> None:
    """Exact per-datum numbers permute with the data, whatever else is in the batch."""
    started = PROGRAMS["markov_in_model"].start(repeats=3)
    model, guide, y = started.call
    y = y + torch.arange(6, dtype=torch.float64)[:, None] / 7.0
    order = torch.tensor([4, 0, 5, 1, 3, 2])
    objective = lvppl.ELBO()
    elbo = objective.report(model, guide, y).elbo.per_datum
    permuted = objective.report(model, guide, y[order]).elbo.per_datum
    torch.testing.assert_close(permuted, elbo[order], rtol=0, atol=EXACT)
    alone = torch.cat([objective.report(model, guide, row[None]).elbo.per_datum for row in y])
    torch.testing.assert_close(alone, elbo, rtol=0, atol=EXACT)


def test_large_and_impossible_log_weights() -> None:
    """An impossible state has weight zero and breaks nothing: value and gradient stay exact."""
    pyro.clear_param_store()
    y = torch.tensor([0.3, -1.2], dtype=torch.float64)

    def model(y: Tensor) -> None:
        locs = real("locs", y.new_tensor([-400.0, 0.2, 500.0]))
        with pyro.plate("data", len(y)):
            probs = y.new_tensor([0.5, 0.5, 0.0])
            z = pyro.sample("z", dist.Categorical(probs), infer=PARALLEL)
            pyro.sample("y", dist.Normal(locs[z], 1.0), obs=y)

    loss = lvppl.ELBO().differentiable_loss(model, lambda y: None, y)
    expected = -(math.log(0.5) + log_normal(y, 0.2, 1.0)).sum()
    torch.testing.assert_close(loss.detach(), expected, rtol=0, atol=1e-9)
    (gradient,) = torch.autograd.grad(loss, [pyro.param("locs").unconstrained()])
    torch.testing.assert_close(
        gradient, y.new_tensor([0.0, -(y - 0.2).sum(), 0.0]), rtol=0, atol=1e-9
    )

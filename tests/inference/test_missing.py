"""Missing values against margins that are known: what leaves the likelihood, and what comes back.

Monte Carlo assertions allow 4.5 standard errors (5 where hundreds are looked at), with fixed seeds.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.distributions import constraints

import lvppl
import lvppl.missing
from lvppl.completion import completion
from lvppl.distributions import Autoregressive, HiddenMarkov
from lvppl.guides import AmortizedNormal
from lvppl.inference import sample_posterior
from lvppl.missing import MissingValues, filler, with_missing
from lvppl.models import MADE, VAE, FactorAnalysis, GaussianMixture, StudentTLikelihood
from lvppl.observed_part import completed, observed_part
from lvppl.terms import trace_terms
from tests.bad_inputs import by_the_last, hurdle

D = 4
NAN = math.nan


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def randn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def rand(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def close(found: Tensor, wanted: Tensor | float, tolerance: float = 1e-10) -> None:
    wanted = torch.as_tensor(wanted, dtype=found.dtype)
    torch.testing.assert_close(found, wanted.expand(found.shape), rtol=tolerance, atol=tolerance)


def with_holes(y: Tensor, seed: int = 1) -> Tensor:
    """A third of the elements missing; nothing of row 0, everything of row 1."""
    holes = rand(*y.shape, seed=seed) < 1 / 3
    holes[0], holes[1] = False, True
    return y.masked_fill(holes, NAN)


Y = with_holes(randn(7, D, seed=3))


# ------------------------------------------------------------- the margin of what was observed


def covariance(seed: int) -> Tensor:
    root = randn(D, D, seed=seed)
    return root @ root.T + 0.3 * torch.eye(D, dtype=torch.float64)


LOC, COV = randn(D, seed=5), covariance(6)
FACTOR, DIAGONAL = randn(D, 2, seed=7), 0.3 + rand(D, seed=8)
TWO, COVS = randn(2, D, seed=9), torch.stack([covariance(10), covariance(11)])
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def mixture(each: Any) -> Any:
    return dist.MixtureSameFamily(dist.Categorical(WEIGHTS), each)


def normal_margin(row: Tensor, loc: Tensor, cov: Tensor) -> Tensor:
    seen = ~row.isnan()
    if not bool(seen.any()):
        return torch.zeros((), dtype=torch.float64)
    return dist.MultivariateNormal(loc[seen], cov[seen][:, seen]).log_prob(row[seen])


def mixed_margin(row: Tensor, covs: Tensor) -> Tensor:
    each = torch.stack([normal_margin(row, loc, c) for loc, c in zip(TWO, covs, strict=True)])
    return (each + WEIGHTS.log()).logsumexp(0)


LOW_RANK = FACTOR @ FACTOR.T + torch.diag(DIAGONAL)
SPREAD = torch.tensor([[0.5, 1.0, 1.5, 2.0], [1.0, 1.0, 0.4, 0.8]], dtype=torch.float64)
MARGINS: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Tensor]]] = {
    "independent": (
        lambda: dist.Normal(LOC, COV.diag().sqrt()).to_event(1),
        lambda row: normal_margin(row, LOC, COV.diag().diag()),
    ),
    "MultivariateNormal": (
        lambda: dist.MultivariateNormal(LOC, COV),
        lambda row: normal_margin(row, LOC, COV),
    ),
    "LowRankMultivariateNormal": (
        lambda: dist.LowRankMultivariateNormal(LOC, FACTOR, DIAGONAL),
        lambda row: normal_margin(row, LOC, LOW_RANK),
    ),
    "mixture of independent elements": (
        lambda: mixture(dist.Normal(TWO, SPREAD).to_event(1)),
        lambda row: mixed_margin(row, torch.diag_embed(SPREAD**2)),
    ),
    "mixture of MultivariateNormal": (
        lambda: mixture(dist.MultivariateNormal(TWO, COVS)),
        lambda row: mixed_margin(row, COVS),
    ),
}


def observing(fn: Any) -> Callable[[Tensor], None]:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", fn(), obs=y)

    return model


@pytest.mark.parametrize("name", MARGINS)
def test_what_is_missing_is_integrated_out(name: str):
    fn, margin = MARGINS[name]
    wanted = torch.stack([margin(row) for row in Y])
    found = lvppl.log_evidence(observing(fn), Y, missing="nan").per_datum
    close(found, wanted)
    close(found[1], 0.0, 1e-12)  # of which nothing was observed
    # an expanded distribution has the same margins
    part = observed_part("y", fn().expand([7]), Y.isnan()).expand([3, 7])
    close(part.log_prob(Y.nan_to_num(9.0)), wanted.expand(3, 7))


@pytest.mark.parametrize("name", [n for n in MARGINS if "Multi" in n])
def test_gradients_of_a_margin(name: str):
    """d ln p(y_o) / d parameters, against the margin written out; nothing is NaN."""
    if "Low" in name:
        start = [LOC, FACTOR, DIAGONAL]
        build = dist.LowRankMultivariateNormal

        def by_hand(row: Tensor, loc: Tensor, w: Tensor, d: Tensor) -> Tensor:
            return normal_margin(row, loc, w @ w.T + torch.diag(d))
    elif "mixture" in name:
        start = [TWO, COVS]

        def build(loc: Tensor, cov: Tensor) -> Any:
            return mixture(dist.MultivariateNormal(loc, cov))

        def by_hand(row: Tensor, loc: Tensor, cov: Tensor) -> Tensor:
            each = [normal_margin(row, m, c) for m, c in zip(loc, cov, strict=True)]
            return (torch.stack(each) + WEIGHTS.log()).logsumexp(0)
    else:
        start, build, by_hand = [LOC, COV], dist.MultivariateNormal, normal_margin
    params = [p.clone().requires_grad_() for p in start]
    part = observed_part("y", build(*params), Y.isnan())
    found = torch.autograd.grad(part.log_prob(Y.nan_to_num(0.7)).sum(), params)
    wanted = torch.autograd.grad(sum(by_hand(row, *params) for row in Y), params)
    for a, b in zip(found, wanted, strict=True):
        # a covariance is symmetric: only the symmetric part of its gradient means anything
        symmetric = a.dim() > 1 and a.shape[-1] == a.shape[-2]
        close(a + a.mT if symmetric else a, b + b.mT if symmetric else b, 1e-9)


def chain(emission: Any) -> HiddenMarkov:
    transition = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
    return HiddenMarkov(WEIGHTS.log(), transition.log(), emission)


@pytest.mark.parametrize("joint", [False, True], ids=["independent", "MultivariateNormal"])
def test_steps_of_a_chain_that_are_missing_in_part(joint: bool):
    """ln p(y_o) by the sum over all paths, and the gradient of it; posteriors, too."""
    T, y = 3, randn(5, 3, D, seed=20)
    y = y.masked_fill(rand(5, 3, D, seed=21) < 0.4, NAN)
    y[1], y[2, 1] = NAN, NAN
    covs = COVS if joint else torch.diag_embed(SPREAD**2)
    loc = TWO.clone().requires_grad_()

    def emission() -> Any:
        return dist.MultivariateNormal(loc, COVS) if joint else dist.Normal(loc, SPREAD).to_event(1)

    model = observing(lambda: chain(emission()))
    found = lvppl.log_evidence(model, y, missing="nan").per_datum
    transition = chain(emission()).transition_logits
    paths = list(itertools.product(range(2), repeat=T))
    by_path = []
    for path in paths:
        total = WEIGHTS.log()[path[0]] + sum(transition[a, b] for a, b in itertools.pairwise(path))
        steps = [
            torch.stack([normal_margin(row[t], loc[z], covs[z]) for row in y])
            for t, z in enumerate(path)
        ]
        by_path.append(total + torch.stack(steps).sum(0))
    joint_log = torch.stack(by_path)
    wanted = joint_log.logsumexp(0)
    close(found, wanted)
    (a,), (b,) = (torch.autograd.grad(t.sum(), [loc], retain_graph=True) for t in (found, wanted))
    close(a, b, 1e-9)
    marginals = lvppl.posterior(model, y, missing="nan").marginals("y_states")
    weight = joint_log.detach().softmax(0)
    ones = torch.tensor(paths, dtype=torch.float64)  # (paths, T)
    close(marginals[..., 1], torch.einsum("pn,pt->nt", weight, ones))


def test_components_given_what_was_observed():
    """The posterior of the component inside a mixture, partly observed rows and all."""
    fn, _ = MARGINS["mixture of MultivariateNormal"]
    found = lvppl.posterior(observing(fn), Y, missing="nan").marginals("y_component")
    each = torch.stack(
        [
            torch.stack([normal_margin(row, m, c) for row in Y])
            for m, c in zip(TWO, COVS, strict=True)
        ]
    )
    close(found, (each + WEIGHTS.log()[:, None]).softmax(0).T)
    close(found[1], WEIGHTS)


# ----------------------------------------------------------------------------- an explicit mask


def small_vae(seed: int = 0) -> tuple[VAE, AmortizedNormal]:
    torch.manual_seed(seed)
    model = VAE(latent_dim=2, x_shape=(D,), likelihood=StudentTLikelihood)
    return model, AmortizedNormal(latent_dim=2, x_shape=(D,))


def masked_pair(model: VAE, guide: AmortizedNormal, how: str) -> tuple[Any, Any]:
    """The same pair with a mask of elements as an argument, as a user would write it."""

    def masked(x: Tensor, seen: Tensor) -> None:
        pyro.module("vae", model)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", model.prior())
            fn = model.decode(z).base_dist
            if how == "distribution":
                pyro.sample("x", fn.mask(seen).to_event(1), obs=x)
            else:
                with pyro.plate("elements", D, dim=-2), poutine.mask(mask=seen.T):
                    pyro.sample("x", elements(fn), obs=x.T)

    def encoded(x: Tensor, seen: Tensor) -> None:
        guide(x)

    return masked, encoded


def elements(fn: Any) -> Any:
    """The elements of (particles, 1, data, D) as a plate, (particles, D, data)."""
    turned = (t.squeeze(1).mT if t.dim() == 4 else t.mT for t in (fn.df, fn.loc, fn.scale))
    return dist.StudentT(*turned)


OBJECTIVES = {
    "ELBO": lambda: lvppl.ELBO(num_particles=3),
    "IWAE": lambda: lvppl.IWAE(num_particles=5),
    "IWAE, dreg": lambda: lvppl.IWAE(num_particles=5, gradient="dreg"),
}


def gradients(objective: Any, model: Any, guide: Any, args: Any, params: Any) -> list[Tensor]:
    pyro.set_rng_seed(3)
    loss = objective.differentiable_loss(model, guide, *args)
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return [loss.detach(), *(g for g in found if g is not None)]


@pytest.mark.parametrize("how", ["distribution", "poutine"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_missing_is_a_mask_of_elements(name: str, how: str):
    model, guide = small_vae()
    params = [*model.parameters(), *guide.parameters()]
    handled = with_missing(model, guide, "nan")
    found = gradients(OBJECTIVES[name](), *handled, (Y,), params)
    masked = masked_pair(model, guide, how)
    wanted = gradients(OBJECTIVES[name](), *masked, (Y.nan_to_num(0.0), ~Y.isnan()), params)
    assert len(found) == len(wanted) > 8
    for a, b in zip(found, wanted, strict=True):
        assert bool(a.isfinite().all())
        close(a, b, 1e-10)


@pytest.mark.filterwarnings("ignore:k-hat")
def test_a_fit_with_missing_values_is_that_with_a_mask():
    """Steps, minibatches and validation; the guide reads 0 where a value is missing."""
    held_out = with_holes(randn(6, D, seed=30))
    options: dict[str, Any] = {"num_epochs": 3, "batch_size": 3, "seed": 1, "progress": False}
    model, guide = small_vae()
    svi = lvppl.SVI(model, guide, objective=lvppl.IWAE(num_particles=4))
    fit = svi.fit(Y, missing="nan", validation=held_out, **options)
    masked = masked_pair(*small_vae(), "distribution")
    svi = lvppl.SVI(*masked, objective=lvppl.IWAE(num_particles=4))
    filled = [(y.nan_to_num(0.0), ~y.isnan()) for y in (Y, held_out)]
    wanted = svi.fit(*filled[0], validation=filled[1], **options)
    close(torch.tensor(fit.history["loss"]), torch.tensor(wanted.history["loss"]), 1e-12)
    close(
        torch.tensor(fit.history["validation_elbo"]),
        torch.tensor(wanted.history["validation_elbo"]),
        1e-12,
    )
    # and what is asked of the fit takes NaN as it did
    assert fit.settings["missing"] == "nan"
    estimate = fit.log_likelihood(Y, num_samples=50, seed=0)
    close(estimate.log_prob, wanted.log_likelihood(*filled[0], num_samples=50, seed=0).log_prob)
    drawn = fit.posterior(Y, num_samples=5, seed=0)
    close(drawn.log_weight, wanted.posterior(*filled[0], num_samples=5, seed=0).log_weight)
    elbos = fit.report(Y, seed=0).elbo, wanted.report(*filled[0], seed=0).elbo
    close(elbos[0].per_datum, elbos[1].per_datum)
    assert torch.equal(drawn.observed["x"].isnan(), Y.isnan())


def test_a_users_mask_and_missing_values_go_together():
    """The mask hides further elements; both leave the likelihood."""
    hidden = rand(*Y.shape, seed=40) < 0.3

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(LOC, 1.3).mask(~hidden).to_event(1), obs=y)

    found = lvppl.log_evidence(model, Y, missing="nan").per_datum
    each = dist.Normal(LOC, 1.3).log_prob(Y.nan_to_num(0.0))
    close(found, torch.where(Y.isnan() | hidden, 0.0, each).sum(-1))


# -------------------------------------------------------------------------- fillers never leak


def discrete_mixture(y: Tensor) -> None:
    loc = pyro.param("loc", TWO.clone())
    scale = pyro.param("scale", SPREAD.clone(), constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(WEIGHTS), infer={"enumerate": "parallel"})
        pyro.sample("y", dist.Normal(loc[z], scale[z]).to_event(1), obs=y)


def positive_data(y: Tensor) -> None:
    shape = pyro.param("shape", torch.tensor([1.0, 2.0, 3.0, 0.5]), constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("y", dist.Gamma(shape, z.exp()[..., None]).to_event(1), obs=y)


def gaussian_data(y: Tensor) -> None:
    root = pyro.param("root", torch.linalg.cholesky(COV))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
        pyro.sample("y", dist.MultivariateNormal(z[..., None] + LOC, scale_tril=root), obs=y)


def reading(y: Tensor) -> None:
    """A guide that reads every element of a datum."""
    slope, shift = (pyro.param(n, torch.tensor(v)) for n, v in (("slope", 0.1), ("shift", 0.2)))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(slope * y.sum(-1) + shift, 0.8))


LEAKS: dict[str, tuple[Any, Any, Tensor]] = {
    "enumerated": (discrete_mixture, lambda y: None, Y),
    "positive": (positive_data, reading, Y.exp()),
    "coupled": (gaussian_data, reading, Y),
}


def everything(model: Any, guide: Any, y: Tensor) -> list[Tensor]:
    """Losses, gradients, estimates, imputations and draws."""
    pyro.clear_param_store()
    handled = with_missing(model, guide, "nan")
    lvppl.ELBO().loss(*handled, y)  # makes the parameters
    params = [p for _, p in sorted(pyro.get_param_store().named_parameters())]
    found = []
    for objective in (lvppl.ELBO(num_particles=2), lvppl.IWAE(num_particles=3)):
        found += gradients(objective, *handled, (y,), params)
    options: dict[str, Any] = {"guide": guide, "num_samples": 40, "seed": 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found.append(lvppl.log_likelihood(model, y, missing="nan", **options).log_prob)
        imputed = lvppl.impute(model, y, num_imputations=3, **options)
    found += [imputed.values["y"], imputed.draws["y"], imputed.std_error["y"]]
    drawn = sample_posterior(model, guide, y, num_samples=4, seed=5, missing="nan")
    found += [drawn.log_weight, drawn.predictive["y"], *drawn.samples.values()]
    return [tensor.detach() for tensor in found]


@pytest.mark.parametrize("name", LEAKS)
def test_fillers_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    model, guide, y = LEAKS[name]
    before = everything(model, guide, y)

    def other(fn: Any, like: Tensor) -> Tensor:
        return filler(fn, like) + 0.37 + rand(*like.shape, seed=50)  # of each element its own

    monkeypatch.setattr(lvppl.missing, "filler", other)
    after = everything(model, guide, y)
    assert len(before) == len(after) >= 10
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
        assert bool(a.isfinite().all())


def test_fillers_change_nothing_of_em(monkeypatch: pytest.MonkeyPatch):
    def run() -> Any:
        pyro.clear_param_store()
        return lvppl.EM(discrete_mixture).fit(
            Y, missing="nan", max_iter=4, tol=0.0, seed=0, progress=False
        )

    before = run()
    monkeypatch.setattr(lvppl.missing, "filler", lambda fn, like: filler(fn, like) + 3.0)
    after = run()
    for name, value in before.params.items():
        close(after.params[name], value, 1e-12)
    close(
        torch.tensor(after.history["objective"]), torch.tensor(before.history["objective"]), 1e-12
    )


FAMILIES = {
    "Normal": lambda: dist.Normal(0.0, 1.0),
    "Gamma": lambda: dist.Gamma(2.0, 1.0),
    "Beta": lambda: dist.Beta(2.0, 1.0),
    "Uniform": lambda: dist.Uniform(-3.0, -2.0),
    "Uniform, each its own": lambda: dist.Uniform(
        torch.tensor([0.0, 5.0, -9.0, 1.0]), torch.tensor([1.0, 6.0, -8.0, 2.0])
    ),
    "Pareto": lambda: dist.Pareto(torch.tensor(3.0), 1.0),
    "Bernoulli": lambda: dist.Bernoulli(0.3),
    "Poisson": lambda: dist.Poisson(2.0),
    "Geometric": lambda: dist.Geometric(0.3),
    "Categorical": lambda: dist.Categorical(WEIGHTS),
    "VonMises": lambda: dist.VonMises(0.0, 1.0),
    "Dirichlet": lambda: dist.Dirichlet(torch.ones(D)),
    "OneHotCategorical": lambda: dist.OneHotCategorical(torch.ones(D)),
    "a grid": lambda: lvppl.distributions.DiscretizedLogistic(
        torch.tensor(1.0), torch.tensor(1.0), low=0.5, high=2.5, num_levels=5
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_filler_lies_in_the_support(family: str):
    fn = FAMILIES[family]()
    like = torch.zeros(3, D)
    fn = fn.expand([3] if fn.event_shape else [3, D])
    value = torch.where(torch.ones(3, D, dtype=torch.bool), filler(fn, like), like)
    assert value.shape == like.shape
    assert bool(fn.support.check(value).all())
    state = torch.random.get_rng_state()
    filler(fn, like)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_datum_of_which_nothing_was_observed_has_the_prior():
    nothing = torch.full((3, D), NAN)
    estimate = lvppl.log_likelihood(
        gaussian_data, nothing, estimator="prior", num_samples=30, missing="nan", seed=0
    )
    assert torch.equal(estimate.log_prob, torch.zeros(3))
    posterior = lvppl.posterior(discrete_mixture, nothing, missing="nan")
    close(posterior.marginals("z"), WEIGHTS.expand(3, 2), 1e-14)
    close(posterior.log_evidence.per_datum, 0.0, 1e-14)
    imputed = lvppl.impute(discrete_mixture, nothing, num_samples=1)
    close(imputed.values["y"], (WEIGHTS @ TWO).expand(3, D), 1e-12)


def test_bits_per_dimension_count_what_was_observed():
    for name, (fn, _) in MARGINS.items():
        estimate = lvppl.log_likelihood(
            observing(fn), Y, estimator="exact", bin_width=0.1, missing="nan"
        )
        assert estimate.num_continuous == int((~Y.isnan()).sum()), name


# -------------------------------------------------------- linear-Gaussian: MIWAE and the evidence


def analyser() -> FactorAnalysis:
    torch.manual_seed(1)
    model = FactorAnalysis(D, 2)
    with torch.no_grad():
        model.noise_scale = torch.tensor([0.5, 0.8, 1.1, 0.7])
        model.loc = LOC.clone()
    return model


def evidence(model: FactorAnalysis, y: Tensor) -> Tensor:
    cov = model.weight @ model.weight.T + torch.diag(model.noise_scale**2)
    return torch.stack([normal_margin(row, model.loc, cov) for row in y])


def conditional(model: FactorAnalysis, y: Tensor) -> tuple[Tensor, Tensor]:
    """E[y | y_o] and sd[y | y_o] by the algebra of Gaussians."""
    cov = (model.weight @ model.weight.T + torch.diag(model.noise_scale**2)).detach()
    mean, sd = y.clone(), torch.zeros_like(y)
    for i, row in enumerate(y):
        o, m = ~row.isnan(), row.isnan()
        gain = cov[m][:, o] @ torch.linalg.inv(cov[o][:, o])
        mean[i, m] = model.loc.detach()[m] + gain @ (row[o] - model.loc.detach()[o])
        sd[i, m] = (cov[m][:, m] - gain @ cov[o][:, m]).diag().sqrt()
    return mean, sd


def exact_guide(model: FactorAnalysis, spread: float = 1.0) -> Callable[[Tensor, Tensor], None]:
    """p(z | y_o), wider by ``spread``; what is observed is an argument."""

    def guide(y: Tensor, seen: Tensor) -> None:
        W, σ = model.weight.detach(), model.noise_scale.detach()
        scaled = seen.unsqueeze(-1) * W / σ[:, None] ** 2  # (data, D, d)
        precision = torch.eye(2) + W.T @ scaled
        rest = (y - model.loc.detach()).masked_fill(~seen, 0.0)
        mean = torch.linalg.solve(precision, (rest.unsqueeze(-2) @ scaled).squeeze(-2))
        root = torch.linalg.cholesky(torch.linalg.inv(precision)) * spread
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.MultivariateNormal(mean, scale_tril=root))

    return guide


def with_mask(model: FactorAnalysis) -> Callable[[Tensor, Tensor], Any]:
    return lambda y, seen: model(y)


def test_gaussian_latents_are_integrated_given_what_was_observed():
    """ln p(y_o), its gradient and p(z | y_o), by the algebra of Gaussians."""
    model = analyser()
    params = list(model.parameters())
    found = lvppl.log_evidence(model, Y, missing="nan").per_datum
    wanted = evidence(model, Y)
    close(found, wanted, 1e-9)
    close(lvppl.log_likelihood(model, Y, estimator="exact", missing="nan").log_prob, wanted, 1e-9)
    for a, b in zip(*(torch.autograd.grad(t.sum(), params) for t in (found, wanted)), strict=True):
        close(a, b, 1e-8)
    moments = lvppl.posterior(model, Y, missing="nan").moments("z")
    fn = poutine.trace(exact_guide(model)).get_trace(Y, ~Y.isnan()).nodes["z"]["fn"]
    close(moments.mean, fn.mean, 1e-9)
    close(moments.covariance, fn.covariance_matrix, 1e-9)


def test_a_checkpoint_of_incomplete_data(tmp_path: Any):
    model = analyser()
    options: dict[str, Any] = {"estimator": "prior", "num_samples": 30, "missing": "nan"}
    options["checkpoint"] = tmp_path / "likelihood.pt"
    first = lvppl.log_likelihood(model, Y, seed=3, **options)
    assert torch.equal(lvppl.log_likelihood(model, Y, **options).log_prob, first.log_prob)
    with pytest.raises(lvppl.ProgramError, match="checkpoint"):
        lvppl.log_likelihood(model, with_holes(Y, seed=77), **options)


def test_miwae_is_exact_under_the_exact_posterior():
    """Every weight is p(y_o): the bound is tight and has no noise, for any K."""
    model = analyser()
    handled = with_missing(with_mask(model), exact_guide(model), "nan")
    for particles in (1, 5):
        objective = lvppl.IWAE(num_particles=particles)
        bound = objective.report(*handled, Y, ~Y.isnan()).bound.per_datum
        close(bound, evidence(model, Y).detach(), 1e-10)


def test_miwae_bounds_grow_with_k_to_the_evidence():
    """E L_1 < E L_5 < E L_50 < ln p(y_o), each within its error of what it should be."""
    model = analyser()
    handled = with_missing(with_mask(model), exact_guide(model, 1.5), "nan")
    rows = Y.repeat(4000, 1)
    target = evidence(model, Y).detach().repeat(4000)
    gaps, errors = [], []
    for seed, particles in enumerate((1, 5, 50)):
        pyro.set_rng_seed(seed)
        bound = lvppl.IWAE(num_particles=particles).report(*handled, rows, ~rows.isnan()).bound
        gap = target - bound.per_datum
        gaps.append(float(gap.mean()))
        errors.append(float(gap.std()) / len(gap) ** 0.5)
    # L_1 falls short by KL(q, p(z | y_o)): covariances differ by 1.5², in two dimensions
    assert abs(gaps[0] - (1.5**2 - 1 - math.log(1.5**2))) < 4.5 * errors[0]
    # and L_50 by Var(w / p) / 100 to first order, with Var(w / p) = E_q w² / p² - 1
    second = second_moment(1.5) ** 2
    assert abs(gaps[2] - (second - 1) / 100) < 4.5 * errors[2] + 0.2 * (second - 1) / 100
    assert gaps[0] - gaps[1] > 4.5 * (errors[0] + errors[1])
    assert gaps[1] - gaps[2] > 4.5 * (errors[1] + errors[2])
    assert gaps[2] > 4.5 * errors[2]


def second_moment(spread: float) -> float:
    """E_q (p / q)² in one dimension, p = N(0, 1), q = N(0, spread²), by quadrature."""
    x = torch.linspace(-12, 12, 20001)
    p, q = dist.Normal(0.0, 1.0).log_prob(x), dist.Normal(0.0, spread).log_prob(x)
    return float(torch.trapezoid((2 * p - q).exp(), x))


def test_miwae_gradients_are_those_of_the_evidence():
    """Under the exact posterior, the mean gradient is that of ln p(y_o) (Fisher's identity)."""
    model = analyser()
    params = list(model.parameters())
    handled = with_missing(with_mask(model), exact_guide(model), "nan")
    wanted = torch.autograd.grad(-evidence(model, Y).sum(), params)
    draws = []
    for seed in range(300):
        pyro.set_rng_seed(seed)
        loss = lvppl.IWAE(num_particles=20).differentiable_loss(*handled, Y, ~Y.isnan())
        draws.append([g.flatten() for g in torch.autograd.grad(loss, params)])
    for found, exact in zip(zip(*draws, strict=True), wanted, strict=True):
        sample = torch.stack(found)
        error = sample.std(0) / len(sample) ** 0.5
        assert bool(((sample.mean(0) - exact.flatten()).abs() < 4.5 * error + 1e-10).all())


def test_estimates_of_the_observed_evidence():
    model = analyser()
    for estimator in ("prior", "importance"):
        guide = exact_guide(model, 1.3) if estimator == "importance" else None
        found = lvppl.log_likelihood(
            with_mask(model),
            Y,
            ~Y.isnan(),
            guide=guide,
            estimator=estimator,
            num_samples=4000,
            missing="nan",
            seed=0,
        )
        gap = (found.log_prob - evidence(model, Y).detach()).abs()
        assert bool((gap < 4.5 * found.std_error + 1e-12).all())


# ---------------------------------------------------------------------------------- imputation


def test_imputation_of_a_factor_analyser():
    model = analyser()
    mean, sd = conditional(model, Y)
    holes = Y.isnan()
    options: dict[str, Any] = {"guide": exact_guide(model, 1.3), "num_samples": 8000, "seed": 0}
    found = lvppl.impute(with_mask(model), Y, ~holes, num_imputations=60, **options)
    gap = (found.values["y"] - mean)[holes].abs()
    assert bool((gap < 4.5 * found.std_error["y"][holes]).all())
    assert float(found.std_error["y"][holes].max()) < 0.05
    assert bool(((found.std["y"] / sd)[holes] - 1).abs().max() < 0.08)
    for key in ("std", "std_error"):
        assert torch.equal(getattr(found, key)["y"][~holes], torch.zeros(int((~holes).sum())))
    # what was observed is untouched, to the last bit
    assert torch.equal(found.values["y"][~holes], Y[~holes])
    assert torch.equal(found.draws["y"][:, ~holes], Y[~holes].expand(60, -1))
    # multiple imputations: mean and variance of independent draws
    drawn = found.draws["y"][:, holes]
    score = (drawn.mean(0) - mean[holes]) / (sd[holes] / 60**0.5)
    assert float(score.abs().max()) < 4.5
    ratio = drawn.var(0) / sd[holes] ** 2  # chi² with 59 degrees of freedom, over them
    assert float((ratio - 1).abs().max()) < 4.5 * (2 / 59) ** 0.5
    # the weights are those of the likelihood estimate
    estimate = lvppl.log_likelihood(with_mask(model), Y, ~holes, missing="nan", **options)
    assert torch.equal(found.estimate.log_prob, estimate.log_prob)
    assert torch.equal(found.ess, estimate.ess)
    assert torch.equal(found.khat, estimate.khat)


def test_errors_of_imputations_are_honest():
    """Means of repetitions scatter about the truth as their stated errors say."""
    model = analyser()
    mean, _ = conditional(model, Y)
    holes = Y.isnan()
    guide = exact_guide(model, 1.3)
    scores = []
    for seed in range(100):
        found = lvppl.impute(with_mask(model), Y, ~holes, guide=guide, num_samples=300, seed=seed)
        scores.append(((found.values["y"] - mean) / found.std_error["y"])[holes])
    square = torch.stack(scores).square().mean(0)  # 100 squares of unit normals, about
    assert float((square - 1).abs().max()) < 5 * (2 / 100) ** 0.5


def test_imputations_do_not_depend_on_chunks():
    model = analyser()
    options: dict[str, Any] = {"num_samples": 300, "num_imputations": 7, "seed": 4}
    whole = lvppl.impute(model, Y, **options)
    parts = lvppl.impute(model, Y, batch_size=3, sample_chunk=37, **options)
    for key in ("values", "std", "std_error"):
        close(getattr(parts, key)["y"], getattr(whole, key)["y"], 1e-12)
    assert torch.equal(parts.draws["y"], whole.draws["y"])


COMPLETED = [name for name in MARGINS if name != "independent"]


def by_components(name: str, y: Tensor) -> tuple[Tensor, Tensor]:
    """E[y | y_o] and sd[y | y_o] of a Gaussian, or of a mixture of two, by algebra."""
    locs, covs, weights = {
        "MultivariateNormal": (LOC[None], COV[None], torch.ones(1)),
        "LowRankMultivariateNormal": (LOC[None], LOW_RANK[None], torch.ones(1)),
        "mixture of independent elements": (TWO, torch.diag_embed(SPREAD**2), WEIGHTS),
        "mixture of MultivariateNormal": (TWO, COVS, WEIGHTS),
    }[name]
    mean, sd = y.clone(), torch.zeros_like(y)
    for i, row in enumerate(y):
        o, m = ~row.isnan(), row.isnan()
        logs, means, variances = [], [], []
        for loc, cov in zip(locs, covs, strict=True):
            gain = cov[m][:, o] @ torch.linalg.inv(cov[o][:, o])
            logs.append(normal_margin(row, loc, cov))
            means.append(loc[m] + gain @ (row[o] - loc[o]))
            variances.append((cov[m][:, m] - gain @ cov[o][:, m]).diag())
        r = (torch.stack(logs) + weights.log()).softmax(0)[:, None]
        first = (r * torch.stack(means)).sum(0)
        second = (r * (torch.stack(variances) + torch.stack(means) ** 2)).sum(0)
        mean[i, m], sd[i, m] = first, (second - first**2).sqrt()
    return mean, sd


@pytest.mark.parametrize("name", COMPLETED)
def test_completions_of_coupled_events(name: str):
    """Without latents the mean is exact; draws have its moments, and keep what was observed."""
    fn, _ = MARGINS[name]
    mean, sd = by_components(name, Y)
    holes, count = Y.isnan(), 2000
    found = lvppl.impute(observing(fn), Y, num_samples=count, num_imputations=count, seed=0)
    close(found.values["y"], mean, 1e-9)
    close(found.std["y"], sd, 1e-7)
    assert float(found.std_error["y"].max()) == 0.0
    drawn = found.draws["y"]
    assert torch.equal(drawn[:, ~holes], Y[~holes].expand(count, -1))
    error = sd[holes] / count**0.5
    assert bool(((drawn.mean(0) - mean)[holes].abs() < 4.5 * error).all())
    square = ((drawn - mean) ** 2)[:, holes]
    error = square.std(0) / count**0.5
    assert bool(((square.mean(0) - sd[holes] ** 2).abs() < 4.5 * error).all())


def test_draws_of_a_gaussian_completion_are_correlated_as_they_should_be():
    row = Y.clone()[3:4]
    row[0] = torch.tensor([0.4, NAN, NAN, -0.2])
    found = lvppl.impute(
        observing(MARGINS["MultivariateNormal"][0]),
        row,
        num_samples=4000,
        num_imputations=4000,
        seed=0,
    )
    o, m = torch.tensor([0, 3]), torch.tensor([1, 2])
    gain = COV[m][:, o] @ torch.linalg.inv(COV[o][:, o])
    wanted = (COV[m][:, m] - gain @ COV[o][:, m])[0, 1]
    centred = found.draws["y"][:, 0, m] - found.values["y"][0, m]
    product = centred.prod(-1)
    assert abs(float(product.mean() - wanted)) < 4.5 * float(product.std()) / 4000**0.5


def test_enumerated_latents_are_averaged_over():
    """E[y_m | y_o] = Σ_k p(k | y_o) μ_k, exactly, with one draw; imputations draw the state."""
    found = lvppl.impute(discrete_mixture, Y, num_samples=3000, num_imputations=3000, seed=1)
    once = lvppl.impute(discrete_mixture, Y, num_samples=1)
    mean, sd = by_components("mixture of independent elements", Y)
    for result in (found, once):
        close(result.values["y"], mean, 1e-10)
        close(result.std["y"], sd, 1e-8)
    holes = Y.isnan()
    score = (found.draws["y"].mean(0) - mean)[holes] / (sd[holes] / 3000**0.5)
    assert float(score.abs().max()) < 4.5


@pytest.mark.filterwarnings("ignore:k-hat")
def test_imputation_by_a_fit():
    """EM's is exact; SVI's is that of its programs at its parameters."""
    start = GaussianMixture.from_data(Y.nan_to_num(0.0), 2, covariance="diag")
    fit = lvppl.EM(start).fit(Y, missing="nan", max_iter=5, tol=0.0, seed=0, progress=False)
    marginals = fit.posterior(Y).marginals("z")
    found = fit.impute(Y)
    loc = next(value for name, value in fit.params.items() if name.endswith("loc"))
    wanted = torch.where(Y.isnan(), marginals @ loc, Y)
    close(found.values["y"], wanted, 1e-10)
    model, guide = small_vae()
    fit = lvppl.SVI(model, guide).fit(Y, missing="nan", num_steps=5, seed=0, progress=False)
    found = fit.impute(Y, num_samples=30, seed=1)
    with fit.active():
        wanted = lvppl.impute(model, Y, guide=guide, num_samples=30, seed=1)
    assert torch.equal(found.values["x"], wanted.values["x"])


def test_sites_in_inner_plates_are_imputed_in_their_shape():
    """Elements in a plate to the left of the data's; two observed sites, one of them complete."""
    first, second = Y.T.clone(), randn(7, seed=60)

    def model(a: Tensor, b: Tensor) -> None:
        with pyro.plate("data", len(b), dim=-1):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4)), infer={"enumerate": "parallel"})
            pyro.sample("b", dist.Normal(z, 1.0), obs=b)
            with pyro.plate("features", D, dim=-2):
                pyro.sample("a", dist.Normal(2 * z + LOC[:, None], 0.7), obs=a)

    found = lvppl.impute(model, first, second, num_samples=1)
    each = dist.Normal(2 * torch.arange(2.0)[:, None, None] + LOC[:, None], 0.7)
    logs = torch.where(first.isnan(), 0.0, each.log_prob(first.nan_to_num(0.0))).sum(1)
    logs = logs + dist.Normal(torch.arange(2.0)[:, None], 1.0).log_prob(second)
    p = (logs + torch.tensor([[0.6], [0.4]]).log()).softmax(0)[1]
    close(found.values["a"], torch.where(first.isnan(), 2 * p + LOC[:, None], first), 1e-10)
    assert torch.equal(found.values["b"], second)
    assert found.plates["a"] == ("features", "data")


PAIR = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)


@pytest.mark.parametrize("marked", [False, True], ids=["guide", "guide and model"])
def test_an_enumerated_guide_proposes_but_does_not_decide(marked: bool):
    """E[y_2 | y_1] = tanh(y_1) under equal weights, whatever q says; imputations, too."""

    def model(y: Tensor) -> None:
        infer = {"enumerate": "parallel"} if marked else {}
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.5, 0.5])), infer=infer)
            pyro.sample("y", dist.Normal(PAIR[k], 1.0).to_event(1), obs=y)

    def guide(y: Tensor, how: str | None = "parallel") -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("k", dist.Categorical(torch.tensor([0.7, 0.3])), infer={"enumerate": how})

    y = torch.tensor([[1.0, NAN]]).repeat(3, 1)
    options: dict[str, Any] = {"num_samples": 4000, "num_imputations": 400, "seed": 0}
    found = lvppl.impute(model, y, guide=guide, **options)
    gap = (found.values["y"][:, 1] - math.tanh(1.0)).abs()
    error = found.std_error["y"][:, 1]
    assert bool((gap < 4.5 * error).all()) and 0 < float(error.min()) < 0.02
    sd = math.sqrt(2 - math.tanh(1.0) ** 2)
    score = (found.draws["y"][..., 1].mean(0) - math.tanh(1.0)) / (sd / 20)
    assert float(score.abs().max()) < 4.5
    if not marked:  # draws are those of the same guide without the mark
        drawn = lvppl.impute(model, y, guide=lambda y: guide(y, None), **options)
        assert torch.equal(found.values["y"], drawn.values["y"])


def test_a_wholly_missing_event_of_a_mixture_has_the_prior_weights():
    """Where nothing is missing in part: the filler does not say which component it was."""
    loc = torch.tensor([[-3.0, -3.0], [1.0, 1.0]])
    half = dist.Categorical(torch.tensor([0.5, 0.5]))
    for each in (
        dist.Normal(loc, 1.0).to_event(1),
        dist.MultivariateNormal(loc, torch.eye(2)),
    ):
        fn = dist.MixtureSameFamily(half, each)
        found = lvppl.impute(
            observing(lambda fn=fn: fn),
            torch.tensor([[NAN, NAN], [1.0, 2.0]]),
            num_samples=4000,
            num_imputations=4000,
            seed=0,
        )
        close(found.values["y"], torch.tensor([[-1.0, -1.0], [1.0, 2.0]]))
        close(found.std["y"], torch.tensor([[5.0, 5.0], [0.0, 0.0]]).sqrt())
        score = (found.draws["y"][:, 0].mean(0) + 1.0) / (5 / 4000) ** 0.5
        assert float(score.abs().max()) < 4.5


def test_spread_far_from_zero_in_single_precision():
    """sd[y | y_o] is not the difference of two large squares."""

    def single(y: Tensor) -> None:
        loc, scale = torch.tensor([1000.0, 1001.0]).float(), torch.tensor(0.1).float()
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, scale).to_event(1), obs=y)

    def mixed(y: Tensor) -> None:
        loc, scale = torch.tensor([1000.0, 1001.0]).float(), torch.tensor(0.1).float()
        with pyro.plate("data", len(y)):
            k = pyro.sample(
                "k",
                dist.Categorical(torch.tensor([0.5, 0.5]).float()),
                infer={"enumerate": "parallel"},
            )
            pyro.sample("y", dist.Normal(loc[k], scale), obs=y)

    y = torch.tensor([[NAN, 1001.0], [NAN, NAN]], dtype=torch.float32)
    found = lvppl.impute(single, y, num_samples=10)
    assert found.std["y"].dtype == torch.float32
    close(found.std["y"], torch.tensor([[0.1, 0.0], [0.1, 0.1]]), 1e-6)
    found = lvppl.impute(mixed, y[:1, 0], num_samples=10)
    close(found.values["y"], 1000.5, 1e-6)
    close(found.std["y"], math.sqrt(0.1**2 + 0.5**2), 1e-6)


def test_averages_of_draws_have_an_error_without_latents():
    """Where a distribution has no mean, values are those of S draws, and so is their error."""
    fn = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.SigmoidTransform()])
    y = torch.tensor([0.3, NAN]).repeat(200)
    found = lvppl.impute(observing(lambda: fn), y, num_samples=50, num_imputations=50, seed=0)
    holes = y.isnan()
    drawn = found.draws["y"][:, holes]
    close(found.values["y"][holes], drawn.mean(0))
    close(found.std["y"][holes], drawn.std(0, correction=0))
    close(found.std_error["y"][holes], drawn.std(0, correction=0) / 50**0.5)
    score = (found.values["y"][holes] - 0.5) / found.std_error["y"][holes]
    assert abs(float(score.square().mean()) - 1) < 5 * (2 / 200) ** 0.5
    assert float(found.std_error["y"][~holes].max()) == 0.0


def test_levels_of_a_subclass_of_categorical_have_no_mean():
    fn = dist.OrderedLogistic(torch.tensor(0.2), torch.tensor([-1.0, 1.0]))
    y = torch.tensor([1.0, NAN])
    with pytest.raises(lvppl.ProgramError, match=r"levels of 'y' are missing.*OrderedLogistic"):
        lvppl.impute(observing(lambda: fn), y, num_samples=5)
    found = lvppl.impute(observing(lambda: fn), y, num_samples=2000, num_imputations=2000, seed=0)
    assert bool(found.values["y"][1].isnan())
    p = torch.stack([(found.draws["y"][:, 1] == k).double().mean() for k in range(3)])
    error = (fn.probs * (1 - fn.probs) / 2000).sqrt()
    assert bool(((p - fn.probs).abs() < 4.5 * error).all())


TRANSFORMED: dict[str, Callable[[Tensor], Any]] = {
    "positive, shifted by nothing": lambda loc: dist.TransformedDistribution(
        dist.Normal(loc, 1.0),
        [dist.transforms.ExpTransform(), dist.transforms.AffineTransform(0.0, 2.0)],
    ),
    "above 3": lambda loc: dist.TransformedDistribution(
        dist.Gamma(loc.exp(), 1.0), [dist.transforms.AffineTransform(3.0, 0.5)]
    ),
    "on a simplex": lambda loc: dist.LogisticNormal(loc + torch.zeros(2), torch.ones(2)),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_gradients_beside_a_filler_of_transformed_distributions(name: str):
    """The codomain that the last transform declares is wider than the support."""
    loc = torch.tensor(0.3, requires_grad=True)
    fn = TRANSFORMED[name](loc)
    torch.manual_seed(0)
    seen = fn.sample((3,)).detach()
    y = torch.cat([seen[:1], torch.full_like(seen[:2], NAN), seen[1:]])
    found = lvppl.log_evidence(observing(lambda: TRANSFORMED[name](loc)), y, missing="nan")
    wanted = fn.log_prob(seen).sum()
    close(found.total, wanted)
    (a,), (b,) = (torch.autograd.grad(t, [loc]) for t in (found.total, wanted))
    close(a, b)
    value = filler(fn, y)
    assert bool(fn.log_prob(value.expand(y.shape)).isfinite().all())


@pytest.mark.parametrize("phase", ["sleep", "both"])
def test_dreams_and_missing_values_do_not_go_together(phase: str):
    """Whether or not these rows miss something: the next minibatch may."""
    model, guide = small_vae()
    objective = lvppl.ReweightedWakeSleep(num_particles=2, phase=phase)
    for y in (Y, Y.nan_to_num(0.0)):
        with pytest.raises(lvppl.ProgramError, match=r"do not go together.*'x'.*phase='wake'"):
            objective.loss_and_grads(*with_missing(model, guide, "nan"), y)


# ------------------------------------------------------------------- models that decide by a NaN


STEPS = torch.tensor([[NAN, 1.0], [1.0, 1.0]])


def test_a_model_that_compares_a_missing_value_is_refused():
    """By every route; complete data, or what a comparison never sees, are as they were."""
    message = "takes a missing value for a number.*Make it a latent"
    sizes = torch.tensor([NAN, 1.0, 0.0])
    for model, y in ((hurdle, sizes), (by_the_last, STEPS)):
        for attempt in (
            lambda m, y: lvppl.check(m, lambda y: None, y, missing="nan"),
            lambda m, y: lvppl.log_likelihood(m, y, missing="nan", estimator="exact"),
            lambda m, y: lvppl.log_evidence(m, y, missing="nan"),
            lambda m, y: lvppl.impute(m, y, num_samples=2),
            lambda m, y: lvppl.EM(m).fit(y, missing="nan", max_iter=1, progress=False),
            lambda m, y: lvppl.SVI(m, lambda y: None).fit(
                y, missing="nan", num_steps=1, progress=False
            ),
        ):
            with pytest.raises(lvppl.ProgramError, match=message):
                attempt(model, y)
    for y in (STEPS[1:], torch.tensor([[0.0, NAN], [1.0, NAN]])):  # the last is never read
        found = lvppl.log_evidence(by_the_last, y, missing="nan").per_datum
        first, second = (
            torch.where(y[:, 0] == 1, 0.1, 0.9).log(),
            torch.where(y[:, 1].isnan(), 1.0, 0.9).log(),
        )
        close(found, first + second)


DECISIONS: dict[str, Callable[[Tensor], Any]] = {
    "<": lambda y: y < 0,
    ">= of a view": lambda y: y[:, 1:] >= 0,
    "of what is computed": lambda y: 2 * y.mT + 1 > 0,
    "of an index": lambda y: y[torch.arange(1)] != 1,
    "number first": lambda y: torch.ones(()) > y,
    "torch.le": lambda y: torch.le(y, 0),
    "in place": lambda y: y.clone().gt_(0),
    "long": lambda y: y.long(),
    "int": lambda y: y.int(),
    "bool": lambda y: y.bool(),
    "to": lambda y: y.to(torch.int64),
    "to dtype": lambda y: y.to(dtype=torch.bool),
    "type": lambda y: y.type(torch.int32),
    "type_as": lambda y: y.type_as(torch.arange(2)),
    "argmax": lambda y: y.argmax(-1),
    "sort": lambda y: y.sort(-1),
    "bucketize": lambda y: torch.bucketize(y, torch.arange(3.0)),
    "isclose": lambda y: torch.isclose(y, torch.ones(())),
    "if": lambda y: 1 if y[0, 0] else 0,
    "sign": lambda y: y.sign(),
    "nonzero": lambda y: y.nonzero(),
    "inside a network": lambda y: nn.Threshold(0.0, 0.0)(y.gt(0).double()),
}
QUESTIONS: dict[str, Callable[[Tensor], Any]] = {
    "isnan": lambda y: ~y.isnan() | y.isfinite(),
    "itself": lambda y: (y != y) | (y == y),
    "filled": lambda y: y.nan_to_num(0.0) > 0,
    "masked": lambda y: y.masked_fill(y.isnan(), 0.0).long(),
    "shape": lambda y: (y.shape[0] > 0, y.size(0), y.dim() > 1, len(y), y.is_floating_point()),
    "alike": lambda y: (torch.ones_like(y, dtype=torch.bool), y.new_zeros(2, dtype=torch.long)),
    "expanded": lambda y: (torch.tensor(True).expand_as(y), torch.broadcast_tensors(y.isnan(), y)),
    "another": lambda y: torch.arange(2.0) > y.nanmean(),
    "vmap": lambda y: torch.vmap(lambda row: (row > 0) | row.isnan())(y.nan_to_num(0.0)),
    "a distribution": lambda y: dist.Normal(0.0, 1.0).support.check(y),
}


@pytest.mark.parametrize("name", [*DECISIONS, *QUESTIONS])
def test_what_takes_a_nan_for_a_number(name: str):
    def model(y: Tensor) -> None:
        (DECISIONS | QUESTIONS)[name](y)
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(torch.zeros(2), 1.0).to_event(1), obs=y)

    y = torch.tensor([[NAN, 0.5], [1.0, NAN]])
    if name in DECISIONS:
        with pytest.raises(lvppl.ProgramError, match="takes a missing value for a number"):
            lvppl.log_evidence(model, y, missing="nan")
    else:
        found = lvppl.log_evidence(model, y, missing="nan").per_datum
        close(found, dist.Normal(0.0, 1.0).log_prob(torch.tensor([0.5, 1.0])))
    y = y.nan_to_num(1.0)
    lvppl.log_evidence(model, y, missing="nan")  # of complete data nothing is refused
    assert not torch.overrides._get_current_function_mode_stack()


# ------------------------------------------------------------------------------ autoregressions


def made(order: list[int] | None = None) -> MADE:
    torch.manual_seed(2)
    model = MADE(y_shape=(5,), hidden_dims=(8,), order=order)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    return model


BITS = (rand(6, 5, seed=70) < 0.5).double()
GAPS = BITS.clone()
GAPS[0, 3:] = NAN  # at the end of the order: exact
GAPS[1, 0] = NAN
GAPS[2, [0, 2]] = NAN
GAPS[3] = NAN
GAPS[4, [1, 3, 4]] = NAN
EVERY = torch.tensor(list(itertools.product([0.0, 1.0], repeat=5)), dtype=torch.float64)


def by_completions(model: MADE, y: Tensor) -> tuple[Tensor, Tensor]:
    """ln p(y_o) and E[y | y_o] by the sum over all completions."""
    log_p = lvppl.log_evidence(model, EVERY).per_datum
    logs, means = [], []
    for row in y:
        seen = ~row.isnan()
        fits = (EVERY[:, seen] == row[seen]).all(-1)
        logs.append(log_p[fits].logsumexp(0))
        means.append(log_p[fits].softmax(0) @ EVERY[fits])
    return torch.stack(logs), torch.stack(means)


@pytest.mark.parametrize("order", [None, [4, 2, 0, 1, 3]], ids=["rows", "permuted"])
def test_completions_drawn_by_the_model_are_unbiased(order: list[int] | None):
    model = made(order)
    wanted, mean = (t.detach() for t in by_completions(model, GAPS))
    options: dict[str, Any] = {"num_samples": 4000, "seed": 0}
    found = lvppl.log_likelihood(model, GAPS, estimator="prior", missing="nan", **options)
    assert bool(((found.log_prob - wanted).abs() < 4.5 * found.std_error + 1e-12).all())
    imputed = lvppl.impute(model, GAPS, **options)
    holes = GAPS.isnan()
    gap = (imputed.values["y"] - mean)[holes].abs()
    assert bool((gap < 4.5 * imputed.std_error["y"][holes] + 1e-12).all())
    # chunks change nothing but rounding
    parts = lvppl.log_likelihood(
        model,
        GAPS,
        estimator="prior",
        missing="nan",
        batch_size=4,
        sample_chunk=777,
        **options,
    )
    close(parts.log_prob, found.log_prob, 1e-12)


def test_gaps_at_the_end_of_the_order_are_exact():
    model = made([4, 2, 0, 1, 3])
    y = BITS.clone()
    y[0, 3], y[1, [1, 3]], y[2, [0, 1, 3]] = NAN, NAN, NAN
    found = lvppl.log_evidence(model, y, missing="nan").per_datum
    close(found, by_completions(model, y)[0])
    params = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(found.sum(), params, allow_unused=True),
        torch.autograd.grad(by_completions(model, y)[0].sum(), params, allow_unused=True),
        strict=True,
    ):
        if a is not None:
            close(a, b, 1e-9)


def test_gradients_through_completions_are_unbiased():
    """E Σ ln p(observed | before) over completions in the order: value and gradient of the ELBO."""
    model = made()
    params = [p for n, p in model.named_parameters() if "weight" in n or "bias" in n]
    row = torch.tensor([[NAN, 1.0, NAN, 0.0, 1.0]], dtype=torch.float64)
    seen = ~row[0].isnan()
    fits = (EVERY[:, seen] == row[0, seen]).all(-1)
    whole = EVERY[fits]
    each = model.distribution().conditionals(whole).base_dist.log_prob(whole)
    proposal, value = each[:, ~seen].sum(-1), each[:, seen].sum(-1)
    wanted = torch.autograd.grad(-(proposal.exp() * value).sum(), params, allow_unused=True)
    handled = with_missing(model, lambda y: None, "nan")
    draws: list[list[Tensor]] = []
    for seed in range(200):
        pyro.set_rng_seed(seed)
        loss = lvppl.ELBO(num_particles=10).differentiable_loss(*handled, row)
        draws.append(list(torch.autograd.grad(loss, params, allow_unused=True)))
    looked = 0
    for found, exact in zip(zip(*draws, strict=True), wanted, strict=True):
        if exact is None:
            continue
        sample = torch.stack(found).flatten(1)
        error = sample.std(0) / len(sample) ** 0.5
        assert bool(((sample.mean(0) - exact.flatten()).abs() < 5 * error + 1e-10).all())
        looked += exact.numel()
    assert looked > 50


def test_a_guide_may_draw_what_is_missing():
    """A guide with the site "<site>_missing" is the proposal; the joint weighs it."""
    model = made()
    row = GAPS[2:3].repeat(3, 1)

    class Coins(dist.TorchDistribution):
        """Fair coins where elements are missing."""

        arg_constraints: ClassVar[dict[str, Any]] = {}

        def __init__(self, y: Tensor, batch: Any = None) -> None:
            self.y = y
            super().__init__(torch.Size(batch or y.shape[:1]), y.shape[1:], validate_args=False)

        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            return Coins(self.y, batch_shape)

        support = constraints.independent(constraints.boolean, 1)

        def sample(self, sample_shape: Any = ()) -> Tensor:
            coins = torch.full((*sample_shape, *self.batch_shape, *self.event_shape), 0.5)
            return torch.where(self.y.isnan(), torch.bernoulli(coins), self.y)

        def log_prob(self, value: Tensor) -> Tensor:
            each = self.y.isnan().sum(-1) * math.log(0.5)
            return each.to(value).expand(value.shape[:-1])

    def guide(y: Tensor, holes: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y_missing", Coins(y.masked_fill(holes, NAN)))

    found = lvppl.log_likelihood(
        lambda y, holes: model(y),
        row,
        row.isnan(),
        guide=guide,
        num_samples=4000,
        missing="nan",
        seed=0,
    )
    wanted = by_completions(model, row)[0].detach()
    assert bool(((found.log_prob - wanted).abs() < 4.5 * found.std_error).all())


def test_a_wholly_missing_autoregression_is_drawn():
    model = made()
    nothing = torch.full((2, 5), NAN)
    found = lvppl.impute(model, nothing, num_samples=4000, num_imputations=5, seed=0)
    wanted = by_completions(model, nothing)[1].detach()
    score = (found.values["y"] - wanted) / (found.std["y"] / 4000**0.5)
    assert float(score.abs().max()) < 4.5


# --------------------------------------------------------------------------------- other paths


@pytest.mark.parametrize("kind", ["bits", "numbers"])
def test_sweeps_over_every_state(kind: str):
    """All 2^6 states by hand, for the forms that a sweep recognises in complete data."""
    W, b = randn(6, D, seed=90), randn(D, seed=91)

    def observation(z: Tensor) -> Any:
        return dist.Bernoulli(logits=z @ W + b) if kind == "bits" else dist.Normal(z @ W + b, 0.7)

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((6,), 0.4)).to_event(1))
            pyro.sample("y", observation(z).to_event(1), obs=y)

    y = torch.where(Y.isnan(), NAN, (Y > 0).double()) if kind == "bits" else Y
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    each = observation(states).log_prob(y.nan_to_num(0.0)[:, None])
    logs = torch.where(y.isnan()[:, None], 0.0, each).sum(-1)
    prior = dist.Bernoulli(torch.full((6,), 0.4)).log_prob(states).sum(-1)
    found = lvppl.log_likelihood(model, y, estimator="exact", missing="nan")
    close(found.log_prob, (logs + prior).logsumexp(1))


def test_annealed_chains_on_what_was_observed():
    model = analyser()
    found = lvppl.log_likelihood(model, Y, estimator="ais", num_samples=40, missing="nan", seed=1)
    gap = (found.log_prob - evidence(model, Y).detach()).abs()
    assert bool((gap < 4.5 * found.std_error + 1e-12).all())


def test_a_fit_remembers_what_missing_means(tmp_path: Any):
    """On disk, resumed, and exported: NaN stays what it was."""
    model, guide = small_vae()
    options: dict[str, Any] = {"seed": 0, "progress": False}
    fit = lvppl.SVI(model, guide).fit(Y, missing="nan", num_steps=4, **options)
    fit.save(tmp_path / "fit")
    loaded = lvppl.load(tmp_path / "fit", model, guide)
    assert torch.equal(
        loaded.posterior(Y, num_samples=3, seed=1).log_weight,
        fit.posterior(Y, num_samples=3, seed=1).log_weight,
    )
    resumed = lvppl.SVI(model, guide).fit(Y, resume=fit, num_steps=8, progress=False)
    whole = lvppl.SVI(model, guide).fit(Y, missing="nan", num_steps=8, **options)
    close(torch.tensor(resumed.history["loss"]), torch.tensor(whole.history["loss"]), 1e-12)
    data = lvppl.to_arviz(fit, Y, num_samples=20, seed=0)
    exported = torch.as_tensor(data["observed_data"]["x"].values)
    assert torch.equal(exported.isnan(), Y.isnan())
    # said again, it is as said
    with pytest.raises(lvppl.ProgramError, match="NaN"):
        fit.log_likelihood(Y, missing=None)


def test_em_with_a_guide():
    """Half-steps of the ELBO reach the maximum of ln p(y_o): the prior's mean is that of y_o."""

    def model(y: Tensor) -> None:
        loc = pyro.param("loc", torch.zeros(()))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            each = dist.Normal(z[..., None], 1.0).expand([*z.shape, D])
            pyro.sample("y", each.to_event(1), obs=y)

    def guide(y: Tensor) -> None:
        weight = pyro.param("weight", torch.full((len(y),), 0.1))
        width = pyro.param("width", torch.ones(len(y)), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(weight, width))

    fit = lvppl.EM(model, guide, objective=lvppl.ELBO(num_particles=64)).fit(
        Y, missing="nan", max_iter=100, tol=1e-9, seed=0, progress=False
    )
    count = (~Y.isnan()).sum(-1)
    # y_o of a row has precision n / (1 + n) for the mean, by its own mean
    precision = count / (1 + count)
    means = Y.nan_to_num(0.0).sum(-1) / count.clamp(min=1)
    wanted = (precision * means).sum() / precision.sum()
    assert abs(float(fit.params["loc"]) - float(wanted)) < 0.05
    assert fit.settings["missing"] == "nan"


def test_minibatches_of_which_some_have_gaps():
    """An autoregression whose sites change from batch to batch, and its estimates afterwards."""
    bits = (rand(60, 5, seed=92) < 0.5).double()
    y = bits.masked_fill(rand(60, 5, seed=93) < 0.1, NAN)
    y[20:] = bits[20:]
    svi = lvppl.SVI(
        made(), lambda y: None, objective=lvppl.IWAE(num_particles=5), learning_rate=0.05
    )
    fit = svi.fit(y, missing="nan", num_epochs=5, batch_size=15, seed=0, progress=False)
    found = fit.log_likelihood(y, estimator="prior", num_samples=300, seed=0)
    with fit.active():
        wanted, _ = by_completions(fit.model, y)  # type: ignore[arg-type]
    gap = (found.log_prob - wanted.detach()).abs()
    assert bool((gap < 4.5 * found.std_error + 1e-9).all())


def test_automatic_guides_and_the_check():
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(D), 10.0).to_event(1))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(loc, 1.0).to_event(1), obs=y)

    report = lvppl.check(model, AutoNormal(model), Y, missing="nan")
    assert report["y"].role == "observed"
    fit = lvppl.SVI(model, AutoNormal(model), learning_rate=0.05).fit(
        Y, missing="nan", num_steps=1500, seed=0, progress=False
    )
    seen = ~Y.isnan()
    precision = 0.01 + seen.sum(0)
    with fit.active():
        median = fit.guide.median(Y)["loc"]
    close(median.detach(), Y.nan_to_num(0.0).sum(0) / precision, 0.1)


def test_distortions_leave_missing_values_out():
    model, guide = small_vae()
    handled = with_missing(model, guide, "nan")
    terms = trace_terms(*handled, (Y,), num_particles=3)
    mean = terms.observed["x"].mean()
    wanted = torch.where(Y.isnan(), 0.0, (Y.nan_to_num(0.0) - mean) ** 2).sum(-1)
    close(terms.distortion(lambda y, m: (y - m) ** 2), wanted)
    whole = lambda y, mean: ((y - mean) ** 2).sum(-1)  # noqa: E731
    with pytest.raises(lvppl.ProgramError, match="one value for each element"):
        terms.distortion(whole)


def test_the_handler_leaves_complete_data_alone():
    """Coupled distributions of complete data stay what they are; EM's do in every case."""
    complete = randn(5, D, seed=80)
    fn, _ = MARGINS["MultivariateNormal"]
    for handler in (MissingValues(), MissingValues(parts=False)):
        trace = poutine.trace(handler(observing(fn))).get_trace(complete)
        assert type(trace.nodes["y"]["fn"]) is type(fn().expand([5]))


def test_completions_by_hand():
    """A completion of independent elements knows its variance, and expands."""
    fn = observed_part("y", dist.StudentT(5.0, LOC, 1.5).to_event(1), Y.isnan())
    given = completion("y", fn, Y.isnan(), Y.nan_to_num(0.0)).expand([3, 7])
    assert given.sample().shape == (3, 7, D)
    close(given.variance[2], torch.where(Y.isnan(), 1.5**2 * 5 / 3, 0.0))


@pytest.mark.filterwarnings("ignore:k-hat")
def test_a_network_never_sees_a_nan():
    """The guide's encoder gets zeros, in every routine; its gradients are finite."""
    seen: list[Tensor] = []
    model, guide = small_vae()
    guide.encoder = nn.Sequential(guide.encoder)
    guide.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    lvppl.check(model, guide, Y, missing="nan")
    fit = lvppl.SVI(model, guide).fit(Y, missing="nan", num_steps=2, seed=0, progress=False)
    fit.log_likelihood(Y, num_samples=30, seed=0)
    fit.posterior(Y, num_samples=2, seed=0)
    fit.impute(Y, num_samples=30, seed=0)
    assert len(seen) > 8
    for x in seen:
        assert torch.equal(x, Y.nan_to_num(0.0)[: len(x)])


def test_autoregressive_completions_refuse_nothing_silently():
    """Completions keep what was observed, and are values of the distribution."""
    fn: Autoregressive = made().distribution()
    y = GAPS[[1, 2]]
    drawn = completed(fn.expand([2]), y.isnan(), y.nan_to_num(7.0), (50,))
    assert torch.equal(drawn[:, ~y.isnan()], y[~y.isnan()].expand(50, -1))
    assert set(drawn[:, y.isnan()].unique().tolist()) <= {0.0, 1.0}

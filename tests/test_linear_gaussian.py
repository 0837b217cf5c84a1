"""Gaussian latents integrated exactly: against the Laplace formula, which is exact for quadratics.

The oracle runs a program at given values of every latent, takes value, gradient and Hessian of
ln p(z, x, y) in all Gaussian latents x laid end to end, and sums over every assignment of the
discrete ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import lvppl
from lvppl.tracing import plates_of, sample_sites
from tests.programs import PROGRAMS as REGISTRY

pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture
def float64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def t(*values: Any) -> Tensor:
    return torch.tensor(*values, dtype=torch.float64)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --------------------------------------------------------------------------------------- programs

W = 0.7 * noise(4, 2, seed=1)
A, C = t([[0.9, 0.3], [-0.2, 0.7]]), noise(3, 2, seed=2)
X = noise(6, 3, seed=3)


def factor_analysis(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(t([0.1, -0.2]), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(z @ W.T + 0.3, t([0.5, 0.6, 0.7, 0.8])).to_event(1), obs=y)


def dense_covariances(y):
    with pyro.plate("data", len(y)):
        root = torch.eye(2) + 0.3 * noise(2, 2, seed=4).tril()
        z = pyro.sample("z", dist.MultivariateNormal(t([1.0, -1.0]), scale_tril=root))
        law = dist.LowRankMultivariateNormal(z @ W.T, noise(4, 1, seed=5), t([0.5, 0.6, 0.7, 0.8]))
        pyro.sample("y", law, obs=y)


def regression(y):
    """The weights lie in a plate that the observation is outside of."""
    with pyro.plate("features", 3):
        w = pyro.sample("w", dist.Normal(0.0, t([1.0, 2.0, 0.5])))
    bias = pyro.sample("bias", dist.Normal(5.0, 10.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(X @ w + bias, 0.4), obs=y)


def hierarchy(y):
    mean = pyro.sample("mean", dist.Normal(1.0, 2.0))
    with pyro.plate("groups", y.shape[0], dim=-2):
        group = pyro.sample("group", dist.Normal(mean, 0.7))
        with pyro.plate("members", y.shape[1], dim=-1):
            own = pyro.sample("own", dist.Normal(2 * group - mean, 0.5))
            pyro.sample("y", dist.Normal(own, 0.3), obs=y)


def crossed(y):
    with pyro.plate("rows", y.shape[0], dim=-2):
        row = pyro.sample("row", dist.Normal(0.0, 1.0))
    with pyro.plate("columns", y.shape[1], dim=-1):
        column = pyro.sample("column", dist.Normal(0.5, 0.8))
    with pyro.plate("rows_", y.shape[0], dim=-2), pyro.plate("columns_", y.shape[1], dim=-1):
        pyro.sample("y", dist.Normal(row - 2 * column, 0.3), obs=y)


def crossed_in_shared_plates(y):
    rows, columns = pyro.plate("rows", y.shape[0], dim=-2), pyro.plate("columns", y.shape[1])
    with rows:
        row = pyro.sample("row", dist.Normal(0.0, 1.0))
    with columns:
        column = pyro.sample("column", dist.Normal(0.5, 0.8))
    with rows, columns:
        pyro.sample("y", dist.Normal(row - 2 * column, 0.3), obs=y)


def kalman(y):
    x = None
    with pyro.plate("data", len(y)):
        for i in range(y.shape[1]):
            loc = torch.zeros(2) if x is None else x @ A.T + 0.1
            x = pyro.sample(f"x_{i}", dist.Normal(loc, 0.6).to_event(1))
            pyro.sample(f"y_{i}", dist.Normal(x @ C.T, 0.5).to_event(1), obs=y[:, i])


def stacked_walk(y):
    """One observation of all steps at once; the second order of the walk meets three at once."""
    steps: list[Tensor] = []
    for i in range(len(y)):
        loc = t(0.0) if i == 0 else 2 * steps[-1] - steps[-2] if i > 1 else steps[-1]
        steps.append(pyro.sample(f"x_{i}", dist.Normal(loc, 0.5)))
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(torch.stack(steps), 0.4), obs=y)


def crossed_inside(y):
    """Rows and columns that meet only when what lies in both is integrated out."""
    rows, columns = pyro.plate("rows", y.shape[0], dim=-2), pyro.plate("columns", y.shape[1])
    with rows:
        row = pyro.sample("row", dist.Normal(0.0, 1.0))
    with columns:
        column = pyro.sample("column", dist.Normal(0.5, 0.8))
    with rows, columns:
        own = pyro.sample("own", dist.Normal(row, 0.5))
        pyro.sample("y", dist.Normal(own - column, 0.3), obs=y)


def hierarchical_regression(y):
    """Weights that are one vector, each under a parent that keeps their plate."""
    with pyro.plate("features", 3):
        parent = pyro.sample("parent", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(parent, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(X @ w, 0.4), obs=y)


def chosen_regression(y):
    """The same under a discrete latent that all weights share."""
    k = pyro.sample("k", dist.Categorical(t([0.3, 0.7])))
    with pyro.plate("features", 3):
        parent = pyro.sample("parent", dist.Normal(t([-1.0, 1.0])[k], 1.0))
        w = pyro.sample("w", dist.Normal(parent, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((X * w[..., None, :]).sum(-1), 0.4), obs=y)


def mixture_of_analysers(y):
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(t([0.2, 0.5, 0.3])))
        spread = t([[1.0, 2.0], [0.5, 0.5], [1.0, 1.0]])[k]
        z = pyro.sample("z", dist.Normal(t([[0.0, 0], [1, 0], [0, 2]])[k], spread).to_event(1))
        loadings = noise(3, 4, 2, seed=6)[k]
        loc = (loadings @ z[..., None])[..., 0]
        pyro.sample("y", dist.Normal(loc, t([0.3, 0.6, 0.9])[k][..., None]).to_event(1), obs=y)


def switching(y):
    k = x = None
    with pyro.plate("data", len(y)):
        for i in range(y.shape[1]):
            probs = t([0.4, 0.6]) if k is None else t([[0.8, 0.2], [0.3, 0.7]])[k]
            k = pyro.sample(f"k_{i}", dist.Categorical(probs))
            loc = torch.zeros(len(y)) if x is None else t([0.9, -0.5])[k] * x
            x = pyro.sample(f"x_{i}", dist.Normal(loc, t([0.5, 1.0])[k]))
            pyro.sample(f"y_{i}", dist.Normal(x + 0.1, 0.5), obs=y[:, i])


def hidden_analysers(y):
    """A chain of states, each with a Gaussian latent of its own step: polynomial in the length."""
    k = 0
    for i in pyro.markov(range(len(y))):
        k = pyro.sample(f"k_{i}", dist.Categorical(t([[0.8, 0.2], [0.3, 0.7]])[k]))
        x = pyro.sample(f"x_{i}", dist.Normal(t([0.0, 2.0])[k], t([1.0, 0.3])[k]))
        pyro.sample(f"y_{i}", dist.Normal(t([1.0, -1.0])[k] * x, 0.5), obs=y[i])


def one_state_for_all(y):
    """A discrete latent outside of the plate; a second, apart, beside the Gaussian group."""
    k = pyro.sample("k", dist.Categorical(t([0.3, 0.7])))
    j = pyro.sample("j", dist.Categorical(t([[0.5, 0.5], [0.1, 0.9]])[k]))
    mean = pyro.sample("mean", dist.Normal(t([0.0, 3.0])[k], 1.0))
    other = pyro.sample("other", dist.Normal(t([1.0, -1.0])[j], 0.5))
    pyro.sample("v", dist.Normal(other, 0.2), obs=t(0.4))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, t([0.5, 1.5])[k]), obs=y)


def masked(y):
    seen = t([[1.0, 0], [1, 1], [0, 1]]).bool()
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        law = dist.Normal(z[..., None].expand(*z.shape, 2), t([0.5, 0.7]))
        pyro.sample("y", law.mask(seen).to_event(1), obs=y)
        with poutine.mask(mask=t([1.0, 0, 1]).bool()):
            pyro.sample("v", dist.Normal(2 * z, 0.3), obs=y[:, 0])


def vague(y):
    """A prior a million times wider than the noise, and data far from its mean."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1e6))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=y + 3e5)


def matrix_event(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2))
        v = pyro.sample("v", dist.MultivariateNormal(z, torch.eye(2)).to_event(1))
        pyro.sample("y", dist.Normal(v.flatten(-2) @ noise(4, 3, seed=7), 0.5).to_event(1), obs=y)


PROGRAMS: dict[str, tuple[Callable[..., Any], Tensor]] = {
    "factor_analysis": (factor_analysis, noise(5, 4, seed=11)),
    "dense_covariances": (dense_covariances, noise(3, 4, seed=12)),
    "regression": (regression, noise(6, seed=13)),
    "hierarchy": (hierarchy, noise(3, 2, seed=14)),
    "crossed": (crossed, noise(3, 2, seed=15)),
    "crossed_in_shared_plates": (crossed_in_shared_plates, noise(2, 4, seed=15)),
    "kalman": (kalman, noise(2, 4, 3, seed=16)),
    "stacked_walk": (stacked_walk, noise(5, seed=17)),
    "mixture_of_analysers": (mixture_of_analysers, noise(3, 4, seed=18)),
    "switching": (switching, noise(2, 3, seed=19)),
    "hidden_analysers": (hidden_analysers, noise(4, seed=20)),
    "one_state_for_all": (one_state_for_all, noise(4, seed=21)),
    "masked": (masked, noise(3, 2, seed=22)),
    "vague": (vague, noise(4, seed=23)),
    "matrix_event": (matrix_event, noise(2, 3, seed=24)),
    "crossed_inside": (crossed_inside, noise(3, 2, seed=26)),
    "hierarchical_regression": (hierarchical_regression, noise(6, seed=27)),
    "chosen_regression": (chosen_regression, noise(6, seed=28)),
    "one_datum": (factor_analysis, noise(1, 4, seed=25)),
}

every = pytest.mark.parametrize("name", PROGRAMS)


# ----------------------------------------------------------------------------------------- oracle


class Oracle:
    """ln Z, moments and products of all Gaussian latents, over every discrete assignment."""

    def __init__(self, program: Callable[..., Any], y: Tensor, temperature: float = 1.0) -> None:
        sites = {s["name"]: s for s in sample_sites(poutine.trace(program).get_trace(y))}
        latents = {n: s for n, s in sites.items() if not s["is_observed"]}
        self.discrete = {n: s for n, s in latents.items() if s["fn"].support.is_discrete}
        self.gaussian = {n: s for n, s in latents.items() if n not in self.discrete}
        size = sum(s["value"].numel() for s in self.gaussian.values())
        logs, means, covariances = [], [], []
        for states in self._assignments():

            def log_joint(x: Tensor, states: dict[str, Tensor] = states) -> Tensor:
                held = poutine.condition(program, data={**states, **self._split(x)})
                trace = poutine.trace(held).get_trace(y)
                return trace.log_prob_sum() / temperature

            zero = torch.zeros(size)
            P = -torch.autograd.functional.hessian(log_joint, zero)
            x = zero
            for _ in range(3):  # Newton's step is exact; the next two take rounding away
                x = x.detach().requires_grad_()
                (slope,) = torch.autograd.grad(log_joint(x), x)
                x = x + torch.linalg.solve(P, slope)
            value = log_joint(x) - 0.5 * torch.logdet(P / (2 * math.pi))
            logs.append(value)
            means.append(x.detach())
            covariances.append(torch.linalg.inv(P))
        log = torch.stack(logs)
        self.log_evidence = temperature * log.logsumexp(0)
        self.states = torch.softmax(log, 0).detach()
        mean, covariance = torch.stack(means), torch.stack(covariances)
        self.mean = self.states @ mean
        away = mean - self.mean
        within = torch.einsum("k,kij->ij", self.states, covariance)
        self.covariance = within + torch.einsum("k,ki,kj->ij", self.states, away, away)

    def _split(self, x: Tensor) -> dict[str, Tensor]:
        found, start = {}, 0
        for name, site in self.gaussian.items():
            count = site["value"].numel()
            found[name] = x[start : start + count].reshape(site["value"].shape)
            start += count
        return found

    def _assignments(self):
        shapes = [s["value"].shape for s in self.discrete.values()]
        counts = [len(s["fn"].enumerate_support(expand=False)) for s in self.discrete.values()]
        axes = [
            itertools.product(range(count), repeat=shape.numel())
            for count, shape in zip(counts, shapes, strict=True)
        ]
        for chosen in itertools.product(*axes):
            yield {
                name: torch.tensor(values).reshape(shape)
                for name, values, shape in zip(self.discrete, chosen, shapes, strict=True)
            }

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Mean (elements) and covariance of one latent, its elements laid end to end."""
        places = self._split(torch.arange(len(self.mean)))[name].flatten()
        return self.mean[places], self.covariance[places][:, places]


# ----------------------------------------------------------------------------------------- values


@every
def test_log_evidence(name):
    program, y = PROGRAMS[name]
    found, exact = lvppl.log_evidence(program, y), Oracle(program, y).log_evidence
    torch.testing.assert_close(found.total, exact, rtol=1e-10, atol=1e-9)


@every
def test_gradient_in_the_data(name):
    program, y = PROGRAMS[name]
    y = y.clone().requires_grad_()
    (found,) = torch.autograd.grad(lvppl.log_evidence(program, y).total, y)
    (exact,) = torch.autograd.grad(Oracle(program, y).log_evidence, y, allow_unused=True)
    torch.testing.assert_close(found, exact, rtol=1e-8, atol=1e-8)


NO_INTEGRAL = {
    "scaled_likelihood": "poutine.scale",
    "scaled_latent": "poutine.scale",
    "deterministic_and_factor": "'tilt' .Unit. depends on it",
    "gamma_exponential": "is continuous",
    "gamma_poisson": "is continuous",
    "auto_normal_positive": "is continuous",
    "bernoulli_score_scaled": "poutine.scale",
    "poisson_score": "no finite support",
    "score_in_replicates": "depend on each other",
}


@pytest.mark.parametrize("name", REGISTRY)
def test_every_program_with_an_exact_answer(name):
    """Whatever has an exact sum or integral is the oracle's, and all else is refused."""
    started = REGISTRY[name].start()
    call = (started.built.model, *started.built.args)
    if name in NO_INTEGRAL:
        with pytest.raises(lvppl.ProgramError, match=NO_INTEGRAL[name]):
            lvppl.log_evidence(*call)
        return
    oracle = started.oracle()
    if oracle.log_evidence is None:
        pytest.skip("the program has no closed form")
    found = lvppl.log_evidence(*call).total
    exact = oracle.scale * oracle.log_evidence.sum()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)


def test_gradient_in_the_parameters():
    y = noise(3, 3, 3, seed=30)
    parameters = [A.clone().requires_grad_(), t(0.6).requires_grad_(), t(0.2).requires_grad_()]

    def program(y):
        B, scale, shift = parameters
        x = None
        with pyro.plate("data", len(y)):
            for i in range(y.shape[1]):
                loc = shift.expand(2) if x is None else x @ B.T + shift
                x = pyro.sample(f"x_{i}", dist.Normal(loc, scale).to_event(1))
                pyro.sample(f"y_{i}", dist.Normal(x @ C.T, 0.5).to_event(1), obs=y[:, i])

    found = torch.autograd.grad(lvppl.log_evidence(program, y).total, parameters)
    for got, parameter in zip(found, parameters, strict=True):
        flat = parameter.detach().clone().reshape(-1)
        for i in range(len(flat)):
            ends = []
            for step in (1e-5, -1e-5):
                parameter.data.view(-1)[i] = flat[i] + step
                ends.append(lvppl.log_evidence(program, y).total.item())
            parameter.data.view(-1)[i] = flat[i]
            slope = (ends[0] - ends[1]) / 2e-5
            assert float(got.reshape(-1)[i]) == pytest.approx(slope, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["kalman", "switching", "hierarchy", "masked"])
def test_temperature(name):
    program, y = PROGRAMS[name]
    found = lvppl.log_evidence(program, y, temperature=2.0).total
    exact = Oracle(program, y, temperature=2.0).log_evidence
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-9)


def test_per_datum_values_are_those_of_each_datum_alone():
    y = PROGRAMS["switching"][1]
    alone = [lvppl.log_evidence(switching, row[None]).total.item() for row in y]
    torch.testing.assert_close(lvppl.log_evidence(switching, y).per_datum, t(alone))


def test_float32():
    y = PROGRAMS["kalman"][1]
    exact = lvppl.log_evidence(kalman, y).total

    def program(y):
        x = None
        with pyro.plate("data", len(y)):
            for i in range(y.shape[1]):
                loc = torch.zeros(2).float() if x is None else x @ A.float().T + 0.1
                x = pyro.sample(f"x_{i}", dist.Normal(loc, 0.6).to_event(1))
                law = dist.Normal(x @ C.float().T, 0.5).to_event(1)
                pyro.sample(f"y_{i}", law, obs=y[:, i])

    torch.set_default_dtype(torch.float32)
    found = lvppl.log_evidence(program, y.float()).total
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), abs=1e-4)


def test_a_chain_of_many_steps():
    """Against the filter of Kalman, for three hundred steps."""
    y, a, q, r = noise(300, seed=40), 0.95, 0.5, 0.8

    def program(y):
        x = t(0.0)
        for i in range(len(y)):
            x = pyro.sample(f"x_{i}", dist.Normal(a * x, q))
            pyro.sample(f"y_{i}", dist.Normal(x, r), obs=y[i])

    mean, variance, total = 0.0, 0.0, 0.0
    for value in y.tolist():
        mean, variance = a * mean, a * a * variance + q * q
        spread = variance + r * r
        total -= 0.5 * (math.log(2 * math.pi * spread) + (value - mean) ** 2 / spread)
        gain = variance / spread
        mean, variance = mean + gain * (value - mean), (1 - gain) * variance
    exact = lvppl.posterior(program, y)
    assert float(exact.log_evidence) == pytest.approx(total, rel=1e-11)
    last = exact.moments("x_299")
    assert float(last.mean) == pytest.approx(mean, abs=1e-10)
    assert float(last.variance) == pytest.approx(variance, abs=1e-10)


# -------------------------------------------------------------------------------------- posterior


@every
def test_moments(name):
    program, y = PROGRAMS[name]
    exact, found = Oracle(program, y), lvppl.posterior(program, y)
    assert set(found.integrated) == set(exact.gaussian)
    for latent, site in exact.gaussian.items():
        mean, covariance = exact.of(latent)
        moments = found.moments(latent)
        plates = [plate.size for plate in plates_of(site)]
        event = site["fn"].event_shape
        assert moments.mean.shape == (*plates, *event)
        torch.testing.assert_close(moments.mean.flatten(), mean, rtol=1e-8, atol=1e-8)
        d = event.numel()
        blocks = covariance.reshape(-1, d, covariance.shape[1] // d, d)
        blocks = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)
        got = moments.covariance.reshape(-1, d, d)
        torch.testing.assert_close(got, blocks, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["mixture_of_analysers", "switching", "one_state_for_all"])
def test_marginals_of_states(name):
    program, y = PROGRAMS[name]
    exact, found = Oracle(program, y), lvppl.posterior(program, y)
    for site in exact.discrete:
        expected = torch.zeros_like(found.marginals(site))
        for weight, states in zip(exact.states, exact._assignments(), strict=True):
            chosen = torch.nn.functional.one_hot(states[site], expected.shape[-1])
            expected += weight * chosen
        torch.testing.assert_close(found.marginals(site), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        "kalman",
        "hierarchy",
        "crossed",
        "crossed_inside",
        "switching",
        "mixture_of_analysers",
        "regression",
        "chosen_regression",
    ],
)
def test_draws(name):
    """Means, covariances between all latents, and the states beside them, within 5 errors."""
    program, y = PROGRAMS[name]
    exact, count = Oracle(program, y), 20000
    drawn = lvppl.posterior(program, y).sample(count, seed=1)
    x = torch.cat([drawn[latent].reshape(count, -1) for latent in exact.gaussian], 1)
    away = x - exact.mean
    error = (exact.covariance.diagonal() / count).sqrt()
    assert (away.mean(0).abs() < 5 * error).all()
    products = away[:, :, None] * away[:, None, :]
    error = products.std(0) / count**0.5
    assert ((products.mean(0) - exact.covariance).abs() < 5 * error).all()
    again = lvppl.posterior(program, y).sample(3, seed=1)
    assert all(
        torch.equal(again[n], lvppl.posterior(program, y).sample(3, seed=1)[n]) for n in again
    )


def test_draws_of_states_and_latents_belong_together():
    program, y = PROGRAMS["mixture_of_analysers"]
    drawn = lvppl.posterior(program, y).sample(20000, seed=2)
    for k in range(3):
        held = poutine.condition(program, data={"k": torch.full((len(y),), k)})
        exact = lvppl.posterior(held, y).moments("z")
        for n in range(len(y)):
            z = drawn["z"][drawn["k"][:, n] == k, n]
            if len(z) < 200:
                continue
            error = (exact.variance[n] / len(z)).sqrt()
            assert ((z.mean(0) - exact.mean[n]).abs() < 5 * error).all()


def test_the_estimate_of_ln_p_is_the_exact_one():
    program, y = PROGRAMS["kalman"]
    estimate = lvppl.log_likelihood(program, y, estimator="exact", batch_size=1)
    torch.testing.assert_close(estimate.log_prob, lvppl.log_evidence(program, y).per_datum)


# ---------------------------------------------------------------------------------------- missing


@pytest.mark.parametrize("kind", ["dense", "low rank", "apart"])
def test_events_that_are_missing_in_part(kind):
    """Rows and columns of the marginal covariance; a datum without anything has its prior."""
    S = torch.diag(t([0.5, 0.6, 0.7, 0.8]))
    factor = noise(4, 1, seed=80)
    if kind != "apart":
        S = S + factor @ factor.mT

    def program(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(t([0.1, -0.2]), 1.0).to_event(1))
            loc = z @ W.T
            laws = {
                "dense": lambda: dist.MultivariateNormal(loc, S),
                "low rank": lambda: dist.LowRankMultivariateNormal(
                    loc, factor, (S - factor @ factor.mT).diagonal()
                ),
                "apart": lambda: dist.Normal(loc, S.diagonal().sqrt()).to_event(1),
            }
            pyro.sample("y", laws[kind](), obs=y)

    y = noise(6, 4, seed=81)
    y[noise(6, 4, seed=82) < -0.2] = math.nan
    y[3] = math.nan
    mean, covariance = W @ t([0.1, -0.2]), W @ W.mT + S
    exact = torch.zeros(6)
    for n, row in enumerate(y):
        o = ~row.isnan()
        if bool(o.any()):
            exact[n] = dist.MultivariateNormal(mean[o], covariance[o][:, o]).log_prob(row[o])
    found = lvppl.posterior(program, y, missing="nan")
    torch.testing.assert_close(found.log_evidence.per_datum, exact, rtol=0, atol=1e-10)
    moments = found.moments("z")
    torch.testing.assert_close(moments.mean[3], t([0.1, -0.2]))
    torch.testing.assert_close(moments.covariance[3], torch.eye(2))


# ------------------------------------------------------------------------------------------- fits


def test_em_of_a_dynamical_system():
    """Parameters by EM; its ln p(y), gradient and smoothed states by the algebra of this module."""
    states = [noise(30, 2, seed=60)]
    for i in range(4):
        states.append(states[-1] @ A.T + 0.6 * noise(30, 2, seed=61 + i))
    y = torch.stack(states, 1) + 0.3 * noise(30, 5, 2, seed=70)

    def program(y):
        B = pyro.param("B", lambda: 0.5 * torch.eye(2))
        q = pyro.param("q", lambda: t([0.7, 0.9]), constraint=dist.constraints.positive)
        x = None
        with pyro.plate("data", len(y)):
            for i in range(y.shape[1]):
                loc, scale = (torch.zeros(2), torch.ones(2)) if x is None else (x @ B.T, q)
                x = pyro.sample(f"x_{i}", dist.Normal(loc, scale).to_event(1))
                pyro.sample(f"y_{i}", dist.Normal(x, 0.3).to_event(1), obs=y[:, i])

    fit = lvppl.EM(program).fit(y, max_iter=60, tol=1e-12, seed=0, progress=False)
    assert {fit.m_step.get(name).how for name in ("B", "q")} == {"closed form"}
    assert float(fit.log_evidence(y)) == pytest.approx(fit.objective_value, rel=1e-9)
    params = {name: value.clone().requires_grad_() for name, value in fit.params.items()}
    at = poutine.substitute(program, data=params)
    exact = lvppl.log_evidence(at, y)
    slopes = torch.autograd.grad(exact.total, list(params.values()))
    assert max(float(slope.abs().max()) for slope in slopes) < 1e-3
    smoothed, expected = fit.posterior(y).moments("x_2"), Oracle(at, y).of("x_2")
    torch.testing.assert_close(smoothed.mean.flatten(), expected[0], rtol=1e-7, atol=1e-8)


# ---------------------------------------------------------------------------------------- refused


def refused(program: Callable[..., Any], y: Tensor, match: str) -> None:
    for call in (lvppl.log_evidence, lvppl.posterior):
        with pytest.raises(lvppl.ProgramError, match=match):
            call(program, y)


def test_another_family():
    def program(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Bernoulli(logits=z), obs=y)

    refused(program, t([1.0, 0.0]), r"'z' is Gaussian, but 'y' \(Bernoulli\) depends on it")


class HalfNormalInDisguise(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) + math.log(2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda z: dist.Normal(z.tanh(), 1.0), "location is not an affine"),
        (lambda z: dist.Normal(z + 1e-4 * z**2, 1.0), "location is not an affine"),
        (lambda z: dist.Normal(z, z.abs() + 0.1), "scale is a function"),
        (lambda z: dist.Normal(0.0, z.exp()), "scale is a function"),
        (lambda z: dist.Normal(z.clamp(-3, 3), 1.0), "location is not an affine"),
        (lambda z: dist.Normal((z + 1).relu(), 0.1), "location is not an affine"),
        (lambda z: dist.Normal(2000 + z + 0.1 * z**2, 0.5), "location is not an affine"),
        (lambda z: dist.Normal(z, 1.0).mask(z > 0), "a mask that depends on it"),
        (lambda z: HalfNormalInDisguise(z, 1.0), "another density than a Normal has"),
        (lambda z: dist.Normal(z + z.flip(-1), 1.0), "location is not an affine"),
        (
            lambda z: dist.Normal(z.detach(), 1.0),
            "not as an affine function or not with a derivative",
        ),
        (lambda z: dist.Normal(z.cumsum(-1), 1.0), "location is not an affine"),
    ],
)
def test_not_affine(function, match, dtype):
    torch.set_default_dtype(dtype)

    def program(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", function(z), obs=y)

    refused(program, t([1.0, 0.3, -0.5]).to(dtype), match)


def test_an_observation_that_moves():
    def program(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y - 2 * z)

    refused(program, t(0.5), "observes a value that depends on the Gaussian latent 'z'")


def test_an_affine_location_far_from_zero():
    def program(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(1e6 + 1e-2 * z, 0.1), obs=y)

    y = 1e6 + 0.1 * noise(3, seed=50)
    exact = dist.Normal(t(1e6), math.hypot(0.1, 1e-2)).log_prob(y)
    torch.testing.assert_close(lvppl.log_evidence(program, y).per_datum, exact, rtol=0, atol=1e-6)


def test_a_scale_inside_the_integral():
    def program(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.scale(scale=0.5):
                pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    refused(program, t([1.0, 0.3]), "poutine.scale")


def test_a_subsample_inside_the_integral():
    def program(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 10, subsample_size=2):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    refused(program, t([1.0, 0.3]), "Plate 'data' is subsampled")


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("discrete", [False, True])
def test_a_subsample_beside_what_lies_outside_is_scaled(size, discrete):
    """Ten elements of which one or two are seen, beside a site that no plate is around."""

    def program(y):
        pyro.sample("v", dist.Normal(0.0, 1.0), obs=t(0.2))
        with pyro.plate("data", 10, subsample=torch.arange(size)):
            if discrete:
                z = pyro.sample("z", dist.Categorical(t([0.3, 0.7]))).to(y)
            else:
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = t([1.0, 0.3])[:size]
    normal = dist.Normal(0.0, 2**0.5).log_prob(y)
    parts = [math.log(p) + dist.Normal(z, 1.0).log_prob(y) for z, p in ((0.0, 0.3), (1.0, 0.7))]
    each = torch.logaddexp(*parts) if discrete else normal
    exact = dist.Normal(0.0, 1.0).log_prob(t(0.2)) + 10 / size * each.sum()
    torch.testing.assert_close(lvppl.log_evidence(program, y).total, exact)


def test_a_loop_over_a_part_of_a_plate():
    def program(y):
        for i in pyro.plate("data", 10, subsample=torch.arange(2)):
            z = pyro.sample(f"z_{i}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])

    refused(program, t([1.0, 0.3]), "a loop over 2 of 10 elements of plate 'data'")


def test_random_indices_are_those_of_one_run():
    def program(y):
        with pyro.plate("data", 10, subsample_size=4) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    y = noise(10, seed=51)
    found = lvppl.log_evidence(program, y).per_datum
    each = dist.Normal(0.0, 2**0.5).log_prob(y)
    assert all(bool(torch.isclose(each, value).any()) for value in found)


@pytest.mark.parametrize("scale", [1e-2, 1e-5, 1e-8])
def test_precise_data_under_states(scale):
    """The latent is elsewhere in each state: no one point serves the quadratics of both."""

    def program(y):
        k = pyro.sample("k", dist.Categorical(t([0.5, 0.5])))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z + 3.3 * k, scale), obs=y)

    y = t(0.6).requires_grad_()
    exact = dist.Normal(t([0.0, 3.3]), math.hypot(1.0, scale)).log_prob(y).logsumexp(0)
    exact = exact - math.log(2)
    found = lvppl.log_evidence(program, y).total
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-9)
    (slope,), (expected,) = torch.autograd.grad(found, y), torch.autograd.grad(exact, y)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-4, 1e-8])
def test_latents_that_nearly_determine_each_other(scale):
    """Known to 1e-7 of itself, or refused: a difference of precisions has no digits left."""

    def program(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a + b, scale), obs=y)

    y = t(0.5)
    if scale < 1e-5:
        refused(program, y, "is lost in rounding")
    else:
        found, exact = lvppl.log_evidence(program, y).total, dist.Normal(0.0, 2**0.5).log_prob(y)
        assert found.item() == pytest.approx(exact.item(), abs=1e-7)


def test_a_masked_latent_at_a_temperature():
    def program(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(lvppl.ProgramError, match="is masked, which has no meaning at a temp"):
        lvppl.log_evidence(program, t(0.3), temperature=2.0)


def test_elements_of_another_plate():
    """States outside of their plate are no elements of a site without it."""

    def program(y):
        with pyro.plate("pair", 2):
            k = pyro.sample("k", dist.Categorical(t([0.5, 0.5])))
        pyro.sample("y", dist.Normal(t([0.0, 2.0])[k].sum(-1), 1.0), obs=y)

    refused(program, t(0.3), "belongs to no plate around it|belongs to no plate")


def test_a_mixture_beside_at_a_temperature():
    def program(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)
            parts = dist.Categorical(t([0.5, 0.5])), dist.Normal(t([0.0, 1.0]), 1.0)
            pyro.sample("v", dist.MixtureSameFamily(*parts), obs=y)

    y = t([0.3, 1.2])
    apart = lvppl.log_evidence(poutine.block(program, hide=["v"]), y, temperature=2.0).total
    both = lvppl.log_evidence(program, y, temperature=2.0).total
    logs = torch.stack([math.log(0.5) + dist.Normal(m, 1.0).log_prob(y) for m in (0.0, 1.0)])
    torch.testing.assert_close(both - apart, 2 * (logs / 2).logsumexp(0).sum())


def test_a_subsampled_data_plate_scales_the_total():
    def program(y):
        with pyro.plate("data", 10, subsample=torch.arange(2)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = t([1.0, 0.3])
    found, exact = lvppl.log_evidence(program, y), dist.Normal(0.0, 2**0.5).log_prob(y)
    torch.testing.assert_close(found.per_datum, exact)
    torch.testing.assert_close(found.total, 5 * exact.sum())


def test_states_that_a_global_latent_couples():
    def program(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            k = pyro.sample("k", dist.Categorical(t([0.5, 0.5])))
            pyro.sample("y", dist.Normal(mean * t([1.0, -1.0])[k], 1.0), obs=y)

    refused(program, noise(5), "'mean' and the discrete latent 'k' depend on each other")


def test_too_many_states_together():
    refused(switching, noise(2, 40), "elements .* for all states of 'k_")


def test_too_many_directions():
    def program(y):
        w = pyro.sample("w", dist.Normal(torch.zeros(5000), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(w.sum(-1), 1.0), obs=y)

    refused(program, t(0.5), "5,000 dimensions together")


def test_double_data_under_constants_of_single_precision():
    """The usual case with data from numpy: dist.Normal(0.0, 2.0) is float32, y is not."""
    torch.set_default_dtype(torch.float32)
    y = noise(5, seed=90)

    def local(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 0.5), obs=y)

    def loop(y):
        x = torch.tensor(0.0)
        for i in range(len(y)):
            x = pyro.sample(f"x_{i}", dist.Normal(0.9 * x, 0.5))
            pyro.sample(f"y_{i}", dist.Normal(x, 0.8), obs=y[i])

    exact = dist.Normal(0.0, 1.25**0.5).log_prob(y)
    found = lvppl.log_evidence(local, y).per_datum
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-6)
    torch.set_default_dtype(torch.float64)
    whole = lvppl.log_evidence(loop, y).total
    torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(lvppl.log_evidence(loop, y).total, whole, rtol=0, atol=1e-5)


def test_nan_is_named_before_anything_else():
    def program(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    refused(program, t([1.0, math.nan]), r"'y' observes nan.*missing=\"nan\"")


def test_a_temperature_is_not_called_ln_p():
    program, y = PROGRAMS["kalman"]
    assert "ln p(y) =" in repr(lvppl.log_evidence(program, y))
    assert "F_T(y) at T = 2" in repr(lvppl.log_evidence(program, y, temperature=2.0))
    assert "F_T(y) at T = 2" in repr(lvppl.posterior(program, y, temperature=2.0))

"""Exact evidence and posteriors against running every joint assignment of the latents."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import lvppl
from tests.enumerable import (
    PARALLEL,
    PROGRAMS,
    Exact,
    Program,
    brute_force,
    categorical,
    gradients,
    parameters,
    real,
    simplex,
    t,
)

every = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
temperatures = pytest.mark.parametrize("temperature", [0.3, 2.5])
taken_apart = pytest.mark.parametrize(
    "program",
    [p for p in PROGRAMS.values() if p.select],
    ids=[n for n, p in PROGRAMS.items() if p.select],
)
paired = pytest.mark.parametrize(
    "program",
    [p for p in PROGRAMS.values() if p.pairs],
    ids=[n for n, p in PROGRAMS.items() if p.pairs],
)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=atol)


# ------------------------------------------------------------------- the oracle, against formulas


def test_the_oracle_sums_a_mixture():
    """ln p(y) = sum_n ln sum_k w_k N(y_n; m_k, s_k), and its responsibilities."""
    started = PROGRAMS["gaussian_mixture"].start()
    (y,) = started.args
    w, m, s = (pyro.param(name) for name in ("weights", "loc", "scale"))
    density = torch.exp(-0.5 * ((y[:, None] - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
    exact = started.exact()
    close(exact.total, (w * density).sum(-1).log().sum(), 1e-13)
    responsibilities = w * density / (w * density).sum(-1, keepdim=True)
    close(exact.marginals("z"), responsibilities.detach(), 1e-13)
    values, best = exact.map()
    assert torch.equal(values["z"], responsibilities.argmax(-1))
    close(best, (w * density).max(-1).values.log().sum(), 1e-13)


def test_the_oracle_sums_a_hidden_markov_chain():
    """The forward and backward recursions, in probabilities."""
    started = PROGRAMS["gaussian_chain"].start()
    (y,) = started.args
    initial, jump = pyro.param("initial"), pyro.param("transition")
    m, s = pyro.param("loc"), pyro.param("scale")  # one scale for all
    density = torch.exp(-0.5 * ((y[:, None] - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
    alpha, beta = [initial * density[0]], [torch.ones_like(m)]
    for step in range(1, len(y)):
        alpha.append((alpha[-1] @ jump) * density[step])
        beta.insert(0, jump @ (density[-step] * beta[0]))
    exact = started.exact()
    evidence = alpha[-1].sum()
    close(exact.total, evidence.log(), 1e-13)
    for step in range(len(y)):
        marginal = (alpha[step] * beta[step] / evidence).detach()
        close(exact.marginals(f"x_{step}"), marginal, 1e-13)
    pair = alpha[0][:, None] * jump * density[1] * beta[1] / evidence
    close(exact.joint("x_0", "x_1"), pair.detach(), 1e-13)


# --------------------------------------------------------------------------------------- evidence


@every
def test_evidence_and_its_gradients(program: Program):
    started = program.start()
    exact = started.exact()
    record = lvppl.log_evidence(started.model, *started.args)
    assert record.total.dim() == 0
    close(record.total, exact.total)
    assert float(record) == float(record.total.detach())
    found, expected = gradients(record.total), gradients(exact.total)
    for name in expected:
        close(found[name], expected[name])


@every
def test_the_parts_of_the_evidence(program: Program):
    """Per datum where there are data, and in one piece where the data set is one datum."""
    started = program.start()
    record = lvppl.log_evidence(started.model, *started.args)
    assert set(record.data_plates) == set(program.data_plates)
    close(record.per_datum.sum(), record.total)
    if not program.data_plates:
        assert record.per_datum.shape == (1,)


def single(program: Program, model: Callable, args: tuple, count: int) -> Tensor:
    """ln p of every datum by brute force over a data set that holds it alone, (data,)."""
    return torch.stack([brute_force(model, program.select(args, [i])).total for i in range(count)])


@taken_apart
def test_evidence_per_datum_and_its_gradients(program: Program):
    started = program.start()
    record = lvppl.log_evidence(started.model, *started.args)
    expected = single(program, started.model, started.args, len(record.per_datum))
    close(record.per_datum, expected)
    weights = torch.linspace(-1, 1, len(expected), dtype=torch.float64)
    found, wanted = gradients(weights @ record.per_datum), gradients(weights @ expected)
    for name in wanted:
        close(found[name], wanted[name])


@taken_apart
def test_new_data_of_another_size(program: Program):
    if not program.resizable:
        pytest.skip("its data are a table, not rows")
    started = program.start()
    first = lvppl.log_evidence(started.model, *started.args)
    index = [1, 0, 0, *range(len(first.per_datum))]
    args = program.select(started.args, index)
    again = lvppl.log_evidence(started.model, *args)
    close(again.per_datum, first.per_datum[index])
    name = next(iter(started.exact().latents))
    marginals = lvppl.posterior(started.model, *args).marginals(name)
    close(marginals, started.exact().marginals(name)[index])


@every
@temperatures
def test_tempered_evidence(program: Program, temperature: float):
    started = program.start()
    record = lvppl.log_evidence(started.model, *started.args, temperature=temperature)
    expected = started.exact().tempered(temperature)
    close(record.total, expected)
    found, wanted = gradients(record.total), gradients(expected)
    for name in wanted:
        close(found[name], wanted[name])


@pytest.mark.parametrize("name", ["gaussian_mixture", "categorical_chain", "nested_plates"])
def test_second_derivatives(name: str):
    """The Hessian of ln p(y) along a direction, through both sums."""
    started = PROGRAMS[name].start()
    leaves = list(parameters().values())
    generator = torch.Generator().manual_seed(3)
    along = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]

    def curvature(total: Tensor) -> list[Tensor]:
        slopes = torch.autograd.grad(total, leaves, create_graph=True)
        slope = sum((g * v).sum() for g, v in zip(slopes, along, strict=True))
        return list(torch.autograd.grad(slope, leaves))

    found = curvature(lvppl.log_evidence(started.model, *started.args).total)
    expected = curvature(started.exact().total)
    assert max(float(value.abs().max()) for value in expected) > 0.1
    for one, other in zip(found, expected, strict=True):
        close(one, other)


def test_keyword_arguments_reach_the_program():
    def model(y: Tensor, *, shift: float) -> None:
        with pyro.plate("data", len(y)):
            z = categorical("z", t([0.3, 0.7]))
            pyro.sample("y", dist.Normal(t([-1.0, 1.0])[z] + shift, t(1.0)), obs=y)

    y = t([0.3, 1.2])
    shifted = lvppl.log_evidence(model, y, shift=0.4)
    close(shifted.total, lvppl.log_evidence(model, y - 0.4, shift=0.0).total)


def test_a_subsample_is_scaled_outside_the_sum():
    """Four of twelve data stand for all: three times their ln p, and their own posterior."""
    index, y = torch.tensor([7, 0, 3, 10]), torch.linspace(-2, 3, 12, dtype=torch.float64)

    def body(y: Tensor) -> None:
        z = categorical("z", simplex("weights", [0.3, 0.7]))
        pyro.sample("y", dist.Normal(real("loc", [-1.0, 1.0])[z], t(1.0)), obs=y)

    def subsampled(y: Tensor) -> None:
        with pyro.plate("data", 12, subsample=index) as chosen:
            body(y[chosen])

    def full(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            body(y)

    exact = brute_force(full, (y[index],))
    close(lvppl.log_evidence(subsampled, y).total, 3 * exact.total)
    close(lvppl.posterior(subsampled, y).marginals("z"), exact.marginals("z"))


def test_a_program_without_latents_has_its_density_as_evidence():
    y = t([0.3, -1.2, 0.8])

    def model(y: Tensor) -> None:
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(real("loc", 0.2), t(1.0)), obs=y)

    record = lvppl.log_evidence(model, y)
    expected = -0.5 * (y - 0.2) ** 2 - 0.5 * math.log(2 * math.pi)
    close(record.per_datum, expected)
    close(gradients(record.total)["loc"], (y - 0.2).sum())
    with pytest.raises(lvppl.ProgramError, match="latent"):
        lvppl.posterior(model, y)


def test_evaluation_leaves_generators_and_parameters_alone():
    started = PROGRAMS["categorical_chain"].start()
    before = {name: value.detach().clone() for name, value in parameters().items()}
    state = torch.get_rng_state()
    lvppl.log_evidence(started.model, *started.args)
    lvppl.posterior(started.model, *started.args).sample(10, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    after = parameters()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# -------------------------------------------------------------------------------------- posteriors


@every
def test_marginals(program: Program):
    started = program.start()
    exact = started.exact()
    posterior = lvppl.posterior(started.model, *started.args)
    assert set(posterior.sites) == set(exact.latents)
    close(posterior.log_evidence.total.detach(), exact.total.detach())
    for name in exact.latents:
        found = posterior.marginals(name)
        close(found, exact.marginals(name))
        close(found.sum(-1), torch.ones_like(found[..., 0]))


@paired
def test_pairwise_marginals(program: Program):
    started = program.start()
    exact = started.exact()
    posterior = lvppl.posterior(started.model, *started.args)
    for first, second in program.pairs:
        close(posterior.joint(first, second), exact.joint(first, second))
        close(posterior.joint(second, first), exact.joint(second, first))


@every
@temperatures
def test_tempered_marginals(program: Program, temperature: float):
    started = program.start()
    exact = started.exact()
    posterior = lvppl.posterior(started.model, *started.args, temperature=temperature)
    for name in exact.latents:
        close(posterior.marginals(name), exact.marginals(name, temperature))
    for pair in program.pairs:
        close(posterior.joint(*pair), exact.joint(*pair, temperature))


@every
def test_the_best_assignment(program: Program):
    started = program.start()
    values, best = started.exact().map()
    found = lvppl.posterior(started.model, *started.args).map()
    assert found.log_joint.dim() == 0
    close(found.log_joint.detach(), best.detach())
    assert set(found.values) == set(values)
    for name, value in values.items():
        torch.testing.assert_close(found.values[name], value, rtol=0, atol=0)


@every
def test_a_temperature_near_zero_gives_the_best_assignment(program: Program):
    """Within T ln(states) in value; the runner-up has probability exp(-gap / T) < 1e-12."""
    if program.masked_latents:
        pytest.skip("masked elements of latents keep their prior at every temperature")
    started = program.start()
    exact = started.exact()
    values, best = exact.map()
    temperature = 1e-4
    record = lvppl.log_evidence(started.model, *started.args, temperature=temperature)
    gap = float((record.total - best).detach())
    assert -1e-9 <= gap <= exact.scale * temperature * math.log(len(exact.log_joint))
    posterior = lvppl.posterior(started.model, *started.args, temperature=temperature)
    for name, latent in exact.latents.items():
        onehot = (latent.support == values[name].unsqueeze(-1)).to(torch.float64)
        close(posterior.marginals(name), onehot, 1e-8)


def test_impossible_states_have_probability_zero():
    started = PROGRAMS["impossible_transitions"].start()
    posterior = lvppl.posterior(started.model, *started.args)
    assert (posterior.marginals("x_0")[:, 1:] == 0).all()
    assert (posterior.joint("x_1", "x_2")[:, 1, 0] == 0).all()
    drawn = posterior.sample(200, seed=4)
    steps = torch.stack([drawn["x_0"], drawn["x_1"], drawn["x_2"]]).diff(dim=0)
    assert ((steps == 0) | (steps == 1)).all()


# The comparisons of the two sampling tests below, over every program, are fewer than this.
COMPARISONS = 2000


def frequencies_agree(frequency: Tensor, probability: Tensor, num_samples: int) -> None:
    """Bernstein's bound, exact at any number of samples: all tests together fail by chance with
    probability below 1e-4 (about six standard errors, and a little more for rare states)."""
    log = math.log(2 * COMPARISONS / 1e-4)
    variance = probability * (1 - probability)
    bound = (2 * variance * log / num_samples).sqrt() + 2 * log / (3 * num_samples)
    assert ((frequency - probability).abs() <= bound).all()
    assert (frequency[probability == 0] == 0).all()


def indices(drawn: Tensor, exact: Exact, name: str) -> Tensor:
    """Support values to indices; every value must be one of the support's."""
    hits = drawn.unsqueeze(-1) == exact.latents[name].support
    assert (hits.sum(-1) == 1).all()
    return hits.long().argmax(-1)


@every
def test_sampling_frequencies(program: Program):
    started = program.start()
    exact = started.exact()
    drawn = lvppl.posterior(started.model, *started.args).sample(4000, seed=11)
    assert set(drawn) == set(exact.latents)
    onehots = {}
    for name, latent in exact.latents.items():
        assert drawn[name].shape == (4000, *latent.plates)
        assert drawn[name].dtype == latent.support.dtype
        index = indices(drawn[name], exact, name)
        onehots[name] = torch.nn.functional.one_hot(index, len(latent.support)).double()
        frequencies_agree(onehots[name].mean(0), exact.marginals(name), 4000)


@paired
def test_sampling_frequencies_of_pairs(program: Program):
    """Draws of a datum come from one joint assignment, not from marginals side by side."""
    started = program.start()
    exact = started.exact()
    drawn = lvppl.posterior(started.model, *started.args).sample(4000, seed=12)
    for first, second in program.pairs:
        one, two = exact.latents[first], exact.latents[second]
        hot1 = torch.nn.functional.one_hot(indices(drawn[first], exact, first), len(one.support))
        hot2 = torch.nn.functional.one_hot(indices(drawn[second], exact, second), len(two.support))
        dims = sorted({*one.dims, *two.dims})
        hot1 = _spread(hot1, [dim in one.dims for dim in dims])
        hot2 = _spread(hot2, [dim in two.dims for dim in dims])
        pairs = (hot1.unsqueeze(-1) * hot2.unsqueeze(-2)).double().mean(0)
        frequencies_agree(pairs, exact.joint(first, second), 4000)


def _spread(hot: Tensor, present: list[bool]) -> Tensor:
    """Singleton dimensions for the plates that a site lacks."""
    for position, has in enumerate(present):
        if not has:
            hot = hot.unsqueeze(1 + position)
    return hot


def test_samples_of_whole_paths():
    """Beyond pairs: the frequency of every path of a chain."""
    started = PROGRAMS["gaussian_chain"].start()
    exact = started.exact()
    drawn = lvppl.posterior(started.model, *started.args).sample(20_000, seed=13)
    names = list(exact.latents)
    code = sum(3**i * drawn[name] for i, name in enumerate(names))
    states = sum(3**i * exact.states[name] for i, name in enumerate(names))
    counts = torch.bincount(code, minlength=81)[states] / 20_000
    frequencies_agree(counts.double(), exact.weights(), 20_000)


def test_a_seed_gives_the_same_samples():
    started = PROGRAMS["nested_plates"].start()
    posterior = lvppl.posterior(started.model, *started.args)
    first, again, other = (posterior.sample(100, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_gradient_of_the_evidence_is_the_mean_gradient_of_the_joint():
    """∇ ln p(y) = E_{p(z|y)} ∇ ln p(z, y), the mean taken under the posterior found."""
    started = PROGRAMS["gaussian_mixture"].start()
    (y,) = started.args
    responsibilities = lvppl.posterior(started.model, y).marginals("z").detach()
    w, m, s = (pyro.param(name) for name in ("weights", "loc", "scale"))
    joint = w.log() - 0.5 * ((y[:, None] - m) / s) ** 2 - s.log() - 0.5 * math.log(2 * math.pi)
    expected = gradients((responsibilities * joint).sum())
    found = gradients(lvppl.log_evidence(started.model, y).total)
    for name in expected:
        close(found[name], expected[name])


# ------------------------------------------------------------------------------------------- scale


def test_many_data_in_one_plate():
    """The cost is that of a datum times their number: 2,000 data of 3 states, by the formula."""
    y = torch.linspace(-3, 3, 2000, dtype=torch.float64)
    w, m = t([0.2, 0.3, 0.5]), t([-1.0, 0.5, 2.0])

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = categorical("z", w)
            pyro.sample("y", dist.Normal(m[z], t(1.0)), obs=y)

    expected = (w.log() - 0.5 * (y[:, None] - m) ** 2 - 0.5 * math.log(2 * math.pi)).logsumexp(-1)
    close(lvppl.log_evidence(model, y).per_datum, expected)


def test_a_long_chain():
    """60 steps of 3 states (4e28 paths) by the forward recursion, with its gradient."""
    y = torch.sin(torch.arange(60, dtype=torch.float64))

    def model(y: Tensor) -> None:
        jump = simplex("jump", [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
        loc, x = real("loc", [-1.0, 0.0, 1.0]), None
        for step in pyro.markov(range(len(y))):
            x = categorical(f"x_{step}", t([0.5, 0.3, 0.2]) if x is None else jump[x])
            pyro.sample(f"y_{step}", dist.Normal(loc[x], t(0.5)), obs=y[step])

    record = lvppl.log_evidence(model, y)
    jump, loc = pyro.param("jump"), pyro.param("loc")
    emission = -2 * (y[:, None] - loc) ** 2 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    alpha = t([0.5, 0.3, 0.2]).log() + emission[0]
    for step in range(1, 60):
        alpha = (alpha.unsqueeze(-1) + jump.log()).logsumexp(-2) + emission[step]
    close(record.total, alpha.logsumexp(0))
    found, expected = gradients(record.total), gradients(alpha.logsumexp(0))
    for name in expected:
        close(found[name], expected[name])


# ---------------------------------------------------------------------------------------- refusals


def refusal(model: Callable[..., None], *args: Tensor) -> str:
    """The message with which both calls refuse a program."""
    messages = []
    for call in (lvppl.log_evidence, lvppl.posterior):
        with pytest.raises(lvppl.ProgramError) as caught:
            call(model, *args)
        messages.append(str(caught.value))
    assert len(messages[0]) > 40, "a sentence: what was expected, what came, what to do"
    assert messages[0] == messages[1]
    return messages[0]


def test_a_continuous_latent_is_refused_by_name():
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            k = categorical("k", t([0.3, 0.7]))
            depth = pyro.sample("depth", dist.Laplace(t(0.0), t(1.0)))
            pyro.sample("y", dist.Normal(depth + k, t(1.0)), obs=y)

    message = refusal(model, t([0.3, 1.2]))
    assert "'depth'" in message and "Laplace" in message
    assert re.search(r"log_likelihood|guide|ELBO|SVI|condition", message), "what to do instead"


def test_a_latent_of_unbounded_support_is_refused_by_name():
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            count = pyro.sample("count", dist.Poisson(t(2.0)))
            pyro.sample("y", dist.Normal(count, t(1.0)), obs=y)

    message = refusal(model, t([0.3, 1.2]))
    assert "'count'" in message and "support" in message and "Poisson" in message


def test_a_sum_that_is_too_large_says_how_large():
    """Forty binary latents that meet in one factor: 2^40 states at once."""

    def model(y: Tensor) -> None:
        bits = [pyro.sample(f"bit_{i}", dist.Bernoulli(t(0.5)), infer=PARALLEL) for i in range(40)]
        pyro.sample("y", dist.Normal(sum(bits), t(1.0)), obs=y)

    message = refusal(model, t(17.0))
    assert re.search(r"2\^40|1[.,]\d+e\+?12|1,?099,?511,?627,?776|10\^12|40", message)


def test_a_long_loop_without_markov_is_told_of_markov():
    """Without `pyro.markov` every step takes a dimension of its own, and they run out."""

    def model(y: Tensor) -> None:
        jump, x = t([[0.8, 0.2], [0.3, 0.7]]), torch.tensor(0)
        for step in range(len(y)):
            x = categorical(f"x_{step}", jump[x])
            pyro.sample(f"y_{step}", dist.Normal(t([-1.0, 1.0])[x], t(1.0)), obs=y[step])

    assert "pyro.markov" in refusal(model, torch.zeros(100, dtype=torch.float64))


def test_plates_that_cannot_be_eliminated_are_refused():
    """Latents of rows and of columns that meet in every cell: no exact sum is a product of sums."""

    def model(y: Tensor) -> None:
        rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
        with rows:
            a = categorical("a", t([0.3, 0.7]))
        with columns:
            b = categorical("b", t([0.6, 0.4]))
        with rows, columns:
            pyro.sample("y", dist.Normal(t(1.0) * a * b, t(1.0)), obs=y)

    message = refusal(model, torch.zeros(3, 4, dtype=torch.float64))
    assert "plate" in message and "'rows'" in message and "'columns'" in message


def test_a_temperature_must_be_positive():
    started = PROGRAMS["gaussian_mixture"].start()
    for temperature, call in itertools.product((0.0, -1.0), (lvppl.log_evidence, lvppl.posterior)):
        with pytest.raises(lvppl.ProgramError, match="temperature"):
            call(started.model, *started.args, temperature=temperature)


def test_an_unknown_site_is_refused_with_the_known_ones():
    started = PROGRAMS["two_latents"].start()
    posterior = lvppl.posterior(started.model, *started.args)
    with pytest.raises(lvppl.ProgramError, match=r"'c'.*'a'"):
        posterior.marginals("c")
    with pytest.raises(lvppl.ProgramError, match=r"'y'"):
        posterior.joint("a", "y")


def test_sites_that_share_no_factor_have_no_pairwise_marginal():
    """Steps 0 and 3 of a chain: refused, or right; never the product of their marginals."""
    started = PROGRAMS["gaussian_chain"].start()
    exact = started.exact()
    posterior = lvppl.posterior(started.model, *started.args)
    try:
        found = posterior.joint("x_0", "x_3")
    except lvppl.ProgramError as error:
        assert "'x_0'" in str(error) and "'x_3'" in str(error)
    else:
        close(found, exact.joint("x_0", "x_3"))


def test_scales_that_differ_are_refused():
    """A scale on the likelihood alone: neither outside the sum nor the posterior's own."""

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = categorical("z", t([0.3, 0.7]))
            with poutine.scale(scale=2.0):
                pyro.sample("y", dist.Normal(t([-1.0, 1.0])[z], t(1.0)), obs=y)

    message = refusal(model, t([0.3, -1.2]))
    assert "'y'" in message and "poutine.scale" in message

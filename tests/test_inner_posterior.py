"""Posteriors of what an observed distribution sums out, against the same program spelled out.

Each case is written twice: with a HiddenMarkov or a MixtureSameFamily, and with a site for every
state of it. The second is solved by running every assignment of its latents.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

import lvppl
from lvppl.distributions import HiddenMarkov
from tests.enumerable import Exact, brute_force, t

INITIAL = t([[0.6, 0.4], [0.15, 0.85]])
TRANSITION = t([[[0.7, 0.3], [0.2, 0.8]], [[0.1, 0.9], [0.55, 0.45]]])
LOC = t([[-1.0, 1.5], [0.5, -2.0]])
Y = t([[-0.4, 1.9, 0.3], [1.1, -0.8, 0.2]])
LENGTHS = torch.tensor([3, 2])
OBSERVED = torch.tensor([[True, False, True], [True, True, False]])


@dataclass(frozen=True)
class Case:
    """A program, the same spelled out, and which sites of that make which latent of the first."""

    marginalised: Callable[..., Any]
    spelled: Callable[..., Any]
    args: tuple[Any, ...]
    steps: dict[str, Sequence[str]]
    """Latent inside: the sites of its steps; several are stacked to the right of the plates."""
    outside: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    """Sites that the first program sums out for good."""
    cut: bool = False
    """Whether sequences end at LENGTHS."""

    @functools.cached_property
    def exact(self) -> Exact:
        return brute_force(self.spelled, self.args)

    def posterior(self, **options: Any) -> lvppl.ExactPosterior:
        return lvppl.posterior(self.marginalised, *self.args, **options)


def spelled_chain(
    name: str,
    y: Tensor,
    p: Tensor,
    A: Callable[[int, Tensor], Tensor],
    emit: Callable[[Tensor], Any],
    lengths: Tensor,
    observed: Tensor,
) -> None:
    """A state and an observation for each step; inside the plate of sequences."""
    z = None
    for step in range(y.shape[1]):
        exists = step < lengths
        with poutine.mask(mask=exists):
            z = pyro.sample(f"{name}_{step}", dist.Categorical(p if z is None else A(step, z)))
        with poutine.mask(mask=exists & observed[:, step]):
            pyro.sample(f"y_{name}_{step}", emit(z), obs=y[:, step].nan_to_num(7.0))


def chain_case(lengths: Tensor | None = None, mask: Tensor | None = None, **how: Any) -> Case:
    """A chain with the same matrix at every step."""

    def marginalised(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            chain = HiddenMarkov(
                INITIAL[0].log(),
                TRANSITION[0].log(),
                dist.Normal(LOC[0], 1.0),
                lengths=lengths,
                mask=mask,
                **how,
            )
            pyro.sample("y", chain, obs=y)

    def spelled(y: Tensor) -> None:
        seen = torch.ones_like(y, dtype=torch.bool) if mask is None else mask
        upto = torch.full((len(y),), y.shape[1]) if lengths is None else lengths
        with pyro.plate("data", len(y)):
            spelled_chain(
                "z",
                y,
                INITIAL[0],
                lambda _, z: TRANSITION[0][z],
                lambda z: dist.Normal(LOC[0][z], 1.0),
                upto,
                seen,
            )

    steps = {"y_states": ["z_0", "z_1", "z_2"]}
    return Case(marginalised, spelled, (Y,), steps, cut=lengths is not None)


def driven_case() -> Case:
    """Another matrix at each step of each sequence."""
    A = torch.stack([TRANSITION, TRANSITION.flip(0)])  # sequences, steps - 1, K, K

    def marginalised(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            chain = HiddenMarkov(INITIAL[0].log(), A.log(), dist.Normal(LOC[0], 1.0))
            pyro.sample("y", chain, obs=y)

    def spelled(y: Tensor) -> None:
        full = torch.full((len(y),), 3), torch.ones_like(y, dtype=torch.bool)
        with pyro.plate("data", len(y)):
            spelled_chain(
                "z",
                y,
                INITIAL[0],
                lambda step, z: Vindex(A)[torch.arange(2), step - 1, z],
                lambda z: dist.Normal(LOC[0][z], 1.0),
                *full,
            )

    return Case(marginalised, spelled, (Y,), {"y_states": ["z_0", "z_1", "z_2"]})


def mixture_of_chains() -> Case:
    """Which chain a sequence is from is a latent of its own; one chain cannot make the second."""
    narrow = t([[-math.inf, -math.inf], [0.0, 0.0]])  # what the support leaves of each chain

    def marginalised(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(t([0.3, 0.7])))
            chain = HiddenMarkov(
                INITIAL[c].log(), TRANSITION[c].log(), dist.Normal(LOC[c], t(1.0)), lengths=LENGTHS
            )
            pyro.sample("y", chain, obs=y)
            pyro.factor("allowed", torch.where(torch.arange(2) == 1, narrow[c][..., 0], 0.0))

    def spelled(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(t([0.3, 0.7])))
            spelled_chain(
                "z",
                y,
                INITIAL[c],
                lambda _, z: Vindex(TRANSITION)[c, z],
                lambda z: dist.Normal(Vindex(LOC)[c, z], 1.0),
                LENGTHS,
                torch.ones_like(y, dtype=torch.bool),
            )
            pyro.factor("allowed", torch.where(torch.arange(2) == 1, narrow[c][..., 0], 0.0))

    steps = {"y_states": ["z_0", "z_1", "z_2"]}
    return Case(marginalised, spelled, (Y,), steps, ("c",), cut=True)


def impossible_inside() -> Case:
    """Under one outer state a datum is outside the support of every component."""
    low, high = t([[0.0, -1.0], [-3.0, -4.0]]), t([[1.0, 2.0], [3.0, 5.0]])
    y = t([0.5, -2.0, 1.5])

    def marginalised(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(t([0.3, 0.7])))
            parts = dist.Uniform(low[c], high[c], validate_args=False)
            mixing = dist.Categorical(t([0.4, 0.6]).expand(parts.batch_shape))
            pyro.sample("y", dist.MixtureSameFamily(mixing, parts, validate_args=False), obs=y)

    def spelled(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(t([0.3, 0.7])))
            k = pyro.sample("k", dist.Categorical(t([0.4, 0.6])))
            part = dist.Uniform(Vindex(low)[c, k], Vindex(high)[c, k], validate_args=False)
            pyro.sample("y", part, obs=y)

    return Case(marginalised, spelled, (y,), {"y_component": ["k"]}, ("c",))


def emission_mixtures() -> Case:
    """Two components for each state: summed out, whatever is asked of the path."""
    loc, y = t([[-1.0, 0.0], [1.5, 2.5]]), Y[:1, :3]

    def marginalised(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            mixing = dist.Categorical(t([[0.3, 0.7], [0.8, 0.2]]))
            emission = dist.MixtureSameFamily(mixing, dist.Normal(loc, 1.0))
            chain = HiddenMarkov(INITIAL[0].log(), TRANSITION[0].log(), emission)
            pyro.sample("y", chain, obs=y)

    def spelled(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = None
            for step in range(3):
                p = INITIAL[0] if z is None else TRANSITION[0][z]
                z = pyro.sample(f"z_{step}", dist.Categorical(p))
                j = pyro.sample(f"j_{step}", dist.Categorical(t([[0.3, 0.7], [0.8, 0.2]])[z]))
                pyro.sample(f"y_{step}", dist.Normal(Vindex(loc)[z, j], 1.0), obs=y[:, step])

    steps = {"y_states": ["z_0", "z_1", "z_2"]}
    return Case(marginalised, spelled, (y,), steps, (), ("j_0", "j_1", "j_2"))


def vector_mixture(masked: bool = False) -> Case:
    """One component for the whole vector; some data are hidden."""
    loc, shown = t([[-1.0, 0.5], [1.5, -0.5], [0.0, 0.0]]), torch.tensor([True, not masked])
    weights = t([0.2, 0.5, 0.3])

    def marginalised(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            parts = dist.Normal(loc, 1.0).to_event(1)
            mixture = dist.MixtureSameFamily(dist.Categorical(weights), parts)
            pyro.sample("y", mixture.mask(shown), obs=y)

    def spelled(y: Tensor) -> None:
        with pyro.plate("data", len(y)), poutine.mask(mask=shown):
            k = pyro.sample("k", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(loc[k], 1.0).to_event(1), obs=y)

    return Case(marginalised, spelled, (Y[:, :2],), {"y_component": ["k"]})


def element_mixtures() -> Case:
    """A component for each element of the vector, hidden ones among them, and one outer state."""
    loc, shown = t([[-1.0, 0.5], [1.5, -0.5]]), OBSERVED[:, :2]
    weights = t([[0.2, 0.8], [0.6, 0.4]])

    def marginalised(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(t([0.3, 0.7])))
            # batch (states of c, data, elements)
            mixing = dist.Categorical(weights[c].unsqueeze(-2).expand(*c.shape, 2, 2))
            parts = dist.Normal(loc[c].unsqueeze(-2).expand(*c.shape, 2, 2), 1.0)
            mixture = dist.MixtureSameFamily(mixing, parts).mask(shown).to_event(1)
            pyro.sample("y", mixture, obs=y)

    def spelled(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(t([0.3, 0.7])))
            for i in range(2):
                with poutine.mask(mask=shown[:, i]):
                    k = pyro.sample(f"k_{i}", dist.Categorical(weights[c]))
                    pyro.sample(f"y_{i}", dist.Normal(Vindex(loc)[c, k], 1.0), obs=y[:, i])

    return Case(marginalised, spelled, (Y[:, :2],), {"y_component": ["k_0", "k_1"]}, ("c",))


def hidden_chain() -> Case:
    """A whole sequence out of sight: its states have their prior."""
    shown = torch.tensor([True, False])

    def marginalised(y: Tensor) -> None:
        with pyro.plate("data", len(y)), poutine.mask(mask=shown):
            chain = HiddenMarkov(INITIAL[0].log(), TRANSITION[0].log(), dist.Normal(LOC[0], 1.0))
            pyro.sample("y", chain, obs=y)

    def spelled(y: Tensor) -> None:
        with pyro.plate("data", len(y)), poutine.mask(mask=shown):
            z = None
            for step in range(3):
                p = INITIAL[0] if z is None else TRANSITION[0][z]
                z = pyro.sample(f"z_{step}", dist.Categorical(p))
                pyro.sample(f"y_{step}", dist.Normal(LOC[0][z], 1.0), obs=y[:, step])

    return Case(marginalised, spelled, (Y,), {"y_states": ["z_0", "z_1", "z_2"]})


def without_plates() -> Case:
    """One sequence, and no plate at all."""

    def marginalised(y: Tensor) -> None:
        chain = HiddenMarkov(INITIAL[0].log(), TRANSITION[0].log(), dist.Normal(LOC[0], 1.0))
        pyro.sample("y", chain, obs=y)

    def spelled(y: Tensor) -> None:
        z = None
        for step in range(3):
            p = INITIAL[0] if z is None else TRANSITION[0][z]
            z = pyro.sample(f"z_{step}", dist.Categorical(p))
            pyro.sample(f"y_{step}", dist.Normal(LOC[0][z], 1.0), obs=y[step])

    return Case(marginalised, spelled, (Y[0],), {"y_states": ["z_0", "z_1", "z_2"]})


def nested_plates() -> Case:
    """Groups of sequences: the outer plate to the left, and a group's own latent in it alone."""
    y = torch.stack([Y[:, :2], Y.flip(0)[:, 1:]])  # groups, sequences, steps

    def marginalised(y: Tensor) -> None:
        with pyro.plate("groups", 2, dim=-2):
            c = pyro.sample("c", dist.Categorical(t([0.3, 0.7])))
            with pyro.plate("sequences", 2, dim=-1):
                chain = HiddenMarkov(
                    INITIAL[c].log(), TRANSITION[c].log(), dist.Normal(LOC[c], t(1.0))
                )
                pyro.sample("y", chain, obs=y)

    def spelled(y: Tensor) -> None:
        with pyro.plate("groups", 2, dim=-2):
            c = pyro.sample("c", dist.Categorical(t([0.3, 0.7])))
            with pyro.plate("sequences", 2, dim=-1):
                z0 = pyro.sample("z_0", dist.Categorical(INITIAL[c]))
                pyro.sample("y_0", dist.Normal(Vindex(LOC)[c, z0], 1.0), obs=y[..., 0])
                z1 = pyro.sample("z_1", dist.Categorical(Vindex(TRANSITION)[c, z0]))
                pyro.sample("y_1", dist.Normal(Vindex(LOC)[c, z1], 1.0), obs=y[..., 1])

    return Case(marginalised, spelled, (y,), {"y_states": ["z_0", "z_1"]}, ("c",))


CASES = {
    "chain": chain_case(),
    "lengths": chain_case(LENGTHS),
    "missing steps": chain_case(mask=OBSERVED),
    "lengths and missing steps": chain_case(LENGTHS, OBSERVED),
    "a matrix at each step": driven_case(),
    "mixture of chains": mixture_of_chains(),
    "an impossible component": impossible_inside(),
    "mixtures at each step": emission_mixtures(),
    "vector mixture": vector_mixture(),
    "hidden data": vector_mixture(masked=True),
    "element mixtures": element_mixtures(),
    "a hidden sequence": hidden_chain(),
    "no plates": without_plates(),
    "nested plates": nested_plates(),
}
every = pytest.mark.parametrize("name", CASES)


def close(found: Tensor, expected: Tensor, atol: float = 1e-10) -> None:
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=atol)


def exists(case: Case, latent: str) -> Tensor:
    """Which steps there are, of the shape of a latent's values; all but those past a length."""
    shape = case.posterior().marginals(latent).shape[:-1]
    if case.cut and latent in case.steps:
        return torch.arange(shape[-1]) < LENGTHS[:, None]
    return torch.ones(shape, dtype=torch.bool)


def assignments(case: Case) -> dict[str, Tensor]:
    """Every assignment of each latent of the first program, (assignments, elements of a value)."""
    sites = {**{site: [site] for site in case.outside}, **case.steps}
    states, count = case.exact.states, len(case.exact.log_joint)
    return {
        latent: torch.stack([states[s].reshape(count, -1) for s in steps], -1).flatten(1)
        for latent, steps in sites.items()
    }


@every
def test_marginals_and_evidence(name: str) -> None:
    case = CASES[name]
    posterior = case.posterior()
    assert posterior.sites == (*case.outside, *case.steps)
    close(posterior.log_evidence.total, case.exact.total)
    for site in case.outside:
        close(posterior.marginals(site), case.exact.marginals(site))
    for latent, sites in case.steps.items():
        found = posterior.marginals(latent)
        parts = [case.exact.marginals(site) for site in sites]
        expected = torch.stack(parts, -2).reshape(found.shape)
        close(found, expected * exists(case, latent)[..., None])


@every
@pytest.mark.parametrize("temperature", [0.4, 3.0])
def test_at_a_temperature(name: str, temperature: float) -> None:
    case = CASES[name]
    if case.components:
        pytest.skip("components inside a chain are summed at temperature one")
    posterior = case.posterior(temperature=temperature)
    close(posterior.log_evidence.total, case.exact.tempered(temperature))
    evidence = lvppl.log_evidence(case.marginalised, *case.args, temperature=temperature)
    close(evidence.total, case.exact.tempered(temperature))
    for latent, sites in case.steps.items():
        found = posterior.marginals(latent)
        parts = [case.exact.marginals(site, temperature) for site in sites]
        expected = torch.stack(parts, -2).reshape(found.shape)
        close(found, expected * exists(case, latent)[..., None])


@every
def test_neighbours_in_a_path(name: str) -> None:
    case = CASES[name]
    for latent, sites in case.steps.items():
        if not latent.endswith("states"):
            with pytest.raises(lvppl.ProgramError, match="has no neighbour of its own"):
                case.posterior().joint(latent)
            continue
        found = case.posterior().joint(latent)
        pairs = [case.exact.joint(a, b) for a, b in itertools.pairwise(sites)]
        expected = torch.stack(pairs, -3)
        close(found, expected * exists(case, latent)[..., 1:, None, None])


@every
def test_the_best_assignment(name: str) -> None:
    """Of every latent together; components in a chain are summed for each path.

    What a mask or a length hides makes ties: there any value will do, and zero past a length.
    """
    case, found = CASES[name], CASES[name].posterior().map()
    columns = assignments(case)
    joint = (case.exact.log_joint - case.exact.log_padding).exp()
    unique, index = torch.cat([*columns.values()], 1).unique(dim=0, return_inverse=True)
    how = "sum" if case.components else "amax"
    value = torch.zeros(len(unique), dtype=torch.float64).scatter_reduce(0, index, joint, how)
    close(found.log_joint, value.max().log())
    close(found.per_datum.sum(), found.log_joint)
    best = unique[torch.isclose(value, value.max(), rtol=1e-12, atol=0)]
    sizes = [column.shape[1] for column in columns.values()]
    for latent, ties in zip(columns, best.split(sizes, 1), strict=True):
        chosen = found.values[latent]
        assert (ties == chosen.flatten()).any(0).all()
        assert (chosen[~exists(case, latent)] == 0).all()


CHANCE = 1e-4 / 2000
"""Of each of fewer frequencies than 2,000."""


def frequency_agrees(frequency: float, p: float, count: int) -> None:
    """Bernstein's inequality, exact at any number of draws."""
    p, log = min(p, 1.0), math.log(2 / CHANCE)
    assert abs(frequency - p) <= math.sqrt(2 * p * (1 - p) * log / count) + 2 * log / (3 * count)
    assert p > 0 or frequency == 0


@every
def test_draws(name: str) -> None:
    """How often each value of each datum is drawn: of whole paths, and not step by step."""
    case, count = CASES[name], 4000
    posterior, weights = case.posterior(), case.exact.weights()
    drawn, again = (posterior.sample(count, seed=5) for _ in range(2))
    for latent, wanted in assignments(case).items():
        value, here = drawn[latent], exists(case, latent)
        assert torch.equal(value, again[latent]) and value.dtype == torch.int64
        assert value.shape[1:] == here.shape and (value[:, ~here] == 0).all()
        steps = len(case.steps.get(latent, [latent]))
        base = 3 ** torch.arange(steps) * here.reshape(-1, steps)
        found = (value.reshape(count, -1, steps) * base).sum(-1)
        wanted = (wanted.reshape(len(wanted), -1, steps) * base).sum(-1)
        for datum in range(found.shape[1]):
            for code in wanted[:, datum].unique():
                p = float(weights[wanted[:, datum] == code].sum())
                frequency_agrees(float((found[:, datum] == code).double().mean()), p, count)


def test_draws_are_of_all_latents_together() -> None:
    """The outer state and the path of one draw belong to each other."""
    case, count = CASES["mixture of chains"], 20_000
    drawn = case.posterior().sample(count, seed=1)
    found = (drawn["c"] * 2 + drawn["y_states"][..., 0])[:, 0]
    pairs = case.exact.joint("c", "z_0")[0].flatten()
    for code, p in enumerate(pairs.tolist()):
        frequency_agrees(float((found == code).double().mean()), p, count)


def test_plates_and_names() -> None:
    assert CASES["chain"].posterior().plates("y_states") == ("data",)
    assert CASES["nested plates"].posterior().plates("y_states") == ("groups", "sequences")

    def taken(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("y_component", dist.Categorical(t([0.4, 0.6])))
            mixing = dist.Categorical(t([0.3, 0.7]))
            mixture = dist.MixtureSameFamily(mixing, dist.Normal(t([-1.0, 1.0]), 1.0))
            pyro.sample("y", mixture, obs=y)

    posterior = lvppl.posterior(taken, t([0.3, 1.2]))
    assert posterior.sites == ("y_component", "y_component_")
    close(posterior.marginals("y_component"), t([[0.4, 0.6]] * 2))
    odds = 0.7 / 0.3 * math.exp(2 * 0.3)
    close(posterior.marginals("y_component_")[0, 1], t(odds / (1 + odds)))


def test_what_is_inside_has_no_joint_with_what_is_outside() -> None:
    posterior = CASES["mixture of chains"].posterior()
    with pytest.raises(lvppl.ProgramError, match="'y_states' is inside the distribution of 'y'"):
        posterior.joint("c", "y_states")
    with pytest.raises(lvppl.ProgramError, match="no latent 'z' with states"):
        posterior.marginals("z")


def test_an_impossible_sequence_is_refused() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            emission = dist.Uniform(t([0.0, -1.0]), t([1.0, 2.0]), validate_args=False)
            chain = HiddenMarkov(INITIAL[0].log(), TRANSITION[0].log(), emission)
            pyro.sample("y", chain, obs=y)

    with pytest.raises(lvppl.ProgramError, match=r"datum 1 has ln p\(y\) = -inf"):
        lvppl.posterior(model, t([[0.5, 1.5], [0.5, 3.0]]))


def test_pyros_own_chain_is_told_of_ours() -> None:
    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            emission = dist.Normal(LOC[0], t(1.0))
            chain = dist.DiscreteHMM(INITIAL[0].log(), TRANSITION[0].log(), emission, duration=3)
            pyro.sample("y", chain, obs=y)

    with pytest.raises(
        lvppl.ProgramError, match=r"lvppl\.distributions\.HiddenMarkov, whose first"
    ):
        lvppl.posterior(model, Y)


def test_many_draws_of_a_long_chain_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts change the draws' numbers, not what they are draws of."""
    monkeypatch.setattr("lvppl.evidence._DRAW_ELEMENTS", 40)
    case, count = CASES["chain"], 3000
    drawn = case.posterior().sample(count, seed=5)["y_states"]
    assert drawn.shape == (count, 2, 3)
    marginal = case.exact.marginals("z_1")
    frequency = torch.nn.functional.one_hot(drawn[..., 1], 2).double().mean(0)
    for found, p in zip(frequency.flatten().tolist(), marginal.flatten().tolist(), strict=True):
        frequency_agrees(found, p, count)


# ---------------------------------------------------------------------------------- after a fit


def test_the_posterior_of_a_fit_keeps_the_fits_parameters() -> None:
    """What is asked later is not answered with what the parameters have become."""
    loc = torch.nn.Parameter(LOC[0].clone())

    def model(y: Tensor) -> None:
        center = pyro.param("loc", loc)
        with pyro.plate("data", len(y)):
            chain = HiddenMarkov(
                INITIAL[0].log(), TRANSITION[0].log(), dist.Normal(center, t(1.0)), lengths=LENGTHS
            )
            pyro.sample("y", chain, obs=y)

    fit = lvppl.EM(model).fit(Y, max_iter=3, progress=False, seed=0)
    posterior = fit.posterior(Y)
    center = fit.params["loc"]
    with torch.no_grad():
        loc.fill_(100.0)
    chain = HiddenMarkov(
        INITIAL[0].log(), TRANSITION[0].log(), dist.Normal(center, t(1.0)), lengths=LENGTHS
    )
    found = chain.posterior(Y)
    close(posterior.marginals("y_states"), found.marginals)
    best = posterior.map()
    states, log_joint = chain.viterbi(Y)
    assert torch.equal(best.values["y_states"], states)
    close(best.per_datum, log_joint)
    close(posterior.log_evidence.per_datum, found.log_evidence)


@pytest.mark.parametrize("hard", [False, True])
def test_the_posterior_of_a_fit_with_missing_steps(hard: bool) -> None:
    y = Y.clone()
    y[0, 1] = math.nan

    def model(y: Tensor) -> None:
        loc = pyro.param("loc", lambda: LOC[0].clone())
        with pyro.plate("data", len(y)):
            chain = HiddenMarkov(INITIAL[0].log(), TRANSITION[0].log(), dist.Normal(loc, t(1.0)))
            pyro.sample("y", chain, obs=y)

    fit = lvppl.EM(model, hard=hard).fit(y, missing="nan", max_iter=3, progress=False, seed=0)
    posterior = fit.posterior(y)
    chain = HiddenMarkov(
        INITIAL[0].log(),
        TRANSITION[0].log(),
        dist.Normal(fit.params["loc"], t(1.0)),
        mask=~y.isnan(),
    )
    close(posterior.marginals("y_states"), chain.posterior(y.nan_to_num()).marginals)
    assert torch.equal(posterior.map().values["y_states"], chain.viterbi(y.nan_to_num())[0])

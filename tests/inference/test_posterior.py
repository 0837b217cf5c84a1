"""Draws of posterior, prior and predictive against closed forms.

Statistical assertions allow K standard errors at a fixed seed. Fewer than 300 numbers are compared;
each fails falsely with probability 6e-7, the file with less than 2e-4 over all seeds.
"""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference import posterior as module
from lvppl.inference.posterior import reconstruct, sample_posterior, sample_prior
from tests.programs import PROGRAMS

K = 5.0
NOISE, PRIOR_LOC, PRIOR_SCALE = 0.7, 0.4, 1.3
Y = torch.tensor([0.3, -1.2, 2.0, 0.9, -0.4], dtype=torch.float64)

VARIANCE = 1 / (1 / PRIOR_SCALE**2 + 1 / NOISE**2)


def exact_mean(y: Tensor) -> Tensor:
    return VARIANCE * (PRIOR_LOC / PRIOR_SCALE**2 + y / NOISE**2)


def model(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(y.new_tensor(PRIOR_LOC), PRIOR_SCALE))
        pyro.sample("y", dist.Normal(z, NOISE), obs=y)


def guide(y: Tensor) -> None:
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(exact_mean(y), VARIANCE**0.5))


def assert_mean(draws: Tensor, expected: Tensor | float) -> None:
    """The mean over dimension 0 is as expected, within K standard errors."""
    error = draws.std(0) / math.sqrt(len(draws))
    gap = (draws.mean(0) - expected).abs()
    assert bool((gap <= K * error + 1e-12).all()), (gap / error).max()


def assert_variance(draws: Tensor, expected: Tensor | float) -> None:
    assert_mean((draws - draws.mean(0)) ** 2 * len(draws) / (len(draws) - 1), expected)


def assert_frequencies(states: Tensor, probabilities: Tensor) -> None:
    """How often each state is drawn: K binomial standard errors, and a few for the rarest."""
    drawn = torch.nn.functional.one_hot(states, probabilities.shape[-1]).double().mean(0)
    error = (probabilities * (1 - probabilities) / len(states)).sqrt()
    assert bool(((drawn - probabilities).abs() <= K * error + 8 / len(states)).all())


# ---------------------------------------------------------------------- exact answers


def test_exact_guide_gives_the_posterior_and_the_evidence() -> None:
    drawn = sample_posterior(model, guide, Y, num_samples=4000, seed=1)
    assert drawn.samples["z"].shape == (4000, 5)
    assert drawn.samples["z"].dtype == torch.float64
    assert drawn.plates == {"z": ("data",), "y": ("data",)}
    assert_mean(drawn.samples["z"], exact_mean(Y))
    assert_variance(drawn.samples["z"], VARIANCE)
    evidence = dist.Normal(Y.new_tensor(PRIOR_LOC), math.hypot(PRIOR_SCALE, NOISE)).log_prob(Y)
    torch.testing.assert_close(drawn.log_weight, evidence.expand(4000, 5), rtol=0, atol=1e-12)
    torch.testing.assert_close(drawn.mean("z"), drawn.samples["z"].mean(0))
    torch.testing.assert_close(drawn.std("z"), drawn.samples["z"].std(0))


def test_log_terms_are_functions_of_the_draws() -> None:
    drawn = sample_posterior(model, guide, Y, num_samples=7, seed=2)
    z = drawn.samples["z"]
    likelihood = dist.Normal(z, NOISE).log_prob(Y)
    torch.testing.assert_close(drawn.log_likelihood, likelihood)
    torch.testing.assert_close(drawn.pointwise["y"], likelihood)
    prior = dist.Normal(Y.new_tensor(PRIOR_LOC), PRIOR_SCALE)
    torch.testing.assert_close(drawn.log_prior, prior.log_prob(z))
    expected = dist.Normal(exact_mean(Y), VARIANCE**0.5).log_prob(z)
    torch.testing.assert_close(drawn.log_guide, expected)
    torch.testing.assert_close(drawn.observed["y"], Y)


def test_posterior_predictive_is_normal() -> None:
    new = sample_posterior(model, guide, Y, num_samples=4000, seed=3).predictive["y"]
    assert_mean(new, exact_mean(Y))
    assert_variance(new, VARIANCE + NOISE**2)


def test_predictive_of_chained_observations_follows_its_own_draws() -> None:
    def chained(y: Tensor, u: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(y), 1.0))
            first = pyro.sample("y", dist.Normal(z, NOISE), obs=y)
            pyro.sample("u", dist.Normal(2.0 * first, 0.1), obs=u)

    def point(y: Tensor, u: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros_like(y), 0.5))

    new = sample_posterior(chained, point, Y, 5 * Y, num_samples=3000, seed=4).predictive
    assert_variance(new["u"], 4 * (0.25 + NOISE**2) + 0.01)
    assert_mean((new["u"] - 2 * new["y"]) ** 2, 0.01)


def test_reconstruction_is_the_mean_of_the_draws_own_means() -> None:
    z = sample_posterior(model, guide, Y, num_samples=40, seed=5).samples["z"]
    again = reconstruct(model, guide, Y, num_samples=40, seed=5)
    torch.testing.assert_close(again["y"], z.mean(0))


def test_prior_draws_are_of_the_prior() -> None:
    prior = sample_prior(model, Y, num_samples=4000, seed=6)
    assert prior.num_samples == 4000
    assert_mean(prior.samples["z"], PRIOR_LOC)
    assert_variance(prior.samples["z"], PRIOR_SCALE**2)
    assert_variance(prior.predictive["y"], PRIOR_SCALE**2 + NOISE**2)
    assert_variance(prior.predictive["y"] - prior.samples["z"], NOISE**2)
    torch.testing.assert_close(prior.predictive_mean["y"], prior.samples["z"])


# ---------------------------------------------------------------------- enumerated latents


def test_latents_that_the_model_enumerates_are_drawn_from_their_responsibilities() -> None:
    started = PROGRAMS["mixture_in_model"].start()
    with torch.no_grad():
        expected = started.oracle().posterior  # (data, components)
    assert isinstance(expected, Tensor)
    drawn = sample_posterior(*started.call, num_samples=3000, seed=7)
    assert drawn.plates["z"] == ("data",)
    assert not drawn.samples["z"].is_floating_point()
    assert_frequencies(drawn.samples["z"], expected)
    evidence = started.oracle().log_evidence
    assert evidence is not None
    torch.testing.assert_close(drawn.log_weight, evidence.detach().expand(3000, -1))


def test_chains_are_drawn_jointly() -> None:
    started = PROGRAMS["markov_in_model"].start()
    with torch.no_grad():
        expected = started.oracle().posterior  # (data, 8 paths)
    assert isinstance(expected, Tensor)
    drawn = sample_posterior(*started.call, num_samples=4000, seed=8).samples
    path = 4 * drawn["state_0"] + 2 * drawn["state_1"] + drawn["state_2"]
    assert_frequencies(path, expected)


@pytest.mark.parametrize("name", ["categorical_in_guide", "chained_in_guide"])
def test_what_the_guide_enumerates_is_drawn_from_it(name: str) -> None:
    """With z drawn from q like any other, E_q w = p(y)."""
    started = PROGRAMS[name].start()
    evidence = started.oracle().log_evidence
    assert evidence is not None
    drawn = sample_posterior(*started.call, num_samples=4000, seed=9)
    assert set(drawn.samples) == set(drawn.plates) - {"y"}
    assert_mean(drawn.log_weight.exp(), evidence.detach().exp())


# ---------------------------------------------------------------------- shapes


def test_plates_and_event_dimensions() -> None:
    def nested(y: Tensor) -> None:
        with pyro.plate("groups", y.shape[0], dim=-2):
            a = pyro.sample("a", dist.Normal(y.new_zeros(3), 1.0).to_event(1))
            with pyro.plate("members", y.shape[1], dim=-1):
                b = pyro.sample("b", dist.Normal(a.sum(-1), 1.0))
                mean = torch.stack([b, -b], -1)
                pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y)

    def nested_guide(y: Tensor) -> None:
        with pyro.plate("groups", y.shape[0], dim=-2):
            pyro.sample("a", dist.Normal(y.new_zeros(3), 1.0).to_event(1))
            with pyro.plate("members", y.shape[1], dim=-1):
                pyro.sample("b", dist.Normal(y.mean(-1), 1.0))

    y = torch.randn(4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = sample_posterior(nested, nested_guide, y, num_samples=6, seed=0)
    assert drawn.plates == {
        "a": ("groups",),
        "b": ("groups", "members"),
        "y": ("groups", "members"),
    }
    assert drawn.samples["a"].shape == (6, 4, 3)
    assert drawn.samples["b"].shape == (6, 4, 5)
    assert drawn.predictive["y"].shape == (6, 4, 5, 2)
    assert drawn.pointwise["y"].shape == (6, 4, 5)
    assert drawn.data_plates == ("groups",)
    assert drawn.log_weight.shape == (6, 4)
    b = drawn.samples["b"]
    expected = dist.Normal(torch.stack([b, -b], -1), 1.0).log_prob(y).sum(-1)
    torch.testing.assert_close(drawn.pointwise["y"], expected)
    prior = sample_prior(nested, y[:, :2], num_samples=3, seed=0)
    assert prior.predictive["y"].shape == (3, 4, 2, 2)


@pytest.mark.parametrize("size", [1, 2, 17])
def test_data_of_another_size(size: int) -> None:
    y = torch.linspace(-2, 2, size, dtype=torch.float64)
    drawn = sample_posterior(model, guide, y, num_samples=3, seed=0)
    assert drawn.samples["z"].shape == drawn.predictive["y"].shape == (3, size)
    assert reconstruct(model, guide, y)["y"].shape == (size,)
    assert sample_prior(model, y).predictive["y"].shape == (1, size)


def test_one_datum_for_global_latents() -> None:
    started = PROGRAMS["global_normal"].start()
    drawn = sample_posterior(*started.call, num_samples=5, seed=0)
    assert drawn.log_weight.shape == (5, 1)
    assert (drawn.data_plates, drawn.data_shape) == ((), ())
    assert drawn.samples["z"].shape == (5,)


def test_particles_that_run_as_a_loop() -> None:
    started = PROGRAMS["concatenating"].start()
    drawn = sample_posterior(*started.call, num_samples=9, seed=0)
    assert len(drawn.samples["z"].flatten(1).unique(dim=0)) == 9
    assert any("loop" in note for note in drawn.notes)


# ---------------------------------------------------------------------- passes and batches


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("elements", [1, 20, 2**22])
def test_passes_and_batches_change_nothing(
    batch_size: int, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sample_posterior(model, guide, Y, num_samples=9, seed=3)
    means = reconstruct(model, guide, Y, num_samples=9, seed=3)
    monkeypatch.setattr(module, "PASS_ELEMENTS", elements)
    parts = sample_posterior(model, guide, Y, num_samples=9, seed=3, batch_size=batch_size)
    for group in ("samples", "predictive", "pointwise", "observed"):
        for name, value in getattr(whole, group).items():
            torch.testing.assert_close(getattr(parts, group)[name], value, rtol=0, atol=1e-12)
    for term in ("log_likelihood", "log_prior", "log_guide", "log_weight"):
        torch.testing.assert_close(getattr(parts, term), getattr(whole, term))
    assert parts.data_shape == (5,)
    again = reconstruct(model, guide, Y, num_samples=9, seed=3, batch_size=batch_size)
    torch.testing.assert_close(again["y"], means["y"])


def test_prior_passes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sample_prior(model, Y, num_samples=7, seed=1)
    monkeypatch.setattr(module, "PASS_ELEMENTS", 10)
    parts = sample_prior(model, Y, num_samples=7, seed=1)
    torch.testing.assert_close(parts.predictive["y"], whole.predictive["y"], rtol=0, atol=1e-12)


def test_seeds() -> None:
    pyro.set_rng_seed(11)
    before = torch.get_rng_state()
    first = sample_posterior(model, guide, Y, num_samples=4, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    again = sample_posterior(model, guide, Y, num_samples=4, seed=3)
    other = sample_posterior(model, guide, Y, num_samples=4, seed=4)
    assert torch.equal(first.samples["z"], again.samples["z"])
    assert torch.equal(first.predictive["y"], again.predictive["y"])
    assert not torch.equal(first.samples["z"], other.samples["z"])
    fresh = [sample_posterior(model, guide, Y, num_samples=1).samples["z"] for _ in range(2)]
    assert not torch.equal(*fresh)


def test_nothing_requires_a_gradient() -> None:
    started = PROGRAMS["normal_normal"].start()
    drawn = sample_posterior(*started.call, num_samples=3)
    for tensor in (*drawn.samples.values(), *drawn.predictive.values(), drawn.log_weight):
        assert not tensor.requires_grad


# ---------------------------------------------------------------------- refusals


def test_refusals() -> None:
    with pytest.raises(ProgramError, match="num_samples"):
        sample_posterior(model, guide, Y, num_samples=0)
    with pytest.raises(ProgramError, match="batch_size"):
        sample_posterior(model, guide, Y, batch_size=True)
    with pytest.raises(ProgramError, match="no latent site 'w'"):
        sample_posterior(model, guide, Y).mean("w")
    with pytest.raises(ProgramError, match="at least 2"):
        sample_posterior(model, guide, Y, num_samples=1).std("z")
    started = PROGRAMS["global_normal"].start()
    with pytest.raises(ProgramError, match="per-datum"):
        sample_posterior(*started.call, batch_size=1)
    started = PROGRAMS["deterministic_and_factor"].start()
    with pytest.raises(ProgramError, match="'tilt'"):
        sample_prior(started.built.model, *started.built.args)


def test_a_program_that_subsamples_by_itself_is_refused() -> None:
    def subsampling(y: Tensor) -> None:
        with pyro.plate("data", len(y), subsample_size=2) as index:
            z = pyro.sample("z", dist.Normal(y.new_zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    with pytest.raises(ProgramError, match="draws 2 of 5 data by itself"):
        sample_posterior(subsampling, None, Y)


def test_a_distribution_without_a_mean_cannot_be_reconstructed() -> None:
    def labels(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Categorical(logits=torch.stack([z, -z], -1)), obs=y)

    def labels_guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(torch.zeros(len(y)), 1.0))

    with pytest.raises(ProgramError, match="'y' has no mean"):
        reconstruct(labels, labels_guide, torch.tensor([0, 1, 1]))


def test_factors_and_deterministic_sites_are_left_alone() -> None:
    started = PROGRAMS["deterministic_and_factor"].start()
    drawn = sample_posterior(*started.call, num_samples=3, seed=0)
    assert set(drawn.predictive) == set(drawn.observed) == {"y"}
    assert any("tilt" in note for note in drawn.notes)

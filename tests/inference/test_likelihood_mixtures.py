"""Guide and prior mixed: weights that no narrow guide can spoil, and the same numbers by chunks."""

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from lvppl.errors import ProgramError
from lvppl.inference.likelihood import log_likelihood
from lvppl.inference.likelihood.proposals import defended
from lvppl.inference.psis import psis

pytestmark = pytest.mark.filterwarnings("error")

NOISE = 0.7
PARALLEL = {"enumerate": "parallel"}
DATA = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)


def normal(loc, scale):
    return dist.Normal(torch.as_tensor(loc).to(DATA), scale)


def model(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, NOISE), obs=y)


def exact(y):
    return dist.Normal(0.0, math.hypot(1.0, NOISE)).log_prob(y)


def posterior(y):
    precision = 1 + NOISE**-2
    return y * NOISE**-2 / precision, precision**-0.5


def guide_of(width, shift=0.0):
    def guide(y):
        mean, scale = posterior(y)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(mean + shift, width * scale))

    return guide


def estimate(program, guide, y=DATA, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return log_likelihood(program, y, guide=guide, **options)


def moments(guide, share, y):
    """Mean of the weights, and S times the variance of a stratified mean, by quadrature."""
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    step = z[1] - z[0]
    prior = dist.Normal(0.0, 1.0).log_prob(z)
    mean, scale = posterior(y)
    q = dist.Normal(mean + guide[1], guide[0] * scale).log_prob(z)
    parts = torch.stack([q, prior]).exp()
    shares = torch.tensor([1 - share, share], dtype=torch.float64)
    mixture = (shares[:, None] * parts).sum(0)
    weight = (prior + dist.Normal(z, NOISE).log_prob(y)).exp() / mixture
    first, second = (parts * weight).sum(-1) * step, (parts * weight**2).sum(-1) * step
    return (shares * first).sum(), (shares * (second - first**2)).sum()


@pytest.mark.parametrize(("width", "shift"), [(0.3, 0.6), (1.0, 0.0), (2.0, -1.0)])
def test_unbiased_with_the_stated_error(width, shift):
    """The mean of p-hat is p(y); its spread is that of stratified draws, not of a mixture's."""
    y, repeats, number = torch.tensor(0.8, dtype=torch.float64), 4000, 40
    found = estimate(
        model,
        guide_of(width, shift),
        y.expand(repeats),
        defensive=0.25,
        num_samples=number,
        seed=1,
    )
    mean, variance = moments((width, shift), 0.25, y)
    assert mean.log().item() == pytest.approx(
        exact(y).item(), abs=1e-7
    )  # scales are single precision
    ratio = (found.log_prob - exact(y)).exp()
    error = (variance / number).sqrt() / mean
    assert abs(ratio.mean() - 1) < 4.5 * error / math.sqrt(repeats)
    assert ratio.std() == pytest.approx(error.item(), rel=0.08)
    squares = (found.std_error * ratio).square().mean().sqrt()  # unbiased for the variance
    assert squares == pytest.approx(error.item(), rel=0.08)


def test_weights_are_bounded_and_khat_falls():
    narrow = guide_of(0.3, 0.6)
    alone = estimate(model, narrow, num_samples=2000, seed=0)
    mixed = estimate(model, narrow, num_samples=2000, seed=0, defensive=0.1)
    assert alone.khat.median() > 0.7
    assert (mixed.khat < alone.khat).all() and mixed.khat.median() < 0.7
    assert ((mixed.log_prob - exact(DATA)) / mixed.std_error).abs().max() < 4.5
    assert (alone.log_prob - exact(DATA)).mean() < -0.3  # which the standard error does not show
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=r"or defensive=0\.1"):
        warnings.simplefilter("error")
        log_likelihood(model, DATA, guide=narrow, num_samples=2000, seed=0)


def test_the_record_agrees_with_all_weights_held_at_once():
    drawn = []

    def spying_model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", normal(0.0, 1.0))
            drawn.append(z)
            pyro.sample("y", dist.Normal(z, NOISE), obs=y)

    number, share = 400, 0.2
    found = estimate(spying_model, guide_of(1.5), num_samples=number, seed=0, defensive=share)
    # the model replayed at the guide's draws, run alone for the prior's, and replayed at those
    first, prior_run, last = drawn[-3:]
    assert torch.equal(prior_run, last) and (len(first), len(last)) == (320, 80)
    z = torch.cat([first, last])
    mean, scale = posterior(DATA)
    prior, q = dist.Normal(0.0, 1.0).log_prob(z), dist.Normal(mean, 1.5 * scale).log_prob(z)
    mixture = torch.logaddexp(math.log(share) + prior, math.log(1 - share) + q)
    log_weight = prior + dist.Normal(z, NOISE).log_prob(DATA) - mixture
    w = log_weight.exp()
    first, last = w[:320], w[320:]
    variance = (0.8**2 * first.var(0) / 320) + (0.2**2 * last.var(0) / 80)
    torch.testing.assert_close(found.log_prob, w.mean(0).log())
    torch.testing.assert_close(found.std_error, variance.sqrt() / w.mean(0))
    torch.testing.assert_close(found.ess, w.sum(0) ** 2 / w.square().sum(0))
    parts = torch.stack([psis(log_weight[:320])[1], psis(log_weight[320:])[1]])
    larger = 0.2**2 * last.var(0) / 80 > 0.8**2 * first.var(0) / 320
    khat = torch.where(larger, parts[1], parts[0])
    torch.testing.assert_close(found.khat, khat, rtol=0, atol=1e-6)


def test_chunks_change_nothing():
    options = {
        "num_samples": 70,
        "seed": 4,
        "defensive": 0.3,
        "bootstrap": 20,
        "trajectory": True,
    }
    first, *others = [
        estimate(model, guide_of(1.5), batch_size=b, sample_chunk=s, **options)
        for b, s in [(None, None), (1, None), (3, 7), (5, 64), (7, 1)]
    ]
    for other in others:
        for name in ("log_prob", "std_error", "ess", "replicates"):
            torch.testing.assert_close(
                getattr(other, name), getattr(first, name), rtol=1e-10, atol=1e-10
            )
        torch.testing.assert_close(other.khat, first.khat, rtol=1e-6, atol=1e-8)
        for one, two in zip(other.trajectory, first.trajectory, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_a_prefix_is_the_estimate_from_as_many_draws():
    options = {"seed": 4, "defensive": 0.3}
    path = estimate(model, guide_of(1.5), num_samples=200, trajectory=True, **options).trajectory
    for i, number in enumerate(path.num_samples.tolist()):
        if number >= 4:  # two draws of each part
            alone = estimate(model, guide_of(1.5), num_samples=number, **options)
            torch.testing.assert_close(path.log_prob[i], alone.log_prob)
            torch.testing.assert_close(path.khat[i], alone.khat)
    assert bool((path.khat[:2] == math.inf).all())  # too few for a fit


def test_looped_particles_give_the_same_numbers():
    def stubborn(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", normal(0.0, 1.0))
            if z.dim() > 1:
                raise RuntimeError("one particle only")
            pyro.sample("y", dist.Normal(z, NOISE), obs=y)

    options = {"num_samples": 30, "seed": 4, "defensive": 0.3}
    looped = estimate(stubborn, guide_of(1.5), **options)
    batched = estimate(model, guide_of(1.5), **options)
    torch.testing.assert_close(looped.log_prob, batched.log_prob, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.97])
def test_counts_follow_the_shares_and_never_shrink(share):
    proposal = defended(model, share)
    counts = [proposal.counts(number) for number in range(300)]
    for number, (first, last) in enumerate(counts):
        assert first + last == number
        assert number < 4 or (min(first, last) >= 2 and abs(last - share * number) <= 2)
    for before, after in itertools.pairwise(counts):
        assert all(a >= b for a, b in zip(after, before, strict=True))


def test_a_latent_summed_out_is_summed_out_of_the_prior_too():
    """c -> z -> y with c enumerated: the prior of z is a mixture, the density of no site."""
    centres = torch.tensor([-2.0, 1.0], dtype=torch.float64)
    log_mass = torch.tensor([0.3, 0.7], dtype=torch.float64).log()

    def program(y, scale):
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(logits=log_mass), infer=PARALLEL)
            z = pyro.sample("z", dist.Normal(centres[c], 0.5))
            pyro.sample("y", dist.Normal(z + scale * c, NOISE), obs=y)

    def guide(y, scale):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.4 * y + 0.3, 0.3))

    for scale in (0.0, 0.5):
        parts = [
            log_mass[c] + dist.Normal(centres[c] + scale * c, math.hypot(0.5, NOISE)).log_prob(DATA)
            for c in (0, 1)
        ]
        truth = torch.stack(parts).logsumexp(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = log_likelihood(
                program, DATA, scale, guide=guide, num_samples=4000, seed=2, defensive=0.4
            )
        assert (found.std_error < 0.1).all()
        assert ((found.log_prob - truth) / found.std_error).abs().max() < 4.2


def test_several_latents_and_a_global_one():
    """Two draws, the second given the first, outside and inside a plate: one datum."""

    def program(y):
        mu = pyro.sample("mu", normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 0.5))
            pyro.sample("y", dist.Normal(z, 1.5), obs=y)

    def guide(y):
        mu = pyro.sample("mu", normal(0.1, 0.3))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.8 * mu + 0.1 * y, 0.45))

    y = DATA[2:5]
    cov = torch.ones(3, 3).to(y) + (0.25 + 2.25) * torch.eye(3).to(y)
    truth = dist.MultivariateNormal(torch.zeros(3).to(y), cov).log_prob(y)
    found = estimate(program, guide, y, num_samples=20_000, seed=3, defensive=0.2)
    assert found.log_prob.shape == (1,) and found.khat < 0.6
    assert abs(found.log_prob - truth) < 4 * found.std_error


def test_a_guide_that_gives_no_mass_to_a_state_is_repaired():
    """q(c = 1) = 0: importance sampling is wrong there, the mixture right."""
    mass = torch.tensor([0.4, 0.6], dtype=torch.float64)

    def program(y):
        with pyro.plate("data", len(y)):
            c = pyro.sample("c", dist.Categorical(mass))
            pyro.sample("y", dist.Normal(c.to(y), 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("c", dist.Categorical(torch.tensor([1.0, 0.0]).to(y)))

    parts = [mass[c].log() + dist.Normal(float(c), 1.0).log_prob(DATA) for c in (0, 1)]
    truth = torch.stack(parts).logsumexp(0)
    found = estimate(program, guide, num_samples=4000, seed=0, defensive=0.5)
    assert ((found.log_prob - truth) / found.std_error).abs().max() < 4.2
    alone = estimate(program, guide, num_samples=4000, seed=0)
    torch.testing.assert_close(alone.log_prob, parts[0])


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_auxiliary_sites_are_refused(kind):
    guide = kind(model)
    guide(DATA)
    with pytest.raises(ProgramError, match=r"guide draws '.*', which the model does not have"):
        log_likelihood(model, DATA, guide=guide, defensive=0.1)


def test_a_guide_known_at_its_own_draws_only_is_refused():
    def guide(y):
        flow = dist.transforms.planar(1)
        base = dist.Normal(torch.zeros(len(y), 1), 1.0).to_event(1)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    def program(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z[..., 0], NOISE), obs=y)

    with pytest.raises(ProgramError, match="at draws from the prior, which fails"):
        log_likelihood(program, DATA.float(), guide=guide, defensive=0.1, num_samples=10)


def test_enumerated_and_scaled_guides_and_factors_are_refused():
    def switch(y, infer=None, scale=1.0):
        with pyro.plate("data", len(y)):
            with pyro.poutine.scale(scale=scale):
                c = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5).to(y)), infer=infer or {})
            pyro.sample("y", dist.Normal(c, 1.0), obs=y)

    def guide_with(infer=None, scale=1.0):
        def guide(y):
            with pyro.plate("data", len(y)), pyro.poutine.scale(scale=scale):
                pyro.sample("c", dist.Bernoulli(torch.tensor(0.3).to(y)), infer=infer or {})

        return guide

    with pytest.raises(ProgramError, match="enumerated there"):
        log_likelihood(switch, DATA, guide=guide_with(PARALLEL), defensive=0.1)
    with pytest.raises(ProgramError, match=r"poutine\.scale around 'c'"):
        log_likelihood(switch, DATA, guide=guide_with(scale=0.5), defensive=0.1)

    def coupled(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", normal(0.0, 1.0))
            pyro.factor("coupling", -0.5 * z**2)
            pyro.sample("y", dist.Normal(z, NOISE), obs=y)

    with pytest.raises(ProgramError, match=r"defensive= draws z from the prior.*pyro\.factor"):
        log_likelihood(coupled, DATA, guide=guide_of(1.0), defensive=0.1)


BAD = {
    "share one": ({"defensive": 1.0}, r"in \[0, 1\)"),
    "negative share": ({"defensive": -0.1}, r"in \[0, 1\)"),
    "truth value": ({"defensive": True}, r"in \[0, 1\)"),
    "without a guide": ({"defensive": 0.1, "estimator": "prior"}, "mixes the prior into a guide"),
    "three draws": ({"defensive": 0.1, "num_samples": 3}, "at least 4"),
    "one replicate": ({"bootstrap": 1}, "at least 2"),
    "half a replicate": ({"bootstrap": 2.5}, "at least 2"),
    "exact": ({"bootstrap": 10, "estimator": "exact"}, "does not have"),
    "chains": ({"bootstrap": 10, "estimator": "ais"}, "is not kept"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    options, message = BAD[case]
    with pytest.raises(ProgramError, match=message):
        log_likelihood(model, DATA, **({"guide": guide_of(1.0)} | options))

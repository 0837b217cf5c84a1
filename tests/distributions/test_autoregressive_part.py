"""Parts of autoregressive arrays against sums over all completions, which are brute force."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch

import lvppl
from lvppl.distributions import Autoregressive, AutoregressivePart
from lvppl.errors import ProgramError
from lvppl.models import MADE, BetaBinomialLikelihood, PixelCNN

SHAPE = (3, 4)
OBSERVED = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 1], [1, 0, 0, 0]]).bool()  # 8 are missing
MISSING_FIRST = [*(~OBSERVED).flatten().nonzero(), *OBSERVED.flatten().nonzero()]
ORDERS = {
    "missing first": [int(i) for i in MISSING_FIRST],
    "observed first": [int(i) for i in reversed(MISSING_FIRST)],
}
SIGNIFICANT = 1e-6  # of each chi-square test


def made(order, **options):
    return MADE(y_shape=SHAPE, hidden_dims=(40,), order=ORDERS.get(order), **options)


MODELS = {
    "MADE, missing first": lambda: made("missing first"),
    "MADE, observed first": lambda: made("observed first"),
    "MADE, rows": lambda: made(None),
    "PixelCNN": lambda: PixelCNN(y_shape=SHAPE, channels=6, num_layers=3, kernel_size=3),
}


def make(name):
    """A model in float64 whose conditionals are far from a half."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.6)
    return model


def images(number=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(2, (number, *SHAPE), generator=generator).double()


def program(model, observed=OBSERVED):
    def run(y):
        with pyro.plate("data", len(y)):
            missing = AutoregressivePart(model.distribution(), y, ~observed)
            z = pyro.sample("missing", missing)
            rest = AutoregressivePart(model.distribution(), missing.filled(z), observed)
            pyro.sample("y", rest, obs=y[..., observed])

    return run


def states(number):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=number))).double()


def completions(y):
    """Every completion, (data, 256, 3, 4)."""
    full = y[:, None].repeat(1, 256, 1, 1)
    full[..., ~OBSERVED] = states(8)
    return full


def truth(model, y):
    """ln p(y_observed), summed over all completions."""
    with torch.no_grad():
        return model.log_evidence(completions(y)).logsumexp(-1)


# ------------------------------------------------------------------------------- ln p(y_observed)


@pytest.mark.parametrize("name", MODELS)
def test_the_exact_sum_is_that_over_all_completions(name):
    model, y = make(name), images()
    found = lvppl.log_likelihood(program(model), y, estimator="exact")
    torch.testing.assert_close(found.log_prob, truth(model, y), rtol=1e-12, atol=1e-12)
    assert "256 states" in found.notes[0] and found.num_discrete == 3 * 4


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("estimator", ["uniform", "prior", "importance", "ais"])
def test_every_sampler_is_unbiased(name, estimator):
    """p-hat / p of many data alike has mean one, within five standard errors."""
    slow = name == "PixelCNN" and estimator in ("ais", "prior")
    model, y = make(name), images(1).expand(100 if slow else 400, *SHAPE)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("missing", dist.Bernoulli(probs=y.new_full((8,), 0.4)).to_event(1))

    options = {"guide": guide} if estimator == "importance" else {}
    if estimator == "ais":
        options = {"annealing": lvppl.Annealing(num_steps=4)}
    number = 3 if estimator == "ais" else 20
    found = lvppl.log_likelihood(
        program(model), y, estimator=estimator, num_samples=number, seed=0, **options
    )
    ratio = (found.log_prob - truth(model, y[:1])).exp()
    if name == "MADE, observed first" and estimator == "prior":  # the weights are all equal
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=1e-12, atol=0)
    else:
        error = ratio.std() / math.sqrt(len(ratio))
        assert error < 0.2 and abs(ratio.mean() - 1) < 5 * error


def test_observed_pixels_first_have_no_variance():
    model, y = make("MADE, observed first"), images()
    found = lvppl.log_likelihood(program(model), y, estimator="prior", num_samples=50, seed=0)
    torch.testing.assert_close(found.log_prob, truth(model, y), rtol=1e-12, atol=1e-12)
    assert (found.std_error < 1e-12).all() and (found.khat == -math.inf).all()
    # which is the product of the conditionals of the observed pixels, whatever stands elsewhere
    product = model.distribution().element_log_prob(y)[..., OBSERVED].sum(-1)
    torch.testing.assert_close(found.log_prob, product.detach(), rtol=1e-12, atol=1e-12)


def test_a_guide_that_is_autoregressive_itself():
    """q(missing | observed) by a MADE that reads the observed pixels."""
    model, y = make("MADE, missing first"), images()
    torch.manual_seed(2)
    network = MADE(y_shape=(8,), hidden_dims=(20,), num_inputs=4).double()

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("missing", network.distribution(y[..., OBSERVED]))

    found = lvppl.log_likelihood(program(model), y, guide=guide, num_samples=4000, seed=0)
    off = (found.log_prob - truth(model, y)).abs() / found.std_error
    assert (found.std_error < 0.2).all() and (off < 5).all()
    exact = [lvppl.log_likelihood(program(model), y, estimator="exact") for _ in range(2)]
    assert torch.equal(exact[0].log_prob, exact[1].log_prob)


@pytest.mark.parametrize("estimator", ["prior", "uniform"])
def test_numbers_do_not_depend_on_chunks(estimator):
    model, y = make("MADE, rows"), images(5)
    options = {"estimator": estimator, "num_samples": 30, "seed": 3}
    whole = lvppl.log_likelihood(program(model), y, **options)
    parts = lvppl.log_likelihood(program(model), y, batch_size=2, sample_chunk=7, **options)
    torch.testing.assert_close(whole.log_prob, parts.log_prob, rtol=1e-10, atol=1e-10)
    assert not any("depend" in note for note in whole.notes)


# ------------------------------------------------------------------------------ the distribution


@pytest.mark.parametrize("name", MODELS)
def test_both_parts_multiply_to_the_whole(name):
    model, y = make(name), images(6)
    whole = model.distribution()
    parts = [
        AutoregressivePart(whole, y, chosen).log_prob(y[..., chosen])
        for chosen in (OBSERVED, ~OBSERVED)
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole.log_prob(y), rtol=1e-12, atol=1e-12)
    by_element = whole.element_log_prob(y)
    assert by_element.shape == (6, *SHAPE)
    torch.testing.assert_close(by_element.sum((-2, -1)), whole.log_prob(y), rtol=1e-12, atol=1e-12)
    # each is normalised, whatever the other holds
    part = AutoregressivePart(whole, y[:1], ~OBSERVED)
    torch.testing.assert_close(
        part.log_prob(states(8)).logsumexp(0), torch.zeros(()).double(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("name", MODELS)
def test_draws_follow_the_density(name):
    part = AutoregressivePart(make(name).distribution(), images(2), ~OBSERVED)
    number = 5_000
    drawn = part.sample((number,))
    assert drawn.shape == (number, 2, 8) and part.support.check(drawn).all()
    for n in range(2):
        p = part.log_prob(states(8)[:, None])[:, n].exp().detach()
        state = (drawn[:, n] @ 2 ** torch.arange(7.0, -1, -1).double()).long()
        counts = state.bincount(minlength=256).double()
        often = p * number > 8
        seen = torch.cat([counts[often], counts[~often].sum()[None]])
        expected = torch.cat([p[often], p[~often].sum()[None]]) * number
        assert scipy.stats.chisquare(seen, expected).pvalue > SIGNIFICANT


def test_completions_are_those_of_conditional_sample():
    """Where the observed come first, both draw from p(missing | observed)."""
    model, y = make("MADE, observed first"), images(2)
    part = AutoregressivePart(model.distribution(), y, ~OBSERVED)
    joint = model.log_evidence(completions(y))
    posterior = (joint - joint.logsumexp(-1, keepdim=True)).T
    torch.testing.assert_close(part.log_prob(states(8)[:, None]), posterior, rtol=0, atol=1e-10)
    torch.manual_seed(5)
    filled = part.filled(part.sample((7,)))
    torch.manual_seed(5)
    assert torch.equal(filled, model.distribution().conditional_sample(y, OBSERVED, (7,)))


def test_fillers_have_no_influence():
    """Not on values, not on draws, not on gradients, NaN included."""
    model, y = make("MADE, rows"), images(4)
    found = []
    for filler in (0.0, 1.0, 17.0, math.nan):
        value = torch.where(OBSERVED, y, filler).requires_grad_()
        part = AutoregressivePart(model.distribution(), value, ~OBSERVED)
        part.log_prob(y[..., ~OBSERVED]).sum().backward()
        torch.manual_seed(0)
        found.append((part.log_prob(y[..., ~OBSERVED]), part.sample((3,)), value.grad))
        assert (value.grad[..., ~OBSERVED] == 0).all() and value.grad[..., OBSERVED].any()
    for other in found[1:]:
        for one, two in zip(other, found[0], strict=True):
            assert torch.equal(one, two)


def test_gradients_reach_the_model_through_both_parts():
    model, y = make("MADE, rows"), images(4)

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), list(model.parameters()))

    whole = model.distribution()
    one = AutoregressivePart(whole, y, OBSERVED).log_prob(y[..., OBSERVED])
    two = AutoregressivePart(whole, y, ~OBSERVED).log_prob(y[..., ~OBSERVED])
    for a, b in zip(gradient(one + two), gradient(whole.log_prob(y)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_levels_and_inputs():
    """Beta-binomial pixels of three levels, given x: the exact sum over 3^2 completions."""
    torch.manual_seed(0)

    def likelihood(shape):
        return BetaBinomialLikelihood(shape, total_count=2)

    model = MADE(y_shape=(4,), hidden_dims=(20,), num_inputs=2, likelihood=likelihood).double()
    observed = torch.tensor([False, True, False, True])
    y, x = torch.tensor([[0.0, 2, 1, 1], [2, 0, 0, 1]]).double(), torch.randn(2, 2).double()

    def run(y, x):
        with pyro.plate("data", len(y)):
            missing = AutoregressivePart(model.distribution(x), y, ~observed)
            z = pyro.sample("missing", missing)
            rest = AutoregressivePart(model.distribution(x), missing.filled(z), observed)
            pyro.sample("y", rest, obs=y[..., observed])

    part = AutoregressivePart(model.distribution(x), y, ~observed)
    assert part.element_support.tolist() == [0, 1, 2] and part.batch_shape == (2,)
    full = y[:, None].repeat(1, 9, 1)
    full[..., ~observed] = torch.cartesian_prod(*[torch.arange(3.0).double()] * 2)
    with torch.no_grad():
        expected = model.log_evidence(full, x[:, None]).logsumexp(-1)
    found = lvppl.log_likelihood(run, y, x, estimator="exact")
    torch.testing.assert_close(found.log_prob, expected, rtol=1e-12, atol=1e-12)
    assert "9 states" in found.notes[0]


def test_a_whole_array_as_a_latent_is_swept():
    """An autoregressive prior of bits: no element of it has a site of its own."""
    model = make("MADE, rows")

    def run(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", model.distribution())
            pyro.sample("y", dist.Normal(z.sum((-2, -1)), 1.0), obs=y)

    y = torch.tensor([2.0, 7.5]).double()
    z = states(12).unflatten(-1, SHAPE)
    with torch.no_grad():
        likelihood = dist.Normal(z.sum((-2, -1)), 1.0).log_prob(y[:, None])
        expected = (model.log_evidence(z) + likelihood).logsumexp(-1)
    found = lvppl.log_likelihood(run, y, estimator="exact")
    torch.testing.assert_close(found.log_prob, expected, rtol=1e-12, atol=1e-12)


def test_shapes():
    whole, y = make("MADE, rows").distribution(), images(3)
    part = AutoregressivePart(whole, y, ~OBSERVED)
    assert part.batch_shape == (3,) and part.event_shape == (8,)
    wide = part.expand((5, 3))
    assert wide.sample().shape == (5, 3, 8) and wide.sample((2,)).shape == (2, 5, 3, 8)
    z = wide.sample()
    assert wide.filled(z).shape == (5, 3, *SHAPE)
    assert (wide.filled(z)[..., OBSERVED] == y[..., OBSERVED]).all()
    assert wide.log_prob(z[0]).shape == (5, 3)
    torch.testing.assert_close(wide.log_prob(z)[2], part.log_prob(z[2]))
    assert wide.support.is_discrete and wide.support.event_dim == 1


def test_levels_without_end_are_not_swept():
    def run(y):
        with pyro.plate("data", len(y)):
            normal = lambda y: dist.Normal(y * 0, 1.0).to_event(1)  # noqa: E731
            z = pyro.sample("z", Autoregressive(normal, y.new_zeros(3)))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    with pytest.raises(ProgramError, match=r"'z' .* is continuous"):
        lvppl.log_likelihood(run, torch.zeros(2), estimator="exact")


def test_what_does_not_fit_is_refused():
    whole, y = make("MADE, rows").distribution(), images(2)
    for chosen in (OBSERVED.double(), OBSERVED[0], OBSERVED.expand(2, *SHAPE)):
        with pytest.raises(ProgramError, match=r"chosen must be boolean of the event's shape"):
            AutoregressivePart(whole, y, chosen)
    with pytest.raises(ProgramError, match="false everywhere"):
        AutoregressivePart(whole, y, torch.zeros(SHAPE).bool())
    with pytest.raises(ProgramError, match="value must have shape"):
        AutoregressivePart(whole, y[..., 0], OBSERVED)
    part = AutoregressivePart(whole, y, ~OBSERVED)
    with pytest.raises(ProgramError, match=r"a vector of 8, but .* \(2, 3, 4\)"):
        part.log_prob(y)
    joint = Autoregressive(lambda y: dist.MultivariateNormal(y, torch.eye(2)), torch.zeros(2))
    with pytest.raises(ProgramError, match=r"single elements are needed.*to_event\(1\)"):
        joint.element_log_prob(torch.zeros(2))

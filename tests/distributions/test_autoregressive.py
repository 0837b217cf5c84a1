"""Autoregressive distributions: their draws, whole and completed, follow a table of all states."""

import itertools

import pyro.distributions as dist
import pytest
import scipy.stats
import torch

from lvppl.distributions.autoregressive import Autoregressive
from lvppl.errors import ProgramError

ORDER = (2, 0, 3, 1)
WEIGHT = torch.tensor(  # in the order: place i sees places before it
    [[0.0, 0.0, 0.0, 0.0], [1.5, 0.0, 0.0, 0.0], [-1.0, 2.0, 0.0, 0.0], [0.5, -1.5, 1.0, 0.0]]
).double()
BIAS = torch.tensor([0.3, -0.5, 0.2, 0.4]).double()
SIGNIFICANT = 1e-6  # of each chi-square test: the suite fails by chance less than once in 10,000


def logits(y):
    found = torch.empty_like(y)
    found[..., list(ORDER)] = y[..., list(ORDER)] @ WEIGHT.T + BIAS
    return found


def bernoulli(y):
    return dist.Bernoulli(logits=logits(y)).to_event(1)


def make(*batch, conditionals=bernoulli, order=ORDER):
    return Autoregressive(conditionals, torch.zeros(*batch, 4).double(), order=order)


def states():
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).double()


def table():
    """p of every state, by one factor after another."""
    p = []
    for y in states():
        in_order, total = y[list(ORDER)], 1.0
        for i in range(4):
            one = torch.sigmoid(BIAS[i] + sum(WEIGHT[i, j] * in_order[j] for j in range(i)))
            total = total * (one if in_order[i] else 1 - one)
        p.append(total)
    return torch.stack(p)


def number(y):
    return (y @ torch.tensor([8.0, 4.0, 2.0, 1.0]).double()).long()


def assert_frequencies(drawn, p):
    counts = number(drawn).flatten().bincount(minlength=16).double()
    possible = p > 0
    assert (counts[~possible] == 0).all()
    if possible.sum() == 1:  # nothing was left to draw
        return
    expected = p[possible] / p[possible].sum() * counts.sum()
    assert expected.min() > 5
    assert scipy.stats.chisquare(counts[possible], expected).pvalue > SIGNIFICANT


def test_log_prob_is_the_product_of_conditionals():
    torch.testing.assert_close(make().log_prob(states()).exp(), table(), rtol=1e-12, atol=0)
    assert table().sum().item() == pytest.approx(1, abs=1e-14)


def test_draws_follow_log_prob():
    assert_frequencies(make(3).sample((10_000,)), table())


@pytest.mark.parametrize("observed", [(), (2,), (2, 0), (2, 0, 3), (2, 0, 3, 1)])
def test_completions_follow_the_conditional_distribution(observed):
    mask = torch.zeros(4, dtype=torch.bool)
    mask[list(observed)] = True
    value = torch.where(mask, torch.tensor([1.0, 0.0, 0.0, 1.0]).double(), torch.nan)
    drawn = make().conditional_sample(value, mask, (20_000,))
    assert drawn.shape == (20_000, 4) and (drawn[:, mask] == value[mask]).all()
    agrees = (states()[:, mask] == value[mask]).all(-1)
    assert_frequencies(drawn, torch.where(agrees, table(), 0.0))


def test_each_datum_has_a_mask_of_its_own():
    mask = torch.tensor([[0, 0, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    value = torch.tensor([[0, 0, 1, 0], [1, 0, 0, 1], [1, 1, 1, 1]]).double()
    drawn = make(3).conditional_sample(value, mask, (20_000,))
    assert drawn.shape == (20_000, 3, 4)
    for n in range(3):
        agrees = (states()[:, mask[n]] == value[n, mask[n]]).all(-1)
        assert_frequencies(drawn[:, n], torch.where(agrees, table(), 0.0))


def test_observed_elements_must_come_first():
    mask = torch.tensor([[0, 0, 1, 0], [0, 0, 1, 1]]).bool()  # 3 comes after 0
    with pytest.raises(ProgramError, match=r"element 3 is observed and element 0, which comes bef"):
        make(2).conditional_sample(torch.zeros(2, 4), mask)


def test_what_is_not_drawn_has_no_influence():
    """The blank may be anything: the draws of one seed are the same."""
    torch.manual_seed(0)
    one = make(50).sample()
    torch.manual_seed(0)
    blank = torch.full((50, 4), 7.0).double()
    assert torch.equal(Autoregressive(bernoulli, blank, order=ORDER).sample(), one)
    assert (blank == 7).all()


def test_elements_of_any_distribution():
    """Three levels: y_2 | y_1 ∼ Categorical, against its table."""
    rows = torch.tensor([[2, 3, 5], [7, 2, 1], [1, 1, 8]]).double() / 10
    first = torch.tensor([5, 2, 3]).double() / 10

    def conditionals(y):
        p = torch.stack([first.expand(*y.shape[:-1], 3), rows[y[..., 0].long()]], -2)
        return dist.Categorical(p).to_event(1)

    d = Autoregressive(conditionals, torch.zeros(2).double())
    y = torch.cartesian_prod(*[torch.arange(3.0)] * 2)
    joint = (first[:, None] * rows).flatten()
    torch.testing.assert_close(d.log_prob(y).exp(), joint, rtol=1e-12, atol=0)
    drawn = d.sample((20_000,))
    assert drawn.dtype == torch.float64
    counts = (3 * drawn[:, 0] + drawn[:, 1]).long().bincount(minlength=9).double()
    assert scipy.stats.chisquare(counts, 20_000 * joint).pvalue > SIGNIFICANT


def test_shapes():
    d = make(3)
    assert d.batch_shape == (3,) and d.event_shape == (4,)
    wide = d.expand((5, 3))
    assert wide.batch_shape == (5, 3) and wide.sample((2,)).shape == (2, 5, 3, 4)
    assert wide.order == ORDER and wide.support.check(wide.sample()).shape == (5, 3)
    y = wide.sample()
    torch.testing.assert_close(wide.log_prob(y[0]), d.log_prob(y[0]).expand(5, 3))
    assert wide.log_prob(y).shape == (5, 3) and wide.log_prob(y[0, 0]).shape == (5, 3)
    images = Autoregressive(
        lambda y: dist.Bernoulli(logits=logits(y.flatten(-2)).unflatten(-1, (2, 2))).to_event(2),
        torch.zeros(3, 2, 2).double(),
        2,
        order=ORDER,
    )
    assert images.event_shape == (2, 2) and images.sample((7,)).shape == (7, 3, 2, 2)
    torch.testing.assert_close(images.log_prob(y.unflatten(-1, (2, 2))), d.log_prob(y))


def test_the_network_runs_once_on_the_data_as_they_are():
    """Not once for each particle of an expanded batch."""
    seen = []

    def conditionals(y):
        seen.append(y.shape)
        return bernoulli(y)

    make(6, conditionals=conditionals).expand((100, 6)).log_prob(states()[:6])
    assert seen == [(6, 4)]


def test_what_does_not_fit_is_refused():
    for order in ((0, 1, 2), (0, 1, 2, 2), (1, 2, 3, 4)):
        with pytest.raises(ProgramError, match=r"each of 0 ... 3 once, as the event shape is \(4,"):
            make(order=order)
    for event_dim in (0, 2):
        with pytest.raises(ProgramError, match="event_dim must be from 1 to 1"):
            Autoregressive(bernoulli, torch.zeros(4), event_dim)
    with pytest.raises(
        ProgramError, match=r"value must have shape \(..., 4\), but has shape \(2, 3"
    ):
        make().log_prob(torch.zeros(2, 3))
    with pytest.raises(ProgramError, match=r"leading dimensions \(2,\), which do not go .* \(3,\)"):
        make(3).log_prob(torch.zeros(2, 4))
    with pytest.raises(ProgramError, match=r"observed must have shape \(..., 4\)"):
        make().conditional_sample(torch.zeros(4), torch.ones(3).bool())
    with pytest.raises(ProgramError, match=r"observed must be boolean.* is torch.float32"):
        make().conditional_sample(torch.zeros(4), torch.ones(4))
    with pytest.raises(ValueError, match="support"):
        make().log_prob(torch.full((4,), 0.5).double())

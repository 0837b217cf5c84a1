"""A hidden Markov model sums over its paths: the oracles are those paths, one by one."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from lvppl.distributions import HiddenMarkov
from lvppl.errors import ProgramError

B, T, K = 3, 4, 3


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


EMISSIONS = {
    "normal": lambda *s: dist.Normal(randn(*s), 0.5 + randn(*s).exp()),
    "diagonal": lambda *s: dist.Normal(randn(*s, 2), 1.0).to_event(1),
    "full": lambda *s: dist.MultivariateNormal(
        randn(*s, 2), scale_tril=torch.eye(2).double() + 0.3 * randn(*s, 2, 2).tril(-1)
    ),
    "bernoulli": lambda *s: dist.Bernoulli(logits=randn(*s, 2)).to_event(1),
    "categorical": lambda *s: dist.Categorical(logits=randn(*s, 5)),
    "one-hot": lambda *s: dist.OneHotCategorical(logits=randn(*s, 5)),
    "poisson": lambda *s: dist.Poisson(1 + randn(*s).exp()),
    "gamma": lambda *s: dist.Gamma(1 + randn(*s).exp(), 1.0),
    "mixture": lambda *s: dist.MixtureSameFamily(
        dist.Categorical(logits=randn(*s, 2)), dist.Normal(randn(*s, 2, 2), 1.0).to_event(1)
    ),
}
TRANSITIONS = {
    "homogeneous": lambda: randn(K, K),
    "one a sequence": lambda: randn(B, K, K),
    "stepwise": lambda: randn(1, T - 1, K, K),
    "stepwise, one a sequence": lambda: randn(B, T - 1, K, K),
}


def enumerated(d, value, lengths=None, mask=None):
    """ln p(y, z) of every path: (K^T,) paths and (K^T, B) weights; missing steps are skipped."""
    z = torch.tensor(list(itertools.product(range(K), repeat=T)))
    event_dim = len(d.observation_dist.event_shape)
    steps = value.unsqueeze(-1 - event_dim).unbind(1)  # each (B, 1, *event)
    base = d.observation_dist
    by_step = base.expand((B, T, K)) if d.differs_by_step else None
    initial = d.initial_logits.expand(B, K)
    A = d.transition_logits
    A = (A if A.dim() > 2 else A[None]).expand(B, T - 1, K, K)
    if by_step is not None:
        emission = by_step.log_prob(value.unsqueeze(-1 - event_dim))
    else:
        emission = torch.stack([base.log_prob(step) for step in steps], 1)
    weights = []
    for b in range(B):
        n = T if lengths is None else int(lengths[b])
        weight = initial[b, z[:, 0]]
        for t in range(n):
            if t:
                weight = weight + A[b, t - 1, z[:, t - 1], z[:, t]]
            if mask is None or mask[b, t]:
                weight = weight + emission[b, t, z[:, t]]
        weights.append(torch.where((z[:, n:] == 0).all(-1), weight, -math.inf))
    return z, torch.stack(weights, 1)


def draw(observation_dist, by_step=False):
    shape = (B, T, K) if by_step else (B, K)
    if by_step:
        return observation_dist.expand(shape).sample().select(2, 0)
    return observation_dist.expand(shape).sample((T,)).select(2, 0).movedim(0, 1)


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("batch", [(), (B,), (B, T)], ids=["shared", "by sequence", "by step"])
@pytest.mark.parametrize("family", EMISSIONS)
def test_log_prob_is_the_sum_over_paths(family, batch, transition):
    base = EMISSIONS[family](*batch, K)
    initial = randn(B, K)
    d = HiddenMarkov(initial, TRANSITIONS[transition](), base, validate_args=True)
    value = draw(base, by_step=batch == (B, T))
    z, weight = enumerated(d, value)
    assert d.batch_shape == (B,)
    torch.testing.assert_close(d.log_prob(value), weight.logsumexp(0), rtol=1e-10, atol=1e-10)
    posterior = d.posterior(value)
    hot = torch.nn.functional.one_hot(z, K).double()
    want = torch.einsum("pb,ptk->btk", weight.softmax(0), hot)
    torch.testing.assert_close(posterior.marginals, want, rtol=1e-10, atol=1e-10)
    states, log_joint = d.viterbi(value)
    assert (states == z[weight.argmax(0)]).all()
    torch.testing.assert_close(log_joint, weight.amax(0))
    torch.testing.assert_close(d.filter(value).probs, want[:, -1])


@pytest.mark.parametrize("family", EMISSIONS)
def test_missing_observations_and_unequal_lengths(family):
    """Summed out; and NaN in their place, or anything, changes neither value nor gradient."""
    base = EMISSIONS[family](K)
    lengths = torch.tensor([4, 2, 3])
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 1]]).bool()
    exists = torch.arange(T) < lengths[:, None]
    initial, transition = randn(K).requires_grad_(), randn(K, K).requires_grad_()

    def fresh():
        return HiddenMarkov(initial, transition, base, lengths=lengths, mask=mask)

    value, d = draw(base), fresh()
    weight = enumerated(d, value, lengths, mask)[1]
    want = weight.logsumexp(0)
    want_gradients = torch.autograd.grad(want.sum(), (initial, transition))
    seen = (mask & exists).reshape(B, T, *(1,) * len(base.event_shape))
    for hidden in (0.0, math.nan, math.inf, -7.5):
        stored = torch.where(seen, value, hidden).requires_grad_()
        state = torch.get_rng_state()
        found = fresh().log_prob(stored)
        assert (torch.get_rng_state() == state).all()
        torch.testing.assert_close(found, want, rtol=1e-10, atol=1e-10)
        *gradients, of_value = torch.autograd.grad(
            found.sum(), (initial, transition, stored), allow_unused=True
        )
        torch.testing.assert_close(gradients, list(want_gradients), rtol=1e-10, atol=1e-10)
        if of_value is not None:
            assert (of_value[~seen.expand_as(value)] == 0).all() and of_value.isfinite().all()
    assert (d.posterior(value).marginals[~exists] == 0).all()
    last = d.posterior(value).marginals[torch.arange(B), lengths - 1]
    torch.testing.assert_close(d.filter(value).probs, last)


def test_gradients_of_all_parameters():
    value, loc, log_scale = randn(B, T), randn(K), randn(K)
    args = [x.requires_grad_() for x in (randn(K), randn(K, K), loc, log_scale, value)]

    def f(initial, transition, loc, log_scale, value):
        d = HiddenMarkov(initial, transition, dist.Normal(loc, log_scale.exp()))
        return d.log_prob(value)

    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


@pytest.mark.parametrize("batch", [(), (B,)])
@pytest.mark.parametrize("by_step", [False, True])
def test_pyro_discrete_hmm_agrees(batch, by_step):
    """Where its extra first transition is folded into the initial state."""
    T = 9
    before, A = randn(*batch, K), randn(K, K)
    loc = randn(*batch, T, K) if by_step else randn(K)
    peer = dist.DiscreteHMM(before, A, dist.Normal(loc, 1.0))
    joint = before.log_softmax(-1)[..., None] + A.log_softmax(-1)
    ours = HiddenMarkov(joint.logsumexp(-2), A, dist.Normal(loc, 1.0))
    value = randn(B, T)
    assert ours.batch_shape == peer.batch_shape and ours.event_shape == peer.event_shape
    torch.testing.assert_close(ours.log_prob(value), peer.log_prob(value), rtol=1e-10, atol=0)
    want = peer.filter(value)
    torch.testing.assert_close(ours.filter(value).probs, want.probs, rtol=1e-10, atol=1e-12)
    stepwise = randn(T, K, K)
    first = (before.log_softmax(-1)[..., None] + stepwise[0].log_softmax(-1)).logsumexp(-2)
    peer = dist.DiscreteHMM(before, stepwise, dist.Normal(loc, 1.0))
    ours = HiddenMarkov(first, stepwise[1:].expand(*batch, -1, -1, -1), dist.Normal(loc, 1.0))
    torch.testing.assert_close(ours.log_prob(value), peer.log_prob(value), rtol=1e-10, atol=0)


def test_probabilities_sum_to_one():
    d = HiddenMarkov(randn(B, K), randn(B, K, K), dist.Bernoulli(logits=randn(K)))
    y = torch.tensor(list(itertools.product([0.0, 1.0], repeat=T))).double()
    total = d.log_prob(y[:, None].expand(-1, B, -1)).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(B).double())


@pytest.mark.parametrize("by_step", [False, True])
def test_sample_frequencies(by_step):
    """Of each of 3 × 16 sequences: within 5 standard errors (48 fail with chance 3e-5)."""
    loc = randn(B, T, K) if by_step else randn(B, K)
    d = HiddenMarkov(randn(B, K), randn(K, K), dist.Bernoulli(logits=2 * loc), num_steps=T)
    n = 20_000
    draws = d.sample((n,))
    assert draws.shape == (n, B, T)
    y = torch.tensor(list(itertools.product([0.0, 1.0], repeat=T))).double()
    p = d.log_prob(y[:, None].expand(-1, B, -1)).exp()
    frequency = torch.stack([(draws == row).all(-1).double().mean(0) for row in y])
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


def test_sample_shapes():
    base = dist.Normal(randn(K, 2), 1.0).to_event(1)
    d = HiddenMarkov(randn(K), randn(K, K), base, num_steps=T, lengths=torch.tensor([4, 1, 2]))
    assert d.batch_shape == (3,) and d.event_shape == (T, 2)
    draws = d.sample((5, 2))
    assert draws.shape == (5, 2, 3, T, 2) and draws.dtype == torch.float64
    assert (draws[:, :, 1, 1:] == 0).all() and (draws[:, :, 0] != 0).all()
    assert d.log_prob(draws).shape == (5, 2, 3)
    assert d.sample_states(draws, 7).shape == (7, 5, 2, 3, T)
    with pytest.raises(ProgramError, match="num_steps"):
        HiddenMarkov(randn(K), randn(K, K), base).sample()


def test_sampled_states_follow_the_posterior():
    """Marginal frequencies within 5 standard errors: 36 of them fail with chance 2e-5."""
    d = HiddenMarkov(randn(K), randn(K, K), dist.Normal(randn(K), 1.0))
    value, n = randn(B, T), 10_000
    z = d.sample_states(value, n, generator=torch.Generator().manual_seed(0))
    p = d.posterior(value).marginals
    frequency = torch.nn.functional.one_hot(z, K).double().mean(0)
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1 / n).all()


def test_expand_and_plates():
    base = dist.Normal(randn(K, 2), 1.0).to_event(1)
    d = HiddenMarkov(randn(K), randn(K, K), base, mask=torch.ones(T).bool())
    value = randn(5, B, T, 2)
    wide = d.expand((5, B))
    assert wide.batch_shape == (5, B) and wide.event_shape == (T, 2)
    torch.testing.assert_close(wide.log_prob(value), d.log_prob(value))

    def model():
        with pyro.plate("data", B):
            pyro.sample("y", d, obs=value[0])

    trace = pyro.poutine.trace(model).get_trace()
    want = d.log_prob(value[0]).sum()
    torch.testing.assert_close(trace.log_prob_sum(), want)
    half = torch.tensor([True, False, True])
    masked = pyro.poutine.trace(pyro.poutine.mask(model, mask=half)).get_trace()
    torch.testing.assert_close(masked.log_prob_sum(), d.log_prob(value[0])[half].sum())


def test_any_number_of_steps_where_none_is_given():
    d = HiddenMarkov(randn(K), randn(K, K), dist.Normal(randn(K), 1.0), validate_args=True)
    assert d.event_shape == (1,) and not d.has_rsample and not d.has_enumerate_support
    value = randn(B, 7)
    parts = d.log_prob(value[:, :1]), d.log_prob(value)
    torch.testing.assert_close(
        parts[0], (d.initial_logits + d.observation_dist.log_prob(value[:, :1])).logsumexp(-1)
    )
    longer = HiddenMarkov(
        randn(K), randn(K, K), d.observation_dist, lengths=torch.tensor([2, 7, 5])
    )
    for b, n in enumerate((2, 7, 5)):
        alone = HiddenMarkov(longer.initial_logits, longer.transition_logits, d.observation_dist)
        torch.testing.assert_close(longer.log_prob(value)[b], alone.log_prob(value[b, :n]))


def test_refusals():
    normal = dist.Normal(randn(K), 1.0)
    cases = [
        (lambda: HiddenMarkov(randn(2), randn(K, K), normal), r"expects initial_logits.*\(2,\)"),
        (lambda: HiddenMarkov(randn(K), randn(K, 2), normal), "expects initial_logits"),
        (lambda: HiddenMarkov(randn(K), randn(K, K), dist.Normal(randn(K, 2), 1.0)), "to_event"),
        (lambda: HiddenMarkov(randn(K), randn(4, K, K), normal, num_steps=4), "disagree.*has 5"),
        (lambda: HiddenMarkov(randn(2, K), randn(B, K, K), normal), "must broadcast"),
        (lambda: HiddenMarkov(randn(K), randn(K, K), normal, mask=torch.ones(T)), "boolean"),
        (
            lambda: HiddenMarkov(
                randn(K), torch.full((K, K), -math.inf).double(), normal, validate_args=True
            ),
            "-inf throughout",
        ),
        (
            lambda: HiddenMarkov(randn(K), randn(K, K), normal, num_steps=T).log_prob(randn(B, 7)),
            r"shape \(\.\.\., 4\).*\(3, 7\)",
        ),
        (
            lambda: HiddenMarkov(randn(K), randn(K, K), normal.expand((K,))).log_prob(
                torch.tensor(0.0)
            ),
            "expected sequences",
        ),
    ]
    for program, match in cases:
        with pytest.raises(ProgramError, match=match):
            program()

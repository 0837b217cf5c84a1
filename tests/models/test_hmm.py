"""Hidden Markov models: both spellings against the sum over all paths, one by one."""

import itertools

import numpy as np
import pyro
import pytest
import torch
from pyro import poutine

from lvppl.models import (
    BernoulliComponents,
    CategoricalComponents,
    GaussianComponents,
    GaussianMixtureComponents,
    HiddenMarkovLoop,
    HiddenMarkovModel,
    InputHiddenMarkovModel,
    PoissonComponents,
)
from tests.pyro_sums import assert_same_gradients, pyro_evidence

# of the spelling whose path is summed out already
pytestmark = pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")

K, N, T, D = 3, 4, 4, 2
LENGTHS = torch.tensor([4, 2, 1, 3])
MASK = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 1, 0, 1]]).bool()

EMISSIONS = {
    "full": lambda: GaussianComponents(K, D, covariance="full"),
    "tied": lambda: GaussianComponents(K, D, covariance="tied"),
    "diag": lambda: GaussianComponents(K, D, covariance="diag"),
    "mixture": lambda: GaussianMixtureComponents(K, 2, D),
    "bernoulli": lambda: BernoulliComponents(K, D),
    "poisson": lambda: PoissonComponents(K, D),
    "categorical": lambda: CategoricalComponents(K, 4),
}


def _data(name):
    if name == "categorical":
        return torch.randint(4, (N, T))
    if name in ("bernoulli", "poisson"):
        return torch.randint(2 if name == "bernoulli" else 5, (N, T, D)).double()
    return torch.randn(N, T, D).double()


def _pair(name):
    """Both spellings, of the same, unequal parameters."""
    model = HiddenMarkovModel(EMISSIONS[name]()).double()
    for parameter in model.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    loop = HiddenMarkovLoop(model.emission)
    loop.initial, loop.transition = model.initial.detach(), model.transition.detach()
    return model, loop, _data(name)


def _brute_force(π, A, emission, y, lengths=None, mask=None):
    """ln Σ over all K^T paths of π_z1 Π A_{z_t−1 z_t} Π p(y_t | z_t); A may depend on n and t."""
    A = A.expand(*y.shape[:1], T - 1, K, K).detach().numpy()
    π = π.detach().numpy()
    p_y = emission.component(...).log_prob(y.unsqueeze(2)).exp().detach().numpy()  # (N, T, K)
    totals = []
    for n in range(len(y)):
        length = T if lengths is None else int(lengths[n])
        total = 0.0
        for z in itertools.product(range(K), repeat=length):
            p = π[z[0]]
            for t in range(length):
                p *= A[n, t - 1, z[t - 1], z[t]] if t > 0 else 1.0
                p *= p_y[n, t, z[t]] if mask is None or mask[n, t] else 1.0
            total += p
        totals.append(total)
    return torch.tensor(np.log(totals))


@pytest.mark.parametrize("lengths, mask", [(None, None), (LENGTHS, None), (LENGTHS, MASK)])
@pytest.mark.parametrize("name", EMISSIONS)
def test_both_spellings_sum_over_all_paths(name, lengths, mask):
    model, loop, y = _pair(name)
    want = _brute_force(model.initial, model.transition, model.emission, y, lengths, mask)
    close = {"rtol": 0, "atol": 1e-8}
    torch.testing.assert_close(model.log_evidence(y, lengths, mask).detach(), want, **close)
    torch.testing.assert_close(loop.log_evidence(y, lengths, mask).detach(), want, **close)
    for program in (model, loop):
        found = pyro_evidence(program, y, lengths, mask)
        torch.testing.assert_close(found.detach(), want.sum(), **close)
    emission = list(model.emission.parameters())  # shared
    assert_same_gradients(pyro_evidence(model, y, lengths, mask), found, emission)


def test_gradients_of_the_chain_agree():
    model, loop, y = _pair("diag")
    for name in ("initial_unconstrained", "transition_unconstrained"):
        a = torch.autograd.grad(pyro_evidence(model, y, LENGTHS, MASK), getattr(model, name))
        b = torch.autograd.grad(pyro_evidence(loop, y, LENGTHS, MASK), getattr(loop, name))
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["full", "bernoulli", "categorical"])
def test_what_was_not_observed_has_no_influence(name):
    model, loop, y = _pair(name)
    filler = (torch.arange(T) >= LENGTHS[:, None]) | ~MASK
    other = y.clone()
    other[filler] = (y[filler] + 1) % (4 if name == "categorical" else 2)
    assert not torch.equal(y, other)
    for program in (model, loop):
        a, b = (pyro_evidence(program, data, LENGTHS, MASK) for data in (y, other))
        assert torch.equal(a, b)


def test_one_state_is_the_component_itself():
    emission = GaussianComponents(1, D).double()
    y = torch.randn(N, T, D).double()
    want = emission.component(torch.tensor(0)).log_prob(y).sum(-1)
    torch.testing.assert_close(HiddenMarkovModel(emission).log_evidence(y), want)


def test_without_memory_it_is_a_mixture_of_steps():
    """Rows of A all equal π: ln p(y) = Σ_t ln Σ_k π_k p(y_t | k)."""
    emission = GaussianComponents(K, D).double()
    model = HiddenMarkovModel(emission, stickiness=0.0)
    y = torch.randn(N, T, D).double()
    log_p = emission.component(...).log_prob(y.unsqueeze(2)) - np.log(K)
    torch.testing.assert_close(model.log_evidence(y), log_p.logsumexp(-1).sum(-1))


@pytest.mark.parametrize("spelling", [HiddenMarkovModel, HiddenMarkovLoop])
def test_under_a_plate_of_particles(spelling):
    model, loop, y = _pair("full")
    program = model if spelling is HiddenMarkovModel else loop
    want = program.log_evidence(y, LENGTHS, MASK).sum()
    got = pyro_evidence(program, y, LENGTHS, MASK, particles=3)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("spelling", [HiddenMarkovModel, HiddenMarkovLoop])
@pytest.mark.parametrize("name", ["diag", "categorical", "bernoulli"])
def test_sequences_can_be_drawn(name, spelling):
    """3,000 sequences: the frequency of each observation's states within 5 standard errors.

    E y_t = Σ_k P(z_t = k) E[y | k], P(z_t) = π A^(t−1).
    """
    model, loop, _ = _pair(name)
    program = model if spelling is HiddenMarkovModel else loop
    event = () if name == "categorical" else (D,)
    blank = torch.zeros(3000, T, *event).to(torch.long if name == "categorical" else torch.double)
    with torch.no_grad():
        drawn = poutine.uncondition(program)(blank)
        assert drawn.shape == blank.shape
        means = model.emission.probs if name == "bernoulli" else None
        if name == "diag":
            means = model.emission.loc
        elif name == "categorical":  # the frequency of symbol 0
            means, drawn = model.emission.probs[:, :1], (drawn == 0).double().unsqueeze(-1)
        p = model.initial
        for t in range(T):
            error = drawn[:, t].std(0) / len(drawn) ** 0.5
            assert ((drawn[:, t].mean(0) - p @ means).abs() < 5 * error).all()
            p = p @ model.transition


def test_the_loop_has_a_site_for_each_state():
    _, loop, y = _pair("full")
    with pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(poutine.uncondition(loop)).get_trace(y, LENGTHS)
    names = [name for name in trace.stochastic_nodes if name not in ("data", "particles")]
    assert names == [f"{v}_{t}" for t in range(T) for v in "zy"]
    assert trace.nodes["_RETURN"]["value"].shape == (3, N, T, D)
    states = torch.stack([trace.nodes[f"z_{t}"]["value"] for t in range(T)], -1)
    assert states.shape == (3, N, T) and states.dtype == torch.long


def test_transitions_driven_by_an_input():
    model = InputHiddenMarkovModel(GaussianComponents(K, D).double(), num_inputs=2)
    x, y = torch.randn(N, T, 2).double(), torch.randn(N, T, D).double()
    plain = HiddenMarkovModel(model.emission)  # V = 0 at first: without the input
    torch.testing.assert_close(model.log_evidence(x, y), plain.log_evidence(y))

    model.input_weight = torch.randn(2, K, K).double()
    model.transition = torch.softmax(torch.randn(K, K).double(), -1)
    V, A = model.input_weight.detach().numpy(), model.transition.detach().numpy()
    driven = np.zeros((N, T - 1, K, K))
    for n, t, i in np.ndindex(N, T - 1, K):
        weights = A[i] * np.exp(sum(x[n, t + 1, d].item() * V[d, i] for d in range(2)))
        driven[n, t, i] = weights / weights.sum()
    driven = torch.tensor(driven)
    torch.testing.assert_close(model.transition_logits(x).exp().detach(), driven)
    want = _brute_force(model.initial, driven, model.emission, y, LENGTHS, MASK)
    got = model.log_evidence(x, y, LENGTHS, MASK).detach()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)
    for particles in (None, 3):
        got = pyro_evidence(model, x, y, LENGTHS, MASK, particles=particles).detach()
        torch.testing.assert_close(got, want.sum(), rtol=0, atol=1e-8)
    drawn = poutine.uncondition(model)(x, torch.zeros_like(y))
    assert drawn.shape == y.shape


def test_start_from_data():
    y = torch.randn(N, T, D).double()
    emission = GaussianComponents.from_data(y[MASK], K, covariance="diag", seed=1)
    model = HiddenMarkovModel(emission)
    assert model.initial.dtype == model.transition.dtype == torch.float64
    rows = y[MASK]
    assert all((row == rows).all(-1).any() for row in emission.loc.detach())
    kept = torch.full((K,), 0.5 + 0.5 / K, dtype=torch.float64)
    torch.testing.assert_close(model.transition.diagonal(), kept)


@pytest.mark.parametrize("spelling", [HiddenMarkovModel, HiddenMarkovLoop])
def test_what_does_not_fit_is_refused(spelling):
    model = spelling(GaussianComponents(K, D))
    y = torch.randn(N, T, D)
    with pytest.raises(ValueError, match=r"\(sequences, steps, 2\), but has shape \(4, 2\)"):
        model(y[0])
    with pytest.raises(ValueError, match=r"\(sequences, steps, 2\), but has shape \(4, 4, 1\)"):
        model(y[..., :1])
    with pytest.raises(ValueError, match=r"lengths must have shape \(4,\).*\(3,\)"):
        model(y, LENGTHS[:3])
    with pytest.raises(ValueError, match=r"mask must have shape \(4, 4\).*\(4, 3\)"):
        model(y, LENGTHS, MASK[:, :3])
    with pytest.raises(ValueError, match=r"stickiness must be in \[0, 1\), but is 1"):
        spelling(GaussianComponents(K, D), stickiness=1)
    driven = InputHiddenMarkovModel(GaussianComponents(K, D), 3)
    with pytest.raises(ValueError, match=r"x must have shape \(4, 4, 3\).*\(4, 4, 2\)"):
        driven(y, y)

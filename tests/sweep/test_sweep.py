"""Sums over every state against one table of all of them."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import lvppl.sweep.bernoulli
from lvppl.errors import ProgramError
from lvppl.sweep import swept_evidence
from lvppl.sweep.bernoulli import BernoulliSum, _Softplus, softplus
from lvppl.sweep.quadratic import Quadratic, all_bits

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def program(kind: str, n: int, dim: int):
    """Bits that a weight matrix mixes, under three observations."""
    W, b = 0.3 * torch.randn(n, dim, dtype=torch.float64), torch.randn(dim, dtype=torch.float64)
    on = torch.full((n,), 0.3, dtype=torch.float64)

    def observation(z):
        x = z @ W + b
        if kind == "bernoulli":
            return dist.Bernoulli(logits=x)
        return dist.Normal(x if kind == "quadratic" else x.tanh(), 1.0)

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(on).to_event(1))
            pyro.sample("y", observation(z).to_event(1), obs=y)

    def brute(y):
        z = all_bits(n, on)
        prior = dist.Bernoulli(on).log_prob(z).sum(-1)
        return (prior + observation(z).log_prob(y[:, None]).sum(-1)).logsumexp(1)

    return model, brute


def test_softplus_to_the_last_digit():
    x = torch.linspace(-60.0, 60.0, 241, dtype=torch.float64)
    torch.testing.assert_close(
        softplus(x), torch.logaddexp(x, torch.zeros_like(x)), rtol=1e-15, atol=0
    )


@pytest.mark.parametrize("kind", ["quadratic", "bernoulli", "program"])
@pytest.mark.parametrize("n", [1, 5, 13])
def test_every_form_is_the_whole_table(kind, n):
    model, brute = program(kind, n, 4)
    y = torch.randn(3, 4, dtype=torch.float64)
    y = y.gt(0).double() if kind == "bernoulli" else y
    found = swept_evidence(model, (y,), {})
    assert found.num_states == 2**n and found.form == (kind if n == 13 else "program")
    torch.testing.assert_close(found.log_prob, brute(y), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 3, 12])
@pytest.mark.parametrize("size", [1.0, 30.0, 1000.0])
def test_quadratics_of_any_size(n, size):
    """Where the parts' maxima are not reached together, sums are taken again in log space."""
    pairs = (size * torch.randn(2, n, n, dtype=torch.float64)).triu(1)
    linear = size * torch.randn(2, n, dtype=torch.float64)
    f = Quadratic(torch.randn(2, dtype=torch.float64), linear, pairs)
    want = f(all_bits(n, linear)).logsumexp(0)
    torch.testing.assert_close(f.log_sum_exp(), want, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("num_visibles", [1, 6, 784])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0, 300.0, 3000.0])
def test_softplus_sums_of_any_size(n, num_visibles, size):
    """Products of many factors, whose logits reach from -1e4 to 1e4, neither over- nor underflow:
    each state's sum, and the sum over states."""
    base = size * torch.randn(num_visibles, dtype=torch.float64)
    slope = size * torch.randn(n, num_visibles, dtype=torch.float64)
    z = all_bits(n, base)
    softplus = torch.nn.functional.softplus(base + z @ slope, threshold=100.0).sum(-1)
    linear = (slope * torch.rand(2, 1, num_visibles, dtype=torch.float64)).sum(-1)
    pairs = torch.randn(2, n, n, dtype=torch.float64).triu(1)
    f = Quadratic(torch.randn(2, dtype=torch.float64), linear, pairs)
    want = (f(z) - softplus[:, None]).logsumexp(0)
    torch.testing.assert_close(BernoulliSum(f, base, slope).log_sum_exp(), want, **CLOSE)
    bits_b = all_bits(n // 2, base)
    found = _Softplus(base, slope, bits_b)(all_bits(n - n // 2, base))
    torch.testing.assert_close(found.flatten(), softplus, **CLOSE)


def test_blocks_of_states_make_no_difference(monkeypatch):
    model, brute = program("bernoulli", 13, 7)
    y = torch.randint(2, (3, 7)).double()
    for inner, block in ((2, 2**4), (4, 2**9), (12, 2**24)):
        monkeypatch.setitem(lvppl.sweep.bernoulli._INNER, "cpu", inner)
        monkeypatch.setitem(lvppl.sweep.bernoulli._BLOCK, "cpu", block)
        found = swept_evidence(model, (y,), {})
        assert found.form == "bernoulli"
        torch.testing.assert_close(found.log_prob, brute(y), **CLOSE)


def test_states_of_several_sites():
    """Digits, bits and a plate inside the datum."""
    table = torch.randn(3, 2, 2, dtype=torch.float64)

    def model(y):
        with pyro.plate("data", len(y), dim=-2):
            k = pyro.sample("k", dist.Categorical(torch.tensor([0.2, 0.3, 0.5]).double()))
            with pyro.plate("inner", 2, dim=-1):
                b = pyro.sample("b", dist.Bernoulli(torch.tensor(0.4).double()))
                mean = table[k.long()][..., 0, 0] + b if k.dim() else table[0, 0, 0] + b
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = torch.randn(4, 2, dtype=torch.float64)
    found = swept_evidence(model, (y,), {})
    assert found.num_states == 3 * 2 * 2
    mean = table[:, 0, 0][:, None] + torch.tensor([0.0, 1.0]).double()  # (k, b)
    log_b = torch.tensor([0.6, 0.4]).double().log()
    each = (log_b + dist.Normal(mean, 1.0).log_prob(y[:, :, None, None])).logsumexp(-1)
    log_k = torch.tensor([0.2, 0.3, 0.5]).double().log()
    torch.testing.assert_close(found.log_prob, (log_k + each.sum(1)).logsumexp(-1))


def test_what_cannot_be_swept():
    def continuous(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    with pytest.raises(ProgramError, match=r"'z' \(Normal\) has no finite support"):
        swept_evidence(continuous, (torch.zeros(2),), {})
    model, _ = program("program", 30, 2)
    with pytest.raises(ProgramError, match="joint states"):
        swept_evidence(model, (torch.zeros(1, 2, dtype=torch.float64),), {})


@pytest.mark.parametrize("handler", ["mask", "scale"])
def test_latents_whose_terms_are_no_probabilities_are_refused(handler):
    """A masked bit would be counted twice, and a scale would stand inside the sum."""

    def model(y):
        with pyro.plate("data", len(y)):
            around = pyro.poutine.mask(mask=torch.tensor(False))
            if handler == "scale":
                around = pyro.poutine.scale(scale=2.0)
            with around:
                z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3, 0.6]).double()).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    with pytest.raises(ProgramError, match="mask or a poutine"):
        swept_evidence(model, (torch.zeros(3, dtype=torch.float64),), {})

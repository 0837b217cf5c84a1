"""Shorter ways to a log-density, against the distribution's own."""

import pyro.distributions as dist
import pytest
import torch

import lvppl.densities
from lvppl.densities import log_density


def site(value):
    return {"value": value, "args": (), "kwargs": {}}


def short(fn, value):
    """By the short way, which must have been taken."""
    found = lvppl.densities._bits(fn, value)
    assert found is not None
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(lvppl.densities, "_WORTH", 1)
    with torch.no_grad():
        yield


@pytest.mark.parametrize("rows", [2**18, 5])
@pytest.mark.parametrize("event", [(1,), (2,), (7,), (8,), (45,), (4, 5), (784,)])
@pytest.mark.parametrize("lead", [(), (6,), (4, 3), (2, 4, 3)])
def test_bits_are_those_of_the_distribution(monkeypatch, lead, event, rows):
    monkeypatch.setattr(lvppl.densities, "_SLICE", rows)
    logits = 3 * torch.randn(*lead, *event, dtype=torch.float64)
    fn = dist.Bernoulli(logits=logits).to_event(len(event))
    for y in (torch.randint(2, lead[1:] + event), torch.randint(2, lead + event)):
        found = short(fn, y.double())
        assert found.shape == fn.batch_shape
        torch.testing.assert_close(found, fn.log_prob(y.double()), rtol=1e-12, atol=1e-12)
        assert torch.equal(log_density(site(y.double()), fn), found)


def test_single_precision_is_as_near_to_double_as_the_distribution():
    torch.manual_seed(0)
    logits, y = 4 * torch.randn(200, 784), torch.randint(2, (784,)).float()
    want = dist.Bernoulli(logits=logits.double()).to_event(1).log_prob(y.double())
    fn = dist.Bernoulli(logits=logits).to_event(1)
    errors = [(f(fn, y) - want).abs().max().item() for f in (short, lambda d, v: d.log_prob(v))]
    assert errors[0] < 2e-6 * want.abs().max() and errors[0] < 3 * errors[1]


@pytest.mark.parametrize("size", [50.0, 300.0, 1e4, torch.inf, torch.nan])
def test_what_would_underflow_goes_the_long_way(size):
    logits, y = torch.full((3, 16), -size), torch.ones(16)
    fn = dist.Bernoulli(logits=logits, validate_args=False).to_event(1)
    assert lvppl.densities._bits(fn, y) is None
    found, want = log_density(site(y), fn), fn.log_prob(y)
    torch.testing.assert_close(found, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("event", [(5,), (2, 3)])
def test_normals_are_those_of_the_distribution(monkeypatch, event):
    monkeypatch.setattr(lvppl.densities, "_WORTH", 0)
    loc, scale = torch.randn(4, *event).double(), torch.rand(4, *event).double() + 0.1
    value = torch.randn(7, 4, *event).double()
    for law in (
        dist.Normal(loc, scale).to_event(len(event)).expand((7, 4)),
        dist.Normal(loc, 2.0).to_event(len(event)).expand((7, 4)),
        dist.Normal(loc[0], scale[0]).to_event(len(event)).expand((7, 4)),
        dist.Normal(value.flip(0), scale.expand(value.shape)).to_event(len(event)),
    ):
        assert lvppl.densities._normals(law, value) is not None
        torch.testing.assert_close(
            log_density(site(value), law), law.log_prob(value), rtol=1e-13, atol=1e-12
        )


def test_what_goes_the_long_way(monkeypatch):
    y, logits = torch.randint(2, (3, 8)).double(), torch.randn(3, 8).double()
    bits = dist.Bernoulli(logits=logits).to_event(1)
    others = [
        (dist.Bernoulli(logits=logits), y),  # of which every element is wanted
        (dist.Bernoulli(probs=logits.sigmoid()).to_event(1), y),
        (bits.mask(torch.tensor([True, False, True])), y),
        (dist.Laplace(logits, 1.0).to_event(1), y),
        (dist.Normal(logits, 1.0), y),
        (dist.Normal(logits[:1], 1.0).to_event(1), y),  # more values than locations
        (dist.Bernoulli(logits=logits, validate_args=False).to_event(1), 0.3 * y),  # no bits
        (dist.Bernoulli(logits=logits[:1]).to_event(1), y),  # more values than logits
        (dist.Bernoulli(logits=logits).to_event(1), y.float()),
    ]
    for fn, value in others:
        assert lvppl.densities._bits(fn, value) is None
        assert lvppl.densities._normals(fn, value) is None
        assert torch.equal(log_density(site(value), fn), fn.log_prob(value))
    with torch.enable_grad():
        leaf = logits.clone().requires_grad_()
        fn = dist.Bernoulli(logits=leaf).to_event(1)
        (found,) = torch.autograd.grad(log_density(site(y), fn).sum(), leaf)
    torch.testing.assert_close(found, y - logits.sigmoid())
    monkeypatch.setattr(lvppl.densities, "_WORTH", 100)
    assert lvppl.densities._bits(bits, y) is None


def test_logits_are_left_as_they_are():
    logits, y = torch.randn(3, 8), torch.randint(2, (8,)).float()
    kept = logits.clone(), y.clone()
    short(dist.Bernoulli(logits=logits).to_event(1), y)
    assert torch.equal(logits, kept[0]) and torch.equal(y, kept[1])

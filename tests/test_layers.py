"""Layers by oneDNN, against the same in double precision."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import lvppl.layers
from lvppl.layers import FastLayers, linear_pays

need = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(lvppl.layers, "linear_pays", lambda: True)
    monkeypatch.setattr(lvppl.layers, "tanh_pays", torch.backends.mkldnn.is_available)
    monkeypatch.setattr(lvppl.layers, "_WORTH_TANH", 1)
    monkeypatch.setattr(lvppl.layers, "_WORTH", 1)


@pytest.fixture
def calls(monkeypatch):
    """Layouts of the calls that go to oneDNN."""
    found, op = [], torch.ops.mkldnn._linear_pointwise
    spy = lambda x, *rest: (found.append(tuple(x.shape)), op(x, *rest))[1]  # noqa: E731
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    return found


@need
@pytest.mark.parametrize("kind", ["column", "expanded"])
def test_a_bias_of_any_strides(kind):
    x, weight = torch.randn(4096, 64), torch.randn(64, 64)
    bias = {"column": torch.randn(64, 2)[:, 1], "expanded": torch.randn(1).expand(64)}[kind]
    with torch.no_grad(), FastLayers():
        found = torch.nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(found, x @ weight.T + bias, rtol=1e-4, atol=1e-3)


@need
def test_forward_derivatives_go_through():
    x, weight = torch.randn(4096, 64), torch.randn(64, 64)
    ones = torch.ones_like(x)
    with torch.no_grad(), FastLayers():
        _, linear = torch.func.jvp(lambda r: torch.nn.functional.linear(r, weight), (x,), (ones,))
        _, tanh = torch.func.jvp(torch.tanh, (x,), (ones,))
    torch.testing.assert_close(linear, ones @ weight.T, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(tanh, 1 - x.tanh().square(), rtol=1e-4, atol=1e-5)


@need
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 30), (1, 30), (4, 3, 30), (2, 4, 3, 30)])
def test_the_numbers_are_those_of_torch(calls, shape, bias):
    layer = nn.Linear(30, 17, bias=bias)
    for x in (torch.randn(shape), torch.randn(30, *shape[:-1]).movedim(0, -1)):
        with torch.no_grad(), FastLayers():
            found = layer(x)
        want = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
        assert found.dtype == torch.float32 and found.shape == want.shape
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    assert calls == 2 * [shape]


@need
def test_what_is_left_to_torch(calls, monkeypatch):
    x, weight = torch.randn(5, 30), torch.randn(17, 30)
    with FastLayers():
        linear(x, weight.requires_grad_()).sum().backward()  # gradients are wanted
    assert weight.grad is not None
    with torch.no_grad(), FastLayers():
        linear(x.double(), weight.double())
        linear(x[0], weight)
        linear(x, weight[0])
        linear(input=x, weight=weight)
        assert linear(x.to("meta"), weight.to("meta")).device.type == "meta"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(x, weight).dtype == torch.bfloat16
        with torch.backends.mkldnn.flags(enabled=False):
            linear(x, weight)
        with pytest.raises(RuntimeError):
            linear(x.double(), weight)
        monkeypatch.setattr(lvppl.layers, "_WORTH", 10**9)
        linear(x, weight)
    assert calls == []


@pytest.mark.parametrize("at_once", [7, 2**19])
def test_tanh_is_right_to_seven_digits_near_zero_too(monkeypatch, at_once):
    monkeypatch.setattr(lvppl.layers, "_AT_ONCE", at_once)
    x = torch.logspace(-30, 1.5, 400).reshape(2, 10, 20)
    x = torch.cat([x, -x, torch.zeros_like(x)]).transpose(1, 2)
    with torch.no_grad(), FastLayers():
        found = torch.tanh(x), x.tanh(), nn.Tanh()(x)
        at_the_ends = torch.tanh(torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0]))
    for y in found:
        torch.testing.assert_close(y.double(), x.double().tanh(), rtol=2e-7, atol=0)
    ends = torch.tensor([1.0, -1.0, torch.nan, 0.0])
    torch.testing.assert_close(at_the_ends, ends, rtol=0, atol=0, equal_nan=True)
    wanted = x.double().requires_grad_()
    with FastLayers():
        (gradient,) = torch.autograd.grad(torch.tanh(wanted).sum(), wanted)
    torch.testing.assert_close(gradient, 1 - wanted.detach().tanh() ** 2)


@pytest.mark.parametrize(
    ("capability", "vendor", "wanted"),
    [
        ("AVX512", "AuthenticAMD", True),
        ("AVX512", "GenuineIntel", False),
        ("AVX2", "AuthenticAMD", False),
    ],
)
def test_where_it_pays(monkeypatch, capability, vendor, wanted):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(lvppl.layers, "_processor", lambda: f"vendor_id\t: {vendor}\n")
    wanted = wanted and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert linear_pays.__wrapped__() is wanted

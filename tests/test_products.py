"""Linear layers by oneDNN, against the same in double precision."""

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

import lvppl.products
from lvppl.products import FastLinear, pays

need = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    monkeypatch.setattr(lvppl.products, "pays", lambda: True)
    monkeypatch.setattr(lvppl.products, "_WORTH", 1)


@pytest.fixture
def calls(monkeypatch):
    """Layouts of the calls that go to oneDNN."""
    found, op = [], torch.ops.mkldnn._linear_pointwise
    spy = lambda x, *rest: (found.append(tuple(x.shape)), op(x, *rest))[1]  # noqa: E731
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", spy)
    return found


@need
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 30), (1, 30), (4, 3, 30), (2, 4, 3, 30)])
def test_the_numbers_are_those_of_torch(calls, shape, bias):
    layer = nn.Linear(30, 17, bias=bias)
    for x in (torch.randn(shape), torch.randn(30, *shape[:-1]).movedim(0, -1)):
        with torch.no_grad(), FastLinear():
            found = layer(x)
        want = x.double() @ layer.weight.double().T + (layer.bias.double() if bias else 0)
        assert found.dtype == torch.float32 and found.shape == want.shape
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    assert calls == 2 * [shape]


@need
def test_what_is_left_to_torch(calls, monkeypatch):
    x, weight = torch.randn(5, 30), torch.randn(17, 30)
    with FastLinear():
        linear(x, weight.requires_grad_()).sum().backward()  # gradients are wanted
    assert weight.grad is not None
    with torch.no_grad(), FastLinear():
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
        monkeypatch.setattr(lvppl.products, "_WORTH", 10**9)
        linear(x, weight)
    assert calls == []


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
    monkeypatch.setattr(lvppl.products, "_processor", lambda: f"vendor_id\t: {vendor}\n")
    wanted = wanted and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    assert pays.__wrapped__() is wanted

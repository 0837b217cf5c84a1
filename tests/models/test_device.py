"""Programs and guides create no tensor off the device of their parameters and data.

The device is "meta", which has shapes but no memory, and is found everywhere: operations between it
and another device raise.
"""

import pyro
import pytest
import torch
from pyro import poutine

from tests.guides.test_guides import ALL, data, make_guide, make_model
from tests.models.test_leading_dimensions import PROGRAMS, make


@pytest.fixture(autouse=True)
def _clean_slate():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def _run(program, x):
    with pyro.validation_enabled(False), pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(program).get_trace(x)
        trace.compute_log_prob()
    for node in trace.nodes.values():
        if node["type"] == "sample" and node["name"] not in ("data", "particles"):
            assert node["value"].device.type == "meta"
            assert node["log_prob"].device.type == "meta"


def test_mixing_devices_raises():
    """What the other tests rest on."""
    with pytest.raises(RuntimeError, match="device"):
        torch.zeros(3) + torch.zeros(3, device="meta")


@pytest.mark.parametrize("name", PROGRAMS)
def test_models(name):
    model, x = make(name)
    if isinstance(model, torch.nn.Module):
        model.to("meta")
    _run(model, x.to("meta"))


@pytest.mark.parametrize("name", ALL)
def test_guides(name):
    x = data().to("meta")
    _run(make_guide(name).to("meta"), x)
    _run(make_model(name).to("meta"), x)

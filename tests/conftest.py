"""A clean slate for every test, and data sets where there are any."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "Agg")  # before anything imports matplotlib's windows

import numpy as np
import pyro
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ROOT.parent / "shared" / "data"

# Tests are small, and several run at once: threads within one would only compete.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_slate() -> Iterator[None]:
    """No parameters, one seed, validation on; the defaults that a test may change are put back."""
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    pyro.clear_param_store()
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    pyro.set_rng_seed(0)
    with pyro.validation_enabled(True):
        yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(gradients)


@pytest.fixture
def requires_data(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """``requires_data("mnist/train-images-idx3-ubyte.gz")``: its path, or the test is skipped.

    Looks in ``$LVPPL_DATA``, or where that is not set in ``../shared/data`` beside the repository,
    and sets ``LVPPL_DATA`` for the test.
    """

    def find(name: str) -> Path:
        folder = Path(os.environ.get("LVPPL_DATA") or BESIDE)
        if not (folder / name).exists():
            where = "in $LVPPL_DATA" if "LVPPL_DATA" in os.environ else "as LVPPL_DATA is not set"
            pytest.skip(f"needs the data file {name}, which is not there {where}")
        monkeypatch.setenv("LVPPL_DATA", str(folder))
        return folder / name

    return find

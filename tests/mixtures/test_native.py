"""What is particular to the compiled loops; their results are tested in test_kernel.py."""

import ctypes
import importlib.util
import platform
import shutil

import pytest
import torch

from lvppl.mixtures import MixtureKernel, native

compiled = pytest.mark.skipif(native._library() is None, reason="nothing compiled for this machine")


@pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc" or not shutil.which("gcc"),
    reason="built where there are GCC and an x86 processor",
)
def test_the_loops_are_built_with_the_package():
    found = importlib.util.find_spec("lvppl.mixtures._native")
    assert found is not None, "pip install -e . builds it; see its output with -v"
    assert ctypes.CDLL(found.origin).lvppl_vector_bytes() in (0, 32, 64)


def spread(n, d, k, dtype=torch.float32):
    loc = 2 * torch.randn(k, d, dtype=dtype)
    return loc[torch.randint(k, (n,))] + torch.randn(n, d, dtype=dtype), loc


@compiled
@pytest.mark.parametrize("covariance", ["diag", "unit"])
@pytest.mark.parametrize("hard", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(covariance, hard):
    """Blocks depend on the data alone, and their sums are added in order."""
    y, loc = spread(3 * native._BLOCK + 17, 5, 4)
    kernel = MixtureKernel(y, covariance=covariance, hard=hard)
    scale = torch.ones(4, 5) if covariance == "diag" else None
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(kernel(torch.zeros(4), loc, scale, second=covariance == "diag"))
    finally:
        torch.set_num_threads(before)
    one, three = found
    assert torch.equal(one.first, three.first) and torch.equal(one.counts, three.counts)
    assert torch.equal(one.objective, three.objective)


@compiled
@pytest.mark.parametrize("n", [1, 7, 63, 64, 65, 127, 129, 1000])
@pytest.mark.parametrize("d", [1, 2, 15, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hard", [False, True])
def test_tiles_need_not_be_full(n, d, dtype, hard, monkeypatch):
    y, loc = spread(n, d, 3, dtype)
    for covariance, scale in (("full", torch.eye(d).expand(3, d, d)), ("unit", None)):
        kernel = MixtureKernel(y, covariance=covariance, hard=hard)
        want_second = covariance == "full"
        monkeypatch.undo()
        ours = kernel(torch.zeros(3), loc, scale, second=want_second)
        monkeypatch.setattr(native, "_library", lambda: None)
        torchs = kernel(torch.zeros(3), loc, scale, second=want_second)
        for name in ("objective", "counts", "first"):
            a, b = getattr(ours, name), getattr(torchs, name)
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-4 * n**0.5)
            assert a.dtype == torch.float64


@compiled
def test_impossible_components_take_nothing():
    y, loc = spread(500, 3, 4, torch.float64)
    log_weights = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log()
    for hard in (False, True):
        kernel = MixtureKernel(y, covariance="diag", hard=hard)
        found = kernel(log_weights, loc, torch.ones(4, 3, dtype=torch.float64))
        assert found.counts[2:].eq(0).all() and found.counts.sum() == pytest.approx(500)
        assert found.objective.isfinite()


@compiled
def test_data_that_the_loops_do_not_take_are_left_to_torch():
    y, loc = spread(300, 4, 3, torch.float64)
    whole = MixtureKernel(y, covariance="unit")(torch.zeros(3), loc)
    columns = torch.stack([y, y], -1)[..., 0]  # not contiguous
    assert not native.takes(columns, 12) and native.takes(y, 12)
    part = MixtureKernel(columns, covariance="unit")(torch.zeros(3), loc)
    torch.testing.assert_close(part.first, whole.first, rtol=1e-10, atol=1e-10)
    assert not native.takes(y, native._LARGEST_SUMS + 1)

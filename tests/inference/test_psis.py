"""PSIS against ArviZ, against known tails, and against its own streamed form."""

import math

import arviz
import numpy as np
import pytest
import torch

from lvppl.errors import ProgramError
from lvppl.inference.psis import khat_from_tail, khat_threshold, psis, tail_size

NEW_ARVIZ = int(arviz.__version__.split(".")[0]) >= 1


def peer(log_weights, normalize=True):
    """ArviZ's own answer. ArviZ 0.2x takes log weights; ArviZ 1.x takes their negative."""
    rows = log_weights.T.double().numpy().copy()
    if NEW_ARVIZ:
        from arviz_stats.base import array_stats

        smoothed, khat = array_stats.psislw(-rows)
        smoothed = smoothed if normalize else None
    else:
        smoothed, khat = arviz.psislw(rows, normalize=normalize)
    khat = torch.as_tensor(np.asarray(khat))
    return None if smoothed is None else torch.as_tensor(np.asarray(smoothed)).T, khat


def draws(kind, num_samples, num_data):
    generator = torch.Generator().manual_seed(17)
    normal = torch.randn(num_samples, num_data, generator=generator, dtype=torch.float64)
    uniform = torch.rand(num_samples, num_data, generator=generator, dtype=torch.float64)
    if kind == "normal":
        return normal * torch.linspace(0.05, 4.0, num_data, dtype=torch.float64) - 300.0
    if kind == "pareto":
        return -uniform.log() * torch.linspace(0.1, 1.5, num_data, dtype=torch.float64)
    if kind == "bounded":
        return uniform.log()
    if kind == "zeros":
        return normal.masked_fill(uniform < 0.6, -math.inf)
    if kind == "ties":
        return (4 * normal).round() / 4
    return 200.0 * normal  # most weights underflow against the largest


@pytest.mark.parametrize("kind", ["normal", "pareto", "bounded", "zeros", "ties", "huge"])
@pytest.mark.parametrize("num_samples", [25, 100, 400, 1000, 4001])
def test_equals_arviz(kind, num_samples):
    if NEW_ARVIZ and (num_samples > 400 or kind in ("ties", "huge")):
        pytest.skip("ArviZ 1.x rounds the tail size down and keeps ties and underflows in it")
    log_weights = draws(kind, num_samples, 9)
    for normalize in (True, False):
        smoothed, khat = psis(log_weights, normalize=normalize)
        with np.errstate(all="ignore"):
            expected, expected_khat = peer(log_weights, normalize)
        torch.testing.assert_close(khat, expected_khat, rtol=0, atol=1e-8)
        if kind == "ties":  # which of two equal weights gets the larger quantile is arbitrary
            smoothed, expected = smoothed.sort(0).values, expected.sort(0).values
        if expected is not None:
            torch.testing.assert_close(smoothed, expected, rtol=1e-10, atol=1e-8)


def test_sign_is_that_of_log_weights_not_of_log_likelihoods():
    """Heavy to the right, bounded to the left: only the right tail may count."""
    uniform = torch.rand(2500, 30, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    heavy = -0.9 * uniform.log()
    assert abs(psis(heavy)[1].mean().item() - 0.9) < 0.15
    assert psis(-heavy)[1].mean().item() < -0.5
    torch.testing.assert_close(psis(-heavy)[1], peer(-heavy)[1], rtol=0, atol=1e-8)


@pytest.mark.parametrize("shape", [0.2, 0.5, 0.8, 1.2])
def test_recovers_the_shape_of_pareto_weights(shape):
    generator = torch.Generator().manual_seed(5)
    uniform = torch.rand(20_000, 40, generator=generator, dtype=torch.float64)
    khat = psis(-shape * uniform.log())[1]
    # asymptotic standard deviation of a shape estimate from M points is (1 + k) / sqrt(M)
    error = (1 + shape) / math.sqrt(tail_size(20_000) * 40)
    assert abs(khat.mean().item() - shape) < 4 * error + 0.02


def test_smoothing_keeps_order_and_changes_only_the_tail():
    log_weights = draws("normal", 1000, 5)
    smoothed, _ = psis(log_weights, normalize=False)
    changed = (smoothed != log_weights).sum(0)
    assert (changed <= tail_size(1000)).all()
    torch.testing.assert_close(smoothed.argsort(0), log_weights.argsort(0))
    assert (smoothed.amax(0) <= log_weights.amax(0) + 1e-12).all()


def test_streamed_tail_gives_the_same_khat():
    for kind in ("normal", "zeros", "ties", "huge"):
        log_weights = draws(kind, 777, 6)
        keep = tail_size(777) + 1
        streamed = khat_from_tail(log_weights.topk(keep, 0).values, log_weights.amin(0), 777)
        torch.testing.assert_close(streamed, psis(log_weights)[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_are_an_exact_proposal(dtype):
    generator = torch.Generator().manual_seed(0)
    rounding = torch.finfo(dtype).eps * 97.0 * torch.randn(500, 3, generator=generator)
    log_weights = -97.0 + rounding.to(dtype)
    smoothed, khat = psis(log_weights, normalize=False)
    assert (khat == -math.inf).all()
    torch.testing.assert_close(smoothed, log_weights.double(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tail_of_equal_weights_is_bounded(dtype):
    """Two values: the average is that of a coin, whose every moment exists."""
    coin = torch.arange(1000) % 2 == 0
    log_weights = torch.where(coin, -1.0, -3.0).to(dtype)
    smoothed, khat = psis(log_weights, normalize=False)
    assert khat.item() == -math.inf
    torch.testing.assert_close(smoothed, log_weights.double(), rtol=0, atol=0)
    keep = tail_size(1000) + 1
    streamed = khat_from_tail(
        log_weights.topk(keep).values[:, None], log_weights.amin()[None], 1000
    )
    assert streamed.item() == -math.inf
    # a largest value that is rarer than the tail is no tie
    rare = torch.where(torch.arange(1000) < keep - 2, -1.0, -3.0).to(dtype)
    assert psis(rare)[1].item() > -math.inf
    # and a tail of four weights is too short to tell
    assert psis(log_weights[:20])[1].item() == math.inf


def test_no_fit_is_an_infinite_khat():
    few = draws("normal", 10, 2)
    assert (psis(few)[1] == math.inf).all()
    one = draws("normal", 1, 2)
    smoothed, khat = psis(one)
    assert (khat == math.inf).all() and (smoothed == 0).all()
    nothing = torch.full((100, 1), -math.inf)
    smoothed, khat = psis(nothing)
    assert khat.item() == math.inf and (smoothed == -math.inf).all()


def test_shapes_and_float64():
    log_weights = draws("normal", 200, 6).float().reshape(200, 2, 3)
    smoothed, khat = psis(log_weights)
    assert smoothed.shape == (200, 2, 3) and khat.shape == (2, 3)
    assert smoothed.dtype == khat.dtype == torch.float64
    flat = psis(log_weights.reshape(200, 6))
    torch.testing.assert_close(khat.reshape(6), flat[1], rtol=0, atol=0)
    single = psis(log_weights[:, 0, 0])
    torch.testing.assert_close(single[1], khat[0, 0], rtol=0, atol=0)
    torch.testing.assert_close(smoothed.exp().sum(0), torch.ones(2, 3).double())


def test_threshold():
    assert khat_threshold(100) == pytest.approx(0.5)
    assert khat_threshold(10**6) == 0.7
    assert khat_threshold(1) == -math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_refuses_weights_that_are_not_numbers(bad):
    log_weights = draws("normal", 50, 2)
    log_weights[3, 1] = bad
    with pytest.raises(ProgramError, match="NaN or plus infinity"):
        psis(log_weights)
    with pytest.raises(ProgramError, match="at least one sample"):
        psis(log_weights[:0])

"""The inverse Wishart against SciPy's, and its draws against its moments."""

import numpy as np
import pyro
import pytest
import scipy.stats
import torch
from torch.distributions import Wishart

from lvppl.distributions import InverseWishart


def _matrices(count, D, seed=0):
    """Symmetric positive definite, (count, D, D)."""
    draws = torch.randn(count, D, D, generator=torch.Generator().manual_seed(seed)).double()
    return draws @ draws.mT + 0.3 * torch.eye(D)


@pytest.mark.parametrize("D", [1, 2, 4])
@pytest.mark.parametrize("excess", [0.3, 2.0, 7.5])  # of ν over D − 1
def test_log_prob_is_that_of_scipy(D, excess):
    Ψ, Σ, df = _matrices(1, D)[0], _matrices(5, D, seed=1), D - 1 + excess
    got = InverseWishart(df, Ψ, validate_args=True).log_prob(Σ)
    want = [scipy.stats.invwishart.logpdf(x, df=df, scale=Ψ.numpy()) for x in Σ.numpy()]
    np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


def test_log_prob_is_wisharts_of_the_inverse():
    """p(Σ) = Wishart(Σ⁻¹; ν, Ψ⁻¹) |Σ|^−(D+1), the Jacobian of inversion; and so is its gradient."""
    Ψ, Σ = _matrices(3, 3), _matrices(3, 3, seed=1)
    df = torch.tensor([3.5, 4.0, 9.0], dtype=torch.float64)
    leaves = [Ψ.requires_grad_(), df.requires_grad_()]
    got = InverseWishart(df, Ψ).log_prob(Σ)
    want = Wishart(df, Ψ.inverse()).log_prob(Σ.inverse()) - 4 * Σ.logdet()
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(got.sum(), leaves),
        torch.autograd.grad(want.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a + a.mT if a.dim() > 1 else a, b + b.mT if b.dim() > 1 else b)


def test_the_mode_is_the_top_and_the_mean_is_scipys():
    Ψ, df = _matrices(1, 3)[0], 6.0
    d = InverseWishart(df, Ψ)
    np.testing.assert_allclose(d.mean, scipy.stats.invwishart.mean(df, Ψ.numpy()), rtol=1e-12)
    np.testing.assert_allclose(d.mode, scipy.stats.invwishart.mode(df, Ψ.numpy()), rtol=1e-12)
    mode = d.mode.requires_grad_()
    (slope,) = torch.autograd.grad(d.log_prob(mode), mode)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-10)
    assert InverseWishart(3.5, Ψ).mean.isnan().all()  # needs ν > D + 1


def test_draws_have_the_mean_and_the_law_of_the_inverse():
    """50,000 draws; each entry of the mean, and of that of Σ⁻¹, within 5 standard errors."""
    pyro.set_rng_seed(0)
    Ψ, df = _matrices(1, 2)[0], 9.0  # four moments exist
    d = InverseWishart(df, Ψ)
    draws = d.sample((50_000,))
    for values, mean in ((draws, d.mean), (draws.inverse(), df * Ψ.inverse())):
        error = values.std(0) / len(values) ** 0.5
        assert ((values.mean(0) - mean).abs() < 5 * error).all()


def test_batches_expand_and_are_sampled_in_a_plate():
    Ψ = _matrices(3, 2)
    df = torch.tensor([3.0, 4.0, 5.0], dtype=torch.float64)
    d = InverseWishart(df, Ψ, validate_args=True)
    assert (d.batch_shape, d.event_shape) == ((3,), (2, 2))
    wide = d.expand((4, 3))
    draws = wide.sample((2,))
    assert draws.shape == (2, 4, 3, 2, 2)
    assert d.support.check(draws).all()
    each = [InverseWishart(float(df[i]), Ψ[i]).log_prob(draws[:, :, i]) for i in range(3)]
    torch.testing.assert_close(wide.log_prob(draws), torch.stack(each, -1), rtol=1e-12, atol=0)
    with pyro.plate("components", 3):
        assert pyro.sample("Σ", d).shape == (3, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_dtype_of_the_scale_matrix(dtype):
    d = InverseWishart(4.0, torch.eye(2, dtype=dtype))
    Σ = d.sample()
    assert Σ.dtype == d.log_prob(Σ).dtype == dtype


def test_what_is_no_inverse_wishart_is_refused():
    with pytest.raises(ValueError, match="df"):
        InverseWishart(1.0, torch.eye(2), validate_args=True)  # ν must exceed D − 1
    with pytest.raises(ValueError, match="scale_matrix"):
        InverseWishart(3.0, -torch.eye(2), validate_args=True)
    with pytest.raises(ValueError, match="support"):
        InverseWishart(3.0, torch.eye(2), validate_args=True).log_prob(-torch.eye(2))

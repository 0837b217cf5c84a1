"""The mixture kernel against brute force, and whole runs of EM and k-means against scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture
from torch.distributions import MultivariateNormal

from lvppl.errors import ProgramError
from lvppl.mixtures import MixtureKernel, native

KINDS = ["full", "tied", "diag", "spherical", "unit"]
N, D, K = 257, 3, 4


@pytest.fixture(autouse=True, params=["compiled", "torch"])
def way(request, monkeypatch):
    """Everything here holds for the compiled loops and for their twins in torch."""
    if request.param == "torch":
        monkeypatch.setattr(native, "_library", lambda: None)
    elif native._library() is None:
        pytest.skip("nothing was compiled here, or not for this processor")


def mixture(covariance, *, dtype=torch.float64, offset=0.0, n=N, d=D, k=K):
    """Data, ln w, loc and scale; the scale in the form that the covariance asks for."""
    loc = 2.0 * torch.randn(k, d, dtype=torch.float64)
    y = loc[torch.randint(k, (n,))] + torch.randn(n, d, dtype=torch.float64)
    log_weights = torch.randn(k, dtype=torch.float64).log_softmax(0)
    lower = 0.3 * torch.randn(k, d, d, dtype=torch.float64).tril(-1)
    factors = lower + torch.diag_embed(0.5 + torch.rand(k, d, dtype=torch.float64))
    scale = {
        "full": factors,
        "tied": factors[0],
        "diag": factors.diagonal(dim1=1, dim2=2),
        "spherical": factors[:, 0, 0],
        "unit": factors[0, 0, 0],
    }[covariance]
    moved = loc + 0.3 * torch.randn(k, d, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (y + offset, log_weights, moved + offset, scale))


def factors_of(covariance, scale, k=K, d=D):
    eye = torch.eye(d, dtype=scale.dtype)
    if covariance == "diag":
        return torch.diag_embed(scale)
    if covariance == "spherical":
        return scale[:, None, None] * eye
    return {"full": scale, "tied": scale}.get(covariance, scale * eye).expand(k, d, d)


def brute(covariance, y, log_weights, loc, scale, *, hard=False, temperature=1.0):
    """objective, counts, first, second and the terms by their definitions, in float64."""
    y, log_weights, loc, scale = (t.double() for t in (y, log_weights, loc, scale))
    normal = MultivariateNormal(loc, scale_tril=factors_of(covariance, scale, *loc.shape))
    terms = log_weights + normal.log_prob(y[:, None])
    if hard:
        r = torch.nn.functional.one_hot(terms.argmax(1), len(loc)).double()
        evidence = terms.amax(1)
    else:
        r = (terms / temperature).softmax(1)
        evidence = temperature * (terms / temperature).logsumexp(1)
    residual = y[:, None] - loc
    second = torch.einsum("nk,nki,nkj->kij", r, residual, residual)
    diagonal = second.diagonal(dim1=1, dim2=2)
    second = {"full": second, "tied": second.sum(0), "diag": diagonal}.get(
        covariance, diagonal.sum(1)
    )
    first = torch.einsum("nk,nki->ki", r, residual)
    return (evidence.sum(), r.sum(0), first, second), terms - log_weights


def fields(statistics):
    return statistics.objective, statistics.counts, statistics.first, statistics.second


def assert_close(got, expected, tolerance):
    for ours, theirs in zip(fields(got), expected, strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * N)


@pytest.mark.parametrize("mode", ["soft", "cold", "hot", "hard"])
@pytest.mark.parametrize("covariance", KINDS)
def test_statistics_are_the_definition(covariance, mode):
    y, *at = mixture(covariance)
    temperature = {"cold": 0.5, "hot": 3.0}.get(mode, 1.0)
    kernel = MixtureKernel(y, covariance=covariance, hard=mode == "hard", chunk=100)
    got = kernel(*at, temperature=temperature)
    options = {"hard": mode == "hard", "temperature": temperature}
    expected, densities = brute(covariance, y, *at, **options)
    assert_close(got, expected, 1e-12)
    torch.testing.assert_close(kernel.log_densities(*at[1:]), densities, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("covariance", KINDS)
def test_results_do_not_depend_on_the_chunk(covariance, hard):
    y, *at = mixture(covariance)
    whole = MixtureKernel(y, covariance=covariance, hard=hard)
    for chunk in (1, 7, N - 1, N, 10 * N):
        kernel = MixtureKernel(y, covariance=covariance, hard=hard, chunk=chunk)
        assert_close(kernel(*at), fields(whole(*at)), 1e-12)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("covariance", KINDS)
def test_float32_is_exact_far_from_the_origin(covariance, hard):
    """An offset of 1,000 at width 1: float32 data are taken as they are; nothing more is lost."""
    y, *at = mixture(covariance, dtype=torch.float32, offset=1e3)
    got = MixtureKernel(y, covariance=covariance, hard=hard, chunk=64)(*at)
    expected, _ = brute(covariance, y, *at, hard=hard)
    assert_close(got, expected, 1e-10)


@pytest.mark.parametrize("covariance", KINDS)
def test_float32_is_exact_for_narrow_and_distant_components(covariance):
    """10,000 standard deviations apart, where squares in float32 would be wrong by several nats."""
    at = (torch.tensor([0.4, 0.6]).log(), torch.tensor([[0.0, 0.0], [100.0, -50.0]]))
    scale = {
        "full": 0.01 * torch.eye(2).expand(2, 2, 2),
        "tied": 0.01 * torch.eye(2),
        "diag": torch.full((2, 2), 0.01),
        "spherical": torch.full((2,), 0.01),
        "unit": torch.tensor(0.01),
    }[covariance]
    y = at[1].repeat(100, 1) + 0.01 * torch.randn(200, 2)
    got = MixtureKernel(y, covariance=covariance)(*at, scale)
    expected, _ = brute(covariance, y, *at, scale)
    for ours, theirs in zip(fields(got), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("covariance", KINDS)
def test_an_empty_component_has_zero_statistics(covariance, hard):
    y, log_weights, loc, scale = mixture(covariance)
    loc[1] = 1e4  # no datum comes near
    log_weights[2] = -torch.inf
    got = MixtureKernel(y, covariance=covariance, hard=hard)(log_weights, loc, scale)
    expected, _ = brute(covariance, y, log_weights, loc, scale, hard=hard)
    assert_close(got, expected, 1e-10)
    assert torch.equal(got.counts[1:3], torch.zeros(2, dtype=torch.float64))
    assert torch.equal(got.first[1:3], torch.zeros(2, D, dtype=torch.float64))


@pytest.mark.parametrize("covariance", ["unit", "diag"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_go_to_the_first_component(dtype, covariance):
    """Small whole numbers, whose scores are exact: 38 components at one place, and one half-way."""
    y = torch.tensor([[-2.0, 1.0], [0.0, 0.0], [2.0, -1.0]], dtype=dtype).repeat(20, 1)
    loc = torch.tensor([[9, 9]] + 20 * [[4, -2]] + 19 * [[-4, 2]], dtype=dtype)
    scale = torch.ones_like(loc) if covariance == "diag" else None
    counts = MixtureKernel(y, covariance=covariance, hard=True)(torch.zeros(40), loc, scale).counts
    assert counts[1] == 40 and counts[21] == 20


def test_the_default_scale_is_the_identity():
    y, log_weights, loc, _ = mixture("unit")
    for hard in (False, True):
        kernel = MixtureKernel(y, covariance="unit", hard=hard)
        expected, _ = brute("unit", y, log_weights, loc, torch.ones(()).double(), hard=hard)
        assert_close(kernel(log_weights, loc), expected, 1e-12)


def m_step(covariance, got, loc, n):
    """The maximum-likelihood mixture: ln w, loc, scale in the form that the kernel takes."""
    step = got.first / got.counts[:, None]
    if covariance == "full":
        second = got.second / got.counts[:, None, None] - step[:, :, None] * step[:, None, :]
        scale = torch.linalg.cholesky(second)
    elif covariance == "tied":
        scale = torch.linalg.cholesky((got.second - got.first.t() @ step) / n)
    elif covariance == "diag":
        scale = (got.second / got.counts[:, None] - step**2).sqrt()
    else:
        scale = ((got.second / got.counts - (step**2).sum(1)) / step.shape[1]).sqrt()
    return (got.counts / n).log(), loc + step, scale


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
def test_em_is_that_of_scikit_learn(covariance):
    """From one start, 20 iterations: the same parameters and the same likelihood to 1e-6."""
    y, _, loc, _ = mixture(covariance, n=2000, offset=5.0)
    log_weights = torch.full((K,), 1 / K, dtype=torch.float64).log()
    scale = torch.linalg.cholesky(torch.eye(D, dtype=torch.float64).expand(K, D, D))
    scale = {"full": scale, "tied": scale[0], "diag": scale.diagonal(dim1=1, dim2=2)}.get(
        covariance, scale[:, 0, 0]
    )
    precision = {"full": np.stack([np.eye(D)] * K), "tied": np.eye(D), "diag": np.ones((K, D))}
    peer = GaussianMixture(
        K,
        covariance_type=covariance,
        reg_covar=0.0,
        tol=0.0,
        max_iter=20,
        weights_init=np.full(K, 1 / K),
        means_init=loc.numpy(),
        precisions_init=precision.get(covariance, np.ones(K)),
    )
    with pytest.warns(match="did not converge"):
        peer.fit(y.numpy())
    kernel, at = MixtureKernel(y, covariance=covariance), (log_weights, loc, scale)
    for _ in range(20):
        at = m_step(covariance, kernel(*at), at[1], len(y))
    assert kernel(*at).objective.item() / len(y) == pytest.approx(peer.score(y.numpy()), abs=1e-9)
    np.testing.assert_allclose(at[0].exp(), peer.weights_, atol=1e-6)
    np.testing.assert_allclose(at[1], peer.means_, atol=1e-6)
    spread = at[2] @ at[2].mT if covariance in ("full", "tied") else at[2] ** 2
    np.testing.assert_allclose(spread, peer.covariances_, atol=1e-6)
    r = (at[0] + kernel.log_densities(*at[1:])).softmax(1)
    np.testing.assert_allclose(r, peer.predict_proba(y), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_k_means_is_that_of_scikit_learn(dtype, offset):
    """Centres, labels and inertia after 12 of Lloyd's iterations from one start."""
    y, log_weights, _, _ = mixture("unit", n=3000, k=8, dtype=dtype, offset=offset)
    loc = y[:8].double()
    peer = KMeans(8, init=loc.to(dtype).numpy(), n_init=1, algorithm="lloyd", max_iter=12, tol=0.0)
    peer.fit(y.numpy())
    kernel, equal = MixtureKernel(y, covariance="unit", hard=True), torch.zeros_like(log_weights)
    for _ in range(peer.n_iter_):
        got = kernel(equal, loc)
        loc = loc + got.first / got.counts[:, None]
    np.testing.assert_allclose(loc, peer.cluster_centers_, rtol=1e-5, atol=1e-5)
    got = kernel(equal, loc)
    assert got.counts.tolist() == np.bincount(peer.labels_, minlength=8).tolist()
    np.testing.assert_allclose(got.second.sum(), peer.inertia_, rtol=1e-5)
    log_norm = -0.5 * len(y) * D * np.log(2 * np.pi)
    np.testing.assert_allclose(got.objective, log_norm - peer.inertia_ / 2, rtol=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("chunk", [None, 1, 1000])
def test_k_means_without_second_moments(dtype, tolerance, chunk):
    """The quick form: the same sums to the rounding of the data; several tiles and a rest."""
    y, log_weights, loc, scale = mixture("unit", n=2500, k=40, dtype=dtype, offset=1e3)
    log_weights[3] = -torch.inf
    kernel = MixtureKernel(y, covariance="unit", hard=True, chunk=chunk)
    got = kernel(log_weights, loc, scale, second=False)
    expected = kernel(log_weights, loc, scale)
    assert torch.equal(got.counts, expected.counts)
    assert got.second.isnan().all()
    for name in ("objective", "first"):
        ours, theirs = getattr(got, name), getattr(expected, name)
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * len(y))


def test_memory_beyond_the_data_is_that_of_a_chunk():
    """What is allocated during a call is the same for four times the data."""
    peaks = []
    for n in (20_000, 80_000):
        y, *at = mixture("full", n=n, dtype=torch.float32)
        kernel = MixtureKernel(y, covariance="full", chunk=500)
        with torch.profiler.profile(profile_memory=True) as profile:
            kernel(*at)
        held, peak = 0, 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        peaks.append(peak)
    assert peaks[1] < 1.2 * peaks[0] < 2**21


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"covariance": "banded"}, "choose one of full"),
        ({"covariance": "full", "chunk": 0}, "at least 1"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(ProgramError, match=message):
        MixtureKernel(torch.randn(5, 2), **options)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.randn(5), r"shape \(N, D\)"),
        (torch.ones(5, 2, dtype=torch.int64), "float32 or float64"),
        (torch.ones(5, 2, dtype=torch.float16), "float32 or float64"),
        (torch.full((5, 2), torch.nan), "finite"),
        (torch.randn(0, 2), r"shape \(N, D\)"),
    ],
)
def test_data_that_cannot_be_used(y, message):
    with pytest.raises(ProgramError, match=message):
        MixtureKernel(y, covariance="full")


def test_parameters_that_do_not_fit():
    y, log_weights, loc, scale = mixture("diag")
    kernel = MixtureKernel(y, covariance="diag")
    for arguments in [(log_weights, loc), (log_weights, loc, scale[0]), (loc, loc, scale)]:
        with pytest.raises(ProgramError, match=r"scale \(K, D\)"):
            kernel(*arguments)


@pytest.mark.parametrize("covariance", ["diag", "full"])
def test_narrow_components_are_told_apart(covariance):
    """Second moments about the mean of the data cannot tell these widths: EM sums residuals."""
    import lvppl

    width = 1e-8
    noise = torch.randn(2, 200, 2, dtype=torch.float64)
    y = torch.cat([width * noise[0], 1 + width * noise[1]])
    model = lvppl.models.GaussianMixture(2, 2, covariance=covariance).double()
    model.loc = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).double()
    start = torch.full((2, 2), 2 * width, dtype=torch.float64)
    if covariance == "diag":
        model.scale = start
    else:
        model.scale_tril = torch.diag_embed(start)
    fit = lvppl.EM(model, floor=0.0).fit(y, max_iter=1, seed=0, progress=False)
    want = torch.stack([part.var(0, correction=0) for part in y.split(200)])
    if covariance == "full":
        tril = next(v for n, v in fit.params.items() if n.endswith("scale_tril"))
        found = (tril @ tril.mT).diagonal(dim1=1, dim2=2)
    else:
        found = next(v for n, v in fit.params.items() if n.endswith("scale")).square()
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)


def test_sums_by_label_hold_far_from_the_origin():
    loc, far = torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=torch.float64), 2.0**27
    y = (
        torch.randn(20_000, 2, dtype=torch.float64) * 2**20
    ).round() / 2**20  # exact at both places
    near = MixtureKernel(y, covariance="unit", hard=True)(torch.zeros(2), loc, second=False)
    there = MixtureKernel(y + far, covariance="unit", hard=True)
    found = there(torch.zeros(2), loc + far, second=False)
    assert torch.equal(found.counts, near.counts)
    torch.testing.assert_close(found.objective, near.objective, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.first, near.first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("covariance", ["diag", "unit"])
def test_a_component_that_is_nan_is_not_passed_over(covariance):
    y = torch.randn(300, 2, dtype=torch.float64)
    loc = torch.tensor([[0.0, 0.0], [torch.nan, 0.0], [1.0, 1.0]], dtype=torch.float64)
    scale = torch.ones(3, 2, dtype=torch.float64) if covariance == "diag" else None
    kernel = MixtureKernel(y, covariance=covariance, hard=True)
    assert kernel(torch.zeros(3), loc, scale, second=False).objective.isnan()

"""The claims of docs/errata.md, checked with NumPy and torch alone: lvppl itself is not asked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "errata.md").read_text(encoding="utf-8")

LN2, LN4 = math.log(2), math.log(4)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_distribution(generator: torch.Generator, *shape: int) -> Tensor:
    logits = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return (2 * logits).softmax(-1)


def maximise(value: Callable[[Tensor], Tensor], start: Tensor) -> tuple[Tensor, float]:
    """Where a smooth function is largest, and how large: by L-BFGS, knowing nothing else of it."""
    x = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -value(x)
        loss.backward()
        return loss

    optimizer.step(closure)
    return x.detach(), float(value(x).detach())


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p, q) of discrete distributions, nats; 0 ln 0 = 0."""
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, q)).sum(-1)


def normal_log_prob(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """ln N(x; mean, covariance), written out: x (..., D)."""
    u = x - mean
    quadratic = (u @ torch.linalg.inv(covariance) * u).sum(-1)
    return -0.5 * (quadratic + torch.logdet(covariance) + x.shape[-1] * math.log(2 * math.pi))


# 1. The Gaussian density


def grid_integral(sign: float, half_width: float) -> float:
    """The integral of the 2-dimensional density with either sign in the exponent, over a square."""
    mean, covariance = tensor([0.3, -0.2]), tensor([[0.8, 0.3], [0.3, 0.5]])
    line = torch.linspace(-half_width, half_width, 801, dtype=torch.float64)
    x = torch.cartesian_prod(line, line) + mean
    u = x - mean
    quadratic = (u @ torch.linalg.inv(covariance) * u).sum(-1)
    norm = 2 * math.pi * torch.linalg.det(covariance).sqrt()
    return float((sign * 0.5 * quadratic).exp().sum() / norm * (line[1] - line[0]) ** 2)


def test_1_a_gaussian_integrates_to_one_only_with_the_minus() -> None:
    assert grid_integral(-1, 8) == pytest.approx(1, abs=1e-9)
    wrong = [grid_integral(+1, width) for width in (1, 2, 4)]
    assert wrong[1] > 5 * wrong[0]
    assert wrong[2] > 1000 * wrong[1]


def test_1_a_learned_deviation_settles_at_the_root_mean_squared_error() -> None:
    errors = tensor([0.3, -1.2, 0.7, 2.0])
    log_sigma, _ = maximise(
        lambda s: (-0.5 * errors**2 / (2 * s).exp() - s - 0.5 * math.log(2 * math.pi)).sum(),
        tensor(0.0),
    )
    assert float(log_sigma.exp()) == pytest.approx(float((errors**2).mean().sqrt()), abs=1e-6)


# 2. The entropy


def test_2_entropy_is_not_negative_and_is_largest_for_the_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    q = random_distribution(generator, 500, 6)
    entropy = -(q * q.log()).sum(-1)
    assert (entropy >= 0).all()
    assert (entropy <= math.log(6)).all()
    uniform = torch.full((6,), 1 / 6, dtype=torch.float64)
    assert float(-(uniform * uniform.log()).sum()) == pytest.approx(math.log(6))


def test_2_only_with_the_minus_is_the_posterior_the_best_guide() -> None:
    log_joint = tensor([-1.0, -2.5, -1.7, -4.0])
    evidence = float(log_joint.logsumexp(0))

    def bound(sign: float) -> Callable[[Tensor], Tensor]:
        def value(logits: Tensor) -> Tensor:
            log_q = logits.log_softmax(0)
            return (log_q.exp() * (log_joint + sign * log_q)).sum()

        return value

    logits, best = maximise(bound(-1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(logits.softmax(0), log_joint.softmax(0), rtol=0, atol=1e-6)
    assert best == pytest.approx(evidence, abs=1e-12)
    # Turned around it is convex in q, so at least one corner beats any mixture of the corners.
    q = random_distribution(torch.Generator().manual_seed(0), 1000, 4)
    turned = (q * (log_joint + q.log())).sum(-1)
    corners = log_joint  # E ln p(z, y) + ln 1
    assert (turned <= (q * corners).sum(-1)).all()
    assert corners.max() < evidence


def test_2_a_differential_entropy_may_be_negative() -> None:
    threshold = (2 * math.pi * math.e) ** -0.5
    assert threshold == pytest.approx(0.242, abs=5e-4)
    for sigma, negative in [(0.99 * threshold, True), (1.01 * threshold, False)]:
        x = torch.linspace(-10 * sigma, 10 * sigma, 20_001, dtype=torch.float64)
        log_q = -0.5 * (x / sigma) ** 2 - math.log(sigma) - 0.5 * math.log(2 * math.pi)
        entropy = float(-torch.trapezoid(log_q.exp() * log_q, x))
        assert entropy == pytest.approx(0.5 * math.log(2 * math.pi * math.e * sigma**2), abs=1e-9)
        assert (entropy < 0) is negative


# 3. Code lengths and distortions


def best_variance(rate_weight: float, distortion_weight: float) -> float:
    """Of q = N(m, v) for z ~ N(0, 1), y ~ N(z, 0.5), y = 1: by direct optimisation."""
    y, noise = 1.0, 0.5

    def value(parameters: Tensor) -> Tensor:
        m, log_v = parameters
        rate = 0.5 * (log_v.exp() + m**2 - 1 - log_v)
        distortion = 0.5 * (((y - m) ** 2 + log_v.exp()) / noise + math.log(2 * math.pi * noise))
        return -(rate_weight * rate + distortion_weight * distortion)

    parameters, _ = maximise(value, tensor([0.0, 0.0]))
    return float(parameters[1].exp())


def test_3_bits_beside_nats_optimise_another_trade_off() -> None:
    posterior = 1 / (1 + 1 / 0.5)
    nats, bits = best_variance(1, 1), best_variance(1 / LN2, 1 / LN2)
    mixed = best_variance(1 / LN2, 1)
    assert nats == pytest.approx(posterior, abs=1e-6)
    assert bits == pytest.approx(posterior, abs=1e-6)
    assert mixed == pytest.approx(1 / (1 + LN2 / 0.5), abs=1e-6)  # lambda = ln 2 in nats
    assert mixed == pytest.approx(best_variance(1, LN2), abs=1e-6)
    assert abs(mixed - posterior) > 0.08
    assert pytest.approx(1.4427, abs=5e-5) == 1 / LN2


# 4. The M-step of a mixture


class Mixture:
    """A small mixture with full covariances, its data and its responsibilities."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(60, 2, generator=generator, dtype=torch.float64)
        centres = tensor([[3.0, 1.0], [5.0, -2.0]])
        self.y = noise + centres[torch.randint(2, (60,), generator=generator)]
        self.weights = tensor([0.4, 0.6])
        self.means = tensor([[2.0, 1.0], [6.0, 0.0]])
        self.covariances = torch.eye(2, dtype=torch.float64).expand(2, 2, 2).clone()

    def log_joint(self) -> Tensor:
        """ln pi_k N(y_n; mu_k, Sigma_k), (data, components)."""
        parts = zip(self.means, self.covariances, strict=True)
        density = torch.stack([normal_log_prob(self.y, m, c) for m, c in parts], dim=-1)
        return density + self.weights.log()

    def evidence(self) -> float:
        return float(self.log_joint().logsumexp(-1).sum())

    def responsibilities(self) -> Tensor:
        return self.log_joint().softmax(-1)

    def m_step(self, r: Tensor, *, printed: bool = False) -> None:
        total = torch.full((2,), float(len(self.y)), dtype=torch.float64) if printed else r.sum(0)
        self.means = r.T @ self.y / total[:, None]
        centre = torch.zeros_like(self.means) if printed else self.means
        u = self.y[:, None] - centre  # (data, components, 2)
        self.covariances = torch.einsum("nk,nki,nkj->kij", r, u, u) / total[:, None, None]
        self.weights = r.sum(0) / len(self.y)

    def expected_log_likelihood(self, r: Tensor) -> float:
        return float((r * self.log_joint()).sum())


def test_4_the_m_step_is_where_the_expected_log_likelihood_is_largest() -> None:
    """Against L-BFGS over all parameters at once, which knows no formula."""
    mixture = Mixture()
    r = mixture.responsibilities()

    def value(parameters: Tensor) -> Tensor:
        weights, means, factors = parameters.split([2, 4, 8])
        means, factors = means.view(2, 2), factors.view(2, 2, 2)
        covariances = factors @ factors.mT + 1e-12 * torch.eye(2, dtype=torch.float64)
        parts = zip(means, covariances, strict=True)
        density = torch.stack([normal_log_prob(mixture.y, m, c) for m, c in parts], dim=-1)
        return (r * (density + weights.log_softmax(0))).sum()

    identity = torch.eye(2, dtype=torch.float64).flatten()
    start = torch.cat([tensor([0.0, 0.0]), mixture.means.flatten(), identity, identity])
    found, best = maximise(value, start)
    mixture.m_step(r)
    assert mixture.expected_log_likelihood(r) == pytest.approx(best, abs=1e-7)
    weights, means, factors = found.split([2, 4, 8])
    close = {"rtol": 0, "atol": 1e-4}
    torch.testing.assert_close(mixture.weights, weights.softmax(0), **close)
    torch.testing.assert_close(mixture.means, means.view(2, 2), **close)
    factors = factors.view(2, 2, 2)
    torch.testing.assert_close(mixture.covariances, factors @ factors.mT, **close)


def test_4_the_printed_m_step_is_worse_and_lets_the_evidence_fall() -> None:
    right, wrong = Mixture(), Mixture()
    for mixture in (right, wrong):
        for _ in range(10):
            mixture.m_step(mixture.responsibilities())
    r, before = right.responsibilities(), right.evidence()
    right.m_step(r)
    wrong.m_step(r, printed=True)
    assert right.expected_log_likelihood(r) > wrong.expected_log_likelihood(r) + 10
    assert right.evidence() >= before > wrong.evidence() + 10


def test_4_the_right_m_step_never_lets_the_evidence_fall() -> None:
    mixture = Mixture(seed=1)
    values = [mixture.evidence()]
    for _ in range(50):
        mixture.m_step(mixture.responsibilities())
        values.append(mixture.evidence())
    steps = tensor(values).diff()
    assert (steps >= -1e-10).all()
    assert values[-1] > values[0] + 10


def test_4_where_all_data_are_one_point_so_is_the_mean() -> None:
    mixture = Mixture()
    point = tensor([2.0, -1.0])
    mixture.y = point.expand(60, 2)
    r = mixture.responsibilities()
    mixture.m_step(r)
    torch.testing.assert_close(mixture.means, point.expand(2, 2))
    torch.testing.assert_close(mixture.covariances, torch.zeros(2, 2, 2, dtype=torch.float64))
    mixture.m_step(r, printed=True)
    torch.testing.assert_close(mixture.means, mixture.weights[:, None] * point)
    outer = mixture.weights[:, None, None] * torch.outer(point, point)
    torch.testing.assert_close(mixture.covariances, outer)


# 5. The hard ELBO


def test_5_hard_elbo_plus_entropy_is_the_elbo_and_a_bound_for_discrete_latents() -> None:
    generator = torch.Generator().manual_seed(0)
    log_joint = torch.randn(5, generator=generator, dtype=torch.float64) - 2
    evidence = log_joint.logsumexp(0)
    q = random_distribution(generator, 1000, 5)
    hard = (q * log_joint).sum(-1)
    elbo = (q * (log_joint - q.log())).sum(-1)
    torch.testing.assert_close(hard - (q * q.log()).sum(-1), elbo)
    torch.testing.assert_close(evidence - kl(q, log_joint.softmax(0)), elbo)
    assert (hard <= elbo).all()
    assert (elbo <= evidence).all()
    # It is maximised, at a point; its minimum is the least likely state, where nobody wants to be.
    _, best = maximise(
        lambda logits: (logits.softmax(0) * log_joint).sum(), torch.zeros(5, dtype=torch.float64)
    )
    assert best == pytest.approx(float(log_joint.max()), abs=1e-6)
    assert log_joint.max() <= evidence


def test_5_for_continuous_latents_it_may_lie_above_the_evidence_and_moves_with_the_unit() -> None:
    """z ~ N(0, s^2), y = z + N(0, 0.1^2), y = 0: the posterior is narrow, its density above one."""

    def at_the_mode(scale: float) -> tuple[float, float]:
        # z is measured in other units, z -> scale z; y is what it was.
        prior, noise = tensor([[scale**2]]), tensor([[0.01]])
        zero = tensor([0.0])
        joint = normal_log_prob(zero, zero, prior) + normal_log_prob(zero, zero, noise)
        evidence = normal_log_prob(zero, zero, prior / scale**2 + noise)
        return float(joint), float(evidence)

    hard, evidence = at_the_mode(1.0)
    assert hard > evidence + 1
    other, same = at_the_mode(100.0)
    assert same == evidence
    assert other == pytest.approx(hard - math.log(100.0))
    assert other < evidence


# 6. The bound of a variational autoencoder


def test_6_the_elbo_and_the_dropped_divergence_make_the_evidence() -> None:
    """z ~ N(0, 1), x ~ N(2 z + 0.5, 0.6^2), x = 1.3, for several guides: by quadrature."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)

    def log_normal(x: Tensor | float, mean: Tensor | float, sd: float) -> Tensor:
        return -0.5 * ((x - mean) / sd) ** 2 - math.log(sd * math.sqrt(2 * math.pi))

    def integral(f: Tensor) -> float:
        return float(torch.trapezoid(f, z))

    log_prior, log_likelihood = log_normal(z, 0.0, 1.0), log_normal(1.3, 2 * z + 0.5, 0.6)
    evidence = math.log(integral((log_prior + log_likelihood).exp()))
    exact = -0.5 * (0.8**2 / 4.36 + math.log(2 * math.pi * 4.36))  # variance 2^2 + 0.6^2
    assert evidence == pytest.approx(exact, abs=1e-10)
    log_posterior = log_prior + log_likelihood - evidence
    mean, sd = 2 * 0.8 / 4.36, 0.6 / math.sqrt(4.36)
    for guide in [(0.0, 1.0), (0.5, 0.2), (-1.0, 0.7), (mean, sd)]:
        log_q = log_normal(z, *guide)
        q = log_q.exp()
        reconstruction = integral(q * log_likelihood)
        to_prior = integral(q * (log_q - log_prior))
        to_posterior = integral(q * (log_q - log_posterior))
        entropy = -integral(q * log_q)
        elbo = reconstruction - to_prior
        assert elbo + to_posterior == pytest.approx(evidence, abs=1e-9)
        assert integral(q * (log_prior + log_likelihood)) + entropy == pytest.approx(elbo, abs=1e-9)
        assert to_posterior >= -1e-12
        if guide == (mean, sd):
            assert elbo == pytest.approx(evidence, abs=1e-9)
            assert reconstruction + to_prior > evidence + 0.1  # the printed sign: no bound at all


# 7. The optimal value of a GAN


def jsd(p: Tensor, g: Tensor) -> Tensor:
    m = (p + g) / 2
    return (kl(p, m) + kl(g, m)) / 2


def gan_value(p: Tensor, g: Tensor) -> Callable[[Tensor], Tensor]:
    """V(D) with D = sigmoid(logits) for each of finitely many x."""

    def value(logits: Tensor) -> Tensor:
        log_d, log_not_d = torch.nn.functional.logsigmoid(torch.stack([logits, -logits]))
        return (p * log_d + g * log_not_d).sum()

    return value


def test_7_the_best_discriminators_value_by_direct_optimisation() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        p, g = random_distribution(generator, 2, 8)
        logits, best = maximise(gan_value(p, g), torch.zeros(8, dtype=torch.float64))
        divergence = float(jsd(p, g))
        assert divergence > 0.05  # far from where the printed forms would agree
        assert best == pytest.approx(-LN4 + 2 * divergence, abs=1e-9)
        torch.testing.assert_close(logits.sigmoid(), p / (p + g), rtol=0, atol=1e-4)


def test_7_the_two_ends_fix_the_factor_and_the_signs() -> None:
    p = tensor([0.2, 0.8, 0.0, 0.0])
    disjoint = tensor([0.0, 0.0, 0.5, 0.5])
    _, guess = maximise(gan_value(p, p), tensor([1.0, -1.0, 0.0, 0.0]))
    assert guess == pytest.approx(-LN4, abs=1e-12)
    assert float(jsd(p, disjoint)) == pytest.approx(LN2)
    certain = float(gan_value(p, disjoint)(tensor([60.0, 60.0, -60.0, -60.0])))
    assert certain == pytest.approx(0, abs=1e-12)
    assert -LN4 + 2 * float(jsd(p, disjoint)) == pytest.approx(0, abs=1e-12)


# 8. The gradient penalty of a critic


def critic_value(sign: float, strength: float, shift: Tensor) -> Callable[[Tensor], Tensor]:
    """E_p f - E_g f + sign * strength * (|grad f| - 1)^2 for f(x) = a x, means apart by shift."""

    def value(a: Tensor) -> Tensor:
        x = torch.zeros_like(shift, requires_grad=True)
        (slope,) = torch.autograd.grad(a @ x, x, create_graph=True)
        return a @ shift + sign * strength * (slope.norm() - 1) ** 2

    return value


@pytest.mark.parametrize("strength", [1.0, 10.0])
def test_8_a_maximising_critic_subtracts_its_penalty(strength: float) -> None:
    shift = tensor([1.5, -2.0])
    distance = float(shift.norm())
    a, best = maximise(critic_value(-1, strength, shift), tensor([0.3, 0.1]))
    slope = 1 + distance / (2 * strength)
    torch.testing.assert_close(a, slope * shift / distance, rtol=0, atol=1e-6)
    assert best == pytest.approx(distance + distance**2 / (4 * strength), abs=1e-9)
    wrong = critic_value(+1, strength, shift)
    values = [float(wrong(size * shift / distance)) for size in (10.0, 100.0, 1000.0)]
    assert values[1] > 50 * values[0]
    assert values[2] > 50 * values[1]


# The page itself


def test_the_files_that_the_page_names_are_there() -> None:
    paragraphs = PAGE.split("\n\n")
    for paragraph in paragraphs:
        for name in re.findall(r"`((?:lvppl|models|guides|tests)/[\w/.]*)`", paragraph):
            planned = "planned" in paragraph
            assert planned or (ROOT / name).exists(), f"docs/errata.md names {name}, not there"


def test_every_entry_has_its_parts_and_its_check() -> None:
    entries = re.split(r"^## ", PAGE, flags=re.M)[1:]
    assert [entry.split(".")[0] for entry in entries] == [str(i) for i in range(1, 9)]
    source = Path(__file__).read_text(encoding="utf-8")
    for number, entry in enumerate(entries, start=1):
        for part in ("**As printed.**", "**Right.**", "**Why.**", "**lvppl"):
            assert part in entry, f"entry {number} has no {part}"
        assert f"def test_{number}_" in source

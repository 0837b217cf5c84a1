"""What the preflight says of a program: its sites, its assumptions, and P(y)."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import lvppl

CATEGORICAL = {"enumerate": "parallel"}


def normal_model(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def normal_guide(y):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(0.8 * y, 0.4))


def mixture(y, weights=(0.3, 0.3, 0.4)):
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Categorical(torch.tensor(weights)), infer=CATEGORICAL)
        pyro.sample("y", dist.Normal(torch.arange(3.0)[k], 1.0), obs=y)


def empty_guide(y):
    pass


def test_the_table_says_what_each_site_is():
    report = lvppl.check(normal_model, normal_guide, torch.randn(5))
    latent, observed = report["z"], report["y"]
    assert (latent.role, latent.distribution, latent.shape) == ("latent", "Normal", "5 | ·")
    assert latent.plates == ("data",) and latent.in_guide and latent.reparameterised
    assert observed.role == "observed" and observed.in_guide is None
    assert report.samplable and report.computable and report.data_plates == ("data",)
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "site", "role", "distribution", "shape", "plates", "in", "guide", "reparam.", "samplable",
        "computable",
    ]  # fmt: skip
    assert max(map(len, lines[:4])) <= 100


def test_enumerated_auxiliary_and_score_function_sites_are_told_apart():
    def model(y):
        with pyro.plate("data", len(y)):
            a = pyro.sample("a", dist.Bernoulli(0.5))
            pyro.sample("y", dist.Normal(a, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("a", dist.Bernoulli(0.4))

    y = torch.randn(4)
    assert lvppl.check(model, guide, y)["a"].reparameterised is False
    assert lvppl.check(mixture, empty_guide, y)["k"].role == "enumerated"
    assert lvppl.check(mixture, empty_guide, y)["k"].in_guide is False
    auto = pyro.infer.autoguide.AutoNormal(normal_model)
    assert lvppl.check(normal_model, auto, y)["z_unconstrained"].role == "auxiliary"


# --------------------------------------------------------------------------------- verdict on P(y)


def test_a_finite_sum_counts_its_terms_after_elimination():
    verdict = lvppl.check(mixture, None, torch.randn(5)).evidence
    assert verdict.kind == "exact" and verdict.num_terms == 15  # 5 data x 3 components
    assert "243 joint states" in verdict.sentence


def test_a_chain_costs_the_sum_of_its_pairs_not_the_product_of_its_states():
    def chain(y):
        z = torch.tensor(0)
        for t in pyro.markov(range(6)):
            z = pyro.sample(f"z{t}", dist.Categorical(torch.ones(3, 3)[z]))
            pyro.sample(f"y{t}", dist.Normal(z.float(), 1.0), obs=y[t])

    verdict = lvppl.check(chain, None, torch.randn(6)).evidence
    # from either end: one state of 3, and five pairs of 9
    assert verdict.kind == "exact" and verdict.num_terms == 5 * 9 + 3
    assert f"{3**6} joint states" in verdict.sentence


@pytest.mark.parametrize(
    ("mean", "scale", "exact"),
    [
        (lambda z: 2 * z - 1, lambda z: 0.5, True),
        (lambda z: z**2, lambda z: 0.5, False),
        (lambda z: z, lambda z: z.exp(), False),
    ],
)
def test_linear_gaussian_programs_are_recognised(mean, scale, exact):
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            u = pyro.sample("u", dist.Normal(z, 2.0))
            pyro.sample("y", dist.Normal(mean(u), scale(u)), obs=y)

    verdict = lvppl.check(model, None, torch.randn(5)).evidence
    assert verdict.kind == ("exact" if exact else "estimated")
    assert ("linear-Gaussian" in verdict.sentence) == exact


def test_no_latent_is_one_evaluation():
    def model(y):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    assert lvppl.check(model, None, torch.randn(5)).evidence.kind == "exact"


# --------------------------------------------------------------------------- standing assumptions


def test_a_factor_is_not_samplable_and_says_so():
    def potts(y):
        a, b = (pyro.sample(name, dist.Bernoulli(0.5)) for name in "ab")
        pyro.factor("coupling", a * b)
        pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    report = lvppl.check(potts, None, torch.tensor(0.3))
    assert not report.samplable and report.computable
    with pytest.raises(lvppl.ProgramError, match=r"needs samples.*'coupling'.*loopy"):
        report.require(samplable=True)


def test_a_deterministic_continuous_observation_has_no_density():
    def gan(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Delta(2 * z), obs=y)

    report = lvppl.check(gan, None, torch.randn(5))
    assert report.samplable and not report.computable
    assert report.evidence.kind == "not computable"
    with pytest.raises(lvppl.ProgramError, match=r"needs the densities.*GAN"):
        report.require(computable=True)


def test_a_deterministic_discrete_observation_is_computable():
    """y = a + b is 0 or −∞ in log-probability: P(y = 1) = 1/2 exactly."""

    def model(y):
        a = pyro.sample("a", dist.Bernoulli(0.5), infer=CATEGORICAL)
        b = pyro.sample("b", dist.Bernoulli(0.5), infer=CATEGORICAL)
        pyro.sample("y", dist.Delta((a + b).long()), obs=y)

    y = torch.tensor(1)
    report = lvppl.check(model, None, y)
    assert report.computable and report.evidence.kind == "exact"
    evidence = lvppl.trace_terms(model, None, (y,)).log_weight
    assert evidence.exp().item() == pytest.approx(0.5)


def test_checking_changes_nothing():
    y = torch.randn(5)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    lvppl.check(normal_model, normal_guide, y)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_number_of_states_is_never_written_out():
    """3^10,000 joint states, but 30,000 terms."""
    verdict = lvppl.check(mixture, None, torch.randn(10_000)).evidence
    assert verdict.num_terms == 30_000 and "about 10^4,771 joint states" in verdict.sentence


def test_a_sum_that_would_fill_the_memory_is_not_tried():
    def model(y):
        bits = [pyro.sample(f"b{i}", dist.Bernoulli(torch.tensor(0.5))) for i in range(30)]
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(sum(bits), 1.0), obs=y)

    verdict = lvppl.check(model, None, torch.randn(64)).evidence
    assert verdict.kind == "estimated" and "about 10^9 joint states" in verdict.sentence
    assert "10,000,000 elements" in verdict.sentence


def test_a_prior_without_a_sampler_is_fine_with_a_guide():
    def model(y):
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    report = lvppl.check(model, guide, torch.randn(4))
    assert not report["z"].samplable and report["z"].computable
    assert "has a density but no sampler" in report["z"].reason


def test_a_masked_latent_is_drawn_from_its_prior_all_the_same():
    """A mask takes ln p(z) out of a score, and leaves z its law: p(y) is what draws average to."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).mask(False))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    y = torch.randn(4)
    assert lvppl.check(model, None, y).evidence.kind == "exact"
    exact = lvppl.log_evidence(model, y).per_datum
    torch.testing.assert_close(exact, dist.Normal(0.0, 2**0.5).log_prob(y))
    drawn = lvppl.log_likelihood(model, y, estimator="prior", num_samples=20000, seed=0)
    assert ((drawn.log_prob - exact).abs() < 5 * drawn.std_error).all()


def test_a_vector_of_bits_has_a_sum_over_its_joint_states():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((8,), 0.4)).to_event(1))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    verdict = lvppl.check(model, None, torch.randn(4)).evidence
    assert verdict.kind == "exact" and "256 joint states of each datum" in verdict.sentence

"""Topic models: exact evidence by brute force over all assignments, and by Pyro's enumeration."""

import itertools
import math
from functools import partial

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch.distributions import Dirichlet

from lvppl.models import LatentDirichletAllocation, ProbabilisticLSA, words_from_counts
from tests.pyro_sums import assert_sums_to, pyro_evidence

K, V = 3, 5
LENGTHS = torch.tensor([4, 2, 3])


def _words():
    return torch.randint(V, (3, 4))


def _parameters(documents=3):
    θ = Dirichlet(torch.ones(K).double()).sample((documents,))
    φ = Dirichlet(torch.ones(V).double()).sample((K,))
    return θ, φ


def _brute_force(θ, φ, words, lengths):
    """ln p(w_d), the sum over all K^n assignments of the words of a document."""
    log_p = []
    for d, row in enumerate(words.tolist()):
        total = 0.0
        for z in itertools.product(range(K), repeat=int(lengths[d])):
            total += math.prod(
                θ[d, k].item() * φ[k, w].item() for k, w in zip(z, row, strict=False)
            )
        log_p.append(math.log(total))
    return torch.tensor(log_p, dtype=torch.float64)


def _lsa():
    θ, φ = _parameters()
    model = ProbabilisticLSA(K, V, 3).double()
    model.proportions, model.topics = θ, φ
    return model, θ, φ


@pytest.mark.parametrize("lengths", [LENGTHS, None])
def test_lsa_evidence_by_brute_force(lengths):
    model, θ, φ = _lsa()
    words = _words()
    want = _brute_force(θ, φ, words, torch.full((3,), 4) if lengths is None else lengths)
    got = model.log_evidence(words, lengths).detach()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-8)


@pytest.mark.parametrize("particles", [None, 2])
@pytest.mark.parametrize("lengths", [LENGTHS, None])
def test_lsa_enumerates_to_the_evidence(lengths, particles):
    model, *_ = _lsa()
    words = _words()
    evidence = model.log_evidence(words, lengths)
    assert_sums_to(evidence, model, words, lengths, nesting=2, particles=particles)


def test_lda_enumerates_to_prior_and_likelihood():
    """At given φ and θ: ln Dir(φ; β) + Σ_d [ln Dir(θ_d; α) + ln p(w_d | θ_d, φ)]."""
    options = {"document_concentration": 0.7, "topic_concentration": 1.3}
    model = LatentDirichletAllocation(K, V, **options).double()
    (θ, φ), words = _parameters(), _words()
    fixed = poutine.condition(model, {"topics": φ, "proportions": θ.unsqueeze(1)})
    elbo = TraceEnum_ELBO(max_plate_nesting=2)
    got = -elbo.loss(fixed, lambda words, lengths: None, words, LENGTHS)
    prior = Dirichlet(torch.full((V,), 1.3).double()).log_prob(φ).sum()
    prior = prior + Dirichlet(torch.full((K,), 0.7).double()).log_prob(θ).sum()
    want = prior + _brute_force(θ, φ, words, LENGTHS).sum()
    assert got == pytest.approx(float(want), abs=1e-6)  # buffers were rounded to float32
    likelihood = model.log_likelihood(words, φ, θ, LENGTHS)
    want = _brute_force(θ, φ, words, LENGTHS)
    torch.testing.assert_close(likelihood, want, rtol=0, atol=1e-8)


def test_lda_under_particles_has_topics_of_its_own_in_each():
    model, words = LatentDirichletAllocation(K, V).double(), _words()
    with pyro.plate("particles", 4, dim=-3):
        together = poutine.trace(model).get_trace(words, LENGTHS)
    together.compute_log_prob()
    sites = ("topics", "proportions", "z", "w")
    φ, θ, z, _ = (together.nodes[site]["value"] for site in sites)
    assert φ.shape == (4, 1, 1, K, V) and θ.shape == (4, 3, 1, K) and z.shape == (4, 3, 4)
    for i in range(4):
        values = {"topics": φ[i, 0, 0], "proportions": θ[i], "z": z[i]}
        alone = poutine.trace(poutine.condition(model, values)).get_trace(words, LENGTHS)
        alone.compute_log_prob()
        for site in sites:
            want = alone.nodes[site]["log_prob"]
            got = together.nodes[site]["log_prob"][i].reshape(want.shape)
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_padding_has_no_influence():
    model, *_ = _lsa()
    words = _words()
    padding = torch.arange(4) >= LENGTHS[:, None]
    other = torch.where(padding, (words + 1) % V, words)
    assert not torch.equal(words, other)
    for value in (model.log_evidence, partial(pyro_evidence, model, nesting=2)):
        a, b = (value(data, LENGTHS) for data in (words, other))
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_counts_and_words_are_the_same_data():
    counts = torch.tensor([[2, 0, 1, 0, 3], [0, 1, 0, 0, 0]])
    words, lengths = words_from_counts(counts)
    assert words.tolist() == [[0, 0, 2, 4, 4, 4], [1, 0, 0, 0, 0, 0]] and lengths.tolist() == [6, 1]
    model = ProbabilisticLSA(K, V, 2).double()
    want = (counts * (model.proportions @ model.topics).log()).sum(-1)
    got = model.log_evidence(words, lengths)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_documents_can_be_drawn():
    """One topic for sure in each document: its words come from that topic alone."""
    model = ProbabilisticLSA(2, 4, 3).double()
    model.topics = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]).double()
    model.proportions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).double()
    drawn = poutine.uncondition(model)(torch.zeros(3, 50, dtype=torch.long))
    assert drawn.shape == (3, 50)
    assert ((drawn >= 2) == torch.tensor([[False], [True], [False]])).all()
    lda = LatentDirichletAllocation(K, V)
    drawn = poutine.uncondition(lda)(_words(), LENGTHS)
    assert drawn.shape == (3, 4) and int(drawn.max()) < V


def test_what_does_not_fit_is_refused():
    words = _words()
    with pytest.raises(ValueError, match=r"lengths must have shape \(3,\).*\(2,\)"):
        LatentDirichletAllocation(K, V)(words, LENGTHS[:2])
    with pytest.raises(ValueError, match="proportions for 2 documents, but 3 came"):
        ProbabilisticLSA(K, V, 2)(words)
    with pytest.raises(ValueError, match=r"topic_concentration must be positive, but is 0"):
        LatentDirichletAllocation(K, V, topic_concentration=0)

r"""Topic models: each word of a document has a topic of its own, which is summed out exactly.

.. math::

    z_{dn} ∼ \operatorname{Categorical}(θ_d), \qquad
    w_{dn} | z_{dn} = k ∼ \operatorname{Categorical}(φ_k)

Data are words, (documents, words): numbers 0 … V − 1, padded at the end of a document with any
word, and ``lengths`` given. :func:`words_from_counts` writes a table of counts so.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

__all__ = ["LatentDirichletAllocation", "ProbabilisticLSA", "words_from_counts"]


def words_from_counts(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Words, (documents, words), and lengths, (documents,), of a table of counts, (documents, V).

    The order of words within a document is that of the vocabulary: it plays no part in the model.
    """
    lengths = counts.sum(-1).long()
    vocabulary = torch.arange(counts.shape[-1], device=counts.device)
    words = [vocabulary.repeat_interleave(row) for row in counts.long()]
    return torch.nn.utils.rnn.pad_sequence(words, batch_first=True), lengths


def _words_of_topics(θ: Tensor, φ: Tensor, words: Tensor, lengths: Tensor | None) -> Tensor:
    """The line of the slide, inside the plate of the documents; θ is (…, documents, 1, K)."""
    with pyro.plate("words", words.shape[1], dim=-1), poutine.mask(mask=_exist(words, lengths)):
        z = pyro.sample("z", dist.Categorical(θ), infer={"enumerate": "parallel"})
        return pyro.sample("w", dist.Categorical(Vindex(φ)[..., z, :]), obs=words)


def _exist(words: Tensor, lengths: Tensor | None) -> Tensor:
    """Which words there are, (documents, words)."""
    if lengths is None:
        return torch.ones_like(words, dtype=torch.bool)
    if lengths.shape != words.shape[:1]:
        raise ValueError(
            f"lengths must have shape {tuple(words.shape[:1])}, as words has {tuple(words.shape)}, "
            f"but has shape {tuple(lengths.shape)}."
        )
    return torch.arange(words.shape[1], device=words.device) < lengths[:, None]


def _log_probability(θ: Tensor, φ: Tensor, words: Tensor, lengths: Tensor | None) -> Tensor:
    """Σ_n ln Σ_k θ_dk φ_k(w_dn), shape (documents,)."""
    log_p = (θ @ φ).log().gather(-1, words)
    return torch.where(_exist(words, lengths), log_p, torch.zeros_like(log_p)).sum(-1)


class LatentDirichletAllocation(PyroModule):
    r"""Latent Dirichlet allocation.

    .. math::

        φ_k ∼ \operatorname{Dirichlet}(β 1_V), \qquad θ_d ∼ \operatorname{Dirichlet}(α 1_K)

    and words as above. ``"topics"`` φ, (K, V), is global, ``"proportions"`` θ, (documents, 1, K),
    belongs to a document, and ``"z"`` to a word. With α and β above 1 both have a mode inside the
    simplex, as maximum a posteriori EM needs.

    :param num_topics: K.
    :param num_words: V, the size of the vocabulary.
    :param document_concentration: α > 0.
    :param topic_concentration: β > 0.
    :raises ValueError: for another α or β, or lengths that do not fit the words.

    Source: Blei, Ng, Jordan (2003), "Latent Dirichlet allocation".
    """

    def __init__(
        self,
        num_topics: int,
        num_words: int,
        *,
        document_concentration: float = 1.1,
        topic_concentration: float = 1.1,
    ) -> None:
        super().__init__("latent_dirichlet_allocation")
        for name, value in (
            ("document_concentration", document_concentration),
            ("topic_concentration", topic_concentration),
        ):
            if not value > 0:
                raise ValueError(f"{name} must be positive, but is {value!r}.")
        self.register_buffer("alpha", torch.full((num_topics,), float(document_concentration)))
        topics = torch.full((num_topics, num_words), float(topic_concentration))
        self.register_buffer("beta", topics)

    def forward(self, words: Tensor, lengths: Tensor | None = None) -> Tensor:
        φ = pyro.sample("topics", dist.Dirichlet(self.beta).to_event(1))
        with pyro.plate("data", len(words), dim=-2):
            θ = pyro.sample("proportions", dist.Dirichlet(self.alpha))
            return _words_of_topics(θ, φ, words, lengths)

    def log_likelihood(
        self, words: Tensor, topics: Tensor, proportions: Tensor, lengths: Tensor | None = None
    ) -> Tensor:
        """ln p(w_d | θ_d, φ), shape (documents,), in nats; θ is (documents, K), φ is (K, V)."""
        return _log_probability(proportions, topics, words, lengths)


class ProbabilisticLSA(PyroModule):
    """Probabilistic latent semantic analysis: the same without priors.

    The proportions θ, (documents, K), and the topics φ, (K, V), are parameters, so that the model
    knows the documents of the data only.

    :param num_topics: K.
    :param num_words: V, the size of the vocabulary.
    :param num_documents: of the data.
    :raises ValueError: for another number of documents, or lengths that do not fit the words.

    Source: Hofmann (1999), "Probabilistic latent semantic indexing".
    """

    def __init__(self, num_topics: int, num_words: int, num_documents: int) -> None:
        super().__init__("probabilistic_lsa")
        θ, φ = 1 + torch.rand(num_documents, num_topics), 1 + torch.rand(num_topics, num_words)
        self.proportions = PyroParam(θ / θ.sum(-1, keepdim=True), constraints.simplex)
        self.topics = PyroParam(φ / φ.sum(-1, keepdim=True), constraints.simplex)

    def forward(self, words: Tensor, lengths: Tensor | None = None) -> Tensor:
        self._check(words)
        with pyro.plate("data", len(words), dim=-2):
            return _words_of_topics(self.proportions.unsqueeze(1), self.topics, words, lengths)

    def log_evidence(self, words: Tensor, lengths: Tensor | None = None) -> Tensor:
        """ln p(w_d) = Σ_n ln Σ_k θ_dk φ_k(w_dn), shape (documents,), in nats."""
        self._check(words)
        return _log_probability(self.proportions, self.topics, words, lengths)

    def _check(self, words: Tensor) -> None:
        if len(words) != len(self.proportions):
            raise ValueError(
                f"This model has proportions for {len(self.proportions)} documents, but "
                f"{len(words)} came: it knows no others, nor some of them."
            )

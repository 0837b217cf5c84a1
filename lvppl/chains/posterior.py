"""What a posterior of a chain can be asked for, in whatever space it was found."""

from __future__ import annotations

from torch import Tensor

from lvppl.chains.arguments import Chain


class Posterior:
    """What both spaces find: ``log_evidence`` (B,), ``marginals`` (B, T, K), and more on demand."""

    chain: Chain
    log_evidence: Tensor
    marginals: Tensor

    def pairwise(self) -> Tensor:
        """p(z_t = i, z_{t+1} = j | y), (B, T−1, K, K)."""
        raise NotImplementedError

    def counts(self, weight: Tensor | None = None) -> Tensor:
        """The pairwise marginals times ``weight`` (B,), summed to the shape of the transition."""
        pairs = self.pairwise()
        return sum_pairs(
            pairs if weight is None else pairs * weight[:, None, None, None], self.chain
        )

    def log_filtered(self) -> Tensor:
        """ln p(z_t | y_1 … y_t) up to a constant for each t, (B, T, K)."""
        raise NotImplementedError


def sum_pairs(pairs: Tensor, chain: Chain) -> Tensor:
    """(B, T−1, K, K) summed over what the transition is shared by."""
    if chain.homogeneous:
        pairs = pairs.sum(1, keepdim=True)
    return pairs.sum(0, keepdim=True) if chain.transition.shape[0] == 1 else pairs

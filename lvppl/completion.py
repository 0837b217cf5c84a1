r"""What the missing elements of an event may have been, given its observed ones.

.. math:: p(y_m | y_o)

of one distribution, that is given the latents it depends on. A value is a whole event with the
observed elements in their places: draws, the mean and the variance (zero there) are of such values.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import Independent, MaskedDistribution, TorchDistribution
from torch import Tensor
from torch import distributions as td
from torch.distributions import constraints

from lvppl.distributions import Autoregressive, HiddenMarkov
from lvppl.errors import ProgramError
from lvppl.observed_part import GaussianPart, ObservedElements, completed, needs_draws

__all__ = ["completion"]


def completion(name: str, fn: Any, missing: Tensor, value: Tensor) -> Any:
    """p(y | y_o) of a site's distribution, as :func:`lvppl.observed_part.observed_part` left it.

    Args:
        name: of the site, for words.
        fn: its distribution.
        missing: true where an element is missing, of the shape of a value.
        value: what was observed, and anything elsewhere.

    Raises:
        ProgramError: p(y_m | y_o) is not known in a form that can be drawn from.
    """
    if isinstance(fn, td.Independent):
        base = completion(name, fn.base_dist, missing, value)
        return Independent(base, fn.reinterpreted_batch_ndims)
    if isinstance(fn, MaskedDistribution):
        # A mask leaves factors out of ln p(y), which the weights have seen to. What a missing
        # value may be is the distribution's to say, a user's mask or none: elements that are
        # hidden but not missing keep their values, and so inform the missing ones of their event.
        return completion(name, fn.base_dist, missing, value)
    if isinstance(fn, HiddenMarkov):
        raise ProgramError(
            f"the missing steps of site '{name}' depend on its states, which its HiddenMarkov sums "
            f'out. Draw the states by lvppl.posterior(model, y, missing="nan").sample(n), under '
            f"'{name}_states', and observations given them; or write the chain with pyro.markov."
        )
    if isinstance(fn, td.MixtureSameFamily) and fn.event_shape:
        return _Mixture(name, fn, missing, value)
    if isinstance(fn, GaussianPart):
        return _Gaussian(name, fn, missing, value)
    if isinstance(fn, ObservedElements | Autoregressive):
        return _Autoregression(name, fn, missing, value)
    return _Elements(name, fn, missing, value)


class _Completion(TorchDistribution):
    """p(y | y_o) for events whose missing elements do not depend on the observed ones."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(self, name: str, fn: Any, missing: Tensor, value: Tensor) -> None:
        dims = len(fn.event_shape)
        batch = torch.broadcast_shapes(fn.batch_shape, value.shape[: value.dim() - dims])
        self.name = name
        self.fn = fn if fn.batch_shape == batch else fn.expand(batch)
        self.missing, self.value = missing, value
        super().__init__(torch.Size(batch), fn.event_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Completion:
        fn = self.fn.expand(torch.Size(batch_shape))
        return type(self)(self.name, fn, self.missing, self.value)

    @constraints.dependent_property
    def support(self) -> Any:
        return self.fn.support

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self._held(self._sample(torch.Size(sample_shape)))

    @property
    def mean(self) -> Tensor:
        return self._held(self._mean())

    @property
    def variance(self) -> Tensor:
        variance = self._variance()
        return torch.where(self.missing, variance, torch.zeros_like(variance))

    def _held(self, free: Tensor) -> Tensor:
        return torch.where(self.missing, free, self.value.to(free))

    def _sample(self, sample_shape: torch.Size) -> Tensor:
        raise NotImplementedError

    def _mean(self) -> Tensor:
        raise NotImplementedError

    def _variance(self) -> Tensor:
        raise NotImplementedError


class _Elements(_Completion):
    """Independent of what was observed of the event."""

    def _sample(self, sample_shape: torch.Size) -> Tensor:
        drawn: Tensor = self.fn.sample(sample_shape)
        return drawn

    def _mean(self) -> Tensor:
        if isinstance(self.fn, td.Categorical):  # torch gives NaN; levels have no mean
            raise NotImplementedError
        mean: Tensor = self.fn.mean
        return mean

    def _variance(self) -> Tensor:
        if isinstance(self.fn, td.Categorical):
            raise NotImplementedError
        variance: Tensor = self.fn.variance
        return variance


class _Gaussian(_Completion):
    r"""The conditional Gaussian.

    .. math:: E[y_m | y_o] = μ_m + Σ_{mo} Σ_{oo}^{-1} (y_o - μ_o), \qquad
        Cov[y_m | y_o] = Σ_{mm} - Σ_{mo} Σ_{oo}^{-1} Σ_{om}.

    A draw x of the whole becomes one of it by the same step from x that leads from μ to the mean
    (Matheron's rule).
    """

    def _towards_observed(self, x: Tensor) -> Tensor:
        left = (self.value - x).masked_fill(self.missing, 0.0)
        step = torch.cholesky_solve(left.unsqueeze(-1), self._root)
        step = step.masked_fill(self.missing.unsqueeze(-1), 0.0)
        return x + (self.fn.whole.covariance_matrix @ step).squeeze(-1)

    @property
    def _root(self) -> Tensor:
        """Cholesky factor of Σ_oo beside a diagonal for what is missing."""
        return torch.linalg.cholesky(self.fn.part.covariance_matrix)

    def _sample(self, sample_shape: torch.Size) -> Tensor:
        return self._towards_observed(self.fn.whole.sample(sample_shape))

    def _mean(self) -> Tensor:
        return self._towards_observed(self.fn.whole.mean)

    def _variance(self) -> Tensor:
        whole = self.fn.whole.covariance_matrix
        across = whole.masked_fill(self.missing.unsqueeze(-1), 0.0)  # rows: observed elements
        explained = torch.linalg.solve_triangular(self._root, across, upper=False)
        return whole.diagonal(dim1=-2, dim2=-1) - explained.square().sum(-2)


class _Mixture(_Completion):
    r"""Each component's own completion, weighed by how well it explains what was observed.

    .. math:: p(y_m | y_o) = \sum_k r_k\, p_k(y_m | y_o), \qquad r_k ∝ π_k\, p_k(y_o)
    """

    def _parts(self) -> tuple[Tensor, Any]:
        """r, (…, K), and the components' completions, batch shape (…, K)."""
        dims = len(self.event_shape)
        value, missing = (t.unsqueeze(-1 - dims) for t in (self.value, self.missing))
        each = self.fn.component_distribution
        prior = self.fn.mixture_distribution.logits.log_softmax(-1)
        # of a wholly missing event nothing was observed: value holds a filler, which says nothing
        whole = self.missing.flatten(-dims).all(-1, keepdim=True)
        r = (prior + each.log_prob(value).masked_fill(whole, 0.0)).softmax(-1)
        return r, completion(self.name, each, missing, value)

    def _over(self, r: Tensor) -> Tensor:
        return r.reshape(r.shape + (1,) * len(self.event_shape))

    def _sample(self, sample_shape: torch.Size) -> Tensor:
        r, each = self._parts()
        dims = len(self.event_shape)
        drawn: Tensor = each.sample(sample_shape)
        which = td.Categorical(probs=r).sample(sample_shape)
        index = which.reshape(which.shape + (1,) * (1 + dims))
        index = index.expand(*which.shape, 1, *self.event_shape)
        return drawn.gather(-1 - dims, index).squeeze(-1 - dims)

    def _mean(self) -> Tensor:
        r, each = self._parts()
        return (self._over(r) * each.mean).sum(-1 - len(self.event_shape))

    def _variance(self) -> Tensor:
        r, each = self._parts()
        dim, weight, mean = -1 - len(self.event_shape), self._over(r), each.mean
        total = (weight * mean).sum(dim, keepdim=True)
        return (weight * (each.variance + (mean - total).square())).sum(dim)


class _Autoregression(_Completion):
    """Draws in the order; where the model has drawn them already, those."""

    def _sample(self, sample_shape: torch.Size) -> Tensor:
        if needs_draws(self.fn) is not None:
            return self.value.expand(sample_shape + self.batch_shape + self.event_shape)
        whole = self.fn.whole if isinstance(self.fn, ObservedElements) else self.fn
        missing = self.missing.expand(self.batch_shape + self.event_shape)
        return completed(whole, missing, self.value, sample_shape)

    def _mean(self) -> Tensor:
        if needs_draws(self.fn) is not None:
            return self.value.expand(self.batch_shape + self.event_shape)
        raise NotImplementedError

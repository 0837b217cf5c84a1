r"""Hidden Markov models: the path of the states is summed out exactly, in two spellings.

.. math::

    z_1 ∼ \operatorname{Categorical}(π), \qquad
    z_t | z_{t-1} ∼ \operatorname{Categorical}(A_{z_{t-1}}), \qquad
    y_t | z_t = k ∼ \text{component } k

:class:`HiddenMarkovLoop` writes this line by line and enumerates each state, a latent site of its
own, ``"z_0"`` and so on; :class:`HiddenMarkovModel` is one distribution over whole sequences, which
sums the path out at once, and is faster: the posterior of its path is that of ``"y_states"``. The
parameters and the evidence are the same:

>>> model = HiddenMarkovModel(GaussianComponents.from_data(y, 3, covariance="diag"))
>>> loop = HiddenMarkovLoop(model.emission)

Data are (sequences, steps, …). Sequences of unequal lengths are padded at their end, with any
number, and ``lengths`` given; steps that were not observed are ``False`` in ``mask``.

Source: Rabiner (1989), "A tutorial on hidden Markov models"; Bishop (2006), section 13.2.
"""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from lvppl.distributions import HiddenMarkov

from .components import Components

__all__ = ["HiddenMarkovLoop", "HiddenMarkovModel", "InputHiddenMarkovModel"]


class _HiddenMarkov(PyroModule):
    """Parameters π, (K,), A, (K, K) with rows that sum to one, and those of the emission."""

    def __init__(self, emission: Components, *, stickiness: float = 0.5) -> None:
        super().__init__("hidden_markov")
        if not 0 <= stickiness < 1:
            raise ValueError(f"stickiness must be in [0, 1), but is {stickiness!r}.")
        K, like = emission.num_components, next(iter(emission.parameters()))
        self.num_states, self.emission = K, emission
        uniform = like.new_full((K,), 1 / K)
        self.initial = PyroParam(uniform, constraints.simplex)
        A = (1 - stickiness) * uniform.expand(K, K) + stickiness * uniform.new_ones(K).diag()
        self.transition = PyroParam(A, constraints.simplex)

    def _check(self, y: Tensor, lengths: Tensor | None, mask: Tensor | None) -> None:
        event = tuple(self.emission.event_shape)
        if y.dim() != 2 + len(event) or tuple(y.shape[2:]) != event:
            raise ValueError(
                f"y must have shape (sequences, steps{''.join(f', {n}' for n in event)}), "
                f"but has shape {tuple(y.shape)}.{self._hint(tuple(y.shape), event)}"
            )
        for name, tensor, shape in (("lengths", lengths, y.shape[:1]), ("mask", mask, y.shape[:2])):
            if tensor is not None and not isinstance(tensor, Tensor):
                raise ValueError(
                    f"{name} must be a tensor, torch.as_tensor({name}), not {tensor!r}"
                )
            if tensor is not None and tensor.shape != shape:
                raise ValueError(
                    f"{name} must have shape {tuple(shape)}, as y has {tuple(y.shape)}, "
                    f"but has shape {tuple(tensor.shape)}."
                )

    @staticmethod
    def _hint(shape: tuple[int, ...], event: tuple[int, ...]) -> str:
        """What makes one sequence, or features of length one, of it."""
        if len(shape) == 1 + len(event) and shape[1:] == event:
            return " One sequence is y[None]."
        if event == (1,) and len(shape) == 1:
            return " One sequence of numbers is y[None, :, None]."
        if event == (1,) and len(shape) == 2:
            return " Sequences of numbers are y[:, :, None]."
        return ""

    def _distribution(
        self, y: Tensor, lengths: Tensor | None, mask: Tensor | None
    ) -> dist.TorchDistribution:
        self._check(y, lengths, mask)
        return HiddenMarkov(
            self.initial.log(),
            self.transition.log(),
            self.emission.component(...),
            num_steps=y.shape[1],
            lengths=lengths,
            mask=mask,
        )

    def log_evidence(
        self, y: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """ln p(y_n) of each sequence, shape (sequences,), in nats: the sum over all its paths."""
        return self._distribution(y, lengths, mask).log_prob(y)


class HiddenMarkovModel(_HiddenMarkov):
    """A hidden Markov model as one distribution over whole sequences: the path is summed out.

    Called as ``model(y, lengths=None, mask=None)`` for y of shape (sequences, steps, …). With
    ``posterior = lvppl.posterior(model, y)``, or that of a fit by :class:`lvppl.EM`,
    ``posterior.marginals("y_states")`` is p(z_t | y), (sequences, steps, K), and
    ``posterior.map().values["y_states"]`` Viterbi's path, (sequences, steps).

    :param emission: one component for each of the K states, such as
        ``GaussianComponents(K, D, covariance="diag")``.
    :param stickiness: at first A = (1 − s)/K + s I: the probability that a state is kept for sure.
    :raises ValueError: for shapes that do not fit each other.
    """

    def forward(
        self, y: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        with pyro.plate("data", len(y)):
            return pyro.sample("y", self._distribution(y, lengths, mask), obs=y)


class HiddenMarkovLoop(_HiddenMarkov):
    """The same, step by step: states ``"z_0"``, ``"z_1"``, … and observations ``"y_0"``, ….

    ``pyro.markov`` lets enumeration forget all but the last state, so that the sum over K^T paths
    costs T K². Arguments and parameters are those of :class:`HiddenMarkovModel`.
    """

    def forward(
        self, y: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        self._check(y, lengths, mask)
        exists, observed = _steps(y, lengths, mask)
        z, drawn = None, []
        with pyro.plate("data", len(y)):
            for t in pyro.markov(range(y.shape[1])):
                p = self.initial if z is None else self.transition[z]
                with poutine.mask(mask=exists[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Categorical(p), infer={"enumerate": "parallel"})
                with poutine.mask(mask=observed[:, t]):
                    y_t = pyro.sample(f"y_{t}", self.emission.component(z), obs=y[:, t])
                drawn.append(y_t)
        return torch.stack(drawn, -1 - len(self.emission.event_shape))


def _steps(y: Tensor, lengths: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which steps there are, and which of them were observed: both (sequences, steps)."""
    exists = y.new_ones(y.shape[:2], dtype=torch.bool)
    if lengths is not None:
        exists = torch.arange(y.shape[1], device=y.device) < lengths[:, None]
    return exists, exists if mask is None else exists & mask


class InputHiddenMarkovModel(_HiddenMarkov):
    r"""A hidden Markov model whose transitions are driven by an input.

    .. math::

        z_t | z_{t-1} = i, x_t ∼
        \operatorname{Categorical}(\operatorname{softmax}(x_t V_i + \ln A_i))

    Called as ``model(x, y, lengths=None, mask=None)``: it is a model of y given x. The first state
    is drawn from π, so that the first input plays no part. V = 0 at first.

    :param emission: one component for each of the K states.
    :param num_inputs: D_x, the dimension of x_t.
    :param stickiness: as in :class:`HiddenMarkovModel`.
    :raises ValueError: for shapes that do not fit each other.

    Source: Bengio, Frasconi (1995), "An input output HMM architecture".
    """

    def __init__(self, emission: Components, num_inputs: int, *, stickiness: float = 0.5) -> None:
        super().__init__(emission, stickiness=stickiness)
        self.num_inputs = num_inputs
        self.input_weight = PyroParam(torch.zeros_like(self.transition).repeat(num_inputs, 1, 1))

    def transition_logits(self, x: Tensor) -> Tensor:
        """ln P(z_t = j | z_{t−1} = i, x_t) for t = 2 … T, shape (sequences, steps − 1, K, K)."""
        logits = torch.einsum("ntd,dij->ntij", x[:, 1:], self.input_weight) + self.transition.log()
        return logits.log_softmax(-1)

    def _distribution_given(
        self, x: Tensor, y: Tensor, lengths: Tensor | None, mask: Tensor | None
    ) -> dist.TorchDistribution:
        self._check(y, lengths, mask)
        if x.shape != (*y.shape[:2], self.num_inputs):
            raise ValueError(
                f"x must have shape {(*y.shape[:2], self.num_inputs)}, as y has {tuple(y.shape)}, "
                f"but has shape {tuple(x.shape)}."
            )
        return HiddenMarkov(
            self.initial.log(),
            self.transition_logits(x),
            self.emission.component(...),
            num_steps=y.shape[1],
            lengths=lengths,
            mask=mask,
        )

    def forward(
        self, x: Tensor, y: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        with pyro.plate("data", len(y)):
            return pyro.sample("y", self._distribution_given(x, y, lengths, mask), obs=y)

    def log_evidence(
        self, x: Tensor, y: Tensor, lengths: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """ln p(y_n | x_n) of each sequence, shape (sequences,), in nats."""
        return self._distribution_given(x, y, lengths, mask).log_prob(y)

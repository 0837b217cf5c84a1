"""A hidden Markov model as one distribution over whole sequences."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import Categorical, TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, constraints

from lvppl.chains import ChainPosterior, chain_log_sum, forward_backward, sample_chain, viterbi
from lvppl.errors import ProgramError

__all__ = ["HiddenMarkov"]


class HiddenMarkov(TorchDistribution):
    r"""Observations of a Markov chain of K hidden states, which are summed out exactly.

    .. math::

        p(y) = \sum_{z_1 … z_T} π(z_1) \prod_{t=1}^{T-1} A_t(z_t, z_{t+1})
               \prod_{t=1}^T p(y_t | z_t)

    A draw is a whole sequence: the event shape is (T, \*obs_event). Where nothing says T it is
    (1, \*obs_event), and sequences of any length have a ``log_prob``.

    The first state emits. In :class:`pyro.distributions.DiscreteHMM` there is one more transition,
    from a state before the first; its distribution is this one's with initial logits
    ``logsumexp(initial[:, None] + transition, 0)``.

    :param initial_logits: ln π up to a constant, (\*batch, K).
    :param transition_logits: rows are the previous state, each up to a constant: (K, K) or
        (\*batch, K, K), with as many batch dimensions as ``initial_logits`` has, for the same at
        every step; otherwise (…, T−1, K, K), step by step: driven by an input, say.
    :param observation_dist: p(y_t | z_t), batch shape (K,) or (\*batch, K), with as many batch
        dimensions as ``initial_logits`` has, for the same at every step; otherwise (…, T, K).
        Mixtures, such as MixtureSameFamily, are allowed.
    :param num_steps: T, where no other argument says it: needed to draw.
    :param lengths: numbers of steps of sequences that are padded at their end, (\*batch,).
    :param mask: (\*batch, T), true where a step was observed; the others are summed out. Whatever
        number is stored in them, or beyond a length, has no influence on value or gradient.
    :raises ProgramError: for shapes that do not fit each other; with validation, for a row of
        logits that is −inf throughout.

    Source: Rabiner (1989), "A tutorial on hidden Markov models and selected applications in speech
    recognition"; Bengio, Frasconi (1995), "An input output HMM architecture".
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False
    has_enumerate_support = False

    def __init__(
        self,
        initial_logits: Tensor,
        transition_logits: Tensor,
        observation_dist: Distribution,
        *,
        num_steps: int | None = None,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        _require_states(initial_logits, transition_logits, observation_dist)
        n = initial_logits.dim() - 1
        driven = transition_logits.dim() > n + 2
        if not driven and transition_logits.dim() > 2:
            transition_logits = transition_logits.unsqueeze(-3)
        self.initial_logits = initial_logits.log_softmax(-1)
        self.transition_logits = transition_logits.log_softmax(-1)
        self.observation_dist, self.lengths = observation_dist, lengths
        self.step_mask = mask  # `mask` is a method of every Pyro distribution
        self._latest: tuple[Tensor, ChainPosterior] | None = None
        self.differs_by_step = len(observation_dist.batch_shape) > n + 1
        self.num_steps = self._common_steps(num_steps, driven)
        steps = 1 if self.num_steps is None else self.num_steps
        super().__init__(
            self._common_batch_shape(),
            torch.Size((steps, *observation_dist.event_shape)),
            validate_args=validate_args,
        )
        if self._validate_args:
            _require_possible(self.initial_logits, self.transition_logits)

    def _common_steps(self, num_steps: int | None, driven: bool) -> int | None:
        """T, if any argument says it."""
        said: dict[str, int | None] = {"num_steps": num_steps}
        if driven:
            said["transition_logits"] = self.transition_logits.shape[-3] + 1
        if self.differs_by_step:
            said["observation_dist"] = self.observation_dist.batch_shape[-2]
        if self.step_mask is not None:
            if self.step_mask.dtype != torch.bool or self.step_mask.dim() == 0:
                raise ProgramError(
                    "mask must be a boolean tensor (..., T), true where a step was observed, but "
                    f"is {self.step_mask.dtype} of shape {tuple(self.step_mask.shape)}."
                )
            said["mask"] = self.step_mask.shape[-1]
        known = {name: steps for name, steps in said.items() if steps is not None}
        if len(set(known.values())) > 1:
            raise ProgramError(
                "the arguments disagree on the number of steps: "
                + ", ".join(f"{name} has {steps}" for name, steps in known.items())
                + ". Transitions (and observation_dist) that differ by sequence, and not by step, "
                "need as many batch dimensions in initial_logits: expand those."
            )
        return next(iter(known.values()), None)

    def _common_batch_shape(self) -> torch.Size:
        shapes = {
            "initial_logits": self.initial_logits.shape[:-1],
            "transition_logits": self.transition_logits.shape[:-3],
            "observation_dist": self.observation_dist.batch_shape[
                : -2 if self.differs_by_step else -1
            ],
            "lengths": () if self.lengths is None else self.lengths.shape,
            "mask": () if self.step_mask is None else self.step_mask.shape[:-1],
        }
        try:
            return torch.Size(torch.broadcast_shapes(*shapes.values()))
        except RuntimeError as error:
            raise ProgramError(
                "batch shapes must broadcast, but are "
                + ", ".join(f"{tuple(shape)} of {name}" for name, shape in shapes.items())
                + "."
            ) from error

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> constraints.Constraint:
        return constraints.independent(self.observation_dist.support, 1)

    def expand(self, batch_shape: Any, _instance: Any = None) -> HiddenMarkov:
        new = self._get_checked_instance(HiddenMarkov, _instance)
        batch_shape = torch.Size(batch_shape)
        # one of the arguments is enough: the others broadcast
        new.initial_logits = self.initial_logits.expand(*batch_shape, -1)
        new.transition_logits = self.transition_logits
        new.observation_dist, new.lengths = self.observation_dist, self.lengths
        new.step_mask = self.step_mask
        new._latest = None
        new.differs_by_step, new.num_steps = self.differs_by_step, self.num_steps
        super(HiddenMarkov, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def with_steps(self, num_steps: int) -> HiddenMarkov:
        """The same chain over sequences of ``num_steps`` steps, which can be drawn.

        :raises ProgramError: the arguments say another number of steps.
        """
        if self.num_steps not in (None, num_steps):
            raise ProgramError(
                f"this HiddenMarkov has {self.num_steps} steps by its arguments, not {num_steps}."
            )
        new = self.expand(self.batch_shape)
        new.num_steps = num_steps
        new._event_shape = torch.Size((num_steps, *self.observation_dist.event_shape))
        return new

    def observing(
        self, observed: Tensor, observation_dist: Distribution | None = None
    ) -> HiddenMarkov:
        """The same chain of which only some steps were observed, and as ``mask`` says.

        :param observed: (…, T), true where a step was observed.
        :param observation_dist: p(y_t | z_t) of each step, batch shape (…, T, K), in place of the
            chain's own.
        """
        batch = torch.broadcast_shapes(self.batch_shape, observed.shape[:-1])
        new = self.expand(batch)
        new.step_mask = observed if self.step_mask is None else observed & self.step_mask
        new.num_steps = observed.shape[-1]
        if observation_dist is not None:
            new.observation_dist, new.differs_by_step = observation_dist, True
        new._event_shape = torch.Size((new.num_steps, *new.observation_dist.event_shape))
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """ln p(y), sample and batch shape, in nats."""
        if not torch.is_grad_enabled():
            return self.posterior(value).log_evidence
        return chain_log_sum(*self.log_factors(value), lengths=self.lengths)

    def posterior(self, value: Tensor) -> ChainPosterior:
        """Posterior of the states; see :class:`lvppl.chains.ChainPosterior`. No gradients.

        The latest answer is kept: EM asks for it after ``log_prob``, which finds it on the way.
        """
        if self._latest is None or self._latest[0] is not value:
            with torch.no_grad():
                found = forward_backward(*self.log_factors(value), lengths=self.lengths)
            self._latest = value, found
        return self._latest[1]

    def viterbi(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable states (…, T) and ln p(states, y); see :func:`lvppl.chains.viterbi`."""
        with torch.no_grad():
            return viterbi(*self.log_factors(value), lengths=self.lengths)

    def sample_states(
        self, value: Tensor, num_samples: int = 1, *, generator: torch.Generator | None = None
    ) -> Tensor:
        """Paths from p(z | y), (num_samples, …, T); see :func:`lvppl.chains.sample_chain`."""
        with torch.no_grad():
            return sample_chain(
                *self.log_factors(value),
                lengths=self.lengths,
                num_samples=num_samples,
                generator=generator,
            )

    def filter(self, value: Tensor) -> Categorical:
        """p(z_T | y_1 … y_T), batch shape as ``log_prob``: of the last step of each sequence."""
        marginals = self.posterior(value).marginals
        last = torch.as_tensor(marginals.shape[-2] if self.lengths is None else self.lengths) - 1
        last = last.to(marginals.device).expand(marginals.shape[:-2])[..., None, None]
        index = last.expand(*last.shape[:-1], marginals.shape[-1])
        return Categorical(probs=marginals.gather(-2, index).squeeze(-2))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Sequences of T steps; beyond a sequence's length they are zero."""
        if self.num_steps is None:
            raise ProgramError(
                "HiddenMarkov does not know how many steps to draw, as no argument says it: write "
                "HiddenMarkov(..., num_steps=y.shape[1]) for data (sequences, steps, ...), or call "
                ".with_steps(T)."
            )
        sample_shape, T, K = torch.Size(sample_shape), self.num_steps, self._num_states
        flat = self.initial_logits.new_zeros(*self.batch_shape, T, K)
        z = sample_chain(
            self.initial_logits,
            self.transition_logits,
            flat,
            lengths=self.lengths,
            num_samples=sample_shape.numel(),
        ).reshape(*sample_shape, *self.batch_shape, T)
        y = self._draw_of_each_state(sample_shape)
        event = self.observation_dist.event_shape
        index = z.reshape(*z.shape, *(1,) * (1 + len(event))).expand(*z.shape, 1, *event)
        y = y.gather(z.dim(), index).squeeze(z.dim())
        if self.lengths is None:
            return y
        exists = torch.arange(T, device=y.device) < self.lengths.to(y.device)[..., None]
        return torch.where(_at_right(exists, len(event)), y, torch.zeros_like(y))

    def _draw_of_each_state(self, sample_shape: torch.Size) -> Tensor:
        """(\\*sample, \\*batch, T, K, \\*event)."""
        T, K, base = self.event_shape[0], self._num_states, self.observation_dist
        if self.differs_by_step:
            return base.expand(torch.Size((*self.batch_shape, T, K))).sample(sample_shape)
        drawn = base.expand(torch.Size((*self.batch_shape, K))).sample((T, *sample_shape))
        return drawn.movedim(0, -2 - len(base.event_shape))

    @property
    def _num_states(self) -> int:
        return self.initial_logits.shape[-1]

    def log_factors(self, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The log-factors of the chain that ``value`` makes, as :mod:`lvppl.chains` takes them."""
        base, event_dim = self.observation_dist, len(self.observation_dist.event_shape)
        value, observed = self.observations(value)
        value = value.unsqueeze(-1 - event_dim)
        if self.differs_by_step:
            emission = base.log_prob(value)
        else:  # time to the left, so that (…, K) meets (…, K)
            emission = base.log_prob(value.movedim(-2 - event_dim, 0)).movedim(0, -2)
        if observed is not None:
            emission = torch.where(observed[..., None], emission, torch.zeros_like(emission))
        return self.initial_logits, self.transition_logits, emission

    def observations(self, value: Tensor) -> tuple[Tensor, Tensor | None]:
        """The value with something valid where nothing was observed, and where something was.

        The second is (…, T), ``None`` where every step was observed.
        """
        self._require_value(value)
        event_dim = len(self.observation_dist.event_shape)
        missing = len(self.batch_shape) + 1 + event_dim - value.dim()
        value = value.reshape((1,) * missing + value.shape)  # as many dimensions as the batch
        observed = self._observed(value.shape[-1 - event_dim], value.device)
        if observed is None:
            return value, None
        valid = _valid_value(self.observation_dist, value)
        return torch.where(_at_right(observed, event_dim), value, valid), observed

    def _observed(self, T: int, device: torch.device) -> Tensor | None:
        """(…, T): which steps there are and were observed; ``None``: all."""
        observed = self.step_mask
        if self.lengths is not None:
            exists = torch.arange(T, device=device) < self.lengths.to(device)[..., None]
            observed = exists if observed is None else observed & exists
        return observed

    def _require_value(self, value: Tensor) -> None:
        event = tuple(self.observation_dist.event_shape)
        shape, T = tuple(value.shape), self.num_steps
        start = len(shape) - 1 - len(event)
        if start < 0 or shape[start + 1 :] != event or (T is not None and shape[start] != T):
            steps = "steps" if T is None else T
            raise ProgramError(
                f"expected sequences of shape (..., {', '.join(map(str, (steps, *event)))}), but "
                f"the value has shape {shape}."
            )


def _at_right(mask: Tensor, event_dim: int) -> Tensor:
    """The mask of steps with ``event_dim`` dimensions of one more."""
    return mask.reshape(*mask.shape, *(1,) * event_dim)


def _valid_value(distribution: Distribution, like: Tensor) -> Tensor:
    """Some value of the support, of event shape: it stands in where nothing was observed."""
    support: Any = distribution.support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is constraints.real or support is constraints.boolean:
        return like.new_zeros(distribution.event_shape)
    lowest = getattr(support, "lower_bound", None)
    if support.is_discrete and isinstance(lowest, int):
        return like.new_full(distribution.event_shape, lowest)
    # a draw is valid whatever the support is; the random stream is left as it was
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        draw = distribution.sample()
    return draw.flatten(0, len(distribution.batch_shape) - 1)[0].to(like)


def _require_states(initial: Tensor, transition: Tensor, observation: Distribution) -> None:
    """Raise :class:`ProgramError` unless all three have the same number K of states."""
    K = initial.shape[-1] if initial.dim() else None
    batch_shape = tuple(observation.batch_shape)
    if K is None or tuple(transition.shape[-2:]) != (K, K) or batch_shape[-1:] != (K,):
        raise ProgramError(
            "HiddenMarkov expects initial_logits (..., K), transition_logits (..., K, K) and an "
            f"observation_dist of batch shape (..., K), but got {tuple(initial.shape)}, "
            f"{tuple(transition.shape)} and {batch_shape}: for univariate parameters of shape "
            "(K, D) write observation_dist.to_event(1)."
        )


def _require_possible(*log_probabilities: Tensor) -> None:
    if any(bool(logits.isnan().any()) for logits in log_probabilities):
        raise ProgramError(
            "initial_logits or transition_logits hold a NaN, or a row that is -inf throughout: "
            "from each state some state must be possible."
        )

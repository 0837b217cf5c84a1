r"""Exact sums over chains of discrete states: forward-backward, Viterbi, sampling.

.. math::

    Z = \sum_{z_1 … z_T} π(z_1) \prod_{t=1}^{T-1} A_t(z_t, z_{t+1}) \prod_{t=1}^T b_t(z_t)

for log-factors ln π, ln A, ln b that need not be normalised; −inf forbids a state or a transition.
Every function takes

``log_initial``
    (K,) or (\*batch, K).
``log_transition``
    (K, K), rows are the previous state: the same at every step. Or (T−1, K, K) or
    (\*batch, T−1, K, K): step by step. Or (\*batch, 1, K, K): the same at every step, each sequence
    with its own.
``log_emission``
    (\*batch, T, K); the batch shapes of all broadcast.
``lengths``
    integers, (\*batch,): steps t ≥ length do not exist. Whatever is stored there plays no part, not
    even a NaN, and its marginals are zero. A sequence without any step has ln Z = 0.

How: in scaled space, the recursions of both directions are one small matrix product and one
elementwise product a step, in place, with states before sequences in memory. A long chain is cut
into blocks that run side by side from guessed boundary messages; the guess is checked against what
the neighbouring block ends with, and is refined until they agree to rounding. Scaled numbers can
underflow: they are used only where it is proven that what underflows does not matter
(:func:`_spread`) or that nothing did (:func:`_support_is_intact`); everything else is done in log
space.

Source: Rabiner (1989), "A tutorial on hidden Markov models and selected applications in speech
recognition", section III; Särkkä, García-Fernández (2021), "Temporal parallelization of Bayesian
smoothers", for the associative scan.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvppl.errors import ProgramError

__all__ = [
    "ChainPosterior",
    "ChainWorkspace",
    "chain_log_sum",
    "forward_backward",
    "sample_chain",
    "viterbi",
]

METHODS = ("auto", "sequential", "blocked", "associative")


# ------------------------------------------------------------------------------------- public names


class ChainPosterior(NamedTuple):
    """What :func:`forward_backward` returns; with K states and T steps.

    ``log_evidence``: ln Z, (\\*batch,), in nats. ``marginals``: p(z_t = k | y), (\\*batch, T, K).
    ``transitions``: expected numbers of transitions i → j. Where log_transition is the same at
    every step, summed over steps (and over the batch, where that shares it): (K, K) or
    (\\*batch, 1, K, K). Otherwise, or with ``pairwise=True``, p(z_t = i, z_{t+1} = j | y) for each
    t: (\\*batch, T−1, K, K).
    """

    log_evidence: Tensor
    marginals: Tensor
    transitions: Tensor


def forward_backward(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
    method: str = "auto",
    pairwise: bool = False,
    workspace: ChainWorkspace | None = None,
) -> ChainPosterior:
    """ln Z and the posterior marginals of states and transitions; without gradients.

    A sequence that is impossible has ln Z = −inf and marginals of zero.

    :param log_initial: ln π, see :mod:`lvppl.chains` for this and the shapes of all factors.
    :param log_transition: ln A.
    :param log_emission: ln b.
    :param lengths: numbers of steps that exist, (\\*batch,); ``None``: all.
    :param method: ``"sequential"``: step by step. ``"blocked"``: blocks of steps side by side.
        ``"associative"``: a scan of logarithmic depth in log space, which never waits for the
        device. ``"auto"``: the last on an accelerator, on a CPU one of the others by size.
    :param pairwise: ask for ``transitions`` step by step.
    :param workspace: buffers to use again; see :class:`ChainWorkspace`.
    :raises ProgramError: for shapes, dtypes, lengths or a method that do not fit.
    """
    with torch.no_grad():
        chain = _chain(log_initial, log_transition, log_emission, lengths)
        posterior = _posterior(chain, method, workspace)
        shape, K = chain.batch_shape, chain.K
        if pairwise or log_transition.dim() == 3 or not chain.homogeneous:
            transitions = posterior.pairwise().reshape(*shape, chain.T - 1, K, K)
        else:
            own = log_transition.dim() > 3
            transitions = posterior.counts().reshape((*shape, 1, K, K) if own else (K, K))
        return ChainPosterior(
            posterior.log_evidence.reshape(shape),
            posterior.marginals.reshape(*shape, chain.T, K),
            transitions,
        )


def chain_log_sum(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
    method: str = "auto",
) -> Tensor:
    r"""ln Z, (\*batch,), in nats; differentiable any number of times in the three log-factors.

    .. math:: ∂ \ln Z / ∂ \ln A_t(i, j) = p(z_t = i, z_{t+1} = j | y)

    and so on: the gradient is what :func:`forward_backward` finds, at its speed, and zero where a
    sequence is impossible. Second derivatives go through a slower sum in log space; so does a call
    that is being traced into a graph. Arguments and errors are those of :func:`forward_backward`.
    """
    chain = _chain(log_initial, log_transition, log_emission, lengths)
    _require_method(method)
    if _is_traced():
        result = _log_messages(chain, True)[-1]
    else:
        result = _LogSum.apply(chain.initial, chain.transition, chain.emission, chain, method)
    return result.reshape(chain.batch_shape)


def viterbi(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""The most probable path of each sequence.

    :returns: its states, (\*batch, T), int64, and the sum of its log-factors, (\*batch,), in nats.
        Of several best predecessors the one of lowest index is taken, and so is the last state.
        Steps beyond the length, and an impossible sequence (−inf), have state 0.
    :raises ProgramError: as :func:`forward_backward`.

    Source: Viterbi (1967), "Error bounds for convolutional codes and an asymptotically optimum
    decoding algorithm".
    """
    with torch.no_grad():
        chain = _chain(log_initial, log_transition, log_emission, lengths)
        score, origins = _first(chain), []
        for step in _log_steps(chain):
            score, origin = (score[:, :, None] + step).max(1)
            origins.append(origin)
        log_joint, state = score.max(-1)
        states = state.new_zeros(chain.B, chain.T)
        states[:, -1] = state
        for t in range(chain.T - 2, -1, -1):
            state = origins[t].gather(-1, state[:, None]).squeeze(-1)
            states[:, t] = state
        states.masked_fill_((log_joint == -math.inf)[:, None], 0)
        if chain.lengths is not None:
            states.masked_fill_(~chain.exists(), 0)
            log_joint = log_joint.masked_fill(chain.lengths == 0, 0.0)
        return states.reshape(*chain.batch_shape, chain.T), log_joint.reshape(chain.batch_shape)


def sample_chain(
    log_initial: Tensor,
    log_transition: Tensor,
    log_emission: Tensor,
    *,
    lengths: Tensor | None = None,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Paths from p(z | y), by forward filtering and backward sampling.

    :param num_samples: S, independent paths of each sequence.
    :param generator: of the random numbers; ``None``: torch's global one.
    :returns: (S, \*batch, T), int64; steps beyond the length have state 0.
    :raises ProgramError: as :func:`forward_backward`, and where a sequence has no possible path.

    Source: Scott (2002), "Bayesian methods for hidden Markov models", section 2.2.
    """
    with torch.no_grad():
        chain = _chain(log_initial, log_transition, log_emission, lengths)
        posterior = _posterior(chain, "auto", None)
        if bool((posterior.log_evidence == -math.inf).any()):
            raise ProgramError(
                "sample_chain expected sequences with a possible path, but the evidence of at "
                "least one is zero: allow more states or transitions, or leave it out."
            )
        log_filtered = posterior.log_filtered()
        states = torch.zeros(
            num_samples, chain.B, chain.T, dtype=torch.int64, device=log_filtered.device
        )
        noise = torch.empty(num_samples, *log_filtered.shape[::2]).to(log_filtered)
        state, B = None, torch.arange(chain.B, device=noise.device)
        for t in range(chain.T - 1, -1, -1):
            logits = log_filtered[:, t].expand_as(noise)
            if state is not None:
                arrive = chain.transition_at(t)[..., :].expand(chain.B, -1, -1)[B, :, state]
                if chain.lengths is not None:
                    arrive = torch.where((chain.lengths > t + 1)[:, None], arrive, 0.0)
                logits = logits + arrive
            # argmax of p / E for exponential E: a state of probability zero is never drawn
            noise.exponential_(generator=generator).clamp_(min=torch.finfo(noise.dtype).tiny)
            state = (logits - noise.log()).argmax(-1)
            states[:, :, t] = state
        if chain.lengths is not None:
            states.masked_fill_(~chain.exists(), 0)
        return states.reshape(num_samples, *chain.batch_shape, chain.T)


# ---------------------------------------------------------------------------------------- arguments


@dataclass(frozen=True)
class _Chain:
    """The factors with one batch dimension: transition is (B or 1, T−1 or 1, K, K)."""

    initial: Tensor
    transition: Tensor
    emission: Tensor
    lengths: Tensor | None
    batch_shape: torch.Size

    @property
    def B(self) -> int:
        return self.emission.shape[0]

    @property
    def T(self) -> int:
        return self.emission.shape[1]

    @property
    def K(self) -> int:
        return self.emission.shape[2]

    @property
    def homogeneous(self) -> bool:
        return self.transition.shape[1] == 1

    def exists(self) -> Tensor:
        """(B, T): which steps there are."""
        steps = torch.arange(self.T, device=self.emission.device)
        if self.lengths is None:
            return torch.ones_like(steps, dtype=torch.bool).expand(self.B, -1)
        return steps < self.lengths[:, None]

    def transition_at(self, t: int) -> Tensor:
        """ln A_t, (B or 1, K, K), from step t to step t + 1."""
        return self.transition[:, 0 if self.homogeneous else t]


def _chain(
    log_initial: Tensor, log_transition: Tensor, log_emission: Tensor, lengths: Tensor | None
) -> _Chain:
    """The arguments, checked and broadcast."""
    K = _require_factors(log_initial, log_transition, log_emission)
    T = log_emission.shape[-2]
    if log_transition.dim() > 2 and log_transition.shape[-3] not in (1, T - 1):
        raise ProgramError(
            f"log_transition of more than two dimensions must be (..., T - 1, K, K), or "
            f"(..., 1, K, K) for the same at every step, with T = {T} as in log_emission, but has "
            f"shape {tuple(log_transition.shape)}: where it differs by sequence only, write "
            "log_transition.unsqueeze(-3)."
        )
    if lengths is not None:
        lengths = _require_lengths(lengths, T).to(log_emission.device)
    try:
        batch_shape = torch.broadcast_shapes(
            log_initial.shape[:-1],
            log_transition.shape[:-3],
            log_emission.shape[:-2],
            () if lengths is None else lengths.shape,
        )
    except RuntimeError as error:
        raise ProgramError(
            "the batch shapes of log_initial, log_transition, log_emission and lengths must "
            f"broadcast, but are {tuple(log_initial.shape[:-1])}, "
            f"{tuple(log_transition.shape[:-3])}, {tuple(log_emission.shape[:-2])} and "
            f"{None if lengths is None else tuple(lengths.shape)}."
        ) from error
    if log_transition.dim() <= 3:
        log_transition = log_transition.reshape(1, -1, K, K)
    else:
        log_transition = log_transition.expand(*batch_shape, -1, K, K).reshape(
            math.prod(batch_shape), log_transition.shape[-3], K, K
        )
    return _Chain(
        log_initial.expand(*batch_shape, K).reshape(-1, K),
        log_transition,
        log_emission.expand(*batch_shape, T, K).reshape(-1, T, K),
        None if lengths is None else lengths.expand(batch_shape).reshape(-1),
        batch_shape,
    )


def _require_factors(log_initial: Tensor, log_transition: Tensor, log_emission: Tensor) -> int:
    """K, or :class:`ProgramError` for shapes and dtypes that do not fit each other."""
    named = {
        "log_initial": log_initial,
        "log_transition": log_transition,
        "log_emission": log_emission,
    }
    for (name, factor), least in zip(named.items(), (1, 2, 2), strict=True):
        if factor.dim() < least:
            raise ProgramError(
                f"{name} must have at least {least} dimension(s), but has shape "
                f"{tuple(factor.shape)}; expected log_initial (..., K), log_transition "
                "(..., K, K) and log_emission (..., T, K)."
            )
    K = log_emission.shape[-1]
    if (
        log_initial.shape[-1] != K
        or log_transition.shape[-2:] != (K, K)
        or 0 in log_emission.shape[-2:]
    ):
        raise ProgramError(
            "log_initial, log_transition and log_emission must have shapes (..., K), (..., K, K) "
            "and (..., T, K), with T and K at least 1, but have "
            + ", ".join(str(tuple(factor.shape)) for factor in named.values())
            + "."
        )
    dtypes = {factor.dtype for factor in named.values()}
    devices = {factor.device for factor in named.values()}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64} or len(devices) > 1:
        raise ProgramError(
            "log_initial, log_transition and log_emission must be all float32 or all float64, on "
            "one device, but are "
            + ", ".join(f"{factor.dtype} on {factor.device}" for factor in named.values())
            + ": convert them with .to(log_emission)."
        )
    return K


def _require_lengths(lengths: Tensor, T: int) -> Tensor:
    """lengths as int64, or :class:`ProgramError`. Off the CPU the range is not looked at."""
    lengths = torch.as_tensor(lengths)
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise ProgramError(
            f"lengths must be integers, one a sequence, but are {lengths.dtype}: a mask of steps "
            "has its own argument, or is mask.sum(-1) where only a sequence's end is missing."
        )
    if lengths.device.type == "cpu" and bool(((lengths < 0) | (lengths > T)).any()):
        raise ProgramError(
            f"lengths must be in 0 … {T}, the number of steps of log_emission, but range from "
            f"{int(lengths.min())} to {int(lengths.max())}: pad log_emission, or cut lengths."
        )
    return lengths.to(torch.int64)


def _require_method(method: str) -> None:
    if method not in METHODS:
        raise ProgramError(f"method must be one of {', '.join(METHODS)}, but is {method!r}.")


def _is_traced() -> bool:
    """Whether operations are being recorded: then no Python branch may look at a value."""
    depth = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)
    return torch.compiler.is_compiling() or depth() > 0


# --------------------------------------------------------------------------------- which algorithm


def _posterior(chain: _Chain, method: str, workspace: ChainWorkspace | None) -> _Posterior:
    """The scaled posterior where it is proven right, and that in log space where it is not."""
    _require_method(method)
    if method == "associative" or (method == "auto" and chain.emission.device.type != "cpu"):
        return _LogPosterior(chain, scan=True)
    found = None
    for num_blocks in _block_counts(chain, method):
        found = _scaled_posterior(chain, num_blocks, workspace or ChainWorkspace())
        if found is not None:
            return found
    return _LogPosterior(chain, scan=_must_scan(chain, method))


def _block_counts(chain: _Chain, method: str) -> list[int]:
    """How many blocks to try, one count after the other."""
    # A step of both directions costs about 4 µs however few its columns are, and then for 8, 16 and
    # 64 states 8, 20 and 600 ns a column (two cores, float64): about 60,000 / K² columns cost as
    # much as their overhead. Blocks below 64 steps would seldom forget their guess.
    columns = min(1024, 60_000 // chain.K**2)
    num_blocks = min(columns // chain.B, chain.T // 64)
    if method == "blocked":
        num_blocks = max(num_blocks, min(4, chain.T))
    if method == "sequential" or num_blocks < 4:
        return [1]
    return [num_blocks, 1] if chain.transition.shape[:2] != (1, 1) else [num_blocks]


def _must_scan(chain: _Chain, method: str) -> bool:
    """Whether the scan is to be preferred to single steps in log space."""
    if method == "associative":
        return True
    if chain.emission.device.type != "cpu":
        return method == "auto"
    # measured: a step of both directions 60 µs and 6 ns a product, against 3.5 ns each for the scan
    products = chain.B * chain.K**2
    return 3.5e-9 * products * chain.K < 60e-6 + 6e-9 * products


class _Posterior:
    """What both spaces find: ``log_evidence`` (B,), ``marginals`` (B, T, K), and more on demand."""

    chain: _Chain
    log_evidence: Tensor
    marginals: Tensor

    def pairwise(self) -> Tensor:
        """p(z_t = i, z_{t+1} = j | y), (B, T−1, K, K)."""
        raise NotImplementedError

    def counts(self, weight: Tensor | None = None) -> Tensor:
        """The pairwise marginals times ``weight`` (B,), summed to the shape of the transition."""
        raise NotImplementedError

    def log_filtered(self) -> Tensor:
        """ln p(z_t | y_1 … y_t) up to a constant for each t, (B, T, K)."""
        raise NotImplementedError


# ------------------------------------------------------------------------------------ scaled space


@dataclass(frozen=True)
class _Limits:
    """How far scaled numbers may go, in nats; and what two messages may differ by."""

    spread: float  # of the logs of the transitions, for which underflow is proven harmless
    shrink: float  # what messages may lose between two rescalings
    finite_spread: float  # of the transitions that are not zero, where zeros are looked for instead
    smallest: float  # message that has certainly not lost digits to underflow
    smallest_scale: float  # of one step, likewise
    tolerance: float  # relative, of a boundary message


# The smallest normal numbers are e^-708 and e^-87. With messages above e^-shrink, Σ α β is above
# e^(-2 shrink - spread) / K, and what is lost by underflow is below e^(-708 + shrink + spread) of
# the whole: e^-358, e^-42.
LIMITS = {
    torch.float64: _Limits(200.0, 150.0, 100.0, 1e-200, 1e-60, 1e-12),
    torch.float32: _Limits(25.0, 20.0, 15.0, 1e-25, 1e-8, 2e-5),
}


class ChainWorkspace:
    """Buffers that :func:`forward_backward` uses again: of the last shapes it was called with.

    Saves allocating memory and views at each iteration of EM, a tenth to a quarter of the time.
    What a call returned is overwritten by the next one with the same workspace.
    """

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._buffers: _Buffers | None = None

    def _get(self, layout: _Layout, period: int, like: Tensor) -> _Buffers:
        key = (layout, period, like.dtype, like.device)
        if self._buffers is None or self._key != key:
            self._key, self._buffers = key, _Buffers(layout, period, like)
        return self._buffers


@dataclass(frozen=True)
class _Layout:
    """T steps in N blocks of L steps; all blocks of all sequences are R = N B columns.

    Step t is step t mod L of block t // L. Columns are (block, sequence), and arrays (L, K, R): a
    step's numbers lie together, and one product works on long rows.
    """

    B: int
    T: int
    K: int
    N: int
    L: int

    @classmethod
    def of(cls, chain: _Chain, num_blocks: int) -> _Layout:
        L = -(-chain.T // num_blocks)
        return cls(chain.B, chain.T, chain.K, -(-chain.T // L), L)

    @property
    def R(self) -> int:
        return self.N * self.B

    @property
    def padded(self) -> bool:
        return self.N * self.L > self.T

    def times(self, device: torch.device) -> Tensor:
        """The time of each step of each block, (L, N, 1)."""
        steps = torch.arange(self.L, device=device)
        return (steps[:, None] + self.L * torch.arange(self.N, device=device))[:, :, None]

    def by_sequence(self, columns: Tensor) -> Tensor:
        """(L, K, R) as a (B, N, L, K) view."""
        return columns.unflatten(-1, (self.N, self.B)).permute(3, 2, 0, 1)

    def fill(self, columns: Tensor, sequences: Tensor, padding: float) -> None:
        """Copy (B, T, K) into (L, K, R)."""
        view = self.by_sequence(columns)
        whole = self.T // self.L
        view[:, :whole].copy_(sequences[:, : whole * self.L].unflatten(1, (whole, self.L)))
        if self.padded:
            rest = self.T - whole * self.L
            view[:, whole, :rest].copy_(sequences[:, whole * self.L :])
            view[:, whole, rest:] = padding


class _Buffers:
    """Memory for one layout, and the views that the steps of a sweep work on.

    A sweep goes forward and backward at once: its s-th step handles slot s of the first direction
    and slot L − 1 − s of the second, so that each view is a pair of slots, (2, K, R).
    """

    def __init__(self, layout: _Layout, period: int, like: Tensor) -> None:
        L, K, R = layout.L, layout.K, layout.R
        self.factors = like.new_empty(2 * L, K, R)  # b, twice: a pair's stride must be positive
        self.messages = like.new_empty(2 * L, K, R)  # α; then b β
        # before b comes in, by step of the sweep: a product into anything but contiguous memory is
        # three times slower
        self.arrivals = like.new_empty(L, 2, K, R)
        self.marginals = like.new_empty(layout.B, layout.N, L, K)
        self.starts = like.new_empty(2, K, R)
        self.scale = like.new_empty(2, 1, R)
        self.peaks = like.new_empty(L, 1, R)
        self.remembers = False  # whether blocks were found too short to forget their guess
        self._transitions: Tensor | None = None
        self.events = [s for s in range(L) if s % period == period - 1 or s == L - 1]
        self.scales = like.new_ones(len(self.events), 2, 1, R)
        scales: list[Tensor | None] = [None] * L
        for s, event in zip(self.events, self.scales.unbind(), strict=True):
            scales[s] = event
        pairs = [(s, 2 * L - 1 - s) for s in range(L)]
        self.steps = list(
            zip(
                self.arrivals.unbind(),
                [_pair(self.factors, *slots) for slots in pairs],
                [_pair(self.messages, *slots) for slots in pairs],
                scales,
                strict=True,
            )
        )

    def transitions(self) -> Tensor:
        """(L, K, K, R), where each column has its own."""
        if self._transitions is None:
            L, _, K, R = self.arrivals.shape
            self._transitions = self.arrivals.new_empty(L, K, K, R)
        return self._transitions


def _pair(buffer: Tensor, first: int, second: int) -> Tensor:
    """Two slots of a (slots, K, R) buffer, the first before the second, as one (2, K, R) view."""
    _, K, R = buffer.shape
    return buffer.as_strided((2, K, R), ((second - first) * K * R, R, 1), first * K * R)


class _SharedSteps:
    """Transitions that all columns share: a step is a matrix product."""

    def __init__(self, chain: _Chain, layout: _Layout) -> None:
        self._layout, logs = layout, chain.transition[0]
        peak = _finite(logs.amax((-2, -1), keepdim=True))
        self.log_scale = peak.reshape(1, -1)  # (1, S)
        self.A = (logs - peak).exp()  # (S, K, K)
        if chain.homogeneous:
            self._matrices = [torch.stack([self.A[0].T, self.A[0]])] * layout.L
        else:
            # step s arrives at time s in the first direction, leaves time T − 1 − s in the second
            both = torch.stack([self.A.transpose(-2, -1), self.A.flip(0)], 1)
            self._matrices = [both[:0], *both.unbind()]

    def step(self, s: int, messages: Tensor, out: Tensor) -> None:
        torch.bmm(self._matrices[s], messages, out=out)

    def depart(self, ends: Tensor) -> Tensor:
        """What the blocks' last messages arrive as in their neighbours; both directions."""
        return torch.bmm(self._matrices[-1], ends)

    def pairwise(self, before: Tensor, after: Tensor) -> Tensor:
        """Products α_t A_t (b β)_{t+1} of all columns, (B, T − 1, K, K)."""
        layout = self._layout
        before = layout.by_sequence(before).flatten(1, 2)[:, : layout.T - 1]
        after = layout.by_sequence(after).flatten(1, 2)[:, 1 : layout.T]
        products = before[..., None] * after[..., None, :]
        return products.mul_(self.A)


class _OwnSteps:
    """Transitions of each column's own: a step is an elementwise product and a sum over states."""

    def __init__(self, chain: _Chain, layout: _Layout, buffers: _Buffers) -> None:
        self._layout, like = layout, chain.emission
        self._products = like.new_empty(layout.K, layout.K, layout.R)
        # slot l of block n arrives at time n L + l; slot 0 of the first block is never used
        if chain.homogeneous:
            A = chain.transition[:, 0].permute(1, 2, 0).repeat(1, 1, layout.N)[None]
        else:
            A = self._by_column(chain, buffers.transitions())
        peak = _finite(A.amax((1, 2), keepdim=True))
        self._A = A.sub_(peak).exp_()  # (L or 1, K, K, R)
        self._matrices = self._A.unbind() * (layout.L if chain.homogeneous else 1)
        peaks = peak.reshape(-1, layout.N, layout.B).permute(2, 1, 0).flatten(1)
        self.log_scale = peaks[:, :1] if chain.homogeneous else peaks[:, 1 : layout.T]  # (B, S)

    def _by_column(self, chain: _Chain, A: Tensor) -> Tensor:
        """ln A_t in (L, K, K, R); zero where there is none."""
        layout, T, L = self._layout, self._layout.T, self._layout.L
        logs = chain.transition.permute(1, 2, 3, 0)  # (T − 1, K, K, B or 1)
        for n, block in enumerate(A.unflatten(-1, (layout.N, layout.B)).unbind(-2)):
            first, end = max(n * L, 1), min((n + 1) * L, T)
            block[: first - n * L], block[end - n * L :] = 0.0, 0.0
            block[first - n * L : end - n * L] = logs[first - 1 : end - 1]
        if chain.lengths is not None:
            beyond = layout.times(A.device) >= chain.lengths
            A.masked_fill_(beyond.reshape(L, 1, 1, layout.R), 0.0)
        return A

    def step(self, s: int, messages: Tensor, out: Tensor) -> None:
        products = self._products
        torch.mul(self._matrices[s], messages[0, :, None], out=products)
        torch.sum(products, 0, out=out[0])
        torch.mul(self._matrices[self._layout.L - s], messages[1], out=products)
        torch.sum(products, 1, out=out[1])

    def depart(self, ends: Tensor) -> Tensor:
        A, B = self._A[0], self._layout.B
        # of the columns that depart forward, each meets the matrix of the block after it
        ahead = torch.cat([A[..., B:], A[..., :B]], -1)
        return torch.stack([(ahead * ends[0, :, None]).sum(0), (A * ends[1]).sum(1)])

    def pairwise(self, before: Tensor, after: Tensor) -> Tensor:
        layout, B = self._layout, self._layout.B
        arriving = torch.cat([before[-1:], before[:-1]])
        arriving[0] = before[-1].roll(B, -1)
        products = self._A * arriving[:, :, None]
        products *= after[:, None]
        by_sequence = products.unflatten(-1, (layout.N, B)).permute(4, 3, 0, 1, 2)
        return by_sequence.flatten(1, 2)[:, 1 : layout.T]


def _scaled_posterior(
    chain: _Chain, num_blocks: int, workspace: ChainWorkspace
) -> _ScaledPosterior | None:
    """In scaled space, or ``None`` where this could not be shown to be right."""
    limits, layout = LIMITS[chain.emission.dtype], _Layout.of(chain, num_blocks)
    own = chain.transition.shape[0] > 1 or (layout.N > 1 and not chain.homogeneous)
    spread = _spread(chain)
    safe = spread <= limits.spread
    if not safe and (own or not chain.homogeneous):
        return None
    loss = max(spread, math.log(chain.K), 1.0)
    period = max(1, int(limits.shrink / loss)) if safe else 1
    buffers = workspace._get(layout, min(period, 32), chain.emission)
    steps = _OwnSteps(chain, layout, buffers) if own else _SharedSteps(chain, layout)
    sweep = _Sweep(chain, layout, buffers, steps)
    if not sweep.run_until_consistent(limits.tolerance):
        return None
    posterior = _ScaledPosterior(sweep)
    if not safe and not _support_is_intact(sweep, posterior, limits):
        return None
    return posterior


def _spread(chain: _Chain) -> float:
    r"""The largest ln max A_t − ln min A_t; what lies beyond a sequence's end counts too.

    Where it is at most :attr:`_Limits.spread`, underflow is harmless. β_t(i) is between min A and
    max A times Σ_j (b β)_{t+1}(j), so that two β of one step differ by that ratio at most: a state
    whose α underflows has a posterior probability of no more than the lost part times the ratio,
    which is nothing. The same holds with the directions swapped. A step's messages shrink by no
    more than the ratio either, as the largest b of a step is one.
    """
    logs = chain.transition
    if chain.T == 1 or logs.numel() == 0:
        return 0.0
    spread = float((logs.amax((-2, -1)) - logs.amin((-2, -1))).max())
    return math.inf if math.isnan(spread) else spread


class _Sweep:
    """Both directions through all blocks, and what their boundaries start from."""

    def __init__(
        self, chain: _Chain, layout: _Layout, buffers: _Buffers, steps: _SharedSteps | _OwnSteps
    ) -> None:
        self.chain, self.layout, self.buffers, self.steps = chain, layout, buffers, steps
        L, B = layout.L, layout.B
        lengths, device = chain.lengths, chain.emission.device
        if lengths is None and layout.padded:
            lengths = torch.full((B,), layout.T, device=device)
        self.lengths = lengths
        self.exists: Tensor | None = None
        self.ended: Tensor | None = None
        self._resets: list[Tensor | None] = [None] * L
        if lengths is not None:
            times = layout.times(device)
            self.exists = (times < lengths).reshape(L, 1, layout.R)
            # β = 1 at the last step; beyond it, anything that is finite will do
            self.ended = (times >= lengths - 1).reshape(L, 1, layout.R)
            some = self.ended.any(-1).any(-1).tolist()
            self._resets = [self.ended[i] if some[i] else None for i in reversed(range(L))]
        self._fill()

    def _fill(self) -> None:
        """b, with the largest of a step one, and ln π in that of the first step."""
        layout, buffers = self.layout, self.buffers
        b = buffers.factors[: layout.L]
        layout.fill(b, self.chain.emission, 0.0)
        b[0, :, : layout.B] += self.chain.initial.T
        if self.exists is not None:
            b.masked_fill_(~self.exists, 0.0)
        torch.amax(b, 1, keepdim=True, out=buffers.peaks)
        buffers.peaks.masked_fill_(buffers.peaks == -math.inf, 0.0)
        b.sub_(buffers.peaks).exp_()
        buffers.factors[layout.L :].copy_(b)

    def run(self) -> None:
        """One sweep from ``buffers.starts``."""
        buffers, step, B = self.buffers, self.steps.step, self.layout.B
        tiny, scale = torch.finfo(buffers.factors.dtype).tiny, buffers.scale
        messages = buffers.starts
        for s, (arrive, factor, out, event) in enumerate(buffers.steps):
            if s:
                step(s, messages, arrive)
            else:
                arrive.copy_(messages)
                arrive[0, :, :B] = 1.0
                arrive[1, :, -B:] = 1.0
            if (ended := self._resets[s]) is not None:
                arrive[1].masked_fill_(ended, 1.0)
            messages = torch.mul(arrive, factor, out=out)
            if event is not None:
                torch.sum(messages, 1, keepdim=True, out=event)
                messages.div_(torch.clamp_min(event, tiny, out=scale))

    def run_until_consistent(self, tolerance: float) -> bool:
        """Sweep until every block starts from what its neighbours end with, to rounding.

        Then all messages are those of a single pass, to rounding times the number of blocks. A
        chain forgets its past, most often within a block: so a sweep from a flat guess gives the
        next one its starts. Where it does not, products of matrices give them.
        """
        buffers = self.buffers
        if self.layout.N == 1 or not buffers.remembers or self.ended is not None:
            buffers.starts.fill_(1.0)
            self.run()
        if self.layout.N == 1:
            return True
        for _ in range(0 if buffers.remembers else 2):
            buffers.starts.copy_(self._neighbours(self._ends()))
            self.run()
            error = self._inconsistency()
            if error <= tolerance:
                return True
            if not error <= math.sqrt(tolerance):  # another sweep would not be enough
                break
        if isinstance(self.steps, _OwnSteps):
            return False
        buffers.remembers = True
        buffers.starts.copy_(self._neighbours(self._product_ends(self.steps.A[0])))
        self.run()
        return self._inconsistency() <= tolerance

    def _ends(self) -> Tensor:
        """The last message of each block in both directions, (2, K, R)."""
        return self.buffers.steps[-1][2]

    def _neighbours(self, ends: Tensor) -> Tensor:
        """The starts that follow from what the neighbouring blocks end with, (2, K, R)."""
        B, departing = self.layout.B, self.steps.depart(ends)
        starts = torch.ones_like(departing)
        starts[0, :, B:] = departing[0, :, :-B]
        starts[1, :, :-B] = departing[1, :, B:]
        return starts

    def _inconsistency(self) -> float:
        """The largest relative difference between the starts and what they should have been."""
        used, found = self.buffers.starts, self._neighbours(self._ends())
        largest = torch.maximum(used, found)
        difference = (used - found).abs() / torch.where(largest > 0, largest, 1.0)
        # an impossible sequence ends with zeros; a start at or below the first of them is not used
        return float(difference.max())

    def _product_ends(self, A: Tensor) -> Tensor:
        """What the blocks end with, from the product of the matrices of each block, (2, K, R)."""
        N, B, K = self.layout.N, self.layout.B, self.layout.K
        Q = self._block_products(A).unflatten(-1, (N, B)).permute(2, 3, 1, 0)  # (N, B, from, to)
        forward, backward = A @ Q, Q @ A
        # the first and the last start from ones, with no transition before or after them
        forward[0], backward[-1] = Q[0], Q[-1]
        if self.ended is not None:
            # where β was set within a block, its end is known, whatever comes in
            known = self.ended.any(0).reshape(N, B, 1, 1)
            ends = self._ends()[1].reshape(K, N, B, 1).permute(1, 2, 0, 3)
            backward = torch.where(known, ends, backward)
        matrices = torch.stack([forward, backward.flip(0).transpose(-2, -1)], 1)
        ends = _running_products(matrices)
        return torch.stack([ends[:, 0], ends[:, 1].flip(0)]).permute(0, 3, 1, 2).reshape(2, K, -1)

    def _block_products(self, A: Tensor) -> Tensor:
        """b_1 A b_2 … A b_L of each block, up to a factor for each, (to, from, R)."""
        layout, buffers = self.layout, self.buffers
        K, R, tiny = layout.K, layout.R, torch.finfo(A.dtype).tiny
        b = buffers.factors[: layout.L]
        product = torch.eye(K, dtype=A.dtype, device=A.device)[:, :, None] * b[0][:, None]
        spare, events, transposed = torch.empty_like(product), set(buffers.events), A.T.contiguous()
        for s, factor in enumerate(b[:, :, None].unbind()):
            if s:
                torch.mm(transposed, product.view(K, K * R), out=spare.view(K, K * R))
                product, spare = spare.mul_(factor), product
            if s in events:
                product.div_(product.sum((0, 1), keepdim=True).clamp_min_(tiny))
        return product


def _running_products(matrices: Tensor) -> Tensor:
    """(1 … 1) M_0 M_1 … M_n for each n, normalised, (N, …, K), of (N, …, K, K)."""
    N, K = len(matrices), matrices.shape[-1]
    # about √N chunks of √N: products within all chunks at once, then vectors from chunk to chunk
    size = math.isqrt(N - 1) + 1
    identity = torch.eye(K, dtype=matrices.dtype, device=matrices.device)
    padding = identity.expand(-N % size, *matrices.shape[1:])
    chunks = torch.cat([matrices, padding]).unflatten(0, (-1, size))
    within = [chunks[:, 0]]
    for i in range(1, size):
        within.append(_normalised(within[-1] @ chunks[:, i], (-2, -1)))
    starts = [torch.ones_like(matrices[0, ..., :1, :])]
    for product in within[-1][:-1]:
        starts.append(_normalised(starts[-1] @ product, -1))
    ends = torch.stack(starts)[:, None] @ torch.stack(within, 1)
    return _normalised(ends.flatten(0, 1)[:N, ..., 0, :], -1)


def _normalised(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    return x / x.sum(dim, keepdim=True).clamp_min_(torch.finfo(x.dtype).tiny)


class _ScaledPosterior(_Posterior):
    """Of a finished sweep; with N blocks, as in :class:`_Layout`."""

    def __init__(self, sweep: _Sweep) -> None:
        self.chain, self.layout = sweep.chain, sweep.layout
        buffers, L = sweep.buffers, sweep.layout.L
        self.steps = sweep.steps
        self.log_evidence = _scaled_evidence(sweep)
        self.alpha, self.b_beta = buffers.messages[:L], buffers.messages[L:]
        # b is no longer needed: its memory takes what comes now
        beta = buffers.arrivals[:, 1].flip(0)
        joint = torch.mul(self.alpha, beta, out=buffers.factors[L:])
        self.total = joint.sum(1, keepdim=True)
        weight = torch.where(self.total == 0, 0.0, 1 / self.total)
        if sweep.exists is not None:
            weight.masked_fill_(~sweep.exists, 0.0)
        by_sequence = self.layout.by_sequence
        torch.mul(by_sequence(joint), by_sequence(weight), out=buffers.marginals)
        self.marginals = buffers.marginals.flatten(1, 2)[:, : self.chain.T]
        self.weighted = torch.mul(self.alpha, weight, out=buffers.factors[:L])
        if sweep.ended is not None:
            self.weighted.masked_fill_(sweep.ended, 0.0)

    def pairwise(self) -> Tensor:
        return self.steps.pairwise(self.weighted, self.b_beta)

    def counts(self, weight: Tensor | None = None) -> Tensor:
        chain, layout = self.chain, self.layout
        B, after, before = layout.B, self.b_beta, self.weighted
        if weight is not None:
            before = before * weight.repeat(layout.N)
        if isinstance(self.steps, _SharedSteps):
            A = self.steps.A
            within = torch.bmm(before[:-1], after[1:].transpose(1, 2))
            if not chain.homogeneous:
                return (within * A)[None]
            across = before[-1, :, :-B] @ after[0, :, B:].T
            return ((within.sum(0) + across) * A[0])[None, None]
        products = self.pairwise()
        if weight is not None:
            products = products * weight[:, None, None, None]
        return _sum_to(products, chain)

    def log_filtered(self) -> Tensor:
        return self._by_sequence(self.alpha).log()

    def _by_sequence(self, columns: Tensor) -> Tensor:
        return self.layout.by_sequence(columns).flatten(1, 2)[:, : self.chain.T]


def _scaled_evidence(sweep: _Sweep) -> Tensor:
    """ln Z (B,) from what was divided out up to each sequence's end, summed in float64."""
    layout, buffers, lengths, chain = sweep.layout, sweep.buffers, sweep.lengths, sweep.chain
    B, N, L, T = layout.B, layout.N, layout.L, layout.T
    alpha, scales = buffers.messages[:L], buffers.scales[:, 0].reshape(-1, N, B).log().double()
    shifts = sweep.steps.log_scale.double()
    if lengths is None:
        final = alpha[-1, :, -B:]
        shift = (T - 1) * shifts[:, 0] if chain.homogeneous else shifts.sum(-1)
    else:
        last = (lengths - 1).clamp(min=0)
        columns = torch.arange(B, device=alpha.device) + B * (last // L)
        final = alpha[last % L, :, columns].T
        scales = torch.where(layout.times(alpha.device)[buffers.events] <= last, scales, 0.0)
        steps = torch.arange(T - 1, device=alpha.device) < last[:, None]
        shift = last * shifts[:, 0] if chain.homogeneous else (steps * shifts).sum(-1)
    peaks = buffers.peaks.double().sum(0).reshape(N, B).sum(0)
    result = scales.sum((0, 1)) + final.sum(0).log().double() + peaks + shift
    if lengths is not None:
        result = torch.where(lengths == 0, 0.0, result)
    return result.to(alpha.dtype)


def _support_is_intact(sweep: _Sweep, posterior: _ScaledPosterior, limits: _Limits) -> bool:
    """Whether no message that should be positive underflowed, or nearly so.

    For transitions that are zero in places, and so make no bound on what an underflow may cost:
    think of two states that never meet, one of them ahead at the start and the other in the end.
    The states that can be reached at each step follow from the zeros; all their messages must be
    there.
    """
    chain, buffers = sweep.chain, sweep.buffers
    logs = chain.transition[0, 0]
    possible = logs > -math.inf
    finite = logs[possible]
    if (
        not bool(possible.any(-1).all())
        or float(finite.max() - finite.min()) > limits.finite_spread
    ):
        return False
    reached = _reachable(chain.initial > -math.inf, possible, chain.T)
    if reached is None or bool((buffers.scales < limits.smallest_scale).any()):
        return False
    exists, settled = chain.exists()[..., None], reached.shape[1]
    alive = posterior._by_sequence(posterior.alpha) >= limits.smallest
    alive &= posterior._by_sequence(posterior.total) >= limits.smallest
    alive |= ~exists
    backward = (posterior._by_sequence(posterior.b_beta) >= limits.smallest) | ~exists
    intact = (
        (alive[:, :settled] | ~reached).all()
        & (alive[:, settled:] | ~reached[:, -1:]).all()
        & backward[:, 1:].all()  # that of the first step holds ln π too, and is not used
    )
    return bool(intact)


def _reachable(initial: Tensor, possible: Tensor, T: int) -> Tensor | None:
    """The states that can be reached at the first steps, (B, steps, K), until they stay the same.

    ``None`` where they have not after many steps, as in a chain of period two.
    """
    reached, edges = [initial], possible.float()
    for _ in range(4 * len(possible) + 8):
        reached.append(reached[-1].float() @ edges > 0)
        if len(reached) >= T or bool((reached[-1] == reached[-2]).all()):
            return torch.stack(reached[:T], 1)
    return None


# --------------------------------------------------------------------------------------- log space


class _LogPosterior(_Posterior):
    """Every sum a log-sum-exp: slower, and right whatever the factors are."""

    def __init__(self, chain: _Chain, *, scan: bool) -> None:
        self.chain = chain
        self._alpha, self._beta, self.log_evidence = _log_messages(chain, scan)
        self.marginals = _log_marginals(self._alpha, self._beta, chain)

    def pairwise(self) -> Tensor:
        return _log_pairwise(self._alpha, self._beta, self.chain)

    def counts(self, weight: Tensor | None = None) -> Tensor:
        pairs = self.pairwise()
        return _sum_to(pairs if weight is None else pairs * weight[:, None, None, None], self.chain)

    def log_filtered(self) -> Tensor:
        return self._alpha


def _sum_to(pairs: Tensor, chain: _Chain) -> Tensor:
    """(B, T−1, K, K) summed over what the transition is shared by."""
    if chain.homogeneous:
        pairs = pairs.sum(1, keepdim=True)
    return pairs.sum(0, keepdim=True) if chain.transition.shape[0] == 1 else pairs


def _log_messages(chain: _Chain, scan: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ln α_t and ln β_t, each (B, T, K) and up to a constant, and ln Z (B,); differentiable.

    Beyond a sequence's end they stay put. The largest of every message is subtracted, so that the
    digits of long chains do not go into the constant.
    """
    alpha, beta, last, peaks = _log_scan(chain) if scan else _log_recursion(chain)
    log_evidence = (_log_sum_exp(last, -1).double() + peaks).to(alpha.dtype)
    if chain.lengths is not None:
        log_evidence = torch.where(chain.lengths == 0, 0.0, log_evidence)
    return alpha, beta, log_evidence


def _log_recursion(chain: _Chain) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Step by step: messages, the last α, and the sum of what was subtracted from α, (B,)."""
    message, peak = _peaked(_first(chain))
    alpha, peaks = [message], peak.double()
    for step in _log_steps(chain):
        message, peak = _peaked(_log_sum_exp(message[:, :, None] + step, 1))
        alpha.append(message)
        peaks = peaks + peak.double()
    beta = [torch.zeros_like(message)]
    for step in _log_steps(chain, backward=True):
        beta.append(_peaked(_log_sum_exp(step + beta[-1][:, None, :], 2))[0])
    return torch.stack(alpha, 1), torch.stack(beta[::-1], 1), message, peaks[:, 0]


def _log_scan(chain: _Chain) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A tree of products of neighbouring steps upwards; vectors downwards. Returns the same.

    A node's ln α comes in from its left and its ln β from its right; the left child's β is the
    right child's product times the node's, and so on.
    """
    first, peaks = _peaked(_first(chain))
    alpha, peaks = first[:, None], peaks[:, 0].double()
    beta = torch.zeros_like(alpha)
    if chain.T == 1:
        return alpha, beta, first, peaks
    levels, peak = _log_tree(_all_log_steps(chain))
    last = _log_sum_exp(first[:, :, None] + levels[-1][:, 0], 1)
    for level in levels[-2::-1]:
        n = level.shape[1]
        left, right = level[:, 0 : n - 1 : 2], level[:, 1::2]
        a, b = alpha[:, : n // 2], beta[:, : n // 2]
        inner_alpha = _peaked(_log_sum_exp(a[..., :, None] + left, -2))[0]
        inner_beta = _peaked(_log_sum_exp(right + b[..., None, :], -1))[0]
        alpha = torch.cat([torch.stack([a, inner_alpha], 2).flatten(1, 2), alpha[:, n // 2 :]], 1)
        beta = torch.cat([torch.stack([inner_beta, b], 2).flatten(1, 2), beta[:, n // 2 :]], 1)
    final = _peaked(_log_sum_exp(alpha[:, -1, :, None] + levels[0][:, -1], -2))[0]
    initial = _peaked(_log_sum_exp(levels[0][:, 0] + beta[:, 0, None, :], -1))[0]
    alpha, beta = torch.cat([alpha, final[:, None]], 1), torch.cat([initial[:, None], beta], 1)
    return alpha, beta, last, peaks + peak


def _log_tree(steps: Tensor) -> tuple[list[Tensor], Tensor]:
    """Products of 1, 2, 4 … neighbours, (B, n, K, K) each, and what was subtracted, (B,)."""
    levels, peaks = [steps], torch.zeros((), dtype=torch.float64, device=steps.device)
    while (n := levels[-1].shape[1]) > 1:
        left, right = levels[-1][:, 0 : n - 1 : 2], levels[-1][:, 1::2]
        pairs, peak = _peaked(_log_matmul(left, right), (-2, -1))
        peaks = peaks + peak.double().sum((-3, -2, -1))
        levels.append(torch.cat([pairs, levels[-1][:, n - 1 :]], 1) if n % 2 else pairs)
    return levels, peaks


def _peaked(message: Tensor, dim: int | tuple[int, ...] = -1) -> tuple[Tensor, Tensor]:
    """The message with its largest entry zero, and that entry, kept as a dimension of one."""
    peak = _finite(message.detach().amax(dim, keepdim=True))
    return message - peak, peak


def _first(chain: _Chain) -> Tensor:
    """ln π + ln b of the first step, (B, K)."""
    first = chain.initial + chain.emission[:, 0]
    if chain.lengths is None:
        return first
    return torch.where((chain.lengths > 0)[:, None], first, 0.0)


def _log_steps(chain: _Chain, *, backward: bool = False) -> Iterator[Tensor]:
    """ln A_t + ln b_{t+1} for each t, (B or 1, K, K); beyond a sequence's end the identity."""
    stay = _log_identity(chain)
    for t in reversed(range(chain.T - 1)) if backward else range(chain.T - 1):
        step = chain.transition_at(t) + chain.emission[:, t + 1, None, :]
        if chain.lengths is not None:
            step = torch.where((chain.lengths > t + 1)[:, None, None], step, stay)
        yield step


def _all_log_steps(chain: _Chain) -> Tensor:
    """The same at once, (B, T−1, K, K)."""
    steps = chain.transition + chain.emission[:, 1:, None, :]
    if chain.lengths is None:
        return steps
    return torch.where(chain.exists()[:, 1:, None, None], steps, _log_identity(chain))


def _log_identity(chain: _Chain) -> Tensor:
    return torch.eye(chain.K, dtype=chain.emission.dtype, device=chain.emission.device).log()


def _log_matmul(left: Tensor, right: Tensor) -> Tensor:
    """ln (e^left e^right) for (…, K, K), in pieces where no gradient needs the whole."""
    if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
        return _log_sum_exp(left[..., :, :, None] + right[..., None, :, :], -2)
    shape, K = left.shape, left.shape[-1]
    # a piece of 2^18 numbers stays in a CPU's cache; a GPU wants to be busy
    size = (1 << 18 if left.device.type == "cpu" else 1 << 26) // K**3 + 1
    pieces = zip(
        left.reshape(-1, K, K).split(size), right.reshape(-1, K, K).split(size), strict=True
    )
    found = [_log_sum_exp(a[:, :, :, None] + b[:, None, :, :], -2) for a, b in pieces]
    return torch.cat(found).reshape(shape)


def _log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """torch.logsumexp, with a gradient of zero instead of NaN where everything is −inf."""
    peak = _finite(x.detach().amax(dim, keepdim=True))
    total = (x - peak).exp().sum(dim)
    nothing = total == 0
    result = torch.where(nothing, 1.0, total).log() + peak.squeeze(dim)
    return torch.where(nothing, -math.inf, result)


def _finite(peak: Tensor) -> Tensor:
    """Zero instead of −inf: what may be subtracted."""
    return torch.where(peak == -math.inf, 0.0, peak)


def _log_marginals(alpha: Tensor, beta: Tensor, chain: _Chain) -> Tensor:
    marginals = _probabilities(alpha + beta, -1)
    if chain.lengths is None:
        return marginals
    return torch.where(chain.exists()[..., None], marginals, 0.0)


def _log_pairwise(alpha: Tensor, beta: Tensor, chain: _Chain) -> Tensor:
    logs = alpha[:, :-1, :, None] + chain.transition + (chain.emission + beta)[:, 1:, None, :]
    if chain.lengths is not None:
        logs = torch.where(chain.exists()[:, 1:, None, None], logs, -math.inf)
    return _probabilities(logs.flatten(-2), -1).unflatten(-1, (chain.K, chain.K))


def _probabilities(logs: Tensor, dim: int) -> Tensor:
    """softmax, but zeros where everything is −inf."""
    return (logs - _finite(_log_sum_exp(logs, dim)).unsqueeze(dim)).exp()


# ----------------------------------------------------------------------------------------- gradient


class _LogSum(torch.autograd.Function):
    """ln Z of a chain with one batch dimension, (B,)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, initial: Tensor, transition: Tensor, emission: Tensor, chain: _Chain, method: str
    ) -> Tensor:
        posterior = _posterior(
            replace(chain, initial=initial, transition=transition, emission=emission), method, None
        )
        ctx.save_for_backward(initial, transition, emission)
        ctx.lengths, ctx.batch_shape, ctx.method = chain.lengths, chain.batch_shape, method
        ctx.posterior = posterior if any(ctx.needs_input_grad) else None
        return posterior.log_evidence

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = grads
        if torch.is_grad_enabled():
            initial, transition, emission = ctx.saved_tensors
            chain = _Chain(initial, transition, emission, ctx.lengths, ctx.batch_shape)
            found = _differentiable_gradient(chain, weight, _must_scan(chain, ctx.method))
            return (*found, None, None)
        posterior, wanted = ctx.posterior, ctx.needs_input_grad
        weighted = posterior.marginals * weight[:, None, None]
        return (
            weighted[:, 0] if wanted[0] else None,
            posterior.counts(weight) if wanted[1] else None,
            weighted if wanted[2] else None,
            None,
            None,
        )


def _differentiable_gradient(
    chain: _Chain, weight: Tensor, scan: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradient as a differentiable function of the factors and of ``weight``."""
    alpha, beta, _ = _log_messages(chain, scan)
    marginals = _log_marginals(alpha, beta, chain) * weight[:, None, None]
    pairs = _log_pairwise(alpha, beta, chain) * weight[:, None, None, None]
    return marginals[:, 0], _sum_to(pairs, chain), marginals

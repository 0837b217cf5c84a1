r"""EM as alternating maximisation of the ELBO, with a guide for q.

.. math:: \ln p_θ(y) = \mathrm{ELBO}(θ, φ) + KL(q_φ(z | y), p_θ(z | y))

The E-step raises the ELBO over the guide's parameters φ, the M-step over the model's θ; neither
changes the other's. Where the model can be summed exactly, ln p(y) and with it the KL are known
after every half-step: an E-step lowers the KL at fixed ln p(y), an M-step raises the ELBO.

A guide whose sites are enumerated has an exact ELBO, and discrete sites are where they can be.
Otherwise each half-step climbs the mean over draws that stay the same for the whole fit (a sample
average approximation). The guide fits these draws, so that their mean is too high; what is reported
is the mean over other draws, which it has not seen.

Source: Neal and Hinton 1998, "A view of the EM algorithm that justifies incremental, sparse, and
other variants".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from lvppl.checks import check
from lvppl.errors import ProgramError
from lvppl.evidence import log_evidence
from lvppl.factor_graph import enumerating
from lvppl.inference.fit import Fit, History, versions
from lvppl.inference.gradient_step import raise_by_gradient
from lvppl.inference.progress import Progress
from lvppl.inference.state import FitState, modules_of
from lvppl.layout import layout_of
from lvppl.missing import with_missing
from lvppl.objectives import ELBO
from lvppl.seeding import derived_seed, seeded
from lvppl.tracing import trace_pair

__all__ = ["HalfSteps", "alternate"]

Program = Callable[..., Any]

_PARTICLES = 16
_MUCH = 0.01  # nats per datum by which draws may be fitted before it is said


class HalfSteps(History):
    """``elbo``, ``kl`` and ``log_evidence`` after every half-step, in nats, summed over the data.

    The first entry is before the first; then the E-step and the M-step of each iteration in turn.
    ``kl`` and ``log_evidence`` are there where the model can be summed exactly. ``objective`` is
    the ELBO after each M-step, ``loss`` its negative.
    """

    unit = "nats, summed over the data"

    def __init__(self, elbo: list[float], evidence: list[float]) -> None:
        after = elbo[::2]
        super().__init__(-torch.tensor(after, dtype=torch.float64), ())
        self._more = {"elbo": np.array(elbo), "objective": np.array(after)}
        if not any(math.isnan(value) for value in evidence):
            self._more["log_evidence"] = np.array(evidence)
            self._more["kl"] = np.array(evidence) - np.array(elbo)

    @property
    def _arrays(self) -> dict[str, np.ndarray]:  # type: ignore[override]
        return {"loss": -self._more["objective"], **self._more}


def alternate(
    model: Program,
    guide: Program,
    data: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    objective: ELBO | None,
    max_iter: int,
    tol: float,
    num_gradient_steps: int,
    seed: int,
    state: FitState,
    device: torch.device,
    progress: bool,
    missing: str | None = None,
) -> Fit:
    """Half-steps until an iteration gains less than ``tol`` nats per datum; see :class:`lvppl.EM`.

    Raises:
        ProgramError: model and guide do not fit each other, or one has no parameter.
    """
    handled, reading = with_missing(model, guide, missing)
    try:
        with state.active(), seeded(derived_seed(seed, "prepare"), device):
            state.add_modules(modules_of(model, guide))
            with state.discovering(), state.buffers_preserved(), torch.no_grad(), poutine.block():
                trace_pair(handled, reading, data, kwargs)
            check(model, guide, *data, missing=missing, **kwargs)
            state.claim()
            phi, theta = _split(reading, state, data, kwargs)
        with state.active(), state.buffers_preserved():
            bound = _bound(handled, reading, data, dict(kwargs), objective, seed, device)
            climb = _Climb(bound, phi, theta)
            climb.run(max_iter, tol, num_gradient_steps, progress)
    finally:
        state.finish()
    return Fit(
        model=model,
        guide=guide,
        objective=bound.objective,
        status=climb.status,
        reason=climb.reason,
        seed=seed,
        num_steps=climb.num_iterations,
        num_epochs=climb.num_iterations,
        history=HalfSteps(climb.elbo, climb.evidence),
        versions=versions(),
        settings={
            "batch_size": None,
            "tol": tol,
            "device": str(device),
            "strict": True,
            "missing": missing,
        },
        state=state,
        prototype=(data, dict(kwargs)),
    )


def _bound(
    model: Program, guide: Program, data: Any, kwargs: Any, objective: Any, seed: int, device: Any
) -> _Bound:
    """The bound with the guide's discrete sites enumerated, where that can be."""
    found = _Bound(model, guide, data, kwargs, objective, seed, device)
    if objective is None:
        enumerated = _Bound(model, enumerating(guide), data, kwargs, None, seed, device)
        try:
            enumerated.value()
            found = enumerated
        except ProgramError:  # some sites are enumerated in the model
            pass
    score = layout_of(model, found.guide, data, kwargs).score_sites
    if score:
        raise ProgramError(
            f"The guide draws '{score[0]}' in a way that has no derivative, so that draws which "
            "stay the same do not make one function to climb. Use lvppl.SVI, or a finite support, "
            'enumerated by infer={"enumerate": "parallel"}.'
        )
    return found


class _Bound:
    """The ELBO as one function of the parameters: the same draws at every call."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: tuple[Any, ...],
        kwargs: dict[str, Any],
        objective: ELBO | None,
        seed: int,
        device: torch.device,
    ) -> None:
        self.model, self.guide, self.data, self.kwargs = model, guide, data, kwargs
        self.objective = objective or ELBO(num_particles=_PARTICLES)
        self.seed, self.device = derived_seed(seed, "draws"), device

    def __call__(self, draws: str = "fitted") -> Tensor:
        with seeded(derived_seed(self.seed, draws), self.device):
            loss = self.objective.differentiable_loss(
                self.model, self.guide, *self.data, **self.kwargs
            )
        return -loss

    def value(self, draws: str = "fitted") -> float:
        """The ELBO over the draws that are climbed, ``"fitted"``, or over others, ``"other"``."""
        with torch.no_grad():
            return float(self(draws))

    def evidence(self) -> float:
        """ln p(y), or NaN where the model has no exact sum."""
        try:
            with torch.no_grad():
                return float(log_evidence(self.model, *self.data, **self.kwargs))
        except ProgramError:
            return math.nan

    def num_data(self) -> int:
        report = self.objective.report(self.model, self.guide, *self.data, **self.kwargs)
        return max(len(report.elbo.per_datum), 1)


def _split(
    guide: Program, state: FitState, data: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """The guide's parameters, and the others, which are the model's."""
    with torch.no_grad(), poutine.block():
        names = poutine.trace(guide, param_only=True).get_trace(*data, **kwargs).param_nodes
    store = pyro.get_param_store()
    known = {id(store._params[name]) for name in names if name in store._params}
    tensors = state.tensors()
    phi = [tensor for tensor in tensors.values() if id(tensor) in known]
    theta = [tensor for tensor in tensors.values() if id(tensor) not in known]
    for role, found in (("guide", phi), ("model", theta)):
        if not found:
            raise ProgramError(
                f"the {role} has no parameter, so that one half-step of EM has nothing to do. "
                "Write pyro.param(name, value) in it, or use lvppl.SVI."
            )
    return phi, theta


class _Climb:
    """Half-steps in turn, and the values after each.

    Attributes:
        fitted, elbo, evidence: before the first half-step and after each, nats, always of one
            length: the bound over the draws that are climbed, over others, and ln p(y).
        status, reason: how it ended.
    """

    def __init__(self, bound: _Bound, phi: list[Tensor], theta: list[Tensor]) -> None:
        self.bound, self.halves = bound, (phi, theta)
        self.fitted = [bound.value()]
        self.elbo, self.evidence = [bound.value("other")], [bound.evidence()]
        self.status, self.reason = "running", ""

    def run(self, max_iter: int, tol: float, num_gradient_steps: int, progress: bool) -> None:
        """Until an iteration gains less than ``tol`` nats per datum, or ``max_iter`` of them."""
        num_data = self.bound.num_data()
        shown = Progress(max_iter, 0, progress)
        try:
            while self.status == "running":
                for tensors in self.halves:
                    self._half_step(tensors, num_gradient_steps)
                shown.show(self.num_iterations, lambda: f"ELBO {self.elbo[-1]:.6g} nats")
                self._look(max_iter, tol, num_data)
        except KeyboardInterrupt:
            if len(self.elbo) % 2 == 0:  # between the half-steps: an M-step that does nothing
                self._append(self.fitted[-1], self.elbo[-1], self.evidence[-1])
            self.status = "interrupted"
            self.reason = f"interrupted after {self.num_iterations} iterations"
        finally:
            shown.close()

    @property
    def num_iterations(self) -> int:
        return (len(self.elbo) - 1) // 2

    def _half_step(self, tensors: list[Tensor], num_gradient_steps: int) -> None:
        """One half-step and its value: both, or neither if it is interrupted."""
        before = [tensor.detach().clone() for tensor in tensors]
        try:
            raise_by_gradient(self.bound, tensors, num_steps=num_gradient_steps)
            fitted, value = self.bound.value(), self.bound.value("other")
            evidence = self.bound.evidence()
        except KeyboardInterrupt:
            with torch.no_grad():
                for tensor, kept in zip(tensors, before, strict=True):
                    tensor.copy_(kept)
            raise
        self._append(fitted, value, evidence)

    def _append(self, fitted: float, value: float, evidence: float) -> None:
        self.fitted.append(fitted)
        self.elbo.append(value)
        self.evidence.append(evidence)

    def _look(self, max_iter: int, tol: float, num_data: int) -> None:
        iteration = self.num_iterations
        gain = (self.fitted[-1] - self.fitted[-3]) / num_data
        if not math.isfinite(self.fitted[-1]):
            self.status = "diverged"
            self.reason = f"the ELBO is {self.fitted[-1]} in iteration {iteration}"
        elif gain < tol:
            self.status = "converged"
            self.reason = (
                f"iteration {iteration} gained {gain:.2g} nats per datum, less than tol={tol:g}"
            )
        elif iteration >= max_iter:
            self.status, self.reason = "max_steps", f"all {max_iter} iterations are done"
        excess = (self.fitted[-1] - self.elbo[-1]) / num_data
        if self.status != "running" and excess > _MUCH:
            self.reason += (
                f"; over the draws that were climbed the ELBO is {excess:.2g} nats per datum "
                "higher than over others: take more, EM(..., objective=ELBO(num_particles=...))"
            )

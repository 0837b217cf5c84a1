"""The training loop of one fit, and everything it needs to stop and go on.

A step computes the loss of a minibatch, its gradient, and moves the parameters. The fit's state and
random stream are in place while steps run, and never while a callback runs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lvppl.data.batches import Minibatches
from lvppl.errors import ProgramError, ProgramFailure
from lvppl.inference.diagnose import clear, diagnose
from lvppl.inference.minibatch import gather, num_rows, scaled_minibatch, transformed
from lvppl.inference.optimizers import Mover
from lvppl.inference.progress import Progress
from lvppl.inference.state import FitState
from lvppl.seeding import Generators, RandomStream, derived_seed

__all__ = ["Evaluation", "Stop", "Training"]

_NOT_FINITE = (ValueError, torch.linalg.LinAlgError)
"""What validation and factorisations raise where a value is NaN or infinite."""

_WINDOW = 50
"""Steps between two looks at whether all was finite, where a look waits for the device."""


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, in nats per row of the data; None where not known.

    ``elbo``, ``rate`` and ``distortion`` are about the training data, from one minibatch that is
    the same each time; ``validation_elbo`` is about all of the validation data.
    """

    step: int
    epoch: int
    elbo: float
    rate: float | None
    distortion: float | None
    validation_elbo: float | None


@dataclass(frozen=True)
class Stop:
    """Why the fit ended: one of the statuses, and a sentence."""

    status: str
    reason: str


@dataclass
class Plan:
    """What the user asked for, checked; the same for the whole run."""

    model: Callable[..., Any]
    guide: Callable[..., Any]
    objective: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    data_plates: tuple[str, ...]
    batch_size: int | None
    max_steps: int
    max_epochs: int | None
    clip_norm: float | None
    validation: tuple[Any, ...] | None
    evaluate_every: int
    tolerance: float | None
    patience: int
    transform: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None
    device: torch.device
    seed: int
    callbacks: tuple[Callable[[Any], Any], ...] = ()
    progress: bool = True
    strict: bool = True
    missing: str | None = None

    @property
    def rows(self) -> int | None:
        return num_rows(self.args)

    @property
    def batches_per_epoch(self) -> int:
        return 1 if self.batch_size is None else -(-(self.rows or 1) // self.batch_size)


@dataclass
class Position:
    """Where a run is: numbers done so far, and the random state at the start of the epoch."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    closed: int = 0
    """Epochs whose end has been seen to."""
    order_state: Tensor | None = None


@dataclass
class Training:
    """A run in progress: the plan, the fit's state, and the position."""

    plan: Plan
    state: FitState
    mover: Mover
    stream: RandomStream
    position: Position = field(default_factory=Position)
    evaluations: list[Evaluation] = field(default_factory=list)
    best: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
    best_elbo: float = -float("inf")
    stop: Stop | None = None

    def __post_init__(self) -> None:
        plan = self.plan
        for schedule in _schedules(plan.objective):
            schedule.to(plan.device)
        self.losses = torch.empty(plan.max_steps, dtype=torch.float64, device=plan.device)
        self.order = torch.Generator(plan.device)
        self.order.manual_seed(derived_seed(plan.seed, "order"))
        # Looking at a flag waits for a GPU, so there it is read once per window.
        self.window = 1 if plan.device.type == "cpu" else _WINDOW
        self.num_known = 0
        self.all_finite = torch.ones((), dtype=torch.bool, device=plan.device)

    # ---------------------------------------------------------------------------------- loop

    def run(self, in_progress: Callable[[], Any]) -> Stop:
        """Train until something stops the fit; ``in_progress()`` makes what callbacks get."""
        progress = Progress(self.plan.max_steps, self.position.step, self.plan.progress)
        try:
            while self.stop is None:
                epoch = self.position.closed
                with self.state.active(), self.stream, torch.enable_grad():
                    self._train(progress)
                if self.position.closed > epoch:
                    self._call_back(in_progress)
        except KeyboardInterrupt:
            kept = "the best" if self.best is not None else "the last"
            reason = f"interrupted after {self.position.step} steps; {kept} parameters are kept"
            self.stop = Stop("interrupted", reason)
        finally:
            progress.show(self.position.step, self._text, force=True)
            progress.close()
        return self.stop

    def _train(self, progress: Progress) -> None:
        """Whole epochs, one where callbacks wait for its end, else as many as there are."""
        self._close_epoch()  # of a fit that was interrupted just there
        self._limits()
        while self.stop is None:
            self._epoch(progress)
            closed = self._close_epoch()
            self._limits()
            if closed and self.plan.callbacks:
                return

    def _close_epoch(self) -> bool:
        """Once after each epoch: evaluate, see whether to stop, step the scheduler."""
        epoch = self.position.epoch
        if self.position.closed == epoch:
            return False
        if epoch % self.plan.evaluate_every == 0:
            self.evaluate()
            self._see_whether_converged()
        self.mover.end_epoch(self._last_loss)
        self.position.closed = epoch
        return True

    def _limits(self) -> None:
        plan, done = self.plan, self.position
        if self.stop is None and plan.max_epochs is not None and done.epoch >= plan.max_epochs:
            self.stop = Stop("max_steps", f"all {plan.max_epochs} epochs are done")
        if self.stop is None and done.step >= plan.max_steps:
            self.stop = Stop("max_steps", f"all {plan.max_steps} steps are done")

    def _call_back(self, in_progress: Callable[[], Any]) -> None:
        for callback in self.plan.callbacks:
            try:
                callback(in_progress())
            except StopIteration as said:
                name = getattr(callback, "__name__", type(callback).__name__)
                why = f": {said}" if str(said) else ""
                reason = f"callback {name} ended the fit after epoch {self.position.epoch}{why}"
                self.stop = Stop("interrupted", reason)
                return

    def _epoch(self, progress: Progress) -> None:
        """The steps of one epoch that are still to be done."""
        batches = self._batches()
        while self.position.batch < len(batches) and self.position.step < self.plan.max_steps:
            left = min(len(batches) - self.position.batch, self.plan.max_steps - self.position.step)
            self._run_window(batches, min(self.window, left))
            self.num_known = self.position.step
            if self.stop is not None:
                return
            progress.show(self.position.step, self._text)
        if self.position.batch == len(batches):
            self.position.batch, self.position.order_state = 0, None
            self.position.epoch += 1

    def _batches(self) -> list[Tensor | None]:
        """Row indices of each batch of this epoch; the same again for a resumed epoch."""
        if self.plan.batch_size is None:
            return [None]
        if self.position.order_state is None:
            self.position.order_state = self.order.get_state()
        self.order.set_state(self.position.order_state)
        rows = self.plan.rows
        assert rows is not None
        size, device = self.plan.batch_size, self.plan.device
        return list(Minibatches(rows, size, generator=self.order, device=device))

    # ---------------------------------------------------------------------------------- steps

    def _run_window(self, batches: list[Tensor | None], length: int) -> None:
        """Some steps; where they are not looked at one by one, all are redone if one was bad."""
        if self.window == 1:
            self._careful_step(batches[self.position.batch])
            return
        before = self._snapshot()
        self.all_finite.fill_(True)
        try:
            for _ in range(length):
                self._free_step(batches[self.position.batch])
            if bool(self.all_finite):
                return
        except (ValueError, RuntimeError):
            pass  # step by step, the same error comes again and is explained
        except BaseException:
            self._undo(before)
            raise
        self._undo(before)
        for _ in range(length):
            self._careful_step(batches[self.position.batch])
            if self.stop is not None:
                return

    def _batch(self, index: Tensor | None) -> tuple[Any, ...]:
        args = self.plan.args
        if index is not None:
            assert self.plan.rows is not None
            args = gather(args, index, self.plan.rows)
        return transformed(self.plan.transform, args)

    def _scaled(self, rows: int | None) -> Any:
        if self.plan.batch_size is None or rows is None:
            return nullcontext()
        return scaled_minibatch(self.plan.data_plates, rows)

    def _loss(self, index: Tensor | None) -> Tensor:
        plan = self.plan
        for schedule in _schedules(plan.objective):
            schedule.advance_to(self.position.step)
        batch = self._batch(index)
        with self._scaled(plan.rows):
            return loss_of(plan.objective, plan.model, plan.guide, batch, plan.kwargs)

    def _gradients(self, index: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Loss, total gradient norm, and the gradients, which are left in the parameters."""
        loss = self._loss(index)
        if not loss.requires_grad:
            raise ProgramError(
                "the loss does not depend on any parameter: neither the model nor the guide has "
                "one. Use pyro.param, pyro.module or a PyroModule for what is to be learned."
            )
        self.state.claim_new()
        loss.backward()
        grads = [p.grad for p in self.state.tensors().values() if p.grad is not None]
        return loss.detach(), total_norm(grads, loss), grads

    def _move(self, loss: Tensor, norm: Tensor, grads: list[Tensor]) -> None:
        if self.plan.clip_norm is not None:
            factor = (self.plan.clip_norm / (norm + 1e-12)).clamp(max=1.0)
            torch._foreach_mul_(grads, [factor.to(g) for g in grads])
        params = self.state.tensors()
        self.mover.step({name: p for name, p in params.items() if p.grad is not None})
        clear(params.values())
        self.losses[self.position.step] = loss
        self.position.step += 1
        self.position.batch += 1

    def _free_step(self, index: Tensor | None) -> None:
        loss, norm, grads = self._gradients(index)
        self.all_finite.logical_and_(loss.isfinite() & norm.isfinite())
        self._move(loss, norm, grads)

    def _careful_step(self, index: Tensor | None) -> None:
        """A step that moves nothing unless the loss and every gradient are finite."""
        with self._undone_if_broken() as before:
            try:
                loss, norm, grads = self._gradients(index)
            except _NOT_FINITE as error:
                if isinstance(error, ProgramError) and not isinstance(error, ProgramFailure):
                    raise
                finding = self._diagnose(index, before)
                if finding is None:
                    raise
                self._diverge(finding, before)
                return
            if not bool(norm.isfinite()) and all(bool(g.isfinite().all()) for g in grads):
                norm = total_norm([g.double() for g in grads], loss)  # only the sum overflowed
            if not bool(loss.isfinite() & norm.isfinite()):
                found = self._diagnose(index, before)
                self._diverge(found or "the loss or its gradient is not finite", before)
                return
            self._move(loss, norm, grads)

    @contextmanager
    def _undone_if_broken(self) -> Iterator[_Before]:
        """Put random state and buffers back where an exception ends a step half way."""
        buffers = [buffer.detach().clone() for buffer in self.state.buffers().values()]
        before = _Before(Generators.read(self.plan.device), buffers)
        done = self.position.step
        try:
            yield before
        except BaseException:
            if self.position.step == done:
                self._rewind(before)
            raise

    def _rewind(self, before: _Before) -> None:
        clear(self.state.tensors().values())
        with torch.no_grad():
            for buffer, value in zip(self.state.buffers().values(), before.buffers, strict=False):
                buffer.copy_(value)
        before.random.write(self.plan.device)

    def _diagnose(self, index: Tensor | None, before: _Before) -> str | None:
        self._rewind(before)
        rows = self.plan.rows if index is None else len(index)
        return diagnose(lambda: self._loss(index), self.state.tensors, batch_rows=rows, rows=index)

    def _diverge(self, finding: str, before: _Before) -> None:
        self._rewind(before)
        reason = f"step {self.position.step + 1} was not finite: {finding}; "
        self.stop = Stop("diverged", reason + "the parameters before that step are kept")

    # ----------------------------------------------------------------------------- evaluation

    def evaluate(self) -> None:
        """Evaluate at random numbers that are the same each time; remember the best."""
        plan = self.plan
        common = RandomStream(derived_seed(plan.seed, "evaluation"), plan.device)
        with self.state.active(), common, self.state.buffers_preserved(), torch.no_grad():
            elbo, rate, distortion = self._report(self._evaluation_batch(), plan.rows)
            held_out = None if plan.validation is None else self._validation_elbo()
        position = self.position
        if not self.evaluations or self.evaluations[-1].step != position.step:
            self.evaluations.append(
                Evaluation(position.step, position.epoch, elbo, rate, distortion, held_out)
            )
        if held_out is not None and held_out > self.best_elbo:
            self.best, self.best_elbo = self.state.values(), held_out

    def _evaluation_batch(self) -> tuple[Any, ...]:
        """A minibatch, the same at each evaluation."""
        if self.plan.batch_size is None:
            return self._batch(None)
        assert self.plan.rows is not None
        first = torch.randperm(self.plan.rows, device="cpu")[: self.plan.batch_size]
        return self._batch(first.to(self.plan.device))

    def _report(
        self, args: tuple[Any, ...], full_rows: int | None
    ) -> tuple[float, float | None, float | None]:
        """ELBO, rate and distortion per row; only the first for a loss without a report.

        NaN where the program cannot be evaluated: if that persists, the next step says why.
        """
        plan, rows = self.plan, full_rows or 1
        reports = hasattr(plan.objective, "report")
        try:
            with self._scaled(full_rows):
                if not reports:
                    loss = loss_of(plan.objective, plan.model, plan.guide, args, plan.kwargs)
                    return -float(loss) / rows, None, None
                report = plan.objective.report(plan.model, plan.guide, *args, **plan.kwargs)
        except _NOT_FINITE as error:
            if isinstance(error, ProgramError) and not isinstance(error, ProgramFailure):
                raise
            return (math.nan,) * 3 if reports else (math.nan, None, None)
        totals = (report.elbo.total, report.rate.total, report.distortion.total)
        elbo, rate, distortion = (float(total) / rows for total in totals)
        return elbo, rate, distortion

    def _validation_elbo(self) -> float:
        """Mean of the chunks' estimates of the whole, weighed by their rows: exact by linearity."""
        plan = self.plan
        assert plan.validation is not None
        rows = num_rows(plan.validation)
        total = 0.0
        for part, weight in self._chunks(plan.validation, rows):
            total += weight * self._report(transformed(plan.transform, part), rows)[0]
        return total

    def _chunks(
        self, args: tuple[Any, ...], rows: int | None
    ) -> Iterator[tuple[tuple[Any, ...], float]]:
        size = self.plan.batch_size
        if size is None or rows is None or rows <= size:
            yield args, 1.0
            return
        for index in torch.arange(rows, device=self.plan.device).split(size):
            yield gather(args, index, rows), len(index) / rows

    def _see_whether_converged(self) -> None:
        plan = self.plan
        if plan.tolerance is None or len(self.evaluations) < 2 * plan.patience:
            return
        what = "ELBO" if plan.validation is None else "validation ELBO"
        values = [
            e.elbo if e.validation_elbo is None else e.validation_elbo for e in self.evaluations
        ]
        earlier = values[-2 * plan.patience : -plan.patience]
        gain = fmean(values[-plan.patience :]) - fmean(earlier)
        if gain < plan.tolerance:
            self.stop = Stop(
                "converged",
                f"the mean {what} of the last {plan.patience} evaluations is {gain:.3g} nats a row "
                f"above that of the {plan.patience} before (tolerance {plan.tolerance:g})",
            )

    # ---------------------------------------------------------------------------- persistence

    def _last_loss(self) -> float:
        if self.evaluations and self.evaluations[-1].validation_elbo is not None:
            return -self.evaluations[-1].validation_elbo * (self.plan.rows or 1)
        return float(self.losses[self.position.step - 1])

    def _text(self) -> str:
        """Per row, in nats: what the bar shows."""
        if not self.evaluations:
            done, rows = self.num_known, self.plan.rows or 1
            return f"loss {float(self.losses[done - 1]) / rows:.4g}" if done else ""
        last = self.evaluations[-1]
        shown = {"elbo": last.elbo, "rate": last.rate, "distortion": last.distortion}
        if last.validation_elbo is not None:
            shown["validation elbo"] = last.validation_elbo
        return ", ".join(f"{k} {v:.4g}" for k, v in shown.items() if v is not None)

    def _snapshot(self) -> dict[str, Any]:
        """What steps change, copied."""
        with self.state.active():
            params, buffers = self.state.values()
            optimizer = copy.deepcopy(self.mover.state_dict())
        return {
            "params": params,
            "buffers": buffers,
            "optimizer": optimizer,
            "random": self.stream.state_dict(),
            "step": self.position.step,
            "epoch": self.position.epoch,
            "batch": self.position.batch,
            "closed": self.position.closed,
        }

    def _undo(self, snapshot: Mapping[str, Any]) -> None:
        self.state.forget_others(snapshot["params"])
        self._return_to(snapshot)

    def _return_to(self, snapshot: Mapping[str, Any]) -> None:
        """Undo steps of the present epoch."""
        with self.state.active():
            clear(self.state.tensors().values())
            self.state.assign(snapshot["params"], snapshot["buffers"])
            self.mover.load_state_dict(snapshot["optimizer"], self.state.tensors())
        self.stream.load_state_dict(snapshot["random"])
        self.position.step = int(snapshot["step"])
        self.position.epoch = int(snapshot["epoch"])
        self.position.batch = int(snapshot["batch"])
        self.position.closed = int(snapshot["closed"])

    def checkpoint(self) -> dict[str, Any]:
        """Everything needed to go on from here, as tensors and plain values."""
        order = self.position.order_state
        return {
            **self._snapshot(),
            "order": self.order.get_state() if order is None else order,
            "best": None if self.best is None else [dict(part) for part in self.best],
            "best_elbo": self.best_elbo,
            "losses": self.losses[: self.position.step].clone(),
            "evaluations": [vars(e).copy() for e in self.evaluations],
        }

    def resume(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from a :meth:`checkpoint`; this run's own limits stay."""
        self._return_to(checkpoint)
        self.num_known = step = self.position.step
        # The generator of the order is put into this state when the epoch begins or goes on.
        self.position.order_state = checkpoint["order"].cpu()
        if step > len(self.losses):
            self.losses = self.losses.new_empty(step)
        self.losses[:step] = checkpoint["losses"].to(self.losses)
        self.evaluations = [Evaluation(**e) for e in checkpoint["evaluations"]]
        best = checkpoint["best"]
        self.best = None if best is None else (dict(best[0]), dict(best[1]))
        self.best_elbo = float(checkpoint["best_elbo"])


@dataclass(frozen=True)
class _Before:
    """What a step may change before it moves the parameters."""

    random: Generators
    buffers: list[Tensor]


def _schedules(objective: Any) -> tuple[Any, ...]:
    return tuple(objective.schedules()) if hasattr(objective, "schedules") else ()


def loss_of(
    objective: Any,
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """The 0-dim loss that an objective, a Pyro loss or a plain callable gives."""
    function = getattr(objective, "differentiable_loss", objective)
    loss = function(model, guide, *args, **kwargs)
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ProgramError(
            f"the objective must return a 0-dim tensor, but returned {what}. Sum over the data."
        )
    return loss


def total_norm(grads: list[Tensor], like: Tensor) -> Tensor:
    """Euclidean norm of all gradients together, a 0-dim tensor on the device of the loss."""
    if not grads:
        return torch.zeros((), device=like.device)
    norms = torch._foreach_norm(grads)
    return torch.linalg.vector_norm(torch.stack([norm.to(like.device) for norm in norms]))

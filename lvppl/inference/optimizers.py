"""One interface over the optimisers that a fit accepts.

A fit needs five things of an optimiser: move the parameters that have a gradient, meet parameters
that are made late, end an epoch, tell its learning rate, and be saved by parameter name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Real
from typing import Any, Protocol

import torch
from pyro.optim import PyroLRScheduler, PyroOptim
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lvppl.errors import ProgramError

__all__ = ["Mover", "OptimizerLike", "check_positive", "make_mover"]

OptimizerLike = Callable[..., Optimizer] | PyroOptim
SchedulerLike = Callable[[Optimizer], Any]


class Mover(Protocol):
    """What a fit needs of an optimiser."""

    def step(self, params: Mapping[str, Tensor]) -> None:
        """Move the parameters, whose gradients are set."""

    def end_epoch(self, loss: float | Callable[[], float]) -> None:
        """Step schedulers that go by epochs."""

    def learning_rate(self) -> float | None:
        """Learning rate of the first parameter group; None before the first step, or without."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, by parameter name."""

    def load_state_dict(self, state: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` returned, for the same parameters."""


class TorchMover:
    """A torch optimiser over all parameters at once; late parameters become a new group."""

    def __init__(
        self,
        factory: Callable[[Iterable[Tensor]], Optimizer],
        scheduler: SchedulerLike | None,
        by_epoch: bool,
    ) -> None:
        self.factory = factory
        self.scheduler_factory = scheduler
        self.by_epoch = by_epoch
        self.groups: list[list[str]] = []
        self.known: dict[str, Tensor] = {}
        self.optimizer: Optimizer | None = None
        self.scheduler: Any = None

    def _meet(self, params: Mapping[str, Tensor]) -> None:
        if all(self.known.get(name) is tensor for name, tensor in params.items()):
            return
        changed = [name for name in params if name in self.known]
        if any(self.known[name] is not params[name] for name in changed):
            raise ProgramError(
                "a parameter was replaced by another tensor during the fit; change parameters in "
                "place (`param.data.copy_(...)`) instead."
            )
        new = {name: tensor for name, tensor in params.items() if name not in self.known}
        self.known |= new
        self.groups.append(list(new))
        if self.optimizer is None:
            self.optimizer = self.factory(list(new.values()))
            if not isinstance(self.optimizer, Optimizer):
                raise ProgramError(
                    f"optimizer(parameters) must return a torch.optim.Optimizer, but returned "
                    f"{type(self.optimizer).__name__}."
                )
            if self.scheduler_factory is not None:
                self.scheduler = self.scheduler_factory(self.optimizer)
        else:
            self.optimizer.add_param_group({"params": list(new.values())})

    def step(self, params: Mapping[str, Tensor]) -> None:
        self._meet(params)
        if self.optimizer is None:
            return
        self.optimizer.step()
        if self.scheduler is not None and not self.by_epoch:
            self.scheduler.step()

    def end_epoch(self, loss: float | Callable[[], float]) -> None:
        if self.scheduler is None or not self.by_epoch:
            return
        if isinstance(self.scheduler, ReduceLROnPlateau):
            self.scheduler.step(loss() if callable(loss) else loss)
        else:
            self.scheduler.step()

    def learning_rate(self) -> float | None:
        return None if self.optimizer is None else _rate(self.optimizer)

    def state_dict(self) -> dict[str, Any]:
        return {
            "groups": [list(names) for names in self.groups],
            "optimizer": None if self.optimizer is None else self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        self.groups, self.known, self.optimizer, self.scheduler = [], {}, None, None
        for names in state["groups"]:
            self._meet({**self.known, **{name: params[name] for name in names}})
        if self.optimizer is not None:
            _load_same(self.optimizer, state["optimizer"])
        if (self.scheduler is None) != (state["scheduler"] is None):
            raise ProgramError("the fit to be resumed was saved with another scheduler.")
        if self.scheduler is not None:
            self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))


def _load_same(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Load the state of the same kind of optimiser, and no other's."""
    mine = set(optimizer.state_dict()["param_groups"][0])
    given = set(state["param_groups"][0])
    if mine - {"initial_lr"} != given - {"initial_lr"}:
        raise ProgramError(
            f"the fit to be resumed was saved with another optimiser: this one has the options "
            f"{sorted(mine)}, that one {sorted(given)}."
        )
    optimizer.load_state_dict(copy.deepcopy(dict(state)))


class PyroMover:
    """A Pyro optimiser: one torch optimiser a parameter, with clipping and options of its own."""

    def __init__(self, optim: PyroOptim) -> None:
        self.optim = copy.copy(optim)
        # The user's object may have served another fit: its states belong to that one.
        self.optim.optim_objs = {}
        self.optim.grad_clip = {}
        self.optim._state_waiting_to_be_consumed = {}

    def step(self, params: Mapping[str, Tensor]) -> None:
        self.optim(list(params.values()))

    def end_epoch(self, loss: float | Callable[[], float]) -> None:
        if not isinstance(self.optim, PyroLRScheduler):
            return
        plateau = any(isinstance(s, ReduceLROnPlateau) for s in self.optim.optim_objs.values())
        if plateau:
            self.optim.step(loss() if callable(loss) else loss)
        else:
            self.optim.step()

    def learning_rate(self) -> float | None:
        for item in self.optim.optim_objs.values():
            return _rate(getattr(item, "optimizer", item))
        return None

    def state_dict(self) -> dict[str, Any]:
        waiting = self.optim._state_waiting_to_be_consumed
        return {"pyro": {**waiting, **self.optim.get_state()}}

    def load_state_dict(self, state: Mapping[str, Any], params: Mapping[str, Tensor]) -> None:
        if "pyro" not in state:
            raise ProgramError("the fit to be resumed was saved with a torch optimiser, not Pyro's")
        self.optim.optim_objs = {}
        self.optim.grad_clip = {}
        self.optim._state_waiting_to_be_consumed = copy.deepcopy(dict(state["pyro"]))


def _rate(optimizer: Optimizer) -> float | None:
    rate = optimizer.param_groups[0].get("lr")
    return None if rate is None else float(rate)


def check_positive(name: str, value: Any, *, zero: bool = False) -> None:
    """Refuse what is neither None nor a positive finite number."""
    if value is None:
        return
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        kind = "at least 0" if zero else "positive"
        raise ProgramError(f"{name} must be {kind} and finite, a number, but is {value!r}")


def make_mover(
    optimizer: OptimizerLike | None,
    learning_rate: float | None,
    scheduler: SchedulerLike | None,
    scheduler_interval: str,
) -> Mover:
    """The :class:`Mover` for what a user gave.

    :raises ProgramError: where the optimiser is of none of the accepted kinds.
    """
    if scheduler_interval not in ("epoch", "step"):
        raise ProgramError(
            f"scheduler_interval must be 'epoch' or 'step', but is {scheduler_interval!r}"
        )
    check_positive("learning_rate", learning_rate)
    if scheduler is not None and not callable(scheduler):
        raise ProgramError(
            "scheduler must be a callable from an optimiser to a scheduler, such as "
            "lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99), but is "
            f"{type(scheduler).__name__}."
        )
    if isinstance(optimizer, PyroOptim):
        if learning_rate is not None or scheduler is not None:
            raise ProgramError(
                "a Pyro optimizer carries its own learning rate and scheduler: give them in its "
                'arguments, as in pyro.optim.Adam({"lr": 1e-3}), or give a torch.optim class.'
            )
        return PyroMover(optimizer)
    if isinstance(optimizer, Optimizer):
        raise ProgramError(
            "optimizer is an optimiser already built over parameters, but a fit makes its own: "
            "give the class, or functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)."
        )
    if optimizer is None:
        optimizer, learning_rate = (
            torch.optim.Adam,
            1e-3 if learning_rate is None else learning_rate,
        )
    if not callable(optimizer):
        raise ProgramError(
            "optimizer must be a torch.optim class, a callable from parameters to an optimiser, or "
            f"a Pyro optimizer, but is {optimizer!r}"
        )
    if getattr(optimizer, "func", optimizer) is torch.optim.LBFGS:
        raise ProgramError(
            "torch.optim.LBFGS evaluates the loss many times a step, which a stochastic loss does "
            "not allow. Use a first-order optimiser such as torch.optim.Adam."
        )
    options: dict[str, Any] = {} if learning_rate is None else {"lr": learning_rate}
    build: Callable[..., Optimizer] = optimizer
    return TorchMover(
        lambda params: build(params, **options), scheduler, scheduler_interval == "epoch"
    )

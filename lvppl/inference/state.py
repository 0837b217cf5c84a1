"""The parameters and buffers that belong to one fit.

Pyro keeps parameters in one global store, and modules keep theirs in tensors that any number of
fits may share. A :class:`FitState` has a parameter store of its own and takes turns on shared
tensors: when another fit takes a tensor, its owner's values are put aside and copied back, in
place, when the owner goes on.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.distributions import transform_to
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from lvppl.errors import ProgramError

__all__ = ["FitState", "modules_of"]

Values = dict[str, Tensor]


def modules_of(*programs: Callable[..., Any] | None) -> list[nn.Module]:
    """The modules that programs are, are methods of, or close over, without repetition."""
    found: dict[int, nn.Module] = {}
    pending: list[Any] = [program for program in programs if program is not None]
    seen: set[int] = set()
    while pending:
        item = pending.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
        elif isinstance(item, functools.partial):
            pending += [item.func, *item.args, *item.keywords.values()]
        elif inspect.ismethod(item):
            pending += [item.__self__, item.__func__]
        elif inspect.isfunction(item):
            pending += _closed_over(item)
    return list(found.values())


def _closed_over(function: Callable[..., Any]) -> list[Any]:
    """Modules and functions in the closure, and modules among the globals that it names."""
    try:
        variables = inspect.getclosurevars(function)
    except (ValueError, TypeError):  # an empty cell: a name that is not bound yet
        return []
    inner = [v for v in variables.nonlocals.values() if isinstance(v, nn.Module) or callable(v)]
    return inner + [v for v in variables.globals.values() if isinstance(v, nn.Module)]


@dataclass
class _Record:
    """What is known about one shared parameter tensor, or one module's buffers."""

    owner: weakref.ref[FitState] | None
    start: list[Tensor]  # values before any fit
    left: list[Tensor] | None = None  # values that the last finished fit left behind


# Weak and by identity: tensors have no usable equality, and must not be kept alive by this.
_registry: WeakIdKeyDictionary = WeakIdKeyDictionary()
_entered: list[FitState] = []


def _clones(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _copy(targets: list[Tensor], values: list[Tensor]) -> None:
    with torch.no_grad():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)


def _equal(first: list[Tensor], second: list[Tensor]) -> bool:
    if [tensor.shape for tensor in first] != [tensor.shape for tensor in second]:
        return False
    return all(torch.equal(a.detach(), b.to(a)) for a, b in zip(first, second, strict=True))


class FitState:
    """Parameters (unconstrained, by name) and module buffers of one fit.

    While a fit is running its values live in the tensors themselves; ``with state.active():``
    brings them and the fit's parameter store into place. :meth:`finish` freezes the values: from
    then on ``active()`` copies them in for the block only, so what a user does to a module
    afterwards does not change a finished fit.

    A new fit that meets a tensor of an earlier fit starts from the value that the tensor had
    before that fit, so that the same seed gives the same run. Values that the user set in between
    are the new start.

    :param device: where fresh tensors of the program are made while the state is active; None
        leaves that to the program.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self._store: Any = {"params": {}, "constraints": {}}
        self._modules: dict[str, nn.Module] = {}
        self._aside: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._frozen: tuple[Values, Values] | None = None
        self._num_claimed = 0

    # ------------------------------------------------------------------------------- values

    @property
    def is_finished(self) -> bool:
        return self._frozen is not None

    def tensors(self) -> Values:
        """The parameter tensors themselves, unconstrained, by name."""
        if _entered and _entered[-1] is self:
            return dict(pyro.get_param_store().named_parameters())
        return dict(self._store["params"])

    def buffers(self) -> Values:
        """The buffer tensors themselves of the modules that the program runs, by name."""
        named = {}
        for label, module in self._modules.items():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    named[f"{label}.{name}"] = buffer
        return named

    def values(self) -> tuple[Values, Values]:
        """Copies of the fit's unconstrained parameters and buffers, by name."""
        if self._frozen is not None:
            params, buffers = self._frozen
            return dict(params), dict(buffers)
        with self.active():
            params = {name: value.detach().clone() for name, value in self.tensors().items()}
            buffers = {name: value.detach().clone() for name, value in self.buffers().items()}
        return params, buffers

    def constrained(self) -> Values:
        """Copies of the fit's parameters as the program sees them, by name."""
        params, _ = self.values()
        constraints = self.constraints()
        with torch.no_grad():
            return {n: transform_to(constraints[n])(v).clone() for n, v in params.items()}

    def constraints(self) -> dict[str, Any]:
        """The constraint of each parameter, by name."""
        if _entered and _entered[-1] is self:
            return dict(pyro.get_param_store().get_state()["constraints"])
        return dict(self._store["constraints"])

    def assign(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
        """Copy values into the running fit, in place.

        :raises ProgramError: naming the first parameter or buffer whose name or shape differs.
        """
        with self.active():
            for what, mine, given in (
                ("parameter", self.tensors(), params),
                ("buffer", self.buffers(), buffers),
            ):
                require_same(what, mine, given)
                _copy([mine[name] for name in given], list(given.values()))

    # ------------------------------------------------------------------------------ activity

    @contextmanager
    def active(self) -> Iterator[FitState]:
        """Put the fit's store and values in place; parameters made inside are kept, always."""
        if _entered and _entered[-1] is self:
            yield self
            return
        store = pyro.get_param_store()
        outside = store.get_state()
        with ExitStack() as stack:
            store.clear()
            store.set_state(self._store)
            stack.callback(self._leave, outside)
            _entered.append(self)
            if self._frozen is None:
                self.claim()
            else:
                stack.enter_context(self._swapped_in(*self._frozen))
            if self.device is not None and self.device.type != "cpu":
                stack.enter_context(self.device)
            yield self

    def _leave(self, outside: Any) -> None:
        store = pyro.get_param_store()
        if self._frozen is None:
            self._store = store.get_state()
        store.clear()
        store.set_state(outside)
        _entered.remove(self)
        if _entered and not _entered[-1].is_finished:
            _entered[-1].claim()  # a fit inside a step of another fit has had its turn

    @contextmanager
    def _swapped_in(self, params: Values, buffers: Values) -> Iterator[None]:
        targets = self._matching(params, buffers)
        outside = _clones(targets)
        _copy(targets, [*params.values(), *buffers.values()])
        try:
            yield
        finally:
            _copy(targets, outside)

    def _matching(self, params: Values, buffers: Values) -> list[Tensor]:
        mine, own_buffers = self.tensors(), self.buffers()
        return [mine[name] for name in params] + [own_buffers[name] for name in buffers]

    @contextmanager
    def buffers_preserved(self) -> Iterator[None]:
        """Undo what the block does to buffers: evaluating a program is not training it."""
        buffers = list(self.buffers().values())
        before = _clones(buffers)
        try:
            yield
        finally:
            _copy(buffers, before)

    # ----------------------------------------------------------------------------- ownership

    def add_modules(self, modules: list[nn.Module]) -> None:
        """Make the buffers of ``modules`` and of their parts belong to the fit."""
        for root in modules:
            for module in root.modules():
                self._add(module)

    def _add(self, module: nn.Module) -> None:
        if all(buffer is None for buffer in module._buffers.values()):
            return
        if not any(module is known for known in self._modules.values()):
            self._modules[f"module{len(self._modules)}"] = module

    @contextmanager
    def discovering(self) -> Iterator[None]:
        """While the program runs for the first time: find its modules before they run."""

        def meet(module: nn.Module, _: Any) -> None:
            if _entered[-1] is not self:
                return  # a module of another fit
            known = len(self._modules)
            self._add(module)
            if len(self._modules) > known:
                self._claim(module, _buffers_of(module))

        handle = register_module_forward_pre_hook(meet)
        try:
            yield
        finally:
            handle.remove()
            self.claim()

    def _keyed(self) -> Iterator[tuple[Any, list[Tensor]]]:
        for tensor in self.tensors().values():
            yield tensor, [tensor]
        for module in self._modules.values():
            yield module, _buffers_of(module)

    def claim(self) -> None:
        """Own every tensor of the fit, with the fit's values in it."""
        for key, tensors in self._keyed():
            self._claim(key, tensors)
        self._num_claimed = len(self.tensors()) + len(self._modules)

    def claim_new(self) -> None:
        """Own the parameters that the program has made since the last claim."""
        if len(self.tensors()) + len(self._modules) != self._num_claimed:
            self.claim()

    def forget_others(self, names: Container[str]) -> None:
        """Drop parameters that are not among ``names``; the program will make them again."""
        store = pyro.get_param_store()
        for name in [name for name in self.tensors() if name not in names]:
            del store[name]

    def _claim(self, key: Any, tensors: list[Tensor]) -> None:
        record: _Record | None = _registry.get(key)
        if record is None:
            _registry[key] = _Record(weakref.ref(self), _clones(tensors))
            return
        owner = record.owner() if record.owner is not None else None
        if owner is self:
            return
        if owner is not None:
            owner._aside[key] = _clones(tensors)
        elif record.left is not None and not _equal(tensors, record.left):
            record.start = _clones(tensors)  # the user has set other values since
        _copy(tensors, self._aside.pop(key, record.start))
        record.owner, record.left = weakref.ref(self), None

    def finish(self, values: tuple[Values, Values] | None = None) -> None:
        """Freeze the fit at ``values``, or at its present ones, and leave them in the modules."""
        if self._frozen is not None:
            return
        if values is not None:
            self.assign(*values)
        values = self.values()
        with self.active():
            for key, tensors in self._keyed():
                record: _Record = _registry[key]
                record.owner, record.left = None, _clones(tensors)
        self._frozen = values
        self._aside.clear()


def _buffers_of(module: nn.Module) -> list[Tensor]:
    return [buffer for buffer in module._buffers.values() if buffer is not None]


def require_same(what: str, mine: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Raise where names or shapes of parameters (or buffers) differ from those of the program."""
    for name in given:
        if name not in mine:
            raise ProgramError(
                f"the fit has a {what} {name!r} that this program does not make; it makes "
                f"{sorted(mine) or 'none'}. Use the model and the guide of the fit."
            )
    for name, tensor in mine.items():
        if name not in given:
            raise ProgramError(
                f"this program makes a {what} {name!r} that the fit does not have; it has "
                f"{sorted(given) or 'none'}. Use the model and the guide of the fit."
            )
        if tensor.dtype != given[name].dtype:
            raise ProgramError(
                f"{what} {name!r} is {given[name].dtype} in the fit but {tensor.dtype} in this "
                "program. Convert the program's module, with module.double() or module.float()."
            )
        if tensor.shape != given[name].shape:
            raise ProgramError(
                f"{what} {name!r} has shape {tuple(given[name].shape)} in the fit but "
                f"{tuple(tensor.shape)} in this program. Use the model and the guide of the fit."
            )

"""What a model and a guide have gradients for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.state import modules_of
from lvppl.terms import trace_terms
from lvppl.tracing import undisturbed

__all__ = ["Parameters", "left_alone"]

Program = Callable[..., Any]
_ORDER = ("model", "guide", "both")


@contextmanager
def left_alone() -> Iterator[None]:
    """Run and differentiate programs: stores, generators and buffers are as they were after it."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()), undisturbed(), torch.enable_grad():
        yield


@dataclass(frozen=True)
class Parameters:
    """The unconstrained parameters that a pair of programs depends on.

    Attributes:
        leaves: the tensors, the model's first.
        names: of each.
        programs: ``"model"``, ``"guide"`` or ``"both"``, whose parameter each is.
    """

    leaves: tuple[Tensor, ...]
    names: tuple[str, ...]
    programs: tuple[str, ...]

    @classmethod
    def of(
        cls, model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Parameters:
        """Those that ln p(z, y), ln q(z | y) or a draw depends on.

        Raises:
            ProgramError: there are none.
        """
        terms = trace_terms(model, guide, args, kwargs, strict=False, cut=True)
        mine, others = ({id(leaf): leaf for leaf in found} for found in terms.parameters())
        if not mine and not others:
            raise ProgramError(
                "Neither model nor guide has a parameter, so that there is no gradient to audit. "
                "Write pyro.param(name, value) or pyro.module(name, module) in them."
            )
        given = _names(model, guide)
        found: list[tuple[str, str, Tensor]] = []
        for key, leaf in {**mine, **others}.items():
            both = key in mine and key in others
            program = "both" if both else "model" if key in mine else "guide"
            name = given.get(key, f"tensor {len(found)} {tuple(leaf.shape)}")
            found.append((program, name, leaf))
        found.sort(key=lambda row: (_ORDER.index(row[0]), row[1]))
        return cls(
            leaves=tuple(leaf for _, _, leaf in found),
            names=tuple(name for _, name, _ in found),
            programs=tuple(program for program, _, _ in found),
        )

    def gradients(self, value: Tensor) -> list[Tensor]:
        """Of a 0-dim tensor; zero where it does not depend on a parameter."""
        if not value.requires_grad:
            return [torch.zeros_like(leaf) for leaf in self.leaves]
        found = torch.autograd.grad(value, self.leaves, allow_unused=True)
        pairs = zip(self.leaves, found, strict=True)
        return [torch.zeros_like(leaf) if g is None else g for leaf, g in pairs]

    def slices(self) -> list[slice]:
        """Where each parameter lies among all elements."""
        ends = torch.tensor([leaf.numel() for leaf in self.leaves]).cumsum(0).tolist()
        return [slice(end - leaf.numel(), end) for leaf, end in zip(self.leaves, ends, strict=True)]


def _names(model: Program, guide: Program) -> dict[int, str]:
    """Names of parameters in Pyro's store, and of parameters of modules, by identity."""
    found: dict[int, str] = {}
    modules: Sequence[torch.nn.Module] = modules_of(model, guide)
    for module in modules:
        for name, parameter in module.named_parameters():
            found.setdefault(id(parameter), f"{type(module).__name__}.{name}")
    return found | {id(p): name for name, p in pyro.get_param_store().named_parameters()}

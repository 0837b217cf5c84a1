"""Running a model and its guide, and reading their traces. The only tracing of such a pair."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Independent, MaskedDistribution
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from lvppl import remedies
from lvppl.errors import ProgramError, ProgramFailure
from lvppl.seeding import Generators

__all__ = [
    "PARTICLES",
    "Plate",
    "is_discrete",
    "is_enumerated",
    "is_masked",
    "is_point",
    "kind_of",
    "plate_scale",
    "plates_of",
    "sample_sites",
    "subsampled_plates",
    "support_of",
    "trace_pair",
    "traced",
    "undisturbed",
    "unmasked",
]

PARTICLES = "_particles"
"""Name of the outermost plate that holds the particles."""

Program = Callable[..., Any]
Message = Mapping[str, Any]

_SHAPES = re.compile(r"\s*\n\s*Trace Shapes:")


class Plate(NamedTuple):
    """One vectorised plate: its dimension, the size of this batch and of the whole."""

    name: str
    dim: int
    size: int
    full_size: int


def sample_sites(trace: poutine.Trace) -> list[Any]:
    """The sample sites of ``trace`` that carry probability.

    Subsample indices and ``pyro.deterministic`` records are sample messages too, and are left out.
    """
    nodes: dict[str, Any] = dict(trace.nodes)
    return [
        site
        for site in nodes.values()
        if site["type"] == "sample"
        and type(site["fn"]).__name__ != "_Subsample"
        and not site["infer"].get("_deterministic", False)
    ]


def plates_of(site: Message) -> list[Plate]:
    """Vectorised plates around ``site``, left to right, without the particle plate."""
    plates = []
    for frame in site["cond_indep_stack"]:
        if frame.dim is not None and frame.name != PARTICLES:
            size = frame.size if frame.size >= 0 else site["fn"].batch_shape[frame.dim]
            full = frame.full_size if frame.full_size and frame.full_size >= 0 else size
            plates.append(Plate(frame.name, frame.dim, int(size), int(full)))
    return sorted(plates, key=lambda plate: plate.dim)


def plate_scale(site: Message) -> float:
    """Product of full_size / size over every plate around ``site``, sequential ones included."""
    ratios = [
        frame.full_size / frame.size
        for frame in site["cond_indep_stack"]
        if frame.name != PARTICLES and frame.full_size and frame.size > 0
    ]
    return math.prod(ratios)


def is_enumerated(site: Message) -> bool:
    return not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


def trace_pair(
    model: Program,
    guide: Program | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    nesting: int = 0,
    num_particles: int | None = None,
    enumerate_sites: bool = False,
    around_guide: AbstractContextManager[Any] | None = None,
) -> tuple[poutine.Trace, poutine.Trace]:
    """Run the guide and replay the model against it: ``(model_trace, guide_trace)``.

    Args:
        nesting: plate dimensions in use; enumerated and particle dimensions lie to their left.
        num_particles: size of the outermost plate; ``None`` for no such plate.
        enumerate_sites: enumerate the sites marked for it.
        around_guide: a handler to hold while the guide runs.
    """

    def wrap(program: Program, first_enum_dim: int | None) -> Program:
        if num_particles is not None:
            program = pyro.plate(PARTICLES, num_particles, dim=-1 - nesting)(program)
        if enumerate_sites:
            program = EnumMessenger(first_enum_dim)(program)
        return program

    first_enum_dim = -1 - nesting - (num_particles is not None)
    if guide is None:
        return traced("model", wrap(model, first_enum_dim), args, kwargs), poutine.Trace()
    with around_guide or nullcontext():
        guide_trace = traced("guide", wrap(guide, first_enum_dim), args, kwargs)
    replayed = poutine.replay(wrap(model, None), trace=guide_trace)
    return traced("model, replayed against the guide,", replayed, args, kwargs), guide_trace


def traced(name: str, program: Program, args: Any, kwargs: Any) -> poutine.Trace:
    """Run a program; where it raises, say which program and after which site.

    Raises:
        ProgramFailure: from what the program raised.
    """
    handler = poutine.trace(program)
    try:
        return handler.get_trace(*args, **kwargs)
    except torch.cuda.OutOfMemoryError:
        raise
    except ProgramError as error:  # of a handler: Pyro appends the shapes of all sites
        raise type(error)(_SHAPES.split(str(error))[0]) from error.__cause__
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as e:
        sites = [n for n, s in handler.trace.nodes.items() if s["type"] == "sample"]
        after = f"after site '{sites[-1]}'" if sites else "before its first site"
        what = _SHAPES.split(str(e))[0] or "no message"
        if "dtype" in what.splitlines()[0]:  # not of a tensor that it prints
            what += " (data and parameters share one dtype: data.float(), or modules.double())"
        if remedy := remedies.of_failure(e):
            what = f"{what.rstrip('.')}. {remedy}"
        raise ProgramFailure(f"The {name} fails {after}: {type(e).__name__}: {what}") from e


@contextmanager
def undisturbed() -> Iterator[list[torch.nn.Module]]:
    """Run programs without moving random generators or buffers; gives the modules that ran."""
    buffers: dict[int, tuple[Tensor, Tensor]] = {}
    modules: list[torch.nn.Module] = []

    def remember(module: torch.nn.Module, _inputs: Any) -> None:
        modules.append(module)
        for buffer in module.buffers(recurse=False):
            buffers.setdefault(id(buffer), (buffer, buffer.detach().clone()))

    generators = Generators.read()
    handle = register_module_forward_pre_hook(remember)
    try:
        with torch.no_grad():
            yield modules
    finally:
        handle.remove()
        generators.write()
        with torch.no_grad():
            for buffer, value in buffers.values():
                buffer.copy_(value)


def subsampled_plates(sites: Iterable[Message]) -> set[str]:
    return {
        frame.name
        for site in sites
        for frame in site["cond_indep_stack"]
        if frame.full_size and 0 < frame.size != frame.full_size and frame.name != PARTICLES
    }


def without_wrappers(fn: Any) -> Any:
    """The distribution of the elements, neither Independent nor masked."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "MaskedDistribution"):
        fn = fn.base_dist
    return fn


def kind_of(fn: Any) -> str:
    return type(without_wrappers(fn)).__name__


def is_point(site: Message) -> bool:
    """Whether a guide site is a point (Delta), possibly with event dimensions or a mask."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def unmasked(fn: Any) -> Any:
    """The distribution without ``.mask(...)``: what a value was drawn from."""
    if isinstance(fn, MaskedDistribution):
        return unmasked(fn.base_dist)
    if isinstance(fn, Independent) and unmasked(fn.base_dist) is not fn.base_dist:
        return Independent(unmasked(fn.base_dist), fn.reinterpreted_batch_ndims)
    return fn


def is_masked(site: Message) -> bool:
    """Whether a mask hides some of a site's log-probability."""
    return site["mask"] is not None or unmasked(site["fn"]) is not site["fn"]


def support_of(fn: Any) -> Any | None:
    """The support of a distribution, ``None`` where it declares none."""
    try:
        return fn.support
    except NotImplementedError:
        return None


def is_discrete(site: Message) -> bool:
    """Whether a site's values are on a countable space."""
    support = support_of(site["fn"])
    if support is not None:
        return bool(support.is_discrete)
    return not site["value"].is_floating_point()

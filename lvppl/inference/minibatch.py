"""Minibatches of the data, scaled so that a program with global latents stays unbiased.

For data y_1..y_N in a plate and a random minibatch B, the estimate

    (N / |B|) Σ_{n in B} ln p(y_n, z_n | z)  +  ln p(z)

has the full joint as its mean: only sites inside the data plate are scaled. The program itself
says nothing of N; :class:`scaled_minibatch` tells it from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from inspect import unwrap
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine.messenger import Messenger
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.tracing import is_enumerated, traced

__all__ = ["data_plates_of", "gather", "num_rows", "scaled_minibatch", "transformed"]

Program = Callable[..., Any]
Transform = Callable[[tuple[Any, ...]], tuple[Any, ...]]


class scaled_minibatch(Messenger):
    """Make the data plates of a minibatch call look like a subsample of the full data.

    Put it around everything that runs the model and the guide. Every sample site inside one of the
    plates gets the scale ``full_size / size``, and its frame for that plate the ``full_size``.

    :param plates: names of the plates whose size is the number of rows of the minibatch.
    :param full_size: number of rows of the full data.
    """

    def __init__(self, plates: Collection[str], full_size: int) -> None:
        super().__init__()
        self.plates = frozenset(plates)
        self.full_size = full_size

    def _pyro_sample(self, msg: Any) -> None:
        # The program's own plates are inside, so they have already written their frames.
        frames = []
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.plates and frame.size > 0:
                msg["scale"] = msg["scale"] * (self.full_size / frame.size)
                frame = frame._replace(full_size=self.full_size)
            frames.append(frame)
        msg["cond_indep_stack"] = tuple(frames)


def num_rows(args: tuple[Any, ...]) -> int | None:
    """Rows of the first positional argument; None where it is no tensor with a dimension."""
    if args and isinstance(args[0], Tensor) and args[0].dim() > 0:
        return int(args[0].shape[0])
    return None


def gather(args: tuple[Any, ...], index: Tensor, rows: int) -> tuple[Any, ...]:
    """The rows ``index`` of every tensor among ``args`` that has ``rows`` of them.

    Tensors are looked for in tuples, lists and dictionaries too. Anything else, also a tensor with
    another leading size, is passed whole.
    """

    def pick(value: Any) -> Any:
        if isinstance(value, Tensor):
            follows = value.dim() > 0 and value.shape[0] == rows
            return value.index_select(0, index.to(value.device)) if follows else value
        if type(value) in (tuple, list):
            return type(value)(pick(item) for item in value)
        if type(value) is dict:
            return {key: pick(item) for key, item in value.items()}
        return value

    return tuple(pick(value) for value in args)


def transformed(transform: Transform | None, batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a minibatch as the user's transform leaves them.

    :raises ProgramError: if the transform returns anything but a tuple: a tensor would be taken
        apart into its rows.
    """
    if transform is None:
        return batch
    result = transform(batch)
    if not isinstance(result, (tuple, list)):
        raise ProgramError(
            "transform must return a tuple of the program's arguments, but returned a "
            f"{type(result).__name__}: return (y,) for one argument y."
        )
    return tuple(result)


@dataclass(frozen=True)
class _Seen:
    """Size and full size of a plate in one run, and whether a latent site is inside."""

    size: int
    full_size: int
    holds_latent: bool


def _plates_in(trace: poutine.Trace) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}
    for site in trace.nodes.values():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        for frame in site["cond_indep_stack"]:
            latent = not site["is_observed"] and not is_enumerated(site)
            if frame.name in seen:
                latent = latent or seen[frame.name].holds_latent
            full = frame.size if frame.full_size is None else frame.full_size
            seen[frame.name] = _Seen(int(frame.size), int(full), latent)
    return seen


def _run(
    role: str, program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, _Seen]:
    with torch.no_grad(), poutine.block():
        return _plates_in(traced(role, program, args, kwargs))


def data_plates_of(
    model: Program,
    guide: Program | None,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    batch_size: int,
    transform: Transform | None = None,
) -> tuple[str, ...]:
    """Names of the plates that follow the rows of the data, found by running the program.

    Model and guide run at the size of the batch, at one next to it, and at that of the last batch
    of an epoch; a data plate is one whose size is the number of rows at the first two. A plate
    whose ``size`` the program itself states as the full number of rows
    (``pyro.plate("data", N, subsample=index)``) scales itself, and is left out. Random numbers are
    consumed; parameters made on the way at other sizes than the first are dropped.

    :param args: the full data.
    :param transform: applied to each batch before it goes to the program.
    :raises ProgramError: if no plate follows the rows, if a plate subsamples by itself as well, if
        a plate changes with the rows in another way, or if the guide keeps one parameter a row.
    """
    rows = num_rows(args)
    assert rows is not None and rows > 1
    sizes = (batch_size, batch_size - 1 if batch_size > 2 else batch_size + 1)
    batches = []
    for size in (*sizes, rows % batch_size or batch_size):  # the last: of an epoch, too
        batch = gather(args, torch.arange(size, device=args[0].device), rows)
        batches.append(transformed(transform, batch))

    follows, _ = _following("model", model, batches, kwargs, sizes, rows)
    own = unwrap(guide) if guide is not None else None
    if isinstance(own, AutoGuide):
        # Running it would fix its parameters at a batch, so it is judged by the model alone.
        local = [name for name, seen in follows.items() if seen.holds_latent]
        if local and own.create_plates is None:
            raise ProgramError(
                f"{type(own).__name__} keeps parameters for every row of plate {local[0]!r}, so it "
                "cannot be trained on minibatches. Leave batch_size out, or write a guide that "
                "computes the posterior of a row from the row (amortised)."
            )
    elif guide is not None:
        found, names = _following("guide", guide, batches, kwargs, sizes, rows)
        fixed = [name for name in follows if name in names - found.keys()]
        if fixed:
            raise ProgramError(
                f"plate {fixed[0]!r} follows the rows in the model but not in the guide, so the "
                "guide cannot be trained on minibatches. Take its size from the arguments, or "
                "leave batch_size out."
            )
        follows |= found
    if not follows:
        raise ProgramError(
            f"batch_size={batch_size} needs a plate over the rows of the first argument, but no "
            f"plate of the model has its size ({sizes[0]} rows given). Put the sites of one datum "
            'inside `with pyro.plate("data", len(x)):`, or leave batch_size out.'
        )
    return tuple(name for name, seen in follows.items() if seen.full_size == seen.size)


def _rerun(
    role: str,
    program: Program,
    batch: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    first: tuple[Any, ...],
) -> dict[str, _Seen]:
    try:
        return _run(role, program, batch, kwargs)
    except Exception as error:
        raise ProgramError(
            f"the {role} runs with {num_rows(first)} rows but not with {num_rows(batch)}, so it "
            f"cannot be trained on minibatches: {error}. Take sizes from the arguments, and keep "
            "no parameter a row; or leave batch_size out."
        ) from error


def _following(
    role: str,
    program: Program,
    batches: list[tuple[Any, ...]],
    kwargs: Mapping[str, Any],
    sizes: tuple[int, int],
    rows: int,
) -> tuple[dict[str, _Seen], set[str]]:
    """Plates of one program that follow the rows, as seen at the first size, and all it has."""
    first = _run(role, program, batches[0], kwargs)
    store = pyro.get_param_store()
    with store.scope({part: dict(v) for part, v in store.get_state().items()}):  # type: ignore
        second = _rerun(role, program, batches[1], kwargs, batches[0])
    follows = {}
    for name, seen in first.items():
        again = second.get(name, seen)
        if (seen.full_size, again.full_size) == sizes and seen.size < seen.full_size:
            raise ProgramError(
                f"plate {name!r} of the {role} takes a subsample of {seen.size} by itself and "
                f"batch_size={sizes[0]} asks for another. Use one of the two."
            )
        if (seen.size, again.size) == sizes:
            stated = (seen.full_size, again.full_size)
            if stated not in (sizes, (rows, rows)):
                raise ProgramError(
                    f"plate {name!r} of the {role} states a full size of {seen.full_size}, but the "
                    f"data have {rows} rows. Make it the number of rows, or leave the size of the "
                    "plate to the batch."
                )
            follows[name] = seen
        elif seen.size != again.size:
            raise ProgramError(
                f"plate {name!r} of the {role} has size {seen.size} for {sizes[0]} rows and "
                f"{again.size} for {sizes[1]}: it depends on the rows but does not count them, so "
                "rows are not exchangeable data. Leave batch_size out."
            )
    with store.scope({part: dict(v) for part, v in store.get_state().items()}):  # type: ignore
        _rerun(role, program, batches[2], kwargs, batches[0])
    return follows, set(first)

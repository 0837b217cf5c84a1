"""Finished parts of an estimate of ln p(y), kept on disk, so that an interrupted one goes on."""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from lvppl.atomic import write_atomically
from lvppl.errors import ProgramError
from lvppl.inference.likelihood.job import Job, Plan
from lvppl.inference.likelihood.weights import Finished
from lvppl.inference.state import modules_of

__all__ = ["Checkpoint", "seed_of"]

_FORMAT, _VERSION = "lvppl likelihood", 1
_SECONDS = 5.0  # between writes: what an interruption that nothing can catch loses
_ROWS = 8  # whose first weights tell whether it is still the same program
_SLACK = {torch.float64: 1e-10}
_SLACK_SINGLE = 1e-5
"""Nats, and relative: what other threads and processors may round differently."""


class Checkpoint:
    """Finished parts of one estimate, and what makes it that estimate.

    Options, data and parameters are compared by value, or by their SHA-256. What no comparison
    reaches, the code of the program and tensors that it closes over, shows in the weights of the
    first draws of the first rows.

    Args:
        path: the file; it is made by the first write.
        job, plan: what is run.
        options: plain values that the numbers depend on, by the names that a user knows.

    Raises:
        ProgramError: the file is of another estimate (what differs), or is none of lvppl's.
    """

    def __init__(
        self, path: str | PathLike[str], job: Job, plan: Plan, options: Mapping[str, Any]
    ) -> None:
        self.path = Path(path)
        self.parts: list[Finished] = []
        self._first = _first_weights(job, plan)
        self._known = {name: repr(value) for name, value in options.items()} | {
            "data": _digest([*job.data, *job.kwargs.items()]),
            "parameters": _digest(_parameters(job, plan)),
        }
        self._written = time.monotonic()
        self._dirty = False
        if self.path.exists():
            self._go_on_from(_read(self.path))

    def _go_on_from(self, content: Mapping[str, Any]) -> None:
        known = content["known"]
        other = [name for name, value in self._known.items() if known.get(name) != value]
        if other:
            raise self._refusal(", ".join(self._difference(name, known) for name in other))
        both = content["first_weights"].to(self._first), self._first
        few = min(len(both[0]), len(both[1]))  # as batch_size has it
        slack = _SLACK.get(self._first.dtype, _SLACK_SINGLE)
        if not torch.allclose(both[0][:few], both[1][:few], slack, slack, equal_nan=True):
            raise self._refusal("this program gives its first draws other weights")
        device = self._first.device
        self.parts = [Finished(**part).to(device) for part in content["parts"]]

    def _difference(self, name: str, known: Mapping[str, str]) -> str:
        if name in ("data", "parameters"):
            return f"other {name}"
        return f"{name} = {known.get(name)}, not {self._known[name]}"

    def _refusal(self, what: str) -> ProgramError:
        return ProgramError(
            f"The checkpoint {self.path} is of another estimate: {what}. Give what it is an "
            "estimate of, another path, or delete the file."
        )

    def add(self, part: Finished) -> None:
        """One more part is finished; written at once, or with the next within seconds."""
        self.parts.append(part)
        self._dirty = True
        if time.monotonic() - self._written > _SECONDS:
            self.write()

    def write(self) -> None:
        """Write what is finished, in place of what was written before."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "known": self._known,
            "first_weights": self._first.cpu(),
            "parts": [part.to("cpu")._asdict() for part in self.parts],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda file: torch.save(content, file))
        self._written, self._dirty = time.monotonic(), False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever ends the block, what is finished is written."""
        try:
            yield
        finally:
            if self._dirty:
                self.write()


def seed_of(path: str | PathLike[str]) -> int | None:
    """The seed of the estimate in a file; ``None`` where there is no file."""
    return int(_read(Path(path))["known"]["seed"]) if Path(path).exists() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if content["format"] == _FORMAT and content["version"] == _VERSION:
            return dict(content)
    except (RuntimeError, EOFError, pickle.UnpicklingError, BadZipFile, ValueError, OSError,
            KeyError, TypeError, IndexError):  # fmt: skip
        pass
    raise ProgramError(
        f"The checkpoint {path} is no file that log_likelihood of this version wrote. Give "
        "another path, or delete the file."
    )


def _first_weights(job: Job, plan: Plan) -> Tensor:
    """Log weights of the first draw of the first rows, (data,)."""
    stop = plan.batch if plan.whole else min(plan.batch, _ROWS)
    return job.proposal.log_weight(job.run(0, stop, plate=plan.plate))[0].detach()


def _parameters(job: Job, plan: Plan) -> list[Any]:
    """Parameters that a run makes or uses, and the state of modules, by name."""
    with poutine.trace(param_only=True) as tracer:
        _first_weights(job, plan)
    sites = tracer.trace.nodes.items()
    used = sorted((name, site["value"]) for name, site in sites if site["type"] == "param")
    modules = modules_of(job.model, job.proposal.guide)
    states = [sorted(module.state_dict().items()) for module in modules]
    return [*used, *states]


def _digest(value: Any) -> str:
    """SHA-256 of tensors and plain values, however nested; of other things only their type."""
    found = hashlib.sha256()
    pending = [value]
    while pending:
        item = pending.pop()
        if isinstance(item, Tensor):
            found.update(f"{item.dtype} {tuple(item.shape)}".encode())
            plain = item.detach().cpu().contiguous().reshape(-1)
            found.update(plain.view(torch.uint8).numpy().tobytes())
        elif isinstance(item, np.ndarray):
            found.update(f"{item.dtype} {item.shape}".encode())
            found.update(np.ascontiguousarray(item).tobytes())
        elif isinstance(item, Mapping):
            pending += [list(item.items())]
        elif isinstance(item, Sequence) and not isinstance(item, str):
            found.update(f"{len(item)}".encode())
            pending += item
        elif item is None or isinstance(item, (bool, int, float, str)):
            found.update(repr(item).encode())
        else:
            found.update(type(item).__qualname__.encode())
    return found.hexdigest()

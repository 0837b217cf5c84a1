"""Fits on disk.

``folder/fit.pt`` is the fit: detached unconstrained parameters and buffers by name, the states of
optimiser, scheduler and random generators, and plain Python values, so that it loads with
``weights_only=True``. ``fit.json`` and ``history.npz`` beside it repeat what a person wants to
read. Constraints are not written: they are in the program, which is run once when a fit is loaded.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyro
import torch
from pyro import poutine
from torch import Tensor

from lvppl.atomic import write_atomically
from lvppl.errors import ProgramError
from lvppl.inference.em_fit import EMFit, EMHistory, Restart
from lvppl.inference.fit import Fit, History, moved
from lvppl.inference.m_step import MStepTable, Step
from lvppl.inference.map_latents import MapLatents
from lvppl.inference.state import FitState, modules_of, require_same
from lvppl.inference.training import Evaluation
from lvppl.missing import with_missing
from lvppl.objectives import ELBO
from lvppl.seeding import seeded
from lvppl.terms import trace_terms
from lvppl.tracing import trace_pair, undisturbed

__all__ = ["load", "save"]

_FORMAT = "lvppl fit"
_VERSION = 1
_RECORD = ("status", "reason", "seed", "num_steps", "num_epochs", "versions", "settings")


def save(fit: Fit, folder: str | PathLike[str]) -> None:
    """Write ``fit`` into ``folder``, which is made if needed; other files there are left alone.

    Each file is written beside its place and moved into it at once, ``fit.pt`` last, so that an
    interruption leaves the fit of before. The first rows of the data are written too (all of them
    for a fit without minibatches): the program is run on them when the fit is loaded.

    :raises ProgramError: if the arguments of the program are neither tensors nor plain values, or
        ``folder`` is a file.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ProgramError(
            f"a fit is saved into a folder, but {folder} is a file, or inside of one. Give another "
            "path, or remove the file."
        ) from error
    params, buffers = fit.state.values()
    record = {name: getattr(fit, name) for name in _RECORD}
    args, kwargs = fit.prototype if fit.prototype is not None else ((), {})
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        **record,
        "params": params,
        "buffers": buffers,
        "own_params": list(fit.own_params),
        "args": [_plain(value, f"data argument {i}") for i, value in enumerate(args)],
        "kwargs": {name: _plain(value, f"argument {name!r}") for name, value in kwargs.items()},
        "checkpoint": fit.checkpoint(),
        "losses": torch.from_numpy(fit.history["loss"]),
        "evaluations": _rows(fit.history),
    }
    shapes = {name: list(value.shape) for name, value in params.items()}
    readable = {**record, "objective": type(fit.objective).__name__, "parameters": shapes}
    if isinstance(fit, EMFit):
        content["em"] = _of_em(fit)
        readable |= _readable_of_em(fit)
    arrays: dict[str, Any] = dict(fit.history)
    write_atomically(folder / "history.npz", lambda file: np.savez(file, **arrays))
    text = json.dumps(readable, indent=2) + "\n"
    write_atomically(folder / "fit.json", lambda file: file.write(text.encode()))
    write_atomically(folder / "fit.pt", lambda file: torch.save(content, file))


def load(
    folder: str | PathLike[str],
    model: Callable[..., Any],
    guide: Callable[..., Any] | None = None,
    *,
    objective: Any = None,
    device: str | torch.device | None = None,
) -> Fit:
    """Read a fit that :func:`save` wrote, for the model and the guide that it is a fit of.

    The parameters are put into the modules of the program, and ``SVI.fit(..., resume=fit)`` goes
    on from a fit by SVI.

    :param guide: of a fit by :class:`lvppl.SVI`; None for one by :class:`lvppl.EM`, which comes
        back as :class:`lvppl.EMFit`.
    :param objective: what ``fit.report`` uses; default ``lvppl.ELBO()``.
    :param device: where modules and tensors go; default where the modules are, else the CPU.
    :raises ProgramError: if there is no such file, if it is truncated or not one of lvppl's, if
        the program makes other parameters or sites: which, and how they differ; or if there is a
        guide for a fit that has none, and the reverse.
    """
    content = _read(Path(folder) / "fit.pt")
    em = content.get("em")
    _check_pair(folder, em is not None, guide, objective)
    program = model if em is None else MapLatents(content["settings"]["map_latents"])(model)
    program, handled = with_missing(program, guide, content["settings"].get("missing"))
    modules = modules_of(model, guide)
    where = None if device is None else torch.device(device)
    state = FitState(where)
    for module in modules:
        if where is not None:
            module.to(where)
    own_places = [tensor.device for module in modules for tensor in module.parameters()]
    where = where or next(iter(own_places), None)
    state.add_modules(modules)
    args = moved(tuple(_restored(content["args"])), where)
    kwargs = moved(_restored(content["kwargs"]), where)
    own = tuple(content["own_params"])
    params = content["params"]
    with state.active(), seeded(0), state.discovering(), state.buffers_preserved():
        try:
            with torch.no_grad(), poutine.block():
                trace_pair(program, handled, args, kwargs)
        except Exception as error:
            raise ProgramError(
                f"the program does not run on the first rows of the data in {folder}: {error}. "
                "Use the model and the guide of the fit."
            ) from error
        for name in own:
            pyro.get_param_store().setdefault(name, params[name].clone())
    require_same("parameter", state.tensors(), params)
    require_same("buffer", state.buffers(), content["buffers"])
    state.finish((params, content["buffers"]))
    with state.active(), undisturbed():
        # Sites that do not fit each other, such as those of a guide in the model's place.
        trace_terms(program, handled, args, kwargs, strict=content["settings"].get("strict", True))
    checkpoint = content["checkpoint"]
    common: dict[str, Any] = {
        "model": model,
        "guide": guide,
        "state": state,
        "prototype": (args, kwargs),
        "own_params": own,
        "checkpoint": lambda: checkpoint,
        **{name: content[name] for name in _RECORD},
    }
    if em is not None:
        return EMFit(
            objective=None,
            history=EMHistory((-content["losses"]).tolist()),
            tracked=em["tracked"],
            m_step=MStepTable([Step(**row) for row in em["m_step"]]),
            restarts=tuple(Restart(**moved(one, where)) for one in em["restarts"]),
            **common,
        )
    evaluations = [Evaluation(**entry) for entry in content["evaluations"]]
    return Fit(
        objective=ELBO() if objective is None else objective,
        history=History(content["losses"], evaluations),
        **common,
    )


def _check_pair(folder: str | PathLike[str], is_em: bool, guide: Any, objective: Any) -> None:
    if is_em and (guide is not None or objective is not None):
        given = "a guide" if guide is not None else "an objective"
        raise ProgramError(
            f"the fit in {folder} is one by lvppl.EM, whose posterior is exact, but {given} came. "
            "Leave it out: lvppl.load(folder, model)."
        )
    if not is_em and guide is None:
        raise ProgramError(
            f"the fit in {folder} is one by lvppl.SVI, but no guide came. Give the guide that it "
            "is a fit of: lvppl.load(folder, model, guide)."
        )


def _of_em(fit: EMFit) -> dict[str, Any]:
    """What an EM fit has besides, as tensors and plain values."""
    return {
        "tracked": fit.tracked,
        "m_step": [asdict(step) for step in fit.m_step.values()],
        "restarts": [dict(vars(restart)) for restart in fit.restarts],
    }


def _readable_of_em(fit: EMFit) -> dict[str, Any]:
    restarts = [{k: v for k, v in vars(r).items() if k != "params"} for r in fit.restarts]
    return {**_of_em(fit), "restarts": restarts, "objective": fit.tracked}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ProgramError(
            f"there is no fit in {path.parent}: {path.name} is missing. Give the folder that "
            "fit.save(folder) wrote."
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, BadZipFile, ValueError, OSError) as e:
        raise ProgramError(
            f"{path} is truncated or was not written by lvppl "
            f"({type(e).__name__}: {str(e)[:200]}). Save the fit again."
        ) from e
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise ProgramError(
            f"{path} was not written by lvppl.save. Give the folder that fit.save(folder) wrote; "
            "weights of a module are read with torch.load."
        )
    if content["version"] != _VERSION:
        raise ProgramError(
            f"{path} has format version {content['version']}, but this lvppl reads version "
            f"{_VERSION}; it was written by lvppl {content['versions'].get('lvppl')}. "
            "Read it with that version, or fit again."
        )
    return content


def _rows(history: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """The evaluations of a history, one dictionary of plain numbers each."""
    names = Evaluation.__dataclass_fields__
    count = len(history["step"]) if "step" in history else 0
    return [
        {name: history[name][i].item() if name in history else None for name in names}
        for i in range(count)
    ]


def _plain(value: Any, name: str) -> Any:
    """``value`` as tensors and plain Python values."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.Size)):
        return value
    if isinstance(value, np.ndarray):
        return {"numpy": torch.from_numpy(value.copy())}
    if type(value) in (tuple, list):
        return type(value)(_plain(item, name) for item in value)
    if type(value) is dict:
        return {"dict": {key: _plain(item, name) for key, item in value.items()}}
    raise ProgramError(
        f"{name} is a {type(value).__name__}, which cannot be saved safely. Give the program "
        "tensors and plain values, and bind the rest with functools.partial."
    )


def _restored(value: Any) -> Any:
    if type(value) is dict and set(value) == {"numpy"}:
        return value["numpy"].numpy()
    if type(value) is dict:
        inner = value["dict"] if set(value) == {"dict"} else value
        return {key: _restored(item) for key, item in inner.items()}
    if type(value) in (tuple, list):
        return type(value)(_restored(item) for item in value)
    return value

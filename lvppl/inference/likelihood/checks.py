"""What an estimate of ln p(y) refuses: options, data, weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.likelihood.ranks import num_processes
from lvppl.inference.minibatch import num_rows

__all__ = [
    "ESTIMATORS",
    "check_annealing",
    "check_checkpoint",
    "check_data",
    "check_extras",
    "check_options",
    "check_weights",
    "few",
]

Program = Callable[..., Any]

ESTIMATORS = ("ais", "exact", "importance", "naive", "prior", "uniform")


def check_options(
    estimator: str,
    guide: Program | None,
    num_samples: int,
    batch_size: int | None,
    sample_chunk: int | None,
    bin_width: float | None,
) -> None:
    if estimator not in ESTIMATORS:
        raise ProgramError(f"estimator must be one of {ESTIMATORS}, got {estimator!r}.")
    if estimator == "importance" and guide is None:
        raise ProgramError(
            'estimator="importance" draws z from a guide, and none was given: pass guide=, or '
            'estimator="prior" to draw from the prior.'
        )
    counts = {"num_samples": num_samples, "batch_size": batch_size, "sample_chunk": sample_chunk}
    for name, value in counts.items():
        if value is None and name != "num_samples":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ProgramError(f"{name} must be a whole number of at least 1, got {value!r}.")
    if bin_width is not None and not (bin_width > 0 and math.isfinite(bin_width)):
        raise ProgramError(f"bin_width must be a positive number, got {bin_width!r}.")


def check_extras(
    estimator: str, num_samples: int, defensive: float, bootstrap: int | None, trajectory: bool
) -> None:
    """Refuse a defensive share, a bootstrap or a trajectory that the estimate cannot have."""
    number = isinstance(defensive, int | float) and not isinstance(defensive, bool)
    if not number or not 0 <= defensive < 1:
        raise ProgramError(
            f"defensive must be a number in [0, 1), the share of draws from the prior, got "
            f"{defensive!r}."
        )
    if defensive and estimator != "importance":
        raise ProgramError(
            'defensive= mixes the prior into a guide, which estimator="importance" draws from; '
            f"got estimator={estimator!r}."
        )
    if defensive and num_samples < 4:
        raise ProgramError(
            f"defensive= needs at least two draws each from guide and prior, got num_samples="
            f"{num_samples}: take at least 4."
        )
    whole = bootstrap is None or (isinstance(bootstrap, int) and not isinstance(bootstrap, bool))
    if not whole or (bootstrap is not None and bootstrap < 2):
        raise ProgramError(
            f"bootstrap must be a number of replicates of at least 2, got {bootstrap!r}."
        )
    if estimator == "exact" and (bootstrap is not None or trajectory):
        raise ProgramError(
            'bootstrap= and trajectory= are about draws, which estimator="exact" does not have. '
            "Leave them out."
        )


def check_annealing(estimator: str, annealing: Any, bootstrap: int | None) -> None:
    """Refuse options of annealing elsewhere, and options that annealed chains do not have."""
    if estimator == "ais" and bootstrap is not None:
        raise ProgramError(
            'bootstrap= is not kept for estimator="ais", whose chains are few. Leave it out, or '
            "take another estimator."
        )
    if annealing is not None and estimator != "ais":
        raise ProgramError(f'annealing is of estimator="ais", but estimator is {estimator!r}.')


def check_checkpoint(estimator: str, checkpoint: Any) -> None:
    """Refuse a checkpoint that is no path of a file, or of an estimate that has no draws."""
    if checkpoint is None:
        return
    if not isinstance(checkpoint, str | PathLike):
        raise ProgramError(f"checkpoint must be the path of a file, got {checkpoint!r}.")
    if Path(checkpoint).is_dir():
        raise ProgramError(
            f"checkpoint must be the path of a file, but {str(checkpoint)!r} is a folder. Add a "
            'name, such as "likelihood.pt".'
        )
    if num_processes() > 1:
        raise ProgramError(
            "checkpoint= is of one process, but this one is of a group that shares the data. Leave "
            "it out, or run one process."
        )
    if estimator == "exact":
        raise ProgramError(
            'checkpoint= keeps the data whose draws are done, which estimator="exact" does not '
            "have. Leave it out."
        )


def check_data(data: tuple[Any, ...], missing: str | None = None) -> int | None:
    """Number of rows of the first argument, ``None`` if it is no tensor; bad data are refused."""
    for i, x in enumerate(data):
        if not isinstance(x, Tensor):
            continue
        if x.numel() == 0:
            raise ProgramError(
                f"The data are empty: argument {i} has shape {tuple(x.shape)}. Pass at least one "
                "row."
            )
        bad = x.isinf() if missing else ~x.isfinite()
        if bool(bad.any()):
            where = bad.reshape(len(bad) if bad.dim() else 1, -1).any(-1).nonzero().flatten()
            kinds = "infinite" if missing else "NaN or infinite"
            remedy = (
                "Correct the data: a missing value is NaN."
                if missing
                else "Remove those rows, or fill their values and mask them; "
                'missing="nan" takes NaN as a missing value.'
            )
            raise ProgramError(
                f"Argument {i} has {kinds} values in {where.numel()} rows "
                f"({few(where.tolist())}). {remedy}"
            )
    return num_rows(data)


def check_weights(log_weight: Tensor, first_datum: int) -> None:
    bad = (log_weight.isnan() | (log_weight == math.inf)).any(0)
    if bool(bad.any()):
        where = (bad.nonzero().flatten() + first_datum).tolist()
        kind = "NaN" if bool(log_weight.isnan().any()) else "infinite"
        raise ProgramError(
            f"Importance weights are {kind} for {len(where)} data ({few(where)}): at a drawn z "
            "the model has no finite density, or the guide gives density zero to its own draw. "
            "Look at these data with lvppl.check; bound scales away from zero, and let the guide "
            "cover the support of the prior."
        )


def few(indices: Sequence[int]) -> str:
    return ", ".join(map(str, indices[:10])) + (", ..." if len(indices) > 10 else "")

"""The record of a fit: its parameters, its history, why it ended, and what can be asked of it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import metadata
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.state import FitState
from lvppl.inference.training import Evaluation
from lvppl.missing import with_missing
from lvppl.seeding import seeded

if TYPE_CHECKING:
    from lvppl.inference.imputation import Imputation
    from lvppl.inference.likelihood import LikelihoodEstimate
    from lvppl.inference.posterior import Posterior, Prior

__all__ = ["Fit", "History", "moved", "versions"]

_EVALUATED = ("elbo", "rate", "distortion", "validation_elbo")


class History(Mapping[str, np.ndarray]):
    """What was measured during a fit, as arrays by name.

    ``loss`` has one entry a step: the loss that was minimised, in nats, summed over the data.
    ``step``, ``epoch``, ``elbo``, ``rate``, ``distortion`` and ``validation_elbo`` have one entry
    an evaluation, in nats per row of the data (those that the objective reports).
    """

    unit = "nats per row"

    def __init__(self, losses: Tensor, evaluations: Sequence[Evaluation]) -> None:
        self._losses = losses.detach()
        self._evaluations = tuple(evaluations)

    @cached_property
    def _arrays(self) -> dict[str, np.ndarray]:
        # Only when asked: a callback gets a history every epoch, and reading it waits for a GPU.
        arrays = {"loss": self._losses.cpu().numpy().copy()}
        if self._evaluations:
            arrays["step"] = np.array([e.step for e in self._evaluations])
            arrays["epoch"] = np.array([e.epoch for e in self._evaluations])
        for name in _EVALUATED:
            column = [getattr(e, name) for e in self._evaluations]
            if column and None not in column:
                arrays[name] = np.array(column, dtype=np.float64)
        return arrays

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            raise KeyError(f"the history has no {name!r}; it has {sorted(self._arrays)}")
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._arrays)

    def __len__(self) -> int:
        return len(self._arrays)

    def __repr__(self) -> str:
        inside = ", ".join(f"{name} ({len(array)},)" for name, array in self._arrays.items())
        return f"History({inside})"


def versions() -> dict[str, str]:
    """Versions of everything that a fit's numbers depend on."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("lvppl", "torch", "pyro-ppl", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    found["torch"] = str(torch.__version__)  # with its build, "+cpu" or "+cu128"
    return found


def moved(value: Any, device: torch.device | None) -> Any:
    """``value`` with every tensor in it on ``device``."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    if type(value) is dict:
        return {key: moved(item, device) for key, item in value.items()}
    return value


@dataclass(frozen=True, eq=False, repr=False)
class Fit:
    """A fit of a guide and of a model's parameters; made by :meth:`lvppl.SVI.fit`.

    Every method runs inside the fit's own parameters, whatever has been done since to the modules
    of the program, and leaves those, the global parameter store and the global random generators
    as they were.

    :ivar status: ``converged``, ``max_steps``, ``diverged``, ``decreased`` or ``interrupted``
        (``running`` for what a callback gets).
    :ivar reason: the same in a sentence.
    :ivar seed: the seed that gives this run again.
    :ivar num_steps: optimisation steps done, those before a resumption included.
    :ivar num_epochs: complete passes over the data.
    :ivar history: see :class:`History`.
    :ivar versions: of lvppl and of what it stands on, when the fit was made.
    :ivar settings: options of the fit, plain values.
    :ivar state: parameters and buffers; ``with fit.state.active():`` puts them in place.
    """

    model: Callable[..., Any]
    guide: Callable[..., Any]
    objective: Any
    status: str
    reason: str
    seed: int
    num_steps: int
    num_epochs: int
    history: History
    versions: dict[str, str]
    settings: dict[str, Any]
    state: FitState
    prototype: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    own_params: tuple[str, ...] = ()
    """Names of parameters that belong to the objective rather than to the program."""
    checkpoint: Callable[[], dict[str, Any]] = field(default=dict)
    """Makes what ``resume=`` goes on from."""

    @property
    def params(self) -> dict[str, Tensor]:
        """Copies of the parameters by name, as the program sees them (constrained)."""
        return self.state.constrained()

    def active(self) -> Any:
        """A context in which the fit's parameters are in the modules and in Pyro's store.

        ::

            with fit.active():
                images = decoder(z)
        """
        return self.state.active()

    @contextmanager
    def _inside(self, data: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        with self.active(), self.state.buffers_preserved():
            yield moved(data, self.state.device)

    def _as_fitted(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Options, where ``missing`` is what it was in the fit unless it is said again."""
        return {"missing": self.settings.get("missing"), **options}

    def posterior(
        self,
        *data: Any,
        num_samples: int = 100,
        batch_size: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> Posterior:
        """Draws z ~ q(z | y) for these data; see :func:`lvppl.inference.sample_posterior`."""
        from lvppl.inference.posterior import sample_posterior

        kwargs = self._as_fitted(kwargs)
        options: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size}
        with self._inside(data) as inside:
            return sample_posterior(self.model, self.guide, *inside, seed=seed, **options, **kwargs)

    def log_likelihood(
        self, *data: Any, estimator: str = "importance", **options: Any
    ) -> LikelihoodEstimate:
        """Estimate ln p(y) of each datum; see :func:`lvppl.log_likelihood` for the options."""
        from lvppl.inference.likelihood import log_likelihood

        options = self._as_fitted(options)
        with self._inside(data) as inside:
            return log_likelihood(
                self.model, *inside, guide=self.guide, estimator=estimator, **options
            )

    def report(self, *data: Any, seed: int | None = None, **kwargs: Any) -> Any:
        """The objective's report on these data: elbo, rate, distortion, entropy and loss, nats.

        :raises ProgramError: where the fit's objective is not one of lvppl's.
        """
        if not hasattr(self.objective, "report"):
            raise ProgramError(
                f"{type(self.objective).__name__} makes no report. Use an objective of lvppl, such "
                "as lvppl.ELBO()."
            )
        kwargs = self._as_fitted(kwargs)
        model, guide = with_missing(self.model, self.guide, kwargs.pop("missing"))
        with self._inside(data) as inside, seeded(seed):
            return self.objective.report(model, guide, *inside, **kwargs)

    def impute(self, *data: Any, num_imputations: int = 0, **options: Any) -> Imputation:
        """Fill the NaN of these data, which may be new; see :func:`lvppl.impute`."""
        from lvppl.inference.imputation import impute

        options = {"num_imputations": num_imputations, **options}
        with self._inside(data) as inside:
            return impute(self.model, *inside, guide=self.guide, **options)

    def reconstruct(
        self,
        *data: Any,
        num_samples: int = 1,
        batch_size: int | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """E[y | z] averaged over draws z ~ q(z | y), by observed site, (*plates, *event)."""
        from lvppl.inference.posterior import reconstruct

        kwargs = self._as_fitted(kwargs)
        options: dict[str, Any] = {"num_samples": num_samples, "batch_size": batch_size}
        with self._inside(data) as inside:
            return reconstruct(self.model, self.guide, *inside, seed=seed, **options, **kwargs)

    def sample(
        self, *data: Any, num_samples: int = 1, seed: int | None = None, **kwargs: Any
    ) -> Prior:
        """New latents and data from the model: z ~ p(z), y ~ p(y | z).

        :param data: prototype arguments whose shapes say how many data one draw has, as in
            ``fit.sample(x[:64])``; what a conditional model p(y | x) is given keeps its values.
            None: the first rows of the training data.
        :param num_samples: draws of a data set of this size.
        """
        from lvppl.inference.posterior import sample_prior

        if not data and self.prototype is not None:
            data, kwargs = self.prototype[0], {**self.prototype[1], **kwargs}
        with self._inside(data) as inside:
            return sample_prior(self.model, *inside, num_samples=num_samples, seed=seed, **kwargs)

    def to_arviz(self, *data: Any, **options: Any) -> Any:
        """ArviZ's record of posterior, prior, predictions and log-likelihoods.

        See :func:`lvppl.to_arviz` for the options.
        """
        from lvppl.inspection.arviz import to_arviz

        return to_arviz(self, *moved(data, self.state.device), **options)

    def save(self, folder: str | PathLike[str]) -> None:
        """Write the fit into ``folder``; see :func:`lvppl.save`."""
        from lvppl.io import save

        save(self, folder)

    def __repr__(self) -> str:
        params = self.params
        numbers = sum(value.numel() for value in params.values())
        length = f"{self.num_steps:,} steps, {self.num_epochs:,} epochs"
        lines = [
            f"Fit: {self.status} after {length}, seed {self.seed}",
            f"  {self.reason}",
            f"  objective   {type(self.objective).__name__}",
            f"  parameters  {len(params)} tensors, {numbers:,} numbers",
        ]
        measured = [name for name in _EVALUATED if name in self.history]
        if measured:
            parts = [f"{name} {self.history[name][-1]:.5g}" for name in measured]
            lines.append(f"  last        {', '.join(parts)} ({self.history.unit})")
        elif len(self.history["loss"]):
            lines.append(f"  last loss   {self.history['loss'][-1]:.6g} nats")
        return "\n".join(lines)

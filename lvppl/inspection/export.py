"""What exports to ArviZ share: groups of named arrays, their container, and their attributes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.posterior import sample_prior

__all__ = ["HELD_OUT", "Export", "attributes_of", "inside", "plain"]

Program = Callable[..., Any]
Array = NDArray[Any]

HELD_OUT = "use log_likelihood on held-out data instead"
R_HAT = (
    "no meaning: draws are independent draws from the guide in a single chain; r_hat says nothing "
    "about how close the guide is to the posterior"
)


class Export:
    """Groups of named arrays with named dimensions, converted once.

    Args:
        coords: labels of dimensions, by name.
    """

    def __init__(self, coords: Mapping[str, Sequence[Any]]) -> None:
        self._coords = coords
        self._groups: dict[str, dict[str, tuple[list[str], Array]]] = {}
        self._attrs: dict[str, dict[str, Any]] = {}

    def describe(self, group: str, **attrs: Any) -> None:
        """Attributes of one group, besides those of all."""
        self._attrs[group] = attrs

    def prior(
        self,
        model: Program,
        data: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        num_samples: int,
        seed: int | None,
    ) -> None:
        drawn = sample_prior(model, *data, num_samples=num_samples, seed=seed, **kwargs)
        self.drawn("prior", drawn.samples, drawn.plates)
        self.drawn("prior_predictive", drawn.predictive, drawn.plates)

    def observed(
        self,
        model: Program,
        data: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        values: Mapping[str, Tensor],
        plates: Mapping[str, tuple[str, ...]],
    ) -> None:
        """What the model observes, and those of its arguments that are not what it observes."""
        for name, value in values.items():
            self.add("observed_data", name, value, plates[name])
        sizes = {p: v.shape[i] for name, v in values.items() for i, p in enumerate(plates[name])}
        for name, value in _arguments(model, data, kwargs).items():
            if any(_same_values(value, seen) for seen in values.values()):
                continue
            rows = [plate for plate, size in sizes.items() if value.shape[:1] == (size,)]
            self.add("constant_data", name, value, tuple(rows[:1]))

    def drawn(
        self,
        group: str,
        values: Mapping[str, Tensor],
        plates: Mapping[str, tuple[str, ...]],
    ) -> None:
        """Variables that lead with draws, which make one chain."""
        for name, value in values.items():
            self.add(group, name, value[None], plates.get(name, ()), leading=["chain", "draw"])

    def add(
        self,
        group: str,
        name: str,
        value: Any,
        plates: Sequence[str] = (),
        *,
        leading: Sequence[str] = (),
        last: Sequence[str] | None = None,
    ) -> None:
        """One variable: its leading dimensions, its plates, and ``last``, by default numbered."""
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        variable = _variable(name)
        if last is None:
            events = array.ndim - len(leading) - len(plates)
            last = [f"{variable}_dim_{i}" for i in range(events)]
        dims = [*leading, *plates, *map(_variable, last)]
        self._groups.setdefault(group, {})[variable] = (dims, array)

    def convert(self, attrs: Mapping[str, Any]) -> Any:
        """One dataset a group; InferenceData before ArviZ 1.0, DataTree from then on.

        Datasets are built here and not by ``az.from_dict``, whose dimension names go by variable:
        one site has event dimensions in observed_data and none in log_likelihood.
        """
        import arviz as az
        import xarray as xr

        datasets = {}
        for group, variables in self._groups.items():
            renamed = {
                name: ([_free(dim, variables) for dim in dims], array)
                for name, (dims, array) in variables.items()
            }
            dataset = xr.Dataset(renamed, coords=self._labels(renamed))
            dataset.attrs = {**attrs, **self._attrs.get(group, {})}
            datasets[group] = dataset
        if int(az.__version__.split(".")[0]) >= 1:
            tree = xr.DataTree.from_dict(datasets)
            tree.attrs = dict(attrs)
            return tree
        return az.InferenceData(attrs=dict(attrs), **cast(Any, datasets))

    def _labels(self, variables: Mapping[str, tuple[list[str], Array]]) -> dict[str, Any]:
        labels: dict[str, Any] = {}
        for dims, array in variables.values():
            for dim, size in zip(dims, array.shape, strict=True):
                given = self._coords.get(dim)
                if given is not None and len(given) != size:
                    raise ProgramError(
                        f"coords[{dim!r}] has {len(given)} labels for {size} elements"
                    )
                labels[dim] = np.arange(size) if given is None else np.asarray(given)
        return labels


def _variable(name: str) -> str:
    return name.replace("/", "|")  # netCDF reads a slash as a group


def _free(dim: str, variables: Mapping[str, Any]) -> str:
    """xarray refuses a dimension that bears the name of a variable in the same group."""
    return f"{dim}_plate" if dim in variables else dim


def _arguments(
    model: Program, data: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Tensor (or array) arguments of the model by their names in its signature."""
    program = getattr(model, "forward", model)
    try:
        bound = inspect.signature(program).bind(*data, **kwargs).arguments
    except (TypeError, ValueError):
        bound = {f"argument_{i}": value for i, value in enumerate(data)}
        bound.update(kwargs)
    named: dict[str, Any] = {}
    for name, value in bound.items():
        if isinstance(value, tuple) and value == data[-len(value) :] and name not in kwargs:
            named.update({f"{name}_{i}": item for i, item in enumerate(value)})
        elif isinstance(value, dict):
            named.update(value)
        else:
            named[name] = value
    return {
        name: torch.as_tensor(value)
        for name, value in named.items()
        if isinstance(value, Tensor | np.ndarray)
    }


def _same_values(first: Tensor, second: Tensor) -> bool:
    """Whether an argument is what a site observes, up to a reshape."""
    if first.numel() != second.numel():
        return False
    first, second = first.reshape(-1).cpu(), second.reshape(-1).cpu()
    kind = torch.promote_types(first.dtype, second.dtype)
    return torch.equal(first.to(kind).nan_to_num(), second.to(kind).nan_to_num())


# ----------------------------------------------------------------------------------- about the fit


def inside(fit: Any, data: tuple[Any, ...]) -> AbstractContextManager[tuple[Any, ...]]:
    """The parameter state of a fit, its buffers kept, with the data on its device.

    A plain record of model and guide runs in the parameter store as it is.
    """
    enter = getattr(fit, "_inside", None)
    return nullcontext(data) if enter is None else enter(data)


def attributes_of(fit: Any, seed: int | None) -> dict[str, Any]:
    """What every group says of the fit and of its draws."""
    objective = getattr(fit, "objective", "unknown")
    return {
        "inference_library": "lvppl",
        "inference_library_version": getattr(fit, "versions", {}).get("lvppl", "unknown"),
        "method": "stochastic variational inference",
        "objective": objective if isinstance(objective, str) else type(objective).__name__,
        "status": getattr(fit, "status", "unknown"),
        "reason": getattr(fit, "reason", ""),
        "seed": getattr(fit, "seed", None),
        "draws_seed": seed,
        "draws": "independent draws from the guide",
        "r_hat": R_HAT,
    }


def plain(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Values that netCDF stores: whole numbers, floats and text; the rest as text."""
    return {
        name: v if isinstance(v, int | float) and not isinstance(v, bool) else str(v)
        for name, v in attrs.items()
    }

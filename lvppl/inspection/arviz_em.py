r"""An EM fit as ArviZ sees it: exact draws of the latents at point parameters.

Nothing here is a sample of parameters. What has draws are the latents, z ~ p(z | y), which are
independent and exact; their marginals, ln p(y) and the parameters are numbers without draws, and
restarts are starts of an optimiser, not chains.

ln p(y_n) is in the group ``log_evidence``: ArviZ's ``log_likelihood`` has a value for each draw of
the parameters, which ``az.loo`` and ``az.waic`` average. There are no such draws, so that there is
no such group, and both say so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.evidence import ExactPosterior
from lvppl.factor_graph import graph_of
from lvppl.inference.em_fit import EMFit, StepsOfData
from lvppl.inference.posterior import PASS_ELEMENTS, complete, observed_values
from lvppl.inspection.export import Export, attributes_of, plain
from lvppl.layout import layout_of
from lvppl.seeding import checked_seed, derived_seed, seeded
from lvppl.terms import Terms, trace_terms
from lvppl.tracing import plates_of, sample_sites, undisturbed

__all__ = ["em_to_arviz"]

Program = Callable[..., Any]
Plates = dict[str, tuple[str, ...]]

R_HAT = "no meaning: draws are exact and independent, in a single chain; restarts are no chains"


def em_to_arviz(
    fit: EMFit,
    *data: Any,
    num_samples: int = 500,
    prior: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    batch_size: int | None = None,
    seed: int | None = 0,
    **kwargs: Any,
) -> Any:
    """Export a fit by :class:`lvppl.EM`; see :func:`lvppl.to_arviz` for arguments and groups."""
    if batch_size is not None:
        raise ProgramError(
            f"batch_size={batch_size} has no use here: an EM fit has an exact posterior, which is "
            "found for all data at once. Leave batch_size out, or export some of the rows."
        )
    seed = checked_seed(seed)
    export = Export(coords or {})
    with fit._running(data, kwargs) as (program, data), torch.no_grad():
        exact = ExactPosterior(graph_of(program, data, kwargs))
        drawn, undrawn = _drawn(exact, num_samples, seed)
        # without all latents drawn, one run tells what is observed, and no more
        replayed = _Replayed.of(program, data, kwargs, {} if undrawn else drawn, seed)
        notes = [*replayed.notes, *undrawn]
        _add_latents(export, exact, drawn)
        per_datum = exact.log_evidence.per_datum.reshape(replayed.log_joint.shape[1:])
        _add_evidence(export, replayed, per_datum)
        if not undrawn:
            _add_replayed(export, replayed, per_datum)
        if prior and not replayed.factors:
            export.prior(StepsOfData()(fit.model), data, kwargs, num_samples, seed)
        elif prior:
            why = f"no prior groups: pyro.factor {', '.join(replayed.factors)} cannot be sampled"
            notes.append(why)
        export.observed(fit.model, data, kwargs, replayed.observed, replayed.plates)
        latents = _map_latents(fit, data, kwargs)
    _add_parameters(export, fit, latents)
    return export.convert(plain({**_attributes(fit, seed), "notes": "; ".join(notes)}))


# ------------------------------------------------------------------------------ draws, run through


@dataclass(frozen=True)
class _Replayed:
    """What the program says at draws of its latents; draws lead."""

    log_joint: Tensor
    """ln p(z, y), (draws, *data plates)."""
    predictive: dict[str, Tensor]
    observed: dict[str, Tensor]
    plates: Plates
    data_plates: tuple[str, ...]
    factors: tuple[str, ...]
    notes: tuple[str, ...]

    @staticmethod
    def of(
        program: Program,
        data: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        drawn: Mapping[str, Tensor],
        seed: int,
    ) -> _Replayed:
        log_joint, predictive, terms = [], [], None
        with seeded(derived_seed(seed, "predictive")):
            for terms, new in _passes(program, data, kwargs, drawn):
                log_joint.append(terms.log_likelihood + terms.log_prior)
                predictive.append(new)
        assert terms is not None
        observed, looped = observed_values(terms), terms.layout.loop_reason
        sizes = tuple(plate.size for plate in terms.layout.data_plates)
        return _Replayed(
            log_joint=torch.cat(log_joint).reshape(-1, *sizes),
            predictive={n: torch.cat([part[n] for part in predictive]) for n in predictive[0]},
            observed={name: site.observed[0] for name, site in observed.items()},
            plates={name: site.plates for name, site in observed.items()},
            data_plates=terms.data_plates,
            factors=tuple(sorted(terms.observed.keys() - observed.keys())),
            notes=(f"draws ran one by one: {looped}",) if looped else (),
        )


def _passes(
    program: Program,
    data: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    drawn: Mapping[str, Tensor],
) -> Iterator[tuple[Terms, dict[str, Tensor]]]:
    """Some draws at a time, as many as fit: their terms, and new observations given them."""
    num_samples = len(next(iter(drawn.values()))) if drawn else 1
    unmarked = cast(Any, lambda site: {"enumerate": None})
    model: Program = poutine.infer_config(program, config_fn=unmarked)
    layout = layout_of(model, None, data, kwargs, with_particles=num_samples > 1)
    elements = sum(item.numel() for item in data if isinstance(item, Tensor))
    at_once = 1 if layout.loop_reason else max(1, min(256, PASS_ELEMENTS // max(elements, 1)))
    for first in range(0, num_samples, at_once):
        count = min(at_once, num_samples - first)
        with _Given({name: values[first : first + count] for name, values in drawn.items()}):
            terms = trace_terms(model, None, data, kwargs, num_particles=count)
            new = complete(terms, model, data, kwargs).predictive
        yield terms, new


class _Given(Messenger):
    """Around a program and its particle plate: latents take given values, one a particle."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.values or msg["done"]:
            return
        values = self.values[msg["name"]]
        frames = [frame for frame in msg["cond_indep_stack"] if frame.dim is not None]
        batch = [1] * max((-frame.dim for frame in frames), default=0)
        for frame in frames:
            batch[frame.dim] = frame.size
        event = values.shape[values.dim() - msg["fn"].event_dim :]
        msg["value"], msg["done"] = values.reshape((*batch, *event)), True


# -------------------------------------------------------------------------------------- the groups


def _drawn(
    exact: ExactPosterior, num_samples: int, seed: int
) -> tuple[dict[str, Tensor], list[str]]:
    """Draws of the latents, and why the program cannot be run at them, if so."""
    nothing = "no posterior_predictive and sample_stats: "
    try:
        drawn = exact.sample(num_samples, seed=seed)
    except ProgramError as error:
        if not exact.integrated:
            raise
        return {}, [f"{nothing}{error}"]
    inner = [site for site in exact.sites if exact.inside(site)]
    if inner:
        what = f"{', '.join(inner)} are no sites of the program, which cannot be run at their draws"
        return drawn, [nothing + what]
    return drawn, []


def _add_latents(export: Export, exact: ExactPosterior, drawn: Mapping[str, Tensor]) -> None:
    export.drawn("posterior", drawn, {site: exact.plates(site) for site in drawn})
    for site in exact.sites:
        marginals, plates = exact.marginals(site), exact.plates(site)
        inner = [f"{site}_dim_{i}" for i in range(marginals.dim() - len(plates) - 1)]
        name, last = f"{site}_responsibilities", [*inner, f"{site}_state"]
        export.add("responsibilities", name, marginals, plates, last=last)
    export.describe(
        "responsibilities",
        responsibilities="p(z = state | y), exactly, at point parameters; not draws",
    )


def _add_replayed(export: Export, replayed: _Replayed, log_evidence: Tensor) -> None:
    export.drawn("posterior_predictive", replayed.predictive, replayed.plates)
    stats = {"log_p": replayed.log_joint, "log_q": replayed.log_joint - log_evidence}
    export.drawn("sample_stats", stats, dict.fromkeys(stats, replayed.data_plates))
    export.describe(
        "sample_stats", log_p="ln p(y, z)", log_q="ln p(z | y): q is the posterior", units="nats"
    )


def _add_evidence(export: Export, replayed: _Replayed, log_evidence: Tensor) -> None:
    observed = [*replayed.observed]
    name = observed[0] if len(observed) == 1 else "all_observed"
    export.add("log_evidence", name, log_evidence, replayed.data_plates)
    where = ", ".join(replayed.data_plates)
    what = f"ln p(y_n) of each element of ({where})"
    if not where:
        what = "ln p(y) of the whole data set, which is one datum: no plate holds every site"
    export.describe(
        "log_evidence",
        log_evidence=f"{what}, latents summed out exactly, at point parameters; no draws, no LOO",
        units="nats",
    )


def _add_parameters(export: Export, fit: EMFit, latents: Mapping[str, _Shape]) -> None:
    params = fit.params
    shapes = {name: latents.get(name, _Shape((), value.shape)) for name, value in params.items()}
    for name, shape in shapes.items():
        export.add("parameters", name, params[name].reshape(shape.sizes), shape.plates)
    what = "point estimates, not draws"
    if latents:
        what += f"; {', '.join(latents)}: latents at their maximum a posteriori"
    export.describe("parameters", parameters=what)
    if not fit.restarts:
        return
    for name, shape in shapes.items():
        values = torch.stack([r.params[name].reshape(shape.sizes) for r in fit.restarts])
        export.add("restarts", name, values, shape.plates, leading=["restart"])
    for name in ("objective", "num_steps", "status"):
        column = np.array([getattr(restart, name) for restart in fit.restarts])
        free = f"restart_{name}" if name in params else name
        export.add("restarts", free, column, leading=["restart"])
    kept = [r.number for r in fit.restarts if r.objective == fit.objective_value]
    export.describe(
        "restarts",
        restarts="independent starts of the optimiser, not chains, with the parameters, the "
        "objective (nats) and the status that each ended with",
        kept=kept[0] if kept else "none of these",
    )


@dataclass(frozen=True)
class _Shape:
    """Named dimensions of a parameter, and the sizes of all its dimensions."""

    plates: tuple[str, ...]
    sizes: torch.Size


def _map_latents(fit: EMFit, data: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, _Shape]:
    """The latents that were maximised: as parameters they know nothing of their plates."""
    names = fit.settings["map_latents"]
    if not names:
        return {}
    with undisturbed(), poutine.block():
        sites = sample_sites(poutine.trace(fit.model).get_trace(*data, **kwargs))
    found = {}
    for site in sites:
        if site["name"] in names:
            plates = plates_of(site)
            sizes = torch.Size([*(plate.size for plate in plates), *site["fn"].event_shape])
            found[site["name"]] = _Shape(tuple(plate.name for plate in plates), sizes)
    return found


# ----------------------------------------------------------------------------------- about the fit


def _attributes(fit: EMFit, seed: int) -> dict[str, Any]:
    names = ", ".join(fit.params)[:300]
    return {
        **attributes_of(fit, seed),
        "method": "expectation maximisation",
        "objective": fit.tracked,
        "objective_value": fit.objective_value,
        "draws": "independent exact draws of the latents, z ~ p(z | y), at point parameters",
        "r_hat": R_HAT,
        "loo": f"no meaning, and so no group log_likelihood: the parameters are point estimates "
        f"({names}), not draws that could be reweighted, and every latent is summed out; use "
        "fit.log_evidence on held-out data instead",
    }

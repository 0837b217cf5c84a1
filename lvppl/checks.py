"""Preflight of a (model, guide, data) triple: the table of its sites, and every refusal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from torch import Tensor

from lvppl.columns import in_columns
from lvppl.errors import ProgramError, ProgramFailure
from lvppl.layout import layout_of
from lvppl.matching import check_same_space, first_index, has_no_density, no_density
from lvppl.missing import ELSEWHERE, with_missing
from lvppl.observations import require_own_values
from lvppl.terms import trace_terms
from lvppl.tracing import (
    is_enumerated,
    is_point,
    kind_of,
    plates_of,
    sample_sites,
    support_of,
    trace_pair,
    traced,
    undisturbed,
)
from lvppl.verdict import Verdict, verdict_on_evidence

__all__ = ["CheckReport", "SiteRow", "Verdict", "check"]

Program = Callable[..., Any]


@dataclass(frozen=True)
class SiteRow:
    """One sample site.

    Attributes:
        name: the site.
        role: "latent", "observed", "enumerated", "auxiliary" (guide only) or "factor".
        distribution: the model's distribution (the guide's for an auxiliary site).
        shape: batch and event shape, "5 | 2".
        plates: names of its plates, outermost last.
        in_guide: whether the guide draws it; ``None`` where that has no meaning.
        reparameterised: whether the guide's draw has a pathwise derivative.
        samplable: whether its conditional distribution can be sampled.
        computable: whether its conditional density can be evaluated.
        reason: why not, where one of the two is False.
    """

    name: str
    role: str
    distribution: str
    shape: str
    plates: tuple[str, ...]
    in_guide: bool | None
    reparameterised: bool | None
    samplable: bool
    computable: bool
    reason: str = ""


@dataclass(frozen=True)
class CheckReport:
    """The table of sites, and the verdict on each assumption. Printing it shows the table.

    Attributes:
        rows: one row a site.
        samplable: P(z) and P(y | z) can be sampled.
        computable: P(z) and P(y | z) can be evaluated.
        evidence: the verdict on P(y).
        data_plates: plates common to every sample site; empty if the data set is one datum.
        notes: further remarks.
    """

    rows: tuple[SiteRow, ...]
    samplable: bool
    computable: bool
    evidence: Verdict
    data_plates: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> SiteRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def require(self, *, samplable: bool = False, computable: bool = False) -> CheckReport:
        """Refuse a program that lacks an assumption; returns the report itself otherwise.

        Raises:
            ProgramError: with the sentence that says which site breaks which assumption.
        """
        for row in self.rows:
            if samplable and not row.samplable:
                raise ProgramError(f"This needs samples of P(z) and P(y | z): {row.reason}")
            if computable and not row.computable:
                raise ProgramError(f"This needs the densities P(z) and P(y | z): {row.reason}")
        return self

    def __str__(self) -> str:
        header = (
            "site",
            "role",
            "distribution",
            "shape",
            "plates",
            "in guide",
            "reparam.",
            "samplable",
            "computable",
        )
        lines = in_columns([header, *(_cells(row) for row in self.rows)])
        data = ", ".join(f"'{name}'" for name in self.data_plates)
        lines += [
            "",
            f"data plates  {data or 'none: the whole data set is one datum'}",
            f"P(z), P(y|z) {_words(self.samplable, 'can be sampled')}, "
            f"{_words(self.computable, 'can be evaluated')}",
            f"P(y)         {self.evidence.kind}: {self.evidence.sentence}",
        ]
        lines += [f"because      {row.reason}" for row in self.rows if row.reason]
        lines += [f"note         {note}" for note in self.notes]
        return "\n".join(lines)


def check(
    model: Program,
    guide: Program | None = None,
    *args: Any,
    strict: bool = True,
    missing: str | None = None,
    **kwargs: Any,
) -> CheckReport:
    """Run the pair once on the data, tabulate its sites, and refuse what cannot be right.

    The standing assumptions of the subject are that P(z) and P(y | z) can be sampled and can be
    evaluated; a third verdict is on P(y), which can be intractable though both hold.

    Random generators, buffers and parameters stay as they are, except that parameters which the
    programs create on their first run are created.

    Args:
        model: a Pyro program.
        guide: its guide, or ``None`` to look at the model alone.
        args, kwargs: the arguments of both: the data.
        strict: also refuse sites that only one of the two has, plates that differ, NaN and
            infinities in the data. ``False`` is the way out where that is intended.
        missing: ``"nan"`` takes NaN in observed sites as missing values (:mod:`lvppl.missing`).

    Raises:
        ProgramError: a latent without a guide and the reverse; mismatched shapes, plates, supports
            or subsamples; tensors on different devices; NaN or infinity in the data or in a
            log-term, by site and datum.
    """
    model, guide = with_missing(model, guide, missing)
    _check_arguments(args, kwargs, strict, missing)
    with undisturbed():
        _run_once(model, guide, args, kwargs, strict)
        layout = layout_of(model, guide, args, kwargs, strict=strict)
        model_trace, guide_trace = trace_pair(model, guide, args, kwargs)
        _check_sites(model_trace, strict)
        rows = _rows(model_trace, guide_trace, has_guide=guide is not None)
        if all(row.computable for row in rows):
            terms = trace_terms(model, guide, args, kwargs, strict=strict)
            terms.elbo("sampled")  # what the losses would refuse is refused here
            notes = terms.notes
            if strict:
                _check_finite(terms, missing)
        else:
            notes = ()
        verdict = verdict_on_evidence(
            model, args, kwargs, model_trace, rows, has_guide=guide is not None
        )
    return CheckReport(
        rows=tuple(rows),
        samplable=all(row.samplable for row in rows),
        computable=all(row.computable for row in rows),
        evidence=verdict,
        data_plates=tuple(plate.name for plate in layout.data_plates),
        notes=notes,
    )


# -------------------------------------------------------------------------------------- the rows


def _rows(
    model_trace: poutine.Trace, guide_trace: poutine.Trace, *, has_guide: bool
) -> list[SiteRow]:
    guide_sites = {site["name"]: site for site in sample_sites(guide_trace)}
    rows = [_row(site, guide_sites, has_guide) for site in sample_sites(model_trace)]
    known = {row.name for row in rows}
    return rows + [
        _row(site, guide_sites, has_guide, role="auxiliary")
        for name, site in guide_sites.items()
        if name not in known
    ]


def _row(
    site: Any, guide_sites: Mapping[str, Any], has_guide: bool, role: str | None = None
) -> SiteRow:
    fn, name = site["fn"], site["name"]
    mine = guide_sites.get(name)
    role = role or _role(site, mine)
    samplable, why_not_sampled = _samplable(site)
    computable, why_not_computed = _computable(site)
    draws = has_guide and role in ("latent", "enumerated", "auxiliary")
    return SiteRow(
        name=name,
        role=role,
        distribution=kind_of(fn),
        shape=f"{_shape(fn.batch_shape)} | {_shape(fn.event_shape)}",
        plates=tuple(plate.name for plate in plates_of(site)),
        in_guide=(mine is not None) if draws else None,
        reparameterised=bool(mine["fn"].has_rsample) if draws and mine is not None else None,
        samplable=samplable,
        computable=computable,
        reason=" ".join(reason for reason in (why_not_sampled, why_not_computed) if reason),
    )


def _role(site: Any, guide_site: Any | None) -> str:
    if isinstance(site["fn"], Unit):
        return "factor"
    if site["is_observed"]:
        return "observed"
    enumerated = is_enumerated(guide_site if guide_site is not None else site)
    return "enumerated" if enumerated else "latent"


def _samplable(site: Any) -> tuple[bool, str]:
    name, fn = site["name"], site["fn"]
    if isinstance(fn, Unit):
        return False, (
            f"'{name}' is a pyro.factor: it weighs configurations that were drawn without it, so "
            "the joint distribution cannot be sampled by running the program (a loopy graphical "
            "model); only annealed or Markov chain sampling reaches it."
        )
    try:
        fn.sample()
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        why = f" ({str(error).splitlines()[0]})" if str(error) else ""
        return False, f"'{name}' ({kind_of(fn)}) has a density but no sampler{why}."
    return True, ""


def _computable(site: Any) -> tuple[bool, str]:
    name, fn = site["name"], site["fn"]
    if has_no_density(site):
        return False, no_density(name)
    try:
        fn.log_prob(site["value"])
    except NotImplementedError:
        return False, f"'{name}' ({kind_of(fn)}) can be sampled but has no density."
    except (RuntimeError, TypeError, ValueError):
        pass  # it has a density, which fails on these data: evaluating the terms says how
    return True, ""


# --------------------------------------------------------------------------------------- refusals


def _check_arguments(args: Any, kwargs: Any, strict: bool, missing: str | None) -> None:
    tensors = [(f"argument {i}", a) for i, a in enumerate(args) if isinstance(a, Tensor)]
    tensors += [(f"argument '{n}'", a) for n, a in kwargs.items() if isinstance(a, Tensor)]
    devices = {name: tensor.device for name, tensor in tensors}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ProgramError(f"The data lie on different devices: {where}. Move them to one.")
    for name, tensor in tensors:
        if tensor.dim() and tensor.shape[0] == 0:
            raise ProgramError(f"The data are empty: {name} has shape {tuple(tensor.shape)}.")
        if strict and tensor.is_floating_point() and tensor.device.type != "meta":
            bad = tensor.isinf() if missing else ~torch.isfinite(tensor)
            if bool(bad.any()):
                raise ProgramError(
                    f"The data hold {int(bad.sum())} values that are NaN or infinite, the first in "
                    f"{name} at index {first_index(bad)}. Clean them, or pass strict=False if the "
                    "program masks them."
                )


def _run_once(model: Program, guide: Program | None, args: Any, kwargs: Any, strict: bool) -> None:
    """Run both, apart and then together; where torch objects, name the site it happened after."""
    prior = None
    try:
        prior = traced("model", model, args, kwargs)
    except ProgramFailure as failure:
        # a prior without a sampler is fine as long as the guide draws the latent
        if guide is None or not isinstance(failure.__cause__, NotImplementedError):
            raise
    if guide is None:
        _check_devices(prior or poutine.Trace(), args)
        return
    guided = traced("guide", guide, args, kwargs)
    for trace in (prior, guided):
        if trace is not None:
            _check_devices(trace, args)
    for site in sample_sites(guided):
        other = None if prior is None else prior.nodes.get(site["name"])
        if other is not None and not site["is_observed"] and not other["is_observed"]:
            check_same_space(site, other, strict)
    traced("model, replayed against the guide,", poutine.replay(model, trace=guided), args, kwargs)


def _check_devices(trace: poutine.Trace, args: Any) -> None:
    devices = {a.device for a in args if isinstance(a, Tensor)}
    for site in sample_sites(trace):
        value = site["value"]
        if isinstance(value, Tensor) and devices and value.device not in devices:
            raise ProgramError(
                f"Site '{site['name']}' lies on {value.device}, the data on {devices.pop()}. "
                "Create its parameters on the data's device."
            )


def _check_sites(trace: poutine.Trace, strict: bool) -> None:
    for site in sample_sites(trace):
        value, fn = site["value"], site["fn"]
        if strict and site["is_observed"]:
            require_own_values(site)
        if strict and site["is_observed"] and support_of(fn) is not None and not is_point(site):
            inside = _inside(fn, value)
            if not bool(inside.all()):
                raise ProgramError(
                    f"Observed site '{site['name']}' has values outside the support of its "
                    f"{kind_of(fn)} ({fn.support}), the first at index {first_index(~inside)}. "
                    "Correct the data, choose a likelihood with that support, or pass strict=False "
                    "if its density is meant to be used there."
                )


def _inside(fn: Any, value: Tensor) -> Tensor:
    try:
        inside = torch.as_tensor(fn.support.check(value))
    except RuntimeError:  # shapes that do not broadcast: the log-probability says more
        return torch.tensor(True)
    mask = getattr(fn, "_mask", None)
    return inside | ~mask if isinstance(mask, Tensor) else inside


def _check_finite(terms: Any, missing: str | None) -> None:
    for name, plates, log_prob, allow in terms.site_log_probs():
        bad = log_prob.isnan() | (log_prob == math.inf)
        if not allow:
            bad |= log_prob == -math.inf
        if bool(bad.any()):
            index = first_index(bad[0])
            value = log_prob[bad].flatten()[0]
            where = f" at index {index} of its plates {list(plates)}" if index else ""
            if missing and bool(value.isnan()):
                raise ProgramError(
                    f"The log-probability of site '{name}' is nan{where}. {ELSEWHERE}"
                )
            raise ProgramError(
                f"The log-probability of site '{name}' is {float(value)}{where}. Look at the "
                "distribution's arguments there: a scale of zero, an overflow, or data that the "
                "model excludes. strict=False lets it pass."
            )


# --------------------------------------------------------------------------------------- printing


def _cells(row: SiteRow) -> tuple[str, ...]:
    return (
        row.name,
        row.role,
        row.distribution,
        row.shape,
        ", ".join(row.plates) or "–",
        _mark(row.in_guide),
        _mark(row.reparameterised),
        _mark(row.samplable),
        _mark(row.computable),
    )


def _mark(value: bool | None) -> str:
    return "–" if value is None else "yes" if value else "no"


def _words(holds: bool, what: str) -> str:
    return what if holds else f"{what.replace('can be', 'cannot all be')}"


def _shape(shape: Any) -> str:
    return "×".join(str(size) for size in shape) or "·"

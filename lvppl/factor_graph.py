"""A model run with every discrete latent enumerated, and the refusals of what cannot be summed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.infer import config_enumerate
from torch import Tensor
from torch.distributions import Independent
from torch.utils._python_dispatch import TorchDispatchMode

from lvppl.conjugate import Nodes
from lvppl.enumerated import Enumerated, num_states
from lvppl.errors import ProgramError, ProgramFailure
from lvppl.layout import Layout, layout_of
from lvppl.linear_gaussian import Group, Placed, groups_of, recognised
from lvppl.marginalised import has_inner_latents, tracked
from lvppl.observations import explain_observations, require_own_values, require_plates
from lvppl.packed import (
    Reduction,
    dims_of,
    log_max,
    log_sum_exp,
    named,
    product,
    sum_out,
)
from lvppl.packing import Packing, own_symbol
from lvppl.replay import Replay
from lvppl.tracing import is_discrete, is_enumerated, is_masked, kind_of, plates_of

__all__ = ["FactorGraph", "NothingLarge", "TooLarge", "enumerating", "explained_run", "graph_of"]

Program = Callable[..., Any]

MOST_ELEMENTS = 2**28
"""Elements of the largest table that an exact sum may need: 2 GiB in float64."""


def enumerating(model: Program) -> Program:
    """The program with every discrete latent marked for parallel enumeration."""
    marked: Program = config_enumerate(model, "parallel")
    return marked


def graph_of(
    model: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, temperature: float = 1.0
) -> FactorGraph:
    """Run ``model`` once with every discrete latent enumerated, and refuse what has no exact sum.

    At a temperature other than 1, latents that a distribution sums out by itself have it too.

    Raises:
        ProgramError: a latent is continuous or has no finite support, a table would be too large,
            the program cannot run under enumeration, or its plates do not nest.
    """
    if not callable(model) or isinstance(model, type):
        raise ProgramError(f"model must be a Pyro program (a callable), not {model!r}")
    program = enumerating(model)

    def density(site: Any) -> Tensor | None:
        if temperature == 1.0 or not has_inner_latents(site["fn"]):
            return None
        return tracked(site["fn"], site["value"], hard=False, temperature=temperature)

    options: dict[str, Any] = {"temperature": temperature, "guarded": True, "density": density}
    with explained_run(program, args, kwargs):
        layout = layout_of(program, None, args, kwargs)
        placed = Placed(layout.nesting)
        graph = FactorGraph(program, args, kwargs, layout, placed=placed, **options)
    graph.require_affordable()
    return graph


class FactorGraph:
    """The log-factors of one run, ready to be summed, maximised or drawn from.

    Args:
        program: a model whose discrete latents are marked for enumeration.
        args, kwargs: its arguments.
        layout: of the program at these arguments.
        temperature: see :class:`~lvppl.enumerated.Enumerated`.
        guarded: stop before the program itself makes a tensor that is too large.
        density: gives what takes the place of a site's log-probabilities, ``None`` for none.
        placed: integrate Gaussian latents, at values that it gives them.
    """

    def __init__(
        self,
        program: Program,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        layout: Layout,
        *,
        temperature: float = 1.0,
        guarded: bool = False,
        density: Callable[[Any], Tensor | None] | None = None,
        placed: Placed | None = None,
    ) -> None:
        guard: AbstractContextManager[Any] = (
            NothingLarge(MOST_ELEMENTS) if guarded else nullcontext()
        )
        here = program if placed is None else placed(program)
        # what depends on a Gaussian latent is found by derivatives
        grad = nullcontext() if placed is None else torch.enable_grad()
        with guard, grad:
            self.run = Replay(here, None, args, kwargs, layout, None, False, False)
        self.sites: dict[str, Any] = dict(self.run.model_sites)
        if guarded:
            for site in self.sites.values():
                require_plates(site)
                if site["is_observed"]:
                    require_own_values(site)
        if guarded and any(_elements(site) > MOST_ELEMENTS for site in self.sites.values()):
            raise TooLarge
        gaussian = placed.values if placed is not None else {}
        _refuse_continuous({n: s for n, s in self.sites.items() if n not in gaussian})
        self.temperature = temperature
        self.latents = {n: s for n, s in self.sites.items() if is_enumerated(s)}
        self.packing = Packing()
        self.groups: list[Group] = []
        if placed is not None and placed.values:
            around = self._around()
            found = recognised(
                self.run, placed, program, args, kwargs, self.packing, around, temperature
            )
            self.groups = groups_of(*found, self.packing, around)
        for site in self.sites.values():
            if guarded:
                self._require_own_dimensions(site)
            replaced = None if density is None else density(site)
            if replaced is not None:
                self._replace(site, replaced)
        self.enumerated = self._enumerated(temperature)

    def _require_own_dimensions(self, site: Any) -> None:
        """Refuse a batch dimension of another site's plate: an element of it is no state here."""
        log_prob, plates = self.run.log_prob(site), {plate.dim for plate in plates_of(site)}
        for dim in range(-min(self.run.width, log_prob.dim()), 0):
            if log_prob.shape[dim] > 1 and dim not in plates:
                raise ProgramError(
                    f"Site '{site['name']}' has batch shape {tuple(site['fn'].batch_shape)}, whose "
                    f"dimension {dim} belongs to no plate around it. Put it into the plate that "
                    "its elements come from, or sum over them before with .to_event."
                )

    def _around(self) -> dict[str, tuple[str, frozenset[str]]]:
        """By symbol of a discrete latent, its name and the symbols of its plates."""
        found = {}
        for name, site in self.latents.items():
            self.packing.pack(site, self.run.log_prob(site))
            plates = frozenset(self.packing.symbol(plate) for plate in plates_of(site))
            found[own_symbol(site)] = name, plates
        return found

    def _replace(self, site: Any, log_prob: Tensor) -> None:
        whole = self.run.full(log_prob, site)
        site["lvppl_log_prob"] = scale_and_mask(whole, 1.0, site["mask"])

    def replaced(self, log_probs: Mapping[str, Tensor]) -> FactorGraph:
        """The same run with other log-probabilities for some sites, batch-shaped, by site."""
        other = copy.copy(self)
        other.run = copy.copy(self.run)
        other.sites = {name: dict(site) for name, site in self.sites.items()}
        other.run.model_sites = other.sites
        for name, log_prob in log_probs.items():
            other._replace(other.sites[name], log_prob)
        other.latents = {name: other.sites[name] for name in self.latents}
        other.enumerated = other._enumerated(self.temperature)
        return other

    @property
    def states(self) -> dict[str, Any]:
        """The latents that are summed out: discrete."""
        return {n: s for n, s in self.latents.items() if not isinstance(s["fn"], Nodes)}

    @property
    def integrated(self) -> dict[str, Any]:
        """The latents that are integrated: continuous."""
        return {n: s for n, s in self.latents.items() if isinstance(s["fn"], Nodes)}

    def _enumerated(self, temperature: float, padding: float | None = None) -> Enumerated | None:
        """The factors that hold enumerated variables.

        A masked element of a latent keeps its probabilities, which sum to one and so count nothing
        in a sum. To count nothing at a temperature T they are taken to the power T first, and to
        the power 0 in a maximum.
        """
        run, power = self.run, temperature if padding is None else padding
        integrated = self._integrated_sites
        inside = {
            n: s
            for n, s in self.sites.items()
            if n not in integrated and run.log_prob(s).dim() > run.width
        }
        if not inside and not self.groups:
            return None
        factors = {}
        for name, site in inside.items():
            factor = run._factor(site)
            if power != 1.0 and is_enumerated(site) and is_masked(site):
                kept = run.log_prob(site)
                padded = power * factor if power else torch.zeros_like(factor)
                factor = torch.where(factor == kept, factor, padded)
            factors[name] = (site, factor)
        return Enumerated(
            factors,
            run.layout,
            temperature=temperature,
            packing=self.packing,
            tables=[group.table for group in self.groups],
        )

    @property
    def _integrated_sites(self) -> set[str]:
        """Names of the sites that are in the tables of Gaussian latents."""
        return {residual.name for group in self.groups for residual in group.residuals}

    def under(self, reduction: Reduction) -> Enumerated:
        """The factors as a reduction takes them."""
        assert self.enumerated is not None
        if reduction is not log_max or not any(map(is_masked, self.latents.values())):
            return self.enumerated
        found = self._enumerated(self.enumerated.temperature, padding=0.0)
        assert found is not None
        return found

    def require_affordable(self) -> None:
        """Raise where the largest table of the elimination would not fit."""
        if self.enumerated is None:
            return
        _, largest = self.enumerated.cost()
        if largest > MOST_ELEMENTS:
            raise ProgramError(too_large(self.latents, largest))

    @property
    def shape(self) -> tuple[int, int]:
        return self.run.shape

    @property
    def data_scale(self) -> float:
        return self.run.data_scale

    def apart(self) -> Tensor:
        """ln p of the sites that no enumerated latent touches, (1, data)."""
        inside = {*(self.enumerated.factors if self.enumerated is not None else ())}
        inside |= self._integrated_sites
        terms = [self.run._term(site) for name, site in self.sites.items() if name not in inside]
        return self.run._sum(terms)

    def log_evidence(self) -> Tensor:
        """ln p(y), (data,), differentiable; at a temperature T, T ln Σ p(z, y)^(1/T).

        Raises:
            ProgramError: a latent is integrated whose integral is not to be trusted.
        """
        value = self.apart()
        if self.enumerated is not None:
            value = value + self.enumerated.log_evidence(self.shape)
        value = value[0]
        if self.integrated and bool(value.detach().isnan().any()):
            raise ProgramError(self._untrusted(value))
        return value

    def solve(
        self,
        queries: list[Tensor],
        *,
        reduction: Reduction = log_sum_exp,
        differentiable: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """The value of the contraction, (data,), and the answers to the queries.

        Raises:
            ProgramError: a datum has probability zero: there is no posterior; or as
                ``log_evidence``.
        """
        value, answers = self.apart(), list[Tensor]()
        if self.enumerated is not None:
            inside, answers = self.under(reduction).solve(
                queries, self.shape, reduction=reduction, differentiable=differentiable
            )
            value = value + inside
        value = value[0]
        possible = value.isfinite()
        if not bool(possible.all()):
            first = int((~possible).nonzero()[0])
            if self.integrated and bool(value[first].isnan()):
                raise ProgramError(self._untrusted(value))
            raise ProgramError(
                f"datum {first} has ln p(y) = {float(value[first].detach())} under the model: no "
                "value of its latents explains it, so that there is no posterior. Look for "
                "parameters that are exactly 0 or 1, and for data outside the support."
            )
        return value, answers

    # ----------------------------------------------------------------------- integrated latents

    def given(self, name: str) -> Given:
        """The density of an integrated latent, given the states that it depends on.

        Raises:
            ProgramError: it depends on a latent that is no such state.
        """
        assert self.enumerated is not None
        symbol, plates = self._symbols(name)
        factors = [f for f in self.enumerated.over_factors() if symbol in dims_of(f)]
        others = self._coupled(name)
        if others:
            raise ProgramError(
                f"Given the data, the integrated latent '{name}' depends on '{others[0]}', so that "
                "it has no density of its own. Write Gaussian latents as one vector, "
                "dist.MultivariateNormal(...) or dist.Normal(...).to_event(1)."
            )
        within = set(plates) | self.enumerated.eliminate
        table = product([sum_out(f, set(dims_of(f)) - within) for f in factors])
        states = {n: self._symbols(n)[0] for n in self.states}
        kept = [n for n, state in states.items() if state in dims_of(table)]
        dims = "".join([*(states[n] for n in kept), *(p for p in plates if p in dims_of(table))])
        order = [dims_of(table).index(s) for s in dims + symbol]
        return Given(len(kept), named(table.permute(order), dims + symbol))

    def _symbols(self, name: str) -> tuple[str, str]:
        """Of a latent itself, and of its plates left to right."""
        assert self.enumerated is not None
        dims = dims_of(self.enumerated.over_sites([self.latents[name]]))
        return dims[0], dims[1:]

    def _coupled(self, name: str) -> list[str]:
        """Latents that leave an integrated one no density of its own, given the states around it.

        They meet it in a factor, and are integrated too or summed out in a plate inside its own.
        """
        assert self.enumerated is not None
        own, plates = self._symbols(name)
        scopes = [dims_of(f) for f in self.enumerated.over_factors() if own in dims_of(f)]
        met = {symbol for scope in scopes for symbol in scope} - {own}
        around = {n: self._symbols(n) for n in self.latents}
        inner = [n for n in self.states if not set(around[n][1]) <= set(plates)]
        return [n for n in [*self.integrated, *inner] if around[n][0] in met]

    def _untrusted(self, value: Tensor) -> str:
        """Why an integral is NaN."""
        assert self.enumerated is not None
        remedy = "Give it a guide: lvppl.EM(model, guide), or lvppl.SVI."
        for name, site in self.integrated.items():
            if not self.enumerated.defect(name) < site["fn"].tolerance:
                return (
                    f"Latent '{name}' ({kind_of(site['fn'].base_dist)}) is integrated, but its "
                    f"terms of ln p are not those of a {site['fn'].kind.capitalize()} at these "
                    f"data and parameters. {remedy}"
                )
            for other in self._coupled(name):
                return (
                    f"Latent '{name}' is integrated and depends on '{other}' given the data. Its "
                    f"integral is known at each value of '{other}', but for both together either "
                    f"none is known or the data are too far out. {remedy}"
                )
        first = int(value.isnan().nonzero()[0])
        names = ", ".join(f"'{name}'" for name in self.integrated)
        return (
            f"datum {first} is so far from what is expected of it that rounding may move its "
            f"ln p(y) by more than a millionth: the integral over {names} cannot be trusted there. "
            "Centre and scale the data, leave the datum out, or start from parameters (a mean, a "
            "scale) that are nearer to it."
        )


class Given(NamedTuple):
    """The log-density of an integrated latent at its nodes, given states of other latents."""

    num_states: int
    """How many latents it depends on."""
    table: Tensor
    """Packed: those latents, then the plates, then the nodes."""

    def query(self, num_draws: int | None, draws: str) -> Tensor:
        """A query for the posterior of those latents in each element of the plates."""
        over = self.table[..., 0]
        dims = dims_of(self.table)[:-1]
        if num_draws is None:
            return named(over, dims)
        return named(over.expand(num_draws, *over.shape), draws + dims)


def _elements(site: Any) -> int:
    """Size of the table of a site's log-probabilities."""
    shape = site["fn"].batch_shape
    value = site["value"].shape[: site["value"].dim() - site["fn"].event_dim]
    return math.prod(torch.broadcast_shapes(shape, value))


# ---------------------------------------------------------------------------------- what is refused


def _refuse_continuous(sites: Mapping[str, Any]) -> None:
    for name, site in sites.items():
        if site["is_observed"] or is_enumerated(site):
            continue
        kind = kind_of(site["fn"])
        if is_discrete(site) and isinstance(site["fn"], Independent):
            raise ProgramError(
                f"Latent '{name}' ({kind}) is a vector of "
                f"{site['fn'].event_shape.numel()} discrete elements in one event, which is not "
                "enumerated here. log_likelihood(..., "
                "estimator='exact') sums its joint states; for marginals put the elements into a "
                "pyro.plate, or write them as sites of their own."
            )
        if is_discrete(site):
            raise ProgramError(
                f"Latent '{name}' ({kind}) has no finite support to enumerate. Truncate it to a "
                "Categorical over the values that matter, or give it a guide (lvppl.SVI, "
                "lvppl.log_likelihood with estimator='importance')."
            )
        raise ProgramError(
            f"Latent '{name}' ({kind}) is continuous: it cannot be enumerated, and its integral "
            "has no closed form known here. Give it a guide (lvppl.SVI, lvppl.log_likelihood with "
            "estimator='importance'), make it a parameter (pyro.param), or replace it by a finite "
            "grid of values."
        )


def too_large(latents: Mapping[str, Any], elements: int) -> str:
    states = sum(
        math.log10(num_states(site)) * math.prod(plate.size for plate in plates_of(site))
        for site in latents.values()
    )
    return (
        f"The exact sum over {_names(latents)} needs a table of more than {elements:,} elements "
        f"(about 10^{states:.0f} joint states; at most {MOST_ELEMENTS:,} elements are allowed). "
        "Put independent latents into a pyro.plate, wrap chains in pyro.markov, "
        "or give some of the sites a guide."
    )


def _names(latents: Mapping[str, Any]) -> str:
    names = [f"'{name}'" for name in latents]
    return ", ".join(names if len(names) <= 6 else [*names[:5], f"... ({len(names)} sites)"])


class TooLarge(Exception):
    """A tensor under enumeration has more elements than one wants to hold."""


class NothingLarge(TorchDispatchMode):
    """Stop before a program whose sites all depend on each other fills the memory."""

    def __init__(self, most_elements: int) -> None:
        super().__init__()
        self.most_elements = most_elements

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [a for a in args if isinstance(a, Tensor)]
        if func.overloadpacket is torch.ops.aten.arange and max(args) > self.most_elements:
            raise TooLarge  # a support: it has no tensor to be judged by
        # a product of sizes is at least the size of the broadcast, which takes longer to find
        if math.prod(t.numel() for t in tensors) > self.most_elements:
            try:
                numel = math.prod(torch.broadcast_shapes(*(t.shape for t in tensors)))
            except RuntimeError:  # not an element-wise operation
                numel = max(t.numel() for t in tensors)
            if numel > self.most_elements:
                raise TooLarge
        return func(*args, **(kwargs or {}))


@contextmanager
def explained_run(
    program: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Say why a program does not run under enumeration, or with these data, and what to do."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ProgramError) and not isinstance(error, ProgramFailure):
            raise
        explain_observations(program, args, kwargs)
        try:
            sites = layout_of(program, None, args, kwargs).enumerated
        except ProgramError:
            raise error from error.__cause__  # it does not run at all
        _explain(error, sites)
        raise


def _explain(error: Exception, sites: Sequence[str]) -> None:
    causes = (error, error.__cause__, error.__context__)
    names = ", ".join(f"'{n}'" for n in sites[:5]) + (", ..." if len(sites) > 5 else "")
    if any(isinstance(cause, TooLarge) for cause in causes):
        raise ProgramError(
            f"Under enumeration of {len(sites)} latent sites ({names}) the program makes a tensor "
            f"of more than {MOST_ELEMENTS:,} elements: a support is too large, or too many latents "
            "depend on each other at once. Wrap chains in pyro.markov, put independent latents "
            "into a pyro.plate, cut a large support to the values that matter, or give some of the "
            "sites a guide."
        ) from error
    if len(sites) > 20 and any("dim" in str(cause) for cause in causes):
        raise ProgramError(
            f"Under enumeration each of the {len(sites)} latent sites ({names}) takes a tensor "
            "dimension of its own, more than torch has. Where each depends only on the one before "
            "it, write the loop as `for t in pyro.markov(range(T))`. "
            f"({str(error).splitlines()[0]})"
        ) from error
    if isinstance(error, ProgramFailure):
        raise ProgramFailure(
            f"{error} This is under enumeration, where the value of a latent site has one more "
            f"dimension on the left, over its states (enumerated: {names}). Index with "
            "pyro.ops.indexing.Vindex or plain x[z], keep leading dimensions, and declare batch "
            "dimensions by pyro.plate and event dimensions by .to_event."
        ) from error

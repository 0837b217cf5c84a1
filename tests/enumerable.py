"""Tiny programs whose latents are all discrete, solved exactly by running every assignment.

`brute_force` knows nothing of enumeration dimensions, elimination orders or plates as symbols: it
finds the latent sites in one plain trace, conditions the program on one joint assignment of all
their elements after the other, and adds up p(z, y). Everything else is a sum over that list of
numbers: the evidence and its gradients, marginals, pairwise marginals, the best assignment, and
EM's Q function.

Conventions: a `poutine.scale` around a whole program weighs its data, outside the sum, as in Pyro:
c ln p(y) under the posterior of the unweighted program. A mask drops factors of observations; a
masked latent keeps its probabilities, so that it sums to one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.nn import PyroModule, PyroParam
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints, transform_to

PARALLEL = {"enumerate": "parallel"}
MAX_STATES = 4096

Model = Callable[..., Any]
Args = tuple[Any, ...]


# ------------------------------------------------------------------------------------- the oracle


@dataclasses.dataclass(frozen=True)
class Latent:
    """A discrete site: its support (K,), its shape in a trace, its plates' dims from outside in."""

    support: Tensor
    shape: torch.Size
    dims: tuple[int, ...]

    @property
    def plates(self) -> tuple[int, ...]:
        return tuple(self.shape[dim] for dim in self.dims)

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Exact:
    """ln p(z, y) of every joint assignment, (states,), differentiable, and what it implies.

    `states` holds for every site the index into its support, (states, *shape in a trace). The scale
    is common to all sites, and not in `log_joint`. `log_padding` is the part of it that belongs to
    masked elements of latents, (states,): a mask takes them out of the program, so that they keep
    their probabilities, which sum to one, at every temperature, and count nothing in a maximum.
    """

    scale: float
    log_joint: Tensor
    log_padding: Tensor
    states: Mapping[str, Tensor]
    latents: Mapping[str, Latent]

    @property
    def total(self) -> Tensor:
        """ln p(y) in nats."""
        return self.scale * self.log_joint.logsumexp(0)

    def tempered(self, temperature: float) -> Tensor:
        """T ln sum_z p(z, y)^(1/T)."""
        return self.scale * temperature * self._tempered(temperature).logsumexp(0)

    def _tempered(self, temperature: float) -> Tensor:
        return (self.log_joint - self.log_padding) / temperature + self.log_padding

    def weights(self, temperature: float = 1.0) -> Tensor:
        """p(z | y), or the distribution proportional to p(z, y)^(1/T), (states,)."""
        return self._tempered(temperature).detach().softmax(0)

    def marginals(self, name: str, temperature: float = 1.0) -> Tensor:
        """p(z_i = k | y), (*plates, K)."""
        latent = self.latents[name]
        weights = self.weights(temperature)
        indicator = torch.nn.functional.one_hot(self.states[name], len(latent.support))
        marginal = (weights.reshape(-1, *[1] * (indicator.dim() - 1)) * indicator).sum(0)
        return marginal.reshape(*latent.plates, len(latent.support))

    def joint(self, first: str, second: str, temperature: float = 1.0) -> Tensor:
        """p(z_i = k, z'_i = l | y), (*plates of either, K, L); elements meet where plates do."""
        one, two = self.latents[first], self.latents[second]
        weights = self.weights(temperature)
        hot1 = torch.nn.functional.one_hot(self.states[first], len(one.support))
        hot2 = torch.nn.functional.one_hot(self.states[second], len(two.support))
        depth = max(len(one.shape), len(two.shape))
        hot1 = hot1.reshape(len(weights), *_padded(one.shape, depth), -1, 1)
        hot2 = hot2.reshape(len(weights), *_padded(two.shape, depth), 1, len(two.support))
        pairs = (weights.reshape(-1, *[1] * (depth + 2)) * hot1 * hot2).sum(0)
        dims = sorted({*one.dims, *two.dims})
        return pairs.reshape(*(pairs.shape[dim - 2] for dim in dims), *pairs.shape[-2:])

    def map(self) -> tuple[dict[str, Tensor], Tensor]:
        """The best assignment, support values (*plates) by site, and its ln p(z, y)."""
        joint = self.log_joint - self.log_padding
        best = int(joint.detach().argmax())
        values = {
            name: latent.support[self.states[name][best]].reshape(latent.plates)
            for name, latent in self.latents.items()
        }
        return values, self.scale * joint[best]


def _padded(shape: Sequence[int], depth: int) -> tuple[int, ...]:
    return (1,) * (depth - len(shape)) + tuple(shape)


def latent_sites(model: Model, args: Args) -> dict[str, Latent]:
    """The discrete latents of a program in the order of one plain trace."""
    with torch.random.fork_rng(devices=[]):
        trace = poutine.trace(model).get_trace(*args)
    found = {}
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or site["is_observed"] or site["name"].startswith("_"):
            continue
        if type(site["fn"]).__name__ == "_Subsample":
            continue
        support = site["fn"].enumerate_support(expand=False).flatten()
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        dims = tuple(sorted(frame.dim for frame in frames))
        found[name] = Latent(support, site["fn"].batch_shape, dims)
    return found


def log_joint(
    model: Model, args: Args, values: Mapping[str, Tensor], *, masked_latents: bool = False
) -> tuple[Tensor, float]:
    """ln p(z, y) of one assignment, 0-dim, differentiable in the parameters; and its scale.

    `masked_latents` drops masked elements of latents as Pyro does, and sums them to K.
    """
    trace = poutine.trace(poutine.condition(model, data=dict(values))).get_trace(*args)
    trace.compute_log_prob()
    terms, scales = [], set()
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        scales.add(float(site["scale"]))
        if name in values and not masked_latents:
            fn = site["fn"]
            while isinstance(fn, dist.MaskedDistribution):
                fn = fn.base_dist
            terms.append(fn.log_prob(site["value"]).expand(site["fn"].batch_shape).sum())
        else:
            terms.append(torch.as_tensor(site["log_prob_sum"]) / site["scale"])
    (scale,) = scales
    return torch.stack([term.to(torch.float64) for term in terms]).sum(), scale


def _assignments(latents: Mapping[str, Latent]) -> Iterator[dict[str, Tensor]]:
    """Every joint assignment of support indices, each site in its shape."""
    ranges = [range(len(latent.support)) for latent in latents.values() for _ in range(latent.size)]
    for flat in itertools.product(*ranges):
        states, position = {}, 0
        for name, latent in latents.items():
            part = torch.tensor(flat[position : position + latent.size], dtype=torch.long)
            states[name] = part.reshape(latent.shape)
            position += latent.size
        yield states


def brute_force(model: Model, args: Args) -> Exact:
    """Run the program once for every joint assignment of its latents."""
    latents = latent_sites(model, args)
    count = math.prod(len(latent.support) ** latent.size for latent in latents.values())
    assert count <= MAX_STATES, f"{count} joint states are too many for an oracle"
    states = list(_assignments(latents))
    values = [{name: latents[name].support[i] for name, i in state.items()} for state in states]
    joint, scales = zip(*(log_joint(model, args, value) for value in values), strict=True)
    kept = [log_joint(model, args, value, masked_latents=True)[0] for value in values]
    stacked = {name: torch.stack([state[name] for state in states]) for name in latents}
    (scale,) = set(scales)
    whole = torch.stack(joint)
    padding = (whole - torch.stack(kept)).nan_to_num(0.0)  # -inf less -inf: impossible either way
    return Exact(scale, whole, padding, stacked, latents)


def expected_log_joint(
    model: Model, args: Args, exact: Exact, weights: Tensor, *, masked_latents: bool = False
) -> Tensor:
    """Q = sum_z w(z) ln p(z, y), at the current parameters for fixed weights (states,)."""
    terms = []
    for index in range(len(weights)):
        if weights[index] > 0:  # 0 times ln 0 is 0
            values = {
                name: latent.support[exact.states[name][index]]
                for name, latent in exact.latents.items()
            }
            joint, scale = log_joint(model, args, values, masked_latents=masked_latents)
            terms.append(weights[index] * scale * joint)
    return torch.stack(terms).sum()


# ------------------------------------------------------------------------------------- parameters


def parameters() -> dict[str, Tensor]:
    """The unconstrained parameters in the current store, by name, in a fixed order."""
    return dict(sorted(pyro.get_param_store().named_parameters()))


def gradients(value: Tensor) -> dict[str, Tensor]:
    """Its gradient for every unconstrained parameter; zero where it depends on none."""
    named = parameters()
    grads = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(named.items(), grads, strict=True)
    }


def set_parameters(values: Mapping[str, Tensor]) -> None:
    """Write constrained values into the live parameters, in place (a module sees them too)."""
    known = pyro.get_param_store().get_state()["constraints"]
    named = parameters()
    assert set(values) == set(named), "every parameter, by its name in the store"
    with torch.no_grad():
        for name, value in values.items():
            named[name].copy_(transform_to(known[name]).inv(value.detach()))


# ------------------------------------------------------------------------------------ the registry


@dataclasses.dataclass(frozen=True)
class Started:
    """A program whose parameters live in the current store, at their first values."""

    model: Model
    args: Args

    def exact(self) -> Exact:
        return brute_force(self.model, self.args)


@dataclasses.dataclass(frozen=True)
class Program:
    """A named program and what is true of it.

    Attributes:
        build: gives the model and its arguments, in float64.
        data_plates: the plates common to all its sites; none where the data set is one datum.
        select: the arguments for a list of data; None where data cannot be taken apart.
        pairs: sites that share a factor.
        closed_form: parameters whose M-step has a closed form that is found in the program.
        annotated: latents are marked for enumeration.
        masked_latents: some elements of latents are masked.
    """

    name: str
    build: Callable[[], tuple[Model, Args]]
    data_plates: tuple[str, ...] = ("data",)
    select: Callable[[Args, list[int]], Args] | None = None
    pairs: tuple[tuple[str, str], ...] = ()
    closed_form: tuple[str, ...] = ()
    annotated: bool = True
    masked_latents: bool = False
    resizable: bool = True

    def start(self) -> Started:
        """Clear the store and create every parameter."""
        pyro.clear_param_store()
        model, args = self.build()
        with torch.random.fork_rng(devices=[]):
            model(*args)
        return Started(model, args)


PROGRAMS: dict[str, Program] = {}


def rows(args: Args, index: list[int]) -> Args:
    """Data lie along the first dimension of every argument."""
    return tuple(arg[index] for arg in args)


def register(**facts: Any) -> Callable[[Callable[[], tuple[Model, Args]]], Any]:
    def decorate(build: Callable[[], tuple[Model, Args]]) -> Callable[[], tuple[Model, Args]]:
        given = dict(facts)
        if given.get("data_plates") != ():
            given.setdefault("select", rows)
        PROGRAMS[build.__name__] = Program(name=build.__name__, build=build, **given)
        return build

    return decorate


def t(value: Any) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def real(name: str, value: Any) -> Tensor:
    return pyro.param(name, lambda: t(value))


def positive(name: str, value: Any) -> Tensor:
    return pyro.param(name, lambda: t(value), constraint=constraints.positive)


def unit(name: str, value: Any) -> Tensor:
    return pyro.param(name, lambda: t(value), constraint=constraints.unit_interval)


def simplex(name: str, value: Any) -> Tensor:
    return pyro.param(name, lambda: t(value), constraint=constraints.simplex)


def categorical(name: str, probs: Tensor, **kwargs: Any) -> Tensor:
    return pyro.sample(name, dist.Categorical(probs), infer=PARALLEL, **kwargs)


MIXED = [-1.3, 0.4, 2.1, -0.2]
SPREAD = [-1.3, 0.4, 2.1, -0.2, -2.0, 1.1, -0.6, 2.9]
SERIES = [[0.3, -0.8, 1.1], [-1.0, -0.2, 0.4]]
INITIAL, TRANSITION = [0.6, 0.4], [[0.7, 0.3], [0.2, 0.8]]


# ---------------------------------------------------------------------------------------- mixtures


@register(closed_form=("weights", "loc", "scale"))
def gaussian_mixture() -> tuple[Model, Args]:
    """z ~ weights, y | z ~ N(loc[z], scale[z])."""

    def model(y: Tensor) -> None:
        weights = simplex("weights", [0.6, 0.4])
        loc, scale = real("loc", [-1.0, 1.2]), positive("scale", [0.8, 1.1])
        with pyro.plate("data", len(y)):
            z = categorical("z", weights)
            pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)

    return model, (t(SPREAD),)


@register(closed_form=("weights", "probs"))
def bernoulli_mixture() -> tuple[Model, Args]:
    """Three binary features in one event."""

    def model(y: Tensor) -> None:
        weights = simplex("weights", [0.6, 0.4])
        probs = unit("probs", [[0.2, 0.7, 0.4], [0.6, 0.3, 0.8]])
        with pyro.plate("data", len(y)):
            z = categorical("z", weights)
            pyro.sample("y", dist.Bernoulli(probs[z]).to_event(1), obs=y)

    return model, (t([[0, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 1], [0, 0, 0]]),)


@register(closed_form=("weights", "theta"))
def stacked_parameters() -> tuple[Model, Args]:
    """The locations of two features in one tensor, under one fixed scale; a logit row elsewhere."""

    def model(y: Tensor) -> None:
        weights = simplex("weights", [0.5, 0.3, 0.2])
        theta = real("theta", [[-1.0, 0.5, 2.0], [0.4, -0.6, 0.3]])
        with pyro.plate("data", len(y)):
            z = categorical("z", weights)
            pyro.sample("y1", dist.Normal(theta[0][z], t(0.8)), obs=y[:, 0])
            pyro.sample("y2", dist.Normal(theta[1][z], t(0.5)), obs=y[:, 1])

    return model, (torch.stack([t(MIXED), t([0.1, -0.7, 0.9, 0.3])], -1),)


@register(closed_form=("logits", "loc", "scale"))
def tied_scale() -> tuple[Model, Args]:
    """One scale for all components, the weights as logits, marked by `config_enumerate`."""

    @config_enumerate
    def model(y: Tensor) -> None:
        logits, loc = real("logits", [0.2, -0.3, 0.1]), real("loc", [-1.0, 0.5, 2.0])
        scale = positive("scale", 0.8)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=logits))
            pyro.sample("y", dist.Normal(loc[z], scale), obs=y)

    return model, (t(MIXED),)


@register(annotated=False, closed_form=("weights", "loc", "scale"))
def unannotated_mixture() -> tuple[Model, Args]:
    """As users write it: nothing says that z is to be enumerated."""

    def model(y: Tensor) -> None:
        weights = simplex("weights", [0.7, 0.3])
        loc, scale = real("loc", [-0.8, 1.2]), positive("scale", [0.9, 0.7])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)

    return model, (t(SPREAD[1:]),)


class ModuleMixture(PyroModule):
    """A mixture whose parameters belong to a module."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = PyroParam(t([0.4, 0.6]), constraint=constraints.simplex)
        self.loc = PyroParam(t([-0.9, 1.1]))
        self.rate = PyroParam(t([1.5, 0.7]), constraint=constraints.positive)

    def forward(self, y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = categorical("z", self.weights)
            pyro.sample("y", dist.Normal(self.loc[z], t(0.8)), obs=y)
            pyro.sample("w", dist.Exponential(self.rate[z]), obs=y.abs())


@register(closed_form=("weights", "loc", "rate"))
def module_mixture() -> tuple[Model, Args]:
    return ModuleMixture(), (t(MIXED),)


@register(pairs=(("a", "b"),), closed_form=("first", "second"))
def two_latents() -> tuple[Model, Args]:
    """Two latents of a datum, independent before y is seen."""

    def model(y: Tensor) -> None:
        first, second = simplex("first", [0.6, 0.4]), simplex("second", [0.2, 0.5, 0.3])
        loc_a, loc_b = real("loc_a", [-0.5, 0.7]), real("loc_b", [-1.0, 0.1, 1.4])
        with pyro.plate("data", len(y)):
            a, b = categorical("a", first), categorical("b", second)
            pyro.sample("y", dist.Normal(loc_a[a] + loc_b[b], t(0.7)), obs=y)

    return model, (t(MIXED[:3]),)


@register(pairs=(("z1", "z2"),), closed_form=("top", "middle", "loc"))
def hierarchical_mixture() -> tuple[Model, Args]:
    """z1 -> z2 -> y."""

    def model(y: Tensor) -> None:
        top = simplex("top", [0.6, 0.4])
        middle = simplex("middle", [[0.2, 0.5, 0.3], [0.6, 0.1, 0.3]])
        loc = real("loc", [-1.0, 0.3, 1.5])
        with pyro.plate("data", len(y)):
            z1 = categorical("z1", top)
            z2 = categorical("z2", middle[z1])
            pyro.sample("y", dist.Normal(loc[z2], t([0.6, 0.8, 0.7])[z2]), obs=y)

    return model, (t(MIXED[:3]),)


@register(
    pairs=(("root", "left"), ("root", "right"), ("left", "leaf")),
    closed_form=("top", "below", "loc"),
)
def tree() -> tuple[Model, Args]:
    """root -> (left -> leaf, right); one table for every edge, and an observation at each end."""

    def model(y: Tensor) -> None:
        top, below = simplex("top", [0.6, 0.4]), simplex("below", TRANSITION)
        loc = real("loc", [-0.7, 0.9])
        with pyro.plate("data", len(y)):
            root = categorical("root", top)
            left, right = categorical("left", below[root]), categorical("right", below[root])
            leaf = categorical("leaf", below[left])
            pyro.sample("y1", dist.Normal(loc[leaf], t(0.8)), obs=y[:, 0])
            pyro.sample("y2", dist.Normal(loc[right], t(0.8)), obs=y[:, 1])

    return model, (t([[0.3, -0.8], [1.4, -0.2]]),)


@register(
    pairs=(("on", "kind"), ("kind", "count"), ("on", "count")),
    closed_form=("chance", "kinds", "rate"),
)
def mixed_sites() -> tuple[Model, Args]:
    """Bernoulli, Categorical and Binomial latents of one datum."""

    def model(y: Tensor) -> None:
        chance, kinds = unit("chance", 0.35), simplex("kinds", [0.2, 0.5, 0.3])
        rate, loc = unit("rate", 0.4), real("loc", [-1.0, 0.2, 1.3])
        step, shift = real("step", 0.4), real("shift", -0.6)
        with pyro.plate("data", len(y)):
            on = pyro.sample("on", dist.Bernoulli(chance), infer=PARALLEL)
            kind = categorical("kind", kinds)
            count = pyro.sample("count", dist.Binomial(2, rate), infer=PARALLEL)
            pyro.sample("y", dist.Normal(loc[kind] + step * count + shift * on, t(0.7)), obs=y)

    return model, (t(MIXED[:2]),)


@register(closed_form=("weights",))
def mixture_of_experts() -> tuple[Model, Args]:
    """Gate and experts are linear in x; a tag has a table."""

    def model(x: Tensor, y: Tensor) -> None:
        gate, slopes = (
            real("gate", [[0.5, -0.4], [0.1, 0.6]]),
            real("slopes", [[1, -0.5], [-0.8, 0.6]]),
        )
        scale, weights = positive("scale", 0.6), simplex("weights", [[0.3, 0.7], [0.8, 0.2]])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=x @ gate), infer=PARALLEL)
            pyro.sample("y", dist.Normal((x * slopes[z]).sum(-1), scale), obs=y)
            pyro.sample("tag", dist.Categorical(weights[z]), obs=(y > 0).long())

    x = torch.stack([torch.ones(8).double(), t([0.2, -0.7, 1.1, 0.5, -1.2, 0.0, 0.9, -0.4])], -1)
    return model, (x, t(SPREAD))


@register(closed_form=("weights", "probs"))
def naive_bayes_partly_labelled() -> tuple[Model, Args]:
    """Binary features in a plate; a label is a copy of the class, seen for some data."""

    def model(y: Tensor, label: Tensor, known: Tensor) -> None:
        weights = simplex("weights", [0.5, 0.3, 0.2])
        probs = unit("probs", [[0.2, 0.7], [0.6, 0.3], [0.5, 0.9]])
        copied = torch.eye(3, dtype=torch.float64).log()
        features = pyro.plate("features", 2, dim=-1)
        with pyro.plate("data", len(y), dim=-2):
            z = categorical("z", weights)
            with poutine.mask(mask=known.unsqueeze(-1)):
                observed = dist.Categorical(logits=copied[z])
                pyro.sample("label", observed, obs=label.unsqueeze(-1))
            with features:
                pyro.sample("y", dist.Bernoulli(Vindex(probs)[z, torch.arange(2)]), obs=y)

    y = t([[0, 1], [1, 0], [1, 1], [0, 0]])
    return model, (y, torch.tensor([2, 0, 1, 0]), torch.tensor([True, False, True, False]))


@register(masked_latents=True)
def labels_by_obs_mask() -> tuple[Model, Args]:
    """Pyro's own way to observe a site in part."""

    def model(y: Tensor, label: Tensor, known: Tensor) -> None:
        weights, loc = simplex("weights", [0.5, 0.3, 0.2]), real("loc", [-1.0, 0.5, 2.0])
        scale = positive("scale", 0.8)
        with pyro.plate("data", len(y)):
            prior = dist.Categorical(weights)
            z = pyro.sample("z", prior, obs=label, obs_mask=known, infer=PARALLEL)
            pyro.sample("y", dist.Normal(loc[z], scale), obs=y)

    known = torch.tensor([True, False, True, False])
    return model, (t(MIXED), torch.tensor([2, 0, 1, 0]), known)


@register(closed_form=("weights", "loc"))
def missing_by_mask() -> tuple[Model, Args]:
    """Features in a plate, some of them missing, one datum missing altogether."""

    def model(y: Tensor, seen: Tensor) -> None:
        weights, loc = simplex("weights", [0.6, 0.4]), real("loc", [[-1.0, 0.5], [0.8, -0.3]])
        scale = t([0.7, 1.2])
        with pyro.plate("data", len(y), dim=-2):
            z = categorical("z", weights)
            with pyro.plate("features", 2, dim=-1), poutine.mask(mask=seen):
                pyro.sample("y", dist.Normal(Vindex(loc)[z, torch.arange(2)], scale), obs=y)

    seen = torch.tensor([[True, True], [False, True], [True, False], [False, False]])
    return model, (torch.stack([t(MIXED), t([0.1, -0.7, 0.9, 0.3])], -1), seen)


@register()
def scaled_data() -> tuple[Model, Args]:
    """`poutine.scale` over the data plate: every datum counts 2.5 times."""

    def model(y: Tensor) -> None:
        weights, loc = simplex("weights", [0.7, 0.3]), real("loc", [-0.8, 1.2])
        scale = positive("scale", 0.9)
        with pyro.plate("data", len(y)), poutine.scale(scale=2.5):
            z = categorical("z", weights)
            pyro.sample("y", dist.Normal(loc[z], scale), obs=y)

    return model, (t(MIXED),)


@register()
def with_factor() -> tuple[Model, Args]:
    """A factor that depends on the latent: an unnormalised prior."""

    def model(y: Tensor) -> None:
        weights, loc = simplex("weights", [0.7, 0.3]), real("loc", [-0.8, 1.2])
        energy = t([0.3, -0.9])  # fixed: a learned one has no maximum
        with pyro.plate("data", len(y)):
            z = categorical("z", weights)
            shifted = pyro.deterministic("shifted", loc[z] + 0.1)
            pyro.factor("extra", energy[z] * y.abs())
            pyro.sample("y", dist.Normal(shifted, t(0.7)), obs=y)

    return model, (t(MIXED),)


@register(closed_form=("weights", "loc", "variance"))
def affine_parameters() -> tuple[Model, Args]:
    """The density has -2 loc[z] and the root of a variance as its arguments."""

    def model(y: Tensor) -> None:
        weights, loc = simplex("weights", INITIAL), real("loc", [0.5, -0.6])
        variance = positive("variance", 0.8)
        with pyro.plate("data", len(y)):
            z = categorical("z", weights)
            pyro.sample("y", dist.Normal(-2.0 * loc[z], variance.sqrt()), obs=y)

    return model, (t(SPREAD),)


@register(closed_form=("weights",))
def coupled_parameters() -> tuple[Model, Args]:
    """One location under two scales: neither has a closed form without the other."""

    def model(y: Tensor) -> None:
        weights, loc = simplex("weights", INITIAL), real("loc", [-0.5, 0.6])
        scale = positive("scale", [0.8, 2.0])
        with pyro.plate("data", len(y)):
            z = categorical("z", weights)
            pyro.sample("y", dist.Normal(loc[z], scale[0]), obs=y)
            pyro.sample("again", dist.Normal(loc[z], scale[1]), obs=1.5 * y - 1.0)

    return model, (t(SPREAD),)


@register(closed_form=("weights",))
def bounded_locations() -> tuple[Model, Args]:
    """The best locations lie outside their interval: the scale must allow for where they stop."""

    def model(y: Tensor) -> None:
        weights, scale = simplex("weights", INITIAL), positive("scale", 4.0)
        interval = constraints.interval(-0.1, 0.1)
        loc = pyro.param("loc", lambda: t([-0.05, 0.05]), constraint=interval)
        with pyro.plate("data", len(y)):
            z = categorical("z", weights)
            pyro.sample("y", dist.Normal(loc[z], scale), obs=y)

    return model, (t([3.0, 2.4, 3.3, 2.9, 3.6, 2.7]),)


@register(closed_form=("loc",))
def entry_of_a_simplex() -> tuple[Model, Args]:
    """A Bernoulli's probability is one entry of a simplex: the others must make room for it."""

    def model(y: Tensor) -> None:
        shares, loc = simplex("shares", [0.5, 0.2, 0.3]), real("loc", [-0.5, 0.6])
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(shares[1]), infer=PARALLEL)
            pyro.sample("y", dist.Normal(loc[z.long()], t(0.8)), obs=y)

    return model, (t(SPREAD),)


# ------------------------------------------------------------------------------------------ plates


@register(
    data_plates=("groups",),
    pairs=(("group", "item"),),
    closed_form=("top", "middle", "loc", "scale"),
)
def nested_plates() -> tuple[Model, Args]:
    """A latent of each group, one of each of its items, an observation in both."""

    def model(y: Tensor) -> None:
        top, middle = simplex("top", INITIAL), simplex("middle", TRANSITION)
        loc, scale = real("loc", [-0.7, 0.9]), positive("scale", [0.8, 0.5])
        with pyro.plate("groups", y.shape[0], dim=-2):
            group = categorical("group", top)
            with pyro.plate("items", y.shape[1], dim=-1):
                item = categorical("item", middle[group])
                pyro.sample("y", dist.Normal(loc[item], scale[item]), obs=y)

    return model, (t(SERIES),)


def cells(args: Args, index: list[int]) -> Args:
    """One cell of a table, rows first."""
    (cell,), (y,) = index, args
    row, column = divmod(cell, y.shape[1])
    return (y[row : row + 1, column : column + 1],)


@register(
    data_plates=("rows", "columns"),
    select=cells,
    resizable=False,
    closed_form=("weights", "rate"),
)
def grid_mixture() -> tuple[Model, Args]:
    """Every cell of a table is a datum: two data plates."""

    def model(y: Tensor) -> None:
        weights, rate = simplex("weights", INITIAL), positive("rate", [0.8, 3.5])
        with pyro.plate("rows", y.shape[0], dim=-2), pyro.plate("columns", y.shape[1], dim=-1):
            z = categorical("z", weights)
            pyro.sample("y", dist.Poisson(rate[z]), obs=y)

    return model, (t([[0, 2, 5], [1, 4, 3]]),)


@register(data_plates=(), pairs=(("regime", "z"),), closed_form=("top", "middle", "loc"))
def global_latent() -> tuple[Model, Args]:
    """One latent for the whole data set, and one for each datum."""

    def model(y: Tensor) -> None:
        top, middle = simplex("top", [0.5, 0.2, 0.3]), simplex("middle", [*TRANSITION, [0.5, 0.5]])
        loc = real("loc", [-0.7, 0.9])
        regime = categorical("regime", top)
        with pyro.plate("data", len(y)):
            z = categorical("z", middle[regime])
            pyro.sample("y", dist.Normal(loc[z], t(0.8)), obs=y)

    return model, (t(MIXED),)


@register(data_plates=(), closed_form=("weights", "loc"))
def two_data_plates() -> tuple[Model, Args]:
    """Labelled data in one plate, unlabelled in another: no plate is common to all sites."""

    def model(y: Tensor, label: Tensor, more: Tensor) -> None:
        weights, loc = simplex("weights", INITIAL), real("loc", [-0.7, 0.9])
        with pyro.plate("labelled", len(y)):
            pyro.sample("label", dist.Categorical(weights), obs=label)
            pyro.sample("y", dist.Normal(loc[label], t(0.8)), obs=y)
        with pyro.plate("unlabelled", len(more)):
            z = categorical("z", weights)
            pyro.sample("more", dist.Normal(loc[z], t(0.8)), obs=more)

    return model, (t([0.2, -0.7]), torch.tensor([1, 0]), t(MIXED))


@register(data_plates=(), closed_form=("weights", "loc"))
def sequential_plate() -> tuple[Model, Args]:
    """A plate written as a loop: as many sites as data."""

    def model(y: Tensor) -> None:
        weights, loc = simplex("weights", INITIAL), real("loc", [-0.7, 0.9])
        for i in pyro.plate("data", len(y)):
            z = categorical(f"z_{i}", weights)
            pyro.sample(f"y_{i}", dist.Normal(loc[z], t(0.8)), obs=y[i])

    return model, (t(MIXED[:3]),)


# ------------------------------------------------------------------------------------------ chains

LINKS = (("x_0", "x_1"), ("x_1", "x_2"))


@register(data_plates=(), pairs=LINKS, closed_form=("initial", "transition", "loc", "scale"))
def gaussian_chain() -> tuple[Model, Args]:
    """One sequence of a hidden Markov model, three states, no plate."""

    def model(y: Tensor) -> None:
        initial = simplex("initial", [0.5, 0.3, 0.2])
        transition = simplex("transition", [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]])
        loc, scale = real("loc", [-1.0, 0.5, 2.0]), positive("scale", 0.8)
        x = None
        for step in pyro.markov(range(len(y))):
            x = categorical(f"x_{step}", initial if x is None else transition[x])
            pyro.sample(f"y_{step}", dist.Normal(loc[x], scale), obs=y[step])

    return model, (t(MIXED),)


@register(
    data_plates=("sequences",),
    pairs=LINKS,
    closed_form=("initial", "transition", "emission"),
)
def categorical_chain() -> tuple[Model, Args]:
    """Sequences in a plate outside the chain, symbols from an alphabet of three."""

    def model(y: Tensor) -> None:
        initial, transition = simplex("initial", INITIAL), simplex("transition", TRANSITION)
        emission = simplex("emission", [[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
        with pyro.plate("sequences", y.shape[0], dim=-1):
            x = None
            for step in pyro.markov(range(y.shape[1])):
                x = categorical(f"x_{step}", initial if x is None else transition[x])
                pyro.sample(f"y_{step}", dist.Categorical(emission[x]), obs=y[:, step])

    return model, (torch.tensor([[0, 2, 1], [2, 2, 0]]),)


@register(data_plates=("sequences",), pairs=LINKS, closed_form=("initial", "transition", "rate"))
def poisson_chain_with_notes() -> tuple[Model, Args]:
    """Sequences outside the chain, notes in a plate inside it."""

    def model(y: Tensor) -> None:
        initial, transition = simplex("initial", INITIAL), simplex("transition", TRANSITION)
        rate = positive("rate", [[0.8, 2.0], [3.0, 0.5]])
        notes = pyro.plate("notes", y.shape[-1], dim=-1)
        with pyro.plate("sequences", y.shape[0], dim=-2):
            x = None
            for step in pyro.markov(range(y.shape[1])):
                x = categorical(f"x_{step}", initial if x is None else transition[x])
                with notes:
                    mean = Vindex(rate)[x, torch.arange(y.shape[-1])]
                    pyro.sample(f"y_{step}", dist.Poisson(mean), obs=y[:, step])

    return model, (t([[[0, 2], [3, 1], [2, 0]], [[1, 1], [0, 3], [4, 0]]]),)


@register(annotated=False, data_plates=("sequences",), pairs=LINKS, closed_form=("initial", "loc"))
def unannotated_chain() -> tuple[Model, Args]:
    """Nothing says that the states are to be enumerated; logits, and one scale for all."""

    def model(y: Tensor) -> None:
        initial, transition = real("initial", [0.3, -0.1]), real("jump", [[0.8, 0.0], [-0.2, 0.5]])
        loc, scale = real("loc", [-0.7, 0.9]), positive("scale", 0.8)
        with pyro.plate("sequences", y.shape[0], dim=-1):
            x = None
            for step in pyro.markov(range(y.shape[1])):
                logits = initial if x is None else transition[x]
                x = pyro.sample(f"x_{step}", dist.Categorical(logits=logits))
                pyro.sample(f"y_{step}", dist.Normal(loc[x], scale), obs=y[:, step])

    return model, (t(SERIES),)


@register(
    data_plates=("sequences",),
    pairs=(("x_0", "x_1"), ("x_0", "x_2"), ("x_1", "x_3")),
    closed_form=("initial", "second", "transition", "loc"),
)
def second_order_chain() -> tuple[Model, Args]:
    """A state depends on the two before it."""

    def model(y: Tensor) -> None:
        initial, second = simplex("initial", INITIAL), simplex("second", TRANSITION)
        table = [[[0.7, 0.3], [0.4, 0.6]], [[0.2, 0.8], [0.55, 0.45]]]
        transition, loc = simplex("transition", table), real("loc", [-0.7, 0.9])
        with pyro.plate("sequences", y.shape[0], dim=-1):
            before, last = None, None
            for step in pyro.markov(range(y.shape[1]), history=2):
                if last is None:
                    probs = initial
                elif before is None:
                    probs = second[last]
                else:
                    probs = Vindex(transition)[before, last]
                before, last = last, categorical(f"x_{step}", probs)
                pyro.sample(f"y_{step}", dist.Normal(loc[last], t(0.7)), obs=y[:, step])

    return model, (t([[0.3, -0.8, 1.1, 0.9], [-1.0, -0.2, 0.4, -0.5]]),)


@register(data_plates=(), pairs=(("a_0", "a_1"), ("b_1", "b_2"), ("a_1", "b_1")))
def factorial_chain() -> tuple[Model, Args]:
    """Two chains, one emission of both."""

    def model(y: Tensor) -> None:
        initial, jump_a = simplex("initial", INITIAL), simplex("jump_a", TRANSITION)
        jump_b = simplex("jump_b", [[0.9, 0.1], [0.4, 0.6]])
        loc_a, loc_b = real("loc_a", [-0.5, 0.7]), real("loc_b", [-0.3, 1.4])
        a = b = None
        for step in pyro.markov(range(len(y))):
            a = categorical(f"a_{step}", initial if a is None else jump_a[a])
            b = categorical(f"b_{step}", initial if b is None else jump_b[b])
            pyro.sample(f"y_{step}", dist.Normal(loc_a[a] + loc_b[b], t(0.7)), obs=y[step])

    return model, (t(SERIES[0]),)


@register(data_plates=("sequences",), pairs=LINKS, closed_form=("initial", "loc"))
def input_driven_chain() -> tuple[Model, Args]:
    """P(x_t | x_{t-1}, u_t): the logits of a transition move with an input."""

    def model(u: Tensor, y: Tensor) -> None:
        initial, loc = simplex("initial", INITIAL), real("loc", [-0.7, 0.9])
        base, slope = (
            real("base", [[0.8, 0.0], [-0.2, 0.5]]),
            real("slope", [[0.3, -0.4], [0.6, 0]]),
        )
        with pyro.plate("sequences", y.shape[0], dim=-1):
            x = categorical("x_0", initial)
            pyro.sample("y_0", dist.Normal(loc[x], t(0.8)), obs=y[:, 0])
            for step in pyro.markov(range(1, y.shape[1])):
                logits = base[x] + slope[x] * u[:, step].unsqueeze(-1)
                x = pyro.sample(f"x_{step}", dist.Categorical(logits=logits), infer=PARALLEL)
                pyro.sample(f"y_{step}", dist.Normal(loc[x], t(0.8)), obs=y[:, step])

    return model, (t([[0.0, 1.2, -0.4], [0.0, -0.9, 0.7]]), t(SERIES))


@register(data_plates=("sequences",), pairs=LINKS, closed_form=("initial", "transition"))
def autoregressive_chain() -> tuple[Model, Args]:
    """An emission depends on the state and on the emission before it."""

    def model(y: Tensor) -> None:
        initial, transition = simplex("initial", INITIAL), simplex("transition", TRANSITION)
        loc, decay = real("loc", [-0.7, 0.9]), real("decay", [0.5, -0.3])
        scale = positive("scale", 0.8)
        with pyro.plate("sequences", y.shape[0], dim=-1):
            x, last = None, torch.zeros_like(y[:, 0])
            for step in pyro.markov(range(y.shape[1])):
                x = categorical(f"x_{step}", initial if x is None else transition[x])
                mean = loc[x] + decay[x] * last
                last = pyro.sample(f"y_{step}", dist.Normal(mean, scale), obs=y[:, step])

    return model, (t(SERIES),)


@register(data_plates=("sequences",), pairs=LINKS, closed_form=("loc", "scale"))
def impossible_transitions() -> tuple[Model, Args]:
    """Left to right: a state stays or moves on by one; all else has probability zero."""

    def model(y: Tensor) -> None:
        stay = unit("stay", [0.6, 0.7])
        loc, scale = real("loc", [-1.0, 0.2, 1.3]), positive("scale", 0.8)
        never, sure = t(-math.inf), t(0.0)
        jump = torch.stack(
            [
                torch.stack([stay[0].log(), (-stay[0]).log1p(), never]),
                torch.stack([never, stay[1].log(), (-stay[1]).log1p()]),
                torch.stack([never, never, sure]),
            ]
        )
        with pyro.plate("sequences", y.shape[0], dim=-1):
            x = None
            for step in pyro.markov(range(y.shape[1])):
                logits = torch.stack([sure, never, never]) if x is None else jump[x]
                x = pyro.sample(f"x_{step}", dist.Categorical(logits=logits), infer=PARALLEL)
                pyro.sample(f"y_{step}", dist.Normal(loc[x], scale), obs=y[:, step])

    return model, (t(SERIES),)


@register(data_plates=("sequences",), pairs=LINKS, masked_latents=True)
def ragged_chain() -> tuple[Model, Args]:
    """Sequences of different lengths: Pyro's masks over both states and emissions."""

    def model(y: Tensor, lengths: Tensor) -> None:
        initial, transition = simplex("initial", INITIAL), simplex("transition", TRANSITION)
        loc, scale = real("loc", [-0.7, 0.9]), positive("scale", 0.8)
        with pyro.plate("sequences", y.shape[0], dim=-1):
            x = None
            for step in pyro.markov(range(y.shape[1])):
                with poutine.mask(mask=step < lengths):
                    x = categorical(f"x_{step}", initial if x is None else transition[x])
                    pyro.sample(f"y_{step}", dist.Normal(loc[x], scale), obs=y[:, step])

    return model, (t(SERIES), torch.tensor([3, 2]))

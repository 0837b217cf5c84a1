"""What an objective's gradients are worth: bias, variance, signal-to-noise ratio."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvppl.errors import ProgramError
from lvppl.inference.gradients.exact import evidence_loss, expected_loss
from lvppl.inference.gradients.moments import RunningMoments, flat
from lvppl.inference.gradients.parameters import Parameters, left_alone
from lvppl.inference.gradients.record import Bias, GradientAudit, GradientRow, bias_of, row_of
from lvppl.seeding import RandomStream, checked_seed, derived_seed, seeded

__all__ = ["audit_gradients"]

Program = Callable[..., Any]


def audit_gradients(
    model: Program,
    guide: Program,
    objectives: Mapping[str, Any] | Sequence[Any],
    *data: Any,
    num_repetitions: int = 200,
    reference: Any = None,
    seed: int | None = None,
    **kwargs: Any,
) -> GradientAudit:
    r"""Measure the gradient of every parameter under each objective, at the present parameters.

    With g the gradient of one evaluation of the loss, with fresh draws, elementwise

    .. math:: bias = E\,g - g^*, \qquad SNR = \frac{|E\,g|}{sd(g)}

    There are two biases. *To its own target*: g* is the gradient of the objective's expected loss,
    known where every draw of the guide has a finite support, by a sum over all draws. It is zero
    for a correct estimator. *To ln p(y)*: g* = −∇ ln p(y), for the model's parameters, known where
    the latents can be summed out: it is what a bound costs, and falls as the guide or the number of
    particles improves. Where neither is known, pass ``reference=``.

    Which estimator for a discrete latent? Particles cost time, and a bound's bias is bought with
    the variance of the guide's gradient::

        audit = lvppl.audit_gradients(
            model,
            guide,
            {
                "ELBO, 5": lvppl.ELBO(num_particles=5),          # score function
                "VIMCO, 5": lvppl.IWAE(num_particles=5),         # leave-one-out, tighter bound
                "RWS, 5": lvppl.ReweightedWakeSleep(num_particles=5),
            },
            y,
        )
        print(audit)
        audit.plot().figure.savefig("snr.png")

    Programs run in the mode they are in, without effects: parameters, their ``grad``, buffers,
    random generators and Pyro's store are left as they were, and schedules where they stand. A
    fit's parameters are in place inside ``with fit.active():``. Gradients are summed by running
    moments in float64, and not kept.

    Args:
        model, guide: Pyro programs.
        objectives: by name, or a sequence, whose names are what they print as. An objective of
            lvppl, or any Pyro loss with ``differentiable_loss``.
        *data, **kwargs: arguments of the programs.
        num_repetitions: R, evaluations of each objective. Standard errors and the verdict on a bias
            rest on the mean of R gradients being about normal: take 100 or more.
        reference: an objective of low variance and bias, such as ``ELBO(num_particles=10_000)``,
            evaluated R times too, for biases against it and cosines with it.
        seed: of all draws; an objective's draws depend on its name and the seed alone. A fresh one
            by default.

    Raises:
        ProgramError: no objective, fewer than two repetitions, something that is no loss, programs
            without parameters, a gradient that is not finite (whose, and under which objective).

    References:
        Rainforth et al. 2018, "Tighter variational bounds are not necessarily better", equation 4
        (the ratio, elementwise). Over many elements ``snr`` is its root mean square, and
        ``snr_norm`` the ratio of ‖E g‖ to the root of the summed variances; in both the noise that
        the mean of R evaluations still has is taken off.
    """
    named = _named(objectives)
    _check(named, num_repetitions, reference)
    seed = checked_seed(seed)
    with left_alone():
        with seeded(derived_seed(seed, "parameters")):
            parameters = Parameters.of(model, guide, data, kwargs)
        job = _Job(model, guide, data, kwargs, parameters, num_repetitions, seed)
        evidence = job.settled(lambda: evidence_loss(model, data, kwargs))
        exact = {
            name: job.settled(partial(expected_loss, one, model, guide, data, kwargs))
            for name, one in named.items()
        }
        against = None if reference is None else job.measure("reference=", reference, None)
        rows: list[GradientRow] = []
        totals: list[GradientRow] = []
        moments: dict[str, RunningMoments] = {}
        for name, objective in named.items():
            target = exact[name]
            direction = target
            if target is None and against is not None:
                direction = against.moments.mean
            found = job.measure(name, objective, direction)
            moments[name] = found.moments
            report = _Report(job, name, found, target, evidence, against)
            rows += [report.row(label, [i]) for i, label in enumerate(parameters.names)]
            totals += report.totals()
    return GradientAudit(
        rows=tuple(rows),
        totals=tuple(totals),
        means={name: job.shaped(m.mean) for name, m in moments.items()},
        variances={name: job.shaped(m.variance) for name, m in moments.items()},
        exact={name: job.shaped(g) for name, g in exact.items() if g is not None},
        likelihood={} if evidence is None else job.shaped(evidence),
        num_repetitions=num_repetitions,
        seed=seed,
    )


class _Measured(NamedTuple):
    moments: RunningMoments
    cosines: Tensor | None
    """Mean cosine with a direction, one for each parameter and then for each program."""
    seconds: float


class _Job:
    """A pair of programs on their data, and what is differentiated."""

    def __init__(
        self,
        model: Program,
        guide: Program,
        data: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        parameters: Parameters,
        num_repetitions: int,
        seed: int,
    ) -> None:
        self.call = (model, guide, *data)
        self.kwargs, self.parameters, self.seed = kwargs, parameters, seed
        self.num_repetitions = num_repetitions
        self.slices = parameters.slices()
        present = dict.fromkeys(parameters.programs)  # model, guide, both: in this order
        self.groups = {
            program: [i for i, other in enumerate(parameters.programs) if other == program]
            for program in present
        }
        self.epsilon = max(
            torch.finfo(leaf.dtype).eps for leaf in parameters.leaves if leaf.is_floating_point()
        )

    def settled(self, value: Callable[[], Tensor | None]) -> Tensor | None:
        """The gradient of a value that has no randomness left; ``None`` where another seed, and
        with it another subsample or dropout mask, gives another."""
        found = []
        for attempt in range(2):
            with seeded(derived_seed(self.seed, f"exact gradients {attempt}")):
                found.append(self.gradient(value()))
        first, second = found
        if first is None or second is None:
            return None
        slack = 1e4 * self.epsilon
        return first if torch.allclose(first, second, rtol=slack, atol=slack) else None

    def gradient(self, value: Tensor | None) -> Tensor | None:
        """Of a value, (elements,); ``None`` where there is no value, or it is not finite."""
        if value is None:
            return None
        found = flat(self.parameters.gradients(value))
        return found if bool(found.isfinite().all()) else None

    def measure(self, name: str, objective: Any, direction: Tensor | None) -> _Measured:
        """Evaluate an objective again and again, each time with fresh draws."""
        moments, cosines, start = RunningMoments(), None, 0.0
        with RandomStream(derived_seed(self.seed, f"objective {name}")):
            for repetition in range(self.num_repetitions + 1):
                if repetition == 1:  # the first learns the structure of the programs
                    start = self._now()
                loss = objective.differentiable_loss(*self.call, **self.kwargs)
                value = flat(self.parameters.gradients(loss))
                if repetition == 0:
                    continue
                moments.add(value)
                if direction is not None:
                    now = self._cosines(value, direction)
                    cosines = now if cosines is None else cosines + now
        seconds = (self._now() - start) / self.num_repetitions
        self._require_finite(name, moments)
        return _Measured(moments, None if cosines is None else cosines / moments.count, seconds)

    def select(self, vector: Tensor, indices: Sequence[int]) -> Tensor:
        """The elements of some parameters."""
        return torch.cat([vector[self.slices[i]] for i in indices])

    def _cosines(self, value: Tensor, direction: Tensor) -> Tensor:
        product, own, other = value * direction, value.square(), direction.square()
        chosen = [[i] for i in range(len(self.slices))] + list(self.groups.values())
        sums = torch.stack(
            [
                torch.stack([self.select(x, at).sum() for x in (product, own, other)])
                for at in chosen
            ]
        )
        return sums[:, 0] / (sums[:, 1] * sums[:, 2]).sqrt()

    def _now(self) -> float:
        if self.parameters.leaves[0].is_cuda:
            torch.cuda.synchronize(self.parameters.leaves[0].device)
        return time.perf_counter()

    def _require_finite(self, name: str, moments: RunningMoments) -> None:
        for parameter, elements in zip(self.parameters.names, self.slices, strict=True):
            if not bool(moments.mean[elements].isfinite().all()):
                raise ProgramError(
                    f"Under {name} the gradient of parameter '{parameter}' is not finite in some "
                    f"of {self.num_repetitions} evaluations, so that it has no mean. Look for "
                    "weights or probabilities of zero: lvppl.check(model, guide, *data) says where."
                )

    def shaped(self, vector: Tensor) -> dict[str, Tensor]:
        """By parameter, in its shape."""
        triples = zip(self.parameters.names, self.parameters.leaves, self.slices, strict=True)
        return {name: vector[elements].reshape(leaf.shape) for name, leaf, elements in triples}


class _Report:
    """The rows of one objective."""

    def __init__(
        self,
        job: _Job,
        name: str,
        found: _Measured,
        target: Tensor | None,
        evidence: Tensor | None,
        against: _Measured | None,
    ) -> None:
        self.job, self.name, self.found = job, name, found
        self.target, self.evidence, self.against = target, evidence, against

    def row(self, label: str, indices: Sequence[int], cosine: int | None = None) -> GradientRow:
        job, moments = self.job, self.found.moments
        program = job.parameters.programs[indices[0]]
        cosines = self.found.cosines
        place = indices[0] if cosine is None else len(job.slices) + cosine
        noise = None if self.against is None else self.against.moments
        return row_of(
            objective=self.name,
            parameter=label,
            program=program,
            mean=job.select(moments.mean, indices),
            variance=job.select(moments.variance, indices),
            count=moments.count,
            bias=self._bias(indices, self.target),
            likelihood_bias=None if program == "guide" else self._bias(indices, self.evidence),
            reference_bias=None if noise is None else self._bias(indices, noise.mean, noise),
            cosine=None if cosines is None else float(cosines[place]),
            seconds=self.found.seconds,
        )

    def totals(self) -> list[GradientRow]:
        return [
            self.row(f"all of {'the ' if program != 'both' else ''}{program}", indices, number)
            for number, (program, indices) in enumerate(self.job.groups.items())
        ]

    def _bias(
        self, indices: Sequence[int], other: Tensor | None, noise: RunningMoments | None = None
    ) -> Bias | None:
        if other is None:
            return None
        job, moments = self.job, self.found.moments
        variance = moments.variance if noise is None else moments.variance + noise.variance
        return bias_of(
            job.select(moments.mean, indices),
            job.select(variance, indices),
            moments.count,
            job.select(other, indices),
            job.epsilon,
            moments.count - 1,
        )


def _named(objectives: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    if isinstance(objectives, Mapping):
        return {str(name): objective for name, objective in objectives.items()}
    if not isinstance(objectives, Sequence):
        objectives = [objectives]
    found: dict[str, Any] = {}
    for objective in objectives:
        name = repr(objective)
        again = sum(other.partition(" #")[0] == name for other in found)
        found[f"{name} #{again + 1}" if again else name] = objective
    return found


def _check(named: Mapping[str, Any], num_repetitions: int, reference: Any) -> None:
    if not named:
        raise ProgramError(
            "audit_gradients needs at least one objective, such as lvppl.ELBO(num_particles=5)."
        )
    whole = isinstance(num_repetitions, int) and not isinstance(num_repetitions, bool)
    if not whole or num_repetitions < 2:
        raise ProgramError(
            "num_repetitions must be a whole number of at least 2, for a variance, got "
            f"{num_repetitions!r}."
        )
    losses = {**named, **({} if reference is None else {"reference=": reference})}
    for name, objective in losses.items():
        if isinstance(objective, type) or not hasattr(objective, "differentiable_loss"):
            raise ProgramError(
                f"'{name}' is {objective!r}, which has no differentiable_loss. Pass objectives, "
                "such as lvppl.IWAE(num_particles=5)."
            )

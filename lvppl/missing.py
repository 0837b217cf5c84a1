r"""``missing="nan"``: NaN in observed data is a missing value, and leaves the likelihood.

.. math:: \ln p(y_o) = \ln \int p(y_o, y_m)\, dy_m

What a program receives is settled here, for every routine alike:

- The *model* receives the data as they are. Where a site observes a NaN, that element is summed or
  integrated out of the site's distribution (:mod:`lvppl.observed_part`), and something of the
  support stands in its place, which no value or gradient depends on. A model that reads a NaN
  elsewhere is refused: where it computes with it, since its terms are NaN; where it compares it or
  makes a whole number of it, at that statement (:mod:`lvppl.decided_by_nan`). What a model does
  with a NaN outside torch, or compiled, is not noticed, nor what it fills itself (``nan_to_num``).
- The *guide* receives the data with 0 for every NaN, as an encoder network does in Mattei and
  Frellsen (2019), "MIWAE", ICML, section 3.2. A guide that should know what is missing takes
  ``~y.isnan()`` as a further argument of both programs.

So nothing depends on what a missing value may have been. An element of an
:class:`~lvppl.distributions.Autoregressive` event that is missing before an observed one in the
order is a latent, ``"<site>_missing"``, which the model draws in its order unless the guide does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import pyro
import torch
from pyro import poutine
from pyro.distributions import MaskedDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch import distributions as td
from torch.distributions import constraints

from lvppl.decided_by_nan import DecidedByNaN
from lvppl.distributions import HiddenMarkov
from lvppl.errors import ProgramError
from lvppl.observed_part import MissingElements, needs_draws, observed_part
from lvppl.tracing import support_of, undisturbed

__all__ = [
    "ELSEWHERE",
    "MISSING",
    "OWN_PROPOSAL",
    "MissingValues",
    "check_option",
    "filler",
    "with_missing",
]

Program = Callable[..., Any]

MISSING = "lvppl_missing"
"""Key of a site's ``infer`` under which its mask lies: true where the value is missing."""
ELSEWHERE = (
    'missing="nan" takes missing values out of the sites that observe them: a model that reads one '
    "elsewhere, as an input or as an earlier step, computes with NaN. Make it a latent there, or "
    "fill such arguments."
)
"""What to say of a model that computes with a missing value."""
OWN_PROPOSAL = "lvppl_own_proposal"
"""Key of a latent's ``infer`` that lets the model draw it where the guide does not."""


def check_option(missing: Any) -> None:
    """Refuse any other word.

    Raises:
        ProgramError: ``missing`` is neither None nor "nan".
    """
    if missing not in (None, "nan"):
        raise ProgramError(f'missing must be None or "nan", but is {missing!r}')


def with_missing(
    model: Program, guide: Program | None, missing: str | None, *, draws: bool = True
) -> tuple[Program, Any]:
    """Model and guide as ``missing`` says; unchanged for None.

    Args:
        draws: let missing elements that have no exact form be latents.

    Raises:
        ProgramError: ``missing`` is neither None nor "nan".
    """
    check_option(missing)
    if missing is None:
        return model, guide
    handled: Program = MissingValues(draws=draws)(model)
    return _explained(handled, model), None if guide is None else _reading_zeros(guide)


def _explained(handled: Program, model: Program) -> Program:
    """The program, which says so where it computes with a missing value."""

    @functools.wraps(model, updated=())
    def program(*args: Any, **kwargs: Any) -> Any:
        try:
            return handled(*args, **kwargs)
        except ValueError as error:
            if "invalid values" in str(error) and _runs_filled(handled, args, kwargs):
                what = "A distribution has a parameter that is nan."
                raise ProgramError(f"{what} {ELSEWHERE}") from error
            raise

    return program


def _runs_filled(program: Program, args: Any, kwargs: Any) -> bool:
    """Whether the program runs once no value is missing: parameters of its own are not to blame."""
    try:
        with torch.no_grad(), undisturbed(), poutine.block():
            program(*_zero_filled(args), **_zero_filled(kwargs))
    except (RuntimeError, ValueError):
        return False
    return True


def _reading_zeros(guide: Program) -> Program:
    @functools.wraps(guide, updated=())  # inspect.unwrap gives the guide itself
    def program(*args: Any, **kwargs: Any) -> Any:
        return guide(*_zero_filled(args), **_zero_filled(kwargs))

    return program


def _zero_filled(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.masked_fill(value.isnan(), 0.0) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_zero_filled(item) for item in value)
    if type(value) is dict:
        return {key: _zero_filled(item) for key, item in value.items()}
    return value


class MissingValues(Messenger):
    """Takes the NaN of observed sites out of their distributions, and puts valid values there.

    Args:
        parts: let an event be missing in part where that has an exact form.
        draws: let the model draw what has none, as a latent.
    """

    def __init__(self, *, parts: bool = True, draws: bool = True) -> None:
        super().__init__()
        self.parts, self.draws = parts, draws
        self._decisions = DecidedByNaN(ELSEWHERE)

    def __enter__(self) -> Any:
        entered = super().__enter__()
        self._decisions.__enter__()
        return entered

    def __exit__(self, *raised: Any) -> None:
        self._decisions.__exit__(*raised)
        super().__exit__(*raised)

    def _pyro_sample(self, msg: Any) -> None:
        value = msg["value"]
        if not msg["is_observed"] or not isinstance(value, Tensor) or not value.is_floating_point():
            return
        if MISSING in msg["infer"]:
            return  # seen to by a handler inside
        missing = value.isnan()
        if not self.parts and not bool(missing.any()):
            return  # so that EM knows complete data by their distribution
        name, fn = msg["name"], msg["fn"]
        msg["fn"] = observed_part(name, fn, missing, parts=self.parts)
        msg["value"] = torch.where(missing, filler(fn, value), value)
        msg["infer"] = {**msg["infer"], MISSING: missing}
        part = needs_draws(msg["fn"])
        if part is None:
            return
        if not self.draws:
            raise ProgramError(_no_sum(name))
        proposal = MissingElements(part.whole, part.missing, msg["value"])
        drawn = pyro.sample(f"{name}_missing", proposal, infer=cast(Any, {OWN_PROPOSAL: True}))
        msg["value"] = torch.where(missing, drawn, msg["value"])


def _no_sum(name: str) -> str:
    return (
        f"site '{name}' is Autoregressive, and elements are missing that come before observed ones "
        "in its order: their sum has no exact form. Use an order that begins with what was "
        'observed, or estimate ln p(y) with lvppl.log_likelihood(..., missing="nan"), which draws '
        "them."
    )


def filler(fn: Any, like: Tensor) -> Tensor:
    """A number, or an event, inside the support of ``fn``; broadcasts to the shape of ``like``."""
    while isinstance(fn, td.Independent | MaskedDistribution):
        fn = fn.base_dist
    if isinstance(fn, HiddenMarkov):
        return filler(fn.observation_dist, like)
    if isinstance(fn, td.TransformedDistribution):
        pushed = _pushed(fn, like)
        if pushed is not None:
            return pushed
    support: Any = support_of(fn)
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    low, high = (getattr(support, f"{side}_bound", None) for side in ("lower", "upper"))
    if support is None or (low is high is None and _holds_zero(support)):
        return like.new_zeros(())
    if low is high is None:
        return _draw(fn, like)
    step = 0.0 if support.is_discrete else 1.0
    if low is None:
        return torch.as_tensor(high).to(like).min() - step
    low = torch.as_tensor(low).to(like)
    if high is None or support.is_discrete:
        return low.max() + step
    return _between(low, torch.as_tensor(high).to(like), like)


@torch.no_grad()
def _pushed(fn: Any, like: Tensor) -> Tensor | None:
    """The image of the base's filler, since a declared codomain may be wider than the support.

    None where the base declares too much itself, or a transform only has an inverse.
    """
    try:
        shape = like.shape
        for transform in reversed(fn.transforms):
            shape = transform.inverse_shape(shape)
        start = like.new_empty(()).expand(shape)
        value = filler(fn.base_dist, start).expand(shape)
        for transform in fn.transforms:
            value = transform(value)
        inside = bool(fn.support.check(value).all()) and bool(value.isfinite().all())
    except (NotImplementedError, RuntimeError, ValueError):
        return None
    return value.to(like) if inside and value.shape == like.shape else None


def _holds_zero(support: Any) -> bool:
    """Whether 0 is a value; not for supports whose elements depend on each other."""
    if support is constraints.real or support is constraints.boolean:
        return True
    try:
        return support.event_dim == 0 and bool(support.check(torch.zeros(())))
    except (AttributeError, NotImplementedError, RuntimeError):
        return False


def _between(low: Tensor, high: Tensor, like: Tensor) -> Tensor:
    """The middle, of each element if the elements have bounds of their own."""
    middle = 0.5 * (low + high)
    if torch.broadcast_shapes(middle.shape, like.shape) == like.shape:
        return middle
    return 0.5 * (low.max() + high.min())


@torch.no_grad()
def _draw(fn: Any, like: Tensor) -> Tensor:
    """A draw is valid whatever the support is; the random stream is left as it was."""
    devices = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        drawn: Tensor = fn.sample()
    return drawn.reshape(-1, *fn.event_shape)[0].to(like)

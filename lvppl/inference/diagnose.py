"""Which site, and which datum, made a step not finite.

The step is run again at the same random state, outside all guards, and every sample site is looked
at as it passes: values and log-probabilities on the way forward, gradients on the way back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

__all__ = ["diagnose"]


class _Recorder(Messenger):
    """Outside of everything: sees each site after the program and all other handlers."""

    def __init__(self, batch_rows: int | None, rows: Tensor | None) -> None:
        super().__init__()
        self.batch_rows = batch_rows
        self.rows = rows
        self.finding: str | None = None
        self.values: list[tuple[str, Any, Tensor]] = []
        self.names: set[str] = set()

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.finding is not None or type(msg["fn"]).__name__ == "_Subsample":
            return
        if msg["infer"].get("_deterministic", False) or not isinstance(msg["value"], Tensor):
            return
        again = msg["name"] in self.names and not msg["is_observed"]
        self.names.add(msg["name"])
        site = f"{'observed' if msg['is_observed'] else 'latent'} site {msg['name']!r}"
        value = msg["value"]
        if not msg["is_observed"] and not again and not _all_finite(value):
            bad = _over_events(~value.isfinite(), msg["fn"].event_dim)
            self.finding = self._sentence("the value", site, _first(value), bad, msg)
            return
        if value.requires_grad and not value.is_leaf:
            value.retain_grad()
            self.values.append((site, msg, value))
        self._look_at_log_prob(msg, site + (" under the model" if again else ""))

    def _look_at_log_prob(self, msg: Any, site: str) -> None:
        if msg["mask"] is False:
            return
        with torch.no_grad():
            try:
                log_prob = msg["fn"].log_prob(msg["value"])
            except Exception:  # a site without a density has nothing to look at
                return
            if isinstance(msg["mask"], Tensor):
                log_prob = torch.where(msg["mask"], log_prob, torch.zeros_like(log_prob))
        if not _all_finite(log_prob):
            what = "the log-probability"
            self.finding = self._sentence(what, site, _first(log_prob), ~log_prob.isfinite(), msg)

    def gradient_finding(self) -> str | None:
        """The last site on the way forward, so the first on the way back, with a bad gradient."""
        for site, msg, value in reversed(self.values):
            if value.grad is not None and not _all_finite(value.grad):
                bad = _over_events(~value.grad.isfinite(), msg["fn"].event_dim)
                what = "the gradient of the loss with respect to"
                return self._sentence(what, site, _first(value.grad), bad, msg)
        return None

    def _sentence(self, what: str, site: str, number: float, bad: Tensor, msg: Any) -> str:
        join = " " if what.endswith("to") else " of "
        return f"{what}{join}{site} is {number}{self._data(bad, msg)}"

    def _data(self, bad: Tensor, msg: Any) -> str:
        """The data concerned, in the order of the user's data; empty where no plate tells."""
        for frame in msg["cond_indep_stack"]:
            if frame.size != self.batch_rows:
                continue
            if frame.dim is None:
                index = [frame.counter - 1]
            elif -frame.dim <= bad.dim():
                others = [d for d in range(bad.dim()) if d != bad.dim() + frame.dim]
                along = bad.any(dim=tuple(others)) if others else bad
                index = along.nonzero().flatten().tolist()
            else:
                continue
            if self.rows is not None:
                index = [int(self.rows[i]) for i in index if i < len(self.rows)]
            if index:
                first = min(index)
                more = f" and {len(index) - 1} more" if len(index) > 1 else ""
                return f" at datum {first}{more} (plate {frame.name!r})"
        return ""


def _all_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())


def _first(value: Tensor) -> float:
    value = value.detach()
    return float(value[~value.isfinite()].flatten()[0])


def _over_events(bad: Tensor, event_dim: int) -> Tensor:
    return bad.flatten(-event_dim).any(-1) if event_dim else bad


def diagnose(
    loss: Callable[[], Tensor],
    params: Callable[[], Mapping[str, Tensor]],
    *,
    batch_rows: int | None,
    rows: Tensor | None = None,
) -> str | None:
    """Run a step again and say what first became NaN or infinite; None if nothing did.

    :param loss: the loss of the step, at the random state and the parameters of the step.
    :param params: the unconstrained parameters by name, read after the loss has run. Their
        gradients are cleared.
    :param batch_rows: number of rows of the batch, by which the data plate is known.
    :param rows: (batch,) indices of the batch's rows in the user's data; None if it is all of them.
    :return: a sentence naming the site and the datum, or the parameter.
    """
    recorder = _Recorder(batch_rows, rows)
    error: Exception | None = None
    value = None
    with pyro.validation_enabled(False), recorder:  # validation would stop before the site
        try:
            value = loss()
        except Exception as problem:  # reported below, or raised by the caller
            error = problem
    if recorder.finding is not None:
        return recorder.finding
    if value is None:
        return None if error is None else _from_error(error)
    named = params()
    clear(named.values())
    if value.requires_grad:
        value.backward()
    finding = recorder.gradient_finding()
    bad = [n for n, p in named.items() if p.grad is not None and not _all_finite(p.grad)]
    clear(named.values())
    if finding is not None:
        return finding
    if bad:
        return f"the gradient of parameter {bad[0]!r} is not finite although every site is"
    if not _all_finite(value):
        return f"the loss is {float(value)} although every site is finite"
    return None


def _from_error(error: Exception) -> str | None:
    if isinstance(error, torch.linalg.LinAlgError):
        return f"a matrix factorisation failed: {error}"
    return None


def clear(params: Iterable[Tensor]) -> None:
    """Drop the gradients."""
    for param in params:
        param.grad = None

"""One Baum-Welch iteration of a Gaussian hidden Markov model beside hmmlearn and dynamax.

    python benchmarks/hmm.py

float64, one start for all, the same number of iterations. The likelihood that each arrives at is
shown first. The time of an iteration is the difference between a long and a short run, so that
set-up and compiling do not count. dynamax regularises its M-step by priors, so that only its E-step
(evidence and statistics, jitted) is timed: less than an iteration.
"""

from __future__ import annotations

import importlib.util
import logging
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from _timing import machine, table
from torch import Tensor

import lvppl
from lvppl.models import HiddenMarkovModel
from lvppl.models.components import GaussianComponents

ROUNDS, SHORT, LONG = 5, 2, 22


def data(sequences: int, steps: int, states: int, features: int) -> Tensor:
    """Sequences of a sticky chain with unit Gaussians around random centres."""
    torch.manual_seed(0)
    centres = 2 * torch.randn(states, features, dtype=torch.float64)
    stay = torch.rand(sequences, steps) < 0.9
    z = torch.randint(states, (sequences, steps))
    for t in range(1, steps):
        z[:, t] = torch.where(stay[:, t], z[:, t - 1], z[:, t])
    return centres[z] + torch.randn(sequences, steps, features, dtype=torch.float64)


def start(y: Tensor, states: int) -> HiddenMarkovModel:
    torch.manual_seed(0)
    flat = y.reshape(-1, y.shape[-1])[:10_000]
    return HiddenMarkovModel(GaussianComponents.from_data(flat, states, covariance="diag")).double()


def with_lvppl(y: Tensor, states: int) -> Callable[[int], float]:
    def run(iterations: int) -> float:
        em = lvppl.EM(start(y, states))
        fit = em.fit(y, max_iter=iterations, tol=0.0, seed=0, progress=False)
        return float(fit.history["objective"][-1])

    return run


def with_hmmlearn(y: Tensor, states: int, implementation: str) -> Callable[[int], float]:
    from hmmlearn.hmm import GaussianHMM

    logging.getLogger("hmmlearn").setLevel(logging.ERROR)
    flat, lengths = y.reshape(-1, y.shape[-1]).numpy(), [y.shape[1]] * len(y)

    def run(iterations: int) -> float:
        at = start(y, states)
        peer = GaussianHMM(
            states,
            covariance_type="diag",
            covars_prior=0.0,
            covars_weight=0.0,
            min_covar=0.0,
            n_iter=iterations,
            tol=-np.inf,
            init_params="",
            implementation=implementation,
        )
        peer.startprob_ = at.initial.detach().numpy()
        peer.transmat_ = at.transition.detach().numpy()
        peer.means_ = at.emission.loc.detach().numpy()
        peer.covars_ = at.emission.scale.detach().numpy() ** 2
        peer.fit(flat, lengths)
        return float(peer.score(flat, lengths))

    return run


def with_dynamax(y: Tensor, states: int) -> tuple[Callable[[], object], float]:
    """Its jitted E-step at the start, and ln p(y) there."""
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import DiagonalGaussianHMM

    jax.config.update("jax_enable_x64", True)
    at = start(y, states)
    peer = DiagonalGaussianHMM(states, y.shape[-1])

    def array(value: Tensor) -> Any:
        return jnp.array(value.detach().numpy())

    params, _ = peer.initialize(
        jax.random.PRNGKey(0),
        method="prior",
        initial_probs=array(at.initial),
        transition_matrix=array(at.transition),
        emission_means=array(at.emission.loc),
        emission_scale_diags=array(at.emission.scale),
    )
    step = jax.jit(jax.vmap(partial(peer.e_step, params)))
    emissions = array(y)

    def run() -> object:
        return jax.block_until_ready(step(emissions))

    _, evidence = run()  # type: ignore[misc]
    return run, float(evidence.sum())


def compare(title: str, sequences: int, steps: int, states: int, features: int) -> None:
    y = data(sequences, steps, states, features)
    ours = with_lvppl(y, states)
    runs = {"lvppl": ours}
    if importlib.util.find_spec("hmmlearn"):
        for implementation in ("scaling", "log"):
            name = f"hmmlearn, {implementation}"
            runs[name] = with_hmmlearn(y, states, implementation)
    else:
        print("hmmlearn is not installed: left out\n")
    ends = {name: run(LONG) for name, run in runs.items() if not name.endswith("log")}
    print(", ".join(f"{name} {value:.6f}" for name, value in ends.items()), "nats at the end")
    assert max(ends.values()) - min(ends.values()) < 1e-4 * y[..., 0].numel(), ends
    e_step: Callable[[], object] | None = None
    if importlib.util.find_spec("dynamax"):
        e_step, theirs = with_dynamax(y, states)
        here = float(start(y, states).log_evidence(y).sum().detach())
        print(f"ln p(y) at the start: lvppl {here:.6f}, dynamax {theirs:.6f}")
        assert abs(theirs - here) < 1e-8 * abs(here)
    else:
        print("dynamax is not installed: left out\n")

    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            clock = [time.perf_counter()]
            for iterations in (SHORT, LONG):
                run(iterations)
                clock.append(time.perf_counter())
            once = (clock[2] - clock[1]) - (clock[1] - clock[0])
            taken[name].append(once / (LONG - SHORT))
        if e_step is not None:
            clock = [time.perf_counter()]
            e_step()
            taken.setdefault("dynamax, E-step only", []).append(time.perf_counter() - clock[0])
    medians = {name: statistics.median(times) for name, times in taken.items()}
    print(table(title, medians, against="lvppl"), "\n")


if __name__ == "__main__":
    print(machine(), "\n")
    compare("64 sequences × 500 steps, 16 states, 4 features", 64, 500, 16, 4)
    compare("1 sequence × 100,000 steps, 8 states, 2 features", 1, 100_000, 8, 2)

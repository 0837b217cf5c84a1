"""Bach's chorales by a hidden Markov model: EM and gradients on the same model.

    python examples/chorales_hmm.py [--out runs/chorales] [--quick] [--seed 0]

Each quarter note of a chorale is a row of 88 keys, on or off. A state is a chord, in which keys are
independent, and states follow each other as a Markov chain: one program, which EM climbs by its
closed forms and SVI by gradients, from the same start. A second spelling of it, a loop over steps
with a latent at each, has the same likelihood, and names the states of a chorale. Likelihoods are
in nats per time step, as in the literature. Writes a picture, and exits with 1 if a known answer is
missed.

The file of the chorales is looked for in $LVPPL_DATA and in the cache, and is downloaded otherwise.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from _answers import verdict
from _options import command_line
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor

import lvppl
from lvppl.data import Chorales, Sequences
from lvppl.inspection.plots import COLOURS, FAINT, INK
from lvppl.models import (
    BernoulliComponents,
    BernoulliMixture,
    HiddenMarkovLoop,
    HiddenMarkovModel,
)

BATCH = 8  # chorales that EM holds at once: the answer is that of all together, and comes sooner
LOWEST = 21  # MIDI number of the first key


@dataclass(frozen=True)
class Size:
    """How much is done: all of it, or enough for a test."""

    num_states: int = 32
    iterations: int = 40
    num_steps: int | None = None

    def of(self, part: Sequences) -> Sequences:
        values = part.values[:, : self.num_steps]
        return Sequences(values, part.lengths.clamp(max=values.shape[1]), part.source)


def main() -> int:
    options = command_line(__doc__, out="runs/chorales", quick="fewer and shorter")
    size, seed = Size(8, 15, 30) if options.quick else Size(), options.seed
    data = lvppl.data.chorales(dtype=torch.float64)
    data = Chorales(size.of(data.train), size.of(data.valid), size.of(data.test))
    for purpose, part in (
        ("fit", data.train),
        ("choose by", data.valid),
        ("measure on", data.test),
    ):
        print(f"{len(part):4} chorales of {part.num_steps:6,} steps to {purpose}")
    print(f"\n{'nats per time step':<40}{'seconds':>9}{'train':>9}{'valid':>9}{'test':>9}")

    keys = data.train.values[data.train.exists]
    alone = independent_keys(keys, data)
    memoryless = mixture(keys, data, size, seed)

    model, other = (  # the same start twice
        HiddenMarkovModel(BernoulliComponents.from_data(keys, size.num_states, seed=seed))
        for _ in range(2)
    )
    em = by_em(model, data, size, seed)
    svi = by_svi(other, data, size, seed)

    loop = HiddenMarkovLoop(model.emission)  # the other spelling, with EM's parameters
    loop.initial, loop.transition = model.initial.detach(), model.transition.detach()
    enumerated = lvppl.log_evidence(loop, data.test.values, data.test.lengths).total
    difference = abs(enumerated.item() / data.test.num_steps - em.nats["test"])

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "chorales.png"
    levels = {"88 independent keys": alone, f"{size.num_states} chords, no memory": memoryless}
    picture(em, svi, levels, loop, data.test, seed).savefig(path, dpi=160)
    print(f"\nwritten to {path}")
    answers = [
        ("both spellings are one model: ln p(y) equal to 1e-6 nats", difference < 1e-6),
        ("ln p(y) never falls under EM", bool((np.diff(em.curve) > -1e-9).all())),
        ("EM is ahead of SVI after as many passes", em.curve[-1] > svi.curve[-1]),
        ("memory is worth 0.1 nats of the test data", em.nats["test"] > memoryless["test"] + 0.1),
    ]
    if not options.quick:
        answers += [
            ("test data at -7.8 nats a step or better", em.nats["test"] > -7.8),
            ("no more than 0.4 nats lost from train to test", em.gap < 0.4),
        ]
    return verdict(answers)


# -------------------------------------------------------------------------------------- the models

Nats = dict[str, float]


@dataclass(frozen=True)
class Run:
    """A fit of the hidden Markov model: nats per step of each part, and of train as it went."""

    nats: Nats
    curve: np.ndarray

    @property
    def gap(self) -> float:
        return self.nats["train"] - self.nats["test"]


def measured(log_evidence: Callable[[Sequences], Tensor], data: Chorales) -> Nats:
    """ln p(y) of each part, in nats per time step."""
    with torch.no_grad():
        return {
            name: float(log_evidence(part).sum()) / part.num_steps
            for name, part in vars(data).items()
        }


def row(name: str, seconds: float | None, nats: Nats) -> None:
    took = "" if seconds is None else f"{seconds:.1f}"
    parts = "".join(f"{nats[part]:9.3f}" for part in ("train", "valid", "test"))
    print(f"{name:<40}{took:>9}{parts}", flush=True)


def independent_keys(keys: Tensor, data: Chorales) -> Nats:
    """Every key as often as in the training data, whatever sounds with it."""
    p = keys.mean(0).clamp(1e-4)  # a key that was never heard
    key = torch.distributions.Bernoulli(p)
    nats = measured(lambda part: key.log_prob(part.values[part.exists]), data)
    row("88 independent keys", None, nats)
    return nats


def mixture(keys: Tensor, data: Chorales, size: Size, seed: int) -> Nats:
    """The same states without their order: a Bernoulli mixture of all steps."""
    began = time.perf_counter()
    model = BernoulliMixture.from_data(keys, size.num_states, seed=seed)
    lvppl.EM(model).fit(
        keys, max_iter=25, tol=1e-4, batch_size=BATCH * 32, seed=seed, progress=False
    )
    nats = measured(lambda part: model.log_evidence(part.values[part.exists]), data)
    row(f"mixture of {size.num_states} chords, EM", time.perf_counter() - began, nats)
    return nats


def by_em(model: HiddenMarkovModel, data: Chorales, size: Size, seed: int) -> Run:
    began = time.perf_counter()
    fit = lvppl.EM(model).fit(
        data.train.values,
        data.train.lengths,
        max_iter=size.iterations,
        batch_size=BATCH,
        seed=seed,
        progress=False,
    )
    name = f"hidden Markov, {size.num_states} states, EM"
    return run(name, model, began, fit.history["objective"], data)


def by_svi(model: HiddenMarkovModel, data: Chorales, size: Size, seed: int) -> Run:
    began = time.perf_counter()
    svi = lvppl.SVI(model, lambda y, lengths: None, learning_rate=0.1)  # no latent is left
    fit = svi.fit(
        data.train.values, data.train.lengths, num_steps=size.iterations, seed=seed, progress=False
    )
    name = f"hidden Markov, {size.num_states} states, SVI"
    return run(name, model, began, -fit.history["loss"], data)


def run(
    name: str, model: HiddenMarkovModel, began: float, curve: np.ndarray, data: Chorales
) -> Run:
    seconds = time.perf_counter() - began
    nats = measured(lambda part: model.log_evidence(part.values, part.lengths), data)
    row(name, seconds, nats)
    return Run(nats, curve / data.train.num_steps)


# ------------------------------------------------------------------------------------- the picture

SHOWN = 48  # steps of a chorale
# Colours of the states, the commonest first: eight that are easily told apart, and more.
PALETTE = [*(c for c in COLOURS if c not in ("#000000", "#8C8C8C")), *colormaps["tab20b"].colors]
OTHERS = "#B4B4B4"


def picture(
    em: Run, svi: Run, levels: dict[str, Nats], loop: HiddenMarkovLoop, test: Sequences, seed: int
) -> Figure:
    """A chorale with its likeliest states, one that the model composed, and both ascents."""
    whose = int((test.lengths >= min(SHOWN, int(test.lengths.max()))).nonzero()[0])
    y, length = test.values[whose : whose + 1], test.lengths[whose : whose + 1]
    path = lvppl.posterior(loop, y, length).map().values
    num_steps = min(SHOWN, int(length))
    states = torch.stack([path[f"z_{t}"].flatten()[0] for t in range(num_steps)])
    torch.manual_seed(seed)
    trace = poutine.trace(poutine.uncondition(loop)).get_trace(y[:, :num_steps])
    drawn = torch.stack([trace.nodes[f"z_{t}"]["value"][0] for t in range(num_steps)])
    invented = trace.nodes["_RETURN"]["value"][0]

    common = torch.cat([states, drawn]).bincount(minlength=loop.num_states)
    rank = common.argsort(descending=True).argsort()
    figure = Figure(figsize=(12.4, 5.6), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[2.2, 1])
    top, bottom = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
    roll(top, y[0, :num_steps], states, rank, "a chorale of Bach's, held out")
    roll(bottom, invented.detach(), drawn, rank, "a chorale of the model's own")
    bottom.set_xlabel("quarter notes; a colour is a state of the chain", color=INK)
    ascent(figure.add_subplot(grid[:, 1]), em, svi, levels)
    return figure


def roll(ax: Axes, y: Tensor, states: Tensor, rank: Tensor, title: str) -> None:
    """The keys that sound at each step, in the colour of the state."""
    for t, key in y.nonzero().tolist():
        place = int(rank[states[t]])
        colour = PALETTE[place] if place < len(PALETTE) else OTHERS
        ax.barh(key + LOWEST, 0.9, left=t + 0.05, height=0.9, color=colour)
    ax.set_xlim(0, len(y))
    ax.set_ylim(46, 95)
    ax.set_yticks([48, 60, 72, 84], ["C3", "C4", "C5", "C6"])
    ax.set_title(title, fontsize=11, color=INK, loc="left")
    tidy(ax)


def ascent(ax: Axes, em: Run, svi: Run, levels: dict[str, Nats]) -> None:
    for run, name, colour in ((em, "EM", COLOURS[0]), (svi, "SVI, Adam", COLOURS[1])):
        ax.plot(np.arange(len(run.curve)), run.curve, color=colour, linewidth=1.8)
        quarter = len(run.curve) // 4
        ax.annotate(
            name,
            (quarter, run.curve[quarter]),
            xytext=(6, -4),
            textcoords="offset points",
            va="top",
            color=colour,
            fontsize=11,
        )
    for name, nats in levels.items():
        ax.axhline(nats["train"], color="#888888", linewidth=1.0, linestyle="--")
        ax.annotate(
            name,
            (ax.get_xlim()[1], nats["train"]),
            xytext=(-2, 4),
            textcoords="offset points",
            ha="right",
            color="#666666",
            fontsize=9,
        )
    ax.set_xlabel("passes over the training data", color=INK)
    ax.set_title("ln p(y), nats per time step", fontsize=11, color=INK, loc="left")
    tidy(ax)


def tidy(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(colors=INK)
    ax.grid(color=FAINT, linewidth=0.6)
    ax.set_axisbelow(True)


if __name__ == "__main__":
    sys.exit(main())

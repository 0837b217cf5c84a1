"""Why not just average p(y | z) over random z? Sampled estimates of ln p(y) against the exact sum.

    python examples/naive_vs_importance.py [--out runs/naive] [--quick] [--seed 0] [--bits 20]
                                           [--epochs 20]

A sigmoid belief net with twenty hidden bits is fitted to binarized digits, together with a guide.
Then p(y) of a few held-out images, a sum over 2^20 states z, is found exactly, by adding up every
term, and is estimated from draws:

    uniform    z from all states alike: the mean of p(y, z), times 2^20
    prior      z from p(z): the mean of p(y | z)
    guide      z from q(z | y): the mean of p(y, z) / q(z | y)
    annealed   chains of Gibbs steps from the prior to the posterior

All four are unbiased for p(y). Writes a picture of how they approach the exact value, and exits
with 1 if a known answer is missed. MNIST is looked for in $LVPPL_DATA and in the cache, and is
downloaded otherwise; without it, and with --quick, the embedded 8×8 digits are enlarged.

--bits 30 sums 1,073,741,824 states: three minutes on two CPU cores. A GPU is used where there is
one. A guide that is trained so briefly then misses a nat or two on some images, and is flagged.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from _answers import verdict
from _handwriting import binarized_digits
from _options import command_line
from matplotlib.figure import Figure
from torch import Tensor

import lvppl
from lvppl.data import Images
from lvppl.guides import AmortizedBernoulliLayers
from lvppl.inference.likelihood.annealed import Annealing
from lvppl.inspection.plots import INK, SMALL, likelihood_convergence
from lvppl.models import SigmoidBeliefNet

NUM_IMAGES = 4
NUM_DRAWS = 2**16
NUM_CHAINS, NUM_STEPS = 128, 100  # of annealing: with twenty bits 256,000 evaluations of p(z, y)
WIDTH = 0.5  # of the guide's logits that the proposal has
SAMPLED = ("uniform", "prior", "guide", "annealed")

LESSON = """
Hardly any state explains a given image, and a draw that knows nothing of the image does not find
it. There is a uniform draw for every {share:,.3g} states, {draws:,} in all, and in the median
{ess:.1f} of them carry the average. Its error bar, ± {error:.2f} nats, is computed from these very
draws and knows nothing of the states that were missed; what tells is k-hat (*: neither value nor
error can be relied on). The guide looks at the image and proposes the right states; annealing
finds them step by step, without a guide.
"""


def main() -> int:
    options = command_line(
        __doc__,
        out="runs/naive",
        quick="short training on the embedded digits",
        bits=(20, "of the latent vector"),
        epochs=(20, "of training over 20,000 digits"),
    )
    start = time.perf_counter()
    digits = binarized_digits(embedded=options.quick)
    train, images = digits.train[:20_000], digits.test[:NUM_IMAGES]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # the embedded digits are few: as many steps take more epochs
    epochs = options.epochs * (2 if len(train) < 20_000 else 1)
    model, guide = fitted(train, options.bits, epochs, options.seed, device)
    print(f"fitted to {len(train):,} digits in {time.perf_counter() - start:.0f} s\n")

    y = images.images.flatten(1).to(device, torch.float64)
    estimates = measure(model, guide, y, seed=options.seed + 1)
    exact = estimates.pop("exact")
    show(estimates, exact, images, options.bits)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "naive_vs_importance.png"
    costs = {"annealed": NUM_STEPS * options.bits}
    picture(estimates, exact, images, costs).savefig(path, dpi=110)
    print(f"written to {path}, in {time.perf_counter() - start:.0f} s altogether")
    return verdict(answers(estimates, exact))


def fitted(
    train: Images, bits: int, epochs: int, seed: int, device: str
) -> tuple[SigmoidBeliefNet, AmortizedBernoulliLayers]:
    """Model and guide, by the importance-weighted bound; in double precision from then on.

    Bits have no gradient of their own: the objective takes VIMCO's. Pixels begin at their
    frequencies, which no hidden bit then has to be spent on.
    """
    y = train.images.flatten(1)
    torch.manual_seed(seed)
    shapes = {"latent_dims": (bits,), "y_shape": y.shape[1:]}
    model, guide = SigmoidBeliefNet(**shapes), AmortizedBernoulliLayers(**shapes)
    with torch.no_grad():
        model.layers[0].bias.copy_(y.mean(0).clamp(0.005, 0.995).logit())
    svi = lvppl.SVI(model, guide, objective=lvppl.IWAE(num_particles=10), learning_rate=1e-2)
    svi.fit(y, num_epochs=epochs, batch_size=200, seed=seed, device=device)
    return model.double(), guide.double()  # the exact sum recognises its form in float64


def measure(
    model: SigmoidBeliefNet, guide: AmortizedBernoulliLayers, y: Tensor, seed: int
) -> dict[str, lvppl.LikelihoodEstimate]:
    """The exact value, and what four samplers make of it."""
    annealing = Annealing(num_steps=NUM_STEPS)
    how: dict[str, dict[str, object]] = {
        "exact": {"estimator": "exact"},
        "uniform": {"estimator": "uniform"},
        "prior": {"estimator": "prior"},
        "guide": {"estimator": "importance", "guide": widened(guide)},
        "annealed": {"estimator": "ais", "num_samples": NUM_CHAINS, "annealing": annealing},
    }
    found = {}
    for number, (name, options) in enumerate(how.items()):
        if name != "exact":
            options = {"num_samples": NUM_DRAWS, "trajectory": True, **options}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the table shows k-hat
            start = time.perf_counter()
            found[name] = lvppl.log_likelihood(model, y, seed=seed + number, **options)
        words = found[name].notes[:1] or (f"{NUM_DRAWS:,} draws for each image",)
        print(f"{name:<10}{time.perf_counter() - start:6.1f} s   {words[0]}")
    return found


def widened(guide: AmortizedBernoulliLayers) -> Callable[[Tensor], Tensor]:
    """The guide with half its logits.

    A bound on ln p(y) is paid for proposing what the posterior lacks, not for leaving out what it
    has, so that guides end up too narrow. Weights need the contrary: what is never proposed is
    missing from the average, and no error bar of the draws tells.
    """

    def proposal(y: Tensor) -> Tensor:
        with pyro.plate("data", len(y)):
            logits = WIDTH * guide.encoder(y)
            return pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1))

    return proposal


def show(
    estimates: dict[str, lvppl.LikelihoodEstimate],
    exact: lvppl.LikelihoodEstimate,
    images: Images,
    bits: int,
) -> None:
    """Each image: the exact value, and how far from it each estimate is, with its stated error."""
    print(f"\n{'':<9}{'ln p(y)':>10}   estimate − exact ± its standard error, nats")
    print(f"{'':<9}{'exact':>10}" + "".join(f"{name:>18}" for name in SAMPLED))
    gaps = {name: estimate.compare(exact) for name, estimate in estimates.items()}
    labels = images.labels.tolist() if images.labels is not None else range(len(images))
    for i, label in enumerate(labels):
        row = f"a {label:<7}{float(exact.log_prob[i]):10.2f}"
        for name, gap in gaps.items():
            star = "*" if i in estimates[name].flagged.tolist() else " "
            row += f"{float(gap.difference[i]):+9.2f} ± {float(gap.std_error[i]):4.2f} {star}"
        print(row)
    uniform = estimates["uniform"]
    if uniform.flagged.numel() < exact.num_data:
        return
    medians = {"ess": float(uniform.ess.median()), "error": float(uniform.std_error.median())}
    print(LESSON.format(draws=NUM_DRAWS, share=2**bits / NUM_DRAWS, **medians))


def answers(
    estimates: dict[str, lvppl.LikelihoodEstimate], exact: lvppl.LikelihoodEstimate
) -> list[tuple[str, bool]]:
    gaps = {name: estimate.compare(exact) for name, estimate in estimates.items()}

    def agrees(name: str) -> bool:
        """Wherever k-hat does not flag the estimate."""
        near = gaps[name].difference.abs() <= 5 * gaps[name].std_error
        near[estimates[name].flagged] = True
        return bool(near.all())

    def error(name: str) -> float:
        return float(gaps[name].difference.abs().mean())

    flagged = sum(estimates[name].flagged.numel() for name in ("uniform", "prior"))
    return [
        ("uniform and prior: k-hat flags every image", flagged == 2 * exact.num_data),
        ("uniform and prior: nats away on average", min(map(error, ("uniform", "prior"))) > 1),
        ("guide: within five standard errors where k-hat does not flag it", agrees("guide")),
        ("annealed: within five standard errors where k-hat does not flag it", agrees("annealed")),
        ("annealed: within half a nat on average", error("annealed") < 0.5),
    ]


# ------------------------------------------------------------------------------------- the picture


def picture(
    estimates: dict[str, lvppl.LikelihoodEstimate],
    exact: lvppl.LikelihoodEstimate,
    images: Images,
    costs: dict[str, float],
) -> Figure:
    """Each image in a panel of its own: estimates against evaluations of p(z, y)."""
    figure = Figure(figsize=(11.5, 7.2), layout="constrained")
    panels = figure.subplots(2, NUM_IMAGES // 2, sharex=True, sharey=True).flat
    shown = {"exact": exact.log_prob, "evaluations": costs, "difference": True, "note": False}
    for i, ax in enumerate(panels):
        likelihood_convergence(estimates, ax, datum=i, **shown)
        if i < NUM_IMAGES // 2:
            ax.set_xlabel("")
        if i % 2:
            ax.set_ylabel("")
        corner = ax.inset_axes((1.04, 0.0, 0.22, 0.22))
        corner.imshow(1 - images.images[i], cmap="gray", vmin=0, vmax=1)
        corner.set_xticks([])
        corner.set_yticks([])
    figure.suptitle(
        "ln p(y) of four held-out images. Hollow, hatched: flagged by k-hat, neither value nor "
        "error can be relied on",
        fontsize=SMALL + 1,
        color=INK,
    )
    return figure


if __name__ == "__main__":
    sys.exit(main())

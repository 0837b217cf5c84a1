"""The top half of an image is missing: p(y_observed), a sum over completions, and the completions.

    python examples/missing_half.py [--out runs/missing_half] [--quick] [--seed 0] [--epochs 8]

An autoregressive network (MADE) gives p(y) of a whole image in one pass. Of an image with missing
pixels it does not give p(y_observed), the sum of p(y) over all completions: 2^16 of them where a
block of 4×4 pixels is missing, 2^98 where the top half is. Four ways to that sum:

    exact       every completion, for the block
    uniform     completions from all states alike
    the model   each missing pixel drawn given what comes before it in the model's own order
    a guide     another network that has learnt to complete images: q(y_missing | y_observed), with
                a tenth of the draws from the model, so that no completion is left out

In which order the model takes the pixels makes all the difference to the third. Two networks are
trained, one that begins with the observed pixels, one that begins with the missing ones. In the
first, p(y_observed) is the product of the first conditionals: completions have the right
distribution and weigh all the same. The second draws the missing half before it has seen anything,
and the observed half then fits or does not: the weights vary as a likelihood does.

In a program, the missing pixels are one latent site, so that all ways are estimators of
lvppl.log_likelihood. Writes a picture of the completions, and exits with 1 if a known answer is
missed. MNIST, at half its resolution, is looked for in $LVPPL_DATA and in the cache, and is
downloaded otherwise; without it, and with --quick, the embedded 8×8 digits are taken.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from _answers import verdict
from _options import command_line
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import avg_pool2d
from torch.optim.lr_scheduler import CosineAnnealingLR

import lvppl
from lvppl.distributions import AutoregressivePart
from lvppl.inspection.plots import INK, SMALL
from lvppl.models import MADE

NUM_IMAGES = 6  # of the table, and of the picture
NUM_DRAWS = 1000
NUM_COMPLETIONS = 4  # in the picture, by each way
OBSERVED_FIRST, MISSING_FIRST = "observed first", "missing first"

LESSON = """
Observed pixels first: the model's completions are exact draws, and the sum is a product, without
any error. Missing pixels first: the same kind of network draws them blindly, and few draws carry
the average; a guide that has seen the observed half repairs it. Uniform completions of the top half
are noise: {nats:.0f} nats are missing, and an error bar below one nat knows nothing of it.
"""


def main() -> int:
    options = command_line(
        __doc__,
        out="runs/missing_half",
        quick="short training on the embedded digits",
        epochs=(8, "over MNIST, for each network"),
    )
    start = time.perf_counter()
    train, test = images(embedded=options.quick)
    masks = missing_pixels(train.shape[1])
    # the embedded digits are few: as many steps take more epochs
    epochs = options.epochs if len(train) > 10_000 else 10 * options.epochs
    networks = Networks.fitted(train, masks, epochs, options.seed)
    print(f"{networks.words(test)}, in {time.perf_counter() - start:.0f} s\n")

    y = test[:NUM_IMAGES]
    answers = []
    print(f"ln p(y_observed), nats per image; {NUM_IMAGES} held-out images, {NUM_DRAWS:,} draws")
    head = f"{'mean':>9}{'± s.e.':>8}{'from exact':>12}{'effective':>11}{'k-hat':>8}{'flagged':>9}"
    print(f"{'missing':<14}{'order':<16}{'completions':<12}{head}")
    for what, missing in masks.items():
        for order, model in networks.models.items():
            found = measure(networks, model, what, missing, y, seed=options.seed + 1)
            product = first_conditionals(model, y, missing) if order == OBSERVED_FIRST else None
            exact = found["exact"].log_prob if "exact" in found else product
            for way, estimate in found.items():
                row(what, order, way, estimate, exact)
            if product is not None:
                answers += answers_of_the_product(what, found, product)
            if exact is not None:
                answers.append(answer_of_the_guide(f"{what}, {order}", found["a guide"], exact))
    nats = found["a guide"].mean - found["uniform"].mean
    hopeless = nats > 5 and found["uniform"].flagged.numel() == NUM_IMAGES
    answers.append(("the top half: uniform is flagged, and at least five nats low", hopeless))
    print(LESSON.format(nats=nats))

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "missing_half.png"
    picture(networks, y, masks["the top half"], options.seed).savefig(path, dpi=100)
    print(f"written to {path}, in {time.perf_counter() - start:.0f} s altogether")
    return verdict(answers)


# ----------------------------------------------------------------------------------------- the data


def images(*, embedded: bool) -> tuple[Tensor, Tensor]:
    """Zeros and ones: MNIST, averaged to 14×14 and cut at a half; or the embedded 8×8 digits."""
    if not embedded:
        try:
            parts = [lvppl.data.mnist(binarize=None, split=s).images for s in ("train", "test")]
            train, test = ((avg_pool2d(x[:, None], 2)[:, 0] > 0.5).float() for x in parts)
            return train, test
        except lvppl.ProgramError as error:
            print(f"the embedded 8×8 digits in place of MNIST: {error}\n")
    digits = lvppl.data.digits()
    return digits.train.images.round(), digits.test.images.round()


def missing_pixels(side: int) -> dict[str, Tensor]:
    """Masks, true where a pixel is missing: a block of the top half, and the top half."""
    block, top = torch.zeros(2, side, side, dtype=torch.bool)
    top[: side // 2] = True
    left = side // 2 - 2
    block[side // 4 : side // 2, left : left + 4] = True
    return {"a block": block, "the top half": top}


# ------------------------------------------------------------------------------------- the programs


def with_missing(model: MADE, missing: Tensor) -> Callable[[Tensor], None]:
    """p(y) as a program whose missing pixels are latent: its evidence is p(y_observed)."""

    def program(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            part = AutoregressivePart(model.distribution(), y, missing)
            z = pyro.sample("missing", part)
            rest = AutoregressivePart(model.distribution(), part.filled(z), ~missing)
            pyro.sample("y", rest, obs=y[..., ~missing])

    return program


def completing(network: MADE, missing: Tensor) -> Callable[[Tensor], None]:
    """q(y_missing | y_observed), by a network that reads the observed pixels."""

    def guide(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            pyro.sample("missing", network.distribution(y[..., ~missing]))

    return guide


@dataclass(frozen=True)
class Networks:
    """Two models of whole images by their order, and a guide for each mask."""

    models: dict[str, MADE]
    guides: dict[str, MADE]

    @classmethod
    def fitted(cls, train: Tensor, masks: dict[str, Tensor], epochs: int, seed: int) -> Networks:
        """Maximum likelihood on the training images, all of them complete."""
        width = 500 if train.shape[1] > 8 else 200
        torch.manual_seed(seed)
        # both masks are the beginning of one order, and the end of its reverse
        first, whole = masks.values()
        pixels = torch.arange(first.numel()).reshape(first.shape)
        parts = pixels[first], pixels[whole & ~first], pixels[~whole]
        missing_first = torch.cat(parts).tolist()
        models, guides = {}, {}
        for name, order in (
            (OBSERVED_FIRST, missing_first[::-1]),
            (MISSING_FIRST, missing_first),
        ):
            made = MADE(y_shape=first.shape, hidden_dims=(width,), direct=True, order=order)
            models[name] = fitted(made, (train,), epochs, seed)
        for name, missing in masks.items():
            size, others = int(missing.sum()), int((~missing).sum())
            made = MADE(y_shape=(size,), num_inputs=others, hidden_dims=(width,), direct=True)
            data = train[:, missing], train[:, ~missing]
            # not to the end: a proposal should be wide, and the sharper it is the more it misses
            guides[name] = fitted(made, data, max(1, epochs // 2), seed)
        return cls(models, guides)

    def words(self, test: Tensor) -> str:
        with torch.no_grad():
            nats = {k: float(m.log_evidence(test).mean()) for k, m in self.models.items()}
        named = ", ".join(f"{name}: {value:.2f}" for name, value in nats.items())
        return f"two models of whole images (held out, nats per image: {named}) and two guides"


def fitted(network: MADE, data: tuple[Tensor, ...], epochs: int, seed: int) -> MADE:
    """There is no latent, so that the ELBO is ln p(y)."""
    svi = lvppl.SVI(
        network,
        lambda *data: None,
        learning_rate=3e-3,
        scheduler=lambda optimizer: CosineAnnealingLR(optimizer, epochs),
    )
    svi.fit(*data, num_epochs=epochs, batch_size=100, seed=seed, progress=False)
    return network.requires_grad_(False)


# ------------------------------------------------------------------------------------ the estimates


def measure(
    networks: Networks, model: MADE, what: str, missing: Tensor, y: Tensor, seed: int
) -> dict[str, lvppl.LikelihoodEstimate]:
    """ln p(y_observed) by each way; by all completions where they are few enough."""
    ways = {"uniform": "uniform", "the model": "prior", "a guide": "importance"}
    if int(missing.sum()) <= 20:
        ways = {"exact": "exact", **ways}
    program, guide = with_missing(model, missing), completing(networks.guides[what], missing)
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table shows k-hat
        for number, (way, estimator) in enumerate(ways.items()):
            found[way] = lvppl.log_likelihood(
                program,
                y,
                guide=guide,
                estimator=estimator,
                num_samples=NUM_DRAWS,
                defensive=0.1 if way == "a guide" else 0.0,
                seed=seed + number,
            )
    return found


def first_conditionals(model: MADE, y: Tensor, missing: Tensor) -> Tensor:
    """The product of the conditionals of the observed pixels, which is p(y_observed) where they
    come first."""
    by_pixel = model.distribution().element_log_prob(y)
    return by_pixel[..., ~missing].double().sum(-1)


def row(
    what: str, order: str, way: str, estimate: lvppl.LikelihoodEstimate, exact: Tensor | None
) -> None:
    line = f"{what:<14}{order:<16}{way:<12}"
    gap = "–"
    if exact is not None and way != "exact":
        gap = f"{float((estimate.log_prob - exact).abs().mean()):.3f}"
    line += f"{estimate.mean:9.2f}{estimate.mean_std_error:8.2f}{gap:>12}"
    if way != "exact":
        median, worst = float(estimate.ess.median()), float(estimate.khat.max())
        shape = "equal" if worst == -torch.inf else f"{worst:.2f}"
        line += f"{median:11.1f}{shape:>8}{estimate.flagged.numel():7} of {estimate.num_data}"
    print(line, flush=True)


def answers_of_the_product(
    what: str, found: dict[str, lvppl.LikelihoodEstimate], product: Tensor
) -> list[tuple[str, bool]]:
    """Observed pixels first: the first conditionals are the sum over completions."""
    model = found["the model"]
    off = float((model.log_prob - product).abs().max())
    answers = [
        (
            f"{what}, observed first: the model's weights are all equal, and are the product",
            off < 1e-3 and float(model.std_error.max()) < 1e-3,
        )
    ]
    if "exact" in found:
        gap = float((found["exact"].log_prob - product).abs().max())
        answers.append((f"{what}, observed first: the product is the sum over all", gap < 1e-3))
    return answers


def answer_of_the_guide(
    where: str, guide: lvppl.LikelihoodEstimate, exact: Tensor
) -> tuple[str, bool]:
    off = (guide.log_prob - exact).abs()
    near = off <= 5 * guide.std_error
    near[guide.flagged] = True
    return (
        f"{where}: the guide within five standard errors, and half a nat on average",
        bool(near.all()) and float(off.mean()) < 0.5,
    )


# -------------------------------------------------------------------------------------- the picture


def picture(networks: Networks, y: Tensor, missing: Tensor, seed: int) -> Figure:
    """Each image, what was observed of it, and completions by four ways; observed pixels in black,
    completed ones in blue."""
    torch.manual_seed(seed)
    n = (NUM_COMPLETIONS,)
    parts = {
        order: AutoregressivePart(model.distribution(), y, missing)
        for order, model in networks.models.items()
    }
    draws = {
        f"the model, {OBSERVED_FIRST}": parts[OBSERVED_FIRST].sample(n),
        "a guide": networks.guides["the top half"].distribution(y[..., ~missing]).sample(n),
        f"the model, {MISSING_FIRST}": parts[MISSING_FIRST].sample(n),
        "uniform": torch.randint(2, (*n, len(y), int(missing.sum()))).to(y),
    }
    figure = Figure(figsize=(11.0, 0.58 * len(y) + 0.6), layout="constrained")
    ax = figure.add_subplot()
    side, gap = y.shape[1], 2
    step, x = side + gap, 0
    columns: list[tuple[str, list[Tensor]]] = [("image", [y]), ("observed", [y])]
    columns += [(name, list(parts[OBSERVED_FIRST].filled(z))) for name, z in draws.items()]
    for number, (name, shown) in enumerate(columns):
        for whole in shown:
            for line, image in enumerate(whole):
                tile = coloured(image, missing, number)
                extent = (x, x + side, (line + 1) * step - gap, line * step)
                ax.imshow(tile, extent=extent, interpolation="nearest")
            x += step
        middle = x - gap / 2 - len(shown) * step / 2
        ax.text(middle, -2, name, ha="center", va="bottom", fontsize=SMALL, color=INK)
        x += side // 3
    ax.set_xlim(-1, x)
    ax.set_ylim(len(y) * step, -side / 2)
    ax.set_aspect("equal")
    ax.set_axis_off()
    return figure


def coloured(image: Tensor, missing: Tensor, column: int) -> Tensor:
    """(side, side, 3): ink on paper; missing pixels grey in the second column, blue after it."""
    paper, ink = torch.ones(3), torch.full((3,), 0.1)
    tile = torch.where(image[..., None] > 0.5, ink, paper)
    if column == 1:
        return torch.where(missing[..., None], torch.full((3,), 0.8), tile)
    if column > 1:
        blue, pale = torch.tensor([0.0, 0.45, 0.7]), torch.tensor([0.91, 0.94, 0.97])
        return torch.where(
            missing[..., None], torch.where(image[..., None] > 0.5, blue, pale), tile
        )
    return tile


if __name__ == "__main__":
    sys.exit(main())

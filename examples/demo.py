"""The first real run: a VAE on handwritten digits, and ln p(y) measured in every way.

    make demo            or            python examples/demo.py [--out runs/demo] [--quick]

Trains a variational autoencoder on the embedded 8×8 digits by the ELBO, measures ln p(y) on
held-out digits by the naive average over the prior and by importance sampling from the guide, fits
probabilistic PCA, where ln p(y) is known exactly, and checks the one identity

    ln p(y) = ELBO + KL(q(z | y), p(z | y)).

Writes the fit, ``posterior.nc`` for ArviZ, and pictures. Exits with 1 if a known answer is missed.
"""

from __future__ import annotations

import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _answers import verdict
from _options import command_line
from matplotlib.figure import Figure
from pyro import poutine
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

import lvppl
from lvppl.guides import AmortizedNormal, ConvEncoder
from lvppl.inspection import plots
from lvppl.models import VAE, BetaBinomialLikelihood, ConvDecoder, ProbabilisticPCA

LATENT_DIM = 10

LESSON = """
The naive average draws z from the prior. Hardly any draw explains a given digit: one or
two carry the whole sum, it falls far below, and its own error bar cannot be trusted. The
encoder proposes the right z, and with as many draws the estimate lies above the ELBO, as
it must. A Pareto k-hat above {threshold:.2f} says that an estimate still rests on its largest
weights: more draws would raise it.
"""


def main() -> int:
    options = command_line(__doc__, out="runs/demo", quick="a short training", seed=None)
    start = time.perf_counter()
    digits = lvppl.data.digits()
    train, test = (part.grey().float() for part in (digits.train, digits.test))
    print(f"{len(train)} digits to fit, {len(test)} held out; 8×8 pixels, 17 grey levels\n")

    fit = fit_vae(train, epochs=20 if options.quick else 40)
    answers, estimates = measure_vae(fit, test, num_samples=200 if options.quick else 1000)
    answers += check_identity(train / 16, test / 16, epochs=10 if options.quick else 60)

    write(fit, test, digits.test.labels, estimates, folder=options.out)
    print(f"\nwritten to {options.out}/ in {time.perf_counter() - start:.0f} s altogether:")
    for path in sorted(options.out.iterdir()):
        print(f"  {path.name}")
    return verdict(answers)


# ------------------------------------------------------------------------------------- the VAE


def fit_vae(train: Tensor, *, epochs: int) -> lvppl.Fit:
    """z ~ N(0, I), y | z ~ BetaBinomial(16, decoder(z)) by pixel; an encoder as the guide."""
    torch.manual_seed(0)  # the networks' initial weights
    model = VAE(
        latent_dim=LATENT_DIM,
        x_shape=(8, 8),
        likelihood=BetaBinomialLikelihood,
        decoder=ConvDecoder,
    )
    encoder = partial(ConvEncoder, input_scale=16.0)
    guide = AmortizedNormal(latent_dim=LATENT_DIM, x_shape=(8, 8), encoder=encoder)
    print(lvppl.check(model, guide, train), "\n")
    svi = lvppl.SVI(model, guide, objective=lvppl.ELBO(), learning_rate=2e-3)
    fit = svi.fit(train, num_epochs=epochs, batch_size=100, seed=1)
    print(f"\n{fit!r}\n")
    return fit


def measure_vae(
    fit: lvppl.Fit, test: Tensor, *, num_samples: int
) -> tuple[list[tuple[str, bool]], dict[str, lvppl.LikelihoodEstimate]]:
    """The ELBO in both its forms, and ln p(y) by two estimators, on held-out digits."""
    with fit.active():
        reports = {}
        for form in ("kl", "entropy"):
            torch.manual_seed(2)
            objective = lvppl.ELBO(form=form, num_particles=100)
            reports[form] = objective.report(fit.model, fit.guide, test)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the table below shows k-hat
        estimates = {
            name: fit.log_likelihood(test, estimator=name, num_samples=num_samples, seed=3)
            for name in ("naive", "importance")
        }
    naive, importance = estimates["naive"], estimates["importance"]

    kl = reports["kl"]
    print(f"held-out digits, nats per digit ({num_samples:,} draws for an estimate)")
    print(f"  {'':<28}{'mean':>9}{'s.e. of one digit':>20}{'effective draws':>18}{'k-hat':>8}")
    row("rate", kl.rate.per_datum)
    row("distortion", kl.distortion.per_datum)
    row("ELBO, −distortion − rate", kl.elbo.per_datum)
    row("ELBO, E ln p(z, y) + H(q)", reports["entropy"].elbo.per_datum)
    for name, estimate in estimates.items():
        medians = (float(x.median()) for x in (estimate.std_error, estimate.ess, estimate.khat))
        row(f"ln p(y), {name}", estimate.log_prob, "{:20.2f}{:18.1f}{:8.2f}".format(*medians))
    print(LESSON.format(threshold=importance.khat_threshold))
    elbo = kl.elbo.per_datum.mean()
    difference = (reports["entropy"].elbo.per_datum - kl.elbo.per_datum).mean().abs()
    answers = [
        ("both forms of the ELBO agree within 0.2 nats", bool(difference < 0.2)),
        ("importance estimate above the ELBO", bool(importance.mean > elbo)),
        ("naive estimate at least 4 nats below it", bool(naive.mean < importance.mean - 4)),
    ]
    return answers, {"elbo": elbo, **estimates}


def row(name: str, per_datum: Tensor, more: str = "") -> None:
    print(f"  {name:<28}{float(per_datum.mean()):9.2f}{more}")


# ------------------------------------------------------------------------- the identity, exactly


def check_identity(train: Tensor, test: Tensor, *, epochs: int) -> list[tuple[str, bool]]:
    """Probabilistic PCA: ln p(y) is algebra, so ELBO + KL can be held against it."""
    train, test = train.flatten(1), test.flatten(1)
    model = ProbabilisticPCA.from_data(train, LATENT_DIM)  # the maximum of the likelihood
    torch.manual_seed(0)
    guide = AmortizedNormal(latent_dim=LATENT_DIM, x_shape=(64,))
    fixed = poutine.block(model, hide_types=["param"])  # only the guide is fitted
    svi = lvppl.SVI(fixed, guide, learning_rate=2e-3)

    print("probabilistic PCA on the same digits, nats per digit")
    print(f"  {'guide':<16}{'ELBO':>10}{'± s.e.':>9}{'+ KL':>9}{'= sum':>10}{'ln p(y)':>10}")
    answers = []
    for num_epochs in (1, epochs):
        fit = svi.fit(train, num_epochs=num_epochs, batch_size=100, seed=1, progress=False)
        with fit.active(), torch.no_grad():
            draws = lvppl.trace_terms(model, guide, (test,), num_particles=2000).elbo("kl").double()
            q, exact_posterior = guide.posterior(test), model.posterior(test)
            dense = MultivariateNormal(q.mean, torch.diag_embed(q.variance))
            kl = float(kl_divergence(dense, exact_posterior).double().mean())
            exact = float(model.log_evidence(test).double().mean())
        elbo, error = float(draws.mean()), float(draws.mean(1).std()) / len(draws) ** 0.5
        name = f"{num_epochs} epoch{'s' if num_epochs > 1 else ''}"
        print(f"  {name:<16}{elbo:10.3f}{error:9.3f}{kl:9.3f}{elbo + kl:10.3f}{exact:10.3f}")
        holds = abs(elbo + kl - exact) < 5 * error + 1e-3
        answers.append((f"ELBO + KL = ln p(y) within five standard errors, {name}", holds))
    return answers


# ------------------------------------------------------------------------------------ what is kept


def write(
    fit: lvppl.Fit, test: Tensor, labels: Tensor, estimates: dict[str, Any], *, folder: Path
) -> None:
    """The fit, its posterior for ArviZ, and the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    fit.save(folder / "fit")
    fit.to_arviz(test[:100], num_samples=200, seed=4).to_netcdf(folder / "posterior.nc")

    elbo = estimates.pop("elbo")
    save(plots.likelihood_comparison(estimates, elbo=elbo).figure, folder / "likelihood.png")
    shown = test[:12]
    save(plots.training_curve(fit).figure, folder / "training.png")
    means = fit.reconstruct(shown, num_samples=20, seed=5)["x"]
    save(
        plots.reconstructions(shown, means, value_range=(0, 16)).figure,
        folder / "reconstructions.png",
    )
    prior = fit.sample(test[:40], seed=6).predictive_mean["x"][0]
    save(
        plots.image_grid(prior, num_columns=10, value_range=(0, 16)).figure, folder / "samples.png"
    )
    posterior = fit.posterior(test, num_samples=50, seed=7)
    plane = plots.latent_plane(posterior.mean("z"), labels=labels, stds=posterior.std("z"))
    save(plane.figure, folder / "latent_plane.png")


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())

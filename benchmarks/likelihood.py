"""ln p(y): importance estimates beside Pyro's vectorized_importance_weights, and exact sums.

    python benchmarks/likelihood.py [--images 50] [--draws 5000] [--rounds 5] [--sums-only]

The case of the IWAE paper: 5,000 draws for each of the 10,000 test images of MNIST under the
one-layer model, 784-200-200-50 with tanh units. By default some images with all their draws: the
work is the same for each, so that 10,000 take 10,000 / images times as long (``--images 10000``).
Without the files of MNIST, enlarged digits take their place. The weights of the model are those of
a fit of two epochs: no time depends on more.

Pyro's weights are sums over a batch. Values by datum are had in two ways: one datum at a time, or
the data among the particles, of a program without a data plate. With 5,000 draws a datum fills a
chunk by itself, so that neither wastes anything; the chunk's size is tried out. *In lvppl's
products* are Pyro's passes with the linear layers done as lvppl does them (``lvppl.layers``),
which shows what the rest brings. Memory is the peak of a process of its own above what it held
before the estimate, with an allocator that gives arrays back as soon as they are freed.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from _timing import machine, medians, table
from pyro.infer.importance import vectorized_importance_weights
from torch import Tensor
from torch.nn.functional import linear, softplus

import lvppl
from lvppl.guides import AmortizedGaussianLayers
from lvppl.layers import FastLayers
from lvppl.models import GaussianLayers, SigmoidBeliefNet

CHUNKS = (500, 1000, 2500)
RETURNS_MEMORY = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # of arrays, once they are freed
TOGETHER = 5  # data among the particles of one pass


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sums-only", action="store_true", help="the exact sums alone")
    parser.add_argument("--memory", help=argparse.SUPPRESS)  # one contestant, in this process
    options = parser.parse_args()
    pyro.enable_validation(False)
    warnings.simplefilter("ignore", UserWarning)  # k-hat of a short training
    if options.memory:
        print(peak_of(options.memory, options.images, options.draws))
        return
    print(machine(), "\n")
    if not options.sums_only:
        importance(options)
    exact_sums(options.rounds)


# ---------------------------------------------------------------------------- importance estimates


def images() -> tuple[Tensor, Tensor, str]:
    """Binarized training and test images, (data, 784), and where they come from."""
    try:
        train, test = (lvppl.data.mnist(split=s, binarize="static") for s in ("train", "test"))
        return train.images[:10_000].flatten(1), test.images.flatten(1), "MNIST"
    except lvppl.ProgramError:
        digits = lvppl.data.digits()
        small = torch.cat([digits.train.images, digits.test.images])[:, None]
        large = torch.nn.functional.interpolate(small, size=(28, 28)).flatten(1).round()
        return large, large.repeat(6, 1)[:10_000], "enlarged digits"


class Case:
    """A fitted model and guide, test images, and every way to estimate their ln p(y)."""

    def __init__(self, num_images: int, num_draws: int, *, fitted: bool = True) -> None:
        torch.manual_seed(0)
        bits = torch.randint(2, (num_images, 784)).float()
        train, test, self.source = images() if fitted else (bits, bits, "random bits")
        self.y, self.num_draws = test[:num_images], num_draws
        self.model, self.guide = GaussianLayers(mean=train.mean(0)), AmortizedGaussianLayers()
        if fitted:
            fit = lvppl.SVI(self.model, self.guide)
            fit.fit(train, num_epochs=2, batch_size=100, seed=0, progress=False)

    def lvppl(self) -> Tensor:
        found = lvppl.log_likelihood(
            self.model, self.y, guide=self.guide, num_samples=self.num_draws, seed=1
        )
        return found.log_prob

    @torch.no_grad()
    def one_by_one(self, size: int, *, fast: bool = False) -> Tensor:
        """One datum at a time, its draws in chunks."""
        with FastLayers() if fast else nullcontext():
            return torch.stack([self._one(datum[None], size) for datum in self.y])

    def _one(self, datum: Tensor, size: int) -> Tensor:
        total = datum.new_tensor(-math.inf)
        for first in range(0, self.num_draws, size):
            log_weights, _, _ = vectorized_importance_weights(
                self.model,
                self.guide,
                datum,
                num_samples=min(size, self.num_draws - first),
                max_plate_nesting=1,
                normalized=False,
            )
            total = torch.logaddexp(total, log_weights.logsumexp(0))
        return total - math.log(self.num_draws)

    @torch.no_grad()
    def among_particles(self, size: int) -> Tensor:
        """Several data a pass, each draw of each datum a particle of a program without a plate."""
        return torch.cat([self._several(data, size) for data in self.y.split(TOGETHER)])

    def _several(self, data: Tensor, size: int) -> Tensor:
        draws = max(1, size // len(data))
        total = data.new_full((len(data),), -math.inf)
        for first in range(0, self.num_draws, draws):
            number = min(draws, self.num_draws - first)

            def model(y: Tensor, number: int = number) -> None:
                prior = dist.Normal(self.model.prior_loc, torch.ones_like(self.model.prior_loc))
                z = pyro.sample("z", prior.to_event(1))
                pyro.sample("y", self.model.decode(z), obs=y.repeat(number, 1))

            def guide(y: Tensor, number: int = number) -> None:
                q = self.guide.posterior(y).base_dist  # once a datum, not once a particle
                loc, scale = (x.repeat(number, 1) for x in (q.loc, q.scale))
                pyro.sample("z", dist.Normal(loc, scale).to_event(1))

            log_weights, _, _ = vectorized_importance_weights(
                model,
                guide,
                data,
                num_samples=number * len(data),
                max_plate_nesting=0,
                normalized=False,
            )
            log_weights = log_weights.reshape(number, len(data)).logsumexp(0)
            total = torch.logaddexp(total, log_weights)
        return total - math.log(self.num_draws)

    def products(self, fast: bool, rows: int = 2500) -> None:
        """The decoder's matrix products alone, as many as an estimate needs."""
        layers = [layer for layer in self.model.decoder if isinstance(layer, torch.nn.Linear)]
        z = torch.randn(rows, layers[0].in_features)
        with torch.no_grad(), FastLayers() if fast else nullcontext():
            for _ in range(-(-len(self.y) * self.num_draws // rows)):
                x = z
                for layer in layers:
                    x = linear(x, layer.weight, layer.bias)

    @property
    def flop(self) -> float:
        """Floating-point operations of the decoder's products."""
        layers = [layer for layer in self.model.decoder if isinstance(layer, torch.nn.Linear)]
        each = sum(2 * layer.weight.numel() for layer in layers)
        return float(each * len(self.y) * self.num_draws)

    @property
    def contestants(self) -> dict[str, Callable[[], object]]:
        calls: dict[str, Callable[[], object]] = {
            f"Pyro, a datum at a time, {size} draws": partial(self.one_by_one, size)
            for size in CHUNKS
        }
        calls[f"Pyro, {TOGETHER} data among 1000 particles"] = partial(self.among_particles, 1000)
        return calls | {"lvppl": self.lvppl}


def importance(options: argparse.Namespace) -> None:
    case = Case(options.images, options.draws)
    means = [float(f().mean()) for f in (case.lvppl, partial(case.one_by_one, 1000))]
    print(f"nats per datum: lvppl {means[0]:.2f}, Pyro {means[1]:.2f}\n")
    calls = case.contestants
    calls["Pyro, 1000 draws, in lvppl's layers"] = partial(case.one_by_one, 1000, fast=True)
    calls["the decoder's matrix products, torch's own"] = partial(case.products, False)
    calls["the decoder's matrix products, lvppl's"] = partial(case.products, True)
    times = medians(calls, rounds=options.rounds, seconds=0.5)
    best = min(list(times)[: len(CHUNKS) + 1], key=times.__getitem__)
    print(table(f"{case.source}: {options.images} images × {options.draws:,} draws", times,
                against=best, unit="s"))  # fmt: skip
    limit = times["the decoder's matrix products, lvppl's"]
    print(
        f"\nlvppl is {times[best] / times['lvppl']:.2f} times as fast as the best of Pyro. The "
        f"decoder is {case.flop / 1e9:.0f} GFLOP, for which products alone take {limit:.3g} s "
        f"({case.flop / limit / 1e9:.0f} GFLOP/s): lvppl reaches {limit / times['lvppl']:.0%} of "
        f"that limit, the best of Pyro {limit / times[best]:.0%}.\n"
    )
    print("| memory of an estimate | MiB |\n|---|---|")
    for name in case.contestants:
        command = [sys.executable, __file__, "--memory", name]
        sizes = ["--images", str(min(options.images, 20)), "--draws", str(options.draws)]
        found = subprocess.run(
            [*command, *sizes], capture_output=True, text=True, check=True, env=RETURNS_MEMORY
        )
        print(f"| {name} | {float(found.stdout):.0f} |")
    print()


def peak_of(name: str, num_images: int, num_draws: int) -> float:
    """Peak of the resident memory of a call above what was held before, MiB."""
    case = Case(num_images, num_draws, fitted=False)
    case.contestants[name]()  # what every first call holds for good
    give_back()
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # the peak starts anew
    before = held(status, "VmRSS")
    case.contestants[name]()
    return held(status, "VmHWM") - before


def give_back() -> None:
    """Free memory that the allocator keeps goes back to the system, where there is a way."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library than glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def held(status: Path, what: str) -> float:
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith(what))
        return float(line.split()[1]) / 1024
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# -------------------------------------------------------------------------------------- exact sums


def exact_sums(rounds: int) -> None:
    """Two models of bits whose every state is summed."""
    torch.manual_seed(0)
    product, stream, plain = product_rate(), stream_rate(), softplus_seconds()
    print(
        f"limits in float64: products {product / 1e9:.0f} GFLOP/s, multiply-adds in the cache "
        f"{stream / 1e9:.1f} G/s; a softplus by itself takes {plain * 1e9:.1f} ns\n"
    )
    print("| exact sum | seconds | terms/s | visibles/s | of the limit of products |")
    print("|---|---|---|---|---|")
    for name, n, model, y, flop in (linear_gaussian(30, 784), belief_net(20, 784)):
        call = partial(lvppl.log_likelihood, model, y, estimator="exact", seed=0)
        seconds = medians({name: call}, rounds=rounds, seconds=0.0)[name]
        print(
            f"| {name}, 2^{n} states | {seconds:.3g} | {2**n / seconds:.3g} | "
            f"{2**n * y.shape[1] / seconds:.3g} | {flop / product / seconds:.0%} |"
        )
    print(
        f"\nThe belief net's 2^20 × 784 softplus, one by one, would take {2**20 * 784 * plain:.1f} "
        f"s, and as products of (1 + uv) at the rate of multiply-adds "
        f"{2 * 2**20 * 784 / stream:.2g} s."
    )


def linear_gaussian(n: int, num_visibles: int) -> tuple[str, int, Callable[..., None], Tensor, int]:
    weight = torch.randn(n, num_visibles, dtype=torch.float64) / n**0.5
    on = torch.full((n,), 0.3, dtype=torch.float64)

    def model(y: Tensor) -> None:
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(on).to_event(1))
            pyro.sample("y", dist.Normal(z @ weight, 1.0).to_event(1), obs=y)

    y = torch.randn(1, num_visibles, dtype=torch.float64)
    return f"linear-Gaussian decoder, {num_visibles} visibles", n, model, y, 2 * 2**n


def belief_net(n: int, num_visibles: int) -> tuple[str, int, Callable[..., None], Tensor, int]:
    model = SigmoidBeliefNet(latent_dims=(n,), y_shape=(num_visibles,)).double()
    y = torch.randint(2, (1, num_visibles)).double()
    # four visibles make one entry of a product over 16 subsets
    return f"sigmoid belief net, {num_visibles} visibles", n, model, y, 2**n * num_visibles * 8


def rate_of(call: Callable[[], object], work: float, seconds: float = 1.0) -> float:
    """Work a second of the best of several calls."""
    call()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return work / best


def product_rate(size: int = 1024) -> float:
    a = torch.randn(size, size, dtype=torch.float64)
    out = torch.empty_like(a)
    return rate_of(lambda: torch.mm(a, a, out=out), 2 * size**3)


def stream_rate(size: int = 2**15) -> float:
    a, b = torch.rand(2, size, dtype=torch.float64).mul(1e-9)
    product = torch.ones_like(a)
    return rate_of(lambda: product.addcmul_(a, b), size)


def softplus_seconds(size: int = 2**16) -> float:
    x = torch.randn(size, dtype=torch.float64)
    return 1 / rate_of(lambda: softplus(x), size)


if __name__ == "__main__":
    main()

"""Programs that need more memory than there is: smaller passes, same numbers."""

import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch

from lvppl.errors import ProgramError, ProgramFailure
from lvppl.inference.likelihood import log_likelihood
from lvppl.inference.likelihood.memory import PassSize, attempt, ran_out

pytestmark = pytest.mark.filterwarnings("error")

DATA = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
CPU_WORDS = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 80000000000 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = {
    "cpu": lambda: RuntimeError(CPU_WORDS),
    "cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "numpy": lambda: MemoryError("Unable to allocate 7.45 GiB for an array"),
}


def program_with(limit, error=ERRORS["cpu"], sizes=None, plate=None):
    """z, y | z ~ N(z, 1); more than ``limit`` elements of z do not fit."""

    def model(y):
        with pyro.plate("data", plate or len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).to(y), 1.0))
            if z.numel() > limit:
                raise error()
            if sizes is not None:
                sizes.append(tuple(z.shape))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[:, 0])

    return model


def guide(y):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(y[:, 0] / 2, 0.9))


OPTIONS = {"num_samples": 60, "seed": 3}


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("limit", [2000, 300, 25, 1])
def test_passes_are_halved_and_the_numbers_stay(limit, kind):
    plenty = log_likelihood(program_with(10**9), DATA, estimator="prior", **OPTIONS)
    model = program_with(limit, ERRORS[kind])
    found = log_likelihood(model, DATA, estimator="prior", **OPTIONS)
    torch.testing.assert_close(found.log_prob, plenty.log_prob, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.std_error, plenty.std_error, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.khat, plenty.khat, rtol=1e-6, atol=1e-8)
    assert plenty.notes == ()
    if limit > 40:  # 40 rows are 40 draws of one particle: there it is the probe that is halved
        assert any("memory ran out" in note for note in found.notes)
        assert "memory ran out" in found.summary()


def test_sizes_that_were_asked_for_are_halved_too():
    sizes = []
    model = program_with(100, sizes=sizes)
    found = log_likelihood(
        model, DATA, guide=guide, batch_size=20, sample_chunk=60, bootstrap=10, **OPTIONS
    )
    plenty = log_likelihood(program_with(10**9), DATA, guide=guide, bootstrap=10, **OPTIONS)
    torch.testing.assert_close(found.replicates, plenty.replicates, rtol=0, atol=1e-10)
    assert max(torch.Size(shape).numel() for shape in sizes) <= 100
    # 60, 30, 15, 7, 3 draws of 20 rows: it stops at the first that fits
    assert found.notes == ("memory ran out: passes were cut to 20 rows and 3 draws of each",)


def test_mixtures_are_halved_too():
    options = {"guide": guide, "defensive": 0.3, **OPTIONS}
    found = log_likelihood(program_with(100), DATA, **options)
    plenty = log_likelihood(program_with(10**9), DATA, **options)
    torch.testing.assert_close(found.log_prob, plenty.log_prob, rtol=0, atol=1e-12)


def test_memory_too_small_for_one_datum():
    for options in ({"estimator": "prior"}, {"guide": guide}):
        with pytest.raises(ProgramError, match="too small for one datum"):
            log_likelihood(program_with(0), DATA, **options, **OPTIONS)


def test_memory_too_small_for_data_that_cannot_be_cut():
    def global_model(y):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(()).to(y), 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mu, 1.0))
            if z.numel() > 30:
                raise ERRORS["cpu"]()
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[:, 0])

    with pytest.raises(ProgramError, match="cannot be cut: no plate is common"):
        log_likelihood(global_model, DATA, estimator="prior", **OPTIONS)
    found = log_likelihood(global_model, DATA[:30], estimator="prior", **OPTIONS)
    assert found.num_data == 1 and found.log_prob.isfinite().all()


def test_what_is_a_lack_of_memory():
    assert all(ran_out(error()) for error in ERRORS.values())
    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    assert ran_out(real.value)
    chained = ProgramFailure("The model fails after site 'z'")
    chained.__cause__ = ERRORS["cpu"]()
    assert ran_out(chained)
    assert not ran_out(RuntimeError("shapes do not match"))
    assert not ran_out(ValueError("out of memory"))  # of no allocator
    assert attempt(lambda: 3) == 3
    with pytest.raises(RuntimeError, match="shapes"):
        attempt(misshapen)


def misshapen():
    raise RuntimeError("shapes do not match")


def test_nothing_of_a_failed_pass_is_held():
    references = []

    def pass_of_much():
        tensor = torch.zeros(1000)
        references.append(weakref.ref(tensor))
        raise ERRORS["cpu"]()

    assert attempt(pass_of_much) is None
    assert references[0]() is None


def test_halving_ends_at_one():
    size = PassSize(rows=5, draws=3)
    seen = []
    with pytest.raises(ProgramError, match="one datum"):
        while True:
            seen.append((size.rows, size.draws))
            size.halve()
    assert seen == [(5, 3), (5, 1), (3, 1), (2, 1), (1, 1)]
    assert size.note.endswith("1 row and 1 draw of each")
    with pytest.raises(ProgramError, match="cannot be cut: fixed"):
        PassSize(rows=5, draws=1, whole="fixed.").halve()

"""Minibatches: every datum once an epoch, uniformly, and exactly repeatable."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from lvppl.data import Minibatches
from lvppl.errors import ProgramError


@pytest.mark.parametrize(
    ("num_data", "batch_size", "sizes"),
    [(10, 4, [4, 4, 2]), (8, 4, [4, 4]), (3, 7, [3]), (5, None, [5]), (4, 1, [1] * 4)],
)
def test_an_epoch_visits_every_datum_once(
    num_data: int, batch_size: int | None, sizes: list[int]
) -> None:
    batches = Minibatches(num_data, batch_size)
    epoch = list(batches)
    assert [len(index) for index in epoch] == sizes
    assert len(batches) == len(sizes)
    assert torch.cat(epoch).sort().values.tolist() == list(range(num_data))
    assert all(index.dtype == torch.int64 for index in epoch)


def test_every_order_is_equally_likely() -> None:
    """24 orders, 4,800 epochs: each count within 5 standard deviations of 200 (24 x 6e-7)."""
    generator = torch.Generator().manual_seed(0)
    batches = Minibatches(4, 3, generator=generator)
    counts = Counter(tuple(torch.cat(list(batches)).tolist()) for _ in range(4800))
    assert set(counts) == set(itertools.permutations(range(4)))
    assert all(abs(n - 200) < 5 * (200 * 23 / 24) ** 0.5 for n in counts.values())


def test_epochs_differ_and_repeat_from_the_generators_state() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = Minibatches(50, 8, generator=generator)
    first = torch.cat(list(batches))
    state = generator.get_state()
    second = torch.cat(list(batches))
    assert not torch.equal(first, second)
    generator.set_state(state)
    assert torch.equal(torch.cat(list(batches)), second)


def test_a_generator_leaves_the_global_one_alone() -> None:
    state = torch.get_rng_state()
    list(Minibatches(50, 8, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)


def test_two_passes_at_once_do_not_disturb_each_other() -> None:
    batches = Minibatches(6, 2)
    one, two = iter(batches), iter(batches)
    seen = [(next(one), next(two)) for _ in range(3)]
    for pass_ in zip(*seen, strict=True):
        assert torch.cat(pass_).sort().values.tolist() == list(range(6))


def test_without_shuffling_the_order_is_kept() -> None:
    epoch = list(Minibatches(5, 2, shuffle=False))
    assert [index.tolist() for index in epoch] == [[0, 1], [2, 3], [4]]


def test_nothing_is_computed_on_the_host() -> None:
    """The meta device has no values: anything that reads one back raises."""
    epoch = list(Minibatches(10, 4, device="meta"))
    assert [(index.device.type, len(index)) for index in epoch] == [
        ("meta", 4),
        ("meta", 4),
        ("meta", 2),
    ]


def test_the_scaled_batches_of_an_epoch_are_unbiased_each() -> None:
    """E[ num_data / size * sum over the batch ] is the sum over all, also for the partial one."""
    values = torch.tensor([1.0, -2.0, 5.0, 0.5, 3.0], dtype=torch.float64)
    batches = Minibatches(5, 2, generator=torch.Generator().manual_seed(0))
    sums = torch.tensor(
        [[5 / len(index) * values[index].sum() for index in batches] for _ in range(4000)],
        dtype=torch.float64,
    )
    # Three batches, each within 5 standard errors: false alarm below 1e-5 in all.
    error = sums.mean(0) - values.sum()
    assert (error.abs() < 5 * sums.std(0) / 4000**0.5).all()


@pytest.mark.parametrize("wrong", [0, -1, 2.0, True, "3"])
def test_sizes_must_be_whole_and_positive(wrong: object) -> None:
    with pytest.raises(ProgramError, match="num_data must be a whole number of at least 1"):
        Minibatches(wrong, 2)
    with pytest.raises(ProgramError, match="batch_size must be a whole number of at least 1"):
        Minibatches(5, wrong)


def test_a_generator_on_another_device_is_refused() -> None:
    with pytest.raises(ProgramError, match=r"The generator is on cpu, but .* on meta"):
        Minibatches(5, 2, generator=torch.Generator(), device="meta")

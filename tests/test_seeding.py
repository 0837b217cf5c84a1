"""Streams own their numbers and leave the global generators alone."""

import random

import numpy as np
import pyro
import pytest
import torch

from lvppl.errors import ProgramError
from lvppl.seeding import Generators, RandomStream, derived_seed, fresh_seed, seeded


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_a_stream_gives_the_numbers_of_set_rng_seed():
    with RandomStream(7):
        inside = draws()
    pyro.set_rng_seed(7)
    assert inside == draws()


def test_global_generators_go_on_as_if_nothing_had_happened():
    pyro.set_rng_seed(3)
    expected = [draws(), draws()]
    pyro.set_rng_seed(3)
    first = draws()
    with pytest.raises(KeyError), RandomStream(5):
        draws()
        raise KeyError
    fresh_seed()
    RandomStream()
    assert [first, draws()] == expected


def test_a_stream_goes_on_where_it_stopped_and_from_a_saved_state():
    with RandomStream(1):
        whole = [draws() for _ in range(4)]
    stream = RandomStream(1)
    with stream:
        parts = [draws(), draws()]
    saved = stream.state_dict()
    with stream:
        parts.append(draws())
    other = RandomStream(2)
    other.load_state_dict(saved)
    with other:
        assert draws() == parts[2] == whole[2]
        other.load_state_dict(saved)  # while it is entered, too
        assert draws() == whole[2]
        assert draws() == whole[3]


def test_streams_nest():
    with RandomStream(1):
        expected = [draws(), draws()]
    with RandomStream(1):
        first = draws()
        with seeded(9) as seed:
            assert seed == 9
            draws()
        assert [first, draws()] == expected


def test_numpy_normals_survive_a_plain_state():
    np.random.seed(0)
    np.random.randn()  # leaves a second normal in the cache
    state = Generators.read()
    expected = np.random.randn(3)
    Generators.from_plain(state.plain()).write()
    assert (np.random.randn(3) == expected).all()


def test_seeds_are_checked_and_derived_seeds_differ():
    for bad in (-1, 1.5, True, "a"):
        with pytest.raises(ProgramError, match="seed must be"):
            RandomStream(bad)
    derived = {derived_seed(s, purpose) for s in range(100) for purpose in ("a", "b")}
    assert len(derived) == 200
    assert derived_seed(0, "order") == derived_seed(0, "order")
    assert RandomStream(None).seed != RandomStream(None).seed

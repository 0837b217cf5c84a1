"""Estimates that are interrupted go on where they were, and only they."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import lvppl
from lvppl.errors import ProgramError
from lvppl.inference.likelihood import checkpoint as module
from lvppl.inference.likelihood import log_likelihood

Y = torch.linspace(-1, 1, 40, dtype=torch.float64)[:, None]
AIS = lvppl.Annealing(num_steps=3, pilot_chains=4)
START = {float(y): i for i, y in enumerate(Y)}
KINDS = {
    "importance": {},
    "prior": {"estimator": "prior"},
    "everything": {"defensive": 0.3, "bootstrap": 10, "trajectory": True},
    "ais": {"estimator": "ais", "annealing": AIS},
}


class Watched:
    """z, y | z ~ N(shift + z, 1); notes the first rows of batches, and stops at one of them."""

    def __init__(self, shift=0.0, stop_at=None):
        self.shift, self.stop_at, self.starts = shift, stop_at, set()

    def __call__(self, y):
        self.starts.add(START[float(y[0])])
        if START[float(y[0])] == self.stop_at:
            raise KeyboardInterrupt
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).to(y), 1.0))
            pyro.sample("y", dist.Normal(self.shift + z, 1.0), obs=y[:, 0])


def guide(y):
    scale = pyro.param("scale", torch.tensor(0.9, dtype=torch.float64))
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(y[:, 0] / 2, scale))


def estimate(model, path, kind="importance", y=Y, **more):
    options = {"guide": guide, "num_samples": 60, "batch_size": 8, "sample_chunk": 20, "seed": 3}
    options |= KINDS[kind] | more
    return log_likelihood(model, y, checkpoint=path, **options)


def assert_same(found, want):
    """To the last bit."""
    exact = {"rtol": 0, "atol": 0, "equal_nan": True}
    for name in ("log_prob", "std_error", "ess", "khat", "replicates", "trajectory"):
        torch.testing.assert_close(getattr(found, name), getattr(want, name), **exact)
    for name in ("num_discrete", "num_continuous", "seed", "num_samples", "notes"):
        assert getattr(found, name) == getattr(want, name), name


def test_parts_are_kept_without_a_batch_size(tmp_path):
    """All rows fit one pass: with a checkpoint they come in blocks all the same."""
    path = tmp_path / "part.pt"
    with pytest.raises(KeyboardInterrupt):
        estimate(Watched(stop_at=24), path, batch_size=None)
    kept = torch.load(path, weights_only=True)["parts"]
    assert kept and kept[-1]["stop"] == 24
    going_on = Watched()
    found = estimate(going_on, path, batch_size=None)
    want = estimate(Watched(), None, batch_size=None)
    torch.testing.assert_close(found.log_prob, want.log_prob)
    assert going_on.starts.isdisjoint(range(1, 24))


@pytest.mark.filterwarnings("ignore:k-hat")
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_estimate_goes_on(tmp_path, kind):
    want, path = estimate(Watched(), None, kind), tmp_path / "new" / "part.pt"
    with pytest.raises(KeyboardInterrupt):
        estimate(Watched(stop_at=24), path, kind)
    kept = torch.load(path, weights_only=True)["parts"]
    assert [part["stop"] for part in kept] == [8, 16, 24]
    going_on = Watched()
    assert_same(estimate(going_on, path, kind), want)
    assert going_on.starts == {0, 24, 32}  # 0: the program is looked at
    again = Watched()
    assert_same(estimate(again, path, kind, seed=None), want)  # with the seed of the file
    assert again.starts == {0}
    assert [x.name for x in path.parent.iterdir()] == ["part.pt"]


def test_what_was_kept_is_written_now_and_then(tmp_path, monkeypatch):
    """Also where nothing can catch the end: not one part is lost if each is written."""
    monkeypatch.setattr(module, "_SECONDS", 0.0)
    written = []
    monkeypatch.setattr(
        module, "write_atomically", lambda path, write: written.append(path) or path.touch()
    )
    estimate(Watched(), tmp_path / "part.pt")
    assert len(written) == 5


def test_other_chunks_are_no_other_estimate(tmp_path):
    path, want = tmp_path / "part.pt", estimate(Watched(), None)
    with pytest.raises(KeyboardInterrupt):
        estimate(Watched(stop_at=16), path)
    found = estimate(Watched(), path, batch_size=5, sample_chunk=None)
    torch.testing.assert_close(found.log_prob, want.log_prob, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.khat, want.khat, rtol=1e-9, atol=1e-9)


class Layer(torch.nn.Module):
    def __init__(self, value):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(value, dtype=torch.float64))


def with_module(value):
    layer = Layer(value)

    def model(y):
        pyro.module("layer", layer)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).to(y), 1.0))
            pyro.sample("y", dist.Normal(layer.shift + z, 1.0), obs=y[:, 0])

    return model


def test_an_estimate_of_something_else_is_refused(tmp_path):
    path = tmp_path / "part.pt"
    estimate(Watched(), path)
    other = Y.clone()
    other[7] += 1e-9
    for options, says in [
        ({"seed": 4}, "another estimate: seed = 3, not 4"),
        ({"num_samples": 61}, "num_samples = 60, not 61"),
        ({"kind": "prior"}, "estimator = 'importance', not 'prior'"),
        ({"defensive": 0.2}, "defensive = 0.0, not 0.2"),
        ({"y": other}, "other data"),
        ({"y": Y[:39]}, "other data"),
    ]:
        with pytest.raises(ProgramError, match=says):
            estimate(Watched(), path, **options)
    with pytest.raises(ProgramError, match="gives its first draws other weights"):
        estimate(Watched(shift=0.1), path)  # that no parameter tells
    pyro.get_param_store()["scale"] = torch.tensor(0.8, dtype=torch.float64)
    with pytest.raises(ProgramError, match="other parameters"):
        estimate(Watched(), path)


def test_parameters_of_modules_are_told(tmp_path):
    path = tmp_path / "part.pt"
    want = estimate(with_module(0.3), path)
    pyro.clear_param_store()
    assert_same(estimate(with_module(0.3), path), want)
    pyro.clear_param_store()
    with pytest.raises(ProgramError, match="estimate: other parameters"):
        estimate(with_module(0.3 + 1e-9), path)


@pytest.mark.parametrize("kind", ["foreign", "truncated", "text"])
def test_files_of_others_are_refused(tmp_path, kind):
    path = tmp_path / "part.pt"
    estimate(Watched(), path)
    if kind == "foreign":
        torch.save({"format": "another"}, path)
    else:
        path.write_bytes(b"text" if kind == "text" else path.read_bytes()[:500])
    for seed in (3, None):
        with pytest.raises(ProgramError, match="no file that log_likelihood of this version wrote"):
            estimate(Watched(), path, seed=seed)


def test_memory_that_runs_out_loses_nothing(tmp_path):
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).to(y), 1.0))
            if z.numel() > 100:
                raise MemoryError
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[:, 0])

    want = estimate(Watched(), None)
    found = estimate(model, tmp_path / "part.pt", batch_size=20, sample_chunk=60)
    torch.testing.assert_close(found.log_prob, want.log_prob, rtol=0, atol=1e-12)
    again = estimate(model, tmp_path / "part.pt")
    assert torch.equal(again.log_prob, found.log_prob)

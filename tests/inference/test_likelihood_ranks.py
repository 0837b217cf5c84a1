"""ln p(y) over the processes of a group: the numbers of one process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import distributed, multiprocessing

import lvppl

pytestmark = pytest.mark.skipif(
    not distributed.is_available() or sys.platform == "win32", reason="needs gloo"
)


def model(y):
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Bernoulli(torch.tensor(0.3)))
        z = pyro.sample("z", dist.Normal(k, 1.0))
        pyro.sample("y", dist.Normal(z, 0.5), obs=y)


def guide(y):
    with pyro.plate("data", len(y)):
        k = pyro.sample("k", dist.Bernoulli(logits=y - 0.5))
        pyro.sample("z", dist.Normal(0.8 * y + 0.2 * k, 0.6))


def nan_for_some(y):
    if bool((y > 100).any()):
        raise RuntimeError("this datum cannot be")
    model(y)


def estimates(y) -> list[Any]:
    common = {"num_samples": 300, "seed": 3}
    return [
        lvppl.log_likelihood(model, y, guide=guide, bootstrap=20, trajectory=True, **common),
        lvppl.log_likelihood(model, y, guide=guide, defensive=0.2, **common),
        lvppl.log_likelihood(model, y, estimator="prior", batch_size=3, **common),
        lvppl.log_likelihood(model, y, estimator="exact"),
    ]


def work(rank: int, size: int, folder: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size
    )
    y = torch.linspace(-2, 3, 11)
    torch.manual_seed(rank)  # nothing of it is used: the first process draws the seed for all
    drawn = lvppl.log_likelihood(model, y, guide=guide, num_samples=50)
    try:
        lvppl.log_likelihood(nan_for_some, torch.cat([y, y + 1000]), estimator="prior")
        said = ""
    except (lvppl.ProgramError, RuntimeError) as error:
        said = str(error)
    try:
        lvppl.log_likelihood(model, y, guide=guide, checkpoint=f"{folder}/kept.pt")
    except lvppl.ProgramError as error:
        said += str(error)
    torch.save([estimates(y), drawn, said], Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.parametrize("size", [2, 3])
def test_a_group_finds_what_one_process_finds(size, tmp_path):
    multiprocessing.spawn(work, (size, str(tmp_path)), nprocs=size)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(size)]
    alone = estimates(torch.linspace(-2, 3, 11))
    for every, drawn, said in found:
        for one, group in zip(alone, every, strict=True):
            assert one.seed == group.seed or one.estimator == "exact"
            for name in ("log_prob", "std_error", "ess", "khat"):
                torch.testing.assert_close(
                    getattr(group, name), getattr(one, name), rtol=1e-6, atol=1e-9
                )
            assert group.num_continuous == one.num_continuous == 11
        assert drawn.seed == found[0][1].seed
        assert torch.equal(drawn.log_prob, found[0][1].log_prob)
        assert "this datum cannot be" in said and "checkpoint= is of one process" in said

"""Fits on disk: the same numbers after loading, and a resumed run is the uninterrupted one."""

import json
import subprocess
import sys
import textwrap

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from torch import nn
from torch.distributions import constraints
from torch.optim.lr_scheduler import CosineAnnealingLR

import lvppl
from lvppl import io
from lvppl.errors import ProgramError
from lvppl.inference.state import modules_of
from lvppl.inference.svi import SVI
from lvppl.objectives import ELBO, RateDistortion


@pytest.fixture(autouse=True)
def clean():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    pyro.clear_param_store()
    torch.set_num_threads(threads)


Y = torch.linspace(-1, 3, 14)[:, None]


def vae(seed=0):
    """Modules with buffers, noise inside the network, a constrained parameter."""
    torch.manual_seed(seed)
    decoder = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 1))
    encoder = nn.Linear(1, 1)

    def model(y):
        pyro.module("decoder", decoder)
        noise = pyro.param("noise", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(decoder(z), noise).to_event(1), obs=y)

    def guide(y):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(encoder(y), 0.5).to_event(1))

    return model, guide


def globals_only(y):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean.sum(-1), 1.0), obs=y[:, 0])


def automatic(seed=0):
    return globals_only, AutoNormal(globals_only)


def automatic_full(seed=0):
    return globals_only, AutoMultivariateNormal(globals_only)


SETTINGS = {
    "adam": {"learning_rate": 0.03},
    "scheduled": {
        "optimizer": torch.optim.RMSprop,
        "learning_rate": 0.01,
        "scheduler": lambda optimizer: CosineAnnealingLR(optimizer, 12),
        "clip_norm": 1.0,
    },
    "pyro": {"optimizer": pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.99})},
    "pyro scheduled": {
        "optimizer": pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.03}, "gamma": 0.9}
        )
    },
    "multiplier": {
        "objective": RateDistortion(target={"rate": 0.3}),
        "learning_rate": 0.03,
    },
}


def same(first, second):
    for mine, other in zip(first.state.values(), second.state.values(), strict=True):
        assert mine.keys() == other.keys()
        assert all(mine[name].equal(other[name]) for name in mine)
    assert list(first.history) == list(second.history)
    for name in first.history:
        assert first.history[name].tolist() == second.history[name].tolist()


@pytest.mark.parametrize(
    ("program", "settings"),
    [(vae, name) for name in SETTINGS]
    # a rate per datum needs local latents, so no multiplier here
    + [(program, name) for program in (automatic, automatic_full) for name in list(SETTINGS)[:4]],
)
def test_a_resumed_run_is_the_uninterrupted_one(program, settings, tmp_path):
    run = {"batch_size": 5, "evaluate_every": 2, "progress": False, "validation": Y[:3] + 0.1}

    def save_at_three(fit):
        if fit.num_epochs == 3:
            fit.save(tmp_path / "at three")

    whole = SVI(*program(), **SETTINGS[settings]).fit(
        Y, num_epochs=7, seed=5, callbacks=[save_at_three], **run
    )
    # other initial weights: everything must come from the file
    model, guide = program(seed=77)
    loaded = io.load(tmp_path / "at three", model, guide)
    assert (loaded.status, loaded.num_epochs, loaded.num_steps) == ("running", 3, 9)
    run.pop("batch_size")
    rest = SVI(model, guide, **SETTINGS[settings]).fit(Y, num_epochs=7, resume=loaded, **run)
    same(whole, rest)
    # and from one in memory, ended in the middle of an epoch
    half = SVI(*program(), **SETTINGS[settings]).fit(Y, num_steps=10, seed=5, batch_size=5, **run)
    half.save(tmp_path / "half")
    again = io.load(tmp_path / "half", model, guide)
    for part in (half, again):
        programs = (part.model, part.guide)
        same(whole, SVI(*programs, **SETTINGS[settings]).fit(Y, num_epochs=7, resume=part, **run))


def test_a_resumed_run_in_another_process_is_the_uninterrupted_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            import pyro, torch
            import pyro.distributions as dist
            from lvppl import io
            from lvppl.inference.svi import SVI

            torch.set_num_threads(1)
            net = torch.nn.Linear(1, 1)
            y = torch.linspace(-1, 3, 14)[:, None]

            def model(y):
                pyro.module("net", net)
                with pyro.plate("data", len(y)):
                    z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                    pyro.sample("y", dist.Normal(net(z), 0.5).to_event(1), obs=y)

            def guide(y):
                slope = pyro.param("slope", torch.tensor(0.1))
                with pyro.plate("data", len(y)):
                    pyro.sample("z", dist.Normal(slope * y, 0.5).to_event(1))

            folder, until, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
            fit = io.load(resume[0], model, guide) if resume else None
            with torch.no_grad():
                if not resume:
                    net.weight.fill_(0.3), net.bias.fill_(0.1)
            seed = None if resume else 3
            svi = SVI(model, guide)
            size = None if resume else 4
            svi.fit(
                y, num_epochs=until, batch_size=size, seed=seed, resume=fit, progress=False
            ).save(folder)
            """
        )
    )

    def run(*arguments):
        subprocess.run([sys.executable, str(program), *map(str, arguments)], check=True)

    run(tmp_path / "whole", 6)
    run(tmp_path / "part", 2)
    run(tmp_path / "rest", 6, tmp_path / "part")
    whole, rest = (
        torch.load(tmp_path / name / "fit.pt", weights_only=True) for name in ("whole", "rest")
    )
    assert whole["params"].keys() == rest["params"].keys()
    assert all(whole["params"][name].equal(rest["params"][name]) for name in whole["params"])
    assert whole["losses"].equal(rest["losses"])
    assert whole["checkpoint"]["random"]["torch"].equal(rest["checkpoint"]["random"]["torch"])
    assert whole["checkpoint"]["order"].equal(rest["checkpoint"]["order"])


def fitted(seed=0, **options):
    model, guide = vae(seed)
    run = {"num_epochs": 4, "batch_size": 5, "seed": 5, "progress": False, **options}
    return model, guide, SVI(model, guide, learning_rate=0.03).fit(Y, **run)


def test_loading_gives_the_same_answers(tmp_path):
    model, guide, fit = fitted()
    fit.save(tmp_path)
    estimate = fit.log_likelihood(Y, num_samples=20, seed=1)
    other_model, other_guide = vae(seed=3)
    loaded = io.load(tmp_path, other_model, other_guide)
    same(fit, loaded)
    again = loaded.log_likelihood(Y, num_samples=20, seed=1)
    assert estimate.log_prob.equal(again.log_prob)
    for name in ("status", "reason", "seed", "num_steps", "num_epochs", "settings", "versions"):
        assert getattr(loaded, name) == getattr(fit, name)
    assert all(loaded.params[name].equal(value) for name, value in fit.params.items())
    assert loaded.sample(num_samples=3, seed=0).predictive["y"].shape == (3, 2, 1)
    # a loaded fit can be saved again
    loaded.save(tmp_path / "copy")
    same(io.load(tmp_path / "copy", model, guide), fit)


def test_an_autoguide_needs_no_step_before_loading(tmp_path):
    model, guide = automatic()
    fit = SVI(model, guide).fit(Y, num_steps=5, seed=0, progress=False)
    fit.save(tmp_path)
    fresh = AutoNormal(globals_only)
    assert fresh.prototype_trace is None
    same(io.load(tmp_path, globals_only, fresh), fit)


def test_the_files_are_plain(tmp_path):
    _, _, fit = fitted()
    fit.save(tmp_path)
    content = torch.load(tmp_path / "fit.pt", weights_only=True)
    assert len(content["args"][0]) == 2  # two rows, not the data
    assert not any(value.requires_grad for value in content["params"].values())
    readable = json.loads((tmp_path / "fit.json").read_text())
    assert readable["status"] == "max_steps"
    assert readable["parameters"]["encoder$$$weight"] == [1, 1]
    with np.load(tmp_path / "history.npz") as arrays:
        assert arrays["loss"].tolist() == fit.history["loss"].tolist()
    assert {path.name for path in tmp_path.iterdir()} == {"fit.pt", "fit.json", "history.npz"}


def test_saving_is_atomic_and_leaves_other_files_alone(tmp_path, monkeypatch):
    _, _, fit = fitted()
    (tmp_path / "picture.png").write_bytes(b"mine")
    fit.save(tmp_path)
    before = (tmp_path / "fit.pt").read_bytes()

    def half_written(content, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        fitted(num_epochs=1)[2].save(tmp_path)
    assert (tmp_path / "fit.pt").read_bytes() == before
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"fit.pt", "fit.json", "history.npz", "picture.png"}


def test_broken_and_foreign_files(tmp_path):
    model, guide, fit = fitted()
    with pytest.raises(ProgramError, match=r"fit\.pt is missing"):
        io.load(tmp_path, model, guide)
    fit.save(tmp_path)
    path = tmp_path / "fit.pt"
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"not a fit at all", whole[:100]):
        path.write_bytes(broken)
        with pytest.raises(ProgramError, match="is truncated or was not written by lvppl"):
            io.load(tmp_path, model, guide)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(ProgramError, match=r"was not written by lvppl\.save"):
        io.load(tmp_path, model, guide)
    content = {"format": "lvppl fit", "version": 99, "versions": {"lvppl": "9.9"}}
    torch.save(content, path)
    with pytest.raises(ProgramError, match=r"format version 99, .* written by lvppl 9\.9"):
        io.load(tmp_path, model, guide)


def test_folders_that_are_none(tmp_path):
    model, guide, fit = fitted()
    (tmp_path / "run").write_text("notes")
    for folder in (tmp_path / "run", tmp_path / "run" / "first"):
        with pytest.raises(ProgramError, match=r"is a file, or inside of one\. Give another path"):
            fit.save(folder)
    assert (tmp_path / "run").read_text() == "notes"
    with pytest.raises(ProgramError, match=r"Give the folder that fit\.save\(folder\) wrote"):
        io.load(tmp_path / "nothing", model, guide)


def test_model_and_guide_in_each_others_place(tmp_path):
    model, guide, fit = fitted()
    fit.save(tmp_path)
    with pytest.raises(ProgramError, match="'y'"):
        io.load(tmp_path, guide, model)
    assert io.load(tmp_path, model, guide).num_steps == fit.num_steps


def test_a_fit_that_was_not_strict_loads(tmp_path):
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("noise", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0))

    options = {"num_steps": 1, "progress": False, "seed": 0}
    fit = SVI(model, guide, objective=ELBO(strict=False)).fit(Y[:, 0], strict=False, **options)
    fit.save(tmp_path)
    assert torch.equal(io.load(tmp_path, model, guide).params["loc"], fit.params["loc"])


def test_another_program_is_refused_by_name_and_shape(tmp_path):
    model, guide, fit = fitted()
    fit.save(tmp_path)

    def wider(y):
        pyro.param("extra", torch.zeros(3))
        model(y)

    with pytest.raises(ProgramError, match="'extra' that the fit does not have"):
        io.load(tmp_path, wider, guide)
    with pytest.raises(ProgramError, match=r"'encoder\$\$\$weight' that this program does not"):
        io.load(tmp_path, model, lambda y: guide_without_encoder(y))
    encoder = nn.Linear(1, 2)

    def misshapen(y):
        pyro.module("encoder", encoder)
        guide_without_encoder(y)

    with pytest.raises(ProgramError, match=r"shape \(1, 1\) in the fit but \(2, 1\) in this"):
        io.load(tmp_path, model, misshapen)

    model64, guide64 = vae()
    for module in modules_of(model64, guide64):
        module.double()
    with pytest.raises(ProgramError, match=r"does not run on the first rows|is torch.float32 in"):
        io.load(tmp_path, model64, guide64)


def test_a_transformed_batch_is_the_prototype(tmp_path):
    def doubled(batch):
        return (torch.cat([batch[0], batch[0]], -1),)

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    def guide(y):
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y, 1.0).to_event(1))

    fit = SVI(model, guide).fit(
        Y, num_epochs=2, batch_size=4, seed=0, transform=doubled, progress=False
    )
    fit.save(tmp_path)
    loaded = io.load(tmp_path, model, guide)
    same(loaded, fit)
    assert loaded.sample(seed=0).predictive["y"].shape == (1, 2, 2)


def guide_without_encoder(y):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Normal(y, 0.5).to_event(1))


def test_keyword_arguments_and_arrays_travel(tmp_path):
    def model(y, *, options=None, table=None, count=1):
        assert options["deep"][1] == "text"
        assert count == 3
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.sample("y", dist.Normal(z + float(table.sum()), 1.0), obs=y)

    def guide(y, **kwargs):
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y, 1.0))

    kwargs = {"options": {"deep": (1, "text", None)}, "table": np.ones(2), "count": 3}
    fit = SVI(model, guide).fit(Y[:, 0], num_steps=3, seed=0, progress=False, **kwargs)
    fit.save(tmp_path)
    same(io.load(tmp_path, model, guide), fit)
    bad = SVI(model, guide).fit(
        Y[:, 0], num_steps=3, seed=0, progress=False, **{**kwargs, "options": {"deep": [1, "text"]}}
    )
    object.__setattr__(bad, "prototype", ((object(),), {}))
    with pytest.raises(ProgramError, match="data argument 0 is a object, which cannot be saved"):
        bad.save(tmp_path)


# ---------------------------------------------------------------------- fits by EM


def mixture(y):
    weights = pyro.param("weights", torch.tensor([0.6, 0.4]), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.tensor([-1.0, 1.2]))
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y[:, 0])


def mixture_without_loc(y):
    weights = pyro.param("weights", torch.tensor([0.6, 0.4]), constraint=constraints.simplex)
    scale = pyro.param("scale", torch.ones(2), constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(0.0, scale[z]), obs=y[:, 0])


def mixture_with_priors(y):
    """A simplex, a positive and a real latent in a plate: all become parameters."""
    weights = pyro.sample("weights", dist.Dirichlet(2 * torch.ones(2)))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("components", 2, dim=-2):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
    extra = pyro.param("extra", torch.tensor(0.0))
    with pyro.plate("data", len(y), dim=-1):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[..., 0][z] + extra, scale), obs=y[:, 0])


def module_mixture():
    net = nn.Linear(1, 2)

    def model(y):
        pyro.module("net", net)
        loc = pyro.param("loc", lambda: torch.tensor([-1.0, 1.2]))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Categorical(logits=net(y)))
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y[:, 0])

    return model


EM_FITS = {
    "restarts": (lambda: mixture, {"init": "kmeans++", "restarts": 3}, {}),
    "hard": (lambda: mixture, {"hard": True, "init": "random"}, {}),
    "annealed": (lambda: mixture, {"temperature": lambda i: max(1.0, 3.0 - i)}, {}),
    "online": (lambda: mixture, {"online": True}, {"batch_size": 5}),
    "batches": (lambda: mixture, {}, {"batch_size": 5}),
    "priors": (lambda: mixture_with_priors, {"init": "random", "restarts": 2}, {}),
    "module": (module_mixture, {"num_gradient_steps": 3}, {}),
}


@pytest.mark.parametrize("name", EM_FITS)
def test_an_em_fit_comes_back(name, tmp_path):
    program, options, run = EM_FITS[name]
    fit = lvppl.EM(program(), **options).fit(Y, max_iter=4, seed=2, progress=False, **run)
    fit.save(tmp_path)
    loaded = lvppl.load(tmp_path, program())  # other initial weights, or none
    assert isinstance(loaded, lvppl.EMFit)
    assert loaded.guide is None
    same(fit, loaded)
    for field in ("status", "reason", "seed", "num_steps", "settings", "versions", "tracked"):
        assert getattr(loaded, field) == getattr(fit, field)
    assert repr(loaded) == repr(fit)  # with the table of the M-step
    assert dict(loaded.m_step) == dict(fit.m_step)
    for one, other in zip([loaded, *loaded.restarts], [fit, *fit.restarts], strict=True):
        assert repr(one) == repr(other)
        assert one.reason == other.reason
        assert one.params.keys() == other.params.keys()
        assert all(one.params[key].equal(value) for key, value in other.params.items())
    for rows in (Y, Y[:3] + 0.2):
        first, again = fit.log_evidence(rows), loaded.log_evidence(rows)
        assert first.per_datum.equal(again.per_datum)
        assert first.total.equal(again.total)
        first, again = fit.posterior(rows), loaded.posterior(rows)
        assert first.marginals("z").equal(again.marginals("z"))
        assert first.map().values["z"].equal(again.map().values["z"])
    assert torch.equal(*(one.sample(Y, seed=3).predictive["y"] for one in (fit, loaded)))
    loaded.save(tmp_path / "copy")  # and can be saved again
    same(lvppl.load(tmp_path / "copy", program()), fit)


def test_the_files_of_an_em_fit_are_plain(tmp_path):
    fit = lvppl.EM(mixture, init="kmeans++", restarts=2).fit(Y, seed=0, progress=False)
    fit.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"fit.pt", "fit.json", "history.npz"}
    torch.load(tmp_path / "fit.pt", weights_only=True)
    readable = json.loads((tmp_path / "fit.json").read_text())
    assert readable["objective"] == "ln p(y)"
    assert readable["parameters"] == {"weights": [2], "loc": [2], "scale": [2]}
    assert [row["how"] for row in readable["m_step"]] == ["closed form"] * 3
    objectives = [one.objective for one in fit.restarts]
    assert [one["objective"] for one in readable["restarts"]] == objectives
    with np.load(tmp_path / "history.npz") as arrays:
        assert arrays["objective"].tolist() == fit.history["objective"].tolist()


def test_an_em_fit_has_no_guide_and_a_fit_by_svi_has_one(tmp_path):
    model, guide, fit = fitted()
    fit.save(tmp_path / "svi")
    lvppl.EM(mixture).fit(Y, max_iter=1, seed=0, progress=False).save(tmp_path / "em")
    with pytest.raises(ProgramError, match=r"by lvppl\.SVI, but no guide came.*model, guide\)"):
        lvppl.load(tmp_path / "svi", model)
    with pytest.raises(ProgramError, match=r"by lvppl\.EM, .* but a guide came\. Leave it out"):
        lvppl.load(tmp_path / "em", mixture, guide)
    with pytest.raises(ProgramError, match=r"by lvppl\.EM, .* but an objective came"):
        lvppl.load(tmp_path / "em", mixture, objective=ELBO())
    with pytest.raises(ProgramError, match="'loc' that this program does not make"):
        lvppl.load(tmp_path / "em", mixture_without_loc)

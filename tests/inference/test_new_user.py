"""What users tried first: Pyro's own mixture tutorial in minibatches, point guides, resuming; names
of other libraries' options, arrays and tables as data."""

import functools
import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta, AutoNormal

import lvppl
from lvppl.models import GaussianComponents, GaussianMixture, HiddenMarkovModel


def mixture(x):
    weights = pyro.sample("weights", dist.Dirichlet(x.new_ones(2)))
    with pyro.plate("components", 2):
        means = pyro.sample("means", dist.Normal(x.new_zeros(()), 5.0))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights), infer={"enumerate": "parallel"})
        pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)


def two_groups():
    torch.manual_seed(0)
    return torch.cat([torch.randn(80) - 3, torch.randn(120) + 3])[torch.randperm(200)]


@pytest.mark.parametrize("autoguide", [AutoDelta, AutoNormal])
def test_an_autoguide_of_the_globals_trains_on_minibatches(autoguide):
    """The assignments are summed out: the guide holds nothing for a row."""
    x = two_groups()
    pyro.set_rng_seed(1)
    start = {"means": torch.tensor([-1.0, 1.0]), "weights": torch.tensor([0.5, 0.5])}
    guide = autoguide(
        poutine.block(mixture, hide=["k"]),
        init_loc_fn=pyro.infer.autoguide.init_to_value(values=start),
    )
    svi = lvppl.SVI(mixture, guide, learning_rate=0.02)
    fit = svi.fit(x, num_epochs=80, batch_size=50, seed=0, progress=False)
    with fit.active():
        median = guide.median()
    # the maximum a posteriori (and close to it the posterior's centre) by EM
    means, weight = torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 0.5])
    for _ in range(200):
        r = (weight.log() + dist.Normal(means, 1.0).log_prob(x[:, None])).softmax(-1)
        means = (r * x[:, None]).sum(0) / (r.sum(0) + 1 / 25)
        weight = r.mean(0)
    # a posterior standard deviation is 1 / sqrt(80): half of one
    assert torch.allclose(median["means"], means, atol=0.06)
    assert torch.allclose(median["weights"], weight, atol=0.03)


def test_a_point_guide_gives_no_estimate_of_the_evidence():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 5.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a, 1.0), obs=x)

    x = two_groups()
    guide = AutoDelta(model)
    guide(x)
    with pytest.raises(lvppl.ProgramError, match=r"holds 'a' at a point.*ln p\(y, z\).*AutoNormal"):
        lvppl.log_likelihood(model, x, guide=guide)


def test_a_resumption_that_asks_for_less_is_refused():
    x = two_groups()
    guide = AutoNormal(poutine.block(mixture, hide=["k"]))
    svi = lvppl.SVI(mixture, guide)
    fit = svi.fit(x, num_epochs=3, seed=0, progress=False)
    with pytest.raises(lvppl.ProgramError, match=r"3 epochs already.*count from its start"):
        svi.fit(x, num_epochs=2, resume=fit, progress=False)


def test_objectives_print_their_options():
    assert repr(lvppl.IWAE(num_particles=5)) == (
        "IWAE(num_particles=5, gradient='standard', strict=True)"
    )


# ------------------------------------------------------------------------------------ options of EM


def two_gaussians(y, shift=0.0):
    loc = pyro.param("loc", lambda: torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2)))
        pyro.sample("y", dist.Normal(loc[z] + shift, 1.0), obs=y)


def blank_guide(y, **_):
    """A guide that takes anything, and has no site."""


def test_arguments_of_the_program_pass_through_fit():
    """A shift of all locations by keyword is the same shift of the data, the other way."""
    y = two_groups().double()
    shifted = lvppl.EM(two_gaussians).fit(y, shift=2.0, seed=0, tol=1e-12, progress=False)
    moved = lvppl.EM(two_gaussians).fit(y - 2.0, seed=0, tol=1e-12, progress=False)
    assert torch.allclose(shifted.params["loc"], moved.params["loc"], atol=1e-5)
    assert shifted.objective_value == pytest.approx(moved.objective_value, abs=1e-4)


def test_a_misspelt_option_is_named_in_a_fit_with_a_guide_too():
    def guide(y):
        logits = pyro.param("logits", torch.zeros(len(y), 2))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Categorical(logits=logits))

    em = lvppl.EM(two_gaussians, guide)
    with pytest.raises(lvppl.ProgramError, match=r"fit\(max_iters=.*Did you mean max_iter=\?"):
        em.fit(two_groups(), max_iters=3, progress=False)


@pytest.mark.parametrize(
    ("name", "where", "meant"),
    [
        ("hrad", "EM", "Did you mean hard=?"),
        ("temprature", "fit", "Did you mean temperature=, an option of EM(...)?"),
        ("reg_covar", "EM", "Here it is floor=."),
        ("verbose", "EM", "Here it is progress=, an option of EM(...).fit(...)."),
        ("num_epochs", "fit", "Here it is max_iter=."),
        ("seed", "EM", "It is an option of EM(...).fit(...)."),
        ("lengths", "EM", "fit(y, lengths)"),
        ("qwertyuiop", "EM", "is not an option of EM."),
    ],
)
def test_an_option_that_does_not_exist_is_told_its_name_here(name, where, meant):
    with pytest.raises(lvppl.ProgramError) as caught:
        if where == "EM":
            lvppl.EM(two_gaussians, **{name: 1})
        lvppl.EM(two_gaussians).fit(two_groups(), progress=False, **{name: 1})
    assert meant in str(caught.value) and f"({name}=...)" in str(caught.value)


def test_every_name_of_another_library_leads_to_an_option_that_exists():
    from lvppl.inference.options import _CALLED_HERE, advice

    for name, ours in _CALLED_HERE.items():
        found = [
            advice(name, here, front)
            for front in (lvppl.EM, lvppl.SVI)
            for here in (front, front.fit)
        ]
        said = [text for text in found if any(f"it is {one}=" in text for one in ours)]
        assert said, f"{name} leads nowhere: {found}"


def test_em_prints_its_programs_and_what_differs_from_the_default():
    assert repr(lvppl.EM(two_gaussians)) == "EM(two_gaussians)"
    em = lvppl.EM(two_gaussians, init="kmeans++", restarts=3, hard=True, floor=1e-3)
    assert repr(em) == "EM(two_gaussians, hard=True, restarts=3, init='kmeans++', floor=0.001)"
    assert repr(lvppl.EM(GaussianMixture(2, 1), temperature=2.0)) == (
        "EM(GaussianMixture, temperature=2.0)"
    )
    assert repr(lvppl.EM(two_gaussians, blank_guide, num_gradient_steps=5)) == (
        "EM(two_gaussians, blank_guide, num_gradient_steps=5)"
    )
    for wrapped in (
        functools.partial(two_gaussians, shift=1.0),
        poutine.block(two_gaussians, hide=["y"]),
        pyro.infer.config_enumerate(two_gaussians, "parallel"),
    ):
        assert repr(lvppl.EM(wrapped)) == "EM(two_gaussians)"


# ----------------------------------------------------------------------------------- data of others


@pytest.mark.parametrize("kind", ["array", "integers", "list", "series", "frame"])
@pytest.mark.parametrize("batch_size", [None, 50])
def test_what_is_no_tensor_gets_the_code_that_makes_one(kind, batch_size):
    """The message's code is run as it is written, and gives the fit of the tensor."""
    y = two_groups().round()
    model = GaussianMixture(2, 1) if kind == "frame" else two_gaussians
    given = {
        "array": lambda: y.numpy().astype("float64"),
        "integers": lambda: y.numpy().astype(int),
        "list": lambda: y.tolist(),
        "series": lambda: pytest.importorskip("pandas").Series(y.numpy()),
        "frame": lambda: pytest.importorskip("pandas").DataFrame({"wait": y.numpy()}),
    }[kind]()
    em = lvppl.EM(model)
    options = {"seed": 0, "progress": False, "batch_size": batch_size}
    with pytest.raises(lvppl.ProgramError, match="tensor") as caught:
        em.fit(given, **options)
    (code,) = re.findall(r"[Ww]rite (torch\..*\)\))", str(caught.value))
    tensor = eval(code, {"torch": torch, "y": given})
    assert torch.equal(tensor, y[:, None] if kind == "frame" else y)
    assert em.fit(tensor, **options).status == "converged"


def test_an_array_that_a_program_cannot_read_gets_the_code_too():
    def model(y):
        two_gaussians(torch.cat([y, y]))

    with pytest.raises(lvppl.ProgramError, match=r"TypeError.*argument 0 is a numpy"):
        lvppl.EM(model).fit(two_groups().numpy(), progress=False)


def test_an_array_beside_the_data_is_an_argument_like_others():
    def model(y, centre):
        two_gaussians(y - torch.as_tensor(centre))

    y = two_groups()
    centre = np.float32(0.5) * np.ones(1, "float32")
    fit = lvppl.EM(model).fit(y, centre, seed=0, progress=False)
    expected = lvppl.EM(two_gaussians).fit(y - 0.5, seed=0, progress=False)
    assert torch.allclose(fit.params["loc"], expected.params["loc"])


def test_masked_values_may_be_anything_at_all():
    """Beyond a mask there may be a number whose square is infinite."""
    y = torch.cat([two_groups(), torch.tensor([1e30, -1e30])])

    def masked(y):
        with poutine.mask(mask=y.abs() < 1e10):
            two_gaussians(y)

    fit = lvppl.EM(masked).fit(y, seed=0, progress=False)
    expected = lvppl.EM(two_gaussians).fit(y[:-2], seed=0, progress=False)
    assert torch.allclose(fit.params["loc"], expected.params["loc"], atol=1e-5)


@pytest.mark.parametrize("covariance", ["full", "diag"])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 1e8), (1e-12, 0.0), (1e9, 0.0)])
def test_a_start_by_kmeans_does_not_mind_units_or_origin(covariance, scale, offset):
    """ln p(a y + b) = ln p(y) − N D ln a at the maximum, wherever the program's locations were."""
    generator = torch.Generator().manual_seed(0)
    z = torch.arange(100, dtype=torch.float64) % 2
    y = torch.randn(100, 2, generator=generator, dtype=torch.float64) + 10 * z[:, None]

    def maximum(data):
        model = GaussianMixture(2, 2, covariance=covariance).double()
        fit = lvppl.EM(model, init="kmeans++").fit(data, tol=1e-9, seed=0, progress=False)
        assert fit.status == "converged", fit.reason
        return fit.objective_value

    want = maximum(y) - y.numel() * math.log(scale)
    assert maximum(scale * y + offset) == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag"])
def test_a_chain_in_float32_starts_by_kmeans_as_in_float64(covariance):
    y = two_groups()[None, :, None]

    def start(data):
        emission = GaussianComponents(2, 1, covariance=covariance).to(data)
        em = lvppl.EM(HiddenMarkovModel(emission), init="kmeans++")
        return em.fit(data, max_iter=1, seed=0, progress=False).params

    found, want = start(y), start(y.double())
    for name, value in want.items():
        assert torch.allclose(found[name].double(), value, rtol=1e-4, atol=1e-5), name


def test_one_component_starts_as_any_number_does():
    y = torch.randn(50, 2) + 3
    fit = lvppl.EM(lvppl.models.GaussianMixture(1, 2), init="kmeans++").fit(
        y, seed=0, progress=False
    )
    torch.testing.assert_close(fit.model.loc[0].detach(), y.mean(0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["kmeans++", "random"])
def test_centres_of_a_factor_analyser_are_refused(init):
    """Its latent is continuous: an assignment to centres would be a saddle, W = 0."""
    y = torch.randn(50, 4, dtype=torch.float64)
    model = lvppl.models.FactorAnalysis(4, 2).double()
    with pytest.raises(lvppl.ProgramError, match="discrete latent"):
        lvppl.EM(model, init=init).fit(y, seed=0, progress=False)


@pytest.mark.parametrize("count", [0, 2.5])
def test_numbers_of_components_are_whole(count):
    with pytest.raises(ValueError, match="whole number"):
        lvppl.models.GaussianMixture(count, 2)

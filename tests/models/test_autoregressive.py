"""MADE and PixelCNN: p sums to one, no conditional sees what comes later, draws follow p."""

import itertools
from functools import partial

import pyro
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn
from torch.func import functional_call
from torch.nn.functional import conv2d, pad

import lvppl
from lvppl.models import (
    MADE,
    BetaBinomialLikelihood,
    DiscretizedLogisticLikelihood,
    PixelCNN,
)
from lvppl.models.autoregressive import GatedLayer, MaskedDense

SIGNIFICANT = 1e-6  # of each chi-square test: the suite fails by chance less than once in 10,000
SMALL = {"channels": 3, "num_layers": 4, "kernel_size": 3}
LEVELS = partial(DiscretizedLogisticLikelihood, num_levels=3)  # two parameters for each element
BINOMIAL = partial(BetaBinomialLikelihood, total_count=2)
MODELS = {
    "made": partial(MADE, y_shape=(8,), hidden_dims=(20,)),
    "made_backwards": partial(MADE, y_shape=(8,), hidden_dims=(20,), order=range(7, -1, -1)),
    "made_deep": partial(MADE, y_shape=(2, 5), hidden_dims=(20, 15, 30), direct=True),
    "made_any_order": partial(
        MADE, y_shape=(2, 4), hidden_dims=(20, 15), order=(3, 0, 6, 1, 7, 5, 2, 4), num_inputs=3
    ),
    "made_narrow": partial(MADE, y_shape=(8,), hidden_dims=(3,), order=(1, 3, 5, 7, 0, 2, 4, 6)),
    "made_linear": partial(MADE, y_shape=(6,), hidden_dims=(), order=(5, 0, 4, 1, 3, 2)),
    "made_one_bit": partial(MADE, y_shape=(1,), hidden_dims=(5,)),
    "made_one_bit_given_x": partial(MADE, y_shape=(1,), hidden_dims=(5,), num_inputs=2),
    "made_levels": partial(MADE, y_shape=(2, 2), hidden_dims=(9, 9), likelihood=LEVELS),
    "made_binomial": partial(
        MADE, y_shape=(5,), likelihood=BINOMIAL, order=(4, 2, 0, 1, 3), input_scale=2, direct=True
    ),
    "pixel_cnn": partial(PixelCNN, y_shape=(3, 3), **SMALL),
    "pixel_cnn_given_x": partial(PixelCNN, y_shape=(1, 2, 5), num_inputs=2, **SMALL),
    "pixel_cnn_tall": partial(PixelCNN, y_shape=(5, 2), channels=2, num_layers=2, kernel_size=5),
    "pixel_cnn_levels": partial(PixelCNN, y_shape=(2, 2), likelihood=LEVELS, **SMALL),
    "pixel_cnn_binomial": partial(PixelCNN, y_shape=(2, 2), likelihood=BINOMIAL, **SMALL),
}
GIVEN_X = [name for name in MODELS if MODELS[name].keywords.get("num_inputs")]


def make(name, dtype=torch.float64):
    """A model away from its start, where all conditionals are near one half."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model


def levels_of(model):
    if isinstance(model.likelihood, DiscretizedLogisticLikelihood):
        return [0.0, 0.5, 1.0]
    return [0.0, 1.0, 2.0] if isinstance(model.likelihood, BetaBinomialLikelihood) else [0.0, 1.0]


def all_images(model):
    shape = model.blank.shape
    images = list(itertools.product(levels_of(model), repeat=shape.numel()))
    return torch.tensor(images).to(model.blank).unflatten(-1, shape)


def inputs(model, N):
    if not model.num_inputs:
        return None
    generator = torch.Generator().manual_seed(1)
    return torch.randn(N, model.num_inputs, generator=generator, dtype=torch.float64).to(
        model.blank
    )


def data(model, N=6):
    images = all_images(model)
    index = torch.randint(len(images), (N,), generator=torch.Generator().manual_seed(2))
    return images[index], inputs(model, N)


@pytest.mark.parametrize("name", MODELS)
def test_sums_to_one_over_all_images(name):
    model = make(name)
    y, x = all_images(model), inputs(model, 3)
    assert len(y) <= 2**10
    for x_n in [None] if x is None else x:
        total = model.log_evidence(y, x_n).exp().sum()
        assert total.item() == pytest.approx(1, abs=1e-12)


def without_dead_units(module):
    """Rectified units are smoothed: one that is flat at every datum would look like a mask."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, nn.SiLU())
        without_dead_units(child)
    return module


@pytest.mark.parametrize("name", MODELS)
def test_the_jacobian_is_strictly_triangular(name):
    """∂ parameters of o(i) / ∂ y_o(j) is zero for j ≥ i; and nowhere else, given enough units."""
    model = without_dead_units(make(name))
    D, order = model.blank.numel(), list(model.order)
    seen = torch.zeros(D, D, dtype=torch.float64)
    for y in torch.rand(20, *model.blank.shape).double():
        x = inputs(model, 1)
        parameters = partial(model.network, x=None if x is None else x[0])
        J = torch.autograd.functional.jacobian(parameters, y)
        seen += J.reshape(-1, D, D).abs().sum(0)
    in_order = seen[order][:, order]
    assert torch.equal(in_order, in_order.tril(-1))
    if name != "made_narrow":
        assert (in_order + torch.ones_like(in_order).triu() > 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_a_later_element_changes_no_earlier_conditional(name):
    """Bit for bit, at whole levels; and one conditional after another gives ln p(y)."""
    model = make(name)
    (y, x), levels = data(model, 4), levels_of(model)
    total, conditionals = torch.zeros(4).double(), model.distribution(x).conditionals
    for place, i in enumerate(model.order):
        log_p = conditionals(y).base_dist.log_prob(y).flatten(1)
        total = total + log_p[:, i]
        for level in levels:
            changed = y.flatten(1).clone()
            changed[:, list(model.order[place + 1 :])] = level
            changed = changed.view_as(y)
            other = conditionals(changed).base_dist.log_prob(changed).flatten(1)
            assert torch.equal(other[:, i], log_p[:, i])
    torch.testing.assert_close(total, model.log_evidence(y, x), rtol=1e-12, atol=0)


@pytest.mark.parametrize("num_inputs", [0, 2])
@pytest.mark.parametrize("hidden_dims", [(9,), (5, 7), (3, 2), (30, 4, 11), ()])
def test_masks_count_paths(hidden_dims, num_inputs):
    """No path from an input at its place or later; with D − 1 units or more, from all before it."""
    order = torch.randperm(6).tolist()
    network = MaskedDense(order, (2, 6), hidden_dims=hidden_dims, num_inputs=num_inputs)
    paths = torch.eye(num_inputs + 6)
    for layer in [*network.hidden, network.output]:
        if not isinstance(layer, nn.ReLU):
            paths = layer.mask.float() @ paths
    from_x, from_y = paths.unflatten(0, (2, 6)).split([num_inputs, 6], -1)
    for found in from_y[:, order][:, :, order]:
        earlier = torch.ones(6, 6).tril(-1)
        assert (found * (1 - earlier) == 0).all()
        if min(hidden_dims, default=6) >= 6:
            assert torch.equal((found > 0).float(), earlier)
    assert (from_x > 0).all()


@pytest.mark.parametrize("first", [True, False])
def test_a_gated_layer_by_shifted_convolutions(first):
    """The paper's other form: cropped kernels over images that are padded above and left."""
    layer = GatedLayer(3, 3, 5, 2, first=first).double()
    v, h, x = torch.randn(4, 3, 4, 6), torch.randn(4, 3, 4, 6), torch.randn(4, 2)
    v, h, x = v.double(), h.double(), x.double()
    own = 0 if first else 1  # whether the kernel ends on the row, the pixel, itself
    rows = layer.vertical.weight[:, :, : 2 + own]
    above = conv2d(pad(v, (2, 2, 2, 0)), rows, layer.vertical.bias)[:, :, :4]
    columns = layer.horizontal.weight[..., : 2 + own]
    left = conv2d(pad(h, (2, 0)), columns, layer.horizontal.bias)[..., :6]
    left = left + conv2d(above, layer.across.weight, layer.across.bias)
    V = (x @ layer.inputs.weight.T)[:, :, None, None]
    above, left = above + V[:, :6], left + V[:, 6:]
    gated = torch.tanh(left[:, :3]) * torch.sigmoid(left[:, 3:])
    new = conv2d(gated, layer.output.weight, layer.output.bias) + (0 if first else h)
    got_v, got_h = layer(v, h, x)
    want_v = torch.tanh(above[:, :3]) * torch.sigmoid(above[:, 3:])
    torch.testing.assert_close(got_v, want_v, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got_h, new, rtol=1e-10, atol=1e-12)


def chi_square(drawn, images, log_p):
    """p-value of draws (S, *shape) under ln p of all images; rare images are put together."""
    same = (drawn.flatten(1)[:, None] == images.flatten(1)).all(-1)
    counts, expected = same.sum(0).double(), log_p.exp() * len(drawn)
    assert counts.sum() == len(drawn)
    rare = expected < 10
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    kept = expected > 0
    return scipy.stats.chisquare(
        counts[kept], expected[kept] * (len(drawn) / expected.sum())
    ).pvalue


@pytest.mark.parametrize("name", ["made_backwards", "made_any_order", "made_levels", "pixel_cnn"])
def test_draws_follow_p(name):
    model = make(name)
    y, x = all_images(model), inputs(model, 1)
    with torch.no_grad():
        log_p = model.log_evidence(y, x)
        drawn = model.distribution(x).sample((10_000,)).reshape(-1, *model.blank.shape)
    assert chi_square(drawn, y, log_p) > SIGNIFICANT


@pytest.mark.parametrize("name", ["made_any_order", "pixel_cnn"])
def test_completions_follow_p_given_the_first_elements(name):
    model = make(name)
    y, x = all_images(model), inputs(model, 1)
    observed = torch.zeros(model.blank.numel(), dtype=torch.bool)
    observed[list(model.order[:4])] = True
    observed = observed.view_as(model.blank)
    with torch.no_grad():
        agree = y[(y[:, observed] == y[100, observed]).all(-1)]
        log_p = model.log_evidence(agree, x).log_softmax(0)
        drawn = model.distribution(x).conditional_sample(y[100], observed, (10_000,))
    assert chi_square(drawn.reshape(-1, *model.blank.shape), agree, log_p) > SIGNIFICANT


@pytest.mark.parametrize("name", MODELS)
def test_leading_dimensions(name):
    """Of data and of inputs, together and each alone, as a loop over them gives."""
    model = make(name)
    y, x = data(model)
    y = torch.stack([y, y.flip(0), y.roll(1, 0)])
    want = torch.stack([model.log_evidence(one, x) for one in y])
    torch.testing.assert_close(model.log_evidence(y, x), want, rtol=1e-10, atol=0)
    if x is not None:
        xs = torch.stack([x, 2 * x])
        want = torch.stack([model.log_evidence(y[0], one) for one in xs])
        torch.testing.assert_close(model.log_evidence(y[0], xs), want, rtol=1e-10, atol=0)
        want = torch.stack([model.log_evidence(y[0, 0], one) for one in x])
        torch.testing.assert_close(model.log_evidence(y[0, 0], x), want, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_program_under_particles(name):
    model = make(name)
    y, x = data(model)
    with pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(model).get_trace(y, x)
        drawn = poutine.trace(poutine.uncondition(model)).get_trace(y, x)
    trace.compute_log_prob()
    got = trace.nodes["y"]["log_prob"]
    torch.testing.assert_close(got.expand(3, 6), model.log_evidence(y, x).expand(3, 6))
    drawn.compute_log_prob()  # validates the values against their supports
    value = drawn.nodes["y"]["value"]
    assert value.shape == (3, *y.shape) and value.dtype == y.dtype
    torch.testing.assert_close(drawn.nodes["y"]["log_prob"], model.log_evidence(value, x))


@pytest.mark.parametrize("name", ["made_any_order", "made_levels", "pixel_cnn_given_x"])
def test_gradients_by_finite_differences(name):
    model = make(name)
    y, x = data(model, 2)
    names, values = zip(*model.named_parameters(), strict=True)

    class Evidence(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return model.log_evidence(y, x).sum()

    evidence = Evidence()

    def total(*parameters):
        given = {f"model.{key}": p for key, p in zip(names, parameters, strict=True)}
        return functional_call(evidence, given)

    values = tuple(value.detach().requires_grad_() for value in values)
    assert torch.autograd.gradcheck(total, values, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_svi_is_a_step_on_the_likelihood(name):
    """Every parameter that moves ln p is found and moved by plain gradient descent."""
    model = make(name)
    y, x = data(model)
    args = (y,) if x is None else (y, x)
    parameters = dict(model.named_parameters())
    log_p = model.log_evidence(*args).sum()
    gradients = torch.autograd.grad(log_p, [*parameters.values()])
    want = {
        key: (p + 1e-3 * g).detach().clone()
        for (key, p), g in zip(parameters.items(), gradients, strict=True)
    }
    svi = SVI(model, lambda *args: None, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
    assert svi.step(*args) == pytest.approx(-log_p.item(), rel=1e-12)
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.detach(), want[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["made_any_order", "pixel_cnn"])
def test_every_way_to_the_likelihood(name):
    """There is no latent: evidence, exact likelihood and the ELBO are all ln p(y)."""
    model = make(name)
    y, x = data(model)
    args = (y,) if x is None else (y, x)
    want = model.log_evidence(*args).detach()
    torch.testing.assert_close(lvppl.log_evidence(model, *args).per_datum.detach(), want)
    if x is None:
        found = lvppl.log_likelihood(model, y, estimator="exact")
        torch.testing.assert_close(found.log_prob, want)
    loss = lvppl.ELBO().loss(model, lambda *args: None, *args)
    assert loss == pytest.approx(-want.sum().item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_dtype_and_device_follow_the_model(name, dtype):
    model = make(name, dtype)
    y, x = data(model)
    assert model.log_evidence(y, x).dtype == dtype
    assert model.distribution(x).sample().dtype == dtype
    model.to("meta")
    with pyro.validation_enabled(False):
        x = None if x is None else x.to("meta")
        assert model.log_evidence(y.to("meta"), x).device.type == "meta"
        if not isinstance(
            model.likelihood, BetaBinomialLikelihood
        ):  # whose draws torch lacks there
            assert model.distribution(x).sample().device.type == "meta"


def test_the_order_and_the_inputs_matter():
    """The same weights under another order, or another x, are another distribution."""
    model = make("made_any_order")
    y, x = data(model)
    assert not torch.allclose(model.log_evidence(y, x), model.log_evidence(y, x + 1))
    cnn = make("pixel_cnn_given_x")
    y, x = data(cnn)
    assert not torch.allclose(cnn.log_evidence(y, x), cnn.log_evidence(y, x + 1))
    assert model.distribution(x[:, [0, 1, 1]]).order == (3, 0, 6, 1, 7, 5, 2, 4)


def test_what_does_not_fit_is_refused():
    for order in ((0, 1), (0, 1, 1), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"each of 0 ... 2 once"):
            MADE(y_shape=(3,), order=order)
    for y_shape in ((9,), (2, 3, 3), (1, 1, 3, 3)):
        with pytest.raises(ValueError, match=r"images of one plane.* y_shape is \("):
            PixelCNN(y_shape=y_shape)
    for options in ({"kernel_size": 4}, {"kernel_size": 1}, {"num_layers": 0}):
        with pytest.raises(ValueError, match="odd kernel_size of at least 3"):
            PixelCNN(**options)
    y = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"num_inputs=0, takes no x: x of shape \(2, 4\) came"):
        MADE(y_shape=(3,))(y, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"takes x of shape \(data, 4\): none came"):
        MADE(y_shape=(3,), num_inputs=4)(y)
    with pytest.raises(ValueError, match=r"value must have shape \(..., 5\), but has shape \(2, 3"):
        MADE(y_shape=(5,)).log_evidence(y)

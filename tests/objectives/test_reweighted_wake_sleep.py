"""Reweighted wake–sleep against the formula at given draws, and its mean against sums over them."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import lvppl
from lvppl.errors import ProgramError
from lvppl.inference.minibatch import scaled_minibatch
from lvppl.simulation import HeldValues
from tests.programs import PROGRAMS

Y = torch.tensor([0.4, -1.1, 2.0], dtype=torch.float64)
GUIDE = ("qa", "qb")
STATES = list(itertools.product((0.0, 1.0), repeat=2))


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model(y):
    """a, then b given a, then y given both: y ~ N(loc[a, b], 1)."""
    logits = pyro.param("p", torch.tensor([0.3, -0.5, 0.8]))
    loc = pyro.param("loc", torch.tensor([[-1.0, 0.2], [0.7, 1.9]]))
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", dist.Bernoulli(logits=logits[0]))
        b = pyro.sample("b", dist.Bernoulli(logits=logits[1] + logits[2] * a))
        pyro.sample("y", dist.Normal(loc[a.long(), b.long()], 1.0), obs=y)


def guide(y):
    qa, qb = pyro.param("qa", torch.tensor([0.1, 0.6])), pyro.param("qb", torch.tensor([0.2, -0.7]))
    with pyro.plate("data", len(y)):
        a = pyro.sample("a", dist.Bernoulli(logits=qa[0] + qa[1] * y))
        pyro.sample("b", dist.Bernoulli(logits=qb[0] + qb[1] * a * y))


def leaves():
    guide(Y)
    model(Y)
    return dict(sorted(pyro.get_param_store().named_parameters()))


def log_p(leaf, a, b, y):
    logits, loc = leaf["p"], leaf["loc"]
    return (
        dist.Bernoulli(logits=logits[0]).log_prob(a)
        + dist.Bernoulli(logits=logits[1] + logits[2] * a).log_prob(b)
        + dist.Normal(loc[a.long(), b.long()], 1.0).log_prob(y)
    )


def log_q(leaf, a, b, y):
    qa, qb = leaf["qa"], leaf["qb"]
    first = dist.Bernoulli(logits=qa[0] + qa[1] * y).log_prob(a)
    return first + dist.Bernoulli(logits=qb[0] + qb[1] * a * y).log_prob(b)


def gradients(value, leaf):
    found = torch.autograd.grad(value, list(leaf.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(leaf.items(), found, strict=True)
    }


def by_formula(leaf, a, b, y):
    """−Σ w̃ (∇ ln p + ∇ ln q), draws (K, data) held: θ and φ share no parameter."""
    p, q = log_p(leaf, a, b, y), log_q(leaf, a, b, y)
    weights = (p - q).softmax(0).detach()
    return gradients(-(weights * (p + q)).sum(), leaf)


def table(y=Y):
    """Values of a and b, (4, 1) each."""
    return (torch.tensor(column)[:, None].expand(4, len(y)) for column in zip(*STATES, strict=True))


def assert_same(found, want):
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12, msg=name)


@pytest.mark.parametrize("particles", [1, 2])
def test_every_tuple_of_draws_has_the_gradient_of_the_formula(particles):
    leaf = leaves()
    objective = lvppl.ReweightedWakeSleep(num_particles=particles)
    objective.loss(model, guide, Y)  # learns the structure, at draws of its own
    for states in itertools.product(STATES, repeat=particles):
        a, b = torch.tensor(states).T[:, :, None].expand(2, particles, len(Y)).unbind()
        held = {"a": a, "b": b} if particles > 1 else {"a": a[0], "b": b[0]}
        with HeldValues(held):
            loss = objective.differentiable_loss(model, guide, Y)
        p, q = log_p(leaf, a, b, Y), log_q(leaf, a, b, Y)
        bound = ((p - q).logsumexp(0) - math.log(particles)).sum()
        torch.testing.assert_close(loss, -bound)
        assert_same(gradients(loss, leaf), by_formula(leaf, a, b, Y))


@pytest.mark.parametrize("particles", [1, 2, 3])
def test_the_mean_gradient_is_the_sum_over_tuples(particles):
    """θ: the gradient of the bound; φ: E Σ w̃ ∇ ln q. Five standard errors of 4000 copies."""
    leaf, copies = leaves(), 4000
    a, b = table()
    p, q = log_p(leaf, a, b, Y), log_q(leaf, a, b, Y)
    bound, fit = 0.0, 0.0
    for index in itertools.product(range(4), repeat=particles):
        at = list(index)
        probability = q[at].sum(0).exp().detach()
        weights = (p - q)[at].softmax(0).detach()
        bound = bound + (probability * (p - q.detach())[at].logsumexp(0)).sum()
        fit = fit + (probability * (weights * q[at]).sum(0)).sum()
    exact = gradients(-(bound + fit), leaf)
    if particles == 1:
        assert max(exact[name].abs().max() for name in GUIDE) < 1e-12

    objective = lvppl.ReweightedWakeSleep(num_particles=particles)
    assert objective.terms(model, guide, (Y,), {}).num_particles == particles
    y, found = Y.repeat(copies), []
    for seed in range(25):
        pyro.set_rng_seed(seed)
        loss = objective.differentiable_loss(model, guide, y)
        found.append(gradients(loss / copies, leaf))
    for name, value in exact.items():
        samples = torch.stack([each[name] for each in found])
        error = samples.std(0) / len(samples) ** 0.5
        # Student's 24 degrees of freedom: 7 for one in 10^5 over some 30 comparisons
        assert ((samples.mean(0) - value).abs() < 7 * error + 1e-12).all(), name


@pytest.mark.parametrize("name", ["normal_normal", "two_layer_bottom_up", "subsampled",
                                  "auto_normal_local", "concatenating"])  # fmt: skip
def test_draws_are_held_fixed_although_they_are_reparameterised(name):
    """ln p and ln q of a second run, its draws given: by Pyro's own log-probabilities."""
    started = PROGRAMS[name].start()
    model, guide, *args = started.call
    objective = lvppl.ReweightedWakeSleep(num_particles=3)
    objective.loss(*started.call)
    pyro.set_rng_seed(4)
    found = started.gradients(objective.differentiable_loss(*started.call))
    pyro.set_rng_seed(4)
    terms = objective.terms(model, guide, tuple(args), {})
    values = {n: site.value.detach() for n, site in terms.latents.items()}
    p, q = zip(*[scored(model, guide, args, values, k) for k in range(3)], strict=True)
    p, q = torch.stack(p), torch.stack(q)
    weights = (p - q).detach().softmax(0)
    scale = 2.0 if name == "subsampled" else 1.0
    want = started.gradients(-scale * (weights * (p + q)).sum())
    assert any(value.abs().max() > 1e-3 for value in want.values())
    for key, value in want.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-10, msg=key)


def scored(model, guide, args, values, particle):
    """ln p(z, y) and ln q(z | y) at one particle's draws, (data,), without plate scales."""
    at, sums = {n: value[particle] for n, value in values.items()}, []
    for program in (model, guide):
        trace = poutine.trace(HeldValues(at)(program)).get_trace(*args)
        trace.compute_log_prob()
        nodes = trace.nodes.values()
        sums.append(sum(n["unscaled_log_prob"] for n in nodes if "unscaled_log_prob" in n))
    return sums


@pytest.mark.parametrize("phase", ["sleep", "both"])
def test_dreams(phase):
    """Binary data: φ's gradient is a sum over z and y. Five standard errors of 20000 dreams."""

    def model(y):
        logits, flip = (
            pyro.param("p", torch.tensor(0.4)),
            pyro.param("f", torch.tensor([-1.0, 0.9])),
        )
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Bernoulli(logits=logits))
            pyro.sample("y", dist.Bernoulli(logits=flip[z.long()]), obs=y)

    def guide(y):
        q = pyro.param("q", torch.tensor([0.3, -0.8]))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Bernoulli(logits=q[0] + q[1] * y))

    y = torch.ones(20_000)
    model(y)
    guide(y)
    leaf = dict(sorted(pyro.get_param_store().named_parameters()))
    z, data = (torch.tensor(column) for column in zip(*STATES, strict=True))
    joint = dist.Bernoulli(logits=leaf["p"]).log_prob(z)
    joint = joint + dist.Bernoulli(logits=leaf["f"][z.long()]).log_prob(data)
    ln_q = dist.Bernoulli(logits=leaf["q"][0] + leaf["q"][1] * data).log_prob(z)
    dream = gradients(-(joint.exp().detach() * ln_q).sum(), leaf)["q"]

    found, wakes = [], []
    objective = lvppl.ReweightedWakeSleep(num_particles=2, phase=phase)
    wake = lvppl.ReweightedWakeSleep(num_particles=2)
    for seed in range(25):
        both = []
        for each in (objective, wake):
            pyro.set_rng_seed(seed)
            loss = each.differentiable_loss(model, guide, y) / len(y)
            both.append((loss.detach(), gradients(loss, leaf)))
        (loss, g), (wake_loss, wake_g) = both
        assert loss == wake_loss  # of the wake's draws, which come first
        assert torch.equal(g["p"], wake_g["p"]) and torch.equal(g["f"], wake_g["f"])
        found.append(g["q"])
        wakes.append(wake_g["q"])
    samples, waking = torch.stack(found), torch.stack(wakes)
    if phase == "both":
        samples = 2 * samples - waking
    error = samples.std(0) / 5
    assert (error > 0).all()
    assert ((samples.mean(0) - dream).abs() < 7 * error).all()


def test_dreams_keep_the_scale_of_their_plate():
    """A dream counts as often as the datum it stands for."""

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(pyro.param("s", torch.tensor(0.5)) * y, 1.0))

    objective, found = lvppl.ReweightedWakeSleep(num_particles=2, phase="sleep"), []
    for factor in (1.0, 3.0):
        with scaled_minibatch(["data"], int(factor * len(Y))):
            pyro.set_rng_seed(0)
            loss = objective.differentiable_loss(model, guide, Y)
        (leaf,) = [p for _, p in pyro.get_param_store().named_parameters()]
        found.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(found[1], 3 * found[0])


def test_impossible_draws_have_no_gradient():
    """y = a + b is certain; where every draw misses it the bound is −∞ and has no gradient."""

    def model(y):
        a = pyro.sample("a", dist.Bernoulli(logits=pyro.param("odds", torch.tensor(0.2))))
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Delta((a + b).long()), obs=y)

    def guide(y):
        for name in "ab":
            pyro.sample(name, dist.Bernoulli(logits=pyro.param(f"q{name}", torch.tensor(0.3))))

    y = torch.tensor(1)
    objective = lvppl.ReweightedWakeSleep(num_particles=2)
    objective.loss(model, guide, y)
    leaf = dict(sorted(pyro.get_param_store().named_parameters()))
    for a, b in itertools.product(itertools.product((0.0, 1.0), repeat=2), repeat=2):
        a, b = torch.tensor(a), torch.tensor(b)
        with HeldValues({"a": a, "b": b}):
            found = gradients(objective.differentiable_loss(model, guide, y), leaf)
        kept = (a + b == 1).double()
        q = dist.Bernoulli(logits=leaf["qa"]).log_prob(a)
        q = q + dist.Bernoulli(logits=leaf["qb"]).log_prob(b)
        p = dist.Bernoulli(logits=leaf["odds"]).log_prob(a)
        weights = kept * (p - q).exp().detach()
        weights = weights / weights.sum().clamp(min=1e-300)
        want = gradients(-(weights * (p + q)).sum(), leaf)
        assert_same(found, want)


# ----------------------------------------------------------------------------------------- refusals


def normal_model(y):
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(pyro.param("m", torch.tensor(0.1)), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def guide_with(distribution, **infer):
    def guide(y):
        loc = pyro.param("loc", torch.tensor(0.2))
        with pyro.plate("data", len(y)):
            pyro.sample("z", distribution(loc, y), infer=infer)

    return guide


def test_a_shared_parameter_is_named():
    shared = guide_with(lambda loc, y: dist.Normal(pyro.param("m") * y + loc, 1.0))
    normal_model(Y)
    objective = lvppl.ReweightedWakeSleep(num_particles=2)
    with pytest.raises(ProgramError, match=r"share parameter 'm'.*use IWAE"):
        objective.differentiable_loss(normal_model, shared, Y)
    layer = torch.nn.Linear(1, 1)

    def tied(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(layer.weight[0, 0] * z, 1.0), obs=y)

    encoder = guide_with(lambda loc, y: dist.Normal(layer(y[:, None])[..., 0], 1.0))
    with pytest.raises(ProgramError, match=r"share a parameter of shape \(1, 1\)"):
        objective.differentiable_loss(tied, encoder, Y)
    detached = guide_with(lambda loc, y: dist.Normal(layer.weight.detach()[0, 0] * y + loc, 1.0))
    objective.differentiable_loss(tied, detached, Y)


@pytest.mark.parametrize(
    ("program", "says"),
    [
        (lambda y: None, "'z' is drawn from its prior"),
        (guide_with(lambda loc, y: dist.Delta(loc * y)), "'z' is a point"),
    ],
)
def test_guides_without_a_density_to_fit(program, says):
    objective = lvppl.ReweightedWakeSleep(num_particles=2, strict=False)
    with pytest.raises(ProgramError, match=says):
        objective.differentiable_loss(normal_model, program, Y)


def test_noise_of_a_guide():
    def noisy(y):
        with pyro.plate("data", len(y)):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
            pyro.sample("z", dist.Normal(u * pyro.param("loc", torch.tensor(0.2)), 1.0))

    objective = lvppl.ReweightedWakeSleep(num_particles=2, strict=False)
    with pytest.raises(ProgramError, match="'u' is noise"):
        objective.differentiable_loss(normal_model, noisy, Y)


def test_sites_enumerated_in_the_guide():
    started = PROGRAMS["categorical_in_guide"].start()
    with pytest.raises(ProgramError, match="is enumerated"):
        lvppl.ReweightedWakeSleep(num_particles=2).differentiable_loss(*started.call)


def test_what_cannot_dream():
    def factored(y):
        normal_model(y)
        with pyro.plate("more", len(y)):
            pyro.factor("tilt", torch.zeros(len(y)))

    def copied(y):
        normal_model(y + 0.0)

    plain = guide_with(lambda loc, y: dist.Normal(loc * y, 1.0))
    for program, says in ((factored, "'tilt' is a pyro.factor"), (copied, "'y' observes no arg")):
        objective = lvppl.ReweightedWakeSleep(num_particles=2, phase="sleep")
        with pytest.raises(ProgramError, match=f"{says}.*phase='wake'"):
            objective.differentiable_loss(program, plain, Y)
    auto = PROGRAMS["auto_normal_local"].start()
    with pytest.raises(ProgramError, match="'z_unconstrained' is no latent"):
        lvppl.ReweightedWakeSleep(num_particles=2, phase="both").differentiable_loss(*auto.call)

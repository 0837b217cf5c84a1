"""Gradient audits against gradients, variances and biases that are known exactly.

Sampled moments are compared within five standard errors, of a variance those of its fourth moment;
seeds are fixed.
"""

import copy
import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib.figure import Figure
from pyro.infer import Trace_ELBO
from pyro.nn import PyroModule, PyroParam

import lvppl
from lvppl.errors import ProgramError
from lvppl.inference.gradients.exact import evidence_loss, expected_loss
from lvppl.inference.gradients.record import bias_of
from lvppl.simulation import HeldValues
from tests.programs import PROGRAMS, Built, Oracle, Program, log_bernoulli, log_normal

R = 150


class NoScore(lvppl.ELBO):
    """Wrong: discrete draws move with the guide, and nothing says so."""

    def per_datum(self, terms):
        return -terms.elbo(self.form).mean(0)


@pytest.fixture(autouse=True)
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# --------------------------------------------------------------------------------- exact gradients


def states_of_reweighting(oracle, particles):
    """E of −Σ w̃ (ln p + ln q) at held draws: the sum over tuples of one datum's states."""
    total = 0.0
    log_p = oracle.log_likelihood + oracle.log_prior
    for index in itertools.product(range(log_p.shape[-1]), repeat=particles):
        at = list(index)
        prob = oracle.weights[:, at].prod(-1).detach()
        weights = oracle.log_weight[:, at].softmax(-1).detach()
        total = total + prob * (weights * (log_p + oracle.log_guide)[:, at]).sum(-1)
    return -total


TARGETS = {
    "elbo": (lvppl.ELBO(num_particles=7), lambda o: -o.elbo),
    "elbo_entropy": (lvppl.ELBO(form="entropy"), lambda o: -o.elbo),
    "hard": (lvppl.HardELBO(num_particles=3), lambda o: -o.hard_elbo),
    "rd": (lvppl.RateDistortion(weight=3.0), lambda o: o.rate + 3 * o.distortion),
    "iwae_1": (lvppl.IWAE(num_particles=1), lambda o: -o.elbo),
    "vimco_3": (lvppl.IWAE(num_particles=3), lambda o: -o.iwae(3)),
    "rws_2": (lvppl.ReweightedWakeSleep(num_particles=2), lambda o: states_of_reweighting(o, 2)),
}


def switches_in_replicates(dtype, repeats=1):
    """A switch for every datum, and one below it for each of its two replicates."""
    y = torch.tensor([[0.3, 0.7], [-1.2, -0.2]], dtype=dtype).repeat(repeats, 1)

    def model(y):
        logits, gap = (
            pyro.param("logits", torch.tensor([0.2, -0.6])),
            pyro.param("gap", y.new_tensor(1.1)),
        )
        with pyro.plate("data", len(y), dim=-2):
            a = pyro.sample("a", dist.Bernoulli(logits=logits[0]))
            with pyro.plate("replicates", 2, dim=-1):
                c = pyro.sample("c", dist.Bernoulli(logits=logits[1] + a))
                pyro.sample("y", dist.Normal(gap * c - a, 0.9), obs=y)

    def guide(y):
        q = pyro.param("q", torch.tensor([0.8, -0.5, 0.4]))
        with pyro.plate("data", len(y), dim=-2):
            a = pyro.sample("a", dist.Bernoulli(logits=q[0] * y.mean(-1, keepdim=True)))
            with pyro.plate("replicates", 2, dim=-1):
                pyro.sample("c", dist.Bernoulli(logits=q[1] * y + q[2] * a))

    def oracle(p):
        states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=dtype)
        a, c = states[:, 0], states[:, 1:]
        mean = y.mean(-1, keepdim=True)
        log_guide = log_bernoulli(a, p["q"][0] * mean)
        logits = p["q"][1] * y[:, None] + p["q"][2] * a[:, None]
        log_guide = log_guide + log_bernoulli(c, logits).sum(-1)
        log_prior = log_bernoulli(a, p["logits"][0])
        log_prior = log_prior + log_bernoulli(c, (p["logits"][1] + a)[:, None]).sum(-1)
        likelihood = log_normal(y[:, None], p["gap"] * c - a[:, None], 0.9).sum(-1)
        return Oracle(
            log_guide.exp(), likelihood, log_prior.expand_as(log_guide), log_guide,
            (log_prior + likelihood).logsumexp(-1),
        )  # fmt: skip

    return Built(model, guide, (y,), oracle)


DISCRETE = {name: PROGRAMS[name] for name in ("bernoulli_score", "bernoulli_score_subsampled")}
DISCRETE["switches"] = Program("switches", switches_in_replicates)


@pytest.mark.parametrize("name", DISCRETE)
@pytest.mark.parametrize("target", list(TARGETS))
def test_expected_losses_are_the_oracles(name, target):
    started = DISCRETE[name].start()
    objective, formula = TARGETS[target]
    oracle = started.oracle()
    model, guide, *args = started.call
    value = expected_loss(objective, model, guide, tuple(args), {})
    truth = started.gradients(oracle.scale * formula(oracle).sum())
    for key, found in started.gradients(value).items():
        torch.testing.assert_close(found, truth[key], rtol=0, atol=1e-10, msg=key)


def test_the_likelihood_s_gradient_is_the_oracle_s():
    for program in (*DISCRETE.values(), PROGRAMS["mixture_in_model"]):
        started = program.start()
        oracle = started.oracle()
        truth = started.gradients(-oracle.scale * oracle.log_evidence.sum())
        found = started.gradients(evidence_loss(started.built.model, started.built.args, {}))
        for key, value in truth.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-10)


def test_a_random_subsample_leaves_no_exact_gradient():
    """One subsample's gradient is not what the mean over subsamples is to be held against."""
    y = torch.linspace(-1.0, 2.0, 8)

    def model(y):
        m = pyro.param("m", torch.tensor(0.3))
        with pyro.plate("data", 8, subsample_size=4) as index:
            k = pyro.sample("k", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Normal(m * k, 1.0), obs=y[index])

    def guide(y):
        a = pyro.param("a", torch.tensor(0.2))
        with pyro.plate("data", 8, subsample_size=4):
            pyro.sample("k", dist.Bernoulli(logits=a))

    audit = lvppl.audit_gradients(model, guide, [lvppl.ELBO()], y, num_repetitions=20, seed=0)
    assert all(row.bias is None and row.likelihood_bias is None for row in audit.rows)


def test_a_small_element_s_bias_is_not_lost_beside_a_large_one():
    mean, other = torch.tensor([1e4, 1.0]), torch.tensor([1e4, 1.3])
    variance = torch.full((2,), 1e-5)
    found = bias_of(mean, variance, 100, other, torch.finfo(torch.float32).eps, 99)
    assert found.significant


def test_what_cannot_be_listed_has_no_exact_gradient():
    for name in ("normal_normal", "score_then_pathwise", "poisson_score"):
        model, guide, *args = PROGRAMS[name].start().call
        assert expected_loss(lvppl.ELBO(), model, guide, tuple(args), {}) is None
        exact = evidence_loss(model, tuple(args), {})
        assert (exact is None) == (name == "poisson_score"), "Gaussian latents are integrated"
    model, guide, *args = PROGRAMS["bernoulli_score"].start().call
    for objective in (
        lvppl.RateDistortion(free_nats=0.1),
        lvppl.ReweightedWakeSleep(num_particles=2, phase="both"),
        Trace_ELBO(),
    ):
        assert expected_loss(objective, model, guide, tuple(args), {}) is None


# ----------------------------------------------------------------------------------------- moments


def coin_model(y):
    loc = pyro.param("loc", torch.tensor([-0.8, 1.1]))
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(loc[z.long()], 1.0), obs=y)


def coin_guide(y):
    with pyro.plate("data", len(y)):
        pyro.sample("z", dist.Bernoulli(logits=pyro.param("q", torch.tensor(0.4))))


@pytest.mark.parametrize(
    "objective",
    [
        lvppl.ELBO(num_particles=2),
        lvppl.IWAE(num_particles=2),
        lvppl.ReweightedWakeSleep(num_particles=2),
    ],
)
def test_moments_of_a_coin_are_sums_over_its_draws(objective):
    """Mean and variance of a two-particle gradient, by setting each pair of draws."""
    y = torch.tensor([0.9])
    objective.loss(coin_model, coin_guide, y)
    leaf = dict(pyro.get_param_store().named_parameters())
    q = float(leaf["q"].detach().sigmoid())
    moments = {name: [0.0] * 4 for name in leaf}
    values = []
    for pair in itertools.product((0.0, 1.0), repeat=2):
        prob = math.prod(q if z else 1 - q for z in pair)
        with HeldValues({"z": torch.tensor(pair)[:, None]}):
            loss = objective.differentiable_loss(coin_model, coin_guide, y)
        values.append(
            (prob, dict(zip(leaf, torch.autograd.grad(loss, leaf.values()), strict=True)))
        )
    for name in leaf:
        mean = sum(p * g[name] for p, g in values)
        moments[name] = [mean] + [sum(p * (g[name] - mean) ** k for p, g in values) for k in (2, 4)]

    audit = lvppl.audit_gradients(
        coin_model, coin_guide, {"it": objective}, y, num_repetitions=800, seed=0
    )
    for name, (mean, variance, fourth) in moments.items():
        error = (variance / 800).sqrt()
        assert ((audit.means["it"][name] - mean).abs() < 5 * error + 1e-12).all()
        error = ((fourth - variance**2) / 800).sqrt()
        assert ((audit.variances["it"][name] - variance).abs() < 5 * error + 1e-12).all()
        torch.testing.assert_close(audit.exact["it"][name], mean, rtol=0, atol=1e-12)
        row = audit.row("it", name)
        assert row.bias is not None and not row.bias.significant
        assert row.std_dev == pytest.approx(float(audit.variances["it"][name].sum().sqrt()))
    assert audit.row("it", "loc").likelihood_bias is not None
    assert audit.row("it", "q").likelihood_bias is None


def test_moments_of_a_linear_gaussian_model_are_its_formulas():
    """One draw z = μ + s ε of the entropy form: ∂μ = (z − y)/σ² + z, whose moments are plain."""
    mu, s, sigma, y = 0.4, 0.5, 0.8, torch.tensor([1.7])

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, sigma), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(pyro.param("mu", torch.tensor(mu)), s))

    objectives = {n: lvppl.ELBO(num_particles=n, form="entropy") for n in (1, 4)}
    audit = lvppl.audit_gradients(
        model, guide, objectives, y, num_repetitions=700, seed=1,
        reference=lvppl.ELBO(num_particles=500),
    )  # fmt: skip
    mean = (mu - 1.7) / sigma**2 + mu
    for n in (1, 4):
        sd = (1 + 1 / sigma**2) * s / math.sqrt(n)
        row = audit.row(str(n), "mu")
        assert abs(float(audit.means[str(n)]["mu"]) - mean) < 5 * sd / math.sqrt(700)
        assert abs(row.std_dev - sd) < 5 * sd / math.sqrt(2 * 700)
        ratio = abs(mean) / sd
        error = math.sqrt((1 + ratio**2 / 2) / 700)
        assert abs(row.snr - ratio) < 5 * error and row.snr == row.snr_norm
        assert row.norm == pytest.approx(abs(float(audit.means[str(n)]["mu"])))
        # the cosine of numbers is their sign: that of the mean with the probability of its side
        side = 2 * float(dist.Normal(0.0, 1.0).cdf(torch.tensor(ratio))) - 1
        assert abs(row.cosine - side) < 5 * math.sqrt((1 - side**2) / 700) + 1e-12
        assert row.bias is None and row.likelihood_bias is None
        assert row.reference_bias is not None and not row.reference_bias.significant
        assert row.seconds > 0


def test_sticking_the_landing_has_no_noise_at_the_posterior():
    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(slope * y, math.sqrt(0.5)))

    objectives = {"plain": lvppl.ELBO(form="entropy"), "stl": lvppl.ELBO(gradient="stl")}
    audit = lvppl.audit_gradients(model, guide, objectives, torch.ones(3), num_repetitions=50)
    assert audit.row("plain", "slope").std_dev > 0.1
    assert audit.row("stl", "slope").std_dev < 1e-12


# ------------------------------------------------------------------------------------------- biases


@pytest.mark.parametrize("name", DISCRETE)
def test_a_biased_estimator_is_caught_and_no_other(name):
    model, guide, *args = DISCRETE[name].start().call
    objectives = {key: objective for key, (objective, _) in TARGETS.items()}
    objectives["wrong"] = NoScore(num_particles=2)
    audit = lvppl.audit_gradients(model, guide, objectives, *args, num_repetitions=R, seed=0)
    for row in (*audit.rows, *audit.totals):
        wrong = row.objective == "wrong" and row.program == "guide"
        if row in audit.totals or not wrong:
            assert row.bias is not None
            assert row.bias.significant == wrong, row
    assert "biased" in str(audit) and "unbiased within error" in str(audit)
    assert "unbiased within error" in str(audit.row("elbo", "model").bias)


def test_the_bias_of_a_bound_to_the_likelihood_falls_with_its_particles():
    """To the gradient of ln p(y), by the oracle's own gradients of L_K."""
    started = PROGRAMS["bernoulli_score"].start()
    objectives = {str(k): lvppl.IWAE(num_particles=k) for k in (1, 4)}
    model, guide, *args = started.call
    audit = lvppl.audit_gradients(model, guide, objectives, *args, num_repetitions=R, seed=3)
    evidence = started.gradients(-started.oracle().log_evidence.sum())
    for k in (1, 4):
        bound = started.gradients(-started.oracle().iwae(k).sum())
        for name in ("locs", "noise", "prior_logit"):
            exact = (bound[name] - evidence[name]).norm()
            found = audit.row(str(k), name).likelihood_bias
            assert abs(found.norm - float(exact)) < 5 * found.std_error + 1e-9
            torch.testing.assert_close(audit.likelihood[name], evidence[name])
    one, four = (audit.row(key, "model").likelihood_bias.norm for key in ("1", "4"))
    assert four < one / 2


def test_a_loss_of_pyro_against_a_reference():
    started = PROGRAMS["normal_normal"].start()
    model, guide, *args = started.call
    audit = lvppl.audit_gradients(
        model,
        guide,
        [Trace_ELBO(num_particles=2), lvppl.HardELBO(num_particles=2)],
        *args,
        num_repetitions=R,
        reference=lvppl.ELBO(num_particles=2000),
        seed=0,
    )
    pyro_s, hard = audit.means
    assert not audit.row(pyro_s, "guide").reference_bias.significant
    assert audit.row(hard, "guide").reference_bias.significant  # of another loss
    assert "bias to reference" in str(audit)


# ---------------------------------------------------------------------------- Rainforth et al. 2018


def test_tighter_bounds_drown_the_guide_s_signal():
    """SNR: 1/√K for the guide, √K for the model and for DReG's guide; slopes within 0.1."""
    y = torch.full((500,), 1.3)

    def model(y):
        shift = pyro.param("shift", torch.tensor(0.2))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def guide(y):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(loc, 0.8))

    particles = (8, 32, 128)
    objectives = {f"iwae {k}": lvppl.IWAE(num_particles=k) for k in particles}
    objectives |= {f"dreg {k}": lvppl.IWAE(num_particles=k, gradient="dreg") for k in particles}
    audit = lvppl.audit_gradients(model, guide, objectives, y, num_repetitions=200, seed=0)

    def slope(kind, parameter):
        first, last = (
            audit.row(f"{kind} {k}", parameter).snr for k in (particles[0], particles[-1])
        )
        return math.log(last / first) / math.log(particles[-1] / particles[0])

    assert abs(slope("iwae", "loc") + 0.5) < 0.1
    assert abs(slope("iwae", "shift") - 0.5) < 0.1
    assert abs(slope("dreg", "loc") - 0.5) < 0.1


# ----------------------------------------------------------------------------------- left as it was


class Encoder(PyroModule):
    """Parameters of its own, batch statistics, and a module inside."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.norm = torch.nn.BatchNorm1d(1)
        self.width = PyroParam(torch.tensor(0.7), constraint=dist.constraints.positive)

    def forward(self, y):
        with pyro.plate("data", len(y)):
            loc = self.layer(self.norm(y[:, None]))[:, 0]
            pyro.sample("z", dist.Normal(loc, self.width))


def normal_model(y):
    scale = pyro.param("scale", lambda: torch.rand(()), constraint=dist.constraints.positive)
    with pyro.plate("data", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_nothing_is_left_behind():
    pyro.set_rng_seed(5)
    guide, y = Encoder(), torch.tensor([0.3, -0.8, 1.9])
    kept = pyro.param("elsewhere", torch.tensor(1.0))
    state = copy.deepcopy(guide.state_dict())
    before = torch.get_rng_state()
    audit = lvppl.audit_gradients(normal_model, guide, [lvppl.ELBO()], y, num_repetitions=5)
    assert torch.equal(before, torch.get_rng_state())
    assert set(pyro.get_param_store().keys()) == {"elsewhere"}
    assert pyro.param("elsewhere") is kept
    for name, value in guide.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(parameter.grad is None for parameter in guide.parameters())
    names = {row.parameter: row.program for row in audit.rows}
    assert names["scale"] == "model" and len(names) == 6
    ends = {"scale", "layer$$$weight", "layer$$$bias", "norm$$$weight", "norm$$$bias", "width"}
    assert {name.rpartition(".")[2] for name in names} == ends


def test_present_parameters_and_their_gradients_stay():
    model, guide, *args = PROGRAMS["normal_normal"].start().call
    lvppl.ELBO().loss_and_grads(model, guide, *args)
    store = pyro.get_param_store()
    before = {n: (p, p.detach().clone(), p.grad.clone()) for n, p in store.named_parameters()}
    lvppl.audit_gradients(model, guide, [lvppl.ELBO()], *args, num_repetitions=3)
    for name, parameter in store.named_parameters():
        same, value, grad = before[name]
        assert parameter is same
        assert torch.equal(parameter, value) and torch.equal(parameter.grad, grad)


def test_shared_parameters_are_named_so():
    layer = torch.nn.Linear(1, 1)

    def model(y):
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(layer.weight[0, 0] * z, 1.0), obs=y)

    def guide(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(layer(y[:, None])[:, 0], 1.0))

    audit = lvppl.audit_gradients(model, guide, [lvppl.ELBO()], torch.ones(2), num_repetitions=3)
    assert {row.parameter: row.program for row in audit.rows} == {
        "Linear.bias": "guide",
        "Linear.weight": "both",
    }
    assert [row.parameter for row in audit.totals] == ["all of the guide", "all of both"]


def test_draws_depend_on_the_seed_and_the_name_alone():
    model, guide, *args = PROGRAMS["bernoulli_score"].start().call
    one, two = lvppl.ELBO(num_particles=2), lvppl.IWAE(num_particles=3)
    options = {"num_repetitions": 4, "seed": 9}
    both = lvppl.audit_gradients(model, guide, {"a": one, "b": two}, *args, **options)
    alone = lvppl.audit_gradients(model, guide, {"b": two}, *args, **options)
    for name, mean in alone.means["b"].items():
        assert torch.equal(mean, both.means["b"][name])
    other = lvppl.audit_gradients(model, guide, {"b": two}, *args, num_repetitions=4, seed=8)
    assert any(not torch.equal(m, other.means["b"][n]) for n, m in alone.means["b"].items())


# ------------------------------------------------------------------------------------ text, picture


def test_table_and_picture():
    model, guide, *args = PROGRAMS["bernoulli_score"].start().call
    objectives = [lvppl.ELBO(num_particles=2), lvppl.ELBO(num_particles=2), NoScore()]
    audit = lvppl.audit_gradients(model, guide, objectives, *args, num_repetitions=20, seed=0)
    assert len(audit.means) == 3
    lines = audit.table().splitlines()
    assert len(lines) == 2 + 3 * 5 and len({len(line.split("  ")[0]) for line in lines[1:2]}) == 1
    assert len(audit.table(totals=True).splitlines()) == 2 + 3 * 2
    axes = audit.plot()
    assert isinstance(axes.figure, Figure)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(audit.means)
    drawn = sorted(
        float(line.get_xdata()[0]) for line in axes.lines if line.get_markerfacecolor() != "white"
    )
    finite = sorted(r.snr for r in audit.totals if 0 < r.snr < math.inf and not r.bias.significant)
    assert set(finite) <= set(drawn)


# ----------------------------------------------------------------------------------------- refusals


def test_refusals():
    model, guide, *args = PROGRAMS["bernoulli_score"].start().call
    with pytest.raises(ProgramError, match="at least one objective"):
        lvppl.audit_gradients(model, guide, {}, *args)
    with pytest.raises(ProgramError, match="at least 2"):
        lvppl.audit_gradients(model, guide, [lvppl.ELBO()], *args, num_repetitions=1)
    with pytest.raises(ProgramError, match="no differentiable_loss"):
        lvppl.audit_gradients(model, guide, [lvppl.ELBO], *args)

    def fixed(y):
        with pyro.plate("data", len(y)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def observed(y):
        fixed(y)
        with pyro.plate("data_again", len(y)):
            pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)

    with pytest.raises(ProgramError, match="Neither model nor guide has a parameter"):
        lvppl.audit_gradients(observed, fixed, [lvppl.ELBO()], torch.ones(2))

    class Broken(lvppl.ELBO):
        def per_datum(self, terms):
            return super().per_datum(terms) * math.inf

    with pytest.raises(ProgramError, match="'locs' is not finite"):
        lvppl.audit_gradients(model, guide, {"bad": Broken()}, *args, num_repetitions=3)

"""Sums over chains equal sums over all their paths, whatever the method."""

import itertools
import math

import numpy as np
import pytest
import torch

from lvppl.chains import (
    ChainWorkspace,
    chain_log_sum,
    forward_backward,
    sample_chain,
    viterbi,
)
from lvppl.chains.arguments import checked_chain
from lvppl.chains.layout import Buffers
from lvppl.chains.methods import find_posterior
from lvppl.chains.sweep import Sweep
from lvppl.errors import ProgramError

METHODS = ["auto", "sequential", "blocked", "associative"]
KINDS = ["homogeneous", "one a sequence", "stepwise", "stepwise, one a sequence"]
B, T, K = 3, 5, 3


def factors(kind="homogeneous", B=B, T=T, K=K, dtype=torch.float64):
    shape = {
        "homogeneous": (K, K),
        "one a sequence": (B, 1, K, K),
        "stepwise": (T - 1, K, K),
        "stepwise, one a sequence": (B, T - 1, K, K),
    }[kind]
    randn = lambda *shape: 2 * torch.randn(*shape, dtype=dtype)  # noqa: E731
    return randn(B, K), randn(*shape), randn(B, T, K)


def paths(log_initial, log_transition, log_emission, lengths=None):
    """Every path of every sequence and its log-weight, (K^T, T) and (K^T, B); differentiable."""
    B, T, K = log_emission.shape
    z = torch.tensor(list(itertools.product(range(K), repeat=T)))
    log_transition = log_transition if log_transition.dim() == 4 else log_transition[None]
    log_transition = log_transition if log_transition.dim() == 4 else log_transition[None]
    log_transition = log_transition.expand(B, T - 1, K, K)
    lengths = torch.full((B,), T) if lengths is None else lengths
    columns = []
    for b in range(B):
        n = int(lengths[b])
        weight = log_emission.new_zeros(len(z))
        if n:
            weight = log_initial[b, z[:, 0]]
        for t in range(n):
            weight = weight + log_emission[b, t, z[:, t]]
            if t:
                weight = weight + log_transition[b, t - 1, z[:, t - 1], z[:, t]]
        # a path is counted once: beyond the end it stays in state 0
        weight = torch.where((z[:, n:] == 0).all(-1), weight, -math.inf)
        columns.append(weight)
    return z, torch.stack(columns, 1)


def brute_force(*factors, lengths=None):
    """ln Z (B,), marginals (B, T, K), pairwise marginals (B, T−1, K, K)."""
    z, weight = paths(*factors, lengths)
    B, T, K = factors[2].shape
    lengths = torch.full((B,), T) if lengths is None else lengths
    log_evidence = weight.logsumexp(0)
    p = (weight - log_evidence.clamp(min=-1e300)).exp()
    hot = torch.nn.functional.one_hot(z, K).to(p)
    exists = (torch.arange(T) < lengths[:, None]).to(p)
    marginals = torch.einsum("pb,ptk->btk", p, hot) * exists[..., None]
    pairs = torch.einsum("pb,pti,ptj->btij", p, hot[:, :-1], hot[:, 1:])
    return log_evidence, marginals, pairs * exists[:, 1:, None, None]


def assert_posterior(found, expected, rtol=1e-10, atol=1e-10):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def numpy_filter(log_initial, log_transition, log_emission):
    """ln Z of one long sequence, by the normalised filter; log-emissions must be moderate."""
    A, b = np.exp(log_transition.numpy()), np.exp(log_emission.numpy())
    p, logs = np.exp(log_initial.numpy()) * b[0], np.empty(len(b))
    for t in range(len(b)):
        if t:
            p = (p @ A) * b[t]
        total = p.sum()
        logs[t], p = total, p / total
    return math.fsum(np.log(logs)), p


LENGTHS = [None, torch.tensor([5, 2, 1]), torch.tensor([0, 4, 5])]


@pytest.mark.parametrize("lengths", LENGTHS, ids=["whole", "unequal", "with an empty one"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_brute_force(method, kind, lengths):
    args = factors(kind)
    found = forward_backward(*args, lengths=lengths, method=method, pairwise=True)
    expected = brute_force(*args, lengths=lengths)
    assert_posterior(found, expected)
    plain = forward_backward(*args, lengths=lengths, method=method)
    pairs = expected[2]
    want = {
        "homogeneous": lambda: pairs.sum((0, 1)),
        "one a sequence": lambda: pairs.sum(1, keepdim=True),
    }.get(kind, lambda: pairs)()
    torch.testing.assert_close(plain.transitions, want, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        chain_log_sum(*args, lengths=lengths, method=method), expected[0], rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("lengths", LENGTHS, ids=["whole", "unequal", "with an empty one"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_is_that_of_brute_force(method, kind, lengths):
    args = [x.requires_grad_() for x in factors(kind)]
    weight = torch.tensor([0.3, -2.0, 1.1], dtype=torch.float64)  # another for each sequence
    log_evidence = paths(*args, lengths)[1].logsumexp(0)
    want = torch.autograd.grad((weight * log_evidence).sum(), args)
    found = chain_log_sum(*args, lengths=lengths, method=method)
    got = torch.autograd.grad((weight * found).sum(), args)
    assert_posterior(got, want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["sequential", "associative"])
def test_second_derivatives(method, kind):
    args = [x.requires_grad_() for x in factors(kind, B=2, T=4, K=2)]
    lengths = torch.tensor([4, 3])

    def f(*args):
        return chain_log_sum(*args, lengths=lengths, method=method)

    assert torch.autograd.gradcheck(f, args)
    assert torch.autograd.gradgradcheck(f, args)


def test_hessian_with_forbidden_transitions():
    """No NaN comes out of −inf: the Hessian is that of the sum over the possible paths."""
    initial, transition, emission = factors(B=1, T=4)
    transition[0, 1] = transition[2, 0] = -math.inf
    emission[0, 2, 1] = -math.inf
    offset = torch.zeros(K, dtype=torch.float64)

    def hessian(f):
        return torch.autograd.functional.hessian(f, offset)

    got = hessian(lambda x: chain_log_sum(initial, transition + x, emission + x * x).sum())

    def brute(x):
        weight = paths(initial, transition + x, emission + x * x)[1][:, 0]
        return weight[weight > -math.inf].logsumexp(0)

    torch.testing.assert_close(got, hessian(brute), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_forbidden_states_and_transitions(method):
    initial, transition, emission = factors()
    initial[:, 1] = -math.inf
    transition[0, 1] = transition[1, 1] = transition[2, 0] = -math.inf
    emission[0, 3, 2] = emission[1, 1, :2] = -math.inf
    lengths = torch.tensor([5, 4, 3])
    for args in ((initial, transition, emission), (initial, transition[None, None], emission)):
        found = forward_backward(*args, lengths=lengths, method=method, pairwise=True)
        assert_posterior(found, brute_force(*args, lengths=lengths))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_impossible_sequence(method, kind):
    """Evidence zero, marginals zero, gradients zero; the other sequences as ever."""
    initial, transition, emission = factors(kind)
    emission[1, 2] = -math.inf
    args = [x.requires_grad_() for x in (initial, transition, emission)]
    posterior = forward_backward(*args, method=method, pairwise=True)
    assert posterior.log_evidence[1] == -math.inf
    assert (posterior.marginals[1] == 0).all() and (posterior.transitions[1] == 0).all()
    keep = torch.tensor([0, 2])
    own = transition[keep] if transition.dim() == 4 else transition
    want = brute_force(initial[keep], own, emission[keep])
    assert_posterior([x[keep] for x in posterior], want)
    found = chain_log_sum(*args, method=method)
    grads = torch.autograd.grad(found[keep].sum() + 0 * found[1].clamp(min=-1.0), args)
    assert all(grad.isfinite().all() for grad in grads)
    torch.testing.assert_close(grads[2][keep], want[1])
    assert (grads[2][1] == 0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_states_that_never_meet(method, dtype):
    """One is ahead by e^-n in the middle, the other in the end: no scale shows what underflowed."""
    n = 1000
    emission = torch.zeros(1, 2 * n, 2, dtype=dtype)
    emission[0, :n, 0] = emission[0, n:, 1] = -1
    initial = torch.tensor([0.25, 0.75], dtype=dtype).log()
    apart = torch.eye(2, dtype=dtype).log()
    found = forward_backward(initial, apart, emission, method=method)
    # a log-message of a thousand nats has three digits less than its dtype
    rtol = 2e-4 if dtype == torch.float32 else 1e-10
    want = torch.tensor([-float(n)], dtype=dtype)
    torch.testing.assert_close(found.log_evidence, want)
    marginals = torch.tensor([0.25, 0.75], dtype=dtype).expand(1, 2 * n, 2)
    torch.testing.assert_close(found.marginals, marginals, rtol=rtol, atol=0)
    counts = (2 * n - 1) * torch.tensor([[0.25, 0.0], [0.0, 0.75]], dtype=dtype)
    torch.testing.assert_close(found.transitions, counts, rtol=rtol, atol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("least", [-1.0, -150.0, -400.0, -2000.0])
def test_underflow(method, least):
    """Emissions that differ by thousands of nats, under transitions of any smallest entry."""
    initial, transition, emission = factors(B=4)
    transition = transition.log_softmax(-1)
    transition[0, 2] = least
    emission *= torch.tensor([1.0, 100.0, 1000.0, 3000.0], dtype=torch.float64)[:, None, None]
    found = forward_backward(initial, transition, emission, method=method, pairwise=True)
    assert_posterior(found, brute_force(initial, transition, emission))


@pytest.mark.parametrize("case", ["left to right", "periodic", "slow", "dead end"])
def test_long_structured_chains(case):
    """Blocks that do not forget what comes in, and zeros that a bound cannot cover."""
    K, T = 4, 1500
    initial, _, emission = factors(B=2, T=T, K=K)
    A = {
        "left to right": 0.99 * torch.eye(K) + 0.01 * torch.eye(K).roll(1, 1).triu(),
        "periodic": torch.eye(K).roll(1, 1),
        "slow": 0.9999 * torch.eye(K) + 0.0001,
        "dead end": torch.ones(K, K) * torch.tensor([[1.0], [1.0], [1.0], [0.0]]),
    }[case]
    transition = A.double().log()
    emission *= 0.01
    lengths = torch.tensor([T, 1111])
    args = (initial, transition, emission)
    want = forward_backward(*args, lengths=lengths, method="associative", pairwise=True)
    for method in ("auto", "sequential", "blocked"):
        found = forward_backward(*args, lengths=lengths, method=method, pairwise=True)
        assert_posterior(found, want)


def scaled(*args, lengths=None, method="auto"):
    """Whether the chain is done in scaled space, and in how many blocks."""
    posterior = find_posterior(checked_chain(*args, lengths), method)
    return getattr(posterior, "layout", None)


def test_which_space_is_used():
    """The fast path is really taken where it may be, and left where it must be."""
    args = factors(B=2, T=2000, K=4)
    assert scaled(*args).N > 1 and scaled(*args, method="sequential").N == 1
    assert scaled(*factors("stepwise", B=2, T=2000, K=4)).N > 1
    left_to_right = (torch.eye(4) + torch.eye(4).roll(1, 1).triu()).double().log()
    assert scaled(args[0], left_to_right, 0.1 * args[2]).N > 1
    slow = (0.9999 * torch.eye(4).double() + 1e-4).log()
    assert scaled(args[0], slow, 0.01 * args[2]).N > 1
    drift = torch.arange(4) * torch.ones(2, 2000, 1).double()
    assert scaled(args[0], torch.eye(4).double().log(), drift) is None
    assert scaled(*args, method="associative") is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_long_sequence(dtype):
    """T = 100,000, against a filter in NumPy and against the other methods."""
    K, T = 8, 100_000
    initial, transition, emission = factors(B=1, T=T, K=K)
    initial, transition = initial.log_softmax(-1)[0], transition.log_softmax(-1)
    emission = emission[0]
    want, last = numpy_filter(initial, transition, emission)
    rtol = 1e-10 if dtype == torch.float64 else 1e-5
    args = [x.to(dtype) for x in (initial, transition, emission)]
    found = forward_backward(*args)
    assert abs(float(found.log_evidence) / want - 1) < rtol
    torch.testing.assert_close(
        found.marginals[-1].double(), torch.tensor(last), rtol=rtol, atol=rtol
    )
    exact = forward_backward(initial, transition, emission, method="associative")
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=10 * rtol, atol=rtol)
    assert abs(float(found.transitions.double().sum()) / (T - 1) - 1) < rtol


def test_padding_has_no_influence():
    """Not even NaN and infinity, in value or gradient; of stepwise transitions as well."""
    lengths = torch.tensor([3, 5, 1])
    exists = torch.arange(T) < lengths[:, None]
    for kind in ("homogeneous", "stepwise, one a sequence"):
        initial, transition, emission = factors(kind)
        results = []
        for fill in (0.0, math.nan, math.inf):
            padded = torch.where(exists[..., None], emission, fill)
            step = transition
            if transition.dim() == 4:
                step = torch.where(exists[:, 1:, None, None], transition, fill)
            args = [x.clone().requires_grad_() for x in (initial, step, padded)]
            for method in METHODS:
                found = chain_log_sum(*args, lengths=lengths, method=method)
                grads = torch.autograd.grad(found.sum(), args)
                states, best = viterbi(*args, lengths=lengths)
                results.append((found.detach(), *grads, states.double(), best))
        for result in results[1:]:
            assert_posterior(result, results[0])


def test_workspace_gives_the_same():
    workspace = ChainWorkspace()
    for seed in range(3):
        slow = (0.9999 * torch.eye(K).double() + 1e-4).log()
        initial, _, emission = factors(T=1000)
        cases = factors(), factors(T=300), factors("stepwise", T=300), (initial, slow, emission)
        for args in cases:
            args = [x + seed for x in args]
            want = forward_backward(*args)
            for _ in range(2):
                found = forward_backward(*args, workspace=workspace)
                assert_posterior(found, want, rtol=1e-11, atol=1e-11)
    args = factors()
    first = forward_backward(*args, workspace=workspace)
    second = forward_backward(*args, workspace=workspace)
    assert first.marginals.data_ptr() == second.marginals.data_ptr()


class Counted:
    """How often buffers are allocated, and blocks swept, while ``find_posterior`` runs."""

    def __init__(self, monkeypatch):
        self.buffers = self.sweeps = 0
        allocate, run = Buffers.__init__, Sweep.run

        def allocated(buffers, *args):
            self.buffers += 1
            allocate(buffers, *args)

        def swept(sweep):
            self.sweeps += 1
            run(sweep)

        monkeypatch.setattr(Buffers, "__init__", allocated)
        monkeypatch.setattr(Sweep, "run", swept)

    def of(self, args, workspace, lengths=None):
        """(buffers, sweeps, blocks) of one call."""
        self.buffers = self.sweeps = 0
        posterior = find_posterior(checked_chain(*args, lengths), "auto", workspace)
        return self.buffers, self.sweeps, posterior.layout.N


def long_chains(T=1984, K=4):
    """One that forgets within a block of 64 steps, one that does not, and the latter stepwise."""
    initial, transition, emission = factors(B=2, T=T, K=K)
    transition = (4 * torch.randn(K, K)).double()  # its spread asks for more frequent rescaling
    unforgetting = (0.9999 * torch.eye(K).double() + 1e-4).log()
    still = 0.001 * emission
    return (
        (initial, transition, emission),
        (initial, unforgetting, still),
        (initial, unforgetting.expand(T - 1, K, K), still),
    )


def test_a_workspace_allocates_once_and_sweeps_no_more_than_it_must(monkeypatch):
    forgetting, unforgetting, _ = long_chains()
    counted, workspace = Counted(monkeypatch), ChainWorkspace()
    blocks = counted.of(forgetting, None)[2]
    assert blocks > 1
    assert counted.of(forgetting, workspace) == (1, 2, blocks)
    for _ in range(3):
        assert counted.of(forgetting, workspace) == (0, 2, blocks)
    # other transitions are rescaled at other steps, in the same memory
    assert counted.of(unforgetting, workspace) == (0, 3, blocks)  # two guesses, then products
    for _ in range(3):
        assert counted.of(unforgetting, workspace) == (0, 1, blocks)
    lengths = torch.tensor([1984, 1234])
    assert counted.of(unforgetting, workspace, lengths) == (0, 2, blocks)


def test_blocks_that_did_not_forget_are_tried_again(monkeypatch):
    """A chain that has begun to forget is not swept for products for ever."""
    forgetting, unforgetting, stepwise = long_chains()
    counted, workspace = Counted(monkeypatch), ChainWorkspace()
    for args in (unforgetting, stepwise):
        counted.of(args, workspace)
    stepwise = (forgetting[0], forgetting[1].expand(1983, 4, 4), forgetting[2])
    shared, own = ([counted.of(a, workspace) for _ in range(20)] for a in (forgetting, stepwise))
    assert [sweeps for _, sweeps, _ in shared[16:]] == [2] * 4
    assert [blocks for _, _, blocks in own] == [1] * 16 + [shared[0][2]] * 4


def test_chains_of_two_kinds_in_one_workspace_do_not_learn_from_each_other(monkeypatch):
    forgetting, unforgetting, stepwise = long_chains()
    own = (forgetting[0], forgetting[1].expand(1983, 4, 4), forgetting[2])
    counted, workspace = Counted(monkeypatch), ChainWorkspace()
    counted.of(unforgetting, workspace)
    buffers, sweeps, blocks = counted.of(own, workspace)
    assert (buffers, sweeps) == (0, 2) and blocks > 1
    workspace = ChainWorkspace()
    counted.of(stepwise, workspace)
    assert counted.of(forgetting, workspace)[1:] == (2, blocks)


def test_stepwise_chains_that_do_not_forget_keep_their_buffers(monkeypatch):
    """They are swept whole: blocks in vain once, and no buffers for two layouts in turn."""
    *_, stepwise = long_chains()
    counted, workspace = Counted(monkeypatch), ChainWorkspace()
    assert counted.of(stepwise, workspace) == (2, 3, 1)  # blocks twice, then the whole
    for _ in range(3):
        assert counted.of(stepwise, workspace) == (0, 1, 1)


@pytest.mark.parametrize("lengths", LENGTHS, ids=["whole", "unequal", "with an empty one"])
@pytest.mark.parametrize("kind", KINDS)
def test_viterbi(kind, lengths):
    args = factors(kind)
    z, weight = paths(*args, lengths)
    want, index = weight.max(0)
    states, log_joint = viterbi(*args, lengths=lengths)
    torch.testing.assert_close(log_joint, want, rtol=1e-12, atol=1e-12)
    assert states.dtype == torch.int64 and (states == z[index]).all()


def test_viterbi_ties_and_impossible_sequences():
    flat = torch.zeros(2, 6, 3, dtype=torch.float64)
    flat[1, 2] = -math.inf
    states, log_joint = viterbi(torch.zeros(3).double(), torch.zeros(3, 3).double(), flat)
    assert (states == 0).all() and log_joint.tolist() == [0.0, -math.inf]
    only = torch.tensor([-math.inf, 0.0, 0.0]).double()
    states, _ = viterbi(only, torch.zeros(3, 3).double(), flat[:1])
    assert states.tolist() == [[1, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("kind", KINDS)
def test_sample_frequencies(kind):
    """Of each of the K^T paths: within 5.5 standard errors; 486 paths fail with chance 2e-5."""
    initial, transition, emission = factors(kind, B=2)
    transition[..., 0, 1] = -math.inf
    lengths = torch.tensor([5, 3])
    _, weight = paths(initial, transition, emission, lengths)
    p = weight.softmax(0).T  # (B, paths)
    n = 20_000
    generator = torch.Generator().manual_seed(1)
    states = sample_chain(
        initial, transition, emission, lengths=lengths, num_samples=n, generator=generator
    )
    assert states.shape == (n, 2, T)
    code = (states * K ** torch.arange(T - 1, -1, -1)).sum(-1)
    frequency = torch.stack([code[:, b].bincount(minlength=K**T) / n for b in range(2)])
    assert (frequency[p == 0] == 0).all()
    # the normal approximation needs a few expected counts: rare paths get 12 of them
    assert ((frequency - p).abs() <= 5.5 * (p * (1 - p) / n).sqrt() + 12 / n * (p < 20 / n)).all()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    again = sample_chain(
        initial,
        transition,
        emission,
        lengths=lengths,
        num_samples=n,
        generator=torch.Generator().manual_seed(1),
    )
    assert (again == states).all() and (torch.get_rng_state() == before).all()


def test_batch_shapes_broadcast():
    initial, transition, emission = factors(B=6)
    emission = emission.reshape(2, 3, T, K)
    lengths = torch.tensor([5, 3, 2])
    found = forward_backward(initial[0], transition, emission, lengths=lengths)
    assert found.log_evidence.shape == (2, 3) and found.marginals.shape == (2, 3, T, K)
    for b in range(2):
        want = forward_backward(initial[0], transition, emission[b], lengths=lengths)
        torch.testing.assert_close(found.log_evidence[b], want.log_evidence)
        torch.testing.assert_close(found.marginals[b], want.marginals)
    single = forward_backward(initial[0], transition, emission[0, 0])
    assert single.log_evidence.shape == () and single.marginals.shape == (T, K)
    torch.testing.assert_close(single.log_evidence, found.log_evidence[0, 0])
    states, _ = viterbi(initial[0], transition, emission, lengths=lengths)
    assert states.shape == (2, 3, T)
    assert sample_chain(initial[0], transition, emission, num_samples=4).shape == (4, 2, 3, T)


def test_a_single_step():
    initial, transition, emission = factors(T=1)
    for method in METHODS:
        found = forward_backward(initial, transition, emission, method=method)
        logits = initial + emission[:, 0]
        torch.testing.assert_close(found.log_evidence, logits.logsumexp(-1))
        torch.testing.assert_close(found.marginals[:, 0], logits.softmax(-1))
        assert (found.transitions == 0).all()


def test_can_be_traced_into_a_graph():
    """Traced once, the graph follows the numbers: no branch on them was baked in."""
    from torch.fx.experimental.proxy_tensor import make_fx

    def f(*args):
        args = [x.detach().requires_grad_() for x in args]
        value = chain_log_sum(*args).sum()
        return (value, *torch.autograd.grad(value, args))

    graph = make_fx(f)(*factors())
    args = factors()
    args[1][0, 1] = -math.inf
    args[2].mul_(500)
    assert_posterior(graph(*args), f(*args))


def test_hmmlearn_agrees():
    hmm = pytest.importorskip("hmmlearn.hmm")
    initial, transition, emission = factors(B=4, T=60, K=3)
    initial, transition = initial[0].log_softmax(-1), transition.log_softmax(-1)

    class Given(hmm.CategoricalHMM):
        def _compute_log_likelihood(self, X):
            return emission.numpy().reshape(-1, 3)[X[:, 0]]

    peer = Given(3, implementation="log")
    peer.startprob_, peer.transmat_ = initial.exp().numpy(), transition.exp().numpy()
    peer.emissionprob_, peer.n_features = np.full((3, 240), 1 / 240), 240
    value, posteriors = peer.score_samples(np.arange(240)[:, None], lengths=[60] * 4)
    found = forward_backward(initial, transition, emission)
    torch.testing.assert_close(found.log_evidence.sum(), torch.tensor(value).double())
    torch.testing.assert_close(found.marginals.reshape(-1, 3), torch.tensor(posteriors))


def test_refusals():
    initial, transition, emission = factors()
    cases = [
        ((initial[..., :2], transition, emission), {}, r"must have shapes .*\(3, 2\)"),
        ((initial, transition[0], emission), {}, "at least 2 dimension"),
        ((initial, transition.expand(7, 3, 3), emission), {}, r"T = 5.*\(7, 3, 3\).*unsqueeze"),
        ((initial, transition, emission.float()), {}, "all float32 or all float64"),
        ((initial.half(), transition.half(), emission.half()), {}, "float16"),
        ((initial[:2], transition, emission), {}, "must broadcast"),
        ((initial, transition, emission), {"lengths": torch.tensor([1, 2, 6])}, r"0 … 5.*1 to 6"),
        ((initial, transition, emission), {"lengths": torch.ones(3)}, "must be integers"),
        ((initial, transition, emission), {"method": "fast"}, "one of auto, sequential"),
        ((initial, transition, emission[:, :0]), {}, "at least 1"),
    ]
    for args, options, match in cases:
        with pytest.raises(ProgramError, match=match):
            forward_backward(*args, **options)
        with pytest.raises(ProgramError, match=match):
            chain_log_sum(*args, **options)
    with pytest.raises(ProgramError, match="possible path"):
        sample_chain(initial, transition, torch.full_like(emission, -math.inf))


def test_no_sequences_have_no_posteriors():
    initial, transition, emission = torch.randn(3), torch.randn(3, 3), torch.zeros(0, 5, 3)
    found = forward_backward(initial, transition, emission)
    assert found.log_evidence.shape == (0,) and found.marginals.shape == (0, 5, 3)
    assert torch.equal(found.transitions, torch.zeros(3, 3))
    assert chain_log_sum(initial, transition, emission).shape == (0,)
    assert sample_chain(initial, transition, emission).shape == (1, 0, 5)

"""The guide's recipes run as they are written, and agree with scikit-learn and with formulas."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from pyro import poutine
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture as SklearnMixture

GUIDE = Path(__file__).resolve().parent.parent / "docs" / "guide.md"
RECIPES = (
    "Coming from scikit-learn and hmmlearn",
    "A hidden Markov model, end to end",
    "Predicting with a mixture of regressions",
)


def section(title: str) -> str:
    (text,) = re.findall(
        rf"^## {title}\n(.*?)(?=^## )", GUIDE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return text


def code_of(title: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", section(title), re.DOTALL)


def here(library: str, call: str) -> list[str]:
    """The code beside a call of another library, in the table that the library has."""
    table = section(RECIPES[0]).split(f"| {library} |")[1].split("\n\n")[0]
    (row,) = [row for row in table.splitlines() if f"`{call}`" in row.split(" | ")[0]]
    return re.findall(r"`([^`]+)`", row.split(" | ")[1])


def ran(upto: str) -> dict:
    """The names after the recipes up to and with this one, one after another."""
    scope: dict = {}
    for title in RECIPES[: RECIPES.index(upto) + 1]:
        for block in code_of(title):
            exec(compile(block, title, "exec"), scope)
    return scope


def test_each_row_of_the_table_is_scikit_learn_s():
    """What the table's right column says, evaluated, beside what the left one does."""
    names = ran(RECIPES[0])
    y = names["y"].double().numpy()
    peer = SklearnMixture(2, n_init=5, tol=1e-10, max_iter=1000, random_state=0).fit(y)
    means = names["mixture"].loc.detach().numpy()
    order = [int(np.linalg.norm(peer.means_ - mean, axis=1).argmin()) for mean in means]
    assert sorted(order) == [0, 1]

    def value(code: str):
        found = eval(code, names | {"D": 2, "n": 50})
        return found.detach().numpy() if isinstance(found, torch.Tensor) else found

    close = {"rtol": 1e-3, "atol": 1e-3}  # float32 here, reg_covar there
    per_datum, mean = here("scikit-learn", ".score_samples(X)")
    np.testing.assert_allclose(value(per_datum), peer.score_samples(y), **close)
    assert value(mean) == pytest.approx(peer.score(y), rel=1e-4)
    (proba,) = here("scikit-learn", ".predict_proba(X)")
    np.testing.assert_allclose(value(proba), peer.predict_proba(y)[:, order], **close)
    (labels,) = here("scikit-learn", ".predict(X)")
    assert (np.array(order)[value(labels)] == peer.predict(y)).all()
    bic, aic = here("scikit-learn", ".bic(X)")
    assert value(bic) == pytest.approx(peer.bic(y), rel=1e-5)
    assert value(aic) == pytest.approx(peer.aic(y), rel=1e-5)
    assert names["bic"] == pytest.approx(peer.bic(y), rel=1e-5)
    weights, locations, _ = here("scikit-learn", ".weights_")
    np.testing.assert_allclose(value(weights), peer.weights_[order], **close)
    np.testing.assert_allclose(value(locations), peer.means_[order], **close)
    np.testing.assert_allclose(value("covariances"), peer.covariances_[order], **close)
    status, steps, bound = here("scikit-learn", ".converged_")
    assert (value(status) == "converged") == peer.converged_ and value(steps) > 1
    assert value(bound) == pytest.approx(peer.lower_bound_, rel=1e-4)
    (sample,) = here("scikit-learn", ".sample(n)")
    assert value(sample).shape == (50, 2)

    k_means = KMeans(2, n_init=5, random_state=0).fit(y)
    assert value("inertia") == pytest.approx(k_means.inertia_, rel=1e-4)
    nearest, centres, _ = here("scikit-learn", ".labels_")
    np.testing.assert_allclose(
        np.sort(value(centres), 0), np.sort(k_means.cluster_centers_, 0), 1e-3
    )
    agreement = (value(nearest) == k_means.labels_).mean()
    assert agreement in (0.0, 1.0)  # the same clusters, in either order


def test_the_chain_answers_as_its_distribution_does():
    """Every answer of the recipe, and of hmmlearn's table, from the chain's own formulas."""
    names = ran(RECIPES[1])
    chain, y = names["chain"], names["y"][None]
    names |= {"model": chain, "y": y, "lengths": None, "D": 2, "n": 40}
    with torch.no_grad():
        fn = poutine.trace(chain).get_trace(y).nodes["y"]["fn"]
        path, log_joint = fn.viterbi(y)
        forward = fn.posterior(y)
    (score,) = here("hmmlearn", ".score(X, lengths)")
    assert eval(score, names) == pytest.approx(float(forward.log_evidence), abs=1e-2)
    best, states, joint = here("hmmlearn", ".decode(X, lengths)")
    names["best"] = eval(best.partition(" = ")[2], names)
    assert torch.equal(eval(states, names), path) and torch.equal(names["path"], path[0])
    assert float(eval(joint, names)) == pytest.approx(float(log_joint), abs=1e-2)
    (marginals,) = here("hmmlearn", ".predict_proba(X, lengths)")
    torch.testing.assert_close(eval(marginals, names)[0], names["marginals"])
    torch.testing.assert_close(names["marginals"], forward.marginals[0], atol=1e-4, rtol=0)
    (sample,) = here("hmmlearn", ".sample(n)")
    assert eval(sample, names).shape == (40, 2)

    filtered = fn.filter(y).probs[0]  # at the last step, what was seen is all there is
    ahead = filtered @ chain.transition
    torch.testing.assert_close(names["next_mean"], ahead @ chain.emission.loc, rtol=1e-4, atol=0)
    short = int(chain.emission.loc[:, 0].argmin())
    assert float(chain.transition.detach()[short, 1 - short]) == pytest.approx(0.94, abs=0.005)


def test_imputations_are_near_the_best_there_are():
    """Against E[y | observed] under the law of the recipe's data, which it had to learn."""
    scope: dict = {}
    for block in code_of("Missing values"):
        exec(compile(block, "Missing values", "exec"), scope)
    torch.manual_seed(0)
    whole = torch.randn(200, 1) + 0.5 * torch.randn(200, 6)  # as in the recipe
    y, complete, tables = scope["y"], scope["complete"], scope["tables"]
    holes = y.isnan()
    assert torch.equal(y[~holes], whole[~holes])
    precision = 4.0 * (~holes).sum(1, keepdim=True)
    best = (4.0 * y.nan_to_num(0.0).sum(1, keepdim=True) / (1 + precision)).expand(200, 6)
    errors = [float((guess - whole)[holes].square().mean()) for guess in (complete, best)]
    assert errors[0] < 1.15 * errors[1]
    assert torch.equal(complete[~holes], y[~holes])
    assert torch.equal(tables[:, ~holes], y[~holes].expand(5, -1))
    spread = ((complete - whole) / scope["spread"])[holes].square().mean()
    assert 0.7 < float(spread) < 1.3


def test_predictions_are_the_formula_s():
    """Draws within five standard errors of Σ π_k (level_k + slope_k x); a gate predicts better."""
    names = ran(RECIPES[2])
    fit, x, lasts = names["fit"], names["x"], names["lasts"]
    params = fit.params
    means = params["level"] + params["slope"] * names["x_new"][:, None]
    want = means @ params["weights"]
    drawn = names["drawn"].predictive_mean["y"]
    error = drawn.std(0) / len(drawn) ** 0.5
    assert ((drawn.mean(0) - want).abs() < 5 * error).all()
    both = names["drawn"].predictive["y"]
    levels = torch.tensor([0.05, 0.95])
    quantiles = both.quantile(levels, 0)  # of the mixture, within five standard errors
    below = torch.distributions.Normal(means, params["scale"]).cdf(quantiles[..., None])
    error = (levels * (1 - levels) / len(both)).sqrt()[:, None]
    assert ((below @ params["weights"] - levels[:, None]).abs() < 5 * error).all()

    with torch.no_grad():
        by_gate = names["experts"].mean(x[:, None])[:, 0]
    by_weights = (params["level"] + params["slope"] * x[:, None]) @ params["weights"]
    line = torch.stack([torch.ones_like(x), x], 1)
    by_line = line @ torch.linalg.lstsq(line, lasts[:, None]).solution[:, 0]
    errors = [float((lasts - mean).square().mean()) for mean in (by_gate, by_line, by_weights)]
    assert errors == sorted(errors)
    assert names["predicted"].shape == (2, 1)

"""Do stated errors hold? 500 repetitions of programs whose ln p(y) is exact.

Whether an interval may be trusted is itself estimated, by k-hat, from the same draws. So two things
are asked of each datum: where at least half of its repetitions come without a warning, these cover
the truth as often as they say; and a repetition that misses it without a warning is no more
frequent than a miss of an honest interval.
"""

import math
import warnings

import pytest
import torch

from lvppl.inference.likelihood import log_likelihood
from tests.programs import PROGRAMS

pytestmark = pytest.mark.slow

REPEATS, NUMBER = 500, 1000
NAMES = (
    "normal_normal",
    "masked_observations",
    "two_observed_sites",
    "two_layer_top_down",
    "two_layer_bottom_up",
    "nested_plates",
    "probabilistic_pca",
    "gamma_exponential",
    "gamma_poisson",
    "poisson_score",
    "score_then_pathwise",
    "enumerated_then_pathwise",
    "score_in_replicates",
    "discrete_and_continuous",
)
PROPOSALS = {
    "guide": {},
    "prior": {"estimator": "prior"},
    "both": {"defensive": 0.2},
}


def estimated(name, proposal):
    """The estimate and the exact ln p(y); a datum's repetitions are rows of its own draws."""
    started = PROGRAMS[name].start(torch.float64, REPEATS)
    model, guide, *args = started.call
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimate = log_likelihood(
            model, *args, guide=guide, num_samples=NUMBER, seed=11, **PROPOSALS[proposal]
        )
    return estimate, started.oracle().log_evidence


def by_datum(values):
    """(repetitions, data): data are tiled."""
    return values.reshape(REPEATS, -1)


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("name", NAMES)
def test_stated_errors_cover_the_truth_or_a_warning_says_so(name, proposal):
    if (name, proposal) == ("enumerated_then_pathwise", "both"):
        pytest.skip("a guide with enumerated sites is refused")
    estimate, truth = estimated(name, proposal)
    assert estimate.num_data == truth.numel()
    missed = by_datum((estimate.log_prob - truth).abs() > 1.96 * estimate.std_error)
    warned = torch.zeros(estimate.num_data, dtype=torch.bool)
    warned[estimate.flagged] = warned[estimate.rough] = True
    quiet = by_datum(~warned & (estimate.std_error < 0.1))
    exact = by_datum(estimate.std_error).amax(0) < 1e-12  # a weight that is the same at each draw
    assert (by_datum(estimate.log_prob - truth)[:, exact].abs() < 1e-9).all()
    for miss, calm in zip(missed[:, ~exact].T, quiet[:, ~exact].T, strict=True):
        assert (miss & calm).double().mean() <= 0.09
        if calm.double().mean() >= 0.5:
            covered = 1 - miss[calm].double().mean().item()
            assert 0.91 <= covered <= 0.985


def test_the_warnings_are_needed():
    """A guide far too narrow for a datum: one interval in five misses, and warnings tell."""
    estimate, truth = estimated("masked_observations", "guide")
    missed = by_datum((estimate.log_prob - truth).abs() > 1.96 * estimate.std_error)[:, 1]
    assert missed.double().mean() > 0.15
    mixed, _ = estimated("masked_observations", "both")
    error = by_datum((mixed.log_prob - truth) / mixed.std_error)[:, 1]
    assert abs(error.square().mean() - 1) < 4.5 * math.sqrt(2 / REPEATS) + 0.1
    assert by_datum(mixed.khat)[:, 1].median() < 0.5 < by_datum(estimate.khat)[:, 1].median()

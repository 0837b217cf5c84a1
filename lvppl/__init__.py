"""lvppl: latent variable models in Pyro, as losses and inference routines over one identity.

For a generative program p(z, y) and a guide q(z | y),

    ln p(y) = E_q [ ln p(z, y) / q(z | y) ] + KL( q(z | y), p(z | y) )

Write model and guide as ordinary Pyro programs, then check, fit, measure and inspect:

    print(lvppl.check(model, guide, y))
    fit = lvppl.SVI(model, guide, objective=lvppl.ELBO()).fit(y, num_epochs=50, batch_size=100)
    print(fit.log_likelihood(y_test, num_samples=5000))
    lvppl.to_arviz(fit, y_test)
"""

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import Any as _Any

from lvppl import data
from lvppl.checks import CheckReport, check
from lvppl.errors import ProgramError
from lvppl.evidence import ExactPosterior, LogEvidence, Moments, log_evidence, posterior
from lvppl.inference.amortization import amortization_gap
from lvppl.inference.em import EM
from lvppl.inference.em_fit import EMFit
from lvppl.inference.fit import Fit
from lvppl.inference.gap_record import Gaps
from lvppl.inference.gaps import gaps
from lvppl.inference.gradients import GradientAudit, audit_gradients
from lvppl.inference.imputation import Imputation, impute
from lvppl.inference.likelihood import LikelihoodComparison, LikelihoodEstimate, log_likelihood
from lvppl.inference.likelihood.annealed import Annealing, bidirectional
from lvppl.inference.svi import SVI
from lvppl.inspection.arviz import to_arviz
from lvppl.io import load, save
from lvppl.objectives import (
    ELBO,
    IWAE,
    CyclicSchedule,
    HardELBO,
    LinearSchedule,
    Objective,
    RateDistortion,
    Report,
    ReweightedWakeSleep,
)
from lvppl.terms import Terms, trace_terms

__all__ = [
    "ELBO",
    "EM",
    "IWAE",
    "SVI",
    "Annealing",
    "CheckReport",
    "CyclicSchedule",
    "EMFit",
    "ExactPosterior",
    "Fit",
    "Gaps",
    "GradientAudit",
    "HardELBO",
    "Imputation",
    "LikelihoodComparison",
    "LikelihoodEstimate",
    "LinearSchedule",
    "LogEvidence",
    "Moments",
    "Objective",
    "ProgramError",
    "RateDistortion",
    "Report",
    "ReweightedWakeSleep",
    "Terms",
    "amortization_gap",
    "audit_gradients",
    "bidirectional",
    "check",
    "data",
    "gaps",
    "impute",
    "load",
    "log_evidence",
    "log_likelihood",
    "posterior",
    "save",
    "to_arviz",
    "trace_terms",
]

# In a source tree models/ and guides/ lie beside this folder; python started there finds this
# folder before an installed lvppl, and lvppl.models must be found all the same.
_tree = _Path(__file__).resolve().parent.parent
if (_tree / "setup.cfg").is_file() and (_tree / "models" / "__init__.py").is_file():
    __path__.append(str(_tree))


def __getattr__(name: str) -> _Any:
    """The user's side of the package, imported when it is asked for."""
    if name in ("guides", "models"):
        return _import_module(f"lvppl.{name}")
    raise AttributeError(f"module 'lvppl' has no attribute {name!r}")

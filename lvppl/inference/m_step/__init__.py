"""M-steps in closed form, discovered by probing a program.

``weighted.py``    the sites of Q, weighted by the posterior
``entries.py``     parameters as rows of entries, and the images distributions see of them
``families.py``    the distributions whose maximum is known
``bindings.py``    which entry is which argument
``cells.py``, ``statistics.py``    sufficient statistics
``priors.py``      conjugate priors as pseudo-statistics
``forms.py``       the maximisers
``choice.py``, ``table.py``   how each parameter is maximised, and the table that says so
``plan.py``        one whole M-step
"""

from lvppl.inference.m_step.plan import MStep
from lvppl.inference.m_step.table import MStepTable, Step

__all__ = ["MStep", "MStepTable", "Step"]

"""M-steps in closed form, discovered by probing a program.

``weighted.py``    the sites of Q, weighted by the posterior
``entries.py``     parameters as rows of entries, and the images distributions see of them
``families.py``    the distributions whose maximum is known
``bindings.py``    which entry is which argument
``cells.py``, ``statistics.py``    sufficient statistics
``priors.py``      conjugate priors as pseudo-statistics
``forms.py``       the maximisers
``plan.py``        the choice for each parameter, its table, and one whole M-step
"""

from lvppl.inference.m_step.plan import MStep, MStepTable, Step

__all__ = ["MStep", "MStepTable", "Step"]

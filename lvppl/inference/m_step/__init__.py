"""M-steps in closed form, discovered by probing a program.

``weighted.py``    the sites of Q, weighted by the posterior
``entries.py``     parameters as rows of entries, and the images distributions see of them
``families.py``    the distributions whose maximum is known
``arguments.py``   what an argument of a distribution may be bound to
``bindings.py``, ``search.py``, ``affine.py``    which entry is which argument: probing
``cells.py``, ``statistics.py``    sufficient statistics
``gathering.py``, ``counts.py``, ``moments.py``, ``least_squares.py``    from sites to statistics
``priors.py``      conjugate priors as pseudo-statistics
``forms.py``       the maximisers
``choice.py``, ``separation.py``, ``table.py``    how each parameter is maximised: formula or
                   gradient, jointly or given others; and the table that says so
``floors.py``, ``bounds.py``    the least variances
``plan.py``        one whole M-step
``averaging.py``   the statistics of online EM
"""

from lvppl.inference.m_step.plan import MStep
from lvppl.inference.m_step.table import MStepTable, Step

__all__ = ["MStep", "MStepTable", "Step"]

"""How good the gradients of objectives are.

``audit.py`` the front door · ``parameters.py`` what is differentiated · ``moments.py`` running
moments · ``exact.py`` gradients without sampling · ``record.py`` the audit.
"""

from lvppl.inference.gradients.audit import audit_gradients
from lvppl.inference.gradients.record import GradientAudit, GradientRow

__all__ = ["GradientAudit", "GradientRow", "audit_gradients"]

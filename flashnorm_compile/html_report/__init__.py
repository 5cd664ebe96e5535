"""The report of ``explain`` as one self-contained HTML page: plan, costs, refusals, and the typed joint graph by module.

The page asks nothing of the network. Its graph is stored as data and turned into elements only where a reader opens it.
"""

from .page import report_page
from .recorder import record

__all__ = ["record", "report_page"]

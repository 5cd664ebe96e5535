"""Privacy accounting: what was released, what it cost, and how much noise a budget asks for.

Counting and the ledger need nothing but this package; epsilon needs ``dp-accounting``, the extra ``accounting``.
"""

from .calibrate import calibrate, calibrate_steps, planned_epsilon
from .ledger import Ledger, read_ledger
from .mechanism import History, Mechanism, Release, Sampling
from .statement import Spent, spent

__all__ = [
    "History",
    "Ledger",
    "Mechanism",
    "Release",
    "Sampling",
    "Spent",
    "calibrate",
    "calibrate_steps",
    "planned_epsilon",
    "read_ledger",
    "spent",
]

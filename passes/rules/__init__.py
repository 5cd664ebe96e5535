"""One rule per ATen operator or family. Importing this package fills the table."""

from . import blocks, collectives, contractions, indexing, pointwise, reductions, views
from .registry import RULES, Context, Result, Rule, register_rule, rule

__all__ = [
    "RULES",
    "Context",
    "Result",
    "Rule",
    "blocks",
    "collectives",
    "contractions",
    "indexing",
    "pointwise",
    "reductions",
    "register_rule",
    "rule",
    "views",
]

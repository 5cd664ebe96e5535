"""Differentially private training as a ``torch.compile`` backend.

    model = torch.compile(model, backend="flashnorm", options={"max_grad_norm": 1.0, "noise_multiplier": 0.8})

After ``backward()`` every ``p.grad`` holds the clipped and noised sum of per-sample gradients, for any model that compiles; or
compilation fails with an error that names the reason.
"""

from . import config
from .explain import Report, explain
from .options import Options
from .passes.errors import (
    BatchDimensionError,
    GraphBreakError,
    OptionsError,
    PrivacyError,
    SampleMixingError,
    UnprotectedGradientError,
    UnsupportedGraphError,
)
from .passes.normalize_loss import LossNormalizerWarning
from .passes.rules import register_rule
from .state import PrivacyState, StepStatistics, privacy

__version__ = "0.1.0"
__all__ = [
    "BatchDimensionError",
    "GraphBreakError",
    "LossNormalizerWarning",
    "Options",
    "OptionsError",
    "PrivacyError",
    "PrivacyState",
    "Report",
    "SampleMixingError",
    "StepStatistics",
    "UnprotectedGradientError",
    "UnsupportedGraphError",
    "config",
    "explain",
    "privacy",
    "register_rule",
]

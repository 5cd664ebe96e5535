"""Differentially private training as a ``torch.compile`` backend.

    model = torch.compile(model, backend="flashnorm", options={"max_grad_norm": 1.0, "noise_multiplier": 0.8})

After ``backward()`` every ``p.grad`` holds the clipped and noised sum of per-sample gradients, for any model that compiles; or
compilation fails with an error that names the reason.
"""

from . import config
from .accounting import Spent, calibrate, read_ledger
from .data import PoissonSampler, private_dataloader
from .distributed import fully_shard, replicate
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
    "PoissonSampler",
    "PrivacyError",
    "PrivacyState",
    "Report",
    "SampleMixingError",
    "Spent",
    "StepStatistics",
    "UnprotectedGradientError",
    "UnsupportedGraphError",
    "calibrate",
    "config",
    "explain",
    "fully_shard",
    "privacy",
    "private_dataloader",
    "read_ledger",
    "register_rule",
    "replicate",
]

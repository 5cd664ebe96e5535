"""One result of a dry run."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DryRow:
    """One contender in one case at one precision.

    `error` says why its code cannot be generated. `note` says what is not the bench's fault: a peer that refuses the model, or
    a step that depends on values, which fake tensors do not have.
    """

    suite: str
    case: str
    precision: str
    contender: str
    headline: bool = False
    clipping: str | None = None
    batch_size: int = 0
    kernels: int = 0
    """Triton kernels in the generated code."""
    library_calls: int = 0
    operators: int = 0
    """Operators of an eager step, or nodes of the compiled graphs."""
    flops: int = 0
    nbytes: int = 0
    predicted_ms: float | None = None
    """Forward, backward and AdamW."""
    predicted_peak_gib: float | None = None
    """Beyond parameters, inputs and optimizer state, as `Row.peak_bytes`."""
    oracle_dtype: torch.dtype = torch.float64
    seconds: float = 0.0
    """What it took here."""
    error: str | None = None
    note: str | None = None

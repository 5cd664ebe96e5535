"""One result of a dry run, and the files that hold them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DryRow:
    """One contender in one case at one precision.

    `error` says why its code cannot be generated. `note` says what is not the bench's fault: a peer that refuses the model, or
    a step that depends on values, which fake tensors do not have. `checked` says how it was found out.
    """

    suite: str
    case: str
    precision: str
    contender: str
    headline: bool = False
    clipping: str | None = None
    batch_size: int = 0
    checked: str = ""
    kernels: int = 0
    """Triton kernels in the generated code."""
    operators: int = 0
    """Operators of an eager step, or nodes of the compiled graphs."""
    flops: int = 0
    nbytes: int = 0
    predicted_ms: float | None = None
    """Forward, backward and AdamW."""
    predicted_peak_gib: float | None = None
    """Beyond parameters, inputs and optimizer state, as `Row.peak_bytes`."""
    generating_s: float = 0.0
    """Processor time that generating the whole code would take here."""
    oracle_dtype: str = "float64"
    seconds: float = 0.0
    """Processor time that this row took here."""
    error: str | None = None
    note: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.suite, self.case, self.precision, self.contender


def write(rows: Iterable[DryRow], path: Path) -> None:
    """Replaces the file whole: a kill loses nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    os.replace(partial, path)


def read(path: Path) -> list[DryRow]:
    """The rows of a file, none where there is no file."""
    return [DryRow(**row) for row in json.loads(path.read_text())] if path.exists() else []

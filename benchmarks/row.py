"""One result, and the files that hold them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
LATE = "not run: "
"""How the error begins of a row whose turn did not come in time."""


@dataclass(frozen=True)
class Row:
    """One contender in one case at one precision.

    A row that failed has `error` and no times; one whose gradients did not pass the gate has `error`, `gradient_error`
    and no times. Ratios are this row's median over the named step's median, both from the same interleaved run.
    """

    suite: str
    case: str
    description: str
    contender: str
    precision: str
    sizes: str
    point: Mapping[str, int]
    error: str | None = None
    gradient_error: float | None = None
    gradient_error_allowed: float | None = None
    median_ms: float | None = None
    low_quartile_ms: float | None = None
    high_quartile_ms: float | None = None
    baseline_low_quartile_ms: float | None = None
    """The compiled non-private step in the same interleaved run, as the next two."""
    baseline_median_ms: float | None = None
    baseline_high_quartile_ms: float | None = None
    repeats: int | None = None
    ratio_to_compiled: float | None = None
    ratio_to_eager: float | None = None
    peak_bytes: int | None = None
    """Largest memory of tensors during a step, with gradients and without weights and optimizer state."""
    memory_ratio: float | None = None
    """`peak_bytes` over that of the compiled non-private step."""
    samples_per_s: float | None = None
    compile_s: float | None = None
    """Of the first step, beside the other processes that compile (`benchmarks.side_by_side`)."""
    target: float | None = None
    device: str = ""
    threads: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    @property
    def ratio_to_fastest(self) -> float | None:
        """Over the faster of the two non-private steps, compiled and eager."""
        known = [ratio for ratio in (self.ratio_to_compiled, self.ratio_to_eager) if ratio is not None]
        return max(known, default=None)

    @property
    def was_late(self) -> bool:
        return self.error is not None and self.error.startswith(LATE)

    @property
    def key(self) -> tuple[str, ...]:
        return self.suite, self.case, self.precision, self.sizes, self.contender


def write(rows: Iterable[Row], path: Path) -> None:
    """Adds rows to a JSON file, replacing those with the same key. The file is replaced whole: a kill loses nothing."""
    kept = {row.key: row for row in [*read(path), *rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps([dataclasses.asdict(row) for row in kept.values()], indent=1) + "\n")
    os.replace(partial, path)


def read(path: Path) -> list[Row]:
    """The rows of one JSON file, or of all `*.json` files in a folder; empty where there is none."""
    files = sorted(path.glob("*.json")) if path.is_dir() else [path] if path.exists() else []
    return [Row(**row) for file in files for row in json.loads(file.read_text())]

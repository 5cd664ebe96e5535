"""Rows of a benchmark that nobody ran, for tests of what is made from rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report import grouping
from benchmarks.row import Row

TIMES = {
    "inductor": 1.0,
    "eager": 1.21,
    "flashnorm": 1.07,
    "opacus": 2.31,
    "opacus ghost": 1.83,
    "vmap compiled": 1.52,
    "loop": 1.13,
}
MEMORY = {"inductor": 1.0, "eager": 1.3, "flashnorm": 1.04, "opacus": 4.2, "opacus ghost": 1.37, "vmap compiled": 3.9, "loop": 0.42}
SIZES = (256, 512, 1024)


def make(contender: str, case: str = "mlp", **changes: Any) -> Row:
    """A row whose time and memory are those of `TIMES` and `MEMORY`, with a gate that was passed."""
    time, memory = changes.pop("time", TIMES.get(contender, 1.5)), changes.pop("memory", MEMORY.get(contender, 1.5))
    compiled_ms = changes.pop("compiled_ms", 50.0)
    fields: dict[str, Any] = {
        "suite": "layers",
        "description": f"the case {case}",
        "precision": "float32",
        "sizes": "small",
        "point": {"B": 8},
        "gradient_error": 2e-7,
        "gradient_error_allowed": 1e-4,
        "median_ms": compiled_ms * time,
        "low_quartile_ms": compiled_ms * time * 0.98,
        "high_quartile_ms": compiled_ms * time * 1.03,
        "repeats": 9,
        "ratio_to_compiled": time,
        "ratio_to_eager": time / TIMES["eager"],
        "peak_bytes": int(2e8 * memory),
        "memory_ratio": memory,
        "samples_per_s": 8e3 / (compiled_ms * time),
        "compile_s": 3.0,
        "device": "Test Processor",
        "threads": 2,
        "versions": {"torch": "2.13.0"},
        "date": "2026-03-04",
    }
    return Row(case=case, contender=contender, **(fields | changes))


def failed(contender: str, error: str, case: str = "mlp", **changes: Any) -> Row:
    """A row with an error and no numbers."""
    numbers = ("median_ms", "low_quartile_ms", "high_quartile_ms", "repeats", "ratio_to_compiled", "ratio_to_eager", "peak_bytes")
    further = ("memory_ratio", "samples_per_s", "gradient_error", "gradient_error_allowed")
    return make(contender, case, time=1.0, memory=1.0, error=error, **(dict.fromkeys((*numbers, *further)) | changes))


def everybody(case: str = "mlp", **changes: Any) -> list[Row]:
    return [make(contender, case, **changes) for contender in TIMES]


def along(axis: str, values: Sequence[int], suite: str) -> list[Row]:
    """One case for each value, all contenders; the time grows with the value."""
    others = {"B": 1} if axis == "T" else {}
    return [
        make(contender, f"net-{axis.lower()}{value}", suite=suite, point={**others, axis: value}, compiled_ms=value / 10)
        for value in values
        for contender in TIMES
    ]


def only_section(rows: Sequence[Row]) -> grouping.Section:
    (section,) = grouping.sections(rows)
    return section


def replaced(rows: Sequence[Row], contender: str, **changes: Any) -> list[Row]:
    """The same rows with one contender's made anew."""
    return [make(contender, row.case, **changes) if row.contender == contender else row for row in rows]

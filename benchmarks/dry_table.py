"""The tables of a dry run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.contenders import BASELINE
from benchmarks.hopper import peaks_named
from benchmarks.hopper.budget import LIMIT_MINUTES, Gate, compile_seconds, timed_seconds
from benchmarks.hopper.rows import DryRow

_COLUMNS = ("case", "precision", "contender", "kernels", "library calls", "ms", "x", "GiB", "x", "s here")


@dataclass(frozen=True)
class RunTime:
    """Predicted seconds of a run, by what they are spent on, for a set of cases."""

    timing: float
    compiling: float
    gate: float

    @property
    def total(self) -> float:
        return self.timing + self.compiling + self.gate


def run_time(rows: Sequence[DryRow], device: str = "H200") -> RunTime:
    """Of a whole run, one precision of one case after the other."""
    timing = compiling = gate = 0.0
    for group in _groups(rows):
        baseline = next((row for row in group if row.contender == BASELINE and row.predicted_ms), None)
        if baseline is None:
            continue
        done = [row for row in group if row.predicted_ms is not None]
        ms = baseline.predicted_ms or 0.0
        timing += sum(timed_seconds((row.predicted_ms or 0.0) / 1e3, ms / 1e3) for row in done)
        compiling += sum(compile_seconds(row.seconds, row.kernels) for row in done if row.kernels)
        clippings = len({row.clipping for row in done if row.clipping})
        oracle = Gate(baseline.flops, baseline.operators, baseline.batch_size, clippings, baseline.oracle_dtype)
        gate += oracle.seconds(peaks_named(device)) + 2 * sum((row.predicted_ms or 0.0) / 1e3 for row in done)
    return RunTime(timing, compiling, gate)


def table(rows: Sequence[DryRow]) -> RenderableType:
    """All rows with ratios to the compiled non-private step, then the predicted time of the run against its limit."""
    found = Table(*_COLUMNS, title="Dry run: predicted by rooflines, nothing was measured")
    for column in found.columns[3:]:
        column.justify = "right"
    for group in _groups(rows):
        baseline = next((row for row in group if row.contender == BASELINE), None)
        for row in group:
            found.add_row(*_cells(row, baseline))
        found.add_section()
    return Group(found, *_remarks(rows), summary(rows))


def _remarks(rows: Sequence[DryRow]) -> list[Text]:
    """Errors and notes, each once, with the cases that they came up in."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if remark := f"error: {row.error}" if row.error else row.note:
            said.setdefault((row.contender, remark), []).append(f"{row.suite} {row.case}")
    return [Text(f"{name} ({', '.join(dict.fromkeys(cases))}): {remark}") for (name, remark), cases in said.items()]


def summary(rows: Sequence[DryRow]) -> str:
    """Failures, and whether the run fits."""
    everything, headlines = run_time(rows), run_time([row for row in rows if row.headline])
    errors = [row for row in rows if row.error]
    fits = "fits" if everything.total <= 60 * LIMIT_MINUTES else "does not fit"
    times = f"timing {everything.timing / 60:.1f}, compiling {everything.compiling / 60:.1f}, gate {everything.gate / 60:.1f}"
    lines = (
        f"{len(rows)} rows, {len(errors)} failed, {sum(row.seconds for row in rows):.0f} s of work here.",
        f"A run would take about {everything.total / 60:.0f} minutes, which {fits} {LIMIT_MINUTES}: {times}.",
        f"Its headline cases, which come first, would take {headlines.total / 60:.0f} minutes.",
    )
    return "\n".join(lines)


def _groups(rows: Sequence[DryRow]) -> Iterator[list[DryRow]]:
    """Rows of one case at one precision."""
    keys = dict.fromkeys((row.suite, row.case, row.precision) for row in rows)
    for key in keys:
        yield [row for row in rows if (row.suite, row.case, row.precision) == key]


def _cells(row: DryRow, baseline: DryRow | None) -> list[str]:
    head = [f"{row.suite} {row.case}", row.precision, row.contender]
    if row.predicted_ms is None:
        return [*head, "error" if row.error else "none", "", "", "", "", "", f"{row.seconds:.0f}"]
    counts = [str(row.kernels), str(row.library_calls)] if row.kernels else ["eager", str(row.operators)]
    time = _ratio(row.predicted_ms, baseline.predicted_ms if baseline else None)
    memory = _ratio(row.predicted_peak_gib, baseline.predicted_peak_gib if baseline else None)
    return [*head, *counts, f"{row.predicted_ms:.2f}", time, f"{row.predicted_peak_gib:.2f}", memory, f"{row.seconds:.0f}"]


def _ratio(own: float | None, baseline: float | None) -> str:
    return f"{own / baseline:.2f}" if own and baseline else ""

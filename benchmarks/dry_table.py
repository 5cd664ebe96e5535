"""The tables of a dry run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.contenders import BASELINE, EAGER
from benchmarks.hopper import peaks_named
from benchmarks.hopper.budget import (
    LIMIT_MINUTES,
    SIDE_BY_SIDE,
    START_SECONDS,
    Gate,
    compile_seconds,
    timed_seconds,
)
from benchmarks.hopper.rows import DryRow

OURS = "flashnorm"
_COLUMNS = ("case", "precision", "ok", "refuse", "failed", "kernels", "ms", "flashnorm x", "GiB", "flashnorm x", "checked by")


@dataclass(frozen=True)
class RunTime:
    """Predicted seconds of a run, by what they are spent on, for a set of cases."""

    compiling: float
    gate: float
    timing: float
    starting: float

    @property
    def total(self) -> float:
        return self.compiling + self.gate + self.timing + self.starting


def run_time(rows: Sequence[DryRow], device: str = "H200") -> RunTime:
    """Of a whole run."""
    compiling = gate = timing = starting = 0.0
    for group in _groups(rows):
        baseline, eager = _of(group, BASELINE), _of(group, EAGER)
        if baseline is None or baseline.predicted_ms is None:
            continue
        starting += START_SECONDS / SIDE_BY_SIDE
        done = [row for row in group if row.predicted_ms is not None]
        seconds = [(row.predicted_ms or 0.0) / 1e3 for row in done]
        timing += sum(timed_seconds(own, baseline.predicted_ms / 1e3) for own in seconds)
        compiling += sum(compile_seconds(row.generating_s, row.kernels) for row in done if row.kernels)
        step = eager or baseline
        clippings = len({row.clipping for row in done if row.clipping})
        oracle = Gate(step.flops, step.operators, step.batch_size, clippings, getattr(torch, step.oracle_dtype))
        gate += oracle.seconds(peaks_named(device)) + 2 * sum(seconds)
    return RunTime(compiling, gate, timing, starting)


def table(rows: Sequence[DryRow], planned: int) -> RenderableType:
    """A line for every case and precision, everything that failed or refused, then the predicted time of the run.

    `planned` is the number of rows that a whole dry run has.
    """
    found = Table(*_COLUMNS, title="Dry run: code generated or traced; times are rooflines, nothing was measured")
    for column in found.columns[2:-1]:
        column.justify = "right"
    for group in _groups(rows):
        found.add_row(*_cells(group))
    return Group(found, *_remarks(rows), Text(summary(rows, planned)))


def summary(rows: Sequence[DryRow], planned: int) -> str:
    """Failures, and whether the run fits."""
    everything, headlines = run_time(rows), run_time([row for row in rows if row.headline])
    cases = {(row.suite, row.case, row.precision) for row in rows}
    failed = [row for row in rows if row.error]
    missing = f", {planned - len(rows)} of {planned} not done yet (--resume)" if len(rows) < planned else ""
    fits = "fits" if everything.total <= 60 * LIMIT_MINUTES else "does not fit"
    spent = sum(row.seconds for row in rows)
    lines = (
        f"{len(cases)} cases, {len(rows)} rows: {len(failed)} failed{missing}; {spent:.0f} s of processor time here.",
        f"A run would take about {everything.total / 60:.0f} minutes, which {fits} {LIMIT_MINUTES}: {_parts(everything)}.",
        f"Its headline cases, which come first, would take {headlines.total / 60:.0f}: {_parts(headlines)}.",
    )
    return "\n".join(lines)


def _parts(time: RunTime) -> str:
    named = (
        ("compiling", time.compiling),
        ("gate", time.gate),
        ("timing", time.timing),
        ("building models", time.starting),
    )
    return ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in named)


def _remarks(rows: Sequence[DryRow]) -> list[Text]:
    """Errors and notes, each once, with the cases that they came up in."""
    said: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if remark := f"FAILED: {row.error}" if row.error else row.note:
            said.setdefault((row.contender, remark), []).append(f"{row.suite} {row.case}")
    return [Text(f"{name} ({', '.join(dict.fromkeys(cases))}): {remark}") for (name, remark), cases in said.items()]


def _groups(rows: Sequence[DryRow]) -> Iterator[list[DryRow]]:
    """Rows of one case at one precision."""
    groups: dict[tuple[str, str, str], list[DryRow]] = {}
    for row in rows:
        groups.setdefault((row.suite, row.case, row.precision), []).append(row)
    yield from groups.values()


def _of(group: Sequence[DryRow], contender: str) -> DryRow | None:
    return next((row for row in group if row.contender == contender), None)


def _cells(group: Sequence[DryRow]) -> list[str]:
    first, baseline, ours = group[0], _of(group, BASELINE), _of(group, OURS)
    failed = sum(row.error is not None for row in group)
    refuse = sum(row.error is None and row.predicted_ms is None for row in group)
    counts = [str(len(group) - failed - refuse), str(refuse or ""), str(failed or "")]
    head = [f"{first.suite} {first.case}" + (" *" if first.headline else ""), first.precision, *counts]
    if baseline is None or baseline.predicted_ms is None:
        return [*head, *[""] * 6]
    time = _ratio(ours.predicted_ms if ours else None, baseline.predicted_ms)
    memory = _ratio(ours.predicted_peak_gib if ours else None, baseline.predicted_peak_gib)
    kernels = f"{baseline.kernels} / {ours.kernels if ours else 0}"
    numbers = [kernels, f"{baseline.predicted_ms:.2f}", time, f"{baseline.predicted_peak_gib:.2f}", memory]
    return [*head, *numbers, baseline.checked]


def _ratio(own: float | None, baseline: float | None) -> str:
    return f"{own / baseline:.2f}" if own and baseline else ""

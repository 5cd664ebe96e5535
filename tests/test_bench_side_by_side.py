"""A benchmark in several processes: all rows come, each process is timed alone, and one that dies or lacks memory loses no row."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_rows
import pytest

from benchmarks.contenders import BASELINE, EAGER
from benchmarks.row import Row
from benchmarks.runner import Settings
from benchmarks.side_by_side import ASKS, HAS_DONE, Job, _Conductor, jobs_of, run_side_by_side
from benchmarks.suites import SUITES

SETTINGS = Settings(repeats=3, at_least_s=0.0)
JOBS = [Job("layers", name, "float32", (BASELINE, EAGER)) for name in ("linear", "layernorm")]


@pytest.fixture(autouse=True)
def _importable_by_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))


def test_all_rows_come_from_two_processes_and_a_killed_one_tells_what_it_owed() -> None:
    rows: list[Row] = []

    def report(row: Row) -> None:
        rows.append(row)
        if row.case == "layernorm" and row.contender == BASELINE:
            (killed,) = [process for process in multiprocessing.active_children() if process.name == JOBS[1].name]
            os.kill(killed.pid or 0, signal.SIGKILL)

    run_side_by_side(JOBS, SETTINGS, report, processes=2)

    of_linear = {row.contender: row for row in rows if row.case == "linear"}
    assert set(of_linear) == {BASELINE, EAGER}
    assert all(row.error is None and row.median_ms and row.ratio_to_compiled for row in of_linear.values()), rows
    of_killed = {row.contender: row.error for row in rows if row.case == "layernorm"}
    assert of_killed == {BASELINE: None, EAGER: "its process ended with code -9"}
    assert len(rows) == 4
    assert not [process for process in multiprocessing.active_children() if process.name in [job.name for job in JOBS]]


def test_others_and_what_they_started_stand_still_while_one_is_timed() -> None:
    code = "import subprocess, sys; child = subprocess.Popen(['sleep', '60']); print(child.pid, flush=True); child.wait()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        both = (process.pid, int(process.stdout.readline()))
        timed = _stub(signal=lambda number: pytest.fail("the timed one is stopped"))
        conductor = _conductor()
        conductor.running = [timed, _stub(signal=lambda number: os.killpg(process.pid, number))]
        try:
            with conductor._stopped(timed):
                _wait_for(lambda: [_state(pid) for pid in both] == ["T", "T"])
            _wait_for(lambda: "T" not in [_state(pid) for pid in both])
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("error", ["OutOfMemoryError: CUDA out of memory", "CannotRunError: no baseline: inductor failed"])
def test_what_lacked_memory_beside_others_is_done_again_alone(error: str) -> None:
    rows: list[Row] = []
    conductor = _conductor(rows)
    worker = _stub(bench_rows.make(BASELINE), bench_rows.make("opacus", error=error, median_ms=None), bench_rows.make("vmap"))
    conductor.running = [worker]
    for _ in range(4):
        conductor._attend(worker)
    assert [row.contender for row in rows] == [BASELINE, "vmap"]
    (again,) = conductor.crowded
    assert again.contenders == ("opacus",)

    alone = _conductor(rows, processes=1)
    worker = _stub(bench_rows.make(BASELINE), bench_rows.make("opacus", error=error, median_ms=None), job=again)
    alone.running = [worker]
    for _ in range(3):
        alone._attend(worker)
    assert [row.contender for row in rows] == [BASELINE, "vmap", "opacus"]
    assert not alone.crowded


@pytest.mark.parametrize("was_alone", [True, False])
def test_a_turn_that_waited_for_a_stopped_process_does_not_count(was_alone: bool) -> None:
    told: list[object] = []
    worker = _stub(ASKS, HAS_DONE)
    worker.tell, worker.connection.poll = told.append, lambda seconds: was_alone
    conductor = _conductor()
    conductor.running = [worker]
    conductor._attend(worker)
    assert told == [ASKS, was_alone]


def test_jobs_are_cases_at_each_precision_that_the_device_has() -> None:
    cases = [("vision", case) for case in SUITES["vision"].cases("paper") if case.name == "vit-b-b32"]
    assert [job.precision for job in jobs_of(cases, ["eager"], "cuda")] == list(cases[0][1].precisions)
    assert "tf32" not in [job.precision for job in jobs_of(cases, ["eager"], "cpu")]


def _conductor(rows: list[Row] | None = None, processes: int = 2) -> Any:
    return _Conductor([], SETTINGS, (rows if rows is not None else []).append, processes)


def _stub(*messages: Row | str, job: Job | None = None, signal: Any = None) -> Any:
    """A worker that says this and ends."""
    job = job or Job("layers", "mlp", "float32", (BASELINE, "opacus", "vmap"))
    left = list(messages)

    def recv() -> Row | str:
        if not left:
            raise EOFError
        return left.pop(0)

    return SimpleNamespace(
        job=job,
        heard=[],
        crowded=[],
        signal=signal,
        connection=SimpleNamespace(recv=recv),
        process=SimpleNamespace(join=lambda: None, exitcode=0),
        wants=lambda row: row.contender in job.contenders,
    )


def _wait_for(condition: Callable[[], bool]) -> None:
    """A signal takes effect a moment after it was sent."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _state(pid: int) -> str:
    """One letter of Linux: T is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

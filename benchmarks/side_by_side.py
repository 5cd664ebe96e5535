"""Runs cases in several processes: they build, compile and check side by side, and each is timed alone.

Compiling is most of a run's time and keeps one processor core busy for each case. So every case, at each of its precisions, has a
process of its own, and several run at once. A process that is about to time steps asks for the machine: all others, with the
compilers that they started, are stopped (SIGSTOP) until it is done. Its steps were run once before, so that nothing is compiled
while others stand still. Should it wait for one of them all the same, for a lock of the compile cache say, they go on after
`PATIENCE_S`, and its row says that it could not be timed.

What runs out of a GPU's memory beside others is done again at the end, by itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch._inductor.config
from flashnorm_compile.passes.peaks import peaks_of

from benchmarks.case import Case
from benchmarks.contenders import BASELINE, CONTENDERS
from benchmarks.row import Row
from benchmarks.runner import Report, Settings, be_quiet, row_of, run_case, runs_on
from benchmarks.suites import SUITES

HAS_STARTED, ASKS, HAS_DONE = "has started", "asks for the machine", "has done its timing"
PATIENCE_S = 120.0
_CROWDED = ("OutOfMemoryError", "CannotRunError: no baseline")


@dataclass(frozen=True)
class Job:
    """One case at one precision, for some contenders; all by name, since a case holds functions that cannot be sent."""

    suite: str
    case: str
    precision: str
    contenders: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.suite}-{self.case}-{self.precision}"


def jobs_of(cases: Iterable[tuple[str, Case]], contenders: Sequence[str], device: str) -> list[Job]:
    """In the order of the cases, which are given with the names of their suites."""
    return [
        Job(suite, case.name, precision, tuple(contenders))
        for suite, case in cases
        for precision in case.precisions
        if runs_on(device, precision)
    ]


def run_side_by_side(jobs: Sequence[Job], settings: Settings, report: Report, processes: int) -> None:
    """Like `runner.run_case` for each job, `processes` at a time; rows come as they are done.

    A process that dies (killed for its memory, say) leaves rows that say so for the contenders that it still had to measure.
    """
    peaks_of(torch.device(settings.device))  # measured once, while nothing else runs, and kept
    crowded = _Conductor(jobs, settings, report, processes).run()
    _Conductor(crowded, settings, report, 1).run()


class _Conductor:
    """Starts processes and gives the machine to one at a time."""

    def __init__(self, jobs: Sequence[Job], settings: Settings, report: Report, processes: int) -> None:
        self.settings, self.report, self.processes = settings, report, processes
        self.waiting = list(reversed(jobs))
        self.running: list[_Worker] = []
        self.crowded: list[Job] = []

    def run(self) -> list[Job]:
        """What has to be done again, alone."""
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.processes:
                    self.running.append(_Worker(self.waiting.pop(), self.settings, self.processes))
                for worker in self._ready():
                    self._attend(worker)
        finally:
            for worker in self.running:
                worker.end()
        return self.crowded

    def _ready(self) -> list[_Worker]:
        """Those that have something to say, the earliest case first: it is a headline."""
        ready = wait([worker.connection for worker in self.running])
        return [worker for worker in self.running if worker.connection in ready]

    def _attend(self, worker: _Worker) -> None:
        message = self._hear(worker)
        if message == ASKS:
            with self._stopped(worker):
                worker.tell(ASKS)
                was_alone = worker.connection.poll(PATIENCE_S)
            if self._hear(worker) == HAS_DONE:
                worker.tell(was_alone)
        elif message is None:
            self._finish(worker)

    def _hear(self, worker: _Worker) -> str | None:
        """What it says; None when it has ended. A row is reported here."""
        try:
            message = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            return None
        if not isinstance(message, Row):
            return str(message)
        worker.heard.append(message.contender)
        if self.processes > 1 and message.error is not None and message.error.startswith(_CROWDED):
            worker.crowded.append(message.contender)
        elif worker.wants(message):
            self.report(message)
        return ""

    @contextlib.contextmanager
    def _stopped(self, alone: _Worker) -> Iterator[None]:
        others = [worker for worker in self.running if worker is not alone]
        for worker in others:
            worker.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            for worker in others:
                worker.signal(signal.SIGCONT)

    def _finish(self, worker: _Worker) -> None:
        self.running.remove(worker)
        worker.process.join()
        if worker.process.exitcode:
            for name in worker.unheard():
                self.report(self._of_dead(worker, name))
        if worker.crowded:
            self.crowded.append(replace(worker.job, contenders=tuple(worker.crowded)))

    def _of_dead(self, worker: _Worker, name: str) -> Row:
        contender = next(contender for contender in CONTENDERS if contender.name == name)
        error = f"its process ended with code {worker.process.exitcode}"
        return row_of(worker.job.suite, worker.case, worker.job.precision, contender, self.settings, error=error)


class _Worker:
    """A process, and what came from it."""

    def __init__(self, job: Job, settings: Settings, processes: int) -> None:
        self.job, self.case = job, _case(job, settings)
        self.heard: list[str] = []
        self.crowded: list[str] = []
        context = _context(settings.device)
        self.connection, theirs = context.Pipe()
        self.process = context.Process(name=job.name, target=_work, args=(theirs, job, settings, processes))
        self.process.start()
        theirs.close()
        self.connection.recv()  # only now can it be stopped

    def wants(self, row: Row) -> bool:
        """The baseline is measured with any contender; its row counts where it was asked for."""
        return row.contender in self.job.contenders

    def unheard(self) -> list[str]:
        takes_part = self.case.contenders or self.job.contenders
        return [name for name in self.job.contenders if name in takes_part and name not in self.heard]

    def tell(self, message: object) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has died, which is heard next
            self.connection.send(message)

    def signal(self, number: int) -> None:
        """To the process and to those that it has started. It may have ended meanwhile."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid or 0, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self.process.join()


def _context(device: str) -> Any:
    """Forks of a process that has imported everything and run nothing. On a GPU each starts anew: what is imported may look for
    the device, and a fork of a process that has looked cannot use it."""
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context


def _case(job: Job, settings: Settings) -> Case:
    named = {case.name: case for case in SUITES[job.suite].cases(settings.sizes)}
    return replace(named[job.case], precisions=(job.precision,))


def _work(connection: Connection, job: Job, settings: Settings, processes: int) -> None:
    """In the new process: measures, sends rows, and asks for the machine."""
    os.setpgid(0, 0)  # so that a signal reaches the compilers which it starts, and nothing else
    connection.send(HAS_STARTED)
    torch._inductor.config.compile_threads = max(1, (os.cpu_count() or 1) // processes)
    be_quiet()
    chosen = [contender for contender in CONTENDERS if contender.name in {*job.contenders, BASELINE}]

    @contextlib.contextmanager
    def alone() -> Iterator[None]:
        connection.send(ASKS)
        connection.recv()
        try:
            yield
        finally:
            connection.send(HAS_DONE)
            was_alone = connection.recv()
        if not was_alone:
            raise RuntimeError(f"it waited {PATIENCE_S:.0f} s for another process while it was to be timed alone")

    run_case(job.suite, _case(job, settings), chosen, settings, connection.send, alone)

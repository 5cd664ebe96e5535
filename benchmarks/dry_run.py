"""What a run on a GPU would do, found out without one: does every case build, trace and generate code, and does the run fit?

Every case is built at its full size and its non-private step is traced on fake tensors. Then, for each contender:

- the compiled non-private step and this project's: the whole CUDA code is generated (see `benchmarks.hopper`). Where the model
  is a stack of equal blocks, for a shallow one, whose code holds everything that is in the deep one's; where a case differs from
  another in sizes only (`Case.like`), its code is that one's.
- peers: their step runs eagerly on fake tensors, shallow too. In headline cases those that compile are compiled.

Nothing is written to a GPU, and no time is measured. Times are rooflines, which are floors. What was found at a shallow depth or
at other sizes is scaled by the counted work of the two non-private steps. The time of the run adds the allowances of
`benchmarks.hopper.budget`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from benchmarks.case import Case, Problem, Stack, Suite, in_order
from benchmarks.contenders import EAGER, CannotRunError, Contender, Privacy
from benchmarks.contenders.nonprivate import NonPrivate
from benchmarks.contenders.ours import Ours
from benchmarks.hopper import hopper
from benchmarks.hopper.device import install_device_guard
from benchmarks.hopper.fakes import fake_problem
from benchmarks.hopper.rows import DryRow
from benchmarks.hopper.step import Amounts, eager_step, update_seconds
from benchmarks.runner import DTYPES, matmul_precision

DEVICE = "H200"
Key = tuple[str, str, str, str]
"""Suite, case, precision, contender."""


@dataclass(frozen=True)
class Job:
    """One contender in one case. `precisions` share a dtype, and so their code. `like` is the case whose code this one has."""

    suite: str
    case: Case
    precisions: tuple[str, ...]
    contender: Contender
    like: Case | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precisions[0]]

    @property
    def generates(self) -> bool:
        return self.contender.compiled and (self.case.headline or isinstance(self.contender, (Ours, NonPrivate)))

    def key(self, precision: str) -> Key:
        return self.suite, self.case.name, precision, self.contender.name


def planned(
    suites: Sequence[Suite], contenders: Sequence[Contender], cases: Sequence[str] | None = None, sizes: str = "paper"
) -> list[Job]:
    """The jobs in the order of a run. `cases` picks cases by name; a case whose code is that of another needs that one too."""
    jobs = []
    for suite, case in in_order(suites, sizes):
        if cases and case.name not in cases:
            continue
        like = next((other for other in suite.cases(sizes) if other.name == case.like), None)
        for dtype in dict.fromkeys(DTYPES[precision] for precision in case.precisions):
            sharing = tuple(precision for precision in case.precisions if DTYPES[precision] == dtype)
            for contender in contenders:
                if case.contenders is None or contender.name in case.contenders:
                    jobs.append(Job(suite.name, case, sharing, contender, like))
    return jobs


def dry_run(
    jobs: Sequence[Job],
    *,
    known: Sequence[DryRow] = (),
    processes: int = 1,
    deadline: float = float("inf"),
    report: Callable[[DryRow], None] | None = None,
) -> list[DryRow]:
    """A row for every case, precision and contender.

    Jobs whose rows are among `known` without an error are not done again. Each new row goes to `report` as soon as it is there,
    that of a case which shares another's code at the end.
    No job is started after `deadline` (of `time.monotonic`); then rows are missing. float32 and tf32 have the same graphs: code
    is generated once, at the first one's settings, and timed at both.
    """
    _counted_steps.clear()
    done = {row.key: row for row in known if not row.error}
    open_jobs = [job for job in jobs if not all(job.key(precision) in done for precision in job.precisions)]

    def finish(job: Job, found: Sequence[DryRow]) -> None:
        for row in found:
            done[row.key] = _with_code_of(job, row, done)
            if report is not None:
                report(done[row.key])

    waiting = []  # for the code of another case
    for job, found in _mapped(open_jobs, processes, deadline):
        if _how(job) is _shared:
            waiting.append((job, found))
        else:
            finish(job, found)
    for job, found in waiting:
        finish(job, found)
    keys = [job.key(precision) for job in jobs for precision in job.precisions]
    return [done[key] for key in keys if key in done]


_todo: list[Job] = []  # where forked processes find their work: a case holds functions that cannot be sent to them


def _mapped(jobs: Sequence[Job], processes: int, deadline: float) -> Iterator[tuple[Job, list[DryRow]]]:
    """The jobs with their rows, as they are done; with one process, in their order."""
    _todo[:] = jobs
    work = functools.partial(_rows_in_time, deadline=deadline)
    with contextlib.ExitStack() as stack:
        results: Iterator[tuple[int, list[DryRow] | None]] = map(work, range(len(jobs)))
        if processes > 1:
            install_device_guard()  # once, for all processes
            pool = stack.enter_context(ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")))
            futures = [pool.submit(work, index) for index in range(len(jobs))]
            results = (future.result() for future in as_completed(futures))
        for index, found in results:
            if found is not None:
                yield jobs[index], found


def _rows_in_time(index: int, deadline: float) -> tuple[int, list[DryRow] | None]:
    return index, rows_of(_todo[index]) if time.monotonic() < deadline else None


def rows_of(job: Job) -> list[DryRow]:
    """The rows of one job, one for each precision. Whatever is raised becomes their text."""
    empty = DryRow(
        job.suite,
        job.case.name,
        job.precisions[0],
        job.contender.name,
        job.case.headline,
        clipping=job.contender.clipping,
        oracle_dtype=str(job.case.oracle_dtype).removeprefix("torch."),
    )
    start = time.process_time()
    logger = logging.getLogger("flashnorm_compile")
    with warnings.catch_warnings(), mock.patch.object(logger, "level", logging.ERROR):
        warnings.simplefilter("ignore")
        try:
            rows = _how(job)(job, empty)
        except Exception as error:  # the row tells it
            excused = isinstance(error, CannotRunError) or (_needs_values(error) and not job.generates)
            text = f"{type(error).__name__}: {_first_line(error)}"
            told = replace(empty, note=text) if excused else replace(empty, error=text)
            rows = [replace(told, precision=precision) for precision in job.precisions]
    seconds = time.process_time() - start
    return [replace(row, seconds=seconds if row is rows[0] else 0.0) for row in rows]


def _how(job: Job) -> Callable[[Job, DryRow], list[DryRow]]:
    if job.contender.mirrors:
        return _untraced
    if job.contender.name == EAGER:
        return _traced
    if not job.generates:
        return _counted
    return _generated if job.like is None else _shared


def _untraced(job: Job, empty: DryRow) -> list[DryRow]:
    note = "runs no PyTorch model, so there is nothing to trace"
    return [replace(empty, precision=precision, note=note) for precision in job.precisions]


def _traced(job: Job, empty: DryRow) -> list[DryRow]:
    """The non-private step, eager, at full depth and size: what all others are scaled by."""
    return [_row(empty, precision, *_non_private(job, precision, deep=True), checked="traced") for precision in job.precisions]


def _generated(job: Job, empty: DryRow) -> list[DryRow]:
    """From the code of all graphs of a step; each counts as often as it is called."""
    settings, start = matmul_precision(job.precisions[0]), time.process_time()
    with settings, fake_problem(_shallow(job.case), job.dtype) as problem, hopper(DEVICE, go_on=True) as generated:
        prepared = job.contender.prepare(problem, Privacy())
        prepared.backward()
    generating, ran = time.process_time() - start, generated.calls
    operators = sum(len(one.captured.graph.nodes) for one in ran)
    flops = sum(work.flops for one in ran for work in one.work)
    nbytes = sum(work.nbytes for one in ran for work in one.work)
    peak_bytes = max(one.peak_bytes for one in ran)
    rows = []
    for precision in job.precisions:
        with matmul_precision(precision):
            seconds = generated.seconds(ran) + update_seconds(prepared.model, DEVICE)
        found = Amounts(seconds, operators, flops, nbytes, peak_bytes)
        row = _row(empty, precision, problem.batch_size, found, checked=f"code{_depth_note(job.case)}")
        rows.append(_scaled(replace(row, kernels=len(generated.kernels), generating_s=generating), _depth_ratio(job, precision)))
    return rows


def _shared(job: Job, empty: DryRow) -> list[DryRow]:
    """The non-private step at this case's sizes; `_with_code_of` makes the contender's of it."""
    return _traced(job, empty)


def _with_code_of(job: Job, row: DryRow, done: Mapping[Key, DryRow]) -> DryRow:
    """A row that shares another case's code, from that one's row and the two non-private steps."""
    if _how(job) is not _shared or job.like is None or row.error or row.note:
        return row
    key = (job.suite, job.like.name, row.precision)
    source, theirs = done.get((*key, job.contender.name)), done.get((*key, EAGER))
    if source is None or theirs is None or source.predicted_ms is None:
        return replace(row, predicted_ms=None, error=f"it shares the code of {job.like.name}, which has none")
    ours = replace(source, case=row.case, headline=row.headline, batch_size=row.batch_size, seconds=row.seconds)
    return replace(_scaled(ours, _amounts(row).over(_amounts(theirs))), checked=f"code of {job.like.name}, traced")


def _counted(job: Job, empty: DryRow) -> list[DryRow]:
    """From the operators of an eager step."""
    rows = []
    for precision in job.precisions:
        with matmul_precision(precision), mock.patch.object(torch, "compile", _uncompiled):
            found = eager_step(_shallow(job.case), job.dtype, job.contender, DEVICE)
        row = _row(empty, precision, *found, checked=f"traced{_depth_note(job.case)}")
        note = "not compiled: counted as an eager step" if job.contender.compiled else None
        rows.append(_scaled(replace(row, note=note), _depth_ratio(job, precision)))
    return rows


def _row(empty: DryRow, precision: str, batch_size: int, amounts: Amounts, checked: str) -> DryRow:
    row = replace(empty, precision=precision, batch_size=batch_size, checked=checked)
    return replace(row, **_fields(amounts))


def _fields(amounts: Amounts) -> dict[str, Any]:
    return {
        "operators": round(amounts.operators),
        "flops": round(amounts.flops),
        "nbytes": round(amounts.nbytes),
        "predicted_ms": 1e3 * amounts.seconds,
        "predicted_peak_gib": amounts.peak_bytes / 2**30,
    }


def _amounts(row: DryRow) -> Amounts:
    peak_bytes = (row.predicted_peak_gib or 0.0) * 2**30
    return Amounts((row.predicted_ms or 0.0) / 1e3, row.operators, row.flops, row.nbytes, peak_bytes)


def _scaled(row: DryRow, by: Amounts) -> DryRow:
    """The time that generating takes grows with the operators. Kernels do not: equal blocks share theirs."""
    return replace(row, generating_s=row.generating_s * by.operators, **_fields(_amounts(row).times(by)))


def _depth_ratio(job: Job, precision: str) -> Amounts:
    if not _depth_note(job.case):
        return Amounts()
    (_, deep), (_, shallow) = (_non_private(job, precision, deep=depth) for depth in (True, False))
    return deep.over(shallow)


def _non_private(job: Job, precision: str, *, deep: bool) -> tuple[int, Amounts]:
    key = (job.suite, job.case.name, precision, deep)
    if key not in _counted_steps:
        with matmul_precision(precision):
            build = job.case.build if deep else _shallow(job.case)
            _counted_steps[key] = eager_step(build, job.dtype, NonPrivate(EAGER, compiled=False), DEVICE)
    return _counted_steps[key]


_counted_steps: dict[tuple[str, str, str, bool], tuple[int, Amounts]] = {}


def _shallow(case: Case) -> Callable[[], Problem]:
    stack = case.build
    return functools.partial(stack.of, min(stack.shallow, stack.layers)) if isinstance(stack, Stack) else stack


def _depth_note(case: Case) -> str:
    stack = case.build
    if not isinstance(stack, Stack) or stack.shallow >= stack.layers:
        return ""
    return f" of {stack.shallow} blocks"


def _uncompiled(function: Callable[..., object], **settings: object) -> Callable[..., object]:
    return function


def _needs_values(error: BaseException | None) -> bool:
    """Whether a step reads values, which fake tensors do not have."""
    while error is not None:
        if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]

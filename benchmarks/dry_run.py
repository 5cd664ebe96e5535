"""What a run on a GPU would do, found out without one: does every case build, trace and generate code, and does the run fit?

For the non-private compiled step and for this project's contenders the whole CUDA code of each case is generated on fake tensors
(see `benchmarks.hopper`). Peers run their step eagerly on fake tensors, which checks that they take the model and counts their
operators; in headline cases peers that compile are compiled. Nothing is written.

Step times are rooflines, which are floors; the time of the run adds the allowances of `benchmarks.hopper.budget`.
"""

from __future__ import annotations

import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from benchmarks.case import Case, Problem, Suite
from benchmarks.contenders.base import CannotRunError, Contender, Privacy
from benchmarks.contenders.loop import Loop
from benchmarks.contenders.nonprivate import NonPrivate
from benchmarks.contenders.ours import Ours
from benchmarks.dry_table import table
from benchmarks.hopper import hopper, peaks_named
from benchmarks.hopper.attention import attention_of_cuda
from benchmarks.hopper.budget import eager_seconds
from benchmarks.hopper.eager import CountedStep
from benchmarks.hopper.fakes import fake_problem
from benchmarks.hopper.rows import DryRow
from benchmarks.runner import DTYPES, matmul_precision

DEVICE = "H200"


def dry_run(
    suites: Sequence[Suite],
    contenders: Sequence[Contender],
    *,
    cases: Sequence[str] | None = None,
    sizes: str = "paper",
    jobs: int = 1,
    report: Callable[[DryRow], None] | None = None,
) -> list[DryRow]:
    """A row for every case, precision and contender, headline cases first.

    `cases` picks cases by name. `jobs` processes share the work. Each row goes to `report` as soon as it is there. float32 and
    tf32 have the same graphs: code is generated once, at the first one's settings, and timed at both.
    """
    _todo[:] = _planned(suites, contenders, cases, sizes)
    rows: list[DryRow] = []
    for found in _mapped(jobs):
        rows += found
        if report is not None:
            for row in found:
                report(row)
    return rows


@dataclass(frozen=True)
class _Job:
    """`precisions` share a dtype, and so their code."""

    suite: str
    case: Case
    precisions: tuple[str, ...]
    contender: Contender

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precisions[0]]


_todo: list[_Job] = []  # where forked processes find their work: a case holds functions that cannot be sent to them


def _planned(suites: Sequence[Suite], contenders: Sequence[Contender], cases: Sequence[str] | None, sizes: str) -> list[_Job]:
    found = [(suite.name, case) for suite in suites for case in suite.cases(sizes) if not cases or case.name in cases]
    jobs = []
    for name, case in sorted(found, key=lambda pair: not pair[1].headline):
        for dtype in dict.fromkeys(DTYPES[precision] for precision in case.precisions):
            sharing = tuple(precision for precision in case.precisions if DTYPES[precision] == dtype)
            taking_part = [c for c in contenders if case.contenders is None or c.name in case.contenders]
            jobs += [_Job(name, case, sharing, contender) for contender in taking_part]
    return jobs


def _mapped(jobs: int) -> Iterator[list[DryRow]]:
    if jobs == 1:
        yield from map(_rows, range(len(_todo)))
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("fork")) as pool:
        yield from pool.map(_rows, range(len(_todo)))


def _rows(index: int) -> list[DryRow]:
    """The rows of one job, one for each precision. Whatever is raised becomes their text."""
    job = _todo[index]
    empty = DryRow(
        job.suite, job.case.name, job.precisions[0], job.contender.name, job.case.headline, clipping=job.contender.clipping
    )
    start = time.perf_counter()
    logger = logging.getLogger("flashnorm_compile")
    with warnings.catch_warnings(), mock.patch.object(logger, "level", logging.ERROR):
        warnings.simplefilter("ignore")
        try:
            rows = (_generated if _generates(job) else _counted)(job, empty)
        except Exception as error:  # the row tells it
            excused = isinstance(error, CannotRunError) or (_needs_values(error) and not _generates(job))
            text = f"{type(error).__name__}: {_first_line(error)}"
            told = replace(empty, note=text) if excused else replace(empty, error=text)
            rows = [replace(told, precision=precision) for precision in job.precisions]
    seconds = time.perf_counter() - start
    return [replace(row, seconds=seconds if row is rows[0] else 0.0) for row in rows]


def _generates(job: _Job) -> bool:
    return job.contender.compiled and (job.case.headline or isinstance(job.contender, (Ours, NonPrivate)))


def _generated(job: _Job, empty: DryRow) -> list[DryRow]:
    """From the code of all graphs of a step; each counts as often as it is called."""
    settings = matmul_precision(job.precisions[0])
    with settings, fake_problem(job.case.build, job.dtype) as problem, hopper(DEVICE, go_on=True) as generated:
        prepared = job.contender.prepare(problem, Privacy())
        prepared.backward()
    ran = generated.calls
    rows = []
    for precision in job.precisions:
        with matmul_precision(precision):
            seconds = generated.seconds(ran) + _update_seconds(prepared.model)
        row = replace(
            empty,
            precision=precision,
            batch_size=problem.batch_size,
            kernels=len(generated.kernels),
            library_calls=sum(sum(one.library_calls.values()) for one in ran),
            operators=sum(len(one.captured.graph.nodes) for one in ran),
            flops=sum(work.flops for one in ran for work in one.work),
            nbytes=sum(work.nbytes for one in ran for work in one.work),
            predicted_ms=1e3 * seconds,
            predicted_peak_gib=max(one.peak_bytes for one in ran) / 2**30,
            oracle_dtype=job.case.oracle_dtype,
        )
        rows.append(row)
    return rows


def _counted(job: _Job, empty: DryRow) -> list[DryRow]:
    """From the operators of an eager step. A loop over samples is counted for one of them."""
    rows = []
    for precision in job.precisions:
        counted = CountedStep(peaks_named(DEVICE))
        with (
            matmul_precision(precision),
            mock.patch.object(torch, "compile", _uncompiled),
            fake_problem(job.case.build, job.dtype) as problem,
        ):
            times, part = _part(job.contender, problem)
            with attention_of_cuda():
                prepared = job.contender.prepare(part, Privacy())
                with counted:
                    prepared.backward()
                prepared.close()
            seconds = times * eager_seconds(counted.seconds, counted.launches) + _update_seconds(prepared.model)
        row = replace(
            empty,
            precision=precision,
            batch_size=problem.batch_size,
            operators=times * counted.launches,
            flops=times * counted.flops,
            nbytes=times * counted.nbytes,
            predicted_ms=1e3 * seconds,
            predicted_peak_gib=counted.peak_bytes / 2**30,
            note="not compiled: counted as an eager step" if job.contender.compiled else None,
        )
        rows.append(row)
    return rows


def _part(contender: Contender, problem: Problem) -> tuple[int, Problem]:
    return (problem.batch_size, problem.sample(0)) if isinstance(contender, Loop) else (1, problem)


def _uncompiled(function: Callable[..., object], **settings: object) -> Callable[..., object]:
    return function


def _update_seconds(model: nn.Module) -> float:
    """AdamW, fused: parameter, gradient and two moments are read, all but the gradient are written."""
    nbytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return 7 * nbytes / peaks_named(DEVICE).bandwidth


def _needs_values(error: BaseException | None) -> bool:
    """Whether a step reads values, which fake tensors do not have."""
    while error is not None:
        if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]


__all__ = ["DryRow", "dry_run", "table"]

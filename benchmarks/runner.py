"""Runs cases: gate first, then interleaved times, one row for each contender, written as soon as it is there."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import machine
from benchmarks.case import Case, Problem
from benchmarks.contenders import BASELINE, EAGER, CannotRunError, Contender, Prepared, Privacy
from benchmarks.gate import TOLERANCE, Oracle, gradient_error
from benchmarks.row import LATE, Row
from benchmarks.timing import interleave, peak_tensor_bytes

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """How a run measures. Seconds and repeats count for each contender; each is timed in turn with the baseline."""

    device: str = "cpu"
    sizes: str = "small"
    repeats: int = 5
    at_least_s: float = 0.5
    at_most_s: float = 8.0
    deadline: float = math.inf
    """`time.monotonic()` after which no further contender is started."""


class GateError(RuntimeError):
    """A contender's gradients differ from the loop over samples by more than is allowed."""


Report = Callable[[Row], None]
Alone = Callable[[], contextlib.AbstractContextManager[object]]


def run_case(
    suite: str,
    case: Case,
    contenders: Sequence[Contender],
    settings: Settings,
    report: Report,
    alone: Alone = contextlib.nullcontext,
) -> None:
    """Measures every contender in a case at each of its precisions. Each row goes to `report` at once.

    Steps are timed inside of `alone()`, which sees to it that nothing else runs; they have been compiled before.
    Whatever a contender raises becomes its row's error, out-of-memory errors included. Without the baseline no ratio
    exists, so a baseline that fails ends the precision: every other row then tells so.
    """
    chosen = [c for c in contenders if case.contenders is None or c.name in case.contenders]
    for precision in case.precisions:
        if not runs_on(settings.device, precision):
            continue
        with matmul_precision(precision):
            _Run(suite, case, precision, settings, report, alone).measure(chosen)


def runs_on(device: str, precision: str) -> bool:
    """tf32 is a precision of GPUs."""
    return device == "cuda" or precision != "tf32"


class _Run:
    """One case at one precision."""

    def __init__(self, suite: str, case: Case, precision: str, settings: Settings, report: Report, alone: Alone) -> None:
        self.suite, self.case, self.precision, self.settings, self.report = suite, case, precision, settings, report
        self.alone = alone
        self.eager_ratio = math.nan

    def measure(self, contenders: Sequence[Contender]) -> None:
        torch._dynamo.reset()
        torch.manual_seed(0)
        with torch.device(self.settings.device):
            problem = self.case.build().to(self.settings.device, DTYPES[self.precision])
        order = sorted(contenders, key=lambda c: (c.name != BASELINE, c.name != EAGER))
        self.oracle = Oracle(problem, self.case.oracle_dtype)
        self.baseline: Prepared | None = None
        try:
            for contender in order:
                if time.monotonic() > self.settings.deadline:
                    self.report(self._row(contender, error=f"{LATE}the time given to this run was over"))
                    continue
                self._contend(contender, problem)
                _collect()
        finally:
            self.baseline = None
            _collect()

    def _contend(self, contender: Contender, problem: Problem) -> None:
        prepared: Prepared | None = None
        results: dict[str, Any] = {}
        try:
            if contender.name != BASELINE and self.baseline is None:
                raise CannotRunError(f"no baseline: {BASELINE} failed")
            prepared = contender.prepare(problem, Privacy())
            start = time.perf_counter()
            prepared.backward()
            prepared.clear()
            results["compile_s"] = time.perf_counter() - start
            results |= self._gate(contender, prepared)
            if not results["gradient_error"] <= results["gradient_error_allowed"]:
                raise GateError(f"relative gradient error {results['gradient_error']:.1e}")
            results |= self._time(contender, prepared)
        except Exception as error:  # the row tells it
            results["error"] = f"{type(error).__name__}: {first_line(error)}"
        finally:
            if prepared is not None and contender.name != BASELINE:
                prepared.close()
        self.report(self._row(contender, **results))

    def _gate(self, contender: Contender, prepared: Prepared) -> dict[str, float]:
        """Allowed is the tolerance, or twice the error of non-private gradients in this precision, compiled or eager.

        A ReLU that rounding switches moves both; so does bfloat16, and eager code more than compiled code, which rounds less often:
        it may be off by four times as much.
        """
        if contender.clipping is None:
            prepared.backward()
            error = self.oracle.rounding_error(prepared.gradients())
            prepared.clear()
            if contender.name == BASELINE:
                self.rounding_error = error
            allowed = max(TOLERANCE, 4 * self.rounding_error)
            if error <= allowed:
                self.rounding_error = max(self.rounding_error, error)
            return {"gradient_error": error, "gradient_error_allowed": allowed}
        reference = self.oracle.reference(contender.clipping)
        before = prepared.privacy
        prepared.set_privacy(Privacy(reference.max_grad_norm, 0.0))
        prepared.backward()
        error = gradient_error(prepared.gradients(), reference.gradients)
        prepared.clear()
        prepared.set_privacy(before)
        return {"gradient_error": error, "gradient_error_allowed": max(TOLERANCE, 2 * self.rounding_error)}

    def _time(self, contender: Contender, prepared: Prepared) -> dict[str, Any]:
        settings = self.settings
        if contender.name == BASELINE:
            self.baseline = prepared
        assert self.baseline is not None, "the baseline comes first"
        steps = {BASELINE: self.baseline.step, contender.name: prepared.step}
        prepared.step()
        with self.alone():
            times = interleave(steps, settings.repeats, settings.at_least_s, settings.at_most_s)
            peak = peak_tensor_bytes(prepared.step, settings.device)  # 0: it allocates outside of PyTorch
        own = times[contender.name]
        ratio = own.median_ms / times[BASELINE].median_ms
        if contender.name == BASELINE:
            self.baseline_peak = peak
        if contender.name == EAGER:
            self.eager_ratio = ratio
        return {
            "median_ms": own.median_ms,
            "low_quartile_ms": own.low_ms,
            "high_quartile_ms": own.high_ms,
            "baseline_low_quartile_ms": times[BASELINE].low_ms,
            "baseline_median_ms": times[BASELINE].median_ms,
            "baseline_high_quartile_ms": times[BASELINE].high_ms,
            "repeats": own.repeats,
            "ratio_to_compiled": ratio,
            "ratio_to_eager": None if self.eager_ratio != self.eager_ratio else ratio / self.eager_ratio,
            "peak_bytes": peak or None,
            "memory_ratio": peak / self.baseline_peak or None,
            "samples_per_s": 1e3 * prepared.problem.batch_size / own.median_ms,
        }

    def _row(self, contender: Contender, **results: Any) -> Row:
        return row_of(self.suite, self.case, self.precision, contender, self.settings, **results)


def row_of(suite: str, case: Case, precision: str, contender: Contender, settings: Settings, **results: Any) -> Row:
    """A row with what was measured, and where."""
    peer = contender.version()
    return Row(
        suite=suite,
        case=case.name,
        description=case.description,
        contender=contender.name,
        precision=precision,
        sizes=settings.sizes,
        point=dict(case.point),
        target=case.target if contender.name == "flashnorm" else None,
        device=machine.device_name(settings.device),
        threads=torch.get_num_threads() if settings.device == "cpu" else None,
        versions=machine.versions() | ({"peer": peer} if peer else {}),
        date=machine.today(),
        **results,
    )


def be_quiet() -> None:
    """Peers warn about things that the gate checks; the rows are what counts."""
    warnings.filterwarnings("ignore")
    logging.getLogger("flashnorm_compile").setLevel(logging.ERROR)


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    # Every contender compiles the same code with other parameters, and none may fall back to eager for that.
    limit = torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=1024)
    try:
        with limit:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def first_line(error: Exception) -> str:
    """Of an error's text, what fits into a table."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:400]


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

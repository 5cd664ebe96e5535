"""The dry run: a row for everybody in every case, what failing looks like, and the predicted time of a run."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="Inductor's code for a GPU needs the triton package")
if torch.cuda.is_available():
    pytest.skip("a dry run is for machines without a GPU", allow_module_level=True)

from benchmarks.case import Case, Problem, Stack, Suite, per_sample
from benchmarks.contenders import BASELINE, CONTENDERS, EAGER
from benchmarks.contenders.base import CannotRunError, Contender, Prepared, Privacy
from benchmarks.contenders.loop import Loop
from benchmarks.contenders.nonprivate import NonPrivate
from benchmarks.contenders.ours import Ours
from benchmarks.contenders.vmap import Vmap
from benchmarks.dry_run import dry_run, planned, rows_of
from benchmarks.dry_table import run_time, summary, table
from benchmarks.hopper import peaks_named
from benchmarks.hopper import rows as dry_rows
from benchmarks.hopper.budget import (
    CORES,
    KERNEL_SECONDS,
    SIDE_BY_SIDE,
    START_SECONDS,
    Gate,
    compile_seconds,
    eager_seconds,
    timed_seconds,
)
from benchmarks.hopper.rows import DryRow
from benchmarks.hopper.step import Amounts
from benchmarks.models.mlp import MLP
from benchmarks.suites import SUITES

BATCH = 3


def _problem() -> Problem:
    return Problem(nn.Linear(16, 8), (torch.randn(BATCH, 5, 16),), torch.randn(BATCH, 5, 8), per_sample(F.mse_loss))


class Mixing(nn.Module):
    """Subtracts the mean over samples, which nobody can train privately."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y - y.mean(0)


def _mixing() -> Problem:
    problem = _problem()
    return Problem(Mixing(), problem.inputs, problem.targets, problem.loss)


class Refusing(Contender):
    name = "refusing"

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        raise CannotRunError("takes no model at all")


class Reading(NonPrivate):
    """Reads a value of the batch."""

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        float(problem.inputs[0].sum())
        raise AssertionError("a fake tensor has no value")


BASE, PLAIN, OURS = NonPrivate(BASELINE, compiled=True), NonPrivate(EAGER, compiled=False), Ours("flashnorm")


def _suite(*cases: Case) -> Suite:
    return Suite("tiny", "Tiny", (), cases)


def _run(suite: Suite, contenders: Sequence[Contender], **settings: Any) -> list[DryRow]:
    return dry_run(planned([suite], contenders), **settings)


@pytest.fixture(scope="module")
def rows() -> list[DryRow]:
    others = Case("other", "for nobody here", _problem, precisions=("bfloat16",), contenders=("refusing",))
    headline = Case("first", "a headline", _problem, precisions=("tf32", "float32"), headline=True)
    contenders = (BASE, PLAIN, OURS, Loop("loop", compiled=False), Refusing(), Reading("reading", compiled=False))
    return _run(_suite(others, headline), contenders)


def _row(rows: list[DryRow], contender: str, precision: str = "float32") -> DryRow:
    (found,) = [row for row in rows if (row.contender, row.precision, row.case) == (contender, precision, "first")]
    return found


def test_headlines_come_first_and_everybody_has_a_row(rows: list[DryRow]) -> None:
    assert [row.case for row in rows] == ["first"] * 12 + ["other"]
    names = {"inductor", "eager", "flashnorm", "loop", "refusing", "reading"}
    assert {row.contender for row in rows if row.precision == "tf32"} == names
    assert not [row for row in rows if row.error]


def test_code_is_generated_once_for_float32_and_tf32(rows: list[DryRow]) -> None:
    fast, slow = _row(rows, "inductor", "tf32"), _row(rows, "inductor")
    assert fast.kernels == slow.kernels > 0
    assert fast.seconds > 0 == slow.seconds
    assert fast.flops == slow.flops == 2 * 2 * BATCH * 5 * 16 * 8
    assert fast.predicted_ms is not None
    assert slow.predicted_ms is not None
    assert fast.predicted_ms <= slow.predicted_ms


def test_ours_is_generated_and_costs_more_kernels(rows: list[DryRow]) -> None:
    assert _row(rows, "flashnorm").kernels > _row(rows, "inductor").kernels
    assert _row(rows, "flashnorm").batch_size == BATCH


def test_eager_steps_are_counted_and_a_loop_is_one_sample_times_b(rows: list[DryRow]) -> None:
    eager, loop = _row(rows, "eager"), _row(rows, "loop")
    assert eager.kernels == loop.kernels == 0
    assert eager.flops == loop.flops == _row(rows, "inductor").flops
    assert loop.operators % BATCH == 0
    assert loop.operators > eager.operators


def test_refusals_and_steps_that_need_values_are_notes(rows: list[DryRow]) -> None:
    assert "takes no model at all" in (_row(rows, "refusing").note or "")
    assert "DataDependent" in (_row(rows, "reading").note or "")
    assert _row(rows, "reading").predicted_ms is None


def test_a_case_that_cannot_be_compiled_is_an_error() -> None:
    (row,) = _run(_suite(Case("mixing", "", _mixing)), [OURS])
    assert row.error is not None
    assert "mix" in row.error.lower()
    assert "1 rows: 1 failed" in summary([row], 1)


def test_peers_that_compile_are_compiled_in_headline_cases_only() -> None:
    peer = Vmap("vmap compiled", compiled=True)
    cases = Case("first", "", _problem, headline=True), Case("second", "", _problem)
    first, second = _run(_suite(*cases), [peer])
    assert first.kernels > 0
    assert first.note is None
    assert second.kernels == 0
    assert "not compiled" in (second.note or "")


def test_cases_are_picked_by_name() -> None:
    suite = _suite(Case("one", "", _problem), Case("two", "", _problem))
    assert [job.case.name for job in planned([suite], [Refusing()], ["two"])] == ["two"]


def test_processes_share_the_work_in_the_same_order() -> None:
    suite = _suite(*(Case(name, "", _problem) for name in "abc"))
    assert [row.case for row in _run(suite, [Refusing()], processes=2)] == ["a", "b", "c"]


def test_rows_that_are_known_are_not_made_again_unless_they_failed() -> None:
    suite = _suite(*(Case(name, "", _problem) for name in "abc"))
    known = [DryRow("tiny", "a", "float32", "refusing", note="from before"), DryRow("tiny", "b", "float32", "refusing", error="?")]
    told: list[DryRow] = []
    found = _run(suite, [Refusing()], known=known, report=told.append)
    assert [row.case for row in told] == ["b", "c"]
    assert [row.note for row in found] == ["from before", *[row.note for row in told]]
    assert not [row for row in found if row.error]


def test_no_job_starts_after_the_deadline_and_the_summary_says_what_is_missing() -> None:
    suite = _suite(*(Case(name, "", _problem) for name in "abc"))
    assert _run(suite, [Refusing()], deadline=time.monotonic() - 1) == []
    assert "3 of 3 not done yet" in summary([], 3)


def test_rows_survive_their_file(tmp_path: Path, rows: list[DryRow]) -> None:
    dry_rows.write(rows, tmp_path / "rows.json")
    assert dry_rows.read(tmp_path / "rows.json") == rows
    assert dry_rows.read(tmp_path / "none.json") == []


def _layers(layers: int, batch: int = BATCH, width: int = 16) -> Problem:
    return Problem(
        MLP(width, layers, activation=True), (torch.randn(batch, 5, width),), torch.randn(batch, 5, width), per_sample(F.mse_loss)
    )


def test_a_stack_is_generated_shallow_and_scaled_to_its_depth() -> None:
    """Against the code of all layers, which here is generated as well: three times the work, to within a quarter."""
    contenders = (BASE, PLAIN, OURS)
    wide = functools.partial(_layers, width=64)  # the plans of narrow layers change with the depth
    stack, whole = Case("stack", "", Stack(6, wide)), Case("whole", "", functools.partial(wide, 6))
    found = _run(_suite(stack, whole), contenders)
    shallow, deep = ({row.contender: row for row in found if row.case == name} for name in ("stack", "whole"))
    assert shallow["eager"] == dataclasses.replace(deep["eager"], case="stack", seconds=shallow["eager"].seconds)
    for name in ("inductor", "flashnorm"):
        assert "2 blocks" in shallow[name].checked
        assert shallow[name].flops == pytest.approx(deep[name].flops, rel=0.25)
        assert shallow[name].nbytes == pytest.approx(deep[name].nbytes, rel=0.25)
        assert shallow[name].predicted_ms == pytest.approx(deep[name].predicted_ms, rel=0.25)
    assert shallow["inductor"].kernels == deep["inductor"].kernels > 0


def test_a_case_like_another_has_its_code_and_is_traced_at_its_own_size() -> None:
    cases = Case("small", "", lambda: _layers(2, 3)), Case("large", "", lambda: _layers(2, 300, 64), like="small")
    found = {(row.case, row.contender): row for row in _run(_suite(*cases), (BASE, PLAIN, OURS))}
    large = found["large", "flashnorm"]
    assert large.batch_size == 300
    assert large.checked == "code of small, traced"
    assert large.kernels == found["small", "flashnorm"].kernels
    ratio = found["large", "eager"].flops / found["small", "eager"].flops
    assert large.flops == pytest.approx(ratio * found["small", "flashnorm"].flops)


def test_a_case_like_another_that_failed_fails_too() -> None:
    cases = Case("mixing", "", _mixing), Case("like it", "", _mixing, like="mixing")
    _, failed = _run(_suite(*cases), [OURS])
    assert failed.error == "it shares the code of mixing, which has none"


@pytest.mark.parametrize("suite", SUITES.values(), ids=lambda suite: suite.name)
def test_a_case_like_another_comes_behind_it_with_the_same_contenders_and_precisions(suite: Suite) -> None:
    for case in suite.paper:
        if case.like is not None:
            (other,) = (one for one in suite.paper if one.name == case.like)
            assert other.like is None
            order = [job.case.name for job in planned([suite], CONTENDERS)]
            assert order.index(other.name) < order.index(case.name)
            compiled = {job.contender.name for job in planned([suite], CONTENDERS, [case.name]) if job.generates}
            theirs = {job.contender.name for job in planned([suite], CONTENDERS, [other.name]) if job.generates}
            assert compiled <= theirs
            assert set(case.precisions) <= set(other.precisions)


def test_what_a_job_raises_is_its_row() -> None:
    def no_problem() -> Problem:
        raise ValueError("sizes do not fit\nsecond line")

    (job,) = planned([_suite(Case("broken", "", no_problem))], [BASE])
    (row,) = rows_of(job)
    assert row.error == "ValueError: sizes do not fit"


def test_amounts_over_nothing_leave_things_as_they_are() -> None:
    assert Amounts(2.0, 3.0, 4.0, 5.0, 6.0).over(Amounts(1.0, 3.0, 0.0, 10.0, 2.0)) == Amounts(2.0, 1.0, 1.0, 0.5, 3.0)


def test_the_table_shows_ratios_and_whether_the_run_fits(rows: list[DryRow]) -> None:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table(rows, len(rows)))
    text = capture.get()
    ratio = (_row(rows, "flashnorm").predicted_ms or 0) / (_row(rows, "inductor").predicted_ms or 1)
    assert f"{ratio:.2f}" in text
    assert "takes no model at all" in text
    assert "which fits 25" in text


def test_timing_follows_the_rounds_of_a_run() -> None:
    assert timed_seconds(0.2, 0.1) == pytest.approx((2 + 5) * 0.3 + 0.2)
    assert timed_seconds(0.002, 0.001) == pytest.approx(2 * 0.003 + 0.5 + 0.002)  # half a second of short steps
    assert timed_seconds(2.0, 1.0) == pytest.approx((2 + 3) * 3.0 + 2.0)  # 8 seconds would not be three rounds
    assert compile_seconds(10.0, 80) == pytest.approx(10.0 / SIDE_BY_SIDE + 80 * KERNEL_SECONDS / CORES)
    assert eager_seconds(1.0, 10) == 1.0
    assert eager_seconds(0.0, 1000) == pytest.approx(0.008)


def test_the_gate_is_two_loops_over_samples_for_each_clipping() -> None:
    peaks = peaks_named("H200")
    gate = Gate(step_flops=10**15, step_operators=100, batch_size=4, clippings=2, dtype=torch.float64)
    assert gate.seconds(peaks) == pytest.approx(5 * 1e15 / peaks.flops_float64)


def test_a_run_is_the_sum_over_cases_with_a_baseline() -> None:
    base = DryRow("s", "c", "float32", "inductor", True, batch_size=1, kernels=8, predicted_ms=100.0, generating_s=1.0)
    ours = DryRow("s", "c", "float32", "flashnorm", True, "flat", 1, kernels=16, predicted_ms=200.0, generating_s=2.0)
    lost = DryRow("s", "d", "float32", "flashnorm", False, "flat", 1, kernels=16, predicted_ms=200.0, generating_s=2.0)
    found = run_time([base, ours, lost])
    compiling = compile_seconds(1.0, 8) + compile_seconds(2.0, 16)
    assert found.timing == pytest.approx(timed_seconds(0.1, 0.1) + timed_seconds(0.2, 0.1))
    assert found.compiling == pytest.approx(compiling)
    assert found.gate == pytest.approx(2 * 0.3)
    assert found.total == pytest.approx(found.timing + found.compiling + found.gate + START_SECONDS / SIDE_BY_SIDE)

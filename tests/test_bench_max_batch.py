"""The search for the largest physical batch: where it stops, what counts as full memory, and its rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import machine, max_batch
from benchmarks.__main__ import main
from benchmarks.case import Problem
from benchmarks.contenders import CannotRunError, Contender, Prepared, Privacy
from benchmarks.max_batch import MaxBatchRow
from benchmarks.report import report
from benchmarks.suites.problems import image_classes


@pytest.mark.parametrize("answer", [0, 1, 2, 3, 31, 32, 33, 100, 511, 512])
def test_search_finds_the_largest_batch(answer: int) -> None:
    tried: list[int] = []

    def does_fit(size: int) -> bool:
        tried.append(size)
        return size <= answer

    found = max_batch.largest_batch(does_fit, limit=512, resolution=0.0)
    assert found == answer
    assert len(tried) == len(set(tried)), "no size is tried twice"
    assert max(tried) <= 512
    coarse = max_batch.largest_batch(lambda size: size <= answer, limit=512, resolution=1 / 16)
    assert answer / (1 + 1 / 16) <= coarse <= answer


class _Limited(Contender):
    """Runs out of memory above a number of bytes of inputs, or fails in another way."""

    name = "limited"

    def __init__(self, byte_limit: int, error: Exception) -> None:
        self.byte_limit, self.error = byte_limit, error
        self.closed = 0

    def prepare(self, problem: Problem, privacy: Privacy) -> Prepared:
        return _LimitedStep(problem, privacy, self)


class _LimitedStep(Prepared):
    def __init__(self, problem: Problem, privacy: Privacy, contender: _Limited) -> None:
        super().__init__(problem, privacy)
        self.contender = contender

    def backward(self) -> None:
        if sum(x.nbytes for x in self.problem.inputs) > self.contender.byte_limit:
            raise self.contender.error
        self.problem.mean_loss(self.model)(*self.problem.inputs, self.problem.targets).backward()

    def close(self) -> None:
        self.contender.closed += 1


def _images(batch: int) -> Problem:
    return image_classes(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), batch, 2, 5)


def test_search_over_steps_stops_at_the_memory_limit() -> None:
    contender = _Limited(5 * 12 * 4, torch.OutOfMemoryError("no memory left"))
    tried = [0]

    def does_fit(batch: int) -> bool:
        tried[0] += 1
        return max_batch.fits(contender, lambda: _images(batch))

    assert max_batch.largest_batch(does_fit, limit=8, resolution=0.0) == 5
    assert contender.closed == tried[0]


def test_out_of_memory_inside_the_compiler_counts_too() -> None:
    wrapped = RuntimeError("the backend failed")
    wrapped.__cause__ = torch.OutOfMemoryError("no memory left")
    assert not max_batch.fits(_Limited(0, wrapped), lambda: _images(2))


def test_other_errors_of_a_step_are_passed_on() -> None:
    with pytest.raises(CannotRunError, match="not this model"):
        max_batch.fits(_Limited(0, CannotRunError("not this model")), lambda: _images(2))


def test_a_search_gives_a_row_for_each_pair_and_the_report_shows_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def largest(contender: Contender, architecture: str, *, dtype: torch.dtype) -> int:
        if architecture == "bert":
            raise CannotRunError("not this model")
        return 77 if dtype is torch.bfloat16 else 33

    monkeypatch.setattr(max_batch, "max_physical_batch", largest)
    monkeypatch.setattr(machine, "device_name", lambda device: f"a device of kind {device}")
    contender = _Limited(0, CannotRunError(""))
    for precision in ("bfloat16", "float32"):
        for row in max_batch.search(["vit-b", "bert"], [contender], precision):
            max_batch.write([row], tmp_path / max_batch.FILE_NAME)
    rows = max_batch.read(tmp_path / max_batch.FILE_NAME)
    assert [(row.architecture, row.precision, row.batch) for row in rows] == [
        ("vit-b", "bfloat16", 77), ("bert", "bfloat16", None), ("vit-b", "float32", 33), ("bert", "float32", None),
    ]  # fmt: skip
    assert rows[1].error == "CannotRunError: not this model"
    assert isinstance(rows[0], MaxBatchRow)
    assert "| limited | 77 | failed | 33 | failed |" in report(tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["max-batch", "vit-b"]) == 2
    assert "no CUDA device" in capsys.readouterr().out

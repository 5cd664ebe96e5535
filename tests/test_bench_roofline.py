"""The roofline table: what the private step adds by term, and targets that are missed say so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Inductor's code for a GPU needs the triton package")

from benchmarks.hopper import Work, peaks_named
from benchmarks.roofline import CASES, RooflineRow, added_by_term, table, write


def work(name: str, nbytes: int = 0, flops: int = 0) -> Work:
    return Work(name, nbytes, flops, torch.bfloat16)


def test_added_time_is_split_into_terms() -> None:
    peaks = peaks_named("H200")
    megabyte = 1e6 / peaks.bandwidth * 1e6
    before = [work("op0: extern_kernels.mm", flops=10**12), work("op1", nbytes=10**7)]
    after = [*before, work("op2: flashnorm.ghost_norm.default", flops=10**11), work("op3: torch.ops.flashnorm.release.default")]
    after.append(work("op4: torch.ops.flashnorm.weighted_sums_noise.default", nbytes=5 * 10**6))
    terms = added_by_term(before, after)
    assert terms == {
        "ghost_norm": pytest.approx(1e6 * 10**11 / peaks.flops_half, abs=0.1),
        "launches": pytest.approx(3e6 * peaks.launch, abs=0.1),
        "weighted_sums_noise": pytest.approx(5 * megabyte, abs=0.1),
    }


def test_a_missed_target_says_so() -> None:
    row = RooflineRow("case", "", 1.2, 1.0, 90, 100, 0, 0, 0, 0, 5, 4, 1.1, 1.1, {"launches": 3.0})
    assert "| 1.200 **missed** | 1.10 | 0.900 |" in table([row])
    assert "missed" not in table([dataclasses.replace(row, seconds=1.05)])
    assert "| 1.200 **over** |" in table([dataclasses.replace(row, peak_bytes=120)])


def test_rows_of_one_day_add_up_to_a_table(tmp_path: Path) -> None:
    """Some cases anew leave the others as they are, and other versions leave none."""
    path = tmp_path / "roofline.json"
    first, second = (RooflineRow(case.name, "", 1.2, 1.0, 90, 100, 0, 0, 0, 0, 5, 4, 1.1, 1.1, {}) for case in CASES[:2])
    write([second], path)
    write([first, dataclasses.replace(second, seconds=1.5)], path)
    write([dataclasses.replace(first, seconds=1.3)], path)
    assert [(row["case"], row["ratio"]) for row in json.loads(path.read_text())["rows"]] == [
        (CASES[0].name, 1.3),
        (CASES[1].name, 1.5),
    ]
    path.write_text(path.read_text().replace(torch.__version__, "2.0.0"))
    write([second], path)
    assert [row["case"] for row in json.loads(path.read_text())["rows"]] == [second.case]


def test_the_cases_are_those_that_have_targets() -> None:
    assert {case.target for case in CASES if "-b1-" in case.name} == {1.05}
    assert {case.name: case.target for case in CASES if "-b1-" not in case.name} == {
        "gpt2-b8-t1024": 1.20,
        "vit-b64": 1.15,
        "llama-block-b4-t2048": 1.10,
    }

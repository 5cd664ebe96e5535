"""The kernel benchmark without a GPU: every contest's two sides compute the same, and rates are counted by hand."""

from __future__ import annotations

import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks import kernels
from benchmarks.hopper import peaks_named


def _first(value: Tensor | tuple[Tensor, ...]) -> Tensor:
    """What both sides have: the norms where there are two results, else the only one."""
    return value if isinstance(value, Tensor) else value[1 if value[0].dim() > 1 else 0]


def test_both_sides_of_every_contest_compute_the_same() -> None:
    torch.manual_seed(0)
    found = set()
    with mock.patch.object(kernels, "SHAPES", ((3, 7, 6, 5),)), mock.patch.object(kernels, "TABLES", ((3, 7, 11, 5),)):
        for contest in kernels.contests(torch.float32, "cpu"):
            found.add(contest.name)
            if "noise" in contest.name:
                continue  # drawn from different generators
            ours, theirs = contest.kernel(), contest.composition()
            ours = ours[0] if contest.name in ("per_layer", "tied_cross_term") else _first(ours)
            torch.testing.assert_close(ours.flatten().double(), _first(theirs).flatten().double(), rtol=1e-4, atol=1e-4)
    assert found == {
        "flash_norm", "ghost_norm", "weight_grads", "clipped_sum", "clipped_sums", "weighted_sum_noise", "squared_norms",
        "add_noise", "per_layer", "embedding_norm", "tied_cross_term",
    }  # fmt: skip


def test_rates_are_counted_by_hand() -> None:
    contest = kernels.Contest("flash_norm", (1, 2), lambda: None, lambda: None, flops=2e12, nbytes=4e9)
    row = kernels.row_of(contest, torch.bfloat16, peaks_named("H200"), ms=10.0, composition_ms=20.0)
    assert row.tflops_per_s == pytest.approx(200)
    assert row.gbytes_per_s == pytest.approx(400)
    assert row.share_of_peak == pytest.approx(2e12 / (0.7 * 989e12) / 0.01, rel=1e-2)


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = subprocess.run([sys.executable, "-m", "benchmarks.kernels"], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "runs on a CUDA device only" in done.stderr

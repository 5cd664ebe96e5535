"""Compile caches on disk: a warm one gives the same private gradients; a plain or different one is never taken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cache_child
import forked
import pytest
import torch
from models.zoo import ZOO
from oracle import Gradients, assert_agree, case_gradients, clip, halving_options, in_double

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


def _options(clipping: str, **extra: Any) -> dict[str, Any]:
    case = ZOO["mlp_over_time"]
    return halving_options(case_gradients(case, *case.make()), clipping) | extra


def _want(options: dict[str, Any]) -> Gradients:
    case = ZOO["mlp_over_time"]
    return clip(case_gradients(case, *case.make()), options).released


def _plain() -> Gradients:
    return _want({"max_grad_norm": 1e9})


class Process:
    """Steps in processes of their own that share one cache directory."""

    def __init__(self, directory: Path) -> None:
        self.environment = {"TORCHINDUCTOR_CACHE_DIR": str(directory), "OMP_NUM_THREADS": "1"}

    def __call__(self, backend: str, options: dict[str, Any], program: bool = False) -> tuple[Gradients, dict[str, int]]:
        """``program``: as another run of a script would be; else forked."""
        arguments = (backend, options)
        if program:
            command = [sys.executable, str(HERE / "cache_child.py"), json.dumps(arguments)]
            environment = os.environ | self.environment | {"PYTHONPATH": str(HERE)}
            run = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr[-4000:]
            result = json.loads(run.stdout.splitlines()[-1])
        else:
            (result,) = forked.results(cache_child.step, [arguments], self.environment)
        gradients = {name: in_double(torch.tensor(value)) for name, value in result.pop("gradients").items()}
        return gradients, result


def _hits(counters: dict[str, int]) -> int:
    return counters["fx_hits"] + counters["aot_hits"]


def test_private_artifacts_are_reused_by_their_like(tmp_path: Path) -> None:
    """Private, plain, private again, other options, noise: one directory, but each gets its own, and hits are real."""
    process, options = Process(tmp_path), _options("flat")
    cold, counters = process("flashnorm", options, program=True)
    assert _hits(counters) == 0
    assert_agree(cold, _want(options))

    gradients, counters = process("inductor", {})
    assert _hits(counters) == 0, f"a private artifact was served to a plain compile: {counters}"
    assert_agree(gradients, _plain())

    warm, counters = process("flashnorm", options, program=True)
    assert _hits(counters) > 0, f"the second process compiled again: {counters}"
    assert all(torch.equal(warm[name], cold[name]) for name in cold)

    # Read at run time or baked into the graph, an option counts whatever the cache holds.
    others = _options("per_layer", norm_algorithm="ghost", expected_batch_size=9.0)
    gradients, _ = process("flashnorm", others)
    assert_agree(gradients, _want(others))

    noisy = options | {"noise_multiplier": 1.0}
    (first, _), (second, counters) = (process("flashnorm", noisy) for _ in range(2))
    assert _hits(counters) > 0
    assert all(not torch.equal(first[name], second[name]) for name in first), "two processes drew the same noise"


def test_plain_artifacts_are_never_taken_for_private_ones(tmp_path: Path) -> None:
    process, options = Process(tmp_path), _options("automatic")
    gradients, _ = process("inductor", {})
    assert_agree(gradients, _plain())
    gradients, counters = process("flashnorm", options)
    assert _hits(counters) == 0, f"a plain artifact was taken: {counters}"
    assert_agree(gradients, _want(options))

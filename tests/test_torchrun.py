"""The example trains under torchrun, and a training whose ranks are killed loses no counted step and draws no noise twice."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flashnorm_compile

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("FLASHNORM_TEST_KILLS", "1"))
STEPS = 5  # for each life


def torchrun(*arguments: str) -> str:
    """Two ranks on this machine; their output, or a failure that shows it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_the_example_trains() -> None:
    out = torchrun("-m", "examples.sharded_llama", "--backend", "flashnorm_eager", "--steps", "12")
    words = out.strip().splitlines()[-1].split()
    assert words[5:7] == ["12", "steps,"]
    assert float(words[3]) < float(words[1])


def live(life: int, *arguments: str) -> list[int]:
    """Two ranks of tests/crash_child.py, from start to end; their exit codes. Who waits for a dead rank ends as well."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCHELASTIC_RESTART_COUNT": str(life)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(ROOT / "tests/crash_child.py"), *arguments]
    quiet = subprocess.DEVNULL if life < KILLS else None
    ranks = [subprocess.Popen(command, cwd=ROOT, env={**environment, "RANK": str(rank)}, stderr=quiet) for rank in range(2)]
    return [rank.wait(timeout=250) for rank in ranks]


def lives(path: Path) -> list[tuple[int, int, int, list[int], dict[str, Any]]]:
    return [ast.literal_eval(line) for line in path.read_text().splitlines() if line.endswith(")")]


@pytest.mark.timeout(600 + 60 * KILLS)
def test_killed_ranks_lose_no_step_and_reuse_no_noise(tmp_path: Path) -> None:
    steps = STEPS * (KILLS + 1)
    for life in range(KILLS):
        assert -signal.SIGKILL in live(life, str(tmp_path), str(KILLS), str(steps))
    assert live(KILLS, str(tmp_path), str(KILLS), str(steps)) == [0, 0]
    told = [lives(tmp_path / f"rank{rank}.log") for rank in range(2)]
    released = flashnorm_compile.read_ledger(tmp_path / "ledger.jsonl").releases
    # What a killed life released beyond its last checkpoint counts as well, once in each life at most.
    assert steps <= released <= steps + KILLS
    assert [log[-1][2] for log in told] == [released, released]
    ended = {}
    for log in told:
        keys = {}
        for life, step, _, drawn, gradients in log[:-1]:
            keys[life, step] = tuple(drawn)
            ended[step] = gradients
        assert len(set(keys.values())) == len(keys)
    both = {(life, step): drawn for life, step, _, drawn, _ in told[1]}
    assert all(both.get((life, step), drawn) == drawn for life, step, _, drawn, _ in told[0])
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    for name, parameter in model.named_parameters():
        total = sum(torch.tensor(ended[step][name]) for step in range(steps))
        final = torch.tensor(told[0][-1][4][name])
        torch.testing.assert_close(final, parameter.detach() - 0.1 * total, rtol=1e-5, atol=1e-6)

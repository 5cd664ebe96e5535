"""Ranks that die: a training goes on from its last checkpoint, loses no counted step and draws no noise twice.

By default two ranks die, one in each of two lives, and one rank of the example under torchrun. ``FLASHNORM_TEST_KILLS=20`` kills so
many, in processes of the test's own and once more under torchrun's elastic restart.
"""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crash_child
import gloo
import psutil
import pytest
import torch
from torch import nn

import flashnorm_compile

ROOT = Path(__file__).parent.parent
ASKED = "FLASHNORM_TEST_KILLS" in os.environ
KILLS = int(os.environ.get("FLASHNORM_TEST_KILLS", "2"))
STEPS = 5  # for each life


def torchrun(restarts: int, *arguments: str) -> subprocess.Popen[str]:
    """Two ranks on this machine, started again when one has died."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition: Callable[[], Any], agent: subprocess.Popen[str]) -> Any:
    while not (found := condition()):
        assert agent.poll() is None, agent.communicate()[0]
        time.sleep(0.01)
    return found


@pytest.mark.timeout(600)
def test_the_example_trains_on_after_a_death(tmp_path: Path) -> None:
    arguments = ("--backend", "flashnorm_eager", "--steps", "24", "--save-every", "2", "--checkpoint", str(tmp_path))
    agent = torchrun(1, "-m", "examples.sharded_llama", *arguments)
    try:
        wait_for((tmp_path / "latest").exists, agent)
        ranks = [child for child in psutil.Process(agent.pid).children() if "examples.sharded_llama" in child.cmdline()]
        assert len(ranks) == 2
        ranks[1].kill()
        out = agent.communicate(timeout=500)[0]
    finally:
        agent.kill()
    assert agent.returncode == 0, out
    words = out.strip().splitlines()[-1].split()
    assert float(words[3]) < float(words[1])
    released = flashnorm_compile.read_ledger(tmp_path / "ledger.jsonl").releases
    # What was released between the last checkpoint and the death counts as well.
    assert 24 <= released <= 26
    assert words[5:7] == [str(released), "steps,"]


def alone(folder: Path) -> None:
    """Each life in processes that the test starts. Who waits for a dead rank ends as well."""
    for life in range(KILLS + 1):
        environment = {"TORCHELASTIC_RESTART_COUNT": str(life)}
        ranks = gloo.start(2, crash_child.lives, folder, KILLS, STEPS * (KILLS + 1), environment=environment)
        for rank in ranks:
            rank.join(timeout=250)
        codes = [rank.exitcode for rank in ranks]
        if life < KILLS:
            assert codes[life % 2] == -signal.SIGKILL, codes
            assert codes[1 - life % 2] == 1, codes
        else:
            assert codes == [0, 0]


def under_an_agent(folder: Path) -> None:
    agent = torchrun(KILLS, "tests/crash_child.py", str(folder), str(KILLS), str(STEPS * (KILLS + 1)))
    out = agent.communicate(timeout=500 + 60 * KILLS)[0]
    assert agent.returncode == 0, out


@pytest.mark.timeout(600 + 60 * KILLS)
@pytest.mark.parametrize("live", [alone, under_an_agent] if ASKED else [alone])
def test_killed_ranks_lose_no_step_and_reuse_no_noise(live: Callable[[Path], None], tmp_path: Path) -> None:
    live(tmp_path)
    steps = STEPS * (KILLS + 1)
    told = [notes(tmp_path / f"rank{rank}.log") for rank in range(2)]
    assert {note[0] for log in told for note in log} == set(range(KILLS + 1))
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


def notes(path: Path) -> list[tuple[int, int, int, list[int], dict[str, Any]]]:
    return [ast.literal_eval(line) for line in path.read_text().splitlines() if line.endswith(")")]


def test_a_death_within_a_step_leaves_nothing_to_step_with(tmp_path: Path) -> None:
    ranks = gloo.start(2, crash_child.death_within_a_step, tmp_path)
    for rank in ranks:
        rank.join(timeout=250)
    assert [rank.exitcode for rank in ranks] == [0, -signal.SIGKILL]
    assert (tmp_path / "rank0.log").read_text() == "stands still\n"

"""Ranks of trainings that die: what test_torchrun.py runs, in processes of its own or under torchrun.

    python tests/crash_child.py FOLDER KILLS STEPS     with what torchrun puts into the environment

In each of the first KILLS lives one rank, in turn, is killed at a random moment of the loop. What was done is kept in FOLDER.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from flashnorm_compile.passes.errors import UnprotectedGradientError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import flashnorm_compile
from examples.sharded_llama import Training, load, save

OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 0.5}
TIMEOUT = timedelta(seconds=60)


def lives(folder: Path, kills: int, steps: int) -> None:
    """One life: goes on from the last checkpoint until it is killed, or ``steps`` are made in all lives together."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), dist.get_rank()
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    flashnorm_compile.fully_shard(model)
    training = Training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    done = load(training, folder)
    state = flashnorm_compile.privacy(model)
    loss = torch.compile(lambda x: model(x).square().mean(), backend="flashnorm_eager", options=OPTIONS)
    for step in range(done, steps):
        if step == done + 1 and life < kills and rank == life % 2:
            die_within(0.15, seed=life)  # three steps take longer
        drawn = torch.Generator().manual_seed(100 * step + rank)
        loss(torch.randn(3, 4, generator=drawn)).backward()
        gradients = {name: p.grad.full_tensor().tolist() for name, p in model.named_parameters()}
        keys = state.noise_keys(state._releases).flatten().tolist()
        note(folder / f"rank{rank}.log", repr((life, step, state.steps, keys, gradients)))
        time.sleep(0.05)
        training.optimizer.step()
        training.optimizer.zero_grad()
        save(training, folder, step + 1)
        dist.barrier()
    weights = {name: p.full_tensor().tolist() for name, p in model.named_parameters()}
    note(folder / f"rank{rank}.log", repr((life, steps, state.steps, [], weights)))
    dist.destroy_process_group()


def die_within(seconds: float, seed: int) -> None:
    delay = random.Random(seed).uniform(0, seconds)
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


class _DiesAfter(TorchDispatchMode):
    """Kills this process when it has called an operator so many times."""

    def __init__(self, operator: Any, calls: int) -> None:
        super().__init__()
        self.operator, self.calls = operator, calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls -= func is self.operator
        if self.calls == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def death_within_a_step(folder: Path) -> None:
    """Rank 1 dies when it has sent some of a step's gradients. Rank 0 hears of it and has nothing to step with: neither the sums
    without noise of the micro-batch before, nor a part of the step."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    flashnorm_compile.fully_shard(model)
    optimizer, state = torch.optim.SGD(model.parameters(), lr=0.1), flashnorm_compile.privacy(model)
    loss = torch.compile(lambda x: model(x).square().mean(), backend="flashnorm_eager", options=OPTIONS)
    with state.accumulate():
        loss(torch.randn(3, 4)).backward()
    sums = {name: p.grad.to_local().clone() for name, p in model.named_parameters()}
    weights = {name: p.to_local().clone() for name, p in model.named_parameters()}
    last = loss(torch.randn(3, 4))
    if dist.get_rank() == 1:
        with _DiesAfter(torch.ops._c10d_functional.reduce_scatter_tensor.default, 2):
            last.backward()
    with pytest.raises(RuntimeError, match=r"[Cc]onnection"):
        last.backward()
    assert all(torch.equal(p.grad.to_local(), sums[name]) for name, p in model.named_parameters())
    with pytest.raises(UnprotectedGradientError, match="added no noise"):
        optimizer.step()
    assert all(torch.equal(p.to_local(), weights[name]) for name, p in model.named_parameters())
    note(folder / "rank0.log", "stands still")
    os._exit(0)  # the process group cannot be ended in order without the other rank


if __name__ == "__main__":
    lives(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

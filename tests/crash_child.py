"""One rank of a training that dies, is started again, and goes on from the last checkpoint. See test_torchrun.py.

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

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

import flashnorm_compile
from examples.sharded_llama import Training

OPTIONS = {"max_grad_norm": 1.0, "noise_multiplier": 0.5}


def main(folder: Path, kills: int, steps: int) -> None:
    life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    flashnorm_compile.fully_shard(model)
    training = Training(model, torch.optim.SGD(model.parameters(), lr=0.1))
    latest = folder / "latest"
    done = int(latest.read_text()) if latest.exists() else 0
    if done:
        dcp.load({"training": training}, checkpoint_id=folder / f"step{done}")
    state = flashnorm_compile.privacy(model)
    if rank == 0:
        state.record_to(folder / "ledger.jsonl")
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
        dcp.save({"training": training}, checkpoint_id=folder / f"step{step + 1}")
        if rank == 0:
            (folder / "draft").write_text(str(step + 1))
            (folder / "draft").replace(latest)
        dist.barrier()
    weights = {name: p.full_tensor().tolist() for name, p in model.named_parameters()}
    note(folder / f"rank{rank}.log", repr((life, steps, state.steps, [], weights)))


def die_within(seconds: float, seed: int) -> None:
    delay = random.Random(seed).uniform(0, seconds)
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


def note(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
    dist.destroy_process_group()

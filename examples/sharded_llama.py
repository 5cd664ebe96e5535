"""DP-SGD of a small Llama on several devices: fully sharded, parameters in bfloat16, gradients reduced in float32.

torchrun --nproc-per-node 2 -m examples.sharded_llama                  # GPUs where there are some, else gloo on the CPU
torchrun --nproc-per-node 4 -m examples.sharded_llama --replicas 2     # HSDP: shards within pairs, two copies
torchrun --nproc-per-node 2 -m examples.sharded_llama --checkpoint run # saves, and goes on from what is there

With --checkpoint, and torchrun's --max-restarts, a training goes on after a rank has died. Set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
for torchrun then: torch 2.13 otherwise lets restarted ranks look for each other where the dead ones were, and they cannot connect.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import TensorDataset

from benchmarks.models.llama import Llama
from flashnorm_compile import fully_shard, privacy, private_dataloader

OPTIONS: dict[str, Any] = {"max_grad_norm": 1.0, "noise_multiplier": 0.6}
TOKENS, WORDS = 32, 64


def sharded_model(device: str, replicas: int) -> nn.Module:
    """Built on the meta device, sharded block by block, then made real: no rank ever holds all of it."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh(device, (ranks,) if replicas == 1 else (replicas, ranks // replicas))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    with torch.device("meta"):
        model = Llama(vocabulary=WORDS, width=64, layers=2, heads=4, key_heads=2, mlp_width=96)
    for layer in model.decoder.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device=device)
    for parameter in model.parameters():  # the same on copies: DTensor's random numbers follow the place in the whole
        nn.init.normal_(parameter, std=0.05) if parameter.dim() == 2 else nn.init.ones_(parameter)
    return model


def records() -> TensorDataset:
    """Made-up texts, int64 [records, TOKENS + 1]: each counts on in steps of its own, one to three."""
    drawn = torch.Generator().manual_seed(0)
    start, stride = torch.randint(WORDS, (512, 1), generator=drawn), torch.randint(1, 4, (512, 1), generator=drawn)
    return TensorDataset((start + stride * torch.arange(TOKENS + 1)) % WORDS)


class Training:
    """What a checkpoint holds: model and optimizer as FSDP2's checkpoints have them, counters and account of the privacy state."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "privacy": privacy(self.model).state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        privacy(self.model).load_state_dict(state["privacy"])


def save(training: Training, folder: Path, step: int) -> None:
    """Whole or not at all: the step is written down when every rank has saved its part."""
    dcp.save({"training": training}, checkpoint_id=folder / f"step{step}")
    if dist.get_rank() == 0:
        (folder / "draft").write_text(str(step))
        (folder / "draft").replace(folder / "latest")


def load(training: Training, folder: Path) -> int:
    """Goes on from the last checkpoint in ``folder``; how many steps were done there, 0 if there is none.

    Rank 0 opens the ledger: steps that were made after the checkpoint and are lost have been released, and stay counted.
    """
    folder.mkdir(parents=True, exist_ok=True)
    latest = folder / "latest"
    done = int(latest.read_text()) if latest.exists() else 0
    if done:
        dcp.load({"training": training}, checkpoint_id=folder / f"step{done}")
    if dist.get_rank() == 0:
        privacy(training.model).record_to(folder / "ledger.jsonl")
    return done


def train(model: nn.Module, steps: int, backend: str, checkpoint: Path | None, save_every: int) -> list[float]:
    """Mean losses of this rank's samples, one for each step that is made here."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    training = Training(model, optimizer)
    done = load(training, checkpoint) if checkpoint is not None else 0
    if done >= steps:
        return []
    loader = private_dataloader(records(), privacy(model), expected_batch_size=64, truncated_batch_size=80,
                                physical_batch_size=80 // dist.get_world_size(), steps=steps - done)  # fmt: skip

    def loss(tokens: Tensor, mask: Tensor) -> Tensor:
        logits = model(tokens[:, :-1]).float()
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (losses.view(len(tokens), -1).mean(1) * mask).mean()

    private_loss = torch.compile(loss, backend=backend, options=OPTIONS)
    losses = []
    for step, (tokens, mask) in enumerate(loader, done + 1):
        value = private_loss(tokens.to(device), mask.to(device))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item() * len(mask) / max(float(mask.sum()), 1.0))
        if checkpoint is not None and (step % save_every == 0 or step == steps):
            save(training, checkpoint, step)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1, help="copies of the sharded model (HSDP)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--backend", default="flashnorm")
    parser.add_argument("--checkpoint", type=Path, help="folder to go on from, and to save in")
    parser.add_argument("--save-every", type=int, default=10, help="steps between checkpoints")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(dist.get_node_local_rank())
    model = sharded_model(device, arguments.replicas)
    losses = train(model, arguments.steps, arguments.backend, arguments.checkpoint, arguments.save_every)
    if dist.get_rank() == 0 and losses:
        state = privacy(model)
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f} in {state.steps} steps, epsilon {state.epsilon(1e-5):.2f} at 1e-5")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

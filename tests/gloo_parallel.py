"""What the ranks of test_many_devices.py do under tensor parallelism and DistributedDataParallel; see gloo_scenarios.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from flashnorm_compile.passes.errors import PrivacyError, UnsupportedGraphError
from gloo_scenarios import BOTH, LOCAL, Block, Compile, Layout, Tied, by_blocks, compiled, loss_of, trains_as_one_process
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import flashnorm_compile


@functools.cache
def data_and_parts() -> DeviceMesh:
    """Two ranks hold parts of the same samples; two such pairs."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "parts"))


def parallel_blocks(model: Tied, mesh: DeviceMesh) -> None:
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def parallel_everywhere(model: Tied, mesh: DeviceMesh) -> None:
    """Between layers activations lie along the sequence; the embedding by rows, tied to the head."""
    along: dict[str, Any] = {"output_layouts": Shard(1), "use_local_output": False}
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(use_local_output=False), "down": RowwiseParallel(**along)})
    plan = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), **along),
        "frozen": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate(), use_local_output=False),
        "norm": SequenceParallel(),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    parallelize_module(model, mesh, plan)
    model.head.weight = model.embedding.weight


def tensor_parallel() -> None:
    """Two pairs of ranks, each with parts of the same samples."""
    mesh = data_and_parts()["parts"]
    trains_as_one_process(lambda model: parallel_blocks(model, mesh), 0, 1, BOTH)


def tensor_parallel_and_fsdp() -> None:
    data, parts = data_and_parts()["data"], data_and_parts()["parts"]

    def layout(model: Tied) -> None:
        parallel_everywhere(model, parts)
        by_blocks(mesh=data)(model)

    trains_as_one_process(layout, data.get_local_rank(), 2, BOTH)


def tensor_parallel_and_copies() -> None:
    data, parts = data_and_parts()["data"], data_and_parts()["parts"]

    def layout(model: Tied) -> None:
        parallel_blocks(model, parts)
        flashnorm_compile.replicate(model, mesh=data)

    trains_as_one_process(layout, data.get_local_rank(), 2, BOTH)


def tensor_parallel_refusals() -> None:
    """Ranks that hold parts of the same samples are given different ones, or start from different copies."""
    parts = data_and_parts()["parts"]

    def fails(match: str, change: Callable[[nn.Module, Tensor], Any]) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(6), Block(6))
        parallelize_module(model[1], parts, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        x = torch.randn(LOCAL, 6)
        if parts.get_local_rank() == 1:
            change(model, x)
        options = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}
        private = torch.compile(lambda x: model(x).square().mean(), backend="flashnorm_eager", options=options)
        with pytest.raises(PrivacyError, match=match):
            private(x).backward()
        assert all(p.grad is None for p in model.parameters())

    fails(r"compute parts of the same samples .* inputs differ: x\. Feed every rank", lambda model, x: x[1].mul_(2))
    fails(r"the ranks of its tensor-parallel group disagree", lambda model, x: model[0].weight.detach().mul_(2))


def compiled_around_ddp(model: nn.Module, options: dict[str, Any]) -> Callable[..., Tensor]:
    """DDP's buckets hold a parameter each; for other backends Dynamo would cut the graph at them."""
    wrapped = DistributedDataParallel(model, bucket_cap_mb=1e-5)
    assert flashnorm_compile.privacy(wrapped).names == [name for name, _ in model.named_parameters()]
    return compiled(wrapped, options)


def compiled_inside_ddp(model: nn.Module, options: dict[str, Any]) -> Callable[..., Tensor]:
    wrapped = DistributedDataParallel(
        torch.compile(model, backend="flashnorm_eager", options=options), gradient_as_bucket_view=True
    )
    return lambda ids, labels: loss_of(wrapped, ids, labels)


def distributed_data_parallel() -> None:
    """Its reducer rests: gradients and noise are those of one process."""
    with mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1):
        trains_as_one_process(lambda model: None, dist.get_rank(), 4, ["flat"], compiled_around_ddp)
    trains_as_one_process(lambda model: None, dist.get_rank(), 4, ["per_layer"], compiled_inside_ddp)


def one_rank() -> None:
    """Every rank is a world of its own, on which nothing is sent; each lays its parameters out in another way."""
    alone = init_device_mesh("cpu", (4, 1), mesh_dim_names=("world", "data"))["data"]
    copy_of_one = init_device_mesh("cpu", (4, 1, 1), mesh_dim_names=("world", "replicate", "shard"))["replicate", "shard"]

    def compiled_in_ddp(model: nn.Module, options: dict[str, Any]) -> Callable[..., Tensor]:
        return compiled(DistributedDataParallel(model, process_group=alone.get_group()), options)

    ways: list[tuple[Layout, Compile | None]] = [
        (by_blocks(mesh=alone), None),
        (by_blocks(mesh=copy_of_one, reshard_after_forward=False), None),
        (lambda model: flashnorm_compile.replicate(model, mesh=alone), None),
        (lambda model: None, compiled_in_ddp),
    ]
    layout, compile_ = ways[dist.get_rank()]
    trains_as_one_process(layout, 0, 1, BOTH, compile_)


def ddp_refusals() -> None:
    """What only its reducer could do, and graphs that ran without DDP before."""

    def fails(match: str, change: Callable[[DistributedDataParallel], Any], before: bool = False, **settings: Any) -> None:
        torch._dynamo.reset()
        options = {"max_grad_norm": 1.0, "noise_multiplier": 1.0}
        inner = torch.compile(Block(6), backend="flashnorm_eager", options=options)
        if before:
            inner(torch.ones(3, 6))
        wrapped = DistributedDataParallel(inner, **settings)
        change(wrapped)
        with pytest.raises(UnsupportedGraphError, match=match):
            wrapped(torch.ones(3, 6))

    fails("was given static_graph=True, which", lambda ddp: None, static_graph=True)
    fails(r"was given register_comm_hook\(\), which", lambda ddp: ddp.register_comm_hook(None, allreduce_hook))
    fails(r"was compiled outside of DistributedDataParallel runs inside it", lambda ddp: None, before=True)


SCENARIOS = [
    distributed_data_parallel, one_rank, ddp_refusals, tensor_parallel, tensor_parallel_and_fsdp, tensor_parallel_and_copies,
    tensor_parallel_refusals,
]  # fmt: skip

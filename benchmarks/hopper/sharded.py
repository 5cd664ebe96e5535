"""What one rank of a sharded model computes, sends and holds in a step, from the code generated for it. Nothing is sent.

Ranks are pretended by PyTorch's fake process group, tensors are fake: neither memory nor other processes are needed, whatever the
size. The non-private step is compiled from the same graph: the same gathers, made again in the backward, without a clip.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from flashnorm_compile.passes import _compat
from flashnorm_compile.passes.collectives import mark_recomputed_pass, merge_collectives_pass
from flashnorm_compile.passes.graph_spec import GraphSpec
from flashnorm_compile.passes.match import gradient_outputs
from flashnorm_compile.passes.rules.collectives import GATHERS, is_collective
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.case import Problem
from benchmarks.hopper.estimate import Work, peaks_named
from benchmarks.hopper.fakes import fake_problem
from benchmarks.hopper.generate import Generated, GeneratedGraph, hopper
from benchmarks.hopper.memory import Walked
from benchmarks.network import GPUS_PER_NODE
from flashnorm_compile.backend import with_gathers
from flashnorm_compile.distributed.groups import ranks_of
from flashnorm_compile.inputs import classify, example_of

c10d = torch.ops._c10d_functional


@contextlib.contextmanager
def pretended_ranks(shape: Sequence[int]) -> Iterator[DeviceMesh]:
    """This process is rank 0 of a mesh of that shape. Collectives return at once and move nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=math.prod(shape))
    try:
        yield init_device_mesh("cpu", tuple(shape))
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True)
class StepAmounts:
    """One step of one rank. Seconds are rooflines without communication. Bytes sent are those of whole tensors: what a gather
    makes, what a reduce-scatter or an all-reduce takes.

    `clipped_seconds`: what follows the clip factors. `saved_bytes`: what the forward keeps for the backward. `working_bytes`: the
    most that the backward holds at once, with that and with gathered parameters, without shards (of parameters, gradients,
    optimizer state) and inputs. `clip_bytes`: what of it is held when the clip factors are made; 0 without privacy.
    """

    parameters: float
    forward_seconds: float
    backward_seconds: float
    clipped_seconds: float
    flops: float
    gathers: float
    gathers_again: float
    reductions: float
    gathered_bytes: float
    gathered_again_bytes: float
    scattered_bytes: float
    reduced_bytes: float
    saved_bytes: float
    working_bytes: float
    clip_bytes: float

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds + self.clipped_seconds

    def minus(self, other: StepAmounts) -> StepAmounts:
        theirs = vars(other)
        return StepAmounts(**{name: value - theirs[name] for name, value in vars(self).items()})

    def extrapolated(self, deeper: StepAmounts, steps: float) -> StepAmounts:
        """`deeper` has one block more; this has `steps` more than self."""
        mine, theirs = vars(self), vars(deeper)
        return StepAmounts(**{name: mine[name] + steps * (theirs[name] - mine[name]) for name in mine})


def step_amounts(
    build: Callable[[], Problem], shard: Callable[[nn.Module], Any], device: str, options: Mapping[str, Any] | None
) -> StepAmounts:
    """Generates the code of one step. `options` of the private one, None without privacy. Takes seconds to minutes."""
    with fake_problem(build) as problem:
        parameters = sum(p.numel() for p in problem.model.parameters())
    shard(problem.model)
    generated = generated_step(problem, device, options)
    forward, backward = generated.graphs
    before, after = _parted(backward.work)
    return StepAmounts(
        parameters=parameters,
        forward_seconds=_seconds(forward.work, device),
        backward_seconds=_seconds(before, device),
        clipped_seconds=_seconds(after, device),
        flops=generated.flops,
        **_sent(forward, backward),
        saved_bytes=sum(storage.nbytes for storage in {*_walked(forward.walked).outputs} if storage is not None),
        working_bytes=_walked(backward.working).peak_bytes,
        clip_bytes=_walked(backward.working).live_at.get("torch.ops.flashnorm.release.default", 0),
    )


def generated_step(problem: Problem, device: str, options: Mapping[str, Any] | None) -> Generated:
    """The code of one step of a sharded model of fake parameters; `options` of the private one, None without privacy."""
    # What Dynamo knows about torch's functions is collected once, and must not hold a pretended GPU's.
    torch._dynamo.trace_rules.get_torch_obj_rule_map()
    given: dict[str, Any] = {"backend": _without_privacy} if options is None else {"backend": "flashnorm", "options": dict(options)}
    with hopper(device, devices=GPUS_PER_NODE) as generated:
        step = torch.compile(problem.mean_loss(problem.model), dynamic=False, **given)
        step(*problem.inputs, problem.targets).backward()
    return generated


def _without_privacy(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """A backend that treats collectives as "flashnorm" does, and leaves gradients as they are."""
    nodes = gm.graph.find_nodes(op="placeholder")
    ranks = ranks_of(example_of(node) for node in nodes)
    spec = GraphSpec(tuple(with_gathers(nodes, classify(gm, None))), data_meshes=ranks.data_meshes, data_ranks=ranks.data_ranks)
    settings = _compat.with_joint_pass({}, _SameCollectives(spec))
    compiled: Any = compile_fx(gm, list(inputs), config_patches=settings)
    return compiled  # type: ignore[no-any-return]


class _SameCollectives(CustomGraphPass):
    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec

    def __call__(self, graph: fx.Graph) -> None:
        outputs = [(i, node) for i, _, node in gradient_outputs(graph, self.spec) if node is not None]
        merge_collectives_pass(graph, outputs, self.spec.data_groups)
        mark_recomputed_pass(graph, self.spec)

    def uuid(self) -> str:
        return f"benchmarks.hopper.sharded {self.spec!r}"


def _parted(work: Sequence[Work]) -> tuple[Sequence[Work], Sequence[Work]]:
    """Up to the clip factors, and from there on; all of it comes first without privacy."""
    place = next((i for i, one in enumerate(work) if "flashnorm.release" in one.name), len(work) - 1)
    return work[: place + 1], work[place + 1 :]


def _seconds(work: Sequence[Work], device: str) -> float:
    peaks = peaks_named(device)
    return sum(one.seconds(peaks) for one in work if "_c10d_functional" not in one.name)


def _sent(forward: GeneratedGraph, backward: GeneratedGraph) -> dict[str, float]:
    first, again = (_collectives(one, *GATHERS) for one in (forward, backward))
    scattered = _collectives(backward, c10d.reduce_scatter_tensor.default)
    reduced = _collectives(backward, c10d.all_reduce.default, c10d.all_reduce_.default)  # Inductor writes in place
    known = len(first) + len(again) + len(scattered) + len(reduced)
    every = [node for one in (forward, backward) for node in one.captured.graph.nodes if is_collective(node.target)]
    others = [node for node in every if node.target is not c10d.wait_tensor.default]
    assert len(others) == known, f"collectives of a kind that is not counted: {others}"
    return {
        "gathers": len(first),
        "gathers_again": len(again),
        "reductions": max(len(scattered), len(reduced)),
        "gathered_bytes": sum(node.meta["val"].nbytes for node in first),
        "gathered_again_bytes": sum(node.meta["val"].nbytes for node in again),
        "scattered_bytes": sum(node.args[0].meta["val"].nbytes for node in scattered),  # type: ignore[union-attr]
        "reduced_bytes": sum(node.args[0].meta["val"].nbytes for node in reduced),  # type: ignore[union-attr]
    }


def _collectives(one: GeneratedGraph, *targets: Any) -> list[fx.Node]:
    return [node for node in one.captured.graph.nodes if node.target in targets]


def _walked(walked: Walked | None) -> Walked:
    assert walked is not None, "no code was generated"
    return walked

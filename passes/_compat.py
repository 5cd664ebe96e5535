"""Everything that differs between torch 2.11 and 2.15, or that torch does not promise to keep."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import fx, nn
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._functorch._aot_autograd.descriptors import GradAOTOutput, SubclassGetAttrAOTOutput
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import TracingContext, detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.experimental.symbolic_shapes import StrictMinMaxConstraint
from torch.utils._python_dispatch import _disable_current_modes

from .errors import OptionsError


def mode_settings(mode: str | None) -> dict[str, Any]:
    """What a ``torch.compile`` mode means for Inductor's config."""
    options: Any = torch._inductor.list_mode_options(mode) if mode else {}
    return dict(options)


def unknown_setting(names: Sequence[str]) -> str | None:
    """The first name that Inductor's config does not have."""
    known = inductor_config.get_config_copy()
    return next((name for name in names if name not in known), None)


class _Chained(CustomGraphPass):
    """Several passes where torch takes one (2.11)."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = list(passes)

    def __call__(self, graph: fx.Graph) -> None:
        for one in self.passes:
            one(graph)

    def uuid(self) -> Any:
        parts = [one.uuid() if isinstance(one, CustomGraphPass) else None for one in self.passes]
        return None if any(part is None for part in parts) else tuple(parts)


def with_joint_pass(settings: Mapping[str, Any], ours: CustomGraphPass) -> dict[str, Any]:
    """Inductor settings in which our pass runs first and a user's own passes after it, on the private graph."""
    key = "joint_custom_pre_pass"
    users = settings.get(key, getattr(inductor_config, key))
    others = [] if users is None else list(users) if isinstance(users, (list, tuple)) else [users]
    return {**settings, key: ours if not others else _Chained([ours, *others])}


def run_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """An inner compiler that runs the graph as it is.

    Eager kernels may lay their results out in other strides than tracing foresaw, so a view is taken as a reshape.
    """
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default
    gm.recompile()

    def run(args: list[Any]) -> Any:
        values = list(args)
        args.clear()
        return gm(*values)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def without_modes() -> AbstractContextManager[Any]:
    """Tensors made inside are real and computed at once, whatever is being traced."""
    return _disable_current_modes()


def fake_mode_of(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
    return detect_fake_mode([*example_inputs, *(n.meta.get("example_value") for n in gm.graph.find_nodes(op="placeholder"))])


def copy_captured(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that Dynamo captured, with what AOTAutograd looks for on the module and on its inputs."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(gm.graph, mapping)
    graph.output(output)
    graph.output_node().meta.update(gm.graph.output_node().meta)
    for old, new in mapping.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # type: ignore[attr-defined]
    copied = fx.GraphModule(gm, graph, type(gm).__name__)
    copied.meta.update(gm.meta)
    for name in ("_param_name_to_source", "compile_subgraph_reason", "_backend_id"):
        if hasattr(gm, name):
            setattr(copied, name, getattr(gm, name))
    return copied


def constant_source(name: str) -> Any:
    """A source for an input that Dynamo did not make; AOTAutograd asks every input for one."""
    return ConstantSource(name)


def real_parameters(nodes: Sequence[fx.Node]) -> dict[str, nn.Parameter]:
    """The parameters behind a captured graph's placeholders, by source; empty where Dynamo no longer knows them."""
    found: dict[str, nn.Parameter] = {}
    for node in nodes:
        argument = node.meta.get("grapharg")
        example = getattr(argument, "example", None)
        if isinstance(example, nn.Parameter) and example.requires_grad:
            found[node.name] = example
    return found


def traced_size(shape_env: Any, symbol: Any) -> int:
    """The value that a symbol had while tracing. ``size_hint`` warns since its successor is there."""
    hint = getattr(shape_env, "guarding_hint_or_throw", None) or shape_env.size_hint
    return int(hint(symbol))


def has_promised_ranges() -> bool:
    """Whether the graph that is being compiled has a size that must work for a whole range, by ``mark_dynamic`` with bounds."""
    context = TracingContext.try_get()
    known = [] if context is None else context.tensor_to_context.values()
    sizes = (size for one in known for size in getattr(one, "constraint_sizes", None) or ())
    return any(isinstance(size, StrictMinMaxConstraint) for size in sizes)


def keep_graphs_whole(backends: Sequence[Callable[..., Any]]) -> None:
    """Dynamo cuts what runs inside DistributedDataParallel at the reducer's buckets. From now on it hands graphs for these backends
    over whole; others are cut as before."""
    cut = DDPOptimizer.compile_fn

    def compile_fn(self: Any, *args: Any, **kwargs: Any) -> Any:
        ours = _innermost(self.backend_compile_fn) in backends
        return self.backend_compile_fn(*args, **kwargs) if ours else cut(self, *args, **kwargs)

    DDPOptimizer.compile_fn = compile_fn  # type: ignore[method-assign]


def _innermost(function: Any) -> Any:
    """What ``torch.compile`` and Dynamo have wrapped."""
    while (inner := getattr(function, "__wrapped__", None) or getattr(function, "compiler_fn", None)) is not None:
        function = inner
    return function


def is_cut_for_ddp() -> bool:
    """Whether the graph that is compiled now is one of the pieces that Dynamo makes for DistributedDataParallel."""
    return getattr(TracingContext.try_get(), "ddp_optimizer_ctx", None) is not None


def joined_mesh(outer: DeviceMesh, inner: DeviceMesh) -> DeviceMesh:
    """The mesh of both meshes' dimensions.

    Raises:
        OptionsError: they are not dimensions of one mesh.
    """
    try:
        return DeviceMesh._concatenate([outer, inner])
    except RuntimeError as error:
        raise OptionsError(
            f"{outer} and {inner} are not dimensions of one mesh. Make both with one call, such as "
            'init_device_mesh(device, (data, parts), mesh_dim_names=("data", "parts")), and pass mesh["data"] and mesh["parts"].'
        ) from error


def shard_within(part: DTensor, placement: Shard) -> Any:
    """The placement of a dimension along which a mesh shards the parts that ``part``'s own mesh has cut before."""
    cuts = math.prod([part.device_mesh.size(i) for i, one in enumerate(part.placements) if one.is_shard(placement.dim)])
    return placement if cuts == 1 else _StridedShard(placement.dim, split_factor=cuts)


def graph_break_reasons() -> list[str]:
    """The first line of each distinct reason for which Dynamo has broken a graph so far."""
    return list(dict.fromkeys(str(reason).strip().split("\n", 1)[0] for reason in counters["graph_break"]))


def _plain(desc: Any) -> Any:
    """The output itself, where the graph returns a tensor inside it (the local part of a DTensor)."""
    while isinstance(desc, SubclassGetAttrAOTOutput):
        desc = desc.base
    return desc


def never_run(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A module for a graph that is looked at and taken apart only: no code is generated for it."""
    return _LazyGraphModule(root, graph)


def partitioned_backward(joint: fx.GraphModule) -> fx.Graph:
    """The backward graph that AOTAutograd's partitioner makes of a joint graph, which it may take apart."""
    outputs = joint.graph.output_node().meta["desc"]
    # Gradients come last, one for each input; those that nobody needs have no descriptor.
    forward = next(i for i, desc in enumerate(outputs) if desc is None or isinstance(_plain(desc), GradAOTOutput))
    _, backward = min_cut_rematerialization_partition(joint, None, compiler="inductor", num_fwd_outputs=forward)
    return backward.graph


def gloo_group(name: str, ranks: Sequence[int], timeout: timedelta) -> Any:
    """A process group of gloo's alone, which all of ``ranks`` make under one name and no other rank needs to know of."""
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
    return dist.ProcessGroupGloo(store, list(ranks).index(dist.get_rank()), len(ranks), timeout=timeout)

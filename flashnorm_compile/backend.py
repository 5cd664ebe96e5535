"""The ``torch.compile`` backends: captured graph in, private graph out.

``flashnorm`` compiles with Inductor. ``flashnorm_eager`` does everything up to code generation and runs the rewritten graphs as
they are, for debugging ("is Inductor to blame?") and fast tests. Both are found by name through entry points.
"""

from __future__ import annotations

import linecache
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch._functorch.config
from torch import fx, nn
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch.distributed.tensor import DTensor

from . import dump, guard
from .cells import split_cells
from .distributed import ddp
from .distributed.fully_shard import shardings
from .distributed.groups import is_split, ranks_of
from .distributed.tensor_parallel import keep_layouts
from .inputs import classify, example_of, traced
from .options import Options
from .passes import _compat
from .passes.errors import OptionsError, UnsupportedGraphError
from .passes.graph_spec import GraphSpec, InputSpec, Role
from .passes.private_pass import Observer, PrivateGradientsPass
from .private_graph import CompiledGraph, EmptyBatch, PrivateGraph

log = logging.getLogger(__name__)
HANDLE = "flashnorm_handle"


def flashnorm(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> CompiledGraph:
    """Backend ``"flashnorm"``: private gradients, compiled by Inductor.

    Args:
        gm: a graph captured by Dynamo.
        example_inputs: its example inputs.
        options: see ``flashnorm_compile.Options``; what is left out comes from ``flashnorm_compile.config``.
        mode: one of ``torch.compile``'s modes, for Inductor.

    Raises:
        PrivacyError: (a subclass that says what, where and why) if the gradients cannot be made private. Nothing runs then.
    """
    return compile_private(gm, example_inputs, Options.parse(options), mode=mode)


def flashnorm_eager(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> CompiledGraph:
    """Backend ``"flashnorm_eager"``: as ``flashnorm``, without code generation."""
    return compile_private(gm, example_inputs, Options.parse(options), mode=mode, inner_compile=_compat.run_graph)


def compile_private(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    *,
    mode: str | None = None,
    inner_compile: Callable[..., Any] = compile_fx_inner,
    observers: tuple[Observer, ...] = (),
    protect: bool = True,
) -> CompiledGraph:
    """Compiles one captured graph; graphs that train nothing go to Inductor as they are.

    ``protect``: whether optimizers refuse the parameters' gradients from here on unless they are private.
    """
    settings = {**_compat.mode_settings(mode), **(options.inductor or {})}
    unknown = _compat.unknown_setting(list(settings))
    if unknown is not None:
        raise OptionsError(
            f"inductor={{{unknown!r}: ...}}: torch._inductor.config has no setting of that name. Remove or correct it."
        )
    nodes = gm.graph.find_nodes(op="placeholder")
    trains = torch.is_grad_enabled() and any(_is_trainable(example_of(node)) for node in nodes)
    if not trains:
        return _compile(gm, example_inputs, inner_compile, settings)
    if protect:
        _protect(nodes)
    specs = classify(gm, options.batch_dims)
    reason = break_reason(gm) or resumed_after(gm)
    examples = [example_of(node) for node in nodes]
    group = _group_of_ddp(examples)
    ranks = ranks_of(examples, group)
    if ranks.data_ranks > 1 and _has_no_samples(nodes, specs):
        return EmptyBatch(gm.graph, specs, options)
    gm, inputs = with_handle(gm, example_inputs)
    split_cells(gm)
    if ranks.model_group is not None:
        keep_layouts(gm, len(examples))
    specs = [replace(given, split=is_split(e, ranks.model_group)) for given, e in zip(specs, examples, strict=True)]
    spec = graph_spec([*with_gathers(nodes, specs), InputSpec(HANDLE, Role.HANDLE)], options)
    spec = replace(
        spec,
        data_meshes=ranks.data_meshes,
        data_ranks=ranks.data_ranks,
        parts=any(isinstance(example, DTensor) for example in examples),
        sum_over=group.group_name if group is not None and ranks.data_ranks > 1 else None,
        model_group=ranks.model_group,
    )
    observers = (*observers, *dump.observers(spec))
    private_pass = PrivateGradientsPass(spec, observers)
    settings = _compat.with_joint_pass(settings, private_pass)
    if dump.wanted():
        settings["force_disable_caches"] = True
    compiled = _compile(gm, inputs, inner_compile, settings, cache=not dump.wanted())
    return PrivateGraph(compiled, specs, options, reason, ranks, group)


def _has_no_samples(nodes: Sequence[fx.Node], specs: Sequence[InputSpec]) -> bool:
    sizes = [traced(node).shape[given.dim] for node, given in zip(nodes, specs, strict=True) if given.role is Role.PRIVATE]
    return bool(sizes) and isinstance(sizes[0], int) and sizes[0] == 0


def _group_of_ddp(examples: Sequence[Any]) -> Any:
    """The process group of the DistributedDataParallel whose forward pass runs this graph, or None."""
    active = ddp.active()
    if active is not None and _compat.is_cut_for_ddp():
        raise UnsupportedGraphError(
            "the graph was cut at the buckets of DistributedDataParallel, and no piece sees a sample's whole gradient. Set "
            "torch._dynamo.config.optimize_ddp = False before the first step: private graphs sum over the ranks by themselves."
        )
    return None if active is None else ddp.data_group(active, [example for example in examples if _is_trainable(example)])


def graph_spec(specs: Sequence[InputSpec], options: Options) -> GraphSpec:
    algorithm = options.norm_algorithm
    globs = tuple(algorithm.items()) if isinstance(algorithm, dict) else (("*", algorithm),)
    return GraphSpec(tuple(specs), globs, options.loss_normalizer, options.loss_reduction, options.memory_budget)


def with_gathers(nodes: Sequence[fx.Node], specs: Sequence[InputSpec]) -> list[InputSpec]:
    """The specs, with what the backward does for each sharded parameter."""
    known = shardings()
    found = [known.get(id(example_of(node))) for node in nodes]
    ways: list[Any] = [None if one is None else "again" if one.reshard_after_forward else "keep" for one in found]
    return [replace(spec, gathered=way) for spec, way in zip(specs, ways, strict=True)]


def _compile(
    gm: fx.GraphModule, inputs: Sequence[Any], inner: Callable[..., Any], settings: dict[str, Any], cache: bool = True
) -> CompiledGraph:
    cache = cache and inner is compile_fx_inner
    with torch._functorch.config.patch({} if cache else {"enable_autograd_cache": False}):
        compiled: Any = compile_fx(gm, inputs, inner_compile=inner, config_patches=settings or None)
        return compiled


def _is_trainable(example: Any) -> bool:
    return isinstance(example, nn.Parameter) and example.requires_grad


def _protect(nodes: Sequence[fx.Node]) -> None:
    """From here on an optimizer refuses these parameters' gradients unless they are private, even if compiling fails."""
    parameters = _compat.real_parameters(nodes)
    guard.protect(list(parameters.values()), list(parameters))


def with_handle(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[Any]]:
    """A copy of the graph with one more input, through which it finds its run-time state, and the example inputs with one for it.

    Dynamo goes on using the graph that it captured, so that one stays as it is.
    """
    example = _compat.fake_mode_of(gm, example_inputs).from_tensor(torch.zeros((), dtype=torch.int64, device="cpu"))
    gm = _compat.copy_captured(gm)
    last = gm.graph.find_nodes(op="placeholder")[-1]
    with gm.graph.inserting_after(last):
        node = gm.graph.placeholder(HANDLE)
    node.meta["example_value"] = example
    node.meta["val"] = example
    node._dynamo_source = _compat.constant_source(HANDLE)  # type: ignore[attr-defined]
    gm.recompile()
    return gm, [*example_inputs, example]


def break_reason(gm: fx.GraphModule) -> str | None:
    """Where and why Dynamo ended this graph early, or ``None``."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not getattr(reason, "graph_break", False):
        return None
    frames = [f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in reason.user_stack[-1:]]
    return f"{str(reason.reason).strip()} ({'; '.join(frames)})"


_RESUMED = re.compile(r"torch_dynamo_resume_in_(?P<function>.+)_at_(?P<line>\d+)")


def resumed_after(gm: fx.GraphModule) -> str | None:
    """Where the break lies behind which this graph goes on, or ``None``. Where no operator ran before it, no graph ends there."""
    frames = getattr(getattr(gm, "compile_subgraph_reason", None), "user_stack", None) or []
    found = [(frame.filename, match) for frame in frames[-1:] if (match := _RESUMED.fullmatch(frame.name))]
    if not found:
        return None
    file, match = found[0]
    line = linecache.getline(file, int(match["line"])).strip()
    place = f"{file}:{match['line']} in {match['function']}: {line}"
    reasons = _compat.graph_break_reasons()
    return f"{reasons[0]} ({place})" if len(reasons) == 1 else f"{place}; TORCH_LOGS=graph_breaks shows why"


_compat.keep_graphs_whole([flashnorm, flashnorm_eager])

__all__ = ["compile_private", "flashnorm", "flashnorm_eager"]

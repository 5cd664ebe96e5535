"""Writes the private gradients into the joint graph: norms, clip factors from the run-time state, clipped sums, noise.

The whole computation is a plain PyTorch function of values that the graph already holds; it is traced once and its nodes are
appended to the backward.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch._aot_autograd import descriptors as aot
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from ..templates import convolution, flash_norm, flops, noise, release  # noqa: F401  (registers the operators and their FLOPs)
from .algorithms import Release, norms_of, part_of, released
from .collectives import drop_unused
from .factored import unwidened
from .graph_spec import GraphSpec, Role
from .match import gradient_outputs
from .plan import ParameterPlan, Plan
from .replay import Sizes, Values
from .rules import Context
from .rules.collectives import is_collective
from .second_backward import Rerun, SecondBackward
from .type_samples import placeholder_specs

aten = torch.ops.aten


def rewrite_gradients(graph: fx.Graph, spec: GraphSpec, ctx: Context, plan: Plan) -> None:
    """Replaces every trainable parameter's gradient output by the clipped and noised one, in place."""
    plans = list(plan.parameters)
    private = [own for own in plans if own.gradient.private]
    if not private:
        return
    inputs = _inputs_of(graph, spec, private, plan.second)
    batch_node, dim = next((n, g.dim) for n, g in placeholder_specs(graph, spec) if g.role is Role.PRIVATE)
    writer = _Writer(spec, private, plan.second, inputs, batch_node, dim)
    released = _inline(graph, writer.trace(), inputs)
    output = graph.output_node()
    outputs = list(output.args[0])  # type: ignore[arg-type]
    for own, node in zip(private, released, strict=True):
        outputs[own.gradient.output] = node
    output.args = (type(output.args[0])(outputs) if isinstance(output.args[0], tuple) else outputs,)
    drop_unused(graph, (node for own in private if own.gradient.reduced is not None for node in own.gradient.reduced.way))
    graph.eliminate_dead_code()
    _drop_unused_outputs(graph)
    graph.lint()
    _check_released(graph, spec, plans)


def _drop_unused_outputs(graph: fx.Graph) -> None:
    """Convolutions compute the summed weight gradient only where somebody still reads it."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        read = {user.args[1] for user in node.users}
        node.update_arg(10, [bool(wanted) and i in read for i, wanted in enumerate(node.args[10])])


_NOISE = (
    torch.ops.flashnorm.add_noise.default,
    torch.ops.flashnorm.weighted_sum_noise.default,
    torch.ops.flashnorm.weighted_sums_noise.default,
)


def _check_released(graph: fx.Graph, spec: GraphSpec, plans: list[ParameterPlan]) -> None:
    """Looks once more at what leaves the graph: noise comes last on every private gradient."""
    open_ = {plan.name for plan in plans if not plan.gradient.private}
    for _, name, node in gradient_outputs(graph, spec):
        if node is not None and node.target is aten.view_as_complex.default:
            node = node.args[0]  # type: ignore[assignment]
        if node is not None and node.target is operator.getitem:
            node = node.args[0]  # type: ignore[assignment]
        if name not in open_ and (node is None or node.target not in _NOISE):
            raise AssertionError(f"the gradient of {name!r} would leave the graph without noise")


def _inputs_of(graph: fx.Graph, spec: GraphSpec, plans: list[ParameterPlan], second: SecondBackward) -> list[fx.Node]:
    """The nodes whose values the private computation reads, in graph order."""
    needed: set[fx.Node] = second.inputs
    for plan in plans:
        gradient = plan.gradient
        inside = {use.node for use in gradient.uses} | set(gradient.tail)
        for node in [*(use.operation for use in gradient.uses), *gradient.tail]:
            needed.update(part for arg in node.all_input_nodes if arg not in inside for part in (arg, unwidened(arg)))
        if not gradient.uses:
            needed.add(gradient.node)  # type: ignore[arg-type]
    for node, given in placeholder_specs(graph, spec):
        if given.role in (Role.HANDLE, Role.PRIVATE):
            needed.add(node)
    needed.add(next(n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("desc"), aot.TangentAOTInput)))
    return [node for node in graph.nodes if node in needed]


class _Writer:
    """Builds the private gradients from values of existing nodes."""

    def __init__(
        self,
        spec: GraphSpec,
        plans: list[ParameterPlan],
        second: SecondBackward,
        inputs: list[fx.Node],
        batch_node: fx.Node,
        dim: int,
    ) -> None:
        self.spec, self.plans, self.second, self.inputs = spec, plans, second, inputs
        self.batch_node, self.dim = batch_node, dim

    def trace(self) -> fx.GraphModule:
        values = [node.meta["val"] for node in self.inputs]
        mode = next(v.fake_mode for v in values if isinstance(v, torch.Tensor) and hasattr(v, "fake_mode"))
        with mode, enable_python_dispatcher(), torch.no_grad():
            traced = make_fx(self.build, select_decomp_table(), tracing_mode="real", _allow_non_fake_inputs=True)(*values)
            _own_destinations(traced.graph)
        return traced

    def build(self, *given: Any) -> list[Tensor]:
        values: Values = dict(zip(self.inputs, given, strict=True))
        sizes = Sizes(values[self.batch_node].shape[self.dim], given)
        parts = [part_of(plan, values, sizes) for plan in self.plans]
        norms_sq, rows = norms_of(parts)
        handle, after = self._state(values)
        found = torch.ops.flashnorm.release(handle, norms_sq, after, rows, len(self.spec.parameters), self.spec.parts)
        factors = Release(*found)
        return released(parts, factors, sizes, Rerun(self.second, values, (factors.factors >= 0).all()))

    def _state(self, values: Values) -> tuple[Tensor, Tensor]:
        position = next(i for i, given in enumerate(self.spec.inputs) if given.role is Role.HANDLE)
        handle = after = None
        for node, value in values.items():
            desc = node.meta.get("desc")
            if isinstance(desc, aot.PlainAOTInput) and desc.idx == position:
                handle = value
            if after is None and isinstance(desc, aot.TangentAOTInput):
                after = value
        assert handle is not None
        assert after is not None
        return handle, after


def _own_destinations(graph: fx.Graph) -> None:
    """Gives every write a destination of its own memory: Inductor may write in place, and vmap expands with stride 0."""
    for node in list(graph.nodes):
        if node.op == "call_function" and (
            "put" in str(node.target) or "scatter" in str(node.target) or "index_add" in str(node.target)
        ):
            base = node.args[0]
            if isinstance(base, fx.Node) and base.target is aten.expand.default:
                with graph.inserting_before(node):
                    copy = graph.call_function(aten.clone.default, (base,), {"memory_format": torch.contiguous_format})
                copy.meta["val"] = aten.clone.default(base.meta["val"], memory_format=torch.contiguous_format)
                node.replace_input_with(base, copy)


def _inline(graph: fx.Graph, traced: fx.GraphModule, inputs: list[fx.Node]) -> list[fx.Node]:
    """Copies the traced nodes, each behind the last of its operands; returns the copies of its results.

    The backward runs its nodes in about this order: the norm or the per-sample gradient of one layer is computed before the next
    layer's gradient is, so that operands which nobody else needs give their memory back. From the release on everything stays in
    its order: ranks whose plans differ must send in the same one. The release itself sends too, so behind all other collectives.
    """
    env: dict[fx.Node, fx.Node] = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    owner = graph.owning_module
    place = {node: position for position, node in enumerate(graph.nodes)}
    behind = dict(enumerate(graph.nodes))
    first, is_released = place[_first_of_backward(graph)], False
    end = place[graph.output_node()] - 1
    for node in traced.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.target is torch.ops.flashnorm.release.default:
            is_released = True
            first = end if any(is_collective(other.target) for other in graph.nodes) else first
        position = max(first, *(place[env[arg]] for arg in node.all_input_nodes), 0)
        with graph.inserting_after(behind[position]):
            if node.op == "get_attr":
                name = f"_flashnorm_{node.target}"
                setattr(owner, name, getattr(traced, node.target))
                copy = graph.get_attr(name)
            else:
                copy = graph.node_copy(node, env.__getitem__)
        copy.meta = {"val": node.meta.get("val"), "partitioner_tag": "is_backward"}
        if "tensor_meta" in node.meta:
            copy.meta["tensor_meta"] = node.meta["tensor_meta"]
        env[node] = behind[position] = copy
        place[copy] = position
        if is_released:
            first = position
    results = pytree.tree_leaves(traced.graph.output_node().args[0])
    return [env[result] for result in results]


def _first_of_backward(graph: fx.Graph) -> fx.Node:
    """The first node that reads a tangent; before it, the forward runs. The last node where none does."""
    nodes = [node for node in graph.nodes if node.op != "output"]
    reads = (n for n in nodes if any(isinstance(arg.meta.get("desc"), aot.TangentAOTInput) for arg in n.all_input_nodes))
    return next(reads, nodes[-1])

"""Finds, for every parameter gradient, the nodes where values of single samples become a sum over samples (its uses),
and the linear tail between them and the gradient."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd import descriptors as aot
from torch.utils import _pytree as pytree

from .collectives import Reduced, reduced
from .copies import check_copies
from .errors import UnsupportedGraphError
from .graph_spec import GraphSpec, InputSpec, Role
from .mixing_paths import MixingPaths
from .refusal import mixing_error
from .rules import Context
from .rules.contractions import EQUATIONS
from .rules.indexing import IndexSpace
from .sample_types import Affine, Axis, Mixed, PerSample, Public, SampleSum, known_scale
from .type_samples import placeholder_specs

aten = torch.ops.aten


@dataclass(frozen=True)
class Use:
    """One reduction over the samples. ``axes``: flat argument position -> sample axis of that operand.

    ``linear``: flat position of an operand in which the reduction is linear, so that scaling it scales each share.
    """

    node: fx.Node
    axes: dict[int, Axis]
    linear: int

    @property
    def operation(self) -> fx.Node:
        """The operator itself (for an output of a multi-output operator, the node it belongs to)."""
        return self.node.args[0] if self.node.target is operator.getitem else self.node  # type: ignore[return-value]

    @property
    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.operation.args, self.operation.kwargs))


@dataclass(frozen=True)
class ParameterGradient:
    """``node``: its gradient in the joint graph (``None``: not reached by the loss), from this rank's samples alone where several
    ranks share the work. ``reduced``: how it leaves the graph from there.

    ``constant``: the gradient depends on no sample, so each sample's share of it is the same.
    """

    name: str
    row: int
    output: int
    node: fx.Node | None
    constant: bool = False
    uses: tuple[Use, ...] = ()
    tail: tuple[fx.Node, ...] = field(default=(), repr=False)
    reduced: Reduced | None = field(default=None, repr=False)

    @property
    def leaving(self) -> fx.Node | None:
        """The node that the graph returns as the gradient."""
        return self.reduced.way[-1] if self.reduced is not None and self.reduced.way else self.node

    @property
    def private(self) -> bool:
        return self.node is not None


def match_gradients(graph: fx.Graph, spec: GraphSpec, ctx: Context) -> list[ParameterGradient]:
    """Every trainable parameter's gradient with its uses.

    Raises:
        SampleMixingError: a gradient, or a buffer that the graph updates, mixes samples.
    """
    rows = {name: row for row, name in enumerate(spec.parameters)}
    found = [
        _gradient(ctx, name, rows[name], position, value, ctx.batch == 1) for position, name, value in gradient_outputs(graph, spec)
    ]
    check_reduced(found, spec)
    check_copies(graph, found, spec)
    paths = MixingPaths(graph, ctx)
    for gradient in found:
        if gradient.node is not None and (mixed := paths.through(gradient.node)) is not None:
            raise mixing_error(f"the gradient of {gradient.name!r}", mixed)
    _check_mutations(graph, spec, ctx)
    return found


def gradient_outputs(graph: fx.Graph, spec: GraphSpec) -> list[tuple[int, str, fx.Node | None]]:
    """(output position, name, node) of every trainable parameter's gradient; fails unless each appears exactly once.

    Raises:
        UnsupportedGraphError: the graph returns a gradient of something whose role is not known.
    """
    output = graph.output_node()
    found = []
    for position, (value, desc) in enumerate(zip(output.args[0], output.meta["desc"], strict=True)):
        inner = isinstance(desc, aot.SubclassGetAttrAOTOutput)
        while isinstance(desc, aot.SubclassGetAttrAOTOutput):
            desc = desc.base
        if inner and not isinstance(value.meta.get("val"), torch.Tensor):
            continue  # the device mesh of a distributed gradient
        if not isinstance(desc, aot.GradAOTOutput):
            continue
        if not isinstance(desc.grad_of, aot.PlainAOTInput):
            raise UnsupportedGraphError(
                f"the graph returns a gradient of {desc.grad_of.expr()}, which is not a plain input: a tensor subclass, "
                "or inputs that share memory. Pass plain tensors and parameters that do not alias each other."
            )
        given = spec.inputs[desc.grad_of.idx]
        if given.role is Role.PARAMETER:
            found.append((position, given.name, value))
        elif given.role is Role.PUBLIC and value is not None:
            raise UnsupportedGraphError(
                f"the public input {given.name!r} requires a gradient, which would leave the graph unclipped.\n"
                "Make it an nn.Parameter of the compiled module, or pass it detached."
            )
    if sorted(name for _, name, _ in found) != sorted(spec.parameters):
        raise UnsupportedGraphError(
            f"the graph returns gradients for {[name for _, name, _ in found]}, its parameters are {spec.parameters}"
        )
    return found


def _gradient(ctx: Context, name: str, row: int, position: int, node: fx.Node | None, single: bool) -> ParameterGradient:
    if node is None:
        return ParameterGradient(name, row, position, None)
    if isinstance(ctx.type(node), Mixed):
        raise mixing_error(f"the gradient of {name!r}", ctx.type(node))
    way = reduced(node, ctx.data_groups)
    node = way.own
    type_ = ctx.type(node)
    scale = known_scale(type_.scale)
    if isinstance(type_, Public) and not scale and not single:
        return ParameterGradient(name, row, position, node, constant=True, reduced=way)
    if isinstance(type_, SampleSum) and not scale and not single:
        uses, tail = _trace_back(ctx, node)
        return ParameterGradient(name, row, position, node, uses=uses, tail=tail, reduced=way)
    if single and (isinstance(type_, (Public, SampleSum)) or not ctx.scalars) and not scale:
        return ParameterGradient(name, row, position, node, reduced=way)
    raise mixing_error(f"the gradient of {name!r}", type_)


def check_reduced(gradients: list[ParameterGradient], spec: GraphSpec) -> None:
    """Every gradient must be summed over all ranks that hold samples: copies of a parameter that took in different samples under
    one and the same noise would tell those samples by their difference.

    Raises:
        UnsupportedGraphError: a gradient is not summed over them.
    """
    meshes = {tuple(sorted(mesh)) for mesh in spec.data_meshes} or {()}
    for gradient in gradients:
        if gradient.reduced is not None and tuple(sorted(gradient.reduced.groups)) not in meshes:
            raise UnsupportedGraphError(
                f"the samples are spread over {spec.data_ranks} ranks, and the gradient of {gradient.name!r} is not summed over "
                "all of them, once each. Every trainable parameter needs the same data-parallel ranks: call "
                "flashnorm_compile.fully_shard on the outermost module too, with the same mesh, before the optimizer is made, or "
                "freeze the parameter."
            )


def _trace_back(ctx: Context, gradient: fx.Node) -> tuple[tuple[Use, ...], tuple[fx.Node, ...]]:
    """Walks from a gradient back to its uses; everything between them, in graph order, is the tail."""
    uses: dict[fx.Node, Use] = {}
    tail: set[fx.Node] = set()
    pending = [gradient]
    while pending:
        node = pending.pop()
        if node in uses or node in tail:
            continue
        operation = node.args[0] if node.target is operator.getitem else node
        if any(isinstance(ctx.type(arg), PerSample) for arg in operation.all_input_nodes):
            uses[node] = make_use(ctx, node)
            continue
        tail.add(node)
        pending += [arg for arg in node.all_input_nodes if _carries_sum(ctx, arg)]
    order = {node: i for i, node in enumerate(gradient.graph.nodes)}
    return (
        tuple(uses[node] for node in sorted(uses, key=order.__getitem__)),
        tuple(sorted(tail, key=order.__getitem__)),
    )


def _carries_sum(ctx: Context, node: fx.Node) -> bool:
    found = ctx.types[node]
    return any(isinstance(type_, (SampleSum, Affine)) for type_ in (found if isinstance(found, tuple) else (found,)))


def make_use(ctx: Context, node: fx.Node) -> Use:
    """The operands' sample axes at a reduction. A public operand that runs along the samples is sliced with them."""
    operation = node.args[0] if node.target is operator.getitem else node
    leaves = pytree.tree_leaves((operation.args, operation.kwargs))
    axes = {i: t.axis for i, arg in enumerate(leaves) if ctx.is_tensor(arg) and isinstance(t := ctx.type(arg), PerSample)}
    axes.update({i: axis for i, axis in _public_axes(ctx, operation, leaves, axes).items() if i not in axes})
    return Use(node, axes, _linear_operand(ctx, operation, leaves, axes))


def _public_axes(ctx: Context, node: fx.Node, leaves: list[Any], axes: dict[int, Axis]) -> dict[int, Axis]:
    target = node.target
    if target in EQUATIONS:
        names = EQUATIONS[target].split("->")[0].split(",")
        known, axis = next(iter(axes.items()))
        letter = names[known][axis.dim]
        return {i: Axis(name.index(letter), axis.inner) for i, name in enumerate(names)}
    if target is aten.convolution_backward.default:
        return {0: Axis(0), 1: Axis(0)}
    if target in WRITES:
        return _axes_of_write(ctx, node, leaves, axes)
    if target in (aten.embedding_dense_backward.default, aten.scatter_add.default, aten.scatter_reduce.two):
        axis = next(iter(axes.values()))
        operands = (0, 1) if target is aten.embedding_dense_backward.default else (2, 3)
        return {i: axis for i in operands if ctx.shape(leaves[i])[axis.dim] != 1}
    return {}


WRITES = {
    aten.index_put.default, aten._unsafe_index_put.default, aten._unsafe_masked_index_put_accumulate.default,
    aten.index_add.default,
}  # fmt: skip
# Every reduction that adds to a table by index.
SCATTERS = WRITES | {aten.embedding_dense_backward.default, aten.scatter_add.default, aten.scatter_reduce.two}


def write_operands(ctx: Context, node: fx.Node) -> tuple[Any, list[Any], Any, Any]:
    """(destination, indices, values, mask) of an indexed addition."""
    if node.target is aten._unsafe_masked_index_put_accumulate.default:
        return node.args[0], list(node.args[2]), node.args[3], node.args[1]
    if node.target is aten.index_add.default:
        return node.args[0], [*[None] * ctx.dim(node.args[1], node.args[0]), node.args[2]], node.args[3], None
    return node.args[0], list(node.args[1]), node.args[2], None


def _axes_of_write(ctx: Context, node: fx.Node, leaves: list[Any], axes: dict[int, Axis]) -> dict[int, Axis]:
    """Indices, values and mask broadcast against each other: the axis in one gives it in all."""
    x, indices, values, mask = write_operands(ctx, node)
    space = IndexSpace.of(ctx, x, indices)
    rank = len(space.origins)
    start = space.result_dim("index", 0)

    def offset(arg: Any) -> int:
        """What to add to a dimension of the operand to get the dimension of the written block."""
        if any(arg is index for index in indices):
            return start + space.index_rank - len(ctx.shape(arg))
        if mask is not None and arg is mask:
            return len(ctx.shape(values)) - len(ctx.shape(arg)) + rank - len(ctx.shape(values))
        return rank - len(ctx.shape(arg))

    operands = {i: arg for i, arg in enumerate(leaves) if isinstance(arg, fx.Node) and arg is not x and ctx.is_tensor(arg)}
    known = next(i for i in axes if i in operands)
    place = axes[known].dim + offset(operands[known])
    found = {}
    for i, arg in operands.items():
        dim = place - offset(arg)
        if 0 <= dim < len(ctx.shape(arg)) and ctx.shape(arg)[dim] != 1:
            found[i] = Axis(dim, axes[known].inner)
    return found


def _linear_operand(ctx: Context, node: fx.Node, leaves: list[Any], axes: dict[int, Axis]) -> int:
    if node.target in WRITES:
        values = write_operands(ctx, node)[2]
        return next(i for i, leaf in enumerate(leaves) if leaf is values and i > 0)
    if node.target in (aten.scatter_add.default, aten.scatter_reduce.two):
        return 3
    return min(i for i in axes if leaves[i].meta["val"].is_floating_point() or leaves[i].meta["val"].is_complex())


def _check_mutations(graph: fx.Graph, spec: GraphSpec, ctx: Context) -> None:
    """A buffer or parameter that the graph updates is released with the model, so its new value must be public; an updated
    private input must stay one of separate samples."""
    given = dict(placeholder_specs(graph, spec))
    output = graph.output_node()
    updates: list[tuple[InputSpec, Any]] = []
    for value, desc in zip(output.args[0], output.meta["desc"], strict=True):
        if isinstance(desc, aot.InputMutationAOTOutput) and isinstance(desc.mutated_input, aot.PlainAOTInput):
            updates.append((spec.inputs[desc.mutated_input.idx], value))
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        if node.args[0] in given:
            updates.append((given[node.args[0]], node.args[1]))
    for entry, value in updates:
        type_ = ctx.type(value)
        own = isinstance(type_, PerSample) and entry.role is Role.PRIVATE and type_.axis == Axis(entry.dim)
        if isinstance(type_, Public) or own:
            continue
        if not isinstance(type_, Mixed):
            type_ = Mixed(value, "the new value is computed from the samples, without clipping or noise")
        kind = "input" if entry.role is Role.PRIVATE else "buffer"
        raise mixing_error(f"the updated {kind} {entry.name!r}", type_)

"""Types every node of a joint graph (abstract interpretation over ``rules``)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd import descriptors as aot

from .errors import BatchDimensionError, UnsupportedGraphError
from .graph_spec import GraphSpec, InputSpec, Role
from .memory import owner_of
from .rules import RULES, Context, Result
from .rules.collectives import is_collective
from .rules.join import is_zero
from .rules.pointwise import elementwise
from .sample_types import (
    ANY_SCALE,
    PUBLIC,
    Axis,
    Expr,
    Mixed,
    PerSample,
    Public,
    SampleSum,
    SampleType,
    Scale,
    common_scale,
    expression,
    known_scale,
    scale_product,
)

META_KEY = "sample_type"


def type_samples(graph: fx.Graph, spec: GraphSpec) -> Context:
    """Gives every node its type, in ``node.meta["sample_type"]`` and in the returned context.

    Raises:
        BatchDimensionError: the private inputs do not have one batch size.
        UnsupportedGraphError: an input whose role is not known, or no private input at all.
    """
    ctx = Context(batch_size(graph, spec), {}, spec.data_groups, spec.model_group)
    for node in graph.nodes:
        if node.op == "placeholder" and not _is_tangent(node):
            ctx.types[node] = _input_type(node, spec)
    for node in graph.nodes:
        if _is_tangent(node):
            continue  # typed below, once its output is
        if node.op != "placeholder":
            _ready(ctx, node, graph)
        if node.op not in ("placeholder", "output"):
            found = infer(ctx, node)
            ctx.types[node] = _own(ctx, node, found) if ctx.batch == 1 else found
    return ctx


def _own(ctx: Context, node: fx.Node, found: Result) -> Result:
    """With one sample nothing can mix: whatever is not public is that sample's own, unless a batch-dependent number scales it."""
    fresh = any(isinstance(type_, Mixed) and type_.origin is node for type_ in (found if isinstance(found, tuple) else (found,)))
    scales = [ctx.type(arg).scale for arg in node.all_input_nodes]
    scale: Scale | None = ()
    if fresh and any(known_scale(scale) for scale in scales):
        scale = scale_product(*scales) if node.target in PRODUCTS else _scale_of_terms(ctx, node)
    if not fresh or scale is None or is_collective(node.target):
        return found
    return (SampleSum(scale),) * len(found) if isinstance(found, tuple) else SampleSum(scale)


def _scale_of_terms(ctx: Context, node: fx.Node) -> Scale | None:
    """The scale of what an operator picks or adds up, where indices and conditions have none."""
    operands = node.all_input_nodes if node.target in SUMS else [node.args[i] for i in TERMS.get(node.target, ())]
    terms = [term for term in operands if not is_zero(ctx, term)]
    if not terms or any(ctx.type(other).scale for other in node.all_input_nodes if other not in operands):
        return None
    return common_scale([ctx.type(term).scale for term in terms])


aten = torch.ops.aten
PRODUCTS = {aten.mul.Tensor, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default}
SUMS = {
    aten.add.Tensor, aten.sub.Tensor, aten.cat.default, aten.sum.default, aten.sum.dim_IntList, aten.neg.default,
    aten.view.default, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.select.int, aten.unsqueeze.default,
    aten.clone.default,
}  # fmt: skip
# Operands in which other operators are linear, all together; the rest says where.
TERMS: dict[Any, tuple[int, ...]] = {
    aten.gather.default: (0,),
    aten.index.Tensor: (0,),
    aten.embedding_dense_backward.default: (0,),
    aten.where.self: (1, 2),
    aten.index_put.default: (0, 2),
    aten.scatter_add.default: (0, 3),
    aten.index_add.default: (0, 3),
    aten._unsafe_masked_index_put_accumulate.default: (0, 3),
}


def _is_tangent(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(node.meta.get("desc"), aot.TangentAOTInput)


def _ready(ctx: Context, node: fx.Node, graph: fx.Graph) -> None:
    """A tangent has the type of the output it belongs to, all of whose operands come earlier in the graph."""
    for arg in node.all_input_nodes:
        if arg not in ctx.types and _is_tangent(arg):
            ctx.types[arg] = _tangent_type(ctx, arg, graph)


def infer(ctx: Context, node: fx.Node) -> Result:
    """One node's type. An operator without a rule mixes, unless everything it reads is public."""
    if node.op == "get_attr":
        return PUBLIC
    found = RULES.get(node.target)
    if found is not None:
        return found(ctx, node)
    if torch.Tag.pointwise in getattr(node.target, "tags", ()):
        return elementwise(ctx, node)
    operands = node.all_input_nodes
    mixed = ctx.first_mixed(operands)
    if mixed is None and any(not isinstance(ctx.type(arg), Public) for arg in operands):
        mixed = Mixed(node, "this operator has no rule, so nothing is known about how it treats samples")
    if mixed is None and any(ctx.type(arg).scale for arg in operands):
        mixed = Mixed(node, "this operator has no rule, and a batch-dependent number scales its input")
    value = node.meta.get("val")
    result: SampleType = mixed or PUBLIC
    return (result,) * len(value) if isinstance(value, (tuple, list)) else result


def placeholder_specs(graph: fx.Graph, spec: GraphSpec) -> Iterable[tuple[fx.Node, InputSpec]]:
    """The joint graph's primal placeholders with their roles."""
    for node in graph.find_nodes(op="placeholder"):
        desc = node.meta.get("desc")
        while isinstance(desc, aot.SubclassGetAttrAOTInput):
            desc = desc.base
        if isinstance(desc, aot.PlainAOTInput):
            yield node, spec.inputs[desc.idx]


def batch_size(graph: fx.Graph, spec: GraphSpec) -> Expr:
    sizes: dict[Expr, str] = {}
    for node, given in placeholder_specs(graph, spec):
        if given.role is Role.PRIVATE:
            sizes.setdefault(expression(node.meta["val"].shape[given.dim]), given.name)
    if not sizes:
        raise UnsupportedGraphError(
            "the compiled part has trainable parameters but no private input, so it has no samples to clip.\n"
            "Every tensor input that is neither a parameter nor a buffer is private unless batch_dims declares it public (None).\n"
            "Compile the part that reads the data together with this one."
        )
    if len(sizes) > 1:
        shown = ", ".join(f"{name}: {size}" for size, name in sizes.items())
        raise BatchDimensionError(
            f"the private inputs do not have one batch size ({shown}).\n"
            'Say where the samples lie with batch_dims={"name": dimension}, or None for an input that is public. For sizes marked '
            "unbacked, tell the compiler that they agree: torch._check(x.shape[0] == y.shape[0])."
        )
    return next(iter(sizes))


def fix_shared_batch_size(graph: fx.Graph, spec: GraphSpec) -> bool:
    """Fixes a symbolic batch size to the traced one, by a guard, if another size of an input has the same symbol.

    Dynamo gives sizes that were equal while it traced one symbol. Where a model then tells them apart (B samples of K = B
    classes), nothing lines up for any other B; with the number in place of the symbol it does. The next batch size compiles anew
    with symbols of their own. Returns whether anything was fixed.
    """
    shared = expression(batch_size(graph, spec))
    found = [
        size
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("val"), torch.Tensor)
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt) and expression(size) == shared and size.node.has_hint()
    ]
    private = sum(given.role is Role.PRIVATE for _, given in placeholder_specs(graph, spec))
    if not shared.is_Symbol or len(found) <= private:
        return False
    int(found[0])
    return True


def fix_other_sizes(graph: fx.Graph, spec: GraphSpec) -> bool:
    """Fixes every symbolic size of the inputs but the batch size to the traced one, by guards; returns whether there was any.

    Where two inputs list a sample's elements in sizes of their own (T - 1 by 2 of one, 4 by 2 of the other), samples line up for
    some sizes and not for others.
    """
    batch = expression(batch_size(graph, spec))
    values = [node.meta.get("val") for node in graph.find_nodes(op="placeholder")]
    sizes = [size for value in values for size in (value.shape if isinstance(value, torch.Tensor) else (value,))]
    found = [size for size in sizes if isinstance(size, torch.SymInt) and size.node.has_hint()]
    others = [size for size in found if not expression(size).is_number and expression(size) != batch]
    for size in others:
        int(size)
    return bool(others)


def _input_type(node: fx.Node, spec: GraphSpec) -> SampleType:
    desc = node.meta.get("desc")
    while isinstance(desc, aot.SubclassGetAttrAOTInput):
        desc = desc.base
    if isinstance(desc, aot.PlainAOTInput):
        given = spec.inputs[desc.idx]
        if given.role is Role.PRIVATE:
            return PerSample(Axis(given.dim))
        if given.role is Role.SCALAR:
            return Mixed(node, f"the number {given.name!r} may be computed from the whole batch")
        return PUBLIC
    known = (
        aot.PhiloxForwardSeedAOTInput, aot.PhiloxForwardBaseOffsetAOTInput, aot.PhiloxBackwardSeedAOTInput,
        aot.PhiloxBackwardBaseOffsetAOTInput, aot.ForwardTokenAOTInput, aot.BackwardTokenAOTInput,
    )  # fmt: skip
    if isinstance(desc, known):
        return PUBLIC
    raise UnsupportedGraphError(
        f"graph input {node.name!r} has a form whose role is not known ({desc}): two inputs may share memory.\n"
        "Pass tensors that do not alias each other, and do not change an input in place."
    )


def _tangent_type(ctx: Context, node: fx.Node, graph: fx.Graph) -> SampleType:
    """Tangents of per-sample outputs keep the axis; of a scalar loss they are a public factor; else nothing is known."""
    wanted = node.meta["desc"].output
    output = graph.output_node()
    for value, desc in zip(_flat(output.args[0]), _flat(output.meta["desc"]), strict=True):
        if desc == wanted and isinstance(value, fx.Node):
            found = ctx.type(value)
            if isinstance(found, PerSample):
                return _mixing_view(ctx, value, output) or PerSample(found.axis, ANY_SCALE)
            if isinstance(found, Mixed) and node.meta["val"].numel() != 1:
                return found
            if node.meta["val"].numel() == 1:
                return PUBLIC
            if isinstance(found, SampleSum) and ctx.batch == 1:
                return SampleSum(ANY_SCALE)  # of the one sample there is
            return Mixed(
                value,
                "an output that has no sample axis is used outside the compiled part, where nothing is known of what happens to it",
            )
    return Mixed(node, "the gradient of an output that cannot be identified")


def _mixing_view(ctx: Context, value: fx.Node, output: fx.Node) -> Mixed | None:
    """The view by which another output shows ``value`` otherwise than sample by sample, if there is one.

    AOTAutograd makes outputs that are views of one another outside of the graph; their gradients arrive as part of ``value``'s.
    """
    if ctx.batch == 1:
        return None
    shown = owner_of(value)
    for other in _flat(output.args[0]):
        if isinstance(other, fx.Node) and other is not value and owner_of(other) is shown:
            type_ = ctx.types.get(other)
            if not isinstance(type_, PerSample):
                return (
                    Mixed(type_.origin, type_.why)
                    if isinstance(type_, Mixed)
                    else Mixed(other, "a view of an output mixes samples")
                )
    return None


def _flat(tree: Any) -> list[Any]:
    return list(tree) if isinstance(tree, (tuple, list)) else [tree]


def annotate(graph: fx.Graph, ctx: Context) -> None:
    """Writes the types into the nodes' meta, where graph dumps show them."""
    for node, found in ctx.types.items():
        node.meta[META_KEY] = tuple(map(str, found)) if isinstance(found, tuple) else str(found)


def is_sum(type_: Result) -> bool:
    return isinstance(type_, SampleSum)

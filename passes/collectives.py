"""Gradients that ranks reduce together: where this rank's own sum ends, and how it reaches the shard.

Between a gradient of this rank's samples and the gradient that leaves the graph stand, under data parallelism, a collective and
what it asks for: padding to equal shards, casts, the trimming of a shard. Nothing there belongs to single samples any more.
Clipping happens before it, on the rank's own samples, and noise after it, on the shard.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from .graph_spec import GraphSpec, Role
from .rules.collectives import ALL_REDUCE, GATHERS, REDUCTIONS, WAIT, group_of
from .type_samples import placeholder_specs

aten, prims = torch.ops.aten, torch.ops.prims
# What may stand behind a reduction: it drops padding and renames, but neither scales nor repeats an element.
_TRIMS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.slice.Tensor, aten.alias.default, aten.clone.default,
    aten.detach.default, prims.convert_element_type.default, aten._to_copy.default,
}  # fmt: skip
# What may stand before a gather: the last ranks pad their smaller shards.
_BEFORE_GATHER = {*_TRIMS, aten.constant_pad_nd.default}
_VIEWS = {aten.view.default, aten._unsafe_view.default}
_CASTS = {prims.convert_element_type.default, aten._to_copy.default}


@dataclass(frozen=True)
class Reduced:
    """``own``: the gradient of this rank's samples. ``way``: the nodes from there to the gradient, in graph order; empty where
    no other rank takes part. ``groups``: the process groups on it."""

    own: fx.Node
    way: tuple[fx.Node, ...] = field(default=(), repr=False)
    groups: tuple[str, ...] = ()


def reduced(gradient: fx.Node, data_groups: frozenset[str]) -> Reduced:
    """Splits a gradient where the first reduction over ranks with other samples begins."""
    node, own = gradient, gradient
    way: list[fx.Node] = []
    rest: list[fx.Node] = []
    found: list[str] = []
    while True:
        source = node.args[0] if node.args else None
        if node.target is WAIT and isinstance(source, fx.Node) and source.target in REDUCTIONS and group_of(source) in data_groups:
            operand: Any = source.args[0]
            root, padding = _unpadded(operand)
            way = [*padding, source, node, *way]
            found.append(group_of(source))
            own, rest, node = root, way, root
        elif node.target in _TRIMS and isinstance(source, fx.Node):
            way = [node, *way]
            node = source
        else:
            break
    return Reduced(own, tuple(rest), tuple(found)) if found else Reduced(gradient)


def _unpadded(operand: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """What was split, padded to equal parts and put together again, with the nodes that did it; else the operand and none."""
    if operand.target is not aten.cat.default:
        return operand, []
    between: list[fx.Node] = [operand]
    split = None
    for position, part in enumerate(operand.args[0]):  # type: ignore[arg-type]
        if part.target is aten.constant_pad_nd.default and len(part.args) == 3 and part.args[2] == 0:
            between.append(part)
            part = part.args[0]
        if part.target is not operator.getitem or part.args[1] != position or part.args[0].target is not aten.split.Tensor:
            return operand, []
        if split not in (None, part.args[0]):
            return operand, []
        split = part.args[0]
        between.append(part)
    if split is None or len(split.meta["val"]) != len(operand.args[0]):  # type: ignore[arg-type]
        return operand, []
    order = {node: i for i, node in enumerate(operand.graph.nodes)}
    return split.args[0], sorted([*between, split], key=order.__getitem__)


def reduce_again(way: Reduced, total: Tensor) -> Tensor:
    """The clipped sum ``total``, in place of the rank's own gradient, on its way over the ranks.

    Collectives move the type that they moved before; between them the sum stays as wide as it is. A mean over ranks becomes a sum:
    the clip factors hold the normaliser already.
    """
    values: dict[fx.Node, Any] = {way.own: total}
    for node in way.way:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
        if node.target in _CASTS:
            new = node.meta["val"].dtype
            values[node] = args[0].to(new) if new.itemsize > args[0].dtype.itemsize else args[0]
            continue
        if node.target in REDUCTIONS:
            args = (args[0].to(node.args[0].meta["val"].dtype), "sum", *args[2:])  # type: ignore[union-attr]
        values[node] = args[0].reshape(args[1]) if node.target in _VIEWS else node.target(*args, **kwargs)  # type: ignore[operator]
    return values[way.way[-1]]  # type: ignore[no-any-return]


def sum_over_ranks_pass(graph: fx.Graph, outputs: list[tuple[int, fx.Node]], group: str) -> None:
    """Averages every gradient over the ranks of a process group, as the module around the graph would do it behind the backward.

    ``outputs``: as for ``merge_collectives_pass``.
    """
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    with graph.inserting_before(graph.output_node()):
        for position, node in outputs:
            sent = graph.call_function(ALL_REDUCE, (node, "avg", group))
            results[position] = graph.call_function(WAIT, (sent,))
            for new in (sent, results[position]):
                new.meta = {"val": node.meta["val"], "partitioner_tag": "is_backward"}
    graph.output_node().args = (results,)


def merge_collectives_pass(graph: fx.Graph, outputs: list[tuple[int, fx.Node]], data_groups: frozenset[str]) -> None:
    """One gather for each parameter and one reduction for each gradient, however often a module tree uses the parameter.

    ``outputs``: (position among the graph's outputs, node) of every parameter gradient. By linearity the sum of two reduced
    gradients is the reduction of their sum, and a sample's norm needs that sum before it.
    """
    _share_gathers(graph)
    for position, node in outputs:
        merged = _merged(graph, node, data_groups)
        if merged is not None:
            results = list(graph.output_node().args[0])  # type: ignore[arg-type]
            results[position] = merged
            graph.output_node().args = (results,)
            drop_unused(graph, _behind(node, data_groups))


def drop_unused(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Removes those of the nodes that nobody reads any more. Torch's own removal of dead code keeps every wait."""
    nodes = set(nodes)
    for node in reversed(list(graph.nodes)):
        if node in nodes and not node.users:
            graph.erase_node(node)


def _behind(gradient: fx.Node, data_groups: frozenset[str]) -> list[fx.Node]:
    """The sum of reduced gradients with all that reduces them."""
    sides = [arg for arg in gradient.args if isinstance(arg, fx.Node)] if gradient.target is aten.add.Tensor else []
    own = [gradient, *reduced(gradient, data_groups).way] if not sides else [gradient]
    return [*own, *(node for side in sides for node in _behind(side, data_groups))]


def _share_gathers(graph: fx.Graph) -> None:
    """Equal chains from a parameter through a gather become one."""
    if not any(node.target in GATHERS for node in graph.nodes):
        return
    seen: dict[Any, fx.Node] = {}
    chain: set[fx.Node] = {node for node in graph.find_nodes(op="placeholder") if _is_tensor(node)}
    for node in list(graph.nodes):
        if node.target not in (*GATHERS, WAIT, *_BEFORE_GATHER) or not all(arg in chain for arg in node.all_input_nodes):
            continue
        twin = seen.setdefault((node.target, str(node.args), str(node.kwargs)), node)
        if twin is not node:
            node.replace_all_uses_with(twin)
            graph.erase_node(node)
        else:
            chain.add(node)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _merged(graph: fx.Graph, node: fx.Node, data_groups: frozenset[str]) -> fx.Node | None:
    """``add(reduce(a), reduce(b))`` as ``reduce(add(a, b))``, where both are reduced in one way."""
    if node.target is not aten.add.Tensor or node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    sides = []
    for arg in node.args:
        arg = _merged(graph, arg, data_groups) or arg  # type: ignore[arg-type]
        sides.append((arg, reduced(arg, data_groups)))  # type: ignore[arg-type]
    (_, one), (_, two) = sides
    if not one.way or _signature(one) != _signature(two):
        return None
    with graph.inserting_before(graph.output_node()):
        total = graph.call_function(aten.add.Tensor, (one.own, two.own))
        total.meta = {**one.own.meta}
        env: dict[fx.Node, fx.Node] = {one.own: total}
        for step in one.way:
            env[step] = graph.node_copy(step, lambda arg: env.get(arg, arg))
    return env[one.way[-1]]


def _signature(side: Reduced) -> list[tuple[Any, str, str]]:
    """What happens on the way, with nodes by their place on it."""
    names = {node: f"%{i}" for i, node in enumerate((side.own, *side.way))}

    def told(tree: Any) -> str:
        return str(fx.node.map_arg(tree, lambda node: names.get(node, node.name)))

    return [(step.target, told(step.args), told(step.kwargs)) for step in side.way] + [(None, str(side.own.meta["val"].shape), "")]


def mark_recomputed_pass(graph: fx.Graph, spec: GraphSpec) -> None:
    """Tells the partitioner what to do with gathered parameters: gather again in the backward, or keep them for it."""
    for node, given in placeholder_specs(graph, spec):
        if given.role in (Role.PARAMETER, Role.PUBLIC) and given.gathered is not None and _is_tensor(node):
            policy = CheckpointPolicy.MUST_RECOMPUTE if given.gathered == "again" else CheckpointPolicy.MUST_SAVE
            _mark(node, policy)


def _mark(parameter: fx.Node, policy: CheckpointPolicy) -> None:
    """From a parameter along its gather and what trims the result."""
    last: list[fx.Node] = []
    pending = [(user, False) for user in parameter.users]
    while pending:
        node, behind = pending.pop()
        if node.target in GATHERS or node.target is WAIT:
            behind = True
        elif node.target not in _BEFORE_GATHER and not (
            behind and node.target in (aten.cat.default, aten.split.Tensor, operator.getitem)
        ):
            continue
        last.append(node)
        pending += [(user, behind) for user in node.users]
    for node in last:
        if policy is CheckpointPolicy.MUST_RECOMPUTE or node.target is WAIT:
            node.meta["recompute"] = policy
            if policy is CheckpointPolicy.MUST_RECOMPUTE:
                node.meta["ac_graph_id"] = 1 << 16

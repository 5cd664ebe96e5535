"""The second backward pass: what is computed again once the clip factors are known, instead of being held until then.

A clipped sum reads the gradient G of a layer's output. G can be dropped after its norms are taken and computed once more from
values that are still there: the tangents of the graph's outputs, what the forward saved, and other gradients that are held anyway.
Samples are independent, so the clip factors could scale the tangents and run through with them. They are applied to G, as in every
other clipped sum: one second pass then serves all clipping groups, a dropped sample needs no product of zero with what may be
infinite, and nothing is rounded to 16 bits between the norm and the sum.

What runs again is a copy of the backward's own nodes, on the same operands: nothing random, no collective, nothing with a side
effect. Masks and states of random generators are operands.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd import descriptors as aot
from torch.utils import _pytree as pytree

from .baseline import kernel_of, stored_values
from .choose import Again, Decision, Kept
from .memory import Timeline, is_view, owner_of
from .peaks import Peaks
from .replay import Values, lookup
from .sample_types import Expr

Number = Callable[[Expr], float]


def is_repeatable(node: fx.Node) -> bool:
    """Whether running a node a second time gives the same values and does nothing else."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and is_repeatable(node.args[0])
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace not in ("aten", "prims"):
        return False
    tensors = any(isinstance(value, Tensor) for value in pytree.tree_leaves(node.meta.get("val")))
    return tensors and not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags


def after_tangents(graph: fx.Graph) -> frozenset[fx.Node]:
    """The values that exist once the backward has begun, other than the tangents themselves."""
    placeholders = graph.find_nodes(op="placeholder")
    found = {node for node in placeholders if isinstance(node.meta.get("desc"), aot.TangentAOTInput)}
    given = frozenset(found)
    for node in graph.nodes:
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found - given)


def source(node: fx.Node, saved: Set[str] = frozenset()) -> fx.Node:
    """The node whose memory a view shows; a view that the forward saves counts as a value of its own."""
    while is_view(node) and node.name not in saved and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def value_of(node: fx.Node, line: Timeline, number: Number) -> Kept | None:
    """What has to stay in memory for a node's value to be there; None for what is there anyway."""
    node = source(node, line.saved)
    if node.name in line.saved:
        node = owner_of(node)
    tensors = isinstance(node.meta.get("val"), (Tensor, tuple, list))
    return line.kept(node, number) if node.op != "placeholder" and tensors else None


def recipes(graph: fx.Graph, wanted: Iterable[fx.Node], line: Timeline, peaks: Peaks, number: Number) -> dict[Kept, Again]:
    """How everything between what the backward is given and the values ``wanted`` is computed again."""
    stored = stored_values(graph)
    found: dict[Kept, Again] = {}
    pending = [source(node, line.saved) for node in wanted]
    while pending:
        node = pending.pop()
        value = line.kept(node, number)
        if value in found:
            continue
        operands = dict.fromkeys(source(arg, line.saved) for arg in node.all_input_nodes)
        values = dict.fromkeys(value_of(arg, line, number) for arg in operands)
        computed = [arg for arg in operands if arg.name not in line.saved and is_repeatable(arg)]
        kernel = kernel_of(node, stored, number)
        work = sum(line.bytes_of.get(part.name, 0.0) for part in [node, *computed] if part.name in line.died)
        found[value] = Again(
            0.0 if kernel is None else kernel.seconds(peaks, number),
            tuple(given for given in values if given is not None),
            work,
            holdable=node.name in line.died and isinstance(node.meta.get("val"), Tensor),
        )
        pending += computed
    return found


@dataclass(frozen=True)
class SecondBackward:
    """``nodes``: the nodes of the joint graph that run a second time."""

    nodes: frozenset[fx.Node] = field(default=frozenset(), repr=False)

    @property
    def inputs(self) -> set[fx.Node]:
        """The nodes whose values it starts from."""
        return {arg for node in self.nodes for arg in node.all_input_nodes} - self.nodes


def second_backward(wanted: Iterable[fx.Node], decision: Decision, line: Timeline) -> SecondBackward:
    """Everything that ``wanted`` is computed from, back to what is held or given."""
    again, held = ({value.name for value in values} for values in (decision.again, decision.held))
    nodes: set[fx.Node] = set()
    pending = list(wanted)
    while pending:
        node = pending.pop()
        owner = source(node, line.saved)
        start = node.op == "placeholder" or node.name in line.saved or (owner.name in held and owner.name not in again)
        if node not in nodes and not start and is_repeatable(node):
            nodes.add(node)
            pending += node.all_input_nodes
    return SecondBackward(frozenset(nodes))


class Rerun:
    """Values of a second backward pass, each computed when it is first asked for, all of them behind ``known``.

    ``known``: a bool scalar, true, that depends on the clip factors: it keeps the pass from being merged with the first one.
    """

    def __init__(self, second: SecondBackward, values: Values, known: Tensor) -> None:
        self._second, self._values, self._known = second, values, known
        self._late: Values = {}
        self._behind: set[fx.Node] = set()
        self._order = {node: i for i, node in enumerate(next(iter(second.nodes)).graph.nodes)} if second.nodes else {}

    def moment(self, node: fx.Node) -> int:
        """The place of a node in the backward: what is wanted is best asked for in this order."""
        return self._order[node]

    def __getitem__(self, wanted: fx.Node) -> Any:
        needed: set[fx.Node] = set()
        pending = [wanted]
        while pending:
            node = pending.pop()
            if node in self._second.nodes and node not in self._late and node not in needed:
                needed.add(node)
                pending += node.all_input_nodes
        for node in sorted(needed, key=self._order.__getitem__):
            self._late[node] = self._computed(node)
        return self._late[wanted]

    def _computed(self, node: fx.Node) -> Any:
        here: Values = {arg: self._late[arg] if arg in self._late else self._values[arg] for arg in node.all_input_nodes}
        tensors = [arg for arg, value in here.items() if isinstance(value, Tensor)]
        if not self._behind.isdisjoint(here):
            self._behind.add(node)
        elif tensors and not is_view(node):
            # The smallest operand waits for the clip factors: element-wise readers fuse that, others read a copy.
            first = min(tensors, key=lambda arg: _elements(here[arg]))
            nothing = False if here[first].dtype is torch.bool else 0  # the operand keeps its type
            here[first] = torch.where(self._known, here[first], nothing)
            self._behind.add(node)
        args, kwargs = lookup((node.args, node.kwargs), here)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _elements(value: Tensor) -> float:
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape]
    return math.prod(math.inf if size is None else size for size in sizes)

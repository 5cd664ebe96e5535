"""When the non-private step holds how much memory: the room that per-sample gradients and kept operands may use.

AOTAutograd's own partitioner says what the forward saves. The backward is then walked in order. Element-wise nodes count as
fused into what reads them, as Inductor does, unless a kernel that takes its operands from memory reads them.

Bytes are those of tensors that the step itself makes: no parameters, no optimizer state, no inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from . import _compat
from .choose import Kept
from .sample_types import Expr, expression

aten = torch.ops.aten
Number = Callable[[Expr], float]


@dataclass(frozen=True)
class Timeline:
    """``alive[t]``: bytes held while the backward's t-th node runs, parameter gradients left out.

    ``peak``: the most that the non-private step holds at once, gradients included. ``gradients``: bytes of all of them.
    ``order``: node name -> its moment.
    ``died``: name of the node that owns memory -> moment after which nobody needs it; a name that is missing has none of its own.
    ``saved``: names of the values that the backward is given: inputs, and what the forward saves.
    ``needed``: name of what the forward saves -> the first moment at which a kernel of the backward reads it.
    """

    alive: tuple[float, ...]
    peak: float
    gradients: float
    order: dict[str, int] = field(repr=False)
    died: dict[str, int] = field(repr=False)
    bytes_of: dict[str, float] = field(repr=False)
    saved: frozenset[str] = field(default=frozenset(), repr=False)
    needed: dict[str, int] = field(default_factory=dict, repr=False)

    def made(self, node: fx.Node) -> int:
        """The moment at which a node of the joint graph runs (0: in the forward)."""
        return self.order.get(node.name, 0)

    def kept(self, node: fx.Node, number: Number) -> Kept:
        """What it costs to keep a node's value to the end: from the moment on at which nobody else would need it."""
        if node.name in self.died:
            return Kept(node.name, min(self.died[node.name] + 1, len(self.alive) - 1), self.bytes_of[node.name])
        return Kept(node.name, 0, bytes_of(node, number))


def timeline(graph: fx.Graph, gradients: Iterable[fx.Node], number: Number) -> Timeline:
    """Walks the non-private step that ``graph``, a joint graph, would become. ``number`` gives symbolic sizes a value."""
    backward = _compat.partitioned_backward(_copied(graph))
    products = _add_inside_products(backward)
    wanted = {node.name for node in gradients}
    nodes = _scheduled(list(backward.nodes))
    joint = {node.name: owner_of(node) for node in graph.nodes}
    # The partitioner adds inputs of its own: states of random number generators that checkpointing replays.
    joint |= {node.name: node for node in nodes if node.op == "placeholder" and node.name not in joint}
    owners = _owners(nodes, joint)
    # The forward may save a view: what stays in memory is all that the view shows a part of.
    names = {node: joint[node.name].name if node.op == "placeholder" else node.name for node in nodes}
    sizes = {names[node]: bytes_of(joint[node.name] if node.op == "placeholder" else node, number) for node in nodes}
    born, died = _lifetimes(nodes, owners, names)
    leaving = {names[owners[node]] for node in nodes if node.name in wanted}
    alive, with_gradients = [0.0] * len(nodes), [0.0] * len(nodes)
    for name, start in born.items():
        for t in range(start, len(nodes) if name in leaving else died[name] + 1):
            with_gradients[t] += sizes[name]
            alive[t] += 0.0 if name in leaving else sizes[name]
    order = {node.name: t for t, node in enumerate(nodes)}
    order |= {name: max(order[operand.name] for operand in operands) for name, operands in products.items()}
    gradient_bytes = sum(sizes[name] for name in leaving)
    saved = frozenset(node.name for node in nodes if node.op == "placeholder")
    needed = _first_reads(nodes, owners, names)
    return Timeline(tuple(alive), max(with_gradients, default=0.0), gradient_bytes, order, died, sizes, saved, needed)


def _add_inside_products(graph: fx.Graph) -> dict[str, list[fx.Node]]:
    """Does as Inductor does: a product that another value is added to is computed by the call that adds, so not before that value
    is there. A head tied to an embedding waits for the end of the backward, and the logits' gradient with it.

    Returns:
        The operands of such products, by the product's name.
    """
    found: dict[str, list[fx.Node]] = {}
    for total in graph.find_nodes(op="call_function", target=aten.add.Tensor):
        first, second = total.args[:2]
        for part, other in ((first, second), (second, first)):
            product = _lone_product(part)
            if product is None or total.kwargs or not _alike(other, product) or not any(map(reads_memory, total.users)):
                continue
            total.target, total.args = aten.addmm.default, (other, *product.args)
            found[product.name] = product.all_input_nodes
            break
    graph.eliminate_dead_code()
    return found


def _lone_product(node: Any) -> fx.Node | None:
    """The matrix product that a node is, or shows as it is, if nobody else reads it."""
    shown = node
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target is aten.mm.default:
            return node if _alike(shown, node) else None
        node = node.args[0] if is_view(node) else None
    return None


def _alike(node: Any, other: fx.Node) -> bool:
    """Whether two values have one type and layout."""
    value, given = node.meta["val"] if isinstance(node, fx.Node) else None, other.meta["val"]
    return isinstance(value, Tensor) and (value.dtype, value.shape, value.stride()) == (given.dtype, given.shape, given.stride())


def _scheduled(nodes: list[fx.Node]) -> list[fx.Node]:
    """Element-wise nodes run with the kernel before them, as Inductor fuses all that read its result. What leads to a single
    output, as a weight's gradient does, runs as soon as it can: it lets its operands go, and Inductor orders by memory."""
    leads_to: dict[fx.Node, set[fx.Node]] = {node: set() for node in nodes}
    for node in reversed(nodes):
        for arg in node.all_input_nodes:
            leads_to[arg] |= {arg} if node.op == "output" else leads_to[node]
    flows = _behind_tangents(nodes)
    missing = {node: sum(arg in flows for arg in node.all_input_nodes) for node in nodes}
    order: dict[fx.Node, None] = {}
    for node in nodes:
        if node not in flows and node.op not in ("placeholder", "output"):
            continue  # comes with the first node that needs it
        fused, alone = [node], list[fx.Node]()
        while fused or alone:
            now = (fused or alone).pop()
            if now in order:
                continue
            _run(now, order)
            for user in now.users:
                missing[user] -= now in flows
                if missing[user] or now not in flows or user.op == "output":
                    continue
                if not reads_memory(user):
                    fused.append(user)
                elif len(leads_to[user]) == 1:
                    alone.append(user)
    return list(order)


def _run(node: fx.Node, order: dict[fx.Node, None]) -> None:
    """Adds a node to the order, behind those that it needs and that have not run."""
    pending = [node]
    while pending:
        needs = [arg for arg in pending[-1].all_input_nodes if arg not in order]
        if needs:
            pending += needs
        else:
            order.setdefault(pending.pop())


def _behind_tangents(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes that depend on what flows backwards, not on saved values alone."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.name.startswith("tangents") or any(arg in found for arg in node.all_input_nodes):
            found.add(node)
    return found


def _copied(graph: fx.Graph) -> fx.GraphModule:
    """A copy that may be taken apart; values in ``meta`` are shared."""
    twin = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    output = twin.graph_copy(graph, mapping)
    twin.output(output)
    twin.output_node().meta.update(graph.output_node().meta)
    for old, new in mapping.items():
        new.meta = copy.copy(old.meta)
    assert graph.owning_module is not None
    return _compat.never_run(graph.owning_module, twin)


# Kernels that read their operands from memory; what they read is never fused away.
_FROM_MEMORY = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "convolution", "convolution_backward", "sort", "topk")
# They add to what lies in memory, and leave their result there. A plain scatter into a constant (a one-hot) is element-wise.
_SCATTERS = ("index_put", "_unsafe_index_put", "_unsafe_masked_index_put_accumulate", "index_add", "scatter_add", "scatter_reduce")


def reads_memory(node: fx.Node) -> bool:
    """Whether a node's operands have to lie in memory: it is a kernel of its own, or the output."""
    name = _name(node)
    return node.op == "output" or name in _FROM_MEMORY or name in _SCATTERS or "attention" in name


def _name(node: fx.Node) -> str:
    return node.target.__name__.split(".")[0] if node.op == "call_function" and hasattr(node.target, "__name__") else ""


def is_view(node: fx.Node) -> bool:
    """Whether a node shows memory of its first operand."""
    if _name(node) == "getitem":
        return not reads_memory(node.args[0])  # type: ignore[arg-type]
    schema = getattr(node.target, "_schema", None)
    return (
        node.op == "call_function"
        and schema is not None
        and any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
    )


def _owners(nodes: list[fx.Node], joint: Mapping[str, fx.Node]) -> dict[fx.Node, fx.Node]:
    """The node whose memory a node shows: for what the forward saved, the first saved value with the same owner there."""
    owners: dict[fx.Node, fx.Node] = {}
    saved: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = node.args[0] if node.args else None
        if node.op == "placeholder":
            owners[node] = saved.setdefault(joint[node.name], node)
        else:
            owners[node] = owners[source] if is_view(node) and isinstance(source, fx.Node) else node
    return owners


def _lifetimes(
    nodes: list[fx.Node], owners: dict[fx.Node, fx.Node], names: Mapping[fx.Node, str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Name of what owns memory -> moment at which it is made, and moment after which nobody needs it."""
    order = {node: t for t, node in enumerate(nodes)}
    stored = {owners[arg] for node in nodes if reads_memory(node) for arg in node.all_input_nodes}
    stored |= {node for node in nodes if reads_memory(node) and node.op != "output"}
    given = {owners[node] for node in nodes if node.op == "placeholder"}
    last = dict(order)
    for node in reversed(nodes):
        # A fused node runs where its last reader runs, so its own operands live until then.
        until = last[node] if owners[node] is node and node not in stored else order[node]
        for arg in node.all_input_nodes:
            owner = owners[arg]
            end = until if owners[node] is node else last[owners[node]]
            last[owner] = max(last[owner], end - 1 if _in_place(node, owner, stored) else end)
    own = [node for node in stored | given if isinstance(node.meta.get("val"), Tensor) and not _is_input(names[node])]
    born = {names[node]: 0 if node in given else order[node] for node in own}
    return born, {names[node]: last[node] for node in own}


def _first_reads(nodes: list[fx.Node], owners: dict[fx.Node, fx.Node], names: Mapping[fx.Node, str]) -> dict[str, int]:
    """Name of what the forward saves -> moment at which the first kernel reads it."""
    order = {node: t for t, node in enumerate(nodes)}
    stored = {owners[arg] for node in nodes if reads_memory(node) for arg in node.all_input_nodes}
    first = {node: len(nodes) - 1 for node in nodes}
    for node in reversed(nodes):
        runs = order[node] if node in stored or reads_memory(node) else first[node]
        for arg in node.all_input_nodes:
            first[arg] = min(first[arg], runs)
    found: dict[str, int] = {}
    for node in nodes:
        if node.op == "placeholder" and not _is_input(names[node]):
            found[names[node]] = min(first[node], found.get(names[node], len(nodes)))
    return found


def _in_place(node: fx.Node, operand: fx.Node, stored: set[fx.Node]) -> bool:
    """Whether a node takes over the memory of an operand: a scatter its first one's, an element-wise node that is stored one of its
    size."""
    if _name(node) in _SCATTERS:
        return node.args[0] is operand
    if node not in stored or reads_memory(node) or node.op == "placeholder":
        return False
    value, given = node.meta.get("val"), operand.meta.get("val")
    return isinstance(value, Tensor) and isinstance(given, Tensor) and _size(value) == _size(given) and value.dtype == given.dtype


def _size(value: Tensor) -> Expr:
    return sympy.Mul(*(expression(size) for size in value.shape))


def _is_input(name: str) -> bool:
    """Parameters, inputs and tangents: not the step's own memory."""
    return name.startswith(("primals", "tangents"))


def bytes_of(node: fx.Node, number: Number) -> float:
    """Of a node's value; of its first one where it has several."""
    value = node.meta.get("val")
    tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
    return float(sum(math.prod(number(expression(s)) for s in v.shape) * v.dtype.itemsize for v in tensors[:1]))


def owner_of(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while is_view(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node

"""When the non-private step holds how much memory: the room that per-sample gradients and kept operands may use.

AOTAutograd's own partitioner says what the forward saves. The backward is then walked in order. Element-wise nodes count as
fused into what reads them, as Inductor does, unless a kernel that takes its operands from memory reads them.

Bytes are those of tensors that the step itself makes: no parameters, no optimizer state, no inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

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

    ``peak``: the most that the non-private step holds at once, gradients included. ``order``: node name -> its moment.
    ``died``: node name -> moment after which nobody needs its memory; a name that is missing has none of its own.
    """

    alive: tuple[float, ...]
    peak: float
    order: dict[str, int] = field(repr=False)
    died: dict[str, int] = field(repr=False)
    bytes_of: dict[str, float] = field(repr=False)

    def made(self, node: fx.Node) -> int:
        """The moment at which a node of the joint graph runs (0: in the forward)."""
        return self.order.get(node.name, 0)

    def kept(self, node: fx.Node, number: Number) -> Kept:
        """What it costs to keep a node's value to the end: from the moment on at which nobody else would need it."""
        if node.name in self.died:
            return Kept(node.name, min(self.died[node.name] + 1, len(self.alive) - 1), self.bytes_of[node.name])
        return Kept(node.name, 0, _bytes(node, number))


def timeline(graph: fx.Graph, gradients: Iterable[fx.Node], number: Number) -> Timeline:
    """Walks the non-private step that ``graph``, a joint graph, would become. ``number`` gives symbolic sizes a value."""
    backward = _compat.partitioned_backward(_copied(graph))
    leaving = {node.name for node in gradients}
    nodes = list(backward.nodes)
    owners = _owners(nodes)
    sizes = {node.name: _bytes(node, number) for node in nodes}
    born, died = _lifetimes(nodes, owners, leaving)
    alive, with_gradients = [0.0] * len(nodes), [0.0] * len(nodes)
    for name, start in born.items():
        for t in range(start, len(nodes) if name in leaving else died[name] + 1):
            with_gradients[t] += sizes[name]
            alive[t] += 0.0 if name in leaving else sizes[name]
    order = {node.name: t for t, node in enumerate(nodes)}
    return Timeline(tuple(alive), max(with_gradients, default=0.0), order, died, sizes)


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
    return fx.GraphModule(graph.owning_module, twin)


# Kernels that read their operands from memory; what they read is never fused away.
_FROM_MEMORY = ("mm", "bmm", "addmm", "baddbmm", "mv", "dot", "convolution", "convolution_backward")


def reads_memory(node: fx.Node) -> bool:
    """Whether a node's operands have to lie in memory: it is a kernel of its own, or the output."""
    name = _name(node)
    return (
        node.op == "output" or name in _FROM_MEMORY or "attention" in name or name in ("sort", "topk", "index_put", "scatter_add")
    )


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


def _owners(nodes: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """The node whose memory a view shows; every other node owns its own."""
    owners: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        source = node.args[0] if node.args else None
        owners[node] = owners[source] if is_view(node) and isinstance(source, fx.Node) else node
    return owners


def _lifetimes(nodes: list[fx.Node], owners: dict[fx.Node, fx.Node], leaving: set[str]) -> tuple[dict[str, int], dict[str, int]]:
    order = {node: t for t, node in enumerate(nodes)}
    stored = {owners[arg] for node in nodes if reads_memory(node) for arg in node.all_input_nodes}
    stored |= {node for node in nodes if reads_memory(node) and node.op != "output"}
    given = {node for node in nodes if node.op == "placeholder" and not _is_input(node)}
    last = dict(order)
    for node in reversed(nodes):
        # A fused node runs where its last reader runs, so its own operands live until then.
        until = last[node] if owners[node] is node and node not in stored else order[node]
        for arg in node.all_input_nodes:
            owner = owners[arg]
            last[owner] = max(last[owner], until if owners[node] is node else last[owners[node]])
    kept = {node for node in stored | given if isinstance(node.meta.get("val"), Tensor) and not _is_input(node)}
    born = {node.name: 0 if node in given else order[node] for node in kept}
    return born, {node.name: last[node] for node in kept}


def _is_input(node: fx.Node) -> bool:
    """Parameters, inputs and tangents: not the step's own memory."""
    return node.op == "placeholder" and node.name.startswith(("primals", "tangents"))


def _bytes(node: fx.Node, number: Number) -> float:
    value = node.meta.get("val")
    tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
    return float(sum(math.prod(number(expression(s)) for s in v.shape) * v.dtype.itemsize for v in tensors[:1]))


def owner_of(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while is_view(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node

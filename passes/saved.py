"""Values that the forward keeps for the backward although the backward could compute them again at little cost.

AOTAutograd's partitioner saves what a kernel of the backward takes from memory, such as the normalised input of a linear layer or
keys that were copied for each query head. Where what privacy holds leaves no room, some of them are better computed twice: by one
element-wise pass over values that are in memory anyway. Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", at the
grain of a single kernel.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd import descriptors as aot
from torch.utils.checkpoint import CheckpointPolicy

from . import choose
from .costs import Kernel
from .memory import Timeline, bytes_of, is_view, owner_of
from .peaks import Peaks
from .sample_types import Expr

aten = torch.ops.aten
_ELEMENTWISE = (aten.clone.default, aten.cat.default, torch.ops.prims.convert_element_type.default)
# A share of the peak; smaller values do not matter to it.
_SMALLEST = 1 / 200


@dataclass(frozen=True)
class Saved:
    """``node``: a saved value; ``chain``: the element-wise nodes that make it from what is in memory anyway, itself included.

    ``instead``: values that have to stay in memory for it. ``seconds``, ``traffic`` in bytes: to make it again. ``nbytes``: what is
    free then, from the forward's end to the moment ``needed`` of the backward.
    """

    node: fx.Node
    chain: tuple[fx.Node, ...] = field(repr=False)
    instead: tuple[fx.Node, ...] = field(repr=False)
    seconds: float
    traffic: float
    nbytes: float
    needed: int

    def ways(self) -> list[choose.Way]:
        """Kept as it is, or made again."""
        again = choose.Kept(f"{self.node.name} made again", self.needed, self.nbytes)
        return [choose.Way(0.0, 0.0), choose.Way(self.seconds, -self.nbytes, (again,))]


def saved_values(graph: fx.Graph, line: Timeline, peaks: Peaks, number: Callable[[Expr], float]) -> list[Saved]:
    """The saved values of a joint graph that are worth the question."""
    found = []
    overwritten = _overwritten(graph)
    for node in graph.nodes:
        if node.name not in line.needed or not _elementwise(node) or "recompute" in node.meta:
            continue
        chain, sources = _chain(node, line)
        size = bytes_of(node, number)
        instead = tuple(source for source in sources if not _in_memory(source, line))
        gain = size - sum(bytes_of(source, number) for source in instead)
        if gain > _SMALLEST * line.peak and overwritten.isdisjoint(sources):
            traffic = size + sum(bytes_of(source, number) for source in sources)
            seconds = Kernel(traffic=traffic).seconds(peaks, number)  # type: ignore[arg-type]
            found.append(Saved(node, tuple(chain), instead, seconds, traffic, gain, line.needed[node.name]))
    return found


def make_again_pass(values: Iterable[Saved]) -> None:
    """Tells the partitioner to compute these values in the backward."""
    for value in values:
        for node in (*value.chain, *_views(value.node)):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
            node.meta["ac_graph_id"] = 1 << 16


def _overwritten(graph: fx.Graph) -> set[fx.Node]:
    """The inputs that a step gives new values, such as a counter in a buffer: the backward would find those."""
    updates = {desc.mutated_input for desc in graph.output_node().meta["desc"] if isinstance(desc, aot.InputMutationAOTOutput)}
    copied_to = {node.args[0] for node in graph.find_nodes(op="call_function", target=aten.copy_.default)}
    return {node for node in graph.find_nodes(op="placeholder") if node in copied_to or node.meta.get("desc") in updates}


def _chain(node: fx.Node, line: Timeline) -> tuple[list[fx.Node], list[fx.Node]]:
    """Element-wise nodes and views from ``node`` upwards, and the values at which they begin."""
    chain, sources, seen = [node], dict[fx.Node, None](), {node}
    for current in chain:
        for arg in current.all_input_nodes:
            if arg in seen or not isinstance(arg.meta.get("val"), Tensor):
                continue
            seen.add(arg)
            if _in_memory(arg, line) or not (_elementwise(arg) or _shows(arg)) or "recompute" in arg.meta:
                sources[owner_of(arg)] = None
            else:
                chain.append(arg)
    return chain, list(sources)


def _shows(node: fx.Node) -> bool:
    """Whether a node is a view; a result of several, as a mean beside its variance, is none."""
    return is_view(node) and (node.target is not operator.getitem or is_view(node.args[0]))  # type: ignore[arg-type]


def _views(node: fx.Node) -> list[fx.Node]:
    """What shows a value's memory in another shape: it must not be saved in its stead."""
    found = [user for user in node.users if is_view(user)]
    for view in found:
        found += [user for user in view.users if is_view(user) and user not in found]
    return found


def _in_memory(node: fx.Node, line: Timeline) -> bool:
    """Whether a value is an input, or saved."""
    owner = owner_of(node)
    return owner.op == "placeholder" or owner.name in line.needed


def _elementwise(node: fx.Node) -> bool:
    tags: Sequence[torch.Tag] = getattr(node.target, "tags", ())
    return node.op == "call_function" and (
        node.target in _ELEMENTWISE or (torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags)
    )

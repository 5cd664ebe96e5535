"""Which values are the same on all ranks that compute parts of the same samples (tensor parallelism).

A parameter of which each of these ranks holds a copy must get one gradient everywhere: its norm counts once, and copies that had
taken in different sums under the same noise would tell those by their difference. A value is the same on all ranks if it is
computed from such values alone, or if a collective has given it to all of them. All else may differ: shards, partial sums, random
numbers, one part out of several.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import fx
from torch._functorch._aot_autograd import descriptors as aot

from .errors import UnsupportedGraphError
from .graph_spec import GraphSpec
from .refusal import operator_name, source_line
from .rules.collectives import ALL_REDUCE, GATHERS, WAIT, group_of, is_collective
from .type_samples import placeholder_specs

if TYPE_CHECKING:
    from .match import ParameterGradient

aten = torch.ops.aten
_PARTS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int}
_RANDOM_INPUTS = (
    aot.PhiloxForwardSeedAOTInput, aot.PhiloxForwardBaseOffsetAOTInput, aot.PhiloxBackwardSeedAOTInput,
    aot.PhiloxBackwardBaseOffsetAOTInput,
)  # fmt: skip


def check_copies(graph: fx.Graph, gradients: Sequence[ParameterGradient], spec: GraphSpec) -> None:
    """Makes sure that each parameter of which all ranks hold a copy gets one gradient on all of them.

    Raises:
        UnsupportedGraphError: a gradient may differ; it names the first operator whose result does.
    """
    if spec.model_group is None:
        return
    parts = {given.name for given in spec.inputs if given.split}
    known = same_on_all_ranks(graph, spec)
    for gradient in gradients:
        if gradient.node is not None and gradient.name not in parts and gradient.node not in known:
            origin = _first_difference(gradient.node, known)
            raise UnsupportedGraphError(
                f"each rank of the tensor-parallel group holds a copy of {gradient.name!r}; its gradient may differ among them.\n"
                f"  operator: {operator_name(origin)}\n"
                f"  source:   {source_line(origin) or '(unknown)'}\n"
                "Its value is a rank's own: of a shard, a partial sum, or random numbers (dropout). Make the parameter a "
                "distributed one, whose gradient is summed (parallelize_module with SequenceParallel, or distribute_tensor with "
                "Replicate()), or freeze it; leave dropout out."
            )


def same_on_all_ranks(graph: fx.Graph, spec: GraphSpec) -> set[fx.Node]:
    """The nodes of a joint graph whose values all ranks of ``spec.model_group`` have alike."""
    given = dict(placeholder_specs(graph, spec))
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            same = not given[node].split if node in given else not isinstance(node.meta.get("desc"), _RANDOM_INPUTS)
        elif node.op == "call_function":
            same = _result_is_same(node, found, spec)
        else:
            same = node.op == "get_attr"
        if same:
            found.add(node)
    return found


def _result_is_same(node: fx.Node, found: set[fx.Node], spec: GraphSpec) -> bool:
    if is_collective(node.target) and node.target is not WAIT and group_of(node) == spec.model_group:
        return node.target is ALL_REDUCE or node.target in GATHERS
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    if node.target is operator.getitem and node.args[0].target in _PARTS:  # type: ignore[union-attr]
        # Which part a rank takes for itself is a number in its graph; only all parts together are the same everywhere.
        parts: fx.Node = node.args[0]  # type: ignore[assignment]
        if len({user.args[1] for user in parts.users}) != len(parts.meta["val"]):
            return False
    return all(arg in found for arg in node.all_input_nodes)


def _first_difference(gradient: fx.Node, known: set[fx.Node]) -> fx.Node:
    """Where, on the way to a gradient, values begin to differ."""
    node = gradient
    while True:
        different = [arg for arg in node.all_input_nodes if arg not in known and arg.op == "call_function"]
        if not different:
            return node
        node = different[-1]

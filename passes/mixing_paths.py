"""Gradients that flow back through an operator that mixed samples on the way forward.

Where everything after such an operator is linear, its backward sees public values only: adding the first sample to all others
gives that sample's gradient the weight B, say. Each share is then still one sample's own, but it is no longer the gradient that
a batch of this sample alone would have. AOTAutograd gives an operator and its backward one number, ``seq_nr``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import fx
from torch._functorch._aot_autograd import descriptors as aot

from .rules import Context
from .sample_types import Mixed, PerSample

# A mean weighs all samples alike, so its backward gives each what a batch of it alone would.
EVEN = {torch.ops.aten.mean.default, torch.ops.aten.mean.dim}


class MixingPaths:
    """Finds them in one typed joint graph."""

    def __init__(self, graph: fx.Graph, ctx: Context) -> None:
        self._backward = _descendants(
            n for n in graph.find_nodes(op="placeholder") if isinstance(n.meta.get("desc"), aot.TangentAOTInput)
        )
        reaching = _ancestors(_differentiated(graph))
        self._mixing = {
            node.meta["seq_nr"]: found
            for node in graph.nodes
            if node in reaching
            and node not in self._backward
            and (found := _mixes_here(ctx, node)) is not None
            and "seq_nr" in node.meta
        }

    def through(self, gradient: fx.Node) -> Mixed | None:
        """The type of a mixing operator whose backward this gradient is made from, or ``None``."""
        if not self._mixing:
            return None
        path = _ancestors([gradient]) & self._backward
        return next((self._mixing[n.meta["seq_nr"]] for n in path if n.meta.get("seq_nr") in self._mixing), None)


def _differentiated(graph: fx.Graph) -> list[fx.Node]:
    output = graph.output_node()
    wanted = {
        node.meta["desc"].output
        for node in graph.find_nodes(op="placeholder")
        if isinstance(node.meta.get("desc"), aot.TangentAOTInput)
    }
    return [v for v, desc in zip(output.args[0], output.meta["desc"], strict=True) if desc in wanted and isinstance(v, fx.Node)]  # type: ignore[arg-type]


def _mixes_here(ctx: Context, node: fx.Node) -> Mixed | None:
    """Samples meet in this node itself: it was given separate ones, and its values are not."""
    found = ctx.types.get(node)
    mixed = next((t for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, Mixed)), None)
    if mixed is None or mixed.origin is not node or node.target in EVEN:
        return None
    value = node.meta.get("val")
    inexact = any(
        isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex())
        for v in (value if isinstance(value, (tuple, list)) else (value,))
    )
    return mixed if inexact and any(isinstance(ctx.type(arg), PerSample) for arg in node.all_input_nodes) else None


def _ancestors(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return _closure(nodes, lambda node: node.all_input_nodes)


def _descendants(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    return _closure(nodes, lambda node: list(node.users))


def _closure(nodes: Iterable[fx.Node], step: Callable[[fx.Node], list[fx.Node]]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += step(node)
    return found

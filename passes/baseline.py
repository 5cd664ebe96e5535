"""The predicted time of the non-private step, to which what privacy adds is compared."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from .costs import Kernel
from .memory import is_view, reads_memory
from .peaks import Peaks
from .sample_types import Expr, expression

aten = torch.ops.aten
# PyTorch counts the attention of GPUs only; the CPU's takes the same operands first.
FORMULAS = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}


def step_seconds(graph: fx.Graph, peaks: Peaks, number: Callable[[Expr], float]) -> float:
    """Rooflines of the joint graph's products and attentions, and one pass over memory for what lies between them.

    Element-wise chains are taken to be fused: their traffic is what they read that a kernel left in memory, and what one needs.
    """
    stored = stored_values(graph)
    kernels = (kernel_of(node, stored, number) for node in graph.nodes)
    return sum(kernel.seconds(peaks, number) for kernel in kernels if kernel is not None)


def stored_values(graph: fx.Graph) -> set[fx.Node]:
    """What lies in memory because a kernel reads it from there."""
    return {arg for node in graph.nodes if reads_memory(node) for arg in node.all_input_nodes}


def kernel_of(node: fx.Node, stored: Set[fx.Node], number: Callable[[Expr], float]) -> Kernel | None:
    """The kernel that computes a node; None where it costs nothing of its own."""
    if node.op != "call_function" or is_view(node):
        return None
    if _packet(node) in FORMULAS:
        return Kernel(_flops(node, number), _traffic([*node.all_input_nodes, node]), _dtype(node))
    if node in stored:
        return Kernel(traffic=_traffic([*(arg for arg in node.all_input_nodes if arg in stored), node]))
    return None


def _flops(node: fx.Node, number: Callable[[Expr], float]) -> Expr:
    """PyTorch's formula on shapes in numbers: a symbolic size is not guarded on."""

    def shape(value: Any) -> Any:
        return torch.Size([int(number(expression(s))) for s in value.shape]) if isinstance(value, Tensor) else value

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda arg: shape(arg.meta.get("val")))
    return sympy.Integer(FORMULAS[_packet(node)](*args, **kwargs, out_val=pytree.tree_map(shape, node.meta["val"])))


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _traffic(nodes: list[fx.Node]) -> Expr:
    values = [v for node in nodes for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, Tensor)]
    return sympy.Add(*(v.dtype.itemsize * sympy.Mul(*(expression(s) for s in v.shape)) for v in values))


def _dtype(node: fx.Node) -> torch.dtype:
    floats = [v.dtype for arg in node.all_input_nodes if isinstance(v := arg.meta.get("val"), Tensor) and v.is_floating_point()]
    return floats[0] if floats else torch.float32

"""Batch-dependent loss normalisers, such as a token count: proven to scale every gradient alike, and replaced by a fixed one.

Dividing the loss by a count over the whole batch makes every sample's gradient depend on the other samples' lengths. The
type analysis carries such numbers along as factors; when all gradients end with the same factor, it is a uniform scale, and a
constant in its place leaves the samples independent.
"""

from __future__ import annotations

import operator
import warnings
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv

from .errors import OptionsError
from .graph_spec import GraphSpec
from .match import gradient_outputs
from .refusal import mixing_error, source_line
from .rules import Context
from .sample_types import Expr, Mixed, Public, common_scale, known_scale

aten = torch.ops.aten


class LossNormalizerWarning(UserWarning):
    """A batch-dependent normaliser of the loss was replaced by a fixed one."""


@dataclass(frozen=True)
class Replacement:
    """What was replaced, for reports: the source line, and the fixed number per sample."""

    node: str
    source: str
    per_sample: float | Expr
    text: str


def normalize_loss_pass(graph: fx.Graph, spec: GraphSpec, ctx: Context) -> list[Replacement]:
    """Replaces uniform batch-dependent factors in place; the caller types the graph again if anything was replaced.

    Raises:
        SampleMixingError: the factor is not the same for all gradients.
        OptionsError: nothing says what the fixed normaliser should be.
    """
    gradients = [(name, node) for _, name, node in gradient_outputs(graph, spec) if node is not None]
    scales = {common_scale([ctx.type(node).scale]) or () for _, node in gradients if not _without_scale(ctx, node)}
    free = any(scale != known_scale(scale) for scale in scales)
    scales = {known_scale(scale) for scale in scales}
    if free and len(scales) > 1:
        scales -= {()}
    if not any(scales):
        return []
    if len(scales) > 1:
        name, node = next((n, g) for n, g in gradients if known_scale(ctx.type(g).scale))
        key = known_scale(ctx.type(node).scale)[0][0]
        raise mixing_error(
            f"the gradient of {name!r}",
            Mixed(ctx.scalars[key], "a batch-dependent number scales some of the gradients, not all"),
        )
    reached = _ancestors([node for _, node in gradients])
    return [_replace(graph, spec, ctx, key, reached) for key, _ in next(iter(scales))]


def _without_scale(ctx: Context, node: fx.Node) -> bool:
    type_ = ctx.type(node)
    return isinstance(type_, Mixed) or (isinstance(type_, Public) and (type_.zero or not type_.scale))


def _ancestors(nodes: list[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def _replace(graph: fx.Graph, spec: GraphSpec, ctx: Context, key: str, reached: set[fx.Node]) -> Replacement:
    scalar = ctx.scalars[key]
    per_sample: Any = spec.loss_normalizer if spec.loss_normalizer is not None else ctx.counted_per_sample(scalar)
    where = source_line(scalar) or f"input {scalar.name}"
    if per_sample is None:
        raise OptionsError(
            f"the loss is scaled by a number that depends on the whole batch ({where}), and nothing says what a fixed one "
            "should be.\nSet loss_normalizer to the number of counted elements (tokens) per sample that each sample's loss is "
            "to be divided by, for example the sequence length."
        )
    twins = [node for node in graph.nodes if node is scalar or _same_value(ctx, node, key)]
    for node in twins:
        constant = _constant(graph, spec, ctx, node, per_sample)
        for user in list(node.users):
            if user in reached and user.op != "output":
                user.replace_input_with(node, constant)
    shown = per_sample if spec.loss_reduction == "sum" else f"{per_sample} per sample"
    text = (
        f"the loss is scaled by a number that depends on the whole batch, at {where}. It scales every gradient alike and was "
        f"replaced by a fixed normaliser ({shown}), so that samples stay independent. Set loss_normalizer to choose another."
    )
    warnings.warn(text, LossNormalizerWarning, stacklevel=2)
    return Replacement(scalar.name, source_line(scalar), per_sample, text)


def _same_value(ctx: Context, node: fx.Node, key: str) -> bool:
    return node.op == "call_function" and f"value{ctx._value_number(node)}" == key


def _constant(graph: fx.Graph, spec: GraphSpec, ctx: Context, node: fx.Node, per_sample: Any) -> fx.Node:
    """A tensor of the scalar's shape that holds ``per_sample`` (times the batch size, for a mean)."""
    value = node.meta["val"]
    dtype = value.dtype if isinstance(value, torch.Tensor) and value.dtype.is_floating_point else torch.get_default_dtype()
    total = sympy.sympify(per_sample) * (ctx.batch if spec.loss_reduction == "mean" else 1)
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with graph.inserting_before(first if node.op == "placeholder" else node.next):
        number = float(total) if total.is_number else _size_node(graph, total)
        constant = graph.call_function(aten.full.default, (list(value.shape), number), {"dtype": dtype, "device": value.device})
    with value.fake_mode:
        constant.meta["val"] = torch.empty(value.shape, dtype=dtype, device=value.device)
    return constant


_OPERATIONS: dict[Any, Any] = {
    sympy.Mul: operator.mul,
    sympy.Add: operator.add,
    sympy.Pow: operator.pow,
    FloorDiv: operator.floordiv,
}


def _size_node(graph: fx.Graph, expr: Expr) -> Any:
    """A node that computes an expression in the graph's size symbols."""
    if expr.is_number:
        return int(expr) if expr.is_Integer else float(expr)
    if expr.is_Symbol:
        return _symbol_node(graph, expr)
    parts = [_size_node(graph, part) for part in expr.args]
    result = parts[0]
    for part in parts[1:]:
        values = [p.meta["val"] if isinstance(p, fx.Node) else p for p in (result, part)]
        operation = _OPERATIONS[expr.func]
        result = graph.call_function(operation, (result, part))
        result.meta["val"] = operation(*values)
    return result


def _symbol_node(graph: fx.Graph, symbol: Expr) -> fx.Node:
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                found = graph.call_function(aten.sym_size.int, (node, dim))
                found.meta["val"] = size
                return found
    raise OptionsError(f"the fixed normaliser of the loss depends on a size that no input shows ({symbol}). Set loss_normalizer.")

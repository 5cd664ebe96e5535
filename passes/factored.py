"""Recognises gradients that are sums of matrix products and embedding rows over the samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import sympy
import torch
from torch import fx

from .match import WRITES, ParameterGradient, Use, write_operands
from .rules import Context
from .sample_types import Expr

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class Factor:
    """A use in factored form: ``kind`` "outer" (a matrix product; ``swapped``: its result reaches the parameter transposed)
    or "rows" (an embedding's scatter)."""

    use: Use
    kind: Literal["outer", "rows"]
    swapped: bool = False


def use_kind(use: Use) -> str:
    """A word for tables: what reduces over the samples."""
    target = use.operation.target
    if target in (aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default):
        return "matmul"
    if target in WRITES or target in (aten.embedding_dense_backward.default, aten.scatter_add.default):
        return "rows"
    return "convolution" if target is aten.convolution_backward.default else str(target).split(".")[1]


def factored(gradient: ParameterGradient, ctx: Context) -> tuple[Factor, ...] | None:
    """The gradient as a sum of matrix products and embedding rows, if its tail only adds, renames and transposes them."""
    assert gradient.node is not None
    if any(use.node.meta["val"].is_complex() for use in gradient.uses):
        return None
    uses = {use.node: use for use in gradient.uses}
    found = _walk(gradient.node, False, uses, ctx, alone=len(uses) == 1)
    return tuple(found) if found else None


SAME = {
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    prims.convert_element_type.default,
    aten._to_copy.default,
}
_VIEWS = {
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip


def _walk(node: fx.Node, swapped: bool, uses: dict[fx.Node, Use], ctx: Context, alone: bool) -> list[Factor] | None:
    """``alone``: nothing is added to what is reached here, so how it is laid out in the parameter does not matter to its norm."""
    if node in uses:
        factor = _factor(uses[node], swapped, ctx)
        return None if factor is None or (factor.kind == "rows" and swapped and not alone) else [factor]
    source = node.args[0] if node.args else None
    if node.target in SAME or (node.target in _VIEWS and (alone or ctx.shape(node) == ctx.shape(source))):
        return _walk(source, swapped, uses, ctx, alone)  # type: ignore[arg-type]
    if node.target in (aten.permute.default, aten.t.default):
        plain = len(ctx.shape(node)) == 2 and (node.target is aten.t.default or [d % 2 for d in node.args[1]] == [1, 0])  # type: ignore[union-attr]
        if plain or alone:
            return _walk(source, swapped != plain, uses, ctx, alone)  # type: ignore[arg-type]
    if node.target is aten.add.Tensor and not node.kwargs.get("alpha") and ctx.shape(node.args[0]) == ctx.shape(node.args[1]):
        sides = [_walk(side, swapped, uses, ctx, alone=False) for side in node.args[:2]]  # type: ignore[arg-type]
        return sides[0] + sides[1] if sides[0] and sides[1] else None
    return None


def _factor(use: Use, swapped: bool, ctx: Context) -> Factor | None:
    node = use.operation
    if node.target is aten.mm.default:
        return Factor(use, "outer", swapped)
    if node.target is aten.convolution_backward.default and use.node.args[1] == 1:
        source, weight, groups = node.args[1], node.args[2], node.args[9]
        plain = groups == 1 and len(ctx.shape(source)) in (3, 4) and len(ctx.shape(weight)) == len(ctx.shape(source))
        return Factor(use, "outer") if plain and not swapped else None
    if node.target in WRITES:
        x, indices, values, mask = write_operands(ctx, node)
        one_row = len(indices) == 1 and len(ctx.shape(x)) == 2 and (len(node.args) < 4 or mask is not None or bool(node.args[3]))
        fits = one_row and len(ctx.shape(values)) == len(ctx.shape(indices[0])) + 1 and _last_axis_free(use, ctx, values)
        ids_follow = fits and any(use.leaves[i] is indices[0] for i in use.axes)
        return Factor(use, "rows", swapped) if ids_follow else None
    return None


def _last_axis_free(use: Use, ctx: Context, values: Any) -> bool:
    position = next(i for i, leaf in enumerate(use.leaves) if leaf is values and i in use.axes)
    return use.axes[position].dim < len(ctx.shape(values)) - 1 and ctx.shape(values)[-1] == ctx.shape(use.operation)[-1]


def unwidened(node: fx.Node) -> fx.Node:
    """What a node was cast from, as long as the cast lost nothing: kernels widen by themselves."""
    while node.target in (prims.convert_element_type.default, aten._to_copy.default):
        source: fx.Node = node.args[0]  # type: ignore[assignment]
        old, new = source.meta["val"].dtype, node.meta["val"].dtype
        if not (old.is_floating_point and new.is_floating_point and old.itemsize < new.itemsize):
            break
        node = source
    return node


def contraction_length(factor: Factor, ctx: Context) -> Expr:
    """T: positions per sample over which the factor is summed."""
    position, axis = next(iter(factor.use.axes.items()))
    leaf = factor.use.leaves[position]
    if is_convolution(factor):
        rows = factor.use.operation.args[1 if factor.use.operation.args[7] else 0]
        images, _, *positions = ctx.shape(rows)
        return sympy.cancel(images / ctx.batch) * sympy.Mul(*positions)
    if factor.kind == "outer":
        return sympy.cancel(ctx.shape(leaf)[axis.dim] / ctx.batch)
    ids = write_operands(ctx, factor.use.operation)[1][0]
    return sympy.cancel(sympy.Mul(*ctx.shape(ids)) / ctx.batch)


def is_convolution(factor: Factor) -> bool:
    return factor.use.operation.target is aten.convolution_backward.default

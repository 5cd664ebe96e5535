"""Chooses, for every parameter, how its per-sample norms and its clipped sum are computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import sympy
import torch
from torch import fx

from .errors import OptionsError
from .graph_spec import GraphSpec
from .match import WRITES, ParameterGradient, Use, write_operands
from .rules import Context
from .sample_types import Expr

aten, prims = torch.ops.aten, torch.ops.prims

Chosen = Literal["materialize", "ghost", "single", "empty", "constant", "unused"]
# Floating-point operations that a device does in the time of one byte of memory traffic.
FLOPS_PER_BYTE = {"cpu": 6, "cuda": 180}


@dataclass(frozen=True)
class Factor:
    """A use in factored form: ``kind`` "outer" (a matrix product; ``swapped``: its result reaches the parameter transposed)
    or "rows" (an embedding's scatter)."""

    use: Use
    kind: Literal["outer", "rows"]
    swapped: bool = False


@dataclass(frozen=True)
class ParameterPlan:
    """``flops`` and ``bytes_moved``: what privacy adds for this parameter; ``bytes_held``: memory until clip factors are known."""

    gradient: ParameterGradient
    chosen: Chosen
    why: str
    kind: str
    factors: tuple[Factor, ...] = field(default=(), repr=False)
    flops: Expr = sympy.S.Zero
    bytes_moved: Expr = sympy.S.Zero
    bytes_held: Expr = sympy.S.Zero

    @property
    def name(self) -> str:
        return self.gradient.name


def plan_gradients(gradients: list[ParameterGradient], spec: GraphSpec, ctx: Context) -> list[ParameterPlan]:
    """One plan per gradient.

    Raises:
        OptionsError: ``norm_algorithm`` names an algorithm that does not fit a parameter.
    """
    return [_plan(gradient, spec, ctx) for gradient in gradients]


def _plan(gradient: ParameterGradient, spec: GraphSpec, ctx: Context) -> ParameterPlan:
    if gradient.node is None:
        return ParameterPlan(gradient, "unused", "not reached by the loss", "-")
    size = sympy.Mul(*ctx.shape(gradient.node))
    width = gradient.node.meta["val"].dtype.itemsize
    kind = " + ".join(dict.fromkeys(use_kind(use) for use in gradient.uses)) or "whole gradient"
    if ctx.batch == 0:
        return ParameterPlan(gradient, "empty", "no sample: noise alone", "-")
    if gradient.constant:
        return ParameterPlan(gradient, "constant", "the same for every sample", "-", (), 3 * size, 2 * width * size)
    if not gradient.uses:
        return ParameterPlan(gradient, "single", "one sample: the gradient is its own", kind, (), 3 * size, 2 * width * size)
    glob, wanted = next(((g, a) for g, a in spec.norm_algorithm if fnmatchcase(gradient.name, g)), ("*", "auto"))
    factors = factored(gradient, ctx)
    dense = ctx.batch * size * width
    materialize = ParameterPlan(gradient, "materialize", "", kind, (), 3 * ctx.batch * size, 3 * dense, dense)
    if factors is None:
        if wanted == "ghost" and glob != "*":
            raise OptionsError(
                f"norm_algorithm={{{glob!r}: 'ghost'}} does not fit {gradient.name!r}: its gradient ({kind}) is not a sum of plain "
                "matrix products and embedding rows. Use 'auto' or 'materialize' for it."
            )
        return _because(materialize, "the only form that fits")
    ghost = _ghost_plan(gradient, kind, factors, ctx)
    if wanted != "auto":
        return _because(ghost if wanted == "ghost" else materialize, f"asked for by norm_algorithm ({glob!r})")
    ratio = FLOPS_PER_BYTE.get(gradient.node.meta["val"].device.type, 100)
    costs = {plan.chosen: _hint(plan.flops + ratio * plan.bytes_moved, gradient) for plan in (ghost, materialize)}
    best = ghost if costs["ghost"] < costs["materialize"] else materialize
    return _because(best, f"{best.chosen} costs {min(costs.values()) / max(max(costs.values()), 1):.2g} of the other way")


def _because(plan: ParameterPlan, why: str) -> ParameterPlan:
    return replace(plan, why=why)


def _hint(cost: Expr, gradient: ParameterGradient) -> float:
    """A number for comparison: symbols take the sizes seen while tracing, without guarding on them."""
    assert gradient.node is not None
    values = {}
    for symbol in cost.free_symbols:
        values[symbol] = symbol_hint(symbol, gradient.node.graph)
    return float(cost.subs(values))


def symbol_hint(symbol: Any, graph: fx.Graph) -> int:
    """The value that a size symbol had while tracing, without guarding on it."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        sizes = [value] if isinstance(value, torch.SymInt) else list(value.shape) if isinstance(value, torch.Tensor) else []
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr == symbol and size.node.has_hint():
                return int(size.node.hint)
    return 32


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


_SAME = {
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
    if node in uses:
        factor = _factor(uses[node], swapped, ctx)
        return None if factor is None or (factor.kind == "rows" and swapped and not alone) else [factor]
    source = node.args[0] if node.args else None
    if node.target in _SAME or (node.target in _VIEWS and (alone or ctx.shape(node) == ctx.shape(source))):
        return _walk(source, swapped, uses, ctx, alone)  # type: ignore[arg-type]
    if node.target in (aten.permute.default, aten.t.default):
        plain = len(ctx.shape(node)) == 2 and (node.target is aten.t.default or [d % 2 for d in node.args[1]] == [1, 0])  # type: ignore[union-attr]
        if plain or alone:
            return _walk(source, swapped != plain, uses, ctx, alone)  # type: ignore[arg-type]
    if node.target is aten.add.Tensor and not node.kwargs.get("alpha") and ctx.shape(node.args[0]) == ctx.shape(node.args[1]):
        sides = [_walk(side, swapped, uses, ctx, alone) for side in node.args[:2]]  # type: ignore[arg-type]
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


def _ghost_plan(gradient: ParameterGradient, kind: str, factors: tuple[Factor, ...], ctx: Context) -> ParameterPlan:
    """2 B T^2 (p + d) for products, O(B T d) for rows, and a scaled copy of each operand for the clipped sum."""
    batch = ctx.batch
    outer = [f for f in factors if f.kind == "outer"]
    rows = [f for f in factors if f.kind == "rows"]
    length = sum((contraction_length(f, ctx) for f in outer), sympy.S.Zero)
    row_length = sum((contraction_length(f, ctx) for f in rows), sympy.S.Zero)
    flops, moved, held = sympy.S.Zero, sympy.S.Zero, sympy.S.Zero
    if outer:
        p, *columns = ctx.shape(outer[0].use.node)
        d = sympy.Mul(*columns)
        flops += 2 * batch * length * (p + d) if length == 1 else 2 * batch * length**2 * (p + d)
        moved += 8 * batch * length * (p + d)
        held += 4 * batch * length * (p + d)
    if rows:
        d = ctx.shape(rows[0].use.operation)[-1]
        flops += 3 * batch * row_length * d
        moved += 24 * batch * row_length * d
        held += 4 * batch * row_length * d
    if outer and rows:
        flops += 2 * batch * length * row_length * d
    return ParameterPlan(gradient, "ghost", "", kind, factors, flops, moved, held)

"""The ways to compute one parameter's per-sample norms and clipped sum, with what each costs."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field, replace
from typing import Literal

import sympy
import torch
from torch import fx

from . import fused_costs, kernels
from .costs import CALL, WIDE, ZERO, Cost, Kernel, Product, dense_norm_and_sum, gram_norm, inner_norm, scaled_sum
from .factored import Factor, contraction_length, factored, is_convolution, unwidened
from .match import SCATTERS, ParameterGradient
from .memory import owner_of
from .rules import Context
from .sample_types import Expr
from .second_backward import is_repeatable, source


@dataclass(frozen=True)
class Way:
    """One algorithm with its cost. ``norms``: what computes the norms. ``kept``: nodes whose values stay alive until the clip
    factors are known; ``again``: those that are computed a second time then."""

    algorithm: Literal["materialize", "ghost", "flash", "recompute"]
    cost: Cost
    factors: tuple[Factor, ...] = field(default=(), repr=False)
    kept: tuple[fx.Node, ...] = field(default=(), repr=False)
    again: tuple[fx.Node, ...] = field(default=(), repr=False)
    norms: Literal["materialize", "ghost", "flash"] = "materialize"


def ways_of(gradient: ParameterGradient, ctx: Context, backward: Set[fx.Node]) -> list[Way]:
    """Every way that fits a gradient with uses: ``materialize`` always, others where it is a sum of products and rows.

    ``backward``: the values of the backward pass. Those may be computed again; the others are there because the forward left them.
    """
    found = _held(gradient, ctx)
    return [*found, *(_recompute(way, backward) for way in found if way.kept and _may_recompute(way, backward))]


def _may_recompute(way: Way, backward: Set[fx.Node]) -> bool:
    late = [source(node) for node in way.kept if node in backward]
    return bool(late) and all(node in backward and is_repeatable(node) for node in late)


def _recompute(way: Way, backward: Set[fx.Node]) -> Way:
    """The same norms; what the clipped sum reads of the backward is made again and not held."""
    again = tuple(node for node in way.kept if node in backward)
    return replace(way, algorithm="recompute", kept=tuple(node for node in way.kept if node not in backward), again=again)


def _held(gradient: ParameterGradient, ctx: Context) -> list[Way]:
    assert gradient.node is not None
    factors = factored(gradient, ctx)
    product = _product(gradient, factors, ctx) if factors else None
    plain = factors is not None and all(f.kind == "outer" and not is_convolution(f) for f in factors)
    streams = plain and product is not None and product.length != 1
    if kernels.fused(gradient.node.meta["val"].device):
        return _fused(gradient, factors, product, streams, ctx)
    found = [_materialize(gradient, factors or (), product, ctx)]
    if factors is not None:
        found.append(_ghost(gradient, factors, product, ctx))
    if factors is not None and product is not None and streams:
        found.append(_flash(gradient, factors, product))
    return found


def _fused(
    gradient: ParameterGradient, factors: tuple[Factor, ...] | None, product: Product | None, streams: bool, ctx: Context
) -> list[Way]:
    """The same ways with the costs of the kernels of ``templates``."""
    node = gradient.node
    assert node is not None
    target = fused_costs.Target(ctx.batch, sympy.Mul(*ctx.shape(node)), node.meta["val"].dtype.itemsize)
    rows = [factor for factor in factors or () if factor.kind == "rows"]
    convolution = any(is_convolution(factor) for factor in factors or ())
    if rows or any(use.node.target in SCATTERS for use in gradient.uses):
        dense = fused_costs.materialized_rows(product, target)
    elif convolution and product is not None:
        dense = fused_costs.materialized_convolution(product, target)
    else:
        reread = _operands_of_sums(gradient, ctx)
        dense = (
            fused_costs.materialized_product(product, target) if product is not None else fused_costs.materialized(target, reread)
        )
    found = [Way("materialize", dense, factors or ())]
    if factors is not None:
        cost = fused_costs.ghost(product, _lookups(rows, ctx) if rows else None, convolution, target)
        found.append(Way("ghost", cost, factors, _kept(gradient), norms="ghost"))
    if factors is not None and product is not None and streams:
        found.append(Way("flash", fused_costs.flash(product, target), factors, _kept(gradient), norms="flash"))
    return found


def _operands_of_sums(gradient: ParameterGradient, ctx: Context) -> Expr:
    """Bytes of both operands where an element-wise product is summed up, each read from memory."""
    leaves = [leaf for use in gradient.uses for i, leaf in enumerate(use.leaves) if i in use.axes]
    products = [leaf for leaf in map(owner_of, leaves) if leaf.target is torch.ops.aten.mul.Tensor]
    width = gradient.node.meta["val"].dtype.itemsize  # type: ignore[union-attr]
    return sympy.Add(*(2 * width * sympy.Mul(*ctx.shape(leaf)) for leaf in products))


def _lookups(rows: list[Factor], ctx: Context) -> fused_costs.Lookups:
    positions = sympy.Add(*(contraction_length(factor, ctx) for factor in rows))
    operands = [unwidened(operand) for operand in _operands(rows[0]) if operand.meta["val"].is_floating_point()]
    return fused_costs.Lookups(positions, ctx.shape(rows[0].use.operation)[-1], operands[0].meta["val"].dtype.itemsize)


def _product(gradient: ParameterGradient, factors: tuple[Factor, ...], ctx: Context) -> Product | None:
    """All matrix-product uses as one longer contraction; None where there is none."""
    outer = [f for f in factors if f.kind == "outer"]
    if not outer:
        return None
    p, *columns = ctx.shape(outer[0].use.node)
    length = sympy.Add(*(contraction_length(f, ctx) for f in outer))
    dtype = _operands(outer[0])[0].meta["val"].dtype
    return Product(ctx.batch, length, p, sympy.Mul(*columns), dtype)


def _operands(factor: Factor) -> list[fx.Node]:
    return [leaf for i, leaf in enumerate(factor.use.leaves) if i in factor.use.axes]


def _kept(gradient: ParameterGradient) -> tuple[fx.Node, ...]:
    nodes = (leaf for use in gradient.uses for i, leaf in enumerate(use.leaves) if i in use.axes)
    return tuple(dict.fromkeys(nodes))


def _materialize(gradient: ParameterGradient, factors: tuple[Factor, ...], product: Product | None, ctx: Context) -> Way:
    assert gradient.node is not None
    value = gradient.node.meta["val"]
    size = sympy.Mul(*ctx.shape(gradient.node))
    dense = value.dtype.itemsize * ctx.batch * size
    if product is not None:
        return Way(
            "materialize",
            Cost((product.per_sample(), *dense_norm_and_sum(ctx.batch, size)), (product.summed(),), product.dense_bytes),
            factors,
        )
    write = Kernel(traffic=dense)
    return Way(
        "materialize",
        Cost((write, *dense_norm_and_sum(ctx.batch, size)), (Kernel(traffic=value.dtype.itemsize * size),), dense),
        factors,
    )


def _ghost(gradient: ParameterGradient, factors: tuple[Factor, ...], product: Product | None, ctx: Context) -> Way:
    """Inner products for products, segment sums for rows, and the cross term between them; then the sum from scaled operands."""
    parts: tuple[Kernel, ...] = ()
    replaced: tuple[Kernel, ...] = ()
    rows = [f for f in factors if f.kind == "rows"]
    if product is not None:
        parts += _norm(product, bool(rows)) + scaled_sum(product)
        replaced += (product.summed(),)
    if rows:
        width = ctx.shape(rows[0].use.operation)[-1]
        entries = ctx.batch * sympy.Add(*(contraction_length(f, ctx) for f in rows)) * width
        parts += (Kernel(traffic=6 * WIDE * entries),)
        if product is not None:
            cross = product.length * sympy.Add(*(contraction_length(f, ctx) for f in rows)) * ctx.batch
            parts += (Kernel(2 * cross * width, 3 * WIDE * cross, torch.float64),)
    held = ZERO
    if product is not None and any(is_convolution(f) for f in factors):
        patches = product.dtype.itemsize * product.batch * product.length * product.d
        parts, held = (*parts, Kernel(traffic=2 * patches)), patches
    return Way("ghost", Cost(parts, replaced, held), factors, _kept(gradient), norms="ghost")


def _norm(product: Product, looked_up: bool) -> tuple[Kernel, ...]:
    if looked_up:
        return gram_norm(product)
    return (Kernel(traffic=2 * product.operands) if product.length == 1 else inner_norm(product),)


def _flash(gradient: ParameterGradient, factors: tuple[Factor, ...], product: Product) -> Way:
    """Products per sample that are squared and added as they are made; then the sum from scaled operands."""
    norm = (product.per_sample(), Kernel(traffic=product.dense_bytes, launches=CALL), Kernel(traffic=product.operands))
    cost = Cost(norm + scaled_sum(product), (product.summed(),), ZERO)
    return Way("flash", cost, factors, _kept(gradient), norms="flash")

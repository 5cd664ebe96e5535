"""The ways to compute one parameter's per-sample norms and clipped sum, with what each costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import sympy
import torch
from torch import fx

from .costs import GRAM, WIDE, ZERO, Cost, Kernel, Product, dense_norm_and_sum, gram_norm, scaled_sum, squared_product_norm
from .factored import Factor, contraction_length, factored, is_convolution
from .match import ParameterGradient
from .rules import Context


@dataclass(frozen=True)
class Way:
    """One algorithm with its cost. ``kept``: nodes whose values stay alive until the clip factors are known."""

    algorithm: Literal["materialize", "ghost", "flash"]
    cost: Cost
    factors: tuple[Factor, ...] = field(default=(), repr=False)
    kept: tuple[fx.Node, ...] = field(default=(), repr=False)


def ways_of(gradient: ParameterGradient, ctx: Context) -> list[Way]:
    """Every way that fits a gradient with uses: ``materialize`` always, others where it is a sum of products and rows."""
    factors = factored(gradient, ctx)
    product = _product(gradient, factors, ctx) if factors else None
    found = [_materialize(gradient, factors or (), product, ctx)]
    if factors is not None:
        found.append(_ghost(gradient, factors, product, ctx))
        if product is not None and all(f.kind == "outer" and not is_convolution(f) for f in factors) and product.length != 1:
            found.append(_flash(gradient, factors, product, ctx))
    return found


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
    assert gradient.node is not None
    fused = gradient.node.meta["val"].device.type == "cuda"
    kernels: tuple[Kernel, ...] = ()
    replaced: tuple[Kernel, ...] = ()
    rows = [f for f in factors if f.kind == "rows"]
    if product is not None:
        norm = (Kernel(traffic=2 * product.operands),) if product.length == 1 else gram_norm(product, fused)
        kernels += norm + scaled_sum(product, fused)
        replaced += (product.summed(),)
    if rows:
        width = ctx.shape(rows[0].use.operation)[-1]
        entries = ctx.batch * sympy.Add(*(contraction_length(f, ctx) for f in rows)) * width
        kernels += (Kernel(traffic=6 * WIDE * entries),)
        if product is not None:
            cross = product.length * sympy.Add(*(contraction_length(f, ctx) for f in rows)) * ctx.batch
            kernels += (Kernel(2 * cross * width, 3 * WIDE * cross, torch.float32 if fused else torch.float64),)
    # A convolution's input patches are written out, and once more in the inner products' type.
    patches = product is not None and any(is_convolution(f) for f in factors)
    held = (WIDE + GRAM) * product.batch * product.length * product.d if patches else ZERO  # type: ignore[union-attr]
    return Way("ghost", Cost(kernels, replaced, held), factors, _kept(gradient))


def _flash(gradient: ParameterGradient, factors: tuple[Factor, ...], product: Product, ctx: Context) -> Way:
    """Products per sample that are squared and added as they are made; then the sum from scaled operands."""
    assert gradient.node is not None
    fused = gradient.node.meta["val"].device.type == "cuda"
    norm = (squared_product_norm(product),) if fused else (product.per_sample(), Kernel(traffic=product.dense_bytes))
    return Way("flash", Cost(norm + scaled_sum(product, fused), (product.summed(),), ZERO), factors, _kept(gradient))
